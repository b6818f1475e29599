"""The last steps of `run` and `prune`, and of `score`: write, verify and record the output, and rename it to its path.

No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec import structs, to_builtins

from streamprune.checkpoint.index import Checkpoint
from streamprune.common_settings import OutputSettings
from streamprune.config import PruneSettings, RunSettings
from streamprune.errors import InterruptedRunError, VerifyError
from streamprune.files.durable import kill_point, sync_folder, writing
from streamprune.files.names import sibling_path
from streamprune.fit.answer import estimate_object
from streamprune.fit.engines import refusal
from streamprune.fit.estimate import Estimate
from streamprune.formats.base import KeptExperts
from streamprune.hardware.memory import check_disk, existing_folder, format_bytes
from streamprune.output.plan import PrunePlan
from streamprune.output.search_folder import SEARCH_NAME
from streamprune.output.verify import check_formats
from streamprune.output.writer import OutputWriter
from streamprune.pipeline.best_results import noted_results
from streamprune.pipeline.imatrix import PlannedImatrix, write_imatrix
from streamprune.pipeline.printing import budget_text, print_channel_bytes, print_memory
from streamprune.planning.counts import ExpertCounts
from streamprune.planning.facts import ModelFacts
from streamprune.progress import Progress
from streamprune.reporting.card import model_card
from streamprune.reporting.evaluations import TEXT_NAME, results_folder, write_result
from streamprune.reporting.make_record import make_record
from streamprune.reporting.record import Record
from streamprune.reporting.record_computed import LayerRefit, LayerRounding, RecordedRefit, RecordedRounding
from streamprune.reporting.summary import gguf_commands
from streamprune.saliency.scores import LayerStatistics, Scores
from streamprune.saliency.scores_file import SCORES_FOLDER, SCORES_NAME, check_scores_file, write_scores
from streamprune.selection.energy import energy_retentions
from streamprune.selection.retention import Retention, retention_warnings, retentions
from streamprune.selection.select import LayerSelection, Selection
from streamprune.selection.settings import token_shares
from streamprune.targets import ServingSpec
from streamprune.work.enter import StopRequest
from streamprune.work.folder import WorkFolder, resume_command
from streamprune.work.layer_records import FinishedShard

#: Suffix of the file with the scores of a run that --stop-if-kl ended, or without a possible selection; next to OUT.
SCORES_SUFFIX = ".scores.safetensors"


@dataclass(frozen=True)
class RunResult:
    """A finished command. `layers` is empty if it only scored; `summary` is what `--json` prints."""

    output: Path
    layers: tuple[LayerSelection, ...]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class SelectionResult:
    """Everything that is decided about an output: the source model, which experts stay, and the files to write.

    `scores` is None for the user's own selection without scores. `refit` says to what text the down projections are
    refitted, and `rounding` by what text matrices are rounded, None if they are not; the layers of both are in the work
    folder. `imatrix` is the importance matrix to be written, if any.
    """

    settings: RunSettings | PruneSettings
    checkpoint: Checkpoint
    facts: ModelFacts
    counts: ExpertCounts
    selection: Selection
    plan: PrunePlan
    provenance: Mapping[str, Any]
    scores: Scores | None
    refit: RecordedRefit | None = None
    rounding: RecordedRounding | None = None
    imatrix: PlannedImatrix | None = None

    @cached_property
    def retained(self) -> tuple[Retention, ...]:
        """How much saliency of each calibration source the selection keeps; empty without scores."""
        return retentions(self.scores, self.selection) if self.scores is not None else ()

    @cached_property
    def energy(self) -> tuple[Retention, ...]:
        """How much energy of the channels each source keeps; empty unless experts become narrower."""
        return energy_retentions(self.scores, self.selection) if self.scores is not None else ()

    @property
    def _removes_experts(self) -> bool:
        return sum(self.selection.counts) < self.plan.layout.spec.count * len(self.selection.counts)

    @property
    def use(self) -> ServingSpec:
        """How the output is to be used."""
        return self.facts.serving(self.settings, self.checkpoint.config)

    @property
    def layers(self) -> Iterator[int | None]:
        """None for the weights outside the layers, then every layer's index, in the order in which they are written."""
        yield None
        yield from self.plan.layout.written_layers

    @property
    def stays(self) -> Mapping[int, KeptExperts]:
        """What stays of the experts by layer, the MTP layer included."""
        return self.plan.layout.with_mtp(self.selection.stays)

    def record_layer(self, work: WorkFolder, index: int | None, kept: KeptExperts, shards: list[FinishedShard]) -> None:
        """Record a layer's scores, experts and shards in the work folder (None: the weights outside the layers)."""
        work.write_layer(index, self._statistics.get(index), kept, shards)

    @cached_property
    def _statistics(self) -> dict[int | None, LayerStatistics]:
        return {layer.index: layer for layer in self.scores.every} if self.scores is not None else {}

    def print_retention(self, progress: Progress) -> None:
        """Print how much saliency of each source the selection keeps, with warnings where that is little.

        Where all experts stay, so does all of their saliency, which is not said. For narrower experts it is the energy
        of their channels that tells what is lost.
        """
        if self.scores is None or not self.retained:
            return
        shown = []
        if self._removes_experts:
            shown.append(("domain retention, the share of each source's saliency kept", self.retained))
        if self.energy:
            shown.append(("energy kept, the share of each source's energy of all channels", self.energy))
        for title, found in shown:
            kept = ", ".join(f"{each.source} {each.kept:.1%} ({each.best:.1%})" for each in found)
            progress.say(f"{title} (in brackets: if selected for that source alone): {kept}")
        settings, shares = self.selection.settings, None
        if settings is not None:
            shares = token_shares(settings.mix, self.scores.sources, self.scores.source_tokens)
        for warning in retention_warnings(self.energy or self.retained, shares, bool(self.energy)):
            progress.say(f"warning: {warning}")

    def print_serving_notes(self, progress: Progress) -> None:
        """Print what to know of the selected experts before the output is served."""
        for note in self.plan.notes_for(self.stays):
            progress.say(f"note: {note}")
        if self.plan.left_plain:
            plain = "; ".join(f"{number:,} {reason}" for reason, number in self.plan.left_plain.items())
            progress.say(f"{self.plan.quantized_matrices:,} matrices are quantized; these stay plain: {plain}")

    def summary(self, estimate: Estimate | None, seconds: float) -> dict[str, Any]:
        """What `--json` prints of an output, except how the scores were made."""
        counts = list(self.plan.counts.values())
        return {
            "output": str(self.settings.output),
            "model": self.settings.model,
            "experts_per_layer": counts[0] if len(set(counts)) == 1 else counts,
            "experts_in_all_layers": sum(counts),
            "source_experts_per_layer": self.plan.layout.spec.count,
            "moe_layers": len(counts),
            "source_bytes": self.checkpoint.nbytes,
            "output_bytes": self.plan.output_bytes,
            "never_routed": [
                {"layer": layer.index, "experts": layer.tokens.count(0)}
                for layer in self.selection.every
                if 0 in layer.tokens
            ],
            "domain_retention": _shares_object(self.retained),
            **self._width_object(),
            "dropped_tensors": len(self.plan.layout.dropped),
            "mtp_tensors": len(self.plan.layout.mtp),
            **({"formats": list(self.plan.formats)} if self.plan.formats else {}),
            **({"imatrix": str(self.imatrix.path)} if self.imatrix is not None else {}),
            # A difference would have raised an error.
            "verified": self.settings.verify,
            "seconds": round(seconds, 3),
            "memory": estimate_object(estimate) if estimate is not None else None,
        }

    def _width_object(self) -> dict[str, Any]:
        """What `--json` prints of narrower experts; nothing where they keep their width."""
        if self.counts.width is None:
            return {}
        energy = _shares_object(self.energy)
        return {"width": self.counts.width, "source_width": self.counts.full_width, "energy_kept": energy}


