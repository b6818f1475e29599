"""What the commands share: their options, printing, and silencing libraries."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from streamprune.cli.hints import WeightsChoice
from streamprune.common_settings import DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, DTYPES, RESUME, STATES
from streamprune.config import RunSettings
from streamprune.distributed.processes import launched
from streamprune.errors import SettingsError
from streamprune.fit.cache import KV_DTYPES
from streamprune.quantize.gguf_types import GGUF_TYPES
from streamprune.saliency.methods import DEFAULT_METHOD, METHODS, Method
from streamprune.selection.schedules import DEFAULT_SCHEDULE, DEFAULT_SPREAD, SCHEDULES
from streamprune.targets import BY, DEFAULT_CONTEXT, ENGINES, MTP, QUANTIZE, ROUNDING

_SIZE = re.compile(r"^\s*(\d{1,18}(?:\.\d{1,18})?)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)?\s*$", re.IGNORECASE)
PATH = click.Path(path_type=Path)
Option = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*options: Option) -> Option:
    """These options as one decorator. --help lists them in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


MODEL_OUTPUT = click.option("-o", "--output", required=True, type=PATH, help="Folder for the pruned model.")
KEEP_FILE = click.option(
    "--keep-file", type=PATH,
    help='The experts to keep, as JSON: lists by layer, {"0": [1, 5], …}, a list of such lists, or the '
    "streamprune.json of another model.",
)  # fmt: skip
DTYPE = click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
    help="The data type to compute in. auto: that of the weights, or float32 on a CPU that is slow in it.",
)  # fmt: skip

WEIGHTS_TYPE = WeightsChoice()
#: What schemes quantize, and for how many GPUs.
QUANTIZED = together(
    click.option(
        "--quantize", type=click.Choice(QUANTIZE),
        help="What is quantized: only the routed experts, or every linear layer but routers and the like.  "
        f"[default: {QUANTIZE[-1]}]",
    ),
    click.option(
        "--tensor-parallel", type=int, metavar="N",
        help="GPUs among which an engine will divide each weight: w4a16's groups must fit.  [default: 1]",
    ),
)  # fmt: skip
MTP_LAYERS = click.option(
    "--mtp", type=click.Choice(MTP), default=MTP[0], show_default=True,
    help="Layers for multi-token prediction (for speculative decoding): keep them, with as many experts, or drop them.",
)  # fmt: skip
#: How the output stores its weights.
WRITTEN_AS = together(
    click.option(
        "--weights", type=WEIGHTS_TYPE, default="source", show_default=True,
        help="How weights are written: as the source stores them; bf16: decoded, where it has them quantized; or "
        "quantized to 8 bits (fp8: blocks as DeepSeek's; fp8-dynamic and w8a16: compressed-tensors) or 4 (w4a16).",
    ),
    QUANTIZED,
    click.option(
        "--rounding", type=click.Choice(ROUNDING),
        help="How weights are rounded: each to the nearest value (rtn), or so that outputs on the calibration change "
        "least (gptq).  [default: gptq for w4a16, else rtn]",
    ),
    MTP_LAYERS,
)  # fmt: skip
SHARD_SIZE = click.option("--max-shard-size", default="5GB", show_default=True, help="Size of the largest output file.")
STOP_IF_KL = click.option(
    "--stop-if-kl", type=float, metavar="X",
    help="With --evaluate: fail if the KL divergence exceeds X nats per token. Aborts early if it is far above X.",
)  # fmt: skip
REVISION = click.option("--revision", help="Branch, tag or commit of a Hub model.")
TRUST_REMOTE_CODE = click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
QUIET = click.option("--quiet", is_flag=True, help="Print errors only.")
JSON_OBJECT = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
JSON_SUMMARY = click.option("--json", "as_json", is_flag=True, help="Print the final summary as JSON on stdout.")


def _method_meanings() -> str:
    """What every scoring method means, for --help. One with two names is there once, with both."""
    names: dict[Method, list[str]] = {}
    for name, method in METHODS.items():
        names.setdefault(method, []).append(name)
    return "; ".join(f"{' or '.join(each)}: {method.meaning}" for method, each in names.items())


