"""bench.py runs and reports what it promises, at a size that takes seconds."""
import re
import subprocess
import sys
from pathlib import Path

BENCH = str(Path(__file__).with_name("bench.py"))


def test_report():
    """Times and memory of every shape are printed."""
    argv = ["--repeats", "1", "--prompt", "40", "80", "--response", "8", "--M", "4"]
    done = subprocess.run([sys.executable, BENCH, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"prompt (\d+), response 8, M 4, hf: medians of 1: rollout [\d.]+ s, "
                       r"train [\d.]+ s, peak ([\d.]+) GiB", done.stdout)
    assert [row[0] for row in found] == ["40", "80"] and all(float(row[1]) > 0 for row in found)
