"""What a run says and leaves where its disk is full, and which directories it takes."""

import contextlib
import errno
import json
import resource

import jax.numpy as jnp
import pytest
from runs import lines, make_base, make_data, run

from vlm_jax import UserError
from vlm_jax.cli import main
from vlm_jax.files.atomic import write_json
from vlm_jax.train import loop
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.trackers import JsonLines


@contextlib.contextmanager
def no_room():
    """Let this process write nothing past the first ten bytes of any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("middle", ["", '{"st\n'])  # of an earlier kill, after which it went on
def test_a_resume_for_which_there_is_no_room_loses_no_line(tmp_path, middle):
    path = tmp_path / "metrics.jsonl"
    old = f'{{"step": 1}}\n{middle}{{"step": 2}}\n{{"step": 3}}\n'
    path.write_text(old)
    with no_room(), pytest.raises(OSError) if middle else contextlib.nullcontext():
        JsonLines(path, resume_step=2).close()
    # Lines after the kept ones are cut off in place; others take a new file, or stay.
    assert path.read_text() == (old if middle else '{"step": 1}\n{"step": 2}\n')
    assert list(tmp_path.iterdir()) == [path]
    JsonLines(path, resume_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_json_for_which_there_is_no_room_leaves_the_old_one(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"old": "settings of a run"})
    old = path.read_bytes()
    with no_room(), pytest.raises(OSError):
        write_json(path, {"new": "settings of a run"})
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["of the system", "in words"])
def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, kind):
    make_base(tmp_path / "base")
    make_data(tmp_path / "data")
    straight = run(tmp_path, "straight")[1]
    save = Checkpoints.save

    def full(self, step, *rest):
        if step == 4:
            if kind == "in words":
                raise ValueError("INTERNAL: error writing 'x': No space left on device")
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise RuntimeError("the save failed") from error
        return save(self, step, *rest)

    monkeypatch.setattr(loop.Checkpoints, "save", full)
    with pytest.raises(UserError, match=r"no room left on the disk of .*checkpoints/2'.*--resume"):
        run(tmp_path, "full")
    monkeypatch.undo()
    outcome = run(tmp_path, "full", resume=True)[0]
    assert outcome["steps"] == 4
    ours, theirs = (lines(d / "metrics.jsonl") for d in (tmp_path / "full", straight))
    assert json.dumps([row["loss"] for row in ours]) == json.dumps([row["loss"] for row in theirs])


def test_a_save_without_room_prints_nothing_of_its_threads(tmp_path, capfd):
    """The run tells it in a sentence; orbax's threads and tensorstore's would add tracebacks."""
    checkpoints = Checkpoints(tmp_path, {})
    state = {f"leaf{n}": jnp.full(5000, n, jnp.float32) for n in range(8)}
    with no_room(), pytest.raises(Exception, match="File too large"):
        checkpoints.save(1, state, {})
        checkpoints.finish()
    assert "Traceback" not in capfd.readouterr().err


def test_a_machine_without_memory_is_told_in_a_sentence(monkeypatch, tmp_path, capsys):
    def ends(*_):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(loop, "places_of", ends)
    assert main(["train", f"--config={write_config(tmp_path)}"]) == 2
    said = capsys.readouterr().err
    assert "ran out of memory (std::bad_alloc)" in said and said.count("\n") == 1


def write_config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {name_or_path: x}\n")
    return file
