"""Asks llama.cpp: `python ask_llama.py LLAMA_CPP FOLDER...`, with a Python that has xllamacpp. Writes beside folders.

LLAMA_CPP is llama.cpp's source. `FOLDER.gguf` is what its converter makes of a model with its plain command, and
`FOLDER-llama.json` what its server answers for that, or why there is no answer. A result that is there is left alone: a
folder that kills the process has one, and the next process goes on behind it.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clients.answers import GENERATED, VOCABULARY, Answer, Failure, prompts, save

#: Of a prompt's tokens, every so many are asked for what comes behind: the server tells only that.
STEP = 4


def convert(folder: Path) -> Path:
    """The GGUF that llama.cpp's own converter makes of a model. Raises RuntimeError if it refuses.

    It is only told how the made-up tokenizer splits text: as GPT-2's.
    """
    import convert_hf_to_gguf as converter  # type: ignore[import-not-found]
    from conversion import base  # type: ignore[import-not-found]

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    hparams = base.ModelBase.load_hparams(folder, False)
    # Importing the class of this model brings in its relatives, of which one may read another tokenizer.
    converter.get_model_class(converter.get_model_architecture(hparams, converter.ModelType.TEXT))
    kinds = list(base.TextModel.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
        if "set_vocab" in vars(kind):
            kind.set_vocab = lambda self: self._set_vocab_gpt2()
    target = folder.with_suffix(".gguf")
    target.unlink(missing_ok=True)
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(target), "--outtype", "f32"]
    try:
        converter.main()
    except SystemExit as error:
        raise RuntimeError(f"the converter ended with {error.code}") from None
    return target


def ask(model: Path) -> Answer:
    """What llama.cpp's server answers for a GGUF: log-probabilities behind some of the prompts' tokens, float32."""
    import xllamacpp  # type: ignore[import-not-found]

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(model), 256, 1
    settings.warmup = settings.fit_params = settings.ui = False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)

    def tokens(ids: list[int], count: int) -> tuple[list[float], list[int]]:
        wanted: dict[str, Any] = {"prompt": ids, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        told = server.handle_completions({**wanted, "logprobs": VOCABULARY, "n_probs": VOCABULARY})
        content = told["choices"][0]["logprobs"]["content"]
        if len(content) != count:
            raise RuntimeError(f"{len(content)} tokens instead of {count}")
        first = {each["id"]: float(each["logprob"]) for each in content[0]["top_logprobs"]}
        return [first[token] for token in range(VOCABULARY)], [each["id"] for each in content]

    rows, greedy = [], []
    for ids in prompts():
        row: list[list[float] | None] = [None] * len(ids)
        for length in range(STEP, len(ids), STEP):
            row[length - 1] = tokens(ids[:length], 1)[0]
        row[-1], made = tokens(ids, GENERATED)
        rows.append(row)
        greedy.append(made)
    return Answer(rows, greedy)


def main(source: Path, folders: list[Path]) -> None:
    """Write a result for each folder."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    for folder in folders:
        path = folder.with_name(f"{folder.name}-llama.json")
        if path.exists():
            continue
        print(f"=== {path}", flush=True)
        save(Failure("the process died"), path)
        try:
            result: Answer | Failure = ask(convert(folder))
        except Exception as error:
            traceback.print_exc()
            lines = [line for line in str(error).splitlines() if line.strip()] or ["(no message)"]
            result = Failure(f"{type(error).__name__}: {lines[0]}")
        save(result, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
