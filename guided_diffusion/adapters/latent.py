"""Pipelines of diffusers, sampled by our samplers with any list of guidance methods."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import sampling
from ..dist_util import is_main
from ..errors import NonFiniteError, UserError
from ..grids import CHAIN
from ..guidance.base import without_labels
from ..guidance.classifier import ClassifierGuidance
from ..guidance.depth import DepthConsistencyGuidance, DepthPriorGuidance
from ..guidance.self_attention import SelfAttentionGuidance
from ..late import no_grad
from ..options import shortened
from ..pixels import unit_to_uint8
from ..process import Denoiser, DiffusionProcess, dynamically_thresholded
from ..rng import checked_seed, image_noise, image_numbers
from ..solvers import SolverOptions
from ..steps import SamplerOptions, ddim_step
from ..terms import ContrastGuidance, GradientGuidance, Guidance, LossGuidance, check_number
from .branches import IndependentPromptGuidance, PromptGuidance, UnconditionalBranch
from .networks import DiffusersUNet
from .schedulers import departures, process_of

if TYPE_CHECKING:
    from ..depth.predictor import DepthPredictors
    from ..depth.prior import DepthPrior

LATENT_BLUR_SIGMA, LATENT_BLUR_TAPS = 1.0, 9            # of SAG in diffusers' pipeline
OUTPUT_TYPES = ("pil", "np", "latent")
DECODERS = ("vae", "vqvae")                             # where pipelines keep what makes images of latents
PARTS = ("unet", "scheduler", *DECODERS, "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "bert",
         "feature_extractor")                           # the last one is for parts that are not called
UNCALLED = ("safety_checker", "watermarker", "image_encoder")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
          "negative_pooled_prompt_embeds")              # in the order in which pipelines of SDXL give them
Conditions = Mapping[str, Tensor]
Array = Tensor | np.ndarray

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedded:
    """Prompts as conditions of the network: with the prompt, and, where they are needed, with none in its place."""

    prompts: Conditions
    null: Conditions | None = None

    @property
    def count(self) -> int | None:
        """How many there are; None where the network takes none."""
        return len(next(iter(self.prompts.values()))) if self.prompts else None


class LatentDiffusion:
    """A pipeline of diffusers whose images our samplers make: see `from_pipeline` and `sample`.

    unet: the network, to be given to guidance methods. pipe: its scheduler, and where it has them its VAE and text
    encoders, are used as they are.
    """

    def __init__(self, unet: DiffusersUNet, pipe: Any) -> None:
        self.unet = unet
        self.pipe = pipe
        self._said: set[str] = set()
        channels = unet.unet.config.in_channels
        if channels != (out := unet.unet.config.out_channels) and 2 * channels != out:
            raise UserError(f"{type(pipe).__name__}: its network takes {channels} channels and gives {out}; networks "
                            "that also see an image, as for inpainting, are not supported")

    @classmethod
    def from_pipeline(cls, pipe: Any) -> LatentDiffusion:
        """The pipeline's own network, scheduler, VAE and text encoders; it stays usable, and unchanged.

        pipe: a text-to-image pipeline (Stable Diffusion 1, 2, XL) or an unconditional one (`DDIMPipeline`,
        `DDPMPipeline`, `LDMPipeline`) of diffusers. What of it is not called, as its safety checker, is said in one
        line. Raises UserError for one without a UNet, for networks that take more than latents and prompts, and for
        further parts, as a ControlNet.
        """
        if getattr(pipe, "unet", None) is None or getattr(pipe, "scheduler", None) is None:
            raise UserError(f"{type(pipe).__name__}: must be a pipeline of diffusers with a unet and a scheduler")
        unet = DiffusersUNet(pipe.unet)
        parts = [name for name, part in getattr(pipe, "components", {}).items() if part is not None]
        if further := [name for name in parts if name not in (*PARTS, *UNCALLED)]:
            raise UserError(f"{type(pipe).__name__}: its {', '.join(further)} would have no effect here; must be a "
                            "pipeline without")
        latent = cls(unet, pipe)
        if uncalled := [name for name in parts if name in UNCALLED]:
            latent._say(f"{type(pipe).__name__}: not called: {', '.join(uncalled)}")
        return latent

    @property
    def vae(self) -> Any:
        """The pipeline's VAE, or its VQ model; None where it samples pixels."""
        return next((part for name in DECODERS if (part := getattr(self.pipe, name, None)) is not None), None)

    def self_attention_guidance(self, scale: float, block: str = "middle", blur_sigma: float = LATENT_BLUR_SIGMA,
                                blur_taps: int = LATENT_BLUR_TAPS, **options: Any) -> SelfAttentionGuidance:
        """SAG with the blur of diffusers' pipeline; scale is its `sag_scale`, options are the term's."""
        network: Any = self.unet
        return SelfAttentionGuidance(network, block, scale, blur_sigma, blur_taps=blur_taps, **options)

    @no_grad
    def independent_prompt_guidance(self, scale: float, prompts: Sequence[str] | None = None, *,
                                    prompt_embeds: Array | None = None, pooled_prompt_embeds: Array | None = None,
                                    seed: int = 0, **window: Any) -> IndependentPromptGuidance:
        """Independent condition guidance by prompts: at each step another one is drawn for each image.

        prompts: several, of which one that is the image's own is never drawn; prompt_embeds: (L, T, E) in their place,
        with as many pooled ones for SDXL. The others: see `IndependentPromptGuidance`. Raises UserError for a network
        without prompts, and for embeddings that do not fit it.
        """
        if not self.unet.takes_prompts:
            raise UserError("independent_prompt_guidance: the pipeline's network takes no prompts; for classes there "
                            "is IndependentConditionGuidance")
        embedded = self._embedded(False, prompts, None, prompt_embeds, None, pooled_prompt_embeds, None)
        if len(counts := {len(values) for values in embedded.prompts.values()}) > 1:
            raise UserError("independent_prompt_guidance: prompt_embeds and pooled_prompt_embeds are "
                            f"{sorted(counts)}, they must be as many")
        return IndependentPromptGuidance(scale, embedded.prompts, seed, **window)

    def classifier_guidance(self, classifier: Any, scale: float, **window: Any) -> ClassifierGuidance:
        """Classifier guidance by a classifier of noisy latents (of pixels, where the pipeline samples them).

        classifier: (x_t, step of the scheduler) -> logits (N, classes), which was trained on this noise. Its classes
        are the `labels` of `sample`. Raises UserError for one of our networks that was built for other channels.
        """
        if not callable(classifier):
            raise UserError(f"classifier {shortened(classifier)}: must be a function of x_t and the step, which gives "
                            "logits")
        taken, channels = getattr(getattr(classifier, "config", None), "in_channels", None), self._channels
        if taken not in (None, channels):
            raise UserError(f"classifier_guidance: the classifier takes {taken} channels, and the network samples "
                            f"{channels}; it must have been trained on noisy latents of this pipeline")
        return ClassifierGuidance(classifier, scale, **window)

    def depth_guidance(self, predictors: DepthPredictors, scale: float, prior: DepthPrior | None = None,
                       **options: Any) -> DepthConsistencyGuidance | DepthPriorGuidance:
        """Depth consistency guidance, or with a prior depth prior guidance; options are those of the term.

        predictors: read blocks of `self.unet.feature_blocks`. Raises UserError where they were made for other sizes or
        channels, and for anything else.
        """
        from ..depth.predictor import DepthPredictors, check_fits
        from ..depth.prior import DepthPrior

        if not isinstance(predictors, DepthPredictors):
            raise UserError(f"predictors {shortened(predictors)}: must be DepthPredictors")
        if not isinstance(prior, DepthPrior | None):
            raise UserError(f"prior {shortened(prior)}: must be a DepthPrior, or None for depth consistency guidance")
        network: Any = self.unet
        check_fits(predictors, network, None)
        if prior is None:
            return DepthConsistencyGuidance(network, predictors, scale, **options)
        return DepthPriorGuidance(network, predictors, prior, scale, **options)

    @no_grad
    def sample(self, prompt: str | Sequence[str] | None = None, *, negative_prompt: str | Sequence[str] | None = None,
               prompt_embeds: Array | None = None, negative_prompt_embeds: Array | None = None,
               pooled_prompt_embeds: Array | None = None, negative_pooled_prompt_embeds: Array | None = None,
               labels: Array | None = None, latents: Array | None = None, steps: int = 50,
               sampler: str | SamplerOptions = "ddim", cfg_scale: float = 7.5, guidance: Sequence[Guidance] = (),
               seed: int = 0, numbers: Sequence[int] | None = None, height: int | None = None,
               width: int | None = None, output_type: str = "pil", batch_contrasts: bool = False,
               on_step: Callable[[], object] = lambda: None) -> Any:
        """Images of prompts, or of an unconditional network, all in one batch.

        prompt: one for all images, or one for each; prompt_embeds: (N, T, E) in its place, with pooled ones for SDXL.
        Where cfg_scale is 1 negative ones have no effect, which is said in one line. Arrays of NumPy become tensors.
        labels: (N,) int64, of a network or a classifier with classes. latents: (N, C, h, w), the first noise, in place
        of that of the seed. steps: see `process_of`; where fewer are made, or the scheduler spaces noise levels or ends
        its steps in a way that is not followed, that is said in one line. sampler: a name in `sampling.SAMPLERS`, or
        its options. cfg_scale: diffusers' guidance scale, at least 1, which is off; networks without prompts have none.
        guidance: terms that were given `self.unet`; with cfg_scale on, SAG acts on the evaluation without a prompt, the
        others on that with it.
        numbers: the images' places in the run (0, 1 ... by default): an image depends on seed, number and prompt alone.
        height, width: pixels. output_type: "pil"; "np", (N, H, W, 3) in [0, 1]; or "latent", a tensor (N, C, h, w).
        batch_contrasts: evaluations that do not need each other, as those with and without the prompt, are one batch:
        the same to rounding. A term that differentiates the network's evaluation, as depth guidance, keeps all of them
        apart. on_step: called after each step.
        Raises UserError for what does not fit together, and NonFiniteError for a network or a decoder that gives no
        numbers.
        """
        self._check(cfg_scale, output_type, batch_contrasts, on_step)
        seed, guidance = checked_seed(seed), sampling.listed_terms(guidance)
        latents, labels = _floats("latents", latents), _classes(labels)
        model = self._reading(labels, guidance)
        options, process = self._process(sampler, steps)
        guided = self.unet.takes_prompts and cfg_scale != 1
        embedded = self._embedded(guided, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds,
                                  pooled_prompt_embeds, negative_pooled_prompt_embeds)
        ids = _image_ids(numbers, embedded.count, latents, labels)
        shape = self._shape(height, width, latents)
        embedded = self._with_sizes(_expanded(embedded, len(ids)), shape)
        conditions = {**embedded.prompts, **({} if labels is None else {"y": labels.to(self._device)})}
        together = batch_contrasts and not any(isinstance(term, LossGuidance) for term in guidance)
        if together:
            _check_lengths(embedded, guidance)
        denoise = replace(self._denoiser(model, process, conditions, options), batch_contrasts=together)

        def noise(step: int) -> Tensor:
            return image_noise(seed, ids, step, shape).to(self._device)

        x_T = noise(process.num_timesteps) if latents is None else latents.float().to(self._device)
        terms = _terms(guidance, cfg_scale, embedded.null, together)
        # By its name DDIM is that of diffusers' pipelines, which keeps the network's noise where pixels are clipped.
        as_pipelines = sampler == "ddim" and denoise.denoised_fn is not None
        step = functools.partial(ddim_step, clipped_eps=False) if as_pipelines else options.step()
        chain = sampling.sample_chain(step, denoise, x_T, noise, terms, torch.tensor(ids))
        return self._output(sampling.last(chain, on_step)["sample"], output_type, torch.tensor(ids))

    def check(self, sampler: str | SamplerOptions = "ddim", steps: int = 50, height: int | None = None,
              width: int | None = None) -> None:
        """Raises UserError for a sampler, steps and sizes that `sample` would refuse, without sampling."""
        self._process(sampler, steps)
        self._shape(height, width, None)

    def process(self, sampler: str | SamplerOptions = "ddim", steps: int = 50) -> DiffusionProcess:
        """The process that `sample` goes through where `steps` are asked for; some schedulers make fewer of them."""
        return self._process(sampler, steps)[1]

    def _process(self, sampler: str | SamplerOptions, steps: int) -> tuple[SamplerOptions, DiffusionProcess]:
        """The sampler's options, and the process that it goes through."""
        if steps is None:
            raise UserError("steps None: must be a whole number, the steps that are made")
        options, process = _sampler_options(sampler, steps), process_of(self.pipe.scheduler, steps)
        if isinstance(sampler, str) and process.num_timesteps < options.fewest_steps:
            raise UserError(f"steps {steps}: the scheduler makes {process.num_timesteps} of them, and "
                            f"{sampler} needs {options.fewest_steps} or more")
        walked = options.process(process)
        if walked is process and (line := departures(self.pipe.scheduler, steps, process)):
            self._say(line)
        return options, walked

    def _say(self, line: str) -> None:
        """Logs a line, once, on the first rank."""
        if line not in self._said and is_main():
            self._said.add(line)
            _log.warning(line)

    @property
    def _channels(self) -> int:
        return self.unet.unet.config.in_channels

    def _reading(self, labels: Tensor | None, guidance: Sequence[Guidance]) -> Callable[..., Tensor]:
        """The network; where it has no classes, one that leaves labels to a classifier."""
        if labels is None:
            return self.unet
        if self.unet.has_labels:
            count = self.unet.num_classes
            if count is not None and not ((labels >= 0) & (labels < count)).all():
                raise UserError(f"labels {labels.tolist()}: must be classes from 0 to {count - 1}")
            return self.unet
        if not any(isinstance(term, GradientGuidance) for term in guidance):
            raise UserError("labels: the pipeline's network has no classes, and no classifier is among the guidance")
        return without_labels(self.unet)

    @property
    def _device(self) -> torch.device:
        return self.unet.unet.device

    def _check(self, cfg_scale: float, output_type: str, batch_contrasts: bool, on_step: object) -> None:
        check_number("LatentDiffusion cfg_scale", cfg_scale)
        if cfg_scale < 1:               # off in diffusers, while the formula goes towards no prompt
            raise UserError(f"LatentDiffusion cfg_scale {cfg_scale}: must be at least 1, which is off")
        if not isinstance(batch_contrasts, bool):
            raise UserError(f"batch_contrasts {shortened(batch_contrasts)}: must be True or False")
        if not callable(on_step):
            raise UserError(f"on_step {shortened(on_step)}: must be a function, which is called after each step")
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type {output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}")
        if output_type != "latent" and self.vae is None and self._channels not in (1, 3):
            raise UserError(f"output_type {output_type!r}: the pipeline has no VAE that makes images of latents; take "
                            "'latent'")

    def _denoiser(self, model: Callable[..., Tensor], process: DiffusionProcess, conditions: Conditions,
                  options: SamplerOptions) -> Denoiser:
        """The network with its prompts; a sampler that thresholds by itself does so in place of the scheduler."""
        quantile = options.threshold_quantile
        return process.denoiser(model, clip_denoised=False, denoised_fn=self._bound if quantile is None else None,
                                model_kwargs=conditions, dynamic_threshold=quantile)

    @property
    def _bound(self) -> Callable[[Tensor], Tensor] | None:
        """How the scheduler bounds x0; None where it does not."""
        config = self.pipe.scheduler.config
        if getattr(config, "thresholding", False):              # goes before clip_sample in diffusers, on latents too
            return functools.partial(dynamically_thresholded, quantile=float(config.dynamic_thresholding_ratio),
                                     largest=float(config.sample_max_value))
        if getattr(config, "clip_sample", False):               # pipelines of Stable Diffusion turn it off
            limit = float(getattr(config, "clip_sample_range", 1.0))
            return functools.partial(torch.clamp, min=-limit, max=limit)
        return None

    @property
    def _factor(self) -> int:
        """How many pixels a latent stands for in height and width; 1 where pixels are sampled."""
        if self.vae is None:
            return 1
        known = getattr(self.pipe, "vae_scale_factor", None)
        return int(known or 2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def _multiple(self) -> int:
        """What height and width of latents must be multiples of."""
        unet = self.unet.unet
        # A UNet2DConditionModel gives its upsamplers the odd sizes of its maps, a UNet2DModel does not.
        return 1 if hasattr(unet, "num_upsamplers") else 2 ** (len(unet.down_blocks) - 1)

    def _shape(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        channels = self._channels
        if latents is not None:
            if latents.ndim != 4 or latents.shape[1] != channels or height is not None or width is not None:
                raise UserError(f"latents {tuple(latents.shape)}: must be (N, {channels}, h, w), and then neither "
                                "height nor width is given")
            if any(side < 1 or side % self._multiple for side in latents.shape[2:]):
                raise UserError(f"latents {tuple(latents.shape)}: height and width must be multiples of "
                                f"{self._multiple}, as the network halves them")
            return channels, latents.shape[2], latents.shape[3]
        factor = self._factor
        multiple = factor * self._multiple
        size = self.unet.unet.config.sample_size
        usual = (size, size) if isinstance(size, int) else size
        sizes = []
        for name, value, default in (("height", height, usual and usual[0]), ("width", width, usual and usual[1])):
            if value is None and default is None:
                raise UserError(f"{name}: must be given, as the network's configuration has no sample_size")
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if value is not None and (not whole or value < factor or value % multiple):
                raise UserError(f"{name} {value!r}: must be a multiple of {multiple}")
            sizes.append(int(default) if value is None else int(value) // factor)
        return channels, sizes[0], sizes[1]

    def _embedded(self, guided: bool, prompt: str | Sequence[str] | None, negative: str | Sequence[str] | None,
                  *embeds: Array | None) -> Embedded:
        """What the network is given of the prompts; guided: with classifier-free guidance; embeds: see EMBEDS."""
        given: dict[str, Any] = dict(zip(EMBEDS, embeds, strict=True))
        given = {"prompt": prompt, "negative_prompt": negative, **given}
        names = [name for name, value in given.items() if value is not None]
        if not self.unet.takes_prompts:
            if names:
                raise UserError(f"{names[0]}: the pipeline's network takes none")
            return Embedded({})
        if ("prompt" in names) == ("prompt_embeds" in names):
            raise UserError("prompt: one of prompt and prompt_embeds must be given")
        if "negative_prompt" in names and "negative_prompt_embeds" in names:
            raise UserError("negative_prompt: is given beside negative_prompt_embeds, which stand in its place")
        if not guided and (idle := [name for name in names if name.startswith("negative")]):
            self._say(f"without effect: {', '.join(idle)} (cfg_scale is 1)")
        found = {name: _floats(name, given[name]) for name in EMBEDS}
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            self._check_embeds(name, found[name])
        self._check_pooled("", found)
        if guided:
            self._check_pooled("negative_", found)
        if found["prompt_embeds"] is None or (guided and found["negative_prompt_embeds"] is None):
            if getattr(self.pipe, "text_encoder", None) is None:
                raise UserError("prompt: the pipeline has no text encoder; give prompt_embeds, and, unless cfg_scale "
                                "is 1, negative_prompt_embeds")
            found = dict(zip(EMBEDS, self._encoded(prompt, negative, guided, **found), strict=True))
        return Embedded(self._conditions("", found), self._conditions("negative_", found) if guided else None)

    @property
    def _takes_pooled(self) -> bool:
        """Whether the network is one of SDXL, which sees pooled prompts and sizes."""
        return getattr(self.unet.unet.config, "addition_embed_type", None) == "text_time"

    def _check_embeds(self, name: str, embeds: Tensor | None) -> None:
        """Raises UserError for embedded prompts that do not fit the network."""
        if embeds is not None and (embeds.ndim != 3 or not embeds.shape[1]):
            raise UserError(f"{name} {tuple(embeds.shape)}: must be (N, T, E), T vectors for each prompt, at least one")
        if embeds is not None and (widths := self._prompt_widths) and embeds.shape[2] not in widths:
            raise UserError(f"{name} {tuple(embeds.shape)}: the last must be {' or '.join(map(str, widths))}, the "
                            "cross_attention_dim of the network")

    def _check_pooled(self, which: str, given: Mapping[str, Tensor | None]) -> None:
        """Raises UserError where SDXL is given embedded or pooled prompts alone, or pooled ones that do not fit.

        Others are given none. which: "negative_" for those of no prompt, else "".
        """
        name = f"{which}pooled_prompt_embeds"
        embeds, pooled = given[f"{which}prompt_embeds"], given[name]
        if not self._takes_pooled:
            if pooled is not None:
                raise UserError(f"{name}: the pipeline's network takes none, those of SDXL do")
            return
        if (embeds is None) != (pooled is None):
            raise UserError("pooled_prompt_embeds: must be given with prompt_embeds, and negative ones with those, as "
                            "the network is one of SDXL")
        if pooled is not None and pooled.ndim != 2:
            raise UserError(f"{name} {tuple(pooled.shape)}: must be (N, E), a vector for each prompt")
        config = self.unet.unet.config
        width, embedding = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        if pooled is not None and width != 6 * embedding + pooled.shape[1]:
            raise UserError(f"{name}: their {pooled.shape[1]} values and six sizes do not make the {width} that the "
                            "network takes; networks that refine images are not supported")

    @property
    def _prompt_widths(self) -> list[int]:
        """What embedded prompts may have as last dimension; [] where the network projects them first."""
        network = self.unet.unet
        if getattr(network, "encoder_hid_proj", None) is not None:
            return []
        width = network.config.cross_attention_dim
        return [width] if isinstance(width, int) else sorted(set(width))

    def _encoded(self, prompt: str | Sequence[str] | None, negative: str | Sequence[str] | None, guided: bool,
                 **embeds: Tensor | None) -> tuple[Any, ...]:
        """Embeddings with and without the prompt, and the pooled ones, by the pipeline's own `encode_prompt`."""
        prompts, negatives = _texts("prompt", prompt), _texts("negative_prompt", negative)
        count = len(prompts) if prompts is not None else len(embeds["prompt_embeds"])      # type: ignore[arg-type]
        # None is not "": pipelines of SDXL may take zeros for it (`force_zeros_for_empty_prompt`).
        if negatives is not None and len(negatives) not in (1, count):
            raise UserError(f"negative_prompt: {len(negatives)} of them for {count} prompts, must be one, or as many")
        negatives = negatives * count if negatives is not None and len(negatives) == 1 else negatives
        given = {name: value for name, value in embeds.items() if value is not None}
        found = self.pipe.encode_prompt(
            prompt=prompts, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=guided,
            negative_prompt=negatives if guided and embeds["negative_prompt_embeds"] is None else None, **given)
        return (*found, None, None)[:4]

    def _conditions(self, which: str, given: Mapping[str, Tensor | None]) -> Conditions:
        embeds, pooled = given[f"{which}prompt_embeds"], given[f"{which}pooled_prompt_embeds"]
        if embeds is None:
            raise UserError("negative_prompt_embeds: must be given with prompt_embeds, unless cfg_scale is 1")
        added = {} if pooled is None else {"text_embeds": pooled.to(self._device)}
        return {"encoder_hidden_states": embeds.to(self._device), **added}

    def _with_sizes(self, embedded: Embedded, shape: tuple[int, int, int]) -> Embedded:
        """SDXL also sees sizes: those of the original image, the corner of its crop, and those of the crop."""
        if not self._takes_pooled:
            return embedded
        factor = int(getattr(self.pipe, "vae_scale_factor", 1))
        size = [shape[1] * factor, shape[2] * factor]
        times = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self._device)
        times = times.expand(embedded.count or 1, -1)
        return Embedded({**embedded.prompts, "time_ids": times},
                        None if embedded.null is None else {**embedded.null, "time_ids": times})

    def _output(self, latents: Tensor, output_type: str, image_ids: Tensor) -> Any:
        if output_type == "latent":
            return latents
        images = self.decoded(latents)
        if bad := sampling.not_finite(image_ids, images):           # pixels would be black, without a word
            raise NonFiniteError(f"the decoder returned NaN or infinity for image {bad}; try float32")
        arrays = (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return arrays
        from PIL import Image

        return [Image.fromarray(pixel[..., 0] if pixel.shape[-1] == 1 else pixel) for pixel in unit_to_uint8(arrays)]

    def decoded(self, latents: Tensor) -> Tensor:
        """The images of latents by the VAE, (N, 3, H, W) in [-1, 1]; latents themselves where there is no VAE.

        It is differentiable, so that a classifier of images can guide: `CleanClassifierGuidance` is given
        `lambda latents: classifier(latent.decoded(latents))`. Raises UserError for another shape.
        """
        if not isinstance(latents, Tensor) or latents.ndim != 4 or latents.shape[1] != self._channels:
            raise UserError(f"latents {_described(latents)}: must be a tensor (N, {self._channels}, h, w)")
        if self.vae is None:
            return latents
        vae = self.vae
        with _float32_where_asked(vae):
            latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
            mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
            if mean is not None and std is not None:            # of each channel, in some pipelines of SDXL
                mean, std = (torch.tensor(values).to(latents).reshape(1, -1, 1, 1) for values in (mean, std))
                latents = latents * std + mean
            return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


@contextmanager
def _float32_where_asked(vae: Any) -> Iterator[None]:
    """A VAE in float16 that overflows there (`force_upcast`) computes in float32, in the `with` block."""
    before = vae.dtype
    upcast = before == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(before)


def _described(value: Any) -> str:
    """A value in an error: of a tensor or an array its shape and type."""
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor | np.ndarray) else shortened(value)


def _floats(name: str, value: Any) -> Tensor | None:
    """Latents or embeddings as a tensor; None for none. Raises UserError for anything but finite numbers."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(value.astype(np.float64 if value.itemsize > 4 else np.float32))
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        raise UserError(f"{name} {_described(value)}: must be a tensor of floating-point numbers, or such an "
                        "array of NumPy")
    if not value.isfinite().all():
        raise UserError(f"{name} {_described(value)}: hold NaN or infinity, must be finite numbers")
    return value


def _classes(labels: Any) -> Tensor | None:
    """Labels as a tensor; None for none. Raises UserError for anything but whole numbers (N,)."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind == "i":
        labels = torch.from_numpy(labels.astype(np.int64))
    if labels is not None and (not isinstance(labels, Tensor) or labels.ndim != 1
                               or labels.dtype not in (torch.int64, torch.int32)):
        raise UserError(f"labels {_described(labels)}: must be a tensor (N,) of whole numbers (int64), the classes of "
                        "the images")
    return labels


def _image_ids(numbers: Sequence[int] | None, prompts: int | None, *given: Tensor | None) -> list[int]:
    """The images' numbers; raises UserError where prompts, latents, labels and numbers are not as many."""
    ids = None if numbers is None else image_numbers("numbers", numbers)
    counts = {len(values) for values in (ids, *given) if values is not None}
    if prompts is not None and (prompts > 1 or not counts):
        counts.add(prompts)
    if len(counts) > 1 or 0 in counts:
        raise UserError(f"numbers of images {sorted(counts)}: prompts, latents, labels and numbers must be as many")
    return list(range(counts.pop() if counts else 1)) if ids is None else ids


def _texts(name: str, value: Any) -> list[str] | None:
    """One text or several as a list; None for none. Raises UserError for anything else."""
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name} {value!r}: must be a text, or a list of texts")
    return list(texts)


def _expanded(embedded: Embedded, count: int) -> Embedded:
    """One prompt for all images as one for each."""
    def each(conditions: Conditions) -> Conditions:
        if any(len(value) not in (1, count) for value in conditions.values()):
            raise UserError(f"prompts {sorted({len(value) for value in conditions.values()})}: with and without the "
                            f"prompt they must be one, or as many as images, {count}")
        return {name: value.expand(count, *value.shape[1:]) for name, value in conditions.items()}

    return Embedded(each(embedded.prompts), None if embedded.null is None else each(embedded.null))


def _sampler_options(sampler: str | SamplerOptions, steps: int) -> SamplerOptions:
    """The sampler; a solver named by its name goes through the scheduler's own steps."""
    known = sampler in sampling.SAMPLERS if isinstance(sampler, str) else isinstance(sampler, SamplerOptions)
    if not known:
        raise UserError(f"sampler {shortened(sampler)}: must be one of {', '.join(sampling.SAMPLERS)}, or its options")
    options = sampling.SAMPLERS[sampler]() if isinstance(sampler, str) else sampler
    if not isinstance(options, SolverOptions):
        return options
    if isinstance(sampler, str):
        options = replace(options, solver_grid=CHAIN)
    on_chain = options.solver_grid == CHAIN
    return replace(options, sampling_steps=None if on_chain else options.sampling_steps or steps)


def _check_lengths(embedded: Embedded, guidance: Sequence[Guidance]) -> None:
    """Raises UserError where prompts that shall be one batch have other lengths."""
    pools = [term.pool for term in guidance if isinstance(term, IndependentPromptGuidance)]
    shapes = {tuple(conditions["encoder_hidden_states"].shape[1:])
              for conditions in (embedded.prompts, embedded.null, *pools) if conditions}
    if len(shapes) > 1:
        raise UserError(f"batch_contrasts: embedded prompts of {' and '.join(map(str, sorted(shapes)))} make no batch, "
                        "they must have the same shape")


def _terms(guidance: Sequence[Guidance], cfg_scale: float, null: Conditions | None, together: bool) -> list[Guidance]:
    """The terms of a chain: with classifier-free guidance, those of the unconditional evaluation come before it."""
    if null is None:
        return list(guidance)
    inner = [term for term in guidance if isinstance(term, ContrastGuidance) and term.unconditional]
    first: list[Guidance] = [UnconditionalBranch(inner, null, together)] if inner else []
    return [*first, PromptGuidance(cfg_scale - 1, null), *[term for term in guidance if term not in inner]]
