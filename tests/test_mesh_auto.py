"""`mesh: auto`: as few devices share a copy of the parameters as hold it, the rest are copies."""

from types import SimpleNamespace

import jax
import pytest

from vlm_jax import UserError, config
from vlm_jax.cli import main
from vlm_jax.hardware import DEVICES, GB, hardware
from vlm_jax.train import mesh
from vlm_jax.train.mesh import memory_of, mesh_of, sizes_of

LORA = {"mesh.auto": True, "lora.r": 16, "data.max_pixels": 200704}


def picked(model, where, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    made = config.load(None, {"model.name_or_path": model, **LORA, **changes})
    machine = hardware(where)
    sizes = sizes_of(made, machine.count, DEVICES[machine.device].usable)
    return {name: size for name, size in sizes.items() if size > 1}


def test_parameters_are_spread_only_as_far_as_memory_asks_for():
    two, seven, large = (f"Qwen/Qwen2-VL-{size}-Instruct" for size in ("2B", "7B", "72B"))
    assert picked(two, "v5e-4") == {"data": 4}
    assert picked(seven, "v5e-4") == {"data": 2, "fsdp": 2}
    assert picked(seven, "v5e-4", model__quantize="nf4-dq") == {"data": 4}
    assert picked(seven, "h100:8") == {"data": 8}
    assert picked(seven, "h100:8", lora__enabled=False) == {"data": 2, "fsdp": 4}
    assert picked(large, "v5e-16") == {"fsdp": 16}
    assert picked(large, "v5e-16", mesh__tensor=4) == {"fsdp": 4, "tensor": 4}
    llava = "llava-hf/llava-1.5-7b-hf"  # of whose sizes, all powers of 2 but one, 6 divides none
    assert picked(llava, "rtx4090:6", lora__enabled=False) == {"data": 3, "fsdp": 2}


def test_it_is_a_word_for_the_section_in_files_and_on_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("mesh: auto\ntraining: {seed: 3}\n")
    assert config.load(file).mesh.auto
    assert config.load(None, ["mesh=auto"]).mesh.auto
    file.write_text("mesh: most\n")
    with pytest.raises(UserError, match="'mesh' in .* is a section"):
        config.load(file)


def test_what_it_picks_cannot_be_set_too(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("model: {name_or_path: Qwen/Qwen2-VL-2B-Instruct}\n")
    flags = ["--config.mesh=auto", "--config.mesh.fsdp=4", "--config.data.max_pixels=200704"]
    assert main(["plan", "--config", str(file), "--topology", "rtx4090", *flags]) == 2
    assert "mesh.auto picks mesh.data and mesh.fsdp" in capsys.readouterr().err


def test_memory_is_asked_of_the_device_or_looked_up_by_its_kind():
    def device(kind, stats=None, platform="gpu"):
        return SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats)

    assert memory_of(device("TPU v5 lite", platform="tpu")) == DEVICES["v5e"].usable
    assert memory_of(device("NVIDIA H100 80GB HBM3")) == DEVICES["h100"].usable
    assert memory_of(device("NVIDIA H100 80GB HBM3", {"bytes_limit": 7 * GB})) == 7 * GB
    assert memory_of(device("NVIDIA A100-SXM4-40GB")) == DEVICES["a100-40gb"].usable
    assert memory_of(device("NVIDIA A100-SXM4-80GB")) == DEVICES["a100"].usable
    assert memory_of(device("NVIDIA L40S")) == DEVICES["l40s"].usable
    with pytest.raises(UserError, match="how much memory a 'TPU v99' has"):
        memory_of(device("TPU v99", platform="tpu"))


@pytest.mark.parametrize("memory, fsdp", [(80 * GB, 1), (6 * GB, 2), (GB, 4)])
def test_the_mesh_over_devices_is_the_one_picked_by_their_memory(monkeypatch, memory, fsdp):
    made = config.load(None, {"model.name_or_path": "Qwen/Qwen2-VL-2B-Instruct", **LORA})
    monkeypatch.setattr(mesh, "memory_of", lambda device: memory)
    assert dict(mesh_of(made, jax.devices()[:4]).shape) == {
        "data": 4 // fsdp, "fsdp": fsdp, "tensor": 1, "context": 1
    }  # fmt: skip


@pytest.mark.parametrize("sizes", [{"mesh.context": 2}, {"mesh.tensor": -1}])
def test_what_cannot_be_estimated_is_refused(sizes):
    with pytest.raises(UserError, match=r"of which it knows nothing with mesh\.context"):
        picked("Qwen/Qwen2-VL-2B-Instruct", "v5e-4", **sizes)
