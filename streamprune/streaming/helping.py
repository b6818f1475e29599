"""A process that helps another with a run: it does what it is ordered to with its share of the micro-batches."""

from __future__ import annotations

from pathlib import Path
from tempfile import gettempdir
from typing import Any

from streamprune.decision import decide_as
from streamprune.errors import OtherProcessError, ProcessesError, ResumeError, StreampruneError, ToldElsewhereError
from streamprune.machine import choose_device
from streamprune.memory.needs import plan_memory
from streamprune.prepare import Prepared, chooser_of, prepare
from streamprune.progress import Progress
from streamprune.streaming.batches import Stopped
from streamprune.streaming.orders import End, Fared, Job, Order, SavedElsewhere, agree
from streamprune.streaming.scoring import BlockScorer
from streamprune.together.joining import name_of
from streamprune.together.processes import Processes
from streamprune.work.resume import versions
from streamprune.work.stop import StopRequest, listening


def follow(processes: Processes) -> Any:
    """Help the first process for as long as it goes on; returns what it says came of it."""
    with listening() as stop:
        # A request to stop is the first process's to answer.
        stop.patient = True
        message: Any = processes.same(None)
        if isinstance(message, Job):
            try:
                message = _help(processes, message, stop)
            except ToldElsewhereError:
                raise
            except StreampruneError as error:
                processes.fail()
                raise OtherProcessError(f"{name_of(processes)}: {error}", error.exit_code) from error
    if message.status:
        raise ToldElsewhereError(message.status)
    return message.result


def _help(processes: Processes, job: Job, stop: StopRequest) -> End:
    settings, calibration = job.settings, job.calibration
    device = choose_device(settings.device, processes.local_rank)
    settings.check_device(device.type)
    prepared = prepare(settings, decide_as(settings, job.quota, job.counts))
    _check_alike(job, prepared)
    # On another machine the work folder need not be there, and nothing that has a name is written anyway.
    folder = settings.work_folder if settings.work_folder.is_dir() else Path(gettempdir())
    plan = plan_memory(settings, prepared, calibration, device, folder, processes)
    plan = agree(processes, calibration, plan)
    chooser = chooser_of(settings, prepared, calibration)
    with (
        Progress(prepared.layout.block_count, quiet=True) as progress,
        BlockScorer(
            settings, prepared, calibration, plan, device, progress, folder, chooser, stop, processes
        ) as scorer,
    ):
        last = _obey(processes, scorer, stop)
    # With nothing in memory any more, wait for what comes of it.
    end: Any = last if isinstance(last, End) else processes.same(None)
    assert isinstance(end, End)
    return end


def _obey(processes: Processes, scorer: BlockScorer, stop: StopRequest) -> End | Order:
    """Do what is ordered until there is nothing left for the scorer to do; returns what was said then."""
    told, restored = 0, False
    while True:
        order: Any = processes.same(None)
        if isinstance(order, End) or order.step == "rest":
            assert isinstance(order, (End, Order))
            return order
        try:
            _take_step(scorer, order)
        except Stopped:
            continue
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if not restored:
                raise
            # As in `Sitting`: whole, but of shapes that this model's blocks do not take.
            raise ResumeError(f"The hidden states that were saved do not go with this model: {error}") from error
        restored = order.step == "restore"
        if processes.local_rank == 0 and order.step in ("score", "replay"):
            # On a machine without the first process, which does so on its own.
            scorer.leave_no_pages(order.block)
        processes.collect(Fared(bool(stop), scorer.batch_tokens, tuple(scorer.shrinks[told:])))
        told = len(scorer.shrinks)


def _take_step(scorer: BlockScorer, order: Order) -> None:
    match order:
        case Order("score", block):
            scorer.score_block(block)
        case Order("replay", block, kept):
            scorer.replay_block(block, kept)
        case Order("read_off", block):
            scorer.read_off(block)
        case Order("save"):
            scorer.save(None)
        case Order("restore", saved=SavedElsewhere() as saved):
            scorer.restore(saved)


def _check_alike(job: Job, prepared: Prepared) -> None:
    """Refuse to help with another model or other libraries than the first process has, on another machine."""
    if prepared.checkpoint.fingerprint() != job.fingerprint:
        raise ProcessesError(
            f"{job.settings.model} is another model here than where the first process runs: its files differ. Copy "
            "them, or name a --revision."
        )
    here = versions()
    for name, there in job.versions.items():
        if here[name] != there:
            raise ProcessesError(f"{name} is {here[name]} here and {there} where the first process runs. Install one.")
