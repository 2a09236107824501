"""The plan of a table: evaluations counted as they are made, arithmetic, what is missing, hours."""

import contextlib
import dataclasses
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from networks import TINY, TINY_CLASSIFIER
from torch.utils.flop_counter import FlopCounterMode

from evaluations.reproduction import missing
from evaluations.reproduction import plan as planning
from evaluations.reproduction.costs import cost, equivalent_evaluations, flops, gradient_part, passes
from evaluations.reproduction.missing import missing_files
from evaluations.reproduction.plan import plan, probe
from evaluations.reproduction.reproduce import ReproduceOptions
from evaluations.reproduction.tables import in_folder, load_table, read_row
from guided_diffusion.checkpoint import save_state
from guided_diffusion.depth.features import feature_channels
from guided_diffusion.depth.predictor import DepthPredictors, save_predictors
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import sha256_of
from guided_diffusion.guidance import AttentionOptions, DagOptions
from guided_diffusion.options import option
from guided_diffusion.script_util import create_classifier, create_model
from guided_diffusion.unet import EncoderUNetModel, UNetModel

SHORT = {**TINY, **{name: value for name, value in TINY_CLASSIFIER.items() if name.startswith("classifier")},
         "timestep_respacing": "6", "num_samples": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def row(tiny_checkpoints, tmp_path_factory):
    """A row of the tiny network; `changes` are its values."""
    def make(**changes):
        folder = tmp_path_factory.mktemp("row")
        paths = {"model_path": str(tiny_checkpoints / "model.safetensors"),
                 "classifier_path": str(tiny_checkpoints / "classifier.safetensors"), "out": str(folder / "out")}
        return read_row("row", {**SHORT, **paths, "sel_attn_depth": 0, **changes}, folder / "row.yaml")
    return make


@pytest.mark.parametrize("changes, expected", [
    ({}, (6, 0)),
    ({"guide_scale": 1.5}, (12, 0)),
    ({"guide_scale": 1.5, "guide_start": 4}, (10, 0)),
    ({"guide_scale": 1.5, "guide_start": 0}, (6, 0)),
    ({"guide_scale": 1.5, "sag_sigma_min": 0.5}, (11, 0)),
    ({"guide_scale": 1.5, "sag_sigma_max": 0.5, "guide_start": 3}, (7, 0)),
    ({"sampler": "dpm-solver++", "solver_grid": "time-uniform", "sampling_steps": 5, "timestep_respacing": "",
      "guide_scale": 1.5, "sag_sigma_min": 1.0, "sag_sigma_max": 100.0}, (8, 0)),
    ({"classifier_guidance": True, "classifier_sigma_min": 0.5, "classifier_sigma_max": 20}, (6, 3)),
    ({"classifier_guidance": True}, (6, 6)),
    ({"classifier_guidance": True, "classifier_scale": 0}, (6, 0)),
    ({"guide_scale": 1.5, "use_ddim": True, "timestep_respacing": "ddim5", "classifier_guidance": True}, (10, 5)),
    ({"guide_scale": 1.5, "guide_start": 2, "sampler": "unipc", "timestep_respacing": "", "sampling_steps": 4}, (6, 0)),
    ({"sampler": "dpm-solver++", "solver_grid": "chain"}, (6, 0)),
], ids=str)
def test_passes_are_those_that_a_run_makes(row, changes, expected):
    made = {UNetModel: 0, EncoderUNetModel: 0}

    def called(module, inputs):
        for kind in made:
            made[kind] += type(module) is kind

    run = row(**changes).run
    handle = torch.nn.modules.module.register_module_forward_pre_hook(called)
    try:
        run.run()
    finally:
        handle.remove()
    counted = passes(run)
    assert (counted.forward, counted.others.get("classifier", 0)) == expected == tuple(made.values())
    assert counted.backward == 0 and counted.others.keys() <= {"classifier"}


@pytest.fixture(scope="module")
def operations(row):
    """The evaluations of the network that the plan says a run of four steps makes of an image, and its operations."""
    @functools.cache
    def operations(**changes):
        run = row(**changes, num_samples=1, batch_size=1, timestep_respacing="4").run
        made = FlopCounterMode(display=False)
        made.mod_tracker = contextlib.nullcontext()         # which cannot be inside of torch.autograd.grad
        made.mod_tracker.parents = {"Global"}
        with made:
            run.run()
        return passes(run).forward, made.get_total_flops(), equivalent_evaluations(run)
    return operations


@pytest.mark.parametrize("changes", [
    {"pag_scale": 1.0}, {"pag_scale": 1.0, "pag_start": 2, "pag_blocks": "output.0"},
    {"guide_scale": 1.5, "pag_scale": 1.0, "pag_start": 1, "pag_blocks": "output.0,input.3"},
    {"pag_scale": 1.0, "pag_sigma_min": 0.5, "pag_sigma_max": 20},
], ids=str)
def test_operations_are_those_that_a_run_with_perturbed_attention_makes(operations, changes):
    """The identity, which takes the place of attention, has none of its operations; they are not subtracted."""
    (forward, made, _), (steps, plain, _) = operations(**changes), operations()
    assert steps < forward < steps * (2 + ("guide_scale" in changes))
    assert made / plain == pytest.approx(forward / steps, rel=0.01)


@dataclass(frozen=True)
class UniformOptions(AttentionOptions):
    """Guidance away from uniform attention."""

    short, sigma_flags = "uniform", "uniform"
    switched_on: ClassVar = {"uniform_scale": 1.0}
    uniform_scale: float = option(0.0, "scale; 0: off")


@dataclass(frozen=True)
class UniformAtBlocksOptions(UniformOptions):
    """The same with a flag of its blocks."""

    uniform_blocks: str = option("output.0", "blocks")


class UniformAtOneOptions(UniformOptions):
    """The same at one block."""

    blocks: ClassVar = ["output.0"]


@pytest.mark.parametrize("kind", [UniformAtBlocksOptions, UniformAtOneOptions])
def test_attention_of_ones_own_costs_the_part_that_perturbed_attention_costs(row, kind):
    window, own = {"pag_scale": 1.0, "pag_blocks": "output.0"}, kind(uniform_scale=1.0)
    expected, run = passes(row(**window).run), row().run
    assert passes(dataclasses.replace(run, guidance=(own,))).forward == expected.forward < 12
    assert own.title(usual={}) == "uniform s = 1, block output.0"
    places = own.at_blocks(create_model(**TINY))
    assert places == {"": own} if kind is UniformAtOneOptions else places["middle"].blocks == ["middle"]


@pytest.fixture(scope="module")
def further(tiny_checkpoints, tmp_path_factory):
    """Flags of files of further networks: depth predictors of the tiny network, and two of images of 32 pixels."""
    folder = tmp_path_factory.mktemp("further")
    paths = {name: str(folder / f"{name}.safetensors") for name in ("depth_predictor", "depth_prior",
                                                                    "clean_classifier_path")}
    channels = feature_channels(create_model(**TINY), ("input.1", "output.0"))
    save_predictors(paths["depth_predictor"], DepthPredictors(
        {"strong": channels, "weak": {"input.1": channels["input.1"]}}, 16, "0,1",
        sha256_of(tiny_checkpoints / "model.safetensors")))
    prior = {**TINY, "class_cond": False, "image_size": 32, "attention_resolutions": ""}
    classifier = {**TINY_CLASSIFIER, "image_size": 32, "classifier_attention_resolutions": "",
                  "classifier_pool": "adaptive"}
    for name, create, flags in (("depth_prior", create_model, prior),
                                ("clean_classifier_path", create_classifier, classifier)):
        save_state(paths[name], create(**flags).state_dict(), {"config": json.dumps(flags)})
    foreign = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                  torch.nn.Linear(64, 2)).eval()
    torch.jit.trace(foreign, torch.zeros(1, 3, 32, 32)).save(str(folder / "foreign.pt"))
    (folder / "foreign.yaml").write_text("input_size: 32")
    return paths


