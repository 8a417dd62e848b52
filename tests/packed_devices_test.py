"""Packed storage on eight devices makes the run of one."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

P = jax.sharding.PartitionSpec
BLOCK = sparse_jax.Block((4, 4))
METHODS = {
    'rigl': sparse_jax.rigl(.5, structure=BLOCK, update_every=2),
    'top_kast': sparse_jax.top_kast(.75, backward_sparsity=.5,
                                    structure=BLOCK, update_every=2)}


def model(params, x):
  return jnp.tanh(x @ params['a']) @ params['b']


def train(method, kind):
  """Weights and loss after five steps: 'one' device, 'data', or 'fsdp'."""
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (16, 16))
  tx = sparse_jax.sparsify(optax.adam(.01), method)
  state = sparse_jax.start(tx, method, {
      'a': jax.random.normal(keys[1], (16, 32)),
      'b': jax.random.normal(keys[2], (32, 16))})
  options = {}
  if kind != 'one':
    mesh = jax.make_mesh((8,), ('data',),
                         axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, P())
    rows = jax.sharding.NamedSharding(mesh, P('data'))

    def place(path, leaf):
      if getattr(path[-1], 'name', '') == 'reservoir':
        return whole.with_memory_kind('pinned_host')
      split = kind == 'fsdp' and leaf.ndim == 3 and leaf.shape[0] % 8 == 0
      return rows if split else whole

    places = jax.tree.map_with_path(place, state)
    state, x = jax.device_put(state, places), jax.device_put(x, rows)
    options = dict(out_shardings=(places, whole))

  def step(state, x):
    params, opt_state = state

    def loss_fn(params):
      apply = sparse_jax.with_method(model, method, opt_state)
      return jnp.mean(jnp.square(apply(params, x) - 1))

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  step = jax.jit(step, **options)
  for _ in range(5):
    state, loss = step(state, x)
  spec = state[0]['a'].blocks.sharding.spec if kind != 'one' else None
  return (sparse_jax.dense_weights(method, *state), float(loss), spec,
          step._cache_size())


class DevicesTest(parameterized.TestCase):

  @parameterized.product(name=list(METHODS), kind=['data', 'fsdp'])
  def test_run_is_that_of_one_device(self, name, kind):
    method = sparse_jax.packed(METHODS[name])
    want, want_loss, _, _ = train(method, 'one')
    got, loss, spec, compiled = train(method, kind)
    self.assertAlmostEqual(loss, want_loss, delta=1e-4)
    for path, weight in want.items():
      np.testing.assert_allclose(got[path], weight, atol=1e-5)
    self.assertEqual(compiled, 1)
    self.assertEqual(spec, P('data') if kind == 'fsdp' else P())


if __name__ == '__main__':
  absltest.main()
