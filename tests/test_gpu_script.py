"""tests/gpu.sh without a GPU: the whole script in miniature, and parts that fail.

    pytest -m "" tests/test_gpu_script.py
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import gpu

ROOT = Path(__file__).parent.parent


def script(*flags):
    return subprocess.run(["bash", ROOT / "tests/gpu.sh", *map(str, flags)], text=True,
                          capture_output=True, timeout=1500,
                          env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_in_miniature(tmp_path):
    done = script("--cpu", "--minutes", "20", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["parts"]) == 10
    rows = [row for part in found["parts"] for row in part["rows"]]
    count = lambda name: sum(row["table"] == name for row in rows)
    assert {name: count(name) for name in ("training", "profile", "sampling", "tiny", "saved")} == {
        "training": 7, "profile": 1, "sampling": 2, "tiny": 1, "saved": 4}
    for row in rows:
        if row["table"] == "profile":
            assert sum(row["shares"].values()) == pytest.approx(1)
            assert 0 < row["shares"]["matmul"] < 1 and len(row["kernels"]) == 15
        if row["table"] == "training":          # alone, the DiT's is all the work
            alone = row["tflops_by_part"]["dit"] == pytest.approx(row["tflops"])
            assert alone == (row["llm"] == "none") and row["images_per_s"] > 0
    assert (tmp_path / "samples.png").stat().st_size > 1000
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"| {part['part']} | ok |" in text for part in found["parts"])


def test_without_time(tmp_path):
    """What was not run counts as failed, and both files are written."""
    done = script("--cpu", "--minutes", "0.01", "--out", tmp_path)
    assert done.returncode == 1
    assert "10 of 10 parts failed" in done.stdout
    assert "not run: no time left" in (tmp_path / "gpu.md").read_text()
    assert len(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == 10


def run(code, seconds=60):
    return gpu.run_part([sys.executable, "-c", code], seconds, "cpu")


def test_a_part_that_fails_keeps_its_rows():
    found = run("print('1/9{\"table\": \"x\", \"n\": 1}'); print('why'); raise SystemExit(3)")
    assert found["outcome"] == "failed, exit status 3"
    assert found["rows"] == [{"table": "x", "n": 1}]
    assert found["tail"][-1] == "why"


@pytest.mark.slow
def test_a_part_that_hangs_is_stopped_with_its_children(tmp_path):
    code = ("import os, subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
            "print('{\"table\": \"x\"}', flush=True)\n"
            "time.sleep(600)")
    found = run(code, 10)
    assert found["outcome"] == "stopped after 10 s" and found["rows"] == [{"table": "x"}]
    status = Path("/proc") / (tmp_path / "pid").read_text() / "stat"

    def gone():
        try:
            return status.read_text().split()[2] == "Z"
        except OSError:
            return True
    deadline = time.monotonic() + 30                    # a busy machine takes a while to end it
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone()


@pytest.mark.slow
def test_one_row_that_fails_does_not_stop_the_others():
    """An impossible batch of 0 stands for one that does not fit the memory."""
    found = gpu.run_part([sys.executable, "tests/gpu.py", "--part", "bench", "--cpu", "--size",
                          "tiny", "--batches", "0", "2"], 300, "cpu")
    assert found["outcome"] == "failed, exit status 1"
    assert [row["batch"] for row in found["rows"]] == [2]
