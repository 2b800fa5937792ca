"""Adversarial twins of a bundle's clean samples, for its page: one that stops early, one that goes deep.

    python benchmarks/samples.py models/cifar10

For the first clean samples in `samples/`, adds a minimum-norm attack just past the decision boundary (what
the detector is made for) and a fixed-budget attack that maximizes the loss within l2 distance 1 (which hardly
any detector at 5% clean rejection stops). Pixels are rounded to 8 bits and must fool the model as files; the
notes say what the detector makes of them, whatever it is.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from guard import attacks, samples
from guard import bundle as bundles
from guard.data import to_floats
from guard.decision import Guard
from guard.files import atomic_folder, write_bytes
from guard.runtime import Detector
from guard.settings import Policy

EACH = 2
BUDGET = 1.0


def rounded(
    detector: Detector, image: NDArray[np.float32], attacked: NDArray[np.float32], label: int
) -> NDArray[np.uint8] | None:
    """The attacked image (1, C, H, W) as 8-bit pixels (H, W, C), stretched until it fools the model."""
    for stretch in np.arange(1.0, 3.0, 0.05):
        moved = np.clip(image + np.float32(stretch) * (attacked - image), 0, 1)
        pixels: NDArray[np.uint8] = np.rint(255 * moved[0].transpose(1, 2, 0)).astype(np.uint8)
        if int(detector.logits(to_floats(pixels[None])).argmax()) != label:
            return pixels
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    given = parser.parse_args()
    guard = Guard.from_bundle(given.bundle, policy=Policy())
    bundle, detector = guard.bundle, guard.detector
    clean = [sample for sample in samples.load(bundle.path) if sample.kind == "clean"]
    names = bundle.manifest.class_names
    found: list[samples.Sample] = []
    pictures: dict[str, NDArray[np.uint8]] = {}
    for number, sample in enumerate(clean[: 2 * EACH]):
        picture = np.asarray(Image.open(bundle.path / samples.FOLDER / sample.file).convert("RGB"))
        image = to_floats(picture[None])
        labels = detector.logits(image).argmax(axis=1).astype(np.int64)
        if number < EACH:
            kind, attack = "near", "Minimum-norm attack"
            result = attacks.nearest(detector, image, labels, norm="l2", clip=True)
        else:
            kind, attack = "deep", f"Attack that maximizes the loss within l2 distance {BUDGET:g}"
            result = attacks.pgd(detector, image, labels, BUDGET, norm="l2", steps=50, clip=True, stop=False)
        pixels = rounded(detector, image, result.images, int(labels[0]))
        if pixels is None:
            raise SystemExit(f"{sample.file}: no 8-bit picture fools the model; choose another sample.")
        attacked = to_floats(pixels[None])
        distance = float(np.linalg.norm(attacked - image))
        measured = guard.measure(attacked)
        answer = names[int(measured.labels[0])]
        verdict = "accepts" if guard.ratios(measured)[0] <= 1 else "rejects"
        stem = Path(sample.file).stem
        pictures[f"{stem}-{kind}.png"] = pixels
        note = (
            f"{attack} on {sample.title}: l2 distance {distance:.2f} once rounded to 8 bits, the model says "
            f"{answer}, the detector {verdict} it."
        )
        found.append(
            samples.Sample(
                file=f"{stem}-{kind}.png", title=f"{sample.title}, {kind}", note=note, kind="adversarial"
            )
        )
        print(note)
    with atomic_folder(bundle.path, keep=True) as folder:
        for name, pixels in pictures.items():
            Image.fromarray(pixels).save(folder / samples.FOLDER / name)
        write_bytes(folder / samples.FOLDER / samples.INDEX, samples.dump([*clean, *found]))
        bundles.seal(folder, bundle.manifest)


if __name__ == "__main__":
    main()
