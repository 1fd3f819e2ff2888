"""A run's directory: its lock, checks of earlier contents, the place of checkpoints.

Of several processes the first one checks, locks, makes and clears it; the others must see it.
Checkpoints may lie in a bucket.
"""

import contextlib
import errno
import fcntl
import importlib.util
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from vlm_jax.config.specs import RunSpec
from vlm_jax.distributed import processes
from vlm_jax.distributed.interrupts import if_ended
from vlm_jax.errors import UserError, explained, first_line, refuse

BUCKET = "gs://"  # what orbax and tensorstore read and write beside directories
OWNER = "owner.txt"  # beside checkpoints in a bucket: the run that may write there


class Places(NamedTuple):
    """directory: of logs and results. checkpoints: in it, or in a bucket."""

    directory: Path
    checkpoints: epath.Path

    @property
    def in_bucket(self) -> bool:
        """Whether checkpoints lie in a bucket, so that only one process needs the directory."""
        return str(self.checkpoints).startswith(BUCKET)

    def saved_steps(self) -> list[int]:
        """Return the steps with a whole checkpoint, oldest first.

        Raises `UserError` where a bucket cannot be read.
        """
        with self._bucket_errors():
            return sorted(
                int(path.name)
                for path in (self.checkpoints.iterdir() if self.checkpoints.is_dir() else ())
                if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)
            )

    def claim(self) -> Callable[[], None]:
        """Claim the bucket, which knows no locks: the last run to do so may write checkpoints.

        Return a check that raises `UserError` where another run has claimed it since. So a run that
        another one has taken the place of, as after a restart that it slept through, learns of it
        before it would write. The mark stays when a run ends: a resumed run claims again. Raises
        `UserError` where it cannot be written.
        """
        mark = f"process {os.getpid()} on {socket.gethostname()}, {secrets.token_hex(8)}\n"
        file = self.checkpoints / OWNER
        with self._bucket_errors():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            file.write_text(mark)

        def check() -> None:
            owner = file.read_text() if file.exists() else "by no run: its mark was deleted"
            if owner != mark:
                raise UserError(
                    f"Another run writes its checkpoints to '{self.checkpoints}' now "
                    f"({owner.split(',')[0]}). This one ends; start it again with another "
                    f"training.checkpoint_dir."
                )

        return check

    def claimed(self) -> str | None:
        """Return which run claimed the bucket last, in words; None: none, or there is no bucket."""
        with self._bucket_errors():
            file = self.checkpoints / OWNER
            return file.read_text().split(",")[0] if self.in_bucket and file.exists() else None

    def _bucket_errors(self) -> contextlib.AbstractContextManager[None]:
        return explained(
            Exception if self.in_bucket else (),  # clients of buckets raise their own
            lambda error: (
                f"'{self.checkpoints}' cannot be reached: {first_line(error)}. Check "
                f"training.checkpoint_dir, and that this host may read and write the bucket "
                f"(gcloud auth application-default login)."
            ),
        )


def places_of(config: RunSpec, directory: Path | None = None) -> Places:
    """Return where a run of this config writes; directory: instead of training.output_dir.

    Raises `UserError` for an address where a directory must be, for a checkpoint_dir that is no
    bucket which orbax takes, and where the package for it is missing.
    """
    output, apart = config.training.output_dir, config.training.checkpoint_dir
    if directory is None and "://" in output:
        raise UserError(
            f"training.output_dir is '{output}'. A run locks and appends to what it writes there, "
            f"which a bucket does not do: give a directory, and the address in "
            f"training.checkpoint_dir (docs/PODS.md)."
        )
    directory = directory or Path(output).expanduser()
    if apart is None:
        return Places(directory, epath.Path(directory.absolute()) / "checkpoints")
    refuse(
        (
            not apart.startswith(BUCKET),
            f"training.checkpoint_dir is '{apart}'; expected the address of a bucket that orbax "
            f"takes, as {BUCKET}bucket/run1. On a disk checkpoints lie in training.output_dir: "
            f"leave checkpoint_dir out.",
        ),
        (
            importlib.util.find_spec("gcsfs") is None,
            f"'{apart}' needs the package gcsfs, which is not installed: "
            f'pip install "vlm_jax[gcs]"',
        ),
    )
    return Places(directory, epath.Path(apart))


