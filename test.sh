#!/usr/bin/env bash
# Runs the tests; sets itself up as run.sh does. Further arguments go to pytest: ./test.sh -k ddp
set -euo pipefail

TEST_PROCESSES="${TEST_PROCESSES:-2}"              # each needs about 2 GB of memory
export OMP_NUM_THREADS=1                           # the models are tiny: threads only compete

REQUIREMENTS=(requirements.txt requirements-test.txt)
source "$(dirname "$0")/setup.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -q -m "not slow" -n "$TEST_PROCESSES" --dist loadfile "$@"
