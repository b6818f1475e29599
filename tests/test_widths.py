"""Narrower experts: every family that can say a width, refusals of the others, and how a width is chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from streamprune.checkpoint.index import open_checkpoint
from streamprune.cli import main
from streamprune.config import PruneSettings, RunSettings
from streamprune.errors import (
    CheckpointError,
    ResumeError,
    ScoresError,
    SettingsError,
    StreampruneError,
    UnsupportedModelError,
    VerifyError,
)
from streamprune.fit.estimate import Footprint
from streamprune.formats.base import ChannelMask, ChannelRows
from streamprune.models.config_json import ExpertSpec, WidthSpec
from streamprune.models.expert_channels import find_channels
from streamprune.models.open import open_moe
from streamprune.models.skeleton import build_skeleton
from streamprune.output.verify import verify
from streamprune.pipeline.finish import RunResult
from streamprune.pipeline.prune import prune as prune_from_scores
from streamprune.pipeline.run import run
from streamprune.planning.counts import Prunable, plan_counts
from streamprune.saliency.scores_file import read_scores, write_scores
from streamprune.selection.widths import allowed_widths, check_width, default_multiple, width_for_share, width_notes
from streamprune.targets import PruningTarget
from tests.helpers import known_family, load_as_declared, load_whole, prune, read_tensors, token_ids
from tests.interruptions import Injected, breaking_at
from tests.thorough import DISTINCT, by_family
from tests.tiny import FAMILIES, Family, make_model, tiny_config, write_token_ids

#: Families whose experts cannot be made narrower, and words of the reason.
FIXED = {
    "hunyuan_v1_moe": "intermediate_size is also the width of model.layers.0.mlp.shared_mlp.gate_proj.weight",
    "jamba": "intermediate_size is also the width of model.layers.0.feed_forward.gate_proj.weight",
    "llama4_text": "Llama4TextExperts has code of its own",
    "llama4": "Llama4TextExperts has code of its own",
    "dbrx": "DbrxExperts has code of its own",
    "inkling_text": "moe_intermediate_size is also the width of",
    "step3p7": "Step3p7Experts has code of its own",
    "muse_spark": "their channels cannot be scored",
}
NARROWER = [family for family in FAMILIES if family.id not in FIXED]


def new_width(model: Path) -> int:
    """A width for a tiny model: not half, where its shared experts allow that."""
    width = open_moe(open_checkpoint(model)).layout.width
    assert width is not None
    return width.width // 2 if width.shared else width.width * 5 // 8 // 4 * 4


def cut_in_memory(source: Path, output: Path, result: RunResult) -> Any:
    """The source loaded whole, its experts' parameters cut by what this test knows of them, in the output's class."""
    whole = load_whole(source)
    config = AutoConfig.from_pretrained(output)
    try:
        small = AutoModelForCausalLM.from_config(config)
    except ValueError:
        small = AutoModelForImageTextToText.from_config(config)
    kept = {layer.index: layer for layer in result.layers}
    opened = open_moe(open_checkpoint(source))
    for index, layer in kept.items():
        path = f"{opened.skeleton.layers_path}.{index}.{opened.skeleton.experts[index]}"
        module: Any = whole.get_submodule(path)
        assert layer.channels is not None
        parts: dict[str, list[torch.Tensor]] = {}
        for expert, channels in zip(layer.kept, torch.from_numpy(layer.channels.indices), strict=True):
            both = torch.cat([channels, channels + module_width(module)])
            if not module.is_concatenated:
                both = torch.stack([2 * channels, 2 * channels + 1], dim=1).flatten()
            for name, parameter in module.named_parameters():
                rows = both if name.startswith("gate_up") else channels
                axis = 0 if parameter.dim() == 2 or name.startswith("down") == module.is_transposed else 1
                if name == "down_proj_bias":
                    parts.setdefault(name, []).append(parameter[expert])
                else:
                    parts.setdefault(name, []).append(parameter[expert].index_select(axis, rows))
        for name, tensors in parts.items():
            setattr(module, name, torch.nn.Parameter(torch.stack(tensors)))
    state = small.state_dict()
    for name, tensor in whole.state_dict().items():
        rows = opened.skeleton.expert_rows.get(name)
        if state[name].shape != tensor.shape and rows is not None:
            index = opened.skeleton.layer_of(name)
            assert index is not None
            numbers = [expert * rows.stride + row for expert in kept[index].kept for row in range(rows.stride)]
            size = tensor.shape[rows.axis]
            tensor = tensor.index_select(rows.axis, torch.tensor([*numbers, *range(size - rows.tail, size)]))
        state[name].copy_(tensor)
    return small.eval()


def module_width(module: Any) -> int:
    """Channels of each expert of a module."""
    down = module.down_proj
    return int(down.shape[1] if module.is_transposed else down.shape[2])


@pytest.mark.parametrize("family", NARROWER, ids=lambda family: family.id)
def test_channels_are_found_where_the_experts_have_them(family: Family) -> None:
    """In every family. (The next test cuts along them: a few families, and all with --all.)"""
    config = tiny_config(family)
    skeleton = find_channels(config, build_skeleton(config, torch.float32), torch.float32)
    expected = {}
    for index, path in skeleton.experts.items():
        module: Any = skeleton.layers[index].get_submodule(path)
        assert skeleton.width is not None
        assert skeleton.width.width == module_width(module)
        for name, parameter in module.named_parameters():
            axis = 0 if parameter.dim() == 2 or name.startswith("down") == module.is_transposed else 1
            both = {"repeats" if module.is_concatenated else "step": 2} if name.startswith("gate_up") else {}
            if name != "down_proj_bias":
                expected[f"{skeleton.layers_path}.{index}.{path}.{name}"] = ChannelRows(axis, **both)
    assert skeleton.channels == expected


@pytest.mark.families
@by_family(families=NARROWER)
def test_a_narrower_model_equals_the_model_cut_in_memory(family: Family, tmp_path: Path) -> None:
    source, output = make_model(tmp_path / "model", tiny_config(family)), tmp_path / "pruned"
    width = new_width(source)
    result = prune(source, output, keep=family.keep, width=width)
    _, info = load_as_declared(output)
    assert not {key: value for key, value in info.items() if value}, "the result must load clean"
    ids = token_ids()
    with torch.no_grad():
        found = load_whole(output)(input_ids=ids, use_cache=False).logits
        expected = cut_in_memory(source, output, result)(input_ids=ids, use_cache=False).logits
    assert expected.abs().max() > 0.05
    assert torch.equal(found, expected)
    proof = verify(output, source)
    assert (proof.nbytes, proof.computed) == (result.summary["output_bytes"], 0)
    assert open_moe(open_checkpoint(output)).layout.width.width == width  # type: ignore[union-attr]


@pytest.mark.families
@pytest.mark.parametrize("name", FIXED)
def test_experts_that_cannot_be_narrower_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family(name)))
    with pytest.raises(UnsupportedModelError, match=rf"cannot be made narrower.* {FIXED[name]}.*omit --width and --by"):
        prune(source, tmp_path / "pruned", width=16)
    assert not (tmp_path / "pruned").exists()


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything that decides what a model computes."""
    files = [*folder.glob("*.safetensors"), folder / "config.json", folder / "model.safetensors.index.json"]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("name", DISTINCT)
