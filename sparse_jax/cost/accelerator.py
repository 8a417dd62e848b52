"""How many cycles a spatial array that skips zeros would take.

Each multiplier array (a tile) has rows and columns of units; a unit has lanes
that multiply and add in one cycle. A row holds a vector of the operand whose
zeros are skipped, a column one of the other operand, and the units sum over
what the two share, one step of `lanes` entries after another. The rows of a
tile wait for each other, since a column's entries go to all of them; tiles
work in rounds, one group of rows each.

Cycles come from a simulation of the real zeros, not from how many they are.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

from sparse_jax import checks
from sparse_jax.jaxprs import products as products_lib

Product = products_lib.Product


class Machine(NamedTuple):
  """A spatial array that skips the zeros of one operand.

  A lane that would meet a zero takes what is not yet done elsewhere: its own
  entry of a later step, at most `lookahead` steps away; or one of the
  `lookaside` entries of later steps in other lanes, one step ahead and one
  lane to the left, then to the right, two ahead and two lanes away, and so on,
  beginning again at one step ahead where `lookahead` is reached. The nearest
  step comes first. So an array is never more than lookahead + 1 times as fast
  as without skipping. `checked()` raises ValueError naming a bad field.

  Example:
    >>> Machine(lookahead=1)._replace(tiles=4).checked()[:6]
    (16, 16, 16, 4, 1, 5)
  """

  lanes: int = 16  # Multipliers of a unit, which work in one cycle.
  rows: int = 16  # Of units in a tile; a row has one vector of zeros to skip.
  columns: int = 16  # Of units in a tile.
  tiles: int = 16
  lookahead: int = 2  # Steps; 0: nothing is skipped.
  lookaside: int = 5  # Entries of other lanes, below `lanes`.
  # Steps that the on-chip buffer delivers in a cycle; None: all that is asked.
  buffer_steps: int | None = None
  value_bytes: int = 2  # Of an entry in memory.
  sparse_buffer: int = 2 ** 30  # Bytes on the chip for the skipped operand.
  dense_buffer: int = 2 ** 30  # And for the other.
  dram_bytes: float = 25.6  # In a cycle: DDR4-3200 at 1 GHz.

  def checked(self) -> 'Machine':
    """Returns itself, or raises ValueError naming the bad field."""
    for name in ('lanes', 'rows', 'columns', 'tiles', 'value_bytes'):
      checks.check_count(name, getattr(self, name), least=1)
    for name in ('lookahead', 'lookaside', 'sparse_buffer', 'dense_buffer'):
      checks.check_count(name, getattr(self, name))
    if self.buffer_steps is not None:
      checks.check_count('buffer_steps', self.buffer_steps, least=1)
    if not self.dram_bytes > 0:
      raise ValueError(f'`dram_bytes` (={self.dram_bytes!r}) must be positive.')
    if self.lookaside and not self.lookahead:
      raise ValueError(f'`lookaside` (={self.lookaside}) needs a `lookahead` '
                       f'(={self.lookahead}) of at least 1.')
    if self.lookaside >= self.lanes:
      raise ValueError(f'`lookaside` (={self.lookaside}) must be below `lanes` '
                       f'(={self.lanes}).')
    return self


class Cycles(NamedTuple):
  """Cycles of one pass, without skipping (dense) and with (sparse)."""

  dense: int
  sparse: int
  dense_stalls: int  # Cycles that wait for memory, beside those above.
  sparse_stalls: int

  @property
  def speedup(self) -> float:
    """Of the arithmetic alone."""
    return self.dense / max(self.sparse, 1)

  @property
  def speedup_with_stalls(self) -> float:
    return (self.dense + self.dense_stalls) / max(
        self.sparse + self.sparse_stalls, 1)

  def __add__(self, other):
    return Cycles(*(a + b for a, b in zip(self, other, strict=True)))


class LayerCycles(NamedTuple):
  """Cycles of the three passes of one layer."""

  forward: Cycles
  input_gradient: Cycles
  weight_gradient: Cycles

  @property
  def backward(self) -> Cycles:
    return self.input_gradient + self.weight_gradient


def schedule(nonzero: np.ndarray, *, lookahead: int, lookaside: int,
             buffer_steps: int | None = None) -> np.ndarray:
  """Cycles that groups of rows take to do all their non-zeros.

  In a cycle every lane of a row does one entry, as told in `Machine`; lanes
  without one of their own choose in order. Then the group goes on past the
  steps that all its rows have done.

  Law: the cycles of a group are at most its steps, and at least those divided
  by lookahead + 1.

  Args:
    nonzero: bool[groups, rows, steps, lanes], entries that are not 0.
    lookahead, lookaside: how far a lane reaches, in steps and in lanes.
    buffer_steps: the most steps that a group goes on in a cycle, or None.

  Returns:
    int[groups].

  Example:
    >>> row = np.array([[1, 0], [0, 0], [1, 1]], bool)
    >>> schedule(row[None, None], lookahead=1, lookaside=0)
    array([2])

  Reference:
    Delmas Lascorz et al., Bit-Tactical, 2018,
    https://arxiv.org/abs/1803.03688: lookahead and lookaside. Mahmoud et al.,
    TensorDash, 2020, https://arxiv.org/abs/2009.00748: the same in training,
    with two steps ahead and five aside. In which order lanes choose is settled
    here.
  """
  _, _, steps, lanes = nonzero.shape
  reach = lookahead + 1
  pending = _packed(np.pad(nonzero, ((0, 0), (0, 0), (0, reach), (0, 0))))
  place, cycles = np.zeros((2, len(nonzero)), int)
  furthest = reach if buffer_steps is None else min(reach, buffer_steps)
  picks = list(_picks(lanes, lookahead, lookaside))
  while (active := np.flatnonzero(place < steps)).size:
    where = active[:, None], place[active, None] + np.arange(reach)
    window = np.moveaxis(pending[where], 0, -1).copy()
    _do_one_cycle(window, picks)
    pending[where] = np.moveaxis(window, -1, 0)
    done = ~window.any(axis=(1, 2))
    clear = np.where(done.all(axis=0), reach, np.argmin(done, axis=0))
    place[active] += np.minimum(clear, furthest)
    cycles[active] += 1
  return cycles


def _packed(nonzero):
  """uint64[groups, steps, lanes, words]: the rows as bits."""
  rows = nonzero.shape[1]
  filled = np.pad(nonzero, ((0, 0), (0, -rows % 64), (0, 0), (0, 0)))
  by_word = np.moveaxis(filled, 1, -1).reshape(
      *filled.shape[:1], *filled.shape[2:], -1, 64)
  return np.packbits(by_word, axis=-1).view(np.uint64)[..., 0]


def _picks(lanes, lookahead, lookaside) -> list[tuple[int, int, int]]:
  """(lane, step, lane it takes from) in the order of choice."""
  own = [(step, 0) for step in range(1, lookahead + 1)]
  aside = [(i // 2 % lookahead + 1, (i // 2 + 1) * (1 if i % 2 else -1))
           for i in range(lookaside)]
  reached = sorted(own + aside, key=lambda pick: (pick[0], abs(pick[1])))
  return [(lane, step, (lane + offset) % lanes) for lane in range(lanes)
          for step, offset in reached]


def _do_one_cycle(window, picks):
  """Clears what one cycle does; window is uint64[reach, lanes, words, ...]."""
  free = ~window[0]
  window[0] = 0
  for lane, step, source in picks:
    taken = free[lane] & window[step, source]
    window[step, source] ^= taken
    free[lane] ^= taken


def pass_cycles(nonzero: np.ndarray, vectors: int, machine: Machine, *,
                traffic: Sequence[int] = (0, 0, 0)) -> Cycles:
  """Cycles of all the sums between two operands.

  Each group of rows runs once for every `columns` of the other operand's
  vectors. Memory works beside the arithmetic; what it takes longer is stalls.
  An operand that does not fit its buffer is read anew each time it is used.

  Args:
    nonzero: bool[vectors, parts, entries] of the operand whose zeros are
      skipped; each part starts a new step.
    vectors: number of vectors of the other operand.
    machine: the array.
    traffic: entries of the skipped operand, of the other, and of the result,
      as they lie in memory. The skipped one is read as its non-zeros and a bit
      for each entry, if that is less than all entries.

  Returns:
    Cycles.

  Raises:
    ValueError: naming a field of the machine.

  Example:
    >>> machine = Machine(lanes=2, rows=1, columns=1, tiles=1, lookahead=1,
    ...                   lookaside=0)
    >>> pass_cycles(np.array([[[1, 0, 0, 0]]], bool), 3, machine)
    Cycles(dense=6, sparse=3, dense_stalls=0, sparse_stalls=0)
  """
  machine = machine.checked()
  groups = _grouped(nonzero, machine)
  taken = schedule(groups, lookahead=machine.lookahead,
                   lookaside=machine.lookaside,
                   buffer_steps=machine.buffer_steps)
  repeats = -(-vectors // machine.columns)
  rounds = -(-len(taken) // machine.tiles)
  slowest = np.pad(taken, (0, rounds * machine.tiles - len(taken))).reshape(
      rounds, machine.tiles).max(axis=1, initial=0)
  dense, sparse = (repeats * rounds * groups.shape[2],
                   repeats * int(slowest.sum()))
  density = nonzero.mean() if nonzero.size else 0.
  packed = min(density + 1 / (8 * machine.value_bytes), 1.)
  stalls = [max(0, _memory_cycles(share, traffic, rounds, repeats, machine)
                - busy) for share, busy in ((1., dense), (packed, sparse))]
  return Cycles(dense, sparse, *stalls)


def _grouped(nonzero, machine):
  """bool[groups, rows, steps, lanes], filled up with zeros."""
  vectors, parts, entries = nonzero.shape
  steps = -(-entries // machine.lanes)
  groups = -(-vectors // machine.rows)
  filled = np.pad(nonzero, ((0, groups * machine.rows - vectors), (0, 0),
                            (0, steps * machine.lanes - entries)))
  return filled.reshape(groups, machine.rows, parts * steps, machine.lanes)


def _memory_cycles(share, traffic, rounds, repeats, machine):
  """Cycles that the memory needs for both operands and the result."""
  skipped, other, result = traffic
  stored = skipped * share * machine.value_bytes
  if rounds and stored / rounds > machine.sparse_buffer:
    stored *= repeats
  other *= machine.value_bytes
  if other > machine.dense_buffer:
    other *= rounds
  total = stored + other + result * machine.value_bytes
  return math.ceil(total / machine.dram_bytes)


def layer_cycles(product: Product, lhs: np.ndarray, rhs: np.ndarray, *,
                 machine: Machine = Machine(),
                 saved: np.ndarray | None = None) -> LayerCycles:
  """Cycles of the forward and backward passes of one layer.

  The forward pass and the gradient to the input skip the zeros of the weight;
  the gradient to the weight skips those of the input, as SWAT saves it. A
  gradient to the input of a layer with strides is one product for each of the
  stride's phases, with the taps that belong to it.

  Args:
    product: from `find_products`, with its operands, in which zeros count.
    lhs, rhs: the operands' values.
    machine: the array.
    saved: the input as the backward pass has it; None: as the forward pass.

  Returns:
    LayerCycles, of one execution.

  Raises:
    ValueError: for a product without a weight, or with `lhs_dilation` or
      `batch_group_count`.

  Example:
    >>> weight, x = np.eye(32), np.ones((4, 32))
    >>> product, = products_lib.find_products(lambda w, x: x @ w, weight, x)
    >>> layer_cycles(product, x, weight).forward
    Cycles(dense=2, sparse=1, dense_stalls=98, sparse_stalls=27)

  Reference:
    Raihan and Aamodt, SWAT, 2020, https://arxiv.org/abs/2001.01969. Their
    simulator, DNNsim, has a memory like DaDianNao's (Chen et al., 2014).
  """
  if product.weight is None:
    raise ValueError(f'`product` (={product.primitive} of {product.lhs.shape} '
                     f'and {product.rhs.shape}) has no weight.')
  weight, x = (rhs, lhs) if product.weight == 'rhs' else (lhs, rhs)
  saved = x if saved is None else saved
  layer = (_dot_layer if product.primitive == products_lib.DOT
           else _conv_layer)(product, np.asarray(weight) != 0,
                             np.asarray(saved) != 0)
  sizes = np.size(weight), np.size(x), product.outputs
  forward = backward = update = Cycles(0, 0, 0, 0)
  share = len(layer)
  for kernel, patches, phases in layer:
    traffic = [size // share for size in sizes]
    forward += pass_cycles(kernel, len(patches), machine, traffic=traffic)
    backward += _input_gradient(kernel, phases, machine, traffic)
    update += pass_cycles(
        patches.transpose(1, 2, 0).reshape(-1, 1, len(patches)), len(kernel),
        machine, traffic=(traffic[1], traffic[2], traffic[0]))
  return LayerCycles(forward, backward, update)


def _input_gradient(kernel, phases, machine, traffic):
  """kernel: bool[out, taps, in]; phases: of (taps, number of places)."""
  total = Cycles(0, 0, 0, 0)
  used = [(taps, places) for taps, places in phases if len(taps) and places]
  for taps, places in used:
    share = [size // len(used) for size in traffic]
    total += pass_cycles(kernel[:, taps].transpose(2, 1, 0), places, machine,
                         traffic=(share[0], share[2], share[1]))
  return total


def _dot_layer(product, weight, x):
  """For each batch entry: kernel, patches and phases of a `dot_general`."""
  contracted, batched = product.params['dimension_numbers']
  if product.weight == 'lhs':
    contracted, batched = contracted[::-1], batched[::-1]
  x, weight = (_matrices(array, batch, summed) for array, batch, summed in zip(
      (x, weight), batched, contracted))
  return [(w[:, None], p[:, None], [([0], len(p))])
          for w, p in zip(weight, x, strict=True)]


def _matrices(array, batch, summed):
  """[batch, free, summed], axes of a kind merged."""
  free = [i for i in range(array.ndim) if i not in (*batch, *summed)]
  size = [math.prod(array.shape[i] for i in axes)
          for axes in (batch, free, summed)]
  return array.transpose((*batch, *free, *summed)).reshape(size)


def _conv_layer(product, weight, x):
  """For each feature group: kernel, patches and phases of a convolution."""
  params = product.params
  if params['batch_group_count'] != 1 or set(params['lhs_dilation']) - {1}:
    raise ValueError(f'`product` (={params!r}) must have neither `lhs_dilation`'
                     ' nor `batch_group_count`.')
  numbers, groups = params['dimension_numbers'], params['feature_group_count']
  x, weight = x.transpose(numbers.lhs_spec), weight.transpose(numbers.rhs_spec)
  windows = list(zip(
      x.shape[2:], weight.shape[2:], (product.shape[i] for i in
                                      numbers.out_spec[2:]),
      params['window_strides'], params['padding'], params['rhs_dilation']))
  phases = _joined_phases([_phases(*window) for window in windows],
                          weight.shape[2:], len(x))
  kernels = weight.reshape(groups, -1, *weight.shape[1:2],
                           math.prod(weight.shape[2:])).swapaxes(2, 3)
  inputs = x.reshape(len(x), groups, -1, *x.shape[2:]).swapaxes(0, 1)
  return [(kernel, _patches(part, windows), phases)
          for kernel, part in zip(kernels, inputs)]


def _patches(x, windows):
  """bool[places, taps, channels]: what each output sees of [n, c, ...]."""
  for axis, (_, taps, out, stride, padding, dilation) in enumerate(windows):
    x = np.pad(x, [(0, 0)] * (axis + 2) + [
        (max(padding[0], 0), max(padding[1], 0))] + [(0, 0)] * (
            x.ndim - axis - 3))
    where = (np.arange(out)[:, None] * stride + np.arange(taps) * dilation
             + max(-padding[0], 0))
    x = np.moveaxis(np.take(x, where, axis=axis + 2), axis + 3, -1)
  spatial = len(windows)
  order = (0, *range(2, 2 + spatial), *range(2 + spatial, x.ndim), 1)
  x = x.transpose(order)
  places = math.prod(x.shape[:1 + spatial])
  return x.reshape(places, -1, x.shape[-1])


def _phases(size, taps, _, stride, padding, dilation):
  """Of one axis: (taps, number of inputs) of each phase of the stride."""
  inputs = (np.arange(size) + padding[0]) % stride
  own = np.arange(taps) * dilation % stride
  return [(np.flatnonzero(own == phase), int(np.sum(inputs == phase)))
          for phase in range(stride)]


def _joined_phases(axes, shape, batch):
  """Phases of all axes together, with taps counted in row-major order."""
  joined = [(np.zeros(1, int), batch)]
  for size, phases in zip(shape, axes):
    joined = [((taps[:, None] * size + own).ravel(), places * count)
              for taps, places in joined for own, count in phases]
  return joined
