"""Averages of any width from the snapshots of a training that tracked some by power functions (EDM2, section 3.2).

`image_train.py --ema_power 0.05,0.10 --snapshot_images N` keeps the snapshots. They are read one after the other, so
that memory holds one of them and the sums, in float64.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import checkpoint
from ..classes import KEY
from ..errors import UserError
from ..files import check_folder
from ..foreign import reading
from ..late import Tensor, torch
from ..options import Options, option, required
from .averages import FACT, Combination, Kept, PowerProfile, combine, parse_widths
from .start import weight_shapes

_log = logging.getLogger(__name__)

PATTERNS = ("ema_power_*.safetensors", "snapshot_*_ema_power_*.safetensors")
POOR = 0.05                 # relative error of a profile, from which on a line says so
COMMON = ("config", KEY)    # of the metadata, what all snapshots of a training share


@dataclass(frozen=True)
class ReconstructionOptions(Options):
    """The averages to make."""

    sigma_rel: str = required("width of the average, as --ema_power has it; several: 0.07,0.15")
    step: int = option(0, "step of the training after which; one without a snapshot: the last before it that has one; "
                          "0: the last of all", minimum=0)
    out: str = option("", "folder for the files, reconstructed_WIDTH.safetensors; unset: that of the training")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.profiles

    @property
    def profiles(self) -> tuple[PowerProfile, ...]:
        """The wanted profiles; raises UserError for what is none."""
        return parse_widths("sigma_rel", self.sigma_rel)


def reconstruct(folder: str | Path, options: ReconstructionOptions) -> list[Path]:
    """Writes the averages and returns their files; each has the metadata of a training's weights, and how it was made.

    Steps after the last snapshot are in none, so that the averages are those after the last one at or before the wanted
    step, which a line says.
    Raises UserError where the folder holds no such snapshots, or not those of one training, or cannot be written, and
    for a step before the first snapshot or after the last.
    """
    snapshots = find_snapshots(Path(folder))
    last = max(kept.step for kept in snapshots)
    if options.step > last:
        raise UserError(f"--step {options.step}: the last snapshot in {folder} is of step {last}")
    kept = [one for one in snapshots if one.step <= (options.step or last)]
    if not kept:
        raise UserError(f"--step {options.step}: the first snapshot in {folder} is of step "
                        f"{min(one.step for one in snapshots)}")
    step = kept[-1].step
    if options.step not in (0, step):
        _log.info("--step %d: there is no snapshot of it in %s; the averages are those after step %d, the last before "
                  "it that has one", options.step, folder, step)
    out = check_folder("--out", options.out or folder)
    wanted = [(profile, combine(kept, Kept(step, profile))) for profile in options.profiles]
    files = []
    for (profile, combination), tensors in zip(
            wanted, _sums([snapshots[one] for one in kept], [found for _, found in wanted]), strict=True):
        path = out / f"reconstructed_{profile.width:g}.safetensors"
        _say(path, combination, len(kept), step)
        checkpoint.save_state(path, tensors, {
            **_common(snapshots[kept[0]]), "step": str(step), **profile.facts,
            "reconstruction": json.dumps({"snapshots": len(kept), "profile_error": combination.error})})
        files.append(path)
    return files


def find_snapshots(folder: Path) -> dict[Kept, Path]:
    """The averages by power functions that a training keeps in a folder; raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    found: dict[Kept, Path] = {}
    for path in sorted(path for pattern in PATTERNS for path in folder.glob(pattern)):
        metadata = checkpoint.read_metadata(path)
        with reading(path, "is no average by a power function of a training"):
            kept = Kept(int(metadata["step"]), PowerProfile(float(metadata[FACT])))
        if kept.step > 0:
            found[kept] = path
        if _common(path) != _common(next(iter(found.values()), path)):
            raise UserError(f"{path}: is of another network than the other snapshots in {folder}")
    if not found:
        raise UserError(f"{folder}: holds no averages by power functions; a training with --ema_power 0.05,0.10 "
                        "--snapshot_images N keeps them")
    return dict(sorted(found.items(), key=lambda item: (item[0].step, item[0].profile.width)))


def _common(path: Path) -> dict[str, str]:
    metadata = checkpoint.read_metadata(path)
    return {name: metadata[name] for name in COMMON if name in metadata}


def _sums(files: Sequence[Path], combinations: Sequence[Combination]) -> list[dict[str, Tensor]]:
    """For each combination, the sum of the files' tensors times its factors, float32."""
    sums: list[dict[str, Tensor]] = [{} for _ in combinations]
    for i, path in enumerate(files):
        factors = [float(found.factors[i]) for found in combinations]
        if any(factors):
            state = checkpoint.load_state_dict(path)
            _check_shapes(path, state, sums[0])
            for factor, total in zip(factors, sums, strict=True):
                for name, value in state.items():
                    total[name] = total.get(name, 0) + factor * value.double()
    return [{name: value.to(torch.float32) for name, value in total.items()} for total in sums]


def _check_shapes(path: Path, state: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    if others and weight_shapes(state) != weight_shapes(others):
        raise UserError(f"{path}: its weights differ in name or shape from those of the other snapshots")


def _say(path: Path, combination: Combination, count: int, step: int) -> None:
    _log.info("%s: after step %d, of %d snapshots; the profile is met within %.2g of its norm%s", path, step, count,
              combination.error, "" if combination.error < POOR else
              ": poorly, as the width is too far from those that were tracked, or the snapshots are too few")
