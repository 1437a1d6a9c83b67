"""The documentation cannot drift: names, flags, metrics and sections in it are those of the code."""
import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

import eval as evaluation
import tsallis_rl
from tsallis_rl import Config, main

ROOT = Path(tsallis_rl.__file__).parent
README = (ROOT / "README.md").read_text()
SOURCES = [ROOT / "tsallis_rl.py", ROOT / "eval.py", *(ROOT / "data").glob("*.py")]


def test_every_metric_has_an_entry_in_the_glossary_and_every_entry_is_a_metric(tmp_path):
    small = ["--rollout", "hf", "--M", "4", "--batch-size", "2", "--limit", "8", "--eval-every", "1"]
    assert main([*small, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    logged = {name for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    table = README[README.index("| metric | meaning |"):].split("\n\n")[0]
    assert {name for line in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])} == logged


def test_every_flag_in_the_readme_exists(capsys):
    flags = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(Config)}
    with pytest.raises(SystemExit):
        evaluation.main(["--help"])
    flags |= set(re.findall("--[a-z-]+", capsys.readouterr().out))
    flags |= {flag for file in ("tests/bench.py", "data/study.py") for flag in re.findall("--[a-zA-Z-]+", (ROOT / file).read_text())}
    used = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", README)) - {"--nproc-per-node"}
    assert used and used <= flags


def test_every_name_in_the_paper_to_code_table_exists():
    table = README[README.index("| paper (v1) | code"):].split("\n\n")[0]
    for name in re.findall(r"`([\w.]+)`", table):
        owner = tsallis_rl
        for part in name.split("."):
            if name.endswith(".py"):
                assert (ROOT / name).exists()
                break
            owner = getattr(owner, part, None) or getattr(evaluation, part)


def test_the_help_shows_every_setting_with_its_sentence(capsys):
    try:
        main(["--help"])
    except SystemExit as end:
        assert end.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(Config):
        assert "--" + f.name.replace("_", "-") in shown and f.metadata["help"].split()[0] in shown


def test_every_default_is_one_of_its_choices_and_can_be_typed():
    for f in dataclasses.fields(Config):
        if choices := f.metadata["choices"]:
            assert f.default in choices, f.name
            assert all(tsallis_rl.parse([f"--{f.name.replace('_', '-')}", choice]) for choice in choices)


def test_the_table_of_contents_is_that_of_the_sections():
    source = SOURCES[0].read_text()
    sections = re.findall(r"^# -{100,}\n# (\d+)\. (.*)\n# -{100,}$", source, re.MULTILINE)
    contents = " ".join(source[source.index("Contents: "):source.index("Whoever")].split())
    for number, title in sections:
        words = re.split("[:,]", title)[0].lower()
        assert f"{number} {words}" in contents.lower(), f"{number} {words}"
    assert [int(number) for number, _ in sections] == list(range(1, len(sections) + 1))


def test_the_file_that_people_read_keeps_its_size():
    # the ceiling of the project: one file that can be read beside the paper
    source = SOURCES[0].read_text()
    assert source.count("\n") <= 1100 and len(source.encode()) <= 66 * 1024
    assert (ROOT / "eval.py").read_text().count("\n") <= 420
    assert (ROOT / "data" / "__init__.py").read_text().count("\n") <= 370 and README.count("\n") <= 175


def test_a_line_of_the_console_fits_160_columns(tmp_path, capsys):
    small = ["--rollout", "hf", "--M", "4", "--batch-size", "2", "--limit", "8", "--eval-every", "1", "--out", str(tmp_path / "run")]
    for method in ("garl", "grpo"):
        assert main([*small[:-1], str(tmp_path / method), "--steps", "1", "--method", method]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 8 and max(map(len, lines)) <= 160


def test_functions_are_short_lines_fit_and_what_is_public_has_a_docstring():
    for path in SOURCES:
        source = path.read_text()
        assert max(map(len, source.splitlines())) <= 120, path
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 45, (path, node.name)
        scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
        for node in (node for scope in scopes for node in scope.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))):
            assert node.name.startswith("_") or ast.get_docstring(node), (path, node.name)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README and all((ROOT / name).exists() for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README))
