"""`streamprune prune`: an output from scores that were taken before, or from the user's own list. No forward pass.

With scores, neither torch nor transformers is needed: they tell where in the checkpoint the experts lie.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune import __version__
from streamprune.choice.choose import Choice, ChosenLayer, choose_kept
from streamprune.choice.chooser import Chooser, selection_of
from streamprune.choice.keep_file import read_keep_file
from streamprune.errors import InterruptedRunError, OutputError, ResumeError, ScoresError
from streamprune.fit.estimate import Footprint
from streamprune.fit.footprint import read_footprint
from streamprune.fit.report import estimate_object, terms_lines
from streamprune.machine import check_disk, format_bytes
from streamprune.model_facts import ModelFacts, facts_from_json
from streamprune.output.finish import Decided, complete, summary_of, tell_choice, write_blocks
from streamprune.output.plan import make_plan
from streamprune.output.record import check_provenance, public_name
from streamprune.output.writer import OutputWriter, check_output, check_place
from streamprune.progress import Progress
from streamprune.quota import Quota, find_quota, kept_text
from streamprune.scores.file import read_scores
from streamprune.scores.scores import Scores
from streamprune.settings import PruneSettings
from streamprune.source.checkpoint import Checkpoint, open_checkpoint
from streamprune.source.hub import resolve_model
from streamprune.source.shard import show
from streamprune.work.durable import read_record, write_record
from streamprune.work.enter import enter_work
from streamprune.work.folder import PRUNING_NAME, WorkFolder
from streamprune.work.journal import MOST_RECORD_BYTES
from streamprune.work.run_record import has_run
from streamprune.work.stop import listening

_AGAIN = "the same command again"


@dataclass(frozen=True)
class PruneResult:
    """A finished output. `summary` is what `--json` prints."""

    output: Path
    layers: tuple[ChosenLayer, ...]
    summary: Mapping[str, Any]


def prune(settings: PruneSettings, quiet: bool = False) -> PruneResult:
    """Write the model that the settings choose, going on where an earlier call was interrupted.

    Takes the time of a file copy, and memory for a few MiB of a file at a time, beside the scores. Raises a
    StreampruneError for whatever cannot work, before anything is written.
    """
    scores = read_scores(settings.scores) if settings.scores is not None else None
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code)
    check_output(settings.output, folder, settings.overwrite)
    checkpoint = open_checkpoint(folder)
    decided = _decide(settings, checkpoint, scores)
    plan = decided.plan
    with Progress(plan.layout.block_count, quiet) as progress, ExitStack() as stack:
        progress.say(
            f"{settings.model}: {plan.layout.block_count} blocks, {len(plan.counts)} with {plan.layout.spec.count} "
            f"experts; keeping {kept_text(decided.quota, plan.layout.spec.count, plan.counts)}"
        )
        if scores is not None and scores.provenance["settings"]["propagate"] == "pruned":
            progress.say(
                "note: these scores were taken with --propagate pruned: after the first block with experts they hold "
                "for that run's choice only."
            )
        tell_choice(decided, progress)
        progress.say(f"weights: {format_bytes(checkpoint.nbytes)} -> {format_bytes(plan.output_bytes)}")
        check_disk(settings.work_folder, plan.output_bytes)
        work = enter_work(stack, settings)
        check_place(settings)
        stop = stack.enter_context(listening())
        _begin(settings, decided, work)
        writer = OutputWriter(plan, checkpoint, settings, work)
        stop.patient = True
        try:
            write_blocks(decided, writer, work, progress, stop, _AGAIN)
        except KeyboardInterrupt:
            raise InterruptedRunError(f"Stopped as asked; what is written is kept. Go on with: {_AGAIN}") from None
        stop.patient = False
        estimate = complete(decided, writer, work, progress)
        told = estimate_object(estimate) if estimate else None
        summary = summary_of(decided, told, progress.seconds)
        work.remove()
        shutil.rmtree(settings.folder_beside, ignore_errors=True)
        progress.say(
            f"done in {summary['seconds']:.0f} s: {settings.output}, {format_bytes(plan.output_bytes)} of weights "
            f"(source: {format_bytes(checkpoint.nbytes)})"
        )
        for line in terms_lines(estimate) if estimate else ():
            progress.say(line)
    return PruneResult(settings.output, decided.choice.layers, summary)


def _decide(settings: PruneSettings, checkpoint: Checkpoint, scores: Scores | None) -> Decided:
    """Everything that is decided before a byte is written."""
    facts = _facts(settings, checkpoint, scores)
    layout, selection = facts.layout, selection_of(settings)
    provenance: Mapping[str, Any] = scores.provenance if scores else _by_hand(settings, checkpoint)
    if settings.keep_file is not None:
        choice = _listed(settings, facts, scores)
        quota = Quota(sum(choice.counts), len(choice.counts), choice.is_uniform)
    else:
        assert scores is not None  # PruneSettings has seen to it

        def footprint() -> Footprint:
            return facts.footprint or read_footprint(settings.model, settings.revision, settings.trust_remote_code)

        quota, planned = find_quota(settings, layout.spec, layout.moe_blocks, footprint)
        chooser = Chooser(
            selection, layout.spec, layout.moe_blocks, quota.total, planned, scores.sources, scores.source_tokens
        )
        choice = chooser.all(scores.layers)
    plan = make_plan(layout, facts.loading, checkpoint, choice.counts_by_block, settings.max_shard_bytes)
    by = selection if settings.keep_file is None else None
    return Decided(settings, checkpoint, facts, by, quota, choice, plan, provenance, scores)


def _facts(settings: PruneSettings, checkpoint: Checkpoint, scores: Scores | None) -> ModelFacts:
    """What has to be known of the model: told by the scores, else found by building it."""
    if scores is not None:
        check_provenance(scores.provenance)
        scored, here = scores.provenance["source"]["fingerprint"], checkpoint.fingerprint()
        if scored != here:
            raise ScoresError(
                f"{settings.scores} holds the scores of {show(scores.provenance['model'])} with the fingerprint "
                f"{scored[:12]}…, but {checkpoint.folder} has {here[:12]}…. Give the very model that was scored, or "
                "score this one."
            )
        if scores.layout is not None:
            return facts_from_json(scores.layout, scores.spec, settings.model, checkpoint.tensors)
    # Only here: it takes torch and transformers, and seconds.
    from streamprune.prepare import facts_of_checkpoint

    return facts_of_checkpoint(settings.model, checkpoint, settings.trust_remote_code)


def _listed(settings: PruneSettings, facts: ModelFacts, scores: Scores | None) -> Choice:
    """The user's own choice, with the experts' scores if there are any."""
    assert settings.keep_file is not None
    kept = read_keep_file(settings.keep_file, facts.layout.spec, facts.layout.moe_blocks)
    if scores is None:
        return Choice(tuple(ChosenLayer(block, experts, (), ()) for block, experts in sorted(kept.items())))
    return choose_kept(scores.layers, scores.sources, scores.source_tokens, selection_of(settings), kept)


def _by_hand(settings: PruneSettings, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The provenance of a choice that rests on no scores."""
    return {
        "model": public_name(settings.model),
        "revision": settings.revision,
        "source": {"fingerprint": checkpoint.fingerprint(), "bytes": checkpoint.nbytes},
        "settings": {},
        "calibration": None,
        "versions": {"streamprune": __version__},
    }


def _begin(settings: PruneSettings, decided: Decided, work: WorkFolder) -> None:
    """Take up what an earlier call left in the work folder if it is of the same choice; else begin anew."""
    if has_run(work.folder) and settings.resume != "never":
        raise ResumeError(
            f"{work.folder} holds an unfinished run. Go on with it, give it up with `streamprune clean --all`, or add "
            "--resume never."
        )
    now = {
        "source": decided.provenance["source"]["fingerprint"],
        "kept": {str(layer.block): list(layer.kept) for layer in decided.choice.layers},
        "max_shard_bytes": settings.max_shard_bytes,
    }
    path = work.folder / PRUNING_NAME
    before = read_record(path, MOST_RECORD_BYTES) if settings.resume != "never" else None
    if before == now:
        return
    if settings.resume == "required":
        raise ResumeError(f"{work.folder} holds nothing of this choice that could be taken up.")
    if work.keeps_old_output() and before is None:
        raise OutputError(f"{work.folder} holds an old output. Move it where you want it, then prune again.")
    work.start_afresh()
    write_record(path, now)
