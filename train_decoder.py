"""Stage 1: train the RAE decoder, latent tokens back to pixels, against a frozen encoder.

    python train_decoder.py                      # built-in data, tiny, a few CPU minutes
    python train_decoder.py --size xl --data folder/ --batch 512 --device cuda

    z = encoder(x) + noise;  x_hat = decoder(z);  loss = l1 * |x_hat - x|         (paper section 2.1)
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import decoder as decoders
import parallel
import run as runs
import weights

# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

#            steps, batch, lr, final lr, warm-up steps, EMA; the paper's: 80 virtual epochs of 1.28 M
DEFAULTS = {
    "tiny": dict(steps=3000, batch=32, lr=1.5e-3, lr_final=1e-5, warmup=200, ema=0.998),
    "paper": dict(steps=200_000, batch=512, lr=4e-4, lr_final=4e-5, warmup=5000, ema=0.9978),
}
DATA = ["builtin:web=3", "builtin:synthetic=2", "builtin:text=1"]


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    runs.add_flags(p, steps=None, batch=None, data=DATA, log=20, sample=500, save=1000)
    g = p.add_argument_group("model")
    g.add_argument("--size", choices=list(decoders.SIZES), default="tiny")
    g.add_argument("--latent", choices=["siglip2", "webssl"], default="siglip2")
    g.add_argument("--encoder", help="file, folder or hub id of the frozen encoder")
    g.add_argument("--layers", type=runs.positive(), default=1,
                   help="the latent sums the encoder's last K blocks (1: the paper's)")
    g.add_argument("--patch", type=runs.positive(), help="pixels a token decodes to (default: the "
                   "encoder's patch; 16 gives 256 px from 16x16 tokens)")
    g = p.add_argument_group("loss and optimizer")
    g.add_argument("--l1", type=runs.positive(float, zero=True), default=1.0)
    g.add_argument("--noise-tau", type=runs.positive(float, zero=True), default=0.0,
                   help="noise on the latent while training (0: off)")
    g.add_argument("--noise-dist", choices=["half-normal", "uniform"], default="half-normal",
                   help="of its strength: |N(0,tau^2)| (paper) or tau U(0,1) (RAE)")
    g.add_argument("--lr", type=runs.positive(float))
    g.add_argument("--lr-final", type=runs.positive(float, zero=True))
    g.add_argument("--warmup", type=runs.positive(zero=True), help="steps")
    g.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.95])
    g.add_argument("--ema", type=runs.positive(float, zero=True), help="decay; 0: off")
    args = p.parse_args()
    for key, value in DEFAULTS["tiny" if args.size == "tiny" else "paper"].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.out = args.out or Path(f"runs/decoder-{args.size}")
    return args


class Collate:
    """Records -> images uint8 [B,3,S,S] and their numbers n [B]; runs in the loader's worker."""

    def __call__(self, records):
        images = torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records])
        return {"images": images, "n": [r["n"] for r in records],
                "skipped": [s for r in records for s in r["skipped"]]}


def latent_noise(z, n, seed, tau, dist):
    """z + s * noise with one strength s an image, keyed by (seed, image number): paper section 2.1."""
    if not tau:
        return z
    noise = torch.empty(z.shape)
    for i, number in enumerate(n):
        g = torch.Generator().manual_seed(seed * 1_000_003 + number)
        s = (torch.randn((), generator=g).abs() if dist == "half-normal"
             else torch.rand((), generator=g)) * tau
        noise[i] = s * torch.randn(z.shape[1:], generator=g)
    return z + noise.to(z.device)


def psnr(a, b):
    """[B,3,H,W] in [0,1], both rounded to 8 bits -> [B] in dB."""
    a, b = ((x.clamp(0, 1) * 255).round() / 255 for x in (a, b))
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()


