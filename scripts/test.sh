#!/usr/bin/env bash
# Runs the formatter's check, the linter, the type checker and the tests; makes .venv if need be.
# Works from any directory. Two tiers: without --all, what is marked `nightly` is left out.
#
#   bash scripts/test.sh                       the fast tier
#   bash scripts/test.sh --all                 everything
#   bash scripts/test.sh tests/test_config.py  other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh

tier="not nightly and "
if [ "${1:-}" = --all ]; then
    tier=""
    shift
fi

# shellcheck disable=SC2329 # install_once calls it
install_tests() {
    # torch alone and first, by this exact version: resolved together with the rest, pip would
    # prefer the build that brings gigabytes of CUDA libraries.
    .venv/bin/python -m pip install --quiet "torch==2.13.0"
    .venv/bin/python -m pip install --quiet -e ".[test]"
}

# Two calls of pytest, since XLA reads its flags once a process. Tests that compare bits are marked
# `exact` and run programs compiled as users' are; the others have tolerances, and take a third less
# processor time without LLVM's optimizations.
run_tests() { # EXPRESSION XLA_FLAGS ARGUMENT...
    local code=0
    XLA_FLAGS="$2" python -m pytest -q -n 2 --dist loadfile -m "$tier$1" "${@:3}" || code=$?
    [ "$code" = 5 ] && return # pytest's code where no test was selected
    [ "$code" -lt 2 ] || exit "$code" # interrupted, or called wrongly
    [ "$result" != 5 ] && [ "$code" = 0 ] || result=$code
}

SECONDS=0
make_venv
install_once test install_tests
installed=$SECONDS
export PATH="$PWD/.venv/bin:$PATH"
ruff format --check .
ruff check .
mypy
linted=$SECONDS
# A part of the tests compiles what others would have compiled for it: its time is not judged.
[ $# = 0 ] || export VLM_JAX_TEST_LIMIT=inf
result=5
run_tests "exact" "${XLA_FLAGS:-}" "$@"
run_tests "not exact" "${XLA_FLAGS:-} --xla_backend_optimization_level=0" "$@"
[ "$result" != 5 ] || echo "No test was selected; what is nightly needs --all as first argument." >&2
echo "Installation $installed s, linters $((linted - installed)) s, tests $((SECONDS - linted)) s."
exit "$result"
