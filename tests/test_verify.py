"""Proof of a result: it finds whatever is not as the source and the record say, and names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from streamprune.cli import main
from streamprune.errors import StreampruneError, VerifyError
from streamprune.output import verify as verifying
from streamprune.output.plan import ShardPlan
from streamprune.output.verify import verify
from streamprune.output.writer import OutputWriter
from streamprune.pipeline.run import resume
from streamprune.work.layer_records import FinishedShard
from tests.faults import Case, invalid_argument, make_case
from tests.helpers import known_family, prune
from tests.thorough import mostly_thorough
from tests.tiny import make_model, tiny_config

Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.1.mlp.experts.{}.down_proj.weight"
ROUTER, NORM = "model.layers.2.mlp.gate.weight", "model.layers.3.input_layernorm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("made"))


@pytest.fixture
def output(made: Case, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.output, tmp_path / "out"))


def edit_tensors(output: Path, name: str, change: Callable[[Tensors], None]) -> None:
    """Change the shard that holds a tensor, and put in the index what is in it then."""
    index_path = output / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    file = index["weight_map"][name]
    tensors = load_file(output / file)
    change(tensors)
    save_file(tensors, output / file)
    index["weight_map"] = {key: value for key, value in index["weight_map"].items() if value != file}
    index["weight_map"] |= dict.fromkeys(tensors, file)
    index_path.write_text(json.dumps(index))


def flip(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(torch.uint8).view(-1)[6] ^= 1

    return change


def swap_experts(tensors: Tensors) -> None:
    one, other = EXPERT.format(0), EXPERT.format(1)
    tensors[one], tensors[other] = tensors[other], tensors[one]


def swap_rows(tensors: Tensors) -> None:
    tensors[ROUTER] = tensors[ROUTER][[1, 0, 2, 3, 4]].clone()


CHANGES: list[tuple[str, Callable[[Tensors], Any], str]] = [
    (EXPERT.format(2), flip(EXPERT.format(2)), rf"{EXPERT.format(2)} differs from the source at byte 6 of the tensor"),
    (ROUTER, flip(ROUTER), rf"{ROUTER} differs from the source at byte"),
    (NORM, flip(NORM), rf"{NORM} differs from the source at byte"),
    (EXPERT.format(0), swap_experts, rf"{EXPERT.format(0)} differs from the source"),
    (ROUTER, swap_rows, rf"{ROUTER} differs from the source"),
    (NORM, lambda tensors: tensors.pop(NORM), f"lacks 1 tensors, first {NORM}"),
    (NORM, lambda tensors: tensors.update({"more": torch.zeros(2)}), "has 1 unexpected tensors, first more"),
    (NORM, lambda tensors: tensors.update({"x": tensors.pop(NORM)}), f"lacks 1 tensors, first {NORM}"),
    (NORM, lambda tensors: tensors.update({NORM: tensors[NORM].bfloat16()}), rf"{NORM} is BF16 \[64\], but .* F32"),
    (NORM, lambda tensors: tensors.update({NORM: tensors[NORM][None]}), rf"{NORM} is F32 \[1, 64\], but has to be"),
]


def test_a_good_result_is_proved(made: Case) -> None:
    proof = verify(made.output, made.model)
    assert proof.tensors == len(json.loads(made.expected["model.safetensors.index.json"])["weight_map"])
    assert proof.nbytes == json.loads(made.expected["model.safetensors.index.json"])["metadata"]["total_size"]
    told = CliRunner().invoke(main, ["verify", str(made.output), "--source", str(made.model)])
    assert told.exit_code == 0
    assert f"is verified: {proof.tensors:,} tensors" in told.stdout


@pytest.mark.parametrize(("name", "change", "message"), CHANGES, ids=range(len(CHANGES)))
def test_changed_tensors_are_named(
    made: Case, output: Path, name: str, change: Callable[[Tensors], Any], message: str
) -> None:
    edit_tensors(output, name, change)
    with pytest.raises(VerifyError, match=message):
        verify(output, made.model)
    told = CliRunner().invoke(main, ["verify", str(output), "--source", str(made.model)])
    assert told.exit_code == 1
    # (Where it takes long, a line says what goes on.)
    assert told.stderr.splitlines()[-1].startswith("Error: ")


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def one_expert_more(config: Any) -> None:
    # The same number under other names in other versions of transformers.
    config.update({key: 6 for key in ("num_experts", "num_local_experts") if key in config})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_expert_more, r"num_\w*experts' is 6, but 5 is expected from the source"),
        (lambda config: config.update(rms_norm_eps=1.0), "rms_norm_eps' is 1.0, but 1e-06 is expected from the source"),
        (lambda config: config.update(more=None), "more' is None, but missing is expected from the source"),
        (lambda config: config.pop("vocab_size"), "vocab_size' is missing, but 256 is expected from the source"),
    ],
)
def test_a_changed_config_is_named(made: Case, output: Path, change: Callable[[Any], Any], message: str) -> None:
    edit_json(output / "config.json", change)
    with pytest.raises(VerifyError, match=rf"config\.json: '{message}"):
        verify(output, made.model)


def other_expert(report: Any) -> None:
    kept = report["layers"][1]["kept"]
    kept[:] = sorted({*kept[1:], next(number for number in range(8) if number not in kept)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_expert, r"model\.layers\.1\.mlp\S+ differs from the source"),
        (lambda report: report["layers"][0]["kept"].reverse(), "must be ascending"),
        (
            lambda report: report["layers"][0]["kept"].pop(),
            "is expected from the source",
        ),
        (lambda report: report["layers"].pop(), "names experts for layers 0, 1, 2, but the source has them in 0, 1, 2"),
        (lambda report: report["layers"][0].pop("kept"), "does not list the kept experts"),
        (lambda report: report["layers"][0]["kept"].__setitem__(4, 99), "must be ascending"),
        (lambda report: report.pop("layers"), "does not list the kept experts"),
    ],
)
def test_a_changed_record_is_named(made: Case, output: Path, change: Callable[[Any], Any], message: str) -> None:
    edit_json(output / "streamprune.json", change)
    with pytest.raises(VerifyError, match=message):
        verify(output, made.model)


def test_other_files_and_other_models(made: Case, output: Path, tmp_path: Path) -> None:
    (output / "more.safetensors").write_bytes((output / "model-00001-of-00005.safetensors").read_bytes())
    with pytest.raises(VerifyError, match=r"more\.safetensors is not listed in the index"):
        verify(output, made.model)
    (output / "more.safetensors").unlink()
    (output / "tokenizer_config.json").write_text('{"model_max_length": 257}')
    with pytest.raises(VerifyError, match=r"tokenizer_config\.json is not the same as"):
        verify(output, made.model)
    (output / "tokenizer_config.json").unlink()
    with pytest.raises(VerifyError, match=r"tokenizer_config\.json is not the same as"):
        verify(output, made.model)
    (output / "streamprune.json").unlink()
    with pytest.raises(VerifyError, match=r"nothing to verify: .*did not write \(it has no streamprune\.json\)"):
        verify(output, made.model)
    other = make_model(tmp_path / "other", tiny_config(known_family("qwen3_moe")), seed=5)
    with pytest.raises(VerifyError, match=r"differs from the source at byte"):
        verify(made.output, other)
    with pytest.raises(StreampruneError):
        verify(made.output, made.output)


@pytest.mark.parametrize(
    "family",
    mostly_thorough(["qwen3_vl_moe", "gpt_oss", "mixtral", "deepseek_v3", "dbrx", "llama4"], ("mixtral", "llama4")),
)
def test_every_layout(family: str, tmp_path: Path) -> None:
    kind = known_family(family)
    model = make_model(tmp_path / "model", tiny_config(kind))
    prune(model, tmp_path / "out", keep=kind.keep)
    verify(tmp_path / "out", model)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name in sorted(index, reverse=True) if "expert" in name or "ffn" in name)
    edit_tensors(tmp_path / "out", name, flip(name))
    with pytest.raises(VerifyError, match=f"{name} differs"):
        verify(tmp_path / "out", model)


def test_every_run_ends_with_it(made: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that changes on the disk behind the writing is found, and with --no-verify it is not."""
    case = made.at(tmp_path / "out")
    usual = OutputWriter._write_shard

    def write_shard(self: OutputWriter, shard: ShardPlan, kept: Any, computed: Any) -> FinishedShard:
        written = usual(self, shard, kept, computed)
        if shard.layer == 1:
            path = self._staging / shard.file
            data = bytearray(path.read_bytes())
            data[-9] ^= 1
            path.write_bytes(data)
        return written

    monkeypatch.setattr(OutputWriter, "_write_shard", write_shard)
    with pytest.raises(VerifyError, match=r"model\.layers\.1\S+ differs from the source at byte"):
        case.run()
    assert not case.output.exists()
    case.at(tmp_path / "unverified").run(verify=False)
    assert (tmp_path / "unverified" / "config.json").exists()
    monkeypatch.undo()
    resume(case.work, quiet=True)
    case.check()


def test_it_reads_in_portions(made: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    usual = verifying._read

    def read(stream: Any, position: int, size: int) -> bytes:
        nonlocal most
        most = max(most, size)
        return usual(stream, position, size)

    monkeypatch.setattr(verifying, "_read", read)
    monkeypatch.setattr(verifying.read_ranges, "__defaults__", (1000,))
    verify(made.output, made.model)
    assert 0 < most <= 1000


@pytest.mark.parametrize(("owner", "name"), [(verifying, "_read"), (os, "preadv")])
def test_a_disk_that_fails_while_it_is_compared_is_told_in_one_message(
    owner: Any, name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(model, tmp_path / "out")
    monkeypatch.setattr(owner, name, invalid_argument)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--source", str(model)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert result.stderr.count("Error: ") == 1
    assert "Invalid argument" in result.stderr
