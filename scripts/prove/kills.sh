#!/usr/bin/env bash
# Runs kills.py beside it, in .venv where there is one; see there. About ten minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" scripts/prove/kills.py "$@"
