"""Files that are not what they are called: each says what it is; nothing is started for it."""

import gzip
import io
import json
import os
import time

import datasets
import numpy as np
import pytest
from checkpoint_files import qwen2_vl_files, write_image
from PIL import Image, PngImagePlugin

import vlm_jax
from vlm_jax.cli import main
from vlm_jax.data import Encoder, read_records
from vlm_jax.data.media.access import SAFE
from vlm_jax.data.media.images import image_size, read_image
from vlm_jax.data.media.video import Sampling, open_video
from vlm_jax.data.records.stream import open_stream
from vlm_jax.errors import UserError
from vlm_jax.files.file_types import HEAD, kind_of
from vlm_jax.files.limits import IMAGE_FORMATS

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
PAGE = b"<!-- x -->\n<!DOCTYPE HTML>\n<html><body>Sign in</body></html>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
SVG = b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg xmlns='http://www.w3.org/2000/svg'/>"
DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def saved(kind, **options):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 0)).save(file, kind, **options)
    return file.getvalue()


def with_text(size):
    """Return a PNG with so many bytes of text, compressed."""
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * size, zip=True)
    return saved("PNG", pnginfo=text)


# Given as an image and as a video.
NEITHER = [
    (b"", "is empty: copy or download it again"),
    (POINTER, "is a Git LFS pointer.*git lfs pull"),
    (PAGE, "is a web page .HTML."),
    (DENIED, "is a server's error message"),
    (SVG, "is an SVG drawing, which is not read: export it as PNG"),
    (EPS, "is PostScript, which is not read"),
    (b"%PDF-1.7\n%\xe2\xe3", "is a PDF document"),
    (b'{"error": "no"}', 'is JSON text .\'{"error": "no"}\'.'),
    ("Invalid username or password é".encode(), "is text .'Invalid username"),
    (gzip.compress(b"x", mtime=0), "is gzip-compressed, which is not read: unpack it"),
    (b"PK\3\4" + bytes(20), "is a ZIP archive"),
    (b"ID3\3" + bytes(20), "is a sound file"),
    (b"\x93NUMPY\1\0v\0", "is a NumPy array"),
    (b"\0\0\1\0\1\0" + bytes(20), "is an icon"),
]


