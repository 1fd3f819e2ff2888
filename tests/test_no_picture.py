"""What only fills the place of a picture in a table is none: in every shape that tables give it."""

import itertools
import json

import datasets
import pytest
import runs
import yaml
from checkpoint_files import write_image

from vlm_jax import config
from vlm_jax.cli import main
from vlm_jax.data.records.record import canonical
from vlm_jax.data.records.sources import read_records
from vlm_jax.errors import UserError

NULLS = {"bytes": None, "path": None}  # as Arrow has it where a struct's row is null
TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
SEEN = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Blue."}]
NOTHINGS = [None, "", [], {}, NULLS, [None], [""], [NULLS], [None, "", NULLS], [[None]]]


def kinds(row):
    """Return (types of the first turn's parts, images, videos) of a row's record."""
    record = canonical(row)
    types = [part["type"] for part in record["messages"][0]["content"]]
    return types, record["images"], record["videos"]


@pytest.mark.parametrize("key", ["image", "images", "video", "videos"])
@pytest.mark.parametrize("value", NOTHINGS, ids=repr)
def test_no_picture_and_no_film(key, value):
    assert kinds({"messages": TURNS, key: value}) == (["text"], [], [])


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Hi?", "answer": "Yes."},
        {"prompt": "Hi?", "completion": "Yes."},
        {"instruction": "Hi?", "input": None, "output": "Yes."},
        {"query": "Hi?", "response": "Yes.", "history": None},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]},
    ],
)
def test_in_every_format(row):
    assert kinds({**row, "images": [NULLS]}) == (["text"], [], [])
    assert kinds({**row, "image_path": NULLS}) == (["text"], [], [])  # not read, and nothing lost


def test_what_is_there_stays():
    row = {"messages": SEEN, "images": [None, "a.png", NULLS]}
    assert kinds(row) == (["image", "text"], ["a.png"], [])
    whole = {"bytes": b"x", "path": None}
    assert kinds({"messages": SEEN, "image": whole})[1] == [whole]
    assert kinds({"messages": SEEN, "images": [b""]})[1] == [b""]  # damaged, which is not none
    # A film's frame that is missing would make another film of it.
    assert kinds({"messages": TURNS, "video": ["a.png", None]})[2] == [["a.png", None]]
    assert kinds({"messages": TURNS, "video": ["a.mp4", None]})[2] == ["a.mp4"]
    with pytest.raises(UserError, match="has 0 images, but its turns name 1"):
        canonical({"messages": SEEN, "images": [NULLS]})


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("image_url", {"url": "", "detail": "auto"}),
        *itertools.product(
            ("image", "image_url", "video", "video_url"), (None, "", NULLS, {"url": None})
        ),
    ],
)
def test_a_part_that_brings_nothing_takes_the_next_of_the_record(kind, value):
    content = [{"type": kind, kind: value}, {"type": "text", "text": "What?", "image": None}]
    row = {"messages": [{"role": "user", "content": content}, TURNS[1]]}
    images, videos = (["b"], []) if "image" in kind else ([], ["b"])
    types, *found = kinds({**row, "images": images, "videos": videos})
    assert types == [kind.removesuffix("_url"), "text"] and found == [images, videos]


def test_a_table_of_both_is_previewed(place, tmp_path, capsys):
    write_image(tmp_path / "a.png", 16, 16)
    picture = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    table = datasets.Dataset.from_list(
        [{"images": [NULLS], "messages": TURNS}, {"images": [picture], "messages": SEEN}]
    )
    table.to_parquet(tmp_path / "t.parquet")
    rows = [{"images": [x], "messages": TURNS if not x else SEEN} for x in ("", None, "a.png")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, count in (("t.parquet", 2), ("t.jsonl", 3)):
        made = runs.make_config(place / "base", tmp_path / name, tmp_path / "out")
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict(made)))
        assert main(["preview", "--text", "--config", str(tmp_path / "c.yaml")]) == 0
        said = capsys.readouterr().out
        assert said.count(": Yes.<|im_end|>") == count - 1 and said.count(": Blue.<|im_end|>") == 1


@pytest.mark.parametrize("name", ["", None])
def test_a_caption_of_no_picture_is_refused(tmp_path, name):
    write_image(tmp_path / "a.png", 16, 16)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "A ball."}))
    with pytest.raises(UserError, match="Record 0 .* line 1, has no 'file_name'"):
        read_records(tmp_path)[0]
