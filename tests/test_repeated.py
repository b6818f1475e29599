"""The same command again, whatever was killed when: a finished output is recognised, checked and kept, or refused."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest

from streamprune.cli import main
from streamprune.common_settings import OutputSettings
from streamprune.config import PruneSettings, RunSettings, SearchSettings
from streamprune.errors import OutputError, VerifyError
from streamprune.streaming.layer_loop import LayerLoop
from streamprune.work.records import RecordedCalibration, RecordedPruning, RecordedRun, command_of
from tests.faults import Case, Injected, make_case
from tests.interruptions import Command, call, ending_at

AGAIN = r"was damaged since it was made\. To make it again, add --overwrite"
#: What a command still does once its output is in place.
LAST_POINTS = ("output renamed", "result printed", "work folder emptied", "work folder removed")


@pytest.fixture(scope="module")
def refitted(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run that refits, and measures on held-out text."""
    folder = tmp_path_factory.mktemp("refitted")
    return make_case(folder, blocks=2, sequences=30, refit=True, anchor="none", evaluate=True)


def broken(*_: object) -> None:
    """In the place of what computes a layer."""
    raise Injected


@pytest.mark.parametrize("point", LAST_POINTS)
@pytest.mark.parametrize("kind", ["score", "global", "prune"])
def test_the_same_command_ends_well_after_its_output_is_in_place(
    short: dict[str, Command], tmp_path: Path, kind: str, point: str
) -> None:
    command = short[kind].at(tmp_path / "out")
    with ending_at(point):
        command.run()
    assert command.found() == command.expected
    for _ in range(2):
        done = call(*[word for word in command.words() if word != "--quiet"], "--json")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["complete"] is True
        assert f"{command.output} is finished already" in done.stderr
        assert ("verified: " in done.stderr) == (kind == "global"), "as each does by default"
        command.check()
    redo = ["--from-layer", "1"]
    # (`prune` has no --from-layer.)
    for words in (["resume", command.work], *([command.words()] if kind != "prune" else [])):
        refused = call(*words, *redo)
        assert refused.exit_code == 1
        assert f"{command.output} exists, and --from-layer redoes layers of an unfinished run" in refused.stderr
        assert "with --overwrite instead" in refused.stderr
    gone = call("resume", command.work)
    assert gone.exit_code == 0, gone.stderr
    assert f"Nothing is left to resume: {command.work} is gone, and {command.output} is complete." in gone.stderr


def test_a_killed_command_that_was_to_replace_is_not_done_twice(
    short: dict[str, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = short["global"].at(tmp_path / "out")
    with ending_at("output renamed"):
        command.run(overwrite=True)
    monkeypatch.setattr(LayerLoop, "run_layer", broken)
    command.run(overwrite=True)
    command.check()
    with pytest.raises(Injected):
        # Nothing says that this one was interrupted: it is to be made again.
        command.run(overwrite=True)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("global", {"method": "frequency"}, "settings.method: 'reap' there, 'frequency' now"),
        ("global", {"keep": 4}, "settings.total: "),
        ("global", {"samples": 2}, "calibration.tokens: "),
        ("global", {"context": 77}, "use.context: 256 there, 77 now"),
        ("score", {"channels": False}, "settings.channels: True there, False now"),
        ("prune", {"max_shard_bytes": 10**6}, "settings.max_shard_bytes: "),
    ],
)
def test_an_output_that_was_made_otherwise_is_refused_and_the_difference_named(
    short: dict[str, Command], kind: str, changes: dict[str, object], named: str
) -> None:
    command = short[kind]
    with pytest.raises(OutputError) as refused:
        command.run(**changes)
    said = str(refused.value)
    assert " exists" in said.splitlines()[0]
    assert "add --overwrite" in said.splitlines()[0]
    assert named in said
    assert "layers[" not in said, "what follows from it is not listed"
    assert command.found() == command.expected


