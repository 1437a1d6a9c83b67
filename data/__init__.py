"""Questions with one gold answer each, from four sources.

    load("ledger", "train")              the small task that comes along (data/ledger)
    load("finqa", "validation")          a benchmark from the Hub, at a pinned revision
    load("finqa:PATH", "test")           the same from its official files: a folder, or one file
    load("hotpotqa-gold:PATH", "train")  the supporting paragraphs alone; also musique-gold
    load("PATH", "train")                your own: a folder with train.jsonl, validation.jsonl,
                                         test.jsonl, or one JSONL file, split 80/10/10

A line of JSONL has id, warm_prompt, cold_prompt, answer (strings) and perhaps aliases (a list).

Prompts (Section 7 of the paper; the words are ours). The cold prompt is context and question.
The warm prompt adds the task and the form of the gold answer: a percentage with one decimal, yes
or no, a short span. Without the form, w = p(y*|x*, z) would measure the guess between "14%",
"14.5%" and "0.145". The form tells neither digits nor sign.

Subsets have the paper's sizes; where there are fewer rows, all are used. HotpotQA and MuSiQue
take validation and test from dev. The paper does not say how it drew them: here rows are sorted
by the SHA-256 of their id, whatever their order in the file. Both share no page of FinQA. But
MuSiQue composes questions of single-hop ones (2hop__123_456 of 123 and 456), and those they may
share: in a file of 100 dev rows, 21 of 43 test rows have one that validation has too.
"""
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from unicodedata import category

from data.files import UserError, named, parse, read_jsonl, read_text

SPLITS = ("train", "validation", "test")
LEDGER = Path(__file__).resolve().parent / "ledger"
YES_NO = "Answer with yes or no, and nothing else."
SPAN = "Answer with a short span (a name, a date, a number or a few words), and nothing else."


@dataclass(frozen=True)
class Record:
    """One question. `answer` is y*, the only text that w scores. `aliases` count in evaluation
    only. So does `value`, FinQA's exe_ans, where it is the answer in another form."""
    id: str
    warm_prompt: str
    cold_prompt: str
    answer: str
    aliases: tuple[str, ...] = ()
    value: str = ""


# --- Own records ----------------------------------------------------------------------
def usable(answer: str) -> bool:
    """Whether a text can be a gold answer: with a letter, digit or symbol, without </think>."""
    return "</think>" not in answer and any(
        char.isalnum() or ord(char) > 127 and category(char)[0] == "S" for char in answer)


def checked(record: Record, where: str) -> Record:
    """The record with its answer stripped. UserError for what no tokenizer or verifier takes."""
    for name, value in vars(record).items():
        for text in value if name == "aliases" else [value]:
            if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
                raise UserError(f"{where}: {name!r} must be a string of valid Unicode, "
                                f"not {text!r:.40}")
    if not usable(record.answer):
        raise UserError(f"{where}: no answer with a letter or a digit and without </think>")
    return replace(record, answer=record.answer.strip())


def read_records(path: Path) -> list[Record]:
    """Records of a JSONL file, in file order. UserError names the file and the line."""
    records = []
    try:
        for number, row in read_jsonl(path):
            where, aliases = f"{path}, line {number}", row.get("aliases") or []
            if not isinstance(aliases, list):
                raise UserError(f"{where}: 'aliases' must be a list of strings")
            fields = map(row.get, ("id", "warm_prompt", "cold_prompt", "answer"))
            records.append(checked(Record(*fields, aliases=tuple(aliases)), where))
        if not records:
            raise UserError(f"{path}: the file is empty")
    except UserError as error:
        raise UserError(f"{error}; it takes one JSON object a line with id, warm_prompt, "
                        "cold_prompt, answer") from None
    return records


