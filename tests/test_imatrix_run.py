"""`run --imatrix`: its sums are those of the written model, whatever else the run does, and after any interruption."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from streamprune.cli import main
from streamprune.config import RunSettings
from streamprune.errors import InterruptedRunError, OutputError, ResumeError, SettingsError, UnsupportedModelError
from streamprune.models.skeleton import build_skeleton
from streamprune.output.verify import verify
from streamprune.pipeline.run import run
from streamprune.quantize.imatrix import GgufNames
from streamprune.reporting.card import reproduce_command
from streamprune.reporting.record import read_record
from streamprune.streaming.batches import MicroBatches
from streamprune.streaming.imatrix_stage import ImatrixForwardStage
from streamprune.streaming.score_stage import ScoreStage
from streamprune.streaming.stages import ForwardStage, LayerTask
from tests.faults import Case, Injected, make_case
from tests.helpers import DECODES_FLOATS, known_family, load_whole, prune, tree_bytes
from tests.launching import launch
from tests.test_quantized_sources import load_dequantized
from tests.tiny import VOCAB, make_model, tiny_config


def text(seed: int = 5, sequences: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(3, VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))


def write_text(path: Path, ids: torch.Tensor) -> tuple[str, ...]:
    path.write_text("".join(f'{{"input_ids": {row.tolist()}}}\n' for row in ids))
    return (str(path),)


def entries(path: Path) -> dict[str, tuple[np.ndarray[Any, Any], list[float]]]:
    """Sums (E, C) and counts (E,) of every weight in an importance matrix."""
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    return {name: (tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"][:, 0].tolist()) for name in names}


class Oracle:
    """Sums by hooks on a whole model, and by loops over tokens for its experts, by the names of this family."""

    def __init__(self, family: str, model: Any, experts: dict[int, str]) -> None:
        self.layers = model.model.layers
        self.names = GgufNames(family, len(self.layers), experts)
        self.squares: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(0))
        self.counts: dict[str, torch.Tensor] = {}
        for layer, module in enumerate(self.layers):
            for path, each in module.named_modules():
                if isinstance(each, nn.Linear):
                    each.register_forward_pre_hook(partial(self._linear, layer, path))
            if layer in experts:
                path = experts[layer]
                hook = partial(self._experts, layer, path)
                module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)

    def _add(self, layer: int, path: str, rows: torch.Tensor, expert: int = 0, experts: int = 1) -> None:
        for name in self.names.of(layer, path):
            if name not in self.counts:
                self.squares[name] = torch.zeros(experts, rows.shape[-1], dtype=torch.float64)
                self.counts[name] = torch.zeros(experts)
            self.squares[name][expert] += rows.double().square().sum(0)
            self.counts[name][expert] += len(rows)

    def _linear(self, layer: int, path: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._add(layer, path, args[0].reshape(-1, args[0].shape[-1]))

    def _experts(self, layer: int, path: str, module: Any, args: Any, named: dict[str, Any]) -> None:
        hidden, index, *_ = (*args, *named.values())
        hidden, count = hidden.reshape(-1, hidden.shape[-1]), module.gate_up_proj.shape[0]
        for row, chosen in zip(hidden, index.tolist(), strict=True):
            for expert in chosen:
                gate, up = (module.gate_up_proj[expert] @ row).chunk(2)
                inner = nn.functional.silu(gate) * up
                self._add(layer, f"{path}.gate_up_proj", row[None], expert, count)
                self._add(layer, f"{path}.down_proj", inner[None], expert, count)


def check(family: str, output: Path, matrix: Path, ids: torch.Tensor) -> int:
    """Assert that an importance matrix has the sums of the model in `output`; returns how many experts got no token."""
    skeleton = build_skeleton(tiny_config(known_family(family)), torch.float32)
    quantized = "quantization_config" in json.loads((output / "config.json").read_text())
    options = {"dtype": torch.float32, "trust_remote_code": True}
    model = load_dequantized(output)[0] if quantized else load_whole(output, **options)
    oracle = Oracle(family, model, dict(skeleton.experts))
    with torch.no_grad():
        model(input_ids=ids)
    found = entries(matrix)
    assert found.keys() == oracle.counts.keys()
    thin = 0
    for name, (squares, counts) in found.items():
        wanted, tokens = oracle.squares[name], oracle.counts[name]
        missing = tokens == 0
        thin = max(thin, int(missing.sum()))
        mean = wanted.sum(0) / tokens.sum()
        filled = torch.where(missing[:, None], mean, wanted)
        assert counts == torch.where(missing, 1.0, tokens).tolist(), name
        np.testing.assert_allclose(squares, filled.float().numpy(), rtol=2e-4, atol=1e-7, err_msg=name)
    return thin


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen2_moe", "mixtral", "olmoe", "glm4_moe"])
def test_the_sums_are_those_of_the_written_model(family: str, tmp_path: Path) -> None:
    known, ids = known_family(family), text()
    source = make_model(tmp_path / "source", tiny_config(known))
    calibration = write_text(tmp_path / "ids.jsonl", ids)
    prune(
        source, tmp_path / "out", calibration=calibration, keep=known.keep, imatrix=tmp_path / "i.gguf", dtype="float32"
    )
    check(family, tmp_path / "out", tmp_path / "i.gguf", ids)
    record = read_record(tmp_path / "out").imatrix
    assert record
    assert (record.file, record.sequences, record.tokens) == ("i.gguf", 6, 144)
    assert record.weights == len(entries(tmp_path / "i.gguf"))


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 5, "refit": True, "anchor": "none"},
        {"keep": 5, "weights": "w4a16"},
        pytest.param(
            {"keep": 5, "weights": "fp8-dynamic"},
            marks=pytest.mark.skipif(not DECODES_FLOATS, reason="this transformers rounds what it decodes"),
        ),
        {"keep": 5, "schedule": "global"},
        {"width": 16},
        {"keep": 5, "evaluate": True},
        {},
    ],
    ids=["refit", "gptq", "rtn", "second sweep", "narrower", "evaluate", "all stays"],
)
def test_the_sums_are_those_of_what_is_written_whatever_it_is(settings: dict[str, Any], tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", tiny_config(known_family("qwen3_moe")))
    ids = text(sequences=20)
    given = {"calibration": write_text(tmp_path / "ids.jsonl", ids), "imatrix": tmp_path / "i.gguf", **settings}
    run(RunSettings(model=str(source), output=tmp_path / "out", dtype="float32", **given), quiet=True)
    if "evaluate" in settings:
        # (A tenth of the text is held out, and not summed over.)
        held = json.loads((tmp_path / "out" / "streamprune.json").read_text())["calibration"]["held_back"]
        assert held["sequences"] == 2
        kept = read_record(tmp_path / "out").imatrix
        assert kept
        assert kept.sequences == 18
        return
    check("qwen3_moe", tmp_path / "out", tmp_path / "i.gguf", ids)
    assert verify(tmp_path / "out", source)
    # Its text is also what weights are computed from.
    assert " --imatrix i.gguf" in reproduce_command(read_record(tmp_path / "out"))


def test_scores_of_before_select_for_it(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", tiny_config(known_family("qwen3_moe")))
    given = {"calibration": write_text(tmp_path / "ids.jsonl", text()), "dtype": "float32", "batch_tokens": 48}
    prune(source, tmp_path / "once", imatrix=tmp_path / "once.gguf", **given)
    prune(source, tmp_path / "again", imatrix=tmp_path / "again.gguf", scores=tmp_path / "once", **given)
    assert (tmp_path / "once.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_experts_without_tokens_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_model(tmp_path / "source", tiny_config(known_family("qwen3_moe")))
    ids = text(sequences=2, length=2)
    calibration = write_text(tmp_path / "ids.jsonl", ids)
    given = {"calibration": calibration, "dtype": "float32", "imatrix": tmp_path / "i.gguf"}
    run(RunSettings(model=str(source), output=tmp_path / "out", **given))
    said = capsys.readouterr().err
    assert check("qwen3_moe", tmp_path / "out", tmp_path / "i.gguf", ids) > 0
    assert "warning: some experts got none of these tokens (layer 0: " in said
    assert "warning: that is less than the 51,200 tokens" in said
    assert "without an entry: the embeddings, the output head\n" in said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("made")
    return make_case(folder, imatrix=folder / "matrix.gguf", dtype="float32")


def matrix_of(case: Case) -> Path:
    return case.output.with_name("matrix.gguf")


def check_same(case: Case, made: Case) -> None:
    case.check()
    assert matrix_of(case).read_bytes() == matrix_of(made).read_bytes()


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("every", [0.0, 1e6], ids=["states saved", "all recomputed"])
def test_a_run_that_ended_in_any_layer_goes_on(made: Case, tmp_path: Path, block: int, every: float) -> None:
    case = made.at(tmp_path / "out")
    case.interrupt(at=block, checkpoint_every=every, imatrix=matrix_of(case))
    assert not matrix_of(case).exists()
    case.resume()
    check_same(case, made)


@pytest.mark.parametrize("stage", [ScoreStage, ImatrixForwardStage])
def test_a_run_that_was_stopped_in_any_stage_goes_on(
    made: Case, tmp_path: Path, stage: type[ForwardStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, asked = made.at(tmp_path / "out"), list[int]()
    usual = stage.compute

    def compute(self: Any, task: LayerTask, *arguments: Any) -> Any:
        after = usual(self, task, *arguments)
        if task.index == 2 and not asked:
            asked.append(2)
            os.kill(os.getpid(), signal.SIGTERM)
        return after

    monkeypatch.setattr(stage, "compute", compute)
    with pytest.raises(InterruptedRunError):
        case.run(checkpoint_every=1e6, imatrix=matrix_of(case))
    case.resume()
    check_same(case, made)


def test_a_run_that_ended_before_its_output_was_renamed_writes_it_again(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made.at(tmp_path / "out")
    monkeypatch.setattr("streamprune.pipeline.finish.model_card", Mock(side_effect=Injected))
    with pytest.raises(Injected):
        case.run(imatrix=matrix_of(case))
    monkeypatch.undo()
    assert matrix_of(case).exists()
    matrix_of(case).write_bytes(b"cut")
    case.resume()
    check_same(case, made)


def test_a_damaged_shard_is_written_again_with_its_sums(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    case.interrupt(at=3, imatrix=matrix_of(case))
    shards = sorted((case.work / "model").glob("*.safetensors"))
    shards[-1].write_bytes(shards[-1].read_bytes()[:-8] + bytes(8))
    case.resume()
    check_same(case, made)


def test_a_layer_without_sums_is_refused_at_the_end(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made.at(tmp_path / "out")
    case.interrupt(at=3, imatrix=matrix_of(case))
    monkeypatch.setattr(ImatrixForwardStage, "conclude", ForwardStage.conclude)
    with pytest.raises(ResumeError, match="--from-layer 3"):
        case.resume()
    monkeypatch.undo()
    assert not case.output.exists()
    case.resume(from_layer=3)
    check_same(case, made)


def test_a_micro_batch_that_is_repeated_in_parts_counts_once(
    made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made.at(tmp_path / "out")
    usual, failures = ImatrixForwardStage.compute, iter([torch.OutOfMemoryError("once")])

    def compute(self: Any, task: LayerTask, *arguments: Any) -> Any:
        after = usual(self, task, *arguments)
        if task.index == 1:
            for failure in failures:
                raise failure
        return after

    monkeypatch.setattr(ImatrixForwardStage, "compute", compute)
    monkeypatch.setattr(MicroBatches, "_check_cap", lambda *_: None)
    case.run(imatrix=matrix_of(case), batch_tokens=96)
    found, wanted = entries(matrix_of(case)), entries(matrix_of(made))
    assert found.keys() == wanted.keys()
    for name, (squares, counts) in wanted.items():
        assert found[name][1] == counts
        np.testing.assert_allclose(found[name][0], squares, rtol=1e-4, atol=1e-6)


def test_two_processes_sum_what_one_does(made: Case, tmp_path: Path) -> None:
    words: list[object] = [
        "run", made.model, "-o", tmp_path / "out", "--keep", made.settings["keep"], "--batch-tokens", 24,
        "--calibration", made.tokens, "--imatrix", tmp_path / "matrix.gguf", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    assert [code for code, *_ in launch(words, [tmp_path] * 2).end()] == [0, 0]
    found, wanted = entries(tmp_path / "matrix.gguf"), entries(matrix_of(made))
    assert found.keys() == wanted.keys()
    for name, (squares, counts) in wanted.items():
        assert found[name][1] == counts
        # (Added in another order in float64.)
        np.testing.assert_allclose(found[name][0], squares, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"propagate": "pruned", "imatrix": Path("i.gguf")}, "Leave out --propagate pruned"),
        ({"only_score": True, "keep": None, "imatrix": Path("i.gguf")}, "scoring alone makes none"),
        ({"imatrix": Path("out/i.gguf")}, r"is in the output.* such as out\.imatrix\.gguf"),
        ({"imatrix": Path("out.work/i.gguf")}, "is in the work folder"),
    ],
)
def test_settings_that_exclude_it(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        RunSettings(model="m", output=Path("out"), **{"keep": 5, **settings})


def test_what_cannot_be_written_or_named_is_refused_before_anything_is_read(made: Case, tmp_path: Path) -> None:
    case = made.at(tmp_path / "out")
    matrix_of(case).write_text("mine")
    with pytest.raises(OutputError, match=r"matrix\.gguf exists already\. Choose another file, or .* --overwrite"):
        case.run(imatrix=matrix_of(case))
    assert matrix_of(case).read_text() == "mine"
    with pytest.raises(OutputError, match="absent does not exist"):
        case.run(imatrix=tmp_path / "absent" / "i.gguf")
    other = make_model(tmp_path / "other", tiny_config(known_family("dots1")))
    with pytest.raises(UnsupportedModelError, match=r"cannot name the weights of a dots1 model as llama\.cpp does"):
        run(RunSettings(model=str(other), output=tmp_path / "o", keep=5, imatrix=tmp_path / "i.gguf"), quiet=True)
    assert not (tmp_path / "i.gguf").exists()


def test_the_command_line_takes_it(made: Case, tmp_path: Path) -> None:
    words = [
        "run", made.model, "-o", tmp_path / "out", "--keep", made.settings["keep"], "--batch-tokens", 24,
        "--calibration", made.tokens, "--imatrix", tmp_path / "matrix.gguf", "--dtype", "float32", "--json",
        "--no-report",
    ]  # fmt: skip
    ran = CliRunner().invoke(main, [str(word) for word in words])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["imatrix"] == str(tmp_path / "matrix.gguf")
    assert (tmp_path / "matrix.gguf").read_bytes() == matrix_of(made).read_bytes()
    assert tree_bytes(tmp_path / "out") == made.expected
