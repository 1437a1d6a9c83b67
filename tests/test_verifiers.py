"""Verdicts, votes and metrics of data/verifiers.py, on text that no model has to write."""
import random
import time
from itertools import combinations

import pytest

from data import Record
from data import verifiers as ver

DATASETS = ("finqa", "ledger", "hotpotqa", "musique", "custom")


def record(answer, *aliases, **more):
    return Record("r", "warm", "cold", answer, aliases, **more)


@pytest.mark.parametrize("answer, gold, exact, paper", [
    (" Yes\n", "yes", 1, 1), ("New  York", "new york", 1, 1), ("1.45%", "14.5%", 0, 0),
    ("14.5", "14.5%", 0, 0), ("142", "42", 0, 1), ("It is 14.5%.", "14.5%", 0, 1),
    ("**14.5**%", "14.5%", 0, 0), ("6,960", "6960", 0, 0), ("", "", 0, 0),
    ("<think>Paris</think> London", "Paris", 0, 1), ("O\u2019Hare", "O'Hare", 0, 0),
    ("a", "A", 1, 1), ("a car", "A", 0, 0), ("the answer.", ".", 0, 0)])
def test_reward_and_paper(answer, gold, exact, paper):
    """Reward and paper's rule forgive case and white space, and no markup."""
    verdict = ver.verdicts("custom", answer, gold)
    assert (verdict["exact"], verdict["paper"]) == (exact, paper)


@pytest.mark.parametrize("gold", ["A", "a", "An", "The", "A+", "A-"])
def test_gold_of_one_article(gold):
    """A gold that normalisation empties can be right and win a vote; no answer is wrong."""
    for name in DATASETS:
        right = ver.verdicts(name, gold, gold)
        assert right["correct"] and right["paper"] and right["exact"]
        assert not any(ver.verdicts(name, " \n", gold).values())
    assert set(ver.summarize([[gold] * 16], [record(gold)]).values()) == {100}
    assert ver.majority_vote([gold] * 12 + ["B"] * 4) == gold
    assert ver.correct(f"**{gold}**", gold) and not ver.correct("a b the an", gold)


@pytest.mark.parametrize("answer, gold, aliases, right", [
    ("Australia", "U.S.", ("US", "America"), 0), ("It is the US.", "U.S.", (), 1),
    ("-0.1446", "14%", ("0.1446",), 0), (".25", "25.0", ("25",), 0), ("(.25)!", "x", (".25",), 1),
    ("It was America.", "U.S.", ("America",), 1), ("No one knows", "x", ("no",), 0),
    ("It cannot be determined", "seemingly in Italy", ("it",), 0),
    ("Let us see", "America", ("us",), 0), ("US.", "America", ("us",), 1),
    ("The answer is US", "America", ("us",), 1), ("all of them", "x", ("them",), 0),
    ("<think>maybe Paris</think> London", "Paris", (), 0), ("I choose D.", "C", (), 0),
    ("<think>Rome</think> Paris", "Paris", (), 1), (r"\boxed{\text{No}}", "no", (), 1),
    (r"It is \(14.5\%\)", "14.5%", (), 1), ("**0.4**%", "0.4%", (), 1), ("because", "B", (), 0),
    (r"\boxed{1{,}234}", "1234", (), 1), ("The answer is A.", "A", (), 1)])
def test_headline(answer, gold, aliases, right):
    """The gold in plain text, or an alias as whole words; short aliases are the whole answer."""
    assert ver.correct(answer, gold, aliases) == bool(right)


@pytest.mark.parametrize("one, other", [
    ("O\u2019Hare", "O'Hare"), ("1990\u20131995", "1990-1995"), ("Zo\u00eb", "Zoe"),
    ("U.S.", "US"), ("6,960", "6960"), ("10\u202f000", "10 000"), ("\u201ca b\u201d", '"a b"')])
def test_typography(one, other):
    """Forms of quotes, dashes, accents, spaces and thousands are one answer, both ways."""
    assert ver.correct(f"It is {one}", other) and ver.correct(f"It is {other}", one)
    assert ver.vote_key(one) == ver.vote_key(other)


