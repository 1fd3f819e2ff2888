"""Checkpoints in a bucket of Google Cloud Storage, which an emulator on this machine gives."""

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from runs import lines, make_base, make_data, run
from safetensors.numpy import load_file
from several import free_port, started, wait_until, written

from vlm_jax import UserError, config
from vlm_jax.train import loop, metrics
from vlm_jax.train.results import load_run
from vlm_jax.train.run_dir import places_of


@pytest.fixture(scope="module")
def bucket():
    """The variables of an emulator that has one bucket, "bucket"."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(Path(__file__).parent / "bucket_server.py"), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/storage/v1/b/bucket")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            env = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
            env["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # would ask Google for the bucket
            for name, value in env.items():
                patch.setenv(name, value)
            yield env
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny checkpoint, records, and a run whose checkpoints lie on a disk."""
    place = tmp_path_factory.mktemp("bucket")
    make_base(place / "base")
    make_data(place / "data")
    run(place, "straight")
    return place


def stop_after(monkeypatch, step):
    push = metrics.Watch.push

    def push_and_interrupt(self, now, *rest):
        if now == step:
            signal.raise_signal(signal.SIGINT)
        return push(self, now, *rest)

    monkeypatch.setattr(loop.Watch, "push", push_and_interrupt)


def test_a_run_goes_on_from_a_bucket_though_its_directory_is_lost(place, bucket, monkeypatch):
    there = "training.checkpoint_dir=gs://bucket/runs/first"
    stop_after(monkeypatch, 3)
    outcome, directory, text = run(place, "first", there, resume="auto")
    assert outcome["interrupted"] and "saved 'gs://bucket/runs/first/3'" in text
    assert not (directory / "checkpoints").exists()
    monkeypatch.undo()
    assert load_run(directory)[2].training.checkpoint_dir == "gs://bucket/runs/first"
    shutil.rmtree(directory)
    with pytest.raises(UserError, match="'gs://bucket/runs/first' is already a run's .process"):
        run(place, "first", there)
    with pytest.raises(UserError, match="'gs://bucket/runs/first/3' cannot be resumed.*lora.rank"):
        run(place, "first", there, "lora.r=4", resume=True)

    outcome, directory, text = run(place, "first", there, resume="auto")
    assert outcome["steps"] == 4 and "from step 3" in text
    assert [row["step"] for row in lines(directory / "metrics.jsonl")] == [4]
    ours, theirs = (lines(place / name / "metrics.jsonl")[-1] for name in ("first", "straight"))
    assert ours["loss"] == theirs["loss"]
    file = "adapter/adapter_model.safetensors"
    assert (directory / file).read_bytes() == (place / "straight" / file).read_bytes()


def test_old_checkpoints_go_and_a_damaged_one_is_put_aside(place, bucket):
    there = "training.checkpoint_dir=gs://bucket/runs/second"
    _, directory, _ = run(place, "second", there, "training.max_steps=6")
    kept = places_of(config.load(directory / "config.json")).checkpoints
    assert kept.as_posix() == "gs://bucket/runs/second"
    names = {path.name for path in kept.iterdir()}
    assert names >= {"4", "6"} and "2" not in names
    (kept / "6" / "meta" / "metadata").unlink()
    _, _, text = run(place, "second", there, "training.max_steps=6", resume=True)
    assert "It is now called 'damaged-6'" in " ".join(text.split()) and "from step 4" in text
    assert {"4", "6", "damaged-6"} <= {path.name for path in kept.iterdir()}


def test_the_last_run_that_came_writes(place, bucket, monkeypatch):
    there = "training.checkpoint_dir=gs://bucket/runs/third"
    push = metrics.Watch.push

    def another_comes(self, step, *rest):
        if step == 3:
            places_of(config.load(None, [there])).claim()
        return push(self, step, *rest)

    monkeypatch.setattr(loop.Watch, "push", another_comes)
    with pytest.raises(UserError, match="Another run writes its checkpoints .*process .* on "):
        run(place, "third", there)
    assert places_of(config.load(None, [there])).saved_steps() == [2]


@pytest.mark.nightly
def test_several_processes_need_no_shared_directory(place, bucket):
    """One is killed; the run goes on from the bucket with another number of processes."""
    settings = {
        "model": {"name_or_path": str(place / "base")},
        "lora": {"r": 2},
        "data": {"train_file": str(place / "data/train.jsonl"), "max_shapes": 1},
        "training": {
            "max_steps": 24,
            "logging_steps": 1,
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "bf16": False,
            "report_to": "none",
            "checkpoint_dir": "gs://bucket/runs/several",
        },
        "mesh": {"data": 1, "fsdp": 4},
    }
    (place / "several.json").write_text(json.dumps(settings))
    with started(place, place / "several.json", "several", 2, devices=4, **bucket) as group:
        metrics = place / "several" / "metrics.jsonl"
        wait_until(lambda: written(metrics) >= 7, group)
        group[1].process.kill()
        assert group[0].ended() != 0
    steps = places_of(config.load(place / "several.json")).saved_steps()
    assert steps and max(steps) >= written(metrics) - 4
    for name in ("several", "alone"):
        more = ("--resume",) if name == "several" else ("--config.training.checkpoint_dir=",)
        with started(place, place / "several.json", name, 1, *more, devices=4, **bucket) as group:
            assert group[0].ended() == 0, group[0].text
    ours, theirs = (
        load_file(place / name / "adapter/adapter_model.safetensors")
        for name in ("several", "alone")
    )
    for name in ours:
        assert abs(ours[name] - theirs[name]).max() < 1e-6, name


def test_addresses_that_no_checkpoint_can_lie_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(setting, words):
        with pytest.raises(UserError, match=words):
            loop.train(config.load(None, [setting]))
        assert not list(tmp_path.iterdir())

    refused("training.output_dir=gs://bucket/run", "give a directory.*checkpoint_dir")
    for place in ("s3://bucket/run", "gs:/bucket/run", "a/directory"):
        refused(f"training.checkpoint_dir={place}", "expected the address of a bucket")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("training.checkpoint_dir=gs://bucket/run", r"needs the package gcsfs.*vlm_jax\[gcs\]")


def test_a_bucket_that_cannot_be_written_is_named_before_anything_is_compiled(
    place, bucket, monkeypatch
):
    monkeypatch.setattr(loop, "build", None)
    with pytest.raises(UserError, match="'gs://none/run' cannot be reached: .*checkpoint_dir"):
        run(place, "none", "training.checkpoint_dir=gs://none/run")
    assert not (place / "none").exists()
