"""Every shape of a row becomes the same turns; directories of captions; streams; addresses."""

import json
import pickle

import datasets
import pytest
from PIL import Image

from vlm_jax.data import cache
from vlm_jax.data.records.record import canonical
from vlm_jax.data.records.sources import read_records
from vlm_jax.data.records.stream import open_stream
from vlm_jax.errors import UserError


def turns(row, **options):
    """Return [(role, text, weight)], "<image>" for an image part."""
    return [
        (
            message["role"][0],
            "|".join(part.get("text", "<image>") for part in message["content"]),
            message.get("weight", 1),
        )
        for message in canonical(row, **options)["messages"]
    ]


QA = [("u", "q", 1), ("a", "r", 1)]
EARLIER = [("u", "q0", 1), ("a", "r0", 1)]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"query": "q", "response": "r"}, QA),
        ({"query": "q", "response": "r", "history": [["q0", "r0"]]}, [*EARLIER, *QA]),
        ({"query": "q", "response": "r", "system": "s"}, [("s", "s", 1), *QA]),
        ({"query": "<image>q", "response": "r", "images": ["a"]}, [("u", "<image>|q", 1), QA[1]]),
        ({"prompt": "q", "completion": "r"}, QA),
        (
            {
                "prompt": [
                    {"role": "user", "content": "q0"},
                    {"role": "assistant", "content": "r0"},
                    {"role": "user", "content": "q"},
                ],
                "completion": [{"role": "assistant", "content": "r"}],
            },
            [("u", "q0", 1), ("a", "r0", 0), *QA],
        ),
        ({"question": "q", "answer": "r", "image": "a"}, [("u", "<image>|q", 1), QA[1]]),
        ({"question": "q", "answer": ["r", "other"]}, QA),
        ({"question": "q", "answer": ""}, [QA[0], ("a", "", 1)]),
        ({"instruction": "q", "output": "r"}, QA),
        ({"instruction": "q", "input": "", "output": "r"}, QA),
        ({"instruction": "q", "input": "i", "output": "r"}, [("u", "q\ni", 1), QA[1]]),
        ({"conversations": [{"role": "user", "content": "q"}]}, QA[:1]),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, QA),
        (
            {
                "messages": [
                    {"role": "user", "content": "q", "weight": 0},
                    {"role": "assistant", "content": "r", "weight": 0.5},
                ]
            },
            [QA[0], ("a", "r", 0.5)],
        ),
        (
            {"conversations": [{"from": "gpt", "value": "r", "train": False}]},
            [("a", "r", 0)],
        ),
    ],
)
def test_formats_become_turns(row, wanted):
    assert turns(row) == wanted
    assert canonical(canonical(row)) == canonical(row)


def test_columns_are_renamed_before_reading():
    row = {"q_text": "q", "img": "a.png", "gold": "r", "answer": "unread"}
    columns = {"question": "q_text", "image": "img", "answer": "gold"}
    assert turns(row, columns=columns) == [("u", "<image>|q", 1), QA[1]]
    assert read_records([row], columns=columns)[0]["images"] == ["a.png"]
    with pytest.raises(UserError, match=r"no column 'q_txt' .did you mean 'q_text'.*data.columns"):
        canonical(row, columns={"question": "q_txt"})
    with pytest.raises(UserError, match=r"'questions' .did you mean 'question'"):
        read_records([row], columns={"questions": "q_text"})
    both = {**row, "query": "x", "response": "y"}
    assert turns(both, columns=columns)[0][1] == "<image>|q"  # the format that columns name


@pytest.mark.parametrize("kind", ["jsonl", "csv", "pairs"])
def test_images_with_captions(tmp_path, kind):
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    if kind == "jsonl":
        rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "caption": "two"}]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        (tmp_path / "metadata.csv").write_text('file_name,text\na.png,one\nb.png,"two"\n')
    else:
        (tmp_path / "a.txt").write_text("one\n")
        (tmp_path / "b.txt").write_text("two")
    records = read_records(tmp_path)
    assert len(records) == 2 and records[1]["images"] == ["b.png"]
    texts = [part.get("text") for message in records[1]["messages"] for part in message["content"]]
    assert texts == [None, "Describe this image.", "two"]
    other = read_records(tmp_path, caption_prompt="Caption:")
    assert other[0]["messages"][0]["content"][1]["text"] == "Caption:"
    assert records.fingerprint != other.fingerprint
    assert pickle.loads(pickle.dumps(records))[0] == records[0]
    with pytest.raises(UserError, match="has no splits"):
        read_records(tmp_path, split="test")
    if kind == "pairs":
        (tmp_path / "b.txt").unlink()
        with pytest.raises(UserError, match=r"b\.png' has no caption: expected .* 'b\.txt'"):
            read_records(tmp_path)[1]
        (tmp_path / "b.txt").write_bytes(b"\xff")
        with pytest.raises(UserError, match=r"b\.txt' cannot be read as UTF-8"):
            read_records(tmp_path)[1]
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text('{"text": "one"}')
        with pytest.raises(UserError, match=r"Record 0 of .*, line 1, has no 'file_name'"):
            read_records(tmp_path)[0]


