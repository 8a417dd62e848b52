"""The sparsity flags, and the one way from flags to a method.

Every binary shares these. A flag left unset leaves the choice to the method,
so its default is the one that `sparse_jax` documents; a flag that the chosen
method does not have is an error, never ignored.
"""

from collections.abc import Mapping
import inspect
import re
from typing import Any

from absl import flags

import sparse_jax

# The command line's names; Python keeps `set` for itself.
METHODS = {
    'dense': sparse_jax.dense,
    'static': sparse_jax.static,
    'set': sparse_jax.set_,
    'rigl': sparse_jax.rigl,
    'gmp': sparse_jax.gmp,
    'dnw': sparse_jax.dnw,
    'top_kast': sparse_jax.top_kast,
}
ALLOCATIONS = {
    'uniform': sparse_jax.uniform,
    'er': sparse_jax.erdos_renyi,
    'erk': sparse_jax.erk,
    'uniform_plus': sparse_jax.uniform_plus,
}
# First and last refresh as shares of the run, where a paper sets them: RigL's
# 25k of 32k steps, pruning's 10k to 25k (and SET as RigL runs it).
WINDOWS = {'rigl': (0., .75), 'set': (0., .75), 'gmp': (.3, .78)}
# Flags, and what the methods that have them call them.
ARGUMENTS = {name: name for name in (
    'sparsity', 'backward_sparsity', 'penalty_weight', 'backward_selection',
    'stop_exploration_at', 'drop_fraction', 'skip_step', 'update_every',
    'update_begin', 'update_end', 'allocation', 'structure')}
ARGUMENTS['dense_layers'] = 'is_sparse'
# Flags of one structure alone.
STRUCTURE_FLAGS = {'block_shape': 'block', 'block_reduce': 'block', 'nm': 'nm'}


def define_flags(*, method: str = 'top_kast', sparsity: float = .9,
                 backward_sparsity: float | None = None) -> None:
  """Defines the flags below; the arguments are the binary's own defaults."""
  flags.DEFINE_enum('method', method, sorted(METHODS), 'How to train sparse.')
  flags.DEFINE_float('sparsity', sparsity, 'Fraction of the weights that are '
                     'zero in the forward pass, in [0, 1).')
  flags.DEFINE_float('backward_sparsity', backward_sparsity, 'top_kast: '
                     'fraction of the weights without a gradient, in '
                     '[0, sparsity]. Default: sparsity - 0.1, at least 0.')
  flags.DEFINE_float('penalty_weight', None, 'top_kast: coefficient of the '
                     'exploration loss.')
  flags.DEFINE_enum('backward_selection', None, ['magnitude', 'random'],
                    'top_kast: how the set B outside A is chosen.')
  flags.DEFINE_integer('stop_exploration_at', None, 'top_kast: the step from '
                       'which on only the forward set gets a gradient.')
  flags.DEFINE_float('drop_fraction', None, 'set, rigl: share of the active '
                     'weights replaced at a refresh, in [0, 1].')
  flags.DEFINE_bool('skip_step', None, 'set, rigl: a refresh replaces the '
                    'optimizer\'s step, as in RigL\'s paper.')
  flags.DEFINE_integer('update_every', None, 'Steps between two refreshes of '
                       'the masks. Default: 100, or a 300th of the run if '
                       'that is less.')
  flags.DEFINE_integer('update_begin', None, 'First step that may refresh. '
                       'Default: 0; gmp: 30% of the run.')
  flags.DEFINE_integer('update_end', None, 'Last step that may refresh. '
                       'Default: the end; set and rigl 75%, gmp 78% of the '
                       'run. Negative: never ends.')
  flags.DEFINE_enum('allocation', None, sorted(ALLOCATIONS), 'How the '
                    'sparsity is shared among layers. Default: uniform.')
  flags.DEFINE_enum('structure', None,
                    ['element', 'block', 'nm', 'channel', 'filter'],
                    'What is kept or dropped together. Default: element.')
  flags.DEFINE_list('block_shape', ['16', '16'], 'Rows and columns of a block '
                    'for --structure=block.')
  flags.DEFINE_enum('block_reduce', 'sum', ['sum', 'max'], 'How the '
                    'magnitudes in a block make its score.')
  flags.DEFINE_list('nm', ['2', '4'], 'For --structure=nm: N kept of every M '
                    'along the inputs.')
  flags.DEFINE_list('dense_layers', [], 'Regular expressions; parameters whose '
                    'path has a match stay dense. For example: stem,head.')


