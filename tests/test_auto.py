"""`training.remat_policy: auto`: the fastest policy and micro-batch that fit, kept at a resume."""

from types import SimpleNamespace

import numpy as np
import pytest
from runs import make_base, make_data, run, write_recipe

from vlm_jax import config, plan
from vlm_jax.cli import main
from vlm_jax.files.limits import read_json
from vlm_jax.hardware import DEVICES, device_of, hardware
from vlm_jax.models.layers.remat import FASTEST
from vlm_jax.plan.step import abstract_mesh
from vlm_jax.train import mesh
from vlm_jax.train.compile import OPTIONS, options_for
from vlm_jax.train.fingerprint import BATCH, chosen_settings, resumed
from vlm_jax.train.run_dir import places_of

ORDER = FASTEST["tpu"]
# Bytes that a row takes with each of them.
EACH = {"products": 60, "gate": 40, "residual": 20, "qkv": 15, "block": 5, "offload": 1}


@pytest.mark.parametrize(
    ("memory", "sizes", "chosen"),
    [
        (1000, [1, 2, 4], ("products", 4)),
        (10 + 60, [1, 2, 4], ("products", 1)),  # to the byte
        (10 + 59, [1, 2, 4], ("gate", 1)),  # one of these rather than two that keep less
        (10 + 59, [2, 4], ("residual", 2)),
        (10 + 19, [1], ("qkv", 1)),
        (10 + 4, [1, 2], ("offload", 2)),
        (0, [1, 2], ("offload", 1)),  # nothing fits by estimate: what needs least is tried
    ],
)
def test_the_first_policy_that_fits_with_as_many_rows_as_fit(memory, sizes, chosen):
    found = mesh.fastest(lambda policy, rows: 10 + rows * EACH[policy], ORDER, sizes, memory)
    assert found == (*chosen, 10 + chosen[1] * EACH[chosen[0]])


@pytest.mark.parametrize(
    ("batch", "parts", "tokens", "at_once", "sizes"),
    [
        (4, 1, 2048, None, [1, 2, 4]),  # no more than the config has
        (2, 6, 2048, None, [1, 2]),
        (4, 1, 2048, 2048, [1]),
        (1, 8, 512, 2048, [1, 2, 4]),  # more than it has
        (6, 1, 512, 2048, [1, 2, 3]),  # divisors of the rows of a step alone
        (4, 1, 4096, 2048, [1]),  # a row is not split
        (1, 1, 128, 2048, [1]),
    ],
)
def test_rows_at_once_divide_those_of_a_step(batch, parts, tokens, at_once, sizes):
    made = config.load(
        None,
        {
            "training.per_device_train_batch_size": batch,
            "training.gradient_accumulation_steps": parts,
        },
    )
    assert mesh.sizes_at_once(made, tokens, at_once) == sizes


@pytest.mark.parametrize(
    ("recipe", "topology", "chosen"),
    [
        ("lora", "v5e:2x2", ("products", 1)),  # 8,192 tokens as four times 2,048
        ("qlora", "v5e:2x2", ("products", 1)),
        ("qlora", "v5e:1x1", ("residual", 1)),
        ("lora", "v5p:2x2x1", ("products", 4)),  # at once
        ("lora", "h100:1", ("products", 4)),
        ("lora", "rtx4090:8", ("products", 2)),
    ],
)
def test_what_is_chosen_for_a_7b(recipe, topology, chosen):
    """4 rows of 2,048 tokens a device and step, each with an image of 1,024 patches."""
    machine = hardware(topology)
    made = config.load(
        f"configs/qwen2_vl_7b_{recipe}.py",
        {
            **{"mesh.auto": False, "mesh.data": 1, "mesh.fsdp": machine.count, "lora.r": 64},
            **{"data.max_seq_length": 2048, "data.max_pixels": 1024 * 14 * 14},
            "training.per_device_train_batch_size": 4,
            "training.gradient_accumulation_steps": 1,
        },
    )
    is_tpu = DEVICES[machine.device].is_tpu
    over = mesh.mesh_of(made, plan.devices(topology)) if is_tpu else abstract_mesh(made, machine)
    choice = mesh.choose(made, over, None if is_tpu else machine)
    assert (choice.policy, choice.rows) == chosen


def test_devices_are_known_by_what_jax_calls_them():
    assert device_of("TPU v5 lite") is device_of("TPU v5e") is DEVICES["v5e"]
    assert device_of("TPU v5") is device_of("TPU v5p") is DEVICES["v5p"]
    assert device_of("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert device_of("NVIDIA A100-SXM4-40GB") is DEVICES["a100-40gb"]
    assert device_of("NVIDIA GeForce RTX 4090") is DEVICES["rtx4090"]
    assert device_of("NVIDIA RTX A6000") is DEVICES["a6000"]
    assert device_of("NVIDIA RTX A4000") is device_of("NVIDIA L40") is device_of("cpu") is None
    for kind, options in OPTIONS.items():
        for name in (kind, *(f"TPU {name}" for name, one in DEVICES.items() if one.kind == kind)):
            devices = np.array([SimpleNamespace(device_kind=name)])
            assert options_for(SimpleNamespace(devices=devices)) == options


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("auto")
    make_base(directory / "base", layers=2)
    make_data(directory / "data")
    return directory


SETTINGS = ("training.remat_policy=auto", "training.lr_scheduler_type=constant")


def test_a_run_keeps_what_was_chosen_for_it(place, monkeypatch, capsys):
    recipe = write_recipe(place, place / "base", place / "data/train.jsonl", *SETTINGS)
    command = ["train", "--config", str(recipe)]

    def began():
        t = read_json(place / "out/config.json")["training"]
        return tuple(t[key] for key in ("remat_policy", *BATCH))

    monkeypatch.setattr(mesh, "memory_of", lambda device: 0)
    assert main([*command, "--training.max_steps=1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "remat policy block and 1 row at a time on a device, in 2 micro-batches a step" in said
    assert began() == ("block", 1, 2)

    # There is room for all now, but a resumed run is the run that it was.
    monkeypatch.undo()
    assert main([*command, "--resume", "--training.max_steps=2"]) == 0
    said = capsys.readouterr().out
    assert "training.remat_policy=auto: block, as the run began" in said
    assert "remat policy" not in said and began() == ("block", 1, 2)

    # So it is where the run's config.json is lost, as a bucket's may be: its checkpoint says it.
    (place / "out/config.json").rename(place / "kept.json")
    asked = config.load(recipe)
    found, _ = resumed(asked, places_of(asked))
    assert tuple(chosen_settings(found).values()) == ("block", 1, 2)
    (place / "out/config.json").write_text('{"training": {}}')
    found, _ = resumed(asked, places_of(asked))
    assert chosen_settings(found)["remat_policy"] == "block"
    (place / "kept.json").rename(place / "out/config.json")

    # Another policy changes no number, other micro-batches would.
    forced = [*command, "--resume", "--training.max_steps=3", "--training.remat_policy=none"]
    assert main(forced) == 2
    assert "gradient_accumulation_steps' was 2" in capsys.readouterr().err
    sizes = ["--training.per_device_train_batch_size=1", "--training.gradient_accumulation_steps=2"]
    assert main([*forced, *sizes]) == 0
    assert "began with training.remat_policy=block and now has none" in capsys.readouterr().out


def test_a_cpu_with_room_recomputes_no_product(place):
    *_, said = run(place, "roomy", *SETTINGS, "training.max_steps=1")
    assert "remat policy products and 2 rows at a time" in said
