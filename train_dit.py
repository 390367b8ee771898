"""Stage 2: train the DiT and the language model that conditions it. The main job.

    python train_dit.py                       # tiny, built-in data, 15 CPU minutes
    python train_dit.py --size 2b --data shards/ --batch 2048
    python train_dit.py --init tiny --data photos/      # finetune on images of one's own

    z    = encoder(image)                                   frozen
    cond = Linear(LLM(chat(prompt), queries) at the queries)        [B,N,Z]
    x_t  = (1-t) z + t eps;   v = DiT(x_t, t, cond)
    loss = CE(text) + 2 |v - (eps - z)|^2                   paper section 3.1, Table 8

Three files follow a step: this one, flow.py and dit.py (and text_model.py for the LLM).
"""
import argparse
import functools
import math
import sys
from pathlib import Path

import cli               # before torch: it sets how threads wait
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import chat
import data
import dit as dit_file
import flow
import parallel
import stage2
import text_model
import training
from checkpoint import Run
from cli import UserError
from dit import SIZES, Linear
from prompts import sample_prompts
from vae import pack

# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

# The paper's pretraining mixture, in millions: web, FLUX-generated, questions (Cambrian-7M). `hq`
# is for finetuning, as BLIP3o-60k is, and `text` for the decoder. tiny learns shapes before emoji.
MIXTURES = {"tiny": ["builtin:synthetic=6", "builtin:web=2", "builtin:qa=1"],
            "paper": ["builtin:web=39.3", "builtin:synthetic=24.7", "builtin:qa=7"]}
PLOT = ["loss", "flow", "text", "repa", "cond_spread", "background_right", "colour_right"]

# The paper's values (Table 8; the weight 2 of the flow loss is the authors' code's, the EMA ours).
# tiny differs where its size asks for it. shift_base: 64 tokens of 96 channels give a =
# sqrt(64*96/128) = 6.9, near the paper's 8.49. With 4096 it would be 1.2, x_t alone would give the
# answer away at nearly every t, and the model would ignore the caption.
DEFAULTS = {
    "tiny": dict(steps=1800, batch=32, lr=1.5e-3, lr_llm=1e-3, warmup=0.03, ema=0.998,
                 remat="none", shift_base=128.0, log_every=20, sample_every=300, save_every=300),
    "paper": dict(steps=30_000, batch=2048, lr=5e-4, lr_llm=5e-5, warmup=0.0134, ema=0.9999,
                  remat="block", shift_base=4096.0, log_every=10, sample_every=1000,
                  save_every=1000),
}
# With --init: the paper's rates and batch for BLIP3o-60k; tiny's were chosen on 40 images. Without
# --steps and --epochs, finite data are passed FINETUNE_EPOCHS times, in at least FINETUNE_STEPS.
FINETUNE = {
    "tiny": dict(lr=3e-4, lr_llm=2e-4, warmup=0.1, sample_every=100, save_every=100),
    "paper": dict(lr=5.66e-4, lr_llm=5.66e-5, warmup=0.03, batch=1024),
}
FINETUNE_EPOCHS, FINETUNE_STEPS = 4, 300


def dit_size(text):
    """Argparse type: a row of the size table, by our name or the paper's."""
    name = dit_file.PAPER_NAMES.get(text.upper(), text.lower())
    if name not in SIZES:
        raise argparse.ArgumentTypeError(f"known sizes are {', '.join(SIZES)} (or the paper's "
                                         f"{', '.join(dit_file.PAPER_NAMES)})")
    return name


def shift(text):
    """Argparse type: auto, none, or a positive number."""
    return text if text == "auto" else 1.0 if text == "none" else cli.positive(float)(text)


