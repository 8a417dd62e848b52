"""Our own studies: every method beside the others, on one small network.

Nothing here is printed in a paper, so the tables hold our numbers alone. A row
is a method and its flags; a comparison of your own is a few such lines. The
small scale is what experiments/README.md reports.
"""

from collections.abc import Mapping, Sequence

from launch.table import Figure, Point, Table

_SPARSITIES = (80, 90, 95, 98)
_ACCURACY = 'test accuracy (%)'
_DENSE = {'method': 'dense', 'sparsity': 0.}
_SMALL = 'small_dense'
# They end at a sparsity of their own, or at none: one run each, in these
# columns, with the sparsity beside the accuracy.
_OWN, _REACHED = 'own', 'sparsity'
_WITHOUT_TARGET = ('dense', 'ste', 'sr_ste', 'str', 'dst', 'cs')
# Widths at which the kernels have that share of the entries, by bisection.
NARROW = {
    ('mlp', 'fashion_mnist', 1.): {
        80: .21838, 90: .11163, 95: .055024, 98: .021668},
    ('strided_cnn', 'cifar10', .5): {
        80: .17957, 90: .10547, 95: .058595, 98: .027345},
    ('resnet20', 'cifar10', 1.): {
        80: .44531, 90: .32007, 95: .22644, 98: .1405}}
_TOP_KAST = {'method': 'top_kast', 'update_every': 5}
_POWERPROP = _TOP_KAST | {'powerprop_alpha': 2.}
_STEM = {'dense_layers': ['stem']}
_MEPROP = _DENSE | {'operands': ['output_gradient=0.9'],
                    'dense_layers': ['head']}  # As its authors have it.
_METHODS = {name: {'method': name} for name in (
    'static', 'snip', 'grasp', 'set', 'rigl', 'itop', 'snfs', 'dsr', 'gmp',
    'ac_dc', 'dnw')}
_LEARNED = {'ste': {'method': 'ste'}, 'sr_ste': {'method': 'sr_ste'},
            'str': {'method': 'str', 'initial_gate': -6.},
            'dst': {'method': 'dst', 'penalty_weight': 5e-4},
            'cs': {'method': 'cs'}}
_FASHION_ROWS = {
    'dense': _DENSE, _SMALL: _DENSE, **_METHODS,
    'swat': {'method': 'swat', 'learning_rate': .03},
    'top_kast': _TOP_KAST, 'powerprop': _POWERPROP, **_LEARNED}
_CIFAR_ROWS = {
    'dense': _DENSE, _SMALL: _DENSE, **_METHODS, 'top_kast': _TOP_KAST,
    'powerprop': _POWERPROP, 'swat': {'method': 'swat', **_STEM},
    'swat_erk': {'method': 'swat', 'allocation': 'erk'},
    'swat_m': {'method': 'swat', 'allocation': 'momentum'},
    'swat_channel': {'method': 'swat', 'structure': 'channel',
                     'update_every': 1, **_STEM},
    'meprop': _MEPROP | {'gradient_scope': 'example'},
    'meprop_unified': _MEPROP | {'gradient_scope': 'unified',
                                 'learning_rate': .02},
    **_LEARNED}


def _mutation(sparsity):
  """MEST's for 90 and 95% in its code: a fifth and a tenth of what is kept."""
  return [round((100 - sparsity) * share, 6) for share in (.002, .001, 0.)]


_NEXT_ROWS = {
    'dense': _DENSE, 'rigl': {'method': 'rigl'},
    'rigl_fan_in': {'method': 'rigl', 'structure': 'fan_in'},
    'srigl': {'method': 'srigl'},
    'srigl_no_ablation': {'method': 'srigl', 'gamma': 0.},
    'static': {'method': 'static'}, 'set': {'method': 'set'},
    'mest': {'method': 'mest', 'mutation': _mutation},
    'mest_soft': {'method': 'mest', 'variant': 'ems', 'mutation': _mutation},
    'gmp': {'method': 'gmp'}, 'granet': {'method': 'granet'},
    'spartan': {'method': 'spartan'}}
_REFRESHED = ('set', 'rigl', 'snfs', 'dsr', 'gmp')
_FASHION = {'dataset': 'fashion_mnist', 'model': 'mlp', 'augment': False,
            'weight_decay': 1e-4}
_EPOCHS = {'small': {'train_epochs': 15.}, 'paper': {'train_epochs': 100.}}
_CIFAR = {
    'small': {'dataset': 'cifar10', 'model': 'strided_cnn', 'width': .5,
              'augment': False, 'train_epochs': 2., 'weight_decay': 1e-4},
    'paper': {'dataset': 'cifar10', 'model': 'resnet20', 'width': 1.,
              'train_epochs': 200., 'weight_decay': 5e-4}}
# A weight that the forward pass reads sparse is dense in the backward pass.
OPERANDS = {
    'forward weights': ('forward_weight',),
    'forward activations': ('forward_activation',),
    'backward weights and activations': ('backward_weight',
                                         'backward_activation'),
    'output gradients': ('output_gradient',),
}


def fashion_mnist(scale: str) -> Table:
  """LeNet-300-100, 15 epochs; at the paper scale 100."""
  return compare('compare_fashion_mnist', 'LeNet-300-100 on Fashion-MNIST',
                 _FASHION | _EPOCHS[scale], _FASHION_ROWS)


def cifar10(scale: str) -> Table:
  """Three strided convolutions, 780 steps; at the paper scale ResNet-20."""
  rows = dict(_CIFAR_ROWS)
  if scale == 'small':
    rows |= {name: rows[name] | {'update_every': 20} for name in _REFRESHED}
  return compare('compare_cifar10', 'CIFAR-10', _CIFAR[scale], rows)


