from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from guard.autodiff import Graph, check_differentiable, pullback, supported_operators
from guard.errors import ModelError, UnsupportedOperatorError
from tests.gradients import Array, relative_error, session

Weights = dict[str, Array]


def model_of(
    nodes: list[onnx.NodeProto],
    weights: Weights | None = None,
    *,
    shape: tuple[int | str, ...] = ("batch", 4),
    outputs: tuple[str, ...] = ("y",),
    opset: int = 20,
    domain: str = "",
) -> onnx.ModelProto:
    """A model with one input `x`."""
    initializers = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    values = [onnx.ValueInfoProto(name=name) for name in outputs]
    for value in values:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "test", inputs, values, initializers)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def node(op_type: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        op_type, inputs.split(), outputs.split(), name=f"{op_type} of {outputs}", **attributes
    )


def f32(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gradient(model: onnx.ModelProto, x: Array, v: Array, output: str = "y") -> Array:
    """The cotangent v of `output`, pulled back to x."""
    graph = Graph(model)
    cotangent = graph.input("cotangent", ["batch", *v.shape[1:]])
    built = graph.build({"gradient": pullback(graph, output, cotangent, "x")})
    onnx.checker.check_model(built, full_check=True)
    result: Array = session(built).run(["gradient"], {"x": x, "cotangent": v})[0]
    return result


LINEAR = [node("MatMul", "x w", "y")]


def test_gradient_of_a_linear_map_is_its_transpose() -> None:
    w = f32(4, 3)
    v = f32(5, 3, seed=1)
    np.testing.assert_allclose(gradient(model_of(LINEAR, {"w": w}), f32(5, 4), v), v @ w.T, rtol=1e-6)


def test_contributions_of_a_tensor_read_several_times_add() -> None:
    nodes = [node("Mul", "x x", "s"), node("Add", "s x", "t"), node("Mul", "t x", "y")]
    x = f32(3, 4)
    np.testing.assert_allclose(
        gradient(model_of(nodes), x, np.ones_like(x)), 3 * x**2 + 2 * x, rtol=1e-5, atol=1e-6
    )


def test_several_outputs_of_one_node_meet() -> None:
    nodes = [node("Split", "x", "a b", axis=1, num_outputs=2), node("Mul", "a b", "y")]
    x = f32(3, 4)
    expected = np.concatenate([x[:, 2:], x[:, :2]], 1)
    np.testing.assert_allclose(gradient(model_of(nodes), x, np.ones((3, 2), np.float32)), expected)


def test_an_output_that_does_not_depend_on_the_input_has_gradient_zero() -> None:
    nodes = [node("Sign", "x", "s"), node("Mul", "s w", "y")]
    x = f32(3, 4)
    np.testing.assert_array_equal(gradient(model_of(nodes, {"w": f32(4)}), x, x), np.zeros((3, 4)))


def test_input_as_output_has_the_cotangent_as_gradient() -> None:
    v = f32(2, 4)
    graph = Graph(model_of([node("Relu", "x", "y")]))
    cotangent = graph.input("v", ["batch", 4])
    assert pullback(graph, "x", cotangent, "x") == cotangent
    np.testing.assert_array_equal(gradient(model_of([node("Identity", "x", "y")]), v, v), v)


def test_gradient_with_respect_to_an_intermediate_tensor() -> None:
    nodes = [node("Exp", "x", "h"), node("Mul", "h h", "y")]
    graph = Graph(model_of(nodes))
    cotangent = graph.input("v", ["batch", 4])
    built = graph.build({"g": pullback(graph, "y", cotangent, "h")})
    x = f32(2, 4)
    (result,) = session(built).run(None, {"x": x, "v": np.ones_like(x)})
    np.testing.assert_allclose(result, 2 * np.exp(x), rtol=1e-5)


def test_integer_paths_are_cut() -> None:
    nodes = [
        node("Cast", "x", "i", to=TensorProto.INT64),
        node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("ArgMax", "x", "a", axis=1),
        node("Gather", "table a", "g"),
        node("Greater", "x f", "c"),
        node("Where", "c x f", "w"),
        node("ReduceSum", "w one", "s", keepdims=1),
        node("Add", "s g", "y"),
    ]
    weights = {"table": f32(4), "one": np.array([1], np.int64)}
    x = f32(3, 4)
    expected = (x > np.trunc(x)).astype(np.float32)
    np.testing.assert_array_equal(
        gradient(model_of(nodes, weights), x, np.ones((3, 1), np.float32)), expected
    )


def test_integers_carry_no_gradient_from_one_cast_to_the_next() -> None:
    nodes = [
        node("CastLike", "x one", "i"),
        node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("TopK", "x one", "t places", axis=1),
        node("Cast", "places", "p", to=TensorProto.FLOAT),
        node("Sum", "x f t p", "y"),
    ]
    x = np.array([[1.4, 3.6, 2.0, 0.3]], np.float32)
    found = gradient(model_of(nodes, {"one": np.array([1], np.int64)}), x, np.ones_like(x))
    np.testing.assert_array_equal(found, [[1, 1 + 4, 1, 1]])


def test_tensors_are_joined_in_front_of_the_batch_but_not_along_it() -> None:
    turned = node("Transpose", "x", "t", perm=[1, 0])
    nodes = [
        node("Shape", "x", "s", start=0, end=1),
        node("Concat", "three s", "shape", axis=0),
        node("Expand", "w shape", "e"),
        turned,
        node("Concat", "t e t", "c", axis=0),
        node("Transpose", "c", "y", perm=[1, 0]),
    ]
    weights = {"w": f32(3, 1), "three": np.array([3], np.int64)}
    v = f32(3, 11, seed=1)
    found = gradient(model_of(nodes, weights), f32(3, 4), v)
    np.testing.assert_allclose(found, v[:, :4] + v[:, 7:], rtol=1e-6)
    graph = Graph(model_of([turned, node("Concat", "t t", "y", axis=1)]))
    with pytest.raises(ModelError, match=r"Concat .*along axis 1, which depends on the batch"):
        pullback(graph, "y", "y", "x")


def test_appended_nodes_are_differentiated_too() -> None:
    graph = Graph(model_of(LINEAR, {"w": f32(4, 3)}))
    loss = graph.op("ReduceSumSquare", "y", graph.constant([1]), keepdims=1)
    one = graph.constant(np.ones((1, 1), np.float32))
    built = graph.build({"g": pullback(graph, loss, graph.op("Expand", one, graph.op("Shape", loss)), "x")})
    x = f32(3, 4, seed=2)
    (result,) = session(built).run(None, {"x": x})
    w = f32(4, 3)
    np.testing.assert_allclose(result, 2 * x @ w @ w.T, rtol=1e-5, atol=1e-5)


def test_rows_share_masks_and_the_forward_pass() -> None:
    nodes = [node("Conv", "x w", "h"), node("Relu", "h", "r"), node("GlobalMaxPool", "r", "y")]
    model = model_of(nodes, {"w": f32(6, 3, 3, 3)}, shape=("batch", 3, 5, 5))
    graph = Graph(model)
    rows = []
    lengths = []
    for i in range(3):
        rows.append(pullback(graph, "y", graph.input(f"v{i}", ["batch", 6, 1, 1]), "x"))
        lengths.append(len(graph.nodes))
    assert lengths[1] - lengths[0] == lengths[2] - lengths[1] < lengths[0] - len(nodes)
    built = graph.build(rows)
    assert [n.op_type for n in built.graph.node].count("Equal") == 1
    assert len({i.name for i in built.graph.initializer if list(i.dims) == [3, 6, 3, 3]}) == 1


def test_building_leaves_the_model_as_it_was_and_prunes_what_no_output_reads() -> None:
    nodes = [*LINEAR, node("Exp", "y", "unused")]
    model = model_of(nodes, {"w": f32(4, 3), "spare": f32(9)})
    before = model.SerializeToString()
    graph = Graph(model)
    pullback(graph, "y", graph.input("v", ["batch", 3]), "x")
    built = graph.build(["y"])
    assert model.SerializeToString() == before
    assert [n.op_type for n in built.graph.node] == ["MatMul"]
    assert [i.name for i in built.graph.initializer] == ["w"]


def test_names_never_clash() -> None:
    nodes = [node("Exp", "x", "guard/Mul_0"), node("Exp", "guard/Mul_0", "y")]
    x = f32(2, 4)
    np.testing.assert_allclose(
        gradient(model_of(nodes), x, np.ones_like(x)), np.exp(np.exp(x)) * np.exp(x), rtol=1e-5
    )
    graph = Graph(model_of(nodes))
    with pytest.raises(ModelError, match="already has a tensor called 'x'"):
        graph.input("x", ["batch"])
    with pytest.raises(ModelError, match="choose other output names"):
        graph.build({"y": "x"})


def test_shapes_and_constants_are_read_off() -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "n", axis=0),
        node("Concat", "n rest", "target", axis=0),
        node("Reshape", "x target", "r"),
        node("Transpose", "w", "wt"),
        node("Constant", "", "two", value_float=2.0),
        node("Mul", "wt two", "scaled"),
        node("MatMul", "r scaled", "y"),
    ]
    weights = {"w": f32(5, 2), "zero": np.array([0], np.int64), "rest": np.array([2, 2], np.int64)}
    graph = Graph(model_of(nodes, weights))
    assert graph.shape("x") == (None, 4)
    assert graph.shape("r") == (None, 2, 2)
    assert graph.shape("y") == (None, 2, 5)
    assert graph.shape("w") == (5, 2)
    assert graph.value("target") is None
    assert graph.value("x") is None
    np.testing.assert_array_equal(graph.value("scaled"), 2 * weights["w"].T)
    assert graph.dtype("target") == np.int64
    assert graph.dtype("scaled") == np.float32
    assert graph.static_shape("r", 1) == (2, 2)
    with pytest.raises(ModelError, match="only the batch axis may vary"):
        graph.static_shape("r")