def test_streams_go_on_where_they_stopped(tmp_path):
    rows = [{"id": str(i), "question": "q", "answer": "r"} for i in range(6)]
    rows[3]["answer"] = None
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    for source in (tmp_path / "a.jsonl", data):
        stream = open_stream(source)
        records = list(stream.records_from(0))
        assert [r["index"] for r in records if isinstance(r, dict)] == [0, 1, 2, 4, 5]
        assert isinstance(records[3], UserError) and "Record 3" in str(records[3])
        again = pickle.loads(pickle.dumps(stream))
        assert list(again.records_from(4)) == records[4:] == list(stream.records_from(4))
    with pytest.raises(UserError, match="is a stream, which has no length"):
        read_records(data)
    # A bad line is an error in its own place; what follows is read.
    good = b'{"question": "q", "answer": "r"}'
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + good + b"\n\n{\n" + good + b"\n\xff\n" + good
    )
    found = list(open_stream(tmp_path / "a.jsonl").records_from(0))
    assert [isinstance(one, dict) for one in found] == [True, False, True, False, True]
    assert "Record 1 of" in str(found[1]) and "line 3, is not valid JSON" in str(found[1])
    assert "line 5, is not UTF-8" in str(found[3]) and found[4]["index"] == 4
    behind = list(open_stream(tmp_path / "a.jsonl").records_from(3))
    assert str(behind[0]) == str(found[3]) and behind[1] == found[4]

    def broken():
        yield {"question": "q", "answer": "r"}
        raise OSError("the connection was lost")

    rows = datasets.IterableDataset.from_generator(broken)
    with pytest.raises(
        UserError, match=r"stream 'IterableDataset' breaks behind record 0: the con"
    ):
        list(open_stream(rows).records_from(0))
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be streamed"):
        open_stream(tmp_path / "a.json")
    with pytest.raises(UserError, match="no data file"):
        open_stream(str(tmp_path / "none.jsonl"))


def test_remote_files_are_fetched_once(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(cache.REMOTE, "memory://", ("fsspec", None))
    memory = fsspec.filesystem("memory")
    memory.pipe("/data/a.jsonl", json.dumps({"question": "q", "answer": "r"}).encode())
    records = read_records("memory://data/a.jsonl")
    assert records.place(0) == "'memory://data/a.jsonl', line 1"
    assert records[0]["folder"] == "memory://data"
    monkeypatch.setattr(cache, "_write", None)
    assert len(read_records("memory://data/a.jsonl")) == 1
    with pytest.raises(UserError, match=r"'memory://data/b\.jsonl' cannot be read: FileNotFound"):
        read_records("memory://data/b.jsonl")


def test_a_missing_file_system_names_its_install(monkeypatch):
    import fsspec

    def missing(address):
        raise ImportError("no such package")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    for address, line in (("gs://b/a.json", "gcs"), ("s3://b/a.json", "s3")):
        with pytest.raises(UserError, match=rf'pip install "vlm_jax\[{line}\]"'):
            read_records(address)


def test_captions_that_a_comma_cuts_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\na.png,A red ball, and a box\na.png,"A red ball, and\u2028a box"\na.png\n'
    )
    records = read_records(tmp_path)
    assert len(records) == 3
    assert records[1]["messages"][1]["content"][0]["text"] == "A red ball, and\u2028a box"
    for index, said in ((0, "line 2, has more fields"), (2, "line 4, has fewer fields")):
        with pytest.raises(UserError, match=f"Record {index} of .*metadata.csv', {said}"):
            records[index]