def _load_own(path: Path, split: str) -> list[Record]:
    """A split of a folder, or of one file; there a question never is on two sides."""
    if path.is_dir():
        records, train = read_records(path / f"{split}.jsonl"), path / "train.jsonl"
        if split == "validation" and train.exists() and set(records) <= set(read_records(train)):
            raise UserError(f"{path}: train.jsonl has all the records of validation.jsonl")
        return records
    records = read_records(path)
    questions = [record.cold_prompt for record in records]
    part = draw(questions, _shares(len(records), SPLITS))[SPLITS.index(split)]
    if not part:
        raise UserError(f"{path}: {len(set(questions))} different cold prompts: too few to split")
    return [records[i] for i in sorted(part)]


def draw(groups: Sequence[str | None], sizes: Sequence[int]) -> list[list[int]]:
    """Disjoint lists of indices into `groups`, of these sizes, in the order of SHA-256. A group
    stays whole, so a list may be longer by the rest of its last one. None is never drawn."""
    def place(i: int) -> tuple[bytes, int]:
        return hashlib.sha256(f"tsallis\n{groups[i]}".encode("utf-8", "surrogatepass")).digest(), i

    parts: list[list[int]] = [[] for _ in sizes]
    order = sorted((i for i, group in enumerate(groups) if group is not None), key=place)
    for _, members in groupby(order, key=groups.__getitem__):
        part = next((part for part, size in zip(parts, sizes) if len(part) < size), [])
        part += members
    return parts


# --- FinQA ----------------------------------------------------------------------------
AMOUNT = re.compile(  # every part is optional: it always matches, possibly nothing
    r"(\()? ?([-+]?) ?(\$?) ?([-+]?)([0-9][0-9,]*)?(\.[0-9]*)? ?(\))? ?"
    r"(%|per ?cent\b|(?:thousand|million|billion|trillion)s?\b)? ?(\))?", re.I)
OTHER_UNIT = re.compile(
    r"(?:[kmb]n?|mln|tn|bps?|basis|percentage|pp|points?|cents?|times|x)\b", re.I)


def clean_finqa_gold(answer: str) -> str:
    """FinQA's `answer` as yes, no, [-][$]digits[.digits][%| million], or text as it is.

    `answer` is what the annotator wrote ("14%"), `exe_ans` what the annotated program gives
    (0.14464). In substance they differ on about 6% of rows. `answer` is the gold, as in the
    paper's row counts. Only notation changes. Spaces, "\\n", thousands separators, what is counted
    ("101 stores" -> "101") and a second form ("$500 or $.5 thousand" -> "$500") go. "( 4.2 )"
    becomes "-4.2", ".5%" "0.5%", "14 percent" "14%". "25 basis points" or "$1.2B" stays."""
    answer = " ".join(re.sub(r"\\+n", " ", answer).split())
    if answer.lower().rstrip(" .") in ("yes", "no"):
        return answer.lower().rstrip(" .")
    amount = AMOUNT.match(answer)
    opened, sign, dollar, sign2, whole, decimals, closed, unit, closed2 = amount.groups("")
    rest = answer[amount.end():].strip()
    two_numbers = re.search("[0-9]", rest) and not rest.startswith("or ")
    if not whole + decimals.strip(".") or two_numbers or OTHER_UNIT.match(rest):
        return answer
    minus = "-" if "-" in sign + sign2 or (opened and closed + closed2) else ""
    unit = "%" if unit[:3].lower() in ("%", "per") else f" {unit.lower().rstrip('s')}".rstrip()
    return minus + dollar + (whole.replace(",", "") or "0") + decimals.rstrip(".") + unit


def finqa_form(gold: str) -> str:
    """The sentence of the warm prompt that gives the form of a gold of `clean_finqa_gold`."""
    amount = re.fullmatch(r"-?(\$?)[0-9]+(?:\.([0-9]+))?(%| [a-z]+)?", gold)
    if not amount:
        return YES_NO if gold in ("yes", "no") else "Answer with a short phrase, and nothing else."
    dollar, decimals, unit = amount.groups("")
    kind = "a percentage" if unit == "%" else "an amount" if dollar or unit else "a plain number"
    n = len(decimals)
    rounded = f"{n} decimal{'s' if n > 1 else ''}" if n else "a whole number"
    form = f"{dollar}N{'.' if n else ''}{'N' * n}{unit}"
    return (f"Answer with {kind} rounded to {rounded}, in the form {form} (with a minus sign if "
            "it is negative; no thousands separators, no other unit), and nothing else.")


