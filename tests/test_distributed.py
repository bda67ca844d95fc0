"""Several processes on one batch: the numbers of one process, one writer, and a clean end."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from reat_fast.config import Config
from reat_fast.data import ImageSet
from reat_fast.engine import distributed
from reat_fast.engine.distributed import (
    FailedElsewhere,
    SharedGradients,
    World,
    is_lost_peer,
    split,
)
from reat_fast.engine.step_update import StepUpdate
from reat_fast.engine.stopping import Stopped
from reat_fast.engine.synced_batchnorm import synchronise_batchnorm_
from reat_fast.evaluate import Attack, evaluate
from reat_fast.evaluation.autoattack import AutoAttack
from reat_fast.evaluation.trial import Images
from reat_fast.evaluation.victim import attacked
from reat_fast.loaders import Batch
from reat_fast.models import create_model
from reat_fast.step import TrainStep, make_optimizer
from reat_fast.training.plan import make_plan

COUNTS = [40, 24, 12, 7, 4]
CONFIG = Config(lr=0.125, steps=3)
EPS = 4 / 255
CASES: dict[str, dict[str, Any]] = {
    "official tail": {},
    "pairwise tail": {"tail": "pairwise"},
    "batch statistics in the attack": {"attack_batchnorm": "train", "attack_loss": "rbl"},
    "trades": {"objective": "trades", "attack_loss": "kl", "tail": "none"},
    "class means and class radii": {
        **{"objective": "taet", "second_stage": 0, "tail": "none", "radius": "class"},
        "radius_warmup": 0.0,
    },
    "perturbed weights": {"objective": "ce", "tail": "none", "awp": 0.01},
    "extras": {"ema": 0.9, "clip_norm": 0.5, "label_smoothing": 0.1, "tail": "none"},
}
OWN_STATISTICS = "batch statistics of each process"
BATCHES = (12, 13, 1)  # even shares, uneven ones, and a rank with nothing to do


def take_steps(world: World, config: Config) -> dict[str, Tensor]:
    """Take a step on each batch, of which this process sees its share; return all that is left."""
    torch.manual_seed(world.rank)  # weights have to come from the main process
    model = create_model("resnet8", 5, width=8, stem_stride=1).double()
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config, world)
    made = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (40, 16, 16, 3), generator=made, dtype=torch.uint8)
    labels = torch.randint(0, 5, (40,), generator=made)
    for size in BATCHES:
        indices = torch.randperm(40, generator=made)[:size]
        rows = indices.split(split(size, world.size))[world.rank]
        outcome = step.train_on(Batch(images, labels[rows], rows, gather=True), size)
        assert len(outcome["logits"]) == len(rows)
    losses = {name: outcome[name] for name in ("loss", *step.objective.terms)}
    state = {name: value.clone() for name, value in step.state_dict().items()}
    return {**model.state_dict(), **state, **losses}


def evaluated(
    world: World,
    attacks: Sequence[str] = ("clean", "pgd5"),
    few: int = 13,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Measure a small network on a set that two processes cannot halve."""
    images = np.random.default_rng(5).integers(0, 256, (few, 16, 16, 3), dtype=np.uint8)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    labels = model(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).argmax(1)
    labels[::5] = (labels[::5] + 1) % 5  # what it gets wrong
    quick = partial(AutoAttack, steps=5, queries=10)
    with mock.patch("reat_fast.evaluation.trial.AutoAttack", quick):
        return evaluate(
            model,
            ImageSet(images, labels.numpy()),
            [Attack.from_name(name, EPS) for name in attacks],
            5,
            eps=EPS,
            batch_size=4,
            restarts=2,
            train_counts=COUNTS,
            progress=progress,
            world=world,
        )


def stop_the_second(world: World) -> Callable[[int], object]:
    """Ask one process of two to stop in the middle of its share."""

    def tick(_: int) -> None:
        if world.rank == 1:
            raise Stopped(128 + signal.SIGINT)

    return tick


