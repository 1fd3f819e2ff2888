"""Atomic writes of directories and tensor files."""

import contextlib
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vlm_jax.distributed.interrupts import if_ended
from vlm_jax.errors import explained

# What an adapter's directory is made of, PEFT's or a bottleneck adapter's: a new one replaces all.
ADAPTER_PARTS = ("adapter_model.safetensors", "adapter.safetensors", "modules")


@contextlib.contextmanager
def whole_directory(directory: str | Path, instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary directory whose files move to `directory` when the block ends well.

    Where the block raises, nothing of it remains. Files of the same name are replaced, each in
    one atomic step; other files in an existing directory stay, except weights of the same
    checkpoint in another number of shards, and what the glob patterns of instead_of name: parts
    of an earlier save that would be read with this one. Raises `UserError` where it cannot be made.
    """
    target = Path(directory).expanduser().absolute()
    with explained(
        OSError,
        lambda error: (
            f"The directory '{target}' cannot be made ({error.strerror}: '{error.filename}'). "
            f"Choose another path."
        ),
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary, held = _temporary(target)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, held)
        remove = functools.partial(shutil.rmtree, temporary, ignore_errors=True)
        stack.enter_context(if_ended(remove))
        stack.callback(remove)
        yield temporary
        # Some writers leave files readable by their owner alone.
        for path in (path for path in temporary.iterdir() if not path.is_dir()):
            path.chmod(temporary.stat().st_mode & 0o666)
        if target.exists():
            fresh = {path.name for path in temporary.iterdir()}
            weights = fresh & {"model.safetensors", "model.safetensors.index.json"}
            # Readers differ in whether shards or a single file come first: leave one kind.
            shards = ("model*.safetensors", "model*.index.json") if weights else ()
            found = [old for pattern in (*instead_of, *shards) for old in target.glob(pattern)]
            for path in sorted(temporary.iterdir()):
                if path.is_dir():
                    shutil.rmtree(target / path.name, ignore_errors=True)
                os.replace(path, target / path.name)
            for old in (old for old in found if old.name not in fresh):
                if old.is_dir():
                    shutil.rmtree(old)
                else:
                    old.unlink()
        else:
            os.replace(temporary, target)


PART = ".part"  # the end of the name of a directory or file that is not whole yet


def _temporary(target: Path) -> tuple[Path, int]:
    """Return a new directory beside the target, and a handle whose lock says that it is in use."""
    while True:
        made = target.with_name(f".{target.name}.{secrets.token_hex(8)}{PART}")
        made.mkdir()
        held = os.open(made, os.O_RDONLY)
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(held, fcntl.LOCK_EX)
        if made.is_dir():
            return made, held
        os.close(held)  # another process took it for a leftover before it was locked


def _remove_leftovers(target: Path) -> None:
    """Remove what writers of the target left behind that were killed.

    The system lets go of a lock when its process dies: what can be locked is free.
    """
    # A writer inside a writer has one dot more.
    leftover = re.compile(rf"\.+{re.escape(target.name)}\..*{re.escape(PART)}")
    for path in (path for path in target.parent.iterdir() if leftover.fullmatch(path.name)):
        # It is locked, gone, no directory, or cannot be locked here.
        with contextlib.suppress(OSError):
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(held)


@contextlib.contextmanager
def replacing(path: Path, part: Path) -> Iterator[Path]:
    """Yield `part`, which replaces `path` in one step when the block ends well, and else goes."""
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step: where that fails or is cut short, what was there before stays."""
    with replacing(path, path.with_name(f".{path.name}{PART}")) as part:
        part.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline, as `write_whole` does."""
    write_whole(path, f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode())


def write_shards(
    directory: Path,
    sizes: dict[str, int],
    tensor: Callable[[str], np.ndarray],
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `model.safetensors`, or shards and their index where it exceeds `shard_bytes`.

    sizes: {tensor name: bytes}; tensor(name) makes one array when its shard is written, so that
    no more than one shard is on the host at a time.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: np.ascontiguousarray(tensor(name)) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        del tensors  # before those of the next one are made
    if split.is_sharded:
        write_json(
            directory / "model.safetensors.index.json",
            {"metadata": split.metadata, "weight_map": split.tensor_to_filename},
        )
