"""Black-box attacks that see nothing but the answers of `POST /classify` to images of eight bits a channel.

A search for one image is a generator: it yields uploads that it wants answered, and is sent the answers.
`attack` runs the searches of many images side by side, so that their requests arrive together, counts what
each one asks, and keeps the nearest upload that was answered with a wrong class and accepted. What answers is
a function `query`, over a network (`http_query`) or in this process (`in_process`): the whole application
either way, decoding, batches and rounding included.

Uploads have the size of the model's input; a bundle that resizes uploads is attacked in their pixels.
"""

import asyncio
import io
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from guard.attacks import TINY, Floats, Found, Labels
from guard.bundle import ScoreName
from guard.decision import Guard
from guard.errors import GuardError
from guard.evaluation.attack import BUDGETS, SCORES, Attack, bound, named
from guard.evaluation.results import farthest
from guard.evaluation.served import JUDGED, judge
from guard.evaluation.target import Target
from guard.norms import NORMS, Norm

if TYPE_CHECKING:
    import httpx

Upload = NDArray[np.uint8]
"""An image (C, H, W) as it is sent, 0 to 255."""
Answer = Mapping[str, Any]
"""What `/classify` answers, from JSON."""
Query = Callable[[Sequence[Upload]], Sequence[Answer]]
Search = Generator[list[Upload], list[Answer], None]

TOGETHER = 32
"""Most requests under way at once, fewer than a server handles."""
TRIES = 5
"""Times that a busy server is asked again."""
QUERIES = 1000
"""Queries per image, by default."""
TOP_LEVEL = 255
SLACK = 1e-4
"""Of a level, that float32 may take from a bound of a whole level in linf; below `ROUNDING` in pixels."""
COARSE = 8
"""Cells along the longer side of the patterns that a walk is drawn from: smooth ones find more per query."""


def png(upload: Upload) -> bytes:
    """The upload (C, H, W), one or three channels, as a PNG file."""
    pixels = upload[0] if len(upload) == 1 else upload.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def http_query(client: "Callable[[], httpx.AsyncClient]") -> Query:
    """Asks the server that `client` makes clients of (`partial(httpx.AsyncClient, base_url=URL)`).

    Requests go out `TOGETHER` at a time; a busy server (429, 503, 504) is asked again. Raises `GuardError`
    where it goes on being busy or answers anything else than a decision, and `httpx.HTTPError` where it
    cannot be reached.
    """

    async def ask(session: "httpx.AsyncClient", free: asyncio.Semaphore, upload: Upload) -> Answer:
        async with free:
            for attempt in range(TRIES):
                answer = await session.post(
                    "/classify", content=png(upload), headers={"content-type": "image/png"}
                )
                if answer.status_code not in (429, 503, 504):
                    break
                await asyncio.sleep(0.1 * 2**attempt)
            if answer.status_code != 200:
                raise GuardError(
                    f"{answer.url}: answered {answer.status_code} ({answer.text[:200]}); expected 200 with a "
                    "decision. Does guard serve there, and with a model of this input?"
                )
            decision: Answer = answer.json()
            return decision

    async def all_of(uploads: Sequence[Upload]) -> list[Answer]:
        free = asyncio.Semaphore(TOGETHER)
        async with client() as session:
            return list(await asyncio.gather(*(ask(session, free, upload) for upload in uploads)))

    return lambda uploads: asyncio.run(all_of(uploads))


@contextmanager
def in_process(guard: Guard) -> Iterator[Query]:
    """The application around this guard, asked without a network; its log of requests is silent meanwhile.

    Uploads have the model's own size and are taken as they are, whatever size the bundle resizes others to.
    """
    import httpx

    from guard.http import Edge
    from guard.routes import PATHS, Routes
    from guard.worker import Settings, Worker

    manifest = guard.bundle.manifest
    as_they_are = manifest.preprocessing.model_copy(update={"resize": None})
    bundle = replace(guard.bundle, manifest=manifest.model_copy(update={"preprocessing": as_they_are}))
    settings = Settings(max_batch=TOGETHER)
    worker = Worker.of(Guard(bundle, guard.detector, guard.policy), settings)
    routes = Routes(lambda: worker)
    application = Edge(
        routes.application(),
        max_bytes=settings.max_bytes,
        upload_seconds=settings.upload_seconds,
        paths=PATHS,
    )

    def client() -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://guard")

    log = logging.getLogger("guard.http")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield http_query(client)
    finally:
        log.setLevel(level)
        worker.close()


