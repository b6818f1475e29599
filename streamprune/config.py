"""The settings of each command, checked when they are made and never changed afterwards.

Each class raises SettingsError for values that are impossible whatever the model and the machine.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from streamprune.errors import SettingsError
from streamprune.quantize.schemes import SCHEMES
from streamprune.selection.schedules import SCHEDULES
from streamprune.selection.settings import SelectionSettings

PROPAGATE = ("original", "pruned")
DTYPES = ("auto", "bfloat16", "float16", "float32")
BY = ("experts", "channels", "both")
STATES = ("auto", "device", "ram", "disk")
RESUME = ("auto", "required", "never")
#: How the output stores weights: as the source does; plain, in bfloat16, where the source has them quantized; or newly
#: quantized by a scheme.
WEIGHTS = ("source", "bf16", *SCHEMES)
#: What a scheme quantizes: the routed experts, or every Linear module in the layers but for routers and the like.
QUANTIZE = ("experts", "all-linear")
#: How it rounds: each value to the nearest, or GPTQ, which needs text.
ROUNDING = ("rtn", "gptq")
#: The work folder is named like the output, with this suffix.
WORK_SUFFIX = ".work"
#: Most bytes in a file name, on every usual file system.
LONGEST_NAME = 255
#: The value of --anchor for no text in addition to the calibration.
NO_ANCHOR = "none"
#: Enough for a first result; the published REAP runs use 512 to 1,024 sequences of 2,048 tokens.
DEFAULT_SAMPLES = 512
DEFAULT_SEQ_LEN = 2048
#: Tokens that go through a layer at a time, by kind of device, where memory allows. Enough to keep the matrix products
#: large, and on a GPU to read the weights seldom. Of 1,024, 2,048, 4,096 and 8,192 on a CPU, tools/bench's
#: `mid` shape is fastest with the last two, of which 4,096 takes 200 MiB less.
DEFAULT_BATCH_TOKENS = {"cpu": 4096, "gpu": 32768}
#: Tokens that keep the device busy: hidden states move to slower memory before micro-batches get smaller than this.
COMFORTABLE_BATCH_TOKENS = {"cpu": 1024, "gpu": 8192}
#: Seconds between two saves of the hidden states. A save writes all of them to the disk; what was computed since the
#: last one is computed again after a kill.
DEFAULT_CHECKPOINT_EVERY = 60.0
#: A candidate of a search is given up if its KL divergence within the model is so many times the best one's. It may
#: overstate that of the last layer 2.6 times (on the demo's model), and not by the same factor for all candidates.
DEFAULT_DROP_ABOVE = 8.0
#: Tokens per sequence that a model is planned for.
DEFAULT_CONTEXT = 32768
#: Tokens of all sequences together that can be planned for: far beyond any GPU.
MOST_TOKENS = 2**40
#: The default of earlier transformers versions: small enough for every tool.
DEFAULT_SHARD_BYTES = 5 * 10**9


def check_choice(name: str, choice: str, choices: tuple[str, ...]) -> None:
    """Raise SettingsError unless an option has one of its values."""
    if choice not in choices:
        raise SettingsError(f"{name} {choice!r} is unknown. Choose one of: {', '.join(choices)}.")


def check_least(name: str, value: int | None, least: int) -> None:
    """Raise SettingsError for a number that is too small; None is an option that was not given."""
    if value is not None and value < least:
        raise SettingsError(f"{name} {value} is too small: at least {least}.")


def check_amounts(samples: int | None, seq_len: int | None) -> None:
    """Raise SettingsError for too few sequences, or too few tokens per sequence."""
    check_least("--samples", samples, 1)
    check_least("--seq-len", seq_len, 2)


def sibling_path(output: Path, suffix: str) -> Path:
    """The path of `output` with a suffix. A name too long for that is cut and made unique by a hash."""
    name = os.fsencode(output.name)
    if len(name) + len(suffix) > LONGEST_NAME:
        digest = hashlib.sha256(name).hexdigest()[:16]
        # Cut between characters, so that the name stays readable where it was.
        name = name[: LONGEST_NAME - len(suffix) - 17].decode(errors="ignore").encode() + f"-{digest}".encode()
    return output.with_name(os.fsdecode(name) + suffix)


@dataclass(frozen=True)
class ServingSpec:
    """How the model is to be used: `batch` sequences of `context` tokens each, and the form of weights and cache.

    `weights` is one of WEIGHTS: how an output would store them; "source" is also the model as it is.
    `keep` is the number of experts that stay in every layer; None for all. If layers may differ, `total` is the
    number in all layers together instead, and `widest` the number in the layer that keeps most, if known. `width` is
    the number of channels that each expert keeps; None for all.
    """

    context: int = DEFAULT_CONTEXT
    batch: int = 1
    kv_dtype: str = "auto"
    weights: str = "source"
    keep: int | None = None
    total: int | None = None
    widest: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        check_least("--context", self.context, 1)
        check_least("--batch", self.batch, 1)
        if self.context * self.batch > MOST_TOKENS:
            raise SettingsError(f"--context {self.context} with --batch {self.batch} is more than any GPU could hold.")


@dataclass(frozen=True, kw_only=True)
class PruningTarget(SelectionSettings):
    """How far to prune, for what use, and which experts to keep.

    At most one says how far: `keep` (experts per layer), `ratio` (share removed), or a budget (`budget_gib`, or what
    CUDA can use of `gpu`) for the use that `context`, `batch` and `kv_dtype` describe. Where a schedule gives layers
    different numbers of experts, these are means: as many experts stay in all as with equal numbers.

    `width` is the number of channels that each expert keeps, alone or in addition. Without it, `by` says what a ratio
    or a budget removes: experts, channels, or both by the same share. Widths found that way are multiples of
    `width_multiple`.
    """

    keep: int | None = None
    ratio: float | None = None
    budget_gib: float | None = None
    gpu: str | None = None
    context: int = DEFAULT_CONTEXT
    batch: int = 1
    kv_dtype: str = "auto"
    width: int | None = None
    by: str = "experts"
    width_multiple: int | None = None

    def __post_init__(self) -> None:
        SelectionSettings.__post_init__(self)
        check_choice("--by", self.by, BY)
        check_least("--width", self.width, 1)
        check_least("--width-multiple", self.width_multiple, 1)
        if self.by != "experts" and self.width is not None:
            raise SettingsError(f"--by {self.by} finds the width itself. Omit it, or --width {self.width}.")
        if self.by != "experts" and (self.keep is not None or self.has_schedule_file):
            raise SettingsError(f"--by {self.by} is for --ratio and for a budget. Say the width with --width.")
        if self.by == "experts" and self.width_multiple is not None:
            raise SettingsError("--width-multiple is for --by channels and --by both.")
        if self.keep is not None and self.keep < 1:
            raise SettingsError(f"--keep {self.keep}: at least one expert per layer must stay.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise SettingsError(
                f"--ratio {self.ratio:g} is not between 0 and 1. It is the share to remove; 0.5 is half."
            )
        # Creating it checks its values.
        _ = self.serving

    @property
    def serving(self) -> ServingSpec:
        """How the pruned model is to be used."""
        return ServingSpec(context=self.context, batch=self.batch, kv_dtype=self.kv_dtype, weights=self.stored_as)

    @property
    def selection(self) -> SelectionSettings:
        """How the experts that stay are selected."""
        return SelectionSettings(**{each.name: getattr(self, each.name) for each in fields(SelectionSettings)})

    @property
    def stored_as(self) -> str:
        """How the pruned model stores its weights: one of WEIGHTS."""
        return "source"

    @property
    def changes_weights(self) -> bool:
        """Whether an output with all experts would differ from the source."""
        return self.stored_as != "source"

    @property
    def targets_given(self) -> int:
        """How many of the settings say how far to prune."""
        return sum(value is not None for value in (self.keep, self.ratio, self.budget_gib, self.gpu))

    def check_one_target(self) -> None:
        """Raise SettingsError unless one setting says how far to prune; with a schedule file, only a budget may."""
        given = self.targets_given
        if given == 0 and (self.width is not None or self.changes_weights):
            return
        if self.has_schedule_file and (given > 1 or self.keep is not None or self.ratio is not None):
            raise SettingsError(
                f"--schedule {self.schedule} is none of {', '.join(SCHEDULES)}, so it is read as a file that lists how "
                "many experts stay. Omit --keep and --ratio; a budget is only checked."
            )
        if given != 1 and not self.has_schedule_file:
            raise SettingsError(
                "Say in one way how far to prune: --budget-gib G (memory that it must fit), --gpu NAME (the same, by "
                "GPU), --keep N (experts to keep per layer) or --ratio R (share to remove). --width W (channels to "
                "keep per expert) may stand alone, or be added."
            )


@dataclass(frozen=True)
class Storage:
    """How an output stores weights: `weights` is one of WEIGHTS; the rest is only for those that quantize.

    `quantize` is one of QUANTIZE, `rounding` one of ROUNDING, and `tensor_parallel` the number of GPUs that an engine
    will divide the matrices among.
    """

    weights: str = "source"
    quantize: str = QUANTIZE[-1]
    rounding: str = ROUNDING[0]
    tensor_parallel: int = 1

    @classmethod
    def of(cls, weights: str, quantize: str | None, rounding: str | None, tensor_parallel: int | None) -> Storage:
        """The storage for options that may not be given (None).

        Raises SettingsError for unknown values, and for options that only count for quantized weights without these.
        """
        check_choice("--weights", weights, WEIGHTS)
        options = (("--quantize", quantize, QUANTIZE), ("--rounding", rounding, ROUNDING))
        for name, value, choices in options:
            if value is not None:
                check_choice(name, value, choices)
        check_least("--tensor-parallel", tensor_parallel, 1)
        given = [*options, ("--tensor-parallel", tensor_parallel, ())]
        unused = next((name for name, value, _ in given if value is not None), None)
        if unused is not None and weights not in SCHEMES:
            raise SettingsError(
                f"{unused} is for weights that are quantized anew: --weights {', '.join(SCHEMES)}. With --weights "
                f"{weights} leave it out."
            )
        # By default 8 bits are rounded to the nearest, and 4 bits by GPTQ.
        rounding = rounding or ("gptq" if weights == "w4a16" else "rtn")
        return cls(weights, quantize or QUANTIZE[-1], rounding, tensor_parallel or 1)

    @property
    def is_quantizing(self) -> bool:
        """Whether weights are quantized anew."""
        return self.weights in SCHEMES

    def as_json(self) -> dict[str, Any]:
        """What is recorded of it; nothing for the source's own way."""
        if self.is_quantizing:
            return asdict(self)
        return {"weights": self.weights} if self.weights != "source" else {}


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What model, where the result goes, how it is stored, and where the work is done.

    `weights` is one of WEIGHTS. Only for those that quantize: `quantize` (one of QUANTIZE; None: all-linear),
    `rounding` (one of ROUNDING; None: see `rounds_by`), and `tensor_parallel`, the number of GPUs that an engine will
    divide the matrices among (None: 1).
    """

    model: str
    output: Path
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    work_dir: Path | None = None
    resume: str = "auto"
    verify: bool = True
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    weights: str = "source"
    quantize: str | None = None
    rounding: str | None = None
    tensor_parallel: int | None = None

    def __post_init__(self) -> None:
        # Creating it checks its values.
        _ = self.storage
        check_choice("--resume", self.resume, RESUME)
        check_least("--max-shard-size", self.max_shard_bytes, 1)
        for path in (self.output, self.work_dir or self.output):
            if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
                raise SettingsError(f"{path} has a name longer than the {LONGEST_NAME} bytes that file systems take.")

    @property
    def is_quantizing(self) -> bool:
        """Whether the output is quantized anew."""
        return self.weights in SCHEMES

    @property
    def stored_as(self) -> str:
        """How the output stores its weights: one of WEIGHTS."""
        return self.weights

    @property
    def storage(self) -> Storage:
        """How the output stores weights."""
        return Storage.of(self.weights, self.quantize, self.rounding, self.tensor_parallel)

    @property
    def rounds_by(self) -> str:
        """How weights are rounded: one of ROUNDING."""
        return self.storage.rounding

    @property
    def work_folder(self) -> Path:
        """Where the run keeps what it needs to resume after an interruption."""
        return self.work_dir or self.output_work_folder

    @property
    def output_work_folder(self) -> Path:
        """A folder next to the output, locked by the run that writes it: the work folder unless --work-dir is given."""
        return sibling_path(self.output, WORK_SUFFIX)


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Device, dtype, micro-batches and memory limits."""

    device: str = "auto"
    dtype: str = "auto"
    batch_tokens: int | None = None
    states: str = "auto"
    vram_gib: float | None = None
    ram_gib: float | None = None

    def __post_init__(self) -> None:
        check_least("--batch-tokens", self.batch_tokens, 1)
        check_choice("--dtype", self.dtype, DTYPES)
        check_choice("--states", self.states, STATES)
        for name, limit in (("--vram-gib", self.vram_gib), ("--ram-gib", self.ram_gib)):
            if limit is not None and not 0 < limit * 2**30 < float("inf"):
                raise SettingsError(
                    f"{name} {limit:g} is not an amount of memory. Give GiB above 0, for example {name} 16."
                )
        if self.device == "cpu":
            self.check_device("cpu")

    def check_device(self, device_type: str) -> None:
        """Raise SettingsError where a setting makes no sense on a device of this type, as torch calls it."""
        if self.vram_gib is not None and device_type == "cpu":
            raise SettingsError(
                f"--vram-gib {self.vram_gib:g} is about a GPU's memory, but this run computes on the CPU. "
                "Use --ram-gib, or a CUDA --device."
            )

    def most_batch_tokens(self, device_type: str) -> int:
        """Most tokens per micro-batch on a device of this type ("cpu", or torch's name for GPUs), if memory allows."""
        return self.batch_tokens or DEFAULT_BATCH_TOKENS["cpu" if device_type == "cpu" else "gpu"]

    @property
    def vram_bytes(self) -> int | None:
        """Most GPU memory to use; None for all that is free."""
        return None if self.vram_gib is None else int(self.vram_gib * 2**30)

    @property
    def ram_bytes(self) -> int | None:
        """Most resident RAM; None for all that is available."""
        return None if self.ram_gib is None else int(self.ram_gib * 2**30)


