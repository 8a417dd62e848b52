"""Prunes a trained network in one shot, and trains it on with the same zeros.

  python -m experiments.prune --run=RUN --by=magnitude,wanda,sparsegpt \
      --sparsity=0.5,0.7 --fine_tune_steps=200

takes the finished dense run that experiments.image.train or
experiments.language.train left in RUN and prunes it by each rule to each
sparsity, from batches of its training data. What is left is tested before and
after fine-tuning by the run's own optimizer with fresh slots, at a constant
rate; beside it stands the dense network after as many steps. --distill=0.5
makes half of the loss the divergence from the dense network's outputs.
--pattern=2:4 keeps 2 of each 4 inputs instead. --dense_layers=head,vocabulary
leaves out leaves in whose path one of these regular expressions is found.

--by=iterative prunes by magnitude in rounds, with rewinding to the values at
step --rewind_to; --by=gmp and rigl train as long as the run, sparse from early
on. `steps` says what each row took to train before it is fine-tuned.

RUN gets one_shot.json and one_shot.md, a row for each network: the fraction of
its pruned leaves that is zero, and that is zero or on no path from an input to
an output. Batch statistics are measured anew on the data that it is pruned by.
"""

import argparse
from collections.abc import Mapping, Sequence
import contextlib
import math
import os
import re
from typing import Any, NamedTuple

from absl import app
from absl import flags
import jax

import sparse_jax
from sparse_jax import trees
from sparse_jax.cost import effective
from sparse_jax.jaxprs import products
from sparse_jax.masks import selection
from sparse_jax.methods import one_shot
from experiments import devices
from experiments import files
from experiments import programs
from experiments import pruning
from experiments import reporting
from experiments import results
from experiments import sparsity as sparsity_flags
from experiments import tasks
from experiments import training

# Not in one shot: in rounds from early values, and sparse from early on.
IN_TRAINING = ('iterative', 'gmp', 'rigl')
RULES = (*one_shot.RULES, *IN_TRAINING)


class Settings(NamedTuple):
  """What is done to a run."""

  by: Sequence[str] = one_shot.RULES[::-1]
  sparsity: Sequence[float] = (.5,)
  pattern: str | None = None  # 'n:m'; the sparsity is then 1 - n/m.
  dense_layers: Sequence[str] = ()
  calibration_batches: int = 8
  fine_tune_steps: int = 0
  fine_tune_learning_rate: float = 1e-4
  distill: float = 0.  # Share of the loss that is the teacher's.
  rewind_to: int = 0  # The step whose values iterative pruning returns to.

  @property
  def structure(self) -> sparse_jax.masks.Structure:
    """What is kept together."""
    if self.pattern is None:
      return sparse_jax.Unstructured()
    found = re.fullmatch(r'([1-9]\d*):([1-9]\d*)', self.pattern)
    if found is None or int(found[1]) >= int(found[2]):
      raise ValueError(f'`pattern` (={self.pattern!r}) must be as 2:4.')
    return sparse_jax.NM(*map(int, found.groups()))


def open_run(workdir: str) -> tuple[training.Binary, training.Run]:
  """The binary of a finished dense run, and the run; errors name what lacks."""
  binary, run = results.reopen(workdir)
  if run.values['method'] != 'dense':
    raise ValueError(f'`run` (={workdir!r}) is not dense, but trained by '
                     f'--method={run.values["method"]}.')
  return binary, run


