"""The scores file: one small safetensors file, made to be shared. Imports no torch.

It has a tensor per layer and field of `scores.FIELDS`, for example `layers.3.gated_norms`: a row per source of the
calibration text, a column per expert; int64 for counts of tokens, float64 otherwise. If the experts' channels were
scored, there is also a tensor `layers.3.channels` per layer, float32: their energies, by source, expert and channel
(see `saliency.channels`). The metadata are

- `streamprune_scores`: the number of the format;
- `about`, `fields`: what this is, and what each field is, for people who open the file;
- `blocks`: the indices of the layers; `sources`: name and tokens of each source, in the order of the rows;
- `experts`: how the model's config states its experts; `provenance`: model, calibration, versions;
- `layout` (optional): which tensors of the checkpoint hold the experts;
- `mtp_block` (optional): the index of a further layer with tensors, the one for multi-token prediction.

All but the first two are JSON. The same scores give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from streamprune.checkpoint.safetensors_file import TensorEntry, encode_header, header_entries
from streamprune.errors import CheckpointError, OutputError, ScoresError
from streamprune.files.durable import stream_atomically, writing
from streamprune.files.json_text import parse_json, read_limited, show
from streamprune.files.kinds import SCORES_MARK, describe, is_scores_file
from streamprune.models.config_json import MOST_EXPERTS, MOST_LAYERS, ExpertSpec
from streamprune.saliency.scores import (
    COUNTS,
    FIELDS,
    FIELDS_BEFORE,
    MOST_TOKENS,
    LayerStatistics,
    Scores,
    check_layer,
)

SCORES_NAME = "scores.safetensors"
#: Their subfolder in a pruned model: not next to the weights, where some loaders read every safetensors file.
SCORES_FOLDER = "scores"
#: The format that is written. Format 1, of streamprune 0.1.0, and format 2, of 0.2.0, have no channels and only
#: FIELDS_BEFORE fields; they are read, and written as format 3 without what they lack. Format 4 is format 3 with a
#: layer for multi-token prediction; earlier versions refuse it, and ask for an update.
FORMAT, FORMAT_WITH_MTP = 3, 4
READABLE_FORMATS = ("1", "2", "3", "4")
#: DeepSeek-V3's channels take 122 MB a source, Qwen3-30B-A3B's 19 MB; without channels a real file has a few MB.
MOST_BYTES = 2**32
MOST_HEADER_BYTES = 2**26
_ABOUT = (
    "Scores of streamprune: what each expert of a Mixture-of-Experts model did on calibration text, by source. "
    "Tensors layers.N.FIELD have a row per source and a column per expert. Tensors layers.N.channels "
    "also have an axis for the channels of each expert."
)
_CHANNELS = "channels"
_DTYPES: dict[bool, tuple[str, str]] = {True: ("I64", "<i8"), False: ("F64", "<f8")}

_Index = Annotated[int, Meta(ge=0, le=MOST_LAYERS)]
_Count = Annotated[int, Meta(ge=1, le=MOST_EXPERTS)]


class _Source(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=1000)]
    tokens: Annotated[int, Meta(ge=1, le=MOST_TOKENS)]

    def __post_init__(self) -> None:
        if not self.name.isprintable() or not self.name.strip():
            raise ValueError(f"a source cannot be named {show(self.name)}")


class _Experts(msgspec.Struct, forbid_unknown_fields=True):
    """`ExpertSpec` in the file."""

    path: list[str]
    attribute: str
    count: _Count
    top_k: _Count
    groups: _Count
    topk_groups: _Count

    def __post_init__(self) -> None:
        if self.top_k > self.count or self.count % self.groups or self.topk_groups > self.groups:
            raise ValueError(
                f"no router picks {self.top_k} of {self.count} experts, in {self.topk_groups} of {self.groups} groups"
            )


class _Metadata(msgspec.Struct):
    """The parsed metadata: checked before scores are written, and when they are read."""

    blocks: Annotated[list[_Index], Meta(min_length=1)]
    sources: Annotated[list[_Source], Meta(min_length=1, max_length=1000)]
    experts: _Experts
    provenance: dict[str, Any]
    layout: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    mtp_block: _Index | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if any(left >= right for left, right in pairwise(self.blocks)):
            raise ValueError(f"the layers are not in ascending order: {show(self.blocks)}")
        if self.mtp_block is not msgspec.UNSET and self.mtp_block <= self.blocks[-1]:
            raise ValueError(f"its layer for multi-token prediction is {self.mtp_block}, not behind the others")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources have the same name: {show(sorted(names))}")


def check_scores_file(output: Path, source: Path, overwrite: bool) -> None:
    """Raise OutputError unless a scores file may be written to `output`, for the model in `source`."""
    if output.name in {"", ".."} or output.is_dir():
        raise OutputError(f"{output} is a folder. Name the file that the scores go to, such as -o scores.safetensors.")
    if output.absolute().parent.resolve() == source.resolve():
        raise OutputError(f"{output} is in the model's own folder, which never changes. Choose another -o.")
    if not os.path.lexists(output):
        return
    if not output.is_file():
        # A device, a pipe, a broken link.
        raise OutputError(f"{output} is not a regular file, so it is not replaced. Choose another name with -o.")
    if not _may_be_scores(output):
        raise OutputError(f"{output} exists and has no scores, so it is not replaced. Choose another name with -o.")
    if not overwrite:
        raise OutputError(f"{output} exists. Choose another name with -o, or add --overwrite.")


def _may_be_scores(path: Path) -> bool:
    """Whether a file begins as scores do, or is empty."""
    with writing(f"Looking at {path}", path.parent):
        return not path.stat().st_size or is_scores_file(path)


def write_scores(path: Path, scores: Scores) -> None:
    """Write `scores` to `path`, complete or not at all.

    Raises ScoresError if `read_scores` would not accept them, OutputError or ResourceError if the disk fails.
    """
    metadata = _metadata_of(scores)
    # The same checks as when they are read.
    _checked_metadata(metadata)
    for layer in scores.every:
        check_layer(layer, scores.source_tokens, scores.spec.count)
    _check_alike(scores)
    fields = {name: FIELDS[name] for name in scores.layers[0].fields}
    number = FORMAT if scores.mtp is None else FORMAT_WITH_MTP
    header = encode_header(
        {SCORES_MARK: str(number), "about": _ABOUT, "fields": _json(fields), **metadata},
        ((name, dtype, values.shape, values.nbytes) for name, dtype, values in _tensors_of(scores)),
    )
    tensors = (np.ascontiguousarray(values).reshape(-1).view(np.uint8).data for _, _, values in _tensors_of(scores))
    with writing("Writing the scores", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream_atomically(path, chain([header], tensors))


def _check_alike(scores: Scores) -> None:
    """Raise ScoresError unless all layers have the same fields and channels."""
    kinds = {(len(layer.values), None if layer.channels is None else layer.channels.shape) for layer in scores.every}
    if len(kinds) > 1:
        raise ScoresError("its layers have different fields or channels. Score the model again.")


def _tensors_of(scores: Scores) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Name, dtype and values of every tensor, in the order of the file."""
    for layer in scores.every:
        for name, values in layer.fields.items():
            dtype, code = _DTYPES[name in COUNTS]
            yield _tensor_name(layer.index, name), dtype, values.astype(code, copy=False)
    # Last, since they may leave the following tensor at no multiple of 8 bytes.
    for layer in scores.every:
        if layer.channels is not None:
            yield _tensor_name(layer.index, _CHANNELS), "F32", layer.channels.astype("<f4", copy=False)


