"""How far contrasts point at the truth: against a few lines, and as users probe."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from commands import REPOSITORY, call
from networks import TINY, in_float64, with_random_weights
from own_method import TowardsGrey

from evaluations.bench.probe import (
    Moments,
    Probed,
    ProbeOptions,
    ProbeResult,
    levels,
    probe_terms,
    rank_correlation,
)
from evaluations.bench.probe_report import agreement
from guided_diffusion.capture import override_attention
from guided_diffusion.checkpoint import load_state_dict
from guided_diffusion.fetch import sha256_of
from guided_diffusion.guidance import (
    ContrastGuidance,
    Guidance,
    GuidanceOptions,
    IcgOptions,
    IndependentConditionGuidance,
    Inputs,
    PagOptions,
    PerturbedAttentionGuidance,
    SagOptions,
)
from guided_diffusion.options import option
from guided_diffusion.presets import find_preset
from guided_diffusion.process import Denoiser
from guided_diffusion.rng import image_noise
from guided_diffusion.script_util import create_model_and_diffusion

STEPS = [700, 100]


@pytest.fixture(scope="module")
def network():
    model, diffusion = create_model_and_diffusion(**TINY)
    return in_float64(with_random_weights(model, seed=1).requires_grad_(False)), diffusion


@pytest.fixture(scope="module")
def images():
    random = torch.Generator().manual_seed(0)
    return torch.rand(4, 1, 16, 16, generator=random).double() * 2 - 1, torch.tensor([1, 0, 1, 1])


def probed(network, images, terms):
    """The moments of terms, the images in two batches."""
    model, diffusion = network
    x0, y = images
    batches = iter([([0, 1, 2], x0[:3], {"y": y[:3]}), ([3], x0[3:], {"y": y[3:]})])
    return probe_terms(Denoiser(diffusion, model), terms, batches, STEPS, seed=5)


def test_against_a_few_lines(network, images):
    model, diffusion = network
    x0, y = images
    found, = probed(network, images, [PerturbedAttentionGuidance(model, ["middle"], 0.3)])
    ratios, sums = [], np.zeros(3)
    for step in STEPS:
        t, abar = torch.full((4,), step), torch.tensor(diffusion.alphas_cumprod[step])
        x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * image_noise(5, range(4), step, (1, 16, 16)).double()
        strong = (x_t - (1 - abar).sqrt() * model(x_t, t, y)[:, :1]) / abar.sqrt()
        with override_attention(model, ["middle"], lambda q, k, v: v):
            weak = (x_t - (1 - abar).sqrt() * model(x_t, t, y)[:, :1]) / abar.sqrt()
        inner = [float(value.sum()) for value in
                 ((x0 - strong) ** 2, (x0 - strong) * (strong - weak), (strong - weak) ** 2)]
        ratios.append(inner[1] / inner[2])
        sums += np.array(inner) * float(abar / (1 - abar))
    assert found.ratios == pytest.approx(ratios, rel=1e-5)
    assert found.scale == pytest.approx(sums[1] / sums[2], rel=1e-5)
    assert found.left(0.4) == pytest.approx(1 - (0.8 * sums[1] - 0.16 * sums[2]) / sums[0], rel=1e-5)


class TowardsTruth(ContrastGuidance):
    """A contrast that points at the truth, which it is told, or beside it."""

    def __init__(self, x0, length):
        super().__init__(2.0)
        self.x0, self.length = x0, length

    def delta(self, ctx, pred):
        eps = ctx.denoise.diffusion.predict_eps_from_xstart(ctx.x_t, ctx.t, self.x0[ctx.image_ids])
        return self.scale * self.length * (eps - pred.eps)


@pytest.mark.parametrize("length", [1.0, 0.25, -0.5])
def test_a_contrast_that_points_at_the_truth_is_known_by_its_length(network, images, length):
    found, = probed(network, images, [TowardsTruth(images[0], length)])
    assert found.ratios == pytest.approx([1 / length] * len(STEPS), rel=1e-4)
    assert found.scale == pytest.approx(1 / length, rel=1e-4)
    assert found.left(found.scale) == pytest.approx(0, abs=1e-6) and found.left(0) == 1
    assert found.scale_interval() == pytest.approx((1 / length, 1 / length), rel=1e-4)


def test_no_scale_leaves_less_than_the_best_one(network, images):
    model, _ = network
    terms = [PerturbedAttentionGuidance(model, [block], 1.0) for block in ("middle", "output.0")]
    for found in probed(network, images, [*terms, IndependentConditionGuidance(1.0, 2)]):
        best = found.left(found.scale)
        assert all(best <= found.left(found.scale + change) for change in (-0.1, 0.1)) and best <= 1


def test_a_contrast_that_changes_nothing_has_no_ratio():
    zero = np.zeros((3, 2))
    found = Moments(np.ones((3, 2)), zero, zero, np.ones(2))
    assert found.ratios == [None, None] and found.scale == 0 and found.left(5) == 1
    assert found.scale_interval() == (0, 0)


@pytest.mark.parametrize(("toward", "least", "most"), [(0.0, 0, 0.1), (0.5, 0.9, 1), (-0.5, 0, 0.02)])
def test_what_is_proposed_points_at_the_truth_beyond_chance(toward, least, most):
    """The best of ten blocks that know nothing of the error is seldom proposed; one that does is."""
    random, proposed = np.random.default_rng(0), 0
    for _ in range(60):
        probed = []
        for block in range(10):
            error, noise = random.standard_normal((2, 24, 4, 50))
            change = toward * error * (block == 3) + noise
            moments = Moments((error**2).sum(-1), (error * change).sum(-1), (change**2).sum(-1), np.ones(4))
            probed.append(Probed(PagOptions(), str(block), moments))
        proposed += len(ProbeResult(ProbeOptions(data_dir="x"), [], [], probed, {}).proposed)
    assert least <= proposed / 60 <= most


def test_levels_are_the_middles_of_equal_parts():
    assert levels(1000, 4) == [875, 625, 375, 125] and levels(2, 8) == [1, 0]


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr  # takes long, and is needed here alone

    random = np.random.default_rng(0)
    one, other = random.integers(0, 5, 12), random.normal(size=12)
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


# The command

@pytest.fixture
def line(tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "held_out.npz", arr_0=random.integers(0, 256, (5, 32, 32, 3), np.uint8),
             arr_1=np.array([0, 9, 3, 4, 4]))

    def words(**changes):
        options = {"model": "fmnist32", "data_dir": tmp_path / "held_out.npz", "num_images": 3, "batch_size": 2,
                   "levels": 2, "out": tmp_path / "out", **changes}
        return [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return words


def test_a_contrast_that_needs_the_step_before_is_not_probed(line, monkeypatch, capsys):
    """At a level by itself there is none, and its number would be of another method."""
    monkeypatch.setattr(IndependentConditionGuidance, "remembers", True)
    assert call("probe", *line(methods="ICG")) == 2
    assert "ICG cannot be probed: it goes on from what it left at the step before" in capsys.readouterr().err


class Dimmed(ContrastGuidance):
    def weaker(self, ctx, pred):
        return Inputs(0.9 * ctx.x_t, ctx.t)


def with_terms(*kinds):
    """A method that builds these terms, of which what it says does not tell how many contrasts they are."""
    @dataclass(frozen=True)
    class OwnOptions(GuidanceOptions):
        """Terms."""

        short = "own"
        switched_on: ClassVar = {"own_scale": 0.1}
        search: ClassVar = [{"own_scale": 0.1}]
        own_scale: float = option(0.0, "scale")

        @property
        def active(self):
            return self.own_scale != 0

        def headline(self):
            return f"own {self.own_scale:g}"

        def build(self, nets):
            return [kind(self.own_scale) for kind in kinds]

        def schedule(self):
            return [(Guidance(self.own_scale), kind.passes) for kind in kinds]

    return OwnOptions


@pytest.mark.parametrize(("kinds", "reason"), [
    ([Dimmed, Dimmed], "it builds 2 contrasts"), ([TowardsGrey], "it builds no contrast")])
def test_a_method_without_exactly_one_contrast_is_left_out_before_the_work(line, monkeypatch, capsys, tmp_path, kinds,
                                                                           reason):
    own = with_terms(*kinds)
    monkeypatch.setattr("guided_diffusion.guidance.GUIDANCE", [IcgOptions, own])
    assert call("probe", *line()) == 0
    said = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert said["not_probed"] == {"own": reason} and {one["method"] for one in said["contrasts"]} == {"ICG"}
    monkeypatch.setattr("evaluations.bench.probe.probe_terms", None)
    assert call("probe", *line(methods="ICG,own")) == 2
    assert f"--methods ICG,own: own cannot be probed: {reason}" in capsys.readouterr().err
    monkeypatch.setattr("guided_diffusion.guidance.GUIDANCE", [own])
    assert call("probe", *line()) == 2
    assert f"no method can be probed: own: {reason}" in capsys.readouterr().err


def test_one_contrast_beside_a_gradient_is_probed(line, monkeypatch, tmp_path):
    monkeypatch.setattr("guided_diffusion.guidance.GUIDANCE", [with_terms(TowardsGrey, Dimmed)])
    assert call("probe", *line(methods="own")) == 0
    (one,) = json.loads((tmp_path / "out" / "probe.json").read_text())["contrasts"]
    assert one["method"] == "own"


def test_without_labels_no_contrast_sees_those_of_the_images(line, tmp_path):
    """Autoguidance, whose weak network is another one, and ICG, which has labels of its own."""
    found = []
    for labels in ([0, 9, 3, 4, 4], [5, 5, 1, 2, 0]):
        with np.load(tmp_path / "held_out.npz") as file:
            np.savez(tmp_path / "held_out.npz", arr_0=file["arr_0"], arr_1=np.array(labels))
        assert call("probe", *line(model="icons32", methods="autoguidance,ICG,CFG", labels="none", levels=1)) == 0
        said = json.loads((tmp_path / "out" / "probe.json").read_text())
        found.append({one["method"]: one["best_scale"] for one in said["contrasts"]})
    assert found[0] == found[1] and found[0]["CFG"] == 0 not in (found[0]["ICG"], found[0]["autoguidance"])


def test_options_that_change_nothing_are_said(line, caplog):
    flags = {"guide_scale": 2, "pag_scale": 3, "pag_blocks": "middle", "cfg_scale": 2, "blur_sigma": 3,
             "seg_blur_sigma": 9}
    assert call("probe", *line(methods="PAG,SAG", levels=1, **flags)) == 0
    assert ("without effect: --guide_scale, --pag_scale (the probe proposes scales); --pag_blocks (each block is "
            "probed); --cfg_scale (CFG is not probed); --seg_blur_sigma (SEG is not probed)") in caplog.messages


def measured(path, **flags):
    """A table.json of rows with these flags of guidance, each with its FID; those named ddim by another sampler."""
    rows = {name: {"flags": one, "title": f"{name}, DDIM, 20 steps" if name.startswith("ddim") else name}
            for name, (one, _) in flags.items()}
    path.write_text(json.dumps({"rows": rows, "settings": "DDPM, 20 steps; seed 1", "sections": [{"images": 9, "rows": [
        {"row": name, "metrics": {"fid": {"value": fid}}} for name, (_, fid) in flags.items()]}]}))
    return path


def test_the_command(line, tmp_path, capsys):
    table = measured(tmp_path / "table.json", unguided=({}, 1.0), icg=({"icg_scale": 0.5}, 2.0),
                     icg_strong=({"icg_scale": 3.0}, 4.0), pag=({"pag_scale": 1.0, "pag_blocks": "output.1"}, 3.0),
                     both=({"icg_scale": 1.0, "pag_scale": 1.0}, 9.0), elsewhere=({"tsg_scale": 1.0}, 9.0),
                     window=({"icg_scale": 1.0, "icg_sigma_max": 1.0}, 9.0), ddim=({}, 9.0))
    assert call("probe", *line(methods="ICG,PAG", table=table)) == 0
    text = capsys.readouterr().out
    said = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert (tmp_path / "out" / "probe.md").read_text().strip() == text.strip()
    assert {one["method"] for one in said["contrasts"]} == {"ICG", "PAG"}
    assert {one["block"] for one in said["contrasts"]} == {
        "", "input.3", "input.5", "middle", "output.0", "output.1", "output.2", "output.3"}
    best = [min((one for one in said["contrasts"] if one["method"] == method), key=lambda one: one["left"])
            for method in ("PAG", "ICG")]
    proposed = [(one["method"], one["block"]) for one in said["proposed"]]
    assert set(proposed) <= {(one["method"], one["block"]) for one in best if one["best_scale95"][0] > 0}
    assert ("not proposed: " in text) == (len(proposed) < 2)
    assert said["levels"][0]["sigma"] > said["levels"][1]["sigma"]
    assert (tmp_path / "out" / "chart.png").is_file()

    rows = said["table"]["rows"]
    assert [row["row"] for row in rows] == ["unguided", "icg", "icg_strong", "pag"]       # one method each
    assert rows[0]["left"] == 1 and f"over 4 rows of DDPM, 20 steps: {said['table']['correlation']:+.2f}" in text
    assert "Left out: 1 sampled otherwise, 3 of which the probe says nothing." in text
    assert said["table"]["correlation"] == pytest.approx(
        rank_correlation([row["left"] for row in rows], [1, 2, 4, 3]))
    icg = next(one for one in said["contrasts"] if one["method"] == "ICG")
    assert min(row["left"] for row in rows[1:3]) >= icg["left"]


def probed_as(*methods):
    """A probe that found the same of each of these methods, which are switched on, at their blocks."""
    one = Moments(np.ones((2, 1)), np.full((2, 1), 0.1), np.full((2, 1), 0.1), np.ones(1))
    return ProbeResult(ProbeOptions(data_dir="none"), [0], [1.0], [Probed(method, "", one) for method in methods], {})


SAG = SagOptions(**{**SagOptions.switched_on, "sel_attn_depth": 2, "blur_sigma": 1.0})
PAG = PagOptions(**{**PagOptions.switched_on, "pag_blocks": "output.2"})


@pytest.mark.parametrize(("table", "sampled", "rows"), [
    ("fmnist32", "DDPM, 20 steps", ["unguided", "sag", "sag_0.25", "sag_0.5", "sag_1", "pag_output_2_0.5",
                                    "pag_output_2_1"]),
    ("few_steps_fmnist32", "DDPM, 250 steps", ["ddpm_250", "ddpm_250_sag", "ddpm_250_pag"]),
    ("bench_fmnist32_unipc", "UniPC-2 (bh2), time-uniform, at most 20 evaluations",
     ["no_guidance_20", "sag_s_0.1_block_output.2_sigma_1_20"]),
    ("bench_fmnist32_unipc/search", "UniPC-2 (bh2), time-uniform, at most 20 evaluations",
     [f"sag_s_{s}_block_output.2_sigma_1_20" for s in ("0.1", "0.25", "0.5", "1")])])
def test_rows_that_differ_in_guidance_alone_are_compared(table, sampled, rows):
    """Of published tables, whose rows say their samplers and steps in several ways."""
    path = REPOSITORY / "docs" / "reproduction" / table / "table.json"
    found = agreement(probed_as(SAG, PAG), path, "fid")
    assert (found.sampled, list(found.rows)) == (sampled, rows)
    assert len(rows) + sum(found.left_out.values()) == len(json.loads(path.read_text())["rows"])


def test_evaluations_of_a_bench_are_not_mixed(tmp_path):
    rows = {f"{name}_{count}": {"flags": {}, "sampler": "DDIM", "title": f"no guidance, {count - 1} steps",
                                "work": count - 1.0} for name, count in [("one", 20), ("other", 10), ("third", 20)]}
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows, "sections": [{"images": 9, "rows": [
        {"row": name, "metrics": {"fid": {"value": 1.0}}} for name in rows]}]}))
    found = agreement(probed_as(), tmp_path / "table.json", "fid")
    assert list(found.rows) == ["one_20", "third_20"] and found.sampled == "DDIM, at most 20 evaluations"


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_images": 6}, "--num_images 6: "),
    ({"labels": "none"}, "--labels none: the network has no null class"),
    ({"methods": "CG"}, "--methods CG: CG cannot be probed: it does not contrast two predictions"),
    ({"methods": "CGG"}, "--methods CGG: there is no 'cgg', there are SAG"),
    ({"methods": "CFG"}, "--methods CFG: CFG cannot be probed: --cfg_scale"),
    ({"methods": "ICG", "icg_sigma_max": 0.5}, "--icg_sigma_max 0.5: the probe has no windows, leave it out"),
    ({"methods": "ICG", "icg_start": 1}, "--icg_start 1: the probe has no windows, leave it out"),
    ({"data_dir": "nowhere.npz"}, "--data_dir nowhere.npz: no such"),
])
def test_what_is_wrong_is_a_sentence(line, capsys, changes, message):
    assert call("probe", *line(**changes)) == 2
    assert message in capsys.readouterr().err


def test_a_table_without_flags_is_a_sentence(line, tmp_path, capsys):
    (tmp_path / "old.json").write_text('{"rows": {"unguided": {}}, "sections": []}')
    assert call("probe", *line(methods="ICG", table=tmp_path / "old.json")) == 2
    assert "--table" in capsys.readouterr().err


def test_a_table_must_be_of_the_network_that_is_probed(line, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    table = measured(tmp_path / "table.json", unguided=({}, 1.0), icg=({"icg_scale": 0.5}, 2.0))
    own = sha256_of(find_preset("fmnist32").path)
    for sha256, code, message in (("0" * 64, 2, f"--table {table}: is of another network than"), (own, 0, ""),
                                  (None, 0, f"--table {table}: does not say of which network it is")):
        content = json.loads(table.read_text())
        for row in content["rows"].values():
            row["network_sha256"] = sha256
        table.write_text(json.dumps(content))
        caplog.clear()
        assert call("probe", *line(methods="ICG", table=table)) == code
        said = capsys.readouterr().err + caplog.text
        assert message in said and (message or "--table" not in said)


def test_a_table_that_is_not_there_is_said_before_any_evaluation(line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evaluations.bench.probe.run_probe", None)
    assert call("probe", *line(table=tmp_path / "none.json")) == 2
    assert "--table" in capsys.readouterr().err


def test_a_network_of_a_file_of_several_is_chosen(line, tmp_path):
    state = load_state_dict(find_preset("fmnist32").path)
    torch.save({"ema": {name: value * 0.9 for name, value in state.items()}, "model": state}, tmp_path / "two.pt")
    found = {}
    for name, more in (("plain", {}), ("model", {"model_path": tmp_path / "two.pt", "checkpoint_entry": "model"}),
                       ("unset", {"model_path": tmp_path / "two.pt"})):
        assert call("probe", *line(methods="PAG", out=tmp_path / name, **more)) == 0
        found[name] = json.loads((tmp_path / name / "probe.json").read_text())["contrasts"]
    assert found["model"] == found["plain"] != found["unset"]


def test_images_are_drawn_from_all_of_a_file(line, tmp_path):
    random = np.random.default_rng(1)
    images, other = random.integers(0, 256, (2, 64, 32, 32, 3), np.uint8)
    images[:32] = images[0]                                 # as in a file that is sorted by class
    np.savez(tmp_path / "sorted.npz", arr_0=images, arr_1=np.zeros(64, np.int64))
    np.savez(tmp_path / "others.npz", arr_0=np.concatenate([images[:32], other[32:]]), arr_1=np.zeros(64, np.int64))
    found = {}
    for name, seed, size in (("sorted", 0, 2), ("others", 0, 2), ("sorted", 1, 2), ("sorted", 0, 3)):
        out = tmp_path / f"{name}{seed}{size}"
        assert call("probe", *line(methods="TSG", data_dir=tmp_path / f"{name}.npz", num_images=8, seed=seed,
                                   batch_size=size, out=out)) == 0
        contrast, = json.loads((out / "probe.json").read_text())["contrasts"]
        found[name, seed, size] = contrast["best_scale"]
    assert found["sorted", 0, 2] != pytest.approx(found["others", 0, 2], rel=1e-3)
    assert found["sorted", 0, 2] != pytest.approx(found["sorted", 1, 2], rel=1e-3)
    assert found["sorted", 0, 2] == pytest.approx(found["sorted", 0, 3], rel=1e-3)
