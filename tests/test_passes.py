"""Passes of AutoAttack from graphs that are played by the network itself: values, sizes, fallback.

The fake graphs execute nothing that lasts while they are captured. tests/test_gpu.py has real ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from made_graphs import PassGraph, patch_cuda
from made_search import search
from torch import Tensor, nn

from reat_fast.attack import Norm
from reat_fast.data import ImageSet
from reat_fast.evaluation import captured, passes, victim
from reat_fast.evaluation.apgd import cross_entropy, targeted_dlr
from reat_fast.evaluation.attacks import Attack
from reat_fast.evaluation.autoattack import AutoAttack
from reat_fast.evaluation.measure import evaluate
from reat_fast.evaluation.passes import FIRST_LAUNCHES, RecordedPasses, Replays, filled_up
from reat_fast.evaluation.victim import attacked

SIZE = 12


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[PassGraph]:
    """Let passes be captured on the CPU; returns the graphs made so far, a pair for each."""
    made_graphs: list[PassGraph] = []
    record = passes.record
    live: dict[int, Tensor] = {}

    @contextmanager
    def capture(graph: Any, pool: Any, *_: object, **__: object) -> Iterator[None]:
        graph.shares = pool
        made_graphs.append(graph)
        yield

    def noted(graph: Any, body: Any, *rest: Any) -> Tensor:
        recorded, forward = body.__self__, body.__name__ == "_forward"
        outcome = record(graph, body, *rest)
        static = outcome.detach()
        static.fill_(torch.nan)  # what a capture computes is never seen

        def played() -> Tensor:
            if forward:
                live[id(recorded)] = recorded._forward()
                return live[id(recorded)].detach()
            # Once, as of a graph whose maps are gone: the next one needs a forward before it.
            logits, inputs = live.pop(id(recorded)), recorded._images
            return torch.autograd.grad(logits, inputs, recorded._by_logits)[0]

        graph.body, graph.outcome = played, static
        return outcome

    patch_cuda(
        monkeypatch,
        CUDAGraph=PassGraph,
        graph=capture,
        get_sync_debug_mode=lambda: 0,
        set_sync_debug_mode=lambda mode: None,
        empty_cache=lambda: None,
    )
    monkeypatch.setattr(passes, "record", noted)
    monkeypatch.setattr(passes, "attack_stream", torch.cuda.Stream)
    monkeypatch.setattr(victim, "can_capture", lambda device: True)
    return made_graphs


def launched(
    model: nn.Module, images: Tensor, objective: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what victim.gradient does, on a batch that is filled up, whatever is captured."""
    whole = filled_up(images).requires_grad_()
    logits = model(whole)[: len(images)]
    values = objective(logits)
    (gradient,) = torch.autograd.grad(values.sum(), whole)
    return logits.detach(), values.detach(), gradient[: len(images)]


