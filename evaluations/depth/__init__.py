"""Measures and pictures of depth-aware guidance (2212.08861)."""
