"""Records of data/__init__.py, from small rows in each benchmark's official format."""
import json
import re
from pathlib import Path

import pytest

import data
from data import SPLITS, UserError, dataset_name, load

FILES = {name: spec.files for name, spec in data.BENCHMARKS.items()}


def finqa_row(number=0, answer="25%", page=None):
    return {"pre_text": ["sales follow .", "in thousands ."], "post_text": ["see note 4 ."],
            "table": [["", "2001"], ["sales", "$ 4"]], "filename": f"{page or number}.pdf",
            "qa": {"question": "what?", "answer": answer, "exe_ans": 0.25}, "id": f"f{number}"}


def hotpotqa_row(number=0, answer="Ada Byron"):
    context = [["Notes", ["Old.", " Ada's."]], ["Engines", ["An engine."]], ["Ada", ["Lady."]]]
    return {"_id": f"h{number}", "question": "Whose notes?", "answer": answer, "context": context,
            "supporting_facts": [["Ada", 0], ["Notes", 1]]}


def musique_row(number=0, answer=" Oslo"):
    paragraphs = [{"title": title, "paragraph_text": text, "is_supporting": title != "Port"}
                  for title, text in [("Munch", "A painter."), ("Port", "X."), ("Munch", "Died.")]]
    return {"id": f"2hop__{number}_9", "paragraphs": paragraphs, "question": "Where?",
            "answer": answer, "answer_aliases": ["Oslo", " ", "Christiania"]}


def own(i=0, answer="7", **more):
    return {"id": f"{i}", "warm_prompt": "w", "cold_prompt": f"{i}", "answer": answer} | more


ROWS = {"finqa": finqa_row, "hotpotqa": hotpotqa_row, "hotpotqa-gold": hotpotqa_row,
        "musique": musique_row, "musique-gold": musique_row, "own": own}


def write(path, rows):
    """The path of a file of rows, JSON or JSONL as its name says."""
    lines = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(lines)
    return path


def one_line(where, split, *words):
    """load ends with a UserError of one line that has the words."""
    with pytest.raises(UserError) as error:
        load(str(where), split)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def ids(records):
    return [record.id for record in records]


COLD = {
    "finqa": "sales follow . in thousands .\n | 2001\nsales | $ 4\nsee note 4 .\n\nQuestion: what?",
    "hotpotqa": "Notes\nOld. Ada's.\n\nEngines\nAn engine.\n\nAda\nLady.\n\nQuestion: Whose notes?",
    "hotpotqa-gold": "Notes\nOld. Ada's.\n\nAda\nLady.\n\nQuestion: Whose notes?",
    "musique": "Munch\nA painter.\n\nPort\nX.\n\nMunch\nDied.\n\nQuestion: Where?",
    "musique-gold": "Munch\nA painter.\n\nMunch\nDied.\n\nQuestion: Where?"}


def hub_row(name):
    """The row as the Hub has it."""
    row = ROWS[name]()
    if "hotpotqa" in name:
        for key, other in (("context", "sentences"), ("supporting_facts", "sent_id")):
            titles, values = zip(*row[key])
            row[key] = {"title": list(titles), other: list(values)}
    return row | row.pop("qa", {}) | {"id": row.pop("_id", row.get("id"))}


