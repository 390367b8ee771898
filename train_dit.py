"""Stage 2: train the DiT and the language model that conditions it.

    python train_dit.py                       # tiny, built-in data, 15 minutes on two cores
    python train_dit.py --size 2b --data shards/ --batch 2048
    python train_dit.py --init tiny --data photos/      # finetune on images of one's own

    z    = encoder(image)                                   frozen
    cond = Linear(LLM(chat(prompt), queries) at the queries)        [B,N,Z]
    x_t  = (1-t) z + t eps;   v = DiT(x_t, t, cond)
    loss = CE(text) + 2 mean((v - (eps - z))^2)             paper section 3.1, Table 8

To follow a step, read this file, flow.py and dit.py (and text_model.py for the LLM). recipe.py has
the flags and the paper's values.
"""
import functools
import math

import cli               # before torch: it sets how threads wait
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import chat
import data
import dit as dit_file
import flow
import networks
import parallel
import stage2
import text_model
import training
from checkpoint import Run
from cli import UserError
from dit import Linear
from prompts import sample_prompts
from recipe import MIXTURES, arguments, count_steps, fill_defaults
from vae import pack

PLOT = ["loss", "flow", "text", "repa", "cond_spread", "background_right", "colour_right"]

# ------------------------------------------------------------------------------------------------
# A batch: tokens, images, and every random number of the step
# ------------------------------------------------------------------------------------------------

class Collate:
    """Records -> one batch; runs in the loader's worker.

    images uint8 [B,3,S,S]; ids [B,L]; where, targets [B,K]: the positions with a text loss, and
    their next tokens; start [B]: the first position of the image; answer [B]: whether the image
    stands in the assistant's answer, so that it is to be generated. Drawn per image: normal [B]
    (for the time), drop [B], eps [B,N,C], with a VAE posterior [B,N,C]. counts: labelled tokens and
    images to generate. keys, rejected, skipped: names of records, for the log.
    """

    def __init__(self, tokenizer, tokens, channels, seed, cond_drop, length=None, posterior=False):
        self.tokenizer, self.tokens, self.channels = tokenizer, tokens, channels
        self.seed, self.cond_drop, self.posterior = seed, cond_drop, posterior
        # --length fixes all shapes: L = length, and K the most labels that fit beside an image
        self.limit, self.multiple = length or 1024, length or 64
        self.K = length and max(length - tokens, 1)

    def row(self, record):
        """Return a record's (ids, labels, start, answer), and why it is rejected, or "". A rejected
        record is replaced by one token without a loss."""
        ids, labels = chat.chat(self.tokenizer, record["conversations"])
        row = chat.insert_image_tokens(ids, labels, self.tokens)
        special = [s for s in chat.SPECIAL
                   if any(s in turn["value"] for turn in record["conversations"])]
        why = ""
        if special:
            why = f"its text holds {special[0]}, which the chat format uses"
        elif len(row[0]) > self.limit:                          # never cut through an image
            why = f"{len(row[0])} tokens, more than {self.limit} (--length)"
        if why:
            row = row[0][:1], [chat.IGNORE], None, False
        return row, why

    def __call__(self, records):
        rows, whys = zip(*map(self.row, records))
        pad = self.tokenizer.token_to_id("<|endoftext|>")
        ids, labels, start, answer = chat.pad_batch(rows, pad, self.multiple)
        where, targets = chat.labelled(labels, self.K)
        # one generator per sample, so that neither mesh nor micro-batch changes a draw
        generators = [data.rng(self.seed, "flow", r["n"]) for r in records]
        normal = lambda *shape: torch.from_numpy(
            np.stack([g.standard_normal(shape, np.float32) for g in generators]))
        batch = {
            "images": torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records]),
            **{k: torch.from_numpy(v) for k, v in dict(ids=ids, where=where, targets=targets,
                                                       start=start, answer=answer).items()},
            "normal": normal(),                         # for the time; the order of draws is fixed
            "drop": torch.tensor([g.random() < self.cond_drop for g in generators]),
            "eps": normal(self.tokens, self.channels),
            "counts": {"tokens": int((targets != chat.IGNORE).sum()),
                       "images_to_draw": int(answer.sum())},
            "keys": [r["key"] for r in records],
            "rejected": [(r["key"], why) for r, why in zip(records, whys) if why],
            "skipped": [s for r in records for s in r["skipped"]]}
        if self.posterior:                              # last, so that the other draws are the same
            batch["posterior"] = normal(self.tokens, self.channels)
        return batch


# ------------------------------------------------------------------------------------------------
# The model, and one step
# ------------------------------------------------------------------------------------------------

