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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import checkpoint, dist_util
from ..classes import KEY, SHOWN, ClassNames, stored_names
from ..dist_util import say
from ..errors import LostRankError, UserError
from ..execution import check_memory, enough_memory, explained_compilation
from ..fetch import without_secrets
from ..files import reason
from ..fp16_util import MixedPrecisionTrainer
from ..jobs import job, mark_finished
from ..late import Tensor, dist, no_grad, torch
from ..logger import MetricLogger, Totals, open_log, totals_as_tensors, totals_of_tensors
from ..progress import progress_bar
from ..resample import ScheduleSampler
from ..rng import seeded_torch, stream_generator
from .averages import Profile, RateProfile, sampled, update_ema
from .folder import Record, data_digest, read_state
from .loss_curve import draw_loss_curve
from .options import LoopOptions
from .start import Shapes, Start, from_checkpoint, from_weights, weight_shapes
from .watch import Watcher

if TYPE_CHECKING:
    from ..unet import Encoder

_log = logging.getLogger(__name__)

ALL_REDUCE_ELEMENTS = 2**24   # gradients are averaged over the ranks in pieces of this size
# How a network was run in training; not facts about the weights, which are stored in float32.
EXECUTION = ("use_fp16", "use_bf16", "use_checkpoint", "classifier_use_fp16")
WEIGHTS = ("model", "ema_*", "snapshot_*", "reconstructed_*")       # in the folder of a training, without the suffix
RESCUE = timedelta(minutes=2)     # that a rank whose training failed waits for rank 0 to save what was trained

_loops = itertools.count()

Data = Callable[[int], Iterator[tuple[Tensor, dict[str, Tensor]]]]
DropLabels = Callable[[Tensor, int, int], Tensor]       # labels (N,) of a rank, step, rank -> labels (N,)


