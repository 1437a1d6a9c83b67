"""Verifiers, votes and intervals, on text that no model has to write."""
import json
import os
import random
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import eval as ev
from data import Record

ROOT = Path(__file__).parents[1]


def record(answer, *aliases, **more):
    return Record("r", "warm", "cold", answer, aliases, **more)


# --- Text -------------------------------------------------------------------------------------------------------------
def test_normalisation_is_that_of_the_official_evaluators():
    assert ev.normalize_answer("  The U.S.  an Apple-pie, a day ") == "us applepie day"
    assert ev.normalize_answer("Theatre of another") == "theatre of another", "articles are whole words"


def test_exact_match_forgives_case_and_spaces_and_nothing_else():
    assert ev.exact_match(" Yes\n", "yes") and ev.exact_match("New  York", "new york")
    for wrong in ("1.45%", "145%", "-14.5%", "14.5", "14.5%."):
        assert not ev.exact_match(wrong, "14.5%"), wrong


def test_substring_match_is_the_papers_rule_with_its_leniency():
    assert ev.substring_match("The change was 14.5% in all.", "14.5%")
    assert ev.substring_match("142", "42"), "the paper's rule, stated in the docstring"
    assert not ev.substring_match("14.5", "14.5%")


@pytest.mark.parametrize("gold", ["", "  ", "\n", ".", "the"])
def test_a_gold_without_content_matches_nothing(gold):
    assert not ev.substring_match("the answer.", gold)
    assert not ev.exact_match("", "")
    assert not any(ev.verdicts(name, "", "").get("numeric") for name in ("finqa", "ledger"))


def test_an_alias_counts_as_whole_words_only():
    assert not ev.correct("Australia", "U.S.", ("US", "America"))
    assert ev.correct("It is the US.", "U.S.", ("US", "America"))
    assert ev.correct("about 0.1446", "14%", ("0.1446",))
    assert not ev.correct("-0.1446", "14%", ("0.1446",)), "the sign is part of the word"


def test_a_leading_decimal_point_is_part_of_a_number():
    assert not ev.correct(".25", "25.0", ("25",))
    assert ev.correct("(.25), I think", "25%", (".25",)) and ev.correct("well ...25!", "25.0", ("25",))
    assert ev.majority_vote([".5 million", "5 million", "5 million", ".5 million", ".5 million"]) == ".5 million"


# --- Numbers ----------------------------------------------------------------------------------------------------------
RIGHT = [
    ("14.5%", "14.5%"), ("14.46%", "14.5%"), ("0.145", "14.5%"), ("0.14464", "14%"), ("14.5", "14.5%"), ("14%", "0.14"),
    ("14.5 percent", "14.5%"), ("100%", "1"), (".5%", "0.5%"), ("12.39", "12.4"), ("8953.33", "8953"),
    ("$1,234.0", "1234"), ("1,234,567", "$1234567"), ("$ 103.7 million", "$103.7 million"), ("103.7", "$103.7 million"),
    ("103,700,000", "$103.7 million"), ("103.7 million", "103700000"), ("40 billion", "40"), ("101 stores", "101"),
    ("(5.2)", "-5.2"), ("($5.2 million)", "-5.2"), ("(14.5%)", "-14.5%"), ("-$5", "-5"), ("$-5", "-5"),
    ("\u22125", "-5"),
    ("The answer is 14.5%.", "14.5%"), ("0.14 (14%)", "14%"), (r"\boxed{14.5\%}", "14.5%"), ("from 2008-2010: 7", "7"),
    ("Yes.", "yes"), ("No, it did not", "no"), ("1.4464e-1", "14%"),
]
WRONG = [
    ("1.45%", "14.5%"), ("145%", "14.5%"), ("0.0145", "14.5%"), ("1450", "14.5%"), ("-14.5%", "14.5%"),
    ("14%", "14.5%"),
    ("14.56%", "14.5%"), ("73%", "1"), ("14%", "0"), ("5.3", "5.2"), ("1.16", "1%"), ("0.6%", "1"), ("13.9%", "14"),
    ("$104 million", "104%"), ("1234", "123"), ("123", "1234"), ("2", "20"),
    ("103.7 billion", "$103.7 million"), ("1.037", "$103.7 million"), ("12,34", "1234"), ("14.5 to 15%", "14.5%"),
    ("", "14%"), ("nan", "14%"), ("inf", "1"), ("1e999", "1"), ("\u0663", "3"), ("yes and no", "yes"), ("1", "yes"),
    ("not known", "no"), ("yes", "no"), ("9" * 40, "9" * 41),
]


