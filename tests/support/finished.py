"""Finished sampling runs, written without sampling."""

import json

import numpy as np

from guided_diffusion.npz import write_batch


def write_run(folder, images, labels=None, timing=None, command=(), title="", **configuration):
    """Writes the folder of a finished run of images (N, H, W, 3) uint8; configuration: what run.json says of it.

    title: as its record has it; "": none, as older ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, height, width, _ = images.shape
    name = f"samples_{count}x{height}x{width}x3.npz"
    write_batch(folder / name, {"arr_0": images, **({} if labels is None else {"arr_1": np.asarray(labels, np.int64)})})
    record = {"configuration": {"seed": 0, "num_samples": count, "batch_size": 2, "image_size": height,
                                **configuration},
              "samples": name, "sha256": {}, "command": list(command),
              "timing": timing or {"seconds": 1.0, "chunks": []},
              "versions": {"guided_diffusion": "1"}, "ranks": 1, "device": "cpu", "fingerprint": "0"}
    record |= {"title": title} if title else {}
    (folder / "run.json").write_text(json.dumps(record))
    return folder
