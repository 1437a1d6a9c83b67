"""The study: its commands, logs, tables and figures, and what data/results/README.md says."""
import math
import re
import shlex

import pytest
import torch

import tsallis_rl as t
from data import Record, load
from data.ledger import make
from data.results import study

README = (study.RESULTS / "README.md").read_text()
LOGS = sorted(study.RESULTS.glob("*.jsonl"))
START = {"log_P0": -40.0, "sum": 2000.0, "squares": 64.0, "g": [1e-4, 1e-2, 1e-1] + [1e-2] * 97}


@pytest.mark.parametrize("table", [path.stem for path in LOGS])
def test_log(table):
    """Every logged run ended well, and its command is the study's and has its settings."""
    known = dict(study.tables()[table])
    for line in study.read(table):
        words = shlex.split(line["command"])
        if "gate-8," in line["run"]:
            assert words == ["python", "data/results/study.py", table, "--only", line["run"]]
        else:
            assert words[:3] == ["OMP_NUM_THREADS=1", "python", "tsallis_rl.py"]
            assert t.parse(words[3:]) == t.parse(known[line["run"]].split())
        config = t.parse(known[line["run"]].split())
        assert line["exit"] == 0
        assert line["run"].endswith(f"q={config.q:g} seed={config.seed}")
        assert {len(column) for column in line["metrics"].values()} == {config.steps + 1}


def test_numbers_of_the_readme(capsys):
    """Every range and every series of numbers in a table of the findings is a printed one."""
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


