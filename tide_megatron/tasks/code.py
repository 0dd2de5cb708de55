"""Find the program in a reply: in a code fence or not, a whole function or the rest of one.

1. Where there are code fences, the first one that defines the function counts, else the first one; a fence
   that is not closed reaches to the end. Else the whole reply counts.
2. Where that text defines the function (`def NAME`), the program is its lines from the first import, class,
   function or decorator that parses together with it, as far as they parse: prose around code goes. It is
   put behind the question's own code, whose imports and other functions it may use.
3. Else it continues the function that the question began: as many lines as parse behind it, indented where
   the reply did not.
"""

from __future__ import annotations

import re
import textwrap
import warnings

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_BEGINNING = re.compile(r"(import|from|class|def|async def)\s|@")
_ANY_HEAD = re.compile(r"^(async )?def (\w+)", re.MULTILINE)
_MOST_LINES = 500
_INDENT = "    "


def program_of(reply: str, opening: str, name: str) -> str:
    """Return the program that a reply means.

    Args:
        reply: what the model wrote.
        opening: the question's code, which ends in the function's head and docstring; parses by itself.
        name: of the function.

    Returns:
        Source; where nothing in the reply parses, the opening, which does nothing.
    """
    text = _fenced(reply, name)
    whole = _whole(text, name)
    if whole is not None:
        return f"{opening.rstrip()}\n\n\n{whole}\n"
    return opening.rstrip() + "\n" + _continued(text, opening)


def function_of(reply: str, name: str) -> str:
    """Return the program of a reply to a question that did not show how the function is called.

    The function of that name counts, else the first one that the reply defines, which gets the name.

    Args:
        reply: what the model wrote.
        name: that the program must define.

    Returns:
        Source; empty where no function in the reply parses.
    """
    text = _fenced(reply, name)
    whole = _whole(text, name)
    if whole is not None:
        return whole
    other = _ANY_HEAD.search(text)
    whole = _whole(text, other[2]) if other else None
    return f"{whole}\n{name} = {other[2]}\n" if whole and other else ""


def _fenced(reply: str, name: str) -> str:
    fences = _FENCE.findall(reply)
    return next((text for text in fences if _head(name).search(text)), fences[0]) if fences else reply


def _head(name: str) -> re.Pattern[str]:
    return re.compile(rf"^(async )?def {re.escape(name)}\b", re.MULTILINE)


def _whole(text: str, name: str) -> str | None:
    """Return the code around the definition of a function; None where there is none that parses."""
    lines = textwrap.dedent(text).expandtabs(4).splitlines()
    defined = [number for number, line in enumerate(lines) if _head(name).match(line)]
    if not defined:
        return None
    for start in range(defined[0] + 1):
        if _BEGINNING.match(lines[start]):
            count = _parsing(lines[start:], "")
            if start + count > defined[0] + 1:
                return "\n".join(lines[start : start + count])
    return None


def _continued(text: str, opening: str) -> str:
    """Return the lines that go on with the opening, indented as they must be."""
    lines = text.expandtabs(4).splitlines()
    first = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    lines = lines[first:]
    if not lines:
        return ""
    tries = [lines]
    if not lines[0].startswith(_INDENT):
        tries = [[_INDENT + lines[0].lstrip(), *lines[1:]], [_INDENT + line for line in lines]]
    counts = [_parsing(one, opening.rstrip() + "\n") for one in tries]
    best = counts.index(max(counts))
    return "\n".join(tries[best][: counts[best]]) + "\n"


def _parsing(lines: list[str], before: str) -> int:
    """Return how many leading lines parse behind what stands before them, of the first `_MOST_LINES`."""
    for count in range(min(len(lines), _MOST_LINES), 0, -1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(before + "\n".join(lines[:count]), "<reply>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return count
    return 0
