"""`streamprune eval`: a model's loss on held-out text, and how its predictions differ from the original's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamprune.calibration.sequences import Calibration, load_calibration, with_date
from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, open_checkpoint, read_json
from streamprune.config import EvalSettings
from streamprune.errors import CalibrationError, SettingsError, UnsupportedModelError
from streamprune.evaluation.held_out import held_back_fingerprint, held_out_recipe, read_record_of, recipe_within
from streamprune.evaluation.metrics import Sums, summary_of, sums_by_source
from streamprune.files.durable import reading
from streamprune.formats.base import KeptExperts
from streamprune.formats.pick import refuse_quantized
from streamprune.hardware.device import choose_device, peak_device_bytes
from streamprune.hardware.memory import format_bytes
from streamprune.hardware.memory_plan import Needs
from streamprune.models.open import OpenedModel, dtype_note, load_config, open_model, versions
from streamprune.models.per_layer_experts import read_per_layer_experts
from streamprune.output.plan import REPORT_NAME
from streamprune.planning.memory_needs import needs_of, plan_memory, sums_per_token
from streamprune.progress import Progress
from streamprune.reporting.evaluations import RESULT_FORMAT
from streamprune.reporting.record import public_name
from streamprune.streaming.batches import Runtime
from streamprune.streaming.forward import ORIGINAL, PRUNED
from streamprune.streaming.layer_errors import LayerErrors
from streamprune.streaming.layer_loop import LayerLoop
from streamprune.streaming.layer_weights import LayerWeights
from streamprune.streaming.predictions import SequenceFigures, find_head
from streamprune.streaming.stages import ForwardStage, LayerTask, LayerVersion


def config_folder(model: str, revision: str | None, trust_remote_code: bool) -> Path:
    """A folder with a model's config and tokenizer, and maybe nothing else.

    Raises UnsupportedModelError if its config already shows that it cannot be streamed.
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


def same_tokenizer(original: Path, model: Path) -> bool:
    """Whether two models have identical tokenizer files; True if one of them has none."""
    files = [folder / "tokenizer.json" for folder in (model, original)]
    with reading(files[0]):
        return not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes()


def read_data(settings: EvalSettings) -> Calibration:
    """The text of an evaluation, as tokens of the model's own tokenizer: `settings.data`, or what its run held out.

    Nothing large is downloaded for it. Raises CalibrationError if a source has no sequence of two tokens, since nothing
    could be predicted, and SettingsError if there is no text.
    """
    if not settings.data:
        return _read_held_out(settings)
    config_folder(settings.model, settings.revision, settings.trust_remote_code)
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, tokenizer_only=True)
    settings = with_model_date(settings)
    text_config = load_config(folder, settings.trust_remote_code).get_text_config(decoder=True)
    data = load_calibration(
        [recipe_within(name) for name in settings.data],
        folder,
        settings,
        vocab_size=text_config.vocab_size,
        max_positions=getattr(text_config, "max_position_embeddings", None),
        trust_remote_code=settings.trust_remote_code,
    )
    pairs = [(ids, source) for ids, source in zip(data.sequences, data.source_of, strict=True) if len(ids) > 1]
    for number, name in enumerate(data.sources):
        if all(source != number for _, source in pairs):
            raise CalibrationError(f"{name} has no sequence of two tokens or more, so that nothing can be predicted.")
    return replace(data, sequences=tuple(ids for ids, _ in pairs), source_of=tuple(source for _, source in pairs))


def with_model_date(settings: EvalSettings) -> EvalSettings:
    """Settings with the date in the text that the model was scored on, unless they state one or it has none."""
    record = read_record_of(settings.model)
    calibration = record.calibration if record is not None else None
    return with_date(settings, calibration.recipe if calibration is not None else None)


