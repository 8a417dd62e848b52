"""What a step with a refresh holds beside its arguments."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import optax

import sparse_jax

SIZE = 512
WEIGHT = 4 * SIZE**2
# Arrays that jax.random.uniform holds beside its own, on CPUs alone: there it
# hashes whole arrays in a loop, elsewhere entry by entry.
DRAWN = 4


def setUpModule():
  jax.config.update('jax_disable_most_optimizations', False)


def tearDownModule():
  jax.config.update('jax_disable_most_optimizations', True)


def temporaries(method, leaves=1):
  """Those of a donated step of AdamW, in weights of one leaf."""
  tx = sparse_jax.sparsify(optax.adamw(1e-3), method)
  params = {f'layer{i}': {'kernel': jax.ShapeDtypeStruct((SIZE, SIZE),
                                                         jnp.float32)}
            for i in range(leaves)}
  state = jax.eval_shape(
      lambda params: sparse_jax.start(tx, method, params), params)

  def step(params, opt_state, grads):
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  # Of the devices of these tests, one.
  with jax.set_mesh(jax.make_mesh((1,), ('data',), devices=jax.devices()[:1],
                                  axis_types=(jax.sharding.AxisType.Auto,))):
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(
        *state, params).compile()
  return compiled.memory_analysis().temp_size_in_bytes / WEIGHT


class RefreshMemoryTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('static', sparse_jax.static(.9), 0),
      ('gmp', sparse_jax.gmp(.9, update_end=1000), 1),
      ('top_kast', sparse_jax.top_kast(.9, backward_sparsity=.8,
                                       update_every=100), 1.25),
      ('set', sparse_jax.set_(.9), 1.5 + DRAWN),
      ('set_by_sign', sparse_jax.set_(.9, drop_by='sign'), 3.25 + DRAWN),
      ('rigl', sparse_jax.rigl(.9), 2.5),
      ('snfs', sparse_jax.snfs(.9), 3.25))
  def test_a_refresh_holds_few_weights(self, method, bound):
    self.assertLess(temporaries(method), bound + .05)

  def test_leaves_refresh_one_after_the_other(self):
    method = sparse_jax.set_(.9)
    self.assertLess(temporaries(method, leaves=2), 3 + DRAWN)


if __name__ == '__main__':
  absltest.main()
