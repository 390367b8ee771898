"""Train a small SigLIP-2 from scratch: the frozen encoder of the tiny preset, and a readable trainer.

    python train_encoder.py                       # built-in data, a few CPU minutes
    python train_encoder.py --data folder/ --steps 100000 --batch 256

Sigmoid image-text loss (SigLIP, arXiv 2303.15343) plus a dense term: from each latent token one
linear layer must predict the pixels of its own patch, also where the input patch was hidden. The
term stands in for SigLIP-2's captioning, self-distillation and masked prediction (arXiv 2502.14786):
without it a contrastive encoder throws pixels away and no decoder can bring them back.
"""
import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import encoder as encoders
import parallel
import run as runs
import text_model as text
import weights
from parallel import UserError

# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

TINY_DATA = ["builtin:web=3", "builtin:synthetic=2", "builtin:text=1"]


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    runs.add_flags(p, steps=3000, batch=64, data=TINY_DATA, log=20, sample=500, save=500)
    g = p.add_argument_group("model")
    g.add_argument("--arch", choices=["vit"], default="vit", help="vit: the encoder")
    g.add_argument("--width", type=runs.positive(), default=encoders.TINY["hidden_size"],
                   help="C, the channels of the latent")
    g.add_argument("--depth", type=runs.positive(), default=encoders.TINY["num_hidden_layers"])
    g.add_argument("--heads", type=runs.positive(), default=encoders.TINY["num_attention_heads"])
    g.add_argument("--resolution", type=runs.positive(), default=64)
    g.add_argument("--patch", type=runs.positive(), default=8)
    g.add_argument("--tokenizer", type=Path, help="a tokenizer folder (default: train one here)")
    g = p.add_argument_group("loss and optimizer")
    g.add_argument("--dense", type=runs.positive(float, zero=True), default=30.0,
                   help="weight of the pixel term (mean squared error, pixels in [-1,1])")
    g.add_argument("--mask", type=runs.positive(float, zero=True), default=0.1,
                   help="share of the patches hidden from the encoder (grey), for the dense term")
    g.add_argument("--lr", type=runs.positive(float), default=1.5e-3)
    g.add_argument("--warmup", type=runs.positive(zero=True), default=200, help="steps")
    args = p.parse_args()
    args.out = args.out or Path("runs/encoder-tiny")
    return args


# ------------------------------------------------------------------------------------------------
# Model: the encoder, a text tower, and the two heads of the losses
# ------------------------------------------------------------------------------------------------

class Trainee(nn.Module):
    """`encoder` is what the run is for; the rest exists only to train it."""

    def __init__(self, config, vocab_size, dtype):
        super().__init__()
        self.encoder = encoders.SigLIP2(config, dtype=dtype)
        C = self.encoder.channels
        self.text = text.TextModel(dict(text.TINY, vocab_size=vocab_size), dtype=dtype)
        self.text_projection = nn.Linear(self.text.width, C)
        self.pixels = nn.Linear(C, 3 * self.encoder.patch_size ** 2)    # the dense term's probe
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))   # SigLIP's t' and b
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images, seen, ids, last):
        """images [B,3,S,S], seen (same: some patches grey), ids [B,L], last [B] -> embeddings and
        the dense error: image [B,C], text [B,C], mse (pixels in [-1,1]), latent [B,N,C]."""
        x = self.encoder.blocks(seen)[-1].float()                           # [B,N,C]
        z = F.layer_norm(x, (self.encoder.channels,), eps=1e-6)             # the latent
        mse = (self.pixels(z) - patchify(images, self.encoder.patch_size)).square().mean()
        h = self.text(self.text.embed(ids))                                 # [B,L,W]
        h = h[torch.arange(len(ids), device=ids.device), last].float()      # [B,W], last token
        image = F.normalize(self.encoder.pool(x.to(self.encoder.dtype)).float(), dim=-1)
        return image, F.normalize(self.text_projection(h), dim=-1), mse, z

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
    keep = keep.repeat_interleave(p, 2).repeat_interleave(p, 3).to(images.device)
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


