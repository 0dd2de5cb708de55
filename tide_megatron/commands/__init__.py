"""The command line: `tide <verb>`, one file a verb, no logic.

A verb parses words, calls one function of the layers below and prints what it returns. Heavy imports stand
inside the verbs, so that `tide --help` is instant. A fault of the user's is one message on stderr and exit
code 2; a bug is a traceback and exit code 1, ranks that were killed or stood still are exit code 70; a stop
signal (Ctrl-C, SIGTERM) ends in order with exit code 75, a second one at once with 128 + its number
(docs/launch.md).
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from tide_megatron import __version__
from tide_megatron.base.disk import disk_words
from tide_megatron.base.errors import RanksFailed, RanksLost, TideError
from tide_megatron.base.files import keep_others_out
from tide_megatron.base.log import start_log
from tide_megatron.base.startup import STARTUP, process_began
from tide_megatron.base.stop import is_stop
from tide_megatron.commands.chat import chat
from tide_megatron.commands.checkpoint import app as checkpoint
from tide_megatron.commands.convert import app as convert
from tide_megatron.commands.data import app as data
from tide_megatron.commands.doctor import doctor
from tide_megatron.commands.evaluate import evaluate
from tide_megatron.commands.export import export
from tide_megatron.commands.model_verbs import app as model
from tide_megatron.commands.plan_verb import plan
from tide_megatron.commands.prepare import prepare
from tide_megatron.commands.recipe import recipe
from tide_megatron.commands.report import report
from tide_megatron.commands.sample import sample
from tide_megatron.commands.status import status
from tide_megatron.commands.submit import submit
from tide_megatron.commands.train import train
from tide_megatron.launch.signals import LOST_CODE, leave, stopped_code, watch_signals

VERBS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "train": train,
    "submit": submit,
    "status": status,
    "plan": plan,
    "recipe": recipe,
    "sample": sample,
    "chat": chat,
    "evaluate": evaluate,
    "report": report,
    "export": export,
    "doctor": doctor,
}
"""`tide <key>` runs the value."""

app = typer.Typer(
    help="Distil diffusion language models across architectures, layouts and tokenizers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)
app.add_typer(convert, name="convert")
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(model, name="model")
app.add_typer(data, name="data")


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"tide-megatron {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil diffusion language models across architectures, layouts and tokenizers."""


def main() -> None:
    """Run `tide`; the entry point of the console script."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; our own words go through the log
    keep_others_out()
    STARTUP.command_began = process_began()
    with watch_signals():
        start_log()
        if isinstance(sys.stdout, io.TextIOWrapper):  # where ü is unknown it is shown as \xfc, as on stderr
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            app(prog_name="tide")
        except (TideError, OSError) as error:
            if isinstance(error, OSError) and error.filename is None:
                raise  # of no disk
            print(f"error: {disk_words(error) if isinstance(error, OSError) else error}", file=sys.stderr)
            sys.exit(2)
        except RanksFailed as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(LOST_CODE if isinstance(error, RanksLost) else 1)
        except BaseException as end:
            if is_stop(end):
                leave(stopped_code())
            raise
