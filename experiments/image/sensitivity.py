"""Which operands of training may be sparse: SWAT's study, figures 1 and 2.

  python -m experiments.image.sensitivity --dataset=cifar10 --data_dir=DIR \
      --model=resnet20 --width=0.5 --train_epochs=3

A dense network, whose products have one kind of sparse operand at a time: the
weights or the activations of the forward pass, weights and activations of the
backward pass, or its output gradients. The first layer is dense, as in SWAT-U.
Takes the flags of experiments.image.train; leaves what
experiments.image.compare leaves.

What to expect, from the paper: sparse output gradients and sparse forward
activations hurt most, sparse weights and activations of the backward pass
least.
"""

import itertools

from absl import app
from absl import flags

from experiments import sparsity
from experiments.image import grid

# A weight that the forward pass reads sparse is dense in the backward pass.
OPERANDS = {
    'forward weights': ('forward_weight',),
    'forward activations': ('forward_activation',),
    'backward weights and activations': ('backward_weight',
                                         'backward_activation'),
    'output gradients': ('output_gradient',),
}
_KINDS = flags.DEFINE_multi_enum(
    'kinds', list(OPERANDS), list(OPERANDS), 'What is made sparse; repeat the '
    'flag for several.')
SPARSITIES = (.5, .6, .7, .8, .9)


def cells() -> list[grid.Cell]:
  """The dense run, then every kind at every sparsity, for each seed."""
  found = []
  layers = flags.FLAGS.dense_layers or ['stem']
  unused = {flag: flags.FLAGS[flag].default
            for flag in sparsity.OPERATOR_FLAGS}
  for seed in grid.seeds():
    found.append(grid.Cell('dense', 0., seed, unused | {
        'method': 'dense', 'sparsity': 0.}))
    for share, kind in itertools.product(
        grid.sparsities(SPARSITIES), _KINDS.value):
      found.append(grid.Cell(kind, share, seed, {
          'method': 'dense', 'sparsity': 0., 'dense_layers': layers,
          'operands': [f'{name}={share}' for name in OPERANDS[kind]]}))
  return found


def main(_):
  grid.main(cells, 'sensitivity', 'operands', dense_layers=[])


if __name__ == '__main__':
  app.run(main)
