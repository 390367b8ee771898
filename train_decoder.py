"""Stage 1: train the decoder, from latent tokens back to pixels, against a frozen encoder.

    python train_decoder.py                      # built-in data, tiny, a few CPU minutes
    python train_decoder.py --size xl --data folder/ --batch 512 --device cuda
    python train_decoder.py --latent vae         # the baseline: FLUX's AutoencoderKL

    z = encoder(x) + noise;   x_hat = decoder(z)                   paper section 2, Table 7
    L   = l1 |x_hat - x| + lpips LPIPS(x_hat, x) + gram Gram(x_hat, x) - gan lambda D(T(x_hat))
    L_D = hinge(D(T(x)), D(T(x')))

D is the discriminator of losses.py and T its augmentation; x' = decoder(encoder(x)) in 8 bits, from
the decoder that was just updated. The VAE adds kl KL to L and draws z from its posterior.
"""
import argparse
import dataclasses
import functools
import math
from pathlib import Path

import cli               # before torch: it sets how threads wait
import numpy as np
import torch

import data
import networks
import parallel
import weights
from checkpoint import Run
from cli import UserError, positive, share
from decoder import SIZES, Decoder, size_config
from decoder import initial as init_decoder
from encoder import SO400M, WEBSSL_300M, ViT
from evaluate import SMALL, images
from losses import (
    Discriminator, Perceptual, adaptive_weight, augment, d_loss_hinge, d_loss_vanilla, g_loss)
from metrics import psnr, round8
from training import (
    averaged, averages, check_batch, cosine, ema_weight, save_grid, set_lr, start_table, state_gb,
    update_ema)
from vae import TINY, VAE, VAEConfig
from vae import initial as init_vae

# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

EPOCH = 1_280_000       # images in a virtual epoch: `7e` is seven epochs, `500` is 500 steps
DEFAULTS = {            # paper, Table 7, and the RAE code. tiny is ours: its small VGG pulls harder
    # against L1 than the real one, so it has a tenth of the weights, and less of the GAN's
    "tiny": dict(steps=1500, batch=32, lr=1.5e-3, lr_final=1e-5, warmup="200", ema=0.998,
                 lr_disc=2e-3, lr_disc_final=2e-4, warmup_disc="100", disc_start="500",
                 gan_start="600", lpips=0.1, gram=10.0, gan=0.1),
    "siglip2": dict(steps="80e", batch=512, lr=4e-4, lr_final=4e-5, warmup="2e", ema=0.9978,
                    lr_disc=5e-5, lr_disc_final=5e-6, warmup_disc="1e", disc_start="7e",
                    gan_start="8e", lpips=1.0, gram=100.0, gan=10.0),
}
DEFAULTS["webssl"] = dict(DEFAULTS["siglip2"], lr=2e-4, lr_final=2e-5, lr_disc=2e-5,
                          lr_disc_final=2e-6, disc_start="10e", gan_start="11e")
DEFAULTS["vae"] = DEFAULTS["siglip2"]
DATA = ["builtin:web=3", "builtin:synthetic=2", "builtin:text=1"]
PLOT = ["loss", "l1", "lpips", "gram", "gan", "disc", "psnr"]


def steps_of(text, batch=EPOCH):
    """Read `500` (steps) or `7e` (virtual epochs) as a number of steps. Raises ValueError."""
    number = float(text[:-1]) * EPOCH / batch if text.endswith("e") else int(text)
    if not 0 <= number < math.inf:
        raise ValueError
    return round(number)


def span(text):
    """Argparse type: a length that `steps_of` reads once --batch is known."""
    steps_of(text)
    return text


