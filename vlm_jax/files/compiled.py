"""The directory in which compiled programs lie from one run to the next.

JAX executes unchecked what lies there, so one that every user may write to is refused.
"""

import contextlib
import os
import stat
from pathlib import Path

from vlm_jax.errors import explained, refuse

AUTO = "auto"
KEY = "training.compilation_cache_dir"
BY_DEFAULT = ("tpu", "gpu")  # a CPU may reject a program that another of its kind compiled


def directory(setting: str | None, platform: str) -> str | None:
    """Return where a run on a platform keeps its programs, made if need be; None: nowhere.

    setting: a path, "auto" or None. A path with a scheme, as "gs://...", is taken as it is. Raises
    `UserError` for a directory that cannot be made, that belongs to another user, or that every
    user may write to.
    """
    if setting is None or (setting == AUTO and platform not in BY_DEFAULT):
        return None
    if "://" in setting:
        return setting
    remedy = f"Set {KEY} to a directory of your own, or to none."
    with explained(
        RuntimeError,  # a user without a home
        lambda error: f"Compiled programs cannot be kept in '{setting}': {error} {remedy}",
    ):
        path = _usual() if setting == AUTO else Path(setting).expanduser().absolute()

    def words(error: OSError) -> str:
        return f"Compiled programs cannot be kept in '{path}': {error.strerror}. {remedy}"

    with explained(OSError, words):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    refuse(
        (
            found.st_uid != os.getuid(),
            f"Compiled programs cannot be kept in '{path}', which belongs to another user: JAX "
            f"executes unchecked what lies there. {remedy}",
        ),
        (
            found.st_mode & stat.S_IWOTH,
            f"Compiled programs cannot be kept in '{path}', to which every user may write: JAX "
            f"executes unchecked what lies there. {remedy}",
        ),
    )
    with explained(OSError, words):
        _date(path)
    return str(path)


def _date(path: Path) -> None:
    """Write the time of its last use beside each program that has none.

    JAX's cache of bounded size keeps nothing more where one lacks it: one that was kept without a
    bound, or whose run was killed as it kept it.
    """
    for program in path.glob("*-cache"):
        time = program.with_name(program.name.removesuffix("-cache") + "-atime")
        with contextlib.suppress(FileNotFoundError):  # another run dropped it
            if not time.exists():
                time.write_bytes(program.stat().st_mtime_ns.to_bytes(8, "little"))


def _usual() -> Path:
    """Return the place among a user's caches (https://specifications.freedesktop.org/basedir)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    with explained(
        RuntimeError,
        lambda error: f"There is no home directory for compiled programs. Set {KEY} or HOME.",
    ):
        caches = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return caches / "vlm_jax" / "compiled"
