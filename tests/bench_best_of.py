"""Do the latent verifiers of best_of.py pick better pictures than chance?

    python tests/bench_best_of.py --keep best.safetensors            # draws, judges, ranks
    python tests/bench_best_of.py --keep best.safetensors --ranker runs/dit-tiny    # ranks again
    python tests/bench_best_of.py --keep best.safetensors --candidates clean        # others
    python tests/bench_best_of.py --keep a.safetensors b.safetensors c.safetensors  # three times 16

16 candidates of each benchmark prompt of shapes (one, then two) are drawn and judged once. For k =
1, 2, 4, 8, 16 the candidates are cut into groups of k; a verifier picks one of each group, blindly;
printed is the share of picks that the judge passes, beside the mean of all (a random pick) and the
groups with any that passes (the judge's own pick: the ceiling). Gain: of the pick of 16 over a
random one, prompt by prompt, so that which prompts are hard is not in its interval. AUC: how often
a verifier puts a passing candidate of a prompt before a failing one; 0.5 is chance; also apart for
prompts of one thing and of two.

Why a verifier fails: `--candidates reencoded` shows it the drawn pictures again, decoded and
encoded (are drawn latents what misleads it?), `rendered` what the judge saw in them, drawn cleanly
in the same places (are lumps?), `clean` rendered scenes, of which half have one thing of another
kind, the commonest failure (does it know the kinds at all?).
"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import benchmark
import best_of
import evaluate
import flow
import run as runs
import sample
import text_model as text
import weights
import world

SIZES = 1, 2, 4, 8, 16


def draw(args, prompts, first):
    """-> latents [P,16,N,C] of the seeds from `first` on, passed [P,16] bool."""
    devices, llm, dit, tokenizer, config, _, decoder = evaluate.load_run(args, encoder=True)
    alpha, guidance = sample.alpha_and_guidance(args, dit, config)
    latents, passed = [], []
    for p in tqdm(prompts, desc="drawing"):
        cond = text.direct_condition(llm, tokenizer, [p.text], devices.device)
        noise = torch.stack([flow.noise_for(p.text, first + i, dit.tokens, dit.channels)
                             for i in range(SIZES[-1])]).to(devices.device)
        z = flow.generate(dit, cond, noise, alpha, args.steps, guidance,
                          interval=args.guidance_interval)                      # [16,N,C]
        latents.append(z.cpu())
        passed.append([benchmark.judge(x, p)[0] for x in decoder(z).float()])
    return torch.stack(latents), torch.tensor(passed)


def clean(prompts, encoder):
    """Rendered candidates, every second one wrong -> latents [P,16,N,C], passed [P,16] bool."""
    latents, rand = [], world.generator("clean candidates")
    device = next(encoder.parameters()).device
    for p in prompts:
        shown = []
        for _ in range(SIZES[-1] // 2):
            true = [world.Thing(t.kind, t.colour, *at) for t, at in
                    zip(p.scene.things, world.place(rand, len(p.scene.things), False))]
            k, taken = int(rand() * len(true)), {t.kind for t in true}
            kind = world.pick(rand, [s for s in world.SHAPES if s not in taken])
            wrong = [*true[:k], dataclasses.replace(true[k], kind=kind), *true[k + 1:]]
            shown += [dataclasses.replace(p, scene=dataclasses.replace(p.scene, things=tuple(t)))
                      for t in (true, wrong)]
        x = evaluate.scene_pictures(shown, encoder.image_size).to(device)       # [16,3,S,S]
        latents.append(encoder(x))
    good = torch.arange(SIZES[-1]) % 2 == 0
    return torch.stack(latents), good.expand(len(prompts), -1)


def rendered(latents, prompts, encoder, decoder):
    """The things that the judge sees in drawn candidates [P,n,N,C], on the background asked for ->
    latents [P,n,N,C], passed [P,n] bool."""
    device, out, passed = next(encoder.parameters()).device, [], []
    for z, p in zip(latents, tqdm(prompts, desc="looking")):
        seen = [benchmark.look(x)[1] for x in decoder(z.to(device)).float()]
        scenes = [dataclasses.replace(p.scene, things=tuple(
            world.Thing(t.kind, t.colour, t.size, t.x, t.y) for t in found)) for found in seen]
        x = evaluate.scene_pictures([dataclasses.replace(p, scene=s) for s in scenes],
                                    encoder.image_size)                     # [n,3,S,S]
        out.append(encoder(x.to(device)))
        passed.append([benchmark.compare(p.scene.background, found, p)[0] for found in seen])
    return torch.stack(out), torch.tensor(passed)


def auc(good, order):
    """Pairs of a passing and a failing candidate that `order` (best first) puts right: a share."""
    place = np.argsort(order)
    right = [place[i] < place[j] for i in np.flatnonzero(good) for j in np.flatnonzero(~good)]
    return np.mean(right)


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--run", default=weights.ASSETS)
    p.add_argument("--ranker", help="a run whose LLM ranks (default: --run's)")
    p.add_argument("--keep", type=Path, nargs="+", required=True, help="latents and verdicts of 16 "
                   "candidates a prompt, drawn if absent; the next file has the next 16 seeds")
    p.add_argument("--candidates", choices=["drawn", "reencoded", "rendered", "clean"],
                   default="drawn")
    p.add_argument("--count", type=runs.positive(), default=12, help="prompts of a category")
    p.add_argument("--steps", type=runs.positive(), default=25)
    p.add_argument("--guidance", type=float)
    p.add_argument("--guidance-interval", type=float, nargs=2)
    p.add_argument("--dtype", choices=["bfloat16", "float32"])
    args = p.parse_args()
    args.device, args.encoder, args.decoder, args.schedule = "auto", None, None, "clean"
    sample.check_schedule(args)
    pool = [q for q in benchmark.prompts(40)
            if q.category in benchmark.CATEGORIES and q.scene.things[0].colour]
    prompts = [q for name in ("single object", "colours", "two objects", "attribution")
               for q in [q for q in pool if q.category == name][:args.count]]
    for k, path in enumerate(args.keep):
        if not path.is_file():
            latents, passed = draw(args, prompts, SIZES[-1] * k)
            save_file({"latents": latents, "passed": passed}, path)
    kept = [load_file(path) for path in args.keep]
    latents, passed = (torch.cat([k[name] for k in kept], 1)        # [P,16n,N,C], [P,16n]
                       for name in ("latents", "passed"))
    args.run = args.ranker or args.run
    pixels = args.candidates != "drawn"
    devices, llm, _, tokenizer, _, encoder, decoder = evaluate.load_run(
        args, encoder=pixels, decoder=pixels)
    if args.candidates == "reencoded":
        latents = [encoder(decoder(z.to(devices.device)).float().clamp(0, 1)) for z in latents]
    elif args.candidates == "rendered":
        latents, passed = rendered(latents, prompts, encoder, decoder)
    elif args.candidates == "clean":
        latents, passed = clean(prompts, encoder)
    passed = passed.numpy()
    rows = [best_of.scores(llm, tokenizer, z.to(devices.device), q.text)
            for z, q in zip(latents, tqdm(prompts, desc="ranking"))]

    results, mixed = {}, [k for k, good in enumerate(passed) if 0 < good.sum() < len(good)]
    print(f"{len(prompts)} prompts, {passed.mean():.3f} of the {args.candidates} candidates pass, "
          f"{len(mixed)} prompts have both kinds; ranked by {args.run}\n\n{'pick':<10}"
          + "".join(f"{f'best of {k}':>12}" for k in SIZES)
          + f"{'gain at 16 (95 %)':>30}{'AUC (95 %)':>25}{'one thing, two':>18}")
    for name in ("random", *best_of.KEYS, "judge"):
        shares = []
        for k in SIZES:
            share = []                                  # a value a prompt, mean over its groups
            for good, row in zip(passed, rows):
                groups = [list(range(i, i + k)) for i in range(0, len(good), k)]
                if name in best_of.KEYS:
                    picks = [good[g[best_of.rank([row[i] for i in g], name)[0]]] for g in groups]
                else:
                    picks = [good[g].mean() if name == "random" else good[g].any() for g in groups]
                share.append(np.mean(picks))
            shares.append(evaluate.interval([share]))
        pairs = [auc(passed[k], best_of.rank(rows[k], name)) if name in best_of.KEYS else
                 0.5 if name == "random" else 1.0 for k in mixed]
        by = [[v for k, v in zip(mixed, pairs) if len(prompts[k].things) == n] for n in (1, 2)]
        by = [float(np.mean(b)) if b else None for b in by]
        gain = evaluate.interval([[a - good.mean() for a, good in zip(share, passed)]])
        results[name] = {"share": [s[0] for s in shares], "at 16": shares[-1], "gain": gain,
                         "auc": evaluate.interval([pairs]) if mixed else None,
                         "auc by things": by}
        print(f"{name:<10}" + "".join(f"{s[0]:>12.3f}" for s in shares)
              + "{:>+11.3f} ({:+.3f} to {:+.3f})".format(*gain)
              + ("{:>9.3f} ({:.3f} to {:.3f})".format(*results[name]["auc"]) if mixed else
                 f"{'-':>25}")
              + "{:>11}, {}".format(*("-" if b is None else f"{b:.3f}" for b in by)))
    print(json.dumps({"task": "best of N", "run": str(args.run),
                      "candidates": args.candidates, "prompts": len(prompts),
                      "mixed": len(mixed), **results}))


if __name__ == "__main__":
    runs.main(main)
