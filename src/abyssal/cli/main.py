"""The program `abyssal`: its commands, and how their faults and interruptions end it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from abyssal import __version__
from abyssal.cli.bench import bench
from abyssal.cli.chat import chat
from abyssal.cli.convert import convert
from abyssal.cli.demo import demo
from abyssal.cli.doctor import doctor
from abyssal.cli.generate import generate
from abyssal.cli.inspect import inspect
from abyssal.cli.machine import machine
from abyssal.cli.plan import PLAN_HELP, PlanGroup, plan_recipe
from abyssal.cli.plan_experts import experts
from abyssal.cli.plan_schedule import schedule
from abyssal.cli.prepare import prepare
from abyssal.cli.recipes import recipes
from abyssal.cli.report import report
from abyssal.cli.serve import serve
from abyssal.cli.train import train
from abyssal.errors import AbyssalError, Stopped

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended

app = typer.Typer(name="abyssal", add_completion=False, pretty_exceptions_enable=False)
for command in (demo, train, generate, chat, serve, report, prepare, inspect, convert, recipes, doctor, machine):
    app.command()(command)
plan = typer.Typer(name="plan", cls=PlanGroup, help=PLAN_HELP)
plan.command("recipe")(plan_recipe)
plan.command()(schedule)
plan.command()(experts)
app.add_typer(plan)
app.add_typer(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"abyssal {__version__}")
        raise typer.Exit


@app.callback()
def abyssal(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """The DeepSeek-V3 system: model, training, generation, and the plan of what they cost.

    Begin with: abyssal demo
    """


def main(arguments: Sequence[str]) -> int:
    """Run one command and return the exit code: 0, 1 for a failure, 2 for wrong usage, or 128 plus a signal.

    A fault of the user ends in one sentence on stderr; a defect of ours keeps its traceback.
    """
    try:
        code = app(list(arguments) or ["--help"], prog_name="abyssal", standalone_mode=False)
        sys.stdout.flush()  # here, where a closed pipe can still be caught
    except AbyssalError as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "abyssal"
        return _fail(f"{error.format_message()}\nsee: {path} --help", error.exit_code)
    except Stopped as stopped:
        return 128 + stopped.signal
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # the reader (`| head`) has what it wants; the interpreter's own flush at exit must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0  # typer hands back the code of an Exit, or what the command returned


def _fail(sentence: str, code: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code


def run() -> None:
    """Run the command line of this process; the entry point of the installed program."""
    try:
        code = main(sys.argv[1:])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    _leave_broken_group(code)
    sys.exit(code)


def _leave_broken_group(code: int) -> None:
    """End at once where a rank failed: the interpreter's own end waits for what other ranks never send."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
