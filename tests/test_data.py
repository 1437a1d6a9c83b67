"""Loaders, on small hand-written records in each benchmark's official schema."""
import json

import pytest

import data
from data import UserError, load


# --- Hand-written rows ------------------------------------------------------------------------------------------------
def finqa_row(page=0, answer="25%", exe_ans=0.25, question="what was the percent change in sales from 2001 to 2002?"):
    return {"pre_text": ["sales of the company follow .", "all figures are in thousands ."],
            "post_text": ["see note 4 ."], "filename": f"ABC/2002/page_{page}.pdf", "id": f"ABC/2002/page_{page}.pdf-1",
            "table_ori": [["", "2001", "2002"], ["Sales", "$400", "$500"]],
            "table": [["", "2001", "2002"], ["sales", "$ 400", f"$ {500 + page}"]],
            "qa": {"question": question, "answer": answer, "exe_ans": exe_ans, "explanation": "", "steps": [],
                   "program": "subtract(500, 400), divide(#0, 400)", "gold_inds": {}}}


def hotpotqa_row(number=0, answer="Ada Byron"):
    return {"_id": f"h{number}", "question": f"Who wrote note {number}?", "answer": answer, "type": "bridge",
            "level": "easy", "supporting_facts": [["Notes", 0]],
            "context": [["Notes", ["The notes are old.", " They were written by Ada Byron."]],
                        ["Engines", ["An engine is a machine."]]]}


def musique_row(number=0, answer="Oslo", aliases=("Christiania",), **more):
    paragraphs = [{"idx": i, "title": title, "paragraph_text": text, "is_supporting": not i}
                  for i, (title, text) in enumerate([("A painter", "Born in Oslo."), ("A town", "It has a port.")])]
    return {"id": f"2hop__{number}_9", "paragraphs": paragraphs, "question": "Where was the painter born?",
            "question_decomposition": [], "answer": answer, "answer_aliases": list(aliases), "answerable": True, **more}


def write_json(path, rows):
    path.write_text(json.dumps(rows))
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own(number, **more):
    return {"id": str(number), "warm_prompt": f"Please: {number}?", "cold_prompt": f"{number}", "answer": "7", **more}


def ids(records):
    return [record.id for record in records]


# --- FinQA ------------------------------------------------------------------------------------------------------------
def first_finqa(tmp_path, **fields):
    write_json(tmp_path / "train.json", [finqa_row(**fields)])
    return load(f"finqa:{tmp_path}", "train")[0]


def test_a_finqa_prompt_has_the_text_the_table_the_question_and_when_warm_the_form(tmp_path):
    record = first_finqa(tmp_path)
    cold = ("sales of the company follow . all figures are in thousands .\n | 2001 | 2002\nsales | $ 400 | $ 500\n"
            "see note 4 .\n\nQuestion: what was the percent change in sales from 2001 to 2002?")
    assert record.cold_prompt == cold
    assert cold in record.warm_prompt and record.warm_prompt.index(cold) > 0
    assert "percentage rounded to a whole number, in the form N%" in record.warm_prompt.split(cold)[1]
    assert record.answer == "25%"


@pytest.mark.parametrize("raw, gold, form", [
    ("14%", "14%", "in the form N%"), ("-3.20 %", "-3.20%", "in the form N.NN%"), ("1,234", "1234", "in the form N "),
    ("4.9\\\\n", "4.9", "in the form N.N "), ("$ 2.33 million", "$2.33 million", "in the form $N.NN million"),
    ("$ 73576 thousand", "$73576 thousand", "in the form $N thousand"), ("$ -5", "-$5", "in the form $N "),
    ("101 stores per year", "101", "in the form N "), ("$ 500 or $ 0.5 thousand", "$500", "in the form $N "),
    ("( 4.2 )", "-4.2", "in the form N.N "), (".5%", "0.5%", "in the form N.N%"), ("Yes", "yes", "yes or no"),
    ("no .", "no", "yes or no"), ("3 : 1", "3 : 1", "short phrase"), ("net income", "net income", "short phrase")])
def test_a_finqa_gold_has_one_form_and_the_warm_prompt_asks_for_it(raw, gold, form, tmp_path):
    record = first_finqa(tmp_path, answer=raw)
    assert record.answer == gold
    assert form in record.warm_prompt.rpartition("\n\n")[2]


def test_the_form_in_the_warm_prompt_tells_neither_digits_nor_sign():
    assert data.finqa_form("14.5%") == data.finqa_form("-98.1%")
    assert not any(character.isdigit() for character in data.finqa_form("$1234567 million"))


