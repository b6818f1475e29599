"""Resuming: the same bytes from any block, by any command; and refusing where they would not be the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from streamprune.errors import InterruptedRunError, ResumeError, SettingsError
from streamprune.saliency.scores import unpack_channels
from streamprune.saliency.scores_file import read_scores
from streamprune.streaming.forward import LayerForward
from tests.faults import Case, make_case
from tests.helpers import tree_bytes
from tests.thorough import crossed, mostly_thorough, thorough
from tests.tiny import write_token_ids


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("made"))


@pytest.fixture
def case(made: Case, tmp_path: Path) -> Case:
    """A run that was interrupted in the middle, on a copy of the model that may be changed."""
    model = Path(shutil.copytree(made.model, tmp_path / "model"))
    tokens = Path(shutil.copy(made.tokens, tmp_path / "ids.jsonl"))
    case = Case(model, tokens, tmp_path / "out", made.settings, made.expected)
    case.interrupt(at=2)
    return case


@pytest.mark.parametrize(
    ("again", "block"), crossed(["run", "resume"], range(4), usual=[("run", 1), ("resume", 0), ("resume", 3)])
)
def test_a_run_that_ended_in_any_block_goes_on(made: Case, tmp_path: Path, block: int, again: str) -> None:
    case = made.at(tmp_path / "out")
    case.interrupt(at=block)
    if block == 0 and again == "resume":
        with pytest.raises(ResumeError, match="has no run to resume"):
            case.resume()
        assert not case.work.exists(), "nothing was done, so that nothing is left"
        return
    getattr(case, again)()
    case.check()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("gemma4_text", {"checkpoint_every": 1e6}, marks=thorough),
        ("gemma4_text", {"states": "disk"}),
        ("deepseek_v2", {"checkpoint_every": 1e6, "propagate": "pruned", "keep": 4}),
        pytest.param("glm4_moe", {"checkpoint_every": 1e6}, marks=thorough),
        pytest.param("gpt_oss", {"propagate": "pruned"}, marks=thorough),
    ],
)
def test_what_is_carried_from_block_to_block_is_carried_on(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    case = make_case(tmp_path, family, **settings)
    for block in (1, 3):
        case = case.at(tmp_path / f"out-{block}")
        case.interrupt(at=block)
        case.resume()
        case.check()


@pytest.mark.parametrize("micro_batch", [2, 7, 11])
def test_the_sums_of_a_layer_go_on_where_they_were(tmp_path: Path, micro_batch: int) -> None:
    """Two sources with four micro-batches each; the run is stopped within a layer, between the sources and beyond."""
    first, *others = (write_token_ids(tmp_path / f"{name}.jsonl", seed=seed) for name, seed in (("a", 5), ("b", 6)))
    case = make_case(tmp_path, blocks=2, calibration=(str(first), *map(str, others)), checkpoint_every=1e6)
    stopped, usual, calls = case.at(tmp_path / "out"), LayerForward.run_layer, 0

    def run_layer(self: LayerForward, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == micro_batch:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerForward, "run_layer", run_layer)
        with pytest.raises(InterruptedRunError):
            stopped.run()
    (states,) = (stopped.work / "states").iterdir()
    facts = json.loads((states / "index.json").read_text())["body"]["facts"]
    sums = unpack_channels(facts["channels"], (2, 8, 32), "f8")
    assert sums.any(axis=(1, 2)).tolist() == [True, facts["done"] > 4], "the second source comes after the first"
    stopped.resume()
    stopped.check()
    (layer, _) = read_scores(stopped.output).layers
    assert layer.channels is not None
    assert layer.channels.shape == (2, 8, 32)
    assert ((layer.channels > 0).any(axis=2) == (layer.fields["tokens"] > 0)).all()


def test_several_interruptions(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    for block in (1, 1, 2, 3):
        case.interrupt(at=block)
    case.run(resume="required")
    case.check()


@pytest.mark.parametrize("first", mostly_thorough(range(4), (0, 2)))
def test_from_layer_goes_back(case: Case, first: int) -> None:
    case.interrupt(at=3)
    (case.work / "layers" / f"{first:05d}.json").unlink(missing_ok=True)
    case.resume(from_layer=first)
    case.check()


def test_from_layer_behind_the_last_block_is_refused(case: Case) -> None:
    with pytest.raises(SettingsError, match=r"--from-layer 4: the model's layers are 0 to 3\."):
        case.resume(from_layer=4)
    case.resume()
    case.check()


def test_required_and_never(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"has no run to resume\. Omit --resume required"):
        case.at(tmp_path / "other").run(resume="required")
    assert not (tmp_path / "other.work").exists()
    # Another calibration: what is left of the first run would not go with it.
    write_token_ids(case.tokens, seed=9)
    with pytest.raises(ResumeError, match="calibration: 96 tokens then, 96 now, with other contents"):
        case.run()
    case.run(resume="never")
    assert tree_bytes(case.output) != case.expected
    assert not case.work.exists()


CHANGED = [
    ({"keep": 4}, "experts kept: 5 per layer then, 4 per layer now"),
    ({"keep": None, "ratio": 0.5}, "experts kept: 5 per layer then, 4 per layer now"),
    ({"propagate": "pruned"}, "propagate: original then, pruned now"),
    ({"dtype": "bfloat16"}, r"computed in: torch.float32 then, torch.bfloat16 now"),
    ({"seed": 3}, "seed: not set then, 3 now"),
    ({"samples": 3}, "samples: not set then, 3 now"),
    ({"seq_len": 12}, "seq-len: not set then, 12 now"),
    ({"max_shard_bytes": 10_000}, "max-shard-bytes: 5000000000 then, 10000 now"),
    ({"channels": False}, "channels: True then, False now"),
    ({"trust_remote_code": True}, "trust-remote-code: False then, True now"),
]


@pytest.mark.parametrize(("change", "message"), CHANGED, ids=[message for _, message in CHANGED])
def test_a_changed_setting_is_named(case: Case, change: dict[str, Any], message: str) -> None:
    before = tree_bytes(case.work)
    with pytest.raises(ResumeError, match=message):
        case.run(**change)
    assert tree_bytes(case.work) == before
    case.run()
    case.check()


def test_a_ratio_or_budget_that_comes_to_the_same_is_the_same(case: Case) -> None:
    case.run(keep=None, ratio=0.375, states="disk", checkpoint_every=1e6, verify=False, device="cpu", ram_gib=64.0)
    case.check()


def test_smaller_micro_batches_change_no_choice(case: Case) -> None:
    case.run(batch_tokens=12)
    report, expected = (
        json.loads((case.output / "streamprune.json").read_text()),
        json.loads(case.expected["streamprune.json"]),
    )
    for layer, wanted in zip(report["layers"], expected["layers"], strict=True):
        assert layer["kept"] == wanted["kept"]
        assert layer["counts"] == wanted["counts"]
        assert layer["scores"] == pytest.approx(wanted["scores"], rel=1e-6)


def test_other_versions_are_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprune.models.open.transformers.__version__", "4.0.0")
    monkeypatch.setattr("streamprune.models.open.platform.python_version", lambda: "3.9.1")
    with pytest.raises(ResumeError, match=r"(?s)python: .* then, 3\.9\.1 now.*transformers: .* then, 4\.0\.0 now"):
        case.resume()
    monkeypatch.undo()
    case.resume()
    case.check()


def change_file(path: Path, how: str) -> None:
    facts, data = path.stat(), path.read_bytes()
    if how == "contents":
        # The last page is one of those that the fingerprint covers.
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif how == "size":
        path.write_bytes(data.replace(b"{", b'{"one_more": 1,', 1))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + (how == "time")))


@pytest.mark.parametrize(
    ("name", "how", "what"),
    [
        ("model-00002-of-*.safetensors", "time", "model file model-00002-of-"),
        ("model-00002-of-*.safetensors", "contents", "the model's contents: another fingerprint"),
        ("config.json", "time", "model file config.json"),
        ("config.json", "size", "model file config.json"),
        ("tokenizer_config.json", "time", "model file tokenizer_config.json"),
        ("tokenizer_config.json", "size", "model file tokenizer_config.json"),
    ],
)
def test_a_changed_model_file_is_named(case: Case, name: str, how: str, what: str) -> None:
    (path,) = case.model.glob(name)
    change_file(path, how)
    for again in (case.run, case.resume):
        with pytest.raises(ResumeError, match=what):
            again()


def test_all_differences_are_named_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in case.model.glob("model-*.safetensors"):
        os.utime(path)
    write_token_ids(case.tokens, seed=9)
    monkeypatch.setattr("streamprune.pipeline.resume.torch.__version__", "1.0")
    with pytest.raises(ResumeError) as raised:
        case.run(keep=3, propagate="pruned")
    lines = [line.strip() for line in str(raised.value).splitlines() if line.startswith("  ")]
    files = sorted(path.name for path in case.model.glob("model-*.safetensors"))
    assert [line.split(":")[0] for line in lines] == [
        "experts kept", "propagate", "torch", *(f"model file {file}" for file in files), "calibration",
    ]  # fmt: skip
    assert "start over with --resume never" in str(raised.value)


def test_the_work_folder_alone_suffices(made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths in the first command, another current folder and no calibration file in the second."""
    (tmp_path / "there").mkdir()
    shutil.copytree(made.model, tmp_path / "there" / "model")
    shutil.copy(made.tokens, tmp_path / "there" / "ids.jsonl")
    monkeypatch.chdir(tmp_path / "there")
    case = Case(Path("model"), Path("ids.jsonl"), Path("results/out"), made.settings, made.expected)
    case.interrupt(at=2)
    (tmp_path / "there" / "ids.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    case.at(Path("there/results/out")).resume()
    case.at(Path("there/results/out")).check()


def test_another_work_folder(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    case.interrupt(at=2, work_dir=tmp_path / "work")
    assert not case.work.exists(), "only the lock was there"
    shutil.move(tmp_path / "work", tmp_path / "moved")
    from streamprune.pipeline.run import resume

    resume(tmp_path / "moved", quiet=True)
    case.check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.streamprune.log"]
