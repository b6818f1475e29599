"""`push`: what is sent, what is not, that it is proved first, that it goes on, and what is said when the Hub refuses.

The Hub is `hub_upload_server`, on this machine; with HF_HUB_DISABLE_XET=1, since Xet's own servers have no stand-in.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from streamprune.checkpoint.index import open_checkpoint
from streamprune.cli import main
from streamprune.publish import push as push_module
from streamprune.publish.push import explain
from streamprune.reporting.write import PAGE_NAME, PICTURES_FOLDER
from tests.helpers import known_family, prune, tree_bytes
from tests.hub_model import hub_for_this_process
from tests.hub_upload_server import TOKEN, USER, Taken, UploadHub
from tests.thorough import mostly_thorough
from tests.tiny import make_model, tiny_config
from tests.tokenizer import save_tokenizer

ROOT = Path(__file__).resolve().parent.parent
REPO = f"{USER}/small"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source model and an output of it."""
    home = tmp_path_factory.mktemp("made")
    config = tiny_config(known_family("qwen3_moe"))
    config.num_hidden_layers = 2
    save_tokenizer(make_model(home / "source", config))
    (home / "source" / "LICENSE").write_text("do what you like")
    prune(home / "source", home / "out")
    return home


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """The stand-in, with this process logged in to it."""
    with hub_for_this_process(tmp_path, monkeypatch, UploadHub) as hub:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # (On a busy machine even a tiny model takes seconds, and is then said to be compared.)
        monkeypatch.setattr("streamprune.progress.SILENT_SECONDS", 1e6)
        yield hub


def push(output: Path, *options: Any, repo: str = REPO) -> Result:
    return CliRunner().invoke(main, ["push", str(output), "--repo-id", repo, *map(str, options)])


def refused(output: Path, *options: Any, repo: str = REPO, status: int = 1, sending: bool = False) -> str:
    """Push what must be refused; the one line that says why. Once the Hub takes it, the plan stands before that."""
    result = push(output, *options, *(["--quiet"] if sending else []), repo=repo)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stderr
    return result.stderr


def test_everything_arrives_and_nothing_twice(hub: UploadHub, made: Path) -> None:
    done = push(made / "out", "--source", made / "source", "--private", "--json")
    assert done.exit_code == 0, done.output
    told, repo = json.loads(done.stdout), hub.taken[REPO]
    assert repo.files() == tree_bytes(made / "out")
    assert (repo.private, repo.kind) == (True, "model")
    assert told["url"] == f"{hub.url}/{REPO}"
    assert told["verified"]["kind"] == "source"
    assert {each["path"]: each["bytes"] for each in told["files"]} == {
        name: len(data) for name, data in repo.files().items()
    }
    assert [told["commit"]] == list(repo.commits)
    assert TOKEN not in done.output
    assert set(hub.arrived) == set(hub.stored)
    # The library keeps nothing in the folder that would be in the way of anything.
    assert tree_bytes(made / "out").keys() == repo.files().keys()

    hub.forget()
    again = push(made / "out", "--no-verify")
    assert again.exit_code == 0, again.output
    assert again.stdout == f"{hub.url}/{REPO}\n"
    assert "not verified" in again.stderr
    assert hub.asked("store") == hub.asked("commit") == []
    assert len(repo.commits) == 1


def test_a_branch_of_its_own_and_a_public_repository(hub: UploadHub, made: Path) -> None:
    done = push(made / "out", "--no-verify", "--revision", "half")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{hub.url}/{REPO}/tree/half\n"
    repo = hub.taken[REPO]
    assert not repo.private
    assert repo.files() == {}
    assert repo.files("half") == tree_bytes(made / "out")


def test_a_public_repository_is_not_taken_for_a_private_one(hub: UploadHub, made: Path) -> None:
    hub.taken[REPO] = Taken(private=False)
    assert "exists and is public, but --private" in refused(made / "out", "--no-verify", "--private")
    assert hub.stored == {}
    hub.taken[REPO].private = True
    done = push(made / "out", "--no-verify", "--json")
    assert json.loads(done.stdout)["private"] is True
    assert f"out -> {hub.url}/{REPO} (private), as {USER}\n" in done.stderr


