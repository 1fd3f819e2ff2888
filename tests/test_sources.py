"""Every source and format becomes the one canonical record, or says what is wrong with it."""

import json

import datasets
import pytest
from PIL import Image

from vlm_jax.data.records.record import canonical
from vlm_jax.data.records.sources import read_records
from vlm_jax.errors import UserError

LLAVA = {
    "id": "a-1",
    "image": "one.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "An <image> of a ball."},
    ],
}
IMAGE = {"type": "image"}


def words(text):
    return {"type": "text", "text": text}


def test_llava_json_is_canonical(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([LLAVA]))
    records = read_records(tmp_path / "data.json")
    assert records[0] == {
        "id": "a-1",
        "index": 0,
        "folder": str(tmp_path),
        "messages": [
            {"role": "user", "content": [IMAGE, words("What is it?")]},
            {"role": "assistant", "content": [words("An <image> of a ball.")]},
        ],
        "images": ["one.png"],
        "videos": [],
    }
    assert canonical(records[0]) == records[0]
    assert len(records) == 1 and records[-1]["id"] == "a-1"
    assert read_records(tmp_path / "data.json", image_folder=tmp_path)[0]["folder"] == str(tmp_path)


def contents(row):
    record = canonical(row)
    return [message["content"] for message in record["messages"]], record["images"]


def test_images_are_placed_by_markers_parts_or_first():
    turns = [{"role": "user", "content": "A <image> and B <image>"}]
    turns.append({"role": "assistant", "content": "yes"})
    got, images = contents({"messages": turns, "images": ["a", "b"]})
    assert got[0] == [words("A "), IMAGE, words(" and B"), IMAGE] and images == ["a", "b"]
    for text in ("<image>\nq", "\n <image> q ", "<image>\n\nq\n"):
        record = {"messages": [{"role": "user", "content": text}], "image": "a"}
        assert contents(record)[0][0] == [IMAGE, words("q")]
    # a marker without its image is no text; in a text part the same letters are
    with pytest.raises(
        UserError, match=r"Record 0 .* has 0 images, but its turns name 2.*text part"
    ):
        canonical({"messages": turns})
    as_part = [{"role": "user", "content": [words("A <image>")]}, turns[1]]
    assert contents({"messages": as_part})[0][0] == [words("A <image>")]
    assert contents({"messages": [TURN, {**turns[1], "content": "<image>"}]})[0][1] == [
        words("<image>")  # an answer's
    ]
    # no marker: first in the first user turn
    plain = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, turns[1]]
    assert contents({"messages": plain, "image": "a"})[0][1] == [IMAGE, words("q")]
    # parts are taken as they are, their own images in their places
    parts = [{"type": "image", "image": "own"}, words("see <image>"), {"type": "image"}]
    got, images = contents({"messages": [{"role": "user", "content": parts}], "images": ["b"]})
    assert got[0] == [IMAGE, words("see <image>"), IMAGE] and images == ["own", "b"]
    url = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}]
    assert contents({"messages": [{"role": "user", "content": url}]})[1] == [
        "data:image/png;base64,xx"
    ]


def test_jsonl_messages(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}]}, {**LLAVA, "id": None}]
    (tmp_path / "d.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    records = read_records(str(tmp_path / "d.jsonl"))
    assert [record["id"] for record in records] == ["0", "1"]


def test_datasets_give_encoded_images(tmp_path):
    picture = Image.new("RGB", (4, 6))
    rows = {
        "messages": [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]] * 2,
        "images": [[picture], [picture, picture]],
    }
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.Sequence(datasets.Image()),
        }
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "dict")
    single = datasets.Dataset.from_dict({**rows, "images": [picture] * 2})
    for source in (data, tmp_path / "saved", tmp_path / "rows.parquet", tmp_path / "dict", single):
        records = read_records(source)
        assert len(records) == 2
        assert isinstance(records[1]["images"][0], dict)  # not decoded
        assert records[0]["messages"][0]["content"] == [IMAGE, words("q")]
    assert len(read_records(tmp_path / "dict", split="test")) == 1
    with pytest.raises(UserError, match=r"no split 'tset'.*'test'"):
        read_records(tmp_path / "dict", split="tset")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[\n{"id": 1},\n{"id": }\n]', "line 3"),
        ("a.json", '{"id": 1}\n{"id": 2}\n', "rename it"),
        ("a.json", '{"id": 1}', "expected a list"),
        ("a.json", "[]", "no records"),
        ("a.txt", "", "suffix"),
        ("a.json", "[" * 100_000, "cannot be read: .*recursion"),
        ("a.json", f"[{'1' * 5000}]", "cannot be read: .*digits"),
        ("a.parquet", "", "cannot be read. The file is empty"),
        ("a.parquet", "PAR1", "not readable parquet"),
        ("a.json", b"\xff\xfe[]", "not UTF-8"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / name)


