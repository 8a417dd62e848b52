"""The flags that every run has, beside those of its method and optimizer."""

from collections.abc import Mapping, Sequence
import os
import sys
from typing import Any

from absl import flags

from experiments import devices
from experiments import optimization
from experiments import sparsity

# Flags that may differ between a run and its continuation.
FREE = ('workdir', 'data_dir', 'log_every', 'eval_every', 'checkpoint_every',
        'model_parallel', 'effective_sparsity')


def define_flags(*, batch_size: int, examples: str, target: float = .9,
                 train_steps: int | None = None, **optimizer) -> None:
  """Defines the flags below; the arguments are the binary's own defaults.

  `examples` is what a batch is made of, `target` the default of --sparsity;
  others are those of `optimization.define_flags`.
  """
  flags.DEFINE_integer('batch_size', batch_size,
                       f'{examples} per step, over all devices.',
                       lower_bound=1)
  flags.DEFINE_integer('train_steps', train_steps,
                       'Length of the run in steps.', lower_bound=1)
  flags.DEFINE_integer('seed', 0, 'Of initial weights, data order and masks.',
                       lower_bound=0, upper_bound=2**32 - 1)
  flags.DEFINE_bool('bfloat16', False, 'Compute in bfloat16; parameters stay '
                    'float32.')
  flags.DEFINE_string('data_dir', None, 'Folder of the prepared data sets. '
                      'Default: TFDS\'s own.')
  flags.DEFINE_string('workdir', None, 'Where the run leaves everything. '
                      'Default: runs/<dataset>_<model>_<method>_<sparsity>.')
  flags.DEFINE_integer('log_every', 50, 'Steps between two rows of metrics.',
                       lower_bound=1)
  flags.DEFINE_integer('eval_every', 250, 'Steps between two evaluations.',
                       lower_bound=1)
  flags.DEFINE_integer('checkpoint_every', None, 'Steps between checkpoints. '
                       'Default: those of --eval_every, at most 1000.',
                       lower_bound=1)
  flags.DEFINE_integer('compare_masks_every', 0, 'Steps between two looks at '
                       'how far the masks have moved. 0: none.', lower_bound=0)
  flags.DEFINE_bool('effective_sparsity', True, 'Evaluations also follow which '
                    'weights are on a path from an input to an output.')
  flags.DEFINE_integer('model_parallel', 1, 'Over how many devices parameters, '
                       'masks and optimizer slots are split.')
  sparsity.define_flags(sparsity=target)
  optimization.define_flags(**optimizer)
  devices.define_flags()


def check_values(values: Mapping[str, Any]) -> None:
  """Raises ValueError for a value outside the bounds of its flag.

  As the parser of a command line does; values may also come from elsewhere.
  """
  for name in values.keys() & set(flags.FLAGS):
    parser, value = flags.FLAGS[name].parser, values[name]
    least, most = (getattr(parser, f'{end}_bound', None)
                   for end in ('lower', 'upper'))
    if value is not None and not (
        (least is None or value >= least) and (most is None or value <= most)):
      raise ValueError(f'`{name}` (={value!r}) must be '
                       f'{parser.syntactic_help}.')
  devices.check_batch_size(values['batch_size'], values['model_parallel'])


def steps_between(event: str, values: Mapping[str, Any]) -> int:
  """Steps from one row, evaluation or checkpoint to the next."""
  return values[f'{event}_every'] or min(values['eval_every'], 1000)


def workdir_name(values: Mapping[str, Any]) -> str:
  """Names a run by its data set, model, method and sparsity."""
  name = f'{values["dataset"]}_{values["model"]}_{values["method"]}'
  if sparsity.has(values['method'], 'sparsity'):
    name += f'_{values["sparsity"]:g}'
  return os.path.join('runs', name)


def run_config(module: str, without: Sequence[str] = ()) -> dict[str, Any]:
  """The flags that make a run what it is, wherever `module` is used."""
  own = flags.FLAGS.flags_by_module_dict()
  main_module = sys.argv[0] if module == '__main__' else module
  modules = (main_module, __name__, sparsity.__name__, optimization.__name__)
  return {flag.name: flag.value for name in modules for flag in own[name]
          if flag.name not in without}