def parser():
    p = cli.Parser(description=__doc__.split("\n")[0])
    cli.training_flags(p, steps=None, batch=None, data=DATA, log=20, sample=500, save=1000)
    number = positive(float, zero=True)
    a = p.add_argument_group("model").add_argument
    a("--size", choices=list(SIZES), default="tiny")
    a("--latent", choices=["siglip2", "webssl", "vae"], default="siglip2")
    a("--encoder", help="file, folder or hub id of the frozen encoder")
    a("--patch", type=positive(), help="pixels on the side that a token decodes to (default: the "
      "encoder's patch; 16 gives 256 px from 16 x 16 tokens)")
    a = p.add_argument_group("loss").add_argument
    a("--l1", type=number, default=1.0, help="weight (default 1)")
    a("--lpips", type=number, help="weight (default 1; tiny: 0.1)")
    a("--gram", type=number, help="weight (default 100; tiny: 10)")
    a("--gram-layers", type=int, nargs="+", choices=range(5), default=[0, 1, 2, 3, 4],
      help="VGG stages of the Gram term")
    a("--gan", type=number, help="weight (default 10; tiny: 0.1)")
    a("--adaptive-gan", action=argparse.BooleanOptionalAction, default=True,
      help="balance the gradient of the GAN term with that of the other terms at the last layer, "
      "per micro-batch (so that --micro-batch changes the result)")
    a("--disc-loss", choices=["hinge", "vanilla"], default="hinge")
    a("--disc-start", type=span, help="when the discriminator starts to train (7e, 500)")
    a("--gan-start", type=span, help="when the GAN term starts to train the decoder (8e, 600)")
    a("--kl", type=number, default=1e-6, help="weight of the VAE's KL term")
    a("--noise-tau", type=number, default=0.0,
      help="strength of the noise on the latent in training, paper section 3.3 (default 0: off)")
    a("--noise-dist", choices=["half-normal", "uniform"], default="half-normal",
      help="distribution of its strength: |N(0,tau^2)| (paper) or tau U(0,1) (RAE code)")
    a("--vgg", help="torchvision's VGG16 (tiny: tiny/vgg.safetensors)")
    a("--lpips-weights", help="lin0 to lin4 of LPIPS v0.1, if the file of --vgg lacks them")
    a("--dino", help="DINO ViT-S/16 (tiny: tiny/dino.safetensors)")
    a = p.add_argument_group("optimizer").add_argument
    for name, what in (("", "decoder"), ("-disc", "discriminator")):
        a(f"--lr{name}", type=positive(float), help=f"learning rate of the {what}")
        a(f"--lr{name}-final", type=number, help="the rate at the end of its cosine")
        a(f"--warmup{name}", type=span, help="steps, or virtual epochs (2e)")
    a("--betas", type=share, nargs=2, default=[0.9, 0.95], help="of both optimizers")
    a("--ema", type=share, help="decay of the averaged weights; 0: off. Ours, not the paper's")
    return p


def arguments():
    args = parser().parse_args()
    tiny, vae = args.size == "tiny", args.latent == "vae"
    defaults = dict(DEFAULTS["tiny" if tiny else args.latent])
    if tiny:                                # a term whose small network is not there yet is off
        if not (args.vgg or (weights.TINY / "vgg.safetensors").is_file()):
            defaults.update(lpips=0.0, gram=0.0)
        if not (args.dino or (weights.TINY / "dino.safetensors").is_file()):
            defaults.update(gan=0.0)
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for key in ("steps", "warmup", "warmup_disc", "disc_start", "gan_start"):
        setattr(args, key, steps_of(str(getattr(args, key)), args.batch))
    if args.gan and args.gan_start < args.disc_start:
        raise UserError(f"--gan-start {args.gan_start} is before --disc-start {args.disc_start}: "
                        "an untrained discriminator would steer the decoder")
    unused = [flag for flag, given in (
        ("--encoder", args.encoder), ("--patch", args.patch), ("--noise-tau", args.noise_tau),
        ("--remat", args.remat != "none"), ("--compile", args.compile)) if given]
    if vae and unused:
        raise UserError(f"{', '.join(unused)} with --latent vae: the VAE has no frozen encoder and "
                        "its blocks are neither compiled nor recomputed; leave it out")
    args.kl *= vae
    args.out = args.out or Path(f"runs/{'vae' if vae else 'decoder'}-{args.size}")
    return args


# ------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------

