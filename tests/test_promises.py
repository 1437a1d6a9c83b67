"""What a run promises: nothing is lost, nothing is overwritten, and an error is one line."""
import json
import os
import resource
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import tsallis_rl
from conftest import program, rows, same, weights
from data.files import UserError, open_folder
from tsallis_rl import MAY_CHANGE, Config, parse


@pytest.fixture(scope="module")
def two(small, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("two") / "run"
    assert program([*small, "--steps", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def three(small, tmp_path_factory):
    """The same run without a break, of three steps."""
    out = tmp_path_factory.mktemp("three") / "run"
    assert program([*small, "--steps", "3", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(two, tmp_path):
    """A copy of the run of two steps."""
    return Path(shutil.copytree(two, tmp_path / "run"))


def go_on(run, *more):
    return program(["--resume", str(run), "--steps", "3", *more])


def tree(folder):
    """Every file and what it holds. The lock holds nothing."""
    return {p: p.is_file() and p.read_bytes() for p in Path(folder).rglob("*") if p.name != "lock"}


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
        finally:
            os._exit(99)
    return os.waitpid(child, 0)[1]


def die_at(count):
    """This process is killed at its count-th change of a file. A line is lost by half."""
    left = [count]

    def deadly(owner, name):
        real = getattr(owner, name)

        def call(*args, **settings):
            left[0] -= 1
            if left[0] < 0:
                if name == "append_jsonl":
                    size = os.path.getsize(args[0])
                    real(*args)
                    os.truncate(args[0], (size + os.path.getsize(args[0])) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **settings)
        setattr(owner, name, call)

    for owner, names in ((os, "replace rename mkdir"), (shutil, "rmtree"), (torch, "save"),
                         (tsallis_rl, "append_jsonl")):
        for name in names.split():
            deadly(owner, name)


def test_a_kill_at_any_moment_loses_nothing(run, three, tmp_path):
    for count in range(99):
        copy = shutil.copytree(run, tmp_path / str(count))
        status = fork(lambda: die_at(count), ["--resume", str(copy), "--steps", "3"])
        assert status in (0, signal.SIGKILL)
        assert go_on(copy) == 0 and same(copy, three), count
        assert not list(copy.glob("*.new"))
        if status == 0:  # there was nothing left to be killed at
            break
    assert count > 10


def test_what_a_kill_left_is_passed_over(run, three):
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 3, "lo')
    (run / "last.new").mkdir()
    (run / "last.new" / "junk").write_text("junk")
    shutil.copytree(run / "last", run / "last.old")
    assert go_on(run) == 0 and same(run, three)
    assert not (run / "last" / "junk").exists() and not (run / "last.new").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_saves_and_prints_nothing(name, small, three, tmp_path,
                                                             monkeypatch, capsys):
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
    assert signal.getsignal(number) is handler  # put back
    assert go_on(out) == 0
    assert all(torch.equal(w, weights(three)[k]) for k, w in weights(out).items())


def test_under_nohup_a_hang_up_stays_ignored(small, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    real = tsallis_rl.train_step
    monkeypatch.setattr(tsallis_rl, "train_step", lambda run, step: signal.raise_signal(
        signal.SIGHUP) or real(run, step))
    assert program([*small, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert len(rows(tmp_path / "run")) == 3 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_folder_belongs_to_one_process(run, capsys):
    before = tree(run)
    with open_folder(run, new=False):
        one_line(capsys, go_on(run), "another process")
    assert tree(run) == before


@pytest.mark.parametrize("place", ["run", "run/last", "file", "file/run", "folder"])
def test_no_new_run_goes_where_something_is(place, small, run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    capsys.readouterr()
    one_line(capsys, program([*small, "--steps", "1", "--out", str(tmp_path / place)]))
    assert tree(tmp_path) == before


def test_files_of_others_in_the_folder_stay(run):
    names = ("metrics.jsonl.tmp", "config.json.tmp", "answers.jsonl", "last.txt")
    for name in names:
        (run / name).write_text('{"id": "mine"}\n')
    assert go_on(run) == 0
    assert {(run / name).read_text() for name in names} == {'{"id": "mine"}\n'}


def test_what_is_not_finite_is_never_saved(run, monkeypatch, capsys):
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


@pytest.mark.parametrize("method", ["paft", "grpo"])
def test_a_step_that_is_not_finite_changes_no_weight(method, small, tmp_path, monkeypatch):
    real, out = tsallis_rl.token_log_probs, tmp_path / "run"
    monkeypatch.setattr(tsallis_rl, "token_log_probs", lambda *x: real(*x) * float("nan"))
    monkeypatch.setattr(tsallis_rl, "exact_match", lambda *_, n=iter(range(999)): next(n) % 2 == 0)
    program([*small, "--method", method, "--steps", "1", "--out", str(out)])
    assert all(torch.equal(w, weights(out, "best")[k]) for k, w in weights(out).items())


def test_a_full_disk_is_one_line_and_the_checkpoint_stays(run, three, capfd):
    before = tree(run / "last")
    status = fork(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)),
                  ["--resume", str(run), "--steps", "3"])
    one_line(capfd, os.waitstatus_to_exitcode(status), "last")
    assert tree(run / "last") == before
    assert go_on(run) == 0 and same(run, three)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_records_are_refused_on_resume(split, small, tmp_path, capsys):
    for name in ("train", "validation", "test"):
        lines = [json.dumps({"id": f"{name}{i}", "warm_prompt": f"{i}?", "cold_prompt": f"{i}?",
                             "answer": str(i)}) for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    out = tmp_path / "run"
    assert program([*small, "--data", str(tmp_path), "--steps", "2", "--out", str(out)]) == 0
    file = tmp_path / f"{split}.jsonl"
    file.write_text(file.read_text().replace('"answer": "2"', '"answer": "3"'))
    before = tree(out)
    capsys.readouterr()
    one_line(capsys, go_on(out), "records")
    assert tree(out) == before


def test_a_resumed_run_keeps_its_settings(run):
    values = {"method": "garl", "start": "cold", "optimizer": "sgd", "dtype": "auto", "data": "m",
              "model": "m", "rollout": "auto", "out": "m", "gpu_share": "0.5"}
    resume = ["--resume", str(run)]
    for f in fields(Config):
        value = values.get(f.name, "0.123" if "float" in str(f.type) else "77")
        argv = [*resume, "--" + f.name.replace("_", "-"), value]
        if f.name not in MAY_CHANGE:
            with pytest.raises(UserError, match=f.name):
                parse(argv)
        elif f.name != "resume":
            parse(argv)
    assert MAY_CHANGE == {"resume", "out", "steps", "rollout", "token_budget", "gpu_share"}


def test_paths_hold_in_every_folder(small, run, three, tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("mine.jsonl", "~/mine.jsonl"):
        config = parse(["--data", path, "--model", path])
        assert config.data == config.model == str(tmp_path / "mine.jsonl")
        assert parse(["--data", f"finqa:{path}"]).data == f"finqa:{tmp_path}/mine.jsonl"
    assert go_on("~/run") == 0 and same(run, three)


@pytest.mark.parametrize("argv", [
    "--q 2", "--q nan", "--M 1", "--M x", "--steps -1", "--lr -1", "--batch-size 0",
    "--method PAFT", "--nonsense 1", "surplus", "--q", "--data nowhere", "--data finqa:nowhere",
    "--model nowhere",
    "--model .", "--resume nowhere", "--resume .", "--out /dev/null/run", "--eval-samples 0"])
def test_bad_input_is_one_line_and_code_2(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = program(["--steps", "1", "--limit", "4", "--rollout", "hf", *argv.split()])
    except SystemExit as end:  # argparse's
        code = end.code
    one_line(capsys, code)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("name, text", [
    ("last/model.safetensors", "x"), ("last/config.json", "{"), ("config.json", "[1]"),
    ("config.json", "{}"), ("config.json", '{"settings": {"M": "4"}}')])
def test_a_broken_file_of_a_run_is_one_line(name, text, run, capsys):
    (run / name).write_text(text)
    before = tree(run)
    one_line(capsys, go_on(run))
    assert tree(run) == before


def test_a_short_run_validates_its_end_and_names_its_best_step(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert program([*small, "--eval-every", "40", "--steps", "2", "--out", str(out)]) == 0
    assert "val_p@1" in rows(out)[2] and "val_p@1" not in rows(out)[1]
    best = torch.load(out / "best" / "trainer.pt", weights_only=True)["step"]
    assert f"best at step {best}:" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_folder_that_is_renamed_is_said(run, tmp_path, monkeypatch, capsys):
    real = tsallis_rl.train_step
    monkeypatch.setattr(tsallis_rl, "train_step", lambda state, step: run.rename(
        tmp_path / "moved") and real(state, step))
    one_line(capsys, go_on(run), str(run))


def test_above_eps_is_null_where_a_step_was_not_finite(run, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    before = weights(run)
    assert go_on(run) == 0 and rows(run)[-1]["above_eps"] is None
    assert all(torch.equal(w, weights(run)[k]) for k, w in before.items())
