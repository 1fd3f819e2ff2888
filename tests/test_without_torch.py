"""`--without-torch` finds what imports a reference: in a file, through a helper, in one test."""

import pytest
from without_torch import module_needs
from without_torch import tests_that_need as needing

TEST = "def test_a():\n    {}\n\ndef test_b():\n    pass\n"


@pytest.mark.parametrize(
    ("text", "whole", "alone"),
    [
        ("import torch.nn as nn", True, set()),
        ("from peft import LoraConfig", True, set()),
        ("if True:\n    from trl.trainer import utils", True, set()),
        ("from references_4bit import OUTSIDE", True, set()),  # imports bitsandbytes
        ("def helper():\n    import references", True, set()),
        (TEST.format("from bitsandbytes.optim import Lion"), False, {"test_a"}),
        (TEST.format("from references import quiet"), False, {"test_a"}),
        ("import torchless\nfrom runs import make_base\nfrom vlm_jax import config", False, set()),
    ],
)
def test_imports_of_references_are_found(tmp_path, text, whole, alone):
    file = tmp_path / "test_it.py"
    file.write_text(text)
    assert module_needs(file) == whole
    assert needing(file) == alone
