"""One training run: its data, model and step on the device, and where it stands."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from reat_fast import checkpoint
from reat_fast.cli.command import is_out_of_memory
from reat_fast.data import Dataset, ImageSet, Splits, load_run_data
from reat_fast.engine.memory import keep_freed_memory
from reat_fast.engine.precision import use_precision
from reat_fast.engine.reference_step import ReferenceStep
from reat_fast.engine.replayed_step import ReplayedStep
from reat_fast.env import environment
from reat_fast.evaluation.figures import SELECTION
from reat_fast.evaluation.trained_on import digest_of_files, digest_of_images, draw_splits
from reat_fast.loaders import Batch
from reat_fast.loaders.choose import make_loader
from reat_fast.loaders.order import EpochOrder
from reat_fast.methods.work import work_of_training, work_per_image
from reat_fast.step import TrainStep, load_optimizer, make_optimizer
from reat_fast.storage import weights_file
from reat_fast.storage.config_file import to_json
from reat_fast.storage.save_pace import SavePace
from reat_fast.storage.weights_file import CheckpointError
from reat_fast.training.logs import MetricLog
from reat_fast.training.network import build_network
from reat_fast.training.plan import Plan
from reat_fast.training.progress import EpochTime
from reat_fast.training.run_folder import FolderLock, describe_run, make_folder, write_tables


class Run:
    """One training run: data, model and step on the device, and the position reached."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config, self.world = plan, plan.config, plan.world
        if self.world.size > 1 and self.config.on_nonfinite == "rollback":
            raise ValueError("--on-nonfinite rollback: works in one process; leave it out")
        if self.world.size > 1 and self.config.attack == "free":
            raise ValueError("--attack free: works in one process; leave it out")
        self.device = plan.device
        self.dataset, self.splits = load_splits(plan)
        self.images = digest_of_images(self.splits)
        """What tells the training images from others, "" for lazy ones."""
        use_precision(self.config, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.spec, self.model = build_network(
            self.config, self.dataset, self.splits.counts, self.device
        )
        self.optimizer = make_optimizer(self.model, self.config)
        kind = TrainStep if self.config.fused else ReferenceStep
        self.step = kind(self.model, self.optimizer, self.splits.counts, self.config, self.world)
        self.replayed = ReplayedStep(self.step)
        self._make_loader()
        self.epoch, self.batch = 0, 0
        """Where the next step is: epochs done, and batches of the running one."""
        self.lr_scale = 1.0
        self.metrics: list[dict[str, Any]] = []
        self.timing: list[dict[str, Any]] = []
        self.best: dict[str, float] | None = None
        self._unsaved_best: bytes | None = None
        self.epoch_time = EpochTime()
        self.save_pace = SavePace()
        self.pace: float | None = None
        """Seconds that a step of the attack takes per image, once measured."""
        described = environment()
        self.code = {name: described[name] for name in ("reat_fast", "commit", "torch")}
        self.code["processes"] = self.world.size  # which share sums, and so round otherwise
        self.changed_code = ""
        self._lock: FolderLock | None = None
        self.log: MetricLog | None = None
        if plan.state is not None and plan.source is not None:
            self.load_state(plan.state, plan.source)

    def _make_loader(self) -> None:
        config, train = self.config, self.splits.train
        if config.batch_size > len(train):
            raise ValueError(
                f"--batch-size {config.batch_size}: the training set has {len(train):,} images; "
                f"give at most {len(train)}"
            )
        self.order = EpochOrder(
            train.labels,
            config.batch_size,
            sampler=config.sampler,
            seed=config.seed,
            epochs=config.epochs,
            drop_last=config.drop_last,
            rank=self.world.rank,
            world=self.world.size,
        )
        self.loader, self.loader_reason = make_loader(
            train, self.order, self.device, loader=config.loader, workers=config.workers
        )
        self.batches = min(len(self.order), config.limit_batches or len(self.order))

    @property
    def step_work(self) -> int:
        """What a step of the running epoch costs: forward passes of an image, for each image."""
        return work_per_image(self.config, self.epoch)

    @property
    def work_left(self) -> int:
        """What the steps from where the run stands to its end cost."""
        if self.epoch == self.config.epochs:
            return 0
        to_come = work_of_training(self.config, self.epoch)
        return self.batches * to_come - self.batch * self.step_work

    def images_in(self, batch: int) -> int:
        """Return the images of batch number `batch` over all processes."""
        size = self.config.batch_size
        return min(size, len(self.splits.train) - batch * size)

    def take_step(self, batch: Batch) -> None:
        """Take one training step on the loader's next batch.

        Errors: ValueError where the step cannot be captured.
        """
        self.replayed.train_on(batch, self.images_in(self.batch))
        self.batch += 1

    def limited(self, image_set: ImageSet) -> ImageSet:
        """Return what an evaluation looks at: all of a set without --limit-batches."""
        if self.config.limit_batches is None:
            return image_set
        return image_set.evenly(self.config.limit_batches * self.config.batch_size)

    @property
    def folder(self) -> Path:
        """The folder of the run; the main process alone writes it."""
        return self.plan.run_dir

    def open_folder(self) -> None:
        """Take the folder for this process; write what describes the run, and its beginning."""
        if self.world.main:
            numbered = self.plan.state is None and self.config.run_dir is None
            self.plan.run_dir = make_folder(self.folder, self.plan.preset if numbered else "")
            self._lock = FolderLock(self.folder)
            if self.plan.state is None and checkpoint.has_checkpoint(self.folder):
                raise CheckpointError(
                    f"--run-dir {self.folder}: another run ended here meanwhile; name another"
                )
            describe_run(
                self.folder,
                self.plan.preset,
                self.config,
                self.dataset,
                self.splits,
                images=digest_of_files(self.splits),
            )
            if self.plan.state is not None:  # a kill leaves rows of epochs that are trained again
                write_tables(self.folder, self.metrics, self.timing)
            self.log = MetricLog(
                self.config.log,
                self.folder,
                dataclasses.asdict(self.config),
                self.plan.preset,
                history=zip(self.metrics, self.timing, strict=True),
                attack=SELECTION.get(self.config.evaluation, SELECTION["held-out"])[0],
            )
            if self.plan.state is None:  # nothing can be refused any more: --resume works from here
                self.save()

    def close(self) -> None:
        """Free the graph, the loader's processes and the folder."""
        self.replayed.forget()
        self.loader.close()
        if self.log is not None:
            self.log.close()
        if self._lock is not None:
            self._lock.release()

    def finish_epoch(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        """Go on to the next epoch: add a row to the tables, and write them.

        Weights and checkpoint too, after the last epoch and whenever that is affordable; after each
        where a fault goes back to them, or it would be the disk that says how far.
        """
        self.epoch, self.batch, self.epoch_time = self.epoch + 1, 0, EpochTime()
        predicted = self.step.statistics.ae_counts.tolist()
        self.metrics.append({**metrics, "ae_counts": " ".join(map(str, predicted))})
        self.timing.append(timing)
        if self.world.main:
            write_tables(self.folder, self.metrics, self.timing)
        if self.log is not None:
            self.log.epoch(self.metrics[-1], timing)
        needed = self.epoch == self.config.epochs or self.config.on_nonfinite == "rollback"
        if needed or self.save_pace.affordable():
            self.save()
            # Its row is written, so the epoch to come has the seconds, as those of no training.
            self.epoch_time = EpochTime({**self.epoch_time.spent(), "seconds": self.save_pace.took})

    def keep_best(self, found: dict[str, float]) -> None:
        """Take the weights as they are for the best so far; found: what a checkpoint says of them.

        They are written when it is: where a run goes back to its checkpoint, neither is newer.
        """
        self.best = found
        if self.world.main:
            network = self.step.evaluated_network()
            self._unsaved_best = weights_file.packed_weights(network, self.spec)

    def save(self) -> None:
        """Write the checkpoint: everything that a run resumed at this very step needs.

        Once a step is taken the network by itself too, so that neither is older than the other. The
        main process alone writes.
        """
        with self.save_pace.saving():
            if not self.world.main:
                return
            if self.epoch or self.batch:
                network = self.step.evaluated_network()
                weights_file.save_weights(self.folder / checkpoint.LAST, network, self.spec)
            if self._unsaved_best is not None:
                weights_file.write_weights(self.folder / checkpoint.BEST, self._unsaved_best)
                self._unsaved_best = None
            self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        state = {
            "preset": self.plan.preset,
            "code": self.code,
            "config": to_json(self.config),
            "model_spec": dataclasses.asdict(self.spec),
            "fingerprint": self.splits.fingerprint,
            "images": self.images,
            "epoch": self.epoch,
            "batch": self.batch,
            "lr_scale": self.lr_scale,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step.state_dict(),
            "metrics": self.metrics,
            "timing": self.timing,
            "best": self.best,
            "spent": self.epoch_time.spent(),
        }
        checkpoint.save_checkpoint(self.folder, state)

    def load_state(self, state: dict[str, Any], source: Path) -> None:
        """Take up a saved position.

        Errors: CheckpointError for one of other training images, and for one that holds something
        else than a position of this run, naming the file that it is from.
        """
        same_images = state.get("images", self.images) == self.images  # older runs lack it
        if state["fingerprint"] != self.splits.fingerprint or not same_images:
            notes = self.dataset.notes  # which images --skip-bad has left out
            damaged = "".join(f", and put back what is damaged since ({note})" for note in notes)
            raise CheckpointError(
                f"--resume {self.folder}: the training images are not those the run was begun "
                f"with; name the same data with --data{damaged}"
            )
        self.replayed.forget()  # loading moves momentum
        try:
            self._take_up(state)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{source}: cannot be taken up ({reason}); go on with the version of reat_fast "
                "that wrote it, or begin a new run"
            ) from error

    def _take_up(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.step.load_state_dict(state["step"])
        for rows in zip(state["metrics"], state["timing"], strict=True):
            if not all(isinstance(row, dict) for row in rows):
                raise TypeError("a row of metrics or timing is no dict")
        changes = ((n, state["code"].get(n, now), now) for n, now in self.code.items())
        self.changed_code = ", ".join(f"{n} {b} -> {now}" for n, b, now in changes if b != now)
        for name in ("epoch", "batch", "lr_scale", "metrics", "timing", "best"):
            setattr(self, name, state[name])
        self._unsaved_best = None
        spent = state.get("spent")  # which older runs did not save
        self.epoch_time = EpochTime(dict(spent) if spent else None)


def load_splits(plan: Plan) -> tuple[Dataset, Splits]:
    """Load the data set of a plan and draw its long-tailed split."""
    config = plan.config
    # Named here, a size is refused for a set that cannot be resized.
    dataset = load_run_data(config, image_size=config.image_size)
    return dataset, draw_splits(config, dataset)
