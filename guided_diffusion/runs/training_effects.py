"""Which of the flags that a user gave have no effect on a training, in one line, as `effects` says it of a run.

What the weights state of themselves is no such flag, also where the training does not depend on it: the noise schedule
of a classifier that is trained on clean images must be that of the network that it guides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..build import ClassifierOptions, DiffusionOptions, ModelOptions, NetworkOptions, UpsamplerOptions
from ..dist_util import say
from ..guidance import GuidanceOptions
from ..options import Options, Preset, option_fields, options_parser
from ..training.options import ClassifierTrainOptions, LoopOptions, TrainOptions
from .effects import in_words, methods_off, useless_in_network
from .previews import PreviewOptions

if TYPE_CHECKING:
    from ..depth.train import DepthTrainOptions

OF_DIFFUSION = ("learn_sigma", "sigma_small", "use_kl", "predict_xstart", "predict_v", "rescale_learned_sigmas")


def parse_training(argv: Sequence[str] | None, *classes: type, idle: Callable[..., Mapping[str, str]],
                   description: str, preset: Preset) -> list[Any]:
    """One instance of each options class, as `parse_options` fills them; says which flags have no effect.

    idle: from these instances to the reasons by flag. Flags at their defaults are not named.
    """
    parser = options_parser(argv, *classes, description=description)
    _, options = parser.read(argv, preset)
    say(in_words(idle(*options), changed(options, parser.given)))
    return options


def changed(options: Sequence[Options], given: Collection[str]) -> list[str]:
    """The flags among `given` that are not at their defaults."""
    values = {field.name: getattr(one, field.name) != field.default
              for one in reversed(options) for field in option_fields(type(one))}
    return [flag for flag in given if values[flag]]


def idle_in_diffusion(network: ModelOptions | UpsamplerOptions, process: DiffusionOptions, training: TrainOptions,
                      previews: PreviewOptions, *guidance: GuidanceOptions) -> dict[str, str]:
    """The flags that the training of a diffusion model does not depend on, nor its samples on the way, and why."""
    guiding = [method for method in guidance if method.active and _samples(previews)]
    own = {"image_size", *(field.name for one in (network, process) for field in option_fields(type(one)))}
    idle = {flag: why for flag, why in _idle_in_samples(previews, guidance).items() if flag not in own}
    guided = {field.name for method in guiding for field in option_fields(type(method))}
    if not network.class_cond and "num_classes" not in guided:
        idle["num_classes"] = "--class_cond is False"
    return idle | useless_in_network(network) | _idle_in_loop(training, network.use_fp16)


def _samples(previews: PreviewOptions) -> bool:
    """Whether samples are made while training."""
    return bool(previews.grid_interval or previews.eval_fid_interval)


def _idle_in_samples(previews: PreviewOptions, guidance: Sequence[GuidanceOptions]) -> dict[str, str]:
    """The flags of samples while training that are not made, or of methods that do not guide them."""
    idle: dict[str, str] = {}
    if not previews.grid_interval:
        idle["grid_images"] = "--grid_interval is 0"
    if not previews.eval_fid_interval:
        idle |= dict.fromkeys(("eval_fid_reference", "eval_fid_backend", "eval_fid_images"),
                              "--eval_fid_interval is 0")
    if _samples(previews):
        idle |= methods_off(guidance)
        for method in guidance:
            idle |= method.useless() if method.active else {}
        return idle
    why = "no samples are made while training"
    idle |= dict.fromkeys(("preview_sampler", "preview_steps", "preview_batch_size"), why)
    for method in guidance:
        idle |= method.all_useless(why)
    return idle


def idle_in_classifier(network: ClassifierOptions, process: DiffusionOptions, training: ClassifierTrainOptions,
                       ) -> dict[str, str]:
    """The flags that the training of a classifier does not depend on, and why."""
    idle = dict.fromkeys(OF_DIFFUSION, "of diffusion models")
    if not training.val_data_dir:
        idle["eval_interval"] = "--val_data_dir is not given"
    return idle | _idle_in_loop(training, network.classifier_use_fp16)


def _idle_in_loop(training: LoopOptions, in_float16: bool) -> dict[str, str]:
    idle: dict[str, str] = {}
    if not (training.init_from or training.resume_checkpoint):
        idle["checkpoint_entry"] = "neither --init_from nor --resume_checkpoint is given"
    if not in_float16:
        idle["fp16_scale_growth"] = "the network does not compute in float16"
    return idle


def idle_in_predictors(training: DepthTrainOptions, network: NetworkOptions, process: DiffusionOptions,
                       ) -> dict[str, str]:
    """The flags that the training of depth predictors does not depend on, and why."""
    idle = useless_in_network(network)
    if not network.class_cond:
        idle["num_classes"] = "--class_cond is False"
    if not training.draws:
        idle["cache_gb"] = "--draws is 0"
    idle["timestep_respacing"] = "predictors are trained on the whole chain"
    return idle
