"""The type that is fastest here, and compiled blocks, which leave what reads and replaces their inside right."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
from commands import call, flags
from networks import TINY, with_random_weights

from guided_diffusion import dist_util, execution
from guided_diffusion.attention import AttentionBlock
from guided_diffusion.build import ModelOptions
from guided_diffusion.capture import capture_attention, capture_features, override_attention
from guided_diffusion.errors import UserError
from guided_diffusion.execution import Choice, choose_dtype, compile_blocks, compile_for, fastest, time_calls
from guided_diffusion.options import options_from
from guided_diffusion.runs import sample
from guided_diffusion.runs.options import SampleOptions, option_classes
from guided_diffusion.runs.record import identity
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.script_util import create_model

NETWORK = ModelOptions(**TINY)


def run(**given):
    return SamplingRun.of(options_from({**TINY, **given}, SampleOptions, *option_classes()))


# The type


def test_a_less_exact_type_must_be_a_tenth_faster():
    assert fastest({"float32": 1.0, "float16": 0.92, "bfloat16": 0.95}) == "float32"
    assert fastest({"float32": 1.0, "float16": 0.5, "bfloat16": 0.46}) == "float16"
    assert fastest({"float32": 1.0, "bfloat16": 0.9}) == "bfloat16"
    assert fastest({"float32": 1.0, "bfloat16": 8.0}) == "float32"


def test_types_are_timed_on_a_network_of_the_same_shape(monkeypatch):
    monkeypatch.setattr(execution, "SHORTEST", 0.0)
    monkeypatch.setattr(execution, "MOST_ROUNDS", 1)
    choice = choose_dtype(NETWORK, 2, torch.device("cpu"))
    assert set(choice.seconds) == {"float32", "bfloat16"} and choice.dtype in choice.seconds and choice.batch == 1
    said = Choice("bfloat16", {"float32": 0.02, "bfloat16": 0.0125}, 4).line()
    assert said == "--dtype auto: bfloat16; an evaluation of 4 images takes 20 ms in float32, 12.5 ms in bfloat16"


def test_what_is_hopelessly_slow_is_called_once_or_twice(monkeypatch):
    clock, calls = [0.0], {"fast": 0, "slow": 0, "long": 0}

    def taking(name, seconds):
        def function():
            calls[name] += 1
            clock[0] += seconds
        return function
    monkeypatch.setattr(execution.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(execution.time, "monotonic", lambda: clock[0])
    assert time_calls({"fast": taking("fast", 0.25), "slow": taking("slow", 2.0)}) == {"fast": 0.25, "slow": 2.0}
    assert calls["slow"] == 1 and 3 <= calls["fast"] <= 7
    time_calls({"long": taking("long", 3.0)})
    assert calls["long"] == 1


def test_a_type_by_name_and_its_old_flag_are_one_run():
    same = [run(dtype="bfloat16"), run(use_bf16=True), run(dtype="bfloat16", use_fp16=True)]
    identities = [identity(each.configuration(), {}) for each in same]
    assert identities[0] == identities[1] == identities[2]
    assert "dtype" not in identities[0] and "compile" not in identities[0]
    assert [each.configuration()["dtype"] for each in same] == ["bfloat16"] * 3
    assert identity(run(dtype="float32", use_bf16=True).configuration(), {}) == identity(run().configuration(), {})
    assert identity(run(compile=True).configuration(), {})["compile"] is True
    assert run(dtype="auto").changed(dtype="float16").model.use_fp16


def test_auto_says_what_it_took_and_keeps_it(tmp_path, tiny_checkpoints, monkeypatch, caplog):
    caplog.set_level("INFO")
    short = {**TINY, "model_path": tiny_checkpoints / "model.safetensors", "timestep_respacing": 3, "batch_size": 1}
    monkeypatch.setattr(execution, "time_calls", lambda functions: dict(zip(functions, (2.0, 1.0), strict=True)))

    def sampled(out, **options):
        caplog.clear()
        assert call("image_sample", *flags({**short, **options, "out": tmp_path / out})) == 0
        with np.load(tmp_path / out / f"samples_{options['num_samples']}x16x16x3.npz") as file:
            return file["arr_0"], [each.getMessage() for each in caplog.records if "writes" not in each.getMessage()]

    images, said = sampled("auto", dtype="auto", num_samples=1)
    assert said == ["--dtype auto: bfloat16; an evaluation of an image takes 2e+03 ms in float32, 1e+03 ms in bfloat16"]
    named, _ = sampled("named", dtype="bfloat16", num_samples=1)
    assert np.array_equal(images, named)
    monkeypatch.setattr(execution, "time_calls", lambda functions: dict(zip(functions, (1.0, 2.0), strict=True)))
    longer, said = sampled("auto", dtype="auto", use_fp16=True, num_samples=2, keep_shards=True)
    assert said == ["without effect: --use_fp16 (--dtype auto counts)",
                    f"--dtype auto: bfloat16, as the images that are in {tmp_path / 'auto'} already"]
    assert len(longer) == 2 and np.array_equal(longer[:1], images)
    assert call("image_sample", *flags({**short, "use_bf16": True, "num_samples": 2, "out": tmp_path / "auto"})) == 0
    assert call("image_sample", *flags({**short, "dtype": "float32", "num_samples": 2, "out": tmp_path / "auto"})) == 2


def test_rank_0_decides_for_all_ranks(monkeypatch, tmp_path):
    shared, timings = torch.distributed.HashStore(), []
    monkeypatch.setattr(dist_util, "store", lambda name: shared)

    def chosen(*settings):
        timings.append(settings)
        return Choice("bfloat16", {"float32": 2.0, "bfloat16": 1.0}, 1)
    monkeypatch.setattr(sample, "choose_dtype", chosen)
    undecided = run(dtype="auto", out=str(tmp_path))
    assert undecided.decided().model.use_bf16
    monkeypatch.setattr(dist_util, "is_main", lambda: False)
    assert undecided.decided().model.use_bf16 and len(timings) == 1
    named = run(dtype="float16", out=str(tmp_path))
    assert named.decided() is named and len(timings) == 1


def test_a_type_that_there_is_not(capsys):
    assert call("image_sample", "--dtype", "float8") == 2
    assert "--dtype float8: must be one of" in capsys.readouterr().err


# Compiled blocks


def inputs():
    return torch.linspace(-1, 1, 512).view(2, 1, 16, 16), torch.tensor([5, 6]), torch.tensor([0, 1])


@pytest.fixture(scope="module")
def networks():
    """The same network twice, the second one with compiled blocks; torch traces them, and no C++ is compiled."""
    plain, compiled = (with_random_weights(create_model(**TINY)).requires_grad_(False) for _ in range(2))
    compile_blocks(compiled, "eager")
    return plain, compiled


def watched(model):
    """What an evaluation gives while its inside is read, while it is replaced, and again while it is read."""
    x, t, y = inputs()
    found = []
    for attention in (None, lambda q, k, v: v, lambda q, k, v: k, None):
        with capture_attention(model, ["output.0"]) as received, capture_features(model, ["output.1"]) as maps:
            if attention is None:
                out = model(x, t, y)
            else:
                with override_attention(model, ["middle"], attention):
                    out = model(x, t, y)
        found += [out, received["output.0"].received, maps["output.1"]]
    return found


def test_capture_and_overrides_see_every_evaluation_of_compiled_blocks(networks):
    with torch.no_grad():
        expected, found = map(watched, networks)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)
    assert not torch.equal(found[0], found[3]) and torch.equal(found[0], found[9])


def test_gradients_of_compiled_blocks(networks):
    def gradient(model):
        x, t, y = inputs()
        with capture_features(model, ["output.0"], graph=True) as maps:
            model(x.requires_grad_(), t, y)
        return torch.autograd.grad(maps["output.0"].square().sum(), x)[0]

    torch.testing.assert_close(gradient(networks[1]), gradient(networks[0]), rtol=1e-6, atol=0)


def test_every_block_is_compiled_however_many_there_are(networks):
    from torch._dynamo.utils import counters
    assert not counters["recompile_limit"] and not counters["graph_break"]
    blocks = [block for block in networks[1].modules() if getattr(block, "compiled", None)]
    assert len(blocks) > 8 and any(isinstance(block, AttentionBlock) for block in blocks)


def test_what_compilation_gains_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr(execution, "compile_blocks", lambda network: None)
    model = with_random_weights(create_model(**TINY))
    for gain, verdict in ((1.5, r"1\.50 times as fast"), (1.0, "which gains nothing here: leave it off")):
        monkeypatch.setattr(execution, "_timed", set())
        monkeypatch.setattr(execution, "time_calls", lambda _, gain=gain: {"plain": 0.03 * gain, "compiled": 0.03})
        assert re.fullmatch(rf"--compile True: compiled in \d+ s; an evaluation of 2 images takes 30 ms instead of "
                            rf"\d+ ms, {verdict}", compile_for(model, 2))
    assert re.fullmatch(r"--compile True: compiled as before, in [\d.]+ s", compile_for(model, 2))


def test_a_network_that_cannot_be_compiled_is_refused(monkeypatch):
    def fails(function, **options):
        def call(*inputs):
            raise RuntimeError("no C++ compiler\nmore of it")
        return call
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=r"--compile True: .* leave it off \(no C\+\+ compiler\)"):
        compile_for(with_random_weights(create_model(**TINY)), 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.skipif(not os.environ.get("COMPILE"), reason="takes a minute of CPU: set COMPILE=1 to run it")
def test_a_block_compiled_to_machine_code():
    block = AttentionBlock(32, num_heads=2)
    with_random_weights(block).requires_grad_(False)
    x = torch.linspace(-1, 1, 2 * 32 * 16).view(2, 32, 4, 4)
    with torch.no_grad():
        expected = block(x)
        compile_blocks(block)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