def main():
    args = arguments()

    # --------------------------------------------------------------------------------------------
    # Devices
    # --------------------------------------------------------------------------------------------
    devices = parallel.setup(args.device, args.dtype, args.mesh)
    runs.check_batch(args, devices)

    # --------------------------------------------------------------------------------------------
    # Models: the frozen encoder, the decoder
    # --------------------------------------------------------------------------------------------
    default = weights.ASSETS / "encoder.safetensors" if args.size == "tiny" else weights.HUB[args.latent][0]
    path, = weights.locate([("encoder", args.encoder or default, "--encoder")])
    encoder = weights.load_encoder(path, devices, args.layers)
    N, C, patch = encoder.tokens, encoder.channels, args.patch or encoder.patch_size
    config = decoders.decoder_config(args.size, C, N, patch, encoder.mean, encoder.std)
    model = decoders.Decoder(config, devices.dtype)
    decoders.init_weights(model, args.seed)
    if args.init:
        state, _ = weights.read_weights(args.init)
        weights.load_strict(model, state, f"--init {args.init}")
    parallel.shard(model, devices, model.decoder_layers)
    resolution = patch * encoder.grid

    # --------------------------------------------------------------------------------------------
    # Data
    # --------------------------------------------------------------------------------------------
    mixture = data.Mixture(args.data, resolution, args.seed, crop="random")
    unseen = data.Mixture(args.data, resolution, args.seed + 1000, crop="center")

    summary = dict(
        parameters={"decoder": sum(p.numel() for p in model.parameters()),
                    "encoder (frozen)": sum(p.numel() for p in encoder.parameters())},
        latent=[N, C], resolution=resolution, images_per_step=args.batch, encoder=str(path),
        device=str(devices), dtype=str(devices.dtype), data=mixture.describe())
    if args.dry_run and args.json:
        print(json.dumps(summary))
    elif devices.main:
        runs.table("train_decoder", list(summary.items()))
    if args.dry_run:
        return

    # --------------------------------------------------------------------------------------------
    # Optimizer
    # --------------------------------------------------------------------------------------------
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), args.lr, betas=args.betas, weight_decay=0.0,
                                  fused=devices.kind != "xla")
    ema = {k: p.detach().clone() for k, p in named.items()} if args.ema else {}

    # --------------------------------------------------------------------------------------------
    # Resume
    # --------------------------------------------------------------------------------------------
    saved = {**named, **{f"ema.{k}": v for k, v in ema.items()}, **runs.moments(optimizer, named)}
    if args.bench:
        args.steps, args.log_every = args.bench, 1
    run = runs.Bench(args, devices) if args.bench else runs.Run(args, devices)
    run.load(saved)
    accumulate = args.batch // args.micro_batch
    collate = Collate()
    batches = iter(data.loader(mixture, collate, args.micro_batch, run.start * args.batch,
                               args.workers, devices.rank, devices.world))
    held = parallel.place(collate([unseen[i] for i in range(64)]), devices)["images"].float() / 255
    skips, meter = data.SkipCounter(), runs.Meter()
    W, hidden = config["decoder_hidden_size"], config["decoder_intermediate_size"]
    block = 4 * W * W + 2 * (N + 1) * W + 2 * W * hidden
    flops = 6 * (N + 1) * config["decoder_num_hidden_layers"] * block

    @torch.no_grad()
    def sample(step):
        """Unseen pictures above their reconstructions by the EMA weights -> mean PSNR."""
        if ema:
            runs.swap(named, ema)
        x_hat = model(encoder(held))
        if ema:
            runs.swap(named, ema)
        if run.main:
            runs.save_grid(torch.stack([held[:16], x_hat[:16]], 1).flatten(0, 1),
                           run.dir / "samples" / f"step-{step:07d}.png", columns=8)
        return psnr(x_hat, held).mean().item()

    # --------------------------------------------------------------------------------------------
    # Loop: data, step, log, sample, save
    # --------------------------------------------------------------------------------------------
    for step in run.progress(args.steps):
        factor = runs.cosine(step, args.steps, args.warmup, args.lr_final / args.lr)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        for _ in range(accumulate):
            t0 = time.perf_counter()
            batch = next(batches)
            wait = time.perf_counter() - t0
            skips.update(batch["skipped"], args.micro_batch)
            x = parallel.place(batch, devices)["images"].float() / 255      # [B,3,S,S]
            with torch.no_grad():
                z = encoder(x)                                              # [B,N,C]
                z = latent_noise(z, batch["n"], args.seed, args.noise_tau, args.noise_dist)
            x_hat = model(z)                                                # [B,3,S,S]
            l1 = (x_hat - x).abs().mean()
            loss = args.l1 * l1
            (loss / accumulate).backward()
            part = 1 / accumulate
            meter.add(args.micro_batch, wait, part, loss=loss * part, l1=l1 * part)
        norm = parallel.clip_grad(named.values(), math.inf)                 # the recipe has no clip
        runs.check_finite(run, step, norm, optimizer)
        optimizer.zero_grad(set_to_none=True)
        runs.update_ema(ema, named, args.ema, step)
        parallel.step_done(devices)

        done = step + 1
        values = {}
        if run.due(done, args.sample_every):
            values["psnr"] = sample(done)
        if run.due(done, args.log_every):
            run.log(done, lr=args.lr * factor, **meter.read(flops, devices), **values)
        if run.due(done, args.sample_every):
            run.plot(["loss", "psnr"])
        if run.due(done, args.save_every):
            run.save(done, saved)
        if run.stop and done < args.steps:
            return run.say_how_to_resume(done)
    run.finish()
    if not args.bench:
        state = model.state_dict()
        run.export("model", state, config)
        run.export("ema", {**state, **ema}, config)
        score = sample(args.steps)
        if run.main:
            print(f"{run.dir}/final: PSNR {score:.2f} dB on 64 unseen pictures (EMA weights)")
    parallel.finish(devices)


if __name__ == "__main__":
    runs.main(main)
