"""Check and measure on one GPU, in eight minutes, all that only a GPU can show.

    bash tests/gpu.sh [--out DIR] [--minutes 8]     # one NVIDIA GPU, no network, no weights
    bash tests/gpu.sh --cpu                         # the same parts in miniature, on a CPU

Each part is a process with a time limit, the most valuable first, so that a failure stops no other
part. A part prints its results as JSON lines. They go into gpu.json, and as tables into gpu.md.
Weights are random, because the speed does not depend on them. The trainer itself is timed; for the
DiT alone, stand-ins give it conditions and latents. The exit status is 1 if a part failed.
"""
import argparse
import contextlib
import datetime
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LENGTH = 320                # 256 image tokens and a caption; one length is one compiled program


def parts(cpu, memory_gb, out):
    """Return the parts in the order of their value: [(name, limit in seconds, command)]."""
    python, device = sys.executable, "cpu" if cpu else "cuda"
    golden = [python, "tests/golden.py", "--device", device,
              *["tests/golden/dit.safetensors"] * cpu]
    pytest = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/test_cuda.py",
              *["-k", "not compiled and not fsdp2"] * cpu]
    bench = [python, __file__, "--part", "bench", *["--cpu"] * cpu, "--out", str(out)]
    big, small = ("tiny", "tiny") if cpu else ("2b", "0.5b")
    batches, fewer = (["2", "4"], ["2"]) if cpu else (["16", "64"],) * 2
    # The state of 2b takes 82 GB with a trained LLM, 57 GB with a frozen one, 49 GB without one.
    # Without recomputation an eager DiT keeps 1.2 GB per image, by `--part saved`.
    large = cpu or memory_gb > 140
    llm = ["--llm", "trained" if large else "frozen"]
    remat = ["--remat", "none" if large else "block"]
    rest = [python, __file__, *["--cpu"] * cpu, "--out", str(out), "--size", big, "--part"]
    return [
        ("golden files, fp32", 60, golden),
        ("tests/test_cuda.py", 150, pytest),
        (f"{big}, LLM and encoder", 150,
         [*bench, "--size", big, *llm, "--batches", *batches, "--profile"]),
        (f"{big}, DiT alone", 120,
         [*bench, "--size", big, *remat, "--batches", *batches, "--eager"]),
        ("golden files, bf16", 40, [*golden, "--dtype", "bfloat16"]),
        (f"{big}, sampling", 60, [*rest, "sampling", "--batches", *["1", "2" if cpu else "32"]]),
        ("tiny training", 90, [*rest, "tiny"]),
        (f"{big}, saved tensors", 60, [*rest, "saved"]),
        (f"{small}, DiT alone", 60, [*bench, "--size", small, "--batches", *fewer]),
        (f"{small}, LLM and encoder", 90,
         [*bench, "--size", small, "--llm", "trained", "--batches", *fewer])]


# ------------------------------------------------------------------------------------------------
# Training speed: train_dit.py --bench, several times in one process
# ------------------------------------------------------------------------------------------------

def bench(args):
    """Print a row for each batch size, compiled, and for the last one eager or under the profiler.
    A row that fails, as one that does not fit the memory, does not stop the others."""
    import torch

    import train_dit
    quick_weights()
    if args.llm == "none":
        dit_alone(args.size)
    torch._dynamo.config.automatic_dynamic_shapes = False       # another batch: another program
    usual, failed = "eager" if args.cpu else "compiled", False
    runs = [(batch, usual, False) for batch in args.batches]
    runs += [(args.batches[-1], "eager", False)] * args.eager
    runs += [(args.batches[-1], usual, True)] * args.profile
    skip, count, step = (1, 2, train_dit.train_step) if args.cpu else (4, 10, train_dit.train_step)
    for batch, mode, profile in runs:
        flags = ["--device", "cpu" if args.cpu else "cuda", "--dtype", "bfloat16", "--size",
                 args.size, "--batch", batch, "--micro-batch", batch, "--workers",
                 0 if args.cpu else 8, "--bench", skip + count, "--remat", args.remat,
                 "--compile" if mode == "compiled" else "--no-compile"]
        flags += [] if args.size == "tiny" else ["--random-init", "--length", LENGTH]
        flags += ["--freeze", "llm"] * (args.llm == "frozen")
        row = dict(table="training", size=args.size, llm=args.llm, batch=batch, mode=mode,
                   remat=args.remat)
        said, train_dit.train_step = io.StringIO(), Profiled(step, skip, count) if profile else step
        try:
            with contextlib.redirect_stdout(said):
                call(train_dit, flags)
            found = json.loads(said.getvalue().splitlines()[-1])
            report({**row, **(train_dit.train_step.found if profile else found)})
        except (Exception, SystemExit) as error:
            failed = True
            print(f"batch {batch}, {mode}: {type(error).__name__}: {error}", file=sys.stderr)
        train_dit.train_step = step
        torch._dynamo.reset()
        gc.collect()
        if not args.cpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    sys.exit(failed)


