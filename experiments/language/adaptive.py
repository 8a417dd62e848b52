"""Input embeddings and output softmax of a vocabulary, in Flax linen.

The vocabulary is cut into clusters of tokens sorted by frequency, the most
frequent first: a head and any number of tails. Each tail's vectors are shorter
than those of the cluster before it by a factor, and are projected to the width
of the model. The softmax is in two steps: among the head's tokens and one class
for each tail, then within a tail. Without cutoffs there is the head alone, and
both are the usual ones.

The same vectors serve input and output. So do the projections, except the
head's, which has one of its own for the output.

References:
  Grave et al., Efficient softmax approximation for GPUs, 2016,
  https://arxiv.org/abs/1609.04309. Baevski and Auli, Adaptive input
  representations for neural language modeling, 2018,
  https://arxiv.org/abs/1809.10853. What is tied is as in the code of Dai et
  al., Transformer-XL, 2019, https://arxiv.org/abs/1901.02860.
"""

from collections.abc import Sequence
import itertools

from flax import linen as nn
import jax
import jax.numpy as jnp

_TABLE_INIT = nn.initializers.normal(0.02)
_PROJECTION_INIT = nn.initializers.normal(0.01)


class Cluster(nn.Module):
  """The vectors of some tokens, their projections, and their logits."""

  rows: int  # Number of vectors.
  features: int  # Length of a vector.
  d_model: int  # Width of the model; `features` if not projected.
  projected: bool  # Whether vectors are projected to `d_model`.
  tied: bool  # The output is projected by the transposed input projection.
  dtype: jax.typing.DTypeLike

  def setup(self):
    self.embedding = self.param(
        'embedding', _TABLE_INIT, (self.rows, self.features))
    self.bias = self.param('bias', nn.initializers.zeros, (self.rows,))
    if self.projected:
      self.kernel = self.param(
          'kernel', _PROJECTION_INIT, (self.features, self.d_model))
    if self.projected and not self.tied:
      self.out = nn.Dense(
          self.features, use_bias=False, kernel_init=_PROJECTION_INIT,
          dtype=self.dtype)

  def embed(self, indices: jax.Array) -> jax.Array:
    """Vectors of rows int32[...], as dtype[..., d_model]."""
    x = jnp.take(self.embedding, indices, axis=0).astype(self.dtype)
    return x @ self.kernel.astype(self.dtype) if self.projected else x

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Logits float32[..., rows] of hidden states [..., d_model]."""
    return _logits(self._narrow(hidden), self.embedding, self.bias)

  def losses(self, hidden: jax.Array, indices: jax.Array) -> jax.Array:
    """Cross-entropies float32[...] of rows int32[...], in nats.

    The logits are computed again for the gradient, not kept: of WikiText-103
    they would be 160,000 numbers a token.
    """
    return jax.checkpoint(_cross_entropy)(
        self._narrow(hidden), self.embedding, self.bias, indices)

  def _narrow(self, hidden):
    if not self.projected:
      return hidden
    if self.tied:
      return hidden @ self.kernel.astype(self.dtype).T
    return self.out(hidden)


class AdaptiveEmbedding(nn.Module):
  """Embeds tokens, and gives the probabilities of the next ones.

  Besides its tokens the head has a row for each tail, in their order. It is
  projected where its vectors are not as wide as the model, and always if there
  are tails. Every tail is computed for every token, whatever its cluster: of a
  Transformer-XL for WikiText-103 that is 6% of all multiplications.

  Laws: the probabilities sum to 1, and the loss of a target is minus its log
  probability.
  """

  vocab_size: int
  d_model: int  # Width of the model.
  d_embed: int  # Length of the head's vectors.
  cutoffs: Sequence[int] = ()  # First tokens of the tails, rising.
  div_val: int = 4  # By which each tail's vectors are shorter.
  dtype: jax.typing.DTypeLike = jnp.float32

  def setup(self):
    cutoffs, ends = self.cutoffs, (*self.cutoffs, self.vocab_size)
    if any(low >= high for low, high in itertools.pairwise((0, *ends))):
      raise ValueError(f'`cutoffs` (={cutoffs!r}) must rise strictly, from 1 '
                       f'to below vocab_size (={self.vocab_size}).')
    self.head = self._cluster(
        ends[0] + len(cutoffs), 0,
        projected=bool(cutoffs) or self.d_embed != self.d_model)
    self.tail = {
        str(i): self._cluster(high - low, i, projected=True)
        for i, (low, high) in enumerate(itertools.pairwise(ends), 1)}

  def _cluster(self, rows, place, projected):
    return Cluster(
        rows=rows, features=max(1, self.d_embed // self.div_val ** place),
        d_model=self.d_model, projected=projected, tied=place > 0,
        dtype=self.dtype)

  def _tails(self, tokens):
    """(cluster, whether a token is in it, its row there) of each tail."""
    for low, tail in zip(self.cutoffs, self.tail.values()):
      index = jnp.clip(tokens - low, 0, tail.rows - 1)
      yield tail, index == tokens - low, index

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Embeds int32[...] as dtype[..., d_model], scaled by its square root."""
    x = self.head.embed(jnp.minimum(tokens, self.head.rows - 1))
    for tail, inside, index in self._tails(tokens):
      x = jnp.where(inside[..., None], tail.embed(index), x)
    return x * jnp.asarray(self.d_model ** 0.5, x.dtype)

  def losses(self, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Losses float32[...] in nats of the tokens that follow, int32[...]."""
    classes, within = targets, 0.
    for i, (tail, inside, index) in enumerate(self._tails(targets)):
      classes = jnp.where(inside, self.cutoffs[0] + i, classes)
      within += jnp.where(inside, tail.losses(hidden, index), 0)
    return self.head.losses(hidden, classes) + within

  def log_probabilities(self, hidden: jax.Array) -> jax.Array:
    """Log probabilities float32[..., vocab_size] of the next token."""
    head = jax.nn.log_softmax(self.head.logits(hidden))
    first = head.shape[-1] - len(self.cutoffs)
    parts = [head[..., :first]]
    for i, tail in enumerate(self.tail.values(), first):
      parts.append(head[..., i:i + 1]
                   + jax.nn.log_softmax(tail.logits(hidden)))
    return jnp.concatenate(parts, axis=-1)


def _logits(hidden, embedding, bias):
  """float32[..., rows], summed in float32 whatever the type of `hidden`."""
  logits = jnp.einsum('...d,nd->...n', hidden, embedding.astype(hidden.dtype),
                      preferred_element_type=jnp.float32)
  return logits + jnp.broadcast_to(bias, logits.shape)


def _cross_entropy(hidden, embedding, bias, indices):
  logits = _logits(hidden, embedding, bias)
  picked = jnp.take_along_axis(logits, indices[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked
