"""Writing the importance matrix of a run, from the sums that its finished layers have on record. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streamprune.errors import ResumeError
from streamprune.files.durable import PARTIAL, checksum_of, sync_file, sync_folder, writing
from streamprune.progress import Progress
from streamprune.quantize.imatrix import GgufNames, Imatrix, ImatrixText, InputSquares
from streamprune.reporting.record_computed import RecordedImatrix
from streamprune.saliency.scores import unpack_squares
from streamprune.work.folder import WorkFolder
from streamprune.work.layer_records import WeightInputs

if TYPE_CHECKING:
    from streamprune.calibration.sequences import Calibration


@dataclass(frozen=True)
class PlannedImatrix:
    """The importance matrix that a run will write to `path`: its names, and the text of so many tokens behind it."""

    path: Path
    names: GgufNames
    text: ImatrixText
    tokens: int


def planned_imatrix(path: Path, names: GgufNames, calibration: Calibration) -> PlannedImatrix:
    """The matrix from those sequences of a calibration and its anchor that go through the pruned layers for it."""
    sources: list[str] = []
    lengths: list[int] = []
    for part in (calibration, calibration.anchor):
        if part is None or not part.refit:
            continue
        used = [number for number, use in enumerate(part.refit) if use]
        lengths += [len(part.sequences[number]) for number in used]
        sources += [part.sources[source] for source in sorted({part.source_of[number] for number in used})]
    return PlannedImatrix(path, names, ImatrixText(sources, len(lengths), max(lengths)), sum(lengths))


def write_imatrix(planned: PlannedImatrix, layers: int, work: WorkFolder, progress: Progress) -> RecordedImatrix:
    """Write the file from the records of all layers, and print what it has and lacks.

    Memory: all sums, float32. Raises ResumeError if a layer has none on record, OutputError or ResourceError.
    """
    found = {layer: _sums_of(work, layer) for layer in range(layers)}
    matrix = Imatrix.of(planned.names, found)
    partial = planned.path.with_name(planned.path.name + PARTIAL)
    with writing(f"Writing {planned.path}", planned.path.absolute().parent):
        matrix.write(partial, planned.text)
        sync_file(partial)
        partial.rename(planned.path)
        sync_folder(planned.path.absolute().parent)
    digest = checksum_of(planned.path)
    assert digest is not None
    record = RecordedImatrix(
        file=planned.path.name,
        sha256=digest,
        weights=len(matrix.entries),
        sequences=planned.text.sequences,
        tokens=planned.tokens,
    )
    _print(progress, planned, record, matrix, found)
    return record


def _sums_of(work: WorkFolder, layer: int) -> dict[str, InputSquares]:
    record = work.read_layer(layer)
    if record is None or not record.inputs:
        raise ResumeError(
            f"The record of layer {layer} in {work.folder} has no sums for the importance matrix. Compute it anew with "
            f"--from-layer {layer}."
        )
    try:
        return {path: _squares(each) for path, each in record.inputs.items()}
    except (TypeError, ValueError) as error:
        raise ResumeError(
            f"The record of layer {layer} in {work.folder} has sums for the importance matrix that are not valid "
            f"({error}). Compute it anew with --from-layer {layer}."
        ) from None


def _squares(inputs: WeightInputs) -> InputSquares:
    return InputSquares(unpack_squares(inputs.squares, len(inputs.tokens)), np.array(inputs.tokens, dtype=np.int64))


def _print(
    progress: Progress,
    planned: PlannedImatrix,
    record: RecordedImatrix,
    matrix: Imatrix,
    layers: Mapping[int, Mapping[str, InputSquares]],
) -> None:
    without = ["the embeddings", "the output head", *matrix.unnamed]
    progress.say(
        f"importance matrix, for llama-quantize --imatrix: {planned.path}, {record.weights:,} weights, from "
        f"{record.tokens:,} tokens; without an entry: {', '.join(without)}"
    )
    for note in matrix.notes:
        progress.say(f"note: {note}")
    missing = {
        layer: max(int((each.counts == 0).sum()) for each in sums.values() if len(each.counts) > 1)
        for layer, sums in layers.items()
        if any(each.is_partial for each in sums.values())
    }
    if missing:
        where = ", ".join(f"layer {layer}: {count}" for layer, count in missing.items())
        progress.say(
            f"warning: some experts got none of these tokens ({where}); in the importance matrix they have the mean of "
            "their layer's. Give more or other text: --samples, --calibration."
        )
