"""A model repository on the Hugging Face Hub: who may write to it, sending it files, and why the Hub refuses.

Whatever the Hub's library raises becomes an UploadError of one line that says what to do.
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, get_session, get_token, is_offline_mode, set_client_factory
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile

from streamprune.checkpoint.hub import ANSWER_SECONDS, first_line
from streamprune.errors import SettingsError, UploadError
from streamprune.publish.parts import Parts

_TOKENS = "https://huggingface.co/settings/tokens"
_AGAIN = "Then push again: what has arrived is kept."
MAIN = "main"
#: Seconds to connect, until an answer begins, for a piece to be taken, and for a free connection. The library itself
#: would wait for ever. A commit of a large folder is answered after a minute or two.
TIMEOUTS = (ANSWER_SECONDS, 300.0, 60.0, None)
#: Weights that loaders find by their names alone.
_WEIGHTS = re.compile(r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?")


@dataclass(frozen=True)
class Repository:
    """A model repository and one of its branches."""

    repo_id: str
    branch: str = MAIN

    @property
    def url(self) -> str:
        """Where people see it."""
        place = "" if self.branch == MAIN else f"/tree/{self.branch}"
        return f"{HfApi().endpoint}/{self.repo_id}{place}"

    def sign_in(self) -> str:
        """The name of the token's user. Raises SettingsError without a token, UploadError for an invalid one."""
        if is_offline_mode():
            raise SettingsError("HF_HUB_OFFLINE=1 forbids to upload. Unset it; --dry-run works without a connection.")
        if get_token() is None:
            raise SettingsError(
                "You are not logged in to the Hub. Log in with `hf auth login`, or set HF_TOKEN to a token that may "
                "write (https://huggingface.co/settings/tokens)."
            )
        with self._refusals("Logging in"):
            return str(HfApi().whoami()["name"])

    def prepare(self, private: bool) -> bool:
        """Make the repository and its branch where they are missing; returns whether it is private.

        Raises UploadError where that is not allowed, and for a public repository where it was to be private.
        """
        api = HfApi()
        with self._refusals("Creating it"):
            api.create_repo(self.repo_id, private=True if private else None, exist_ok=True)
            info = api.model_info(self.repo_id, timeout=ANSWER_SECONDS)
        if private and info.private is False:
            raise UploadError(
                f"{self.url} exists and is public, but --private was asked for. Nothing was uploaded. Make it private "
                "in its settings, or choose another --repo-id."
            )
        # Such as refs/pr/1, which only a pull request makes.
        if self.branch != MAIN and not self.branch.startswith("refs/"):
            with self._refusals(f"Creating the branch {self.branch}"):
                api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
        return info.private is True

    def upload(self, parts: Parts, message: str) -> str:
        """Send the files, going on where an interrupted call stopped; returns the commit.

        Files that are there already are not sent again: the library asks for each by its hash. (With hf_xet, which it
        uses if it is installed, that holds for the pieces of files too.)
        """
        patterns = [glob.escape(file.name) for file in parts.files]
        with self._refusals("Uploading"):
            done = HfApi().upload_folder(
                repo_id=self.repo_id,
                folder_path=parts.folder,
                allow_patterns=patterns,
                revision=None if self.branch == MAIN else self.branch,
                commit_message=message,
            )
        return str(done.oid)

    def confirm(self, parts: Parts, commit: str) -> list[str]:
        """Check that the commit has every file with its size; returns the names of other weights that it has.

        Raises UploadError where something is missing: a .gitignore in the repository makes the Hub leave files out.
        """
        with self._refusals("Looking at what has arrived"):
            tree = HfApi().list_repo_tree(self.repo_id, recursive=True, revision=commit)
            sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
        lacking = [file for file in parts.files if sizes.get(file.name) != file.nbytes]
        if lacking:
            first = lacking[0]
            there = f"{sizes[first.name]:,} bytes of {first.nbytes:,}" if first.name in sizes else "not there"
            raise UploadError(
                f"{self.url} lacks {len(lacking)} of {len(parts.files)} files, first {first.name} ({there}). A "
                ".gitignore in the repository may leave them out; remove it there, and push again."
            )
        ours = {file.name for file in parts.files}
        return sorted(name for name in sizes if name not in ours and _WEIGHTS.fullmatch(name))

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """Turn what the Hub library raises into an UploadError that says what to do."""
        # It tells of every attempt, with addresses that let whoever reads them write.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        try:
            with _timeouts(), warnings.catch_warnings():
                # What the Hub would like to see in the card's metadata.
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            # Its errors come from several libraries, and have no class in common.
            raise UploadError(explain(self.repo_id, what, error)) from error


