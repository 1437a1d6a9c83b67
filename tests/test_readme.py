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


def table(head: str, column: int) -> str:
    """A column of the table of the README whose first line has these words."""
    lines = README[README.index(head):].split("\n\n")[0].splitlines()[2:]
    return " ".join(line.split("|")[column] for line in lines)


@pytest.mark.parametrize("name, kilobytes", [("tsallis_rl.py", 56), ("eval.py", 12),
                                             ("README.md", 14)])
def test_sizes(name, kilobytes):
    """A file that people read keeps its size and its short lines."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line.strip()]
    assert (ROOT / name).stat().st_size <= kilobytes * 1024 * ROOM
    if name.endswith(".py"):
        assert sum(map(len, lines)) / len(lines) <= 60 * ROOM and max(map(len, lines)) <= 100
    else:  # a table may be wider
        assert all(len(line) <= 100 for line in lines if not line.startswith("|"))


def test_names():
    """Every flag, every file and every name in the table of the code exists."""
    parsers = HfArgumentParser(tsallis_rl.Config), eval.make_parser()
    known = {name for parser in parsers for x in parser._actions for name in x.option_strings}
    for script in ("tests/bench.py", "data/results/study.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text()))
    flags = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", README))
    assert flags and flags <= known | {"--nproc-per-node", "--standalone", "--index-url"}
    names = re.findall(r"`([\w.]+)`", table("| paper", -2))
    assert names
    for name in names:
        first = name.split(".")[0]
        assert hasattr(tsallis_rl, first) or hasattr(eval, first) or (ROOT / name).exists(), name
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert all((ROOT / link).exists() for link in links if "://" not in link)


def test_metrics(tmp_path):
    """The table of metrics has what is logged."""
    logged = set()
    for method in ("paft", "grpo"):
        out = tmp_path / method
        assert program([*SMALL, "--method", method, "--steps", "2", "--out", str(out)]) == 0
        logged |= set(re.findall(r'"([^"]+)": ', (out / "metrics.jsonl").read_text()))
    names = re.findall(r"`([^`]+)`", table("| metric", 1))
    assert {name.split("@")[0] for name in names} == {name.split("@")[0] for name in logged}
