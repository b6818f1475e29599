"""`streamprune push`: an output, verified to be complete, to a model repository on the Hub.

Errors of the Hub's library become an UploadError of one line that says what to do.
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from huggingface_hub import HfApi, get_session, get_token, is_offline_mode, set_client_factory
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from streamprune.checkpoint.hub import ANSWER_SECONDS, first_line
from streamprune.errors import InterruptedRunError, SettingsError, UploadError
from streamprune.hardware.memory import format_bytes
from streamprune.progress import stage
from streamprune.publish.output import PublishedOutput, prove, read_output
from streamprune.tables import Table

MAIN = "main"
_TOKENS = "https://huggingface.co/settings/tokens"
#: Timeouts in seconds: connect, read, write, and wait for a free connection. The library itself has none. The response
#: to a commit of a large folder takes a minute or two.
TIMEOUTS = (ANSWER_SECONDS, 300.0, 60.0, None)
#: Names of weights that loaders find without an index.
_WEIGHTS = re.compile(r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?")


@dataclass(frozen=True, kw_only=True)
class PushSettings:
    """The settings of `streamprune push`. Raises SettingsError for names that the Hub does not accept.

    `source` is the model that `output` was made from, a folder or Hub id; None for the source in its record, if it is
    in the Hub cache. `revision` is the branch to write to.
    """

    output: Path
    repo_id: str
    source: str | None = None
    private: bool = False
    revision: str = MAIN
    dry_run: bool = False
    verify: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except hub_errors.HFValidationError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise SettingsError(f"--repo-id {self.repo_id!r} cannot be a repository: {reason}.") from None
        if self.repo_id.count("/") != 1:
            raise SettingsError(
                f"--repo-id {self.repo_id!r} does not say whose it is. Write NAME/REPO, with your user name or an "
                "organization."
            )
        bad = not self.revision.strip("/") or any(c.isspace() or not c.isprintable() for c in self.revision)
        if bad or ".." in self.revision or self.revision.startswith("-"):
            raise SettingsError(f"--revision {self.revision!r} cannot be a branch. Write for example --revision q4.")


def push(settings: PushSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Verify an output and upload its files; with `dry_run` only list them, without network access.

    `say` prints lines for the user. Returns what `--json` prints. Raises a StreampruneError on any failure; nothing is
    created on the Hub before the output is verified.
    """
    repository = Repository(settings.repo_id, settings.revision)
    try:
        output = read_output(settings.output)
        # Signing in comes before tens of GiB are compared.
        user = None if settings.dry_run else repository.sign_in()
        proof = {"kind": "none", "text": "not verified: --no-verify was given"}
        if settings.verify:
            with stage(say, f"comparing {settings.output} with its source"):
                proof = prove(output, settings.source, settings.trust_remote_code, offline=settings.dry_run)
    except KeyboardInterrupt:
        raise InterruptedRunError("Interrupted. Nothing was uploaded.") from None
    result = {
        "repo_id": settings.repo_id,
        "revision": settings.revision,
        "url": repository.url,
        "private": settings.private,
        "files": [{"path": file.name, "bytes": file.nbytes} for file in output.files],
        "bytes": output.nbytes,
        "left_out": [{"path": name, "reason": reason} for name, reason in output.left_out],
        "verified": {name: value for name, value in proof.items() if name != "text"},
        "dry_run": settings.dry_run,
    }
    if settings.dry_run:
        kind = "private" if settings.private else "public if it is new"
        _print_plan(f"{settings.output} -> {repository.url} ({kind})", output, proof, say)
        say("dry run: no connection was made, and nothing was uploaded")
        return result
    output.check_unchanged()
    with _ending_at_once():
        # Nothing is printed before the Hub has accepted it, so that a refusal is a single message.
        private = repository.prepare(settings.private)
        kind = "private" if private else "public"
        _print_plan(f"{settings.output} -> {repository.url} ({kind}), as {user}", output, proof, say)
        commit = repository.upload(output, f"Upload a model pruned with streamprune ({len(output.files)} files)")
        others = repository.confirm(output, commit)
    if others:
        say(
            f"warning: {repository.url} also has {len(others)} files of weights that are not part of this model, first "
            f"{others[0]}. Loaders may use them instead: delete them there."
        )
    return result | {"private": private, "commit": commit, "other_weights": others}