def load_frozen(args, devices):
    """Load the frozen encoder (None for the VAE), the perceptual network and the discriminator
    (None if their weights are 0). Return them with {what: where it was found}.

    A dry run at a paper's size builds the published shapes on the meta device, without files.
    """
    tiny, vae, vgg = args.size == "tiny", args.latent == "vae", args.lpips or args.gram
    if args.dry_run and not tiny:
        with torch.device("meta"):
            encoder = ViT(WEBSSL_300M if args.latent == "webssl" else SO400M, devices.dtype)
            return (None if vae else encoder, Perceptual(dtype=devices.dtype) if vgg else None,
                    Discriminator() if args.gan else None, "published shapes")
    wanted = [] if vae else [("encoder", args.encoder or encoder_name(args), "--encoder")]
    wanted += networks.vgg_files(args, tiny, args.lpips) if vgg else []
    wanted += networks.dino_file(args, tiny) if args.gan else []
    path = dict(zip((what for what, _, _ in wanted), weights.locate(wanted)))
    encoder = None if vae else networks.load_encoder(path["encoder"], devices)
    vgg = networks.load_perceptual(path["VGG16"], path.get("LPIPS"), devices,
                                  args.lpips > 0) if vgg else None
    disc = networks.load_discriminator(path["DINO"], devices,
                                      args.seed).eval() if args.gan else None
    small = {"VGG16": vgg and vgg.width < 1, "DINO": disc and disc.config.dim < 384}
    return encoder, vgg, disc, {k: f"{p}{SMALL * bool(small.get(k))}" for k, p in path.items()}


def encoder_name(args):
    """Return the default encoder: the tiny one, or the published one of --latent."""
    tiny = args.size == "tiny" and args.latent == "siglip2"
    return weights.TINY_ENCODER if tiny else weights.HUB[args.latent][0]


def network_config(args, encoder):
    """Return the config of the network to train: a VAEConfig or a DecoderConfig."""
    if args.latent == "vae":                # the scale and the shift are measured at the end
        return dataclasses.replace(TINY if args.size == "tiny" else VAEConfig(),
                                   scaling_factor=1.0, shift_factor=0.0)
    return size_config(args.size, encoder.channels, encoder.tokens,
                       args.patch or encoder.patch_size, encoder.mean, encoder.std,
                       weights.portable_path(args.encoder or encoder_name(args)))


def build(args, encoder, devices):
    """Build the network to train on its devices, with initial weights or those of --init. A file's
    config says more than the flags (normalisation, eps), so the network keeps it."""
    vae, config = args.latent == "vae", network_config(args, encoder)
    make = functools.partial(VAE, config) if vae else functools.partial(
        Decoder, config, devices.dtype)
    with torch.device("meta"):
        model = make()
    if args.dry_run:
        return model
    if not args.init:
        rows = parallel.initial_rows(model, init_vae if vae else init_decoder, args.seed)
        return parallel.build(model, rows, devices)
    path, = weights.locate([("weights", args.init, "--init")])
    model = (networks.load_vae(path, devices, "--init") if vae else
             networks.load_decoder(path, devices, encoder, "--init"))
    own = ("encoder", "image_mean", "image_std", "layer_norm_eps", "scaling_factor", "shift_factor")
    differ = [f"{k} {v!r}, not {getattr(config, k)!r}" for k, v in vars(model.config).items()
              if k not in own and v != getattr(config, k)]
    if differ:
        raise UserError(f"--init {args.init} has {', '.join(differ)}; choose --size and --patch to "
                        "match")
    if not vae:
        model.config = dataclasses.replace(model.config, encoder=config.encoder)
    for name, p in model.named_parameters():
        p.requires_grad_(name != "decoder_pos_embed")
    return model.train()


def train_flops(model, encoder, vgg, disc, resolution):
    """Return the FLOPs per image of a training step, by network."""
    vae = encoder is None
    forward = model.forward_flops(resolution) if vae else model.forward_flops()
    flops = {} if vae else {"encoder": encoder.forward_flops()}
    flops["decoder"] = 3 * forward                      # forward and backward
    if vgg:                                             # both images, and back to one
        flops["vgg"] = 3 * vgg.forward_flops(resolution)
    if disc:                # forward and back to the image; a fresh reconstruction and the real one
        trunk, heads = disc.forward_flops()
        flops["discriminator"] = forward + 4 * trunk + 8 * heads
    return flops