def _metadata_of(scores: Scores) -> dict[str, str]:
    """The metadata of these scores, each as JSON."""
    if len(scores.sources) != len(scores.source_tokens):
        raise ScoresError(
            f"{len(scores.sources)} sources with {len(scores.source_tokens)} token counts are inconsistent. Score "
            "the model again."
        )
    named = zip(scores.sources, scores.source_tokens, strict=True)
    metadata = {
        "blocks": scores.layer_indices,
        "sources": [{"name": name, "tokens": tokens} for name, tokens in named],
        "experts": asdict(scores.spec),
        "provenance": scores.provenance,
        **({"layout": scores.layout} if scores.layout is not None else {}),
        **({"mtp_block": scores.mtp.index} if scores.mtp is not None else {}),
    }
    return {name: _json(value) for name, value in metadata.items()}


def _checked_metadata(metadata: Mapping[str, Any]) -> _Metadata:
    """The parsed metadata. Raises ScoresError if they are invalid."""
    values = {}
    for name in _Metadata.__struct_fields__:
        if name not in metadata:
            continue
        text = metadata[name]
        try:
            if not isinstance(text, str):
                raise ValueError("no text")
            values[name] = parse_json(text.encode(), unique=True)
            # Infinity and NaN, which Python reads, are not JSON; nor is 1e999, which Python reads as infinity.
            json.dumps(values[name], allow_nan=False)
        except (ValueError, RecursionError):
            raise _damaged(f"its metadata {name!r} are {show(text)}") from None
    try:
        return msgspec.convert(values, _Metadata)
    except msgspec.ValidationError as error:
        raise ScoresError(f"its metadata are not those of scores: {error}. Score the model again.") from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _tensor_name(index: int, name: str) -> str:
    return f"layers.{index}.{name}"


def scores_path(path: Path) -> Path:
    """The file that `read_scores` reads."""
    # Unlike pathlib's method, this accepts any name.
    if not os.path.isdir(path):  # noqa: PTH112
        return path
    inside = path / SCORES_FOLDER / SCORES_NAME
    return inside if os.path.isfile(inside) else path / SCORES_NAME  # noqa: PTH113


def read_scores(path: Path) -> Scores:
    """The scores in `path`: a file, a folder that has one named SCORES_NAME, or the folder of a pruned model.

    Trusts nothing in the file: raises ScoresError for anything that `write_scores` would not write.
    """
    given, path = path, scores_path(path)
    try:
        data = read_limited(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileNotFoundError):
            reason = f"it {describe(given)}{'' if path == given else f', without {SCORES_NAME}'}"
        raise ScoresError(
            f"No scores can be read from {show(str(given))}: {reason}. Give the file that `streamprune score` wrote, "
            "or the folder of a model that `streamprune run` wrote."
        ) from None
    try:
        return _parse(path, data)
    except CheckpointError as error:
        raise ScoresError(str(error)) from None
    except ScoresError as error:
        raise ScoresError(f"{path}: {error}") from None


