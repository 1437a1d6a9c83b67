"""What a run promises: nothing is lost, nothing is overwritten, and an error is one line."""
import os
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import tsallis_rl
from conftest import equal, full_disk, program, rows, same, step_of, tree, weights
from data import LEDGER
from data.files import UserError, open_folder
from tsallis_rl import MAY_CHANGE, Config, parse


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run of three steps, and beside it the run of two steps."""
    folder = tmp_path_factory.mktemp("whole")
    for steps in "23":
        assert program([*small, "--steps", steps, "--out", str(folder / steps)]) == 0
    return folder / "3"


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the run of two steps. Its third step is missing."""
    return Path(shutil.copytree(whole.parent / "2", tmp_path / "run"))


def go_on(run):
    return program(["--resume", str(run), "--steps", "3"])


def one_line(capsys, code, words=""):
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and words in error, error


def fork(before, argv) -> int:
    """Train in a copy of this process, after `before()`. Returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            before()
            os._exit(program(argv))
        finally:  # a traceback
            os._exit(99)
    return os.waitpid(child, 0)[1]


# --- Kills, signals, full disks -----------------------------------------------------------
def die_at(count):
    """After count changes of files, this process is killed before the next one."""
    left = iter(range(count))

    def deadly(owner, name):
        real = getattr(owner, name)

        def call(*args, **settings):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **settings)
        setattr(owner, name, call)

    for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
        deadly(os, name)
    deadly(torch, "save")
    deadly(tsallis_rl, "append_jsonl")


@pytest.mark.parametrize("last", ["last", "last.old"])
def test_kill(last, run, whole, tmp_path):
    """A kill at any moment loses nothing: the resumed run is the whole one, bit for bit. So it
    is where an earlier kill has left the last checkpoint under its other name."""
    (run / "last").rename(run / last)
    for count in range(99):
        copy = shutil.copytree(run, tmp_path / str(count))
        status = fork(lambda: die_at(count), ["--resume", str(copy), "--steps", "3"])
        assert status in (0, signal.SIGKILL)
        assert go_on(copy) == 0 and same(copy, whole), count
        assert not list(copy.glob("*.new"))
        if status == 0:  # there was nothing left to be killed at
            break
    assert count > 10


def test_leftovers(run, whole):
    """What a kill left is passed over and removed. Files of others in the folder stay."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 3, "lo')
    (run / "last.new").mkdir()
    (run / "last.new" / "junk").write_text("junk")
    others = ("metrics.jsonl.tmp", "config.json.tmp", "answers.jsonl", "last.txt")
    for name in others:
        (run / name).write_text('{"id": "mine"}\n')
    assert go_on(run) == 0 and same(run, whole)
    assert not (run / "last" / "junk").exists() and not (run / "last.new").exists()
    assert {(run / name).read_text() for name in others} == {'{"id": "mine"}\n'}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal(name, small, whole, tmp_path, monkeypatch, capsys):
    """After a signal the step is finished and saved, nothing is printed, handlers are put back."""
    number, real, printed = getattr(signal, name), tsallis_rl.train_step, []
    handler = signal.getsignal(number)

    def train_step(run, step):
        capsys.readouterr()
        if step == 2:
            signal.raise_signal(number)
        printed.append(capsys.readouterr())
        return real(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(tsallis_rl, "train_step", train_step)
        out = tmp_path / "run"
        assert program([*small, "--steps", "3", "--eval-every", "3", "--out", str(out)]) == 0
    assert [row["step"] for row in rows(out)] == [0, 1, 2] and set(printed) == {("", "")}
    assert signal.getsignal(number) is handler
    assert step_of(out) == 2 and go_on(out) == 0 and equal(weights(out), weights(whole))


def test_nohup():
    """Under nohup a hang-up stays ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with tsallis_rl.stop_signals() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert not stop and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_full_disk(run, whole, capsys):
    """A full disk is one line, and the checkpoint from before stays whole."""
    before = tree(run / "last")
    with full_disk(60000):
        code = go_on(run)
    one_line(capsys, code, "last")
    assert tree(run / "last") == before and not (run / "last.new").exists()
    assert go_on(run) == 0 and same(run, whole)


def test_not_finite(run, monkeypatch, capsys):
    """Weights that are not finite are never saved over a good checkpoint."""
    def train_step(state, step):
        with torch.no_grad():
            next(state.model.parameters()).view(-1)[0] = float("nan")
        state.step = step
        return {}

    before = tree(run / "last")
    monkeypatch.setattr(tsallis_rl, "train_step", train_step)
    monkeypatch.setattr(tsallis_rl, "validate", lambda run: {"val_maj@2": 0})
    one_line(capsys, go_on(run), "finite")
    assert tree(run / "last") == before


# --- Folders ------------------------------------------------------------------------------
def test_one_process(small, run, tmp_path, capsys):
    """A folder belongs to one process, also while it is new and empty."""
    before, new = tree(run), tmp_path / "new"
    with open_folder(run, new=False):
        one_line(capsys, go_on(run), "another process")
    with open_folder(new, new=True):
        one_line(capsys, program([*small, "--out", str(new)]), "another process")
        assert new.is_dir()
    assert tree(run) == before and not new.exists()


@pytest.mark.parametrize("place", ["run", "run/last", "file", "file/run", "folder"])
def test_no_overwriting(place, small, run, tmp_path, capsys):
    """No new run goes where something is."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    one_line(capsys, program([*small, "--steps", "1", "--out", str(tmp_path / place)]))
    assert tree(tmp_path) == before


# --- What the user gives ------------------------------------------------------------------
def test_moved_folder(run, tmp_path, monkeypatch, capsys):
    """A run whose folder is renamed while it trains ends in one line that names the folder."""
    step = tsallis_rl.train_step
    monkeypatch.setattr(tsallis_rl, "train_step", lambda *args: run.rename(
        tmp_path / "moved") and step(*args))
    one_line(capsys, go_on(run), str(run))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_records(split, small, tmp_path, capsys):
    """Other records than those of the start are refused on resume."""
    data = shutil.copytree(LEDGER, tmp_path / "data", ignore=lambda *_: ["model"])
    out = tmp_path / "run"
    assert program([*small, "--data", str(data), "--steps", "2", "--out", str(out)]) == 0
    lines = (data / f"{split}.jsonl").read_text().replace('"answer": "', '"answer": "1', 1)
    (data / f"{split}.jsonl").write_text(lines)
    before = tree(out)
    capsys.readouterr()
    one_line(capsys, go_on(out), "records")
    assert tree(out) == before


def test_other_settings(run):
    """Any setting outside the few that may change is refused on resume."""
    values = {"method": "garl", "start": "cold", "optimizer": "sgd", "dtype": "auto", "data": "m",
              "model": "m", "rollout": "auto", "out": "m", "gpu_share": "0.5"}
    for f in fields(Config):
        value = values.get(f.name, "0.123" if "float" in str(f.type) else "77")
        argv = ["--resume", str(run), "--" + f.name.replace("_", "-"), value]
        if f.name not in MAY_CHANGE:
            with pytest.raises(UserError, match=f.name):
                parse(argv)
        elif f.name != "resume":
            parse(argv)
    assert MAY_CHANGE == {"resume", "out", "steps", "rollout", "token_budget", "gpu_share"}


def test_paths(run, whole, tmp_path, monkeypatch):
    """Paths of data and model hold in every folder, and ~ is the user's home."""
    (tmp_path / "mine.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("mine.jsonl", "~/mine.jsonl"):
        config = parse(["--data", path, "--model", path])
        assert config.data == config.model == str(tmp_path / "mine.jsonl")
        assert parse(["--data", f"finqa:{path}"]).data == f"finqa:{tmp_path}/mine.jsonl"
    assert go_on("~/run") == 0 and same(run, whole)


@pytest.mark.parametrize("argv", [
    "--q 2", "--q nan", "--M 1", "--M x", "--steps -1", "--lr -1", "--batch-size 0",
    "--method PAFT", "--nonsense 1", "surplus", "--q", "--data nowhere", "--data finqa:nowhere",
    "--model nowhere", "--model .", "--resume nowhere", "--resume .", "--out /dev/null/run"])
def test_bad_input(argv, tmp_path, monkeypatch, capsys):
    """A bad option, data set or model is one line and exit code 2, and leaves no file."""
    monkeypatch.chdir(tmp_path)
    argv = ["--steps", "1", "--limit", "4", "--rollout", "hf", *argv.split()]
    one_line(capsys, program(argv))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("name, text", [
    ("last/model.safetensors", "x"), ("last/config.json", "{"), ("config.json", "[1]"),
    ("config.json", "{}"), ("config.json", '{"settings": {"M": "4"}}')])
def test_broken_run(name, text, run, capsys):
    """A broken file of a run is one line, and nothing else changes."""
    (run / name).write_text(text)
    before = tree(run)
    one_line(capsys, go_on(run))
    assert tree(run) == before
