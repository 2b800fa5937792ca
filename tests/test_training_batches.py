"""Batches are functions of their place, whether they come from memory or from files."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guard import images as uploads
from guard.data import Dataset
from guard.errors import DataError, TrainingError, UsageError
from guard.training import folders
from guard.training.batches import (
    InMemory,
    Streamed,
    channel_statistics,
    evaluation,
    prepare,
    usual_workers,
    worker_failures,
)
from guard.training.folders import ImageFiles
from tests.colours import TINY, dataset

SETTINGS = replace(TINY, held_out=4, batch_size=4, padding=2)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Nine pictures of each of two colours in train, two in val, no two of one size."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 2)):
        for number, name in enumerate(("blue", "red")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 100, (20 + index, 34 - index, 3), dtype=np.uint8)
                pixels[..., 2 - 2 * number] += 150
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "photos"


def streamed(folder: Path, *, held_out: int = 4, workers: int = 0) -> Streamed:
    files = folders.load(folder, image_size=16)
    assert isinstance(files, ImageFiles)
    return Streamed(files, replace(SETTINGS, held_out=held_out), "cpu", workers=workers)


class TestInMemory:
    def test_an_epoch_shows_every_image_at_most_once_and_none_held_out(self) -> None:
        data = dataset()
        images = np.zeros_like(data.images)
        images[..., 0] = np.arange(70)[:, None, None]  # an image's level is its number
        batches = InMemory(replace(data, images=images), replace(TINY, padding=0, cutout=0), "cpu")
        orders = []
        for epoch in range(2):
            numbers: list[int] = []
            for step in range(batches.steps):
                floats, labels = batches.at(epoch, step)
                assert floats.shape == (8, 3, 8, 8)
                assert floats.is_contiguous(memory_format=torch.channels_last)
                chosen = (floats[:, 0, 0, 0] * 255).round().long()
                assert data.labels is not None
                assert (labels.numpy() == data.labels[chosen.numpy()]).all()
                numbers += chosen.tolist()
            assert len(set(numbers)) == len(numbers) == 56
            assert max(numbers) < 60
            orders.append(numbers)
        assert orders[0] != orders[1]

    def test_images_sorted_by_class_lose_no_class_to_those_held_out(self) -> None:
        data = dataset()
        assert data.labels is not None
        order = np.argsort(data.labels, kind="stable")
        folder = replace(data, images=data.images[order], labels=data.labels[order])
        first, second = (InMemory(folder, replace(TINY, held_out=20), "cpu") for _ in range(2))
        held_out = [batches.held_out.labels for batches in (first, second)]
        assert held_out[0] is not None
        assert held_out[1] is not None
        for part in (first.labels, held_out[0]):
            assert set(part.tolist()) == {0, 1, 2}
        np.testing.assert_array_equal(held_out[0], held_out[1])
        bright = first.images.float().mean((1, 2)).argmax(1)
        assert torch.equal(bright, first.labels)
        unsorted = InMemory(data, replace(TINY, held_out=20), "cpu")
        np.testing.assert_array_equal(unsorted.held_out.labels, data.labels[-20:])

    def test_a_batch_is_a_function_of_its_place(self) -> None:
        first, second = (InMemory(dataset(), TINY, "cpu") for _ in range(2))
        second.at(4, 0)
        assert torch.equal(first.at(2, 3)[0], second.at(2, 3)[0])
        assert not torch.equal(first.at(2, 3)[0], first.at(2, 4)[0])
        places = [(1, 1), (1, 2), (2, 1), (1, 1, 1)]
        draws = [torch.rand(1, generator=first.draws(*place)).item() for place in places]
        assert draws[0] == torch.rand(1, generator=second.draws(1, 1)).item()
        assert len(set(draws)) == len(draws)

    def test_cutout_paints_the_mean(self) -> None:
        batches = InMemory(dataset(), replace(TINY, cutout=20), "cpu")
        images, _ = batches.at(0, 0)
        assert images.flatten(2).std(2).max() < 1e-6
        torch.testing.assert_close(images[0, :, 0, 0], torch.tensor(batches.mean))

    def test_channel_statistics(self) -> None:
        images = dataset().images
        mean, deviation = channel_statistics(images)
        np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)))
        np.testing.assert_allclose(deviation, (images / 255).std((0, 1, 2)))
        constant = channel_statistics(np.full((2, 4, 4, 1), 51, np.uint8))
        assert constant[0] == pytest.approx([0.2])
        assert constant[1][0] > 0


class TestStreamed:
    def test_an_epoch_shows_every_image_at_most_once_and_none_held_out(self, photographs: Path) -> None:
        batches = streamed(photographs)
        assert (batches.steps, batches.size, batches.shape) == (3, 4, (3, 16, 16))
        assert len(batches.held_out) == 4
        assert isinstance(batches.held_out, ImageFiles)
        assert set(batches.held_out.labels.tolist()) == {0, 1}
        for epoch in range(2):
            shown = [int(image) for number in range(3) for image in batches._order.batch(epoch, number)]
            assert len(set(shown)) == 12
        for number in range(3):
            images, labels = batches.at(0, number)
            assert images.shape == (4, 3, 16, 16)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert images.dtype == torch.float32
            bright = images.mean((2, 3)).argmax(1)  # channel 2 is blue, class 0; channel 0 red, class 1
            assert (bright == 2 - 2 * labels).all()

    def test_a_batch_is_a_function_of_its_place(self, photographs: Path) -> None:
        first, second = streamed(photographs), streamed(photographs)
        in_order = {(epoch, number): first.at(epoch, number)[0] for epoch in (0, 1) for number in range(3)}
        for place in ((1, 1), (1, 2), (0, 2), (0, 2), (1, 0)):
            torch.manual_seed(3)
            assert torch.equal(second.at(*place)[0], in_order[place])
        assert len({images.sum().item() for images in in_order.values()}) == 6

    def test_workers_bring_the_same_and_leave_the_random_state_alone(self, photographs: Path) -> None:
        here = streamed(photographs)
        there = streamed(photographs, workers=2)
        before = torch.get_rng_state()
        for place in ((0, 1), (0, 2), (1, 0), (1, 1), (0, 0)):
            found, expected = there.at(*place), here.at(*place)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
        assert torch.equal(before, torch.get_rng_state())

    def test_evaluation_is_what_a_server_sees(self, photographs: Path) -> None:
        training = folders.load(photographs, image_size=16)
        test = folders.test_split(photographs, training)
        assert isinstance(test, ImageFiles)
        assert test.resize == 18  # 16 * 256 / 224
        (images, labels), *rest = evaluation(test, "cpu")
        assert not rest
        assert labels.tolist() == [0, 0, 1, 1]
        for path, image in zip(test.paths, images, strict=True):
            served = uploads.decode(path.read_bytes(), (3, 16, 16), resize=18)
            np.testing.assert_allclose(image.numpy(), served, atol=1e-6)

    def test_statistics_are_those_of_the_images(self, photographs: Path) -> None:
        batches = streamed(photographs, held_out=0)
        files = folders.load(photographs, image_size=16)
        assert isinstance(files, ImageFiles)
        pixels = np.stack([folders.as_served(files, number).numpy() for number in range(18)])
        mean, deviation = channel_statistics(pixels)
        assert batches.mean == pytest.approx(mean)
        assert batches.deviation == pytest.approx(deviation)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_damaged_file_is_named(self, photographs: Path, workers: int) -> None:
        files = folders.load(photographs, image_size=16)
        assert isinstance(files, ImageFiles)
        batches = Streamed(files, replace(SETTINGS, held_out=0, batch_size=18), "cpu", workers=workers)
        path = photographs / "train" / "red" / "3.png"
        path.write_bytes(path.read_bytes()[:900])  # the header is sound
        with pytest.raises(DataError, match=r"3\.png: .*damaged.*Replace or remove it") as caught:
            batches.at(0, 0)
        assert "\n" not in str(caught.value)

    def test_a_worker_that_is_killed(self) -> None:
        """torch raises this error wherever the process is when the signal comes: too unruly for a test."""
        with (
            pytest.raises(TrainingError, match=r"failed \(DataLoader .*Killed\.\) Lower --workers"),
            worker_failures(),
        ):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.\nmore")
        with pytest.raises(RuntimeError, match="another"), worker_failures():
            raise RuntimeError("another")

    def test_a_signal_to_stop_leaves_workers_alive(self, photographs: Path) -> None:
        batches, expected = streamed(photographs, workers=1), streamed(photographs)
        before = set(active_children())
        batches.at(0, 0)
        (worker,) = set(active_children()) - before
        assert worker.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
        for place in [(epoch, number) for epoch in range(1, 9) for number in range(3)]:
            assert torch.equal(batches.at(*place)[0], expected.at(*place)[0])
        batches.close()
        assert set(active_children()) <= before


class TestFolders:
    def test_images_of_one_size_stay_in_memory(self, tmp_path: Path) -> None:
        write(tmp_path, lambda index: (8, 6))
        found = folders.load(tmp_path)
        assert isinstance(found, Dataset)
        assert found.images.shape == (6, 6, 8, 3)
        assert isinstance(prepare(found, replace(TINY, held_out=0, batch_size=2), "cpu"), InMemory)
        listed = folders.load(tmp_path, in_memory=6 * 6 * 8 * 3 - 1)
        assert isinstance(listed, ImageFiles)
        assert (listed.shape, listed.resize) == ((6, 8, 3), None)
        for number in range(6):
            np.testing.assert_array_equal(folders.as_served(listed, number), found.images[number])
        batches = prepare(listed, replace(TINY, held_out=0, batch_size=2), "cpu")
        assert batches.at(0, 0)[0].shape == (2, 3, 6, 8)

    def test_unchanged_images_are_streamed_as_they_are(self, tmp_path: Path) -> None:
        write(tmp_path, lambda index: (8, 6))
        found, listed = folders.load(tmp_path), folders.load(tmp_path, in_memory=1)
        plain = replace(TINY, held_out=0, batch_size=2, padding=0, cutout=0, mirror=False)
        assert isinstance(found, Dataset)
        known = {found.images[number].tobytes() for number in range(6)}
        batches = prepare(listed, plain, "cpu")
        shown = [(255 * image).round().byte() for number in range(3) for image in batches.at(0, number)[0]]
        assert {image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in shown} == known

    def test_sizes_that_differ_are_brought_to_one(self, tmp_path: Path) -> None:
        write(tmp_path, lambda index: (300 + index, 260))
        found = folders.load(tmp_path)
        assert isinstance(found, ImageFiles)
        assert (found.shape, found.resize) == ((224, 224, 3), 256)
        smaller = folders.load(tmp_path, image_size=32)
        assert isinstance(smaller, ImageFiles)
        assert (smaller.shape, smaller.resize) == ((32, 32, 3), 37)

    def test_the_images_own_size_may_be_given(self, tmp_path: Path) -> None:
        write(tmp_path, lambda index: (8, 8))
        assert isinstance(folders.load(tmp_path, image_size=8), Dataset)

    def test_names_and_sizes_are_the_digest(self, tmp_path: Path) -> None:
        write(tmp_path, lambda index: (30 + index, 30))
        digest = folders.load(tmp_path, image_size=16).digest
        assert folders.load(tmp_path, image_size=8).digest == digest
        (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / "9.png")
        assert folders.load(tmp_path, image_size=16).digest != digest

    def test_test_images_are_numbered_as_the_training_classes(self, tmp_path: Path) -> None:
        write(tmp_path / "train", lambda index: (30 + index, 30))
        write(tmp_path / "test", lambda index: (30 + index, 30), classes=("dog",))
        training = folders.load(tmp_path)
        test = folders.test_split(tmp_path, training)
        assert test is not None
        assert test.labels is not None
        assert test.labels.tolist() == [1, 1, 1]
        (tmp_path / "test" / "dog").rename(tmp_path / "test" / "cow")
        with pytest.raises(DataError, match="'cow' is none of the model's"):
            folders.test_split(tmp_path, training)
        shutil.rmtree(tmp_path / "test")
        write(tmp_path / "test", lambda index: (30 + index, 30), classes=(".",))
        assert folders.test_split(tmp_path, training) is None, "it has no labels"

    def test_refuses(self, tmp_path: Path) -> None:
        write(tmp_path, lambda index: (30 + index, 30))
        with pytest.raises(UsageError, match="--image-size is 4: expected 8 to 4096 pixels"):
            folders.load(tmp_path, image_size=4)
        (tmp_path / "cat" / "b.jpg").write_bytes(b"\xff\xd8\xff no more")
        with pytest.raises(DataError, match=r"b\.jpg: is no PNG, JPEG, WebP or BMP image, or is damaged"):
            folders.load(tmp_path)
        (tmp_path / "cat" / "b.jpg").unlink()
        (tmp_path / "emu").mkdir()
        with pytest.raises(DataError, match="emu: holds no image"):
            folders.load(tmp_path)
        (tmp_path / "flat").mkdir()
        with pytest.raises(DataError, match="flat: holds no image"):
            folders.load(tmp_path / "flat")
        Image.new("RGB", (9, 9)).save(tmp_path / "flat" / "a.png")
        with pytest.raises(DataError, match="flat: has no labels"):
            folders.load(tmp_path / "flat")

    def test_arrays_keep_their_size(self, tmp_path: Path) -> None:
        arrays = {"x_train": np.zeros((4, 8, 6, 3), np.uint8), "y_train": np.array([0, 1, 0, 1])}
        np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
        assert isinstance(folders.load(tmp_path / "a.npz"), Dataset)
        with pytest.raises(UsageError, match="--image-size is 16, but the images of a are arrays of 8 x 6"):
            folders.load(tmp_path / "a.npz", image_size=16)

    def test_random_parts_cover_what_they_should(self) -> None:
        """A picture whose pixels are its coordinates shows which part was taken."""
        rows, columns = np.mgrid[0:200, 0:200]
        picture = Image.fromarray(np.stack([rows, columns, columns], 2).astype(np.uint8))
        areas, ratios = [], []
        for seed in range(60):
            part = folders._random_part(picture, (50, 50), torch.Generator().manual_seed(seed)).double()
            height, width = (part[..., axis].max() - part[..., axis].min() for axis in (0, 1))
            areas.append(float(height * width) / 40_000)
            ratios.append(float(width / height))
        assert 0.05 < min(areas) < 0.2 < 0.7 < max(areas) <= 1
        assert 0.7 < min(ratios) < 0.85 < 1.15 < max(ratios) < 1.4


def write(
    folder: Path, size: Callable[[int], tuple[int, int]], classes: tuple[str, ...] = ("cat", "dog")
) -> None:
    """Three pictures of each class, of the widths and heights that `size` gives."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(3):
            width, height = size(index)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def test_workers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = usual_workers()
    assert 1 <= alone <= 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert usual_workers() == 1


def test_an_archive_without_labels_says_so(tmp_path: Path) -> None:
    path = tmp_path / "unlabelled.npz"
    np.savez(path, x_train=np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(
        DataError, match=r"unlabelled\.npz: has no labels, the array 'y_train'\. Expected x_train"
    ):
        folders.load(path)
