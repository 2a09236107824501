"""Run the notebooks of this folder without Jupyter, one cell after the other, and keep their outputs in them.

    python notebooks/execute.py notebooks/first_samples_and_guidance.ipynb

A cell that is tagged `parameters` holds sizes, which a test sets to smaller ones.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def execute(path: str | Path, parameters: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The notebook with new outputs, and the names that its cells define.

    parameters: values for those of its names that the cell tagged `parameters` sets. Whatever a cell raises is raised.
    """
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"] = count
            cell["outputs"] = run_cell("".join(cell["source"]), f"{Path(path).name}, cell {number}", names, count)
            if "parameters" in cell["metadata"].get("tags", []):
                unknown = set(parameters or {}) - names.keys()
                if unknown:
                    raise ValueError(f"{path}: sets no {', '.join(sorted(unknown))}")
                names |= parameters or {}
    return notebook, names


def run_cell(source: str, where: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The outputs of a cell: what it prints, what it displays, and the value of its last line."""
    printed, shown = io.StringIO(), []
    names["display"] = lambda *values: shown.extend(
        {"output_type": "display_data", "metadata": {}, "data": represented(value)} for value in values)
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):       # where progress is shown
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(last, where, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    outputs += shown
    if value is not None:
        outputs.append({"output_type": "execute_result", "metadata": {}, "execution_count": count,
                        "data": represented(value)})
    return outputs


def represented(value: Any) -> dict[str, Any]:
    """A value as a notebook stores it: pictures and figures as PNG, all else as text."""
    if hasattr(value, "savefig"):
        stream = io.BytesIO()
        value.savefig(stream, format="png", bbox_inches="tight")
        png: bytes | None = stream.getvalue()
    else:
        png = value._repr_png_() if hasattr(value, "_repr_png_") else None
    if png:
        return {"image/png": base64.b64encode(png).decode() + "\n", "text/plain": [f"<{type(value).__name__}>"]}
    return {"text/plain": lines(repr(value))}


def lines(text: str) -> list[str]:
    """A text as a notebook stores it: a list of lines with their ends."""
    return text.splitlines(keepends=True)


def main() -> None:
    """Runs the notebooks that the command line names."""
    for path in sys.argv[1:]:
        notebook, _ = execute(path)
        Path(path).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: {sum(cell['cell_type'] == 'code' for cell in notebook['cells'])} cells run")


if __name__ == "__main__":
    main()
