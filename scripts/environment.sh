# Sourced by the other scripts, never run: makes the virtual environment and installs the pinned packages, once.
#
#   use_environment EXTRAS     e.g. use_environment report,demo
#
# Afterwards $PYTHON is the environment's interpreter. A stamp holds the hash of what was installed, so that a second
# call costs milliseconds. JAXGRAD_VENV names another folder than .venv; JAXGRAD_PYTHON the interpreter to make it with.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${JAXGRAD_VENV:-.venv}"
PYTHON="$VENV/bin/python"

is_new_enough() {
    "$@" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${JAXGRAD_PYTHON:+"$JAXGRAD_PYTHON"} python3.12 python3.11 python3.13 python3 python; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
        if [ "$candidate" = "${JAXGRAD_PYTHON:-}" ]; then
            echo "error: JAXGRAD_PYTHON=$candidate is not a Python 3.11 or later" >&2
            return 2
        fi
    done
    echo "error: no Python 3.11 or later on PATH; install one, or name it: JAXGRAD_PYTHON=/path/to/python3.12 $0" >&2
    return 2
}

use_environment() {
    local extras="$1" base want stamp
    if ! is_new_enough "$PYTHON"; then
        base="$(find_python)" || exit 2
        echo "making $VENV with $("$base" --version)" >&2
        "$base" -m venv "$VENV"
    fi
    stamp="$VENV/.installed-${extras//,/-}"
    want="$(cat pyproject.toml constraints.txt | "$PYTHON" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') $PWD"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
        echo "installing jaxgrad[$extras] into $VENV (a few minutes the first time)" >&2
        "$PYTHON" -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$extras]" >&2
        echo "$want" > "$stamp"
    fi
}
