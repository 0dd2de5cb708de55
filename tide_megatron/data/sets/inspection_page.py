"""The page of a data folder: one HTML file with nothing from elsewhere, of what `inspection` found."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from tide_megatron.base.units import in_bytes
from tide_megatron.data.manifest import in_share
from tide_megatron.data.sets.inspection import Coverage, DataFacts, Lengths, ShownSample, Token, shares

HUES = (210, 35, 140, 285, 0, 175)
"""Of chunks, in turns."""
WIDTH, HEIGHT, FOOT = 420, 150, 20

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; --ink: #3b6fb6; --bad: #b3402e }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 78rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.25rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem }
h3 { font-size: .9rem; margin: .3rem 0 } .dim { color: var(--dim) } .bad { color: var(--bad) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child, td.text, th.text { text-align: left; overflow-wrap: break-word }
.row { display: flex; flex-wrap: wrap; gap: 0 2.5rem } .row > * { min-width: 0 } .wide { overflow-x: auto }
svg { max-width: 100%; height: auto } svg text { fill: var(--dim); font-size: 11px }
svg rect { fill: var(--ink) } svg line { stroke: var(--line) }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
@media (max-width: 50rem) { .pair { grid-template-columns: 1fr } }
.tokens { font: 13px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  border: 1px solid var(--line); border-radius: 4px; padding: .5rem }
.tokens i { font-style: normal; box-shadow: inset -1px 0 var(--line); color: var(--dim) }
.tokens i.learnt { color: inherit; text-decoration: underline dotted var(--bad) }
.tokens i[data-chunk] { color: inherit; text-decoration: none; border-radius: 2px }
.tokens i.same { outline: 2px solid var(--ink) }
.bar { display: inline-block; height: .7rem; background: var(--ink); vertical-align: middle }
"""
_COLOURS = "".join(
    f".c{number} {{ background: hsl({hue} 75% 50% / .28) }}" for number, hue in enumerate(HUES)
)
_SCRIPT = """
for (const pair of document.querySelectorAll('.pair')) {
  const mark = (target, on) => {
    const chunk = target.dataset && target.dataset.chunk;
    if (chunk === undefined) return;
    for (const token of pair.querySelectorAll(`[data-chunk="${chunk}"]`)) token.classList.toggle('same', on);
  };
  pair.addEventListener('mouseover', event => mark(event.target, true));
  pair.addEventListener('mouseout', event => mark(event.target, false));
}
"""


def render(name: str, facts: DataFacts, sample: ShownSample, *, has_text: Mapping[str, bool]) -> str:
    """Return the page.

    Args:
        name: of the folder.
        facts: of all samples.
        sample: the one that is shown.
        has_text: by side, whether its tokenizer was at hand; the student's under the empty name.
    """
    title = html.escape(name)
    parts = [
        _head(facts),
        _sample(sample, has_text),
        _coverage(facts.coverage),
        '<h2>lengths in tokens</h2><div class="row">'
        + "".join(_histogram(side or "student", found) for side, found in facts.lengths.items())
        + "</div>",
        '<div class="row">' + _records(facts) + _sources(facts.sources) + "</div>",
        _files(facts),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}{_COLOURS}</style></head>'
        f"<body><h1>{title}</h1>{''.join(parts)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _head(facts: DataFacts) -> str:
    manifest, counts = facts.manifest, facts.manifest.statistics
    made = [f"student: {manifest.tokenizer.name}"]
    made += [f"{name}: {side.tokenizer.name}" for name, side in manifest.sides.items()]
    said = (
        f"{manifest.samples:,} samples, {counts.tokens:,} tokens, {counts.reply_tokens:,} of them to learn "
        f"({in_bytes(counts.reply_bytes)} of text); at most {manifest.max_length} tokens a sample, longer "
        f"ones: {manifest.on_long}"
    )
    dim = f"tokenizers: {'; '.join(made)}; digest {manifest.digest[:16]}"
    return f'<p>{html.escape(said)}<br><span class="dim">{html.escape(dim)}</span></p>'


