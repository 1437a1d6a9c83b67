"""The study's commands, logs and figures, and what the README says of them."""
import json
import math
import shlex
from pathlib import Path

import pytest
import torch

import tsallis_rl
from data import load, study

ROOT = Path(study.__file__).resolve().parent.parent
README = " ".join((ROOT / "README.md").read_text().split())
LOGS = sorted((ROOT / "data" / "results").glob("*.jsonl"))
START = {"log_P0": -40.0, "sum": 2000.0, "squares": 64.0, "g": [1e-4, 1e-2, 1e-1] + [1e-2] * 97}


@pytest.mark.parametrize("path", LOGS, ids=[path.stem for path in LOGS])
def test_every_run_of_a_log_is_one_of_the_study_and_ended_well(path):
    table = path.stem
    known = dict(study.real("SMOLLM2") if table == "real" else study.tables()[table])
    for line in study.read(table):
        words = shlex.split(line["command"])
        if "gate-8," in line["run"]:  # no setting of the trainer's
            assert words == ["python", "data/study.py", table, "--only", line["run"]]
            words = ["OMP_NUM_THREADS=1", "python", "tsallis_rl.py", *known[line["run"]].split()]
        assert words[:3] == ["OMP_NUM_THREADS=1", "python", "tsallis_rl.py"] and line["exit"] == 0
        config = tsallis_rl.parse(words[3:])
        assert config == tsallis_rl.parse(known[line["run"]].split())
        assert f"seed={config.seed}" in line["run"] and config.method in line["run"] and f"q={config.q:g}" in line["run"]
        assert {len(column) for column in line["metrics"].values()} == {config.steps + 1}


def test_the_readme_tells_how_many_cells_are_on_the_predicted_side(capsys):
    study.print_gate()
    lines = capsys.readouterr().out.splitlines()
    counts = [line.split(": ")[1] for line in lines if line.startswith("all ")]
    assert len(counts) == 2 and all(count in README for count in counts)


@pytest.mark.parametrize("figure", ("gate.png", "learning.png"))
def test_the_figures_are_pictures_in_the_readme(figure):
    assert (ROOT / "data" / "figures" / figure).read_bytes().startswith(b"\x89PNG") and f"data/figures/{figure}" in README


def test_the_gate_s_schedule_follows_the_running_mean_of_log_P(monkeypatch):
    scripted = [{"log_P_mean": x} for x in (-40.0, -20.0, -4.0, -2.0)]
    monkeypatch.setattr(tsallis_rl, "train_step", lambda run, step: scripted[step])
    before, qs = (tsallis_rl.train_step, tsallis_rl.q_of), []
    with study.gated(8):
        for step in range(4):
            qs.append(tsallis_rl.q_of(step, None))  # as `update` does, before the step's row is known
            tsallis_rl.train_step(None, step)
        qs.append(tsallis_rl.q_of(4, None))
    assert qs == pytest.approx([1, 1 - 8 / 40, 1 - 8 / 36, 1 - 8 / 29.6, 1 - 8 / 24.08])
    assert (tsallis_rl.train_step, tsallis_rl.q_of) == before
    with study.gated(50):
        tsallis_rl.train_step(None, 0)
        assert tsallis_rl.q_of(1, None) == 0
    for line in study.read("schedule"):
        if "gate-8," in line["run"]:
            q, log_P = line["metrics"]["q"], line["metrics"]["log_P_mean"]
            assert q[0] == 1 and q[1] == pytest.approx(max(0, 1 + 8 / log_P[0]), abs=1e-3)


def test_a_start_is_passed_when_half_of_the_way_is_done():
    assert study.escape({"metrics": {"log_P_mean": [-40, -30, -20.0, -19.9, -30]}}) == 3
    assert study.escape({"metrics": {"log_P_mean": [-40, -39, None, -41]}}) is None
    assert study.middle([3, None, 5]) == 5 and study.middle([3, None, None]) is None