def test_pruning_from_scores_gives_the_same_bytes_as_a_run(name: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family(name)))
    width = new_width(source)
    for options in ({"width": width}, {"width": width, "keep": 4}):
        output, again = tmp_path / f"run-{len(options)}", tmp_path / f"prune-{len(options)}"
        by_run = prune(source, output, **({"keep": None} | options))
        by_scores = prune_from_scores(
            PruneSettings(model=str(source), output=again, scores=output, **options), quiet=True
        )
        assert by_scores.layers == by_run.layers
        assert files_of(again) == files_of(output)


def test_the_channels_with_the_highest_energy_stay(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    result = prune(source, tmp_path / "out", keep=None, width=12)
    scores = read_scores(tmp_path / "out")
    for layer, statistics in zip(result.layers, scores.layers, strict=True):
        assert layer.kept == tuple(range(8))
        assert layer.channels is not None
        energies = statistics.channels
        assert energies is not None
        for expert, channels in enumerate(layer.channels.indices):
            own = energies[:, expert].sum(axis=0)
            assert set(channels) == set(np.argsort(-own, kind="stable")[:12])


def test_layers_with_different_numbers_of_experts_can_be_narrower_too(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    output = tmp_path / "out"
    result = prune(source, output, keep=5, width=16, schedule="linear-decrease", spread=0.3)
    assert len({len(layer.kept) for layer in result.layers}) > 1
    assert {layer.channels.indices.shape[1] for layer in result.layers if layer.channels} == {16}
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=token_ids(), use_cache=False).logits).all()
    assert verify(output, source).computed == 0