def test_weights_of_another_model_in_the_repository_are_told(hub: UploadHub, made: Path) -> None:
    repo = hub.taken[REPO] = Taken(private=False)
    repo.branches["main"] = {"model.safetensors": (b"old", None), "logo.png": (b"p", None)}
    done = push(made / "out", "--no-verify")
    assert done.exit_code == 0
    assert "also has 1 files of weights that are not part of this model, first model.safetensors" in done.stderr
    assert repo.files() == {**tree_bytes(made / "out"), "model.safetensors": b"old", "logo.png": b"p"}


def test_what_the_hub_leaves_out_is_missed(hub: UploadHub, made: Path) -> None:
    hub.taken[REPO] = Taken(private=False, ignored={"config.json", "LICENSE"})
    said = refused(made / "out", "--no-verify", sending=True)
    assert "lacks 2 of" in said
    assert "first LICENSE (not there). A .gitignore in the repository" in said


def test_a_dry_run_asks_nobody(hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = push(made / "out", "--dry-run", "--source", made / "source")
    assert done.exit_code == 0, done.output
    assert hub.requests == []
    assert done.stderr == ""
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted(tree_bytes(made / "out"))
    assert "identical to the bytes of the source" in done.stdout
    told = json.loads(push(made / "out", "--dry-run", "--json").stdout)
    assert told["dry_run"] is True
    assert told["verified"]["kind"] == "files"
    assert told["bytes"] == sum(map(len, tree_bytes(made / "out").values()))
    assert "--dry-run does not use the network" in refused(made / "out", "--dry-run", "--source", "org/model", status=2)
    assert hub.requests == []


def write(output: Path, *names: str) -> None:
    for name in names:
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_only_what_belongs_to_the_model_goes(hub: UploadHub, made: Path, output: Path) -> None:
    later = ["evaluation/text.json", "evaluation/tasks.json", PAGE_NAME, f"{PICTURES_FOLDER}/heat.png"]
    write(output, *later)
    stays = {
        ".cache/": "hidden", ".git/": "hidden", ".env": "hidden", "sub/.secret": "hidden",
        "nohup.out": "belongs to no part of the model", "run.log": "a log", "model-00009.safetensors.partial":
        "not finished", "out.work/run.json": "belongs to no part of the model", "scores/other.safetensors":
        "belongs to no part of the model", "evaluation/samples/a.json": "belongs to no part of the model",
        "pictures/own.svg": "belongs to no part of the model",
    }  # fmt: skip
    write(output, *(f"{name}x/y" if name.endswith("/") else name for name in stays))
    (output / "linked").symlink_to("/etc")
    (output / "passwd").symlink_to("/etc/passwd")
    stays |= dict.fromkeys(("linked", "passwd"), "a link; belongs to no part of the model")
    done = push(output, "--source", made / "source", "--json")
    assert done.exit_code == 0, done.output
    assert sorted(hub.taken[REPO].files()) == sorted([*tree_bytes(made / "out"), *later])
    assert {each["path"]: each["reason"] for each in json.loads(done.stdout)["left_out"]} == stays
    for name, reason in stays.items():
        assert f"not sent: {name} ({reason})" in done.stderr
    # Nor is any of it in the way of what else is done with an output.
    verified = CliRunner().invoke(main, ["verify", str(output), "--source", str(made / "source")])
    assert verified.exit_code == 0, verified.output


def test_links_that_lead_out_of_the_folder_are_refused(made: Path, output: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("not for anybody")
    for name in ("LICENSE", "config.json", "scores"):
        place = output / name
        kept = place.rename(tmp_path / "kept")
        place.symlink_to(kept)
        said = refused(output, "--dry-run")
        assert "is a link out of the folder" in said or "scores.safetensors" in said
        place.unlink()
        kept.rename(place)
    # Within it, they are files like any other.
    (output / "LICENSE").rename(output / "LICENSE.txt")
    (output / "LICENSE").symlink_to("LICENSE.txt")
    assert push(output, "--dry-run", "--source", made / "source").exit_code == 0


DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (lambda out: (out / "streamprune.json").unlink(), "was not written by streamprune"),
    (lambda out: edit(out / "streamprune.json", lambda it: it.pop("files")), "does not list the files"),
    (lambda out: (out / "README.md").unlink(), "1 of .* files are missing, first 'README.md'"),
    (lambda out: (out / "scores" / "scores.safetensors").unlink(), "first 'scores/scores.safetensors'"),
    (lambda out: next(out.glob("model-*2-of*")).unlink(), "1 of 3 shards are missing"),
    (lambda out: cut(next(out.glob("model-*2-of*"))), "not a complete model"),
    (lambda out: (out / "README.md").write_text("---\na: [\n---\n"), "not valid YAML"),
    (lambda out: (out / "model-x.safetensors").write_bytes(b""), "is not listed in the index"),
    (lambda out: edit(out / "config.json", fewer), "is not valid|lists 5 experts"),
    (lambda out: edit(out / "streamprune.json", lambda it: it["layers"][1]["kept"].pop()), "lists 4 experts"),
    (lambda out: edit(out / "streamprune.json", lambda it: it["layers"].pop()), "has scores of 2 layers"),
    (lambda out: edit(out / "model.safetensors.index.json", lambda it: it.pop("metadata")), "does not state the"),
    (lambda out: cut(out / "scores" / "scores.safetensors"), "scores.safetensors.*damaged"),
]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def fewer(config: Any) -> None:
    config.update({key: 4 for key in ("num_experts", "num_local_experts") if key in config})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=range(len(DAMAGE)))
