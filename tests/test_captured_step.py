"""The captured step, its graph played by the body itself: state, buffers and refusals.

On a CPU a fake graph stands in, which does what a graph does to the state: capturing executes
nothing, replaying runs the body on the static buffers. tests/test_gpu.py has the real one.
"""

from __future__ import annotations

import dataclasses
import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_graphs import StepGraph, replays, step_graphs
from made_step import COUNTS, assert_same_state, assert_same_step, batches, make_model, uint8_batch

from reat_fast.config import Config
from reat_fast.engine import captured_step
from reat_fast.engine.captured_step import CapturedStep
from reat_fast.engine.graph import record
from reat_fast.loaders import Batch
from reat_fast.step import TrainStep, load_optimizer, make_optimizer
from reat_fast.train import set_learning_rate

__all__ = ["step_graphs"]
pytestmark = pytest.mark.usefixtures("step_graphs")
CONFIG = Config(steps=2, lr=0.05)


class CountedGraph(StepGraph):
    """Knows how many there are."""

    alive = 0

    def __init__(self) -> None:
        CountedGraph.alive += 1

    def __del__(self) -> None:
        CountedGraph.alive -= 1


def make_step(config: Config = CONFIG) -> TrainStep:
    model = make_model()
    return TrainStep(model, make_optimizer(model, config), COUNTS, config)


def states(step: TrainStep) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in step.state_tensors()]


def test_replays_equal_eager_steps_bit_for_bit_with_lr_and_epoch_changing() -> None:
    eager, captured = make_step(), make_step()
    given = batches()
    replayed = CapturedStep(captured, given[0])
    for epoch in range(4):
        for k, batch in enumerate(given):
            for step in (eager, captured):
                set_learning_rate(step.optimizer, 0.05 / (1 + k + epoch))
            assert_same_step(eager, replayed, batch)
        assert eager.end_epoch() == captured.end_epoch()
    assert_same_state(eager, captured)
    # The short batch is launched in the first epoch and replayed from the second on.
    assert replays == [8, 8, *3 * [8, 8, 3]]


def test_a_short_batch_that_cannot_be_captured_is_launched_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager, captured = make_step(), make_step()
    whole, _, short = batches()
    replayed = CapturedStep(captured, whole)

    def fails(body: Any, stream: Any) -> None:
        body()
        raise torch.OutOfMemoryError("out of memory\nsecond line")

    monkeypatch.setattr(captured_step, "warm_up", fails)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CountedGraph)
    for step in (eager, replayed):
        step.train_on(short)
    eager.train_on(short)
    with pytest.warns(UserWarning, match=r"last 3 images .* \(out of memory\); it is launched"):
        replayed.train_on(short)
    for given in (short, whole, short):
        eager.train_on(given)
        replayed.train_on(given)
    assert_same_state(eager, captured)
    assert replays == [8]
    assert CountedGraph.alive == 1  # with it would go what the graph of whole batches counts on


def test_steps_that_a_warm_up_has_begun_are_over_before_they_are_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, whole = make_step(), batches()[0]
    before, take = states(step), step.train_on
    running: list[Any] = []

    def second_fails(batch: Batch, total: int) -> dict[str, torch.Tensor]:
        if running:
            raise torch.OutOfMemoryError("out of memory")
        running.append(lambda: take(batch, total))  # a device does later what it is given
        return {}

    def wait() -> None:
        while running:
            running.pop()()

    monkeypatch.setattr(step, "train_on", second_fails)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    with pytest.raises(torch.OutOfMemoryError):
        CapturedStep(step, whole)
    torch.cuda.synchronize()
    for a, b in zip(before, states(step), strict=True):
        assert torch.equal(a, b)


def test_batches_of_many_sizes_make_one_more_graph() -> None:
    step = make_step()
    whole, *_ = batches()
    replayed = CapturedStep(step, whole)
    for count in (2, 2, 2, 4, 4, 5, 5, 2):
        rows = torch.arange(count)
        replayed.train_on(dataclasses.replace(whole, indices=rows, labels=whole.labels[rows]))
    assert replays == [2, 2, 2]


