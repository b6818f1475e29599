"""`streamprune eval`: what a model predicts on held-out text, and how that differs from the original's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamprune.calibration.sequences import Calibration, load_calibration
from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, open_checkpoint, read_json
from streamprune.config import EvalSettings
from streamprune.errors import CalibrationError, SettingsError, UnsupportedModelError
from streamprune.evaluation.held_out import PruneRecord, recipe_within, record_of
from streamprune.evaluation.metrics import Sums, summary_of, sums_by_source
from streamprune.files.durable import reading
from streamprune.formats.pick import refuse_quantized
from streamprune.hardware.device import choose_device, peak_device_bytes
from streamprune.hardware.memory import format_bytes
from streamprune.hardware.memory_plan import MemoryPlan, Needs
from streamprune.models import open as models
from streamprune.models.config import load_config, versions
from streamprune.models.open import OpenedModel
from streamprune.models.per_layer_experts import read_per_layer_experts
from streamprune.output.plan import REPORT_NAME
from streamprune.planning.memory_needs import SUMS_PER_TOKEN, needs_of, plan_memory
from streamprune.progress import Progress
from streamprune.reporting.evaluations import RESULT_FORMAT
from streamprune.reporting.record import public_name
from streamprune.streaming.batches import Runtime
from streamprune.streaming.forward import ORIGINAL, PRUNED
from streamprune.streaming.layer_loop import LayerLoop
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.predictions import SequenceFigures, find_head
from streamprune.streaming.stages import ForwardStage, LayerErrors, LayerTask


def config_folder(model: str, revision: str | None, trust_remote_code: bool) -> Path:
    """A folder with a model's config and tokenizer, and perhaps no more.

    Raises UnsupportedModelError where its config already says that it cannot be streamed.
    """
    folder = resolve_model(model, revision, trust_remote_code, config_only=True)
    raw = read_json(folder / CONFIG_NAME)
    refuse_quantized(raw, folder)
    if read_per_layer_experts(raw) is not None and not trust_remote_code:
        raise UnsupportedModelError(
            f"The layers of {model} keep different numbers of experts, for which it brings its own code. If you trust "
            "its author, add --trust-remote-code."
        )
    return folder


def open_model(settings: EvalSettings, model: str, revision: str | None) -> OpenedModel:
    """Open a model, with or without experts, and make sure that its weights are all there.

    Raises a StreampruneError where they are not, or where its predictions cannot be computed.
    """
    checkpoint = open_checkpoint(resolve_model(model, revision, settings.trust_remote_code))
    opened = models.open_model(checkpoint, settings.trust_remote_code, settings.dtype)
    find_head(opened.skeleton.model)
    return opened


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


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation (`reporting.evaluations` has its form), and the sums of each source.

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
    """Stream a model, and with `against` the original too, over `data`; returns the result. See `examine`."""
    return examine(settings, data, progress).result


def examine(settings: EvalSettings, data: Calibration, progress: Progress) -> Evaluation:
    """Stream a model, and with `against` the original too, over `data`.

    Peak memory: a layer of one of them and the next one, the embeddings, the hidden states of `data`, and a slice of
    the heads. Raises a StreampruneError for whatever cannot work.
    """
    device = choose_device(settings.device)
    settings.check_device(device.type)
    models = _open(settings)
    plan = _plan(settings, models, data, device)
    # Nothing is printed before all is known to be in order: a refusal is one message and no more.
    progress.say(_summary(settings, models, data, device))
    for note in _notes(settings, models, data):
        progress.say(f"note: {note}")
    progress.say(plan.describe())
    errors = LayerErrors(len(data.sources)) if _have_one_shape(models) else None
    with tempfile.TemporaryDirectory(prefix="streamprune-") as folder:
        runtime = Runtime(settings, plan, device, progress, Path(folder))
        stages = [
            ForwardStage(
                LayerWeights(opened, device, runtime.busy, plan.ahead), side, errors=errors if side == PRUNED else None
            )
            for side, opened in models.items()
        ]
        figures = measure(runtime, stages, data, errors)
    sums = sums_by_source(figures, data.sources)
    record = record_of(settings.model)
    held_back = record is not None and record.held_back == data.fingerprint
    head = about(
        public_name(settings.model), settings.against, models[PRUNED], data, held_back, is_source(record, models)
    )
    means = mean_errors(errors, data) if errors is not None else None
    return Evaluation({**head, **summary_of(sums, data.sources, means)}, tuple(sums))


def measure(
    runtime: Runtime,
    stages: Sequence[ForwardStage],
    data: Calibration,
    errors: LayerErrors | None,
    kept: Mapping[int, Sequence[int]] | None = None,
) -> list[SequenceFigures]:
    """Run all layers of one or two models on `data`, with a line for each, and read what they predict.

    `kept` are the experts that stay, by layer, for a stage that prunes. Raises Stopped when the user asks to stop.
    """
    progress = runtime.progress
    with LayerLoop(runtime, stages, data) as loop:
        last = loop.layer_count - 1
        for index in range(loop.layer_count):
            started = time.monotonic()
            task = LayerTask(index, replayed=True, kept=tuple((kept or {}).get(index, ())))
            loop.run_layer(task, index + 1 if index < last else None)
            loop.drop_cached_pages(index)
            error = mean_errors(errors, data)[-1][index:] if errors is not None else []
            shown = f"relative error {error[0]:.4f}, " if error else ""
            seconds, peak = time.monotonic() - started, format_bytes(peak_device_bytes(runtime.device))
            progress.say(f"layer {index}/{last}: {shown}{seconds:.1f} s, peak {peak}")
        progress.say(f"reading off what {'both models predict' if len(stages) == 2 else 'the model predicts'} ...")
        return loop.read_predictions(loop.layer_count)


def mean_errors(errors: LayerErrors, data: Calibration) -> list[list[float]]:
    """The mean relative errors after every layer: a list for each source, and a last one for all together."""
    layers = [errors.by_layer[layer] for layer in sorted(errors.by_layer)]
    by_source = [[layer[source] / tokens for layer in layers] for source, tokens in enumerate(data.tokens_of)]
    return [*by_source, [sum(layer) / data.tokens for layer in layers]]


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


def _have_one_shape(models: Mapping[str, OpenedModel]) -> bool:
    """Whether there are two models, whose hidden states can be compared layer by layer."""
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
    return plan_memory(settings, _combined(needs), 0, device, Path(tempfile.gettempdir()))


def _combined(needs: Sequence[Needs]) -> Needs:
    """What models need that are streamed together: one layer at a time, and everything else of all."""
    largest = max(needs, key=lambda each: each.layer)
    return replace(
        largest,
        reading=max(each.reading for each in needs),
        loading=max(each.loading for each in needs),
        non_layer=sum(each.non_layer for each in needs),
        states=sum(each.states for each in needs) + largest.tokens * SUMS_PER_TOKEN,
        workspace=lambda tokens: max(each.workspace(tokens) for each in needs),
        itemsize=max(each.itemsize for each in needs),
        sides=len(needs),
    )


def _summary(settings: EvalSettings, models: Mapping[str, OpenedModel], data: Calibration, device: torch.device) -> str:
    named = ", ".join(f"{name} ({tokens:,})" for name, tokens in zip(data.sources, data.tokens_of, strict=True))
    against = f" against {settings.against}" if settings.against is not None else ""
    opened = models[PRUNED]
    return (
        f"{settings.model}{against}: {opened.skeleton.layer_count} layers, {vocabulary_of(opened):,} tokens in the "
        f"vocabulary; {len(data.sequences)} sequences, {data.tokens:,} tokens from {named}; "
        f"{str(opened.dtype).removeprefix('torch.')} on {device}"
    )