def counts_of_an_epoch_in_two_halves(world: World, step: TrainStep) -> None:
    """Each process counts the bad gradients of its share: a checkpoint has those of all of them."""
    batch = torch.rand(2, 3, 16, 16), torch.tensor([0, 3])
    step.update.nonfinite += 1 + world.rank
    step(*batch)
    halfway = {name: value.clone() for name, value in step.state_dict().items()}
    assert halfway["nonfinite"] == 3
    step.end_epoch()
    step.load_state_dict(halfway)  # by every process, as a run that is resumed does
    step.update.nonfinite += 10 * world.rank
    step(*batch)
    assert step.end_epoch()["nonfinite"] == 13
    images, labels = batch
    broken = images.where(torch.tensor(world.rank == 0), torch.nan)  # in one share alone
    step(broken, labels)
    assert step.end_epoch()["nonfinite"] > 0


def one_of_two(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    world = World.from_environment()
    with world.joined(torch.device("cpu")):
        assert world.any(rank == 1) and not world.any(False)
        row, number = torch.tensor([1.0, 2.0]) * (1 + rank), torch.tensor(8.0 * rank)
        world.average_([row, number], 0.25 if rank else 0.75)
        assert row.tolist() == [1.25, 2.5] and number.item() == 2.0
        model = create_model("resnet8", 5, width=8)
        step = TrainStep(model, make_optimizer(model, CONFIG), COUNTS, CONFIG, world)
        counts_of_an_epoch_in_two_halves(world, step)
        figures = [evaluated(world), evaluated(world, ["aa"]), evaluated(world, few=1)]
        with pytest.raises(Stopped) as stopped:
            evaluated(world, progress=stop_the_second(world))
        results: dict[str, Any] = {
            name: take_steps(world, dataclasses.replace(CONFIG, **changes))
            for name, changes in {**CASES, OWN_STATISTICS: {"sync_batchnorm": False}}.items()
        }
    results["figures"], results["stopped"] = figures, stopped.value.code
    torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    for attempt in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        try:
            torch.multiprocessing.spawn(one_of_two, (str(folder), port), nprocs=2)
        except torch.multiprocessing.ProcessRaisedException as error:
            # Another program may have taken the port since it was probed.
            if attempt == 2 or "could not connect" not in str(error):
                raise
            continue
        break
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_on_the_same_global_batch(
    case: str, two_processes: list[dict[str, dict[str, Tensor]]]
) -> None:
    alone = take_steps(World(), dataclasses.replace(CONFIG, **CASES[case]))
    for result in two_processes:
        for name, expected in alone.items():
            # Sums in another order; float64 has 16 digits, three steps of an attack take a few.
            torch.testing.assert_close(result[case][name], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", [*CASES, OWN_STATISTICS])
def test_all_processes_hold_the_same_bits(
    case: str, two_processes: list[dict[str, dict[str, Tensor]]]
) -> None:
    first, second = (result[case] for result in two_processes)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_processes_share_an_evaluation_and_all_get_the_figures_of_one(
    two_processes: list[dict[str, Any]],
) -> None:
    alone = [evaluated(World()), evaluated(World(), ["aa"]), evaluated(World(), few=1)]
    assert 0 < alone[0]["attacks"]["pgd5"]["overall"] < alone[0]["attacks"]["clean"]["overall"]
    for result in two_processes:
        assert result["figures"] == alone


def test_the_random_numbers_of_an_image_are_its_own_whichever_process_attacks_it() -> None:
    pixels = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    with attacked(nn.Sequential(nn.Flatten(), nn.Linear(48, 5))) as victim:
        every, share = (
            Images(ImageSet(pixels, np.arange(5)), victim, 7, EPS, numbers)
            for numbers in (None, torch.tensor([1, 3]))
        )
        for whole, part in zip(
            every(torch.tensor([3, 1])), share(torch.tensor([1, 0])), strict=True
        ):
            assert torch.equal(whole, part)
        drawn: list[Tensor] = []

        def noting(_: AutoAttack, stage: str, rank: int, clean: Tensor, *rest: Tensor) -> Tensor:
            drawn.append(rest[1])
            return clean

        labels = victim.logits(share(torch.arange(2))[0]).argmax(1)
        with mock.patch.object(AutoAttack, "_perturb", noting):
            AutoAttack(
                victim,
                lambda rows: share(rows)[0],
                labels,
                **{"eps": EPS, "seed": 7, "batch_size": 2, "numbers": torch.tensor([1, 3])},
            ).run()
    assert drawn and all(samples.tolist() == [1, 3] for samples in drawn)


def test_where_one_process_stops_within_an_evaluation_all_do(
    two_processes: list[dict[str, Any]],
) -> None:
    codes = [result["stopped"] for result in two_processes]
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGINT]


def test_the_packages_autoattack_takes_one_process() -> None:
    with pytest.raises(ValueError, match="aa-package takes one process"):
        evaluated(World(1, 2), ["clean", "aa-package"])


def test_autoattack_wants_an_image_for_each_process() -> None:
    with pytest.raises(ValueError, match="an image for each of the 3 processes, the set has 2"):
        evaluated(World(1, 3), ["aa"], few=2)


def test_shares_differ_by_at_most_one() -> None:
    assert [split(13, 4), split(2, 3), split(0, 2)] == [[4, 3, 3, 3], [1, 1, 0], [0, 0]]


@pytest.mark.parametrize("total", [1, 7, 9, 10])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_parts_of_a_process_tile_its_share(rank: int, total: int) -> None:
    step: Any = SimpleNamespace(_world=World(rank, 3), _config=Config(accumulate=2))
    parts = list(StepUpdate.parts(step, total))
    assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == list(
        range(split(total, 3)[rank])
    )
    assert [rows.stop - rows.start for rows, _ in parts] == [sizes[rank] for _, sizes in parts]
    assert sum(sum(sizes) for _, sizes in parts) == total and all(any(s) for _, s in parts)


def test_a_world_of_one_needs_no_connection() -> None:
    world, rows = World(), torch.arange(3.0)
    with world.joined(torch.device("cpu")):
        assert world.main and world.any(True) and world.gather(rows, [3]) is rows


def test_a_process_knows_how_often_its_job_was_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert World().restarts == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert World().restarts == 3


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """A store of a job, in the place of its connection."""
    store = dist.HashStore()
    monkeypatch.setattr(World, "_connect", lambda world, backend: store)
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda timeout: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "PRECEDENCE_SECONDS", 0.2)
    return store