def arguments():
    """Read the flags. The rest follows from --size."""
    p = cli.Parser(description=__doc__.split("\n")[0], epilog="All defaults follow from --size.")
    positive, whole = cli.positive(float), cli.positive()
    cli.training_flags(p, steps=None, batch=None, data=None, log=None, sample=None, save=None,
                       remat=None)
    a = p.add_argument_group("finetuning and checks").add_argument
    a("--epochs", type=positive, help="passes over finite --data, instead of --steps")
    a("--init-only", action="store_true", help="write the initial weights as final/ and stop")
    a("--overfit", choices=["same", "fresh"], nargs="?", const="same", help="train on the first "
      "batch alone, with the same or fresh noise: a check (--batch 4 --steps 60 --lr 3e-3 "
      "--lr-llm 3e-3: tiny's loss falls from 11 to below 0.1)")
    a = p.add_argument_group("model").add_argument
    a("--size", type=dit_size, metavar="|".join(SIZES), help="of the DiT (default: tiny); the "
      "paper's spellings (2.4B, 9.8B, ...) work too")
    for flag in ("width", "depth", "heads", "llm-width", "llm-depth"):
        a(f"--{flag}", type=whole, help="instead of the size's own")
    a("--latent", choices=["siglip2", "webssl", "vae"], help="default: siglip2; vae: the baseline, "
      "FLUX's latent, where siglip2 stays for understanding")
    a("--encoder", help="file, folder or hub id of the frozen encoder")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--decoder", help="file, folder or hub id of the decoder (for sample grids)")
    g.add_argument("--vae", help="file, folder, run or hub id of the VAE of --latent vae")
    a("--llm", help="Qwen2.5 folder or hub id; tiny: a folder with a tokenizer; random: random "
      "weights, for timing")
    a("--length", type=whole, help="pad every sample to this many tokens and skip longer ones "
      "(default: xla 512, tiny 128; elsewhere as long as the batch)")
    a("--random-init", action="store_true",
      help="random LLM and encoder of the published shapes: for timing only")
    a("--freeze", choices=["llm"], help="train only the DiT, its projector and the queries (the "
      "paper's DiT-only finetuning)")
    a("--head-width", type=whole, help="DiT-DH: width of the wide head (2688)")
    a("--head-depth", type=whole, help="DiT-DH: blocks of the wide head (2)")
    a("--qk-norm", action="store_true", default=None, help="RMSNorm on queries and keys")
    a("--predict", choices=["v", "x"], help="what the DiT's last layer gives: the velocity "
      "(default), or the clean latent (JiT), with the same loss on the velocity")
    a("--allow-narrow", action="store_true", help="allow a width that is not above the latent's C")
    a("--scan", action=argparse.BooleanOptionalAction,
      help="xla: stacks of blocks as compiled loops, with --remat block (default: on)")
    a = p.add_argument_group("flow and loss").add_argument
    a("--shift", type=shift, help="auto: sqrt(N C / base) (default without --init); none: 1; or a "
      "number")
    a("--shift-base", type=positive, help="4096; tiny: 128")
    a("--diffusion-weight", type=cli.positive(float, zero=True), default=2.0,
      help="weight of the flow loss")
    a("--cond-drop", type=cli.share, default=0.1,
      help="share of the images that train the null condition")
    a("--repa", type=whole, default=0, metavar="LAYER",
      help="align the tokens after this DiT block with the encoder's features (REPA)")
    a("--repa-weight", type=positive, default=0.5, help="weight of REPA, relative to the flow loss")
    a = p.add_argument_group("optimizer").add_argument
    a("--optimizer", choices=["adamw", "muon"], default="adamw",
      help="muon: for the DiT's matrices, where torch has it; AdamW for everything else")
    a("--lr", type=positive, help="learning rate of the DiT and its projector")
    a("--lr-llm", type=positive, help="learning rate of the LLM, queries and mm_projector")
    a("--warmup", type=cli.share, help="share of the steps")
    a("--betas", type=cli.share, nargs=2, default=[0.9, 0.95], help="of the DiT's group")
    a("--betas-llm", type=cli.share, nargs=2, default=[0.9, 0.999], help="of the LLM's group")
    a("--clip", type=positive, default=1.0, help="largest norm of the whole gradient")
    a("--ema", type=cli.share, help="decay of the average of the weights; 0: off")
    a = p.add_argument_group("samples").add_argument
    a("--guidance", type=cli.positive(float, zero=True),
      help="1: off (default with --cond-drop 0); else 3")
    a("--sample-steps", type=whole, default=25, help="Euler steps")
    a("--sample-prompts", type=Path, metavar="FILE", help="prompts to draw: a text file with one "
      "per line, a .jsonl or a folder of .txt (default: captions of the data)")
    args = p.parse_args()
    if args.epochs and args.steps:
        p.error("--epochs and --steps exclude each other")
    if args.init and (args.llm or args.random_init):
        p.error("--llm and --random-init do not go with --init, whose model has its own LLM")
    if bool(args.head_width) != bool(args.head_depth):
        p.error("--head-width and --head-depth go together (the paper's are 2688 and 2)")
    if args.random_init and args.size in (None, "tiny"):
        p.error("--random-init is for the sizes from 0.5b on; tiny needs no download")
    return args


