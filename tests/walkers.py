"""Tiny Qwen3-MoE models that walk: each token is followed by one that is laid down for it, whatever came before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.tiny import VOCAB, Family, tiny_config
from tests.tokenizer import save_tokenizer

END = 2
LAST = 180
#: A template that opens the answer with another token where it lets the model think.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{% if enable_thinking %}T{% else %}N{% endif %}{% endif %}"
)


def walk(path: Sequence[int], *others: Sequence[int]) -> dict[int, int]:
    """What follows each token along these paths."""
    return {here: there for each in (path, *others) for here, there in pairwise(each)}


def straight(without: Sequence[int] = ()) -> dict[int, int]:
    """A way through the tokens below LAST, less some, each once, that ends in the end of the text."""
    return walk([token for token in range(3, LAST) if token not in without] + [END])


def ring(first: int, length: int) -> dict[int, int]:
    """A way that goes round through `length` tokens for ever."""
    return walk([*range(first, first + length), first])


def make_walker(
    folder: Path,
    follows: Mapping[int, int],
    *,
    template: str | None = None,
    sharpness: float = 4.0,
    **generation: float,
) -> Path:
    """A model whose next token is `follows` of the last one; with little `sharpness` only the likeliest one by little.

    Attention and experts are real, and add nothing: embeddings have a direction for each token, and the head gives each
    direction to the token that follows.
    """
    config = tiny_config(Family("qwen3_moe", {"hidden_size": VOCAB, "num_hidden_layers": 1}))
    config.max_position_embeddings = 1024
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.data.zero_()
    model.get_input_embeddings().weight.data.copy_(torch.eye(VOCAB))
    head = torch.zeros(VOCAB, VOCAB)
    for here, there in follows.items():
        head[there, here] = sharpness
    model.get_output_embeddings().weight.data.copy_(head)
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=0, **generation)
    if "temperature" in generation:
        # transformers saves no temperature for greedy decoding.
        model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer = save_tokenizer(folder, chat=False)
    if template is not None:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return folder
