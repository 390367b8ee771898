"""Train a small SigLIP-2 from scratch: the frozen encoder of the tiny preset; a readable trainer.

    python train_encoder.py                       # built-in data, a few CPU minutes
    python train_encoder.py --data folder/ --steps 100000 --batch 256
    python train_encoder.py --arch vgg            # the tiny preset's perceptual net (LPIPS, Gram)
    python train_encoder.py --arch dino           # the trunk of its discriminator

Sigmoid image-text loss (SigLIP, arXiv 2303.15343; an image's wrong captions are those of its
micro-batch on its process, so --micro-batch and the number of processes matter) plus a dense term:
from each latent token one linear layer must predict the pixels of its own patch, also where the
input patch was hidden. The term stands in for SigLIP-2's captioning, self-distillation and masked
prediction (arXiv 2502.14786): without it a contrastive encoder throws pixels away and no decoder
can bring them back.
The two networks of the decoder's loss are small stand-ins for VGG16 and DINO ViT-S/16, of the same
architecture, and the logs say so wherever they are used. VGG learns from the sigmoid loss alone,
DINO from both: without the dense term its tokens do not tell a picture from its reconstruction
(LOG.md).
"""
import argparse
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import discriminator
import encoder as encoders
import parallel
import perceptual
import run as runs
import text_model as text
import weights
from parallel import UserError

# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

LENGTH = 64         # tokens of a caption, at the most
TINY_DATA = ["builtin:web=3", "builtin:synthetic=2", "builtin:text=1"]
ARCH = {    # width: C of the vit, channels of VGG's first stage, d of DINO
    "vit": dict(width=encoders.TINY["hidden_size"], depth=encoders.TINY["num_hidden_layers"],
                heads=encoders.TINY["num_attention_heads"], dense=30.0, lr=1.5e-3),
    "vgg": dict(width=round(perceptual.WIDTHS[0] * perceptual.TINY_WIDTH), depth=0, heads=1,
                dense=0.0, lr=1e-3),
    "dino": dict(width=discriminator.TINY["dim"], depth=discriminator.TINY["depth"],
                 heads=discriminator.TINY["num_heads"], dense=30.0, lr=1.5e-3),
}


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    runs.add_flags(p, steps=3000, batch=64, data=TINY_DATA, log=20, sample=500, save=500)
    g = p.add_argument_group("model")
    g.add_argument("--arch", choices=list(ARCH), default="vit", help="vit: the encoder; vgg: the "
                   "perceptual net; dino: the discriminator's trunk")
    g.add_argument("--width", type=runs.positive(), help="C, the channels of the latent (vgg: of "
                   "the first stage, 64 is VGG16)")
    g.add_argument("--depth", type=runs.positive(), help="blocks (not for vgg)")
    g.add_argument("--heads", type=runs.positive(), help="of the attention (not for vgg)")
    g.add_argument("--resolution", type=runs.positive(), default=64)
    g.add_argument("--patch", type=runs.positive(), default=8)
    g.add_argument("--tokenizer", type=Path, help="a tokenizer folder (default: train one here)")
    g = p.add_argument_group("loss and optimizer")
    g.add_argument("--dense", type=runs.positive(float, zero=True),
                   help="weight of the pixel term (mean squared error, pixels in [-1,1]); not for "
                   "vgg")
    g.add_argument("--mask", type=runs.share, default=0.1,
                   help="share of the patches hidden from the encoder (grey), for the dense term")
    g.add_argument("--lr", type=runs.positive(float))
    g.add_argument("--warmup", type=runs.positive(zero=True), default=200, help="steps")
    args = p.parse_args()
    unused = [flag for flag, given in (("--compile", args.compile),
                                       ("--remat block", args.remat == "block")) if given]
    if unused:
        raise UserError(f"{', '.join(unused)}: not here, the encoder is small; leave it out")
    if args.arch == "vgg" and (args.depth or args.heads):
        raise UserError("--arch vgg has neither --depth nor --heads: its 13 convolutions are fixed")
    if args.arch == "vgg" and args.dense:
        raise UserError(f"--dense {args.dense}: --arch vgg has no tokens, so no pixel term")
    for key, value in ARCH[args.arch].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.out = args.out or Path(f"runs/{'encoder' if args.arch == 'vit' else args.arch}-tiny")
    return args


# ------------------------------------------------------------------------------------------------
# Model: the encoder, a text tower, and the two heads of the losses
# ------------------------------------------------------------------------------------------------