def test_a_fixed_batch_size_makes_every_dimension_static() -> None:
    graph = Graph(model_of(LINEAR, {"w": f32(4, 3)}, shape=(1, 4)))
    assert graph.shape("y") == (1, 3)


def test_equal_constants_are_stored_once() -> None:
    graph = Graph(model_of(LINEAR, {"w": f32(4, 3)}))
    assert graph.constant(np.float32(1)) == graph.constant(np.float32(1))
    assert graph.constant(np.float32(0)) != graph.constant(np.float64(0))
    assert graph.constant(np.zeros((1, 0), np.float32)) != graph.constant(np.zeros((0, 1), np.float32))
    assert graph.dtype(graph.constant([1])) == np.int64


def test_unknown_image_size_is_refused() -> None:
    model = model_of([node("Relu", "x", "y")], shape=("batch", 3, "height", "width"))
    with pytest.raises(ModelError, match="Axis 2 of input 'x' has no fixed size"):
        Graph(model).shape("y")


def test_a_model_that_onnxruntime_cannot_run_is_refused() -> None:
    model = model_of([node("Reshape", "x s", "y")], {"s": np.array([2, 4], np.int64)})
    with pytest.raises(ModelError, match="cannot run the model at batch sizes"):
        Graph(model).shape("y")