class ScaleRAE(nn.Module):
    """The two trained networks, and the losses of a batch.

    repa: number of the DiT block whose output a projector (three Linears, not exported) aligns with
    the frozen encoder's features of C' = `channels` (REPA, arXiv 2410.06940, equation 8); 0: none.
    REPA helps a VAE's latent, which lacks the semantics that the RAE's latent has by itself.
    """

    def __init__(self, llm, dit, alpha, repa=0, channels=0):
        super().__init__()
        self.llm, self.dit, self.alpha = llm, dit, alpha
        if repa:
            D, hidden = dit.config.width, min(2048, 4 * dit.config.width)   # 2048: REPA's
            self.repa = nn.Sequential(Linear(D, hidden), nn.SiLU(), Linear(hidden, hidden),
                                      nn.SiLU(), Linear(hidden, channels))
            dit.dit_blocks[repa - 1].register_forward_hook(self.keep_tokens)

    def keep_tokens(self, block, inputs, tokens):
        self.tapped = tokens                                                # [B,N,D]

    def forward(self, z, u, batch, has_targets=True):
        """Latents z [B,N,C], features u [B,N,C'] that the LLM reads (z itself, but for a VAE) and a
        batch of `Collate` -> text loss, summed over the labelled tokens; flow loss and REPA's per
        image [B], zero where the image is not to be generated; cond [B,N,Z].

        Images in questions pass through the DiT too and count zero: one graph for every batch.
        has_targets: whether the whole batch has any image to generate; if not, the DiT is left out.
        """
        h = self.llm(self.llm.embed(batch["ids"], batch["start"], batch["answer"], u))  # [B,L,H]
        text_loss = self.llm.text_loss(h, batch["where"], batch["targets"])
        t = flow.sample_time(batch["normal"], self.alpha)                   # [B]
        if not has_targets:
            return text_loss, torch.zeros_like(t), torch.zeros_like(t), None
        cond = self.llm.condition(h, batch["start"])                        # [B,N,Z]
        dropped = cond
        if self.dit.config.null:
            dropped = torch.where(batch["drop"][:, None, None], self.dit.null_condition(), cond)
        x_t = flow.interpolate(z, batch["eps"], t)                          # [B,N,C]
        v = self.dit(x_t, t, dropped)                                       # [B,N,C]
        answer = batch["answer"].float()
        flow_loss = flow.flow_loss(v, z, batch["eps"]) * answer             # [B]
        repa_loss = torch.zeros_like(t)
        if hasattr(self, "repa"):
            y = self.repa(self.tapped).float()                              # [B,N,C']
            repa_loss = (1 - F.cosine_similarity(y, u, dim=-1).mean(1)) * answer
        return text_loss, flow_loss, repa_loss, cond.detach()           # cond: for the log alone


def build(config, args, dtype):
    """Build ScaleRAE from its config; under torch.device("meta") its shapes alone. Raises UserError
    for a DiT that is too narrow."""
    if config.dit.width <= config.dit.channels and not args.allow_narrow:
        raise UserError(f"the DiT's width {config.dit.width} is not above the latent's "
                        f"{config.dit.channels} channels. Noise fills all dimensions of a token, "
                        "so a narrower DiT cannot even copy it (paper, appendix B). Take a larger "
                        "--size or --width, or override with --allow-narrow")
    llm, dit = stage2.build_stage2(config, dtype)
    llm.remat = dit.remat = args.remat == "block"
    if args.freeze:
        llm.requires_grad_(False)
        for p in (llm.model.latent_queries, *llm.diff_head_projector.parameters()):
            p.requires_grad_(True)
    return ScaleRAE(llm, dit, config.alpha, args.repa, config.image_channels)


def initial(name, shape, seed):
    """Return the initial value of a parameter of ScaleRAE (REPA's projector as the DiT's)."""
    part, key = name.split(".", 1)
    return (text_model if part == "llm" else dit_file).initial(key, shape, seed)


@torch.no_grad()
def encode(encoder, vae, batch):
    """Return a batch's latents z [B,N,C] and the features u [B,N,C'] that the LLM reads. They are
    the same, but for a VAE: its latent says little about the content, so the encoder gives u."""
    x = batch["images"].float() / 255                                   # [B,3,S,S]
    u = encoder(x)                                                      # [B,N,C']
    if not vae:
        return u, u
    mean, logvar = map(pack, vae.posterior(x))                          # [B,N,C]
    z = mean + (0.5 * logvar).exp() * batch["posterior"]
    return (z - vae.shift) * vae.scale, u


