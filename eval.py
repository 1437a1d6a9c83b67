"""Verifiers, metrics, evaluation of a checkpoint, and figures.

    python eval.py --model RUN/best                         # as the run did, on the test split
    python eval.py --model Qwen/Qwen3-0.6B --data finqa
    python eval.py --plot runs/* --out curves.png

1 text, 2 numbers, 3 verdicts, 4 metrics over samples, 5 evaluation, 6 figures, 7 command line. All in 1 to 4 is a pure
function of untrusted text: nothing is executed, every scan is linear, and no string raises.

Section 7 of the paper: the training reward is exact match with the gold; in evaluation an answer is correct iff the
gold is a substring of it; p@1 is the mean over samples, p@16 any of 16, m@16 a majority vote. Here p@1, p@16 and
maj@16 count aliases too; columns that begin with "paper" do not. Normalisation and tie rule are ours.
"""
import math
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from data import SPLITS, dataset_name, load
from data.files import (Parser, UserError, add_settings, claim_file, exit_code, jsonl, read_log, read_object,
                        say, user_path, write_atomic)

# --- 1. Text ----------------------------------------------

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
EDGES = "\"'`$*.,;:!?()[]"  # punctuation at the ends of a word, of which it is no part
LEFT_EDGE = re.compile(rf"^[{re.escape(EDGES)}]*?(?=(?<!\.)\.[0-9]|[^{re.escape(EDGES)}])")


