"""Text that every Python installation has, or that a few lines generate: four domains, always the same.

It is the `builtin` calibration, for a first run without files, and the training text of the demo's model.
"""

from __future__ import annotations

import ast
import io
import json
import random
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: The calibration that needs no file: all domains, or some of them ("builtin:code,prose").
BUILTIN = "builtin"
#: Longest document, in characters; source files are cut into such pieces.
DOCUMENT_CHARACTERS = 6000
#: Folders that are left out: installed packages, test data and tables.
LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings")
)
_LAYOUT = frozenset((tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT))


def code_documents(seed: int) -> Iterator[str]:
    """Standard-library modules without comments and docstrings."""
    for source in _library_sources(seed):
        tree, nodes = _documented(source)
        for node in nodes:
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        yield from _pieces(ast.unparse(tree))


def prose_documents(seed: int) -> Iterator[str]:
    """English about programs: docstrings and comment blocks of the standard library, and the language reference."""
    from pydoc_data.topics import topics

    reference = [" ".join(text.split("\n\n", 1)[-1].split()) for _, text in sorted(topics.items())]
    random.Random(seed).shuffle(reference)
    pending = iter(reference)
    for source in _library_sources(seed):
        docstrings = [ast.get_docstring(node) or "" for node in _documented(source)[1]]
        yield from _pieces("\n\n".join(part for part in (*docstrings, *_comment_blocks(source)) if len(part) > 60))
        yield from _pieces(next(pending, ""))


def arithmetic_documents(seed: int) -> Iterator[str]:
    """Worked sums, differences, products and comparisons of small numbers, without end."""
    rng = random.Random(seed)

    def line() -> str:
        one, other = rng.randint(0, 99), rng.randint(0, 99)
        small, large = sorted((one, other))
        return rng.choice(
            (
                f"{one} + {other} = {one + other}",
                f"{large} - {small} = {large - small}",
                f"{one % 10} * {other % 10} = {(one % 10) * (other % 10)}",
                f"max({one}, {other}) = {large}",
            )
        )

    while True:
        yield "\n".join(line() for _ in range(40))


def record_documents(seed: int) -> Iterator[str]:
    """JSON records of people, orders and measurements, without end."""
    rng = random.Random(seed)
    names = ("ada", "grace", "alan", "edsger", "barbara", "donald", "tony", "niklaus", "john", "margaret")
    cities = ("london", "paris", "zurich", "oslo", "vienna", "madrid", "lisbon", "prague")
    items = ("lamp", "chair", "desk", "book", "clock", "kettle", "brush", "rope")

    def person() -> dict[str, object]:
        return {"type": "person", "name": rng.choice(names), "age": rng.randint(18, 90), "city": rng.choice(cities)}

    def order() -> dict[str, object]:
        what = {"type": "order", "id": rng.randint(1000, 9999), "item": rng.choice(items)}
        return what | {"count": rng.randint(1, 9), "paid": rng.random() < 0.5}

    def sample() -> dict[str, object]:
        return {"type": "sample", "sensor": f"s{rng.randint(1, 9)}", "values": [rng.randint(0, 99) for _ in range(3)]}

    while True:
        yield "\n".join(json.dumps((person, order, sample)[rng.randrange(3)]()) for _ in range(16))


#: Domain name -> documents of it in a fixed order, from a seed. The last two never end.
DOMAINS: dict[str, Callable[[int], Iterator[str]]] = {
    "code": code_documents,
    "prose": prose_documents,
    "arithmetic": arithmetic_documents,
    "records": record_documents,
}


def _library_sources(seed: int) -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    # Only parts below the folder count: Python itself may be installed under a folder with such a name.
    paths = [path for path in sorted(folder.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(folder).parts)]
    random.Random(seed).shuffle(paths)
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 500 < len(text) < 400_000:
            yield text


def _documented(source: str) -> tuple[ast.Module, list[Any]]:
    """A module's tree, and its nodes that may have a docstring; an empty tree if this Python cannot parse it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        tree = ast.parse("")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return tree, [node for node in ast.walk(tree) if isinstance(node, kinds)]


def _comment_blocks(source: str) -> Iterator[str]:
    block: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                block.append(token.string.lstrip("#! ").rstrip())
            elif token.type not in _LAYOUT and block:
                yield " ".join(block)
                block = []
    except (tokenize.TokenError, SyntaxError):
        return


def _pieces(text: str) -> Iterator[str]:
    """The text cut into documents, without very short ones."""
    for start in range(0, len(text), DOCUMENT_CHARACTERS):
        piece = text[start : start + DOCUMENT_CHARACTERS]
        if len(piece) > 200:
            yield piece
