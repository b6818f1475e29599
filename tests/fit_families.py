"""The families whose cache can be worked out: all, two of them with full-attention layers among the linear ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.tiny import FAMILIES, MLA

#: The first full-attention layer of these lies behind the four layers of the tiny models. transformers itself cannot
#: run a model that has none with a cache.
_DEEPER: dict[str, dict[str, Any]] = {
    "kimi_linear": {**MLA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "bailing_hybrid": {**MLA, "layer_types": ["linear_attention", "full_attention"] * 2},
}
CACHED = [replace(family, sizes=family.sizes | _DEEPER.get(family.id, {})) for family in FAMILIES]