# Also wrong for 42: other values that end in the digits of the gold.
WRONG += [(text, "42") for text in (
    "\u201342", "\u201442", "\uff0d42", "\u2212 42", "minus 42", "Negative $42", "-(42)", "$\u201342", "-\u20ac42",
    "42k", "42 K", "1,42", "1,1,42", "2^42", "x^42", "2**42", "1/42", "1 / 42", "6 * 42", "6 \u00d7 42", "1+42", "0x42",
    "1e9042", "1e-1042", "1.000.042", "1 042", "1'042", "1_042", "1\uff0c42", "\u066342", "42\u00b2", "42\u00bd")]
WRONG += [("1 000 000", "0"), ("1 000 000", "1"), ("1.000.000", "0"), ("1,00,000", "0"), ("42", "1/42"), ("42", "42k"),
          ("1", "1/42"), ("2", "2^42"), ("(0.145)%", "-14.5%"),
          ("103.7B", "$103.7 million"), ("1,234", "12,34"), ("42", "2^42")]
RIGHT += [(text, "42") for text in (
    "**42**", "the total **is** 42", "2. 42", "2010\u20132012: 42", "answer\u201442", "x=42", "42, I think", "+42",
    "The answer \u2014 42", "'42'", "US$42", "\u20ac42", "Q3 42")]
RIGHT += [("\u201342", "-42"), ("minus 42", "-42"), ("1 000 000", "1000000"), ("42M", "42"),
          ("1,000,000", "1 000 000"), ("103.7M", "$103.7 million"), ("1/42", "1/42"), ("In Q3 500 stores", "500"),
          ("1" * 30 + ".", "1" * 30), ("(14.5)%", "-14.5%"),
          ("12.35", "12.3"), ("12.35", "12.4"), ("-0.125", "-12%"), ("0.125", "13%")]  # a half rounds either way
WRONG += [("12.3501", "12.3"), ("12.3499", "12.4"), ("12.5", "11")]


@pytest.mark.parametrize("prediction, gold", RIGHT)
def test_the_same_number_in_another_form_is_right(prediction, gold):
    assert ev.verdicts("finqa", prediction, gold)["numeric"] == 1


@pytest.mark.parametrize("prediction, gold", WRONG)
def test_another_number_is_wrong(prediction, gold):
    assert ev.verdicts("finqa", prediction, gold)["numeric"] == 0


def test_a_run_of_digits_beyond_what_decimal_keeps_is_no_number():
    assert ev.parse_number("9" * 28).value == 10**28 - 1 and ev.parse_number("9" * 29) is None


@pytest.mark.parametrize("gold", ["14%", "-3.2%", "4.9\\\\n", "$ 386797190 or $ 386.8 million", "101 stores per year",
                                  "no", "( 4.2 )", ".5", "up", "$2.33 million", "3 : 1", "708716.6"])
def test_every_gold_passes_against_itself(gold):
    assert ev.numeric_match(gold, gold)


# --- Official metrics -------------------------------------------------------------------------------------------------
def test_hotpotqa_f1_is_zero_when_only_one_side_is_yes_no_or_noanswer():
    f1 = ev.hotpotqa_f1
    assert f1("yes it is", "yes") == f1("yes", "no") == f1("noanswer given", "noanswer") == f1("no", "no way") == 0
    assert f1("Yes.", "yes") == 1
    assert f1("the Tower of London", "Tower Bridge, London") == pytest.approx(2 * 2 / (3 + 3))
    assert f1("", "") == 0, "as in hotpot_evaluate_v1.py"


def test_musique_takes_the_best_over_answer_and_aliases_and_knows_no_special_words():
    verdict = ev.verdicts("musique", "Brooklyn Robins", "Los Angeles Dodgers", ("Robins", "Brooklyn Robins"))
    assert verdict["em"] == verdict["f1"] == 1
    assert ev.verdicts("musique", "yes it is", "yes")["f1"] == pytest.approx(0.5)
    assert ev.musique_f1("", "the") == 1, "two answers without tokens agree, as in MuSiQue's metrics/answer.py"


def test_hotpotqa_ignores_aliases_in_its_official_metrics():
    assert ev.verdicts("hotpotqa", "US", "U.S.A.", ("US",))["em"] == 0


