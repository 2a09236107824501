"""The options of trainings: those that all have, those of a loop, and of diffusion models and of classifiers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..classes import CLASS_RULES
from ..errors import UserError
from ..fetch import without_secrets
from ..log_sinks import SINKS, parse_sinks
from ..options import Options, batch_option, cut, option, option_fields, seed_option, whole_number
from ..resample import SCHEDULE_SAMPLERS
from .averages import Profile, RateProfile, parse_widths
from .folder import FIXED


@dataclass(frozen=True)
class DescentOptions(Options):
    """Options that every training has: how long a gradient may be, and where its log goes."""

    grad_clip: float = option(0.0, "largest norm of a step's gradient, of all weights as one vector; a longer one is "
                              "shortened to it; 0: none is", minimum=0)
    log: str = option("", f"where the log goes beside progress.csv, with commas: {', '.join(SINKS)}")
    log_online: bool = option(False, "let wandb send the log to its server; False: it stays on this machine")

    def __post_init__(self) -> None:
        super().__post_init__()
        sinks = parse_sinks(self.log)
        if self.log_online and "wandb" not in sinks:
            raise UserError(f"--log_online True --log {self.log or 'unset'}: only --log wandb goes online")


@dataclass(frozen=True)
class LoopOptions(DescentOptions):
    """Options that every training in a folder has."""

    data_dir: str = option("", "folder of images or IDX files, or an .npz file of images, to train on; "
                           "fashion-mnist: where Debian installs it")
    out: str = option("train", "folder that the run is kept in, and goes on from when started again")
    seed: int = seed_option("seed of the weights, the order of the images and all noise")
    lr: float = option(1e-4, "learning rate of AdamW", above=0)
    lr_warmup_steps: int = option(0, "steps in which the learning rate rises linearly to --lr", minimum=0)
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW, per step and unit of learning rate", minimum=0)
    batch_size: int = batch_option(1, "images per step and process")
    microbatch: int = option(-1, "images per forward and backward pass, saves memory; -1: the whole batch", minimum=-1)
    classes: str = option("", "how the classes of an image folder are told: prefix (of the file name, before the first "
                          "_) or folders (below --data_dir); unset: prefix, and folders where prefixes tell none apart",
                          choices=CLASS_RULES)
    skip_damaged: bool = option(False, "leave damaged images out, instead of ending with an error")
    random_flip: bool = option(True, "mirror half of the images left to right")
    random_crop: bool = option(False, "cut images at random instead of from the centre")
    log_interval: int = option(10, "steps between two lines of the log", minimum=1)
    save_interval: int = option(10000, "steps between two saves; a kill loses at most these", minimum=1)
    snapshot_images: str = option("0", "keep the moving averages, or the weights where there are none, as early "
                                  "networks: every so many images, or once after each of several numbers of images, "
                                  "like 1000,5000; 0: none")
    resume_checkpoint: str = option("", "modelNNNNNN.pt of an official run, which goes on from step NNNNNN with the "
                                    "ema and opt files beside it; any other file: its weights, from step 0")
    init_from: str = option("", "file of weights to start from at step 0; label embedding, first and last layer start "
                            "anew where they do not fit")
    checkpoint_entry: str = option("", "entry of --init_from or --resume_checkpoint, of a file that wraps several, "
                                   "like ema or model; unset: the moving average, if it has one")
    change: str = option("", "options that may differ from those with which the run in --out began, although they "
                         "change its result, with commas: lr,batch_size")
    fp16_scale_growth: float = option(1e-3, "growth of log2 of the loss scale per step, in float16", above=0)
    compile: bool = option(False, "compile the network with torch.compile")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.microbatch == 0:
            raise UserError("--microbatch 0: must be at least 1, or -1 for the whole batch")
        if self.resume_checkpoint and self.init_from:
            raise UserError(f"--init_from {without_secrets(self.init_from)}: cannot be given with --resume_checkpoint, "
                            "which starts the training as well")
        _ = self.snapshots
        free = {field.name for field in option_fields(type(self))} - {*FIXED, "out", "change"}
        for name in filter(None, self.change.split(",")):
            if name not in free:
                raise UserError(f"--change {self.change}: must name options of the training with commas, and "
                                f"{name!r} is none that can change")

    ends_by: ClassVar[str] = ""             # the option that says how many steps there are

    @property
    def total_steps(self) -> int | None:
        """Steps of the training; None: until it is stopped."""
        return None

    @property
    def decays(self) -> bool:
        """Whether the learning rate falls linearly to 0 at `total_steps`."""
        return False

    @property
    def noises(self) -> bool:
        """Whether images are noised, to timesteps that are drawn."""
        return True

    @property
    def ema_rates(self) -> tuple[float, ...]:
        """Decay per step of the moving averages of the weights that go by a rate."""
        return ()

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The profile of each moving average of the weights."""
        return tuple(map(RateProfile, self.ema_rates))

    @property
    def validation_interval(self) -> int:
        """Steps between two validation batches."""
        return 1

    @property
    def snapshots(self) -> tuple[int, ...]:
        """The numbers of --snapshot_images; none where it keeps nothing. Raises UserError for anything else."""
        words = self.snapshot_images.replace(" ", "").split(",")
        numbers = [number for word in words if (number := whole_number(word)) is not None]
        if len(numbers) < len(words) or (len(words) > 1 and (len(set(numbers)) < len(words) or min(numbers) < 1)):
            raise UserError(f"--snapshot_images {cut(self.snapshot_images)}: must be a whole number from 0 up, or "
                            "different ones from 1 up with commas")
        return tuple(filter(None, numbers))

    def keeps_snapshot(self, images: int, batch: int) -> bool:
        """Whether the last `batch` of so many images reached or passed one of those after which a snapshot is kept."""
        numbers = self.snapshots
        if len(numbers) == 1:
            return images // numbers[0] > (images - batch) // numbers[0]
        return any(images - batch < number <= images for number in numbers)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step (from 0): rises over lr_warmup_steps, and falls to 0 at total_steps if decays."""
        rate, total = self.lr, self.total_steps
        if step < self.lr_warmup_steps:
            rate *= (step + 1) / self.lr_warmup_steps
        return rate * (1 - step / total) if self.decays and total else rate


@dataclass(frozen=True)
class TrainOptions(LoopOptions):
    """Options of the training of a diffusion model."""

    ends_by: ClassVar[str] = "lr_anneal_steps"

    schedule_sampler: str = option("uniform", "how timesteps are drawn", choices=SCHEDULE_SAMPLERS)
    lr_anneal_steps: int = option(0, "steps of the training, over which --lr decays linearly to 0; 0: no end, no decay",
                                  minimum=0)
    ema_rate: str = option("0.9999", "decay per step of the moving average of the weights, less in its first steps "
                           "((1 + step) / (10 + step)); several: 0.99,0.999")
    ema_power: str = option("", "width sigma_rel of a moving average by a power function of the step; several: "
                            "0.05,0.10, of which, kept by --snapshot_images, ema_reconstruct.py makes other widths")
    label_dropout: float = option(0.0, "share of the images that lose their label in a step, so that the network also "
                                  "learns to do without (--null_class), for classifier-free guidance", minimum=0,
                                  maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.profiles

    @property
    def total_steps(self) -> int | None:
        """Steps of the training; None: until it is stopped."""
        return self.lr_anneal_steps or None

    @property
    def decays(self) -> bool:
        """Whether the learning rate falls linearly to 0 at `total_steps`."""
        return self.lr_anneal_steps > 0

    @property
    def ema_rates(self) -> tuple[float, ...]:
        """Decay per step of each moving average of the weights; raises UserError for --ema_rate that has none."""
        try:
            rates = tuple(float(rate) for rate in self.ema_rate.split(",")) if self.ema_rate else ()
        except ValueError:
            rates = (math.nan,)
        names = {RateProfile(rate).name for rate in rates}          # of their files
        if not all(0 < rate < 1 for rate in rates) or len(names) < len(rates):
            raise UserError(f"--ema_rate {self.ema_rate}: must be different numbers between 0 and 1, with commas, in "
                            "their first six digits")
        return rates

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Those of --ema_rate, then those of --ema_power; raises UserError where one of them has others."""
        return (*super().profiles, *parse_widths("ema_power", self.ema_power))


@dataclass(frozen=True)
class ClassifierTrainOptions(LoopOptions):
    """Options of the training of a classifier."""

    ends_by: ClassVar[str] = "iterations"

    iterations: int = option(150000, "steps of the training", minimum=1)
    lr: float = option(3e-4, "learning rate of AdamW", above=0)
    anneal_lr: bool = option(False, "let --lr decay linearly to 0 at --iterations")
    batch_size: int = batch_option(4, "images per step and process")
    random_crop: bool = option(True, "cut images at random instead of from the centre")
    noised: bool = option(True, "train on noised images, at uniformly drawn timesteps; False: on clean ones, at step 0")
    val_data_dir: str = option("", "data to validate on: a folder of images, or IDX files, of which the test split")
    eval_interval: int = option(5, "steps between two validation batches", minimum=1)

    @property
    def total_steps(self) -> int:
        """Steps of the training."""
        return self.iterations

    @property
    def decays(self) -> bool:
        """Whether the learning rate falls linearly to 0 at `total_steps`."""
        return self.anneal_lr

    @property
    def noises(self) -> bool:
        """Whether images are noised, to timesteps that are drawn."""
        return self.noised

    @property
    def validation_interval(self) -> int:
        """Steps between two validation batches."""
        return self.eval_interval
