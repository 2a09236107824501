"""The file of the 2015 Inception, classify_image_graph_def.pb: finding it and reading its weights.

Its weights are converted once, batch norms folded into the convolutions, to a safetensors file in a cache folder.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion.dist_util import say
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import Download, default_cache
from guided_diffusion.late import Tensor, torch

from .converted import read_conversion, write_conversion

FILE_NAME = "classify_image_graph_def.pb"
URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{FILE_NAME}"
SIZE = 95_673_916  # bytes

EPSILON = 0.001  # of the batch norms, where the graph does not say
FORMAT = "2015 Inception, batch norms folded, 1"
LOGITS = "softmax/weights"


class Weights(NamedTuple):
    """The weights of a 2015 Inception, of any width.

    tensors: float32; for each convolution "<name>.weight" (out, in, kh, kw) and "<name>.bias" (out,), with <name> as in
    the graph ("mixed_9/tower/mixed/conv_1"), and "softmax/weights" (features, classes).
    """

    tensors: dict[str, Tensor]
    sha256: str  # of the .pb
    size: int  # of the .pb, in bytes: SIZE for the official one


def find_graph(path: str | os.PathLike | None = None, cache: str | os.PathLike | None = None) -> Path:
    """Finds the .pb: the path given, else the one in the cache folder, else the official one in the current folder.

    The last is where the official evaluator leaves it; a line says so. Where there is none, it is downloaded to the
    cache folder. Raises UserError where the path given is no file, the one in the cache has another size than the
    official file, or the download fails.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--inception {path}: no such file")
        return Path(path)
    target, otherwise = (Path(cache) if cache is not None else default_cache()) / FILE_NAME, ""
    if not target.exists() and (here := Path(FILE_NAME)).is_file():
        if _is_official(here):
            say(f"--inception is not given: {here.absolute()} is read")
            return here
        otherwise = f"{here.absolute()} has {here.stat().st_size:,} bytes instead of {SIZE:,} and is not read"
        say(otherwise)
        otherwise = f"; {otherwise}"
    return Download(URL, target, SIZE, otherwise=f", or name it with --inception PATH{otherwise}").run()


def is_here(path: str | os.PathLike | None = None) -> bool:
    """Whether `find_graph` finds the .pb without a download."""
    return Path(path or default_cache() / FILE_NAME).is_file() or (not path and _is_official(Path(FILE_NAME)))


def _is_official(file: Path) -> bool:
    return file.is_file() and file.stat().st_size == SIZE


def size_caveat(size: int) -> str:
    """What readers of the numbers must know of a .pb of `size` bytes: "" for the official size."""
    if size == SIZE:
        return ""
    return (f"the Inception's file has {size} bytes, the official one {SIZE}: these are not the numbers that others "
            "publish")


