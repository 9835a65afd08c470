"""Table of text as a value: printed to a terminal, or written to a page as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
      title: subject of the table, and the source of its figures.
      columns: heads of the columns.
      rows: cells, one for each column.
      notes: lines below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        lines = [*([self.title, ""] if self.title else []), f"| {' | '.join(self.columns)} |"]
        lines += ["|---" * len(self.columns) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])

    def show(self, console: Console) -> None:
        """Print to a terminal: as a table if its width fits, else one block of lines per row."""
        rows = [[cell.replace("**", "") for cell in row] for row in self.rows]
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for j, column in enumerate(self.columns):
            table.add_column(column, justify="right" if j else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        if (
            Measurement.get(console, console.options.update_width(1000), table).maximum
            <= console.width
        ):
            console.print(table)
        else:
            self._show_blocks(console, rows)
        for note in self.notes:
            console.print(note.replace("`", ""), highlight=False)

    def _show_blocks(self, console: Console, rows: Sequence[Sequence[str]]) -> None:
        """Title, then per row its first cell and below it the other cells with their columns."""
        if self.title:
            console.print(self.title, style="bold", highlight=False)
        for first, *others in rows:
            head = f"{self.columns[0]}: {first}" if self.columns[0] else first
            console.print(head, style="bold", highlight=False, markup=False)
            cells = Table.grid(padding=(0, 2))
            for column, cell in zip(self.columns[1:], others, strict=True):
                cells.add_row("", column, cell)
            console.print(cells, highlight=False)


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
