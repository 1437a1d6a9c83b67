"""The sizes of the files that people read, and the names in README.md."""
import re
from pathlib import Path

import eval
import pytest
import tsallis_rl
from conftest import SMALL, program
from transformers import HfArgumentParser

ROOT = Path(tsallis_rl.__file__).parent
README = (ROOT / "README.md").read_text()
ROOM = 1.15  # for a fork


def table(head: str) -> str:
    """The table of the README whose first line has these words."""
    return README[README.index(head):].split("\n\n")[0]


@pytest.mark.parametrize("name, kilobytes", [("tsallis_rl.py", 56), ("eval.py", 12),
                                             ("README.md", 14)])
def test_a_file_that_people_read_keeps_its_size(name, kilobytes):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line.strip()]
    assert (ROOT / name).stat().st_size <= kilobytes * 1024 * ROOM
    if name.endswith(".py"):
        assert sum(map(len, lines)) / len(lines) <= 60 * ROOM and max(map(len, lines)) <= 100
    else:  # a table may be wider
        assert all(len(line) <= 100 for line in lines if not line.startswith("|"))


def test_every_flag_exists():
    parsers = HfArgumentParser(tsallis_rl.Config), eval.make_parser()
    known = {name for parser in parsers for x in parser._actions for name in x.option_strings}
    for script in ("tests/bench.py", "data/study.py", "data/results/study.py"):
        text = (ROOT / script).read_text() if (ROOT / script).exists() else ""
        known |= set(re.findall(r'"(--[\w-]+)"', text))
    used = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", README))
    assert used and used <= known | {"--nproc-per-node", "--standalone", "--index-url"}


def test_every_name_in_the_paper_to_code_table_exists():
    lines = [line.rsplit("|", 2)[1] for line in table("| paper").splitlines()[2:]]
    names = re.findall(r"`([\w.]+)`", " ".join(lines))
    assert names
    for name in names:
        first = name.split(".")[0]
        assert hasattr(tsallis_rl, first) or hasattr(eval, first) or (ROOT / name).exists(), name


def test_the_table_of_metrics_has_what_is_logged(tmp_path):
    logged = set()
    for method in ("paft", "grpo"):
        out = tmp_path / method
        assert program([*SMALL, "--method", method, "--steps", "2", "--out", str(out)]) == 0
        text = (out / "metrics.jsonl").read_text()
        logged |= set(re.findall(r'"([^"]+)": ', text))
    names = re.findall(r"`([^`]+)`", " ".join(
        line.split("|")[1] for line in table("| metric").splitlines()[2:]))
    assert {name.split("@")[0] for name in names} == {name.split("@")[0] for name in logged}


def test_every_figure_and_every_folder_that_is_named_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert all((ROOT / link).exists() for link in links if "://" not in link)
