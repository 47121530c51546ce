"""Pictures: from a file to the float pixels that the vision stage takes.

Legend: 3 colour planes (red, green, blue), H rows, W columns.

The pixels equal those of transformers' ``Gemma3ImageProcessor`` with its Pillow backend: an 8-bit
RGB picture, resized to a square with Pillow's antialiasing filter, times 1/255, less the mean, over
the standard deviation. What comes before that, reading files of many kinds safely, is ours.

Source: transformers/models/gemma3/image_processing_pil_gemma3.py and image_transforms.py.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from runtimes.manifest import ImageFacts

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | Image"

MAX_PIXELS = 8192 * 8192  # an RGB picture of this size takes 200 MB
MAX_ASPECT = 100  # the model sees a square: of a longer strip nothing recognizable is left

# Raster formats that Pillow decodes itself. Others (EPS, WMF, ...) would start foreign programs.
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "AVIF")

_HINT = "give a PNG, JPEG, WebP, GIF, BMP or TIFF file"
_quiet_lock = threading.Lock()


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Read a picture and make it an upright 8-bit RGB picture.

    Args:
        source: a path, the bytes of a file, an open binary file, or a Pillow picture (whose current
            frame is taken). Of an animation in a file the first frame is taken.
        max_pixels: refuse a picture with more pixels than this, before it is decoded.

    The EXIF orientation is applied. Transparent pictures are laid on white, as transformers' image
    processor does. Grayscale with 16 bits is scaled to 8.

    Raises:
        ImageError: the source is no picture, cannot be read, is cut off, has no pixels, too many of
            them, a side more than 100 times the other, or a pixel format without a known range.
    """
    from PIL import Image as pil

    if isinstance(source, pil.Image):
        name = "the picture"
        _check_size(source.size, name, max_pixels)
        return _to_rgb(_upright(source), name)
    name, file = _open_source(source)
    try:
        with _open_picture(file, name) as picture:
            _check_size(picture.size, name, max_pixels)
            _decode(picture, name)
            _check_size(picture.size, name, max_pixels)  # an icon learns its size only now
            return _to_rgb(_upright(picture), name)
    finally:
        if file is not source:
            file.close()


def preprocess(image: Image, facts: ImageFacts) -> NDArray[np.float32]:
    """An RGB picture to the vision stage's pixels, float32 [3, size, size].

    Raises ImageError where the picture is not RGB (``load_image`` makes it so) or has no pixels.
    """
    from PIL import Image as pil

    if image.mode != "RGB":
        raise ImageError(f"a picture must be in mode RGB, but got {image.mode}", hint="read it with load_image")
    if 0 in image.size:
        raise ImageError(f"a picture must have pixels, but got {image.width} × {image.height}")
    filters = {"bilinear": pil.Resampling.BILINEAR, "bicubic": pil.Resampling.BICUBIC}
    resized = np.asarray(image.resize((facts.size, facts.size), filters[facts.resample]))
    # float64 for the product and float32 from there on: bit for bit what transformers computes.
    scaled_HW3 = (resized.astype(np.float64) * facts.rescale).astype(np.float32)
    mean_3, std_3 = np.asarray(facts.mean, np.float32), np.asarray(facts.std, np.float32)
    normal_HW3 = (scaled_HW3 - mean_3) / std_3
    return np.ascontiguousarray(normal_HW3.transpose(2, 0, 1))


