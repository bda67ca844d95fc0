"""The flags of python -m reat_fast.evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from reat_fast.cli.command import flag, refuse_below
from reat_fast.cli.radius import Radius, fraction_text
from reat_fast.config import Config
from reat_fast.config_checks import AT_MOST_ONE
from reat_fast.engine.precision import Precision
from reat_fast.evaluation.attacks import L2_EPS, LINF_STEP, Attack
from reat_fast.evaluation.figures import STANDARD_ATTACKS


@dataclass(frozen=True)
class Options:
    """Evaluate a trained classifier on the test set of its data."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, a .safetensors file or a checkpoint-last.pt."""
    attacks: tuple[str, ...] = STANDARD_ATTACKS
    """clean, fgsm, pgd20, pgd100, cw20, lsa20, l2pgd20 (any N), aa (AutoAttack), l2aa (the
    same in L2), or aa-package and l2aa-package, the much slower ones of pyautoattack, to compare
    with."""
    eps: Radius | None = None
    """L-infinity radius, on images in [0, 1]; unset: that of the run, 8/255 of lone weights."""
    step_size: Radius | None = None
    """Step of the PGD, CW and LSA attacks; unset: a quarter of the radius, 2/255 of 8/255."""
    l2_eps: Radius = L2_EPS
    """L2 radius of l2pgdN and l2aa, over a whole image; the step of l2pgdN is 15/128 of it."""
    restarts: int = 1
    """Random starts of these attacks; an image counts if it withstands them all."""
    precision: Precision | None = None
    """Arithmetic in which attacks search; unset: that of the run, bf16 on a GPU unless it was given
    another, else float32. Verdicts are always in float32."""
    dataset: str | None = None
    """Data set; unset: the one the run was trained on."""
    data: Path | None = None
    """Where the data is; unset: where the run found it."""
    image_size: int | None = None
    """Pixels a side that image files are resized and cut to; unset: as in the run."""
    skip_bad: bool = False
    """Leave out images that cannot be decoded, as a run with this flag does."""
    subset: int | None = None
    """Evaluate on so many test images, each class by its share; unset: on all."""
    train_counts: tuple[int, ...] | None = None
    """Training images per class, where the folder of the weights does not tell them."""
    batch_size: int | None = None
    """Images per batch; changes no figure. Unset: 500 on a CPU, on a GPU as many as fit, up to
    4,096."""
    seed: int | None = None
    """Seed of all that is random in the attacks; unset: that of the run, 0 of lone weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """JSON file to write, in which attacks on the same weights under the same conditions stay; one
    that holds others gets the next free name. Unset: evaluation.json in the folder of the run,
    other conditions go to evaluation-2.json."""
    quiet: bool = False
    """Show no progress and no table, only warnings and errors."""

    def __post_init__(self) -> None:
        refuse_below(1, self, "image_size", "subset", "batch_size", "restarts")
        for name in ("eps", "step_size"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{flag(name)} {value}: must lie in [0, 1]{AT_MOST_ONE[name]}")
        if not 0 <= self.l2_eps <= 1e4:
            raise ValueError(
                f"--l2-eps {self.l2_eps}: must be a length, 0 or more; 128/255 is usual"
            )
        if self.seed is not None:
            Config(seed=self.seed)
        if not self.attacks:
            raise ValueError("--attacks: name at least one, such as clean or pgd20")

    def idle(self, run_eps: float) -> Iterator[str]:
        """Name each flag that acts on none of the attacks; one that says the usual is no mistake.

        run_eps: the L-infinity radius of the run.
        """
        attacks = [Attack.from_name(name, 0.0) for name in self.attacks if name != "clean"]
        linf = [attack for attack in attacks if attack.norm == "linf"]
        eps = run_eps if self.eps is None else self.eps
        step = LINF_STEP * eps if self.step_size is None else self.step_size
        for name, idle, goes_with in (
            (
                "eps",
                eps != run_eps and not linf,
                "attacks in L-infinity; the radius in L2 is --l2-eps",
            ),
            ("l2_eps", self.l2_eps != L2_EPS and len(linf) == len(attacks), "l2pgdN and l2aa"),
            (
                "step_size",
                step != LINF_STEP * eps and not any(attack.random_start for attack in linf),
                "pgdN, cwN and lsaN",
            ),
            (
                "restarts",
                self.restarts > 1 and not any(attack.random_start for attack in attacks),
                "pgdN, cwN, lsaN and l2pgdN",
            ),
        ):
            if idle:
                given = f"{flag(name)} {fraction_text(getattr(self, name))}"
                named = ", ".join(self.attacks)
                yield f"{given}: acts on none of {named}; it goes with {goes_with}"
