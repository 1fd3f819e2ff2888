"""Positions of tokens and patches are those of transformers' Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

import itertools

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from vlm_jax.errors import UserError
from vlm_jax.positions import (
    interpolation,
    mrope,
    vision_positions,
    vision_segments,
    vision_windows,
)

IMAGE, VIDEO = 900, 901


TEXT = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def reference():
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32}
    with torch.device("meta"):
        return Qwen2VLModel(Qwen2VLConfig(text_config=TEXT, vision_config=vision))


@pytest.fixture(scope="module")
def timed_reference():
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"intermediate_size": 16, "tokens_per_second": 3}
    with torch.device("meta"):
        return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision))


def layout(rng, count, kinds=("image", "video"), merge=2):
    """Return tokens, kinds of tokens, image grids and video grids of a random row."""
    tokens = list(rng.integers(0, 900, rng.integers(0, 6)))
    grids = {"image": [], "video": []}
    for _ in range(count):
        kind = rng.choice(kinds)
        frames = 1 if kind == "image" else int(rng.integers(1, 13))
        grid = (frames, *(int(n) * merge for n in rng.integers(1, 6, 2)))
        grids[kind].append(grid)
        size = grid[0] * grid[1] * grid[2] // merge**2
        tokens += [IMAGE if kind == "image" else VIDEO] * size
        tokens += list(rng.integers(0, 900, rng.integers(1, 6)))
    return np.array(tokens, np.int32), grids["image"], grids["video"]


def expected(model, tokens, images, videos, **more):
    kinds = np.where(tokens == IMAGE, 1, np.where(tokens == VIDEO, 2, 0))
    positions, delta = model.get_rope_index(
        torch.tensor(tokens[None].astype(np.int64)),
        torch.tensor(kinds[None]),
        torch.tensor(images) if images else None,
        torch.tensor(videos) if videos else None,
        **more,
    )
    return positions[:, 0].numpy(), int(delta)


@pytest.mark.parametrize("kinds", [("image",), ("video",), ("image", "video")])
def test_mrope_equals_the_reference(reference, kinds):
    rng = np.random.default_rng(len(kinds) + len(kinds[0]))
    for trial in range(350):  # of three kinds, less a few empty ones: 1,000 layouts
        tokens, images, videos = layout(rng, trial % 5, kinds)
        if not len(tokens):
            continue
        want, delta = expected(reference, tokens, images, videos)
        got = mrope(tokens, images, videos, 2, IMAGE, VIDEO)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)
        assert got.max() + 1 - len(tokens) == delta


def test_mrope_with_times_equals_the_reference(timed_reference):
    rng = np.random.default_rng(5)
    for trial in range(300):
        tokens, images, videos = layout(rng, 1 + trial % 4, ("video", "image"))
        seconds = rng.uniform(0.1, 2.5, len(videos)).astype(np.float32)
        times = {"second_per_grid_ts": torch.from_numpy(seconds)} if videos else {}
        want, delta = expected(timed_reference, tokens, images, videos, **times)
        got = mrope(tokens, images, videos, 2, IMAGE, VIDEO, 3 * seconds)
        np.testing.assert_array_equal(got, want)
        assert got.max() + 1 - len(tokens) == delta


def test_mrope_of_frames_apart_equals_the_reference():
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"intermediate_size": 16, "deepstack_visual_indexes": []}
    with torch.device("meta"):
        model = Qwen3VLModel(Qwen3VLConfig(text_config=TEXT, vision_config=vision))
    rng = np.random.default_rng(6)
    for trial in range(300):
        parts, images, videos = [], [], []
        for _ in range(1 + trial % 4):
            frames, is_film = int(rng.integers(1, 6)), bool(rng.integers(2))
            grid = tuple(int(n) * 2 for n in rng.integers(1, 6, 2))
            (videos if is_film else images).append((frames if is_film else 1, *grid))
            for _ in range(frames if is_film else 1):
                parts += list(rng.integers(0, 900, rng.integers(1, 6)))
                parts += [VIDEO if is_film else IMAGE] * (grid[0] * grid[1] // 4)
        tokens = np.array([*parts, 1], np.int32)
        want, _ = expected(model, tokens, images, videos)
        apart = [(1, h, w) for t, h, w in videos for _ in range(t)]
        np.testing.assert_array_equal(mrope(tokens, images, apart, 2, IMAGE, VIDEO), want)


def grids_of(rng, count, merge):
    frames, sizes = rng.integers(1, 4, (count, 1)), rng.integers(1, 12, (count, 2)) * merge
    return np.concatenate([frames, sizes], axis=1)


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_windows_are_those_of_the_reference(merge):
    rng = np.random.default_rng(merge)
    for cells in range(1, 6):
        grids = grids_of(rng, 4, merge)
        index, ends = get_vision_window_index(torch.tensor(grids), merge, cells * merge * 7, 7)
        patches = (index[:, None] * merge**2 + torch.arange(merge**2)).reshape(-1).numpy()
        windows = vision_windows(grids, merge, cells)
        assert windows.dtype == np.int32 and windows.max() == len(ends) - 1
        for start, end in itertools.pairwise(ends):
            (number,) = set(windows[patches[start:end]])
            assert (windows == number).sum() == end - start


@pytest.mark.parametrize("merge", [1, 2])
def test_interpolation_is_that_of_the_reference(merge):
    rng = np.random.default_rng(merge)
    for side in (1, 2, 5, 48):
        grids = grids_of(rng, 5, merge)
        taps, weights = interpolation(grids, merge, side)
        wanted = get_vision_interpolation_indices_and_weights(
            torch.tensor(grids), side, align_corners=True, spatial_merge_size=merge
        )
        np.testing.assert_array_equal(taps, wanted[0])
        np.testing.assert_array_equal(weights, wanted[1])
        assert taps.dtype == np.int32 and weights.dtype == np.float32


def test_no_grids_have_no_windows_and_no_taps():
    assert vision_windows(None, 2, 4).shape == (0,)
    assert [x.shape for x in interpolation([], 2, 4)] == [(0, 4), (0, 4)]


def test_mrope_of_adjacent_images_is_each_after_the_other():
    tokens = np.array([5] + [IMAGE] * 4 + [IMAGE] * 2 + [6])
    got = mrope(tokens, [(1, 4, 4), (1, 2, 4)], None, 2, IMAGE, None)
    np.testing.assert_array_equal(
        got, [[0, 1, 1, 1, 1, 3, 3, 5], [0, 1, 1, 2, 2, 3, 3, 5], [0, 1, 2, 1, 2, 3, 4, 5]]
    )


def test_mrope_refuses_placeholders_without_features():
    with pytest.raises(UserError, match="3 image placeholders"):
        mrope(np.array([1, IMAGE, IMAGE, IMAGE]), [(1, 4, 4)], None, 2, IMAGE, VIDEO)
    with pytest.raises(UserError, match="do not stand together"):
        mrope(np.array([IMAGE, 1, IMAGE, IMAGE, IMAGE]), [(1, 4, 4)], None, 2, IMAGE, VIDEO)
    with pytest.raises(UserError, match="0 video placeholders"):
        mrope(np.array([1, 2]), None, [(1, 4, 4)], 2, IMAGE, VIDEO)


def test_vision_positions_and_segments_equal_the_reference():
    rng = np.random.default_rng(0)
    for merge in (1, 2, 3):
        for _ in range(30):
            grids = [
                (int(rng.integers(1, 4)), *(int(n) * merge for n in rng.integers(1, 6, 2)))
                for _ in range(rng.integers(1, 5))
            ]
            want = get_vision_position_ids(torch.tensor(grids), merge).numpy()
            np.testing.assert_array_equal(vision_positions(grids, merge), want)
            ends = get_vision_cu_seqlens(torch.tensor(grids)).numpy()
            ids = np.repeat(np.arange(1, len(ends)), np.diff(ends))
            np.testing.assert_array_equal(vision_segments(grids), ids)


def test_no_grids_make_no_patches():
    assert vision_positions(None, 2).shape == (0, 2)
    assert vision_segments([]).shape == (0,)
    np.testing.assert_array_equal(mrope(np.arange(3), None, None, 2, IMAGE, VIDEO)[1], [0, 1, 2])
