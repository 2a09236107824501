"""Sample images with depth-aware guidance: depth consistency (--dcg_scale) and a depth prior (--dpg_scale).

Both are on, with the paper's best scales, unless told otherwise; self-attention and classifier guidance compose.

Examples:
    python scripts/dag_sample.py --config configs/scenes32_dag.yaml --num_samples 64 --out samples/dag
    mpiexec -n 8 python scripts/dag_sample.py --config configs/dag_dfid/bedroom_dcg_dpg.yaml --out samples/bedroom_dag
"""

from guided_diffusion.depth.options import DagOnOptions
from guided_diffusion.options import parse_options
from guided_diffusion.runs.sample import OPTION_CLASSES, SampleOptions, preset_values, sample_from
from guided_diffusion.script_util import run_script


def main() -> None:
    classes = (*OPTION_CLASSES[:-1], DagOnOptions)
    sample_from(parse_options(None, SampleOptions, *classes, description=__doc__, preset=preset_values))


if __name__ == "__main__":
    run_script(main)