# ------------------------------------------------------------------------------------------------
# Random numbers: functions of (seed, purpose, image number), so that neither the mesh nor the
# micro-batch nor a resumption changes them
# ------------------------------------------------------------------------------------------------

def uniform(n, seed, purpose):
    """Draw [B,5], the numbers that losses.augment needs."""
    return torch.from_numpy(np.stack([data.rng(seed, purpose, i).random(5, np.float32)
                                      for i in n]))


def gaussian(n, seed, shape):
    """Draw [B,*shape]: the noise of the VAE's posterior."""
    return torch.from_numpy(np.stack([
        data.rng(seed, "posterior", i).standard_normal(shape, np.float32) for i in n]))


def latent_noise(n, seed, shape, tau, dist):
    """Draw [B,*shape]: noise with one strength per image, for noise-augmented decoding (paper
    section 3.3)."""
    def one(g):
        strength = abs(g.standard_normal()) if dist == "half-normal" else g.random()
        return np.float32(tau * strength) * g.standard_normal(shape, np.float32)
    return torch.from_numpy(np.stack([one(data.rng(seed, "latent noise", i)) for i in n]))


def latent_draws(args, latent):
    """Return the function (image numbers) -> noise of the latent, or None. latent: [N,C]."""
    N, C = latent
    if args.latent == "vae":
        side = 2 * math.isqrt(N)                        # tokens are 2 x 2 patches of the grid
        return functools.partial(gaussian, seed=args.seed, shape=(C // 4, side, side))
    return functools.partial(latent_noise, seed=args.seed, shape=(N, C), tau=args.noise_tau,
                             dist=args.noise_dist) if args.noise_tau else None


class Collate:
    """Make a batch of records, in the loader's worker: images uint8 [B,3,S,S], keys, and all draws:
    fake_g, fake_d and real_d [B,5] for the augmentations, and noise(n) for the latent."""

    def __init__(self, seed=0, noise=None):
        self.seed, self.noise = seed, noise

    def __call__(self, records):
        n = [r["n"] for r in records]
        batch = {"images": torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1)
                                        for r in records]),
                 "fake_g": uniform(n, self.seed, "augment the decoder's fake"),
                 "fake_d": uniform(n, self.seed, "augment the discriminator's fake"),
                 "real_d": uniform(n, self.seed, "augment the real image"),
                 "keys": [r["key"] for r in records],
                 "skipped": [s for r in records for s in r["skipped"]]}
        return {**batch, "noise": self.noise(n)} if self.noise else batch


# ------------------------------------------------------------------------------------------------

def at_image(loss, x_hat):
    """Return the same loss, with the same gradient at x_hat, as a linear function of x_hat.

    A later backward pass then begins at x_hat. So VGG and the discriminator are passed once, though
    the adaptive weight needs each loss' gradient too, and the discriminator's own weights get no
    gradient from the decoder's step.
    """
    gradient, = torch.autograd.grad(loss, x_hat)
    linear = (x_hat * gradient).sum()
    return loss.detach() + linear - linear.detach()


def export(run, model, named, ema, batches):
    """Write the weights and their averages to final/ and return the folder. Each VAE has the scale
    and the shift that its latent of `batches` of images asks for."""
    batches = list(batches) if isinstance(model, VAE) else []
    for name, average in (("model", {}), ("ema", ema)):
        with averaged(named, average):
            found = model.measure(batches) if batches else {}
            run.export(name, model.state_dict(),
                       dataclasses.asdict(dataclasses.replace(model.config, **found)))
    return run.publish()


