"""The README says what is so."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from streamprune.cli import main
from tests.quantized import SCHEMES
from tests.test_widths import FIXED
from tests.tiny import ALL_FAMILIES, FAMILIES, REFUSED

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_table_of_families_lists_exactly_the_tested_ones_and_all_pass() -> None:
    table = README.read_text().partition("<!-- families: made by tools/families -->")[2]
    table = table.partition("<!-- families end -->")[0]
    rows = re.findall(r"^\| exact \| exact \| exact \| (exact|refused) \| ([\w, ]+) \|$", table, re.MULTILINE)
    found = {narrower: names.split(", ") for narrower, names in rows}
    assert found == {
        "exact": sorted(family.id for family in ALL_FAMILIES if family.id not in FIXED),
        "refused": sorted(FIXED),
    }
    assert all(f"`{family.id}`" in table for family, _ in REFUSED)
    assert "fails" not in table


def test_the_table_of_formats_has_every_tested_one_and_all_pass() -> None:
    table = README.read_text().partition("<!-- formats: made by tools/families -->")[2]
    table = table.partition("<!-- formats end -->")[0]
    rows = re.findall(r"^\| (.+) \| exact \| (?:exact|partly|no) \| ([\w, ]+) \|$", table, re.MULTILINE)
    titles = runpy.run_path(str(README.with_name("tools") / "families"))["FORMATS"]
    assert sorted(title for row, _ in rows for title in row.split("; ")) == sorted(titles)
    assert all(any(re.fullmatch(schemes, scheme) for schemes in titles.values()) for scheme in SCHEMES)


def test_the_installed_transformers_knows_enough_families() -> None:
    assert len(FAMILIES) >= 40


def shown_commands() -> list[str]:
    """The streamprune commands in the README's blocks of code, without comments."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [re.search(r"(?:^(?:\$ )?(?:\S*/)?|-m )streamprune ([a-z].*)", line) for line in lines]
    return [match[1].partition("   #")[0].strip() for match in found if match]


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_in_the_readme_is_understood(line: str) -> None:
    """Command, arguments and options, with values of the right kind; nothing is run."""
    name, *words = shlex.split(line.partition("  # ")[0])
    command: click.Command = main.commands[name]
    if isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
    command.make_context(name, words)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 250


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_option_in_the_readme_exists(command: str) -> None:
    named = set()
    for line in re.findall(rf"streamprune {command}\b([^\n]*)", README.read_text()):
        named |= set(re.findall(r"--[a-z][a-z-]+", line))
    text = CliRunner().invoke(main, [command, "--help"]).output
    for inner in getattr(main.commands[command], "commands", {}):
        text += CliRunner().invoke(main, [command, inner, "--help"]).output
    assert all(option in text for option in named), named
