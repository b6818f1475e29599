"""What is decided before a weight is read: how many stay, what is refused, how the output is divided into files."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamprune.checkpoint.safetensors_file import TensorEntry
from streamprune.cli.options import parse_size
from streamprune.config import RunSettings
from streamprune.errors import CheckpointError, SettingsError, UnsupportedModelError
from streamprune.formats import plain
from streamprune.formats.base import ExpertRows, KeptExperts, StoredTensor
from streamprune.models.config_json import ExpertSpec, minimum_keep, resolve_keep
from streamprune.models.expert_layout import Layout, Target, find_cuts
from streamprune.models.mtp import find_mtp_tensors, further_layers
from streamprune.output.plan import plan_shards
from streamprune.output.tensors import OutputTensor, output_tensors

PLAIN = ExpertSpec((), "num_experts", 128, 8)
GROUPED = ExpertSpec((), "n_routed_experts", 256, 8, groups=8, topk_groups=4)


@pytest.mark.parametrize(
    ("keep", "ratio", "expected"),
    [(96, None, 96), (None, 0.5, 64), (None, 0.25, 96), (None, 0.7, 39), (None, 0.001, None), (8, None, 8)],
)
def test_keep_from_ratio(keep: int | None, ratio: float | None, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(SettingsError, match="nothing would be removed"):
            resolve_keep(PLAIN, keep, ratio)
    else:
        assert resolve_keep(PLAIN, keep, ratio) == expected


def test_a_ratio_that_is_exact_in_decimals_is_taken_exactly() -> None:
    ten = ExpertSpec((), "num_experts", 10, 2)
    assert [resolve_keep(ten, None, tenths / 10) for tenths in range(1, 9)] == [9, 8, 7, 6, 5, 4, 3, 2]


def test_a_ratio_keeps_groups_equal() -> None:
    assert resolve_keep(GROUPED, None, 0.3) == 184  # 256 - 76 = 180, up to the next multiple of 8


@pytest.mark.parametrize(
    ("spec", "keep", "words"),
    [
        (PLAIN, 6, r"--keep 6, but the router picks 8 experts per token\. Keep at least 8 of 128"),
        (PLAIN, 128, r"has 128 experts per layer, so nothing would be removed\. Keep between 8 and 127"),
        (PLAIN, 500, "nothing would be removed"),
        (GROUPED, 100, r"8 groups .* 100 is not a multiple of 8\. Use --keep 96 or 104"),
        (GROUPED, 8, r"leaves 1 experts in each of 8 groups, of which the router opens 4 .* at least 16"),
    ],
)
def test_too_few_or_unequal_experts_are_refused_with_the_remedy(spec: ExpertSpec, keep: int, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        resolve_keep(spec, keep, None)


def test_the_remedy_works() -> None:
    assert minimum_keep(PLAIN) == resolve_keep(PLAIN, minimum_keep(PLAIN), None)
    assert minimum_keep(GROUPED) == resolve_keep(GROUPED, minimum_keep(GROUPED), None) == 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Say in one way how far to prune"),
        ({"keep": 4, "ratio": 0.5}, "Say in one way how far to prune"),
        ({"keep": 0}, "at least one"),
        ({"ratio": 1.0}, "not between 0 and 1"),
        ({"ratio": -0.5}, "not between 0 and 1"),
        ({"ratio": float("nan")}, "not between 0 and 1"),
        ({"keep": 4, "samples": 0}, "--samples 0 is too small"),
        ({"keep": 4, "seq_len": 1}, "--seq-len 1 is too small"),
        ({"keep": 4, "batch_tokens": 0}, "--batch-tokens 0 is too small"),
        ({"keep": 4, "max_shard_bytes": 0}, "--max-shard-size 0 is too small"),
        ({"keep": 4, "method": "guess"}, "Choose one of: reap"),
    ],
)
def test_impossible_settings(changes: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        RunSettings(model="m", output=Path("o"), **changes)  # type: ignore[arg-type]


def test_sizes() -> None:
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("4 gib") == 4 * 2**30
    assert parse_size("1.5MB") == 1_500_000
    assert parse_size("700") == 700
    for wrong in ("", "many", "5 XB", "-1GB", "9" * 400 + "GB", "9" * 5000):
        with pytest.raises(SettingsError, match="not a size"):
            parse_size(wrong)


def entry(name: str, shape: tuple[int, ...], begin: int = 0, dtype: str = "BF16") -> TensorEntry:
    size = 2
    for length in shape:
        size *= length
    return TensorEntry(name, "model.safetensors", dtype, shape, begin, begin + size)


def whole(name: str, block: int | None, elements: int, dtype: str = "BF16") -> OutputTensor:
    return OutputTensor(name, dtype, (elements,), block, (entry(name, (elements,), dtype=dtype),))


def test_every_block_gets_files_of_its_own_within_the_limit() -> None:
    tensors = [whole("embed", None, 10)] + [whole(f"b{block}.{i}", block, 100) for block in (0, 1) for i in range(3)]
    shards = plan_shards(tensors, range(2), max_shard_bytes=450)
    assert [(shard.file, shard.layer, [t.name for t in shard.tensors]) for shard in shards] == [
        ("model-00001-of-00005.safetensors", None, ["embed"]),
        ("model-00002-of-00005.safetensors", 0, ["b0.0", "b0.1"]),
        ("model-00003-of-00005.safetensors", 0, ["b0.2"]),
        ("model-00004-of-00005.safetensors", 1, ["b1.0", "b1.1"]),
        ("model-00005-of-00005.safetensors", 1, ["b1.2"]),
    ]


def test_wider_dtypes_come_first_so_that_readers_meet_aligned_values() -> None:
    shards = plan_shards([whole("half", 0, 3), whole("full", 0, 3, "F32")], range(1), 10**6)
    assert [tensor.name for tensor in shards[0].tensors] == ["full", "half"]


def test_ranges_of_a_sliced_tensor() -> None:
    """Four experts of two rows, then one row that is no expert's; rows of 3 values, along axis 1 of (2, 9, 3)."""
    source = entry("w", (2, 9, 3), begin=1000)
    tensor = OutputTensor("w", "BF16", (2, 5, 3), 0, (source,), rows=ExpertRows(axis=1, stride=2, tail=1))
    origin = tensor.slice_of(KeptExperts((1, 3)))
    assert (origin.file, origin.experts) == ("model.safetensors", (1, 3))
    # Expert 3's rows 6-7 and the tail row 8 are neighbours, hence one range.
    ranges = tuple((part.begin, part.end) for part in origin.parts)
    assert ranges == ((1012, 1024), (1036, 1054), (1066, 1078), (1090, 1108))
    assert sum(part.nbytes for part in origin.parts) == tensor.nbytes


