"""Experts in what JSON says of quantized weights: renumbered by layer, or refused with a reason."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from streamprune.errors import UnsupportedModelError
from streamprune.files.json_text import differences
from streamprune.formats.quantization import Quantization, sections_of, with_sections
from streamprune.formats.renumber import ExpertNames, check_names, partly_plain, renumber

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
KEPT = {1: (0, 2, 5), 2: (1, 2, 3, 7)}
WHERE = "config.json"


def names_of(
    path: str = "model.layers", inner: str = "mlp.experts", layers: Any = (1, 2), count: int = 8
) -> ExpertNames:
    found = {layer: [(f"{path}.{layer}.{inner}", each) for each in PROJECTIONS] for layer in layers}
    return ExpertNames(count, frozenset({path}), found, frozenset({"model.layers.3.mlp.experts.0", "head.experts.1"}))


NAMES = names_of()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.mlp.experts.5.down_proj", "model.layers.1.mlp.experts.2.down_proj"),
        ("model.layers.2.mlp.experts.7.down_proj", "model.layers.2.mlp.experts.3.down_proj"),
        ("model.layers.1.mlp.experts.0", "model.layers.1.mlp.experts.0"),
        ("model.layers.2.mlp.experts.7.down_proj.weight", "model.layers.2.mlp.experts.3.down_proj.weight"),
        # Experts that leave, or that do not exist.
        ("model.layers.1.mlp.experts.7.down_proj", None),
        ("model.layers.2.mlp.experts.0.down_proj", None),
        ("model.layers.1.mlp.experts.8.down_proj", None),
        # As other engines call the same modules.
        ("layers.1.mlp.experts.5.w2", "layers.1.mlp.experts.2.w2"),
        ("model.language_model.layers.1.mlp.experts.5.w2", "model.language_model.layers.1.mlp.experts.2.w2"),
        ("language_model.model.layers.1.mlp.experts.5.w2", "language_model.model.layers.1.mlp.experts.2.w2"),
        ("model.layers.1.block_sparse_moe.experts.5.w2", "model.layers.1.block_sparse_moe.experts.2.w2"),
        # Nothing of these is a routed expert that is pruned.
        ("model.layers.1.mlp.shared_experts.0.up_proj", "model.layers.1.mlp.shared_experts.0.up_proj"),
        ("model.layers.1.mlp.gate", "model.layers.1.mlp.gate"),
        ("model.layers.0.mlp.experts.7.up_proj", "model.layers.0.mlp.experts.7.up_proj"),
        ("model.layers.3.mlp.experts.7.up_proj", "model.layers.3.mlp.experts.7.up_proj"),
        ("mtp.layers.1.mlp.experts.7.up_proj", "mtp.layers.1.mlp.experts.7.up_proj"),
        ("head.experts.1.up_proj", "head.experts.1.up_proj"),
        ("lm_head", "lm_head"),
        ("e4m3", "e4m3"),
    ],
)
def test_a_name_has_the_number_of_its_tensors(name: str, expected: str | None) -> None:
    left = [] if expected is None else [expected]
    assert renumber(["a", name, "b"], NAMES, KEPT, WHERE) == ["a", *left, "b"]
    keys = renumber({"a": 1, name: {"bits": 16}, "b": [2]}, NAMES, KEPT, WHERE)
    assert list(keys.items()) == [("a", 1), *((key, {"bits": 16}) for key in left), ("b", [2])]
    assert renumber({"like": name, "b": name[:3]}, NAMES, KEPT, WHERE) == {
        **({"like": expected} if expected else {}),
        "b": name[:3],
    }


def test_every_other_value_and_the_order_stay() -> None:
    section = {"zero": 0, "bits": 4, "x": [None, True, 1.5, {"y": [["lm_head", "model.layers.1.mlp.gate"]]}], "a": ""}
    assert json.dumps(renumber(copy.deepcopy(section), NAMES, KEPT, WHERE)) == json.dumps(section)
    assert not check_names(section, NAMES, WHERE)
    assert check_names({"ignore": ["model.layers.2.mlp.experts.3.up_proj"]}, NAMES, WHERE)


def test_lists_of_thousands_of_names() -> None:
    """As Qwen's lists, with all experts of the last layers: each layer by its own numbers, in order, none left over."""
    names = names_of(layers=range(48), count=128)
    kept = {layer: tuple(range(layer % 3, 128, 2 + layer % 2)) for layer in range(48)}
    listed = []
    for layer in range(48):
        listed += [f"model.layers.{layer}.input_layernorm", f"model.layers.{layer}.mlp.gate"]
        listed += [f"model.layers.{layer}.mlp.experts.{expert}.{each}" for expert in range(128) for each in PROJECTIONS]
    found = renumber(listed, names, kept, WHERE)
    expected = []
    for layer in range(48):
        numbers = range(len(kept[layer]))
        expected += [f"model.layers.{layer}.input_layernorm", f"model.layers.{layer}.mlp.gate"]
        expected += [f"model.layers.{layer}.mlp.experts.{number}.{each}" for number in numbers for each in PROJECTIONS]
    assert found == expected


