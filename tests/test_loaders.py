"""What holds for every loader: the same images in the same order, and nothing left behind."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from made_data import made_npz
from torch import Tensor

from reat_fast.data import ImageSet, load_dataset, make_splits
from reat_fast.kernels.prepare import prepare
from reat_fast.loaders import Loader, choose, resident
from reat_fast.loaders.choose import LOADERS, make_loader
from reat_fast.loaders.draws import FreshDraws
from reat_fast.loaders.order import EpochOrder
from reat_fast.sources.beton_file import read_beton
from reat_fast.sources.beton_folder import write_beton
from reat_fast.sources.lazy import FileImages

CPU = torch.device("cpu")
NAMES = [name for name in LOADERS if name != "auto"]
PACKAGES = {"ffcv": "ffcv", "dali": "nvidia.dali"}
SEED = 7


class Part(NamedTuple):
    """A part of a data set, and where the same images lie in a .beton file."""

    images: ImageSet
    beton: Path
    rows: np.ndarray


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    """Draw train, held-out and test parts of a long-tailed set, and write its .beton files."""
    folder = tmp_path_factory.mktemp("loaders")
    dataset = load_dataset("npz", made_npz(folder / "made.npz"))
    splits = make_splits(dataset, imbalance=0.2, held_out=0.2)
    betons = {"train": folder / "train.beton", "test": folder / "test.beton"}
    if importlib.util.find_spec("ffcv") is not None:  # without it no test reads them
        write_beton(betons["train"], dataset.train.images, dataset.train.labels)
        write_beton(betons["test"], dataset.test.images, dataset.test.labels)
    return {
        "train": Part(splits.train, betons["train"], splits.train_indices),
        "held-out": Part(splits.held_out, betons["train"], splits.held_out_indices),
        "test": Part(splits.test, betons["test"], np.arange(len(splits.test))),
    }


@pytest.fixture(params=NAMES)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Loader]]:
    """Make loaders of one kind, and close them after the test; skips where its package is not."""
    name = request.param
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"needs {PACKAGES[name]}")
    if name == "ffcv":
        from ffcv.pipeline.compiler import Compiler

        Compiler.set_enabled(False)  # compiling takes seconds for each loader
    made: list[Loader] = []

    def make(part: Part, device: torch.device = CPU, batch_size: int = 16, **order: int) -> Loader:
        images, beton, rows = part
        ordered = EpochOrder(images.labels, batch_size, seed=SEED, **order)  # type: ignore[arg-type]
        made.append(make_loader(images, ordered, device, loader=name, beton=beton, rows=rows)[0])
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def augmented(loader: Loader, epoch: int, first: int = 0) -> list[tuple[Tensor, ...]]:
    """Return each batch of an epoch as the step sees it: clean, start, labels, indices."""
    # All batches are kept before the first is looked at, as nothing may be written over.
    return [
        (*prepare(b.images, b.indices, SEED, epoch, 8 / 255, gather=b.gather), b.labels, b.indices)
        for b in list(loader.epoch(epoch, first))
    ]


def expected(part: Part, epoch: int, batch_size: int = 16) -> list[tuple[Tensor, ...]]:
    images, labels = torch.from_numpy(part.images.images), torch.from_numpy(part.images.labels)
    order = EpochOrder(part.images.labels, batch_size, seed=SEED)
    return [
        (*prepare(images[rows], rows, SEED, epoch, 8 / 255, gather=False), labels[rows], rows)
        for rows in order.batches(epoch)
    ]


def assert_equal(found: list[tuple[Tensor, ...]], wanted: list[tuple[Tensor, ...]]) -> None:
    assert len(found) == len(wanted)
    for batch, truth in zip(found, wanted, strict=True):
        for value, true_value in zip(batch, truth, strict=True):
            assert value.dtype == true_value.dtype and torch.equal(value.cpu(), true_value)


def test_an_image_that_is_drawn_often_is_augmented_anew_each_time(
    parts: dict[str, Part],
) -> None:
    part = parts["train"]
    images, labels = torch.from_numpy(part.images.images), torch.from_numpy(part.images.labels)
    order = EpochOrder(labels, 16, sampler="class-balanced", seed=SEED)
    shown = order.indices(1)
    found = []
    for name in ("resident", "workers"):
        loader, _ = make_loader(part.images, order, CPU, loader=name)
        found = augmented(loader, 1)
        assert_equal(augmented(loader, 1, first=2), found[2:])
        loader.close()
        wanted = [
            (*prepare(images[rows], places, SEED, 1, 8 / 255, gather=False), labels[rows], places)
            for rows, places in zip(shown.split(16), order.places(), strict=True)
        ]
        assert torch.equal(torch.cat([batch[3].cpu() for batch in found]), torch.arange(len(shown)))
        assert_equal(found, wanted)
    often = shown.bincount().argmax()
    starts = torch.cat([batch[1].cpu() for batch in found])[shown == often]
    assert len(starts) > 3 and len(starts.flatten(1).unique(dim=0)) == len(starts)


def test_the_places_of_draws_are_made_on_the_device_and_not_copied_there(
    parts: dict[str, Part],
) -> None:
    part = parts["train"].images
    loader, _ = make_loader(part, EpochOrder(part.labels, 16), CPU, loader="resident")
    drawn = next(FreshDraws(loader, torch.device("meta")).epoch(0, first=1))
    assert drawn.indices.is_meta and drawn.indices.shape == (16,)
    assert torch.equal(drawn.images, next(FreshDraws(loader, CPU).epoch(0, first=1)).images)


def test_the_parts_of_a_batch_have_the_places_of_the_whole() -> None:
    labels = torch.arange(37) % 3
    whole = EpochOrder(labels, 10, sampler="square-root")
    parts = [EpochOrder(labels, 10, sampler="square-root", rank=k, world=3) for k in range(3)]
    for k, places in enumerate(whole.places(first=1)):
        shares = [list(part.places(first=1))[k] for part in parts]
        assert torch.equal(torch.cat(shares), places)


@pytest.mark.parametrize("name", ["train", "held-out", "test"])
def test_every_loader_gives_the_same_images_in_the_same_order_after_augmentation(
    make: Callable[..., Loader], parts: dict[str, Part], name: str
) -> None:
    loader = make(parts[name])
    for epoch in range(2):
        found = augmented(loader, epoch)
        assert len(found) == len(loader.order)
        assert_equal(found, expected(parts[name], epoch))


def test_an_epoch_goes_on_from_any_batch(
    make: Callable[..., Loader], parts: dict[str, Part]
) -> None:
    loader, whole = make(parts["train"]), expected(parts["train"], 1)
    for first in (3, len(whole) - 1, len(whole), 0):
        assert_equal(augmented(loader, 1, first), whole[first:])


@pytest.mark.parametrize("world", [2, 5])
def test_the_ranks_show_together_what_one_shows(
    make: Callable[..., Loader], parts: dict[str, Part], world: int
) -> None:
    part = parts["train"]
    # The last batch has 3 images, so the last two of five ranks get none of it.
    part = part._replace(images=part.images.take(np.arange(51)), rows=part.rows[:51])
    loaders = [make(part, rank=rank, world=world) for rank in range(world)]
    shares = [augmented(loader, 0) for loader in loaders]
    assert {len(share) for share in shares} == {4}
    together = [
        tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*shares, strict=True)
    ]
    assert_equal(together, expected(part, 0))


def test_an_abandoned_epoch_leaves_nothing_behind(
    make: Callable[..., Loader], parts: dict[str, Part]
) -> None:
    def resources() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    loader, whole = make(parts["train"], batch_size=4), expected(parts["train"], 1, batch_size=4)
    list(loader.epoch(0))  # what a loader starts once, it has started now
    before = resources()
    for number in range(20):
        for taken, _ in enumerate(loader.epoch(0)):
            if taken == number % 3:
                break
    assert_equal(augmented(loader, 1), whole)
    # Batches read ahead, at most 8, hold a file each for a moment; a leak would be 20.
    assert all(now - then < 10 for now, then in zip(resources(), before, strict=True))


@pytest.mark.gpu
def test_a_gpu_gets_the_same_bytes(make: Callable[..., Loader], parts: dict[str, Part]) -> None:
    loader = make(parts["train"], device=torch.device("cuda"))
    for epoch in range(2):
        batches = list(loader.epoch(epoch))
        truth = list(EpochOrder(parts["train"].images.labels, 16, seed=SEED).batches(epoch))
        for batch, rows in zip(batches, truth, strict=True):
            assert batch.images.is_cuda and batch.labels.is_cuda and batch.indices.is_cuda
            images = batch.images[batch.indices] if batch.gather else batch.images
            assert np.array_equal(images.cpu().numpy(), parts["train"].images.images[rows.numpy()])
            assert np.array_equal(batch.labels.cpu().numpy(), parts["train"].images.labels[rows])
            assert torch.equal(batch.indices.cpu(), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["instance", "class-balanced"])
def test_the_next_batch_does_not_wait_for_the_step_before(
    make: Callable[..., Loader], parts: dict[str, Part], sampler: Any
) -> None:
    loader = make(parts["train"], device=torch.device("cuda"), sampler=sampler)
    list(loader.epoch(0))  # what a loader starts once, it has started now
    batches = loader.epoch(1)
    next(batches)
    torch.cuda._sleep(2 * 10**9)  # type: ignore[no-untyped-call]  # a second of a GPU or more
    step = torch.cuda.Event()
    step.record()
    next(batches)
    assert not step.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["resident", "dali", "workers"])
def test_image_files_of_the_right_size_are_the_same_from_every_loader(
    tmp_path: Path, name: str
) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"needs {PACKAGES[name]}")
    pixels = np.random.RandomState(0).randint(0, 256, (10, 8, 8, 3)).astype(np.uint8)
    paths = [tmp_path / f"{number}.png" for number in range(10)]
    for path, image_pixels in zip(paths, pixels, strict=True):
        image.fromarray(image_pixels).save(path)
    files = ImageSet(FileImages(paths, 8), np.arange(10) % 3)
    loader, _ = make_loader(files, EpochOrder(files.labels, 4, seed=SEED), CPU, loader=name)
    arrays = Part(ImageSet(pixels, files.labels), Path(), np.arange(10))
    assert_equal(augmented(loader, 0), expected(arrays, 0, batch_size=4))
    loader.close()


def test_a_set_in_memory_is_shared_not_copied_on_a_cpu(parts: dict[str, Part]) -> None:
    images = parts["train"].images
    loader, reason = make_loader(images, EpochOrder(images.labels, 16), CPU)
    (batch, *_) = loader.epoch(0)
    assert batch.gather and np.shares_memory(batch.images.numpy(), images.images)
    size = images.images.nbytes / 1e6
    assert reason == f"loader resident: {len(images)} images, {size:.1f} MB, fit on cpu"


def test_what_fits_in_half_of_the_free_memory_is_resident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FileImages([tmp_path / "a.png"] * 10, 8)  # of 1920 bytes
    labels = np.zeros(10, np.int64)
    free = [3840]
    monkeypatch.setattr(resident, "free_bytes", lambda device: free[0])
    assert resident.shortage(ImageSet(files, labels), CPU) is None
    free[0] = 3839
    message = (
        r"^--loader resident: 10 images take 0.0 GB, more than half of the 0.0 GB that are free on "
        r"cpu; use --loader ffcv or --loader workers$"
    )
    with pytest.raises(ValueError, match=message):
        make_loader(ImageSet(files, labels), EpochOrder(labels, 2), CPU, loader="resident")


@pytest.mark.parametrize(
    ("installed", "beton", "name", "reason"),
    [
        (["ffcv", "nvidia.dali"], True, "ffcv", "; FFCV reads them from train.beton"),
        (["nvidia.dali"], True, "dali", "; FFCV is not installed, DALI is installed"),
        (["ffcv", "nvidia.dali"], False, "dali", "; no .beton file, DALI is installed"),
        (["ffcv"], False, "workers", "; no .beton file, DALI is not installed"),
    ],
)
def test_a_set_too_large_goes_to_the_fastest_loader_there_is(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], beton: bool, name: str, reason: str
) -> None:
    class Made:
        def __init__(self, *arguments: object, **options: object) -> None:
            self.options = options

    for loader_class in ("BetonLoader", "DaliLoader", "WorkersLoader"):
        monkeypatch.setattr(choose, loader_class, type(loader_class, (Made,), {}))
    monkeypatch.setattr(choose, "_installed", lambda package: package in installed)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2000)
    labels = np.zeros(10, np.int64)
    files = ImageSet(FileImages([Path("a.png")] * 10, 8), labels)
    order, path = EpochOrder(labels, 2), Path("train.beton") if beton else None
    made, said = make_loader(files, order, CPU, beton=path, rows=labels, workers=3)
    expected = {"ffcv": "BetonLoader", "dali": "DaliLoader", "workers": "WorkersLoader"}[name]
    options = made.options  # type: ignore[attr-defined]
    assert type(made).__name__ == expected
    assert options.get("workers", options.get("threads")) == 3
    assert said.startswith(f"loader {name}: 10 images take") and said.endswith(reason)


def test_images_of_a_beton_file_are_read_from_it(
    parts: dict[str, Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ffcv", reason="needs ffcv")
    beton = read_beton(parts["train"].beton)
    rows = parts["held-out"].rows
    lazy = ImageSet(beton.images, beton.labels).take(rows)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 0)
    monkeypatch.setattr(choose, "BetonLoader", lambda *_, **options: options)
    options, _ = make_loader(lazy, EpochOrder(lazy.labels, 4), CPU)
    assert options["path"] == parts["train"].beton  # type: ignore[index]
    assert np.array_equal(options["rows"], rows)  # type: ignore[index]


def test_packages_are_looked_for_where_they_would_be() -> None:
    assert choose._installed("torch.utils") and not choose._installed("no_such.package")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast", "^--loader 'fast' is unknown: use one of auto, resident, ffcv, dali, workers$"),
        ("ffcv", "^--loader ffcv reads .beton files: write one with `python -m reat_fast.convert`"),
    ],
)
def test_a_loader_that_cannot_be_is_refused(
    parts: dict[str, Part], name: str, message: str
) -> None:
    images = parts["train"].images
    with pytest.raises(ValueError, match=message):
        make_loader(images, EpochOrder(images.labels, 16), CPU, loader=name)


def test_free_memory_is_the_least_of_what_system_and_container_leave(tmp_path: Path) -> None:
    assert resident.free_bytes(CPU, tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    700 kB\n")
    assert resident.free_bytes(CPU, tmp_path) == 700 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert resident.free_bytes(CPU, tmp_path) == 700 * 1024
    (group / "memory.max").write_text("500000\n")
    (group / "memory.stat").write_text("anon 200000\nfile 100000\n")
    assert resident.free_bytes(CPU, tmp_path) == 300000
