"""Small networks that run in milliseconds."""

import torch

TINY = {"image_size": 16, "in_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
        "num_heads": 2, "attention_resolutions": "8", "class_cond": True, "num_classes": 2, "learn_sigma": True,
        "resblock_updown": True, "use_scale_shift_norm": True}
TINY_CLASSIFIER = {"image_size": 16, "in_channels": 1, "num_classes": 2, "classifier_width": 32,
                   "classifier_depth": 1, "classifier_channel_mult": "1,2", "classifier_attention_resolutions": "8",
                   "classifier_num_head_channels": 32}


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
