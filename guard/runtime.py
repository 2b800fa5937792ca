"""Running guarded graphs in onnxruntime: one pass gives prediction, margins, gradient norms, Jacobian norm.

`Detector.measure` computes what decides as the full Jacobian would: the rows of the two top classes come with
the forward pass; every other row i is at most p_i G long (as far as G, which is fitted, holds), so only rows
with p_i G above the threshold are computed, for the images they could still reject.
"""

import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from guard import guarded
from guard.autodiff import check_differentiable
from guard.errors import DataError, ModelError
from guard.graph import Provider
from guard.guarded import Loss, Score
from guard.norms import Norm

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Element = TypeVar("Element", bound=np.generic)
Piece = TypeVar("Piece")
Result = TypeVar("Result")

CHUNK: dict[Provider, int] = {"cpu": 32, "cuda": 256}
"""Most images in one onnxruntime call: more are not faster."""

CHUNK_PIXELS: dict[Provider, int] = {"cpu": 8 * 224**2, "cuda": 64 * 224**2}
"""Most pixels in one onnxruntime call, which bounds memory."""

ORT_PROVIDERS: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Measurement:
    """What the guarded graph says about a batch of B images; every array runs over the batch.

    `margin` is z_c - z_r of predicted class c and runner-up r, `gradient_l2`, `gradient_l1` the norms of its
    gradient, `probability_gradient_*` those of the gradient of p_c - p_r, `jacobian` the longest Jacobian row
    computed (max_i ||∇p_i||_2 where decided alike, LIPGEN 7.1), `rows` the number of rows computed. What the
    score did not need is NaN. Gradients are per unit of pixel value ([0, 1] scale).
    """

    logits: Float32
    probabilities: Float32
    margin: Float32
    gradient_l2: Float32
    gradient_l1: Float32
    probability_gradient_l2: Float32
    probability_gradient_l1: Float32
    jacobian: Float32
    rows: Int64

    @property
    def labels(self) -> Int64:
        """The predicted class of each image, (B,)."""
        labels: Int64 = self.logits.argmax(axis=1)
        return labels

    @property
    def finite(self) -> NDArray[np.bool_]:
        """Whether all that a decision rests on are numbers, (B,)."""
        numbers = np.column_stack([self.logits, self.margin, self.gradient_l2, self.gradient_l1])
        return np.asarray(np.isfinite(numbers).all(axis=1), np.bool_)

    def slope(self, norm: Norm) -> Float64:
        """The dual norm of the margin's gradient, (B,)."""
        return (self.gradient_l2 if norm == "l2" else self.gradient_l1).astype(np.float64)

    @staticmethod
    def concatenate(parts: list["Measurement"]) -> "Measurement":
        """One measurement from those of consecutive batches."""
        return Measurement(
            *(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Measurement))
        )

    def __getitem__(self, index: slice | NDArray[np.intp] | NDArray[np.bool_]) -> "Measurement":
        return Measurement(*(getattr(self, f.name)[index] for f in fields(Measurement)))

    def __len__(self) -> int:
        return len(self.margin)


def score_of(measurement: Measurement, name: Score) -> Float64:
    """The score (B,) of each image; larger is more suspicious, and NaN must be rejected.

    `jacobian`, `jacobian-full`: ||∇p||_{2,∞}, per unit of pixel value. `radius`: ||∇M||₂ / M, the inverse of
    the first-order radius (1 / pixels). `margin-gradient`: the gradient norm of the margin between the
    softmax probabilities of the two top classes alone, tanh(M/2), that is 2σ(M)σ(-M)||∇M||₂, which needs a
    single row and for two classes equals ||∇(p_c - p_r)||₂. `combined` has no score without its calibration:
    see `guard.decision`.
    """
    margin = measurement.margin.astype(np.float64)
    gradient = measurement.gradient_l2.astype(np.float64)
    if name in ("jacobian", "jacobian-full"):
        return measurement.jacobian.astype(np.float64)
    if name == "radius":
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse: Float64 = np.where(margin > 0, gradient / margin, np.inf)
        return np.where(np.isnan(margin + gradient), np.nan, inverse)
    if name == "margin-gradient":
        return np.asarray(gradient / (1 + np.cosh(np.minimum(margin, 700.0))), np.float64)
    raise ValueError(f"score {name!r} is not a function of one measurement")