def test_an_operator_without_a_rule_is_named_with_its_node_and_what_is_supported() -> None:
    nodes = [node("Relu", "x", "h"), node("Hardmax", "h", "y")]
    with pytest.raises(UnsupportedOperatorError) as caught:
        check_differentiable(model_of(nodes), "x", "y")
    text = str(caught.value)
    assert "Hardmax" in text
    assert "'Hardmax of y'" in text
    assert "'y'" in text
    assert ", ".join(supported_operators()) in text
    graph = Graph(model_of(nodes))
    with pytest.raises(UnsupportedOperatorError, match="Hardmax"):
        pullback(graph, "y", "y", "x")


def test_only_the_path_from_input_to_output_counts() -> None:
    nodes = [node("Hardmax", "x", "h"), node("Hardmax", "w", "u"), node("Mul", "x u", "y")]
    model = model_of(nodes, {"w": f32(4)}, outputs=("y", "h"))
    check_differentiable(model, "x", "y")
    with pytest.raises(UnsupportedOperatorError):
        check_differentiable(model, "x", "h")


def test_operators_of_other_domains_are_named_with_them() -> None:
    model = model_of([node("Wonder", "x", "y", domain="com.example")], domain="com.example")
    with pytest.raises(UnsupportedOperatorError, match=r"com\.example\.Wonder"):
        check_differentiable(model, "x", "y")


