"""What settings, config.json and the names of files are enough to refuse, before torch is imported. No torch.

`import torch` takes seconds. All of it is checked again where the run is planned, with what is known of the model then.
"""

from __future__ import annotations

from pathlib import Path

from streamprune.calibration.chosen import refuse_sources
from streamprune.checkpoint.hub import resolve_model
from streamprune.checkpoint.index import CONFIG_NAME, read_json
from streamprune.config import EvalSettings, RunSettings, SearchSettings
from streamprune.errors import CalibrationError
from streamprune.fit.answer import resolve_budget
from streamprune.formats.pick import refuse_quantized
from streamprune.models.config_json import resolve_keep, stated_experts
from streamprune.models.per_layer_experts import refuse_per_layer_experts
from streamprune.output.search_folder import check_search_output
from streamprune.output.writer import check_output
from streamprune.pipeline.repeated import may_be_finished
from streamprune.planning.counts import refuse_new_values
from streamprune.quantize.schemes import require_library
from streamprune.saliency.scores_file import check_scores_file


def refuse_early(settings: RunSettings) -> None:
    """Raise what a run, a scoring or a search with these settings would raise later, as far as it can be told now."""
    if settings.budget_gib is not None or settings.gpu is not None:
        resolve_budget(settings.budget_gib, settings.gpu)
    folder = resolve_model(settings.model, settings.revision, settings.trust_remote_code, config_only=True)
    if not may_be_finished(settings):
        if isinstance(settings, SearchSettings):
            check_search_output(settings.output, folder, settings.overwrite)
        elif settings.only_score:
            check_scores_file(settings.output, folder, settings.overwrite)
        else:
            check_output(settings.output, folder, settings.overwrite)
    raw = read_json(folder / CONFIG_NAME)
    refuse_per_layer_experts(raw, settings.model)
    refuse_quantized(raw, folder)
    if not settings.only_score:
        refuse_new_values(raw, settings, settings.refit)
        require_library(settings.weights)
    spec = stated_experts(raw)
    counted = settings.by == "experts" and not settings.has_schedule_file
    if spec is not None and counted and (settings.keep is not None or settings.ratio is not None):
        all_may_stay = settings.width is not None or settings.changes_weights
        resolve_keep(spec, settings.keep, settings.ratio, all_may_stay)
    # (The mix of a run by scores is of their sources.)
    refuse_sources(settings.calibration, settings.mix if settings.scores is None else None)


def refuse_evaluation(settings: EvalSettings, prompts: Path | None = None) -> None:
    """The same of an evaluation: models and texts that are not there, and a file of `prompts` that cannot be read."""
    for model, revision in ((settings.model, settings.revision), (settings.against, settings.against_revision)):
        if model is not None:
            resolve_model(model, revision, settings.trust_remote_code, config_only=True)
    if settings.data:
        refuse_sources(settings.data, None)
    if prompts is not None:
        try:
            prompts.open("rb").close()
        except OSError as error:
            raise CalibrationError(f"The prompts {prompts} cannot be read: {error.strerror}.") from None
