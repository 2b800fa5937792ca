"""Gradient regularizers: what makes a classifier's loss change slowly around its training images.

Each is a function `(passes, **hyperparameters) -> RegularizedLoss`. L is the cross-entropy, g_i the gradient
of L(x_i, y_i) by x_i, N the number of pixels, and d_i a direction made from g_i, never differentiated itself.
The `_exact` ones differentiate g_i itself, by double backpropagation, in place of a finite difference.
"""

from typing import Literal

import torch
from torch import Tensor

from guard.training.distributed import share_of_maximum
from guard.training.passes import Passes, RegularizedLoss

FULL_PRECISION_STEP = 0.01
HALF_PRECISION_STEP = 0.1

COMPANIONS = 7
"""Images that the steepest one of a batch is normalized with (docs/decisions/0011)."""


def image_norms(tensor: Tensor) -> Tensor:
    """l2 norm of every image: (B, ...) -> (B,)."""
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1)
    return norms


def _image_l1_norms(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).abs().sum(1)


def unit_direction(gradient: Tensor) -> Tensor:
    """The direction g / ||g||_2 of every image, 0 where g is 0: (B, ...) -> (B, ...)."""
    norms = image_norms(gradient)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return gradient / norms.view(-1, *[1] * (gradient.dim() - 1))


def sign_direction(gradient: Tensor) -> Tensor:
    """The direction sign(g) / sqrt(N), along which L rises by ||g||_1 / sqrt(N): (B, ...) -> (B, ...)."""
    direction: Tensor = gradient.sign() / gradient[0].numel() ** 0.5
    return direction


def none(passes: Passes) -> RegularizedLoss:  # noqa: ARG001
    """Plain training."""
    return RegularizedLoss()


def tv_l2(
    passes: Passes, *, eps: float, form: Literal["step", "penalty"] = "step", h: float | None = None
) -> RegularizedLoss:
    """Total variation, eps * mean ||g||_2, by one step along d = g / ||g||_2.

    Form `step` trains on L(x + eps d), which is L(x) + eps ||g||_2 to first order (LIP 2.2); form `penalty`
    adds eps * mean (L(x + h d) - L(x)) / h (LIPGEN eq. 2.9).
    """
    terms = {"gradient_l2": image_norms(passes.gradient).mean()}
    direction = unit_direction(passes.gradient)
    if form == "step":
        return RegularizedLoss(data=_losses_along(passes, direction, eps).mean(), terms=terms)
    slopes = _slopes_along(passes, direction, _difference_step(passes, h))
    return RegularizedLoss(penalty=eps * slopes.mean(), terms=terms)


def tv_l1(
    passes: Passes, *, eps: float, form: Literal["step", "penalty"] = "step", h: float | None = None
) -> RegularizedLoss:
    """Total variation, eps * mean ||g||_1, by one step along d = sign(g): against linf attacks.

    Form `step` is adversarial training by the fast gradient sign method (LIP 2.2, LIPGEN 3.2). Form `penalty`
    adds eps * sqrt(N) * mean (L(x + h d / sqrt(N)) - L(x)) / h: as everywhere, h is a length in l2.
    """
    gradient = passes.gradient
    terms = {"gradient_l1": _image_l1_norms(gradient).mean()}
    if form == "step":
        return RegularizedLoss(data=_losses_along(passes, gradient.sign(), eps).mean(), terms=terms)
    slopes = _slopes_along(passes, sign_direction(gradient), _difference_step(passes, h))
    return RegularizedLoss(penalty=eps * gradient[0].numel() ** 0.5 * slopes.mean(), terms=terms)


def lipschitz(passes: Passes, *, weight: float, h: float | None = None) -> RegularizedLoss:
    """The Lipschitz constant seen in the batch: weight * max_i ||g_i||_2 (LIPGEN eq. 2.6, LIP 3.1).

    Only the image with the largest gradient counts. Its norm is differentiated exactly, by double
    backpropagation through a pass in full precision over that image and the `COMPANIONS` next in the batch;
    with `h`, the finite difference (L(x + h d) - L(x)) / h along that gradient takes its place. BatchNorm
    sees these images alone then, so that the term logged, and penalized, is not quite the batch's largest
    norm, logged as `steepest`.
    """
    slope, steepest = _steepest(passes, h)
    return RegularizedLoss(weight * slope, terms={"lipschitz": slope.detach(), "steepest": steepest})


def tulip(passes: Passes, *, eps: float, weight: float, h: float | None = None) -> RegularizedLoss:
    """`tv-l2` with eps plus weight * `lipschitz`, on shared passes (LIP; LIPGEN 2.6 and 2.9)."""
    return _sum(tv_l2(passes, eps=eps), lipschitz(passes, weight=weight, h=h))


def gradient_penalty_l2(passes: Passes, *, weight: float, h: float | None = None) -> RegularizedLoss:
    """Squared gradient norm: weight * mean ((L(x + h d) - L(x)) / h)^2, d = g / ||g||_2 (SCALE Alg. 1)."""
    return _gradient_penalty(passes, unit_direction(passes.gradient), weight, h)


