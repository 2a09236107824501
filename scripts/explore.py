r"""Look inside a sampling run: step through its images, what guidance changes, and what attention masks, in one page.

Examples:
    python scripts/explore.py --model fmnist32 --timestep_respacing 50 --guide_scale 1.1 --images 0:8 --out explore
    python scripts/explore.py --model scenes32 --timestep_respacing 50 --guide_scale 1.5 --pag_scale 1 \
        --images 0,3,12 --against none --out explore/rooms
    python scripts/explore.py --model fmnist32 --timestep_respacing 25 --guide_scale 1.1 --blocks output.2 \
        --against "guide_scale=1.5 threshold=1.25" --out explore/stronger
"""

from collections.abc import Sequence

from evaluations.explorer.explore import ExploreOptions, explore
from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.jobs import command_line
from guided_diffusion.options import option_fields, options_parser
from guided_diffusion.runs.command import say_without_effect
from guided_diffusion.runs.sample import SamplingRun


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    parser = options_parser(argv, ExploreOptions, ShowOptions, *SamplingRun.classes(), description=__doc__,
                            defaults={"out": "explore"})
    _, (own, show, *options) = parser.read(argv, SamplingRun.preset_values)
    dist_util.one_process()
    run = SamplingRun.of(options)
    others = {field.name for kind in (ExploreOptions, ShowOptions) for field in option_fields(kind)}
    say_without_effect(run, [name for name in parser.given if name not in others])
    tell(explore(run, own, command_line("scripts/explore.py", argv), parser.given), show)


if __name__ == "__main__":
    run_script(main)