def normalize_answer(text: str) -> str:
    """As the official evaluators of HotpotQA and MuSiQue: lower case, no (ASCII) punctuation, no articles, single
    spaces. It is for words: it turns "-1.5%" into "15", so numbers never go through it here."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def surface(text: str) -> str:
    """Lower case and single spaces: signs, decimal points and percent signs are part of an answer."""
    return " ".join(text.lower().split())


def exact_match(prediction: str, gold: str) -> bool:
    """The training reward: the answer is the gold, up to case and white space. Not up to punctuation: "1.45" is not
    "14.5", and the expected reward should stay near P (Proposition A.1)."""
    return surface(gold) != "" and surface(prediction) == surface(gold)


def substring_match(prediction: str, gold: str) -> bool:
    """The paper's evaluation: y* is a substring of the output, here up to case and white space. It is lenient: "142"
    contains "42", "unknown" contains "no". A gold that `normalize_answer` empties matches nothing."""
    return normalize_answer(gold) != "" and surface(gold) in surface(prediction)


def bare_words(text: str) -> str:
    """`surface` without the punctuation at the ends of words; signs and decimal points (".5") stay."""
    words = (LEFT_EDGE.sub("", word.rstrip(EDGES), 1) for word in surface(text).split())
    return " ".join(filter(None, words))


def words_key(text: str) -> str:
    """Two texts that are not numbers agree by `normalize_answer`; with digits by `bare_words`: "5.2 million" is not
    "52 million". "" where no word is left."""
    words = normalize_answer(text)
    return bare_words(text) if words and re.search("[0-9]", words) else words


def alias_match(prediction: str, alias: str) -> bool:
    """Whether an alias is in the output as whole words: "US" is also a substring of "Australia"."""
    return bare_words(alias) != "" and f" {bare_words(alias)} " in f" {bare_words(prediction)} "


def correct(prediction: str, gold: str, aliases: Sequence[str] = ()) -> bool:
    """The verdict behind p@1, p@n and maj@n: the gold is in the output, or an alias is as whole words."""
    return substring_match(prediction, gold) or any(alias_match(prediction, alias) for alias in aliases)


# --- 2. Numbers -------------------------------------------

# ASCII digits only. Each repetition is over a class that the next part cannot start with: no backtracking.
NUMBER = re.compile(r"((?<![\w.)%])-)?[$€£]? ?((?<![\w.)%])-)?"
                    r"((?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:(?<=[0-9])[eE][-+]?[0-9]{1,3}(?![0-9]))?)")
GROUPED = re.compile(r"[0-9]*|[0-9]{1,3}(,[0-9]{3})+")
SPACED = re.compile(r"(?<![\w.,])[0-9]{1,3}(?:[ \u00a0\u2009\u202f][0-9]{3}(?![0-9]))+")
MINUS = re.compile(r"(?:\b(?:minus|negative) ?|[-\u2010-\u2015\u2212\ufe63\uff0d])\(?(?=[$€£]?[.0-9])|\u2212", re.I)
# Digits behind or before these are no number by themselves: 1.000.000, 0x42, 1e9999, 2^42, 1/42, 6 * 7, 42k.
BEFORE = re.compile(r"([0-9][.,'_·\uff0cex]|[\w)] ?[\^/÷×] ?|[0-9)] ?[*+] ?|[0-9]\*\*)[-+($]*$", re.I)
AFTER = re.compile(r"[.^/*][0-9]| ?k\b", re.I)
UNIT = re.compile(r"\s{0,2}(?:(\\?%|(?:percent|per cent|pct)\b)|"
                  r"(thousand|million|mn|m|billion|bn|b|trillion|t)s?\b)", re.I)
POWER = {"thousand": 3, "million": 6, "mn": 6, "m": 6, "billion": 9, "bn": 9, "b": 9, "trillion": 12, "t": 12}
MAX_DIGITS = 28  # of a number, also the precision of Decimal


class Number(NamedTuple):
    """A number as written: "$2.33 million" is value 2.33, decimals 2, power 6."""
    value: Decimal
    decimals: int
    percent: bool
    power: int  # of ten, from the unit; 0 if there is none


def plain_number(text: str) -> str:
    """The text with "-" for every dash at a number and for "minus", and without spaces in "1 000"."""
    return SPACED.sub(lambda match: re.sub("[^0-9]", "", match[0]), MINUS.sub("-", text.strip()))


def parse_number(text: str, last: bool = True) -> Number | None:
    """The last (or first) number of a text, with its sign and unit; None if there is none, or only a part of one.
    Parentheses mean a negative number only where they enclose the whole text, as in accounts."""
    text = plain_number(text)
    bracketed = text.startswith("(") and text.rstrip(" %.").endswith(")")
    matches = list(NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1 if last else 0]
    start, end = match.span(3)
    before, after = text[max(0, start - 6):start], text[end:end + 6]
    digits, _, exponent = match.group(3).rstrip(",").lower().partition("e")
    if (end - start > MAX_DIGITS or not GROUPED.fullmatch(digits.partition(".")[0]) or BEFORE.search(before)
            or AFTER.match(after) or before[-1:].isnumeric() or after[:1].isnumeric()):  # 42\u00b2, other scripts
        return None
    percent, power = UNIT.match(text, end).groups() if UNIT.match(text, end) else (None, None)
    value = Decimal(digits.replace(",", "")).scaleb(int(exponent or 0))
    alone = bracketed and match.start() == 1 and len(matches) == 1
    negative = bool(match.group(1) or match.group(2)) or alone
    return Number(-value if negative else value, max(0, -value.as_tuple().exponent),
                  bool(percent) or (bracketed and text.endswith("%")), POWER[power.lower()] if power else 0)


def _rounds_to(value: Decimal, gold: Number) -> bool:
    """Whether value, in the gold's unit, is the gold at the gold's precision (a half may round either way)."""
    return abs(value - gold.value) <= Decimal(5).scaleb(-gold.decimals - 1)


def _same_number(number: Number, gold: Number) -> bool:
    """numeric_match on parsed numbers."""
    value = number.value
    if number.percent == gold.percent:
        # two units count as written; a unit that one side leaves out may be in the question
        readings = [value.scaleb(number.power - gold.power)] + [value] * (not (number.power and gold.power))
        return any(_rounds_to(reading, gold) for reading in readings)
    if number.power or gold.power:
        return False
    # A reading that agrees on one digit only, or ignores a written %, has to be exact: 73% is not 1, 13.9% is not 14.
    rounded = len(gold.value.as_tuple().digits) > 1
    if gold.percent:  # 0.14464, or 14.46 without its sign, for 14.5%
        return value == gold.value or (rounded and _rounds_to(value, gold)) or _rounds_to(value.scaleb(2), gold)
    fraction = value.scaleb(-2)  # 14.46% for 0.145; 14.5% for 14.5
    return value == gold.value or fraction == gold.value or (rounded and _rounds_to(fraction, gold))


def numeric_match(prediction: str, gold: str) -> bool:
    """Whether the last number of the prediction is the gold, for FinQA and ledger.

    Allows percent against fraction, more decimals than the gold (rounded to the gold's), a unit (million, ...) that
    one side leaves out. A wrong sign, a power of ten or a missing decimal is wrong. yes/no: the prediction has one of
    the two words and not the other. Golds that are neither: equal by `words_key`.
    """
    if surface(gold) in ("yes", "no"):
        return set(normalize_answer(prediction).split()) & {"yes", "no"} == {surface(gold)}
    if exact_match(prediction, gold):
        return True
    wanted, found = parse_number(gold, last=False), parse_number(prediction)
    if wanted is None:
        return words_key(gold) != "" and words_key(prediction) == words_key(gold)
    return found is not None and _same_number(found, wanted)


# --- 3. Verdicts ------------------------------------------

def _overlap_f1(prediction: Sequence[str], gold: Sequence[str]) -> float:
    """Harmonic mean of precision and recall."""
    same = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * same / (len(prediction) + len(gold)) if same else 0.0


def hotpotqa_f1(prediction: str, gold: str) -> float:
    """hotpot_evaluate_v1.py: 0 when exactly one side is yes, no or noanswer, or both are and they differ."""
    prediction, gold = normalize_answer(prediction), normalize_answer(gold)
    if prediction != gold and {prediction, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    return _overlap_f1(prediction.split(), gold.split())


def musique_f1(prediction: str, gold: str) -> float:
    """metrics/answer.py of MuSiQue: no special words; two empty answers agree."""
    prediction, gold = normalize_answer(prediction).split(), normalize_answer(gold).split()
    return _overlap_f1(prediction, gold) if prediction and gold else float(prediction == gold)


def verdicts(dataset: str, prediction: str, gold: str, aliases: Sequence[str] = ()) -> dict[str, float]:
    """All verdicts on one answer, each in [0, 1].

    correct: by gold or alias. By the gold alone: paper, the paper's evaluation, and exact, the training reward. em, f1:
    as the official evaluators of HotpotQA (gold alone) and MuSiQue (the best of gold and aliases).
    numeric, for FinQA and ledger: `numeric_match` with gold or alias; FinQA's own evaluator cannot grade text.
    """
    golds = (gold, *aliases)
    results = {"correct": correct(prediction, gold, aliases), "paper": substring_match(prediction, gold),
               "exact": exact_match(prediction, gold)}
    if dataset in ("finqa", "ledger"):
        results["numeric"] = any(numeric_match(prediction, y) for y in golds)
    elif dataset in ("hotpotqa", "musique"):
        f1, official = (hotpotqa_f1, (gold,)) if dataset == "hotpotqa" else (musique_f1, golds)
        results["em"] = any(normalize_answer(prediction) == normalize_answer(y) for y in official)
        results["f1"] = max(f1(prediction, y) for y in official)
    return {name: float(verdict) for name, verdict in results.items()}


def aliases_of(record) -> tuple[str, ...]:
    """What counts beside the gold: the aliases, and FinQA's value where it is the gold in another form."""
    if record.answer not in record.value and numeric_match(record.value, record.answer):
        return (*record.aliases, record.value)
    return record.aliases


# --- 4. Metrics over samples ------------------------------

def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct, from c correct ones of n (Chen et al. 2021).
    ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def vote_key(answer: str) -> str:
    """What a vote counts: a number by its value ("$1,200.0" and "1200" agree; "14%", "14" and "-14%" do not), other
    text by `words_key`. "": no answer."""
    bare = plain_number(surface(answer).rstrip("."))
    alone = len(bare) <= 2 * MAX_DIGITS and NUMBER.fullmatch(bare.rstrip("%)( ").removeprefix("("))
    number = parse_number(bare) if alone else None
    if number is None:
        return words_key(answer)
    return f"{(number.value + 0).normalize():f}{'%' if number.percent else ''}"


def majority_vote(answers: Sequence[str]) -> str:
    """The answer that most samples agree on, in the form that most of them wrote; "" if all are empty.

    Votes are counted by `vote_key`, before any verdict. An empty answer has none. Ties go to what appears first.
    """
    keys = [vote_key(answer) for answer in answers]
    ranked = Counter(filter(None, keys)).most_common(1)  # a Counter keeps the order of appearance in ties
    forms = Counter(answer.strip() for answer, key in zip(answers, keys) if ranked and key == ranked[0][0])
    return forms.most_common(1)[0][0] if ranked else ""


def per_prompt(answers: Sequence[Sequence[str] | None], records: Sequence) -> dict[str, list[float]]:
    """p@1, p@n and maj@n of every prompt, in [0, 1], from n samples each; None, a prompt that was too long,
    counts as wrong. ValueError if the lengths disagree."""
    sizes = {len(samples) for samples in answers if samples is not None}
    if len(answers) != len(records) or len(sizes) != 1 or 0 in sizes:
        raise ValueError("answers must hold the same number (at least one) of samples for each record")
    n, hits, votes = sizes.pop(), [], []
    for samples, record in zip(answers, records):
        gold, aliases = record.answer, aliases_of(record)
        hits.append(sum(correct(answer, gold, aliases) for answer in samples or ()))
        votes.append(float(correct(majority_vote(samples or ()), gold, aliases)))
    return {"p@1": [pass_at_k(n, c, 1) for c in hits],
            f"p@{n}": [pass_at_k(n, c, n) for c in hits],
            f"maj@{n}": votes}


def summarize(answers: Sequence[Sequence[str] | None], records: Sequence) -> dict[str, float]:
    """The means of `per_prompt` in percent."""
    return {name: 100 * fmean(values) for name, values in per_prompt(answers, records).items()}


def bootstrap_interval(values: Sequence[float], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean, by resampling prompts (not samples) with replacement."""
    generator = random.Random(seed)
    means = sorted(fmean(generator.choices(values, k=len(values))) for _ in range(resamples))
    return means[round(0.025 * (resamples - 1))], means[round(0.975 * (resamples - 1))]


# --- 5. Evaluation of a checkpoint ------------------------

FROM_RUN = ("data", "start", "prompt_limit", "think_budget", "answer_budget", "rollout", "eval_samples", "dtype",
            "seed")  # fields of tsallis_rl.Config
RULES = """  p@1, p@n, maj@n: a sample, any of n, the majority vote has the gold in it, or an alias as whole words
  paper: the gold in it, which is the paper's rule; exact: is the gold; numeric, em, f1: see `verdicts` in eval.py"""


def settings_of(given: dict, split: str):
    """The evaluation's Config. For RUN/best and RUN/last it is the run's, on the validation split with the number of
    prompts, but for what is given."""
    import tsallis_rl
    path = user_path(given["model"]).parent / "config.json"
    saved = read_object(path).get("settings") or {}
    names = FROM_RUN + ("limit", "eval_limit") * (split == "validation")
    taken = {name: saved[name] for name in names if name in saved and name not in given}
    if taken:
        say(f"as in {path}: " + ", ".join(f"{name} {value}" for name, value in taken.items()))
    config = tsallis_rl.resolve(tsallis_rl.Config(**taken, **given))
    if split == "validation" and "limit" not in given:
        limits = {config.limit, config.eval_limit} - {None}
        config = replace(config, limit=min(limits, default=None))
    return config


def grade(dataset: str, record, samples: Sequence[str] | None) -> dict:
    """One line of the per-example JSONL; null instead of samples where the prompt was too long."""
    vote, aliases = majority_vote(samples or ()), aliases_of(record)
    results = [verdicts(dataset, answer, record.answer, aliases) for answer in samples or ("",)]
    return {"id": record.id, "gold": record.answer, "aliases": aliases, "answers": samples, "vote": vote,
            "verdicts": results, "vote_verdicts": verdicts(dataset, vote, record.answer, aliases)}


def tabulate(lines: list[dict], n: int) -> dict[str, tuple[float, float, float]]:
    """{metric: (value, low, high)} in percent: p@1, p@n, maj@n by each of `verdicts`; "correct" is not named."""
    columns = {}
    for verdict in lines[0]["vote_verdicts"]:
        prefix = "" if verdict == "correct" else f"{verdict} "
        samples = [[results[verdict] for results in line["verdicts"]] for line in lines]
        columns[f"{prefix}p@1"] = list(map(fmean, samples))
        columns[f"{prefix}p@{n}"] = list(map(max, samples))
        columns[f"{prefix}maj@{n}"] = [line["vote_verdicts"][verdict] for line in lines]
    return {name: tuple(100 * x for x in (fmean(column), *bootstrap_interval(column)))
            for name, column in columns.items()}


def evaluate(given: dict, split: str = "test", out: str | None = None, overwrite: bool = False) -> None:
    """Loads, samples, grades; prints the table, then writes the per-example JSONL."""
    import tsallis_rl
    config = settings_of(given, split)
    records = load(config.data, split, config.limit)
    name = "-".join(("eval", *Path(config.model).parts[-2:], Path(config.data).name, split, config.start))
    path = user_path(out or re.sub(r"[^\w.-]", "_", name)[:200] + ".jsonl")
    claim_file(path, overwrite)  # now rather than after the sampling
    answers = tsallis_rl.answers_to(config, records)
    lines = [grade(dataset_name(config.data), *pair) for pair in zip(records, answers)]
    fitting = sum(samples is not None for samples in answers)
    if fitting < len(records):
        say(f"{fitting} of {len(records)} prompts fit --prompt-limit {config.prompt_limit}; the others count as wrong")
    say(f"{config.model} on {config.data}, {split}: {len(records)} prompts, {config.eval_samples} samples, "
        f"{config.start} start, seed {config.seed}; percent, 95% bootstrap intervals over prompts\n{RULES}")
    table = tabulate(lines, config.eval_samples)
    for name, (value, low, high) in table.items():
        say(f"  {name:14s} {value:5.1f}  [{low:.1f}, {high:.1f}]")
    cells = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, low, high in table.values()]
    say("\n| model | data | prompts | " + " | ".join(table) + " |\n" + "|---" * (len(table) + 3) + "|")
    say(f"| {config.model} | {config.data} {split} {config.start} | {len(records)} | " + " | ".join(cells) + " |")
    write_atomic(path, jsonl(lines))
    say(f"answers in {path}")


# --- 6. Figures -------------------------------------------

PANELS = {"val_maj@": "validation maj@n (%)", "log_P_mean": "mean log P",
          "above_eps": "share of weights with |gradient| > eps", "ess": "effective sample size of the weights",
          "effective_reward_max": "largest (w_m / wbar^q) / M^q", "amplified_advantage_max": "largest c_m / M^q"}


def read_curve(run: str, panel: str) -> list[tuple[float, float]]:
    """(step, value) of a panel from RUN/metrics.jsonl, where both are numbers that a figure can show."""
    rows = read_log(user_path(run) / "metrics.jsonl")
    points = [(row.get("step"), value) for row in rows for key, value in row.items() if key.startswith(panel)]
    return [point for point in points if all(type(x) in (int, float) and abs(x) < 1e30 for x in point)]


def plot(runs: list[str], out: str) -> None:
    """Learning curves (top) and the quantities of Figure 3 (bottom), one line per run, as PNG."""
    if not out.lower().endswith(".png"):
        raise UserError(f"--out {out}: with --plot it must end in .png")
    curves = {panel: {run: read_curve(run, panel) for run in runs} for panel in PANELS}
    if not any(any(lines.values()) for lines in curves.values()):
        raise UserError(f"{' '.join(runs)}: no metrics.jsonl with a step is there")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7), layout="constrained")
    for axis, (panel, lines) in zip(axes.flat, curves.items()):
        for run, points in lines.items():
            name = Path(run).resolve().name.replace("$", r"\$").lstrip("_")  # else a formula begins, or no label
            steps, values = zip(*points) if points else ((), ())
            axis.plot(steps, values, label=name, marker="." if len(points) < 30 else None)
        axis.set(xlabel="step", ylabel=PANELS[panel])
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(user_path(out), dpi=150, format="png")
    say(f"wrote {out}")


# --- 7. Command line --------------------------------------

def run(argv: Sequence[str] | None = None) -> None:
    """Evaluates or plots."""
    import tsallis_rl
    parser = Parser(prog="eval.py", description="Evaluate a checkpoint, or plot runs.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--plot", nargs="+", metavar="RUN", help="Draw these run folders instead.")
    add_settings(mode, tsallis_rl.Config, ["model"])
    add_settings(parser, tsallis_rl.Config, (*FROM_RUN, "limit", "gpu_share", "token_budget"))
    parser.add_argument("--split", choices=SPLITS, help="Which part of the data. Default: test.")
    parser.add_argument("--out", help="The per-example JSONL, or the PNG of --plot.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the JSONL if it exists.")
    given = vars(parser.parse_args(argv))
    own = {name: given.pop(name) for name in ("plot", "split", "out", "overwrite") if name in given}
    if "plot" in own:
        plot(own["plot"], own.get("out", "curves.png"))
    else:
        evaluate(given, **own)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 2, with one line on stderr, for what the user can mend."""
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
