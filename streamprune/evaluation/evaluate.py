"""`streamprune eval`: what a model predicts on held-out text, and how that differs from the original's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamprune.busy import Busy
from streamprune.errors import CalibrationError
from streamprune.evaluation.held_out import recipe_within
from streamprune.evaluation.made_by_us import MadeByUs, record_of
from streamprune.evaluation.opening import (
    check_comparable,
    config_folder,
    open_model,
    same_tokenizer,
    vocabulary_of,
)
from streamprune.evaluation.settings import EvalSettings
from streamprune.evaluation.stream import ExaminedStream, of_checkpoints
from streamprune.evaluation.summary import Sums, summary_of, sums_by_source
from streamprune.machine import choose_device, format_bytes, peak_device_bytes
from streamprune.memory.needs import SUMS_PER_TOKEN, needs_of, plan_for
from streamprune.memory.plan import MemoryPlan, Needs
from streamprune.output.writer import REPORT_NAME
from streamprune.progress import Progress
from streamprune.result.evaluations import RESULT_FORMAT
from streamprune.result.record import public_name
from streamprune.source.architecture import load_config
from streamprune.source.hub import resolve_model
from streamprune.source.opened import Opened
from streamprune.streaming.batches import MicroBatches
from streamprune.streaming.block_errors import BlockErrors
from streamprune.streaming.examining import Examiner
from streamprune.streaming.head import SlicedHead
from streamprune.streaming.pairs import ORIGINAL, PRUNED
from streamprune.streaming.weights import Weights
from streamprune.text.calibration import Calibration, load_calibration
from streamprune.work.resume import versions


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation: the result (`result.evaluations` has its form), and the sums of each source.

    With those of another model on the same text the difference of the two has an interval of its own (`combined`).
    """

    result: dict[str, Any]
    sums: tuple[Sums, ...]


def read_data(settings: EvalSettings) -> Calibration:
    """The text of an evaluation, as tokens of the model's own tokenizer; nothing large is downloaded for it.

    Raises CalibrationError where a source has no sequence of two tokens: nothing could be predicted there.
    """
    config_folder(settings.model, settings.revision, settings.trust_remote_code)
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, tokenizer_only=True)
    text_config = load_config(folder, settings.trust_remote_code).get_text_config(decoder=True)
    data = load_calibration(
        [recipe_within(name) for name in settings.data],
        folder,
        samples=settings.samples,
        seq_len=settings.seq_len,
        seed=settings.seed,
        vocab_size=text_config.vocab_size,
        max_positions=getattr(text_config, "max_position_embeddings", None),
        trust_remote_code=settings.trust_remote_code,
    )
    return long_enough(data)


def long_enough(data: Calibration) -> Calibration:
    """The data without sequences of one token, of which nothing can be predicted.

    Raises CalibrationError for a source that has no others.
    """
    pairs = [(ids, source) for ids, source in zip(data.sequences, data.source_of, strict=True) if len(ids) > 1]
    for number, name in enumerate(data.sources):
        if all(source != number for _, source in pairs):
            raise CalibrationError(f"{name} has no sequence of two tokens or more, so that nothing can be predicted.")
    return replace(data, sequences=tuple(ids for ids, _ in pairs), source_of=tuple(source for _, source in pairs))


def evaluate(settings: EvalSettings, data: Calibration, progress: Progress) -> dict[str, Any]:
    """Stream a model, and with `against` the original beside it, over `data`; returns the result. See `examine`."""
    return examine(settings, data, progress).result


def examine(settings: EvalSettings, data: Calibration, progress: Progress) -> Evaluation:
    """Stream a model, and with `against` the original beside it, over `data`.

    Peak memory: a block of one of them and the next one, the embeddings, the hidden states of `data`, and a slice of
    the heads. Raises a StreampruneError for whatever cannot work.
    """
    device = choose_device(settings.device)
    settings.check_device(device.type)
    models = _open(settings)
    plan = _plan(settings, models, data, device)
    # Nothing is told before all is known to be in order: a refusal is one message and no more.
    progress.say(_words(settings, models, data, device))
    for note in _notes(settings, models, data):
        progress.say(f"note: {note}")
    progress.say(plan.describe())
    busy = Busy()
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="streamprune-") as folder:
        sides = {}
        for side, opened in models.items():
            sides[side] = Weights(opened, device, busy, plan.ahead)
            stack.callback(sides[side].close)

        def spare() -> bool:
            freed = [weights.spare() for weights in sides.values()]
            return any(freed)

        batches = MicroBatches(settings, data, plan, device, progress, Path(folder), busy=busy, spare=spare)
        stack.callback(batches.close)
        for weights in sides.values():
            weights.batches = batches
            weights.load_surroundings()
        blocks = {side: opened.skeleton.block_count for side, opened in models.items()}
        compare = _are_of_one_shape(models)
        stream = ExaminedStream(of_checkpoints(sides, blocks), batches, device, len(data.sources), compare)
        stream_all(stream, len(models), max(blocks.values()), data, device, progress)
        progress.say("reading off what they predict ..." if len(sides) == 2 else "reading off what it predicts ...")
        heads = {side: SlicedHead(weights.loader, weights.stream) for side, weights in sides.items()}
        found = Examiner(sides[PRUNED], heads, plan, device, progress).read_off(max(blocks.values()))
    errors = mean_errors(stream.errors, data) if compare else None
    sums = sums_by_source(found, data.sources)
    record = record_of(settings.model)
    held_back = record is not None and record.held_back == data.fingerprint
    known = is_source(record, models)
    head = about(public_name(settings.model), settings.against, models[PRUNED], data, held_back, known)
    return Evaluation({**head, **summary_of(sums, data.sources, errors)}, tuple(sums))


