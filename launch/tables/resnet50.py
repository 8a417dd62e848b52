"""ResNet-50 on ImageNet at high sparsity and in long runs, as published.

Numbers are those of the authors' READMEs: RigL's with ERK (its 100 times as
long run is quoted alone), AC/DC's, STR's, whose sparsity is what it reached and
whose weight decay is published for one of them, so that none has a run here.
"""

from launch.table import Figure, Point, Table
from launch.tables import recipes

_RIGL = {  # By multiple of 32,000 steps: sparsity in percent, accuracy.
    1: {80: 75.1, 90: 73.0, 95: 69.7, 96.5: 67.2},
    5: {80: 77.17, 90: 76.42, 95: 74.63, 96.5: 72.77, 99: 61.86},
    100: {99: 68.15}}
_AC_DC = {80: 76.45, 90: 75.03, 95: 73.14, 98: 68.48}
_STR = {81.27: 76.12, 90.23: 74.31, 95.15: 70.23, 98.05: 61.46}


def published(scale: str) -> Table:
  """RigL ERK at 1, 5 and 100 times the length, AC/DC, STR."""
  points = [
      _point(f'RigL ERK, {multiple}x', sparsity, accuracy,
             _rigl(scale, sparsity, multiple) if multiple < 100 else None)
      for multiple, row in _RIGL.items() for sparsity, accuracy in row.items()]
  points += [_point('AC/DC', sparsity, accuracy, _ac_dc(scale, sparsity))
             for sparsity, accuracy in _AC_DC.items()]
  points += [_point('STR', sparsity, accuracy, None)
             for sparsity, accuracy in _STR.items()]
  return Table('resnet50_published', 'ResNet-50: high sparsity and long runs',
               tuple(points), figure=Figure('sparsity (%)',
                                            'top-1 accuracy (%)', 'sparsity'))


def _point(row, sparsity, accuracy, flags):
  return Point(row, f'{sparsity}%', accuracy, flags, x=sparsity)


def _rigl(scale, sparsity, multiple):
  """ERK over all layers; at 99% the first one is dense."""
  dense = ('stem',) if sparsity == 99 else ()
  return recipes.as_rigl(scale, 'rigl', sparsity, multiple, dense,
                         allocation='erk')


def _ac_dc(scale, sparsity):
  """Its phases are shares of the run: the defaults of the binary."""
  base = recipes.top_kast_image('small') if scale == 'small' else {
      'dataset': 'imagenet2012', 'model': 'resnet50', 'batch_size': 256,
      'train_epochs': 100., 'learning_rate': .256, 'lr_schedule': 'cosine',
      'warmup_share': .05, 'optimizer': 'momentum', 'weight_decay': 3.05e-5,
      'eval_every': 5004, 'log_every': 100}
  return base | {'method': 'ac_dc', 'sparsity': sparsity / 100,
                 'scope': 'global'}


TABLES = {'resnet50_published': published}
