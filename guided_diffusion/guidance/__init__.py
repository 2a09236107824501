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
    TransformGuidance,
    Window,
)
from .autoguidance import AutoGuidance, AutoguidanceOptions
from .base import GuidanceOptions, Networks, ScaledOptions
from .classifier import ClassifierGuidance, ClassifierGuidanceOptions
from .classifier_free import CfgOptions, ClassifierFreeGuidance
from .clean_classifier import CleanClassifierGuidance, CleanClassifierOptions
from .depth import DagOptions, DepthConsistencyGuidance, DepthPriorGuidance
from .independent_condition import IcgOptions, IndependentConditionGuidance
from .perturbed_attention import AttentionContrast, AttentionOptions, PagOptions, PerturbedAttentionGuidance
from .projected import ApgOptions, ProjectedGuidance
from .rescale import Rescale, RescaleOptions
from .self_attention import SagOptions, SelfAttentionGuidance
from .smoothed_energy import SegOptions, SmoothedEnergyGuidance
from .time_step import TimestepGuidance, TsgOptions

GUIDANCE: list[type[GuidanceOptions]] = [
    SagOptions, PagOptions, SegOptions, TsgOptions, AutoguidanceOptions, CfgOptions, IcgOptions,
    ClassifierGuidanceOptions, CleanClassifierOptions, DagOptions, ApgOptions, RescaleOptions]

# The names of the kinds in version 0.1
Contrast, Gradient, Descent = ContrastGuidance, GradientGuidance, LossGuidance

__all__ = [
    "GUIDANCE", "ApgOptions", "AttentionContrast", "AttentionOptions", "AutoGuidance", "AutoguidanceOptions",
    "CfgOptions", "ClassifierFreeGuidance", "ClassifierGuidance", "ClassifierGuidanceOptions",
    "CleanClassifierGuidance", "CleanClassifierOptions", "Contrast", "ContrastGuidance", "DagOptions",
    "DepthConsistencyGuidance", "DepthPriorGuidance", "Descent", "FunctionGuidance", "Gradient", "GradientGuidance",
    "Guidance", "GuidanceOptions", "IcgOptions", "IndependentConditionGuidance", "Inputs", "LossGuidance",
    "Networks", "PagOptions", "Passes", "PerturbedAttentionGuidance", "ProjectedGuidance", "Rescale",
    "RescaleOptions", "SagOptions", "ScaledOptions", "SegOptions", "SelfAttentionGuidance",
    "SmoothedEnergyGuidance", "StepContext", "TimestepGuidance", "TransformGuidance", "TsgOptions", "Window",
]
