"""Several real processes share a run: the same result as one alone, and one voice, whatever ends them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamprune.config import RunSettings
from streamprune.pipeline.run import run
from streamprune.saliency.scores import Scores
from streamprune.saliency.scores_file import read_scores
from tests.faults import Case, make_case
from tests.forked import Forked
from tests.helpers import read_tensors
from tests.launching import launch
from tests.thorough import mostly_thorough
from tests.tiny import make_model, write_token_ids

#: The same numbers, added up in another order.
CLOSE = 1e-12
#: Run first in every process: `before(rank, index, calls, ids)` is called before each micro-batch goes through a block.
WATCHED = """
import signal, time, torch
from streamprune.streaming.forward import LayerForward
usual, calls = LayerForward.run_layer, 0
def run_layer(self, index, block, ids, state):
    global calls
    calls += 1
    before(rank, index, calls, ids)
    return usual(self, index, block, ids, state)
LayerForward.run_layer = run_layer
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run with 31 and 10 micro-batches of two sources, each sent twice through each of four blocks."""
    case = make_case(tmp_path_factory.mktemp("made"), propagate="pruned", batch_tokens=48)
    write_token_ids(case.tokens, sequences=61)
    case.settings["calibration"] = (str(case.tokens), str(write_token_ids(case.tokens.with_name("more.jsonl"), 20)))
    shutil.rmtree(case.output)
    case.run()
    return case


def words(case: Case, *more: object) -> list[object]:
    given: list[object] = ["run", case.model, "-o", case.output, "--keep", 5, "--batch-tokens", 48]
    for source in case.settings["calibration"]:
        given += ["--calibration", source]
    return [*given, "--checkpoint-every", 0, "--propagate", "pruned", *more]


def check_same(case: Case, undisturbed: Case) -> None:
    """The same experts stay, to the byte, and their scores are the same but for the last digits."""
    report, expected = (json.loads((each.output / "streamprune.json").read_text()) for each in (case, undisturbed))
    assert [layer["kept"] for layer in report["layers"]] == [layer["kept"] for layer in expected["layers"]]
    before, after = read_tensors(undisturbed.output), read_tensors(case.output)
    assert before.keys() == after.keys()
    for path in sorted(undisturbed.output.glob("*.safetensors")):
        assert (case.output / path.name).read_bytes() == path.read_bytes()
    name = Path("scores") / "scores.safetensors"
    check_close(read_scores(case.output / name), read_scores(undisturbed.output / name))
    assert not case.work.exists()


def check_close(scores: Scores, expected: Scores) -> None:
    assert scores.sources == expected.sources
    assert scores.layer_indices == expected.layer_indices
    for layer, other in zip(scores.layers, expected.layers, strict=True):
        np.testing.assert_allclose(layer.values, other.values, rtol=CLOSE, atol=0)
        assert layer.channels is not None
        assert other.channels is not None
        # (Kept in float32.)
        np.testing.assert_allclose(layer.channels, other.channels, rtol=1e-6, atol=0)
    assert scores.provenance == expected.provenance


def test_torchrun_gives_the_scores_of_one_process(made: Case, tmp_path: Path) -> None:
    sources = made.settings["calibration"]
    alone = RunSettings(
        model=str(made.model), output=tmp_path / "alone", only_score=True, calibration=sources, batch_tokens=48
    )
    run(alone, quiet=True)
    given = ["--batch-tokens", 48, "--json"]
    for source in sources:
        given += ["--calibration", source]
    # The launcher is forked; those that it launches are interpreters of their own.
    torchrun = ["--standalone", "--nproc-per-node", 2, "-m", "streamprune"]
    two = Forked(
        "from torch.distributed.run import main; main()",
        [*torchrun, "score", made.model, "-o", "two", *given],
        tmp_path,
    )
    printed, told = two.communicate(timeout=300)
    assert two.returncode == 0, told
    assert told.count("loading torch and transformers ...\n") == 1
    (status, *texts), *others = launch(["score", made.model, "-o", "three", *given], [tmp_path] * 3).end()
    assert (status, others) == (0, [(0, "", "")] * 2), texts
    for count, name, out, err in ((2, "two", printed, told), (3, "three", *texts)):
        assert json.loads(out)["processes"] == count
        assert err.count("layer 0/3: scored 8") == 1
        check_close(read_scores(tmp_path / name), read_scores(tmp_path / "alone"))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{name}{suffix}" for name in ("alone", "two", "three") for suffix in ("", ".streamprune.log")}


def test_a_killed_process_ends_all_and_one_alone_goes_on(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    slow = "before = lambda *arguments: time.sleep(0.02)" + WATCHED
    started = launch(words(case), [tmp_path] * 2, slow)
    started.wait_for(case.work / "layers" / "00001.json")
    started.processes[1].kill()
    (status, _, told), (killed, *silent) = started.end()
    assert status == 1
    assert killed == -signal.SIGKILL
    assert silent == ["", ""]
    assert told.count("Error: ") == 1
    assert "One of the other 1 processes of this run ended without an error message" in told
    assert f"resume with: streamprune resume {case.work}" in told
    assert not case.output.exists()
    case.resume()
    check_same(case, made)


@pytest.mark.parametrize("asked", mostly_thorough([0, 1], (1,)))
def test_a_request_to_stop_is_honoured_within_a_block(made: Case, tmp_path: Path, asked: int) -> None:
    """A process asks itself to stop in the scoring pass of the second block, or in its pruned one."""
    case = made.at(tmp_path / "out")
    # (A process has 21 or 20 in a pass, which all take longer than the time between two questions to the others.)
    script = f"""
