"""A page that replays how replies were decoded, forward by forward: one HTML file, nothing from elsewhere.

Without JavaScript it shows the replies as they ended.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from tide_megatron.decode.options import Decoding
from tide_megatron.decode.order import EARLY, LATE, MIDDLE, Cell, colour
from tide_megatron.decode.reply import Reply

MASK = "▒"
"""Stands for a token that is not committed yet."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.25rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: 1.8rem 0 .4rem }
.dim { color: var(--dim) } button, select { font: inherit }
.controls { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .5rem .8rem; align-items: center;
  background: Canvas; padding: .6rem 0; border-bottom: 1px solid var(--line); z-index: 1 }
.controls input[type=range] { flex: 1 1 12rem; min-width: 8rem } .controls label { white-space: nowrap }
#play { min-width: 5.5rem } #said { min-width: 9rem; font-variant-numeric: tabular-nums }
.message { margin: .3rem 0; padding-left: .8rem; border-left: 3px solid var(--line); white-space: pre-wrap;
  overflow-wrap: anywhere }
.message b { display: block; font-weight: 600; font-size: .8rem; color: var(--dim) }
.reply { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: .6rem 0; border: 1px solid var(--line); border-radius: 4px; padding: .7rem }
.reply i { font-style: normal; border-radius: 2px } body.coloured .reply i { color: #000 }
.reply i.hidden { letter-spacing: 2px }
.reply i.hidden, body.coloured .reply i.hidden { color: var(--dim); background: none !important }
body:not(.coloured) .reply i { background: none !important } .reply i.now { outline: 2px solid #d33 }
.scale { display: inline-block; width: 7rem; height: .7rem; border-radius: 2px; vertical-align: middle }
"""
_SCRIPT = """
const bar = document.getElementById('bar'), play = document.getElementById('play');
const said = document.getElementById('said'), speed = document.getElementById('speed');
const replies = [...document.querySelectorAll('.reply')].map(place => ({
  note: place.nextElementSibling.querySelector('span'),
  forwards: +place.dataset.forwards,
  cells: [...place.children].map(cell => ({
    cell, text: cell.textContent, steps: cell.dataset.steps.split(' ').map(Number) })),
}));
let timer = null;
const show = at => {
  bar.value = at;
  said.textContent = `forward ${at} of ${bar.max}`;
  for (const reply of replies) {
    let there = 0, all = 0;
    for (const { cell, text, steps } of reply.cells) {
      const missing = steps.filter(step => step >= at).length;
      there += steps.length - missing;
      all += steps.length;
      cell.textContent = missing ? 'MASK'.repeat(missing) : text;
      cell.classList.toggle('hidden', missing > 0);
      cell.classList.toggle('now', !missing && at < +bar.max && Math.max(...steps) === at - 1);
    }
    reply.note.textContent = `${there} of ${all} tokens after ${Math.min(at, reply.forwards)} forwards`;
  }
};
const stop = () => { clearInterval(timer); timer = null; play.textContent = '▶ Play'; };
const start = () => {
  if (+bar.value >= +bar.max) show(0);
  play.textContent = '❚❚ Pause';
  timer = setInterval(() => { +bar.value < +bar.max ? show(+bar.value + 1) : stop(); }, 1000 / speed.value);
};
play.onclick = () => timer ? stop() : start();
speed.onchange = () => { if (timer) { stop(); start(); } };
bar.oninput = () => { stop(); show(+bar.value); };
document.getElementById('colours').onchange =
  event => document.body.classList.toggle('coloured', event.target.checked);
document.onkeydown = event => {
  if (['INPUT', 'SELECT', 'BUTTON'].includes(event.target.tagName)) return;
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step) { stop(); show(Math.max(0, Math.min(+bar.max, +bar.value + step))); event.preventDefault(); }
  if (event.key === ' ') { play.click(); event.preventDefault(); }
};
for (const place of document.querySelectorAll('.reply')) place.style.minHeight = `${place.offsetHeight}px`;
document.querySelector('.controls').hidden = false;
const asked = location.hash.match(/^#forward-([0-9]+)$/);
show(asked ? Math.min(+asked[1], +bar.max) : +bar.max);
"""


class Shown(Protocol):
    """One reply of the page, as `tasks.sampling` has it."""

    @property
    def messages(self) -> Sequence[Mapping[str, str]]:
        """What was asked, with `role` and `content`."""

    @property
    def reply(self) -> Reply:
        """What was answered."""

    @property
    def cells(self) -> Sequence[Cell]:
        """The reply's text, with its order."""


def render(title: str, replies: Sequence[Shown], options: Decoding) -> str:
    """Return the page.

    Args:
        title: of the page: the model.
        replies: in order.
        options: how they were decoded.
    """
    forwards = max((shown.reply.forwards for shown in replies), default=0)
    name = html.escape(title)
    colours = ", ".join("rgb({} {} {})".format(*place) for place in (EARLY, MIDDLE, LATE))
    body = "".join(_reply(number, shown) for number, shown in enumerate(replies, start=1))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f'<body class="coloured"><h1>{name}</h1><p class="dim">{html.escape(words_of(options))}</p>'
        '<div class="controls" hidden><button id="play" type="button">▶ Play</button>'
        f'<input id="bar" type="range" min="0" max="{forwards}" value="{forwards}" aria-label="forward">'
        '<span id="said"></span><label>speed <select id="speed"><option value="3">slow</option>'
        '<option value="10" selected>normal</option><option value="30">fast</option></select></label>'
        '<label><input id="colours" type="checkbox" checked> colours</label>'
        f'<span class="dim">first <span class="scale" style="background: linear-gradient(90deg, {colours})">'
        f"</span> last</span></div>{body}"
        f"<script>{_SCRIPT.replace('MASK', MASK)}</script></body></html>\n"
    )


def words_of(options: Decoding) -> str:
    """Say in a line how replies were decoded: what is set, and the defaults that count most."""
    told = dataclasses.asdict(options) | {"threshold": None if math.isinf(options.limit) else options.limit}
    always, usual = ("new_tokens", "schedule", "seed"), dataclasses.asdict(Decoding())
    shown = {
        field.name: told[field.name]
        for field in dataclasses.fields(options)
        if field.name in always
        or (told[field.name] != usual[field.name] and field.name not in ("batch", "cache"))
    }
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value not in (None, ())
    )


def _reply(number: int, shown: Shown) -> str:
    """Show what was asked, the reply in its cells, and how it ended."""
    asked = "".join(
        f'<div class="message"><b>{html.escape(message["role"])}</b>{html.escape(message["content"])}</div>'
        for message in shown.messages
    )
    spans = []
    for cell in shown.cells:
        steps = " ".join(map(str, cell.steps))
        red, green, blue = colour(cell.known_at, shown.reply.forwards)
        style = f"background: rgb({red} {green} {blue})"
        spans.append(f'<i data-steps="{steps}" style="{style}">{html.escape(cell.text)}</i>')
    ended = {"eos": "an end token", "stop": "a stop text", "length": "its length"}.get(
        shown.reply.ended or "", "a stop"
    )
    told = f"{len(shown.reply.ids)} tokens in {shown.reply.forwards} forwards"
    return (
        f"<section><h2>reply {number}</h2>{asked}"
        f'<div class="reply" data-forwards="{shown.reply.forwards}">{"".join(spans)}</div>'
        f'<p class="dim"><span>{told}</span>; ended by {ended}</p></section>'
    )
