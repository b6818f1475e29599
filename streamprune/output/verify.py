"""Verify an output from its files on the disk: each tensor against its source. Streaming, in bounded memory.

A tensor that is a slice of the source is compared with the source's bytes; one that a stage computed is compared with
the SHA-256 on record.
"""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from streamprune.checkpoint.index import CONFIG_NAME, Checkpoint, open_checkpoint
from streamprune.checkpoint.safetensors_file import TensorEntry, read_ranges
from streamprune.common_settings import DEFAULT_SHARD_BYTES
from streamprune.errors import UnsupportedModelError, VerifyError
from streamprune.files.durable import reading
from streamprune.files.json_text import differences, show
from streamprune.files.kinds import describe
from streamprune.formats.base import KeptExperts, StoredTensor
from streamprune.formats.pick import pick_formats
from streamprune.formats.quantization import SECTIONS, Quantization
from streamprune.hardware.memory import format_bytes
from streamprune.models.expert_layout import Layout
from streamprune.output.encoded import SCALE, SHAPE
from streamprune.output.plan import REPORT_NAME, PrunePlan, make_plan
from streamprune.output.source_bytes import read_parts, source_bytes
from streamprune.output.tensors import OutputTensor, SourceSlice
from streamprune.output.verified_record import VerifiedRecord, check_kept, kept_channels, read_verified_record
from streamprune.work.layer_records import Computed


@dataclass(frozen=True)
class Proof:
    """What was verified: the number of tensors and of bytes.

    `computed` of these tensors only by their hash; `decoded` of them against the quantized source, decoded again;
    `encoded` of them against the source, quantized again.
    """

    tensors: int
    nbytes: int
    computed: int = 0
    decoded: int = 0
    encoded: int = 0

    @property
    def text(self) -> str:
        """The result for people."""
        return f"{self.tensors:,} tensors, {format_bytes(self.nbytes)}, byte-identical to the source{self.exceptions}"

    @property
    def exceptions(self) -> str:
        """What is not byte-identical to the source, for people, and how it was verified."""
        rest = []
        if self.decoded:
            rest.append(f"{_counted(self.decoded, 'decoded')}, identical to the source decoded again")
        if self.encoded:
            rest.append(f"{_counted(self.encoded, 'quantized')}, identical to the source rounded again")
        if self.computed:
            rest.append(f"{_counted(self.computed, 'computed')}, verified by their hash")
        return f" except {' and '.join(rest)}" if rest else ""

    def __add__(self, other: Proof) -> Proof:
        sums = (mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))
        return Proof(*sums)


def _counted(number: int, kind: str) -> str:
    return f"1 {kind} tensor" if number == 1 else f"{number:,} {kind} tensors"


def check_written(output: Path) -> None:
    """Raise VerifyError unless `output` is a folder that streamprune wrote."""
    if not (output / REPORT_NAME).is_file():
        raise VerifyError(
            f"There is nothing to verify: {output} {describe(output)}. Give the folder of a model that "
            "`streamprune run` or `streamprune prune` wrote."
        )


