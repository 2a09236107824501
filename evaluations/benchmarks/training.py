"""Steps of training here beside those of a clone of the official code: the same weights and images, in turn, as ratios.

A step is all that a loop does with a batch of images in memory: timesteps and noise, the loss, its gradient, AdamW, the
moving average and what is logged. The clone runs as one process, without exchanges between ranks.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.build import DiffusionOptions, ModelOptions, build_diffusion, build_model
from guided_diffusion.errors import UserError
from guided_diffusion.files import reason
from guided_diffusion.late import Tensor, torch
from guided_diffusion.logger import MetricLogger
from guided_diffusion.options import options_from
from guided_diffusion.pixels import from_uint8
from guided_diffusion.resample import UniformSampler
from guided_diffusion.train_util import Network, TrainingBatch, TrainLoop
from guided_diffusion.training.options import TrainOptions

from .against import AGREEMENT, ALIAS, AgainstOptions, Shape, official_copy, official_networks, seeded_weights
from .speed import CallCost, measure_calls

if TYPE_CHECKING:
    from guided_diffusion.unet import UNetModel

NEEDED_BY_CLONES = ("blobfile", "mpi4py")       # for files elsewhere and several ranks, neither of which is used here
NEVER = 10**9                                   # steps
RATE = 1e-4


@dataclass(frozen=True)
class TrainingCosts:
    """What was measured of a shape. batch: images of a step. here, official: of a step.

    deviation: of the two losses of the same images, timesteps and noise, the largest, relative to the largest loss.
    """

    batch: int
    here: CallCost
    official: CallCost
    deviation: float

    @property
    def speedup(self) -> float:
        """How many times as many images a second as the clone: the median over the rounds."""
        return self.official.ratio(self.here)


def benchmark_training(options: AgainstOptions, rounds: int) -> str:
    """Measures every chosen shape, and returns the table as Markdown. Raises UserError where the clone is none."""
    networks, device = official_networks(options.against), dist_util.dev()
    with _placeholders(NEEDED_BY_CLONES), tempfile.TemporaryDirectory() as folder:
        clone = _clone(options.against, Path(folder))
        found = {name: compare_training(networks, clone, shape, rounds, Path(folder) / str(number))
                 for number, (name, shape) in enumerate(options.chosen.items())}
    return training_table(found, str(device))


@contextlib.contextmanager
def _placeholders(names: tuple[str, ...]) -> Iterator[None]:
    """Empty modules under the names of those that are not installed, for the length of the block."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    for name in missing:
        module: Any = ModuleType(name)
        module.MPI = None
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _clone(path: str, folder: Path) -> SimpleNamespace:
    """The modules of the clone that train, set up for one process that logs nothing to files or the screen."""
    try:
        names = ("train_util", "script_util", "resample", "dist_util", "logger")
        clone = SimpleNamespace(**{name: importlib.import_module(f"{ALIAS}.{name}") for name in names})
        one_process = SimpleNamespace(get_world_size=lambda: 1, get_rank=lambda: 0, barrier=lambda: None,
                                      broadcast=lambda tensor, source: None)
        clone.train_util.dist = clone.dist_util.dist = one_process
        clone.train_util.DDP = lambda model, **options: model
        clone.logger.configure(dir=str(folder), format_strs=[])
    except (ImportError, OSError, SyntaxError, AttributeError) as error:
        raise UserError(f"--against {path}: its training cannot be run ({reason(error)})") from None
    return clone


