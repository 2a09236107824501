"""What guidance saves without changing a bit: shared beginnings, shared evaluations, graphs that end early."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from networks import TINY, TINY_CLASSIFIER, with_random_weights
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import attention, capture
from guided_diffusion.depth.predictor import DepthPredictors
from guided_diffusion.errors import UserError
from guided_diffusion.guidance import (
    ClassifierGuidance,
    ContrastGuidance,
    DepthConsistencyGuidance,
    DepthPriorGuidance,
    Inputs,
    LossGuidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    depth,
)
from guided_diffusion.guidance import perturbed_attention as pag
from guided_diffusion.process import Denoiser
from guided_diffusion.sampling import ddim_step, ddpm_step, sample_step
from guided_diffusion.script_util import (
    create_classifier,
    create_gaussian_diffusion,
    create_model_and_diffusion,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)

SHAPES = {
    "residual blocks resample": {},
    "convolutions resample": {"resblock_updown": False, "use_scale_shift_norm": False},
    "three levels without classes": {"channel_mult": "1,1,1", "num_res_blocks": 2, "attention_resolutions": "8,4",
                                     "class_cond": False, "num_head_channels": 16, "use_new_attention_order": True},
    "attention at all levels": {"attention_resolutions": "16,8", "use_checkpoint": True},
    "float16": {"use_fp16": True},
    "bfloat16": {"use_bf16": True},
}
COUNT = 3           # images


def identity(q, k, v):
    return v


def build(**flags):
    """A network, its process and one step of three images."""
    model, diffusion = create_model_and_diffusion(**{**TINY, "timestep_respacing": "10", **flags})
    with_random_weights(model, seed=1).requires_grad_(False)
    model.convert_to(model.dtype)
    x, noise = torch.randn(2, COUNT, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    kwargs = {"y": torch.tensor([1, 0, 1])} if model.num_classes else {}
    return SimpleNamespace(model=model, diffusion=diffusion, x=x, noise=noise, t=torch.full((COUNT,), 4), kwargs=kwargs)


def depth_terms(case):
    """Depth consistency and depth prior guidance, as `DagOptions` builds them."""
    predictors = DepthPredictors({"strong": {"output.0": 32, "output.2": 32}, "weak": {"output.0": 32}}, 16, "", "")
    with_random_weights(predictors, seed=4).requires_grad_(False)
    prior_model = with_random_weights(torch.nn.Conv2d(1, 1, 3, padding=1), seed=5).requires_grad_(False)
    prior = SimpleNamespace(image_size=8, diffusion=create_gaussian_diffusion(), eps=lambda x, tau: prior_model(x))
    return (DepthConsistencyGuidance(case.model, predictors, 40.0),
            DepthPriorGuidance(case.model, predictors, prior, 40.0))


@pytest.fixture(scope="module")
def case():
    return build()


@torch.no_grad()
def step(case, guidance, model=None, t=None, **denoiser):
    denoise = Denoiser(case.diffusion, model or case.model, model_kwargs=case.kwargs, **denoiser)
    return sample_step(ddpm_step, denoise, case.x, case.t if t is None else t, lambda: case.noise, guidance)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def from_the_beginning(monkeypatch):
    """Lets PAG evaluate the network from its beginning."""
    monkeypatch.setattr(pag, "capture_prefix", lambda model, block: nullcontext(()))


# A prefix and the rest are the whole


@pytest.mark.parametrize("flags", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_from_any_attention_on_an_evaluation_is_bit_for_bit_the_whole_one(flags):
    case = build(**flags)
    inputs = torch.randn(COUNT, 1, 16, 24, generator=torch.Generator().manual_seed(2)), case.t
    for network in (case.model, case.model.channels_last())[:1 if case.model.dtype == torch.float16 else 2]:
        plain = network(*inputs, **case.kwargs)
        for name in network.attention_blocks:
            with capture.capture_prefix(network, name) as prefixes:
                assert torch.equal(network(*inputs, **case.kwargs), plain)
            assert torch.equal(network.resume(prefixes[0]), plain)
            with capture.override_attention(network, [name], identity):
                perturbed = network(*inputs, **case.kwargs)
                assert torch.equal(network.resume(prefixes[0]), perturbed)
            assert not torch.equal(perturbed, plain)


@torch.no_grad()
def test_an_upsampling_network_resumes_too():
    flags = {name: value for name, value in TINY.items() if name in sr_model_and_diffusion_defaults()}
    model, _ = sr_create_model_and_diffusion(**{**sr_model_and_diffusion_defaults(), **flags, "large_size": 16,
                                                "small_size": 8})
    with_random_weights(model)
    channels = model.in_channels // 2
    x, low, t, y = torch.randn(2, channels, 16, 16), torch.randn(2, channels, 8, 8), torch.tensor([3, 4]), \
        torch.tensor([0, 1])
    with capture.capture_prefix(model, "middle") as prefixes:
        plain = model(x, t, low_res=low, y=y)
    with capture.resume_from(model, prefixes), counted() as rest:
        assert torch.equal(model(x, t, low_res=low, y=y), plain)
    with capture.resume_from(model, prefixes), counted() as whole:
        assert not torch.equal(model(x, t, low_res=low + 1, y=y), plain)
    assert rest.get_total_flops() < whole.get_total_flops()


def counted():
    return FlopCounterMode(display=False)


@torch.no_grad()
def test_only_the_same_inputs_begin_at_a_prefix(case):
    with capture.capture_prefix(case.model, "middle") as prefixes:
        case.model(case.x, case.t, **case.kwargs)
    others = [(case.x + 1, case.t, case.kwargs["y"]), (case.x, case.t + 1, case.kwargs["y"]),
              (case.x, case.t, 1 - case.kwargs["y"]), (case.x[:2], case.t[:2], case.kwargs["y"][:2])]
    for other in others:
        expected = case.model(*other)
        with capture.resume_from(case.model, prefixes):
            assert torch.equal(case.model(*other), expected)
    case.x[0] += 1          # a buffer that is filled anew is another input
    try:
        expected = case.model(case.x, case.t, **case.kwargs)
        with capture.resume_from(case.model, prefixes):
            assert torch.equal(case.model(case.x, case.t, **case.kwargs), expected)
    finally:
        case.x[0] -= 1
    assert not (case.model.prefixes or case.model.recorders)


@torch.no_grad()
def test_a_network_is_compiled_as_one_graph(case):
    compiled = torch.compile(case.model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(case.x, case.t, **case.kwargs), case.model(case.x, case.t, **case.kwargs))
    torch.compiler.reset()


@torch.no_grad()
def test_features_and_attention_of_a_resumed_evaluation_are_seen(case):
    with capture.capture_prefix(case.model, "middle") as prefixes:
        case.model(case.x, case.t, **case.kwargs)
    seen = []
    for evaluate in (lambda: case.model(case.x, case.t, **case.kwargs), lambda: case.model.resume(prefixes[0])):
        with (capture.override_attention(case.model, ["middle"], identity),
              capture.capture_features(case.model, ["middle", "output.2"]) as features,
              capture.capture_attention(case.model, ["output.0"]) as received,
              capture.capture_prefix(case.model, "output.1") as later):
            out = evaluate()
        assert torch.equal(case.model.resume(later[0]), out)
        seen.append({**features, "received": received["output.0"].received})
    assert_equal(*seen)


def test_a_prefix_holds_what_it_says_and_no_graph(case):
    with torch.enable_grad(), capture.capture_prefix(case.model, "output.0") as prefixes:
        case.model(case.x.clone().requires_grad_(), case.t, **case.kwargs)
    prefix, = prefixes
    # The map at 8x8, and the skips of input.2 (8x8), input.1 and input.0 (16x16), each of 32 channels.
    assert prefix.memory == COUNT * 4 * 32 * (2 * 64 + 2 * 256)
    assert not any(tensor.requires_grad for tensor in (prefix.h, prefix.emb, *prefix.skips, prefix.inputs[0]))
    with pytest.raises(UserError, match=r"'output\.9' is no attention block"), capture.capture_prefix(
            case.model, "output.9"):
        pass


# Perturbed attention


@pytest.mark.parametrize("name", ["residual blocks resample", "three levels without classes", "bfloat16"])
def test_perturbed_attention_changes_no_bit_by_beginning_later(name, monkeypatch):
    """Also where the step's own evaluation keeps a graph, and with terms of several blocks and closed windows."""
    flags = SHAPES[name]
    case = build(**flags)
    blocks = list(case.model.attention_blocks)
    several = [PerturbedAttentionGuidance(case.model, [blocks[-1], "middle"], 0.5),
               PerturbedAttentionGuidance(case.model, blocks[-1:], 0.3),
               PerturbedAttentionGuidance(case.model, blocks[:1], 0.3, start=2)]
    lists = [several[:1], several, [*several, SelfAttentionGuidance(case.model, "middle", 0.4, 2.0)]]
    if not flags:
        lists.append([*depth_terms(case), *several])
    here = [step(case, guidance) for guidance in lists]
    from_the_beginning(monkeypatch)
    for got, guidance in zip(here, lists, strict=True):
        assert_equal(got, step(case, guidance))


