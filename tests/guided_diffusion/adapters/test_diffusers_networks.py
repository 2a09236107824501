"""UNets of diffusers among our captures, overrides and shared prefixes, which leave nothing behind."""

from types import SimpleNamespace

import pytest
import torch
from golden import noise
from tiny_diffusers import PROMPTS, diffusers, pixel_unet, prompted_unet

from guided_diffusion.adapters.diffusers import DiffusersUNet
from guided_diffusion.capture import (
    capture_attention,
    capture_features,
    capture_prefix,
    override_attention,
    override_grid_attention,
    perturb_embedding,
    resume_from,
)
from guided_diffusion.errors import UserError

NAMES = ["down.1.0", "middle", "up.0.0", "up.0.1"]
T = torch.tensor([700, 300])
NETWORKS = {"prompted": (prompted_unet, 4, {"encoder_hidden_states": PROMPTS}), "pixels": (pixel_unet, 3, {})}


def processors(unet):
    """The attention processor of every attention in a network, by its name."""
    return {name: module.processor for name, module in unet.named_modules() if hasattr(module, "processor")}


@pytest.fixture(params=NETWORKS, scope="module")
def network(request):
    build, channels, conditions = NETWORKS[request.param]
    unet = build()
    wrapped = DiffusersUNet(unet)
    x = noise((2, channels, 8, 12), 0)

    @torch.no_grad()
    def evaluate():
        return wrapped(x, T, **conditions)

    with torch.no_grad():
        options = {"encoder_hidden_states": PROMPTS} if conditions else {}
        plain = unet(x, T, return_dict=False, **options)[0]
    return wrapped, evaluate, plain


def test_blocks_have_the_names_of_their_places(network):
    wrapped, _, _ = network
    assert list(wrapped.attention_blocks) == NAMES
    assert list(wrapped.feature_blocks) == ["down.0.0", "down.1.0", "middle.0", "middle.1", "up.0.0", "up.0.1",
                                            "up.1.0", "up.1.1"]


def test_several_layers_of_a_transformer_are_numbered():
    wrapped = DiffusersUNet(prompted_unet(transformer_layers_per_block=2))
    assert list(wrapped.attention_blocks)[:4] == ["down.1.0", "down.1.0/1", "middle", "middle/1"]


def test_the_wrapped_network_gives_what_the_network_gives(network):
    _, evaluate, plain = network
    assert torch.equal(evaluate(), plain)


@pytest.mark.parametrize("name", NAMES)
def test_received_attention_is_that_of_the_whole_map(network, name):
    wrapped, evaluate, plain = network
    maps = []

    def whole(q, k, v):
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1)
        maps.append(weights.sum(dim=2).mean(dim=1))
        return weights @ v

    with capture_attention(wrapped, [name]) as captured:
        observed = evaluate()
    with override_attention(wrapped, [name], whole):
        overridden = evaluate()

    assert torch.equal(observed, plain)
    assert captured[name].grid == (4, 6)
    torch.testing.assert_close(captured[name].received, maps[0])
    torch.testing.assert_close(overridden, plain, rtol=1e-4, atol=1e-5)


def test_an_override_is_told_the_grid_and_changes_the_prediction(network):
    wrapped, evaluate, plain = network
    grids = []

    def identity(q, k, v, grid):
        grids.append((grid, q.shape[2]))
        return v

    with override_grid_attention(wrapped, ["middle", "up.0.1"], identity):
        changed = evaluate()
    assert grids == [((4, 6), 24)] * 2
    assert (changed - plain).abs().max() > 1e-4
    assert torch.equal(evaluate(), plain)


def test_nothing_is_left_behind_after_an_exception(network):
    wrapped, evaluate, plain = network
    before = processors(wrapped.unet)
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in wrapped.unet.modules())

    def fail(q, k, v):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), capture_attention(wrapped, NAMES), \
            override_attention(wrapped, ["middle"], fail):
        evaluate()

    after = processors(wrapped.unet)
    assert all(after[name] is processor for name, processor in before.items()) and after.keys() == before.keys()
    assert hooks == sum(len(module._forward_pre_hooks) + len(module._forward_hooks)
                        for module in wrapped.unet.modules())
    assert torch.equal(evaluate(), plain)


def with_slices(unet, monkeypatch):
    """Sliced attention."""
    unet.set_attention_slice(1)


def with_fused_projections(unet, monkeypatch):
    """Queries, keys and values by one product."""
    unet.fuse_qkv_projections()


