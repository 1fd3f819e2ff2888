#!/usr/bin/env bash
# Runs the tests that need no torch under Debian 13's Python 3.13 with the newest releases that pip
# finds of what requirements.txt and the extras `plan` and `test` name, upper bounds left aside, and
# prints the versions and the number of tests. Fails if a test does.
#
#   bash scripts/prove/newest.sh [--root DIR] [--all] [arguments of pytest]
#
# --root DIR  make the Debian system there and keep it: the next call brings its packages up to date.
#             Without it, it is made in a temporary directory.
# --all       the nightly tests too.
#
# As root, on a Debian with debootstrap. Downloads about 2 GB and takes 7 GB of disk.
set -euo pipefail

for needed in debootstrap unshare; do
    if [ "$(id -u)" != 0 ] || ! command -v "$needed" >/dev/null; then
        echo "$0: run this as root, with debootstrap installed (apt-get install debootstrap)." >&2
        exit 2
    fi
done
if [ -z "${VLM_JAX_OWN_MOUNTS-}" ]; then # what is mounted below goes when this process ends
    VLM_JAX_OWN_MOUNTS=1 exec unshare --mount bash "$0" "$@"
fi

root="" tier="not nightly and "
while :; do
    case "${1-}" in
    --root) root="${2:?--root needs a directory}" && shift 2 ;;
    --all) tier="" && shift ;;
    *) break ;;
    esac
done
if [ -n "$root" ]; then
    mkdir -p "$root"
    root="$(realpath "$root")"
else
    root="$(mktemp -d)" && chmod 755 "$root"
    trap 'umount "$root/proc" "$root/sys" "$root/dev/shm" 2>/dev/null; rm -rf --one-file-system "$root"' EXIT
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ ! -x "$root/venv/bin/python" ]; then
    # The mirror that this machine's apt uses; where it has none of Debian's, debootstrap's own.
    mirror="$(apt-get indextargets --format "\$(REPO_URI)" "Origin: Debian" "Label: Debian")"
    debootstrap --variant=minbase --include=python3-venv,ca-certificates,git trixie "$root" \
        ${mirror:+"${mirror%%$'\n'*}"} >"$root/debootstrap.log"
    chroot "$root" python3 -m venv /venv
fi
mkdir -p "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys" # libtpu counts processors there
mount -t tmpfs tmpfs "$root/dev/shm"

# pip's way to its index: this machine's.
passed=()
for name in PIP_{INDEX_URL,EXTRA_INDEX_URL,TRUSTED_HOST,CERT,PROXY,DEFAULT_TIMEOUT} \
    SSL_CERT_FILE REQUESTS_CA_BUNDLE {http,https,no}_proxy {HTTP,HTTPS,NO}_PROXY; do
    [ -z "${!name-}" ] || passed+=("$name=${!name}")
done
for file in /etc/pip.conf /etc/hosts /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt \
    "${PIP_CERT-}" "${SSL_CERT_FILE-}" "${REQUESTS_CA_BUNDLE-}"; do
    [ ! -f "$file" ] || cp --parents --dereference "$file" "$root"
done

rm -rf "$root/checkout"
git clone --quiet --no-hardlinks . "$root/checkout" # and what is not committed yet:
git ls-files -z --cached --others --exclude-standard | tar --null -T - -c | tar -x -C "$root/checkout"

inside() {
    chroot "$root" /usr/bin/env -i "${passed[@]}" PATH=/venv/bin:/usr/bin:/bin HOME=/root \
        LANG=C.UTF-8 PYTHONPATH=/checkout \
        sh -c 'cd /checkout && exec "$@"' sh "$@"
}

wanted="$(inside python - <<'PYTHON'
import re, tomllib

extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
lines = open("requirements.txt").read().splitlines() + extras["plan"] + extras["test"]
names = {re.match(r"[\w.-]+(\[\w+\])?", line)[0] for line in lines if line[:1] not in ("", "#")}
print(*sorted(names - {"torch", "peft", "bitsandbytes", "trl", "ruff", "mypy"}), sep="\n")
PYTHON
)"
mapfile -t wanted <<<"$wanted"
inside pip install --quiet --upgrade "${wanted[@]}"
# As scripts/test.sh does: tests that compare bits run programs compiled as users' are.
result=5 # pytest's code where no test was selected
run_tests() { # EXPRESSION XLA_FLAGS ARGUMENT...
    local code=0
    # How long a test may take is scripts/test.sh's to judge.
    inside env XLA_FLAGS="$2" VLM_JAX_TEST_LIMIT=inf python -m pytest -q --without-torch -m "$tier$1" "${@:3}" |
        tee "$root/tests.log" || code=$?
    counts+=("$(tail -n 1 "$root/tests.log")")
    [ "$code" = 5 ] && return
    [ "$result" != 5 ] && [ "$code" = 0 ] || result=$code
}
counts=()
run_tests "exact" "" "$@"
run_tests "not exact" "--xla_backend_optimization_level=0" "$@"

echo
inside python - <<'PYTHON'
import platform
from importlib.metadata import version

print("Python", platform.python_version())
for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy"):
    print(name, version(name))
PYTHON
printf '%s\n' "${counts[@]}"
exit "$result"