def test_the_prediction_has_the_gate():
    at = lambda q, optimizer="adamw-1e-08", **more: study.predicted(optimizer, START | more, q)
    assert at(1) == at(1, "adamw-1e-20") == at(0.9) < at(0.5) and at(0) is None  # AdamW divides the factor out, or does not
    assert at(0, "adamw-1e-20") == at(1), "and a smaller eps opens the gate"
    assert at(0.5, log_P0=-20.0) < at(0.5) and at(0.5, log_P0=-80.0) is None
    assert study.predicted("sgd", START, 1) < study.predicted("sgd", START, 0.75, steps=10**5)
    # lr M sum |g| a step, five steps of warm-up (3 of them full ones): 20 nats at 3e-4 * 16 * 2000 = 9.6 a step
    assert at(1) == 5
    assert study.room("adamw-1e-8", START) == pytest.approx(math.log(1e-2 / 1e-8))
    assert study.room("adamw-1e-30", START) == pytest.approx(math.log(1e-2 / 1e-21)), "where float32 no longer holds g squared"


def test_the_noisy_rows_have_another_row_s_answer_and_are_what_the_test_split_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "WORK", tmp_path)
    monkeypatch.setattr(study, "FORMS", {})  # what make_ledger.py would write
    (tmp_path / "bracket").mkdir()
    for split in ("train", "validation"):
        text = (ROOT / "data" / "ledger" / f"{split}.jsonl").read_text()
        (tmp_path / "bracket" / f"{split}.jsonl").write_text(text.replace('"answer": "', '"answer": "['))
    study.make_data()
    clean = {r.id: r.answer for r in load("ledger", "train")}
    assert [r.answer for r in load(str(tmp_path / "noise0"), "train")] == list(clean.values())[:100]
    noisy = load(str(tmp_path / "noise30"), "train")
    changed = [r for r in noisy if r.answer != clean[r.id]]
    assert len(noisy) == 100 and len(changed) == 30 and {r.answer for r in changed} <= set(clean.values())
    assert load(str(tmp_path / "noise30"), "test") == changed
    assert load(str(tmp_path / "noise30"), "validation") == load("ledger", "validation")
    colder = load(str(tmp_path / "noise10-bracket"), "train")
    assert [i for i, r in enumerate(colder) if r.answer != "[" + clean[r.id]] == list(range(10))
    assert all(r.answer.startswith("[") for r in colder)


def test_a_shortened_row_keeps_its_supporting_paragraphs_and_the_first_other_one(tmp_path, monkeypatch):
    row = {"_id": "h", "question": "Who?", "answer": "Ada", "type": "bridge", "level": "easy", "supporting_facts": [["Notes", 0]],
           "context": [[title, ["A sentence."]] for title in ("First", "Second", "Notes")]}
    part = lambda i: {"idx": i, "title": str(i), "paragraph_text": "Text.", "is_supporting": i == 2}
    song = {"id": "2hop__1_9", "question": "Where?", "answer": "Oslo", "answer_aliases": [], "answerable": True,
            "paragraphs": [part(i) for i in range(4)], "question_decomposition": []}
    for name, file, text in (("finqa", "train.json", "[]"), ("hotpotqa", "hotpot_train_v1.1.json", json.dumps([row])),
                             ("musique", "musique_ans_v1.0_train.jsonl", json.dumps(song))):
        (tmp_path / "official" / name).mkdir(parents=True)
        (tmp_path / "official" / name / file).write_text(text)
    monkeypatch.setattr(study, "WORK", tmp_path / "short")
    study.shorten(tmp_path / "official")
    [short] = json.loads((tmp_path / "short/hotpotqa/hotpot_train_v1.1.json").read_text())
    assert [title for title, _ in short["context"]] == ["First", "Notes"]
    short = json.loads((tmp_path / "short/musique/musique_ans_v1.0_train.jsonl").read_text())
    assert [p["idx"] for p in short["paragraphs"]] == [0, 2]


def test_a_run_of_the_study_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "WORK", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # it would hold for the tests that follow
    monkeypatch.chdir(ROOT)
    name, command = next(study.learning("warm", {"garl": (0.5,)}, {"few": "--lr 3e-4"}, "ledger", "--steps 1 --eval-every 1"))
    command = command.replace("--M 16", "--M 2").replace("--eval-limit 24", "--eval-limit 2 --eval-samples 2 --limit 20")
    one, two = (study.run_one(("gate", name, command)) for _ in range(2))
    assert one["exit"] == 0 and one["metrics"] == two["metrics"] and len(one["metrics"]["log_P_mean"]) == 2