def fail(rank: int, error: Exception) -> None:
    with World(rank, 3).joined(torch.device("cpu")):
        raise error


LOST = RuntimeError("[gloo/tcp/pair.cc] Connection reset by peer")


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("first", [0, 1])
def test_of_the_failures_of_a_job_only_the_first_is_told(first: int) -> None:
    with pytest.raises(ValueError, match="^damaged$"):
        fail(first, ValueError("damaged"))
    for rank, error in ((2, ValueError("damaged")), (1 - first, LOST)):
        with pytest.raises(FailedElsewhere):
            fail(rank, error)


@pytest.mark.usefixtures("told")
def test_the_main_process_goes_before_one_that_failed_a_moment_earlier() -> None:
    def other() -> None:
        with pytest.raises(FailedElsewhere):
            fail(1, ValueError("in runs/reat-2"))

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(other)
        with pytest.raises(ValueError, match="in runs/reat-1"):
            fail(0, ValueError("in runs/reat-1"))
        waiting.result()


@pytest.mark.usefixtures("told")
def test_a_lost_process_is_told_of_in_one_line() -> None:
    with pytest.raises(ConnectionError, match="^another process of this job of 3 ended before"):
        fail(0, LOST)


@pytest.mark.usefixtures("told")
def test_a_stop_of_the_main_process_is_all_that_is_told_and_one_of_another_tells_nothing() -> None:
    for _ in range(2):  # all stop at the same step
        with pytest.raises(Stopped):
            fail(1, Stopped(143))
    with pytest.raises(OSError, match="disk full"):  # in the save before
        fail(0, OSError("disk full"))
    with pytest.raises(Stopped):
        fail(0, Stopped(143))


