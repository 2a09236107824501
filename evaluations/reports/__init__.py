"""Pages of what commands leave in folders: sampling runs, likelihoods, trainings and studies."""

from pathlib import Path

from guided_diffusion.cli import ShowOptions


def with_page(text: str, folder: str | Path, show: ShowOptions) -> str:
    """What a command says of the folder that it wrote; with --open also where the page of that is, which is written."""
    if not show.open:
        return text
    from .report import ReportOptions, write_pages  # here, as it takes a second to load

    return f"{text}\n{write_pages([str(folder)], ReportOptions())}"
