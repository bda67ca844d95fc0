"""What only a CUDA device can show: no waiting, eager equals captured, a short training.

Of an evaluation too: its attacks are replayed, and its graph leaves nothing behind.

make gpu
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_run import SMALL
from made_data import made_npz
from made_step import COUNTS, assert_same_state, assert_same_step, make_model, uint8_batch
from made_victim import EPS, attack, batch, labelled_images, make_victim
from test_foreign_networks import Plain, TakesTensors
from test_resume import StopAfter

from reat_fast import train, verify
from reat_fast.checkpoint import CHECKPOINT
from reat_fast.cli.command import run_command
from reat_fast.config import PRESETS, Config
from reat_fast.engine.captured_step import CapturedStep
from reat_fast.engine.precision import Precision, determinism
from reat_fast.engine.replayed_step import ReplayedStep
from reat_fast.evaluate import evaluate
from reat_fast.evaluation import captured
from reat_fast.evaluation.apgd import targeted_dlr
from reat_fast.evaluation.attacks import Attack
from reat_fast.evaluation.captured import CapturedAscent
from reat_fast.evaluation.passes import FIRST_LAUNCHES, RecordedPasses, Replays
from reat_fast.evaluation.victim import attacked
from reat_fast.loaders import Batch
from reat_fast.step import TrainStep, make_optimizer
from reat_fast.train import set_learning_rate

pytestmark = pytest.mark.gpu


@pytest.fixture
def reproducible() -> Iterator[None]:
    """Fix the algorithms, so that eager and captured steps can be compared bit for bit."""
    flags = torch.backends.cudnn
    before = (flags.deterministic, flags.benchmark, flags.allow_tf32)
    flags.deterministic, flags.benchmark, flags.allow_tf32 = True, False, False
    yield
    flags.deterministic, flags.benchmark, flags.allow_tf32 = before


def on_gpu(batch: Batch) -> Batch:
    tensors = {name: getattr(batch, name).cuda() for name in ("images", "labels", "indices")}
    return dataclasses.replace(batch, **tensors)


def make_step(config: Config) -> TrainStep:
    model = make_model(head=config.head).cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TrainStep(model, make_optimizer(model, config), COUNTS, config)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_never_waits_for_the_device(preset: str, precision: str) -> None:
    config = dataclasses.replace(PRESETS[preset], precision=precision)  # type: ignore[arg-type]
    step, batch = make_step(config), on_gpu(uint8_batch())
    step.train_on(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.train_on(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("gather", [True, False])
def test_replays_equal_eager_steps(precision: str, gather: bool, reproducible: None) -> None:
    config = Config(precision=precision, lr=0.05)  # type: ignore[arg-type]
    eager, captured = make_step(config), make_step(config)
    batch = on_gpu(uint8_batch(gather))
    replayed = CapturedStep(captured, batch)
    for k in range(4):
        for step in (eager, captured):
            set_learning_rate(step.optimizer, 0.05 / (1 + k))
        assert_same_step(eager, replayed, batch)
        if k == 0:  # the first eager step makes workspaces that stay
            before = torch.cuda.memory_allocated()
        if k == 1:
            assert eager.end_epoch() == captured.end_epoch()
    assert_same_state(eager, captured)
    assert torch.cuda.memory_allocated() <= before + 2**20  # replays allocate nothing
    replayed.close()


@pytest.mark.parametrize("flags", [{"awp": 0.01, "awp_from": 1}, {"attack_from": 1}])
def test_the_step_is_captured_again_from_the_epoch_that_takes_another(
    flags: dict[str, Any], reproducible: None
) -> None:
    config = Config(precision="bf16", lr=0.05, batch_size=8, **flags)
    eager, captured = make_step(config), make_step(config)
    batch = on_gpu(uint8_batch())
    replayed = ReplayedStep(captured)
    for _ in range(2):
        for _ in range(3):
            assert_same_step(eager, replayed, batch)
        assert eager.end_epoch() == captured.end_epoch()
    replayed.forget()
    assert captured.kind != make_step(config).kind
    assert_same_state(eager, captured)


@pytest.mark.parametrize("gather", [True, False])
def test_the_short_batch_of_an_epoch_is_replayed_too(gather: bool, reproducible: None) -> None:
    config = Config(precision="bf16", lr=0.05)
    eager, captured = make_step(config), make_step(config)
    whole = on_gpu(uint8_batch(gather))
    short = dataclasses.replace(
        whole,
        images=whole.images if gather else whole.images[:5],
        labels=whole.labels[:5],
        indices=whole.indices[:5],
    )
    replayed = CapturedStep(captured, whole)
    for _ in range(4):
        for given in (whole, whole, short):
            assert_same_step(eager, replayed, given)
        assert eager.end_epoch() == captured.end_epoch()
    assert_same_state(eager, captured)
    assert replayed._short is not None
    replayed.close()


CHEAP = {
    "fgsm-rs": {"attack": "fgsm-rs"},
    "n-fgsm of radii": {"attack": "n-fgsm", "radius": "class", "radius_warmup": 0.0},
    "free": {"attack": "free", "replays": 2},
}
CAPTURED = {**PRESETS, **{n: dataclasses.replace(Config(), **c) for n, c in CHEAP.items()}}  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", CAPTURED)
def test_every_preset_replays_as_it_runs(preset: str, reproducible: None) -> None:
    config = dataclasses.replace(CAPTURED[preset], steps=2, batch_size=8)
    eager, captured = make_step(config), make_step(config)
    batch = on_gpu(uint8_batch())
    replayed = CapturedStep(captured, batch)
    for _ in range(3):
        assert_same_step(eager, replayed, batch)
    assert_same_state(eager, captured)
    replayed.close()


@pytest.mark.parametrize("form", ["fused", "compiled"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_replays_of_another_form_of_the_update_equal_its_eager_calls(
    precision: str, form: str, reproducible: None
) -> None:
    torch.compiler.reset()
    config = Config(precision=precision, lr=0.05, steps=2, update_form=form)  # type: ignore[arg-type]
    eager, captured = make_step(config), make_step(config)
    batch = on_gpu(uint8_batch())
    replayed = CapturedStep(captured, batch)
    for _ in range(3):
        assert_same_step(eager, replayed, batch)
    assert_same_state(eager, captured)
    replayed.close()


@pytest.mark.parametrize("form", ["fused", "compiled"])
def test_another_form_of_the_update_is_near_the_eager_one_in_float32(
    form: str, reproducible: None
) -> None:
    torch.compiler.reset()
    losses = []
    for one in ("eager", form):
        config = Config(precision="float32", lr=0.05, steps=0, update_form=one)  # type: ignore[arg-type]
        step, batch = make_step(config), on_gpu(uint8_batch())
        losses.append(torch.stack([step.train_on(batch)["loss"] for _ in range(3)]))
    # Sums are in another order; two updates pass float32 rounding on.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


def test_noise_differs_between_epochs_of_a_replayed_step() -> None:
    step, batch = make_step(Config(steps=0, lr=0.0)), on_gpu(uint8_batch())
    replayed = CapturedStep(step, batch)
    first = replayed.train_on(batch)["images_adv"].clone()
    again = replayed.train_on(batch)["images_adv"].clone()
    step.end_epoch()
    later = replayed.train_on(batch)["images_adv"].clone()
    assert torch.equal(first, again) and not torch.equal(first, later)


IMAGES, BATCH = 512, 64


def evaluated(precision: Precision, count: int = IMAGES, **settings: Any) -> dict[str, float]:
    """Return how many images withstand each attack."""
    attacks = [attack(name) for name in ("clean", "fgsm", "pgd10", "cw10", "lsa10")]
    images, model = labelled_images(count), make_victim().cuda()
    given = {"eps": EPS, "batch_size": BATCH, "precision": precision, **settings}
    found = evaluate(model, images, attacks, 4, **given)["attacks"]
    return {name: figures["overall"] * count / 100 for name, figures in found.items()}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the loss of each attack that is captured."""
    losses: list[str] = []
    capture = CapturedAscent._capture

    def noted(self: CapturedAscent) -> None:
        losses.append(self.loss)
        capture(self)

    monkeypatch.setattr(CapturedAscent, "_capture", noted)
    return losses


