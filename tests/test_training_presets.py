"""Presets against the papers' tables, and the flags that override them."""

import json
import re
from collections import Counter
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.cli import main
from guard.errors import UsageError
from guard.training import grammar, loop, presets, schedules
from guard.training.loop import read_config
from guard.training.presets import MEASURES, PRESETS, preset
from guard.training.settings import Settings

Captured = pytest.CaptureFixture[str]

ARCHITECTURES = {
    "compact-resnet",
    "preactresnet18",
    "allcnn-c",
    "resnet34",
    "resnext34-2x32",
    "resnext34-4x32",
    "verification-cnn",
    "cw-cnn",
    "torchvision:resnet50",
}
DATASETS = {"cifar10", "cifar100", "mnist", None}


def figures(name: str) -> dict[str, float]:
    """The figures of a preset as `measure`, or `measure@at`; of several sources the first."""
    found: dict[str, float] = {}
    for figure in preset(name).figures:
        found.setdefault(f"{figure.measure}@{figure.at}" if figure.at else figure.measure, figure.value)
    return found


class TestEveryPreset:
    @pytest.fixture(params=sorted(PRESETS))
    def entry(self, request: pytest.FixtureRequest) -> presets.Preset:
        return preset(request.param)

    def test_has_regularizers_that_parse(self, entry: presets.Preset) -> None:
        for chosen in grammar.parse_all(entry.settings.regularizers):
            sizes = {"eps", "weight"} & set(signature(grammar.REGULARIZERS[chosen.name]).parameters)
            assert sizes <= set(chosen.settings)  # none is left to a default

    def test_makes_sense(self, entry: presets.Preset) -> None:
        entry.settings.check()
        assert entry.settings.architecture in ARCHITECTURES
        assert entry.dataset in DATASETS
        assert entry.settings.precision == "float32"
        assert entry.settings.held_out == Settings().held_out
        assert entry.settings.seed == Settings().seed

    def test_is_of_a_paper_that_it_names(self, entry: presets.Preset) -> None:
        paper, table = entry.source.split(" ", 1)
        assert paper == entry.paper
        assert re.fullmatch(r"(Table|Figure) \d(, \d)*", table)
        assert all(figure.source.startswith(f"{paper} ") for figure in entry.figures)

    def test_has_figures_of_known_measures(self, entry: presets.Preset) -> None:
        assert entry.figures or "mnist" in entry.name
        for figure in entry.figures:
            assert figure.measure in MEASURES
            if MEASURES[figure.measure].unit == "%":
                assert 0 <= figure.value <= 100
        counted = Counter((figure.measure, figure.at, figure.source) for figure in entry.figures)
        assert set(counted.values()) <= {1}


