"""docs/FROM_PYTORCH.md has a true row for every field of peft's LoraConfig."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
from peft import LoraConfig

import vlm_jax
from vlm_jax import config as configs
from vlm_jax.hub.peft_load import HARMLESS, HARMLESS_VALUES, READ

DOC = Path(__file__).parents[2] / "docs" / "FROM_PYTORCH.md"
FIELDS = [field.name for field in dataclasses.fields(LoraConfig)]


def rows():
    section = DOC.read_text().split("## LoraConfig")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([\w ]+?) \|", section, re.M))


def test_every_field_has_a_row():
    assert sorted(rows()) == sorted(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_the_row_is_true(field):
    said = rows()[field]
    keys = configs.flatten_config(configs.get_config())
    if said == "same":
        assert f"lora.{field}" in keys
    elif said == "renamed":
        there = {"base_model_name_or_path": "model.name_or_path", "revision": "model.revision"}
        assert f"lora.{field}" not in keys
        assert there.get(field, configs.ALIASES.get(f"lora.{field}")) in keys
    elif said == "refused":
        with pytest.raises(vlm_jax.UserError, match=field):
            configs.load(None, [f"lora.{field}=true"])
        assert field not in READ | HARMLESS | HARMLESS_VALUES.keys()
    else:
        assert said == "not needed" and f"lora.{field}" not in keys


def test_refused_in_an_adapter(tmp_path):
    """Each field that the table refuses, and a field that peft may have one day."""
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
    for field in [*(field for field, said in rows().items() if said == "refused"), "tomorrow"]:
        file.write_text(json.dumps({**written, field: {"on": True}}))
        with pytest.raises(vlm_jax.UserError, match=field):
            vlm_jax.load_peft(model, params, tmp_path)
