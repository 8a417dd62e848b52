"""The page of loops and methods, written from the tests' own table.

python -m tests.clients.table
"""

import importlib
import inspect
import pathlib

from tests.clients import laws

FOLDER = pathlib.Path(__file__).parent
PAGE = FOLDER.parents[1] / 'docs' / 'loops.md'
_HEAD = """# Other people's loops

Sparse training in loops of many kinds: LoRA, averages, schedule-free, FSDP,
pmap, shard_map, NNX, scans, recurrent networks, Orbax, Flax TrainState.

Each row is a small loop in the manner of a well-known one, each cell a run of
it, made by the tests (`tests/clients/`). A tick means that every layer keeps
exactly as many weights as it should, the step is compiled once, the loss falls,
the masks move, `with_method` (or `nnx_getter`) evaluates what `dense_weights`
exports, and SWAT's sparse products are in place. A tick under `dense` means
besides that losses and parameters are, bit for bit, those of the loop without
the library.

`top_kast`, `rigl`, `swat` and `str_` are masked; `packed` is
`packed(rigl(..., structure=Block((4, 4))))`.

"""
_FOOT = """
This page is written by `python -m tests.clients.table`.
"""


def loops() -> list[type[laws.LoopTest]]:
  """The loops, file by file in the order of their names."""
  found = []
  for path in sorted(FOLDER.glob('*_test.py')):
    module = importlib.import_module(f'tests.clients.{path.stem}')
    found += [cls for _, cls in inspect.getmembers(module, inspect.isclass)
              if issubclass(cls, laws.LoopTest)
              and cls.__module__ == module.__name__]
  return sorted(found, key=lambda cls: (cls.__module__, cls.title))


def cell(loop: type[laws.LoopTest], method: str) -> str:
  if method in loop.refused:
    return f'error: `{loop.refused[method]}`'
  return 'learns nothing' if method in loop.still else '✓'


def page() -> str:
  """The whole page."""
  rows = [['loop', *(name.replace('packed_rigl', 'packed')
                     for name in laws.METHODS)],
          ['---'] * (1 + len(laws.METHODS))]
  rows += [[loop.title, *(cell(loop, name) for name in laws.METHODS)]
           for loop in loops()]
  table = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
  recipes = '\n'.join(map(_recipe, loops()))
  return f'{_HEAD}{table}\n\n## What to write where\n\n{recipes}{_FOOT}'


def _recipe(loop):
  text = inspect.cleandoc(loop.recipe)
  keywords = ', '.join(f'`{name}={value!r}`'
                       for name, value in loop.sites.items())
  parts = [f'### {loop.title}\n', text]
  if keywords:
    parts.append(f'\nThe methods are told {keywords}.')
  parts += [f'\n`{method}` learns nothing: {why}.'
            for method, why in loop.still.items()]
  file = loop.__module__.rpartition('.')[2]
  parts.append(f'\n[tests/clients/{file}.py](../tests/clients/{file}.py)')
  return '\n'.join(parts) + '\n'


def main():
  PAGE.parent.mkdir(exist_ok=True)
  PAGE.write_text(page())


if __name__ == '__main__':
  main()
