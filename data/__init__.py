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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.files import UserError, parse, read_jsonl, read_text
from eval import numeric_match

SPLITS = ("train", "validation", "test")
SEED = "tsallis"  # of every draw below


DataError = UserError  # until every caller says UserError


@dataclass(frozen=True)
class Record:
    """One question. `answer` is y*, the only text that w scores; `aliases` count in evaluation only."""
    id: str
    warm_prompt: str
    cold_prompt: str
    answer: str
    aliases: tuple[str, ...] = ()


# --- Files ------------------------------------------------------------------------------------------------------------

def _read_rows(path: Path) -> list[dict]:
    """The rows of an official benchmark file: one JSON list, or JSONL."""
    text = read_text(path)
    return parse(text, str(path)) if text.lstrip().startswith("[") else [row for _, row in read_jsonl(path)]


def _text(row: dict, key: str, where: str) -> str:
    """row[key] as text that a tokenizer accepts, or DataError."""
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is missing or not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {key!r} is not valid Unicode (a lone surrogate)") from None
    return value


def read_records(path: str | Path) -> list[Record]:
    """Records of a JSONL file, in file order. DataError on anything malformed and on a record without an answer."""
    return [_record(row, f"{path}, line {number}") for number, row in read_jsonl(path)]


def _record(row: dict, where: str) -> Record:
    if not isinstance(row.get("answer"), str) or not row["answer"].strip():
        raise DataError(f"{where}: the record has no answer")
    aliases = row.get("aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise DataError(f"{where}: 'aliases' must be a list of strings")
    fields = [_text(row, key, where) for key in ("id", "warm_prompt", "cold_prompt", "answer")]
    return Record(*fields, aliases=tuple(aliases))


# --- Draws ------------------------------------------------------------------------------------------------------------

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


# --- FinQA ------------------------------------------------------------------------------------------------------------

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


def finqa_record(row: dict, where: str) -> Record:
    """A row of FinQA's official JSON (question and answers under `qa`) or of its flattened copy on the Hub.

    Prompt: pre_text, the table with one row per line and cells joined by " | ", post_text. `exe_ans` becomes an alias
    where it is the same value in another form (0.14464 for 14%).
    """
    qa = row.get("qa", row)
    gold = clean_finqa_gold(_text(qa, "answer", where))
    table = "\n".join(" | ".join(map(str, cells)) for cells in row["table"])
    context = "\n".join([" ".join(row["pre_text"]), table, " ".join(row["post_text"])])
    value = str(qa.get("exe_ans", "")).strip()
    aliases = (value,) if gold not in value and numeric_match(value, gold) else ()
    return _prompts(row["id"], "Below are the text and the table of one page of a company's financial report. Answer "
                    "the question about it; work out the numbers step by step before you answer.",
                    context, qa["question"], finqa_form(gold), gold, aliases)


def finqa_group(row: dict) -> str | None:
    """The page: its questions share a context. None without a gold answer, as in the paper's row counts."""
    return row["filename"] if clean_finqa_gold(row.get("qa", row).get("answer") or "") else None


# --- HotpotQA and MuSiQue ---------------------------------------------------------------------------------------------

def _prompts(id_: str, task: str, context: str, question: str, form: str, gold: str, aliases: tuple) -> Record:
    cold = f"{context}\n\nQuestion: {question.strip()}"
    return Record(id_, f"{task}\n\n{cold}\n\n{form}", cold, gold, aliases)


def _multi_hop(id_: str, paragraphs: list[tuple[str, str]], question: str, gold: str, aliases: list[str]) -> Record:
    """Titled paragraphs, most of which are distractors, and a question whose answer needs several of them."""
    form = ("Answer with yes or no, and nothing else." if gold in ("yes", "no") else
            "Answer with a short span (a name, a date, a number or a few words), and nothing else.")
    context = "\n\n".join(f"{title}\n{text}" for title, text in paragraphs)
    task = ("Below are titled paragraphs. Answer the question from them; it takes facts from more than one, so combine "
            "them step by step before you answer.")
    return _prompts(id_, task, context, question, form, gold, tuple(a for a in aliases if a.strip() and a != gold))


def hotpotqa_record(row: dict, where: str) -> Record:
    """A row of HotpotQA's official JSON (context: [[title, [sentence, ...]], ...]) or of its copy on the Hub
    (context: {title: [...], sentences: [[...], ...]}). The gold answer is only stripped."""
    context = row["context"]
    pairs = zip(context["title"], context["sentences"]) if isinstance(context, dict) else context
    paragraphs = [(title, " ".join(sentence.strip() for sentence in sentences)) for title, sentences in pairs]
    return _multi_hop(multi_hop_group(row), paragraphs, row["question"], _text(row, "answer", where).strip(), [])


def musique_record(row: dict, where: str) -> Record:
    """A row of MuSiQue-Ans, official JSONL and Hub alike. The gold answer is only stripped."""
    paragraphs = [(paragraph["title"], paragraph["paragraph_text"]) for paragraph in row["paragraphs"]]
    aliases = row.get("answer_aliases") or []
    return _multi_hop(row["id"], paragraphs, row["question"], _text(row, "answer", where).strip(), aliases)


def multi_hop_group(row: dict) -> str | None:
    """The id. None without a gold answer, and where MuSiQue-Full says that the question has none."""
    usable = row.get("answerable", True) and str(row.get("answer") or "").strip()
    return row.get("_id") or row["id"] if usable else None


# --- Benchmarks: the Hub, official files, the paper's subsets ---------------------------------------------------------

@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lives and how its rows become records."""
    hub: str
    config: str | None
    revision: str
    hub_splits: tuple[str, str, str]    # the Hub's split that holds our train, validation and test
    prefix: str                         # of local file names
    official: str                       # the official files, in words
    sizes: tuple[int, int, int]         # rows of train, validation and test in the paper
    group: Callable[[dict], str | None]
    group_columns: tuple[str, ...]      # the Hub's columns that `group` reads
    record: Callable[[dict, str], Record]

    @property
    def public_test(self) -> bool:
        """Whether all three official splits have answers: they are then used whole."""
        return len(set(self.hub_splits)) == 3


BENCHMARKS = {
    "finqa": Benchmark(  # the owner was renamed bevaya since; the Hub forwards the name, the commit is the same
        "rootsautomation/FinQA", None, "3d6a736bc67e06bc15fbf3618d88204a57c5b25e", ("train", "validation", "test"),
        "finqa", "train.json, dev.json and test.json of czyssrs/FinQA on GitHub",
        (6145, 872, 1132), finqa_group, ("filename", "answer"), finqa_record),
    "hotpotqa": Benchmark(
        "hotpotqa/hotpot_qa", "distractor", "1908d6afbbead072334abe2965f91bd2709910ab",
        ("train", "validation", "validation"),
        "hotpot", "hotpot_train_v1.1.json and hotpot_dev_distractor_v1.json of the HotpotQA home page",
        (9067, 342, 343), multi_hop_group, ("id", "answer"), hotpotqa_record),
    "musique": Benchmark(
        "dgslibisey/MuSiQue", None, "c8f4f8c9465fb69d31a8eae894c3fd509c4ca321", ("train", "validation", "validation"),
        "musique", "musique_ans_v1.0_train.jsonl and _dev.jsonl of StonyBrookNLP/musique on GitHub",
        (9985, 579, 445), multi_hop_group, ("id", "answer"), musique_record),
}
SPLIT_WORDS = {"train": "train", "dev": "dev|valid|validation", "test": "test"}


def _hub_rows(name: str, split: str):
    """One split of a benchmark as a datasets.Dataset. DataError when it cannot be had."""
    spec = BENCHMARKS[name]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # or each of its five retries prints two lines
    try:
        from datasets import load_dataset
        return load_dataset(spec.hub, spec.config, split=spec.hub_splits[SPLITS.index(split)], revision=spec.revision)
    except Exception as error:  # offline, timed out, moved, not installed: the way out is the same
        raise DataError(f"cannot load {spec.hub} from the Hub ({type(error).__name__}): pass the official files "
                        f"instead, --data {name}:PATH ({spec.official})") from None


def _split_file(folder: Path, name: str, word: str) -> Path | None:
    """The file of a folder that holds the official train, dev or test split; None if there is none.

    Files named after the benchmark go before others. Passed over: FinQA's private test set, HotpotQA's fullwiki and
    MuSiQue-Full variants.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".jsonl"))
    files = [file for file in files if file.name.startswith(BENCHMARKS[name].prefix)] or files
    pattern = f"(?<![a-z])({SPLIT_WORDS[word]})(?![a-z])"
    files = [file for file in files if re.search(pattern, file.name) and not re.search("private|full", file.name)]
    if len(files) > 1:
        raise DataError(f"{folder} has several {word} files of {name} ({', '.join(file.name for file in files)}): "
                        f"pass one file, --data {name}:FILE, or a folder with one of them")
    return files[0] if files else None


