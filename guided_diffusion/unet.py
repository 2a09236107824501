"""ADM networks: the UNet, the encoder that classifies, and the UNet that upsamples (Dhariwal & Nichol, 2105.05233).

Parameter names and shapes are those of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import AttentionBlock, merge_heads, split_heads
from .errors import UserError
from .nn import SiLU, checkpoint, is_channels_last_on_cpu, normalization, rows_of, timestep_embedding, zero_module
from .shapes import POOLS
from .winograd import Conv3x3


class StepSequential(nn.ModuleList):
    """Layers one after the other, of which the residual blocks are also given the timestep embedding."""

    @property
    def sees_embedding(self) -> bool:
        """Whether there is a residual block among them."""
        return any(isinstance(layer, ResBlock) for layer in self)

    def forward(self, x: Tensor, emb: Tensor, first: int = 0) -> Tensor:
        """(N, C, H, W) and the embedding (N, E) -> the output of the last layer; x goes into layer `first`."""
        for layer in list(self)[first:]:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, followed by a 3x3 convolution if `convolve`."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if convolve else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2 H, 2 W)."""
        if self.conv is not None and x.dtype == torch.float32 and is_channels_last_on_cpu(x):
            return _upsample_and_convolve(x, self.conv)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


def _upsample_and_convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Both at once, as a transposed convolution with the 3x3 kernel spread over 4x4: 4/9 of the products."""
    kernel = conv.weight.transpose(0, 1).flip(2, 3)
    shifted = (F.pad(kernel, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1))
    return F.conv_transpose2d(x, sum(shifted, start=kernel.new_zeros(())), conv.bias, stride=2, padding=1)


class Downsample(nn.Module):
    """Downsampling by 2: a strided 3x3 convolution if `convolve`, else average pooling."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if convolve else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H / 2, W / 2)."""
        return self.op(x)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual connection, conditioned on the timestep embedding.

    resample: "up" or "down" changes the resolution by 2 inside the block, None keeps it. scale_shift: the embedding
    scales and shifts the output of the second norm (adaptive group normalisation, ADM, section 3); else it is added
    before that norm. use_checkpoint: computes activations again in the backward pass instead of keeping them.
    """

    def __init__(self, channels: int, emb_channels: int, out_channels: int, *, dropout: float = 0.0,
                 scale_shift: bool = False, resample: str | None = None, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.use_checkpoint = use_checkpoint
        self.resample = _resampling(resample, channels, convolve=False) if resample else None
        self.in_layers = nn.Sequential(
            normalization(channels), SiLU(), Conv3x3(channels, out_channels))
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels))
        self.out_layers = nn.Sequential(
            normalization(out_channels), SiLU(), nn.Dropout(dropout),
            zero_module(Conv3x3(out_channels, out_channels)))
        self.compiled: Callable[[Tensor, Tensor], Tensor] | None = None         # `plain`, where it is compiled
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N, channels, H, W) and the embedding (N, emb_channels) -> (N, out_channels, H, W), resampled."""
        return checkpoint(self.compiled or self.plain, x, emb, enabled=self.use_checkpoint)

    def plain(self, x: Tensor, emb: Tensor) -> Tensor:
        """The block itself, neither compiled nor checkpointed: what `forward` says."""
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        emb = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + emb)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


