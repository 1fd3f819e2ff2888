# Sourced by the scripts beside it, in the repository's root: makes .venv if need be.
# Shell functions, for bash with `set -euo pipefail`.

make_venv() {
    [ -x .venv/bin/python ] && return
    local name python=""
    # 3.11 first: it is the version that every pinned reference has wheels for.
    for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            python="$name"
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "$0: no Python 3.11 or newer is on PATH (looked for python3.11 to python3.14," \
            "python3, python). Install one and run this again." >&2
        exit 2
    fi
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "$0: '$python -m venv' failed: see the lines above. On Debian and Ubuntu the package" \
            "python3-venv is needed." >&2
        exit 2
    fi
}

# install_once NAME COMMAND...: runs the command unless it has been run for these requirements.
install_once() {
    local stamp=".venv/.installed-$1" wanted
    shift
    wanted="$(cat pyproject.toml requirements.txt | sha256sum)"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        "$@"
        echo "$wanted" >"$stamp"
    fi
}