def _print_plan(where: str, output: PublishedOutput, proof: dict[str, Any], say: Callable[[str], None]) -> None:
    for line in Table(where, ("", ""), [(file.name, format_bytes(file.nbytes)) for file in output.files]).text():
        say(line)
    say(f"{len(output.files)} files, {format_bytes(output.nbytes)}")
    for name, reason in output.left_out:
        say(f"not sent: {name} ({reason})")
    say(proof["text"])


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process, and print how to resume.

    Threads that send files cannot be stopped, and Python would wait for gigabytes. Uploaded files are safe at any time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    command = shlex.join(["streamprune", *sys.argv[1:]])
    error = InterruptedRunError(f"Interrupted. Uploaded files are kept; resume with the same command: {command}")

    def end(number: int, frame: FrameType | None) -> None:
        # Begin a new line, since a progress bar may be in this one; and bypass Python's streams, which may be in use.
        os.write(2, f"\n{error}\n".encode())
        os._exit(error.exit_code)

    usual = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Repository:
    """A model repository on the Hub and one of its branches."""

    repo_id: str
    branch: str = MAIN

    @property
    def url(self) -> str:
        """Its address on the Hub."""
        place = "" if self.branch == MAIN else f"/tree/{self.branch}"
        return f"{HfApi().endpoint}/{self.repo_id}{place}"

    def sign_in(self) -> str:
        """The name of the token's user. Raises SettingsError without a token, UploadError for an invalid one."""
        if is_offline_mode():
            raise SettingsError("HF_HUB_OFFLINE=1 forbids uploading. Unset it; --dry-run works without network access.")
        if get_token() is None:
            raise SettingsError(
                "You are not logged in to the Hub. Log in with `hf auth login`, or set HF_TOKEN to a token that may "
                f"write ({_TOKENS})."
            )
        with self._refusals("Logging in"):
            return str(HfApi().whoami()["name"])

    def prepare(self, private: bool) -> bool:
        """Create the repository and its branch if they do not exist; returns whether it is private.

        Raises UploadError if that is not allowed, or if the repository is public although --private was given.
        """
        api = HfApi()
        with self._refusals("Creating it"):
            api.create_repo(self.repo_id, private=True if private else None, exist_ok=True)
            info = api.model_info(self.repo_id, timeout=ANSWER_SECONDS)
        if private and info.private is False:
            raise UploadError(
                f"{self.url} exists and is public, but --private was given. Nothing was uploaded. Make it private "
                "in its settings, or choose another --repo-id."
            )
        # A branch such as refs/pr/1 is only created by a pull request.
        if self.branch != MAIN and not self.branch.startswith("refs/"):
            with self._refusals(f"Creating the branch {self.branch}"):
                api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
        return info.private is True

    def upload(self, output: PublishedOutput, message: str) -> str:
        """Send the files, resuming an interrupted call; returns the commit.

        Files that are already uploaded are skipped: the library checks each by its hash. (With hf_xet, if it is
        installed, even parts of files are.)
        """
        with self._refusals("Uploading"):
            done = HfApi().upload_folder(
                repo_id=self.repo_id,
                folder_path=output.folder,
                allow_patterns=[glob.escape(file.name) for file in output.files],
                revision=None if self.branch == MAIN else self.branch,
                commit_message=message,
            )
        return str(done.oid)

    def confirm(self, output: PublishedOutput, commit: str) -> list[str]:
        """Check that the commit has every file with its size; returns the names of other weights that it has.

        Raises UploadError if something is missing: a .gitignore in the repository makes the Hub skip files.
        """
        with self._refusals("Checking the uploaded files"):
            tree = HfApi().list_repo_tree(self.repo_id, recursive=True, revision=commit)
            sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
        lacking = [file for file in output.files if sizes.get(file.name) != file.nbytes]
        if lacking:
            first = lacking[0]
            there = f"{sizes[first.name]:,} bytes of {first.nbytes:,}" if first.name in sizes else "not there"
            raise UploadError(
                f"{self.url} lacks {len(lacking)} of {len(output.files)} files, first {first.name} ({there}). A "
                ".gitignore in the repository may exclude them; remove it there, and push again."
            )
        ours = {file.name for file in output.files}
        return sorted(name for name in sizes if name not in ours and _WEIGHTS.fullmatch(name))

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """Turn errors of the Hub library into an UploadError that says what to do; give up on a silent server."""
        # The library logs every attempt, with signed addresses that allow writing.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        usual = get_session()
        options = {"event_hooks": usual.event_hooks, "follow_redirects": usual.follow_redirects}
        kind: Any = type(usual)
        # By the library's own way, since it makes new clients when a connection fails.
        set_client_factory(lambda: kind(timeout=TIMEOUTS, **options))
        try:
            with warnings.catch_warnings():
                # What the Hub would like to see in the card's metadata.
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            # Errors come from several libraries, with no common class.
            raise UploadError(explain(self.repo_id, what, error)) from error
        finally:
            set_client_factory(lambda: kind(timeout=None, **options))


