"""Tests of given masks: the run of `static` with the masks of `static`."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

SHAPES = {'a': {'kernel': (8, 12)}, 'b': {'kernel': (12, 4), 'bias': (4,)}}


def draw(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), SHAPES,
      is_leaf=lambda leaf: isinstance(leaf, tuple))


def train(method):
  tx = sparse_jax.sparsify(optax.adamw(.1), method)
  params, state = sparse_jax.start(tx, method, draw(0))
  step = jax.jit(tx.update)
  for t in range(1, 4):
    updates, state = step(draw(t), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


class FixedTest(parameterized.TestCase):

  @parameterized.parameters(sparse_jax.Unstructured(),
                            sparse_jax.Block((4, 4)), sparse_jax.Filter())
  def test_given_its_masks_it_is_static_bit_for_bit(self, structure):
    static = sparse_jax.static(.5, structure=structure)
    want, state = train(static)
    masks = sparse_jax.get_state(state).forward_masks
    got, state = train(sparse_jax.fixed(masks, structure=structure))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(np.testing.assert_array_equal,
                 sparse_jax.get_state(state).forward_masks, masks)

  def test_masks_by_path_leave_the_others_dense(self):
    mask = np.asarray(draw(1)['a']['kernel']) > 0
    params, state = train(sparse_jax.fixed({'a/kernel': mask}))
    np.testing.assert_array_equal(params['a']['kernel'] != 0, mask)
    self.assertIsNone(sparse_jax.get_state(state).marks['b']['kernel'])
    self.assertTrue(np.all(params['b']['kernel'] != 0))

  def test_a_mask_that_keeps_nothing_is_a_layer_of_zeros(self):
    method = sparse_jax.fixed({'a/kernel': np.zeros((8, 12), bool)})
    params, state = train(method)
    self.assertFalse(np.any(params['a']['kernel']))
    self.assertEqual(sparse_jax.summarize(
        params, state, method).total.forward_density, 0)
    self.assertEqual(method.work(draw(0), 1)['a/kernel'].forward, 0)

  def test_blocks_of_which_layers_keep_unlike_numbers_are_not_packed(self):
    mask = np.zeros((2, 8, 8), bool)
    mask[0, :4, :4] = mask[1, :4] = True
    block = sparse_jax.Block((4, 4))
    for masks, balanced in ((mask, False), (mask[:1] & False, False),
                            (mask[0], True)):
      method = sparse_jax.fixed(
          {'w': masks}, batch_axes=(0,) if masks.ndim > 2 else (),
          structure=sparse_jax.Block((4, 4), balanced=balanced))
      with self.assertRaisesRegex(ValueError, 'fixed.*\'w\' keeps .* blocks'):
        sparse_jax.packed(method)
    sparse_jax.packed(sparse_jax.fixed({'w': mask[0]}, structure=block))
    sparse_jax.packed(sparse_jax.fixed({'w': mask}, structure=block))

  def test_masks_that_do_not_fit_are_named(self):
    with self.assertRaisesRegex(ValueError, '`masks`.*bool'):
      sparse_jax.fixed({'a': {'kernel': np.ones((8, 12))}})
    for masks in ({'c': np.ones((8, 12), bool)},
                  {'a/kernel': np.ones((8, 4), bool)}):
      with self.assertRaisesRegex(ValueError, '`masks`'):
        sparse_jax.fixed(masks).init(draw(0))
    divided = np.zeros((8, 12), bool)
    divided[0, 0] = True
    with self.assertRaisesRegex(ValueError, '`masks`.*whole'):
      sparse_jax.fixed({'a/kernel': divided},
                       structure=sparse_jax.Block((4, 4))).init(draw(0))


if __name__ == '__main__':
  absltest.main()
