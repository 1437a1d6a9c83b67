"""What kills, second processes, full disks, broken models and bad input may do to a run: nothing is lost, nothing is silent.

Every bad input goes through the real program: exit code 2, one line, no traceback, and every file as it was.
"""
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data.files
import tsallis_rl
from test_training import rows, same, weights
from tsallis_rl import main

from transformers import (BertConfig, BertLMHeadModel, CohereConfig, CohereForCausalLM,
                          Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, MambaConfig, MambaForCausalLM,
                          PhiConfig, PhiForCausalLM, T5Config, T5ForConditionalGeneration)

PROGRAM = str(Path(tsallis_rl.__file__))
SHAPE = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
             max_position_embeddings=512, initializer_range=0.5)


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """A run of two steps, to be copied."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main([*small, "--steps", "2", "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run of two steps; its config.json names the folder it was made in, as after a move."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def tree(folder):
    """Every file below a folder and its content; the lock has none and comes with the first try."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
            for p in Path(folder).rglob("*") if p.name != "lock"}


def refused(capsys, arguments, words="", code=2):
    capsys.readouterr()
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: " if code == 2 else "interrupted") and error.count("\n") == 1, error
    assert "Traceback" not in error and len(error) < 600 and words in error, error


# --- 1: two processes -------------------------------------------------------------------------------------------------
def test_a_folder_belongs_to_one_process_and_a_second_one_stops_with_one_line(small, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [*small, "--steps", "100000", "--eval-every", "100000", "--out", str(run)]
    process = subprocess.Popen([sys.executable, PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step    1"):
            break
    process.send_signal(signal.SIGSTOP)  # so that the files cannot change below
    before = tree(run)
    refused(capsys, ["--resume", str(run)], "another process is running in")
    refused(capsys, arguments, "")
    assert tree(run) == before
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120) and process.returncode == 0
    done = rows(run)[-1]["step"]
    assert main(["--resume", str(run), "--steps", str(done + 1)]) == 0, "the lock ends with the process"
    assert [row["step"] for row in rows(run)] == list(range(done + 2))


def test_two_runs_without_out_get_two_folders(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main([*small, "--steps", "1"]) == 0
    assert sorted(os.listdir("runs")) == ["ledger-warm-paft-q0.75-seed0", "ledger-warm-paft-q0.75-seed0-2"]
    same(*(Path("runs", name) for name in os.listdir("runs")))


# --- 2: steps that are not finite ------------------------------------------------------------------------------------
def broken_at(monkeypatch, *steps):
    """Log-probabilities that are NaN in these steps; returns the weights before each step."""
    real, step_of, before, now = tsallis_rl.chunked_log_probs, tsallis_rl.train_step, {}, [0]

    def train_step(run, step):
        now[0], before[step] = step, {k: v.clone() for k, v in run.model.state_dict().items()}
        return step_of(run, step)

    monkeypatch.setattr(tsallis_rl, "train_step", train_step)
    monkeypatch.setattr(tsallis_rl, "chunked_log_probs", lambda *args: real(*args) * (float("nan") if now[0] in steps else 1))
    return before


@pytest.mark.parametrize("method", ("garl", "paft", "grpo"))
def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(method, small, tmp_path, monkeypatch):
    before, run = broken_at(monkeypatch, 2), tmp_path / "run"
    reward = lambda *_: next(flips)
    flips = iter([True, False] * 1000)
    monkeypatch.setattr(tsallis_rl, "exact_match", reward)  # GRPO: rewards that differ, so that there is a gradient
    if method == "grpo":  # ... also where no answer ended
        real = tsallis_rl.HFRollouts.sample
        monkeypatch.setattr(tsallis_rl.HFRollouts, "sample", lambda self, *a: [
            ([*ids[:-1], self.fmt.end], log_p) if not a[4] else (ids, log_p) for ids, log_p in real(self, *a)])
    assert main([*small, "--method", method, "--gap-bound", "99", "--steps", "4", "--out", str(run)]) == 0
    assert all(torch.equal(before[2][k], before[3][k]) for k in before[2])
    assert any(not torch.equal(before[3][k], before[4][k]) for k in before[3])
    log = rows(run)
    assert [row["step"] for row in log] == [0, 1, 2, 3, 4] and [row["skipped_in_a_row"] for row in log[1:]] == [0, 1, 0, 0]
    assert log[2]["grad_norm"] is None and ["val_p@1" in row for row in log] == [True, True, False, True, True]


def test_what_is_being_skipped_is_never_saved(small, tmp_path, monkeypatch, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main([*small, "--steps", "4", "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        before = broken_at(patch, 2, 3)
        assert main([*small, "--steps", "3", "--out", str(run)]) == 0
    assert "ended while steps were not finite; the last good checkpoint is" in capsys.readouterr().out
    assert all(torch.equal(before[2][k], w) for k, w in weights(run).items()), "the last good one is that of step 1"
    assert main(["--resume", str(run), "--steps", "4"]) == 0
    same(whole, run)


# --- 3: signals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ("SIGINT", "SIGTERM", "SIGHUP"))
def test_a_signal_finishes_the_step_and_saves_and_a_second_one_stops_at_once(name, small, tmp_path, monkeypatch, capsys):
    number, real = getattr(signal, name), tsallis_rl.train_step
    small = [*small, "--eval-every", "100"]

    def stopped(count):
        def train_step(run, step):
            for _ in range(count * (step == 2)):
                signal.raise_signal(number)
            return real(run, step)
        return train_step

    monkeypatch.setattr(tsallis_rl, "train_step", stopped(1))
    assert main([*small, "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    assert f"stopped after step 2; continue with --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2]
    monkeypatch.setattr(tsallis_rl, "train_step", stopped(2))
    refused(capsys, [*small, "--steps", "3", "--out", str(tmp_path / "other")], code=130)
    monkeypatch.undo()
    assert main([*small, "--steps", "3", "--out", str(tmp_path / "whole")]) == 0
    for run in ("run", "other"):
        assert main(["--resume", str(tmp_path / run), "--steps", "3"]) == 0
        same(tmp_path / "whole", tmp_path / run)


# --- 4: a kill or a full disk while a run is taken up again --------------------------------------------------------------
class Killed(BaseException):
    """A kill: nothing in the program catches it."""


@pytest.fixture(scope="module")
def two_and_three(finished, tmp_path_factory):
    """The run of two steps, resumed to three without a fault."""
    whole = Path(shutil.copytree(finished, tmp_path_factory.mktemp("whole") / "run"))
    assert main(["--resume", str(whole), "--steps", "3"]) == 0
    return whole


@pytest.mark.parametrize("at", range(3))  # metrics.jsonl, samples.jsonl, config.json
@pytest.mark.parametrize("fault", ("kill before", "kill after", "full disk", "kill in the text"))
def test_a_kill_or_a_full_disk_while_resuming_loses_nothing(fault, at, run, two_and_three, monkeypatch, capsys):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # what the first kill left
    before, calls = tree(run), []
    replace, write_text = os.replace, Path.write_text

    def faulty_replace(source, target):
        calls.append(Path(target).name)
        if len(calls) - 1 != at:
            return replace(source, target)
        if fault == "full disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        if fault == "kill after":
            replace(source, target)
        raise Killed

    def faulty_write(path, text, **settings):
        if not path.name.endswith(".tmp"):
            return write_text(path, text, **settings)
        calls.append(path.name)
        if len(calls) - 1 != at:
            return write_text(path, text, **settings)
        write_text(path, text[:len(text) // 2], **settings)
        raise Killed

    with monkeypatch.context() as patch:
        if fault == "kill in the text":
            patch.setattr(Path, "write_text", faulty_write)
        else:
            patch.setattr(data.files.os, "replace", faulty_replace)
        if fault == "full disk":
            refused(capsys, ["--resume", str(run), "--steps", "3"], "No space left")
        else:
            with pytest.raises(Killed):
                main(["--resume", str(run), "--steps", "3"])
    assert len(calls) == at + 1
    after = tree(run)
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {"metrics.jsonl", "samples.jsonl", "config.json"}, "checkpoints are not touched"
    assert rows(run, "samples.jsonl") == rows(two_and_three, "samples.jsonl")[:len(rows(run, "samples.jsonl"))]
    json.loads((run / "config.json").read_text())
    assert main(["--resume", str(run), "--steps", "3"]) == 0
    same(run, two_and_three)
    assert not list(run.glob("*.tmp"))


def test_a_checkpoint_is_whole_at_every_moment(small, finished, two_and_three, run, monkeypatch):
    """A kill at every rename of step 3's checkpoints: last and best, each in two renames and two removals."""
    rename, rmtree = Path.rename, shutil.rmtree
    for at in range(8):
        copy = Path(shutil.copytree(run, run.parent / f"copy{at}"))
        calls = []

        def deadly(function):
            def call(*args, **settings):
                if len(calls) == at:
                    raise Killed
                calls.append(args)
                return function(*args, **settings)
            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", deadly(rename))
            patch.setattr(data.files.shutil, "rmtree", deadly(rmtree))
            try:
                main(["--resume", str(copy), "--steps", "3"])
            except Killed:
                pass
        assert tsallis_rl.checkpoint_of(copy)
        assert main(["--resume", str(copy), "--steps", "3"]) == 0
        same(copy, two_and_three)


# --- 5: a run that trains on nothing -------------------------------------------------------------------------------------
def write_records(path, answers, prompt="What is 2+3?"):
    path.write_text("".join(json.dumps({"id": str(i), "warm_prompt": f"{prompt} {i}", "cold_prompt": f"{prompt} {i}", "answer": a}) + "\n"
                            for i, a in enumerate(answers)))


def test_five_steps_without_a_gradient_are_one_line_and_golds_no_sample_can_match_are_counted(small, tmp_path, capsys):
    write_records(tmp_path / "mine.jsonl", ["2718281828" * 30] * 30)
    for method, lines in (("paft", 1), ("garl", 1), ("grpo", 0)):
        assert main([*small, "--data", str(tmp_path / "mine.jsonl"), "--limit", "20", "--eval-limit", "2", "--method", method,
                     "--eval-every", "100", "--steps", "8", "--out", str(tmp_path / method)]) == 0
        out = capsys.readouterr().out
        assert out.count("five steps without a gradient") == lines
        if lines:
            assert all(row["grad_norm"] == 0 for row in rows(tmp_path / method)[1:])
            [line] = [line for line in out.splitlines() if "five steps" in line]
            assert "--q" in line and "--lr" in line
        assert len([line for line in out.splitlines() if "; 20 " in line and "--answer-budget" in line]) == 1


def test_a_run_with_a_gradient_says_nothing_of_the_kind(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    assert main(["--resume", str(run), "--steps", "8"]) == 0
    assert "without a gradient" not in capsys.readouterr().out


# --- 7: before the first checkpoint --------------------------------------------------------------------------------------
@pytest.mark.parametrize("moment", ("load_model", "sample_answers", "save", "append_jsonl"))
@pytest.mark.parametrize("how", (KeyboardInterrupt, Killed))
def test_a_run_that_died_before_its_first_checkpoint_may_be_started_over(moment, how, small, tmp_path, monkeypatch, capsys):
    run, arguments = tmp_path / "run", [*small, "--steps", "1", "--out", str(tmp_path / "run")]

    def die(*_, **__):
        raise how

    with monkeypatch.context() as patch:
        patch.setattr(tsallis_rl, moment, die)
        if how is Killed:
            with pytest.raises(Killed):
                main(arguments)
        else:
            refused(capsys, arguments, code=130)
            assert "--resume" not in capsys.readouterr().out
    if run.exists():
        refused(capsys, ["--resume", str(run)], "no run with a checkpoint")
    assert main(arguments) == 0
    assert [row["step"] for row in rows(run)] == [0, 1] and len(rows(run, "samples.jsonl")) == 4


def test_ctrl_c_while_torch_is_imported_is_no_traceback():
    program = subprocess.Popen([sys.executable, tsallis_rl.__file__, "--steps", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    maps = Path(f"/proc/{program.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert program.poll() is None
        time.sleep(0.005)
    program.send_signal(signal.SIGINT)
    assert program.communicate(timeout=60) == (b"", None) and program.returncode == -signal.SIGINT


def test_ctrl_c_while_loading_leaves_nothing(small, tmp_path, monkeypatch, capsys):
    for moment in ("load_model", "load", "make_engine"):
        with monkeypatch.context() as patch:
            patch.setattr(tsallis_rl, moment, lambda *_: signal.raise_signal(signal.SIGINT))
            refused(capsys, [*small, "--steps", "1", "--out", str(tmp_path / "run")], code=130)
        assert not (tmp_path / "run").exists()


# --- 8: resuming exactly -------------------------------------------------------------------------------------------------
def test_a_run_whose_data_changed_is_not_resumed(small, tmp_path, capsys):
    file, run = tmp_path / "mine.jsonl", tmp_path / "run"
    write_records(file, ["5"] * 30)
    arguments = [*small, "--data", str(file), "--steps", "1", "--out", str(run)]
    assert main(arguments) == 0
    text, before = file.read_text(), tree(run)
    changes = {"an answer": text.replace('"answer": "5"', '"answer": "6"'), "a prompt": text.replace("2+3", "2+4"),
               "an id": text.replace('"id": "3"', '"id": "33"')}
    for change, new in changes.items():
        file.write_text(new)
        refused(capsys, ["--resume", str(run), "--steps", "2"], f"--resume {run}: the records")
        assert tree(run) == before, change
    file.write_text(text)
    assert main(["--resume", str(run), "--steps", "2"]) == 0


# --- 10: output ----------------------------------------------------------------------------------------------------------
def test_a_reader_that_leaves_does_not_stop_a_run(small, tmp_path):
    shell = f"set -o pipefail; {sys.executable} {PROGRAM} {' '.join(small)} --steps 3 --out {tmp_path}/run | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3] and (tmp_path / "run" / "last" / "trainer.pt").is_file()


@pytest.mark.parametrize("stream", ("full", "closed pipe", "closed", "ascii", "none"))
def test_a_broken_stdout_does_not_stop_a_run(stream, small, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    if stream == "full":
        out = open("/dev/full", "w")
    elif stream == "closed pipe":
        out = open(writer, "w")
    else:
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    if stream == "closed":
        out.close()
    write_records(tmp_path / "mine.jsonl", ["5"] * 30, prompt="≤ ½ 漢")  # shown in the line "a sequence:"
    monkeypatch.setattr(sys, "stdout", None if stream == "none" else out)
    assert main([*small, "--data", str(tmp_path / "mine.jsonl"), "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2]
    if stream == "ascii":
        text = out.buffer.getvalue().decode()
        assert "step    2 |" in text and "done: best" in text


# --- Bad input: 9, 13, 14 ------------------------------------------------------------------------------------------------
OPTIONS = [(f"--{name} {value}", words) for name, values, words in (
    ("q", ("1.5", "-0.1", "nan", "inf"), "--q must"), ("q", ("x", "0,5", ""), "--q: invalid float value"), ("q", ("-inf",), "--q"),
    ("M", ("1", "0", "-3", "1000000000000"), "--M must be at least 2"), ("M", ("2.5", "1e12", "two"), "--M: invalid int value"),
    ("K", ("0", "-1", "10000000"), "--K must be at least 1"), ("method", ("ppo", "GARL", ""), "--method: invalid choice"),
    ("start", ("hot",), "--start: invalid choice"), ("rollout", ("sglang",), "--rollout: invalid choice"),
    ("optimizer", ("muon",), "--optimizer: invalid choice"), ("dtype", ("float16", "int8"), "--dtype: invalid choice"),
    ("steps", ("-5", "99999999999999999999"), "--steps must be at least 0"), ("eps", ("0", "-1", "nan", "inf"), "--eps must be positive"),
    ("q-end", ("1.5", "-0.1", "nan"), "--q-end must"), ("q-end", ("half",), "--q-end: invalid float"), ("q-steps", ("0", "-1"), "--q-steps must be at least 1"),
    ("steps", ("ten",), "--steps: invalid int"),
    ("batch-size", ("0", "-1", "2000000"), "--batch-size must be"), ("lr", ("0", "-1", "nan", "inf"), "--lr must be positive"),
    ("clip", ("0", "-1", "nan"), "--clip must be"), ("warmup", ("-1",), "--warmup must be at least 0"),
    ("think-budget", ("0", "-1"), "--think-budget must be at least 1"), ("think-budget", ("100000",), "every prompt is longer"),
    ("answer-budget", ("0",), "--answer-budget must be"), ("answer-budget", ("5000",), "every prompt is longer"),
    ("prompt-limit", ("1", "0"), "--prompt-limit must be at least 2"), ("prompt-limit", ("3",), "every prompt is longer than 3 tokens"),
    ("token-budget", ("0", "-1"), "--token-budget must be"), ("limit", ("0", "-2"), "--limit must be"),
    ("eval-every", ("0",), "--eval-every must be"), ("eval-samples", ("0", "9999999"), "--eval-samples must be"),
    ("eval-limit", ("0",), "--eval-limit must be"), ("seed", ("-1", "1.5"), "--seed"), ("gpu-share", ("0", "nan"), "--gpu-share must be"),
    ("gap-bound", ("0", "-1", "nan"), "--gap-bound must be"), ("temperature", ("2",), "--temperature"), ("shard", ("fsdp",), "--shard"),
    ("tensor-parallel", ("2",), "--tensor-parallel"), ("data", ("gsm8k", "", "finqa:nowhere", "nowhere.jsonl", "x" * 300, "/proc/self/mem"), ""),
    ("model", ("no/such/folder", "", "/dev/null", "~nosuchuser/m", "a b", "../..", "https://example.org/m"), "--model"), ("model", ("x" * 300,), "File name too long"),
    ("out", ("x" * 300, "/proc/nothing/run", "/sys/run", "/dev/null/run", "~nosuchuser/run", "/proc/self/run"), "cannot be"),
    ("resume", ("nothing", "", "/proc/self", "/dev/null", "~nosuchuser/run", "x" * 300), ""),
) for value in values]


@pytest.mark.parametrize("case", range(len(OPTIONS)), ids=[arguments[:40] for arguments, _ in OPTIONS])
def test_a_bad_option_is_one_line_and_nothing_is_written(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, words = OPTIONS[case]
    name, _, value = arguments.partition(" ")
    refused(capsys, ["--rollout", "hf", "--steps", "1", name, value], words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", (["--q"], ["--q", "0.5", "0.7"], ["surplus"], ["--resume"], ["--nonsense"], ["--out", "a\0b"],
                                       ["--data", "a\0b"], ["--model", "a\0b"], ["--resume", "a\0b"]))
def test_a_command_line_that_is_none_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variables", ({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "two"},
                                       {"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
                                       {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
                                       {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}))
def test_half_of_torchrun_s_variables_are_one_line(variables, small, tmp_path, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(capsys, [*small, "--steps", "1", "--out", str(tmp_path / "run")], "torchrun")
    assert list(tmp_path.iterdir()) == []


def places(tmp_path, run):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    return {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "a folder of something else": tmp_path / "foreign",
            "a run": run, "a link to itself": tmp_path / "link", "a checkpoint": run / "last"}


@pytest.mark.parametrize("option", ("--out", "--resume"))
@pytest.mark.parametrize("place", ("a file", "below a file", "a folder of something else", "a run", "a link to itself", "a checkpoint"))
def test_no_run_goes_where_something_else_is(place, option, small, run, tmp_path, capsys):
    path = places(tmp_path, run)[place]
    if (option, place) == ("--resume", "a run"):
        return
    before = tree(tmp_path)
    refused(capsys, [*(small if option == "--out" else []), "--steps", "3", option, str(path)])
    assert tree(tmp_path) == before


# Each breaks a folder with a model; what the line must say.
def cut(name, share=0.5):
    def deed(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:int(share * len(content))])
    return deed


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


def changed(name, **values):
    def deed(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in (content | values).items() if v is not None}))
    return deed


def tensors(change):
    def deed(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return deed


def another(kind, settings):
    def deed(folder):
        torch.manual_seed(0)
        (folder / "model.safetensors").unlink()
        kind(settings).save_pretrained(folder)
    return deed


V = 512  # at least as many tokens as the lab model's tokenizer has
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5000000\n"
MODELS = {
    "weights cut off": (cut("model.safetensors"), "holds no whole model"),
    "weights empty": (cut("model.safetensors", 0), "holds no whole model"),
    "weights a pointer": (put("model.safetensors", POINTER), "holds no whole model"),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), "holds no whole model"),
    "tokenizer cut off": (cut("tokenizer.json"), "holds no whole model"),
    "tokenizer empty": (cut("tokenizer.json", 0), "holds no whole model"),
    "tokenizer another's": (put("tokenizer.json", '{"a": 1}'), "holds no whole model"),
    "tokenizer missing": (lambda folder: [(folder / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], ""),
    "config cut off": (cut("config.json"), "holds no whole model"),
    "config empty": (cut("config.json", 0), "holds no whole model"),
    "config missing": (lambda folder: (folder / "config.json").unlink(), "holds no whole model"),
    "config a list": (put("config.json", "[]"), "--model"),
    "config of nothing": (put("config.json", "{}"), "--model"),
    "config of an unknown kind": (changed("config.json", model_type="nosuchkind"), "--model"),
    "other shapes": (changed("config.json", hidden_size=48), "--model"),
    "more layers than weights": (changed("config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2), "lack"),
    "a tensor missing": (tensors(lambda state: state.pop("model.norm.weight")), "lack model.norm.weight"),
    "a weight not a number": (tensors(lambda state: state["model.norm.weight"].fill_(float("nan"))), "not finite"),
    "an infinite weight": (tensors(lambda state: state["lm_head.weight"].view(-1)[3].fill_(float("inf"))), "not finite"),
    "template broken": (put("chat_template.jinja", "{% for m in %}"), "chat template fails"),
    "template raises": (put("chat_template.jinja", "{{ raise_exception('no') }}"), "chat template fails"),
    "template drops the user": (put("chat_template.jinja", "<|im_start|>assistant\n"), "drops the user's text"),
    "template keeps system only": (put("chat_template.jinja", "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}x"),
                                   "drops the user's text"),
    "no end token": (changed("tokenizer_config.json", eos_token=None), "end token"),
    "end token outside the vocabulary": (changed("tokenizer_config.json", eos_token="<|new|>"), "beyond the model's embeddings"),
    "few positions": (changed("config.json", max_position_embeddings=20), "every prompt is longer"),
    "an encoder": (another(BertLMHeadModel, BertConfig(vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                                       num_attention_heads=2)), "--model"),
    "an encoder and decoder": (another(T5ForConditionalGeneration, T5Config(vocab_size=V, d_model=32, d_kv=16, d_ff=32, num_layers=1,
                                                                           num_heads=2)), "--model"),
    "soft-capped logits": (another(Gemma2ForCausalLM, Gemma2Config(vocab_size=V, head_dim=16, final_logit_softcapping=1.0, sliding_window=None,
                                                                  layer_types=["full_attention"], **SHAPE)), "plain matrix"),
    "sliding windows": (another(Gemma2ForCausalLM, Gemma2Config(vocab_size=V, head_dim=16, sliding_window=8, **SHAPE)), "sliding-window"),
    "scaled logits (Cohere)": (another(CohereForCausalLM, CohereConfig(vocab_size=V, logit_scale=0.1, **SHAPE)), "plain matrix"),
    "scaled logits (Granite)": (another(GraniteForCausalLM, GraniteConfig(vocab_size=V, logits_scaling=8.0, **SHAPE)), "plain matrix"),
    "an output bias": (another(lambda c: biased(PhiForCausalLM(c)), PhiConfig(vocab_size=V, **SHAPE)), "plain matrix"),
    "no keys and values": (another(MambaForCausalLM, MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, state_size=4)), "--model"),
}


def biased(model):
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_trained_as_it_is_is_one_line(case, tiny, small, tmp_path, capsys):
    deed, words = MODELS[case]
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    deed(folder)
    before = tree(tmp_path)
    arguments = [str(folder) if x == str(tiny) else x for x in small]
    refused(capsys, [*arguments, "--steps", "1", "--out", str(tmp_path / "run")], words)
    assert tree(tmp_path) == before


def state(change):
    def deed(run):
        content = torch.load(run / "last" / "trainer.pt", weights_only=True)
        torch.save(change(content), run / "last" / "trainer.pt")
    return deed


def settings(**changes):
    def deed(run):
        content = json.loads((run / "config.json").read_text())
        content["settings"] = {k: v for k, v in (content["settings"] | changes).items() if v != "absent"}
        (run / "config.json").write_text(json.dumps(content))
    return deed


def line(text, at=1):
    def deed(run):
        lines = (run / "metrics.jsonl").read_text().splitlines(True)
        (run / "metrics.jsonl").write_text("".join([*lines[:at], text + "\n", *lines[at:]]))
    return deed


RUNS = {
    "trainer.pt cut off": (cut("last/trainer.pt"), "trainer.pt is no state"),
    "trainer.pt empty": (cut("last/trainer.pt", 0), "trainer.pt is no state"),
    "trainer.pt text": (put("last/trainer.pt", "hello"), "trainer.pt is no state"),
    "trainer.pt a number": (state(lambda x: 3), "trainer.pt is no state"),
    "trainer.pt without a step": (state(lambda x: {k: v for k, v in x.items() if k != "step"}), "trainer.pt is no state"),
    "trainer.pt without an optimiser": (state(lambda x: {k: v for k, v in x.items() if k != "optimizer"}), "trainer.pt is no state"),
    "trainer.pt of another optimiser": (state(lambda x: x | {"optimizer": {"state": {}, "param_groups": []}}), "trainer.pt is no state"),
    "trainer.pt missing": (lambda run: (run / "last" / "trainer.pt").unlink(), "no run with a checkpoint"),
    "last missing": (lambda run: shutil.rmtree(run / "last"), "no run with a checkpoint"),
    "weights cut off": (cut("last/model.safetensors"), "holds no whole model"),
    "weights missing": (lambda run: (run / "last" / "model.safetensors").unlink(), "holds no whole model"),
    "config.json cut off": (cut("config.json"), "config.json"), "config.json empty": (cut("config.json", 0), "config.json: the file is empty"),
    "config.json a list": (put("config.json", "[1]"), "config.json: not a JSON object"), "config.json of nothing": (put("config.json", "{}"), "config.json"),
    "config.json missing": (lambda run: (run / "config.json").unlink(), "config.json"),
    "config.json binary": (lambda run: (run / "config.json").write_bytes(b"\xff\xfe\0"), "config.json: not UTF-8"),
    "a setting missing": (settings(clip="absent"), "config.json"), "a setting too many": (settings(shard="none"), "config.json"),
    "a setting of another kind": (settings(M="four"), ""), "a setting that is null": (settings(M=None), ""),
    "a setting out of range": (settings(q=2.0), "--q must"), "a list for a setting": (settings(lr=[1]), ""),
    "the records of another run": (changed("config.json", data="0" * 64), "the records or the tokenizer"),
    "a log with a broken line": (line("{oops}"), "metrics.jsonl, line 2"), "a log with a number": (line("3"), "metrics.jsonl, line 2"),
    "a log with a row without a step": (line('{"loss": 1}'), "metrics.jsonl, row 2"),
    "a log that is a folder": (lambda run: [(run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()], "metrics.jsonl"),
    "a model that is gone": (lambda run: [p.unlink() for p in (run / "last").glob("*.json")], "--model"),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_with_a_broken_file_is_not_resumed_by_guess(case, run, tmp_path, capsys):
    deed, words = RUNS[case]
    deed(run)
    before = tree(tmp_path)
    refused(capsys, ["--resume", str(run), "--steps", "3"], words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("arguments", (["--steps", "1"], ["--q", "0.5"], ["--limit", "7"], ["--M", "3"], ["--seed", "1"], ["--model", "other"],
                                       ["--data", "finqa"], ["--dtype", "bfloat16"], ["--method", "garl"], ["--out", "other"], ["--lr", "1"]))
def test_what_would_make_it_another_run_is_refused_on_resume(arguments, run, capsys):
    before = tree(run)
    refused(capsys, ["--resume", str(run), "--steps", "3", *arguments], arguments[0])
    assert tree(run) == before


@pytest.mark.parametrize("tail", ("", "\0" * 100, "\0" * 50 + "\n", "\n", "  \n\n", '{"step": 3', '{"step": 3}', "\n\0\0"))
def test_what_a_kill_leaves_at_the_end_of_a_log_is_passed_over(tail, run, two_and_three):
    for log in ("metrics.jsonl", "samples.jsonl"):
        with (run / log).open("a") as file:
            file.write(tail)
    assert main(["--resume", str(run), "--steps", "3"]) == 0
    same(run, two_and_three)


def test_a_tokenizer_that_makes_nothing_of_a_prompt_is_said_to(tiny, small, tmp_path, capsys):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[40:] }}{% endfor %}")
    write_records(tmp_path / "mine.jsonl", ["5"] * 30, prompt="")
    arguments = [str(folder) if x == str(tiny) else x for x in small]
    refused(capsys, [*arguments, "--data", str(tmp_path / "mine.jsonl"), "--steps", "1", "--out", str(tmp_path / "run")])
    assert "longer" not in capsys.readouterr().err


def test_the_number_of_bad_inputs_is_large():
    assert len(OPTIONS) + len(MODELS) + len(RUNS) + 9 + 6 + 11 + 11 >= 100


# --- What is said at the start -------------------------------------------------------------------------------------------
def test_one_line_says_that_a_benchmark_trains_on_a_cpu_and_that_bfloat16_is_slow_here(small, tmp_path, monkeypatch, capsys):
    write_records(tmp_path / "mine.jsonl", ["5"] * 30)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    arguments = [*small, "--steps", "1", "--gap-bound", "9"]
    assert main([*arguments, "--dtype", "bfloat16", "--out", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert out.count("this CPU has no bfloat16 arithmetic") == 1 and "CUDA" not in out
    assert main([*arguments, "--data", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert out.count("no CUDA device was found") == 1 and "bfloat16 arithmetic" not in out
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert main([*arguments, "--dtype", "bfloat16", "--out", str(tmp_path / "c")]) == 0
    assert "bfloat16 arithmetic" not in capsys.readouterr().out
