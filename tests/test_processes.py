"""Several processes are one: torchrun with two of them on CPU (gloo), against a single process."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tsallis_rl
from tsallis_rl import main

SMALL = ["--rollout", "hf", "--M", "4", "--batch-size", "4", "--limit", "24", "--eval-every", "2", "--eval-samples", "4"]


def command(*arguments, processes=2):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            tsallis_rl.__file__, *arguments]


def launch(*arguments, processes=2):
    """The program under torchrun, one thread a process."""
    done = subprocess.run(command(*arguments, processes=processes), env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def difference(one, two):
    """Largest difference between the parameters of two runs."""
    a, b = (load_file(Path(run) / "last" / "model.safetensors") for run in (one, two))
    return max((a[k] - b[k]).abs().max().item() for k in a)


def rows(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("shard", ("none", "fsdp"))
def test_two_processes_equal_one_and_one_may_resume_what_two_began(shard, tmp_path):
    # a budget of 120 tokens: the processes do not need the same number of passes
    one, two, settings = str(tmp_path / "one"), str(tmp_path / "two"), [*SMALL, "--method", "garl", "--token-budget", "120"]
    assert main([*settings, "--steps", "4", "--out", one]) == 0
    out = launch(*settings, "--steps", "3", "--shard", shard, "--out", two)
    assert out.count("step    3 |") == 1  # one of them prints
    assert main(["--resume", two, "--steps", "4", "--shard", "none"]) == 0
    # 1e-5: the sums of float32 gradients are taken in another order; measured 1e-7
    assert difference(one, two) < 1e-5
    for a, b in zip(rows(one), rows(two), strict=True):
        assert abs(a.get("loss", 0) - b.get("loss", 0)) < 1e-4 and a["step"] == b["step"]
        assert all(b[k] == v for k, v in a.items() if k.startswith("val_") and a["step"] % 2 == 0)


def test_fsdp_equals_one_process_where_few_rollouts_are_trained_and_resumes_what_one_began(tmp_path):
    # PAFT with K = 1 trains one rationale of a prompt; GRPO nothing at all in a process whose rewards agree
    for method in ("paft", "grpo"):
        one, two, settings = str(tmp_path / f"{method}1"), str(tmp_path / f"{method}2"), [*SMALL, "--method", method, "--K", "1"]
        assert main([*settings, "--steps", "1", "--out", two]) == main([*settings, "--steps", "3", "--out", one]) == 0
        launch("--resume", two, "--steps", "3", "--shard", "fsdp")
        assert difference(one, two) < 1e-5


def test_fsdp_holds_half_of_every_layer(tmp_path):
    script = tmp_path / "held.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(tsallis_rl.__file__).parent)!r})\n"
                      "import tsallis_rl as t\n"
                      "t.start_processes(); model, _ = t.load_model(t.LAB_MODEL)\n"
                      "t.shard(model, t.resolve(t.Config(shard='fsdp')))\n"
                      "for p in model.base_model.layers.parameters(): assert 2 * p.to_local().numel() == p.numel(), p.shape\n")
    done = subprocess.run([*command()[:-1], str(script)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_sharding_needs_is_said(capsys, tmp_path):
    for arguments, words in ((["--shard", "fsdp"], "--shard fsdp needs torchrun"),
                             (["--tensor-parallel", "2"], "--tensor-parallel 2 does not divide the 1 processes"),
                             (["--tensor-parallel", "0"], "--tensor-parallel must be at least 1")):
        assert main([*SMALL, *arguments, "--out", str(tmp_path / "run")]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_end_of_one_process_ends_the_run_with_an_error_not_a_hang(tmp_path):
    process = subprocess.Popen(command(*SMALL, "--steps", "100000", "--out", str(tmp_path / "run")), stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("step    1 |"):
            break
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


def test_processes_without_a_prompt_are_refused(tmp_path):
    done = subprocess.run(command(*SMALL[:-6], "--batch-size", "1", "--out", str(tmp_path / "run")), capture_output=True, text=True)
    assert done.returncode != 0 and "error: --batch-size 1 leaves some of the 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()