def finqa_record(row: dict) -> Record:
    """A row of FinQA's official JSON (question and answers under `qa`), or of its flat copy on
    the Hub. The context is pre_text, the table with " | " between its cells, and post_text."""
    qa = row.get("qa", row)
    gold = clean_finqa_gold(qa["answer"])
    table = "\n".join(" | ".join(map(str, cells)) for cells in _list(row["table"], list))
    before, after = (" ".join(_list(row[name])) for name in ("pre_text", "post_text"))
    task = ("Below are the text and the table of one page of a company's financial report. "
            "Answer the question about it; work out the numbers step by step before you answer.")
    return _record(row["id"], task, "\n".join([before, table, after]), qa["question"],
                   finqa_form(gold), gold, value=str(qa.get("exe_ans", "")).strip())


def finqa_group(row: dict) -> str | None:
    """The page: its questions share a context. None without a usable gold answer."""
    answer = row.get("qa", row).get("answer") or ""
    return row["filename"] if usable(clean_finqa_gold(answer)) else None


def _list(value, kind: type = str) -> list:
    """value, a list of `kind`. TypeError for others: a string would count as its letters."""
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise TypeError(f"{value!r:.40} is not a list of {kind.__name__}")
    return value


def _record(id_, task: str, context: str, question: str, form: str, gold: str, **more) -> Record:
    cold = f"{context}\n\nQuestion: {question.strip()}"
    return Record(id_, f"{task}\n\n{cold}\n\n{form}", cold, gold, **more)


# --- HotpotQA and MuSiQue -------------------------------------------------------------
def _multi_hop(row: dict, paragraphs: list[tuple[str, str]], aliases: Sequence[str]) -> Record:
    """(title, text) of the paragraphs; the question needs more than one of them."""
    if not paragraphs:
        raise ValueError("no (supporting) paragraph")
    gold = row["answer"].strip()
    form = YES_NO if gold in ("yes", "no") else SPAN
    task = ("Below are titled paragraphs. Answer the question from them; it takes facts from "
            "more than one, so combine them step by step before you answer.")
    context = "\n\n".join("\n".join(_list([title, text])) for title, text in paragraphs)
    also = tuple(alias for alias in aliases if alias.strip() and alias != gold)
    return _record(multi_hop_group(row), task, context, row["question"], form, gold, aliases=also)


def hotpotqa_record(row: dict, gold_only: bool = False) -> Record:
    """A row of HotpotQA, official (context: [[title, [sentence, ...]], ...]) or of the Hub
    ({title: [...], sentences: [...]}). gold_only: only what `supporting_facts` names."""
    pairs, facts = row["context"], row["supporting_facts"] if gold_only else []
    if isinstance(pairs, dict):
        pairs = zip(pairs["title"], pairs["sentences"], strict=True)
    titles = facts["title"] if isinstance(facts, dict) else [title for title, _ in facts]
    return _multi_hop(row, [(title, " ".join(map(str.strip, _list(sentences))))
                            for title, sentences in pairs if not gold_only or title in titles], [])


def musique_record(row: dict, gold_only: bool = False) -> Record:
    """A row of MuSiQue-Ans, official or of the Hub. gold_only: only what `is_supporting`."""
    paragraphs = [(p["title"], p["paragraph_text"]) for p in row["paragraphs"]
                  if not gold_only or p["is_supporting"]]
    return _multi_hop(row, paragraphs, _list(row.get("answer_aliases") or []))


