"""The settings that several commands share: text, output, device and memory, with their defaults.

Each class raises SettingsError for values that are impossible whatever the model and the machine.
"""

from __future__ import annotations

import datetime
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from streamprune.errors import SettingsError
from streamprune.files.names import LONGEST_NAME, sibling_path
from streamprune.quantize.schemes import SCHEMES
from streamprune.targets import MTP, Storage, check_choice, check_least

DTYPES = ("auto", "bfloat16", "float16", "float32")
STATES = ("auto", "device", "ram", "disk")
RESUME = ("auto", "required", "never")
#: The work folder is named like the output, with this suffix.
WORK_SUFFIX = ".work"
#: Enough for a first result; the published REAP runs use 512 to 1,024 sequences of 2,048 tokens.
DEFAULT_SAMPLES = 512
DEFAULT_SEQ_LEN = 2048
#: Tokens that go through a layer at a time, by kind of device, where memory allows. Enough to keep the matrix products
#: large, and on a GPU to read the weights seldom. Of 1,024, 2,048, 4,096 and 8,192 on a CPU, tools/bench's
#: `mid` shape is fastest with the last two, of which 4,096 takes 200 MiB less.
DEFAULT_BATCH_TOKENS = {"cpu": 4096, "gpu": 32768}
#: Tokens that keep the device busy: hidden states move to slower memory before micro-batches get smaller than this.
COMFORTABLE_BATCH_TOKENS = {"cpu": 1024, "gpu": 8192}
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