def gradient_penalty_l1(passes: Passes, *, weight: float, h: float | None = None) -> RegularizedLoss:
    """The same with d = sign(g) / sqrt(N): weight * mean ||g||_1^2 / N (SCALE 3.1)."""
    return _gradient_penalty(passes, sign_direction(passes.gradient), weight, h)


def tv_l2_exact(passes: Passes, *, eps: float) -> RegularizedLoss:
    """`tv-l2` itself: eps * mean ||g||_2."""
    variation = image_norms(passes.exact_gradient).mean()
    return RegularizedLoss(eps * variation, terms={"gradient_l2": variation.detach()})


def tv_l1_exact(passes: Passes, *, eps: float) -> RegularizedLoss:
    """`tv-l1` itself: eps * mean ||g||_1."""
    variation = _image_l1_norms(passes.exact_gradient).mean()
    return RegularizedLoss(eps * variation, terms={"gradient_l1": variation.detach()})


def lipschitz_exact(passes: Passes, *, weight: float) -> RegularizedLoss:
    """`lipschitz` through the pass over the whole batch in training mode: weight * max_i ||g_i||_2."""
    norms = image_norms(passes.exact_gradient)
    slope = share_of_maximum(norms.max()) * norms[norms.argmax()]
    return RegularizedLoss(weight * slope, terms={"lipschitz": slope.detach()})


def tulip_exact(passes: Passes, *, eps: float, weight: float) -> RegularizedLoss:
    """`tv-l2-exact` with eps plus weight * `lipschitz-exact`."""
    return _sum(tv_l2_exact(passes, eps=eps), lipschitz_exact(passes, weight=weight))


def gradient_penalty_l2_exact(passes: Passes, *, weight: float) -> RegularizedLoss:
    """`gradient-penalty-l2` itself: weight * mean ||g||_2^2 (SCALE Table 1's ablation)."""
    penalty = passes.exact_gradient.square().flatten(1).sum(1).mean()
    return RegularizedLoss(weight * penalty, terms={"gradient_penalty": penalty.detach()})


def gradient_penalty_l1_exact(passes: Passes, *, weight: float) -> RegularizedLoss:
    """`gradient-penalty-l1` itself: weight * mean ||g||_1^2 / N."""
    gradient = passes.exact_gradient
    penalty = _image_l1_norms(gradient).square().mean() / gradient[0].numel()
    return RegularizedLoss(weight * penalty, terms={"gradient_penalty": penalty.detach()})


def _sum(variation: RegularizedLoss, constant: RegularizedLoss) -> RegularizedLoss:
    penalties = [part.penalty for part in (variation, constant) if part.penalty is not None]
    return RegularizedLoss(
        torch.stack(penalties).sum(), variation.data, {**variation.terms, **constant.terms}
    )


def _gradient_penalty(passes: Passes, direction: Tensor, weight: float, h: float | None) -> RegularizedLoss:
    penalty = _slopes_along(passes, direction, _difference_step(passes, h)).square().mean()
    return RegularizedLoss(weight * penalty, terms={"gradient_penalty": penalty.detach()})


def _losses_along(passes: Passes, direction: Tensor, step: float) -> Tensor:
    return passes.at(passes.images + step * direction).losses


def _slopes_along(passes: Passes, direction: Tensor, step: float) -> Tensor:
    return (_losses_along(passes, direction, step) - passes.clean.losses) / step


def _steepest(passes: Passes, h: float | None) -> tuple[Tensor, Tensor]:
    """The largest ||g_i||_2 of the batch: differentiable by the weights, and as the batch's own pass has it.

    Of several processes only the one that holds it contributes, times their number: gradients are averaged.
    """
    norms = image_norms(passes.gradient)
    chosen = norms.argmax()
    factor = share_of_maximum(norms.max())
    few = (chosen + torch.arange(min(1 + COMPANIONS, len(norms)), device=chosen.device)) % len(norms)
    points, labels = passes.images[few].detach().requires_grad_(), passes.labels[few]
    loss = passes.over_few(points, labels).losses[0]
    if h is None:
        (gradient,) = torch.autograd.grad(loss, points, create_graph=True)
        return factor * image_norms(gradient[:1]).squeeze(0), factor * norms.max()
    (gradient,) = torch.autograd.grad(loss, points, retain_graph=True)
    ahead = points.detach().clone()
    ahead[0] += h * unit_direction(gradient[:1])[0]
    rise = passes.over_few(ahead, labels).losses[0] - loss
    return factor * rise / h, factor * norms.max()


def _difference_step(passes: Passes, h: float | None) -> float:
    """The step of a finite difference: h where given, else what the precision of the passes allows."""
    if h is not None:
        return h
    return FULL_PRECISION_STEP if passes.autocast is None else HALF_PRECISION_STEP
