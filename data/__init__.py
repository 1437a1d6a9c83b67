"""Questions with one gold answer each, from four sources, in one record.

    load("ledger", "train")                 the small bundled set (data/ledger)
    load("finqa", "validation")             a benchmark from the Hub, at a pinned revision
    load("finqa:PATH", "test")              the same benchmark from its official files (a folder, or one file)
    load("PATH", "train")                   your own records: a folder with train.jsonl, validation.jsonl and
                                            test.jsonl, or one JSONL file, split 80/10/10

A line of JSONL holds id, warm_prompt, cold_prompt, answer and, optionally, aliases (a list of strings).

Two prompts (Section 7 of the paper). The *warm* prompt is a task description, the context, the question and the form
that the answer must have. The *cold* prompt is the context and the question alone. The paper does not print its
prompts: these are ours.

The form (percent, plain number, amount with a unit, yes or no, short span; for numbers also how many decimals) is
read off the gold answer, because w = p(y*|x*, z) would otherwise measure the guess between "14%", "14.5%" and "0.145"
rather than the reasoning. It says nothing about digits or sign.

Subsets, as counted in the paper: FinQA keeps every row with a gold answer; HotpotQA draws 9,067 rows of train and
342 + 343 of dev, MuSiQue 9,985 and 579 + 445. How the paper drew them is not said: here rows are ordered by the SHA-256
of a fixed seed and their id, so the draw depends on no library, no platform and not on the order of the file. Fewer
rows than that are all used, dev in the same proportions. Rows about the same page never fall on two sides of a draw.
"""
import hashlib
import json
import logging
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category

from data.files import UserError, named, parse, read_jsonl, read_text

PUNCTUATION = str.maketrans("", "", string.punctuation)
SPLITS = ("train", "validation", "test")
SEED = "tsallis"  # of every draw below
CLOSE = "</think>"  # ends a rationale; an answer that held it could not be told from one


@dataclass(frozen=True)
class Record:
    """One question. `answer` is y*, the only text that w scores; `aliases` count in evaluation only, and so does
    `value` (FinQA's exe_ans) where eval.py finds that it is the answer in another form."""
    id: str
    warm_prompt: str
    cold_prompt: str
    answer: str
    aliases: tuple[str, ...] = ()
    value: str = ""


# --- Files ------------------------------------------------

def _read_rows(path: Path) -> list[dict]:
    """The rows of an official benchmark file: one JSON list, or JSONL."""
    text = read_text(path)
    return parse(text, str(path), list) if text.lstrip().startswith("[") else [row for _, row in read_jsonl(path)]


def usable(answer: str) -> bool:
    """Whether a text can be a gold answer: it has a letter, a digit or a symbol, and no </think>."""
    return CLOSE not in answer and any(category(character)[0] in "LNS" for character in answer.translate(PUNCTUATION))


def checked(record: Record, where: str) -> Record:
    """The record; UserError for a field that no tokenizer accepts, and for an answer that is not `usable`."""
    for name, value in vars(record).items():
        for text in value if name == "aliases" else [value]:
            if not isinstance(text, str):
                raise UserError(f"{where}: {name!r} {'is missing' if text is None else 'must be a string'}")
            if re.search("[\ud800-\udfff]", text):
                raise UserError(f"{where}: {name!r} is not valid Unicode (a lone surrogate)")
    if not usable(record.answer):
        raise UserError(f"{where}: the record has no answer: one has a letter or a digit, and no {CLOSE} in it")
    return record


def texts(value, kind: type = str) -> list:
    """value, a list of strings (or of `kind`). TypeError for others: a string would be taken for its letters."""
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise TypeError(f"{value!r:.40} is not a list of {kind.__name__}")
    return value


def read_records(path: str | Path) -> list[Record]:
    """Records of a JSONL file, in file order. UserError for anything malformed."""
    records = []
    for number, row in read_jsonl(path):
        where, aliases = f"{path}, line {number}", row.get("aliases") or []
        if not isinstance(aliases, list):
            raise UserError(f"{where}: 'aliases' must be a list of strings")
        fields = map(row.get, ("id", "warm_prompt", "cold_prompt", "answer"))
        records.append(checked(Record(*fields, aliases=tuple(aliases)), where))
    return records


# --- Draws ------------------------------------------------

def draw(groups: Sequence[str | None], sizes: Sequence[int]) -> list[list[int]]:
    """Disjoint index lists of the given sizes, in the order of SHA-256(SEED, group).

    Indices with the same group stay in the same list, which may then be longer than asked by the rest of that group.
    The group None is never drawn.
    """
    def place(i: int) -> tuple[bytes, int]:
        return hashlib.sha256(f"{SEED}\n{groups[i]}".encode("utf-8", "surrogatepass")).digest(), i

    parts: list[list[int]] = [[] for _ in sizes]
    part, previous = 0, None
    for i in sorted((i for i, group in enumerate(groups) if group is not None), key=place):
        while part < len(sizes) and len(parts[part]) >= sizes[part] and groups[i] != previous:
            part += 1
        if part == len(sizes):
            break
        parts[part].append(i)
        previous = groups[i]
    return parts


