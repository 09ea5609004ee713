#!/usr/bin/env bash
# Runs the tests; sets itself up as run.sh does. Further arguments go to pytest: ./test.sh -k ddp
set -euo pipefail

REQUIREMENTS=(requirements.txt requirements-test.txt)
source "$(dirname "$0")/setup.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -q -m "not slow" "$@"
