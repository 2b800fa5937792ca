"""What an evaluation ends with, once all attacks have run: signs of masked gradients, and the audit of the
radii. Both are computed in pieces and kept in the results folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from guard import data
from guard.attacks import Labels
from guard.bundle import Bundle
from guard.certificate import OmegaTable
from guard.evaluation import audit, masking
from guard.evaluation.attack import BUDGETS
from guard.evaluation.folder import Folder
from guard.evaluation.results import Check, RadiusAudit
from guard.evaluation.sample import Sample
from guard.evaluation.target import Flags, Target, Values
from guard.norms import NORMS, Norm
from guard.progress import Progress
from guard.runtime import Measurement
from guard.stages import PIECE, Arrays

RANDOM_OMEGA = 500
"""Images of the radii fold that the ablation of omega by random perturbations is fitted to."""

MASKING, MASKING_DETECTOR = "masking.npz", "masking-detector.npz"

LAST = ("signs of masked gradients", "audit of the radii")
"""What a run ends with, by the names that it is outstanding under."""

PROBED, PROBED_QUICK = 100, 32
"""Images that the masking checks' own attacks are run on."""


@dataclass(frozen=True)
class Closing:
    """The end of one evaluation: `right` (N,) are the clean images classified rightly; `quick` leaves out the
    attacks from inside the radii and the ablation of omega, and probes fewer images.
    """

    folder: Folder
    target: Target
    found: Bundle
    sample: Sample
    right: Flags
    budgets: Mapping[Norm, tuple[float, ...]]
    quick: bool

    def passes(self) -> int:
        """Forward passes of all of it at most, less what is on the disk."""
        probed = len(self._probe_key()["row"])
        passes = 0 if self._kept_probes(MASKING) else probed * masking.PASSES
        passes += 0 if self._kept_probes(MASKING_DETECTOR) else probed * masking.DETECTOR_PASSES
        for norm in NORMS:
            if not self._kept_distance(norm):
                passes += audit.inside_passes(self._restarts) * len(self.sample)
            if self._ablates and not self._kept_remainders(norm):
                passes += audit.RANDOM_PASSES * len(self._random_fold())
        return passes

    # --- signs of masked gradients

    def checks(self, progress: Progress) -> list[Check]:
        """The masking checks' verdicts; none where no image is classified rightly."""
        budgets, sample, score = self._probe_budgets(), self.sample, self.found.calibrated().score
        if not len(self._probe_key()["row"]):
            return []

        def classifier(part: Labels) -> Arrays:
            return masking.probe(
                self.target.model, sample.pixels(part), sample.labels[part], budgets, seed=sample.seed
            )

        def detector(part: Labels) -> Arrays:
            return masking.probe_detector(
                self.target, sample.pixels(part), sample.labels[part], score, seed=sample.seed
            )

        probed = self._probed(MASKING, "masking checks", classifier, masking.PASSES, progress)
        aware = self._probed(
            MASKING_DETECTOR, "masking checks, detector", detector, masking.DETECTOR_PASSES, progress
        )
        finished = self.folder.finished
        return [
            *masking.checks(finished, probed, budgets),
            *masking.detector_checks(finished, aware, budgets, score),
        ]

    def _probed(
        self, file: str, name: str, piece: Callable[[Labels], Arrays], cost: int, progress: Progress
    ) -> Arrays:
        """What attacks of the checks' own found, kept in `file`."""
        probed, key, budgets = self._kept_probes(file), self._probe_key(), self._probe_budgets()
        if not probed:
            with self.folder.stages(
                file.removesuffix(".npz"), progress, budgets=sorted(budgets.items())
            ) as stages:
                probed = stages.run(name, key["row"], piece, cost=cost) | key
                self.folder.save(file, probed)
        return probed

    def _probe_budgets(self) -> dict[Norm, float]:
        return {norm: min(self.budgets.get(norm) or BUDGETS[norm]) for norm in NORMS}

    def _probe_key(self) -> Arrays:
        """What the masking checks' own attacks hang on: the budget by norm, and the rows they are run on."""
        count = PROBED_QUICK if self.quick else PROBED
        budgets = {f"budget-{norm}": np.array([value]) for norm, value in self._probe_budgets().items()}
        return budgets | {"row": np.flatnonzero(self.right)[:count]}

    def _kept_probes(self, file: str) -> Arrays:
        """What was probed before, of these images or more."""
        kept, key = self.folder.kept(file), self._probe_key()
        same = all(name in kept and np.array_equal(kept[name][: len(key[name])], key[name]) for name in key)
        return kept if same else {}

    # --- the audit of the radii

    def radii(self, progress: Progress) -> list[RadiusAudit]:
        """Radii against every attack of the run, and against attacks started inside them."""
        guard = self.target.guards[self.found.calibrated().score]
        rows = np.arange(len(self.sample))
        nearest = {norm: self._nearest(norm) for norm in NORMS}
        random: dict[Norm, OmegaTable] = {}
        for norm in NORMS:
            nearest[norm] = np.minimum(nearest[norm], self._aimed(norm, progress))
            if self._ablates:
                random[norm] = self._random_omega(norm, progress)
        parts = [
            guard.measure(self.sample.pixels(rows[at : at + PIECE])) for at in range(0, len(rows), PIECE)
        ]
        measured = Measurement.concatenate(parts)
        return audit.radii(self.target, self.found, measured, nearest, random=random or None)

    def _nearest(self, norm: Norm) -> Values:
        """Smallest distance (N,) at which any attack made an image wrong; inf: none."""
        nearest = np.full(len(self.sample), np.inf)
        for one in self.folder.all:
            reach = np.where(one.arrays["wrong"], one.arrays[norm], np.inf)
            np.minimum.at(nearest, one.arrays["row"], reach)
        return nearest

    def _aimed(self, norm: Norm, progress: Progress) -> Values:
        """Nearest of the attacks aimed at radii."""
        restarts = self._restarts
        guard = self.target.guards[self.found.calibrated().score]

        def piece(part: Labels) -> Arrays:
            images = self.sample.pixels(part)
            measured = guard.measure(images)
            seed = self.sample.piece_seed(f"radii {norm}", part)
            distance = audit.attacks_inside(
                self.target, self.found, images, measured, norm, restarts=restarts, seed=seed
            )
            return {"distance": distance}

        kept = self._kept_distance(norm)
        if not kept:
            with self.folder.stages(f"radii {norm}", progress, restarts=restarts) as stages:
                rows, cost = np.arange(len(self.sample)), audit.inside_passes(self._restarts)
                kept = stages.run(f"radii {norm}", rows, piece, cost=cost)
                kept |= {"restarts": np.array(restarts)}
                self.folder.save(f"radii-{norm}.npz", kept)
        return np.asarray(kept["distance"], np.float64)

    def _kept_distance(self, norm: Norm) -> Arrays:
        kept = self.folder.kept(f"radii-{norm}.npz", "distance", "restarts")
        return kept if kept and kept["restarts"] >= self._restarts else {}

    @property
    def _restarts(self) -> int:
        """Of the attacks that start inside radii; with `quick` there are none."""
        return 0 if self.quick else 2

    @property
    def _ablates(self) -> bool:
        """Whether omega is fitted to random perturbations too."""
        return self.sample.held_out and not self.quick

    def _random_fold(self) -> Labels:
        """Indices of the images that the ablation of omega is fitted to."""
        fold = data.folds(len(self.sample.dataset), self.found.calibrated().seed)["radii"]
        return np.random.default_rng([self.sample.seed, 3]).permutation(fold)[:RANDOM_OMEGA]

    def _kept_remainders(self, norm: Norm) -> Arrays:
        return self.folder.kept(f"omega-random-{norm}.npz", "radius", "remainder")

    def _random_omega(self, norm: Norm, progress: Progress) -> OmegaTable:
        name = f"random omega {norm}"

        def piece(part: Labels) -> Arrays:
            images = data.to_floats(self.sample.dataset.images[part])
            seed = self.sample.piece_seed(name, part)
            return audit.random_remainders(self.target.model, images, norm, seed=seed)

        kept = self._kept_remainders(norm)
        if not kept:
            with self.folder.stages(name, progress) as stages:
                kept = stages.run(name, self._random_fold(), piece, cost=audit.RANDOM_PASSES)
                self.folder.save(f"omega-random-{norm}.npz", kept)
        return audit.random_omega(kept)