def compare_training(networks: ModuleType, clone: SimpleNamespace, shape: Shape, rounds: int, folder: Path,
                     ) -> TrainingCosts:
    """Steps of both loops in turn, `rounds` times. folder: for files that the loops want to have.

    Raises UserError where their losses differ by more than AGREEMENT.
    """
    model_options, diffusion_options = options_from(dict(shape.flags), ModelOptions, DiffusionOptions)
    device, size = dist_util.dev(), model_options.image_size
    model = seeded_weights(build_model(model_options)).to(device)
    pixels = np.random.default_rng(0).integers(0, 256, (shape.batch, size, size, 3), np.uint8)
    images = torch.from_numpy(from_uint8(pixels)).movedim(3, 1).contiguous()
    other = official_copy(networks, model, device).requires_grad_(True).train()
    their_diffusion = clone.script_util.create_gaussian_diffusion(
        steps=diffusion_options.diffusion_steps, learn_sigma=diffusion_options.learn_sigma,
        noise_schedule=diffusion_options.noise_schedule)
    loop, loss = _own_loop(model, (model_options, diffusion_options), images, folder)
    deviation = _deviation(loss, loop.network, their_diffusion, other, images.to(device))
    theirs = clone.train_util.TrainLoop(
        model=other, diffusion=their_diffusion, data=itertools.repeat((images, {})), batch_size=shape.batch,
        microbatch=-1, lr=RATE, ema_rate="0.9999", log_interval=NEVER, save_interval=NEVER, resume_checkpoint="",
        schedule_sampler=clone.resample.UniformSampler(their_diffusion))
    logger = MetricLogger(None)
    costs = measure_calls({
        "here": _with_gradients(lambda: loop.run_step(logger)),
        "official": _with_gradients(lambda: theirs.run_step(*next(theirs.data)))}, rounds, [])
    return TrainingCosts(shape.batch, costs["here"], costs["official"], deviation)


def _own_loop(model: UNetModel, options: tuple[ModelOptions, DiffusionOptions], images: Tensor, folder: Path,
              ) -> tuple[TrainLoop, Callable[[Network, TrainingBatch], dict[str, Tensor]]]:
    """The loop of this project and its losses; images: the batch of every step."""
    diffusion = build_diffusion(options[1])

    def losses(network: Network, batch: TrainingBatch) -> dict[str, Tensor]:
        return diffusion.training_losses(network, batch.images, batch.t, model_kwargs=batch.cond, noise=batch.noise)

    folder.mkdir()
    np.savez(folder / "images.npz", arr_0=np.zeros((1, 1, 1, 3), np.uint8))      # whose digest a training records
    training = TrainOptions(data_dir=str(folder / "images.npz"), out=str(folder), batch_size=len(images), lr=RATE)
    config = {name: value for one in options for name, value in asdict(one).items()}
    sampler = UniformSampler(diffusion.num_timesteps)
    return TrainLoop(model, losses, sampler, lambda *_: itertools.repeat((images, {})), training, config), losses


def _deviation(losses: Callable[[Network, TrainingBatch], dict[str, Tensor]], network: Network, diffusion: Any,
               other: Network, images: Tensor) -> float:
    """How far the two losses of the same images are apart; raises UserError where that is no rounding."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    t = torch.linspace(0, diffusion.num_timesteps - 1, len(images)).long().to(images.device)
    with torch.no_grad():
        own = losses(network, TrainingBatch(images, noise, t, torch.ones(len(t)), {}))["loss"]
        theirs = diffusion.training_losses(other, images, t, noise=noise)["loss"]
    deviation = float((own - theirs).abs().max() / theirs.abs().max())
    if not deviation < AGREEMENT:
        raise UserError(f"--against: the clone's loss differs by {deviation:.1e} of the largest value, at most "
                        f"{AGREEMENT:.0e} is rounding")
    return deviation


def _with_gradients(function: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with torch.enable_grad():
            return function()
    return call


def training_table(found: Mapping[str, TrainingCosts], device: str) -> str:
    """The comparison as Markdown."""
    lines = [f"float32 on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of the "
             "ratios of interleaved rounds", "",
             "| shape | this / official images a second | images a second, official / this | peak MiB, official / this "
             "| losses agree within |", "|---|---|---|---|---|"]
    for name, one in found.items():
        rates = " / ".join(f"{1000 * one.batch / each.median:.3g}" for each in (one.official, one.here))
        memory = " / ".join(f"{each.memory:.0f}" for each in (one.official, one.here))
        lines.append(f"| {name} | {one.speedup:.2f} | {rates} | {memory} | {one.deviation:.0e} |")
    return "\n".join(lines)
