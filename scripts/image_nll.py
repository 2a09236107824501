r"""Measure the likelihood of images under a diffusion model, in bits per dimension.

Examples:
    python scripts/image_nll.py --model fmnist32 --data_dir fashion-mnist --split test --timestep_respacing 50 \
        --num_samples 100 --batch_size 20 --out likelihoods/fmnist32
    mpiexec -n 8 python scripts/image_nll.py --model 64x64_diffusion --model_path models/64x64_diffusion.pt \
        --data_dir imagenet/val --batch_size 32 --num_samples 50000
"""

from collections.abc import Sequence

from evaluations.reports import with_page
from guided_diffusion import dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell, with_logdir
from guided_diffusion.options import options_parser
from guided_diffusion.runs.likelihood import LikelihoodOptions, LikelihoodRun
from guided_diffusion.runs.options import preset_values


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr(dist_util.is_main())
    parser = options_parser(argv, ShowOptions, LikelihoodOptions, ModelOptions, DiffusionOptions, description=__doc__)
    _, (show, options, model, diffusion) = parser.read(argv, with_logdir(preset_values))
    run = LikelihoodRun(options, model, diffusion, parser.given)
    result = run.run()
    dist_util.shutdown()
    if result:
        text = f"likelihood: {result}\nby image:   {run.out / 'bpd.npz'}\nby step:    {run.out / 'terms.csv'}"
        tell(with_page(text, run.out, show), show)


if __name__ == "__main__":
    run_script(main)
