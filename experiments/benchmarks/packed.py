"""What packed weights save in time and memory, beside what else there is.

  python -m experiments.benchmarks.packed --what=products
  python -m experiments.benchmarks.packed --what=sizes
  python -m experiments.benchmarks.packed --what=blocks
  python -m experiments.benchmarks.packed --what=convolutions
  python -m experiments.benchmarks.packed --what=transformer

One process, contenders in turn, medians; every figure is a ratio to the dense
product or step of XLA unless it says milliseconds. PyTorch's BSR takes part
where torch is installed. Recorded results: README.md beside this file.
"""

import functools

from absl import app
from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from experiments import accounting
from experiments import reporting
from experiments.benchmarks import timing

_WHAT = flags.DEFINE_enum(
    'what', 'products', ['products', 'sizes', 'blocks', 'convolutions',
                         'transformer'],
    'Which table: all ways to multiply; packed products by density and size; '
    'by block and sparsity; kernels of 3 x 3; a whole training step.')
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Timings of each contender.')
_SIZE = flags.DEFINE_integer('size', 2048, 'Inputs and outputs of a layer.')
_BATCH = flags.DEFINE_integer('batch', 512, 'Rows of the input.')
_BLOCK = flags.DEFINE_integer('block', 128, 'Rows and columns of a block.')
_SPARSITY = flags.DEFINE_float('sparsity', 0.9, 'Of the blocks.')


def problem(size: int, block: int, sparsity: float, balanced: bool = False):
  """An input, a cotangent, and a packed weight."""
  random = np.random.RandomState(0)
  draw = lambda *shape: random.randn(*shape).astype(np.float32)
  weight, structure = draw(size, size), sparse_jax.Block(
      (block, block), balanced=balanced)
  packed = sparse_jax.blocks.pack(
      weight, block=structure.shape, mask=np.asarray(sparse_jax.make_mask(
          abs(weight), sparsity, structure=structure)))
  x, dy = draw(_BATCH.value, size), draw(_BATCH.value, size)
  return jnp.asarray(x), jnp.asarray(dy), packed


def calls(product, x, dy, weight):
  """Two compiled calls: y, and y with the gradients to x and the weight."""
  return [functools.partial(jax.jit(fn).lower(x, weight, dy).compile(), x,
                            weight, dy)
          for fn in timing.forward_and_both(product)]


def ways(x, dy, packed) -> dict[str, tuple]:
  """Contenders as (forward, forward and both gradients)."""
  weight, mask, _ = sparse_jax.blocks.to_dense(packed)
  masked = lambda x, w: x @ sparse_jax.masked_weight(w, mask, mask)
  loop, batched = (functools.partial(sparse_jax.blocks.matmul,
                                     implementation=name)
                   for name in ('loop', 'batched'))
  return {
      'dense (XLA)': calls(jnp.matmul, x, dy, weight),
      'masked dense': calls(masked, x, dy, weight),
      'packed, loop': calls(loop, x, dy, packed),
      'packed, batched': calls(batched, x, dy, packed)}


def other_libraries(x, packed):
  """Forward passes of jax.experimental.sparse and of PyTorch."""
  turned = sparse_jax.blocks.to_bcsr(packed, transpose=True)
  bcoo = sparse_jax.blocks.to_bcoo(packed)
  by_bcsr = jax.jit(lambda x, m: (m @ x.T).T)
  by_bcoo = jax.jit(lambda x, m: x @ m)
  found = {'jax BCSR': lambda: by_bcsr(x, turned),
           'jax BCOO': lambda: by_bcoo(x, bcoo)}
  try:
    import torch
  except ImportError:
    return found
  dense = torch.tensor(np.asarray(sparse_jax.blocks.unpack(packed)).T.copy())
  bsr, rows = dense.to_sparse_bsr(packed.block[::-1]), torch.tensor(
      np.asarray(x).T.copy())
  return found | {'torch BSR': lambda: (bsr @ rows).numpy()}


def ratios(contenders: dict[str, tuple]) -> list[dict]:
  """A row for each contender: milliseconds, and times faster than dense."""
  forward, both = (
      timing.interleaved_medians(
          {name: calls[which] for name, calls in contenders.items()},
          rounds=_ROUNDS.value) for which in (0, 1))
  dense, dense_both = forward['dense (XLA)'], both['dense (XLA)']
  return [{'way': name, 'forward ms': f'{1e3 * forward[name]:.1f}',
           'forward': f'{dense / forward[name]:.2f}',
           'all three ms': f'{1e3 * both[name]:.1f}',
           'all three': f'{dense_both / both[name]:.2f}'}
          for name in contenders]


def products() -> list[dict]:
  """Ours interleaved; then the others, one by one, as they upset caches."""
  given = _SIZE.value, _BLOCK.value, _SPARSITY.value
  x, dy, packed = problem(*given)
  _, _, balanced = problem(*given, balanced=True)
  rows = ratios(ways(x, dy, packed) | {
      f'loop, balanced ({len(balanced.blocks)} blocks)': calls(
          sparse_jax.blocks.matmul, x, dy, balanced)})
  dense = float(rows[0]['forward ms'])
  for name, run in other_libraries(x, packed).items():
    spent = 1e3 * timing.interleaved_medians({name: run}, rounds=3)[name]
    rows.append({'way': name, 'forward ms': f'{spent:.1f}',
                 'forward': f'{dense / spent:.2f}'})
  return rows


