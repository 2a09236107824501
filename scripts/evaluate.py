"""Evaluate sample files against a reference batch: FID, sFID, Inception Score, precision, recall, and more.

The same as `python evaluations/evaluator.py`.
"""

from evaluations.evaluator import main
from guided_diffusion.cli import run_script

if __name__ == "__main__":
    run_script(main)