def field_next(scale: str) -> Table:
  """Constant fan-in and the later methods beside RigL, SET and pruning."""
  return compare('field_next', 'Later methods, LeNet-300-100 on Fashion-MNIST',
                 _FASHION | _EPOCHS[scale], _NEXT_ROWS, (90, 98),
                 effective=True)


def field_next_cifar10(scale: str) -> Table:
  """The same on CIFAR-10, on the network and with the refreshes of `cifar10`.
  """
  rows = dict(_NEXT_ROWS)
  if scale == 'small':
    rows |= {name: own | {'update_every': 20} for name, own in rows.items()
             if name not in ('dense', 'static', 'spartan')}
  return compare('field_next_cifar10', 'Later methods, CIFAR-10',
                 _CIFAR[scale], rows, (90, 98), effective=True)


def compare(name: str, title: str, base: Mapping, rows: Mapping[str, Mapping],
            sparsities: Sequence[int] = _SPARSITIES, seeds=(0, 1),
            effective: bool = False) -> Table:
  """Every row at every sparsity (percent), or once where there is no target.

  `base` are flags of all runs, `rows` has a row's own, its method among them; a
  function is one of the sparsity. `effective` shows what is zero or on no path.
  """
  points = []
  for row, own in rows.items():
    flags = {**base, **own}
    if row == _SMALL:
      narrow = NARROW[base['model'], base['dataset'], base.get('width', 1.)]
      points += [Point(row, f'{sparsity}%', None,
                       flags | {'width': narrow[sparsity]}, x=sparsity)
                 for sparsity in sparsities]
    elif own['method'] in _WITHOUT_TARGET:
      flags.setdefault('sparsity', 0.)
      points += [Point(row, _OWN, None, flags),
                 Point(row, _REACHED, None, flags, 'sparsity')]
    else:
      points += [Point(row, f'{sparsity}%', None, {
          name: value(sparsity) if callable(value) else value
          for name, value in flags.items()} | {'sparsity': sparsity / 100},
                       x=sparsity) for sparsity in sparsities]
  if effective:
    points += [point._replace(column=f'{point.column}, effective',
                              metric='effective_sparsity', x=None)
               for point in points if point.x is not None]
  return Table(name, title, tuple(points), seeds=tuple(seeds),
               figure=Figure('sparsity (% of the weights that are zero)',
                             _ACCURACY, 'sparsity', metric='accuracy'),
               also=(Figure('FLOPs of training (% of dense)', _ACCURACY,
                            'training_cost', logarithmic=True,
                            metric='accuracy', name='figure_flops'),))


def sensitivity_cifar10(scale: str) -> Table:
  return _sensitivity('sensitivity_cifar10', 'CIFAR-10', _CIFAR[scale],
                      (50, 70, 90))


def sensitivity_fashion_mnist(scale: str) -> Table:
  base = {'dataset': 'fashion_mnist', 'model': 'resnet20', 'augment': False}
  base |= {'small': {'width': .25, 'train_steps': 250},
           'paper': {'width': 1., 'train_epochs': 100.}}[scale]
  return _sensitivity('sensitivity_fashion_mnist', 'ResNet-20 on Fashion-MNIST',
                      base, (70, 90))


def _sensitivity(name, title, base, sparsities) -> Table:
  """A dense network whose products have one kind of sparse operand.

  The first layer is dense, as in SWAT-U; with sparse output gradients the last
  one too, as in meProp: of ten classes it would pass on the gradient of one.
  The published finding: sparse output gradients and forward activations hurt
  most, sparse weights and activations of the backward pass least.
  """
  points = [Point('dense', '0%', None, base | _DENSE, x=0.)]
  points += [
      Point(row, f'{sparsity}%', None, base | _DENSE | {
          'dense_layers': ['stem', 'head'] if 'output_gradient' in operands
                          else ['stem'],
          'operand_period': 10, 'operands': [
              f'{operand}={sparsity / 100:g}' for operand in operands]},
            x=sparsity)
      for row, operands in OPERANDS.items() for sparsity in sparsities]
  return Table(name, f'Sensitivity to sparse operands, {title}', tuple(points),
               figure=Figure('sparsity of the operand (%)', _ACCURACY))


def block_size(scale: str) -> Table:
  """The same methods with masks of single weights and of ever larger blocks."""
  base = _FASHION | _EPOCHS[scale] | {
      'width': 2.56, 'dense_layers': ['head'], 'sparsity': .9}
  points = []
  for row, own in (('top_kast', _TOP_KAST), ('rigl', _METHODS['rigl']),
                   ('static', _METHODS['static'])):
    for size in (1, 4, 16, 64, 128):
      block = {} if size == 1 else {'structure': 'block',
                                    'block_shape': [size, size]}
      points.append(Point(row, f'{size} x {size}', None, base | own | block,
                          x=size))
  return Table('block_size', 'Block size, 90%, 784-768-256-10 on Fashion-MNIST',
               tuple(points), seeds=(0, 1), figure=Figure(
                   'rows and columns of a block', _ACCURACY, logarithmic=True))


TABLES = {
    'compare_fashion_mnist': fashion_mnist, 'compare_cifar10': cifar10,
    'field_next': field_next, 'field_next_cifar10': field_next_cifar10,
    'sensitivity_cifar10': sensitivity_cifar10,
    'sensitivity_fashion_mnist': sensitivity_fashion_mnist,
    'block_size': block_size,
}
