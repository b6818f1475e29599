"""The same command again, whatever was killed when: a finished output is recognised, checked and kept, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamprune.errors import OutputError, VerifyError
from streamprune.streaming.layer_loop import LayerLoop
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
        ("global", {"context": 77}, "use.context: 32768 there, 77 now"),
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
