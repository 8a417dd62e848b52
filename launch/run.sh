#!/usr/bin/env bash
# Makes a virtual environment if there is none, installs this project into it,
# and runs the arguments there. Safe to repeat and to start on many hosts that
# share a folder: one installs, the others wait. An installation that was cut
# short is redone. The same on a laptop, a GPU host and every host of a TPU slice.
# Cost: a few minutes of installation the first time, nothing after that.
# Example: launch/run.sh python -m experiments.image.train --method=rigl
#
# Settings, all optional:
#   VENV         where the environment is (default: .venv in the project)
#   PYTHON       the Python to make it with (default: the newest >= 3.11 found)
#   ACCELERATOR  cpu, cuda13, cuda12 or tpu (default: cpu)
#   PINNED       1: the versions in launch/constraints.txt (default 0: the newest
#                that setup.cfg allows)
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$project/.venv}
accelerator=${ACCELERATOR:-cpu}
pinned=${PINNED:-0}

find_python() {
  local name
  for name in ${PYTHON:-python3.13 python3.12 python3.14 python3.11 python3}; do
    if command -v "$name" >/dev/null && "$name" -c \
        'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
    then
      echo "$name"
      return
    fi
  done
  echo "launch/run.sh: needs Python 3.11 or newer; set PYTHON=..." >&2
  return 1
}

case $accelerator in
  cpu) extras=experiments,test ;;
  cuda12|cuda13|tpu) extras=experiments,test,$accelerator ;;
  *) echo "launch/run.sh: ACCELERATOR (=$accelerator) must be cpu, cuda12," \
          "cuda13 or tpu" >&2; exit 2 ;;
esac

sources=("$project/setup.cfg" "$project/pyproject.toml")
options=()
case $pinned in
  0) ;;
  1) sources+=("$project/launch/constraints.txt")
     options=(--constraint "$project/launch/constraints.txt") ;;
  *) echo "launch/run.sh: PINNED (=$pinned) must be 0 or 1" >&2; exit 2 ;;
esac

# What is installed is recorded last, so an interrupted installation is redone.
wanted="$extras $pinned $(cat "${sources[@]}" | cksum)"
is_installed() { [[ "$(cat "$venv/installed" 2>/dev/null)" == "$wanted" ]]; }

install() {
  local python
  python=$(find_python)
  echo "launch/run.sh: installing into $venv (once)" >&2
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
    "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet ${options[@]+"${options[@]}"} \
    --editable "$project[$extras]" >&2
  echo "$wanted" > "$venv/installed"
}

if ! is_installed; then
  mkdir -p "$venv"
  exec 9>"$venv/installing"
  ! command -v flock >/dev/null || flock 9
  is_installed || install
  exec 9>&-
fi

export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
cd "$project"
[[ $# -eq 0 ]] || exec "$@"