def verify(output: Path, source: Path, trust_remote_code: bool = False) -> Proof:
    """Verify a pruned model against the checkpoint that it was made from. Raises VerifyError at the first difference.

    The expected contents follow from the source and from streamprune.json: which experts were kept, and which tensors
    were computed. Memory: two portions of a file, for any sizes; of a decoded tensor, one matrix and its stored parts.
    """
    # Imported only here: verifying the files of a run needs neither torch nor transformers.
    from streamprune.models.open import open_moe
    from streamprune.models.per_layer_loading import find_loading_facts
    from streamprune.output.source import output_source

    check_written(output)
    if source.samefile(output):
        raise VerifyError(f"--source {source} is {output} itself. Give the model that it was made from.")
    pruned, origin = open_checkpoint(output), open_checkpoint(source)
    refuse_extra_weights(output, pruned)
    record = read_verified_record(output)
    opened = open_moe(origin, trust_remote_code)
    check_kept(
        output,
        {layer.index: layer.kept for layer in record.layers},
        opened.layout.expert_layers,
        opened.layout.spec.count,
    )
    _check_mtp(output, record, opened.layout)
    kept = kept_channels(output, record, opened.layout)
    loading = find_loading_facts(origin.config, opened.config, opened.skeleton)
    # The division into files may differ from this plan.
    counts = {layer.index: len(layer.kept) for layer in record.layers}
    written = output_source(opened, loading, record.storage, record.settings.width)
    kept = dict(written.layout.with_mtp(kept))
    plan = make_plan(written, counts, DEFAULT_SHARD_BYTES, record.settings.width)
    _compare_configs(output, pruned.config, plan.config_for(kept))
    _check_computed_kinds(output, record, {name: each.name or "" for name, each in opened.targets.items()}, plan)
    proof = prove_tensors(plan.tensors, kept, record.computed, source, output, pruned.tensors)
    check_formats(plan, kept, output, pruned.tensors, pruned.config)
    own = plan.files_for(kept)
    for relative in plan.copied:
        ours = output / relative
        if relative.as_posix() in own:
            continue
        if not ours.is_file() or not filecmp.cmp(ours, source / relative, shallow=False):
            raise VerifyError(f"{ours} is not the same as {source / relative}.")
    for name, contents in own.items():
        if not (output / name).is_file() or (output / name).read_bytes() != contents:
            what = "modeling code" if name in plan.files else "renumbered experts"
            raise VerifyError(f"{output / name} differs from the {what} that this version writes. Prune again.")
    return proof


def _check_mtp(output: Path, record: VerifiedRecord, layout: Layout) -> None:
    """Raise VerifyError unless the MTP layer on record, if any, is the source's, with as many experts as the last."""
    layer = record.mtp.layer if record.mtp is not None else None
    if layer is None:
        return
    if layer.index != layout.mtp_layer or len(layer.kept) != len(record.layers[-1].kept):
        raise VerifyError(
            f"{output / REPORT_NAME} names {len(layer.kept)} experts of an MTP layer {layer.index}, but the source has "
            f"it as layer {layout.mtp_layer}, which keeps as many as the last with experts, "
            f"{len(record.layers[-1].kept)}. Is it another model's?"
        )
    check_kept(output, {layer.index: layer.kept}, (layer.index,), layout.spec.count)


def _check_computed_kinds(output: Path, record: VerifiedRecord, feeds: Mapping[str, str], plan: PrunePlan) -> None:
    """Raise VerifyError for computed tensors that no stage computes. `feeds` are the parameters by plain tensor."""
    refitted = {layer.index for layer in record.refit.layers} if record.refit is not None else set()
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    scales = {tensor.name for tensor in plan.tensors if tensor.encoded is not None and tensor.encoded.part == SCALE}
    for name, origin in record.computed.items():
        tensor = tensors.get(name)
        plain = tensor.encoded.plain if tensor is not None and tensor.encoded is not None else tensor
        is_refittable = plain is not None and plain.layer in refitted and _is_down(plain.name, feeds, plan)
        if origin.stage == "gptq":
            # Only quantized matrices are rounded, and their scales are the source's if nothing was refitted.
            possible = plain is not tensor and record.settings.rounding == "gptq"
            possible &= is_refittable or name not in scales
        else:
            possible = is_refittable
        if not possible:
            raise VerifyError(
                f"{output / REPORT_NAME}: {name} is on record as computed by {origin.stage}, but a refit computes the "
                "down projections of refitted layers only, and GPTQ the codes of quantized matrices. Was the record "
                "changed?"
            )


def _is_down(name: str, feeds: Mapping[str, str], plan: PrunePlan) -> bool:
    """Whether a plain tensor is a down projection of experts."""
    if name in feeds:
        return feeds[name].endswith(".down_proj")
    # Where a tensor of all experts is taken apart, the source has no tensor of this name.
    found = plan.encoding.matrices if plan.encoding is not None else None
    return found is not None and name in found.experts & found.split


