"""Random noise and common corruptions: sizes in closed form, and that they hang on image and seed alone."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from guard.attacks import Floats, length
from guard.errors import DataError
from guard.evaluation import controls
from guard.evaluation.attack import Attack
from guard.evaluation.controls import CORRUPTIONS, Doubles
from guard.evaluation.target import Target
from guard.norms import Norm
from guard.runtime import Detector
from tests import networks

BY_NAME = {attack.name: attack for attack in controls.ATTACKS}
CORRUPTING = [attack for attack in controls.ATTACKS if attack.norm is None]


def target_of(shape: tuple[int, int, int]) -> Target:
    return Target(Detector(networks.convolutional(shape=shape, width=4), provider="cpu"))


def corrupted(name: str, image: Doubles, severity: int, seed: int = 0) -> Doubles:
    return CORRUPTIONS[name](image, severity, np.random.default_rng(seed))


def picture(side: int = 32) -> Doubles:
    """A smooth picture (side, side, 3) with edges."""
    y, x = np.mgrid[:side, :side] / side
    disk = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1
    return np.stack([0.2 + 0.6 * x, 0.8 - 0.6 * y, np.where(disk, 0.7, 0.3)], axis=-1)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 8 / 255)])
def test_noise_has_the_length_of_its_budget(norm: Norm, eps: float) -> None:
    images = (0.3 + 0.4 * networks.images(4)).astype(np.float32)
    target = target_of((3, 8, 8))
    labels = target.model.logits(images).argmin(axis=1)  # wrong already, so that every draw succeeds
    found = BY_NAME[f"noise-{norm}"].run(target, images, labels, eps, 0)
    assert found.success.all()
    assert length(found.images - images, norm) == pytest.approx(np.full(4, eps), rel=1e-4)
    assert found.distance == pytest.approx(length(found.images - images, norm))
    if norm == "linf":
        assert np.abs(found.images - images) == pytest.approx(eps, rel=1e-4)


def test_noise_succeeds_as_often_as_its_draws_allow() -> None:
    # Wrong where the noise on one pixel is positive: a coin for every draw.
    weight = np.zeros((2, 4), np.float32)
    weight[1, 0] = 1
    model = networks.linear(weight, np.array([0, -0.5], np.float32), shape=(1, 2, 2))
    target = Target(Detector(model, provider="cpu"))
    images = np.full((400, 1, 2, 2), 0.5, np.float32)
    images[:, 0, 1, 1] = np.linspace(0.2, 0.8, 400)
    labels = np.zeros(400, np.int64)
    shares = [
        controls.noise(target, images, labels, 0.1, 0, norm="linf", draws=draws).success.mean()
        for draws in (1, 2, 10)
    ]
    assert shares == pytest.approx([0.5, 0.75, 1 - 2**-10], abs=0.07)
    found = controls.noise(target, images, labels, 0.1, 0, norm="linf", draws=1)
    assert np.array_equal(found.success, found.images[:, 0, 0, 0] > 0.5)
    assert np.isinf(found.distance[~found.success]).all()


@pytest.mark.parametrize("attack", controls.ATTACKS, ids=lambda attack: attack.name)
def test_budget_zero_changes_nothing(attack: Attack) -> None:
    images, target = networks.images(3), target_of((3, 8, 8))
    labels = target.model.logits(images).argmax(axis=1)
    labels[1] = (labels[1] + 1) % 10
    found = attack.run(target, images, labels, 0, 0)
    assert np.array_equal(found.images, images)
    assert found.success.tolist() == [False, True, False]
    assert found.distance[1] == 0


@pytest.mark.parametrize("attack", controls.ATTACKS, ids=lambda attack: attack.name)
def test_an_image_fares_alike_alone_and_in_company_and_otherwise_by_seed(attack: Attack) -> None:
    images, target = networks.images(4), target_of((3, 8, 8))
    labels = target.model.logits(images).argmax(axis=1)
    assert attack.budgets is not None
    budget = attack.budgets[-1]
    together = attack.run(target, images, labels, budget, 3)
    alone = attack.run(target, images[2:3], labels[2:3], budget, 3)
    assert np.array_equal(together.images[2:3], alone.images)
    assert np.array_equal(together.success, target.model.logits(together.images).argmax(axis=1) != labels)
    random = attack.name.removeprefix("corruption-") in {"gaussian-noise", "elastic", "fog", "noise-l2"}
    if random:
        assert not np.array_equal(together.images, attack.run(target, images, labels, budget, 4).images)
    assert attack.run(target, images[:0], labels[:0], budget, 3).images.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 32, 32), (3, 66, 70), (1, 1, 1)])
@pytest.mark.parametrize("attack", CORRUPTING, ids=lambda attack: attack.name)
def test_corrupted_images_are_images(attack: Attack, shape: tuple[int, int, int]) -> None:
    images = networks.images(3, shape)
    images[0], images[1] = 0, 1

    class Constant:
        input_shape, num_classes = shape, 2

        def logits(self, images: Floats) -> Floats:
            return np.tile(np.array([1, 0], np.float32), (len(images), 1))

    for severity in (1, 5):
        found = attack.run(Target(Constant()), images, np.zeros(3, np.int64), severity, 0)  # type: ignore[arg-type]
        assert found.images.shape == images.shape
        assert found.images.dtype == np.float32
        assert found.images.min() >= 0  # which NaN is not
        assert found.images.max() <= 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_worst_severity_changes_more_than_the_mildest(name: str) -> None:
    image = picture()
    changes = [np.abs(corrupted(name, image, severity) - image).mean() for severity in range(1, 6)]
    # Random affine maps hide what severity does to single elastic images.
    if name != "elastic":
        assert changes[-1] > changes[0] > 0
    assert all(0 < change < 0.6 for change in changes)


@pytest.mark.parametrize("name", ["defocus-blur", "zoom-blur", "contrast", "elastic", "pixelate"])
@pytest.mark.parametrize("side", [20, 80])
def test_one_colour_stays_that_colour(name: str, side: int) -> None:
    image = np.full((side, side, 3), (0.25, 0.5, 0.75))
    for severity in range(1, 6):
        assert corrupted(name, image, severity) == pytest.approx(image, abs=1e-6)


@pytest.mark.parametrize(("side", "scale", "photons", "share"), [(32, 0.1, 50, 0.07), (80, 0.38, 3, 0.27)])
def test_noises_have_their_size(side: int, scale: float, photons: int, share: float) -> None:
    image = np.full((side, side, 3), 0.5)
    assert (corrupted("gaussian-noise", image, 5) - image).std() == pytest.approx(scale, rel=0.05)
    counts = corrupted("shot-noise", image, 5) * photons
    assert counts == pytest.approx(counts.round(), abs=1e-9)
    assert counts.mean() == pytest.approx(photons / 2, rel=0.05)
    struck = corrupted("impulse-noise", image, 5)
    assert (struck != 0.5).mean() == pytest.approx(share, rel=0.2)
    assert (struck[struck != 0.5]).mean() == pytest.approx(0.5, abs=0.1)
    assert set(np.unique(struck)) == {0, 0.5, 1}


def test_contrast_and_brightness_by_hand() -> None:
    image = picture()
    mean = image.mean(axis=(0, 1))
    assert corrupted("contrast", image, 5) == pytest.approx(mean + 0.15 * (image - mean))
    brighter = corrupted("brightness", image, 3)
    assert brighter.max(axis=2) == pytest.approx(np.minimum(image.max(axis=2) + 0.15, 1))
    assert brighter / brighter.max(axis=2, keepdims=True) == pytest.approx(
        image / image.max(axis=2, keepdims=True)
    )
    assert corrupted("brightness", np.zeros((2, 2, 3)), 1) == pytest.approx(0.05)


def test_large_images_pixelate_to_means_of_blocks() -> None:
    image = picture(80)
    means = image.reshape(40, 2, 40, 2, 3).mean(axis=(1, 3)).repeat(2, 0).repeat(2, 1)
    assert corrupted("pixelate", image, 2) == pytest.approx(means, abs=1e-6)


def test_zoom_blur_stays_sharp_in_the_middle_and_defocus_nowhere() -> None:
    image = np.zeros((81, 81, 1))
    image[40, 40], image[40, 5] = 1, 1
    zoomed, blurred = corrupted("zoom-blur", image, 5), corrupted("defocus-blur", image, 5)
    assert zoomed[40, 40, 0] > 3 * zoomed[40, 5, 0] > 0
    # A disk of radius 10 holds 317 pixels.
    assert blurred[40, 40, 0] == pytest.approx(1 / 317, rel=0.01)
    assert blurred.sum() == pytest.approx(2, rel=0.1)


def test_clouds_fill_the_scale_and_tile() -> None:
    clouds = controls.plasma(64, 2.0, np.random.default_rng(0))
    assert clouds.shape == (64, 64)
    assert clouds.min() == 0
    assert clouds.max() == 1
    step = np.abs(np.diff(clouds, axis=0)).mean()
    assert np.abs(clouds[-1] - clouds[0]).mean() < 3 * step  # no seam
    smoother = controls.plasma(64, 3.0, np.random.default_rng(0))
    assert np.abs(np.diff(smoother, axis=0)).mean() < step


def test_jpeg_is_what_pillow_decodes() -> None:
    image = (picture() * 255).round().astype(np.uint8)
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=40)
    decoded = np.asarray(Image.open(file))
    assert np.array_equal(corrupted("jpeg", image / 255, 5), decoded / 255)
    with pytest.raises(DataError, match="2 channels"):
        corrupted("jpeg", np.zeros((8, 8, 2)), 1)


@pytest.mark.parametrize("severity", [6, 2.5])
def test_other_severities_are_refused(severity: float) -> None:
    images, labels = networks.images(1), np.zeros(1, np.int64)
    with pytest.raises(DataError, match="expected 1, 2, 3, 4 or 5"):
        BY_NAME["corruption-fog"].run(target_of((3, 8, 8)), images, labels, severity, 0)


def test_names_tell_corruptions_from_attacks() -> None:
    assert len(BY_NAME) == len(controls.ATTACKS) == 2 + 11
    assert all(attack.knowledge == "nothing" for attack in controls.ATTACKS)
    assert {attack.name for attack in CORRUPTING} == {f"corruption-{name}" for name in CORRUPTIONS}
