"""Random crops, mirror images and erased squares, drawn per image, for whole batches at once."""

import torch
from torch import Tensor


def crop_and_mirror(images: Tensor, generator: torch.Generator, *, padding: int, mirror: bool) -> Tensor:
    """Shifts every image by up to `padding` pixels, reflecting at the edges, and mirrors half of them.

    Images are (B, H, W, C) of any type, with sides longer than `padding`; so is the result. The generator is
    the CPU's: the draws are the same wherever the images lie.
    """
    count, height, width, _ = images.shape
    shifts = torch.randint(-padding, padding + 1, (2, count), generator=generator)
    rows = _reflect(shifts[0, :, None] + torch.arange(height), height)
    columns = _reflect(shifts[1, :, None] + torch.arange(width), width)
    if mirror:
        mirrored = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    device = images.device
    return images[
        torch.arange(count, device=device)[:, None, None],
        rows.to(device)[:, :, None],
        columns.to(device)[:, None, :],
    ]


def _reflect(indices: Tensor, size: int) -> Tensor:
    """Indices outside [0, size) reflected at the edge pixels, which are not repeated."""
    indices = indices.abs()
    return torch.where(indices < size, indices, 2 * (size - 1) - indices)


def cutout(images: Tensor, generator: torch.Generator, *, size: int, fill: Tensor) -> Tensor:
    """Paints one square of `size` pixels in every image with the colour `fill` (arXiv 1708.04552).

    Its centre lies anywhere; what falls outside is cut. Images are (B, C, H, W), `fill` is (C,).
    """
    count, _, height, width = images.shape
    centres = torch.rand((2, count), generator=generator)
    top = (centres[0] * height).long() - size // 2
    left = (centres[1] * width).long() - size // 2
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + size)
    in_columns = (columns >= left[:, None]) & (columns < left[:, None] + size)
    erased = (in_rows[:, :, None] & in_columns[:, None, :])[:, None].to(images.device)
    return torch.where(erased, fill.view(1, -1, 1, 1), images)
