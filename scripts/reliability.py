"""Kill sampling jobs at random moments, start them again, and compare the files with that of an undisturbed job.

Example:
    python scripts/reliability.py --kills 20 --ranks 2
"""

from guided_diffusion.options import parse_options
from guided_diffusion.reliability import ReliabilityOptions, reliability, table
from guided_diffusion.script_util import run_script


def main() -> None:
    print(table(reliability(*parse_options(None, ReliabilityOptions, description=__doc__))))


if __name__ == "__main__":
    run_script(main)
