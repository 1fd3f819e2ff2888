"""What carries loss is exactly what the assistant writes, in every kind of template."""

import json

import numpy as np
import pytest
from checkpoint_files import (
    CHATML,
    CHATML_MARKED,
    VICUNA,
    VICUNA_MARKED,
    image_and_text,
    llava_files,
    qwen2_vl_files,
    text,
)
from transformers import AutoTokenizer

from vlm_jax.data.text.chat import Chat, apply_edits
from vlm_jax.errors import UserError

TALK = [
    image_and_text("What color is the ball?"),
    text("assistant", "It is  red"),
    text("user", "\nassistant\nand the box?"),
    text("assistant", " blue "),
]


def open_chat(directory):
    ids = json.loads((directory / "config.json").read_text())
    image = ids.get("image_token_id", ids.get("image_token_index"))
    return Chat(directory, image, ids.get("video_token_id"))


def trained(chat, tokens, weights):
    """Return the text that carries loss, one string for each run of it."""
    tokenizer = AutoTokenizer.from_pretrained(chat.directory)
    runs, previous = [], False
    for token, weight in zip(tokens.tolist(), weights.tolist(), strict=True):
        if weight and not previous:
            runs.append([])
        if weight:
            runs[-1].append(token)
        previous = bool(weight)
    return [tokenizer.decode(run) for run in runs]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return {
        name: open_chat(qwen2_vl_files(tmp_path_factory.mktemp(name), template))
        for name, template in (("plain", CHATML), ("marked", CHATML_MARKED))
    }


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return {
        name: open_chat(llava_files(tmp_path_factory.mktemp(name), template))
        for name, template in (("plain", VICUNA), ("marked", VICUNA_MARKED))
    }


def reference(chat, messages, template):
    """Return the token ids and the assistant mask that transformers' tokenizer gives."""
    tokenizer = AutoTokenizer.from_pretrained(chat.directory)
    out = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return np.array(out["input_ids"]), np.array(out["assistant_masks"])


@pytest.mark.parametrize("name", ["plain", "marked"])
def test_loss_equals_the_marks_of_a_training_template(qwen, name):
    # The reference cannot find an answer that begins with a space: byte-level offsets leave it out.
    talk = [*TALK[:3], text("assistant", "blue ")]
    for messages in (talk[:2], talk, [text("system", "Be short."), *talk]):
        ids, mask = reference(qwen[name], messages, CHATML_MARKED)
        tokens, weights = qwen[name].encode(messages, [1])
        np.testing.assert_array_equal(tokens, ids)
        np.testing.assert_array_equal(weights, mask)
        assert tokens.dtype == np.int32 and weights.dtype == np.float32


@pytest.mark.parametrize("name", ["plain", "marked"])
def test_loss_runs_through_the_end_of_turn(qwen, name):
    tokens, weights = qwen[name].encode(TALK, [3])
    assert trained(qwen[name], tokens, weights) == ["It is  red<|im_end|>\n", " blue <|im_end|>\n"]
    tokens, weights = qwen[name].encode(TALK, [3], "last")
    assert trained(qwen[name], tokens, weights) == [" blue <|im_end|>\n"]


def test_each_placeholder_becomes_as_many_as_its_image_has_features(qwen):
    chat = qwen["plain"]
    messages = [image_and_text("Which?", images=2), text("assistant", "both")]
    one, _ = chat.encode(messages, [1, 1])
    tokens, weights = chat.encode(messages, [5, 2])
    places = np.flatnonzero(tokens == chat.image_id)
    np.testing.assert_array_equal(np.diff(places), [1, 1, 1, 1, 3, 1])
    assert len(tokens) == len(one) + 5
    assert not weights[places].any()
    with pytest.raises(UserError, match="2 image placeholders for 1 images"):
        chat.encode(messages, [5])


def test_an_image_in_an_answer_carries_no_loss(qwen):
    chat = qwen["plain"]
    parts = [{"type": "text", "text": "this"}, {"type": "image"}, {"type": "text", "text": "one"}]
    tokens, weights = chat.encode([TALK[0], {"role": "assistant", "content": parts}], [2, 3])
    assert (tokens == chat.image_id).sum() == 5 and not weights[tokens == chat.image_id].any()
    assert trained(chat, tokens, weights) == [
        "this<|vision_start|>",
        "<|vision_end|>one<|im_end|>\n",
    ]


@pytest.mark.parametrize("family", ["qwen", "llava"])
def test_a_placeholder_in_a_text_is_text(qwen, llava, family):
    chat = {"qwen": qwen, "llava": llava}[family]["plain"]
    name = chat.placeholders[0]
    words = f"What does {name} mean in <ball>?"
    messages = [image_and_text(words), text("assistant", f"{name} is a box")]
    tokens, weights = chat.encode(messages, [2])
    assert (tokens == chat.image_id).sum() == 2
    tokenizer = AutoTokenizer.from_pretrained(chat.directory)
    assert words in tokenizer.decode(tokens)
    assert trained(chat, tokens, weights)[0].strip().startswith(f"{name} is a box")