def test_warm_up_and_capture_leave_no_trace() -> None:
    step = make_step()
    before = states(step)
    CapturedStep(step, batches()[0])
    for a, b in zip(before, states(step), strict=True):
        assert torch.equal(a, b)


def test_state_tensors_are_all_that_a_step_changes() -> None:
    step, other = make_step(), make_step()
    step.train_on(batches()[0])
    with torch.no_grad():
        for source, target in zip(step.state_tensors(), other.state_tensors(), strict=True):
            target.copy_(source)
    first, second = (s.train_on(batches()[1]) for s in (step, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_same_state(step, other)


def test_copied_batches_go_through_the_buffer() -> None:
    step = make_step()
    replayed = CapturedStep(step, uint8_batch(gather=False))
    expected = make_step().train_on(uint8_batch(gather=False))
    found = replayed.train_on(uint8_batch(gather=False))
    assert torch.equal(found["images_adv"], expected["images_adv"])


def test_a_step_that_another_follows_is_refused() -> None:
    step = make_step(dataclasses.replace(CONFIG, attack_from=1))
    replayed = CapturedStep(step, batches()[0])
    assert not replayed.outdated
    step.end_epoch()
    with pytest.raises(ValueError, match="another step begins with this epoch"):
        replayed.train_on(batches()[0])


def test_what_a_graph_cannot_take_is_refused() -> None:
    whole = batches()[0]
    replayed = CapturedStep(make_step(), whole)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"images": whole.images.clone()}, "another loader"),
        ({"gather": False}, "another loader"),
        ({"labels": whole.labels.int()}, "labels have dtype torch.int32"),
        ({"indices": whole.indices.int()}, "indices have dtype torch.int32"),
        ({"indices": torch.arange(9), "labels": torch.zeros(9).long()}, "labels have shape"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            replayed.train_on(dataclasses.replace(whole, **change))
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    try:
        with pytest.raises(ValueError, match="settings changed"):
            replayed.train_on(whole)
    finally:
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    replayed.close()


def test_a_replay_is_of_the_batch_of_all_processes_and_not_of_the_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = batches()[0]  # the share of one of two processes
    size = 2 * len(whole.labels)
    step = make_step()
    totals: list[int | None] = []
    train_on = step.train_on

    def noted(batch: Batch, total: int | None = None) -> dict[str, torch.Tensor]:
        totals.append(total)
        return train_on(batch, total)

    monkeypatch.setattr(step, "train_on", noted)
    replayed = CapturedStep(step, whole, size)
    assert set(totals) == {size}
    replayed.train_on(whole, size)
    assert totals[-1] == size and replays == [size]
    # The last batch of the epoch, of which this process has as many images: not the same graph.
    replayed.train_on(whole, size - 1)
    assert totals[-1] == size - 1 and replays == [size]
    replayed.train_on(whole, size - 1)
    assert totals[-1] == size - 1 and replays == [size, size - 1]
    replayed.close()


@pytest.mark.parametrize(("size", "recorded"), [(2, True), (1, False)])
def test_a_batch_is_recorded_only_where_each_process_has_an_image_of_it(
    size: int, recorded: bool
) -> None:
    whole = batches()[0]
    step = make_step()
    replayed = CapturedStep(step, whole, len(whole.labels))
    step.world = SimpleNamespace(size=2)  # type: ignore[assignment]
    shorter = dataclasses.replace(whole, labels=whole.labels[:size], indices=whole.indices[:size])
    for _ in range(2):
        found = replayed._shorter(shorter, size)
    assert (found is not None) == recorded
    replayed.close()


def test_a_learning_rate_that_would_be_baked_in_is_refused() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    elsewhere = make_optimizer(model, CONFIG)
    elsewhere.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    for baked in (optimizer, elsewhere):
        with pytest.raises(ValueError, match="learning rate that is a tensor"):
            CapturedStep(TrainStep(model, baked, COUNTS, CONFIG), batches()[0])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_state_that_an_optimizer_makes_in_its_first_step_is_refused_and_left_out(kind: str) -> None:
    def made() -> TrainStep:
        model = make_model()
        weights, rate = model.parameters(), torch.tensor(0.05)
        own: torch.optim.Optimizer = torch.optim.SGD(weights, lr=rate, momentum=0.9)
        if kind == "adamw":
            own = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
        assert not any(own.state[weight] for weight in model.parameters())  # read, and so there
        return TrainStep(model, own, COUNTS, CONFIG)

    launched, captured = made(), made()
    whole, second, _ = batches()
    with pytest.raises(ValueError, match=r"^optimizer: .* its first step, .*; take that of make_o"):
        CapturedStep(captured, whole)
    assert_same_state(launched, captured)
    assert_same_step(launched, captured, whole)  # after the first the state is there
    replayed = CapturedStep(captured, whole)
    for batch in (second, whole):
        assert_same_step(launched, replayed, batch)
    assert_same_state(launched, captured)


def test_an_optimizer_that_keeps_no_state_is_captured() -> None:
    steps = []
    for _ in range(2):
        model = make_model()
        own = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.05))
        assert not any(own.state[weight] for weight in model.parameters())  # read, and so there
        steps.append(TrainStep(model, own, COUNTS, CONFIG))
    launched, captured = steps
    whole, second, _ = batches()
    replayed = CapturedStep(captured, whole)
    for batch in (whole, second):
        assert_same_step(launched, replayed, batch)
    assert_same_state(launched, captured)