def _shares_object(found: Sequence[Retention]) -> dict[str, Any]:
    return {each.source: {"kept": round(each.kept, 6), "best": round(each.best, 6)} for each in found}


def check_room(settings: OutputSettings, work: WorkFolder, in_work: int, output: int) -> None:
    """Raise ResourceError unless the disks have room for so many bytes in the work folder and of the output."""
    check_disk(work.folder, in_work)
    if existing_folder(settings.output).stat().st_dev != work.folder.stat().st_dev:
        # The finished output is copied there.
        check_disk(settings.output, output)


def write_layers(
    decided: SelectionResult, writer: OutputWriter, work: WorkFolder, progress: Progress, stop: StopRequest
) -> None:
    """Write and record the weights outside the layers and every layer, unless they have been written before.

    Raises InterruptedRunError when the user stops the command; finished work is kept.
    """
    for index in decided.layers:
        _check_stop(stop, work)
        kept = decided.stays.get(index, KeptExperts()) if index is not None else KeptExperts()
        name = "weights outside the layers" if index is None else progress.name_of(index)
        record = work.read_layer(index)
        if record is not None and record.shards:
            # For tens of GiB this takes a while without output.
            progress.say(f"resuming: checking the written files of {name} ...")
            if writer.has_written(index, kept, record):
                continue
        decided.record_layer(work, index, kept, writer.write_layer(index, kept))
        if kept.experts:
            counts = decided.counts
            each = f" of {counts.width}/{counts.full_width} channels" if kept.channels is not None else ""
            progress.say(f"{name}: written with {len(kept.experts)}/{decided.facts.layout.spec.count} experts{each}")
    _check_stop(stop, work)