def train_step(model, encode_batch, batches, trained, ema_weight, args, devices):
    """Make one update from micro-batches on the devices. With AdamW the host waits for no device.

    encode_batch(batch) -> z, u. batches: of Run.micro_batches, which adds the counts of the whole
    batch: "totals", and "tokens" and "images_to_draw", which are divided by the number of replicas,
    because their gradients are averaged. trained: (parameters by name, optimizers, averages by
    name). ema_weight: 1 - decay. Returns the values to log {name: tensor} and the gradient's norm.
    """
    named, optimizers, ema = trained
    values, cond_sums = {}, 0
    for batch in batches:
        has_targets = batch["totals"]["images_to_draw"] > 0
        z, u = encode_batch(batch)                                      # [B,N,C], [B,N,C']
        text, flow_losses, repa, cond = model(z, u, batch, has_targets)
        # sums over this micro-batch, divided by the whole batch's counts: they add up to its means
        losses = dict(text=text / batch["tokens"])
        loss = losses["text"]
        if has_targets:
            losses["flow"] = flow_losses.sum() / batch["images_to_draw"]
            loss = loss + args.diffusion_weight * losses["flow"]
            cond_sums = cond_sums + training.condition_sums(cond, batch["answer"])
        if has_targets and args.repa:
            losses["repa"] = repa.sum() / batch["images_to_draw"]
            loss = loss + args.diffusion_weight * args.repa_weight * losses["repa"]
        loss.backward()
        losses["loss"] = loss
        values = {k: values.get(k, 0) + v.detach() for k, v in losses.items()}
    if has_targets:
        spread = training.condition_spread(parallel.average(cond_sums, devices))
        values["cond_spread"] = spread
    else:       # the queries' gradient is zero, not None: AdamW's momentum would still move them
        model.llm.model.latent_queries.grad = None
    grad_norm = parallel.clip_grad(named.values(), args.clip, devices)
    for optimizer in optimizers:
        parallel.guarded_step(optimizer, grad_norm, devices)
        optimizer.zero_grad(set_to_none=True)
    training.update_ema(ema, named, ema_weight)
    return values, grad_norm


