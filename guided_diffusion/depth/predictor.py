"""Depth predictors: shallow pixel-wise MLPs on the feature maps of a diffusion network's decoder.

Kim et al. (2212.08861): d = MLP([f(k), k in K], t), a strong branch on several blocks and a weak one on few. Hidden
widths as in the work that they build on (Baranchuk et al., 2112.03126). A depth map is (N, 1, size, size), -1 nearest.

File: safetensors; metadata: kind, branches (JSON: branch -> block -> channels), size, depth_range, network_sha256 (of
the checkpoint whose features were learnt on), and notes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checkpoint
from ..errors import UserError
from ..foreign import reading
from ..nn import timestep_embedding
from ..unet import UNetModel
from .features import feature_channels, upsampled

KIND = "depth_predictors"
WIDTHS = (128, 32)
TIME_CHANNELS = 64
EPSILON = 1e-6          # added to the variance of a feature, which may be constant


class DepthPredictor(nn.Module):
    """One branch.

    channels: block name -> channels of its map. size: of the depth map, in pixels. Computes in the type of its
    weights, whatever that of the maps.

    The first layer is linear, and so is upsampling: it is applied at each block's own resolution, and its outputs are
    upsampled and summed. This is the same function as an MLP on all maps upsampled to `size` and concatenated, at a
    part of its cost.
    """

    mean: Tensor          # of the features, (sum of channels,)
    std: Tensor

    def __init__(self, channels: Mapping[str, int], size: int) -> None:
        super().__init__()
        self.channels = dict(channels)
        self.size = size
        total = sum(channels.values())
        self.first = nn.ParameterList([torch.randn(WIDTHS[0], count) * total**-0.5 for count in channels.values()])
        self.time = nn.Sequential(nn.Linear(TIME_CHANNELS, WIDTHS[0]), nn.SiLU(), nn.Linear(WIDTHS[0], WIDTHS[0]))
        self.rest = nn.Sequential(nn.SiLU(), nn.Conv2d(*WIDTHS, 1), nn.SiLU(), nn.Conv2d(WIDTHS[1], 1, 1))
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("std", torch.ones(total))

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks whose maps the branch reads."""
        return tuple(self.channels)

    @torch.no_grad()
    def standardise(self, maps: Mapping[str, Tensor]) -> None:
        """Shifts and scales features from now on so that these maps have mean 0 and variance 1 in every channel."""
        moments = [torch.var_mean(maps[name].float(), dim=(0, 2, 3), correction=0) for name in self.blocks]
        self.mean.copy_(torch.cat([mean for _, mean in moments]))
        self.std.copy_((torch.cat([variance for variance, _ in moments]) + EPSILON).sqrt())

    def forward(self, maps: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """Depth (N, 1, size, size) from maps (N, C_k, h_k, w_k), at least of `blocks`, at original steps t (N,)."""
        dtype, widths = self.mean.dtype, tuple(self.channels.values())
        hidden = self.time(timestep_embedding(t, TIME_CHANNELS).to(dtype))[:, :, None, None]
        sums: dict[torch.Size, Tensor] = {}          # by resolution, so that each is upsampled once
        statistics = zip(self.mean.split(widths), self.std.split(widths), strict=True)
        for name, weight, (mean, std) in zip(self.blocks, self.first, statistics, strict=True):
            weight = weight / std          # (x - mean) / std, without a copy of the map
            x = F.conv2d(maps[name].to(dtype), weight[:, :, None, None])
            sums[x.shape] = sums[x.shape] + x if x.shape in sums else x
            hidden = hidden - (weight @ mean)[:, None, None]
        return self.rest(sum(upsampled(x, self.size) for x in sums.values()) + hidden)


class DepthPredictors(nn.Module):
    """Named branches on the features of one network: "strong" and "weak" in guidance.

    branches: name -> block name -> channels. depth_range: of the maps they learnt, as `--depth_range` says it.
    network_sha256: of the diffusion checkpoint. Call: as a branch; gives the depth of each by name.
    """

    def __init__(self, branches: Mapping[str, Mapping[str, int]], size: int, depth_range: str,
                 network_sha256: str) -> None:
        super().__init__()
        # A ModuleDict, whose own type knows no more of its values than that they are modules.
        self.branches = cast(Mapping[str, DepthPredictor], nn.ModuleDict(
            {name: DepthPredictor(channels, size) for name, channels in branches.items()}))
        self.size = size
        self.depth_range = depth_range
        self.network_sha256 = network_sha256

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of all blocks that any branch reads."""
        return tuple(dict.fromkeys(name for branch in self.branches.values() for name in branch.blocks))

    def standardise(self, maps: Mapping[str, Tensor]) -> None:
        """Standardises every branch by these maps (`DepthPredictor.standardise`)."""
        for branch in self.branches.values():
            branch.standardise(maps)

    def forward(self, maps: Mapping[str, Tensor], t: Tensor) -> dict[str, Tensor]:
        """Depth (N, 1, size, size) by branch, from maps (N, C_k, h_k, w_k) at original steps t (N,)."""
        return {name: branch(maps, t) for name, branch in self.branches.items()}


def save_predictors(path: str | Path, predictors: DepthPredictors, notes: Mapping[str, str] | None = None) -> None:
    """Writes a file of predictors, whole or not at all; notes: more metadata. Raises UserError where it can't."""
    metadata = {**(notes or {}), "kind": KIND, "size": str(predictors.size), "depth_range": predictors.depth_range,
                "network_sha256": predictors.network_sha256,
                "branches": json.dumps({name: branch.channels for name, branch in predictors.branches.items()})}
    checkpoint.save_state(path, predictors.state_dict(), metadata)


def load_predictors(path: str | Path, device: str | torch.device = "cpu") -> DepthPredictors:
    """The predictors in a file, frozen. Raises UserError where it is missing, damaged or something else."""
    predictors = build_predictors(path)
    try:
        predictors.load_state_dict(checkpoint.load_state_dict(path))
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):
        raise _damaged(path) from None
    checkpoint.ready(predictors, device)
    return predictors


