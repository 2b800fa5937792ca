import numpy as np
import onnx
import pytest
import torch

from guard.guarded import Loss, Score, guarded_model, loss_model, vjp_model
from guard.runtime import session_of
from tests.networks import Array, convolutional, images, linear


def run(model: onnx.ModelProto, **inputs: object) -> dict[str, Array]:
    session = session_of(model, threads=1)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


class Torch(torch.nn.Module):
    """The same network as tests.networks.convolutional, in float64, for autograd."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.w = {
            t.name: torch.tensor(onnx.numpy_helper.to_array(t)).double() for t in model.graph.initializer
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, stride in enumerate((1, 2, 1)):
            x = torch.relu(torch.conv2d(x, self.w[f"w{i}"], self.w[f"b{i}"], stride, 1))
        return x.mean((2, 3)) @ self.w["head"].T + self.w["head_bias"]


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return convolutional(seed=1)


@pytest.fixture(scope="module")
def reference(network: onnx.ModelProto) -> dict[str, Array]:
    """Every quantity by torch's autograd in float64."""
    x = torch.tensor(images(7)).double()
    module = Torch(network)
    rows = torch.func.vmap(torch.func.jacrev(lambda v: torch.softmax(module(v[None])[0], 0)))(x)
    logit_rows = torch.func.vmap(torch.func.jacrev(lambda v: module(v[None])[0]))(x)
    logits = module(x)
    order = logits.argsort(dim=1, descending=True)
    batch = torch.arange(len(x))
    top = logits[batch, order[:, 0]] - logits[batch, order[:, 1]]
    gradient = (logit_rows[batch, order[:, 0]] - logit_rows[batch, order[:, 1]]).flatten(1)
    probability = (rows[batch, order[:, 0]] - rows[batch, order[:, 1]]).flatten(1)
    lengths = rows.flatten(2).norm(dim=2)
    found = {
        "logits": logits,
        "probabilities": logits.softmax(1),
        "margin": top,
        "gradient_l2": gradient.norm(dim=1),
        "gradient_l1": gradient.abs().sum(1),
        "probability_gradient_l2": probability.norm(dim=1),
        "probability_gradient_l1": probability.abs().sum(1),
        "jacobian": lengths.max(1).values,
    }
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("score", ["jacobian", "combined", "radius", "margin-gradient", "jacobian-full"])
def test_outputs_agree_with_autograd(
    network: onnx.ModelProto, reference: dict[str, Array], score: Score
) -> None:
    found = run(guarded_model(network, score), images=images(7))
    left_out = (
        {"probability_gradient_l2", "probability_gradient_l1", "jacobian"}
        if score == "margin-gradient"
        else set()
    )
    assert found.keys() == reference.keys() - left_out
    for name, value in found.items():
        np.testing.assert_allclose(value, reference[name], rtol=2e-4, atol=1e-5, err_msg=name)


def test_linear_model_has_the_closed_form() -> None:
    weight = np.array([[1, 2, 3, 4], [4, 3, 2, 1], [0, 0, 0, 1]], np.float32)
    x = np.full((1, 1, 2, 2), 0.5, np.float32)
    x[0, 0, 0, 0] = 0
    found = run(guarded_model(linear(weight), "jacobian"), images=x)
    difference = weight[0] - weight[1]
    assert found["margin"] == pytest.approx(difference @ x.ravel())
    assert found["gradient_l2"] == pytest.approx(np.linalg.norm(difference))
    assert found["gradient_l1"] == pytest.approx(np.abs(difference).sum())


def test_batch_size_does_not_change_an_image(network: onnx.ModelProto) -> None:
    model = guarded_model(network, "jacobian")
    together = run(model, images=images(5))
    for i in range(5):
        alone = run(model, images=images(5)[i : i + 1])
        for name, value in together.items():
            np.testing.assert_allclose(alone[name][0], value[i], rtol=1e-4, atol=1e-6, err_msg=name)


def test_nan_pixels_give_nan_scores(network: onnx.ModelProto) -> None:
    x = images(2)
    x[1, 0, 0, 0] = np.nan
    found = run(guarded_model(network, "jacobian"), images=x)
    assert np.isfinite(found["jacobian"][0])
    assert np.isnan(found["jacobian"][1])
    assert np.isnan(found["gradient_l2"][1])


def test_vjp_is_linear_in_its_cotangents(network: onnx.ModelProto) -> None:
    model = vjp_model(network)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 10)).astype(np.float32)
    x = images(3)
    first, second, both = (run(model, images=x, cotangents=c)["gradient"] for c in (a, b, a + 2 * b))
    np.testing.assert_allclose(both, first + 2 * second, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", ["margin", "cross-entropy", "probability-margin"])
def test_losses_agree_with_autograd(network: onnx.ModelProto, loss: str) -> None:
    labels = np.array([0, 3, 9, 5], np.int64)
    x = torch.tensor(images(4)).double().requires_grad_()
    logits = Torch(network)(x)
    target = torch.tensor(labels)
    if loss == "cross-entropy":
        value = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    else:
        z = logits if loss == "margin" else logits.softmax(1)
        rival = z.scatter(1, target[:, None], -torch.inf).max(1).values
        value = rival - z.gather(1, target[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(value.sum(), x)
    found = run(loss_model(network, loss), images=images(4), labels=labels)  # type: ignore[arg-type]
    np.testing.assert_allclose(found["loss"], value.detach().numpy(), rtol=1e-4, atol=1e-6)
    scale = float(gradient.abs().max())
    np.testing.assert_allclose(found["gradient"], gradient.numpy(), atol=2e-4 * scale)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("loss", ["cross-entropy", "probability-margin"])
def test_gradients_keep_their_direction_where_one_class_is_almost_certain(loss: Loss, label: int) -> None:
    margins = np.array([0, 3, 5, 10, 15, 16, 17, 18, 20, 30, 40, 60, 80])
    weight = np.diag([100.0, 100.0, 100.0]) + np.array([[0, 50, 25], [25, 0, 50], [50, 25, 0]])
    wanted = np.stack([margins, 0 * margins, -1.0 - 0 * margins], axis=1)
    pixels = np.linalg.solve(weight, wanted.T).T.astype(np.float32)
    logits = pixels.astype(np.float64) @ weight.T
    model = loss_model(linear(weight, shape=(1, 1, 3)), loss)
    labels = np.full(len(margins), label, np.int64)
    found = run(model, images=pixels.reshape(-1, 1, 1, 3), labels=labels)

    # The same in float64, every 1 - p as the sum of the others.
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rest = np.stack([p[:, [1, 2]].sum(axis=1), p[:, [0, 2]].sum(axis=1), p[:, [0, 1]].sum(axis=1)], axis=1)
    other = 1 - label
    if loss == "cross-entropy":
        cotangents = p.copy()
        cotangents[:, label] = -rest[:, label]
        value = -np.log1p(-rest[:, label]) if label == 0 else -np.log(p[:, label])
        assert found["loss"] == pytest.approx(value, rel=2e-4)
    else:
        cotangents = -p * (p[:, other] - p[:, label])[:, None]
        cotangents[:, other] = p[:, other] * (rest[:, other] + p[:, label])
        cotangents[:, label] = -p[:, label] * (rest[:, label] + p[:, other])
    exact = cotangents @ weight
    error = np.linalg.norm(found["gradient"].reshape(-1, 3) - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert (error < 1e-4).all(), error