# --- FinQA ------------------------------------------------

AMOUNT = re.compile(r"(\()? ?([-+]?) ?(\$?) ?([-+]?)([0-9][0-9,]*)?(\.[0-9]+)? ?(%|(?:thousand|million|billion)\b)?")


def clean_finqa_gold(answer: str) -> str:
    """FinQA's `answer` as y*: "" if there is none, else yes, no, [-][$]digits[.digits][%| million], or text as it is.

    `answer` is what the annotator wrote ("14%"), rounded as people round; `exe_ans` is what the annotated program
    gives ("0.14464"). The two differ in form on half of the rows and in substance on about 6%. `answer` is the gold
    here: it is short, its precision is part of the question, and the paper's row counts are those of its non-empty
    values. Only notation changes: a stray "\\n" and the tokenizer's spaces go ("$ 5 million" -> "$5 million"), and so
    do thousands separators and what follows the amount ("101 stores per year" -> "101", "$ 500 or $ .5 thousand" ->
    "$500"); "( 4.2 )" becomes "-4.2", ".5%" becomes "0.5%".
    """
    answer = " ".join(re.sub(r"\\+n", " ", answer).split())
    if answer.lower().rstrip(" .") in ("yes", "no"):
        return answer.lower().rstrip(" .")
    amount = AMOUNT.match(answer)  # every part is optional: it always matches, possibly nothing
    bracket, sign, dollar, inner_sign, digits, decimals, unit = amount.groups(default="")
    rest = answer[amount.end():].strip()
    if not digits + decimals or (re.search("[0-9]", rest) and not rest.startswith("or ")):
        return answer
    negative = "-" in sign + inner_sign or (bracket and rest.startswith(")"))
    number = (digits.replace(",", "") or "0") + decimals
    return ("-" if negative else "") + dollar + number + (unit if unit in ("", "%") else f" {unit}")


def finqa_form(gold: str) -> str:
    """The sentence of the warm prompt that fixes the form, and only the form, of a gold from `clean_finqa_gold`."""
    if gold in ("yes", "no"):
        return "Answer with yes or no, and nothing else."
    amount = re.fullmatch(r"-?(\$?)[0-9]+(?:\.([0-9]+))?(%| [a-z]+)?", gold)
    if not amount:
        return "Answer with a short phrase, and nothing else."
    dollar, decimals, unit = amount.group(1), len(amount.group(2) or ""), amount.group(3) or ""
    kind = "a percentage" if unit == "%" else "an amount" if dollar or unit else "a plain number"
    rounded = "a whole number" if not decimals else f"{decimals} decimal{'s' if decimals > 1 else ''}"
    form = f"{dollar}N{'.' if decimals else ''}{'N' * decimals}{unit}"
    return (f"Answer with {kind} rounded to {rounded}, in the form {form} (with a minus sign if it is negative; no "
            "thousands separators, no other unit), and nothing else.")


def finqa_record(row: dict) -> Record:
    """A row of FinQA's official JSON (question and answers under `qa`) or of its flattened copy on the Hub.

    Prompt: pre_text, the table with one row per line and cells joined by " | ", post_text. `exe_ans` is the answer's
    value as the annotated program computes it (0.14464 for 14%).
    """
    qa = row.get("qa", row)
    gold = clean_finqa_gold(qa["answer"])
    table = "\n".join(" | ".join(map(str, cells)) for cells in texts(row["table"], list))
    context = "\n".join([" ".join(texts(row["pre_text"])), table, " ".join(texts(row["post_text"]))])
    return _prompts(row["id"], "Below are the text and the table of one page of a company's financial report. Answer "
                    "the question about it; work out the numbers step by step before you answer.",
                    context, qa["question"], finqa_form(gold), gold, value=str(qa.get("exe_ans", "")).strip())


def finqa_group(row: dict) -> str | None:
    """The page: its questions share a context. None without a usable gold answer, as in the paper's row counts."""
    return row["filename"] if usable(clean_finqa_gold(row.get("qa", row).get("answer") or "")) else None


# --- HotpotQA and MuSiQue ---------------------------------

def _prompts(id_: str, task: str, context: str, question: str, form: str, gold: str, **more) -> Record:
    cold = f"{context}\n\nQuestion: {question.strip()}"
    return Record(id_, f"{task}\n\n{cold}\n\n{form}", cold, gold, **more)