class Trainee(nn.Module):
    """`encoder` is what the run is for: a SigLIP2, a Dino or a Perceptual. The rest exists only to
    train it. features: channels of what `look` pools; patch: of the dense term, None without one.
    """

    def __init__(self, encoder, features, patch, vocab_size, dtype, embedding=96):
        super().__init__()
        self.encoder, self.patch_size = encoder.requires_grad_(True), patch
        own = isinstance(encoder, encoders.SigLIP2)                     # its pooling ends in C
        E = features if own else embedding
        self.text = text.TextModel(dict(text.TINY, vocab_size=vocab_size), dtype=dtype)
        self.text_projection = nn.Linear(self.text.width, E)
        self.image_projection = nn.Identity() if own else nn.Linear(features, E)
        if patch:
            self.pixels = nn.Linear(features, 3 * patch ** 2)           # the dense term's probe
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))   # SigLIP's t' and b
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def look(self, images):
        """[B,3,S,S] -> features of the whole [B,F] and, but for VGG, of tokens [B,N,F]; fp32."""
        e = self.encoder
        if isinstance(e, encoders.SigLIP2):
            x = e.blocks(images)[-1].float()                                # [B,N,C]
            return (e.pool(x.to(e.dtype)).float(),
                    F.layer_norm(x, (e.channels,), eps=1e-6))               # this is the latent
        if isinstance(e, perceptual.Perceptual):
            return torch.cat([f.mean((2, 3)) for f in e.maps(images)], 1), None
        z = e.norm(e(images)[0].mT)                                         # [B,N,d]
        return z.mean(1), z

    def forward(self, images, seen, ids, last):
        """images [B,3,S,S], seen (same: some patches grey), ids [B,L], last [B] -> embeddings of
        image and text [B,E], the dense error (pixels in [-1,1]; 0 without it), tokens [B,N,F]."""
        h = self.text(self.text.embed(ids))                                 # [B,L,W]
        h = h[torch.arange(len(ids), device=ids.device), last].float()      # [B,W], last token
        pooled, z = self.look(seen)
        mse = ((self.pixels(z) - patchify(images, self.patch_size)).square().mean()
               if self.patch_size else images.new_zeros(()))
        return (F.normalize(self.image_projection(pooled), dim=-1),
                F.normalize(self.text_projection(h), dim=-1), mse, z)

    def similarity(self, image, caption):
        return image @ caption.T * self.logit_scale.exp() + self.logit_bias


def patchify(images, p):
    """[B,3,H,W] in [0,1] -> [B,N,p*p*3] in [-1,1]."""
    x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))                  # [B,3,gy,p,gx,p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2) * 2 - 1


def hide(images, p, share, generator):
    """Grey out a share of the patches; grey is 0 for the network."""
    B, _, H, W = images.shape
    keep = torch.rand(B, 1, H // p, W // p, generator=generator) >= share
    keep = keep.repeat_interleave(p, 2).repeat_interleave(p, 3).to(images.device, non_blocking=True)
    return torch.where(keep, images, 0.5)


def sigmoid_loss(logits):
    """-log sigmoid(+-logit), summed over the texts of a batch, mean over the images."""
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum(1).mean()


def effective_rank(z):
    """exp(entropy of the normalised eigenvalues of the covariance) of tokens [.,C]: Roy 2007."""
    values = torch.linalg.eigvalsh(torch.cov(z.flatten(0, 1).double().T)).clamp(min=0)
    p = values / values.sum()
    return torch.exp(-(p * (p + 1e-12).log()).sum()).item()


def said_of(record):
    """The words about a picture that has no caption: the request for it, or question and answer."""
    turns = [t["value"].replace("<image>", "").strip() for t in record["conversations"]]
    return turns[0] if record["task"] == "t2i" else " ".join(turns)


class Collate:
    """Records -> images uint8 [B,3,S,S], ids [B,L], last [B], keys; runs in the loader's worker.
    length: the same L for all (another one is another program on XLA), else the batch's longest."""

    def __init__(self, tokenizer, length=None):
        self.tokenizer, self.length = tokenizer, length
        self.pad = tokenizer.token_to_id("<|endoftext|>")

    def __call__(self, records):
        texts = [r["caption"] or said_of(r) for r in records]
        rows = [text.encode_text(self.tokenizer, t)[:LENGTH - 1] + [self.pad] for t in texts]
        ids = torch.full((len(rows), self.length or max(map(len, rows))), self.pad)
        for row, i in zip(ids, rows):
            row[:len(i)] = torch.tensor(i)
        images = torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records])
        return {"images": images, "ids": ids, "last": torch.tensor([len(r) - 1 for r in rows]),
                "keys": [r["key"] for r in records],
                "skipped": [s for r in records for s in r["skipped"]]}


