"""The sparsity flags, and the one way from flags to a method.

Every binary shares these. A flag left unset leaves the choice to the method,
so its default is the one that `sparse_jax` documents; a flag that the chosen
method does not have is an error, never ignored.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
import re
from typing import Any

from absl import flags

import sparse_jax

# The command line's names; Python keeps `set` for itself.
METHODS = {
    'dense': sparse_jax.dense,
    'static': sparse_jax.static,
    'snip': sparse_jax.snip,
    'grasp': sparse_jax.grasp,
    'set': sparse_jax.set_,
    'rigl': sparse_jax.rigl,
    'itop': sparse_jax.itop,
    'snfs': sparse_jax.snfs,
    'dsr': sparse_jax.dsr,
    'srigl': sparse_jax.srigl,
    'mest': sparse_jax.mest,
    'granet': sparse_jax.granet,
    'spartan': sparse_jax.spartan,
    'gmp': sparse_jax.gmp,
    'ac_dc': sparse_jax.ac_dc,
    'dnw': sparse_jax.dnw,
    'iht': sparse_jax.iht,
    'swat': sparse_jax.swat,
    'top_kast': sparse_jax.top_kast,
    'ste': sparse_jax.ste,
    'sr_ste': sparse_jax.sr_ste,
    'str': sparse_jax.str_,
    'dst': sparse_jax.dst,
    'cs': sparse_jax.cs,
}
ALLOCATIONS = {
    'uniform': sparse_jax.uniform,
    'er': sparse_jax.erdos_renyi,
    'erk': sparse_jax.erk,
    'uniform_plus': sparse_jax.uniform_plus,
    'momentum': 'momentum',  # Of swat alone; the others refuse it.
}
# First and last refresh as shares of the run, where a paper sets them: RigL's
# 25k of 32k steps, pruning's 10k to 25k (and SET, SNFS, DSR as RigL runs
# them), AC/DC's epochs 10 to 85 of 100; ITOP and GraNet refresh to the end.
# MEST's mutations end at epoch 120 of 160, Spartan's masks at four fifths.
WINDOWS = {'rigl': (0., .75), 'set': (0., .75), 'snfs': (0., .75),
           'dsr': (0., .75), 'itop': (0., 1.), 'gmp': (.3, .78),
           'ac_dc': (.1, .85), 'srigl': (0., .75), 'mest': (0., .75),
           'granet': (0., 1.), 'spartan': (0., .8)}
# When the sparsity is final, likewise: epoch 30 of 100, a fifth, a half.
PRUNE_ENDS = {'granet': .3, 'spartan': .2, 'iht': .5}
# Refreshes a run, where they are rare by design: AC/DC's phases are 5 of 100
# epochs, ITOP's 4000 of 78000 steps.
REFRESHES = {'ac_dc': 20, 'itop': 20}
SCORES = {name: getattr(sparse_jax.scores, name)
          for name in ('magnitude', 'random', 'saliency')}
# Flags, and what the methods that have them call them: mostly the same.
ARGUMENTS = {name: name for method in METHODS.values()
             for name in inspect.signature(method).parameters}
ARGUMENTS |= {'dense_layers': 'is_sparse', 'growth_momentum': 'momentum',
              'drop_threshold': 'threshold', 'hidden_decay': 'decay',
              'initial_gate': 'initial', 'soft_beta': 'beta'}
# Lists of numbers.
NUMBERS = ('mutation', 'soft_beta')
# Flags of methods whose products have sparse operands.
OPERATOR_FLAGS = ('activation_scope', 'gradient_scope', 'pack_activations',
                  'operand_period')


def define_flags(*, method: str = 'top_kast', sparsity: float = .9,
                 backward_sparsity: float | None = None) -> None:
  """Defines the flags below; the arguments are the binary's own defaults."""
  flags.DEFINE_enum('method', method, sorted(METHODS), 'How to train sparse.')
  flags.DEFINE_float('sparsity', sparsity, 'Fraction of the weights that are '
                     'zero in the forward pass, in [0, 1).')
  flags.DEFINE_float('backward_sparsity', backward_sparsity, 'top_kast: '
                     'fraction of the weights without a gradient, in '
                     '[0, sparsity]. Default: sparsity - 0.1, at least 0.')
  flags.DEFINE_float('penalty_weight', None, 'Coefficient of the penalty. '
                     'top_kast: the exploration loss; dst: exp(-threshold); '
                     'cs: the gates.')
  flags.DEFINE_enum('backward_selection', None, ['magnitude', 'random'],
                    'top_kast: how the set B outside A is chosen.')
  flags.DEFINE_integer('stop_exploration_at', None, 'top_kast: the step from '
                       'which on only the forward set gets a gradient.')
  flags.DEFINE_float('drop_fraction', None, 'set, rigl, itop, snfs, dsr, '
                     'srigl, granet: share of the active weights replaced at a '
                     'refresh, in [0, 1].')
  flags.DEFINE_enum('drop_schedule', None, ['cosine', 'learning_rate'],
                    'The same methods: how that share falls: along a '
                    'cosine to the last refresh, or with the learning rate. '
                    'Default: cosine.')
  flags.DEFINE_enum('grow_init', None, [
      'zeros', 'random_normal', 'random_uniform', 'initial_value',
      'initial_dist'], 'set, rigl: the value at which a weight is grown.')
  flags.DEFINE_enum('redistribution', None, [
      'momentum', 'magnitude', 'nonzeros', 'none'], 'snfs: by what dropped '
                    'weights are shared out among layers.')
  flags.DEFINE_float('gamma', None, 'srigl: an output with fewer salient '
                     'inputs than this share of the fan-in leaves, in [0, 1]; '
                     '0: none leaves.')
  flags.DEFINE_string('never_ablate', None, 'srigl: a regular expression; '
                      'layers whose path has a match keep all outputs. '
                      'Default: the usual names of last layers.')
  flags.DEFINE_float('initial_sparsity', None, 'granet: sparsity at the start, '
                     'in [0, sparsity].')
  flags.DEFINE_integer('prune_end', None, 'granet, spartan, iht: the step '
                       'from which on the sparsity is final. Default: 30%, '
                       '20%, 50% of the run.')
  flags.DEFINE_integer('prune_begin', None, 'iht: the step at which the '
                       'sparsity begins to rise. Default: 0.')
  flags.DEFINE_enum('variant', None, ['em', 'ems'], 'mest: prune, then grow '
                    'to the sparsity; or the soft memory bound, which has '
                    'more weights until the next refresh.')
  flags.DEFINE_list('mutation', None, 'mest: shares of all weights that are '
                    'replaced, in turn over the run. Default: 0.02,0.01,0.')
  flags.DEFINE_float('gradient_weight', None, 'mest: weight of the gradient '
                     'in what is kept.')
  flags.DEFINE_list('soft_beta', None, 'spartan: hardness of the soft mask at '
                    'the start and at the end. Default: 1,20.')
  flags.DEFINE_enum('drop_by', None, ['magnitude', 'sign'], 'set: one ranking, '
                    'or positive and negative weights apart, as originally.')
  flags.DEFINE_enum('growth', None, ['gradient', 'random'], 'itop: how '
                    'weights are grown.')
  flags.DEFINE_float('growth_momentum', None, 'snfs: coefficient of the '
                     'average gradient, in [0, 1).')
  flags.DEFINE_float('drop_threshold', None, 'dsr: first threshold on |w|.')
  flags.DEFINE_enum('scope', None, ['layer', 'global'], 'snip, grasp, gmp, '
                    'ac_dc, spartan: whether weights compete in their layer '
                    'or in all.')
  flags.DEFINE_enum('score', None, sorted(SCORES), 'gmp: what is pruned last.')
  flags.DEFINE_enum('hidden', None, ['frozen', 'moving'], 'gmp: whether pruned '
                    'weights stand still, or coast and decay.')
  flags.DEFINE_bool('skip_step', None, 'set, rigl, ...: a refresh replaces the '
                    'optimizer\'s step, as in RigL\'s paper.')
  flags.DEFINE_integer('final_dense', None, 'ac_dc: steps of the last dense '
                       'phase. Default: 10% of the run.')
  flags.DEFINE_bool('reset_slots', None, 'ac_dc: whether each dense phase '
                    'makes all of the optimizer\'s slots anew.')
  flags.DEFINE_float('hidden_decay', None, 'sr_ste: decay of unread weights.')
  flags.DEFINE_float('initial_gate', None, 'str, cs: the first value of what '
                     'is learnt.')
  flags.DEFINE_float('least_kept', None, 'dst: a layer that keeps no more of '
                     'its weights starts over.')
  flags.DEFINE_float('temperature', None, 'cs: the last of a round.')
  flags.DEFINE_integer('rounds', None, 'cs: how many rounds.')
  flags.DEFINE_integer('round_steps', None, 'cs: steps of a round. Default: '
                       'the run divided by the rounds and one more, for the '
                       'ticket.')
  flags.DEFINE_bool('rewind', None, 'cs: whether the ticket is trained from '
                    'early weights, or on.')
  flags.DEFINE_integer('rewind_to', None, 'cs: the step of these weights. '
                       'Default: two of 85 parts of a round.')
  flags.DEFINE_float('activation_sparsity', None, 'swat: fraction of the '
                     'activations that the weights\' gradient does not see, in '
                     '[0, 1). Default: that of the layer\'s weights.')
  flags.DEFINE_bool('masked_update', None, 'swat: whether weights that are not '
                    'read stand still.')
  flags.DEFINE_integer('freeze_at', None, 'swat: the step after which the '
                       'masks change no more.')
  flags.DEFINE_list('operands', [], 'Sparse operands of every product of a '
                    'method without its own, as name=sparsity. The names: '
                    f'{", ".join(sparse_jax.operators.Operands._fields)}. '
                    'output_gradient=0.9 is meProp.')
  flags.DEFINE_enum('activation_scope', 'tensor', ['tensor', 'example'],
                    'swat, --operands: among what activations compete.')
  flags.DEFINE_enum('gradient_scope', 'tensor', [
      'tensor', 'example', 'unified'], '--operands: among what output '
                    'gradients compete; unified: whole features.')
  flags.DEFINE_bool('pack_activations', True, 'swat, --operands: keep for the '
                    'backward pass what it will read, and no zeros. Saves '
                    'memory, costs time.')
  flags.DEFINE_integer('operand_period', 1, 'swat, --operands: steps between '
                       'two searches for the thresholds of activations and '
                       'output gradients. 1: exact counts every step.')
  flags.DEFINE_float('powerprop_alpha', None, 'Trains the method on weights '
                     'theta * |theta|**(alpha - 1); at least 1.')
  flags.DEFINE_integer('update_every', None, 'Steps between two refreshes of '
                       'the masks. Default: 100, or a 300th of the run if '
                       'that is less.')
  flags.DEFINE_integer('update_begin', None, 'First step that may refresh. '
                       'Default: 0; gmp 30%, ac_dc 10% of the run.')
  flags.DEFINE_integer('update_end', None, 'Last step that may refresh. '
                       'Default: the end; set, rigl, snfs, dsr, srigl, mest '
                       '75%, gmp 78%, spartan 80%, ac_dc 85% of the run. '
                       'Negative: never ends.')
  flags.DEFINE_enum('allocation', None, sorted(ALLOCATIONS), 'How the '
                    'sparsity is shared among layers. Default: uniform.')
  flags.DEFINE_float('erk_power_scale', None, '--allocation=erk: the power of '
                     'its densities; 0 is uniform. Default: 1, as published.')
  flags.DEFINE_enum('structure', None,
                    ['element', 'block', 'nm', 'channel', 'filter', 'fan_in'],
                    'What is kept or dropped together. Default: element.')
  flags.DEFINE_list('block_shape', ['16', '16'], 'Rows and columns of a block '
                    'for --structure=block.')
  flags.DEFINE_enum('block_reduce', 'sum', ['sum', 'max'], 'How the '
                    'magnitudes in a block make its score.')
  flags.DEFINE_list('nm', ['2', '4'], 'For --structure=nm: N kept of every M '
                    'along the inputs.')
  flags.DEFINE_enum('storage', 'masked', ['masked', 'packed'], 'masked: dense '
                    'weights and masks. packed: weights, gradients and slots '
                    'hold the kept blocks alone, with --structure=block: the '
                    'same run, in less memory, and time if blocks are large.')
  flags.DEFINE_list('dense_layers', [], 'Regular expressions; parameters whose '
                    'path has a match stay dense. For example: stem,head.')


