"""A UNet of diffusers as `guided_diffusion.capture` and the guidance methods know networks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import GridAttention, merge_heads
from ..errors import UserError
from ..nn import rows_of
from ..unet import PrefixRecorder

UNETS = ("UNet2DModel", "UNet2DConditionModel")

_log = logging.getLogger(__name__)


class SelfAttentionSite(nn.Module):
    """A self-attention block of a diffusers UNet, with what `guided_diffusion.capture` sets on attention blocks.

    attention: the `Attention` of diffusers. transformer: the module around it, which knows the grid of its tokens; None
    where the attention itself is given maps. part: the place of the block that holds it among all.
    Where something observes it, its projections are computed once more, and the block itself runs with the attention
    processor that it has. Where an override is set, it runs with a processor of ours until the evaluation ends.
    """

    new_order = True                    # the projection that observers see holds all q, then all k, then all v

    def __init__(self, attention: nn.Module, transformer: nn.Module | None, part: int) -> None:
        super().__init__()
        self.attention: Any = attention
        self.transformer = transformer
        self.part = part
        self.grid = (0, 0)
        self.observers: list[Callable[[Any, Tensor, tuple[int, int]], None]] = []
        self.override: GridAttention | None = None

    @property
    def num_heads(self) -> int:
        """The heads of the block."""
        return self.attention.heads

    @property
    def watched(self) -> bool:
        """Whether anything observes the block or overrides its attention."""
        return bool(self.observers) or self.override is not None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Observers and override act on evaluations in the `with` block; after it the block is as it was."""
        attention, handles = self.attention, []
        source = self.transformer if self.transformer is not None else attention
        handles.append(source.register_forward_pre_hook(self._see_grid, with_kwargs=True))
        if self.observers:
            handles.append(attention.register_forward_pre_hook(self._observe, with_kwargs=True))
        before = attention.processor
        try:
            if self.override is not None:
                attention.set_processor(OverridingProcessor(self))
            yield
        finally:
            if attention.processor is not before:
                attention.set_processor(before)
            for handle in handles:
                handle.remove()

    def _see_grid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _first(args, kwargs)
        self.grid = (x.shape[2], x.shape[3])

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        q, k, v = self.project(self.tokens(_first(args, kwargs), kwargs.get("temb")))
        qkv = torch.cat([merge_heads(part) for part in (q, k, v)], dim=2)
        for observe in self.observers:
            observe(self, qkv, self.grid)

    def tokens(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """What the projections see, (N, T, C), of the block's input (N, T, C) or (N, C, H, W)."""
        if self.attention.spatial_norm is not None:
            x = self.attention.spatial_norm(x, temb)
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if self.attention.group_norm is not None:
            x = self.attention.group_norm(x.transpose(1, 2)).transpose(1, 2)
        return x

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (N, heads, T, C / heads) each, with the block's own scale in the queries."""
        attention = self.attention
        q, k, v = (layer(tokens).unflatten(2, (attention.heads, -1)).transpose(1, 2)
                   for layer in (attention.to_q, attention.to_k, attention.to_v))
        q = q if attention.norm_q is None else attention.norm_q(q)
        k = k if attention.norm_k is None else attention.norm_k(k)
        usual = q.shape[-1] ** -0.5
        return (q if attention.scale == usual else q * (attention.scale / usual)), k, v


class OverridingProcessor:
    """An attention processor of diffusers that computes the override of a site in place of softmax attention."""

    def __init__(self, site: SelfAttentionSite) -> None:
        self.site = site

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
        """The block's output, in the shape of its input, which is (N, T, C) or (N, C, H, W)."""
        site = self.site
        if attention_mask is not None or site.override is None:
            raise UserError("an attention mask over image tokens: guidance that overrides self-attention takes none")
        q, k, v = site.project(site.tokens(hidden_states, temb))
        out = merge_heads(site.override(q, k, v, site.grid)).to(q.dtype)
        for layer in attn.to_out:                       # the projection, and dropout
            out = layer(out)
        if hidden_states.ndim == 4:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@dataclass(frozen=True)
class PartialEvaluation:
    """What an evaluation gave in the parts before the one that holds a block, so that others can begin there.

    outputs: parts of the network with their outputs, without an autograd graph. inputs: copies of what the network was
    called with.
    """

    outputs: Sequence[tuple[nn.Module, Any]]
    inputs: Mapping[str, Tensor]

    def beginning_of(self, inputs: Mapping[str, Tensor]) -> PartialEvaluation | None:
        """What an evaluation of these inputs begins with: this, or some rows of it; None where it begins otherwise."""
        if self.inputs.keys() != inputs.keys():
            return None
        rows = rows_of(list(self.inputs.values()), [inputs[name] for name in self.inputs])
        if rows is None:
            return None
        if rows == slice(0, len(self.inputs["x"])):
            return self
        return PartialEvaluation([(part, _mapped(output, itemgetter(rows))) for part, output in self.outputs], inputs)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Lets those parts give what they gave, in the `with` block."""
        before = [(part, part.__dict__.get("forward")) for part, _ in self.outputs]
        try:
            for part, output in self.outputs:
                part.__dict__["forward"] = lambda *args, _output=output, **kwargs: _output
            yield
        finally:
            for part, forward in before:
                if forward is None:
                    part.__dict__.pop("forward", None)
                else:
                    part.__dict__["forward"] = forward


class DiffusersUNet(nn.Module):
    """`UNet2DModel` or `UNet2DConditionModel` of diffusers, called as our networks are.

    unet: the network, or a module around it with its attributes, as a compiled one. It stays what it is: nothing is
    left in it after an evaluation, whatever happens there. Where it, or a part of it, is compiled, evaluations that
    are observed or changed inside are made without what was compiled, which would not notice; that is said once.
    `attention_blocks` holds its self-attention by the name of its place, like "down.1.0" (block 1, layer 0), "middle"
    and "up.2.1"; further layers of one transformer are "middle/1" and so on. `feature_blocks` holds the residual
    blocks, which the embedding of the step reaches: "down.0.0", "middle.0", "up.0.1", and "down.0.down" and "up.0.up"
    where they resample. Raises UserError for any other network, and for one that is told the guidance scale (latent
    consistency) or sees images (IP-Adapter, Kandinsky); `forward` also where PyTorch is older than 2.6, and cannot do
    without what it compiled.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        _check(unet)
        self.unet: Any = unet
        self._places: dict[str, Any] = {
            **{f"down.{i}": part for i, part in enumerate(unet.down_blocks)},
            **({} if unet.mid_block is None else {"middle": unet.mid_block}),
            **{f"up.{i}": part for i, part in enumerate(unet.up_blocks)}}
        self._sites = dict(_sites(self._places))
        self.recorders: list[PrefixRecorder] = []           # these are set by `guided_diffusion.capture`
        self.prefixes: list[PartialEvaluation] = []
        self.graph_ends: list[str] = []
        self._said = False

    @property
    def attention_blocks(self) -> dict[str, SelfAttentionSite]:
        """The self-attention blocks by name, in the order in which an evaluation reaches them."""
        return dict(self._sites)

    @property
    def feature_blocks(self) -> dict[str, nn.Module]:
        """The residual blocks by name, in the order in which an evaluation reaches them."""
        found: dict[str, nn.Module] = {}
        for name, part in self._places.items():
            found |= {f"{name}.{i}": block for i, block in enumerate(getattr(part, "resnets", ()))}
            found |= {f"{name}.{word}": block for word in ("down", "up")
                      for block in getattr(part, f"{word}samplers", None) or () if hasattr(block, "time_emb_proj")}
        return found

    @property
    def image_size(self) -> int | None:
        """Height and width of what it was trained on, where they are the same; None where that is not known."""
        size = self.unet.config.sample_size
        return size if isinstance(size, int) else size[0] if size and size[0] == size[1] else None

    @property
    def has_labels(self) -> bool:
        """Whether it is given class labels."""
        return getattr(self.unet, "class_embedding", None) is not None

    @property
    def num_classes(self) -> int | None:
        """The classes of its labels; None where it takes none, and where they are not counted."""
        embedding = getattr(self.unet, "class_embedding", None)
        return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None

    @property
    def num_heads(self) -> int:
        """What the official SAG code takes for the heads of every block; raises UserError, as there is none here."""
        raise UserError("heads 'official': is for the official SAG code's own models; networks of diffusers have exact "
                        "heads")

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the network computes."""
        return self.unet.dtype

    @property
    def takes_prompts(self) -> bool:
        """Whether the network has cross-attention, and so needs `encoder_hidden_states`."""
        return getattr(self.unet.config, "cross_attention_dim", None) is not None

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None,
                encoder_hidden_states: Tensor | None = None, **added: Tensor) -> Tensor:
        """x_t (N, C, H, W), timesteps (N,) -> what the network predicts, in the type of x_t.

        y: class labels (N,) int64. encoder_hidden_states: embedded prompts (N, T, E). added: further conditions, such
        as `text_embeds` and `time_ids` of SDXL, (N, ...) each. Raises UserError where prompts or labels are missing,
        and where prompts are not wanted.
        """
        if (encoder_hidden_states is not None) != self.takes_prompts:
            raise UserError(f"{self._name}: " + (
                "encoder_hidden_states are needed, the embedded prompts" if self.takes_prompts
                else "it has no cross-attention, and takes no prompts"))
        if y is None and self.has_labels:
            raise UserError(f"{self._name}: is class-conditional, labels y are needed")
        given = {"x": x, "timesteps": timesteps, "y": y, "encoder_hidden_states": encoder_hidden_states, **added}
        inputs = {name: value for name, value in given.items() if value is not None}
        with ExitStack() as stack:
            if self._watched:
                stack.enter_context(self._uncompiled())
            for site in self._sites.values():
                if site.watched:
                    stack.enter_context(site.active())
            known = next(filter(None, (prefix.beginning_of(inputs) for prefix in self.prefixes)), None)
            if known is not None:
                stack.enter_context(known.standing_in())
            else:
                for recorder in self.recorders:
                    stack.enter_context(self._recorded(recorder, inputs))
            stack.enter_context(self._graph_ended())
            return self._evaluate(x, timesteps, y, encoder_hidden_states, added)

    @property
    def _name(self) -> str:
        return type(getattr(self.unet, "_orig_mod", self.unet)).__name__

    @property
    def _watched(self) -> bool:
        """Whether anything reads or changes what happens inside an evaluation; see `guided_diffusion.capture`."""
        return (any(site.watched for site in self._sites.values())
                or bool(self.recorders or self.prefixes or self.graph_ends)
                or any(block._forward_hooks or block._forward_pre_hooks for block in self.feature_blocks.values()))

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Evaluates in the `with` block what the network says, not what was compiled of it, which knows no hooks."""
        if not any(map(_is_compiled, self.unet.modules())):
            return nullcontext()
        if not hasattr(torch.compiler, "set_stance"):
            raise UserError(f"{self._name}: is compiled, and guidance that reads or changes what happens inside such a "
                            f"network needs PyTorch 2.6 or newer, this is {torch.__version__}")
        if not self._said:
            self._said = True
            _log.warning("%s: is compiled; evaluations that guidance reads or changes inside are made uncompiled",
                         self._name)
        return torch.compiler.set_stance("force_eager")

    @contextmanager
    def _graph_ended(self) -> Iterator[None]:
        """Records no graph above the last block in `graph_ends`, in the `with` block, which holds one evaluation."""
        blocks, before = self.feature_blocks, torch.is_grad_enabled()
        last = next((block for name, block in reversed(blocks.items()) if name in self.graph_ends), None)
        if last is None:
            yield
            return

        def end(*_: Any) -> None:
            torch.set_grad_enabled(False)

        handle = last.register_forward_hook(end)
        try:
            yield
        finally:
            handle.remove()
            torch.set_grad_enabled(before)

    def _evaluate(self, x: Tensor, timesteps: Tensor, y: Tensor | None, prompts: Tensor | None,
                  added: Mapping[str, Tensor]) -> Tensor:
        options: dict[str, Any] = {} if y is None else {"class_labels": y}
        if prompts is not None:
            options["encoder_hidden_states"] = prompts.to(self.dtype)
        if added:
            options["added_cond_kwargs"] = {name: value.to(self.dtype) for name, value in added.items()}
        return self.unet(x.to(self.dtype), timesteps, return_dict=False, **options)[0].to(x.dtype)

    @contextmanager
    def _recorded(self, recorder: PrefixRecorder, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Gives the recorder what the evaluation in the `with` block does before the part that holds its block."""
        parts = list(self._places.values())[:self._sites[recorder.block].part]
        outputs: list[tuple[nn.Module, Any]] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append((module, _mapped(output, torch.Tensor.detach)))

        handles = [part.register_forward_hook(keep) for part in parts]
        copies = {name: value.detach().clone() for name, value in inputs.items()}
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        recorder.prefixes.append(PartialEvaluation(outputs, copies))    # type: ignore[arg-type]  # another network's


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` made it, or its `compile` or a compiled `forward` stands in it."""
    return (getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"))


def _check(unet: Any) -> None:
    """Raises UserError for what is no UNet for images of diffusers, and for conditions that it would not be given."""
    name = type(unet).__name__
    if not (isinstance(unet, nn.Module)
            and any(kind.__name__ in UNETS for part in unet.modules() for kind in type(part).__mro__)
            and all(hasattr(unet, part) for part in ("down_blocks", "mid_block", "up_blocks", "config"))):
        raise UserError(f"{name}: must be a {' or a '.join(UNETS)} of diffusers")
    config: Any = unet.config
    if (width := getattr(config, "time_cond_proj_dim", None)) is not None:
        raise UserError(f"{name} time_cond_proj_dim {width}: must be None; networks of latent consistency, which "
                        "are told the guidance scale, are not supported")
    for option in ("encoder_hid_dim_type", "addition_embed_type"):
        if "image" in (kind := getattr(config, option, None) or ""):
            raise UserError(f"{name} {option} {kind!r}: must be one without images; networks that also see "
                            "an image, as by an IP-Adapter, are not supported")


def _sites(places: Mapping[str, Any]) -> Iterator[tuple[str, SelfAttentionSite]]:
    for part, (place, module) in enumerate(places.items()):
        for i, layer in enumerate(getattr(module, "attentions", None) or ()):
            name = place if place == "middle" and not i else f"{place}.{i}"
            transformers = getattr(layer, "transformer_blocks", None)
            attentions: list[Any] = [layer] if transformers is None else [
                getattr(block, "attn1", None) for block in transformers]
            for j, attention in enumerate(attentions):
                if _is_self_attention(attention):
                    yield f"{name}/{j}" if j else name, SelfAttentionSite(
                        attention, None if transformers is None else layer, part)


def _is_self_attention(attention: Any) -> bool:
    return (hasattr(attention, "to_q") and hasattr(attention, "processor") and not attention.is_cross_attention
            and attention.added_kv_proj_dim is None)


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An output, which may be a tensor or tuples of them, with every tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    return tuple(_mapped(part, change) for part in output) if isinstance(output, tuple) else output
