"""Attention blocks, the attention that tokens receive, and what is captured and overridden in a network."""

import json
import math

import pytest
import torch
from golden import relative_error
from networks import with_random_weights
from torch.profiler import ProfilerActivity, profile

from guided_diffusion.attention import AttentionBlock, attention, merge_heads, received_attention, split_heads
from guided_diffusion.capture import capture_attention, capture_features, override_attention
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import create_model

BLOCKS = ["input.3", "middle", "output.0", "output.1"]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def explicit_map(q, k):
    """The whole attention map, (N, heads, T, T)."""
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1)


def explicit_received(q, k):
    return explicit_map(q, k).sum(dim=2).mean(dim=1)


def split_by_hand(qkv, num_heads, new_order):
    """Queries, keys and values (N, heads, T, d) of (N, T, 3C), channel by channel as the two orders are defined."""
    width = qkv.shape[2] // 3 // num_heads

    def part(index):
        return torch.stack([
            qkv[:, :, start:start + width] for head in range(num_heads)
            for start in [(index * num_heads + head if new_order else 3 * head + index) * width]], dim=1)
    return part(0), part(1), part(2)


# Heads and the block


@pytest.mark.parametrize("new_order", [False, True], ids=["legacy", "new"])
def test_channels_are_split_into_queries_keys_and_values(new_order):
    qkv = randn(2, 5, 24)
    for got, expected in zip(split_heads(qkv, 4, new_order), split_by_hand(qkv, 4, new_order), strict=True):
        assert torch.equal(got, expected)


def test_merging_undoes_splitting():
    values = randn(2, 4, 5, 3)
    merged = merge_heads(values)
    assert merged.shape == (2, 5, 12)
    assert torch.equal(merged[0, 1, 3:6], values[0, 1, 1])