def test_exe_ans_is_kept_as_the_value_of_the_gold(tmp_path):
    assert first_finqa(tmp_path, answer="14%", exe_ans=0.14464).value == "0.14464"
    assert first_finqa(tmp_path, answer="yes", exe_ans="yes").aliases == ()


def test_finqa_rows_with_an_empty_gold_are_dropped(tmp_path):
    rows = [finqa_row(0), finqa_row(1, answer=""), finqa_row(2, answer=" \\n "), finqa_row(3)]
    write_json(tmp_path / "train.json", rows)
    assert sorted(ids(load(f"finqa:{tmp_path}", "train"))) == ["ABC/2002/page_0.pdf-1", "ABC/2002/page_3.pdf-1"]


def test_finqa_official_files_are_used_whole_and_its_private_test_set_is_passed_over(tmp_path):
    for name, pages in [("train", range(5)), ("dev", range(5, 8)), ("test", range(8, 12)), ("private_test", range(1))]:
        write_json(tmp_path / f"{name}.json", [finqa_row(page) for page in pages])
    assert [len(load(f"finqa:{tmp_path}", split)) for split in data.SPLITS] == [5, 3, 4]


def test_without_a_finqa_test_file_validation_and_test_share_dev_and_no_page(tmp_path):
    rows = [finqa_row(page // 2) | {"id": f"q{page}"} for page in range(40)]
    write_json(tmp_path / "dev.json", rows)
    validation, test = (load(f"finqa:{tmp_path}", split) for split in ("validation", "test"))
    assert sorted(ids(validation) + ids(test)) == sorted(row["id"] for row in rows)
    assert not {r.cold_prompt for r in validation} & {r.cold_prompt for r in test}, "questions of a page stay together"
    assert 14 <= len(validation) <= 20, "in the proportion 872 to 1132"


# --- HotpotQA and MuSiQue ---------------------------------------------------------------------------------------------
def test_a_hotpotqa_prompt_has_titled_paragraphs_and_the_form(tmp_path):
    write_json(tmp_path / "hotpot_train_v1.1.json", [hotpotqa_row(), hotpotqa_row(1, answer="yes")])
    by_id = {record.id: record for record in load(f"hotpotqa:{tmp_path}", "train")}
    assert by_id["h0"].cold_prompt == ("Notes\nThe notes are old. They were written by Ada Byron.\n\n"
                                       "Engines\nAn engine is a machine.\n\nQuestion: Who wrote note 0?")
    assert by_id["h0"].answer == "Ada Byron" and "short span" in by_id["h0"].warm_prompt
    assert "yes or no" in by_id["h1"].warm_prompt.rpartition("\n\n")[2]


def test_hotpotqa_validation_and_test_are_disjoint_halves_of_dev(tmp_path):
    write_json(tmp_path / "hotpot_dev_distractor_v1.json", [hotpotqa_row(i) for i in range(20)])
    write_json(tmp_path / "hotpot_dev_fullwiki_v1.json", [hotpotqa_row(99)])
    write_json(tmp_path / "hotpot_test_fullwiki_v1.json", [hotpotqa_row(98)])
    validation, test = (ids(load(f"hotpotqa:{tmp_path}", split)) for split in ("validation", "test"))
    assert len(validation) == len(test) == 10
    assert set(validation) | set(test) == {f"h{i}" for i in range(20)}


def test_musique_keeps_its_aliases_and_drops_what_cannot_be_answered(tmp_path):
    write_jsonl(tmp_path / "musique_ans_v1.0_train.jsonl", [
        musique_row(), musique_row(1, answerable=False), musique_row(2, aliases=("Oslo", " ", "Christiania"))])
    records = load(f"musique:{tmp_path}", "train")
    assert sorted(ids(records)) == ["2hop__0_9", "2hop__2_9"]
    assert all(record.answer == "Oslo" and record.aliases == ("Christiania",) for record in records)
    assert records[0].cold_prompt.startswith("A painter\nBorn in Oslo.\n\nA town\nIt has a port.\n\nQuestion:")


def test_the_papers_sizes_are_drawn_from_enough_rows():
    groups = [f"id{i}" for i in range(2000)]
    parts = data.draw(groups, data._shares(len(groups), ("validation", "test"), data.BENCHMARKS["hotpotqa"]))
    assert [len(part) for part in parts] == [342, 343] and not set(parts[0]) & set(parts[1])
    for name, train in (("hotpotqa", 9067), ("musique", 9985)):
        assert data._shares(20000, ("train",), data.BENCHMARKS[name]) == [train]
    assert data._shares(20000, ("train",), data.BENCHMARKS["finqa"]) == [20000], "all that there is"
    assert data._shares(2417, ("validation", "test"), data.BENCHMARKS["musique"]) == [579, 445]


def test_a_draw_is_fixed_and_does_not_depend_on_the_order_of_the_file():
    groups = [f"id{i}" for i in range(50)]
    chosen = [groups[i] for i in data.draw(groups, [5])[0]]
    assert chosen == [groups[::-1][i] for i in data.draw(groups[::-1], [5])[0]]
    assert chosen == ["id31", "id28", "id5", "id37", "id20"], "the published draw: changing it changes the subsets"


# --- Files and folders ------------------------------------------------------------------------------------------------
def test_one_folder_may_hold_the_official_files_of_several_benchmarks(tmp_path):
    write_json(tmp_path / "train.json", [finqa_row()])
    write_json(tmp_path / "hotpot_train_v1.1.json", [hotpotqa_row()])
    write_jsonl(tmp_path / "musique_ans_v1.0_train.jsonl", [musique_row()])
    assert [ids(load(f"{name}:{tmp_path}", "train")) for name in data.BENCHMARKS] == [
        ["ABC/2002/page_0.pdf-1"], ["h0"], ["2hop__0_9"]]


@pytest.mark.parametrize("name", ["finqa", "hotpotqa", "musique", "own"])
def test_a_single_file_is_split_80_10_10_and_nothing_is_on_two_sides(name, tmp_path):
    rows = {"finqa": finqa_row, "hotpotqa": hotpotqa_row, "musique": musique_row, "own": own}[name]
    path = write_jsonl(tmp_path / "all.jsonl", [rows(i) for i in range(30)])
    where = str(path) if name == "own" else f"{name}:{path}"
    parts = [set(ids(load(where, split))) for split in data.SPLITS]
    assert [len(part) for part in parts] == [24, 3, 3] and len(set.union(*parts)) == 30
    assert [set(ids(load(where, split))) for split in data.SPLITS] == parts


def test_the_limit_is_the_beginning_of_the_split(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [own(i) for i in range(5)])
    assert ids(load(str(tmp_path), "train", limit=2)) == ["0", "1"] and path.exists()


def test_own_records_are_read_as_they_are(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [own(1, aliases=["seven"]), own(2)])
    first, second = load(str(tmp_path), "test")
    assert (first.warm_prompt, first.cold_prompt, first.answer, first.aliases) == ("Please: 1?", "1", "7", ("seven",))
    assert second.aliases == ()


@pytest.mark.parametrize("value, name", [("ledger", "ledger"), ("finqa", "finqa"), ("musique:some/path", "musique"),
                                         ("hotpotqa:x.json", "hotpotqa"), ("my/finqa", "custom"),
                                         ("ledger:x", "custom")])
def test_the_name_of_a_dataset_decides_how_it_is_scored(value, name):
    assert data.dataset_name(value) == name


def test_a_paragraph_without_its_title_is_an_error(tmp_path):
    row = hotpotqa_row() | {"context": {"title": ["Notes", "Engines"], "sentences": [["The notes are old."]]}}
    write_json(tmp_path / "hotpot_train_v1.1.json", [row])
    with pytest.raises(UserError, match="row 1: not in hotpotqa's official format"):
        load(f"hotpotqa:{tmp_path}", "train")


# --- The Hub ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch):
    """Replaces datasets.load_dataset by a table of rows; returns the table and the list of calls."""
    datasets = pytest.importorskip("datasets")
    rows, calls = {}, []

    def load_dataset(path, config, split, revision):
        calls.append((path, config, split, revision))
        if path not in rows:
            raise ConnectionError("no network\nand more lines")
        return datasets.Dataset.from_list(rows[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return rows, calls


def test_hub_columns_give_the_same_records_as_the_official_files(hub, tmp_path):
    finqa, hotpotqa = finqa_row(), hotpotqa_row()
    flat = {key: finqa[key] for key in ("id", "filename", "pre_text", "post_text", "table")}
    titles, sentences = zip(*hotpotqa["context"])
    renamed = {"id": "h0", "question": hotpotqa["question"], "answer": hotpotqa["answer"],
               "context": {"title": list(titles), "sentences": list(sentences)}}
    rows, calls = hub
    rows["rootsautomation/FinQA"] = [flat | {"question": finqa["qa"]["question"], "answer": "25%", "exe_ans": "0.25"}]
    rows["hotpotqa/hotpot_qa"] = [renamed]
    rows["dgslibisey/MuSiQue"] = [musique_row()]
    for name, row in (("finqa", finqa), ("hotpotqa", hotpotqa), ("musique", musique_row())):
        write_json(tmp_path / data.BENCHMARKS[name].files[0], [row])
        assert load(name, "train") == load(f"{name}:{tmp_path}", "train")
    assert [call[1:3] for call in calls] == [(None, "train"), ("distractor", "train"), (None, "train")]
    assert all(len(call[3]) == 40 for call in calls), "revisions are full commit hashes"


def test_hub_validation_and_test_are_disjoint(hub):
    hub[0]["dgslibisey/MuSiQue"] = [musique_row(i) for i in range(30)]
    validation, test = (set(ids(load("musique", split))) for split in ("validation", "test"))
    assert len(validation) == 17 and len(test) == 13 and not validation & test


@pytest.mark.parametrize("name", ["finqa", "hotpotqa", "musique"])
def test_without_the_hub_one_line_says_what_to_pass_instead(name, hub):
    with pytest.raises(UserError, match=rf"--data {name}:PATH \(.*train.*dev.* of ") as error:
        load(name, "test")
    assert "\n" not in str(error.value)


# --- Bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, message", [
    ("", "the file is empty"), ("\n \n", "the file is empty"),
    ('{"id": "1"\n', "line 1: malformed JSON"),
    (json.dumps(own(1)) + "\n\n{oops}\n", "line 3: malformed JSON"),
    (json.dumps(own(1)) + "\n[1]\n", "line 2: not a JSON object"),
    (json.dumps(own(1) | {"answer": ""}), "line 1: the record has no answer"),
    (json.dumps({"id": "1", "warm_prompt": "w", "cold_prompt": "c"}), "line 1: 'answer' is missing"),
    (json.dumps(own(1) | {"answer": " "}), "line 1: the record has no answer"),
    (json.dumps(own(1) | {"answer": 7}), "line 1: 'answer' must be a string"),
    (json.dumps(own(1) | {"id": 7}), "line 1: 'id' must be a string"),
    (json.dumps({"id": "1", "warm_prompt": "w", "answer": "a"}), "line 1: 'cold_prompt' is missing"),
    (json.dumps(own(1) | {"aliases": "x"}), "line 1: 'aliases' must be a list"),
    (json.dumps(own(1) | {"warm_prompt": "\ud800"}), "line 1: 'warm_prompt' is not valid Unicode"),
    ("[" * 100_000, "line 1: malformed JSON")])
def test_a_bad_record_is_named_by_file_and_line(text, message, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load(str(tmp_path), "train")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_not_utf8_are_an_error(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8"):
        load(str(tmp_path), "train")


@pytest.mark.parametrize("where, message", [
    ("nothing", "unknown data 'nothing'"), ("", "unknown data ''"), ("finqa:", "unknown data 'finqa:'"),
    ("finqa:/nothing/here", "does not exist")])
def test_unknown_data_is_named(where, message):
    with pytest.raises(UserError, match=message):
        load(where, "train")


def test_a_folder_without_the_split_says_which_file_is_missing(tmp_path):
    write_json(tmp_path / "train.json", [finqa_row()])
    with pytest.raises(UserError, match=r"has no dev\.json.*--data finqa:FILE"):
        load(f"finqa:{tmp_path}", "validation")
    with pytest.raises(UserError, match="no validation.jsonl"):
        load(str(tmp_path), "validation")


NO_ANSWER = ["</think> 4", "4</think>", "\u200b", "\ufeff\u2060", "...", " - ", "\u2014", "\u3002", "?!", "$", "\u0301"]


@pytest.mark.parametrize("answer", NO_ANSWER)
def test_an_answer_that_nothing_can_match_is_a_bad_record(answer, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [own(1), own(2, answer=answer)])
    with pytest.raises(UserError, match=r"train.jsonl, line 2: the record has no answer: .* no </think>"):
        load(str(tmp_path), "train")


@pytest.mark.parametrize("answer", ["7", "$7", "\u20ac", "\u221e", "\u7532", "\U0001f600", "C++", "<think>", "no."])
def test_any_other_answer_is_fine(answer, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [own(1, answer=answer)])
    assert load(str(tmp_path), "train")[0].answer == answer


@pytest.mark.parametrize("answer", NO_ANSWER)
def test_a_benchmarks_row_with_such_an_answer_is_dropped_like_one_without(answer, tmp_path):
    write_json(tmp_path / "train.json", [finqa_row(1), finqa_row(2, answer=answer)])
    write_json(tmp_path / "hotpot_train_v1.1.json", [hotpotqa_row(1), hotpotqa_row(2, answer=answer)])
    write_jsonl(tmp_path / "musique_ans_v1.0_train.jsonl", [musique_row(1), musique_row(2, answer=answer)])
    for name in data.BENCHMARKS:
        if (name, answer) != ("finqa", "4</think>"):  # its gold is "4": what follows an amount is cut off
            assert len(load(f"{name}:{tmp_path}", "train")) == 1, name


@pytest.mark.parametrize("row", [
    finqa_row() | {"table": None}, 3, {"filename": "x", "qa": {"answer": "1"}}, hotpotqa_row(),
    *(finqa_row() | change for change in ({"pre_text": "letters"}, {"post_text": "letters"}, {"table": ["letters"]}))])
def test_a_row_in_another_format_is_named(row, tmp_path):
    write_json(tmp_path / "train.json", [finqa_row(), row])
    with pytest.raises(UserError, match="row 2: not in finqa's official format") as error:
        load(f"finqa:{tmp_path}", "train")
    assert "\n" not in str(error.value)


def test_a_benchmark_file_without_any_answer_is_an_error(tmp_path):
    write_json(tmp_path / "train.json", [finqa_row(answer="")])
    with pytest.raises(UserError, match="no row with an answer"):
        load(f"finqa:{tmp_path}", "train")


def test_too_few_records_for_three_splits_are_an_error(tmp_path):
    path = write_jsonl(tmp_path / "all.jsonl", [own(1), own(2)])
    with pytest.raises(UserError, match="2 different questions .* in 2 records are too few"):
        load(str(path), "train")


def test_a_file_of_one_question_is_told_so(tmp_path):
    path = write_jsonl(tmp_path / "all.jsonl", [own(i, cold_prompt="the same") for i in range(100)])
    with pytest.raises(UserError, match="1 different questions .* in 100 records"):
        load(str(path), "test")


@pytest.mark.parametrize("where", [
    "x" * 300, "~nosuchuser", "a\0b", "file/x", "/dev/null", "/dev/zero", "folder", "secret", "secret/x"])
@pytest.mark.parametrize("prefix", ["", "finqa:"])
def test_a_path_that_cannot_be_read_is_one_line(prefix, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").mkdir(mode=0)
    with pytest.raises(UserError) as error:
        load(prefix + where, "train")
    assert "\n" not in str(error.value)


# --- Mutated rows -----------------------------------------------------------------------------------------------------
OTHERS = [None, 7, 1.5, True, "", "text", [], ["x"], [["x"]], {}, {"x": "y"}, "\ud800", "</think>"]


def mutants(value):
    """The value with one part of it, at any depth, missing or of another type."""
    yield from OTHERS
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(pairs):
        for mutant in mutants(part):
            copy = value.copy()
            copy[key] = mutant
            yield copy
        if isinstance(value, dict):
            yield {other: part for other, part in value.items() if other != key}


@pytest.mark.parametrize("name, row", [
    ("finqa", finqa_row()), ("hotpotqa", hotpotqa_row()), ("musique", musique_row())])
def test_a_row_of_any_shape_is_an_error_in_one_line_or_a_good_record(name, row, tmp_path):
    path = tmp_path / data.BENCHMARKS[name].files[0]
    good = 0
    for mutant in mutants(row):
        write_json(path, [mutant])
        try:
            record, = load(f"{name}:{tmp_path}", "train")
            fields = (record.id, record.warm_prompt, record.cold_prompt, record.answer, record.value, *record.aliases)
            assert all(isinstance(field, str) for field in fields) and "".join(fields).encode(), mutant
            good += 1
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
    assert good > 10, "fields that no prompt needs"


def test_ledger_in_another_form_is_ledger_with_each_answer_in_that_text(tmp_path, monkeypatch, capsys):
    from data import make_ledger
    for arguments in (["--form", "[N"], ["--form", "none", "--out", str(tmp_path)]):  # over the shipped one; without an N
        monkeypatch.setattr("sys.argv", ["make_ledger.py", *arguments])
        with pytest.raises(SystemExit):
            make_ledger.main()
    monkeypatch.setattr("sys.argv", ["make_ledger.py", "--form", "[N", "--out", str(tmp_path)])
    make_ledger.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
    for split in ("train", "validation", "test"):
        ours, shipped = (load(name, split) for name in (str(tmp_path), "ledger"))
        assert [r.answer for r in ours] == ["[" + r.answer for r in shipped]
        assert [(r.id, r.cold_prompt, r.warm_prompt) for r in ours] == [(r.id, r.cold_prompt, r.warm_prompt) for r in shipped]