def test_control_flow_on_the_path_is_refused_even_where_it_captures_its_input() -> None:
    def branch(op_type: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op_type, ["x"], ["b"])], op_type, [], [output])

    nodes = [
        node("ReduceSum", "x", "s", keepdims=0),
        node("Greater", "s zero", "c"),
        node("If", "c", "y", then_branch=branch("Exp"), else_branch=branch("Neg")),
    ]
    with pytest.raises(UnsupportedOperatorError, match="If"):
        check_differentiable(model_of(nodes, {"zero": np.array(0, np.float32)}), "x", "y")


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([node("Conv", "x k", "h"), node("Conv", "x h", "y")], {"k": f32(1, 3, 1, 1)}),
        ([node("LayerNormalization", "w x", "y")], {"w": f32(2, 3, 5, 5)}),
    ],
    ids=["Conv", "LayerNormalization"],
)
def test_parameters_computed_from_the_images_are_refused(
    nodes: list[onnx.NodeProto], weights: Weights
) -> None:
    shape = (1, 3, 5, 5)
    graph = Graph(model_of(nodes, weights, shape=shape))
    with pytest.raises(ModelError, match=r"first input only|must be a constant"):
        pullback(graph, "y", "y", "x")


@pytest.mark.parametrize("channels", [1, 4])
def test_branches_with_constant_conditions_are_taken(channels: int) -> None:
    # what exporters make of a squeeze of an axis whose size they do not know, with a sum in its place
    summed = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axis"], ["b"], keepdims=0)],
        "then",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([1]), "axis")],
    )
    kept = helper.make_graph(
        [
            helper.make_node("Constant", [], ["two"], value_float=2.0),
            helper.make_node("Mul", ["x", "two"], ["b"]),
        ],
        "else",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s one", "n"),
        node("Equal", "n one", "c"),
        node("If", "c", "h", then_branch=summed, else_branch=kept),
        node("Exp", "h", "y"),
    ]
    model = model_of(nodes, {"one": np.array(1, np.int64)}, shape=("batch", channels))
    x = f32(3, channels)
    shape = (3,) if channels == 1 else (3, channels)
    scale = np.float32(1 if channels == 1 else 2)
    expected = scale * np.exp(scale * x)
    np.testing.assert_allclose(gradient(model, x, np.ones(shape, np.float32)), expected, rtol=1e-5)


