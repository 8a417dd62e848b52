"""Every method beside the others on one language model.

Top-KAST's table 5 has itself and pruning; here its other baselines stand
beside them on the same network, text and schedule.
"""

from launch.table import Point, Table
from launch.tables import recipes

_BINARY = 'experiments.language.train'
# Widths at which the matrices have 20% and 10% of the entries, by bisection.
_NARROW = {'paper': {80: .4529, 90: .3279}, 'small': {80: .40625, 90: .28125}}
# Bits per character in Top-KAST's table 5, by row and sparsity.
_PUBLISHED = {
    ('dense', 0): 1.00, ('pruning', 80): 1.02, ('pruning', 90): 1.06,
    ('Top-KAST, backward 0%', 80): 1.03, ('Top-KAST, backward 60%', 80): 1.05,
    ('Top-KAST, backward 0%', 90): 1.08, ('Top-KAST, backward 80%', 90): 1.10,
    ('Top-KAST, backward 90%', 95): 1.17}
# How RigL's paper trains its language model: a tenth replaced, to the end.
# Intervals as in its runs; at the small scale a 30th of the run.
_REWIRED = {'drop_fraction': .1, 'update_end': -1}
_INTERVAL = {'paper': 100, 'small': 20}
_BACKWARD = {80: (0, 60, 80), 90: (0, 60, 80), 95: (90,)}


def methods(scale: str) -> Table:
  """Top-KAST by backward sparsity, pruning, RigL, SET, static, small-dense."""
  base = recipes.enwik8(scale, 'enwik8_small')
  dense = {'method': 'dense', 'sparsity': 0.}
  points = [_point('dense', 0, base | dense)]
  for sparsity in (80, 90):
    points.append(_point('small and dense', sparsity, base | dense | {
        'width': _NARROW[scale][sparsity]}))
    rewired = _REWIRED | {'update_every': _INTERVAL[scale]}
    points += [_point(row, sparsity, base | flags | {
        'sparsity': sparsity / 100}) for row, flags in (
            ('static', {'method': 'static'}), ('pruning', {'method': 'gmp'}),
            ('SET', {'method': 'set'} | rewired),
            ('RigL', {'method': 'rigl'} | rewired))]
  points += [_point(f'Top-KAST, backward {backward}%', sparsity, base | {
      'method': 'top_kast', 'sparsity': sparsity / 100,
      'backward_sparsity': backward / 100, 'update_every': 1})
             for sparsity, chosen in _BACKWARD.items() for backward in chosen]
  return Table('language_methods', 'Transformer-XL on bytes, every method',
               tuple(points), _BINARY)


def weight_sparse(scale: str) -> Table:
  """Hard thresholding after each step, with and without AbsTopK."""
  base = recipes.enwik8(scale, 'enwik8_small')
  points = []
  for name, own in (('', {}), (', AbsTopK', {'abs_top_k': .75})):
    points.append(_point(f'all weights{name}', 0, base | own | {
        'method': 'dense', 'sparsity': 0.}))
    points += [_point(f'weight-sparse{name}', sparsity, base | own | {
        'method': 'iht', 'sparsity': sparsity / 100})
               for sparsity in (80, 90, 95, 98)]
  return Table('weight_sparse', 'Weight-sparse Transformer-XL on bytes',
               tuple(points), _BINARY)


def _point(row, sparsity, flags):
  return Point(row, f'{sparsity}%', _PUBLISHED.get((row, sparsity)), flags,
               'bits_per_character')


TABLES = {'language_methods': methods, 'weight_sparse': weight_sparse}
