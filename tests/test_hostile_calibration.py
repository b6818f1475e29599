"""Chat templates and calibration files made to do harm: each ends in one message that names the record, in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from streamprune.calibration import chat
from streamprune.errors import CalibrationError
from tests.fuzzing import resident_bytes
from tests.recipes import load
from tests.thorough import mostly_thorough
from tests.tokenizer import save_tokenizer


def chats(tmp_path: Path, template: str, records: int = 1) -> str:
    """What is said when chats are rendered with a template that does not behave."""
    tokenizer = save_tokenizer(tmp_path / "model", chat=False)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    line = json.dumps({"messages": [{"role": "user", "content": "hello, who is there?"}]})
    (tmp_path / "chats.jsonl").write_text(f"{line}\n" * records)
    with pytest.raises(CalibrationError) as caught:
        load([tmp_path / "chats.jsonl"], tmp_path / "model", samples=9, seq_len=8, seed=0)
    assert f"{tmp_path / 'chats.jsonl'} line 1" in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


RANGE = "range(99999)"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in R %}{% for b in R %}{% for c in R %}{% endfor %}{% endfor %}{% endfor %}".replace("R", RANGE),
        # A single step, which no exception raised by a timer could interrupt.
        "{{ 9 ** (9 ** (8 + messages|length)) }}",
    ],
    ids=["loops", "power"],
)
def test_a_template_that_never_ends(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MOST_SECONDS", 1.0)
    started = time.monotonic()
    assert "was still running after 1 seconds with this chat" in chats(tmp_path, template)
    assert time.monotonic() - started < 15
    assert children() == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 11 * messages|length }}",
        "{{ 'x' * 10 ** 11 }}",
        f"{{% for a in {RANGE} %}}{{{{ 'x' * 100000 * messages|length }}}}{{% endfor %}}",
        "{% set n = namespace(t='x') %}{% for a in range(90000) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    ],
    ids=["at once", "as a constant", "bit by bit", "doubling"],
)
def test_a_template_that_grows_without_bound(template: str, tmp_path: Path) -> None:
    before = resident_bytes()
    message = chats(tmp_path, template)
    assert "of memory" in message or "of text" in message or "exceeded the limits" in message, message
    assert resident_bytes() - before < 2**28
    assert children() == []


def test_a_text_that_is_too_long(tmp_path: Path) -> None:
    assert "100,000,000 bytes of text, more than 67,108,864" in chats(tmp_path, "{{ 'x' * 100000000 }}")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.upper() }}", "refuses this chat"),
        ("{% for m in messages %}", "refuses this chat"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('touch PWNED') }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ '\\ud800' }}", "refuses this chat"),
    ],
)
def test_a_template_that_misbehaves(template: str, words: str, tmp_path: Path) -> None:
    message = chats(tmp_path, template.replace("PWNED", str(tmp_path / "pwned")))
    assert words in message, message
    assert not (tmp_path / "pwned").exists()


def test_a_template_that_gives_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        def apply_chat_template(self, messages: list[Any], tokenize: bool) -> list[Any]:
            return messages

    with (
        chat.ChatRenderer(Odd()) as renderer,
        pytest.raises(CalibrationError, match=r"chats\.jsonl line 3: .* it returns a list instead of text"),
    ):
        renderer.render(chat.Chat("chats.jsonl line 3", [{}]))


def test_many_chats_come_in_order_from_one_process(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    wanted = [chat.Chat(f"line {n}", [{"role": "u", "content": f"{n} " + "x" * 3000}]) for n in range(500)]
    with chat.ChatRenderer(tokenizer) as renderer:
        assert children() == []
        for n, each in enumerate(wanted):
            assert renderer.render(each) == f"<u>{n} " + "x" * 3000
        assert len(children()) == 1
    assert children() == []


def children() -> list[int]:
    """The processes of this one, without what multiprocessing keeps running for other tests."""
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    kept = (b"multiprocessing.forkserver", b"multiprocessing.resource_tracker")
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in listed.split()}
    return [pid for pid, command in commands.items() if not any(name in command for name in kept)]


@pytest.mark.parametrize("kind", mostly_thorough(["text", "ids", "broken", "no JSON"], ("text",)))
def test_an_enormous_record(kind: str, tmp_path: Path) -> None:
    """A line of 200 MB: time in proportion, and memory for a few copies of it. In a process of its own, to measure."""
    size = 200_000_000
    content = {
        "text": b'{"text": "' + b"word " * (size // 5) + b'"}\n',
        "ids": b'{"input_ids": [' + b"7, " * (size // 3) + b"7]}\n",
        "broken": b'{"text": "' + b"word " * (size // 5) + b"\n",
        "no JSON": b"\0" * size,
    }[kind]
    path = tmp_path / "large.jsonl"
    path.write_bytes(content)
    code = (
        "import random, resource, sys, time\n"
        "from pathlib import Path\n"
        "from streamprune.calibration.text_files import read_file\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before, started = peak(), time.process_time()\n"
        "[row] = read_file(Path(sys.argv[1]), random.Random(0))\n"
        "print(str(row.error)[:300])\n"
        "print((peak() - before) * 1024, time.process_time() - started)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=120)
    said, figures = done.stdout.splitlines()
    assert said == "None" if kind in ("text", "ids") else said.startswith(f"{path} line 1 is not valid JSON"), said
    peak, seconds = map(float, figures.split())
    # A list of numbers takes eight bytes each.
    assert peak < (8 if kind == "ids" else 5) * size
    assert seconds < 30


def test_a_file_of_one_endless_line(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        with (tmp_path / name).open("wb") as stream:
            os.truncate(stream.fileno(), 2**40)
        with pytest.raises(CalibrationError, match=rf"{name}.* is longer than 256\.00 MiB"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/a.txt", "a\0b", "/root/" + "y" * 300 + "/b.yaml"])
def test_names_that_can_be_no_file(name: str, tmp_path: Path) -> None:
    for sources in ([name], [name, "builtin"]):
        with pytest.raises(CalibrationError) as caught:
            load(sources, tmp_path)
        assert len(str(caught.value)) < 700
    (tmp_path / "r.yaml").write_text(json.dumps({"sources": [{"path": name}]}))
    with pytest.raises(CalibrationError) as caught:
        load([tmp_path / "r.yaml"], tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_larger_than_any_memory_is_read_no_further_than_it_has_to_be(name: str, tmp_path: Path) -> None:
    line = b'{"text": "some text of a few words"}\n' * 2000
    path = tmp_path / name
    with path.open("wb") as stream:
        for _ in range(2**27 // len(line)):
            stream.write(line)
        # Eight TiB of nothing: one endless line, if it were ever reached.
        os.truncate(stream.fileno(), 2**43)
    save_tokenizer(tmp_path)
    before, started = resident_bytes(), time.monotonic()
    read(path)
    assert time.monotonic() - started < 20
    assert resident_bytes() - before < 2**28


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n\0\0\0\n', "line 2 is not valid JSON"),
        (b'{"text": "\\ud83d"}\n', "line 1 is not valid JSON"),
        (b'{"text": "a\xff"}\n', r"line 1 is not UTF-8 text \(byte 11\)"),
        (b'{"text": "a"}\n{"text": "\xc3"}\n', r"line 2 is not UTF-8 text \(byte 24\)"),
        (b'{"input_ids": [' + b"9" * 5000 + b"]}", "line 1 is not valid JSON"),
        (b'{"input_ids": [' + b"9" * 4000 + b"]}", "line 1 has 999"),
        (b'{"input_ids": [1e999]}', "line 1 has inf in"),
        (b'{"input_ids": [' + b"[" * 500 + b"]" * 500 + b"]}", r"line 1 has \[\["),
        (b"[" * 100_000, "line 1 is not valid JSON"),
        (json.dumps({"k" * 100_000: 1}).encode(), "line 1 has no 'text'"),
        (json.dumps({str(n): n for n in range(100_000)}).encode(), "line 1 has no 'text'"),
    ],
)
def test_records_that_say_nonsense(content: bytes, words: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CalibrationError, match=words) as caught:
        read(tmp_path / "a.jsonl")
    assert str(tmp_path / "a.jsonl") in str(caught.value)
    assert len(str(caught.value)) < 3000


def read(path: Path) -> None:
    load([path], path.parent, samples=9, seq_len=8, seed=0)