def _find_file(folder: Path, name: str, split: str) -> tuple[Path, tuple[str, ...]]:
    """The file of a folder to read for a split, and the splits that share that file."""
    test = _split_file(folder, name, "test") if split != "train" and BENCHMARKS[name].public_test else None
    word = "train" if split == "train" else "test" if test and split == "test" else "dev"
    file = test if word == "test" else _split_file(folder, name, word)
    if file is None:
        raise DataError(f"{folder} has no {word} file of {name} (official: {BENCHMARKS[name].official})")
    return file, (split,) if word == "train" or test else ("validation", "test")


def _shares(rows: int, splits: tuple[str, ...], spec: Benchmark) -> list[int]:
    """How many of the usable rows go to each of the splits that share them."""
    if splits == SPLITS:  # one file for everything
        tenth = max(1, round(rows / 10))
        return [rows - 2 * tenth, tenth, tenth]
    paper = [spec.sizes[SPLITS.index(split)] for split in splits]
    total = rows if spec.public_test else min(rows, sum(paper))
    first = round(total * paper[0] / sum(paper))
    return [first, total - first][:len(splits)]


def _each(function: Callable[[dict, str], object], rows: Iterable[tuple[int, dict]], source, name: str) -> list:
    """function(row, "source, row n") of every row. DataError for a row that is not in the official format."""
    results = []
    for i, row in rows:
        try:
            results.append(function(row, f"{source}, row {i + 1}"))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{source}, row {i + 1}: not in {name}'s official format "
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
    records = _each(spec.record, ((i, rows[i]) for i in drawn[:limit]), source, name)
    if not records:
        raise DataError(f"{source}: no row with an answer is left for the {split} split ({len(groups)} rows in all)")
    return records


