"""What a kill, a full disk or a second process may do to files."""
import math
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
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


@pytest.mark.parametrize("content, message", [
    (b'{"a": "\xff"}', "utf-8"), (b"[" * 100_000, "malformed JSON"), (b"{oops}", "malformed JSON"),
    (b"[1]", "not a JSON object"), (b"id,answer\n1,2\n", "malformed JSON")])
def test_bad_json(content, message, tmp_path):
    """What is no JSON object is a UserError with the file's name, and in JSONL with the line."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"file.*{message}"):
        files.read_json(path)
    path.write_bytes(b"\xef\xbb\xbf\n{\"a\": \"\xe2\x80\xa8\"}\n" + content)
    with pytest.raises(UserError, match=f"file(, line 3)?: .*{message}"):
        list(files.read_jsonl(path))
    for missing in (tmp_path / "none", tmp_path / ("x" * 300), path / "x", tmp_path):
        with pytest.raises(UserError, match=missing.name):
            files.read_json(missing)


@pytest.mark.parametrize("tail", ["", '{"st', '{"step": 3}', '{"x": "\u00e4'])
def test_cut_log(tail, tmp_path):
    """A log's last line without a newline is dropped; a malformed line before it is an error."""
    log = tmp_path / "log"
    assert files.read_log(log) == []
    files.append_jsonl(log, [{"step": 1}])
    files.append_jsonl(log, [{"step": 2}])
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
    path = tmp_path / "text"
    (tmp_path / "text.tmp").write_text("not ours")
    files.write_text(path, "old")
    with pytest.raises(UserError, match="text: File too large"), full_disk():
        files.write_text(path, "new" * 100)
    assert sorted(os.listdir(tmp_path)) == ["text", "text.tmp"] and path.read_text() == "old"
    assert (tmp_path / "text.tmp").read_text() == "not ours"
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name.startswith(".")))
    synced = []
    files.write_text(path, "new")
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
    last, old = tmp_path / "last", tmp_path / "last.old"
    for name in left:
        (tmp_path / name).mkdir()
        fill("before" if name == left[0] else "long ago")(tmp_path / name)
    moments = []

    def check(call):
        """The call, but first what a kill at this moment would leave."""
        def checked(*arguments, **more):
            found = last if last.exists() else old
            moments.append(not left or whole(found, "before") or whole(found, "after"))
            return call(*arguments, **more)
        return checked

    for module, name in [(Path, "rename"), (os, "unlink"), (os, "rmdir"), (os, "fsync")]:
        monkeypatch.setattr(module, name, check(getattr(module, name)))
    files.write_folder(last, fill("after"))
    monkeypatch.undo()
    assert all(moments) and len(moments) >= 5
    assert os.listdir(tmp_path) == ["last"] and whole(last, "after")


def test_full_disk_while_replacing(tmp_path):
    """A full disk is one line; the old folder stays and no half-written one; so is no parent."""
    files.write_folder(tmp_path / "last", fill("old"))
    with pytest.raises(UserError, match="cannot save .*last .*File too large"), full_disk():
        files.write_folder(tmp_path / "last", fill("new" * 100))
    assert os.listdir(tmp_path) == ["last"] and whole(tmp_path / "last", "old")
    with pytest.raises(UserError, match="cannot save .*No such file"):
        files.write_folder(tmp_path / "gone" / "last", fill("new"))
    assert not (tmp_path / "gone").exists()


def test_lock(tmp_path):
    """One process has a folder, until it ends, even by SIGKILL; others leave it as it is."""
    code = ("import sys, pathlib, data.files as files\n"
            "with files.open_folder(pathlib.Path(sys.argv[1]), new=True):\n"
            "    print(flush=True)\n    input()")
    run = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", code, run], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, cwd=Path(files.__file__).parents[1])
    other.stdout.readline()
    with pytest.raises(UserError, match="another process"), files.open_folder(run, new=True):
        pass
    assert os.listdir(run) == ["lock"]
    other.kill()
    other.communicate()
    with files.open_folder(run, new=True):
        (run / "text").write_text("ours")
    with pytest.raises(UserError, match="already holds something"), files.open_folder(run, True):
        pass
    with files.open_folder(run, new=False), pytest.raises(UserError, match="another process"):
        with files.open_folder(run, new=False):
            pass
    with files.open_folder(tmp_path / "empty", new=True):
        pass
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("error, line, code", [
    (None, "", 0), (UserError("a\n  b"), "error: a b\n", 2), (KeyboardInterrupt(), "inter", 130),
    (FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'\n", 2),
    (RuntimeError("CUDA out of memory. Tried"), "error: out of memory: lower --token-budget", 2),
    (MemoryError(), "error: out of memory: lower --token-budget", 2), (SystemExit(2), "", None),
    (RuntimeError("a bug"), "", None), (RuntimeError("illegal memory access"), "", None)])
def test_exit_code(error, line, code, capsys):
    """What the user can mend is one line and a code; bugs and argparse's way out pass through."""
    def program():
        if error:
            raise error
    if code is None:
        with pytest.raises(type(error)):
            files.exit_code(program)
    else:
        assert files.exit_code(program) == code
    assert capsys.readouterr().err.startswith(line)