def test_buffers_that_a_network_does_not_save_are_kept_from_the_warm_up_too() -> None:
    def counting() -> TrainStep:
        model: Any = make_model()
        model.stem.register_buffer("seen", torch.zeros(()), persistent=False)
        model.stem.register_forward_pre_hook(lambda stem, _: stem.seen.add_(1) and None)
        return TrainStep(model, make_optimizer(model, CONFIG), COUNTS, CONFIG)

    launched, captured = counting(), counting()
    whole = batches()[0]
    replayed = CapturedStep(captured, whole)
    assert_same_step(launched, replayed, whole)
    assert launched.model.stem.seen == captured.model.stem.seen > 0  # type: ignore[union-attr]
    assert_same_state(launched, captured)


def test_an_optimizer_without_state_is_captured() -> None:
    config = dataclasses.replace(CONFIG, momentum=0.0, nesterov=False)
    launched, captured = make_step(config), make_step(config)
    given = batches()
    replayed = CapturedStep(captured, given[0])
    for batch in given:
        assert_same_step(launched, replayed, batch)
    assert_same_state(launched, captured)


def test_a_saved_learning_rate_is_read_into_the_memory_of_the_present_one() -> None:
    step, saved = make_step(), make_step()
    saved.train_on(batches()[0])
    set_learning_rate(saved.optimizer, 0.25)
    state = saved.optimizer.state_dict()
    rate = step.optimizer.param_groups[0]["lr"]
    load_optimizer(step.optimizer, state)
    assert step.optimizer.param_groups[0]["lr"] is rate and float(rate) == 0.25
    assert state["param_groups"][0]["lr"] is not rate
    for a, b in zip(step.model.parameters(), saved.model.parameters(), strict=True):
        momentum = [s.optimizer.state[p]["momentum_buffer"] for s, p in ((step, a), (saved, b))]
        assert torch.equal(*momentum) and momentum[1].any()


def test_a_learning_rate_saved_on_a_cpu_comes_back_to_the_device_of_the_weights() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.SGD([weight], lr=torch.tensor(0.25))
    state = optimizer.state_dict()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device="meta")
    load_optimizer(optimizer, state)
    assert optimizer.param_groups[0]["lr"].device == weight.device


def test_a_capture_is_not_ended_by_what_the_threads_of_a_loader_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[object] = []
    inner = torch.cuda.graph

    def noting(*given: Any, **named: Any) -> Any:
        modes.append(named["capture_error_mode"])
        return inner(*given, **named)

    monkeypatch.setattr(torch.cuda, "graph", noting)
    CapturedStep(make_step(), batches()[0])
    assert modes == ["thread_local"]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    before = torch.cuda.current_stream()

    def fails() -> None:
        assert not gc.isenabled()  # what it frees would be freed in the graph's pool
        raise RuntimeError("cannot be captured")

    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    with pytest.raises(RuntimeError, match="cannot be captured"):
        record(StepGraph(), fails, torch.cuda.Stream())  # type: ignore[arg-type]
    assert streams == [before] and gc.isenabled()
