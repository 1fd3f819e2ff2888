"""QLoRA against torch + peft + bitsandbytes: the same codes, the same start, the same 20 steps."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from references import llava_inputs, quiet, wide
from references_4bit import OUTSIDE, four_bit, layers_4bit
from test_peft import MADE, PROJECTOR, assert_twenty_equal_steps
from tiers import fast

import vlm_jax
from vlm_jax.trees import flatten
from vlm_jax.weights import NF4


def adapted_pair(family, tmp_path):
    """Return (peft's model on bitsandbytes' layers, our model, params, inputs, labels)."""
    dense = wide(family, tmp_path / "base", factor=3.0)
    reference = four_bit(type(dense), tmp_path / "base", "nf4-dq", OUTSIDE)
    reference.save_pretrained(tmp_path / "4bit")
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=r".*language_model.*_proj",
        modules_to_save=PROJECTOR[family],
    )
    with quiet():
        torch.manual_seed(0)
        twin = get_peft_model(reference, config)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        twin.save_pretrained(tmp_path / "adapter")
    layers = dense.config.text_config.num_hidden_layers
    assert len(layers_4bit(twin)) == 7 * layers, "bitsandbytes computes all layers of the decoder"
    model, params = vlm_jax.load_peft(*vlm_jax.load(tmp_path / "4bit"), tmp_path / "adapter")
    kernels = [leaf for leaf in flatten(params).values() if isinstance(leaf, NF4)]
    assert len(kernels) == 7 and all(leaf.double and leaf.aligned for leaf in kernels)
    if family in MADE:
        inputs = MADE[family][1]("mixed")
    else:
        inputs = llava_inputs(model.config.image_tokens())
    answers = (inputs["attention_mask"] == 1) & (inputs["input_ids"] < 99)
    return twin, model, params, inputs, np.where(answers, inputs["input_ids"], -100)


@pytest.mark.parametrize("family", fast(["qwen2_vl", "qwen3_vl", "llava"], PROJECTOR))
def test_twenty_steps(tmp_path, family):
    twin, model, params, inputs, labels = adapted_pair(family, tmp_path)
    twin.train()
    assert_twenty_equal_steps(twin, model, params, inputs, labels)