def fill_defaults(args, config):
    """Fill the flags that follow from --size, or from the config of --init's model."""
    args.size, args.latent = args.size or "tiny", args.latent or "siglip2"
    recipe = "tiny" if args.size == "tiny" else "paper"
    if not (recipe == "tiny" or args.data or args.dry_run or args.bench):
        print(f"WARNING: no --data: --size {args.size} trains on the toy world of shapes and "
              "emoji, which is for tests; give --data your own images", file=sys.stderr)
    defaults = {**DEFAULTS[recipe], "data": MIXTURES[recipe]}
    args.out = args.out or Path(f"runs/dit-{args.size}{'-finetuned' if config else ''}")
    if args.init_only:
        args.steps = 0
    if config or args.epochs:                           # then `count_steps` fills --steps
        defaults.update(FINETUNE[recipe] if config else {}, steps=args.steps)
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    stage2.choose_networks(args, config)
    if config:
        args.cond_drop *= config.dit.null
    else:
        args.shift = args.shift or "auto"
    depth = config.dit.depth if config else args.depth or SIZES[args.size].depth
    if args.repa > depth:
        raise UserError(f"--repa {args.repa}: the DiT has {depth} blocks")
    if args.guidance is None:
        args.guidance = 3.0 if args.cond_drop else 1.0
    if args.guidance != 1 and not args.cond_drop:
        raise UserError(f"--guidance {args.guidance:g} with --cond-drop 0: no null condition is "
                        "trained to guide away from; use --guidance 1")


def count_steps(args, records):
    """Return the number of steps on `records` records (None: endless)."""
    if args.steps is not None:
        return args.steps
    if args.epochs:
        return math.ceil(args.epochs * records / args.batch)
    if records:
        return max(FINETUNE_STEPS, math.ceil(FINETUNE_EPOCHS * records / args.batch))
    return DEFAULTS["tiny" if args.size == "tiny" else "paper"]["steps"]


# ------------------------------------------------------------------------------------------------
# A batch: tokens, images, and every random number of the step
# ------------------------------------------------------------------------------------------------