def from_flags(values: Mapping[str, Any], train_steps: int
               ) -> sparse_jax.SparseMethod:
  """Makes the method that the flags ask for.

  Args:
    values: flag values by name, as `flags.FLAGS.flag_values_dict()` gives.
    train_steps: length of the run, for windows given as shares of it.

  Returns:
    The method.

  Raises:
    ValueError: naming the flag or argument and its value.
  """
  name = values['method']
  constructor = METHODS[name]
  known = inspect.signature(constructor).parameters
  for flag, argument in ARGUMENTS.items():
    if argument not in known and _is_given(flag, values):
      raise ValueError(f'`{flag}` (={values[flag]!r}) is not a setting of '
                       f'--method={name}; it has {", ".join(known) or "none"}.')
  for flag, structure in STRUCTURE_FLAGS.items():
    if values['structure'] != structure and _is_given(flag, values):
      raise ValueError(f'`{flag}` (={values[flag]!r}) is a setting of '
                       f'--structure={structure}, not of '
                       f'{values["structure"] or "element"}.')
  return constructor(**_arguments(values, name, known, train_steps))


def _is_given(flag, values) -> bool:
  """Whether it differs from the default; a dense run may be at sparsity 0."""
  unset = (None, flags.FLAGS[flag].default, 0. if flag == 'sparsity' else None)
  return values[flag] not in unset


def _arguments(values, name, known, train_steps) -> dict[str, Any]:
  """The flags that are set, and what the recipes set, of those `known`."""
  chosen = {argument: values[flag] for flag, argument in ARGUMENTS.items()
            if argument in known and values[flag] not in (None, [])}
  if 'allocation' in chosen:
    chosen['allocation'] = ALLOCATIONS[chosen['allocation']]
  if 'structure' in chosen:
    chosen['structure'] = _structure(values)
  if 'is_sparse' in chosen:
    chosen['is_sparse'] = _dense_rules(chosen['is_sparse'])
  if 'update_every' in known:
    chosen.setdefault('update_every', min(max(train_steps // 300, 1), 100))
  if name == 'top_kast':
    chosen.setdefault('backward_sparsity',
                      max(0., round(values['sparsity'] - .1, 6)))
  return chosen | _window(chosen, name, train_steps)


def _structure(values) -> sparse_jax.structures.Structure:
  kind = values['structure']
  if kind == 'block':
    return _of_pair('block_shape', values, lambda *shape: sparse_jax.Block(
        shape, values['block_reduce']))
  if kind == 'nm':
    return _of_pair('nm', values, sparse_jax.NM)
  return {'element': sparse_jax.Unstructured, 'channel': sparse_jax.Channel,
          'filter': sparse_jax.Filter}[kind]()


def _of_pair(flag, values, make) -> sparse_jax.structures.Structure:
  given = f'`{flag}` (={",".join(values[flag])!r})'
  try:
    first, second = (int(number) for number in values[flag])
  except ValueError:
    raise ValueError(f'{given} must be two integers such as 2,4.') from None
  structure = make(first, second)
  try:
    sparse_jax.structures.check_structure(structure)
  except ValueError as error:
    raise ValueError(f'{given}: {error}') from error
  return structure


def _dense_rules(layers) -> list[tuple[str, bool]]:
  for layer in layers:
    try:
      re.compile(layer)
    except re.error as error:
      raise ValueError(f'`dense_layers` (={",".join(layers)!r}) has {layer!r}, '
                       f'no regular expression: {error}.') from None
  return [(layer, False) for layer in layers]


def _window(chosen, name, train_steps) -> dict[str, Any]:
  """Begin and end of the refreshes: as given, else the paper's shares."""
  begin, end = WINDOWS.get(name, (None, None))
  if name == 'gmp' and isinstance(chosen.get('structure'), sparse_jax.NM):
    begin = end = None  # N of M cannot tighten: it is pruned from the start.
  window = {}
  if begin and 'update_begin' not in chosen:
    window['update_begin'] = round(begin * train_steps)
  if end and 'update_end' not in chosen:
    window['update_end'] = max(round(end * train_steps), 1)
  if chosen.get('update_end', 0) < 0:
    window['update_end'] = None
  return window
