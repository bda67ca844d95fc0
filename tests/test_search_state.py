"""A search that is broken off goes on where it stood, and from no other state than its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from made_search import EPS, RADII, search
from torch import Tensor, nn

from reat_fast.attack import Norm
from reat_fast.evaluation import autoattack, square
from reat_fast.evaluation.autoattack import AutoAttack
from reat_fast.evaluation.search_state import SearchState
from reat_fast.evaluation.victim import Victim, attacked
from reat_fast.networks.architectures import Network
from reat_fast.storage.save_pace import SavePace


def test_batch_size_and_breaks_change_nothing(
    model: nn.Module,
    test_set: tuple[Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, labels = test_set
    monkeypatch.setattr(autoattack, "SAVE_EVERY_SECONDS", 0.0)
    with attacked(model) as victim:
        whole = search(victim, images, labels).run()
        calls = 0

        class Killed(Exception):
            pass

        def images_until_killed(rows: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls in (7, 15):
                raise Killed
            return images[rows]

        breaks = 0
        while True:
            broken = AutoAttack(
                victim, images_until_killed, labels, eps=EPS, seed=0, batch_size=7,
                steps=12, queries=60, state=SearchState(tmp_path),
            )  # fmt: skip
            try:
                parts = broken.run()
                break
            except Killed:
                breaks += 1
                assert any(tmp_path.iterdir())
    assert breaks == 2 and torch.equal(parts.robust, whole.robust)
    with monkeypatch.context() as patched:  # at its end there is nothing to do again
        patched.setattr(AutoAttack, "_survive", lambda *_: pytest.fail("attacked again"))
        again = AutoAttack(
            victim, images_until_killed, labels, eps=EPS, seed=0, batch_size=7,
            steps=12, queries=60, state=SearchState(tmp_path),
        )  # fmt: skip
        assert torch.equal(again.run().robust, whole.robust)
    assert parts.after == whole.after


def test_a_finished_batch_is_not_attacked_again(
    model: nn.Module,
    test_set: tuple[Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, labels = test_set
    monkeypatch.setattr(autoattack, "SAVE_EVERY_SECONDS", 0.0)
    with attacked(model) as victim:
        first = search(victim, images, labels, state=SearchState(tmp_path), batch_size=20)
        write, perturb = first._write, fail_after(first._perturb, 4)
        # Killed, it writes nothing at its end.
        monkeypatch.setattr(first, "_write", lambda at_end=False: at_end or write())
        monkeypatch.setattr(first, "_perturb", perturb)
        with pytest.raises(KeyboardInterrupt):
            first.run()
        again = search(victim, images, labels, state=SearchState(tmp_path), batch_size=20)
        assert again.standing.run == 1 and len(again.standing.pending) < 60
        # A file that is none is not one to go on from.
        next(tmp_path.iterdir()).write_bytes(b"torn")
        assert search(victim, images, labels, state=SearchState(tmp_path)).standing.run == 0


def test_a_search_goes_on_from_its_own_state_file_alone(
    model: nn.Module,
    test_set: tuple[Tensor, Tensor],
    tmp_path: Path,
) -> None:
    images, labels = test_set

    def begins_at(victim: Victim, *given: Tensor, **setting: Any) -> int:
        """Return the attack at which a search begins: 0 unless it goes on from the state file."""
        return search(victim, *given, state=SearchState(tmp_path), **setting).standing.run

    with attacked(model) as victim:
        broken_off(2, victim, images, labels, state=SearchState(tmp_path))
        assert begins_at(victim, images, labels) == 2
        others = {"seed": 1}, {"eps": EPS / 2}, {"steps": 11}, {"queries": 61}, {"norm": "l2"}
        assert not any(begins_at(victim, images, labels, **setting) for setting in others)
        assert begins_at(victim, images.flip(0), labels) == 0
        assert begins_at(victim, images, labels.roll(1)) == 0
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters())[0, 0, 0, 0] += 1e-6  # as after one more step of training
    with attacked(other) as victim:
        assert begins_at(victim, images, labels) == 0
    with attacked(model, "bf16") as victim:
        assert begins_at(victim, images, labels) == 0


def test_searches_in_one_folder_keep_their_own_states(
    model: nn.Module,
    test_set: tuple[Tensor, Tensor],
    tmp_path: Path,
) -> None:
    images, labels = test_set
    with attacked(model) as victim:
        broken_off(2, victim, images, labels, state=SearchState(tmp_path))
        (begun,) = tmp_path.iterdir()
        state = SearchState(tmp_path)
        search(victim, images, labels, state=state, eps=EPS / 2).run()
        assert len(list(tmp_path.iterdir())) == 2
        state.remove()
        assert list(tmp_path.iterdir()) == [begun]
        again = search(victim, images, labels, state=SearchState(tmp_path))
        assert again.standing.run == 2


def test_what_a_search_found_until_it_was_broken_off_is_kept_at_once(
    model: nn.Module,
    test_set: tuple[Tensor, Tensor],
    tmp_path: Path,
) -> None:
    images, labels = test_set
    with attacked(model) as victim:
        first = broken_off(2, victim, images, labels, state=SearchState(tmp_path))
        again = search(victim, images, labels, state=SearchState(tmp_path))
    assert again.standing.run == 2 and torch.equal(again.standing.robust, first.standing.robust)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("batch_size", [64, 17])
def test_square_goes_on_within_a_batch(
    device: str,
    norm: Norm,
    batch_size: int,
    model: nn.Module,
    test_set: tuple[Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model, test_set = copy.deepcopy(model).to(device), (test_set[0].to(device), test_set[1])
    settings: dict[str, Any] = {"eps": 1.5 * RADII[norm], "norm": norm, "queries": 250}
    with attacked(model) as victim:
        whole = search(victim, *test_set, **settings)
        whole.standing.run = whole.runs.index(("square", 0))  # the others leave it none to fell
        with queries_of_square(norm) as counted:
            robust = whole.run().robust
        assert 0 < int(robust.sum()) < 50
        again, breaks = search(victim, *test_set, state=SearchState(tmp_path), **settings), 0
        again.standing.run = whole.runs.index(("square", 0))
        with queries_of_square(norm, every=90) as tried:
            while True:
                try:
                    found = again.run()
                    break
                except KeyboardInterrupt:
                    breaks += 1
                begun = again._within
                assert begun is not None and 0 < len(begun.left) < 60
                settings["batch_size"] = batch_size
                again = search(victim, *test_set, state=SearchState(tmp_path), **settings)
                assert again._within is not None and torch.equal(again._within.left, begun.left)
                with mock.patch.object(victim, "expect") as told:
                    again._announce("square", 0)
                assert again.standing.pending is not None
                most = len(again.standing.pending) * (250 + 2)
                assert told.call_args.args[1] == most - begun.reached.queries * len(begun.left)
    assert breaks > 1 and torch.equal(found.robust, robust)
    if batch_size == 64:  # nothing is tried twice but what was broken off
        done = [images for number, images in enumerate(tried, 1) if number % 90]
        assert done == counted
    else:  # what was begun with more at once is begun again
        assert max(tried[90:]) <= batch_size


def test_what_square_reached_on_logits_that_are_no_numbers_is_not_kept(
    model: nn.Module, test_set: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    with attacked(model) as victim:
        found = search(victim, *test_set, state=SearchState(tmp_path))
        with queries_of_square("linf", every=40), pytest.raises(KeyboardInterrupt):
            found.run()
        assert search(victim, *test_set, state=SearchState(tmp_path))._within is not None
        victim._finite.fill_(False)
        with queries_of_square("linf", every=1), pytest.raises(KeyboardInterrupt):
            found.run()
        again = search(victim, *test_set, state=SearchState(tmp_path))
        assert again.standing.after == found.standing.after and again._within is None


@pytest.mark.parametrize(("cost", "every"), [(0, 10), (2, 40)])
def test_square_saves_every_ten_seconds_and_less_often_where_that_takes_long(
    cost: int,
    every: int,
    model: nn.Module,
    test_set: tuple[Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A query takes a second here, and a save `cost`: at most a twentieth of the time."""
    saved: list[int] = []
    with attacked(model) as victim, queries_of_square("linf") as tried:

        def clock() -> float:
            return len(tried) + cost * len(saved)

        def write(state: SearchState, standing: dict[str, Any]) -> None:
            saved.append(len(tried))

        found = search(victim, *test_set, state=SearchState(tmp_path), queries=200)
        found.standing.run = found.runs.index(("square", 0))
        found._pace = SavePace(clock)
        monkeypatch.setattr(SearchState, "write", write)
        found.run()
    within = [queries for queries in saved if queries < 200]
    assert within[0] == 10 and set(np.diff(within).tolist()) == {every}
    assert saved[-1] == 200  # at its end in any case