def test_missing_sources_say_so(tmp_path):
    with pytest.raises(UserError, match="no data file or directory"):
        read_records(tmp_path / "none.json")
    with pytest.raises(UserError, match="is not a data set"):
        read_records(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([LLAVA]))
    with pytest.raises(UserError, match=r"a\.json' has no splits, so there is no 'test'"):
        read_records(tmp_path / "a.json", split="test")
    with pytest.raises(UserError, match=r"image folder .* is not a directory"):
        read_records([LLAVA], image_folder=tmp_path / "a.json")
    with pytest.raises(UserError, match=r"image folder .* does not exist"):
        read_records([LLAVA], image_folder=tmp_path / "none")


METADATA = {
    **{"source": "coco", "category": "vqa", "score": 0.9, "dataset": "x", "width": 640, "turns": 4},
    **{"task_id": "t", "image_id": 12, "image_size": [4, 6], "num_images": 1, "model": "m"},
    **{"text": "q a", "prompt": "q", "answer": "a", "language": "en", "views": None, "photos": 0},
    **{
        "tools": "[]",
        "videos": [],
        "image_path": None,
        "img": "",
        "function": "sort",
        "images": [],
    },
}


def test_columns_that_are_no_content_may_be_there():
    row = {"messages": [TURN, {**ANSWER, "weight": 1, "name": "x", "tool_calls": None}]}
    assert contents({**row, **METADATA}) == contents(row)
    # another form of images that are read is no loss
    assert contents({**row, "image": "a", "image_path": "/a", "image_url": "http://a"})[1] == ["a"]
    parts = [{"type": "image", "image": "own"}, words("q")]
    assert contents({"messages": [{**TURN, "content": parts}], "img_path": "x"})[1] == ["own"]
    assert contents({**row, "image": "a", "images": []})[1] == ["a"]
    assert contents({**row, "image": ""})[1] == []
    assert contents({**row, "image": "a", "video_url": "http://a", "file_name": "a.png"})[1] == [
        "a"
    ]
    assert contents({**row, "id": "a.png", "note": "see a.png", "media": ["x"]})[1] == []
    # a raw row may have columns that canonical records have too
    assert contents({**row, "images": [], "index": 3, "folder": "f"}) == contents(row)


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_turns_is_the_first_turn(key):
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    record = canonical({**row, key: "Be brief."})
    assert record["messages"][0] == {"role": "system", "content": [words("Be brief.")]}
    assert record["messages"][1:] == canonical(row)["messages"]
    assert canonical({**row, key: ""}) == canonical({**row, key: None}) == canonical(row)
    own = {"conversations": [{"from": "system", "value": "Be brief."}, *row["conversations"]]}
    assert canonical({**own, key: "Be brief."}) == canonical(own) == record
    with pytest.raises(UserError, match=f"'{key}' that differs from its system turn"):
        canonical({**own, key: "Be long."})
    with pytest.raises(UserError, match=f"'{key}' that is not text"):
        canonical({**row, key: ["Be brief."]})


def test_the_same_turns_in_both_forms_are_read_once():
    row = {"conversations": [{"from": "human", "value": "q"}], "messages": [TURN]}
    assert canonical(row)["messages"] == canonical({"messages": [TURN]})["messages"]
    with pytest.raises(UserError, match="both messages and conversations, and they differ"):
        canonical({**row, "messages": [ANSWER]})


@pytest.mark.parametrize(
    "key",
    [
        *(
            "image_path",
            "image_paths",
            "imagePath",
            "img",
            "imgs",
            "image_file",
            "picture",
            "Image",
        ),
        *("image_url", "image-base64", "image_1", "photo", "image_name", "pic_url", "IMAGES"),
    ],
)
def test_images_under_another_key_are_refused(key):
    for value in ("a.png", ["a.png"], {"bytes": b"x"}):
        with pytest.raises(UserError, match=rf"Record 3 of 'f' has '{key}', which is not read"):
            canonical({"messages": [TURN], key: value}, 3, None, "f")


