"""Small networks that run in milliseconds."""

import torch
from torch import nn

from guided_diffusion.nn import GroupNorm32

TINY = {"image_size": 16, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1",
        "num_heads": 2, "attention_resolutions": "8", "class_cond": True, "num_classes": 2, "learn_sigma": True,
        "resblock_updown": True, "use_scale_shift_norm": True}
TINY_CLASSIFIER = {"image_size": 16, "in_channels": 1, "num_classes": 2, "classifier_width": 32,
                   "classifier_depth": 1, "classifier_channel_mult": "1,1", "classifier_attention_resolutions": "8",
                   "classifier_num_head_channels": 16}


TINY_SHAPE = (1, 16, 16)


def normal(seed, count=2):
    """Standard normal images of the size of TINY."""
    return torch.randn(count, *TINY_SHAPE, generator=torch.Generator().manual_seed(seed))


def with_random_weights(module, seed=0):
    """`module` with no weight left at zero, in eval mode: the untrained output and residual branches are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + name.endswith("weight"))
    return module.eval()


def in_float64(model):
    """The network in float64 where it depends on x: no norm computes in float32, and the embedding stays as it was."""
    model.double()
    model.dtype = torch.float64
    model.time_embed.float()
    if model.num_classes is not None:
        model.label_emb.float()
    for module in model.modules():
        if isinstance(module, GroupNorm32):
            module.__class__ = nn.GroupNorm
        if hasattr(module, "emb_layers"):
            module.emb_layers.float()
    return model
