"""Attacks from a graph that is played by the body itself: figures, fillings, refusals, fallback.

The fake graph executes nothing that lasts while it is captured, and runs the body on the static
buffers when it is replayed. tests/test_gpu.py has the real one.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from made_graphs import PassGraph, patch_cuda
from made_victim import COUNT, EPS, SIZE, attack, batch, labelled_images, make_victim
from torch import Tensor, nn
from tqdm import tqdm

from reat_fast.data import ImageSet
from reat_fast.engine.precision import Precision
from reat_fast.evaluate import evaluate
from reat_fast.evaluation import captured
from reat_fast.evaluation.attacks import Attack
from reat_fast.evaluation.captured import Ascents, CapturedAscent
from reat_fast.evaluation.victim import attacked


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[PassGraph]:
    """Let everything be captured on the CPU; returns the graphs made so far."""
    made: list[PassGraph] = []
    record = captured.record

    @contextmanager
    def capture(graph: PassGraph, *_: object, **__: object) -> Iterator[None]:
        made.append(graph)
        yield

    def noted(graph: Any, body: Any, *rest: Any) -> Tensor:
        ascent = body.__self__
        graph.body, graph.outcome = body, record(graph, body, *rest)
        graph.outcome.fill_(torch.nan)  # what a capture computes is never seen
        ascent._adv.fill_(torch.nan)
        return graph.outcome

    patch_cuda(
        monkeypatch,
        CUDAGraph=PassGraph,
        graph=capture,
        get_sync_debug_mode=lambda: 0,
        set_sync_debug_mode=lambda mode: None,
    )
    monkeypatch.setattr(captured, "record", noted)
    monkeypatch.setattr(captured, "can_capture", lambda device: True)
    monkeypatch.setattr(captured, "attack_stream", torch.cuda.Stream)
    return made


@pytest.fixture(scope="module")
def image_set() -> ImageSet:
    return labelled_images(COUNT)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["fgsm", "pgd5", "cw3", "lsa3", "l2pgd4"])
def test_replayed_steps_equal_eager_ones_bit_for_bit(
    graphs: list[PassGraph], image_set: ImageSet, name: str, precision: Precision
) -> None:
    with attacked(make_victim(), precision) as victim:
        first = batch(victim, image_set, torch.arange(SIZE))
        ascent = CapturedAscent(victim, attack(name).loss, SIZE, first[0], attack(name).norm)
        for given in (first, batch(victim, image_set, torch.arange(SIZE) + 11)):
            untouched = [tensor.clone() for tensor in given]
            expected = attack(name).perturb(victim, *given, EPS)
            found = ascent.perturb(attack(name), *given, EPS)
            assert torch.equal(found, expected) and found.stride() == expected.stride()
            assert not torch.equal(found, given[0])
            assert all(torch.equal(a, b) for a, b in zip(given, untouched, strict=True))
        ascent.close()
    assert [graph.replays for graph in graphs] == [2 * attack(name).steps]
    assert not graphs[0].open


def test_radius_step_size_and_steps_are_no_part_of_the_graph(
    graphs: list[PassGraph], image_set: ImageSet
) -> None:
    with attacked(make_victim()) as victim:
        given = batch(victim, image_set, torch.arange(SIZE))
        ascent = CapturedAscent(victim, "pgd", SIZE, given[0])
        kept = []
        for eps, step_size, steps in ((0.1, 0.02, 4), (0.01, 0.01, 1), (0.1, 0.05, 2)):
            chosen = Attack("any", steps, step_size, random_start=True)
            expected = chosen.perturb(victim, *given, eps)
            kept.append((ascent.perturb(chosen, *given, eps), expected))
        assert all(torch.equal(found, expected) for found, expected in kept)
    assert len(graphs) == 1


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_short_batch_is_filled_up_with_its_own_rows(
    graphs: list[PassGraph], image_set: ImageSet, count: int
) -> None:
    with attacked(make_victim(torch.float64)) as victim:
        given = batch(victim, image_set, torch.arange(20, 20 + count))
        ascent = CapturedAscent(victim, "pgd", SIZE, given[0])
        found = ascent.perturb(attack("pgd5"), *given, EPS)
        filled = [tensor[torch.arange(SIZE) % count] for tensor in given]
        expected = attack("pgd5").perturb(victim, *filled, EPS)
        assert found.shape == given[0].shape and torch.equal(found, expected[:count])
        assert torch.equal(found, attack("pgd5").perturb(victim, *given, EPS))
        for buffer, tensor in zip((ascent._clean, ascent._labels), (0, 2), strict=True):
            assert torch.equal(buffer, filled[tensor])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_evaluation_from_graphs_is_that_of_the_cpu(
    graphs: list[PassGraph],
    monkeypatch: pytest.MonkeyPatch,
    image_set: ImageSet,
    dtype: torch.dtype,
) -> None:
    names = ("clean", "fgsm", "pgd5", "pgd7", "cw5", "lsa5", "l2pgd5")

    def evaluated() -> tuple[dict[str, Any], int, list[int]]:
        seen: list[int] = []
        with tqdm(disable=False, file=io.StringIO()) as bar:
            result = evaluate(
                make_victim(dtype),
                image_set,
                [attack(name) for name in names],
                4,
                eps=EPS,
                batch_size=SIZE,
                restarts=3,
                progress=seen.append,
                bar=bar,
            )
            return result, bar.n, seen

    replayed = evaluated()
    # FGSM alone would not be worth a graph: it has four steps.
    assert len(graphs) == 4 and not any(graph.open for graph in graphs)
    assert all(graph.replays > 20 for graph in graphs)
    monkeypatch.setattr(captured, "can_capture", lambda device: False)
    assert evaluated() == replayed
    assert len(graphs) == 4
    robust = [replayed[0]["attacks"][name]["overall"] for name in names]
    assert robust[0] == 100 and len(set(robust)) > 3 and min(robust) > 0


def test_all_attacks_with_one_loss_share_a_graph(
    graphs: list[PassGraph], image_set: ImageSet
) -> None:
    attacks = [attack(name) for name in ("clean", "pgd9", "fgsm", "pgd20")]
    evaluate(make_victim(), image_set, attacks, 4, eps=EPS, batch_size=SIZE)
    assert [graph.replays for graph in graphs] == [4 * (9 + 1 + 20)]


def test_a_few_steps_are_not_worth_a_graph(graphs: list[PassGraph], image_set: ImageSet) -> None:
    few = [attack(name) for name in ("clean", "fgsm", "pgd4")]
    evaluate(make_victim(), image_set, few, 4, eps=EPS, batch_size=SIZE)
    assert not graphs
    evaluate(make_victim(), image_set, few, 4, eps=EPS, batch_size=SIZE, restarts=2)
    assert [graph.replays for graph in graphs] == [4 * (4 + 2)]  # of the second start two batches


def test_nothing_is_captured_on_a_cpu(monkeypatch: pytest.MonkeyPatch, image_set: ImageSet) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("captured on a CPU")

    monkeypatch.setattr(CapturedAscent, "__init__", fail)
    evaluate(make_victim(), image_set, [attack("pgd20")], 4, eps=EPS, batch_size=SIZE)


def test_what_a_graph_cannot_take_is_refused(graphs: list[PassGraph], image_set: ImageSet) -> None:
    with attacked(make_victim()) as victim:
        clean, start, labels = batch(victim, image_set, torch.arange(SIZE))
        ascent = CapturedAscent(victim, "pgd", SIZE, clean)
        more = batch(victim, image_set, torch.arange(SIZE + 1))
        changes: list[tuple[Attack, tuple[Tensor, Tensor, Tensor], str]] = [
            (attack("pgd5"), more, "clean images are torch.float32 .9, 3"),
            (attack("pgd5"), (clean[:0], start[:0], labels[:0]), "clean images are"),
            (attack("pgd5"), (clean[..., :5], start, labels), "clean images are"),
            (attack("pgd5"), (clean.double(), start, labels), "clean images are torch.float64"),
            (attack("pgd5"), (clean, start[:3], labels), "starts are"),
            (attack("pgd5"), (clean.to("meta"), start, labels), "on meta"),
            (attack("pgd5"), (clean, start, labels.int()), "labels are torch.int32"),
            (attack("cw5"), (clean, start, labels), "cw5: steps on the loss pgd in linf were"),
            (attack("clean"), (clean, start, labels), "clean: steps on the loss pgd"),
        ]
        for chosen, given, message in changes:
            with pytest.raises(ValueError, match=message):
                ascent.perturb(chosen, *given, EPS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
            with pytest.raises(ValueError, match="settings changed"):
                ascent.perturb(attack("pgd5"), clean, start, labels, EPS)
        assert graphs[0].replays == 0


def test_a_step_that_cannot_be_captured_is_announced_once_and_launched(
    graphs: list[PassGraph], monkeypatch: pytest.MonkeyPatch, image_set: ImageSet
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    attacks = [attack(name) for name in ("pgd9", "cw9", "lsa9")]
    with monkeypatch.context() as patch:
        patch.setattr(captured, "record", fail)
        with pytest.warns(UserWarning, match="one by one") as warned:
            launched = evaluate(make_victim(), image_set, attacks, 4, eps=EPS, batch_size=SIZE)
    assert len(warned) == 1 and "stream is capturing)" in str(warned[0].message)
    replayed = evaluate(make_victim(), image_set, attacks, 4, eps=EPS, batch_size=SIZE)
    assert launched == replayed and len(graphs) == 3


def test_a_network_that_waits_is_found_before_the_capture(
    graphs: list[PassGraph], monkeypatch: pytest.MonkeyPatch, image_set: ImageSet
) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_victim()

        def forward(self, images: Tensor) -> Tensor:
            if modes and modes[-1] == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            logits: Tensor = self.inner(images)
            return logits

    with pytest.warns(UserWarning, match="synchronizing CUDA operation"):
        evaluate(Waiting(), image_set, [attack("pgd9")], 4, eps=EPS, batch_size=SIZE)  # type: ignore[arg-type]
    assert modes == ["error", 0] and not graphs


def test_the_graph_is_freed_when_an_evaluation_is_broken_off(
    graphs: list[PassGraph], image_set: ImageSet
) -> None:
    def stop(images: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            make_victim(), image_set, [attack("pgd9")], 4, eps=EPS, batch_size=SIZE, progress=stop
        )
    assert [graph.open for graph in graphs] == [False]


def test_replaying_never_waits_for_the_device(
    graphs: list[PassGraph], image_set: ImageSet, request: pytest.FixtureRequest
) -> None:
    with attacked(make_victim()) as victim, Ascents(victim, SIZE) as ascents:
        whole, short = (batch(victim, image_set, torch.arange(n)) for n in (SIZE, 3))
        ascents.perturb(attack("cw9"), *whole, EPS, 99)
        request.getfixturevalue("forbid_syncs")
        ascents.perturb(attack("cw9"), *whole, EPS, 99)
        ascents.perturb(attack("cw9"), *short, EPS, 99)
    assert graphs[0].replays == 27


def test_warnings_of_others_stay_as_they_are(graphs: list[PassGraph], image_set: ImageSet) -> None:
    before = list(warnings.filters)
    evaluate(make_victim(), image_set, [attack("pgd9")], 4, eps=EPS, batch_size=SIZE)
    assert graphs and list(warnings.filters) == before
