#!/usr/bin/env bash
# Runs the formatter's check, the linter, the type checker and all tests; makes .venv if need be.
# Works from any directory. Arguments go to pytest: `bash scripts/test.sh tests/test_config.py`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    python=""
    # 3.11 first: it is the version that every pinned reference has wheels for.
    for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            python="$name"
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "scripts/test.sh: no Python 3.11 or newer is on PATH (looked for python3.11 to" \
            "python3.14, python3, python). Install one and run this again." >&2
        exit 2
    fi
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "scripts/test.sh: '$python -m venv' failed: see the lines above. On Debian and" \
            "Ubuntu the package python3-venv is needed." >&2
        exit 2
    fi
fi

stamp=.venv/.installed-test
wanted="$(cat pyproject.toml requirements.txt | sha256sum)"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    # torch alone and first, by this exact version: resolved together with the rest, pip would
    # prefer the build that brings gigabytes of CUDA libraries.
    .venv/bin/python -m pip install --quiet "torch==2.13.0"
    .venv/bin/python -m pip install --quiet -e ".[test]"
    echo "$wanted" >"$stamp"
fi

export PATH="$PWD/.venv/bin:$PATH"
ruff format --check .
ruff check .
mypy
python -m pytest -q "$@"
