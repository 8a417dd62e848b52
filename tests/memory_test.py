"""Tests of the bytes that training holds."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import optax

import sparse_jax
from experiments.image import models
from sparse_jax import trees
from sparse_jax.cost import memory


def mlp(params, x):
  return jnp.tanh(x @ params['a']) @ params['b'] @ params['c']


def mlp_args(width=6):
  leaves = {name: jnp.full((width, width), .1) for name in 'abc'}
  return leaves, jnp.ones((5, width))


class MemoryTest(parameterized.TestCase):

  def test_slots_are_those_of_the_optimizer(self):
    args = mlp_args()
    got = memory.memory_cost(mlp, *args, optimizer=optax.adam(1e-3))
    self.assertEqual(got.weights, 3 * 36 * 4)
    self.assertEqual(got.slots, 2 * 3 * 36 * 4 + 4)

  def test_stored_entries_are_values_and_bits(self):
    got = memory.memory_cost(mlp, *mlp_args(), optimizer=optax.adam(1e-3),
                             stored={'b': .25})
    self.assertEqual(got.weights, (36 + 9 + 36) * 4 + 5)
    self.assertEqual(got.slots, 2 * (36 + 9 + 36) * 4 + 4)

  def test_slots_of_a_method(self):
    """A byte a weight for the marks, a step, a key and a flag."""
    args = mlp_args()
    tx = sparse_jax.sparsify(optax.sgd(.1), sparse_jax.static(.5))
    got = memory.memory_cost(mlp, *args, optimizer=tx)
    self.assertEqual(got.slots, 3 * 36 + 4 + 8 + 1)

  def test_saved_activations_are_the_inner_ones(self):
    """Of a chain of products: what enters each layer but the first."""
    def chain(params, x):
      return x @ params['a'] @ params['b'] @ params['c']

    args = mlp_args()
    self.assertEqual(memory.memory_cost(chain, *args).saved_activations,
                     2 * 5 * 6 * 4)
    remat = memory.memory_cost(jax.checkpoint(chain), *args)
    self.assertEqual(remat.saved_activations, 0)

  def test_a_scan_saves_each_round(self):
    def scanned(params, x):
      stack = jnp.stack([params['a'], params['b'], params['c']])
      return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    got = memory.memory_cost(scanned, *mlp_args()).saved_activations
    self.assertEqual(got, 3 * 5 * 6 * 4 + 3 * 36 * 4)

  def test_size_in_bytes(self):
    """RigL's table: values, a bit an entry, and a bias for each output."""
    model = models.create('resnet50', num_classes=1000)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(functools.partial(model.init, train=False),
                            jax.random.key(0), images)['params']
    biases = 4 * (26_560 + 1000)
    kernels = {path: leaf for path, leaf in trees.leaves_by_path(params).items()
               if leaf.ndim > 1}
    for sparsity, want in ((.8, 23.684), (.9, 13.499), (.95, 8.399)):
      shapes = {path: leaf.shape for path, leaf in kernels.items()}
      stored = {path: 1 - share for path, share in sparse_jax.erk(
          shapes, sparsity).items()}
      got = memory.memory_cost(lambda kernels: 0., kernels,
                               stored=stored).weights + biases
      self.assertAlmostEqual(got / 1e6, want, delta=2e-3)

  @parameterized.parameters({'d': .5}, {'a': 1.5}, {'a': -.5})
  def test_bad_arguments_are_named(self, **stored):
    with self.assertRaisesRegex(ValueError, '`stored'):
      memory.memory_cost(mlp, *mlp_args(), stored=stored)


if __name__ == '__main__':
  absltest.main()
