"""Tables as HTML, Markdown and LaTeX, and a page that is one file: figures inside it, no server, no network."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
td.long { white-space: normal; min-width: 16rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
table.sortable th { cursor: pointer; } table.sortable th:focus-visible { outline: 2px solid #0072B2; }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; } figcaption { color: #6b6b6b; font-size: 13px; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px; }
"""

# A click, or Enter, on a heading sorts its column; numbers by the value in data-sort, rows without one at the end.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const sort = (column) => {
    const up = heads[column].getAttribute("aria-sort") !== "ascending";
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    body.append(...rows);
  };
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(column));
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(column); });
  });
}
"""

Cell = str | float | int | None
_LONG = 60  # characters


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, or "" where there is none."""
    return "" if value is None else f"{value:.{digits}g}"


def _text(cell: Cell) -> str:
    return "" if cell is None else number(cell) if isinstance(cell, float) else str(cell)


def html_table(headings: Sequence[str], rows: Sequence[Sequence[Cell]], *, sortable: bool = False) -> str:
    """A table; float and int cells are aligned right, and sorted by their full value where it is sortable. Sentences
    run over several lines, so that no column lies outside the page."""
    mark = ' class="sortable"' if sortable else ""
    lines = [f'<div class="scroll"><table{mark}>', "<thead><tr>"]
    lines += [f"<th>{html.escape(text)}</th>" for text in headings]
    lines.append("</tr></thead>\n<tbody>")
    for row in rows:
        cells = []
        for cell in row:
            text, mark = _text(cell), ""
            if isinstance(cell, (int, float)):
                mark = f' class="number" data-sort="{cell!r}"'
            elif len(text) > _LONG:
                mark = ' class="long"'
            cells.append(f"<td{mark}>{html.escape(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The same as a Markdown table."""
    clean = lambda cell: _text(cell).replace("|", "\\|")
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(headings))]
    lines = ["| " + " | ".join(map(clean, headings)) + " |",
             "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(clean, row)) + " |" for row in rows)]) + "\n"


_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def latex_table(headings: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str) -> str:
    """The same as a LaTeX table, for the package booktabs."""
    columns = "".join("l" if any(isinstance(row[i], str) for row in rows) else "r" for i in range(len(headings)))
    body = [" & ".join(latex(_text(cell)) for cell in row) + r" \\" for row in rows]
    return "\n".join([r"\begin{table}", r"\centering", rf"\caption{{{latex(caption)}}}",
                      rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
                      " & ".join(map(latex, headings)) + r" \\", r"\midrule", *body, r"\bottomrule",
                      r"\end{tabular}", r"\end{table}"]) + "\n"


def image(path: str | os.PathLike, caption: str) -> str:
    """A figure of a page: the SVG beside a PNG, or the PNG, inside the page as base64."""
    path = Path(path)
    vector = path.with_suffix(".svg")
    source, kind = (vector, "svg+xml") if vector.exists() else (path, "png")
    held = base64.b64encode(source.read_bytes()).decode("ascii")
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/{kind};base64,{held}"><figcaption>{text}</figcaption></figure>'


def source(text: str, label: str) -> str:
    """Text to be copied, folded away behind its label."""
    return f"<details><summary>{html.escape(label)}</summary><pre>{html.escape(text)}</pre></details>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def page(title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The page; sections: (heading, or "" for none, pieces of HTML)."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, pieces in sections:
        body += [f"<h2>{html.escape(heading)}</h2>"] if heading else []
        body += pieces
    return (f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
            f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + f"\n<script>{_SCRIPT}</script>\n</body>\n"
            "</html>\n")
