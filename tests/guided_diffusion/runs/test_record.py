"""Records of runs that are damaged, odd or hostile: a sentence, whatever they hold."""

import dataclasses
import importlib
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import own_method
import pytest
from fuzzing import damaged, fuzz, survives
from hypothesis import given
from networks import TINY

from guided_diffusion.errors import UserError
from guided_diffusion.guidance import GUIDANCE, CleanClassifierOptions, GradientGuidance, SagOptions, ScaledOptions
from guided_diffusion.guidance.base import start_option
from guided_diffusion.options import fill, option, option_fields
from guided_diffusion.runs.options import preset_values
from guided_diffusion.runs.record import (
    READ_ERRORS,
    difference,
    finished_run,
    identity,
    own_sources,
    read_record,
    run_samples,
    say_unrecorded,
)
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.shards import Shards
from guided_diffusion.runs.status import run_status
from guided_diffusion.sampling import SAMPLERS

CONFIGURATION = {"num_samples": 7, "batch_size": 3, "image_size": 4, "seed": 0, "labels": "random", "guide_scale": 1.1}
RECORD = {"configuration": CONFIGURATION, "sha256": {"model": "1" * 64, "samples": "2" * 64},
          "samples": "samples_7x4x4x3.npz"}
CONTENT = json.dumps(RECORD).encode()


def with_sizes(**sizes):
    return json.dumps({**RECORD, "configuration": {**CONFIGURATION, **sizes}}).encode()


def test_images_do_not_depend_on_where_a_file_lies_that_nothing_reads():
    def of(sha256="1", **given):
        return identity({"dcg_scale": 1.0, "depth_predictor": "p", **given},
                        {"depth_predictor": "0", "depth_prior": sha256})

    assert of(depth_prior="here") == of(depth_prior="there")
    assert of(dpg_scale=1.0, depth_prior="here") == of(dpg_scale=1.0, depth_prior="there")
    assert of(dpg_scale=1.0, depth_prior="here") != of("2", dpg_scale=1.0, depth_prior="here")


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{}", b"\xff", b"[" * 20000, b'{"a":' * 20000, b"9" * 5000, CONTENT[:40], b'{"configuration": 3}',
    with_sizes(num_samples=10**12), with_sizes(num_samples=-1), with_sizes(batch_size=0), with_sizes(batch_size="3"),
    with_sizes(image_size=True), with_sizes(num_samples=[3]), with_sizes(num_samples=None)])
