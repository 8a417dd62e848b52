#!/usr/bin/env bash
# Starts a Slurm of one node on this machine, to try the slurm back end on; or
# stops it. Nothing outside the folder is touched, and no accounts are needed.
#
#   apt-get install slurm-wlm munge
#   launch/local_slurm.sh start FOLDER
#   export SLURM_CONF=FOLDER/slurm.conf
#   python -m launch.run --table=swat_cifar10 --backend=slurm --workers=2
#   squeue; scancel --signal=TERM JOB; ...
#   launch/local_slurm.sh stop FOLDER
#
# The node says that it has four processors, whatever it has. A task that is
# requeued starts again after 10 seconds (Slurm's own default is two minutes).
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

usage() {
  echo "launch/local_slurm.sh: start FOLDER, or stop FOLDER" >&2
  exit 2
}

stop() {
  local name pid
  # Steps of running jobs would live on without their daemons.
  SLURM_CONF=$folder/slurm.conf timeout 10 scancel --user="$(id -un)" \
    2>/dev/null || true
  for name in slurmd slurmctld munged; do
    pid=$(cat "$folder/$name.pid" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null || continue
    for _ in {1..50}; do
      kill -0 "$pid" 2>/dev/null || break
      sleep .1
    done
    kill -9 "$pid" 2>/dev/null || true
  done
}

start() {
  local user host port
  user=$(id -un) host=$(hostname -s) port=$((20000 + $$ % 10000))
  mkdir -p "$folder/state" "$folder/spool"
  chmod 700 "$folder"
  head -c 128 /dev/urandom > "$folder/munge.key"
  chmod 600 "$folder/munge.key"
  cat > "$folder/slurm.conf" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=10
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MpiDefault=none
KillWait=30
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
  munged --force --key-file="$folder/munge.key" \
    --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
  slurmctld -c -f "$folder/slurm.conf"
  slurmd -c -f "$folder/slurm.conf" -N "$host"
  export SLURM_CONF=$folder/slurm.conf
  for _ in {1..100}; do
    [[ $(sinfo --noheader --format=%t 2>/dev/null) == idle ]] && return
    sleep .2
  done
  echo "launch/local_slurm.sh: no node came up; see $folder/*.log" >&2
  stop
  exit 1
}

[[ $# -eq 2 ]] || usage
folder=$(realpath -m "$2")
case $1 in
  start) start ;;
  stop) stop ;;
  *) usage ;;
esac
