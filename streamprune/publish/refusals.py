"""Why the Hub did not take something, in one line with what to do: from whatever its library raises."""

from __future__ import annotations

import errno
import json
import re

from huggingface_hub import HfApi, get_token
from huggingface_hub import errors as hub_errors

from streamprune.source.hub import first_line

_TOKENS = "https://huggingface.co/settings/tokens"
_AGAIN = "Then push again: what has arrived is kept."


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
