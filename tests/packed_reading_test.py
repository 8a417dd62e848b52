"""Masks of blocks read as packed weights: the run of the simulated method."""

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from tests import fast_compiler

_BLOCK = sparse_jax.Block((4, 4))
_SETTINGS = dict(structure=_BLOCK, update_every=2)
METHODS = {
    'static': lambda **given: sparse_jax.static(.7, structure=_BLOCK, **given),
    'set': lambda **given: sparse_jax.set_(.7, **_SETTINGS, **given),
    'rigl': lambda **given: sparse_jax.rigl(.7, **_SETTINGS, **given),
    'itop': lambda **given: sparse_jax.itop(.7, **_SETTINGS, **given),
    'dnw': lambda **given: sparse_jax.dnw(.7, structure=_BLOCK, **given),
    'top_kast': lambda **given: sparse_jax.top_kast(
        .7, backward_sparsity=.5, **_SETTINGS, **given),
    'random': lambda **given: sparse_jax.top_kast(
        .7, backward_sparsity=.5, backward_selection='random', **_SETTINGS,
        **given)}
setUpModule = fast_compiler.use
tearDownModule = fast_compiler.leave


class Network(nn.Module):
  """A convolution and two Dense, none a multiple of the block."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(6, (3, 3))(x))
    x = nn.relu(nn.Dense(18)(x.reshape(x.shape[0], -1)))
    return nn.Dense(10)(x)


def images(seed):
  return jax.random.normal(jax.random.key(seed), (4, 5, 5, 3))


def first_params():
  return Network().init(jax.random.key(1), images(0))['params']


def loss_of(method, packed):
  """(params, state, x) -> float[]."""
  def loss(params, state, x):
    weights = (sparse_jax.read_packed(method, params, state) if packed
               else method.read(params, state))
    with nn.intercept_methods(sparse_jax.packed_interceptor):
      outputs = Network().apply({'params': weights}, x)
    return jnp.mean(jnp.square(outputs - 1)) + method.penalty(params, state)

  return loss


class ReadPackedTest(parameterized.TestCase):

  @parameterized.parameters(*METHODS)
  def test_the_run_of_masks(self, name):
    method, runs = METHODS[name](), []
    tx = sparse_jax.sparsify(optax.adam(.01), method)
    for packed in (False, True):
      loss = loss_of(method, packed)

      @jax.jit
      def step(params, state, x, loss=loss):
        value, grads = jax.value_and_grad(loss)(params, state, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads

      params = first_params()
      state, seen = tx.init(params), []
      for t in range(5):
        params, state, value, grads = step(params, state, images(t))
        seen.append((value, grads, params))
      runs.append((seen, state.sparse.marks))
    (want, marks), (got, other) = runs
    jax.tree.map(np.testing.assert_array_equal, other, marks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-3, atol=1e-5), got, want)

  @parameterized.parameters(*METHODS)
  def test_no_product_reads_what_is_dropped(self, name):
    """Of the first Dense, [150, 18]: no operand of a product is as large."""
    method, params = METHODS[name](), first_params()
    state = method.init(params)
    jaxpr = jax.make_jaxpr(loss_of(method, True))(params, state, images(0))
    sizes = [operand.aval.size for eqn in _all_equations(jaxpr.jaxpr)
             if eqn.primitive.name == 'dot_general'
             for operand in eqn.invars[1:]]
    self.assertNotEmpty(sizes)
    self.assertLess(max(sizes), 150 * 18 / 2)

  def test_what_cannot_be_packed_is_refused(self):
    params = {'kernel': jnp.ones((8, 8))}
    for method, message in (
        (sparse_jax.gmp(.5, update_end=9, structure=_BLOCK), 'count'),
        (sparse_jax.top_kast(.5, backward_sparsity=.2, stop_exploration_at=3,
                             structure=_BLOCK), 'count'),
        (sparse_jax.swat(.5, structure=_BLOCK), 'operators'),
        (sparse_jax.powerprop(sparse_jax.static(.5, structure=_BLOCK)),
         'count'),
        (sparse_jax.static(.5), r'structure=Block.*kernel'),
        (sparse_jax.static(.5, structure=_BLOCK, batch_axes=(0,)),
         'batch_axes')):
      shape = (2, 8, 8) if message == 'batch_axes' else (8, 8)
      params = {'kernel': jnp.ones(shape)}
      with self.assertRaisesRegex(ValueError, message):
        sparse_jax.read_packed(method, params, method.init(params))


def _all_equations(jaxpr):
  """Those of a jaxpr and of all inside it."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(list(eqn.params.values())):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _all_equations(inner)


if __name__ == '__main__':
  absltest.main()