@pytest.mark.parametrize("changes", [
    {"dcg_scale": 40}, {"dcg_scale": 40, "dpg_scale": 40, "dag_start": 3}, {"clean_classifier_scale": 1.0},
    {"clean_classifier_scale": 1.0, "clean_classifier_path": "foreign.pt"},
], ids=str)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_operations_are_those_of_gradients_and_further_networks(operations, further, changes):
    """A gradient begins at the last block that a loss reads, and other networks see images of their own size.

    Those of attention are not counted on a CPU.
    """
    files = further if "clean_classifier_scale" in changes else {
        name: path for name, path in further.items() if name != "clean_classifier_path"}
    if "clean_classifier_path" in changes:
        foreign = Path(files["clean_classifier_path"]).with_name("foreign.pt")
        changes = {**changes, "clean_classifier_path": str(foreign)}
    (_, made, counted), (_, plain, steps) = operations(**{**files, **changes}), operations()
    assert counted > steps and made / plain == pytest.approx(counted / steps, rel=0.1)


def test_the_parts_that_perturbed_attention_evaluates_of_the_released_networks():
    run = load_table("sag_cg_imagenet128").rows["unguided"].run.changed(pag_scale=1.0, pag_blocks="output.8")
    assert passes(run).forward / run.num_steps == pytest.approx(1.52, abs=0.01)
    assert str(passes(run)) == f"{passes(run).forward:.1f}"
    run = load_table("sag_pretrained_256").rows["imagenet256"].run.changed(
        guide_scale=1.0, pag_scale=1.0, pag_blocks="middle,input.14,output.2")
    assert passes(run).forward / run.num_steps == pytest.approx(1.75, abs=0.01)


