"""The machinery of trainings in a folder: their options, loop, start, averages, record and what looks at them.

`guided_diffusion.train_util` gives it networks, data and losses.
"""