def before(rank, index, calls, ids):
    time.sleep(0.05)
    if rank == {asked} and calls == {46 + 17 * asked}:
        os.kill(os.getpid(), signal.SIGTERM)
"""
    script += WATCHED
    ended = launch(words(case), [tmp_path] * 2, script).end()
    assert [status for status, *_ in ended] == [75, 75], ended
    assert ended[1][1:] == ("", "")
    assert ended[0][2].count(f"Resume with: streamprune resume {case.work}") == 1
    assert "Error: " not in ended[0][2], "a stop that was asked for is no error"
    newest = json.loads((case.work / "cursor.json").read_text())
    facts = json.loads((case.work / "states" / str(newest["body"]["generations"][0]) / "index.json").read_text())
    facts = facts["body"]["facts"]
    assert facts["layer"] == 1
    assert facts["stage"] == ("score", "pruned")[asked]
    assert 0 < facts["done"] < len(facts["sizes"]), "the processes did not go on to the end of the block"
    if asked:
        case.resume()
    else:
        ended = launch(["resume", case.work], [tmp_path] * 2).end()
        assert [status for status, *_ in ended] == [0, 0], ended
    check_same(case, made)


def test_memory_that_runs_out_in_one_process(made: Case, tmp_path: Path) -> None:
    """Its micro-batches are cut; what is saved is still in the order of one process, which can go on."""
    case = made.at(tmp_path / "out")
    # One signal only: a second one, which rank 0 may reach while rank 1 is slower, ends the run at once.
    script = """
sent = []
def before(rank, index, calls, ids):
    if rank == 1 and index == 1 and len(ids) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    if rank == 0 and index == 2 and calls % 21 == 5 and not sent:
        sent.append(calls)
        os.kill(os.getpid(), signal.SIGTERM)
"""
    script += WATCHED
    ended = launch(words(case), [tmp_path] * 2, script).end()
    assert [status for status, *_ in ended] == [75, 75], ended
    summary = case.resume().summary
    assert summary["batch_tokens"] == 24
    report, expected = (json.loads((each.output / "streamprune.json").read_text()) for each in (case, made))
    assert [layer["counts"] for layer in report["layers"]] == [layer["counts"] for layer in expected["layers"]]
    assert [layer["kept"] for layer in report["layers"]] == [layer["kept"] for layer in expected["layers"]]


def test_a_refusal_is_told_once(made: Case, tmp_path: Path) -> None:
    given = ["score", made.model, "-o", "out", "--calibration", "missing.jsonl"]
    (status, out, told), *others = launch(given, [tmp_path] * 2).end()
    assert (status, out) == (1, "")
    assert told == (
        "Error: There is no calibration file missing.jsonl. Give a recipe, a text, JSON or parquet file, a folder of "
        "them, or builtin for built-in text.\n"
    )
    assert others == [(1, "", "")]
    assert list(tmp_path.iterdir()) == []


def test_what_only_another_process_can_know_is_told_with_its_name(made: Case, tmp_path: Path) -> None:
    """Here another model lies under the same name, as it may on another machine."""
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    shutil.copytree(made.model, folders[0] / "model")
    config: Any = __import__("transformers").AutoConfig.from_pretrained(made.model)
    make_model(folders[1] / "model", config, seed=1)
    given = ["score", "model", "-o", "out", "--quiet", "--calibration", made.tokens]
    (status, out, told), (other, *texts) = launch(given, folders).end()
    assert (status, out, told) == (1, "", "")
    assert other == 1
    assert texts[0] == ""
    assert texts[1].startswith("Error: process 1 of 0 to 1, on ")
    assert texts[1].endswith(
        "The files of model on this machine differ from those on the machine of rank 0. Copy them, or give a "
        "--revision.\n"
    )
    assert [path.name for folder in folders for path in folder.iterdir()] == ["model", "model"]
