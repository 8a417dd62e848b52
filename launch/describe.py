"""What flags mean to the binary they are for, and what a run of them costs.

Each binary defines flags of one name in its own way, so a process of its own
imports it, lets its parser read the command lines, and answers:

  python -m launch.describe < request.json > answers.jsonl

The request holds `binary`, `commands` (lists of arguments) and `figures`,
whether to build each model, method and optimizer from shapes; `compile` may
name TPUs for which to compile each step. An answer a command, in order:
`values`, the flags by name, `free`, those that a continuation may change,
`figures`, and `compiled` (`launch.compiling`); or `error`. No data is read, and
no array is made.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from launch import compiling


def ask(binary: str, commands: Sequence[Sequence[str]], figures: bool,
        topology: str | None = None) -> list[dict[str, Any]]:
  """The answers of a process as above; `topology` is its `compile`.

  A ValueError names the binary that cannot be asked, or the command line that
  it does not take.
  """
  if _absent(binary):
    raise ValueError(f'`binary` (={binary!r}) must be a module; there is none.')
  request = {'binary': binary, 'figures': figures, 'compile': topology,
             'commands': [list(command) for command in commands]}
  done = subprocess.run(
      [sys.executable, '-m', 'launch.describe'], input=json.dumps(request),
      capture_output=True, text=True, env={**os.environ,
                                           **compiling.environment()})
  if done.returncode:
    raise ValueError(f'`binary` (={binary!r}) cannot be asked for its flags:\n'
                     f'{done.stderr.strip()}')
  answers = [json.loads(line) for line in done.stdout.splitlines()
             if line.startswith('{')]
  for command, answer in zip(commands, answers, strict=True):
    if 'error' in answer:
      raise ValueError(f'python -m {binary} {" ".join(command)}\n'
                       f'is no run of it: {answer["error"]}')
  return answers


def _absent(binary: str) -> bool:
  try:
    return importlib.util.find_spec(binary) is None
  except ModuleNotFoundError:
    return True


def answers(binary: str, commands: Sequence[Sequence[str]], figures: bool,
            topology: str | None = None) -> Iterator[dict[str, Any]]:
  """What the process says of each command, while it is alive."""
  from absl import flags
  module = importlib.import_module(binary)
  for name in ('run_config', 'without_data', 'describe', 'FREE'):
    if not hasattr(module, name):
      raise SystemExit(f'{binary} has no {name}.')
  known = {}
  for command in commands:
    flags.FLAGS.unparse_flags()
    try:
      rest = flags.FLAGS([binary, *command])[1:]
      if rest:
        raise ValueError(f'unknown arguments: {rest}')
      values = module.run_config()
      answer = {'values': values, 'free': list(module.FREE)}
      same = json.dumps({name: value for name, value in values.items()
                         if name not in (*module.FREE, 'seed')}, sort_keys=True)
      if same not in known:  # Seeds differ in nothing that matters here.
        made = (module.describe if figures else module.without_data)(values)
        known[same] = {'figures': made if figures else None}
        if topology:
          known[same]['compiled'] = compiling.figures(module, values, topology)
      answer |= known[same]
    except (ValueError, flags.Error) as error:
      answer = {'error': str(error)}
    yield answer


def main() -> None:
  request = json.load(sys.stdin)
  for answer in answers(request['binary'], request['commands'],
                        request['figures'], request.get('compile')):
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