def prove_tensors(
    tensors: Sequence[OutputTensor],
    kept: Mapping[int, KeptExperts],
    computed: Mapping[str, Computed],
    source: Path,
    folder: Path,
    entries: Mapping[str, TensorEntry],
) -> Proof:
    """Verify that the tensors `entries` in `folder` are the expected ones.

    Each is compared with the bytes in the folder `source`, of whose experts `kept` stays by layer; those that are
    `computed` are compared with their hash.
    Raises VerifyError for a tensor that is missing, unexpected, of another shape or dtype, or that differs in a byte.
    """
    names = {tensor.name for tensor in tensors}
    for what, odd in (
        ("lacks", names - entries.keys()),
        ("has", entries.keys() - names),
    ):
        if odd:
            kind = "unexpected " if what == "has" else ""
            raise VerifyError(f"{folder} {what} {len(odd)} {kind}tensors, first {min(odd)}.")
    proof = Proof(0, 0)
    for tensor in tensors:
        entry = entries[tensor.name]
        if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            raise VerifyError(
                f"{folder / entry.file}: {entry.name} is {entry.dtype} {list(entry.shape)}, but has to be "
                f"{tensor.dtype} {list(tensor.shape)}."
            )
        hashed = computed.get(tensor.name)
        if hashed is not None and not tensor.is_of_experts and tensor.encoded is None:
            raise VerifyError(
                f"{folder}: {tensor.name} is on record as computed by {hashed.stage}, which only tensors of experts "
                "and quantized ones can be. Was the record changed?"
            )
        if hashed is not None:
            _check_hash(folder / entry.file, entry, hashed)
        else:
            stays = (kept.get(tensor.layer) if tensor.layer is not None else None) or KeptExperts()
            if tensor.is_decoded or tensor.encoded is not None:
                _compare_made(folder / entry.file, entry, tensor, stays, source)
            else:
                origin = tensor.slice_of(stays)
                _compare_bytes(folder / entry.file, entry, source / origin.file, origin)
        made = hashed is None
        # (The shape of a matrix, which lies beside it, is the same however that was rounded.)
        is_encoded = made and tensor.encoded is not None and tensor.encoded.part != SHAPE
        proof += Proof(1, entry.nbytes, not made, made and tensor.is_decoded and not is_encoded, is_encoded)
    return proof


def check_formats(
    plan: PrunePlan,
    kept: Mapping[int, KeptExperts],
    folder: Path,
    entries: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
) -> None:
    """Raise VerifyError unless quantized tensors in `folder` decode to the weights that they were made of.

    A parameter is decoded from the bytes of its parts by its format, which holds what config.json says. So besides
    equal bytes (`prove_tensors`) it takes the same parts, and an equal format by the output's own config.json.
    """
    if plan.quantized is None and plan.encoding is None:
        return
    try:
        found = pick_formats(entries, config)
    except UnsupportedModelError as error:
        raise VerifyError(f"{folder}: the {CONFIG_NAME} does not fit the tensors. {error}") from None
    planned = _planned_storage(plan, kept)
    # Each parameter is one of the source's, and each of those is a single one here.
    origins: dict[str, str] = {}
    copies: dict[str, str] = {}
    for tensor in plan.tensors:
        here, there = found[tensor.name], planned[tensor.name]
        same = origins.setdefault(here.parameter, there.parameter) == there.parameter
        same &= copies.setdefault(there.parameter, here.parameter) == here.parameter
        if (here.part, here.format) != (there.part, there.format) or not same:
            raise VerifyError(
                f"{folder}: by its {CONFIG_NAME}, {tensor.name} is stored as {here.format.name}, but in the source as "
                f"{there.format.name}, or with other settings or companions. Was it changed? Prune again."
            )


def _planned_storage(plan: PrunePlan, kept: Mapping[int, KeptExperts]) -> Mapping[str, StoredTensor]:
    """How every tensor of the output has to be stored, under the parameters' names in what it was made of."""
    if plan.quantized is None:
        entries = (TensorEntry(each.name, "", each.dtype, each.shape, 0, each.nbytes) for each in plan.tensors)
        return pick_formats({each.name: each for each in entries}, plan.config)
    source, found = plan.quantized.stored, {}
    for tensor in plan.tensors:
        number = kept[tensor.layer].experts[tensor.slot] if tensor.slot is not None and tensor.layer is not None else 0
        found[tensor.name] = source[tensor.sources[number].name]
    return found


