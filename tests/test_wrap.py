import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from guard import bundle as bundles
from guard.adapt import SMALLEST_PROBABILITY, Outside
from guard.errors import BundleError, DataError, ModelError, UnsupportedOperatorError, UsageError
from guard.guarded import guarded_model, loss_model, vjp_model
from guard.runtime import Detector
from guard.wrap import preprocessing, read_classes, read_model, wrap, wrap_model
from tests.networks import convolutional

CLASSES = 4
Array = NDArray[Any]


def network(
    *,
    batch: int | str = "n",
    layout: str = "nchw",
    sides: tuple[int | str, int | str] = (8, 8),
    channels: int = 3,
    flatten: Sequence[int] | None = None,
    tail: Sequence[NodeProto] = (),
    head: Sequence[NodeProto] = (),
    constants: dict[str, Array] | None = None,
    dtype: int = TensorProto.FLOAT,
    names: tuple[str, str] = ("input", "output"),
    opset: int = 18,
    classes: int = CLASSES,
) -> onnx.ModelProto:
    """A convolution, ReLU, global average and linear layer, with a `head` before and a `tail` behind.

    `head` leads from the input to `x`, `tail` from `scores` to the output; `flatten` is a Reshape target
    in place of Flatten.
    """
    rng = np.random.default_rng(1)
    weights: dict[str, Array] = {
        "w": rng.normal(size=(6, channels, 3, 3)).astype(np.float32),
        "fc": rng.normal(size=(classes, 6)).astype(np.float32),
        "bias": rng.normal(size=classes).astype(np.float32),
    }
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    if kind != np.uint8:
        weights = {name: value.astype(kind) for name, value in weights.items()}
    weights |= constants or {}
    before = "input"
    nodes = list(head)
    if head:
        before = "x"
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [before], ["planes"], perm=[0, 3, 1, 2]))
        before = "planes"
    nodes += [
        helper.make_node("Conv", [before, "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["pooled"]),
    ]
    if flatten is None:
        nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    else:
        weights["target"] = np.array(flatten, np.int64)
        nodes.append(helper.make_node("Reshape", ["pooled", "target"], ["flat"]))
    last = "scores" if tail else "output"
    nodes.append(helper.make_node("Gemm", ["flat", "fc", "bias"], [last], transB=1))
    nodes += tail
    renamed = dict(zip(("input", "output"), names, strict=True))
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    image = [channels, *sides] if layout == "nchw" else [*sides, channels]
    out_kind = TensorProto.FLOAT if dtype == TensorProto.UINT8 else dtype
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(names[0], dtype, [batch, *image])],
        [helper.make_tensor_value_info(names[1], out_kind, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def guarded_names() -> list[str]:
    """The inputs and outputs of everything that is built around a bundle's model."""
    around = convolutional()
    built = [guarded_model(around, "jacobian"), vjp_model(around), loss_model(around, "margin")]
    return sorted({value.name for model in built for value in (*model.graph.input, *model.graph.output)})


def images(count: int, shape: tuple[int, int, int] = (3, 8, 8)) -> NDArray[np.float32]:
    return np.random.default_rng(3).random((count, *shape), dtype=np.float32)


def run(model: onnx.ModelProto, feed: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {session.get_inputs()[0].name: feed})[0]
    return result


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Array = powers / powers.sum(axis=-1, keepdims=True)
    return result


def check_form(model: onnx.ModelProto, shape: tuple[int, int, int] = (3, 8, 8)) -> None:
    """The form of a bundle's model, down to what another runtime reads."""
    onnx.checker.check_model(model, full_check=True)
    (given,), (result,) = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("images", "logits")
    assert given.type.tensor_type.elem_type == result.type.tensor_type.elem_type == TensorProto.FLOAT
    dims = given.type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert tuple(dim.dim_value for dim in dims[1:]) == shape
    assert model.opset_import[0].version >= 17


def test_a_plain_classifier_keeps_its_logits() -> None:
    wrapped = wrap_model(network(), Outside())
    check_form(wrapped.model)
    x = images(5)
    np.testing.assert_allclose(run(wrapped.model, x), run(network(), x), rtol=1e-6)
    assert wrapped.num_classes == CLASSES
    assert wrapped.outputs == "logits"
    assert wrapped.form.batch is None
    assert wrapped.difference < 1e-4


@pytest.mark.parametrize(
    ("outside", "prepare"),
    [
        (Outside(mean=(0.5,), std=(0.25,)), lambda x: (x - 0.5) / 0.25),
        (
            Outside(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)),
            lambda x: (
                (x - np.array([0.4, 0.5, 0.6]).reshape(3, 1, 1)) / np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1)
            ),
        ),
        (Outside(range="0-255"), lambda x: x * 255),
        (Outside(range="0-255", mean=(127.5,), std=(127.5,)), lambda x: (x * 255 - 127.5) / 127.5),
        (Outside(order="bgr"), lambda x: x[:, ::-1]),
        (
            # The statistics are in the model's own order: 100 belongs to blue.
            Outside(order="bgr", range="0-255", mean=(100, 110, 120)),
            lambda x: x[:, ::-1] * 255 - np.array([100, 110, 120]).reshape(3, 1, 1),
        ),
    ],
)
def test_what_lies_outside_is_baked_in(outside: Outside, prepare: Any) -> None:
    wrapped = wrap_model(network(), outside)
    check_form(wrapped.model)
    x = images(3)
    expected = run(network(), np.ascontiguousarray(prepare(x.astype(np.float64)).astype(np.float32)))
    np.testing.assert_allclose(run(wrapped.model, x), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_nhwc() -> None:
    original = network(layout="nhwc", sides=(8, 6))
    wrapped = wrap_model(original, Outside(layout="nhwc", mean=(0.5,)))
    check_form(wrapped.model, (3, 8, 6))
    x = images(3, (3, 8, 6))
    expected = run(original, np.ascontiguousarray(x.transpose(0, 2, 3, 1) - 0.5))
    np.testing.assert_allclose(run(wrapped.model, x), expected, rtol=1e-4, atol=1e-5)


def test_grey() -> None:
    wrapped = wrap_model(network(channels=1), Outside(mean=(0.5,)))
    check_form(wrapped.model, (1, 8, 8))
    assert preprocessing(wrapped.form.shape).colour == "grey"


@pytest.mark.parametrize("names", [("images", "logits"), ("logits", "images"), ("r", "w2")])
@pytest.mark.parametrize("mean", [(), (0.5,)])
def test_any_names_of_tensors(names: tuple[str, str], mean: tuple[float, ...]) -> None:
    if names[0] == "r":
        inner = network()
        for node in inner.graph.node:  # an inner tensor that has the name of the new input
            node.input[:] = ["images" if name == "r" else name for name in node.input]
            node.output[:] = ["logits" if name == "pooled" else name for name in node.output]
            node.output[:] = ["images" if name == "r" else name for name in node.output]
            node.input[:] = ["logits" if name == "pooled" else name for name in node.input]
        original = inner
    else:
        original = network(names=names)
    wrapped = wrap_model(original, Outside(mean=mean))
    check_form(wrapped.model)
    x = images(2)
    np.testing.assert_allclose(
        run(wrapped.model, x), run(original, x - np.float32(sum(mean))), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("outside", [Outside(), Outside(mean=(0.5,), std=(0.5,))])
def test_what_is_wrapped_can_be_wrapped_again(outside: Outside) -> None:
    original = network(names=("images", "logits"))
    again = original
    x = images(2)
    prepared = x
    for _ in range(3):
        again = wrap_model(again, outside).model
        check_form(again)
        prepared = (prepared - np.float32(sum(outside.mean))) / np.float32(sum(outside.std) or 1)
    np.testing.assert_allclose(run(again, x), run(original, prepared), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*guarded_names(), "model/input", "model/output", "guard/Flatten_0"])
def test_no_inner_name_meets_one_of_ours(name: str) -> None:
    tail = [
        helper.make_node("Neg", ["scores"], [name], name=name),
        helper.make_node("Neg", [name], ["output"], name="guard/Softmax_0"),
    ]
    detector = Detector(wrap_model(network(tail=tail), Outside()).model, provider="cpu", threads=1)
    x = images(2)
    expected = run(network(), x)
    np.testing.assert_allclose(detector.measure(x).logits, expected, rtol=1e-5)
    logits, gradient = detector.vjp(x, expected)
    assert gradient.shape == x.shape
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    np.testing.assert_allclose(detector.loss_gradient(x, np.zeros(2, np.int64))[0], expected, rtol=1e-5)


SOFTMAX = [helper.make_node("Softmax", ["scores"], ["output"], axis=1)]


def test_a_final_softmax_is_removed() -> None:
    wrapped = wrap_model(network(tail=SOFTMAX), Outside())
    assert wrapped.outputs == "probabilities"
    assert not [node for node in wrapped.model.graph.node if node.op_type in ("Softmax", "Log")]
    x = images(3)
    np.testing.assert_allclose(run(wrapped.model, x), run(network(), x), rtol=1e-5)


def test_a_final_softmax_before_a_rearrangement_is_removed() -> None:
    tail = [
        helper.make_node("Unsqueeze", ["scores", "axes"], ["deep"]),
        helper.make_node("Softmax", ["deep"], ["p"], axis=1),
        helper.make_node("Squeeze", ["p", "axes"], ["output"]),
    ]
    original = network(tail=tail, constants={"axes": np.array([2, 3], np.int64)})
    wrapped = wrap_model(original, Outside(outputs="probabilities"))
    assert not [node for node in wrapped.model.graph.node if node.op_type in ("Softmax", "Log")]
    np.testing.assert_allclose(run(wrapped.model, images(3)), run(network(), images(3)), rtol=1e-5)


def test_other_probabilities_become_their_logarithm() -> None:
    tail = [  # e^z over its sum, written out
        helper.make_node("Exp", ["scores"], ["e"]),
        helper.make_node("ReduceSum", ["e", "axis"], ["s"], keepdims=1),
        helper.make_node("Div", ["e", "s"], ["output"]),
    ]
    original = network(tail=tail, constants={"axis": np.array([1], np.int64)})
    wrapped = wrap_model(original, Outside(outputs="probabilities"))
    assert [node.op_type for node in wrapped.model.graph.node][-2:] == ["Clip", "Log"]
    x = images(3)
    np.testing.assert_allclose(softmax(run(wrapped.model, x)), run(original, x), rtol=1e-5)


def test_vanishing_probabilities_have_a_finite_logarithm() -> None:
    tail = [
        helper.make_node("Add", ["scores", "shift"], ["shifted"]),
        helper.make_node("Softmax", ["shifted"], ["p"], axis=1),
        helper.make_node("Mul", ["p", "one"], ["output"]),
    ]
    constants = {"shift": np.array([1.3, 1.4, -200, 0], np.float32), "one": np.array(1, np.float32)}
    original = network(tail=tail, constants=constants)
    wrapped = wrap_model(original, Outside())
    x = images(5)
    assert run(original, x).min() == 0
    logits = run(wrapped.model, x)
    assert logits.min() == pytest.approx(np.log(SMALLEST_PROBABILITY), rel=1e-6)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("operator", ["Sign", "Round"])
def test_a_way_that_no_gradient_leads_along_is_found_out(operator: str) -> None:
    tail = [
        helper.make_node("Mul", ["scores", "fine"], ["large"]),
        helper.make_node(operator, ["large"], ["jumps"]),
        helper.make_node("Mul", ["jumps", "weight"], ["heavy"]),
        helper.make_node("Add", ["scores", "heavy"], ["output"]),
    ]
    constants = {"fine": np.array(100, np.float32), "weight": np.array(0.1, np.float32)}
    with pytest.raises(ModelError, match="logits do not follow their gradients: between random images"):
        wrap_model(network(tail=tail, constants=constants), Outside())


def test_what_is_said_of_the_outputs_must_be_so() -> None:
    with pytest.raises(UsageError, match=r"sum to one.*--outputs probabilities"):
        wrap_model(network(tail=SOFTMAX), Outside(outputs="logits"))
    with pytest.raises(UsageError, match="no probabilities"):
        wrap_model(network(), Outside(outputs="probabilities"))
    sigmoid = network(tail=[helper.make_node("Sigmoid", ["scores"], ["output"])])
    with pytest.raises(UsageError, match=r"sum to .* up to"):
        wrap_model(sigmoid, Outside(outputs="probabilities"))
    with pytest.raises(UsageError, match=r"look like neither logits nor probabilities: .*a Sigmoid, say"):
        wrap_model(sigmoid, Outside())
    assert wrap_model(sigmoid, Outside(outputs="logits")).outputs == "logits"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("flatten", [None, [-1, 6], [0, -1], ["n", 6], ["n", -1]])
def test_a_fixed_batch_is_freed(batch: int, flatten: list[Any] | None) -> None:
    target = None if flatten is None else [batch if side == "n" else side for side in flatten]
    original = network(batch=batch, flatten=target)
    wrapped = wrap_model(original, Outside())
    check_form(wrapped.model)
    assert wrapped.form.batch == batch
    x = images(8)
    expected = np.concatenate([run(original, x[start : start + batch]) for start in range(0, 8, batch)])
    for size in (1, 2, 7, 8):
        np.testing.assert_allclose(run(wrapped.model, x[:size]), expected[:size], rtol=1e-5, atol=1e-6)


def test_images_that_change_each_other_are_refused() -> None:
    head = [
        helper.make_node("ReduceMean", ["input", "axis"], ["batch_mean"], keepdims=1),
        helper.make_node("Sub", ["input", "batch_mean"], ["x"]),
    ]
    with pytest.raises(ModelError, match=r"same output for every image|change each other"):
        wrap_model(network(head=head, constants={"axis": np.array([0], np.int64)}), Outside())
    head = [
        helper.make_node("ReduceMax", ["input", "axis"], ["batch_max"], keepdims=1),
        helper.make_node("Div", ["input", "batch_max"], ["ratio"]),
        helper.make_node("Add", ["ratio", "input"], ["x"]),
    ]
    with pytest.raises(ModelError, match="change each other"):
        wrap_model(network(head=head, constants={"axis": np.array([0], np.int64)}), Outside())


def test_open_height_and_width_need_a_size() -> None:
    original = network(sides=("h", "w"))
    with pytest.raises(UsageError, match=r"leaves the height of its input open.*--size"):
        wrap_model(original, Outside())
    wrapped = wrap_model(original, Outside(size=(10, 12)))
    check_form(wrapped.model, (3, 10, 12))
    with pytest.raises(UsageError, match="--size asks for height 10, but the model's input has 8"):
        wrap_model(network(), Outside(size=(10, 8)))


def test_half_precision_becomes_single() -> None:
    dtype = TensorProto.FLOAT16
    tail = [
        helper.make_node("Cast", ["scores"], ["once"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["once"], ["output"], to=dtype),
    ]
    original = network(dtype=dtype, tail=tail)
    wrapped = wrap_model(original, Outside(mean=(0.5,)))
    check_form(wrapped.model)
    x = images(3)
    expected = run(original, (x - 0.5).astype(helper.tensor_dtype_to_np_dtype(dtype)))
    np.testing.assert_allclose(run(wrapped.model, x), expected, atol=2e-2)


@pytest.mark.parametrize("dtype", [TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_what_onnxruntime_has_no_kernels_for_is_checked_in_single_precision(dtype: int) -> None:
    original = network(dtype=dtype)
    wrapped = wrap_model(original, Outside(mean=(0.5,)))
    check_form(wrapped.model)
    x = images(3)
    np.testing.assert_allclose(run(wrapped.model, x), run(network(), x - 0.5), atol=0.1)


def test_a_cast_behind_the_final_softmax_does_not_keep_it() -> None:
    half = TensorProto.FLOAT16
    tail = [
        helper.make_node("Softmax", ["scores"], ["p"], axis=1),
        helper.make_node("Cast", ["p"], ["output"], to=TensorProto.FLOAT),
    ]
    head = [helper.make_node("Cast", ["input"], ["x"], to=half)]
    original = network(dtype=half, head=head, tail=tail)  # as conversion to 16 bits leaves the ends
    for value in (original.graph.input[0], original.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    wrapped = wrap_model(original, Outside())
    assert not [node for node in wrapped.model.graph.node if node.op_type in ("Softmax", "Log")]
    np.testing.assert_allclose(softmax(run(wrapped.model, images(3))), run(original, images(3)), atol=5e-3)


def test_integer_pixels_become_floats() -> None:
    head = [helper.make_node("Cast", ["input"], ["x"], to=TensorProto.FLOAT)]
    original = network(dtype=TensorProto.UINT8, head=head)
    with pytest.raises(UsageError, match="8-bit integers: give --range 0-255"):
        wrap_model(original, Outside())
    wrapped = wrap_model(original, Outside(range="0-255"))
    check_form(wrapped.model)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8)).astype(np.uint8)
    found = run(wrapped.model, (pixels / 255).astype(np.float32))
    np.testing.assert_allclose(found, run(original, pixels), rtol=1e-4, atol=1e-2)
    direct = network(dtype=TensorProto.UINT8, head=[helper.make_node("Identity", ["input"], ["x"])])
    with pytest.raises(ModelError, match="not cast to floats first"):
        wrap_model(direct, Outside(range="0-255"))


@pytest.mark.parametrize("opset", [7, 9, 13])
def test_an_old_opset_is_raised(opset: int) -> None:
    wrapped = wrap_model(network(opset=opset), Outside())
    check_form(wrapped.model)


@pytest.mark.parametrize("opset", [5, 30])
def test_an_opset_that_onnxruntime_does_not_know_is_named(opset: int) -> None:
    with pytest.raises(ModelError, match=rf"ai.onnx {opset}\).*export the model at opset 17") as caught:
        wrap_model(network(opset=opset), Outside())
    assert "ONNXRuntimeError" not in str(caught.value)
    assert "/" not in str(caught.value)


def test_a_model_from_before_weights_could_stand_outside_the_inputs() -> None:
    old = network(opset=7)
    old.ir_version = 3
    for tensor in old.graph.initializer:
        old.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    check_form(wrap_model(old, Outside()).model)


def test_what_is_wrapped_can_be_guarded() -> None:
    wrapped = wrap_model(network(), Outside(mean=(0.5,), std=(0.2,)))
    measured = Detector(wrapped.model, provider="cpu").measure(images(3))
    assert np.isfinite(measured.jacobian).all()


@pytest.mark.parametrize(
    ("model", "outside", "error", "message"),
    [
        (network(), Outside(mean=(0.1, 0.2)), UsageError, "--mean has 2 values"),
        (network(), Outside(std=(0.0,)), UsageError, "above zero"),
        (network(), Outside(mean=(float("nan"),)), UsageError, "finite"),
        (network(), Outside(mean=(123.7, 116.3, 103.5)), UsageError, "outside .0, 1.*--range 0-255"),
        (network(), Outside(range="0-255", mean=(0.485,)), UsageError, "almost nothing"),
        (network(), Outside(layout="nhwc"), ModelError, "looks like --layout nchw"),
        (network(layout="nhwc"), Outside(), ModelError, "looks like --layout nhwc"),
        (network(channels=4), Outside(), ModelError, "4 channels"),
        (network(channels=1), Outside(order="bgr"), UsageError, "three channels"),
        (network(sides=("h", "w")), Outside(size=(0, 8)), UsageError, "--size asks for height 0"),
        (network(), Outside(output="other"), UsageError, "no such output, only output"),
        (network(classes=1), Outside(), ModelError, "single number per image"),
        (
            network(tail=[helper.make_node("ReduceSum", ["scores"], ["output"], keepdims=0)]),
            Outside(),
            ModelError,
            "one row of class scores",
        ),
    ],
)
def test_refusals_say_why(
    model: onnx.ModelProto, outside: Outside, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        wrap_model(model, outside)


def test_an_operator_without_a_rule_is_named() -> None:
    tail = [helper.make_node("Mod", ["scores", "one"], ["output"], name="remainder", fmod=1)]
    with pytest.raises(UnsupportedOperatorError, match=r"Mod.*remainder"):
        wrap_model(network(tail=tail, constants={"one": np.array(1, np.float32)}), Outside())


def test_a_model_without_gradients_is_refused() -> None:
    tail = [
        helper.make_node("Mul", ["scores", "hundred"], ["large"]),
        helper.make_node("Round", ["large"], ["output"]),
    ]
    with pytest.raises(ModelError, match=r"gradients are zero"):
        wrap_model(network(tail=tail, constants={"hundred": np.array(100, np.float32)}), Outside())


def test_several_inputs_or_outputs() -> None:
    two_inputs = network()
    two_inputs.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["n", 1]))
    with pytest.raises(ModelError, match=r"2 inputs \(input, mask\)"):
        wrap_model(two_inputs, Outside())
    old_style = network()  # weights listed among the inputs, as IR version 3 had it
    old_style.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 3, 3, 3]))
    check_form(wrap_model(old_style, Outside()).model)
    two_outputs = network()
    two_outputs.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["n", 6]))
    with pytest.raises(UsageError, match=r"2 outputs \(output, flat\): choose one by --output"):
        wrap_model(two_outputs, Outside())
    assert wrap_model(two_outputs, Outside(output="flat", outputs="logits")).num_classes == 6
    assert wrap_model(two_outputs, Outside(output="output")).num_classes == CLASSES


