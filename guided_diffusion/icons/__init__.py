"""Colour icons as training data: the drawings of five emoji sets, with categories, styles and a split by emoji."""
