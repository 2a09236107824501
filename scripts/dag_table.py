"""The old name of `reproduce.py scenes32_dag`.

The scales, the sweep and the sampling of its rows stand in configs/scenes32_dag/table.yaml; a folder beside it with
rows of your own is a table too (see evaluations/reproduction/tables.py).
"""

from guided_diffusion.cli import run_renamed

if __name__ == "__main__":
    run_renamed("scripts/dag_table.py", "reproduce", "scenes32_dag")