def fork(*conditions: NodeProto) -> list[NodeProto]:
    """Nodes that compute `yes`, and an If that gives the scores where it holds, else their negative."""
    branches: dict[str, Any] = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(operator, ["scores"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name, operator in (("then", "Identity"), ("else", "Neg"))
    }
    return [*conditions, helper.make_node("If", ["yes"], ["output"], name="fork", **branches)]


def test_branches_that_depend_on_images_are_refused() -> None:
    tail = fork(
        helper.make_node("ReduceMax", ["scores"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "zero"], ["yes"]),
    )
    with pytest.raises(ModelError, match=r"If .*fork"):
        wrap_model(network(tail=tail, constants={"zero": np.array(0, np.float32)}), Outside())


@pytest.mark.parametrize("batch", [1, "n"])
@pytest.mark.parametrize("sides", [(8, 8), ("h", "w")])
def test_branches_that_do_not_are_taken(batch: int | str, sides: tuple[int | str, int | str]) -> None:
    tail = fork(
        helper.make_node("Shape", ["input"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["channels"]),
        helper.make_node("Equal", ["channels", "one"], ["yes"]),
    )
    original = network(batch=batch, sides=sides, tail=tail, constants={"one": np.array(1, np.int64)})
    wrapped = wrap_model(original, Outside(size=(8, 8)))
    check_form(wrapped.model)
    assert not [node for node in wrapped.model.graph.node if node.op_type == "If"]
    np.testing.assert_allclose(run(wrapped.model, images(3)), -run(network(), images(3)), rtol=1e-5)


def test_loops_are_refused() -> None:
    flag, scores = (
        [helper.make_tensor_value_info(name, kind, None) for name in names]
        for kind, names in ((TensorProto.BOOL, ("on", "still")), (TensorProto.FLOAT, ("z", "twice")))
    )
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Add", ["z", "z"], ["twice"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), flag[0], scores[0]],
        [flag[1], scores[1]],
    )
    tail = [helper.make_node("Loop", ["three", "yes", "scores"], ["output"], name="round", body=body)]
    constants = {"three": np.array(3, np.int64), "yes": np.array(True)}
    with pytest.raises(ModelError, match=r"Loop .*round"):
        wrap_model(network(tail=tail, constants=constants), Outside())


def test_a_constant_classifier_is_refused() -> None:
    model = network()
    for tensor in model.graph.initializer:
        if tensor.name == "fc":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((CLASSES, 6), np.float32), "fc"))
    with pytest.raises(ModelError, match=r"same output for every image"):
        wrap_model(model, Outside())


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_model(tmp_path / "absent.onnx")
    for content in (b"", b"not a model at all", b"\x00" * 100):
        (tmp_path / "x.onnx").write_bytes(content)
        with pytest.raises(ModelError, match="not an ONNX model"):
            read_model(tmp_path / "x.onnx")