@pytest.mark.parametrize("name", ["fgsm", "pgd10", "cw10", "lsa10", "l2pgd10"])
def test_replayed_attacks_equal_launched_ones(name: str, reproducible: None) -> None:
    with attacked(make_victim().cuda()) as victim:
        images = labelled_images(2 * BATCH)
        whole, second, short = (
            tuple(tensor.cuda() for tensor in batch(victim, images, rows))
            for rows in (torch.arange(BATCH), torch.arange(BATCH) + BATCH, torch.arange(5))
        )
        ascent = CapturedAscent(victim, attack(name).loss, BATCH, whole[0], attack(name).norm)
        for given in (whole, second):
            expected = attack(name).perturb(victim, *given, EPS)
            assert torch.equal(ascent.perturb(attack(name), *given, EPS), expected)
        filled = [tensor[torch.arange(BATCH, device="cuda") % 5] for tensor in short]
        expected = attack(name).perturb(victim, *filled, EPS)[:5]
        assert torch.equal(ascent.perturb(attack(name), *short, EPS), expected)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ascent.perturb(attack(name), *whole, EPS)
            ascent.perturb(attack(name), *short, EPS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ascent.close()


def test_an_evaluation_from_graphs_has_the_figures_of_a_launched_one(
    captures: list[str], monkeypatch: pytest.MonkeyPatch, reproducible: None
) -> None:
    replayed = evaluated("float32")
    assert captures == ["pgd", "cw", "lsa"]
    monkeypatch.setattr(captured, "WORTHWHILE_STEPS", math.inf)
    assert evaluated("float32") == replayed
    assert captures == ["pgd", "cw", "lsa"]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_replayed_passes_of_a_search_equal_launched_ones(
    precision: Precision, reproducible: None
) -> None:
    with attacked(make_victim().cuda(), precision) as victim:
        rows = (torch.arange(count) for count in (BATCH, 5, 61, BATCH, 40, 5))
        given = [batch(victim, labelled_images(BATCH), some)[::2] for some in rows]
        given = [(images.cuda(), labels.cuda()) for images, labels in given]

        def passes() -> list[tuple[torch.Tensor, ...]]:
            found = []
            for images, labels in given:

                def loss(logits: torch.Tensor, own: torch.Tensor = labels) -> torch.Tensor:
                    return targeted_dlr(logits, own, 3 - own)

                found.append((victim(images), *victim.gradient(images, loss)))
                with victim.finer(images):
                    found.append((victim(images), *victim.gradient(images, loss)))
            return found

        launched = passes()
        with victim.replaying():
            for _ in range(FIRST_LAUNCHES):
                passes()
            replays = victim._replays
            assert isinstance(replays, Replays) and len(replays._recorded) >= 3
            for _ in range(2):
                for one, other in zip(passes(), launched, strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            recorded = next(iter(replays._recorded.values()))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                recorded.logits(given[0][0][:4])
                recorded.gradient(given[0][0][:4], lambda logits: logits.amax(1))
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["aa", "l2aa"])
def test_autoattack_from_graphs_has_the_figures_of_a_launched_one(
    name: str, monkeypatch: pytest.MonkeyPatch, reproducible: None
) -> None:
    captured: list[int] = []
    record = RecordedPasses.__init__

    def noted(self: RecordedPasses, network: Any, images: torch.Tensor, *beside: Any) -> None:
        captured.append(len(images))
        record(self, network, images, *beside)

    monkeypatch.setattr(RecordedPasses, "__init__", noted)

    def found() -> dict[str, Any]:
        images, model = labelled_images(BATCH), make_victim().cuda()
        # A radius in L2 at which a fifth stands, as at EPS in L-infinity: at 128/255 none does.
        chosen = Attack.from_name(name, EPS, l2_eps=0.12)
        figures: dict[str, Any] = evaluate(model, images, [chosen], 4, eps=EPS)["attacks"]
        return figures

    replayed, count = found(), len(captured)
    held = torch.cuda.memory_allocated()
    assert count and captured[0] <= BATCH
    found()
    gc.collect()
    assert torch.cuda.memory_allocated() <= held + 2**20
    monkeypatch.setattr(Replays, "of", lambda *_: None)
    count = len(captured)
    assert found() == replayed and len(captured) == count


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_coarse_searches_from_graphs_find_nearly_the_same(
    precision: Precision, captures: list[str]
) -> None:
    exact = evaluated("float32", IMAGES - 3)
    coarse = evaluated(precision, IMAGES - 3)
    assert captures == ["pgd", "cw", "lsa"] * 2
    assert coarse["clean"] == exact["clean"]
    # On a CPU bfloat16 left up to four of 510 images more.
    assert all(abs(coarse[name] - exact[name]) <= 10 for name in exact), (coarse, exact)


def test_an_evaluation_leaves_no_memory_behind(captures: list[str]) -> None:
    held = []
    for _ in range(3):
        evaluated("bf16", restarts=2)
        gc.collect()  # traced networks are cycles
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    # The first one makes cuBLAS workspaces that stay.
    assert len(captures) == 9 and held[2][0] == held[1][0] and held[2][1] <= held[1][1]


def test_the_step_of_a_training_replays_on_after_evaluations(
    captures: list[str], reproducible: None
) -> None:
    config = Config(precision="float32", lr=0.05)
    eager, replaying = make_step(config), make_step(config)
    given = on_gpu(uint8_batch())
    replayed = CapturedStep(replaying, given)
    for _ in range(3):
        assert_same_step(eager, replayed, given)
        evaluated("float32")
    assert_same_state(eager, replaying)
    assert len(captures) == 9
    replayed.close()


def test_a_network_that_waits_is_attacked_without_a_graph(captures: list[str]) -> None:
    class Waiting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_victim()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert float(images.sum()) >= 0
            logits: torch.Tensor = self.inner(images)
            return logits

    chosen, images = [attack("pgd10")], labelled_images(IMAGES)
    model = Waiting().cuda()
    with pytest.warns(UserWarning, match="one by one"):
        found = evaluate(model, images, chosen, 4, eps=EPS, batch_size=BATCH)  # type: ignore[arg-type]
    plain = evaluated("float32")["pgd10"]
    assert abs(found["attacks"]["pgd10"]["overall"] * IMAGES / 100 - plain) <= 2
    assert torch.rand(3, device="cuda").isfinite().all()  # the generator still works


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_network_of_others_is_rewritten_where_that_only_rounds(precision: Precision) -> None:
    images = torch.rand(4, 3, 6, 6, device="cuda")
    with attacked(Plain().cuda(), precision) as victim:
        victim.check(images)
        assert victim._rewritten and not victim._frozen.unfolded
        assert victim._frozen.fused == (2 if precision == "bf16" else 0)
    with attacked(TakesTensors().cuda(), precision) as victim:
        victim.check(images)
        assert victim._rewritten == (precision == "float32")  # where its own code still runs


def test_every_row_of_verify_holds() -> None:
    assert run_command(verify.main, ["--device", "cuda"]) == 0


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_a_resumed_training_goes_on_with_the_learning_rate_of_its_step(
    graph: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folders = made_npz(tmp_path / "made.npz"), [tmp_path / "whole", tmp_path / "stopped"]
    arguments = [*SMALL, "--device", "cuda", "--data", data, "--deterministic", "--graph", graph]
    with determinism():  # a run leaves it on, and the tests after this one are not written for it
        for folder in folders:
            with monkeypatch.context() as patched:
                if folder.name == "stopped":  # in the second of three epochs
                    patched.setattr(train, "StopRequest", lambda world: StopAfter(11))
                code = run_command(train.main, [str(a) for a in (*arguments, "--run-dir", folder)])
        assert code == 128 + signal.SIGTERM
        assert run_command(train.main, ["--resume", str(folders[1])]) == 0
    whole, resumed = (
        torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True) for folder in folders
    )
    for name, tensor in whole["model"].items():
        assert torch.equal(resumed["model"][name], tensor), name


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_a_short_training_learns(
    graph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run_dir = made_npz(tmp_path / "made.npz"), tmp_path / "run"
    arguments = ["reat", "--fused", "--dataset", "npz", "--data", data, "--run-dir", run_dir]
    arguments += ["--model", "resnet18", "--width", 16, "--epochs", 6, "--imbalance", 0.1]
    arguments += ["--batch-size", 12, "--eps", "2/255", "--step-size", "1/255", "--no-augment"]
    # At 0.05 the loss of so few steps is as high after as before in one of three seeds.
    arguments += ["--lr", 0.01, "--graph", graph, "--device", "cuda"]
    assert run_command(train.main, [str(argument) for argument in arguments]) == 0
    assert ("one CUDA graph" in capsys.readouterr().out) == (graph == "auto")
    with (run_dir / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0]