def test_what_is_gathered_repeatedly_is_added_up_whatever_the_threads() -> None:
    places = np.array([[1, -1], [1, 2], [0, 0], [1, -3], [1, 2]])
    nodes = [
        node("Transpose", "x", "t", perm=[1, 2, 0, 3]),
        node("GatherND", "t places", "g"),
        node("Transpose", "g", "y", perm=[1, 0, 2]),
    ]
    graph = Graph(model_of(nodes, {"places": places}, shape=("batch", 2, 3, 2**16)))
    built = graph.build({"gradient": pullback(graph, "y", graph.input("v", ["batch", 5, 2**16]), "x")})
    expected = np.zeros((2, 3))
    np.add.at(expected, tuple(places.T), 1.0 + np.arange(5))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 4
    threads = onnxruntime.InferenceSession(
        built.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    v = np.broadcast_to(1 + np.arange(5, dtype=np.float32)[:, np.newaxis], (2, 5, 2**16))
    feeds = {"x": np.zeros((2, 2, 3, 2**16), np.float32), "v": np.ascontiguousarray(v)}
    for _ in range(10):
        (found,) = threads.run(["gradient"], feeds)
        np.testing.assert_array_equal(found, np.broadcast_to(expected[..., np.newaxis], found.shape))


def test_branches_that_name_their_tensors_alike_stay_apart() -> None:
    def branch(factor: float) -> onnx.GraphProto:
        inside = helper.make_graph(
            [helper.make_node("Mul", ["half", "k"], ["b"])],
            "inside",
            [],
            [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
        )
        return helper.make_graph(
            [
                helper.make_node("Mul", ["x", "k"], ["half"]),
                helper.make_node("If", ["c"], ["b"], then_branch=inside, else_branch=inside),
            ],
            "branch",
            [],
            [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.array(factor, np.float32), "k")],
        )

    nodes = [
        node("If", "c", "first", then_branch=branch(2.0), else_branch=branch(5.0)),
        node("If", "c", "second", then_branch=branch(0.5), else_branch=branch(5.0)),
        node("Add", "first second", "y"),
    ]
    model = model_of(nodes, {"c": np.array(True)}, shape=("batch", 3))
    np.testing.assert_allclose(gradient(model, f32(2, 3), np.ones((2, 3), np.float32)), 4.25, rtol=1e-6)


def test_secondary_outputs_on_the_path_are_refused() -> None:
    nodes = [node("LayerNormalization", "x w", "h mean"), node("Add", "h mean", "y")]
    graph = Graph(model_of(nodes, {"w": f32(4)}))
    with pytest.raises(ModelError, match="Only the first output"):
        pullback(graph, "y", graph.input("v", ["batch", 4]), "x")


def old_network(opset: int) -> onnx.ModelProto:
    """A little of everything whose form changed between opsets."""
    axes = {"axes": [2, 3]}
    nodes = [
        node("Pad", "x", "p", pads=[0, 0, 1, 1, 0, 0, 1, 1]) if opset < 11 else node("Pad", "x pads", "p"),
        node("Conv", "p w", "c"),
        node("BatchNormalization", "c s b m v", "n"),
        node("Clip", "n", "k", min=-1.0, max=1.0) if opset < 11 else node("Clip", "n low high", "k"),
        node("Dropout", "k", "d"),
        node("Upsample", "d scales", "u")
        if opset == 9
        else node("Resize", "d scales", "u")
        if opset == 10
        else node("Resize", "d roi scales", "u"),
        node("ReduceMean", "u", "r", keepdims=1, **axes),
        node("Squeeze", "r", "q", **axes) if opset < 13 else node("Squeeze", "r axes", "q"),
        node("Softmax", "q", "y", axis=1),
    ]
    random = np.random.default_rng(0)
    weights = {
        "w": f32(4, 3, 3, 3),
        **{name: random.uniform(0.5, 1, 4).astype(np.float32) for name in "sbmv"},
        "scales": np.array([1, 1, 2, 2], np.float32),
        "roi": np.zeros(0, np.float32),
        "low": np.array(-1, np.float32),
        "high": np.array(1, np.float32),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "axes": np.array([2, 3], np.int64),
    }
    used = {name for n in nodes for name in n.input}
    kept = {name: value for name, value in weights.items() if name in used}
    return model_of(nodes, kept, shape=("batch", 3, 4, 4), opset=opset)


@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 15, 17])
def test_models_of_older_opsets_give_the_same_gradient(opset: int) -> None:
    x, v = f32(3, 3, 4, 4, seed=5), f32(3, 4, seed=6)
    expected = gradient(old_network(17), x, v)
    assert relative_error(gradient(old_network(opset), x, v), expected) < 1e-6
    assert Graph(old_network(opset)).opset == 17