def multi_hop_group(row: dict) -> str | None:
    """The id. None without a usable gold answer, or where MuSiQue-Full says "unanswerable"."""
    known = row.get("answerable", True) and usable(row.get("answer") or "")
    return row.get("_id") or row["id"] if known else None


# --- Benchmarks -----------------------------------------------------------------------
@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lives, and how its rows become records."""
    hub: str
    config: str | None
    revision: str                # a commit there
    files: tuple[str, str, str]  # train, validation, test. Two the same: test is drawn from it,
                                 # from the Hub's validation split as well
    home: str                    # where the files are
    sizes: tuple[int, int, int]  # rows in the paper, the most that are taken
    record: Callable[[dict], Record]
    group: Callable[[dict], str | None] = multi_hop_group  # stays in one split; None: dropped
    columns: tuple[str, ...] = ("id", "answer")  # what `group` reads on the Hub


BENCHMARKS = {
    "finqa": Benchmark(  # the owner is bevaya by now: the Hub forwards the name
        "rootsautomation/FinQA", None, "3d6a736bc67e06bc15fbf3618d88204a57c5b25e",
        ("train.json", "dev.json", "test.json"), "czyssrs/FinQA on GitHub",
        (6145, 872, 1132), finqa_record, finqa_group, ("filename", "answer")),
    "hotpotqa": Benchmark(
        "hotpotqa/hotpot_qa", "distractor", "1908d6afbbead072334abe2965f91bd2709910ab",
        ("hotpot_train_v1.1.json", *["hotpot_dev_distractor_v1.json"] * 2),
        "the HotpotQA home page", (9067, 342, 343), hotpotqa_record),
    "musique": Benchmark(
        "dgslibisey/MuSiQue", None, "c8f4f8c9465fb69d31a8eae894c3fd509c4ca321",
        ("musique_ans_v1.0_train.jsonl", *["musique_ans_v1.0_dev.jsonl"] * 2),
        "StonyBrookNLP/musique on GitHub", (9985, 579, 445), musique_record),
}
BENCHMARKS |= {f"{name}-gold": replace(spec, record=partial(spec.record, gold_only=True))
               for name, spec in BENCHMARKS.items() if name in ("hotpotqa", "musique")}


def _hub_rows(spec: Benchmark, split: str, hint: str):
    """A datasets.Dataset of one split on the Hub. UserError when it cannot be had."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # or each retry prints lines
    try:
        from datasets import load_dataset
        return load_dataset(spec.hub, spec.config, split=split, revision=spec.revision)
    except Exception as error:  # offline, timed out, moved, not installed: the way out is one
        raise UserError(f"no {spec.hub} from the Hub: {type(error).__name__}; {hint}") from None


def _file_rows(file: Path, hint: str) -> list[dict]:
    """The rows of an official file: one JSON list, or JSONL."""
    if not file.exists():
        raise UserError(f"{file.parent} has no {file.name}; {hint}")
    text = read_text(file)
    listed = text.lstrip().startswith("[")
    return parse(text, str(file), list) if listed else [row for _, row in read_jsonl(file)]


def _shares(rows: int, splits: Sequence[str], spec: Benchmark | None = None) -> list[int]:
    """How many of the usable rows of a file go to each of the splits that share it."""
    if len(splits) == 3:  # one file for everything
        tenth = max(1, round(rows / 10))
        return [rows - 2 * tenth, tenth, tenth]
    paper = [size for split, size in zip(SPLITS, spec.sizes) if split in splits]
    total = min(rows, sum(paper))
    first = round(total * paper[0] / sum(paper))
    return [first, total - first][:len(splits)]


def _each(function: Callable, rows: Iterable[tuple[int, dict]], source, name: str) -> Iterator:
    """function(row) of every (index, row). UserError names a row of another format."""
    for i, row in rows:
        try:
            yield function(row)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{source}, row {i + 1}: not in {name}'s official format "
                            f"({type(error).__name__}: {error})") from None


