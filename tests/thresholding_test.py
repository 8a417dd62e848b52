"""Iterative hard thresholding and AbsTopK, by their definitions."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import operators

_SHAPES = {'a': (8, 6), 'b': (5, 7)}


def _random(seed, scale=1.):
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
          for name, shape in _SHAPES.items()}


def _projected(weight, k):
  """The k largest by a sort, zeros elsewhere."""
  flat = np.asarray(weight).ravel()
  kept = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))[:k]
  return np.where(np.isin(np.arange(flat.size), kept), flat, 0).reshape(
      weight.shape)


class IhtTest(parameterized.TestCase):

  @parameterized.product(
      optimizer=('momentum', 'adamw'), ends=((0, None), (4, 20)))
  def test_it_is_the_optimizer_and_a_projection(self, optimizer, ends):
    """Bit for bit: slots are never reset, whatever enters or leaves."""
    inner = {'momentum': optax.sgd(.1, momentum=.9),
             'adamw': optax.adamw(.05, weight_decay=.1)}[optimizer]
    begin, end = ends
    method = sparse_jax.iht(.7, prune_begin=begin, prune_end=end)
    tx = sparse_jax.sparsify(inner, method)
    params = plain = _random(0, .1)
    state, slots = tx.init(params), inner.init(plain)
    update, update_plain = jax.jit(tx.update), jax.jit(inner.update)
    apply, came = jax.jit(optax.apply_updates), 0
    for step in range(1, 31):
      grads = _random([1, step])
      before = params
      updates, state = update(grads, state, params)
      params = apply(params, updates)
      moves, slots = update_plain(grads, slots, plain)
      plain = apply(plain, moves)
      share = 1. if end is None else min(max((step - begin) / (end - begin),
                                             0), 1)
      for name, weight in plain.items():
        k = max(1, round((1 - .7 * share) * weight.size))
        want = _projected(weight, k)
        np.testing.assert_array_equal(params[name], want, f'{step} {name}')
        came += np.sum((np.asarray(before[name]) == 0) & (want != 0))
        self.assertEqual(int(state.sparse.forward_masks[name].sum()), k)
        plain[name] = jnp.asarray(want)
    self.assertGreater(came, 0)

  def test_gradient_of_all_is_that_of_the_projected_weights(self):
    method, params = sparse_jax.iht(.7), _random(0)
    params, state = method.refresh(params, params, method.init(params))
    grads = jax.grad(lambda params: sum(
        jnp.sum(jnp.sin(w)) for w in method.read(params, state).values()))(
            params)
    for name, weight in params.items():
      np.testing.assert_allclose(grads[name], np.cos(weight), rtol=1e-6)

  @parameterized.named_parameters(
      ('end_at_begin', dict(prune_begin=5, prune_end=5), 'prune_end'),
      ('begin', dict(prune_begin=-1), 'prune_begin'),
      ('fixed', dict(sparsity=.5, structure=sparse_jax.NM(2, 4),
                     prune_end=5), 'prune_end'))
  def test_bad_argument_is_named(self, changes, argument):
    with self.assertRaisesRegex(ValueError, f'`{argument}`'):
      sparse_jax.iht(**dict(sparsity=.7) | changes)


class AbsTopKTest(parameterized.TestCase):

  @parameterized.parameters(0., .5, .75, .95)
  def test_values_and_gradient_are_those_of_a_sort(self, sparsity):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 20)),
                    jnp.float32)
    k = sparse_jax.keep_count(20, sparsity)
    want = np.stack([_projected(row, k) for row in x.reshape(12, 20)])
    kept, pull = jax.vjp(lambda x: operators.abs_top_k(x, sparsity), x)
    np.testing.assert_array_equal(kept.reshape(12, 20), want)
    np.testing.assert_array_equal(pull(jnp.ones_like(x))[0] != 0, kept != 0)

  def test_bad_sparsity_is_named(self):
    with self.assertRaisesRegex(ValueError, '`sparsity`'):
      operators.abs_top_k(jnp.ones((2, 3)), 1.)


if __name__ == '__main__':
  absltest.main()
