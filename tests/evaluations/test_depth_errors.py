"""Errors of depth maps, against values worked out by hand."""

import numpy as np
import pytest
import torch

from evaluations.depth_errors import depth_errors


def test_errors_of_depth():
    metres = torch.tensor([2.0, 4.0, 8.0])
    predicted = torch.tensor([3.0, 4.0, 7.0])
    unit = [((x - 1) / 8 * 2 - 1).reshape(1, 1, 1, 3) for x in (predicted, metres)]
    l1, abs_rel, delta = depth_errors(*unit, (1.0, 9.0))[0]
    assert l1 == pytest.approx(0.5 / 3) and abs_rel == pytest.approx((0.5 + 0 + 0.125) / 3)
    assert delta == pytest.approx(2 / 3)
    assert np.isnan(depth_errors(*unit, None)[0, 1:]).all() and np.isnan(depth_errors(*unit, (0.0, 9.0))[0, 1:]).all()
    assert depth_errors(unit[0] + 100, torch.ones(2, 1, 1, 3), None)[:, 0].tolist() == [0, 0]          # clamped
