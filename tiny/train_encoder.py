"""Train a small SigLIP-2 from scratch, the frozen encoder of the tiny preset.

    python tiny/train_encoder.py                  # built-in data, about 22 minutes
    python tiny/train_encoder.py --data folder/ --steps 100000 --batch 256
    python tiny/train_encoder.py --arch vgg       # the tiny preset's perceptual network
    python tiny/train_encoder.py --arch dino      # the trunk of its discriminator

The loss is the sigmoid image-text loss (SigLIP, arXiv 2303.15343) plus a dense term. An image's
wrong captions are the other captions of its micro-batch in its process, so --micro-batch and the
number of processes matter. In the dense term, one linear layer predicts the pixels of each patch
from its latent token, also for patches that are hidden from the encoder. The term stands in for
SigLIP-2's captioning, self-distillation and masked prediction (arXiv 2502.14786): without it, a
contrastive encoder discards pixels that no decoder can restore.

VGG and DINO are small stand-ins for the decoder's VGG16 and DINO ViT-S/16. VGG learns from the
sigmoid loss alone, DINO from both terms: without the dense term, its tokens do not distinguish an
image from its reconstruction.
"""
import dataclasses
import functools
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # run as a script from anywhere

import cli               # before torch: it sets how threads wait
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import chat
import data
import encoder as vit
import losses
import parallel
import text_model
import weights
from checkpoint import Run, write_text
from cli import UserError, positive, share
from training import check_batch, cosine, set_lr, start_table, state_gb

# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

LENGTH = 64         # the largest number of tokens of a caption
DATA = ["builtin:web=3", "builtin:synthetic=2", "builtin:text=1"]
ARCH = {    # width: C of the vit, channels of VGG's first stage, d of DINO
    "vit": dict(width=vit.TINY.hidden_size, depth=vit.TINY.num_hidden_layers,
                heads=vit.TINY.num_attention_heads, dense=30.0, lr=1.5e-3),
    "vgg": dict(width=round(losses.WIDTHS[0] * losses.TINY_WIDTH), depth=0, heads=1, dense=0.0,
                lr=1e-3),
    "dino": dict(width=losses.TINY_DISC.dim, depth=losses.TINY_DISC.depth,
                 heads=losses.TINY_DISC.num_heads, dense=30.0, lr=1.5e-3),
}


def arguments():
    p = cli.Parser(description=__doc__.split("\n")[0])
    cli.training_flags(p, steps=3000, batch=64, data=DATA, sample=500, blocks=False)
    p.set_defaults(compile=None)                                        # check_batch reads it
    a = p.add_argument_group("model").add_argument
    a("--arch", choices=list(ARCH), default="vit",
      help="vit: the encoder; vgg: the perceptual network; dino: the discriminator's trunk")
    a("--width", type=positive(),
      help="channels of the latent (vgg: channels of the first stage, 64 in VGG16)")
    a("--depth", type=positive(), help="number of blocks (not for vgg)")
    a("--heads", type=positive(), help="attention heads (not for vgg)")
    a("--resolution", type=positive(), default=64, help="pixels on an image's side (default 64)")
    a("--patch", type=positive(), default=8, help="pixels on a patch's side (default 8; not for "
      "vgg)")
    a("--tokenizer", type=Path, help="a tokenizer folder (default: train one here)")
    a = p.add_argument_group("loss and optimizer").add_argument
    a("--dense", type=positive(float, zero=True), help="weight of the dense term (not for vgg)")
    a("--mask", type=share, default=0.1, help="share of the patches that are hidden (grey; "
      "not for vgg)")
    a("--lr", type=positive(float), help="learning rate (default 1.5e-3; vgg: 1e-3)")
    a("--warmup", type=positive(zero=True), default=200, help="steps")
    args = p.parse_args()
    if args.arch == "vgg" and (args.depth or args.heads or args.dense):
        raise UserError("--arch vgg takes no --depth, --heads or --dense: it has 13 fixed "
                        "convolutions and no tokens")
    for key, value in ARCH[args.arch].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.arch != "vgg" and (args.resolution % args.patch or args.width % args.heads):
        raise UserError(f"--resolution {args.resolution} must be a multiple of --patch "
                        f"{args.patch}, and --width {args.width} of --heads {args.heads}")
    args.out = args.out or Path(f"runs/{'encoder' if args.arch == 'vit' else args.arch}-tiny")
    return args


