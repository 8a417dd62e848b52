"""How the papers train, as flags, and the short runs that stand in for it.

At --scale=small the data are embedded or small enough for a laptop, and a run
takes from seconds to minutes on two cores: it shows that every cell trains and
in what order the methods come out, and its numbers are not the papers'.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Flags = dict[str, Any]

# Top-KAST, appendix B; RigL's code for what it leaves open: Nesterov momentum
# of 0.9, label smoothing of 0.1.
TOP_KAST_STEPS = {'paper': 32_000, 'small': 1_500}
_IMAGENET_IMAGES = 1_281_167
_EPOCH = _IMAGENET_IMAGES / 4096 / TOP_KAST_STEPS['paper']  # Share of the run.
_LARGE_BATCHES = {
    'optimizer': 'nesterov', 'lr_schedule': 'step',
    'warmup_share': round(5 * _EPOCH, 6),
    'lr_drops': [round(epoch * _EPOCH, 6) for epoch in (30, 70, 90)],
    'weight_decay': 1e-4}
_TOP_KAST_IMAGE = {
    'paper': {'dataset': 'imagenet2012', 'model': 'resnet50',
              'batch_size': 4096, 'learning_rate': 1.6, 'label_smoothing': .1,
              'eval_every': 2_500, 'log_every': 100, **_LARGE_BATCHES},
    'small': {'dataset': 'fashion_mnist', 'model': 'mlp', 'augment': False,
              'batch_size': 128, 'learning_rate': .1, 'eval_every': 500,
              **_LARGE_BATCHES},
}

# SWAT's code, by network: epochs, the drops as shares of them, their factor.
_CIFAR = {'epochs': 150, 'lr_drops': [.333333, .666667], 'lr_factor': .1}
_WIDE = {'epochs': 200, 'lr_drops': [.3, .6, .8], 'lr_factor': .2}
_NETWORKS = {
    'VGG-16': ({'model': 'vgg16'}, _CIFAR, {'model': 'small_cnn'}),
    'WRN-16-8': ({'model': 'wrn_16_8', 'dropout': .3}, _WIDE,
                 {'model': 'resnet20', 'width': .25}),
    'DenseNet-121': ({'model': 'densenet121'}, _CIFAR,
                     {'model': 'small_cnn', 'width': .5}),
    'ResNet-18': ({'model': 'resnet18'}, _CIFAR,
                  {'model': 'resnet20', 'width': .5}),
}
SWAT_STEPS = {'paper': 150 * (50_000 // 128), 'small': 300}
_SWAT_SMALL = {'dataset': 'digits', 'augment': False, 'batch_size': 128,
               'train_steps': SWAT_STEPS['small'], 'learning_rate': .03,
               'optimizer': 'momentum', 'weight_decay': 5e-4,
               'eval_every': 100}

# Neither batch nor length is in the Top-KAST paper: those of Transformer-XL's
# own large enwik8 run. The dropout is the middle of the paper's range.
LANGUAGE_STEPS = {'paper': 400_000, 'small': 600}
_ADAM = {'optimizer': 'adam', 'lr_schedule': 'cosine', 'weight_decay': 0.,
         'clip_norm': .25}
_LANGUAGE = {'batch_size': 64, 'train_steps': LANGUAGE_STEPS['paper'],
             'learning_rate': 2e-4, 'warmup_share': .01, 'dropout': .1,
             'eval_every': 20_000, 'log_every': 100, **_ADAM}
_ENWIK8 = {'dataset': 'enwik8', 'level': 'byte', 'segment_length': 768,
           'memory_length': 2304, 'eval_memory_length': 5000, **_LANGUAGE}
_WIKITEXT103 = {'dataset': 'wikitext103', 'level': 'word',
                'segment_length': 512, 'memory_length': 768,
                'eval_memory_length': 2000, **_LANGUAGE}
_LANGUAGE_SMALL = {'dataset': 'stdlib', 'level': 'byte', 'model': 'tiny',
                   'batch_size': 16, 'train_steps': LANGUAGE_STEPS['small'],
                   'learning_rate': 1e-3, 'warmup_share': .05,
                   'eval_every': 200, **_ADAM}


def top_kast_image(scale: str, multiple: int = 1) -> Flags:
  """ResNet-50 on ImageNet, the schedule stretched; small: LeNet-300-100."""
  return _TOP_KAST_IMAGE[scale] | {
      'train_steps': multiple * TOP_KAST_STEPS[scale]}


def dense_layers(scale: str, layers: Sequence[str]) -> Flags:
  """Layers that stay dense; small: none, whose first layer is nearly all."""
  return {'dense_layers': [*layers]} if scale == 'paper' and layers else {}


def as_rigl(scale: str, method: str, sparsity: float, multiple: int = 1,
            dense: Sequence[str] = ('stem',), **flags) -> Flags:
  """A method as RigL's paper runs it, whose first layer alone is dense.

  `sparsity` is in percent; `multiple` makes a longer run, and stretches the
  windows of refreshes.
  """
  every = lambda step: scaled(step, scale, TOP_KAST_STEPS)
  at = lambda step: multiple * every(step)
  windows = {'rigl': {'update_every': every(100), 'update_end': at(25_000)},
             'gmp': {'update_every': every(1_000), 'update_begin': at(10_000),
                     'update_end': at(25_000)}}
  windows['set'] = windows['rigl']
  if method == 'rigl':
    flags['skip_step'] = True
  return top_kast_image(scale, multiple) | {
      'method': method, 'sparsity': sparsity / 100, **windows.get(method, {}),
      **dense_layers(scale, dense if method != 'dense' else ()), **flags}


def enwik8(scale: str, model: str = 'enwik8_large') -> Flags:
  """Transformer-XL on bytes; small: a tiny one on Python's library."""
  if scale == 'small':
    return dict(_LANGUAGE_SMALL)
  return _ENWIK8 | {'model': model}


