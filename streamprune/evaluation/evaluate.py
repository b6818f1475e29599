"""Opening the models of an evaluation: what has to be known of them before anything is computed.

One model, or an original and its pruned one side by side, streamed over text that is only measured on.

`streamprune eval`: what a model predicts on held-out text, and how that differs from the original's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamprune.calibration.sequences import Calibration, MicroBatch, load_calibration
from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, open_checkpoint, read_json
from streamprune.config import EvalSettings
from streamprune.distributed.processes import ALONE
from streamprune.errors import CalibrationError, NonFiniteError, SettingsError, UnsupportedModelError
from streamprune.evaluation.held_out import PruneRecord, recipe_within, record_of
from streamprune.evaluation.metrics import Sums, summary_of, sums_by_source
from streamprune.files.durable import reading
from streamprune.hardware.device import choose_device, peak_device_bytes
from streamprune.hardware.memory import format_bytes
from streamprune.hardware.memory_plan import MemoryPlan, Needs
from streamprune.models.config import declared_dtype, load_config, versions
from streamprune.models.decoder import find_decoder
from streamprune.models.open import OpenedModel, check_fit
from streamprune.models.per_layer_config import read_per_layer_experts
from streamprune.models.skeleton import map_checkpoint
from streamprune.output.writer import REPORT_NAME
from streamprune.planning.memory_needs import SUMS_PER_TOKEN, needs_of, plan_for
from streamprune.planning.prepare import dtype_of_weights
from streamprune.planning.pruning_plan import refuse_quantized
from streamprune.progress import Busy, Progress
from streamprune.reporting.evaluations import RESULT_FORMAT
from streamprune.reporting.record import public_name
from streamprune.streaming.batches import MicroBatches
from streamprune.streaming.forward import ORIGINAL, PRUNED, LayerForward, relative_errors, side_of, with_side
from streamprune.streaming.layer_loader import Weights
from streamprune.streaming.predictions import PredictionReader, SlicedHead, find_head
from streamprune.streaming.scoring import LayerErrors
from streamprune.streaming.states import non_finite_tokens
from streamprune.work.saved_states import BatchState


def config_folder(model: str, revision: str | None, trust_remote_code: bool) -> Path:
    """A folder with a model's config and tokenizer, and perhaps no more.

    Raises UnsupportedModelError where its config already says that it cannot be streamed.
    """
    folder = resolve_model(model, revision, trust_remote_code, config_only=True)
    raw = read_json(folder / CONFIG_NAME)
    refuse_quantized(raw, folder)
    if read_per_layer_experts(raw) is not None and not trust_remote_code:
        raise UnsupportedModelError(
            f"The blocks of {model} keep different numbers of experts, for which it brings its own code. If you trust "
            "who made it, add --trust-remote-code."
        )
    return folder


def open_model(settings: EvalSettings, model: str, revision: str | None) -> OpenedModel:
    """Open a model, with or without experts, and make sure that its weights are all there.

    Raises a StreampruneError where they are not, or where its predictions cannot be computed.
    """
    checkpoint = open_checkpoint(resolve_model(model, revision, settings.trust_remote_code))
    config = load_config(checkpoint.folder, settings.trust_remote_code)
    dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else declared_dtype(config)
    if dtype is None:
        dtype = dtype_of_weights(checkpoint)
    decoder = find_decoder(config, dtype, settings.trust_remote_code)
    find_head(decoder.model)
    targets = map_checkpoint(decoder.model, checkpoint.tensors)
    check_fit(decoder, targets, checkpoint.tensors)
    return OpenedModel(checkpoint, decoder, targets, dtype)


def check_comparable(model: OpenedModel, original: OpenedModel, settings: EvalSettings) -> None:
    """Raise SettingsError unless two models' predictions are about the same tokens."""
    ours, theirs = (vocabulary_of(opened) for opened in (model, original))
    if ours != theirs:
        raise SettingsError(
            f"{settings.model} predicts {ours:,} tokens and {settings.against} {theirs:,}: only models with the same "
            "vocabulary can be compared. Is --against the model that it was made from?"
        )


def same_tokenizer(original: Path, model: Path) -> bool:
    """Whether two models' tokenizers are the same file, as far as both have one."""
    files = [folder / "tokenizer.json" for folder in (model, original)]
    with reading(files[0]):
        return not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes()


