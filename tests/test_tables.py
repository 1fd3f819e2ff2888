"""CSV and TSV files give the records that a JSONL of the same rows gives."""

import csv
import json
import pickle

import numpy as np
import pytest
from checkpoint_files import qwen2_vl_files
from PIL import Image
from runs import write_recipe

from vlm_jax.cli import main
from vlm_jax.data.records import tables
from vlm_jax.data.records.sources import read_records
from vlm_jax.data.records.stream import open_stream
from vlm_jax.errors import UserError

ODD = ["plain", 'a "quoted", word', "two\nlines", "semi;colon\ttab", " ä\u2028b ", "x" * 200_000]


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    return tmp_path


def write_csv(path, rows, separator=",", mark="", end="\r\n"):
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(mark)
        writer = csv.writer(file, delimiter=separator, lineterminator=end)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
    return path


def said(record):
    return [part.get("text") for message in record["messages"] for part in message["content"]]


@pytest.mark.parametrize(
    ("name", "separator", "mark", "end"),
    [
        ("a.csv", ",", "", "\r\n"),
        ("a.csv", ";", "\ufeff", "\n"),
        ("a.csv", "\t", "", "\n"),
        ("a.csv", ";", "sep=;\r\n", "\r\n"),
        ("a.TSV", "\t", "\ufeff", "\r\n"),
        ("a.tsv", "\t", "", "\n"),
    ],
)
def test_a_table_equals_json_lines(folder, name, separator, mark, end):
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"r{i}", "image": "a.png", "question": ODD[rng.integers(6)], "answer": text}
        for i, text in enumerate(ODD * 3)
    ]
    file = write_csv(folder / name, rows, separator, mark, end)
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, wanted = read_records(file), read_records(folder / "a.jsonl")
    again = pickle.loads(pickle.dumps(records))
    for index in rng.permutation(len(rows)):
        assert records[index] == again[index] == wanted[index]
    assert records.place(3).startswith(f"'{file}', line ") and records.fingerprint
    stream = pickle.loads(pickle.dumps(open_stream(file)))
    for skip in (0, 5, 17):
        assert list(stream.records_from(skip)) == [wanted[i] for i in range(skip, len(rows))]


@pytest.mark.parametrize("column", ["image", "file_name", "path"])
@pytest.mark.parametrize("caption", ["caption", "text"])
def test_captions_of_images(folder, column, caption):
    file = write_csv(folder / "a.csv", [{column: "a.png", caption: "one", "source": "web"}])
    record = read_records(file, caption_prompt="Say:")[0]
    assert record["images"] == ["a.png"] and said(record) == [None, "Say:", "one"]
    stream = open_stream(file, caption_prompt="Say:")
    assert list(stream.records_from()) == [record]
    mixed = read_records([{"path": str(file), "weight": 1, "caption_prompt": "Say:"}])
    assert said(mixed[0]) == [None, "Say:", "one"]


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"question": "q", "answer": "r"}, ["q", "r"]),
        ({"prompt": "q", "response": "r"}, ["q", "r"]),
        ({"query": "q", "response": "r", "system": "s"}, ["s", "q", "r"]),
        ({"instruction": "q", "input": "", "output": "r", "image": ""}, ["q", "r"]),
        ({"image": "a.png", "question": "q", "text": "r"}, [None, "q", "r"]),
        ({"image": "a.png", "question": "q", "answer": "r", "caption": "c"}, [None, "q", "r"]),
        ({"": "0", "images": '["a.png", "b.png"]', "question": "q", "answer": "r"},
         [None, None, "q", "r"]),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]'},
         ["q", "r"]),
    ],
)  # fmt: skip
def test_columns_of_turns(folder, row, texts):
    assert said(read_records(write_csv(folder / "a.csv", [row]))[0]) == texts


def test_columns_under_other_names(folder):
    rows = [{"img": "a.png", "text": "q", "gold": "r", "path": "unread"}]
    file = write_csv(folder / "a.csv", rows)
    columns = {"image": "img", "question": "text", "answer": "gold"}
    for records in (read_records(file, columns=columns)[0],
                    next(open_stream(file, columns=columns).records_from())):  # fmt: skip
        assert records["images"] == ["a.png"] and said(records) == [None, "q", "r"]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.tsv", "captions.csv", "any.tsv"])
