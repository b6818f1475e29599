"""The settings of each command, checked when they are made and never changed afterwards.

Each class raises SettingsError for values that are impossible whatever the model and the machine.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from streamprune.errors import SettingsError
from streamprune.quantize.schemes import SCHEMES
from streamprune.targets import (
    MTP,
    PruningTarget,
    Storage,
    check_choice,
    check_least,
)

PROPAGATE = ("original", "pruned")
DTYPES = ("auto", "bfloat16", "float16", "float32")
STATES = ("auto", "device", "ram", "disk")
RESUME = ("auto", "required", "never")
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
#: The default of earlier transformers versions: small enough for every tool.
DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How much of a text is used: sequences (or records), tokens of each, and the seed; None: as the recipe says.

    `date` (YYYY-MM-DD; None: today) is what chat templates write that write the date. A share `skip_bad` of a source's
    records may be bad: they are passed over.
    """

    samples: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    date: str | None = None
    skip_bad: float = 0.0

    def __post_init__(self) -> None:
        check_least("--samples", self.samples, 1)
        check_least("--seq-len", self.seq_len, 2)
        if not 0 <= self.skip_bad < 1:
            raise SettingsError(f"--skip-bad {self.skip_bad:g} is not a share below 1. Write for example 1%.")
        # Raises SettingsError.
        _ = self.day

    @property
    def day(self) -> datetime.date:
        """The date for chat templates."""
        if self.date is None:
            return datetime.date.today()
        with suppress(ValueError):
            day = datetime.date.fromisoformat(self.date)
            # (Python takes other forms too.)
            if str(day) == self.date:
                return day
        raise SettingsError(f"--date {self.date} is not a date. Write it as YYYY-MM-DD, such as 2026-01-31.")


def sampling_of(settings: RunSettings | EvalSettings) -> Sampling:
    """How much text a command uses. Raises SettingsError for values that make no sense."""
    return Sampling(**{each.name: getattr(settings, each.name) for each in fields(Sampling)})


def sibling_path(output: Path, suffix: str) -> Path:
    """The path of `output` with a suffix. A name too long for that is cut and made unique by a hash."""
    name = os.fsencode(output.name)
    if len(name) + len(suffix) > LONGEST_NAME:
        digest = hashlib.sha256(name).hexdigest()[:16]
        # Cut between characters, so that the name stays readable where it was.
        name = name[: LONGEST_NAME - len(suffix) - 17].decode(errors="ignore").encode() + f"-{digest}".encode()
    return output.with_name(os.fsdecode(name) + suffix)


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What model, where the result goes, how it is stored, and where the work is done.

    `report`: make report.html at the end. `weights` is one of WEIGHTS. Only for those that quantize: `quantize` (one of
    QUANTIZE; None: all-linear), `rounding` (one of ROUNDING; None: see `rounds_by`), and `tensor_parallel`, the number
    of GPUs that an engine will divide the matrices among (None: 1). `mtp` is one of MTP: whether layers for multi-token
    prediction stay, as far as that is possible.
    """

    model: str
    output: Path
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    work_dir: Path | None = None
    resume: str = "auto"
    verify: bool = True
    report: bool = True
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    weights: str = "source"
    quantize: str | None = None
    rounding: str | None = None
    tensor_parallel: int | None = None
    mtp: str = MTP[0]

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
    def stored_mtp(self) -> str:
        """What happens to layers for multi-token prediction: one of MTP."""
        return self.mtp

    @property
    def storage(self) -> Storage:
        """How the output stores weights."""
        return Storage.of(self.weights, self.quantize, self.rounding, self.tensor_parallel, self.mtp)

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
    date: str | None = None
    skip_bad: float = 0.0
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
        _ = sampling_of(self)
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
    date: str | None = None
    skip_bad: float = 0.0

    def __post_init__(self) -> None:
        ComputeSettings.__post_init__(self)
        _ = sampling_of(self)
        if self.against_revision is not None and self.against is None:
            raise SettingsError("--against-revision is about the model of --against, which is missing.")
