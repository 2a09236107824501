"""Trainings of diffusion models and of noise-aware classifiers: networks, data and losses for `TrainLoop`."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from . import checkpoint, dist_util
from .build import (
    ClassifierOptions,
    DiffusionOptions,
    ModelOptions,
    UpsamplerOptions,
    build_classifier,
    build_diffusion,
    build_model,
)
from .classes import ClassNames, names_of_run, stored_names
from .digests import data_digest
from .dist_util import say
from .errors import UserError
from .fetch import without_secrets
from .files import lies_in
from .image_datasets import BatchPlan, FolderImages, TrainingImages, find_data, given_as, holds_idx, open_images
from .late import F, Tensor, nn, torch
from .log_sinks import check_sinks
from .resample import UniformSampler, create_named_schedule_sampler
from .rng import seeded_torch, stream_generator
from .training.averages import sampled
from .training.batch import Data, DropLabels, Network, TrainingBatch
from .training.folder import Record, locked_folder
from .training.loop import TrainLoop
from .training.options import ClassifierTrainOptions, LoopOptions, TrainOptions
from .training.start import LABELS, other_classes
from .training.state import FILE
from .training.watch import Watched, Watcher

__all__ = ["Network", "TrainLoop", "TrainOptions", "TrainingBatch", "classification_losses", "in_small",
           "label_dropout", "train_classifier", "train_diffusion"]


def train_diffusion(model_options: ModelOptions | UpsamplerOptions, diffusion_options: DiffusionOptions,
                    options: TrainOptions, watchers: Sequence[Watcher] = ()) -> None:
    """Trains a diffusion model on images; raises UserError as `TrainLoop` and `load_data` do.

    An upsampler sees beside each noisy image the same one in small, made by averaging areas, as in the official code.
    watchers: look at the network while it is trained.
    """
    dist_util.connect()
    with dist_util.together():
        check_sinks(options.log)
        _check_whole_chain(diffusion_options)
        model_options = _with_null_class(model_options, options)
    if options.ema_power and not options.snapshots:
        say(f"--ema_power {options.ema_power}: no snapshots are kept, as --snapshot_images is 0, so that no other "
            "widths can be made after the training")
    config = {**asdict(model_options), **asdict(diffusion_options)}
    with dist_util.together():
        with seeded_torch("weights", options.seed):
            model = build_model(model_options)
        diffusion = build_diffusion(diffusion_options)
        sampler = create_named_schedule_sampler(options.schedule_sampler, diffusion)
    images = _images(options, model_options, options.data_dir, model_options.class_cond, known=_known_names(options))
    with dist_util.together():
        _check_classes(model, model_options.num_classes, options, images)
        say(images.without_images())
    names = _class_names(options, images, model_options.num_classes)
    data = _numbered_data(options, images)
    low_res = (functools.partial(in_small, size=model_options.small_size)
               if isinstance(model_options, UpsamplerOptions) else None)

    def losses(network: Network, batch: TrainingBatch) -> dict[str, Tensor]:
        cond = dict(batch.cond)
        if low_res:
            cond["low_res"] = low_res(batch.images)
        return diffusion.training_losses(network, batch.images, batch.t, model_kwargs=cond, noise=batch.noise)

    with locked_folder(options.out):
        drop = None
        if model.null_label is not None and options.label_dropout:
            drop = label_dropout(options.label_dropout, model.null_label, options.seed)
        loop = TrainLoop(model, losses, sampler, data, options, config, class_names=names,
                         drop_labels=drop, watchers=watchers)
        if not loop.finished:
            profile = sampled(options.profiles)
            watched = Watched(model, profile.name if profile else "model", model_options, diffusion_options, loop.out,
                              options.seed, images.count, images.at, names, low_res)
            for watcher in watchers:
                watcher.prepare(watched)
        loop.run()
    averages = sorted(profile.name for profile in options.profiles)
    command = "super_res_sample.py --base_samples FILE" if low_res else "image_sample.py"
    _say_files(options.out, ["model", *averages], f"{command} --model {shlex.quote(str(Path(options.out)))}")


def _with_null_class(network: ModelOptions | UpsamplerOptions, options: TrainOptions,
                     ) -> ModelOptions | UpsamplerOptions:
    """The options of the network: with a null class where labels are dropped, or the run that goes on has one.

    Raises UserError for a null class that would stay random: without dropped labels, and in no weights at the start.
    """
    if options.label_dropout:
        if not network.class_cond:
            raise UserError(f"--label_dropout {options.label_dropout:g}: needs a network with labels, "
                            "--class_cond True")
        return replace(network, null_class=True)
    state = Path(options.out) / FILE
    before = (Record.read(state.parent) or Record.stated_by(state)) if state.exists() else None
    if before is not None and before.model.get("null_class") and network.class_cond:
        if not network.null_class:
            say(f"--null_class True: as the run in {options.out} has it, which goes on")
        return replace(network, null_class=True)
    if network.null_class and network.class_cond and before is None and not _starts_with_null_class(network, options):
        raise UserError("--null_class True: is never trained without --label_dropout; give one, like --label_dropout "
                        "0.1")
    return network


def _starts_with_null_class(network: ModelOptions | UpsamplerOptions, options: TrainOptions) -> bool:
    """Whether the weights that a training starts from have its null class: by their shapes, and as they state."""
    path = options.init_from or options.resume_checkpoint
    if not path:
        return False
    try:
        labels = checkpoint.load_state_dict(path, entry=options.checkpoint_entry).get(LABELS)
    except UserError:           # of a file that cannot be read, which says so when it is loaded
        return True
    return (labels is not None and len(labels) == network.num_classes + 1
            and not other_classes(path, asdict(network)))


def _check_whole_chain(options: DiffusionOptions) -> None:
    """Raises UserError for fewer steps: sampling, which is not told of them, would use steps that were not trained."""
    if options.timestep_respacing:
        raise UserError(f"--timestep_respacing {options.timestep_respacing}: is of sampling, a network is trained on "
                        "all --diffusion_steps; leave it out")


def in_small(images: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W) as size x size ones, each value the mean of an area, as upsamplers are trained on them."""
    return F.interpolate(images, (size, size), mode="area")