def vocabulary_of(opened: OpenedModel) -> int:
    """How many tokens a model predicts."""
    head, _ = find_head(opened.skeleton.model)
    return int(head.weight.shape[0])


#: Gives, for the index of a block, the sides that have such a block: what runs it, and the loaded block.
Modules = Callable[[int], Iterator[tuple[str, LayerForward, nn.Module]]]


class EvaluationForward:
    """Sends all micro-batches through block after block of one or two models.

    Peak memory: a block of one of them at a time, and the hidden states of both. With `compare`, where the two are of
    one shape, `errors` are how far they are from each other behind every block.
    """

    def __init__(
        self, modules: Modules, batches: MicroBatches, device: torch.device, sources: int, compare: bool
    ) -> None:
        self._modules, self._batches, self._device, self._compare = modules, batches, device, compare
        self.errors = LayerErrors(sources)

    def run_layer(self, index: int) -> None:
        """Send everything through block `index`. Raises NonFiniteError where a state is no number any more."""
        for side, stream, block in self._modules(index):
            self._pass(index, side, stream, block, self._compare and side == PRUNED)
        if self._compare:
            self.errors.end_layer(index, ALONE)

    def _pass(self, index: int, side: str, stream: LayerForward, block: nn.Module, compare: bool) -> None:
        unchecked: list[tuple[int, int, torch.Tensor]] = []
        sums: list[torch.Tensor] = []

        def compute(number: int, batch: MicroBatch, state: BatchState) -> BatchState:
            ids = batch.ids.to(self._device, non_blocking=True)
            after = stream.run_layer(index, block, ids, side_of(state, side))
            both = with_side(state, side, after)
            unchecked.append((number, ids.numel(), non_finite_tokens(after)))
            sums[:] = [relative_errors(both, ids.numel()).sum()] if compare else []
            return both

        def commit(done: int, batch: MicroBatch) -> None:
            for each in sums:
                self.errors.add(batch.source, each)

        self._batches.run(index, compute, commit)
        for number, tokens, count in unchecked:
            if int(count):
                raise NonFiniteError(
                    f"Block {index} of the {side} model, batch {number}: {int(count)} of {tokens} tokens have NaN or "
                    "infinite states. Try --dtype float32 or bfloat16, and check that the model itself works."
                )


def of_checkpoints(sides: Mapping[str, Weights], blocks: Mapping[str, int]) -> Modules:
    """The blocks of models in checkpoints of their own, loaded one at a time; the following one is read meanwhile."""
    order = [(index, side) for index in range(max(blocks.values())) for side in sides if index < blocks[side]]

    def modules(index: int) -> Iterator[tuple[str, LayerForward, nn.Module]]:
        for place, (block, side) in enumerate(order):
            if block != index:
                continue
            with sides[side].block(index, None) as (_, module):
                for following, other in order[place + 1 : place + 2]:
                    sides[other].read_ahead(following)
                yield side, sides[side].stream, module
            sides[side].loader.drop_cached_pages(index)

    return modules


def of_choice(weights: Weights, kept: Mapping[int, Sequence[int]], twin: Callable[[int, int], nn.Module]) -> Modules:
    """The blocks of a checkpoint as they are, and with only the experts `kept`; `twin` gives such a block on meta."""
    count = len(weights.loader.decoder.blocks)

    def modules(index: int) -> Iterator[tuple[str, LayerForward, nn.Module]]:
        with weights.block(index, index + 1 if index + 1 < count else None) as (stack, block):
            yield ORIGINAL, weights.stream, block
            experts = kept.get(index)
            if experts is not None:
                meta, whole = twin(index, len(experts)), block
                block = weights.enter(
                    stack,
                    lambda: weights.loader.pruned_layer(index, whole, meta, experts),
                    f"a copy of block {index} with the experts that stay",
                )
            yield PRUNED, weights.stream, block
        weights.loader.drop_cached_pages(index)

    return modules


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation: the result (`reporting.evaluations` has its form), and the sums of each source.

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
        blocks = {side: opened.skeleton.layer_count for side, opened in models.items()}
        compare = _are_of_one_shape(models)
        stream = EvaluationForward(of_checkpoints(sides, blocks), batches, device, len(data.sources), compare)
        stream_all(stream, len(models), max(blocks.values()), data, device, progress)
        progress.say("reading off what they predict ..." if len(sides) == 2 else "reading off what it predicts ...")
        heads = {side: SlicedHead(weights.loader, weights.stream) for side, weights in sides.items()}
        found = PredictionReader(sides[PRUNED], heads, plan, device, progress).read_off(max(blocks.values()))
    errors = mean_errors(stream.errors, data) if compare else None
    sums = sums_by_source(found, data.sources)
    record = record_of(settings.model)
    held_back = record is not None and record.held_back == data.fingerprint
    known = is_source(record, models)
    head = about(public_name(settings.model), settings.against, models[PRUNED], data, held_back, known)
    return Evaluation({**head, **summary_of(sums, data.sources, errors)}, tuple(sums))


