"""bench.py runs and reports what it promises, at a size that takes seconds."""
import re
import subprocess
import sys

import bench


def test_report():
    """Times and memory of every step and their medians are printed."""
    argv = ["--repeats", "1", "--prompt", "40", "--think-budget", "8", "--M", "4"]
    done = subprocess.run([sys.executable, bench.__file__, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"rollout [\d.]+ s, train [\d.]+ s, peak ([\d.]+) GiB", done.stdout)
    assert len(found) == 3 and "medians" in done.stdout and float(found[-1]) > 0
