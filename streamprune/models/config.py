"""What a model's config says about its experts and its dtype, as transformers reads it."""

from __future__ import annotations

import copy
import json
import platform
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from streamprune import __version__
from streamprune.checkpoint.index import CONFIG_NAME, read_json
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.models.config_json import (
    GROUP_NAMES,
    TOP_K_NAMES,
    TOPK_GROUP_NAMES,
    ExpertSpec,
    absurdity,
    expert_spec,
    stated_counts,
)


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config as transformers reads it.

    Raises UnsupportedModelError when transformers does not know the model, and CheckpointError for values that no model
    has.
    """
    absurd = absurdity(read_json(folder / CONFIG_NAME))
    if absurd is not None:
        raise CheckpointError(f"{folder / CONFIG_NAME} names {absurd}. No model has that: download it again.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as problem:
        # Configs are validated by each model's own code, which may raise anything on bad values.
        error = problem
    said = str(error)
    text = textwrap.shorten(said.replace("TypeError: ", "").replace("ValueError: ", ""), 300, placeholder=" …")
    if "trust_remote_code" in said:
        raise UnsupportedModelError(
            f"{folder} needs Python code of its own to be loaded, which is never run unasked. If you trust its author "
            "and have read the code, add --trust-remote-code."
        ) from error
    if (isinstance(error, (ValueError, KeyError)) and "model_type" in said) or "does not recognize" in said:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the model in {folder}: {text}\n"
            "A newer transformers may: `pip install --upgrade transformers`."
        ) from error
    raise CheckpointError(f"{folder / CONFIG_NAME} is not a usable model config: {text}") from error


def declared_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that a config names for its text part, else at its top; None if it names none."""
    declared = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return declared if isinstance(declared, torch.dtype) else None


def expert_candidates(config: PreTrainedConfig) -> Iterator[ExpertSpec]:
    """Every place of the (text) config that may state the number of routed experts, likeliest first."""
    text = config.get_text_config(decoder=True)
    base = [name for name, part in _sub_configs(config) if part is text][:1]
    if text is not config and not base:
        raise UnsupportedModelError(
            f"{config.model_type}: its text config lies deeper than one level; please report this model."
        )
    for part, *path in ((text, *base), *((sub, *base, name) for name, sub in _sub_configs(text))):
        values = _values(part)
        for name, count in stated_counts(values).items():
            spec = expert_spec(tuple(path), name, count, (values, _values(text)))
            if spec is None:
                raise UnsupportedModelError(
                    f"{config.model_type}: the config names {count} experts ({name}), but not how many the router "
                    f"picks per token (looked for {', '.join(TOP_K_NAMES)})."
                )
            yield spec


def _sub_configs(config: PreTrainedConfig) -> list[tuple[str, PreTrainedConfig]]:
    return [(name, value) for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)]


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config states, by the attributes' own names, and what it states of the router under any usual name."""
    aliases = dict(getattr(config, "attribute_map", {}) or {})
    own = [name for name in (*vars(config), *aliases.values()) if not name.startswith("_")]
    values = {}
    for name in dict.fromkeys((*own, *TOP_K_NAMES, *GROUP_NAMES, *TOPK_GROUP_NAMES)):
        # Configs with per-layer values refuse to name a global one (transformers' heterogeneous configs).
        with suppress(RuntimeError):
            values[name] = getattr(config, name, None)
    return values


def with_expert_count(config: PreTrainedConfig, spec: ExpertSpec, count: int) -> PreTrainedConfig:
    """A copy of `config` that states `count` experts."""
    changed = copy.deepcopy(config)
    part = changed
    for name in spec.path:
        part = getattr(part, name)
    old = getattr(part, spec.attribute)
    setattr(part, spec.attribute, [count] * len(old) if isinstance(old, list) else count)
    return changed


def count_names(config: PreTrainedConfig, spec: ExpertSpec) -> tuple[str, ...]:
    """The keys under which a `config.json` may state the number of experts: the attribute itself and its aliases."""
    part: Any = config
    for name in spec.path:
        # The model may have been built from its text part alone.
        part = getattr(part, name, part)
    aliases = (key for key, value in (getattr(part, "attribute_map", {}) or {}).items() if value == spec.attribute)
    return (spec.attribute, *sorted(aliases))


def config_from_dict(like: PreTrainedConfig, raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Build a config of the same class as `like` from the contents of a `config.json`."""
    # Through a file, since only that way transformers decodes values that JSON cannot express (infinity).
    with tempfile.TemporaryDirectory(prefix="streamprune-") as folder:
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(raw), encoding="utf-8")
        return type(like).from_pretrained(folder)


def versions() -> dict[str, str]:
    """The versions of everything that may change the digits of a result."""
    libraries = {module.__name__: module.__version__ for module in (torch, transformers, safetensors)}
    return {"streamprune": __version__, **libraries, "python": platform.python_version()}
