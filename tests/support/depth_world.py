"""A small diffusion network, and pairs in which depth is the brightness of the image."""

import numpy as np
from networks import with_random_weights

from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.checkpoint import save_state
from guided_diffusion.depth.train import DepthTrainOptions, train_predictors
from guided_diffusion.script_util import create_model

MODEL = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1", "attention_resolutions": "",
         "num_heads": 1}
CHAIN = {"diffusion_steps": 100, "timestep_respacing": "5"}
TRAIN = {"strong_blocks": "1,3", "weak_blocks": "0", "num_labels": 12, "steps": 12, "batch_size": 4, "draws": 4,
         "save_interval": 5, "depth_range": "0,1"}


def write_world(folder):
    """Writes networks of random weights (model and conditional), and pairs (pairs.npz and held.npz)."""
    for name, extra in (("model", {}), ("conditional", {"class_cond": True, "num_classes": 2})):
        save_state(folder / f"{name}.safetensors", with_random_weights(create_model(**MODEL | extra)).state_dict())
    rng = np.random.default_rng(0)
    depth = np.kron(rng.uniform(0, 1, (40, 4, 4)), np.ones((2, 2)))
    images = np.repeat(np.rint(depth * 255).astype(np.uint8)[..., None], 3, axis=3)
    np.savez(folder / "pairs.npz", arr_0=images[:20], depth=depth[:20])
    np.savez(folder / "held.npz", arr_0=images[20:], depth=depth[20:], arr_1=np.arange(20) % 2)
    return folder


def world_flags(world, out, **changes):
    """Flags of a training on the pairs of `write_world`."""
    return {**MODEL, **CHAIN, **TRAIN, "model_path": str(world / "model.safetensors"),
            "data": str(world / "pairs.npz"), "out": str(out), **changes}


def parts(given):
    """The options that flags give, as `train_predictors` takes them."""
    return [cls(**{name: value for name, value in given.items() if name in cls.__dataclass_fields__})
            for cls in (DepthTrainOptions, ModelOptions, DiffusionOptions)]


def train_world(world, out, **changes):
    """Trains predictors on the pairs of `write_world`."""
    return train_predictors(*parts(world_flags(world, out, **changes)))