def grid(cases) -> list[dict]:
  """The packed product, as a ratio to dense, for (size, block, sparsity)."""
  rows = []
  for size, block, sparsity in cases:
    x, dy, packed = problem(size, block, sparsity)
    contenders = ways(x, dy, packed)
    contenders.pop('masked dense')
    dense, *ours = ratios(contenders)
    for row in ours:
      rows.append({'size': size, 'block': block, 'sparsity': sparsity,
                   'blocks': packed.blocks.shape[0],
                   'dense ms': dense['forward ms'], **row})
  return rows


def sizes() -> list[dict]:
  """By density at one size, by size at one density; and straight lines."""
  size, block, sparsity = _SIZE.value, _BLOCK.value, _SPARSITY.value
  by_density = grid([(size, block, s) for s in (.6, .8, .9, .95)])
  by_size = grid([(n, block, sparsity) for n in (1024, 2048, 4096, 8192)])
  print(reporting.markdown_table(by_density + by_size))
  return [line(name, way, kind, rows)
          for name, rows in (('density', by_density), ('size', by_size))
          for way in dict.fromkeys(row['way'] for row in rows)
          for kind in ('forward', 'all three')]


def convolutions() -> list[dict]:
  """Kernels of 3 x 3, of (channels in and out, height and width, images)."""
  rows, random = [], np.random.RandomState(0)
  draw = lambda *shape: random.randn(*shape).astype(np.float32)
  dense = lambda x, kernel: jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  for channels, side, images in (128, 32, 8), (256, 16, 16), (512, 8, 16):
    kernel = draw(3, 3, channels, channels)
    x, dy = (jnp.asarray(draw(images, side, side, channels)) for _ in range(2))
    for block in 64, 128:
      packed = sparse_jax.blocks.pack(kernel, block=(block, block),
                                      sparsity=_SPARSITY.value)
      first, ours = ratios({
          'dense (XLA)': calls(dense, x, dy, sparse_jax.blocks.unpack(packed)),
          'packed': calls(sparse_jax.blocks.conv, x, dy, packed)})
      rows.append({'channels': channels, 'side': side, 'images': images,
                   'block': block, 'blocks': packed.blocks.shape[0],
                   'dense ms': first['forward ms'], **ours})
  return rows


def line(name: str, way: str, kind: str, rows: list[dict]) -> dict:
  """Milliseconds as a straight line of the number of blocks, by least squares.

  Every point counts by its relative error, so that small ones are heard too.
  """
  points = [(row['blocks'], float(row[f'{kind} ms'])) for row in rows
            if row['way'] == way]
  blocks, spent = np.array(points).T
  slope, start = np.polyfit(blocks, spent, 1, w=1 / spent)
  off = np.abs((start + slope * blocks) / spent - 1)
  return {'by': name, 'way': way, 'what': kind, 'ms a block': f'{slope:.3f}',
          'ms without blocks': f'{start:.2f}',
          'furthest from the line': f'{100 * off.max():.0f}%'}


class Transformer(nn.Module):

  @nn.compact
  def __call__(self, x):
    for _ in range(8):
      x, _ = timing.TransformerLayer()(x)
    return x


def transformer() -> list[dict]:
  """A step of Adam, 512 tokens: dense, packed static, packed Top-KAST.

  The last row keeps one block of each kernel: what no sparsity saves, as in
  Amdahl's law.
  """
  x = jnp.asarray(np.random.RandomState(0).randn(
      _BATCH.value // 64, 64, 512), jnp.float32)
  model, tx = Transformer(), optax.adam(1e-3)
  params = jax.jit(model.init)(jax.random.key(0), x)['params']
  block = dict(structure=sparse_jax.Block((_BLOCK.value, _BLOCK.value)))
  pack = sparse_jax.packed
  methods = {
      'dense': sparse_jax.dense(),
      'packed static': pack(sparse_jax.static(_SPARSITY.value, **block)),
      'packed rigl': pack(sparse_jax.rigl(
          _SPARSITY.value, update_every=10**6, **block)),
      'packed top_kast': pack(sparse_jax.top_kast(
          _SPARSITY.value, backward_sparsity=2 * _SPARSITY.value - 1,
          update_every=10**6, **block)),
      'one block a kernel': pack(sparse_jax.static(.999, **block))}

  runs, stored = {}, {}
  for name, method in methods.items():
    runs[name], (state,), _ = timing.trainer(
        lambda weights: jnp.mean(model.apply({'params': weights}, x)**2),
        method, tx, params)
    held = accounting.held(params, *state, tx)
    stored[name] = 2 * held['params_bytes'] + held['slots_bytes']
  times = timing.interleaved_medians(runs, rounds=_ROUNDS.value)
  bytes_ = 'bytes of weights, gradients, slots'
  return [{'step': name, 'milliseconds': f'{1e3 * times[name]:.1f}',
           'times faster': f'{times["dense"] / times[name]:.2f}',
           bytes_: f'{stored[name] / stored["dense"]:.3f}'} for name in runs]


def main(_):
  timing.keep_freed_memory()
  tables = {
      'products': products,
      'sizes': sizes,
      'blocks': lambda: grid([(_SIZE.value, b, s) for b in (256, 128, 64, 32,
                                                            16)
                              for s in (.5, .8, .9)]),
      'convolutions': convolutions, 'transformer': transformer}
  print(reporting.markdown_table(tables[_WHAT.value]()))


if __name__ == '__main__':
  app.run(main)