def test_each_dataset_has_its_own_verdicts():
    names = {name: set(ev.verdicts(name, "a", "b")) for name in ("finqa", "ledger", "hotpotqa", "musique", "custom")}
    paper = {"correct", "paper", "exact"}
    assert names["finqa"] == names["ledger"] == paper | {"numeric"} and names["custom"] == paper
    assert names["hotpotqa"] == names["musique"] == paper | {"em", "f1"}


# --- Untrusted text ---------------------------------------------------------------------------------------------------
ALPHABET = [*"0123456789.,-%$() eE+\\/\u2212\u0663\u00b2\uff11\ud800\x00\n\t\u00bd\u221e\u0301aby", "nan", "inf",
            "1e999", "-inf", "million", "percent", "0x10", "yes", "no", "the", "__import__('os')"]


def test_no_string_raises():
    generator = random.Random(0)
    for _ in range(4000):
        prediction, gold = ("".join(generator.choices(ALPHABET, k=generator.randrange(10))) for _ in range(2))
        for name in ("finqa", "hotpotqa", "musique"):
            verdict = ev.verdicts(name, prediction, gold, (prediction[:3],))
            assert all(0 <= value <= 1 for value in verdict.values())
        assert isinstance(ev.majority_vote([prediction, gold, prediction]), str)
        if gold.strip():
            assert ev.numeric_match(gold, gold), repr(gold)


@pytest.mark.parametrize("unit", [
    "1", "1,", "1,111,", "(", "$ ", "-", "the ", ".1", "1e", " ", "1.", "-$ ", "1\\", "\ud800"])
def test_a_long_text_takes_less_than_a_second_and_not_hours(unit):
    text = unit * (300_000 // len(unit))
    start = time.perf_counter()
    ev.verdicts("finqa", text, "14%")
    ev.verdicts("musique", text, "New York")
    ev.majority_vote([text, text])
    assert time.perf_counter() - start < 10, "about 0.5 s when linear; a quadratic scan would take an hour"


# --- Metrics ----------------------------------------------------------------------------------------------------------
def test_pass_at_k_is_the_share_of_k_subsets_with_a_correct_sample():
    for n, c, k in [(5, 0, 2), (5, 2, 1), (5, 2, 3), (5, 4, 3), (5, 5, 5)]:
        subsets = list(combinations([True] * c + [False] * (n - c), k))
        assert ev.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for n, c, k in [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)]:
        with pytest.raises(ValueError, match="pass_at_k"):
            ev.pass_at_k(n, c, k)


def test_the_vote_is_on_answers_before_any_verdict():
    assert ev.majority_vote(["Paris", "London", "the paris."]) == "Paris"
    assert ev.majority_vote(["14%", "$1,200.0", "1200", "-14%"]) == "$1,200.0"
    assert ev.majority_vote(["5.2 million", "52 million", "52 million"]) == "52 million", "the decimal point counts"


def test_a_vote_tells_percent_from_number_and_no_number_from_its_end():
    assert ev.majority_vote(["14%", "14", "14%", "14", "7", "7", "7"]) == "7"
    assert ev.vote_key("in 2004") != ev.vote_key("2004"), "a number among words is not the answer"
    assert ev.vote_key("12,34") == "12,34" and ev.vote_key("34") == "34"
    assert ev.vote_key("\u201342") == ev.vote_key("-42.0") and ev.vote_key("1 000") == ev.vote_key("1,000") == "1000"
    assert ev.majority_vote(["2^42", "42", "2^42"]) == "2^42"


def test_a_tied_vote_goes_to_the_answer_that_appears_first():
    assert ev.majority_vote(["b", "c", "c", "b", "d"]) == "b"


def test_the_winner_keeps_the_form_that_most_samples_wrote():
    assert ev.majority_vote(["14.0%", "14%", "14%", "3"]) == "14%"


def test_an_empty_answer_cannot_win_a_vote():
    assert ev.majority_vote(["", "  ", ".", "", "7"]) == "7"
    assert ev.majority_vote(["", " "]) == "" and ev.majority_vote([]) == ""


def test_summarize_reports_mean_any_and_vote_in_percent():
    answers = [["4", "4", "5", ""], ["1", "2", "2", "3"], ["x", "y", "z", ""]]
    metrics = ev.summarize(answers, [record("4"), record("3"), record("14%", "0.14")])
    assert list(metrics) == ["p@1", "p@4", "maj@4"]
    assert metrics == pytest.approx({"p@1": 25, "p@4": 200 / 3, "maj@4": 100 / 3})


