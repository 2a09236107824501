"""Train depth networks on generated images, with and without guidance, and test them on real images.

Examples (each goes on where it was stopped when started again):
    python scripts/dag_depth_training.py scenes32
    python scripts/dag_depth_training.py scenes32 --num_samples 100 --steps 100 --num_test 200 --out runs/small
"""

from collections.abc import Sequence

from evaluations.depth.generated import GeneratedOptions, measure_generated, read_study, study_names
from guided_diffusion.cli import log_to_stdout, run_script
from guided_diffusion.errors import UserError
from guided_diffusion.options import Words, options_parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stdout()
    parser = options_parser(argv, GeneratedOptions, description=__doc__, words=Words(
        "STUDY", f"the study: {', '.join(study_names())}, or a YAML file", needed=True))
    words, _ = parser.read(argv)
    if len(words) > 1:
        raise UserError(f"{words[1]}: one study at a time")
    study = read_study(words[0])
    _, (options,) = parser.read(argv, lambda given: study.options)
    print(measure_generated(study, options), end="")


if __name__ == "__main__":
    run_script(main)
