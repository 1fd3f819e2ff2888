"""A run is read back over several devices where one has no room for it, to the same files."""

import shutil

import jax
import numpy as np
import pytest
from runs import make_config, run

import vlm_jax
from vlm_jax.train import mesh
from vlm_jax.train import results as exporting
from vlm_jax.train.mesh import mesh_for_reading
from vlm_jax.train.setup import make_encoder

SPREAD = (
    *("mesh.devices=8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "training.max_steps=1"),
    *("training.per_device_train_batch_size=1", "training.lr_scheduler_type=constant"),
)


@pytest.fixture(scope="module", params=["dense", "nf4-dq"])
def trained(request, place):
    more = () if request.param == "dense" else ("model.quantize=nf4-dq",)
    return run(place, f"spread {request.param}", *SPREAD, *more)[1]


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def share(params):
    """Return the devices that hold parts of a tree, and the share of its bytes on the first."""
    leaves = jax.tree.leaves(params)
    devices = set().union(*(leaf.sharding.device_set for leaf in leaves))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return len(devices), held / sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("finished", [True, False])
def test_files_are_those_of_one_device(trained, tmp_path, monkeypatch, finished):
    directory = tmp_path / "run"
    shutil.copytree(trained, directory)
    if not finished:  # then its checkpoint is read, without the optimizer's state
        shutil.rmtree(directory / "adapter")
        monkeypatch.setattr(exporting.Checkpoints, "restore", None)
    lay, logits = [], exporting._logits

    def looking(model, params, batch):
        lay.append(share(params))
        return logits(model, params, batch)

    monkeypatch.setattr(exporting, "_logits", looking)
    # Answers would take most of the time; test_cli.py asks for them, and below they are spread.
    monkeypatch.setattr(exporting, "_answers", lambda *given: np.zeros((1, 1)))
    kinds = {"adapter": (False,), "merged": (True,)}
    if "nf4" in trained.name:
        kinds["quantized"] = (True, True)
    for name, options in kinds.items():
        report = exporting.export(directory, tmp_path / name, *options)
        assert report.difference < 1e-4 or name == "quantized"
    # The run and what is read back: a quarter of the matrices each, and small leaves whole.
    assert len(lay) == 2 * len(kinds)
    assert all(devices == 4 and held < 0.5 for devices, held in lay), lay
    monkeypatch.setattr(exporting, "mesh_for_reading", lambda config: None)
    for name, options in kinds.items():
        exporting.export(directory, tmp_path / f"{name} of one", *options)
        assert lay[-1] == (1, 1.0)
        assert files(tmp_path / name) == files(tmp_path / f"{name} of one"), name


def test_an_answer_from_several_devices_is_that_of_one(trained, monkeypatch):
    answers = []
    for devices in (4, 1):
        model, params, config = exporting.load_run(trained)
        assert share(params)[0] == devices
        batch = exporting.probe(make_encoder(config, model))
        answers.append(vlm_jax.generate(model, params, batch, 3))
        monkeypatch.setattr(exporting, "mesh_for_reading", lambda config: None)
    np.testing.assert_array_equal(*answers)


def test_the_mesh_is_the_runs_own_without_copies_or_as_few_devices_as_have_room(place, monkeypatch):
    def sizes(*overrides):
        made = make_config(place / "base", place / "data/train.jsonl", place / "x", *overrides)
        found = mesh_for_reading(made)
        return found and {name: size for name, size in found.shape.items() if size > 1}

    assert sizes(*SPREAD) == {"fsdp": 2, "tensor": 2}
    assert sizes("mesh.devices=1") is None
    assert sizes("mesh.devices=0") is None  # copies on eight devices
    assert sizes("mesh.devices=0", "mesh.fsdp=16") is None  # a pod's, and one device has room
    monkeypatch.setattr(mesh, "memory_of", lambda device: 100_000)
    for pod in ("mesh.fsdp=1", "mesh.fsdp=16", "mesh.fsdp=-1", "mesh=auto"):
        assert sizes("mesh.devices=0", pod) == {"fsdp": 8}, pod
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert sizes(*SPREAD) is None
