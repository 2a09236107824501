"""Rendered rooms with exact depth, masks and classes: the renderer, and files of them."""

from .renderer import DEPTH_RANGE, FAR, FOV, KINDS, NEAR, Scenes, intrinsics, render

__all__ = ["DEPTH_RANGE", "FAR", "FOV", "KINDS", "NEAR", "Scenes", "intrinsics", "render"]
