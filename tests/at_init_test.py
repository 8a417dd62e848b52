"""SNIP and GraSP: masks from the first gradients."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

W6 = np.array([[.5, -.1, .3, -.8, .2, .05]], np.float32)
G0 = np.array([[.1, -.9, .2, .05, -.6, .4]], np.float32)


def slow_top(scores, count):
  order = np.argsort(-np.ravel(scores), kind='stable')
  mask = np.zeros(np.size(scores), bool)
  mask[order[:count]] = True
  return mask.reshape(np.shape(scores))


def first_update(method, params, grads, optimizer=optax.sgd(.1), **extra):
  """Parameters, state and masks after one update."""
  tx = sparse_jax.sparsify(optimizer, method)

  @jax.jit
  def step(params, grads):
    updates, state = tx.update(grads, tx.init(params), params, **extra)
    return optax.apply_updates(params, updates), state

  params, state = step(params, grads)
  return params, state, sparse_jax.get_state(state).forward_masks


def two_leaves():
  rng = np.random.default_rng(3)
  params = {'a': rng.normal(size=(4, 6)), 'b': rng.normal(size=(6, 5)) * .2}
  grads = {'a': rng.normal(size=(4, 6)), 'b': rng.normal(size=(6, 5))}
  return tuple(jax.tree.map(lambda x: x.astype(np.float32), tree)
               for tree in (params, grads))


class SnipTest(parameterized.TestCase):

  def test_specified_example(self):
    _, _, masks = first_update(sparse_jax.snip(.5), {'w': jnp.array(W6)},
                               {'w': jnp.array(G0)})
    np.testing.assert_array_equal(masks['w'], [[0, 1, 1, 0, 1, 0]])

  def test_masks_are_full_before_the_first_update(self):
    params, _ = two_leaves()
    masks = sparse_jax.snip(.5).init(params).forward_masks
    self.assertTrue(all(mask.all() for mask in masks.values()))

  def test_layers_keep_their_own_share(self):
    params, grads = two_leaves()
    _, _, masks = first_update(sparse_jax.snip(.75), params, grads)
    for name, mask in masks.items():
      scores = np.abs(np.asarray(params[name]) * np.asarray(grads[name]))
      np.testing.assert_array_equal(mask, slow_top(
          scores, sparse_jax.keep_count(scores.size, .75)))

  def test_global_scope_ranks_all_entries_and_empties_no_layer(self):
    params, grads = two_leaves()
    params['b'] *= 1e-6  # No entry of b is among the best.
    _, _, masks = first_update(sparse_jax.snip(.75, scope='global'), params,
                               grads)
    a = np.abs(np.asarray(params['a']) * np.asarray(grads['a']))
    b = np.abs(np.asarray(params['b']) * np.asarray(grads['b']))
    np.testing.assert_array_equal(masks['a'], slow_top(
        a, sparse_jax.keep_count(54, .75) - 1))
    np.testing.assert_array_equal(masks['b'], slow_top(b, 1))

  def test_later_gradients_move_nothing(self):
    params, grads = two_leaves()
    method = sparse_jax.snip(.5)
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    params, state, first = first_update(method, params, grads)
    update = jax.jit(tx.update)
    for _ in range(3):
      other = jax.tree.map(lambda g: np.flip(-g, 0), grads)
      updates, state = update(other, state, params)
      params = optax.apply_updates(params, updates)
      jax.tree.map(np.testing.assert_array_equal,
                   sparse_jax.get_state(state).forward_masks, first)
      for name in params:
        self.assertFalse(np.any(np.asarray(params[name])[~first[name]]))

  def test_skip_step_only_chooses_the_masks(self):
    params, grads = two_leaves()
    stay, state, masks = first_update(sparse_jax.snip(.5, skip_step=True),
                                      params, grads, optax.sgd(.1, .9))
    trained, _, same = first_update(sparse_jax.snip(.5), params, grads,
                                    optax.sgd(.1, .9))
    for name, mask in masks.items():
      np.testing.assert_array_equal(mask, same[name])
      np.testing.assert_array_equal(stay[name], np.where(mask, params[name],
                                                         0))
      moved = np.asarray(trained[name]) != np.asarray(stay[name])
      self.assertTrue(np.all(moved[mask]))
    trace = state.inner[0].trace
    self.assertFalse(any(np.any(leaf) for leaf in jax.tree.leaves(trace)))


class GraspTest(parameterized.TestCase):

  def test_specified_example(self):
    """H = diag(1, 2, 3, 1, 1, 1); the three of largest -w * Hg go."""
    weights = jnp.array([[1., 1., 1., -1.5, 2., .5]])
    curvature = jnp.array([[1., 2., 3., 1., 1., 1.]])
    grad_fn = lambda params: {'w': curvature * params['w']}
    _, _, masks = first_update(sparse_jax.grasp(.5), {'w': weights}, grad_fn(
        {'w': weights}), grad_fn=grad_fn)
    np.testing.assert_array_equal(masks['w'], [[0, 1, 1, 0, 1, 0]])

  @parameterized.parameters('layer', 'global')
  def test_equals_the_product_with_the_whole_hessian(self, scope):
    """Biases are held constant: the gradient's flow is that of kernels."""
    rng = np.random.default_rng(0)
    shapes = {'a': (3, 4), 'b': (4, 2), 'bias': (4,)}
    params = {name: rng.normal(size=shape).astype(np.float32)
              for name, shape in shapes.items()}
    x, y = (rng.normal(size=size).astype(np.float32)
            for size in ((5, 3), (5, 2)))

    def loss(params):
      hidden = jnp.tanh(x @ params['a'] + params['bias'][None])
      return jnp.sum(jnp.square(hidden @ params['b'] - y))

    grad_fn = jax.grad(loss)
    _, _, masks = first_update(sparse_jax.grasp(.5, scope=scope), params,
                               jax.jit(grad_fn)(params), grad_fn=grad_fn)
    kernels = {name: params[name] for name in ('a', 'b')}
    flat, unflat = jax.flatten_util.ravel_pytree(kernels)
    of_flat = lambda v: loss(params | unflat(v))
    hessian, gradient = jax.jit(lambda v: (
        jax.hessian(of_flat)(v), jax.grad(of_flat)(v)))(flat)
    worth = jax.tree.map(np.asarray, unflat(np.asarray(flat) * (
        np.asarray(hessian) @ np.asarray(gradient))))
    if scope == 'layer':
      want = {name: slow_top(worth[name], worth[name].size // 2)
              for name in worth}
    else:
      chosen = slow_top(np.concatenate([worth['a'].ravel(),
                                        worth['b'].ravel()]), 10)
      want = {'a': chosen[:12].reshape(3, 4), 'b': chosen[12:].reshape(4, 2)}
    for name, mask in want.items():
      np.testing.assert_array_equal(masks[name], mask)

  def test_without_grad_fn_it_says_so(self):
    params, grads = two_leaves()
    with self.assertRaisesRegex(ValueError, 'grad_fn'):
      first_update(sparse_jax.grasp(.5), params, grads)


if __name__ == '__main__':
  absltest.main()
