"""A page of text, tables and pictures as one HTML file: no script, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

Cell = str | int | float | None

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #6b7280; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.subtitle, figcaption, caption { color: var(--soft); font-size: .9rem; text-align: left; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.marked td { font-weight: 600; }
code, pre { font-family: ui-monospace, monospace; }
pre { padding: .8rem; border: 1px solid var(--line); overflow-x: auto; }
"""


class Page:
    """Collects parts from top to bottom; everything given is text, and is escaped, but the pictures."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="subtitle">{escape(subtitle)}</p>')

    def heading(self, text: str) -> None:
        """A new section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def code(self, text: str) -> None:
        """Lines to copy."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str = "", marked: Sequence[int] = ()
    ) -> None:
        """A table; numbers as they are (round them before), None as a dash, rows with indices in ``marked`` bold."""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
        body = "".join(_row(row, index in marked) for index, row in enumerate(rows))
        told = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._parts.append(
            f'<div class="wide"><table>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def picture(self, svg: str, caption: str = "") -> None:
        """An SVG from :mod:`cvworker.report.charts`; nothing for the empty string."""
        if svg:
            told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
            self._parts.append(f"<figure>{svg}{told}</figure>")

    def html(self) -> str:
        """The whole page."""
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style>"
        )
        body = "\n".join(self._parts)
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'

    def write(self, path: Path) -> None:
        """Write the page to ``path``, whole or not at all."""
        part = path.with_name(f".{path.name}.part")
        part.write_text(self.html(), encoding="utf-8")
        part.replace(path)


def _row(row: Sequence[Cell], marked: bool) -> str:
    start = '<tr class="marked">' if marked else "<tr>"
    return start + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>"


def _cell(cell: Cell) -> str:
    if cell is None:
        return "–"
    return escape(f"{cell:g}" if isinstance(cell, float) else str(cell))
