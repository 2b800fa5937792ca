"""Attacks that do more than add something small: the unseen attacks of HAMMING, Table 1.

Spatial flow moves every pixel a little (stAdv: Xiao et al. 2018, "Spatially transformed adversarial
examples"), recolor puts all colours through one smooth map (ReColorAdv: Laidlaw & Feizi 2019, "Functional
adversarial attacks"), JPEG adds to the coefficients of the JPEG format (Kang et al. 2019, "Testing
robustness against unforeseen adversaries"). HAMMING took them from Laidlaw et al. 2021, "Perceptual
adversarial robustness"; docs/decisions/0073 has their settings, and says where ours differ. Each is a
transformation of images whose parameters, `shift`, change nothing at 0 and are bounded by the budget in the
linf norm. One loop, `ascend`, climbs them all through the classifier's gradient at the transformed image.
"""

from collections.abc import Callable
from functools import cache, partial
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin
from scipy import fft

from guard.attacks import Differentiable, Floats, Found, Labels, misclassified
from guard.errors import DataError
from guard.evaluation.attack import Attack, bound
from guard.evaluation.target import Target

Doubles = NDArray[np.float64]
PullBack = Callable[[Floats], Floats]
Transform = Callable[[Floats, Floats], tuple[Floats, PullBack]]
"""`transform(images, shift)`: attacked images (B, C, H, W) in [0, 1], and the function that takes a gradient
at them (B, C, H, W) back to one in `shift` (B, ...)."""

LATTICE = (16, 32, 32)
"""Nodes of the colour lattice along lightness and the two axes of colour, as ReColorAdv has them."""
STEPS = 100
TINY = 1e-6


def ascend(
    model: Differentiable,
    images: Floats,
    labels: Labels,
    start: Floats,
    eps: float,
    *,
    transform: Transform,
    rate: float,
    steps: int = STEPS,
    smoothness: float = 0.0,
    memory: tuple[float, float] = (0.9, 0.999),
) -> Found:
    """Adam on a transformation's parameters, |shift| <= eps, for the margin loss less smoothness * roughness.

    `start` (B, ...) holds the first parameters, `rate` the length of a step; `memory` the decay of Adam's two
    means, with (0, 0) every step goes along the gradient's sign. An image is left alone at its first wrong
    class; one that is never wrong keeps the version of the largest loss. `distance` is the largest parameter
    in size, in the transformation's own unit.
    """
    best = images.copy()
    highest = np.full(len(images), -np.inf)
    distance = np.full(len(images), np.inf)
    rows = np.arange(len(images))
    shift = np.clip(start, -eps, eps)
    mean, square = np.zeros_like(shift), np.zeros_like(shift)
    for step in range(steps + 1):
        if not len(rows):
            break
        attacked, pull_back = transform(images[rows], shift)
        logits, values, gradient = model.loss_gradient(attacked, labels[rows], "margin")
        wrong = misclassified(attacked, logits, labels[rows])
        better = wrong | (values > highest[rows])
        best[rows[better]], highest[rows[better]] = attacked[better], values[better]
        distance[rows[wrong]] = np.abs(shift[wrong]).max(axis=tuple(range(1, shift.ndim)))
        if step == steps:
            break
        # Parameters whose gradient is not finite stay where they are.
        uphill = np.nan_to_num(pull_back(gradient), nan=0.0, posinf=0.0, neginf=0.0)
        if smoothness:
            uphill = uphill - np.float32(smoothness) * roughness(shift)[1]
        mean = memory[0] * mean + (1 - memory[0]) * uphill
        square = memory[1] * square + (1 - memory[1]) * uphill**2
        first, second = (1 - decay ** (step + 1) for decay in memory)
        move = (mean / first) / (np.sqrt(square / second) + 1e-10)
        shift = np.clip(shift + rate * move, -eps, eps).astype(np.float32)
        rows, shift, mean, square = rows[~wrong], shift[~wrong], mean[~wrong], square[~wrong]
    return Found(best, np.isfinite(distance), distance)


def roughness(field: Floats) -> tuple[Doubles, Floats]:
    """Sum over ordered pairs of neighbours of the l2 distance of their vectors (B,), and its gradient.

    `field` (B, ..., D) is a grid of vectors of length D. Source: Xiao et al. 2018, eq. 4 (flow loss).
    """
    total = np.zeros(len(field))
    gradient = np.zeros_like(field)
    for axis in range(1, field.ndim - 1):
        difference = np.diff(field, axis=axis)
        # The constant keeps the gradient finite where neighbours agree.
        size = np.sqrt(np.einsum("...d,...d->...", difference, difference) + 1e-10)
        total += 2 * size.reshape(len(field), -1).sum(axis=1, dtype=np.float64)
        pull = difference * (2 / size)[..., None]
        before, after = [slice(None)] * field.ndim, [slice(None)] * field.ndim
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        gradient[tuple(before)] -= pull
        gradient[tuple(after)] += pull
    return total, gradient


