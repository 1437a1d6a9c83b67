"""Several processes are one: torchrun with two of them on CPU (gloo), against a single process."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tsallis_rl
from tsallis_rl import main

SMALL = ["--rollout", "hf", "--M", "4", "--batch-size", "4", "--limit", "24", "--eval-every", "2", "--eval-samples", "4"]
GARL = [*SMALL, "--method", "garl", "--token-budget", "120"]  # the processes do not need the same number of passes


def command(*arguments, processes=2, program=tsallis_rl.__file__):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", program, *arguments]


def launch(*arguments, processes=2, program=tsallis_rl.__file__, fine=True):
    """What the program prints under torchrun, one thread a process."""
    done = subprocess.run(command(*arguments, processes=processes, program=program), env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == fine, done.stderr
    return done.stdout


def difference(one, two):
    """Largest difference between the parameters of two runs."""
    a, b = (load_file(Path(run) / "last" / "model.safetensors") for run in (one, two))
    return max((a[k] - b[k]).abs().max().item() for k in a)


def rows(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


SEVERAL = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
import torch, tsallis_rl as t
for arguments in json.loads(sys.argv[1]):
    assert t.main(arguments) == 0
model, _ = t.load_model(t.LAB_MODEL, torch.device("cpu"))
optimizer = t.make_optimizer(model, t.resolve(t.Config()))
for p in model.parameters():
    p.grad = torch.ones_like(p)
optimizer.step()
run = t.train_step


def signalled(state, step):
    if t.rank() == 1 and step:  # the one that does not write
        signal.raise_signal(signal.SIGTERM)
    return run(state, step)


t.train_step = signalled
assert t.main([*json.loads(sys.argv[1])[0], "--steps", "100", "--out", sys.argv[2]]) == 0
held = t.gather([sum(s["exp_avg"].numel() for s in optimizer.optim.state.values())])
t.say(json.dumps([held, sum(p.numel() for p in model.parameters())]))


def killed(state, step):
    if t.rank() == 1 and step:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(state, step)


t.train_step = killed
t.main([*json.loads(sys.argv[1])[0], "--steps", "100", "--out", sys.argv[3]])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{method: (run of one process, run with two)}, four steps each. GARL is begun by two, continued by one, ended by two;
    PAFT (one resampled rationale a prompt) and GRPO (where a process may have no gradient at all) are begun by one.
    Also what two processes printed, the optimiser's state that each held, and the folder of two more
    runs: of one ("stopped") a process got SIGTERM, of the other ("died") SIGKILL."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = {m: (str(folder / f"{m}1"), str(folder / f"{m}2")) for m in ("garl", "paft", "grpo")}
    settings = {m: GARL if m == "garl" else [*SMALL, "--method", m, "--K", "1"] for m in pairs}
    for method, (one, two) in pairs.items():
        assert main([*settings[method], "--steps", "4", "--out", one]) == 0
        if method != "garl":
            assert main([*settings[method], "--steps", "1", "--out", two]) == 0
    (folder / "several.py").write_text(SEVERAL.format(root=str(Path(tsallis_rl.__file__).parent)))
    several = [[*GARL, "--steps", "2", "--out", pairs["garl"][1]], *(["--resume", pairs[m][1], "--steps", "4"] for m in ("paft", "grpo"))]
    # a process that dies must end the run with an error: this would be a hang otherwise
    out = launch(json.dumps(several), str(folder / "stopped"), str(folder / "died"), program=str(folder / "several.py"), fine=False)
    assert main(["--resume", pairs["garl"][1], "--steps", "3"]) == 0
    launch("--resume", pairs["garl"][1], "--steps", "4")
    held = next(line for line in out.splitlines() if line.startswith("[["))
    return pairs, out, json.loads(held), folder


@pytest.mark.parametrize("method", ("garl", "paft", "grpo"))
def test_two_processes_equal_one_and_either_may_resume_what_the_other_began(method, runs):
    one, two = runs[0][method]
    # 1e-5: the sums of float32 gradients are taken in another order; measured 1e-7
    assert difference(one, two) < 1e-5
    for a, b in zip(rows(one), rows(two), strict=True):
        assert abs(a.get("loss", 0) - b.get("loss", 0)) < 1e-4 and a["step"] == b["step"]
        assert a.keys() == b.keys() and all(b[k] == v for k, v in a.items() if k.startswith("val_"))


def test_one_of_several_processes_prints(runs):
    assert runs[1].count("step    2 |") == 3 * 2 and runs[1].count("done: ") == 3 and runs[1].count("stopped after") == 1


def test_each_of_two_processes_holds_half_of_the_optimiser_s_state(runs):
    held, total = runs[2]
    assert sum(held) == total and max(held) < 0.6 * total


def test_a_signal_to_one_process_makes_all_stop_and_save(runs):
    run = runs[3] / "stopped"
    assert "stopped after step 1; continue with --resume" in runs[1] and rows(run)[-1]["step"] == 1
    assert main(["--resume", str(run), "--steps", "2"]) == 0


def test_the_death_of_one_process_ended_the_run_with_an_error_not_a_hang(runs):
    run = runs[3] / "died"
    assert [row["step"] for row in rows(run)] == [0] and (run / "last" / "trainer.pt").is_file()
    assert runs[1].count("rollouts by transformers") == 5 and runs[1].count("done: ") == 3


def test_processes_without_a_prompt_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tsallis_rl, "world", lambda: 2)
    assert main([*SMALL, "--batch-size", "1", "--out", str(tmp_path / "run")]) == 2
    assert "error: --batch-size 1 leaves some of the 2 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
