"""Conditions that come first, and make what they would be handed."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.jaxprs import sinking


def step(flag, x, y):
  """The update x * y, and whether its sum is judged."""
  update = checkpoint_name(x * y, 'again')
  flag = lax.cond(flag > 0, lambda u: jnp.sum(u), lambda u: 0., update)
  return flag, update


def lean(*args):
  return sinking.conditions_first(
      step, 'again', lambda outs: outs[0],
      lambda args, flag: (args[0], args[1], args[2] + 0 * flag))(*args)


def conds(fn, *args):
  return [eqn for eqn in jax.make_jaxpr(fn)(*args).eqns
          if eqn.primitive.name == 'cond']


class SinkingTest(parameterized.TestCase):

  @parameterized.parameters(0., 1.)
  def test_values_are_those_of_the_function(self, flag):
    x, y = jnp.arange(6.), jnp.full(6, 2.)
    for want, got in zip(step(flag, x, y), jax.jit(lean)(flag, x, y)):
      np.testing.assert_array_equal(want, got)

  def test_a_condition_is_handed_the_arguments(self):
    args = 1., jnp.arange(6.), jnp.full(6, 2.)
    plain, = conds(step, *args)
    made, = conds(lean, *args)
    shapes = lambda eqn: [var.aval.shape for var in eqn.invars].count((6,))
    self.assertEqual((shapes(plain), shapes(made)), (1, 2))

  def test_a_refresh_is_not_handed_the_update(self):
    """Of RigL: gradient, two slots, weight and marks, and no update."""
    tx = sparse_jax.sparsify(optax.adam(.1), sparse_jax.rigl(.5))
    params = {'kernel': jnp.ones((8, 8))}
    update, = conds(lambda *args: tx.update(*args), params, tx.init(params),
                    params)
    large = [var.aval for var in update.invars if var.aval.size == 64]
    self.assertLen(large, 5)

  def test_what_an_optimizer_prints_is_printed_once_each_update(self):
    seen = []

    def note(grads, state, params=None):
      del params
      jax.debug.callback(lambda grad: seen.append(float(grad)),
                         grads['kernel'][0, 0])
      return grads, state

    printing = optax.GradientTransformation(lambda params: (), note)
    tx = sparse_jax.sparsify(optax.chain(printing, optax.sgd(.1)),
                             sparse_jax.rigl(.5, update_every=2))
    params = {'kernel': jnp.ones((2, 2))}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
      updates, state = update(params, state, params)
    jax.block_until_ready(updates)
    jax.effects_barrier()
    self.assertLen(seen, 4)


if __name__ == '__main__':
  absltest.main()
