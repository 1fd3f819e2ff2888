"""ms-swift's `objects` stand in the texts as the family writes them, or are refused by name."""

import json

import numpy as np
import pytest
from checkpoint_files import llava_files, qwen2_vl_files
from PIL import Image
from runs import make_base, write_recipe
from transformers import AutoTokenizer

from vlm_jax.cli import main
from vlm_jax.data import Encoder, encode
from vlm_jax.data.records.record import BadExample, canonical
from vlm_jax.errors import UserError
from vlm_jax.evals.answers import _plan

TOKENS = ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"]
SQUARE = "<|object_ref_start|>the blue square<|object_ref_end|>"


def with_box_tokens(directory):
    """Give a tiny Qwen2-VL's tokenizer the tokens that the published ones have."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    template = (directory / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen")
    qwen2_vl_files(directory)
    with_box_tokens(directory)
    Image.new("RGB", (64, 48)).save(directory / "a.png")
    Image.new("RGB", (50, 100)).save(directory / "b.png")
    upright = Image.new("RGB", (48, 64))
    exif = upright.getexif()
    exif[274] = 6  # shown turned: 64 x 48
    upright.save(directory / "turned.png", exif=exif)
    return directory


def row(objects, asked="<image>Find <ref-object>.", answered="<bbox>", images=("a.png",)):
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"images": list(images), "objects": objects, "messages": turns}


def old(*objects, **keys):
    given = [{"bbox_type": "real", "image": 0, **one} for one in objects]
    return {"query": "Find <ref-object>.", "response": "<bbox>", "images": ["a.png"],
            "objects": json.dumps(given), **keys}  # fmt: skip


def texts(directory, record):
    """Return what is asked and answered, as the tokens say."""
    example = encode(directory, record, image_folder=directory)
    decoded = AutoTokenizer.from_pretrained(directory).decode(example["tokens"])
    asked, answered = decoded.split("<|im_start|>user\n")[1].split("<|im_start|>assistant\n")
    assert example["weights"].any()
    return asked.split("<|vision_end|>")[-1].partition("<|im_end|>")[0], answered.partition(
        "<|im_end|>"
    )[0]


@pytest.mark.parametrize(
    ("record", "asked", "answered"),
    [
        # A quarter to a half of 64 x 48, counted to 1000.
        (
            row({"ref": ["the blue square"], "bbox": [[16, 12, 32, 24]]}),
            f"Find {SQUARE}.",
            "(250,250),(500,500)",
        ),
        (
            old({"caption": "the blue square", "bbox": [[16, 12, 32, 24]]}),
            f"Find {SQUARE}.",
            "(250,250),(500,500)",
        ),
        (
            old(
                {"caption": "the blue square", "bbox": [100, 50, 1000, 0], "bbox_type": "norm_1000"}
            ),
            f"Find {SQUARE}.",
            "(100,0),(1000,50)",  # the upper left corner first
        ),
        (
            row({"ref": [], "bbox": [[10.4, 3]]}, "<image>Click.", "click('<bbox>')"),
            "Click.",
            "click('(162,62)')",
        ),
        (
            row({"bbox": [[0.1234, 0.5, 0.9, 1]], "bbox_type": "norm1"}, "<image>Where?"),
            "Where?",
            "(123,500),(900,1000)",
        ),
        (
            row(
                {"bbox": [[5, 10], [16, 12]], "image_id": [1, 0]},
                "<image><image>Both?",
                "<bbox> <bbox>",
                ("a.png", "b.png"),
            ),
            "Both?",
            "(100,100) (250,250)",
        ),
        (
            row({"bbox": [[16, 12]]}, "<image>Where?", "<bbox>", ("turned.png",)),
            "Where?",
            "(250,250)",
        ),
    ],
)
def test_objects_are_written_as_qwen2_vl_writes_them(qwen, record, asked, answered):
    marked = answered
    for points in ("(250,250),(500,500)", "(100,0),(1000,50)", "(123,500),(900,1000)",
                   "(162,62)", "(100,100)", "(250,250)"):  # fmt: skip
        if f"{points},(" not in marked:
            marked = marked.replace(points, f"<|box_start|>{points}<|box_end|>")
    assert texts(qwen, record) == (asked, marked)


@pytest.mark.parametrize(
    ("family", "record", "options", "answered"),
    [
        ("qwen3_vl", row({"bbox": [[16, 12, 32, 24]]}, "<image>q"), {}, "[250, 250, 500, 500]"),
        ("qwen3_vl", row({"bbox": [[16, 12]]}, "<image>q"), {}, "[250, 250]"),
        # 64 x 48 pixels have an area of at most 40 x 64 only as 56 x 40.
        ("qwen2_5_vl", row({"bbox": [[16, 12, 32, 24]]}, "<image>q"), {}, "[14, 10, 28, 20]"),
        (
            "qwen2_5_vl",
            row({"bbox": [[0.5, 1]], "bbox_type": "norm1"}, "<image>q"),
            {"max_pixels": 1024},
            "[16, 24]",
        ),
        (
            "qwen2_5_vl",
            row({"bbox": [[64, 48]]}, "<image>q"),
            {"max_patches": 24, "overlong": "shrink_pixels"},
            "[24, 16]",
        ),
        # Of the image that is left of two.
        (
            "qwen2_5_vl",
            {
                "images": ["b.png", "a.png"],
                "messages": [
                    {"role": "user", "content": "<image>q"},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "<image>q"},
                    {"role": "assistant", "content": "<bbox>"},
                ],
                "objects": {"bbox": [[32, 24]], "image_id": [1]},
            },
            {"max_patches": 160, "overlong": "drop_turns"},
            "[28, 20]",
        ),
    ],
)
def test_newer_families_write_lists(tmp_path, qwen, family, record, options, answered):
    directory = qwen2_vl_files(tmp_path, family=family)
    encoder = Encoder(directory, image_folder=qwen, **options)
    tokens = encoder.encode(record)["tokens"]
    assert f"assistant\n{answered}<|im_end|>" in encoder.tokenizer.decode(tokens)
    plain = encoder.grounded(canonical(record))["messages"][-1]["content"]
    assert plain == [{"type": "text", "text": answered}]


def test_an_evaluation_shows_the_image_of_the_size_that_boxes_count(tmp_path, qwen):
    directory = qwen2_vl_files(tmp_path, family="qwen2_5_vl")
    boxes = {"bbox": [[63, 47, 64, 48]] * 3}
    record = canonical(row(boxes, "<image>q", "<bbox><bbox><bbox>"))
    for most in range(73, 78):  # tokens, of which shorter words leave more to the image
        encoder = Encoder(directory, image_folder=qwen, max_seq_length=most)
        [([kept], _)] = _plan(encoder, [record], 1, 1)
        arrays = encoder.encode(record)
        assert len(encoder.prompt(kept)["patches"]) == len(arrays["pixel_values"])


def test_several_boxes_of_one_word_stand_behind_one_another(qwen):
    several = old({"caption": "dots", "bbox": [[16, 12], [32, 24, 64, 48]]})
    wanted = "<|box_start|>(250,250)<|box_end|><|box_start|>(500,500),(1000,1000)<|box_end|>"
    assert texts(qwen, several)[1] == wanted


def test_a_box_becomes_the_tokens_of_its_text(qwen):
    record = row({"ref": ["the blue square"], "bbox": [[16, 12, 32, 24]]})
    asked, answered = texts(qwen, record)
    plain = row(None, f"<image>{asked}", answered)
    one, other = (encode(qwen, r, image_folder=qwen) for r in (record, plain))
    np.testing.assert_array_equal(one["tokens"], other["tokens"])
    np.testing.assert_array_equal(one["weights"], other["weights"])


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (row({"ref": ["a", "b"], "bbox": [[1, 2]]}), "2 of what '<ref-object>' stands for"),
        (row({"ref": ["a"], "bbox": [[1, 2], [3, 4]]}), "2 of what '<bbox>' stands .* have 1 of"),
        (row({"ref": ["a"], "bbox": []}), "0 of what '<bbox>' stands for"),
        (row({"ref": ["a"], "bbox": [[1, 2]]}, "<image>q", "a"), "1 of what '<ref-object>'"),
        (old({"caption": "a", "bbox": [1, 2]}, response="a"), None),
        (old({"caption": "a", "bbox": [1, 2]}, response="<bbox><bbox>"), "1 of what '<bbox>'"),
        (row({"ref": ["a"], "bbox": [[1, 2, 3]]}), r"with the box \[1, 2, 3\] .*expected"),
        (row({"ref": ["a"], "bbox": [[1, float("nan")]]}), "with the box"),
        (row({"ref": [3], "bbox": [[1, 2]]}), "expected {.ref.: "),
        (row({"ref": ["a"], "bbox": [[1, 2]], "bbox_type": "norm10"}), "did you mean 'norm1'"),
        (row({"ref": ["a"], "bbox": [[1, 2]], "image_id": []}), None),
        (row({"ref": ["a"], "bbox": [[1, 2]], "image_id": [0, 0]}), "1 in 'bbox' and 2 in"),
        (row({"labels": ["a"]}), "'objects', which is .*expected"),
        (row({"labels": ["a"]}, "<image>q", "a"), None),  # annotations beside a conversation
        (row(["a cat"], "<image>q", "a"), None),
        (row("no JSON", "<image>q", "a"), None),
    ],
)
def test_words_and_objects_that_do_not_pair_up_are_refused(record, said):
    if said is None:
        canonical(record)
        return
    with pytest.raises(UserError, match=f"Record 3 of 'f' has .*{said}"):
        canonical(record, 3, None, "f")


def test_without_objects_the_words_are_words():
    made = canonical(row(None))
    assert made["messages"][1]["content"] == [{"type": "text", "text": "<bbox>"}]


def test_boxes_that_cannot_be_filled_in_exactly_are_refused(qwen, tmp_path):
    outside = row({"bbox": [[16, 12, 80, 24]]}, "<image>q")
    with pytest.raises(
        BadExample, match=r"record 0: It has the box .* outside of its picture of 64"
    ):
        encode(qwen, outside, image_folder=qwen)
    with pytest.raises(BadExample, match="a box of image 1 in 'objects', but 1 images"):
        encode(qwen, row({"bbox": [[1, 2]], "image_id": [1]}, "<image>q"), image_folder=qwen)
    (tmp_path / "llava").mkdir()
    llava = llava_files(tmp_path / "llava")
    with pytest.raises(BadExample, match="has 'objects' and .* a llava model writes .* not known"):
        encode(llava, outside, image_folder=qwen)
    (tmp_path / "plain").mkdir()
    plain = qwen2_vl_files(tmp_path / "plain")
    with pytest.raises(BadExample, match=r"the token '<\|object_ref_start\|>', which the token"):
        encode(plain, outside, image_folder=qwen)


def test_the_command_shows_and_compares_them(tmp_path, capsys):
    base = make_base(tmp_path / "base")
    with_box_tokens(base)
    config = json.loads((base / "config.json").read_text())
    assert config["text_config"]["vocab_size"] >= len(AutoTokenizer.from_pretrained(base))
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    record = row({"ref": ["the blue square"], "bbox": [[16, 12, 32, 24]]})
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps(record))
    recipe = write_recipe(tmp_path, base, data)
    assert main(("preview", "--text", "--config", str(recipe))) == 0
    assert "target, " in (said := capsys.readouterr().out)
    assert "<|box_start|>(250,250),(500,500)<|box_end|>" in said and SQUARE in said
    assert "objects" not in str(Encoder(base, image_folder=tmp_path).grounded(canonical(record)))


def test_boxes_stay_in_a_generated_answer(qwen):
    """Special tokens as they are: without them no answer would equal its record's."""
    chat = Encoder(qwen).chat
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = chat.tokenizer.encode("<|box_start|>(1,2),(3,4)<|box_end|><|im_end|>")
    assert chat.answer([*ids, end, 5], {end}) == "<|box_start|>(1,2),(3,4)<|box_end|>"
