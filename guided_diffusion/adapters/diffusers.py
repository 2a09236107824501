"""UNets, schedulers and pipelines of diffusers, sampled and guided as our own.

Nothing here imports diffusers, nor transformers, until a pipeline is sampled: what is wrapped comes from there anyway.
"""

from .branches import UnconditionalBranch
from .latent import LATENT_BLUR_SIGMA, LATENT_BLUR_TAPS, LatentDiffusion
from .networks import DiffusersUNet, SelfAttentionSite
from .schedulers import ScheduledProcess, process_of

__all__ = ["LATENT_BLUR_SIGMA", "LATENT_BLUR_TAPS", "DiffusersUNet", "LatentDiffusion", "ScheduledProcess",
           "SelfAttentionSite", "UnconditionalBranch", "process_of"]
