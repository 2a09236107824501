"""What the study of depth accuracy found, in words and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plots import new_figure, plain_numbers, save_figure

MEAN_DEPTH = "mean depth"       # the branch that knows no image
NOT_BETTER = "better than depth that is the same for every image, by more than two standard errors"
CLOSE = 1.1                     # L1 with few labels against L1 with many, up to which it counts as close

AccuracyRow = dict[str, Any]    # a row of a CSV file, by its columns


def accuracy_verdict(blocks: Sequence[AccuracyRow], labels: Sequence[AccuracyRow], num_labels: int) -> str:
    """Says in words whether the tables confirm the paper's two findings: middle blocks are best, few labels suffice.

    What is not better than the mean of the labels reads no depth, and says nothing of either.

    blocks, labels: the rows of blocks.csv and labels.csv. num_labels: of the predictors in blocks.csv.
    """
    alone = [row for row in blocks if row["branch"].startswith("output.")]
    others = {row["branch"]: row for row in blocks if row not in alone}
    place = min(range(len(alone)), key=lambda index: alone[index]["l1"])
    best, first, last = alone[place], alone[0], alone[-1]
    middle = range(len(alone) // 4, len(alone) - len(alone) // 4)
    if _is_better(best, others[MEAN_DEPTH]):
        word = "confirmed" if place in middle and all(_is_better(best, end) for end in (first, last)) else \
            "not confirmed"
    else:
        word = f"not tested, as no block alone is {NOT_BETTER}"
    lines = [
        f"Held-out L1 of depths in [-1, 1], {num_labels} labels, over all steps (standard error in brackets):",
        *(f"  {row['branch']:10} {_l1_words(row)}" for row in blocks),
        "",
        f"Middle blocks are best: {word}.",
        f"  The best block alone is {best['branch']} of {first['branch']} to {last['branch']}. Confirmed means: it is "
        f"one of {alone[middle[0]]['branch']} to {alone[middle[-1]]['branch']}, and better than the first and the last "
        "by more than two standard errors.",
        "",
        *_label_lines(labels, num_labels, others[MEAN_DEPTH]),
        f"Depth that is the same for every image (the mean of the labels) has L1 {_l1_words(others[MEAN_DEPTH])}; the "
        f"strong branch is {_better_words(others['strong'], others['weak'])} than the weak one.",
        ""]
    return "\n".join(lines)


def _label_lines(labels: Sequence[AccuracyRow], num_labels: int, mean: AccuracyRow) -> list[str]:
    lines = []
    most = max(row["labels"] for row in labels)
    if most == num_labels:
        return [f"Whether {num_labels} labels are enough: not tested, as none of --label_counts is larger.", ""]
    for branch in ("strong", "weak"):
        rows = {row["labels"]: row for row in labels if row["branch"] == branch}
        ratio = rows[num_labels]["l1"] / rows[most]["l1"]
        word = "confirmed" if ratio <= CLOSE else "not confirmed"
        if not _is_better(rows[most], mean):
            word = f"not tested, as {most} give nothing {NOT_BETTER}"
        lines += [f"{num_labels} labels are close to {most}, {branch} branch: {word}.",
                  f"  L1 by number of labels: {', '.join(f'{n}: {_l1_words(row)}' for n, row in rows.items())}; "
                  f"{num_labels} against {most}: {ratio:.2f} times. Confirmed means: at most {CLOSE:g} times.", ""]
    return lines


def _is_better(row: AccuracyRow, other: AccuracyRow) -> bool:
    """Whether L1 is smaller by more than two standard errors."""
    return bool(other["l1"] - row["l1"] > 2 * math.hypot(row["l1_error"], other["l1_error"]))


def _better_words(row: AccuracyRow, other: AccuracyRow) -> str:
    gain = 1 - row["l1"] / other["l1"]
    return f"{100 * abs(gain):.0f} % {'better' if gain >= 0 else 'worse'}"


def _l1_words(row: AccuracyRow) -> str:
    return f"{row['l1']:.4f} ({row['l1_error']:.4f})"


def draw_accuracy(folder: Path, blocks: Sequence[AccuracyRow], timesteps: Sequence[AccuracyRow],
                  labels: Sequence[AccuracyRow]) -> None:
    """Draws accuracy.png and accuracy.svg: L1 by block, by step, and by number of labels.

    blocks, timesteps, labels: the rows of the CSV files of these names.
    """
    with new_figure(13, 4) as figure:
        by_block, by_step, by_count = figure.subplots(1, 3)
        alone = [row for row in blocks if row["branch"].startswith("output.")]
        by_block.bar(range(len(alone)), [row["l1"] for row in alone], yerr=[2 * row["l1_error"] for row in alone],
                     tick_label=[row["branch"].removeprefix("output.") for row in alone], color="tab:blue")
        styles = {"strong": ("tab:green", "-"), "weak": ("tab:orange", "-"), MEAN_DEPTH: ("0.5", ":")}
        for name, (colour, style) in styles.items():
            l1 = next(row["l1"] for row in blocks if row["branch"] == name)
            by_block.axhline(l1, color=colour, linestyle=style if style == ":" else "--", label=name)
            for axes, rows, key in ((by_step, timesteps, "t"), (by_count, labels, "labels")):
                chosen = [row for row in rows if row["branch"] == name]
                axes.errorbar([row[key] for row in chosen], [row["l1"] for row in chosen], color=colour,
                              yerr=[2 * row["l1_error"] for row in chosen], linestyle=style,
                              marker="." if style == "-" else "", label=name)
        by_block.set(xlabel="decoder block alone", title="By block")
        by_step.set(xlabel="t", title="By step")
        by_count.set(xlabel="labelled images", title="By number of labels", xscale="log")
        plain_numbers(by_count.xaxis)
        for axes in (by_block, by_step, by_count):
            axes.set_ylabel("L1 of depth in [-1, 1], held out")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        save_figure(figure, folder / "accuracy.png")
        save_figure(figure, folder / "accuracy.svg")