def _parse(path: Path, data: bytes) -> Scores:
    if data.startswith(b"version https://git-lfs"):
        raise ScoresError("this is a Git LFS pointer, not the scores themselves. Fetch them: `git lfs pull`.")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MOST_HEADER_BYTES):
        raise ScoresError(
            f"no safetensors file, or damaged: of its {len(data):,} bytes {length:,} would be its header. Give the "
            "file that `streamprune score` wrote."
        )
    try:
        header = parse_json(data[8 : 8 + length], unique=True)
    except (ValueError, RecursionError):
        raise _damaged("its header is not valid JSON") from None
    entries, end = header_entries(path, path.name, header, 8 + length)
    if end != len(data):
        raise _damaged(f"it has {len(data):,} bytes, {end:,} by its header")
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or SCORES_MARK not in metadata:
        raise ScoresError("this safetensors file has no scores. Give the file that `streamprune score` wrote.")
    if metadata[SCORES_MARK] not in READABLE_FORMATS:
        raise ScoresError(
            f"the scores have format {show(metadata[SCORES_MARK])}, but this version of streamprune reads "
            f"{READABLE_FORMATS[0]} to {READABLE_FORMATS[-1]}. Update streamprune, or score the model again."
        )
    return _scores_of(metadata, {entry.name: entry for entry in entries}, data)


def _scores_of(metadata: Mapping[str, Any], entries: Mapping[str, TensorEntry], data: bytes) -> Scores:
    facts = _checked_metadata(metadata)
    spec = msgspec.convert(msgspec.structs.asdict(facts.experts), ExpertSpec)
    sources = tuple(source.name for source in facts.sources)
    tokens = tuple(source.tokens for source in facts.sources)
    has_mtp, number = facts.mtp_block is not msgspec.UNSET, metadata[SCORES_MARK]
    if has_mtp != (number == str(FORMAT_WITH_MTP)):
        raise _damaged(f"format {number} has {'a' if has_mtp else 'no'} layer for multi-token prediction")
    blocks = facts.blocks if facts.mtp_block is msgspec.UNSET else [*facts.blocks, facts.mtp_block]
    fields, width = _contents(number, facts.blocks[0], entries)
    names = [*fields, *([_CHANNELS] if width is not None else [])]
    expected = {_tensor_name(index, name) for index in blocks for name in names}
    if expected != entries.keys():
        missing, more = sorted(expected - entries.keys()), sorted(entries.keys() - expected)
        what = f"lacks {len(missing)} tensors, first {missing[0]}" if missing else f"has the unknown {show(more[0])}"
        raise _damaged(f"for {len(blocks)} layers with {len(names)} tensors each it {what}")
    layers = []
    for index in blocks:
        shape = (len(sources), spec.count)
        tensors = [
            _tensor(entries[_tensor_name(index, name)], *_DTYPES[name in COUNTS], shape, data) for name in fields
        ]
        channels = None
        if width is not None:
            channels = _tensor(entries[_tensor_name(index, _CHANNELS)], "F32", "<f4", (*shape, width), data)
        layer = LayerStatistics(index, np.stack([values.astype(np.float64) for values in tensors]), channels)
        check_layer(layer, tokens, spec.count)
        layers.append(layer)
    layout = None if facts.layout is msgspec.UNSET else facts.layout
    mtp = layers.pop() if has_mtp else None
    return Scores(tuple(layers), sources, tokens, spec, facts.provenance, layout, mtp)


def _contents(mark: str, first: int, entries: Mapping[str, TensorEntry]) -> tuple[tuple[str, ...], int | None]:
    """The fields that a file of this format has, by the tensors of its first layer, and its channels per expert."""
    if int(mark) < FORMAT:
        return tuple(FIELDS)[:FIELDS_BEFORE], None
    later = tuple(FIELDS)[FIELDS_BEFORE:]
    is_old = not any(_tensor_name(first, name) in entries for name in later)
    channels = entries.get(_tensor_name(first, _CHANNELS))
    width = channels.shape[-1] if channels is not None and channels.shape else None
    return tuple(FIELDS)[: FIELDS_BEFORE if is_old else None], width


def _tensor(entry: TensorEntry, dtype: str, code: str, shape: tuple[int, ...], data: bytes) -> NDArray[Any]:
    """The values of a tensor: a view of the file's bytes. Raises ScoresError for another dtype or shape."""
    if entry.dtype != dtype or entry.shape != shape:
        raise _damaged(f"tensor {entry.name} is {entry.dtype} {show(entry.shape)} instead of {dtype} {shape}")
    return np.frombuffer(data, dtype=code, count=math.prod(shape), offset=entry.begin).reshape(shape)


def _damaged(what: str) -> ScoresError:
    return ScoresError(f"damaged, for {what}. Download the file again, or score the model again.")
