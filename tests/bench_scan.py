"""Trace and compile time of a training step of 32 narrow blocks: the compiled loop (scan.py)
against the blocks one after another. Not a test. In an environment with requirements-tpu.txt:

    PJRT_DEVICE=CPU CPU_NUM_DEVICES=2 python tests/bench_scan.py

The clock is that of the process (all its threads), which other processes hardly move; trace: until
the step is recorded; compile: its first run less a later one, that is with XLA's compilation.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dit as dits  # noqa: E402
import parallel  # noqa: E402


def seconds(depth, width, loop, devices):
    """-> trace, compile, later step, and the losses of three steps."""
    model = dits.DiT(32, 16, width, depth, 4)
    dits.init_weights(model, 0)
    if loop:
        parallel.use_scan(devices, model)
    parallel.shard(model, devices)
    optimizer = parallel.adamw(list(model.parameters()), devices, lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    batch = {k: torch.randn(8, *shape, generator=draw) for k, shape in
             dict(x=(16, 32), y=(16, 32), cond=(16, width), t=()).items()}
    batch = parallel.place(batch, devices)
    parallel.step_done(devices)
    clock, losses = [], []
    for _ in range(3):
        start = time.process_time()
        loss = (model(batch["x"], batch["t"], batch["cond"]) - batch["y"]).square().mean()
        loss.backward()
        norm = parallel.clip_grad(model.parameters(), 1.0, devices)
        parallel.guarded_step(optimizer, norm, devices)
        optimizer.zero_grad(set_to_none=True)
        traced = time.process_time()
        parallel.step_done(devices)
        losses.append(loss.item())
        clock.append((traced - start, time.process_time() - traced))
    return clock[0][0], clock[0][1] - clock[2][1], sum(clock[2]), losses


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--depth", type=int, default=32)
    p.add_argument("--width", type=int, default=64)
    args = p.parse_args()
    devices = parallel.setup("xla", "float32")
    print(f"{devices}; {args.depth} blocks of width {args.width}")
    found = {}
    for name, loop in (("loop", True), ("one after another", False)):
        trace, compiled, step, losses = seconds(args.depth, args.width, loop, devices)
        found[name] = trace + compiled
        print(f"{name:<18} trace {trace:6.1f} s  compile {compiled:6.1f} s  a step {step:5.2f} s  "
              f"losses {' '.join(f'{v:.6f}' for v in losses)}", flush=True)
    print(f"ratio {found['loop'] / found['one after another']:.3f}")


if __name__ == "__main__":
    main()
