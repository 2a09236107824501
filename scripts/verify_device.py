"""Check that this device computes what the CPU computes, and how fast: a report to attach to an issue.

Float32 is compared with the CPU, float16, bfloat16 and compiled networks with float32, two ranks with one; then
evaluations and guided steps are timed. It takes about five minutes on a GPU, and seconds with --small True.

Examples:
    python scripts/verify_device.py
    python scripts/verify_device.py --small True --out runs/device
"""

from collections.abc import Sequence

from evaluations.benchmarks.device import DeviceOptions
from evaluations.benchmarks.device_report import verify_device
from guided_diffusion import dist_util
from guided_diffusion.cli import log_to_stderr, run_script
from guided_diffusion.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    log_to_stderr()
    options, = parse_options(argv, DeviceOptions, description=__doc__)
    dist_util.one_process()
    print(verify_device(options))


if __name__ == "__main__":
    run_script(main)
