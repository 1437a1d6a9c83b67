"""What a kill, a full disk, a second process or a broken terminal may do to files and output."""
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data import files
from data.files import UserError

ROOT = Path(__file__).parents[1]
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def start(code, *arguments, **more):
    """A Python process in which `files` is imported."""
    command = [sys.executable, "-c", "import os, sys, time\nfrom data import files\n" + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=BUFFERED | more)


@pytest.fixture
def full_disk():
    """While `full_disk(True)` holds, no file may grow beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself does: then write() fails with EFBIG
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (100 if full else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


# --- Reading ----------------------------------------------------------------------------------------------------------
LINES = '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("tail", [
    "", '{"step": 3}', '{"st', '{"step": 3, "x\n', "\n", "  \n\n", "\0" * 100, "\0" * 50 + "\n", '{"step\0\0\0\0\n\n',
    "\n\0\0", "\0\0\n\0\n", "  \n \t\n \n"])
def test_a_log_is_read_up_to_what_a_kill_left_at_its_end(tail, tmp_path):
    (tmp_path / "log").write_text(LINES + tail)
    assert files.read_log(tmp_path / "log") == [{"step": 1}, {"step": 2}]


def test_a_log_that_is_missing_or_empty_has_no_rows(tmp_path):
    assert files.read_log(tmp_path / "log") == []
    (tmp_path / "log").touch()
    assert files.read_log(tmp_path / "log") == []


@pytest.mark.parametrize("middle", ["{oops}", "", "[1]", "3", "\0\0"])
def test_a_malformed_line_inside_a_log_is_named(middle, tmp_path):
    (tmp_path / "log").write_text(f'{{"step": 1}}\n{middle}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"log, line 2: (malformed|not a JSON object)"):
        files.read_log(tmp_path / "log")


@pytest.mark.parametrize("path", ["x" * 300, "file/x", "a\0b", "folder", "~nosuchuser/x"])
def test_a_path_that_no_file_can_have_is_one_line(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("text")
    Path("folder").mkdir()
    for function in (files.read_text, lambda path: list(files.read_jsonl(path))):
        with pytest.raises(UserError, match="cannot be read"):
            function(path)
    if path not in ("file/x", "folder"):
        with pytest.raises(UserError, match="cannot be read"):
            files.user_path(path)
    for write in (lambda path: files.write_atomic(path, "text"), lambda path: files.append_jsonl(path, [{}])):
        if path != "~nosuchuser/x":
            with pytest.raises(UserError, match="cannot be written"):
                write(path)


def test_a_device_is_no_file_to_read():
    with pytest.raises(UserError, match="not a file"):
        files.read_text("/dev/zero")


@pytest.mark.parametrize("content, message", [
    (b"", "the file is empty"), (b" \n\n", "the file is empty"), (b'{"id": "\xff"}', "not UTF-8 text .byte 8"),
    (b"[" * 100_000, "line 1: malformed JSON"), (b"{}\n{oops}\n", "line 2: malformed JSON"),
    (b"{}\n\n[1]\n", "line 3: not a JSON object")])
def test_a_malformed_file_is_one_line(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=f"file(, |: ){message}"):
        list(files.read_jsonl(tmp_path / "file"))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"b": 2}')
    assert list(files.read_jsonl(tmp_path / "file")) == [(1, {"a": 1}), (3, {"b": 2})]


# --- Writing ----------------------------------------------------------------------------------------------------------
def test_numbers_that_json_does_not_have_become_null(tmp_path):
    files.append_jsonl(tmp_path / "log", [{"a": math.nan, "b": [1.5, -math.inf], "c": {"d": math.inf}}, {"e": "NaN"}])
    files.append_jsonl(tmp_path / "log", [{"f": True}])
    text = (tmp_path / "log").read_text()
    assert text == '{"a": null, "b": [1.5, null], "c": {"d": null}}\n{"e": "NaN"}\n{"f": true}\n'


def test_a_log_is_cut_after_a_step_and_otherwise_keeps_every_byte(tmp_path):
    log = tmp_path / "log"
    files.append_jsonl(log, [{"step": i // 2, "x": 0.1 * i, "text": "ü\u2028"} for i in range(6)])
    kept = b"".join(log.read_bytes().splitlines(True)[:4])
    with log.open("a") as file:
        file.write('{"step": 3, "x')
    files.cut_log(log, 1)
    assert log.read_bytes() == kept
    files.cut_log(tmp_path / "none", 1)
    assert os.listdir(tmp_path) == ["log"]


@pytest.mark.parametrize("row", [{}, {"step": "1"}, {"step": True}, {"step": 1.0}])
def test_a_row_without_a_step_is_not_cut_by_guess(row, tmp_path):
    log = tmp_path / "log"
    log.write_text(LINES + json.dumps(row) + "\n")
    with pytest.raises(UserError, match="log, row 3: it has no step"):
        files.cut_log(log, 1)
    assert log.read_text().startswith(LINES)


def test_a_full_disk_leaves_the_old_text_and_is_one_line(tmp_path, full_disk):
    path, log = tmp_path / "text", tmp_path / "log"
    files.write_atomic(path, "old")
    files.append_jsonl(log, [{"step": 1}])
    full_disk(True)
    with pytest.raises(UserError, match="text: cannot be written .File too large"):
        files.write_atomic(path, "new" * 100)
    with pytest.raises(UserError, match="log: cannot be written .File too large"):
        files.append_jsonl(log, [{"step": 2}] * 100)
    full_disk(False)
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["log", "text"], "nothing else is left"
    assert files.read_log(log)[0] == {"step": 1}
    files.write_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    deeds = []
    replace, sync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (deeds.append("replace"), replace(a, b)))
    monkeypatch.setattr(os, "fsync",
                        lambda handle: (deeds.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle)))
    files.write_atomic(tmp_path / "text", "new")
    assert deeds == [str(tmp_path / "text.tmp"), "replace", str(tmp_path)]


@pytest.mark.parametrize("number, fine", [(22, True), (28, False)])
def test_only_a_file_system_that_cannot_sync_is_forgiven(number, fine, tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "fsync", fsync)
    if fine:
        return files.write_atomic(tmp_path / "text", "new")
    with pytest.raises(UserError, match="No space left"):
        files.write_atomic(tmp_path / "text", "new")


def test_a_file_is_claimed_before_it_is_filled_and_never_taken_unasked(tmp_path):
    path = tmp_path / "x"
    files.claim_file(path, overwrite=False)
    files.claim_file(path, overwrite=False)  # empty: left by an earlier claim
    path.write_text("text")
    with pytest.raises(UserError, match="exists.*--overwrite"):
        files.claim_file(path, overwrite=False)
    files.claim_file(path, overwrite=True)
    assert path.read_text() == "text"
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="exists: pass another --out$"):
            files.claim_file(path, overwrite=True)


# --- Folders ----------------------------------------------------------------------------------------------------------
def whole(folder):
    return folder.is_dir() and (folder / "a").is_file() and (folder / "b").is_file()


def finished(folder, text):
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("left", ["nothing", "folder", "old", "both", "folder and a part of old"])
def test_at_every_moment_of_a_replacement_one_folder_is_whole(left, tmp_path, monkeypatch):
    folder, old = tmp_path / "last", tmp_path / "last.old"
    new = finished(tmp_path / "new", "new")
    if left != "nothing":
        finished(folder, "before") if left != "old" else finished(old, "before")
    if left == "both":
        finished(old, "long ago")
    if left == "folder and a part of old":
        old.mkdir()

    def check(event, _):
        if watching and event in ("os.rename", "os.rmdir", "os.remove", "open") and left != "nothing":
            assert whole(folder) or (not folder.exists() and whole(old)), event

    watching = True
    sys.addaudithook(check)
    try:
        files.replace_folder(new, folder)
    finally:
        watching = False  # a hook cannot be taken away
    assert os.listdir(tmp_path) == ["last"] and (folder / "a").read_text() == (folder / "b").read_text() == "new"


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    deeds, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync",
                        lambda handle: (deeds.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle)))
    finished(tmp_path / "new", "new")
    files.replace_folder(tmp_path / "new", tmp_path / "last")
    names = [Path(deed).name for deed in deeds]
    assert sorted(names[:-1]) == ["a", "b", "new"] and names[-1] == tmp_path.name


def test_no_two_processes_get_the_same_new_folder(tmp_path):
    code = """
