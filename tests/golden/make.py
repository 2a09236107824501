"""Cut the golden cases of this folder out of the full set: `python tests/golden/make.py FULL`.

Whole cases are copied as they are. Of the larger ones only a beginning is kept: the first steps of a chain, the first
images of a batch, the outputs that the tests read. Nothing is computed, so every number here is one of the full set.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

COPIED = (
    "fill.py", "checkpoints.json", "checkpoints_improved.json", "unet_plainnorm.npz", "unet_adm_headch16.npz",
    "classifier_attention.npz",
    "classifier_spatial.npz", "eval/make_synthetic_graph.py", "eval/public_fid.json", "eval/public_is.json",
    "eval/public_pr.json", "eval/public_stats.json", "eval/public_graph_w8.npz",
    "eval/public_e2e.json", "solvers_public.npz", "solvers_chain_public.npz",
    "bpd_cosine.npz", "bpd_fixed.npz",
)
STEPS = {"ddpm_plain": 1, "ddpm_sag": 2, "ddim25_sag_cg": 2, "ddpm_cg": 1, "ddpm_sag_legacyheads": 1}
FEW = 4     # images whose features are kept


def first_steps(steps: int) -> Callable[[str, np.ndarray], np.ndarray]:
    """The cut of a chain to its first `steps` steps."""
    def cut(name: str, value: np.ndarray) -> np.ndarray:
        kept = {"x": steps + 1, "unguided_pred_xstart": steps}.get(name)
        return value if kept is None else value[:kept]
    return cut


def only_manifolds(name: str, value: np.ndarray) -> np.ndarray | None:
    """Of precision and recall: which points lie in the other set's manifold, by the official distances."""
    return value if name.endswith(("__ref__sample_in_ref_manifold", "__ref__ref_in_sample_manifold")) else None


def small_covariances(name: str, value: np.ndarray) -> np.ndarray:
    """Of statistics: a covariance of many channels by its first rows."""
    return value[:FEW] if value.shape == (192, 192) else value


def small_images(name: str, value: np.ndarray) -> np.ndarray | None:
    """Of the full-width Inception: the outputs for images of 32x32."""
    return value if name.startswith("s32") else None


def first_images(name: str, value: np.ndarray) -> np.ndarray:
    """Of two batches of images: the features of the first ones."""
    return value[:FEW]


def first_image_of_a_step(name: str, value: np.ndarray) -> np.ndarray | None:
    """Of an upsampler's chain of two images: the states of the first image before and after the first step."""
    if name == "x":
        return value[:2, :1]
    return None if name == "out" else value


def first_image(name: str, value: np.ndarray) -> np.ndarray:
    """Of a chain of two images: the network's output and the states around the first step, of the first image."""
    return value[:2, :1] if name == "x" else value[:1] if name == "out" else value


CUT: dict[str, Callable[[str, np.ndarray], np.ndarray | None]] = {
    **{f"steps_{name}.npz": first_steps(steps) for name, steps in STEPS.items()},
    "iddpm_steps_lsun.npz": first_image,
    "iddpm_steps_uncond.npz": first_image,
    "upsample_adm.npz": first_image_of_a_step,
    "eval/public_pr.npz": only_manifolds,
    "eval/public_stats.npz": small_covariances,
    "eval/public_graph.npz": small_images,
    "eval/public_e2e.npz": first_images,
}


def main(full: Path) -> None:
    """Fill this folder from the full set."""
    (HERE / "eval").mkdir(exist_ok=True)
    for name in COPIED:
        shutil.copyfile(full / name, HERE / name)
    for name, cut in CUT.items():
        with np.load(full / name, allow_pickle=False) as case:
            kept = {key: cut(key, case[key]) for key in case}
        np.savez_compressed(HERE / name, **{key: value for key, value in kept.items() if value is not None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