def build(args, vocab_size, dtype):
    """The Trainee of --arch, its encoder initialised -> (it, the encoder's config, forward FLOPs an
    image). weights.load_encoder, load_perceptual and load_discriminator read what is exported."""
    patch = args.patch
    if args.arch == "vit":
        config = dict(encoders.TINY, hidden_size=args.width, intermediate_size=4 * args.width,
                      num_hidden_layers=args.depth, num_attention_heads=args.heads,
                      image_size=args.resolution, patch_size=patch)
        net, features = encoders.SigLIP2(config, dtype=dtype), args.width
        encoders.init_weights(net, args.seed)
        config, flops = net.config, net.forward_flops()
    elif args.arch == "vgg":
        width, patch = args.width / perceptual.WIDTHS[0], None
        net, features = perceptual.Perceptual(width), sum(round(c * width)
                                                          for c in perceptual.WIDTHS)
        perceptual.init_weights(net, args.seed)
        config, flops = dict(width=width), net.forward_flops(args.resolution)
    else:
        config = dict(discriminator.TINY, dim=args.width, depth=args.depth, num_heads=args.heads,
                      key_depths=[i for i in range(args.depth) if i % 2], patch=patch,
                      image_size=args.resolution)
        whole = discriminator.Discriminator(config)
        discriminator.init_weights(whole, args.seed)
        net, features, flops = whole.dino, args.width, whole.forward_flops()[0]
    return Trainee(net, features, patch, vocab_size, dtype), config, flops


def activation_bytes(model, resolution):
    """What the backward pass keeps of one picture and a caption of 24 tokens, counted: of two less
    of one, as what it keeps of the weights does not grow."""
    def kept(B):
        found = {}

        def pack(x):
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            return x
        images, ids = torch.zeros(B, 3, resolution, resolution), torch.zeros(B, 24).long()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            alive = model(images, images, ids, ids[:, 0])   # so no address is used twice
        return sum(found.values())
    return kept(2) - kept(1)


def tokenizer_for(args):
    """The given tokenizer, or a BPE of 1,024 tokens trained on the built-in captions, questions."""
    if args.tokenizer:
        with weights.user_errors(f"--tokenizer {args.tokenizer}"):
            return text.load_tokenizer(args.tokenizer)
    sources = [f"builtin:{s}" for s in ("web", "synthetic", "text", "hq", "qa")]
    mixture = data.Mixture(sources, resolution=8, seed=1)
    turns = [t["value"] for i in range(8000) for t in mixture[i]["conversations"]]
    return text.train_tokenizer(turns + [text.SYSTEM, "system\n", "user\n", "assistant\n"] * 100)


@torch.no_grad()
def evaluate(model, batch):
    """On unseen pictures: caption retrieval among all of them, linear-probe PSNR, rank of z."""
    images = batch["images"].float() / 255
    image, caption, mse, z = model(images, images, batch["ids"], batch["last"])
    hit = (image @ caption.T).argmax(1).cpu() == torch.arange(len(images))
    values = dict(retrieval=hit.float().mean().item())
    if mse > 0:                             # VGG has no tokens
        values.update(probe_psnr=-10 * math.log10(mse.item() / 4),
                      effective_rank=effective_rank(z.cpu()))
    return values


