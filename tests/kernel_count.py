"""How many entries the kernels of a network have, without making any array."""

import jax
import jax.numpy as jnp


def of_images(model, image_shape):
  """Those of an image classifier."""
  return _count(lambda: model.init(
      jax.random.key(0), jnp.zeros((1, *image_shape)), train=False))


def of_language(model, memory):
  """Those of a language model, embeddings among them."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return _count(lambda: model.init(jax.random.key(0), tokens, tokens, memory,
                                   train=False))


def _count(init):
  params = jax.eval_shape(init)['params']
  return sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