def _sample(sample: ShownSample, has_text: Mapping[str, bool]) -> str:
    """Show a sample, beside each side's tokens of it."""
    source = f" from {html.escape(sample.source)}" if sample.source else ""
    parts = [f"<h2>sample {sample.number}{source}</h2>"]
    if not all(has_text.values()):
        parts.append('<p class="dim">Numbers are ids: the tokenizer that spells them was not named.</p>')
    if not sample.sides:
        parts.append(_tokens(sample.student))
    for name, (student, teacher) in sample.sides.items():
        parts.append(
            f'<div class="pair"><div><h3>student, {len(student)} tokens</h3>{_tokens(student)}</div>'
            f"<div><h3>{html.escape(name)}, {len(teacher)} tokens</h3>{_tokens(teacher)}</div></div>"
        )
    if sample.sides:
        parts.append(
            '<p class="dim">Equal colours stand for the same bytes: a chunk. Learnt tokens without a colour, '
            "underlined, are in no chunk; grey ones are not learnt. ⏎ is a new line.</p>"
        )
    return "".join(parts)


def _tokens(tokens: Iterable[Token]) -> str:
    shown = []
    for token in tokens:
        kinds = ["learnt"] * token.is_learnt
        chunk = ""
        if token.chunk is not None:
            kinds.append(f"c{token.chunk % len(HUES)}")
            chunk = f' data-chunk="{token.chunk}"'
        named = f' class="{" ".join(kinds)}"' if kinds else ""
        text = html.escape(token.text).replace("\n", "⏎\n")
        gap = "" if token.text != str(token.id) else " "
        shown.append(f'<i{named}{chunk} title="{token.id}">{text}{gap}</i>')
    return f'<p class="tokens">{"".join(shown)}</p>'


def _coverage(coverage: Mapping[str, Coverage]) -> str:
    """Show how well the sides align."""
    if not coverage:
        return ""
    names = ("teacher", "reply bytes in chunks", "chunks", "one token on each side", "of equal id")
    rows = [
        (
            name,
            in_share(found.share_of_bytes),
            f"{found.chunks:,}",
            f"{found.single:,} ({found.single / max(1, found.chunks):.0%})",
            f"{found.equal:,}",
            f"{found.without_chunks:,}",
            f"{found.cut:,}",
        )
        for name, found in coverage.items()
    ]
    return "<h2>alignment</h2>" + _table((*names, "samples without chunks", "samples cut"), rows)


def _histogram(title: str, lengths: Lengths) -> str:
    """Draw how many samples have which length."""
    most, bars = max(lengths.counts, default=0) or 1, len(lengths.counts)
    across, bottom = WIDTH / bars, HEIGHT - FOOT
    rects = "".join(
        f'<rect x="{number * across:.1f}" y="{bottom - count / most * (bottom - 14):.1f}" '
        f'width="{across - 1:.1f}" height="{count / most * (bottom - 14):.1f}">'
        f"<title>{first} to {end - 1} tokens: {count} samples</title></rect>"
        for number, (count, first, end) in enumerate(
            zip(lengths.counts, lengths.edges[:-1], lengths.edges[1:], strict=True)
        )
    )
    name = html.escape(title)
    return (
        f'<figure style="margin:0"><h3>{name}: median {lengths.median}, nine of ten up to '
        f'{lengths.nine_of_ten}, longest {lengths.longest}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" role="img" aria-label="lengths of {name}">{rects}'
        f'<line x1="0" y1="{bottom}" x2="{WIDTH}" y2="{bottom}"/><text x="0" y="10">{most:,} samples</text>'
        f'<text x="0" y="{HEIGHT - 5}">{lengths.edges[0]}</text><text x="{WIDTH}" y="{HEIGHT - 5}" '
        f'text-anchor="end">{lengths.edges[-1]}</text></svg></figure>'
    )


def _records(facts: DataFacts) -> str:
    rows = [(reason, f"{count:,}") for reason, count in shares(facts)]
    return "<div><h2>records</h2>" + _table(("what became of them", "records"), rows) + "</div>"


def _sources(sources: Mapping[str, int]) -> str:
    if not sources:
        return ""
    most = max(sources.values()) or 1
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{count:,}</td>"
        f'<td class="text"><span class="bar" style="width:{count / most * 8:.2f}rem"></span></td></tr>'
        for name, count in sources.items()
    )
    head = '<tr><th>source</th><th>samples</th><th class="text"></th></tr>'
    return f'<div><h2>sources</h2><div class="wide"><table>{head}{cells}</table></div></div>'


def _files(facts: DataFacts) -> str:
    rows = [
        (str(file["name"]), f"{file['records']:,}", in_bytes(file["bytes"]), str(file["sha256"])[:16])
        for file in facts.manifest.sources
    ]
    return "<h2>files that were read</h2>" + _table(("file", "records", "size", "sha256"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, all of it escaped."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{names}</tr>{cells}</table></div>'