def test_the_vote_and_not_the_first_sample_decides_maj_at_n():
    metrics = ev.summarize([["9", "4", "4"], ["4", "9", "9"]], [record("4"), record("4")])
    assert metrics == pytest.approx({"p@1": 50, "p@3": 100, "maj@3": 50})
    assert ev.per_prompt([["9", "4", "4"], ["4", "9", "9"]], [record("4"), record("4")])["maj@3"] == [1, 0]


def test_a_prompt_that_was_too_long_counts_as_wrong():
    assert ev.summarize([["4", "4"], None], [record("4"), record("4")]) == {"p@1": 50, "p@2": 50, "maj@2": 50}
    assert ev.grade("custom", record("4"), None)["answers"] is None


def test_the_value_of_a_finqa_program_counts_only_where_it_is_the_gold_in_another_form():
    right, other, inside = record("14%", value="0.14464"), record("-3.2%", value="-16.0"), record("7", value="7.0")
    assert [ev.aliases_of(r) for r in (right, other, inside)] == [("0.14464",), (), ()]
    assert ev.aliases_of(record("yes", value="yes")) == ev.aliases_of(record("yes")) == ()
    assert ev.summarize([["0.14464"], ["-16.0"]], [right, other])["p@1"] == 50
    assert ev.grade("finqa", right, ["0.14464"])["verdicts"][0]["correct"] == 1


def test_the_papers_rule_and_the_training_reward_know_no_alias_and_numeric_does():
    assert ev.verdicts("ledger", "12", "twelve", ("12",))["numeric"] == 1
    verdict = ev.verdicts("musique", "Robins", "Los Angeles Dodgers", ("Robins",))
    assert (verdict["correct"], verdict["paper"], verdict["exact"]) == (1, 0, 0)
    records, answers = [record("U.S.", "America"), record("U.S.")], [["America", "U.S."], ["the U.S.", "America"]]
    table = ev.tabulate([ev.grade("custom", *pair) for pair in zip(records, answers)], 2)
    values = {name: value for name, (value, _, _) in table.items()}
    assert values == pytest.approx({"p@1": 75, "p@2": 100, "maj@2": 100, "paper p@1": 50, "paper p@2": 100,
                                    "paper maj@2": 50, "exact p@1": 25, "exact p@2": 50, "exact maj@2": 0})


def test_summarize_counts_aliases_and_refuses_ragged_samples():
    assert ev.summarize([["0.14"]], [record("14%", "0.14")])["p@1"] == 100
    for answers in ([["1"], ["1", "2"]], [["1"]], [[], []]):
        with pytest.raises(ValueError, match="same number"):
            ev.summarize(answers, [record("1"), record("1")])


def test_the_bootstrap_interval_is_reproducible_and_near_the_binomial_one():
    values = [1.0] * 60 + [0.0] * 140
    low, high = ev.bootstrap_interval(values)
    assert (low, high) == ev.bootstrap_interval(values)
    spread = 1.96 * (0.3 * 0.7 / 200) ** 0.5
    assert low == pytest.approx(0.3 - spread, abs=0.02) and high == pytest.approx(0.3 + spread, abs=0.02)
    assert ev.bootstrap_interval([1.0] * 5) == (1, 1)
    low, high = ev.bootstrap_interval(values, resamples=5000)
    assert (low, high) == pytest.approx((0.3 - spread, 0.3 + spread), abs=0.005), "a 90% interval is 0.01 shorter"


# --- Command line -----------------------------------------------------------------------------------------------------
def write_questions(folder):
    lines = [{"id": f"q{i}", "warm_prompt": f"w{i}", "cold_prompt": f"c{i}", "answer": str(i)} for i in range(4)]
    for split in data.SPLITS:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--data", str(folder), "--model", "m"]


@pytest.fixture
def sampled(monkeypatch, tmp_path):
    """Instead of a model: each prompt's gold and then "9"s; the prompts in `too_long` are dropped. Returns the calls,
    as (Config, records)."""
    tsallis_rl = pytest.importorskip("tsallis_rl")
    calls = SimpleNamespace(all=[], too_long=(), before=lambda: None)

    def answers_to(config, records):
        calls.before()
        calls.all.append((config, records))
        return [None if r.id in calls.too_long else [r.answer] + ["9"] * (config.eval_samples - 1) for r in records]

    monkeypatch.setattr(tsallis_rl, "answers_to", answers_to)
    monkeypatch.chdir(tmp_path)
    return calls


