"""What a report is made of: tables and sections, each of which knows itself as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Letters of a cell that is not broken.
_LONGEST_LINE = 24


@dataclass(frozen=True)
class Table:
    """Headings and rows, all text; columns of `numbers` are set to the right."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()

    def html(self) -> str:
        """A table that scrolls sideways where the page is too narrow for it."""

        def row(cells: Sequence[str], tag: str) -> str:
            inside = "".join(
                f"<{tag}{self._kind(place, cell)}>{escape(cell)}</{tag}>" for place, cell in enumerate(cells)
            )
            return f"<tr>{inside}</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        return (
            f"<div class=wide tabindex=0><table><thead>{row(self.headings, 'th')}</thead>"
            f"<tbody>{body}</tbody></table></div>"
        )

    def _kind(self, place: int, cell: str) -> str:
        """How a cell is set: as a number, on one line, or broken within its words where one is too long for a line."""
        if place in self.numbers:
            return " class=number"
        if len(cell) <= _LONGEST_LINE:
            return " class=line"
        return " class=long" if max(map(len, cell.split())) > _LONGEST_LINE else ""

    def markdown(self) -> str:
        """The same as Markdown."""
        marks = ["---:" if place in self.numbers else "---" for place in range(len(self.headings))]
        lines = [self.headings, marks, *(tuple(map(_one_cell, row)) for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def without_constant(self, *columns: int) -> tuple[Table, dict[str, str]]:
        """The table without those of `columns` that say the same in every row, and what they say, by heading."""
        constant = {place for place in columns if len({row[place] for row in self.rows}) == 1}
        kept = [place for place in range(len(self.headings)) if place not in constant]
        table = Table(
            tuple(self.headings[place] for place in kept),
            tuple(tuple(row[place] for place in kept) for row in self.rows),
            frozenset(number for number, place in enumerate(kept) if place in self.numbers),
        )
        return table, {self.headings[place]: self.rows[0][place] for place in sorted(constant)}


def _one_cell(text: str) -> str:
    """Text that ends neither its cell nor its row."""
    return " ".join(text.split()).replace("|", "\\|")


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        text: a paragraph before everything else.
        figure: SVG, in the page alone; its numbers stand in `table`.
        reruns: the commands that measure the figure's numbers again; folded up below it.
        table: below the figure.
        folded: what the table is called where it is folded up on the screen; '' for one in full view.
        lines: made into a list.
        commands: made into a block of code.
    """

    title: str
    text: str = ""
    figure: str | None = None
    reruns: tuple[str, ...] = ()
    table: Table | None = None
    folded: str = ""
    lines: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    def html(self) -> str:
        """The section as a part of a page."""
        parts = [f"<section>\n<h2>{escape(self.title)}</h2>"]
        if self.text:
            parts.append(f"<p>{escape(self.text)}</p>")
        if self.figure is not None:
            name = escape(self.title, quote=True)
            parts.append(f'<figure role=img aria-label="{name}" tabindex=0>{self.figure}</figure>')
        if self.reruns:
            parts.append(f"<details class=reruns><summary>Measure it again</summary>{_code(self.reruns)}</details>")
        if self.table is not None:
            table = self.table.html()
            parts.append(
                f"<details><summary>{escape(self.folded)}</summary>{table}</details>" if self.folded else table
            )
        if self.lines:
            parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in self.lines) + "</ul>")
        if self.commands:
            parts.append(_code(self.commands))
        return "\n".join([*parts, "</section>"])

    def markdown(self) -> str:
        """The same as Markdown, but for the figure and what belongs to it."""
        parts = [f"## {' '.join(self.title.split())}"]
        if self.text:
            parts.append(self.text)
        if self.table is not None:
            parts.append(self.table.markdown())
        if self.lines:
            parts.append("\n".join(f"- {line}" for line in self.lines))
        if self.commands:
            parts.append("\n".join(["```", *self.commands, "```"]))
        return "\n\n".join(parts)


def _code(lines: Sequence[str]) -> str:
    return f"<pre class=wide tabindex=0>{escape(chr(10).join(lines))}</pre>"
