"""What there is to know of the released checkpoints in words: what each is, how large, and which commands run it."""

from __future__ import annotations

from collections.abc import Iterable

from .presets import Preset, find_preset, released_names
from .progress import in_bytes

COMMANDS = {"diffusion": ("image_sample", "image_nll"), "upsampler": ("super_res_sample",),
            "classifier": ("classifier_sample",)}
HEADINGS = {False: "guided-diffusion (Dhariwal & Nichol, [2105.05233](https://arxiv.org/abs/2105.05233))",
            True: "improved-diffusion (Nichol & Dhariwal, [2102.09672](https://arxiv.org/abs/2102.09672))"}
COLUMNS = ("name", "kind", "images", "size", "classes", "parameters", "file, about", "commands")
PAGE = """# Model zoo

All {count} checkpoints that OpenAI released with these codes. This page is made by

```sh
python scripts/fetch_models.py --table
```

[Released checkpoints](checkpoints.md) tells how to fetch and run them. Files hold float32, so the size follows from the
number of parameters. No released checkpoint could be downloaded where this project was developed: names and shapes of
the weights of 22 are proven to be those of our networks (those of `lsun_horse_nodropout` are taken to be those of
`lsun_horse`), no image of them was sampled.
"""


def commands_of(preset: Preset) -> list[str]:
    """The commands that run a released checkpoint."""
    guided = ["classifier_sample"] if preset.classifier else []
    return [*COMMANDS[preset.kind], *guided]


def zoo_page() -> str:
    """The page of all released checkpoints, in Markdown."""
    presets = [find_preset(name) for name in released_names()]
    parts = [PAGE.format(count=len(presets))]
    for improved, heading in HEADINGS.items():
        chosen = [preset for preset in presets if preset.implied is improved]
        if chosen:
            address = str(chosen[0].url).rpartition("/")[0]
            parts.append(f"## {heading}\n\nLicence: {chosen[0].licence}. Address: {address}/NAME.pt\n\n"
                         f"{_table(_row(preset) for preset in chosen)}\n")
    return "\n".join(parts)


def _row(preset: Preset) -> tuple[str, ...]:
    options, count = preset.options, preset.parameters or 0
    size = options.get("image_size", options.get("large_size"))
    shown = f"{options['small_size']} to {size}" if preset.kind == "upsampler" else f"{size}"
    classes = "yes" if options.get("class_cond") or preset.kind == "classifier" else "no"
    return (f"`{preset.name}`", preset.kind, preset.data, shown, classes, f"{count:,}", in_bytes(4 * count),
            ", ".join(f"`{command}`" for command in commands_of(preset)))


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
