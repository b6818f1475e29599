"""A model repository on the Hugging Face Hub: who may write to it, what it is made for, and sending it files."""

from __future__ import annotations

import glob
import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from huggingface_hub import HfApi, get_session, get_token, is_offline_mode, set_client_factory
from huggingface_hub.hf_api import RepoFile

from streamprune.errors import InterruptedRunError, SettingsError, UploadError
from streamprune.publish.parts import Parts
from streamprune.publish.refusals import explain
from streamprune.source.hub import ANSWER_SECONDS

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
        patterns = [glob.escape(part.name) for part in parts.files]
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
        lacking = [part for part in parts.files if sizes.get(part.name) != part.nbytes]
        if lacking:
            first = lacking[0]
            there = f"{sizes[first.name]:,} bytes of {first.nbytes:,}" if first.name in sizes else "not there"
            raise UploadError(
                f"{self.url} lacks {len(lacking)} of {len(parts.files)} files, first {first.name} ({there}). A "
                ".gitignore in the repository may leave them out; remove it there, and push again."
            )
        ours = {part.name for part in parts.files}
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


@contextmanager
def ending_at_once(command: Sequence[str]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process, and say how to go on.

    Threads that send files cannot be stopped, and Python would wait for them: for gigabytes. What has arrived on the
    Hub is safe at any instant.
    """
    told = InterruptedRunError(
        f"Interrupted. What has arrived on the Hub is kept; go on with the same command: {' '.join(command)}"
    )
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        # A bar of progress may stand in the line, or something be written just now.
        os.write(2, f"\nError: {told}\n".encode())
        os._exit(told.exit_code)

    usual = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