def test_square_goes_on_in_the_same_process(
    model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    images, labels = test_set
    with attacked(model) as victim:
        whole = search(victim, images, labels).run()
        found = search(victim, images, labels)
        with queries_of_square("linf", every=40) as tried:
            with pytest.raises(KeyboardInterrupt):
                found.run()
            assert torch.equal(found.run().robust, whole.robust)
    assert len(tried) == 61


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_verdicts_from_logits_that_are_no_numbers_never_count(
    test_set: tuple[Tensor, Tensor], tmp_path: Path, moment: int
) -> None:
    """Not where the search goes on from what a refused one left, either."""
    images = test_set[0]
    labels = images.flatten(1)[:, :6].argmax(1)
    broken = Breaking(moment)
    for _ in range(2):
        with attacked(cast(Network, broken)) as victim:
            found = search(victim, images, labels, state=SearchState(tmp_path), steps=5, queries=5)
            with pytest.raises(FloatingPointError, match="some logits are NaN or infinite"):
                found.run()
        assert "square" not in found.standing.after
    with pytest.raises(FloatingPointError, match="some logits are NaN or infinite"):
        autoattack.autoattack(cast(Network, Breaking(moment + 1).eval()), images, labels)


class Breaking(nn.Module):
    """Right about all images until it has judged so many batches without gradients; then NaN."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.left = batches

    def forward(self, images: Tensor) -> Tensor:
        judged = len(images) > 1 and not images.requires_grad
        self.left -= judged
        return images.flatten(1)[:, :6] * self.scale * (torch.nan if self.left < 0 else 1)


def test_a_search_of_other_images_numbers_keeps_its_own_state(
    model: nn.Module, test_set: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """A share of a set may hold what a subset does; its random numbers are others."""
    images, labels = test_set
    keys = set()
    with attacked(model) as victim:
        for numbers in (None, torch.arange(60), 2 * torch.arange(60), 2 * torch.arange(60) + 1):
            state = SearchState(tmp_path)
            search(victim, images, labels, state=state, numbers=numbers)
            keys.add(state.file.name)
    assert len(keys) == 3


@contextmanager
def queries_of_square(norm: Norm, every: int = 0) -> Iterator[list[int]]:
    """Collect how many images each query of Square tries; break each off whose number divides."""
    tried: list[int] = []
    propose = square.PROPOSALS[norm]

    def counted(clean: Tensor, *rest: Any) -> Tensor:
        tried.append(len(clean))
        if every and len(tried) % every == 0:
            raise KeyboardInterrupt
        return propose(clean, *rest)

    with mock.patch.dict(square.PROPOSALS, {norm: counted}):
        yield tried


def broken_off(
    calls: int, victim: Victim, images: Tensor, labels: Tensor, **settings: object
) -> AutoAttack:
    """Return a search that was broken off within its attack after so many."""
    begun = search(victim, images, labels, **settings)
    failing = fail_after(begun._perturb, calls)
    with mock.patch.object(begun, "_perturb", failing), pytest.raises(KeyboardInterrupt):
        begun.run()
    return begun


def fail_after(function: Callable[..., Tensor], calls: int) -> Callable[..., Tensor]:
    left = calls

    def failing(*arguments: object) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return function(*arguments)

    return failing