#: How experts are scored and divided among the layers.
SELECTION = together(
    click.option(
        "--method", type=click.Choice(tuple(METHODS)), default=DEFAULT_METHOD, show_default=True,
        help=f"The score of an expert. {_method_meanings()}",
    ),
    click.option(
        "--mix", metavar="SOURCE=SHARE,…",
        help="Weights of the calibration's sources, e.g. code=0.5,general=0.5.  [default: by token counts]",
    ),
    click.option(
        "--schedule", metavar="|".join(SCHEDULES) + "|FILE", default=DEFAULT_SCHEDULE, show_default=True,
        help="How experts are divided among the layers. A JSON file lists a number for each layer.",
    ),
    click.option(
        "--spread", type=float,
        help=f"For the linear schedules: how much the removed share varies.  [default: {DEFAULT_SPREAD}]",
    ),
    click.option("--floor", type=int, metavar="N", help="Minimum experts per layer.  [default: what the router needs]"),
    click.option("--protect-super-experts", is_flag=True, help="Keep experts with extremely large outputs."),
)  # fmt: skip


class _Share(click.ParamType[float]):
    """A share of a whole: `1%`, or a number below 1."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a number."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            self.fail(f"{text} is not a share below 100%. Write for example 1%.", param, ctx)
        return share


#: How much text is used, instead of what the recipe says, and what of it may be bad.
SAMPLING = together(
    click.option(
        "--samples", type=int,
        help="Sequences to use; records, if the recipe only states records per source.  "
        f"[default: the recipe's, or {DEFAULT_SAMPLES}]",
    ),
    click.option(
        "--seq-len", type=int,
        help=f"Tokens per sequence.  [default: the recipe's, or {DEFAULT_SEQ_LEN}, or the model's limit]",
    ),
    click.option("--seed", type=int, help="Random seed for choosing the text.  [default: the recipe's, or 0]"),
    click.option(
        "--date", metavar="YYYY-MM-DD",
        help="The date for chat templates that write one.  [default: the day that the run began]",
    ),
    click.option(
        "--skip-bad", type=_Share(), metavar="SHARE", default=0.0,
        help="Pass over bad records, up to this share of a source, such as 1%.  [default: fail at the first]",
    ),
)  # fmt: skip
#: The text that a model is scored on.
CALIBRATION = together(
    click.option(
        "--calibration", multiple=True, default=("builtin",), show_default=True, metavar="RECIPE|FILE",
        help="A recipe; text, JSONL or parquet files or folders; or builtin:code,prose,… May be repeated.",
    ),
    SAMPLING,
)  # fmt: skip
ANCHOR = click.option(
    "--anchor", metavar="RECIPE|FILE|none",
    help="With --refit: text to fit to in addition to the calibration, as for --calibration.  "
    "[default: builtin if the calibration has one source, else none]",
)  # fmt: skip
CHANNELS = click.option(
    "--channels/--no-channels", default=True, show_default=True,
    help="Also score the channels of each expert, which makes the scores file larger.",
)  # fmt: skip
#: The model's origin, the output and the work folder.
PLACE = together(
    REVISION,
    TRUST_REMOTE_CODE,
    click.option("--overwrite", is_flag=True, help="Replace an existing output."),
    click.option("--work-dir", type=PATH, help="Folder for everything that resuming needs.  [default: OUT.work]"),
    click.option(
        "--resume", type=click.Choice(RESUME), default="auto", show_default=True,
        help="Resume an earlier run if there is one (auto), fail without one (required), or start over (never).",
    ),
)  # fmt: skip


def width_options(what: str) -> Option:
    """--width, --by and --width-multiple; `what` says what --by is about."""
    return together(
        click.option("--width", type=int, metavar="W", help="Channels to keep of every expert, alone or in addition."),
        click.option(
            "--by", type=click.Choice(BY), default="experts", show_default=True,
            help=f"{what}: whole experts, channels of every expert, or the same share of both.",
        ),
        click.option(
            "--width-multiple", type=int, metavar="N",
            help="With --by: what the width is a multiple of.  [default: 128, or 64, 32, … for narrow experts]",
        ),
    )  # fmt: skip


#: The memory that the model has to fit.
BUDGET = together(
    click.option("--budget-gib", type=float, metavar="G", help="Memory that the model may use, in GiB."),
    click.option("--gpu", metavar="NAME", help="A GPU instead of a budget, such as rtx-3090."),
    click.option(
        "--context",
        type=int,
        metavar="TOKENS",
        help=f"Tokens per sequence to plan for.  [default: {DEFAULT_CONTEXT}, or the most that the model can have]",
    ),
    click.option("--batch", type=int, default=1, show_default=True, help="Concurrent sequences to plan for."),
    click.option(
        "--kv-dtype",
        type=click.Choice(KV_DTYPES),
        default="auto",
        show_default=True,
        help="Data type of the KV cache; auto: the one that the model's config.json names, whatever --dtype is.",
    ),
)
#: The program that is to serve the result.
ENGINE = together(
    click.option(
        "--for", "for_engine", type=click.Choice(ENGINES),
        help="The program that will serve the result: what it cannot take is refused, what it takes slowly is noted.  "
        "[default: a note on what any of them cannot take]",
    ),
    click.option(
        "--round-for", "round_for", type=click.Choice(ENGINES),
        help="Round the number of experts down to one that this program takes best.",
    ),
)  # fmt: skip
GGUF = click.option(
    "--gguf", type=click.Choice(tuple(GGUF_TYPES), case_sensitive=False), metavar="Q4_K_M|Q5_K_M|…",
    help="Plan the memory for what llama.cpp quantizes the result to. (What is written stays safetensors.)  One of "
    f"{', '.join(GGUF_TYPES)}.",
)  # fmt: skip
#: The memory that the model has to fit, or how far to prune it.
TARGET = together(
    BUDGET,
    GGUF,
    click.option("--keep", type=int, help="Experts to keep in every layer, instead of a budget."),
    click.option("--ratio", type=float, help="Share of experts to remove, e.g. 0.5, instead of a budget."),
    width_options("What --ratio or a budget removes"),
    ENGINE,
)


def device_option(default: str | None = "auto") -> Option:
    """--device. `default=None` keeps the setting of the run that is resumed."""
    return click.option(
        "--device", metavar="auto|cpu|cuda:0", default=default, show_default=default is not None,
        help="The device to compute on.",
    )  # fmt: skip


def memory_options(states: str | None = "auto") -> Option:
    """Micro-batch size, place of the hidden states, memory limits. `states=None` keeps the resumed run's setting."""
    return together(
        click.option(
            "--batch-tokens", type=int,
            help="Largest micro-batch, in tokens.  [default: 4096 on a CPU, 32768 on a GPU; less if memory is short]",
        ),
        click.option(
            "--states", type=click.Choice(STATES), default=states, show_default=states is not None,
            help="Where hidden states are kept between layers: on the device, in RAM, or in a file.",
        ),
        click.option("--vram-gib", type=float, help="Limit of GPU memory.  [default: what is free]"),
        click.option("--ram-gib", type=float, help="Limit of RAM.  [default: what is available]"),
    )  # fmt: skip