def study(workdir: str, settings: Settings) -> list[dict[str, Any]]:
  """Prunes and fine-tunes a run in every way; the rows of one_shot.json.

  The dense network is first: `by`, `sparsity`, `effective_sparsity`, `steps` of
  training, and the test metric as `pruned` and `fine_tuned`.
  """
  check(settings)
  binary, run = open_run(workdir)
  if not 0 <= settings.rewind_to < run.train_steps:
    raise ValueError(f'`rewind_to` (={settings.rewind_to!r}) must be in '
                     f'[0, {run.train_steps}).')
  state = training.last_state(run)
  examples = calibration(run, state, settings.calibration_batches)
  leaves = chosen(run, state, examples, settings)
  wanted = (settings.sparsity if settings.pattern is None
            else [settings.structure.sparsity])
  rows = []
  for by, sparsity in [('dense', 0.)] + [(by, sparsity) for sparsity in wanted
                                         for by in settings.by]:
    params, steps = state.params, run.train_steps
    if by == 'iterative':
      params, steps = pruning.ticket(run, params, sparsity, leaves,
                                     settings.structure, settings.rewind_to)
    elif by in IN_TRAINING:
      params = pruning.trained(binary, run, by, sparsity, leaves,
                               settings.pattern)
    elif by != 'dense':
      params = prune(run, state, examples, by, sparsity, leaves,
                     settings.structure)
    rows.append({'by': by, 'steps': steps} | measure(
        binary, run, settled(run, state, params, examples), settings,
        teacher=state.params))
    print(rows[-1], flush=True)
  path = os.path.join(run.workdir, 'one_shot')
  reporting.write_json(f'{path}.json', {
      'rows': rows, 'metric': binary.metric(run.values),
      'settings': settings._asdict()})
  files.write_text(f'{path}.md', table(rows))
  print(table(rows))
  return rows


def check(settings: Settings) -> None:
  """Raises ValueError for what cannot work."""
  for by in settings.by:
    if by not in RULES:
      raise ValueError(f'`by` (={by!r}) must be of {", ".join(RULES)}.')
  for sparsity in settings.sparsity:
    if not 0 < sparsity < 1:
      raise ValueError(f'`sparsity` (={sparsity!r}) must be in (0, 1).')
  sparsity_flags.check_patterns('dense_layers', settings.dense_layers)
  for name, fits, must in (
      ('calibration_batches', lambda n: n >= 1, 'at least 1'),
      ('fine_tune_steps', lambda n: n >= 0, 'at least 0'),
      ('fine_tune_learning_rate', lambda x: 0 < x < math.inf,
       'finite and above 0'),
      ('distill', lambda x: 0 <= x <= 1, 'in [0, 1]')):
    value = getattr(settings, name)
    if not fits(value):
      raise ValueError(f'`{name}` (={value!r}) must be {must}.')
  settings.structure  # Named if it is none.


def loss(run: training.Run, weights, model_state, batch):
  """What is pruned: the loss of training, with the same dropout each time."""
  key = jax.random.key(run.values['seed'])
  return run.task.problem.loss(weights, model_state, batch, key)


def calibration(run: training.Run, state: tasks.TrainState, count: int
                ) -> list[tuple[Any, Any]]:
  """Model states and batches of training data that come after the run's."""
  with contextlib.closing(run.train_batches(run.train_steps)) as batches:
    found = [devices.put_batch(next(batches), run.mesh) for _ in range(count)]
  *before, _ = model_states(run, state, state.params, found)
  return list(zip(before, found, strict=True))


def model_states(run, state, params, batches) -> list[Any]:
  """The state's, and that after each of the batches."""
  following = jax.jit(lambda *args: loss(run, *args)[1][0])
  found = [state.model_state]
  for batch in batches:
    found.append(following(params, found[-1], batch))
  return found


def settled(run: training.Run, state: tasks.TrainState, params, examples
            ) -> tasks.TrainState:
  """The state with other parameters, and the model state that they lead to."""
  *_, last = model_states(run, state, params, [batch for _, batch in examples])
  return state._replace(params=params, model_state=last)


def prune(run: training.Run, state: tasks.TrainState, examples, by: str,
          sparsity: float, leaves, structure) -> Any:
  """The parameters of a run, pruned, with a bar that says how far it is."""
  with reporting.progress(None) as progress:
    def report(path, done, total):
      del path
      progress.total = total  # Now it is known how many layers there are.
      progress.update(done - progress.n)

    return one_shot.one_shot(
        lambda *args: loss(run, *args)[0], state.params, examples,
        sparsity=sparsity, by=by, structure=structure,
        is_sparse=lambda path, leaf: path in leaves, report=report)