def test_perturbed_attention_computes_only_what_it_changes(case, monkeypatch):
    def operations(blocks, **window):
        with counted() as counter:
            step(case, [PerturbedAttentionGuidance(case.model, blocks, 0.5, **window)] if blocks else [])
        return counter.get_total_flops()

    plain, late, early = operations([]), operations(["output.1"]), operations(["output.1", "input.3"])
    assert plain < late < early < 2 * plain
    assert operations(["middle"], start=4) == operations(["middle"], sigma_max=0.001) == plain
    from_the_beginning(monkeypatch)
    assert operations(["output.1"]) > early


def test_only_an_open_window_records(case, monkeypatch):
    captured = []
    monkeypatch.setattr(pag, "capture_prefix", lambda model, block: captured.append(block) or capture.capture_prefix(
        model, block))
    terms = [PerturbedAttentionGuidance(case.model, ["middle"], 0.5, start=4),
             PerturbedAttentionGuidance(case.model, ["output.0"], 0.5, sigma_max=0.01),
             PerturbedAttentionGuidance(case.model, ["output.1", "output.0"], 0.5), ]
    step(case, terms)
    assert captured == ["output.0"]
    assert terms[2].passes.begins_at == ("output.1", "output.0")


def test_a_network_that_is_called_with_other_inputs_is_evaluated_from_its_beginning(case):
    """A wrapper that turns every second call's images over."""
    calls = []

    def turned(x, t, **kwargs):
        calls.append(1)
        return case.model(x.flip(3) if len(calls) % 2 == 0 else x, t, **kwargs)

    out = step(case, [PerturbedAttentionGuidance(case.model, ["middle"], 1.0)], turned)
    own = case.model(case.x, case.diffusion.model_timesteps(case.t), **case.kwargs)[:, :1]
    with capture.override_attention(case.model, ["middle"], identity):
        other = case.model(case.x.flip(3), case.diffusion.model_timesteps(case.t), **case.kwargs)[:, :1]
    assert torch.equal(out["eps"], own + 1.0 * (own - other))