@dataclass(frozen=True)
class TrainingBatch:
    """The images that one rank computes losses of in a step.

    images, noise: (N, C, H, W), in [-1, 1] and standard normal. t: (N,), original step indices. weights: (N,), what
    the losses are multiplied with. cond: {"y": (N,)} or nothing.
    """

    images: Tensor
    noise: Tensor
    t: Tensor
    weights: Tensor
    cond: dict[str, Tensor]

    def split(self, size: int) -> list[TrainingBatch]:
        """Parts of at most `size` images; -1: the whole."""
        size = len(self.t) if size == -1 else size
        return [self._part(slice(start, start + size)) for start in range(0, len(self.t), size)]

    def _part(self, images: slice) -> TrainingBatch:
        return self._map(lambda x: x[images])

    def to(self, device: torch.device) -> TrainingBatch:
        """The batch on another device."""
        return self._map(lambda x: x.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> TrainingBatch:
        cond = {name: function(value) for name, value in self.cond.items()}
        return TrainingBatch(images=function(self.images), noise=function(self.noise), t=function(self.t),
                             weights=function(self.weights), cond=cond)


FIT = "a smaller --microbatch, or --use_checkpoint True, needs less and trains alike; or a smaller --batch_size"

Network = Callable[..., Tensor]          # of the training, compiled or not
Losses = Callable[[Network, TrainingBatch], dict[str, Tensor]]


class TrainLoop:
    """Descends `losses(network, batch)["loss"]`, and logs, averages and saves, until `options.total_steps`.

    losses: returns tensors (N,), all of which are logged, also by quarter of the timesteps (`loss_q0` ...).
    data: called with a step, gives the batches from that step on; validation_data likewise, called with the index of a
    validation.
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
        self.options, self.config, self.losses, self.sampler = options, config, losses, sampler
        self.out = Path(options.out)
        with dist_util.together():
            self._check_memory(model)
        self.model = model.to(dist_util.dev()).channels_last().train()
        with dist_util.collective():
            dist_util.sync_params(list(model.parameters()))
        self.precision = MixedPrecisionTrainer(self.model, options.fp16_scale_growth)
        self.optimizer = torch.optim.AdamW(
            self.precision.master_params, lr=options.lr, weight_decay=options.weight_decay, fused=True)
        self.averages: dict[Profile, list[Tensor]] = {
            profile: [param.detach().clone() for param in self.precision.master_params]
            for profile in options.profiles}
        self.warms_up = True                    # whether the averages forget the random start soon
        self.step, self.saved = 0, -1           # steps done; the last of them that is in the state on disk
        self.images = 0                         # seen in these steps, on all ranks
        self._between_steps = True              # whether weights, averages and sampler belong to the same step
        self._pending = 0       # images of that step, where what belongs to it after its weights is still to be done
        self._unwritten: Totals = {}            # what the log had not written by then
        self._row = (0, 0.0)                    # step and time of the last row of the log
        self._end = dist_util.store(f"training {next(_loops)}")
        with dist_util.together():
            self._start()
        self.network: Network = torch.compile(self.model) if options.compile else self.model
        self._first = self.step
        self.data = data(self.step)
        validated = -(-(self.step - bool(self._pending)) // options.validation_interval)
        self.validation_data = validation_data(validated) if validation_data else None

    @property
    def finished(self) -> bool:
        """Whether the last step is done, and all that belongs to it."""
        return self._at_end and not self._pending

    @property
    def _at_end(self) -> bool:
        return self.options.total_steps is not None and self.step >= self.options.total_steps

    @property
    def _global_batch(self) -> int:
        """Images of a step on all ranks."""
        return self.options.batch_size * dist_util.world_size()

    def run(self) -> None:
        """Trains until the last step, or for ever."""
        if self.finished:
            say(f"the training in {self.out} is finished, at step {self.step}: there is nothing to do")
            mark_finished(self.out)
            return
        with dist_util.together():
            if dist_util.is_main():
                self.record.write(self.out)
            logger = self._logger()
        try:
            with job("training", self.out):
                self._train(logger)
        except BaseException as error:
            self._rescue(error)
            if self.finished and self.saved == self.step:       # all was done, and is there
                mark_finished(self.out)
            if isinstance(error, LostRankError):
                raise LostRankError(f"{error}; start the same command again to go on from the last save") from None
            raise
        finally:
            logger.close()

    def _logger(self) -> MetricLogger:
        if not dist_util.is_main():
            return MetricLogger(None)
        logger = open_log(self.out, self.step - bool(self._pending), self.options.log, self.record.options,
                          self.options.log_online)
        logger.take(self._unwritten)
        return logger

    def _train(self, logger: MetricLogger) -> None:
        global_batch, total = self._global_batch, self.options.total_steps
        self._row = (self.step, time.monotonic())
        images = None if total is None else self.images + max(0, total - self.step) * global_batch
        with progress_bar(images, "training", "image", self.images) as progress:
            if self._pending:
                self._conclude(logger)
            while not self._at_end:
                self.run_step(logger)
                progress.update(global_batch)
                self._conclude(logger)

    def _conclude(self, logger: MetricLogger) -> None:
        """Does all that belongs to a step after its weights, the save last; a start repeats it where it was cut off."""
        options = self.options
        if (self.step - 1) % options.validation_interval == 0:
            self.validate(logger)
        paused = self._watch(logger)
        self._row = (self._row[0], self._row[1] + paused)
        if self.step % options.log_interval == 0 or self._at_end:
            self._write_row(logger)
        if options.keeps_snapshot(self.images, self._pending):
            self.save_snapshot(self.images)
        saves = self.step % options.save_interval == 0 or self._at_end
        if saves:
            with dist_util.together():
                if dist_util.is_main():
                    draw_loss_curve(self.out / "progress.csv", self.out / "loss.png")
        self._pending, self._unwritten = 0, logger.unwritten
        if saves:
            self.save()

    def _write_row(self, logger: MetricLogger) -> None:
        """Writes a row of the log; its speed is that of the steps since the last row, where this start did any."""
        step, began = self._row
        images = (self.step - step) * self._global_batch
        speed = {"images_per_second": images / (time.monotonic() - began)} if images else {}
        with dist_util.together():
            logger.write(self.step, samples=self.images, **speed)
        self._row = (self.step, time.monotonic())

    def _watch(self, logger: MetricLogger) -> float:
        """Lets those watchers look whose turn it is; returns the seconds that it took."""
        began = time.monotonic()
        due = [watcher for watcher in self.watchers if self.step % watcher.interval == 0 or self._at_end]
        if due:
            with self._averaged():
                for watcher in due:
                    for name, value in watcher.look(self.step).items():
                        if isinstance(value, Path):
                            logger.picture(self.step, name, value)
                        else:
                            logger.add(name, value)
        return time.monotonic() - began

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The network for evaluation, with the weights that its folder is sampled with; put back at the end."""
        profile = sampled(list(self.averages))
        own = [param.detach().clone() for param in self.precision.model_params] if profile else []
        self.model.eval()
        try:
            self._assign(self.averages[profile] if profile else [])
            yield
        finally:
            self._assign(own)
            self.model.train()

    @no_grad
    def _assign(self, values: Sequence[Tensor]) -> None:
        """Copies values into the parameters of the network; none: they stay."""
        for param, value in zip(self.precision.model_params, values, strict=bool(values)):
            param.copy_(value)

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
        size = self.options.batch_size
        with (dist_util.together(), explained_compilation(self.options.compile and self.step == self._first),
              enough_memory(f"--batch_size {size}", dist_util.dev(), FIT)):
            batch, losses = self._descend()
        with dist_util.collective():
            average_over_ranks(self.precision.collect_gradients())
        batch, losses = self._gather(batch, losses)
        rate = self.options.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        logger.add("lr", rate)
        self._between_steps = False
        norm = self.precision.step(self.optimizer, self.options.grad_clip)
        self._update_ema(math.isfinite(norm))
        if math.isfinite(norm):
            logger.add_gradient(norm, self.options.grad_clip)
        elif self.precision.lg_loss_scale <= 0:
            with dist_util.together():      # all ranks find the same; one says so
                raise UserError(f"--lr {self.options.lr:g}: the loss or its gradient is not finite at step "
                                f"{self.step}, start again from the last save with a smaller one and --change lr")
        if self.precision.scaled:
            logger.add("lg_loss_scale", self.precision.lg_loss_scale)
        self.sampler.update_with_losses(batch.t, losses["loss"])
        self._log_losses(logger, "", batch, losses)
        self.step += 1
        self.images += self._global_batch
        self._pending, self._unwritten = self._global_batch, logger.unwritten
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
                self.precision.backward((losses["loss"] * part.weights).sum() / len(batch.t))
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
                self._write()

    def save_snapshot(self, images: int) -> None:
        """Writes the averages, or the weights where there are none, as they are after so many images, for good."""
        with dist_util.together():
            if dist_util.is_main():
                for name, (tensors, metadata) in list(self._weights().items())[1 if self.averages else 0:]:
                    checkpoint.save_state(self.out / f"snapshot_{images}_{name}.safetensors", tensors, metadata)

    def _weights(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """The weights, and then their averages, by the names of their files, each with its metadata."""
        metadata = self._metadata()
        return {"model": (self._named(self.precision.master_params), metadata),
                **{profile.name: (self._named(average), {**metadata, **profile.facts})
                   for profile, average in self.averages.items()}}

    def _metadata(self) -> dict[str, str]:
        """What the files of the weights state of themselves."""
        facts = {name: value for name, value in self.config.items() if name not in EXECUTION}
        metadata = {"config": json.dumps(facts), "step": str(self.step)}
        return metadata if self.class_names is None else {**metadata, KEY: json.dumps(self.class_names.to_json())}

    def _write(self) -> None:
        weights = self._weights()
        for name, (tensors, metadata) in weights.items():
            checkpoint.save_state(self.out / f"{name}.safetensors", tensors, metadata)
        state = {f"{kind}/{name}": value for kind, (group, _) in weights.items() for name, value in group.items()}
        checkpoint.save_state(self.out / "state.safetensors", {**state, **self._other_state()}, self._metadata())
        self.saved = self.step

    def _rescue(self, error: BaseException) -> None:
        """Saves, on rank 0, what was trained before an error; other ranks wait for that, as launchers end them all."""
        if not dist_util.is_main():
            if isinstance(error, Exception) and _is_kept(self._end):
                with contextlib.suppress(RuntimeError):         # rank 0 is lost now
                    self._end.wait(["saved"], RESCUE)
            return
        try:
            if self._between_steps and self.step > max(self.saved, self._first):
                self._write()
                _log.info("what was trained until step %d is saved in %s", self.step, self.out)
        except Exception as fault:                              # of the two errors, the first one matters
            _log.warning("what was trained after step %d cannot be saved (%s)", max(self.saved, 0), reason(fault))
        finally:
            with contextlib.suppress(RuntimeError):
                self._end.set("saved", "")

    def _batch(self, images: Tensor, cond: dict[str, Tensor], purpose: str, index: int) -> TrainingBatch:
        """Draws t and weights for a global batch, noise image by image, and returns the part of this rank.

        purpose: training or validation. index: of the global batch.
        """
        count, rank, seed = len(images), dist_util.rank(), self.options.seed
        part = slice(rank * count, (rank + 1) * count)
        t, weights = self.sampler.sample(count * dist_util.world_size(),
                                         stream_generator(f"{purpose} timesteps", seed, index))
        first = index * count * dist_util.world_size()
        noise = [stream_generator(f"{purpose} noise", seed, index, first + i).standard_normal(
                     images.shape[1:], np.float32) for i in range(part.start, part.stop)]
        return TrainingBatch(images, torch.from_numpy(np.stack(noise)), t[part], weights[part], cond)

    @no_grad
    def _update_ema(self, stepped: bool) -> None:
        """Moves the averages on; stepped: whether the weights changed, else not all of them count the step."""
        for profile, average in self.averages.items():
            if stepped or profile.counts_overflow:
                update_ema(average, self.precision.master_params, profile.decay(self.step, self.warms_up))

    def _gather(self, batch: TrainingBatch, losses: dict[str, Tensor]) -> tuple[TrainingBatch, dict[str, Tensor]]:
        """The t and weights, and the losses, of the global batch, on the CPU."""
        rows = torch.stack([batch.t.double(), batch.weights.double(), *(v.cpu().double() for v in losses.values())])
        rows = torch.cat(dist_util.gathered(rows), dim=1)
        return replace(batch, t=rows[0].long(), weights=rows[1]), dict(zip(losses, rows[2:], strict=True))

    def _log_losses(self, logger: MetricLogger, prefix: str, batch: TrainingBatch, losses: dict[str, Tensor]) -> None:
        quarters = batch.t * 4 // self.sampler.num_timesteps
        for name, values in losses.items():
            values = values * batch.weights
            logger.add(prefix + name, values)
            for quarter in quarters.unique().tolist():
                logger.add(f"{prefix}{name}_q{quarter}", values[quarters == quarter])

    # The state on disk

    def _named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.precision.names, tensors, strict=True))

    def _other_state(self) -> dict[str, Tensor]:
        moments = {f"optimizer/{key}/{name}": value
                   for name, param in self._named(self.precision.master_params).items()
                   for key, value in self.optimizer.state[param].items()}
        sampler = {f"sampler/{name}": value for name, value in self.sampler.state_dict().items()}
        loop = {"loop/step": torch.tensor(self.step), "loop/images": torch.tensor(self.images),
                "loop/lg_loss_scale": torch.tensor(self.precision.lg_loss_scale, dtype=torch.float64),
                "loop/ema_warmup": torch.tensor(self.warms_up)}
        if self._pending:
            loop["loop/pending"] = torch.tensor(self._pending)
        log = {f"log/{name}": total for name, total in totals_as_tensors(self._unwritten).items()}
        return {**moments, **sampler, **loop, **log}

    def _start(self) -> None:
        """Reads what the folder holds, or what the options name where it is new; says which."""
        path = self.out / "state.safetensors"
        before = Record.read(self.out) or Record.stated_by(path)
        self.record = Record(self.config, asdict(self.options), dist_util.world_size(),
                             data_digest(self.options.data_dir) if dist_util.is_main() else None,
                             None if self.class_names is None else self.class_names.to_json(),
                             {name: value for one in self.watchers for name, value in one.settings.items()})
        if path.exists():
            said = self.record.continues(before, self.out) if before and dist_util.is_main() else []
            self._take_state(path)
            said.append(f"going on from step {self.step}, saved in {self.out}")
        else:
            said = self._left_over(before) if dist_util.is_main() else []
            said = [*self._take_start().said, *said]
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
            start = from_weights(options.init_from, shapes, options.checkpoint_entry)
            start = replace(start, said=[*start.said, *self._other_classes()])
        elif options.resume_checkpoint:
            start = from_checkpoint(options.resume_checkpoint, shapes, options.ema_rates, options.checkpoint_entry)
        else:
            return Start({})
        if options.total_steps is not None and start.step >= options.total_steps:
            raise UserError(f"--resume_checkpoint {without_secrets(options.resume_checkpoint)}: is at step "
                            f"{start.step} already, and --{options.ends_by} is {options.total_steps}; give more")
        self._fill(self.precision.master_params, start.weights)
        self.precision.copy_to_model()
        official = {RateProfile(rate).name: average for rate, average in start.averages.items()}
        for profile, average in self.averages.items():
            self._fill(average, official.get(profile.name, self._named(self.precision.master_params)))
        if start.moments:
            self._load_moments({f"{key}/{name}": value for key, values in start.moments.items()
                                for name, value in values.items()})
        self.step, self.warms_up = start.step, not start.official
        self.images = self.step * self._global_batch
        counted = {"weight_decay": options.weight_decay} | ({} if options.decays else {"lr": options.lr})
        differing = [f"the file of AdamW has {name} {start.recipe[name]:g}, but --{name} {value:g} counts"
                     for name, value in counted.items() if start.recipe.get(name, value) != value]
        return replace(start, said=[*start.said, *differing])

    def _other_classes(self) -> list[str]:
        """What to tell of classes that the weights of --init_from call otherwise."""
        names, path = stored_names(self.options.init_from), without_secrets(self.options.init_from)
        if names is None or self.class_names is None or names.names == self.class_names.names:
            return []
        return [f"--init_from {path}: was trained on {names}; here the numbers mean other classes"]

    def _take_state(self, path: Path) -> None:
        groups, self.step = read_state(path, self._state_shapes(), optional="optimizer")
        self._fill(self.precision.master_params, groups["model"])
        self.precision.copy_to_model()
        for profile, average in self.averages.items():
            self._fill(average, groups[profile.name])
        if "optimizer" in groups:           # else every step so far has overflowed
            self._load_moments(groups["optimizer"])
        self.sampler.load_state_dict(groups.get("sampler", {}))
        self.precision.lg_loss_scale = float(groups["loop"]["lg_loss_scale"])
        self.warms_up = bool(groups["loop"].get("ema_warmup", True))
        self.images = int(groups["loop"].get("images", self.step * self._global_batch))
        self._pending = int(groups["loop"].get("pending", 0))
        self._unwritten = totals_of_tensors(groups.get("log", {}))
        self.saved = self.step

    def _state_shapes(self) -> dict[str, Shapes]:
        """What a state of this training holds: the shapes by kind and name."""
        weights = weight_shapes(self._named(self.precision.master_params))
        moments = {f"{key}/{name}": shape for key in ("exp_avg", "exp_avg_sq") for name, shape in weights.items()}
        averages: dict[str, Shapes] = {profile.name: weights for profile in self.averages}
        return {"loop": {"step": (), "lg_loss_scale": ()}, "model": weights, **averages,
                "optimizer": {**moments, **{f"step/{name}": () for name in weights}},
                "sampler": weight_shapes(self.sampler.state_dict())}

    def _load_moments(self, values: Mapping[str, Tensor]) -> None:
        """Copies the moments into the layout of the parameters, which the fused optimiser takes for granted."""
        for name, param in self._named(self.precision.master_params).items():
            moments = {key: torch.empty_like(param, requires_grad=False).copy_(values[f"{key}/{name}"])
                       for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[param] = {"step": values[f"step/{name}"].to(param.device, copy=True), **moments}

    @no_grad
    def _fill(self, tensors: Sequence[Tensor], values: Mapping[str, Tensor]) -> None:
        """Copies the values by name into the tensors of the weights; those that are missing stay."""
        for name, tensor in zip(self.precision.names, tensors, strict=True):
            if name in values:
                tensor.copy_(values[name])


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
