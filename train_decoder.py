"""Stage 1: train the RAE decoder, latent tokens back to pixels, against a frozen encoder.

    python train_decoder.py                      # built-in data, tiny, a few CPU minutes
    python train_decoder.py --size xl --data folder/ --batch 512 --device cuda
    python train_decoder.py --latent vae         # the baseline: FLUX's AutoencoderKL

    z = encoder(x) + noise;   x_hat = decoder(z)                   paper section 2, Tables 7 and 8
    L   = l1 |x_hat - x| + lpips LPIPS(x_hat, x) + gram Gram(x_hat, x) - gan lambda D(T(x_hat))
    L_D = hinge(D(T(x)), D(T(x')))                 D: heads on a frozen DINO (discriminator.py)
                                                   T: augment; x' = decoder(encoder(x)), 8 bits

The VAE adds kl KL to L, and its z is a draw of the posterior.
"""
import argparse
import functools
import math
from pathlib import Path

import torch

import data
import decoder as decoders
import discriminator as gans
import parallel
import perceptual
import run as runs
import vae as vaes
import weights
from evaluate import SMALL, TINY_VGG, pictures, psnr, vgg_files
from parallel import UserError

# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

EPOCH = 1_280_000       # images of a virtual epoch: `7e` is seven of them, `500` is 500 steps
DEFAULTS = {            # paper Table 8 and the RAE code; tiny: ours; its small VGG pulls harder
    # against L1 than the real one (LOG.md), so a tenth of the weights, and of the GAN's less
    "tiny": dict(steps=1500, batch=32, lr=1.5e-3, lr_final=1e-5, warmup="200", ema=0.998,
                 lr_disc=2e-3, lr_disc_final=2e-4, warmup_disc="100", disc_start="500",
                 gan_start="600", lpips=0.1, gram=10.0, gan=0.1, stats_images=2048),
    "siglip2": dict(steps="80e", batch=512, lr=4e-4, lr_final=4e-5, warmup="2e", ema=0.9978,
                    lr_disc=5e-5, lr_disc_final=5e-6, warmup_disc="1e", disc_start="7e",
                    gan_start="8e", lpips=1.0, gram=100.0, gan=10.0, stats_images=50_000),
}
DEFAULTS["webssl"] = dict(DEFAULTS["siglip2"], lr=2e-4, lr_final=2e-5, lr_disc=2e-5,
                          lr_disc_final=2e-6, disc_start="10e", gan_start="11e")
DEFAULTS["vae"] = DEFAULTS["siglip2"]
DATA = ["builtin:web=3", "builtin:synthetic=2", "builtin:text=1"]
PLOT = ["loss", "l1", "lpips", "gram", "gan", "disc", "psnr"]
TINY_DINO, DINO = weights.ASSETS / "dino.safetensors", "dino_vitsmall16_pretrain.pth"


def steps_of(text, batch=EPOCH):
    """`500` (steps) or `7e` (virtual epochs) -> steps. Raises ValueError."""
    number = float(text[:-1]) * EPOCH / batch if text.endswith("e") else int(text)
    if not 0 <= number < math.inf:
        raise ValueError
    return round(number)


