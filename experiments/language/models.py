"""Transformer-XL, whose memory of earlier segments is an explicit argument.

    model = create('tiny', vocab_size=256)
    memory = init_memory(model, batch_size)
    params = model.init(key, tokens, targets, memory, train=False)['params']
    losses, memory = model.apply(
        {'params': params}, tokens, targets, memory, train=True,
        rngs={'dropout': key})

Tokens and targets are int32[b, t] and losses float32[b, t] in nats. Parameters
and the memory are float32 whatever `dtype`, which only sets the type that
layers compute in. All weights of matrix products are leaves of two axes, (in,
out), or for an embedding (tokens, features); biases, the u and v of attention
among them, have one axis. 'vocabulary' is found in the paths of the embeddings
and of the softmax and in no other, so that a rule can keep them dense.

Reference:
  Dai et al., Transformer-XL: attentive language models beyond a fixed-length
  context, 2019, https://arxiv.org/abs/1901.02860.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from sparse_jax import operators
from experiments.language import adaptive

_INIT = nn.initializers.normal(0.02)


class Memory(NamedTuple):
  """What each layer has read before this segment, the newest last."""

  values: jax.Array  # float32[num_layers, b, length, d_model], inputs of layers
  valid: jax.Array  # int32[b], how many of the last places are filled


class Preset(NamedTuple):
  """A network, and how long its segments and memories are.

  Parameters in millions, tied ones once: 0.46, 3.5, 69.5, 278.2 (256 tokens)
  and 285.2 (267,735). Published are 69, 277 and 285; Top-KAST's table 4 prints
  69 for the large one, and its d_embed of 512 adds two projections to Dai et
  al.'s code. It says that WikiText-103 ties the "head only"; 285 is the count
  with all vectors tied, and all projections but the head's, as there.
  """

  num_layers: int
  d_model: int
  d_ff: int
  d_embed: int
  num_heads: int
  segment_length: int
  memory_length: int
  eval_memory_length: int
  cutoffs: tuple[int, ...] = ()


# The last three are those of Jayakumar et al., Top-KAST, 2021,
# https://arxiv.org/abs/2106.03517, table 4; the text beside it has the small
# one. The cutoffs are those of Dai et al.'s code.
MODELS: dict[str, Preset] = {
    'tiny': Preset(2, 128, 512, 128, 4, 64, 64, 128),
    'small': Preset(4, 256, 1024, 256, 8, 128, 128, 256),
    'enwik8_small': Preset(24, 512, 1536, 512, 8, 768, 2304, 5000),
    'enwik8_large': Preset(24, 1024, 3072, 512, 8, 768, 2304, 5000),
    'wikitext103': Preset(18, 1024, 4096, 1024, 16, 512, 768, 2000,
                          (20000, 40000, 200000)),
}


def relative_shift(scores: jax.Array) -> jax.Array:
  """Turns scores by distance into scores by key, [..., queries, keys].

  The last axis is by distance, falling from keys - 1 to 0. Query i is at key
  keys - queries + i, and gets scores[i, queries - 1 - i + j] for all keys j up
  to there; later keys hold entries of no meaning (Dai et al., appendix B).

  Example:
    >>> relative_shift(jnp.array([[2, 1, 0], [2, 1, 0]]))[1]
    Array([2, 1, 0], dtype=int32)
  """
  *batch, queries, keys = scores.shape
  padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(1, 0)])
  shifted = padded.reshape(*batch, keys + 1, queries)[..., 1:, :]
  return shifted.reshape(scores.shape)


def sinusoids(distances: jax.Array, features: int) -> jax.Array:
  """Sines, then cosines, of distances [n]: float32[n, features]."""
  rates = 10000. ** -(jnp.arange(0, features, 2) / features)
  angles = distances[:, None].astype(jnp.float32) * rates[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def attention_mask(valid: jax.Array, memory_length: int, length: int
                   ) -> jax.Array:
  """Which keys each query may attend to: bool[b, 1, length, keys].

  The filled places of the memory (`valid` int32[b]), and the segment up to it.
  """
  query = jnp.arange(length)[:, None] + memory_length
  key = jnp.arange(memory_length + length)[None]
  seen = key <= query
  filled = key >= memory_length - valid[:, None]
  return (seen[None] & filled[:, None])[:, None]


def thin(x: jax.Array, sparsity: float) -> jax.Array:
  """Its largest entries by AbsTopK, or all of it at sparsity 0."""
  return operators.abs_top_k(x, sparsity) if sparsity else x


class RelativeAttention(nn.Module):
  """Attention to the memory and the segment by content and by distance.

  The score of query i and key j is (q_i + u) k_j + (q_i + v) W r_{i - j}, over
  the square root of a head's width, with r the sinusoids. Each layer has a u
  ('content_bias') and a v ('position_bias') of its own; in the paper layers
  share them, in its authors' large models they do not. Attributes: those of
  TransformerXL.
  """

  num_heads: int
  dropout: float
  dtype: jax.typing.DTypeLike
  activation_sparsity: float = 0.

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array, positions: jax.Array,
               mask: jax.Array, train: bool) -> jax.Array:
    """Attends from x [b, t, d_model] to context, the memory and x.

    `positions` [keys, d_model] are sinusoids of the distances keys - 1 to 0,
    `mask` bool[b, 1, t, keys] says which keys are seen.
    """
    def project(name, x):
      y = nn.Dense(x.shape[-1], use_bias=False, kernel_init=_INIT,
                   dtype=self.dtype, name=name)(x)
      return y if name == 'position' else thin(y, self.activation_sparsity)

    query = project('query', x)
    features = x.shape[-1] // self.num_heads
    by_content = jnp.einsum(
        'bihd,bjhd->bhij', self._heads(self._biased('content_bias', query)),
        self._heads(project('key', context)))
    by_distance = jnp.einsum(
        'bihd,jhd->bhij', self._heads(self._biased('position_bias', query)),
        self._heads(project('position', positions)))
    scores = (by_content + relative_shift(by_distance)).astype(jnp.float32)
    scores = jnp.where(mask, scores / math.sqrt(features),
                       jnp.finfo(jnp.float32).min)
    weights = nn.Dropout(self.dropout, deterministic=not train)(
        jax.nn.softmax(scores).astype(self.dtype))
    mixed = jnp.einsum('bhij,bjhd->bihd', weights,
                       self._heads(project('value', context)))
    return project('out', mixed.reshape(x.shape))

  def _biased(self, name, query):
    bias = self.param(name, _INIT, query.shape[-1:])
    return query + bias.astype(query.dtype)[None, None]

  def _heads(self, x):
    return x.reshape(*x.shape[:-1], self.num_heads, -1)


class Layer(nn.Module):
  """Attention, then two Dense with a ReLU between them, each with a shortcut.

  Layer normalisation follows each sum. Attributes: those of TransformerXL.
  """

  d_ff: int
  num_heads: int
  dropout: float
  dtype: jax.typing.DTypeLike
  activation_sparsity: float = 0.

  @nn.compact
  def __call__(self, x: jax.Array, memory: jax.Array, positions: jax.Array,
               mask: jax.Array, train: bool) -> jax.Array:
    """[b, t, d_model] to the same; see RelativeAttention for the others."""
    norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)
    dense = functools.partial(nn.Dense, kernel_init=_INIT, dtype=self.dtype)
    attention = RelativeAttention(self.num_heads, self.dropout, self.dtype,
                                  self.activation_sparsity, name='attention')
    drop = nn.Dropout(self.dropout, deterministic=not train)
    context = jnp.concatenate([memory.astype(x.dtype), x], axis=1)
    # Of the context, so that gradients of x are summed in one order.
    queries = context[:, memory.shape[1]:]
    x = norm(name='norm_1')(
        x + drop(attention(queries, context, positions, mask, train)))
    hidden = nn.relu(dense(self.d_ff, name='dense_1')(x))
    hidden = drop(thin(hidden, self.activation_sparsity))
    added = thin(dense(x.shape[-1], name='dense_2')(hidden),
                 self.activation_sparsity)
    return norm(name='norm_2')(x + drop(added))


class TransformerXL(nn.Module):
  """Transformer-XL: a language model that remembers earlier segments.

  A segment attends to itself and to the memory that it is handed, of any
  length. No gradient flows into or out of a memory.

  Laws: without dropout two segments of length t, the second with the memory of
  the first, have the losses of one of length 2t, where the memory holds t
  places. Losses and the result of `logits` do not depend on places that are not
  filled.
  """

  vocab_size: int
  num_layers: int
  d_model: int  # An even multiple of `num_heads`.
  d_ff: int  # Features inside the feed-forward part of a layer.
  d_embed: int  # Length of the vectors of tokens (of frequent ones).
  num_heads: int
  memory_length: int  # Places of the memory that `init_memory` makes.
  cutoffs: Sequence[int] = ()  # First tokens of the tails; see adaptive.py.
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32  # Of the computation.
  # Fraction of each vector of queries, keys, values, hidden units and what a
  # layer adds that `abs_top_k` sets to 0.
  activation_sparsity: float = 0.

  def setup(self):
    if self.d_model % (2 * self.num_heads):
      raise ValueError(f'`d_model` (={self.d_model}) must be an even multiple '
                       f'of num_heads (={self.num_heads}).')
    self.vocabulary = adaptive.AdaptiveEmbedding(
        self.vocab_size, self.d_model, self.d_embed, self.cutoffs,
        dtype=self.dtype)
    self.layer = {
        str(i): Layer(self.d_ff, self.num_heads, self.dropout, self.dtype,
                      self.activation_sparsity)
        for i in range(self.num_layers)}
    self.drop = nn.Dropout(self.dropout)

  def __call__(self, tokens: jax.Array, targets: jax.Array, memory: Memory, *,
               train: bool) -> tuple[jax.Array, Memory]:
    """Losses float32[b, t] in nats of `targets`, which follow `tokens`, and
    the memory for the next segment.
    """
    if targets.shape != tokens.shape:
      raise ValueError(f'`targets` (of shape {targets.shape}) must have the '
                       f'shape of tokens, {tokens.shape}.')
    hidden, memory = self._read(tokens, memory, train)
    return self.vocabulary.losses(hidden, targets), memory

  def logits(self, tokens: jax.Array,
             memory: Memory) -> tuple[jax.Array, Memory]:
    """Log probabilities float32[b, t, vocab_size] of every next token,
    without dropout, and the memory for the next segment.
    """
    hidden, memory = self._read(tokens, memory, train=False)
    return self.vocabulary.log_probabilities(hidden), memory

  def _read(self, tokens, memory, train):
    """The last states dtype[b, t, d_model], and the memory after them."""
    shape = memory.values.shape
    expected = self.num_layers, tokens.shape[0], self.d_model
    if (*shape[:2], *shape[3:]) != expected:
      raise ValueError(f'`memory` (values of shape {shape}) must be of shape '
                       '({}, {}, length, {}).'.format(*expected))
    drop = functools.partial(self.drop, deterministic=not train)
    memory = jax.lax.stop_gradient(memory)
    mask = attention_mask(memory.valid, memory.values.shape[2],
                          tokens.shape[1])
    keys = mask.shape[-1]
    # No place is further away that is filled. So the table depends on an
    # argument: it does not become a constant of the compiled program, of many
    # megabytes, and its product with a kernel counts as one with data.
    distances = jnp.minimum(jnp.arange(keys)[::-1], keys + memory.valid.max())
    positions = drop(sinusoids(distances, self.d_model).astype(self.dtype))
    x, inputs = drop(self.vocabulary(tokens)), []
    for layer, remembered in zip(self.layer.values(), memory.values):
      inputs.append(x)
      x = layer(x, remembered, positions, mask, train)
    x = drop(x)
    inputs = jax.lax.stop_gradient(jnp.stack(inputs)).astype(
        memory.values.dtype)
    added, length = inputs.shape[2], memory.values.shape[2]
    joined = jnp.concatenate([memory.values, inputs], axis=2)
    return x, Memory(joined[:, :, added:],
                     jnp.minimum(memory.valid + added, length))


def init_memory(model: TransformerXL, batch_size: int,
                length: int | None = None) -> Memory:
  """An empty memory, of the model's `memory_length` or another.

  Example:
    >>> init_memory(create('tiny', vocab_size=256), 3).values.shape
    (2, 3, 64, 128)
  """
  length = model.memory_length if length is None else length
  return Memory(
      jnp.zeros((model.num_layers, batch_size, length, model.d_model)),
      jnp.zeros((batch_size,), jnp.int32))


def reset_memory(memory: Memory, where: jax.Array) -> Memory:
  """Empties the memory of the streams that begin anew, `where` bool[b].

  Example:
    >>> memory = Memory(jnp.ones((1, 2, 3, 4)), jnp.array([3, 2]))
    >>> reset_memory(memory, jnp.array([True, False])).valid
    Array([0, 2], dtype=int32)
  """
  # Hidden values are zeros and not stale: 0 times infinity is not 0.
  return Memory(jnp.where(where[None, :, None, None], 0, memory.values),
                jnp.where(where, 0, memory.valid))


def create(name: str, *, vocab_size: int, dropout: float = 0.0,
           dtype: jax.typing.DTypeLike = jnp.float32, width: float = 1.0,
           activation_sparsity: float = 0.) -> TransformerXL:
  """Builds the network of a name in MODELS.

  Of the preset's cutoffs those below `vocab_size` count. `width` multiplies
  d_model, d_ff and d_embed; the products are rounded to multiples of twice the
  number of heads, at least one.

  Example:
    >>> create('wikitext103', vocab_size=33278, width=0.5).cutoffs
    (20000,)
  """
  preset = MODELS[name]
  if not 0 <= dropout < 1:
    raise ValueError(f'`dropout` (={dropout!r}) must be in [0, 1).')
  if not 0 < width < math.inf:
    raise ValueError(f'`width` (={width!r}) must be positive and finite.')
  multiple = 2 * preset.num_heads
  sizes = {size: multiple * max(
      1, round(width * getattr(preset, size) / multiple))
           for size in ('d_model', 'd_ff', 'd_embed')}
  return TransformerXL(
      vocab_size=vocab_size, num_heads=preset.num_heads, **sizes,
      num_layers=preset.num_layers, memory_length=preset.memory_length,
      cutoffs=tuple(cut for cut in preset.cutoffs if cut < vocab_size),
      dropout=dropout, dtype=dtype,
      activation_sparsity=activation_sparsity)


def generate(model: TransformerXL, weights: Any, prompt: jax.Array, *,
             count: int, memory_length: int, temperature: float,
             key: jax.Array) -> jax.Array:
  """Draws one token after another, int32[count], from prompt int32[t] on.

  `temperature` divides the log-probabilities; 0 takes the likeliest token.
  """

  def read(tokens, memory):
    log_probs, memory = model.apply({'params': weights}, tokens[None], memory,
                                    method=model.logits)
    return log_probs[0, -1], memory

  def step(carry, key):
    log_probs, memory = carry
    token = (jax.random.categorical(key, log_probs / temperature)
             if temperature else jnp.argmax(log_probs)).astype(jnp.int32)
    return read(token[None], memory), token

  first = read(prompt, init_memory(model, 1, memory_length))
  return jax.lax.scan(step, first, jax.random.split(key, count))[1]