def test_held_out_text_goes_through_the_narrower_layers(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    narrow = prune(source, tmp_path / "narrow", keep=None, width=8, evaluate=True)
    wider = prune(source, tmp_path / "wider", keep=None, width=28, evaluate=True)
    assert 0 < wider.summary["evaluation"]["all"]["kl"] < narrow.summary["evaluation"]["all"]["kl"]


def test_a_width_that_kernels_do_not_like_is_taken_with_a_note(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    output = tmp_path / "out"
    text = write_token_ids(tmp_path / "text.jsonl", sequences=20)
    words = ["run", str(source), "-o", str(output), "--width", "23", "--calibration", str(text), "--evaluate"]
    told = CliRunner().invoke(main, words)
    assert told.exit_code == 0, told.output
    assert "23 channels are no multiple of 4 (16 bytes)" in told.stderr
    assert "keeping 8 of 8, each with 23 of 32 channels" in told.stderr
    model = AutoModelForCausalLM.from_pretrained(output, experts_implementation="eager")
    assert model.model.layers[0].mlp.experts.down_proj.shape == (8, 64, 23)


def test_a_changed_byte_or_channel_is_found(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    output = tmp_path / "out"
    prune(source, output, keep=6, width=16)
    record = json.loads((output / "streamprune.json").read_text())
    layer = record["layers"][1]
    indices = ChannelMask.from_text(layer["channels"], 32, 6).indices.copy()
    other = next(channel for channel in range(32) if channel not in indices[2])
    indices[2, 0] = other
    changed = {**layer, "channels": ChannelMask.of(indices, 32).as_text()}
    layers = [record["layers"][0], changed, *record["layers"][2:]]
    (output / "streamprune.json").write_text(json.dumps({**record, "layers": layers}))
    with pytest.raises(VerifyError, match=r"experts\.2\.\w+_proj\.weight differs from the source at byte"):
        verify(output, source)
    (output / "streamprune.json").write_text(
        json.dumps({**record, "layers": [{**each, "channels": "AAAA"} for each in record["layers"]]})
    )
    with pytest.raises(VerifyError, match="the channels of layer 0 are not valid"):
        verify(output, source)


def test_scores_without_channels_cannot_choose_a_width(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    prune(source, tmp_path / "out", channels=False)
    settings = PruneSettings(model=str(source), output=tmp_path / "narrow", scores=tmp_path / "out", width=16)
    with pytest.raises(ScoresError, match=r"no energies of channels.*--no-channels"):
        prune_from_scores(settings, quiet=True)
    with pytest.raises(SettingsError, match="--no-channels"):
        prune(source, tmp_path / "other", width=16, channels=False)


def test_masks_are_exact_and_check_what_they_read() -> None:
    indices = np.array([[0, 3, 9], [1, 2, 8]])
    mask = ChannelMask.of(indices[:, ::-1], 10)
    assert np.array_equal(mask.indices, indices)
    assert ChannelMask.from_text(mask.as_text(), 10, 2) == mask
    none, unequal, beyond = "AAAAAA==", "gAAAAA==", "gCCAIA=="
    for text, width, experts in (
        (mask.as_text(), 10, 3), (mask.as_text(), 17, 2), ("!", 10, 2), (none, 10, 2), (unequal, 10, 2),
        (beyond, 10, 2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"channels|numbers|base64|padding"):
            ChannelMask.from_text(text, width, experts)


PLAIN = WidthSpec((), ("moe_intermediate_size",), 768)
SHARED = WidthSpec((), ("moe_intermediate_size",), 1408, "n_shared_experts", 2)


def test_widths_are_multiples_that_formats_and_shared_experts_take() -> None:
    widths = {768: 128, 512: 128, 256: 64, 2880: 64, 1408: 128, 96: 16, 32: 8, 30: 1}
    assert {width: default_multiple(width) for width in widths} == widths
    assert allowed_widths(PLAIN) == [128, 256, 384, 512, 640]
    assert allowed_widths(SHARED) == [128, 256]
    assert allowed_widths(SHARED, 64) == [64, 128, 256, 704]
    assert width_for_share(PLAIN, 0.5) == 384
    assert width_for_share(PLAIN, 0.51) == 512
    assert width_for_share(PLAIN, 0.75, 64) == 576
    check_width(SHARED, 704)
    with pytest.raises(SettingsError, match=r"2816 channels.*not a multiple of 700. Nearest widths: 352 and 704"):
        check_width(SHARED, 700)
    with pytest.raises(SettingsError, match="Keep between 1 and 767 of them, preferably a multiple of 128"):
        check_width(PLAIN, 768)
    with pytest.raises(SettingsError, match="no multiple of 1000 is smaller than the 768 channels"):
        allowed_widths(PLAIN, 1000)


def test_notes_name_what_does_not_take_a_width() -> None:
    assert list(width_notes(512, 2)) == []
    assert "llama.cpp's k-quants (256)" in next(width_notes(384, 2))
    notes = list(width_notes(20, 2))
    assert "no multiple of 8 (16 bytes)" in notes[0]
    assert "FP8 blocks (128), 4-bit groups of 32 (32)" in notes[1]


def counts(**target: Any) -> tuple[int | None, int | None]:
    """Experts and channels that stay in a model of 128 experts (top-8) with 768 channels, in 4 layers."""
    spec = ExpertSpec((), "num_experts", 128, 8)
    model = Prunable(spec, (0, 1, 2, 3), PLAIN, "")

    def footprint() -> Footprint:
        raise AssertionError("no budget was given")

    found = plan_counts(PruningTarget(**target), model, footprint)
    return found.keep, found.width


def test_a_share_is_removed_from_experts_channels_or_both() -> None:
    assert counts(ratio=0.5) == (64, None)
    assert counts(ratio=0.5, width=384) == (64, 384)
    assert counts(width=384) == (128, 384)
    assert counts(keep=128, width=384) == (128, 384)
    assert counts(ratio=0.5, by="channels") == (128, 384)
    assert counts(ratio=0.25, by="channels") == (128, 640)
    assert counts(ratio=0.25, by="channels", width_multiple=64) == (128, 576)
    # 640 of 768 channels and 77 of 128 experts: 50.1 %.
    assert counts(ratio=0.5, by="both") == (77, 640)
    assert counts(ratio=0.9, by="both") == (39, 256)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"width": 16, "by": "channels", "ratio": 0.5}, "--by channels finds the width itself"),
        ({"keep": 4, "by": "both"}, "--by both is for --ratio and for a budget"),
        ({"ratio": 0.5, "width_multiple": 64}, "--width-multiple is for --by"),
        ({"ratio": 0.5, "by": "layers"}, "--by 'layers' is unknown"),
        ({"width": 0}, "--width 0 is too small"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(target: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        PruningTarget(**target)


@pytest.mark.parametrize("by", ["channels", "both"])
def test_the_budget_is_filled_with_narrower_experts(by: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("mixtral")))
    whole = json.loads(call("fit", str(source), "--context", "128", "--budget-gib", "8", "--json"))
    sizes = {term["name"]: term["bytes"] for term in whole["terms"]}
    budget = (sum(sizes.values()) - sizes["weights: experts"] * 0.4) / 2**30
    result = prune(source, tmp_path / "out", budget_gib=budget, context=128, by=by, width_multiple=4)
    record = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    width, keep = record["settings"]["width"], record["settings"]["keep"]
    memory = result.summary["memory"]
    assert memory["total_bytes"] <= budget * 2**30
    written = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "out").values())
    assert memory["weights_bytes"] == written
    assert (keep == 8) == (by == "channels")
    assert width < 96
    # One step more would not fit.
    steps = {"width": width + 4, "keep": keep} if by == "channels" else {"width": width, "keep": keep + 1}
    if steps["keep"] < 9:
        more = prune(source, tmp_path / "more", **steps)
        extra = more.summary["output_bytes"] - written
        assert memory["total_bytes"] + extra > budget * 2**30


def call(*words: str) -> str:
    told = CliRunner().invoke(main, words)
    assert told.exit_code == 0, told.output
    return told.stdout


def test_another_width_is_not_taken_for_the_same_run(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    output = tmp_path / "out"
    with pytest.raises(Injected), breaking_at(3):
        prune(source, output, keep=None, ratio=0.5, by="channels")
    with pytest.raises(ResumeError, match=r"channels kept.*16.*24"):
        prune(source, output, keep=None, ratio=0.25, by="channels")
    result = prune(source, output, keep=None, ratio=0.5, by="channels")
    again = prune(source, tmp_path / "again", keep=None, ratio=0.5, by="channels")
    assert files_of(output) == files_of(tmp_path / "again")
    assert result.layers == again.layers


def test_a_config_alone_gives_the_same_width_for_a_budget(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("mixtral")))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((source / "config.json").read_bytes())
    found = []
    for model in (source, alone):
        words = ["run", str(model), "-o", str(tmp_path / "out"), "--by", "channels", "--width-multiple", "4"]
        found.append(json.loads(call(*words, "--budget-gib", "0.5014", "--context", "128", "--dry-run", "--json")))
    assert found[0]["width"] == found[1]["width"] < 96
    assert found[0]["memory"]["total_bytes"] == found[1]["memory"]["total_bytes"]


def without_down(layout: dict[str, Any]) -> None:
    channels = layout["tensors"]["channels"]
    for name in [name for name in channels if "down_proj" in name]:
        del channels[name]


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (lambda layout: layout["tensors"].update(channels={}), "nothing says where the channels of"),
        (without_down, "nothing says where the channels of"),
        (lambda layout: layout["tensors"]["width"].update(names=[]), "no width of experts"),
        (lambda layout: layout["tensors"]["width"].update(shared="num_hidden_layers", shared_count=4), "no width of"),
        (lambda layout: layout["tensors"]["width"].update(width=2**62), "no width of experts"),
        (lambda layout: layout["tensors"]["width"].update(width=64), "64 channels"),
        (lambda layout: layout["memory"].update(itemsize=0), "weights of 0 bytes"),
    ],
)
def test_forged_scores_cannot_make_a_wrong_model(forge: Any, words: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    prune(source, tmp_path / "out")
    scores = read_scores(tmp_path / "out")
    layout = json.loads(json.dumps(scores.layout))
    forge(layout)
    write_scores(tmp_path / "forged.safetensors", replace(scores, layout=layout))
    settings = PruneSettings(
        model=str(source), output=tmp_path / "narrow", scores=tmp_path / "forged.safetensors", width=16
    )
    with pytest.raises(StreampruneError, match=words):
        prune_from_scores(settings, quiet=True)
    assert not (tmp_path / "narrow").exists()


def test_scores_of_another_width_are_refused(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    prune(source, tmp_path / "out")
    scores = read_scores(tmp_path / "out")
    layers = tuple(
        replace(layer, channels=np.concatenate([layer.channels, layer.channels], axis=2))  # type: ignore[arg-type, list-item]
        for layer in scores.layers
    )
    forged = tmp_path / "forged.safetensors"
    write_scores(forged, replace(scores, layers=layers, layout=None))
    with pytest.raises(ScoresError, match="scores of 64 channels for each expert, but the model has 32"):
        prune_from_scores(
            PruneSettings(model=str(source), output=tmp_path / "narrow", scores=forged, width=16), quiet=True
        )
    with pytest.raises(ScoresError, match="scores of 64 channels for each expert, but the model has 32"):
        prune(source, tmp_path / "narrow", keep=None, width=16, refit=True, scores=forged, anchor="none")


def test_a_factor_that_the_config_leaves_to_its_default_has_to_be_stated(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("deepseek_v3")))
    config = json.loads((source / "config.json").read_text())
    del config["n_shared_experts"]
    (source / "config.json").write_text(json.dumps(config))
    scores, text = tmp_path / "scores.safetensors", (str(write_token_ids(tmp_path / "text.jsonl")),)
    run(RunSettings(model=str(source), output=scores, only_score=True, calibration=text), quiet=True)
    settings = PruneSettings(model=str(source), output=tmp_path / "out", scores=scores, width=16)
    with pytest.raises(CheckpointError, match=r'leaves "n_shared_experts": 1 to the model\'s defaults'):
        prune_from_scores(settings, quiet=True)


def test_channels_that_cannot_be_scored_are_refused_before_scoring(tmp_path: Path) -> None:
    config = tiny_config(known_family("qwen3_moe"))
    config.moe_intermediate_size = 30
    source = make_model(tmp_path / "model", config)
    with pytest.raises(UnsupportedModelError, match="their channels cannot be scored"):
        prune(source, tmp_path / "out", keep=None, width=16)


def test_only_down_projections_of_refitted_layers_may_be_computed(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tiny_config(known_family("qwen3_moe")))
    output = tmp_path / "out"
    prune(source, output, width=16)
    record = json.loads((output / "streamprune.json").read_text())
    for name in ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.0.down_proj.weight"):
        forged = {**record, "computed": {name: {"stage": "refit", "sha256": "0" * 64}}}
        (output / "streamprune.json").write_text(json.dumps(forged))
        with pytest.raises(VerifyError, match="a refit computes the down projections of refitted layers only"):
            verify(output, source)