def test_a_nested_section_of_a_multimodal_model() -> None:
    """As Kimi-K2.5 has it: in the text part, with patterns for everything but one name."""
    section = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            "language_model.model.layers.2.mlp.experts.7.up_proj",
        ],
        "quant_method": "compressed-tensors",
    }
    config = {"model_type": "kimi_k25", "text_config": {"n": 1, "quantization_config": section}, "vision_config": {}}
    names = names_of("language_model.model.layers")
    assert [path for path, _ in sections_of(config)] == [("text_config", "quantization_config")]
    found = with_sections(config, lambda each: renumber(each, names, KEPT, WHERE))
    section["ignore"][-1] = "language_model.model.layers.2.mlp.experts.3.up_proj"  # type: ignore[index]
    assert json.dumps(found) == json.dumps(config)
    assert Quantization.of(found).method == "compressed-tensors"


def test_both_names_of_a_section_wherever_they_stand() -> None:
    entry = {"ignore": ["model.layers.1.mlp.experts.5"]}
    config = {"compression_config": entry, "text_config": {"compression_config": entry, "quantization_config": entry}}
    found = with_sections(config, lambda each: renumber(each, NAMES, KEPT, WHERE))
    assert len(list(sections_of(config))) == 3
    assert json.dumps(found) == json.dumps(config).replace("experts.5", "experts.2")
    assert entry["ignore"] == ["model.layers.1.mlp.experts.5"]


@pytest.mark.parametrize(
    "pattern",
    [
        "re:.*self_attn.*",
        "re:.*lm_head",
        r"re:.*mlp\.experts\.\d+\.(gate|up)_proj$",
        r"re:.*experts\.[0-9]+\.down_proj",
        r"re:model\.layers\.1\.mlp\.experts\..*",
        r"re:.*layers\.(1|2)\..*",
        r"re:.*shared_experts\.0\..*",
        r"-:.*layers\.\d+\.mlp\.gate$",
        r"+:.*\.experts\..*",
        r".*\.experts\..*up_proj",
        "model.layers.*.mlp.experts.*",
        "*.experts.*",  # of the shell
        "model.layers.1.mlp[",
        "[0.5, 2]",  # no name, though it would match some
    ],
)
def test_patterns_that_take_all_experts_alike_stay(pattern: str) -> None:
    section = {"ignore": [pattern], "dynamic": {pattern: {"bits": 8}}}
    assert renumber(section, NAMES, KEPT, WHERE) == section


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"re:.*experts\.3\..*", "with the number of an expert"),
        (r"re:.*experts\.(1|3)\..*", "with the number of an expert"),
        (r"+:.*experts\.[0-3]\..*", "with the number of an expert"),
        (r"re:vlm\.layers\.1\.mlp\.experts[.]1", "with the number of an expert"),
        ("model.layers.*.mlp.experts.3.up_proj", "with the number of an expert"),
        (r"re:.*\.[0-3]\.up_proj", "for only 4 of 8 experts of layer 1, such as model.layers.1.mlp.experts.0.up_proj"),
        (r"-:.*mlp\.exp.*s\.7\.", "for only 1 of 8 experts of layer 1"),
        (r"re:model\.layers\.2\.mlp\.\w+\.\d*[02468]\.", "for only 4 of 8 experts of layer 2"),
        # Matched anywhere (AutoRound), not from the beginning.
        (r"mlp\.\w+\.5\.", "for only 1 of 8 experts of layer 1"),
    ],
)
def test_patterns_that_take_some_experts_are_refused_before_any_is_chosen(pattern: str, reason: str) -> None:
    for section in ({"ignore": ["lm_head", pattern]}, {"dynamic": {pattern: {}}}):
        with pytest.raises(UnsupportedModelError, match=reason) as caught:
            check_names(section, NAMES, "quantize_config.json")
        assert str(caught.value).startswith("quantize_config.json has a pattern")
        assert json.dumps(pattern)[1:-1] in str(caught.value)
        assert "Replace it by the full names" in str(caught.value)