def _check_stop(stop: StopRequest, work: WorkFolder) -> None:
    if stop:
        raise InterruptedRunError(
            f"Stopped on request. All finished work is saved. Resume with: {resume_command(work.folder)}"
        )


def complete(
    decided: SelectionResult,
    writer: OutputWriter,
    work: WorkFolder,
    progress: Progress,
    evaluation: Mapping[str, Any] | None = None,
) -> Estimate | None:
    """Verify the written shards, add record and model card, and rename the work folder's files to the output.

    `evaluation` is the result on held-out text. Returns the memory that the model takes; None if it is unknown.
    """
    settings, plan, kept = decided.settings, decided.plan, decided.stays
    noted = noted_results(settings)
    # Everything in the staging folder becomes the output.
    work.remove_other_shards(shard.file for shard in plan.shards)
    if settings.verify:
        _compare(decided, writer, work, progress)
    entries, config = writer.headers(), plan.config_for(kept)
    if settings.verify:
        check_formats(plan, kept, work.staging, entries, config)
    if decided.scores is not None:
        # (A run that drops the MTP layer does not score it: then the scores are the same.)
        scores = decided.scores if plan.layout.mtp_layer is not None else replace(decided.scores, mtp=None)
        write_scores(work.staging / SCORES_FOLDER / SCORES_NAME, scores)
    results = {**noted, **({TEXT_NAME: evaluation} if evaluation is not None else {})}
    for name, result in results.items():
        write_result(results_folder(work.staging), name, result)
    record = _complete_record(decided, work, progress)
    output = Checkpoint(work.staging, config, entries)
    estimate = decided.facts.estimate(str(settings.output), plan, settings, decided.counts, output)
    kept_of_sources = (decided.retained, decided.energy)
    searched = SEARCH_NAME in results or (settings.scores is not None and (settings.scores / SEARCH_NAME).is_file())
    card = model_card(plan, record, decided.checkpoint, estimate, kept_of_sources, searched)
    writer.finish(kept, to_builtins(record), card)
    return estimate


def _compare(decided: SelectionResult, writer: OutputWriter, work: WorkFolder, progress: Progress) -> None:
    """Compare the written tensors with the source. Raises VerifyError for a difference; the layers are written anew."""
    if not writer.has_proven(decided.stays):
        # Shards from before an interruption. For a large model this takes minutes.
        progress.say("comparing the written tensors with the source ...")
    try:
        proof = writer.verify(decided.stays)
    except VerifyError:
        # The records of written shards are no longer valid; the statistics of the experts are not affected.
        for index in decided.layers:
            written = work.read_layer(index)
            if written is not None and written.need_text:
                # Nor can its tensors be computed again without the text.
                work.forget_layer(index)
            else:
                decided.record_layer(work, index, KeptExperts(), [])
        raise
    progress.say(f"verified: {proof.text}")


def _complete_record(decided: SelectionResult, work: WorkFolder, progress: Progress) -> Record:
    """The record, with what was computed in each layer; writes the importance matrix, if there is one."""
    settings, names = decided.settings, set(decided.facts.layout.ignored)
    record = make_record(decided.provenance, decided.selection, decided.plan, decided.counts, settings, decided.use)
    ignored = sum(entry.nbytes for name, entry in decided.checkpoint.tensors.items() if name in names)
    if ignored:
        record = structs.replace(record, source=structs.replace(record.source, ignored=ignored))
    if decided.refit is not None:
        record = structs.replace(record, refit=structs.replace(decided.refit, layers=_refitted_layers(decided, work)))
    if decided.rounding is not None:
        rounding = structs.replace(decided.rounding, layers=_rounded_layers(decided, work))
        record = structs.replace(record, rounding=rounding)
    if decided.imatrix is not None:
        # Before the output gets its name, which ends the run.
        layers = decided.facts.layout.layer_count
        record = structs.replace(record, imatrix=write_imatrix(decided.imatrix, layers, work, progress))
    return record