def span(text):
    steps_of(text)
    return text


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    runs.add_flags(p, steps=None, batch=None, data=DATA, log=20, sample=500, save=1000)
    number = runs.positive(float, zero=True)
    g = p.add_argument_group("model")
    g.add_argument("--size", choices=list(decoders.SIZES), default="tiny")
    g.add_argument("--latent", choices=["siglip2", "webssl", "vae"], default="siglip2")
    g.add_argument("--encoder", help="file, folder or hub id of the frozen encoder")
    g.add_argument("--layers", type=runs.positive(), default=1,
                   help="the latent sums the encoder's last K blocks (1: the paper's)")
    g.add_argument("--patch", type=runs.positive(), help="pixels a token decodes to (default: the "
                   "encoder's patch; 16 gives 256 px from 16x16 tokens)")
    g.add_argument("--latent-stats", metavar="auto|FILE", help="normalise the latent by its mean "
                   "and variance [C,h,w], measured now or of a file with `mean`, `var`")
    g.add_argument("--stats-images", type=runs.positive(), help="images that auto measures")
    g = p.add_argument_group("loss")
    g.add_argument("--l1", type=number, default=1.0)
    g.add_argument("--lpips", type=number, help="weight; 1 (tiny: 0.1)")
    g.add_argument("--gram", type=number, help="weight; 100 (tiny: 10)")
    g.add_argument("--gram-layers", type=int, nargs="+", choices=range(5), default=[0, 1, 2, 3, 4],
                   help="VGG stages of the Gram term")
    g.add_argument("--gan", type=number, help="weight; 10 (tiny: 0.1)")
    g.add_argument("--adaptive-gan", action=argparse.BooleanOptionalAction, default=True,
                   help="balance the GAN term's gradient with the others' at the last layer, a "
                   "micro-batch at a time (so another --micro-batch is another run)")
    g.add_argument("--disc-loss", choices=["hinge", "vanilla"], default="hinge")
    g.add_argument("--disc-start", type=span, help="the discriminator trains from here (7e, 500)")
    g.add_argument("--gan-start", type=span, help="the decoder feels it from here (8e, 600)")
    g.add_argument("--kl", type=number, help="weight of the VAE's KL term (1e-6)")
    g.add_argument("--noise-tau", type=number, default=0.0,
                   help="noise on the latent while training (0: off)")
    g.add_argument("--noise-dist", choices=["half-normal", "uniform"],
                   help="of its strength: |N(0,tau^2)| (paper, default) or tau U(0,1) (RAE)")
    g.add_argument("--vgg", help="torchvision's VGG16 (tiny: assets/tiny/vgg.safetensors)")
    g.add_argument("--lpips-weights", help="LPIPS v0.1 lin0..4, where --vgg's file lacks them")
    g.add_argument("--dino", help="DINO ViT-S/16 (tiny: assets/tiny/dino.safetensors)")
    g = p.add_argument_group("optimizer")
    for name, what in (("", "of the decoder"), ("-disc", "of the discriminator")):
        g.add_argument(f"--lr{name}", type=runs.positive(float), help=what)
        g.add_argument(f"--lr{name}-final", type=number)
        g.add_argument(f"--warmup{name}", type=span, help="steps, or 2e")
    g.add_argument("--betas", type=runs.share, nargs=2, default=[0.9, 0.95], help="of both")
    g.add_argument("--ema", type=runs.share, help="decay; 0: off")
    args = p.parse_args()
    for flag, value, needs, there in (
            ("--kl", args.kl, "--latent vae", args.latent == "vae"),
            ("--noise-dist", args.noise_dist, "--noise-tau", args.noise_tau),
            ("--stats-images", args.stats_images, "--latent-stats auto",
             args.latent_stats == "auto")):
        if value is not None and not there:
            raise UserError(f"{flag} {value} needs {needs}")

    defaults = dict(DEFAULTS["tiny" if args.size == "tiny" else args.latent])
    if args.size == "tiny":                 # a term whose small network is not there yet is off
        if not (args.vgg or TINY_VGG.is_file()):
            defaults.update(lpips=0.0, gram=0.0)
        if not (args.dino or TINY_DINO.is_file()):
            defaults.update(gan=0.0)
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for key in ("steps", "warmup", "warmup_disc", "disc_start", "gan_start"):
        setattr(args, key, steps_of(str(getattr(args, key)), args.batch))
    if not (args.l1 or args.lpips or args.gram or args.gan and not args.adaptive_gan):
        raise UserError("--l1 0 --lpips 0 --gram 0: nothing is left to train on"
                        + ", for --adaptive-gan balances with these" * bool(args.gan))
    if args.gan and args.gan_start < args.disc_start:
        raise UserError(f"--gan-start {args.gan_start} is before --disc-start {args.disc_start}: "
                        "an untrained discriminator would steer the decoder")
    wrong = [f for f, v in (("--encoder", args.encoder), ("--patch", args.patch),
                            ("--latent-stats", args.latent_stats), ("--noise-tau", args.noise_tau),
                            ("--layers", args.layers > 1), ("--remat", args.remat != "none"),
                            ("--compile", args.compile)) if v]
    args.kl = 1e-6 if args.kl is None else args.kl
    args.noise_dist = args.noise_dist or "half-normal"
    if args.size == "tiny" and args.latent == "webssl" and not args.encoder:
        raise UserError("--latent webssl: there is no tiny one; give --encoder, or a larger --size")
    if args.latent == "vae" and wrong:
        raise UserError(f"{', '.join(wrong)}: not with --latent vae, which has no frozen encoder "
                        "and a scale and shift of its own")
    args.out = args.out or Path(f"runs/{'vae' if args.latent == 'vae' else 'decoder'}-{args.size}")
    return args


# ------------------------------------------------------------------------------------------------
# Networks that are frozen, or frozen but for their heads
# ------------------------------------------------------------------------------------------------