@pytest.mark.parametrize(
    "value",
    ["a.JPG", ["x", "a.png"], b"x", Image.new("RGB", (2, 2)), [{"bytes": b"x", "path": None}]],
)
def test_what_can_only_be_a_picture_is_refused_under_any_key(value):
    with pytest.raises(UserError, match=r"has 'left', which is not read: expected 'image'"):
        canonical({"messages": [TURN], "left": value})
    assert contents({"messages": [TURN], "image": "a", "left": value})[1] == ["a"]


TURN = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 7, "text": "q"}, r"Record 3 of 'f' \(id 7\) has the keys"),
        ([], "is list"),
        ({"messages": []}, "no list of turns"),
        ({"messages": [{"role": "user"}]}, "turn 0"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'"),
        ({"messages": [{"role": "user", "content": 3}]}, "neither text nor a list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "content part"),
        ({"messages": [TURN], "video_path": "a.mp4"}, "'video_path', .* expected 'video', or"),
        ({"messages": [TURN], "video": "a", "videos": ["b"]}, "both videos and video"),
        ({"messages": [{**TURN, "content": "<video>"}]}, "has 0 videos, but its turns name 1"),
        (
            {"messages": [{**TURN, "content": "<video>q"}], "videos": ["a", "b"]},
            "has 2 videos, but its turns name 1",
        ),
        (
            {"messages": [{**TURN, "content": [{"type": "video", "video": "a"}]}], "video": "b"},
            "every video part has its own",
        ),
        ({**LLAVA, "image": ["a", "b"]}, "has 2 images, but its turns name 1"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "has 0 images, but its turns name 1",
        ),
        ({**LLAVA, "image2": "b"}, "has 'image2', which is not read: expected all images"),
        ({**LLAVA, "images": ["b"]}, "both images and image"),
        (
            {"messages": [TURN], "audio_path": "a"},
            "has 'audio_path', .* expected images and videos, which are",
        ),
        ({"messages": [TURN], "conversation": [TURN]}, "has 'conversation', which is not read"),
        ({"messages": [TURN], "system_message": "s"}, "'system_message', .* expected 'system'"),
        ({"messages": [TURN], "tools": '[{"name": "f"}]'}, "has 'tools', which is not read"),
        ({"messages": [{**TURN, "images": ["a"]}]}, "turn 0 has 'images', which is not read"),
        ({"messages": [TURN, {**ANSWER, "tool_calls": [1]}]}, "turn 1 has 'tool_calls'"),
        ({"messages": [TURN, {**ANSWER, "weight": -1}]}, "turn 1 has the weight -1; expected"),
        ({"messages": [TURN, {**ANSWER, "train": "no"}]}, "turn 1 has the train 'no'"),
        ({"messages": [{**TURN, "train": True}]}, "turn 0 is the user's and has the train True"),
        ({"messages": [TURN, {**ANSWER, "train": False, "weight": 1}]}, "weight and train, which"),
        ({"messages": [TURN, TURN]}, "turns 0 and 1 are both the user's"),
        ({"messages": [TURN, ANSWER, ANSWER]}, "turns 1 and 2 are both the assistant's"),
        ({"messages": [TURN, {"role": "system", "content": "s"}]}, "turn 1 is a system turn"),
        ({"conversations": []}, "no list of turns"),
        ({"messages": [TURN], "image": float("nan")}, "has NaN in 'image'"),
        ({"question": "q", "answer": float("nan")}, "has NaN in 'answer'"),
        ({"question": "q", "answer": 3}, "has 3 in 'answer'; expected text"),
        ({"question": "q", "answer": []}, "empty list in 'answer'"),
        ({"query": "q", "response": "r", "history": ["a"]}, "'history' that is not a list"),
        (
            {"query": "q", "response": "r", "question": "q", "answer": "a"},
            "both query and question",
        ),
    ],
)
def test_bad_records_name_themselves(row, message):
    with pytest.raises(UserError, match=message):
        canonical(row, 3, None, "f")
