"""Strange inputs for each thing that is read: some, with `--all` hundreds; `tools/fuzz` gives as many as you like."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.checkpoint.hub import read_hub_headers
from streamprune.checkpoint.index import SINGLE_NAME
from tests.fuzz_scores import score_targets
from tests.fuzz_targets import Target, targets
from tests.fuzzing import Tally, as_json, judge, mutated_bytes, mutated_json
from tests.hub_model import hub_for_this_process
from tests.shards import DATA, GOOD, METADATA, shard

#: Inputs for a target of share 1: with `--all`, and without.
EXAMPLES = {True: 200, False: 40}
NAMES = [
    "safetensors headers", "index", "config.json as JSON", "config.json as a model's config", "fit",
    "run up to its plan", "damaged records", "index of saved states", "journal, read", "journal, resumed",
    "calibration, JSONL", "calibration, text", "calibration, parquet", "calibration, recipe",
    "streamprune.json, verified",
]  # fmt: skip


#: What scores and choices are read from.
SCORES = ["scores, headers", "scores, bytes", "inspect", "keep file", "schedule file", "mix", "comparison"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    place = tmp_path_factory.mktemp("fuzz")
    return {target.name: target for target in (*targets(place), *score_targets(place))}


def test_every_target_is_listed(made: dict[str, Target]) -> None:
    assert list(made) == NAMES + SCORES


@pytest.mark.parametrize("name", NAMES + SCORES)
def test_strange_input_ends_well(name: str, made: dict[str, Target], thoroughly: bool) -> None:
    examples = EXAMPLES[thoroughly]
    tally = made[name].run(examples)
    # As many as were asked for, and strange enough to be refused now and then; a damaged record only counts as none.
    assert tally.inputs >= 0.9 * examples * made[name].share
    assert tally.refused > 0 or name in ("damaged records", "index of saved states")
    # Few of the inputs that choices are read from are sound: with `--all` there are some.
    assert tally.refused < tally.inputs or name in NAMES or not thoroughly


def test_headers_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally()
    with hub_for_this_process(tmp_path, monkeypatch) as server:

        @settings(max_examples=40, deadline=None, database=None, derandomize=True)
        @given(
            mutated_json(METADATA | GOOD).map(lambda value: shard(as_json(value), DATA)) | mutated_bytes(shard(GOOD))
        )
        def fetch(content: bytes) -> None:
            server.add("org/model", {"config.json": b"{}", SINGLE_NAME: content})
            judge(tally, "org/model", lambda: read_hub_headers("org/model", None))

        fetch()
    assert tally.inputs >= 36
    assert tally.refused > 0


def test_a_hang_a_flood_and_a_traceback_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: what it is there to find, it finds."""
    monkeypatch.setattr("tests.fuzzing.WATCHDOG_SECONDS", 0.2)

    def hang() -> None:
        while True:
            pass

    with monkeypatch.context() as patch:
        patch.setattr("tests.fuzzing.WAITING_SECONDS", 0.2)
        with pytest.raises(TimeoutError):
            judge(Tally(), None, lambda: time.sleep(60))
    for action, raised in (
        (hang, TimeoutError),
        (lambda: bytearray(2**40), MemoryError),
        (lambda: {}["key"], KeyError),
    ):
        with pytest.raises(raised):
            judge(Tally(), None, action)
    for inputs in (st.just(1), st.integers()):
        with pytest.raises(ZeroDivisionError):
            Target("fails", inputs, lambda _: judge(Tally(), None, lambda: 1 // 0)).run(5)
