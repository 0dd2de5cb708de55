"""Options that several verbs share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer

if TYPE_CHECKING:
    from rich.table import Table

Wanted = Literal["auto", "cpu", "cuda"]
"""As `base.device.Wanted`, which would import torch here."""

ContextKind = Literal["bidirectional", "block_causal", "block_diffusion"]
"""As `diffusion.mask.ContextKind`, for the same reason."""

DeviceOption = Annotated[Wanted, typer.Option(help="Where to compute; auto takes CUDA where it works.")]

ContextOption = Annotated[
    ContextKind | None,
    typer.Option(help="The context kind that it was trained in; default: its folder's."),
]
BlockSizeOption = Annotated[
    int | None, typer.Option(min=1, help="The block size it was trained with; default: its folder's.")
]
ShowOrderOption = Annotated[
    bool, typer.Option("--show-order", help="Colour replies by the order in which tokens were committed.")
]
RanksOption = Annotated[
    int | None, typer.Option(min=1, help="Ranks to start here; leave out under torchrun or srun.")
]
RanksPerNodeOption = Annotated[
    int | None,
    typer.Option(min=1, help="Ranks to start on each node, from one task of srun a node (docs/slurm.md)."),
]


PrecisionOption = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option(help="Numbers to compute in; auto: bf16 on CUDA, fp32 on CPU."),
]
EngineOption = Annotated[
    Literal["auto", "te", "scaled", "local", "emulated"],
    typer.Option(help="What computes the layers; one that is named runs or is refused (docs/precision.md)."),
]
Fp8Option = Annotated[
    Literal["rowwise", "blockwise", "tensorwise"] | None,
    typer.Option(help="Hold and multiply the layers' matrices in FP8, by this recipe."),
]


def print_whole(table: Table) -> None:
    """Print a table without cutting a name: a terminal folds them, a pipe has no edge."""
    import rich
    from rich.console import Console

    console = rich.get_console()
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", not console.is_terminal
    (console if console.is_terminal else Console(width=10_000)).print(table)


def with_fields_of(kind: type[Any], name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Said a verb's parameter into one option of each field of a dataclass, which is declared once.

    Args:
        kind: its fields are `Annotated[type, "help"]`; one without a default is a list.
        name: of the parameter, which the verb is called with.
    """
    hints = get_type_hints(kind, include_extras=True)
    fields = {}
    for field in dataclasses.fields(kind):
        type_, meaning = get_args(hints[field.name])
        default = None if field.default is dataclasses.MISSING else field.default
        hint = type_ if default is not None or field.default is None else type_ | None
        fields[field.name] = (Annotated[hint, typer.Option(help=meaning)], default)

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = get_type_hints(verb, include_extras=True)
        parameters = []
        for parameter in inspect.signature(verb).parameters.values():
            if parameter.name != name:
                parameters.append(parameter.replace(annotation=own[parameter.name]))
                continue
            for field, (hint, default) in fields.items():
                kept = inspect.Parameter(field, parameter.kind, default=default, annotation=hint)
                parameters.append(kept)

        def flat(*words: Any, **options: Any) -> None:
            given = {field: options.pop(field) for field in fields}
            chosen = {field: value for field, value in given.items() if value is not None}
            verb(*words, **options, **{name: kind(**chosen)})

        flat.__name__, flat.__doc__ = verb.__name__, verb.__doc__
        flat.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
        flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return flat

    return decorate
