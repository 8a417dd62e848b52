"""A vision transformer: nn.scan over its blocks, class token, MAP head."""

from absl.testing import absltest
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import trees
from tests.clients import laws

WIDTH, HEADS, CLASSES, STEPS = 16, 2, 4, 8
IMAGES = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
LABELS = jnp.arange(8) % CLASSES


class Block(nn.Module):

  @nn.compact
  def __call__(self, x, _):
    y = nn.LayerNorm()(x)
    x += nn.MultiHeadDotProductAttention(HEADS)(y, y)
    y = nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))
    return x + nn.Dense(WIDTH)(nn.gelu(y)), None


class MapHead(nn.Module):
  """Attention pooling by a learnt probe."""

  @nn.compact
  def __call__(self, x):
    probe = self.param('probe', nn.initializers.normal(1.), (1, 1, WIDTH))
    scores = jnp.sum(probe * nn.Dense(WIDTH, name='key')(x), -1, keepdims=True)
    return jnp.sum(nn.softmax(scores, axis=1) * x, axis=1)


class Vit(nn.Module):

  @nn.compact
  def __call__(self, images):
    x = nn.Conv(WIDTH, (4, 4), strides=4, padding='VALID', name='patches')(
        images)
    x = x.reshape(x.shape[0], -1, WIDTH)
    x += self.param('pos_embedding', nn.initializers.normal(.1),
                    (1, x.shape[1], WIDTH))
    cls = self.param('cls', nn.initializers.zeros, (1, 1, WIDTH))
    x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
    blocks = nn.scan(nn.remat(Block, prevent_cse=False), length=3,
                     variable_axes={'params': 0}, split_rngs={'params': True})
    x, _ = blocks(name='encoder')(x, None)
    return nn.Dense(CLASSES, name='head')(MapHead(name='pool')(x))


class VitTest(laws.LoopTest):

  title = 'Vision transformer: nn.scan, class token, MAP head'
  recipe = """
  Layers stacked by `nn.scan` are named by a pattern, and each is a competition
  of its own; plain layers beside them are not touched by it. Position tables,
  class tokens and probes are dense.

  ```python
  method = sparse_jax.rigl(.9, batch_axes={'encoder': (0,)})
  shapes = jax.eval_shape(model.init, key, x)['params']
  print(sparse_jax.describe(method, shapes))
  ```
  """

  sites = {'batch_axes': {'encoder': (0,)}}

  def train(self, method):
    model = Vit()
    tx = laws.prepare(optax.adamw(.01), method)
    params, opt_state = laws.begin(
        tx, method, jax.jit(model.init)(jax.random.key(1), IMAGES)['params'])

    def step(params, opt_state):
      def loss_fn(params):
        apply = laws.door(model.apply, method, opt_state)
        return optax.softmax_cross_entropy_with_integer_labels(
            apply({'params': params}, IMAGES), LABELS).mean()

      loss, grads = jax.value_and_grad(loss_fn)(params)
      updates, opt_state = tx.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state, loss

    step = jax.jit(step, **laws.options(method))
    params, opt_state = laws.put((params, opt_state))
    losses = []
    for _ in range(STEPS):
      params, opt_state, loss = step(params, opt_state)
      losses.append(float(loss))
    return laws.Run(
        losses, params, opt_state, step._cache_size(), STEPS,
        lambda through, params: through(model.apply)({'params': params},
                                                     IMAGES))


class ChoiceTest(absltest.TestCase):

  def test_only_kernels_are_sparse_and_each_slice_is_one(self):
    variables = jax.eval_shape(Vit().init, jax.random.key(0), IMAGES)
    method = sparse_jax.rigl(.5, batch_axes={'encoder': (0,)})
    state = jax.eval_shape(method.init, variables['params'])
    paths = [path for path, mask in trees.leaves_by_path(
        state.forward_masks).items() if mask is not None]
    self.assertEqual(paths, list(state.plan.by_path))
    self.assertLen(paths, 6 + 1 + 2)  # A block's, the pool's, patches, head.
    for path in paths:
      self.assertEndsWith(path, 'kernel')
      stacked = state.plan.by_path[path].layout.stacked
      self.assertEqual(stacked, (0,) if 'encoder' in path else ())
    kernel = state.forward_masks['encoder']['Dense_0']['kernel']
    self.assertEqual(kernel.shape, (3, WIDTH, 2 * WIDTH))
    np.testing.assert_equal(kernel.dtype, bool)


if __name__ == '__main__':
  absltest.main()
