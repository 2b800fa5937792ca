"""Black-box attacks on the application itself, in process, and on answers of our own."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from guard.decision import Guard
from guard.errors import GuardError
from guard.evaluation import over_http, results
from guard.evaluation.over_http import ATTACKS, Answer, Upload
from guard.evaluation.results import ROUNDING
from guard.evaluation.target import Target
from guard.norms import Norm
from guard.settings import Policy
from tests.serving import GAIN, SHAPE, write_bundle

NORMS: tuple[Norm, Norm] = ("l2", "linf")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("over_http") / "colours")


@pytest.fixture(scope="module")
def guard(bundle: Path) -> Guard:
    return Guard.from_bundle(bundle, provider="cpu", policy=Policy())


def colours(count: int) -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Pictures of the three classes, a colour stronger than the others by a quarter, and accepted."""
    labels = np.arange(count) % 3
    images = np.full((count, *SHAPE), 0.375, np.float32)
    images[np.arange(count), labels] = 0.625
    return np.rint(images * 255).astype(np.float32) / np.float32(255), labels.astype(np.int64)


def planted(uploads: Sequence[Upload]) -> list[Answer]:
    """Label 1 and accepted where the first pixel is above 200, else label 0."""
    return [{"label": int(u.flat[0] > 200), "accepted": True} for u in uploads]


class Counting:
    """A query that remembers what was asked."""

    def __init__(self, query: over_http.Query) -> None:
        self.query = query
        self.asked: list[Upload] = []

    def __call__(self, uploads: Sequence[Upload]) -> Sequence[Answer]:
        self.asked += uploads
        return self.query(uploads)


def test_answers_in_process_are_the_decisions(guard: Guard, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "guard")
    uploads = np.random.default_rng(0).integers(0, 256, (40, *SHAPE)).astype(np.uint8)
    decisions = guard.classify(uploads.astype(np.float32) / np.float32(255))
    with over_http.in_process(guard) as query:
        answers = query(list(uploads))
        assert query([]) == []
    assert not [record for record in caplog.records if record.name == "guard.http"]
    for decision, answer in zip(decisions, answers, strict=True):
        assert answer["label"] == decision.label
        assert answer["accepted"] == decision.accepted
        assert answer["detector"]["score"] == pytest.approx(decision.detector.score, rel=1e-5)
        assert answer["request_id"]


def test_uploads_are_not_resized(guard: Guard) -> None:
    preprocessing = guard.bundle.manifest.preprocessing.model_copy(update={"resize": 3 * max(SHAPE)})
    manifest = guard.bundle.manifest.model_copy(update={"preprocessing": preprocessing})
    resizing = Guard(replace(guard.bundle, manifest=manifest), guard.detector, guard.policy)
    uploads = np.random.default_rng(0).integers(0, 256, (8, *SHAPE)).astype(np.uint8)
    decisions = guard.classify(uploads.astype(np.float32) / np.float32(255))
    with over_http.in_process(resizing) as query:
        answers = query(list(uploads))
    assert [answer["certificate"]["margin"] for answer in answers] == pytest.approx(
        [decision.certificate.margin for decision in decisions], rel=1e-4
    )


@pytest.mark.parametrize("norm", NORMS)
def test_decisions_alone_find_a_near_image(guard: Guard, norm: Norm) -> None:
    images, labels = colours(3)
    with over_http.in_process(guard) as query:
        counting = Counting(query)
        found = over_http.walk(counting, images, labels, method="decisions", norm=norm, queries=150)
    assert found.success.all()
    assert found.queries.tolist() == [150] * 3
    assert len(counting.asked) == 450
    # The class changes where two channels' means meet, accepted only some way beyond: GAIN is exact there.
    nearest = 0.25 / np.sqrt(2) * 8 if norm == "l2" else 0.125
    assert GAIN * 0.25 == 3.0
    for upload, image, label in zip(found.uploads, images, labels, strict=True):
        (decision,) = guard.classify(over_http.floats(upload)[None])
        assert decision.accepted
        assert decision.label != label
        distance = over_http.size(over_http.floats(upload) - image, norm)
        assert nearest < distance < (2.5 if norm == "l2" else 4.0) * nearest


@pytest.mark.parametrize("norm", NORMS)
def test_scores_lead_to_an_accepted_image_within_the_budget(guard: Guard, norm: Norm) -> None:
    images, labels = colours(3)
    eps = 4.2 if norm == "l2" else 0.3
    with over_http.in_process(guard) as query:
        counting = Counting(query)
        options: dict[str, Any] = {"method": "scores", "norm": norm, "queries": 120, "seed": 3}
        found = over_http.walk(counting, images, labels, eps=eps, **options)
        shorter = Counting(query)
        over_http.walk(shorter, images, labels, eps=eps, **options | {"queries": 1})
    assert found.success.all()
    first = [np.stack(asked[:3]) for asked in (counting.asked, shorter.asked)]
    assert (first[0] == first[1]).all()
    assert found.queries.max() <= 120
    assert len(counting.asked) == found.queries.sum()
    with over_http.in_process(guard) as query:
        for image, label in zip(images, labels, strict=True):
            alone = Counting(query)
            over_http.walk(alone, image[None], label[None], eps=eps, **options)
            sizes = [over_http.size(over_http.floats(upload) - image, norm) for upload in alone.asked]
            assert max(sizes) <= results.farthest(eps)
    for upload, label in zip(found.uploads, labels, strict=True):
        (decision,) = guard.classify(over_http.floats(upload)[None])
        assert decision.accepted
        assert decision.label != label


