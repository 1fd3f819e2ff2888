"""Runs whose tokenizer has tokens that their base does not know: rows train, or it is said."""

import json
import shutil

import jax
import numpy as np
import pytest
import yaml
from runs import make_config
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from vlm_jax import config as configs
from vlm_jax import load
from vlm_jax.cli import main
from vlm_jax.config.choices import METHODS
from vlm_jax.sharding import make_mesh
from vlm_jax.train.metrics import untrained_tokens
from vlm_jax.train.setup import build
from vlm_jax.trees import flatten, split

ROWS = 512  # of the base's embedding


@pytest.fixture(scope="module")
def base(place, tmp_path_factory):
    """The tiny base with a tokenizer of two tokens more than its embedding has rows."""
    base = tmp_path_factory.mktemp("tokens") / "base"
    shutil.copytree(place / "base", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    count = ROWS + 2 - len(tokenizer)
    tokenizer.add_tokens([f"<loc_{n}>" for n in range(count)], special_tokens=True)
    tokenizer.save_pretrained(base)
    assert (
        len(tokenizer) == ROWS + 2 and tokenizer.convert_tokens_to_ids(f"<loc_{count - 1}>") > ROWS
    )
    return base


def test_rows_for_new_tokens_train_are_saved_and_read(capsys, place, tmp_path, base):
    count = ROWS + 2 - len(AutoTokenizer.from_pretrained(place / "base"))
    rows = [json.loads(line) for line in (place / "data/train.jsonl").read_text().splitlines()[:2]]
    for row in rows:
        row["conversations"][1]["value"] = f"<loc_{count - 2}><loc_{count - 1}>"
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    made = make_config(
        base,
        data,
        out,
        f"data.image_folder={place / 'data'}",
        "training.max_steps=1",
        "training.warmup_steps=0",
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(configs.to_dict(made)))
    assert main(["train", "--config", str(recipe)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"the rows of {count - 2} tokens that were added to the tokenizer (<loc_0>," in said
    tensors = load_file(out / "adapter/adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    assert len(tensors[name]) == ROWS + 2
    mean = tensors[name][:ROWS].mean(0)  # where new rows start
    assert (np.abs(tensors[name][ROWS:] - mean).max(1) > 1e-3).all()
    merged = tmp_path / "merged"
    assert main(["export", "--run", str(out), "--merge", "--out", str(merged)]) == 0
    assert load(merged)[0].vocab_size == ROWS + 2


@pytest.mark.parametrize("method", [*METHODS, "saved"])
def test_every_method_adds_rows(place, tmp_path, base, method):
    how = "lora.modules_to_save=embed_tokens" if method == "saved" else f"method={method}"
    made = make_config(base, place / "data/train.jsonl", tmp_path, how)
    model, params, table, encoder = build(made, make_mesh(devices=jax.devices()[:1]))
    trained = flatten(split(params, table)[0])
    assert model.vocab_size == ROWS + 2 == len(encoder.tokenizer)
    assert trained["model/language_model/embed_tokens/added"].shape[0] == 2
    left = untrained_tokens(model, trained, encoder.tokenizer.get_added_vocab())
    assert bool(left) == (method not in ("full", "saved"))
