"""The networks: released checkpoints, golden outputs, half precision, checkpointing, sizes, and bad input."""

import json
import math
import re

import numpy as np
import pytest
import torch
from golden import cases, fill, noise, relative_error, released_checkpoints
from networks import with_random_weights
from torch.nn import functional as F

from guided_diffusion.attention import AttentionBlock
from guided_diffusion.capture import capture_attention
from guided_diffusion.errors import UserError
from guided_diffusion.nn import GroupNorm32
from guided_diffusion.script_util import (
    create_classifier,
    create_model,
    create_model_and_diffusion,
    sr_create_model_and_diffusion,
)
from guided_diffusion.unet import POOLS, EncoderUNetModel, UNetModel, Upsample

FORMATS = ("contiguous", "channels_last")
HALF = {"use_fp16": torch.float16, "use_bf16": torch.bfloat16}


RELEASED = released_checkpoints()


def create(kind, flags):
    if kind == "classifier":
        return create_classifier(**flags)
    return (sr_create_model_and_diffusion if kind == "upsampler" else create_model_and_diffusion)(**flags)[0]


def example(model, seed=0, size=(16, 16), batch=2):
    """Arguments of one evaluation of a tiny network."""
    x = torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(seed))
    t = torch.arange(batch) * 400 + 20
    labels = [torch.arange(batch) % 2] if getattr(model, "num_classes", None) else []
    return [x, t, *labels]


# Released checkpoints


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_are_those_of_the_released_checkpoint(name):
    entry = RELEASED[name]
    with torch.device("meta"):
        model = create(entry["kind"], entry["flags"])
        state = {key: torch.empty(shape) for key, shape in entry["state"].items()}
    model.load_state_dict(state, strict=True)      # refuses other names and other shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["parameters"]


# Golden cases


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("path", cases("unet_*.npz"), ids=lambda path: path.stem)
def test_outputs_and_received_attention_agree_with_the_official_code(path, memory_format):
    case = np.load(path)
    model = fill(create_model_and_diffusion(**json.loads(str(case["config"])))[0])
    if memory_format == "channels_last":
        model.channels_last()
    x = noise((2, 3, model.image_size, model.image_size), int(case["seed"]))
    labels = [torch.from_numpy(case["y"])] if "y" in case else []
    with torch.no_grad(), capture_attention(model, model.attention_blocks) as captured:
        out = model(x, torch.from_numpy(case["t"]), *labels)
    assert out.dtype == torch.float32 and out.is_contiguous()
    assert relative_error(out.numpy(), case["out"]) < 1e-4
    blocks = [key.removeprefix("received/") for key in case if key.startswith("received/")]
    assert list(model.attention_blocks) == blocks
    for name in blocks:
        got = captured[name]
        assert math.prod(got.grid) == got.received.shape[1]
        assert got.grid == model.attention_blocks[name].grid
        assert relative_error(got.received.numpy(), case[f"received/{name}"]) < 1e-4


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("path", cases("classifier_*.npz"), ids=lambda path: path.stem)
def test_logits_and_input_gradients_agree_with_the_official_code(path, memory_format):
    case = np.load(path)
    model = fill(create_classifier(**json.loads(str(case["config"]))), "classifier.").requires_grad_(False)
    if memory_format == "channels_last":
        model.channels_last()
    x = noise((2, 3, model.image_size, model.image_size), int(case["seed"])).requires_grad_()
    logits = model(x, torch.from_numpy(case["t"]))
    chosen = F.log_softmax(logits, dim=-1)[range(2), torch.from_numpy(case["y"])]
    (grad,) = torch.autograd.grad(chosen.sum(), x)
    assert relative_error(logits.detach().numpy(), case["logits"]) < 1e-4
    assert relative_error(grad.numpy(), case["grad"]) < 1e-4


# Attention blocks


def test_blocks_know_their_heads_order_and_grid(tiny_flags):
    flags = tiny_flags | {"image_size": 32, "channel_mult": "1,2,3", "attention_resolutions": "16,8",
                          "num_res_blocks": 2, "num_heads": 2, "num_heads_upsample": 4}
    blocks = create_model(**flags).attention_blocks
    expected = {"input.4": 16, "input.5": 16, "input.7": 8, "input.8": 8, "middle": 8,
                "output.0": 8, "output.1": 8, "output.2": 8, "output.3": 16, "output.4": 16, "output.5": 16}
    assert {name: block.grid for name, block in blocks.items()} == {n: (s, s) for n, s in expected.items()}
    assert all(isinstance(block, AttentionBlock) and not block.new_order for block in blocks.values())
    assert all(block.num_heads == (4 if name.startswith("output") else 2) for name, block in blocks.items())

    flags |= {"num_head_channels": 32, "use_new_attention_order": True}
    blocks = create_model(**flags).attention_blocks
    assert all(block.new_order for block in blocks.values())
    assert blocks["input.4"].num_heads == 2 and blocks["middle"].num_heads == 3


