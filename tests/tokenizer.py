"""A tiny byte-level tokenizer, made on the spot, with a chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def save_tokenizer(folder: Path, *, bos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    """Save a tokenizer whose token is the byte, less 3 (ids 0 to 2: pad, bos, eos); 256 ids in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {character: 3 + i for i, character in enumerate(alphabet[:253])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>" if bos else None, eos_token="</s>"
    )
    if chat:
        fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return fast
