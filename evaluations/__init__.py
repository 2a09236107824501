"""Measures of sampled images."""