def test_a_network_without_attention_resolutions_has_attention_in_the_middle(tiny_flags):
    assert list(create_model(**tiny_flags | {"attention_resolutions": ""}).attention_blocks) == ["middle"]


def test_classifiers_have_attention_blocks_too(tiny_classifier_flags):
    blocks = create_classifier(**tiny_classifier_flags).attention_blocks
    assert {name: (block.num_heads, block.grid) for name, block in blocks.items()} == {
        "input.3": (2, (8, 8)), "middle": (2, (8, 8))}


# Sizes


def test_images_need_not_be_square(tiny_flags):
    """The transposed image, by the network with transposed kernels, gives the transposed output."""
    model = with_random_weights(create_model(**tiny_flags))
    turned = create_model(**tiny_flags)
    turned.load_state_dict({name: w.transpose(2, 3) if w.ndim == 4 else w for name, w in model.state_dict().items()})
    x, t, y = example(model, size=(8, 24))
    with torch.no_grad(), capture_attention(model, ["middle"]) as captured:
        out = model(x, t, y)
        received, grid = captured["middle"].received, captured["middle"].grid
    with torch.no_grad(), capture_attention(turned.eval(), ["middle"]) as captured:
        out_turned = turned(x.transpose(2, 3), t, y)
    assert out.shape == (2, 2, 8, 24) and grid == (4, 12) and captured["middle"].grid == (12, 4)
    torch.testing.assert_close(out_turned.transpose(2, 3), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(captured["middle"].received.unflatten(1, (12, 4)).transpose(1, 2).flatten(1), received,
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 15), (13, 16)])
def test_sizes_that_the_levels_do_not_divide_are_refused(tiny_flags, tiny_classifier_flags, size):
    for model in (create_model(**tiny_flags), create_classifier(**tiny_classifier_flags)):
        with pytest.raises(UserError, match=f"image size {size[0]}x{size[1]}: .* multiples of 2"):
            model(*example(model, size=size))


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 16, 16)])
def test_inputs_of_another_shape_are_refused(tiny_flags, tiny_classifier_flags, shape):
    for model in (create_model(**tiny_flags), create_classifier(**tiny_classifier_flags)):
        _, t, *labels = example(model)
        with pytest.raises(UserError, match=rf"^an input of the shape {re.escape(str(shape))}: must be \(N, 1, H, W\)"):
            model(torch.zeros(shape), t, *labels)


@pytest.mark.parametrize("labels", [[1], [1, 1, 1], [[1], [1]]])
def test_labels_are_one_an_image(tiny_flags, labels):
    model = create_model(**tiny_flags)
    x, t, _ = example(model)
    with pytest.raises(UserError, match=r"^y: labels of the shape .*, must be \(2,\), one an image$"):
        model(x, t, torch.tensor(labels))


def test_labels_are_needed_just_where_the_network_is_class_conditional(tiny_flags):
    model = create_model(**tiny_flags)
    x, t, y = example(model)
    with pytest.raises(UserError, match="labels y are needed"):
        model(x, t)
    with pytest.raises(UserError, match="takes no labels"):
        create_model(**tiny_flags | {"class_cond": False})(x, t, y)


# Classifiers and the upsampler


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_gives_logits_and_gradients(tiny_classifier_flags, pool):
    model = with_random_weights(create_classifier(**tiny_classifier_flags | {"classifier_pool": pool}))
    x, t = example(model)
    logits = model(x.requires_grad_(), t)
    assert logits.shape == (2, 2) and logits.dtype == torch.float32
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert x.grad.isfinite().all() and x.grad.flatten(1).any(dim=1).all()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_an_unknown_pool_is_refused(tiny_classifier_flags):
    with pytest.raises(UserError, match="--classifier_pool max: must be one of adaptive, attention"):
        create_classifier(**tiny_classifier_flags | {"classifier_pool": "max"})
    with pytest.raises(UserError, match="pool 'max': must be one of adaptive, attention"):
        EncoderUNetModel(16, 1, 32, 2, 1, (), channel_mult=(1,), pool="max")


