"""Models whose `model_type` transformers does not know are read by their architecture, if it has that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamprune.cli import main
from streamprune.errors import UnsupportedModelError
from streamprune.output.verify import verify
from tests.helpers import prune, read_tensors, tree_bytes
from tests.quantized import make_quantized

#: As in Kimi-K2's config.json.
KIMI = {
    "model_type": "kimi_k2",
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A DeepSeek-V3 with packed experts."""
    return make_quantized(tmp_path, "kimi-k2", "deepseek_v3").source


def with_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def test_kimi_k2_is_pruned_as_the_deepseek_v3_that_it_is(model: Path, tmp_path: Path) -> None:
    wanted = prune(model, tmp_path / "wanted", keep=4)
    with_config(model, **KIMI)
    assert prune(model, tmp_path / "out", keep=4).layers == wanted.layers
    outputs = [tree_bytes(tmp_path / name) for name in ("wanted", "out")]
    shards = [{name: data for name, data in each.items() if name.startswith("model-")} for each in outputs]
    assert shards[0] == shards[1]
    assert shards[0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "kimi_k2"
    assert verify(tmp_path / "out", model).tensors == len(read_tensors(tmp_path / "out"))


def test_it_is_said(model: Path, tmp_path: Path) -> None:
    with_config(model, **KIMI)
    said = CliRunner().invoke(main, ["run", str(model), "-o", str(tmp_path / "out"), "--keep", "4", "--dry-run"])
    assert said.exit_code == 0, said.output
    assert "kimi_k2 is unknown to transformers" in said.output
    assert "read as deepseek_v3, by its architecture DeepseekV3ForCausalLM" in said.output


def test_without_a_known_architecture_it_is_refused(model: Path, tmp_path: Path) -> None:
    with_config(model, model_type="kimi_k2", architectures=["KimiForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="does not know the model"):
        prune(model, tmp_path / "out", keep=4)
