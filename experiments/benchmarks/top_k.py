"""How fast the mask of a large array is made, beside sorting and NumPy.

  python -m experiments.benchmarks.top_k

One process, contenders in turn, medians. Recorded results: README.md beside
this file.
"""

from absl import app
import jax
import jax.numpy as jnp
import numpy as np

import sparse_jax
from experiments import reporting
from experiments.benchmarks import timing

_SIZE, _SPARSITY, _ROUNDS = 10_000_000, .9, 5


def contenders(scores: jax.Array, k: int):
  """Ways to mark the k largest; all but the first two settle no ties."""
  size, host = scores.size, np.asarray(scores)

  def by_sort(scores):
    return scores >= jnp.sort(scores)[size - k]

  def by_argsort(scores):
    order = jnp.argsort(scores)
    return jnp.zeros(size, bool).at[order[size - k:]].set(True)

  def by_lax_top_k(scores):
    return scores >= jax.lax.top_k(scores, k)[0][-1]

  def by_introselect():
    return host >= np.partition(host, size - k)[size - k]

  compiled = {name: jax.jit(fn).lower(scores).compile() for name, fn in {
      'top_k_mask': lambda s: sparse_jax.top_k_mask(s, k),
      'jnp.argsort': by_argsort, 'jnp.sort': by_sort,
      'lax.top_k': by_lax_top_k}.items()}
  calls = {name: (lambda fn=fn: fn(scores)) for name, fn in compiled.items()}
  ours = compiled['top_k_mask']
  for name, tied in ties(scores).items():
    calls[f'top_k_mask, {name}'] = lambda tied=tied: ours(tied)
  return calls | {'np.partition': by_introselect}


def ties(scores: jax.Array) -> dict[str, jax.Array]:
  """Scores of which many equal the k-th largest, by what they are."""
  return {'rounded to bfloat16': jax.lax.reduce_precision(scores, 8, 7),
          'multiples of 0.0371': jnp.round(17 * scores) * .0371,
          'one in 20 not 0': jnp.where(jnp.arange(scores.size) % 20, 0, scores)}


def main(_):
  scores = jnp.abs(jax.random.normal(jax.random.key(0), (_SIZE,)))
  k = sparse_jax.keep_count(_SIZE, _SPARSITY)
  times = timing.interleaved_medians(contenders(scores, k),
                                     rounds=_ROUNDS)
  ours = times['top_k_mask']
  print(reporting.markdown_table(
      [{'way': name, 'milliseconds': 1e3 * seconds,
        'times top_k_mask': seconds / ours}
       for name, seconds in times.items()],
      formats={'milliseconds': '.0f', 'times top_k_mask': '.2f'}))


if __name__ == '__main__':
  app.run(main)
