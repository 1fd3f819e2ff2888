"""Several processes train as one does, stop together, and end together."""

import fcntl
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import lines, make_base, make_config, make_data, run, same_run
from safetensors.numpy import load_file
from several import (
    OURS,
    Started,
    environment,
    free_port,
    programs,
    started,
    wait_until,
    written,
)

from vlm_jax import UserError
from vlm_jax.cli import main
from vlm_jax.distributed import processes
from vlm_jax.sharding import share_of
from vlm_jax.train.mesh import mesh_of

pytestmark = pytest.mark.exact

NUMBERS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "epoch")
LONG = ("--config.training.max_steps=40", "--config.training.save_steps=5",
        "--config.training.save_total_limit=0")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny checkpoint, records and a config of 4 steps of 8 packed rows."""
    place = tmp_path_factory.mktemp("processes")
    make_base(place / "base")
    make_data(place / "data", count=40)
    (place / "config.json").write_text(
        json.dumps(
            {
                "model": {"name_or_path": str(place / "base")},
                "lora": {"r": 2},
                "data": {
                    "train_file": str(place / "data/train.jsonl"),
                    "max_shapes": 1,
                    "packing": True,
                    "max_seq_length": 64,
                },
                "training": {
                    "max_steps": 4,
                    "learning_rate": 1e-2,
                    "logging_steps": 1,
                    "save_steps": 2,
                    "bf16": False,
                    "gradient_checkpointing": False,
                    "report_to": "none",
                },
                "evaluation": {"accuracy": False},
                "mesh": {"data": 2, "fsdp": 4},
            }
        )
    )
    return place


def go(place, name, count, *options, devices=8, **env):
    """Run to the end in `count` processes of 8 devices in all; return the run's directory."""
    config = place / "config.json"
    with started(place, config, name, count, *options, devices=devices, **env) as group:
        for one in group:
            assert one.ended() == 0, one.text
    return place / name


@pytest.fixture(scope="module")
def long(place):
    """The long run in two processes without a stop: its directory."""
    return go(place, "long", 2, *LONG)


def compare(one, other):
    """Assert that two runs gave the same numbers and adapter; return whether to the bit."""
    ours, theirs = (lines(directory / "metrics.jsonl") for directory in (one, other))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            [mine[k] for k in NUMBERS], [its[k] for k in NUMBERS], rtol=1e-6, err_msg=str(mine)
        )
    ours, theirs = (
        load_file(directory / "adapter/adapter_model.safetensors") for directory in (one, other)
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6, err_msg=name)
    return all(np.array_equal(ours[name], theirs[name]) for name in ours)


def saving(places):
    """Return whether a checkpoint is being written."""
    return any("tmp" in path.name for path in places.iterdir())