@contextmanager
def _timeouts() -> Iterator[None]:
    """Have the Hub library give up on a silent server."""
    usual = get_session()
    kind: Any = type(usual)
    hooks, follows = usual.event_hooks, usual.follow_redirects

    def client(timeout: Any) -> Any:
        return kind(event_hooks=hooks, follow_redirects=follows, timeout=timeout)

    # By the library's own way, since it makes new clients when a connection fails.
    set_client_factory(lambda: client(TIMEOUTS))
    try:
        yield
    finally:
        set_client_factory(lambda: client(None))


def explain(repo_id: str, what: str, error: Exception) -> str:
    """Why `what` ("Uploading") failed for a repository, and what to do. No token is in it."""
    return _without_secrets(_explain(repo_id, what, _cause(error)))


def _cause(error: Exception) -> Exception:
    """The error behind one that only says which file was being sent."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _explain(repo_id: str, what: str, error: Exception) -> str:
    hub = HfApi().endpoint
    if isinstance(error, hub_errors.HfHubHTTPError):
        return _answered(hub, repo_id, what, error)
    kind = type(error).__name__
    if "Timeout" in kind or isinstance(error, TimeoutError):
        return f"{what} failed: {hub} does not answer ({kind}). Check the connection. {_AGAIN}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        return f"{what} failed: a disk here is full ({first_line(str(error))}). Free some room. {_AGAIN}"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{what} failed: {error.filename} is gone. Restore it, and push again."
    if "Invalid metadata in README.md" in str(error):
        said = " ".join(line.strip("- ") for line in str(error).splitlines()[1:] if line.strip())
        return f"The Hub does not take the model card: {first_line(said)}. Correct the top of README.md."
    if isinstance(error, json.JSONDecodeError):
        return f"{what} failed: {hub} answered with something else than JSON. Is it a Hub (HF_ENDPOINT)? {_AGAIN}"
    reason = first_line(str(error)) or kind
    # The library speaks through httpx or, since its version 2, httpx2.
    if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        return f"{what} failed: {hub} cannot be reached, or broke off ({reason}). Check the connection. {_AGAIN}"
    return f"{what} failed: {kind}, {reason}. {_AGAIN}"


def _answered(hub: str, repo_id: str, what: str, error: hub_errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    message = first_line(error.server_message or "")
    said = f" ({message})" if message else ""
    if status == 401:
        return (
            f"{hub} does not accept the token{said}: it is wrong, has expired or was revoked. Log in anew with "
            f"`hf auth login`, or set HF_TOKEN to a valid one ({_TOKENS}). HF_TOKEN counts before a login."
        )
    if status == 403:
        return (
            f"{what} was refused: the token may not write to {repo_id}{said}. Use one with the right to write "
            f"({_TOKENS}), ask the owner of {repo_id.partition('/')[0]} for it, or choose another --repo-id."
        )
    if status == 402:
        return f"{what} was refused: {hub} asks for payment{said}. Free some storage there, or upgrade the account."
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{repo_id} has no branch that could be written to under this --revision{said}. Choose another."
    if status == 404:
        return (
            f"{hub} shows no model repository {repo_id} to this token{said}. Is the name taken by a data set or a "
            "Space, or gone? Choose another --repo-id."
        )
    if status == 400:
        return f"{what} was refused as not valid{said}. Check --repo-id and --revision."
    if status == 429:
        return f"{hub} has had too many requests from this account{said}. Wait a while, and push again."
    return f"{what} failed: {hub} answered with HTTP status {status}{said}. {_AGAIN.replace('Then push', 'Push')}"


def _without_secrets(text: str) -> str:
    token = get_token()
    if token:
        text = text.replace(token, "***")
    return re.sub(r"\bhf_\w{8,}|(?<=Bearer )[^\s'\"]+", "***", text)