# What a run writes while it trains, and its result.
LOGS = ("config.json", "metrics.jsonl", "evaluations.jsonl", "tensorboard", "wandb", "checkpoints")
RESULTS = ("adapter", "model")
# One of these in a directory means that it holds a run.
CONTENTS = ("config.json", "metrics.jsonl", "checkpoints", *RESULTS)
LOCK = ".lock"  # there while a run lives; the system lets go of it where a run is killed
SEEN_WITHIN = 60  # seconds: network file systems show a new file to other hosts late


@contextlib.contextmanager
def output_directory(places: Places, resume: bool | str) -> Iterator[tuple[bool, str | None]]:
    """Hold the directory for one run while a block lasts; yield whether to resume, and a warning.

    resume: "auto" resumes where there is a run. The warning may be None. All processes enter it.
    Raises `UserError` as `check_output` does, where another run is at work in the directory, and
    where processes do not all see one and the same although they write their checkpoints there.
    """
    mark = secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        warning = None
        if processes.is_primary():
            if resume == "auto":  # of a run in a bucket the logs may be lost
                resume = (
                    os.path.exists(places.directory / "config.json") or places.claimed() is not None
                )
            check_output(places, bool(resume))
            warning = stack.enter_context(_locked(places.directory, mark))
            check_output(places, bool(resume))  # now that no other run can change it
        mark, resumed = processes.gather("output directory", [mark, resume])[0]
        if not (processes.is_primary() or places.in_bucket):
            _check_shared(places.directory, mark)
        yield resumed, warning


