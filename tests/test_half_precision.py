"""On a CPU that is slow in half precision, such weights are computed in float32, unless another dtype is chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import SearchSettings
from streamprune.errors import ResumeError
from streamprune.hardware import half_precision
from streamprune.models.open import describe_model, open_model
from streamprune.pipeline.search import finished_search, search
from tests.faults import Case, Injected, breaking_at
from tests.helpers import known_family, read_tensors, tree_bytes
from tests.interruptions import call
from tests.tiny import make_model, tiny_config, write_token_ids

CPU = torch.device("cpu")


@contextmanager
def on_a_cpu(slowdown: float) -> Iterator[None]:
    """Within this context a product in half precision takes so many times as long as one in float32."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("hardware.half_precision", "models.open"):
            patch.setattr(f"streamprune.{place}.slowdown", lambda dtype: slowdown)
        yield


@pytest.mark.parametrize("half", half_precision.HALF)
def test_only_slow_half_precision_on_a_cpu_is_replaced(half: torch.dtype) -> None:
    quicker = half_precision.quicker_dtype
    with on_a_cpu(8.0):
        assert quicker(half, CPU) is torch.float32
        assert quicker(half, torch.device("cuda")) is half
        assert quicker(half) is half
        assert quicker(torch.float32, CPU) is torch.float32
    with on_a_cpu(1.9):
        assert quicker(half, CPU) is half


def test_it_is_measured_once_and_takes_a_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    usual = torch.mm
    monkeypatch.setattr(torch, "mm", lambda one, two: made.append((one.dtype, tuple(one.shape))) or usual(one, two))
    half_precision.slowdown.cache_clear()
    assert half_precision.slowdown(torch.bfloat16) == half_precision.slowdown(torch.bfloat16) > 0
    assert sorted(made, key=str) == [(torch.bfloat16, (128, 512))] * 3 + [(torch.float32, (128, 512))] * 3


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model stored in bfloat16, and what a run with --dtype float32 makes of it."""
    folder = tmp_path_factory.mktemp("half")
    kind = known_family("qwen3_moe")
    config = tiny_config(kind)
    config.num_hidden_layers = 2
    AutoModelForCausalLM.from_pretrained(make_model(folder / "float32", config), dtype=torch.bfloat16).save_pretrained(
        folder / "model"
    )
    tokens = write_token_ids(folder / "ids.jsonl", 12)
    settings: dict[str, Any] = {"keep": kind.keep, "batch_tokens": 48, "checkpoint_every": 0.0, "evaluate": True}
    case = Case(folder / "model", tokens, folder / "undisturbed", settings, {})
    case.run(dtype="float32")
    case.expected = tree_bytes(case.output)
    return case


def test_a_run_computes_in_float32_and_says_so(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ("run", case.model, "-o", output, "--keep", case.settings["keep"], "--calibration", case.tokens)
    with on_a_cpu(8.0):
        done = call(*words, "--batch-tokens", 48, "--evaluate", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert "computed in float32 from bfloat16 weights, since this CPU takes 8 times as long" in done.stderr
    assert "--dtype bfloat16 computes in bfloat16, in less memory." in done.stderr
    found = tree_bytes(output)
    assert [name for name in found if found[name] != case.expected[name]] == []
    assert json.loads(found["streamprune.json"])["settings"]["dtype"] == "float32"
    assert b"--dtype float32" in found["README.md"]
    # What is written are the source's own bytes.
    assert {tensor.dtype for tensor in read_tensors(output).values()} == {torch.bfloat16}


def test_it_goes_on_in_the_same_dtype_on_another_machine(case: Case, tmp_path: Path) -> None:
    for name in ("resumed", "again"):
        other = case.at(tmp_path / name)
        with on_a_cpu(8.0):
            other.interrupt(at=1)
        with on_a_cpu(1.0):
            with pytest.raises(ResumeError, match=r"computed in: torch.float32 then, torch.bfloat16 now"):
                other.run(dtype="bfloat16")
            other.resume() if name == "resumed" else other.run()
            other.check()
            assert other.run().summary["complete"] is True


def test_a_search_too(case: Case, tmp_path: Path) -> None:
    settings = SearchSettings(
        model=str(case.model), output=tmp_path / "found", calibration=(str(case.tokens),), budget_gib=1.0,
        candidates=("keep=5",), context=64,
    )  # fmt: skip
    with on_a_cpu(8.0), breaking_at(1), pytest.raises(Injected):
        search(settings, quiet=True)
    with on_a_cpu(1.0):
        found = search(settings, quiet=True)
        assert found["dtype"] == found["request"]["dtype"] == "float32"
        assert finished_search(settings) is not None


def test_what_is_measured_says_so(case: Case, tmp_path: Path) -> None:
    with on_a_cpu(8.0):
        done = call("eval", case.model, "--data", case.tokens, "--json", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert "computed in float32 from bfloat16 weights" in done.stderr
    assert json.loads(done.stdout)["dtype"] == "float32"


def test_a_config_without_a_dtype_goes_by_the_weights(case: Case, tmp_path: Path) -> None:
    config = json.loads((case.model / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    for path in case.model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {tensor.dtype for tensor in load_file(next(tmp_path.glob("*.safetensors"))).values()} == {torch.bfloat16}
    with on_a_cpu(8.0):
        assert describe_model(tmp_path, config, device=CPU).dtype is None
        assert open_model(open_checkpoint(tmp_path), device=CPU).dtype is torch.float32
        assert open_model(open_checkpoint(tmp_path)).dtype is torch.bfloat16
