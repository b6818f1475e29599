"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamprune.cli import main
from tests.tiny import ALL_FAMILIES, FAMILIES, REFUSED

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_table_of_families_lists_exactly_the_tested_ones_and_all_pass() -> None:
    table = README.read_text().partition("<!-- families: made by tools/families -->")[2]
    table = table.partition("<!-- families end -->")[0]
    rows = re.findall(r"^\| (\w+) \| exact \| exact \| exact \|$", table, re.MULTILINE)
    assert sorted(rows) == sorted(family.id for family in ALL_FAMILIES)
    assert all(f"`{family.id}`" in table for family, _ in REFUSED)
    assert "fails" not in table


def test_the_installed_transformers_knows_enough_families() -> None:
    assert len(FAMILIES) >= 40


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_option_in_the_readme_exists(command: str) -> None:
    named = set()
    for line in re.findall(rf"streamprune {command}\b([^\n]*)", README.read_text()):
        named |= set(re.findall(r"--[a-z][a-z-]+", line))
    text = CliRunner().invoke(main, [command, "--help"]).output
    for inner in getattr(main.commands[command], "commands", {}):
        text += CliRunner().invoke(main, [command, inner, "--help"]).output
    assert all(option in text for option in named), named
