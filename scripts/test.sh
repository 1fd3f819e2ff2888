#!/usr/bin/env bash
# Runs the formatter's check, the linter, the type checker and all tests; makes .venv if need be.
# Works from any directory. Arguments go to pytest: `bash scripts/test.sh tests/test_config.py`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh

install_tests() {
    # torch alone and first, by this exact version: resolved together with the rest, pip would
    # prefer the build that brings gigabytes of CUDA libraries.
    .venv/bin/python -m pip install --quiet "torch==2.13.0"
    .venv/bin/python -m pip install --quiet -e ".[test]"
}

make_venv
install_once test install_tests
export PATH="$PWD/.venv/bin:$PATH"
ruff format --check .
ruff check .
mypy
python -m pytest -q "$@"
