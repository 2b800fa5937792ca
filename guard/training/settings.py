"""All that decides the trained weights, beside the data and the machine."""

import math
from dataclasses import dataclass
from typing import Literal

from guard.errors import UsageError
from guard.training import architectures, grammar, schedules

Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class Settings:
    """All that decides the trained weights, beside the data, the thread count and the device.

    `width` is the architecture's number of channels in its first stage, None for its own;
    `pre_logit_sigmoid` bounds the features before its last layer; `regularizers` are written as on the
    command line; `batch_size` counts the images of all processes; `accumulate` cuts each process's share of a
    batch into as many equal parts, computed one after another, and averages their gradients: means stay what
    they were, while what looks at a batch as a whole sees a part (BatchNorm's statistics, the distances of
    `hamming` and `dense-manifold`, and the Lipschitz term: the average of the parts' maxima is trained on);
    `learning_rate` is the peak, reached after the share `warmup` of training; `weight_decay` is for weights
    of more than one axis; `padding` is the furthest shift of a crop and `cutout` the side of the painted
    square, in pixels; `held_out` is how many of the last training images are kept for the log's accuracy
    (random ones, by the seed, where images come sorted by class); `precision` is what convolutions and
    products are computed in; with `compile`, passes go through `torch.compile` where they can.
    """

    architecture: str = "compact-resnet"
    width: int | None = None
    pre_logit_sigmoid: bool = False
    regularizers: tuple[str, ...] = ("none",)
    epochs: int = 20
    batch_size: int = 256
    accumulate: int = 1
    learning_rate: float = 0.2
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "one-cycle"
    warmup: float = 0.2
    padding: int = 4
    mirror: bool = True
    cutout: int = 8
    held_out: int = 1000
    precision: Precision = "float32"
    compile: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raises `UsageError` for what makes no sense, naming the flag of `guard train`."""

        def demand(holds: bool, flag: str, value: object, expected: str) -> None:
            if not holds:
                raise UsageError(f"{flag} is {value}: expected {expected}.")

        architectures.check(self.architecture, self.width)
        grammar.parse_all(self.regularizers)
        demand(self.epochs >= 1, "--epochs", self.epochs, "1 or more")
        demand(self.batch_size >= 2, "--batch-size", self.batch_size, "2 or more")
        demand(self.accumulate >= 1, "--accumulate", self.accumulate, "1 or more")
        rate = self.learning_rate
        demand(0 < rate < math.inf, "--learning-rate", rate, "a number above 0")
        demand(0 <= self.momentum < 1, "--momentum", self.momentum, "0 or more, below 1")
        demand(
            0 <= self.weight_decay < math.inf,
            "--weight-decay",
            self.weight_decay,
            "a number of 0 or more",
        )
        schedules.named(self.schedule)
        demand(0 <= self.warmup < 1, "--warmup", self.warmup, "a share of training, below 1")
        demand(self.padding >= 0, "--crop", self.padding, "0 pixels or more")
        demand(self.cutout >= 0, "--cutout", self.cutout, "0 pixels or more")
        demand(self.held_out >= 0, "--held-out", self.held_out, "0 images or more")
        demand(0 <= self.seed < 2**63, "--seed", self.seed, "0 or more, below 2^63")
