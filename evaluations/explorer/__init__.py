"""The explorer: what happens inside a sampling run, step by step, as arrays and as a page."""