@pytest.mark.parametrize("new_order", [False, True], ids=["legacy", "new"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_block_is_softmax_attention_with_a_residual(new_order, memory_format):
    block = with_random_weights(AttentionBlock(64, num_heads=4, new_order=new_order))
    x = randn(2, 64, 3, 5)
    tokens = block.norm(x).flatten(2).transpose(1, 2)
    q, k, v = split_by_hand(tokens @ block.qkv.weight[:, :, 0].T + block.qkv.bias, 4, new_order)
    attended = (explicit_map(q, k) @ v).transpose(1, 2).reshape(2, 15, 64)
    projected = attended @ block.proj_out.weight[:, :, 0].T + block.proj_out.bias
    out = block(x.to(memory_format=memory_format))
    torch.testing.assert_close(out, x + projected.transpose(1, 2).reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_an_untrained_block_is_the_identity():
    x = randn(2, 32, 4, 4)
    assert torch.equal(AttentionBlock(32)(x), x)


@pytest.mark.parametrize(("options", "heads"), [
    ({}, 1), ({"num_heads": 4}, 4), ({"num_heads": 4, "num_head_channels": 32}, 2)])
def test_heads_of_a_block(options, heads):
    assert AttentionBlock(64, **options).num_heads == heads


@pytest.mark.parametrize(("options", "named"), [
    ({"num_heads": 3}, "num_heads 3"), ({"num_heads": 5}, "num_heads 5"), ({"num_heads": 15}, "num_heads 15"),
    ({"num_heads": 128}, "num_heads 128"), ({"num_heads": 0}, "num_heads 0"),
    ({"num_head_channels": 48}, "num_head_channels 48"), ({"num_head_channels": 0}, "num_head_channels 0")])
def test_heads_that_do_not_divide_the_channels_are_refused(options, named):
    with pytest.raises(UserError, match=f"--{named}: must divide the 64 channels"):
        AttentionBlock(64, **options)


@pytest.mark.parametrize("tokens", [1024, 1088], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_sums_in_float32(dtype, tokens):
    """In half precision a sum of this many equal weights would stall."""
    q, k, v = torch.zeros(1, 2, 3, tokens, 16, dtype=dtype).unbind(2)
    out = attention(q, k, v + 1)
    assert out.dtype == dtype
    torch.testing.assert_close(out, torch.ones_like(out), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_attention_in_half_precision(dtype, tolerance):
    q, k, v = randn(3, 1, 2, 64, 32, dtype=dtype)
    expected = explicit_map(q.double(), k.double()) @ v.double()
    assert relative_error(attention(q, k, v).double(), expected) < tolerance


# Received attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 8), (60, 3, 16), (1024, 4, 32), (1500, 2, 8)])
def test_received_attention_equals_the_whole_map_summed_over_queries(tokens, heads, width, dtype):
    q, k, _ = split_heads(2 * randn(2, tokens, 3 * heads * width, dtype=dtype), heads)
    received = received_attention(q, k)
    assert received.shape == (2, tokens) and received.dtype == torch.float32
    torch.testing.assert_close(received.double(), explicit_received(q.double(), k.double()), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(received.mean(dim=1), torch.ones(2))


@pytest.mark.parametrize("tokens", [60, 1024])
def test_the_gradient_of_received_attention_is_that_of_the_whole_map(tokens):
    qkv = randn(1, tokens, 3 * 2 * 16).requires_grad_()
    weights = randn(1, tokens, seed=1)
    q, k, _ = split_heads(qkv, 2)
    (expected,) = torch.autograd.grad((explicit_received(q, k) * weights).sum(), qkv)
    q, k, _ = split_heads(qkv, 2)
    (got,) = torch.autograd.grad((received_attention(q, k) * weights).sum(), qkv)
    assert relative_error(got, expected) < 1e-5


def peak_memory(function, tmp_path):
    """The largest number of bytes that are allocated at once while `function` runs, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    trace = tmp_path / "trace.json"
    profiled.export_chrome_trace(str(trace))
    del result
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "heads", "width"), [(1, 4, 64), (2, 4, 128), (2, 8, 64)])
@pytest.mark.parametrize("graph", [False, True], ids=["detached", "graph"])
def test_received_attention_needs_a_quarter_of_the_whole_map_at_most(batch, heads, width, dtype, graph, tmp_path):
    qkv = randn(batch, 1024, 3 * heads * width, dtype=dtype).requires_grad_(graph)
    q, k, _ = split_heads(qkv, heads)
    whole = batch * heads * 1024 * 1024 * 4
    assert peak_memory(lambda: received_attention(q, k), tmp_path) < whole / 4


def test_capture_in_a_block_needs_a_quarter_of_the_whole_map_at_most(tmp_path):
    block = with_random_weights(AttentionBlock(256, num_heads=4))
    x = randn(2, 256, 32, 32)
    whole = 2 * 4 * 1024 * 1024 * 4

    @torch.no_grad()
    def evaluate():
        return block(x)

    plain = peak_memory(evaluate, tmp_path)
    with capture_attention(Blocks(block), ["middle"]):
        assert plain < peak_memory(evaluate, tmp_path) < plain + whole / 4
    # What is measured is what it should be: the whole map shows.
    with override_attention(Blocks(block), ["middle"], lambda q, k, v: explicit_map(q, k) @ v):
        assert peak_memory(evaluate, tmp_path) > plain + whole


class Blocks:
    """A network that is one attention block."""

    def __init__(self, block):
        self.attention_blocks = {"middle": block}


# Capture


@pytest.fixture
def model(tiny_flags):
    return with_random_weights(create_model(**tiny_flags))


@pytest.fixture
def arguments():
    return randn(2, 1, 16, 16), torch.tensor([20, 700]), torch.tensor([0, 1])


def qkv_inputs(model, name):
    """A list to which every evaluation of that attention block appends its normed input, (N, T, C)."""
    inputs = []
    block = model.attention_blocks[name]
    block.norm.register_forward_hook(lambda _, __, normed: inputs.append(normed.flatten(2).transpose(1, 2)))
    return inputs


@pytest.mark.parametrize("order", [False, True], ids=["legacy", "new"])
@pytest.mark.parametrize("heads", ["exact", "official"])
def test_captured_attention_is_that_of_the_blocks_own_projection(tiny_flags, arguments, order, heads):
    """With two kinds of heads: 4 of the flag, and 16 channels each that the block really has."""
    flags = tiny_flags | {"num_heads": 4, "num_head_channels": 16, "use_new_attention_order": order}
    model = with_random_weights(create_model(**flags))
    tokens = qkv_inputs(model, "output.1")
    with torch.no_grad(), capture_attention(model, ["output.1"], heads=heads) as captured:
        model(*arguments)
    block = model.attention_blocks["output.1"]
    assert block.num_heads == 2
    split = (2, order) if heads == "exact" else (4, False)
    qkv = tokens[0] @ block.qkv.weight[:, :, 0].T + block.qkv.bias
    q, k, _ = split_by_hand(qkv, *split)
    assert captured["output.1"].grid == (8, 8)
    torch.testing.assert_close(captured["output.1"].received, explicit_received(q, k), rtol=1e-4, atol=1e-5)


def test_capture_changes_no_output_and_leaves_no_trace(model, arguments):
    with torch.no_grad():
        expected = model(*arguments)
        with capture_attention(model, BLOCKS) as attention_seen, capture_features(model, ["output.2"]) as features:
            assert torch.equal(model(*arguments), expected)
        assert list(attention_seen) == BLOCKS and list(features) == ["output.2"]
        seen, kept = attention_seen["middle"], features["output.2"]
        assert torch.equal(model(*arguments), expected)
    assert attention_seen["middle"] is seen and features["output.2"] is kept
    assert not any(block.observers for block in model.attention_blocks.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_capture_holds_the_last_evaluation(model, arguments):
    x, t, y = arguments
    with torch.no_grad(), capture_attention(model, ["middle"]) as captured:
        assert not captured
        model(x, t, y)
        first = captured["middle"].received
        model(x + 1, t, y)
        assert not torch.equal(captured["middle"].received, first)


def test_capture_without_a_graph_is_detached_also_where_gradients_are_computed(model, arguments):
    x, t, y = arguments
    with capture_attention(model, BLOCKS) as captured, capture_features(model, ["output.2"]) as features:
        out = model(x.requires_grad_(), t, y)
    assert out.requires_grad
    assert not any(seen.received.requires_grad for seen in captured.values())
    assert not features["output.2"].requires_grad
    out.sum().backward()
    assert x.grad.any()


def test_capture_with_a_graph_makes_none_where_gradients_are_off(model, arguments):
    with torch.no_grad(), capture_attention(model, ["middle"], graph=True) as captured:
        model(*arguments)
    assert not captured["middle"].received.requires_grad


def explicit_gradient(model, arguments, name, weights):
    """Gradient at x of the weighted received attention, by autograd through the whole map."""
    tokens = qkv_inputs(model, name)
    x = arguments[0].clone().requires_grad_()
    model(x, *arguments[1:])
    block = model.attention_blocks[name]
    q, k, _ = split_by_hand(tokens[0] @ block.qkv.weight[:, :, 0].T + block.qkv.bias, block.num_heads, block.new_order)
    return torch.autograd.grad((explicit_received(q, k) * weights).sum(), x)[0]


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["input.3", "output.1"])
def test_the_gradient_reaches_x_through_captured_attention(tiny_flags, arguments, name, use_checkpoint):
    model = with_random_weights(create_model(**tiny_flags, use_checkpoint=use_checkpoint)).requires_grad_(False)
    weights = randn(2, 64, seed=5)
    x = arguments[0].clone().requires_grad_()
    with capture_attention(model, [name], graph=True) as captured:
        model(x, *arguments[1:])
    (got,) = torch.autograd.grad((captured[name].received * weights).sum(), x)
    assert got.any()
    assert relative_error(got, explicit_gradient(model, arguments, name, weights)) < 1e-4


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpointing"])
def test_the_gradient_reaches_x_through_captured_features(tiny_flags, arguments, use_checkpoint):
    """Against finite differences along the gradient."""
    model = with_random_weights(create_model(**tiny_flags, use_checkpoint=use_checkpoint)).requires_grad_(False)
    shapes = {"output.0": (2, 32, 8, 8), "output.1": (2, 32, 16, 16), "output.3": (2, 32, 16, 16)}
    weights = {name: randn(*shape) for name, shape in shapes.items()}

    def loss(x):
        with capture_features(model, shapes, graph=True) as features:
            model(x, *arguments[1:])
        assert {name: tuple(feature.shape) for name, feature in features.items()} == shapes
        return sum((feature * weights[name]).mean() for name, feature in features.items())

    x = arguments[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x)
    step = 0.05 * grad / grad.norm()
    with torch.no_grad():
        difference = loss(x + step) - loss(x - step)
    assert difference == pytest.approx(2 * 0.05 * grad.norm().item(), rel=1e-2)


def test_features_of_every_block_can_be_captured(model, arguments):
    names = list(model.feature_blocks)
    assert names == [*(f"input.{i}" for i in range(4)), "middle", *(f"output.{i}" for i in range(4))]
    with torch.no_grad(), capture_features(model, names) as features:
        out = model(*arguments)
        torch.testing.assert_close(model.out(features["output.3"]), out)
    assert list(features) == names


def test_captures_nest(model, arguments):
    with torch.no_grad(), capture_attention(model, ["middle", "output.0"]) as outer:
        with capture_attention(model, ["middle"], heads="official") as inner:
            model(*arguments)
        assert torch.equal(outer["middle"].received, inner["middle"].received)     # the heads agree in this model
        assert list(inner) == ["middle"]
        before = inner["middle"]
        model(arguments[0] + 1, *arguments[1:])
        assert inner["middle"] is before
        assert not torch.equal(outer["middle"].received, before.received)


def test_names_may_come_from_an_iterator(model, arguments):
    with (torch.no_grad(), capture_attention(model, iter(["middle"])) as captured,
          capture_features(model, iter(["middle"])) as features):
        model(*arguments)
    assert list(captured) == list(features) == ["middle"]


def test_capture_and_override_end_with_an_exception(model, arguments):
    with torch.no_grad():
        expected = model(*arguments)
        with pytest.raises(RuntimeError, match="stop"), capture_attention(model, BLOCKS), \
                capture_features(model, ["middle"]), override_attention(model, BLOCKS, lambda q, k, v: v):
            raise RuntimeError("stop")
        assert torch.equal(model(*arguments), expected)
    assert not any(block.observers or block.override for block in model.attention_blocks.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_block_is_told_the_blocks_there_are(model):
    listed = "there are: input.3, middle, output.0, output.1"
    for capture in (capture_attention(model, ["output.2"]), capture_attention(model, ["middle", "output.8"]),
                    override_attention(model, ["output.2"], lambda q, k, v: v)):
        with pytest.raises(UserError, match=f"'output.[28]' is no attention block .*{listed}"), capture:
            pass
    with (pytest.raises(UserError, match=r"'output.4' is no block .*there are: input\.0, .*, middle, .*output\.3$"),
          capture_features(model, ["output.4"])):
        pass
    assert not any(block.observers or block.override for block in model.attention_blocks.values())


def test_unknown_heads_are_refused(model):
    with pytest.raises(UserError, match="heads 'most': must be one of exact, official"), \
            capture_attention(model, ["middle"], heads="most"):
        pass


def test_official_heads_must_divide_the_channels(tiny_flags):
    model = create_model(**tiny_flags | {"num_heads": 5, "num_head_channels": 32})
    with pytest.raises(UserError, match="--num_heads 5: must divide the 32 channels of 'middle'"), \
            capture_attention(model, ["middle"], heads="official"):
        pass


# Override


def test_an_override_replaces_the_attention_of_the_named_blocks_only(model, arguments):
    """The identity attention of a block: each token gets its own value, projected."""
    with torch.no_grad(), capture_features(model, ["input.3", "middle"]) as features:
        expected = model(*arguments)
        before = dict(features)
        with override_attention(model, ["middle"], lambda q, k, v: v):
            assert relative_error(model(*arguments), expected) > 1e-3
        assert torch.equal(features["input.3"], before["input.3"])
        assert not torch.equal(features["middle"], before["middle"])
        assert torch.equal(model(*arguments), expected)

        block = model.attention_blocks["middle"]
        x = randn(1, 32, 8, 8)
        with override_attention(model, ["middle"], lambda q, k, v: v):
            out = block(x)
        tokens = block.norm(x).flatten(2).transpose(1, 2)
        _, _, v = split_by_hand(tokens @ block.qkv.weight[:, :, 0].T + block.qkv.bias, block.num_heads, False)
        projected = merge_heads(v) @ block.proj_out.weight[:, :, 0].T + block.proj_out.bias
        torch.testing.assert_close(out, x + projected.transpose(1, 2).reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_an_inner_override_goes_before_the_outer_one(model, arguments):
    with torch.no_grad(), override_attention(model, ["middle"], lambda q, k, v: v):
        identity = model(*arguments)
        with override_attention(model, ["middle"], lambda q, k, v: 2 * v):
            assert not torch.equal(model(*arguments), identity)
        assert torch.equal(model(*arguments), identity)


def test_attention_is_captured_also_where_it_is_overridden(model, arguments):
    with torch.no_grad(), capture_attention(model, ["input.3"]) as captured:
        model(*arguments)
        expected = captured["input.3"].received
        with override_attention(model, ["input.3"], lambda q, k, v: v):
            model(*arguments)
        assert torch.equal(captured["input.3"].received, expected)


def test_checkpointing_computes_again_what_was_computed(tiny_flags, arguments):
    """An override or a capture in the backward pass is none of the evaluation before it."""
    gradients = []
    for late in (False, True):
        model = with_random_weights(create_model(**tiny_flags, use_checkpoint=True))
        x = arguments[0].clone().requires_grad_()
        loss = model(x, *arguments[1:]).sum()
        if late:
            with override_attention(model, BLOCKS, lambda q, k, v: v), capture_attention(model, BLOCKS) as captured:
                loss.backward()
            assert not captured
        else:
            loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
