import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import helper

from guard import guarded
from guard.errors import DataError, ModelError, UnsupportedOperatorError
from guard.graph import Provider
from guard.guarded import Score
from guard.runtime import Detector, Measurement, score_of
from tests.networks import Array, convolutional, images, linear, model


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return convolutional(seed=2, scale=1.5)


@pytest.fixture(scope="module")
def detector(network: onnx.ModelProto) -> Detector:
    return Detector(network, threads=1)


def test_shape_and_classes_are_read_from_the_model(detector: Detector) -> None:
    assert detector.input_shape == (3, 8, 8)
    assert detector.num_classes == 10
    assert detector.provider == "cpu"


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_chunks_do_not_change_results(network: onnx.ModelProto, detector: Detector, count: int) -> None:
    whole = detector.measure(images(count))
    chunked = Detector(network, threads=1, chunk=2).measure(images(count))
    np.testing.assert_allclose(chunked.logits, whole.logits, rtol=1e-5)
    np.testing.assert_allclose(chunked.jacobian, whole.jacobian, rtol=1e-4)
    assert len(chunked) == count


def test_two_rows_then_those_that_matter_decide_as_all_rows(
    network: onnx.ModelProto, detector: Detector
) -> None:
    x = images(200)
    every = Detector(network, score="jacobian-full", threads=1).measure(x)
    two = detector.measure(x)
    lengths = every.jacobian / every.probabilities.max(axis=1)
    bound = 10 * float(lengths.max())
    differing = every.jacobian > two.jacobian * (1 + 1e-4)
    assert differing.any(), "the network must have images whose longest row is a third one"
    for threshold in np.quantile(every.jacobian, [0.1, 0.5, 0.9]):
        lazy = detector.measure(x, threshold=float(threshold), row_bound=bound)
        np.testing.assert_array_equal(lazy.jacobian > threshold, every.jacobian > threshold)
        assert (lazy.rows >= 2).all()
        assert (lazy.rows[two.jacobian > threshold] == 2).all(), "a rejected image needs no further row"


def test_all_rows_of_many_classes_are_computed_in_turn() -> None:
    many = convolutional(seed=3, classes=40, scale=1.5)
    full = Detector(many, score="jacobian-full", threads=1).measure(images(4))
    assert (full.rows == 40).all()
    d = Detector(many, threads=1)
    lengths = [d.row_norms(images(4), full.probabilities, np.full(4, i)) for i in range(40)]
    np.testing.assert_allclose(full.jacobian, np.max(lengths, axis=0), rtol=1e-4)


def test_no_row_is_forgotten_where_logits_tie() -> None:
    logits = np.array([1, 2, 0, 1, 1, 0, 2, 2, 1, 2], np.float32)
    x = np.full((1, 1, 2, 2), 0.5, np.float32)
    for longest in np.flatnonzero(logits == 2):
        weight = np.zeros((len(logits), 4), np.float32)
        weight[longest] = 3, -3, 3, -3  # orthogonal to the image, whose logits are the bias
        detector = Detector(linear(weight, logits), provider="cpu", threads=1)
        length = float(detector.row_norms(x, detector.measure(x).probabilities, np.array([longest]))[0])
        found = detector.measure(x, threshold=1e3, row_bound=1e9)
        assert found.jacobian[0] == pytest.approx(length, rel=1e-5)
        assert found.rows[0] == len(logits)


def test_one_row_leaves_out_what_it_does_not_compute(network: onnx.ModelProto, detector: Detector) -> None:
    one = Detector(network, score="margin-gradient", threads=1).measure(images(3))
    two = detector.measure(images(3))
    assert np.isnan(one.jacobian).all()
    assert (one.rows == 1).all()
    np.testing.assert_allclose(one.gradient_l2, two.gradient_l2, rtol=1e-4)


def test_margin_gradient_equals_the_probability_gradient_for_two_classes() -> None:
    two = convolutional(seed=4, classes=2)
    measured = Detector(two, threads=1).measure(images(6))
    np.testing.assert_allclose(
        score_of(measured, "margin-gradient"), measured.probability_gradient_l2, rtol=1e-3, atol=1e-7
    )


def test_radius_score_is_the_inverse_distance_of_a_linear_model() -> None:
    weight = np.array([[3, 0, 0, 0], [0, 4, 0, 0]], np.float32)
    x = np.array([1.0, 0.25, 0, 0], np.float32).reshape(1, 1, 2, 2)
    measured = Detector(linear(weight), threads=1).measure(x)
    distance = (3 * 1.0 - 4 * 0.25) / 5
    assert score_of(measured, "radius") == pytest.approx(1 / distance, rel=1e-5)


