"""A stand-in for the Hugging Face Hub on 127.0.0.1: what huggingface_hub asks for when it downloads a model, and the
`datasets` library when it streams a data set (its name in `HubServer.repos` begins with "datasets/").

It serves local folders, can be told to misbehave, and remembers every request. Like the Hub, it shows a gated model's
file list to everybody and its files only to those with access (here: a token in `HubRepo.members`).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

_API = r"^/api/(models/)?(?P<id>(datasets/)?[^/]+/[^/]+)"
_MODEL = re.compile(_API + r"(/revision/(?P<revision>[^/]+))?$")
_TREE = re.compile(_API + r"/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?$")
_PATHS = re.compile(_API + r"/paths-info/(?P<revision>[^/]+)$")
_ACCESS = re.compile(_API + r"/auth-check$")
_FILE = re.compile(r"^/(?P<id>(datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")
_RANGE = re.compile(r"^bytes=(\d*)-(\d*)$")


@dataclass
class HubRepo:
    """A model's files by commit, and what its branches and tags point at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    members: set[str] = field(default_factory=set)

    def push(self, files: Path | dict[str, bytes], branch: str = "main") -> str:
        """Commit a folder's files (or these bytes by path) to a branch; returns the commit's hash."""
        if isinstance(files, Path):
            paths = (path for path in sorted(files.rglob("*")) if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        digest = hashlib.sha1(repr(sorted(self.refs.items())).encode())
        for name, data in files.items():
            digest.update(f"{name}\n{len(data)}\n".encode() + data)
        commit = digest.hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        return commit


@dataclass(frozen=True)
class Asked:
    """One request: `file` for a file's content, `range` its Range header, `sent` the bytes of the answer's body."""

    method: str
    path: str
    status: int
    file: str | None = None
    range: str | None = None
    sent: int = 0


class HubServer:
    """Use as a context manager; `url` is for HF_ENDPOINT.

    `break_off`: for a file, how many bytes of an answer are sent before the connection is cut, for the next so many
    answers. `outage`: a status with which everything is answered. `silent`: nothing is answered at all. `before`:
    called with each path before it is answered, for what changes on the Hub in the middle of a download.
    """

    def __init__(self) -> None:
        self.repos: dict[str, HubRepo] = {}
        self.requests: list[Asked] = []
        self.break_off: dict[str, tuple[int, int]] = {}
        self.outage: int | None = None
        self.silent = False
        self.before: Callable[[str], None] | None = None
        self.closing = threading.Event()
        self.lock = threading.Lock()
        handler = type("Handler", (self.handler_kind(),), {"hub": self})
        #: What went wrong in the stand-in itself; a test may look.
        self.errors: list[BaseException] = []
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.errors = self.errors
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def handler_kind(self) -> type[BaseHTTPRequestHandler]:
        """What answers; for a Hub that does more than this one."""
        return _Handler

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo_id: str, files: Path | dict[str, bytes], **options: Any) -> HubRepo:
        """A new repository with one commit on its main branch."""
        repo = self.repos[repo_id] = HubRepo(**options)
        repo.push(files)
        return repo

    def fetched(self) -> list[str]:
        """The files whose content was asked for since the last `forget`, sorted."""
        return sorted({asked.file for asked in self.requests if asked.method == "GET" and asked.file is not None})

    def forget(self) -> None:
        self.requests.clear()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    errors: list[BaseException]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing on stderr. A client that leaves in the middle is no error."""
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.errors.append(error)


@dataclass
class _Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: str | None = None


def _error(status: int, code: str, message: str) -> _Answer:
    body = json.dumps({"error": message}).encode()
    return _Answer(status, body, {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"})


def _json(value: Any) -> _Answer:
    return _Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr: the tests read it."""

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if hub.silent:
            hub.closing.wait()
            self.close_connection = True
            return
        if hub.before is not None:
            hub.before(path)
        answer = _error(hub.outage, "", "The stand-in is out of order") if hub.outage else self._answer()
        body = b"" if self.command == "HEAD" else answer.body
        with hub.lock:
            size, times = hub.break_off.get(answer.file or "", (0, 0))
            if body and times:
                hub.break_off[answer.file or ""] = (size, times - 1)
                body = body[:size]
                self.close_connection = True
            # Remembered first: whoever has the answer may look at once.
            asked = Asked(self.command, path, answer.status, answer.file, self.headers.get("Range"), len(body))
            hub.requests.append(asked)
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET
    do_POST = do_GET

    def _body_paths(self) -> set[str]:
        """The paths that a question about some of them names."""
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if "json" in self.headers.get("Content-Type", ""):
            return set(json.loads(body)["paths"])
        return set(parse_qs(body.decode())["paths"])

    def _answer(self) -> _Answer:
        # Matched before decoding: a branch such as refs/pr/1 arrives as refs%2Fpr%2F1.
        path = urlsplit(self.path).path
        matches = (pattern.match(path) for pattern in (_ACCESS, _MODEL, _TREE, _PATHS, _FILE))
        match = next((match for match in matches if match is not None), None)
        if match is None:
            return _error(404, "", "Sorry, we can't find the page you are looking for.")
        known = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        repo = self.hub.repos.get(known["id"])
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None:
            # To a stranger the Hub does not tell a missing model from a private one.
            return _error(404 if token else 401, "RepoNotFound", "Repository not found")
        revision = known.get("revision", "main")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if match.re is _MODEL:
            return _json({"id": known["id"], "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        if match.re is _TREE:
            return _json(_tree(files, known.get("folder", ""), "recursive=true" in self.path.lower()))
        if match.re is _PATHS:
            asked = self._body_paths()
            return _json([entry for entry in _tree(files, "", True) if entry["path"] in asked])
        if repo.gated and token not in repo.members:
            return _error(403 if token else 401, "GatedRepo", f"Access to model {known['id']} is restricted.")
        if match.re is _ACCESS:
            return _json({})
        if known["file"] not in files:
            answer = _error(404, "EntryNotFound", "Entry not found")
            answer.headers["X-Repo-Commit"] = commit
            return answer
        return self._file(commit, known["file"], files[known["file"]])

    def _file(self, commit: str, name: str, data: bytes) -> _Answer:
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        match = _RANGE.match(self.headers.get("Range", ""))
        if match is None or match.groups() == ("", ""):
            return _Answer(200, data, headers, name)
        first, last = match.groups()
        begin = int(first) if first else max(0, len(data) - int(last))
        end = min(len(data), int(last) + 1) if first and last else len(data)
        if begin >= end:
            return _Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"}, name)
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        return _Answer(206, data[begin:end], headers, name)


def _tree(files: dict[str, bytes], folder: str, deep: bool) -> list[dict[str, Any]]:
    """Files and folders below a folder, or only those in it."""
    inside = [name for name in files if not folder or name.startswith(f"{folder}/")]
    folders = {name[:place] for name in inside for place, letter in enumerate(name) if letter == "/"} - {folder}
    folders = {name for name in folders if name.startswith(folder)}
    depth = folder.count("/") + 1 if folder else 0
    entries = [_tree_entry(name, files[name]) for name in inside]
    entries += [{"type": "directory", "path": name, "size": 0, "oid": _etag(name.encode())} for name in sorted(folders)]
    return [entry for entry in entries if deep or entry["path"].count("/") == depth]


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith((".safetensors", ".bin", ".gguf")):
        entry["lfs"] = {"oid": _etag(data), "size": len(data), "pointerSize": 134}
    return entry


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