def _resampling(direction: str, channels: int, convolve: bool) -> nn.Module:
    return Upsample(channels, convolve) if direction == "up" else Downsample(channels, convolve)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What the UNet and the classifier have in common: the arguments of their encoder, by their names there."""

    image_size: int                             # pixels, height and width of the images that it is made for
    in_channels: int                            # channels of its input
    model_channels: int                         # width of level 0 before channel_mult
    num_res_blocks: int                         # residual blocks per level
    attention_resolutions: Sequence[int]        # downsampling factors (1, 2, 4, ...) whose levels have attention
    dropout: float                              # probability in training, in [0, 1]
    channel_mult: Sequence[float]               # width of each level, as a multiple of model_channels
    use_checkpoint: bool                        # compute activations again in the backward pass
    num_heads: int                              # attention heads, where num_head_channels is -1
    num_head_channels: int                      # channels per attention head; -1: channels / num_heads
    use_scale_shift_norm: bool                  # the timestep embedding scales and shifts, instead of being added
    resblock_updown: bool                       # residual blocks change the resolution, instead of convolutions
    use_new_attention_order: bool               # q, k and v lie in the new order (see `attention.split_heads`)


class Encoder(nn.Module):
    """What the UNet and the classifier share: the timestep embedding, the input blocks and the middle block.

    `image_size` fixes nothing but the grids that blocks report and the size of an attention pool: every network runs
    on any height and width that its levels divide. num_heads: the argument of that name; where `num_head_channels` is
    given, the blocks have other heads.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.model_channels = config.model_channels
        self.channel_mult = tuple(config.channel_mult)
        self.num_res_blocks = config.num_res_blocks
        self.attention_resolutions = tuple(config.attention_resolutions)
        self.num_heads = config.num_heads
        self.dtype = torch.float32
        self.memory_format = torch.contiguous_format
        self.graph_ends: list[str] = []         # set by `guided_diffusion.capture.end_graph`
        self._emb_channels = 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, self._emb_channels), nn.SiLU(),
            nn.Linear(self._emb_channels, self._emb_channels))

        channels = self.level_channels(0)
        self.input_blocks = nn.ModuleList([StepSequential([nn.Conv2d(config.in_channels, channels, 3, padding=1)])])
        self._input_channels = [channels]
        for level in range(self.num_levels):
            for _ in range(self.num_res_blocks):
                layers: list[nn.Module] = [self._res_block(channels, self.level_channels(level))]
                channels = self.level_channels(level)
                if 2**level in self.attention_resolutions:
                    layers.append(self._attention(channels, level, self.num_heads))
                self._append(self.input_blocks, layers, channels)
            if level < self.num_levels - 1:
                self._append(self.input_blocks, [self._resample(channels, "down")], channels)
        top = self.num_levels - 1
        self.middle_block = StepSequential([
            self._res_block(channels, channels), self._attention(channels, top, self.num_heads),
            self._res_block(channels, channels)])

    @property
    def num_levels(self) -> int:
        """The number of resolutions; each is half the one before it."""
        return len(self.channel_mult)

    def level_channels(self, level: int) -> int:
        """The number of channels of the feature maps of a level."""
        return int(self.channel_mult[level] * self.model_channels)

    def _append(self, blocks: nn.ModuleList, layers: list[nn.Module], channels: int) -> None:
        blocks.append(StepSequential(layers))
        self._input_channels.append(channels)

    def _res_block(self, channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
        config = self.config
        return ResBlock(channels, self._emb_channels, out_channels, dropout=config.dropout,
                        scale_shift=config.use_scale_shift_norm, resample=resample,
                        use_checkpoint=config.use_checkpoint)

    def _resample(self, channels: int, direction: str) -> nn.Module:
        if self.config.resblock_updown:
            return self._res_block(channels, channels, direction)
        return _resampling(direction, channels, convolve=True)

    def _attention(self, channels: int, level: int, num_heads: int) -> AttentionBlock:
        size, config = self.image_size // 2**level, self.config
        return AttentionBlock(channels, num_heads=num_heads, num_head_channels=config.num_head_channels,
                              new_order=config.use_new_attention_order, use_checkpoint=config.use_checkpoint,
                              grid=(size, size))

    @property
    def feature_blocks(self) -> dict[str, nn.Module]:
        """Every block by its name: `input.0` ..., `middle` and, in a UNet, `output.0` ..."""
        return {**_named("input", self.input_blocks), "middle": self.middle_block}

    @property
    def attention_blocks(self) -> dict[str, AttentionBlock]:
        """The attention block inside each block that has one, by the name of that block."""
        return {name: layer for name, block in self.feature_blocks.items() for layer in block.children()
                if isinstance(layer, AttentionBlock)}

    @property
    def _torso(self) -> list[nn.Module]:
        return [self.input_blocks, self.middle_block]

    def convert_to(self, dtype: torch.dtype) -> Self:
        """Runs the torso in `dtype`: its convolutions and attention projections; norms and the output stay float32.

        Returns the network itself, as all conversions do.
        """
        self.dtype = dtype
        for part in self._torso:
            for module in part.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.to(dtype)
        return self

    def convert_to_fp16(self) -> Self:
        """Runs the torso in float16."""
        return self.convert_to(torch.float16)

    def convert_to_fp32(self) -> Self:
        """Runs the torso in float32."""
        return self.convert_to(torch.float32)

    def channels_last(self) -> Self:
        """Keeps weights and feature maps in channels_last order: the faster one for convolutions on most devices."""
        self.memory_format = torch.channels_last
        return self.to(memory_format=torch.channels_last)       # type: ignore[call-overload]  # torch's types lack it

    def _embed(self, timesteps: Tensor) -> Tensor:
        return self.time_embed(timestep_embedding(timesteps, self.model_channels))

    def _first_map(self, x: Tensor) -> Tensor:
        """The images in the type and order of the torso. Raises UserError where it cannot take their shape."""
        channels = self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise UserError(f"an input of the shape {tuple(x.shape)}: must be (N, {channels}, H, W) for this network")
        factor = 2 ** (self.num_levels - 1)
        if x.shape[2] % factor or x.shape[3] % factor:
            raise UserError(f"image size {x.shape[2]}x{x.shape[3]}: height and width must be multiples of {factor}, "
                            f"since the network has {self.num_levels} levels")
        return x.to(dtype=self.dtype, memory_format=self.memory_format)

    def _run(self, h: Tensor, emb: Tensor, skips: list[Tensor], start: str = "input.0", layer: int = 0) -> Tensor:
        """The output of the last block, where h goes into the given layer of block `start`.

        skips: the maps that output blocks take, the last one first; input blocks put theirs there. Only layer 0 of an
        output block takes one.
        """
        blocks = [*self.input_blocks, self.middle_block, *self._output_blocks()]
        inputs, first = len(self.input_blocks), self._place(start)
        ends = [self._place(name) for name in self.graph_ends]
        last = max(ends) if ends else len(blocks)
        for index in range(first, len(blocks)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index <= last):
                if index > inputs and not layer:
                    h = torch.cat([h, skips.pop()], dim=1)
                h = blocks[index](h, emb, layer)
            layer = 0
            if index < inputs:
                skips.append(h)
        return h

    def _output_blocks(self) -> Sequence[nn.Module]:
        """The blocks behind the middle one."""
        return ()

    def _place(self, name: str) -> int:
        """The place of a block among all, in the order in which they run."""
        part, _, number = name.partition(".")
        inputs = len(self.input_blocks)
        return inputs if part == "middle" else int(number) + (inputs + 1 if part == "output" else 0)


def _named(part: str, blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """The blocks by names like "input.3"."""
    return {f"{part}.{i}": block for i, block in enumerate(blocks)}


@dataclass(frozen=True)
class Prefix:
    """An evaluation of a UNet up to the attention of one block, from which `UNetModel.resume` goes on.

    block: its name. h: the map that its attention layer is given. skips: the maps that output blocks still take, the
    last one first. emb: the embedding of step and label. inputs: copies of what the network was called with. Without
    an autograd graph.
    """

    block: str
    h: Tensor
    skips: tuple[Tensor, ...]
    emb: Tensor
    inputs: tuple[Tensor, Tensor, Tensor | None]

    def beginning_of(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> Prefix | None:
        """What an evaluation of these inputs begins with: this, or some rows of it; None where it begins otherwise."""
        rows = rows_of(self.inputs, (x, timesteps, y))
        if rows is None:
            return None
        return self if rows == slice(0, len(self.h)) else self._rows(rows)

    def _rows(self, rows: slice) -> Prefix:
        x, timesteps, y = self.inputs
        return Prefix(self.block, self.h[rows], tuple(skip[rows] for skip in self.skips), self.emb[rows],
                      (x[rows], timesteps[rows], None if y is None else y[rows]))

    @property
    def memory(self) -> int:
        """The bytes of its tensors, which the evaluation itself would have freed."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.h, *self.skips))


class PrefixRecorder:
    """Takes a `Prefix` at the attention of `block` from each evaluation; set by `guided_diffusion.capture`."""

    def __init__(self, block: str) -> None:
        self.block = block
        self.prefixes: list[Prefix] = []

    def begin(self, inputs: tuple[Tensor, Tensor, Tensor | None], emb: Tensor, skips: list[Tensor]) -> None:
        """Called by the network as an evaluation begins, with the list of skips that it is going to keep up to date."""
        self.evaluation = inputs, emb, skips

    def record(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Called before the attention layer, with its input."""
        (x, timesteps, y), emb, skips = self.evaluation
        copies = x.detach().clone(), timesteps.clone(), None if y is None else y.clone()
        kept = tuple(skip.detach() for skip in skips)
        self.prefixes.append(Prefix(self.block, args[0].detach(), kept, emb.detach(), copies))


class UNetModel(Encoder):
    """The ADM UNet.

    The arguments are those of guided-diffusion but conv_resample and dims, which are True and 2. in_channels,
    out_channels: of x_t and of the prediction (twice in_channels where the variance is learned). attention_resolutions:
    *downsampling factors* that have attention (1, 2, 4, ...). num_classes: adds a label embedding; labels are then
    needed. null_class: whether that has one more label, num_classes, which stands for no class (`null_label`).
    use_fp16: see `convert_to_fp16`. num_heads_upsample: heads of the output blocks (-1: num_heads). The others: see
    `EncoderConfig`.
    """

    def __init__(self, image_size: int, in_channels: int, model_channels: int, out_channels: int, num_res_blocks: int,
                 attention_resolutions: Sequence[int], dropout: float = 0.0,
                 channel_mult: Sequence[float] = (1, 2, 4, 8), num_classes: int | None = None,
                 use_checkpoint: bool = False, use_fp16: bool = False, num_heads: int = 1, num_head_channels: int = -1,
                 num_heads_upsample: int = -1, use_scale_shift_norm: bool = False, resblock_updown: bool = False,
                 use_new_attention_order: bool = False, null_class: bool = False) -> None:
        super().__init__(EncoderConfig(
            image_size=image_size, in_channels=in_channels, model_channels=model_channels,
            num_res_blocks=num_res_blocks, attention_resolutions=attention_resolutions, dropout=dropout,
            channel_mult=channel_mult, use_checkpoint=use_checkpoint, num_heads=num_heads,
            num_head_channels=num_head_channels, use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown, use_new_attention_order=use_new_attention_order))
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_classes = num_classes
        self.recorders: list[PrefixRecorder] = []       # both are set by `guided_diffusion.capture`
        self.prefixes: list[Prefix] = []
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + null_class, self._emb_channels)
        self.null_label = num_classes if null_class else None

        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        skip_channels = list(self._input_channels)
        channels = skip_channels[-1]
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(self.num_levels)):
            for i in range(num_res_blocks + 1):
                layers: list[nn.Module] = [self._res_block(channels + skip_channels.pop(), self.level_channels(level))]
                channels = self.level_channels(level)
                if 2**level in self.attention_resolutions:
                    layers.append(self._attention(channels, level, self.num_heads_upsample))
                if level and i == num_res_blocks:
                    layers.append(self._resample(channels, "up"))
                self.output_blocks.append(StepSequential(layers))
        self.out = nn.Sequential(
            normalization(channels), SiLU(), zero_module(nn.Conv2d(channels, out_channels, 3, padding=1)))
        if use_fp16:
            self.convert_to_fp16()

    @property
    def image_channels(self) -> int:
        """Channels of the images that it makes."""
        return self.in_channels

    @property
    def label_count(self) -> int | None:
        """How many labels it knows, that of no class among them; None without labels."""
        return None if self.num_classes is None else self.num_classes + (self.null_label is not None)

    @property
    def feature_blocks(self) -> dict[str, nn.Module]:
        """Every block by its name: `input.0` ..., `middle`, `output.0` ..."""
        return {**super().feature_blocks, **_named("output", self.output_blocks)}

    @property
    def _torso(self) -> list[nn.Module]:
        return [*super()._torso, self.output_blocks]

    def _output_blocks(self) -> Sequence[nn.Module]:
        return list(self.output_blocks)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x_t (N, in_channels, H, W), timesteps (N,), labels y (N,) int64 -> the prediction, in the type of x_t.

        Returns (N, out_channels, H, W). Raises UserError where labels are missing or not wanted, where they are not
        one an image, for another number of channels, and where the levels do not divide H or W.
        """
        if (y is None) != (self.num_classes is None):
            raise UserError("the network is class-conditional: labels y are needed" if y is None
                            else "the network is not class-conditional: it takes no labels y")
        if y is not None and y.shape != (len(x),):      # one label would be that of all images
            raise UserError(f"y: labels of the shape {tuple(y.shape)}, must be ({len(x)},), one an image")
        known = next(filter(None, (prefix.beginning_of(x, timesteps, y) for prefix in self.prefixes)), None)
        if known is not None:
            return self.resume(known)
        emb = self._embed(timesteps)
        if y is not None:
            emb = emb + self.label_emb(y)
        h = self._first_map(x)
        skips: list[Tensor] = []
        self._begin((x, timesteps, y), emb, skips)
        return self._output(self._run(h, emb, skips), x.dtype)

    def resume(self, prefix: Prefix) -> Tensor:
        """The prediction of the evaluation that began as `prefix`, (N, out_channels, H, W).

        It is computed from the attention of `prefix.block` on, and bit for bit that of `forward`, as long as nothing
        before that attention was overridden in the meantime.
        """
        block = self.feature_blocks[prefix.block]
        layer = list(block.children()).index(self.attention_blocks[prefix.block])
        skips = list(prefix.skips)
        self._begin(prefix.inputs, prefix.emb, skips)
        h = self._run(prefix.h, prefix.emb, skips, prefix.block, layer)
        return self._output(h, prefix.inputs[0].dtype)

    def _begin(self, inputs: tuple[Tensor, Tensor, Tensor | None], emb: Tensor, skips: list[Tensor]) -> None:
        for recorder in self.recorders:
            recorder.begin(inputs, emb, skips)

    def _output(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        """The prediction from the map of the last block."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.graph_ends):
            return self.out(h.to(dtype)).contiguous()


class SuperResModel(UNetModel):
    """A UNet that also sees a low-resolution image, which is upsampled and stacked under x_t.

    The arguments are those of `UNetModel`; in_channels: of one of the two images.
    """

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    @property
    def image_channels(self) -> int:
        """Channels of the images that it makes, and of those that it upsamples."""
        return self.in_channels // 2

    def forward(self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None,      # type: ignore[override]
                y: Tensor | None = None) -> Tensor:
        """As `UNetModel.forward`; low_res: (N, C, h, w) in [-1, 1], of any size.

        Its place among the arguments is that of guided-diffusion. Raises UserError also where low_res is missing, and
        for another number of images or channels.
        """
        if low_res is None:
            raise UserError("an upsampling network needs the low-resolution images low_res")
        if low_res.ndim != 4 or low_res.shape[:2] != (len(x), self.image_channels):
            raise UserError(f"low_res: has the shape {tuple(low_res.shape)}, must be ({len(x)}, {self.image_channels}, "
                            "h, w)")
        upsampled = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, upsampled], dim=1), timesteps, y)