@pytest.mark.parametrize("objective", [cross_entropy, targeted_dlr])
def test_replayed_passes_are_the_launched_ones_on_fewer_images_too(
    graphs: list[PassGraph],
    model: nn.Module,
    test_set: tuple[Tensor, Tensor],
    objective: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    images, labels = test_set
    model.requires_grad_(False)
    recorded = RecordedPasses(model, filled_up(images[:SIZE]))
    found: list[tuple[Tensor, ...]] = []
    expected: list[tuple[Tensor, ...]] = []
    for rows in (slice(SIZE), slice(20, 29), slice(30, 42)):
        own = labels[rows]

        def loss(logits: Tensor, own: Tensor = own) -> Tensor:
            return objective(logits, own, (own + 1) % 6)

        with torch.no_grad():  # as Square's are taken
            found.append((recorded.logits(images[rows]), *recorded.gradient(images[rows], loss)))
        whole = launched(model, images[rows], loss)
        expected.append((whole[0], *whole))
    # Looked at when all are done: what was returned is not overwritten by the next replay.
    for given, wanted in zip(found, expected, strict=True):
        for mine, theirs in zip(given, wanted, strict=True):
            assert not mine.requires_grad
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert [graph.replays for graph in graphs] == [6, 3]


def test_sizes_that_last_are_captured_and_share_their_memory(
    graphs: list[PassGraph], model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    images, _ = test_set
    replays, other = Replays(), object()
    for _ in range(FIRST_LAUNCHES):
        assert replays.of(model, model, images[:9]) is None
        assert replays.of(model, model, images[:20]) is None
    assert not graphs
    nine, twenty = (replays.of(model, model, images[:count]) for count in (9, 20))
    assert nine is not None and twenty is not None and nine is not twenty
    assert replays.of(model, model, images[:SIZE]) is nine  # both are filled up to twelve
    assert replays.of(model, other, images[:9]) is None  # another network
    assert [graph.shares for graph in graphs] == [None, *3 * [graphs[0]]]
    replays.close()
    assert len(graphs) == 4 and not any(graph.open for graph in graphs)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_search_from_graphs_is_that_of_launched_kernels(
    graphs: list[PassGraph],
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module,
    test_set: tuple[Tensor, Tensor],
    norm: Norm,
    precision: Any,
) -> None:
    images, labels = test_set

    def standing() -> tuple[list[bool], dict[str, int]]:
        with attacked(model, precision) as found:
            eps = {"linf": 0.1, "l2": 0.8}[norm]
            run = search(found, images, labels, norm=norm, eps=eps, batch_size=40).run()
            return run.robust.tolist(), run.after

    replayed = standing()
    assert sum(graph.replays for graph in graphs) > 200
    assert not any(graph.open for graph in graphs)
    count = len(graphs)
    monkeypatch.setattr(victim, "can_capture", lambda device: False)
    assert standing() == replayed and len(graphs) == count
    assert 0 < sum(replayed[0]) < len(labels)


def test_finer_passes_have_graphs_of_their_own(
    graphs: list[PassGraph], model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    images, _ = test_set
    images = images[:SIZE]
    with attacked(model, "bf16") as found, found.replaying():
        coarse = [found(images) for _ in range(FIRST_LAUNCHES + 2)]
        with found.finer(images):
            fine = [found(images) for _ in range(FIRST_LAUNCHES + 2)]
        again = found(images)
    assert all(torch.equal(one, coarse[0]) for one in (*coarse, again))
    assert all(torch.equal(one, fine[0]) for one in fine) and not torch.equal(fine[0], coarse[0])
    assert [graph.replays for graph in graphs] == [3, 0, 2, 0]


def test_passes_are_counted_whether_replayed_or_launched(
    graphs: list[PassGraph], model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    images, labels = test_set
    counted: list[int] = []
    with attacked(model) as found, found.replaying():
        found.count = counted.append  # type: ignore[method-assign]
        for _ in range(FIRST_LAUNCHES + 2):
            found(images[:SIZE])
            found.gradient(images[:SIZE], lambda z: cross_entropy(z, labels[:SIZE], labels[:SIZE]))
    assert counted == [SIZE, 2 * SIZE] * (FIRST_LAUNCHES + 2) and graphs


def test_replaying_never_waits_for_the_device(
    graphs: list[PassGraph],
    model: nn.Module,
    test_set: tuple[Tensor, Tensor],
    request: pytest.FixtureRequest,
) -> None:
    images, labels = test_set
    model.requires_grad_(False)
    recorded = RecordedPasses(model, filled_up(images[:SIZE]))
    request.getfixturevalue("forbid_syncs")
    for count in (SIZE, 5):
        own = labels[:count]
        recorded.logits(images[:count])
        recorded.gradient(images[:count], lambda z, own=own: targeted_dlr(z, own, 5 - own))  # type: ignore[misc]
    assert [graph.replays for graph in graphs] == [4, 2]


def test_a_pass_that_cannot_be_captured_is_announced_once_and_launched(
    graphs: list[PassGraph],
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module,
    test_set: tuple[Tensor, Tensor],
) -> None:
    images, _ = test_set
    record, used = passes.record, [0]

    def fail(graph: Any, body: Any, *rest: Any) -> Tensor:
        if len(graphs) >= 3:  # the backward of the second size
            used.append(graphs[0].replays)
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return record(graph, body, *rest)

    monkeypatch.setattr(passes, "record", fail)
    with (
        pytest.warns(UserWarning, match="one by one") as warned,
        attacked(model) as found,
        found.replaying(),
    ):
        for _ in range(FIRST_LAUNCHES + 2):
            for count in (SIZE, 20, 30):
                torch.testing.assert_close(found(images[:count]), model(images[:count]))
    assert len(warned) == 1 and "stream is capturing)" in str(warned[0].message)
    # Those that were captured before are no longer used: a graph that goes may leave them damaged.
    assert len(graphs) == 3 and [graph.open for graph in graphs[:2]] == [False, False]
    assert used == [0, 1] and graphs[0].replays == 1


def test_graphs_are_freed_when_a_search_is_broken_off(
    graphs: list[PassGraph], model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    images, _ = test_set
    with pytest.raises(KeyboardInterrupt), attacked(model) as found, found.replaying():
        for _ in range(FIRST_LAUNCHES + 1):
            found(images[:SIZE])
        raise KeyboardInterrupt
    assert [graph.open for graph in graphs] == [False, False]
    assert torch.equal(found(images[:SIZE]), found.logits(images[:SIZE])) and len(graphs) == 2


def test_nothing_is_captured_on_a_cpu_and_outside_a_search(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr(RecordedPasses, "__init__", fail)
    images, labels = test_set
    with attacked(model) as found:
        search(found, images, labels).run()
        monkeypatch.setattr(victim, "can_capture", lambda device: True)
        for _ in range(3 * FIRST_LAUNCHES):
            found(images)


def test_the_graph_of_other_attacks_is_freed_before_a_search(
    monkeypatch: pytest.MonkeyPatch, test_set: tuple[Tensor, Tensor], model: nn.Module
) -> None:
    order: list[str] = []

    def noted(self: Any) -> Any:
        order.append("search")
        return self.standing  # as if nothing fell

    monkeypatch.setattr(AutoAttack, "run", noted)
    monkeypatch.setattr(captured.Ascents, "close", lambda self: order.append("closed"))
    images, labels = test_set
    pixels = (255 * images[:4]).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    chosen = [Attack.from_name("aa", 0.0)]
    evaluate(model, ImageSet(pixels, labels[:4].numpy()), chosen, 6, eps=0.0)
    assert order == ["closed", "search", "closed"]


def test_warnings_of_others_stay_as_they_are(
    graphs: list[PassGraph], model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    before = list(warnings.filters)
    with attacked(model) as found, found.replaying():
        for _ in range(FIRST_LAUNCHES + 1):
            found(test_set[0][:SIZE])
    assert graphs and list(warnings.filters) == before
