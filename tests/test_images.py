"""Images become the very floats that transformers' PIL processors make of them."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlm_jax.data.media.image_settings import PROCESSORS, make_processor, read_settings
from vlm_jax.data.media.images import image_size, read_image
from vlm_jax.data.media.processors import look_up
from vlm_jax.errors import UserError

REFERENCES = {
    "Gemma3ImageProcessor": Gemma3ImageProcessorPil,
    "Qwen2VLImageProcessor": Qwen2VLImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
}
# (height, width): odd, tiny, long, exact, larger than every crop.
SIZES = [(37, 53), (1, 9), (3, 500), (224, 224), (301, 226), (56, 560), (700, 411)]
SETTINGS = [
    ("Qwen2VLImageProcessor", {}),
    ("Qwen2VLImageProcessor", {"min_pixels": 3136, "max_pixels": 28 * 28 * 16}),
    ("Qwen2VLImageProcessor", {"size": {"shortest_edge": 28 * 28 * 30, "longest_edge": 40000}}),
    ("Qwen2VLImageProcessor", {"patch_size": 8, "temporal_patch_size": 1, "merge_size": 3}),
    ("Qwen2VLImageProcessor", {"do_normalize": False, "resample": 2}),
    ("CLIPImageProcessor", {}),
    (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 21, "width": 44}},
    ),
    ("CLIPImageProcessor", {"size": 64, "crop_size": 48, "do_rescale": False}),
    ("CLIPImageProcessor", {"size": 64, "crop_size": 65, "do_normalize": False}),
    ("CLIPImageProcessor", {"do_resize": False, "crop_size": 100}),
    ("LlavaImageProcessor", {"size": 56, "crop_size": 56}),
    ("LlavaImageProcessor", {"size": 56, "crop_size": 56, "do_pad": True}),
    ("SiglipImageProcessor", {}),
    ("SiglipImageProcessor", {"size": {"height": 30, "width": 42}, "rescale_factor": 0.01}),
]


def picture(size, mode="RGB", seed=0):
    """Return a PIL image of noise over a gradient, so that every filter has something to do."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, size[1])[None, :, None]
    pixels = (ramp + rng.integers(0, 56, (*size, 4))).astype(np.uint8)
    if mode == "RGBA":
        return Image.fromarray(pixels)
    return Image.fromarray(pixels[:, :, :3]).convert(mode)


@pytest.mark.parametrize(("name", "raw"), SETTINGS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pixels_equal_the_reference(name, raw, mode):
    raw = {"image_processor_type": name, **raw}
    reference = REFERENCES[name](**{k: v for k, v in raw.items() if k != "image_processor_type"})
    processor = make_processor(raw)
    for size in SIZES:
        image = picture(size, mode)
        want = reference(image, return_tensors="np")
        cut, grid = processor.cut(read_image(image))
        got = look_up(processor.table, cut)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want["pixel_values"].astype(np.float32))
        if grid is not None:
            assert grid == tuple(want["image_grid_thw"][0])
        assert processor.grid(*image_size(image)) == grid


def test_every_processor_has_a_reference():
    assert set(REFERENCES) == set(PROCESSORS)


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_defaults_equal_the_reference(name):
    ours = make_processor({"image_processor_type": name}).settings()
    theirs = REFERENCES[name]().to_dict()
    for key, value in theirs.items():
        value = list(value) if isinstance(value, tuple) else value
        ours_value = list(ours[key]) if isinstance(ours.get(key), tuple) else ours.get(key)
        assert ours_value == value or key == "do_pad", key


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_settings_files_of_transformers_are_read_and_round_trip(tmp_path, name):
    REFERENCES[name]().save_pretrained(tmp_path)
    processor = make_processor(read_settings(tmp_path))
    again = make_processor(json.loads(json.dumps(processor.settings())))
    image = picture((61, 47))
    one, other = (look_up(p.table, p.cut(read_image(image))[0]) for p in (processor, again))
    np.testing.assert_array_equal(one, other)
    nested = {"processor_class": "x", "image_processor": processor.settings()}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert read_settings(tmp_path)["image_processor_type"] == name