def flow(images: Floats, shift: Floats) -> tuple[Floats, PullBack]:
    """Every pixel takes the value found `shift` (B, H, W, 2: down, right) away, in half sides of the image.

    Between pixels by bilinear interpolation; beyond the edge lies the edge.
    """
    count, channels, height, width = images.shape
    rows, offset_y, free_y = _along(shift[..., 0], np.arange(height)[:, None], height)
    columns, offset_x, free_x = _along(shift[..., 1], np.arange(width)[None, :], width)
    flat = images.reshape(count, channels, height * width)

    def corner(down: int, right: int) -> Floats:
        y, x = np.minimum(rows + down, height - 1), np.minimum(columns + right, width - 1)
        index = (y * width + x).reshape(count, 1, height * width)
        return np.take_along_axis(flat, index, axis=2).reshape(images.shape)

    top = corner(0, 0) * (1 - offset_x) + corner(0, 1) * offset_x
    bottom = corner(1, 0) * (1 - offset_x) + corner(1, 1) * offset_x
    left = corner(0, 0) * (1 - offset_y) + corner(1, 0) * offset_y
    right = corner(0, 1) * (1 - offset_y) + corner(1, 1) * offset_y

    def pull_back(gradient: Floats) -> Floats:
        down = (gradient * (bottom - top)).sum(axis=1) * free_y * (height - 1) / 2
        across = (gradient * (right - left)).sum(axis=1) * free_x * (width - 1) / 2
        return np.stack([down, across], axis=-1).astype(np.float32)

    return np.asarray(top * (1 - offset_y) + bottom * offset_y, np.float32), pull_back


def _along(
    shift: Floats, grid: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]:
    """Along one axis: pixels before the shifted positions (B, H, W), the way on from them (B, 1, H, W), and
    which positions lie within the image.
    """
    position = grid + shift * np.float32((size - 1) / 2)
    inside = np.clip(position, 0, size - 1)
    before = np.minimum(inside.astype(np.int64), max(size - 2, 0))
    return before, (inside - before).astype(np.float32)[:, None], position == inside


def recolor(images: Floats, shift: Floats) -> tuple[Floats, PullBack]:
    """Every colour moves by what a lattice of colours says, between its nodes by linear interpolation.

    The lattice `shift` (B, 16, 32, 32, 3) lies in CIELUV, each axis scaled to [0, 1] (`to_luv`); for images
    of one channel it is (B, 16, 1) in their own values. Nodes hold displacements in that scale. What leaves
    the colours of a screen is clipped.
    """
    count, channels, height, width = images.shape
    pixels = images.transpose(0, 2, 3, 1).reshape(count, height * width, channels).astype(np.float64)
    colours = to_luv(pixels) if channels == 3 else pixels
    sizes = np.array(shift.shape[1:-1])
    position = np.clip(colours, 0, 1) * (sizes - 1)
    low = np.minimum(position.astype(np.int64), sizes - 2)
    corners = []
    for code in np.ndindex(*(2,) * channels):
        index = np.ravel_multi_index(tuple(np.moveaxis(low + np.array(code), -1, 0)), tuple(sizes))
        weight = np.where(code, position - low, 1 - (position - low)).prod(axis=-1)
        corners.append((index, weight))
    nodes = shift.reshape(count, -1, channels)
    moved = colours + sum(
        weight[..., None] * np.take_along_axis(nodes, index[..., None], axis=1) for index, weight in corners
    )
    raw, to_colours = from_luv(moved) if channels == 3 else (moved, lambda gradient: gradient)

    def pull_back(gradient: Floats) -> Floats:
        flat = gradient.transpose(0, 2, 3, 1).reshape(raw.shape)
        # A value at the edge may have come to lie beyond it by rounding.
        pulled = to_colours(np.where((raw > -1e-6) & (raw < 1 + 1e-6), flat, 0.0))
        total = np.zeros((count * nodes.shape[1], channels))
        for index, weight in corners:
            places = (index + nodes.shape[1] * np.arange(count)[:, None]).ravel()
            for axis in range(channels):
                summands = (weight * pulled[..., axis]).ravel()
                total[:, axis] += np.bincount(places, summands, minlength=len(total))
        return total.reshape(shift.shape).astype(np.float32)

    attacked = np.clip(raw, 0, 1).reshape(count, height, width, channels).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(attacked, dtype=np.float32), pull_back


TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
"""Linear sRGB to CIE XYZ (IEC 61966-2-1)."""
WHITE_U, WHITE_V = 0.1978, 0.4683
"""CIE 1976 u', v' of daylight D65."""