def wikitext103(scale: str, width: float = 1.) -> Flags:
  """Transformer-XL on words; small: as `enwik8`."""
  sized = {} if width == 1 else {'width': width}
  if scale == 'small':
    return _LANGUAGE_SMALL | sized
  return _WIKITEXT103 | {'model': 'wikitext103'} | sized


def cifar(scale: str, network: str, dataset: str = 'cifar10') -> Flags:
  """SWAT's CIFAR recipe; small: a small network on digits."""
  own, schedule, small = _NETWORKS[network]
  if scale == 'small':
    return _SWAT_SMALL | small
  return {'dataset': dataset, 'batch_size': 128,
          'train_epochs': float(schedule['epochs']), 'learning_rate': .1,
          'lr_schedule': 'step', 'warmup_share': 0.,
          'lr_drops': schedule['lr_drops'], 'lr_factor': schedule['lr_factor'],
          'optimizer': 'momentum', 'weight_decay': 5e-4,
          'eval_every': 390, **own}


def swat_imagenet(scale: str) -> Flags:
  """SWAT's ImageNet recipe; small: the small stand-in of ResNet-18."""
  if scale == 'small':
    return cifar(scale, 'ResNet-18')
  return {'dataset': 'imagenet2012', 'model': 'resnet50', 'batch_size': 256,
          'train_epochs': 90., 'learning_rate': .1, 'lr_schedule': 'step',
          'warmup_share': .055556, 'lr_drops': [.333333, .666667, .888889],
          'optimizer': 'nesterov', 'weight_decay': 1e-4,
          'label_smoothing': .1, 'eval_every': 5004, 'log_every': 100}


def scaled(step: int, scale: str, steps: Mapping[str, int]) -> int:
  """A step of the published schedule in a run of this scale, at least 1."""
  return max(round(step * steps[scale] / steps['paper']), 1)
