"""An answer ends where the chat template ends it, whatever EOS a base model has of its own."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import transformers
import yaml
from checkpoint_files import (
    CHATML,
    CHATML_MARKED,
    VICUNA,
    VICUNA_MARKED,
    llava_files,
    qwen2_vl_files,
    text,
)

import vlm_jax
from vlm_jax import UserError, config
from vlm_jax.cli import main
from vlm_jax.data import Chat, Encoder
from vlm_jax.generation import end_tokens
from vlm_jax.hub.base import CheckpointFiles
from vlm_jax.model import Source
from vlm_jax.trees import flatten, unflatten

LAST = "{% endif %}{% endfor %}{% if"  # behind the assistant's turn
FILES = {"qwen2_vl": qwen2_vl_files, "llava": llava_files}


def edit(file, **fields):
    """Change fields of a JSON file; None takes one out."""
    settings = {**json.loads(file.read_text() if file.exists() else "{}"), **fields}
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def ended(by):
    """Return a template that ends a turn with these words."""
    return CHATML.replace("{{ '<|im_end|>\n' }}{% endfor %}", f"{{{{ {by!r} }}}}{{% endfor %}}")


@pytest.mark.parametrize(
    ("family", "template", "wanted"),
    [
        ("qwen2_vl", CHATML, "<|im_end|>"),
        ("qwen2_vl", CHATML_MARKED, "<|im_end|>"),
        # Several tokens, text before them and behind them: the first token says that it is done.
        ("qwen2_vl", ended("<|im_end|><|endoftext|>"), "<|im_end|>"),
        ("qwen2_vl", ended(" ~<|im_start|>\n"), "<|im_start|>"),
        ("qwen2_vl", ended("<|im_end|>\n###\n"), "<|im_end|>"),
        # No token: the tokenizer's EOS, which training puts there.
        ("qwen2_vl", ended("\n###\n"), "<|endoftext|>"),
        ("llava", VICUNA, "</s>"),
        ("llava", VICUNA_MARKED, "</s>"),
        ("llava", VICUNA.replace(LAST, f"{{{{ '</s> ' }}}}{LAST}"), "</s>"),
    ],
)
def test_the_token_that_training_ends_an_answer_with(tmp_path, family, template, wanted):
    FILES[family](tmp_path, template)
    if family == "qwen2_vl":
        edit(tmp_path / "tokenizer_config.json", eos_token="<|endoftext|>")
    encoder = Encoder(tmp_path)
    end = encoder.chat.turn_end
    assert encoder.tokenizer.convert_ids_to_tokens(end) == wanted
    # It is the first special token among those that carry loss.
    messages = [text("user", "What color is it?"), text("assistant", "It is red.")]
    tokens, weights = encoder.chat.encode(messages, [])
    names = encoder.tokenizer.convert_ids_to_tokens(tokens[weights > 0].tolist())
    assert next(name for name in names if name in encoder.chat.ends) == wanted


def test_templates_that_end_nothing_or_answer_nothing(tmp_path):
    qwen2_vl_files(tmp_path, ended(""))
    edit(tmp_path / "tokenizer_config.json", eos_token=None)
    ids = json.loads((tmp_path / "config.json").read_text())["image_token_id"]
    assert Chat(tmp_path, ids).turn_end is None
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}.{% endfor %}")
    with pytest.raises(UserError, match="does not write the answer"):
        _ = Chat(tmp_path, ids).turn_end


@pytest.mark.parametrize("family", FILES)
def test_it_joins_what_the_files_say(tmp_path, family):
    FILES[family](tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    made = lambda: vlm_jax.from_config(  # noqa: E731
        json.loads((tmp_path / "config.json").read_text()),
        source=Source(str(tmp_path), {}, "x"),
        files=CheckpointFiles(),
    )
    end = made().turn_end
    assert end == Encoder(tmp_path).chat.turn_end is not None
    edit(tmp_path / "generation_config.json", eos_token_id=[5, 6], pad_token_id=7)
    assert end_tokens(made(), end) == ((5, 6, end), 7)
    edit(tmp_path / "generation_config.json", eos_token_id=end, pad_token_id=None)
    edit(tmp_path / "config.json", pad_token_id=None, text_config={
        k: v for k, v in raw["text_config"].items() if k != "pad_token_id"
    })  # fmt: skip
    assert end_tokens(made(), end) == ((end,), end)
    (tmp_path / "chat_template.jinja").unlink()
    assert made().turn_end is None  # arrays may still come from elsewhere
    assert vlm_jax.from_config(raw).turn_end is None


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base whose EOS is <|endoftext|>, and which answers " red<|im_end|> red<|im_end|> red ...".

    Each token alone says which one follows: the layers add nothing.
    """
    directory = runs.make_base(tmp_path_factory.mktemp("ends") / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    edit(directory / "tokenizer_config.json", eos_token="<|endoftext|>")
    edit(directory / "generation_config.json", eos_token_id=eos, pad_token_id=eos, top_k=3)
    model, params = vlm_jax.load(directory)
    (asked,), (red,) = tokenizer.encode("\n"), tokenizer.encode(" red")
    flat = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    embedding, head = (np.zeros((model.vocab_size, 16), np.float32) for _ in range(2))
    for place, (token, following) in enumerate([(asked, red), (red, end), (end, red)]):
        embedding[token, place] = head[following, place] = 1
    flat["model/language_model/embed_tokens/embedding"] = embedding
    flat["lm_head/kernel"] = head.T
    flat |= {path: 0 * x for path, x in flat.items() if "/o_proj/" in path or "/down_proj/" in path}
    written = directory.with_name("written")
    vlm_jax.save_pretrained(model, unflatten(flat), written)
    shutil.copyfile(directory / "generation_config.json", written / "generation_config.json")
    return SimpleNamespace(directory=written, end=end, eos=eos, red=red)


def answers(base, **options):
    model, params = vlm_jax.load(base.directory)
    asked = [{"role": "user", "content": [{"type": "text", "text": "What color is it?"}]}]
    return vlm_jax.generate(model, params, model.encode(asked), 5, **options)[0].tolist()


def test_generation_stops_there(base, place, capsys):
    assert answers(base) == [base.red, base.end, *[base.eos] * 3]
    assert answers(base, eos_token_id=base.eos) == [*[base.red, base.end] * 2, base.red]
    assert main(["generate", "--model", str(base.directory), "--prompt", "What?"]) == 0
    assert capsys.readouterr().out == "red\n"
    arguments = ["evaluate", "--model", str(base.directory), "--json", "--data"]
    assert main([*arguments, str(place / "data/train.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["correct"] == 6  # of 12, of which half are red


def test_a_run_stops_there_and_what_it_exports_says_so(base, place, tmp_path):
    data = place / "data/train.jsonl"
    made = runs.make_config(
        base.directory, data, tmp_path / "out", "training.max_steps=1", f"data.eval_file={data}",
        "training.learning_rate=1e-6", "model.projector_lr_scale=0",
    )  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict(made)))
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 0
    (row,) = runs.lines(tmp_path / "out/evaluations.jsonl")
    assert row["accuracy"] == 0.5
    assert not (tmp_path / "out/adapter/generation_config.json").exists()  # PEFT's have none
    merged = tmp_path / "merged"
    assert main(["export", "--run", str(tmp_path / "out"), "--merge", "--out", str(merged)]) == 0
    read = transformers.GenerationConfig.from_pretrained(merged)
    assert read.eos_token_id == [base.eos, base.end]
    assert (read.pad_token_id, read.top_k) == (base.eos, 3)


def test_files_of_a_checkpoint_are_added_to_only_where_they_lack_it(base, tmp_path):
    def saved(name, **fields):
        shutil.copytree(base.directory, tmp_path / name)
        edit(tmp_path / name / "config.json", eos_token_id=8, pad_token_id=9, bos_token_id=6)
        file = tmp_path / name / "generation_config.json"
        edit(file, **fields) if fields else file.unlink()
        before = file.read_bytes() if fields else b""
        vlm_jax.save_pretrained(*vlm_jax.load(tmp_path / name), tmp_path / f"{name}-saved")
        out = tmp_path / f"{name}-saved/generation_config.json"
        return before, out.read_bytes(), transformers.GenerationConfig.from_pretrained(out.parent)

    before, after, read = saved("listed", eos_token_id=[base.end, 7])
    assert before == after and read.eos_token_id == [base.end, 7]
    _, _, read = saved("list", eos_token_id=[8, 7])
    assert read.eos_token_id == [8, 7, base.end]
    _, _, read = saved("missing")
    assert read.eos_token_id == [8, base.end]
    assert (read.pad_token_id, read.bos_token_id) == (9, 6)
