"""`run --refit`: what it wins and changes, that it resumes to the same bytes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from streamprune.checkpoint.index import open_checkpoint
from streamprune.config import RunSettings
from streamprune.demo.demo import DemoModel, shipped_model
from streamprune.output.verify import verify
from streamprune.pipeline.run import run


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoModel:
    return shipped_model(tmp_path_factory.mktemp("demo"), echo=lambda _: None)


def write_domains(folder: Path, text: Mapping[str, torch.Tensor], sequences: int) -> tuple[str, ...]:
    """A file of token ids for each domain, as `--calibration` takes them."""
    names = []
    for domain, rows in text.items():
        path = folder / f"{domain}.jsonl"
        path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows[:sequences]))
        names.append(str(path))
    return tuple(names)


def prune(model: Path, output: Path, calibration: tuple[str, ...], **settings: Any) -> Path:
    run(RunSettings(model=str(model), output=output, calibration=calibration, **settings), quiet=True)
    return output


def divergence(demo: DemoModel, output: Path) -> float:
    """Mean KL to the unpruned model over the held-out domains, nats per token."""
    whole, pruned = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval() for each in (demo.folder, output)
    )
    found = []
    with torch.no_grad():
        for ids in demo.held_out.values():
            wanted, given = (model(input_ids=ids[:12]).logits.log_softmax(-1) for model in (whole, pruned))
            found.append(float((wanted.exp() * (wanted - given)).sum(-1).mean()))
    return sum(found) / len(found)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in open_checkpoint(folder).files for name, tensor in load_file(folder / file).items()}


def test_a_refit_halves_the_damage_and_changes_only_down_projections(demo: DemoModel, tmp_path: Path) -> None:
    text = write_domains(tmp_path, demo.calibration, 24)
    plain = prune(demo.folder, tmp_path / "plain", text, ratio=0.5)
    refitted = prune(demo.folder, tmp_path / "refitted", text, ratio=0.5, refit=True)
    assert divergence(demo, refitted) < 0.5 * divergence(demo, plain)
    before, after = tensors_of(plain), tensors_of(refitted)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    record = json.loads((refitted / "streamprune.json").read_text())
    assert changed == record["computed"].keys()
    assert all(name.endswith("down_proj.weight") for name in changed)
    assert len(changed) > 50
    proof = verify(refitted, demo.folder)
    assert (proof.tensors, proof.computed) == (len(before), len(changed))
    # What stays is the same: scores are those of the original model.
    kept = [layer["kept"] for layer in record["layers"]]
    assert kept == [layer["kept"] for layer in json.loads((plain / "streamprune.json").read_text())["layers"]]