def _load_benchmark(name: str, path: Path | None, split: str, limit: int | None) -> list[Record]:
    """The records of a split: read, drop rows without an answer, draw, convert the drawn."""
    spec, files = BENCHMARKS[name], BENCHMARKS[name].files
    if path and not (path / files[2]).exists():
        files = (*files[:2], files[1])  # FinQA without test.json: dev.json serves for both
    hint = (f"--data {name}:PATH takes a file, or a folder with {', '.join(dict.fromkeys(files))} "
            f"(from {spec.home})")
    file = files[SPLITS.index(split)]
    splits = [s for s, other in zip(SPLITS, files) if other == file]
    if path is None:
        source, rows = f"{spec.hub} on the Hub", _hub_rows(spec, splits[0], hint)
        light = rows.select_columns(list(spec.columns))
    else:
        source, splits = (path / file, splits) if path.is_dir() else (path, SPLITS)
        light = rows = _file_rows(source, hint)
    groups = list(_each(spec.group, enumerate(light), source, name))
    shares = _shares(sum(group is not None for group in groups), splits, spec)
    drawn = draw(groups, shares)[splits.index(split)][:limit]
    if not drawn:
        raise UserError(f"{source}: no row with an answer for {split} in {len(groups)} rows")
    records = _each(spec.record, ((i, rows[i]) for i in drawn), source, name)
    return [checked(record, f"{source}, row {i + 1}") for i, record in zip(drawn, records)]


def dataset_name(data: str) -> str:
    """What verdicts and defaults go by: ledger, finqa, hotpotqa, musique, or else custom."""
    name, path = data.split(":")[0], os.path.expanduser(data)
    if name in BENCHMARKS or data == "ledger":
        return name.removesuffix("-gold")
    return "ledger" if os.path.exists(path) and os.path.samefile(path, LEDGER) else "custom"


# Model and budgets of the three benchmarks are the paper's (its Section 7). The rest is ours.
LAB_MODEL = str(LEDGER / "model")
HUB = dict(model="Qwen/Qwen3-0.6B", answer_budget=128, steps=200, lr=2e-6, eval_every=40,
           eval_limit=128)
DEFAULTS = {
    "ledger": dict(model=LAB_MODEL, think_budget=24, answer_budget=8, steps=80, lr=3e-4,
                   eval_every=20),
    "finqa": HUB | dict(think_budget=4096 - 128),
    "hotpotqa": HUB | dict(think_budget=3072 - 128),
    "musique": HUB | dict(think_budget=2048 - 128),
    "custom": HUB | dict(think_budget=2048 - 128),
}


def defaults(data: str) -> dict:
    """The settings that a run with this data has where nothing else is said. Among them is
    `data` itself, with an absolute path if it has one."""
    name, colon, path = data.rpartition(":")
    path = os.path.abspath(os.path.expanduser(path))
    known = data in BENCHMARKS or data == "ledger" or not os.path.exists(path)
    return DEFAULTS[dataset_name(data)] | {"data": data if known else name + colon + path}


def load(data: str, split: str, limit: int | None = None) -> list[Record]:
    """The records of a split, at most `limit`; `data` as at the top of this file. UserError, in
    one line, for what cannot be loaded. Prompts are not measured here."""
    name, colon, location = data.partition(":")
    name, location = (name, location) if name in BENCHMARKS else ("", data)
    path = LEDGER if data == "ledger" else Path(os.path.expanduser(location))
    with named(data):
        if name and not colon:
            return _load_benchmark(name, None, split, limit)
        if not location or not (path.is_dir() or path.is_file()):  # a device would have no end
            raise UserError(f"unknown data {data!r}: neither ledger, {', '.join(BENCHMARKS)} nor a "
                            "file or folder (with NAME: before it if it is a benchmark's)")
        return (_load_benchmark(name, path, split, limit) if name else
                _load_own(path, split)[:limit])
