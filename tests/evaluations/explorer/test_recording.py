"""Recordings of sampling runs: they hold what the steps of the same run give, in half precision."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from commands import call, flags
from networks import TINY

from evaluations.explorer import explore
from evaluations.explorer.explore import ExploreOptions
from evaluations.explorer.page import check_attention, page, write_page
from evaluations.explorer.recording import Recorder
from guided_diffusion.errors import UserError
from guided_diffusion.options import options_from
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.runs.sampler import ImageSampler
from guided_diffusion.terms import LossGuidance
from guided_diffusion.unet import UNetModel

SAG = {"guide_scale": 1.5, "sel_attn_block": "middle", "sel_attn_depth": 0, "blur_sigma": 2.0}


@pytest.fixture
def run(tiny_checkpoints):
    """A run of the tiny network in three steps; `changes` are flags."""
    def make(**changes):
        given = {**TINY, "model_path": str(tiny_checkpoints / "model.safetensors"), "timestep_respacing": "3",
                 "batch_size": 2, "num_samples": 8, **changes}
        return SamplingRun.of(options_from(given, *SamplingRun.classes()))
    return make


def test_a_recording_is_what_the_steps_give(run):
    guided = run(**SAG, pag_scale=1.0, rescale_phi=0.5)
    seen = []
    recording = Recorder(guided, [0, 1, 4], []).record(seen.append)
    assert seen == [2, 2, 2, 1, 1, 1]
    chains = [list(ImageSampler(guided.sample, guided.sampler, guided.build()).chain(ids, guided.labels()(ids)))
              for ids in ([0, 1], [4])]
    for name, key in (("x0", "pred_xstart"), ("x0_unguided", "pred_xstart_unguided")):
        expected = np.stack([torch.cat([out[key] for out in outs]).half().numpy()
                             for outs in zip(*chains, strict=True)], axis=1)
        assert np.array_equal(recording.arrays[name], expected)
    last = torch.cat([chain[-1]["sample"] for chain in chains]).numpy()
    assert np.array_equal(recording.arrays["sample"], last)
    # x_t of a step is what the step before it made
    before = torch.cat([chain[0]["sample"] for chain in chains]).half().numpy()
    assert np.array_equal(recording.arrays["x_t"][:, 1], before)


def test_what_each_kind_of_term_gives(run, tiny_checkpoints):
    recording = Recorder(run(**SAG, pag_scale=1.0, rescale_phi=0.5), [0, 1], ["middle"]).record()
    assert [(term.title, term.kind) for term in recording.terms] == [
        ("SAG s = 0.5", "contrast"), ("PAG s = 1", "contrast"), ("rescale phi = 0.5", "transform")]
    arrays = {name: value.astype(np.float64) for name, value in recording.arrays.items()}
    total = arrays["term0_change"] + arrays["term1_change"] + arrays["term2_change"]
    half = 4 * np.finfo(np.float16).eps * np.abs(arrays["term0_change"]).max()
    assert np.abs(total - arrays["eps_change"]).max() < half and np.abs(arrays["term2_change"]).max() > 0
    # the mask is that of the recorded attention, and the degraded input of the contrast alone
    attended = arrays["attention_middle"] > recording.psi
    assert np.array_equal(arrays["term0_mask"][:, :, 0], attended.repeat(2, axis=2).repeat(2, axis=3))
    assert np.allclose(arrays["attention_middle"].mean(axis=(2, 3)), 1, atol=1e-5)
    assert "term0_degraded" in arrays and "term1_degraded" not in arrays and "term1_mask" not in arrays
    rms = np.sqrt((arrays["term0_change"]**2).mean(axis=(2, 3, 4)))
    assert np.allclose(arrays["term0_rms"], rms, rtol=2e-3)
    assert recording.bytes == sum(value.nbytes for value in recording.arrays.values())


def test_terms_guide_within_their_windows_alone(run):
    recording = Recorder(run(**SAG, guide_start=2), [3], []).record()
    assert recording.steps == (2, 1, 0) and recording.terms[0].active == (False, True, True)
    assert not recording.arrays["term0_change"][:, 0].any() and recording.arrays["term0_change"][:, 1].any()
    assert sorted(recording.sigma, reverse=True) == list(recording.sigma)


def test_terms_are_as_before_once_they_were_watched(run):
    recorder = Recorder(run(**SAG), [0], [])
    recorder.record()
    assert "delta" not in vars(recorder.guidance[0])


def test_without_guidance_there_are_images_and_attention(run):
    recording = Recorder(run(), [0], []).record()
    assert recording.terms == () and recording.block == "" and recording.title == "no guidance; DDPM"
    assert {f"attention_{name}" for name in recording.blocks} == {
        name for name in recording.arrays if "attention" in name}
    assert np.array_equal(recording.arrays["x0"], recording.arrays["x0_unguided"])


def test_the_step_is_recorded_of_a_batch_with_further_evaluations(run, monkeypatch):
    """Its own rows come first: what is kept is, to rounding, what it is where each evaluation is made alone."""
    sizes = []
    forward = UNetModel.forward
    monkeypatch.setattr(UNetModel, "forward", lambda self, x, *inputs, **conditions: (
        sizes.append(len(x)), forward(self, x, *inputs, **conditions))[1])
    alone, together = (Recorder(run(icg_scale=1.0, batch_contrasts=batched), [0, 1, 4], []).record()
                       for batched in (False, True))
    assert max(sizes) == 4
    assert alone.arrays.keys() == together.arrays.keys()
    for name, array in alone.arrays.items():
        assert np.allclose(array, together.arrays[name], atol=1e-2), name


def test_any_sampler_and_a_gradient(run, tiny_checkpoints):
    from networks import TINY_CLASSIFIER

    guided = run(**TINY_CLASSIFIER, classifier_path=str(tiny_checkpoints / "classifier.safetensors"),
                 classifier_guidance=True, sampler="ddim")
    recording = Recorder(guided, [0], []).record()
    assert [term.kind for term in recording.terms] == ["gradient"]
    # DDIM takes the gradient as a change of eps, of which guided x0 differs from unguided
    assert recording.arrays["term0_rms"].min() > 0


class Darker(LossGuidance):
    """Lowers the mean of predicted x0."""

    def loss(self, ctx, pred):
        return self.scale * pred.pred_xstart.mean(dim=(1, 2, 3))


def test_what_a_loss_takes_from_the_image(run, monkeypatch):
    plain = SamplingRun.build
    recorded = {}
    for scales in ((), (400.0,), (100.0, 300.0)):
        terms = [Darker(scale) for scale in scales]
        monkeypatch.setattr(SamplingRun, "build", lambda run, terms=terms: plain(run)._replace(guidance=terms))
        recorded[len(terms)] = Recorder(run(), [0, 1], ["middle"], apart_interval=2).record()
    guided = run()      # by two losses
    chain = ImageSampler(guided.sample, guided.sampler, guided.build()).chain([0, 1], guided.labels()([0, 1]))
    assert np.array_equal(recorded[2].arrays["sample"], [*chain][-1]["sample"].numpy())
    arrays = {count: {name: value.astype(np.float64) for name, value in one.arrays.items()}
              for count, one in recorded.items()}
    assert [(term.title, term.kind) for term in recorded[1].terms] == [("Darker", "loss")]
    change = arrays[1]["term0_state_change"]
    assert np.abs(change[:, 0]).max() > 0.1 and "term0_change" not in arrays[1]
    # the second x_t is that of the first step without guidance, and what the loss adds
    difference = arrays[1]["x_t"][:, 1] - arrays[0]["x_t"][:, 1]
    assert np.abs(difference - change[:, 0]).max() < 4 * np.finfo(np.float16).eps * np.abs(arrays[1]["x_t"]).max()
    # two losses share the step, each with its own part, which is known at every second step
    assert "state_change" not in arrays[1] and np.allclose(arrays[2]["state_change"], change, rtol=5e-3, atol=1e-4)
    both = [arrays[2][f"term{number}_state_change"] for number in (0, 1)]
    assert all(np.isnan(one[:, 1]).all() for one in (*both, arrays[2]["term0_rms"]))
    both = [one[:, ::2] for one in both]
    assert np.allclose(both[0] * 3, both[1], rtol=5e-3, atol=1e-4)
    assert np.allclose(both[0] + both[1], change[:, ::2], rtol=5e-3, atol=1e-4)
    assert np.allclose(arrays[1]["term0_rms"], np.sqrt((change**2).mean(axis=(2, 3, 4))), rtol=5e-3)


@pytest.mark.parametrize("text, expected", [("0:3", [0, 1, 2]), ("7", [7]), ("5,1,1", [1, 5]), ("0:2,9", [0, 1, 9])])
def test_numbers_of_images(text, expected):
    assert ExploreOptions(images=text).image_ids == expected


@pytest.mark.parametrize("text", ["", "a", "-1", "3:3", "0:65", "1:2:3", "0:1000000000000", ","])
def test_numbers_of_images_that_are_refused(text):
    with pytest.raises(UserError, match="--images"):
        ExploreOptions(images=text)


def test_the_second_setting(run):
    first = run(**SAG)
    assert ExploreOptions().second(first) is None
    assert ExploreOptions(against="none").second(first).title() == "no guidance"
    assert "SAG s = 1" in ExploreOptions(against="--guide_scale=2 'blur_sigma=5'").second(first).title()
    for words, expected in (("seed=3", "seed=3"), ("guide_scale", "NAME=VALUE"), ("guide_scal=2", "did you mean"),
                            ("guide_scale=x", "must be a number"), ("'a", "quotation")):
        with pytest.raises(UserError, match=expected):
            ExploreOptions(against=words).second(first)
    with pytest.raises(UserError, match=r"NAME=VALUE, with an option of guidance or samplers, or none$"):
        ExploreOptions(against="guide_scale").second(first)


def test_the_command(tiny_checkpoints, tmp_path, capsys, caplog):
    line = flags({**TINY, "model_path": tiny_checkpoints / "model.safetensors", "timestep_respacing": 2, **SAG,
                  "images": "0,3", "out": tmp_path / "out", "against": "none"})
    assert call("explore", *line, "--blocks", "nowhere") == 2
    assert "'nowhere' is no attention block" in capsys.readouterr().err
    assert call("explore", *line, "--against", "seed=1") == 2
    capsys.readouterr()
    assert call("explore", *line) == 0
    out = capsys.readouterr().out
    assert f"page:   {tmp_path / 'out' / 'explore.html'}" in out
    with np.load(tmp_path / "out" / "recording.npz") as first, np.load(tmp_path / "out" / "against.npz") as second:
        assert first["image_ids"].tolist() == [0, 3] and first["terms"].tolist() == ["SAG s = 0.5"]
        assert first["scales"].tolist() == [0.5] and first["kinds"].tolist() == ["contrast"]
        assert first["active"].shape == (1, 2) and second["active"].shape == (0, 2)
        assert np.array_equal(first["x_t"][:, 0], second["x_t"][:, 0])
    assert "scripts/explore.py" in (tmp_path / "out" / "explore.html").read_text()
    assert "changes nothing" not in caplog.text
    assert call("explore", *line, "--against", f"guide_scale={SAG['guide_scale']}") == 0
    assert f"--against guide_scale={SAG['guide_scale']}: changes nothing, so that the two" in caplog.text
    assert call("explore", *line, "--against", "") == 0
    assert not (tmp_path / "out" / "against.npz").exists()          # else that of another recording would stand there


def test_a_page_that_is_too_large_leaves_what_was_there(tiny_checkpoints, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    line = flags({**TINY, "model_path": tiny_checkpoints / "model.safetensors", "timestep_respacing": 2, **SAG,
                  "out": out, "against": "none"})
    assert call("explore", *line, "--images", "0") == 0

    def files():
        return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".html", ".npz")}

    before = files()
    assert len(before) == 3
    capsys.readouterr()
    monkeypatch.setattr(explore, "write_page", partial(write_page, limit=1000))
    assert call("explore", *line, "--images", "0:2") == 2
    assert "--images: the page would take" in capsys.readouterr().err and files() == before
    # what is known before is refused before
    monkeypatch.setattr(explore, "check_attention", partial(check_attention, limit=1000))
    monkeypatch.setattr(Recorder, "record", lambda *arguments: pytest.fail("was sampled"))
    assert call("explore", *line, "--images", "0:2") == 2
    told = capsys.readouterr().err
    assert re.search(r"--images: the page would take [\d,]+ bytes for the attention of \d+ blocks alone", told)
    assert "--blocks" in told and files() == before


def test_the_attention_of_a_page_is_counted_before(run):
    recorder = Recorder(run(), [0, 1, 4], [])
    recording = recorder.record()
    assert recorder.block_grids == list(recording.blocks.values())
    data = json.loads(re.search(r'id="data">(.*?)</script>', page([recording], "", ""))[1])
    held = sum(len(one["data"]) for one in data["settings"][0]["attention"].values())
    check_attention(3, [recorder.block_grids], 3, limit=held)
    with pytest.raises(UserError, match=f"{held:,} bytes"):
        check_attention(3, [recorder.block_grids], 3, limit=held - 1)
