"""Image files as pixels: every mode by its rule, every broken file by one error."""

import contextlib
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.behaviour.pictures import broken_files, picture, save
from untwine.data.base import CorruptImage
from untwine.data.images import center_crop, decode, random_crop, to_tensor


@pytest.fixture
def pixels(tmp_path):
    def read(image, channels=3, suffix="png", **options):
        return np.asarray(decode(save(tmp_path / f"x.{suffix}", image, **options), channels)).astype(float)

    return read


def test_rgb_and_grey(pixels):
    levels = picture(0)
    assert np.array_equal(pixels(levels), levels)
    grey = levels[..., 0]
    assert np.array_equal(pixels(grey), np.repeat(grey[..., None], 3, -1))
    assert np.array_equal(pixels(grey, 1), grey)
    luma = levels @ [0.299, 0.587, 0.114]
    assert np.abs(pixels(levels, 1) - luma).max() <= 0.51
    assert np.array_equal(pixels(Image.fromarray(grey > 99)), np.repeat(255.0 * (grey > 99)[..., None], 3, -1))


def over_white(levels, alpha):
    return levels * (alpha / 255) + 255 * (1 - alpha / 255)


def test_alpha_is_composed_over_white(pixels):
    rgba = picture(1, channels=4)
    rgba[0, :3, 3] = (0, 255, 128)
    got = pixels(rgba)
    assert np.array_equal(got[0, 0], [255, 255, 255])
    assert np.array_equal(got[0, 1], rgba[0, 1, :3])
    assert np.abs(got - over_white(rgba[..., :3], rgba[..., 3:])).max() <= 1
    la = picture(2, channels=2)
    la[0, :2, 1] = (0, 255)
    got = pixels(la, 1)
    assert got[0, 0] == 255
    assert got[0, 1] == la[0, 1, 0]
    assert np.abs(got - over_white(la[..., 0], la[..., 1])).max() <= 1


def test_palettes(pixels):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert pixels(image).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    assert pixels(image, transparency=1).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_a_transparent_colour(pixels):
    levels = np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8)
    assert pixels(levels, transparency=(9, 8, 7)).tolist() == [[[255, 255, 255], [1, 2, 3]]]


def test_cmyk(pixels):
    cmyk = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 0, 255], [51, 102, 0, 51]]], np.uint8)
    got = pixels(Image.fromarray(cmyk, "CMYK"), suffix="tif")
    ink = cmyk.astype(float) / 255
    assert np.abs(got - 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])).max() <= 1
    jpeg = pixels(Image.new("CMYK", (16, 16), (0, 255, 0, 0)), suffix="jpg", quality=100)
    assert np.abs(jpeg - [255, 0, 255]).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_precision(pixels, suffix):
    levels = np.array([[0, 1, 257, 32768, 65535]], np.uint16)
    got = pixels(Image.fromarray(levels), 1, suffix)
    assert np.allclose(got, levels / 257.0, atol=1e-4)
    x = to_tensor(got.astype(np.float32), 3)
    assert x.shape == (3, 1, 5)
    assert torch.allclose(x[1, 0], torch.tensor(levels[0] / 32767.5 - 1, dtype=torch.float32), atol=1e-6)


def test_integer_and_float_levels_without_a_range(pixels):
    assert pixels(Image.fromarray(np.array([[65535]], np.int32)), 1, "tif").item() == 255
    with pytest.raises(CorruptImage, match=r"x\.tif: integer levels 70000\.\.70000 are outside 0\.\.65535"):
        pixels(Image.fromarray(np.array([[70000]], np.int32)), 1, "tif")
    with pytest.raises(CorruptImage, match="float levels have no known range"):
        pixels(Image.fromarray(np.array([[0.5]], np.float32)), 1, "tif")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation(pixels, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if suffix == "webp" else {}
    got = pixels(frames[0], suffix=suffix, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(got, np.broadcast_to([255, 0, 0], (4, 4, 3)))


@pytest.mark.parametrize(
    "orientation, turned",
    [(1, lambda x: x), (2, lambda x: x[:, ::-1]), (3, lambda x: x[::-1, ::-1]), (4, lambda x: x[::-1])]
    + [(5, lambda x: x.swapaxes(0, 1)), (6, lambda x: np.rot90(x, -1)), (8, lambda x: np.rot90(x))],
)
def test_exif_orientation_is_applied(pixels, orientation, turned):
    levels, exif = picture(3), Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(levels, exif=exif), turned(levels))


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8001, 8000), (50_000, 50_000)])
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CorruptImage, match=r"bomb\.png: .*(at most 64000000|exceeds limit)"):
            decode(tmp_path / "bomb.png")


def test_broken_files_are_one_kind_of_error_that_names_them(tmp_path):
    for name in broken_files(tmp_path):
        with pytest.raises(CorruptImage, match=name):
            decode(tmp_path / name)
    with pytest.raises(CorruptImage, match="gone"):
        decode(tmp_path / "gone.png")


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_prefix_of_a_file_is_read_or_refused(tmp_path, data):
    suffix = data.draw(st.sampled_from(["png", "jpg", "gif", "webp", "bmp", "tif"]))
    whole = save(tmp_path / f"whole.{suffix}", picture(1)).read_bytes()
    path = tmp_path / f"part.{suffix}"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with contextlib.suppress(CorruptImage):
        assert decode(path).size == (10, 12)


@pytest.mark.parametrize(
    "height, width", [(1, 1), (1, 50), (5, 7), (8, 8), (9, 8), (15, 16), (31, 40), (64, 33), (700, 10)]
)
def test_center_crop_size_and_centre(height, width):
    image = Image.fromarray(picture(0, height, width))
    assert center_crop(image, 8).size == (8, 8)


def test_center_crop_at_its_own_size_only_crops():
    levels = picture(0, 8, 13)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(levels), 8)), levels[:, 2:10])


def test_center_crop_halves_by_averaging_boxes():
    levels = picture(4, 32, 48)[..., 0].astype(np.float32)
    boxes = levels[:, 8:40].reshape(8, 4, 8, 4).mean((1, 3))
    assert np.allclose(np.asarray(center_crop(Image.fromarray(levels), 8)), boxes, atol=1e-3)


def test_center_crop_is_box_then_bicubic_then_crop_pixel_for_pixel():
    image = Image.fromarray(picture(5, 50, 70))
    expected = image.resize((35, 25), Image.Resampling.BOX).resize((22, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(center_crop(image, 16)), np.asarray(expected)[:, 3:19])


def test_an_extreme_aspect_ratio_is_refused_before_it_is_allocated():
    with pytest.raises(CorruptImage, match="would exceed 64000000 pixels"):
        center_crop(Image.new("L", (1_000_000, 1)), 64)


@given(u=st.lists(st.floats(0, 0.999), min_size=3, max_size=3), size=st.integers(4, 12))
@settings(max_examples=40, deadline=None)
def test_random_crop_stays_inside(u, size):
    image = Image.new("L", (40, 30), 200)
    assert np.array_equal(np.asarray(random_crop(image, size, torch.tensor(u))), np.full((size, size), 200))


def test_range():
    x = to_tensor(np.array([[0, 127.5, 255, 300, -9]], np.float32), 1)
    assert x.tolist() == [[[-1, 0, 1, 1, -1]]]
    assert x.dtype == torch.float32