def call(script, flags):
    sys.argv = ["train.py", *map(str, flags)]
    script.main()


def report(row):
    print(json.dumps(row), flush=True)


def quick_weights():
    """Let initial matrices be parts of one random tensor: to draw 4 billion numbers takes a
    minute. (All-zero AdaLN weights would need less power than those of a real run.)"""
    import torch

    import dit
    import text_model
    numbers = torch.randn(2 ** 24, generator=torch.Generator().manual_seed(0)) * 0.02

    def quick(initial):
        def value(name, shape, seed):
            if len(shape) == 1:
                return initial(name, shape, seed)
            n = shape.numel()
            return numbers.repeat(-(-n // len(numbers)))[:n].view(shape)
        return value
    dit.initial, text_model.initial = quick(dit.initial), quick(text_model.initial)


def dit_alone(size):
    """Put stand-ins in the place of the LLM and the encoder."""
    import torch
    import torch.nn as nn

    import chat
    import networks
    import stage2
    import weights
    from dit import DiT

    class Conditions(nn.Module):
        """The LLM: the same random conditions in every step."""

        def __init__(self, tokens, width):
            super().__init__()
            self.model, self.shape = nn.Module(), (tokens, width)
            self.model.layers = []

        def embed(self, ids, start, answer, z):
            generator = torch.Generator(z.device).manual_seed(0)
            return torch.randn(len(z), *self.shape, generator=generator, device=z.device)

        def forward(self, x):
            return x

        def text_loss(self, h, where, targets):
            return h.new_zeros(())

        def condition(self, h, start):
            return h

        def train_flops(self, length, labelled, frozen):
            return 0

    class Latents(nn.Module):
        """The encoder: the same random latents in every step."""
        crop, resample, image_size = "squash", 3, 32

        def __init__(self, tokens, channels):
            super().__init__()
            self.tokens, self.channels = tokens, channels

        def forward(self, x):
            generator = torch.Generator(x.device).manual_seed(0)
            return torch.randn(len(x), self.tokens, self.channels, generator=generator,
                               device=x.device)

        def forward_flops(self):
            return 0

    encoder = Latents(64, 96) if size == "tiny" else Latents(256, 1152)
    networks.frozen_networks = lambda args, init, devices: (
        encoder, None, None, chat.load_tokenizer(weights.TINY), "stand-ins")
    stage2.build_stage2 = lambda config, dtype: (
        Conditions(config.dit.tokens, config.dit.width), DiT(config.dit, dtype))


# ------------------------------------------------------------------------------------------------
# Where the time of a step goes
# ------------------------------------------------------------------------------------------------

# Kinds of kernels by name, on CUDA and on the CPU; the first match counts
KINDS = {"attention": r"flash|fmha|attention|sdp",
         "matmul": r"gemm|nvjet|cutlass|xmma|cublas|splitk|\b(add|b)?mm\b|linear",
         "optimizer": r"adam|multi_tensor|foreach|lerp|norm_cleanup",
         "copies": r"memcpy|memset|copy_",
         "elementwise": r""}


class Profiled:
    """A train_step that profiles `count` calls after the first `skip`, and keeps them in `found`.
    """

    def __init__(self, step, skip, count):
        import torch
        self.step, self.skip, self.count, self.calls = step, skip, count, 0
        self.profiler = torch.profiler.profile()

    def __call__(self, *args):
        if self.calls == self.skip:
            self.wait()
            self.profiler.start()
            self.since = time.perf_counter()
        result = self.step(*args)
        self.calls += 1
        if self.calls == self.skip + self.count:
            self.wait()
            wall = time.perf_counter() - self.since
            self.profiler.stop()
            self.found = self.read(wall)
        return result

    def wait(self):
        import torch
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def read(self, wall):
        """Return the shares of the wall time by kind of kernel, and the longest kernels."""
        import torch
        cuda = torch.cuda.is_available()
        kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        seconds = {}
        for event in self.profiler.key_averages():
            # labels such as Optimizer.step#AdamW.step span kernels that are counted themselves
            if event.device_type == kind and not event.is_user_annotation:
                own = event.self_device_time_total if cuda else event.self_cpu_time_total
                seconds[event.key] = own / 1e6
        shares = dict.fromkeys(KINDS, 0.0)
        for name, s in seconds.items():
            found = next(k for k, pattern in KINDS.items() if re.search(pattern, name, re.I))
            shares[found] += s / wall
        shares["idle"] = 1 - sum(shares.values())
        longest = sorted(seconds.items(), key=lambda item: -item[1])[:15]
        return dict(table="profile", steps=self.count, seconds=wall, shares=shares,
                    kernels=[[name[:80], s / wall] for name, s in longest])


# ------------------------------------------------------------------------------------------------
# What a block keeps for its backward pass
# ------------------------------------------------------------------------------------------------

def saved(args):
    """Report the bytes that one block keeps for its backward pass, per token; the casts of its
    weights, which do not grow with the batch, are `fixed_mb`. In bf16, with fused attention and the
    padded SwiGLU, as on a GPU."""
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    import dit
    import text_model
    device = torch.device("cpu" if args.cpu else "cuda")
    dit.attention = F.scaled_dot_product_attention
    text_model.attention = lambda q, k, v, mask: F.scaled_dot_product_attention(
        q, k, v, is_causal=True)
    dit.SwiGLU.MULTIPLE["cpu"] = dit.SwiGLU.MULTIPLE["cuda"]
    size, llm = dit.SIZES[args.size], text_model.TINY
    llm, N = (llm, 64) if args.size == "tiny" else (text_model.QWEN_1_5B, 256)
    normal = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16)
    angles = normal(N, llm.hidden_size // llm.num_attention_heads)
    rope = dit.RoPE(size.width // size.heads, int(N ** 0.5)).to(device)
    blocks = {
        "DiT block": (dit.Block(size.width, size.heads, size.width, False, 1e-6), size.width,
                      lambda n: (normal(n, N, size.width).requires_grad_(), rope)),
        "LLM layer": (text_model.Layer(llm), llm.hidden_size, lambda n: (angles, angles))}

    def measure(mode, block, run, width, shared, n):
        x, shared = normal(n, N, width).requires_grad_(), shared(n)
        tensors = [*block.parameters(), *rope.buffers(), *filter(torch.is_tensor, shared)]
        known = {t.untyped_storage().data_ptr() for t in tensors}
        kept = {}                                       # alive, so that no address returns
        if mode == "recomputed":                        # the hooks do not see what checkpoint holds
            kept[x.untyped_storage().data_ptr()] = x

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = run(x, *shared)
        del y
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    torch._dynamo.config.automatic_dynamic_shapes = False
    for name, (block, width, shared) in blocks.items():
        block.to(device)
        again = lambda *inputs: checkpoint(block, *inputs, use_reentrant=False)
        modes = {"eager": block, "recomputed": again}
        if args.size != "tiny":
            modes["compiled"] = torch.compile(block, fullgraph=True)
        for mode, run in modes.items():
            one, two = (measure(mode, block, run, width, shared, n) for n in (2, 4))
            report(dict(table="saved", size=args.size, block=name, mode=mode,
                        bytes_per_token=(two - one) / 2 / N, fixed_mb=(2 * one - two) / 1e6))


# ------------------------------------------------------------------------------------------------
# Sampling, and a minute of training
# ------------------------------------------------------------------------------------------------

def sampling(args):
    """Time 25 Euler steps with guidance, by a DiT with random weights."""
    import torch

    import dit
    import flow
    import parallel
    quick_weights()
    devices = parallel.setup("cpu" if args.cpu else "cuda")
    size, steps = dit.SIZES[args.size], 2 if args.cpu else 25
    N, C = (64, 96) if args.size == "tiny" else (256, 1152)
    with torch.device("meta"):
        model = dit.DiT(dit.DiTConfig(C, N, size.width, size.depth, size.heads), devices.dtype)
    parallel.build(model, parallel.initial_rows(model, dit.initial, 0), devices)
    for name, module in model.named_modules():          # as stage2.load_run does
        if isinstance(module, torch.nn.Linear) and "t_embedder" not in name:
            module.to(devices.dtype)
    torch._dynamo.config.automatic_dynamic_shapes = False
    parallel.compile_blocks(model.dit_blocks, None, devices)
    alpha = flow.shift_alpha(N, C)
    for batch in args.batches:
        noise = torch.randn(batch, N, C, device=devices.device)
        cond = torch.randn(batch, N, size.width, device=devices.device)

        def seconds(steps):
            start = time.perf_counter()
            flow.sample(model, cond, noise, alpha, steps, 3.0).sum().item()     # wait for all
            return time.perf_counter() - start
        seconds(2)
        taken = seconds(steps)
        report(dict(table="sampling", size=args.size, batch=batch, steps=steps, guidance=3.0,
                    dtype=str(devices.dtype)[6:], seconds=taken, images_per_s=batch / taken))


def tiny(args):
    """Train the tiny preset for a minute, and keep the last sample grid."""
    import cli
    import train_dit
    run = args.out / "dit-tiny"
    shutil.rmtree(run, ignore_errors=True)
    every, log = (2, 1) if args.cpu else (100, 20)
    flags = ["--device", "cpu" if args.cpu else "cuda", "--out", run, "--workers",
             0 if args.cpu else 8, "--sample-every", every, "--log-every", log]
    flags += ["--steps", 2, "--batch", 4, "--sample-steps", 1, "--guidance", 1] * args.cpu
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.alarm(60)
    try:
        call(train_dit, flags)
    except cli.Stopped:                                 # after a minute
        pass
    signal.alarm(0)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    speeds = sorted(line["images_per_s"] for line in lines)
    shutil.copy(max((run / "samples").glob("*.png")), args.out / "samples.png")
    report(dict(table="tiny", steps=lines[-1]["step"], images_per_s=speeds[len(speeds) // 2],
                first_loss=lines[0]["loss"], last_loss=lines[-1]["loss"],
                **{k: next((line[k] for line in reversed(lines) if k in line), None)
                   for k in ("background_right", "colour_right", "data_wait_s")}))


# ------------------------------------------------------------------------------------------------
# Run the parts and write the tables
# ------------------------------------------------------------------------------------------------

def run_part(command, seconds, device):
    """Run a command -> outcome, seconds, rows of results, end of its output."""
    start, outcome = time.perf_counter(), "ok"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace", start_new_session=True,
                          env={**os.environ, "DEVICE": device, "PYTHONUNBUFFERED": "1"}) as child:
        try:
            said, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)        # with its loader's workers
            said, _ = child.communicate()
            outcome = f"stopped after {seconds:.0f} s"
    if child.returncode and outcome == "ok":
        outcome = f"failed, exit status {child.returncode}"
    lines = re.split(r"[\r\n]+", said)
    rows = [json.loads(row) for row in re.findall(r'\{"table".*', said)]   # after a progress bar
    return dict(outcome=outcome, seconds=time.perf_counter() - start, rows=rows,
                tail=[line[:300] for line in lines if line.strip()][-25:])


def about(cpu):
    """Return what the tables must name: device, versions, date, commit."""
    import torch

    def said(*command):
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""
    gpu = None if cpu else torch.cuda.get_device_properties(0)
    return dict(
        device="CPU, in miniature: no measurement" if cpu else gpu.name,
        memory_gb=None if cpu else round(gpu.total_memory / 1e9, 1),
        driver="" if cpu else said("nvidia-smi", "--query-gpu=driver_version",
                                   "--format=csv,noheader").split("\n")[0],
        cuda=torch.version.cuda, torch=torch.__version__, python=sys.version.split()[0],
        cores=os.cpu_count(), date=datetime.date.today().isoformat(),
        commit=said("git", "rev-parse", "--short", "HEAD") or "unknown")


def number(value):
    if isinstance(value, dict):
        return ", ".join(f"{k} {number(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


def markdown(machine, done):
    """Return the tables of gpu.md."""
    def table(keys, rows):
        heads = [key.replace("_", " ") for key in keys]
        lines = [heads, ["---"] * len(keys), *([number(row.get(k)) for k in keys] for row in rows)]
        return ["| " + " | ".join(line) + " |" for line in lines] + [""]

    rows = [row for part in done for row in part["rows"]]
    of = lambda name: [row for row in rows if row["table"] == name]
    lines = ["`bash tests/gpu.sh`: " + ", ".join(
        f"{k.replace('_gb', ', GB')} {v}" for k, v in machine.items() if v), ""]
    lines += table(("part", "outcome", "seconds"), done)
    lines += ["Training, bf16, mean of the timed steps:", ""]
    lines += table(("size", "llm", "mode", "remat", "batch", "images_per_s", "tflops", "mfu",
                    "mfu_by_part", "memory_gb", "step_s", "data_wait_s"), of("training"))
    for row in of("profile"):
        lines += [f"{row['steps']} steps of {row['size']}, batch {row['batch']}, as shares of "
                  f"{row['seconds']:.3g} s:", ""]
        lines += table(tuple(row["shares"]), [row["shares"]])
        lines += table(("kernel", "share"), [
            dict(kernel=f"`{name.replace('|', ' ')}`", share=share) for name, share in
            row["kernels"]])
    lines += ["Sampling with guidance, the DiT alone:", ""]
    lines += table(("size", "batch", "steps", "seconds", "images_per_s", "dtype"), of("sampling"))
    lines += ["Kept by one block for its backward pass, bf16:", ""]
    lines += table(("size", "block", "mode", "bytes_per_token", "fixed_mb"), of("saved"))
    lines += ["The tiny preset, one minute:", ""]
    lines += table(("steps", "images_per_s", "first_loss", "last_loss", "background_right",
                    "colour_right", "data_wait_s"), of("tiny"))
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json, gpu.md")
    p.add_argument("--minutes", type=float, default=8, help="of all parts together")
    p.add_argument("--cpu", action="store_true", help="the same parts in miniature, on a CPU")
    a = p.add_argument_group("one part in this process").add_argument
    a("--part", choices=["bench", "sampling", "tiny", "saved"])
    a("--size", default="2b")
    a("--llm", choices=["none", "frozen", "trained"], default="none", help="none: the DiT alone")
    a("--batches", type=int, nargs="+", default=[16, 64])
    a("--remat", choices=["none", "block"], default="block")
    a("--eager", action="store_true", help="the last batch size without --compile too")
    a("--profile", action="store_true", help="the last batch size under the profiler too")
    args = p.parse_args()
    if args.part:
        return globals()[args.part](args)

    start = time.perf_counter()
    import torch
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible; --cpu runs the parts in miniature")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    machine, done = about(args.cpu), []
    for name, limit, command in parts(args.cpu, machine["memory_gb"], args.out):
        left = 60 * args.minutes - (time.perf_counter() - start)
        if left < 10:
            found = dict(outcome="not run: no time left", seconds=0.0, rows=[], tail=[])
        else:
            found = run_part(command, min(limit, left), "cpu" if args.cpu else "cuda")
        done.append(dict(part=name, command=[str(word) for word in command], **found))
        print(f"{name}: {found['outcome']}, {found['seconds']:.0f} s", flush=True)
        (args.out / "gpu.json").write_text(json.dumps(dict(machine=machine, parts=done), indent=1))
        (args.out / "gpu.md").write_text(markdown(machine, done))
    failed = [part for part in done if part["outcome"] != "ok"]
    for part in failed:
        print(f"\n{part['part']}: {part['outcome']}", *part["tail"], sep="\n    ")
    print(f"\n{args.out}/gpu.md; {len(failed)} of {len(done)} parts failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
