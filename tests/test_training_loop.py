"""The training loop on data sets and networks of a few pixels."""

import json
import re
import resource
import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from guard import files
from guard.errors import DataError, TrainingError, UsageError
from guard.training import architectures, checkpoint, curves, distributed, grammar, loop
from guard.training.batches import prepare
from guard.training.loop import Run, read_metrics, train
from guard.training.passes import Passes, compiled
from tests.colours import TINY, Plain, WithDropout, dataset


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", WithDropout)
    monkeypatch.setitem(architectures.ARCHITECTURES, "plain", Plain)
    small = partial(architectures.CompactResNet, width=4)
    monkeypatch.setitem(architectures.ARCHITECTURES, "small", small)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "checkpoint.pt").model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.ARCHITECTURES, "tiny", WithDropout)
        train(dataset(), TINY, out, test=dataset(seed=1))
    return out


class Killed(BaseException):
    """What a stopped process leaves behind is what was written before."""


class TestTraining:
    def test_learns_and_writes_everything(self, tmp_path: Path) -> None:
        settings = replace(TINY, architecture="small", epochs=5)
        result = train(
            dataset(), settings, tmp_path / "run", test=dataset(40, seed=1), arguments={"epochs": 5}
        )
        assert result.test_accuracy is not None
        assert result.test_accuracy > 0.8
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["settings"] == json.loads(json.dumps(asdict(settings)))
        assert config["data"]["digest"] == "digest"
        assert config["data"]["class_names"] == ["red", "green", "blue"]
        assert config["data"]["shape"] == [3, 8, 8]
        assert config["provenance"]["arguments"] == {"epochs": 5}
        assert torch.__version__.startswith(config["provenance"]["versions"]["torch"])
        *epochs, tested = read_metrics(tmp_path / "run")
        assert [line["epoch"] for line in epochs] == [1, 2, 3, 4, 5]
        assert epochs[-1]["loss"] < 0.7 * epochs[0]["loss"]
        assert {"data", "gradient_l2", "lipschitz", "train_accuracy", "held_out_accuracy"} <= set(epochs[0])
        assert tested == {"test_accuracy": result.test_accuracy, "test_images": 40}
        state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
        assert (state.epoch, state.step) == (5, 0)

    def test_a_run_in_the_working_folder_has_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "mine").mkdir()
        monkeypatch.chdir(tmp_path / "mine")
        train(dataset(), replace(TINY, epochs=1), Path())
        assert "<h1>mine</h1>" in Path("curves.html").read_text()

    def test_the_seed_decides(self, tmp_path: Path) -> None:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            torch.manual_seed(len(name))  # the caller's random state has no say
            train(dataset(), replace(TINY, epochs=1, seed=seed), tmp_path / name)
        first, second, third = (weights(tmp_path / name)["classifier.weight"] for name in "abc")
        assert torch.equal(first, second)
        assert not torch.equal(first, third)

    def test_leaves_the_callers_random_state_alone(self, tmp_path: Path) -> None:
        torch.manual_seed(9)
        before = torch.get_rng_state()
        train(dataset(), replace(TINY, epochs=1), tmp_path / "run")
        assert torch.equal(torch.get_rng_state(), before)

    def test_in_bf16(self, tmp_path: Path) -> None:
        result = train(dataset(), replace(TINY, epochs=1, precision="bf16"), tmp_path / "run")
        assert np.isfinite(result.metrics["loss"])
        assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "run").values())

    def test_fewer_images_than_a_batch(self, tmp_path: Path) -> None:
        settings = replace(TINY, epochs=1, batch_size=500, held_out=0)
        result = train(dataset(20), settings, tmp_path / "run")
        assert "held_out_accuracy" not in result.metrics

    def test_tells_regularizers_how_far_it_is_and_replays_batches(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Passes] = []
        loss = grammar.regularized_loss

        def looked_at(chosen: list[grammar.Regularizer], passes: Passes) -> Any:
            seen.append(passes)
            return loss(chosen, passes)

        monkeypatch.setattr(grammar, "regularized_loss", looked_at)
        settings = replace(TINY, regularizers=("free-linf:eps=0.1,replays=3", "stability:weight=0..1"))
        train(dataset(), settings, tmp_path / "run")
        assert [passes.progress for passes in seen] == [(step + 0.5) / 14 for step in range(14)]
        same = [torch.equal(one.images, other.images) for one, other in pairwise(seen)]
        assert same == [True, True, False] * 2 + [False] + [True, True, False] * 2  # an epoch has 7 steps

    def test_draws_the_curves_anew_after_every_epoch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish_epoch, pages = Run.finish_epoch, []

        def looked_at(run: Run, *given: Any) -> dict[str, float]:
            pages.append((tmp_path / "run" / "curves.html").read_text())
            return finish_epoch(run, *given)

        monkeypatch.setattr(Run, "finish_epoch", looked_at)
        train(dataset(), TINY, tmp_path / "run", test=dataset(seed=1))
        pages.append((tmp_path / "run" / "curves.html").read_text())
        found = [re.findall(r"run: (\d) of 2 epochs", page) for page in pages]
        assert found == [["0"], ["1"], ["2"]]
        assert ["refresh" in page for page in pages] == [True, True, False]
        assert ["test accuracy" in page for page in pages] == [False, False, True]