def build_predictors(path: str | Path) -> DepthPredictors:
    """The predictors that a file describes, without their weights. Raises UserError as `load_predictors`."""
    metadata = checkpoint.read_metadata(path)
    if metadata.get("kind") != KIND:
        raise UserError(f"{path}: is no file of depth predictors, which scripts/depth_train.py writes")
    try:
        return DepthPredictors(json.loads(metadata["branches"]), int(metadata["size"]), metadata["depth_range"],
                               metadata["network_sha256"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):
        raise _damaged(path) from None


def _damaged(path: str | Path) -> UserError:
    return UserError(f"{path}: is damaged, its weights and what it says of them do not fit together")


def check_network(made_for: str, network_sha256: str, what: str) -> None:
    """Raises UserError, beginning with `what`, where the checkpoint made for and the network's differ in SHA-256."""
    if made_for != network_sha256:
        raise UserError(f"{what} trained on another network: on the checkpoint with SHA-256 {made_for[:16]}..., not "
                        f"{network_sha256[:16]}...")


def check_entry(path: str | Path, model_path: str, entry: str, what: str) -> None:
    """Raises UserError, beginning with `what`, for predictors of another network in a file that wraps several.

    path: of the predictors. model_path: of the network, in whose file `entry` is taken. Where that file is another one
    than they were trained on, nothing may be raised: `check_network` says so.
    """
    with reading(path, "does not say what it was trained on"):
        learnt = json.loads(checkpoint.read_metadata(path).get("training", "{}")).get("checkpoint_entry", "")
    if learnt == entry:
        return
    try:
        before, now = (checkpoint.taken_entry(model_path, one) for one in (learnt, entry))
    except UserError:
        return
    if before != now:
        raise UserError(f"{what} trained on another network: on the entry {before} of {model_path}, not {now}; "
                        "--checkpoint_entry chooses")


def check_fits(predictors: DepthPredictors, model: UNetModel, network_sha256: str | None) -> None:
    """Raises UserError unless the predictors were made for this network.

    network_sha256: of its checkpoint; None where there is no file to compare with.
    """
    if network_sha256 is not None:
        check_network(predictors.network_sha256, network_sha256, "the depth predictors were")
    if predictors.size != model.image_size:
        raise UserError(f"the depth predictors are for images of {predictors.size} pixels, and the network's have "
                        f"{model.image_size}")
    own = feature_channels(model, predictors.blocks)
    counts = [one for branch in predictors.branches.values() for one in branch.channels.items()]
    for name, count in counts:                                      # branches may differ
        if own[name] != count:
            raise UserError(f"the depth predictors read {count} channels from block {name!r}, which has {own[name]} "
                            "in this network")
