"""How a program starts: its --help, and one line for what is wrong.

Every program of this project leaves with 0 if it is done, with 2 if somebody
must mend something (flags, data, packages, a full disk), with 75 if it was
asked to stop and has saved, with 76 if another process is at its run, and with
134 if another process of its run is lost.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import re
import sys
import threading
from typing import Any, NoReturn

from absl import app
from absl import flags
from absl import logging

from experiments import locking

BAD = 2  # The status for what somebody must mend.
_OURS = ('experiments', 'launch', 'sparse_jax')
_TITLES = {'experiments.run_flags': 'The run',
           'experiments.sparsity': 'The method and its masks',
           'experiments.optimization': 'The optimizer',
           'experiments.devices': 'Several processes',
           'experiments.datasets': 'The data'}
_HELP = ('--help', '-help', '-h', '-?', '--helpshort')


def run(main: Callable[[Sequence[str]], Any]) -> NoReturn:
  """Calls `main` with what is no flag on the command line, then leaves.

  Unlike `app.run`, which it calls, it shows every flag of the program for
  --help, and leaves with status 2 and one line if a flag is refused, if `main`
  raises a UsageError, or if a package is missing.
  """
  app.run(functools.partial(_call, main), flags_parser=_parse)


def begin(argv: Sequence[str]) -> None:
  """Refuses what is no flag; Orbax would log every file, so only warnings."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)


@contextlib.contextmanager
def errors_in_a_line() -> Iterator[None]:
  """Leaves, with one line for what somebody must mend."""
  try:
    yield
  except locking.Held as error:
    logging.error('%s', error)
    sys.exit(locking.EXIT_CODE)
  except (ValueError, OSError, FloatingPointError) as error:
    logging.error('%s', error)
    logging.debug('It came from here:', exc_info=True)
    sys.exit(BAD)


@contextlib.contextmanager
def extra(name: str = 'experiments') -> Iterator[None]:
  """Says which extra of this project brings a package that is missing."""
  try:
    yield
  except ModuleNotFoundError as error:
    package = (error.name or '').partition('.')[0]
    if package in ('', *_OURS):
      raise
    stop(f'{package} is not installed: pip install "sparse_jax[{name}]"')


def stop(message: str) -> NoReturn:
  """Leaves with a line on standard error."""
  print(f'{sys.argv[0]}: {message}', file=sys.stderr, flush=True)
  sys.exit(BAD)


def say_it_once() -> None:
  """Leaves the errors of writing to `main`, which says them in one line.

  Otherwise a full disk is logged by each of Orbax's threads, printed by
  TensorStore for every callback whose loop has been closed by the failure, and
  printed by TensorBoard's thread before it is raised.
  """
  logging.get_absl_handler().addFilter(
      lambda record: not (record.exc_info and re.search(
          '/(orbax|asyncio)/', record.pathname)))
  of_callback, of_thread = sys.unraisablehook, threading.excepthook

  def show_callback(error):
    if str(error.exc_value) != 'Event loop is closed':
      of_callback(error)

  def show_thread(error):
    if not isinstance(error.exc_value, OSError):
      of_thread(error)
  sys.unraisablehook, threading.excepthook = show_callback, show_thread


def help_text() -> str:
  """What --help prints: the program's documentation and all of its flags."""
  document = sys.modules['__main__'].__doc__ or ''
  by_module = flags.FLAGS.flags_by_module_dict()
  own = [name for name in by_module if _title(name)]
  own.sort(key=lambda name: list(_TITLES).index(name) if name in _TITLES else
           -2 if name == sys.argv[0] else -1)
  # Its first lines are the module's name.
  groups = [f'{_title(name)}:\n' + flags.FLAGS.module_help(name).partition(
      ':\n')[2] for name in own if by_module[name]]
  return '\n\n'.join([document.strip(), *groups,
                      '--helpfull also lists the flags of absl.'])


def _title(module: str) -> str | None:
  """The name of a group of flags; None for those that are not ours."""
  if module == sys.argv[0]:
    return 'This program'
  return _TITLES.get(module) or (
      module if module.partition('.')[0] in _OURS else None)


def _parse(argv: Sequence[str]) -> list[str]:
  given = argv[1:argv.index('--')] if '--' in argv else argv[1:]
  if any(argument in _HELP for argument in given):
    print(help_text())
    sys.exit(0)
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _refuse(' '.join(str(error).split()), argv)


def _call(main, argv):
  with extra():
    try:
      return main(argv)
    except app.UsageError as error:
      _refuse(str(error), sys.argv)


def _refuse(message: str, argv: Sequence[str]) -> NoReturn:
  """Leaves, and has the other processes of the run leave."""
  devices = sys.modules.get('experiments.devices')
  if devices is not None:
    devices.leave_together(argv, message)
  stop(message)
