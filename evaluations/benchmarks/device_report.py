"""The report of a device as Markdown, to be read and attached, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.files import check_folder, write_json, write_text
from guided_diffusion.version import __version__

from .device import FURTHER, ROOM, UNIT, DeviceOptions, Report, verify


def verify_device(options: DeviceOptions) -> str:
    """Checks the device and writes the report; returns where it is, with how many checks hold.

    Raises UserError, once the report is written, where one does not.
    """
    folder = check_folder("--out", options.out)
    report = verify(options)
    write_json(folder / "report.json", as_json(report))
    write_text(folder / "report.md", as_markdown(report) + "\n")
    return _verdict(report, folder)


def _verdict(report: Report, folder: Path) -> str:
    count, path = len(report.checks), folder / "report.md"
    if report.failed:
        first = report.failed[0]
        raise UserError(f"{len(report.failed)} of {count} checks do not hold, the first is {first.what} of "
                        f"{first.network}, {first.compared}: {first.deviation:.1e}, at most {first.tolerance:.1e}; "
                        f"please attach {path} to an issue")
    return f"all {count} checks hold: {path}"


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON holds it."""
    return {
        "version": __version__, "device": dict(report.device), "seconds": report.seconds,
        "parts": dict(report.parts),
        "checks": [{**asdict(check), "holds": check.holds} for check in report.checks],
        "costs": {name: {call: {"milliseconds": cost.median, "peak_mib": cost.memory}
                         for call, cost in costs.items()} for name, costs in report.costs.items()},
        "notes": list(report.notes)}


def as_markdown(report: Report) -> str:
    """The report as text."""
    said = ", ".join(f"{name} {value}" for name, value in report.device.items())
    units = ", ".join(f"{name} {unit:.1e}" for name, unit in UNIT.items())
    lines = ["# Device report", "", f"{said}; guided-pixels {__version__}; {report.seconds:.0f} s.", "",
             f"{len(report.checks) - len(report.failed)} of {len(report.checks)} checks hold.", "", "## Agreement", "",
             f"Relative deviations, as quadratic means. At most: {ROOM:g} u sqrt(layers), with u of a rounding "
             f"({units}), in float32 {ROOM:g} u sqrt(products of all layers); {FURTHER:g} times that for chains and "
             "gradients. Ranks must agree to the bit.", "",
             "| network | what | compared | deviation | at most | |", "|---|---|---|---|---|---|"]
    lines += [f"| {check.network} | {check.what} | {check.compared} | {check.deviation:.1e} | {check.tolerance:.1e} | "
              f"{'holds' if check.holds else '**fails**'} |" for check in report.checks]
    lines += ["", "## Time and memory", "", "| network | call | milliseconds | peak MiB | / evaluation |",
              "|---|---|---|---|---|"]
    for name, costs in report.costs.items():
        for call, cost in costs.items():
            ratio = cost.ratio(costs["evaluation"])
            lines.append(f"| {name} | {call} | {cost.median:.1f} | {cost.memory:.0f} | {ratio:.2f} |")
    lines += ["", "## Where the time went", ""]
    lines += [f"- {part}: {seconds:.1f} s" for part, seconds in report.parts.items()]
    if report.notes:
        lines += ["", "## Left out", "", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines)
