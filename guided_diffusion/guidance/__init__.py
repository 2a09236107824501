"""Guidance terms. A list of them, in any combination, goes to any sampler as `guidance=`."""

from .base import Contrast, Gradient, Guidance, StepContext
from .classifier import ClassifierGuidance, FunctionGuidance
from .perturbed_attention import PerturbedAttentionGuidance
from .self_attention import SelfAttentionGuidance

__all__ = ["ClassifierGuidance", "Contrast", "FunctionGuidance", "Gradient", "Guidance", "PerturbedAttentionGuidance",
           "SelfAttentionGuidance", "StepContext"]