def _read_held_out(settings: EvalSettings) -> Calibration:
    """The text that the model's run held out.

    Raises SettingsError if there is none, or if it was held out for another model of that name: this one may have been
    scored on it.
    """
    recipe = held_out_recipe(Path(settings.model))
    if not recipe.is_file():
        # First raise for something that is not a model.
        config_folder(settings.model, settings.revision, settings.trust_remote_code)
        raise SettingsError(
            "No text to measure on: give --data FILE or RECIPE, with text that the model was not scored on. "
            f"(`streamprune run --evaluate` holds some out, and saves it next to its output, here in {recipe.parent}; "
            "if the output was moved, name that folder.)"
        )
    data = read_data(replace(settings, data=(str(recipe),)))
    known = held_back_fingerprint(read_record_of(settings.model))
    is_whole = settings.samples is None and settings.seq_len is None
    if known is None or (is_whole and data.fingerprint != known):
        raise SettingsError(
            f"The text in {recipe.parent} was not held out for the current {settings.model}, which may have been "
            f"scored on it. Give text with --data FILE or RECIPE (or {recipe}, if the model was not scored on it)."
        )
    return data


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation (`reporting.evaluations` has its form), and the sums of each source.

    The sums of two models on the same text give an interval of the difference.
    """

    result: dict[str, Any]
    sums: tuple[Sums, ...]


def evaluate_text(settings: EvalSettings, data: Calibration, progress: Progress) -> Evaluation:
    """Stream a model, and with `against` the original too, over `data`.

    Peak memory: a layer of one of them and the next one, the embeddings, the hidden states of `data`, and a slice of
    the heads. Raises a StreampruneError if this is impossible.
    """
    device = choose_device(settings.device)
    settings.check_device(device.type)
    models = _open(settings, device)
    needs = _combined([needs_of(opened, data, opened.skeleton.layer_count) for opened in models.values()])
    plan = plan_memory(settings, needs, 0, device, Path(tempfile.gettempdir()))
    record = read_record_of(settings.model)
    # By the record; None if there is none, or without --against.
    against_source = None
    if record is not None and record.source.fingerprint is not None and ORIGINAL in models:
        against_source = record.source.fingerprint == models[ORIGINAL].checkpoint.fingerprint()
    # Nothing is printed before everything is checked, so that a refusal is a single message.
    progress.say(_summary(settings, models, data, device))
    for note in (*data.notes, *_notes(settings, models, device, against_source)):
        progress.say(f"note: {note}")
    progress.say(plan.describe())
    # Hidden states can only be compared layer by layer if both models have the same shape.
    shapes = [
        (opened.skeleton.layer_count, opened.skeleton.model.config.get_text_config(decoder=True).hidden_size)
        for opened in models.values()
    ]
    errors = LayerErrors(len(data.sources)) if len(models) == 2 and shapes[0] == shapes[1] else None
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
    held_back = held_back_fingerprint(record) == data.fingerprint
    head = about(public_name(settings.model), settings.against, models[PRUNED], data, held_back, against_source)
    return Evaluation({**head, **summary_of(sums, data.sources, mean_errors(errors, data))}, tuple(sums))


def measure(
    runtime: Runtime,
    stages: Sequence[ForwardStage],
    data: Calibration,
    errors: LayerErrors | None,
    kept: Mapping[int, KeptExperts] | None = None,
) -> list[SequenceFigures]:
    """Run all layers of one or two models on `data`, print a line for each, and compute the predictions.

    `kept` is what stays of the experts, by layer, for a stage that prunes. Raises Stopped when the user stops the
    command.
    """
    progress = runtime.progress
    with LayerLoop(runtime, stages, data) as loop:
        last = loop.layer_count - 1
        for index in range(loop.layer_count):
            started = time.monotonic()
            version = LayerVersion((kept or {}).get(index, KeptExperts()))
            task = LayerTask.of(index, version, replayed=True)
            loop.run_layer(task, index + 1 if index < last else None)
            loop.drop_cached_pages(index)
            means = mean_errors(errors, data)
            shown = f"relative error {means[-1][index]:.4f}, " if means and index < len(means[-1]) else ""
            seconds, peak = time.monotonic() - started, format_bytes(peak_device_bytes(runtime.device))
            progress.say(f"layer {index}/{last}: {shown}{seconds:.1f} s, peak {peak}")
        progress.say(f"computing the predictions of {'both models' if len(stages) == 2 else 'the model'} ...")
        return loop.read_predictions(loop.layer_count)[PRUNED]


def mean_errors(errors: LayerErrors | None, data: Calibration) -> list[list[float]] | None:
    """The mean relative errors after every layer: a list for each source, and a last one for all together."""
    if errors is None:
        return None
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
    """The head of a result's JSON: model, original and text.

    `held_back`: the text is what the model's run held out. `against_source`: the original is the model's source (None
    if that is unknown).
    """
    return {
        "format": RESULT_FORMAT,
        "model": model,
        "against": public_name(against) if against is not None else None,
        "against_source": against_source,
        "dtype": opened.dtype_name,
        "data": {
            "fingerprint": data.fingerprint,
            "held_back": held_back,
            "sequences": len(data.sequences),
            "tokens": data.tokens,
            "recipe": dict(data.recipe),
        },
        "versions": versions(),
    }


def _open(settings: EvalSettings, device: torch.device) -> Mapping[str, OpenedModel]:
    """The models by side, the original first, with complete weights.

    Raises a StreampruneError if weights are missing, predictions cannot be computed, or the vocabularies differ.
    """
    wanted = {PRUNED: (settings.model, settings.revision)}
    if settings.against is not None:
        config_folder(settings.against, settings.against_revision, settings.trust_remote_code)
        wanted = {ORIGINAL: (settings.against, settings.against_revision), **wanted}
    models = {}
    for side, (model, revision) in wanted.items():
        checkpoint = open_checkpoint(resolve_model(model, revision, settings.trust_remote_code))
        models[side] = open_model(checkpoint, settings.trust_remote_code, settings.dtype, device)
        find_head(models[side].skeleton.model)
    sizes = [_vocabulary_size(models[side]) for side in (PRUNED, ORIGINAL) if side in models]
    if len(set(sizes)) > 1:
        raise SettingsError(
            f"{settings.model} predicts {sizes[0]:,} tokens and {settings.against} {sizes[1]:,}: only models with the "
            "same vocabulary can be compared. Is --against the model that it was made from?"
        )
    return models


def _vocabulary_size(opened: OpenedModel) -> int:
    head, _ = find_head(opened.skeleton.model)
    return int(head.weight.shape[0])


def _notes(
    settings: EvalSettings, models: Mapping[str, OpenedModel], device: torch.device, against_source: bool | None
) -> Iterator[str]:
    for opened in models.values():
        yield from opened.notes
    slow = dtype_note(settings.dtype, models[PRUNED], device)
    if slow is not None:
        yield slow
    if against_source is False:
        yield (
            f"{settings.against} is not what {settings.model} was made from, by the fingerprint in its {REPORT_NAME}: "
            "the differences are not only those of pruning."
        )
    if len(models) == 2 and not same_tokenizer(*(opened.checkpoint.folder for opened in models.values())):
        yield (
            f"The tokenizers of {settings.model} and {settings.against} differ; the text is in tokens of the first, "
            "which may mean other things to the second."
        )


def _combined(needs: Sequence[Needs]) -> Needs:
    """The memory of models that are streamed together: the largest layer of any, and everything else of all."""
    largest = max(needs, key=lambda each: each.layer)
    return replace(
        largest,
        reading=max(each.reading for each in needs),
        loading=max(each.loading for each in needs),
        non_layer=sum(each.non_layer for each in needs),
        states=sum(each.states for each in needs) + largest.tokens * sums_per_token(),
        workspace=lambda tokens: max(each.workspace(tokens) for each in needs),
        itemsize=max(each.itemsize for each in needs),
        sides=len(needs),
    )


def _summary(settings: EvalSettings, models: Mapping[str, OpenedModel], data: Calibration, device: torch.device) -> str:
    named = ", ".join(f"{name} ({tokens:,})" for name, tokens in zip(data.sources, data.tokens_of, strict=True))
    against = f" against {settings.against}" if settings.against is not None else ""
    opened = models[PRUNED]
    stored = f", {' and '.join(opened.formats)}" if opened.formats else ""
    return (
        f"{settings.model}{against}: {opened.skeleton.layer_count} layers{stored}, "
        f"{_vocabulary_size(opened):,} tokens in the vocabulary; {len(data.sequences)} sequences, "
        f"{data.tokens:,} tokens from {named}; {opened.dtype_name} on {device}"
    )
