"""The XLA path on virtual devices, no TPU needed. In an environment with requirements-tpu.txt:

    pytest tests/test_spmd.py

Each run is a process of its own, because the number of devices is fixed when a process starts. It
is this file run as a script: the training script's main, with torch_xla's counters noted at the end
of every step.
"""
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch_xla", reason="needs requirements-tpu.txt")
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
COMMON = ["--dtype", "float32", "--batch", "8", "--workers", "0", "--log-every", "5",
          "--sample-every", "99", "--save-every", "10", "--steps", "20"]
SCRIPTS = {"train_dit": ["--sample-steps", "1", "--guidance", "1"],
           "train_decoder": ["--disc-start", "2", "--gan-start", "5"],
           "tiny/train_encoder": ["--width", "48", "--depth", "2", "--tokenizer", "tiny"]}
# LLVM without its slow passes: the programs run a few steps only, and their compilation is the cost
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def observed(script, *argv):
    """Run script's main; counts.json in its run folder: what torch_xla counted up to the end of
    each step, [compilations, transfers from the device]."""
    sys.path.insert(0, str(ROOT))
    import torch_xla.debug.metrics as metrics

    import parallel
    counts, step_done = [], parallel.step_done

    def watch(devices):
        step_done(devices)
        counts.append([(metrics.metric_data(name) or [0])[0]
                       for name in ("CompileTime", "TransferFromDeviceTime")])
    parallel.step_done = watch
    sys.argv = [script, *argv]
    importlib.import_module(script.replace("/", ".")).main()
    import torch_xla.backends
    assert torch_xla.backends.get_mat_mul_precision() == "highest"      # fp32 is fp32 on a TPU too
    out = Path(argv[argv.index("--out") + 1])
    (out / "counts.json").write_text(json.dumps(counts))


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """curve(script, devices, mesh) -> run folder, log lines, counts (None on plain CPU: devices 0).
    Equal calls share one run. start: a run folder to go on from; more: flags."""
    @functools.cache
    def run(script, devices, mesh="", start=None, more=()):
        out = start or tmp_path_factory.mktemp("runs") / "run"
        argv = [*COMMON, *SCRIPTS[script], "--device", "xla" if devices else "cpu", "--out", str(out),
                *(["--mesh", mesh] if mesh else []), *more]
        env = {k: v for k, v in os.environ.items() if k != "PJRT_DEVICE"}
        env.update(OMP_NUM_THREADS="1", XLA_FLAGS=FLAGS)
        if devices:
            env.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(devices))
        command = [f"{script}.py"] if not devices else ["tests/test_spmd.py", script]
        done = subprocess.run([sys.executable, *command, *argv], cwd=ROOT, env=env,
                              capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
        assert mesh in done.stdout
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return out, lines, json.loads((out / "counts.json").read_text()) if devices else None
    return run


def same(found, expected, keys, tolerance):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected):
        for key in keys:
            assert a[key] == pytest.approx(b[key], rel=tolerance), (a["step"], key)


def averages(out):
    return load_file(out / "final" / "ema.safetensors")


def close(a, b, tolerance):
    """Largest difference of two sets of weights, relative to the largest weight of each tensor.
    Wider than for losses: Adam divides by the gradient's size, and some gradients are rounding."""
    assert a.keys() == b.keys()
    worst = max((float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-3)), k) for k in b)
    assert worst[0] < tolerance, worst


@pytest.mark.parametrize("devices, mesh", [(4, "fsdp=4"), (8, "fsdp=4,tensor=2"), (1, ""), (8, "fsdp=8")])
def test_every_mesh_gives_the_curve_of_one_cpu(curve, devices, mesh):
    """20 steps, each in one of the four averages that are compared."""
    _, expected, _ = curve("train_dit", 0)
    _, found, _ = curve("train_dit", devices, mesh)
    same(found, expected, ("loss", "flow", "text", "grad_norm"), 1e-4)
    same(found, expected, ("loss",), 1e-5)
    assert expected[0]["loss"] > 1.1 * expected[-1]["loss"]


def test_the_average_of_four_devices_is_that_of_one_cpu(curve):
    close(averages(curve("train_dit", 4, "fsdp=4")[0]), averages(curve("train_dit", 0)[0]), 5e-3)


