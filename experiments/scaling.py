"""The scaling law of sparse networks, fitted to a table of runs and drawn.

  python -m experiments.scaling --runs=runs/FOLDER

reads the result.json of every run below a folder, or a CSV file with the
columns sparsity, nonzeros, data, loss, and fits

  L = (a (1 - S)^b + c) N^-d + e D^-f + g

with S the sparsity of the sparse weights, N the weights that are not zero and D
the examples (or tokens) seen: Huber's loss of the logarithms, the best of
--starts random ones. Leaves runs.csv, table.md and fit.png in --workdir.

Reference: Frantar et al., Scaling laws for sparsely-connected foundation
models, 2023, https://arxiv.org/abs/2309.08520, equation 1 and section 3.1.
"""

from collections.abc import Sequence
import csv
import glob
import os
from typing import NamedTuple

from absl import flags
import numpy as np

from experiments import files
from experiments import plots
from experiments import programs
from experiments import reporting
from experiments import results

_RUNS = flags.DEFINE_string('runs', None, 'A CSV file, or a folder of runs.',
                            required=True)
_STARTS = flags.DEFINE_integer('starts', 25, 'Random starts of the fit.',
                               lower_bound=1)
_WORKDIR = flags.DEFINE_string('workdir', 'runs/scaling', 'Where the tables '
                               'and the picture go.')
COLUMNS = ('sparsity', 'nonzeros', 'data', 'loss')
# Of the logarithms of a, c, e, g about the mean run, and of the powers b, d, f.
_BOUNDS = [-30.] * 4 + [1e-3] * 3, [10.] * 4 + [3.] * 3


class Law(NamedTuple):
  """The constants, all at least 0."""

  a: float
  b: float
  c: float
  d: float
  e: float
  f: float
  g: float

  def __call__(self, sparsity, nonzeros, data) -> np.ndarray:
    """The loss; of numbers or arrays."""
    of_size = self.a * (1 - np.asarray(sparsity))**self.b + self.c
    return (of_size * np.asarray(nonzeros, float)**-self.d
            + self.e * np.asarray(data, float)**-self.f + self.g)


def fit(sparsity: Sequence[float], nonzeros: Sequence[float],
        data: Sequence[float], loss: Sequence[float], *, starts: int = 25,
        delta: float = 1e-3, seed: int = 0) -> tuple[Law, float]:
  """The law of least error, and the mean of Huber's loss.

  `nonzeros`, `data` and `loss` are above 0, of at least as many runs as there
  are constants (else a ValueError). Of `starts` random starts the best end
  counts; residuals of the logarithm above `delta` count linearly.
  """
  from scipy import optimize
  runs = np.stack([np.asarray(column, float) for column in (
      sparsity, nonzeros, data, loss)])
  if runs.shape[1] < len(Law._fields):
    raise ValueError(f'`runs` (={runs.shape[1]}) must be at least as many as '
                     f'the constants, {len(Law._fields)}.')
  if not np.all(np.isfinite(runs)) or np.any(runs[1:] <= 0) or np.any(
      (runs[0] < 0) | (runs[0] >= 1)):
    raise ValueError('`runs` must have sparsities in [0, 1) and numbers above '
                     '0.')
  logs = np.log(np.stack([1 - runs[0], *runs[1:]]))
  centre = np.array([0., *logs[1:].mean(1)])
  density, size, amount, target = logs - centre[:, None]

  def residuals(values):
    a, c, e, g, b, d, f = values
    return np.logaddexp.reduce(np.broadcast_arrays(
        a + b * density - d * size, c - d * size, e - f * amount, g)) - target

  rng, best = np.random.default_rng(seed), None
  for _ in range(starts):
    end = np.concatenate([rng.normal(-1., 1.5, 4), rng.uniform(.05, 1., 3)])
    for wide in (1., delta):  # The first sees far.
      found = optimize.least_squares(residuals, end, bounds=_BOUNDS,
                                     loss='huber', f_scale=wide)
      end = found.x
    if best is None or found.cost < best.cost:
      best = found
  (a, c, e, g), (b, d, f) = best.x[:4], best.x[4:]
  _, nonzero, seen, level = centre
  a, c, e, g = np.exp([a + level + d * nonzero, c + level + d * nonzero,
                       e + level + f * seen, g + level])
  return Law(*map(float, (a, b, c, d, e, f, g))), float(best.cost / target.size)


def read(path: str) -> list[dict[str, float]]:
  """Rows with COLUMNS, of a CSV file or of every run below a folder."""
  if os.path.isdir(path):
    names = sorted(glob.glob(os.path.join(path, '**', results.NAME),
                             recursive=True))
    rows = [_of_run(results.read(os.path.dirname(name))) for name in names]
  else:
    with files.naming(path), open(path, newline='', encoding='utf8') as file:
      rows = list(csv.DictReader(file))
  if not rows:
    raise ValueError(f'`runs` (={path!r}) has no runs.')
  for row in rows:
    lacking = [name for name in COLUMNS if row.get(name) in (None, '')]
    if lacking:
      raise ValueError(f'{path} has a run without {", ".join(lacking)}.')
  return [{name: float(row[name]) for name in COLUMNS} for row in rows]


def _of_run(result) -> dict[str, float]:
  """A finished run: nonzeros and sparsity of its sparse leaves and others."""
  *layers, _ = result['layers']
  kept = sum(row['entries'] * (row['forward_density'] if row['sparse'] else 1.)
             for row in layers)
  seen = result['steps'] * result['flags']['batch_size'] * (
      result['flags'].get('segment_length') or 1)
  return {'sparsity': result['sparsity'], 'nonzeros': kept, 'data': seen,
          'loss': result['test_loss']}


def write(rows: Sequence[dict[str, float]], law: Law, error: float,
          workdir: str) -> str:
  """The tables and the picture; returns the table of constants."""
  table = reporting.markdown_table(
      [law._asdict() | {'huber': error, 'runs': len(rows)}],
      formats={name: '.4g' for name in (*Law._fields, 'huber')})
  shown = [row | {'fit': float(law(row['sparsity'], row['nonzeros'],
                                   row['data']))}
           for row in sorted(rows, key=lambda row: tuple(row.values()))]
  reporting.write_csv(os.path.join(workdir, 'runs.csv'), shown)
  files.write_text(os.path.join(workdir, 'table.md'), table)
  plots.lines(
      [{'row': f'{row["sparsity"]:.1%}', 'x': row['fit'], 'ours': row['loss']}
       for row in shown] + [
           {'row': 'the law', 'x': end, 'ours': end} for end in (
               min(row['fit'] for row in shown),
               max(row['fit'] for row in shown))],
      os.path.join(workdir, 'fit.png'), 'Loss of each run, and by the law',
      xlabel='loss by the law', ylabel='measured loss', published=False)
  return table


def main(argv):
  programs.begin(argv)
  with programs.errors_in_a_line():
    rows = read(_RUNS.value)
    law, error = fit(*([row[name] for row in rows] for name in COLUMNS),
                     starts=_STARTS.value)
  print(write(rows, law, error, _WORKDIR.value), end='')


if __name__ == '__main__':
  programs.run(main)
