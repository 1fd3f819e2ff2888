"""The strict session: eight CPU devices, no rank promotion. Set before anything imports jax."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["HF_HUB_OFFLINE"] = "1"  # a test never asks the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A directory with a tiny checkpoint in base/ and drawn records in data/, for whole runs.

    Compilations are cached on disk: runs here compile the same few programs.
    """
    import runs

    place = tmp_path_factory.mktemp("runs")
    runs.make_base(place / "base")
    runs.make_data(place / "data")
    jax.config.update("jax_compilation_cache_dir", str(place / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield place
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def straight(place):
    """A run of 4 steps over two shapes, with evaluation: (outcome, run directory, printed text)."""
    import runs

    return runs.run(
        place,
        "straight",
        "data.max_shapes=2",
        "evaluation.max_new_tokens=3",
        "training.report_to=tensorboard",
        f"data.eval_file={place / 'data/train.jsonl'}",
    )
