"""Train the classifier of Fashion-MNIST that measures samples, on the 60,000 training images.

Without options it makes the bundled evaluations/models/fashion_mnist.safetensors (a quarter of an hour on one CPU
core) and, beside it, a log with one line per epoch.

Example:
    OMP_NUM_THREADS=1 python scripts/train_fashion_mnist.py --out classifier.safetensors
"""

from collections.abc import Sequence

from evaluations.extractors.train_fashion_mnist import FashionMnistTrainingOptions, train
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.jobs import command_line
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, = parse_options(argv, FashionMnistTrainingOptions, description=__doc__)
    dist_util.one_process()
    model = train(options, command_line("scripts/train_fashion_mnist.py", argv))
    print(f"{options.out}: test accuracy {model.test_accuracy:.2%}")


if __name__ == "__main__":
    run_script(main)