def test_figures():
    """Each figure is a small picture, and a README shows it."""
    shown = README + (study.ROOT / "README.md").read_text().replace("data/results/", "")
    for name in ("learning.png", "family.png", "gate.png"):
        content = (study.RESULTS / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 200_000 and f"]({name})" in shown


def test_labels_stay_apart():
    """Labels at nearby ends of curves do not overlap, and others stay where they are."""
    heights = sorted(study.apart([100, 99, 98, 0], 7))
    assert min(b - a for a, b in zip(heights, heights[1:])) >= 7
    assert study.apart([10, 60], 7) == [10, 60]


@pytest.mark.parametrize("q, exact", [
    (0, lambda u: 2 * math.log(u / (1 - u)) - 1 / u + 1 / (1 - u)),
    (1, lambda u: math.log(u / (1 - u)) + 1 / (1 - u))])
def test_escape_time(q, exact):
    """The sum for T_q agrees with the integral (15) in closed form."""
    for p0 in (1e-6, 0.1):
        assert study.escape_time(p0, q) == pytest.approx(exact(0.5) - exact(p0), rel=1e-3)


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
    with study.gated(50):
        t.train_step(None, 1)
        assert t.q_of(2, None) == 0


@pytest.mark.parametrize("log_P, step", [
    ([-40, -30, -20.0, -19.9, -30], 3),  # an older log: row 0 has the start
    ([None, -40, -20.0, -19.9], 3),  # a newer one: row 1 has it
    ([-40, -39, None, -41], None)])
def test_escape(log_P, step):
    """A start is passed when log P has come half of its way to 0."""
    assert study.escape({"metrics": {"log_P": log_P}}) == step


def test_median():
    """Of steps where None comes last."""
    assert study.median([3, None, 5]) == 5 and study.median([3, None, None]) is None


def test_predicted_gate():
    """The prediction knows AdamW's epsilon, the start's log P, and SGD's factor."""
    def at(q, optimizer="adamw-1e-8", **more):
        return study.predicted(optimizer, START | more, q)

    # lr M sum |g| = 3e-4 * 16 * 2000 = 9.6 nats a step, after a warm-up of 5: half of 40 nats
    assert at(1) == at(1, "adamw-1e-20") == at(0.9) == 5 and at(0.9) < at(0.5)
    assert at(0) is None and at(0, "adamw-1e-20") == at(1)
    assert at(0.5, log_P0=-20.0) < at(0.5) and at(0.5, log_P0=-80.0) is None
    assert at(1, "sgd") < study.predicted("sgd", START, 0.75, steps=10**5)
    assert study.reach("adamw-1e-8", START) == pytest.approx(math.log(1e-2 / 1e-8))
    assert study.reach("adamw-1e-30", START) == pytest.approx(math.log(1e-2 / 1e-21))


def test_noisy_data(tmp_path, monkeypatch):
    """Noisy rows have another row's answer, and the test split holds exactly these rows."""
    monkeypatch.setattr(study, "WORK", tmp_path)
    monkeypatch.setattr(study, "FORMS", {})
    for split in ("train", "validation"):
        rows = [vars(record) | {"answer": "[" + record.answer} for record in load("ledger", split)]
        study.write_rows(tmp_path / "bracket" / f"{split}.jsonl", rows)
    study.make_data()
    rows = [{"answer": answer} for answer in ("1", "12", "3")]
    assert study.with_wrong_golds(rows, 2) == 2 * [{"answer": "3"}]  # 12 contains 1
    clean = {record.id: record.answer for record in load("ledger", "train")}
    data = {name: load(str(tmp_path / name), "train") for name in ("noise0", "noise30")}
    assert [record.answer for record in data["noise0"]] == list(clean.values())[:100]
    changed = [record for record in data["noise30"] if record.answer != clean[record.id]]
    assert len(changed) == 30 and {record.answer for record in changed} <= set(clean.values())
    assert load(str(tmp_path / "noise30"), "test") == changed
    assert load(str(tmp_path / "noise30"), "validation") == load("ledger", "validation")
    colder = load(str(tmp_path / "noise10-bracket"), "train")
    wrong = [i for i, record in enumerate(colder) if record.answer != "[" + clean[record.id]]
    assert wrong == list(range(10)) and all(record.answer[0] == "[" for record in colder)


def test_form(tmp_path, monkeypatch, capsys):
    """ledger in another form has other answers alone. The shipped one is never overwritten."""
    for arguments in (["--form", "[N"], ["--form", "none", "--out", str(tmp_path)]):
        monkeypatch.setattr("sys.argv", ["make.py", *arguments])
        with pytest.raises(SystemExit):
            make.main()
    monkeypatch.setattr("sys.argv", ["make.py", "--form", "[N", "--out", str(tmp_path)])
    make.main()
    for split in ("train", "validation", "test"):
        ours, shipped = (load(name, split) for name in (str(tmp_path), "ledger"))
        assert [vars(record) for record in ours] == [
            vars(record) | {"answer": "[" + record.answer} for record in shipped]


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


@pytest.mark.parametrize("table", ["hotpotqa", "musique"])
def test_tables_of_real_rows(table, capsys, monkeypatch):
    """Logs of a language model are printed, also those of the base model, which has no log P."""
    swaps = dict.fromkeys(("own", "empty", "another's", "gold in z"), -5.0)
    first = {"log_P, start": swaps, "log_P, end": swaps, "rows, 1 token": {"maj@16": [0, 1]}}
    test = dict.fromkeys(("p@1", "p@16", "maj@16", "exact maj@16", "em", "f1"), 25.0)
    trained = {"log_P": [None, -20.0, -5.0], "rationale_tokens": [None, 30.0, 5.0]}
    lines = []
    for name, _ in study.tables()[table]:
        metrics = {"val_maj@16": [0.0]} | (trained if name.startswith("garl") else {})
        line = {"run": name, "metrics": metrics, "test": test, "seconds": 60.0, "peak_GB": 2.0,
                "rows": {"maj@16": [0, 1] if name.startswith("base") else [1, 1]}}
        lines.append(line | (first if name.endswith("seed=0") else {}))
    monkeypatch.setattr(study, "read", lambda name: lines)
    study.print_real(table)
    out = capsys.readouterr().out
    assert "| +50.0 [+0.0, +100.0] | -20.0 (-20.0 to -20.0) | -5.0 (-5.0 to -5.0) |" in out
    assert "| +0.0 [+0.0, +0.0] | - | - |" in out
    assert len([x for x in out.splitlines() if x.startswith("| base cold")]) == 2
