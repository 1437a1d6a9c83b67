"""Files and folders that outlive a kill, a full disk and a second process."""
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class UserError(Exception):
    """What the user can mend: a program ends with this one line and exit code 2."""


@contextmanager
def named(path: str | Path):
    """Turns what the system refuses to do with a path into a UserError that names the path."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, text that is not UTF-8
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file."""
    with named(path):
        return Path(path).read_text(encoding="utf-8-sig")


def parse(text: str | bytes, where: str, kind: type = dict):
    """The object (or list) in a JSON text. UserError, which starts with `where`, if it has none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: malformed JSON ({error})") from None
    if not isinstance(value, kind):
        raise UserError(f"{where}: not a JSON object")
    return value


def read_json(path: str | Path) -> dict:
    """The JSON object in a file."""
    return parse(read_text(path), str(path))


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank. UserError names the file and line."""
    lines = enumerate(read_text(path).split("\n"), 1)
    return ((n, parse(line, f"{path}, line {n}")) for n, line in lines if line.strip())


def read_log(path: str | Path) -> list[dict]:
    """The rows that `append_jsonl` wrote, without a last line that a kill cut off."""
    with named(path):
        lines = Path(path).read_bytes().split(b"\n")[:-1] if Path(path).exists() else []
    return [parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def to_jsonl(rows: Iterable[dict]) -> str:
    """One line of JSON for each row. JSON has no nan and no inf: they become null."""
    finite = (json.loads(json.dumps(row), parse_constant=lambda name: None) for row in rows)
    return "".join(json.dumps(row) + "\n" for row in finite)


def append_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Adds rows to the end of a file."""
    with named(path), open(path, "a", encoding="utf-8") as file:
        file.write(to_jsonl(rows))


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Writes a file. At every moment it has its old text or all of the new one."""
    temporary = Path(path).with_name(f".{os.urandom(8).hex()}.tmp")
    with named(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            os.replace(temporary, path)
            sync(temporary.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Replaces a folder by a new one, which starts empty and which write(path) fills. At every
    moment FOLDER is whole, or there is no FOLDER and FOLDER.old is whole; also after an error."""
    new, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    try:
        shutil.rmtree(new, ignore_errors=True)  # a kill can have left it
        new.mkdir()
        write(new)
        for path in (*new.rglob("*"), new):
            sync(path)
        if folder.exists():  # if not, `old` may be the only whole one
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # each library has its own errors for a full disk
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"cannot save {folder} ({error!r}); the one before is intact") from error


@contextmanager
def open_folder(folder: Path, new: bool):
    """Makes or opens a folder, and locks it. A new one must be empty; if it stays so, it goes."""
    made = not folder.exists()
    with named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a")
    with suppress(OSError):  # this file system has no locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running in {folder}") from None
    try:
        if new and os.listdir(folder) != ["lock"]:
            raise UserError(f"{folder} already holds something: give another --out, or --resume")
        yield
    finally:
        file.close()
        if made and folder.exists() and os.listdir(folder) == ["lock"]:
            shutil.rmtree(folder)


def exit_code(program: Callable[[], object]) -> int:
    """Runs a program. 0; 2, after one line on stderr, for what a user can mend; 130 for Ctrl-C."""
    try:
        program()
        return 0
    except KeyboardInterrupt:
        line = "interrupted"
    except (UserError, OSError) as error:
        line = "error: " + " ".join(str(error).split())
    except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
        if "memory" not in repr(error).lower() or "illegal" in str(error):
            raise
        line = "error: out of memory: lower --token-budget, then --gpu-share, --M or --think-budget"
    with suppress(OSError, ValueError):  # stderr may be closed
        print(line, file=sys.stderr, flush=True)
    return 130 if line == "interrupted" else 2