def main():
    args = arguments()
    if args.arch != "vgg" and args.resolution % args.patch:
        raise UserError(f"--resolution {args.resolution} is not a multiple of --patch {args.patch}")
    if args.width % args.heads:
        raise UserError(f"--width {args.width} is not a multiple of --heads {args.heads}")
    if args.arch == "vgg" and args.resolution < 16:
        raise UserError(f"--resolution {args.resolution}: VGG's four poolings need 16 pixels")
    if args.arch == "dino" and args.depth < 2:
        raise UserError(f"--depth {args.depth}: every second block is read, so two are needed")

    # --------------------------------------------------------------------------------------------
    # Devices
    # --------------------------------------------------------------------------------------------
    devices = parallel.setup(args.device, args.dtype, args.mesh, args.dry_run)
    runs.check_batch(args, devices)
    if not args.dry_run:
        run = runs.Run(args, devices)

    # --------------------------------------------------------------------------------------------
    # Data
    # --------------------------------------------------------------------------------------------
    mixture = None if args.dry_run else data.Mixture(args.data, args.resolution, args.seed)
    kept = (not (args.fresh or args.tokenizer)                              # of a run that goes on
            and (args.out / "tokenizer.json").is_file())
    if args.dry_run and not args.tokenizer:
        args.tokenizer = weights.ASSETS                                     # none is trained for it
    with weights.user_errors(f"--out {args.out}: tokenizer.json"):
        tokenizer = text.load_tokenizer(args.out) if kept else tokenizer_for(args)
    collate = Collate(tokenizer, LENGTH if devices.kind == "xla" else None)

    # --------------------------------------------------------------------------------------------
    # Model
    # --------------------------------------------------------------------------------------------
    vocab = tokenizer.get_vocab_size()
    model, config, forward_flops = build(args, vocab, devices.dtype)
    text.init_weights(model.text, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    for module in (m for m in model.children() if isinstance(m, nn.Linear)):
        module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator) * 0.02)
        module.bias.data.zero_()
    if args.init:
        init, = weights.locate([("weights", args.init, "--init")])
        state, _ = weights.read_weights(weights.final_of(init), "--init")
        weights.load_strict(model.encoder, state, f"--init {args.init}")
    e, activations = model.encoder, activation_bytes(model, args.resolution)
    count = {name: sum(p.numel() for p in child.parameters())
             for name, child in (("encoder", e), ("text", model.text))}
    count["heads"] = sum(p.numel() for p in model.parameters()) - sum(count.values())
    flops = {"encoder": 3 * forward_flops,                                  # some 24 tokens:
             "text": 6 * 24 * sum(p.numel() for p in model.text.model.layers.parameters())}
    trained = (parallel.on_one_device(model.named_parameters(), devices)
               if devices.target == "xla" else sum(count.values()))         # whole in every process
    memory = lambda images: runs.memory_gb(trained, 0, activations * images / devices.axes["fsdp"],
                                           0)
    runs.plan(f"train_encoder --arch {args.arch}", args, devices, count, flops, memory,
              "take a smaller --width or --depth", arch=args.arch,
              data=data.planned(args.data) if args.dry_run else mixture.describe(),
              **dict(latent=[e.tokens, e.channels]) if args.arch == "vit" else {})
    if args.dry_run:
        return
    model = parallel.shard(model, devices)

    # --------------------------------------------------------------------------------------------
    # Optimizer
    # --------------------------------------------------------------------------------------------
    named = {k: p for k, p in model.named_parameters()
             if not k.startswith("encoder.lin")}                            # LPIPS': they stay 1/C
    optimizer = parallel.adamw(list(named.values()), devices, lr=args.lr, betas=(0.9, 0.95),
                               weight_decay=0.0)

    # --------------------------------------------------------------------------------------------
    # Resume
    # --------------------------------------------------------------------------------------------
    run.load({**named, **runs.moments(optimizer, named, devices)})
    if run.main and not (args.bench or kept):
        runs.write_text(run.dir / "tokenizer.json", tokenizer.to_str(pretty=True))
    accumulate = args.batch // args.micro_batch
    batches = data.loader(mixture, collate, args.micro_batch, run.start * args.batch, args.workers,
                          devices.rank, devices.world)
    unseen = data.Mixture(args.data, args.resolution, args.seed + 1000)
    unseen = parallel.place(collate([unseen[i] for i in range(256)]), devices)
    plot = ["loss", "contrast", *["dense"] * (args.dense > 0), "retrieval", "probe_psnr"]

    # --------------------------------------------------------------------------------------------
    # Loop: data, step, log, save
    # --------------------------------------------------------------------------------------------
    for step in run.progress(args.steps):
        lr = args.lr * runs.cosine(step, args.steps, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = parallel.scalar(lr, devices.device)
        for micro, batch in enumerate(run.micro_batches(batches)):
            batch = parallel.place(batch, devices)
            images = batch["images"].float() / 255                          # [B,3,S,S]
            draw = torch.Generator().manual_seed(   # every process hides other patches
                (args.seed * 10 ** 9 + step * accumulate + micro) * devices.world + devices.rank)
            seen = images if args.arch == "vgg" else hide(images, args.patch, args.mask, draw)
            image, caption, mse, _ = model(images, seen, batch["ids"], batch["last"])
            contrast = sigmoid_loss(model.similarity(image, caption))
            loss = contrast + args.dense * mse
            (loss / accumulate).backward()
            run.meter.add(1 / accumulate, loss=loss, contrast=contrast, dense=mse)
        norm = parallel.clip_grad(named.values(), 1.0, devices)
        parallel.guarded_step(optimizer, norm, devices)
        optimizer.zero_grad(set_to_none=True)
        if run.end_step(step + 1, norm, flops, plot,
                        lambda _: evaluate(model, unseen), lr=lr):
            return
    run.finish()
    run.export("model", e.state_dict(), config)
    final = evaluate(model, unseen)
    words = f"retrieval among {len(unseen['ids'])} {final['retrieval']:.1%}"
    if not mixture.endless():
        words += " (pictures of the data, which it has seen)"
    if "probe_psnr" in final:
        words += (f", linear probe {final['probe_psnr']:.1f} dB, effective rank "
                  f"{final['effective_rank']:.0f}")
    if devices.main:
        print(f"{run.dir}/final: {words}")


if __name__ == "__main__":
    runs.main(main)
