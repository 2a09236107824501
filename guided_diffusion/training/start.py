"""The weights that a training starts from: those of an official run, which it goes on with, or of any other file.

The trainings of improved-diffusion and guided-diffusion leave three kinds of files, where NNNNNN is a step:
    modelNNNNNN.pt          the weights by name, in the order of the network's parameters
    ema_RATE_NNNNNN.pt      their moving average
    optNNNNNN.pt            the state of AdamW: by parameter, or, of a training in float16, of all parameters together
                            (improved-diffusion), or of all with at most one dimension together, and of all others
                            together (guided-diffusion)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..entries import check_weights
from ..errors import UserError
from ..fetch import is_address, without_secrets
from ..late import Tensor, torch
from ..stated import network_statement

Weights = Mapping[str, Tensor]
Shapes = Mapping[str, Sequence[int]]

# What another number of classes or channels changes: label embedding, first convolution, last layer.
ENDS = re.compile(r"label_emb\.weight|input_blocks\.0\.0\.(weight|bias)|out\..+")
LABELS = "label_emb.weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Start:
    """What a training starts from.

    weights: by name; those that are missing keep their random values. step: the first one. averages: by rate.
    moments: "step", "exp_avg" and "exp_avg_sq" of each weight by name; none: AdamW starts anew. official: an official
    run goes on, whose averages had no warm-up. recipe: lr and weight_decay that AdamW had. said: what to tell the user,
    a sentence each.
    """

    weights: Weights
    step: int = 0
    averages: Mapping[float, Weights] = field(default_factory=dict)
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    official: bool = False
    recipe: Mapping[str, float] = field(default_factory=dict)
    said: Sequence[str] = ()


def official_step(path: str) -> int | None:
    """The step in the name of an official run's weights, modelNNNNNN.pt; None for any other name."""
    name = re.split(r"[?#]", path)[0] if is_address(path) else path
    found = re.search(r"(?:^|[/\\])model(\d{6,})\.pt$", name)
    return int(found[1]) if found else None


def other_classes(path: str, options: Mapping[str, Any]) -> str:
    """The classes of the network and of a file in words, where the file states another number; "" else.

    options: of the network by flag name. The label embedding may have as many rows all the same, as the null class has
    one, too.
    """
    stated = network_statement(path)
    there = stated.facts if stated is not None else {}
    if there.get("num_classes", options.get("num_classes")) == options.get("num_classes"):
        return ""
    return f"{_classes(options)}, {_classes(there)} in the file"


def _classes(options: Mapping[str, Any]) -> str:
    return f"{options['num_classes']} classes{' and a null class' if options.get('null_class') else ''}"


def _assumed(where: str, path: str, weights: Weights, options: Mapping[str, Any]) -> list[str]:
    """What to tell of a null class that is taken from a file which does not state its classes."""
    stated = network_statement(path)
    if LABELS not in weights or not options.get("null_class") or (stated is not None and "num_classes" in stated.facts):
        return []
    return [f"{where}: does not state its classes; its last of {len(weights[LABELS])} labels is taken for the null "
            "class"]


def from_weights(path: str, shapes: Shapes, options: Mapping[str, Any], entry: str = "") -> Start:
    """`--init_from`: the weights of a file that fit a network of these shapes; training starts at step 0.

    options: of the network by flag name. entry: of a file that holds several networks. Raises UserError where the file
    cannot be read, or where a weight does not fit that another number of classes or channels would not change.
    """
    where = f"--init_from {without_secrets(path)}"
    state = _read(where, path, entry)
    taken = {name: state[name] for name in shapes if name in state and tuple(state[name].shape) == tuple(shapes[name])}
    others = other_classes(path, options) if LABELS in taken else ""
    if others:
        del taken[LABELS]
    anew = [name for name in shapes if name not in taken]
    unused = [name for name in state if name not in shapes]
    wrong = [name for name in [*anew, *unused] if not ENDS.fullmatch(name)]
    if wrong or not taken:
        raise UserError(f"{where}: does not fit the network, {len(wrong)} of its weights differ in name or shape "
                        f"beside the label embedding and the first and last layer ({(wrong or anew)[0]} first)")
    said = [f"{where}: {len(taken)} of {len(shapes)} weights are loaded, training starts at step 0"]
    if anew:
        named = ", ".join(f"{name} ({others if others and name == LABELS else _difference(name, state, shapes)})"
                          for name in anew)
        said[0] += f"; these start anew: {named}"
    if unused:
        said[0] += f"; not used: {', '.join(unused)}"
    return Start(taken, said=[*said, *_assumed(where, path, taken, options)])


def _difference(name: str, state: Weights, shapes: Shapes) -> str:
    there = f"{_size(state[name].shape)} in the file" if name in state else "not in the file"
    return f"{_size(shapes[name])}, {there}"


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


