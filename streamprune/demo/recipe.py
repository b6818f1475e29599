"""The demo's token sequences as files: the text that commands are given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from streamprune.disk.disk_errors import writing


def write_sequences(path: Path, rows: torch.Tensor) -> None:
    """Write token ids (N, L) as calibration data: a JSONL file with a sequence per line."""
    text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist())
    path.write_text(text, encoding="utf-8")


def write_recipe(folder: Path, name: str, domains: Mapping[str, torch.Tensor]) -> Path:
    """Write each domain's token ids (N, L), and a recipe that has every domain as a source; returns the recipe.

    Raises OutputError, ResourceError.
    """
    recipe = folder / f"{name}.json"
    length = max(rows.shape[1] for rows in domains.values())
    sources = [
        {"name": domain, "path": f"{name}-{domain}.jsonl", "samples": len(rows)} for domain, rows in domains.items()
    ]
    with writing(f"Writing {recipe}", folder):
        for source, rows in zip(sources, domains.values(), strict=True):
            write_sequences(folder / str(source["path"]), rows)
        recipe.write_text(json.dumps({"name": name, "sequence_length": length, "sources": sources}), encoding="utf-8")
    return recipe
