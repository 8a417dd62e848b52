"""The commands that run a table's cells, on each kind of machine.

Nothing is started here: these functions only write down what to type. `values`
are the flags of `launch.run` by their names.
"""

from collections.abc import Mapping, Sequence
import hashlib
import os
import re
import shlex
from typing import Any

from experiments import locking
from launch.table import Run

# Seconds between the request to leave and the end: a checkpoint takes some.
_GRACE = 120
# Restarts of a stopped cell before someone should look at it.
MAX_REQUEUES = 100


def workdir(sweep_dir: str, name: str) -> str:
  return os.path.join(sweep_dir, 'cells', name)


def command(run: Run, values: Mapping[str, Any], worker: int = 0) -> list[str]:
  """What this machine runs for a cell; Slurm has its own script beside it."""
  if values['backend'] == 'tpu_vm':
    return tpu_vm(run, values, worker)
  if values['backend'] == 'xpk':
    return xpk(run, values)
  return [values['python'], '-m', run.binary,
          *run.arguments(workdir(values['sweep_dir'], run.name))]


def join(words: Sequence[str]) -> str:
  """Words as a shell takes them back, on one line.

  Raises:
    ValueError: if a word has a line break or another control character, of
      which a script, a job file and a remote shell each make something else.

  Example:
    >>> join(['echo', 'a b', '$(date)'])
    "echo 'a b' '$(date)'"
  """
  for word in words:
    if not word.isprintable():
      raise ValueError(f'{word!r} has a line break or another control '
                       'character, and cannot go through a shell.')
  return shlex.join(words)


def tpu_vm(run: Run, values: Mapping[str, Any], worker: int) -> list[str]:
  """A cell on all hosts of one slice, by ssh; then its results come here.

  A host holds a lock of its own, so that a connection that broke leaves no
  second run beside the first. A ValueError if scp would not take the folder.
  """
  sweep_dir, remote_dir = values['sweep_dir'], values['remote_dir']
  name, zone = values['tpu_names'][worker], f'--zone={values["zone"]}'
  folder = workdir(sweep_dir, run.name)
  inner = join(['env', 'ACCELERATOR=tpu', 'launch/run.sh', 'python', '-m',
                run.binary, *run.arguments(folder), '--distributed'])
  lock = f'flock --nonblock --conflict-exit-code={locking.EXIT_CODE}'
  held = join([f'{os.path.basename(sweep_dir)}_{run.name}.lock'])
  remote = f'cd {join([remote_dir])} && {lock} "$HOME"/{held} {inner}'
  found = os.path.join(remote_dir, folder)
  if not re.fullmatch('[A-Za-z0-9_./~=+-]+', found):  # scp: perhaps a shell.
    raise ValueError(f'`sweep_dir` (={sweep_dir!r}) in `remote_dir` '
                     f'(={remote_dir!r}) must have no letters but A-Z, a-z, '
                     '0-9 and _./~=+- for --backend=tpu_vm.')
  gcloud = ['gcloud', 'compute', 'tpus', 'tpu-vm']
  ssh = join([*gcloud, 'ssh', name, zone, '--worker=all',
              f'--command={remote}'])
  # The first host alone writes results.
  copies = [join([*gcloud, 'scp', zone, '--worker=0',
                  f'{name}:{os.path.join(found, file)}', folder])
            for file in ('metrics.jsonl', 'result.json')]
  return ['bash', '-c', ' && '.join([
      ssh, join(['mkdir', '-p', '--', folder]), *copies])]


def xpk(run: Run, values: Mapping[str, Any]) -> list[str]:
  """A cell as a workload; a second one of its name is refused by xpk."""
  inner = join(['python3', '-m', run.binary, *run.arguments(workdir(
      values['sweep_dir'], run.name)), '--distributed'])
  workload = _workload(run, f'{values["table"]}-{values["scale"]}')
  return ['xpk', 'workload', 'create', f'--cluster={values["cluster"]}',
          f'--workload={workload}', f'--tpu-type={values["tpu_type"]}',
          f'--num-slices={values["num_slices"]}',
          f'--docker-image={values["docker_image"]}',
          f'--max-restarts={MAX_REQUEUES}', '--restart-on-exit-codes=75',
          f'--termination-grace-period-seconds={_GRACE}',
          f'--command={inner}']


def _workload(run, table) -> str:
  """A name of at most 39 letters, digits and '-', other for other flags."""
  text = re.sub('[^a-z0-9]+', '-', f'{table}-{run.name}'.lower())
  code = hashlib.sha256(repr((table, run)).encode()).hexdigest()[:8]
  return f'{text[:30].strip("-")}-{code}'


_SLURM = """\
#!/usr/bin/env bash
{options}
names=(
{names}
)
commands=(
{commands}
)
name=${{names[SLURM_ARRAY_TASK_ID]}}
command=${{commands[SLURM_ARRAY_TASK_ID]}}
for ((attempt = 0; attempt <= {retries}; attempt++)); do
  flock --nonblock --conflict-exit-code={elsewhere} {locks}/"$name".lock \\
    srun --kill-on-bad-exit=1 bash -c "exec $command"
  code=$?
  case $code in
    0) exit 0 ;;
    75) exec scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" ;;
    {elsewhere}) echo "$name runs elsewhere"; exit 0 ;;
  esac
done
exit $code
"""


def slurm(runs: Sequence[Run], values: Mapping[str, Any]) -> str:
  """One array script with a task for each cell, some at a time.

  Slurm keeps the script as it was submitted, so the cells of a task stay what
  they were when the table changes. A ValueError if a value cannot stand in it.
  """
  sweep_dir = values['sweep_dir']
  if '\\' in sweep_dir:
    raise ValueError(f'`sweep_dir` (={sweep_dir!r}) must have no backslash for '
                     '--backend=slurm.')
  more = ['--distributed'] if values['tasks'] > 1 else []
  commands = [join([*command(run, values), *more]) for run in runs]
  logs = os.path.join(sweep_dir, 'logs').replace('%', '%%')
  options = [f'--job-name={values["table"]}',
             f'--array=0-{len(runs) - 1}%{values["workers"]}',
             f'--ntasks={values["tasks"]}',
             f'--output={os.path.join(logs, "slurm_%A_%a.log")}',
             '--open-mode=append', f'--signal=TERM@{_GRACE}', '--requeue',
             *values['sbatch']]
  lines = lambda texts: '\n'.join(f'  {join([text])}' for text in texts)
  return _SLURM.format(
      options='\n'.join(map(_directive, options)),
      names=lines(run.name for run in runs), commands=lines(commands),
      retries=values['retries'], elsewhere=locking.EXIT_CODE,
      locks=join([os.path.join(sweep_dir, 'locks')]))


def _directive(option: str) -> str:
  """A line for sbatch, whose quotes are its own and not the shell's."""
  if not option.isprintable():
    raise ValueError(f'`sbatch` (={option!r}) must be one line.')
  name, equals, value = option.partition('=')
  if re.search(r'[\s"\'\\#]', value):
    value = '"' + re.sub(r'(["\\])', r'\\\1', value) + '"'
  return f'#SBATCH {name}{equals}{value}'