def test_external_data(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save_model(network(), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    manifest, _ = wrap(file, tmp_path / "bundle", Outside())
    assert set(manifest.files) == {"model.onnx", "card.md"}
    x = images(2)
    np.testing.assert_allclose(
        run(onnx.load(tmp_path / "bundle" / "model.onnx"), x), run(network(), x), rtol=1e-5
    )
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"weights lie in other files.*weights\.bin"):
        read_model(file)


def test_a_bundle_is_whole_and_loads(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "model.onnx")
    (tmp_path / "names.txt").write_text("cat\ndog\nship\nfrog\n")
    out = tmp_path / "models" / "animals"
    manifest, wrapped = wrap(
        tmp_path / "model.onnx",
        out,
        Outside(mean=(0.5,)),
        classes=tmp_path / "names.txt",
        arguments={"mean": (0.5,)},
    )
    bundle = bundles.load(out)
    assert bundle.manifest == manifest
    assert bundle.calibration is None
    assert manifest.name == "animals"
    assert manifest.class_names == ["cat", "dog", "ship", "frog"]
    assert (manifest.input.channels, manifest.input.height, manifest.input.width) == (3, 8, 8)
    assert manifest.preprocessing.resize == 8
    assert manifest.provenance["arguments"] == {"mean": [0.5]}
    assert len(manifest.provenance["source"]["sha256"]) == 64
    assert "model.onnx" in (out / "card.md").read_text()
    again = tmp_path / "models" / "again"
    wrap(
        tmp_path / "model.onnx",
        again,
        Outside(mean=(0.5,)),
        name="animals",
        classes=tmp_path / "names.txt",
        arguments={"mean": (0.5,)},
    )
    for name in ("model.onnx", "manifest.json", "card.md"):
        assert (out / name).read_bytes() == (again / name).read_bytes(), "the same input gives the same files"
    assert wrapped.form.input == "input"


def test_existing_folders(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "model.onnx")
    full = tmp_path / "photos"
    full.mkdir()
    (full / "a.png").write_bytes(b"")
    with pytest.raises(BundleError, match="holds files but is no bundle"):
        wrap(tmp_path / "model.onnx", full, Outside())
    assert (full / "a.png").exists()
    with pytest.raises(BundleError, match="is a file"):
        wrap(tmp_path / "model.onnx", tmp_path / "model.onnx", Outside())
    out = tmp_path / "bundle"
    wrap(tmp_path / "model.onnx", out, Outside())
    first = bundles.load(out).digest
    with pytest.raises(UsageError):
        wrap(tmp_path / "model.onnx", out, Outside(mean=(7.0,)))
    assert bundles.load(out).digest == first, "a failure leaves the old bundle"
    wrap(tmp_path / "model.onnx", out, Outside(mean=(0.5,)))
    assert bundles.load(out).digest != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "model.onnx", "photos"]


