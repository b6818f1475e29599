"""What is refused before torch is imported, and what is said while nothing else is."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import streamprune.demo
from streamprune import progress
from streamprune.errors import SettingsError
from streamprune.evaluation.task_names import refuse_tasks
from streamprune.progress import LayerProgress, Progress, stage

MODEL = Path(streamprune.demo.__path__[0]) / "trained" / "model"
#: Commands without their model and output, and what their refusal says.
REFUSED = [
    ("run NOWHERE -o OUT --keep 3", "NOWHERE"),
    ("run MODEL -o OUT --keep 3 --no-such-option", "No such option"),
    ("run MODEL -o OUT --keep 3 --ratio 0.5", "Say in one way how far to prune"),
    ("run MODEL -o OUT --keep 33", "the model has 32 experts per layer, so nothing would be removed"),
    ("run MODEL -o OUT --ratio 0.99", "but the router picks 4 experts per token"),
    ("run MODEL -o OUT --gpu no-such-gpu", "no-such-gpu"),
    ("run MODEL -o OUT --keep 8 --calibration NOWHERE.txt", "There is no calibration file NOWHERE.txt"),
    ("run MODEL -o OUT --keep 8 --calibration builtin:nonsense", "unknown domain 'nonsense'"),
    ("run MODEL -o OUT --keep 8 --mix nonsense=1", "there is no source 'nonsense'. The calibration has: code, prose"),
    ("run MODEL -o MODEL/out --keep 8", "must not be, or contain, one another"),
    ("run MODEL -o MODEL/out --keep 8 --dry-run", "must not be, or contain, one another"),
    ("score NOWHERE -o OUT", "NOWHERE"),
    ("score MODEL -o OUT --calibration NOWHERE.txt", "There is no calibration file NOWHERE.txt"),
    ("search MODEL -o OUT --budget-gib 1 --calibration NOWHERE.txt", "There is no calibration file NOWHERE.txt"),
    ("prune MODEL -o OUT --scores NOWHERE --keep 3", "NOWHERE"),
    ("eval NOWHERE --data FILE", "NOWHERE"),
    ("eval MODEL --against NOWHERE --data FILE", "NOWHERE"),
    ("eval MODEL --data NOWHERE.txt", "There is no calibration file NOWHERE.txt"),
    ("eval MODEL --generate --prompts NOWHERE.jsonl", "The prompts NOWHERE.jsonl cannot be read: No such file"),
    ("eval MODEL --tasks hellaswag,no-such-task", "knows no task, group or tag named no-such-task. "),
    ("fit NOWHERE --gpu rtx-3090", "NOWHERE"),
    ("fit MODEL --gpu rtx-3090 --keep 33", "choose from 4 to 32"),
    ("calibration show NOWHERE.txt --model MODEL", "There is no calibration file NOWHERE.txt"),
    ("calibration show builtin --model NOWHERE", "NOWHERE"),
    ("verify NOWHERE --source MODEL", "NOWHERE"),
    ("resume NOWHERE.work", "NOWHERE.work"),
]
CALL = """
import json, sys
from click.testing import CliRunner
from streamprune.cli import main
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(main, words)
    loaded = [name for name in ("torch", "transformers") if name in sys.modules]
    print(json.dumps([done.exit_code, done.output, loaded]), flush=True)
    if loaded:
        break
"""


def test_what_needs_no_torch_is_refused_without_it(tmp_path: Path) -> None:
    if not MODEL.is_dir():
        pytest.skip("the demo's model is not there")
    (tmp_path / "file.txt").write_text("text")
    places = {"MODEL": MODEL, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "nowhere", "FILE": tmp_path / "file.txt"}

    def filled(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    commands = [[filled(word) for word in words.split()] for words, _ in REFUSED]
    done = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps(commands)], capture_output=True, text=True, check=False, timeout=300
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (words, said), (status, output, loaded) in zip(REFUSED, answers, strict=False):
        assert loaded == [], words
        assert status in (1, 2), f"{words}: {output}"
        assert filled(said) in output, words
        assert "Traceback" not in output
        assert "loading" not in output, words
    assert len(answers) == len(REFUSED), done.stderr


def test_tasks_that_only_a_file_without_a_suffix_names_are_known(tmp_path: Path) -> None:
    """Such as mgsm_cot_native: a tag in a file that the tasks' files include."""
    pytest.importorskip("lm_eval")
    (tmp_path / "mine.yaml").write_text("include: base_yaml\ntask: mine\n")
    (tmp_path / "base_yaml").write_text("tag: my_tag\n")
    refuse_tasks(["my_tag", "mgsm_cot_native"], tmp_path)
    with pytest.raises(SettingsError, match="tag named my_other"):
        refuse_tasks(["my_tag", "my_other"], tmp_path)


def test_a_stage_says_what_it_is_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    said, heard = list[str](), threading.Event()

    def say(line: str) -> None:
        said.append(line)
        heard.set()

    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    with stage(say, "reading the text"):
        # Ends when it was said, and not at all if it never is.
        assert heard.wait(60)
    assert said == ["reading the text ..."]


def test_a_stage_that_is_over_at_once_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(progress, "SILENT_SECONDS", 1e6)
    with stage(said.append, "reading the text"):
        pass
    assert said == []


def test_the_time_left_is_that_of_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    shown = Progress(5, quiet=False, stream=stream)
    # An hour of downloads; a run that goes on at layer 1; and a second sweep over all layers.
    for layer, at in ((1, 3610.0), (2, 3632.0), (0, 3700.0)):
        now = at
        shown.end_layer(LayerProgress(layer, None, 0, None, 10.0, 0))
    assert [line.rsplit(", ", 1)[1] for line in stream.getvalue().splitlines()] == [
        "30 s left",
        "32 s left",
        "40 s left",
    ]
