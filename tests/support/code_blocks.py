"""The code blocks of the README and the documentation, and the commands that a shell block calls."""

import re
import subprocess
from dataclasses import dataclass

from commands import REPOSITORY

DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCED = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+?) -->\n+)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
                    re.MULTILINE | re.DOTALL)

# A shell in which every word but the commands of this project is unknown: each call of one becomes a line of its
# arguments on descriptor 3, in place of a run; launchers are left out.
RECORDER = """
set -f
PATH=
python() { printf '%s\\x1f' "$@" >&3; printf '\\n' >&3; }
mpiexec() { while [[ $1 == -* ]]; do shift 2; done; "$@"; }
torchrun() { shift 2; python "$@"; }
guided-pixels() { python guided-pixels "$@"; }
"""


@dataclass(frozen=True)
class Block:
    """A code block. why: the reason for which it cannot run here, "" where it can."""

    document: str
    line: int
    language: str
    text: str
    why: str

    def __str__(self):
        return f"{self.document}:{self.line}"


def blocks_in(path):
    """The fenced code blocks of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    return [Block(path.relative_to(REPOSITORY).as_posix(), text.count("\n", 0, found.start("language")) + 1,
                  found["language"], found["text"], found["why"] or "") for found in FENCED.finditer(text)]


def in_language(path, language):
    """The code blocks of a Markdown file that are in one language."""
    return [block for block in blocks_in(path) if block.language == language]


def commands_in(block):
    """The commands that a shell block calls, each a list of words: a file of `scripts`, and its arguments.

    Loops and variables are those of bash. A word that is no command of this project fails, unless the block is one
    that cannot run here.
    """
    ignored = "command_not_found_handle() { return 0; }\n" if block.why else "set -e\n"
    done = subprocess.run(["/bin/bash", "-c", f"exec 3>&1 >/dev/null\n{ignored}{RECORDER}{block.text}"],
                          capture_output=True, text=True)
    assert done.returncode == 0, f"{block}: {done.stderr}"
    return [line.rstrip("\x1f").split("\x1f") for line in done.stdout.splitlines()]
