"""The same command again, where its output is in place: compared with what the command would make, checked, and kept.

A command may be killed after its output has its name and before it has said so. No torch, unless bytes are verified.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from streamprune.checkpoint.index import open_checkpoint
from streamprune.common_settings import OutputSettings
from streamprune.config import RunSettings
from streamprune.errors import CheckpointError, OutputError, ReportError, VerifyError
from streamprune.files.durable import checksum_of
from streamprune.files.json_text import differences
from streamprune.output.plan import REPORT_NAME
from streamprune.output.verify import verify
from streamprune.output.writer import check_output
from streamprune.pipeline.finish import RunResult, SelectionResult
from streamprune.pipeline.status import is_complete, is_there, remove_leftovers
from streamprune.progress import Progress
from streamprune.reporting.evaluations import TEXT_NAME, read_result, results_folder
from streamprune.reporting.make_record import make_record
from streamprune.reporting.record import damage, read_record

#: Differences that a refusal names.
_MOST_NAMED = 6
#: What decides an output: where one of these differs, the rest follows from it.
_FIRST = ("source", "settings", "calibration", "use")


def may_be_finished(settings: OutputSettings) -> bool:
    """Whether something is in the output's place that may be what the command makes.

    With --overwrite that is to be replaced, unless its work folder says that it is the result of a command that was
    killed just then.
    """
    if settings.overwrite:
        return is_complete(settings.work_folder, settings.output)
    return is_there(settings.output)


def repeated(
    decided: SelectionResult, progress: Progress, versions: Mapping[str, str] | None = None
) -> RunResult | None:
    """The result of the same command, whose output is in place; None if it is to be replaced by another.

    `versions` are those of the software that would compute it now. Raises OutputError, naming the differences, if the
    output was made otherwise, and VerifyError if it was damaged since.
    """
    settings = decided.settings
    output = settings.output
    try:
        record = to_builtins(read_record(output))
    except ReportError as error:
        refuse_other(settings, decided.checkpoint.folder, [str(error)])
        return None
    found = list(_record_differences(decided, record)) or list(_lost_files(decided, record))
    if found:
        refuse_other(settings, decided.checkpoint.folder, found)
        return None
    progress.say(f"{output} is finished already: it was made with these settings, from this model and this text.")
    print_versions(progress, record["versions"], versions)
    _check(decided, progress)
    remove_leftovers(settings)
    estimate = decided.facts.estimate(str(output), decided.plan, settings, decided.counts, open_checkpoint(output))
    summary = {**decided.summary(estimate, progress.seconds), "complete": True}
    if isinstance(settings, RunSettings) and settings.evaluate:
        summary["evaluation"] = read_result(results_folder(output), TEXT_NAME)
    return RunResult(output, decided.selection.layers, summary)


def refuse_other(settings: OutputSettings, source: Path, found: list[str]) -> None:
    """Raise OutputError for an output that was made otherwise, which `found` says; nothing if it may be replaced."""
    try:
        check_output(settings.output, source, settings.overwrite)
    except OutputError as error:
        raise OutputError(f"{error}{made_otherwise(found)}") from None


def made_otherwise(found: list[str]) -> str:
    """How an output that is in the way differs, as the end of a refusal."""
    shown = [f"  {line}" for line in found[:_MOST_NAMED]]
    if len(found) > _MOST_NAMED:
        shown.append(f"  and {len(found) - _MOST_NAMED:,} more")
    return "\nIt is not what this command makes:\n" + "\n".join(shown)


def difference_lines(found: Any, wanted: Any, where: str = "") -> Iterator[str]:
    """Where an output's JSON differs from what the command would write."""
    for path, ours, theirs in differences(found, wanted, where):
        yield f"{path}: {_short(ours)} there, {_short(theirs)} now"