RIGHT = {
    "14.5%": ["14.46%", "0.145", "14.5", "The answer is 14.5%.", r"\boxed{14.5\%}", r"\(14.5\%\)",
        r"$14.5\%$", "**14.5%**", "`14.5%`", "14.5% in 2009", "14.5% (2019)", "14.5% [1]",
        "14.5%, up from 12.1%", "14.5% = 145/1000", "14.5% higher than the 12.1% of 2008",
        "14.5% of sales of $786 million", "14.5%\n\nSales were 786 in 2009 and 686 in 2008.",
        "Answer: 14.5%\nExplanation: 786 / 686 - 1", "14.5%, since sales were 786",
        "\u2248 14.5 %. Sales were 7.", "### Answer\n14.5%",
        "((786 - 686) / 686) \xd7 100 \u2248 14.5%", r"\frac{100}{690} = 14.5\%",
        "14.5 percentage points", "<think>It is 3.</think>14.5%",
        "It was 14.5% (786 in 2009, 686 in 2008).", "It is 14.5%, since 786 is more than 686.",
        "It is 14.5%. I hope the answer is clear."],
    "26.8%": ["(5.2 - 4.1)/4.1 = 0.268 or 26.8%", "26.8% ((5.2-4.1)/4.1)",
        "from 4.1 to 5.2, or 26.8%", "100 million, or 26.8%"],
    "-786": ["$(786)$", "(786)", "**(786)**", "Answer: (786)", "USD (786)", "net loss of (786)",
        "-786 ( 786 )", "-$786", "$-786", "\u2212786", "minus 786", "it fell by 786"],
    "-786 million": ["(786) million", "($786) million", "($786 million)", "-$786 million"],
    "-14.5%": ["(14.5%)", "(14.5)%", "\u2212 14.5%"], "14%": ["0.14464", "0.14 (14%)", "1.4464e-1"],
    "7 million": [r"\boxed{7} million", "**7** million", "$7$ million"],
    "1234": [r"\boxed{1{,}234}", "$1,234.0", "1 234", r"1\,234"],
    "0.8": ["4/5", "4:5", r"\frac{4}{5}"],
    "$103.7 million": ["$ 103.7 million", "103.7", "103,700,000", "103.7M"],
    "42": ["**42**", "the total **is** 42", "2010\u20132012: 42", "answer\u201442", "US$42",
        "Q3 42", "42M", "It was 42 at December 31, 2009.", "42 in 3 years",
        "$42 of the total of $45"],
    "yes": ["Yes.", "yes, there is no doubt", "Yes (no decline)", "The answer is yes.", "**Yes**"],
    "no": ["No, it did not", r"\boxed{\text{No}}", "so no", "no, not yes"],
    "$7.2 billion": ["7.2b", "7.2bn", "0.0072 trillion"], "14": ["13.9%"],
    "8.59%": ["8.59% for the S&P 500"], "7%": ["7% of shops in May 2011", "0.0724"],
    "0.07": ["7.24%"], "786": ["786, or 3/4 of sales"], "3": ["3:1"], "-3": ["-2.6"], "1": ["100%"],
    "0.5%": [".5%"], "12.4": ["12.39"], "12.3": ["12.35"], "-12%": ["-0.125", "You lose 12%."],
    "-42": ["\u201342", "minus 42"], "1000000": ["1 000 000"], "-12.4%": ["It declined 12.4%."],
    "862": ["1. Add the two.\n2. The total is 862."], "1500": ["1.5 thousand"],
    "12": ["5 in Europe plus 7 in Asia are 12."], "2.3": ["2.3x"], "12.34": ["12.3", "12.338"],
    "$9 or $.5 million": ["$9 or $.5 million"]}
WRONG = {
    "14.5%": ["1.45%", "145%", "0.0145", "-14.5%", "14.5 to 15%", "14.5-15%", "14.56%"],
    "14%": ["", "nan", "12% (not 14%)", "12%, not 14%"], "12.34": ["12", "12.4"], "1.23": ["1.2"],
    "1": ["73%", "3:1", "0.6%", "1/42", "1. Add the two.\n2. The total is 1,331,862."],
    "$103.7 million": ["103.7 billion", "1.037", "103.7B"],
    "686": ["786 - 686", "786 - 686 = 100", "100, compared with 786 in 2009 and 686 in 2008"],
    "yes": ["yes and no", "not yes", "no", "1", "yes or no"], "no": ["not known", "yes", "not no"],
    "42": ["\u201342", "minus 42", "Negative $42", "-(42)", "42k", "1,42", "2^42", "2**42",
        r"6 \times 42", "1.000.042", "1 042", "42\xb2", "B42", "6 * 42"],
    "12.1%": ["14.5%, up from 12.1%", "from 12.1% to 14.5%"], "0": ["14%", "1.000.000"],
    "2019": ["14.5% (2019)"], "-7": ["rose (see page 7)"], "786": ["$(786)", "net loss of (786)"],
    "40%": ["**0.4**%"], "7 million": ["**7** billion", "$7$ billion"],
    "7 billion": [r"\boxed{7} million"], "5": [r"-\boxed{5}", "4:5"], "1%": ["1.16"],
    "104%": ["$104 million"], "1234": ["123", "12,34"], "3": ["\u0663"], "-14.5%": ["(0.145)%"],
    "4.1": ["(5.2-4.1)/4.1"], "12.4": ["12.3499"], "0.3": ["0.3%"], "10.57%": ["10.57% * Year 1"]}