@pytest.mark.usefixtures("told")
def test_who_waits_for_a_main_process_that_was_stopped_says_nothing() -> None:
    with pytest.raises(Stopped):
        fail(0, Stopped(143))
    with pytest.raises(FailedElsewhere):
        fail(1, LOST)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("Connection closed by peer [127.0.0.1]:4242"), True),
        (LOST, True),
        (RuntimeError("writev: Broken pipe"), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistBackendError("watchdog"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_lost_process_is_told_from_other_faults(error: RuntimeError, lost: bool) -> None:
    assert is_lost_peer(error) == lost


def test_shared_gradients_lie_as_their_parameters_and_sums_stay_what_they_were() -> None:
    weight = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    shared = SharedGradients([weight, nn.Parameter(torch.ones(2))], 2, World())
    assert weight.grad is not None and weight.grad.stride() == weight.stride()
    first = shared.sum_(torch.tensor([1.0, 2.0]))
    shared.sum_(torch.tensor([3.0, 4.0]))
    assert first.tolist() == [1.0, 2.0] and not weight.grad.any()


def test_synced_batchnorm_takes_constant_channels_for_constant() -> None:
    synced = nn.Sequential(nn.BatchNorm2d(200))
    synchronise_batchnorm_(synced, World())
    # E[x^2] - E[x]^2 of float32 near 1e6 is off by up to 0.06, to either side of zero.
    x = torch.linspace(999, 1001, 200).view(1, -1, 1, 1).expand(3, -1, 5, 5)
    assert synced(x).isfinite().all()
    assert (synced[0].running_var >= 0).all()  # type: ignore[operator, index, union-attr]


@pytest.mark.parametrize(
    ("shape", "training"), [((4, 5, 3, 3), True), ((2, 5, 1, 1), True), ((4, 5, 3, 3), False)]
)
def test_the_synced_batchnorm_of_one_process_is_batchnorm(
    shape: tuple[int, ...], training: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5).double().train(training)
    synced = nn.Sequential(nn.BatchNorm2d(5).double()).train(training)
    synchronise_batchnorm_(synced, World())
    x = torch.randn(shape, dtype=torch.float64) * 3 + 2
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(given) for module, given in zip((plain, synced), inputs, strict=True)]
    slope = torch.randn_like(x)
    for output in outputs:
        output.backward(slope)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=1e-12)
    for one, other in zip(plain.state_dict().values(), synced.state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_synced_batchnorm_computes_in_the_precision_of_its_weights() -> None:
    torch.manual_seed(0)
    images, slope = torch.randn(2, 8, 5, 9, 9).bfloat16()
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        synced = nn.Sequential(nn.BatchNorm2d(5))
        synchronise_batchnorm_(synced, World())
        x = images.to(dtype, copy=True).requires_grad_()
        output = synced(x)
        output.backward(slope.to(dtype))
        assert output.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
        gradients.append([p.grad for p in synced.parameters()])
    # The same numbers, exact in both; sums rounded to bfloat16 would be off by up to 4e-3.
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_other_batchnorms_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1))
    with pytest.raises(ValueError, match=r"BatchNorm1d \(1\); go on with --no-sync-batchnorm"):
        synchronise_batchnorm_(model, World())


@pytest.mark.parametrize("accumulate", [2, 5])
def test_parts_of_a_batch_add_up_where_batchnorm_does_not_look_across(accumulate: int) -> None:
    """With frozen statistics every image stands alone, so parts change nothing but rounding."""
    results = []
    for parts in (1, accumulate):
        config = dataclasses.replace(CONFIG, accumulate=parts, tail="none")
        torch.manual_seed(0)
        model = create_model("resnet8", 5, width=8).double()
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        model.eval()
        model.train = mock.Mock(return_value=model)  # type: ignore[method-assign]
        images = torch.rand(12, 3, 8, 8, dtype=torch.float64)
        outcome = step(images, torch.arange(12) % 5, torch.zeros_like(images))
        results.append({**outcome, **model.state_dict()})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 2])
def test_more_processes_than_gpus_are_refused_also_by_the_process_that_speaks(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--nproc-per-node 3: this machine has 2 CUDA devices"):
        make_plan(["quickstart"], World(rank, 3, rank, 3))