@pytest.mark.parametrize("changes, expected", [
    ({"dcg_scale": 40, "dag_sigma_min": 0.5}, (6, 5, 0)),
    ({"dcg_scale": 40}, (6, 6, 0)), ({"dpg_scale": 40}, (6, 6, 6)), ({"dcg_scale": 40, "dpg_scale": 40}, (6, 6, 6)),
    ({"dcg_scale": 40, "dag_start": 4, "dag_stop": 1}, (6, 3, 0)),
    ({"dcg_scale": 40, "guide_scale": 1.1, "dag_start": 0}, (12, 0, 0)),
], ids=str)
def test_both_depth_terms_share_one_gradient(row, changes, expected):
    counted = passes(row(**changes).run)
    assert (counted.forward, counted.backward, counted.others.get("prior", 0)) == expected


def test_score_distillation_evaluates_the_prior_without_a_gradient(row):
    changes = {"dpg_scale": 40, "dpg_gradient": "score", "dag_start": 4}
    counted = passes(row(**changes).run)
    assert (counted.forward, counted.backward, counted.others, counted.plain) == (6, 4, {}, {"prior": 4})
    assert str(counted) == "6 + 4 back + 4 of the prior, no gradient"


def test_the_operations_of_a_released_network_are_those_that_its_authors_name():
    """ADM (2105.05233, table 8) counts 1120 billion multiply-adds for its 256x256 network."""
    row = load_table("sag_pretrained_256").rows["imagenet256"]
    counted = flops(row.run)
    assert counted.forward / 2 == pytest.approx(1120e9, rel=0.03)
    assert gradient_part(row.run.model, frozenset([(DagOptions(), frozenset())])) == pytest.approx(1, rel=0.05)
    assert counted.others == {}


def test_a_last_batch_is_evaluated_whole(row):
    one, three = cost(row(), "references"), cost(row(num_samples=3), "references")
    assert (one.images, three.images) == (2, 4)
    assert three.flops == 2 * one.flops
    assert three.hours(1e-12, 1) == pytest.approx(2 * one.hours(1e-12, 2) * 2)


def test_what_is_missing_comes_with_the_command_that_fetches_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(missing, "is_here", lambda path: False)
    rows = load_table("sag_cg_imagenet128").rows
    commands = {thing.file: thing.remedy for thing in missing_files(rows["sag_cg"], "references")}
    assert "fetch_models.py 128x128_diffusion" in commands["models/128x128_diffusion.pt"]
    assert "fetch_models.py 128x128_classifier" in commands["models/128x128_classifier.pt"]
    assert "scripts/fetch_references.py VIRTUAL_imagenet128_labeled" in commands[
        "references/VIRTUAL_imagenet128_labeled.npz"]
    assert "--inception" in commands["classify_image_graph_def.pb"]
    text = plan(load_table("freedoom32_dag").chosen("unguided"), "references", "", 1, 0.02)
    assert "models/freedoom32.safetensors is missing, and no option says what network it holds: its rows are" in text
    network = missing_files(load_table("freedoom32_dag").rows["unguided"], "references")[2]
    assert network.blocks and str(network) == (
        "models/freedoom32_judge.safetensors: scripts/train_scenes.py trains one (docs/dag.md)")
    unguided = [thing.file for thing in missing_files(rows["unguided"], "references") if thing.blocks]
    assert unguided and not any("classifier" in file for file in unguided)
    church = {thing.file: thing for thing in missing_files(load_table("dag_dfid").rows["church_dpg"], "references")}
    assert "no such checkpoint was released" in church["models/lsun_church.pt"].remedy
    assert "image_train" in church["models/church_depth_prior.safetensors"].remedy
    of_references, of_samples = [file for file, thing in church.items() if not thing.blocks][1:]
    assert of_references == "references/lsun_church_depth.npz"
    assert of_samples.startswith("samples/lsun_church-") and of_samples.endswith("/depth.npz")