RIGHT["42"] += [f"It rose 42 {words}" for words in (
    "from 38 to 80", "between 38 and 80", "than 38", "versus 38", "vs 38", "vs. 38", "not 38",
    "compared to 38", "including 38", "out of 80", "page 7", "note 9", "followed by 38")]
RIGHT["42"] += [f"Compared to 38 {x} 42, versus 38" for x in ", is was are were".split()]


@pytest.mark.parametrize("right, table", [(1, RIGHT), (0, WRONG)])
def test_numbers(right, table):
    """Another form of a number is right. Another number is wrong, as is one beside the answer."""
    for gold, texts in table.items():
        failed = [x for x in texts if ver.verdicts("finqa", x, gold)["numeric"] != right]
        assert not failed, gold


@pytest.mark.parametrize("gold, value, aliases", [
    ("14%", "0.14464", ("0.14464", "14%")), ("-3.2%", "-16.0", ()), ("0.1", "0.01", ()),
    ("45.3%", "0.4538", ("0.4538", "45.4%")), ("66.94", "0.6694", ("0.6694", "66.94%")),
    ("58.6%", "-0.58621", ("-0.58621", "-58.6%")), ("10861", "10863.0", ()),
    ("56.75%", "56.75676", ("56.75676", "56.76%")), ("-3.2%", "0.032", ()), ("7 M", "7", ())])
def test_finqa_value(gold, value, aliases):
    """exe_ans is an alias if it is the gold in another form, or cut or without % or sign."""
    assert ver.aliases_of(record(gold, value=value)) == aliases
    assert ver.aliases_of(record(gold, "x", value=value)) == ("x", *aliases)
    assert all(ver.verdicts("finqa", text, gold, aliases)["numeric"] for text in aliases)


@pytest.mark.parametrize("dataset, answer, gold, em, f1", [
    ("hotpotqa", "yes it is", "yes", 0, 0), ("hotpotqa", "yes", "no", 0, 0),
    ("hotpotqa", "noanswer given", "noanswer", 0, 0), ("hotpotqa", "no", "no way", 0, 0),
    ("hotpotqa", "Yes.", "yes", 1, 1), ("hotpotqa", "The", "a", 1, 0),
    ("hotpotqa", "the Tower of London", "Tower Bridge, London", 0, 2 * 2 / (3 + 3)),
    ("hotpotqa", "US", "U.S.A.", 0, 0), ("musique", "US", "U.S.A.", 1, 1),
    ("musique", "yes it is", "yes", 0, 0.5), ("musique", "The", "a", 1, 1),
    ("musique", "", "a", 0, 0), ("musique", "x", "the", 0, 0),
    ("musique", "  The U.S.  an Apple-pie, a day ", "us applepie day", 1, 1),
    ("hotpotqa", "Theatre of another", "theatre of another \u2019", 0, 2 * 3 / (3 + 4))])
def test_em_and_f1(dataset, answer, gold, em, f1):
    """Articles are words, and punctuation is ASCII. HotpotQA's f1 is 0 if one side alone is yes, no
    or noanswer. In MuSiQue aliases count, and two answers without words agree."""
    verdict = ver.verdicts(dataset, answer, gold, ("US",))
    assert (verdict["em"], verdict["f1"]) == pytest.approx((em, f1))


def test_verdicts_of_each_dataset():
    """paper and exact know no alias; numeric, em and f1 are for their data sets."""
    names = {name: set(ver.verdicts(name, "a", "b")) for name in DATASETS}
    assert all({"correct", "paper", "exact"} <= some for some in names.values())
    assert {name for name in DATASETS if "numeric" in names[name]} == {"finqa", "ledger"}
    assert {name for name in DATASETS if {"em", "f1"} <= names[name]} == {"hotpotqa", "musique"}
    verdict = ver.verdicts("ledger", "12", "twelve", ("12",))
    assert [verdict[name] for name in ("correct", "paper", "exact", "numeric")] == [1, 0, 0, 1]


ALPHABET = [*"0123456789.,-%$() eE+\\/:*{}[]\u2212\u0663\u00b2\uff11\ud800\x00\n\t\u00bd\u0301ab",
            "nan", "inf", "1e999", "-inf", "million", "percent", "0x10", "yes", "no", "the",
            "\\boxed{", "</think>", r"\frac{", "from ", " to ", "1/0", "0.0", "answer is "]


def test_no_string_raises():
    """Any text has verdicts in [0, 1] and a vote."""
    generator = random.Random(0)
    for _ in range(3000):
        prediction, gold = ("".join(generator.choices(ALPHABET, k=generator.randrange(12)))
                            for _ in range(2))
        for name in ("finqa", "musique"):
            verdict = ver.verdicts(name, prediction, gold, (prediction[:3],))
            assert all(0 <= value <= 1 for value in verdict.values())
        assert isinstance(ver.majority_vote([prediction, gold, prediction]), str)
        assert isinstance(ver.aliases_of(record(gold, value=prediction)), tuple)


