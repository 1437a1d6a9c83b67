"""Two processes (torchrun, gloo) equal one. A signal or a death of one of them ends both."""
import json
from pathlib import Path

import eval
import pytest
import tsallis_rl
from conftest import SMALL, difference, launch, program, rows

SETTINGS = [*SMALL, "--batch-size", "4", "--eps", "1e-6"]
METHODS = {"garl": ["--method", "garl", "--token-budget", "120"],  # not the same number of passes
           "paft": ["--method", "paft", "--K", "1"],
           "grpo": ["--method", "grpo"],  # a process may have no gradient at all
           "one": ["--batch-size", "1"]}  # a process has no prompt

SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
import eval, tsallis_rl
runs, answers, stopped, died = json.loads(sys.argv[1])
for argv in runs:
    tsallis_rl.main(argv)
eval.main(answers)
real = tsallis_rl.train_step

def at_step(number, then):
    def train_step(run, step):
        if tsallis_rl.rank() == 1 and step == number:  # not the one that writes
            then()
        return real(run, step)
    tsallis_rl.train_step = train_step

at_step(1, lambda: signal.raise_signal(signal.SIGTERM))
tsallis_rl.main(stopped)
at_step(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
tsallis_rl.main(died)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and what two processes printed. A run is begun by two processes
    and ended by one (garl), or begun by one and ended by two. One is evaluated by two."""
    folder = tmp_path_factory.mktemp("runs")
    for method, argv in METHODS.items():
        argv = [*SETTINGS, *argv, "--steps"]
        assert program([*argv, "4", "--out", str(folder / f"{method}1")]) == 0
        if method != "garl":
            assert program([*argv, "2", "--out", str(folder / f"{method}2")]) == 0
    new = [*SETTINGS, *METHODS["garl"], "--out"]
    both = [[*new, str(folder / "garl2"), "--steps", "2"],
            *(["--resume", str(folder / f"{m}2"), "--steps", "4"] for m in METHODS if m != "garl")]
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(tsallis_rl.__file__).parent)))
    answers = ["--model", str(folder / "paft1/best"), "--limit", "5", "--out"]
    eval.main([*answers, str(folder / "one.jsonl")])
    done = launch(json.dumps([both, [*answers, str(folder / "two.jsonl")],
                              [*new, str(folder / "stopped"), "--steps", "99"],
                              [*new, str(folder / "died"), "--steps", "99"]]), script=str(script))
    assert done.returncode != 0  # of the one that died
    assert program(["--resume", str(folder / "garl2"), "--steps", "4"]) == 0
    return folder, done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_two_processes(method, runs):
    """Two processes equal one."""
    one, two = (runs[0] / f"{method}{n}" for n in (1, 2))
    assert difference(one, two) < 1e-5  # sums in another order; measured 1e-7
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a.keys() == b.keys()
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-4)
        assert all(b[key] == value for key, value in a.items() if key.startswith("val_"))
    assert json.loads((two / "config.json").read_text())["settings"]["eps"] == 1e-6


def test_ends(runs):
    """A signal to one makes all stop and save. The death of one is an error and not a hang."""
    assert [row["step"] for row in rows(runs[0] / "stopped")] == [0, 1]
    assert program(["--resume", str(runs[0] / "stopped"), "--steps", "2"]) == 0
    assert [row["step"] for row in rows(runs[0] / "died")] == [0]
    assert (runs[0] / "died" / "last" / "trainer.pt").is_file()


def test_print(runs):
    """One of several prints. Two write the same evaluation as one, and once."""
    assert runs[1].count("step   4 |") == 3 and runs[1].count("of 4 steps done") == 3
    assert runs[1].count("| rule |") == 1
    assert (runs[0] / "one.jsonl").read_bytes() == (runs[0] / "two.jsonl").read_bytes()
