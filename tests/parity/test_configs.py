"""What transformers writes of a config, and older versions of it wrote, is read the same."""

import copy
import json

import pytest
from transformers import AutoConfig

import vlm_jax
from vlm_jax.models.reference_configs import KNOWN

QWEN3 = "Qwen/Qwen3-VL-2B-Instruct"
LAYERS = KNOWN[QWEN3]["text_config"]["num_hidden_layers"]


def read(raw):
    return vlm_jax.from_config(raw).config


def changed(name, part, fields):
    """Return a published config with these fields in a part of it, or at the top."""
    raw = copy.deepcopy(KNOWN[name])
    (raw[part] if part else raw).update(fields)
    return raw


@pytest.mark.parametrize("name", KNOWN)
def test_a_config_saved_again_describes_the_same_model(tmp_path, name):
    config = AutoConfig.for_model(**copy.deepcopy(KNOWN[name]))
    config.save_pretrained(tmp_path)
    for raw in (json.loads((tmp_path / "config.json").read_text()), config.to_dict()):
        assert "rope_parameters" in raw["text_config"], "in the layout of today"
        assert read(raw) == read(KNOWN[name])


SAYS_NOTHING = {
    "nulls": ("text_config", dict(sliding_window=None, layer_types=None, pad_token_id=None)),
    "null at the top": ("", dict(sliding_window=None, rope_scaling=None)),
    "no window": (
        "text_config",
        dict(use_sliding_window=False, sliding_window=32768, max_window_layers=28),
    ),
    "full attention": ("text_config", dict(layer_types=["full_attention"] * LAYERS)),
    "copies": ("", {**KNOWN[QWEN3]["text_config"], "model_type": "qwen3_vl"}),
    # transformers 4.x names the defaults of every config in a whole dict, a tower's too.
    "a tower's defaults": (
        "vision_config",
        dict(tie_word_embeddings=True, rope_parameters=None, id2label={"0": "LABEL_0"}),
    ),
}


@pytest.mark.parametrize("case", SAYS_NOTHING)
def test_fields_that_change_nothing_are_read_over(case):
    assert read(changed(QWEN3, *SAYS_NOTHING[case])) == read(KNOWN[QWEN3])


def test_a_gemma_as_others_save_it_describes_the_same_model():
    name = "google/gemma-3-12b-it"
    raw = changed(
        name,
        "text_config",
        dict(
            cache_implementation="hybrid", sliding_window_pattern=6, attn_logit_softcapping=None,
            rope_local_base_freq=10000.0, rope_theta=1e6, attention_bias=False, head_dim=256,
        ),
    )  # fmt: skip
    raw |= dict(boi_token_id=255999, eoi_token_id=256000, hidden_size=3840)
    assert read(raw) == read(KNOWN[name])
    with pytest.raises(vlm_jax.UserError, match="'hidden_size'.*twice"):
        read(raw | dict(hidden_size=7))


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("text_config", dict(use_sliding_window=True), "use_sliding_window=True"),
        ("text_config", dict(sliding_window=4096), "'sliding_window' = 4096"),
        ("text_config", dict(layer_types=["sliding_attention"] * LAYERS), "layer_types.*sliding"),
        ("text_config", dict(mystery=0), "text_config has the field 'mystery' = 0"),
        ("", dict(hidden_size=7), "'hidden_size'.*twice"),
        ("", dict(text_config=None), "text_config"),
        ("", dict(mystery=False), "json has the field 'mystery' = False"),
        ("vision_config", dict(rope_parameters=dict(rope_type="linear")), "rope_type='linear'"),
        ("vision_config", dict(mystery=""), "vision_config has the field 'mystery'"),
    ],
    ids=str,
)
def test_fields_that_mean_something_else_are_refused_by_name(part, fields, message):
    with pytest.raises(vlm_jax.UserError, match=message):
        read(changed(QWEN3, part, fields))
