"""Sample images with depth-aware guidance: depth consistency (--dcg_scale) and a depth prior (--dpg_scale).

Both are on, with the paper's best scales, unless told otherwise; self-attention and classifier guidance compose.

Examples:
    python scripts/dag_sample.py --config configs/scenes32_dag.yaml --num_samples 64 --out samples/dag
    mpiexec -n 8 python scripts/dag_sample.py --config configs/dag_dfid/bedroom_dcg_dpg.yaml --out samples/bedroom_dag
"""

from collections.abc import Sequence

from guided_diffusion.cli import run_script
from guided_diffusion.guidance import DagOptions
from guided_diffusion.runs.command import sample_command


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    sample_command(argv, __doc__, on=DagOptions)


if __name__ == "__main__":
    run_script(main)
