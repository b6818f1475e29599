"""Whether an interrupted run may be resumed: everything that decides the result must be as it was.

Where scores come from, as it is kept with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from streamprune.calibration.sequences import Calibration, fingerprint_of
from streamprune.config import RunSettings
from streamprune.errors import ResumeError
from streamprune.files.durable import reading
from streamprune.files.json_text import show
from streamprune.models.config import versions
from streamprune.planning.prepare import PreparedModel
from streamprune.reporting.record import public_name
from streamprune.work.folder import resume_command
from streamprune.work.records import RUN_FORMAT, command_of, file_states, has_pruning, read_run, settings_from

#: Settings that do not change the result, or whose effect is recorded in another way (the calibration by its tokens, a
#: budget by the number of experts that it gave).
FREE_SETTINGS = {
    "output", "work_dir", "device", "batch_tokens", "states", "vram_gib", "ram_gib", "overwrite", "resume",
    "checkpoint_every", "from_layer", "verify", "stop_if_kl", "calibration", "budget_gib", "gpu", "keep", "ratio",
    "context", "batch", "kv_dtype",
}  # fmt: skip


def describe_run(settings: RunSettings, prepared: PreparedModel, calibration: Calibration) -> dict[str, Any]:
    """All that decides the result of a run, as JSON, and the command that began it."""
    counts = prepared.plan.counts
    with reading(prepared.checkpoint.folder):
        source = prepared.checkpoint.fingerprint()
    return {
        "format": RUN_FORMAT,
        "command": command_of(settings),
        "settings": {name: value for name, value in command_of(settings).items() if name not in FREE_SETTINGS}
        | {"experts kept": _kept(prepared), "computed in": str(prepared.dtype)},
        "source": source,
        "files": file_states(prepared.checkpoint),
        "calibration": {
            "fingerprint": calibration.fingerprint,
            "sequences": len(calibration.sequences),
            "tokens": calibration.tokens,
            "sources": list(calibration.sources),
            "source_of": list(calibration.source_of),
            "notes": list(calibration.notes),
            "recipe": dict(calibration.recipe),
        },
        "versions": versions(),
        "layers": prepared.layout.layer_count,
        "budget_bytes": counts.budget.nbytes if counts and counts.budget else None,
    }


def _kept(prepared: PreparedModel) -> str:
    """How many experts stay, in words, as compared and shown."""
    counts = prepared.plan.counts
    if counts is None:
        return "none removed"
    if counts.keep is not None:
        return f"{counts.keep} per layer"
    listed = f": {', '.join(map(str, counts.per_layer.values()))}" if counts.per_layer else ""
    return f"{counts.total} in all{listed}"


def run_to_resume(work: Path) -> dict[str, Any]:
    """What is recorded of the run in a work folder. Raises ResumeError if there is none."""
    recorded = read_run(work)
    if recorded is None:
        if has_pruning(work):
            raise ResumeError(
                f"{work} holds no run, but what `streamprune prune` began. Go on with: {resume_command(work)}"
            )
        raise ResumeError(
            f"{work} holds no run that could be resumed. A run that has been started keeps one in OUT.work."
        )
    return recorded


def settings_of(run: Mapping[str, Any], work: Path) -> RunSettings:
    """The settings of a recorded run, to go on with it in `work`. Raises ResumeError if they make no sense."""
    changes: dict[str, Any] = {"resume": "required", "from_layer": None}
    # A budget counts as it was then: free GPU memory changes.
    if run["budget_bytes"] is not None:
        changes |= {"budget_gib": run["budget_bytes"] / 2**30, "gpu": None}
    return settings_from(RunSettings, run["command"], work, **changes)


def calibration_of(run: Mapping[str, Any], tokens: list[list[int]], work: Path, vocab_size: int) -> Calibration:
    """The recorded calibration. Raises ResumeError unless it is the one that the run began with."""
    recorded = run["calibration"]
    source_of, sources = tuple(recorded["source_of"]), tuple(recorded["sources"])
    sound = bool(tokens) and all(
        isinstance(sequence, list)
        and sequence
        and all(type(token) is int and 0 <= token < vocab_size for token in sequence)
        for sequence in tokens
    )
    sound = sound and len(source_of) == len(tokens) and all(source < len(sources) for source in source_of)
    sequences = tuple(torch.tensor(sequence, dtype=torch.int64) for sequence in tokens) if sound else ()
    if not sound or fingerprint_of(sequences, source_of) != recorded["fingerprint"]:
        raise ResumeError(f"The calibration tokens in {work} are not those that the run began with. Was it changed?")
    fingerprint, notes = recorded["fingerprint"], tuple(recorded["notes"])
    return Calibration(sequences, sources, source_of, fingerprint, notes, recorded["recipe"])


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], work: Path) -> None:
    """Raise ResumeError, naming every difference, unless the run recorded `before` may go on as `now`."""
    found = list(_differences(before, now))
    if found:
        raise ResumeError(
            f"The run in {work} cannot be taken up, because it would not give the same result:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nUndo the changes, or give up what is done and begin anew with --resume never."
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before.get("format") != now["format"]:
        yield f"it was recorded in format {before.get('format')}; this version writes {now['format']}"
        return
    for part in ("settings", "versions"):
        for name in sorted(before[part].keys() | now[part].keys()):
            old, new = before[part].get(name), now[part].get(name)
            if old != new:
                yield f"{name.replace('_', '-')}: {_show(old)} then, {_show(new)} now"
    for file in sorted(before["files"].keys() | now["files"].keys()):
        old, new = before["files"].get(file), now["files"].get(file)
        if old != new:
            yield f"model file {file}: {_file(old)} then, {_file(new)} now"
    if before["source"] != now["source"] and before["files"] == now["files"]:
        yield "the model's contents: another fingerprint, though its files have the same sizes and times"
    old, new = before["calibration"], now["calibration"]
    if old["fingerprint"] != new["fingerprint"]:
        yield f"calibration: {old['tokens']:,} tokens then, {new['tokens']:,} now, and not the same ones"


def _show(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) and len(value) < 200 else show(value)


def _file(state: list[int] | None) -> str:
    return "missing" if state is None else f"{state[0]:,} bytes, changed at {state[1] / 1e9:.3f}"


def _held_back(held: Calibration | None) -> dict[str, Any]:
    if held is None:
        return {}
    facts = {"sequences": len(held.sequences), "tokens": held.tokens, "fingerprint": held.fingerprint}
    return {"held_back": facts}


def provenance_of(
    settings: RunSettings, prepared: PreparedModel, calibration: Calibration, device: torch.device, batch_tokens: int
) -> dict[str, Any]:
    """What decided the scores of a run, as JSON. Nothing in it is about which experts stay."""
    return {
        "model": public_name(settings.model),
        "revision": settings.revision,
        "source": {"fingerprint": prepared.checkpoint.fingerprint(), "bytes": prepared.checkpoint.nbytes},
        "settings": {
            "propagate": settings.propagate,
            "dtype": str(prepared.dtype).removeprefix("torch."),
            "device": device.type,
            "batch_tokens": batch_tokens,
        },
        "calibration": {
            "sources": [
                {"name": name, "tokens": tokens}
                for name, tokens in zip(calibration.sources, calibration.tokens_of, strict=True)
            ],
            "sequences": len(calibration.sequences),
            "tokens": calibration.tokens,
            "fingerprint": calibration.fingerprint,
            "recipe": dict(calibration.recipe),
            **_held_back(calibration.held_out),
        },
        "versions": versions(),
    }