def _multi_hop(id_: str, paragraphs: list[tuple[str, str]], question: str, gold: str, aliases: list[str]) -> Record:
    """Titled paragraphs, most of which are distractors, and a question whose answer needs several of them."""
    form = ("Answer with yes or no, and nothing else." if gold in ("yes", "no") else
            "Answer with a short span (a name, a date, a number or a few words), and nothing else.")
    context = "\n\n".join("\n".join(texts([title, text])) for title, text in paragraphs)
    task = ("Below are titled paragraphs. Answer the question from them; it takes facts from more than one, so combine "
            "them step by step before you answer.")
    aliases = tuple(alias for alias in aliases if alias.strip() and alias != gold)
    return _prompts(id_, task, context, question, form, gold, aliases=aliases)


def hotpotqa_record(row: dict) -> Record:
    """A row of HotpotQA's official JSON (context: [[title, [sentence, ...]], ...]) or of its copy on the Hub
    (context: {title: [...], sentences: [[...], ...]}). The gold answer is only stripped."""
    context = row["context"]
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    paragraphs = [(title, " ".join(map(str.strip, texts(sentences)))) for title, sentences in pairs]
    return _multi_hop(multi_hop_group(row), paragraphs, row["question"], row["answer"].strip(), [])


def musique_record(row: dict) -> Record:
    """A row of MuSiQue-Ans, official JSONL and Hub alike. The gold answer is only stripped."""
    paragraphs = [(paragraph["title"], paragraph["paragraph_text"]) for paragraph in row["paragraphs"]]
    aliases = texts(row.get("answer_aliases") or [])
    return _multi_hop(row["id"], paragraphs, row["question"], row["answer"].strip(), aliases)


def multi_hop_group(row: dict) -> str | None:
    """The id. None without a usable gold answer, and where MuSiQue-Full says that the question has none."""
    return row.get("_id") or row["id"] if row.get("answerable", True) and usable(row.get("answer") or "") else None


# --- Benchmarks: the Hub, official files, the subsets -----

