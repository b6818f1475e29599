"""Which experts stay: ranking, protection, the user's own lists, and what a choice keeps of each source."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprune.errors import SettingsError
from streamprune.models.config_json import ExpertSpec
from streamprune.saliency.methods import METHODS, MixedStatistics, random_scores
from streamprune.saliency.scores import FIELDS, LayerStatistics, Scores
from streamprune.selection.retention import Retention, retention_warnings, retentions
from streamprune.selection.select import (
    Selection,
    Selector,
    keep_highest,
    listed_selection,
    stated_counts,
    super_experts,
)
from streamprune.selection.settings import SelectionSettings
from streamprune.selection.user_files import read_keep_file
from tests.made_scores import make_scores

PLAIN = ExpertSpec((), "n", 8, 2)
GROUPED = ExpertSpec((), "n", 16, 4, groups=4, topk_groups=2)


def selected(
    scores: Scores, settings: SelectionSettings, total: int = 0, per_layer: dict[int, int] | None = None
) -> Selection:
    selector = Selector(settings, scores.spec, scores.sources, scores.source_tokens, total, per_layer)
    return selector.all(scores.layers)


def highest(scores: Sequence[float], keep: int, groups: int = 1, protected: Sequence[int] = ()) -> tuple[int, ...]:
    return keep_highest(scores, keep, ExpertSpec((), "n", len(scores), 1, groups=groups), protected)


def field(layer: LayerStatistics, name: str) -> np.ndarray:
    return layer.values[list(FIELDS).index(name)]


def test_the_highest_stay_and_of_equal_ones_the_first() -> None:
    assert highest([0.5, 3.0, 0.5, 2.0], 3) == (0, 1, 3)
    assert highest([1.0] * 4, 2) == (0, 1)
    assert highest([9, 8, 7, 6, 1, 2, 3, 4], 4, groups=2) == (0, 1, 6, 7)
    assert highest([1.0, 2.0, 3.0, 4.0], 2, protected=(0,)) == (0, 3)
    assert highest([9, 8, 7, 6, 1, 2, 3, 4], 4, groups=2, protected=(3, 4)) == (0, 3, 4, 7)
    assert highest([-1.0, -2.0, 0.0], 2) == (0, 2)


@given(st.integers(1, 4).flatmap(lambda groups: st.tuples(st.just(groups), st.integers(1, 6), st.data())))
def test_no_removed_expert_beats_a_kept_one(case: tuple[int, int, st.DataObject]) -> None:
    groups, size, data = case
    scores = data.draw(st.lists(st.integers(-3, 3).map(float), min_size=groups * size, max_size=groups * size))
    per_group = data.draw(st.integers(1, size))
    protected = data.draw(st.sets(st.integers(0, groups * size - 1), max_size=2))
    crowd = max((sum(expert // size == group for expert in protected) for group in range(groups)), default=0)
    if crowd > per_group:
        with pytest.raises(SettingsError, match=f"Keep at least {crowd * groups}"):
            highest(scores, per_group * groups, groups, tuple(protected))
        return
    kept = highest(scores, per_group * groups, groups, tuple(protected))
    assert list(kept) == sorted(set(kept))
    assert protected <= set(kept)
    for group in range(groups):
        members = set(range(group * size, (group + 1) * size))
        inside, outside = members & set(kept), members - set(kept)
        assert len(inside) == per_group
        assert all((scores[one], -one) > (scores[other], -other) for one in inside - protected for other in outside)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mix", [None, "source0=1,source1=3"])
def test_all_layers_at_once_equal_one_after_the_other(method: str, mix: str | None) -> None:
    scores = make_scores()
    settings = SelectionSettings(method=method, mix=mix, schedule="linear-decrease", seed=3)
    selection = selected(scores, settings, total=22)
    assert sum(selection.counts) == 22
    assert not selection.is_uniform
    assert selection.settings == settings
    sources, tokens, counts = scores.sources, scores.source_tokens, selection.counts_by_layer
    one_by_one = Selector(settings, scores.spec, sources, tokens, 22, counts)
    for layer, each in zip(scores.layers, selection.layers, strict=True):
        assert one_by_one.layer(layer) == each
        assert each.tokens == tuple(field(layer, "tokens").sum(axis=0).astype(int))


def test_a_mix_changes_the_choice_and_its_scores_are_those_of_its_statistics() -> None:
    scores = make_scores()
    both = selected(scores, SelectionSettings(method="frequency"), total=20)
    first = selected(scores, SelectionSettings(method="frequency", mix="source0=1"), total=20)
    assert [layer.kept for layer in both.layers] != [layer.kept for layer in first.layers]
    # 100 tokens in all, 40 of them of source 0: each counts 2.5 times.
    assert first.layers[0].scores == tuple(2.5 * field(scores.layers[0], "tokens")[0])


def test_counts_and_a_schedule_in_a_file(tmp_path: Path) -> None:
    scores = make_scores()
    (tmp_path / "s.json").write_text("[3, 4, 5, 6]")
    by_file = SelectionSettings(schedule=str(tmp_path / "s.json"))
    counts = stated_counts(by_file, scores.spec, scores.layer_indices)
    assert counts == {1: 3, 2: 4, 3: 5, 4: 6}
    assert stated_counts(SelectionSettings(), scores.spec, scores.layer_indices) is None
    selection = selected(scores, by_file, per_layer=counts)
    assert selection.layers == selected(scores, SelectionSettings(), per_layer=counts).layers
    assert selection.counts == (3, 4, 5, 6)


def with_peaks(scores: Scores, peaks: dict[tuple[int, int], float]) -> Scores:
    layers = []
    for number, layer in enumerate(scores.layers):
        values = layer.values.copy()
        values[list(FIELDS).index("peaks")] *= 0.001
        for (which, expert), peak in peaks.items():
            if which == number:
                values[list(FIELDS).index("peaks"), 1, expert] = peak
        layers.append(LayerStatistics(layer.index, values))
    return replace(scores, layers=tuple(layers))


def test_super_experts_are_found_and_kept() -> None:
    # The one that chance would remove first.
    low = int(random_scores(MixedStatistics(1, {"tokens": np.zeros(50)}, seed=1)).argmin())
    made = make_scores(layers=range(8), experts=50, top_k=2)
    peaks = {(1, low): 100.0, (2, 7): 9.0, (7, 3): 90.0}
    scores = with_peaks(made, peaks)
    everything = np.concatenate([field(layer, "peaks").max(axis=0) for layer in scores.layers])
    # Two of 400 are beyond the percentile, but one of them is in the last quarter; the third is too small.
    assert sum(everything > np.percentile(everything, 99.5)) == 2
    assert super_experts(scores.layers, (1, 1)) == {1: (low,)}
    assert super_experts(with_peaks(made, peaks | {(5, 1): 95.0}).layers, (1, 1)) == {1: (low,), 5: (1,)}
    # Only source 1 had that peak.
    assert (low,) not in super_experts(scores.layers, (1, 0)).values()
    worst = SelectionSettings(method="random", protect_super_experts=True, seed=1)
    for schedule in ("uniform", "global", "linear-increase"):
        choice = selected(scores, replace(worst, schedule=schedule), total=40)
        assert choice.protected == {1: (low,)}
        assert low in choice.layers[1].kept
        assert sum(choice.counts) == 40
    alone = selected(scores, SelectionSettings(method="random", seed=1), total=40)
    assert alone.protected == {}
    assert low not in alone.layers[1].kept


def test_no_room_for_super_experts_names_the_layer() -> None:
    scores = with_peaks(make_scores(layers=range(8), experts=50), {(1, 2): 9.0, (1, 5): 9.5, (1, 7): 9.8})
    settings = SelectionSettings(protect_super_experts=True)
    with pytest.raises(SettingsError, match=r"Layer 1: 2 super experts .*\[5, 7\].* keeps only 1 of 50.*at least 2"):
        selected(scores, settings, per_layer=dict.fromkeys(range(8), 1))


KEPT = {"0": [1, 5, 2], "3": [0, 7, 6]}


@pytest.mark.parametrize(
    "body",
    [
        KEPT,
        {"3": [7, 0, 6], "0": [5, 2, 1]},
        [[1, 2, 5], [0, 6, 7]],
        {"format": 1, "layers": [{"index": 0, "kept": [1, 2, 5], "scores": []}, {"index": 3, "kept": [0, 6, 7]}]},
    ],
)
def test_lists_of_the_users_own(body: object, tmp_path: Path) -> None:
    (tmp_path / "keep.json").write_text(json.dumps(body))
    assert read_keep_file(tmp_path / "keep.json", PLAIN, (0, 3)) == {0: (1, 2, 5), 3: (0, 6, 7)}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"0": [1, 2]}, "lists no experts for layer 3. It needs layers 0, 3"),
        (KEPT | {"1": [1, 2]}, "lists experts for layer 1, but the model has them in 0, 3"),
        (KEPT | {"03": [1, 2]}, "experts of layer 3 twice"),
        (KEPT | {"x": [1, 2]}, "'x' is not a layer number"),
        (KEPT | {"-1": [1, 2]}, "'-1' is not a layer number"),
        (KEPT | {"²": [1, 2]}, "'²' is not a layer number"),
        (KEPT | {"9" * 5000: [1]}, "is not a layer number"),
        (KEPT | {"0": [1, 1, 2]}, "layer 0 lists expert 1 twice"),
        (KEPT | {"0": [1, 8]}, "layer 0: there is no expert 8; they are numbered 0 to 7"),
        (KEPT | {"0": [1, -1]}, "layer 0: there is no expert -1"),
        (KEPT | {"0": [1, 10**400]}, "layer 0: there is no expert 1000"),
        (KEPT | {"0": [1]}, "layer 0 keeps 1 experts, but the router picks 2"),
        (KEPT | {"0": []}, "layer 0 keeps 0 experts"),
        (KEPT | {"0": [1, 2.0]}, "layer 0: .* is not a list of experts"),
        (KEPT | {"0": [1, True]}, "layer 0: .* is not a list of experts"),
        (KEPT | {"0": None}, "layer 0: None is not a list of experts"),
        ({"0": list(range(8)), "3": list(range(8))}, "keeps all 8 experts of every layer"),
        ([[1, 2]], "has 1 lists, but the model has 2 layers"),
        ({"layers": [1, {"index": 0}]}, "'None' is not a layer number"),
        ("text", "has to have lists of experts by layer"),
        (None, "has to have lists of experts by layer"),
    ],
)
def test_a_bad_keep_file_is_refused_in_one_message(body: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "keep.json").write_text(json.dumps(body))
    with pytest.raises(SettingsError, match=message) as refusal:
        read_keep_file(tmp_path / "keep.json", PLAIN, (0, 3))
    assert "keep.json" in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_groups_of_a_keep_file(tmp_path: Path) -> None:
    path = tmp_path / "keep.json"
    good = [0, 1, 4, 5, 8, 9, 12, 15]
    path.write_text(json.dumps([good]))
    assert read_keep_file(path, GROUPED, (0,)) == {0: tuple(good)}
    path.write_text(json.dumps([[0, 1, 2, 5, 8, 9, 12, 15]]))
    with pytest.raises(SettingsError, match="keeps 3, 1, 2, 2 experts of the 4 groups"):
        read_keep_file(path, GROUPED, (0,))
    path.write_text(json.dumps([[0, 4, 8, 12]]))
    with pytest.raises(SettingsError, match="keeps 4 experts in 4 groups; the router needs at least 8"):
        read_keep_file(path, GROUPED, (0,))


def test_files_that_are_no_json(tmp_path: Path) -> None:
    for name, content in (("a", b"{"), ("b", b"\xff\xfe"), ("c", b"[" * 100_000), ("d", b'{"0": [1], "0": [2]}')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SettingsError, match="not valid JSON"):
            read_keep_file(tmp_path / name, PLAIN, (0,))
    with pytest.raises(SettingsError, match="No such file"):
        read_keep_file(tmp_path / "none", PLAIN, (0,))
    with pytest.raises(SettingsError, match="not a regular file"):
        read_keep_file(tmp_path, PLAIN, (0,))


def test_retention_is_the_share_of_a_sources_own_saliency() -> None:
    scores = make_scores()
    choice = selected(scores, SelectionSettings(mix="source0=1"), total=20)
    found = retentions(scores, choice)
    for source, each in enumerate(found):
        shares, best, every, stays = [], [], [], []
        for layer, picked in zip(scores.layers, choice.layers, strict=True):
            own = field(layer, "gated_norms")[source].tolist()
            shares.append(math.fsum(own[expert] for expert in picked.kept) / math.fsum(own))
            every.append(math.fsum(own))
            stays.append(math.fsum(own[expert] for expert in picked.kept))
            best.append(math.fsum(sorted(own)[-len(picked.kept) :]))
        assert each.source == scores.sources[source]
        assert each.layers == pytest.approx(shares)
        assert each.kept == pytest.approx(math.fsum(stays) / math.fsum(every))
        assert each.best == pytest.approx(math.fsum(best) / math.fsum(every))
        assert (each.worst, each.worst_layer) == (
            pytest.approx(min(shares)),
            scores.layer_indices[int(np.argmin(shares))],
        )
        assert each.kept < each.best < 1
    # All experts together keep everything of every source.
    everything = {index: tuple(range(12)) for index in scores.layer_indices}
    whole = listed_selection(everything, scores, SelectionSettings())
    assert whole.settings is None
    assert [each.kept for each in retentions(scores, whole)] == pytest.approx([1, 1])


def test_a_source_without_tokens_in_a_layer_loses_nothing_there() -> None:
    scores = make_scores()
    empty = scores.layers[0].values.copy()
    empty[:, 1] = 0
    layers = (LayerStatistics(1, empty), *scores.layers[1:])
    scores = replace(scores, layers=layers)
    choice = selected(scores, SelectionSettings(), total=20)
    second = retentions(scores, choice)[1]
    assert second.layers[0] is None
    rest = [field(layer, "gated_norms")[1] for layer in layers[1:]]
    kept = math.fsum(own[list(layer.kept)].sum() for own, layer in zip(rest, choice.layers[1:], strict=True))
    assert second.kept == pytest.approx(kept / math.fsum(own.sum() for own in rest))


def test_warnings_of_what_is_lost() -> None:
    def kept(**shares: float) -> list[Retention]:
        return [Retention(name, share, 0.95, 0, share, (share,)) for name, share in shares.items()]

    assert list(retention_warnings(kept(code=0.9, prose=0.85))) == []
    # Twice as much as another, but little.
    assert list(retention_warnings(kept(code=0.97, prose=0.92))) == []
    (dead,) = retention_warnings(kept(code=0.9, prose=0.3))
    assert "prose loses most of its own: it keeps 30.0%" in dead
    assert "code keeps 90.0%" in dead
    assert "95.0%" in dead
    (unequal,) = retention_warnings(kept(code=0.9, prose=0.75))
    assert "prose loses 25.0% of its saliency, code only 10.0%" in unequal
    assert len(list(retention_warnings(kept(code=0.2, prose=0.1)))) == 2


def test_a_category_that_the_mix_leaves_out_is_warned_of() -> None:
    """Two sources whose tokens go to different experts: prune for the one, and the other is dead."""
    scores = make_scores(experts=12, per_source=(300, 300))
    layers = []
    for layer in scores.layers:
        values = layer.values.copy()
        values[:, 0, 6:] = 0
        values[:, 1, :6] = 0
        layers.append(LayerStatistics(layer.index, values))
    scores = replace(scores, layers=tuple(layers))
    found = retentions(scores, selected(scores, SelectionSettings(mix="source0=1"), total=24))
    assert found[0].kept == pytest.approx(1)
    assert found[1].kept == 0
    assert "source1 loses most of its own: it keeps 0.0%" in next(iter(retention_warnings(found)))
    balanced = retentions(scores, selected(scores, SelectionSettings(method="frequency"), total=32))
    assert min(each.kept for each in balanced) > 0.4