# --- The one entry ----------------------------------------------------------------------------------------------------

def dataset_name(data: str) -> str:
    """What eval.score takes: ledger, finqa, hotpotqa, musique (also with :PATH), or custom for everything else."""
    name = data.split(":", 1)[0]
    return name if name == data == "ledger" or name in BENCHMARKS else "custom"


def load(data: str, split: str, limit: int | None = None) -> list[Record]:
    """The records of a split, at most `limit`. DataError, in one line, for whatever cannot be loaded.

    data: see the module docstring. split: train, validation or test. Prompts are not measured here: whoever has the
    tokenizer drops those that are too long.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: use train, validation or test")
    name, _, location = data.partition(":")
    if name in BENCHMARKS and (location or name == data):
        path = Path(location).expanduser() if location else None
        if path and not path.exists():
            raise DataError(f"{path} does not exist (--data {name}:PATH takes the official file or its folder)")
        return _load_benchmark(name, path, split, limit)
    path = Path(__file__).parent / "ledger" if data == "ledger" else Path(data).expanduser()
    if not data or not path.exists():
        raise DataError(f"unknown data {data!r}: it is neither ledger, finqa, hotpotqa, musique (or one of these three "
                        "with :PATH) nor an existing file or folder")
    return _load_own(path, split)[:limit]


def _load_own(path: Path, split: str) -> list[Record]:
    """A folder with one JSONL file per split, or one file split 80/10/10; the same question never on two sides."""
    if path.is_dir():
        file = path / f"{split}.jsonl"
        if not file.exists():
            raise DataError(f"{path} has no {file.name}")
        return read_records(file)
    records = read_records(path)
    tenth = max(1, round(len(records) / 10))
    parts = draw([record.cold_prompt for record in records], (len(records) - 2 * tenth, tenth, tenth))
    part = parts[SPLITS.index(split)]
    if not part:
        raise DataError(f"{path}: {len(records)} records are too few to split into train, validation and test")
    return [records[i] for i in sorted(part)]
