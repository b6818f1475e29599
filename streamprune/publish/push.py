"""`streamprune push`: an output, verified to be complete, to a model repository on the Hub."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from streamprune.errors import InterruptedRunError, SettingsError
from streamprune.hardware.memory import format_bytes
from streamprune.publish.parts import Parts, parts_of
from streamprune.publish.repository import MAIN, Repository
from streamprune.tables import Table

NO_PROOF = "not verified: --no-verify was given"


@dataclass(frozen=True, kw_only=True)
class PushSettings:
    """The settings of `streamprune push`. Raises SettingsError for names that the Hub does not take.

    `source` is the model that `output` was made from, a folder or Hub id; None for what its record names, if it is
    here. `revision` is the branch to write to.
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
        except HFValidationError as error:
            raise SettingsError(f"--repo-id {self.repo_id!r} cannot be a repository: {_one_line(error)}.") from None
        if self.repo_id.count("/") != 1:
            raise SettingsError(
                f"--repo-id {self.repo_id!r} does not say whose it is. Write NAME/REPO, with your user name or an "
                "organization."
            )
        bad = not self.revision.strip("/") or any(c.isspace() or not c.isprintable() for c in self.revision)
        if bad or ".." in self.revision or self.revision.startswith("-"):
            raise SettingsError(f"--revision {self.revision!r} cannot be a branch. Write for example --revision q4.")

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that goes on with it."""
        options = ["--repo-id", self.repo_id, *(["--source", self.source] if self.source else [])]
        options += ["--revision", self.revision] if self.revision != MAIN else []
        flags = {"--private": self.private, "--no-verify": not self.verify,
                 "--trust-remote-code": self.trust_remote_code}  # fmt: skip
        given = [name for name, is_set in flags.items() if is_set]
        return tuple(map(shlex.quote, ["streamprune", "push", str(self.output), *options, *given]))


def push(settings: PushSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Verify an output and upload what belongs to it; with `dry_run` only list that, without a connection.

    `say` gets lines for the user. Returns what `--json` prints. Raises a StreampruneError for whatever prevents it;
    until the output is verified nothing is created on the Hub.
    """
    repository = Repository(settings.repo_id, settings.revision)
    try:
        parts = parts_of(settings.output)
        # Before tens of GiB are compared.
        user = None if settings.dry_run else repository.sign_in()
        proof = _prove(settings, parts)
    except KeyboardInterrupt:
        raise InterruptedRunError("Interrupted. Nothing was uploaded.") from None
    result = {
        "repo_id": settings.repo_id,
        "revision": settings.revision,
        "url": repository.url,
        "private": settings.private,
        "files": [{"path": file.name, "bytes": file.nbytes} for file in parts.files],
        "bytes": parts.nbytes,
        "left_out": [{"path": name, "reason": reason} for name, reason in parts.left_out],
        "verified": {name: value for name, value in proof.items() if name != "text"},
        "dry_run": settings.dry_run,
    }
    if settings.dry_run:
        kind = "private" if settings.private else "public if it is new"
        _print_plan(f"{settings.output} -> {repository.url} ({kind})", parts, proof, say)
        say("dry run: nobody was asked, and nothing was uploaded")
        return result
    parts.check_unchanged()
    with ending_at_once(settings.command):
        # Nothing is printed before the Hub has agreed to take it: a refusal is one message and no more.
        private = repository.prepare(settings.private)
        kind = "private" if private else "public"
        _print_plan(f"{settings.output} -> {repository.url} ({kind}), as {user}", parts, proof, say)
        commit = repository.upload(parts, f"Upload a model pruned with streamprune ({len(parts.files)} files)")
        others = repository.confirm(parts, commit)
    if others:
        say(
            f"warning: {repository.url} also has {len(others)} files of weights that are no part of this model, first "
            f"{others[0]}. Loaders may take them instead: delete them there."
        )
    return result | {"private": private, "commit": commit, "other_weights": others}


def _prove(settings: PushSettings, parts: Parts) -> dict[str, Any]:
    if not settings.verify:
        return {"kind": "none", "text": NO_PROOF}
    # Imported here: it needs torch and transformers.
    from streamprune.publish.proof import prove

    shown = prove(parts, settings.source, settings.trust_remote_code, ask_nobody=settings.dry_run)
    return {"kind": shown.kind, "tensors": shown.tensors, "bytes": shown.nbytes, "text": str(shown)}


def _print_plan(where: str, parts: Parts, proof: dict[str, Any], say: Callable[[str], None]) -> None:
    for line in Table(where, ("", ""), [(file.name, format_bytes(file.nbytes)) for file in parts.files]).text():
        say(line)
    say(f"{len(parts.files)} files, {format_bytes(parts.nbytes)}")
    for name, reason in parts.left_out:
        say(f"not sent: {name} ({reason})")
    say(str(proof["text"]))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


@contextmanager
def ending_at_once(command: Sequence[str]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process, and say how to go on.

    Threads that send files cannot be stopped, and Python would wait for them: for gigabytes. What has arrived on the
    Hub is safe at any instant.
    """
    error = InterruptedRunError(
        f"Interrupted. What has arrived on the Hub is kept; go on with the same command: {' '.join(command)}"
    )
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        # A bar of progress may stand in the line, or something be written just now.
        os.write(2, f"\nError: {error}\n".encode())
        os._exit(error.exit_code)

    usual = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
