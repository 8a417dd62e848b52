"""What the compiler of a TPU thinks a program costs, read from its text.

Instructions carry the compiler's own estimate of their cycles. A loop counts
as often as it turns, where that is a constant; of the branches of a condition
one is taken. Nothing is run.
"""

import collections
from collections.abc import Mapping
import math
import re
from typing import NamedTuple

_HEAD = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
_OP = re.compile(r'\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([a-z][a-z-]*)\(')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?'
                   r'"bytes_accessed":"(\d+)"')
_CALLED = re.compile(r'(?:to_apply|calls|called_computations=\{)=?%?([\w.-]+)')
_BRANCHES = re.compile(r'branch_computations=\{(.*?)\}')
_EITHER = re.compile(r'(?:true|false)_computation=%?([\w.-]+)')
_LOOP = re.compile(r'condition=%?([\w.-]+), body=%?([\w.-]+)')
_COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all',
                'collective-permute')
_UNKNOWN = ('sort', 'loop')
_SIZES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
          'f64': 8, 's64': 8, 'u64': 8}


class Chip(NamedTuple):
  """A TPU, as its maker states it."""

  clock: float  # Cycles a second.
  flops: float  # A second, in bfloat16.
  bandwidth: float  # Bytes of HBM a second.
  hbm: float  # GiB.


CHIPS = {'TPU v4': Chip(1.05e9, 275e12, 1.23e12, 32),
         'TPU v5 lite': Chip(1.5e9, 197e12, 8.2e11, 16),
         'TPU v5': Chip(1.75e9, 459e12, 2.46e12, 95),
         'TPU v6 lite': Chip(1.75e9, 918e12, 1.64e12, 32)}


class Cost(NamedTuple):
  """Of a program.

  Attributes:
    cycles: of all that has an estimate; of a kernel its own `CostEstimate`, at
      the chip's peak.
    unknown: of what has none, how often it runs: sorts, and 'loop', of which
      one turn is counted.
    collectives: bytes of the results of each kind, on one device.
  """

  cycles: float
  unknown: Mapping[str, int]
  collectives: Mapping[str, int]


def count(text: str, chip: Chip, *, dearest: bool) -> Cost:
  """The cost of one run of a compiled program, on one device.

  `text` is that after all of the compiler's passes. Of conditions the `dearest`
  branch is taken or the cheapest: that of a refresh, or of an ordinary step.
  What has no estimate is dear.

  Example:
    >>> program = '''ENTRY %main (a: f32[4]) -> f32[4] {
    ...   %b = f32[4]{0} copy(%a), backend_config={"estimated_cycles":"7"}
    ...   ROOT %c = f32[4]{0} all-reduce(%b), to_apply=%add
    ... }'''
    >>> count(program, CHIPS['TPU v4'], dearest=False)
    Cost(cycles=7.0, unknown={}, collectives={'all-reduce': 16})
  """
  bodies, entry = _computations(text)
  known = {}

  def cost(name):
    """Of a computation: 'cycles', and by name what Cost has besides."""
    if name not in known:
      known[name] = collections.Counter()  # For a program that is no tree.
      known[name] = sum((_own(line, chip) + inside(line)
                         for line in bodies.get(name, ())), known[name])
    return known[name]

  def inside(line):
    op = _OP.match(line)
    kind = op and op.group(2)
    if kind == 'while':
      condition, body = _LOOP.search(line).groups()
      turn, turns = cost(condition) + cost(body), _turns(bodies, condition)
      if turns is None:
        return turn + collections.Counter(loop=1)
      return collections.Counter({name: turns * n for name, n in turn.items()})
    if kind == 'conditional':
      listed = _BRANCHES.search(line)
      names = ([name.strip(' %') for name in listed.group(1).split(',')]
               if listed else _EITHER.findall(line))
      pick = max if dearest else min
      return pick(map(cost, names), key=lambda found: (
          sum(found[name] for name in _UNKNOWN), found['cycles']))
    if kind in ('call', 'async-start'):
      return cost(_CALLED.search(line).group(1))
    return collections.Counter()

  total = cost(entry)
  return Cost(float(total['cycles']), *(
      {name: total[name] for name in names if total[name]}
      for names in (_UNKNOWN, _COLLECTIVES)))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Lines of each computation by its name, and the name of the first."""
  bodies, entry, name = {}, '', None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      name = head.group(2)
      bodies[name] = []
      entry = name if head.group(1) else entry
    elif name and line.startswith(' '):
      bodies[name].append(line)
  return bodies, entry


def _own(line: str, chip: Chip) -> collections.Counter:
  """Of one instruction, without what it calls."""
  op = _OP.match(line)
  if not op:
    return collections.Counter()
  shape, kind = op.groups()
  found = collections.Counter({
      name: _bytes(shape, kind) for name in _COLLECTIVES
      if kind in (name, f'{name}-start')})
  cycles, kernel = _CYCLES.search(line), _COST.search(line)
  if cycles:
    found['cycles'] = float(cycles.group(1))
  elif kernel:
    flops, read = map(float, kernel.groups())
    found['cycles'] = chip.clock * max(flops / chip.flops,
                                       read / chip.bandwidth)
  elif kind == 'sort':
    found['sort'] = 1
  return found


def _bytes(shape: str, kind: str) -> int:
  """Of an array, or of a tuple; a start's first half are its operands."""
  sizes = [_SIZES.get(dtype, 4) * math.prod(map(int, re.findall(r'\d+', dims)))
           for dtype, dims in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shape)]
  if kind.endswith('-start') and shape.startswith('('):
    sizes = sizes[len(sizes) // 2:]
  return sum(sizes)


def _turns(bodies, condition: str) -> int | None:
  """How often a loop turns that counts from 0 up to a constant."""
  lines = list(bodies.get(condition, ()))
  for line in list(lines):
    called = _CALLED.search(line)
    lines += bodies.get(called.group(1), ()) if called else ()
  ends = {int(n) for line in lines for n in re.findall(
      r'= [su]\d+\[\]\S* constant\((\d+)\)', line)}
  compared = [line for line in lines if ' compare(' in line]
  if len(ends) == 1 and len(compared) == 1 and 'direction=LT' in compared[0]:
    return ends.pop()
  return None