def test_written_settings_give_transformers_our_pixels(tmp_path):
    raw = {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 12845056}
    processor = make_processor(raw, min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 9)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.settings()))
    image = picture((300, 200))
    want = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="np")
    cut, grid = processor.cut(read_image(image))
    np.testing.assert_array_equal(look_up(processor.table, cut), want["pixel_values"])
    assert grid[1] * grid[2] <= 9 * 4


def test_image_resolution_is_served_as_it_is_trained(tmp_path):
    qwen = make_processor({"image_processor_type": "Qwen2VLImageProcessor"}, image_resolution=120)
    assert qwen.grid(224, 224) == (1, 8, 8)  # 120 is about 4 tokens of 28 pixels
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(qwen.settings()))
    served = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    for size in SIZES:
        image = picture(size)
        want = served(image, return_tensors="np")
        cut, grid = qwen.cut(read_image(image))
        np.testing.assert_array_equal(look_up(qwen.table, cut), want["pixel_values"])
        assert grid == qwen.grid(*size) == tuple(want["image_grid_thw"][0])
    clip = {"image_processor_type": "CLIPImageProcessor"}
    assert make_processor(clip, image_resolution=224).output == (224, 224)
    with pytest.raises(UserError, match="takes 224 x 224"):
        make_processor(clip, image_resolution=336)
    with pytest.raises(UserError, match="no effect"):
        make_processor(clip, max_pixels=1000)


@pytest.mark.parametrize("side", [28, 60, 120, 336])
def test_no_enlarged_image_has_more_patches_than_the_largest(side):
    qwen = make_processor({"image_processor_type": "Qwen2VLImageProcessor"}, image_resolution=side)
    sizes = np.random.default_rng(0).integers(1, 200, (2000, 2)).tolist()
    sizes = [size for size in sizes if max(size) <= 100 * min(size)]
    assert max(np.prod(qwen.grid(*size)) for size in sizes) <= qwen.largest


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def test_an_image_is_read_from_wherever_it_is(tmp_path):
    image = picture((20, 30))
    data = encoded(image, format="PNG")
    (tmp_path / "a b.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    for source in (
        image,
        data,
        "a b.png",
        str(tmp_path / "a b.png"),
        f"file://{tmp_path}/a b.png",
        tmp_path / "a b.png",
        text,
        f"data:image/png;base64,{text}",
        {"bytes": data, "path": None},
        {"bytes": None, "path": "a b.png"},
        np.asarray(image),
    ):
        np.testing.assert_array_equal(read_image(source, tmp_path), np.asarray(image))
        assert image_size(source, tmp_path) == (20, 30)


def test_orientation_and_modes():
    image = picture((20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({"format": "PNG"}, {"format": "JPEG", "quality": 95}):
        data = encoded(image, exif=exif, **options)
        assert image_size(data) == (30, 20)
        upright = read_image(data)
        assert upright.shape == (30, 20, 3)
    np.testing.assert_array_equal(
        read_image(encoded(image, exif=exif, format="PNG")), np.rot90(np.asarray(image), -1)
    )
    for mode in ("CMYK", "P", "1", "LA", "YCbCr", "RGBA"):
        assert read_image(image.convert(mode)).shape == (20, 30, 3)
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert (read_image(clear) == 255).all()
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    assert (read_image(palette) == 255).all()
    deep = Image.fromarray(np.array([[0, 256 * 7 + 3], [65535, 256]], np.uint16))
    np.testing.assert_array_equal(read_image(deep)[:, :, 0], [[0, 7], [255, 1]])
    np.testing.assert_array_equal(read_image(encoded(deep, format="PNG"))[0, 1], [7, 7, 7])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "there is no file"),
        (b"nothing", "is text"),
        (bytes(9), "is of no known kind .its first bytes are 00 00"),
        ("data:image/png;base64,###", "does not hold base64"),
        ("https://example.com/a.png", "not fetched unless data.allow_urls"),
        (3, "not int"),
        (np.zeros((2, 2), np.float32), "must be uint8"),
        (Image.new("F", (2, 2)), "floating-point"),
        (Image.fromarray(np.array([[0, 70000]], np.int32)), "32-bit grey"),
        (Image.fromarray(np.array([[-1, 3]], np.int32)), "32-bit grey"),
        (encoded(picture((200, 300)), format="PNG")[:9000], "damaged or truncated"),
        (encoded(picture((200, 300)), format="JPEG")[:3000], "damaged or truncated"),
    ],
)
def test_bad_images_say_what_is_wrong(source, message):
    with pytest.raises(UserError, match=message):
        read_image(source)