# Shared evaluations


class OtherLabel(ContrastGuidance):
    """Guidance away from the other label, made anew by each term."""

    def weaker(self, ctx, pred):
        return Inputs(ctx.x_t, ctx.t, {"y": 1 - ctx.model_kwargs["y"]})


class OtherLabelBeforehand(ContrastGuidance):
    """The same, for which nothing of the step's own evaluation is needed."""

    def beforehand(self, ctx):
        return Inputs(ctx.x_t, ctx.t, {"y": 1 - ctx.model_kwargs["y"]})


class Calls:
    """A network that remembers the sizes of its batches."""

    def __init__(self, model):
        self.model, self.sizes = model, []

    def __call__(self, x, t, **kwargs):
        self.sizes.append(len(x))
        return self.model(x, t, **kwargs)


def by_hand(case, changes):
    """eps of the other label's evaluation."""
    kwargs = {**case.kwargs, **changes}
    return case.model(case.x, case.diffusion.model_timesteps(case.t), **kwargs)[:, :1]


def test_contrasts_that_need_the_same_evaluation_share_it(case):
    model = Calls(case.model)
    out = step(case, [OtherLabel(0.5), OtherLabel(0.25), OtherLabel(0.1, start=2)], model)
    assert model.sizes == [COUNT, COUNT]
    own, other = by_hand(case, {}), by_hand(case, {"y": 1 - case.kwargs["y"]})
    assert torch.equal(out["eps"], own + (0.5 * (own - other) + 0.25 * (own - other)))
    model.sizes.clear()
    step(case, [OtherLabel(0.5), SelfAttentionGuidance(case.model, "middle", 0.4, 2.0)], model)
    assert model.sizes == [COUNT] * 3


