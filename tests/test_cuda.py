"""What a GPU must do as the CPU does: training steps, compiled blocks, FSDP2, resume, sampling.

    pytest tests/test_cuda.py                   # one line where there is no GPU
    DEVICE=cpu pytest tests/test_cuda.py        # the tests themselves, against the CPU

Losses of one step agree to 1e-4 in fp32. Later steps wander further: AdamW divides by the size of
each gradient, so where that is rounding, the update is too.
"""
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import sample
import train_decoder
import train_dit
import weights
from dit import Block, RoPE, SwiGLU
from tiny import train_encoder

DEVICE = os.environ.get("DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU; DEVICE=cpu runs these tests on the CPU", allow_module_level=True)

COMMON = ["--dtype", "float32", "--batch", "8", "--workers", "0", "--log-every", "1",
          "--sample-every", "99"]
SCRIPTS = {"train_dit": (train_dit, ["--no-compile", "--sample-steps", "1", "--guidance", "1"]),
           "train_decoder": (train_decoder, ["--no-compile", "--disc-start", "0",
                                             "--gan-start", "0"]),
           "train_encoder": (train_encoder, ["--tokenizer", str(weights.TINY)])}
LOSSES = {"train_dit": ("loss", "flow", "text"), "train_encoder": ("loss",),
          "train_decoder": ("l1", "lpips", "gram", "loss", "disc")}


def call(script, *flags):
    """Run a trainer in this process."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["train.py", *map(str, flags)])
        SCRIPTS[script][0].main()
    for s, handler in handlers.items():
        signal.signal(s, handler)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """curve(script, device, flags) -> run folder, log lines; equal calls share one run."""
    @functools.cache
    def run(script, device, more=(), steps=2):
        out = tmp_path_factory.mktemp("runs") / "run"
        call(script, *COMMON, *SCRIPTS[script][1], "--device", device, "--steps", steps, *more,
             "--out", out)
        return out, log(out)
    return run


def same(found, expected, keys, tolerance=1e-4):
    """Compare the first step's losses, and later ones ten times as loosely."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for i, (a, b) in enumerate(zip(found, expected)):
        for key in keys:
            assert a[key] == pytest.approx(b[key], rel=tolerance * (10 if i else 1)), (key, i)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_is_the_cpu_s(curve, script):
    (_, found), (_, expected) = curve(script, DEVICE), curve(script, "cpu")
    same(found, expected, LOSSES[script])


def test_the_gradient_is_the_cpu_s(curve):
    (_, found), (_, expected) = curve("train_dit", DEVICE), curve("train_dit", "cpu")
    assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-4)


def test_bf16_is_near_fp32(curve):
    """The GPU's default: bf16 products by fused attention."""
    flags = "--dtype", "bfloat16"
    (_, found), (_, expected) = curve("train_dit", DEVICE, flags), curve("train_dit", "cpu")
    same(found[:1], expected[:1], LOSSES["train_dit"], 0.01)
    assert found[0]["loss"] != expected[0]["loss"]


@pytest.mark.parametrize("remat", ["none", "block"])
def test_compiled_is_eager(curve, remat):
    (_, found), (_, expected) = (curve("train_dit", DEVICE, (flag, "--remat", remat))
                                 for flag in ("--compile", "--no-compile"))
    same(found, expected, (*LOSSES["train_dit"], "grad_norm"))


@pytest.mark.skipif(DEVICE == "cpu", reason="the CPU never waits for itself")
def test_the_host_does_not_wait_in_a_step(monkeypatch, tmp_path):
    """CUDA itself reports each wait as an error. The first step may wait: it makes the moments."""
    right, count = train_dit.train_step, iter(range(9))

    def strict(*args):
        torch.cuda.set_sync_debug_mode("error" if next(count) else "default")
        try:
            return right(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train_dit, "train_step", strict)
    call("train_dit", *COMMON, "--device", DEVICE, "--no-compile", "--bench", "3")
    assert next(count) == 3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)],
                         ids=["fp32", "bf16"])
def test_padded_ffn_is_unpadded(monkeypatch, dtype, tolerance):
    """A block of an odd hidden width, as 2b's: output, and every gradient."""
    torch.manual_seed(0)
    block, rope = Block(256, 4, 256, False, 1e-6).to(DEVICE), RoPE(64, 8).to(DEVICE)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, c = (torch.randn(2, 64, 256, device=DEVICE, dtype=dtype) for _ in range(2))

    def run(multiple):
        monkeypatch.setitem(SwiGLU.MULTIPLE, DEVICE, multiple)
        block.zero_grad()
        y = block(x, c, rope)
        y.float().square().mean().backward()
        return [y.detach(), *(p.grad for p in block.parameters())]

    assert block.mlp.hidden % 128
    for a, b in zip(run(128), run(1)):
        assert (a - b).float().norm() <= tolerance * b.float().norm()


def test_fsdp2_with_one_process(curve, tmp_path):
    """Every parameter is a DTensor, and the collectives are NCCL's."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "train_dit.py",
               *COMMON, *SCRIPTS["train_dit"][1], "--steps", "2",
               "--device", DEVICE, "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    same(log(tmp_path / "run"), curve("train_dit", DEVICE)[1], (*LOSSES["train_dit"], "grad_norm"))


@pytest.mark.parametrize("device", [DEVICE, "cpu"])
def test_a_checkpoint_resumes(curve, device, tmp_path):
    """A checkpoint written on the GPU, on the GPU and on the CPU."""
    flags = "--save-every", "2"
    whole, expected = curve("train_dit", DEVICE, flags, 4)
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints/step-0000004")
    call("train_dit", *COMMON, *SCRIPTS["train_dit"][1], "--device", device, "--steps", "4", *flags,
         "--out", out)
    found = log(out)
    assert found[:2] == expected[:2] and found[2]["images_per_s"] != expected[2]["images_per_s"]
    same(found[2:], expected[2:], (*LOSSES["train_dit"], "grad_norm"), 1e-4)


def test_an_image_is_the_cpu_s(tmp_path):
    images = []
    for device in (DEVICE, "cpu"):
        path = tmp_path / f"{len(images)}.png"
        sample.main(["a red circle left of a blue square", "--device", device, "--dtype",
                     "float32", "--steps", "20", "--out", str(path)])
        images.append(np.asarray(Image.open(path), np.int16))
    assert np.abs(images[0] - images[1]).max() <= 2
    assert images[0].std() > 10
