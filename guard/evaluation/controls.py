"""Controls that know nothing of the model: random noise of the attacks' sizes, and common corruptions.

An attack no better than noise of its size finds nothing; a detector that rejects corrupted images which are
classified rightly costs its users. Corruptions are those of Hendrycks & Dietterich 2019, "Benchmarking neural
network robustness to common corruptions and perturbations", at the severities 1 to 5 that their ImageNet-C,
and for images of at most 64 pixels CIFAR-10-C, is made with. Of the fifteen, glass blur, motion blur, snow
and frost are left out (docs/decisions/0074). An image's noise hangs on the image and the seed alone.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, signal

from guard.attacks import Floats, Found, Labels, length, misclassified, random_directions
from guard.errors import DataError
from guard.evaluation.attack import BUDGETS, Attack, bound
from guard.evaluation.target import Target
from guard.norms import Norm

Doubles = NDArray[np.float64]
Setting = TypeVar("Setting")
Corrupt = Callable[[Doubles, int, np.random.Generator], Doubles]
"""`corrupt(image, severity, generator)`: image (H, W, C) in [0, 1], severity 1 to 5; the caller clips."""

SMALL = 64
"""Images of at most so many pixels to the side take the severities of CIFAR-10-C (32), larger ones those of
ImageNet-C (224)."""
DRAWS = 10


def noise(
    target: Target,
    images: Floats,
    labels: Labels,
    budget: float | None,
    seed: int,
    *,
    norm: Norm,
    draws: int = DRAWS,
) -> Found:
    """The first of `draws` random vectors of length `budget` that makes the class wrong, clipped to [0, 1].

    Uniform on the l2 sphere, or random corners of the linf cube. `distance` is the norm of what is left after
    clipping. An image that stays right comes back with its last noise.
    """
    eps = bound(budget)
    generators = [_generator(image, seed) for image in images]
    attacked = images.copy()
    success = np.zeros(len(images), np.bool_)
    for _ in range(draws):
        rows = np.flatnonzero(~success)
        if not len(rows):
            break
        directions = [random_directions((1, *images.shape[1:]), norm, generators[row]) for row in rows]
        attacked[rows] = np.clip(images[rows] + np.float32(eps) * np.concatenate(directions), 0, 1)
        logits = target.model.logits(attacked[rows])
        success[rows] = misclassified(attacked[rows], logits, labels[rows])
    return Found(attacked, success, np.where(success, length(attacked - images, norm), np.inf))


def corruption(
    target: Target, images: Floats, labels: Labels, budget: float | None, seed: int, *, corrupt: Corrupt
) -> Found:
    """Images corrupted at severity `budget`, 1 to 5 (0: not at all). `distance` is the severity."""
    severity = int(bound(budget))
    if severity != budget or severity > 5:
        raise DataError(f"severity is {budget}: expected 1, 2, 3, 4 or 5, as the corruptions are defined.")
    attacked = images.copy()
    if severity:
        for row, image in enumerate(images):
            whole = image.transpose(1, 2, 0).astype(np.float64)
            corrupted = corrupt(whole, severity, _generator(image, seed))
            attacked[row] = np.clip(corrupted, 0, 1).transpose(2, 0, 1)
    success = np.zeros(len(images), np.bool_)
    if len(images):
        success = misclassified(attacked, target.model.logits(attacked), labels)
    return Found(attacked, success, np.where(success, float(severity), np.inf))


def _generator(image: Floats, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(np.ascontiguousarray(image).tobytes())])


def _at(image: Doubles, severity: int, small: Sequence[Setting], large: Sequence[Setting]) -> Setting:
    """The setting of a severity for an image of this size."""
    return (small if min(image.shape[:2]) <= SMALL else large)[severity - 1]


def gaussian_noise(image: Doubles, severity: int, generator: np.random.Generator) -> Doubles:
    """Normal noise on every value."""
    scale = _at(image, severity, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38))
    return image + generator.normal(scale=scale, size=image.shape)


def shot_noise(image: Doubles, severity: int, generator: np.random.Generator) -> Doubles:
    """Every value a Poisson count of so many photons at white."""
    photons = _at(image, severity, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3))
    counts: Doubles = generator.poisson(image * photons) / photons
    return counts


def impulse_noise(image: Doubles, severity: int, generator: np.random.Generator) -> Doubles:
    """A share of the values becomes 0 or 1."""
    share = _at(image, severity, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27))
    salt = generator.integers(2, size=image.shape)
    return np.where(generator.random(image.shape) < share, salt, image)


def defocus_blur(image: Doubles, severity: int, _: np.random.Generator) -> Doubles:
    """The mean over a disk of some radius, its edge softened."""
    small = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
    large = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
    radius, softness = _at(image, severity, small, large)
    reach = np.arange(-10, 11)
    disk = (reach[:, None] ** 2 + reach[None, :] ** 2 <= radius**2).astype(np.float64)
    disk = ndimage.gaussian_filter(disk / disk.sum(), softness, radius=1 if radius <= 8 else 2)
    mirrored = np.pad(image, ((10, 10), (10, 10), (0, 0)), mode="reflect")
    blurred: Doubles = signal.fftconvolve(mirrored, disk[:, :, None], mode="valid", axes=(0, 1))
    return blurred


def zoom_blur(image: Doubles, severity: int, _: np.random.Generator) -> Doubles:
    """The mean of the image and of its middle at growing magnifications."""
    small = ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))
    large = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
    last, step = _at(image, severity, small, large)
    layers = [image, *(_magnified(image, factor) for factor in np.arange(1, last, step))]
    mean: Doubles = np.mean(layers, axis=0)
    return mean


def _magnified(image: Doubles, factor: float) -> Doubles:
    """The middle of the image, as large as the image was, between pixels by linear interpolation."""
    height, width = image.shape[:2]
    tall, wide = int(np.ceil(height / factor)), int(np.ceil(width / factor))
    top, left = (height - tall) // 2, (width - wide) // 2
    grown = ndimage.zoom(image[top : top + tall, left : left + wide], (factor, factor, 1), order=1)
    top, left = (grown.shape[0] - height) // 2, (grown.shape[1] - width) // 2
    return grown[top : top + height, left : left + width]


def fog(image: Doubles, severity: int, generator: np.random.Generator) -> Doubles:
    """A cloud is added, and the whole dimmed to the brightness it had."""
    small = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))
    large = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
    density, decay = _at(image, severity, small, large)
    height, width = image.shape[:2]
    clouds = plasma(max(2, 1 << (max(height, width) - 1).bit_length()), decay, generator)[
        :height, :width, None
    ]
    brightest = max(float(image.max()), 1e-6)
    return (image + density * clouds) * brightest / (brightest + density)


def plasma(side: int, decay: float, generator: np.random.Generator) -> Doubles:
    """A cloud (side, side) in [0, 1] that tiles the plane; `side` is a power of two, 2 or more.

    Diamond-square: the grid is halved again and again, new points are the mean of their four neighbours and
    noise, whose size falls by decay squared with every halving.
    """
    heights = np.zeros((side, side))
    step, size = side, 1.0
    while step >= 2:
        half = step // 2
        points = heights[::step, ::step]
        across = points + np.roll(points, -1, axis=1)
        corners = across + np.roll(across, -1, axis=0)
        centres = corners / 4 + generator.uniform(-size, size, points.shape)
        heights[half::step, half::step] = centres
        beside = (across + centres + np.roll(centres, 1, axis=0)) / 4
        below = (points + np.roll(points, -1, axis=0) + centres + np.roll(centres, 1, axis=1)) / 4
        heights[::step, half::step] = beside + generator.uniform(-size, size, points.shape)
        heights[half::step, ::step] = below + generator.uniform(-size, size, points.shape)
        step, size = half, size / decay**2
    heights -= heights.min()
    scaled: Doubles = heights / heights.max()
    return scaled


def brightness(image: Doubles, severity: int, _: np.random.Generator) -> Doubles:
    """More of the value of hue, saturation and value: colours are scaled until the largest part has grown."""
    more = _at(image, severity, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5))
    value = image.max(axis=2, keepdims=True)
    brighter = np.minimum(value + more, 1)
    brightened: Doubles = np.where(value > 0, image / np.maximum(value, 1e-12), 1.0) * brighter
    return brightened


def contrast(image: Doubles, severity: int, _: np.random.Generator) -> Doubles:
    """Every channel drawn towards its mean."""
    left = _at(image, severity, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))
    mean: Doubles = image.mean(axis=(0, 1), keepdims=True)
    return mean + left * (image - mean)


def elastic(image: Doubles, severity: int, generator: np.random.Generator) -> Doubles:
    """A random affine map, and random displacements smoothed over a width; beyond the edge, mirrored.

    Displacement before smoothing, width and the affine map's move of three points, in sides of the image.
    """
    small = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    large = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    height, width = image.shape[:2]
    side = min(height, width) * (1.0 if min(height, width) <= SMALL else 244 / 224)
    size, smooth, move = (side * share for share in _at(image, severity, small, large))
    third = min(height, width) // 3
    points = np.array([height // 2, width // 2]) + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + generator.uniform(-move, move, points.shape)
    # The affine map takes the moved points back to where their values come from.
    affine = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points.astype(np.float64))
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1).astype(float)
    if size:
        for axis in (0, 1):
            field = generator.uniform(-1, 1, (height, width))
            grid[..., axis] += size * ndimage.gaussian_filter(field, smooth, mode="reflect", truncate=3)
    where = np.moveaxis(grid @ affine[:2] + affine[2], -1, 0)
    channels = [
        ndimage.map_coordinates(part, where, order=1, mode="mirror") for part in image.transpose(2, 0, 1)
    ]
    return np.stack(channels, axis=-1)


def pixelate(image: Doubles, severity: int, _: np.random.Generator) -> Doubles:
    """Shrunk and blown up again, each time by means over boxes."""
    share = _at(image, severity, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25))
    height, width = image.shape[:2]
    fewer = (max(1, int(width * share)), max(1, int(height * share)))

    def resized(part: Doubles) -> Doubles:
        small = Image.fromarray(part.astype(np.float32)).resize(fewer, Image.Resampling.BOX)
        return np.asarray(small.resize((width, height), Image.Resampling.BOX), np.float64)

    return np.stack([resized(part) for part in image.transpose(2, 0, 1)], axis=-1)


def jpeg(image: Doubles, severity: int, _: np.random.Generator) -> Doubles:
    """Compressed at a low quality."""
    quality = _at(image, severity, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7))
    if image.shape[2] not in (1, 3):
        raise DataError(
            f"corruption-jpeg: the model's images have {image.shape[2]} channels; expected 1 (grey) or 3"
            " (red, green, blue). Leave this corruption out."
        )
    pixels = (image * 255).round().astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels[..., 0] if image.shape[2] == 1 else pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float64).reshape(image.shape) / 255


CORRUPTIONS: dict[str, Corrupt] = {
    "gaussian-noise": gaussian_noise,
    "shot-noise": shot_noise,
    "impulse-noise": impulse_noise,
    "defocus-blur": defocus_blur,
    "zoom-blur": zoom_blur,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic": elastic,
    "pixelate": pixelate,
    "jpeg": jpeg,
}

ATTACKS: tuple[Attack, ...] = (
    *(
        Attack(
            name=f"noise-{norm}",
            title=f"Random noise, {norm}",
            run=partial(noise, norm=norm),
            norm=norm,
            knowledge="nothing",
            passes=DRAWS,
            budgets=budgets,
            source="control",
        )
        for norm, budgets in BUDGETS.items()
    ),
    *(
        Attack(
            name=f"corruption-{name}",
            title=f"{name.replace('-', ' ').capitalize()} (corruption)",
            run=partial(corruption, corrupt=corrupt),
            norm=None,
            knowledge="nothing",
            passes=1,
            budgets=(1, 2, 3, 4, 5),
            unit="severity",
            source="Hendrycks & Dietterich 2019, section 4",
        )
        for name, corrupt in CORRUPTIONS.items()
    ),
)