def test_bad_settings_say_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="did you mean 'CLIPImageProcessor'"):
        make_processor({"image_processor_type": "CLIPImageProcesor"})
    with pytest.raises(UserError, match=r"do_thumbnail.*not known"):
        make_processor({"image_processor_type": "CLIPImageProcessor", "do_thumbnail": True})
    with pytest.raises(UserError, match="different sizes"):
        make_processor({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False})
    with pytest.raises(UserError, match="200 times"):
        make_processor({"image_processor_type": "Qwen2VLImageProcessor"}).grid(1, 201)
    for size in ({"height": 336, "width": 336}, 336):
        with pytest.raises(UserError, match=r"size=.*336.*keeps each image's aspect ratio"):
            make_processor({"image_processor_type": "Qwen2VLImageProcessor", "size": size})
    assert read_settings(tmp_path) is None
    (tmp_path / "preprocessor_config.json").write_text('{"a":\n 1,}')
    with pytest.raises(UserError, match="line 2"):
        read_settings(tmp_path)


# How EXIF's orientations 1 to 8 are shown.
UPRIGHT = [
    lambda a: a,
    lambda a: a[:, ::-1],
    lambda a: a[::-1, ::-1],
    lambda a: a[::-1],
    lambda a: a.swapaxes(0, 1),
    lambda a: np.rot90(a, -1),
    lambda a: a[::-1, ::-1].swapaxes(0, 1),
    lambda a: np.rot90(a),
]
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{}"/></x:xmpmeta>'


def behind_the_pixels(png, *names):
    """Return a PNG whose chunks of these names stand at its end."""
    chunks, place = [], 8
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4])
        chunks.append(png[place:end])
        place = end
    late = [one for one in chunks if one[4:8] in names]
    rest = [one for one in chunks if one[4:8] not in names]
    return png[:8] + b"".join([*rest[:-1], *late, rest[-1]])


def tagged(kind, orientation, image):
    """Return an image file of a kind, with its orientation in a tag."""
    tag = Image.Exif()
    tag[0x0112] = orientation
    xmp = XMP.format(orientation)
    if kind == "JPEG with XMP":
        return encoded(image, format="JPEG", xmp=xmp.encode())
    if kind == "TIFF with XMP":
        return encoded(image, format="TIFF", tiffinfo={0x0112: orientation, 700: xmp.encode()})
    if kind.startswith("PNG with XMP"):
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp)
        png = encoded(image, format="PNG", pnginfo=text)
        return behind_the_pixels(png, b"iTXt") if "behind" in kind else png
    data = encoded(image, format=kind.split()[0], exif=tag)
    return behind_the_pixels(data, b"eXIf") if "behind" in kind else data


KINDS = [
    *("JPEG", "PNG", "PNG behind the pixels", "WEBP", "TIFF", "AVIF"),
    *("JPEG with XMP", "PNG with XMP", "PNG with XMP behind", "TIFF with XMP"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_as_large_as_its_upright_pixels(kind, orientation):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    pixels = np.zeros((40, 56, 3), np.uint8)
    pixels[:16, :16], pixels[:16, -16:] = (0, 250, 0), (250, 0, 0)
    data = tagged(kind, orientation, Image.fromarray(pixels))
    want = UPRIGHT[orientation - 1](pixels)
    assert image_size(data) == want.shape[:2]
    assert np.abs(read_image(data).astype(int) - want).mean() < 8
    with Image.open(io.BytesIO(data)) as given:  # opened, not decoded
        assert image_size(given) == want.shape[:2]
        assert read_image(given).shape == want.shape


def test_a_size_does_not_cost_the_pixels():
    """What programs write behind them, other than an orientation, is passed over."""
    text = PngImagePlugin.PngInfo()
    text.add_text("date:create", "2026-01-01")
    png = behind_the_pixels(encoded(picture((20, 30)), format="PNG", pnginfo=text), b"tEXt")
    place = png.index(b"IDAT")
    assert image_size(png[: place + 4] + bytes(100) + png[place + 104 :]) == (20, 30)