def test_nothing_is_made_on_the_hub_for_what_is_not_whole(
    hub: UploadHub, output: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(output)
    assert re.search(message, refused(output)), refused(output)
    assert hub.taken == hub.stored == {}
    assert {each.file for each in hub.requests} <= {"whoami"}


def test_a_changed_byte_is_found_with_the_source(hub: UploadHub, made: Path, output: Path) -> None:
    shard = next(output.glob("model-*2-of*"))
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    assert "differs from the source at byte" in refused(output, "--source", made / "source")
    assert hub.taken == {}
    # Without it nobody can see that, and the message says so.
    done = push(output, "--dry-run")
    assert "Not compared with the bytes of the source: no --source is given." in done.stdout


def test_computed_tensors_have_their_hash_on_record_or_are_refused(hub: UploadHub, output: Path) -> None:
    """They are no bytes of the source; what proves them is there without it."""
    entry = next(each for each in open_checkpoint(output).tensors.values() if "experts" in each.name)
    shard = output / entry.file
    data = bytearray(shard.read_bytes())
    computed = {"stage": "refit", "sha256": hashlib.sha256(data[entry.begin : entry.end]).hexdigest()}
    edit(output / "streamprune.json", lambda it: it.update(computed={entry.name: computed}))
    assert "verified without the source" in push(output, "--dry-run").stdout
    data[entry.begin + 3] ^= 1
    shard.write_bytes(data)
    assert f"{entry.name}, computed by refit, has the SHA-256" in refused(output)
    edit(output / "streamprune.json", lambda it: it.update(computed={"no.such.weight": computed}))
    assert "lacks no.such.weight, which refit computed" in refused(output)
    assert hub.taken == hub.stored == {}


def test_a_source_in_the_hub_cache_is_found(
    hub: UploadHub, made: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(output / "streamprune.json", lambda it: it["settings"].update(model="org/model"))
    assert "org/model is not in the Hub cache" in push(output, "--dry-run").stdout
    cache = Path(constants.HF_HUB_CACHE) / "models--org--model"
    commit = "c0ffee" * 6 + "c0ff"
    shutil.copytree(made / "source", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    assert f"identical to the bytes of the source in {cache / 'snapshots' / commit}" in push(output, "--dry-run").stdout
    edit(cache / "snapshots" / commit / "config.json", lambda it: it.update(rope_theta=7.0))
    assert "org/model in the Hub cache is of another revision" in push(output, "--dry-run").stdout
    assert hub.requests == []


# One of text, and one whose text part alone is built.
@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])
def test_uneven_models_are_checked_without_their_source(tmp_path: Path, family: str) -> None:
    """Their config has to be understood, and the code beside their weights has to be ours: everybody runs it."""
    source = make_model(tmp_path / "source", tiny_config(known_family(family)))
    output = prune(source, tmp_path / "uneven", schedule="linear-decrease", spread=0.2).output
    counts = [len(layer["kept"]) for layer in json.loads((output / "streamprune.json").read_text())["layers"]]
    assert len(set(counts)) > 1
    assert "verified without the source" in push(output, "--dry-run").stdout
    code = next(output.glob("modeling_*.py"))
    code.write_text(code.read_text() + "import os\n")
    assert f"{code.name} differs from the modeling code that this version writes" in refused(output, "--dry-run")


def test_a_file_that_changes_while_it_is_verified(
    hub: UploadHub, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = push_module.prove

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        shown = usual(*arguments, **options)
        (output / "README.md").write_text("another")
        return shown

    monkeypatch.setattr(push_module, "prove", meanwhile)
    assert "README.md has changed since it was verified" in refused(output)
    assert hub.taken == {}


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"fail": {"whoami": (401, "Invalid credentials")}}, "does not accept the token"),
    ({"fail": {"whoami": (500, "")}}, "Logging in failed: .* answered with HTTP status 500"),
    ({"fail": {"create": (403, "no rights")}}, r"the token may not write to me/small \(no rights\)"),
    ({"fail": {"create": (402, "pay first")}}, r"asks for payment \(pay first\)"),
    ({"fail": {"create": (400, "bad name")}}, r"refused as invalid \(bad name\)"),
    ({"fail": {"preupload": (403, "read-only token")}}, "Uploading was refused: the token may not write to me/small"),
    ({"fail": {"batch": (500, "out of order")}}, r"HTTP status 500 \(out of order\). Push again: uploaded files"),
    ({"fail": {"store": (503, "later")}}, "HTTP status 503"),
    ({"fail": {"store": (403, "signature expired")}}, "Uploading was refused"),
    ({"fail": {"commit": (429, "too many")}}, "too many requests"),
    ({"fail": {"commit": (413, "too large")}}, r"HTTP status 413 \(too large\)"),
    ({"fail": {"yaml": (400, "")}}, "does not accept the model card"),
    ({"fail": {"tree": (500, "")}}, "Checking the uploaded files failed"),
    ({"broken": {"store"}}, "cannot be reached, or broke off"),
    ({"broken": {"create"}}, "Creating it failed: .* cannot be reached, or broke off"),
    ({"silent": True}, r"Logging in failed: .* does not answer \(ReadTimeout\). Check the connection"),
]


