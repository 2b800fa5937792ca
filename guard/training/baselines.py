"""What the papers compare with: training on attacked or noisy images in place of the images."""

from collections.abc import Callable

import torch
from torch import Tensor

from guard.training.passes import Passes, RegularizedLoss
from guard.training.regularizers import image_norms, unit_direction


def adversarial_linf(
    passes: Passes, *, eps: float, steps: int = 7, step: float | None = None
) -> RegularizedLoss:
    """Adversarial training by projected gradient descent in the linf ball (arXiv 1706.06083).

    `steps` steps of length `step`, 2.5 eps / steps where not given, along the gradient's sign, from a random
    start in the ball; attacked images stay in [0, 1].
    """
    start = (2 * _uniform(passes, passes.images.shape) - 1) * eps
    return _attacked(
        passes, start, steps, _length(eps, steps, step), torch.sign, lambda v: v.clamp(-eps, eps)
    )


def adversarial_l2(
    passes: Passes, *, eps: float, steps: int = 7, step: float | None = None
) -> RegularizedLoss:
    """The same in the l2 ball, along g / ||g||_2."""

    def project(shift: Tensor) -> Tensor:
        norms = image_norms(shift).clamp_min(eps).view(-1, *[1] * (shift.dim() - 1))
        return shift * (eps / norms) if eps > 0 else torch.zeros_like(shift)

    direction = unit_direction(_normal(passes))
    lengths = _uniform(passes, (len(direction), *[1] * (direction.dim() - 1)))
    start = direction * lengths ** (1 / direction[0].numel()) * eps  # uniform in the ball
    return _attacked(passes, start, steps, _length(eps, steps, step), unit_direction, project)


def free_linf(passes: Passes, *, eps: float, replays: int = 4) -> RegularizedLoss:
    """Adversarial training "for free" in the linf ball (arXiv 1904.12843): one perturbation across steps.

    The loop uses each batch `replays` times in a row. Each step's backward pass moves both the weights and
    the perturbation, by eps along the gradient's sign. An epoch has as many steps as any other, over
    1 / replays of the images.
    """
    del replays  # the loop's
    key = f"free_perturbation_{passes.part}"
    shift = passes.state.get(key, torch.zeros_like(passes.images))
    points = (passes.images + shift).clamp(0, 1).requires_grad_()

    def finish() -> None:
        if points.grad is not None:
            passes.state[key] = (shift + eps * points.grad.sign()).clamp(-eps, eps)

    passes.after_backward.append(finish)
    return RegularizedLoss(data=passes.at(points).losses.mean())


def gaussian(passes: Passes, *, sigma: float) -> RegularizedLoss:
    """Training on images with normal noise of deviation `sigma` per pixel, not clipped to [0, 1]."""
    return RegularizedLoss(data=passes.at(passes.images + sigma * _normal(passes)).losses.mean())


def _attacked(
    passes: Passes,
    start: Tensor,
    steps: int,
    length: float,
    direction: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
) -> RegularizedLoss:
    images = passes.images
    points = (images + start).clamp(0, 1)
    for _ in range(steps):
        shift = points + length * direction(passes.attack_gradient(points)) - images
        points = (images + project(shift)).clamp(0, 1)
    return RegularizedLoss(data=passes.at(points).losses.mean())


def _length(eps: float, steps: int, step: float | None) -> float:
    return 2.5 * eps / steps if step is None else step


def _uniform(passes: Passes, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=passes.generator, dtype=passes.images.dtype).to(passes.images.device)


def _normal(passes: Passes) -> Tensor:
    images = passes.images
    return torch.randn(images.shape, generator=passes.generator, dtype=images.dtype).to(images.device)