def test_an_attention_pool_needs_the_width_of_its_heads():
    with pytest.raises(UserError, match="num_head_channels -1: must divide the 32 pooled channels"):
        EncoderUNetModel(16, 1, 32, 2, 1, (), channel_mult=(1,), pool="attention")


def test_the_upsampler_uses_the_low_resolution_image(tiny_flags):
    del tiny_flags["image_size"]
    model, _ = sr_create_model_and_diffusion(**tiny_flags, large_size=16, small_size=8)
    with_random_weights(model)
    x, t, y = example(model)
    low_res, other = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).unbind()
    with torch.no_grad():
        out = model(x, t, low_res, y)
        assert out.shape == (2, 2, 16, 16)
        assert relative_error(model(x, t, low_res=other, y=y), out) > 0.01
        # An image of one value is that value at any size.
        flat = [model(x, t, low_res=torch.full((2, 1, size, size), 0.5), y=y) for size in (8, 4)]
    torch.testing.assert_close(*flat)
    for shape in ((1, 1, 8, 8), (2, 3, 8, 8), (1, 8, 8)):
        with pytest.raises(UserError, match=r"^low_res: has the shape .*, must be \(2, 1, h, w\)$"):
            model(x, t, torch.zeros(shape), y)
    with pytest.raises(UserError, match="needs the low-resolution images low_res"):
        model(x, t, y=y)


# Half precision


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("flag", "tolerance"), [("use_fp16", 3e-3), ("use_bf16", 2.5e-2)])
def test_half_precision_is_close_to_float32_and_keeps_the_sensitive_parts_in_float32(
        tiny_flags, flag, tolerance, memory_format):
    exact = with_random_weights(create_model(**tiny_flags))
    model = create_model(**tiny_flags | {flag: True}).eval()
    model.load_state_dict(exact.state_dict())
    if memory_format == "channels_last":
        model.channels_last()
    x, t, y = example(model)
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: (inputs[0], out.clone())}))
    with torch.no_grad():
        out = model(x, t, y)
        expected = exact(x, t, y)
    assert out.dtype == torch.float32
    assert 0 < relative_error(out, expected) < tolerance

    half = HALF[flag]
    assert all(m.weight.dtype == torch.float32 for m in model.modules() if isinstance(m, GroupNorm32))
    convolutions = [name for name, p in model.named_parameters() if p.dtype == half]
    assert {name.split(".")[0] for name in convolutions} == {"input_blocks", "middle_block", "output_blocks"}
    assert seen["middle_block"][1].dtype == half
    assert seen["time_embed"][1].dtype == seen["out"][0].dtype == seen["out.2"][1].dtype == torch.float32
    # The norm rounds its float32 result once.
    values, normed = seen["middle_block.0.in_layers.0"]
    norm = model.get_submodule("middle_block.0.in_layers.0")
    reference = F.group_norm(values.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    torch.testing.assert_close(normed.double(), reference, rtol=torch.finfo(half).eps, atol=1e-6)


@pytest.mark.parametrize("size", [(4, 6), (1, 2), (32, 40)])
def test_upsampling_in_channels_last_is_the_same_convolution(size):
    layer = Upsample(5, True).requires_grad_(False)
    x = torch.randn(2, 5, *size)
    fast, plain = layer(x.contiguous(memory_format=torch.channels_last)), layer(x)
    assert fast.shape == plain.shape
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_classifiers_in_half_precision(tiny_classifier_flags, pool):
    flags = tiny_classifier_flags | {"classifier_pool": pool}
    exact = with_random_weights(create_classifier(**flags))
    model = create_classifier(**flags | {"classifier_use_fp16": True}).eval()
    model.load_state_dict(exact.state_dict())
    x, t = example(model)
    logits, grads = [], []
    for network in (exact, model):
        image = x.clone().requires_grad_()
        logits.append(network(image, t))
        (grad,) = torch.autograd.grad(F.log_softmax(logits[-1], dim=-1)[:, 0].sum(), image)
        grads.append(grad)
    assert logits[1].dtype == grads[1].dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.out.parameters())
    assert 0 < relative_error(logits[1].detach(), logits[0].detach()) < 5e-3
    # The ReLU of the spatial pool is on or off by a rounding in some units, and each of them is a jump of the gradient.
    assert relative_error(grads[1], grads[0]) < (1e-1 if pool == "spatial" else 1e-2)


