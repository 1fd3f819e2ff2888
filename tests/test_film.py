"""Video files and animations: their size and number of frames are those that are decoded."""

import io
import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import qwen2_vl_files
from PIL import Image, features

from vlm_jax.cli import main
from vlm_jax.data import Encoder
from vlm_jax.data.media import animation as animations
from vlm_jax.data.media.access import SAFE
from vlm_jax.data.media.video import Sampling, open_video
from vlm_jax.data.media.video_file import open_film
from vlm_jax.errors import UserError

av = pytest.importorskip("av", reason="PyAV is not installed (pip install 'vlm_jax[video]')")
BASE = Path(__file__).parents[1] / "assets/qwen2_vl_tiny_scenes"
EVERY = Sampling(fps=1000)  # all frames, an even number


def frame(number, height=32, width=48):
    """Return grey of brightness 8 * number with a green mark in the upper left."""
    pixels = np.full((height, width, 3), 8 * number, np.uint8)
    pixels[: height // 3, : width // 3] = (0, 255, 0)
    return pixels


def write_film(path, count=8, size=(32, 48), codec="mpeg4", muxer=None, coder=None, **display):
    path = Path(path)
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=8, options=coder or {})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 1_000_000
        if "shape" in display:
            stream.codec_context.sample_aspect_ratio = display.pop("shape")
        for key, value in display.pop("tags", {}).items():
            stream.metadata[key] = value
        if display:
            stream.set_display_rotation(display.pop("degrees", 0), **display)
        for number in range(count):
            given = av.VideoFrame.from_ndarray(frame(number, *size), format="rgb24")
            container.mux(stream.encode(given))
        container.mux(stream.encode())
    return path


def opened(source, sampling=EVERY):
    """Return (video, its frames), which must have the size that was told before."""
    video = open_video(source, None, SAFE, sampling)
    found = list(video.frames())
    assert len(found) == video.count
    assert all(one.shape == (video.height, video.width, 3) for one in found)
    return video, found


def close(one, other):
    return np.abs(one.astype(int) - other).mean() < 6


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_film_is_turned_and_mirrored_as_it_says(tmp_path, degrees, mirrored, suffix):
    """FFmpeg: counterclockwise by the degrees, then the picture that is shown is mirrored."""
    path = write_film(tmp_path / f"a.{suffix}", 2, degrees=degrees, hflip=mirrored)
    _, found = opened(path)
    want = np.rot90(frame(0), degrees // 90)
    assert close(found[0], want[:, ::-1] if mirrored else want)


def test_an_upright_phone_film_through_the_command(tmp_path, capsys):
    """64 x 48 turned a quarter clockwise is (3, 8, 6) patches at 8 pixels, its mark upper right."""
    write_film(tmp_path / "a.mp4", 24, (48, 64), degrees=-90)
    turns = [
        {"role": "user", "content": "<video>What?"},
        {"role": "assistant", "content": "red"},
    ]
    row = {"messages": turns, "videos": ["a.mp4"]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    (tmp_path / "c.yaml").write_text(
        f"model: {{name_or_path: {BASE}}}\ndata: {{train_file: {tmp_path / 'd.jsonl'}}}\n"
    )
    assert main(["preview", "--text", "--config", str(tmp_path / "c.yaml")]) == 0
    assert "48 × 64 → 48 × 64 pixels, 6 frames" in capsys.readouterr().out
    encoder = Encoder(BASE, image_folder=tmp_path)
    assert encoder.encode(row)["video_grid_thw"].tolist() == [[3, 8, 6]]
    _, found = opened(tmp_path / "a.mp4")
    assert (found[0][2:12, -12:-2] == (0, 255, 0)).mean() > 0.3 and found[0][-2, 2].max() < 20


@pytest.mark.parametrize(
    "options",
    [
        {"size": (24, 40)},  # coded as 32 x 48
        {"shape": 2},  # wide pixels: not stretched, as by the reference's readers
        {"tags": {"rotate": "90"}},  # without a matrix, which FFmpeg does not follow
    ],
)
def test_what_a_container_says_beside_its_frames(tmp_path, options):
    size = options.get("size", (32, 48))
    video, found = opened(write_film(tmp_path / "a.mkv", 4, **options))
    assert (video.height, video.width) == size and close(found[0], frame(0, *size))


def brightness(found):
    return [round(float(one[-1, -1].mean()) / 8) for one in found]


def test_a_trimmed_film_has_the_frames_that_are_shown(tmp_path):
    """An edit list leaves out the first second and all behind the third."""
    data = bytearray(write_film(tmp_path / "a.mp4", 30, coder={"g": "8"}).read_bytes())
    place = data.index(b"elst") + 12
    _, start = struct.unpack(">Ii", data[place : place + 8])
    data[place : place + 8] = struct.pack(">Ii", 2000, start + 16384)
    video, found = opened(bytes(data))
    assert video.count == 16 and brightness(found) == list(range(8, 24))


@pytest.mark.parametrize("flags", ["frag_keyframe", "frag_keyframe+empty_moov"])
def test_a_fragmented_film_has_all_its_frames(tmp_path, flags):
    """Its header counts the first fragment, or nothing."""
    write_film(tmp_path / "a.mp4", 24, muxer={"movflags": flags}, coder={"g": "4"})
    assert brightness(opened(tmp_path / "a.mp4")[1]) == list(range(24))


@pytest.mark.parametrize("told", [0, 3, 400])
def test_a_header_that_counts_wrongly_is_not_believed(tmp_path, told):
    data = bytearray(write_film(tmp_path / "a.avi", 10).read_bytes())
    for name, offset in ((b"strh", 32), (b"avih", 16)):
        place = data.index(name) + 8 + offset
        data[place : place + 4] = struct.pack("<I", told)
    assert brightness(opened(bytes(data))[1]) == list(range(10))


def test_a_film_without_a_rate_has_the_one_of_its_times(tmp_path):
    """A frame comes after 30, 45, 33, 100 or 16 ms, in turn: 22.3 a second. FFmpeg guesses 2000."""
    times = np.cumsum([0, *[30, 45, 33, 100, 16] * 18])[:90].tolist()
    with av.open(str(tmp_path / "a.ts"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            given = av.VideoFrame.from_ndarray(frame(number % 8), format="rgb24")
            given.pts, given.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(given))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "a.ts")) as container:
        assert not container.streams.video[0].average_rate  # None or 0 / 0
    assert open_video(tmp_path / "a.ts", None, SAFE, Sampling(fps=10)).count == 40


def test_frames_of_another_size_become_as_large_as_the_first(tmp_path):
    sizes = (32, 48), (16, 24)
    parts = [write_film(tmp_path / f"{n}.ts", 4, size) for n, size in enumerate(sizes)]
    record = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "videos": [b"".join(part.read_bytes() for part in parts)],
    }
    encoder = Encoder(qwen2_vl_files(tmp_path / "base"))
    measured, arrays = encoder.measure(record), encoder.encode(record)
    assert measured.patches == len(arrays["pixel_values_videos"])