def networks(args, devices):
    """-> encoder (None: vae), perceptual net, discriminator (None: weight 0), and what they are.

    --dry-run of a paper size takes the published shapes on the meta device: no file is needed.
    """
    tiny, vae, vgg = args.size == "tiny", args.latent == "vae", args.lpips or args.gram
    if args.dry_run and not tiny:
        encoder = None if vae else weights.random_towers(args, devices.dtype)[0]
        with torch.device("meta"):
            return (encoder,
                    perceptual.Perceptual(dtype=devices.dtype) if vgg else None,
                    gans.Discriminator() if args.gan else None, "published shapes")
    name = weights.TINY_CODEC[0] if tiny else weights.HUB.get(args.latent, [None])[0]
    wanted = [("encoder", args.encoder or name, "--encoder")] * (not vae)
    wanted += vgg_files(args, tiny, args.lpips) if vgg else []
    wanted += [("DINO", args.dino or (TINY_DINO if tiny else DINO), "--dino")] * (args.gan > 0)
    path = dict(zip((what for what, _, _ in wanted), weights.locate(wanted)))
    encoder = None if vae else weights.load_encoder(path["encoder"], devices, args.layers)
    if encoder:
        weights.check_encoder(encoder, args)
    vgg = weights.load_perceptual(path["VGG16"], path.get("LPIPS"), devices,
                                  args.lpips) if vgg else None
    disc = weights.load_discriminator(path["DINO"], devices, seed=args.seed) if args.gan else None
    small = {"VGG16": vgg and vgg.width < 1, "DINO": disc and disc.config["dim"] < 384}
    found = {k: str(p) + (SMALL if small.get(k) else "") for k, p in path.items()}
    for file, flag in ((TINY_VGG, "vgg"), (TINY_DINO, "dino")):
        if tiny and not file.is_file():
            found[file.name] = f"not there, its terms are off (train_encoder.py --arch {flag})"
    return encoder, vgg, disc, found


# ------------------------------------------------------------------------------------------------
# Random numbers: a function of (seed, image number, stream), so neither mesh, micro-batch nor a
# resumption changes them
# ------------------------------------------------------------------------------------------------

LATENT, FAKE_G, FAKE_D, REAL_D = range(4)           # streams: noise on z; the three augmentations


def generators(n, seed, stream=LATENT):
    """One CPU generator an image (their seeds have 32 bits)."""
    keys = ((seed * 1_000_003 + i + stream * 0x9E3779B1) % 2 ** 32 for i in n)
    return [torch.Generator().manual_seed(key) for key in keys]


def uniform(n, seed, stream):
    """[B,5]: the draws of gans.augment."""
    return torch.stack([torch.rand(5, generator=g) for g in generators(n, seed, stream)])


def gaussian(n, seed, shape):
    return torch.stack([torch.randn(shape, generator=g) for g in generators(n, seed)])


def latent_noise(n, seed, shape, tau, dist):
    """[B,*shape]: s * noise, one strength s an image: noise-augmented decoding, paper section
    2.1."""
    def one(g):
        s = (torch.randn((), generator=g).abs() if dist == "half-normal"
             else torch.rand((), generator=g)) * tau
        return s * torch.randn(shape, generator=g)
    return torch.stack([one(g) for g in generators(n, seed)])


class Collate:
    """Records -> images uint8 [B,3,S,S], keys, and all that is drawn for them: fake_g, fake_d,
    real_d [B,5] for the augmentations; noise, by the given function, for the latent. In the
    loader's worker."""

    def __init__(self, seed=0, noise=None):
        self.seed, self.noise = seed, noise

    def __call__(self, records):
        n = [r["n"] for r in records]
        images = torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records])
        draws = {name: uniform(n, self.seed, stream) for name, stream in
                 (("fake_g", FAKE_G), ("fake_d", FAKE_D), ("real_d", REAL_D))}
        if self.noise:
            draws["noise"] = self.noise(n)
        return {"images": images, **draws, "keys": [r["key"] for r in records],
                "skipped": [s for r in records for s in r["skipped"]]}


def read_statistics(path, encoder):
    """A file of `mean` and `var`, each [C,h,w], as the RAE code's. Raises UserError."""
    state, _ = weights.read_weights(path, "--latent-stats")
    shape = [encoder.channels, encoder.grid, encoder.grid]
    found = {k: list(state[k].shape) for k in ("mean", "var") if k in state}
    if found != {"mean": shape, "var": shape}:
        raise UserError(f"--latent-stats {path}: expected mean and var of {shape}, found "
                        f"{found or sorted(state)[:4]}")
    return state["mean"].float(), state["var"].float()


