"""What a check of a GPU measures with: its numbers, its deadline, and the checkpoint that all parts share."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring.extrapolation import UNCOUNTED
from measuring.processes import Job, ProcessError, work
from measuring.shapes import INDEX, config_of, is_built, weight_files, write_tokens

GIB = 2**30
#: What streamprune writes has this name, or begins with it.
OUTPUT = "output"
#: Seconds below which nothing is started any more.
LEAST_SECONDS = 0.5
#: Folders of models that are made of the checkpoint.
FEW_LAYERS, FP8 = "few-layers", "model-fp8"


@dataclass(frozen=True)
class Check:
    """What is checked: a shape with so many layers, on a device, with a folder for what is built, until a deadline.

    `deadline` is of time.monotonic. The numbers of sequences are those of the parts: `samples` of score, the others of
    what they are named after.
    """

    shape: str
    layers: int
    samples: int
    run_samples: int
    bench_samples: int
    ram_samples: int
    fit_samples: int
    more_samples: int
    seq_len: int
    forward_batch: int
    device: str
    vram_gib: float | None
    states: str
    budget_gib: float | None
    context: int
    folder: Path
    deadline: float

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to look at; the CPU only tries the parts out."""
        return self.device != "cpu"

    @property
    def left(self) -> float:
        """Seconds until the deadline. Raises ProcessError when there are none."""
        seconds = self.deadline - time.monotonic()
        if seconds < LEAST_SECONDS:
            raise ProcessError("the time is over: raise --total-seconds, or give fewer --layers, --samples or --parts")
        return seconds

    def job(self, kind: str, samples: int | None = None, model: Path | None = None) -> Job:
        """A job with so many sequences (by default those of score), on a model or on the checkpoint."""
        samples, model = samples or self.samples, model or self.model()
        tokens = self.folder / f"tokens-{samples}x{self.seq_len}.jsonl"
        if not tokens.is_file():
            part = tokens.with_suffix(".part")
            write_tokens(part, samples, self.seq_len, config_of(self.shape)["vocab_size"])
            part.rename(tokens)
        # What a part that was cut off began would be gone on with, and so seem to take no time.
        self.clear()
        places = {"vram_gib": self.vram_gib, "states": self.states, "batch": self.forward_batch}
        return Job(kind, model, tokens, self.folder / OUTPUT, self.device, **places)  # type: ignore[arg-type]

    def model(self) -> Path:
        """The folder of the checkpoint, built unless it is there."""
        config, model = config_of(self.shape, self.layers), self.folder / "model"
        if is_built(model, config):
            return model
        begun = time.monotonic()
        for made in (model, self.folder / FEW_LAYERS, self.folder / FP8):
            shutil.rmtree(made, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("once-read-*.json"):
            path.unlink()
        given = self.folder / "config.json"
        given.write_text(json.dumps(config))
        work(Job("build", model, given, model, self.device), self.left)
        size = sum(path.stat().st_size for path in weight_files(model))
        built = {"seconds": round(time.monotonic() - begun, 1), "gib": round(size / GIB, 2)}
        (self.folder / "built.json").write_text(json.dumps(built))
        print(
            f"checkpoint: {self.layers} layers of {self.shape}, {built['gib']} GiB in {built['seconds']} s", flush=True
        )
        return model

    def built(self) -> dict[str, Any]:
        """What building the checkpoint took, by the name `checkpoint`; nothing where none was built."""
        path = self.folder / "built.json"
        return {"checkpoint": json.loads(path.read_text())} if path.is_file() else {}

    def few_layers(self) -> Path:
        """The first layers of the checkpoint, so many that one counts, as a model of their own: links to its files."""
        model, few = self.model(), self.folder / FEW_LAYERS
        layers = min(self.layers, UNCOUNTED + 1)
        config = config_of(self.shape, layers)
        if is_built(few, config):
            return few
        shutil.rmtree(few, ignore_errors=True)
        few.mkdir()
        index = json.loads((model / INDEX).read_text())
        # The first file is what lies around the layers.
        files = {path.name for path in weight_files(model)[: 1 + layers]}
        for name in files:
            (few / name).symlink_to(model / name)
        (few / "config.json").write_text(json.dumps(config))
        names = {name: file for name, file in index["weight_map"].items() if file in files}
        (few / INDEX).write_text(json.dumps({**index, "weight_map": names}))
        return few

    @contextmanager
    def in_fp8(self) -> Iterator[Path]:
        """`few_layers` with its matrices in FP8, which is removed again."""
        quantized = self.folder / FP8
        shutil.rmtree(quantized, ignore_errors=True)
        nothing = self.folder / "none"
        try:
            work(Job("quantize", self.few_layers(), nothing, quantized, self.device), self.left)
            yield quantized
        finally:
            shutil.rmtree(quantized, ignore_errors=True)

    def once(self, job: Job, kind: str) -> dict[str, Any]:
        """The figures of a job that is measured once for all parts; one that reads, once for each model."""
        name = f"{kind}-{job.model.name}" if kind == "read" else kind
        saved = self._saved_once(name)
        if saved.is_file():
            return dict(json.loads(saved.read_text()))
        found = work(replace(job, kind=kind), self.left)
        self.remember(name, found)
        return found

    def remember(self, kind: str, found: dict[str, Any]) -> None:
        """Let `once` give these figures from now on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._saved_once(kind).write_text(json.dumps(found))

    def _saved_once(self, name: str) -> Path:
        return self.folder / f"once-{name}-{self.device.replace(':', '-')}.json"

    def clear(self) -> None:
        """Remove what streamprune has written: outputs, their work folders and their logs."""
        for path in self.folder.glob(f"{OUTPUT}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
