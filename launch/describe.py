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

from collections.abc import Iterator, Mapping, Sequence
import importlib
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
  request = {'binary': binary, 'figures': figures, 'compile': topology,
             'commands': list(commands)}
  done = subprocess.run(
      [sys.executable, '-m', 'launch.describe'], input=json.dumps(request),
      capture_output=True, text=True, env={**os.environ,
                                           **compiling.ENVIRONMENT})
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


def _answers(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  """What the process says of each command, while it is alive."""
  from absl import flags
  binary, topology = request['binary'], request['compile']
  try:
    module = importlib.import_module(binary)
  except ModuleNotFoundError as error:
    if error.name and f'{binary}.'.startswith(f'{error.name}.'):
      raise SystemExit('There is no such module.') from None
    raise
  for name in ('run_config', 'without_data', 'describe', 'FREE'):
    if not hasattr(module, name):
      raise SystemExit(f'It has no {name}.')
  make = module.describe if request['figures'] else module.without_data
  known = {}
  for command in request['commands']:
    flags.FLAGS.unparse_flags()
    try:
      rest = flags.FLAGS([binary, *command])[1:]
      if rest:
        raise ValueError(f'unknown arguments: {rest}')
      values = module.run_config()
      same = json.dumps({name: value for name, value in values.items()
                         if name not in (*module.FREE, 'seed')}, sort_keys=True)
      if same not in known:  # Seeds differ in nothing that matters here.
        made = make(values)
        known[same] = {'figures': made if request['figures'] else None}
        if topology:
          known[same]['compiled'] = compiling.figures(module, values, topology)
      yield {'values': values, 'free': list(module.FREE), **known[same]}
    except (ValueError, flags.Error) as error:
      yield {'error': str(error)}


if __name__ == '__main__':
  for line in _answers(json.load(sys.stdin)):
    print(json.dumps(line), flush=True)
