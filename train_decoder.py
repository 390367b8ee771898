"""Stage 1: train the decoder, from latent tokens back to pixels, against a frozen encoder.

    python train_decoder.py                      # built-in data, tiny, about 15 minutes
    python train_decoder.py --size xl --data folder/ --batch 512 --device cuda
    python train_decoder.py --latent vae         # the baseline: FLUX's AutoencoderKL

    z = encoder(x) + noise;   x_hat = decoder(z)                   paper section 2, Table 7
    L   = l1 |x_hat - x| + lpips LPIPS(x_hat, x) + gram Gram(x_hat, x) - gan lambda D(T(x_hat))
    L_D = hinge(D(T(x)), D(T(x')))

D is the discriminator of losses.py, T its augmentation, and lambda its adaptive weight. x' is
decoder(encoder(x)) in 8 bits, from the decoder that was just updated. The VAE adds kl KL to L and
draws z from its posterior. l1, lpips, gram, gan and kl are the weights of --l1 to --kl; without
--noise-tau there is no noise.
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
from losses import adaptive_weight, augment, d_loss_hinge, d_loss_vanilla, g_loss
from metrics import images, psnr, round8
from training import (
    check_batch, cosine, ema_weight, save_captioned, set_lr, start_ema, update_ema, with_ema)
from vae import TINY, VAE, VAEConfig
from vae import initial as init_vae

# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

EPOCH = 1_280_000       # images in a virtual epoch: `7e` is seven epochs, `500` is 500 steps
# Paper, Table 7, and the RAE code; the EMA is ours. tiny's small VGG pulls harder against L1 than
# the real one, so its LPIPS and Gram have a tenth of the paper's weights, and its GAN a hundredth.
DEFAULTS = {
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


def arguments():
    """Read the flags. The rest follows from --size and --latent."""
    p = cli.Parser(description=__doc__.split("\n")[0])
    cli.training_flags(p, steps=None, batch=None, data=DATA, log=20, sample=500, save=1000)
    number = positive(float, zero=True)
    a = p.add_argument_group("model").add_argument
    a("--size", choices=list(SIZES), default="tiny", help="size of the decoder")
    a("--latent", choices=["siglip2", "webssl", "vae"], default="siglip2",
      help="the latent to decode; vae: train FLUX's AutoencoderKL instead")
    a("--encoder", help="file, folder or hub id of the frozen encoder")
    a("--patch", type=positive(), help="pixels on the side that a token decodes to (default: the "
      "encoder's patch; 16 gives 256 px from 16 x 16 tokens)")
    a = p.add_argument_group("loss").add_argument
    a("--l1", type=number, default=1.0, help="weight of the L1 term (default 1)")
    a("--lpips", type=number, help="weight of the LPIPS term (default 1; tiny: 0.1)")
    a("--gram", type=number, help="weight of the Gram term (default 100; tiny: 10)")
    a("--gram-layers", type=int, nargs="+", choices=range(5), default=[0, 1, 2, 3, 4],
      help="VGG stages of the Gram term")
    a("--gan", type=number, help="weight of the GAN term (default 10; tiny: 0.1)")
    a("--adaptive-gan", action=argparse.BooleanOptionalAction, default=True,
      help="balance the gradient of the GAN term with that of the other terms at the last layer, "
      "per micro-batch (so that --micro-batch changes the result)")
    a("--disc-loss", choices=["hinge", "vanilla"], default="hinge",
      help="loss of the discriminator")
    a("--disc-start", type=span, help="first step of the discriminator's training "
      "(tiny: 500), or epochs of 1.28 million images before it (default: 7e; webssl: 10e)")
    a("--gan-start", type=span, help="first step with the GAN term (tiny: 600; "
      "default: 8e; webssl: 11e)")
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
        a(f"--lr{name}-final", type=number, help="learning rate at the end of the cosine schedule")
        a(f"--warmup{name}", type=span, help="steps, or 2e: epochs of 1.28 million images")
    a("--betas", type=share, nargs=2, default=[0.9, 0.95], help="AdamW's betas for both")
    a("--ema", type=share, help="decay of the averaged weights; 0: off. Ours, not the paper's")
    args = p.parse_args()
    vae, recipe = args.latent == "vae", "tiny" if args.size == "tiny" else args.latent
    for key, value in DEFAULTS[recipe].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for key in ("steps", "warmup", "warmup_disc", "disc_start", "gan_start"):
        setattr(args, key, steps_of(str(getattr(args, key)), args.batch))
    if args.gan and args.gan_start < args.disc_start:
        raise UserError(f"--gan-start {args.gan_start} is before --disc-start {args.disc_start}: "
                        "an untrained discriminator would steer the decoder")
    if args.bench:                                      # time the whole step, with the GAN
        args.disc_start = args.gan_start = 0
    unused = [f"--{key.replace('_', '-')}"
              for key in ("encoder", "patch", "noise_tau", "remat", "compile")
              if getattr(args, key) not in (None, 0, "none")]
    if vae and unused:
        raise UserError(f"{', '.join(unused)} with --latent vae: the VAE has no frozen encoder and "
                        "its blocks are neither compiled nor recomputed; leave it out")
    if not vae:
        args.kl = 0.0
    args.out = args.out or Path(f"runs/{'vae' if vae else 'decoder'}-{args.size}")
    return args


def build(args, encoder, devices):
    """Build the decoder or VAE on its devices, with initial weights or those of --init. encoder:
    the frozen one, None for the VAE. With --dry-run the network stays on the meta device."""
    if args.latent == "vae":                # the scale and the shift are measured at the end
        config = dataclasses.replace(TINY if args.size == "tiny" else VAEConfig(),
                                     scaling_factor=1.0, shift_factor=0.0)
    else:
        config = size_config(args.size, encoder.channels, encoder.tokens,
                             args.patch or encoder.patch_size, encoder.mean, encoder.std,
                             weights.portable_path(args.encoder))
    if args.init and not args.dry_run:
        return networks.load_init(args.init, config, encoder, devices)
    with torch.device("meta"):
        model = VAE(config) if args.latent == "vae" else Decoder(config, devices.dtype)
    if args.dry_run:
        return model
    initial = init_vae if args.latent == "vae" else init_decoder
    return parallel.build(model, parallel.initial_rows(model, initial, args.seed), devices)


# ------------------------------------------------------------------------------------------------
# A batch, and every random number of the step
# ------------------------------------------------------------------------------------------------

def draw(numbers, seed, purpose, one):
    """Stack one(generator) of each image: a function of (seed, purpose, the image's number), so
    that neither the mesh nor the micro-batch nor a resumption changes it."""
    return torch.from_numpy(np.stack([one(data.rng(seed, purpose, n)) for n in numbers]))


def uniform(numbers, seed, purpose):
    """Draw the numbers [B,5] that losses.augment needs."""
    return draw(numbers, seed, purpose, lambda g: g.random(5, np.float32))


def latent_noise(numbers, seed, shape, dist, tau=1.0):
    """Draw noise [B,*shape] for the latent. posterior: the VAE's, standard normal. half-normal,
    uniform: with one strength per image, for noise-augmented decoding (paper section 3.3)."""
    def one(g):
        strength = 1.0
        if dist == "half-normal":
            strength = abs(g.standard_normal())
        elif dist == "uniform":
            strength = g.random()
        return np.float32(tau * strength) * g.standard_normal(shape, np.float32)
    return draw(numbers, seed, "posterior" if dist == "posterior" else "latent noise", one)


class Collate:
    """Records -> one batch; runs in the loader's worker.

    images uint8 [B,3,S,S]; fake_g, fake_d, real_d [B,5]: the draws of losses.augment; noise: what
    the function noise(numbers, seed) draws for the latent, if there is one.
    """

    def __init__(self, seed=0, noise=None):
        self.seed, self.noise = seed, noise

    def __call__(self, records):
        n = [r["n"] for r in records]
        images = [torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records]       # [3,S,S]
        batch = {"images": torch.stack(images), "keys": [r["key"] for r in records],
                 "skipped": [s for r in records for s in r["skipped"]]}
        batch["fake_g"] = uniform(n, self.seed, "augment the decoder's fake")           # [B,5]
        batch["fake_d"] = uniform(n, self.seed, "augment the discriminator's fake")
        batch["real_d"] = uniform(n, self.seed, "augment the real image")
        if self.noise:
            batch["noise"] = self.noise(n, self.seed)
        return batch


def at_image(loss, x_hat):
    """Return the same loss, with the same gradient at x_hat, as a linear function of x_hat.

    A later backward pass then begins at x_hat. So the backward pass runs once through VGG and the
    discriminator, although the adaptive weight needs the gradient of each loss, and the
    discriminator's own weights get no gradient from the decoder's step.
    """
    gradient, = torch.autograd.grad(loss, x_hat)                            # [B,3,S,S]
    linear = (x_hat * gradient).sum()
    return loss.detach() + linear - linear.detach()


def export(run, model, named, ema, batches):
    """Write the weights and their averages to final/ and return the folder. The scale and the shift
    of a VAE are measured on `batches` of images."""
    batches = list(batches) if isinstance(model, VAE) else []
    for name in ("model", "ema") if ema else ("model",):
        with with_ema(named, ema if name == "ema" else {}):
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
    encoder, vgg, disc, files = networks.stage1_networks(args, devices)
    model = build(args, encoder, devices)
    if vae:
        resolution, last_weight = 64 if tiny else 256, model.decoder.conv_out.weight
        side = 2 * resolution // model.stride           # of the grid; a token is 2 x 2 of it
        N, C = side ** 2 // 4, model.channels
        noise = functools.partial(latent_noise, shape=(C // 4, side, side), dist="posterior")
    else:
        resolution, last_weight = model.config.image_size, model.decoder_pred.weight
        N, C = model.tokens, model.channels
        noise = functools.partial(latent_noise, shape=(N, C), dist=args.noise_dist,
                                  tau=args.noise_tau) if args.noise_tau else None
        model.remat = args.remat == "block"
        parallel.compile_blocks(model.decoder_layers, args.compile, devices)

    # --------------------------------------------------------------------------------------------
    # Data
    # --------------------------------------------------------------------------------------------
    mixture = None if args.dry_run else data.Mixture(args.data, resolution, args.seed,
                                                     crop="random", text=False)
    flops = networks.describe_stage1(
        args, devices, model, encoder, vgg, disc, resolution, latent=[N, C], frozen=files,
        data=args.data if args.dry_run else mixture.describe())
    if args.dry_run:
        return

    # --------------------------------------------------------------------------------------------
    # Optimizers: one for the decoder, one for the discriminator's heads
    # --------------------------------------------------------------------------------------------
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    ema = start_ema(named, devices) if args.ema else {}
    heads = disc.heads.state_dict(keep_vars=True) if disc else {}   # and spectral norms' vectors
    disc_params = list(disc.heads.parameters()) if disc else []
    adamw = functools.partial(parallel.adamw, devices=devices, betas=args.betas, weight_decay=0.0)
    optimizer = adamw(list(named.values()), lr=args.lr)
    d_optimizer = adamw(disc_params, lr=args.lr_disc) if disc else None
    d_loss = {"hinge": d_loss_hinge, "vanilla": d_loss_vanilla}[args.disc_loss]

    def update(optimizer, parameters):
        """Step, unless the gradient is not finite, and return its norm. The recipe has no clip."""
        norm = parallel.clip_grad(parameters, math.inf, devices)
        parallel.guarded_step(optimizer, norm, devices)
        optimizer.zero_grad(set_to_none=True)
        return norm

    # --------------------------------------------------------------------------------------------
    # Resume
    # --------------------------------------------------------------------------------------------
    run.config = dataclasses.asdict(model.config)
    run.skips.records = mixture.records
    run.load({**named, **{f"ema.{k}": v for k, v in ema.items()},
              **{f"disc.heads.{k}": v for k, v in heads.items()}},
             [optimizer, d_optimizer] if disc else [optimizer])
    batches = data.loader(mixture, Collate(args.seed, noise), args.micro_batch,
                          run.start * args.batch, args.workers, devices.rank, devices.world)
    unseen = data.Mixture(args.data, resolution, args.seed + 1000, crop="center", text=False)
    held_out = next(images(unseen, 64, devices))                            # [64,3,S,S]

    @torch.no_grad()
    def reconstruct(x, z=None):
        """[B,3,S,S] -> [B,3,S,S] without noise; z: the latent of x, where it is known."""
        return model.decode(model.encode(x)) if vae else model(encoder(x) if z is None else z)

    def sample(step):
        """Save images, each left of its reconstruction by the averaged weights; return the mean
        PSNR. Only endless data make them unseen."""
        model.eval()                                    # a fork may have dropout
        with with_ema(named, ema):
            x_hat = reconstruct(held_out)
        model.train()
        pairs = torch.stack([held_out[:16], x_hat[:16]], 1).flatten(0, 1)   # [32,3,S,S]
        pairs = parallel.full_tensor(pairs)
        if run.main:
            with run.surviving("the samples"):
                path = run.dir / "samples" / f"step-{step:07d}.png"
                save_captioned(pairs, ["image", "reconstruction"] * 16, path)
        return {"psnr": psnr(x_hat, held_out).mean().item()}

    # --------------------------------------------------------------------------------------------
    # Loop: data, the decoder's step, the discriminator's step, log, sample, save
    # --------------------------------------------------------------------------------------------
    part = args.micro_batch / args.batch
    for step in run.steps():
        factor = cosine(step, args.steps, args.warmup, args.lr_final / args.lr)
        set_lr([optimizer], factor, devices)
        train_disc = disc is not None and step >= args.disc_start
        adversarial = disc is not None and step >= args.gan_start
        logged = [k for k in ("l1", "lpips", "gram", "kl") if getattr(args, k)]
        logged += ["gan", "gan_lambda"] * adversarial
        seen, values = [], {"lr": args.lr * factor}
        for batch in run.micro_batches(batches):
            x = batch["images"].float() / 255                               # [B,3,S,S]
            lpips = gram = gan = kl = x.new_zeros(())                       # 0 where a term is off
            z, lam = None, x.new_ones(())
            if vae:
                mean, logvar = model.posterior(x)                           # [B,c,h,w]
                drawn = mean + (0.5 * logvar).exp() * batch["noise"]        # [B,c,h,w]
                x_hat = (model.decoder(drawn) + 1) / 2                      # [B,3,S,S]
                kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
            else:
                with torch.no_grad():
                    z = encoder(x)                                          # [B,N,C]
                x_hat = model(z + batch["noise"] if args.noise_tau else z)  # [B,3,S,S]
            l1 = (x_hat - x).abs().mean()
            if vgg:
                lpips, gram = (v.mean() for v in vgg(x_hat, x, args.gram_layers))
            rec = args.l1 * l1 + args.lpips * lpips + args.gram * gram
            if adversarial:
                gan = g_loss(disc(augment(x_hat, batch["fake_g"])))
                rec, gan = at_image(rec, x_hat), at_image(gan, x_hat)       # same values, less work
                if args.adaptive_gan:
                    lam = adaptive_weight(rec, gan, last_weight,
                                          lambda g: parallel.average(g, devices))
            loss = rec + args.gan * lam * gan + args.kl * kl                # L
            (loss * part).backward()
            terms = dict(l1=l1, lpips=lpips, gram=gram, kl=kl, gan=gan, gan_lambda=lam)
            run.meter.add(part, loss=loss, **{k: terms[k] for k in logged})
            if train_disc:
                seen.append((x, z, batch))
        norm = update(optimizer, named.values())
        update_ema(ema, named, parallel.scalar(ema_weight(args.ema, step), devices.device))

        if train_disc:                  # on fresh images from the decoder that was just updated
            factor = cosine(step - args.disc_start, args.steps - args.disc_start, args.warmup_disc,
                            args.lr_disc_final / args.lr_disc)
            set_lr([d_optimizer], factor, devices)
            values["lr_disc"] = args.lr_disc * factor
            for i, (x, z, batch) in enumerate(seen):
                disc.train(i == 0)      # one power iteration of the spectral norms per step
                fake = round8(reconstruct(x, z))                            # [B,3,S,S]
                pair = [augment(x, batch["real_d"]), augment(fake, batch["fake_d"])]
                real, fake = disc(torch.cat(pair)).chunk(2)                 # logits, each [B,L*N]
                loss = d_loss(real, fake)                                   # L_D
                (loss * part).backward()
                run.meter.add(part, disc=loss, logits_real=real.mean(), logits_fake=fake.mean())
            disc.eval()
            norm = norm + update(d_optimizer, disc_params)                  # finite if both are
        work = {k: v for k, v in flops.items() if train_disc or k != "discriminator"}
        run.end_step(step + 1, norm, work, PLOT, sample, **values)
    run.finish()
    if not args.bench:
        final = export(run, model, named, ema, images(mixture, 256, devices))
        score = sample(args.steps)["psnr"]
        if run.main:
            what = "unseen images" if mixture.endless() else "images of the data, which it has seen"
            print(f"{final}: PSNR {score:.2f} dB on 64 {what}"
                  f"{' (averaged weights)' if ema else ''}")


if __name__ == "__main__":
    cli.main(main)