def test_a_compiled_run_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "compiled", partial(compiled, backend="aot_eager"))
    settings = replace(TINY, architecture="plain", regularizers=("tulip:eps=0.1,weight=0.1",), epochs=1)
    for name, fast in (("plain", False), ("compiled", True)):
        train(dataset(), replace(settings, compile=fast), tmp_path / name)
    expected, found = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


class TestAccumulation:
    def test_sums_over_the_batch_know_how_many_parts_there_are(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A part's sum, times their number, averages to the sum over the whole batch."""
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        settings = replace(TINY, accumulate=4, batch_size=16)
        bound = grammar.parse_all(settings.regularizers)
        batches = prepare(dataset(), settings, "cpu")
        run = Run(Plain(batches.mean, batches.deviation, 3), bound, batches, settings, tmp_path)
        assert run.passes(*batches.at(0, 0), 1).parts == 8

    @pytest.mark.parametrize("regularizer", ["tv-l2:eps=0.1", "gradient-penalty-l2:weight=0.5"])
    def test_parts_make_the_same_step(self, regularizer: str, tmp_path: Path) -> None:
        """Without BatchNorm, and but for the order in which float32 numbers are added."""
        settings = replace(
            TINY, architecture="plain", regularizers=(regularizer,), epochs=1, held_out=0, precision="float32"
        )
        train(dataset(), settings, tmp_path / "whole")
        train(dataset(), replace(settings, accumulate=4), tmp_path / "parts")
        expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        first, second = (read_metrics(tmp_path / name)[0] for name in ("whole", "parts"))
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)

    def test_the_lipschitz_term_is_the_mean_of_the_parts_maxima(self, tmp_path: Path) -> None:
        settings = replace(
            TINY, architecture="plain", regularizers=("lipschitz:weight=1",), batch_size=60, epochs=1
        )
        train(dataset(), replace(settings, accumulate=3), tmp_path / "run")
        batches = prepare(dataset(), replace(settings, accumulate=3), "cpu")
        torch.manual_seed(settings.seed)
        model = Plain(batches.mean, batches.deviation, 3)
        images, labels = batches.at(0, 0)
        points = images.requires_grad_()
        (gradient,) = torch.autograd.grad(
            torch.nn.functional.cross_entropy(model(points), labels, reduction="sum"), points
        )
        maxima = gradient.flatten(1).norm(dim=1).view(3, 20).amax(1)
        assert read_metrics(tmp_path / "run")[0]["lipschitz"] == pytest.approx(maxima.mean().item(), rel=1e-4)

    def test_a_nan_in_one_part_names_the_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Breaks(WithDropout):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                self.calls = getattr(self, "calls", 0) + 1
                return super().forward(images) * (float("nan") if self.calls == 20 else 1)

        monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", Breaks)
        settings = replace(TINY, regularizers=("none",), held_out=0, accumulate=2)  # 8 steps of 2 passes
        with pytest.raises(TrainingError, match=r"epoch 2, step 2 \(loss nan, data nan\)"):
            train(dataset(64), settings, tmp_path / "run")
        state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
        assert (state.epoch, state.step) == (1, 0)

    def test_float32_is_float32(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[bool] = []
        step = Run.one_step

        def looked_at(run: Run, learning_rate: float) -> dict[str, float]:
            seen.append(torch.backends.cudnn.allow_tf32)
            return step(run, learning_rate)

        monkeypatch.setattr(Run, "one_step", looked_at)
        for precision in ("float32", "bf16"):  # beside bf16 passes too
            train(dataset(), replace(TINY, epochs=1, precision=precision), tmp_path / precision)
        assert set(seen) == {False}
        assert torch.backends.cudnn.allow_tf32

    def test_hamming_without_relus_is_refused_before_the_run(self, tmp_path: Path) -> None:
        settings = replace(TINY, architecture="plain", regularizers=("hamming:weight=1",))
        with pytest.raises(UsageError, match="what goes into ReLUs, and this network has none"):
            train(dataset(), settings, tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestResume:
    @pytest.fixture
    def uninterrupted(self, whole: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(whole, tmp_path / "whole"))

    @pytest.mark.parametrize(("steps", "seconds"), [(1, 300.0), (1, 0.0), (4, 0.0), (9, 300.0), (9, 0.0)])
    def test_bit_by_bit_after_a_kill_anywhere(
        self,
        steps: int,
        seconds: float,
        uninterrupted: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """An epoch has 7 steps; checkpoints are written after every step, or after every epoch."""
        one_step, done = Run.one_step, 0

        def limited(run: Run, learning_rate: float) -> dict[str, float]:
            nonlocal done
            if done == steps:
                raise Killed
            done += 1
            return one_step(run, learning_rate)

        monkeypatch.setattr(Run, "one_step", limited)
        with pytest.raises(Killed):
            train(dataset(), TINY, tmp_path / "run", checkpoint_seconds=seconds)
        monkeypatch.setattr(Run, "one_step", one_step)
        train(dataset(), TINY, tmp_path / "run", test=dataset(seed=1), resume=True)
        expected, found = weights(uninterrupted), weights(tmp_path / "run")
        assert set(expected) == set(found)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        for one, other in zip(read_metrics(uninterrupted), read_metrics(tmp_path / "run"), strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}

    def test_with_what_regularizers_keep(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The free perturbation, one for each part of a batch."""
        settings = replace(TINY, regularizers=("free-linf:eps=0.1,replays=3",), accumulate=2)
        train(dataset(), settings, tmp_path / "whole")
        one_step, done = Run.one_step, 0

        def limited(run: Run, learning_rate: float) -> dict[str, float]:
            nonlocal done
            if done == 4:
                raise Killed
            done += 1
            return one_step(run, learning_rate)

        monkeypatch.setattr(Run, "one_step", limited)
        with pytest.raises(Killed):
            train(dataset(), settings, tmp_path / "run", checkpoint_seconds=0)
        kept = checkpoint.load(tmp_path / "run" / "checkpoint.pt").processes[0].state
        assert {name: tensor.shape for name, tensor in kept.items()} == {
            f"free_perturbation_{part}": (4, 3, 8, 8) for part in range(2)
        }
        monkeypatch.setattr(Run, "one_step", one_step)
        train(dataset(), settings, tmp_path / "run", resume=True)
        expected, found = weights(tmp_path / "whole"), weights(tmp_path / "run")
        assert all(torch.equal(expected[name], found[name]) for name in expected)

    def test_of_a_finished_run_changes_nothing(self, uninterrupted: Path) -> None:
        before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
        result = train(dataset(), TINY, uninterrupted, test=dataset(seed=1), resume=True)
        assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before
        assert result.metrics["epoch"] == 2

    def test_draws_the_curves_from_the_files_alone(self, uninterrupted: Path) -> None:
        before = (uninterrupted / "curves.html").read_text()
        (uninterrupted / "curves.html").unlink()
        train(dataset(), TINY, uninterrupted, test=dataset(seed=1), resume=True)
        assert (uninterrupted / "curves.html").read_text() == before
        assert before == curves.page("whole", loop.read_config(uninterrupted), read_metrics(uninterrupted))

    def test_the_config_of_something_else_stays(self, tmp_path: Path) -> None:
        config = tmp_path / "config.json"
        for text in ('{"mine": "not guard"}', "not json"):
            config.write_text(text)
            with pytest.raises(UsageError, match=r"its config\.json is of no run\. Give another --out"):
                train(dataset(), TINY, tmp_path)
            assert config.read_text() == text

    def test_needs_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(UsageError, match=r"notes\.txt: is a file; expected the folder of a run"):
            train(dataset(), TINY, tmp_path / "notes.txt")

    def test_is_asked_for(self, uninterrupted: Path) -> None:
        with pytest.raises(UsageError, match="holds a run already"):
            train(dataset(), TINY, uninterrupted)

    def test_with_other_settings_is_refused(self, uninterrupted: Path) -> None:
        with pytest.raises(UsageError, match="was started with --epochs 2, now it is 4"):
            train(dataset(), replace(TINY, epochs=4), uninterrupted, resume=True)
        with pytest.raises(UsageError, match="was started with --crop 1, now it is 0"):
            train(dataset(), replace(TINY, padding=0), uninterrupted, resume=True)
        with pytest.raises(UsageError, match=r"--regularizer \S+, now it is none tv-l1:eps=0\.1\."):
            train(
                dataset(), replace(TINY, regularizers=("none", "tv-l1:eps=0.1")), uninterrupted, resume=True
            )

    def test_before_a_checkpoint_there_is_nothing_to_keep(self, whole: Path, tmp_path: Path) -> None:
        out = tmp_path / "whole"
        with pytest.raises(TrainingError, match=r"not finite .* no checkpoint yet: start anew\.$"):
            train(dataset(), replace(TINY, learning_rate=1e30), out)
        train(dataset(), TINY, out)
        expected, found = weights(whole), weights(out)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert loop.read_config(out)["settings"]["learning_rate"] == TINY.learning_rate

    def test_with_other_data_is_refused(self, uninterrupted: Path) -> None:
        with pytest.raises(UsageError, match=r"other data \(digest 'digest', now 'other'\)"):
            train(replace(dataset(), digest="other"), TINY, uninterrupted, resume=True)

    def test_of_a_damaged_checkpoint_is_refused(self, uninterrupted: Path) -> None:
        path = uninterrupted / "checkpoint.pt"
        for content in (path.read_bytes()[:1000], b"", b"not a checkpoint"):
            path.write_bytes(content)
            with pytest.raises(TrainingError, match=r"checkpoint\.pt: is damaged"):
                train(dataset(), TINY, uninterrupted, resume=True)

    def test_of_a_run_from_before_a_setting(self, uninterrupted: Path) -> None:
        path = uninterrupted / "config.json"
        config = json.loads(path.read_text())
        del config["settings"]["nesterov"]
        path.write_text(json.dumps(config))
        train(dataset(), TINY, uninterrupted, resume=True)
        with pytest.raises(UsageError, match="was started with --nesterov yes, now it is no"):
            train(dataset(), replace(TINY, nesterov=False), uninterrupted, resume=True)

    def test_of_another_network_is_refused(
        self, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wider = partial(architectures.CompactResNet, width=3)
        monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", wider)
        with pytest.raises(TrainingError, match="belongs to another network"):
            train(dataset(), TINY, uninterrupted, resume=True)

    def test_of_deleted_metrics_goes_on_without_them(self, uninterrupted: Path) -> None:
        path = uninterrupted / "metrics.jsonl"
        *_, second, tested = path.read_text().splitlines()
        path.write_text(f"{second}\n{tested}\n")  # the first epoch's line was deleted before the second
        result = train(dataset(), TINY, uninterrupted, test=dataset(seed=1), resume=True)
        assert path.read_text().splitlines() == [second, tested]
        assert result.metrics["epoch"] == 2

    def test_of_damaged_metrics_is_refused(self, uninterrupted: Path) -> None:
        (uninterrupted / "metrics.jsonl").write_text('{"epoch": 1\n')
        with pytest.raises(TrainingError, match=r"metrics\.jsonl: is damaged"):
            train(dataset(), TINY, uninterrupted, resume=True)

    @pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "curves.html"])
    def test_what_something_else_left_there_stays(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match=rf"holds {re.escape(name)} of something else\. Give another"):
            train(dataset(), TINY, tmp_path, resume=True)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]

    def test_a_log_in_its_folder_is_no_hindrance(self, tmp_path: Path) -> None:
        (tmp_path / "log.txt").write_text("mine")
        train(dataset(), TINY, tmp_path)
        assert (tmp_path / "log.txt").read_text() == "mine"

    def test_one_process_at_a_time(self, uninterrupted: Path) -> None:
        before = (uninterrupted / "checkpoint.pt").read_bytes()
        lock = uninterrupted / loop.LOCK
        with (
            files.locked(lock, "the first"),
            pytest.raises(UsageError, match=r"another guard train is writing there \(process \d+\)"),
        ):
            train(dataset(), TINY, uninterrupted, resume=True)
        assert (uninterrupted / "checkpoint.pt").read_bytes() == before
        assert not lock.exists()

    def test_of_a_damaged_config_is_refused(self, uninterrupted: Path) -> None:
        (uninterrupted / "config.json").write_text('{"settings": 1}')
        with pytest.raises(TrainingError, match=r"config\.json: is damaged"):
            train(dataset(), TINY, uninterrupted, resume=True)


class TestFailures:
    def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(self, tmp_path: Path) -> None:
        settings = replace(TINY, learning_rate=1e20, warmup=0.0)
        with pytest.raises(TrainingError, match=r"not finite (at|before) epoch 1, step \d.*--learning-rate"):
            train(dataset(), settings, tmp_path / "run", checkpoint_seconds=0.0)
        if (tmp_path / "run" / "checkpoint.pt").exists():
            assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())

    def test_a_nan_names_the_step_and_the_terms(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Breaks(WithDropout):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                self.calls = getattr(self, "calls", 0) + self.training
                return super().forward(images) * (float("nan") if self.calls > 9 else 1)

        monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", Breaks)
        settings = replace(TINY, regularizers=("none",), held_out=0)  # 8 steps an epoch
        with pytest.raises(TrainingError, match=r"epoch 2, step 2 \(loss nan, data nan\)"):
            train(dataset(64), settings, tmp_path / "run")
        state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
        assert (state.epoch, state.step) == (1, 0)
        assert all(torch.isfinite(value).all() for value in state.model.values())

    def test_a_full_disk_keeps_the_checkpoint_before(self, whole: Path, tmp_path: Path) -> None:
        path = Path(shutil.copytree(whole, tmp_path / "run")) / "checkpoint.pt"
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        try:
            with pytest.raises(TrainingError, match=r"cannot be written.*--resume"):
                checkpoint.save(checkpoint.load(path), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir() if "partial" in entry.name] == []

    def test_a_full_disk_that_takes_no_metrics_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(path: Path, text: str) -> None:
            if path.name == loop.METRICS:
                raise OSError(28, "No space left on device")
            written(path, text)

        written = files.write_text
        monkeypatch.setattr(files, "write_text", full)
        with pytest.raises(TrainingError, match=r"metrics.jsonl: cannot be written \(No space .*--resume"):
            train(dataset(), TINY, tmp_path / "run")

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="no such checkpoint"):
            checkpoint.load(tmp_path / "checkpoint.pt")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": None}, "colours: has no labels"),
            ({"class_names": ("red", "green")}, "labels run from 0 to 2; expected numbers of 2 classes"),
            ({"labels": np.full(70, -1)}, "labels run from -1 to -1"),
            ({"labels": np.arange(70) % 2}, r"class 'blue' \(number 2\) has no training image"),
            ({"labels": np.zeros(3, np.int64)}, "70 images but 3 labels"),
            ({"labels": np.zeros(70, np.int64), "class_names": ("red",)}, "has 1 class; expected two"),
            ({"images": np.zeros((70, 8, 8, 3), np.float32)}, r"float32 \(70, 8, 8, 3\); expected uint8"),
            ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "expected uint8"),
        ],
    )
    def test_data_that_cannot_be_trained_on(
        self, change: dict[str, object], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(DataError, match=message):
            train(replace(dataset(), **change), TINY, tmp_path / "run")  # type: ignore[arg-type]
        assert not (tmp_path / "run").exists()

    def test_test_images_of_another_size(self, tmp_path: Path) -> None:
        grey = replace(dataset(), images=dataset().images[..., :1])
        with pytest.raises(DataError, match=r"test images are \(8, 8, 1\), training images \(8, 8, 3\)"):
            train(dataset(), TINY, tmp_path / "run", test=grey)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"epochs": 0}, "--epochs is 0: expected 1 or more"),
            ({"batch_size": 1}, "--batch-size is 1"),
            ({"accumulate": 0}, "--accumulate is 0: expected 1 or more"),
            (
                {"accumulate": 3},
                "--batch-size is 8, .* --accumulate 3: expected a multiple of 3, and 6 images",
            ),
            ({"accumulate": 8}, "expected a multiple of 8, and 16 images or more"),
            ({"learning_rate": float("nan")}, "--learning-rate is nan"),
            ({"learning_rate": 0.0}, "--learning-rate is 0.0: expected a number above 0"),
            ({"momentum": 1.0}, "--momentum is 1.0"),
            ({"weight_decay": -1.0}, "--weight-decay is -1.0"),
            ({"schedule": "linear"}, "--schedule is linear: expected one of one-cycle, cosine"),
            ({"warmup": 1.0}, "--warmup is 1.0"),
            ({"padding": -1}, "--crop is -1"),
            ({"padding": 8}, "--crop is 8, for images of 8 x 8 pixels: expected less than 8"),
            ({"cutout": -1}, "--cutout is -1"),
            ({"held_out": -1}, "--held-out is -1"),
            ({"held_out": 69}, "holding out 69 of 70 training images leaves 1"),
            ({"seed": -1}, "--seed is -1"),
            ({"seed": 2**63}, "--seed is 9223372036854775808: expected 0 or more, below 2.63"),
            ({"architecture": "vgg"}, "unknown architecture 'vgg'"),
            ({"regularizers": ("tulp",)}, "unknown regularizer 'tulp'"),
            (
                {"regularizers": ("tv-l2:eps=0.1", "tulip:eps=0.1,weight=1")},
                "tv-l2:eps=0.1 and tulip:eps=0.1,weight=1 each train on other points",
            ),
        ],
    )
    def test_settings_that_make_no_sense(
        self, change: dict[str, object], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=message):
            train(dataset(), replace(TINY, **change), tmp_path / "run")  # type: ignore[arg-type]
        assert not (tmp_path / "run").exists()

    def test_devices_and_precisions(self) -> None:
        assert loop.chosen_device("cpu") == "cpu"
        assert loop.chosen_device("auto") in {"cpu", "cuda"}
        assert loop.chosen_precision("bf16", "cpu") == "bf16"
        assert loop.chosen_precision("auto", "cpu") in {"bf16", "float32"}
        assert loop.chosen_precision("auto", "cpu", ["gradient-penalty-l2:weight=1,h=0.01"]) == "float32"
        for name in ("gpu", "cuda:99"):
            with pytest.raises(UsageError, match=f"--device {name}: .*Give cpu or cuda"):
                loop.chosen_device(name)
        with pytest.raises(UsageError, match="--device meta: expected cpu or cuda"):
            loop.chosen_device("meta")

    def test_emulated_bf16_is_not_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def supported(*, including_emulation: bool = True) -> bool:
            return including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        assert loop.chosen_precision("auto", "cuda:1") == "float32"


class TestOptimizer:
    def test_nesterov_is_a_setting(self, tmp_path: Path) -> None:
        batches = prepare(dataset(), TINY, "cpu")
        for given, momentum, expected in ((True, 0.9, True), (False, 0.9, False), (True, 0.0, False)):
            settings = replace(TINY, nesterov=given, momentum=momentum)
            run = Run(nn.Linear(2, 2), [], batches, settings, tmp_path / "checkpoint.pt")
            assert [group["nesterov"] for group in run.optimizer.param_groups] == [expected] * 2

    def test_the_rate_is_never_0(self, whole: Path) -> None:
        *_, last, _ = read_metrics(whole)
        assert 0 < last["learning_rate"] < 0.1 * 0.1
