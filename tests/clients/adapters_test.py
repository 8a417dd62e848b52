"""LoRA: adapters beside the kernels of a base that is frozen, or learns too."""

from absl.testing import absltest
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sparse_jax import trees
from tests.clients import laws

INPUTS = jax.random.normal(jax.random.key(0), (16, 8))
TARGETS = jnp.tanh(INPUTS @ jax.random.normal(jax.random.key(1), (8, 8)))
STEPS = 8


class Lora(nn.Module):

  features: int

  @nn.compact
  def __call__(self, x):
    down = self.param('lora_a', nn.initializers.normal(.3), (x.shape[-1], 4))
    up = self.param('lora_b', nn.initializers.zeros, (4, self.features))
    return nn.Dense(self.features, name='base')(x) + x @ down @ up


class Net(nn.Module):

  @nn.compact
  def __call__(self, x):
    return Lora(8)(nn.relu(Lora(16)(x)))


def labels(params):
  return trees.map_leaves(
      lambda path, leaf: 'adapter' if 'lora' in path else 'base', params)


def train(method, tx):
  return laws.train_linen(Net(), method, None, INPUTS, TARGETS, STEPS, tx=tx)


class FrozenBaseTest(laws.LoopTest):
  """A sparse base that stands still, and dense adapters that are trained."""

  title = 'LoRA: a sparse base that is frozen, dense adapters'
  recipe = """
  ```python
  method = sparse_jax.static(.9, is_sparse={'lora': False})
  tx = sparse_jax.sparsify(optax.multi_transform(
      {'adapter': optax.adam(rate), 'base': optax.set_to_zero()}, labels),
                           method)
  ```

  Masks of magnitudes stand still with the base; `fixed(masks)` takes those of a
  pruned network. RigL has nothing to grow here.
  """

  sites = {'is_sparse': {'lora': False}}
  moves = False  # Where no weight moves, no mask of magnitudes does.

  def train(self, method):
    run = train(method, laws.prepare(optax.multi_transform(
        {'adapter': optax.adam(.02), 'base': optax.set_to_zero()}, labels),
                                     method))
    first = Net().init(jax.random.key(0), INPUTS)['params']
    if method is None or method.name == 'top_kast':
      for layer in first:
        laws.assert_same(run.params[layer]['base']['kernel'],
                         first[layer]['base']['kernel'])
    return run


class BothTest(laws.LoopTest):
  """A base that is trained sparse within optax.masked, and dense adapters."""

  title = 'LoRA: a sparse base and dense adapters, both trained'
  recipe = """
  ```python
  tx = optax.chain(
      optax.masked(sparse_jax.sparsify(optax.adam(slow), method), kernels),
      optax.masked(optax.adam(fast), rest))
  ```

  The method is told of no other leaves than `optax.masked` gives it. A packed
  kernel is two arrays, blocks and growth scores: the mask must name both
  (`'/kernel' in path`, not `path.endswith('kernel')`).
  """

  def train(self, method):
    kernels = lambda params: trees.map_leaves(
        lambda path, leaf: '/kernel' in path, params)
    rest = lambda params: jax.tree.map(lambda kernel: not kernel,
                                       kernels(params))
    return train(method, optax.chain(
        optax.masked(laws.prepare(optax.adam(.01), method), kernels),
        optax.masked(optax.adam(.02), rest)))


class SparseAdaptersTest(laws.LoopTest):
  """A dense base that is frozen, and sparse adapters."""

  title = 'LoRA: a frozen dense base, sparse adapters'
  recipe = """
  ```python
  tx = optax.multi_transform(
      {'adapter': sparse_jax.sparsify(optax.adam(rate), method),
       'base': optax.set_to_zero()}, labels)
  ```
  """

  still = {'str_': 'an adapter of zeros never rises above a soft threshold'}

  def train(self, method):
    adapter = laws.prepare(optax.adam(.02), method)
    return train(method, optax.multi_transform(
        {'adapter': adapter, 'base': optax.set_to_zero()}, labels))


if __name__ == '__main__':
  absltest.main()
