"""NanoDO's shape: a decoder with tied embeddings, FSDP by nn.Partitioned."""

from absl.testing import absltest
import flax.linen as nn
from flax.training import train_state
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import jax.numpy as jnp
import optax

from sparse_jax import trees
from tests.clients import laws

VOCABULARY, LENGTH, WIDTH, HEADS, DEPTH = 32, 8, 16, 2, 1
TOKENS = jax.random.randint(jax.random.key(0), (16, LENGTH + 1), 0, VOCABULARY)
STEPS = 8


def sharded(*names):
  return nn.with_partitioning(nn.initializers.normal(.2), names)


def norm():
  return nn.LayerNorm(use_bias=False)


class Block(nn.Module):
  """Pre-norm attention and MLP; the names are NanoDO's."""

  @nn.compact
  def __call__(self, x):
    y = norm()(x)
    heads = lambda name: nn.DenseGeneral(
        (HEADS, WIDTH // HEADS), use_bias=False, name=name,
        kernel_init=sharded('data', None, None))(y)
    query, key, value = map(heads, ('query', 'key', 'value'))
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key) / WIDTH**.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    scores = nn.softmax(jnp.where(causal, scores, -1e9))
    y = jnp.einsum('bhqk,bkhd->bqhd', scores, value)
    x += nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False,
                         name='attn_out_proj',
                         kernel_init=sharded(None, None, 'data'))(y)
    y = nn.Dense(2 * WIDTH, use_bias=False,
                 kernel_init=sharded('data', None))(norm()(x))
    return x + nn.Dense(WIDTH, use_bias=False,
                        kernel_init=sharded(None, 'data'))(nn.gelu(y))


class Decoder(nn.Module):

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(VOCABULARY, WIDTH, embedding_init=sharded(None, 'data'))
    places = nn.Embed(LENGTH, WIDTH, embedding_init=sharded(None, 'data'))
    x = embed(tokens) + places(jnp.arange(tokens.shape[1]))[None]
    for index in range(DEPTH):
      x = nn.remat(Block)(name=f'block_{index}')(x)
    return embed.attend(norm()(x))


def kernels_only(params):
  """What weight decay reaches: matrices, not tables."""
  return trees.map_leaves(
      lambda path, leaf: leaf.ndim > 1 and 'embed' not in path.lower(), params)


def optimizer(method):
  schedule = optax.warmup_cosine_decay_schedule(0., .02, 2, STEPS)
  return laws.prepare(optax.chain(
      optax.clip_by_global_norm(1.), optax.adamw(
          schedule, weight_decay=.01, mask=kernels_only)), method)


def loss_of(apply, params, tokens):
  logits = apply({'params': params}, tokens[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]).mean()


class DecoderTest(laws.LoopTest):

  title = 'Decoder: tied embeddings, remat, FSDP by nn.Partitioned'
  recipe = """
  Boxes of `nn.with_partitioning` stay around parameters, marks and slots. Decay
  masks see the parameters' own paths. Tables are dense, tied or not. A
  projection over two axes, under a name that is not Flax's, needs
  `contracting` for blocks.

  ```python
  def init(key):
    params, opt_state = sparse_jax.start(
        tx, method, model.init(key, tokens)['params'])
    return TrainState(0, model.apply, params, tx, opt_state)

  specs = nn.get_partition_spec(jax.eval_shape(init, key))  # Masked methods.
  ```

  Of packed leaves a box's names are those of the dense axes: split the blocks
  along their first axis (`spec_of` in the test).
  """

  # Flax's own projections are known by their names; this one is not.
  sites = {'contracting': {'attn_out_proj': (0, 1)}}

  def train(self, method):
    model, mesh = Decoder(), jax.make_mesh(
        (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optimizer(method)

    def init(key):
      params, opt_state = laws.begin(
          tx, method, model.init(key, TOKENS[:, :-1])['params'])
      return train_state.TrainState(jnp.int32(0), model.apply, params, tx,
                                    opt_state)

    shapes = jax.eval_shape(init, jax.random.key(1))
    rows = NamedSharding(mesh, PartitionSpec('data'))
    whole = NamedSharding(mesh, PartitionSpec())

    def place(box):
      """A sharding for each array in a box; other arrays lie everywhere."""
      if not isinstance(box, nn.Partitioned):
        return whole
      return jax.tree.map(lambda leaf: NamedSharding(mesh, spec_of(
          box.get_partition_spec(), leaf.shape)), box)

    places = jax.tree.map(
        place, shapes, is_leaf=lambda node: isinstance(node, nn.Partitioned))
    state = jax.jit(init, out_shardings=places)(jax.random.key(1))

    def step(state, tokens):
      apply = laws.door(state.apply_fn, method, state.opt_state)
      loss, grads = jax.value_and_grad(
          lambda params: loss_of(apply, params, tokens))(state.params)
      return state.apply_gradients(grads=grads), loss

    step = jax.jit(step, in_shardings=(places, rows), donate_argnums=0,
                   out_shardings=(places, whole), **laws.options(method))
    tokens, losses = jax.device_put(TOKENS, rows), []
    for _ in range(STEPS):
      state, loss = step(state, tokens)
      losses.append(float(loss))
    kernel, *_ = jax.tree.leaves(state.params['block_0']['query'])
    self.assertFalse(kernel.sharding.is_fully_replicated)
    return laws.Run(
        losses, state.params, state.opt_state, step._cache_size(), STEPS,
        lambda through, params: through(model.apply)(
            {'params': params}, TOKENS[:, :-1]))


def spec_of(spec, shape):
  """The box's own of an array of the weight's shape; blocks by their first."""
  if len(spec) == len(shape) and all(
      size % 8 == 0 for name, size in zip(spec, shape) if name):
    return spec
  return PartitionSpec('data' if shape[0] % 8 == 0 else None)


if __name__ == '__main__':
  absltest.main()
