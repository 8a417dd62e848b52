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
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import math
import os
import re
from typing import Any
from typing import NamedTuple

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


def open_run(workdir: str) -> tuple[training.Binary, training.Run]:
  """The binary of a finished dense run, and the run; errors name what lacks."""
  binary, run = results.reopen(workdir)
  if run.values['method'] != 'dense':
    raise ValueError(f'`run` (={workdir!r}) is not dense, but trained by '
                     f'--method={run.values["method"]}.')
  return binary, run


def study(workdir: str, settings: Settings) -> list[dict[str, Any]]:
  """Prunes and fine-tunes a run in every way that is asked for.

  Returns:
    The rows of one_shot.json, the dense network first: `by`, `sparsity`,
    `effective_sparsity`, `steps` of training, and the test metric as `pruned`
    and `fine_tuned`. A bad argument is named before anything runs.
  """
  check(settings)
  binary, run = open_run(workdir)
  if not 0 <= settings.rewind_to < run.train_steps:
    raise ValueError(f'`rewind_to` (={settings.rewind_to!r}) must be in '
                     f'[0, {run.train_steps}).')
  state = training.last_state(run)
  examples = calibration(run, state, settings.calibration_batches)
  leaves = chosen(run, state, examples, settings)
  rows = []
  for by, sparsity in [('dense', 0.)] + [
      (by, sparsity) for sparsity in sparsities(settings)
      for by in settings.by]:
    params, steps = state.params, run.train_steps
    if by == 'iterative':
      params, steps = pruning.ticket(
          run, params, sparsity, leaves, structure_of(settings),
          settings.rewind_to)
    elif by in IN_TRAINING:
      params = pruning.trained(binary, run, by, sparsity, leaves,
                               settings.pattern)
    elif by != 'dense':
      params = prune(run, state, examples, by, sparsity, leaves, settings)
    rows.append({'by': by, 'steps': steps} | measure(
        binary, run, settled(run, state, params, examples), settings,
        teacher=state.params))
    print(rows[-1], flush=True)
  write(rows, binary, run, settings)
  return rows


def check(settings: Settings) -> None:
  """Raises ValueError for what cannot work."""
  for by in settings.by:
    if by not in (*one_shot.RULES, *IN_TRAINING):
      raise ValueError(f'`by` (={by!r}) must be of '
                       f'{", ".join((*one_shot.RULES, *IN_TRAINING))}.')
  for sparsity in settings.sparsity:
    if not 0 < sparsity < 1:
      raise ValueError(f'`sparsity` (={sparsity!r}) must be in (0, 1).')
  sparsity_flags.check_patterns('dense_layers', settings.dense_layers)
  if settings.calibration_batches < 1 or settings.fine_tune_steps < 0:
    raise ValueError(
        f'`calibration_batches` (={settings.calibration_batches!r}) must be at '
        f'least 1 and `fine_tune_steps` (={settings.fine_tune_steps!r}) 0.')
  if not 0 < settings.fine_tune_learning_rate < math.inf:
    raise ValueError('`fine_tune_learning_rate` '
                     f'(={settings.fine_tune_learning_rate!r}) must be finite '
                     'and above 0.')
  if not 0 <= settings.distill <= 1:
    raise ValueError(f'`distill` (={settings.distill!r}) must be in [0, 1].')
  structure_of(settings)


def structure_of(settings: Settings):
  """What is kept together."""
  if settings.pattern is None:
    return sparse_jax.Unstructured()
  found = re.fullmatch(r'([1-9]\d*):([1-9]\d*)', settings.pattern)
  if found is None or int(found[1]) >= int(found[2]):
    raise ValueError(f'`pattern` (={settings.pattern!r}) must be as 2:4.')
  return sparse_jax.NM(*map(int, found.groups()))


def sparsities(settings: Settings) -> Sequence[float]:
  """Those asked for, or that of the pattern."""
  structure = structure_of(settings)
  return ([structure.sparsity] if settings.pattern is not None
          else settings.sparsity)


