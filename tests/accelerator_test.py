"""Tests of the cycle model against a reference that moves entry by entry."""

import itertools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparse_jax.cost import accelerator
from sparse_jax.jaxprs import products

Machine = accelerator.Machine
SMALL = Machine(lanes=4, rows=3, columns=2, tiles=2, lookahead=2, lookaside=3)


def reference(rows, lanes, steps, lookahead, lookaside, buffer_steps=None):
  """Cycles of one group; `rows` are sets of (step, lane) yet to be done."""
  rows, place, cycles = [set(row) for row in rows], 0, 0
  while place < steps:
    cycles += 1
    for row in rows:
      idle = []
      for lane in range(lanes):
        if (place, lane) in row:
          row.remove((place, lane))
        else:
          idle.append(lane)
      for lane in idle:
        wishes = []
        for ahead in range(1, lookahead + 1):
          wishes.append((place + ahead, lane))
          for i in range(lookaside):
            away = i // 2 + 1
            if (away - 1) % lookahead + 1 == ahead:
              other = lane - away if i % 2 == 0 else lane + away
              wishes.append((place + ahead, other % lanes))
        for wish in wishes:
          if wish in row:
            row.remove(wish)
            break
    moved = 0
    while moved <= lookahead and (buffer_steps is None
                                  or moved < buffer_steps):
      if any(step == place + moved for row in rows for step, _ in row):
        break
      moved += 1
    place += moved
  return cycles


