"""The study: its commands, logs, tables and figures, and what data/results/README.md says."""
import re
import shlex
from dataclasses import replace

import pytest
import torch

import tsallis_rl as t
from data import SPLITS, Record, load
from data.results import study

README = (study.RESULTS / "README.md").read_text()


@pytest.mark.parametrize("table", [path.stem for path in sorted(study.RESULTS.glob("*.jsonl"))])
def test_log(table):
    """Every logged run ended well, and its command is the study's and has its settings."""
    known = dict(study.tables()[table])
    for line in study.read(table):
        words, config = shlex.split(line["command"]), t.parse(known[line["run"]].split())
        if "gate-8," in line["run"]:
            assert words == ["python", "data/results/study.py", table, "--only", line["run"]]
        else:
            assert words[:3] == ["OMP_NUM_THREADS=1", "python", "tsallis_rl.py"]
            assert t.parse(words[3:]) == config
        assert line["run"].endswith(f" seed={config.seed}") and line["exit"] == 0
        assert {len(column) for column in line["metrics"].values()} == {config.steps + 1}


def test_numbers_of_the_readme(capsys):
    """The figures are there, and all ranges and series of numbers in the tables are printed."""
    study.print_gate()
    for table in ("cold", "warm", "noise", "schedule"):
        study.print_learning(table)
    study.print_real("hotpotqa")
    study.print_real("musique")
    printed = capsys.readouterr().out
    rows = [line for line in README.splitlines() if line.startswith("|")]
    claims = re.findall(r"\d+ \(\d+ to \d+\)|(?<=\| )\d+(?:, \d+){3}(?= \|)", "\n".join(rows))
    claims += re.findall(r"\d+ of \d+ cells", README.replace("cells on", "cells"))
    assert len(claims) > 60 and [claim for claim in claims if claim not in printed] == []
    assert all((study.RESULTS / name).is_file() for name in re.findall(r"\]\((\w+.png)\)", README))


def test_gated_schedule(monkeypatch):
    """q follows the running mean of log P, and the trainer is as before afterwards."""
    rows = {step: {"log_P": x} for step, x in enumerate((-40.0, -20.0, -4.0, -2.0), 1)}
    monkeypatch.setattr(t, "train_step", lambda run, step: rows[step])
    before, qs = (t.train_step, t.q_of), []
    with study.gated(8):
        for step in range(1, 5):
            qs.append(t.q_of(step, None))
            t.train_step(None, step)
        qs.append(t.q_of(5, None))
    assert qs == pytest.approx([1, 1 - 8 / 40, 1 - 8 / 36, 1 - 8 / 29.6, 1 - 8 / 24.08])
    assert (t.train_step, t.q_of) == before


def test_escape():
    """A start is passed when log P has come half of its way to 0. Never comes last in a median."""
    for log_P, window, step in (([-40, -30, -20, -19, -30], 1, 3), ([None, -40, -20, -19.9], 1, 3),
                                ([-40, None, -41], 1, None), ([None, -40, -10, -40, -9, -9], 2, 5)):
        assert study.escape({"metrics": {"log_P": log_P}}, window) == step  # older logs have row 0
    assert study.median([3, None, 5]) == 5 and study.median([3, None, None]) is None
    assert study.escape_time(0.1, 1) == pytest.approx(3.086113)  # log(u / (1-u)) + 1 / (1-u)


def test_data(tmp_path, monkeypatch):
    """bracket is ledger with other answers alone. Noisy rows have another row's answer, which
    does not contain their own, and the test split holds exactly these rows."""
    monkeypatch.setattr(study, "WORK", tmp_path)
    monkeypatch.setattr(study, "FORMS", {"bracket": "[N"})
    study.make_data()
    read = lambda name, split="train": load(str(tmp_path / name), split)
    for split in SPLITS:
        assert read("bracket", split) == [replace(record, answer="[" + record.answer)
                                          for record in load("ledger", split)]
    clean, noisy = load("ledger", "train")[:100], read("noise30")
    assert read("noise0") == clean and read("noise30", "test") + clean[30:] == noisy
    assert all(one.answer not in other.answer for one, other in zip(clean, noisy[:30]))
    assert {record.answer for record in noisy} <= {record.answer for record in clean}
    assert read("noise30", "validation") == load("ledger", "validation")
    assert read("noise10-bracket")[10:] == read("bracket")[10:100]


def test_held_out_rows():
    """Rows that chose a checkpoint are not among those that it is reported on."""
    config = t.parse(["--eval-limit", "30"])
    chose, rows = load("ledger", "validation", 30), study.held_out(config)
    assert len(rows) == 100 - 30 + 200 and not {r.id for r in chose} & {r.id for r in rows}


def test_grade():
    """p@1, p@16 and the vote by the paper's rule; the vote also by stricter ones."""
    record = Record("1", "w", "c", "Oslo", ("Christiania",))
    samples = ["Oslo, Norway", "Oslo, Norway", "Rome", "the Oslo"]
    row = {name: values[0] for name, values in study.grade([samples], [record], "hotpotqa").items()}
    assert row == {"p@1": 0.75, "p@16": 1, "maj@16": 1, "exact maj@16": 0, "em": 0, "f1": 0.6667}
    assert study.grade([None], [record], "hotpotqa")["p@16"] == [0]


def test_log_weights():
    """log w after given rationales is the trainer's log w after the same ones."""
    config = t.parse([*study.LAB.split(), "--M", "4", "--batch-size", "1", "--method", "garl",
                      "--start", "cold"])
    engine, examples = study.load_engine(config, config.model, load("ledger", "train", 4))
    run = t.Run(config, None, engine.model, engine, None, examples, [])
    [group] = t.sample_groups(run, 1)
    log_w, _ = t.group_gradient(engine.model, group, config)
    ours = study.log_weights(engine, group.record, group.prompt, [r.z for r in group.rollouts])
    assert torch.allclose(ours.double(), log_w, rtol=1e-5)


def test_run_repeats(tmp_path, monkeypatch):
    """A run of the study is silent, ends well and repeats; its log names the start's log P."""
    monkeypatch.setattr(study, "WORK", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # for the next tests
    monkeypatch.chdir(study.ROOT)
    methods, options = {"garl": (0.5,)}, {"few": "--lr 3e-4 --limit 20"}
    name, command = next(study.learning("warm", methods, options, "ledger",
                                        "--steps 2 --eval-every 1 --eval-samples 2"))
    command = command.replace("--M 16", "--M 2").replace("--eval-limit 24", "--eval-limit 2")
    one, two = (study.run_one(("gate", name, command)) for _ in range(2))
    assert one["exit"] == 0 and one["metrics"] == two["metrics"]
    log_P = one["metrics"]["log_P"]
    assert len(log_P) == 3 and study.first(log_P) == log_P[1]
