"""What a kill, a full disk or an error may do to single files and folders."""
import math
import os
from contextlib import nullcontext

import pytest
from conftest import full_disk

from data import files
from data.files import UserError


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
    with pytest.raises(UserError, match="text: File too large"), full_disk(100):
        files.write_text(path, "new" * 100)
    assert sorted(os.listdir(tmp_path)) == ["text", "text.tmp"]
    assert path.read_text() == "old" and other.read_text() == "not ours"
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name.startswith(".")))
    file = path.stat().st_ino
    files.write_text(path, "new")
    assert path.stat().st_ino != file, "it is another file, so nobody sees half of the text"
    assert synced == [True, False], "first the text, later its name"


def test_write_folder(tmp_path, monkeypatch):
    """The files of a new folder are on the disk before it takes the place of the old one."""
    synced, last = [], tmp_path / "last"
    for text in ("old", "new"):
        files.write_folder(last, lambda folder: (folder / "text").write_text(text))
        monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name))
    assert synced == ["text", "last.new", tmp_path.name]
    assert os.listdir(tmp_path) == ["last"] and (last / "text").read_text() == "new"


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