def test_an_evaluation_writes_every_answer_and_prints_a_markdown_row(tmp_path, sampled, capsys):
    arguments = [*write_questions(tmp_path), "--eval-samples", "2", "--out", "answers.jsonl"]
    assert ev.main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["q0", "q1", "q2", "q3"]
    right, wrong = dict.fromkeys(("correct", "paper", "exact"), 1.0), dict.fromkeys(("correct", "paper", "exact"), 0.0)
    assert lines[1] == {"id": "q1", "gold": "1", "aliases": [], "answers": ["1", "9"], "vote": "1",
                        "verdicts": [right, wrong], "vote_verdicts": right}
    printed = capsys.readouterr().out
    assert ("| model | data | prompts | p@1 | p@2 | maj@2 | paper p@1 | paper p@2 | paper maj@2 "
            "| exact p@1 | exact p@2 | exact maj@2 |" in printed)
    assert "50.0 [50.0, 50.0] | 100.0 [100.0, 100.0]" in printed
    assert "prompts fit" not in printed and "the paper's rule" in printed


def test_a_dropped_prompt_is_said_counts_as_wrong_and_is_null(tmp_path, sampled, capsys):
    sampled.too_long = ("q0", "q2")
    assert ev.main([*write_questions(tmp_path), "--eval-samples", "3", "--out", "answers.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 prompts fit --prompt-limit 4096; the others count as wrong" in printed
    assert "  p@3             50.0 " in printed
    assert [json.loads(line)["answers"] is None for line in open("answers.jsonl")] == [True, False, True, False]


def write_run(folder, **settings):
    (folder / "best").mkdir(parents=True)
    import dataclasses
    import tsallis_rl
    config = dataclasses.asdict(tsallis_rl.resolve(tsallis_rl.Config(**settings)))
    (folder / "config.json").write_text(json.dumps({"settings": config}))


def test_a_runs_checkpoint_is_evaluated_as_the_run_did(tmp_path, sampled, capsys):
    write_questions(tmp_path)
    settings = dict(data=str(tmp_path), start="cold", think_budget=7, answer_budget=3, prompt_limit=99, seed=5,
                    dtype="bfloat16", rollout="hf", eval_samples=2)
    write_run(tmp_path / "run", **settings, limit=3, eval_limit=2, lr=1.0)
    model = str(tmp_path / "run" / "best")
    for flags, size in (["--split", "validation"], 2), ([], 4), (["--split", "validation", "--limit", "3"], 3):
        assert ev.main(["--model", model, "--overwrite", *flags]) == 0
        config, records = sampled.all[-1]
        assert {name: getattr(config, name) for name in settings} == settings and config.model == model
        assert len(records) == size, flags
    printed = capsys.readouterr().out
    assert "run/config.json: data " in printed and "start cold" in printed and "lr" not in printed.split("\n")[0]
    assert ev.main(["--model", model, "--start", "warm", "--seed", "1"]) == 0
    config, _ = sampled.all[-1]
    assert (config.start, config.seed, config.think_budget) == ("warm", 1, 7), "a flag given overrides"
    assert "start" not in capsys.readouterr().out.split("\n")[0]


def test_answers_are_never_overwritten_unasked_and_not_two_models_in_one_file(tmp_path, sampled, capsys):
    write_questions(tmp_path)
    write_run(tmp_path / "run", data=str(tmp_path))
    for model in ("m", str(tmp_path / "run" / "best"), "Qwen/m"):
        assert ev.main(["--model", model, "--data", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.glob("eval-*"))
    assert len(names) == 3 and any("run-best" in name for name in names)
    assert ev.main(["--model", "m", "--data", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert len(sampled.all) == 3, "refused before the sampling"
    assert ev.main(["--model", "m", "--data", str(tmp_path), "--overwrite"]) == 0


def test_a_file_is_made_before_the_sampling_and_an_empty_one_may_be_filled(tmp_path, sampled):
    def killed():
        assert (tmp_path / "out.jsonl").read_text() == ""
        raise KeyboardInterrupt
    sampled.before = killed
    arguments = [*write_questions(tmp_path), "--out", "out.jsonl"]
    assert ev.main(arguments) == 130
    sampled.before = lambda: None
    assert ev.main(arguments) == 0 and len(open("out.jsonl").readlines()) == 4


def test_a_full_disk_comes_after_the_table_and_keeps_the_old_answers(tmp_path, sampled, capsys, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")
    arguments = [*write_questions(tmp_path), "--out", "out.jsonl", "--overwrite"]
    (tmp_path / "out.jsonl").write_text("old")
    monkeypatch.setattr("os.replace", full)
    assert ev.main(arguments) == 2
    printed = capsys.readouterr()
    assert "| model | data |" in printed.out and "answers in" not in printed.out
    assert printed.err == "error: out.jsonl: cannot be written (No space left on device)\n"
    assert (tmp_path / "out.jsonl").read_text() == "old"


LONG = "x" * 300


@pytest.mark.parametrize("arguments", [
    "", "--plot nowhere", "--model m --plot run", "--model m --split dev", "--model m --limit -1",
    "--model m --samples 4", "--model m --eval-samples 0", "--model m --token-budget x", "--model m --start hot",
    "--model m --seed",
    *(f"--model {model} --data ." for model in (LONG, "a\0b", "~nosuchuser/m")),
    *(f"--model m --data {path}" for path in (
        "nowhere", "finqa:", LONG, "a\0b", "~nosuchuser", "train.jsonl/x", "/dev/null", "finqa:/dev/null", "secret")),
    *(f"--model m --data . --out {path}" for path in (
        "/nowhere/x.jsonl", ".", "/dev/null", "train.jsonl/x", "~nosuchuser/x", LONG, "a\0b", "secret/x.jsonl",
        "train.jsonl")),
    *(f"--plot {path}" for path in (LONG, "a\0b", "~nosuchuser", "train.jsonl", "secret")),
    *(f"--plot run --out {path}" for path in (
        "run/metrics.jsonl", "~nosuchuser/x.png", f"{LONG}.png", "nowhere/x.png", "folder.png", "a\0b.png"))])
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_lost(arguments, tmp_path, sampled, capfd):
    write_questions(tmp_path)
    (tmp_path / "secret").mkdir(mode=0)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "log_P_mean": -1}\n')
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    if "secret" in arguments and os.geteuid() == 0:
        pytest.skip("root may look everywhere")
    assert ev.main(arguments.split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert before == {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} and not sampled.all


def test_the_program_itself_ends_with_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "eval.py"), "--model", "m", "--limit", "0x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_importing_the_verifiers_stays_light():
    heavy = {"torch", "transformers", "matplotlib", "datasets"}
    code = f"import eval, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plot_of_runs_is_a_png_whatever_a_run_is_called_and_while_it_goes_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names = ("a", "q$0.5$ {x_", "$\\bad$", "just started", "_b")
    for run in names:
        (tmp_path / run).mkdir()
        steps = ({"step": i, "log_P_mean": -5 + i, "effective_reward_max": 0.1 * i, "amplified_advantage_max": 0.1}
                 for i in (1, 2))
        rows = [{"step": 0, "val_maj@16": 20.0}, *steps]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / run / "metrics.jsonl").write_text(text + '{"step": 3, "lo')
    (tmp_path / "just started" / "metrics.jsonl").unlink()
    assert ev.read_curve("a", "val_maj@") == [(0, 20.0)]
    assert ev.read_curve("a", "log_P_mean") == [(1, -4), (2, -3)]
    assert ev.main(["--plot", *names]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and capsys.readouterr().err == ""


def test_what_is_no_number_for_a_figure_is_left_out_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absurd = ("NaN", "null", "1e308", "-1e308", "Infinity", "1" + "0" * 400, '"7"', "true", "[1]", "{}")
    lines = [f'{{"step": {a}, "log_P_mean": {b}}}\n' for x in absurd for a, b in ((1, x), (x, 1), (x, x))]
    lines += ['{"log_P_mean": 1}\n', '{"step": 2, "log_P_mean": 3}\n']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert ev.read_curve(".", "log_P_mean") == [(2, 3)]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "log_P_mean": 1e29}\n{"step": 2, "log_P_mean": -1e29}\n')
    pytest.importorskip("matplotlib")
    assert ev.main(["--plot", "."]) == 0


def test_a_verdict_needs_only_a_records_answer_aliases_and_value():
    record = SimpleNamespace(id="x", answer="7", aliases=(), value="")
    assert ev.grade("custom", record, ["7", "8", "8"])["vote"] == "8"
