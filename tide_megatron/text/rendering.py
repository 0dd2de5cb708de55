"""Chat templates as programs: the Jinja environment in which one sees what it sees under transformers.

A template is foreign code, so it runs in a sandbox. It is given `messages`, `tools`, `documents` and
`add_generation_prompt`, always defined as under `apply_chat_template`, then the folder's special tokens and
the options of `chat_template_kwargs`; the tags of loop controls and `{% generation %}`; `tojson` for plain
JSON and `raise_exception`.

The renderer of `transformers` is not used: its clock cannot be taken out, what it passes differs between the
releases that we allow, and a record must give the same ids today and tomorrow. `strftime_now` is therefore
undefined, which templates ask for, until the option `strftime_now=2025-01-31` fixes a date. Tests hold both
renderers against each other.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from tide_megatron.base.errors import ConfigError, DataError, RecordError, nearest

CLOCK = "strftime_now"
_METHODS = frozenset(dir(dict))
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
"""What a conversation brings; no option may have these names."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` around replies: writes what is inside.

    Which part of a conversation is learnt is not asked of a template: it is what follows the prompt.
    """

    tags = {"generation"}  # noqa: RUF012  Jinja reads it from the class

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the body as a scope of its own, as under transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **values)
        for name in values:
            _refuse_hidden(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


@functools.lru_cache(maxsize=16)
def compiled(source: str, origin: str) -> jinja2.Template:
    """Compile a template, once.

    Raises:
        DataError: it does not parse.
    """
    try:
        program = _environment().from_string(source)
        program.globals = dict(program.globals)  # a chain of mappings, which each rendering would copy slowly
        return program
    except (jinja2.TemplateError, RecursionError) as error:
        raise DataError(f"{origin}: the chat template does not parse: {error}") from None


@functools.lru_cache(maxsize=16)
def names_in(source: str, origin: str) -> frozenset[str]:
    """Return the variables that a template asks for and does not set itself.

    Raises:
        DataError: it does not parse.
    """
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(source)))
    except (jinja2.TemplateError, RecursionError) as error:
        raise DataError(f"{origin}: the chat template does not parse: {error}") from None


def check_options(options: Mapping[str, object], known: Iterable[str], origin: str) -> None:
    """Refuse options of `chat_template_kwargs` that a template would never look at.

    Args:
        options: what was asked for.
        known: names that the template asks for.
        origin: where it came from.

    Raises:
        ConfigError: a misspelt or reserved name, or a value that templates cannot have.
    """
    free = set(known) - set(GIVEN)
    for name, value in options.items():
        if name in GIVEN:
            raise ConfigError(f"chat_template_kwargs: {name} comes from the records and cannot be an option")
        if name not in free:
            hint = nearest(name, free) if free else "it has no options"
            raise ConfigError(f"chat_template_kwargs: the chat template ({origin}) reads no {name!r}: {hint}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError(
                f"chat_template_kwargs.{name}: {value!r} is no JSON value: give text, a number, true or false"
            ) from None
        if name == CLOCK:
            _clock(value)


def render(source: str, origin: str, values: Mapping[str, Any]) -> str:
    """Run a template.

    Args:
        source: the program.
        origin: where it came from.
        values: variables, plain JSON values.

    Raises:
        DataError: it does not parse.
        RecordError: it fails on these values or refuses them.
    """
    program, values = compiled(source, origin), dict(values)
    if CLOCK in values:
        values[CLOCK] = _clock(values[CLOCK])
    try:
        return program.render(values)
    except DataError:
        raise
    except Exception as error:  # a template is foreign code: whatever it raises is about this record
        hint = f": give the option {CLOCK}=2025-01-31 to fix the date that it writes" * (CLOCK in str(error))
        raise RecordError(
            f"the chat template ({origin}) fails on these messages: {error}{hint}",
            "the chat template fails on it",
        ) from None


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's, with a short way to `message.content`."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return what a dictionary has under a name that is no method's; else as Jinja does."""
        if type(obj) is dict and attribute in obj and attribute not in _METHODS:
            return obj[attribute]
        return super().getattr(obj, attribute)


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes for web pages
    environment.globals["raise_exception"] = _refuse
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Stand behind `tojson`, with the arguments it has under transformers."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _clock(date: object) -> Callable[[str], str]:
    """Return what stands behind `strftime_now`: a clock that stands still.

    Raises:
        ConfigError: no date.
    """
    try:
        fixed = datetime.datetime.fromisoformat(str(date))
    except ValueError:
        raise ConfigError(
            f"chat_template_kwargs.{CLOCK}: {date!r} is no date: write one such as 2025-01-31"
        ) from None
    return fixed.strftime


def _refuse(message: str) -> NoReturn:
    """Stand behind `raise_exception(...)` in templates."""
    raise RecordError(f"the chat template refuses these messages: {message}", "the chat template refuses it")


def _refuse_hidden(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no name {name!r}: underscores are reserved")
