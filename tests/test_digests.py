"""A base is known by its tensors, each of them, without being read whole."""

import numpy as np
from safetensors.numpy import save_file

from vlm_jax.train import fingerprint
from vlm_jax.train.fingerprint import base_identity

MIB = 1 << 20
NAMES = ["embed", *(f"layers.{n}.q_proj" for n in range(6)), "norm"]


def write(directory, changed=None, names=NAMES):
    """Write tensors of a mebibyte, of which one differs all over, as where a LoRA is merged."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    tensors = {name: np.full((512, 512), 1, np.float32) for name in names}
    if changed is not None:
        tensors[changed] += 1e-3
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_change_of_any_tensor_is_seen_wherever_it_lies(tmp_path):
    found = [base_identity(write(tmp_path / str(name), name)) for name in (None, *NAMES)]
    assert base_identity(write(tmp_path / "again")) == found[0]
    digests_of_weights = [one["model.safetensors"] for one in found]
    assert len(set(digests_of_weights)) == len(NAMES) + 1
    assert len({one["config.json"] for one in found}) == 1


def test_other_names_another_config_and_the_end_of_a_tensor_are_seen(tmp_path):
    before = base_identity(write(tmp_path))
    renamed = base_identity(write(tmp_path, names=[*NAMES[:-1], "mean"]))
    assert renamed["model.safetensors"] != before["model.safetensors"]
    write(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert base_identity(tmp_path)["config.json"] != before["config.json"]
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-3 * MIB - 1] ^= 1  # the last byte of a tensor
    (tmp_path / "model.safetensors").write_bytes(data)
    assert base_identity(tmp_path)["model.safetensors"] != before["model.safetensors"]


def test_little_is_read(tmp_path):
    with open(write(tmp_path) / "model.safetensors", "rb") as file:
        lengths = [length for _, length in fingerprint._samples(file)]
    assert len(lengths) == 1 + 3 * len(NAMES) and sum(lengths) < 8 * MIB / 100


def test_what_is_no_safetensors_file_is_sampled_as_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for content in (b"", bytes(100), b"version https://git-lfs.github.com/spec/v1 oid sha256:1"):
        (tmp_path / "model.safetensors").write_bytes(content)
        before = base_identity(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(content[:-1] + b"x")
        assert base_identity(tmp_path) != before
