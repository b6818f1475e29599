"""The published figures of real models, to the byte, from their config alone and from the headers of their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from streamprune.fit.estimate import Fit, Footprint
from streamprune.fit.footprint import read_footprint
from streamprune.targets import ServingSpec
from tests.full_size import config_only, published
from tests.thorough import mostly_thorough

GIB = 1024**3
WEIGHTS = {
    "qwen3-30b-a3b": 61_064_245_248,
    "mixtral-8x7b": 93_405_585_408,
    "deepseek-v2-lite": 31_412_968_448,
    "qwen3.6-35b-a3b-text": 69_321_221_376,
}
#: Context in tokens, and the bytes of its keys and values in 16 bits.
CACHES = {
    "qwen3-30b-a3b": (36_864, 3456 * 1024**2),
    # 32 layers of 8 heads of 128 keys and as many values.
    "mixtral-8x7b": (32_768, 32 * 2 * 8 * 128 * 2 * 32_768),
    "deepseek-v2-lite": (32_768, 1_019_215_872),
    "qwen3.6-35b-a3b-text": (32_768, 640 * 1024**2),
}
#: What the linear-attention layers keep per sequence: 30 layers of 32 heads of 128 × 128 values, in float32, and the
#: last four inputs, in bf16, of a convolution over 2 × 2,048 + 4,096 channels.
QWEN36_STATE = 30 * (32 * 128 * 128 * 4 + 4 * (2 * 2048 + 4096) * 2)


class Footprints(dict[tuple[str, str], Footprint]):
    """By model and source; each is read when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, key: tuple[str, str]) -> Footprint:
        make = {"config": config_only, "files": published}[key[1]]
        self[key] = read_footprint(str(make(key[0], self._folder / "-".join(key))))
        return self[key]


@pytest.fixture(scope="module")
def footprints(tmp_path_factory: pytest.TempPathFactory) -> Footprints:
    return Footprints(tmp_path_factory.mktemp("full-size"))


by_name = pytest.mark.parametrize("name", mostly_thorough(WEIGHTS, ("qwen3-30b-a3b", "qwen3.6-35b-a3b-text")))
by_source = pytest.mark.parametrize("source", ["config", "files"])


def estimate(footprint: Footprint, **use: int | str) -> Fit:
    return Fit(footprint, ServingSpec(**use), 24 * GIB)  # type: ignore[arg-type]


@by_name
@by_source
def test_weights(footprints: Footprints, name: str, source: str) -> None:
    fit = estimate(footprints[name, source])
    assert fit.weights_bytes == WEIGHTS[name]
    kinds = {term.kind for term in fit.terms if term.name.startswith("weights: ")}
    assert kinds == {"exact" if source == "files" else "modelled"}


@by_name
@by_source
def test_key_value_cache(footprints: Footprints, name: str, source: str) -> None:
    context, nbytes = CACHES[name]
    fit = estimate(footprints[name, source], context=context)
    assert fit.kv_cache_bytes == nbytes
    assert estimate(footprints[name, source], context=context, kv_dtype="bf16").kv_cache_bytes == nbytes
    assert estimate(footprints[name, source], context=context, kv_dtype="fp8").kv_cache_bytes == nbytes // 2
    assert estimate(footprints[name, source], context=context, batch=3).kv_cache_bytes == 3 * nbytes
    assert fit.state_bytes == (QWEN36_STATE if name.startswith("qwen3.6") else 0)


@by_source
def test_pruned_qwen3(footprints: Footprints, source: str) -> None:
    footprint = footprints["qwen3-30b-a3b", source]
    assert round(estimate(footprint, keep=96).weights_bytes / GIB, 3) == 43.365
    assert round(estimate(footprint, keep=64).weights_bytes / GIB, 3) == 29.859
    # One expert has three matrices of 768 × 2,048 and one row of 2,048 in the router, in 48 blocks.
    expert = 48 * (3 * 768 * 2048 + 2048) * 2
    assert [estimate(footprint, keep=keep).weights_bytes for keep in (8, 64, 96, 127)] == [
        WEIGHTS["qwen3-30b-a3b"] - (128 - keep) * expert for keep in (8, 64, 96, 127)
    ]


@by_name
def test_config_and_files_give_the_same_parts(footprints: Footprints, name: str) -> None:
    parts = [footprints[name, source].weights.sizes() for source in ("config", "files")]
    count = footprints[name, "files"].weights.count
    for keep in (count, count // 2):
        assert parts[0].bytes_by_category(keep) == parts[1].bytes_by_category(keep)
    assert footprints[name, "config"].cache == footprints[name, "files"].cache
    # transformers has its own names for the number of experts.
    specs = [replace(footprints[name, source].spec, attribute="") for source in ("config", "files")]  # type: ignore[type-var]
    assert specs[0] == specs[1]
    assert footprints[name, "config"].shape == footprints[name, "files"].shape


def test_parts_of_qwen3(footprints: Footprints) -> None:
    parts = footprints["qwen3-30b-a3b", "files"].weights.sizes().bytes_by_category(128)
    assert parts == {
        "experts": 48 * 128 * 3 * 768 * 2048 * 2,
        "router": 48 * 128 * 2048 * 2,
        "shared/dense": (48 * 2 + 1) * 2048 * 2,  # the norms
        "attention": 48 * (2 * 4096 * 2048 + 2 * 512 * 2048 + 2 * 128) * 2,
        "embeddings": 151_936 * 2048 * 2,
        "head": 151_936 * 2048 * 2,
    }


def test_parts_of_deepseek(footprints: Footprints) -> None:
    parts = footprints["deepseek-v2-lite", "files"].weights.sizes().bytes_by_category(64)
    assert parts["experts"] == 26 * 64 * 3 * 1408 * 2048 * 2
    assert parts["router"] == 26 * 64 * 2048 * 2
    # Two shared experts in 26 blocks, the dense layer of the first block, and two norms in each and one behind them.
    assert parts["shared/dense"] == (26 * 2 * 3 * 1408 * 2048 + 3 * 10_944 * 2048 + (27 * 2 + 1) * 2048) * 2


def test_checkpoint_of_tied_embeddings_counts_them_once(tmp_path: Path) -> None:
    folder = config_only("qwen3-30b-a3b", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    nbytes = estimate(read_footprint(str(folder))).weights_bytes
    assert nbytes == WEIGHTS["qwen3-30b-a3b"] - 151_936 * 2048 * 2