def test_a_record_that_is_none_is_refused_everywhere(content, tmp_path):
    for path in (tmp_path / "run.json", tmp_path / "shards" / "run.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(READ_ERRORS):
            read_record(path)
    with pytest.raises(UserError, match=r"run\.json: is no record of a sampling run \(") as refused:
        run_status(tmp_path)
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 1000
    with pytest.raises(UserError, match=r"its run\.json is unreadable"):
        Shards(tmp_path, CONFIGURATION, RECORD["sha256"]).check()


OWN = Path(own_method.__file__).read_text()


def test_images_depend_on_the_code_of_methods_from_outside(tmp_path, monkeypatch, tiny_checkpoints):
    """A formula that was changed makes other images, and so another run."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_grey.py").write_text(OWN)
    method = importlib.import_module("my_grey").GreyOptions
    GUIDANCE.append(method)
    try:
        def sample(**changes):
            flags = {**TINY, "model_path": str(tiny_checkpoints / "model.safetensors"), "num_samples": 2,
                     "batch_size": 1, "timestep_respacing": "2", "out": str(tmp_path / "out"), **changes}
            return SamplingRun.of(fill(flags, SamplingRun.classes(), preset_values, source="here")).run()

        for scale, refused in ((0.0, False), (0.5, True)):
            (tmp_path / "my_grey.py").write_text(OWN)
            sample(grey_scale=scale, overwrite=True)
            sample(grey_scale=scale)
            (tmp_path / "my_grey.py").write_text(OWN.replace("-self", "self"))
            with pytest.raises(UserError, match="code of my_grey:GreyOptions differs") if refused else nullcontext():
                sample(grey_scale=scale)
    finally:
        GUIDANCE.remove(method)


def test_images_depend_on_an_option_that_a_method_shares_with_one_that_is_off(monkeypatch):
    """An option stated alike is one option: what either of them depends on, the images do."""
    @dataclass(frozen=True)
    class BlurOptions(ScaledOptions):
        short, sigma_flags, term = "blur", "blur", GradientGuidance
        switched_on: ClassVar = {"blur_scale": 1.0}
        blur_scale: float = option(0.0, "scale")
        blur_sigma: float = dataclasses.field(default=SagOptions.blur_sigma, metadata=next(
            field.metadata for field in option_fields(SagOptions) if field.name == "blur_sigma"))

        def build(self, nets):
            return [GradientGuidance(self.blur_scale)]

    monkeypatch.setattr("guided_diffusion.runs.record.GUIDANCE", [*GUIDANCE, BlurOptions])
    of = [identity({"blur_scale": scale, "blur_sigma": sigma}, {}) for scale in (0.0, 1.0) for sigma in (3.0, 9.0)]
    assert of[0] == of[1] and of[2]["blur_sigma"] == 3.0 and of[3]["blur_sigma"] == 9.0


OWN_SAMPLER = """
from dataclasses import dataclass

from guided_diffusion.options import option
from guided_diffusion.sampling import SamplerOptions, ddpm_step


@dataclass(frozen=True)
class MeanOptions(SamplerOptions):
    title = "mean"
    mean_share: float = option(0.5, "share")

    def step(self):
        return ddpm_step
"""


def test_a_run_goes_on_where_methods_and_samplers_that_it_does_not_use_are_unknown(tmp_path, monkeypatch,
                                                                                   tiny_checkpoints):
    """With them it is what it is without them, and where they were used it is another run."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_other_grey.py").write_text(OWN)
    (tmp_path / "my_mean.py").write_text(OWN_SAMPLER)
    method = importlib.import_module("my_other_grey").GreyOptions
    sampler = importlib.import_module("my_mean").MeanOptions

    def sample(out, count, own, **changes):
        flags = {**TINY, "model_path": str(tiny_checkpoints / "model.safetensors"), "num_samples": count,
                 "batch_size": 1, "timestep_respacing": "2", "out": str(tmp_path / out), **changes}
        with monkeypatch.context() as with_own:
            if own:
                with_own.setitem(SAMPLERS, "mean", sampler)
                with_own.setattr("guided_diffusion.runs.record.GUIDANCE", [*GUIDANCE, method])
                with_own.setattr("guided_diffusion.runs.options.GUIDANCE", [*GUIDANCE, method])
            return SamplingRun.of(fill(flags, SamplingRun.classes(), preset_values, source="here")).run()

    for out, first, then in (("one", True, False), ("two", False, True)):
        sample(out, 1, first)
        sample(out, 2, then)
    sample("grey", 1, True, grey_scale=0.5)
    with pytest.raises(UserError, match="--grey_scale differs"):
        sample("grey", 2, False)
    sample("mean", 1, True, sampler="mean", mean_share=0.25)
    with pytest.raises(UserError, match="of another configuration"):
        sample("mean", 2, False)


def test_images_depend_on_modules_written_with_a_method(tmp_path, monkeypatch):
    """A term may lie in another file than its options, and use a third one; no installed package is looked into."""
    monkeypatch.syspath_prepend(tmp_path)
    terms, options = OWN.split("@dataclass")
    (tmp_path / "my_terms").mkdir()
    (tmp_path / "my_terms" / "__init__.py").write_text("")
    (tmp_path / "my_terms" / "numbers.py").write_text("SIGN = -1\n")
    (tmp_path / "my_terms" / "grey.py").write_text("from . import numbers\n" + terms)
    (tmp_path / "my_split_grey.py").write_text("import numpy\nfrom my_terms.grey import *\n" + terms[:terms.index(
        "class ")] + "@dataclass" + options)
    method = importlib.import_module("my_split_grey").GreyOptions
    assert own_sources(method()) == {
        "source of my_split_grey:GreyOptions": str(tmp_path / "my_split_grey.py"),
        "source of my_terms.grey:TowardsGrey": str(tmp_path / "my_terms" / "grey.py"),
        "source of my_terms": str(tmp_path / "my_terms" / "__init__.py"),
        "source of my_terms.numbers": str(tmp_path / "my_terms" / "numbers.py")}