def train_classifier(classifier_options: ClassifierOptions, diffusion_options: DiffusionOptions,
                     options: ClassifierTrainOptions) -> None:
    """Trains a noise-aware classifier (Dhariwal & Nichol, section 4), or one of clean images (`noised` False)."""
    dist_util.connect()
    with dist_util.together():
        check_sinks(options.log)
        _check_whole_chain(diffusion_options)
    config = {**asdict(classifier_options), **asdict(diffusion_options)}

    def losses(network: Network, batch: TrainingBatch) -> dict[str, Tensor]:
        t = batch.t if options.noised else torch.zeros_like(batch.t)
        x = diffusion.q_sample(batch.images, t, noise=batch.noise) if options.noised else batch.images
        return classification_losses(network(x, diffusion.model_timesteps(t)), batch.cond["y"])

    validation = None
    with dist_util.together():
        with seeded_torch("weights", options.seed):
            classifier = build_classifier(classifier_options)
        diffusion = build_diffusion(diffusion_options)
    images = _images(options, classifier_options, options.data_dir, True, known=_known_names(options))
    with dist_util.together():
        _check_classes(classifier, classifier_options.num_classes, options, images)
        say(images.without_images())
    if options.val_data_dir:
        held_out = _images(options, classifier_options, options.val_data_dir, True, known=images.class_names,
                           held_out=True)
        with dist_util.together():
            _check_validation(options, held_out, images, classifier_options.num_classes)
        validation = _numbered_data(replace(options, random_flip=False, random_crop=False), held_out)
    names = _class_names(options, images, classifier_options.num_classes)
    data = _numbered_data(options, images)
    with locked_folder(options.out):
        TrainLoop(classifier, losses, UniformSampler(diffusion.num_timesteps), data, options, config, validation,
                  names).run()
    weights = shlex.quote(str(Path(options.out) / "model.safetensors"))
    command = ("classifier_sample.py --model DIFFUSION_RUN --classifier_path" if options.noised else
               "image_sample.py --model DIFFUSION_RUN --clean_classifier_scale 1 --clean_classifier_path")
    _say_files(options.out, ["model"], f"{command} {weights}")


