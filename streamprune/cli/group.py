"""The group of all commands: how --help lists them, errors as one message, and several processes at one command."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import click

from streamprune.cli.help import format_commands
from streamprune.cli.hints import with_hint
from streamprune.distributed.processes import is_first
from streamprune.errors import (
    InterruptedRunError,
    OtherProcessError,
    ProcessesError,
    ReportedElsewhereError,
    StreampruneError,
)


class Commands(click.Group):
    """A command line that several processes may run at once, with errors as one line on stderr and an exit status.

    Only the first process prints. The others print only an OtherProcessError and unexpected errors, which the first
    process cannot report.
    """

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands for --help."""
        format_commands(self, formatter)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Parse and run a command. All processes but the first are silenced."""
        try:
            first = is_first()
        except ProcessesError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)
        if first:
            return super().main(*args, **extra)
        # torch would complain once the first process has ended.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            try:
                return super().main(*args, **extra)
            except Exception:
                traceback.print_exc(file=sys.__stderr__)
                sys.exit(1)

    def invoke(self, context: click.Context) -> Any:
        """Run a command. A StreampruneError is printed as one message on stderr, and sets the exit status."""
        try:
            return super().invoke(context)
        except ReportedElsewhereError as error:
            sys.exit(error.exit_code)
        except OtherProcessError as error:
            # Use the real stderr: this process is silenced, but no other process reports this error.
            print(f"Error: {error}", file=sys.__stderr__, flush=True)
            sys.exit(error.exit_code)
        except click.UsageError as error:
            raise with_hint(error) from None
        except InterruptedRunError as error:
            # As it was asked to: no error.
            click.echo(str(error), err=True)
            sys.exit(error.exit_code)
        except StreampruneError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            sys.exit(130)
