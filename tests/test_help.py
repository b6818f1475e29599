"""--help: every option in a group, examples that are commands of the program, and no placeholder without a meaning."""

from __future__ import annotations

import re
import shlex

import click
import pytest
from click.testing import CliRunner

from streamprune import errors
from streamprune.cli import main
from streamprune.cli.help import COMMANDS, EXAMPLES, GROUPS
from streamprune.errors import StreampruneError


def every_command() -> dict[str, click.Command]:
    """All commands by what is typed, those of `calibration` too."""
    found: dict[str, click.Command] = {}
    for name, command in main.commands.items():
        inner = command.commands if isinstance(command, click.Group) else None
        found |= {name: command} if inner is None else {f"{name} {each}": inner[each] for each in inner}
    return found


@pytest.mark.parametrize("typed", every_command())
def test_options_stand_in_groups_with_what_they_take_and_examples(typed: str) -> None:
    shown = CliRunner().invoke(main, [*typed.split(), "--help"]).output
    assert "\nMore:\n" not in shown, "an option is in no group of cli/help.py"
    assert not re.search(r"--\S+ (TEXT|INTEGER|FLOAT|PATH|DIRECTORY|FILENAME)\b", shown), "say what the value is"
    assert "Examples:\n" in shown
    assert "..." not in shown.replace("[OPTIONS]", "").split("\n", 1)[1], "nothing is cut off"
    lines = shown.split("Examples:\n")[1].splitlines()
    assert len(lines) == len(EXAMPLES[typed.split()[-1]]) > 0
    command = every_command()[typed]
    for line in lines:
        words = shlex.split(line)
        assert words[: 1 + len(typed.split())] == ["streamprune", *typed.split()]
        # Raises UsageError for options and arguments that there are not.
        command.make_context(typed, words[1 + len(typed.split()) :])


def test_commands_stand_in_groups_with_their_whole_first_sentence() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    assert "\nCommands:\n" not in shown, "a command is in no group of cli/help.py"
    assert "..." not in shown.split("\n", 1)[1]
    assert sorted(name for names in COMMANDS.values() for name in names) == sorted(main.commands)
    places = [shown.index(f"\n{title}:\n") for title in COMMANDS]
    assert places == sorted(places)


def test_every_exit_status_of_an_error_is_told() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output.partition("Exit status:\n")[2]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StreampruneError)]
    told = {line.split()[0] for line in shown.splitlines() if line.strip()[:1].isdigit()}
    assert {str(kind.exit_code) for kind in kinds if hasattr(kind, "exit_code")} <= told


def test_common_options_come_first() -> None:
    shown = CliRunner().invoke(main, ["run", "--help"]).output
    titles = [title for title in GROUPS if f"\n{title}:\n" in shown]
    assert [shown.index(f"\n{title}:\n") for title in titles] == sorted(shown.index(f"\n{each}:\n") for each in titles)
    assert shown.index("--keep") < shown.index("--output") < shown.index("--calibration") < shown.index("--method")
