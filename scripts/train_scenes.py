r"""Train the network that measures samples of rendered rooms, on rooms of a seed that no other network sees.

With --data it learns the depth of other images, and `--backend FILE` of the evaluator and of tables takes its file.
Without options it makes the bundled evaluations/models/scenes.safetensors (seven minutes on one CPU core, after
the rendering) and, beside it, a log with one line per epoch.

Examples:
    OMP_NUM_THREADS=1 python scripts/train_scenes.py --out scenes.safetensors
    OMP_NUM_THREADS=1 python scripts/train_scenes.py --data data/doom32_seed2/train.npz \
        --held_out data/doom32_seed2/test.npz --depth_range 0.28,28.6 --num_images 20020 --num_held_out 1950 \
        --out models/freedoom32_judge.safetensors
"""

from collections.abc import Sequence

from evaluations.extractors.train_scenes import ScenesTrainingOptions, accuracy_in_words, train
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.jobs import command_line
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, = parse_options(argv, ScenesTrainingOptions, description=__doc__)
    dist_util.one_process()
    extractor = train(options, command_line("scripts/train_scenes.py", argv))
    print(f"{options.out}: held out, {accuracy_in_words(extractor.accuracy)}")


if __name__ == "__main__":
    run_script(main)
