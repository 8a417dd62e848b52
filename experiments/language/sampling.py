"""Text written by a trained network."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.language import models


def generate(model: models.TransformerXL, weights: Any, prompt: jax.Array, *,
             count: int, memory_length: int, temperature: float,
             key: jax.Array) -> jax.Array:
  """Draws one token after another, int32[count].

  Args:
    model: the network.
    weights: its parameters, as the forward pass reads them.
    prompt: int32[t], what it goes on from; at least one token.
    count: how many tokens to draw.
    memory_length: how many tokens the network remembers.
    temperature: divides the log-probabilities; 0 takes the likeliest token.
    key: a typed key.
  """
  _check(prompt, count, temperature)

  def read(tokens, memory):
    log_probs, memory = model.apply({'params': weights}, tokens[None], memory,
                                    method=model.logits)
    return log_probs[0, -1], memory

  def step(carry, key):
    log_probs, memory = carry
    token = _draw(log_probs, temperature, key).astype(jnp.int32)
    return read(token[None], memory), token

  first = read(prompt, models.init_memory(model, 1, memory_length))
  return jax.lax.scan(step, first, jax.random.split(key, count))[1]


def _draw(log_probs, temperature, key):
  if temperature == 0:
    return jnp.argmax(log_probs)
  return jax.random.categorical(key, log_probs / temperature)


def _check(prompt, count, temperature):
  if not prompt.size:
    raise ValueError('`prompt` must have at least one token.')
  if count < 0:
    raise ValueError(f'`count` (={count}) must be at least 0.')
  if not temperature >= 0:
    raise ValueError(f'`temperature` (={temperature}) must be at least 0.')