@dataclass(frozen=True)
class Walked:
    """The nearest uploads that broke B images (B, C, H, W), if any did (B,), queries spent (B,), and those of
    them until the first success (B,; all where there was none).
    """

    uploads: Upload
    success: NDArray[np.bool_]
    queries: NDArray[np.int64]
    first: NDArray[np.int64]


def attack(
    query: Query,
    searches: Sequence[Search],
    images: Floats,
    labels: Labels,
    *,
    norm: Norm,
    queries: int = QUERIES,
    eps: float | None = None,
) -> Walked:
    """Runs the searches of B images side by side, each until it ends, has asked `queries` times, or has found
    a success: with `eps` one within it; without, until the queries are spent.
    """
    uploads = np.stack([rounded(image) for image in images]) if len(images) else images.astype(np.uint8)
    nearest, spent = np.full(len(images), np.inf), np.zeros(len(images), np.int64)
    first = np.zeros(len(images), np.int64)
    limit = np.inf if eps is None else farthest(eps)
    wanted = {number: next(search) for number, search in enumerate(searches)}
    while wanted:
        asked = {n: batch[: queries - int(spent[n])] for n, batch in wanted.items() if spent[n] < queries}
        answers = iter(query([upload for batch in asked.values() for upload in batch]))
        wanted = {}
        for n, batch in asked.items():
            got = [next(answers) for _ in batch]
            spent[n] += len(batch)
            for upload, answer in zip(batch, got, strict=True):
                first[n] += np.isinf(nearest[n]) or nearest[n] > limit
                far = size(floats(upload) - images[n], norm)
                if broken(answer, labels[n]) and far < nearest[n]:
                    uploads[n], nearest[n] = upload, far
            if nearest[n] <= (0.0 if eps is None else limit) or spent[n] >= queries:
                continue
            try:
                wanted[n] = searches[n].send(got)
            except StopIteration:
                continue
    return Walked(uploads, np.isfinite(nearest) & (nearest <= limit), spent, first)


def broken(answer: Answer, label: int) -> bool:
    """Whether an image of this true class was answered with another one and accepted."""
    return bool(answer["accepted"]) and int(answer["label"]) != int(label)


def floats(upload: Upload) -> Floats:
    """What the model is given for an upload (C, H, W)."""
    return upload.astype(np.float32) / np.float32(TOP_LEVEL)


def size(shift: Floats, norm: Norm) -> float:
    """Norm of one shift (C, H, W)."""
    return float(np.linalg.norm(shift.astype(np.float64).ravel(), ord=2 if norm == "l2" else np.inf))


def rounded(point: Floats) -> Upload:
    """The nearest upload to a point, of the same shape, inside the box."""
    return np.clip(np.rint(point * TOP_LEVEL), 0, TOP_LEVEL).astype(np.uint8)


def within(image: Floats, point: Floats, eps: float, norm: Norm) -> Upload:
    """An upload near the point and within eps of the image, if there is any: linf rounds inwards; in l2 the
    shift shrinks until the rounded one fits.
    """
    if norm == "linf":
        low, high = ((np.clip(image + side, 0, 1)) * TOP_LEVEL for side in (-eps, eps))
        return np.clip(rounded(point), np.ceil(low - SLACK), np.floor(high + SLACK)).astype(np.uint8)
    share = min(1.0, eps / max(size(point - image, norm), TINY))
    while size(floats(rounded(image + np.float32(share) * (point - image))) - image, norm) > farthest(eps):
        share = 0.97 * share if share > 0.01 else 0.0
        if share == 0.0:
            break
    return rounded(image + np.float32(share) * (point - image))