@dataclass(frozen=True, kw_only=True)
class RunSettings(OutputSettings, PruningTarget, ComputeSettings):
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
    samples: int | None = None
    seq_len: int | None = None
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
        for part in (PruningTarget, OutputSettings, ComputeSettings):
            part.__post_init__(self)
        check_amounts(self.samples, self.seq_len)
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
            raise SettingsError("search finds out how much stays. Give a budget: --budget-gib or --gpu.")
        if (self.budget_gib is None) == (self.gpu is None):
            raise SettingsError("Give the memory that the model must fit: --budget-gib G, or --gpu NAME.")
        if self.schedule != "uniform" or self.protect_super_experts or self.floor is not None:
            raise SettingsError(
                "search measures only candidates of which all layers keep equally many experts: omit --schedule, "
                "--floor and --protect-super-experts."
            )
        if self.weights != "source":
            raise SettingsError("search tries several formats. Name those of candidates in --candidates.")
        if not self.candidates:
            raise SettingsError("--candidates names no candidate. Omit it, or write --candidates auto.")
        if "auto" in self.candidates and len(self.candidates) > 1:
            raise SettingsError("--candidates auto lays candidates out itself. Give it alone, or name all of them.")
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
class EvalSettings(ComputeSettings):
    """The settings of `streamprune eval` for held-out text: which model, against which original, on what text."""

    model: str
    against: str | None = None
    revision: str | None = None
    against_revision: str | None = None
    trust_remote_code: bool = False
    data: tuple[str, ...] = ()
    samples: int | None = None
    seq_len: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        ComputeSettings.__post_init__(self)
        check_amounts(self.samples, self.seq_len)
        if self.against_revision is not None and self.against is None:
            raise SettingsError("--against-revision is about the model of --against, which is missing.")
