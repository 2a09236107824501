"""Tell what a running or stopped sampling run has done, what is missing, and what is damaged.

Example:
    python scripts/run_status.py samples/sag
"""

import argparse
import json
from pathlib import Path

from guided_diffusion.cli import run_script
from guided_diffusion.runs.status import run_status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the --out of the run")
    parser.add_argument("--json", action="store_true", help="for programs: the same as JSON")
    arguments = parser.parse_args()
    status = run_status(arguments.folder)
    print(json.dumps(status.as_dict()) if arguments.json else status)


if __name__ == "__main__":
    run_script(main)