def test_a_directory_of_pictures_beside_a_table(folder, name):
    separator = "\t" if name.endswith("tsv") else ","
    write_csv(folder / name, [{"image": "b.png", "caption": "one, two"}], separator)
    record = read_records(folder)[0]
    assert record["images"] == ["b.png"] and said(record)[2] == "one, two"
    write_csv(folder / "second.csv", [{"image": "a.png", "caption": "x"}])
    if name.startswith("metadata"):
        assert said(read_records(folder)[0])[2] == "one, two"
    else:
        with pytest.raises(UserError, match="has 2 tables .*second.csv.: give one of them by its"):
            read_records(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption\na.png,one, two\n", "line 2, has more fields than the header .3 and 2, "),
        ("image;caption\na.png\n", "fewer fields than the header .* separated by semicolons"),
        ("image,caption\na.png,\n", "line 2, has an empty 'caption'"),
        ("image,question,answer\na.png,q,\n", "line 2, has an empty 'answer'"),
        ("image,caption\n,one\n", "line 2, has no 'file_name', which says which image"),
        ("image,path,caption\na.png,b.png,one\n", "has both image and path: keep one"),
        ("image,caption,text\na.png,one,two\n", "has both text and caption: keep one"),
        ("image,title\na.png,one\n", r"has the keys \['image', 'title'\]"),
        ("image_path,question,answer\na.png,q,r\n", "has 'image_path', which is not read"),
        ('image,caption\na.png,"one"x\n', "line 2, is not CSV: "),
        ("image,caption\na.png,\udcff\n", "line 2, is not UTF-8 text"),
    ],
)
def test_a_row_that_cannot_be_read_says_so_itself(folder, text, message):
    file = folder / "a.csv"
    file.write_bytes(text.encode(errors="surrogateescape"))
    records = read_records(file)
    with pytest.raises(
        UserError, match=f"Record 0 of '{file}', {message}" if "line" in message else message
    ):
        records[0]
    assert isinstance(next(open_stream(file).records_from()), UserError)


def test_a_file_that_is_no_table_says_so(folder, monkeypatch):
    file = folder / "a.csv"
    for data, message in (
        (b"\n,,\n", "is empty: its first row names the columns"),
        (b"image,image\na,b\n", "has the column 'image' twice"),
        ("image,caption\n".encode("utf-16"), "is UTF-16, not UTF-8"),
        (b"image,caption\ra.png,one\r", "is not CSV: the row that begins on line 1"),
        (b"image,caption\n", "holds no records"),
        (b"image,caption\n,\n,\n\n", "holds no records"),
    ):
        file.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_records(file)
    monkeypatch.setattr(tables, "CSV_ROW_BYTES", 1000)
    file.write_bytes(b'image,caption\na.png,"open\n' + b"b.png,more\n" * 200)
    with pytest.raises(
        UserError, match="more than 1000 bytes, which begins on line 2: probably a q"
    ):
        read_records(file)


def test_the_commands_read_a_table(folder, capsys):
    (folder / "base").mkdir()
    base = qwen2_vl_files(folder / "base")
    file = write_csv(folder / "a.csv", [{"image": "a.png", "caption": "a red ball"}])
    other = write_csv(folder / "b.tsv", [{"path": "b.png", "text": "a blue box"}], "\t")
    recipe = write_recipe(folder, base, file, f"data.eval_file={other}")
    for split, words in (("train", "a red ball"), ("eval", "a blue box")):
        assert main(("preview", "--text", "--config", str(recipe), "--split", split)) == 0
        assert f"⟦{words}" in capsys.readouterr().out
    file.write_text("image,title\na.png,one\n")
    assert main(("preview", "--text", "--config", str(recipe))) == 2
    assert f"Record 0 of '{file}', line 2 has the keys" in capsys.readouterr().err