class TestAgainstThePapers:
    def test_counts_of_rows(self) -> None:
        counts = Counter((entry.paper, entry.dataset) for entry in PRESETS.values())
        assert counts == {
            ("LIP", "cifar10"): 25,  # Table 3: three networks, eight variants; FGSM of Table 1
            ("LIP", "cifar100"): 25,
            ("LIPGEN", "cifar10"): 6,
            ("LIPGEN", "cifar100"): 4,
            ("SCALE", "cifar10"): 17,  # nine of Table 1, four more of 2, four more of 4
            ("SCALE", None): 3,
            ("HAMMING", "cifar10"): 5,
            ("HAMMING", "mnist"): 1,
            ("MANIFOLD", "cifar10"): 5,
            ("MANIFOLD", "mnist"): 1,
        }

    def test_lip(self) -> None:
        """LIP A and the last rows of Tables 3 and 5."""
        common = Settings(
            architecture="resnext34-2x32",
            pre_logit_sigmoid=True,
            regularizers=("tulip:eps=0.01,weight=0.1",),
            epochs=200,
            batch_size=128,
            learning_rate=0.1,
            momentum=0.9,
            nesterov=False,
            weight_decay=5e-4,
            schedule="fifths",
            warmup=0.0,
            padding=4,
            mirror=True,
            cutout=16,
        )
        assert preset("lip-resnext34-tulip-sigmoid").settings == common
        assert figures("lip-resnext34-tulip-sigmoid") == {
            "median_l2": 0.56,
            "error": 4.08,
            "error@l2=0.1": 12.12,
        }
        on_cifar100 = replace(common, architecture="resnext34-4x32", epochs=300, schedule="tenths", cutout=8)
        assert preset("lip-cifar100-resnext34-tulip-sigmoid").settings == on_cifar100
        assert figures("lip-cifar100-resnext34-tulip-sigmoid") == {
            "error": 21.47,
            "error@l2=0.1": 42.58,
            "median_l2": 0.136,
        }
        assert preset("lip-allcnn-none").settings.architecture == "allcnn-c"
        assert preset("lip-resnet34-lipschitz").settings.regularizers == ("lipschitz:weight=0.1",)

    def test_lipgen_repeats_lip(self) -> None:
        """The figures by which the hyperparameters that LIP's text lacks were told."""
        pairs = [("undefended", "none"), ("0.01", "tv"), ("0.01-0.1", "tulip")]
        for prefix, shared in (("", ("error", "error@l2=0.1", "median_l2")), ("cifar100-", ("error",))):
            for ours, theirs in pairs:
                lipgen, lip = figures(f"lipgen-{prefix}{ours}"), figures(f"lip-{prefix}resnext34-{theirs}")
                assert [lipgen[name] for name in shared] == [lip[name] for name in shared]

    def test_lipgen(self) -> None:
        entry = preset("lipgen-0.01-0.1")
        assert entry.settings.regularizers == (
            "tv-l2:eps=0.01,form=penalty,h=0.001",
            "lipschitz:weight=0.1",
        )
        base = preset("lip-resnext34-none").settings
        assert replace(entry.settings, regularizers=("none",)) == base
        found = figures("lipgen-0.01-0.1")
        assert (found["max_jacobian"], found["mean_jacobian"], found["rejected@pgd"]) == (2.14, 0.10, 96)
        assert (found["error@pgd:l2=100/255"], found["error@i-fgsm:linf=8/255"]) == (59.8, 98.1)

    @pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("lipgen")])
    def test_medians_agree_with_the_errors_beside_them(self, name: str) -> None:
        """Half of the images are misclassified at the median, so more are beyond it."""
        found = figures(name)
        assert (found["median_linf"] < 8 / 255) == (found["error@linf=8/255"] > 50)
        assert (found["median_l2"] < 0.1) == (found["error@l2=0.1"] > 50)

    def test_fgsm_moves_as_far_as_the_l2_step(self) -> None:
        (text,) = preset("lip-resnext34-fgsm").settings.regularizers
        assert float(text.removeprefix("tv-l1:eps=")) == pytest.approx(0.01 / np.sqrt(3072), rel=0.01)

    def test_scale(self) -> None:
        l2, l1 = preset("scale-l2-0.1"), preset("scale-l1-1")
        assert l2.settings.regularizers == ("gradient-penalty-l2:weight=0.1,h=0.01",)
        assert l1.settings.regularizers == ("gradient-penalty-l1:weight=1,h=0.1",)
        found = figures("scale-l2-0.1")
        assert [found[name] for name in ("error", "l_bound", "omega_bound", "mean_l2")] == [
            8.03,
            0.14,
            0.34,
            0.63,
        ]
        found = figures("scale-l1-1")
        assert [found[name] for name in ("error", "error@linf=2/255", "error@linf=8/255")] == [
            9.02,
            18.47,
            58.69,
        ]
        base = Settings(
            architecture="resnext34-2x32",
            epochs=200,
            batch_size=128,
            learning_rate=0.1,
            nesterov=False,
            schedule="step",
            warmup=0.0,
            cutout=16,
        )
        assert preset("scale-undefended").settings == base
        assert [preset(f"scale-free-{replays}").settings.epochs for replays in (2, 8)] == [200, 200]
        assert preset("scale-imagenet-l2-1").settings.architecture == "torchvision:resnet50"
        assert figures("scale-imagenet-l2-1")["top5_error"] == 10.26

    def test_hamming(self) -> None:
        entry = preset("hamming-cifar10")
        assert entry.settings == Settings(
            architecture="preactresnet18",
            regularizers=(
                "stability:weight=0.8..8@0.2..0.8,eps=2/255..8/255@0.1..0.35",
                "hamming:weight=2400..24000@0.2..0.8,alpha=8,eps=2/255..8/255@0.1..0.35",
            ),
            epochs=100,
            batch_size=128,
            learning_rate=0.1,
            nesterov=False,
            schedule="three-slopes",
            warmup=0.0,
            cutout=0,
        )
        found = figures("hamming-cifar10")
        assert [found[name] for name in ("accuracy", "accuracy@autoattack:linf=8/255", "minutes")] == [
            72.1,
            36.8,
            252,
        ]
        assert figures("hamming-small")["verified@linf=8/255"] == 21.04
        assert preset("hamming-small").settings.architecture == "verification-cnn"
        assert preset("hamming-dense").settings.batch_size == 40
        mnist = preset("hamming-mnist")
        assert (mnist.dataset, mnist.settings.architecture, mnist.settings.mirror) == (
            "mnist",
            "cw-cnn",
            False,
        )
        assert all("eps=0.075..0.3@0.1..0.35" in text for text in mnist.settings.regularizers)

    def test_manifold_is_trained_as_hamming_is(self) -> None:
        for name, entry in PRESETS.items():
            if entry.paper == "MANIFOLD":
                assert entry.settings == preset(name.replace("manifold-", "hamming-")).settings
        assert figures("manifold-cifar10")["accuracy@autoattack:l2=0.5"] == 57.53


