"""A new guidance method and a new metric, each one entry in its list, are found in a plan's cost and in a report."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from torch import nn

from evaluations.metrics import METRICS, Metric
from evaluations.metrics.bootstrap import Replicates, resampled_mean
from evaluations.metrics.comparison import Feature
from evaluations.metrics.registry import Resampled
from evaluations.metrics.verdicts import HIGHER
from evaluations.reproduction.costs import cost
from evaluations.reproduction.markdown import markdown
from evaluations.reproduction.measurements import EvaluationSettings, Measurements
from evaluations.reproduction.pictures import Pictures
from evaluations.reproduction.plan import plan
from evaluations.reproduction.report import page
from evaluations.reproduction.results import results
from evaluations.reproduction.tables import Section, Table, read_row
from guided_diffusion.guidance import GUIDANCE, Guidance, GuidanceOptions, Passes
from guided_diffusion.options import option


class Shade(nn.Module):
    """A further network, of one convolution."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1, bias=False)

    def forward(self, x, t):
        return self.layer(x)


@dataclass(frozen=True)
class ShadeOptions(GuidanceOptions):
    """Guidance by shade."""

    short = "shade"
    switched_on: ClassVar = {"shade_scale": 1.0}

    shade_scale: float = option(0.0, "scale; 0: off")

    @property
    def active(self):
        return self.shade_scale != 0

    def headline(self):
        return f"shade {self.shade_scale:g}"

    def build(self, nets):
        return [Guidance(self.shade_scale)]             # a plan builds none

    def networks(self):
        return {"shade network": Shade}

    def schedule(self):
        return [(Guidance(self.shade_scale), Passes(forward=2, others={"shade network": 3}))]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table whose second row has the new method, and whose rows have the new metric."""
    monkeypatch.setattr("guided_diffusion.guidance.GUIDANCE", [*GUIDANCE, ShadeOptions])
    for place in ("guided_diffusion.runs.options", "evaluations.reproduction.titles"):
        monkeypatch.setattr(f"{place}.GUIDANCE", [*GUIDANCE, ShadeOptions])
    metric = Metric("brightness", "Brightness", HIGHER, Feature.POOLED, lambda comparison: 0.0,
                    lambda comparison: Resampled(resampled_mean(np.zeros(4)), 4))
    monkeypatch.setitem(METRICS, "brightness", metric)
    shared = {"model": "fmnist32", "timestep_respacing": "5", "num_samples": 4, "batch_size": 4,
              "evaluation": {"reference": "fmnist32", "backend": "fashion_mnist", "metrics": "brightness"}}
    rows = {name: read_row(name, {**shared, **values, "out": str(tmp_path / name)}, tmp_path / "table.yaml")
            for name, values in {"unguided": {}, "shade": {"shade_scale": 2.0}}.items()}
    return Table("shades", "Shades", "", "", rows, (Section("All", ("unguided", "shade"), "shade_scale"),))


def test_a_new_method_is_counted_in_the_plan(table):
    plain, shaded = (cost(row, "references") for row in table.rows.values())
    assert (shaded.passes.forward, shaded.passes.others) == (15, {"shade network": 15})
    assert shaded.weights - plain.weights == 4
    assert shaded.flops == 3 * plain.flops + 4 * 15 * 4 * 32**2
    assert "| shade | 4 | 5 | 15 + 15 of the shade network |" in plan(table, "references", "", 1, 0.1)


def test_a_new_method_and_a_new_metric_are_in_the_report(table):
    for row in table.rows.values():
        row.run.out.mkdir()
        (row.run.out / "run.json").write_text('{"timing": {"chunks": []}, "sha256": {"samples": "abc"}}')
    spread = np.linspace(-0.1, 0.1, 41)
    numbers = {("unguided", 4): {"brightness": Replicates(0.5, 0.5 + spread)},
               ("shade", 4): {"brightness": Replicates(0.75, 0.75 + spread)}}
    said = results(table, Measurements(numbers, {}), {}, EvaluationSettings("", None, 10, {}))
    said |= {"command": "", "version": "", "device": "", "ranks": 1}
    assert said["rows"]["shade"]["title"] == "shade 2"
    assert said["sections"][0]["rows"][1]["metrics"]["brightness"]["versus"]["verdict"] == "better"
    text, html = markdown(said), page(said, Pictures())
    assert "| row | brightness |" in text and "| shade 2 | 0.75 (0.65 to 0.85), better |" in text
    assert '<th scope="row">shade 2</th>' in html and "brightness<small>higher is better</small>" in html
    assert "brightness against shade_scale" in html
