r"""Sample a text-to-image pipeline of diffusers, with any list of guidance methods.

Examples:
    python scripts/latent_sample.py --pipeline FOLDER --prompt "a photo of a cat" --sag_scale 0.75 --out samples/cat
    mpiexec -n 8 python scripts/latent_sample.py --pipeline FOLDER --prompts prompts.txt --num_samples 1000 \
        --batch_size 4 --sampler dpm-solver++ --steps 20 --pag_scale 2 --out samples/prompts
"""

from collections.abc import Sequence

from guided_diffusion import dist_util
from guided_diffusion.adapters.run import LatentRun
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.options import options_parser
from guided_diffusion.runs.command import files_of


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr(dist_util.is_main())
    parser = options_parser(argv, ShowOptions, *LatentRun.classes(), description=__doc__)
    _, (show, options, *methods) = parser.read(argv)
    path = LatentRun(options, tuple(methods)).run(parser.given)
    dist_util.shutdown()
    if path is not None:
        tell(files_of(path), show)


if __name__ == "__main__":
    run_script(main)
