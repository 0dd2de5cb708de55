"""The page: one HTML file with nothing from elsewhere, readable on a phone, on white and on black."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Sequence

from tide_megatron.report.figure import Panel

_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d9dce0, #3a3f46); --dim: light-dark(#5f6770, #9aa3ad);
  --ink: light-dark(#22262b, #e4e7eb);
  --good: light-dark(#2a7d4f, #5fc28b); --bad: light-dark(#b3402e, #f08a76);
  --c0: light-dark(#0072b2, #4aa8e0); --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00;
  --c5: #56b4e9; --c6: light-dark(#000000, #ffffff) }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem;
  color: var(--ink) }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; border-bottom: 1px solid var(--line); padding-bottom: .15rem;
  overflow-wrap: anywhere }
h3 { font-size: .92rem; margin: .6rem 0 .2rem; overflow-wrap: anywhere }
p { margin: .35rem 0; overflow-wrap: anywhere } .dim { color: var(--dim) } .small { font-size: .85rem }
.good { color: var(--good) } .bad { color: var(--bad) } .missing { color: var(--dim); font-style: italic }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { text-align: right; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top }
th:first-child, td:first-child { text-align: left; max-width: 24rem; white-space: normal;
  overflow-wrap: anywhere; min-width: 8.5rem }
td:nth-child(2) { max-width: 24rem; overflow: hidden; text-overflow: ellipsis }
th.long { text-align: left } td.long { text-align: left; white-space: normal; min-width: 16rem }
.wide { overflow-x: auto; max-width: 100% }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr));
  gap: .6rem 1.6rem }
figure { margin: 0; min-width: 0 } .plot { width: 100%; max-width: 36rem; height: auto; display: block }
.plot text { font-family: system-ui, sans-serif !important }
.plot * { stroke-linejoin: round; stroke-linecap: butt }
.ranks { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: .7rem }
.rank { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .6rem }
.rank h3 { margin: 0 0 .3rem } .held { display: grid; grid-template-columns: 3.2rem 1fr; gap: .5rem;
  align-items: center; margin: .3rem 0; font-size: .8rem; line-height: 1.3 }
.held svg { width: 100%; height: auto } .held b { font-weight: 600 } .held span { overflow-wrap: anywhere }
.bar { display: inline-block; height: .65rem; border-radius: 2px; background: var(--c0) }
details > summary { cursor: pointer; margin: .4rem 0 } pre { overflow-x: auto; font-size: .8rem }
nav a { margin-right: .9rem; color: inherit }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageSection:
    """A part of the page under a heading of its own."""

    title: str
    panels: Sequence[Panel] = ()
    body: str = ""
    """HTML below the panels, all that came from users escaped in it."""
    note: str = ""
    """A sentence above all."""
    missing: str = ""
    """What is not there, and how it comes to be recorded."""

    def html(self) -> str:
        """Return it as HTML; what has nothing to show and nothing to say is empty."""
        parts = [f'<p class="small dim">{html.escape(self.note)}</p>'] if self.note else []
        parts += [f'<p class="missing">{html.escape(self.missing)}</p>'] if self.missing else []
        if self.panels:
            parts.append('<div class="plots">' + "".join(map(_figure, self.panels)) + "</div>")
        parts.append(self.body)
        inner = "".join(parts)
        return f"<section><h2>{html.escape(self.title)}</h2>{inner}</section>" if inner else ""


def _figure(panel: Panel) -> str:
    note = f'<p class="small dim">{html.escape(panel.note)}</p>' if panel.note else ""
    return f"<figure><h3>{html.escape(panel.title)}</h3>{panel.svg()}{note}</figure>"


def document(title: str, head: str, sections: Iterable[PageSection]) -> str:
    """Return the page.

    Args:
        title: of the window.
        head: HTML above all sections.
        sections: in order.
    """
    body = "".join(section.html() for section in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{head}{body}</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, long: Sequence[int] = ()) -> str:
    """Return a table that scrolls inside itself, all of it escaped; empty without rows.

    Args:
        head: of the columns.
        rows: of cells.
        long: numbers of columns that hold sentences.
    """
    kinds = ["long" if number in long else "" for number in range(len(head))]
    names = "".join(
        f'<th class="{kind}">{html.escape(name)}</th>' for kind, name in zip(kinds, head, strict=True)
    )
    cells = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}">{html.escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{names}</tr>{cells}</table></div>' if cells else ""
