"""From the bytes of an upload to one model input; whatever the bytes are, an array or an `ImageError`.

Four formats, recognized by their content: PNG, JPEG, WebP, BMP. Sizes are read from the header and
checked before a pixel is decoded. What is not plain 8-bit RGB becomes it: EXIF orientation is applied,
transparency is laid over white, 16-bit samples keep their high byte, CMYK, grey and palettes are
converted; colour profiles are ignored, as the training data's were.
"""

import io
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from guard.errors import ImageError

Format = Literal["PNG", "JPEG", "WEBP", "BMP"]
Colour = Literal["rgb", "grey"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

MEGAPIXEL = 1_000_000

# Every scan of a progressive JPEG walks the whole image, and an empty one costs a few bytes: without a
# bound, 10 MB can ask for hours of work. Encoders write about ten.
MAX_JPEG_SCANS = 100
# Pillow walks from part to part in Python, some seconds for 10 MB of tiny ones, while all else waits.
MAX_JPEG_SEGMENTS, MAX_JPEG_GAP, MAX_PNG_CHUNKS = 10_000, 2**16, 20_000
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # that has a length, or ends the picture

# The types that a client may declare for each format; any other image type is a contradiction.
MEDIA_TYPES: dict[str, Format] = {
    "image/png": "PNG",
    "image/x-png": "PNG",
    "image/jpeg": "JPEG",
    "image/jpg": "JPEG",
    "image/pjpeg": "JPEG",
    "image/webp": "WEBP",
    "image/bmp": "BMP",
    "image/x-bmp": "BMP",
    "image/x-ms-bmp": "BMP",
}
UNDECLARED = frozenset({"", "application/octet-stream", "image/*"})

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# EXIF orientation (TIFF 6.0, tag 274): what turns the stored picture upright.
_ORIENTATION_TAG, _SIDEWAYS = 274, 5  # from 5 on, the picture lies on its side
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# From the depth of a PNG's samples, by Pillow's names of them, to 8 bits.
_KEY_SCALES = {"L;2": 85, "L;4": 17, "I;16B": 2**-8, "RGB;16B": 2**-8}

_NOT_ACCEPTED = (
    (b"GIF8", "a GIF"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"%PDF", "a PDF"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document"),
    (b"\0\0\1\0", "an icon"),
)


@dataclass(frozen=True)
class Limits:
    """What an upload may cost: bytes as sent, pixels as decoded, and its longer side over its shorter."""

    bytes: int = 10 * 2**20
    pixels: int = 32 * MEGAPIXEL
    aspect: int = 20


LIMITS = Limits()
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Pillow decodes no more, whatever the limit."""


def read(file: Path, limits: Limits) -> bytes:
    """What a file holds; raises `ImageError` where it is larger than the limit, before it is read."""
    _check_length(file.stat().st_size, limits)
    return file.read_bytes()


def sniff(data: bytes) -> Format | None:
    """The format that the first bytes announce; None where it is none of the four."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"BM"):
        return "BMP"
    return None


def decode(
    data: bytes,
    shape: tuple[int, int, int],
    *,
    colour: Colour = "rgb",
    resize: int | None = None,
    interpolation: Interpolation = "bilinear",
    declared: str | None = None,
    limits: Limits = LIMITS,
) -> NDArray[np.float32]:
    """One upload as float32 `(C, H, W)` in [0, 1], where `(C, H, W)` is `shape`.

    `colour`, `resize` and `interpolation` are the manifest's: colour first, then the shorter side is
    resized to `resize` pixels and the centre cropped to (H, W); without `resize` the whole picture is
    resized to (H, W). A picture that already has that size keeps its pixels exactly.
    `declared` is the media type that the client gave the image; where it names an image format, the
    content must be of that format.

    Raises `ImageError`, whose status is 413 (too many bytes or pixels), 415 (not one of the formats, or
    not the declared one) or 422 (empty, damaged, animated, or too long and thin); raises `ValueError`
    where shape, colour and resize contradict each other.
    """
    channels, height, width = shape
    if channels != (3 if colour == "rgb" else 1):
        raise ValueError(f"colour {colour!r} does not make {channels} channels")
    if resize is not None and resize < max(height, width):
        raise ValueError(f"resize to {resize} leaves less than the {height} x {width} that is to be cropped")
    picture = open_picture(data, colour=colour, declared=declared, limits=limits)
    pixels = _fit(picture, height, width, resize, interpolation)
    array = np.asarray(pixels, dtype=np.float32) / np.float32(255)
    planes = array[np.newaxis] if array.ndim == 2 else array.transpose(2, 0, 1)
    return np.ascontiguousarray(planes)


def open_picture(
    data: bytes, *, colour: Colour = "rgb", declared: str | None = None, limits: Limits = LIMITS
) -> Image.Image:
    """One upload at its own size, upright, in 8-bit RGB or grey; raises `ImageError` as `decode` does."""
    format_ = _check_content(data, declared, limits)
    try:
        with Image.open(io.BytesIO(data), formats=[format_]) as picture:
            _check_size(*picture.size, limits)
            if format_ != "JPEG" and getattr(picture, "is_animated", False):
                raise _animated()
            stored = picture.tile[0].args if format_ == "PNG" else None
            picture.load()
            _bring_key_to_8_bits(picture, stored)
            return _flatten(_upright(picture), colour)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(limits) from error
    # Decoders raise whatever their parsing trips over (OSError, SyntaxError, ValueError, struct.error,
    # IndexError...); all of it says that the bytes are not a sound image.
    except Exception as error:
        raise ImageError(
            f"The {format_} image is damaged or cut off and cannot be decoded.",
            code="corrupt_image",
            status=422,
        ) from error


def _check_content(data: bytes, declared: str | None, limits: Limits) -> Format:
    if not data:
        raise ImageError("The image is empty.", code="empty_image", status=422)
    _check_length(len(data), limits)
    found = sniff(data)
    if found is None:
        start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        what = next(
            (name for magic, name in _NOT_ACCEPTED if start.startswith(magic.lower())), "something else"
        )
        raise ImageError(
            f"The upload is {what}; PNG, JPEG, WebP and BMP images are accepted.",
            code="unsupported_format",
            status=415,
        )
    media_type = (declared or "").partition(";")[0].strip().lower()
    if media_type not in UNDECLARED and MEDIA_TYPES.get(media_type) != found:
        raise ImageError(
            f"The upload was declared as {media_type[:80]}, but its content is {found}. "
            "Send it with its true type.",
            code="mislabelled_type",
            status=415,
        )
    if found == "WEBP":
        _check_webp(data, limits)
    if found == "JPEG":
        _check_jpeg(data)
    if found == "PNG":
        _check_png(data)
    if found == "BMP" and _run_lengths(data):
        raise ImageError(
            "The BMP image is run-length encoded; save it uncompressed, or as PNG.",
            code="unsupported_format",
            status=415,
        )
    return found


def _check_length(length: int, limits: Limits) -> None:
    if length > limits.bytes:
        raise ImageError(
            f"The image has {length} bytes; at most {limits.bytes} are accepted.",
            code="body_too_large",
            status=413,
        )


def _check_jpeg(data: bytes) -> None:
    """Refuses more scans before the picture's end, or more parts, than decoders are to go through.

    Segments are skipped by their length, coded data up to the next marker, as decoders do (ITU T.81, B.1);
    what lies behind the end, such as a film, does not count.
    """
    at, scans = 2, 0
    for _ in range(MAX_JPEG_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[0] == _END:
            return
        if not scans and found.start() - at > MAX_JPEG_GAP:
            break
        scans += found[0] == _SCAN
        if scans > MAX_JPEG_SCANS:
            break
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    raise ImageError(
        f"The JPEG image has more than {MAX_JPEG_SCANS} scans, or far more parts than a picture needs; save "
        "it anew.",
        code="corrupt_image",
        status=422,
    )


def _check_png(data: bytes) -> None:
    """Refuses more chunks than a picture needs (PNG, 5.3: length, type, data, check)."""
    at = 8
    for _ in range(MAX_PNG_CHUNKS):
        if at >= len(data):
            return
        at += 12 + int.from_bytes(data[at : at + 4])
    raise ImageError(
        f"The PNG image has more than {MAX_PNG_CHUNKS} chunks; save it anew.",
        code="corrupt_image",
        status=422,
    )


def _run_lengths(data: bytes) -> bool:
    """Whether a BMP's header, from BITMAPINFOHEADER on, names RLE8 or RLE4: Pillow decodes them in Python."""
    header, compression = int.from_bytes(data[14:18], "little"), int.from_bytes(data[30:34], "little")
    return header >= 40 and compression in (1, 2)


def _check_webp(data: bytes, limits: Limits) -> None:
    """Size and animation from the header: the library allocates whole canvases as soon as it opens a file.

    Layout: RFC 9649, sections 2.5 to 2.7.
    """
    try:
        kind = data[12:16]
        if kind == b"VP8X":
            if data[20] & 0x02:
                raise _animated()
            width = 1 + int.from_bytes(data[24:27], "little")
            height = 1 + int.from_bytes(data[27:30], "little")
        elif kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        else:
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    except (IndexError, struct.error) as error:
        raise ImageError("The WebP image is cut off.", code="corrupt_image", status=422) from error
    _check_size(width, height, limits)


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise ImageError("The image has no pixels.", code="corrupt_image", status=422)
    if width * height > limits.pixels:
        raise _too_many_pixels(limits)
    if max(width, height) > limits.aspect * min(width, height):
        raise ImageError(
            f"The image is {width} x {height} pixels; its longer side may be at most {limits.aspect} times "
            "the shorter.",
            code="extreme_aspect",
            status=422,
        )


def _too_many_pixels(limits: Limits) -> ImageError:
    return ImageError(
        f"The image has more than {limits.pixels / MEGAPIXEL:g} million pixels; send a smaller one.",
        code="too_many_pixels",
        status=413,
    )


def _animated() -> ImageError:
    return ImageError("The image is animated; send a single picture.", code="animated_image", status=422)


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height once the picture is turned as its EXIF orientation says."""
    width, height = picture.size
    lies = picture.getexif().get(_ORIENTATION_TAG, 1) >= _SIDEWAYS
    return (height, width) if lies else (width, height)


def _upright(picture: Image.Image) -> Image.Image:
    try:
        transpose = _UPRIGHT.get(picture.getexif().get(_ORIENTATION_TAG, 1))
    # Cameras and editors write broken EXIF blocks; the picture itself is sound.
    except Exception:
        transpose = None
    return picture if transpose is None else picture.transpose(transpose)


def _bring_key_to_8_bits(picture: Image.Image, stored: object) -> None:
    """A PNG's transparent colour has the depth of its samples, and Pillow converts only the samples."""
    scale = _KEY_SCALES.get(stored) if isinstance(stored, str) else None
    key = picture.info.get("transparency")
    if scale is not None and key is not None:
        scaled = [int(scale * value) for value in (key if isinstance(key, tuple) else [key])]
        picture.info["transparency"] = tuple(scaled) if isinstance(key, tuple) else scaled[0]


def _flatten(picture: Image.Image, colour: Colour) -> Image.Image:
    """The picture as 8-bit RGB or grey, without transparency."""
    if picture.mode.startswith("I"):
        samples = np.asarray(picture)
        if samples.dtype != np.uint16:
            samples = np.clip(samples, 0, 0xFFFF)
        info, picture = picture.info, Image.fromarray((samples >> 8).astype(np.uint8))
        picture.info = info
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.new("RGB", layer.size, "white")
        picture.paste(layer, mask=layer.getchannel("A"))
    return picture.convert("RGB" if colour == "rgb" else "L")


def _fit(
    picture: Image.Image, height: int, width: int, resize: int | None, interpolation: Interpolation
) -> Image.Image:
    resampling = _RESAMPLING[interpolation]
    if resize is None:
        return _resized(picture, width, height, resampling)
    shorter = min(picture.size)
    scaled_width, scaled_height = (resize * side // shorter for side in picture.size)
    picture = _resized(picture, scaled_width, scaled_height, resampling)
    left, top = round((scaled_width - width) / 2), round((scaled_height - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def _resized(picture: Image.Image, width: int, height: int, resampling: Image.Resampling) -> Image.Image:
    return picture if picture.size == (width, height) else picture.resize((width, height), resampling)
