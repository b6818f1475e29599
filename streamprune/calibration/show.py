"""What `streamprune calibration show` prints: shares, counts and a sample of each source."""

from __future__ import annotations

from typing import Any

from streamprune.calibration.sequences import date_of, load_calibration
from streamprune.calibration.tokens import load_tokenizer
from streamprune.checkpoint.hub import resolve_model
from streamprune.common_settings import Sampling
from streamprune.errors import CalibrationError
from streamprune.models.open import load_config
from streamprune.tables import Table

#: Characters of a sample.
SAMPLE_CHARACTERS = 400


def show_calibration(
    sources: tuple[str, ...], model: str, sampling: Sampling, *, revision: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Make the calibration that a run of this model would use; its weights are not needed. Returns as JSON how it was
    made, with the share and a sample of each source.
    """
    folder = resolve_model(model, revision, trust_remote_code, tokenizer_only=True)
    config = load_config(folder, trust_remote_code).get_text_config(decoder=True)
    made = load_calibration(
        sources, folder, sampling, vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code)
    except CalibrationError:
        tokenizer = None
    described = []
    for index, source in enumerate(made.recipe["sources"]):
        sample = _text_of(made.sequences[made.source_of.index(index)].tolist(), tokenizer)
        described.append({**source, "share_of_tokens": source["tokens"] / made.tokens, "sample": sample})
    return {
        **made.recipe,
        "sources": described,
        "sequences": len(made.sequences),
        "tokens": made.tokens,
        "fingerprint": made.fingerprint,
        "notes": list(made.notes),
    }


def calibration_text(described: dict[str, Any]) -> str:
    """The result of `show_calibration` as text."""
    lines = []
    if described.get("description"):
        lines.append(f"{described['name']}: {described['description']}")
    lines.append(
        f"{described['sequences']:,} sequences, {described['tokens']:,} tokens; {described['mode']}, at most "
        f"{described['sequence_length']:,} tokens each; seed {described['seed']}"
        + (f"; date {date}" if (date := date_of(described)) is not None else "")
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


def _text_of(ids: list[int], tokenizer: Any) -> str:
    """The beginning of a sequence as text, or its token ids if the model has no tokenizer."""
    text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids[:SAMPLE_CHARACTERS])
    # Untrusted text may have control characters for the terminal; only line ends are kept.
    text = "".join(character if character.isprintable() or character == "\n" else "?" for character in text)
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} …"