def main():
    args = arguments()
    tiny, vae = args.size == "tiny", args.latent == "vae"

    # --------------------------------------------------------------------------------------------
    # Devices
    # --------------------------------------------------------------------------------------------
    devices = parallel.setup(args.device, args.dtype, args.mesh, args.dry_run)
    check_batch(args, devices, None if tiny else 64)                        # 64 images per device
    run = None if args.dry_run else Run(args, devices)

    # --------------------------------------------------------------------------------------------
    # Models: the frozen encoder and VGG, the discriminator with trained heads, the decoder
    # --------------------------------------------------------------------------------------------
    encoder, vgg, disc, found = load_frozen(args, devices)
    model = build(args, encoder, devices)
    resolution = (64 if tiny else 256) if vae else model.config.image_size
    latent = [(resolution // model.stride) ** 2 if vae else model.tokens, model.channels]   # [N,C]
    last_weight = (model.decoder.conv_out if vae else model.decoder_pred).weight
    flops = train_flops(model, encoder, vgg, disc, resolution)
    if not vae:
        model.remat = args.remat == "block"
        parallel.compile_blocks(model.decoder_layers, args.compile, devices)

    # --------------------------------------------------------------------------------------------
    # Data
    # --------------------------------------------------------------------------------------------
    mixture = None if args.dry_run else data.Mixture(args.data, resolution, args.seed,
                                                     crop="random", text=False)
    parts = {"decoder": model, "discriminator": disc and disc.heads, "encoder (frozen)": encoder,
             "vgg (frozen)": vgg, "dino (frozen)": disc and disc.dino}
    count = {k: sum(p.numel() for p in net.parameters()) for k, net in parts.items() if net}
    frozen = sum(n for k, n in count.items() if "frozen" in k)
    start_table(f"train_decoder --size {args.size}", args, devices, count, flops,
                state_gb(sum(count.values()) - frozen, frozen, args.ema), latent=latent,
                resolution=resolution,
                loss={k: getattr(args, k) for k in ("l1", "lpips", "gram", "gan", "kl")},
                starts=dict(discriminator=args.disc_start, gan=args.gan_start) if disc else None,
                data=args.data if args.dry_run else mixture.describe(), frozen=found)
    if args.dry_run:
        return

    # --------------------------------------------------------------------------------------------
    # Optimizers: one for the decoder, one for the discriminator's heads
    # --------------------------------------------------------------------------------------------
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    disc_params, spectral = {}, {}              # of the heads; the vectors of their spectral norms
    if disc:
        disc_params = {f"disc.{k}": p for k, p in disc.named_parameters() if p.requires_grad}
        spectral = {f"disc.{k}": b for k, b in disc.named_buffers() if k.endswith(("_u", "_v"))}
    recipe = dict(betas=args.betas, weight_decay=0.0)
    optimizer = parallel.adamw(list(named.values()), devices, lr=args.lr, **recipe)
    d_optimizer = parallel.adamw(list(disc_params.values()), devices, lr=args.lr_disc,
                                 **recipe) if disc else None
    ema = averages(named, devices) if args.ema else {}
    d_loss = {"hinge": d_loss_hinge, "vanilla": d_loss_vanilla}[args.disc_loss]

    # --------------------------------------------------------------------------------------------
    # Resume
    # --------------------------------------------------------------------------------------------
    if args.bench:                              # time the whole step, with the GAN
        args.disc_start, args.gan_start = 0, 0
    run.config = dataclasses.asdict(model.config)
    run.skips.records = mixture.records
    run.load({**named, **{f"ema.{k}": v for k, v in ema.items()}, **disc_params, **spectral},
             [optimizer, d_optimizer] if disc else [optimizer])
    collate = Collate(args.seed, latent_draws(args, latent))
    batches = data.loader(mixture, collate, args.micro_batch, run.start * args.batch,
                          args.workers, devices.rank, devices.world)
    unseen = data.Mixture(args.data, resolution, args.seed + 1000, crop="center", text=False)
    held_out = next(images(unseen, 64, devices))
    part = args.micro_batch / args.batch

    @torch.no_grad()
    def reconstruct(x, z=None):
        """[B,3,S,S] -> [B,3,S,S] without noise; z: the latent of x, where it is known."""
        return model.decode(model.encode(x)) if vae else model(encoder(x) if z is None else z)

    def sample(step):
        """Save unseen images above their reconstructions by the averaged weights; return the mean
        PSNR."""
        with averaged(named, ema):
            x_hat = reconstruct(held_out)
        pairs = parallel.full_tensor(torch.stack([held_out[:16], x_hat[:16]], 1).flatten(0, 1))
        if run.main:
            save_grid(pairs, run.dir / "samples" / f"step-{step:07d}.png", columns=8)
        return {"psnr": psnr(x_hat, held_out).mean().item()}

    # --------------------------------------------------------------------------------------------
    # Loop: data, the decoder's step, the discriminator's step, log, sample, save
    # --------------------------------------------------------------------------------------------
    for step in run.steps():
        factor = cosine(step, args.steps, args.warmup, args.lr_final / args.lr)
        set_lr([optimizer], factor, devices)
        train_disc = disc is not None and step >= args.disc_start
        adversarial = disc is not None and step >= args.gan_start
        kept, values = [], {"lr": args.lr * factor}
        for batch in run.micro_batches(batches):
            x = batch["images"].float() / 255                               # [B,3,S,S]
            z, off = None, x.new_zeros(())                                  # off: a term not in use
            lpips = gram = gan = kl = off
            lam = off + 1
            if vae:
                mean, logvar = model.posterior(x)                           # [B,c,h,w]
                x_hat = (model.decoder(mean + (0.5 * logvar).exp() * batch["noise"]) + 1) / 2
                kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
            else:
                with torch.no_grad():
                    z = encoder(x)                                          # [B,N,C]
                x_hat = model(z + batch["noise"] if args.noise_tau else z)  # [B,3,S,S]
            l1 = (x_hat - x).abs().mean()
            if vgg:
                lpips, gram = (v.mean() for v in vgg(x_hat, x, args.gram_layers))
            rec = args.l1 * l1 + args.lpips * lpips + args.gram * gram
            terms = {"l1": l1, "lpips": lpips, "gram": gram, "kl": kl}
            terms = {k: v for k, v in terms.items() if getattr(args, k)}
            if adversarial:
                gan = g_loss(disc(augment(x_hat, batch["fake_g"])))
                rec, gan = at_image(rec, x_hat), at_image(gan, x_hat)
                if args.adaptive_gan:
                    lam = adaptive_weight(rec, gan, last_weight,
                                          lambda g: parallel.average(g, devices))
                terms.update(gan=gan, gan_lambda=lam)
            loss = rec + args.gan * lam * gan + args.kl * kl
            (loss * part).backward()
            run.meter.add(part, loss=loss, **terms)
            if train_disc:
                kept.append((x, z, batch))
        norm = parallel.clip_grad(named.values(), math.inf, devices)        # the recipe has no clip
        parallel.guarded_step(optimizer, norm, devices)
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, named, parallel.scalar(ema_weight(args.ema, step), devices.device))

        if train_disc:                  # on fresh images from the decoder that was just updated
            factor = cosine(step - args.disc_start, args.steps - args.disc_start, args.warmup_disc,
                            args.lr_disc_final / args.lr_disc)
            set_lr([d_optimizer], factor, devices)
            values["lr_disc"] = args.lr_disc * factor
            for i, (x, z, batch) in enumerate(kept):
                disc.train(i == 0)      # one power iteration of the spectral norms per step
                fake = round8(reconstruct(x, z))
                pair = [augment(x, batch["real_d"]), augment(fake, batch["fake_d"])]
                real, fake = disc(torch.cat(pair)).chunk(2)                 # logits, each [B,L*N]
                d = d_loss(real, fake)
                (d * part).backward()
                run.meter.add(part, disc=d, logits_real=real.mean(), logits_fake=fake.mean())
            disc.eval()
            d_norm = parallel.clip_grad(disc_params.values(), math.inf, devices)
            parallel.guarded_step(d_optimizer, d_norm, devices)
            d_optimizer.zero_grad(set_to_none=True)
            norm = norm + d_norm                                            # finite if both are
        work = {k: v for k, v in flops.items() if train_disc or k != "discriminator"}
        run.end_step(step + 1, norm, work, PLOT, sample, **values)
    run.finish()
    if not args.bench:
        final = export(run, model, named, ema, images(mixture, 256, devices))
        score = sample(args.steps)["psnr"]
        if run.main:
            what = "unseen images" if mixture.endless() else "images of the data, which it has seen"
            print(f"{final}: PSNR {score:.2f} dB on 64 {what} (averaged weights)")


if __name__ == "__main__":
    cli.main(main)
