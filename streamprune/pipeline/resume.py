"""Everything that decides the result of a run: recorded, and compared before an interrupted run is resumed.

Also what decided its scores, which is stored with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from msgspec import UNSET, convert

from streamprune.calibration.refit_text import fitted_tokens
from streamprune.calibration.sequences import FIT, JUDGE, Calibration, date_of, fingerprint_of
from streamprune.config import RunSettings
from streamprune.errors import ProcessesError, ResumeError
from streamprune.files.durable import checksum_of, reading
from streamprune.files.json_text import show
from streamprune.models.open import versions
from streamprune.pipeline.finish import RunResult
from streamprune.pipeline.status import ended, nothing_to_resume
from streamprune.planning.prepare import PreparedModel
from streamprune.planning.refit import anchor_name
from streamprune.reporting.record import public_name
from streamprune.reporting.record_computed import AnchorText, RecordedRefit, RecordedRounding
from streamprune.reporting.record_text import Calibration as RecordedText
from streamprune.reporting.record_text import SourceTokens
from streamprune.saliency.scores_file import scores_path
from streamprune.work.folder import resume_command
from streamprune.work.records import (
    RecordedCalibration,
    RecordedRun,
    command_of,
    file_states,
    has_pruning,
    read_run,
    read_tokens,
    with_changes,
)

#: Settings that do not change the result, or whose effect is recorded otherwise: the calibration by its tokens, a
#: budget by the resulting number of experts, the dtype as that which is computed in.
FREE_SETTINGS = {
    "output", "work_dir", "device", "dtype", "batch_tokens", "states", "vram_gib", "ram_gib", "overwrite", "resume",
    "checkpoint_every", "from_layer", "verify", "report", "stop_if_kl", "calibration", "date", "skip_bad", "anchor",
    "budget_gib", "gpu", "keep", "ratio", "context", "batch", "kv_dtype", "gguf", "for_engine", "round_for",
}  # fmt: skip


def describe_run(
    settings: RunSettings, prepared: PreparedModel, calibration: Calibration, batch_tokens: int
) -> RecordedRun:
    """Everything that decides the result of a run, and the command that started it."""
    counts, command = prepared.plan.counts, command_of(settings)
    kept = "none removed"
    if counts is not None and counts.keep is not None:
        kept = f"{counts.keep} per layer"
    elif counts is not None:
        listed = f": {', '.join(map(str, counts.per_layer.values()))}" if counts.per_layer else ""
        kept = f"{counts.total} in all{listed}"
    with reading(prepared.checkpoint.folder):
        source = prepared.checkpoint.fingerprint()
    return RecordedRun(
        command=command,
        settings={name: value for name, value in command.items() if name not in FREE_SETTINGS}
        | {"experts kept": kept, "channels kept": counts.width if counts else None}
        | {"computed in": str(prepared.dtype)}
        | ({"contents of the scores": checksum_of(scores_path(settings.scores))} if settings.scores else {}),
        source=source,
        files=file_states(prepared.checkpoint),
        calibration=_recorded(calibration),
        # (torch's version is an instance of its own class.)
        versions={name: str(version) for name, version in versions().items()},
        layers=len(prepared.written.layout.written_layers),
        batch_tokens=batch_tokens,
        budget_bytes=counts.budget.nbytes if counts and counts.budget else None,
        anchor=_recorded(calibration.anchor) if calibration.anchor is not None else None,
    )


def _recorded(text: Calibration) -> RecordedCalibration:
    return RecordedCalibration(
        fingerprint=text.fingerprint,
        sequences=len(text.sequences),
        tokens=text.tokens,
        sources=list(text.sources),
        source_of=list(text.source_of),
        recipe=dict(text.recipe),
        notes=list(text.notes),
    )


def tokens_of(calibration: Calibration) -> list[list[int]]:
    """The sequences of a calibration and its anchor, as they are recorded."""
    anchor = calibration.anchor.sequences if calibration.anchor is not None else ()
    return [sequence.tolist() for sequence in (*calibration.sequences, *anchor)]


def read_calibration(recorded: RecordedRun, work: Path, vocab_size: int) -> Calibration:
    """The recorded calibration and its anchor. Raises ResumeError unless they are those that the run started with."""
    facts, tokens = recorded.calibration, read_tokens(work)
    count = len(facts.source_of)
    calibration = _read(facts, tokens[:count], work, vocab_size)
    if recorded.anchor is None and len(tokens) == count:
        return calibration
    if recorded.anchor is None:
        raise _other_tokens(work)
    return replace(calibration, anchor=_read(recorded.anchor, tokens[count:], work, vocab_size))


def _read(facts: RecordedCalibration, tokens: list[list[int]], work: Path, vocab_size: int) -> Calibration:
    sound = len(facts.source_of) == len(tokens) > 0 and all(source < len(facts.sources) for source in facts.source_of)
    sound = sound and all(
        isinstance(sequence, list)
        and sequence
        and all(type(token) is int and 0 <= token < vocab_size for token in sequence)
        for sequence in tokens
    )
    sequences = tuple(torch.tensor(sequence, dtype=torch.int64) for sequence in tokens) if sound else ()
    if not sound or fingerprint_of(sequences, facts.source_of) != facts.fingerprint:
        raise _other_tokens(work)
    sources, notes = tuple(facts.sources), tuple(facts.notes)
    return Calibration(sequences, sources, tuple(facts.source_of), facts.fingerprint, notes, facts.recipe)


def _other_tokens(work: Path) -> ResumeError:
    return ResumeError(
        f"The calibration tokens in {work} are not those that the run started with. Was the folder changed?"
    )


def check_same(before: RecordedRun, now: RecordedRun, work: Path) -> None:
    """Raise ResumeError, naming every difference, unless the run recorded `before` may be resumed as `now`."""
    found = list(_differences(before, now))
    if found:
        raise ResumeError(
            f"The run in {work} cannot be resumed, because the result would not be the same:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nUndo the changes, or discard the finished work and start over with --resume never."
        )


def _differences(before: RecordedRun, now: RecordedRun) -> Iterator[str]:
    for old, new in ((before.settings, now.settings), (before.versions, now.versions)):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield f"{name.replace('_', '-')}: {_show(old.get(name))} then, {_show(new.get(name))} now"
    for file in sorted(before.files.keys() | now.files.keys()):
        if before.files.get(file) != now.files.get(file):
            yield f"model file {file}: {_file(before.files.get(file))} then, {_file(now.files.get(file))} now"
    if before.source != now.source and before.files == now.files:
        yield "the model's contents: another fingerprint, although its files have the same sizes and times"
    dates = [date_of(each.calibration.recipe) for each in (before, now)]
    if dates[0] != dates[1]:
        yield f"date in the chat template: {_show(dates[0])} then, {_show(dates[1])} now"
    if before.calibration.fingerprint != now.calibration.fingerprint:
        yield (
            f"calibration: {before.calibration.tokens:,} tokens then, {now.calibration.tokens:,} now, with other "
            "contents"
        )
    anchors = [each.anchor.fingerprint if each.anchor is not None else None for each in (before, now)]
    if anchors[0] != anchors[1]:
        yield "anchor: another text"


def _show(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) and len(value) < 200 else show(value)


def _file(state: list[int] | None) -> str:
    return "missing" if state is None else f"{state[0]:,} bytes, changed at {state[1] / 1e9:.3f}"


def recorded_refit(settings: RunSettings, text: Calibration, scored: Mapping[str, Any]) -> RecordedRefit:
    """The text that down projections are refitted to, as it is recorded with the output.

    `scored` is the text that the experts were scored on, as the provenance of the scores states it.
    """
    anchor, name = text.anchor, anchor_name(settings, text)
    used = None
    if anchor is not None and name is not None:
        sources = zip(anchor.sources, anchor.tokens_of, strict=True)
        used = AnchorText(
            name=public_name(name),
            sources=[SourceTokens(*each) for each in sources],
            sequences=len(anchor.sequences),
            tokens=anchor.tokens,
            fingerprint=anchor.fingerprint,
        )
    fitted, judging = fitted_tokens(text), fitted_tokens(text, JUDGE)
    other = UNSET if text.fingerprint == scored["fingerprint"] else convert(calibration_facts(text), RecordedText)
    return RecordedRefit(anchor=used, calibration=other, fitted_tokens=fitted, judging_tokens=judging)


def recorded_rounding(text: Calibration, scored: Mapping[str, Any]) -> RecordedRounding:
    """The text that matrices are rounded by, as it is recorded with the output; `scored` as in `recorded_refit`."""
    tokens = sum(fitted_tokens(text, use) for use in (FIT, JUDGE))
    other = UNSET if text.fingerprint == scored["fingerprint"] else convert(calibration_facts(text), RecordedText)
    return RecordedRounding(calibration=other, tokens=tokens)


def calibration_facts(text: Calibration) -> dict[str, Any]:
    """A calibration as JSON: what it is made of, and what was held out of it."""
    facts = {
        "sources": [
            {"name": name, "tokens": tokens} for name, tokens in zip(text.sources, text.tokens_of, strict=True)
        ],
        "sequences": len(text.sequences),
        "tokens": text.tokens,
        "fingerprint": text.fingerprint,
        "recipe": dict(text.recipe),
    }
    held = text.held_out
    if held is not None:
        stated = {"sequences": len(held.sequences), "tokens": held.tokens, "fingerprint": held.fingerprint}
        facts["held_back"] = stated
    return facts


def provenance_of(
    settings: RunSettings, prepared: PreparedModel, text: Calibration, device: torch.device, batch_tokens: int
) -> dict[str, Any]:
    """What decided the scores of a run, as JSON. It has nothing about which experts stay."""
    return {
        "model": public_name(settings.model),
        "revision": settings.revision,
        "source": {"fingerprint": prepared.checkpoint.fingerprint(), "bytes": prepared.checkpoint.nbytes},
        "settings": {
            "propagate": settings.propagate,
            "dtype": prepared.dtype_name,
            "device": device.type,
            "batch_tokens": batch_tokens,
            **({} if settings.channels else {"channels": False}),
        },
        "calibration": calibration_facts(text),
        "versions": versions(),
    }


def settings_to_resume(work_folder: Path, changes: Mapping[str, Any]) -> RunSettings | RunResult:
    """The settings of a recorded run, or its result if the output is complete already."""
    recorded = read_run(work_folder)
    if recorded is None and has_pruning(work_folder):
        raise ResumeError(
            f"{work_folder} has an unfinished `streamprune prune`, not a run. Resume with: "
            f"{resume_command(work_folder)}"
        )
    if recorded is None:
        raise nothing_to_resume(work_folder)
    if "candidates" in recorded.command:
        raise ProcessesError(
            f"{work_folder} has an unfinished `streamprune search`, which runs in one process. Resume it without a "
            f"launcher: {resume_command(work_folder)}"
        )
    settings = with_changes(recorded.settings_in(work_folder), work_folder, changes)
    if ended(work_folder, settings.output):
        return RunResult(settings.output, (), {"output": str(settings.output), "complete": True})
    return settings
