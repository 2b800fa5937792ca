"""The guarded graph: a bare classifier plus the backward passes that its scores and radii need.

Everything is built from `model.onnx` when it is loaded. With logits z, probabilities p = softmax(z),
predicted class c and runner-up r, the row of cotangent e_i - p is u_i = ∇z_i - Σ_j p_j ∇z_j, and

    ∇p_i = p_i u_i                      the rows of the Jacobian of the probabilities
    ∇(z_c - z_r) = u_c - u_r            gradient of the logit margin
    ∇(p_c - p_r) = p_c u_c - p_r u_r    gradient of the probability margin

so two backward rows give both margins' gradients and the Jacobian rows of the two top classes, as a rule the
longest; `guard.runtime` computes further rows that could matter. Rows are taken in logit space, where no
digits are lost to tiny probabilities.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import onnx

from guard.autodiff import Graph, pullback
from guard.errors import ModelError
from guard.graph import Provider

GRAPH_VERSION = 2
"""Raised whenever a change could alter a score or a gradient norm: calibrations name the one they used."""

Score = Literal["jacobian", "combined", "radius", "margin-gradient", "jacobian-full"]
Loss = Literal["margin", "cross-entropy", "probability-margin"]

UNROLLED_CLASSES = 32
"""Up to this many classes `jacobian-full` is one graph; above it the runtime computes the rows in turn."""

IMAGES = "images"
LOGITS = "logits"
LABELS = "labels"
COTANGENTS = "cotangents"


def guarded_model(model: onnx.ModelProto, score: Score, *, provider: Provider = "cpu") -> onnx.ModelProto:
    """The guarded graph of a classifier for one score.

    Input `images` (B, C, H, W). Outputs, over the batch: `logits` and `probabilities` (B, K); `margin` (B,)
    the logit margin; `gradient_l2` and `gradient_l1` (B,) the norms of its gradient; `jacobian` (B,) the
    longest of the Jacobian rows of the two top classes (of all rows with `jacobian-full` and at most
    `UNROLLED_CLASSES` classes); `probability_gradient_l2` and `probability_gradient_l1` (B,) the norms of the
    probability margin's gradient. With `margin-gradient`, which computes one row, the last three are left
    out. Raises `ModelError` for a model that is no such classifier or cannot be differentiated.
    """
    graph = Graph(model, provider=provider)
    classes = number_of_classes(graph)
    probabilities = graph.op("Softmax", LOGITS, axis=-1)
    top, order = graph.op("TopK", LOGITS, graph.constant(np.array([2], np.int64)), outputs=2, axis=-1)
    predicted, runner_up = (_one_hot(graph, _column(graph, order, i), classes) for i in (0, 1))
    outputs = {
        LOGITS: LOGITS,
        "probabilities": probabilities,
        "margin": graph.op("Sub", _column(graph, top, 0), _column(graph, top, 1)),
    }

    def row(cotangent: str) -> str:
        return pullback(graph, LOGITS, cotangent, IMAGES)

    if score == "margin-gradient":
        margin_gradient = row(graph.op("Sub", predicted, runner_up))
    else:
        p_predicted = _dot(graph, probabilities, predicted)
        p_runner_up = _dot(graph, probabilities, runner_up)
        if score == "jacobian-full" and classes <= UNROLLED_CLASSES:
            identity = np.eye(classes, dtype=np.float32)
            rows = [row(graph.op("Sub", graph.constant(e[None]), probabilities)) for e in identity]
            u_predicted = _combination(graph, rows, predicted)
            u_runner_up = _combination(graph, rows, runner_up)
            lengths = [
                graph.op("Mul", _l2(graph, u), _column(graph, probabilities, i)) for i, u in enumerate(rows)
            ]
        else:
            u_predicted = row(graph.op("Sub", predicted, probabilities))
            u_runner_up = row(graph.op("Sub", runner_up, probabilities))
            lengths = [
                graph.op("Mul", _l2(graph, u_predicted), p_predicted),
                graph.op("Mul", _l2(graph, u_runner_up), p_runner_up),
            ]
        margin_gradient = graph.op("Sub", u_predicted, u_runner_up)
        probability_gradient = graph.op(
            "Sub",
            graph.op("Mul", u_predicted, _per_image(graph, p_predicted)),
            graph.op("Mul", u_runner_up, _per_image(graph, p_runner_up)),
        )
        outputs |= {
            "jacobian": graph.op("Max", *lengths),
            "probability_gradient_l2": _l2(graph, probability_gradient),
            "probability_gradient_l1": _l1(graph, probability_gradient),
        }
    outputs |= {
        "gradient_l2": _l2(graph, margin_gradient),
        "gradient_l1": _l1(graph, margin_gradient),
    }
    return graph.build(outputs=outputs)


def vjp_model(model: onnx.ModelProto, *, provider: Provider = "cpu") -> onnx.ModelProto:
    """Vector-Jacobian product: `images` (B, C, H, W), `cotangents` (B, K) → `logits` (B, K), `gradient`."""
    graph = Graph(model, provider=provider)
    classes = number_of_classes(graph)
    cotangents = graph.input(COTANGENTS, ("batch", classes))
    return graph.build(outputs={LOGITS: LOGITS, "gradient": pullback(graph, LOGITS, cotangents, IMAGES)})


def loss_model(model: onnx.ModelProto, loss: Loss, *, provider: Provider = "cpu") -> onnx.ModelProto:
    """A loss and its input gradient: `images`, `labels` (B,) int64 → `logits`, `loss` (B,), `gradient`.

    `margin` is max_{i≠y} z_i - z_y, `probability-margin` the same on probabilities (SCALE 2.1, the modified
    Carlini-Wagner loss), `cross-entropy` is -log p_y. Ascent on each leads away from the label y, and their
    gradients keep their direction as long as float32 can hold the other probabilities.
    """
    graph = Graph(model, provider=provider)
    classes = number_of_classes(graph)
    label = _one_hot(graph, graph.input(LABELS, ("batch",), np.int64), classes)
    make: dict[Loss, Callable[[Graph, str, int], tuple[str, str]]] = {
        "margin": _margin_loss,
        "cross-entropy": _cross_entropy,
        "probability-margin": _probability_margin_loss,
    }
    value, cotangent = make[loss](graph, label, classes)
    return graph.build(
        outputs={LOGITS: LOGITS, "loss": value, "gradient": pullback(graph, LOGITS, cotangent, IMAGES)}
    )


def number_of_classes(graph: Graph) -> int:
    """K of a graph with input `images` (B, C, H, W) and output `logits` (B, K), K >= 2.

    Raises `ModelError` for any other graph.
    """
    if graph.inputs == [IMAGES] and LOGITS in graph.outputs:
        images, logits = graph.shape(IMAGES), graph.shape(LOGITS)
        if len(images) == 4 and len(logits) == 2 and logits[1] is not None and logits[1] > 1:
            return logits[1]
        found = f"images {images} and logits {logits}"
    else:
        found = f"inputs {', '.join(graph.inputs)} and outputs {', '.join(graph.outputs)}"
    raise ModelError(
        f"the model has {found}: expected images (B, C, H, W) and logits (B, K) with K >= 2. Make a bundle "
        "of it by `guard wrap`."
    )


def _margin_loss(graph: Graph, label: str, classes: int) -> tuple[str, str]:
    rival = _one_hot(graph, _argmax_without(graph, label), classes)
    difference = graph.op("Sub", rival, label)
    return _dot(graph, LOGITS, difference), difference


def _cross_entropy(graph: Graph, label: str, classes: int) -> tuple[str, str]:
    log_probabilities = graph.op("LogSoftmax", LOGITS, axis=-1)
    probabilities = graph.op("Softmax", LOGITS, axis=-1)
    value = graph.op("Neg", _dot(graph, log_probabilities, label))
    # Near p_y = 1 float32 has few digits of the logarithm, and none from a margin of 17 on. With s the sum of
    # the other probabilities it is -log(1 - s) = s + s²/2 + ...
    one, half, small = (graph.constant(np.array(number, np.float32)) for number in (1, 0.5, 1e-3))
    others = _dot(graph, probabilities, graph.op("Sub", one, label))
    series = graph.op("Add", others, graph.op("Mul", half, graph.op("Mul", others, others)))
    value = graph.op("Where", graph.op("Less", others, small), series, value)
    return value, _balanced(graph, graph.op("Sub", probabilities, label), classes)


def _probability_margin_loss(graph: Graph, label: str, classes: int) -> tuple[str, str]:
    rival = _one_hot(graph, _argmax_without(graph, label), classes)
    probabilities = graph.op("Softmax", LOGITS, axis=-1)
    difference = graph.op("Sub", rival, label)
    value = _dot(graph, probabilities, difference)
    # Softmax pulled back: p * (a - <a, p>) for the cotangent a = e_rival - e_label.
    centred = graph.op("Sub", difference, graph.op("Unsqueeze", value, _axes(graph, -1)))
    return value, _balanced(graph, graph.op("Mul", probabilities, centred), classes)


def _balanced(graph: Graph, cotangent: str, classes: int) -> str:
    """A cotangent (B, K) whose entries sum to 0, that of the most probable class computed from the others.

    On its own it is a difference from 1, which float32 loses from a margin of 17 on, while the others, and
    with them the gradient's direction, keep their digits down to probabilities of 1e-38.
    """
    top = _one_hot(graph, graph.op("ArgMax", LOGITS, axis=-1, keepdims=0), classes)
    others = graph.op("Sub", cotangent, graph.op("Mul", cotangent, top))
    rest = graph.op("ReduceSum", others, _axes(graph, -1), keepdims=1)
    return graph.op("Sub", others, graph.op("Mul", top, rest))


def _argmax_without(graph: Graph, label: str) -> str:
    excluded = graph.op("Mul", label, graph.constant(np.array(3e38, np.float32)))
    others = graph.op("Sub", graph.op("Min", LOGITS, graph.constant(np.array(1e37, np.float32))), excluded)
    return graph.op("ArgMax", others, axis=-1, keepdims=0)


def _axes(graph: Graph, *axes: int) -> str:
    return graph.constant(np.array(axes, np.int64))


def _column(graph: Graph, matrix: str, i: int) -> str:
    return graph.op("Gather", matrix, graph.constant(np.array(i, np.int64)), axis=1)


def _one_hot(graph: Graph, indices: str, classes: int) -> str:
    depth = graph.constant(np.array([classes], np.int64))
    return graph.op("OneHot", indices, depth, graph.constant(np.array([0, 1], np.float32)), axis=-1)


def _dot(graph: Graph, left: str, right: str) -> str:
    return graph.op("ReduceSum", graph.op("Mul", left, right), _axes(graph, -1), keepdims=0)


def _per_image(graph: Graph, values: str) -> str:
    return graph.op("Unsqueeze", values, _axes(graph, 1, 2, 3))


def _l2(graph: Graph, gradient: str) -> str:
    square = graph.op("Mul", gradient, gradient)
    return graph.op("Sqrt", graph.op("ReduceSum", square, _axes(graph, 1, 2, 3), keepdims=0))


def _l1(graph: Graph, gradient: str) -> str:
    return graph.op("ReduceSum", graph.op("Abs", gradient), _axes(graph, 1, 2, 3), keepdims=0)


def _combination(graph: Graph, rows: list[str], weights: str) -> str:
    terms = [graph.op("Mul", u, _per_image(graph, _column(graph, weights, i))) for i, u in enumerate(rows)]
    return graph.op("Sum", *terms)