# ------------------------------------------------------------------------------------------------
# Model: the encoder, a text model, and the two heads of the losses
# ------------------------------------------------------------------------------------------------

class SiglipHead(nn.Module):
    """SigLIP's attention pooling by one learned probe: tokens [B,N,C] -> image embedding [B,C]. It
    is not part of the latent. The encoder's file holds its weights under the released keys."""

    def __init__(self, C, hidden, heads, eps):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, C))
        self.attention = nn.MultiheadAttention(C, heads, batch_first=True)
        self.layernorm = vit.LayerNorm(C, eps=eps)
        self.mlp = vit.MLP(C, hidden, gelu="tanh")

    def forward(self, x):
        x = x.float()
        probe = self.probe.expand(len(x), -1, -1)                           # [B,1,C]
        x, _ = self.attention(probe, x, x, need_weights=False)              # [B,1,C]
        return (x + self.mlp(self.layernorm(x)))[:, 0]                      # [B,C]


class Trainee(nn.Module):
    """The network to train, `encoder`, with the parts that exist only to train it.

    encoder: a ViT with SigLIP's head, a Dino or a Perceptual. features: F, the channels that
    `encode` pools. patch: patch size of the dense term, None without that term.
    """

    def __init__(self, encoder, features, patch, vocab_size, dtype):
        super().__init__()
        self.encoder, self.patch_size = encoder.requires_grad_(True), patch
        pooled = isinstance(encoder, vit.ViT)                           # by its own head
        E = features if pooled else 96
        self.text = text_model.TextModel(
            dataclasses.replace(text_model.TINY, vocab_size=vocab_size), dtype=dtype)
        self.text_projection = nn.Linear(self.text.width, E)
        self.image_projection = nn.Identity() if pooled else nn.Linear(features, E)
        if patch:
            self.pixels = nn.Linear(features, 3 * patch ** 2)           # of the dense term
        # SigLIP's t' and b; on the CPU in meta builds too
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0), device="cpu"))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0, device="cpu"))

    def encode(self, images):
        """Images [B,3,S,S] -> pooled features [B,F] and tokens [B,N,F] (None for VGG), fp32."""
        e = self.encoder
        if isinstance(e, vit.ViT):
            x = e.last_block(images)                                        # [B,N,C]
            z = F.layer_norm(x.float(), (e.channels,), eps=1e-6)            # the latent
            return e.head(e.post_layernorm(x)), z
        if isinstance(e, losses.Perceptual):
            return torch.cat([f.mean((2, 3)) for f in e.maps(images)], 1), None
        z = e.norm(e(images)[0].mT)                                         # [B,N,d]
        return z.mean(1), z

    def forward(self, images, seen, ids, last):
        """Return the embeddings of images and texts [B,E], the dense term (the mean squared error
        of pixels in [-1,1]; 0 for VGG), and the tokens [B,N,F].

        images: [B,3,S,S]. seen: the images with some patches grey. ids: captions [B,L]. last [B]:
        index of a caption's last token.
        """
        h = self.text(self.text.embed(ids))                                 # [B,L,W]
        h = h[torch.arange(len(ids), device=ids.device), last].float()      # [B,W]
        pooled, z = self.encode(seen)
        mse = ((self.pixels(z) - patchify(images, self.patch_size)).square().mean()
               if self.patch_size else images.new_zeros(()))
        return (F.normalize(self.image_projection(pooled), dim=-1),
                F.normalize(self.text_projection(h), dim=-1), mse, z)

    def similarity(self, image, caption):
        return image @ caption.T * self.logit_scale.exp() + self.logit_bias


def patchify(images, p):
    """Images [B,3,H,W] in [0,1] -> pixels of each p x p patch [B,N,p*p*3] in [-1,1]."""
    x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))                  # [B,3,gy,p,gx,p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2) * 2 - 1


