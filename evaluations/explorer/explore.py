"""Exploring a sampling run: chosen images are recorded, under one setting or two, and written as arrays and a page.

The output folder holds explore.html, which is the whole page, and recording.npz (see `recording.Recording`); with a
second setting also against.npz, its recording.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from guided_diffusion.errors import UserError
from guided_diffusion.guidance import GUIDANCE
from guided_diffusion.jobs import job, job_folder
from guided_diffusion.options import Options, comma_separated, image_numbers, nearest, option, option_fields
from guided_diffusion.progress import progress_bar
from guided_diffusion.runs.command import say_without_effect
from guided_diffusion.runs.record import identity
from guided_diffusion.runs.sample import SamplingRun
from guided_diffusion.sampling import SAMPLERS

from .page import check_attention, write_page
from .recording import APART_INTERVAL, Recorder

LOG = logging.getLogger(__name__)

MOST_IMAGES = 64
OF_FILES = ("num_samples", "overwrite", "keep_shards", "log_every", "auto_batch", "compile")
PLAIN = "none"


@dataclass(frozen=True)
class ExploreOptions(Options):
    """The explorer."""

    images: str = option("0:8", "numbers of the images, like 0:8 (0 to 7) or 3,5,12")
    blocks: str = option("", "attention blocks to record, like middle,output.2; unset: all")
    against: str = option("", "a second setting of the same seeds: other values of options of guidance and samplers, "
                         f"like \"guide_scale=1.5 blur_sigma=9\", or {PLAIN} for no guidance")
    apart_interval: int = option(APART_INTERVAL, "where several losses guide, as in DAG, steps between two at which "
                                 "it is recorded what each of them changes; 1: each step, which takes longer",
                                 minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.image_ids          # which raises for what is not allowed

    @property
    def image_ids(self) -> list[int]:
        """The numbers of the images, rising. Raises UserError for anything but one to MOST_IMAGES different numbers."""
        return image_numbers(self.images, MOST_IMAGES)

    def second(self, run: SamplingRun) -> SamplingRun | None:
        """The run of --against; None where there is none. Raises UserError for what is not allowed there."""
        if not self.against:
            return None
        if self.against.strip() == PLAIN:
            return replace(run, guidance=tuple(type(one)() if one.active else one for one in run.guidance))
        known = {"sampler", "use_ddim"}
        known |= {field.name for kind in (*GUIDANCE, *SAMPLERS.values()) for field in option_fields(kind)}
        values = {}
        for word in _words(self.against):
            name, equals, value = word.removeprefix("--").partition("=")
            if not equals or name not in known:
                near = "" if name in known else nearest(name, known)
                raise UserError(f"--against {word}: must be NAME=VALUE, with an option of guidance or samplers"
                                f"{near}, or {PLAIN}")
            values[name] = value
        second = run.changed(**values)
        say_without_effect(second, list(values))
        return second


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        raise UserError(f"--against {text}: a quotation mark is missing") from None


def explore(run: SamplingRun, options: ExploreOptions, command: str, given: Collection[str] = ()) -> str:
    """Records, writes the files into the output folder of the run, and says where they are.

    command: the command line, which the page shows. given: options that the user gave; those of OF_FILES have no
    effect, which is logged. Raises UserError for whatever is wrong with the options, and for attention that no page can
    hold, before the first image is sampled; also for pictures that turn out to be too large, which leaves the files of
    a recording before as they are.
    """
    idle = [f"--{name}" for name in OF_FILES if name in given]
    if idle:
        LOG.warning("without effect: %s (they are of runs that write samples)", ", ".join(idle))
    folder, image_ids = job_folder("explorer", run.out), options.image_ids
    run = run.decided().changed(num_samples=image_ids[-1] + 1)          # as many as need labels
    runs = {"recording": run}
    second = options.second(run)
    if second is not None:
        if second.num_steps != run.num_steps:
            raise UserError(f"--against {options.against}: makes {second.num_steps} steps, and the run {run.num_steps}"
                            ", which must be the same")
        if identity(second.configuration(), {}) == identity(run.configuration(), {}):
            LOG.warning("--against %s: changes nothing, so that the two recordings are the same", options.against)
        runs["against"] = second
    blocks = comma_separated(options.blocks)
    recorders = [Recorder(one, image_ids, blocks, options.apart_interval) for one in runs.values()]
    if "apart_interval" in given and not any(recorder.shared for recorder in recorders):
        LOG.warning("without effect: --apart_interval (no step is guided by several losses)")
    check_attention(len(image_ids), [recorder.block_grids for recorder in recorders], run.num_steps)
    with job("explorer", folder):
        return _write(runs, recorders, folder, command)


def _write(runs: Mapping[str, SamplingRun], recorders: Sequence[Recorder], folder: Path, command: str) -> str:
    """Records all runs, writes the files into the folder, and says where they are."""
    run, image_ids = runs["recording"], recorders[0].image_ids
    steps = sum(one.num_steps for one in runs.values()) * len(image_ids)
    with progress_bar(steps, "recording", "step") as progress:
        recordings = [recorder.record(progress.update) for recorder in recorders]
    model = run.sample.model or Path(run.sample.model_path).name
    title = f"{model}: {run.num_steps} step{'s' * (run.num_steps > 1)}, seed {run.sample.seed}"
    size = write_page(folder / "explore.html", recordings, title, command)
    for left in ("recording.npz", "against.npz"):           # of a recording before; this one may not have the second
        (folder / left).unlink(missing_ok=True)
    lines = []
    for name, recorder, recording in zip(runs, recorders, recordings, strict=True):
        recording.write(folder / f"{name}.npz")
        lines.append(f"arrays: {folder / f'{name}.npz'} ({recording.bytes:,} bytes, and as much memory)")
        if not recorder.shared <= recorder.apart:
            lines.append(f"        what each loss changes is in {len(recorder.shared & recorder.apart)} of the "
                         f"{len(recorder.shared)} steps at which several guide (--apart_interval 1: in all)")
    return "\n".join([f"page:   {folder / 'explore.html'} ({size:,} bytes)", *lines])

