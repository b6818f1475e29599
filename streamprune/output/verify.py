"""Proof of a result, from the files on the disk: every tensor by its origin. Streaming, in bounded memory.

A tensor that is a slice of the source is compared with the source's bytes; one that a stage has computed is proved by
the SHA-256 on record.
"""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from streamprune.checkpoint.index import CONFIG_NAME, Checkpoint, open_checkpoint, read_json
from streamprune.checkpoint.safetensors_file import TensorEntry, read_ranges
from streamprune.config import DEFAULT_SHARD_BYTES
from streamprune.errors import CheckpointError, VerifyError
from streamprune.files.durable import reading
from streamprune.files.json_text import show
from streamprune.output.plan import REPORT_NAME, Computed, OutputTensor, SourceSlice, make_plan


@dataclass(frozen=True)
class Proof:
    """What was proved: so many tensors, and bytes of them; `computed` of these tensors by their hash on record."""

    tensors: int
    nbytes: int
    computed: int = 0

    def __add__(self, other: Proof) -> Proof:
        return Proof(self.tensors + other.tensors, self.nbytes + other.nbytes, self.computed + other.computed)


def verify(output: Path, source: Path, trust_remote_code: bool = False) -> Proof:
    """Prove a pruned model against the checkpoint that it was made from. Raises VerifyError at the first difference.

    What it must hold follows from the source and from its streamprune.json: the experts that were kept, and the
    tensors that were computed. Memory: two portions of a file, whatever the sizes.
    """
    # Only here: proving the files of a run needs neither torch nor transformers.
    from streamprune.models.open import open_moe
    from streamprune.models.per_layer_loading import find_loading_facts

    pruned, origin = open_checkpoint(output), open_checkpoint(source)
    refuse_extra_weights(output, pruned)
    record = _record_of(output)
    kept = {layer.index: layer.kept for layer in record.layers}
    opened = open_moe(origin, trust_remote_code)
    check_kept(output, kept, opened.layout.expert_layers, opened.layout.spec.count)
    loading = find_loading_facts(origin.config, opened.config, opened.skeleton)
    # How it is divided into files is the output's own affair.
    counts = {layer: len(experts) for layer, experts in kept.items()}
    plan = make_plan(opened.layout, loading, origin, counts, DEFAULT_SHARD_BYTES)
    _compare_configs(output, pruned.config, plan.config_for(kept))
    proof = prove_tensors(plan.tensors, kept, record.computed, source, output, pruned.tensors)
    for relative in origin.small_files():
        ours = output / relative
        if not ours.is_file() or not filecmp.cmp(ours, source / relative, shallow=False):
            raise VerifyError(f"{ours} is not the same as {source / relative}.")
    for name, contents in plan.files.items():
        if not (output / name).is_file() or (output / name).read_bytes() != contents:
            raise VerifyError(f"{output / name} is not the code that loads this model. Prune again.")
    return proof


def prove_tensors(
    tensors: Sequence[OutputTensor],
    kept: Mapping[int, Sequence[int]],
    computed: Mapping[str, Computed],
    source: Path,
    folder: Path,
    entries: Mapping[str, TensorEntry],
) -> Proof:
    """Prove that the tensors `entries` in `folder` are the expected ones.

    Each is compared with the bytes in the folder `source`, of which the experts `kept` stay by layer; those that are
    `computed` are proved by their hash.
    Raises VerifyError for a tensor that is missing, unexpected, of another shape or dtype, or that differs in a byte.
    """
    names = {tensor.name for tensor in tensors}
    for what, odd in (
        ("lacks", names - entries.keys()),
        ("has, beyond what the source gives,", entries.keys() - names),
    ):
        if odd:
            raise VerifyError(f"{folder} {what} {len(odd)} tensors, first {min(odd)}.")
    proof = Proof(0, 0)
    for tensor in tensors:
        entry = entries[tensor.name]
        if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            raise VerifyError(
                f"{folder / entry.file}: {entry.name} is {entry.dtype} {list(entry.shape)}, but has to be "
                f"{tensor.dtype} {list(tensor.shape)}."
            )
        hashed = computed.get(tensor.name)
        if hashed is not None:
            _check_hash(folder / entry.file, entry, hashed)
        else:
            origin = tensor.slice_of(kept.get(tensor.layer, ()) if tensor.layer is not None else ())
            _compare_bytes(folder / entry.file, entry, source / origin.file, origin)
        proof += Proof(1, entry.nbytes, hashed is not None)
    return proof


