"""The command `guided-pixels`: every command of this project by its name.

    guided-pixels sample --model fmnist32 --num_samples 16 --out samples
    guided-pixels COMMAND --help

In a checkout that is not installed, `python scripts` is the same.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from guided_diffusion.cli import run_script
from guided_diffusion.errors import UserError
from guided_diffusion.options import nearest
from guided_diffusion.version import __version__

SHORT_NAMES = {"sample": "image_sample", "train": "image_train", "fetch": "fetch_models", "status": "run_status",
               "convert": "convert_checkpoint"}
OLD_NAMES = ("dag_table", "halve_checkpoint", "train_icons_judge")      # which only their files have


def commands() -> dict[str, Path]:
    """The file of every command by its name, the short ones first, then the others in the order of the alphabet."""
    files = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.py")) if not path.stem.startswith("_")}
    named = {short: files[name] for short, name in SHORT_NAMES.items()}
    return named | {name.replace("_", "-"): path for name, path in files.items()
                    if name not in (*SHORT_NAMES.values(), *OLD_NAMES)}


def overview() -> str:
    """What there is, a line each."""
    width = max(map(len, commands()))
    lines = [f"  {name:{width}}  {_summary(path)}" for name, path in commands().items()]
    return "\n".join(["usage: guided-pixels COMMAND [--help] ...", "", "commands:", *lines])


def _summary(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def find_command(name: str) -> str:
    """The module of the command of that name, short or that of its file, with `-` or `_`. Raises UserError."""
    word = name.replace("-", "_")
    module = SHORT_NAMES.get(word, word)
    if module not in {path.stem for path in commands().values()}:
        raise UserError(f"{name}: no such command{nearest(name, commands())}, there are {', '.join(commands())}")
    return module


def run_command() -> None:
    """Runs the command that the command line names."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
    elif words[0] == "--version":
        print(__version__)
    else:
        name = find_command(words[0])
        module = importlib.import_module(f"{__package__}.{name}" if __package__ else name)
        module.main(words[1:])


def main() -> None:
    """The command; a user's mistake ends it with one line on stderr and exit code 2."""
    run_script(run_command)


if __name__ == "__main__":
    main()