class TestChoosing:
    def test_an_unknown_name_gets_all_and_likely_ones(self) -> None:
        with pytest.raises(UsageError, match=r"'lipgen-0.1-01' \(near it: lipgen-0\.1-0\.1") as raised:
            preset("lipgen-0.1-01")
        assert all(name in str(raised.value) for name in PRESETS)
        with pytest.raises(UsageError, match=r"'~': expected one of "):
            preset("~")

    def test_by_the_start_of_the_name(self) -> None:
        assert {entry.paper for entry in presets.chosen("lipgen")} == {"LIPGEN"}
        assert len(presets.chosen("")) == len(PRESETS)
        with pytest.raises(UsageError, match="starts with 'x': expected one of lip, lipgen, scale, "):
            presets.chosen("x")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `guard train` would train, without training it; data sets are 50,000 images of nothing."""
    found: dict[str, Any] = {}

    def stop(training: object, settings: Settings, out: Path, **_: object) -> None:
        found["settings"] = settings
        raise UsageError("that is all")

    def load(name: str, **_: object) -> list[int]:
        found["dataset"] = name
        return [0] * 50_000

    monkeypatch.setattr(loop, "train", stop)
    monkeypatch.setattr(Settings, "check", lambda self: None)
    monkeypatch.setattr("guard.training.folders.load", load)
    monkeypatch.setattr("guard.training.folders.test_split", lambda *_: None)
    return found


def settings_of(asked: dict[str, Any], *words: str) -> Settings:
    main(["train", "--out", "nowhere", "--device", "cpu", *words])
    found: Settings = asked["settings"]
    return found


class TestFlags:
    def test_a_preset_alone(self, asked: dict[str, Any]) -> None:
        for name in ("lipgen-0.01-0.1", "hamming-mnist", "lip-cifar100-allcnn-sigmoid"):
            assert settings_of(asked, "--preset", name) == preset(name).settings
            assert asked["dataset"] == preset(name).dataset

    def test_no_preset_is_the_general_defaults(self, asked: dict[str, Any]) -> None:
        found = settings_of(asked, "--dataset", "cifar10", "--precision", "float32")
        assert found == Settings()

    def test_flags_take_the_place_of_a_presets(self, asked: dict[str, Any]) -> None:
        words = "--arch compact-resnet --width 8 --no-pre-logit-sigmoid --regularizer none --epochs 3 "
        words += "--batch-size 7 --learning-rate 0.3 --schedule cosine --warmup 0.1 --momentum 0 --nesterov "
        words += "--weight-decay 0 --held-out 5 --seed 6 --crop 0 --no-mirror --cutout 0 --precision bf16 "
        words += "--dataset cifar100"
        assert settings_of(asked, "--preset", "lip-resnext34-tulip-sigmoid", *words.split()) == Settings(
            width=8,
            regularizers=("none",),
            epochs=3,
            batch_size=7,
            learning_rate=0.3,
            schedule="cosine",
            warmup=0.1,
            momentum=0.0,
            nesterov=True,
            weight_decay=0.0,
            held_out=5,
            seed=6,
            padding=0,
            mirror=False,
            cutout=0,
            precision="bf16",
        )
        assert asked["dataset"] == "cifar100"

    def test_one_flag_leaves_the_rest(self, asked: dict[str, Any]) -> None:
        found = settings_of(asked, "--preset", "hamming-cifar10", "--epochs", "10")
        assert found == replace(preset("hamming-cifar10").settings, epochs=10)

    def test_digits_are_not_mirrored(self, asked: dict[str, Any]) -> None:
        assert not settings_of(asked, "--dataset", "mnist").mirror
        assert not settings_of(asked, "--dataset", "mnist", "--preset", "lip-allcnn-none").mirror
        assert not settings_of(asked, "--dataset", "data/mnist.npz").mirror
        assert settings_of(asked, "--dataset", "mnist", "--mirror").mirror

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--out", "x"], "--dataset is missing, and there is no --preset"),
            (["--preset", "scale-imagenet-l2-1", "--out", "x"], "--dataset is missing, and scale-imagenet"),
            (["--preset", "lipgen-0.01"], "--out is missing"),
            (["--preset", "lipgen-0.02", "--out", "x"], "unknown preset 'lipgen-0.02'"),
            (["--presets", "lips"], "no preset's name starts with 'lips'"),
        ],
    )
    def test_what_is_missing_is_said(self, words: list[str], message: str, capsys: Captured) -> None:
        assert main(["train", *words]) == 2
        assert capsys.readouterr().err.startswith(f"guard: error: {message}")

    def test_help_states_the_general_defaults(self, capsys: Captured) -> None:
        assert main(["train", "--help"]) == 0
        text = "".join(capsys.readouterr().out.split())  # lines may break at hyphens
        flags = {"architecture": "arch", "regularizers": "regularizer", "padding": "crop"}
        yes = {True: "yes", False: "no"}
        for field in fields(Settings):
            default = field.default
            if field.name == "precision" or default is None:  # which depend on more than the flag
                continue
            if isinstance(default, tuple):
                (default,) = default
            stated = yes[default] if isinstance(default, bool) else f"{default}"
            flag = flags.get(field.name, field.name.replace("_", "-"))
            assert re.search(rf"--{flag}(,--no-{flag})?((?!--).)*\(default:{stated}[,)]", text), field.name

    def test_help_names_all_schedules(self, capsys: Captured) -> None:
        assert main(["train", "--help"]) == 0
        assert ",".join(schedules.SCHEDULES) in "".join(capsys.readouterr().out.split())


class TestListing:
    def test_has_every_preset_with_its_figures(self, capsys: Captured) -> None:
        assert main(["train", "--presets"]) == 0
        text = capsys.readouterr().out
        assert main(["train", "--preset", "list"]) == 0
        assert capsys.readouterr().out == text
        lines = {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}
        assert set(PRESETS) <= set(lines)
        assert lines["lipgen-0.01-0.1"] == ["resnext34-2x32,", "200", "epochs"]
        assert "      gradient-penalty-l2:weight=1,h=0.01\n      Table 2, 3, 5, 6: error 20.31%," in text
        assert max(map(len, text.splitlines())) <= 80
        blocks = [line for line in text.splitlines() if line and not line.startswith(" ")]
        assert blocks[:3] == ["LIP, cifar10", "LIP, cifar100", "LIPGEN, cifar10"]

    def test_of_one_paper(self, capsys: Captured) -> None:
        assert main(["train", "--presets", "manifold"]) == 0
        text = capsys.readouterr().out
        assert "manifold-dense" in text
        assert "hamming-dense" not in text

    def test_of_one_preset_in_full(self, capsys: Captured) -> None:
        assert main(["train", "--presets", "hamming-dense"]) == 0
        text = capsys.readouterr().out
        assert "dense-manifold:weight=0.8..8@0.2..0.8,eps=2/255..8/255@0.1..0.35" in text
        assert re.search(r"batch size +40\n", text)
        assert re.search(r"accuracy at pgd:linf=8/255, % +35.04 +\(HAMMING Table 4\)\n", text)

    def test_for_machines(self, capsys: Captured) -> None:
        assert main(["train", "--presets", "scale", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["presets"]
        assert len(found) == 20
        assert found[0]["name"] == "scale-undefended"
        assert found[0]["settings"]["schedule"] == "step"
        assert found[0]["figures"][0] == {
            "measure": "error",
            "value": 4.36,
            "source": "SCALE Table 1",
            "at": "",
        }


def test_a_preset_trains(tmp_path: Path, capsys: Captured) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 3, 24)
    np.savez(tmp_path / "few.npz", x_train=images, y_train=labels, x_test=images[:5], y_test=labels[:5])
    command = (
        f"train --preset lip-resnext34-tv --dataset {tmp_path / 'few.npz'} --out {tmp_path / 'run'} --json"
    )
    # The recipe's network would take its time.
    assert main([*command.split(), "--arch", "compact-resnet", "--epochs", "2", "--batch-size", "8"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["curves"] == str(tmp_path / "run" / "curves.html")
    assert (tmp_path / "run" / "curves.html").is_file()
    settings = read_config(tmp_path / "run")["settings"]
    assert settings["regularizers"] == ["tv-l2:eps=0.01"]
    assert (settings["schedule"], settings["epochs"], settings["nesterov"]) == ("fifths", 2, False)
    assert read_config(tmp_path / "run")["provenance"]["arguments"]["preset"] == "lip-resnext34-tv"