def _compare_bytes(path: Path, entry: TensorEntry, original: Path, origin: SourceSlice) -> None:
    position = entry.begin
    with _reading_back(path):
        written = path.open("rb")
    with written as ours, reading(original), original.open("rb") as theirs:
        for begin, end in origin.ranges:
            for wanted in read_ranges(theirs, [(begin, end)]):
                with _reading_back(path):
                    found = _read(ours, position, len(wanted))
                if found != wanted:
                    differing = (at for at, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b)
                    at = next(differing, len(found))
                    raise VerifyError(
                        f"{path}: {entry.name} differs from the source at byte {position + at:,} of the file "
                        f"({position + at - entry.begin:,} of the tensor), which stands for byte {begin + at:,} of "
                        f"{original}. If it was made from that very model, prune again, and if that happens again, "
                        "check the disk."
                    )
                position += len(wanted)
                begin += len(wanted)
    if position != entry.end:
        raise VerifyError(f"{path}: {entry.name} has {entry.end - position:,} bytes more than the source gives.")


def _check_hash(path: Path, entry: TensorEntry, origin: Computed) -> None:
    digest = hashlib.sha256()
    with _reading_back(path), path.open("rb") as stream:
        for portion in read_ranges(stream, [(entry.begin, entry.end)]):
            digest.update(portion)
    if digest.hexdigest() != origin.sha256:
        raise VerifyError(
            f"{path}: {entry.name}, computed by {origin.stage}, has the SHA-256 {digest.hexdigest()[:12]}…, but "
            f"{origin.sha256[:12]}… is on record. Prune again, and if that happens again, check the disk."
        )


@contextmanager
def _reading_back(path: Path) -> Iterator[None]:
    """Turn an OSError into a VerifyError about `path`, a file of the result."""
    try:
        yield
    except OSError as error:
        raise VerifyError(f"{path} cannot be read back: {error.strerror or error}. Check the disk.") from error


def _read(stream: BinaryIO, position: int, size: int) -> bytes:
    stream.seek(position)
    return stream.read(size)


def refuse_extra_weights(output: Path, pruned: Checkpoint) -> None:
    """Raise VerifyError for weights in addition to those of the index."""
    extra = sorted(path.name for path in output.glob("*.safetensors") if path.name not in pruned.files)
    if extra:
        raise VerifyError(f"{output / extra[0]} is in no index: it belongs to no part of the model. Remove it.")


class _KeptLayer(msgspec.Struct):
    index: int
    kept: list[int]


class _Record(msgspec.Struct):
    """What a proof takes from streamprune.json."""

    layers: list[_KeptLayer]
    computed: dict[str, Computed] = {}


def _record_of(output: Path) -> _Record:
    path = output / REPORT_NAME
    try:
        return msgspec.convert(read_json(path), _Record)
    except CheckpointError as error:
        raise VerifyError(f"{error} Without it, it is not known which experts were kept.") from None
    except ValueError:
        raise VerifyError(f"{path} does not list the kept experts of every layer. Was it changed?") from None


def check_computed(output: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Raise VerifyError unless the tensors of `output` that its record names as computed have the hashes on record."""
    for name, origin in _record_of(output).computed.items():
        if name not in entries:
            raise VerifyError(f"{output} lacks {name}, which {origin.stage} has computed. Prune again, or restore it.")
        _check_hash(output / entries[name].file, entries[name], origin)


def check_kept(output: Path, kept: Mapping[int, list[int]], layers: Sequence[int], count: int) -> None:
    """Raise VerifyError unless `kept` lists experts of a source that has `count` of them in each of `layers`."""
    if sorted(kept) != sorted(layers):
        raise VerifyError(
            f"{output / REPORT_NAME} names experts for layers {_few(sorted(kept))}, but the source has them in "
            f"{_few(sorted(layers))}. Is it another model's?"
        )
    for layer, experts in kept.items():
        if experts != sorted(set(experts)) or not experts or not 0 <= experts[0] <= experts[-1] < count:
            raise VerifyError(f"{output / REPORT_NAME}: the experts kept in layer {layer} are no ascending numbers.")


def _compare_configs(output: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in sorted(found.keys() | wanted.keys()):
        ours, theirs = (show(config[key]) if key in config else "missing" for config in (found, wanted))
        if ours != theirs or found.get(key) != wanted.get(key):
            raise VerifyError(
                f"{output / CONFIG_NAME}: {show(key)} is {ours}, but by the source it has to be {theirs}."
            )


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