@contextlib.contextmanager
def _locked(directory: Path, mark: str) -> Iterator[str | None]:
    """Hold the directory's lock, and make the directory for it; yield a warning, or None."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    _make(directory)
    path, warning = directory / LOCK, None
    while True:
        with explained(
            OSError,
            lambda error: (
                f"The lock '{path}' of the output directory cannot be opened ({error.strerror}). "
                f"If no run is at work there, delete it, or choose another training.output_dir."
            ),
        ):
            file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                owner = file.read().split("\n")[0] or "another process"
            raise UserError(
                f"Another run is at work in the output directory '{directory}' ({owner}). Wait for "
                f"its end or stop it, or choose another training.output_dir."
            ) from None
        except OSError as error:  # a file system without locks
            warning = (
                f"Warning: '{directory}' cannot be locked ({error.strerror}), so a second run "
                f"there would not be refused: start none."
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        file.close()  # the run before took it away meanwhile

    def release() -> None:
        path.unlink(missing_ok=True)
        for one in made:  # of a run that failed early nothing stays
            with contextlib.suppress(OSError):
                one.rmdir()

    with if_ended(release), file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n{mark}\n")
        file.flush()
        try:
            yield warning
        finally:
            release()  # while it is still locked


def _check_shared(directory: Path, mark: str) -> None:
    """Raise `UserError` where this process does not see the lock of the first one."""
    end = time.monotonic() + SEEN_WITHIN
    while True:
        with contextlib.suppress(OSError):
            os.listdir(directory)  # a network file system looks again
            if mark in (directory / LOCK).read_text(encoding="utf-8"):
                return
        if time.monotonic() > end:
            raise UserError(
                f"The output directory '{directory}' of process {processes.number()} is not that "
                f"of process 0. Checkpoints are written by all processes into one directory: name "
                f"one in training.output_dir that all hosts share, such as one on a network file "
                f"system, or a bucket in training.checkpoint_dir."
            )
        time.sleep(0.2)


def _make(directory: Path) -> None:
    with explained(
        OSError,
        lambda error: (
            f"The output directory '{directory}' cannot be made ({error.strerror}). Choose another "
            f"training.output_dir."
        ),
    ):
        directory.mkdir(parents=True, exist_ok=True)


def check_output(places: Places, resume: bool) -> None:
    """Raise `UserError` where a run could not write, would meet another's files, or finds none.

    resume: there must be a run; otherwise there must be none.
    """
    directory = places.directory
    impossible = explained(
        (OSError, ValueError),  # a name too long, a byte that no name has
        lambda error: (
            f"training.output_dir is {str(directory)!r}, which cannot be a directory: {error}."
        ),
    )
    with impossible, contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(directory)
    there = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    held = [name for name in CONTENTS if os.path.exists(directory / name)]
    owner = places.claimed()
    refuse(
        (
            not there.is_dir(),
            f"The output directory '{directory}' cannot be made: '{there}' is a file. Choose "
            f"another training.output_dir.",
        ),
        (
            not os.access(there, os.W_OK | os.X_OK),
            f"The output directory '{directory}' cannot be written: there is no permission to "
            f"write in '{there}'. Choose another training.output_dir.",
        ),
        (
            held and not resume,
            f"The output directory '{directory}' already holds a run ({', '.join(held)}). Resume "
            f"it with --resume, choose another training.output_dir, or delete it.",
        ),
        (
            owner and not resume,
            f"'{places.checkpoints}' is already a run's ({owner}). Resume it with --resume, which "
            f"ends that run if it is still at work, or choose another training.checkpoint_dir.",
        ),
        (
            resume and owner is None and "config.json" not in held,
            f"There is no run to resume in '{directory}': it has no config.json. Check "
            f"training.output_dir, or start without --resume.",
        ),
    )


@contextlib.contextmanager
def nothing_half_written(places: Places) -> Iterator[None]:
    """Make the directory of a run for a block that writes it.

    Where the block fails before a checkpoint is saved, what it wrote is removed, so that the same
    command can be given again; files that were there before stay, and so does everything of a run
    whose checkpoints go to a bucket, which may not be there any more. Where it fails later,
    everything stays. A `UserError` then also says how to resume.
    """
    directory, primary = places.directory, processes.is_primary()
    made = not directory.exists()
    new = [directory / name for name in LOGS if not (directory / name).exists()]

    def clean() -> None:
        if places.in_bucket or places.saved_steps():
            return
        for path in new:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if made and not any(directory.iterdir()):
            directory.rmdir()

    processes.wait_for_all("the directory was looked at")
    _make(directory)
    with if_ended(clean) if primary else contextlib.nullcontext():
        try:
            yield
        except BaseException as error:
            saved = [] if places.in_bucket else places.saved_steps()
            if primary:
                clean()
            full = _disk_is_full(error)
            if not (full or isinstance(error, UserError)):
                raise
            what = f"There is no room left on the disk of '{directory}'." if full else str(error)
            how = "Nothing had been saved yet: once this is repaired, give the same command again."
            if places.in_bucket:
                how = (
                    "Once this is repaired, resume from the last complete checkpoint with --resume."
                )
            elif saved:
                how = (
                    f"The last good checkpoint is '{places.checkpoints / str(saved[-1])}': once "
                    f"this is repaired, add --resume."
                )
            raise UserError(f"{what} {how}") from error


@contextlib.contextmanager
def result_half_written(places: Places) -> Iterator[None]:
    """Raise `UserError` where the disk is full in a block that writes the result of a run."""
    try:
        yield
    except Exception as error:
        if not _disk_is_full(error):
            raise
        raise UserError(
            f"There is no room left on the disk of '{places.directory}' for the result. All steps "
            f"are done and saved: once this is repaired, add --resume, which only writes it."
        ) from error


def _disk_is_full(error: BaseException | None) -> bool:
    """Return whether an exception, or one behind it, says so: orbax and tensorstore do in words."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