def optimizers_for(named, args, devices):
    """Return the optimizers of the trainable parameters: AdamW with two groups, the DiT with its
    projector and everything else; with --optimizer muon Muon for the DiT's matrices."""
    of_llm = {k for k in named if k.startswith("llm.") and "diff_head" not in k}
    muon = {k for k, p in named.items() if args.optimizer == "muon" and p.dim() == 2
            and k.startswith("dit.dit_blocks.")}
    of_dit = named.keys() - of_llm - muon
    groups = [dict(params=[p for k, p in named.items() if k in names], lr=lr, betas=betas)
              for names, lr, betas in ((of_dit, args.lr, args.betas),
                                       (of_llm, args.lr_llm, args.betas_llm))]
    optimizers = [parallel.adamw(groups, devices, eps=1e-8, weight_decay=0.0)]
    if args.optimizer == "muon":
        optimizers.append(torch.optim.Muon([p for k, p in named.items() if k in muon], lr=args.lr,
                                           weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def main():
    args = arguments()

    # --------------------------------------------------------------------------------------------
    # Devices
    # --------------------------------------------------------------------------------------------
    devices = parallel.setup(args.device, args.dtype, args.mesh, args.dry_run)
    if args.scan and devices.target != "xla":
        raise UserError(f"--scan is for --device xla, not {devices.target}; leave it out")
    if args.optimizer == "muon" and devices.target == "xla":    # stacked biases are matrices there
        raise UserError("--optimizer muon: not on xla; use adamw")
    init, config = stage2.open_init(args)
    fill_defaults(args, config)
    training.check_batch(args, devices, None if args.size == "tiny" else 8)   # 8 per device

    # --------------------------------------------------------------------------------------------
    # Models: the frozen encoder (and decoder, to look at samples), the LLM, the DiT
    # --------------------------------------------------------------------------------------------
    encoder, vae, decoder, tokenizer, files = networks.frozen_networks(args, init, devices)
    config = (stage2.finetuned_config(args, config) if config else
              stage2.new_config(args, encoder, vae, tokenizer, files))
    N, C = config.dit.tokens, config.dit.channels
    with torch.device("meta"):
        model = build(config, args, devices.dtype)
    llm, dit = model.llm, model.dit

    # --------------------------------------------------------------------------------------------
    # Data
    # --------------------------------------------------------------------------------------------
    resolution = encoder.grid * vae.stride if vae else encoder.image_size
    mixture, sources, records = training.open_data(args, resolution, vae or encoder, encoder.crop,
                                                   MIXTURES["tiny"])
    args.steps = count_steps(args, records)
    if devices.target == "xla" and args.length is None: # another length is another program there
        args.length = 128 if args.size == "tiny" else 512
    collate = Collate(tokenizer, N, C, args.seed, args.cond_drop, args.length, vae is not None)
    first = collate([mixture[i] for i in range(16)])
    if not first["counts"]["tokens"]:
        length = f" with --length {args.length}" if args.length else ""
        raise UserError(f"--data{length}: none of the first 16 samples can be used, such as "
                        f"{': '.join(first['rejected'][-1])}")
    prompts = sample_prompts(args.sample_prompts, mixture,
                             stage2.Stage2(llm, dit, tokenizer, config))
    toy = args.size == "tiny" and not mixture.records   # then shapes can be judged

    count, flops, memory = training.costs(model, encoder, vae, first, args, devices)
    trained, frozen = training.trained_and_frozen(model, count)
    training.start_table(
        f"train_dit --size {args.size}", args, devices, count, flops, memory, latent=[N, C],
        alpha=config.alpha, steps=args.steps, epochs=records and args.steps * args.batch / records,
        learning_rates=dict(dit=args.lr, llm=args.lr_llm), run=args.out,
        trained=trained, frozen=frozen, files=files, data=sources, sample_prompts=len(prompts))
    if args.dry_run:
        return
    run = Run(args, devices, stage2.save_config(config), free={"micro_batch"})

    # --------------------------------------------------------------------------------------------
    # The trained networks get their weights
    # --------------------------------------------------------------------------------------------
    rows = stage2.initial_rows(model, initial, args, init, files, tokenizer)
    blocks = [*llm.model.layers, *dit.dit_blocks]
    parallel.compile_blocks(blocks, args.compile, devices)
    if devices.kind == "xla" and args.scan is not False:
        stacks = [llm, encoder] if args.repa else [llm, encoder, dit]   # REPA taps one block
        parallel.use_scan(devices, *stacks)
    parallel.build(model, rows, devices, blocks)

    # --------------------------------------------------------------------------------------------
    # Optimizers
    # --------------------------------------------------------------------------------------------
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizers = optimizers_for(named, args, devices)
    ema = training.start_ema(named, devices) if args.ema else {}
    warmup = math.ceil(args.warmup * args.steps)

    # --------------------------------------------------------------------------------------------
    # Resume
    # --------------------------------------------------------------------------------------------
    run.skips.records = mixture.records
    saved = {k: v for k, v in model.state_dict(keep_vars=True).items()      # buffers too
             if not any(part in k for part in stage2.RECOMPUTED)}
    run.load({**saved, **{f"ema.{k}": v for k, v in ema.items()}}, optimizers)
    if run.main and not args.bench:
        chat.save_tokenizer(tokenizer, run.dir)         # so that a checkpoint is a model
    if args.overfit:
        mixture = training.FirstBatch(mixture, args.batch, args.overfit)
    loader = data.loader(mixture, collate, args.micro_batch, run.start * args.batch, args.workers,
                         devices.rank, devices.world)

    def draw(prompts, seed, bar=None):
        """Draw prompts by the averaged weights -> images [P,3,S,S]."""
        with training.with_ema(named, ema):
            return stage2.draw(model, tokenizer, vae.decode if vae else decoder, prompts, seed,
                               args, devices, bar)

    def sample(done):
        """Draw the prompts into samples/; on toy data: count right colours for the log."""
        images = draw(prompts, 0)
        if run.main:
            with run.surviving("the samples"):
                path = run.dir / "samples" / f"step-{done:07d}.png"
                training.save_captioned(images, prompts, path)
        return training.check_colours(draw, args.seed, 32) if toy and done < args.steps else {}

    # --------------------------------------------------------------------------------------------
    # Loop: data, step, log, sample, save
    # --------------------------------------------------------------------------------------------
    can_draw = prompts and (decoder or vae) and not args.random_init
    encode_batch = functools.partial(encode, encoder, vae)
    for step in run.steps():
        factor = training.cosine(step, args.steps, warmup)
        training.set_lr(optimizers, factor, devices)
        values, grad_norm = train_step(
            model, encode_batch, run.micro_batches(loader), (named, optimizers, ema),
            parallel.scalar(training.ema_weight(args.ema, step), devices.device), args, devices)
        images = run.totals["images_to_draw"]
        # The spread of one image is not logged. train_step computes it all the same, because other
        # outputs would be another program on xla.
        logged = {k: v for k, v in values.items() if images != 1 or k != "cond_spread"}
        run.meter.add(**logged)
        work = {k: v for k, v in flops.items() if images or k not in ("dit", "repa")}
        run.end_step(step + 1, grad_norm, work, PLOT, can_draw and sample, lr=args.lr * factor,
                     lr_llm=args.lr_llm * factor, grad_norm=grad_norm)
    run.finish()
    if args.bench:
        return
    stage2.export(run, model, named, ema, tokenizer)
    if toy and not args.init_only:
        training.report_colours(draw, args, devices)


if __name__ == "__main__":
    cli.main(main)