def _open_source(source: str | os.PathLike[str] | bytes | BinaryIO) -> tuple[str, BinaryIO]:
    """A name for errors, and an open file."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"the picture of {len(source)} bytes", io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "read"):
            raise ImageError(
                f"a picture must be a path, bytes, a binary file or a Pillow picture, but got {type(source).__name__}"
            )
        return str(getattr(source, "name", "the picture")), source
    path = Path(source)
    name = f"the picture {path}"
    if str(source).startswith(("http:", "https:", "data:")):
        raise ImageError(
            "a picture must be a file on this host, but got an address", hint="fetch it first, then give the file"
        )
    try:
        if path.is_dir():
            raise ImageError(f"{name} is a directory", hint=_HINT)
        if path.exists() and not path.is_file():
            raise ImageError(f"{name} is no regular file", hint=_HINT)
        return name, path.open("rb")
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot open {name}: {getattr(error, 'strerror', None) or error}") from error


def _open_picture(file: BinaryIO, name: str) -> Image:
    """Read a picture's head. Raises ImageError where it is none, or where Pillow suspects a bomb."""
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    pil.init()
    known = [form for form in FORMATS if form in pil.OPEN]
    with _quiet():
        warnings.simplefilter("error", pil.DecompressionBombWarning)  # up to twice its limit Pillow only warns
        try:
            return pil.open(file, formats=known)
        except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
            raise ImageError(f"{name} is refused: {error}", hint="scale it down first") from error
        except UnidentifiedImageError as error:
            raise ImageError(f"{name} is no picture that can be read here", hint=_HINT) from error
        except Exception as error:
            raise ImageError(f"{name} cannot be read: {_reason(error)}", hint=_HINT) from error


def _decode(picture: Image, name: str) -> None:
    """Decode the first frame. Pillow's decoders raise many kinds of errors on damaged files."""
    from PIL import Image as pil

    try:
        if getattr(picture, "is_animated", False):
            picture.seek(0)
        picture.load()
    except pil.DecompressionBombError as error:
        raise ImageError(f"{name} is refused: {error}", hint="scale it down first") from error
    except Exception as error:
        raise ImageError(f"{name} is damaged or cut off: {_reason(error)}", hint="get the file again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings about a file's head off the terminal: what matters here is an error.

    Filters of warnings belong to the whole process, hence the lock.
    """
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels: it is {width} × {height}")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} × {height} = {width * height:,} pixels, more than the {max_pixels:,} allowed",
            hint="scale it down first",
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            f"{name} is {width} × {height}: its longer side may be at most {MAX_ASPECT} times the shorter",
            hint="cut it into pieces, or pad it",
        )


def _upright(picture: Image) -> Image:
    """Apply the EXIF orientation. A damaged EXIF block counts as none: the pixels are good."""
    from PIL import ImageOps

    try:
        with _quiet():
            return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return picture


def _to_rgb(picture: Image, name: str) -> Image:
    """Any pixel format to 8-bit RGB; transparent pixels are laid on white."""
    from PIL import Image as pil

    if picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = _scale_16_bits(picture, name)
    if picture.mode == "F":
        raise ImageError(
            f"{name} has floating-point pixels, whose range is not known", hint="save it with 8 or 16 bits a channel"
        )
    try:
        if picture.mode == "La":  # premultiplied; Pillow converts it to LA only
            picture = picture.convert("LA")
        transparent = {"A", "a"} & set(picture.getbands()) or picture.info.get("transparency") is not None
        if transparent:
            picture = picture.convert("RGBA")
            white = pil.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = pil.alpha_composite(white, picture)
        return picture.convert("RGB")
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise ImageError(
            f"{name} has pixels of mode {picture.mode}, which cannot be made RGB: {error}", hint="save it as RGB"
        ) from error


def _scale_16_bits(picture: Image, name: str) -> Image:
    """Grayscale of 16 bits to 8: 65535 becomes 255, rounded to the nearest level.

    Pillow calls such pictures ``I;16``, or ``I`` (32 bits) where the file's form asks for it.
    """
    from PIL import Image as pil

    levels = np.asarray(picture)
    if levels.min() < 0 or levels.max() > 65535:
        raise ImageError(
            f"{name} has 32-bit levels from {levels.min()} to {levels.max()}, but 0 to 65535 is what can be scaled",
            hint="save it with 8 or 16 bits a channel",
        )
    gray = pil.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    clear = picture.info.get("transparency")
    if isinstance(clear, int):  # one level that stands for "nothing here"
        gray.putalpha(pil.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return gray