class AttentionPool2d(nn.Module):
    """Pools a (N, C, S, S) map to (N, out_channels) by attention from its mean (CLIP; Radford et al. 2021)."""

    def __init__(self, size: int, channels: int, num_head_channels: int, out_channels: int) -> None:
        super().__init__()
        if num_head_channels < 1 or channels % num_head_channels:
            raise UserError(f"num_head_channels {num_head_channels}: must divide the {channels} pooled channels")
        embedding = nn.init.normal_(torch.empty(channels, size**2 + 1))
        self.positional_embedding = nn.Parameter(embedding.div_(channels**0.5))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)
        self.num_heads = channels // num_head_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, size, size) -> (N, out_channels)."""
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding.to(x.dtype)
        q, k, v = split_heads(self.qkv_proj(x).transpose(1, 2), self.num_heads, new_order=True)
        pooled = merge_heads(F.scaled_dot_product_attention(q[:, :, :1], k, v))
        return self.c_proj(pooled.transpose(1, 2)).squeeze(-1)


class EncoderUNetModel(Encoder):
    """The half UNet that classifies noisy images.

    out_channels: the number of classes. pool: how features become logits, "adaptive" or "attention" from the last map,
    "spatial" or "spatial_v2" from the means of all maps. The other arguments are those of `UNetModel`. Raises UserError
    for an unknown pool, and for an attention pool whose channels num_head_channels does not divide.
    """

    def __init__(self, image_size: int, in_channels: int, model_channels: int, out_channels: int, num_res_blocks: int,
                 attention_resolutions: Sequence[int], dropout: float = 0.0,
                 channel_mult: Sequence[float] = (1, 2, 4, 8), use_checkpoint: bool = False, use_fp16: bool = False,
                 num_heads: int = 1, num_head_channels: int = -1, use_scale_shift_norm: bool = False,
                 resblock_updown: bool = False, use_new_attention_order: bool = False, pool: str = "adaptive") -> None:
        super().__init__(EncoderConfig(
            image_size=image_size, in_channels=in_channels, model_channels=model_channels,
            num_res_blocks=num_res_blocks, attention_resolutions=attention_resolutions, dropout=dropout,
            channel_mult=channel_mult, use_checkpoint=use_checkpoint, num_heads=num_heads,
            num_head_channels=num_head_channels, use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown, use_new_attention_order=use_new_attention_order))
        self.pool = pool
        self.out = self._head(pool, out_channels)
        if use_fp16:
            self.convert_to_fp16()

    def _head(self, pool: str, out_channels: int) -> nn.Sequential:
        """The layers that make logits of features."""
        channels = self._input_channels[-1]
        features = sum(self._input_channels) + channels         # of the mean of every block's map
        match pool:
            case "adaptive":
                return nn.Sequential(
                    normalization(channels), SiLU(), nn.AdaptiveAvgPool2d((1, 1)),
                    zero_module(nn.Conv2d(channels, out_channels, 1)), nn.Flatten())
            case "attention":
                size = self.image_size // 2 ** (self.num_levels - 1)
                return nn.Sequential(
                    normalization(channels), SiLU(),
                    AttentionPool2d(size, channels, self.config.num_head_channels, out_channels))
            case "spatial":
                return nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, out_channels))
            case "spatial_v2":
                return nn.Sequential(
                    nn.Linear(features, 2048), normalization(2048), nn.SiLU(), nn.Linear(2048, out_channels))
        raise UserError(f"pool {pool!r}: must be one of {', '.join(POOLS)}")

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (N, in_channels, H, W), timesteps (N,) -> logits (N, out_channels), in the type of x_t."""
        maps: list[Tensor] = []
        h = self._run(self._first_map(x), self._embed(timesteps), maps)
        if self.pool.startswith("spatial"):
            return self.out(torch.cat([m.to(x.dtype).mean(dim=(2, 3)) for m in [*maps, h]], dim=-1))
        return self.out(h.to(x.dtype))
