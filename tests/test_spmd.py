"""The XLA path on virtual devices, no TPU needed. In an environment with requirements-tpu.txt:

    PJRT_DEVICE=CPU CPU_NUM_DEVICES=4 pytest tests/test_spmd.py
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_xla", reason="needs requirements-tpu.txt")
ROOT = Path(__file__).parent.parent


def curve(tmp_path, device, **env):
    """Losses of three steps of the tiny preset in fp32."""
    out = tmp_path / device
    command = [sys.executable, ROOT / "train_dit.py", "--device", device, "--dtype", "float32",
               "--steps", "3", "--batch", "8", "--log-every", "1", "--sample-every", "99",
               "--save-every", "99", "--workers", "0", "--sample-steps", "2", "--out", out]
    environment = {k: v for k, v in os.environ.items() if k not in ("PJRT_DEVICE",)}
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env={**environment, **env},
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], done.stdout


def test_four_devices_give_the_curve_of_one_cpu(tmp_path):
    expected, _ = curve(tmp_path, "cpu")
    found, said = curve(tmp_path, "xla", PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")
    assert "mesh fsdp=4" in said
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) == 3
