"""Text written by a trained network."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.language import models


def generate(model: models.TransformerXL, weights: Any, prompt: jax.Array, *,
             count: int, memory_length: int, temperature: float,
             key: jax.Array) -> jax.Array:
  """Draws one token after another, int32[count].

  The network, with weights as the forward pass reads them, goes on from prompt
  int32[t], at least one token, and remembers `memory_length` tokens.
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

  first = read(prompt, models.init_memory(model, 1, memory_length))
  return jax.lax.scan(step, first, jax.random.split(key, count))[1]
