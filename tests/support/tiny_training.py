"""A training that takes a second: its data, its options, and what it leaves."""

import csv

from guided_diffusion import checkpoint
from guided_diffusion.build import ClassifierOptions, DiffusionOptions, ModelOptions
from guided_diffusion.train_util import train_classifier, train_diffusion
from guided_diffusion.training.options import ClassifierTrainOptions, TrainOptions

MODEL = {"image_size": 8, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1",
         "attention_resolutions": "8", "num_heads": 1, "class_cond": True, "num_classes": 2, "learn_sigma": True}
CLASSIFIER = {"image_size": 8, "in_channels": 1, "num_classes": 2, "classifier_width": 32, "classifier_depth": 1,
              "classifier_num_head_channels": 32,
              "classifier_attention_resolutions": "", "classifier_pool": "adaptive", "classifier_channel_mult": "1"}
DIFFUSION = {"diffusion_steps": 10, "noise_schedule": "cosine"}
TRAIN = {"batch_size": 4, "lr": 1e-3, "lr_anneal_steps": 3, "ema_rate": "0.9,0.99", "log_interval": 1}


def train(data_dir, out, watchers=(), **changes):
    """Trains a tiny diffusion model; `changes` are flags of any of the options classes."""
    values = {**MODEL, **DIFFUSION, **TRAIN, "data_dir": str(data_dir), "out": str(out), **changes}
    train_diffusion(*(of(cls, values) for cls in (ModelOptions, DiffusionOptions, TrainOptions)), watchers)
    return out


def train_tiny_classifier(data_dir, out, **changes):
    values = {**CLASSIFIER, **DIFFUSION, "batch_size": 8, "iterations": 3, "log_interval": 1, "data_dir": str(data_dir),
              "val_data_dir": str(data_dir), "eval_interval": 2, "out": str(out), **changes}
    train_classifier(*(of(cls, values) for cls in (ClassifierOptions, DiffusionOptions, ClassifierTrainOptions)))
    return out


def of(cls, values):
    return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})


def flags(**values):
    return [f"--{name}={value}" for name, value in values.items()]


def rows_of(out):
    """The rows of the log, none where it is not begun."""
    if not (out / "progress.csv").exists():
        return []
    with (out / "progress.csv").open() as file:
        return list(csv.DictReader(file))


def log_of(out, name):
    return [float(row[name]) for row in rows_of(out) if row[name]]


def weights(out, name="model"):
    return checkpoint.load_state_dict(out / f"{name}.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)