def slow_pass(vectors, others, machine):
  """(dense, sparse) cycles; vectors are lists of parts, lists of bools."""
  rows, steps = [], 0
  for parts in vectors:
    row, steps = set(), 0
    for part in parts:
      for i, value in enumerate(part):
        if value:
          row.add((steps + i // machine.lanes, i % machine.lanes))
      steps += -(-len(part) // machine.lanes)
    rows.append(row)
  dense = sparse = 0
  for _ in range(-(-others // machine.columns)):
    groups = [rows[i:i + machine.rows]
              for i in range(0, len(rows), machine.rows)]
    for i in range(0, len(groups), machine.tiles):
      dense += steps
      sparse += max(reference(group, machine.lanes, steps, machine.lookahead,
                              machine.lookaside, machine.buffer_steps)
                    for group in groups[i:i + machine.tiles])
  return dense, sparse


def sparse(seed, shape, density=.4):
  random = np.random.default_rng(seed)
  return random.standard_normal(shape) * (random.random(shape) < density)


def product_of(fn, weight, x):
  product, = products.find_products(
      fn, *(jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (weight, x)))
  return product


class ScheduleTest(parameterized.TestCase):

  @parameterized.parameters(
      (0, 0, None), (1, 0, None), (1, 3, None), (2, 5, None), (4, 2, 2),
      (2, 3, 1), (20, 1, None))
  def test_is_the_reference(self, lookahead, lookaside, buffer_steps):
    for seed, density in enumerate((.05, .2, .5, .9)):
      nonzero = sparse(seed, (3, 2, 9, 6), density) != 0
      got = accelerator.schedule(nonzero, lookahead=lookahead,
                                 lookaside=lookaside,
                                 buffer_steps=buffer_steps)
      want = [reference([set(zip(*np.nonzero(row))) for row in group], 6, 9,
                        lookahead, lookaside, buffer_steps)
              for group in nonzero]
      np.testing.assert_array_equal(got, want)

  def test_two_ahead_and_five_aside_are_tensordash(self):
    """All lanes but one are busy; what that one reaches is done at once."""
    reached = {(1, 0), (2, 0), (1, -1), (1, 1), (2, -2), (2, 2), (1, -3)}
    idle = np.arange(16)
    for step, lane in itertools.product((1, 2), range(16)):
      nonzero = np.zeros((16, 1, 3, 16), bool)
      nonzero[:, 0, 0] = ~np.eye(16, dtype=bool)
      nonzero[:, 0, step, lane] = True
      cycles = accelerator.schedule(nonzero, lookahead=2, lookaside=5)
      offsets = (lane - idle + 8) % 16 - 8
      np.testing.assert_array_equal(
          cycles == 1, [(step, offset) in reached for offset in offsets])

  @parameterized.parameters((0, 0), (1, 0), (2, 5), (5, 7))
  def test_bounds(self, lookahead, lookaside):
    steps, reach = 12, lookahead + 1
    for density, bounds in ((0., (-(-steps // reach),) * 2),
                            (1., (steps, steps)),
                            (.3, (-(-steps // reach), steps))):
      nonzero = sparse(0, (4, 3, steps, 8), density) != 0
      got = accelerator.schedule(nonzero, lookahead=lookahead,
                                 lookaside=lookaside)
      self.assertBetween(got.min(), *bounds)
      self.assertBetween(got.max(), *bounds)

  def test_places_count_and_not_numbers(self):
    """Permuted at equal counts, a mask takes other cycles."""
    random = np.random.default_rng(0)
    nonzero = np.zeros((1, 4, 16, 8), bool)
    nonzero[:, :, ::4] = True  # A quarter, in whole steps.
    columns = np.zeros_like(nonzero)
    columns[..., :2] = True  # A quarter, in two lanes of eight.
    mixed = random.permuted(nonzero, axis=2)
    cycles = [int(accelerator.schedule(mask, lookahead=3, lookaside=0)[0])
              for mask in (nonzero, columns, mixed)]
    self.assertEqual(nonzero.sum(), columns.sum())
    self.assertEqual(nonzero.sum(), mixed.sum())
    self.assertEqual(cycles[:2], [4, 16])
    self.assertBetween(cycles[2], 5, 15)

  def test_one_multiplier_that_sees_everything_does_non_zeros_alone(self):
    """But looks at least once at every vector."""
    weight, x = sparse(1, (7, 5)), sparse(2, (3, 7))
    machine = Machine(1, 1, 1, 1, lookahead=40, lookaside=0)
    product = product_of(lambda w, x: x @ w, weight, x)
    got = accelerator.layer_cycles(product, x, weight, machine=machine)
    for cycles, array, axis, others in ((got.forward, weight, 0, 3),
                                        (got.input_gradient, weight, 1, 3),
                                        (got.weight_gradient, x, 0, 5)):
      counts = np.count_nonzero(array, axis=axis)
      self.assertEqual(cycles.sparse, others * np.maximum(counts, 1).sum())
      self.assertEqual(cycles.dense, others * array.size)


class LayerTest(parameterized.TestCase):
  """Whole layers against vectors gathered by hand."""

  def test_dense(self):
    weight, x = sparse(0, (11, 9)), sparse(1, (5, 11))
    product = product_of(lambda w, x: x @ w, weight, x)
    got = accelerator.layer_cycles(product, x, weight, machine=SMALL)
    for cycles, vectors, others in (
        (got.forward, [[weight[:, o]] for o in range(9)], 5),
        (got.input_gradient, [[weight[i]] for i in range(11)], 5),
        (got.weight_gradient, [[x[:, i]] for i in range(11)], 9)):
      self.assertEqual(cycles[:2], slow_pass(vectors, others, SMALL))

  def test_dense_with_the_weight_on_the_left_and_a_batch(self):
    weight, x = sparse(0, (3, 6, 5)), sparse(1, (3, 4, 6))
    product = product_of(
        lambda w, x: lax.dot_general(w, x, (((1,), (2,)), ((0,), (0,)))),
        weight, x)
    self.assertEqual(product.weight, 'lhs')
    got = accelerator.layer_cycles(product, weight, x, machine=SMALL)
    want = np.sum([slow_pass([[w[:, o]] for o in range(5)], 4, SMALL)
                   for w in weight], axis=0)
    self.assertEqual(got.forward[:2], tuple(want))

  @parameterized.parameters(
      ((1, 1), 1, 1, ((1, 1), (1, 1))), ((2, 2), 1, 1, ((0, 1), (1, 1))),
      ((2, 1), 2, 1, ((1, 1), (0, 0))), ((3, 2), 1, 2, ((2, 1), (0, 2))),
      ((1, 2), 1, 1, ((-1, 0), (0, -1))))
  def test_convolution(self, strides, dilation, groups, padding):
    weight, x = sparse(0, (3, 2, 6 // groups, 4)), sparse(1, (2, 7, 6, 6))
    product = product_of(lambda w, x: lax.conv_general_dilated(
        x, w, strides, padding, rhs_dilation=(dilation, 1),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups), weight, x)
    got = accelerator.layer_cycles(product, x, weight, machine=SMALL)
    forward, backward, update = (np.zeros(2, int) for _ in range(3))
    _, height, width, _ = product.shape
    taps = list(itertools.product(range(3), range(2)))
    for g in range(groups):
      w = weight[..., g * 4 // groups:(g + 1) * 4 // groups]
      image = x[..., g * 6 // groups:(g + 1) * 6 // groups]
      outs, ins = w.shape[3], w.shape[2]
      forward += slow_pass([[w[a, b, :, o] for a, b in taps]
                            for o in range(outs)], 2 * height * width, SMALL)
      for rest in itertools.product(*map(range, strides)):
        own = [(a, b) for a, b in taps
               if (a * dilation % strides[0], b % strides[1]) == rest]
        places = [(i, j) for i in range(7) for j in range(6)
                  if ((i + padding[0][0]) % strides[0],
                      (j + padding[1][0]) % strides[1]) == rest]
        if own and places:
          backward += slow_pass([[w[a, b, i] for a, b in own]
                                 for i in range(ins)], 2 * len(places), SMALL)
      seen = {}
      for n, y, z in np.ndindex(2, height, width):
        for a, b in taps:
          i = y * strides[0] + a * dilation - padding[0][0]
          j = z * strides[1] + b - padding[1][0]
          inside = 0 <= i < 7 and 0 <= j < 6
          for c in range(ins):
            seen.setdefault((a, b, c), []).append(
                inside and image[n, i, j, c] != 0)
      update += slow_pass([[row] for _, row in sorted(seen.items())], outs,
                          SMALL)
    self.assertEqual(got.forward[:2], tuple(forward))
    self.assertEqual(got.input_gradient[:2], tuple(backward))
    self.assertEqual(got.weight_gradient[:2], tuple(update))
    self.assertEqual(got.backward, got.input_gradient + got.weight_gradient)

  def test_dense_cycles_of_one_multiplier_are_multiply_adds(self):
    weight, x = sparse(0, (3, 3, 2, 4)), sparse(1, (2, 8, 8, 2))
    product = product_of(lambda w, x: lax.conv_general_dilated(
        x, w, (2, 2), ((0, 1), (0, 1)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC')), weight, x)
    machine = Machine(1, 1, 1, 1, lookahead=0, lookaside=0)
    got = accelerator.layer_cycles(product, x, weight, machine=machine)
    for cycles in got:  # The stride's phases share all taps and all places.
      self.assertEqual(cycles.dense, product.multiply_adds)
      self.assertEqual(cycles.sparse, cycles.dense)

  def test_the_backward_pass_may_have_sparser_activations(self):
    weight, x = sparse(0, (8, 6)), sparse(1, (64, 8), 1.)
    product = product_of(lambda w, x: x @ w, weight, x)
    kept = np.where(np.abs(x) > 1, x, 0)
    dense, thin = (
        accelerator.layer_cycles(product, x, weight, machine=SMALL, saved=saved)
        for saved in (None, kept))
    self.assertEqual(dense[:2], thin[:2])
    self.assertLess(thin.weight_gradient.sparse, dense.weight_gradient.sparse)


class MemoryTest(parameterized.TestCase):

  def passes(self, **fields):
    """Two rounds of two rows, twice each; half of 32 entries are not 0."""
    machine = Machine(lanes=4, rows=1, columns=1, tiles=2, lookahead=1,
                      lookaside=0, value_bytes=2, dram_bytes=4)
    nonzero = np.tile(np.array([True, True, False, False] * 2), (4, 1, 1))
    return accelerator.pass_cycles(nonzero, 2, machine._replace(**fields),
                                   traffic=(32, 20, 10))

  def test_stalls_by_hand(self):
    got = self.passes()
    self.assertEqual(got[:2], (8, 8))  # Both lanes are full in each step.
    self.assertEqual(got.dense_stalls, (64 + 40 + 20) // 4 - 8)
    self.assertEqual(got.sparse_stalls, (32 + 4 + 40 + 20) // 4 - 8)

  def test_a_full_operand_needs_no_bits(self):
    machine = Machine(lanes=4, rows=1, columns=1, tiles=2, dram_bytes=1.)
    machine = machine._replace(lookaside=0)
    got = accelerator.pass_cycles(np.ones((4, 1, 8), bool), 2, machine,
                                  traffic=(32, 20, 10))
    self.assertEqual(got.sparse_stalls, got.dense_stalls)

  def test_fast_memory_never_waits(self):
    got = self.passes(dram_bytes=1e9)
    self.assertEqual(got[2:], (0, 0))
    self.assertEqual(got.speedup_with_stalls, got.speedup)

  def test_what_does_not_fit_is_read_again(self):
    self.assertEqual(self.passes(dense_buffer=39).dense_stalls,
                     (64 + 2 * 40 + 20) // 4 - 8)
    self.assertEqual(self.passes(sparse_buffer=31).dense_stalls,
                     (2 * 64 + 40 + 20) // 4 - 8)
    self.assertEqual(self.passes(sparse_buffer=31).sparse_stalls,
                     (32 + 4 + 40 + 20) // 4 - 8)

  @parameterized.parameters(
      ('lanes', 0), ('rows', 1.5), ('columns', -1), ('tiles', None),
      ('lookahead', -1), ('lookaside', 4), ('lookahead', 0),
      ('buffer_steps', 0), ('value_bytes', 0), ('dram_bytes', 0))
  def test_bad_machines_are_named(self, name, value):
    machine = SMALL._replace(**{name: value})
    with self.assertRaisesRegex(ValueError, f'`{name}`'):
      accelerator.pass_cycles(np.ones((1, 1, 1), bool), 1, machine)

  def test_bad_products_are_named(self):
    x = np.ones((2, 4, 4, 2))
    given = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
    for product in (
        product_of(lambda w, x: jnp.einsum('nhwc,nhwd->cd', x, x), x, x),
        product_of(lambda w, x: lax.conv_general_dilated(
            x, w, (1, 1), ((0, 0), (0, 0)), (2, 1), **given),
                   np.ones((2, 2, 2, 3)), x)):
      with self.assertRaisesRegex(ValueError, '`product`'):
        accelerator.layer_cycles(product, x, x, machine=SMALL)


if __name__ == '__main__':
  absltest.main()
