"""Packed steps whose blocks lie in the host's memory, mapped by vmap."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from tests import methods_test

BLOCK = sparse_jax.Block((4, 4))
SEEDS = 3


def normal(key, *shape):
  return jax.random.normal(jax.random.key(key), shape)


def model(params, x):
  h = jnp.tanh(x @ params['first'])
  for layer in range(2):
    h = jnp.tanh(h @ params['stack'][layer])
  return h


def loop(**options):
  """(seed -> state, state -> (state, loss)) of a packed Top-KAST run."""
  method = sparse_jax.packed(sparse_jax.top_kast(
      .75, backward_sparsity=.5, structure=BLOCK, batch_axes={'stack': (0,)},
      **options))
  tx = sparse_jax.sparsify(optax.adam(.05), method)

  def init(seed):
    keys = jax.random.split(jax.random.key(seed))
    return sparse_jax.start(tx, method, {
        'first': jax.random.normal(keys[0], (16, 8)) / 4,
        'stack': jax.random.normal(keys[1], (2, 8, 8)) / 3})

  def step(state, batch):
    params, opt_state = state
    grads = jax.grad(lambda params: jnp.mean(jnp.square(
        sparse_jax.with_method(model, method, opt_state)(params, batch) - 1)))(
            params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return init, step


class MappedTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('at_times', dict(update_every=2)), ('always', dict(update_every=1)))
  def test_seeds_in_one_program_are_the_runs_one_by_one(self, options):
    init, step = loop(**options)
    compiled = lambda fn: jax.jit(fn, compiler_options=methods_test.QUICK)
    one, batch = compiled(step), normal(9, 5, 16)
    many = compiled(jax.vmap(step, (0, None)))
    states = [init(seed) for seed in range(SEEDS)]
    stacked = compiled(jax.vmap(init))(jnp.arange(SEEDS))
    for _ in range(4):
      states = [one(state, batch) for state in states]
      stacked = many(stacked, batch)
    self.assertEqual(many._cache_size(), 1)
    place = sparse_jax.get_state(stacked[1]).packed['first']
    self.assertEqual(jax.typeof(place.reservoir).memory_space,
                     jax.memory.Space.Host)
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    # Products of a batch are summed in another order.
    jax.tree.map(lambda got, want: np.testing.assert_allclose(
        got, want, atol=1e-4), stacked, want)
    before = jax.vmap(init)(jnp.arange(SEEDS))
    self.assertTrue(np.any(place.ids != sparse_jax.get_state(
        before[1]).packed['first'].ids))

  def test_batches_may_be_mapped_alone_and_maps_nested(self):
    init, step = loop(update_every=1)
    state, batches = init(0), normal(8, 2, 2, 5, 16)
    mapped = jax.vmap(jax.vmap(step, (None, 0)), (None, 0))
    got = jax.jit(mapped, compiler_options=methods_test.QUICK)(state, batches)
    one = jax.jit(step, compiler_options=methods_test.QUICK)
    for i, j in np.ndindex(2, 2):
      jax.tree.map(lambda got, want: np.testing.assert_allclose(
          got[i, j], want, atol=1e-4), got, one(state, batches[i, j]))


if __name__ == '__main__':
  absltest.main()
