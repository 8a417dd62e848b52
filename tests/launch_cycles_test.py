"""Counting the cycles of a compiled program: loops, branches, kernels."""

from absl.testing import absltest

from launch import cycles

_CHIP = cycles.Chip(clock=1e9, flops=1e12, bandwidth=1e11, hbm=16)
# As libtpu writes it, most of it left out.
_PROGRAM = '''HloModule jit_f, is_scheduled=true

%fused (p: f32[8,4]) -> f32[8,4] {
  ROOT %m = f32[8,4]{1,0:T(8,128)} multiply(%p, %p), x={"estimated_cycles":"999"}
}

%body.1 (w: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = f32[8,4]{1,0:T(8,128)S(1)} all-reduce(%q), channel_id=1, to_apply=%add
  %f = f32[8,4]{1,0:T(8,128)} fusion(%r), kind=kLoop, calls=%fused, x={"estimated_cycles":"10"}
  ROOT %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%i, %f)
}

%until.1 (w: (s32[], f32[8,4])) -> pred[] {
  %end = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%open.1 (w: (s32[], f32[8,4])) -> pred[] {
  %zero = f32[]{:T(128)} constant(0)
  ROOT %lt = pred[]{:T(512)} compare(%sum, %zero), direction=LT
}

%cheap (p: f32[8,4]) -> f32[8,4] {
  ROOT %c = f32[8,4]{1,0} copy(%p), x={"estimated_cycles":"500"}
}

%dear (p: f32[8,4]) -> f32[8,4] {
  %g = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%p), dimensions={0}
  %h = bf16[32]{0} all-gather-done(%g)
  ROOT %s = f32[8,4]{1,0} sort(%p), dimensions={1}, to_apply=%less
}

ENTRY %main.1 (a: f32[8,4], due: pred[]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %while.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)(2,1)S(1)}) while(%t0), condition=%until.1, body=%body.1, x={}
  %while.2 = (s32[]{:T(128)}, f32[8,4]{1,0}) while(%t1), condition=%open.1, body=%body.1, x={}
  %cond = f32[8,4]{1,0} conditional(%due, %a, %a), branch_computations={%cheap, %dear}
  %k = f32[8,4]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", x={"cost_estimate":{"flops":"2000000","transcendentals":"0","bytes_accessed":"100"}}
  %k2 = f32[8,4]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", x={"cost_estimate":{"flops":"1000","transcendentals":"0","bytes_accessed":"300000"}}
  ROOT %call = f32[8,4]{1,0} call(%a), to_apply=%cheap
}
'''  # noqa: E501


class CountTest(absltest.TestCase):

  def test_an_ordinary_step_takes_the_cheaper_branch(self):
    """30 + 10 of loops, 500 of the branch, 2000 and 3000 of kernels, 500."""
    found = cycles.count(_PROGRAM, _CHIP, dearest=False)
    self.assertEqual(found.cycles, 30 + 10 + 500 + 2000 + 3000 + 500)
    self.assertEqual(found.unknown, {'loop': 1})
    self.assertEqual(found.collectives, {'all-reduce': 4 * 8 * 4 * 4})

  def test_what_has_no_estimate_is_dear(self):
    found = cycles.count(_PROGRAM, _CHIP, dearest=True)
    self.assertEqual(found.cycles, 30 + 10 + 2000 + 3000 + 500)
    self.assertEqual(found.unknown, {'loop': 1, 'sort': 1})
    self.assertEqual(found.collectives, {'all-reduce': 512, 'all-gather': 64})


if __name__ == '__main__':
  absltest.main()
