"""GraNet and MEST beside slow loops in NumPy."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.masks import marks as marks_lib

_RATE = np.float32(.1)
_SHAPES = {'a': (6, 8), 'b': (10, 4), 'c': (2, 2, 3, 5)}


def _params():
  rng = np.random.default_rng(0)
  return {name: jnp.asarray((1 + i) * rng.normal(size=shape), jnp.float32)
          for i, (name, shape) in enumerate(_SHAPES.items())}


def _gradients(step):
  rng = np.random.default_rng([1, step])
  return {name: jnp.asarray(rng.normal(size=shape), jnp.float32)
          for name, shape in _SHAPES.items()}


def _top(scores, k, among):
  """bool: the k best of a group of places; ties to the earlier; by a sort."""
  flat = np.where(among, scores, -np.inf).ravel()
  mask = np.zeros(flat.size, bool)
  mask[sorted(range(flat.size), key=lambda i: (-flat[i], i))[:k]] = True
  return mask.reshape(np.shape(scores)) & among


def _walk(method, steps):
  """(step, before, after, gradients) of a run of plain SGD, in NumPy.

  What is before are the parameters that the step has moved, within the old
  masks, and those masks.
  """
  params = _params()
  tx = sparse_jax.sparsify(optax.sgd(float(_RATE)), method)
  state, update = tx.init(params), jax.jit(tx.update)
  for step in range(1, steps + 1):
    grads = _gradients(step)
    old = {name: np.array(mask)
           for name, mask in state.sparse.forward_masks.items()}
    moved = {name: np.where(old[name], np.asarray(params[name]) - _RATE
                            * np.asarray(grads[name]), 0) for name in _SHAPES}
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    new = {name: np.array(mask)
           for name, mask in state.sparse.forward_masks.items()}
    for name in _SHAPES:
      np.testing.assert_allclose(
          params[name], np.where(old[name] & new[name], moved[name], 0),
          rtol=1e-5, atol=1e-6)
      moved[name] = np.where(old[name] & new[name], params[name], moved[name])
    yield step, (moved, old), new, {name: np.asarray(grad)
                                    for name, grad in grads.items()}


def _count(masks):
  return sum(int(mask.sum()) for mask in masks.values())


class GranetTest(parameterized.TestCase):

  def _expected(self, step, moved, old, grads, begin, end, fraction):
    """Masks by the definition, pruned over all leaves and regrown in each."""
    share = min(max((step - begin) / (end - begin), 0), 1)
    sparsity = .8 - .4 * (1 - share)**3
    size = sum(mask.size for mask in old.values())
    total = min(round((1 - sparsity) * size), _count(old))
    places = sorted(((-abs(moved[name].flat[i]), n, i)
                     for n, name in enumerate(_SHAPES)
                     for i in np.flatnonzero(old[name])))
    best = [min(place for place in places if place[1] == n) for n in range(3)]
    others = [place for place in places if place not in best]
    chosen = best + others[:total - 3]
    new = {}
    for n, name in enumerate(_SHAPES):
      number = sum(place[1] == n for place in chosen)
      stay = min(max(1, round(number * (1 - fraction))), number)
      kept = _top(np.abs(moved[name]), stay, old[name])
      new[name] = kept | _top(np.abs(grads[name]), number - stay, ~kept)
    return new

  @parameterized.parameters((0, None), (5, None), (0, 30))
  def test_trajectory_is_that_of_the_slow_loop(self, begin, end):
    method = sparse_jax.granet(.8, initial_sparsity=.4, drop_fraction=.5,
                               update_every=4, update_begin=begin,
                               prune_end=18, update_end=end)
    moved_leaves = set()
    for step, (moved, old), new, grads in _walk(method, 32):
      due = (step % 4 == 0 or step == 18) and step >= begin
      want = old
      if due and step <= (end or step):
        fraction = .5 if end is None else .25 * (1 + np.cos(np.pi * step / end))
        want = self._expected(step, moved, old, grads, begin, 18, fraction)
      for name in _SHAPES:
        np.testing.assert_array_equal(new[name], want[name], f'{step} {name}')
      moved_leaves |= {tuple(int(mask.sum()) for mask in new.values())}
    self.assertEqual(_count(new), round(.2 * 148))
    self.assertGreater(len(moved_leaves), 3)

  def test_equal_sparsities_move_no_budget(self):
    method = sparse_jax.granet(.8, initial_sparsity=.8, prune_end=9,
                               update_every=2)
    first = None
    for _, (_, old), new, _ in _walk(method, 8):
      first = first or {name: int(mask.sum()) for name, mask in old.items()}
      self.assertEqual({name: int(mask.sum()) for name, mask in new.items()},
                       first)

  def test_first_masks_are_random_by_erk(self):
    shares = sparse_jax.erk(_SHAPES, .4)
    masks = sparse_jax.granet(.8, initial_sparsity=.4, prune_end=5).init(
        _params()).forward_masks
    for name, mask in masks.items():
      self.assertEqual(int(mask.sum()),
                       sparse_jax.keep_count(mask.size, shares[name]))

  @parameterized.named_parameters(
      ('initial_above', dict(initial_sparsity=.9), 'initial_sparsity'),
      ('initial_nan', dict(initial_sparsity=float('nan')), 'initial_sparsity'),
      ('end_at_begin', dict(update_begin=5), 'prune_end'),
      ('fraction', dict(drop_fraction=2.), 'drop_fraction'),
      ('no_step', dict(prune_end=1.5), 'prune_end'),
      ('fixed', dict(sparsity=.5, structure=sparse_jax.NM(2, 4)), 'structure'))
  def test_bad_argument_is_named(self, changes, argument):
    with self.assertRaisesRegex(ValueError, f'`{argument}`'):
      sparse_jax.granet(**dict(sparsity=.8, prune_end=5) | changes)


class MestTest(parameterized.TestCase):

  @parameterized.product(variant=('em', 'ems'), weight=(0., 3.))
  def test_trajectory_keeps_and_counts_as_the_definition(self, variant,
                                                         weight):
    """What grows is random: it must lie outside what is kept."""
    method = sparse_jax.mest(.8, variant=variant, mutation=(.15, .05, 0.),
                             mutation_ends=(9, 21), gradient_weight=weight,
                             update_every=3)
    grown_anew = 0
    for step, (moved, old), new, grads in _walk(method, 30):
      delta = .15 if step < 9 else .05 if step < 21 else 0.
      for name, active in old.items():
        if step % 3:
          np.testing.assert_array_equal(new[name], active)
          continue
        k, d = round(.2 * active.size), round(delta * active.size)
        stay, total = (k, k + d) if variant == 'ems' else (k - d, k)
        score = np.abs(moved[name]) + weight * np.abs(grads[name])
        kept = _top(score, max(stay, 1), active)
        self.assertTrue(np.all(new[name] | ~kept), f'{step} {name}')
        self.assertEqual(int(new[name].sum()), total)
        grown_anew += int((new[name] & ~active).sum())
    self.assertGreater(grown_anew, 20)
    self.assertEqual(_count(new), sum(
        sparse_jax.keep_count(mask.size, .8) for mask in new.values()))

  def test_growth_reaches_everything(self):
    method = sparse_jax.mest(.5, mutation=(.4,), update_every=1)
    params = {'w': jnp.ones((6, 6))}
    state, refresh = method.init(params), jax.jit(method.refresh)
    for _ in range(40):
      params, state = refresh(params, params, state)
    ever = marks_lib.ever_active(state.marks['w'])
    self.assertTrue(np.all(ever))

  def test_parts_of_the_run_are_even_without_ends(self):
    method = sparse_jax.mest(.5, variant='ems', mutation=(.25, .125, 0.),
                             update_every=1, update_end=8)
    params = {'w': jnp.ones((4, 4))}
    state, counts = method.init(params), []
    refresh = jax.jit(method.refresh)
    for _ in range(10):
      counts.append(int(state.forward_masks['w'].sum()))
      params, state = refresh(params, params, state)
    self.assertEqual(counts, [12] * 4 + [10] * 4 + [8] * 2)

  @parameterized.named_parameters(
      ('variant', dict(variant='es'), 'variant'),
      ('no_numbers', dict(mutation=()), 'mutation'),
      ('one_number', dict(mutation=.1), 'mutation'),
      ('above_one', dict(mutation=(1.5,)), 'mutation'),
      ('all_that_is_kept', dict(mutation=(.2, .1)), 'mutation'),
      ('the_default_at_98', dict(sparsity=.98), 'mutation'),
      ('too_few_ends', dict(mutation_ends=(5,)), 'mutation_ends'),
      ('falling_ends', dict(mutation_ends=(5, 4)), 'mutation_ends'),
      ('no_steps', dict(mutation_ends=(1.5, 4)), 'mutation_ends'),
      ('weight', dict(gradient_weight=-1.), 'gradient_weight'))
  def test_bad_argument_is_named(self, changes, argument):
    with self.assertRaisesRegex(ValueError, f'`{argument}`'):
      sparse_jax.mest(**{'sparsity': .8} | changes)


if __name__ == '__main__':
  absltest.main()
