"""A model behind a server with OpenAI's interface (vLLM, llama.cpp, SGLang) as a model of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from streamprune.checkpoint.hub import first_line
from streamprune.errors import SettingsError, TaskError
from streamprune.evaluation.task_settings import THINKING_END, TaskSettings

#: Seconds to wait for a server to say what it has.
_ANSWER_SECONDS = 10
#: Where the harness finds the key that a server may want.
_KEY = "OPENAI_API_KEY"


def check_server(settings: TaskSettings) -> None:
    """Raise SettingsError without the libraries for it or where the server lacks the model, TaskError where it does not
    answer.
    """
    missing = [name for name in ("requests", "aiohttp", "tenacity") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"--server needs {', '.join(missing)}: pip install 'streamprune[tasks]'")
    import requests

    address, key = f"{_base(settings)}/models", os.environ.get(_KEY)
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = requests.get(address, headers=headers, timeout=_ANSWER_SECONDS)
        answer.raise_for_status()
        found = [str(each["id"]) for each in answer.json()["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        # (Its exceptions are OSErrors; those of wrong contents are the others.)
        raise TaskError(
            f"--server {settings.server} does not list its models at {address} ({first_line(str(error))}). Start the "
            f"server first, such as `vllm serve` or `llama-server`; if it wants a key, set {_KEY}."
        ) from error
    if settings.served_model not in found:
        raise SettingsError(
            f"--served-model {settings.served_model}: {settings.server} serves {', '.join(found) or 'no model'}."
        )


def served_model(settings: TaskSettings, folder: Path, positions: int | None) -> Any:
    """The harness's `local-chat-completions` with a chat template, which is then the server's own, else its
    `local-completions`, with the tokenizer in `folder`. `positions` is the model's longest sequence, in tokens.
    """
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    common = {"model": settings.served_model, "batch_size": settings.batch_size or 1}
    if settings.apply_chat_template:
        end = THINKING_END if settings.thinking else None
        return LocalChatCompletion(base_url=f"{_base(settings)}/chat/completions", think_end_token=end, **common)
    length = {"max_length": positions} if positions else {}
    return LocalCompletionsAPI(
        base_url=f"{_base(settings)}/completions", tokenizer_backend="huggingface", tokenizer=str(folder),
        **common, **length,
    )  # fmt: skip


def _base(settings: TaskSettings) -> str:
    """The address up to `/v1`, which users may give or leave out."""
    return (settings.server or "").rstrip("/").removesuffix("/v1") + "/v1"
