"""What reports show of the sections of a table, as text: their rows and numbers, taken from table.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..metrics import METRICS, Metric
from .tables import COSTS, DECIMALS
from .verdicts import NOT_RUN
from .wording import REFERENCE, decimals, references, written, written_count, written_interval


@dataclass(frozen=True)
class Difference:
    """A difference from the row that a section compares with, as text."""

    value: str
    interval: str
    verdict: str

    @property
    def numbers(self) -> str:
        """The difference with its interval, where it has one."""
        return f"{self.value} ({self.interval})" if self.interval else self.value

    def __str__(self) -> str:
        return f"{self.numbers}, {self.verdict}"


@dataclass(frozen=True)
class Cell:
    """A number of a row, as text; "" stands for what there is not.

    metric: what it is a number of. value: the measured number. difference: from the published one, with its verdict.
    against: the difference from the row that the section compares with.
    """

    metric: str
    value: str
    interval: str = ""
    published: str = ""
    difference: str = ""
    verdict: str = ""
    against: Difference | None = None

    def __str__(self) -> str:
        """The measured number, like "0.57 (0.48 to 0.67)"."""
        return f"{self.value} ({self.interval})" if self.interval else self.value or NOT_RUN


@dataclass(frozen=True)
class SectionRow:
    """A row of a section. cost: see `ShownSection.cost_head`. cells: its numbers by the words of the metrics."""

    title: str
    cost: str
    ran: bool
    verdict: str
    cells: Mapping[str, Cell]


class ShownSection:
    """A section of a table as reports show it."""

    def __init__(self, section: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Takes a section of `results`."""
        self.data, self._rows = section, results["rows"]
        self._references = references(results, [row["row"] for row in section["rows"]])
        self._several = len(references(results, results["rows"])) > 1
        self._network: str = results.get("features_of", "")
        axis = (results.get("chart") or {}).get("x", "")
        self._cost = axis if axis in COSTS else ""
        self.title: str = section["title"]
        self._metrics = [item for row in section["rows"] for item in row["metrics"].items()]

    @cached_property
    def words(self) -> list[str]:
        """The words of its metrics, in the order in which the rows have them."""
        return list(dict.fromkeys(word for word, _ in self._metrics))

    def metric(self, word: str) -> Metric:
        """Returns a metric, with the name that it has by the network of the table."""
        return METRICS[word].by(self._network)

    @property
    def metric_heads(self) -> list[tuple[str, str]]:
        """For each metric its name, and which way is better."""
        return [(self.metric(word).label, self.metric(word).direction.reading) for word in self.words]

    @property
    def cost_head(self) -> str:
        """The cost of an image that stands beside the rows' numbers: that of the table's chart, "" for none."""
        return COSTS.get(self._cost, "")

    @property
    def published(self) -> bool:
        """Whether it holds published numbers."""
        return any(number["published"] is not None for _, number in self._metrics)

    @property
    def verdicts(self) -> list[str]:
        """The verdicts on differences from the row that the section compares with."""
        return [number["versus"]["verdict"] for _, number in self._metrics if number["versus"]]

    @property
    def compared(self) -> bool:
        """Whether rows are compared with one."""
        return bool(self.verdicts)

    @property
    def base(self) -> str:
        """The title of the row that the others are compared with."""
        # Tables of before that name was there compared with the first row.
        return str(self._rows[self.data.get("against_row") or self.data["rows"][0]["row"]]["title"])

    def row_title(self, row: Mapping[str, Any]) -> str:
        """Returns the title of a row of the section's data."""
        return str(self._rows[row["row"]]["title"])

    @cached_property
    def rows(self) -> list[SectionRow]:
        """Its rows, in order."""
        return [SectionRow(self.row_title(row), written_count(self._rows[row["row"]][self._cost]) if self._cost else "",
                           self._ran(row), row["verdict"] if self._ran(row) else NOT_RUN,
                           {word: self._cell(word, row["metrics"][word]) for word in self.words
                            if word in row["metrics"]}) for row in self.data["rows"]]

    @property
    def references(self) -> list[tuple[str, dict[str, Cell]]]:
        """The titles of its references, and their own values by the words of the metrics that they have any of."""
        own = [(one["file"], {word: Cell(self.metric(word).label, written(number["value"], self.places(word)),
                                         written_interval(number["interval95"], self.places(word)))
                              for word, number in one.get("metrics", {}).items() if word in self.words})
               for one in self._references]
        return [(REFERENCE if len(own) == 1 else f"{REFERENCE} of {file}", cells) for file, cells in own if cells]

    def places(self, word: str) -> int:
        """Returns the decimals that show two digits of the narrowest interval, and all of what was published."""
        numbers = [number for other, number in self._metrics if other == word]
        return max([decimals(number["interval95"], number["value"]) for number in numbers]
                   + [DECIMALS for number in numbers if number["published"] is not None])

    @property
    def sentence(self) -> str:
        """What the numbers are numbers of."""
        text = f"{self.data['images']:,} images of each row" + f", compared with {self.base}" * self.compared
        sources = dict.fromkeys(filter(None, (self._rows[row["row"]].get("published_source")
                                              for row in self.data["rows"])))
        if self._several and self._references:
            text += f", against {' and '.join(map(self._against, self._references))}"
        return f"{text}." + (f" Published in: {'; '.join(sources)}." if self.published and sources else "")

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Titles of rows with their verdict and the reasons for it."""
        notes = []
        for row, shown in zip(self.data["rows"], self.rows, strict=True):
            why = [] if shown.ran else [self._rows[row["row"]]["why"]]
            reasons = [reason for reason in dict.fromkeys([*row["reasons"], *why]) if reason]
            if reasons:
                notes.append((shown.title, ": ".join(filter(None, (shown.verdict, "; ".join(reasons))))))
        return notes

    def _against(self, reference: Mapping[str, Any]) -> str:
        """Returns the file of a reference, with the titles of its rows where the section has others too."""
        titles = [self._rows[row["row"]]["title"] for row in self.data["rows"]
                  if (self._rows[row["row"]]["reference"] or {}).get("sha256") == reference["sha256"]]
        return f"{reference['file']}" + f" ({', '.join(titles)})" * (len(self._references) > 1)

    def _ran(self, row: Mapping[str, Any]) -> bool:
        return bool(self._rows[row["row"]]["state"] == "measured")

    def _cell(self, word: str, number: Mapping[str, Any]) -> Cell:
        """Returns a number as text."""
        places, value = self.places(word), number["value"]
        published, difference, versus = number["published"], number["difference"], number["versus"]
        return Cell(self.metric(word).label,
                    "" if value is None else written(value, places),
                    "" if value is None else written_interval(number["interval95"], places),
                    "" if published is None else written(published),
                    "" if difference is None else written(difference, places, "+"),
                    number["verdict"], _difference(versus) if versus else None)


def _difference(versus: Mapping[str, Any]) -> Difference:
    places = decimals(versus["interval95"], versus["difference"])
    return Difference(written(versus["difference"], places, "+"), written_interval(versus["interval95"], places, "+"),
                      versus["verdict"])


def shown_sections(results: Mapping[str, Any]) -> Iterator[ShownSection]:
    """Yields the sections of the results as reports show them."""
    return (ShownSection(section, results) for section in results["sections"])