def loss(run: training.Run, weights, model_state, batch):
  """What is pruned: the loss of training, with the same dropout each time."""
  key = jax.random.key(run.values['seed'])
  return run.task.problem.loss(weights, model_state, batch, key)


def calibration(run: training.Run, state: tasks.TrainState, count: int
                ) -> list[tuple[Any, Any]]:
  """Model states and batches of training data that come after the run's."""
  following = jax.jit(lambda *args: loss(run, *args)[1][0])
  examples, model_state = [], state.model_state
  with contextlib.closing(run.train_batches(run.train_steps)) as batches:
    for _ in range(count):
      batch = devices.put_batch(next(batches), run.mesh)
      examples.append((model_state, batch))
      model_state = following(state.params, model_state, batch)
  return examples


def prune(run: training.Run, state: tasks.TrainState, examples, by: str,
          sparsity: float, leaves, settings: Settings) -> Any:
  """The parameters of a run, pruned, with a bar that says how far it is."""
  bar = []  # Made when it is known how many layers there are.

  def report(path, done, total):
    del path
    if not bar:
      bar.append(reporting.Progress(total, log_every=1))
    bar[0].update(done)

  try:
    return one_shot.one_shot(
        lambda *args: loss(run, *args)[0], state.params, examples,
        sparsity=sparsity, by=by, structure=structure_of(settings),
        is_sparse=lambda path, leaf: path in leaves, report=report)
  finally:
    for shown in bar:
      shown.close()


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


def settled(run: training.Run, state: tasks.TrainState, params, examples
            ) -> tasks.TrainState:
  """The state with other parameters, and the model state that they lead to."""
  following = jax.jit(lambda *args: loss(run, *args)[1][0])
  model_state = state.model_state
  for _, batch in examples:
    model_state = following(params, model_state, batch)
  return state._replace(params=params, model_state=model_state)


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
    row = {'sparsity': found.sparsity,
           'effective_sparsity': found.effective_sparsity}
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
  return reporting.markdown_table(
      [{name.replace('_', ' '): value for name, value in row.items()}
       for row in rows], formats={
           'sparsity': '.1%', 'effective sparsity': '.1%', 'pruned': '.4g',
           **({'fine tuned': '.4g'} if 'fine_tuned' in rows[0] else {})})


def write(rows, binary, run, settings) -> None:
  """Leaves the results in the run's folder, and prints the table."""
  path = os.path.join(run.workdir, 'one_shot')
  reporting.write_json(f'{path}.json', {
      'rows': rows, 'metric': binary.metric(run.values),
      'settings': settings._asdict()})
  files.write_text(f'{path}.md', table(rows))
  print(table(rows))


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The flags; not absl's, since those of the run's program come with it."""
  given = argparse.ArgumentParser(
      'experiments.prune', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  floats = lambda text: [float(part) for part in text.split(',')]
  words = lambda text: [part for part in text.split(',') if part]
  given.add_argument('--run', required=True, help='Folder of a finished run.')
  for name, (kind, text) in {
      'by': (words, 'Rules, separated by commas: '
             f'{", ".join((*one_shot.RULES, *IN_TRAINING))}.'),
      'sparsity': (floats, 'Sparsities, separated by commas.'),
      'pattern': (str, 'n:m, as 2:4: n of each m inputs.'),
      'dense_layers': (words, 'Leaves that are not pruned: regular '
                       'expressions, separated by commas.'),
      'calibration_batches': (int, 'Batches of training data to prune by.'),
      'fine_tune_steps': (int, 'How many.'),
      'fine_tune_learning_rate': (float, 'Constant.'),
      'distill': (float, 'Share of the loss of fine-tuning that is the '
                  'divergence from the outputs of the dense network.'),
      'rewind_to': (int, 'iterative: the step whose values rounds return to.')
  }.items():
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
