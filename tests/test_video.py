"""Videos: which frames are taken, the patches they make, and what is refused."""

import json

import numpy as np
import pytest
from checkpoint_files import llava_files, qwen2_vl_files, write_image
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlm_jax.data import Encoder, encode, read_records
from vlm_jax.data.encode import BadExample
from vlm_jax.data.media.access import SAFE, Access
from vlm_jax.data.media.processors import look_up
from vlm_jax.data.media.video import Sampling, open_video
from vlm_jax.data.media.video_processor import make_video_processor, read_video_settings
from vlm_jax.data.records.record import canonical
from vlm_jax.errors import UserError

ANSWER = {"role": "assistant", "content": "red"}
VIDEO, IMAGE = {"type": "video"}, {"type": "image"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Encoder(qwen2_vl_files(tmp_path_factory.mktemp("qwen")))


def frames(count, height=24, width=40, seed=0):
    """Return frames of noise, no two alike."""
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8))


def asked(*parts, **media):
    text = {"type": "text", "text": "What color?"}
    return {"messages": [{"role": "user", "content": [*parts, text]}, ANSWER], **media}


def write_video(path, count, rate=8, height=32, width=48):
    """Write a film whose frame i is grey of brightness 8 * i."""
    av = pytest.importorskip("av", reason="PyAV is not installed (pip install 'vlm_jax[video]')")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(count):
            pixels = np.full((height, width, 3), 8 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def smart_nframes(total, rate, fps=2.0, least=4, most=768):
    """What Qwen's utilities do, in their own order of operations."""
    least, most = -(-least // 2) * 2, min(most, total) // 2 * 2
    return int(min(min(max(total / rate * fps, least), most), total) // 2 * 2)


def test_sampled_frames_are_those_of_qwens_utilities():
    import torch

    rng = np.random.default_rng(0)
    for _ in range(300):
        total, rate = int(rng.integers(2, 3000)), float(rng.choice([10, 23.976, 25, 30, 60]))
        fps, least, most = float(rng.choice([0.5, 1, 2, 4])), int(rng.integers(2, 9)), 64
        count = smart_nframes(total, rate, fps, least, most)
        want = torch.linspace(0, total - 1, count).round().long().numpy()
        got = Sampling(fps, least, most).taken(total, rate)[0]
        np.testing.assert_array_equal(got, want)
    assert Sampling(nframes=5).taken(9, 1.0)[0].tolist() == [0, 3, 5, 8]
    assert Sampling(video_start=1, video_end=2).taken(100, 10)[0].tolist() == [10, 13, 17, 20]
    assert Sampling().taken(1, 10)[0].tolist() == [0]
    with pytest.raises(UserError, match="leave none of its 10 frames"):
        Sampling(video_start=5).taken(10, 10)
    with pytest.raises(UserError, match="nframes is 20"):
        Sampling(nframes=20).taken(10, 10)[0]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", [(24, 40), (61, 30), (9, 9)])
def test_patches_are_each_frames_own_two_by_two(count, size):
    """Each slot in time of a patch is what the image processor makes of that frame alone."""
    raw = {"patch_size": 4, "min_pixels": 8 * 8 * 4, "max_pixels": 8 * 8 * 20}
    reference = Qwen2VLImageProcessorPil(**raw)
    processor = make_video_processor({**raw, "image_processor_type": "Qwen2VLImageProcessor"})
    video = open_video(frames(count, *size), None, SAFE, processor.sampling)
    cut, grid = processor.cut(video)
    got = look_up(processor.table, cut)
    assert grid == processor.grid(video)
    padded = [*frames(count, *size), frames(count, *size)[-1]][: count + count % 2]
    for number, frame in enumerate(padded):
        one = reference(Image.fromarray(frame), return_tensors="np")
        want = one["pixel_values"].reshape(-1, 3, 2, 16)[:, :, 0]
        assert grid == ((count + 1) // 2, *one["image_grid_thw"][0, 1:])
        of_grid = got.reshape(grid[0], -1, 3, 2, 16)
        np.testing.assert_array_equal(of_grid[number // 2, :, :, number % 2], want)


def test_settings_come_from_the_video_file_before_the_image_file(tmp_path):
    image = {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 28 * 28 * 7}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    assert make_video_processor(read_video_settings(tmp_path)).patches.max_pixels == 28 * 28 * 7
    own = {"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 12, "fps": 1}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(own))
    processor = make_video_processor(read_video_settings(tmp_path))
    assert processor.patches.min_pixels == 128 * 28 * 28
    assert processor.patches.max_pixels == 768 * 28 * 28
    assert (processor.sampling.max_frames, processor.sampling.fps) == (12, 1)
    nested = {"video_processor": {**own, "max_frames": 6, "cap_pixels_per_frame": True}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    processor = make_video_processor(read_video_settings(tmp_path), max_frames=8, fps=4)
    assert (processor.sampling.max_frames, processor.sampling.fps) == (8, 4) and processor.cap
    again = make_video_processor(json.loads(json.dumps(processor.settings())))
    assert again.sampling == processor.sampling
    assert again.patches.max_pixels == processor.patches.max_pixels and again.cap
    with pytest.raises(UserError, match="did you mean 'max_frames'"):
        make_video_processor({**own, "max_frame": 3})


def test_many_frames_share_the_budget_where_the_settings_say_so():
    raw = {"video_processor_type": "Qwen2VLVideoProcessor", "cap_pixels_per_frame": True}
    capped, free = (
        make_video_processor(raw),
        make_video_processor({**raw, "cap_pixels_per_frame": False}),
    )
    video = open_video({"video": frames(2), "min_pixels": 28 * 28}, None, SAFE, capped.sampling)
    import dataclasses

    long = dataclasses.replace(video, count=700, height=1000, width=1000)
    budget = int(128000 * 28 * 28 * 0.9) * 2 // 700
    assert np.prod(capped.size(long)) <= budget < np.prod(free.size(long))


def test_a_mixed_record_is_measured_as_it_is_encoded(qwen, tmp_path):
    picture = write_image(tmp_path / "a.png", 30, 20)
    record = asked(
        VIDEO, IMAGE, VIDEO, images=[str(picture)], videos=[frames(3), frames(4, 16, 16)]
    )
    arrays = qwen.encode(record)
    assert arrays["video_grid_thw"].tolist()[0][0] == 2
    assert len(arrays["pixel_values_videos"]) == arrays["video_grid_thw"].prod(1).sum()
    size, example = qwen.measure(record), qwen.example(record)
    assert (size.tokens, size.patches) == (len(example["tokens"]), len(example["patches"]))
    films = arrays["tokens"] == qwen.config.video_token_id
    assert films.sum() * 4 == len(arrays["pixel_values_videos"])
    assert not arrays["weights"][films].any()
    prompt = qwen.prompt(record)
    np.testing.assert_array_equal(prompt["patches"], example["patches"])
    assert encode(qwen.directory, asked(IMAGE, images=[str(picture)]))["video_grid_thw"] is None


def test_records_name_videos_as_they_name_images(tmp_path):
    text = {"role": "user", "content": "<video>\nand <image> then <video>?"}
    got = canonical({"messages": [text, ANSWER], "image": "i.png", "videos": ["a.mp4", "b.mp4"]})
    kinds = [part["type"] for part in got["messages"][0]["content"]]
    assert kinds == ["video", "text", "image", "text", "video", "text"]
    assert got["videos"] == ["a.mp4", "b.mp4"] and got["images"] == ["i.png"]
    part = {"type": "video", "video": "a.mp4", "fps": 1.0}
    assert canonical(asked(part))["videos"] == [{"video": "a.mp4", "fps": 1.0}]
    part = {"type": "video_url", "video_url": {"url": "a.mp4"}}
    assert canonical(asked(part))["videos"] == ["a.mp4"]
    turns = [{"role": "user", "content": "q"}, ANSWER]
    got = canonical({"messages": turns, "video": ["1.jpg", "2.jpg"], "image": "i.png"})
    assert got["videos"] == [["1.jpg", "2.jpg"]]
    assert [p["type"] for p in got["messages"][0]["content"]] == ["image", "video", "text"]
    assert canonical({"messages": turns, "video": ["1.mp4", "2.mp4"]})["videos"] == [
        "1.mp4",
        "2.mp4",
    ]
    assert canonical(got) == got


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_a_film_gives_the_frames_that_are_sampled(tmp_path, suffix):
    path = write_video(tmp_path / f"a.{suffix}", 24)
    for source in (path, path.read_bytes(), {"video": str(path)}):
        video = open_video(source, None, SAFE, Sampling())
        assert (video.count, video.height, video.width) == (6, 32, 48)
        means = [frame.mean() for frame in video.frames()]
        want = 8 * Sampling().taken(24, 8.0)[0]
        assert abs(np.array(means) - want).max() < 4
    few = open_video({"video": str(path), "nframes": 2}, None, SAFE, Sampling())
    assert len(list(few.frames())) == 2
    with pytest.raises(UserError, match="max_image_pixels = 1000"):
        open_video(path, None, Access(max_pixels=1000), Sampling())


def test_a_film_in_a_file_of_records(qwen, tmp_path):
    write_video(tmp_path / "a.mp4", 16)
    (tmp_path / "d.json").write_text(json.dumps([asked(VIDEO, video="a.mp4")]))
    record = read_records(tmp_path / "d.json")[0]
    assert qwen.measure(record).patches == len(qwen.encode(record)["pixel_values_videos"])
    cut = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(BadExample, match="Video 0 'a.mp4' of record 0") as error:
        qwen.encode(record)
    assert error.value.reason == "video"


def test_an_animated_gif_is_a_video(tmp_path):
    pictures = [Image.new("L", (20, 12), 10 * i) for i in range(8)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=250)
    video = open_video("a.gif", tmp_path, SAFE, Sampling())
    assert (video.count, video.height, video.width) == (4, 12, 20)
    means = [int(frame.mean()) for frame in video.frames()]
    assert means == [10 * i for i in Sampling().taken(8, 4.0)[0]]


def test_without_pyav_a_film_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'vlm_jax\[video\]'"):
        open_video("a.mp4", tmp_path, SAFE, Sampling())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.mp4", "there is no file"),
        ("a.jpg", "still image"),
        ([], "is empty"),
        (3, "not int"),
        ({"fps": 2}, "has no 'video'"),
        ({"video": "a.mp4", "fsp": 2}, "did you mean 'fps'"),
        ({"video": "a.mp4", "fps": -1}, "fps is -1; expected a positive"),
        ({"video": "a.mp4", "nframes": 2.5}, "nframes is 2.5"),
        ({"video": "a.mp4", "fps": 1, "nframes": 4}, "exclude each other"),
        ({"video": frames(2), "video_start": 1}, "has no time"),
        ([*frames(1), *frames(1, 8, 8)], "must have one size"),
        (["a.jpg", "no.jpg"], "frame 1 'no.jpg': there is no file"),
        ({"video": frames(5), "max_frames": 4}, "more than max_frames = 4"),
        ("https://example.com/a.mp4", "data.allow_urls"),
    ],
)
def test_bad_videos_say_what_is_wrong(tmp_path, source, message):
    write_image(tmp_path / "a.jpg", 8, 8)
    with pytest.raises(UserError, match=message):
        open_video(source, tmp_path, SAFE, Sampling())


def test_llava_refuses_video(tmp_path):
    with pytest.raises(BadExample, match="takes images only"):
        Encoder(llava_files(tmp_path)).measure(asked(VIDEO, videos=[frames(2)]))


def test_a_list_of_frames_has_its_own_rate_and_not_that_of_films():
    frames = [np.zeros((8, 8, 3), np.uint8)] * 3
    for given, times in ((frames, [0, 0.5, 1]), ({"video": frames, "fps": 4.0}, [0, 0.25, 0.5])):
        video = open_video(given, None, Access(), Sampling(fps=1.0))
        assert list(video.times) == times and video.fps == 1 / times[1]