@pytest.mark.parametrize("use", ["    from my_sign import SIGN", "    import my_signs.one as other"])
def test_images_depend_on_constants_and_on_what_is_imported_in_a_function(use, tmp_path, monkeypatch):
    """Nothing in the module itself points at them, and what is not imported yet is not imported for it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_signs").mkdir()
    (tmp_path / "my_signs" / "one.py").write_text("from my_sign import *\n")
    (tmp_path / "my_sign.py").write_text("SIGN = -1\nraise SystemExit\n")
    name = f"my_lazy_grey_{len(use)}"
    (tmp_path / f"{name}.py").write_text(f"{OWN}\n\ndef later():\n{use}\n")
    found = own_sources(importlib.import_module(name).GreyOptions())
    assert found["source of my_sign"] == str(tmp_path / "my_sign.py")
    assert ("source of my_signs.one" in found) == ("my_signs" in use)


def test_images_depend_on_both_of_two_files_whose_classes_are_called_alike(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    files = [tmp_path / f"my_{name}.py" for name in ("pull", "push")]
    for file in files:
        file.write_text(OWN)
    found = own_sources(*(importlib.import_module(file.stem).GreyOptions() for file in files))
    assert [found[f"source of {file.stem}:GreyOptions"] for file in files] == [str(file) for file in files]


def test_images_depend_on_the_files_beside_a_function_that_makes_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_classifier.py").write_text("from my_layers import load\n")
    (tmp_path / "my_layers.py").write_text("raise SystemExit\n")
    options = CleanClassifierOptions(clean_classifier_scale=1.0, clean_classifier_path="my_classifier:load")
    assert own_sources(options) == {"source of my_layers": str(tmp_path / "my_layers.py")}


def test_a_record_that_names_classes_without_their_modules_is_still_read(monkeypatch):
    """As older ones do: the same code goes on, and other code is another run."""
    monkeypatch.setattr("guided_diffusion.runs.record.GUIDANCE", [*GUIDANCE, own_method.GreyOptions])
    digest = "1" * 64
    new, old, other = (identity({"grey_scale": 1.0}, dict.fromkeys(names, value)) for names, value in (
        (["source of own_method:GreyOptions", "source of own_method:TowardsGrey"], digest),
        (["source of GreyOptions", "source of TowardsGrey"], digest),
        (["source of GreyOptions", "source of TowardsGrey"], "2" * 64)))
    assert difference(old, new) is None
    assert difference(other, new) == "the code of own_method:GreyOptions"


def test_code_without_a_file_is_said(monkeypatch, caplog):
    """As that of a notebook's cell, whose changes no record can tell."""
    monkeypatch.setattr(own_method.GreyOptions, "__module__", "__no_file__")
    with caplog.at_level("INFO"):
        say_unrecorded(own_method.GreyOptions(), SagOptions())
    assert "the code of GreyOptions is in no file, so it is not recorded" in caplog.text


@pytest.mark.parametrize("passed_on", [True, False])
def test_a_window_that_build_does_not_pass_on_is_refused(passed_on, tiny_checkpoints):
    """Else it would be recorded, and stand in the title, of a run that it does nothing in."""
    @dataclass(frozen=True)
    class PullOptions(own_method.GreyOptions):
        short, sigma_flags = "pull", "pull"
        pull_scale: float = option(0.0, "scale")
        pull_start: int | None = start_option()

        def build(self, nets):
            return [own_method.TowardsGrey(self.pull_scale, **(self.window if passed_on else {}))]

    flags = {**TINY, "model_path": str(tiny_checkpoints / "model.safetensors"), "timestep_respacing": "2"}
    run = SamplingRun.of(fill(flags, SamplingRun.classes(), preset_values, source="here"))
    for start, fits in ((None, True), (1, passed_on)):
        with nullcontext() if fits else pytest.raises(UserError, match="PullOptions: builds a TowardsGrey that guides"):
            replace(run, guidance=(PullOptions(pull_scale=1.0, pull_start=start),)).build()


@pytest.mark.parametrize("name", ["../x.npz", "/x.npz", "a/b.npz", ".", "", 3, None, ["x.npz"], "a\0b", "x" * 5000])
def test_samples_outside_the_folder_are_not_read(name, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**RECORD, "samples": name}))
    with pytest.raises(UserError, match="holds no finished sampling run") as refused:
        run_samples(tmp_path, 1)
    assert len(str(refused.value)) < 1000 + len(str(tmp_path))


def read_everywhere(path):
    """Everything that reads a record, in a folder of its own."""
    folder = path.parent
    for read in (run_status, lambda folder: run_samples(folder, 2), finished_run, lambda folder: Shards(
            folder, CONFIGURATION, RECORD["sha256"], lambda image_ids: None).check()):
        try:
            read(folder)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000


@fuzz(60)
@given(damaged(CONTENT))
def test_damaged_records(content):
    survives(read_everywhere, content, "run.json")
