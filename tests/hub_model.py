"""A model on the stand-in Hub, what of it is wanted, and running the command line on it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from streamprune.checkpoint.index import INDEX_NAME
from streamprune.cli import main
from tests.helpers import tree_bytes
from tests.hub_server import HubServer
from tests.tiny import FAMILIES, make_model, tiny_config, write_token_ids

AnyHub = TypeVar("AnyHub", bound=HubServer)
QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")
#: Files that belong to a model beside its weights, config and card.
SMALL = {
    "LICENSE": b"do what you like",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{ }",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}
CODE = {"modeling_own.py": b"raise SystemExit('this code must not run')"}
#: What else authors upload.
UNWANTED = {
    ".gitattributes": b"*.bin filter=lfs",
    "pytorch_model.bin": b"pickle" * 99,
    "training_args.bin": b"pickle",
    "model-q4.gguf": b"GGUF" * 99,
    "consolidated.safetensors": b"the same weights again" * 99,
    "logo.png": b"png",
    "onnx/model.onnx": b"onnx" * 99,
    "onnx/config.json": b"{}",
    "original/consolidated.00.pth": b"pickle" * 99,
    "original/tokenizer.model": b"spm",
}


def published_model(folder: Path, **save: Any) -> dict[str, bytes]:
    """The files of a model as its author would upload them: weights, small files, and much else."""
    card = {"README.md": b"---\nlicense: apache-2.0\n---\nhello"}
    return tree_bytes(make_model(folder, tiny_config(QWEN), **save)) | SMALL | CODE | UNWANTED | card


@contextmanager
def hub_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[AnyHub] = HubServer
) -> Iterator[AnyHub]:
    """An empty Hub for this process to ask, and no other host.

    Patched into the library, which read HF_ENDPOINT and HF_HOME when it was imported.
    """
    with kind() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "agents.json"), raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        # The pauses before the library tries again.
        for module in (huggingface_hub.file_download, huggingface_hub.utils._http):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
        connect = socket.socket.connect

        def connect_here_only(self: socket.socket, address: Any) -> None:
            assert address[0] == "127.0.0.1", f"a test must not reach {address}"
            connect(self, address)

        monkeypatch.setattr(socket.socket, "connect", connect_here_only)
        huggingface_hub.utils.close_session()
        yield server
        huggingface_hub.utils.close_session()
    assert not server.errors


def weights(model: dict[str, bytes]) -> list[str]:
    return [name for name in model if name.startswith("model-") and name.endswith(".safetensors")]


def wanted(model: dict[str, bytes]) -> list[str]:
    return sorted({*weights(model), INDEX_NAME, "config.json", "generation_config.json", "README.md", *SMALL})


def arguments(model: str, tmp_path: Path, output: str = "out", *more: str) -> list[str]:
    ids = write_token_ids(tmp_path / "calibration.jsonl")
    return ["run", model, "-o", str(tmp_path / output), "--keep", "5", "--calibration", str(ids), *more]


def refused(tmp_path: Path, model: str, *more: str) -> str:
    """Run the command line on a model that it must refuse; its message."""
    result: Result = CliRunner().invoke(main, arguments(model, tmp_path, "out", *more))
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()
    return result.stderr
