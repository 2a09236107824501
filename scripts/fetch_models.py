"""Fetch released checkpoints of guided-diffusion and improved-diffusion, after saying licence and size.

Examples:
    python scripts/fetch_models.py --list
    python scripts/fetch_models.py 128x128_diffusion 128x128_classifier
    python scripts/fetch_models.py cifar10_uncond_50M_500K
    python scripts/image_sample.py --model 128x128_diffusion --model_path models/128x128_diffusion.pt
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import check_sha256
from guided_diffusion.files import check_folder
from guided_diffusion.options import Options, Words, option, parse_words, switch


@dataclass(frozen=True)
class FetchOptions(Options):
    """The checkpoints."""

    all: bool = switch("fetch every released checkpoint")
    list: bool = switch("say what there is and fetch nothing")
    table: bool = switch("print docs/model_zoo.md, the page of all released checkpoints, and fetch nothing")
    out: str = option("models", "folder for the files")
    sha256: str = option("", "SHA-256 in hexadecimal digits that the file of the one NAME must have; unset: any")


def check(names: Sequence[str], options: FetchOptions) -> None:
    """Raises UserError for what would have no effect beside another option, and for what is no SHA-256."""
    chosen = [name for name in ("all", "list", "table") if getattr(options, name)]
    if len(chosen) > 1 and options.table:
        raise UserError(f"--{chosen[0]}: cannot be given with --table")
    if names and (options.all or options.table):
        raise UserError(f"{names[0]}: no NAME can be given with --{chosen[0]}, which is of every released checkpoint")
    if options.sha256 and (options.list or options.table):
        raise UserError(f"--sha256 {options.sha256}: cannot be given with --{chosen[0]}, which fetches nothing")
    if options.sha256:
        check_sha256("--sha256", options.sha256)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    names, (options,) = parse_words(argv, Words("NAME", "released checkpoints, as --list names them"), FetchOptions,
                                    description=__doc__)
    from guided_diffusion import dist_util
    from guided_diffusion.presets import description, fetch_released, find_released  # here, as help needs none of it
    from guided_diffusion.zoo import commands_of, zoo_page

    check(names, options)
    if options.table:
        print(zoo_page(), end="")
        return
    presets = find_released(names, every=options.all or options.list)
    if options.sha256 and len(presets) > 1:
        raise UserError(f"--sha256 {options.sha256}: is that of one file, name one checkpoint")
    if not options.list:
        dist_util.one_process()
        check_folder("--out", options.out)
    for preset in presets:
        print(f"{description(preset, ask=not options.list)}\n    runs in: {', '.join(commands_of(preset))}", flush=True)
    for preset in presets if not options.list else []:
        print(fetch_released(preset, Path(options.out), options.sha256 or None), flush=True)


if __name__ == "__main__":
    run_script(main)
