"""Indexed files: every row by itself, whatever stands in the others."""

import concurrent.futures
import gzip
import json
import multiprocessing
import pickle

import numpy as np
import pytest

from vlm_jax.data.records import jsonl
from vlm_jax.data.records.jsonl import index_lines, index_list
from vlm_jax.data.records.sources import read_records
from vlm_jax.errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_lines_are_those_of_a_plain_reader(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(jsonl, "CHUNK", chunk)
    rng = np.random.default_rng(chunk)
    for number in range(30):
        kinds = ["", "  ", "\t\r", '{"é": 1}', " [2]", '"long line of ünicode"', "3\r"]
        text = "\n".join(rng.choice(kinds, rng.integers(1, 12)))
        data = (b"\xef\xbb\xbf" if number % 3 == 0 else b"") + text.encode()
        path = write(tmp_path / f"{number}.jsonl", data)
        rows = index_lines(path)
        wanted = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        assert [rows.line(i) for i in range(len(rows))] == [i for i, _ in wanted]
        assert [rows[i] for i in range(len(rows))] == [json.loads(line) for _, line in wanted]


def test_a_bad_line_is_an_error_of_its_own_record(tmp_path):
    good = json.dumps({"messages": TURNS}).encode()
    lines = [
        good,
        b"",
        b'{"id": ',
        good,
        b'{"messages": "\xff"}',
        b"[" * 100_000,
        b"1" * 5000,
        b"\xff",
        good,
    ]
    records = read_records(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert len(records) == 8
    for index, message in {
        1: r"Record 1 of '.*a\.jsonl', line 3, is not valid JSON: column 8",
        3: r"Record 3 of .* line 5, is not UTF-8 text \(byte 14",
        4: "Record 4 of .*, line 6, cannot be read: .*recursion",
        5: "Record 5 of .*, line 7, cannot be read: .*digits",
        6: r"Record 6 of .* line 8, is not UTF-8 text \(byte 0",
    }.items():
        with pytest.raises(UserError, match=message):
            records[index]
    assert [records[i]["index"] for i in (0, 2, -1)] == [0, 2, 7]
    assert records.place(7) == f"'{tmp_path / 'a.jsonl'}', line 9"


def test_one_row_of_a_list_that_is_not_utf8_hinders_no_other(tmp_path):
    good = json.dumps({"question": "é?", "answer": "r"}, ensure_ascii=False).encode()
    bad = b'{"question": "\xff", "answer": "r"}'
    records = read_records(write(tmp_path / "a.json", b"[" + b",\n".join([good, bad, good]) + b"]"))
    assert len(records) == 3 and records[2]["messages"] == records[0]["messages"]
    with pytest.raises(UserError, match=r"Record 1 of '.*a\.json', line 2, is not UTF-8 text"):
        records[1]


def test_a_bad_record_names_its_line(tmp_path):
    rows = [{"messages": TURNS}, {"id": "x", "messages": []}, {"question": "q", "answer": None}]
    lines = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    listed = write(tmp_path / "a.json", json.dumps(rows, indent=1))
    for path, line in ((lines, 3), (listed, 14)):
        records = read_records(path)
        with pytest.raises(UserError, match=rf"Record 1 of '{path}', line {line} \(id 'x'\) holds"):
            records[1]
    nan = read_records(write(tmp_path / "b.json", '[{"messages": [], "image": NaN}]'))
    with pytest.raises(UserError, match="Record 0 of .*, line 1 has NaN in 'image'"):
        nan[0]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("rows", [[], [1], ["é, ]", {"a": [[], "\n"]}, [1, [2]], None, "日本"]])
def test_a_list_is_read_row_by_row(tmp_path, rows, indent):
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    for data in (text.encode(), b"\xef\xbb\xbf" + f"\n {text} \n".encode()):
        found = index_list(write(tmp_path / "a.json", data))
        assert [found[i] for i in range(len(found))] == rows == found[:]
        lines = data.decode("utf-8-sig").split("\n")
        for i, row in enumerate(rows):
            begin = json.dumps(row, ensure_ascii=False)[0]
            assert begin in lines[found.line(i) - 1]


@pytest.mark.parametrize("text", ["[1, 2", "[1,]", "[1 2]", "[,]", "[", "[1]]", "", "nope", "[1]]"])
def test_what_is_no_list_is_refused(tmp_path, text):
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    with pytest.raises(UserError, match="not valid JSON: line 1"):
        index_list(write(tmp_path / "a.json", text))


def _read(rows, index):
    return rows[index]


def test_rows_go_to_threads_and_processes(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"n": i}) for i in range(1000)))
    rows = index_lines(path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [row["n"] for row in pool.map(rows.__getitem__, range(1000))] == list(range(1000))
    again = pickle.loads(pickle.dumps(rows))
    assert again[999] == {"n": 999} and again.fingerprint == rows.fingerprint
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read, (rows, 7)) == {"n": 7}
    path.write_text("{}\n" * 1000)
    with pytest.raises(UserError, match="was changed after it was indexed"):
        pickle.loads(pickle.dumps(again))[3]


def test_fingerprints_are_of_content(tmp_path):
    text = json.dumps({"messages": TURNS}) + "\n"
    one, two = (read_records(write(tmp_path / n, text)) for n in ("a.jsonl", "b.jsonl"))
    other = read_records(write(tmp_path / "c.jsonl", text + text))
    renamed = read_records(tmp_path / "a.jsonl", columns={"question": "x"})
    assert one.fingerprint == two.fingerprint
    assert len({one.fingerprint, other.fingerprint, renamed.fingerprint}) == 3
    memory = [{"messages": TURNS}]
    assert read_records(memory).fingerprint == read_records(list(memory)).fingerprint
    assert read_records([{"messages": TURNS, "image": b"x"}]).fingerprint is None


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_are_unpacked_once(tmp_path, monkeypatch, suffix, writable):
    import zstandard

    from vlm_jax.data import cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = "\n".join(json.dumps({"id": i, "messages": TURNS}) for i in range(50)).encode()
    pack = {"gz": gzip.compress, "zst": zstandard.compress}[suffix]
    half = len(text) // 2
    folder = tmp_path / "data"
    folder.mkdir()
    path = write(folder / f"a.jsonl.{suffix}", pack(text[:half]) + pack(text[half:]))
    if not writable:  # a file where the directory would be made
        real = cache._write

        def refuse(target, chunks):
            if ".vlm_jax" in target.parts:
                raise PermissionError
            real(target, chunks)

        monkeypatch.setattr(cache, "_write", refuse)
    records = read_records(path)
    assert [record["id"] for record in records] == [str(i) for i in range(50)]
    assert records.place(3).endswith(f"a.jsonl.{suffix}', line 4")
    assert records[0]["folder"] == str(folder)
    assert (folder / ".vlm_jax").exists() == writable
    monkeypatch.setattr(cache, "_write", None)  # a second time nothing is written
    assert len(read_records(path)) == 50
    monkeypatch.undo()
    listed = write(folder / f"b.json.{suffix}", pack(b'[{"messages": []}]'))
    assert len(read_records(listed)) == 1
    cut = write(folder / f"cut.jsonl.{suffix}", pack(text)[:-9])
    with pytest.raises(UserError, match="damaged or cut short"):
        read_records(cut)
    assert not list(folder.rglob(".part-*"))
    with pytest.raises(UserError, match="suffix"):
        read_records(write(folder / f"a.parquet.{suffix}", pack(b"")))