@pytest.mark.parametrize(("data", "message"), NEITHER)
def test_what_is_neither_a_picture_nor_a_film(data, message):
    with pytest.raises(UserError, match=message):
        image_size(data)
    with pytest.raises(UserError, match=message):
        open_video(data, None, SAFE, Sampling())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEIC, "is a HEIC picture, as phones write them.*vlm_jax.heic.*JPEG"),
        (b"\0\0\0\x18ftypisom" + bytes(90), "is a video .MP4 or QuickTime.: give it as a video"),
        (b"\x1a\x45\xdf\xa3" + bytes(90), "is a video .Matroska or WebM."),
        (saved("PNG")[:20], "is PNG, damaged or cut short"),
        (with_text(2**21), "is PNG, and Pillow does not open it .Decompressed data too large"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "is JPEG, damaged or cut short"),
        (saved("TGA"), "is of no known kind .its first bytes are 00 00 02"),
        (saved("PCX"), "is of no known kind .its first bytes are 0a"),
    ],
)
def test_what_is_no_picture(data, message, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    vlm_jax.data.media.images._reads_heic.cache_clear()
    with pytest.raises(UserError, match=message):
        read_image(data)


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_each_format_that_is_meant_is_read(kind):
    more = {"append_images": [Image.new("RGB", (16, 16))], "save_all": True}
    data = saved(kind, **(more if kind == "MPO" else {}))
    assert image_size(data) == (16, 16)
    assert np.abs(read_image(data).astype(int) - (200, 40, 0)).max() < 12


def test_a_format_that_is_not_meant_is_refused_as_an_opened_image_too():
    for kind in ("TGA", "PCX"):
        with pytest.raises(UserError, match=rf"format {kind} is not read.*convert\('RGB'\)"):
            read_image(Image.open(io.BytesIO(saved(kind))))
    assert read_image(Image.open(io.BytesIO(saved("TGA"))).convert("RGB")).shape == (16, 16, 3)


def record(**media):
    kind = next(iter(media)).removesuffix("s")
    asked = [{"type": kind}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": "red"}
    return {"messages": [{"role": "user", "content": asked}, answer], **media}


def test_the_command_says_it_and_names_the_file_once(tmp_path, capsys):
    base = qwen2_vl_files(tmp_path / "base")
    (tmp_path / "a.jpg").write_bytes(POINTER)
    (tmp_path / "c.yaml").write_text(f"model: {{name_or_path: {base}}}\n")
    film = saved("PNG")
    (tmp_path / "a.mp4").write_bytes(film)
    for row, message in (
        (record(image="a.jpg"), "is a Git LFS pointer"),
        (record(video="a.jpg"), "is a Git LFS pointer"),
        (record(video="a.mp4"), "is a still image (PNG): give it as an image"),
    ):
        (tmp_path / "d.jsonl").write_text(json.dumps(row))
        data = f"--config.data.train_file={tmp_path / 'd.jsonl'}"
        assert main(["preview", "--text", "--config", str(tmp_path / "c.yaml"), data]) == 2
        said = capsys.readouterr().err
        assert f"of record 0: the file {message}" in said
        assert said.count("a.jpg") + said.count("a.mp4") == 1


def ghostscript(tmp_path, monkeypatch):
    """Put a program of Ghostscript's name into the path, and return what it would write."""
    log, program = tmp_path / "log", tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $@ >> {log}\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return log


def test_no_program_is_started(tmp_path, monkeypatch):
    """Neither for a file nor for what a data set holds, whatever it is called, however deep."""
    log = ghostscript(tmp_path, monkeypatch)
    (tmp_path / "a.png").write_bytes(EPS)
    encoder = Encoder(qwen2_vl_files(tmp_path / "base"))
    text, image = datasets.Value("string"), datasets.Image()
    flat = datasets.Features({"images": datasets.List(image), "question": text, "answer": text})
    part = {"type": text, "text": text, "image": image}
    turn = {"role": text, "content": datasets.List(part)}
    deep = datasets.Features({"messages": datasets.List(turn)})
    given = {"bytes": EPS, "path": "a.png"}
    shown = {"type": "image", "text": None, "image": given}
    said = {"type": "text", "text": "red", "image": None}
    turns = [{"role": "user", "content": [shown]}, {"role": "assistant", "content": [said]}]
    sets = [
        datasets.Dataset.from_list([{"messages": turns}], features=deep),
        datasets.Dataset.from_list(
            [{"images": [given], "question": "q", "answer": "a"}], features=flat
        ),
    ]
    rows = [read_records(one)[0] for one in sets]
    rows += [next(open_stream(one.to_iterable_dataset()).records_from()) for one in sets]
    for row in (*rows, record(image=str(tmp_path / "a.png")), record(video=EPS)):
        with pytest.raises(UserError, match="is PostScript, which is not read"):
            encoder.measure(row)
    with (
        Image.open(tmp_path / "a.png") as opened,
        pytest.raises(UserError, match="format EPS is not read"),
    ):
        read_image(opened)
    assert not log.exists()


def test_no_beginning_takes_long():
    for data in (b"<!---->" * 200 + b"x", b"<!--" * 300, b" " * 2000, b"<?xml " * 300, b"G" * 2000):
        start = time.process_time()
        kind_of(data[:HEAD])
        assert time.process_time() - start < 0.5


def test_files_of_a_checkpoint_that_were_not_fetched(tmp_path):
    for name, content, words in (
        ("model.safetensors", POINTER, "could not be read as safetensors.*is a Git LFS pointer"),
        ("tokenizer.json", POINTER, "tokenizer file '.*tokenizer.json' cannot be read.*LFS"),
        ("chat_template.jinja", PAGE, "template '.*jinja' cannot be read. The file is a web page"),
        ("config.json", PAGE, "config.json' is not valid JSON.*is a web page"),
        ("preprocessor_config.json", b"", "preprocessor_config.json' is not valid JSON.*is empty"),
    ):
        base = qwen2_vl_files(tmp_path / name)
        (base / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            vlm_jax.load(base) if name in ("model.safetensors", "config.json") else Encoder(base)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "d/a.parquet"])
def test_data_files_that_were_not_fetched(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(POINTER)
    place = path.parent if "/" in name else path
    with pytest.raises(UserError, match=f"data file '.*{path.name}' cannot be read. The file is a"):
        read_records(place)


def test_bytes_come_before_the_path_they_had(tmp_path):
    write_image(tmp_path / "a.png", 5, 7)
    given = {"bytes": saved("PNG"), "path": "a.png"}
    assert image_size(given, tmp_path) == (16, 16)
    with pytest.raises(UserError, match="its content .* is a still image"):
        open_video(given, tmp_path, SAFE, Sampling())
