"""Where a picture stands: in an answer too, never where another program's word was meant."""

import json

import numpy as np
import pytest
from checkpoint_files import qwen2_vl_files
from PIL import Image
from runs import write_recipe

from vlm_jax.cli import main
from vlm_jax.data import encode
from vlm_jax.data.records.record import BadExample, canonical
from vlm_jax.errors import UserError


def row(asked, answered="It is red.", **keys):
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": turns, **keys}


def contents(record):
    made = canonical(record)
    return [
        [part.get("text", f"[{part['type']}]") for part in message["content"]]
        for message in made["messages"]
    ]


@pytest.mark.parametrize(
    ("record", "asked", "answered"),
    [
        (row("q", "Here: <image>", images=["a"]), ["q"], ["Here: ", "[image]"]),
        (row("q", "<image> a, <image>b\n", images=["a", "b"]), ["q"],
         ["[image]", " a, ", "[image]", "b\n"]),
        (row("<image>q", "An <image>", images=["a"]), ["[image]", "q"], ["An <image>"]),
        (row([{"type": "image"}], "An <image>", images=["a"]), ["[image]"], ["An <image>"]),
        (row("q", "An <image>"), ["q"], ["An <image>"]),
        (row("q", "red", images=["a"]), ["[image]", "q"], ["red"]),
        (row("q", "<video> of it", video="a.mp4"), ["q"], ["[video]", " of it"]),
        (row("q<video>", "<image> of it", video="a.mp4", image="a"), ["q", "[video]"],
         ["[image]", " of it"]),
        (row("<image>q [IMG] <img>b.png</img>", "<|image_pad|>", image="a"),
         ["[image]", "q [IMG] <img>b.png</img>"], ["<|image_pad|>"]),
        (row("What is [IMG]?", "<image_1> is a word"), ["What is [IMG]?"], ["<image_1> is a word"]),
    ],
)  # fmt: skip
def test_a_picture_stands_where_its_word_does(record, asked, answered):
    assert contents(record) == [asked, answered]


@pytest.mark.parametrize(
    "word",
    [
        *("<|image_pad|>", "<|vision_start|>", "[IMG]", "<img>", "<img>a.png</img>", "<image_0>"),
        *(
            "<|image_1|>",
            "<image 1>",
            "<ImageHere>",
            "<IMG_CONTEXT>",
            "<start_of_image>",
            "<|img|>",
        ),
        *("<image_soft_token>", "<im_start>", "[IMAGE]", "<|image|>", "{image}", "<Image1>"),
    ],
)
def test_another_programs_word_is_refused_where_it_would_be_a_place(word):
    for record in (row(f"{word}\nWhich?", image="a"), row("q", f"a {word}", images=["a"])):
        with pytest.raises(UserError, match="has 1 images that nothing places, and turn") as caught:
            canonical(record)
        assert "'<image>'" in str(caught.value)


def test_markers_that_stand_for_some_of_the_pictures_are_refused():
    with pytest.raises(UserError, match="2 images that nothing places, and turn 1 has the word"):
        canonical(row("q", "a <image>", images=["a", "b"]))
    with pytest.raises(UserError, match="1 images that nothing places, and turn 0 has the word"):
        canonical(row([{"type": "text", "text": "<image>\nq"}], images=["a"]))
    with pytest.raises(UserError, match="1 videos that nothing places, .*'<|video_pad|>'"):
        canonical(row("<|video_pad|>q", video="a.mp4"))


@pytest.mark.parametrize("word", ["<img>a.png</img>", "<audio>http://x.org/a</audio>"])
def test_files_within_a_text_are_refused(word):
    with pytest.raises(UserError, match=r"has '<.*' in turn 0: files within a text are not read"):
        canonical(row(f"{word} Which?"))


HTML = (
    '<img src="a.png"> <picture> <image_caption> [image of a cat] <video controls> 3 < 4 <imagine>'
)


def test_other_words_are_words():
    assert contents(row(HTML, HTML, image="a"))[1] == [HTML]
    answer = "![image](a.png) \\includegraphics{image} </image>"
    assert contents(row("Write it down.", answer, image="a"))[1] == [answer]


def test_a_row_of_several_formats_is_read_by_the_one_that_says_more():
    both = {"query": "q", "response": "r", "prompt": "Answer in a word."}
    assert contents(both) == contents({"query": "q", "response": "r"})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rejected": "no"}, "has 'rejected', which is not read: expected the one answer"),
        ({"chosen": [{"role": "assistant", "content": "a"}]}, "has 'chosen'"),
        ({"rejected_response": "no"}, "has 'rejected_response'"),
        ({"rejected_images": ["b"]}, "has 'rejected_images'"),
        ({"kto_tag": False}, "the kto_tag false, which says that its answer is not wanted"),
        ({"label": False}, "the label false"),
        ({"chat_template_kwargs": {"max_pixels": 9}}, "has 'chat_template_kwargs'.* in the config"),
        ({"history": [["q", "r"]]}, "has 'history', which is not read: expected all turns"),
        ({"audios": ["a.wav"]}, "has 'audios'"),
    ],
)
def test_content_of_other_programs_is_refused_by_name(keys, said):
    with pytest.raises(UserError, match=f"Record 3 of 'f' .*{said}"):
        canonical(row("q", **keys), 3, None, "f")
    canonical(row("q", kto_tag=True, label=1, channel="a", margin=0.5))


def test_words_of_the_template_in_a_text_are_refused(tmp_path):
    base = qwen2_vl_files(tmp_path)
    for word in ("<|im_end|>", "<|vision_start|>"):
        with pytest.raises(BadExample, match="A text holds '<.*>', which the chat template itself"):
            encode(base, row("q", f"red{word}"))
    encode(base, row("q", "<|image_pad|> and <|endoftext|>"))  # one stays a word, one is a token


def test_the_command_takes_a_picture_in_an_answer(tmp_path, capsys):
    (tmp_path / "base").mkdir()
    base = qwen2_vl_files(tmp_path / "base")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    image = {"type": "image", "image": "a.png"}
    parts = row("Mark it.", [{"type": "text", "text": "Here it is: "}, image])
    word = row("Mark it.", "Here it is: <image>", images=["a.png"])
    one, other = (encode(base, record, image_folder=tmp_path) for record in (word, parts))
    for name in ("tokens", "weights"):
        np.testing.assert_array_equal(one[name], other[name])
    image_id = json.loads((base / "config.json").read_text())["image_token_id"]
    assert (one["tokens"] == image_id).sum() == 4
    assert not one["weights"][one["tokens"] == image_id].any()
    data = tmp_path / "a.jsonl"
    recipe = write_recipe(tmp_path, base, data)
    data.write_text(json.dumps(word))
    assert main(("preview", "--text", "--config", str(recipe))) == 0
    assert "Here it is: " in capsys.readouterr().out
    data.write_text(json.dumps(row("<|image_pad|>Mark it.", image="a.png")))
    assert main(("preview", "--text", "--config", str(recipe))) == 2
    assert "'<|image_pad|>', which is not a placeholder here" in capsys.readouterr().err