def hide(images, p, share, generator):
    """Make each p x p patch grey (0 after SigLIP's normalisation) with the probability `share`.
    generator: numpy's."""
    B, _, H, W = images.shape
    keep = torch.from_numpy(generator.random((B, 1, H // p, W // p), np.float32)) >= share
    keep = keep.repeat_interleave(p, 2).repeat_interleave(p, 3).to(images.device, non_blocking=True)
    return torch.where(keep, images, 0.5)


def sigmoid_loss(logits):
    """Logits [B,B] of images and texts -> -log sigmoid(+-logit), summed over the texts, mean over
    the images."""
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum(1).mean()


def effective_rank(z):
    """Return exp(entropy of the normalised eigenvalues of the covariance) of tokens [B,N,C] (Roy
    and Vetterli 2007)."""
    values = torch.linalg.eigvalsh(torch.cov(z.flatten(0, 1).double().T)).clamp(min=0)
    p = values / values.sum()
    return torch.exp(-(p * (p + 1e-12).log()).sum()).item()


def network(args, vocab_size, dtype):
    """Build the Trainee of --arch. Return it, its encoder's config as a dict, and the encoder's
    forward FLOPs per image."""
    patch = args.patch
    if args.arch == "vit":
        config = vit.ViTConfig(
            hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.depth,
            num_attention_heads=args.heads, image_size=args.resolution, patch_size=patch)
        net, features = vit.ViT(config, dtype), args.width
        net.post_layernorm = vit.LayerNorm(args.width, eps=config.layer_norm_eps)
        net.head = SiglipHead(args.width, 4 * args.width, args.heads, config.layer_norm_eps)
        config, flops = dataclasses.asdict(config), net.forward_flops()
    elif args.arch == "vgg":
        width, patch = args.width / losses.WIDTHS[0], None
        net, features = losses.Perceptual(width), sum(round(c * width) for c in losses.WIDTHS)
        config, flops = dict(width=width), net.forward_flops(args.resolution)
    else:
        config = losses.DiscConfig(
            dim=args.width, depth=args.depth, num_heads=args.heads, patch=patch,
            key_depths=tuple(range(1, args.depth, 2)), image_size=args.resolution)
        whole = losses.Discriminator(config)
        net, features, flops = whole.dino, args.width, whole.forward_flops()[0]
        config = dataclasses.asdict(config)
    return Trainee(net, features, patch, vocab_size, dtype), config, flops


def initial(arch, name, shape, seed):
    """Return the initial value of one parameter: each network's as in its own file, He-normal
    convolutions for a VGG, N(0, 0.02^2) for the projections and the dense term. Biases are zero."""
    part, _, key = name.partition(".")
    if part == "text":
        return text_model.initial(key, shape, seed)
    if part == "encoder" and arch == "vit":
        return vit.initial(key, shape, seed)                                # with its head
    if part == "encoder" and arch == "dino":
        return losses.initial(f"dino.{key}", {f"dino.{key}": shape}, seed)
    if key.startswith("lin"):
        return torch.full(shape, 1 / shape[1])                              # LPIPS' weights
    if len(shape) == 1:
        return torch.zeros(shape)
    vgg, key = part == "encoder", key.removeprefix("features.")
    generator = data.rng(seed, f"init vgg {key}" if vgg else f"init encoder's trainer {part}")
    std = (2 / math.prod(shape[1:])) ** 0.5 if vgg else 0.02
    return torch.from_numpy(generator.standard_normal(shape, np.float32)) * std


def released_key(name):
    """Return the key of a ViT's or its head's parameter in SigLIP's published files."""
    for ours, theirs in ((r"^patch_embed\.", "embeddings.patch_embedding."),
                         (r"^pos_embed$", "embeddings.position_embedding.weight"),
                         (r"^blocks\.", "encoder.layers."), (r"\.attn\.", ".self_attn."),
                         (r"\.norm([12])\.", r".layer_norm\1.")):
        name = re.sub(ours, theirs, name)
    return "vision_model." + name


def initial_rows(model, args):
    """Return `rows` for parallel.build: initial values, the encoder's from --init where it is
    given. Raises UserError for weights that do not fit."""
    drawn = parallel.initial_rows(model, functools.partial(initial, args.arch), args.seed)
    if not args.init:
        return drawn
    path, = weights.locate([("weights", args.init, "--init")])
    source = weights.open_weights(path, "--init")
    ours = {released_key(k.removeprefix("encoder.")): k for k in model.state_dict()
            if k.startswith("encoder.")}
    if "logit_scale" in source.shapes:                  # a checkpoint of this script
        source = source.renamed(lambda key: key if key.startswith("encoder.") else None)
    elif args.arch == "vit":
        source = source.renamed(lambda key: ours.get(key, key))
    else:
        source = source.renamed("encoder.{}".format)
    # a checkpoint lacks LPIPS' weights, which `initial` sets to 1/C
    optional = lambda key: not key.startswith("encoder.") or key.startswith("encoder.lin")
    return weights.rows_for(model, source, drawn, optional)


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------

def words_of(record):
    """Return a record's text: the caption, else the request for the image, else question and
    answer."""
    if record["caption"]:
        return record["caption"]
    if record["task"] == "t2i":
        return chat.request_of(record["conversations"]).strip()
    return " ".join(t["value"].replace("<image>", "").strip() for t in record["conversations"])


def collate(records, tokenizer, length=None):
    """Make a batch of records: images uint8 [B,3,S,S], ids [B,L], last [B], keys, skipped.

    length: L of all batches (XLA compiles one program per L); None: the batch's longest caption.
    """
    pad = tokenizer.token_to_id("<|endoftext|>")
    rows = [chat.encode_text(tokenizer, words_of(r))[:LENGTH - 1] + [pad] for r in records]
    ids = torch.full((len(rows), length or max(map(len, rows))), pad)
    for row, i in zip(ids, rows):
        row[:len(i)] = torch.tensor(i)
    images = torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records])
    return {"images": images, "ids": ids, "last": torch.tensor([len(r) - 1 for r in rows]),
            "keys": [r["key"] for r in records],
            "skipped": [s for r in records for s in r["skipped"]]}


def tokenizer_for(args):
    """Load the tokenizer of --tokenizer or of the resumed run, or train a BPE of 1,024 tokens on
    the built-in captions and questions."""
    resumed = not args.fresh and (args.out / "tokenizer.json").is_file()
    if args.tokenizer or resumed:
        return chat.load_tokenizer(args.tokenizer or args.out)
    if args.dry_run:
        return chat.load_tokenizer(weights.TINY)
    sources = [f"builtin:{s}" for s in ("web", "synthetic", "text", "hq", "qa")]
    mixture = data.Mixture(sources, resolution=0, seed=1)               # without images
    turns = [t["value"] for i in range(8000) for t in mixture[i]["conversations"]]
    roles = [chat.SYSTEM, "system\n", "user\n", "assistant\n"]
    return chat.train_tokenizer(turns + roles * 100)


@torch.no_grad()
def evaluate(model, batch):
    """Return the caption retrieval among the batch's images, the PSNR of the dense term's
    prediction and the effective rank of the latent (not for VGG)."""
    images = batch["images"].float() / 255
    image, caption, mse, z = model(images, images, batch["ids"], batch["last"])
    hit = (image @ caption.T).argmax(1).cpu() == torch.arange(len(images))
    values = {"retrieval": hit.float().mean().item()}
    if z is not None:
        values["probe_psnr"] = -10 * math.log10(mse.item() / 4)
        values["effective_rank"] = effective_rank(z.cpu())
    return values


def main():
    args = arguments()

    # --------------------------------------------------------------------------------------------
    # Devices and model
    # --------------------------------------------------------------------------------------------
    devices = parallel.setup(args.device, args.dtype, args.mesh, args.dry_run)
    check_batch(args, devices)
    run = None if args.dry_run else Run(args, devices)
    tokenizer = tokenizer_for(args)
    vocab_size = tokenizer.get_vocab_size()
    with torch.device("meta"):
        model, config, forward_flops = network(args, vocab_size, devices.dtype)
    if not args.dry_run:
        model = parallel.build(model, initial_rows(model, args), devices)
    encoder = model.encoder
    text_blocks = sum(p.numel() for p in model.text.model.layers.parameters())
    flops = {"encoder": 3 * forward_flops, "text": 6 * 24 * text_blocks}    # about 24 tokens

    # --------------------------------------------------------------------------------------------
    # Data
    # --------------------------------------------------------------------------------------------
    mixture = None if args.dry_run else data.Mixture(args.data, args.resolution, args.seed)
    count = {name: sum(p.numel() for p in net.parameters())
             for name, net in (("encoder", encoder), ("text", model.text), ("heads", model))}
    count["heads"] -= count["encoder"] + count["text"]
    start_table(f"train_encoder --arch {args.arch}", args, devices, count, flops,
                state_gb(sum(count.values()), 0, 0), arch=args.arch,
                data=args.data if args.dry_run else mixture.describe())
    if args.dry_run:
        return
    batch_of = functools.partial(collate, tokenizer=tokenizer,
                                 length=LENGTH if devices.kind == "xla" else None)
    unseen = data.Mixture(args.data, args.resolution, args.seed + 1000)
    unseen = parallel.to_device(batch_of([unseen[i] for i in range(256)]), devices)

    # --------------------------------------------------------------------------------------------
    # Optimizer and resume
    # --------------------------------------------------------------------------------------------
    named = {k: p for k, p in model.named_parameters()
             if not k.startswith("encoder.lin")}                        # LPIPS' weights stay 1/C
    optimizer = parallel.adamw(list(named.values()), devices, lr=args.lr, betas=(0.9, 0.95),
                               weight_decay=0.0)
    run.config, run.skips.records = config, mixture.records
    run.load(named, [optimizer])
    if run.main and not args.bench:
        write_text(run.dir / "tokenizer.json", tokenizer.to_str(pretty=True))
    batches = data.loader(mixture, batch_of, args.micro_batch, run.start * args.batch, args.workers,
                          devices.rank, devices.world)

    # --------------------------------------------------------------------------------------------
    # Loop: data, step, log, save
    # --------------------------------------------------------------------------------------------
    accumulate = args.batch // args.micro_batch
    plot = ["loss", "contrast", *["dense"] * (args.dense > 0), "retrieval", "probe_psnr"]
    for step in run.steps():
        factor = cosine(step, args.steps, args.warmup)
        set_lr([optimizer], factor, devices)
        for micro, batch in enumerate(run.micro_batches(batches)):
            images = batch["images"].float() / 255                          # [B,3,S,S]
            n = (step * accumulate + micro) * devices.world + devices.rank
            generator = data.rng(args.seed, "hidden patches", n)        # others in each process
            seen = images if args.arch == "vgg" else hide(images, args.patch, args.mask, generator)
            image, caption, mse, _ = model(images, seen, batch["ids"], batch["last"])
            contrast = sigmoid_loss(model.similarity(image, caption))
            loss = contrast + args.dense * mse
            (loss / accumulate).backward()
            run.meter.add(1 / accumulate, loss=loss, contrast=contrast, dense=mse)
        norm = parallel.clip_grad(named.values(), 1.0, devices)
        parallel.guarded_step(optimizer, norm, devices)
        optimizer.zero_grad(set_to_none=True)
        run.end_step(step + 1, norm, flops, plot, lambda _: evaluate(model, unseen),
                     lr=args.lr * factor)
    run.finish()
    if args.bench:
        return
    state = encoder.state_dict()
    if args.arch == "vit":
        state = {released_key(k): v for k, v in state.items()}
    run.export("model", state, config)
    folder, final = run.publish(), evaluate(model, unseen)
    if run.main:
        same = "" if mixture.endless() else " (images that were also trained on)"
        probe = "" if args.arch == "vgg" else (
            f", linear probe {final['probe_psnr']:.1f} dB, effective rank "
            f"{final['effective_rank']:.0f}")
        print(f"{folder}: retrieval among 256 {final['retrieval']:.1%}{same}{probe}")


if __name__ == "__main__":
    cli.main(main)
