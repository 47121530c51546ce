"""Reading pictures of every kind, refusing what is none, and the pixels that transformers computes."""

from __future__ import annotations

import io
import os
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence, PngImagePlugin, features

from runtimes.errors import ImageError
from runtimes.images import MAX_ASPECT, MAX_PIXELS, load_image, preprocess
from tests.runtimes.manifests import IMAGE

FACTS_896 = replace(IMAGE, size=896)


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def file_of(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    return Gemma3ImageProcessorPil(size={"height": 896, "width": 896}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


# --- pixels ---


@pytest.mark.parametrize("size", [(896, 896), (64, 48), (1, 1), (3000, 2000), (500, 1700), (7, 300), (897, 895)])
def test_pixels_equal_those_of_transformers(processor: Any, size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    pixels = preprocess(load_image(image), FACTS_896)
    assert pixels.shape == (3, 896, 896) and pixels.dtype == np.float32 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, processor(image)["pixel_values"][0])


def test_mean_and_deviation_and_filter_are_used(processor: Any) -> None:
    image = Image.fromarray(noise(100, 80))
    facts = replace(FACTS_896, mean=(0.48, 0.45, 0.4), std=(0.27, 0.26, 0.28), resample="bicubic")
    theirs = processor(image, image_mean=list(facts.mean), image_std=list(facts.std), resample=3)["pixel_values"][0]
    np.testing.assert_array_equal(preprocess(image, facts), theirs)
    assert not np.array_equal(preprocess(image, replace(facts, resample="bilinear")), theirs)


def modes() -> dict[str, Image.Image]:
    palette = Image.fromarray(noise(40, 30)).quantize(16)
    clear_palette = palette.copy()
    clear_palette.info["transparency"] = 3
    mixed_palette = palette.copy()
    mixed_palette.info["transparency"] = bytes(range(0, 256, 16))
    clear_rgb = Image.new("RGB", (20, 20), (1, 2, 3))
    clear_rgb.info["transparency"] = (1, 2, 3)
    clear_gray = Image.fromarray(noise(20, 20, 1))
    clear_gray.info["transparency"] = 7
    return {
        "L": Image.fromarray(noise(50, 40, 1)),
        "1": Image.fromarray(noise(50, 40, 1)).convert("1"),
        "LA": Image.fromarray(noise(50, 40, 2)),
        "RGBA": Image.fromarray(noise(50, 40, 4)),
        "P": palette,
        "P with one clear colour": clear_palette,
        "P with alpha": mixed_palette,
        "PA": Image.fromarray(noise(50, 40, 4)).convert("PA"),
        "RGB with a clear colour": clear_rgb,
        "L with a clear level": clear_gray,
        "CMYK": Image.frombytes("CMYK", (50, 40), noise(50, 40, 4).tobytes()),
        "YCbCr": Image.fromarray(noise(50, 40)).convert("YCbCr"),
        "HSV": Image.fromarray(noise(50, 40)).convert("HSV"),
    }


@pytest.mark.parametrize("name", modes())
def test_every_mode_becomes_what_transformers_makes_of_it(processor: Any, name: str) -> None:
    image = modes()[name]
    ours = preprocess(load_image(image), FACTS_896)
    np.testing.assert_array_equal(ours, processor(image)["pixel_values"][0])


def test_transparent_pixels_are_laid_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    assert [load_image(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (127, 127, 127)]


def test_premultiplied_alpha_is_read() -> None:
    assert load_image(Image.new("RGBA", (2, 2), (10, 20, 30, 0)).convert("RGBa")).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("LA", (2, 2), (10, 0)).convert("La")).getpixel((0, 0)) == (255, 255, 255)


# --- files ---


EXACT = ["PNG", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX"]
LOSSY = ["GIF", "JPEG", "MPO", "WEBP", "JPEG2000", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.parametrize("form", [*EXACT, *LOSSY])
def test_files_of_many_forms(tmp_path: Path, form: str) -> None:
    image = Image.new("RGB", (64, 32), (200, 100, 50))
    path = tmp_path / "picture"
    image.save(path, form, **({"sizes": [(64, 32)]} if form == "ICO" else {}))
    loaded = load_image(path)
    assert loaded.mode == "RGB" and loaded.size == (64, 32)
    difference = np.abs(np.asarray(loaded, np.int16) - np.asarray(image, np.int16)).max()
    assert difference <= (0 if form in EXACT else 6)


def test_a_path_a_string_bytes_and_a_file_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(noise(9, 7)).save(path)
    images = [load_image(path), load_image(str(path)), load_image(path.read_bytes())]
    with path.open("rb") as file:
        images.append(load_image(file))
        assert not file.closed
    assert all(np.array_equal(np.asarray(image), noise(9, 7)) for image in images)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.fromarray(noise(8, 4))
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if inverse is None else upright.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(file_of(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(loaded, upright)


def test_a_damaged_exif_block_does_not_spoil_the_picture() -> None:
    image = Image.fromarray(noise(6, 5))
    data = file_of(image, "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own warning about it must not reach a user's terminal
        loaded = load_image(data)
    np.testing.assert_array_equal(loaded, image)


def test_sixteen_bits_are_scaled_to_eight() -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    for form in ("PNG", "TIFF", "PPM"):
        loaded = load_image(file_of(Image.fromarray(levels), form))
        assert np.asarray(loaded)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255], form
    wide = Image.fromarray(levels.astype(np.int32))
    assert wide.mode == "I"
    assert np.asarray(load_image(wide))[0, :, 1].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


def test_sixteen_bits_with_a_clear_level_are_laid_on_white() -> None:
    image = Image.fromarray(np.array([[1000, 2570]], np.uint16))
    image.info["transparency"] = 1000
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [255, 10]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if form == "WEBP" else {}
    data = file_of(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 3
    assert load_image(data).getpixel((8, 8)) == (255, 0, 0)


def test_a_pillow_picture_is_taken_as_it_stands_and_left_alone() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    picture = Image.open(io.BytesIO(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    picture.seek(1)
    assert load_image(picture).getpixel((8, 8)) == (0, 255, 0)
    original = Image.fromarray(noise(5, 5))
    load_image(original).putpixel((0, 0), (0, 0, 0))
    np.testing.assert_array_equal(original, noise(5, 5))


# --- what is refused ---


@pytest.mark.parametrize(
    "data",
    [b"", b"hello, this is text", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7\n", b"\x00" * 1000, b"<svg xmlns='x'/>"],
    ids=["empty", "text", "a head only", "pdf", "zeros", "svg"],
)
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"the picture of \d+ bytes (is no picture|cannot be read)") as caught:
        load_image(data)
    assert caught.value.hint is not None and "PNG" in caught.value.hint


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(form: str, part: float) -> None:
    data = file_of(Image.fromarray(noise(64, 64)), form)
    with pytest.raises(ImageError, match=r"damaged or cut off|cannot be read|is no picture"):
        load_image(data[: int(len(data) * part)])


def test_a_damaged_file_raises_nothing_else() -> None:
    generator = np.random.default_rng(1)
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000"):
        data = np.frombuffer(file_of(Image.fromarray(noise(48, 48)), form), np.uint8)
        for _ in range(40):
            broken = data.copy()
            broken[generator.integers(0, len(data), 8)] = generator.integers(0, 256, 8)
            try:
                assert load_image(broken.tobytes()).mode == "RGB"
            except ImageError as error:
                assert error.message


def bomb(width: int, height: int) -> bytes:
    """A PNG whose head promises many pixels, in a few bytes."""
    data = file_of(Image.new("1", (8, 8)), "PNG")
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29]
    return data[:12] + head + zlib.crc32(head).to_bytes(4, "big") + data[33:]


@pytest.mark.parametrize("size", [(8193, 8192), (10000, 10000), (60000, 60000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an error only: Pillow's warning must not come out
        with pytest.raises(ImageError, match="pixels") as caught:
            load_image(bomb(*size))
    assert caught.value.hint == "scale it down first"


def test_the_limit_of_pixels_can_be_set() -> None:
    image = Image.new("RGB", (100, 100))
    assert load_image(image, max_pixels=10_000).size == (100, 100)
    with pytest.raises(ImageError, match=r"100 × 100 = 10,000 pixels, more than the 9,999 allowed"):
        load_image(image, max_pixels=9_999)
    assert MAX_PIXELS < 89_478_485  # below Pillow's own warning


def test_a_bomb_in_a_compressed_text_chunk_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * 2_000_000, zip=True)
    with pytest.raises(ImageError):
        load_image(file_of(Image.new("RGB", (4, 4)), "PNG", pnginfo=info))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"has no pixels: it is {size[0]} × {size[1]}"):
        load_image(Image.new("RGB", size))
    with pytest.raises(ImageError, match="must have pixels"):
        preprocess(Image.new("RGB", size), IMAGE)


@pytest.mark.parametrize("size", [(1, 10000), (10000, 1), (MAX_ASPECT * 3 + 1, 3)])
def test_a_thread_of_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="its longer side may be at most 100 times the shorter") as caught:
        load_image(file_of(Image.new("RGB", size), "PNG"))
    assert caught.value.hint == "cut it into pieces, or pad it"


def test_a_strip_at_the_limit_is_taken() -> None:
    assert preprocess(load_image(Image.new("RGB", (MAX_ASPECT * 3, 3))), IMAGE).shape == (3, 56, 56)


def test_places_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot open the picture .*missing\.png: No such file"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="is a directory"):
        load_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="is no regular file"):
        load_image(tmp_path / "pipe")
    with pytest.raises(ImageError, match="cannot open"):
        load_image("a\0b.png")
    with pytest.raises(ImageError, match="got an address"):
        load_image("https://example.com/cat.png")
    with pytest.raises(ImageError, match="but got int"):
        load_image(3)  # type: ignore[arg-type]


def test_floating_point_and_wide_integers_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point pixels"):
        load_image(Image.fromarray(np.zeros((4, 4), np.float32)))
    with pytest.raises(ImageError, match="32-bit levels from 0 to 70000"):
        load_image(Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_pixels_that_cannot_be_made_rgb_are_refused() -> None:
    image = Image.new("RGB", (4, 4))
    image.info["transparency"] = (1, 2)  # three levels are needed
    with pytest.raises(ImageError, match="pixels of mode RGB, which cannot be made RGB"):
        load_image(image)


def test_a_format_that_would_start_a_program_is_not_opened() -> None:
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(ImageError, match="is no picture that can be read here"):
        load_image(data)


def test_preprocess_wants_rgb() -> None:
    with pytest.raises(ImageError, match="must be in mode RGB, but got L"):
        preprocess(Image.new("L", (4, 4)), IMAGE)
