"""What `streamprune calibration show` prints: shares, counts and a sample of each source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamprune.calibration.records import load_tokenizer
from streamprune.calibration.sequences import Calibration, load_calibration
from streamprune.checkpoint.hub import resolve_model
from streamprune.errors import CalibrationError
from streamprune.models.config import load_config
from streamprune.tables import Table

#: Characters of a sample.
SAMPLE_CHARACTERS = 400


def show_calibration(
    sources: tuple[str, ...],
    model: str,
    *,
    samples: int | None,
    seq_len: int | None,
    seed: int | None,
    revision: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Make the calibration that a run of this model would have, without its weights; described as JSON."""
    folder = resolve_model(model, revision, trust_remote_code, tokenizer_only=True)
    config = load_config(folder, trust_remote_code).get_text_config(decoder=True)
    calibration = load_calibration(
        sources,
        folder,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        trust_remote_code=trust_remote_code,
    )
    return describe_calibration(calibration, folder, trust_remote_code)


def describe_calibration(calibration: Calibration, folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """A calibration as JSON: how it was made, and of each source the share it has and the text of a sequence."""
    sources = []
    for index, made in enumerate(calibration.recipe["sources"]):
        first = calibration.sequences[calibration.source_of.index(index)]
        share = made["tokens"] / calibration.tokens
        sample = _text_of(first.tolist(), folder, trust_remote_code)
        sources.append({**made, "share_of_tokens": share, "sample": sample})
    return {
        **calibration.recipe,
        "sources": sources,
        "sequences": len(calibration.sequences),
        "tokens": calibration.tokens,
        "fingerprint": calibration.fingerprint,
        "notes": list(calibration.notes),
    }


def calibration_text(described: dict[str, Any]) -> str:
    """What `describe_calibration` gives, for people."""
    lines = []
    if described.get("description"):
        lines.append(f"{described['name']}: {described['description']}")
    lines.append(
        f"{described['sequences']:,} sequences, {described['tokens']:,} tokens; {described['mode']}, at most "
        f"{described['sequence_length']:,} tokens each; seed {described['seed']}"
    )
    rows = [
        (
            source["name"],
            "-" if source["share"] is None else f"{source['share']:.1%}",
            f"{source['share_of_tokens']:.1%}",
            *(f"{source[key]:,}" for key in ("tokens", "sequences", "records")),
        )
        for source in described["sources"]
    ]
    lines += Table("", ("source", "asked", "got", "tokens", "sequences", "records"), rows).text()
    lines.append(f"fingerprint {described['fingerprint']}")
    lines += [f"note: {note}" for note in described["notes"]]
    for source in described["sources"]:
        lines.append(f"\n{source['name']}:")
        lines += [f"  | {line}" for line in source["sample"].split("\n")]
    return "\n".join(lines)


def _text_of(ids: list[int], folder: Path, trust_remote_code: bool) -> str:
    """The beginning of a sequence as text; its numbers, where the model has no tokenizer."""
    try:
        text = load_tokenizer(folder, trust_remote_code).decode(ids[:SAMPLE_CHARACTERS])
    except CalibrationError:
        text = " ".join(map(str, ids))
    # Of what a stranger's text does to a terminal, only the ends of lines are let through.
    text = "".join(character if character.isprintable() or character == "\n" else "?" for character in text)
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} …"
