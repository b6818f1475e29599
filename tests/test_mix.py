"""Mixes: shares become weights of sources; what is no mix is refused in one message."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprune.errors import SettingsError
from streamprune.selection.settings import mix_weights, parse_mix

SHARES = st.floats(0, 1e9, allow_subnormal=False)


def test_a_mix_is_read() -> None:
    assert parse_mix("code=0.5,general=0.5") == {"code": 0.5, "general": 0.5}
    assert parse_mix(" code = 7 , general=3") == {"code": 7.0, "general": 3.0}
    assert parse_mix("a=1e-3") == {"a": 0.001}
    # Names of files may have whatever they like.
    assert parse_mix("my,file=v2.txt=1,b=2") == {"my,file=v2.txt": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    "text",
    ["", " ", ",", "code", "code=", "=1", "code=x", "code=-1", "code=nan", "code=inf", "code=0", "a=0,b=0", "a=1,a=1",
     "a=1,,b=1", "a=1,b", "a=1;b=2", "a=1e308,b=1e308", "x" * 200_000, "a=1," * 50_000],
)  # fmt: skip
def test_what_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--mix") as refusal:
        mix_weights(text, ("a", "b"), (10, 10))
    assert len(str(refusal.value)) < 1000


def test_no_mix_and_the_real_shares_count_every_token_once() -> None:
    assert mix_weights(None, ("a", "b"), (30, 10)) == (1.0, 1.0)
    assert mix_weights("a=0.75,b=0.25", ("a", "b"), (30, 10)) == (1.0, 1.0)
    assert mix_weights("a=3,b=1", ("a", "b"), (30, 10)) == (1.0, 1.0)


def test_sources_that_are_not_named_count_for_nothing() -> None:
    assert mix_weights("b=1", ("a", "b"), (30, 10)) == (0.0, 4.0)


def test_an_unknown_source_is_told_with_those_there_are() -> None:
    with pytest.raises(SettingsError, match=r"no source 'general'.*code \(30 tokens\), prose \(1,000 tokens\)"):
        mix_weights("code=1,general=1", ("code", "prose"), (30, 1000))
    many = tuple(f"s{number}" for number in range(500))
    with pytest.raises(SettingsError, match="and 480 more"):
        mix_weights("x=1", many, (1,) * 500)
    with pytest.raises(SettingsError, match="source b has no tokens"):
        mix_weights("a=1,b=1", ("a", "b"), (30, 0))


@given(
    st.lists(st.tuples(SHARES, st.integers(1, 10**9)), min_size=1, max_size=6).filter(
        lambda s: s and any(p[0] for p in s)
    )
)
def test_weighted_tokens_have_the_shares_and_the_same_total(sources: list[tuple[float, int]]) -> None:
    names = [f"source {number}" for number in range(len(sources))]
    tokens = [count for _, count in sources]
    mix = ",".join(f"{name}={share!r}" for name, (share, _) in zip(names, sources, strict=True))
    weights = mix_weights(mix, names, tokens)
    whole = sum(share for share, _ in sources)
    assert math.isclose(sum(w * t for w, t in zip(weights, tokens, strict=True)), sum(tokens), rel_tol=1e-9)
    for weight, (share, count) in zip(weights, sources, strict=True):
        assert math.isclose(weight * count / sum(tokens), share / whole, rel_tol=1e-9)