def to_luv(colours: Doubles) -> Doubles:
    """CIELUV of sRGB colours (..., 3) in [0, 1], scaled: L* / 100, (u* + 100) / 200, (v* + 100) / 200."""
    linear = np.where(
        colours <= 0.04045, colours / 12.92, ((np.maximum(colours, 0.04045) + 0.055) / 1.055) ** 2.4
    )
    x, y, z = np.moveaxis(linear @ TO_XYZ.T, -1, 0)
    whole = np.maximum(x + 15 * y + 3 * z, 1e-12)
    lightness = np.where(y <= (6 / 29) ** 3, (29 / 3) ** 3 * y, 116 * np.cbrt(y) - 16)
    # Of black, which has no chromaticity, lightness 0 makes u* = v* = 0.
    u, v = 13 * lightness * (4 * x / whole - WHITE_U), 13 * lightness * (9 * y / whole - WHITE_V)
    return np.stack([lightness / 100, (u + 100) / 200, (v + 100) / 200], axis=-1)


def from_luv(scaled: Doubles) -> tuple[Doubles, Callable[[Doubles], Doubles]]:
    """The inverse of `to_luv`, not clipped, and the function that takes a gradient back through it."""
    lightness = np.maximum(100 * scaled[..., 0], 1e-6)
    u, v = 200 * scaled[..., 1] - 100, 200 * scaled[..., 2] - 100
    # No colour of a screen has v' below 0.158; near black, a shift could reach 0.
    low = v / (13 * lightness) + WHITE_V < 0.1
    p, q = u / (13 * lightness) + WHITE_U, np.where(low, 0.1, v / (13 * lightness) + WHITE_V)
    dark = lightness <= 8
    y = np.where(dark, lightness * (3 / 29) ** 3, ((lightness + 16) / 116) ** 3)
    slope = np.where(dark, (3 / 29) ** 3, 3 * (lightness + 16) ** 2 / 116**3)
    xyz = np.stack([9 * y * p / (4 * q), y, y * (12 - 3 * p - 20 * q) / (4 * q)], axis=-1)
    to_linear = np.linalg.inv(TO_XYZ)
    linear = xyz @ to_linear.T
    bright = linear > 0.0031308
    powered = np.maximum(linear, 0.0031308)
    colours = np.where(bright, 1.055 * powered ** (1 / 2.4) - 0.055, 12.92 * linear)

    def pull_back(gradient: Doubles) -> Doubles:
        gamma = np.where(bright, 1.055 / 2.4 * powered ** (1 / 2.4 - 1), 12.92)
        dx, dy, dz = np.moveaxis((gradient * gamma) @ to_linear, -1, 0)
        to_p = (9 * dx - 3 * dz) * y / (4 * q)
        to_q = np.where(low, 0.0, -(dx * xyz[..., 0] + dz * (xyz[..., 2] + 5 * y)) / q)
        to_y = dx * 9 * p / (4 * q) + dy + dz * (12 - 3 * p - 20 * q) / (4 * q)
        to_lightness = to_y * slope - (to_p * u + to_q * v) / (13 * lightness**2)
        to_lightness = np.where(100 * scaled[..., 0] > 1e-6, to_lightness, 0.0)
        return np.stack([100 * to_lightness, *(200 * part / (13 * lightness) for part in (to_p, to_q))], -1)

    return colours, pull_back


TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])
"""Y'CbCr, chroma about 0, to RGB (JFIF)."""


