"""A run's directory: refused where it holds another run, cleared where nothing was saved."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vlm_jax.errors import UserError

# What a run writes while it trains, and its result.
LOGS = ("config.json", "metrics.jsonl", "evaluations.jsonl", "tensorboard", "checkpoints")
RESULTS = ("adapter", "model")
# One of these in a directory means that it holds a run.
CONTENTS = ("config.json", "metrics.jsonl", "checkpoints", *RESULTS)


def check_output(directory: Path, resume: bool) -> None:
    """Raise `UserError` where a run could not write, would meet another's files, or finds none.

    resume: the directory must hold a run; otherwise it must not.
    """
    try:
        os.lstat(directory)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name too long, a byte that no name has
        raise UserError(
            f"training.output_dir is {str(directory)!r}, which cannot be a directory: {error}."
        ) from error
    there = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    if not there.is_dir():
        raise UserError(
            f"The output directory '{directory}' cannot be made: '{there}' is a file. Take another "
            f"training.output_dir."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"The output directory '{directory}' cannot be written: there is no permission to "
            f"write in '{there}'. Take another training.output_dir."
        )
    held = [name for name in CONTENTS if (directory / name).exists()]
    if held and not resume:
        raise UserError(
            f"The output directory '{directory}' already holds a run ({', '.join(held)}). Go on "
            f"with it by --resume, take another training.output_dir, or delete it."
        )
    if resume and not (directory / "config.json").exists():
        raise UserError(
            f"There is no run to resume in '{directory}': it has no config.json. Check "
            f"training.output_dir, or start without --resume."
        )


@contextlib.contextmanager
def nothing_half_written(directory: Path) -> Iterator[None]:
    """Make the directory of a run for a block that writes it.

    Where the block fails before a checkpoint is saved, what it wrote is removed, so that the same
    command can be given again; files that were there before stay. Where it fails later, everything
    stays. A `UserError` then also says how to go on.
    """
    made = not directory.exists()
    new = [directory / name for name in LOGS if not (directory / name).exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The output directory '{directory}' cannot be made ({error.strerror}). Take another "
            f"training.output_dir."
        ) from error
    try:
        yield
    except BaseException as error:
        saved = _saved_steps(directory)
        if not saved:
            for path in new:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            if made and not any(directory.iterdir()):
                directory.rmdir()
        if not isinstance(error, UserError):
            raise
        how = "Nothing had been saved yet: once this is mended, give the same command again."
        if saved:
            newest = directory / "checkpoints" / str(max(saved))
            how = f"The last good checkpoint is '{newest}': once this is mended, add --resume."
        raise UserError(f"{error} {how}") from error


def _saved_steps(directory: Path) -> list[int]:
    """Return the steps with a whole checkpoint; one that is being written has another name."""
    return [int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdigit()]