def main():
    args = arguments()

    # --------------------------------------------------------------------------------------------
    # Devices
    # --------------------------------------------------------------------------------------------
    devices = parallel.setup(args.device, args.dtype, args.mesh, args.dry_run)
    runs.check_batch(args, devices, None if args.size == "tiny" else 64)    # 64 images a device
    if not args.dry_run:
        run = runs.Run(args, devices)

    # --------------------------------------------------------------------------------------------
    # Models: the frozen encoder and VGG, the discriminator's heads, the decoder
    # --------------------------------------------------------------------------------------------
    tiny, vae = args.size == "tiny", args.latent == "vae"
    encoder, vgg, disc, found = networks(args, devices)
    init = None if args.dry_run or not args.init else weights.final_of(
        *weights.locate([("weights", args.init, "--init")]))
    if vae:
        resolution = 64 if tiny else 256
        torch.manual_seed(args.seed)                                        # PyTorch's default init
        with torch.device("meta" if args.dry_run else "cpu"):
            model = vaes.VAE(dict(vaes.TINY if tiny else vaes.FLUX, scaling_factor=1.0,
                                  shift_factor=0.0))
        if init:
            model = weights.load_vae(init, devices, "--init")
            model.requires_grad_(True)
        config, C = model.config, model.channels
        N, parts = (resolution // model.stride) ** 2, (model.encoder, model.decoder)
        flops = {"decoder": model.forward_flops(resolution)}
        activations = model.activation_bytes(resolution)
    else:
        N, C, patch = encoder.tokens, encoder.channels, args.patch or encoder.patch_size
        resolution = patch * encoder.grid
        source = weights.TINY_TOWER if tiny else weights.HUB[args.latent][0]
        config = decoders.decoder_config(args.size, C, N, patch, encoder.mean, encoder.std)
        config.update(encoder=weights.lasting(args.encoder) or source, layers=args.layers,
                      latent_stats=bool(args.latent_stats))
        with torch.device("meta" if args.dry_run else "cpu"):
            model = decoders.Decoder(config, devices.dtype)
        model.remat = args.remat == "block"
        if not args.dry_run:
            decoders.init_weights(model, args.seed)
        if init:
            state, _ = weights.read_weights(init, "--init")
            weights.load_strict(model, state, f"--init {args.init}",
                                optional=("decoder_pos_embed", "latent_"))
        if args.latent_stats not in (None, "auto"):
            model.latent_mean, model.latent_var = read_statistics(args.latent_stats, encoder)
        if args.compile or (args.compile is None and devices.kind == "cuda"):
            for block in model.decoder_layers:
                block.compile(fullgraph=True)
        parts = (model,)
        flops = {"encoder": encoder.forward_flops(), "decoder": model.forward_flops()}
        activations = model.activation_bytes()

    # An image of a training step: the decoder forward and backward; VGG on both pictures and back
    # to one; D forward and back to the picture, then on a fresh reconstruction and the real one
    forward, flops["decoder"] = flops["decoder"], 3 * flops["decoder"]
    if vgg:
        if resolution < 16:
            raise UserError(f"--patch {args.patch}: pictures of {resolution} px are below the 16 "
                            "that VGG's four poolings need; give --lpips 0 --gram 0")
        flops["vgg"] = 3 * vgg.forward_flops(resolution)
        activations += vgg.activation_bytes(resolution)
    if disc:
        trunk, heads = disc.forward_flops()
        flops["discriminator"] = forward + 4 * trunk + 8 * heads
        activations += disc.activation_bytes()
    count = {"decoder": model, "discriminator": disc and disc.heads, "encoder (frozen)": encoder,
             "vgg (frozen)": vgg, "dino (frozen)": disc and disc.dino}
    count = {k: sum(p.numel() for p in net.parameters()) for k, net in count.items() if net}
    trained = count["decoder"] + count.get("discriminator", 0)
    memory = lambda images: runs.memory_gb(trained, sum(count.values()) - trained,
                                           activations * images / devices.axes["fsdp"], args.ema)
    sources = data.planned(args.data)
    if not args.dry_run:
        mixture = data.Mixture(args.data, resolution, args.seed, crop="random", text=False)
        sources = mixture.describe()
    runs.plan(f"train_decoder --size {args.size}", args, devices, count, flops, memory,
              dtype=torch.float32 if vae else None, latent=[N, C], resolution=resolution,
              loss={k: getattr(args, k) for k in ("l1", "lpips", "gram", "gan") + ("kl",) * vae},
              starts=dict(discriminator=args.disc_start, gan=args.gan_start, run_ends=args.steps)
              if disc else None, data=sources, frozen=found)
    if args.dry_run:
        return

    # --------------------------------------------------------------------------------------------
    # Optimizers: one for the decoder, one for the discriminator's heads
    # --------------------------------------------------------------------------------------------
    for part in parts:
        parallel.shard(part, devices)
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    judged, spectral = {}, {}                       # of D: what trains; the spectral norms' vectors
    if disc:
        disc = parallel.shard(disc, devices).eval()
        judged = {f"disc.{k}": p for k, p in disc.named_parameters() if p.requires_grad}
        spectral = {f"disc.{k}": b for k, b in disc.named_buffers() if k.endswith(("_u", "_v"))}
    recipe = dict(betas=args.betas, weight_decay=0.0)
    optimizer = parallel.adamw(list(named.values()), devices, lr=args.lr, **recipe)
    d_optimizer = parallel.adamw(list(judged.values()), devices, lr=args.lr_disc,
                                 **recipe) if disc else None
    ema = runs.averages(named, devices) if args.ema else {}

    # --------------------------------------------------------------------------------------------
    # Resume
    # --------------------------------------------------------------------------------------------
    if args.bench:                                  # time the whole step, GAN included
        args.disc_start, args.gan_start = 0, 0
    stats = {k: b for k, b in model.named_buffers() if k.startswith("latent_")}     # [C,h,w]
    run.load({**named, **{f"ema.{k}": v for k, v in ema.items()},
              **runs.moments(optimizer, named, devices), **judged, **spectral,
              **(runs.moments(d_optimizer, judged, devices) if disc else {}), **stats})
    if args.latent_stats == "auto" and run.start == 0:      # every process measures the same
        with torch.no_grad():
            measured = decoders.latent_statistics(
                encoder(x) for x in pictures(mixture, args.stats_images, devices))
        for key, value in zip(("latent_mean", "latent_var"), measured):
            parallel.fill(key, stats[key], lambda *_: value, devices)
    part, noise = args.micro_batch / args.batch, None
    if vae:                                                                 # of the posterior
        side = resolution // model.stride
        noise = functools.partial(gaussian, seed=args.seed,
                                  shape=(C // 4, 2 * side, 2 * side))       # [B,c,h,w]
    elif args.noise_tau:
        noise = functools.partial(latent_noise, seed=args.seed, shape=(N, C), tau=args.noise_tau,
                                  dist=args.noise_dist)                     # [B,N,C]
    batches = data.loader(mixture, Collate(args.seed, noise), args.micro_batch,
                          run.start * args.batch, args.workers, devices.rank, devices.world)
    unseen = data.Mixture(args.data, resolution, args.seed + 1000, crop="center", text=False)
    held = next(pictures(unseen, 64, devices))
    d_loss = {"hinge": gans.d_loss_hinge, "vanilla": gans.d_loss_vanilla}[args.disc_loss]

    @torch.no_grad()
    def reconstruct(x, z=None):
        """[B,3,S,S] -> [B,3,S,S] in eval mode, without noise; z: its latent, where it is known."""
        model.eval()
        out = (model.decode(model.encode(x)) if vae else
               model(model.normalise(encoder(x) if z is None else z)))
        model.train()
        return out

    def sample(step):
        """Unseen pictures above their reconstructions by the EMA weights -> {psnr: their mean}."""
        runs.swap(named, ema)
        x_hat = reconstruct(held)
        runs.swap(named, ema)
        pairs = parallel.full(torch.stack([held[:16], x_hat[:16]], 1).flatten(0, 1))
        if run.main:
            runs.save_grid(pairs, run.dir / "samples" / f"step-{step:07d}.png", columns=8)
        return {"psnr": psnr(x_hat, held).mean().item()}

    # --------------------------------------------------------------------------------------------
    # Loop: data, the decoder's step, the discriminator's step, log, sample, save
    # --------------------------------------------------------------------------------------------
    for step in run.progress(args.steps):
        lr = args.lr * runs.cosine(step, args.steps, args.warmup, args.lr_final / args.lr)
        for group in optimizer.param_groups:
            group["lr"] = parallel.scalar(lr, devices.device)
        judging = disc is not None and step >= args.disc_start
        adversarial = disc is not None and step >= args.gan_start
        work = {k: v for k, v in flops.items() if judging or k != "discriminator"}
        kept, values = [], {"lr": lr}
        for batch in run.micro_batches(batches):
            batch = parallel.place(batch, devices)
            x, log = batch["images"].float() / 255, {}                      # [B,3,S,S]
            if vae:
                z, (mean, logvar) = None, model.posterior(x)                # [B,c,h,w]
                x_hat = (model.decoder(mean + (0.5 * logvar).exp() * batch["noise"]) + 1) / 2
                kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
                log["kl"] = kl
            else:
                with torch.no_grad():
                    z = encoder(x)                                          # [B,N,C]
                    noisy = z + batch["noise"] if args.noise_tau else z
                x_hat = model(model.normalise(noisy))                       # [B,3,S,S]
            log["l1"] = (x_hat - x).abs().mean()
            rec = args.l1 * log["l1"]
            if vgg:
                log["lpips"], log["gram"] = (v.mean() for v in vgg(x_hat, x, args.gram_layers))
                rec = rec + args.lpips * log["lpips"] + args.gram * log["gram"]
            # each loss' gradient is taken at the picture: one backward pass through each network
            g, = torch.autograd.grad(rec, x_hat)
            loss = rec.detach() + args.kl * log.get("kl", 0)
            if adversarial:
                gan = gans.g_loss(disc(gans.augment(x_hat, batch["fake_g"])))
                g_gan, = torch.autograd.grad(gan, x_hat)
                last = model.decoder.conv_out.weight if vae else model.decoder_pred.weight
                weight = gans.adaptive_weight(
                    (x_hat * g).sum(), (x_hat * g_gan).sum(), last,
                    lambda grad: parallel.average(grad, devices)) \
                    if args.adaptive_gan else torch.ones_like(gan)
                g = g + args.gan * weight * g_gan
                loss = loss + args.gan * weight * gan.detach()
                log.update(gan=gan, gan_lambda=weight)
            ends = [(x_hat, g * part)]
            if vae:
                ends.append((kl, torch.full_like(kl, args.kl * part)))
            torch.autograd.backward(*zip(*ends))
            if judging:
                kept.append((x, z, batch))
            run.meter.add(part, loss=loss, **log)
        norm = parallel.clip_grad(named.values(), math.inf, devices)        # the recipe has no clip
        parallel.guarded_step(optimizer, norm, devices)
        optimizer.zero_grad(set_to_none=True)
        weight = runs.ema_weight(args.ema, step)
        runs.update_ema(ema, named, parallel.scalar(weight, devices.device))

        if judging:                     # on fresh pictures of the decoder that was just updated
            values["lr_disc"] = args.lr_disc * runs.cosine(
                step - args.disc_start, args.steps - args.disc_start, args.warmup_disc,
                args.lr_disc_final / args.lr_disc)
            for group in d_optimizer.param_groups:
                group["lr"] = parallel.scalar(values["lr_disc"], devices.device)
            for i, (x, z, batch) in enumerate(kept):
                disc.train(i == 0)      # a step of the spectral norms' power iteration: once
                fake = (reconstruct(x, z).clamp(0, 1) * 255).round() / 255
                pair = [gans.augment(x, batch["real_d"]),
                        gans.augment(fake, batch["fake_d"])]
                real, fake = disc(torch.cat(pair)).chunk(2)                 # logits, each [B,L*N]
                d = d_loss(real, fake)
                (d * part).backward()
                run.meter.add(part, disc=d, logits_real=real.mean(), logits_fake=fake.mean())
            disc.eval()
            d_norm = parallel.clip_grad(judged.values(), math.inf, devices)
            parallel.guarded_step(d_optimizer, d_norm, devices)
            d_optimizer.zero_grad(set_to_none=True)
            norm = norm + d_norm                                            # finite if both are
        if run.end_step(step + 1, norm, work, PLOT, sample, **values):
            return
    run.finish()
    for name in ("model", "ema"):
        if vae:
            config = {**config, **model.measure(pictures(mixture, 256, devices))}
        run.export(name, model.state_dict(), config)
        runs.swap(named, ema)
    score = sample(args.steps)["psnr"]
    what = "unseen pictures" if mixture.endless() else "pictures of the data, which it has seen"
    if run.main:
        print(f"{run.dir}/final: PSNR {score:.2f} dB on 64 {what} (EMA weights)")


if __name__ == "__main__":
    runs.main(main)
