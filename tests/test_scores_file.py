"""The file of scores: exact, the same every time, readable by anyone, and not believed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from streamprune.errors import OutputError, ScoresError
from streamprune.reporting.make_record import check_provenance
from streamprune.saliency.scores import COUNTS, FIELDS, FIELDS_BEFORE, LayerStatistics, Scores
from streamprune.saliency.scores_file import MOST_BYTES, SCORES_FOLDER, SCORES_NAME, read_scores, write_scores
from tests.made_scores import make_channels, make_scores

FORMAT_1 = Path(__file__).parent / "scores_format_1.safetensors"
#: The values of all its layers.
DIGEST = "8e7b84c2006d58f2c5d776d7a7ad6b4f884781ddaa236de9dc0c26e67ee73546"


def content(scores: Scores) -> list[tuple[Any, ...]]:
    """All values of the layers, to the bit."""
    return [
        (layer.index, layer.values.tobytes(), layer.channels.tobytes() if layer.channels is not None else None)
        for layer in scores.layers
    ]


def same(one: Scores, other: Scores) -> bool:
    return replace(one, layers=()) == replace(other, layers=()) and content(one) == content(other)


def test_a_file_of_format_1_is_read_and_written_as_the_present_one(tmp_path: Path) -> None:
    """The file was written by `streamprune score` of version 0.1.0."""
    scores = read_scores(FORMAT_1)
    assert scores.layer_indices == (0, 1, 2, 3)
    assert dict(zip(scores.sources, scores.source_tokens, strict=True)) == {"code.jsonl": 96, "prose.jsonl": 96}
    assert (scores.spec.count, scores.spec.top_k) == (8, 2)
    check_provenance(scores)
    assert scores.layout is not None
    values = np.stack([layer.values for layer in scores.layers])
    # Every token chooses two experts, one of them first.
    np.testing.assert_array_equal(values[:, 0].sum(axis=2), np.full((4, 2), 192))
    np.testing.assert_array_equal(values[:, 8].sum(axis=2), np.full((4, 2), 96))
    assert hashlib.sha256(values.tobytes()).hexdigest() == DIGEST
    assert values.shape[1] == FIELDS_BEFORE
    assert scores.channel_bytes == 0
    write_scores(tmp_path / "s", scores)
    assert same(read_scores(tmp_path / "s"), scores)
    # Only what the present format says of itself is new.
    old, new = (safe_open(path, "np").metadata() for path in (FORMAT_1, tmp_path / "s"))
    assert (old.pop("streamprune_scores"), new.pop("streamprune_scores")) == ("1", "3")
    assert new.pop("about").startswith(old.pop("about"))
    assert old == new
    before, after = load_file(FORMAT_1), load_file(tmp_path / "s")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_file_of_format_2_is_read(tmp_path: Path) -> None:
    """Format 1 only differs in its number."""
    path = tmp_path / "s"
    path.write_bytes(FORMAT_1.read_bytes().replace(b'"streamprune_scores":"1"', b'"streamprune_scores":"2"'))
    assert same(read_scores(path), read_scores(FORMAT_1))


def test_what_old_formats_cannot_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_scores(path, make_scores(width=3))
    for number in ("1", "2"):
        with pytest.raises(ScoresError, match=r"for 4 layers with 9 tensors each it has the unknown 'layers\.1\."):
            read_scores(rewritten(path, meta("streamprune_scores", number)))


@pytest.mark.parametrize(
    ("layout", "width"), [(None, None), ({"fused": {"3": ["gate_up_proj", 0]}}, 7), ({"fused": {}}, 1)]
)
def test_what_is_written_is_read_to_the_bit(layout: dict[str, Any] | None, width: int | None, tmp_path: Path) -> None:
    scores = replace(make_scores(groups=3, topk_groups=2, width=width), layout=layout)
    assert scores.channel_bytes == 4 * 2 * 12 * 4 * (width or 0)
    path = tmp_path / "new" / SCORES_NAME
    write_scores(path, scores)
    assert same(read_scores(path), scores)
    assert same(read_scores(path.parent), scores)
    assert sorted(path.parent.iterdir()) == [path]
    # A pruned model keeps them in a folder of their own; before those beside it they are meant.
    write_scores(path.parent / SCORES_FOLDER / SCORES_NAME, replace(scores, provenance={"model": "other"}))
    assert read_scores(path.parent).provenance == {"model": "other"}


def test_the_same_scores_give_the_same_bytes(tmp_path: Path) -> None:
    scores = make_scores()
    turned = replace(scores, provenance=dict(reversed(list(scores.provenance.items()))))
    for name, each in (("a", scores), ("b", make_scores()), ("c", turned)):
        write_scores(tmp_path / name, each)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    # Not by the luck of one process's hashing either.
    script = (
        "from pathlib import Path; from tests.made_scores import make_scores; "
        "from streamprune.saliency.scores_file import write_scores; "
        f"write_scores(Path({str(tmp_path / 'd')!r}), make_scores())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=Path(__file__).parents[1])
    assert (tmp_path / "d").read_bytes() == (tmp_path / "a").read_bytes()


def test_any_safetensors_reader_understands_it(tmp_path: Path) -> None:
    # (An odd number of channels: those of one layer do not fill a multiple of eight bytes.)
    scores = make_scores(layers=(1, 4), per_source=(40,), experts=9, width=5)
    write_scores(tmp_path / "s", scores)
    tensors = load_file(tmp_path / "s")
    assert len(tensors) == len(scores.layers) * (len(FIELDS) + 1)
    for layer in scores.layers:
        for name, values in zip(FIELDS, layer.values, strict=True):
            tensor = tensors[f"layers.{layer.index}.{name}"]
            assert tensor.dtype == (np.int64 if name in COUNTS else np.float64)
            np.testing.assert_array_equal(tensor, values)
        assert tensors[f"layers.{layer.index}.channels"].dtype == np.float32
        np.testing.assert_array_equal(tensors[f"layers.{layer.index}.channels"], layer.channels)
    with safe_open(tmp_path / "s", "np") as opened:
        metadata = opened.metadata()
    assert metadata["streamprune_scores"] == "3"
    assert json.loads(metadata["fields"]) == FIELDS
    assert json.loads(metadata["sources"]) == [{"name": "source0", "tokens": 40}]
    assert json.loads(metadata["provenance"])["calibration"]["recipe"] == "Größe"
    # Aligned to eight bytes, as the format wants.
    assert int.from_bytes((tmp_path / "s").read_bytes()[:8], "little") % 8 == 0


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    write_scores(tmp_path / "s", make_scores())
    script = (
        "import sys; from pathlib import Path; from streamprune.saliency.scores_file import read_scores; "
        f"import streamprune.selection.select; read_scores(Path({str(tmp_path / 's')!r})); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def changed(scores: Scores, name: str, value: float, source: int = 0, expert: int = 0) -> Scores:
    values = scores.layers[1].values.copy()
    values[list(FIELDS).index(name), source, expert] = value
    return replace(scores, layers=(scores.layers[0], LayerStatistics(2, values), *scores.layers[2:]))


def changed_channel(scores: Scores, value: float, source: int = 0, expert: int = 0) -> Scores:
    channels = make_channels(scores.layers[1], 3)
    channels[source, expert, 2] = value
    layers = [replace(layer, channels=make_channels(layer, 3)) for layer in scores.layers]
    layers[1] = replace(layers[1], channels=channels)
    return replace(scores, layers=tuple(layers))


def only_one_has_channels(scores: Scores) -> Scores:
    first, *others = scores.layers
    return replace(scores, layers=(replace(first, channels=make_channels(first, 3)), *others))


WRONG: list[tuple[Callable[[Scores], Scores], str]] = [
    *((lambda s, n=name: changed(s, n, math.nan), f"layer 2, expert 0, source 0: {name} is nan") for name in FIELDS),
    (lambda s: changed(s, "norms", float("inf")), "norms is inf"),
    (lambda s: changed(s, "gates", 1e200), "gates is 1e"),
    (lambda s: changed(s, "tokens", -1), "tokens is -1"),
    (lambda s: changed(s, "tokens", 1.5), "tokens is 1.5"),
    (lambda s: changed(s, "tokens", 41), "tokens is 41 with 41 tokens of 40"),
    (lambda s: changed(s, "top_choices", 40), "top_choices is 40"),
    (lambda s: changed(s, "peaks", -1), "peaks is -1"),
    (lambda s: changed(s, "cosines", 40.5), "cosines is 40.5"),
    (lambda s: changed(s, "gated_norms", 1, expert=11), "expert 11, source 0: gated_norms is 1 with 0 tokens"),
    (lambda s: changed(s, "squared_norms", -1), "squared_norms is -1"),
    (lambda s: changed_channel(s, math.nan), "layer 2, expert 0, source 0: the energy of channel 2 is nan with"),
    (lambda s: changed_channel(s, math.inf), "the energy of channel 2 is inf"),
    (lambda s: changed_channel(s, -1.0), "the energy of channel 2 is -1"),
    (lambda s: changed_channel(s, 1.0, 1, 11), "expert 11, source 1: the energy of channel 2 is 1 with 0 tokens"),
    (only_one_has_channels, "layers have different fields or channels"),
    (lambda s: replace(s, sources=("a",)), "1 sources with 2 token counts"),
    (lambda s: replace(s, sources=("a", "a")), "same name"),
    (lambda s: replace(s, sources=("a", "b\n")), "cannot be named"),
    (lambda s: replace(s, sources=("a", "")), "length >= 1"),
    (lambda s: replace(s, sources=("a", " ")), "cannot be named"),
    (lambda s: replace(s, source_tokens=(40, 0)), r"`int` >= 1 - at `\$.sources\[1\].tokens`"),
    (lambda s: replace(s, spec=replace(s.spec, count=13)), r"statistics \(10, 2, 12\) instead of \(10, 2, 13\)"),
    (lambda s: replace(s, spec=replace(s.spec, top_k=13)), "no router picks 13 of 12 experts"),
    (lambda s: replace(s, spec=replace(s.spec, groups=5)), "no router picks 2 of 12 experts, in 1 of 5 groups"),
    (lambda s: replace(s, layers=()), r"length >= 1 - at `\$.blocks`"),
    (lambda s: replace(s, layers=s.layers[::-1]), "not in ascending order"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_scores_that_cannot_be_are_not_written(
    change: Callable[[Scores], Scores], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ScoresError, match=message):
        write_scores(tmp_path / "s", change(make_scores()))
    assert not list(tmp_path.iterdir())


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any], cut: int = 0) -> Path:
    """The file with another header; `cut` bytes are taken off its end."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    rest = data[8 + length :]
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest[: len(rest) - cut])
    return path