def test_two_processes_train_stop_and_go_on_as_one_process_does(place):
    """In short what follows, which is also about four processes, kills and evaluations."""
    config = f"--config={place / 'config.json'}"
    short = (
        *("--config.training.max_steps=40", "--config.training.learning_rate=1e-4"),
        "--config.mesh.devices=2",
        *("--config.mesh.data=1", "--config.mesh.fsdp=2"),
    )
    alone, directory = place / "alone", place / "two"
    assert main(["train", config, *short, f"--config.training.output_dir={alone}"]) == 0
    with started(place, place / "config.json", "two", 2, *short, devices=2) as group:
        wait_until(lambda: written(directory / "metrics.jsonl") >= 2, group)
        group[1].process.send_signal(signal.SIGTERM)
        assert [one.ended() for one in group] == [130, 130], [one.text for one in group]
    assert not (directory / "adapter").exists()
    out = f"--config.training.output_dir={directory}"
    assert main(["train", config, *short, out, "--resume"]) == 0
    compare(alone, directory)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "count, mesh",
    [
        (2, ("data=2", "fsdp=4")),
        (4, ("data=2", "fsdp=4")),
        (2, ("data=2", "fsdp=2", "tensor=2")),
        (2, ("data=1", "fsdp=1", "tensor=2", "context=4")),  # a row's tokens in both processes
    ],
)
def test_several_processes_train_as_one_does(place, count, mesh):
    # At 1e-2 Adam's first steps make of one rounding, or another, 1e-6 of the next gradient.
    options = ["--config.training.learning_rate=1e-3", *(f"--config.mesh.{size}" for size in mesh)]
    evaluated = len(mesh) == 3
    if evaluated:  # and takes the step of the greater loss, which is not the last one
        options += (
            f"--config.data.eval_file={place / 'data/train.jsonl'}",
            "--config.training.per_device_eval_batch_size=1",
            "--config.training.eval_steps=2",
            "--config.training.load_best_model_at_end=true",
            "--config.training.greater_is_better=true",
            "--config.evaluation.accuracy=true",
            "--config.evaluation.batch_size=6",
        )
    name = "-".join(mesh)
    one = place / name
    if not one.exists():
        go(place, name, 1, *options)
    several = go(place, f"{name} in {count}", count, *options)
    compare(one, several)
    mine, its = (lines(directory / "evaluations.jsonl") for directory in (one, several))
    assert [row["step"] for row in mine] == [row["step"] for row in its]
    assert [row["step"] for row in mine] == ([2, 4] if evaluated else [])
    for one, other in zip(mine, its, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["accuracy"] == other["accuracy"] and one["examples"] == other["examples"] > 8
    names = {path.name for path in several.iterdir()}
    kept = {"config.json", "metrics.jsonl", "evaluations.jsonl", "checkpoints", "adapter"}
    assert names == (kept | {"best.json"} if evaluated else kept)
    if evaluated:
        assert json.loads((several / "best.json").read_text())["step"] == 2
    assert "Wrote" not in (place / f"{name} in {count}.1.log").read_text()


@pytest.mark.nightly
def test_noise_averages_and_an_early_stop_are_those_of_one_process(place):
    options = (
        "--config.training.learning_rate=1e-3",  # as above
        "--config.lora.dropout=0.1",
        "--config.training.neftune_noise_alpha=5",
        "--config.training.label_smoothing_factor=0.1",
        "--config.training.ema_decay=0.5",
        f"--config.data.eval_file={place / 'data/train.jsonl'}",
        "--config.training.per_device_eval_batch_size=1",
        "--config.training.eval_steps=1",
        "--config.training.greater_is_better=true",  # so that a loss that falls is none the better
        "--config.training.load_best_model_at_end=true",
        "--config.training.early_stopping_patience=2",
        "--config.training.save_steps=1",
    )
    one, two = go(place, "noise", 1, *options), go(place, "noise in 2", 2, *options)
    compare(one, two)
    assert [row["step"] for row in lines(two / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((two / "best.json").read_text())["step"] == 1


@pytest.mark.nightly
def test_a_model_trained_in_full_is_gathered_and_written_by_one_of_several(place):
    full = ("--config.lora.enabled=false", "--config.training.max_steps=2")
    alone, several = (go(place, f"full{count}", count, *full) / "model" for count in (1, 2))
    assert {p.name for p in several.iterdir()} == {p.name for p in alone.iterdir()}
    base = load_file(place / "base/model.safetensors")
    ours, theirs = (load_file(model / "model.safetensors") for model in (several, alone))
    assert ours.keys() == theirs.keys() == base.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6, err_msg=name)
    (head,) = (name for name in ours if name.endswith("embed_tokens.weight"))
    assert np.abs(ours[head] - base[head]).max() > 1e-3


@pytest.mark.nightly
def test_one_that_is_told_to_stop_stops_all_and_the_run_goes_on(place, long):
    config, directory = place / "config.json", place / "stopped"
    with started(place, config, "stopped", 2, *LONG) as group:
        wait_until(lambda: written(directory / "metrics.jsonl") >= 7, group)
        group[1].process.send_signal(signal.SIGTERM)
        assert [one.ended() for one in group] == [130, 130], [one.text for one in group]
        assert "Stopped after step" in group[0].text
    steps = sorted(int(path.name) for path in (directory / "checkpoints").iterdir())
    assert 7 <= steps[-1] < 40 and written(directory / "metrics.jsonl") == steps[-1]
    assert not (directory / "adapter").exists()
    go(place, "stopped", 2, *LONG, "--resume")
    assert compare(long, directory)


@pytest.mark.nightly
def test_one_that_is_told_to_stop_in_an_evaluation_gives_it_up_in_all(place):
    options = (
        f"--config.data.eval_file={place / 'data/train.jsonl'}", "--config.training.eval_steps=2",
        "--config.training.per_device_eval_batch_size=1", "--config.evaluation.accuracy=true",
        "--config.evaluation.batch_size=8", "--config.training.load_best_model_at_end=true",
        "--config.training.greater_is_better=true",  # so that step 2 is the best
    )  # fmt: skip
    whole = go(place, "evaluated", 2, *options)
    config, directory = place / "config.json", place / "given up"
    with started(place, config, "given up", 2, *options) as group:
        # the line of step 2 is written before its evaluation, of ten batches, begins
        wait_until(lambda: written(directory / "metrics.jsonl") >= 2, group)
        group[1].process.send_signal(signal.SIGTERM)
        assert [one.ended() for one in group] == [130, 130], [one.text for one in group]
        assert "Stopped after step 2 of 4, before its evaluation" in group[0].text
    assert written(directory / "evaluations.jsonl") == 0
    go(place, "given up", 2, *options, "--resume")
    same_run(directory, whole)
    assert json.loads((directory / "best.json").read_text())["step"] == 2


@pytest.mark.nightly
def test_one_that_is_killed_ends_all_and_the_run_goes_on(place, long):
    config, directory = place / "config.json", place / "killed"
    with started(place, config, "killed", 2, *LONG, VLM_JAX_HEARTBEAT_TIMEOUT="20") as group:
        places = directory / "checkpoints"
        wait_until(lambda: (places / "10").exists() and saving(places), group)
        group[1].process.kill()
        killed = time.monotonic()
        assert group[0].ended() not in (0, None)
        assert time.monotonic() - killed < 60
        group[0].wait_for("start all processes again, with --resume")
    assert (directory / "checkpoints/10").exists() and not (directory / "adapter").exists()
    saved = max(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())
    shutil.copytree(directory, place / "killed, then alone")
    for path in (directory / f"checkpoints/{saved}/state").rglob("*"):  # and the disk was bad
        if path.is_file():
            path.write_bytes(path.read_bytes()[:1])
    go(place, "killed", 2, *LONG, "--resume")
    assert compare(long, directory)
    said = [(place / f"killed.{number}.log").read_text() for number in range(2)]
    assert f"It is now called 'damaged-{saved}'" in said[0] and "damaged" not in said[1]
    assert {f"damaged-{saved}", f"{saved}"} <= {
        p.name for p in (directory / "checkpoints").iterdir()
    }
    # One process with as many devices goes on too, until rounding grows.
    go(place, "killed, then alone", 1, *LONG, "--resume")
    ours, theirs = (lines(d / "metrics.jsonl") for d in (place / "killed, then alone", long))
    assert ours[saved]["step"] == saved + 1
    np.testing.assert_allclose(ours[saved]["loss"], theirs[saved]["loss"], rtol=1e-6)


@pytest.mark.nightly
def test_what_one_process_cannot_do_ends_all_with_its_words(place):
    """The fifth step's rows hold a damaged image, which one of the two processes reads."""
    make_data(place / "damaged", count=40)
    whole = (place / "damaged/38.png").read_bytes()
    (place / "damaged/38.png").write_bytes(whole[: len(whole) // 2])
    options = (
        f"--config.data.train_file={place / 'damaged/train.jsonl'}", "--config.data.shuffle=false",
        "--config.data.packing=false", *LONG, "--config.training.save_steps=2",
    )  # fmt: skip
    with started(place, place / "config.json", "bad", 2, *options) as group:
        assert [one.ended() for one in group] == [2, 2], [one.text for one in group]
        said = [one.text for one in group]
        assert all("38.png" in text for text in said), said
        assert sum("of 2 stopped the run" in text for text in said) == 1, said
        assert all("Traceback" not in text for text in said), said
    # And before the first checkpoint nothing stays, whichever process it was.
    with started(place, place / "config.json", "early", 2, *options,
                 "--config.training.save_steps=100") as group:  # fmt: skip
        assert [one.ended() for one in group] == [2, 2], [one.text for one in group]
    assert not (place / "early").exists()


SAVES = """
import sys
from vlm_jax.distributed.failures import together

with together(lambda error: 2):
    from test_checkpoint import make_state
    from vlm_jax.distributed import processes
    from vlm_jax.sharding import make_mesh
    from vlm_jax.train.checkpoint import Checkpoints
    from vlm_jax.train.placement import on_mesh

    state = on_mesh(make_state(), make_mesh())
    with Checkpoints(sys.argv[1], {}) as checkpoints:
        for step in (1, 2, 3):
            if step == 2 and processes.is_primary():
                checkpoints.save(step, state, {"what no JSON can hold": object()})
            else:
                checkpoints.save(step, state, {})
"""


@pytest.mark.nightly
def test_a_save_that_one_process_cannot_finish_ends_all(tmp_path):
    """It fails in a thread, and the other process waits for it in one."""
    arguments = ("-c", SAVES, str(tmp_path / "checkpoints"))
    path = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    with programs(tmp_path, arguments, "saves", 2, PYTHONPATH=path) as group:
        assert [one.ended() for one in group] == [1, 1], [one.text for one in group]
        assert "not JSON serializable" in group[0].text
        assert "process 0 of 2 stopped the run" in group[1].text
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == ["1"]


@pytest.mark.nightly
def test_a_second_run_is_refused_and_a_kill_while_saving_leaves_the_save_before(place):
    config, directory = place / "config.json", place / "shared"
    endless = ("--config.training.max_steps=100000", "--config.training.save_steps=1")
    with started(place, config, "shared", 1, *endless) as first:
        wait_until(lambda: written(directory / "metrics.jsonl") >= 3, first)
        arguments = [sys.executable, "-m", "vlm_jax", "train", f"--config={config}", "--resume"]
        second = subprocess.run(
            [*arguments, f"--config.training.output_dir={directory}"],
            env=environment(8), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert second.returncode == 2 and "Another run is at work" in second.stderr, second.stderr
        assert f"process {first[0].process.pid} on" in second.stderr
        assert first[0].process.poll() is None
        places = directory / "checkpoints"
        wait_until(lambda: saving(places), first)
        first[0].process.kill()
        first[0].ended()
    newest = max(int(path.name) for path in places.iterdir() if path.name.isdigit())
    go(place, "shared", 1, f"--config.training.max_steps={newest + 1}", "--resume")
    assert lines(directory / "metrics.jsonl")[-1]["step"] == newest + 1


def test_a_lock_that_a_killed_run_left_holds_nobody_up(place):
    directory = place / "locked"
    directory.mkdir()
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another run is at work"):
            run(place, "locked", "training.max_steps=1")
    assert (directory / ".lock").exists()
    run(place, "locked", "training.max_steps=1")
    assert (directory / "adapter").exists() and not (directory / ".lock").exists()


def test_a_wrong_environment_is_named(monkeypatch):
    names = (processes.ADDRESS, processes.COUNT, processes.NUMBER)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert processes.process_slot() is None
    right = ("localhost:1234", "2", "1")
    for name, value in zip(names, right, strict=True):
        monkeypatch.setenv(name, value)
    assert processes.process_slot() == processes.ProcessSlot("localhost:1234", 2, 1)
    for name, value, words in [
        (names[0], "", "sets JAX_NUM_PROCESSES and JAX_PROCESS_ID, but not JAX_COORDINATOR"),
        (names[1], "", "but not JAX_NUM_PROCESSES"),
        (names[2], "", "but not JAX_PROCESS_ID"),
        (names[2], "2", "JAX_PROCESS_ID is 2, but JAX_NUM_PROCESSES is 2"),
        (names[2], "-1", "JAX_PROCESS_ID is '-1'; expected a whole number"),
        (names[1], "two", "JAX_NUM_PROCESSES is 'two'"),
        (names[0], "localhost", "expected the host and a free port"),
    ]:
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(UserError, match=words):
                processes.process_slot()
    monkeypatch.setenv(names[1], "1")
    assert processes.process_slot() is None


def test_a_process_of_slurm_has_a_device_of_its_own(monkeypatch):
    for name in (processes.ADDRESS, processes.COUNT, processes.NUMBER):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "SLURM_JOB_ID": "1234", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "16",
        "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_NODES": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    slot = processes.process_slot()
    assert (slot.count, slot.number, slot.devices) == (16, 11, (3,))
    assert slot.address.startswith("node1:")


@pytest.mark.nightly
def test_processes_with_different_settings_do_not_train_together(place):
    config = json.loads((place / "config.json").read_text())
    port = free_port()
    group = []
    try:
        for number in range(2):
            config["training"]["seed"] = number
            file = place / f"seed{number}.json"
            file.write_text(json.dumps(config))
            values = (f"localhost:{port}", "2", str(number))
            own = dict(zip(OURS, values, strict=True))
            arguments = [
                *("-m", "vlm_jax", "train"),
                f"--config={file}",
                f"--config.training.output_dir={place / 'odd'}",
            ]
            group.append(Started(arguments, place / f"odd.{number}.log", environment(4, **own)))
        assert [one.ended() for one in group] == [2, 2], [one.text for one in group]
    finally:
        for one in group:
            one.process.kill()
            one.process.wait()
    for one in group:
        assert "'training.seed' is '1' in process 1 and '0' in process 0" in one.text, one.text


def test_what_several_processes_cannot_do_is_refused(place, monkeypatch):
    data = place / "data/train.jsonl"
    made = make_config(place / "base", data, place / "x", "mesh.devices=4")
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(UserError, match=r"call\s+vlm_jax\.distributed\.processes\.start"):
        mesh_of(made)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"mesh\.devices is 4, but 2 processes have 8"):
        mesh_of(made)


@pytest.mark.nightly
def test_a_coordinator_that_is_not_there_and_processes_that_do_not_come(place):
    arguments = [sys.executable, "-m", "vlm_jax", "train", f"--config={place / 'config.json'}"]
    with socket.socket() as taken:
        taken.bind(("localhost", 0))  # nobody listens on it, and nobody else takes it
        held = f"localhost:{taken.getsockname()[1]}"
        for number, address, words in (
            ("1", held, "cannot reach the coordinator"),
            ("0", held, "cannot listen at port"),
            ("0", f"localhost:{free_port()}", "Not all of 2 processes came"),
        ):
            env = dict(zip((processes.ADDRESS, processes.COUNT, processes.NUMBER),
                           (address, "2", number), strict=True))  # fmt: skip
            done = subprocess.run(
                arguments, env=environment(1, **env, VLM_JAX_START_TIMEOUT="3"),
                capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 2, done.stderr
            assert words in done.stderr and address in done.stderr, done.stderr


def test_which_rows_a_process_gives():
    assert share_of(1, [[0], [0], [1], [1]]) == (1, 2)
    assert share_of(1, [[0, 0], [1, 1]]) == (1, 2)
    assert [share_of(p, [[0], [1], [0], [1], [2], [3], [2], [3]]) for p in range(4)] == [
        (0, 4), (1, 4), (2, 4), (3, 4),
    ]  # a pod's mesh goes to and fro between hosts  # fmt: skip
    assert [share_of(p, [[0, 1], [0, 1], [2, 3], [2, 3]]) for p in range(4)] == [
        (0, 2), (0, 2), (1, 2), (1, 2),
    ]  # tensor runs across processes  # fmt: skip
    with pytest.raises(UserError, match=r"process 0: \[0, 1\]; process 1: \[1, 2\].*mesh\.tensor"):
        share_of(0, [[0, 0], [0, 1], [1, 1]])
