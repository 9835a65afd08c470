"""A table as a value, printed on a terminal and written into a page alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
      title: what it shows, and where that comes from.
      columns: their heads.
      rows: cells, as many as there are columns.
      notes: lines below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """As GitHub's Markdown."""
        lines = [*([self.title, ""] if self.title else []), f"| {' | '.join(self.columns)} |"]
        lines += ["|---" * len(self.columns) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])

    def show(self, console: Console) -> None:
        """On a terminal."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for j, column in enumerate(self.columns):
            table.add_column(column, justify="right" if j else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        console.print(table)
        for note in self.notes:
            console.print(note.replace("`", ""), highlight=False)


def count(number: float) -> str:
    """A number of tokens: 12,800."""
    return f"{number:,.0f}"


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1e3 * seconds:.3g}"


def gigabytes(size: float) -> str:
    """Three digits, in 10^9 bytes."""
    return f"{size / 1e9:.3g}"


def signed(share: float) -> str:
    """A relative difference: +3.2%."""
    return f"{share:+.1%}"
