"""Make the table of depth-aware guidance: sample every row from the same seed, evaluate all, write table and figures.

Examples (each goes on where it was stopped when started again):
    python scripts/dag_table.py --config configs/scenes32_dag.yaml --out runs/dag_table
    mpiexec -n 2 python scripts/dag_table.py --config configs/scenes32_dag.yaml --sweep 0,10,20,40,80
"""

from collections.abc import Sequence

from evaluations.depth.table import TableOptions, TableSampleOptions, make_table
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stdout, run_script
from guided_diffusion.guidance import DagOptions
from guided_diffusion.options import parse_options
from guided_diffusion.runs.options import option_classes, preset_values
from guided_diffusion.runs.sample import SamplingRun


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stdout()
    classes = (TableOptions, TableSampleOptions, *option_classes())
    options, *run = parse_options(argv, *classes, description=__doc__, preset=preset_values,
                                  defaults=DagOptions.switched_on)
    table = make_table(options, SamplingRun.of(run))
    if table:
        print(f"{table}\ntable: {options.out}/table.md")
    dist_util.shutdown()


if __name__ == "__main__":
    run_script(main)
