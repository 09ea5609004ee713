# Sourced by run.sh, eval.sh and test.sh: finds or makes the Python environment, sets $PYTHON.
# An active environment (venv, conda) that already has the requirements is used as it is;
# otherwise .venv is made here, with uv when present and with python3 -m venv + pip when not.

has_requirements() {  # true if $1 can run everything in the requirement files $2...
    "$1" - "${@:2}" 2>/dev/null <<'PY'
import sys
from importlib.metadata import version
if sys.version_info < (3, 10):
    sys.exit(1)
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
for path in sys.argv[1:]:
    for line in open(path):
        line = line.split("#")[0].strip()
        if line and not line.startswith("-"):
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate():
                continue  # of another system
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                sys.exit(1)
PY
}

set_up() {  # makes $PYTHON point to a Python that has the requirement files "$@"
    local files=("$@") active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" file
    for PYTHON in "$active/bin/python" "$PWD/.venv/bin/python"; do
        if [ -x "$PYTHON" ] && has_requirements "$PYTHON" "${files[@]}"; then
            echo "environment: ${PYTHON%/bin/python}" >&2
            return
        fi
    done
    local install=() made_by
    for file in "${files[@]}"; do install+=(-r "$file"); done
    if command -v uv >/dev/null; then
        made_by=uv
        [ -x .venv/bin/python ] || uv venv --quiet --python ">=3.10" .venv
        echo "environment: installing the requirements into $PWD/.venv with uv" >&2
        uv pip install --quiet --python .venv/bin/python "${install[@]}"
    else
        made_by="python3 -m venv and pip"
        [ -x .venv/bin/python ] || python3 -m venv .venv
        echo "environment: installing the requirements into $PWD/.venv with pip; a few GB, some minutes" >&2
        .venv/bin/python -m pip install --quiet "${install[@]}"
    fi
    echo "environment: $PWD/.venv, made by $made_by" >&2
}

cd "$(dirname "${BASH_SOURCE[0]}")"
set_up "${REQUIREMENTS[@]:-requirements.txt}"