def test_further_evaluations_may_be_one_batch(case):
    guidance = [OtherLabel(0.5), SelfAttentionGuidance(case.model, "middle", 0.4, 2.0), OtherLabel(0.2),
                PerturbedAttentionGuidance(case.model, ["middle"], 0.5),
                SelfAttentionGuidance(case.model, "output.0", 0.4, 1.0, start=2)]
    model = Calls(case.model)
    together = step(case, guidance, model, batch_contrasts=True)
    assert model.sizes == [COUNT, 2 * COUNT, COUNT]
    apart = step(case, guidance)
    for name, value in apart.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=4e-4)
    model.sizes.clear()
    assert_equal(step(case, guidance[3:], model, batch_contrasts=True), step(case, guidance[3:]))
    assert model.sizes == [COUNT, COUNT]


def test_evaluations_that_need_nothing_of_the_steps_own_are_in_one_batch_with_it(case):
    guidance = [OtherLabelBeforehand(0.5), SelfAttentionGuidance(case.model, "middle", 0.4, 2.0),
                OtherLabelBeforehand(0.2), PerturbedAttentionGuidance(case.model, ["middle"], 0.5)]
    model = Calls(case.model)
    together = step(case, guidance, model, batch_contrasts=True)
    assert model.sizes == [2 * COUNT, COUNT, COUNT]
    model.sizes.clear()
    apart = step(case, guidance, model)
    assert model.sizes == [COUNT] * 4
    for name, value in apart.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=4e-4)
    # A loss needs the graph of the step's own evaluation, which then stays alone.
    model.sizes.clear()
    step(case, [*guidance[:2], depth_terms(case)[0]], model, batch_contrasts=True)
    assert model.sizes == [COUNT, 2 * COUNT]


def test_in_a_batch_with_others_perturbed_attention_computes_only_what_it_changes(case):
    guidance = [OtherLabelBeforehand(0.5), PerturbedAttentionGuidance(case.model, ["output.1"], 0.5)]

    def operations(**denoiser):
        with counted() as counter:
            step(case, guidance, **denoiser)
        return counter.get_total_flops()

    assert operations(batch_contrasts=True) == operations()