def jpeg(images: Floats, shift: Floats) -> tuple[Floats, PullBack]:
    """What JPEG's decoder makes of `shift`, added to the image.

    `shift` (B, N) displaces the DCT coefficients of the 8x8 blocks, in quantization steps of quality 50:
    brightness at full, for images of three channels then each chroma at half resolution; N is `coefficients`.
    The decoder is linear, so that this is what moving the image's own coefficients does before they are
    rounded.
    """
    count, channels, height, width = images.shape
    tall, wide = -(-height // 16) * 16, -(-width // 16) * 16
    luma = tall * wide
    tables = quantization()

    def blocks(values: Doubles, halved: int) -> Doubles:
        return values.reshape(count, tall // halved // 8, 8, wide // halved // 8, 8)

    def plane(steps: Floats, halved: int) -> Doubles:
        scaled = blocks(steps.astype(np.float64), halved) * tables[halved - 1][:, None, :]
        pixels: Doubles = fft.idctn(scaled, axes=(2, 4), norm="ortho")
        return pixels.reshape(count, tall // halved, wide // halved).repeat(halved, 1).repeat(halved, 2)

    def steps(pixels: Doubles, halved: int) -> Doubles:
        summed = pixels.reshape(count, tall // halved, halved, wide // halved, halved).sum(axis=(2, 4))
        coefficients: Doubles = fft.dctn(blocks(summed, halved), axes=(2, 4), norm="ortho")
        return (coefficients * tables[halved - 1][:, None, :]).reshape(count, -1)

    planes = [plane(shift[:, :luma], 1)]
    if channels == 3:
        planes += [plane(part, 2) for part in np.split(shift[:, luma:], 2, axis=1)]
    mix = TO_RGB if channels == 3 else np.ones((1, 1))
    added = np.einsum("cp,pbhw->bchw", mix, np.stack(planes)) / 255
    raw = images + added[:, :, :height, :width]

    def pull_back(gradient: Floats) -> Floats:
        padded = np.zeros((count, channels, tall, wide))
        padded[:, :, :height, :width] = np.where((raw >= 0) & (raw <= 1), gradient, 0.0)
        pulled = np.einsum("cp,bchw->pbhw", mix, padded) / 255
        parts = [steps(part, 1 if place == 0 else 2) for place, part in enumerate(pulled)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    return np.clip(raw, 0, 1).astype(np.float32), pull_back


@cache
def quantization() -> tuple[Doubles, Doubles]:
    """JPEG's quantization tables of brightness and chroma (8, 8) at quality 50: annex K of the standard."""
    file = BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=50)
    image = Image.open(file)
    tables: dict[int, list[int]] = (
        image.quantization if isinstance(image, JpegImagePlugin.JpegImageFile) else {}
    )
    luma, chroma = (np.array(tables[place], np.float64).reshape(8, 8) for place in (0, 1))
    return luma, chroma


def unseen(
    target: Target,
    images: Floats,
    labels: Labels,
    budget: float | None,
    _: int,
    *,
    transform: Transform,
    shape: Callable[[tuple[int, ...]], tuple[int, ...]],
    rate: float,
    smoothness: float = 0.0,
    memory: tuple[float, float] = (0.9, 0.999),
    steps: int = STEPS,
) -> Found:
    """The transformation whose parameters are at most `budget` in size; `ascend` from where nothing changes.

    `shape` is that of one image's parameters, from the image's (C, H, W). Steps are `rate` times the budget
    long, the weight of the roughness is `smoothness` over the budget. No randomness.
    """
    eps = bound(budget)
    return ascend(
        target.model,
        images,
        labels,
        np.zeros((len(images), *shape(images.shape[1:])), np.float32),
        eps,
        transform=transform,
        rate=rate * eps,
        steps=steps,
        smoothness=smoothness / max(eps, TINY),
        memory=memory,
    )


def displacements(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `flow`'s parameters for an image (C, H, W)."""
    return (*shape[1:], 2)


def lattice(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `recolor`'s parameters for an image (C, H, W)."""
    channels = _channels(shape, "recolor")
    return (*LATTICE[:channels], channels)


def coefficients(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `jpeg`'s parameters for an image (C, H, W): its coefficients, its sides rounded up to
    multiples of 16.
    """
    channels, (height, width) = _channels(shape, "jpeg"), shape[1:]
    luma = -(-height // 16) * 16 * -(-width // 16) * 16
    return (luma if channels == 1 else luma * 3 // 2,)


def _channels(shape: tuple[int, ...], name: str) -> int:
    channels = shape[0]
    if channels not in (1, 3):
        raise DataError(
            f"{name}: the model's images have {channels} channels; expected 1 (grey) or 3 (red, green, blue)."
            " Leave this attack out."
        )
    return channels


_attack: Callable[..., Attack] = partial(Attack, norm=None, knowledge="gradients", passes=3 * (STEPS + 1))
ATTACKS: tuple[Attack, ...] = (
    _attack(
        name="spatial-flow",
        title="Spatial flow",
        run=partial(unseen, transform=flow, shape=displacements, rate=1 / 5, smoothness=0.0025),
        budgets=(0.05,),
        unit="half image sides",
        source="HAMMING, Table 1 (Spatial); Xiao et al. 2018, section 3; bound of Laidlaw et al. 2021",
    ),
    _attack(
        name="recolor",
        title="Recolor",
        run=partial(unseen, transform=recolor, shape=lattice, rate=1 / 60, smoothness=0.0036),
        budgets=(0.06,),
        unit="of each CIELUV axis",
        source="HAMMING, Table 1 (ReColor); Laidlaw & Feizi 2019, section 4",
    ),
    _attack(
        name="jpeg",
        title="JPEG coefficients",
        run=partial(unseen, transform=jpeg, shape=coefficients, rate=1 / 10, memory=(0.0, 0.0)),
        budgets=(0.125,),
        unit="quantization steps",
        source="HAMMING, Table 1 (JPEG); Kang et al. 2019, section 3; bound of Laidlaw et al. 2021",
    ),
)
