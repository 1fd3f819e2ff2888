"""Where a run writes: its own directory, and its checkpoints, which may lie in a bucket."""

import contextlib
import importlib.util
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from vlm_jax.errors import UserError

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
            found = list(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else []
            return sorted(
                int(path.name)
                for path in found
                if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)
            )

    def claim(self) -> "Claim":
        """Return a new claim of the bucket; raise `UserError` where it cannot be written."""
        with self._bucket_errors():
            return Claim(self.checkpoints)

    def claimed(self) -> str | None:
        """Return which run claimed the bucket last, in words; None: none, or there is no bucket."""
        with self._bucket_errors():
            file = self.checkpoints / OWNER
            return file.read_text().split(",")[0] if self.in_bucket and file.exists() else None

    @contextlib.contextmanager
    def _bucket_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # clients of buckets raise their own
            if not self.in_bucket:
                raise
            raise UserError(
                f"'{self.checkpoints}' cannot be reached: "
                f"{str(error).splitlines()[0][:300] if str(error) else type(error).__name__}. "
                f"Check training.checkpoint_dir, and that this host may read and write the bucket "
                f"(gcloud auth application-default login)."
            ) from error


def places_of(config: ConfigDict, directory: Path | None = None) -> Places:
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
    if not apart.startswith(BUCKET):
        raise UserError(
            f"training.checkpoint_dir is '{apart}'; expected the address of a bucket that orbax "
            f"takes, as {BUCKET}bucket/run1. On a disk checkpoints lie in training.output_dir: "
            f"leave checkpoint_dir out."
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"'{apart}' needs the package gcsfs, which is not installed: "
            f'pip install "vlm_jax[gcs]"'
        )
    return Places(directory, epath.Path(apart))


class Claim:
    """The right to write checkpoints to a bucket, which knows no locks: the last run has it.

    A run that another one has taken the place of, as after a restart that it slept through, learns
    of it before it would write. The mark stays when a run ends: whoever goes on claims anew.
    """

    def __init__(self, directory: Any):
        self.file = epath.Path(directory) / OWNER
        self.mark = f"process {os.getpid()} on {socket.gethostname()}, {secrets.token_hex(8)}\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(self.mark)

    def check(self) -> None:
        """Raise `UserError` where another run has claimed the place since."""
        owner = self.file.read_text() if self.file.exists() else "nobody: its mark was deleted"
        if owner != self.mark:
            raise UserError(
                f"Another run writes its checkpoints to '{self.file.parent}' now "
                f"({owner.split(',')[0]}). This one ends; start it again with another "
                f"training.checkpoint_dir."
            )