@pytest.mark.parametrize(("trouble", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_a_failing_hub_gives_one_clear_line(
    hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch, trouble: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(push_module, "TIMEOUTS", (5.0, 0.3, 5.0, None))
    for name, value in trouble.items():
        setattr(hub, name, value)
    sending = not {"whoami", "create"} & {*hub.fail, *hub.broken} and not hub.silent
    said = refused(made / "out", "--no-verify", sending=sending)
    assert re.search(message, said), said
    assert "secret" not in said


def test_the_rights_and_kinds_of_repositories(hub: UploadHub, made: Path) -> None:
    assert "may not write to other/small" in refused(made / "out", "--no-verify", repo="other/small")
    hub.taken["other/there"] = Taken(private=False)
    said = refused(made / "out", "--no-verify", repo="other/there", sending=True)
    assert "may not write to other/there" in said
    hub.taken[REPO] = Taken(private=False, kind="dataset")
    assert "Is the name taken by a data set" in refused(made / "out", "--no-verify")


@pytest.mark.parametrize("repo", ["small", "a/b/c", "me/sm all", "me/-x", "me/", "/x", "me/" + "x" * 99, "me/a..b", ""])
def test_names_that_no_repository_has(made: Path, hub: UploadHub, repo: str) -> None:
    assert "--repo-id" in refused(made / "out", repo=repo, status=2)
    assert hub.requests == []


@pytest.mark.parametrize("branch", ["", "a b", "../x", "-x", "a\nb"])
def test_names_that_no_branch_has(made: Path, branch: str) -> None:
    assert "cannot be a branch" in refused(made / "out", f"--revision={branch}", status=2)


def test_without_a_token_or_a_connection(hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_notThisOneEither")
    said = refused(made / "out")
    assert "does not accept the token" in said
    assert "hf_not" not in said
    monkeypatch.delenv("HF_TOKEN")
    hub.forget()
    assert "You are not logged in to the Hub. Log in with `hf auth login`" in refused(made / "out", status=2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1 forbids uploading" in refused(made / "out", status=2)
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "http://127.0.0.1:9 cannot be reached" in refused(made / "out")


def test_no_message_has_a_token_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "unusual-token")
    said = explain(REPO, "Uploading", ValueError("Illegal header value b'Bearer unusual-token', hf_abcdefghijk"))
    assert "unusual" not in said
    assert "hf_abc" not in said
    full = explain(REPO, "Uploading", OSError(28, "No space left on device"))
    assert "a disk here is full" in full


@pytest.mark.parametrize(
    ("place", "message"),
    [("nothing", "is not a folder"), ("out.work", "is not a folder"), ("empty", "was not written by streamprune")],
)
def test_what_is_no_output(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    assert message in refused(tmp_path / place, "--dry-run")


def begin(hub: UploadHub, output: Path, *options: str) -> subprocess.Popen[str]:
    """The command in a process of its own, that talks to the stand-in."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(output.parent / "home"), "NO_PROXY": "127.0.0.1", "HF_TOKEN": TOKEN,
           "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "streamprune", "push", str(output), "--repo-id", REPO, "--no-verify", *options],
        env=base | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("way", mostly_thorough([signal.SIGKILL, signal.SIGINT, signal.SIGTERM], (signal.SIGKILL,)))
def test_an_interrupted_upload_goes_on_where_it_was(output: Path, way: signal.Signals) -> None:
    with UploadHub() as first:
        first.hold = 2
        process = begin(first, output, "--private")
        assert first.waiting.wait(60), process.communicate(timeout=5)
        deadline = time.monotonic() + 30
        while len(first.arrived) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(way)
        _, told = process.communicate(timeout=20)
    arrived, stored = set(first.arrived), dict(first.stored)
    assert len(arrived) == 2
    assert not first.taken[REPO].commits
    if way is signal.SIGKILL:
        assert process.returncode == -way
    else:
        assert process.returncode == 75
        last = told.strip().splitlines()[-1]
        assert last.startswith("Interrupted. Uploaded files are kept; resume with the same command:")
        assert last.endswith(f"streamprune push {output} --repo-id {REPO} --no-verify --private")
    before = tree_bytes(output)
    with UploadHub() as second:
        # The same Hub, later.
        second.taken, second.stored = first.taken, stored
        process = begin(second, output, "--private")
        url, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
        assert url == f"{second.url}/{REPO}\n"
    files = second.taken[REPO].files()
    assert files == tree_bytes(output) == before
    assert arrived.isdisjoint(second.begun)
    assert arrived | set(second.begun) == set(stored)
    assert len(second.begun) == sum(name.endswith(".safetensors") for name in files) - 2
