"""The run: plan it, stream the blocks, write the output, tell the user."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamprune.decision import decide, estimate_of_written, with_footprint
from streamprune.errors import InterruptedRunError, OutputError, ResumeError
from streamprune.fit.footprint import read_headers
from streamprune.fit.report import estimate_object
from streamprune.machine import check_disk, choose_device, describe_host, existing_folder, format_bytes
from streamprune.memory.needs import plan_memory
from streamprune.output.card import model_card
from streamprune.output.record import run_report, run_summary
from streamprune.output.writer import OutputWriter
from streamprune.prepare import Prepared, calibrate, prepare
from streamprune.progress import Progress
from streamprune.settings import RunSettings, beside
from streamprune.source.hub import resolve_model
from streamprune.streaming.scoring import BlockScorer, LayerResult
from streamprune.streaming.sitting import Sitting
from streamprune.tell import (
    announce_calibration,
    announce_model,
    announce_plan,
    announce_work,
    tell_memory,
    tell_result,
)
from streamprune.text.calibration import Calibration
from streamprune.work.disk_errors import writing
from streamprune.work.folder import WorkFolder, resume_command
from streamprune.work.resume import calibration_of, check_same, describe_run, settings_of
from streamprune.work.run_record import RUN_NAMES, has_run, read_run
from streamprune.work.status import clean_up, is_complete
from streamprune.work.stop import StopRequest, listening

#: The log's name is the output's with this behind it. (OUT.log may well be where the user sends our messages.)
LOG_SUFFIX = ".streamprune.log"


@dataclass(frozen=True)
class RunResult:
    """A finished run. `summary` is what `--json` prints."""

    output: Path
    layers: tuple[LayerResult, ...]
    summary: Mapping[str, Any]


def run(settings: RunSettings, quiet: bool = False) -> RunResult:
    """Prune a model: read, score and write one block after the other, going on where an earlier run stopped.

    Once a block is finished, the work folder stays whatever this raises, so that nothing done is lost.
    """
    return _run(settings, quiet, None)


def resume(work_folder: Path, quiet: bool = False, **changes: Any) -> RunResult:
    """Go on with the run recorded in a work folder. `changes` are settings that may differ: device, caps and the like.

    Raises ResumeError when there is none, or when what decides the result has changed.
    """
    recorded = read_run(work_folder)
    if recorded is None:
        raise ResumeError(
            f"{work_folder} holds no run that could be resumed. A run that has been started keeps one in OUT.work."
        )
    settings = replace(settings_of(recorded, work_folder), work_dir=work_folder.absolute(), **changes)
    if settings.trust_remote_code and "trust_remote_code" not in changes:
        raise ResumeError(
            f"The run in {work_folder} was begun with --trust-remote-code, but a file's word is not enough to run a "
            "model's code. If you began it, and trust the author still, add --trust-remote-code."
        )
    if is_complete(work_folder, recorded):
        # It ended between the output's getting its name and this folder's removal.
        clean_up(work_folder, everything=True)
        return RunResult(settings.output, (), {"output": str(settings.output), "complete": True})
    return _run(settings, quiet, recorded)


def _run(settings: RunSettings, quiet: bool, recorded: Mapping[str, Any] | None) -> RunResult:
    device = _device(settings)
    prepared = prepare(settings)
    with Progress(prepared.plan.block_count, quiet) as progress, ExitStack() as stack:
        work = _enter_work(stack, settings)
        resumable = has_run(work.folder)
        stop = stack.enter_context(listening())
        try:
            result = _work_on(settings, prepared, device, progress, work, recorded is not None, stop)
        except BaseException as error:
            # What is done is kept; what holds nothing is not left lying about.
            if not work.has_progress():
                if not (isinstance(error, ResumeError) and resumable):
                    work.remove()
            elif isinstance(error, KeyboardInterrupt):
                raise InterruptedRunError(
                    f"Stopped as asked; all that is done is saved. Go on with: {resume_command(work.folder)}"
                ) from None
            elif not isinstance(error, InterruptedRunError):
                # (Which says so itself.)
                progress.say(f"note: what is done is kept; go on with: {resume_command(work.folder)}")
            raise
        work.remove()
        shutil.rmtree(settings.folder_beside, ignore_errors=True)
    return result


def _enter_work(stack: ExitStack, settings: RunSettings) -> WorkFolder:
    """Hold the work folder, and what keeps others off the output if that is somewhere else."""
    with writing(f"Looking for {settings.work_folder}", settings.work_folder):
        home, output = settings.work_folder.resolve(), settings.output.resolve()
        elsewhere = home != settings.folder_beside.resolve()
    if home == output or home in output.parents or output in home.parents:
        raise OutputError(f"The work folder {home} and the output {output} must not be, or contain, one another.")
    if elsewhere:
        beside = stack.enter_context(WorkFolder(settings.folder_beside))
        stack.callback(lambda: None if beside.has_progress() else beside.remove())
    return stack.enter_context(WorkFolder(settings.work_folder))


def _work_on(
    settings: RunSettings,
    prepared: Prepared,
    device: torch.device,
    progress: Progress,
    work: WorkFolder,
    tokens_recorded: bool,
    stop: StopRequest,
) -> RunResult:
    writer = OutputWriter(prepared.plan, prepared.checkpoint, settings, work)
    recorded = begin(settings, work)
    announce_model(progress, settings, prepared)
    if recorded is not None and tokens_recorded:
        calibration = calibration_of(recorded, work.read_tokens(), work.folder, prepared.vocab_size)
    else:
        calibration = calibrate(settings, prepared)
    announce_calibration(progress, settings, prepared, calibration, device)
    if recorded is not None and settings.batch_tokens is None:
        # The same micro-batches, so that the same digits come out.
        settings = replace(settings, batch_tokens=recorded["batch_tokens"])
    memory = plan_memory(settings, prepared, calibration, device, work.folder)
    progress.say(memory.describe())
    now = describe_run(settings, prepared, calibration) | {"batch_tokens": memory.batch_tokens}
    if recorded is not None:
        check_same(recorded, now, work.folder)
    else:
        announce_work(progress, settings, prepared, memory, work)
        work.write_run(now, [sequence.tolist() for sequence in calibration.sequences])
    stop.patient = True
    with BlockScorer(settings, prepared, calibration, memory, device, progress, work.folder, stop) as scorer:
        layers = Sitting(settings, prepared, scorer, writer, work, progress, stop).stream(device)
    stop.patient = False
    work.forget_states()
    return _complete(settings, prepared, calibration, layers, scorer, device, progress, writer)


def _complete(
    settings: RunSettings,
    prepared: Prepared,
    calibration: Calibration,
    layers: Sequence[LayerResult],
    scorer: BlockScorer,
    device: torch.device,
    progress: Progress,
    writer: OutputWriter,
) -> RunResult:
    """Check what was written, give it its name, and tell the user."""
    if settings.verify:
        # Of a large model this takes minutes.
        progress.say("comparing what was written with the source ...")
        proof = writer.verify({layer.index: layer.kept for layer in layers})
        progress.say(
            f"verified: {proof.tensors:,} tensors, {format_bytes(proof.nbytes)}, identical to the source's bytes"
        )
    report = run_report(settings, prepared, calibration, layers, device, scorer.batch_tokens)
    estimate = estimate_of_written(settings, prepared.decision, prepared.plan.config, writer.headers())
    writer.finish(report, model_card(prepared.plan, report, prepared.checkpoint, estimate))
    # The output is complete from here on, whatever happens to the log or the terminal.
    summary = run_summary(settings, prepared, calibration, layers, scorer, progress.seconds)
    summary["memory"] = estimate_object(estimate) if estimate else None
    progress.log("summary", {**summary, "host": describe_host(device)})
    progress.write_log(beside(settings.output, LOG_SUFFIX))
    tell_result(progress, settings, summary, calibration)
    if estimate is not None:
        tell_memory(progress, estimate)
    return RunResult(settings.output, tuple(layers), summary)


def begin(settings: RunSettings, work: WorkFolder) -> dict[str, Any] | None:
    """What is recorded of an earlier run that is to be taken up; None to begin anew, with nothing of it left."""
    recorded = work.read_run() if settings.resume != "never" else None
    if recorded is not None and settings.resume == "auto" and not work.has_progress():
        # Nothing is lost, so that nothing has to agree with it.
        recorded = None
    elif recorded is None and settings.resume != "never" and work.has_progress():
        raise ResumeError(
            f"{work.folder / RUN_NAMES[0]} is missing or damaged, and so is its copy, so that nobody knows which run "
            "the finished blocks beside it are from. Begin anew with --resume never."
        )
    if recorded is None:
        if settings.resume == "required":
            raise ResumeError(
                f"{work.folder} holds no run that could be resumed. Leave out --resume required to begin one."
            )
        work.start_afresh()
    return recorded


def dry_run(settings: RunSettings, quiet: bool = False) -> dict[str, Any]:
    """Decide and tell what `run` would do, from config and headers alone. Downloads and writes nothing large.

    Returns what `--dry-run --json` prints. Raises like `run`, also where the disk is too small for the output.
    """
    _device(settings)
    decision = decide(settings)
    if decision.footprint is None:
        folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, config_only=True)
        decision = with_footprint(settings, decision, decision.skeleton, read_headers(settings.model, folder))
    estimate = decision.estimate(settings)
    with Progress(decision.skeleton.block_count, quiet) as progress:
        announce_plan(progress, settings, decision, estimate)
        progress.say("dry run: nothing was scored or written")
    if estimate is not None:
        check_disk(settings.output, estimate.weights_bytes)
    return {
        "model": settings.model,
        "output": str(settings.output),
        "experts_per_layer": decision.keep,
        "source_experts_per_layer": decision.skeleton.spec.count,
        "memory": estimate_object(estimate) if estimate else None,
    }


def score(settings: RunSettings, prepared: Prepared, quiet: bool = False) -> list[LayerResult]:
    """Only score: the layers' results as `run` would have them, with nothing written."""
    device = _device(settings)
    with Progress(prepared.plan.block_count, quiet) as progress:
        calibration = calibrate(settings, prepared)
        folder = existing_folder(settings.output)
        memory = plan_memory(settings, prepared, calibration, device, folder)
        with BlockScorer(settings, prepared, calibration, memory, device, progress, folder) as scorer:
            results = [scorer.score_block(index) for index in range(prepared.plan.moe_blocks[-1] + 1)]
    return [layer for layer in results if layer is not None]


def _device(settings: RunSettings) -> torch.device:
    device = choose_device(settings.device)
    settings.check_device(device.type)
    return device