class Collate:
    """Records -> images uint8 [B,3,S,S], ids [B,L], last [B]; runs in the loader's worker."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pad = tokenizer.token_to_id("<|endoftext|>")

    def __call__(self, records):
        texts = [r["caption"] or r["conversations"][-1]["value"] for r in records]
        rows = [text.encode_text(self.tokenizer, t)[:63] + [self.pad] for t in texts]
        ids = torch.full((len(rows), max(map(len, rows))), self.pad)
        for row, i in zip(ids, rows):
            row[:len(i)] = torch.tensor(i)
        images = torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records])
        return {"images": images, "ids": ids, "last": torch.tensor([len(r) - 1 for r in rows]),
                "skipped": [s for r in records for s in r["skipped"]]}


def tokenizer_for(args):
    """The given tokenizer, or a BPE of 1,024 tokens trained on the built-in captions, questions."""
    if args.tokenizer:
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
    return dict(retrieval=hit.float().mean().item(), probe_psnr=-10 * math.log10(mse.item() / 4),
                effective_rank=effective_rank(z.cpu()))


def main():
    args = arguments()
    if args.resolution % args.patch:
        raise UserError(f"--resolution {args.resolution} is not a multiple of --patch {args.patch}")
    if args.width % args.heads:
        raise UserError(f"--width {args.width} is not a multiple of --heads {args.heads}")

    # --------------------------------------------------------------------------------------------
    # Devices
    # --------------------------------------------------------------------------------------------
    devices = parallel.setup(args.device, args.dtype, args.mesh)
    runs.check_batch(args, devices)

    # --------------------------------------------------------------------------------------------
    # Data
    # --------------------------------------------------------------------------------------------
    mixture = data.Mixture(args.data, args.resolution, args.seed)
    run = None if args.dry_run or args.bench else runs.Run(args, devices)
    kept = run and run.dir / "tokenizer.json"
    if kept and kept.is_file():
        tokenizer = text.load_tokenizer(run.dir)
    else:
        tokenizer = tokenizer_for(args)
        if kept and run.main:
            tokenizer.save(str(kept))
    collate = Collate(tokenizer)

    # --------------------------------------------------------------------------------------------
    # Model
    # --------------------------------------------------------------------------------------------
    config = dict(encoders.TINY, hidden_size=args.width, intermediate_size=4 * args.width,
                  num_hidden_layers=args.depth, num_attention_heads=args.heads,
                  image_size=args.resolution, patch_size=args.patch)
    model = Trainee(config, tokenizer.get_vocab_size(), devices.dtype)
    encoders.init_weights(model.encoder, args.seed)
    text.init_weights(model.text, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    for module in (model.text_projection, model.pixels):
        module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator) * 0.02)
        module.bias.data.zero_()
    if args.init:
        state, _ = weights.read_weights(args.init)
        weights.load_strict(model.encoder, state, f"--init {args.init}")
    model = parallel.shard(model, devices)

    e = model.encoder
    count = {name: sum(p.numel() for p in child.parameters())
             for name, child in (("encoder", e), ("text", model.text))}
    summary = dict(parameters=count, latent=[e.tokens, e.channels], images_per_step=args.batch,
                   device=str(devices), dtype=str(devices.dtype), data=mixture.describe())
    if args.dry_run and args.json:
        print(json.dumps(summary))
    elif devices.main:
        runs.table("train_encoder", [(k, v) for k, v in summary.items()])
    if args.dry_run:
        return

    # --------------------------------------------------------------------------------------------
    # Optimizer
    # --------------------------------------------------------------------------------------------
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=devices.kind != "xla")
    moments = runs.moments(optimizer, named)

    # --------------------------------------------------------------------------------------------
    # Resume
    # --------------------------------------------------------------------------------------------
    saved = {**named, **moments}
    if args.bench:
        args.steps, args.log_every = args.bench, 1
        run = runs.Bench(args, devices)
    run.load(saved)
    accumulate = args.batch // args.micro_batch
    batches = iter(data.loader(mixture, collate, args.micro_batch, run.start * args.batch, args.workers,
                               devices.rank, devices.world))
    unseen = data.Mixture(args.data, args.resolution, args.seed + 1000)
    unseen = parallel.place(collate([unseen[i] for i in range(256)]), devices)
    skips, meter = data.SkipCounter(), runs.Meter()
    N, C = e.tokens, e.channels
    block = 4 * C * C + 2 * N * C + 2 * C * 4 * C
    flops = 6 * (N * args.depth * block + 24 * sum(p.numel() for p in model.text.model.layers.parameters()))

    # --------------------------------------------------------------------------------------------
    # Loop: data, step, log, save
    # --------------------------------------------------------------------------------------------
    for step in run.progress(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * runs.cosine(step, args.steps, args.warmup)
        for micro in range(accumulate):
            t0 = time.perf_counter()
            batch = next(batches)
            wait = time.perf_counter() - t0
            skips.update(batch["skipped"], args.micro_batch)
            batch = parallel.place(batch, devices)
            images = batch["images"].float() / 255                          # [B,3,S,S]
            draw = torch.Generator().manual_seed(args.seed * 10 ** 9 + step * accumulate + micro)
            seen = hide(images, args.patch, args.mask, draw)
            image, caption, mse, _ = model(images, seen, batch["ids"], batch["last"])
            contrast = sigmoid_loss(model.similarity(image, caption))
            loss = contrast + args.dense * mse
            (loss / accumulate).backward()
            part = 1 / accumulate
            meter.add(args.micro_batch, wait, part, loss=loss * part, contrast=contrast * part,
                      dense=mse * part)
        norm = parallel.clip_grad(named.values(), 1.0)
        runs.check_finite(run, step, norm, optimizer)
        optimizer.zero_grad(set_to_none=True)
        parallel.step_done(devices)

        done = step + 1
        if run.due(done, args.log_every):
            values = meter.read(flops, devices)
            if run.due(done, args.sample_every):
                values.update(evaluate(model, unseen))
            run.log(done, lr=optimizer.param_groups[0]["lr"], **values)
        if run.due(done, args.sample_every):
            run.plot(["loss", "contrast", "dense", "retrieval", "probe_psnr"])
        if run.due(done, args.save_every):
            run.save(done, saved)
        if run.stop and done < args.steps:
            return run.say_how_to_resume(done)
    run.finish()
    run.export("model", e.state_dict(), e.config)
    final = evaluate(model, unseen)
    if devices.main:
        print(f"{run.dir}/final: retrieval among {len(unseen['ids'])} {final['retrieval']:.1%}, "
              f"linear probe {final['probe_psnr']:.1f} dB, effective rank {final['effective_rank']:.0f}")
    parallel.finish(devices)


if __name__ == "__main__":
    runs.main(main)