def test_one_program_a_step_and_no_look_at_a_value_between_log_lines(curve):
    _, _, counts = curve("train_dit", 4, "fsdp=4")
    compiles, transfers = zip(*counts[:21])             # the first is the start, then 20 steps
    assert compiles[0] < compiles[1]
    assert len(set(compiles[1:11])) == 1, compiles      # saving, after step 10, gathers each tensor by
    assert len(set(compiles[11:21])) == 1, compiles     # a program of its own
    read = [step for step in range(1, 20) if transfers[step + 1] != transfers[step]]
    assert read == [5, 10, 15], (read, transfers)       # after these steps a line is logged


def test_a_checkpoint_of_four_devices_resumes_on_two(curve, tmp_path):
    whole, expected, _ = curve("train_dit", 4, "fsdp=4")
    start = tmp_path / "resumed"
    shutil.copytree(whole, start)
    shutil.rmtree(start / "checkpoints" / "step-0000020")
    shutil.rmtree(start / "final")
    out, found, counts = curve("train_dit", 2, start=start)
    assert len(counts) < 20                             # ten steps, not twenty
    same(found, expected, ("loss",), 1e-5)
    close(averages(out), averages(whole), 5e-3)


def test_steps_of_questions_alone_are_a_second_program(curve):
    """8 of 9 samples ask, in some batches all: then the DiT is left out. One image or two in a batch
    are one program."""
    more = ("--log-every", "1", "--data", "builtin:qa=8", "builtin:synthetic=1")
    _, expected, _ = curve("train_dit", 0, "", None, more)
    _, found, counts = curve("train_dit", 4, "fsdp=4", None, more)
    asks = ["flow" not in line for line in expected]
    assert 1 < sum(asks) < 19 and asks == ["flow" not in line for line in found]
    same(found, expected, ("loss", "text"), 1e-5)
    compiles = [c for c, _ in counts[:11]]                  # up to the first save
    new = [step for step in range(10) if compiles[step + 1] != compiles[step]]
    assert new == sorted(asks.index(kind) for kind in (True, False)), (new, asks, compiles)


def test_a_head_as_wide_as_the_trunk(curve):
    """Its blocks are one stack with the trunk's (scan.Stacks), and a loop over a part of it; in
    sampling with guidance each block is called by itself. The same losses and the same pictures."""
    more = ("--steps", "3", "--log-every", "1", "--head-width", "160", "--head-depth", "2",
            "--guidance", "3", "--sample-steps", "2")
    one, expected, _ = curve("train_dit", 0, "", None, more)
    two, found, _ = curve("train_dit", 2, "", None, more)
    same(found, expected, ("loss", "flow", "grad_norm"), 1e-5)
    a, b = (np.asarray(Image.open(next((out / "samples").iterdir()))).astype(int)
            for out in (one, two))
    assert np.abs(a - b).max() <= 2 and a.std() > 10


@pytest.mark.parametrize("devices", [4])
def test_stage_one_on_four_devices(curve, devices):
    """Reconstruction, VGG terms, and the discriminator from steps 2 and 5 on. The last five steps
    are not compared: there lambda, a quotient of two gradients, turns rounding into percents on
    some CPUs."""
    _, expected, _ = curve("train_decoder", 0)
    out, found, counts = curve("train_decoder", devices)
    same(found[:3], expected[:3], ("l1", "lpips", "gram", "loss", "disc"), 1e-3)
    same(found[1:3], expected[1:3], ("gan",), 1e-3)
    same(found[:2], expected[:2], ("loss", "l1"), 1e-5)     # ten steps; rounding grows with each
    compiles = [c for c, _ in counts[:21]]              # another program with D, and one with GAN
    assert len(set(compiles[7:11])) == 1 and len(set(compiles[11:21])) == 1, compiles


def test_the_encoder_s_training_is_one_program(curve):
    """Captions of all lengths; lines are logged on the way."""
    more = ("--steps", "6", "--log-every", "2")
    _, expected, _ = curve("tiny/train_encoder", 0, "", None, more)
    _, found, counts = curve("tiny/train_encoder", 2, "", None, more)
    same(found, expected, ("loss", "contrast", "dense"), 1e-4)
    compiles = [c for c, _ in counts[:7]]
    assert len(set(compiles[1:7])) == 1, compiles


if __name__ == "__main__":
    observed(*sys.argv[1:])
