"""Full fine-tuning of every part of a model against torch: the same losses and last weights."""

import numpy as np
import pytest
from test_peft import MADE, assert_twenty_equal_steps
from tiers import fast

import vlm_jax
from vlm_jax.trees import flatten

TIED = {"qwen2_vl": False, "qwen2_5_vl": False, "qwen3_vl": True, "gemma3": True}


@pytest.mark.parametrize("family", fast(["qwen3_vl"], MADE))
def test_ten_steps_of_all_weights(tmp_path, family):
    (make, inputs_of), tied = MADE[family], TIED[family]
    reference = make(tmp_path, factor=3.0, tie_word_embeddings=tied)
    model, params = vlm_jax.load(tmp_path)
    before = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    assert ("lm_head/kernel" in before) is not tied
    inputs = inputs_of("mixed")
    answers = (inputs["attention_mask"] == 1) & (inputs["input_ids"] < 99)
    labels = np.where(answers, inputs["input_ids"], -100)
    recipe = {"lora_enabled": False, "vision_encoder_lr_scale": 1.0}
    trained = assert_twenty_equal_steps(  # with decay enough to tell which weights it takes
        reference, model, params, inputs, labels, recipe=recipe, steps=10, decay=1.0
    )
    after = flatten(trained)
    assert after.keys() == before.keys(), "some leaf is frozen"
    for path, leaf in before.items():
        if path.endswith("k_proj/bias") and family == "gemma3":
            continue  # it adds the same to all scores of a query: its gradient is rounding
        assert np.abs(after[path] - leaf).max() > 1e-3, path