class Collate:
    """Records -> one batch; runs in the loader's worker.

    images uint8 [B,3,S,S]; ids [B,L]; where, targets [B,K]: the positions with a text loss, and
    their tokens; start, answer [B]; and drawn per image: normal [B] (for the time), eps [B,N,C],
    drop [B], for a VAE posterior [B,N,C]. counts: labelled tokens and images to generate.
    """

    def __init__(self, tokenizer, tokens, channels, seed, cond_drop, length=None, posterior=False):
        self.tokenizer, self.tokens, self.channels = tokenizer, tokens, channels
        self.seed, self.cond_drop, self.posterior = seed, cond_drop, posterior
        self.limit, self.multiple = length or 1024, length or 64    # length: the same for all
        self.labelled = length and max(length - tokens, 1)      # image positions have no label

    def row(self, record):
        """Return a record's (ids, labels, start, answer), and why it is rejected, or ""."""
        ids, labels = chat.chat(self.tokenizer, record["conversations"])
        row = chat.insert_image_tokens(ids, labels, self.tokens)
        special = [s for s in chat.SPECIAL
                   if any(s in turn["value"] for turn in record["conversations"])]
        why = (f"its text holds {special[0]}, which the chat format uses" if special else
               f"{len(row[0])} tokens, more than {self.limit} (--length)"
               if len(row[0]) > self.limit else "")             # never cut through an image
        return (row if not why else (row[0][:1], [chat.IGNORE], None, False)), why

    def __call__(self, records):
        rows, whys = zip(*map(self.row, records))
        pad = self.tokenizer.token_to_id("<|endoftext|>")
        ids, labels, start, answer = chat.pad_batch(rows, pad, self.multiple)
        where, targets = chat.labelled(labels, self.labelled)
        draws = [data.rng(self.seed, "flow", r["n"]) for r in records]  # one per sample: neither
        shape = (self.tokens, self.channels)            # mesh nor micro-batch changes a draw
        normal = lambda *shape: torch.from_numpy(
            np.stack([g.standard_normal(shape, np.float32) for g in draws]))
        batch = {
            "images": torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records]),
            **{k: torch.from_numpy(v) for k, v in dict(ids=ids, where=where, targets=targets,
                                                       start=start, answer=answer).items()},
            "normal": normal(),                         # for the time
            "drop": torch.tensor([g.random() < self.cond_drop for g in draws]),
            "eps": normal(*shape),
            "counts": {"tokens": int((targets != chat.IGNORE).sum()),
                       "images_to_draw": int(answer.sum())},
            "keys": [r["key"] for r in records],
            "rejected": [(r["key"], why) for r, why in zip(records, whys) if why],
            "skipped": [s for r in records for s in r["skipped"]]}
        if self.posterior:                              # last, so that the other draws are the same
            batch["posterior"] = normal(*shape)
        return batch


# ------------------------------------------------------------------------------------------------
# The model and its losses
# ------------------------------------------------------------------------------------------------

class ScaleRAE(nn.Module):
    """The two networks that are trained, and the losses of a batch.

    repa: a DiT block whose tokens a projector (three Linears, left out of exports) aligns with the
    frozen encoder's features (REPA, arXiv 2410.06940, equation 8). It gives a VAE's latent the
    semantics that the RAE's has by itself; there it aligns with the clean latent.
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
        """Latents z [B,N,C], what the LLM sees of the images u [B,N,C'] (the same, but for a VAE)
        and a batch of `Collate` -> text loss, summed over the labelled tokens; flow loss and REPA's
        per image [B], zero where the image is not to be generated; times t [B]; cond [B,N,Z].

        Images in questions pass through the DiT too and count zero: one graph for every batch.
        has_targets False: the whole batch asks, so the DiT is left out.
        """
        h = self.llm(self.llm.embed(batch["ids"], batch["start"], batch["answer"], u))  # [B,L,H]
        text_loss = self.llm.text_loss(h, batch["where"], batch["targets"])
        t = flow.sample_time(batch["normal"], self.alpha)                   # [B]
        if not has_targets:
            return text_loss, torch.zeros_like(t), torch.zeros_like(t), t, None
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
        return text_loss, flow_loss, repa_loss, t, cond


# ------------------------------------------------------------------------------------------------
# The trained networks and their initial values
# ------------------------------------------------------------------------------------------------

def build(config, args, dtype):
    """Build ScaleRAE from its config; under torch.device("meta") its shapes alone."""
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
    """Return a batch's latents z [B,N,C], and what the LLM sees of its images u [B,N,C']: the same,
    or with a VAE, whose latent says little of what is in the image, the encoder's."""
    x = batch["images"].float() / 255                                   # [B,3,S,S]
    u = encoder(x)                                                      # [B,N,C']
    if not vae:
        return u, u
    mean, logvar = map(pack, vae.posterior(x))                          # [B,N,C]
    z = mean + (0.5 * logvar).exp() * batch["posterior"]
    return (z - vae.shift) * vae.scale, u