def _say_files(out: str, names: Sequence[str], command: str) -> None:
    """Logs the files of a finished training, and the command that samples with them."""
    say(f"weights: {', '.join(str(Path(out) / f'{name}.safetensors') for name in names)}")
    say(f"to sample: python scripts/{command}")


def label_dropout(share: float, null_label: int, seed: int) -> DropLabels:
    """Replaces the labels of a share of the images by the null label (Ho & Salimans, 2207.12598, algorithm 1)."""
    def drop(labels: Tensor, step: int, rank: int) -> Tensor:
        count = len(labels)
        draws = stream_generator("label dropout", seed, step).random((rank + 1) * count)[-count:]
        return torch.where(torch.from_numpy(draws < share), null_label, labels)
    return drop


def classification_losses(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross entropy in nats, and whether the label is among the 1 and the 5 most likely.

    logits: (N, num_classes); labels: (N,). Returns "loss", "acc@1" and "acc@5", each (N,).
    """
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return {"loss": F.cross_entropy(logits, labels, reduction="none"),
            "acc@1": hits[:, 0].float(), "acc@5": hits.any(dim=1).float()}


def _check_classes(network: nn.Module, num_classes: int, options: LoopOptions, images: TrainingImages) -> None:
    """Raises UserError unless the network has the classes of the images; more, where its training goes on with them."""
    given = _is_given(network, num_classes, options, images)
    images.check_classes(num_classes, trained=given, resumed=given)


def _is_given(network: nn.Module, num_classes: int, options: LoopOptions, images: TrainingImages) -> bool:
    """Whether a network of more classes than the images have names is that of weights that the training goes on with.

    They are those in the folder, else of --resume_checkpoint.
    """
    if images.class_names is None or len(images.class_names) >= num_classes:
        return False
    state = Path(options.out) / FILE
    if state.exists():
        before = Record.read(state.parent) or Record.stated_by(state)
        return before is not None and before.model.get("num_classes") == num_classes
    if not options.resume_checkpoint:
        return False
    with contextlib.suppress(UserError):              # of a file that cannot be read, which says so when it is loaded
        weights = checkpoint.load_state_dict(options.resume_checkpoint, entry=options.checkpoint_entry)
        return all(name in weights and weights[name].shape == value.shape
                   for name, value in network.state_dict().items())
    return False


def _known_names(options: LoopOptions) -> ClassNames | None:
    """The classes, where the run that goes on here or the weights that it starts from have them."""
    out = Path(options.out)
    return (names_of_run(out) if (out / FILE).exists() else None) or _names_at_start(options)


def _names_at_start(options: LoopOptions) -> ClassNames | None:
    """The classes that the weights of --resume_checkpoint state."""
    with contextlib.suppress(UserError):              # of a file that cannot be read, which says so when it is loaded
        return stored_names(options.resume_checkpoint) if options.resume_checkpoint else None
    return None


def _class_names(options: LoopOptions, images: TrainingImages, num_classes: int) -> ClassNames | None:
    """The names of the classes of a training: of its images, or those that their numbers are taken for.

    None where they do not name each class of the network. Numbers are taken for the names of the weights of
    --resume_checkpoint, which is said, and of a run that goes on with the same images.
    """
    if images.class_names is not None or images.labels is None:
        named = images.class_names is not None and len(images.class_names) == num_classes
        return images.class_names if named else None
    out = Path(options.out)
    if (out / FILE).exists():
        names, same = names_of_run(out), False
        with dist_util.together():
            if names is not None and dist_util.is_main():
                before = Record.read(out)
                same = before is not None and before.data == data_digest(options.data_dir)
        return names if dist_util.told_by_main(same) else None
    names = _names_at_start(options)
    if names is None or len(names) != num_classes:      # the weights fit no other number
        return None
    say(f"--resume_checkpoint {without_secrets(options.resume_checkpoint)}: was trained on {names}; the classes of "
        f"{options.data_dir} have numbers only, which are taken for these")
    return names


def _images(options: LoopOptions, network: ModelOptions | UpsamplerOptions | ClassifierOptions, data_dir: str,
            class_cond: bool, *, known: ClassNames | None, held_out: bool = False) -> TrainingImages:
    """The images of `data_dir`; raises UserError for data that is not there, or does not fit the classes `known`.

    held_out: the part for validation, where there is one. Rank 0 looks for damaged pictures and tells the others.
    """
    damaged: list[tuple[int, str]] = []
    with dist_util.together(), given_as("--val_data_dir" if held_out else "--data_dir"):
        if not data_dir:
            raise UserError("--data_dir: is missing, name a folder of images or IDX files, an .npz file, or "
                            "fashion-mnist")
        split = "test" if held_out and holds_idx(find_data(data_dir)) else "train"
        frame = (network.in_channels, network.image_size, network.image_size)
        images = open_images(data_dir, frame, split=split, class_cond=class_cond, classes=options.classes, known=known,
                             skip_damaged=options.skip_damaged)
        if isinstance(images, FolderImages) and lies_in(options.out, data_dir):
            raise UserError(f"--out {options.out}: lies in {data_dir}, so that its pictures would be among the images "
                            "when the training goes on; name another folder")
        if dist_util.is_main():
            damaged = list(images.damaged().items())
    damaged = dist_util.told_by_main(damaged)
    with dist_util.together():
        for line in _without_effect(options, images, class_cond, held_out):
            say(line)
        return images.without(dict(damaged))


def _without_effect(options: LoopOptions, images: TrainingImages, class_cond: bool, held_out: bool) -> Iterator[str]:
    """The options of data that change nothing with these images, a line of a log each."""
    if options.classes and not class_cond:
        yield f"--classes {options.classes}: has no effect, as the network has no classes (--class_cond False)"
    if isinstance(images, FolderImages):
        return
    if options.classes and class_cond:
        yield f"--classes {options.classes}: has no effect on {images.data_dir}, which holds the classes as numbers"
    if options.random_crop and not held_out:
        yield f"--random_crop True: has no effect on {images.data_dir}, whose images are never cut"
    if options.skip_damaged:
        yield f"--skip_damaged True: has no effect on {images.data_dir}, whose images are not in files of their own"


def _check_validation(options: ClassifierTrainOptions, images: TrainingImages, learnt: TrainingImages,
                      num_classes: int) -> None:
    """Raises UserError where the validation images have other classes, or numbers of other kind.

    Those that are trained on as well, so that they test nothing, are counted and said.
    """
    names = learnt.class_names
    if shared := images.shared_with(learnt):
        say(f"--val_data_dir {options.val_data_dir}: {shared} of its {images.count} images lie in --data_dir "
            f"{options.data_dir} as well, so that they are trained on and test nothing")
    if (images.class_names is None) != (names is None):
        named, numbered = (options.data_dir, options.val_data_dir) if names else (options.val_data_dir,
                                                                                  options.data_dir)
        raise UserError(f"--val_data_dir {options.val_data_dir}: cannot be validated on, as the classes of {named} "
                        f"have names, and those of {numbered} have numbers only")
    if images.labels is not None and int(images.labels.max()) >= num_classes:
        raise UserError(f"--val_data_dir {options.val_data_dir}: has the class {images.labels.max()}, must be at most "
                        f"{num_classes - 1}, as --num_classes is {num_classes}")


def _numbered_data(options: LoopOptions, images: TrainingImages) -> Data:
    """Batches of images by first batch, and by the images before it."""
    plan = BatchPlan(images.count, batch_size=options.batch_size, seed=options.seed, shuffle=True,
                     flip=options.random_flip, crop=options.random_crop, rank=dist_util.rank(),
                     world_size=dist_util.world_size())
    return lambda first, before: images.batches(plan.begun(first, before), first)
