"""Guidance terms. A list of them, in any combination, goes to any sampler as `guidance=`."""

from .base import Contrast, Descent, Gradient, Guidance, StepContext
from .classifier import ClassifierGuidance, FunctionGuidance
from .depth import DepthConsistencyGuidance, DepthPriorGuidance
from .perturbed_attention import PerturbedAttentionGuidance
from .self_attention import SelfAttentionGuidance

__all__ = ["ClassifierGuidance", "Contrast", "DepthConsistencyGuidance", "DepthPriorGuidance", "Descent",
           "FunctionGuidance", "Gradient", "Guidance", "PerturbedAttentionGuidance", "SelfAttentionGuidance",
           "StepContext"]
