"""What only `--all` runs: marks for tests and for some of their parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import product
from typing import Any

import pytest

from tests.tiny import FAMILIES

#: A test that only `--all` runs.
thorough = pytest.mark.thorough
#: Families that differ most in what streamprune has to do: plain; fused experts with biases; groups of experts, latent
#: attention and a dense first layer; linear attention and a shared expert; keys and values shared between layers.
DISTINCT = ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "gemma4_text")


def mostly_thorough(cases: Iterable[Any], usual: Collection[Any]) -> list[Any]:
    """Parameters of a test: those in `usual` (or whose `id` is) run every time, the others only with `--all`."""
    return [
        case
        if getattr(case, "id", case) in usual
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=thorough)
        for case in cases
    ]


def crossed(*values: Iterable[Any], usual: Collection[tuple[Any, ...]]) -> list[Any]:
    """Parameters of a test of several arguments: every combination of their values, of which `usual` run every time."""
    return mostly_thorough(product(*values), usual)


def by_family(usual: Collection[str] = DISTINCT, families: Iterable[Any] = FAMILIES) -> pytest.MarkDecorator:
    """Parametrize a test with every family (argument `family`), of which `usual` are run without `--all`."""
    return pytest.mark.parametrize("family", mostly_thorough(families, usual), ids=lambda family: family.id)
