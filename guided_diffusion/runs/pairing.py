"""Whether images of one number belong together in several finished runs, and what differs beside the guidance."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..build import ModelOptions, UpsamplerOptions
from ..errors import UserError
from ..foreign import read_json
from ..guidance import GUIDANCE
from ..npz import BatchFile
from ..options import cut, option_fields
from .record import MODEL_FLAG, READ_ERRORS, finished_run, identity, name_of

# What is said elsewhere, or changes no image; and guidance that is no method of GUIDANCE, in runs of pipelines.
SAID = ("seed", "labels", "shared_start", "batch_size", "diffusion_steps")
OF_PIPELINES = ("prompt_scale", "sag_scale", "sag_block", "icg_prompts")
MOST_NAMED = 5                  # differences in one sentence
MOST_STAGES = 8                 # of a cascade


@dataclass(frozen=True)
class ComparedRun:
    """A finished run. title: guidance and sampler in words. file: of its samples."""

    folder: Path
    title: str
    file: BatchFile
    configuration: dict[str, Any]

    @property
    def seed(self) -> Any:
        """The seed of its noise."""
        return self.configuration.get("seed")

    @property
    def base_samples(self) -> str:
        """The images that it upsampled, as its options name them; "" where it began with noise alone."""
        return str(self.configuration.get("base_samples") or "")

    @cached_property
    def origins(self) -> list[ComparedRun]:
        """The runs that its images were upsampled from, the last one first, as far as they are still there."""
        found: list[ComparedRun] = []
        path = self.base_samples
        while path and len(found) < MOST_STAGES:
            try:
                base = read_run(Path(path) if Path(path).is_dir() else Path(path).parent)
            except UserError:
                break
            if Path(path).name not in (base.folder.name, base.file.path.name):      # another file in such a folder
                break
            found.append(base)
            path = base.base_samples
        return found

    def origin_of(self, image_id: int) -> tuple[Any, int] | None:
        """The seed and the number of the image that an image began as; None where that is not known."""
        for base in self.origins:
            image_id %= len(base.file)
        first = self.origins[-1] if self.origins else self
        return None if first.base_samples else (first.seed, image_id)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What its images depend on beside the guidance, by flag; {} where its record does not say."""
        try:
            record = read_json(self.folder / "run.json")
            found = identity(self.configuration, dict(record["sha256"]))
            network = record["sha256"].get(name_of(MODEL_FLAG))
        except (*READ_ERRORS, UserError):
            return {}
        path = Path(str(self.configuration.get(MODEL_FLAG, "")))
        known = {MODEL_FLAG: network and f"{path.name} {network[:8]}", "num_samples": len(self.file)}
        return {name: value for name, value in {**found, **known}.items() if name not in _passed_over()}


def read_run(folder: Path) -> ComparedRun:
    """The finished run in a folder. Raises UserError where there is none."""
    run = finished_run(folder)
    return ComparedRun(folder, run.title, BatchFile(run.samples), run.configuration)


def _passed_over() -> set[str]:
    """The flags of guidance, and those that are said elsewhere or follow from the network."""
    kinds = [*GUIDANCE, ModelOptions, UpsamplerOptions]
    return {field.name for kind in kinds for field in option_fields(kind)}.union(SAID, OF_PIPELINES)


def false_pairs(runs: Sequence[ComparedRun], image_ids: Sequence[int]) -> Iterator[str]:
    """A sentence where images of one number begin with other noise: by their seeds, or those of their base images."""
    first = runs[0]
    for run in runs[1:]:
        if run.seed != first.seed:
            yield (f"{run.folder} has seed {run.seed} and {first.folder} seed {first.seed}, so that images of the same "
                   "number begin with different noise")
            return
    for image_id in image_ids:
        known = [(run, origin) for run in runs if (origin := run.origin_of(image_id)) is not None]
        for run, (seed, number) in known[1:]:
            other, (before, base) = known[0]
            if (seed, number) != (before, base):
                yield (f"image {image_id} of {run.folder} began as image {number} of seed {seed} and that of "
                       f"{other.folder} as image {base} of seed {before}, so that images of the same number begin with "
                       "different noise")
                return


def differences(runs: Sequence[ComparedRun], told: Collection[str] = ()) -> Iterator[str]:
    """A sentence on what differs beside the guidance: in the runs, and in those whose images they upsampled.

    told: flags that another sentence is about.
    """
    said = [f"--{name} {values}" for name, values in _differing(runs) if name not in told]
    bases = [run.origins[-1] for run in runs if run.origins]
    said += [f"--{name} {values} of the base images" for name, values in _differing(bases)]
    if said:
        more = f" and {len(said) - MOST_NAMED} more" if len(said) > MOST_NAMED else ""
        yield f"beside the guidance the runs differ in {', '.join(said[:MOST_NAMED])}{more}"


def _differing(runs: Sequence[ComparedRun]) -> Iterator[tuple[str, str]]:
    """Each option in which runs differ, and its values in the order of the runs, like "(ddim, unipc)"."""
    known: list[Mapping[str, Any]] = [run.settings for run in runs if run.settings]
    for name in known[0] if known else ():
        values = [cut(str(settings[name])) or "unset" for settings in known if name in settings]
        if len(values) == len(known) and len(set(values)) > 1:
            yield name, f"({', '.join(dict.fromkeys(values))})"