def test_a_refitted_and_measured_run_is_recognised(refitted: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerLoop, "run_layer", broken)
    done = refitted.run(stop_if_kl=100.0)
    assert done.summary["complete"] is True
    assert done.summary["evaluation"]["all"]["kl"] > 0
    for changes, named in (
        ({"refit": False, "anchor": None}, "refit: "),
        ({"evaluate": False}, "calibration.held_back.tokens: "),
        ({"evaluate": True, "stop_if_kl": 1e-9}, "above --stop-if-kl 1e-09"),
    ):
        with pytest.raises(OutputError) as refused:
            refitted.run(**changes)
        assert named in str(refused.value)
    refitted.check()


def test_a_damaged_output_is_not_called_finished(short: dict[str, Command], tmp_path: Path) -> None:
    command = short["global"].at(tmp_path / "out")
    command.run()
    shard = next(command.output.glob("model-00002*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerifyError, match=AGAIN):
        command.run()
    command.run(verify=False)
    shard.write_bytes(data[:-1])
    with pytest.raises(VerifyError, match=AGAIN):
        command.run(verify=False)


@pytest.mark.parametrize("made_with", [False, True])
def test_resume_keeps_whether_a_report_is_made(
    short: dict[str, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_with: bool
) -> None:
    monkeypatch.delenv("STREAMPRUNE_REPORT")
    made: list[Path] = []
    commands = importlib.import_module("streamprune.cli.run")
    monkeypatch.setattr(commands, "report_after", lambda output, quiet: made.append(output))
    command = short["prune"].at(tmp_path / "out")
    for words, with_report in (([], made_with), (["--no-report"], False), (["--report"], True)):
        command.interrupt(at=3, report=made_with)
        assert call("resume", command.work, *words).exit_code == 0
        assert made == ([command.output] if with_report else [])
        made.clear()
        shutil.rmtree(command.output)


#: Options that are no settings of the run: what is printed, or whether anything is done at all. (`--best` is a search
#: and a run, each with its settings.)
NOT_RECORDED = {"quiet", "as_json", "dry_run", "best"}
RECORDED_AS = {"max_shard_size": "max_shard_bytes"}


@pytest.mark.parametrize(
    ("command", "kind"),
    [("run", RunSettings), ("score", RunSettings), ("prune", PruneSettings), ("search", SearchSettings)],
)
def test_every_option_is_recorded(command: str, kind: type[OutputSettings]) -> None:
    recorded = {field.name for field in dataclasses.fields(kind)}
    for option in main.commands[command].params:
        assert option.name is not None
        assert option.name in NOT_RECORDED or RECORDED_AS.get(option.name, option.name) in recorded, option.name


SETTINGS: list[OutputSettings] = [
    RunSettings(
        model="m", output=Path("/out"), ratio=0.25, calibration=("builtin", "ultrachat"), samples=9, seq_len=77, seed=3,
        revision="r", overwrite=True, verify=False, report=False, max_shard_bytes=10**6, device="cpu", dtype="float32",
        batch_tokens=24, states="disk", ram_gib=5.5, method="frequency", mix="a=0.5,b=0.5", spread=0.3, floor=2,
        schedule="linear-decrease", protect_super_experts=True, checkpoint_every=3.0, evaluate=True, stop_if_kl=0.5,
        refit=True, anchor="none", imatrix=Path("/matrix.gguf"), weights="w4a16", quantize="experts", tensor_parallel=2,
    ),
    PruneSettings(model="m", output=Path("/out"), scores=Path("/s"), width=16, report=False, verify=True,
        for_engine="vllm", round_for="sglang"),
    SearchSettings(model="m", output=Path("/out"), gpu="rtx-3090", candidates=("keep=3", "keep=4"), drop_above=3.0),
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: type(each).__name__)
def test_a_record_gives_the_same_settings(settings: OutputSettings, tmp_path: Path) -> None:
    command = json.loads(json.dumps(command_of(settings)))
    assert command.keys() == {field.name for field in dataclasses.fields(settings)}
    recorded: RecordedRun | RecordedPruning
    recorded = RecordedPruning(command=command, layers=1, decided={})
    if isinstance(settings, RunSettings):
        text = RecordedCalibration("", 0, 0, [], [], {}, [])
        recorded = RecordedRun(
            command=command, layers=1, settings={}, source="", files={}, calibration=text, versions={}, batch_tokens=1
        )
    assert recorded.settings_in(tmp_path) == dataclasses.replace(settings, resume="required")
