"""The settings of each command, checked when they are made and never changed afterwards.

Each class raises SettingsError for values that are impossible whatever the model and the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from streamprune.common_settings import ComputeSettings, OutputSettings, Sampling
from streamprune.errors import SettingsError
from streamprune.files.names import sibling_path
from streamprune.targets import PruningTarget, check_choice, check_least

PROPAGATE = ("original", "pruned")
#: The value of --anchor for no text in addition to the calibration.
NO_ANCHOR = "none"
#: Seconds between two saves of the hidden states. A save writes all of them to the disk; what was computed since the
#: last one is computed again after a kill.
DEFAULT_CHECKPOINT_EVERY = 60.0
#: A candidate of a search is given up if its KL divergence within the model is so many times the best one's. It may
#: overstate that of the last layer 2.6 times (on the demo's model), and not by the same factor for all candidates.
DEFAULT_DROP_ABOVE = 8.0


@dataclass(frozen=True, kw_only=True)
class RunSettings(OutputSettings, PruningTarget, ComputeSettings, Sampling):
    """The settings of `streamprune run`, and with `only_score` of `streamprune score`.

    With `evaluate` a part of the calibration is held out and measured on; `stop_if_kl` (nats per token) ends a run
    whose KL divergence there is larger. `channels`: also score the channels of each expert, where that is possible.
    With `refit` the down projections of the kept experts are refitted, also to the text `anchor` (as in `calibration`;
    NO_ANCHOR: to no other text; None: to built-in text if the calibration has a single source). With `scores` (a file,
    or a folder with one) nothing is scored anew: they select, and the calibration is only for the refit. `imatrix` is
    the file for an importance matrix of the pruned model.
    """

    only_score: bool = False
    calibration: tuple[str, ...] = ("builtin",)
    propagate: str = "original"
    from_layer: int | None = None
    checkpoint_every: float = DEFAULT_CHECKPOINT_EVERY
    evaluate: bool = False
    stop_if_kl: float | None = None
    channels: bool = True
    refit: bool = False
    anchor: str | None = None
    scores: Path | None = None
    imatrix: Path | None = None

    def __post_init__(self) -> None:
        if not self.only_score:
            self.check_one_target()
        for part in (PruningTarget, OutputSettings, ComputeSettings, Sampling):
            part.__post_init__(self)
        check_least("--from-layer", self.from_layer, 0)
        check_choice("--propagate", self.propagate, PROPAGATE)
        if not 0 <= self.checkpoint_every < float("inf"):
            raise SettingsError(
                f"--checkpoint-every {self.checkpoint_every:g} is not a number of seconds. 0: after every layer."
            )
        self._check_refit()
        self._check_imatrix()
        if not self.channels and (self.width is not None or self.by != "experts"):
            raise SettingsError("--no-channels leaves out what --width and --by choose by. Omit one of the two.")
        if self.evaluate and self.only_score:
            raise SettingsError("--evaluate is about a pruned model, and scoring alone makes none.")
        if self.stop_if_kl is not None and not self.evaluate:
            raise SettingsError(f"--stop-if-kl {self.stop_if_kl:g} needs --evaluate, which measures the KL.")
        if self.stop_if_kl is not None and not 0 < self.stop_if_kl < float("inf"):
            raise SettingsError(
                f"--stop-if-kl {self.stop_if_kl:g} is not a KL divergence. Give nats per token above 0."
            )

    @property
    def needs_text(self) -> bool:
        """Whether weights are rounded by what flows through them."""
        return self.is_quantizing and self.rounds_by == "gptq" and not self.only_score

    @property
    def sends_text(self) -> bool:
        """Whether text goes through the pruned layers: weights, or an importance matrix, are made from it."""
        return self.refit or self.needs_text or self.imatrix is not None

    @property
    def changes_weights(self) -> bool:
        """Also if an importance matrix is wanted, for which all experts may stay."""
        return super().changes_weights or self.imatrix is not None

    def _check_imatrix(self) -> None:
        if self.imatrix is None:
            return
        if self.only_score:
            raise SettingsError("--imatrix is about a pruned model, and scoring alone makes none.")
        if self.propagate == "pruned":
            raise SettingsError(
                "--imatrix sends a part of the text through the pruned layers, next to the original stream that the "
                "experts are scored on. Leave out --propagate pruned."
            )
        path = self.imatrix.absolute()
        for name, folder in (("the output", self.output), ("the work folder", self.work_folder)):
            if folder.absolute() in (path, *path.parents):
                raise SettingsError(
                    f"--imatrix {self.imatrix} is in {name}, which has only the files of the model, or is removed. "
                    f"Put it beside, such as {sibling_path(self.output, '.imatrix.gguf')}."
                )

    def _check_refit(self) -> None:
        if self.anchor is not None and not self.refit:
            raise SettingsError(f"--anchor {self.anchor} is the text that --refit also fits to, which is not given.")
        if self.scores is not None and not self.sends_text:
            raise SettingsError(
                "--scores is for --refit, --rounding gptq and --imatrix. Without them use `streamprune prune`, which "
                "needs no text."
            )
        if self.needs_text and self.propagate == "pruned":
            raise SettingsError(
                "--rounding gptq rounds the pruned layers by text of which the original stream is kept too, and scores "
                "on that. Leave out --propagate pruned, or round to nearest with --rounding rtn."
            )
        if not self.refit:
            return
        if self.only_score:
            raise SettingsError("--refit changes weights of a pruned model, and scoring alone makes none.")
        if self.propagate == "pruned":
            raise SettingsError(
                "--refit fits the pruned layers to the original ones, so it needs the original stream next to the "
                "pruned one, and scores on it. Leave out --propagate pruned."
            )


@dataclass(frozen=True, kw_only=True)
class SearchSettings(RunSettings):
    """The settings of `streamprune search`: a budget, and the `candidates` that are measured.

    Each of them is the text of a candidate, or "auto". Those whose KL divergence within the model is above
    `drop_above` times the best one's are given up; 0: none.
    """

    candidates: tuple[str, ...] = ("auto",)
    drop_above: float = DEFAULT_DROP_ABOVE

    def __post_init__(self) -> None:
        if self.keep is not None or self.ratio is not None or self.width is not None or self.by != "experts":
            raise SettingsError(
                "A search finds out how much stays: leave out --keep, --ratio, --width and --by, and give a budget, "
                "--budget-gib or --gpu."
            )
        if (self.budget_gib is None) == (self.gpu is None):
            raise SettingsError("Give the memory that the model must fit: --budget-gib G, or --gpu NAME.")
        if self.schedule != "uniform" or self.protect_super_experts or self.floor is not None:
            raise SettingsError(
                "search measures only candidates of which all layers keep equally many experts: omit --schedule, "
                "--floor and --protect-super-experts."
            )
        if self.weights != "source":
            raise SettingsError("search tries several formats. Name those of candidates in --candidates.")
        if self.gguf is not None:
            raise SettingsError(
                f"search measures what it can write, and --gguf {self.gguf} is made by llama.cpp later. Leave it out, "
                "or use `run` with --gguf and without --best."
            )
        if not self.candidates:
            raise SettingsError("--candidates names no candidate. Omit it, or write --candidates auto.")
        if "auto" in self.candidates and len(self.candidates) > 1:
            raise SettingsError("--candidates auto lays candidates out itself. Give it alone, or name all of them.")
        if self.round_for is not None and "auto" not in self.candidates:
            raise SettingsError("--round-for is for candidates that search lays out. Name others, or omit it.")
        if not (self.drop_above == 0 or 1 < self.drop_above < float("inf")):
            raise SettingsError(f"--drop-above {self.drop_above:g}: a factor above 1, or 0 to measure all to the end.")
        RunSettings.__post_init__(self)

    def _check_refit(self) -> None:
        if self.imatrix is not None:
            raise SettingsError("--imatrix is about one pruned model: write the best one, then ask for it.")
        if self.propagate == "pruned" or self.scores is not None:
            raise SettingsError("search scores all candidates on the original model's stream, and anew.")

    def run_of(self, keep: int | None, width: int | None, weights: str, refit: bool) -> RunSettings:
        """The settings of a run of a candidate's own, with the text that the search holds out held out."""
        given = {each.name: getattr(self, each.name) for each in fields(RunSettings)}
        how = {"keep": keep, "width": width, "weights": weights, "refit": refit, "budget_gib": None, "gpu": None}
        # (The candidate's number was rounded already.)
        how["round_for"] = None
        if not refit:
            how["anchor"] = None
        return RunSettings(**{**given, **how, "evaluate": True})


