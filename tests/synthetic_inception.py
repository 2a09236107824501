"""Graphs of the 2015 Inception with seeded random weights, those of the golden cases, without TensorFlow."""

import functools
import importlib.util

import numpy as np
from support.golden import GOLDEN

from evaluations.extractors.inception_graph import Weights, fold, write_converted


@functools.cache
def make_synthetic_graph():
    """The script of the golden cases as a module."""
    spec = importlib.util.spec_from_file_location("make_synthetic_graph", GOLDEN / "eval" / "make_synthetic_graph.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def constants(seed=0, width_div=8):
    """The constants of the graph by name; width_div: the widths are this many times smaller than in 2015."""
    return make_synthetic_graph().synthetic_weights(seed, width_div)


def write_weights(path, seed=0, width_div=8):
    """What a conversion of the graph leaves in the cache, at `path`; returns it."""
    write_converted(Weights(fold(constants(seed, width_div)), f"{seed:064x}", 1), path)
    return path


def graph(values, scale_after_normalization=True, epsilon=0.001):
    """A GraphDef of constants and batch norms: all that the reader of weights looks at. Needs tensorboard."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    result = GraphDef()
    for name, value in values.items():
        node = result.node.add(name=name, op="Const")
        tensor = node.attr["value"].tensor
        tensor.dtype = {"float32": 1, "int32": 3}[str(value.dtype)]
        for size in value.shape:
            tensor.tensor_shape.dim.add(size=size)
        tensor.tensor_content = np.ascontiguousarray(value).tobytes()
        if name.endswith("/batchnorm/beta"):
            norm = result.node.add(name=name.removesuffix("/beta"), op="BatchNormWithGlobalNormalization")
            norm.attr["variance_epsilon"].f = epsilon
            norm.attr["scale_after_normalization"].b = scale_after_normalization
    return result
