"""What one hidden unit of a trained language model reads and writes.

  python -m experiments.language.neurons --workdir=FOLDER [--layer=0]
      [--neuron=N]

The run's own flags come first, as for experiments.language.train: the folder
must hold a finished run. Leaves neuron_<layer>_<n>.png in it and prints the
same as text: the channels of the residual stream that the unit reads, with
their weights, the tokens whose embeddings excite it most along those channels,
and the tokens that its output raises most. Attention and normalisation lie
between a token and a unit; this is the direct path past them. Without
--neuron it is the unit that a token excites most, by the size of what it
writes.
"""

from collections.abc import Mapping
import os
from typing import Any, NamedTuple

from absl import flags
import numpy as np

import sparse_jax
from experiments import pictures
from experiments import programs
from experiments import results
from experiments import training
from experiments.language import train

flags.DEFINE_integer('layer', 0, 'Of the unit.')
flags.DEFINE_integer('neuron', None, 'Its number. Default: the one that '
                     'passes on most of a token.')


# Tokens that make up less of the text have hardly been trained.
_RARE = 1e-4


class Neuron(NamedTuple):
  """One hidden unit: (name, weight) pairs, the largest first."""

  layer: int
  number: int
  channels: list[tuple[str, float]]  # Read; all that are not 0.
  reads: list[tuple[str, float]]  # Tokens, by what they add to its input.
  writes: list[tuple[str, float]]  # Tokens, by what it adds to their logits.


def look(weights: Mapping[str, Any], names: Mapping[int, str], layer: int,
         number: int | None, count: int) -> Neuron:
  """Reads one unit off the weights that the forward pass sees.

  `names` are those of the tokens that the text has, `number` the unit, or None
  for the one that passes on most, `count` how many tokens of each kind.
  """
  if f'layer_{layer}' not in weights:
    raise ValueError(f'`layer` (={layer}) is none of the model\'s.')
  own = weights[f'layer_{layer}']
  into, out = (np.asarray(own[name]['kernel'], np.float64)
               for name in ('dense_1', 'dense_2'))
  tokens = sorted(names)
  table = np.asarray(weights['vocabulary']['head']['embedding'],
                     np.float64)[tokens]
  if table.shape[-1] != len(into):
    raise ValueError('`weights`: the vectors of tokens must be as wide as the '
                     f'layers, {len(into)}, not {table.shape[-1]}.')
  excited = table @ into  # [tokens, units]
  if number is None:
    number = int(np.argmax(excited.max(0) * np.abs(out).sum(1)))
  if not 0 <= number < into.shape[1]:
    raise ValueError(f'`neuron` (={number}) must be in [0, {into.shape[1]}).')
  raised = table @ out[number]
  read = into[:, number]
  order = sorted(np.flatnonzero(read), key=lambda i: -abs(read[i]))

  def best(scores):
    return [(names[tokens[i]], float(scores[i])) for i in np.argsort(
        -scores, kind='stable')[:count]]

  return Neuron(layer, number, [(str(i), float(read[i])) for i in order],
                best(excited[:, number]), best(raised))


def describe(neuron: Neuron) -> str:
  """A few lines of text."""
  def listed(pairs):
    return ', '.join(f'{name} {value:+.2f}' for name, value in pairs)

  return '\n'.join([
      f'layer {neuron.layer}, unit {neuron.number}, which reads '
      f'{len(neuron.channels)} channels',
      f'channels: {listed(neuron.channels[:12])}',
      f'read: {listed(neuron.reads)}', f'written: {listed(neuron.writes)}'])


def main(argv):
  """Shows a unit of the run in --workdir."""
  programs.begin(argv)
  with programs.errors_in_a_line():
    given = flags.FLAGS
    folder = given.workdir or ''
    _, run = results.reopen(folder)
    state = training.last_state(run)
    weights = sparse_jax.dense_weights(run.task.method, state.params,
                                       state.opt_state)
    text = train.load(run.values, 'train')
    tokens, counts = np.unique(text.tokens, return_counts=True)
    names = {int(token): repr(text.vocabulary.decode([int(token)]))[1:-1]
             for token in tokens[counts >= _RARE * counts.sum()]}
    neuron = look(weights, names, given.layer, given.neuron, 8)
    pictures.neuron(neuron, os.path.join(
        folder, f'neuron_{neuron.layer}_{neuron.number}.png'))
    print(describe(neuron))


if __name__ == '__main__':
  programs.run(main)