def stream_all(
    stream: EvaluationForward, sides: int, blocks: int, data: Calibration, device: torch.device, progress: Progress
) -> None:
    """Run all blocks of one or two models (`sides`), with a line for each."""
    for index in range(blocks):
        started = time.monotonic()
        progress.start(f"block {index + 1}/{blocks}", sides * len(data.sequences))
        stream.run_layer(index)
        error = mean_errors(stream.errors, data)[-1][index:]
        far = f"relative error {error[0]:.4f}, " if error else ""
        seconds, peak = time.monotonic() - started, format_bytes(peak_device_bytes(device))
        progress.say(f"block {index + 1}/{blocks}: {far}{seconds:.1f} s, peak {peak}")


def mean_errors(errors: LayerErrors, data: Calibration) -> list[list[float]]:
    """The mean relative errors behind every block: those of each source, and behind these those of all together."""
    blocks = [errors.whole[block] for block in sorted(errors.whole)]
    told = [[block[source] / tokens for block in blocks] for source, tokens in enumerate(data.tokens_of)]
    return [*told, [sum(block) / data.tokens for block in blocks]]


def about(
    model: str | None,
    against: str | None,
    opened: OpenedModel,
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


def _open(settings: EvalSettings) -> Mapping[str, OpenedModel]:
    """The models by side, the original first."""
    if settings.against is None:
        return {PRUNED: open_model(settings, settings.model, settings.revision)}
    config_folder(settings.against, settings.against_revision, settings.trust_remote_code)
    original = open_model(settings, settings.against, settings.against_revision)
    model = open_model(settings, settings.model, settings.revision)
    check_comparable(model, original, settings)
    return {ORIGINAL: original, PRUNED: model}


def _are_of_one_shape(models: Mapping[str, OpenedModel]) -> bool:
    """Whether the hidden states of two models can be compared block by block."""
    shapes = {
        (opened.skeleton.layer_count, opened.skeleton.model.config.get_text_config(decoder=True).hidden_size)
        for opened in models.values()
    }
    return len(models) == 2 and len(shapes) == 1


def is_source(record: PruneRecord | None, models: Mapping[str, OpenedModel]) -> bool | None:
    """Whether the original is what the model was made from, by that one's record; None where there is none."""
    if record is None or record.source is None or ORIGINAL not in models:
        return None
    return record.source == models[ORIGINAL].checkpoint.fingerprint()


def _notes(settings: EvalSettings, models: Mapping[str, OpenedModel], data: Calibration) -> Iterator[str]:
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


def _plan(
    settings: EvalSettings, models: Mapping[str, OpenedModel], data: Calibration, device: torch.device
) -> MemoryPlan:
    needs = [needs_of(opened, data, opened.skeleton.layer_count) for opened in models.values()]
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


def _words(settings: EvalSettings, models: Mapping[str, OpenedModel], data: Calibration, device: torch.device) -> str:
    named = ", ".join(f"{name} ({tokens:,})" for name, tokens in zip(data.sources, data.tokens_of, strict=True))
    against = f" against {settings.against}" if settings.against is not None else ""
    opened = models[PRUNED]
    return (
        f"{settings.model}{against}: {opened.skeleton.layer_count} blocks, {vocabulary_of(opened):,} tokens in the "
        f"vocabulary; {len(data.sequences)} sequences, {data.tokens:,} tokens from {named}; "
        f"{str(opened.dtype).removeprefix('torch.')} on {device}"
    )
