"""The benchmark runs and reports what it promises, at a size that takes seconds."""
import re
import subprocess
import sys
from pathlib import Path

BENCH = str(Path(__file__).with_name("bench.py"))


def test_the_benchmark_reports_phases_share_memory_and_the_growth_between_shapes():
    arguments = ["--repeats", "1", "--prompt", "40", "80", "--response", "8", "--M", "4", "--dtype", "float32"]
    done = subprocess.run([sys.executable, BENCH, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"torch \d", done.stdout) and done.stdout.count("medians of 1") == 2
    assert re.search(r"rollout [\d.]+ s, train [\d.]+ s, sync [\d.]+ s; \d+ tokens/s", done.stdout)
    assert re.search(r"[\d.]+% of the measured float32 matrix rate", done.stdout)
    assert re.search(r"prompt 80 M 4 over prompt 40 M 4: [\d.]+, median", done.stdout)


def test_a_variant_that_cannot_start_ends_the_benchmark_with_an_error_not_a_hang(tmp_path):
    done = subprocess.run([sys.executable, BENCH, "--model", str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and "error: the process of hf ended" in done.stderr
    assert "that folder holds no whole model" in done.stderr
