"""Guidance methods, one file each. A list of terms, in any combination, goes to any sampler as `guidance=`.

GUIDANCE lists the methods' options in the order in which help and titles show them.
"""

from ..terms import (
    ContrastGuidance,
    FunctionGuidance,
    GradientGuidance,
    Guidance,
    Inputs,
    LossGuidance,
    Passes,
    StepContext,
    Window,
)
from .base import GuidanceOptions, Networks
from .classifier import ClassifierGuidance, ClassifierGuidanceOptions
from .depth import DagOptions, DepthConsistencyGuidance, DepthPriorGuidance
from .perturbed_attention import PagOptions, PerturbedAttentionGuidance
from .self_attention import SagOptions, SelfAttentionGuidance

GUIDANCE: list[type[GuidanceOptions]] = [SagOptions, PagOptions, ClassifierGuidanceOptions, DagOptions]

# The names of the kinds in version 0.1
Contrast, Gradient, Descent = ContrastGuidance, GradientGuidance, LossGuidance

__all__ = [
    "GUIDANCE", "ClassifierGuidance", "ClassifierGuidanceOptions", "Contrast", "ContrastGuidance", "DagOptions",
    "DepthConsistencyGuidance", "DepthPriorGuidance", "Descent", "FunctionGuidance", "Gradient", "GradientGuidance",
    "Guidance", "GuidanceOptions", "Inputs", "LossGuidance", "Networks", "PagOptions", "Passes",
    "PerturbedAttentionGuidance", "SagOptions", "SelfAttentionGuidance", "StepContext", "Window",
]