def from_checkpoint(path: str, shapes: Shapes, options: Mapping[str, Any], rates: Sequence[float],
                    entry: str = "") -> Start:
    """`--resume_checkpoint`: an official run where the file has the name of one, else the weights of a file alone.

    shapes: of the network's weights by name. options: of the network by flag name. rates: of the moving averages.
    entry: of a file that holds several networks. Raises UserError where a file cannot be read or does not fit the
    network.
    """
    where = f"--resume_checkpoint {without_secrets(path)}"
    weights = _fitting(where, path, shapes, entry)
    if LABELS in weights and (others := other_classes(path, options)):
        raise UserError(f"{where}: does not fit the network, {LABELS} is of other classes ({others}); --init_from "
                        "takes the other weights")
    assumed = _assumed(where, path, weights, options)
    step = official_step(path)
    if step is None:
        return Start(weights, said=[f"{where}: only the weights are used, training starts at step 0, since this is not "
                                    "the name of an official run's file (modelNNNNNN.pt)", *assumed])
    if is_address(path):
        return Start(weights, step, official=True, said=[
            f"{where}: goes on from step {step} with the weights only; for its averages and optimiser, fetch "
            f"opt{step:06d}.pt and the ema files beside it into a folder, and name the file there", *assumed])
    folder, taken, missing = Path(path).parent, [], []
    averages = {}
    for rate in rates:
        beside = folder / f"ema_{rate}_{step:06d}.pt"
        if beside.exists():
            averages[rate] = _fitting(where, str(beside), shapes)
            taken.append(beside.name)
        else:
            missing.append(f"{beside.name} is missing, so that this average starts from the weights")
    optimizer = folder / f"opt{step:06d}.pt"
    moments: dict[str, dict[str, Tensor]] = {}
    recipe: dict[str, float] = {}
    if optimizer.exists():
        try:
            moments, recipe = read_optimizer(optimizer, {name: shapes[name] for name in weights})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        taken.append(optimizer.name)
    else:
        missing.append(f"{optimizer.name} is missing, so that AdamW starts anew")
    said = f"{where}: goes on from step {step} of an official run" + (f", with {', '.join(taken)}" if taken else "")
    return Start(weights, step, averages, moments, True, recipe, ["; ".join([said, *missing]), *assumed])


def _read(where: str, path: str, entry: str) -> dict[str, Tensor]:
    try:
        state = checkpoint.load_state_dict(path, entry=entry)
        check_weights(state, path)
        return state
    except UserError as error:
        given = f"{without_secrets(path)}: "
        raise UserError(f"{where}: {without_secrets(str(error)).removeprefix(given)}") from None


def _fitting(where: str, path: str, shapes: Shapes, entry: str = "") -> dict[str, Tensor]:
    state = _read(where, path, entry)
    wrong = [name for name in {**shapes, **state}
             if name not in state or name not in shapes or tuple(state[name].shape) != tuple(shapes[name])]
    if wrong:
        name = Path(path).name
        subject = "" if name in where else f"{name} "
        remedy = "; --init_from takes the others" if all(map(ENDS.fullmatch, wrong)) else ""
        raise UserError(f"{where}: {subject}does not fit the network, {len(wrong)} of its weights differ in name or "
                        f"shape ({wrong[0]} first){remedy}")
    return state


def read_optimizer(path: Path, shapes: Shapes) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """What an official run's optNNNNNN.pt holds: moments and recipe, as `Start` has them.

    shapes: of the weights by name, in the order of the official network's parameters, which that of the file
    modelNNNNNN.pt is. Raises UserError where the file is none or is of another network.
    """
    content = checkpoint.load_pickled(path)
    try:
        entries = [content["state"][index] for index in sorted(content["state"])]
        steps = [torch.as_tensor(entry["step"], dtype=torch.float32).reshape(()) for entry in entries]
        moments = [{key: entry[key] for key in MOMENTS} for entry in entries]
        sizes = [[tuple(entry[key].shape) for key in MOMENTS] for entry in moments]
        group = content["param_groups"][0]
        recipe = {name: float(group[name]) for name in ("lr", "weight_decay") if name in group}
    except (IndexError, TypeError, KeyError, AttributeError, ValueError, RuntimeError):
        raise UserError(f"{path}: is not the state of AdamW") from None
    names = list(shapes)
    if sizes == [[tuple(shapes[name])] * len(MOMENTS) for name in names]:
        by_name = {key: {name: entry[key] for name, entry in zip(names, moments, strict=True)} for key in MOMENTS}
        return {"step": dict(zip(names, steps, strict=True)), **by_name}, recipe
    flat = [[math.prod(size) for size in pair] for pair in sizes]
    for groups in _flat_groups(shapes):
        if flat == [[sum(math.prod(shapes[name]) for name in group)] * len(MOMENTS) for group in groups]:
            return _split_groups(shapes, groups, steps, moments), recipe
    raise UserError(f"{path}: is the state of AdamW of another network")


def _split_groups(shapes: Shapes, groups: Sequence[Sequence[str]], steps: Sequence[Tensor],
                  moments: Sequence[Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The moments by name of weights that lie in one tensor a group."""
    result: dict[str, dict[str, Tensor]] = {key: {} for key in ("step", *MOMENTS)}
    for group, step, entry in zip(groups, steps, moments, strict=True):
        result["step"] |= dict.fromkeys(group, step)
        for key in MOMENTS:
            parts = entry[key].flatten().split([math.prod(shapes[name]) for name in group])
            result[key] |= {name: part.view(tuple(shapes[name])) for name, part in zip(group, parts, strict=True)}
    return result


def _flat_groups(shapes: Shapes) -> list[list[list[str]]]:
    """The names of the weights that lie in one tensor each in training in float16, as each official code has them."""
    vectors, others = ([name for name in shapes if (len(shapes[name]) <= 1) is small] for small in (True, False))
    return [[vectors, others], [list(shapes)]]


def weight_shapes(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of weights by name."""
    return {name: tuple(value.shape) for name, value in weights.items()}