def stream_all(
    stream: ExaminedStream, sides: int, blocks: int, data: Calibration, device: torch.device, progress: Progress
) -> None:
    """Run all blocks of one or two models (`sides`), with a line for each."""
    for index in range(blocks):
        started = time.monotonic()
        progress.start(f"block {index + 1}/{blocks}", sides * len(data.sequences))
        stream.run_block(index)
        error = mean_errors(stream.errors, data)[-1][index:]
        far = f"relative error {error[0]:.4f}, " if error else ""
        seconds, peak = time.monotonic() - started, format_bytes(peak_device_bytes(device))
        progress.say(f"block {index + 1}/{blocks}: {far}{seconds:.1f} s, peak {peak}")


def mean_errors(errors: BlockErrors, data: Calibration) -> list[list[float]]:
    """The mean relative errors behind every block: those of each source, and behind these those of all together."""
    blocks = [errors.whole[block] for block in sorted(errors.whole)]
    told = [[block[source] / tokens for block in blocks] for source, tokens in enumerate(data.tokens_of)]
    return [*told, [sum(block) / data.tokens for block in blocks]]


def about(
    model: str | None,
    against: str | None,
    opened: Opened,
    data: Calibration,
    held_back: bool,
    against_source: bool | None,
) -> dict[str, Any]:
    """What a result is about: the head of its JSON.

    `held_back`: the text is what the run that made the model held back. `against_source`: the original is what the
    model was made from (None where nobody knows).
    """
    return {
        "format": RESULT_FORMAT,
        "model": model,
        "against": public_name(against) if against is not None else None,
        "against_source": against_source,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "data": {
            "fingerprint": data.fingerprint,
            "held_back": held_back,
            "sequences": len(data.sequences),
            "tokens": data.tokens,
            "recipe": dict(data.recipe),
        },
        "versions": versions(),
    }


def _open(settings: EvalSettings) -> Mapping[str, Opened]:
    """The models by side, the original first."""
    if settings.against is None:
        return {PRUNED: open_model(settings, settings.model, settings.revision)}
    config_folder(settings.against, settings.against_revision, settings.trust_remote_code)
    original = open_model(settings, settings.against, settings.against_revision)
    model = open_model(settings, settings.model, settings.revision)
    check_comparable(model, original, settings)
    return {ORIGINAL: original, PRUNED: model}


def _are_of_one_shape(models: Mapping[str, Opened]) -> bool:
    """Whether the hidden states of two models can be compared block by block."""
    shapes = {
        (opened.skeleton.block_count, opened.skeleton.model.config.get_text_config(decoder=True).hidden_size)
        for opened in models.values()
    }
    return len(models) == 2 and len(shapes) == 1


def is_source(record: MadeByUs | None, models: Mapping[str, Opened]) -> bool | None:
    """Whether the original is what the model was made from, by that one's record; None where there is none."""
    if record is None or record.source is None or ORIGINAL not in models:
        return None
    return record.source == models[ORIGINAL].checkpoint.fingerprint()


def _notes(settings: EvalSettings, models: Mapping[str, Opened], data: Calibration) -> Iterator[str]:
    yield from data.notes
    if is_source(record_of(settings.model), models) is False:
        yield (
            f"{settings.against} is not what {settings.model} was made from, by the fingerprint in its {REPORT_NAME}: "
            "the differences are not those that pruning made."
        )
    if len(models) == 2 and not same_tokenizer(*(opened.checkpoint.folder for opened in models.values())):
        yield (
            f"The tokenizers of {settings.model} and {settings.against} differ; the text is in tokens of the first, "
            "which may mean other things to the second."
        )


def _plan(settings: EvalSettings, models: Mapping[str, Opened], data: Calibration, device: torch.device) -> MemoryPlan:
    needs = [needs_of(opened, data, opened.skeleton.block_count) for opened in models.values()]
    return plan_for(settings, _together(needs), 0, device, Path(tempfile.gettempdir()))


def _together(needs: Sequence[Needs]) -> Needs:
    """What models need that are streamed side by side: one block at a time, and everything else of all."""
    largest = max(needs, key=lambda each: each.block)
    return replace(
        largest,
        reading=max(each.reading for each in needs),
        loading=max(each.loading for each in needs),
        surroundings=sum(each.surroundings for each in needs),
        states=sum(each.states for each in needs) + largest.tokens * SUMS_PER_TOKEN,
        workspace=lambda tokens: max(each.workspace(tokens) for each in needs),
        itemsize=max(each.itemsize for each in needs),
        sides=len(needs),
    )


def _words(settings: EvalSettings, models: Mapping[str, Opened], data: Calibration, device: torch.device) -> str:
    named = ", ".join(f"{name} ({tokens:,})" for name, tokens in zip(data.sources, data.tokens_of, strict=True))
    against = f" against {settings.against}" if settings.against is not None else ""
    opened = models[PRUNED]
    return (
        f"{settings.model}{against}: {opened.skeleton.block_count} blocks, {vocabulary_of(opened):,} tokens in the "
        f"vocabulary; {len(data.sequences)} sequences, {data.tokens:,} tokens from {named}; "
        f"{str(opened.dtype).removeprefix('torch.')} on {device}"
    )
