"""What a kill, a full disk or an error may do to single files and folders."""
import math
import os
import resource
import signal
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from data import files
from data.files import UserError


@contextmanager
def full_disk():
    """No file may grow beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then write() fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("tail", ["", '{"st', '{"step": 3}', '{"x": "\u00e4'])
def test_cut_log(tail, tmp_path):
    """A log's last line without a newline is dropped; a malformed line before it is an error."""
    log = tmp_path / "log"
    assert files.read_log(log) == []
    files.append_jsonl(log, [{"step": 1}, {"step": 2}])
    with log.open("a") as file:
        file.write(tail)
    assert files.read_log(log) == [{"step": 1}, {"step": 2}]
    log.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match="log, line 2"):
        files.read_log(log)


def test_not_finite():
    """Numbers that JSON lacks become null at every depth; all others keep every digit."""
    row = {"a": math.nan, "b": [0.1 + 0.2, -math.inf], "c": {"d": math.inf}, "e": "NaN"}
    text = '{"a": null, "b": [0.30000000000000004, null], "c": {"d": null}, "e": "NaN"}\n'
    assert files.to_jsonl([row, {}]) == text + "{}\n"


def test_write_text(tmp_path, monkeypatch):
    """A failed write leaves the old text and nothing else; files beside it are never touched."""
    path, other, synced = tmp_path / "text", tmp_path / "text.tmp", []
    other.write_text("not ours")
    files.write_text(path, "old")
    with pytest.raises(UserError, match="text: File too large"), full_disk():
        files.write_text(path, "new" * 100)
    assert sorted(os.listdir(tmp_path)) == ["text", "text.tmp"]
    assert path.read_text() == "old" and other.read_text() == "not ours"
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name.startswith(".")))
    file = path.stat().st_ino
    files.write_text(path, "new")
    assert path.stat().st_ino != file, "it is another file, so nobody sees half of the text"
    assert synced == [True, False], "first the text, later its name"


def fill(text):
    """What writes two files into a folder."""
    return lambda folder: [(folder / name).write_text(text) for name in "ab"]


def whole(folder, text):
    """Whether a folder holds both files with this text."""
    return all((folder / n).exists() and (folder / n).read_text() == text for n in "ab")


@pytest.mark.parametrize("left", [(), ("last",), ("last.old",), ("last", "last.old", "last.new")])
def test_kill_while_replacing(left, tmp_path, monkeypatch):
    """Killed before any rename or removal, the folder is whole, or missing and its .old is."""
    last, old, moments = tmp_path / "last", tmp_path / "last.old", []
    for name in left:
        (tmp_path / name).mkdir()
        fill("before" if name == left[0] else "long ago")(tmp_path / name)

    def watch(module, name):
        """Before each call, see what a kill at this moment would leave."""
        real = getattr(module, name)

        def call(*arguments, **more):
            found = last if last.exists() else old
            moments.append(not left or whole(found, "before") or whole(found, "after"))
            return real(*arguments, **more)
        monkeypatch.setattr(module, name, call)

    for module, name in [(Path, "rename"), (os, "unlink"), (os, "rmdir"), (os, "fsync")]:
        watch(module, name)
    files.write_folder(last, fill("after"))
    monkeypatch.undo()
    assert all(moments) and len(moments) >= 5
    assert os.listdir(tmp_path) == ["last"] and whole(last, "after")


@pytest.mark.parametrize("error, line, code", [
    (UserError("a\n  b"), "error: a b\n", 2), (KeyboardInterrupt(), "interrupted\n", 130),
    (FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'\n", 2),
    (RuntimeError("CUDA out of memory. Tried"), "error: out of memory: lower --token-budget", 2),
    (MemoryError(), "error: out of memory: lower --token-budget", 2), (SystemExit(2), "", None),
    (RuntimeError("a bug"), "", None), (RuntimeError("illegal memory access"), "", None)])
def test_exit_code(error, line, code, capsys):
    """What the user can mend is one line and a code; bugs and argparse's way out pass through."""
    def program():
        raise error

    with pytest.raises(type(error)) if code is None else nullcontext():
        assert files.exit_code(program) == code
    assert capsys.readouterr().err.startswith(line)
