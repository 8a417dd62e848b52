"""The sparsity flags, and the one way from flags to a method.

Every binary shares these. A flag left unset leaves the choice to the method,
so its default is the one that `sparse_jax` documents; a flag that the chosen
method does not have is an error, never ignored.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
import re
import typing
from typing import Any

from absl import flags

import sparse_jax

# The command line's names; Python keeps `set` for itself.
METHODS = {name.strip('_'): getattr(sparse_jax, name) for name in (
    'dense', 'static', 'snip', 'grasp', 'set_', 'rigl', 'itop', 'snfs',
    'dsr', 'srigl', 'mest', 'granet', 'spartan', 'gmp', 'ac_dc', 'dnw',
    'iht', 'swat', 'top_kast', 'ste', 'sr_ste', 'str_', 'dst', 'cs')}
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
NUMBERS = ('mutation', 'soft_beta')  # Lists of them.
# Flags of methods whose products have sparse operands.
OPERATOR_FLAGS = ('activation_scope', 'gradient_scope', 'pack_activations',
                  'operand_period')
# Flags that are settings of one choice of another flag.
NEEDED = {'block_shape': ('structure', 'block'),
          'block_reduce': ('structure', 'block'), 'nm': ('structure', 'nm'),
          'erk_power_scale': ('allocation', 'erk')}
# Flags that are arguments of some methods, and what they are for; their types
# and defaults are read from the methods.
SETTINGS = {
    'backward_sparsity': 'fraction of the weights without a gradient, in [0, '
        'sparsity]. Default: sparsity - 0.1, at least 0.',
    'penalty_weight': 'coefficient of the exploration loss (top_kast), of '
        'exp(-threshold) (dst), of the gates (cs).',
    'backward_selection': 'how the set B outside A is chosen.',
    'stop_exploration_at': 'the step from which on only the forward set gets '
        'a gradient.',
    'drop_fraction': 'share of the active weights replaced at a refresh, in '
        '[0, 1].',
    'grow_init': 'the value at which a weight is grown.',
    'redistribution': 'by what dropped weights are shared out among layers.',
    'gamma': 'an output with fewer salient inputs than this share of the '
        'fan-in leaves, in [0, 1]; 0: none leaves.',
    'never_ablate': 'a regular expression; layers whose path has a match keep '
        'all outputs. Default: the usual names of last layers.',
    'initial_sparsity': 'sparsity at the start, in [0, sparsity].',
    'prune_end': 'the step from which on the sparsity is final. Default: 30%, '
        '20%, 50% of the run.',
    'prune_begin': 'the step at which the sparsity begins to rise.',
    'variant': 'prune, then grow to the sparsity; or the soft memory bound, '
        'which has more weights until the next refresh.',
    'mutation': 'shares of all weights that are replaced, in turn over the '
        'run. Default: 0.02,0.01,0.',
    'gradient_weight': 'weight of the gradient in what is kept.',
    'soft_beta': 'hardness of the soft mask at the start and at the end. '
        'Default: 1,20.',
    'drop_by': 'one ranking, or positive and negative weights apart, as '
        'originally.',
    'growth': 'how weights are grown.',
    'growth_momentum': 'coefficient of the average gradient, in [0, 1).',
    'drop_threshold': 'first threshold on |w|.',
    'scope': 'whether weights compete in their layer or in all.',
    'score': 'what is pruned last. Default: magnitude.',
    'hidden': 'whether pruned weights stand still, or coast and decay.',
    'skip_step': "a refresh replaces the optimizer's step, as in RigL's paper.",
    'final_dense': 'steps of the last dense phase. Default: 10% of the run.',
    'reset_slots': "whether each dense phase makes all of the optimizer's "
        'slots anew.',
    'hidden_decay': 'decay of unread weights.',
    'initial_gate': 'the first value of what is learnt.',
    'least_kept': 'a layer that keeps no more of its weights starts over.',
    'temperature': 'the last of a round.',
    'rounds': 'how many rounds.',
    'round_steps': 'steps of a round. Default: the run divided by the rounds '
        'and one more, for the ticket.',
    'rewind': 'whether the ticket is trained from early weights, or on.',
    'rewind_to': 'the step of these weights. Default: two of 85 parts of a '
        'round.',
    'activation_sparsity': "fraction of the activations that the weights' "
        "gradient does not see, in [0, 1). Default: that of the layer's "
        'weights.',
    'masked_update': 'whether weights that are not read stand still.',
    'freeze_at': 'the step after which the masks change no more.',
    'update_every': 'steps between two refreshes of the masks. Default: 100, '
        'or a 300th of the run if that is less.',
    'update_begin': 'first step that may refresh. Default: 0; gmp 30%, ac_dc '
        '10% of the run.',
    'update_end': 'last step that may refresh. Default: the end; set, rigl, '
        'snfs, dsr, srigl, mest 75%, gmp 78%, spartan 80%, ac_dc 85% of the '
        'run. Negative: never ends.',
}
# The words that they may be.
CHOICES = {
    'backward_selection': ['magnitude', 'random'],
    'grow_init': ['zeros', 'random_normal', 'random_uniform', 'initial_value',
                  'initial_dist'],
    'redistribution': ['momentum', 'magnitude', 'nonzeros', 'none'],
    'variant': ['em', 'ems'],
    'drop_by': ['magnitude', 'sign'],
    'growth': ['gradient', 'random'],
    'scope': ['layer', 'global'],
    'score': list(SCORES),
    'hidden': ['frozen', 'moving'],
}


def define_flags(sparsity: float = .9) -> None:
  """Defines the flags; `sparsity` is the binary's own default."""
  flags.DEFINE_enum('method', 'top_kast', sorted(METHODS), 'How to train '
                    'sparse.')
  flags.DEFINE_float('sparsity', sparsity, 'Fraction of the weights that are '
                     'zero in the forward pass, in [0, 1).')
  for setting, text in SETTINGS.items():
    _define_setting(setting, text)
  flags.DEFINE_enum('drop_schedule', None, ['cosine', 'learning_rate'],
                    'How --drop_fraction falls: along a cosine to the last '
                    'refresh, or with the learning rate. Default: cosine.')
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
                       'output gradients. 1: exact counts every step.',
                       lower_bound=1)
  flags.DEFINE_float('powerprop_alpha', None, 'Trains the method on weights '
                     'theta * |theta|**(alpha - 1); at least 1.')
  flags.DEFINE_enum('allocation', None, sorted(ALLOCATIONS), 'How the '
                    'sparsity is shared among layers. Default: uniform; itop, '
                    'granet erk.')
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


