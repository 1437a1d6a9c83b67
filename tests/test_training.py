"""The whole program on the lab model: it resumes exactly, stops safely, refuses bad input, and learns."""
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tsallis_rl
from tsallis_rl import HFRollouts, RunError, batch_of, main, vllm_runs_here

PROGRAM = str(Path(tsallis_rl.__file__))
SMALL = ["--rollout", "hf", "--M", "4", "--batch-size", "2", "--limit", "24", "--eval-every", "2", "--eval-samples", "4"]


def rows(run, name="metrics.jsonl"):
    """The rows of a log, without wall-clock times."""
    lines = [json.loads(line) for line in (Path(run) / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in lines]


def weights(run, name="last"):
    return load_file(Path(run) / name / "model.safetensors")


@pytest.mark.parametrize("method", ("garl", "paft", "grpo"))
@pytest.mark.parametrize("optimizer", ("adamw", "sgd"))
def test_four_steps_are_two_steps_resumed_for_two_bit_for_bit(method, optimizer, tmp_path):
    start = [*SMALL, "--method", method, "--optimizer", optimizer, "--lr", "1e-3"]
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    assert main([*start, "--steps", "4", "--out", whole]) == 0
    assert main([*start, "--steps", "2", "--out", halves]) == 0
    assert main(["--resume", halves, "--steps", "4"]) == 0
    assert rows(whole) == rows(halves) and [row["step"] for row in rows(whole)] == [0, 1, 2, 3, 4]
    assert rows(whole, "samples.jsonl") == rows(halves, "samples.jsonl")
    for name in ("last", "best"):
        one, two = weights(whole, name), weights(halves, name)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_run_is_one_folder_with_checkpoints_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    assert main([*SMALL, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl", "samples.jsonl", "best", "last"}
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["settings"]["think_budget"] and settings["versions"]["torch"] == torch.__version__
    for name in ("best", "last"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)
        assert AutoTokenizer.from_pretrained(tmp_path / "run" / name).eos_token == "<|im_end|>"
        assert sum(p.numel() for p in model.parameters()) > 1e6
    [best, other] = rows(tmp_path / "run", "samples.jsonl")
    assert best["log_w"] >= other["log_w"] and best["rationale"]


def test_every_epoch_is_a_permutation_of_its_own(config):
    settings = config(batch_size=5)
    epochs = [i for step in range(1, 5) for i in batch_of(step, settings, 10)]
    assert sorted(epochs[:10]) == sorted(epochs[10:]) == list(range(10)) and epochs[:10] != epochs[10:]
    assert epochs[:5] != [i for i in batch_of(1, config(batch_size=5, seed=1), 10)]


def test_ctrl_c_finishes_the_step_and_saves_and_the_run_goes_on_from_there(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, PROGRAM, *SMALL, "--steps", "100000", "--eval-every", "100000", "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("step    2"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and f"--resume {run}" in rest
    done = rows(run)[-1]["step"]
    assert done >= 2
    assert main(["--resume", str(run), "--steps", str(done + 1)]) == 0
    assert [row["step"] for row in rows(run)] == list(range(done + 2))


def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(tmp_path):
    run = tmp_path / "run"
    assert main([*SMALL, "--steps", "1", "--out", str(run)]) == 0
    before = weights(run)
    # a limit on the size of a file stands in for the end of the disk: the model's write fails half way
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    done = subprocess.run([sys.executable, PROGRAM, "--resume", str(run), "--steps", "2"], preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: could not save") and done.stderr.count("\n") == 1
    after = weights(run)
    assert all(torch.equal(before[k], after[k]) for k in before) and not (run / "last.new").exists()
    assert main(["--resume", str(run), "--steps", "2"]) == 0


def test_a_checkpoint_cut_off_between_its_two_renames_is_found(tmp_path):
    assert main([*SMALL, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "last").rename(tmp_path / "run" / "last.old")
    assert main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 0


def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(tmp_path, monkeypatch, capsys):
    sample = HFRollouts.generate

    def stale(self, *args):
        groups = sample(self, *args)
        for r in (r for group in groups for r in group):
            r.log_p[:] = [x - 0.01 for x in r.log_p]
        return groups

    run = str(tmp_path / "run")
    monkeypatch.setattr(HFRollouts, "generate", stale)
    assert main([*SMALL, "--steps", "3", "--out", run]) == 2
    assert "sampler and trainer disagree by 0.01 nats" in capsys.readouterr().err
    assert rows(run)[-1]["sampler_gap_mean"] == pytest.approx(0.01, rel=0.01)  # the evidence is logged
    monkeypatch.undo()
    assert main(["--resume", run]) == 0  # from the checkpoint before it
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3]


def test_a_record_that_repeats_within_a_batch_is_another_draw(tmp_path):
    arguments = ["--M", "4", "--batch-size", "2", "--limit", "1", "--eval-samples", "2", "--rollout", "hf", "--eval-every", "1"]
    run = tsallis_rl.start_run(tsallis_rl.parse([*arguments, "--out", str(tmp_path / "run")]))
    one, two = tsallis_rl.sample_groups(run, 1)
    assert one.record == two.record and [r.z for r in one.rollouts] != [r.z for r in two.rollouts]


def test_steps_that_are_not_finite_are_skipped_and_ten_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys):
    real, calls = tsallis_rl.chunked_log_probs, []

    def broken(*args):
        calls.append(1)
        return real(*args) * (1.0 if len(calls) <= 2 * 3 else float("nan"))  # 2 prompts a step; one forward each

    monkeypatch.setattr(tsallis_rl, "chunked_log_probs", broken)
    run = tmp_path / "run"
    assert main([*SMALL, "--method", "garl", "--steps", "50", "--eval-every", "50", "--out", str(run)]) == 2
    assert "ten steps in a row" in capsys.readouterr().err
    assert [row["skipped_in_a_row"] for row in rows(run)[1:]] == [0, 0, 0, *range(1, 11)]
    assert all(w.isfinite().all() for w in weights(run).values())


BAD_INPUT = {
    "q above 1": (["--q", "1.5"], "--q must lie in"),
    "q not a number": (["--q", "nan"], "--q must lie in"),
    "unknown method": (["--method", "ppo"], "ppo"),
    "unknown data": (["--data", "gsm8k"], "gsm8k"),
    "unknown model": (["--model", "no/such/folder"], "--model FOLDER"),
    "one rollout": (["--M", "1"], "--M must be at least 2"),
    "no rationale budget": (["--think-budget", "0"], "--think-budget must be at least 1"),
    "no answer budget": (["--answer-budget", "0"], "--answer-budget must be at least 1"),
    "negative learning rate": (["--lr", "-1"], "--lr must be positive"),
    "prompts too long": (["--prompt-limit", "3"], "every prompt is longer"),
    "budget beyond the model": (["--think-budget", "100000"], "positions"),
    "resume of nothing": (["--resume", "nothing"], "no run is there"),
    "unknown option": (["--temperature", "2"], "--temperature"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_exit_code_2_and_nothing_is_written(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, expected = BAD_INPUT[case]
    assert main(["--steps", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert list(tmp_path.iterdir()) == []


RECORD = '{"id": "1", "warm_prompt": "a", "cold_prompt": "a", "answer": "5"}\n'
BAD_FILES = {"empty": ("", "empty"), "malformed": (RECORD + "{oops\n", "line 2"),
             "no answer": (RECORD + RECORD.replace("5", ""), "line 2")}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_data_file_is_named_with_its_line(case, tmp_path, capsys):
    text, expected = BAD_FILES[case]
    (tmp_path / "mine.jsonl").write_text(text)
    assert main(["--data", str(tmp_path / "mine.jsonl"), "--model", tsallis_rl.LAB_MODEL, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "mine.jsonl" in error and expected in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_nor_resumed_with_other_settings(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main([*SMALL, "--steps", "1", "--out", run]) == 0
    before = rows(run)
    capsys.readouterr()
    for arguments, expected in ((["--out", run], "already holds"), (["--resume", run, "--q", "0.5"], "--q 0.75, not 0.5"),
                                (["--resume", run, "--limit", "7"], "--limit 24, not 7")):
        assert main([*arguments, "--steps", "2"]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    assert rows(run) == before


@pytest.mark.parametrize("arguments", (["--data", "finqa"], ["--model", "Qwen/Qwen3-0.6B"]))
def test_a_hub_out_of_reach_is_one_line_that_says_what_to_pass_instead(arguments, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, PROGRAM, *arguments, "--out", "run"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
    assert ("--data finqa:PATH" if arguments[0] == "--data" else "--model FOLDER") in done.stderr


@pytest.mark.skipif(vllm_runs_here()[0], reason="vLLM runs here")
def test_vllm_is_refused_where_it_cannot_run_and_auto_never_imports_it(tmp_path, capsys):
    assert main(["--rollout", "vllm", "--out", str(tmp_path / "run")]) == 2
    assert "--rollout vllm cannot run here" in capsys.readouterr().err
    assert main([*SMALL, "--rollout", "auto", "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert "rollouts by transformers: " in capsys.readouterr().out and "vllm" not in sys.modules


def test_your_own_records_train(tmp_path):
    lines = (Path(tsallis_rl.LAB_MODEL).parent / "validation.jsonl").read_text().splitlines(True)
    (tmp_path / "mine.jsonl").write_text("".join(lines[:30]))
    budgets = ["--model", tsallis_rl.LAB_MODEL, "--think-budget", "24", "--answer-budget", "8"]
    assert main([*SMALL, "--data", str(tmp_path / "mine.jsonl"), *budgets, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert {"val_p@1", "val_p@4", "val_maj@4"} <= rows(tmp_path / "run")[1].keys()


def test_a_short_warm_run_learns(tmp_path):
    run = tmp_path / "run"
    assert main(["--rollout", "hf", "--q", "0.75", "--method", "paft", "--steps", "20", "--eval-every", "20", "--out", str(run)]) == 0
    first, last = rows(run)[0], rows(run)[-1]
    assert 10 <= first["val_p@1"] <= 30 and first["val_maj@16"] <= 35  # wrong rationales agree: voting does not help
    assert last["val_maj@16"] >= 50 and last["log_P_mean"] > rows(run)[1]["log_P_mean"]
    figure_3 = [row["effective_reward_max"] for row in rows(run)[1:]]
    assert all(0 <= x <= 1 + 1e-6 for x in figure_3)


def test_from_a_cold_start_grpo_has_no_gradient_and_garl_learns(tmp_path):
    cold = ["--rollout", "hf", "--start", "cold", "--q", "0.75", "--eval-every", "20"]
    assert main([*cold, "--method", "grpo", "--steps", "3", "--out", str(tmp_path / "grpo")]) == 0
    assert main([*cold, "--method", "garl", "--steps", "20", "--out", str(tmp_path / "garl")]) == 0
    grpo, garl = rows(tmp_path / "grpo"), rows(tmp_path / "garl")
    assert all(row["grad_norm"] == 0 and row["reward"] == 0 for row in grpo[1:])
    metrics = ("val_p@1", "val_p@16", "val_maj@16")
    assert all(grpo[i][m] == 0 for i in (0, -1) for m in metrics) and all(garl[0][m] == 0 for m in metrics)
    assert garl[1]["log_P_mean"] < -8 and garl[-1]["val_p@1"] >= 20


def test_saving_leaves_the_optimiser_as_it_is(tmp_path):
    # asked for the state of an optimiser that has none, torch makes it by a step, and Adam's bias correction is off by one
    assert main([*SMALL, "--method", "garl", "--steps", "2", "--eval-every", "1", "--out", str(tmp_path / "run")]) == 0
    state = torch.load(tmp_path / "run" / "last" / "trainer.pt", weights_only=True)["optimizer"]["state"]
    assert len(state) == 46 and {float(s["step"]) for s in state.values()} == {2.0}
