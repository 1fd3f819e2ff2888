"""Kinds of picture, and which files may be read."""

import io
import json
import urllib.request

import numpy as np
import pytest
from checkpoint_files import qwen2_vl_files, write_image
from PIL import Image

from vlm_jax.data import Encoder, read_records
from vlm_jax.data.media.access import SAFE, Access
from vlm_jax.data.media.images import image_size, read_image
from vlm_jax.errors import UserError
from vlm_jax.files.limits import FETCH_BYTES


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def test_every_kind_of_picture_becomes_rgb():
    red = Image.new("RGB", (3, 2), (200, 40, 0))
    for name, data in {
        "RGBA": saved(red.convert("RGBA"), format="PNG"),
        "palette": saved(red.convert("P", palette=Image.Palette.ADAPTIVE), format="PNG"),
        "CMYK": saved(red.convert("CMYK"), format="TIFF"),
    }.items():
        assert abs(read_image(data).astype(int) - np.array(red)).max() <= 3, name
    grey = Image.new("L", (3, 2), 77)
    for data in (saved(grey, format="PNG"), saved(grey.convert("LA"), format="PNG")):
        assert (read_image(data) == 77).all()
    deep = Image.fromarray(np.full((2, 3), 77 * 256 + 5, np.uint16))
    assert (read_image(saved(deep, format="PNG")) == 77).all()
    half = Image.new("LA", (3, 2), (0, 0))
    assert (read_image(saved(half, format="PNG")) == 255).all()  # transparency lies on white


def test_an_animated_gif_as_an_image_is_its_first_frame():
    pictures = [Image.new("RGB", (4, 3), color) for color in ((250, 0, 0), (0, 250, 0))]
    data = saved(pictures[0], format="GIF", save_all=True, append_images=pictures[1:])
    assert (read_image(data)[0, 0] == (250, 0, 0)).all() and image_size(data) == (3, 4)


def test_a_bomb_is_refused_from_its_header(tmp_path):
    path = write_image(tmp_path / "a.png", 30, 40)
    path.write_bytes(path.read_bytes()[:60])  # nothing to decode: the header suffices
    for read in (read_image, image_size):
        with pytest.raises(UserError, match="40 x 30 = 1200 pixels.*max_image_pixels = 1199"):
            read("a.png", tmp_path, Access(max_pixels=1199))
    assert image_size("a.png", tmp_path, Access(max_pixels=1200)) == (30, 40)


@pytest.fixture
def places(tmp_path):
    """A media root with an image, and an image outside it."""
    (tmp_path / "root" / "deep").mkdir(parents=True)
    write_image(tmp_path / "root" / "in.png", 8, 8)
    write_image(tmp_path / "out.png", 9, 9)
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "out.png")
    return tmp_path


def test_no_path_leaves_the_media_root(places):
    root, allowed = places / "root", Access(allow_absolute_paths=True)
    for inside in ("in.png", "deep/../in.png", str(root / "in.png"), f"file://{root}/in.png"):
        assert image_size(inside, root, SAFE) == (8, 8)
    for outside in ("../out.png", str(places / "out.png"), "link.png"):
        with pytest.raises(UserError, match="outside the media root.*data.allow_absolute_paths"):
            image_size(outside, root, SAFE)
        assert image_size(outside, root, allowed) == (9, 9)
    assert image_size(str(places / "out.png"), None, SAFE) == (9, 9)  # rows made in memory


def test_a_file_of_records_stays_at_home_unless_the_key_is_set(places, tmp_path_factory):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"messages": turns, "image": str(places / "out.png")}
    (places / "root" / "d.json").write_text(json.dumps([row]))
    directory = qwen2_vl_files(tmp_path_factory.mktemp("qwen"))
    record = read_records(places / "root" / "d.json")[0]
    with pytest.raises(UserError, match="Image 0 .* of record 0.*data.allow_absolute_paths"):
        Encoder(directory).measure(record)
    assert Encoder(directory, allow_absolute_paths=True).measure(record).patches > 0
    assert Encoder(directory).measure(row).patches > 0
    with pytest.raises(UserError, match="max_image_pixels = 80"):
        Encoder(directory, max_image_pixels=80).measure(row)


def test_addresses_are_fetched_only_where_that_is_allowed(places, monkeypatch):
    asked = []

    def fake(address, timeout):
        asked.append((address, timeout))
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", fake)
    answer = (places / "out.png").read_bytes()
    with pytest.raises(UserError, match="not fetched unless data.allow_urls"):
        read_image("https://example.com/a.png")
    assert asked == []
    assert image_size("https://example.com/a.png", None, Access(allow_urls=True)) == (9, 9)
    assert asked == [("https://example.com/a.png", 30)]
    answer = bytes(FETCH_BYTES + 1)
    with pytest.raises(UserError, match="the most that is fetched"):
        read_image("https://example.com/a.png", None, Access(allow_urls=True))


def test_a_tilde_is_the_home_for_roots_and_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "media").mkdir()
    write_image(tmp_path / "media/a.png", 5, 7)
    assert read_image("a.png", "~/media").shape == (5, 7, 3)
    assert image_size("~/media/a.png", "~/media") == (5, 7)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="lies outside the media root"):
        read_image("~/media/a.png", "~/other")
    anywhere = Access(allow_absolute_paths=True)
    assert read_image("~/media/a.png", "~/other", anywhere).shape == (5, 7, 3)
