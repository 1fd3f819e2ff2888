"""The strict session: eight CPU devices, no implicit promotion. Set before anything imports jax."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# A sum of two ranks or of two dtypes raises, in the tests and in the processes they start.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test never asks the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One cache of compiled programs for the workers of a session and the processes that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="vlm_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest
from costs import Costs
from skips import Skips
from without_torch import WithoutTorch


def pytest_addoption(parser):
    told = "leave out the tests that import torch, peft, bitsandbytes or trl, and name them"
    parser.addoption("--without-torch", action="store_true", help=told)


def pytest_configure(config):
    config.pluginmanager.register(Costs())
    config.pluginmanager.register(Skips())
    if config.getoption("without_torch"):
        config.pluginmanager.register(WithoutTorch())


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A directory with a tiny checkpoint in base/ and drawn records in data/, for whole runs."""
    import runs

    place = tmp_path_factory.mktemp("runs")
    runs.make_base(place / "base")
    runs.make_data(place / "data")
    return place


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