def test_an_old_pyav_is_told(tmp_path, monkeypatch):
    path = write_film(tmp_path / "a.mp4", 2)
    monkeypatch.setattr(av, "__version__", "16.1.0")
    with pytest.raises(UserError, match=r"PyAV 16.1.0 is too old.*pip install 'vlm_jax\[video\]'"):
        opened(path)


def test_a_file_without_pictures_in_it(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="the file holds no video stream"):
        opened(tmp_path / "a.mp4")
    whole = write_film(tmp_path / "b.mp4", muxer={"movflags": "faststart"}).read_bytes()
    with pytest.raises(UserError, match="should have 8 frames, but only . can be decoded"):
        opened(whole[: len(whole) * 3 // 4])
    with pytest.raises(UserError, match="no video stream, or is cut short"):
        opened(whole[:100])
    with pytest.raises(UserError, match="it is damaged or cut short .Invalid data"):
        opened(write_film(tmp_path / "c.mp4").read_bytes()[:200])  # what it holds stands at its end


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile secret.mp4\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 33\n",
    "DASH": "<?xml version='1.0'?>\n<MPD><Period><BaseURL>secret.mp4</BaseURL></Period></MPD>",
}


@pytest.mark.parametrize("name", sorted(PLAYLISTS))
def test_a_playlist_opens_nothing_else(tmp_path, name):
    write_film(tmp_path / "secret.mp4", 2)
    write_film(tmp_path / "secret.ts", 2)
    (tmp_path / "a.mp4").write_text(PLAYLISTS[name])
    for source in (tmp_path / "a.mp4", PLAYLISTS[name].encode()):
        with pytest.raises(UserError, match=f"{name}.*not read: .*is not opened"):
            open_video(source, None, SAFE, EVERY)
        with pytest.raises(UserError, match="not a video of a supported kind"):  # nor by FFmpeg
            open_film(source, "the file", SAFE, EVERY, {})


def test_a_name_is_no_pattern_and_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_film("secret.mp4", 2).rename("concat:secret.mp4")
    assert opened("concat:secret.mp4")[0].count == 2
    Image.new("RGB", (8, 8)).save("1.png")
    Image.new("RGB", (8, 8)).save("%d.png")
    with pytest.raises(UserError, match="not a video of a supported kind"):
        open_film(tmp_path / "%d.png", "the file", SAFE, EVERY, {})


COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]


def animation(kind, **options):
    pictures = [Image.new("RGB", (24, 16), color) for color in COLORS]
    file = io.BytesIO()
    more = {"save_all": True, "append_images": pictures[1:], "duration": 250}
    pictures[0].save(file, kind, **more, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_an_animated_picture_is_a_video(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    data = animation(kind)
    video, found = opened(data)
    assert (video.height, video.width) == (16, 24)
    assert [close(one[4], color) for one, color in zip(found, COLORS, strict=True)] == [True] * 4
    still = io.BytesIO()
    Image.new("RGB", (24, 16)).save(still, kind)
    if kind != "GIF":  # a GIF is given as a video whatever it holds
        with pytest.raises(UserError, match="is a still image .*: give it as an image"):
            opened(still.getvalue())


def test_an_animated_picture_is_turned_by_its_tag_and_hides_its_default():
    tag = Image.Exif()
    tag[0x0112] = 6
    video, found = opened(animation("WEBP", exif=tag))
    assert (video.height, video.width) == (24, 16) and len(found) == 4
    found = opened(animation("PNG", default_image=True))[1]
    assert len(found) == 2 and close(found[0][4], COLORS[1])  # of three: the first is no frame


def test_an_animation_has_a_limit(monkeypatch):
    assert opened(animation("GIF"))[0].count == 4
    monkeypatch.setattr(animations, "MAX_ANIMATION_FRAMES", 3)
    with pytest.raises(UserError, match="animation of 4 frames of 24 x 16 pixels.*as MP4"):
        opened(animation("GIF"))
