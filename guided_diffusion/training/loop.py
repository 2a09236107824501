"""The loop of all trainings of diffusion models and classifiers, which a kill at any moment does not harm.

Step s is a function of (seed, s) and of the weights before it. Images, timesteps and noise belong to the global batch
of all ranks, each rank takes its part; so one rank with batch 2B and two with batch B do the same up to rounding. Masks
of dropout are the exception: they belong to a rank and to its microbatches.
The output folder holds, each file replaced as a whole:
    config.json              all options of the run, the names of its classes, and what tells its images from others
    progress.csv             a row for each --log_interval steps
    loss.png                 its losses as a picture
    state.safetensors        all that a restart needs; the same command goes on from it
    model.safetensors        the latest weights
    ema_RATE.safetensors     their moving averages; ema_power_WIDTH.safetensors: those by power functions
    snapshot_IMAGES_ema_RATE.safetensors     the same, as they were after so many images (--snapshot_images)

A mistake that one rank finds, a damaged image or a rank that was killed ends the training on all ranks, in the same
step. What was trained until then is saved first.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import dist_util
from ..build import kind_of
from ..classes import KEY, SHOWN, ClassNames, stored_names
from ..digests import data_digest
from ..dist_util import say
from ..errors import LostRankError, UserError
from ..execution import check_memory, enough_memory, explained_compilation
from ..fetch import without_secrets
from ..files import reason
from ..jobs import job, mark_finished
from ..late import Tensor, dist, no_grad, torch
from ..logger import MetricLogger, open_log
from ..npz import RANGE_KEY, stored_range
from ..progress import progress_bar
from ..resample import ScheduleSampler
from ..rng import seeded_torch, stream_generator
from ..stated import NOISED, statement_of
from .batch import Data, DropLabels, Losses, Network, TrainingBatch
from .folder import Record, code_of_this_library
from .loss_curve import draw_loss_curve
from .options import LoopOptions
from .start import Start, from_checkpoint, from_weights, weight_shapes
from .state import FILE, TrainingState
from .watch import Watcher

if TYPE_CHECKING:
    from ..unet import Encoder

_log = logging.getLogger(__name__)

ALL_REDUCE_ELEMENTS = 2**24   # gradients are averaged over the ranks in pieces of this size
# How a network was run in training; not facts about the weights, which are stored in float32.
EXECUTION = ("use_fp16", "use_bf16", "use_checkpoint", "classifier_use_fp16")
WEIGHTS = ("model", "ema_*", "snapshot_*", "reconstructed_*")       # in the folder of a training, without the suffix
FIT = "a smaller --microbatch, or --use_checkpoint True, needs less and trains alike; or a smaller --batch_size"
RESCUE = timedelta(minutes=2)     # that a rank whose training failed waits for rank 0 to save what was trained

_loops = itertools.count()


class TrainLoop:
    """Descends `losses(network, batch)["loss"]`, and logs, averages and saves, until `options.total_steps`.

    losses: returns tensors (N,), all of which are logged, with noised images also by quarter of the timesteps
    (`loss_q0` ...).
    data: called with a step and the number of images before it, gives the batches from there on; validation_data
    likewise, called with the index of a validation.
    config: the options of the network and the process by flag name, stored with the weights.
    class_names: of the labels, stored with the weights; None where there are none.
    drop_labels: the labels of a global batch that a training step is given, from those of the data and the step.
    watchers: look at the training as it goes on; each must have been prepared before `run`.
    Raises UserError where the output folder holds a run that cannot go on with these options, or where a loss is not
    finite. All ranks do the same; where one of them fails, the others raise PeerError, and LostRankError where it is
    gone.
    """

    def __init__(self, model: Encoder, losses: Losses, sampler: ScheduleSampler, data: Data, options: LoopOptions,
                 config: dict[str, Any], validation_data: Data | None = None,
                 class_names: ClassNames | None = None, drop_labels: DropLabels | None = None,
                 watchers: Sequence[Watcher] = ()) -> None:
        self.watchers = watchers
        self.class_names = class_names
        self.drop_labels = drop_labels
        self.options, self.config, self.losses = options, config, losses
        self.out = Path(options.out)
        with dist_util.together():
            self._check_memory(model)
            self.depth_range = stored_range(options.data_dir)       # of depth images
        self.model = model.to(dist_util.dev()).channels_last().train()
        with dist_util.collective():
            dist_util.sync_params(list(model.parameters()))
        self.state = TrainingState(self.model, sampler, options)
        self._between_steps = True              # whether weights, averages and sampler belong to the same step
        self._row = (0, 0.0)                    # step and time of the last row of the log
        self._end = dist_util.store(f"training {next(_loops)}")
        with dist_util.together():
            self._start()
        self.network: Network = torch.compile(self.model) if options.compile else self.model
        self._first = self.step
        self.data = data(self.step, self.state.images)
        validated = -(-(self.step - bool(self.state.pending)) // options.validation_interval)
        before = validated * self.state.global_batch
        self.validation_data = validation_data(validated, before) if validation_data else None

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    @property
    def finished(self) -> bool:
        """Whether the last step is done, and all that belongs to it."""
        return self._at_end and not self.state.pending

    @property
    def _at_end(self) -> bool:
        return self.options.total_steps is not None and self.step >= self.options.total_steps

    def run(self) -> None:
        """Trains until the last step, or for ever."""
        if self.finished:
            say(f"the training in {self.out} is finished, at step {self.step}: there is nothing to do")
            mark_finished(self.out)
            return
        with dist_util.together():
            if dist_util.is_main():
                self.state.check_space(self.out, bool(self.options.snapshots))
                self.record.write(self.out)
            logger = self._logger()
        try:
            with job("training", self.out, resumes=True):
                self._train(logger)
        except BaseException as error:
            self._rescue(error)
            if self.finished and self.state.saved == self.step:       # all was done, and is there
                mark_finished(self.out)
            if isinstance(error, LostRankError):
                raise LostRankError(f"{error}; start the same command again to go on from the last save") from None
            raise
        finally:
            logger.close()

    def _logger(self) -> MetricLogger:
        if not dist_util.is_main():
            return MetricLogger(None)
        logger = open_log(self.out, self.step - bool(self.state.pending), self.options.log, self.record.options,
                          self.options.log_online)
        logger.take(self.state.unwritten)
        return logger

    def _train(self, logger: MetricLogger) -> None:
        state, total = self.state, self.options.total_steps
        self._row = (self.step, time.monotonic())
        images = None if total is None else state.images + max(0, total - state.step) * state.global_batch
        with progress_bar(images, "training", "image", state.images) as progress:
            if state.pending:
                self._conclude(logger)
            while not self._at_end:
                self.run_step(logger)
                progress.update(state.global_batch)
                self._conclude(logger)

    def _conclude(self, logger: MetricLogger) -> None:
        """Does all that belongs to a step after its weights, the save last; a start repeats it where it was cut off."""
        options, state = self.options, self.state
        if (self.step - 1) % options.validation_interval == 0:
            self.validate(logger)
        paused = self._watch(logger)
        self._row = (self._row[0], self._row[1] + paused)
        if self.step % options.log_interval == 0 or self._at_end:
            self._write_row(logger)
        if options.keeps_snapshot(state.images, state.pending):
            self.save_snapshot()
        saves = self.step % options.save_interval == 0 or self._at_end
        if saves:
            with dist_util.together():
                if dist_util.is_main():
                    draw_loss_curve(self.out / "progress.csv", self.out / "loss.png")
        state.conclude(logger.unwritten)
        if saves:
            self.save()

    def _write_row(self, logger: MetricLogger) -> None:
        """Writes a row of the log; its speed is that of the steps since the last row, where this start did any."""
        step, began = self._row
        images = (self.step - step) * self.state.global_batch
        speed = {"images_per_second": images / (time.monotonic() - began)} if images else {}
        with dist_util.together():
            logger.write(self.step, samples=self.state.images, **speed)
        self._row = (self.step, time.monotonic())

    def _watch(self, logger: MetricLogger) -> float:
        """Lets those watchers look whose turn it is; returns the seconds that it took."""
        began = time.monotonic()
        due = [watcher for watcher in self.watchers if self.step % watcher.interval == 0 or self._at_end]
        if due:
            with self.state.averaged():
                for watcher in due:
                    for name, value in watcher.look(self.step).items():
                        if isinstance(value, Path):
                            logger.picture(self.step, name, value)
                        else:
                            logger.add(name, value)
        return time.monotonic() - began

    def _check_memory(self, model: Encoder) -> None:
        """Raises UserError where not even one map of the features of a batch fits into memory."""
        size, at_once = self.options.batch_size, self.options.microbatch
        at_once = size if at_once == -1 else min(size, at_once)
        pixels = model.image_size**2
        check_memory(f"--batch_size {size}", 4 * size * pixels, torch.device("cpu"))
        check_memory(f"--batch_size {size}", model.dtype.itemsize * at_once * pixels * model.model_channels,
                     dist_util.dev())

    def run_step(self, logger: MetricLogger) -> None:
        """One update of the weights."""
        state, size = self.state, self.options.batch_size
        with (dist_util.together(), explained_compilation(self.options.compile and self.step == self._first),
              enough_memory(f"--batch_size {size}", dist_util.dev(), FIT)):
            batch, losses = self._descend()
        with dist_util.collective():
            average_over_ranks(state.precision.collect_gradients())
        batch, losses = self._gather(batch, losses)
        rate = self.options.learning_rate(self.step)
        logger.add("lr", rate)
        self._between_steps = False
        norm = state.update(rate, self.options.grad_clip)
        if math.isfinite(norm):
            logger.add_gradient(norm, self.options.grad_clip)
        elif state.precision.lg_loss_scale <= 0:
            with dist_util.together():      # all ranks find the same; one says so
                remedy = ("start again from the last save with a smaller one and --change lr" if state.saved >= 0 else
                          "start again with a smaller one; nothing is saved yet")
                raise UserError(f"--lr {self.options.lr:g}: the loss or its gradient is not finite at step "
                                f"{self.step}, {remedy}")
        if state.precision.scaled:
            logger.add("lg_loss_scale", state.precision.lg_loss_scale)
        state.sampler.update_with_losses(batch.t, losses["loss"])
        self._log_losses(logger, "", batch, losses)
        state.count_step(logger.unwritten)
        self._between_steps = True

    def _descend(self) -> tuple[TrainingBatch, dict[str, Tensor]]:
        """The batch of this rank and its losses, whose gradients the network then has."""
        images, cond = next(self.data)
        if self.drop_labels is not None:
            cond = {**cond, "y": self.drop_labels(cond["y"], self.step, dist_util.rank())}
        batch = self._batch(images, cond, "training", self.step)
        values = []
        with seeded_torch("dropout", self.options.seed, self.step, dist_util.rank(), device=dist_util.dev()):
            for part in batch.split(self.options.microbatch):
                part = part.to(dist_util.dev())
                losses = self.losses(self.network, part)
                self.state.precision.backward((losses["loss"] * part.weights).sum() / len(batch.t))
                values.append({name: value.detach() for name, value in losses.items()})
        return batch, {name: torch.cat([v[name] for v in values]) for name in values[0]}

    @no_grad
    def validate(self, logger: MetricLogger) -> None:
        """Logs the losses of one batch of the validation data, if there are any, names beginning with `val_`."""
        if self.validation_data is None:
            return
        index = (self.step - 1) // self.options.validation_interval
        with dist_util.together():
            batch = self._batch(*next(self.validation_data), "validation", index)
            self.model.eval()
            parts = [self.losses(self.model, part.to(dist_util.dev()))
                     for part in batch.split(self.options.microbatch)]
            self.model.train()
        self._log_losses(logger, "val_", *self._gather(batch, {k: torch.cat([p[k] for p in parts]) for k in parts[0]}))

    def save(self) -> None:
        """Writes the weights, and last the state that a restart goes on from."""
        with dist_util.together():
            if dist_util.is_main():
                self.state.save(self.out, self._metadata())

    def save_snapshot(self) -> None:
        """Writes the averages, or the weights where there are none, as they are after so many images, for good."""
        with dist_util.together():
            if dist_util.is_main():
                self.state.save_snapshot(self.out, self._metadata())

    def _metadata(self) -> dict[str, str]:
        """What the files of the weights state of themselves."""
        facts = {name: value for name, value in self.config.items() if name not in EXECUTION}
        metadata = {"config": json.dumps(facts), "step": str(self.step)}
        if self.depth_range:
            metadata[RANGE_KEY] = self.depth_range
        if kind_of(self.config) == "classifier":
            metadata[NOISED] = json.dumps(self.options.noises)
        return metadata if self.class_names is None else {**metadata, KEY: json.dumps(self.class_names.to_json())}

    def _rescue(self, error: BaseException) -> None:
        """Saves, on rank 0, what was trained before an error; other ranks wait for that, as launchers end them all."""
        if not dist_util.is_main():
            if isinstance(error, Exception) and _is_kept(self._end):
                with contextlib.suppress(RuntimeError):         # rank 0 is lost now
                    self._end.wait(["saved"], RESCUE)
            return
        try:
            if self._between_steps and self.step > max(self.state.saved, self._first):
                self.state.save(self.out, self._metadata())
                _log.info("what was trained until step %d is saved in %s", self.step, self.out)
        except Exception as fault:                              # of the two errors, the first one matters
            _log.warning("what was trained after step %d cannot be saved (%s)", max(self.state.saved, 0), reason(fault))
        finally:
            with contextlib.suppress(RuntimeError):
                self._end.set("saved", "")

    def _batch(self, images: Tensor, cond: dict[str, Tensor], purpose: str, index: int) -> TrainingBatch:
        """Draws t and weights for a global batch, noise image by image, and returns the part of this rank.

        purpose: training or validation. index: of the global batch.
        """
        count, rank, seed = len(images), dist_util.rank(), self.options.seed
        part = slice(rank * count, (rank + 1) * count)
        t, weights = self.state.sampler.sample(count * dist_util.world_size(),
                                               stream_generator(f"{purpose} timesteps", seed, index))
        first = index * count * dist_util.world_size()
        noise = [stream_generator(f"{purpose} noise", seed, index, first + i).standard_normal(
                     images.shape[1:], np.float32) for i in range(part.start, part.stop)]
        return TrainingBatch(images, torch.from_numpy(np.stack(noise)), t[part], weights[part], cond)

    def _gather(self, batch: TrainingBatch, losses: dict[str, Tensor]) -> tuple[TrainingBatch, dict[str, Tensor]]:
        """The t and weights, and the losses, of the global batch, on the CPU."""
        rows = torch.stack([batch.t.double(), batch.weights.double(), *(v.cpu().double() for v in losses.values())])
        rows = torch.cat(dist_util.gathered(rows), dim=1)
        return replace(batch, t=rows[0].long(), weights=rows[1]), dict(zip(losses, rows[2:], strict=True))

    def _log_losses(self, logger: MetricLogger, prefix: str, batch: TrainingBatch, losses: dict[str, Tensor]) -> None:
        quarters = batch.t * 4 // self.state.sampler.num_timesteps
        for name, values in losses.items():
            values = values * batch.weights
            logger.add(prefix + name, values)
            if not self.options.noises:
                continue
            for quarter in quarters.unique().tolist():
                logger.add(f"{prefix}{name}_q{quarter}", values[quarters == quarter])

    # What it starts from

    def _start(self) -> None:
        """Reads what the folder holds, or what the options name where it is new; says which."""
        path = self.out / FILE
        before = Record.read(self.out) or Record.stated_by(path)
        self.record = Record(self.config, asdict(self.options), dist_util.world_size(),
                             data_digest(self.options.data_dir) if dist_util.is_main() else None,
                             None if self.class_names is None else self.class_names.to_json(),
                             {name: value for one in self.watchers for name, value in one.settings.items()},
                             code_of_this_library() if dist_util.is_main() else {})
        if path.exists():
            said = self.record.continues(before, self.out) if before and dist_util.is_main() else []
            self.state.load(self.out)
            said.append(f"going on from step {self.step}, saved in {self.out}")
        else:
            said = self._left_over(before) if dist_util.is_main() else []
            said = [*self._take_start().said, *said]
        options = self.options
        if options.total_steps is not None and options.lr_warmup_steps >= options.total_steps:
            said.append(f"--lr_warmup_steps {options.lr_warmup_steps}: the rate rises until the end and does not stay "
                        f"at --lr, as --{options.ends_by} is {options.total_steps}")
        for line in said:
            say(line)

    def _left_over(self, before: Record | None) -> list[str]:
        """What to tell of weights in a folder that a training cannot go on from.

        Raises UserError unless they are of the same training, whose files this one makes again: others would be lost,
        or taken for its own.
        """
        names = [path.name for word in WEIGHTS for path in sorted(self.out.glob(f"{word}.safetensors"))]
        if not names:
            return []
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        if before is None or not self.record.repeats(before):
            raise UserError(f"--out {self.out}: has {shown}, which are not of this training, and no state.safetensors "
                            "to go on from; name another folder, or move them away")
        return [f"{self.out} has {shown} and no state.safetensors to go on from: starts anew, and writes over them"]

    def _take_start(self) -> Start:
        shapes, options = weight_shapes(self.model.state_dict()), self.options
        if options.init_from:
            start = from_weights(options.init_from, shapes, self.config, options.checkpoint_entry)
        elif options.resume_checkpoint:
            start = from_checkpoint(options.resume_checkpoint, shapes, self.config, options.ema_rates,
                                    options.checkpoint_entry)
        else:
            return Start({})
        if options.total_steps is not None and start.step >= options.total_steps:
            raise UserError(f"--resume_checkpoint {without_secrets(options.resume_checkpoint)}: is at step "
                            f"{start.step} already, and --{options.ends_by} is {options.total_steps}; give more")
        self.state.begin(start)
        counted = {"weight_decay": options.weight_decay} | ({} if options.decays else {"lr": options.lr})
        differing = [f"the file of AdamW has {name} {start.recipe[name]:g}, but --{name} {value:g} counts"
                     for name, value in counted.items() if start.recipe.get(name, value) != value]
        return replace(start, said=[*start.said, *self._other_classes(), *differing])

    def _other_classes(self) -> list[str]:
        """What to tell of classes that the weights at the start call otherwise, or that have names on one side only."""
        here, options = self.class_names, self.options
        flag, path = (("init_from", options.init_from) if options.init_from else
                      ("resume_checkpoint", options.resume_checkpoint))
        names = stored_names(path) if self.config.get("class_cond", True) else None
        where = f"--{flag} {without_secrets(path)}: was trained on"
        if names is None:
            stated = statement_of(path, kind_of(self.config))
            facts = stated.facts if stated is not None else {}
            if here is None or not facts.get("class_cond", True) or facts.get("num_classes") != len(here):
                return []
            return [f"{where} {len(here)} classes without names; their numbers are taken for {here}"]
        if here is None:
            return [f"{where} {names}; here the classes have numbers only, which may mean others, so that the new "
                    "weights state no names"]
        return [] if names.names == here.names else [f"{where} {names}; here the numbers mean other classes"]


def average_over_ranks(gradients: list[Tensor]) -> None:
    """Replaces each gradient by its mean over the ranks."""
    if dist_util.world_size() == 1:
        return
    bucket: list[Tensor] = []
    for gradient in gradients:
        bucket.append(gradient)
        if sum(g.numel() for g in bucket) >= ALL_REDUCE_ELEMENTS or gradient is gradients[-1]:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            flat /= dist_util.world_size()
            for g, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(mean.view(g.shape))
            bucket = []


def _is_kept(store: dist.Store) -> bool:
    """Whether the process that keeps a store is there; torch fills pages where it asks one that is gone."""
    kept = store.underlying_store if isinstance(store, dist.PrefixStore) else store
    if not isinstance(kept, dist.TCPStore):
        return True
    try:
        socket.create_connection((kept.host, kept.port), timeout=10).close()
    except OSError:
        return False
    return True