@pytest.mark.parametrize("name", COLD)
def test_benchmark(name, tmp_path, monkeypatch):
    """Prompts hold what they should, with -gold the supporting paragraphs. The Hub's rows give
    the same; without the Hub one line names the files. Test is drawn from dev, FinQA's not."""
    datasets = pytest.importorskip("datasets")
    spec, calls = data.BENCHMARKS[name], []

    def load_dataset(path, config, split, revision):
        assert (path, config, revision) == (spec.hub, spec.config, spec.revision)
        calls.append(split)
        if split != "train":
            raise ConnectionError("no network\nat all")
        return datasets.Dataset.from_list([hub_row(name)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    write(tmp_path / spec.files[0], [ROWS[name](), ROWS[name](1, "")])
    record, = load(f"{name}:{tmp_path}", "train")
    before, after = record.warm_prompt.split(COLD[name])
    assert record.cold_prompt == COLD[name] and before.startswith("Below are")
    assert ("in the form N% " if name == "finqa" else "a short span") in after
    assert record.answer + record.value in ("25%0.25", "Ada Byron", "Oslo")
    assert record.aliases == (("Christiania",) if "musique" in name else ())
    assert load(name, "train") == [record] and len(spec.revision) == 40
    one_line(name, "test", f"--data {name}:PATH", *FILES[name])
    assert calls == ["train", "test" if name == "finqa" else "validation"]
    write(tmp_path / spec.files[0], [ROWS[name](answer="yes")])
    assert "with yes or no," in load(f"{name}:{tmp_path}", "train")[0].warm_prompt


@pytest.mark.parametrize("raw, gold, form", [
    ("14%", "14%", "N%"), ("-3.20 %", "-3.20%", "N.NN%"), ("1,234", "1234", "N"),
    ("4.9\\\\n", "4.9", "N.N"), ("$ 2.33 million", "$2.33 million", "$N.NN million"),
    ("$ -5", "-$5", "$N"), ("101 stores per year", "101", "N"), (".5%", "0.5%", "N.N%"),
    ("$ 500 or $ .5 thousand", "$500", "$N"), ("( 4.2 )", "-4.2", "N.N"), ("no .", "no", ""),
    ("(17.4)%", "-17.4%", "N.N%"), ("( 17.4 % )", "-17.4%", "N.N%"), ("5.%", "5%", "N%"),
    ("14 Per cent", "14%", "N%"), ("$ 12 Millions", "$12 million", "$N million"),
    ("(7) million", "-7 million", "N million"), ("$1.2B", "$1.2B", ""),
    *((text, text, "") for text in ["3 : 1", "25 basis points", "2.5x", "net income", "."])])
def test_finqa_gold(raw, gold, form):
    """Notation is unified, a unit is never lost, and the form tells neither digits nor sign."""
    assert data.clean_finqa_gold(raw) == gold == data.clean_finqa_gold(gold)
    text = data.finqa_form(gold)
    assert f"in the form {form} (" in text if form else "in the form" not in text
    assert text == data.finqa_form(gold.replace("1", "8").replace("5", "6"))


def test_draw():
    """The draw is the published one, for every order of rows, in the paper's proportions."""
    for name, rows, sizes in [("hotpotqa", 2000, [342, 343]), ("musique", 100, [57, 43])]:
        assert data._shares(rows, SPLITS[1:], data.BENCHMARKS[name]) == sizes
        assert data._shares(20000, ["train"], data.BENCHMARKS[name])[0] in (9067, 9985)
    for groups in ([f"id{i}" for i in range(50)], [f"id{i}" for i in reversed(range(50))]):
        chosen = [groups[i] for i in data.draw(groups, [5])[0]]
        assert chosen == ["id31", "id28", "id5", "id37", "id20"]
    assert data.draw(["a", None, "b", "a", "c", "a"], [1, 1]) == [[0, 3, 5], [2]]
    assert data.multi_hop_group(musique_row() | {"answerable": False}) is None


@pytest.mark.parametrize("name", ROWS)
def test_one_file(name, tmp_path):
    """A single file is split 80/10/10, nothing twice; a limit takes the first of a split."""
    path = write(tmp_path / "all.jsonl", [ROWS[name](i) for i in range(30)])
    where = f"{name}:{path}".removeprefix("own:")
    parts = [ids(load(where, split)) for split in SPLITS]
    assert [len(part) for part in parts] == [24, 3, 3] and len(set(sum(parts, []))) == 30
    assert [ids(load(where, split, 2)) for split in SPLITS] == [part[:2] for part in parts]


def test_folder(tmp_path):
    """A folder may hold several benchmarks. Validation and test share no row and no page."""
    write(tmp_path / FILES["hotpotqa"][1], [hotpotqa_row(i) for i in range(40)])
    write(tmp_path / FILES["finqa"][1], [finqa_row(i, page=1 + i // 2) for i in range(40)])
    for name, size, per_page in [("hotpotqa", 20, 1), ("finqa", 18, 2)]:
        parts = [ids(load(f"{name}:{tmp_path}", split)) for split in SPLITS[1:]]
        assert len(parts[0]) == size and len({*parts[0], *parts[1]}) == 40
        first, second = ({int(i[1:]) // per_page for i in part} for part in parts)
        assert first.isdisjoint(second)
    write(tmp_path / "test.json", [finqa_row(99)])
    assert ids(load(f"finqa:{tmp_path}", "test")) == ["f99"]
    assert len(load(f"finqa:{tmp_path}", "validation")) == 40
    one_line(f"finqa:{tmp_path}", "train", "has no train.json", "--data finqa:PATH")


def test_own(tmp_path):
    """Own records are read as they are. Validation may not be part of train, and a split needs
    enough questions."""
    path = write(tmp_path / "train.jsonl", [own(1, " 7\n", aliases=["\u2028"]), own(2)])
    path.write_text("\ufeff" + path.read_text().replace(r"\u2028", "\u2028"))
    first, second = load(str(tmp_path), "train")
    assert vars(first) == own(1, aliases=("\u2028",), value="") and second.aliases == ()
    write(tmp_path / "validation.jsonl", [own(2), own(1, aliases=["\u2028"])])
    one_line(tmp_path, "validation", "train.jsonl has all the records of validation.jsonl")
    write(tmp_path / "validation.jsonl", [own(2), own(3)])
    assert ids(load(str(tmp_path), "validation")) == ["2", "3"]
    one_line(tmp_path, "test", "test.jsonl: No such file")
    path = write(tmp_path / "all.jsonl", [own(i, cold_prompt="the same") for i in range(100)])
    one_line(path, "test", "1 different cold prompts")


@pytest.mark.parametrize("text, word", [
    (b"", "the file is empty"), (b"\n \n", "the file is empty"), (b'{"id": "1"\n', "line 1"),
    (json.dumps(own()).encode() + b"\n\n{oops}\n", "line 3"), (b"[" * 100_000, "line 1"),
    (b"id,warm_prompt,cold_prompt,answer\n1,w,c,a\n", "line 1"), (b'{"id": "\xff"}', "utf-8")])
def test_bad_text(text, word, tmp_path):
    """A file that is no JSONL is one line with file, place, and what a good file holds."""
    (tmp_path / "train.jsonl").write_bytes(text)
    good = "one JSON object a line with id, warm_prompt, cold_prompt, answer"
    one_line(tmp_path, "train", f"{tmp_path}/train.jsonl", word, good)


@pytest.mark.parametrize("answer, good", [
    *((text, False) for text in ["", " ", "4</think>", "\u200b", "...", "$", "\u0301"]),
    *((text, True) for text in ["7", "\u20ac", "\u7532", "\U0001f600", "no."])])
def test_answer(answer, good, tmp_path):
    """An answer that nothing can match is an error."""
    path = write(tmp_path / "train.jsonl", [own(i, answer) for i in range(9)])
    if good:
        assert load(str(path), "train")[0].answer == answer
    else:
        one_line(path, "train", "no answer with a letter or a digit")


@pytest.mark.parametrize("value, name", [
    ("ledger", "ledger"), ("finqa", "finqa"), ("musique:a/path", "musique"), ("a/finqa", "custom"),
    ("hotpotqa-gold", "hotpotqa"), ("musique-gold:x", "musique"), ("finqa-gold:x", "custom"),
    ("ledger:x", "custom"), ("data/ledger/", "ledger"), ("data/ledger/test.jsonl", "custom")])
def test_name(value, name, monkeypatch):
    """The name decides on verdicts and defaults; a path to the ledger task is ledger."""
    monkeypatch.chdir(Path(data.__file__).parents[1])
    assert dataset_name(value) == name
    assert name != "ledger" or load(value, "test") == load("ledger", "test")


@pytest.mark.parametrize("prefix", ["", "finqa:", "hotpotqa-gold:"])
def test_bad_path(prefix, tmp_path, monkeypatch):
    """What cannot be read, or has no end, is one line."""
    monkeypatch.chdir(write(tmp_path / "file", []).parent)
    for path in ["", "nothing", "x" * 300, "~nosuchuser", "a\0b", "file/x", "/dev/zero", "."]:
        one_line(prefix + path, "train")


def mutants(value):
    """The value with one part of it, at any depth, missing or of another type."""
    yield from [None, 7, True, "", "text", [], ["x"], [["x"]], {}, {"x": "y"}, "\ud800"]
    pairs = {dict: dict.items, list: enumerate}.get(type(value), lambda _: [])
    for key, part in list(pairs(value)):
        if isinstance(value, dict):
            yield {k: v for k, v in value.items() if k != key}
        for mutant in mutants(part):
            yield ({**value, key: mutant} if isinstance(value, dict) else
                   [*value[:key], mutant, *value[key + 1:]])


@pytest.mark.parametrize("name", ROWS)
def test_any_row(name, tmp_path):
    """A row of any shape is an error in one line that names it, or a record of strings."""
    good = bad = 0
    path = tmp_path / FILES.get(name, ["train.jsonl"])[0]
    for mutant in mutants(ROWS[name]()):
        write(path, [mutant])
        try:
            record, = load(f"{name}:{tmp_path}".removeprefix("own:"), "train")
            fields = vars(record) | {"aliases": "".join(record.aliases)}
            good += bool("".join(fields.values()).encode())
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            bad += re.search("row 1: not in|line 1: ", str(error)) is not None
    assert good > 5 and bad > 20
