"""How the rules of differentiation are tested: one operator in a model of its own, pulled back, judged twice.

In float64, in onnx's reference evaluator, against central differences of the operator itself; in float32, in
onnxruntime, against that float64 gradient, at batch sizes other than those the builder probed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from guard.autodiff import Graph, pullback
from guard.graph import Provider
from tests.reference import reference

Array = NDArray[Any]
STEP = 1e-5


@dataclass(frozen=True)
class Case:
    """One operator: shapes of the inputs to differentiate (without the batch axis), constants, attributes.

    `low`, `high` bound the random inputs. A constant has its position in the node's inputs as key. Where the
    gradient is a difference of terms as large as the cotangent, which may leave next to nothing, `cancels`
    relates float32's error to no less than a hundredth of the cotangent.
    """

    op_type: str
    shapes: Sequence[tuple[int, ...]]
    constants: Mapping[int, Array] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 20
    outputs: int = 1
    used: int = 0  # which output is differentiated
    low: float = -2.0
    high: float = 2.0
    domain: str = ""
    label: str = ""
    cancels: bool = False

    def __str__(self) -> str:
        parts = [f"{k}={v}" for k, v in self.attributes.items()]
        parts += [f"{k}:{v.tolist() if v.size < 9 else v.shape}" for k, v in self.constants.items()]
        return self.label or f"{self.op_type}{self.opset}-{'x'.join(map(str, self.shapes))}-{','.join(parts)}"


def model_of(case: Case) -> onnx.ModelProto:
    """The operator alone: inputs x0, x1, ..., output y with a leading batch axis."""
    names: list[str] = []
    initializers, remaining = [], [f"x{i}" for i in range(len(case.shapes))]
    last = max([len(case.shapes) + len(case.constants) - 1, *case.constants])
    for position in range(last + 1):
        if position in case.constants:
            names.append(f"c{position}")
            initializers.append(numpy_helper.from_array(np.asarray(case.constants[position]), names[-1]))
        else:
            names.append(remaining.pop(0) if remaining else "")
    while not names[-1]:
        names.pop()
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op_type, names, outputs, domain=case.domain, **case.attributes)
    inputs = [
        helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["batch", *shape])
        for i, shape in enumerate(case.shapes)
    ]
    output = onnx.ValueInfoProto(name=f"y{case.used}")
    output.type.tensor_type.elem_type = TensorProto.FLOAT
    graph = helper.make_graph([node], case.op_type, inputs, [output], initializers)
    opsets = [helper.make_opsetid("", case.opset)]
    if case.domain:
        opsets.append(helper.make_opsetid(case.domain, 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def gradient_model(model: onnx.ModelProto, *, provider: Provider = "cpu") -> onnx.ModelProto:
    """Pulls an input called `cotangent` back from the model's output to every input; outputs g0, g1, ..."""
    graph = Graph(model, provider=provider)
    names, (output,) = list(graph.inputs), graph.outputs
    shape = graph.shape(output)
    cotangent = graph.input("cotangent", ["batch" if d is None else d for d in shape])
    gradients = {f"g{i}": pullback(graph, output, cotangent, name) for i, name in enumerate(names)}
    return graph.build(outputs={"y": output, **gradients})


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """onnxruntime on CPU with all its optimizations, as served."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def relative_error(actual: Array, expected: Array, least: float = 1e-6) -> float:
    """Largest deviation over the largest magnitude (or over `least`, if all is smaller)."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape}, expected {expected.shape}")
    if not expected.size:
        return 0.0
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), least))


def check(case: Case, *, seed: int = 0, provider: Provider = "cpu") -> None:
    """Judges the gradients of one operator; see the module's description."""
    random = np.random.default_rng(seed)
    model = model_of(case)
    gradients = gradient_model(model, provider=provider)
    onnx.checker.check_model(gradients)
    prepared = Graph(model)
    original, served = session(model), session(gradients)
    forward, backward = reference(prepared.build(prepared.outputs)), reference(gradients)
    for batch in (1, 3):
        feeds = {f"x{i}": _spread(random, (batch, *shape), case) for i, shape in enumerate(case.shapes)}
        singles = {name: x.astype(np.float32) for name, x in feeds.items()}
        (original_y,) = original.run(None, singles)
        v = random.standard_normal(original_y.shape).astype(np.float32).astype(np.float64)
        _, *exact = backward({**feeds, "cotangent": v})
        least = 0.01 * float(np.abs(v).max(initial=0.0)) if case.cancels else 1e-6
        y, *actual = served.run(None, {**singles, "cotangent": v.astype(np.float32)})
        np.testing.assert_allclose(y, original_y, rtol=1e-5, atol=1e-6)
        assert relative_error(y, forward(feeds)[0]) < 1e-5
        for name, single, gradient in zip(feeds, actual, exact, strict=True):
            assert gradient.shape == feeds[name].shape
            assert single.dtype == np.float32
            assert relative_error(single, gradient, least) < 2e-5, f"{name} in float32"
            for _ in range(3):
                direction = random.standard_normal(gradient.shape)
                ahead, behind = (
                    forward({**feeds, name: feeds[name] + step * direction})[0] for step in (STEP, -STEP)
                )
                slope = float(((ahead - behind) * v).sum() / (2 * STEP))
                terms = gradient * direction
                assert abs(float(terms.sum()) - slope) < 1e-6 * (float(np.abs(terms).sum()) + 1e-3), name


def _spread(random: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
    """Inputs exact in float32, no two closer than a difference step reaches, in random order."""
    size = int(np.prod(shape))
    places = random.permutation(size) + random.uniform(0.25, 0.75)
    values: Array = case.low + places * (case.high - case.low) / max(size, 1)
    return values.reshape(shape).astype(np.float32).astype(np.float64)