def from_flags(values: Mapping[str, Any], train_steps: int,
               also_sparse: Mapping[str, tuple[int, ...]] = {},
               layer_order: Callable[[], Sequence[str]] | None = None,
               learning_rate: Callable[[Any], Any] | None = None
               ) -> sparse_jax.SparseMethod:
  """Makes the method that the flags ask for.

  Args:
    values: flag values by name, as `flags.FLAGS.flag_values_dict()` gives.
    train_steps: length of the run, for windows given as shares of it.
    also_sparse: patterns of leaves that are dense by default and sparse here,
      and the axes that their products sum over.
    layer_order: gives the model's parameters in the order of its layers, for
      --allocation=uniform_plus.
    learning_rate: the schedule, for --drop_schedule=learning_rate.

  A ValueError names the flag or argument and its value.
  """
  # The flags of an older run may lack some.
  values = {**dict.fromkeys((*ARGUMENTS, 'drop_schedule', 'erk_power_scale')),
            **values}
  name = values['method']
  constructor = METHODS[name]
  known = inspect.signature(constructor).parameters
  for flag, argument in ARGUMENTS.items():
    if flag == 'dense_layers' and values['operands']:
      continue  # Then it says whose operands are sparse.
    if argument not in known and _is_given(flag, values):
      raise ValueError(f'`{flag}` (={values[flag]!r}) is not a setting of '
                       f'--method={name}; it has {", ".join(known) or "none"}.')
  structure, allocation = values['structure'], values['allocation']
  for flag, place, chosen, fits in (
      ('block_shape', '--structure=block', structure, structure == 'block'),
      ('block_reduce', '--structure=block', structure, structure == 'block'),
      ('nm', '--structure=nm', structure, structure == 'nm'),
      ('erk_power_scale', '--allocation=erk', allocation, allocation == 'erk'),
      ('drop_schedule', 'methods that drop', name, 'drop_fraction' in known)):
    if not fits and _is_given(flag, values):
      raise ValueError(f'`{flag}` (={values[flag]!r}) is a setting of {place}, '
                       f'not of {chosen or "the default"}.')
  check_patterns('dense_layers', values['dense_layers'])
  rules = [(layer, False) for layer in values['dense_layers']] + [
      (pattern, True) for pattern in also_sparse] or None
  method = constructor(**_arguments(values, name, known, train_steps, rules,
                                    also_sparse, layer_order, learning_rate))
  if values['operands']:
    method = sparse_jax.operators.add_operands(method, _operands(values),
                                               is_sparse=rules)
  _check_operator_flags(values, method)
  if values['powerprop_alpha'] is not None:
    method = sparse_jax.powerprop(method, values['powerprop_alpha'])
  return _packed(values, method) if values['storage'] == 'packed' else method


