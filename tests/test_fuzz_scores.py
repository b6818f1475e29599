"""A few hundred strange inputs for everything that scores and choices are read from."""

from __future__ import annotations

import pytest

from tests.fuzz_scores import score_targets
from tests.fuzz_targets import Target

EXAMPLES = 200
NAMES = ["scores, headers", "scores, bytes", "inspect", "keep file", "schedule file", "mix", "comparison"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in score_targets(tmp_path_factory.mktemp("fuzz"))}


def test_every_target_is_listed(made: dict[str, Target]) -> None:
    assert list(made) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_strange_input_ends_well(name: str, made: dict[str, Target]) -> None:
    tally = made[name].run(EXAMPLES)
    assert tally.inputs >= 0.9 * EXAMPLES * made[name].share
    assert 0 < tally.refused < tally.inputs
