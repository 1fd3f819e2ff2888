"""What a run says and leaves where its disk is full, and which directories it takes."""

import errno
import json

import pytest
from runs import lines, make_base, make_data, run

from vlm_jax import UserError
from vlm_jax.train import loop
from vlm_jax.train.checkpoint import Checkpoints


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
