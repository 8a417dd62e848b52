"""Writes the weights of a finished run into one .npz file.

  python -m experiments.export runs/digits_mlp_top_kast_0.9 net.npz

The forms, of each weight that has a mask:

  sparse  `path:values`, those kept in order, `path:bits`, the mask eight
          entries a byte, and `path:shape`
  packed  `path:blocks`, `path:rows`, `path:columns`, `path:shape`: the kept
          blocks of a run with --structure=block, as in
          `sparse_jax.blocks.PackedBlocks`
  dense   `path`, with its zeros, as all other arrays are in every form

This is all that a program needs to read a sparse one back:

  import numpy as np
  file, weights = np.load('net.npz'), {}
  for name in file:
    path, _, part = name.partition(':')
    if part == 'values':
      shape = file[path + ':shape']
      mask = np.unpackbits(file[path + ':bits'], count=shape.prod())
      weights[path] = np.zeros(shape, file[name].dtype)
      weights[path][mask.reshape(shape) == 1] = file[name]
    elif not part:
      weights[path] = file[name]
"""

from collections.abc import Mapping
from typing import Any

from absl import app
from absl import flags
import jax
import numpy as np

import sparse_jax
from sparse_jax import trees
from experiments import files
from experiments import programs
from experiments import results
from experiments import training

FORMS = ('sparse', 'packed', 'dense')
_FORM = flags.DEFINE_enum('form', 'sparse', FORMS, 'How weights with a mask '
                          'are written.')


def arrays(weights: Any, masks: Mapping[str, np.ndarray], form: str,
           block: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
  """The arrays of a file, by name.

  Args:
    weights: the tree that the forward pass reads.
    masks: bool of a weight's shape by its path, of those that have one.
    form: one of FORMS.
    block: rows and columns of a block, for the packed form.

  Example:
    >>> weights = {'kernel': np.array([[0., 2.], [0., 3.]])}
    >>> arrays(weights, {'kernel': weights['kernel'] != 0}, 'sparse')
    {'kernel:values': array([2., 3.]), 'kernel:bits': array([80], dtype=uint8),
     'kernel:shape': array([2, 2])}
  """
  if form == 'packed' and block is None:
    raise ValueError(f'`form` (={form!r}) needs a run with --structure=block.')
  found = {}
  for path, weight in trees.leaves_by_path(weights).items():
    weight, mask = np.asarray(weight), masks.get(path)
    if mask is None or form == 'dense':
      found[path] = weight
    elif form == 'sparse':
      found |= {f'{path}:values': weight[mask],
                f'{path}:bits': np.packbits(mask),
                f'{path}:shape': np.array(weight.shape)}
    else:
      packed = sparse_jax.blocks.pack(weight, block=block, mask=mask, pad=True)
      found |= {f'{path}:blocks': np.asarray(packed.blocks),
                f'{path}:rows': np.asarray(packed.rows),
                f'{path}:columns': np.asarray(packed.columns),
                f'{path}:shape': np.array(weight.shape)}
  return found


def from_run(workdir: str, form: str) -> dict[str, np.ndarray]:
  """The arrays of a finished run; an error names what does not fit."""
  _, run = results.reopen(workdir)
  state = training.last_state(run)
  weights = sparse_jax.dense_weights(run.task.method, state.params,
                                     state.opt_state)
  masks = trees.leaves_by_path(
      sparse_jax.get_state(state.opt_state).forward_masks)
  block = (tuple(map(int, run.values['block_shape']))
           if run.values['structure'] == 'block' else None)
  return arrays(jax.device_get(weights), {
      path: np.asarray(mask) for path, mask in masks.items()
      if mask is not None and np.ndim(mask)}, form, block)


def main(argv):
  if len(argv) != 3:
    raise app.UsageError('give the folder of a run and the file to write')
  programs.begin(argv[:1])
  with programs.errors_in_a_line():
    found = from_run(argv[1], _FORM.value)
    with files.replacing(argv[2]) as file:
      np.savez(file, **found)
  print(f'{argv[2]}: {len(found)} arrays, '
        f'{sum(array.nbytes for array in found.values()):,} bytes')


if __name__ == '__main__':
  programs.run(main)
