"""Crops, mirror images and erased squares."""

import numpy as np
import torch

from guard.training.augment import crop_and_mirror, cutout


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 64, height: int = 6, width: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator(1))


def test_every_crop_is_a_window_of_the_reflected_image() -> None:
    given = images()
    found = crop_and_mirror(given, generator(), padding=2, mirror=False)
    assert found.dtype == torch.uint8
    assert found.shape == given.shape
    seen = set()
    for image, crop in zip(given.numpy(), found.numpy(), strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        matches = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if (padded[row : row + 6, column : column + 8] == crop).all()
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 15  # of 25 windows, so each image has its own


def test_half_of_the_images_are_mirrored() -> None:
    given = images(400)
    found = crop_and_mirror(given, generator(), padding=0, mirror=True)
    same = (found == given).flatten(1).all(1)
    mirrored = (found == given.flip(2)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


def test_nothing_to_change() -> None:
    given = images()
    assert (crop_and_mirror(given, generator(), padding=0, mirror=False) == given).all()


def test_the_same_generator_draws_the_same() -> None:
    given = images()
    first, second = (crop_and_mirror(given, generator(5), padding=2, mirror=True) for _ in range(2))
    assert (first == second).all()


def test_one_square_per_image_takes_the_colour() -> None:
    given = torch.zeros(500, 3, 10, 12)
    fill = torch.tensor([0.1, 0.2, 0.3])
    found = cutout(given, generator(), size=4, fill=fill)
    erased = (found != 0).any(1)
    assert (found.permute(0, 2, 3, 1)[erased] == fill).all()
    for mask in erased:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns)  # a rectangle...
        inside = rows[0] > 0 and rows[-1] < 9 and columns[0] > 0 and columns[-1] < 11
        assert not inside or mask.sum() == 16  # ...a whole square unless the edge cuts it
    assert len({tuple(mask.flatten().tolist()) for mask in erased}) > 50
    # Every pixel is erased now and then, corners too.
    assert erased.any(0).all()