def test_patterns_are_matched_against_the_names_of_a_model_s_text_part_alone() -> None:
    """The checkpoint says `language_model.model.layers`, an engine that builds the text part only `model.layers`."""
    names = names_of("language_model.model.layers")
    with pytest.raises(UnsupportedModelError, match=r"only 1 of 8 experts of layer 1, such as model\.layers\.1"):
        check_names([r"re:^model\.layers\.\d\.mlp\.\w+\.3\."], names, WHERE)


@pytest.mark.parametrize(
    "name",
    ["mlp.experts.3.up_proj", "experts.3", "block_sparse_moe.experts.0.w1", "model.layers.1.mlp.experts.0-3.up_proj",
     "audio.layers.1.mlp.experts.3.up_proj"],
)  # fmt: skip
def test_names_without_a_layer_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="but not in which layer") as caught:
        check_names({"modules_in_block_to_quantize": [["self_attn.q_proj", name]]}, NAMES, WHERE)
    assert name in str(caught.value)
    assert "Write the full names" in str(caught.value)


def test_several_names_in_one_text() -> None:
    text = "model.layers.1.mlp.experts.2, model.layers.2.mlp.experts.2"
    assert renumber({"blocks": text}, NAMES, KEPT, WHERE) == {
        "blocks": "model.layers.1.mlp.experts.1, model.layers.2.mlp.experts.1"
    }
    with pytest.raises(UnsupportedModelError, match="several experts in one text"):
        check_names({"blocks": text}, NAMES, WHERE)


def test_experts_in_one_tensor_may_still_be_named() -> None:
    names = ExpertNames(8, frozenset({"model.layers"}), {1: (), 2: ()})
    listed = ["model.layers.1.mlp.experts.5.up_proj", "model.layers.2.mlp.experts.0.up_proj", "re:.*mlp.*"]
    assert renumber(listed, names, KEPT, WHERE) == ["model.layers.1.mlp.experts.2.up_proj", "re:.*mlp.*"]


def test_layers_of_which_only_some_experts_are_plain() -> None:
    counts = {1: 3, 2: 4}
    some = "model.layers.1.mlp.experts.{}.up_proj"
    assert partly_plain({"ignore": [some.format(0), "lm_head"]}, NAMES, counts) == [1]
    assert partly_plain({"ignore": [some.format(number) for number in range(3)]}, NAMES, counts) == []
    assert partly_plain({"modules_to_not_convert": ["model.layers.3.mlp.experts.0"]}, NAMES, counts) == []
    assert partly_plain({"extra_config": {some.format(1): {"bits": 16}}}, NAMES, counts) == [1]
    assert partly_plain({"extra_config": {some.format(1): {"bits": 8}}}, NAMES, counts) == []
    assert partly_plain({"targets": [some.format(1)]}, NAMES, counts) == []
    assert partly_plain("none", NAMES, counts) == []


def test_json_that_is_nested_without_sense() -> None:
    value: Any = "model.layers.1.mlp.experts.5"
    for _ in range(60):
        value = [value]
    with pytest.raises(UnsupportedModelError, match="nested more than 50 deep"):
        renumber(value, NAMES, KEPT, WHERE)
    config: dict[str, Any] = {"quantization_config": value}
    other = json.loads(json.dumps(config).replace("experts.5", "experts.6"))
    ((where, ours, theirs),) = differences(config, other)
    assert (where, ours == theirs) == ("quantization_config" + "[0]" * 49, False)