def operator_options(values: Mapping[str, Any]) -> dict[str, Any]:
  """The keywords of `with_operators` that the flags ask for."""
  return {'activation_scope': values['activation_scope'],
          'gradient_scope': values['gradient_scope'],
          'pack': values['pack_activations']}


def has_target(method: str) -> bool:
  """Whether a method, by its flag, takes a sparsity to reach."""
  return 'sparsity' in inspect.signature(METHODS[method]).parameters


def periods(values: Mapping[str, Any]) -> int:
  """How many parts of a run train as one run does: rounds and ticket of cs."""
  known = inspect.signature(METHODS[values['method']]).parameters
  return (values['rounds'] or 1) + 1 if 'rounds' in known else 1


def _operands(values) -> sparse_jax.operators.Operands:
  """What --operands asks for."""
  names, found = sparse_jax.operators.Operands._fields, {}
  for part in values['operands']:
    match = re.fullmatch(r'(\w+)=([\d.]+)', part)
    if not match or match[1] not in names:
      raise ValueError(f'`operands` (={",".join(values["operands"])!r}) has '
                       f'{part!r}; it must be name=sparsity with a name of '
                       f'{", ".join(names)}.')
    found[match[1]] = float(match[2])
  return sparse_jax.operators.Operands(**found)


def _check_operator_flags(values, method) -> None:
  """Raises ValueError for a setting of operands where there are none."""
  period = values['operand_period']
  if period < 1:
    raise ValueError(f'`operand_period` (={period!r}) must be at least 1.')
  if period > 1 and 'example' in (values['activation_scope'],
                                  values['gradient_scope']):
    raise ValueError(f'`operand_period` (={period!r}) must be 1 with a scope '
                     'of example: a threshold holds for the whole tensor.')
  for flag in OPERATOR_FLAGS:
    if method.operators is None and _is_given(flag, values):
      raise ValueError(f'`{flag}` (={values[flag]!r}) is a setting of sparse '
                       'operands, of --method=swat or --operands.')