def test_a_search_stops_at_its_budget_of_queries_and_keeps_the_nearest() -> None:
    image = np.zeros((1, *SHAPE), np.float32)
    wide, near = np.full(SHAPE, 255, np.uint8), np.zeros(SHAPE, np.uint8)
    near.flat[0] = 255

    def search() -> over_http.Search:
        yield [wide, near]
        yield [wide]
        yield [wide, wide, wide]
        raise AssertionError("asked on after its budget")

    counting = Counting(planted)
    found = over_http.attack(counting, [search()], image, np.array([0]), norm="l2", queries=5)
    assert (found.queries.tolist(), found.first.tolist()) == ([5], [1])
    assert len(counting.asked) == 5
    assert (found.uploads[0] == near).all()
    within = over_http.attack(planted, [search()], image, np.array([0]), norm="l2", queries=5, eps=1.0)
    assert (within.success.tolist(), within.queries.tolist(), within.first.tolist()) == ([True], [2], [2])
    short = over_http.attack(planted, [search()], image, np.array([0]), norm="l2", queries=5, eps=0.9)
    assert not short.success.any()
    assert short.first.tolist() == [5]


def test_one_that_finds_no_start_gives_up() -> None:
    image = np.zeros((1, *SHAPE), np.float32)

    def never(uploads: Sequence[Upload]) -> list[Answer]:
        return [{"label": 1, "accepted": False} for _ in uploads]

    found = over_http.walk(never, image, np.array([0]), method="decisions", norm="l2")
    assert not found.success.any()
    assert found.queries[0] == 32
    assert (found.uploads == 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_uploads_within_a_budget(norm: Norm) -> None:
    generator = np.random.default_rng(0)
    image = generator.random(SHAPE, dtype=np.float32)
    for eps in (0.2, 1.0) if norm == "l2" else (2 / 255, 8 / 255):
        point = image + generator.standard_normal(SHAPE, dtype=np.float32)
        upload = over_http.within(over_http.floats(over_http.rounded(image)), point, eps, norm)
        distance = over_http.size(over_http.floats(upload) - over_http.floats(over_http.rounded(image)), norm)
        assert 0.5 * eps < distance <= results.farthest(eps)


@pytest.mark.parametrize("norm", NORMS)
def test_no_upload_is_farther_than_results_allow(norm: Norm) -> None:
    image = np.zeros(SHAPE, np.float32)
    point = over_http.floats(np.full(SHAPE, 30, np.uint8))
    eps = over_http.size(point, norm) - 2e-6 * (1 + over_http.size(point, norm))
    upload = over_http.within(image, point, eps, norm)
    assert 0.9 * eps < over_http.size(over_http.floats(upload), norm) <= eps * (1 + ROUNDING) + ROUNDING

    def asked() -> over_http.Search:
        yield [over_http.rounded(point)]

    def broken(uploads: Sequence[Upload]) -> list[Answer]:
        return [{"accepted": True, "label": 1} for _ in uploads]

    labels = np.zeros(1, np.int64)
    found = over_http.attack(broken, [asked()], image[None], labels, norm=norm, eps=eps)
    assert not found.success.any()
    found = over_http.attack(broken, [asked()], image[None], labels, norm=norm, eps=eps + 2e-6 * (1 + eps))
    assert found.success.all()


def test_what_a_search_lowers() -> None:
    right = {"label": 0, "accepted": True, "certificate": {"margin": 2.0}, "detector": {"threshold": 1.0}}
    wrong = right | {"label": 1, "accepted": False, "detector": {"score": 4.0, "threshold": 2.0}}
    hidden = wrong | {"detector": {"threshold": 2.0}}
    tests = [{"score": 1.0, "threshold": 2.0}, {"score": 9.0, "threshold": 3.0}]
    both = wrong | {"detector": {"score": 3.0, "threshold": 1.0, "tests": tests}}
    assert over_http.objective(right, 0) == 1002.0
    assert over_http.objective(wrong, 0) == pytest.approx(np.log(2))
    assert over_http.objective(both, 0) == pytest.approx(np.log(3))
    assert over_http.objective(hidden, 0) == 498.0


def test_a_busy_server_is_asked_again_and_an_error_ends_it() -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if len(seen) == 1:
            return httpx.Response(429, json={})
        return httpx.Response(200, json={"label": 2, "accepted": True})

    def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(413, text="too large")

    upload = np.zeros((1, 4, 4), np.uint8)
    client = partial(httpx.AsyncClient, base_url="http://guard")
    query = over_http.http_query(lambda: client(transport=httpx.MockTransport(answer)))
    assert query([upload]) == [{"label": 2, "accepted": True}]
    assert [request.url.path for request in seen] == ["/classify"] * 2
    with pytest.raises(GuardError, match="answered 413"):
        over_http.http_query(lambda: client(transport=httpx.MockTransport(refuse)))([upload])


def test_attacks_have_their_one_shape(guard: Guard) -> None:
    images, labels = colours(2)
    by_name = {attack.name: attack for attack in ATTACKS}
    assert len(by_name) == len(ATTACKS) == 5 * 2 * 2
    assert by_name["http-decisions-l2"].budgets is None
    attack = by_name["http-scores-linf"]
    found = attack.run(Target(guard.detector, {"jacobian": guard}), images, labels, 0.3, 0)
    assert found.success.all()
    assert (found.distance <= 0.3 * (1 + 1e-5)).all()
    assert found.passes is not None
    assert (found.passes < attack.passes).all(), "what was asked, not what might have been"
