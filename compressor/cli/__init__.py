"""The `compress` command. One file per command: parse, call, print. torch is imported inside the
commands only.

stdout carries the result, stderr progress and messages. Exit codes: 0, 1 (the input cannot be
used), 2 (usage), 130 (Ctrl-C).
"""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Annotated

import typer

from compressor.cli.bench import bench
from compressor.cli.doctor import doctor
from compressor.cli.eval import evaluate
from compressor.cli.export import export
from compressor.cli.import_legacy import import_legacy
from compressor.cli.inspect import inspect
from compressor.cli.lowrank import lowrank
from compressor.cli.options import FLAGS, as_flags
from compressor.cli.pack import pack
from compressor.cli.plan import plan
from compressor.cli.prune import prune
from compressor.cli.push import push
from compressor.cli.recipes import recipes
from compressor.cli.report import report
from compressor.cli.resume import resume
from compressor.cli.show import speaks
from compressor.cli.streams import finish, safe_streams
from compressor.cli.unpack import unpack
from compressor.cli.verify import verify
from compressor.errors import CompressError, InterruptedRun, ProcessError
from compressor.text import home_path

app = typer.Typer(
    name="compress",
    help="Make a Hugging Face language model smaller, after training, in one shot.",
    epilog="Example: [bold]compress prune org/model -o out --method sparsegpt --pattern 2:4[/bold]",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prune", no_args_is_help=True)(prune)
app.command("lowrank", no_args_is_help=True)(lowrank)
app.command("plan", no_args_is_help=True)(plan)
app.command("eval", no_args_is_help=True)(evaluate)
app.command("inspect", no_args_is_help=True)(inspect)
app.command("unpack", no_args_is_help=True)(unpack)
app.command("pack", no_args_is_help=True)(pack)
app.command("export", no_args_is_help=True)(export)
app.command("import", no_args_is_help=True)(import_legacy)
app.command("push", no_args_is_help=True)(push)
app.command("doctor")(doctor)
app.command("bench")(bench)
app.command("report", no_args_is_help=True)(report)
app.command("recipes")(recipes)
app.command("resume", no_args_is_help=True)(resume)
app.command("verify", no_args_is_help=True)(verify)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("compress-llm"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a Hugging Face language model smaller, after training, in one shot."""


def _flags() -> dict[str, str]:
    """Keyword of Python -> option, of all commands: a function names its keywords as its command
    its options.
    """
    commands = typer.main.get_group(app).commands.values()
    own = [
        each for command in commands for each in command.params if each.param_type_name == "option"
    ]
    return {str(each.name): max(each.opts, key=len) for each in own} | dict(FLAGS)


def main() -> None:
    """Entry point: one clear line for every expected error, and the exit code."""
    # threads that spin while they wait for each other made a run ten times as long on two busy
    # cores; read when torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # its warning about forks is not for our users
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, _end)
    with safe_streams():
        try:
            _run()
        except BrokenPipeError:
            sys.exit(0)
        except OSError as error:  # of a full disk behind a redirection; of files the system names
            where = error.filename or "standard output"
            print(f"error: {error.strerror or error}: {where}", file=sys.stderr)
            sys.exit(1)


def _end(received: int, _: object) -> None:
    """Unwind, so that nothing half-written stays. One that ends already says its own line first:
    torchrun sends a signal just when a process finds that another is gone.
    """
    if not isinstance(sys.exception(), CompressError):
        sys.exit(128 + received)


def _run() -> None:
    """The command of the command line. A leading ~ is what a shell makes of it: in quotes, and
    after `--option=`, it leaves that to us.
    """
    try:
        app(args=[_at_home(word) for word in sys.argv[1:]])
    except CompressError as error:
        second = (
            isinstance(error, ProcessError) and os.environ.get("RANK") == "1"
        )  # the first may be the one that is gone
        if speaks() or second:
            message = as_flags(str(error), _flags())
            print(
                message if isinstance(error, InterruptedRun) else f"error: {message}",
                file=sys.stderr,
            )
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == 130:  # what Typer makes of Ctrl-C
            print("interrupted: nothing was written", file=sys.stderr)
        if not end.code:
            finish()
        raise


def _at_home(word: str) -> str:
    option, tilde, path = re.fullmatch(r"((?:--[\w-]+=|-o)?)(~?)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]  # it matches anything
    return f"{option}{home_path(f'~{path}')}" if tilde else word