def train_step(model, encode, batches, trained, ema_weight, args, devices):
    """Make one update from micro-batches on the devices; the host waits for no device in it.

    encode(batch) -> z, u; trained: (parameters by name, optimizers, averages by name). Returns the
    values to log {name: tensor}, the flow losses by time [10,2] and the gradient's norm.
    """
    named, optimizers, ema = trained
    values, by_time, cond_sums = {}, 0, 0
    for batch in batches:
        has_targets = batch["totals"]["images_to_draw"] > 0
        z, u = encode(batch)                                            # [B,N,C], [B,N,C']
        text, flow_losses, repa, t, cond = model(z, u, batch, has_targets)
        # sums over this micro-batch, divided by numbers of the whole batch: together its means
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
        by_time = by_time + training.flow_by_time(t, flow_losses, batch["answer"])
    if has_targets:
        spread = training.condition_spread(parallel.average(cond_sums, devices))
        values["cond_spread"] = spread
    else:                               # zeros, with which AdamW would still follow its momentum
        named["llm.model.latent_queries"].grad = None
    grad_norm = parallel.clip_grad(named.values(), args.clip, devices)
    for optimizer in optimizers:
        parallel.guarded_step(optimizer, grad_norm, devices)
        optimizer.zero_grad(set_to_none=True)
    training.update_ema(ema, named, ema_weight)
    return values, by_time, grad_norm


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
    found = [parallel.adamw(groups, devices, eps=1e-8, weight_decay=0.0)]
    if args.optimizer == "muon":
        found.append(torch.optim.Muon([p for k, p in named.items() if k in muon], lr=args.lr,
                                      weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return found


def main():
    args = arguments()

    # --------------------------------------------------------------------------------------------
    # Devices
    # --------------------------------------------------------------------------------------------
    devices = parallel.setup(args.device, args.dtype, args.mesh, args.dry_run)
    if args.scan and devices.target != "xla":
        raise UserError(f"--scan is for --device xla, not {devices.target}; leave it out")
    init, config = stage2.open_init(args)
    fill_defaults(args, config)
    training.check_batch(args, devices, None if args.size == "tiny" else 8)   # 8 images a device

    # --------------------------------------------------------------------------------------------
    # Models: the frozen encoder (and decoder, to look at samples), the LLM, the DiT
    # --------------------------------------------------------------------------------------------
    encoder, vae, decoder, tokenizer, files = stage2.frozen_networks(args, init, devices)
    config = (stage2.finetuned_config(args, config) if config else
              stage2.new_config(args, encoder, vae, tokenizer))
    N, C = config.dit.tokens, config.dit.channels
    if config.dit.width <= C and not args.allow_narrow:
        raise UserError(f"the DiT's width {config.dit.width} is not above the latent's {C} "
                        "channels. Noise fills all C dimensions of a token, so a narrower DiT "
                        "cannot even copy it (paper, appendix B). Take a larger --size or --width, "
                        "or override with --allow-narrow")
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
        raise UserError(f"--length {args.length}: none of the first 16 samples fits, such as "
                        f"{': '.join(first['rejected'][-1])}")
    prompts = sample_prompts(args.sample_prompts, mixture, collate)
    toy = args.size == "tiny" and not mixture.records   # then shapes can be judged

    count, flops, memory = stage2.costs(model, encoder, vae, first, args, devices)
    training.start_table(
        f"train_dit --size {args.size}", args, devices, count, flops, memory, latent=[N, C],
        alpha=config.alpha, steps=args.steps, epochs=records and args.steps * args.batch / records,
        learning_rates=dict(dit=args.lr, llm=args.lr_llm), run=args.out,
        trained=f"DiT, its projector, queries{'' if args.freeze else ', LLM, mm_projector'}",
        frozen=f"encoder{', VAE' if vae else ''}{', LLM, mm_projector' if args.freeze else ''}",
        files=files, data=sources)
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
        parallel.use_scan(devices, llm, encoder, *[dit] * (not args.repa))  # REPA taps one block
    parallel.build(model, rows, devices, blocks)

    # --------------------------------------------------------------------------------------------
    # Optimizers
    # --------------------------------------------------------------------------------------------
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizers = optimizers_for(named, args, devices)
    ema = training.averages(named, devices) if args.ema else {}
    warmup = math.ceil(args.warmup * args.steps)

    # --------------------------------------------------------------------------------------------
    # Resume
    # --------------------------------------------------------------------------------------------
    run.skips.records = mixture.records
    run.load({**dict(model.named_parameters()), **{f"ema.{k}": v for k, v in ema.items()}},
             optimizers)
    if run.main and not args.bench:
        chat.save_tokenizer(tokenizer, run.dir)         # so that a checkpoint is a model
    if args.overfit:
        mixture = training.FirstBatch(mixture, args.batch, args.overfit)
    loader = data.loader(mixture, collate, args.micro_batch, run.start * args.batch, args.workers,
                         devices.rank, devices.world)

    @torch.no_grad()
    def draw(prompts, seed, bar=None):
        """Return images [P,3,S,S] of prompts by the averaged weights. The seed fixes the noise.
        bar: the title of a progress bar."""
        steps = tqdm(total=args.sample_steps, desc=bar, disable=not (bar and run.main), ncols=80)

        def on_step():
            parallel.step_done(devices)
            steps.update()
        with training.averaged(named, ema), parallel.unsharded(model), steps:
            noise = torch.stack([flow.noise_for(prompt, seed, N, C) for prompt in prompts])
            cond = text_model.direct_condition(llm, tokenizer, prompts, devices.device)
            parallel.step_done(devices)
            z = flow.sample(dit, cond, noise.to(devices.device), config.alpha, args.sample_steps,
                            args.guidance, on_step=on_step)
        return parallel.full_tensor(vae.decode(z) if vae else decoder(z))   # by every process

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
    latents = functools.partial(encode, encoder, vae)
    for step in run.steps():
        factor = training.cosine(step, args.steps, warmup)
        training.set_lr(optimizers, factor, devices)
        values, by_time, grad_norm = train_step(
            model, latents, run.micro_batches(loader), (named, optimizers, ema),
            parallel.scalar(training.ema_weight(args.ema, step), devices.device), args, devices)
        images = run.totals["images_to_draw"]
        logged = {k: v for k, v in values.items()       # one image has no spread; `values` keeps
                  if images != 1 or k != "cond_spread"}     # it: on xla another output would be
        run.meter.add(flow_by_t=by_time, **logged)          # another program
        work = {k: v for k, v in flops.items() if images or k not in ("dit", "repa")}
        run.end_step(step + 1, grad_norm, work, PLOT, can_draw and sample, lr=args.lr * factor,
                     lr_llm=args.lr_llm * factor, grad_norm=grad_norm)
    run.finish()
    if args.bench:
        return
    stage2.export(run, model, named, ema, tokenizer)
    if toy and not args.init_only:
        score = training.check_colours(draw, args.seed, 128, "check: 128 toy shapes")   # by all
        if run.main:
            print(f"128 unseen single shapes, guidance {args.guidance}: background right "
                  f"{score['background_right']:.1%}, object colour right "
                  f"{score['colour_right']:.1%}")


if __name__ == "__main__":
    cli.main(main)
