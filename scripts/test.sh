#!/usr/bin/env bash
# The whole test suite, in minutes: on the CPU in up to four processes, on a machine with a GPU in one. Arguments go to
# pytest and replace both. Installs what it needs into the active environment, else into .venv.
#
#   bash scripts/test.sh [--long | pytest's arguments]      bash scripts/test.sh tests/config -k rules
#
#   --long    the tests marked long, too
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    echo "making .venv (no environment is active)"
    "${PYTHON:-python3}" -m venv .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
if ! python -c 'from importlib.util import find_spec; import sys; sys.exit(not all(map(find_spec, sys.argv[1:])))' \
  vl3train deepspeed hatchling hypothesis pytest xdist; then
  echo "installing vl3train with its test extra (torch is large: some minutes)"
  python -m pip install -e '.[dev]'
fi

# One thread for each process: tests start processes too, and the default thread counts would overload two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# Tests take from a second to a minute, so an idle worker takes tests of another (worksteal). With a GPU they run one
# after the other: tests marked gpu measure its memory.
long=()
if [ "$*" = --long ]; then long=(--long); shift; fi
if [ $# -eq 0 ] && nvidia-smi -L >/dev/null 2>&1; then set -- tests; fi
if [ $# -eq 0 ]; then set -- tests -n logical --maxprocesses=4 --dist worksteal; fi
exec python -m pytest ${long[@]+"${long[@]}"} "$@"
