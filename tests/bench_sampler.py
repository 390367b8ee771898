"""Speed of the sampler's exact savings against the forms without them. Not a test.

    python tests/bench_sampler.py                       # tiny, and width 640, depth 4, 256 tokens
    python tests/bench_sampler.py --sizes 640x4 --rounds 9 --threads 2 --device cuda

    guided step   both branches of guidance, the null condition's modulation from a table, against
                  the doubled batch: every image twice, a full condition for each
    best of N     N candidates of one prompt that share its modulation, several in a product,
                  against N runs of one image each: our own, and those with the doubled batch

All forms of a row take turns in one process, so that a busy machine slows all of them; with one CPU
thread the clock is that of the process. Printed are medians of a whole sample of --steps steps,
divided by the steps, and their ratios (below 1: the saving saves), after a check that the latents
agree. The language model's part is not in it: N separate runs would read the prompt N times.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flow  # noqa: E402
from bench_dit import arguments  # noqa: E402
from dit import SIZES, DiT  # noqa: E402
from flow import candidates_together, generate  # noqa: E402

# width x depth: heads, N tokens, C channels
ROWS = {"tiny": (SIZES["tiny"].heads, 64, 96), "640x4": (10, 256, 96), "1280x4": (32, 256, 1152),
        "2048x2": (32, 256, 1152)}                  # as 0.5b and as 2b
ALPHA, SCALE = 8.0, 3.0


def doubled(model, cond, noise, steps):
    """The plain form of guidance, cond [B,N,Z]: one batch of 2B, nothing shared."""
    both = torch.cat([cond, model.null_condition(1).expand_as(cond)])

    def velocity(x, t):
        v_c, v_u = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return flow.guide(v_c, v_u, SCALE)
    return flow.euler(velocity, noise, flow.schedule_pairs("clean", steps, ALPHA))


@torch.no_grad()
def bench(name, args):
    heads, N, C = ROWS[name]
    D, depth = ((SIZES["tiny"].width, SIZES["tiny"].depth) if name == "tiny"
                else map(int, name.split("x")))
    g, n, S = torch.Generator().manual_seed(0), args.candidates, args.steps
    model = DiT(C, N, D, depth, heads).requires_grad_(False)
    for p in model.parameters():                        # adaLN-zero would hide every difference
        p.copy_(torch.randn(p.shape, generator=g) * (0.5 * p[0].numel() ** -0.5))
    model.to(args.device)
    cond, noise = (torch.randn(s, generator=g).to(args.device) for s in ((1, N, D), (n, N, C)))
    each, together = noise.split(1), candidates_together(N, args.device)

    def plain(x):                                       # no guidance
        pairs = flow.schedule_pairs("clean", S, ALPHA)
        return flow.euler(lambda x, t: model(x, t, cond), x, pairs)

    def ours(x, scale, together=None):
        return generate(model, cond, x, ALPHA, S, scale, together=together)

    forms = {
        "one": lambda: ours(each[0], SCALE),
        "one, doubled": lambda: doubled(model, cond, each[0], S),
        "best": lambda: ours(noise, SCALE, together),
        "exact": lambda: ours(noise, SCALE, 1),
        "runs": lambda: torch.cat([ours(x, SCALE) for x in each]),
        "runs, doubled": lambda: torch.cat([doubled(model, cond, x, S) for x in each]),
        "best, unguided": lambda: ours(noise, 1.0, together),
        "exact, unguided": lambda: ours(noise, 1.0, 1),
        "runs, unguided": lambda: torch.cat([plain(x) for x in each])}
    for a, b in (("one", "one, doubled"), ("best", "runs, doubled"), ("exact", "runs, doubled"),
                 ("runs", "runs, doubled"), ("best, unguided", "runs, unguided"),
                 ("exact, unguided", "runs, unguided")):
        x, y = forms[a](), forms[b]()
        if not (x - y).abs().max() <= 1e-5 * y.abs().max():
            sys.exit(f"{name}: '{a}' differs from '{b}' by {(x - y).abs().max():.1e}")

    alone = args.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times = {form: [] for form in forms}
    for _ in range(args.rounds):                        # in turn: other load hits all alike
        for form, function in forms.items():
            start = clock()
            function()
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            times[form].append((clock() - start) / S * 1e3)
    ms = {form: statistics.median(v) for form, v in times.items()}

    def show(title, a, b):
        print(f"  {title:<58}{ms[a]:9.1f} ms {ms[b]:9.1f} ms  ratio {ms[a] / ms[b]:.2f}")

    print(f"{name}: {N} tokens, fp32, a step")
    show("guided step of one image: ours, doubled batch", "one", "one, doubled")
    title = f"best of {n}, {together or n} in a product"
    show(f"{title}: ours, {n} runs with doubled batch", "best", "runs, doubled")
    show(f"{title}: ours, {n} runs of ours", "best", "runs")
    show(f"{title}, no guidance: ours, {n} runs", "best, unguided", "runs, unguided")
    show(f"{n} images one at a time: ours, {n} runs of ours", "exact", "runs")
    show(f"{n} images one at a time, no guidance: ours, {n} runs", "exact, unguided",
         "runs, unguided")
    sys.stdout.flush()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--candidates", type=int, default=8)
    p.add_argument("--steps", type=int, default=10)
    args = arguments(p, ROWS)
    for name in args.sizes:
        bench(name, args)


if __name__ == "__main__":
    main()
