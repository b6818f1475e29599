"""Tasks of lm-evaluation-harness with data of their own, and a server with OpenAI's interface: no network."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-evaluation-harness")

DOCS = [
    {
        "question": f"{a} plus {b} is",
        "choices": [str(a + b), str(a * b + 11), "many of them"],
        "answer": 0 if a < 4 else 2,
    }
    for a in range(2, 7)
    for b in range(2, 6)
]
#: Scores of answers that are programs: whether each ends without an error, in a process of its own.
_RUN = """
import multiprocessing

def _run(code, said):
    try:
        exec(code, {})
        said.put(1.0)
    except BaseException as error:
        said.put(0.0)

def run(doc, answers):
    said = multiprocessing.SimpleQueue()
    process = multiprocessing.Process(target=_run, args=(doc["start"] + answers[0] + doc["end"], said))
    process.start()
    process.join(30)
    return {"passed": 0.0 if said.empty() else said.get()}
"""
#: Programs around an answer: what it computes is right, more memory than there may be, and no end.
PROGRAMS = [
    {"question": "two", "start": "", "end": "\nassert answer == 2"},
    {"question": "memory", "start": "bytearray(8 << 30)\n", "end": ""},
    {"question": "time", "start": "while True: pass\n", "end": ""},
]


@contextmanager
def without_network(cache: Path) -> Iterator[None]:
    """No network, and caches of data in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        if importlib.util.find_spec("lm_eval") is not None:
            import datasets
            import huggingface_hub.constants

            # Read from the environment when they were imported.
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
            patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


def write_tasks(folder: Path) -> Path:
    """Tasks of one's own: `local_sums` scores given answers, `local_code` runs generated ones; those with data that are
    not there, and one whose number of shots is fixed."""
    task = _task(folder, "local_sums", DOCS) | {
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    lost = task | {"task": "local_lost", "dataset_kwargs": {"data_files": {"test": str(folder / "none.jsonl")}}}
    far = {key: value for key, value in task.items() if key != "dataset_kwargs"}
    for each in (task, lost, far | {"task": "local_far", "dataset_path": "nobody/has-this"}):
        (folder / f"{each['task']}.yaml").write_text(yaml.safe_dump(each))
    (folder / "programs.py").write_text(_RUN)
    code = _task(folder, "local_code", PROGRAMS) | {
        "unsafe_code": True,
        "fewshot_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "end",
        "generation_kwargs": {"until": ["\n\n"], "max_tokens": 5000, "do_sample": False},
        "metric_list": [{"metric": "passed", "aggregation": "mean", "higher_is_better": True}],
    }
    for each in (code, code | {"task": "local_fixed", "num_fewshot": 0}):
        text = yaml.safe_dump(each) + "process_results: !function programs.run\n"
        (folder / f"{each['task']}.yaml").write_text(text)
    return folder


def _task(folder: Path, name: str, docs: list[dict[str, Any]]) -> dict[str, Any]:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }


class ModelServer:
    """Serves `model` as "tiny" on 127.0.0.1, while it is entered: log-probabilities of prompts of token ids, and
    `answer(request)` to chats, if it has a `key` only to those who show it. `asked` has the bodies of all requests."""

    def __init__(self, model: Any, answer: Callable[[dict[str, Any]], str], key: str | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send({"data": [{"id": "tiny"}]} if self.path == "/v1/models" else None)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.asked.append(body)
                if self.path == "/v1/completions":
                    self._send({"choices": [log_probabilities(model, *body["prompt"])]})
                else:
                    message = {"role": "assistant", "content": answer(body)}
                    self._send({"choices": [{"index": 0, "message": message}]})

            def _send(self, content: Any) -> None:
                known = key is None or self.headers["Authorization"] == f"Bearer {key}"
                self.send_response(401 if not known else 200 if content is not None else 404)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ModelServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def log_probabilities(model: Any, ids: list[int]) -> dict[str, Any]:
    """What a server with `echo` and `logprobs` answers: of each token of the prompt, and of one more."""
    with torch.inference_mode():
        found = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    most, best = found.max(-1)
    given = [None, *found[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), float(most[-1])]
    tops = [None, *({str(int(token)): float(value)} for token, value in zip(best, most, strict=True))]
    return {"index": 0, "text": "", "logprobs": {"token_logprobs": given, "top_logprobs": tops}}
