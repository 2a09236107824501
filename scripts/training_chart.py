"""Draw the losses of trainings against the images that they have seen, from their logs (progress.csv).

Example:
    python scripts/training_chart.py runs/first/progress.csv runs/second/progress.csv --out losses.png
"""

from collections.abc import Sequence

from evaluations.training_chart import TrainingChartOptions, draw_trainings
from guided_diffusion import dist_util
from guided_diffusion.cli import ShowOptions, log_to_stderr, run_script, tell
from guided_diffusion.options import Words, parse_words


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    logs, (options, show) = parse_words(argv, Words("LOG.csv", "logs of trainings", needed=True), TrainingChartOptions,
                                        ShowOptions, description=__doc__)
    dist_util.one_process()
    tell(draw_trainings(logs, options), show)


if __name__ == "__main__":
    run_script(main)
