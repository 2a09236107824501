"""What a training changes as it goes on: weights, averages, AdamW, the sampler and counters; and the files of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import checkpoint, dist_util, files
from ..errors import UserError
from ..fp16_util import MixedPrecisionTrainer
from ..late import Tensor, no_grad, torch
from ..logger import Totals, totals_as_tensors, totals_of_tensors
from ..resample import ScheduleSampler
from .averages import Profile, RateProfile, sampled, update_ema
from .options import LoopOptions
from .start import Shapes, Start, weight_shapes

if TYPE_CHECKING:
    from ..unet import Encoder

FILE = "state.safetensors"      # in the folder of a training

Groups = dict[str, dict[str, Tensor]]       # kind ("model", "ema_0.999", "optimizer" ...) -> name -> tensor


class TrainingState:
    """The state of a training between two steps, on its device.

    precision: of the weights. optimizer: AdamW. averages: of the weights. sampler: of timesteps; it may learn. step:
    how many are done. images: seen in these steps, on all ranks. pending: images of the last step, where what belongs
    to it after its weights is still to be done. unwritten: what the log had not written by then. saved: the last step
    that is in the folder; -1: none. warms_up: whether the averages forget the random start soon.
    """

    def __init__(self, model: Encoder, sampler: ScheduleSampler, options: LoopOptions) -> None:
        self.model, self.sampler = model, sampler
        self.precision = MixedPrecisionTrainer(model, options.fp16_scale_growth)
        self.optimizer = torch.optim.AdamW(
            self.precision.master_params, lr=options.lr, weight_decay=options.weight_decay, fused=True)
        self.averages: dict[Profile, list[Tensor]] = {
            profile: [param.detach().clone() for param in self.precision.master_params]
            for profile in options.profiles}
        self.global_batch = options.batch_size * dist_util.world_size()         # images of a step on all ranks
        self.step, self.images, self.saved = 0, 0, -1
        self.pending = 0
        self.unwritten: Totals = {}
        self.warms_up = True

    def update(self, rate: float, max_norm: float) -> float:
        """Moves the weights by the gradients that were collected, and the averages; returns the norm of the gradients.

        rate: of learning. max_norm: longer gradients are shortened to it; 0: none are. Where the norm is not finite,
        the weights stay.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self.precision.step(self.optimizer, max_norm)
        self._update_averages(math.isfinite(norm))
        return norm

    @no_grad
    def _update_averages(self, stepped: bool) -> None:
        """Moves the averages on; stepped: whether the weights changed, else not all of them count the step."""
        for profile, average in self.averages.items():
            if stepped or profile.counts_overflow:
                update_ema(average, self.precision.master_params, profile.decay(self.step, self.warms_up))

    def count_step(self, unwritten: Totals) -> None:
        """Counts a step, of which its weights are done; unwritten: what the log has not written."""
        self.step += 1
        self.images += self.global_batch
        self.pending, self.unwritten = self.global_batch, unwritten

    def conclude(self, unwritten: Totals) -> None:
        """Takes down that all that belongs to the last step is done; unwritten: what the log has not written."""
        self.pending, self.unwritten = 0, unwritten

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
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

    # To files

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Writes the weights, and last the state that a restart goes on from; metadata: of all files."""
        weights = self._weights()
        for name, (tensors, facts) in weights.items():
            checkpoint.save_state(folder / f"{name}.safetensors", tensors, {**metadata, **facts})
        named = {f"{kind}/{name}": value for kind, (group, _) in weights.items() for name, value in group.items()}
        checkpoint.save_state(folder / FILE, {**named, **self._other_tensors()}, metadata)
        self.saved = self.step

    def check_space(self, folder: Path, snapshots: bool) -> None:
        """Raises UserError where the disk cannot hold what saves write; snapshots: one of them, too.

        A file is written beside the one that it replaces, so that the largest counts twice.
        """
        weights = sum(param.numel() * param.element_size() for param in self.precision.master_params)
        sizes = {f"{name}.safetensors": weights for name in self._weights()}
        sizes[FILE] = (len(sizes) + 2) * weights            # AdamW has two moments of each weight
        there = sum(path.stat().st_size for name in sizes if (path := folder / name).is_file())
        needed = sum(sizes.values()) + max(sizes.values()) - there + snapshots * max(len(self.averages), 1) * weights
        files.check_space(folder, needed, f"--out {folder}: cannot hold what a save writes",
                          "for weights, averages and state, the largest file twice while it is replaced"
                          + ", and a snapshot" * snapshots)

    def save_snapshot(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Writes the averages, or the weights where there are none, under names that no later step has."""
        for name, (tensors, facts) in list(self._weights().items())[1 if self.averages else 0:]:
            path = folder / f"snapshot_{self.images}_{name}.safetensors"
            checkpoint.save_state(path, tensors, {**metadata, **facts})

    def _weights(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """The weights, and then their averages, by the names of their files, each with the facts of it alone."""
        return {"model": (self._named(self.precision.master_params), {}),
                **{profile.name: (self._named(average), profile.facts) for profile, average in self.averages.items()}}

    def _named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.precision.names, tensors, strict=True))

    def _other_tensors(self) -> dict[str, Tensor]:
        moments = {f"optimizer/{key}/{name}": value
                   for name, param in self._named(self.precision.master_params).items()
                   for key, value in self.optimizer.state[param].items()}
        sampler = {f"sampler/{name}": value for name, value in self.sampler.state_dict().items()}
        loop = {"loop/step": torch.tensor(self.step), "loop/images": torch.tensor(self.images),
                "loop/lg_loss_scale": torch.tensor(self.precision.lg_loss_scale, dtype=torch.float64),
                "loop/ema_warmup": torch.tensor(self.warms_up)}
        if self.pending:
            loop["loop/pending"] = torch.tensor(self.pending)
        log = {f"log/{name}": total for name, total in totals_as_tensors(self.unwritten).items()}
        return {**moments, **sampler, **loop, **log}

    # From files

    def begin(self, start: Start) -> None:
        """Takes what a training starts from."""
        self._fill(self.precision.master_params, start.weights)
        self.precision.copy_to_model()
        official = {RateProfile(rate).name: average for rate, average in start.averages.items()}
        for profile, average in self.averages.items():
            self._fill(average, official.get(profile.name, self._named(self.precision.master_params)))
        if start.moments:
            self._load_moments({f"{key}/{name}": value for key, values in start.moments.items()
                                for name, value in values.items()})
        self.step, self.warms_up = start.step, not start.official
        self.images = self.step * self.global_batch

    def load(self, folder: Path) -> None:
        """Takes what `save` wrote; raises UserError where the file is damaged, or is not the state of this training."""
        groups, self.step = read_state(folder / FILE, self._shapes(), optional="optimizer")
        self._fill(self.precision.master_params, groups["model"])
        self.precision.copy_to_model()
        for profile, average in self.averages.items():
            self._fill(average, groups[profile.name])
        if "optimizer" in groups:           # else every step so far has overflowed
            self._load_moments(groups["optimizer"])
        self.sampler.load_state_dict(groups.get("sampler", {}))
        self.precision.lg_loss_scale = float(groups["loop"]["lg_loss_scale"])
        self.warms_up = bool(groups["loop"].get("ema_warmup", True))
        self.images = int(groups["loop"].get("images", self.step * self.global_batch))
        self.pending = int(groups["loop"].get("pending", 0))
        self.unwritten = totals_of_tensors(groups.get("log", {}))
        self.saved = self.step

    def _shapes(self) -> dict[str, Shapes]:
        """What the file holds: the shapes by kind and name."""
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


def read_state(path: Path, expected: Mapping[str, Mapping[str, Sequence[int]]], optional: str,
               ) -> tuple[Groups, int]:
    """The tensors of a state by kind and name, and the step after which it was saved.

    expected: the names that each kind has, and their shapes. optional: a kind that may be missing. Raises UserError
    where the file is damaged, or is not the state of such a training.
    """
    groups: Groups = {}
    for key, value in checkpoint.load_state_dict(path).items():
        kind, _, name = key.partition("/")
        groups.setdefault(kind, {})[name] = value
    for kind, shapes in expected.items():
        held = groups.get(kind, {})
        if kind == optional and not held:
            continue
        for name, shape in shapes.items():
            if name not in held or tuple(held[name].shape) != tuple(shape):
                fault = "has no" if name not in held else "has another size of"
                raise UserError(f"{path}: is not the state of this training, it {fault} {kind}/{name}; put the right "
                                "file back, or name another --out")
    step = groups["loop"]["step"]
    if step.dtype != torch.int64 or step < 0:
        raise UserError(f"{path}: is damaged, its step is {step.item()}")
    return groups, int(step)