def meta(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"][name] = value

    return change


def last_tensor(**facts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["layers.4.squared_norms"].update(facts)


def dropped(header: dict[str, Any]) -> None:
    del header["layers.4.squared_norms"]


def renamed(header: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("layers.4.", "layers.5."): value for name, value in header.items()}


SPEC = {"path": [], "attribute": "n", "count": 12, "top_k": 2, "groups": 1, "topk_groups": 1}


@pytest.mark.parametrize(
    ("change", "cut", "message"),
    [
        (meta("streamprune_scores", "5"), 0, "format '5', but this version of streamprune reads 1 to 4"),
        (meta("streamprune_scores", "4"), 0, "format 4 has no layer for multi-token prediction"),
        (meta("mtp_block", "9"), 0, "format 3 has a layer for multi-token prediction"),
        (meta("streamprune_scores", 1), 0, "format 1, but this version"),
        (lambda header: header.pop("__metadata__") and None, 0, "has no scores"),
        (lambda header: header["__metadata__"].pop("streamprune_scores") and None, 0, "has no scores"),
        (lambda header: header["__metadata__"].pop("blocks") and None, 0, "missing required field `blocks`"),
        (meta("blocks", "[1, 2, 3, 4, 5]"), 0, "for 5 layers with 10 tensors each it lacks 10 tensors"),
        (meta("blocks", "[1, 2, 3]"), 0, "has the unknown 'layers.4"),
        (meta("blocks", "[]"), 0, r"length >= 1 - at `\$.blocks`"),
        (meta("blocks", "[1, 2, 3, 1e9]"), 0, r"Expected `int`, got `float` - at `\$.blocks\[3\]`"),
        (meta("blocks", "[1, 3, 2, 4]"), 0, "ascending"),
        (meta("sources", "[]"), 0, r"length >= 1 - at `\$.sources`"),
        (meta("sources", '[{"name": "a"}, {"name": "b"}]'), 0, "missing required field `tokens`"),
        (meta("sources", '[{"name": "a", "tokens": 40}]'), 0, r"F64 \(2, 12\) instead|I64 \(2, 12\) instead"),
        (meta("sources", '[{"name": 1, "tokens": 40}, {"name": "b", "tokens": 60}]'), 0, "Expected `str`, got `int`"),
        (
            meta("sources", '[{"name": "a", "tokens": true}, {"name": "b", "tokens": 60}]'),
            0,
            "Expected `int`, got `bool`",
        ),
        (meta("sources", '[{"name": "\\ud800", "tokens": 40}, {"name": "b", "tokens": 60}]'), 0, "'sources'"),
        (meta("experts", json.dumps(SPEC | {"count": 10**9})), 0, r"`int` <= .* - at `\$.experts.count`"),
        (meta("experts", json.dumps(SPEC | {"top_k": 0})), 0, r"`int` >= 1 - at `\$.experts.top_k`"),
        (meta("experts", json.dumps(SPEC | {"path": "text_config"})), 0, "Expected `array`, got `str`"),
        (meta("experts", json.dumps(SPEC | {"more": 1})), 0, "unknown field `more`"),
        (meta("experts", "[]"), 0, r"got `array` - at `\$.experts`"),
        (meta("provenance", '{"a": NaN}'), 0, "metadata 'provenance'"),
        (meta("provenance", '{"a": 1e999}'), 0, "metadata 'provenance'"),
        (meta("provenance", '{"a": ' + "[" * 100_000), 0, "metadata 'provenance'"),
        (meta("provenance", '{"a": 1, "a": 2}'), 0, "metadata 'provenance'"),
        (meta("provenance", 3), 0, "metadata 'provenance'"),
        (meta("layout", "[]"), 0, r"got `array` - at `\$.layout`"),
        (last_tensor(dtype="I64"), 0, r"layers.4.squared_norms is I64"),
        (last_tensor(dtype="XYZ"), 0, "unknown dtype 'XYZ'"),
        (last_tensor(shape=[12, 2]), 0, r"\(12, 2\) instead of F64 \(2, 12\)"),
        (last_tensor(shape=[2**40, 2**40]), 0, "cannot fill the byte range"),
        (dropped, 192, "lacks 1 tensors, first layers.4.squared_norms"),
        (dropped, 0, "bytes, .* by its header"),
        (renamed, 0, "lacks 10 tensors, first layers.4.cosines"),
        (lambda header: None, 1, "bytes, .* by its header"),
        (lambda header: [], 0, "not a JSON object"),
    ],
)
def test_a_file_is_not_believed(
    change: Callable[[dict[str, Any]], Any], cut: int, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    write_scores(path, make_scores())
    if message == "not a JSON object":
        path.write_bytes((2).to_bytes(8, "little") + b"[]")
    else:
        rewritten(path, change, cut)
    with pytest.raises(ScoresError, match=message) as refusal:
        read_scores(path)
    assert "s.safetensors" in str(refusal.value)
    assert len(str(refusal.value)) < 2000


def channels_of(layer: int, **facts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[f"layers.{layer}.channels"].update(facts)


@pytest.mark.parametrize(
    ("change", "cut", "message"),
    [
        (channels_of(1, dtype="I32"), 0, r"layers.1.channels is I32 \(2, 12, 4\) instead of F32 \(2, 12, 4\)"),
        (channels_of(4, shape=[2, 4, 12]), 0, r"layers.4.channels is F32 \(2, 4, 12\) instead of F32 \(2, 12, 4\)"),
        (channels_of(1, shape=[96]), 0, r"layers.1.channels is F32 \(96,\) instead of F32 \(2, 12, 96\)"),
        (channels_of(1, shape=[]), 0, "cannot fill the byte range"),
        (lambda header: header.pop("layers.4.channels") and None, 384, "lacks 1 tensors, first layers.4.channels"),
    ],
)
def test_channels_in_a_file_are_not_believed(
    change: Callable[[dict[str, Any]], Any], cut: int, message: str, tmp_path: Path
) -> None:
    write_scores(tmp_path / "s", make_scores(width=4))
    with pytest.raises(ScoresError, match=message):
        read_scores(rewritten(tmp_path / "s", change, cut))


def test_values_of_channels_in_a_file_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for value, told in ((np.nan, "nan"), (-np.inf, "-inf"), (-1, "-1"), (1, "1 with 0 tokens")):
        write_scores(path, make_scores(width=4))
        data = path.read_bytes()
        path.write_bytes(data[:-4] + np.float32(value).tobytes())
        with pytest.raises(ScoresError, match=rf"layer 4, expert 11, source 1: the energy of channel 3 is {told}"):
            read_scores(path)


def test_channels_are_read_without_a_copy(tmp_path: Path) -> None:
    write_scores(tmp_path / "s", make_scores(width=4))
    data = {id(layer.channels.base.base) for layer in read_scores(tmp_path / "s").layers if layer.channels is not None}
    assert len(data) == 1, "all are views of the bytes of the file"


def test_values_in_a_file_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_scores(path, make_scores())
    data = bytearray(path.read_bytes())
    # The last value of all: expert 11 of the last source of layer 4, never seen.
    data[-8:] = (1).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ScoresError, match=r"layer 4, expert 11, source 1: squared_norms is .* with 0 tokens of 60"):
        read_scores(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "of its 0 bytes 0 would be its header"),
        (b"\xff" * 100, "would be its header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ((2**63).to_bytes(8, "little") + b"{}", "would be its header"),
        ((2).to_bytes(8, "little") + b"{]", "header is not valid JSON"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "header is not valid JSON"),
        ((2).to_bytes(8, "little") + b"{}", "has no scores"),
    ],
)
def test_what_is_no_file_of_scores(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(ScoresError, match=message):
        read_scores(tmp_path / "s")


def test_what_is_no_file_at_all(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, Path("a\0b"), tmp_path / ("x" * 300)):
        with pytest.raises(ScoresError, match="No scores can be read"):
            read_scores(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ScoresError, match="not a regular file"):
        read_scores(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(MOST_BYTES + 1)
    with pytest.raises(ScoresError, match=r"it has .* bytes, more than"):
        read_scores(tmp_path / "large")


def test_where_it_cannot_be_written_the_old_file_stays(tmp_path: Path) -> None:
    write_scores(tmp_path / "s", make_scores())
    before = (tmp_path / "s").read_bytes()
    (tmp_path / "s.partial").mkdir()
    with pytest.raises(OutputError, match="Writing the scores failed"):
        write_scores(tmp_path / "s", make_scores(seed=1))
    assert (tmp_path / "s").read_bytes() == before