def _refitted_layers(decided: SelectionResult, work: WorkFolder) -> list[LayerRefit]:
    records = {index: work.read_layer(index) for index in decided.facts.layout.expert_layers}
    return [
        LayerRefit(index=index, **structs.asdict(record.refit))
        for index, record in records.items()
        if record is not None and record.refit is not None
    ]


def _rounded_layers(decided: SelectionResult, work: WorkFolder) -> list[LayerRounding]:
    records = {index: work.read_layer(index) for index in range(decided.facts.layout.layer_count)}
    return [
        LayerRounding(index=index, **structs.asdict(record.rounded))
        for index, record in records.items()
        if record is not None and record.rounded is not None
    ]


def print_result(
    progress: Progress, decided: SelectionResult, summary: Mapping[str, Any], estimate: Estimate | None
) -> None:
    """Print that the output is complete, and warn of experts to which no calibration token was routed."""
    if summary["never_routed"] and decided.selection.settings is not None and decided.scores is not None:
        where = ", ".join(f"layer {item['layer']}: {item['experts']}" for item in summary["never_routed"])
        progress.say(
            f"warning: none of the {decided.scores.tokens:,} calibration tokens was routed to some experts ({where}). "
            "These were removed first, although their importance is unknown. Calibrate on more or on other text: "
            "--calibration, --samples."
        )
    progress.say(
        f"done in {summary['seconds']:.0f} s: {summary['output']}, {format_bytes(summary['output_bytes'])} of weights "
        f"(source: {format_bytes(summary['source_bytes'])})"
    )
    if isinstance(decided.settings, RunSettings) and decided.scores is not None:
        path = decided.settings.output / SCORES_FOLDER / SCORES_NAME
        progress.say(f"scores, for `streamprune prune`: {path}, {format_bytes(path.stat().st_size)}")
        print_channel_bytes(progress, decided.scores)
    if estimate is None:
        return
    if isinstance(decided.settings, RunSettings):
        # The plan had the table.
        low, high = map(format_bytes, estimate.interval)
        total = f"{format_bytes(estimate.total)} ({low} to {high})"
        progress.say(
            f"memory in use, as planned above, by the weights that were written: {total}{budget_text(estimate)}"
        )
    else:
        print_memory(progress, estimate)
    if decided.settings.gguf is not None:
        _print_gguf(progress, decided, decided.settings.gguf)


def _print_gguf(progress: Progress, decided: SelectionResult, gguf: str) -> None:
    """Print the commands of llama.cpp that make and serve the quantized model, or why it does not take it."""
    served = decided.counts.served
    assert served is not None, "what is planned was compared with the rules of the engines"
    why_not = refusal(replace(served, counts=tuple(sorted(set(decided.plan.counts.values())))), "llama.cpp")
    if why_not:
        progress.say(f"warning: llama.cpp cannot make {gguf} of it: {why_not}")
        return
    output, matrix = decided.settings.output, decided.imatrix.path if decided.imatrix is not None else None
    progress.say(f"Next, for {gguf}, with llama.cpp:")
    for command in gguf_commands(decided.plan.config, decided.use, output, str(output), matrix):
        progress.say(f"  {command}")


def save_scores(settings: OutputSettings, scores: Scores) -> Path:
    """Save the scores of a run next to its output, for another selection; returns the file."""
    path = sibling_path(settings.output, SCORES_SUFFIX)
    write_scores(path, scores)
    return path


def complete_scores(settings: OutputSettings, checkpoint: Checkpoint, scores: Scores, work: WorkFolder) -> None:
    """Write the scores file in the work folder next to the output, then rename it to the output.

    So the output is complete or absent. Raises ScoresError, OutputError and ResourceError.
    """
    complete_file = settings.output_work_folder / SCORES_NAME
    write_scores(complete_file, scores)
    with writing(f"Completing {settings.output}", settings.output):
        # Hours may have passed: do not replace an output that was created meanwhile.
        check_scores_file(settings.output, checkpoint.folder, settings.overwrite)
        work.record_complete(complete_file)
        kill_point("scores written")
        complete_file.rename(settings.output)
        kill_point("output renamed")
        sync_folder(settings.output.absolute().parent)