# Graphs


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["dcg", "dpg", "both"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_depth_guidance_keeps_no_graph_above_what_it_reads_and_changes_no_bit(case, chosen, frozen, monkeypatch):
    guidance, graphs = depth_terms(case)[chosen], {}

    def watched():
        handles = [block.register_forward_hook(lambda module, args, out, name=name: graphs.update({
            name: out.requires_grad})) for name, block in case.model.feature_blocks.items()]
        case.model.requires_grad_(not frozen)
        try:
            return step(case, guidance)
        finally:
            case.model.requires_grad_(False)
            for handle in handles:
                handle.remove()

    ended = watched()
    assert [name for name, graph in graphs.items() if not graph] == (
        ["output.3"] if chosen.stop == 2 else ["output.1", "output.2", "output.3"])
    monkeypatch.setattr(depth, "end_graph", lambda model, names: nullcontext())
    assert_equal(ended, watched())
    assert all(graphs.values())
    assert (ended["sample"] - step(case, [])["sample"]).abs().max() > 0


class Darker(LossGuidance):
    def loss(self, ctx, pred):
        return self.scale * pred.pred_xstart.mean(dim=(1, 2, 3))


def test_a_loss_of_the_prediction_keeps_the_whole_graph(case):
    both = [*depth_terms(case), Darker(0.5)]
    plain, alone = step(case, []), [step(case, [term]) for term in both]
    expected = plain["sample"] + sum(one["sample"] - plain["sample"] for one in alone)
    torch.testing.assert_close(step(case, both)["sample"], expected, rtol=0, atol=1e-4)


def test_the_strong_predictor_runs_once(case, monkeypatch):
    guidance = depth_terms(case)
    branches, runs = guidance[0].predictors.branches, []
    handles = [branch.register_forward_hook(lambda module, args, out, name=name: runs.append(
        (name, out.requires_grad))) for name, branch in branches.items()]
    both = step(case, guidance)
    assert runs == [("strong", True), ("weak", True)]
    runs.clear()
    step(case, guidance[:1])
    assert runs == [("strong", False), ("weak", True)]
    runs.clear()
    other = depth_terms(case)[1]
    other.predictors = copy.deepcopy(guidance[0].predictors)        # other predictors are read for themselves
    assert_equal(step(case, [guidance[0], other]), both)
    assert [name for name, _ in runs] == ["strong", "weak", "strong"]
    for handle in handles:
        handle.remove()


# Observation


def test_no_term_observes_whose_window_is_closed(case, monkeypatch):
    computed, received_attention = [], attention.received_attention
    monkeypatch.setattr(attention, "received_attention", lambda q, k: computed.append(1) or received_attention(q, k))
    closed = [{"start": 4}, {"stop": 5}, {"sigma_max": 0.01}, {"sigma_min": 100.0}]
    for window in closed:
        step(case, [SelfAttentionGuidance(case.model, "middle", 0.4, 2.0, **window)])
    step(case, [SelfAttentionGuidance(case.model, "middle", 0.0, 2.0),
                SelfAttentionGuidance(case.model, "middle", 0.4, 2.0, mask="global")])
    assert not computed
    step(case, [SelfAttentionGuidance(case.model, "middle", 0.4, 2.0)])
    assert len(computed) == 1


# Windows in noise level


def test_windows_of_noise_levels_guide_the_steps_whose_level_they_hold(case):
    classifier = with_random_weights(create_classifier(**TINY_CLASSIFIER), seed=2).requires_grad_(False)
    sigma = [float(((1 - abar) / abar) ** 0.5) for abar in case.diffusion.alphas_cumprod]
    low, high = sigma[3], sigma[6]          # the first is excluded, the second is not
    terms = {"sag": SelfAttentionGuidance(case.model, "middle", 0.4, 2.0, sigma_min=low, sigma_max=high),
             "pag": PerturbedAttentionGuidance(case.model, ["middle"], 0.4, sigma_min=low, sigma_max=high),
             "cg": ClassifierGuidance(classifier, 1.0, sigma_min=low, sigma_max=high)}
    for term in terms.values():
        assert term.window(torch.arange(10), case.diffusion).nonzero().flatten().tolist() == [4, 5, 6]
        for index in (3, 4, 6, 7):
            t = torch.full((COUNT,), index)
            assert torch.equal(step(case, [term], t=t)["sample"], step(case, [], t=t)["sample"]) == (index in (3, 7))
    # The same levels are other steps of a longer chain.
    longer = create_gaussian_diffusion(timestep_respacing="100")
    held = terms["cg"].window(torch.arange(100), longer).nonzero().flatten().tolist()
    assert len(held) == pytest.approx(33, abs=2)
    open_below = ClassifierGuidance(classifier, 1.0, sigma_max=high, start=5)
    assert open_below.window(torch.arange(10), case.diffusion).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("window", "said"), [
    ({"sigma_min": -0.1}, r"PerturbedAttentionGuidance sigma_min -0\.1: must be at least 0"),
    ({"sigma_max": 0}, "sigma_max 0: must be greater than 0"),
    ({"sigma_max": float("nan")}, "sigma_max nan: must be a finite number"),
    ({"sigma_min": "1"}, "sigma_min '1': must be a finite number"),
    ({"sigma_min": 2, "sigma_max": 2}, "sigma_min 2, sigma_max 2: the first must be smaller than the second"),
])
def test_bad_noise_levels_are_named(case, window, said):
    with pytest.raises(UserError, match=said):
        PerturbedAttentionGuidance(case.model, ["middle"], 1.0, **window)


def test_a_window_of_noise_levels_needs_the_process(case):
    with pytest.raises(UserError, match="needs the process"):
        PerturbedAttentionGuidance(case.model, ["middle"], 1.0, sigma_min=1.0).window(torch.arange(3))


def test_ddim_steps_have_windows_of_noise_levels_too(case):
    denoise = Denoiser(case.diffusion, case.model, model_kwargs=case.kwargs)
    term = OtherLabel(0.5, sigma_max=0.01)
    with torch.no_grad():
        outs = [sample_step(ddim_step, denoise, case.x, case.t, lambda: None, guidance) for guidance in ([], [term])]
    assert_equal(*outs)
