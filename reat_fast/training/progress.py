"""How a run reports itself: a bar on a terminal, plain lines elsewhere, and the clock behind both.

The clock counts training alone: the first step, which warms up, and evaluations stand apart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from reat_fast.cli.terminal import duration

LINE_EVERY_SECONDS = 60.0
READ_EVERY_SECONDS = 1.0


class TrainingClock:
    """Measure throughput and the time left over the steps of a run.

    work: what the steps still to be taken cost together, in any unit: those of some epochs cost
    more than those of others. clock: seconds, monotonic; tests pass their own.
    """

    def __init__(self, work: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._mark = clock()
        self._timed_work = 0.0
        self._epoch_images, self._epoch_began = 0, 0.0
        self.work_left = work
        self.training_seconds = 0.0
        self.waiting_seconds = 0.0
        self.warm_up_seconds: float | None = None

    def begin_epoch(self) -> None:
        """Count the images of another epoch from here on."""
        self._epoch_images, self._epoch_began = 0, self.training_seconds

    def resume(self) -> None:
        """Start counting again after something that is not training."""
        self._mark = self._clock()

    def waited(self) -> None:
        """Note that the time since the last step went by waiting for a batch."""
        if self.warm_up_seconds is not None:
            self.waiting_seconds += self._clock() - self._mark

    def step(self, images: int, work: float) -> None:
        """Count one step of so many images."""
        now = self._clock()
        elapsed, self._mark = now - self._mark, now
        self.work_left -= work
        if self.warm_up_seconds is None:
            self.warm_up_seconds = elapsed
            return
        self.training_seconds += elapsed
        self._timed_work += work
        self._epoch_images += images

    def catch_up(self) -> None:
        """Count what the device still had to do after the last step; call after a sync."""
        now = self._clock()
        if self._timed_work:
            self.training_seconds += now - self._mark
        self._mark = now

    @property
    def images_per_second(self) -> float:
        """Images trained on per second of this epoch, without the first step; 0 before the next."""
        seconds = self.training_seconds - self._epoch_began
        return self._epoch_images / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """Seconds of training that are left at the pace so far; 0 before the second step."""
        if not self._timed_work:
            return 0.0
        return self.training_seconds / self._timed_work * self.work_left


class EpochTime:
    """Add up what the running epoch takes, over all processes that work on it.

    spent: what earlier ones said when they saved.
    """

    def __init__(self, spent: dict[str, float] | None = None) -> None:
        self._earlier = spent or {"seconds": 0.0, "training": 0.0, "waiting": 0.0}
        self._read: Callable[[], tuple[float, float, float]] = lambda: (0.0, 0.0, 0.0)
        self._began = self._read()

    def begin(self, clock: TrainingClock) -> None:
        """Count from now on, training and waiting as a clock has them."""
        self._read = lambda: (time.perf_counter(), clock.training_seconds, clock.waiting_seconds)
        self._began = self._read()

    def spent(self) -> dict[str, float]:
        """Return the seconds so far: in all, of training, and of waiting for data within it."""
        here = zip(self._read(), self._began, strict=True)
        return {
            name: earlier + now - began
            for (name, earlier), (now, began) in zip(self._earlier.items(), here, strict=True)
        }


class Progress:
    """Show a run's progress: a tqdm bar on a terminal, a line an epoch (and a minute) elsewhere."""

    def __init__(
        self,
        epochs: int,
        clock: TrainingClock,
        *,
        terminal: bool | None = None,
        quiet: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self._epochs = epochs
        self._now = now
        self._quiet = quiet
        self._read_at = now()
        on_terminal = not quiet and (sys.stderr.isatty() if terminal is None else terminal)
        self._bar = (
            tqdm(
                total=clock.work_left,
                dynamic_ncols=True,
                bar_format="{desc}{percentage:3.0f} %|{bar}|{postfix}",
            )
            if on_terminal
            else None
        )

    def due(self) -> bool:
        """Say whether to read the running loss: each second, each minute without a terminal."""
        waited = self._now() - self._read_at
        return waited >= (READ_EVERY_SECONDS if self._bar is not None else LINE_EVERY_SECONDS)

    def expect(self, work: float) -> None:
        """Take so much work for what is left, as where a run has gone back."""
        self.clock.work_left = work
        if self._bar is not None:
            self._bar.total = self._bar.n + work

    def step(self, epoch: int, means: dict[str, float] | None) -> None:
        """Move on by one step; means as from TrainStep.running_means when it was due."""
        if means is not None:
            self._read_at = self._now()
        if self._bar is not None:
            self._bar.update(self._bar.total - self._bar.n - self.clock.work_left)
            if means is not None:
                self._bar.set_description(f"epoch {epoch}/{self._epochs}", refresh=False)
                self._bar.set_postfix_str(self._summary(means), refresh=True)
        elif means is not None:
            self.say(f"epoch {epoch}/{self._epochs} under way  {self._summary(means)}")

    def epoch(self, epoch: int, means: dict[str, float], note: str = "") -> None:
        """Report a finished epoch in one line that stays."""
        self._read_at = self._now()
        self.say(f"epoch {epoch}/{self._epochs}  {self._summary(means)}{note}")

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one; nothing where all is quiet."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        elif not self._quiet:
            print(line, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.leave = False
            self._bar.close()

    def _summary(self, means: dict[str, float]) -> str:
        told = f"loss {means['loss']:.4f}  adv {means['adv_accuracy']:.1f} %"
        if self.clock.images_per_second:  # unknown where the first step is the only one yet
            told += f"  {self.clock.images_per_second:.0f} images/s"
        if self.clock.training_seconds:
            told += f"  left {duration(self.clock.seconds_left)}"
        return told
