"""The networks that see images for the metrics, and how each of ours was trained."""