def with_xformers(unet, monkeypatch):
    """The processor of xformers, whose operation a CPU does not have: PyTorch's stands in for it."""
    from diffusers.models import attention_processor

    def operation(q, k, v, attn_bias, op, scale):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale)

    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(
        ops=SimpleNamespace(memory_efficient_attention=operation)))
    unet.set_attn_processor(attention_processor.XFormersAttnProcessor())


def with_lora(unet, monkeypatch):
    """Two adapters in all projections of attention, one of which is active at half its weight."""
    peft = pytest.importorskip("peft", reason="peft, which LoRA in diffusers needs, is not installed")
    for i, name in enumerate(("one", "two")):
        torch.manual_seed(i)
        unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False,
                                         target_modules=["to_q", "to_k", "to_v", "to_out.0"]), name)
    unet.set_adapters(["two"], [0.5])


@pytest.mark.parametrize("change", [with_slices, with_fused_projections, with_xformers, with_lora])
def test_what_the_user_did_to_attention_is_seen_and_stays(change, monkeypatch):
    unet = prompted_unet()
    x, prompts = noise((2, 4, 8, 12), 0), {"encoder_hidden_states": PROMPTS}
    wrapped, maps = DiffusersUNet(unet), []
    with torch.no_grad():
        untouched = unet(x, T, PROMPTS, return_dict=False)[0]
    change(unet, monkeypatch)
    before = processors(unet)

    def whole(q, k, v):
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1)
        maps.append(weights.sum(dim=2).mean(dim=1))
        return weights @ v

    def fail(q, k, v):
        raise RuntimeError("on purpose")

    with torch.no_grad():
        plain = unet(x, T, PROMPTS, return_dict=False)[0]
        with capture_attention(wrapped, ["middle"]) as captured:
            observed = wrapped(x, T, **prompts)
        with override_attention(wrapped, ["middle"], whole):
            overridden = wrapped(x, T, **prompts)
        with pytest.raises(RuntimeError, match="on purpose"), override_attention(wrapped, NAMES, fail):
            wrapped(x, T, **prompts)
        after = wrapped(x, T, **prompts)
    assert torch.equal(observed, plain) and torch.equal(after, plain)
    torch.testing.assert_close(captured["middle"].received, maps[0])
    torch.testing.assert_close(overridden, plain, rtol=1e-4, atol=1e-5)
    assert ((untouched - plain).abs().max() > 1e-3) == (change is with_lora)
    assert processors(unet).keys() == before.keys()
    assert all(processors(unet)[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_before_an_overridden_block_is_not_evaluated_again(network, name):
    wrapped, evaluate, _ = network
    evaluated = []
    handles = [block.register_forward_pre_hook(lambda *_, place=place: evaluated.append(place))
               for place, block in wrapped.feature_blocks.items()]
    try:
        with override_attention(wrapped, [name], lambda q, k, v: v):
            expected = evaluate()
        with capture_prefix(wrapped, name) as prefixes:
            evaluate()
        evaluated.clear()
        with override_attention(wrapped, [name], lambda q, k, v: v), resume_from(wrapped, prefixes):
            resumed = evaluate()
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(resumed, expected)
    assert evaluated[0].partition(".")[0] == name.partition(".")[0]
    assert len(evaluated) < 8


def test_the_embedding_of_the_step_can_be_perturbed(network):
    wrapped, evaluate, plain = network
    with perturb_embedding(wrapped, wrapped.feature_blocks, lambda emb: emb + 0.1) as reached:
        changed = evaluate()
    assert reached == list(wrapped.feature_blocks)
    assert (changed - plain).abs().max() > 1e-4


def test_a_network_without_attention_says_so():
    wrapped = DiffusersUNet(pixel_unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                                       add_attention=False))
    with pytest.raises(UserError, match=r"there are: none"), capture_attention(wrapped, ["middle"]):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_its_type(dtype):
    wrapped = DiffusersUNet(prompted_unet().to(dtype))
    with torch.no_grad(), capture_attention(wrapped, ["middle"]) as captured:
        out = wrapped(noise((2, 4, 8, 8), 0), T, encoder_hidden_states=PROMPTS)
    assert out.dtype == torch.float32 and captured["middle"].received.dtype == torch.float32


def test_networks_of_other_kinds_and_with_other_conditions_are_refused():
    """Some have the parts of a UNet for images, and some conditions have defaults: they would sample in silence."""
    blocks = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 4}
    video = diffusers.UNet3DConditionModel(
        **blocks, cross_attention_dim=16, attention_head_dim=4, up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"))
    sound = diffusers.UNet1DModel(sample_size=64, extra_in_channels=16)
    for network in (video, sound):
        with pytest.raises(UserError, match="must be a UNet2DModel or a UNet2DConditionModel of diffusers"):
            DiffusersUNet(network)
    for changes, words in [({"time_cond_proj_dim": 8}, "time_cond_proj_dim 8: must be None"),
                           ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16}, "'image_proj': must be one"),
                           ({"addition_embed_type": "image", "encoder_hid_dim": 16}, "'image': must be one without")]:
        with pytest.raises(UserError, match=f"^UNet2DConditionModel .*{words}"):
            DiffusersUNet(prompted_unet(**changes))


