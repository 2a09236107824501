"""Training a network with float16 or bfloat16 weights: float32 master weights and a dynamic loss scale."""

from __future__ import annotations

import math

from .late import Tensor, nn, no_grad, torch

INITIAL_LOG_LOSS_SCALE = 20.0


class MixedPrecisionTrainer:
    """The float32 weights that an optimiser updates, and the scaling of the loss that float16 gradients need.

    `master_params` are the trained parameters themselves where these are float32, and float32 copies of the others.
    In a network that is all float32 nothing is copied and nothing is scaled.

    Where there are float16 weights the loss is multiplied by 2**lg_loss_scale. After a step lg_loss_scale grows by
    `fp16_scale_growth`; where a gradient overflowed, the step is left out and the scale halved.
    """

    def __init__(self, model: nn.Module, fp16_scale_growth: float = 1e-3) -> None:
        trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.names = list(trained)
        self.model_params = list(trained.values())
        self.master_params = [param if param.dtype == torch.float32 else nn.Parameter(param.detach().float())
                              for param in self.model_params]
        self.scaled = any(param.dtype == torch.float16 for param in self.model_params)
        self.lg_loss_scale = INITIAL_LOG_LOSS_SCALE if self.scaled else 0.0
        self.fp16_scale_growth = fp16_scale_growth

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the (scaled) loss to those of the network."""
        (loss * 2**self.lg_loss_scale if self.scaled else loss).backward()

    def collect_gradients(self) -> list[Tensor]:
        """Moves the network's gradients, unscaled, to the master parameters; returns them. Call once before a step."""
        for param, master in zip(self.model_params, self.master_params, strict=True):
            if param is not master and param.grad is not None:
                master.grad, param.grad = param.grad.float(), None
        gradients = [master.grad for master in self.master_params if master.grad is not None]
        if self.scaled:
            torch._foreach_mul_(gradients, 2**-self.lg_loss_scale)
        return gradients

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float = 0.0) -> float:
        """Updates the weights from the collected gradients, then drops these.

        max_norm: longer gradients, of all weights as one vector, are shortened to it; 0: none are.

        Returns the norm of the gradients before that. Where it is not finite, no weight has changed.
        """
        gradients = [p.grad for p in self.master_params if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients).item()
        if math.isfinite(norm):
            if 0 < max_norm < norm:
                torch._foreach_mul_(gradients, max_norm / norm)
            optimizer.step()
            self.copy_to_model()
        if self.scaled:
            self.lg_loss_scale += self.fp16_scale_growth if math.isfinite(norm) else -1
        optimizer.zero_grad(set_to_none=True)
        return norm

    @no_grad
    def copy_to_model(self) -> None:
        """Copies the master weights into the network."""
        for param, master in zip(self.model_params, self.master_params, strict=True):
            if param is not master:
                param.copy_(master)
