"""A stand-in for the Hugging Face Hub that takes uploads: what huggingface_hub asks for in `upload_folder` without Xet.

Accounts and their rights, repositories and branches, the question what each file is, the LFS batch with its uploads
(each checked against its SHA-256, and kept from then on, as the Hub keeps them), and commits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_server import Asked, HubServer

_ID = r"(?P<id>[^/]+/[^/]+)"
_ROUTES = {
    name: re.compile(pattern)
    for name, pattern in {
        "whoami": r"^/api/whoami-v2$",
        "create": r"^/api/repos/create$",
        "yaml": r"^/api/validate-yaml$",
        "branch": rf"^/api/models/{_ID}/branch/(?P<revision>[^/]+)$",
        "preupload": rf"^/api/models/{_ID}/preupload/(?P<revision>[^/]+)$",
        "commit": rf"^/api/models/{_ID}/commit/(?P<revision>[^/]+)$",
        "tree": rf"^/api/models/{_ID}/tree/(?P<revision>[^/]+)$",
        "batch": rf"^/{_ID}\.git/info/lfs/objects/batch$",
        "store": r"^/storage/(?P<oid>[0-9a-f]{64})$",
        "verify": r"^/verify$",
        "info": rf"^/api/models/{_ID}(/revision/(?P<revision>[^/]+))?$",
    }.items()
}
#: Larger files are LFS files whatever their name.
_LARGE = 100_000
USER, TOKEN = "me", "hf_aGoodTokenOfMine"


@dataclass
class Taken:
    """A repository that was uploaded to: files with their LFS hash (or None) by branch, and the messages of commits."""

    private: bool
    kind: str = "model"
    branches: dict[str, dict[str, tuple[bytes, str | None]]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return {name: data for name, (data, _) in self.branches[branch].items()}


class UploadHub(HubServer):
    """Use as a context manager; `url` is for HF_ENDPOINT.

    `tokens`: account names by token, each of which may write to what begins with its name. `fail`: what is answered to
    a route, as (status, message). `hold`: uploads beyond so many wait until the server is
    closed, and never arrive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = {TOKEN: USER}
        self.taken: dict[str, Taken] = {}
        self.stored: dict[str, bytes] = {}
        self.fail: dict[str, tuple[int, str]] = {}
        self.broken: set[str] = set()
        self.hold: int | None = None
        #: The uploads that were begun, and that arrived whole, by hash in order.
        self.begun: list[str] = []
        self.arrived: list[str] = []
        self.waiting = threading.Event()

    def handler_kind(self) -> type[BaseHTTPRequestHandler]:
        return _Handler

    def asked(self, route: str) -> list[Asked]:
        """The requests of a kind since the last `forget`."""
        return [each for each in self.requests if _ROUTES[route].match(each.path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: UploadHub

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr: the tests read it."""

    def do_GET(self) -> None:
        hub = self.hub
        path = urlsplit(self.path).path
        found = next(((name, match) for name, pattern in _ROUTES.items() if (match := pattern.match(path))), None)
        if hub.silent:
            hub.closing.wait()
            self.close_connection = True
            return
        route, match = found if found is not None else ("", None)
        known = {name: unquote(value) for name, value in match.groupdict().items() if value} if match else {}
        if route in hub.broken:
            # The line is cut in the middle of what is sent.
            self.rfile.read(1)
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        status, answer = hub.fail.get(route) or self._answer(route, known, body)
        # What huggingface_hub itself asks once a day, by whatever command, is not counted.
        if path != "/api/agent-harnesses":
            with hub.lock:
                hub.requests.append(Asked(self.command, path, status, route, None, len(body)))
        if isinstance(answer, str):
            answer = {"error": answer}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status >= 400:
            self.send_header("X-Error-Message", str(answer.get("error", "")))
            if status == 404 and route not in ("", "create"):
                self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_PUT = do_HEAD = do_GET

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, route: str, known: dict[str, str], body: bytes) -> tuple[int, Any]:
        if route == "store":
            # Like a bucket's, the address itself is the right to write.
            return self._store(known["oid"], body)
        user = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if user is None:
            return 401, "Invalid credentials in Authorization header"
        if route == "whoami":
            return 200, {"name": user, "type": "user"}
        if route == "yaml":
            return 200, {"warnings": [{"message": "a license would be nice"}], "errors": []}
        told = json.loads(body) if body and route != "commit" else {}
        repo_id = known.get("id") or f"{told.get('organization') or user}/{told.get('name')}"
        repo = self.hub.taken.get(repo_id)
        if route == "create":
            return self._create(user, repo_id, told)
        if route in ("verify", "batch"):
            return 200, {} if route == "verify" else self._batch(told)
        if repo is None or repo.kind != "model":
            return 404, "Repository not found"
        if route in ("branch", "preupload", "commit") and not repo_id.startswith(f"{user}/"):
            return 403, "Forbidden: you must have write access to this repository"
        return self._in_repository(route, repo_id, repo, known.get("revision", "main"), told, body)

    def _create(self, user: str, repo_id: str, told: dict[str, Any]) -> tuple[int, Any]:
        if repo_id in self.hub.taken:
            return 409, {"error": "You already created this repository", "url": f"{self.hub.url}/{repo_id}"}
        if not repo_id.startswith(f"{user}/"):
            return 403, f"Forbidden: you cannot create a model in {repo_id.partition('/')[0]}"
        private = told.get("private") is True or told.get("visibility") == "private"
        self.hub.taken[repo_id] = Taken(private, told.get("type") or "model")
        return 200, {"url": f"{self.hub.url}/{repo_id}"}

    def _batch(self, told: dict[str, Any]) -> Any:
        objects = []
        for each in told["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/storage/{each['oid']}?signature=secret"},
                "verify": {"href": f"{self.hub.url}/verify"},
            }
            objects.append(each if each["oid"] in self.hub.stored else {**each, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, body: bytes) -> tuple[int, Any]:
        hub = self.hub
        with hub.lock:
            hub.begun.append(oid)
            waits = hub.hold is not None and len(hub.begun) > hub.hold
        if waits:
            hub.waiting.set()
            hub.closing.wait()
            return 503, "closed before it had arrived"
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, "the content is not of that hash"
        with hub.lock:
            hub.stored[oid] = body
            hub.arrived.append(oid)
        return 200, {}

    def _in_repository(
        self, route: str, repo_id: str, repo: Taken, revision: str, told: Any, body: bytes
    ) -> tuple[int, Any]:
        if route == "branch":
            if revision in repo.branches:
                return 409, "Reference already exists"
            repo.branches[revision] = dict(repo.branches["main"])
            return 200, {}
        branch = revision if revision in repo.branches else repo.commits.get(revision)
        if branch is None:
            return 404, f"Invalid rev id: {revision}"
        files = repo.branches[branch]
        if route == "info":
            sha = next((commit for commit, at in reversed(repo.commits.items()) if at == branch), "0" * 40)
            siblings = [{"rfilename": name} for name in files]
            return 200, {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings}
        if route == "preupload":
            return 200, {"files": [self._mode(repo, files, each) for each in told["files"]]}
        if route == "tree":
            assert parse_qs(urlsplit(self.path).query)["recursive"][0].lower() == "true"
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
                | ({"lfs": {"oid": oid, "size": len(data), "pointerSize": 134}} if oid else {})
                for name, (data, oid) in files.items()
            ]
            return 200, entries
        return self._commit(repo_id, repo, branch, body)

    def _mode(self, repo: Taken, files: dict[str, tuple[bytes, str | None]], each: dict[str, Any]) -> dict[str, Any]:
        name = each["path"]
        large = name.endswith(".safetensors") or each["size"] > _LARGE
        told = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": name in repo.ignored}
        data, oid = files.get(name, (b"", None))
        return told | ({"oid": oid or _blob(data)} if name in files else {})

    def _commit(self, repo_id: str, repo: Taken, branch: str, body: bytes) -> tuple[int, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header"
        files = dict(repo.branches[branch])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"]), None
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    return 400, f"LFS object {value['oid']} is not there"
                files[value["path"]] = self.hub.stored[value["oid"]], value["oid"]
            else:
                return 400, f"{line['key']} was not expected"
        commit = hashlib.sha1(body + branch.encode()).hexdigest()
        repo.branches[branch] = files
        repo.commits[commit] = branch
        return 200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}", "commitOid": commit, "success": True}


def _blob(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