@dataclass(frozen=True, kw_only=True)
class PruneSettings(OutputSettings, PruningTarget):
    """The settings of `streamprune prune`: from `scores` (a file, or a folder with one), or the user's own list."""

    scores: Path | None = None
    keep_file: Path | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        if self.scores is None and self.keep_file is None and (self.targets_given or not self.changes_weights):
            raise SettingsError(
                "Say which experts stay: --scores FILE (from `streamprune score` or an earlier run) with --keep, "
                "--ratio or --budget-gib, or --keep-file FILE."
            )
        if self.keep_file is None:
            self.check_one_target()
        elif self.targets_given:
            raise SettingsError("--keep-file says itself how many experts stay. Omit --keep, --ratio and the budget.")
        if self.keep_file is not None and self.round_for is not None:
            raise SettingsError("--keep-file says itself how many experts stay. Omit --round-for.")
        if self.is_quantizing and self.rounds_by != "rtn":
            raise SettingsError(
                f"--weights {self.weights} rounds by {self.rounds_by}, which needs text: use `streamprune run --scores "
                f"FILE --weights {self.weights}`, or round each weight to the nearest with --rounding rtn, which loses "
                "about twice as much."
            )
        if self.keep_file is not None and (self.width is not None or self.by != "experts"):
            raise SettingsError("--keep-file lists complete experts. Omit --width and --by, or use --scores.")
        PruningTarget.__post_init__(self)
        OutputSettings.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class EvalSettings(ComputeSettings, Sampling):
    """The settings of `streamprune eval` for held-out text: which model, against which original, on what text."""

    model: str
    against: str | None = None
    revision: str | None = None
    against_revision: str | None = None
    trust_remote_code: bool = False
    data: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ComputeSettings.__post_init__(self)
        Sampling.__post_init__(self)
        if self.against_revision is not None and self.against is None:
            raise SettingsError("--against-revision is about the model of --against, which is missing.")
