"""What may be said of a source: where it lies, how its rows become conversations, which are left out."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from tide_megatron.base.options import STRICT
from tide_megatron.data.sources.record import ROLES

Count = Annotated[int, Field(ge=1)]
Value = str | bool | int | float | None
Share = Annotated[float, Field(ge=0.0, le=1.0)]
ShapeWord = Literal["auto", "messages", "sharegpt", "instruction", "prompt_response", "question_answer"]
HUB = "hub:"


def _known_roles(roles: dict[str, str]) -> dict[str, str]:
    for word, role in roles.items():
        if role not in ROLES:
            raise ValueError(f"{word}: {role} is no role; choose one of: {', '.join(ROLES)}")
    return roles


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ColumnNames:
    """Which column is what, where no shape fits."""

    messages: str | None = None
    """The conversation: a list of messages, or such a list as JSON text."""
    prompt: str | None = None
    """What the user says: text, or a list of messages."""
    input: str | None = None
    """What stands below the prompt, after an empty line, where there is any."""
    response: str | None = None
    """What the assistant replies: text, or a list of messages."""
    history: str | None = None
    """Pairs of prompt and reply from before."""
    system: str | None = None
    """Text of a system message that comes first, where there is any."""
    tools: str | None = None
    """Tools, as a list of objects or as JSON text."""
    documents: str | None = None
    """Documents, likewise."""
    source: str | None = None
    """What the sample's source is called in scores; it goes before the source's `name`."""
    role: str | None = None
    """Key of a message under which its role stands; default: `role`, else `from`."""
    content: str | None = None
    """Key of a message under which its text stands; default: `content`, else `value`."""

    @model_validator(mode="after")
    def _is_conversation(self) -> ColumnNames:
        if bool(self.prompt) != bool(self.response):
            raise ValueError("prompt and response belong together; name both")
        if self.messages and self.prompt:
            raise ValueError("messages and prompt are two places for one conversation; name one")
        return self

    @property
    def names(self) -> dict[str, str]:
        """The columns of a row that are named, by what they are."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: name for key, name in named.items() if name and key not in ("role", "content")}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Filters:
    """What is left out; each reason is counted in the manifest."""

    min_chars: Count | None = None
    """Fewest characters of all messages together."""
    max_chars: Count | None = None
    """Most characters of all messages together."""
    min_reply_chars: Count | None = None
    """Fewest characters of the last message."""
    max_reply_chars: Count | None = None
    """Most characters of the last message."""
    min_tokens: Count | None = None
    """Fewest of the student's tokens of a sample, template included."""
    max_tokens: Count | None = None
    """Most of the student's tokens of a sample, before it would be cut."""
    reply_contains: str | None = None
    """Text that must stand in the last message, in this spelling."""
    where: dict[str, Value | tuple[Value, ...]] = dataclasses.field(default_factory=dict)
    """Column (`a.b`: key b of column a) -> the value that it must have, or a list of such values: a language
    tag, a grade."""

    def said(self) -> dict[str, Any]:
        """Return what is asked."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value not in (None, {})}

    @property
    def are_of_tokens(self) -> bool:
        """Whether nothing but the number of tokens is asked."""
        return self == Filters(min_tokens=self.min_tokens, max_tokens=self.max_tokens)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceChoice:
    """A source: files of one kind of rows."""

    path: Annotated[str, Field(min_length=1)]
    """A file, a folder of shards, a glob (`data/*.parquet`), a folder of `datasets.save_to_disk`, `-` for
    stdin, or `hub:OWNER/NAME` for a data set on the Hugging Face hub."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """What its samples' source is called in scores; default: what a row's `source` says, else its file."""
    config: str | tuple[str, ...] | None = None
    """Configuration of a data set that has several, or a list of them, read one after the other."""
    split: str | None = None
    """Split of a data set that has several."""
    revision: str | None = None
    """Commit, tag or branch of a data set on the hub."""
    shape: ShapeWord = "auto"
    """How a row becomes a conversation; `auto`: its columns tell."""
    columns: ColumnNames = dataclasses.field(default_factory=ColumnNames)
    """Which column is what, where no shape fits."""
    roles: Annotated[dict[str, str], AfterValidator(_known_roles)] = dataclasses.field(default_factory=dict)
    """Name of a role in the rows -> our name (`system`, `user`, `assistant`, ...)."""
    system_prompt: str | None = None
    """A system message for conversations that have none."""
    filters: Filters = dataclasses.field(default_factory=Filters)
    """What is left out of this source, besides what is left out of all."""
    take: Count | None = None
    """Most rows that are kept of it, after all filters but those on tokens."""
    take_seed: int | None = None
    """null: the first rows are taken; a number: a random choice of that seed, in the rows' order."""

    @model_validator(mode="after")
    def _is_possible(self) -> SourceChoice:
        if self.take_seed is not None and (self.take is None or self.path == "-"):
            raise ValueError("take_seed: goes with take, and reads the source twice, which stdin cannot")
        if self.shape != "auto" and (self.columns.messages or self.columns.prompt):
            raise ValueError("columns: name the conversation's columns or a shape, not both")
        if self.revision is not None and not self.path.startswith(HUB):
            raise ValueError(f"revision: only a data set on the hub has one ({HUB}OWNER/NAME)")
        return self

    @property
    def configs(self) -> tuple[str | None, ...]:
        """The configurations to read; None: there is one."""
        return self.config if isinstance(self.config, tuple) else (self.config,)

    @property
    def is_plain(self) -> bool:
        """Whether lines of JSON with messages can be handed on as they stand."""
        is_mapped = (
            self.shape not in ("auto", "messages") or self.columns != ColumnNames() or bool(self.roles)
        )
        is_changed = self.name is not None or self.system_prompt is not None or self.take is not None
        return not is_mapped and not is_changed and self.filters.are_of_tokens

    def said(self) -> dict[str, Any]:
        """Return what is not at its default, for the manifest; of paths only those on the hub."""
        options = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != getattr(SourceChoice(path="-"), field.name)
        }
        if not self.path.startswith(HUB):
            options.pop("path", None)
        if "columns" in options:
            options["columns"] = {key: name for key, name in dataclasses.asdict(self.columns).items() if name}
        if "filters" in options:
            options["filters"] = self.filters.said()
        return options


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfAll:
    """What holds for all sources of a preparation."""

    filters: Filters = dataclasses.field(default_factory=Filters)
    dedup: bool = False
    """Leave out conversations that were there before, whatever source they are of."""
    portion: tuple[float, float] | None = None
    """Keep those whose digest, as a number of [0, 1), is not below the one and below the other."""

    def said(self) -> dict[str, Any]:
        """Return what is asked, for the manifest."""
        asked = {"dedup": self.dedup, "portion": self.portion, "filters_of_all": self.filters.said()}
        return {key: value for key, value in asked.items() if value}

    @property
    def is_plain(self) -> bool:
        """Whether no row need be read for it."""
        return not self.dedup and self.portion is None and self.filters.are_of_tokens


def read_word(word: str, shape: str = "auto") -> dict[str, str]:
    """Return what a word of the command line says of a source: a path, or hub:OWNER/NAME[,KEY=VALUE]...."""
    options: dict[str, str] = {}
    if word.startswith(HUB):
        word, *pairs = word.split(",")
        options = dict(pair.partition("=")[::2] for pair in pairs)
    return {"path": word, "shape": shape, **options}