@pytest.mark.parametrize(
    "content",
    [
        "cat\ndog\nship",
        "cat\ndog\nship\n\n",
        "\ufeffcat\r\ndog\r\nship\r\n",
        '["cat", "dog", "ship"]',
        '{"2": "ship", "0": "cat", "1": "dog"}',
        '{"0": ["n01", "cat"], "1": ["n02", "dog"], "2": ["n03", "ship"]}',
    ],
)
def test_class_names(tmp_path: Path, content: str) -> None:
    (tmp_path / "names").write_text(content, encoding="utf-8")
    assert read_classes(tmp_path / "names", 3) == ["cat", "dog", "ship"]
    with pytest.raises(DataError, match="holds 3 class names, but the model has 4"):
        read_classes(tmp_path / "names", 4)


def test_class_names_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_classes(tmp_path / "absent", 3)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not text"):
        read_classes(tmp_path / "binary", 3)
    for content in ("[1, 2", '{"a": "cat"}', '{"0": []}'):
        (tmp_path / "names").write_text(content)
        with pytest.raises(DataError, match="expected a JSON list"):
            read_classes(tmp_path / "names", 1)


@pytest.mark.parametrize(
    ("shape", "options", "resize"),
    [
        ((3, 224, 224), {}, 256),
        ((3, 32, 32), {}, 32),
        ((3, 224, 224), {"crop": 1.0}, 224),
        ((3, 224, 224), {"crop": 0.95}, 236),
        ((3, 224, 224), {"resize": 232}, 232),
        ((3, 224, 224), {"stretch": True}, None),
        ((3, 224, 160), {}, None),
        ((3, 224, 160), {"resize": 300}, 300),
    ],
)
def test_preprocessing(shape: tuple[int, int, int], options: dict[str, Any], resize: int | None) -> None:
    found = preprocessing(shape, **options)
    assert found.resize == resize
    assert found.colour == "rgb"
    assert found.interpolation == "bilinear"
    assert preprocessing(shape, **options, interpolation="bicubic").interpolation == "bicubic"


@pytest.mark.parametrize(
    "options",
    [
        {"crop": 0.0},
        {"crop": 1.5},
        {"resize": 200},
        {"resize": 256, "crop": 0.9},
        {"stretch": True, "crop": 1.0},
        {"resize": 100_000_000},
        {"crop": 1e-7},
    ],
)
def test_preprocessing_that_makes_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        preprocessing((3, 224, 224), **options)


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "model.onnx")
    wrap(tmp_path / "model.onnx", tmp_path / "bundle", Outside())
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["class_names"] == ["class 0", "class 1", "class 2", "class 3"]
