"""eval.py: the settings of a run, the table, the file of answers, the figure, bad input."""
import json
import os
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from conftest import program, rows, tree

import data
import eval as evaluation
import tsallis_rl
from eval import main, parse


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of the lab model with figures that are neither 0 nor 100."""
    out = tmp_path_factory.mktemp("trained") / "run"
    tsallis_rl.main(["--limit", "9", "--eval-limit", "5", "--M", "2", "--batch-size", "2",
                     "--steps", "1", "--eval-samples", "3", "--seed", "4", "--token-budget",
                     "300", "--out", str(out)])
    return out


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """Four records in the current folder and, instead of a model, an answer that is right and
    two that are wrong. The list has the records of each sampling."""
    lines = [json.dumps({"id": f"q{i}", "warm_prompt": "w", "cold_prompt": "c", "answer": str(i)})
             for i in range(4)]
    for split in data.SPLITS[1:]:
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    calls = []

    def answers_to(config, records):
        calls.append(records)
        return [[record.answer, "9", "9"] for record in records[:-1]] + [None]

    monkeypatch.setattr(evaluation, "answers_to", answers_to)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize("name", ["best", "last"])
def test_validation(name, trained, tmp_path):
    """An evaluation on the validation split repeats the figures of the run."""
    log = rows(trained)
    wanted = log[1] if name == "last" or log[1]["val_maj@3"] > log[0]["val_maj@3"] else log[0]
    out = ["--out", str(tmp_path / "x.jsonl")]
    main(["--model", str(trained / name), "--split", "validation", *out])
    graded = rows(tmp_path, "x.jsonl")
    assert len(graded) == 5  # the lower one of --limit and --eval-limit
    columns = evaluation.tabulate(graded, 3)["correct"]
    figures = {f"val_{key}": 100 * fmean(values) for key, values in columns.items()}
    assert figures == {key: pytest.approx(wanted[key]) for key in figures}
    assert 0 < figures["val_p@1"] < 100


@pytest.mark.parametrize("path", [".", "../last", "link", "~/run/last"])
def test_paths(path, trained, tmp_path, monkeypatch):
    """Every way to name a checkpoint finds its run."""
    (tmp_path / "run").symlink_to(trained)
    (tmp_path / "link").symlink_to(trained / "last")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path if path == "link" else trained / "last")
    given = parse(["--model", path, "--split", "validation"])
    assert (given.seed, given.eval_samples, given.limit, given.token_budget) == (4, 3, 5, 300)


def test_settings(trained):
    """A flag overrides the run's setting, and the test split is used as a whole."""
    given = parse(["--model", str(trained / "best"), "--seed", "7", "--limit", "2"])
    assert (given.seed, given.limit, given.eval_samples) == (7, 2, 3)
    assert parse(["--model", str(trained / "best")]).limit is None


def test_table(questions, capsys):
    """One table is printed, and every answer with its verdicts is in the file."""
    main(["--model", "m", "--data", ".", "--eval-samples", "3", "--out", "x.jsonl"])
    printed, lines = capsys.readouterr().out, rows(".", "x.jsonl")
    assert printed.count("| rule |") == 1 and "1 too long" in printed
    table = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert {"| rule", "| paper", "| exact"} < {cells[0] for cells in table}
    assert [cell.split()[0] for cell in table[1][1:4]] == ["25.0", "75.0", "0.0"]
    assert [line["answers"] for line in lines] == [[str(i), "9", "9"] for i in range(3)] + [None]
    assert lines[1]["vote"] == "9" and lines[1]["verdicts"][0]["exact"] == 1


def test_no_overwriting(questions):
    """A finished evaluation is refused, before the sampling."""
    codes = [program(["--model", "m", "--data", "."], main) for _ in range(2)]
    assert codes == [0, 2] and len(questions) == 1 and len(list(Path(".").glob("eval-*"))) == 1


@pytest.mark.parametrize("arguments", [
    "", "--plot nowhere", "--plot test.jsonl", "--model m --plot run", "--model m --split dev",
    "--model m --limit -1", "--model m --eval-samples x", "--model m --data nowhere", "--samples 4",
    "--model m --data . --out test.jsonl", "--model m --data . --out no/x.jsonl",
    "--plot run other", "--plot run --out run/metrics.jsonl", "--plot run --out no/x.png",
    "--model run/bad --data ."])
def test_bad_input(arguments, questions, capsys):
    """Bad input is one line and exit code 2, before the sampling, and changes no file."""
    for name, row in (("run", '{"step": 1, "loss": 1}'), ("other", '{"epoch": 1}')):
        os.makedirs(f"{name}/bad")
        Path(name, "metrics.jsonl").write_text(row + "\n")
    Path("run/config.json").write_text("{")
    before = tree(".")
    code, error = program(arguments.split(), main), capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and not questions, error
    assert tree(".") == before


def test_figure(trained, tmp_path):
    """The figure has the logged numbers of each run, and tells runs of one name apart."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    runs = [shutil.copytree(trained, tmp_path / parent / "run") for parent in "ab"]
    main(["--plot", *map(str, runs), "--out", str(tmp_path / "x.png")])
    axes, keys = pyplot.gcf().axes, ["val_maj@3", *list(evaluation.PANELS)[1:]]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["a/run", "b/run"]
    assert axes[0].get_ylim() == (0, 100) and (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"
    for axis, key in zip(axes, keys, strict=True):
        wanted = [row[key] for row in rows(trained) if key in row]
        assert [list(line.get_ydata()) for line in axis.lines] == [wanted, wanted], key
