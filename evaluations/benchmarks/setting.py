"""What is timed and checked: a network with its process, noise and labels, its evaluation and its guided steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.guidance import Guidance, LossGuidance
from guided_diffusion.late import Tensor, torch
from guided_diffusion.process import Denoiser
from guided_diffusion.runs.sample import without_labels
from guided_diffusion.sampling import ddpm_step, sample_step

if TYPE_CHECKING:
    from guided_diffusion.unet import UNetModel

Call = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """A network at one step of its process. x: x_t (N, C, H, W); noise: of the step; t: (N,), respaced; y: labels."""

    model: UNetModel
    diffusion: GaussianDiffusion
    x: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor

    @classmethod
    def of(cls, model: UNetModel, diffusion: GaussianDiffusion, batch: int, classes: int) -> Setting:
        """Noise that is the same on every device, in the middle of the process, and labels in turn."""
        device, size = next(model.parameters()).device, model.image_size
        generator = torch.Generator().manual_seed(0)
        x, noise = torch.randn(2, batch, model.in_channels, size, size, generator=generator).to(device)
        t = torch.full((batch,), diffusion.num_timesteps // 2, device=device)
        return cls(model, diffusion, x, noise, t, torch.arange(batch, device=device) % classes)

    def with_model(self, model: UNetModel) -> Setting:
        """The same with another network, on the device of that one."""
        device = next(model.parameters()).device
        return replace(self, model=model, x=self.x.to(device), noise=self.noise.to(device), t=self.t.to(device),
                       y=self.y.to(device))

    @property
    def denoise(self) -> Denoiser:
        """The network bound to its process and the labels."""
        labelled = self.model.num_classes is not None
        return Denoiser(self.diffusion, self.model if labelled else without_labels(self.model),
                        model_kwargs={"y": self.y})

    def evaluation(self) -> Tensor:
        """The network's output."""
        return self.denoise.model(self.x, self.diffusion.model_timesteps(self.t), y=self.y)

    def step(self, guidance: Sequence[Guidance] = ()) -> Call:
        """A function that does one step of DDPM, each time at the same place; terms remember from call to call."""
        denoise, memory = self.denoise, dict[Guidance, Tensor]()
        return lambda: sample_step(ddpm_step, denoise, self.x, self.t, lambda: self.noise, guidance, memory=memory)

    def steps(self, terms: Mapping[str, Sequence[Guidance]]) -> dict[str, Call]:
        """A step of each list of terms, by name; with losses also one that keeps no activations."""
        calls: dict[str, Call] = {}
        for name, guidance in terms.items():
            if any(isinstance(term, LossGuidance) for term in guidance):
                calls[f"{name} step"] = checkpointed(self.model, self.step(guidance), False)
                calls[f"{name} step, checkpointed"] = checkpointed(self.model, self.step(guidance), True)
            else:
                calls[f"{name} step"] = self.step(guidance)
        return calls


def checkpointed(model: UNetModel, function: Call, enabled: bool) -> Call:
    """A call of `function` in which the network's blocks recompute their activations in a backward pass, or do not."""
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "use_checkpoint")]

    def call() -> object:
        before = [block.use_checkpoint for block in blocks]
        try:
            for block in blocks:
                block.use_checkpoint = enabled
            return function()
        finally:
            for block, value in zip(blocks, before, strict=True):
                block.use_checkpoint = value
    return call


def contiguous_copy(model: UNetModel) -> UNetModel:
    """A copy of the network whose feature maps are contiguous, as those of the official code are."""
    plain = copy.deepcopy(model)
    plain.memory_format = torch.contiguous_format
    for parameter in plain.parameters():
        parameter.data = parameter.data.contiguous()
    return plain