def _short(value: str) -> str:
    """A value of a record for people: the start of a SHA-256, anything else as it is."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", value)


def print_versions(progress: Progress, then: Mapping[str, Any], now: Mapping[str, str] | None) -> None:
    """Print which versions have changed since an output was made."""
    pairs = [(name, str(then.get(name)), str(value)) for name, value in (now or {}).items()]
    changed = [f"{name} {before}, now {after}" for name, before, after in pairs if before != after]
    if changed:
        progress.say(f"note: it was made by other versions: {'; '.join(changed)}. To make it again, add --overwrite.")


def _record_differences(decided: SelectionResult, record: Mapping[str, Any]) -> Iterator[str]:
    settings, use = decided.settings, decided.use
    wanted = make_record(decided.provenance, decided.selection, decided.plan, decided.counts, settings, use)
    now = _comparable(json.loads(json.dumps(to_builtins(wanted))))
    then = _comparable(record)
    for name, text in (("refit", decided.refit), ("rounding", decided.rounding)):
        if text is not None:
            now[name] = {**to_builtins(text), "layers": None}
        if then.get(name):
            then[name] = {**then[name], "layers": None}
    if decided.imatrix is not None:
        planned = decided.imatrix
        now["imatrix"] = {"file": planned.path.name, "sequences": planned.text.sequences, "tokens": planned.tokens}
    if then.get("imatrix"):
        then["imatrix"] = {name: then["imatrix"][name] for name in ("file", "sequences", "tokens")}
    deciding = [line for name in _FIRST for line in difference_lines(then.get(name), now.get(name), name)]
    yield from deciding
    if not deciding:
        for name in sorted((now.keys() | then.keys()) - set(_FIRST)):
            yield from difference_lines(then.get(name), now.get(name), name)


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what follows from the rest, and without what does not change the output."""
    kept = {name: value for name, value in record.items() if name not in ("computed", "versions", "format")}
    free = ("device", "batch_tokens")
    return {**kept, "settings": {name: each for name, each in record["settings"].items() if name not in free}}


def _lost_files(decided: SelectionResult, record: Mapping[str, Any]) -> Iterator[str]:
    """What the command makes and is not there, or may not be there: the importance matrix, a KL within --stop-if-kl."""
    settings = decided.settings
    if decided.imatrix is not None and checksum_of(decided.imatrix.path) != record["imatrix"]["sha256"]:
        yield f"{decided.imatrix.path} is missing, or is not the importance matrix that was made with it"
    if not isinstance(settings, RunSettings) or not settings.evaluate:
        return
    try:
        result = read_result(results_folder(settings.output), TEXT_NAME) or {}
    except CheckpointError as error:
        yield str(error)
        return
    if not result:
        yield "it was not measured on held-out text, as --evaluate does"
    data, total = result.get("data"), result.get("all")
    held_back = isinstance(data, Mapping) and data.get("held_back") is True
    kl, most = total.get("kl") if isinstance(total, Mapping) else None, settings.stop_if_kl
    if most is not None and held_back and isinstance(kl, float) and kl > most:
        yield f"its KL divergence is {kl:.3g} nats per token, above --stop-if-kl {most:g}"


def _check(decided: SelectionResult, progress: Progress) -> None:
    """Verify the output as the command would have, and print how. Raises VerifyError."""
    settings, output = decided.settings, decided.settings.output
    again = f"{output} was damaged since it was made. To make it again, add --overwrite."
    try:
        if settings.verify:
            progress.say("comparing its tensors with the source ...")
            proof = verify(output, decided.checkpoint.folder, settings.trust_remote_code)
            progress.say(f"verified: {proof.text}")
            return
        planned = {each.name: (each.dtype, each.shape) for each in decided.plan.tensors}
        found = {each.name: (each.dtype, each.shape) for each in open_checkpoint(output).tensors.values()}
        if found != planned:
            raise VerifyError(f"{output} does not have the tensors that its {REPORT_NAME} says.")
        progress.say("its files are complete; --verify would compare their bytes with the source's.")
    except VerifyError as error:
        raise VerifyError(f"{error} {again}") from None
    except CheckpointError as error:
        raise VerifyError(f"{damage(error)}. {again}") from None
