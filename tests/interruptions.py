"""Commands of every kind to be interrupted: `score`, runs whose choice needs all layers, and `prune`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from streamprune.cli import main
from streamprune.config import PruneSettings, RunSettings
from streamprune.pipeline import prune as pruning
from streamprune.pipeline import run
from streamprune.work.folder import WorkFolder
from tests.faults import Case, Injected
from tests.helpers import known_family, tree_bytes
from tests.tiny import make_model, tiny_config, write_token_ids

#: Each kind, with its settings.
KINDS: dict[str, dict[str, Any]] = {
    "score": {"only_score": True},
    "global": {"keep": 5, "schedule": "global"},
    "protected": {"keep": 5, "protect_super_experts": True},
    "prune": {"keep": 5, "schedule": "linear-decrease"},
}


@dataclass(frozen=True)
class Command:
    """A command of one kind that writes to `output`, and what it gives undisturbed."""

    kind: str
    model: Path
    tokens: Path
    scores: Path
    output: Path
    expected: dict[str, bytes]

    @property
    def work(self) -> Path:
        return self.output.with_name(self.output.name + ".work")

    def at(self, output: Path) -> Command:
        """The same, with another output."""
        return replace(self, output=output)

    def run(self, **changes: Any) -> None:
        settings = {"model": str(self.model), "output": self.output, **KINDS[self.kind], **changes}
        if self.kind == "prune":
            pruning.prune(PruneSettings(**{"scores": self.scores, **settings}), quiet=True)
            return
        given = {"calibration": (str(self.tokens),), "batch_tokens": 24, "checkpoint_every": 0.0, **settings}
        run.run(RunSettings(**given), quiet=True)

    def resume(self, work: Path | None = None, **changes: Any) -> None:
        (pruning if self.kind == "prune" else run).resume(work or self.work, quiet=True, **changes)

    def words(self, *more: object) -> list[str]:
        """The command as it is typed."""
        name = {"score": "score", "prune": "prune"}.get(self.kind, "run")
        given: list[object] = [name, self.model, "-o", self.output, "--quiet", *more]
        for option, value in KINDS[self.kind].items():
            if option != "only_score":
                given += [f"--{option.replace('_', '-')}", *([] if value is True else [value])]
        given += (
            ["--scores", self.scores]
            if self.kind == "prune"
            else ["--calibration", self.tokens, "--batch-tokens", 24, "--checkpoint-every", 0]
        )
        return [str(word) for word in given]

    def found(self) -> dict[str, bytes]:
        """The files of the result; none where there is none."""
        if self.output.is_file():
            return {"scores": self.output.read_bytes()}
        return tree_bytes(self.output) if self.output.is_dir() else {}

    def check(self) -> None:
        """The result is to the byte that of an undisturbed command, and nothing else is left."""
        found = self.found()
        assert sorted(found) == sorted(self.expected)
        assert [name for name in found if found[name] != self.expected[name]] == []
        left = {path.name for path in self.output.parent.iterdir() if path.name.startswith(self.output.name)}
        assert left - {self.output.name + ".streamprune.log"} == {self.output.name}

    def interrupt(self, at: int, **changes: Any) -> None:
        """Run until the `at`-th record of a block (from 1) is to be written, and end there without any warning."""
        with breaking_at(at), pytest.raises(Injected):
            self.run(**changes)


def make_commands(folder: Path, blocks: int = 4) -> dict[str, Command]:
    """Commands of every kind for one small model; the scores that `prune` takes are those that `score` gives."""
    config = tiny_config(known_family("qwen3_moe"))
    config.num_hidden_layers = blocks
    model = make_model(folder / "model", config)
    tokens = write_token_ids(folder / "ids.jsonl")
    commands = {}
    for kind in KINDS:
        # The scores' file is the first result, and comes first in KINDS.
        command = Command(kind, model, tokens, folder / "undisturbed-score", folder / f"undisturbed-{kind}", {})
        command.run()
        commands[kind] = replace(command, expected=command.found())
    return commands


@contextmanager
def breaking_at(record: int) -> Iterator[None]:
    """Raise Injected when the `record`-th record of a block is to be written."""
    usual, calls = WorkFolder.write_layer, 0

    def write_layer(self: WorkFolder, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == record:
            raise Injected
        usual(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "write_layer", write_layer)
        yield


@contextmanager
def ending_at(point: str) -> Iterator[None]:
    """End a command when it comes to a critical point, as a kill would: nothing is tidied up."""

    def reached(name: str) -> None:
        if name == point:
            raise Injected

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("streamprune.") and hasattr(module, "kill_point"):
                patch.setattr(module, "kill_point", reached)
        if not point.startswith("work folder"):
            patch.setattr(WorkFolder, "remove", lambda self: None)
        with pytest.raises(Injected):
            yield


def call(*arguments: object) -> Result:
    """The command line's answer."""
    return CliRunner().invoke(main, list(map(str, arguments)))


def status(command: Command | Case) -> dict[str, Any]:
    """What `status --json` says of a command's work folder."""
    told = call("status", command.work, "--json")
    assert told.exit_code == 0, told.stderr
    value = json.loads(told.stdout)
    assert isinstance(value, dict)
    return value