def test_a_classifier_in_torchscript_needs_its_settings(row, tmp_path):
    files = [str(tmp_path / name) for name in ("net.pt", "net.yaml")]
    lacking = row(clean_classifier_scale=1.0, clean_classifier_path=files[0])
    found = {thing.file: thing for thing in missing_files(lacking, "references")}
    assert all(found[file].blocks for file in files)
    assert "says how images become the input of the network beside it" in found[files[1]].remedy
    assert equivalent_evaluations(lacking.run) == 12                    # counted as the network itself
    (tmp_path / "net.pt").write_bytes(b"")
    assert [thing.file for thing in missing_files(lacking, "references") if thing.file in files] == files[1:]
    assert equivalent_evaluations(lacking.run) == 12
    off = row(clean_classifier_path=files[0])
    assert not {thing.file for thing in missing_files(off, "references")} & set(files)


@pytest.mark.parametrize(("changes", "network"), [
    ({"autoguidance_scale": 1.0}, "weak network"),                                      # built as the model is
    ({"clean_classifier_scale": 1.0, "clean_classifier_path": "missing.pt"}, "clean classifier")])
def test_a_further_network_that_nothing_describes_counts_as_the_one_that_is_sampled(row, changes, network):
    plain, guided = row(), row(weak_model_path=row().run.sample.model_path, **changes)
    one, other = cost(plain, "references"), cost(guided, "references")
    assert (other.flops, other.weights) == (2 * one.flops, 2 * one.weights)
    assert (one.undescribed, other.undescribed) == ((), (network,))
    table = dataclasses.replace(load_table("fmnist32"), rows={"plain": plain, "other": guided, "again": guided})
    text = plan(table, "references", "", 1, 0.02)
    said = f"The {network} (of other, again) counts as the network that is sampled: nothing states how it is built."
    assert [line for line in text.splitlines() if "counts as the network" in line] == [said]


def test_a_bundled_table_lacks_nothing():
    for name in ("fmnist32", "scenes32"):
        assert not [thing for row in load_table(name).rows.values() for thing in missing_files(row, "references")]


def test_hours_follow_the_users_figure_and_the_ranks():
    table = load_table("sag_cg_imagenet128").chosen("unguided,sag")

    def hours(seconds, ranks):
        text = plan(table, "references", "", ranks, seconds)
        lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
        return [float(line.rstrip("| ").split("|")[-1]) for line in lines]

    unguided, sag, together = hours(0.02, 1)
    assert unguided == pytest.approx(50_000 * 250 * 0.02 / 3600, rel=0.01)
    assert sag == pytest.approx(2 * unguided, rel=0.01) and together == pytest.approx(3 * unguided, rel=0.01)
    assert hours(0.02, 8)[0] == pytest.approx(unguided / 8, rel=0.01)


def test_the_probe_times_the_network_on_this_device(row):
    found = probe(row())
    assert 0 < found.seconds < 10 and found.memory > 0
    assert found.device == "cuda:0" or found.device.startswith("cpu")


def test_large_images_are_not_evaluated_on_a_cpu(row, monkeypatch):
    monkeypatch.setattr(planning, "PROBE_SECONDS", 0.1)
    large = row(image_size=256, channel_mult="1,1,1", attention_resolutions="64", model_path="none.pt")
    seen = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[2]) if type(module) is UNetModel else None)
    try:
        found = probe(large)
    finally:
        handle.remove()
    if found.device == "cpu":
        assert set(seen) - {256} == {64} and seen.count(256) <= 2       # which only count operations
    assert found.seconds > 0


def test_plan_of_a_bundled_table_by_the_probe(monkeypatch):
    monkeypatch.setattr(planning, "PROBE_SECONDS", 0.1)
    table = load_table("fmnist32").chosen("unguided,cg,ddpm_250")
    text = plan(in_folder(table, "runs", 10), "references", "", 2, None)
    assert "nothing is missing" in text and "measured on cpu" in text
    cells = {line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines() if line.startswith("| ")}
    assert cells["cg"][2].strip() == "20 + 20 of the classifier" and cells["ddpm_250"][2].strip() == "250"
    assert re.search(r"2 ranks", text)


def test_a_time_must_be_positive():
    with pytest.raises(UserError, match="--evaluation_seconds 0"):
        ReproduceOptions(evaluation_seconds=0)


def test_costs_do_not_depend_on_the_precision(row):
    half = row(use_bf16=True).run
    assert flops(half) == flops(dataclasses.replace(half, model=dataclasses.replace(half.model, use_bf16=False)))
