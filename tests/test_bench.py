"""bench.py runs and reports what it promises, at a size that takes seconds."""
import re
import subprocess
import sys
from pathlib import Path

BENCH = str(Path(__file__).with_name("bench.py"))


def test_report():
    """Phases, memory and share are numbers of the right size, for every shape."""
    argv = ["--repeats", "1", "--prompt", "40", "80", "--response", "8", "--M", "4"]
    done = subprocess.run([sys.executable, BENCH, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"prompt (\d+), response 8, M 4, hf: medians of 1: rollout ([\d.]+) s, "
                       r"train ([\d.]+) s, peak ([\d.]+) GiB, ([\d.]+)%", done.stdout)
    assert [row[0] for row in found] == ["40", "80"]
    assert all(0 < float(row[3]) and 0 < float(row[4]) <= 100 for row in found)
