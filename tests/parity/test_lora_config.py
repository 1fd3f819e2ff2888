"""What docs/FROM_PYTORCH.md refuses of peft's LoraConfig is refused in an adapter's file too."""

import json

import jax
import pytest

import vlm_jax
from vlm_jax.config.from_pytorch import LORA_CONFIG, REFUSED
from vlm_jax.hub.peft_config import HARMLESS, HARMLESS_VALUES, READ

REFUSED_FIELDS = [field for field, said in LORA_CONFIG.items() if said.kind == REFUSED]


def test_refused_in_an_adapter(tmp_path):
    """Each field that the table refuses, and a field that peft may have one day."""
    assert not set(REFUSED_FIELDS) & (READ | HARMLESS | HARMLESS_VALUES.keys())
    model = vlm_jax.from_config(
        {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 8,
         "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1,
         "vocab_size": 8}, "image_token_index": 3,
         "vision_config": {"model_type": "clip_vision_model", "hidden_size": 8,
         "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 2,
         "image_size": 8, "patch_size": 4}}
    )  # fmt: skip
    params = model.init(jax.random.key(0))
    adapted = vlm_jax.add_lora(model, params, vlm_jax.LoRA(2, 2), jax.random.key(0))
    vlm_jax.save_peft(*adapted, tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    for field in (*REFUSED_FIELDS, "tomorrow"):
        file.write_text(json.dumps({**written, field: {"on": True}}))
        with pytest.raises(vlm_jax.UserError, match=field):
            vlm_jax.load_peft(model, params, tmp_path)