@pytest.mark.parametrize("dtype", HALF.values(), ids=str)
def test_conversion_to_half_precision_can_be_undone(tiny_flags, dtype):
    model = with_random_weights(create_model(**tiny_flags))
    arguments = example(model)
    with torch.no_grad():
        expected = model(*arguments)
        model.convert_to(dtype).convert_to_fp32()
        assert all(p.dtype == torch.float32 for p in model.parameters())
        out = model(*arguments)
    assert 0 < relative_error(out, expected) < 4 * torch.finfo(dtype).eps       # the weights were rounded


def test_fp16_by_name(tiny_flags):
    model = create_model(**tiny_flags)
    assert model.convert_to_fp16() is model and model.dtype == torch.float16
    assert model.middle_block[1].qkv.weight.dtype == torch.float16
    assert UNetModel(16, 1, 32, 1, 1, (), channel_mult=(1,), use_fp16=True).dtype == torch.float16


# Gradient checkpointing


def gradients(model, arguments, seed=0):
    """Gradients of a loss with respect to x and to every weight that has one, in training mode."""
    torch.manual_seed(seed)
    x = arguments[0].clone().requires_grad_()
    model.zero_grad()
    model.train()(x, *arguments[1:]).square().mean().backward()
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"use_bf16": True}, {"resblock_updown": False}],
                         ids=["plain", "dropout", "bf16", "convolutions"])
def test_checkpointing_changes_no_gradient(tiny_flags, changes, frozen):
    flags = tiny_flags | changes
    plain = with_random_weights(create_model(**flags))
    saving = create_model(**flags, use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    arguments = example(plain)
    plain.requires_grad_(not frozen)
    saving.requires_grad_(not frozen)
    expected, got = gradients(plain, arguments), gradients(saving, arguments)
    assert expected.keys() == got.keys()
    assert len(expected) == (1 if frozen else 1 + len(list(plain.parameters())))
    assert expected["x"].any()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=0, msg=name)


def test_dropout_is_drawn_in_training_only(tiny_flags):
    model = with_random_weights(create_model(**tiny_flags | {"dropout": 0.3}))
    arguments = example(model)
    assert not torch.equal(gradients(model, arguments, seed=0)["x"], gradients(model, arguments, seed=1)["x"])
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(*arguments), model(*arguments))


def test_checkpointing_keeps_fewer_activations(tiny_flags):
    kept = []
    for use_checkpoint in (False, True):
        model = create_model(**tiny_flags, use_checkpoint=use_checkpoint)
        own = {p.data_ptr() for p in model.parameters()}
        sizes = []

        def count(tensor, own=own, sizes=sizes):
            if tensor.data_ptr() not in own:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(*example(model))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


def test_checkpointing_of_a_classifier_changes_no_gradient(tiny_classifier_flags):
    options = dict(image_size=16, in_channels=1, model_channels=32, out_channels=2, num_res_blocks=1,
                   attention_resolutions=(2,), channel_mult=(1, 2), pool="spatial")
    plain = with_random_weights(EncoderUNetModel(**options))
    saving = EncoderUNetModel(**options, use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    arguments = example(plain)
    expected = gradients(plain, arguments)
    for name, grad in gradients(saving, arguments).items():
        assert torch.equal(grad, expected[name]), name


# Memory format and images by themselves


def test_channels_last_changes_the_layout_and_nothing_else(tiny_flags):
    model = with_random_weights(create_model(**tiny_flags))
    arguments = example(model)
    maps = []
    model.middle_block.register_forward_hook(lambda module, inputs, out: maps.append(out))
    with torch.no_grad():
        expected = model(*arguments)
        assert model.channels_last() is model
        out = model(*arguments)
    assert maps[1].is_contiguous(memory_format=torch.channels_last) and not maps[1].is_contiguous()
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_an_image_does_not_see_the_others_of_its_batch(tiny_flags):
    model = with_random_weights(create_model(**tiny_flags))
    x, t, y = example(model, batch=3)
    with torch.no_grad():
        together = model(x, t, y)
        alone = torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_an_untrained_network_predicts_zero(tiny_flags, tiny_classifier_flags):
    tiny_classifier_flags["classifier_pool"] = "adaptive"
    for model in (create_model(**tiny_flags), create_classifier(**tiny_classifier_flags)):
        assert not model(*example(model)).any()