@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lives and how its rows become records."""
    hub: str
    config: str | None
    revision: str
    hub_splits: tuple[str, str, str]    # the Hub's split that holds our train, validation and test
    files: tuple[str, str, str]         # the official file that holds our train, validation and test
    home: str                           # where they are
    sizes: tuple[int, int, int]         # rows of train, validation and test in the paper
    group: Callable[[dict], str | None]
    group_columns: tuple[str, ...]      # the Hub's columns that `group` reads
    record: Callable[[dict], Record]


BENCHMARKS = {
    "finqa": Benchmark(  # the owner was renamed bevaya since; the Hub forwards the name, the commit is the same
        "rootsautomation/FinQA", None, "3d6a736bc67e06bc15fbf3618d88204a57c5b25e", ("train", "validation", "test"),
        ("train.json", "dev.json", "test.json"), "czyssrs/FinQA on GitHub",
        (6145, 872, 1132), finqa_group, ("filename", "answer"), finqa_record),
    "hotpotqa": Benchmark(
        "hotpotqa/hotpot_qa", "distractor", "1908d6afbbead072334abe2965f91bd2709910ab",
        ("train", "validation", "validation"),
        ("hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json", "hotpot_dev_distractor_v1.json"),
        "the HotpotQA home page", (9067, 342, 343), multi_hop_group, ("id", "answer"), hotpotqa_record),
    "musique": Benchmark(
        "dgslibisey/MuSiQue", None, "c8f4f8c9465fb69d31a8eae894c3fd509c4ca321", ("train", "validation", "validation"),
        ("musique_ans_v1.0_train.jsonl", "musique_ans_v1.0_dev.jsonl", "musique_ans_v1.0_dev.jsonl"),
        "StonyBrookNLP/musique on GitHub", (9985, 579, 445), multi_hop_group, ("id", "answer"), musique_record),
}


def _hub_rows(name: str, split: str):
    """One split of a benchmark as a datasets.Dataset. UserError when it cannot be had."""
    spec = BENCHMARKS[name]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # or each of its five retries prints two lines
    try:
        from datasets import load_dataset
        return load_dataset(spec.hub, spec.config, split=spec.hub_splits[SPLITS.index(split)], revision=spec.revision)
    except Exception as error:  # offline, timed out, moved, not installed: the way out is the same
        files = ", ".join(dict.fromkeys(spec.files))
        raise UserError(f"cannot load {spec.hub} from the Hub ({type(error).__name__}): pass the official files "
                        f"instead, --data {name}:PATH ({files} of {spec.home})") from None


def _find_file(folder: Path, name: str, split: str) -> tuple[Path, tuple[str, ...]]:
    """The official file of a folder to read for a split, and the splits that share that file."""
    files = BENCHMARKS[name].files
    if not (folder / files[2]).exists():
        files = (*files[:2], files[1])  # without FinQA's test.json its dev.json serves for both
    file = folder / files[SPLITS.index(split)]
    if not file.exists():
        raise UserError(f"{folder} has no {file.name} (see {BENCHMARKS[name].home}); a single file may have any name: "
                        f"--data {name}:FILE")
    return file, tuple(split for split, other in zip(SPLITS, files) if other == file.name)


def _shares(rows: int, splits: tuple[str, ...], spec: Benchmark) -> list[int]:
    """How many of the usable rows go to each of the splits that share them."""
    if splits == SPLITS:  # one file for everything
        tenth = max(1, round(rows / 10))
        return [rows - 2 * tenth, tenth, tenth]
    paper = [spec.sizes[SPLITS.index(split)] for split in splits]
    total = rows if len(set(spec.files)) == 3 else min(rows, sum(paper))  # FinQA's three files are used whole
    first = round(total * paper[0] / sum(paper))
    return [first, total - first][:len(splits)]


def _each(function: Callable[[dict, str], object], rows: Iterable[tuple[int, dict]], source, name: str) -> list:
    """function(row, "source, row n") of every row. UserError for a row that is not in the official format."""
    results = []
    for i, row in rows:
        try:
            results.append(function(row, f"{source}, row {i + 1}"))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{source}, row {i + 1}: not in {name}'s official format "
                            f"({type(error).__name__}: {error})") from None
    return results


def _load_benchmark(name: str, path: Path | None, split: str, limit: int | None) -> list[Record]:
    """The records of one split: read, drop rows without an answer, draw, convert only what was drawn."""
    spec = BENCHMARKS[name]
    if path is None:
        source, rows = f"{spec.hub} on the Hub", _hub_rows(name, split)
        light = rows.select_columns(list(spec.group_columns))
        splits = tuple(s for s, hub in zip(SPLITS, spec.hub_splits) if hub == spec.hub_splits[SPLITS.index(split)])
    else:
        source, splits = _find_file(path, name, split) if path.is_dir() else (path, SPLITS)
        rows = light = _read_rows(source)
    groups = _each(lambda row, where: spec.group(row), enumerate(light), source, name)
    shares = _shares(sum(group is not None for group in groups), splits, spec)
    drawn = draw(groups, shares)[splits.index(split)]
    chosen = ((i, rows[i]) for i in drawn[:limit])
    records = _each(lambda row, where: checked(spec.record(row), where), chosen, source, name)
    if not records:
        raise UserError(f"{source}: no row with an answer is left for the {split} split ({len(groups)} rows in all)")
    return records


# --- The one entry ----------------------------------------

def dataset_name(data: str) -> str:
    """What eval.score takes: ledger, finqa, hotpotqa, musique (also with :PATH), or custom for everything else."""
    name = data.split(":", 1)[0]
    return name if name == data == "ledger" or name in BENCHMARKS else "custom"


def load(data: str, split: str, limit: int | None = None) -> list[Record]:
    """The records of a split, at most `limit`. UserError, in one line, for whatever cannot be loaded.

    data: see the module docstring. split: train, validation or test. Prompts are not measured here: whoever has the
    tokenizer drops those that are too long.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: use train, validation or test")
    name, _, location = data.partition(":")
    with named(data):
        if name in BENCHMARKS and (location or name == data):
            path = Path(location).expanduser() if location else None
            if path and not path.exists():
                raise UserError(f"{path} does not exist (--data {name}:PATH takes the official file or its folder)")
            return _load_benchmark(name, path, split, limit)
        path = Path(__file__).parent / "ledger" if data == "ledger" else Path(data).expanduser()
        if not data or not path.exists():
            raise UserError(f"unknown data {data!r}: it is neither ledger, finqa, hotpotqa, musique (or one of these "
                            "three with :PATH) nor an existing file or folder")
        return _load_own(path, split)[:limit]


def _load_own(path: Path, split: str) -> list[Record]:
    """A folder with one JSONL file per split, or one file split 80/10/10; the same question never on two sides."""
    if path.is_dir():
        file = path / f"{split}.jsonl"
        if not file.exists():
            raise UserError(f"{path} has no {file.name}")
        return read_records(file)
    records = read_records(path)
    questions = [record.cold_prompt for record in records]
    tenth = max(1, round(len(records) / 10))
    part = draw(questions, (len(records) - 2 * tenth, tenth, tenth))[SPLITS.index(split)]
    if not part:
        raise UserError(f"{path}: {len(set(questions))} different questions (cold_prompt) in {len(records)} records "
                        "are too few to split into train, validation and test")
    return [records[i] for i in sorted(part)]
