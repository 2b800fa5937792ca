"""What `benchmarks/service.py` compares with: the same classifier behind BentoML's own image endpoints.

`Bare` is the service that BentoML's documentation would have one write. `Batched` lets BentoML batch it, and
`BatchedGuard` does so with the guarded decision; both are there for the choice of our own batches.
"""

import json
import os
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import onnxruntime
from PIL import Image

from guard.decision import Guard
from guard.runtime import load_model, session_of

BUNDLE = Path(os.environ["GUARD_MODEL"])


class Classifier:
    """The bare model and its classes."""

    def __init__(self) -> None:
        self.session: onnxruntime.InferenceSession = session_of(load_model(BUNDLE / "model.onnx"))
        manifest = json.loads((BUNDLE / "manifest.json").read_text())
        self.names: list[str] = manifest["class_names"]
        self.size = (manifest["input"]["width"], manifest["input"]["height"])

    def array(self, image: Image.Image) -> np.ndarray:
        """A picture as (C, H, W) in [0, 1]."""
        pixels = np.asarray(image.convert("RGB").resize(self.size), np.float32) / np.float32(255)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def answers(self, images: list[Image.Image]) -> list[dict[str, object]]:
        """Class and probability of each picture."""
        batch = np.stack([self.array(image) for image in images])
        logits = self.session.run(["logits"], {"images": batch})[0]
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        return [
            {"label": int(p.argmax()), "class_name": self.names[p.argmax()], "probability": float(p.max())}
            for p in probabilities
        ]


@bentoml.service(name="bare")
class Bare:
    """One image per call."""

    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api  # type: ignore[untyped-decorator]
    def classify(self, image: Image.Image) -> dict[str, Any]:
        """Class and probability."""
        return self.classifier.answers([image])[0]


@bentoml.service(name="batched")
class Batched:
    """BentoML's adaptive batches of the bare classifier."""

    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=10_000)  # type: ignore[untyped-decorator]
    def classify(self, image: list[Image.Image]) -> list[dict[str, Any]]:
        """Classes and probabilities."""
        return self.classifier.answers(image)


@bentoml.service(name="batched-guard")
class BatchedGuard:
    """BentoML's adaptive batches of the guarded decision."""

    def __init__(self) -> None:
        self.classifier = Classifier()
        self.guard = Guard.from_bundle(BUNDLE)

    @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=10_000)  # type: ignore[untyped-decorator]
    def classify(self, image: list[Image.Image]) -> list[dict[str, Any]]:
        """Decisions."""
        batch = np.stack([self.classifier.array(each) for each in image])
        return [decision.model_dump(mode="json") for decision in self.guard.classify(batch)]
