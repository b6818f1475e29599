"""A path that is not what a command expects: the message says what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from streamprune.checkpoint.index import CONFIG_NAME
from streamprune.cli import main
from streamprune.files import kinds
from streamprune.output.plan import REPORT_NAME
from streamprune.output.search_folder import SEARCH_NAME
from streamprune.quantize.imatrix import Imatrix, ImatrixText, InputSquares
from streamprune.saliency.scores_file import SCORES_NAME
from streamprune.work.folder import LOCK_NAME

IMATRIX = "imatrix.gguf"
#: What is in each folder, and what a message says of it.
FOLDERS = {
    "work": ([LOCK_NAME], "is a work folder of streamprune"),
    "pruned": ([REPORT_NAME, CONFIG_NAME], "is a model that streamprune wrote"),
    "search": ([SEARCH_NAME], "is a folder that `streamprune search` wrote"),
    "scores": ([SCORES_NAME], "is a folder of scores"),
    "model": ([CONFIG_NAME], "is a model that streamprune did not write"),
    "gguf": (["model-Q4_K_M.gguf"], "has the model as GGUF, for llama.cpp"),
    "matrix": ([IMATRIX], "has an importance matrix for llama.cpp's llama-quantize, and no model"),
    "adapter": (["adapter_config.json"], "has an adapter (LoRA)"),
    "other": (["notes.txt"], "has no file that streamprune knows"),
    "empty": ([], "is an empty folder"),
}


def imatrix_bytes(path: Path) -> bytes:
    """An importance matrix, as `run --imatrix` writes it."""
    squares = InputSquares(np.ones((2, 32), np.float32), np.array([3, 5]))
    Imatrix({"blk.0.ffn_down_exps.weight": squares}, ()).write(path, ImatrixText(("text",), 1, 8))
    return path.read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, matrix = tmp_path_factory.mktemp("kinds"), imatrix_bytes(tmp_path_factory.mktemp("matrix") / IMATRIX)
    for name, (files, _) in FOLDERS.items():
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).write_bytes(matrix if file == IMATRIX else b"{}")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "notes.txt").write_text("a file, and no folder")
    return folder


def test_what_lies_at_a_path(place: Path) -> None:
    for name, (_, words) in FOLDERS.items():
        assert kinds.describe(place / name).startswith(words)
    assert kinds.describe(place / "model.gguf") == kinds.GGUF_TEXT
    assert kinds.describe(place / "matrix" / IMATRIX).startswith(FOLDERS["matrix"][1])
    assert kinds.describe(place / "notes.txt") == "is a file"
    assert kinds.describe(place / "nowhere") == "does not exist"


@pytest.mark.parametrize(
    ("words", "name", "message"),
    [
        (["verify", "{}", "--source", "org/never-asked-for"], "model", "nothing to verify: {} is a model that streamp"),
        (["verify", "{}", "--source", "org/never-asked-for"], "scores", "nothing to verify: {} is a folder of scores"),
        (["verify", "{}", "--source", "org/never-asked-for"], "nowhere", "nothing to verify: {} does not exist"),
        (["clean", "{}"], "nowhere", "Nothing was removed: {} does not exist. The work folder of an unfinished run is"),
        (["clean", "{}"], "pruned", "Nothing was removed: {} is a model that streamprune wrote. The work folder of an"),
        (["clean", "{}"], "matrix", "Nothing was removed: {} has an importance matrix for llama.cpp's llama-quantize"),
        (["status", "{}"], "scores", "{} has no run of streamprune: it is a folder of scores. The work folder of an u"),
        (["resume", "{}"], "pruned", "{} has no run to resume: it is a model that streamprune wrote. The work folder "),
        (["report", "{}"], "model", "says how a model was pruned: it is a model that streamprune did not write"),
        (["inspect", "{}"], "model", "from '{}': it is a model that streamprune did not write (it has no streamprune."),
        (["inspect", "{}"], "empty", "from '{}': it is an empty folder, without scores.safetensors. Give the file tha"),
        (["prune", "m", "-o", "o", "--keep", "4", "--scores", "{}"], "nowhere", "from '{}': it does not exist. Give t"),
        (["prune", "m", "-o", "o", "--keep", "4", "--scores", "{}"], "notes.txt", "{}: no safetensors file, or damage"),
        (["fit", "{}", "--budget-gib", "9"], "gguf", "config.json is missing: the folder has the model as GGUF, for l"),
        (["fit", "{}", "--budget-gib", "9"], "model.gguf", "{} has the model as GGUF, for llama.cpp, instead of the s"),
        (["fit", "{}", "--budget-gib", "9"], "adapter", "has an adapter (LoRA), which has to be merged into its model"),
    ],
    ids=lambda value: value if isinstance(value, str) and "{" not in value else "",
)  # fmt: skip
def test_messages_say_what_is_there(words: list[str], name: str, message: str, place: Path) -> None:
    path = str(place / name)
    result = CliRunner().invoke(main, [word.replace("{}", path) for word in words])
    assert result.exit_code == 1, result.output
    assert message.replace("{}", path) in result.stderr
    assert result.stderr.startswith("Error: ")