def target(name: str | None, layer: int | None, pattern: str | None = None, rows: ExpertRows | None = None) -> Target:
    return Target(StoredTensor("w", "", plain.PLAIN), name, pattern, layer=layer, rows=rows)


IGNORED = target(None, None)


def per_expert(count: int) -> tuple[dict[str, TensorEntry], dict[str, Target]]:
    names = [f"model.layers.0.mlp.experts.{expert}.up.weight" for expert in range(count)]
    tensors = {name: entry(name, (4, 2)) for name in names}
    role = target("model.layers.0.mlp.experts.up", 0, "pattern", ExpertRows(0, 1, 0))
    return tensors, dict.fromkeys(names, role)


def test_experts_are_renumbered_not_reordered() -> None:
    tensors, roles = per_expert(4)
    layout = Layout(ExpertSpec((), "num_experts", 4, 2), 1, (0,), (), (), find_cuts(tensors, roles, (), {0: 4}))
    outputs = output_tensors(layout, tensors, {0: 2})
    assert [tensor.name for tensor in outputs] == list(tensors)[:2]
    assert outputs[1].slot == 1
    assert outputs[1].sources[3].name == list(tensors)[3]


def test_missing_experts_are_named() -> None:
    tensors, roles = per_expert(4)
    for table in (tensors, roles):
        table.pop("model.layers.0.mlp.experts.2.up.weight")
    with pytest.raises(CheckpointError, match=r"only 3 of the 4 experts .* expert 2"):
        find_cuts(tensors, roles, (), {0: 4})


def test_a_tensor_without_an_expert_axis_is_refused() -> None:
    role = target("p", 0, None, ExpertRows(0, 1, 0))
    with pytest.raises(UnsupportedModelError, match="no single axis of 4 rows"):
        find_cuts({"w": entry("w", (3, 5))}, {"w": role}, (), {0: 4})


def test_mtp_layers_are_found_behind_the_last_block_and_by_name() -> None:
    used = target("model.layers.0.w", 0)
    roles = {
        "model.layers.0.w": used,
        "model.layers.1.w": target("model.layers.1.w", 1),
        "model.layers.0.rotary_emb.inv_freq": IGNORED,
        "model.layers.2.eh_proj.weight": IGNORED,
        "mtp.layers.0.w": IGNORED,
        "visual.layers.7.w": IGNORED,
    }
    assert find_mtp_tensors(roles, 2) == ["model.layers.2.eh_proj.weight", "mtp.layers.0.w"]


def test_a_block_behind_the_last_is_mtp_only_if_the_config_or_its_tensors_say_so() -> None:
    roles = {f"model.layers.{layer}.w": target(f"model.layers.{layer}.w", layer) for layer in (0, 1)}
    roles["model.layers.2.w"] = IGNORED
    found = find_mtp_tensors(roles, 2)
    assert found == ["model.layers.2.w"]
    assert further_layers(found, 2, mtp_layers=1) == []
    assert further_layers(found, 2, mtp_layers=0) == found
    assert further_layers([*found, "model.layers.2.eh_proj.weight"], 2, mtp_layers=0) == []