def test_the_older_form_is_right_by_finite_differences() -> None:
    x, v = f32(1, 3, 4, 4, seed=5), f32(1, 4, seed=6)
    served = session(old_network(17))
    direction = f32(1, 3, 4, 4, seed=7)
    step = np.float32(1e-2)
    ahead, behind = (served.run(None, {"x": x + sign * step * direction})[0] for sign in (1, -1))
    slope = float(((ahead - behind) * v).sum() / (2 * step))
    assert float((gradient(old_network(17), x, v) * direction).sum()) == pytest.approx(slope, rel=2e-2)


def test_local_functions_are_inlined() -> None:
    function = helper.make_function(
        "local",
        "Square",
        ["a"],
        ["b"],
        [helper.make_node("Mul", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 20)],
    )
    model = model_of([node("Square", "x", "y", domain="local")], domain="local")
    model.functions.append(function)
    x = f32(2, 4)
    np.testing.assert_allclose(gradient(model, x, np.ones_like(x)), 2 * x, rtol=1e-6)


def test_a_function_without_the_attributes_it_needs_is_refused() -> None:
    model = model_of([node("MeanVarianceNormalization", "x", "y")], shape=("batch", 3, 4, 4))
    with pytest.raises(ModelError, match=r"Constant .*has 0 values"):
        Graph(model)


def test_the_long_name_of_the_standard_domain_is_understood() -> None:
    model = model_of([node("Exp", "x", "y", domain="ai.onnx")])
    model.opset_import[0].domain = "ai.onnx"
    x = f32(2, 4)
    np.testing.assert_allclose(gradient(model, x, np.ones_like(x)), np.exp(x), rtol=1e-5)


def test_an_empty_opset_list_is_refused() -> None:
    model = model_of(LINEAR, {"w": f32(4, 3)})
    del model.opset_import[:]
    with pytest.raises(ModelError, match="imports no ONNX operator set"):
        Graph(model)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_every_batch_size_even_none(batch: int) -> None:
    nodes = [
        node("Conv", "x w", "c", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", "c", "r"),
        node("MaxPool", "r", "m", kernel_shape=[2, 2]),
        node("Flatten", "m", "y"),
    ]
    model = model_of(nodes, {"w": f32(4, 3, 3, 3)}, shape=("batch", 3, 6, 6))
    x = f32(batch, 3, 6, 6, seed=3)
    result = gradient(model, x, np.ones((batch, 16), np.float32))
    assert result.shape == x.shape
    assert batch == 0 or np.abs(result).max() > 0


def test_gather_with_indices_that_vary() -> None:
    # exporters flatten a tensor and gather from it by computed positions
    nodes = [
        node("Reshape", "x flat", "f"),
        node("Size", "f", "n"),
        node("Range", "zero n three", "i"),
        node("Gather", "f i", "g"),
        node("Mul", "g g", "h"),
        node("Reshape", "h flat2", "y"),
    ]
    weights = {
        "flat": np.array([-1], np.int64),
        "flat2": np.array([-1, 2], np.int64),
        "zero": np.array(0, np.int64),
        "three": np.array(3, np.int64),
    }
    x = f32(3, 6)
    expected = np.zeros_like(x)
    expected[:, ::3] = 2 * x[:, ::3]
    model = model_of(nodes, weights, shape=("batch", 6))
    np.testing.assert_allclose(gradient(model, x, np.ones((3, 2), np.float32)), expected, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather_with_indices_from_an_input(axis: int) -> None:
    model = model_of([node("Gather", "x i", "y", axis=axis)], shape=(3, 4, 5))
    model.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT64, [2, 2]))
    graph = Graph(model)
    shape = [n for n in graph.shape("y") if n is not None]
    built = graph.build({"g": pullback(graph, "y", graph.input("v", shape), "x")})
    x, v = f32(3, 4, 5), f32(*shape, seed=1)
    indices = np.array([[0, 2], [2, 1]])
    (result,) = session(built).run(None, {"x": x, "i": indices, "v": v})
    expected = np.zeros_like(x)
    for place in np.ndindex(2, 2):
        taken: list[Any] = [slice(None)] * 3
        taken[axis] = indices[place]
        expected[tuple(taken)] += v[(slice(None),) * axis + place]
    np.testing.assert_allclose(result, expected, rtol=1e-6)
