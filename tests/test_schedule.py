"""Schedules: totals met exactly, within limits, in the shape that was asked for."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streamprune.errors import SettingsError
from streamprune.models.config_json import ExpertSpec, minimum_keep
from streamprune.selection.select import layer_counts
from streamprune.selection.settings import SelectionSettings
from streamprune.selection.user_files import least_per_layer, read_schedule_file

QWEN = ExpertSpec((), "num_experts", 128, 8)
GROUPED = ExpertSpec((), "n_routed_experts", 64, 6, groups=8, topk_groups=4)


@st.composite
def problems(draw: st.DrawFn) -> tuple[ExpertSpec, int, int, int | None]:
    """A router, a number of layers, and a total that can be divided among them."""
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    size = draw(st.integers(2, 20))
    top_k = draw(st.integers(1, size))
    spec = ExpertSpec((), "n", groups * size, top_k, groups, draw(st.integers(1, groups)))
    assume(minimum_keep(spec) <= spec.count)
    layers = draw(st.integers(1, 12))
    floor = draw(st.none() | st.integers(1, spec.count))
    least = least_per_layer(spec, floor) * layers // groups
    return spec, layers, draw(st.integers(least, size * layers)) * groups, floor


@given(
    problems(),
    st.sampled_from(["uniform", "linear-decrease", "linear-increase", "global"]),
    st.floats(0, 0.99),
    st.data(),
)
def test_totals_are_exact_and_limits_kept(
    problem: tuple[ExpertSpec, int, int, int | None], schedule: str, spread: float, data: st.DataObject
) -> None:
    spec, layers, total, floor = problem
    selection = SelectionSettings(
        schedule=schedule, floor=floor, spread=spread if schedule.startswith("linear") else None
    )
    value = st.floats(-10, 10) | st.just(0.0)
    rows = st.lists(st.lists(value, min_size=spec.count, max_size=spec.count), min_size=layers, max_size=layers)
    scores = data.draw(rows) if schedule == "global" else None
    counts = layer_counts(selection, spec, layers, total, scores)
    assert sum(counts) == total
    assert len(counts) == layers
    assert all(least_per_layer(spec, floor) <= count <= spec.count for count in counts)
    assert all(count % spec.groups == 0 for count in counts)
    if schedule == "uniform":
        assert max(counts) - min(counts) <= spec.groups
    if schedule == "linear-decrease" and spread > 0.001:
        assert all(left <= right for left, right in pairwise(counts))
    if schedule == "linear-increase" and spread > 0.001:
        assert all(left >= right for left, right in pairwise(counts))


def test_the_published_example() -> None:
    """78 % removed, with a spread of 0.15 in 48 layers: 93 % at layer 0, 78 % midway, 63 % at layer 47."""
    total = 48 * 128 - round(0.78 * 48 * 128)
    counts = layer_counts(SelectionSettings(schedule="linear-decrease", spread=0.15), QWEN, 48, total)
    removed = [1 - count / 128 for count in counts]
    assert sum(counts) == total
    assert removed[0] == pytest.approx(0.93, abs=0.5 / 128)
    assert np.mean(removed[23:25]) == pytest.approx(0.78, abs=0.5 / 128)
    assert removed[47] == pytest.approx(0.63, abs=0.5 / 128)
    # Every layer is within one expert of the straight line.
    line = [0.93 - 0.3 * layer / 47 for layer in range(48)]
    assert max(abs(share - want) for share, want in zip(removed, line, strict=True)) < 1 / 128
    increasing = layer_counts(SelectionSettings(schedule="linear-increase", spread=0.15), QWEN, 48, total)
    assert sorted(increasing, reverse=True) == list(increasing)
    assert increasing[0] == counts[47]


def test_what_the_limits_cut_off_is_spread_over_the_others() -> None:
    total = 48 * 128 - round(0.78 * 48 * 128)
    counts = layer_counts(SelectionSettings(schedule="linear-decrease", spread=0.3), QWEN, 48, total)
    assert sum(counts) == total
    assert counts[0] == 8  # 1.08 cannot be removed: the router needs 8.
    steps = [right - left for left, right in pairwise(counts) if left > 8]
    assert set(steps) <= {1, 2}  # Beyond them the slope is as asked for: 0.6 · 128 / 47.


def test_equal_numbers_where_they_divide() -> None:
    assert layer_counts(SelectionSettings(), QWEN, 48, 48 * 20) == (20,) * 48
    assert layer_counts(SelectionSettings(), QWEN, 3, 62) == (21, 21, 20)
    assert layer_counts(SelectionSettings(schedule="linear-decrease"), QWEN, 1, 20) == (20,)
    assert layer_counts(SelectionSettings(schedule="linear-decrease", spread=0), QWEN, 4, 80) == (20,) * 4


def test_global_ranks_the_experts_of_all_layers_together() -> None:
    draw = np.random.default_rng(0)
    spec = ExpertSpec((), "n", 10, 2)
    scores = (draw.lognormal(size=(6, 10)) * draw.lognormal(size=(6, 1)) * 3).tolist()
    counts = layer_counts(SelectionSettings(schedule="global"), spec, 6, 30, scores)
    # Each layer's two best, then the best of the rest, one after the other.
    chosen = {
        (layer, expert) for layer in range(6) for expert in sorted(range(10), key=lambda e: -scores[layer][e])[:2]
    }
    for layer, expert in sorted(((la, e) for la in range(6) for e in range(10)), key=lambda at: -scores[at[0]][at[1]]):
        if len(chosen) < 30:
            chosen.add((layer, expert))
    assert counts == tuple(sum(layer == which for which, _ in chosen) for layer in range(6))
    assert len(set(counts)) > 2
    floored = layer_counts(SelectionSettings(schedule="global", floor=4), spec, 6, 30, scores)
    assert min(floored) == 4 > min(counts)
    assert sum(floored) == 30


def test_global_makes_room_for_protected_experts_and_breaks_ties_by_order() -> None:
    spec = ExpertSpec((), "n", 4, 1)
    flat = [[1.0] * 4] * 3
    assert layer_counts(SelectionSettings(schedule="global"), spec, 3, 6, flat) == (4, 1, 1)
    assert layer_counts(SelectionSettings(schedule="global"), spec, 3, 6, flat, [(), (), (0, 3, 2)]) == (2, 1, 3)
    linear = SelectionSettings(schedule="linear-increase", spread=0.5)
    # 4, 2 and 0 are wanted; the last needs 1, which leaves 3.5 and 1.5, of which the first is rounded up.
    assert layer_counts(linear, spec, 3, 6) == (4, 1, 1)
    assert layer_counts(linear, spec, 3, 6, (), [(), (), (0, 3, 2)]) == (2, 1, 3)


def test_groups_stay_equal_under_global() -> None:
    draw = np.random.default_rng(1)
    counts = layer_counts(SelectionSettings(schedule="global"), GROUPED, 4, 120, draw.lognormal(size=(4, 64)).tolist())
    assert sum(counts) == 120
    assert all(count % 8 == 0 and count >= minimum_keep(GROUPED) for count in counts)


@pytest.mark.parametrize(
    ("spec", "total", "floor", "message"),
    [
        (
            QWEN,
            31,
            None,
            "31 experts cannot be divided among 4 layers of 128 experts: 32 must stay .*picks 8 per token",
        ),
        (QWEN, 513, None, "there are 512. Keep between 32 and 512 in all"),
        (QWEN, 100, 30, "120 must stay .--floor is 30"),
        (QWEN, 100, 129, "--floor 129 is more than the 128 experts"),
        (GROUPED, 100, None, "8 groups of experts, which must stay equal in size. Keep 96 or 104 in all"),
    ],
)
def test_what_cannot_be_divided_is_refused(spec: ExpertSpec, total: int, floor: int | None, message: str) -> None:
    for schedule in ("uniform", "linear-decrease", "global"):
        with pytest.raises(SettingsError, match=message):
            layer_counts(SelectionSettings(schedule=schedule, floor=floor), spec, 4, total, [[0.0] * spec.count] * 4)


def written(path: Path, body: object) -> Path:
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    return path


def test_a_schedule_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    assert read_schedule_file(written(path, [8, 20, 128]), QWEN, 3) == (8, 20, 128)
    assert read_schedule_file(written(path, [0.5, 0.78, 0]), QWEN, 3) == (64, 29, 128)
    # At most so much is removed, as with --ratio, and groups stay equal.
    assert read_schedule_file(written(path, [0.3, 0.55]), GROUPED, 2) == (48, 32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([8, 20], "lists 2 numbers, but the model has 3 layers"),
        ([8, 20, 7], "entry 3: 7 would keep 7 of 128 experts. Every layer keeps between 8 and 128"),
        ([8, 20, 129], "entry 3: 129"),
        ([8, 20.5, 9], "entry 2: 20.5 is not a number of experts"),
        ([8, 0.5, 9], "entry 2: 0.5 is not a number of experts"),
        ([-1, 0.5, 0.5], "entry 1: -1 would keep -1"),
        ([0.99, 0.5, 0.5], "entry 1: 0.99 would keep 2 of 128"),
        ([0, 0, 0], "nothing would be removed"),
        ([128, 128, 128], "nothing would be removed"),
        ([8, True, 9], "list of numbers"),
        ([8, "9", 9], "list of numbers"),
        ({"0": 8}, "list of numbers"),
        ("[8, 9, NaN]", "list of numbers"),
        ("[8, 9, 1e999]", "list of numbers"),
        (f"[8, 9, 1{'0' * 400}]", "list of numbers"),
        (f"[8, 9, 1{'0' * 5000}]", "not valid JSON"),
        ("[8, 9", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_a_bad_list_is_refused_in_one_message(body: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message) as refusal:
        read_schedule_file(written(tmp_path / "counts.json", body), QWEN, 3)
    assert "counts.json" in str(refusal.value)


def test_a_schedule_that_is_neither_name_nor_file(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"'gobal' cannot be read: .*uniform, linear-decrease, linear-increase, global"
    ):
        read_schedule_file(Path("gobal"), QWEN, 3)
    with pytest.raises(SettingsError, match="not a regular file"):
        read_schedule_file(tmp_path, QWEN, 3)
    with pytest.raises(SettingsError, match=r"cannot be read|not valid"):
        read_schedule_file(Path("a\0b"), QWEN, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "wanda"}, "--method 'wanda' is unknown. Choose one of: reap, frequency"),
        ({"mix": "code"}, "--mix"),
        ({"schedule": ""}, "--schedule is empty"),
        ({"spread": 0.1}, "is for --schedule linear-decrease and linear-increase only"),
        ({"schedule": "linear-decrease", "spread": 1.0}, "not between 0 and 1"),
        ({"schedule": "linear-decrease", "spread": -0.1}, "not between 0 and 1"),
        ({"schedule": "linear-decrease", "spread": float("nan")}, "not between 0 and 1"),
        ({"floor": 0}, "--floor 0"),
    ],
)
def test_impossible_selections_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SelectionSettings(**settings)  # type: ignore[arg-type]


def test_what_needs_all_layers() -> None:
    assert not SelectionSettings(schedule="linear-decrease", mix="a=1").needs_all_layers
    assert SelectionSettings(schedule="global").needs_all_layers
    assert SelectionSettings(protect_super_experts=True).needs_all_layers
