"""The optimizer flags, and the learning-rate schedules of the papers."""

from collections.abc import Mapping
import math
from typing import Any

from absl import flags
import jax
import optax

from experiments import sparsity
import sparse_jax

# The key under which sparse_jax.cs puts its gates.
GATES = jax.tree_util.DictKey('gates')
_ADAM = {'adam': optax.adam, 'aged_adam': sparse_jax.aged_adam}
_ADAMW = {'adamw': optax.adamw, 'aged_adamw': sparse_jax.aged_adamw}
OPTIMIZERS = ('sgd', 'momentum', 'nesterov', *_ADAM, *_ADAMW)


def define_flags(*, optimizer: str = 'nesterov', learning_rate: float = .1,
                 weight_decay: float = 5e-4, lr_schedule: str = 'cosine',
                 clip_norm: float | None = None) -> None:
  """Defines the flags below; the arguments are the binary's own defaults."""
  flags.DEFINE_enum('optimizer', optimizer, OPTIMIZERS, 'momentum and nesterov '
                    'are SGD with a momentum of 0.9; aged_adam and aged_adamw '
                    'count the steps of a weight from its growth.')
  flags.DEFINE_float('learning_rate', learning_rate, 'Peak learning rate.')
  flags.DEFINE_enum('lr_schedule', lr_schedule,
                    ['constant', 'cosine', 'step'], 'After the warm-up: '
                    'constant, a cosine to 0, or steps at --lr_drops.')
  flags.DEFINE_float('warmup_share', 0.05, 'Share of the run in which the '
                     'learning rate rises linearly from 0.', lower_bound=0,
                     upper_bound=1)
  flags.DEFINE_list('lr_drops', ['0.3', '0.7', '0.9'], 'Shares of the run at '
                    'which --lr_schedule=step multiplies by --lr_factor.')
  flags.DEFINE_integer('lr_periods', None, 'Equal parts of the run, in each of '
                       'which the schedule begins anew. Default: 1; with '
                       '--method=cs one for each round and for the ticket.',
                       lower_bound=1)
  flags.DEFINE_float('lr_factor', 0.1, 'Factor of each step of the schedule.')
  flags.DEFINE_float('weight_decay', weight_decay, 'L2 coefficient of kernels '
                     '(not of biases and norms); decoupled for adamw and '
                     'aged_adamw.')
  flags.DEFINE_float('clip_norm', clip_norm, 'Clips gradients to this '
                     'global norm.')


def schedule(values: Mapping[str, Any], train_steps: int) -> optax.Schedule:
  """Learning rate by the step; a ValueError names a flag and its value."""
  _check_number('learning_rate', values)
  _check_number('lr_factor', values)
  for flag in ('lr_drops', 'lr_factor'):
    default = flags.FLAGS[flag].default
    if values['lr_schedule'] != 'step' and values[flag] != default:
      raise ValueError(f'`{flag}` (={values[flag]!r}) is a setting of '
                       f'--lr_schedule=step, not of {values["lr_schedule"]}.')
  # Not in the flags of older runs.
  periods = values.get('lr_periods') or sparsity.periods(values)
  length = -(-train_steps // periods)
  once = _period(values, length)
  return once if periods == 1 else lambda step: once(step % length)


def _period(values, train_steps) -> optax.Schedule:
  """The schedule of one part of the run, of so many steps."""
  peak = values['learning_rate']
  warmup = round(values['warmup_share'] * train_steps)
  rest = max(train_steps - warmup, 1)
  if values['lr_schedule'] == 'constant':
    after = optax.constant_schedule(peak)
  elif values['lr_schedule'] == 'cosine':
    after = optax.cosine_decay_schedule(peak, rest)
  else:
    shares = sparsity.numbers('lr_drops', values['lr_drops'])
    if not all(0 <= share <= 1 for share in shares):
      raise ValueError(f'`lr_drops` (={shares!r}) must be in [0, 1].')
    drops = [round(share * train_steps) - warmup for share in shares]
    # In a short run two drops may fall on one step.
    after = optax.piecewise_constant_schedule(peak, {
        step: values['lr_factor']**drops.count(step) for step in drops})
  if not warmup:
    return after
  rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([rise, after], [warmup])


def make(values: Mapping[str, Any], train_steps: int
         ) -> optax.GradientTransformation:
  """The optimizer of the flags, without any sparsity; raises as `schedule`."""
  _check_number('weight_decay', values, zero=True)
  if values['clip_norm'] is not None:
    _check_number('clip_norm', values)
  rate, decay = schedule(values, train_steps), values['weight_decay']
  kind = values['optimizer']
  if kind in _ADAMW:
    core = _ADAMW[kind](rate, weight_decay=decay, mask=_kernels)
  elif kind in _ADAM:
    core = optax.chain(optax.add_decayed_weights(decay, _kernels),
                       _ADAM[kind](rate))
  else:
    momentum = None if kind == 'sgd' else 0.9
    core = optax.chain(
        optax.add_decayed_weights(decay, _kernels),
        optax.sgd(rate, momentum, nesterov=kind == 'nesterov'))
  if values['clip_norm'] is None:
    return core
  return optax.chain(optax.clip_by_global_norm(values['clip_norm']), core)


def _kernels(params):
  """What decays: kernels and their thresholds, not the gates of `cs`."""
  return jax.tree.map_with_path(
      lambda path, leaf: leaf.ndim > 1 and path[0] != GATES, params)


def _check_number(flag: str, values, zero: bool = False) -> None:
  value = values[flag]
  if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
    least = 'finite and at least 0' if zero else 'finite and above 0'
    raise ValueError(f'`{flag}` (={value!r}) must be {least}.')