def _compare_bytes(path: Path, entry: TensorEntry, original: Path, origin: SourceSlice) -> None:
    """Raise VerifyError unless `entry` in `path` has the bytes of `origin` in `original`."""
    position = entry.begin
    with _reading_back(path):
        written = path.open("rb")
    with written as output, reading(original), original.open("rb") as source:
        for part in origin.parts:
            begin = position
            for wanted in read_parts(source, [part]):
                with _reading_back(path):
                    found = _read(output, position, len(wanted))
                if found != wanted:
                    differing = (at for at, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b)
                    at = position + next(differing, len(found))
                    where = f"byte {part.begin + at - begin:,}" if part.take is None else "the channels that stay"
                    raise VerifyError(
                        f"{path}: {entry.name} differs from the source at byte {at - entry.begin:,} of the tensor "
                        f"(byte {at:,} of this file, {where} of {original}). If the output was made from that model, "
                        "prune again; if this happens again, check the disk."
                    )
                position += len(wanted)
    if position != entry.end:
        raise VerifyError(f"{path}: {entry.name} is {entry.end - position:,} bytes longer than its source.")


def _compare_made(path: Path, entry: TensorEntry, tensor: OutputTensor, kept: KeptExperts, source: Path) -> None:
    """Raise VerifyError unless `entry` in `path` has what tensors in `source` decode to, or are rounded to."""
    position = entry.begin
    with _reading_back(path):
        written = path.open("rb")
    with written as output:
        for wanted in source_bytes(tensor, kept, source):
            with _reading_back(path):
                found = _read(output, position, len(wanted))
            if found != wanted:
                how = "decodes to" if tensor.encoded is None else f"is rounded to as {tensor.encoded.scheme.name}"
                raise VerifyError(
                    f"{path}: {entry.name} differs from what {source} {how}. If the output was made from that model, "
                    "prune again; if this happens again, check the disk."
                )
            position += len(wanted)


def _check_hash(path: Path, entry: TensorEntry, origin: Computed) -> None:
    digest = hashlib.sha256()
    with _reading_back(path), path.open("rb") as stream:
        for portion in read_ranges(stream, [(entry.begin, entry.end)]):
            digest.update(portion)
    if digest.hexdigest() != origin.sha256:
        raise VerifyError(
            f"{path}: {entry.name}, computed by {origin.stage}, has the SHA-256 {digest.hexdigest()[:12]}…, but "
            f"{origin.sha256[:12]}… is on record. Prune again; if this happens again, check the disk."
        )


@contextmanager
def _reading_back(path: Path) -> Iterator[None]:
    """Turn an OSError into a VerifyError about `path`, a file of the result."""
    try:
        yield
    except OSError as error:
        raise VerifyError(f"{path} cannot be read: {error.strerror or error}. Check the disk.") from error


def _read(stream: BinaryIO, position: int, size: int) -> bytes:
    stream.seek(position)
    return stream.read(size)


def refuse_extra_weights(output: Path, pruned: Checkpoint) -> None:
    """Raise VerifyError for weights in addition to those of the index."""
    extra = sorted(path.name for path in output.glob("*.safetensors") if path.name not in pruned.files)
    if extra:
        raise VerifyError(f"{output / extra[0]} is not listed in the index. Remove it.")


def check_computed(output: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Raise VerifyError unless the tensors of `output` that its record names as computed have the hashes on record."""
    for name, origin in read_verified_record(output).computed.items():
        if name not in entries:
            raise VerifyError(f"{output} lacks {name}, which {origin.stage} computed. Prune again, or restore it.")
        _check_hash(output / entries[name].file, entries[name], origin)


def _compare_configs(output: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise VerifyError unless the config of an output is the expected one.

    But for the version of the library that its quantization section was made with: another one may be installed now.
    """
    made, section = Quantization.of(found), wanted.get(SECTIONS[0])
    if isinstance(section, Mapping) and "version" in section and "version" in made.values:
        wanted = {**wanted, SECTIONS[0]: {**section, "version": made.values["version"]}}
    for where, ours, theirs in differences(found, wanted):
        raise VerifyError(f"{output / CONFIG_NAME}: {show(where)} is {ours}, but {theirs} is expected from the source.")