def pattern(shape: tuple[int, ...], generator: np.random.Generator) -> Floats:
    """A smooth random pattern (C, H, W) of unit l2 norm."""
    channels, height, width = shape
    cell = max(1, -(-max(height, width) // COARSE))
    grid = generator.standard_normal((channels, -(-height // cell), -(-width // cell)), dtype=np.float32)
    spread = np.kron(grid, np.ones((1, cell, cell), np.float32))[:, :height, :width]
    return np.asarray(spread / max(size(spread, "l2"), TINY), np.float32)


def decision_walk(
    image: Floats, label: int, norm: Norm, seed: Sequence[int], starts: Sequence[Floats] = ()
) -> Search:
    """HopSkipJump (Chen et al. 2020) on the answers' `label` and `accepted` alone: towards the nearest upload
    that is wrong and accepted, in l2 or linf.

    Starts at the first success among the image with smooth noise of growing strength and `starts`, the
    attacker's own images. Then in turn: bisection towards the image; the direction of the boundary there, by
    the answers to random smooth patterns; a step along it, halved until it is a success.
    """
    generator = np.random.default_rng(list(seed))

    def hits(points: Sequence[Floats]) -> Generator[list[Upload], list[Answer], NDArray[np.bool_]]:
        answers = yield [rounded(point) for point in points]
        return np.array([broken(answer, label) for answer in answers], np.bool_)

    point = None
    spread = np.sqrt(image.size)
    noisy = [
        image + strength * spread * pattern(image.shape, generator)
        for strength in np.repeat([0.1, 0.2, 0.3, 0.5], 8)
    ]
    for candidate in (*noisy, *starts):
        if (yield from hits([candidate])).any():
            point = floats(rounded(candidate))
            break
    if point is None:
        return
    for turn in count(1):
        low, high = 0.0, 1.0
        far = point
        # An eighth of a level is nothing to an upload.
        while (high - low) * size(far - image, "linf") > 0.125 / TOP_LEVEL:
            middle = (low + high) / 2
            between = _towards(image, far, middle, norm)
            if (yield from hits([between])).all():
                high, point = middle, floats(rounded(between))
            else:
                low = middle
        reach = size(point - image, norm)
        # Patterns have to move pixels by some levels to be seen at all.
        probe = max(0.1 * size(point - image, "l2"), 2 * spread / TOP_LEVEL)
        patterns = np.stack([pattern(image.shape, generator) for _ in range(int(10 * np.sqrt(turn)))])
        signs = 2.0 * (yield from hits([point + probe * one for one in patterns])) - 1
        if abs(signs.mean()) < 1:
            signs -= signs.mean()
        uphill = np.tensordot(signs, patterns, 1).astype(np.float32)
        uphill = np.sign(uphill) if norm == "linf" else uphill / np.float32(max(size(uphill, "l2"), TINY))
        step = reach / np.sqrt(turn)
        while step > 0.02 * reach:
            ahead = np.clip(point + np.float32(step) * uphill, 0, 1)
            if (yield from hits([ahead])).all():
                point = floats(rounded(ahead))
                break
            step /= 2


def _towards(image: Floats, point: Floats, share: float, norm: Norm) -> Floats:
    """The point drawn in to a share of its distance: along the segment in l2, by clipping in linf."""
    shift = point - image
    if norm == "l2":
        return image + np.float32(share) * shift
    bound = np.float32(share * size(shift, "linf"))
    return np.asarray(image + np.clip(shift, -bound, bound), np.float32)


def score_walk(image: Floats, label: int, norm: Norm, eps: float, seed: Sequence[int]) -> Search:
    """Random search within eps on exposed scores, as Square (Andriushchenko et al. 2020): a random window of
    the shift gets a new colour, and what does not lower the objective is taken back.

    The objective is the margin while the class is right, and then the logarithm of the detector's score over
    its threshold. An upload is always within eps. In linf windows are ±eps; in l2 they are added and the
    whole is scaled to eps.
    """
    generator = np.random.default_rng(list(seed))
    channels, height, width = image.shape
    if norm == "linf":  # vertical stripes
        stripes = generator.choice([-1.0, 1.0], size=(channels, 1, width))
        shift = np.broadcast_to(eps * stripes, image.shape).astype(np.float32)
    else:
        shift = eps * pattern(image.shape, generator)
    candidate = within(image, image + shift, eps, norm)
    best = objective((yield [candidate])[0], label)
    for turn in count():
        share = 0.3 * 0.5 ** min(5, np.log2(1 + turn / 40))
        side = max(1, round(np.sqrt(share * height * width)))
        high, wide = min(side, height), min(side, width)
        top, left = generator.integers(height - high + 1), generator.integers(width - wide + 1)
        window = (slice(None), slice(top, top + high), slice(left, left + wide))
        colour = generator.choice([-1.0, 1.0], size=(channels, 1, 1))
        changed = shift.copy()
        if norm == "linf":
            changed[window] = eps * colour
        else:
            changed[window] += eps * generator.uniform(0.3, 1.0) * colour / np.sqrt(channels * high * wide)
            changed *= np.float32(eps / max(size(changed, "l2"), TINY))
        candidate = within(image, image + changed, eps, norm)
        value = objective((yield [candidate])[0], label)
        if value <= best:
            shift, best = changed, value


def objective(answer: Answer, label: int) -> float:
    """What a search lowers: far above 0 while the class is right, below that the excess of the score.

    Where the server keeps the score to itself, the margin of the wrong class stands in for it.
    """
    margin = float(answer["certificate"]["margin"])
    if int(answer["label"]) == int(label):
        return 1e3 + margin
    detector = answer["detector"]
    tests = detector.get("tests", [detector])
    if any("score" not in test for test in tests):
        return 500.0 - margin
    ratios = [test["score"] / max(test["threshold"], TINY) for test in tests]
    return float(np.log(max(*ratios, TINY)))


Method = Literal["decisions", "scores"]


def walk(
    query: Query,
    images: Floats,
    labels: Labels,
    *,
    method: Method,
    norm: Norm,
    eps: float | None = None,
    queries: int = QUERIES,
    seed: int = 0,
) -> Walked:
    """The black-box attack on images (B, C, H, W): `decisions`, the nearest found, with or without a limit
    eps; `scores`, within eps. An image's search hangs on the seed and on the image's place in the batch.
    """
    searches: list[Search] = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        if method == "scores":
            searches.append(score_walk(image, int(label), norm, bound(eps), (seed, number)))
        else:
            donors = [images[other] for other in np.flatnonzero(labels != label)[:8]]
            searches.append(decision_walk(image, int(label), norm, (seed, number), donors))
    return attack(query, searches, images, labels, norm=norm, eps=eps, queries=queries)


def _run(
    target: Target,
    images: Floats,
    labels: Labels,
    budget: float | None,
    seed: int,
    *,
    method: Method,
    score: ScoreName,
    norm: Norm,
    queries: int,
) -> Found:
    with in_process(target.guards[score]) as query:
        found = walk(query, images, labels, method=method, norm=norm, eps=budget, queries=queries, seed=seed)
    attacked = np.stack([floats(upload) for upload in found.uploads]) if len(images) else images
    success = found.success.copy()
    rows = np.flatnonzero(success)
    if len(rows):
        success[rows] = judge(target, attacked[rows], labels[rows], score).success
    distance = np.array([size(shift, norm) for shift in attacked - images])
    return Found(attacked, success, np.where(success, distance, np.inf), JUDGED * found.first)


def _attack(method: Method, score: ScoreName, norm: Norm) -> Attack:
    return Attack(
        name=named(f"http-{method}", score, norm),
        title=f"Over HTTP, by {method}, against {score}",
        run=partial(_run, method=method, score=score, norm=norm, queries=QUERIES),
        norm=norm,
        knowledge=method,
        passes=QUERIES * JUDGED,
        source="Chen et al. 2020 (HopSkipJump)"
        if method == "decisions"
        else "Andriushchenko et al. 2020 (Square)",
        budgets=None if method == "decisions" else BUDGETS[norm],
        aware=score,
    )


ATTACKS: tuple[Attack, ...] = tuple(
    _attack(method, score, norm) for score in SCORES for method in get_args(Method) for norm in NORMS
)
