"""What an output is to be: how far it is pruned, for what use, and how its weights are stored.

Each class raises SettingsError for values that are impossible whatever the model and the machine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from streamprune.errors import SettingsError
from streamprune.quantize.gguf_types import GGUF_TYPES
from streamprune.quantize.schemes import SCHEMES
from streamprune.selection.schedules import SCHEDULES
from streamprune.selection.settings import SelectionSettings

BY = ("experts", "channels", "both")
#: How the output stores weights: as the source does; plain, in bfloat16, where the source has them quantized; or newly
#: quantized by a scheme.
WEIGHTS = ("source", "bf16", *SCHEMES)
#: What a scheme quantizes: the routed experts, or every Linear module in the layers but for routers and the like.
QUANTIZE = ("experts", "all-linear")
#: How it rounds: each value to the nearest, or GPTQ, which needs text.
ROUNDING = ("rtn", "gptq")
#: What happens to layers for multi-token prediction.
MTP = ("keep", "drop")
#: The programs whose limits `--for` and `--round-for` know; `fit/engine_rules.py` has what they take.
ENGINES = ("vllm", "llama.cpp", "transformers", "tensorrt-llm", "sglang")
#: Tokens per sequence that a model is planned for, if it can have so many.
DEFAULT_CONTEXT = 32768
#: Tokens of all sequences together that can be planned for: far beyond any GPU.
MOST_TOKENS = 2**40


def check_choice(name: str, choice: str, choices: tuple[str, ...]) -> None:
    """Raise SettingsError unless an option has one of its values."""
    if choice not in choices:
        raise SettingsError(f"{name} {choice!r} is unknown. Choose one of: {', '.join(choices)}.")


def check_least(name: str, value: int | None, least: int) -> None:
    """Raise SettingsError for a number that is too small; None is an option that was not given."""
    if value is not None and value < least:
        raise SettingsError(f"{name} {value} is too small: at least {least}.")


def planned_context(asked: int | None, longest: int | None) -> int:
    """Tokens per sequence to plan for: as many as asked for, or DEFAULT_CONTEXT, or what the model can have if less.

    `longest` is the longest context of the model; None if its config names none. Raises SettingsError for more.
    """
    if asked is None:
        return min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if longest is not None and asked > longest:
        raise SettingsError(
            f"--context {asked:,}: by its config.json the model can have {longest:,} tokens, so a cache for more would "
            f"never be filled. Give --context {longest}, or leave it out. If the model is to be extended (rope scaling "
            "such as YaRN), write that into its config.json first."
        )
    return asked


def check_gguf_source(gguf: str, weights: str) -> None:
    """Raise SettingsError unless llama.cpp can make `gguf`, one of GGUF_TYPES, of what is stored as --weights says."""
    if weights in SCHEMES:
        raise SettingsError(
            f"--gguf {gguf} is what llama.cpp quantizes the result to, from plain weights. Leave out --weights "
            f"{weights}."
        )


@dataclass(frozen=True)
class ServingSpec:
    """How the model is to be used: `batch` sequences of `context` tokens each, and the form of weights and cache.

    `weights` is one of WEIGHTS: how an output would store them; "source" is also the model as it is. Or it is one of
    GGUF_TYPES: what llama.cpp makes of the output, which is `stored` then as one of "source" and "bf16".
    `keep` is the number of experts that stay in every layer; None for all. If layers may differ, `total` is the
    number in all layers together instead; `widest` is the number in the layer that keeps most, and `last` that in the
    last one with experts, if known. `width` is the number of channels that each expert keeps; None for all. `mtp` is
    one of MTP: whether an output keeps layers for multi-token prediction, which engines load for speculative decoding;
    they have as many experts as the last layer, and the model as it is has them. `for_engine` is
    the program that serves it, one of ENGINES, and `round_for` one for which numbers of experts are rounded down;
    `unrounded` is what `keep` was before that.
    """

    context: int = DEFAULT_CONTEXT
    batch: int = 1
    kv_dtype: str = "auto"
    weights: str = "source"
    stored: str = "source"
    keep: int | None = None
    total: int | None = None
    widest: int | None = None
    last: int | None = None
    width: int | None = None
    mtp: str = MTP[0]
    for_engine: str | None = None
    round_for: str | None = None
    unrounded: int | None = None

    @property
    def engine(self) -> str | None:
        """The program that is to serve the model, if one is named."""
        return self.for_engine or self.round_for

    def __post_init__(self) -> None:
        check_least("--context", self.context, 1)
        check_least("--batch", self.batch, 1)
        if self.context * self.batch > MOST_TOKENS:
            raise SettingsError(f"--context {self.context} with --batch {self.batch} is more than any GPU could hold.")


@dataclass(frozen=True, kw_only=True)
class PruningTarget(SelectionSettings):
    """How far to prune, for what use, and which experts to keep.

    At most one says how far: `keep` (experts per layer), `ratio` (share removed), or a budget (`budget_gib`, or what
    CUDA can use of `gpu`) for the use that `context` (None: see `planned_context`), `batch` and `kv_dtype` describe.
    Where a schedule gives layers different numbers of experts, these are means: as many experts stay in all as with
    equal numbers.

    `width` is the number of channels that each expert keeps, alone or in addition. Without it, `by` says what a ratio
    or a budget removes: experts, channels, or both by the same share. Widths found that way are multiples of
    `width_multiple`. `gguf` is one of GGUF_TYPES: what the memory is planned for, where llama.cpp quantizes the result.

    `for_engine` is the program that is to serve the result, one of ENGINES; `round_for` one for which the number of
    experts is rounded down to one that it takes best.
    """

    keep: int | None = None
    ratio: float | None = None
    budget_gib: float | None = None
    gpu: str | None = None
    context: int | None = None
    batch: int = 1
    kv_dtype: str = "auto"
    width: int | None = None
    by: str = "experts"
    width_multiple: int | None = None
    for_engine: str | None = None
    round_for: str | None = None
    gguf: str | None = None

    def __post_init__(self) -> None:
        SelectionSettings.__post_init__(self)
        if self.gguf is not None:
            check_choice("--gguf", self.gguf, tuple(GGUF_TYPES))
        if self.gguf is not None:
            check_gguf_source(self.gguf, self.stored_as)
        check_choice("--by", self.by, BY)
        for name, engine in (("--for", self.for_engine), ("--round-for", self.round_for)):
            if engine is not None:
                check_choice(name, engine, ENGINES)
        if self.round_for is not None and (self.has_schedule_file or not SCHEDULES[self.schedule].is_uniform):
            raise SettingsError(
                f"--round-for {self.round_for} rounds the one number of experts of all layers, but --schedule "
                f"{self.schedule} may give them different ones. Omit one of the two."
            )
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
            percent = f" For {self.ratio:g} % write --ratio {self.ratio / 100:g}." if 1 < self.ratio < 100 else ""
            raise SettingsError(
                f"--ratio {self.ratio:g} is not between 0 and 1. It is the share to remove; 0.5 is half.{percent}"
            )
        # Creating it checks its values.
        _ = self.serving(None)

    def serving(self, longest: int | None) -> ServingSpec:
        """How the pruned model is to be used; `longest` is the longest context it can have, None if that is unknown.

        Raises SettingsError for a longer one.
        """
        return ServingSpec(
            context=planned_context(self.context, longest),
            batch=self.batch,
            kv_dtype=self.kv_dtype,
            weights=self.gguf or self.stored_as,
            stored=self.stored_as,
            mtp=self.stored_mtp,
        )

    @property
    def serving_engine(self) -> str | None:
        """The program that is to serve the result, if one is named."""
        return self.for_engine or self.round_for

    @property
    def selection(self) -> SelectionSettings:
        """How the experts that stay are selected."""
        return SelectionSettings(**{each.name: getattr(self, each.name) for each in fields(SelectionSettings)})

    @property
    def stored_as(self) -> str:
        """How the pruned model stores its weights: one of WEIGHTS."""
        return "source"

    @property
    def stored_mtp(self) -> str:
        """What happens to layers for multi-token prediction: one of MTP."""
        return MTP[0]

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
    """How an output stores weights: `weights` is one of WEIGHTS, `mtp` one of MTP; the rest is only for those that
    quantize.

    `quantize` is one of QUANTIZE, `rounding` one of ROUNDING, and `tensor_parallel` the number of GPUs that an engine
    will divide the matrices among.
    """

    weights: str = "source"
    quantize: str = QUANTIZE[-1]
    rounding: str = ROUNDING[0]
    tensor_parallel: int = 1
    mtp: str = MTP[0]

    @classmethod
    def of(
        cls,
        weights: str,
        quantize: str | None,
        rounding: str | None,
        tensor_parallel: int | None,
        mtp: str = MTP[0],
    ) -> Storage:
        """The storage for options that may not be given (None).

        Raises SettingsError for unknown values, and for options that only count for quantized weights without these.
        """
        check_choice("--weights", weights, WEIGHTS)
        check_choice("--mtp", mtp, MTP)
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
        return cls(weights, quantize or QUANTIZE[-1], rounding, tensor_parallel or 1, mtp)

    @property
    def is_quantizing(self) -> bool:
        """Whether weights are quantized anew."""
        return self.weights in SCHEMES

    def as_json(self) -> dict[str, Any]:
        """What is recorded of it; nothing for the source's own way."""
        found = asdict(self) if self.is_quantizing else {"weights": self.weights, "mtp": self.mtp}
        usual = {"weights": WEIGHTS[0], "mtp": MTP[0]}
        return {name: value for name, value in found.items() if value != usual.get(name)}
