"""Speed of the DiT's training step against the plain form that its equations suggest. Not a test.

    python tests/bench_dit.py                        # tiny, and width 640, depth 4, 256 tokens
    python tests/bench_dit.py --sizes 640x4 --rounds 9 --threads 2 --device cuda

The plain form, below: softmax attention written out and SiLU in every block, in fp32 or with the
same casts of weights and activations to bf16. It reads the same weights. Both do forward and
backward, in turn, in one process, so that a busy machine slows both; with one CPU thread the clock
is that of the process, which other processes hardly move. Printed is the ratio of the medians
(above 1: ours is faster), after a check that outputs and gradients agree.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit import SIZES, DiT  # noqa: E402

# width x depth: heads, N tokens, C channels, batch
ROWS = {"tiny": (SIZES["tiny"].heads, 64, 96, 32), "640x4": (10, 256, 96, 4),
        "1280x4": (32, 256, 1152, 4)}


# ------------------------------------------------------------------------------------------------
# The plain form: paper section 2.2 line by line, on the weights of a DiT
# ------------------------------------------------------------------------------------------------

def linear(module, x):
    return x @ module.weight.to(x.dtype).T + module.bias.to(x.dtype)


def rms_norm(module, x):
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + module.eps)
    return y.to(x.dtype) * module.weight.to(x.dtype)


def modulation(module, c, parts):
    return linear(module[1], F.silu(c)).chunk(parts, -1)                    # the SiLU of each adaLN


def attention(module, x, rope):
    B, N, D = x.shape
    q, k, v = linear(module.qkv, x).view(B, N, 3, module.heads, -1).permute(2, 0, 3, 1, 4)

    def turn(x):                                                            # [B,H,N,hd]
        a, b = x[..., 0::2], x[..., 1::2]
        turned = torch.stack([-b, a], -1).flatten(-2)
        return x * rope.freqs_cos.to(x.dtype) + turned * rope.freqs_sin.to(x.dtype)

    scores = turn(q) * q.shape[-1] ** -0.5 @ turn(k).transpose(-2, -1)      # [B,H,N,N]
    return linear(module.proj, (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, D))


def swiglu(module, x):
    a, b = linear(module.w12, x).chunk(2, -1)
    return linear(module.w3, F.silu(a) * b)


def plain(model, x_t, t, cond, dtype):
    """x_t [B,N,C], t [B], cond [B,N,D] -> v [B,N,C]."""
    angle = t[:, None] * model.t_embedder.frequencies * 2 * torch.pi
    m = model.t_embedder.mlp
    time = linear(m[2], F.silu(linear(m[0], torch.cat([angle.sin(), angle.cos()], -1))))
    c = F.silu(time[:, None] + cond).to(dtype)                              # [B,N,D]
    proj = model.x_embedder.proj
    x = x_t.to(dtype) @ proj.weight.flatten(1).to(dtype).T + proj.bias.to(dtype)
    x = x + model.pos_embed.to(dtype)
    for block in model.dit_blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block.adaLN_modulation, c, 6)
        y = rms_norm(block.norm1, x) * (1 + scale1) + shift1
        x = x + gate1 * attention(block.attn, y, model.feat_rope)
        y = rms_norm(block.norm2, x) * (1 + scale2) + shift2
        x = x + gate2 * swiglu(block.mlp, y)
    shift, scale = modulation(model.final_layer.adaLN_modulation, c, 2)
    return linear(model.final_layer.linear, rms_norm(model.final_layer.norm_final, x)
                  * (1 + scale) + shift)


# ------------------------------------------------------------------------------------------------

def gradients(model, v):
    """One backward pass -> every gradient, flat; the model's are cleared."""
    model.zero_grad(set_to_none=True)
    v.float().square().mean().backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return flat


def distance(a, b):
    """|a - b| / |b| of two tensors."""
    return ((a - b).float().norm() / b.float().norm()).item()


def bench(name, rounds, device):
    heads, N, C, batch = ROWS[name]
    D, depth = ((SIZES["tiny"].width, SIZES["tiny"].depth) if name == "tiny"
                else map(int, name.split("x")))
    g = torch.Generator().manual_seed(0)
    model = DiT(C, N, D, depth, heads)
    for p in model.parameters():                        # adaLN-zero would hide every difference
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g) * (0.5 * p[0].numel() ** -0.5)
    model.to(device)
    x_t, cond, t = (torch.randn(s, generator=g).to(device) for s in ((batch, N, C), (batch, N, D),
                                                                     (batch,)))
    t = t.sigmoid()

    def run(form):
        model.dtype = dtypes[form[1]]
        v = model(x_t, t, cond) if form[0] == "ours" else plain(model, x_t, t, cond, model.dtype)
        return v, gradients(model, v)

    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter

    def seconds(form):
        start = clock()
        run(form)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    forms = [(who, dtype) for dtype in dtypes for who in ("ours", "plain")]
    exact = run(("plain", "fp32"))
    for form, limit in zip((forms[0], *forms[2:]), (1e-4, 0.05, 0.05)):
        errors = [distance(a, b) for a, b in zip(run(form), exact)]
        if max(errors) > limit:
            sys.exit(f"{name}: {' '.join(form)} differs from the plain form in fp32 by "
                     f"{max(errors):.1e}, more than {limit}")
    times = {form: [] for form in forms}
    for _ in range(rounds):                             # in turn: other load hits all alike
        for form in forms:
            times[form].append(seconds(form))
    ms = {form: 1e3 * statistics.median(v) for form, v in times.items()}
    print(f"{name}: batch {batch} of {N} tokens")
    for dtype in dtypes:
        a, b = ms["ours", dtype], ms["plain", dtype]
        print(f"  {dtype}  ours {a:8.1f} ms  plain {b:8.1f} ms  ratio {b / a:.2f}")
    print(f"  ours in bf16 against plain in fp32: {ms['plain', 'fp32'] / ms['ours', 'bf16']:.2f}",
          flush=True)


def arguments(p, rows):
    """Parse the flags and set the number of threads."""
    p.add_argument("--sizes", nargs="+", choices=list(rows), default=["tiny", "640x4"])
    p.add_argument("--rounds", type=int, default=7, help="timings a form; the median counts")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    p.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    return args


def main():
    args = arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), ROWS)
    for name in args.sizes:
        bench(name, args.rounds, args.device)


if __name__ == "__main__":
    main()
