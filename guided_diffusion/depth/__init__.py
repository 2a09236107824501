"""Depth: predictors on a diffusion network's features, the prior of depth maps, and the scenes they are learnt on."""