def chosen(run, state, examples, settings) -> set[str]:
  """Paths of the kernels that products multiply by, the dense ones apart."""
  used = {product.path for product in products.find_products(
      lambda *args: loss(run, *args)[0], state.params, *examples[0])}
  found = {path for path, leaf in trees.leaves_by_path(state.params).items()
           if selection.is_kernel(path, leaf) and path in used
           and not any(re.search(rule, path) for rule in settings.dense_layers)}
  if not found:
    raise ValueError(f'`dense_layers` (={",".join(settings.dense_layers)!r}) '
                     f'must leave one of {", ".join(filter(None, used))}.')
  return found


def masks_of(params) -> Any:
  """bool masks of the kernels that have zeros, None for other leaves."""
  def mask(path, leaf):
    kept = leaf != 0
    return kept if selection.is_kernel(path, leaf) and not kept.all() else None

  return trees.map_leaves(mask, params)


def measure(binary, run, state, settings, teacher) -> dict[str, Any]:
  """Sparsity, effective sparsity, and the metric before and after tuning."""
  metric = f'test_{binary.metric(run.values)}'
  masks = masks_of(state.params)
  row = {'sparsity': 0., 'effective_sparsity': 0.}
  if jax.tree.leaves(masks):
    apply, inputs = run.apply(state)
    found = effective.connectivity(
        lambda weights, inputs: jax.tree.leaves(apply(weights, inputs))[0],
        masks, inputs, params=state.params)
    row = {name: getattr(found, name) for name in row}
  row['pruned'] = training.evaluate(run, state)[metric]
  if settings.fine_tune_steps:
    row['fine_tuned'] = training.evaluate(run, pruning.fine_tune(
        run, state, masks, teacher=teacher, distill=settings.distill,
        begin=run.train_steps + settings.calibration_batches,
        steps=settings.fine_tune_steps,
        learning_rate=settings.fine_tune_learning_rate))[metric]
  return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table: a line for each network."""
  formats = {'sparsity': '.1%', 'effective_sparsity': '.1%', 'pruned': '.4g',
             'fine_tuned': '.4g'}
  spaced = lambda row: {name.replace('_', ' '): value
                        for name, value in row.items()}
  return reporting.markdown_table(
      [spaced(row) for row in rows], formats=spaced(formats))


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The flags; not absl's, since those of the run's program come with it."""
  given = argparse.ArgumentParser(
      'experiments.prune', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  floats = lambda text: [float(part) for part in text.split(',')]
  words = lambda text: [part for part in text.split(',') if part]
  given.add_argument('--run', required=True, help='Folder of a finished run.')
  for name, kind, text in (
      ('by', words, f'Rules, separated by commas: {", ".join(RULES)}.'),
      ('sparsity', floats, 'Sparsities, separated by commas.'),
      ('pattern', str, 'n:m, as 2:4: n of each m inputs.'),
      ('dense_layers', words, 'Leaves that are not pruned: regular '
       'expressions, separated by commas.'),
      ('calibration_batches', int, 'Batches of training data to prune by.'),
      ('fine_tune_steps', int, 'How many.'),
      ('fine_tune_learning_rate', float, 'Constant.'),
      ('distill', float, 'Share of the loss of fine-tuning that is the '
       'divergence from the outputs of the dense network.'),
      ('rewind_to', int, 'iterative: the step whose values rounds return to.')):
    given.add_argument(f'--{name}', type=kind, help=text,
                       default=Settings._field_defaults[name])
  flags.FLAGS(argv[:1])
  return given.parse_args(argv[1:])


def main(args):
  values = vars(args)
  programs.begin(())
  with programs.errors_in_a_line():
    study(values.pop('run'), Settings(**values))


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
