"""SWAT's saved activations on eight devices lie where the examples do."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.operators import operands
from sparse_jax.operators import sparse_products

P = jax.sharding.PartitionSpec
SPARSITY, EXAMPLES, SIZE = .9, 512, 64
MOVES = r' (sort|all-gather|all-to-all|collective-permute)(?:-start)?\('


def product(scope='tensor'):
  dot = sparse_products.sparse_dot_general(
      operands.Operands(backward_activation=SPARSITY), activation_scope=scope,
      pack='split')
  return lambda x, w: dot(x, w, (((1,), (0,)), ((), ())))


def gradients(x, w, scope):
  """Of the input and the weight, for a cotangent that is not constant."""
  y, pull = jax.vjp(product(scope), x, w)
  return pull(jnp.sin(y))


def problem():
  keys = jax.random.split(jax.random.key(0), 2)
  return (jax.random.normal(keys[0], (EXAMPLES, SIZE)),
          jax.random.normal(keys[1], (SIZE, 32)))


def split(axes, x, w):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(
      getattr(jax.sharding.AxisType, axes),))
  place = lambda spec: jax.sharding.NamedSharding(mesh, spec)
  return mesh, jax.device_put(x, place(P('data'))), jax.device_put(
      w, place(P()))


class DevicesTest(parameterized.TestCase):

  @parameterized.product(axes=['Auto', 'Explicit'],
                         scope=['tensor', 'example', 8])
  def test_gradients_are_those_of_one_device_and_nothing_moves(self, axes,
                                                               scope):
    x, w = problem()
    want = gradients(x, w, scope)
    mesh, x, w = split(axes, x, w)
    with jax.set_mesh(mesh):
      run = jax.jit(gradients, static_argnums=2).lower(x, w, scope).compile()
    self.assertEmpty(re.findall(MOVES, run.as_text()))
    for got, wanted in zip(run(x, w), want):
      np.testing.assert_allclose(got, wanted, atol=1e-4)

  @parameterized.parameters('Auto', 'Explicit')
  def test_each_device_keeps_a_share_of_its_own_examples(self, axes):
    """Values for its share and a quarter more, a bit for each of its entries.
    """
    mesh, x, w = split(axes, *problem())
    save = jax.jit(lambda x, w: jax.tree.leaves(jax.vjp(product(), x, w)[1]))
    with jax.set_mesh(mesh):
      saved = save(x, w)
    own = [leaf.addressable_shards[0].data for leaf in saved]
    entries = EXAMPLES * SIZE // 8
    room = int(np.ceil(1.25 * round((1 - SPARSITY) * entries)))
    self.assertEqual(sorted(leaf.nbytes for leaf in own if leaf.ndim),
                     sorted([4 * room, entries // 8, w.nbytes]))

  def test_what_a_device_has_no_room_for_is_lost(self):
    """All that is large lies in the first eighth of the examples."""
    x, w = problem()
    x = x.at[:EXAMPLES // 8].multiply(100)
    dy = jnp.ones((EXAMPLES, 32))
    backward = jax.jit(lambda x, w: jax.vjp(product(), x, w)[1](dy)[1])
    kept = lambda *args: float(jnp.abs(backward(*args)).sum())
    mesh, many, same = split('Auto', x, w)
    self.assertLess(kept(many, same), kept(x, w))
    self.assertGreater(kept(many, same), 0)


if __name__ == '__main__':
  absltest.main()
