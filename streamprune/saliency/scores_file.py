"""The file of scores: one small safetensors file, made to be shared. Imports no torch.

It holds a tensor per layer and field of `statistics.FIELDS`, for example `layers.3.gated_norms`: a row per source of
the calibration text, a column per expert; int64 for counts of tokens, float64 otherwise. Its metadata are

- `streamprune_scores`: the number of the format, 1;
- `about`, `fields`: what this is, and what each field is, for whoever opens the file;
- `blocks`: the numbers of the layers; `sources`: name and tokens of each source, in the order of the rows;
- `experts`: how the model's config states its experts; `provenance`: model, calibration, versions;
- `layout` (optional): which tensors of the checkpoint hold the experts.

All but the first two are JSON. The same scores give the same bytes.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.checkpoint.safetensors_file import TensorEntry, header_entries
from streamprune.errors import CheckpointError, OutputError, ScoresError
from streamprune.files.durable import stream_whole, writing
from streamprune.files.json_text import parse_json, show
from streamprune.saliency.scores import (
    COUNTS,
    FIELDS,
    LayerStatistics,
    Scores,
    check_layer,
    check_layers,
    check_sources,
    check_spec,
)

SCORES_NAME = "scores.safetensors"
#: Where they lie in a pruned model's folder: not beside the weights, where some loaders read every safetensors file.
SCORES_FOLDER = "scores"
FORMAT = 1
#: 94 layers with 512 experts each and 30 sources take 100 MB; a real file has a few.
MOST_BYTES = 2**29
MOST_HEADER_BYTES = 2**26
_MARK = "streamprune_scores"
_ABOUT = (
    "Scores of streamprune: what each expert of a Mixture-of-Experts model did on calibration text, by source. "
    "Tensors layers.N.FIELD have a row per source and a column per expert."
)
_DTYPES: dict[bool, tuple[str, str]] = {True: ("I64", "<i8"), False: ("F64", "<f8")}


def check_scores_file(output: Path, source: Path, overwrite: bool) -> None:
    """Raise OutputError unless a file of scores may be written to `output`, for the model in `source`."""
    if output.name in {"", ".."} or output.is_dir():
        raise OutputError(f"{output} is a folder. Name the file that the scores go to, such as -o scores.safetensors.")
    if output.absolute().parent.resolve() == source.resolve():
        raise OutputError(f"{output} is in the model's own folder, which stays as it is. Choose another place with -o.")
    if not os.path.lexists(output):
        return
    if not output.is_file():
        # A device, a pipe, a link to nothing.
        raise OutputError(f"{output} is no regular file, so that it is not replaced. Choose another name with -o.")
    if not overwrite:
        raise OutputError(f"{output} exists. Choose another name with -o, or add --overwrite.")
    if not _may_be_scores(output):
        raise OutputError(f"{output} holds no scores, so --overwrite does not replace it. Choose another name with -o.")


def _may_be_scores(path: Path) -> bool:
    """Whether a file begins as scores do, or is empty."""
    with writing(f"Looking at {path}", path.parent), path.open("rb") as file:
        start = file.read(64)
    return not start or start[8:].startswith(f'{{"__metadata__":{{"{_MARK}":'.encode())


def write_scores(path: Path, scores: Scores) -> None:
    """Write `scores` to `path`, whole or not at all.

    Raises ScoresError if they are not what `read_scores` would accept, OutputError or ResourceError if the disk fails.
    """
    _check(scores)
    with writing("Writing the scores", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream_whole(path, [_header(scores), *_bytes_of(scores)])


def _check(scores: Scores) -> None:
    check_sources(scores.sources, scores.source_tokens)
    check_spec(scores.spec)
    check_layers(scores.layer_indices)
    for layer in scores.layers:
        check_layer(layer, scores.source_tokens, scores.spec.count)


def _header(scores: Scores) -> bytes:
    metadata = {
        _MARK: str(FORMAT),
        "about": _ABOUT,
        "fields": _json(FIELDS),
        "blocks": _json(scores.layer_indices),
        "sources": _json([{"name": n, "tokens": t} for n, t in zip(scores.sources, scores.source_tokens, strict=True)]),
        "experts": _json(asdict(scores.spec)),
        "provenance": _json(scores.provenance),
    }
    if scores.layout is not None:
        metadata["layout"] = _json(scores.layout)
    header: dict[str, Any] = {"__metadata__": metadata}
    shape = [len(scores.sources), scores.spec.count]
    position, size = 0, 8 * shape[0] * shape[1]
    for index in scores.layer_indices:
        for name in FIELDS:
            header[_tensor_name(index, name)] = {
                "dtype": _DTYPES[name in COUNTS][0], "shape": shape, "data_offsets": [position, position + size],
            }  # fmt: skip
            position += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # The format wants the tensors' bytes aligned to eight.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _tensor_name(index: int, name: str) -> str:
    return f"layers.{index}.{name}"


def _bytes_of(scores: Scores) -> Iterator[bytes]:
    for layer in scores.layers:
        for name, values in zip(FIELDS, layer.values, strict=True):
            yield np.ascontiguousarray(values, dtype=_DTYPES[name in COUNTS][1]).tobytes()


def read_scores(path: Path) -> Scores:
    """The scores in `path`: a file, a folder that has one named SCORES_NAME, or the folder of a pruned model.

    Believes nothing of what the file says of itself: raises ScoresError for whatever `write_scores` would not write.
    """
    # Unlike pathlib's, this takes any name.
    if os.path.isdir(path):  # noqa: PTH112
        inside = path / SCORES_FOLDER / SCORES_NAME
        path = inside if os.path.isfile(inside) else path / SCORES_NAME  # noqa: PTH113
    data = _read(path)
    try:
        return _parse(path, data)
    except CheckpointError as error:
        raise ScoresError(str(error)) from None
    except ScoresError as error:
        raise ScoresError(f"{path}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        facts = path.stat()
        # To read a pipe would be to wait for ever.
        if not stat.S_ISREG(facts.st_mode):
            raise ScoresError(f"{path} is no regular file. Give the file that `streamprune score` wrote.")
        if facts.st_size > MOST_BYTES:
            raise ScoresError(
                f"{path} has {facts.st_size:,} bytes; scores have {MOST_BYTES:,} at most. Are these weights? Give the "
                "file that `streamprune score` wrote."
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ScoresError(
            f"No scores can be read from {show(str(path))}: {reason}. Give the file that `streamprune score` wrote, or "
            f"its folder with {SCORES_NAME}."
        ) from None


def _parse(path: Path, data: bytes) -> Scores:
    if data.startswith(b"version https://git-lfs"):
        raise ScoresError("this is a Git LFS pointer, not the scores themselves. Fetch them: `git lfs pull`.")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MOST_HEADER_BYTES):
        raise _damaged(f"of its {len(data):,} bytes {length:,} would be its header")
    try:
        header = parse_json(data[8 : 8 + length], unique=True)
    except (ValueError, RecursionError):
        raise _damaged("its header is no valid JSON") from None
    entries, end = header_entries(path, path.name, header, 8 + length)
    if end != len(data):
        raise _damaged(f"it has {len(data):,} bytes, {end:,} by its header")
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or _MARK not in metadata:
        raise ScoresError("this safetensors file holds no scores. Give the file that `streamprune score` wrote.")
    if metadata[_MARK] != str(FORMAT):
        raise ScoresError(
            f"the scores have format {show(metadata[_MARK])}, but this version of streamprune reads {FORMAT}. Update "
            "streamprune, or score the model again."
        )
    return _scores_of(metadata, {entry.name: entry for entry in entries}, data)


def _scores_of(metadata: Mapping[str, Any], entries: Mapping[str, TensorEntry], data: bytes) -> Scores:
    names, tokens = check_sources(*_sources(_value(metadata, "sources", list)))
    spec = check_spec(_value(metadata, "experts", dict))
    indices = check_layers(_value(metadata, "blocks", list))
    expected = {_tensor_name(index, name) for index in indices for name in FIELDS}
    if expected != entries.keys():
        missing, more = sorted(expected - entries.keys()), sorted(entries.keys() - expected)
        what = f"lacks {len(missing)} tensors, first {missing[0]}" if missing else f"has the unknown {show(more[0])}"
        raise _damaged(f"for {len(indices)} layers with {len(FIELDS)} fields each it {what}")
    layers = []
    for index in indices:
        tensors = [_tensor(entries[_tensor_name(index, name)], name, (len(names), spec.count), data) for name in FIELDS]
        layer = LayerStatistics(index, np.stack(tensors))
        check_layer(layer, tokens, spec.count)
        layers.append(layer)
    layout = _value(metadata, "layout", dict) if "layout" in metadata else None
    return Scores(tuple(layers), names, tokens, spec, _value(metadata, "provenance", dict), layout)


def _value(metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    text = metadata.get(name)
    try:
        value = parse_json(text.encode(), unique=True) if isinstance(text, str) else None
        # Infinity and NaN, which Python reads, are no JSON, and 1e999 would be written as such again.
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise _damaged(f"its metadata {name!r} are {show(text)}")
    return value


def _sources(listed: list[Any]) -> tuple[list[Any], list[Any]]:
    if not all(isinstance(source, dict) and source.keys() == {"name", "tokens"} for source in listed):
        raise _damaged(f"its metadata 'sources' are {show(listed)}")
    return [source["name"] for source in listed], [source["tokens"] for source in listed]


def _tensor(entry: TensorEntry, name: str, shape: tuple[int, int], data: bytes) -> NDArray[np.float64]:
    dtype, code = _DTYPES[name in COUNTS]
    if entry.dtype != dtype or entry.shape != shape:
        raise _damaged(f"tensor {entry.name} is {entry.dtype} {show(entry.shape)} instead of {dtype} {shape}")
    values = np.frombuffer(data, dtype=code, count=shape[0] * shape[1], offset=entry.begin)
    return values.reshape(shape).astype(np.float64)


def _damaged(what: str) -> ScoresError:
    return ScoresError(f"damaged, for {what}. Download the file again, or score the model again.")
