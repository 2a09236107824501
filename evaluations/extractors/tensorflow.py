"""The 2015 Inception, run by TensorFlow itself from classify_image_graph_def.pb, to settle doubts about `inception`."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np

from guided_diffusion.errors import UserError

from ..features import FeatureExtractor, Features
from .inception import SPATIAL_CHANNELS, check_finite, check_images
from .inception_graph import FILE_NAME, find_graph, read_graph, size_caveat

OUTPUTS = ("pool_3:0", "mixed_6/conv:0", "softmax/logits/MatMul:0")


class TensorflowExtractor:
    """The graph in a TensorFlow session, as an extractor of the evaluator; needs the package tensorflow.

    path: the .pb; None takes it from the cache folder (None is ~/.cache/guided-pixels), where it is downloaded to.
    device: "cpu", or "cuda" for what TensorFlow sees of GPUs. Raises UserError where TensorFlow is missing, or the
    file does not hold this network.
    """

    name = "tensorflow Inception 2015"

    def __init__(self, path: str | os.PathLike | None = None, cache: str | os.PathLike | None = None,
                 device: str = "cpu") -> None:
        tf = _tensorflow()
        path = find_graph(path, cache)
        if path.suffix == ".safetensors":
            raise UserError(f"--inception {path}: TensorFlow needs the graph itself, {FILE_NAME}")
        content = read_graph(path)
        self.fingerprint, self.caveat = hashlib.sha256(content).hexdigest(), size_caveat(len(content))
        self.settings = {"backend": "tensorflow", "dtype": "float32", "resize": "the graph's own",
                         "tensorflow": str(tf.__version__)}
        graph_def = tf.GraphDef()
        with tf.Graph().as_default() as graph:
            self._images = tf.placeholder(tf.float32, [None, None, None, 3])
            try:
                graph_def.ParseFromString(content)
                pooled, spatial, logits = tf.import_graph_def(graph_def, {"ExpandDims:0": self._images}, OUTPUTS)
            except Exception as error:
                if type(error).__name__ != "DecodeError" and not isinstance(error, (ValueError, KeyError)):
                    raise
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"{path}: is not the 2015 Inception, or is truncated ({reason})") from None
            pooled = tf.reshape(tf.reduce_mean(pooled, [1, 2]), [-1, pooled.shape[3]])
            # the second input of the product is its weights: the file's own product takes one image at a time
            probabilities = tf.nn.softmax(tf.matmul(pooled, logits.op.inputs[1]))
            self._outputs = pooled, spatial[..., :SPATIAL_CHANNELS], probabilities
        self._not_finite = tf.errors.InvalidArgumentError  # of the graph's own checks
        config = tf.ConfigProto(device_count={} if device.startswith("cuda") else {"GPU": 0})
        config.gpu_options.allow_growth = True
        self._session = tf.Session(graph=graph, config=config)

    def features(self, images: np.ndarray) -> Features:
        """Features of one batch: pooled (N, 2048), spatial (N, 2023), probabilities (N, 1008).

        images: (N, H, W, 3), uint8, RGB, of any size. Raises UserError for other images, or where a feature is not
        finite.
        """
        check_images(images)
        try:
            pooled, spatial, probabilities = self._session.run(self._outputs, {self._images: images})
        except self._not_finite as error:
            raise UserError(f"one of a batch of {len(images)} images: its features are not finite, the weights are "
                            f"damaged ({error.op.name if error.op else error.message})") from None
        features = Features(pooled, spatial.reshape(len(spatial), -1), probabilities)
        check_finite(features)
        return features


def _tensorflow() -> Any:
    try:
        import tensorflow.compat.v1 as tf
    except ImportError as error:
        raise UserError(f"--backend tensorflow needs the package tensorflow ({error}): "
                        "pip install 'guided-pixels[tf]'") from None
    return tf


def load(*, inception: str = "", device: str = "", dtype: str = "float32") -> FeatureExtractor:
    """The Inception in the file; see `evaluations.extractors.base.Loader`."""
    return TensorflowExtractor(inception or None, device=device or "cpu")