def compiled_around(unet, backend):
    """As diffusers says it."""
    return torch.compile(unet, backend=backend)


def compiled_in_place(unet, backend):
    """The method of the network."""
    unet.compile(backend=backend)
    return unet


def compiled_in_part(unet, backend):
    """One block of it."""
    unet.mid_block = torch.compile(unet.mid_block, backend=backend)
    return unet


@pytest.mark.parametrize("compiled", [compiled_around, compiled_in_place, compiled_in_part])
def test_compiled_networks_are_read_and_changed_inside(compiled, caplog):
    """What was compiled before a hook, or with one, does not notice what becomes of it, and computes without a word."""
    runs = []

    def counting(graph, inputs):
        return lambda *args: (runs.append(1), graph(*args))[1]

    def evaluations(wrapped):
        x, t, blocks = noise((1, 3, 8, 8), 0), T[:1], ["middle.0", "up.0.1"]
        plain, inside = wrapped(x, t), len(runs)
        with capture_attention(wrapped, ["middle"]) as attention, capture_features(wrapped, blocks) as features:
            observed = wrapped(x, t)
        with override_grid_attention(wrapped, ["middle"], lambda q, k, v, grid: v * grid[0]):
            overridden = wrapped(x, t)
        with perturb_embedding(wrapped, blocks, lambda emb: emb + 1) as reached:
            perturbed = wrapped(x, t)
        inside, before = len(runs) - inside, len(runs)
        again = wrapped(x, t)
        return ([plain, observed, overridden, perturbed, again, attention["middle"].received, *features.values()],
                reached, inside, len(runs) - before)

    with torch.no_grad():
        expected, reached, _, _ = evaluations(DiffusersUNet(pixel_unet()))
        wrapped = DiffusersUNet(compiled(pixel_unet(), counting))
        found, also_reached, inside, outside = evaluations(wrapped)
    assert list(wrapped.attention_blocks) == NAMES and also_reached == reached
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert inside == 0 and outside > 0              # the others still run as compiled
    assert [message for name, _, message in caplog.record_tuples if name.startswith("guided_diffusion")] == [
        "UNet2DModel: is compiled; evaluations that guidance reads or changes inside are made uncompiled"]


def test_a_compiled_network_says_what_an_older_pytorch_cannot(monkeypatch):
    wrapped = DiffusersUNet(torch.compile(pixel_unet(), backend="eager"))
    monkeypatch.delattr(torch.compiler, "set_stance")
    with pytest.raises(UserError, match=r"^UNet2DModel: is compiled, .* PyTorch 2.6 or newer"), \
            capture_attention(wrapped, ["middle"]):
        wrapped(noise((1, 3, 8, 8), 0), T[:1])


def test_what_is_missing_or_not_wanted_is_a_sentence():
    with pytest.raises(UserError, match="must be a UNet2DModel"):
        DiffusersUNet(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="embedded prompts"):
        DiffusersUNet(prompted_unet())(noise((2, 4, 8, 8), 0), T)
    with pytest.raises(UserError, match="takes no prompts"):
        DiffusersUNet(pixel_unet())(noise((2, 3, 8, 8), 0), T, encoder_hidden_states=PROMPTS)
    with pytest.raises(UserError, match="labels y are needed"):
        DiffusersUNet(pixel_unet(num_class_embeds=3))(noise((2, 3, 8, 8), 0), T)
    with pytest.raises(UserError, match="exact heads"), \
            capture_attention(DiffusersUNet(pixel_unet()), ["middle"], heads="official"):
        pass