def _define_setting(flag: str, text: str) -> None:
  """Defines the flag of an argument that some methods have."""
  having = {name: inspect.signature(method).parameters[ARGUMENTS[flag]]
            for name, method in METHODS.items() if has(name, flag)}
  text = f'{", ".join(having)}: {text}'
  if 'Default:' not in text:
    defaults = {}
    for name, parameter in having.items():
      defaults.setdefault(parameter.default, []).append(name)
    text += ' [' + '; '.join(f'{default}: {", ".join(names)}' for default, names
                             in defaults.items()) + ']'
  if flag in CHOICES:
    flags.DEFINE_enum(flag, None, CHOICES[flag], text)
  elif flag in NUMBERS:
    flags.DEFINE_list(flag, None, text)
  else:
    annotation = next(iter(having.values())).annotation
    kinds = typing.get_args(annotation) or (annotation,)
    next(define for kind, define in (
        (bool, flags.DEFINE_bool), (int, flags.DEFINE_integer),
        (float, flags.DEFINE_float), (str, flags.DEFINE_string))
         if kind in kinds)(flag, None, text)


def from_flags(values: Mapping[str, Any], train_steps: int,
               also_sparse: Mapping[str, tuple[int, ...]] = {},
               layer_order: Callable[[], Sequence[str]] | None = None,
               learning_rate: Callable[[Any], Any] | None = None
               ) -> sparse_jax.SparseMethod:
  """Makes the method of flags; a ValueError names the flag and its value.

  `also_sparse` has patterns of leaves that are dense by default and sparse
  here, and the axes that their products sum over. `layer_order` gives the
  parameters in the order of the layers, for --allocation=uniform_plus, and
  `learning_rate` is the schedule, for --drop_schedule=learning_rate.
  """
  # The flags of an older run may lack some.
  values = {**dict.fromkeys((*ARGUMENTS, 'drop_schedule', 'erk_power_scale')),
            **values}
  name = values['method']
  known = inspect.signature(METHODS[name]).parameters
  for flag in (*ARGUMENTS, 'drop_schedule'):
    if flag == 'dense_layers' and values['operands']:
      continue  # Then it says whose operands are sparse.
    if not has(name, flag) and _is_given(flag, values):
      raise ValueError(f'`{flag}` (={values[flag]!r}) is not a setting of '
                       f'--method={name}; it has {", ".join(known) or "none"}.')
  for flag, (other, needed) in NEEDED.items():
    if values[other] != needed and _is_given(flag, values):
      raise ValueError(f'`{flag}` (={values[flag]!r}) is a setting of --{other}'
                       f'={needed}, not of {values[other] or "the default"}.')
  check_patterns('dense_layers', values['dense_layers'])
  rules = [(layer, False) for layer in values['dense_layers']] + [
      (pattern, True) for pattern in also_sparse] or None
  method = METHODS[name](**_arguments(values, name, known, train_steps, rules,
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


def has(method: str, flag: str) -> bool:
  """Whether a method has the argument that a flag is for."""
  argument = 'drop_fraction' if flag == 'drop_schedule' else ARGUMENTS[flag]
  return argument in inspect.signature(METHODS[method]).parameters


def periods(values: Mapping[str, Any]) -> int:
  """How many parts of a run train as one run does: rounds and ticket of cs."""
  return (values['rounds'] or 1) + 1 if has(values['method'], 'rounds') else 1


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
  if period > 1 and 'example' in (values['activation_scope'],
                                  values['gradient_scope']):
    raise ValueError(f'`operand_period` (={period!r}) must be 1 with a scope '
                     'of example: a threshold holds for the whole tensor.')
  for flag in OPERATOR_FLAGS:
    if method.operators is None and _is_given(flag, values):
      raise ValueError(f'`{flag}` (={values[flag]!r}) is a setting of sparse '
                       'operands, of --method=swat or --operands.')


def _packed(values, method) -> sparse_jax.SparseMethod:
  """The method with packed storage."""
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
  often = min(max(train_steps // 300, 1), 100)
  defaults = {
      'backward_sparsity': max(0., round((values['sparsity'] or 0.) - .1, 6)),
      'update_every': (max(train_steps // REFRESHES[name], 1)
                       if name in REFRESHES else often),
      'final_dense': train_steps // 10,
      'round_steps': max(train_steps // periods(values), 1)}
  is_nm = isinstance(chosen.get('structure'), sparse_jax.NM)
  if name in WINDOWS and not (name == 'gmp' and is_nm):
    # N of M cannot tighten: gmp prunes to it from the start.
    begin, end = (round(share * train_steps) for share in WINDOWS[name])
    defaults |= {'update_begin': begin, 'update_end': max(end, 1)}
  if name in PRUNE_ENDS and not is_nm:
    defaults['prune_end'] = max(round(PRUNE_ENDS[name] * train_steps), 1)
  chosen = {argument: value for argument, value in defaults.items()
            if argument in known} | chosen
  if chosen.get('update_end', 0) < 0:
    chosen['update_end'] = None
  if values['drop_schedule'] == 'learning_rate':
    chosen['drop_fraction'] = sparse_jax.schedules.drop_with(
        chosen.get('drop_fraction', known['drop_fraction'].default),
        learning_rate, peak=values['learning_rate'])
  return chosen


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
  flag = {'block': 'block_shape', 'nm': 'nm'}.get(kind)
  if flag is None:
    return {'element': sparse_jax.Unstructured, 'channel': sparse_jax.Channel,
            'filter': sparse_jax.Filter, 'fan_in': sparse_jax.FanIn}[kind]()
  try:
    first, second = map(int, values[flag])
    structure = (sparse_jax.NM(first, second) if kind == 'nm' else
                 sparse_jax.Block((first, second), values['block_reduce']))
    sparse_jax.masks.structures.check_structure(structure)
  except ValueError as error:
    raise ValueError(f'`{flag}` (={",".join(values[flag])!r}) must be two '
                     f'integers such as 2,4: {error}') from error
  return structure


def check_patterns(flag: str, patterns: Sequence[str]) -> None:
  """Raises ValueError unless all are regular expressions, naming the flag."""
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f'`{flag}` (={",".join(patterns)!r}) has {pattern!r}, '
                       f'no regular expression: {error}.') from None