@pytest.mark.parametrize("name", ["jacobian", "radius", "margin-gradient"])
def test_scores_of_nan_images_are_nan(detector: Detector, name: Score) -> None:
    score = score_of(detector.measure(np.full((1, 3, 8, 8), np.nan, np.float32)), name)
    assert not (score <= 1e300).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_max_pooling_does_not_hide_a_broken_pixel(value: float) -> None:
    nodes = [
        helper.make_node("LeakyRelu", ["images"], ["rectified"]),
        helper.make_node("MaxPool", ["rectified"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    d = Detector(model(nodes, {}, (3, 4, 4), 12), provider="cpu", threads=1)
    x = images(3, (3, 4, 4))
    whole = d.measure(x)
    x[1, 2, 3, 0] = value
    found = d.measure(x, threshold=1e3, row_bound=1e9)
    for name in ("logits", "probabilities", "margin", "gradient_l2", "gradient_l1", "jacobian"):
        assert np.isnan(getattr(found, name)[1]).all(), name
        assert np.isfinite(getattr(found, name)[::2]).all(), name
    np.testing.assert_allclose(found.gradient_l2[::2], whole.gradient_l2[::2], rtol=1e-6)


def test_a_tie_has_an_infinite_radius_score() -> None:
    tie = Detector(linear(np.array([[1, 0, 0, 0], [0, 1, 0, 0]], np.float32)), threads=1)
    assert score_of(tie.measure(np.full((1, 1, 2, 2), 0.5, np.float32)), "radius") == np.inf


def test_loss_gradient_ascends(detector: Detector) -> None:
    x = images(4)
    labels = detector.logits(x).argmax(axis=1)
    _, before, gradient = detector.loss_gradient(x, labels)
    step = 1e-3 * gradient / np.linalg.norm(gradient.reshape(4, -1), axis=1).reshape(-1, 1, 1, 1)
    _, after, _ = detector.loss_gradient(x + step, labels)
    assert (after > before).all()
    assert (before <= 0).all()


def test_wrong_shapes_are_named(detector: Detector) -> None:
    with pytest.raises(DataError, match=r"expected \(B, 3, 8, 8\)"):
        detector.measure(np.zeros((1, 3, 9, 8), np.float32))
    with pytest.raises(DataError, match="B >= 1"):
        detector.measure(np.zeros((0, 3, 8, 8), np.float32))


def test_chunks_in_turn_give_the_same_numbers(network: onnx.ModelProto, detector: Detector) -> None:
    small = Detector(network, provider="cpu", chunk=2)
    x = images(7)
    labels = detector.logits(x).argmax(axis=1)
    np.testing.assert_allclose(small.logits(x), detector.logits(x), rtol=1e-5)
    np.testing.assert_allclose(
        small.loss_gradient(x, labels)[2], detector.loss_gradient(x, labels)[2], rtol=1e-4, atol=1e-6
    )
    limits = {"threshold": 1e3, "row_bound": 1e9}  # every image asks for further rows
    found, expected = small.measure(x, **limits), detector.measure(x, **limits)
    np.testing.assert_array_equal(found.rows, expected.rows)
    assert found.rows.min() > 2
    np.testing.assert_allclose(found.jacobian, expected.jacobian, rtol=1e-5)


def test_a_chunk_holds_fewer_images_the_larger_they_are() -> None:
    def chunk(side: int) -> int:
        return Detector(
            linear(np.ones((2, side**2), np.float32), shape=(1, side, side)), provider="cpu"
        ).chunk

    assert (chunk(8), chunk(224), chunk(640)) == (32, 8, 1)


def test_threads_share_a_detector(detector: Detector) -> None:
    expected = detector.measure(images(16)).jacobian
    found: list[Measurement] = []
    workers = [threading.Thread(target=lambda: found.append(detector.measure(images(16)))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for measured in found:
        np.testing.assert_allclose(measured.jacobian, expected, rtol=1e-5)


def test_a_session_under_construction_holds_up_no_other(
    network: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = Detector(network, provider="cpu", threads=1)
    started, released = threading.Event(), threading.Event()
    build = guarded.vjp_model

    def slow(model: onnx.ModelProto, *, provider: Provider) -> onnx.ModelProto:
        started.set()
        assert released.wait(60)
        return build(model, provider=provider)

    monkeypatch.setattr(guarded, "vjp_model", slow)
    x = images(1)
    with ThreadPoolExecutor(2) as pool:
        gradient = pool.submit(d.vjp, x, np.ones((1, 10), np.float32))
        assert started.wait(60)
        try:
            assert len(pool.submit(d.measure, x).result(timeout=10)) == 1
        finally:
            released.set()
        assert gradient.result(timeout=60)[1].shape == x.shape


def test_auto_says_aloud_where_it_runs(network: onnx.ModelProto, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        provider = Detector(network, provider="auto", threads=1).provider
    assert f"running on {provider.upper()}" in caplog.text


def test_required_cuda_is_an_error_where_it_does_not_load(network: onnx.ModelProto) -> None:
    if Detector(network, provider="auto", threads=1).provider == "cuda":
        assert Detector(network, provider="cuda", threads=1).provider == "cuda"
        return
    with pytest.raises(ModelError, match="onnxruntime-gpu"):
        Detector(network, provider="cuda", threads=1)


def test_unsupported_operators_are_refused_at_once() -> None:
    determinant = model([helper.make_node("Det", ["images"], ["logits"])], {}, (3, 2, 2), 3)
    with pytest.raises(UnsupportedOperatorError, match="Det"):
        Detector(determinant)


@pytest.mark.parametrize(
    ("names", "weight", "found"),
    [
        (("images", "scores"), np.eye(4), "outputs scores"),
        (("pixels", "logits"), np.eye(4), "inputs pixels"),
        (("images", "logits"), np.ones((1, 4)), r"logits \(None, 1\)"),
    ],
)
def test_models_that_are_no_bundle_are_named(names: tuple[str, str], weight: Array, found: str) -> None:
    other = linear(weight)
    renamed = dict(zip(("images", "logits"), names, strict=True))
    for node in other.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for value in (*other.graph.input, *other.graph.output):
        value.name = renamed[value.name]
    with pytest.raises(ModelError, match=rf"{found}.*guard wrap"):
        Detector(other, provider="cpu", threads=1)