def read_graph(path: Path) -> bytes:
    """The bytes of the .pb; raises UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def load_weights(path: str | os.PathLike | None = None, cache: str | os.PathLike | None = None) -> Weights:
    """Loads the weights of the 2015 Inception.

    path: the .pb, or a safetensors file that a conversion left in a cache folder; None as in `find_graph`.
    cache: folder for what is downloaded and converted; None is `default_cache`. A .pb is converted on first use; a
    damaged conversion is made anew.

    Raises UserError where there is no file, or it does not hold this network.
    """
    graph = find_graph(path, cache)
    if graph.suffix == ".safetensors":
        return read_converted(graph)
    content = read_graph(graph)
    sha256 = hashlib.sha256(content).hexdigest()
    folder = Path(cache) if cache is not None else default_cache()
    converted = folder / f"{Path(FILE_NAME).stem}-{sha256[:16]}.safetensors"
    try:
        if (weights := read_converted(converted)).sha256 == sha256:
            return weights
    except UserError:
        pass
    weights = Weights(parse_graph(content, str(graph)), sha256, len(content))
    try:
        write_converted(weights, converted)
    except UserError as error:
        warnings.warn(f"{error}, the graph will be converted again next time", stacklevel=2)
    return weights


def read_converted(path: Path) -> Weights:
    """Reads what `write_converted` wrote; raises UserError where the file is missing, damaged, or something else."""
    otherwise = f"is damaged, or not a converted {FILE_NAME}; name the .pb with --inception PATH"
    tensors, metadata = read_conversion(path, FORMAT, otherwise)
    try:
        return Weights(tensors, metadata["pb_sha256"], int(metadata["pb_bytes"]))
    except (KeyError, ValueError):
        raise UserError(f"{path}: {otherwise}") from None


def write_converted(weights: Weights, path: Path) -> None:
    """Writes weights with the SHA-256 of the .pb and of their own values, which `read_converted` checks.

    Raises UserError where the file cannot be written.
    """
    write_conversion(path, FORMAT, weights.tensors, {"pb_sha256": weights.sha256, "pb_bytes": str(weights.size)})


def parse_graph(content: bytes, source: str) -> dict[str, Tensor]:
    """`Weights.tensors` from the bytes of the .pb; `source` names it in errors.

    Raises UserError where the bytes are no GraphDef, or its nodes say that it is another network.
    """
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.graph_pb2 import GraphDef
    except ImportError as error:
        raise UserError(f"reading {source} needs the package tensorboard ({error}): pip install 'guided-pixels[eval]' "
                        "or pip install tensorboard") from None
    graph = GraphDef()
    try:
        graph.ParseFromString(content)
    except DecodeError:
        gzipped = " (it is compressed with gzip: unpack it first)" if content[:2] == b"\x1f\x8b" else ""
        raise UserError(f"{source}: is not a TensorFlow graph, or is truncated{gzipped}") from None
    nodes = {node.name: node for node in graph.node}
    _check_preprocessing(nodes, source)
    endings = ("/conv2d_params", *(f"/batchnorm/{part}" for part in _NORM))
    constants = {name: _constant(node, source) for name, node in nodes.items()
                 if name.endswith(endings) or name == LOGITS}
    for name, node in nodes.items():
        if name.endswith("/batchnorm") and node.op == "BatchNormWithGlobalNormalization":
            if not node.attr["scale_after_normalization"].b:
                constants[f"{name}/gamma"] = np.array(1, np.float32)
            constants[f"{name}/epsilon"] = np.array(node.attr["variance_epsilon"].f, np.float32)
    return fold(constants, source)


_NORM = ("beta", "gamma", "moving_mean", "moving_variance")


def fold(constants: Mapping[str, np.ndarray], source: str = "weights") -> dict[str, Tensor]:
    """`Weights.tensors` from the constants of the graph, by their names there: each batch norm in its convolution.

    constants: for each convolution "<name>/conv2d_params" (kh, kw, in, out) and "<name>/batchnorm/beta", "gamma",
    "moving_mean", "moving_variance" (out,), perhaps "<name>/batchnorm/epsilon"; "softmax/weights" (features, classes).
    Anything else is left out. Raises UserError where one is missing or the shapes do not fit together.
    """
    kernels = sorted(name for name in constants if name.endswith("/conv2d_params"))
    names = [kernel.removesuffix("/conv2d_params") for kernel in kernels]
    needed = [LOGITS, *(f"{name}/batchnorm/{part}" for name in names for part in _NORM)]
    missing = [name for name in needed if name not in constants]
    if missing or not names:
        raise UserError(f"{source}: is not the 2015 Inception, it has no node {(missing or ['conv/conv2d_params'])[0]}")
    tensors = {LOGITS: torch.from_numpy(np.array(constants[LOGITS], np.float32, ndmin=2))}
    for name, kernel in zip(names, kernels, strict=True):
        beta, gamma, mean, variance = (np.float64(constants[f"{name}/batchnorm/{part}"]) for part in _NORM)
        scale = gamma / np.sqrt(variance + constants.get(f"{name}/batchnorm/epsilon", EPSILON))  # (out,)
        weight = constants[kernel]
        if np.ndim(weight) != 4 or not {np.shape(scale), np.shape(mean), np.shape(beta)} == {np.shape(weight)[3:]}:
            raise UserError(f"{source}: is not the 2015 Inception, {kernel} of shape {np.shape(weight)} and its batch "
                            f"norm of shape {np.shape(scale)} do not fit together")
        weight = (weight * scale).astype(np.float32).transpose(3, 2, 0, 1)  # (out, in, kh, kw)
        tensors[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(weight))
        tensors[f"{name}.bias"] = torch.from_numpy((beta - mean * scale).astype(np.float32))
    return tensors


def _constant(node: Any, source: str) -> np.ndarray:
    """The value of a Const node (a NodeDef): packed bytes, or a list of numbers whose last one fills the rest."""
    tensor, float32 = node.attr["value"].tensor, 1
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if node.op != "Const" or tensor.dtype != float32 or min(shape, default=1) < 0:
        raise UserError(f"{source}: is not the 2015 Inception, its node {node.name} is not a float32 constant")
    count = int(np.prod(shape))
    values = (np.frombuffer(tensor.tensor_content, "<f4") if tensor.tensor_content
              else np.array(tensor.float_val, np.float32))
    if 0 < len(values) < count and not tensor.tensor_content:
        values = np.concatenate([values, np.full(count - len(values), values[-1], np.float32)])
    if len(values) != count:
        raise UserError(f"{source}: is damaged, its node {node.name} holds {len(values)} of {count} numbers")
    return values.reshape(shape)


def _check_preprocessing(nodes: Mapping[str, Any], source: str) -> None:
    """Raises UserError where the graph prepares images in another way than `inception.resize` does."""
    resize = nodes.get("ResizeBilinear")
    if resize is not None and any(resize.attr[name].b for name in ("align_corners", "half_pixel_centers")):
        raise UserError(f"{source}: is not the 2015 Inception, its ResizeBilinear aligns corners or pixel centres")
    for name, expected in (("Sub/y", 128), ("Mul/y", 1 / 128)):
        if name in nodes and np.any(_constant(nodes[name], source) != expected):
            raise UserError(f"{source}: is not the 2015 Inception, its node {name} is not {expected}")
