"""The package's imports point one way: from the first rows of the table in streamprune/README.md to the last."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "streamprune"


def ranks() -> dict[str, int]:
    """The row of each room of the package, or module outside all rooms."""
    table = (PACKAGE / "README.md").read_text()
    found = {}
    for number, row in enumerate(line for line in table.splitlines() if line.startswith("| `")):
        for name in re.findall(r"`(\w+)(?:/|\.py)`", row.split("|")[1]):
            found[name] = number
    return found


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, also within functions."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.removeprefix("streamprune.") for name in modules if name.startswith("streamprune.")}


def test_every_room_has_its_row() -> None:
    here = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert here - {"__init__", "__main__", "__pycache__"} == ranks().keys()


def test_imports_point_from_the_first_rows_to_the_last() -> None:
    rank, against = ranks(), set()
    for path in PACKAGE.rglob("*.py"):
        here = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        room = here.split(".")[0]
        for there in imports(path):
            if room in rank and rank[room] > rank[there.split(".")[0]]:
                against.add((here, there))
    assert not against


def test_types_of_every_program_in_tools_are_checked() -> None:
    """What a program imports within its functions is found missing by mypy, not by the user."""
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    programs = {
        f"tools/{path.name}"
        for path in (ROOT / "tools").iterdir()
        if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env python3")
    }
    assert {"streamprune", *programs} == set(checked)