from pathlib import Path
for _ in range(20):
    with files.held_folder(Path(sys.argv[1]), new=True) as folder:
        (folder / "x").touch()
        print(folder.name)
"""
    processes = [start(code, tmp_path / "runs" / "run") for _ in range(2)]
    names = sorted(name for process in processes for name in process.communicate(timeout=60)[0].split())
    assert names == sorted(["run", *(f"run-{i}" for i in range(2, 41))])


def test_a_folder_is_held_by_one_and_removed_if_it_stays_empty(tmp_path):
    folder = tmp_path / "runs" / "run"
    with files.held_folder(folder):
        with pytest.raises(UserError, match="another process is running in"):
            with files.held_folder(folder):
                pass
    assert os.listdir(tmp_path) == [], "what was made for nothing is gone"
    with files.held_folder(folder):
        (folder / "x").touch()
    with files.held_folder(folder) as again:
        assert again == folder
    assert sorted(os.listdir(folder)) == ["lock", "x"]
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot be written"):
            with files.held_folder(path):
                pass


def test_a_folder_is_locked_while_its_process_lives_and_not_longer(tmp_path):
    other = start("file = files.lock(sys.argv[1]); print('locked', flush=True); time.sleep(60)", tmp_path)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"another process is running in {tmp_path}"):
        files.lock(tmp_path)
    other.kill()  # SIGKILL
    other.wait()
    other.communicate()
    held = files.lock(tmp_path)
    with pytest.raises(UserError, match="another process"):
        files.lock(tmp_path)
    held.close()
    files.lock(tmp_path).close()
    with pytest.raises(UserError, match="cannot be written"):
        files.lock(tmp_path / "nothing")


def test_where_the_file_system_knows_no_locks_a_run_goes_on(tmp_path, monkeypatch):
    def flock(file, flags):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(files.fcntl, "flock", flock)
    assert not files.lock(tmp_path).closed


# --- Output -----------------------------------------------------------------------------------------------------------
SAY = ("for i in range(2000): files.say(f'{i} \u2264 \ud800' + 'x' * 100)\n"
       "print('more')\nfiles.write_atomic(sys.argv[1], 'done')")


@pytest.mark.parametrize("shell", ["| head -1", "> /dev/full", ">&-", "| cat; sys.stdout.close()"])
def test_a_broken_stdout_stops_nothing_and_leaves_no_message(shell, tmp_path):
    shell, _, first = shell.partition(";")
    code = f"import sys\nfrom data import files\n{first.strip()}\n{SAY}"
    command = f"set -o pipefail; '{sys.executable}' -c \"$CODE\" {tmp_path}/mark {shell}"
    process = subprocess.run(["bash", "-c", command], cwd=ROOT, env=BUFFERED | {"CODE": ascii_code(code)}, text=True,
                             capture_output=True, timeout=60)
    assert (tmp_path / "mark").read_text() == "done"
    assert process.stderr == "" and process.returncode == 0


def ascii_code(code):
    """The same program, in characters that fit into an environment variable."""
    return code.encode("ascii", "backslashreplace").decode()


def test_what_a_terminal_cannot_show_is_replaced():
    process = start("files.say('a \\u2264 b \\ud800')\nfiles.say('c')", PYTHONIOENCODING="ascii")
    assert process.communicate(timeout=60) == ("a ? b ?\nc\n", "") and process.returncode == 0


def test_a_line_leaves_a_pipe_at_once_and_may_go_through_a_bar(capsys):
    process = start("files.say('now')\nos._exit(0)  # what is still in a buffer is lost")
    assert process.communicate(timeout=60)[0] == "now\n"
    files.say("text", write=lambda line: print(f"| {line}"))
    assert capsys.readouterr().out == "| text\n"


@pytest.mark.parametrize("error, line, number", [
    (None, "", 0), (UserError("a\n  b"), "error: a b\n", 2), (KeyboardInterrupt(), "interrupted\n", 130),
    (FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'\n", 2)])
def test_a_program_ends_with_one_line_and_an_exit_code(error, line, number, capsys):
    def program():
        if error:
            raise error
    assert files.exit_code(program) == number
    assert capsys.readouterr().err == line


def test_a_broken_stderr_changes_no_exit_code():
    process = subprocess.run(["bash", "-c", f"'{sys.executable}' -c \"$CODE\" 2>/dev/full"], cwd=ROOT, timeout=60,
                             env=BUFFERED | {"CODE": "import sys\nfrom data import files\n"
                                               "def fail(): raise files.UserError('x')\n"
                                               "sys.exit(files.exit_code(fail))"})
    assert process.returncode == 2
