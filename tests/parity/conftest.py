"""Parity by chunks too: each test of models once more with `chunked` as the only attention.

The fast tier runs a few of those, nightly all of them.
"""

import jax
import pytest

from vlm_jax.models.layers.attention import KERNELS, chunked, recorded

# Files whose tests run models, and the tests among them that the fast tier runs by chunks.
OF_MODELS = ("test_logits", "test_peft", "test_bottleneck", "test_lora_kin", "test_qlora")
FAST = (
    "test_qwen2_vl_generates_the_same_ids",
    "test_qwen2_vl_variants",
    "test_gemma3_logits",
    "test_twenty_steps_of_lora_plus",
)
BLOCK = 16  # rows here are short


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__ in OF_MODELS:
        marks = () if metafunc.function.__name__ in FAST else pytest.mark.nightly
        table = pytest.param(None, id=pytest.HIDDEN_PARAM)
        one = pytest.param("chunked", marks=marks)
        metafunc.parametrize("kernel", [table, one], indirect=True)


@pytest.fixture(autouse=True)
def kernel(request, monkeypatch):
    """Compute every attention by the one kernel, or as the table chooses."""
    forced = getattr(request, "param", None)
    if forced is None:
        yield
        return
    table = dict(KERNELS)
    for name in table.keys() - {forced}:
        del KERNELS[name]
    monkeypatch.setitem(chunked.BLOCKS, "cpu", (BLOCK, BLOCK))
    jax.clear_caches()  # of programs that were traced with others
    with recorded() as chosen:
        yield
    jax.clear_caches()
    KERNELS.clear()
    KERNELS.update(table)  # in its order, by which it chooses
    assert all(line.startswith(forced) for line in chosen)
    assert chosen or request.function.__name__ not in FAST
