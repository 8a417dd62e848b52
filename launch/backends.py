"""The commands that run a table's cells, on each kind of machine.

Nothing is started here: these functions only write down what to type.
"""

from collections.abc import Sequence
import hashlib
import os
import re
import shlex
import sys
from typing import NamedTuple

from launch.table import Run

# Of a cell that another process already runs.
ELSEWHERE_EXIT_CODE = 76
# Seconds between the request to leave and the end: a checkpoint takes some.
_GRACE = 120
# Restarts of a stopped cell before someone should look at it.
MAX_REQUEUES = 100


class Slurm(NamedTuple):
  """What a submission to Slurm needs to know."""

  tasks: int  # Processes of a cell.
  options: Sequence[str] = ()  # More #SBATCH lines: '--gpus-per-task=8'.


class TpuVm(NamedTuple):
  """TPU VMs that are up, and where this project lies on their hosts."""

  names: Sequence[str]  # One slice a worker.
  zone: str
  folder: str


class Xpk(NamedTuple):
  """A GKE cluster that xpk knows, and the image its pods run."""

  cluster: str
  tpu_type: str
  docker_image: str
  num_slices: int = 1


def workdir(sweep_dir: str, name: str) -> str:
  return os.path.join(sweep_dir, 'cells', name)


def lock_path(sweep_dir: str, name: str) -> str:
  return os.path.join(sweep_dir, 'locks', f'{name}.lock')


def log_path(sweep_dir: str, name: str) -> str:
  return os.path.join(sweep_dir, 'logs', f'{name}.log')


def local(run: Run, sweep_dir: str, python: str = sys.executable) -> list[str]:
  """A cell in a process of this machine."""
  return [python, '-m', run.binary,
          *run.arguments(workdir(sweep_dir, run.name))]


def tpu_vm(run: Run, sweep_dir: str, where: TpuVm, worker: int) -> list[str]:
  """A cell on all hosts of one slice, by ssh; then its results come here.

  A host holds a lock of its own, so that a connection that broke leaves no
  second run beside the first.
  """
  name, zone = where.names[worker], f'--zone={where.zone}'
  inner = shlex.join([
      'env', 'ACCELERATOR=tpu', 'launch/run.sh', 'python', '-m', run.binary,
      *run.arguments(workdir(sweep_dir, run.name)), '--distributed'])
  lock = f'flock --nonblock --conflict-exit-code={ELSEWHERE_EXIT_CODE}'
  held = f'{os.path.basename(sweep_dir)}_{run.name}.lock'
  remote = (f'cd {shlex.quote(where.folder)} && {lock} "$HOME/{held}" {inner}')
  gcloud = ['gcloud', 'compute', 'tpus', 'tpu-vm']
  folder = workdir(sweep_dir, run.name)
  found = os.path.join(where.folder, folder)
  ssh = shlex.join([*gcloud, 'ssh', name, zone, '--worker=all',
                    f'--command={remote}'])
  # The first host alone writes results.
  copies = [shlex.join([*gcloud, 'scp', zone, '--worker=0',
                        f'{name}:{os.path.join(found, file)}', folder])
            for file in ('metrics.jsonl', 'result.json')]
  return ['bash', '-c', ' && '.join([
      ssh, f'mkdir -p {shlex.quote(folder)}', *copies])]


def xpk(run: Run, sweep_dir: str, where: Xpk, table: str) -> list[str]:
  """A cell as a workload; a second one of its name is refused by xpk."""
  command = shlex.join(['python3', '-m', run.binary, *run.arguments(
      workdir(sweep_dir, run.name)), '--distributed'])
  return ['xpk', 'workload', 'create', f'--cluster={where.cluster}',
          f'--workload={_workload(run, table)}', f'--tpu-type={where.tpu_type}',
          f'--num-slices={where.num_slices}',
          f'--docker-image={where.docker_image}',
          f'--max-restarts={MAX_REQUEUES}', '--restart-on-exit-codes=75',
          f'--termination-grace-period-seconds={_GRACE}',
          f'--command={command}']


def _workload(run, table) -> str:
  """A name of at most 39 letters, digits and '-', other for other flags."""
  text = re.sub('[^a-z0-9]+', '-', f'{table}-{run.name}'.lower())
  code = hashlib.sha256(repr((table, run)).encode()).hexdigest()[:8]
  return f'{text[:30].strip("-")}-{code}'


_SLURM = """\
#!/usr/bin/env bash
#SBATCH --job-name={job}
#SBATCH --array=0-{last}%{workers}
#SBATCH --ntasks={tasks}
#SBATCH --output={output}
#SBATCH --open-mode=append
#SBATCH --signal=TERM@{grace}
#SBATCH --requeue
{options}names=(
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


def slurm(runs: Sequence[Run], sweep_dir: str, where: Slurm, *, job: str,
          workers: int, retries: int, python: str = sys.executable) -> str:
  """One array script with a task for each cell, at most `workers` at a time.

  Slurm keeps the script as it was submitted, so the cells of a task stay what
  they were when the table changes.
  """
  more = ['--distributed'] if where.tasks > 1 else []
  commands = [shlex.join([*local(run, sweep_dir, python), *more])
              for run in runs]
  lines = lambda texts: '\n'.join(f'  {shlex.quote(text)}' for text in texts)
  return _SLURM.format(
      job=job, last=len(runs) - 1, workers=workers, tasks=where.tasks,
      output=os.path.join(sweep_dir, 'logs', 'slurm_%A_%a.log'), grace=_GRACE,
      options=''.join(f'#SBATCH {option}\n' for option in where.options),
      names=lines(run.name for run in runs), commands=lines(commands),
      retries=retries, elsewhere=ELSEWHERE_EXIT_CODE,
      locks=shlex.quote(os.path.join(sweep_dir, 'locks')))