def test_a_conversation_of_text_equals_the_reference(llava):
    tokenizer = AutoTokenizer.from_pretrained(llava["plain"].directory)
    tokens, _ = llava["plain"].encode([text("user", "What?"), text("assistant", "red")], [])
    assert tokens.tolist() == tokenizer("USER: What? ASSISTANT: red</s>").input_ids
    assert tokens[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", ["plain", "marked"])
def test_an_answer_without_an_end_gets_eos(llava, name):
    chat = llava[name]
    tokenizer = AutoTokenizer.from_pretrained(chat.directory)
    messages = [
        {**TALK[0]},
        text("assistant", "red"),
        text("user", "sure?"),
        text("assistant", "so"),
    ]
    tokens, weights = chat.encode(messages, [4])
    ids = tokenizer(
        "USER: <image>\nWhat color is the ball? ASSISTANT: red</s>USER: sure? ASSISTANT: so</s>"
    ).input_ids
    first = ids.index(chat.image_id)
    assert tokens.tolist() == ids[:first] + [chat.image_id] * 4 + ids[first + 1 :]
    assert tokens[weights > 0].tolist().count(tokenizer.eos_token_id) == 2
    # The space is the answer's: a prompt ends in "ASSISTANT:", and the model has to write it.
    space = tokenizer.convert_tokens_to_ids("▁")
    assert trained(chat, tokens, weights) == ["red</s>", "so</s>"]
    assert tokens[weights > 0].tolist().count(space) == 1
    prompt = chat.prompt(messages[:1], [4])
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    assert not weights[: len(prompt)].any()


def test_a_prompt_is_a_prefix_of_the_example(qwen):
    for name in ("plain", "marked"):
        for end in (1, 3):
            prompt = qwen[name].prompt(TALK[:end], [2])
            tokens, weights = qwen[name].encode(TALK[: end + 1], [2], "last")
            np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
            assert weights[: len(prompt)].sum() == 0 and weights[len(prompt) :].all()


def test_marks_that_leave_the_end_out_are_extended_by_it(tmp_path):
    end, mark = "{{ '<|im_end|>\n' }}", "{% endgeneration %}"
    assert end + mark in CHATML_MARKED
    template = CHATML_MARKED.replace(end + mark, mark + end)
    chat = open_chat(qwen2_vl_files(tmp_path, template))
    tokens, weights = chat.encode(TALK, [1])
    assert trained(chat, tokens, weights) == ["It is  red<|im_end|>", " blue <|im_end|>"]


def test_the_template_is_found_where_transformers_looks(tmp_path):
    directory = qwen2_vl_files(tmp_path)
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        open_chat(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = CHATML
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    plain = open_chat(directory)
    assert plain.template == CHATML and not plain.has_marks
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHATML_MARKED}))
    assert open_chat(directory).has_marks
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        open_chat(directory)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            "{{ messages | length }}: {{ messages[-1].content[0].text }}",
            TALK,
            "does not begin with",
        ),
        ("{% for m in messages %}{{ m.role }}: {% endfor %}", TALK, "does not render"),
        ("{{ raise_exception('No system.') }}", TALK, "No system."),
        ("{% for m in messages %}{{ m.content + '' }}{% endfor %}", TALK, "refuses"),
        (CHATML, [text("assistant", "Hello")], "begins with an assistant"),
        (CHATML, [text("user", "\ue0f2"), text("assistant", "a")], "reserved"),
        (CHATML.replace("<|image_pad|>", ""), TALK, "0 image placeholders for 1"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path, template, messages, message):
    chat = open_chat(qwen2_vl_files(tmp_path, template))
    with pytest.raises(UserError, match=message):
        chat.encode(messages, [1])


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path):
    directory = qwen2_vl_files(tmp_path)
    with pytest.raises(UserError, match="added token"):
        Chat(directory, 7)


def test_edits_move_spans():
    text_, spans = apply_edits("abc def", [(1, 2, "XYZ"), (3, 4, "")], [(0, 3), (4, 7), (2, 3)])
    assert text_ == "aXYZcdef"
    assert [text_[a:b] for a, b in spans] == ["aXYZc", "def", "c"]


@pytest.mark.parametrize("name", ["plain", "marked"])
def test_a_turn_counts_as_much_as_it_says(qwen, llava, name):
    for chats in (qwen, llava):
        chat = chats[name]
        tokens, ones = chat.encode(TALK, [2])
        halved = [TALK[0], {**TALK[1], "weight": 0.5}, TALK[2], {**TALK[3], "weight": 2}]
        same, weights = chat.encode(halved, [2])
        np.testing.assert_array_equal(same, tokens)
        first, last = (ones - chat.encode(TALK, [2], "last")[1]), chat.encode(TALK, [2], "last")[1]
        np.testing.assert_array_equal(weights, 0.5 * first + 2 * last)
        np.testing.assert_array_equal(chat.encode(halved, [2], "last")[1], 2 * last)
        silent = [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]
        np.testing.assert_array_equal(chat.encode(silent, [2])[1], last)


@pytest.mark.parametrize("name", ["plain", "marked"])
def test_an_empty_answer_trains_its_end(qwen, llava, name):
    talk = [TALK[0], text("assistant", ""), TALK[2], text("assistant", "blue")]
    for chats, ends in (
        (qwen, ["<|im_end|>\n", "blue<|im_end|>\n"]),
        (llava, ["</s>", "blue</s>"]),
    ):
        tokens, weights = chats[name].encode(talk, [2])
        assert [run.strip(" ") for run in trained(chats[name], tokens, weights)] == ends


def test_an_end_that_the_marks_leave_out_is_the_turns_own_whatever_eos_is(tmp_path):
    template = CHATML_MARKED.replace(
        "{{ '<|im_end|>\n' }}{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>\n' }}"
    )
    assert template != CHATML_MARKED
    directory = qwen2_vl_files(tmp_path, template)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<|endoftext|>"}))
    chat = open_chat(directory)
    tokens, weights = chat.encode(TALK, [3])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(tokens[weights > 0]) == "It is  red<|im_end|> blue <|im_end|>"
    assert "<|endoftext|>" not in tokenizer.decode(tokens)