def _packed(values, method) -> sparse_jax.SparseMethod:
  """The method with packed storage, or a ValueError that names the flag."""
  if values.get('model_parallel', 1) > 1:
    raise ValueError('`storage` (=\'packed\') needs whole weights, not '
                     f'`model_parallel` (={values["model_parallel"]}).')
  try:
    return sparse_jax.packed(method)
  except ValueError as error:
    raise ValueError(f'`storage` (=\'packed\') with --method='
                     f'{values["method"]}: {error}') from None


def _is_given(flag, values) -> bool:
  """Whether it was typed or is no default; a dense run may be at sparsity 0."""
  value = values[flag]
  if value is None or flag == 'sparsity' and value == 0.:
    return False
  known = flags.FLAGS[flag]
  return value != known.default or known.present and value == known.value


def _arguments(values, name, known, train_steps, rules, also_sparse,
               layer_order, learning_rate) -> dict[str, Any]:
  """The flags that are set, and what the recipes set, of those `known`."""
  chosen = {argument: values[flag] for flag, argument in ARGUMENTS.items()
            if argument in known and values[flag] not in (None, [])}
  if 'is_sparse' in known and rules:
    chosen['is_sparse'] = rules
  if 'contracting' in known and also_sparse:
    chosen['contracting'] = also_sparse
  if 'allocation' in chosen:
    chosen['allocation'] = _allocation(values, layer_order)
  if 'structure' in chosen:
    chosen['structure'] = _structure(values)
  if 'score' in chosen:
    chosen['score'] = SCORES[chosen['score']]
  for flag in NUMBERS:
    if ARGUMENTS[flag] in chosen:
      chosen[ARGUMENTS[flag]] = numbers(flag, values[flag])
  if name in PRUNE_ENDS and not isinstance(chosen.get('structure'),
                                           sparse_jax.NM):
    chosen.setdefault('prune_end',
                      max(round(PRUNE_ENDS[name] * train_steps), 1))
  if 'update_every' in known:
    often = min(max(train_steps // 300, 1), 100)
    rare = max(train_steps // REFRESHES.get(name, 1), 1)
    chosen.setdefault('update_every', rare if name in REFRESHES else often)
  if 'final_dense' in known:
    chosen.setdefault('final_dense', train_steps // 10)
  if 'round_steps' in known:
    chosen.setdefault('round_steps', max(train_steps // periods(values), 1))
  if values['drop_schedule'] == 'learning_rate':
    chosen['drop_fraction'] = sparse_jax.schedules.drop_with(
        chosen.get('drop_fraction', known['drop_fraction'].default),
        learning_rate, peak=values['learning_rate'])
  if name == 'top_kast':
    chosen.setdefault('backward_sparsity',
                      max(0., round(values['sparsity'] - .1, 6)))
  return chosen | _window(chosen, name, train_steps)


def _allocation(values, layer_order):
  """What --allocation names, told what else it needs."""
  chosen = ALLOCATIONS[values['allocation']]
  if values['erk_power_scale'] is not None:
    return functools.partial(chosen, power_scale=values['erk_power_scale'])
  if chosen is not sparse_jax.uniform_plus or layer_order is None:
    return chosen

  def uniform_plus(shapes, sparsity):
    order = [path for path in layer_order() if path in shapes]
    return sparse_jax.uniform_plus(shapes, sparsity, first=order[0],
                                   last=order[-1])

  return uniform_plus


def numbers(flag: str, texts: Sequence[str]) -> tuple[float, ...]:
  """The numbers of a list of texts; a ValueError names the flag."""
  try:
    return tuple(float(text) for text in texts)
  except ValueError:
    raise ValueError(f'`{flag}` (={",".join(texts)!r}) must be numbers '
                     'such as 0.5,0.25.') from None


def _structure(values) -> sparse_jax.masks.structures.Structure:
  kind = values['structure']
  if kind == 'block':
    return _of_pair('block_shape', values, lambda *shape: sparse_jax.Block(
        shape, values['block_reduce']))
  if kind == 'nm':
    return _of_pair('nm', values, sparse_jax.NM)
  return {'element': sparse_jax.Unstructured, 'channel': sparse_jax.Channel,
          'filter': sparse_jax.Filter, 'fan_in': sparse_jax.FanIn}[kind]()


def _of_pair(flag, values, make) -> sparse_jax.masks.structures.Structure:
  given = f'`{flag}` (={",".join(values[flag])!r})'
  try:
    first, second = (int(number) for number in values[flag])
  except ValueError:
    raise ValueError(f'{given} must be two integers such as 2,4.') from None
  structure = make(first, second)
  try:
    sparse_jax.masks.structures.check_structure(structure)
  except ValueError as error:
    raise ValueError(f'{given}: {error}') from error
  return structure


def check_patterns(flag: str, patterns: Sequence[str]) -> None:
  """Raises ValueError unless all are regular expressions, naming the flag."""
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f'`{flag}` (={",".join(patterns)!r}) has {pattern!r}, '
                       f'no regular expression: {error}.') from None


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
