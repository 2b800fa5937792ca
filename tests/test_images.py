"""Uploads become the arrays they should, and nothing but an array or an `ImageError` comes out."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, features

from guard.errors import ImageError
from guard.images import (
    LIMITS,
    MAX_JPEG_GAP,
    MAX_JPEG_SCANS,
    MAX_JPEG_SEGMENTS,
    MAX_PNG_CHUNKS,
    Limits,
    decode,
    sniff,
)

SHAPE = (3, 32, 32)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def pixels(height: int = 32, width: int = 32, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=-1).astype(np.uint8)


def encoded(picture: Image.Image | NDArray[np.uint8], kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def as_input(array: NDArray[np.uint8]) -> NDArray[np.float32]:
    return (array.astype(np.float32) / np.float32(255)).transpose(2, 0, 1)


def refusal(data: bytes, shape: tuple[int, int, int] = SHAPE, **options: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, shape, **options)  # type: ignore[arg-type]
    assert str(caught.value)
    return caught.value


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, body: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(body, 9))
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_the_pixels_of_a_lossless_picture_of_the_right_size_stay_exact(kind: str) -> None:
    array = pixels()
    image = decode(encoded(array, kind), SHAPE)
    assert image.dtype == np.float32
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, as_input(array))
    np.testing.assert_array_equal(np.rint(image * 255).astype(np.uint8), array.transpose(2, 0, 1))


def test_lossless_webp_stays_exact() -> None:
    array = pixels()
    np.testing.assert_array_equal(decode(encoded(array, "WEBP", lossless=True), SHAPE), as_input(array))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_recognized_and_close_to_the_picture(kind: str) -> None:
    data = encoded(smooth(32, 32), kind)
    assert sniff(data) == kind
    image = decode(data, SHAPE)
    assert image.shape == SHAPE
    assert np.abs(image - as_input(smooth(32, 32))).mean() < 0.02


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 100}])
def test_jpeg_variants(options: dict[str, object]) -> None:
    image = decode(encoded(smooth(64, 48), "JPEG", **options), SHAPE)
    assert image.shape == SHAPE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(orientation: int) -> None:
    upright = pixels(32, 32)
    # What a camera held in that orientation stores, by the definition of the tag: row 0 and column 0 are...
    stored: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = {
        1: lambda a: a,  # top, left
        2: lambda a: a[:, ::-1],  # top, right
        3: lambda a: a[::-1, ::-1],  # bottom, right
        4: lambda a: a[::-1],  # bottom, left
        5: lambda a: a.transpose(1, 0, 2),  # left, top
        6: lambda a: a.transpose(1, 0, 2)[::-1],  # right, top
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(np.ascontiguousarray(stored(upright)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, SHAPE), as_input(upright))


def test_exif_orientation_comes_before_the_crop() -> None:
    tall = smooth(96, 48)
    exif = Image.Exif()
    exif[274] = 6
    stored = np.ascontiguousarray(tall.transpose(1, 0, 2)[::-1])
    plain = decode(encoded(tall), SHAPE, resize=32)
    np.testing.assert_array_equal(decode(encoded(stored, exif=exif), SHAPE, resize=32), plain)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_spoil_a_sound_picture() -> None:
    data = encoded(smooth(32, 32), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffbroken")
    assert decode(data, SHAPE).shape == SHAPE


def test_grey_becomes_three_equal_channels() -> None:
    grey = pixels(channels=1)[:, :, 0]
    image = decode(encoded(grey), SHAPE)
    np.testing.assert_array_equal(image, np.stack([grey / np.float32(255)] * 3))


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    samples = np.random.default_rng(0).integers(0, 2**16, (32, 32), dtype=np.uint16)
    image = decode(encoded(Image.fromarray(samples)), SHAPE)
    np.testing.assert_array_equal(image[0], (samples >> 8).astype(np.float32) / np.float32(255))


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    samples = np.random.default_rng(0).integers(0, 2**16, (32, 32, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    image = decode(png_of(32, 32, rows, depth=16), SHAPE)
    np.testing.assert_array_equal(image, as_input((samples >> 8).astype(np.uint8)))


def test_transparency_is_laid_over_white() -> None:
    rgba = pixels(channels=4)
    rgba[:16, :, 3], rgba[16:, :, 3] = 0, 255
    image = decode(encoded(rgba), SHAPE)
    np.testing.assert_array_equal(image[:, :16], np.ones((3, 16, 32), np.float32))
    np.testing.assert_array_equal(image[:, 16:], as_input(rgba[:, :, :3])[:, 16:])


def test_half_transparent_black_over_white_is_grey() -> None:
    image = decode(encoded(Image.new("RGBA", (32, 32), (0, 0, 0, 128))), SHAPE)
    np.testing.assert_array_equal(image, np.full(SHAPE, 127 / 255, np.float32))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_png_mode_is_converted(mode: str) -> None:
    picture = Image.fromarray(smooth(40, 40)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = picture.convert("I").convert("I;16")
    assert decode(encoded(picture), SHAPE).shape == SHAPE


def test_palette_with_a_transparent_colour() -> None:
    picture = Image.new("P", (32, 32), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    np.testing.assert_array_equal(decode(encoded(picture, transparency=1), SHAPE), np.ones(SHAPE, np.float32))
    np.testing.assert_array_equal(decode(encoded(picture), SHAPE)[:, 0, 0], [1, 0, 0])


@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_a_png_with_a_transparent_colour_of_any_depth(depth: int, colour: int) -> None:
    values = [1, 0] if depth < 8 else [0x12, 0x34] if depth == 8 else [0x1234, 0x5678]
    channels = 3 if colour == 2 else 1
    bits = "".join(f"{value:0{depth}b}" * channels for value in values * 16)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    key = png_chunk(b"tRNS", struct.pack(">H", values[0]) * channels)
    data = png_of(32, 32, row * 32, depth=depth, colour=colour)
    opaque = decode(data, SHAPE)
    image = decode(data[:33] + key + data[33:], SHAPE)
    np.testing.assert_array_equal(image[:, :, 0::2], np.ones((3, 32, 16), np.float32))
    np.testing.assert_array_equal(image[:, :, 1::2], opaque[:, :, 1::2])


def test_cmyk_jpeg_has_the_right_polarity() -> None:
    data = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=100)
    np.testing.assert_allclose(decode(data, SHAPE)[:, 16, 16], [1, 0, 0], atol=0.02)


def test_a_phone_jpeg_with_a_second_picture_behind_it_is_its_first_picture() -> None:
    buffer = io.BytesIO()
    first, second = Image.fromarray(smooth(32, 32)), Image.new("RGB", (32, 32), "black")
    first.save(buffer, "MPO", save_all=True, append_images=[second], quality=100, subsampling=0)
    assert sniff(buffer.getvalue()) == "JPEG"
    assert np.abs(decode(buffer.getvalue(), SHAPE) - as_input(smooth(32, 32))).mean() < 0.02


def test_a_grey_model_gets_one_channel() -> None:
    image = decode(encoded(smooth(28, 28)), (1, 28, 28), colour="grey")
    red, green, blue = smooth(28, 28).astype(float).transpose(2, 0, 1)
    assert image.shape == (1, 28, 28)
    np.testing.assert_allclose(image[0], (0.299 * red + 0.587 * green + 0.114 * blue) / 255, atol=1 / 255)


def test_without_resize_the_whole_picture_is_squeezed() -> None:
    array = smooth(50, 80)
    expected = np.asarray(Image.fromarray(array).resize((24, 16), Image.Resampling.BICUBIC))
    image = decode(encoded(array), (3, 16, 24), interpolation="bicubic")
    np.testing.assert_array_equal(image, as_input(expected))


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (33, 47), (20, 31)])
def test_resize_sets_the_shorter_side_and_crops_the_centre(size: tuple[int, int]) -> None:
    array = smooth(*size)
    height, width = (36 * side // min(size) for side in size)
    scaled = np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    expected = scaled[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(decode(encoded(array), SHAPE, resize=36), as_input(expected))


def test_one_pixel_is_enough() -> None:
    image = decode(encoded(np.full((1, 1, 3), 51, np.uint8)), SHAPE)
    np.testing.assert_array_equal(image, np.full(SHAPE, 0.2, np.float32))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\n<?xml version='1.0'?><svg/>", "XML"),
        (b"GIF89a" + bytes(64), "GIF"),
        (b"II*\0" + bytes(64), "TIFF"),
        (b"%PDF-1.7", "PDF"),
        (b'{"image": "iVBORw0KGgo="}', "something else"),
        (b"x", "something else"),
        (b"RIFF\0\0\0\0WAVE", "something else"),
        (b"\xff\xd8", "something else"),
    ],
)
def test_other_content_is_not_accepted(data: bytes, what: str) -> None:
    error = refusal(data)
    assert (error.status, error.code) == (415, "unsupported_format")
    assert what in str(error)


def test_a_gif_is_not_accepted() -> None:
    assert refusal(encoded(smooth(8, 8), "GIF")).status == 415


@pytest.mark.parametrize(
    "declared", ["image/jpeg", "image/webp; q=1", "image/svg+xml", "text/html", "IMAGE/GIF"]
)
def test_a_png_under_another_name_is_not_accepted(declared: str) -> None:
    error = refusal(encoded(pixels()), declared=declared)
    assert (error.status, error.code) == (415, "mislabelled_type")


@pytest.mark.parametrize(
    "declared", [None, "", "application/octet-stream", "image/*", "image/png", "Image/PNG; x=1"]
)
def test_true_and_absent_names_are_accepted(declared: str | None) -> None:
    assert decode(encoded(pixels()), SHAPE, declared=declared).shape == SHAPE


def test_aliases_of_jpeg_and_bmp() -> None:
    assert decode(encoded(pixels(), "JPEG"), SHAPE, declared="image/jpg").shape == SHAPE
    assert decode(encoded(pixels(), "BMP"), SHAPE, declared="image/x-ms-bmp").shape == SHAPE


def test_an_empty_upload() -> None:
    error = refusal(b"")
    assert (error.status, error.code) == (422, "empty_image")


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_anywhere_is_corrupt_or_unknown(kind: str) -> None:
    data = encoded(pixels(), kind)
    for length in {1, 2, 3, 7, 11, 12, 15, 20, 25, 30, len(data) // 4, len(data) // 2, len(data) * 9 // 10}:
        error = refusal(data[:length])
        assert error.code in {"corrupt_image", "unsupported_format"}, length


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations_are_refused(kind: str) -> None:
    frames = [Image.fromarray(pixels(seed=seed)) for seed in range(3)]
    error = refusal(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert (error.status, error.code) == (422, "animated_image")


@pytest.mark.parametrize(("width", "height"), [(20_000, 1), (1, 20_000), (21, 1), (400, 19)])
def test_long_thin_pictures_are_refused(width: int, height: int) -> None:
    error = refusal(encoded(Image.new("L", (width, height))), resize=32)
    assert (error.status, error.code) == (422, "extreme_aspect")


def test_the_limit_of_the_aspect_is_accepted() -> None:
    assert decode(encoded(Image.new("L", (40, 2))), SHAPE, resize=32).shape == SHAPE


@pytest.mark.parametrize("side", [6_000, 10_000, 30_000, 2**31 - 1])
def test_a_bomb_is_refused_from_its_header(side: int) -> None:
    error = refusal(png_of(side, side, bytes(1000)))
    assert (error.status, error.code) == (413, "too_many_pixels")


def test_a_webp_bomb_is_refused_from_its_header() -> None:
    bits = (16_383) | (16_383 << 14)
    lossless = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + struct.pack("<I", bits) + bytes(100)
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (9_999).to_bytes(3, "little") * 2 + bytes(100)
    lossy = b"VP8 " + struct.pack("<I", 10) + b"\x10\x02\x00\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383)
    for chunk in (lossless, extended, lossy):
        error = refusal(b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk)
        assert (error.status, error.code) == (413, "too_many_pixels")


@pytest.mark.parametrize("options", [{"lossless": True}, {"exif": b"Exif\0\0"}, {"quality": 20}])
def test_the_webp_header_is_read_as_the_library_reads_it(options: dict[str, object]) -> None:
    data = encoded(smooth(37, 91), "WEBP", **options)
    exact = Limits(pixels=37 * 91)
    assert decode(data, SHAPE, limits=exact).shape == SHAPE
    assert refusal(data, limits=Limits(pixels=37 * 91 - 1)).code == "too_many_pixels"


def test_a_bmp_bomb_is_refused_from_its_header() -> None:
    data = bytearray(encoded(pixels(), "BMP"))
    data[18:26] = struct.pack("<ii", 60_000, 60_000)
    assert refusal(bytes(data)).code == "too_many_pixels"


def test_the_byte_cap() -> None:
    data = encoded(pixels())
    assert decode(data, SHAPE, limits=Limits(bytes=len(data))).shape == SHAPE
    error = refusal(data, limits=Limits(bytes=len(data) - 1))
    assert (error.status, error.code) == (413, "body_too_large")


def test_what_lies_behind_a_jpeg_holds_no_scans() -> None:
    sound = encoded(pixels(), "JPEG")
    film = b"\xff\xda\0\2" * (MAX_JPEG_SCANS + 1)
    np.testing.assert_array_equal(decode(sound + film, SHAPE), decode(sound, SHAPE))
    comment = b"\xff\xfe" + (2 + len(film)).to_bytes(2) + film
    np.testing.assert_array_equal(decode(sound[:2] + comment + sound[2:], SHAPE), decode(sound, SHAPE))
    many = sound[:2] + b"\xff\xfe\0\2" * MAX_JPEG_SEGMENTS + comment + sound[2:]
    with pytest.raises(ImageError, match="more than 100 scans, or far more parts"):
        decode(many, SHAPE)


def test_files_of_countless_tiny_parts_are_refused_undecoded() -> None:
    sound = encoded(pixels(), "JPEG")
    few, many = (sound[:2] + b"\xff" * count + sound[2:] for count in (1000, MAX_JPEG_GAP + 10))
    np.testing.assert_array_equal(decode(few, SHAPE), decode(sound, SHAPE))
    assert refusal(many).code == "corrupt_image"
    sound = encoded(pixels(), "PNG")
    empty = struct.pack(">I4sI", 0, b"teXt", zlib.crc32(b"teXt"))
    head = 8 + 25  # signature and IHDR
    few, many = (sound[:head] + empty * count + sound[head:] for count in (1000, MAX_PNG_CHUNKS))
    np.testing.assert_array_equal(decode(few, SHAPE), decode(sound, SHAPE))
    assert refusal(many).code == "corrupt_image"


def test_run_length_encoded_bitmaps_are_refused() -> None:
    data = bytearray(encoded(pixels(), "BMP"))
    assert decode(bytes(data), SHAPE).shape == SHAPE
    for compression in (1, 2):
        data[30:34] = struct.pack("<I", compression)
        assert refusal(bytes(data)).code == "unsupported_format"


def test_a_jpeg_of_endless_scans_is_refused_undecoded() -> None:
    data = encoded(smooth(64, 64), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    assert refusal(data[:-2] + scan * (MAX_JPEG_SCANS + 1) + b"\xff\xd9").code == "corrupt_image"


def test_a_contradicting_manifest_is_a_programming_error() -> None:
    data = encoded(pixels())
    with pytest.raises(ValueError, match="channels"):
        decode(data, SHAPE, colour="grey")
    with pytest.raises(ValueError, match="cropped"):
        decode(data, SHAPE, resize=31)


def test_default_limits() -> None:
    assert Limits(bytes=10 * 2**20, pixels=32_000_000, aspect=20) == LIMITS
    assert features.check("webp")


SOUND = [encoded(smooth(24, 40), kind) for kind in FORMATS] + [
    encoded(smooth(24, 40), "JPEG", progressive=True),
    encoded(smooth(24, 40), "WEBP", lossless=True),
    encoded(Image.fromarray(smooth(24, 40)).convert("P"), transparency=3),
]


@settings(max_examples=300, deadline=None)
@given(
    data=st.sampled_from(SOUND),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.integers(0, 2000),
    resize=st.none() | st.just(40),
)
def test_whatever_the_bytes_an_array_or_an_image_error(
    data: bytes, edits: list[tuple[int, int]], cut: int | None, resize: int | None
) -> None:
    damaged = bytearray(data)
    for position, value in edits:
        damaged[position % len(damaged)] = value
    try:
        image = decode(bytes(damaged[:cut]), SHAPE, resize=resize)
    except ImageError:
        return
    assert image.shape == SHAPE
    assert np.isfinite(image).all()
    assert image.min() >= 0
    assert image.max() <= 1