@pytest.mark.parametrize("unit", [
    "1", "1,", "(", "( 1 ", "$ ", "-", "1 ", ".1", " ", "1.", "\u2014", r"\frac{", "**", "1:", "a.",
    "[", "1 - (", "answer is ", "1 000 ", "since "])
def test_long_text(unit):
    """100,000 characters take a second and not hours: every scan is linear."""
    text = unit * (100_000 // len(unit))
    start = time.perf_counter()
    ver.verdicts("finqa", text, "14%")
    ver.verdicts("finqa", "14%", text)
    ver.verdicts("musique", text, "New York")
    assert time.perf_counter() - start < 5, "about 0.5 s; a quadratic scan would take minutes"


@pytest.mark.parametrize("answers, vote", [
    (["Paris", "London", "the paris."], "Paris"), (["b", "c", "c", "b", "d"], "b"),
    (["14%", "$1,200.0", "1200", "-14%"], "$1,200.0"), (["2^42", "42", "2^42"], "2^42"),
    (["5.2 million", "52 million", ".5 million", "52 million"], "52 million"), (["", " "], ""),
    (["14%", "14", "14%", "14", "7", "7", "7"], "7"), (["14.0%", "14%", "14%", "3"], "14%"),
    (["", "  ", ".", "", "7"], "7"), ([], "")])
def test_majority(answers, vote):
    """The most frequent answer, before any verdict; ties go to the first, none is empty."""
    assert ver.majority_vote(answers) == vote


@pytest.mark.parametrize("same, forms", [
    (1, ("The B7", "B7")), (1, ("over 3,000", "over 3000")), (1, ("**No**", "no", "No.")),
    (1, ("14%", "14 percent", r"14\%", r"\boxed{14\%}", "**14**%", "14%, up from 12%")),
    (1, ("$14.0 million", "14 million", "14,000,000")), (1, ("1 000", "1,000", "1000")),
    (1, ("-786 ( 786 )", "(786)", "-$786", "minus 786")), (1, ("\u201342", "-42.0")),
    (1, ("The answer is Paris.", "<think>Rome</think>Paris")), (0, ("in 2004", "2004")),
    (0, ("14%", "14")), (0, ("12,34", "34")), (0, ("14 million", "14 billion")), (0, ("(5)", "5")),
    (0, ("5.2 stores", "52 stores")), (0, ("yes", "no")), (0, ("14, 15 and 16", "14")),
    (0, ("A", "A+", "A-", "B", "B+", "C", "C++", "The"))])
def test_vote_key(same, forms):
    """Forms of one answer have one key. Different answers have different keys."""
    keys = list(map(ver.vote_key, forms))
    assert "" not in keys and len(set(keys)) == (1 if same else len(keys))


def test_pass_at_k():
    """It is the share of k-subsets with a correct sample."""
    for n, c, k in [(5, 0, 2), (5, 2, 1), (5, 2, 3), (5, 4, 3), (5, 5, 5)]:
        subsets = list(combinations([True] * c + [False] * (n - c), k))
        assert ver.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for n, c, k in [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)]:
        with pytest.raises(ValueError, match="pass_at_k"):
            ver.pass_at_k(n, c, k)


def test_summarize():
    """Mean, any and vote in percent, with aliases; a prompt that was too long counts as wrong."""
    answers = [["4", "4", "5", ""], ["1", "2", "2", "3"], ["x", "y", "z", ""]]
    metrics = ver.summarize(answers, [record("4"), record("3"), record("14%", "0.14")])
    assert metrics == pytest.approx({"p@1": 25, "p@4": 200 / 3, "maj@4": 100 / 3})
    four = [record("4"), record("4")]
    assert ver.per_prompt([["9", "4", "4"], ["4", "9", "9"]], four)["maj@3"] == [1, 0]
    assert ver.summarize([["4", "4"], None], four) == {"p@1": 50, "p@2": 50, "maj@2": 50}
    assert ver.summarize([["0.14464"]], [record("14%", value="0.14464")])["p@1"] == 100
    for ragged in ([["1"], ["1", "2"]], [["1"]], [[], []]):
        with pytest.raises(ValueError, match="same number"):
            ver.summarize(ragged, four)


def test_bootstrap():
    """The interval is reproducible and near the binomial one."""
    values = [1.0] * 60 + [0.0] * 140
    low, high = ver.bootstrap_interval(values, resamples=5000)
    assert (low, high) == ver.bootstrap_interval(values, resamples=5000)
    assert (low, high) == pytest.approx((0.236, 0.364), abs=0.005), "0.3 -+ 1.96 deviations"