class Detector:
    """A classifier, its guarded graph and its gradients, in onnxruntime. Safe to call from several threads.

    `provider` "auto" takes CUDA where it truly loads, else CPU, and says so in the log; "cuda" raises
    `ModelError` where it does not load. `threads` are used on CPU (0: one per core), `chunk` is the largest
    batch of one onnxruntime call (by default what `CHUNK` and `CHUNK_PIXELS` allow): larger batches are
    split, so memory stays bounded. Raises `UnsupportedOperatorError` or `ModelError` for a model that cannot
    be differentiated.
    """

    def __init__(
        self,
        model: onnx.ModelProto | str | Path,
        *,
        score: Score = "jacobian",
        provider: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int = 0,
        chunk: int | None = None,
    ) -> None:
        self.model = model if isinstance(model, onnx.ModelProto) else load_model(model)
        self.score: Score = score
        self.threads = threads
        check_differentiable(self.model, guarded.IMAGES, guarded.LOGITS)
        self.provider: Provider = (
            "cpu" if provider == "cpu" else self._cuda_or_cpu(required=provider == "cuda")
        )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}; expected at least 1")
        self._lock = threading.Lock()
        self._sessions: dict[str, ort.InferenceSession] = {}
        session = self._guarded()
        shape = {i.name: i.shape for i in session.get_inputs()}[guarded.IMAGES]
        self.input_shape: tuple[int, int, int] = (int(shape[1]), int(shape[2]), int(shape[3]))
        self.num_classes: int = int({o.name: o.shape for o in session.get_outputs()}[guarded.LOGITS][1])
        fitting = CHUNK_PIXELS[self.provider] // (self.input_shape[1] * self.input_shape[2])
        self.chunk = chunk or max(1, min(CHUNK[self.provider], fitting))

    def measure(
        self, images: Float32, *, threshold: float | None = None, row_bound: float | None = None
    ) -> Measurement:
        """One guarded pass over images (B, C, H, W) in [0, 1].

        With `threshold` t and `row_bound` G (an estimate of max_i ||u_i||, fitted at calibration), rows
        beyond the first two are computed where p_i G > t could still reject an image; without, two rows
        stand (all of them with `jacobian-full`). An image with a pixel that is NaN or infinite measures NaN
        throughout. Raises `DataError` for images of another shape.
        """
        chunks = self._chunks(images)
        return Measurement.concatenate([self._measure(chunk, threshold, row_bound) for chunk in chunks])

    def logits(self, images: Float32) -> Float32:
        """Logits (B, K) of the bare classifier."""
        session = self._session("forward", lambda: self.model)
        run = partial(session.run, [guarded.LOGITS])
        return np.concatenate([run({guarded.IMAGES: chunk})[0] for chunk in self._chunks(images)])

    def vjp(self, images: Float32, cotangents: Float32) -> tuple[Float32, Float32]:
        """Logits (B, K) and gradient (B, C, H, W) of Σ_k cotangents[k] z_k(x), per image, from one pass."""
        session = self._session("vjp", lambda: guarded.vjp_model(self.model, provider=self.provider))
        rows = np.ascontiguousarray(cotangents, np.float32)
        run = partial(session.run, [guarded.LOGITS, "gradient"])
        pieces = zip(self._chunks(images), _split(rows, self.chunk), strict=True)
        outputs = [run({guarded.IMAGES: x, guarded.COTANGENTS: v}) for x, v in pieces]
        logits, gradients = (np.concatenate(column) for column in zip(*outputs, strict=True))
        return logits, gradients

    def loss_gradient(
        self, images: Float32, labels: Int64, loss: Loss = "margin"
    ) -> tuple[Float32, Float32, Float32]:
        """Logits (B, K), loss (B,) and its input gradient (B, C, H, W), all from one pass.

        `margin`: max_{i≠y} z_i - z_y, positive once the prediction is no longer y. `cross-entropy`: -log p_y.
        `probability-margin`: the margin on probabilities.
        """
        session = self._session(loss, lambda: guarded.loss_model(self.model, loss, provider=self.provider))
        run = partial(session.run, [guarded.LOGITS, "loss", "gradient"])
        pieces = zip(self._chunks(images), _split(np.asarray(labels, np.int64), self.chunk), strict=True)
        outputs = [run({guarded.IMAGES: x, guarded.LABELS: y}) for x, y in pieces]
        logits, losses, gradients = (np.concatenate(column) for column in zip(*outputs, strict=True))
        return logits, losses, gradients

    def row_norms(self, images: Float32, probabilities: Float32, index: Int64) -> Float32:
        """Lengths (B,) of one Jacobian row ∇p_i per image, i = index (B,), by vector-Jacobian products."""
        rows = -probabilities.astype(np.float32)
        picked = np.arange(len(index)), index
        rows[picked] += 1
        gradients = self.vjp(images, rows)[1]
        lengths = np.linalg.norm(gradients.reshape(len(index), -1), axis=1)
        return np.asarray(lengths * probabilities[picked], np.float32)

    def _measure(self, images: Float32, threshold: float | None, row_bound: float | None) -> Measurement:
        session = self._guarded()
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(names, {guarded.IMAGES: images}), strict=True))
        # Max pooling passes NaN by, so that what follows would look sound.
        broken = ~np.isfinite(images).all(axis=(1, 2, 3))
        for values in found.values():
            values[broken] = np.nan
        missing = np.full(len(images), np.nan, np.float32)
        known = {f.name: found.get(f.name, missing) for f in fields(Measurement) if f.name != "rows"}
        one_row, unrolled = self.score == "margin-gradient", self.num_classes <= guarded.UNROLLED_CLASSES
        every_row = self.score == "jacobian-full" and not unrolled
        rows = 1 if one_row else self.num_classes if self.score == "jacobian-full" and unrolled else 2
        measured = Measurement(**known, rows=np.full(len(images), rows, np.int64))
        if every_row:
            return self._with_rows(images, measured, np.ones_like(measured.logits, bool))
        if one_row or threshold is None or row_bound is None:
            return measured
        undecided = measured.jacobian <= threshold
        reachable = measured.probabilities.astype(np.float64) * row_bound > threshold
        return self._with_rows(images, measured, reachable & undecided[:, None])

    def _with_rows(self, images: Float32, measured: Measurement, wanted: NDArray[np.bool_]) -> Measurement:
        # the graph's own two: of equal logits, the first
        known = np.argsort(-measured.logits, axis=1, kind="stable")[:, :2]
        np.put_along_axis(wanted, known, values=False, axis=1)
        image, row = np.nonzero(wanted)
        if not len(image):
            return measured
        jacobian = measured.jacobian.copy()
        for at in _split(np.arange(len(image)), self.chunk):
            lengths = self.row_norms(images[image[at]], measured.probabilities[image[at]], row[at])
            np.maximum.at(jacobian, image[at], lengths)
        values = {f.name: getattr(measured, f.name) for f in fields(Measurement)}
        return Measurement(**values | {"jacobian": jacobian, "rows": measured.rows + wanted.sum(axis=1)})

    def _guarded(self) -> ort.InferenceSession:
        return self._session(
            "guarded", lambda: guarded.guarded_model(self.model, self.score, provider=self.provider)
        )

    def _session(self, key: str, make: Callable[[], onnx.ModelProto]) -> ort.InferenceSession:
        found = self._sessions.get(key)
        if found is not None:  # without waiting for others that are being built
            return found
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = session_of(make(), provider=self.provider, threads=self.threads)
            return self._sessions[key]

    def _chunks(self, images: Float32) -> Iterator[Float32]:
        expected = getattr(self, "input_shape", images.shape[1:])
        if images.ndim != 4 or images.shape[1:] != expected or not len(images):
            raise DataError(
                f"images have shape {images.shape}; expected (B, {', '.join(map(str, expected))}) with B >= 1"
            )
        return _split(np.ascontiguousarray(images, np.float32), self.chunk)

    def _cuda_or_cpu(self, *, required: bool) -> Provider:
        if ORT_PROVIDERS["cuda"] in ort.get_available_providers():
            # The wheel lists CUDA wherever it is installed, and reports at length that it cannot load it.
            ort.set_default_logger_severity(4)
            # CUDA and cuDNN from a package registry lie where the system's loader does not look. What cannot
            # be loaded is printed; whether the provider works is seen below.
            with redirect_stdout(io.StringIO()):
                ort.preload_dlls()
            session = session_of(self.model, provider="cuda", threads=self.threads)
            ort.set_default_logger_severity(2)
            if session.get_providers()[0] == ORT_PROVIDERS["cuda"]:
                log.info("running on CUDA")
                return "cuda"
            reason = "onnxruntime has a CUDA provider, but it does not load here"
        else:
            reason = "this onnxruntime has no CUDA provider"
        if required:
            raise ModelError(
                f"provider cuda: {reason}. Install onnxruntime-gpu with its CUDA and cuDNN, or use cpu."
            )
        log.info("running on CPU: %s", reason)
        return "cpu"


def load_model(path: str | Path) -> onnx.ModelProto:
    """An ONNX model from its file; raises `ModelError` where it is not one."""
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf and OS errors alike: whatever keeps the file from being read
        raise ModelError(f"{path}: not a readable ONNX model ({error})") from error


def session_of(
    model: onnx.ModelProto, *, provider: Provider = "cpu", threads: int = 0
) -> ort.InferenceSession:
    """An onnxruntime session. Worker threads do not spin, so idle sessions leave the cores to the others."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = [ORT_PROVIDERS["cpu"]] if provider == "cpu" else [ORT_PROVIDERS["cuda"], ORT_PROVIDERS["cpu"]]
    return ort.InferenceSession(model.SerializeToString(), options, providers=providers)


def _split(array: NDArray[Element], size: int) -> Iterator[NDArray[Element]]:
    return (array[start : start + size] for start in range(0, len(array), size))
