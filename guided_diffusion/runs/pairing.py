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
    def depends_on(self) -> dict[str, Any]:
        """What its images depend on, by flag, files by their names and digests; {} where its record does not say."""
        try:
            sha256 = dict(read_json(self.folder / "run.json")["sha256"])
            found = identity(self.configuration, sha256)
            files = {flag: f"{Path(str(self.configuration.get(flag) or '')).name} {digest[:8]}".strip()
                     for flag in found if (digest := sha256.get(name_of(flag)))}
        except (*READ_ERRORS, UserError):
            return {}
        return {**found, MODEL_FLAG: None, **files, "num_samples": len(self.file)}

    @property
    def settings(self) -> dict[str, Any]:
        """What its images depend on beside the guidance, by flag; {} where its record does not say."""
        passed_over = _passed_over()
        return {name: value for name, value in self.depends_on.items() if name not in passed_over}

    @property
    def guidance(self) -> dict[str, Any]:
        """The options of its guidance, by flag; {} where its record does not say."""
        of_guidance = _of_guidance()
        return {name: value for name, value in self.depends_on.items() if name in of_guidance}


def read_run(folder: Path) -> ComparedRun:
    """The finished run in a folder. Raises UserError where there is none."""
    run = finished_run(folder)
    return ComparedRun(folder, run.title, BatchFile(run.samples), run.configuration)


def _of_guidance() -> set[str]:
    """The flags of guidance alone: some methods have those of the network, too."""
    flags = {field.name for kind in GUIDANCE for field in option_fields(kind)}
    return flags.union(OF_PIPELINES) - {field.name for field in option_fields(ModelOptions)}


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
    """Sentences on what differs beside the guidance, and of the guidance what no title says.

    That is in the runs, and in those whose images they upsampled. told: flags that another sentence is about.
    """
    bases = [run.origins[-1] for run in runs if run.origins]
    said = [f"--{name} {values}" for name, values in _differing([run.settings for run in runs]) if name not in told]
    said += [f"--{name} {values} of the base images" for name, values in _differing([run.settings for run in bases])]
    if said:
        yield f"beside the guidance the runs differ in {_shortly(said)}"
    said = [f"--{name} {values}" for name, values in _untitled(runs)]
    said += [f"--{name} {values} of the base images" for name, values in _untitled(bases)]
    if said:
        yield f"guidance of the same title differs in {_shortly(said)}"


def _shortly(said: Sequence[str]) -> str:
    return ", ".join(said[:MOST_NAMED]) + (f" and {len(said) - MOST_NAMED} more" if len(said) > MOST_NAMED else "")


def _untitled(runs: Sequence[ComparedRun]) -> Iterator[tuple[str, str]]:
    """Each option of guidance in which runs of one title differ, as `_differing`."""
    for title in dict.fromkeys(run.title for run in runs):
        yield from _differing([run.guidance for run in runs if run.title == title])


def _differing(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each option in which runs differ, and its values in the order of the runs, like "(ddim, unipc)"."""
    known = [settings for settings in found if settings]
    for name in known[0] if known else ():
        values = [cut(str(settings[name])) or "unset" for settings in known if name in settings]
        if len(values) == len(known) and len(set(values)) > 1:
            yield name, f"({', '.join(dict.fromkeys(values))})"
