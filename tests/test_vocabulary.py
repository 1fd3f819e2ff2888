"""Added tokens: new rows of their own, trained alone, exported as one embedding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from draws import shaken
from peft import PeftModel
from references import our_logits, quiet, qwen2_vl, qwen2_vl_inputs, tensors

import vlm_jax
from vlm_jax.trees import flatten


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_added_tokens(tmp_path, tied):
    top = dict(text=dict(tie_word_embeddings=True), tie_word_embeddings=True) if tied else {}
    reference = qwen2_vl(tmp_path / "base", **top)
    model, params = vlm_jax.load(tmp_path / "base")
    inputs = qwen2_vl_inputs("one image")
    before = our_logits(model, params, inputs)
    model, params = vlm_jax.add_tokens(model, params, 3)
    after = our_logits(model, params, inputs)
    assert after.shape[-1] == before.shape[-1] + 3
    np.testing.assert_array_equal(after[..., :-3], before)

    inputs["input_ids"][0, :3] = [200, 201, 202]
    table = [(r".*/added", "full"), (r".*", "frozen")]
    trainable, frozen = vlm_jax.split(params, table)
    assert len(flatten(trainable)) == (1 if tied else 2)
    tx = vlm_jax.optimizer(trainable, table, dict(learning_rate=0.1, lr_scheduler_type="constant"))
    state = vlm_jax.init_state(trainable, tx)
    state, _ = jax.jit(vlm_jax.make_step(model, tx))(state, frozen, model.batch(**inputs))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), trainable, state.trainable)
    assert all(float(change) > 0 for change in jax.tree.leaves(moved))

    params = vlm_jax.join(state.trainable, frozen)
    vlm_jax.save_pretrained(model, params, tmp_path / "out")
    with quiet():
        loaded, info = type(reference).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.get_input_embeddings().weight.shape[0] == 203
    with torch.no_grad(), quiet():
        expected = loaded.eval()(**tensors(inputs)).logits.numpy()
    np.testing.assert_allclose(our_logits(model, params, inputs), expected, atol=1e-4, rtol=0)
    again, read = vlm_jax.load(tmp_path / "out")
    np.testing.assert_allclose(our_logits(again, read, inputs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_carries_added_tokens(tmp_path, tied):
    top = dict(text=dict(tie_word_embeddings=True), tie_word_embeddings=True) if tied else {}
    reference = qwen2_vl(tmp_path / "base", **top)
    model, params = vlm_jax.load(tmp_path / "base")
    grown, params = vlm_jax.add_tokens(model, params, 3)
    lora = vlm_jax.LoRA(rank=2, alpha=4, targets=("q_proj",))
    grown, params = vlm_jax.add_lora(grown, params, lora, jax.random.key(0))
    params = shaken(params, lambda path: path.endswith("added"), scale=1.0)
    assert vlm_jax.training_table(grown, params)[1] == (r".*/added", "full")
    vlm_jax.save_peft(grown, params, tmp_path / "adapter")

    inputs = qwen2_vl_inputs("one image")
    inputs["input_ids"][0, :3] = [200, 201, 202]
    expected = our_logits(grown, params, inputs)
    again, read = vlm_jax.load_peft(*vlm_jax.load(tmp_path / "base"), tmp_path / "adapter")
    np.testing.assert_array_equal(our_logits(again, read, inputs), expected)
    with torch.no_grad(), quiet():
        reference.resize_token_embeddings(203)
        adapted = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
        theirs = adapted(**tensors(inputs)).logits.numpy()
    np.testing.assert_allclose(theirs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", ["nested", "flat", "both"])
def test_an_export_with_added_tokens_is_read_back_whatever_the_config(tmp_path, shape):
    qwen2_vl(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    if shape == "both":
        config["vocab_size"] = config["text_config"]["vocab_size"]
    if shape == "flat":
        text = config.pop("text_config")
        config = {**text, **config}
    file.write_text(json.dumps(config))
    model, params = vlm_jax.add_tokens(*vlm_jax.load(tmp_path / "base"), 3)
    assert model.vocab_size == 203
    vlm_jax.save_pretrained(model, params, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [written.get("vocab_size"), written.get("text_config", {}).get("vocab_size")] == {
        "nested": [None, 203], "flat": [203, None], "both": [203, 203],
    }[shape]  # fmt: skip
    again, read = vlm_jax.load(tmp_path / "out")
    assert again.config.text.vocab_size == 203
    assert flatten(read)["model/language_model/embed_tokens/embedding"].shape == (203, 48)