def verify_option(default: bool | None) -> Option:
    """--verify. `default=None` keeps the setting of the run that is resumed."""
    return click.option(
        "--verify/--no-verify", default=default, show_default=default is not None,
        help="Compare the result with the source, byte by byte.",
    )  # fmt: skip


def report_option(default: bool | None = True) -> Option:
    """--report. `default=None` keeps the setting of the run that is resumed."""
    return click.option(
        "--report/--no-report", default=default, show_default=default is not None, envvar="STREAMPRUNE_REPORT",
        show_envvar=True, help="Make report.html in the output at the end.",
    )  # fmt: skip


def json_text(value: Any) -> str:
    """What `--json` prints."""
    return json.dumps(value, indent=2)


def say_loading(quiet: bool = False) -> None:
    """Print that libraries are loaded, if they are not yet: importing them takes seconds in which nothing else is said.

    Call it when everything is refused that needs none of them.
    """
    if not quiet and "torch" not in sys.modules:
        click.echo("loading torch and transformers ...", err=True)


def refuse_early(settings: RunSettings, quiet: bool) -> None:
    """Raise what can be refused before torch is imported."""
    # (Among several processes a refusal has to reach all.)
    if launched().count > 1:
        return
    from streamprune.pipeline import early

    if quiet and not Path(settings.model).expanduser().exists():
        quiet_downloads()
    early.refuse_early(settings)


def quiet_downloads() -> None:
    """Keep the Hub's progress bars off the terminal."""
    import huggingface_hub.utils

    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]


def quiet_libraries(downloads: bool) -> None:
    """Keep other libraries' warnings off the terminal, and with `downloads` also the Hub's progress bars."""
    import logging
    import warnings

    import transformers

    if downloads:
        quiet_downloads()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|torch)\b")


def parse_size(text: str) -> int:
    """Bytes in a size such as "5GB" (10⁹) or "4GiB" (2³⁰); a bare number is bytes. SettingsError otherwise."""
    match = _SIZE.match(text)
    if match is None:
        raise SettingsError(f"{text!r} is not a size. Write for example 5GB or 4GiB.")
    unit = (match.group(2) or "B").upper()
    base = 1024 if "I" in unit else 1000
    return int(float(match.group(1)) * base ** "BKMGT".index(unit[0]))
