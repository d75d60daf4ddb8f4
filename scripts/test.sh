#!/usr/bin/env bash
# The whole test suite, on the CPU, in minutes: on as many cores as there are, up to four, unless there is a GPU or arguments
# say what to run. Installs what it needs into the active environment, else into .venv.
#
#   bash scripts/test.sh [pytest's arguments]      bash scripts/test.sh tests/config -k rules
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
if ! python -c 'import vl3train, deepspeed, hatchling, hypothesis, pytest, xdist' 2>/dev/null; then
  echo "installing vl3train with its test extra (torch is large: some minutes)"
  python -m pip install -e '.[dev]'
fi

# One thread a process: tests start processes of their own, and two cores are enough for neither's default.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# Tests take from a second to a minute: a worker that has none left takes some of another's. With a GPU, one after the
# other: those marked gpu measure its memory.
if [ $# -eq 0 ] && nvidia-smi -L >/dev/null 2>&1; then set -- tests; fi
if [ $# -eq 0 ]; then set -- tests -n logical --maxprocesses=4 --dist worksteal; fi
exec python -m pytest "$@"