def explain(repo_id: str, what: str, error: Exception) -> str:
    """Why `what` ("Uploading") failed for a repository, and what to do. No token is in it."""
    # The cause of an error that only says which file was being sent.
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    is_answer = isinstance(error, hub_errors.HfHubHTTPError)
    text = _explain_answer(repo_id, what, error) if is_answer else _explain_failure(what, error)
    return re.sub(r"\bhf_\w{8,}|(?<=Bearer )[^\s'\"]+", "***", text.replace(get_token() or "\0", "***"))


def _explain_failure(what: str, error: Exception) -> str:
    hub, kind, again = HfApi().endpoint, type(error).__name__, "Then push again: uploaded files are kept."
    if "Timeout" in kind or isinstance(error, TimeoutError):
        return f"{what} failed: {hub} does not answer ({kind}). Check the connection. {again}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        return f"{what} failed: a disk here is full ({first_line(str(error))}). Free some space. {again}"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{what} failed: {error.filename} is gone. Restore it, and push again."
    if "Invalid metadata in README.md" in str(error):
        said = " ".join(line.strip("- ") for line in str(error).splitlines()[1:] if line.strip())
        return f"The Hub does not accept the model card: {first_line(said)}. Correct the top of README.md."
    if isinstance(error, json.JSONDecodeError):
        return f"{what} failed: {hub} answered with something other than JSON. Is it a Hub (HF_ENDPOINT)? {again}"
    reason = first_line(str(error)) or kind
    # The library uses httpx or, since its version 2, httpx2.
    if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        return f"{what} failed: {hub} cannot be reached, or broke off ({reason}). Check the connection. {again}"
    return f"{what} failed: {kind}, {reason}. {again}"


#: Messages for a response of the Hub, by its HTTP status.
_ANSWERS = {
    400: "{what} was refused as invalid{said}. Check --repo-id and --revision.",
    401: "{hub} does not accept the token{said}: it is wrong, has expired or was revoked. Log in again with `hf auth "
    "login`, or set HF_TOKEN to a valid one ({tokens}). HF_TOKEN takes precedence over a login.",
    402: "{what} was refused: {hub} asks for payment{said}. Free some storage there, or upgrade the account.",
    403: "{what} was refused: the token may not write to {repo_id}{said}. Use one with the right to write "
    "({tokens}), ask the owner of {owner} for it, or choose another --repo-id.",
    404: "{hub} shows no model repository {repo_id} to this token{said}. Is the name taken by a data set or a Space, "
    "or gone? Choose another --repo-id.",
    429: "{hub} has had too many requests from this account{said}. Wait a while, and push again.",
}
_OTHER_ANSWER = "{what} failed: {hub} answered with HTTP status {status}{said}. Push again: uploaded files are kept."
_NO_BRANCH = "{repo_id} has no branch that could be written to under this --revision{said}. Choose another."


def _explain_answer(repo_id: str, what: str, error: Any) -> str:
    status, message = error.response.status_code, first_line(error.server_message or "")
    template = _ANSWERS.get(status, _OTHER_ANSWER)
    if isinstance(error, hub_errors.RevisionNotFoundError):
        template = _NO_BRANCH
    return template.format(
        what=what,
        hub=HfApi().endpoint,
        repo_id=repo_id,
        owner=repo_id.partition("/")[0],
        status=status,
        said=f" ({message})" if message else "",
        tokens=_TOKENS,
    )
