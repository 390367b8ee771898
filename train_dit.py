"""Stage 2: train the DiT and the language model that conditions it. The main job.

    python train_dit.py                       # tiny, built-in data, 15 CPU minutes
    python train_dit.py --size 2b --data shards/ --batch 2048

    z    = encoder(image)                                   frozen
    cond = Linear(LLM(chat(prompt), queries) at the queries)        [B,N,Z]
    x_t  = (1-t) z + t eps;   v = DiT(x_t, t, cond)
    loss = CE(text) + 2 |v - (eps - z)|^2                   paper sections 2.2, 3.1, appendix B

Finetuning: python train_dit.py --init runs/dit-tiny --out runs/hq --data builtin:hq --epochs 4
    --lr 5.66e-4 --lr-llm 5.66e-5 --warmup 0.03 --cache-latents
"""
import argparse
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import benchmark
import data
import dit as dits
import flow
import parallel
import run as runs
import text_model as text
import vae as vaes
import weights
import world
from parallel import UserError

# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

MIXTURE = ["builtin:synthetic=6", "builtin:web=2", "builtin:text=0.5", "builtin:hq=0.5",
           "builtin:qa=1"]

PLOT = ["loss", "flow", "text", "repa", "cond_spread", "background_right", "colour_right"]

# tiny differs from the paper where its size asks for it. shift_base: 64 tokens of 96 channels give
# a = sqrt(64*96/128) = 6.9, near the paper's 8.49; with 4096 it would be 1.2, and then x_t alone
# gives the answer away at nearly every t and the caption is never heard.
DEFAULTS = {
    "tiny": dict(steps=1800, batch=32, lr=1.5e-3, lr_llm=1e-3, warmup=0.03, ema=0.998,
                 remat="none", shift_base=128.0, log_every=20, sample_every=300, save_every=300,
                 data=MIXTURE),
    "paper": dict(steps=30_000, batch=2048, lr=5e-4, lr_llm=5e-5, warmup=0.0134, ema=0.9999,
                  remat="block", shift_base=4096.0, log_every=10, sample_every=1000,
                  save_every=1000, data=MIXTURE),
}


def arguments():
    """Flags, checked against each other; the rest follows from --size. Raises UserError."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                epilog="All defaults follow from --size.")
    positive, none_or_more = runs.positive(float), runs.positive(float, zero=True)
    share = runs.share
    runs.add_flags(p, steps=None, batch=None, data=None, log=None, sample=None, save=None,
                   remat=None)
    a = p.add_argument_group("finetuning and checks").add_argument
    a("--epochs", type=positive, help="passes over finite --data, instead of --steps (finetuning); "
      "of several sources over as many records as all have, each drawn by its weight")
    a("--export", action="store_true",
      help="write final/ from the latest checkpoint of an unfinished run, and stop")
    a("--overfit", action="store_true", help="train on the first batch only, a check: with "
      "--batch 4 --steps 60 --lr 3e-3 --lr-llm 3e-3 tiny's loss falls from 11 to below 0.1")
    a("--cache-latents", nargs="?", const="runs/latents", metavar="DIR", help="encode finite "
      "--data once, onto disk (for small sets: 1.2 MB an image of 256 x 1152)")
    a = p.add_argument_group("model").add_argument
    a("--size", default="tiny", metavar="|".join(dits.SIZES),
      help="of the DiT; the paper's spellings (2.4B, 9.8B, ...) work too")
    a("--latent", choices=["siglip2", "webssl", "vae"], default="siglip2",
      help="vae: the baseline, FLUX's latent; siglip2 stays for understanding")
    a("--encoder", help="file, folder or hub id of the frozen encoder")
    a("--layers", type=runs.positive(), default=1,
      help="the latent sums the encoder's last K blocks (needs a decoder for that)")
    a("--decoder", help="file, folder or hub id of the decoder (sample grids)")
    a("--vae", help="file, folder, run or hub id of the VAE of --latent vae")
    a("--llm", help="Qwen2.5 folder or hub id; tiny: a folder with a tokenizer; random: random "
      "weights, for timing")
    a("--length", type=runs.positive(), help="pad every sample to this many tokens and skip longer "
      "ones (default: xla 512, tiny 128; elsewhere as long as the batch)")
    a("--random-init", action="store_true",
      help="random LLM and encoder of the real shapes: timing only (says so)")
    a("--freeze", choices=["llm"], help="train only the DiT, its projector and the queries (the "
      "paper's DiT-only finetuning)")
    a("--head-width", type=runs.positive(), default=0, help="DiT-DH: width (2688)")
    a("--head-depth", type=runs.positive(zero=True), default=0, help="DiT-DH: blocks (2)")
    a("--qk-norm", action="store_true", help="RMSNorm on queries and keys of the DiT")
    a("--allow-narrow", action="store_true", help="allow a width that is not above the latent's C")
    a("--scan", action=argparse.BooleanOptionalAction,
      help="xla: stacks of blocks as compiled loops, with --remat block (default: on)")
    a = p.add_argument_group("flow and loss").add_argument
    a("--shift", default="auto", help="auto: sqrt(N C / base); none: 1; or a number")
    a("--shift-base", type=positive, help="4096; tiny: 128")
    a("--diffusion-weight", type=none_or_more, default=2.0, help="of the flow loss")
    a("--cond-drop", type=share, default=0.1, help="share of images that train the null condition")
    a("--repa", type=runs.positive(), default=0, metavar="LAYER",
      help="align the tokens after this DiT block with the encoder's features")
    a("--repa-weight", type=positive, help="of that, relative to the flow loss (0.5)")
    a = p.add_argument_group("optimizer").add_argument
    a("--lr", type=positive, help="DiT and its projector")
    a("--lr-llm", type=positive, help="LLM, queries, mm_projector")
    a("--warmup", type=share, help="share of the steps")
    a("--betas", type=share, nargs=2, default=[0.9, 0.95], help="of the DiT's group")
    a("--betas-llm", type=share, nargs=2, default=[0.9, 0.999], help="of the LLM's group")
    a("--clip", type=positive, default=1.0, help="norm of the whole gradient, at most")
    a("--ema", type=share, help="decay; 0: off")
    a = p.add_argument_group("samples").add_argument
    a("--guidance", type=none_or_more, help="1: off (default with --cond-drop 0); else 3")
    a("--sample-steps", type=runs.positive(), default=25, help="Euler steps")
    args = p.parse_args()

    args.size = dits.PAPER_NAMES.get(args.size.upper(), args.size.lower())
    if args.size not in dits.SIZES:
        raise UserError(f"--size {args.size}: known sizes are {', '.join(dits.SIZES)} "
                        f"(or the paper's {', '.join(dits.PAPER_NAMES)})")
    if args.epochs and args.steps:
        raise UserError(f"--epochs {args.epochs} and --steps {args.steps}: give one of them")
    if args.shift_base and args.shift != "auto":
        raise UserError(f"--shift-base {args.shift_base:g} is for --shift auto, not {args.shift}")
    for key, value in DEFAULTS["tiny" if args.size == "tiny" else "paper"].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.export and args.bench:
        raise UserError("--export writes what is there, --bench nothing: give one of them")
    if bool(args.head_width) != bool(args.head_depth):
        raise UserError("--head-width and --head-depth go together (the paper's are 2688 and 2)")
    if args.repa > (depth := dits.SIZES[args.size].depth):
        raise UserError(f"--repa {args.repa}: --size {args.size} has {depth} blocks")
    if not args.cond_drop and args.guidance not in (None, 1):
        raise UserError(f"--guidance {args.guidance:g} with --cond-drop 0: no null condition is "
                        "trained to guide away from; use --guidance 1")
    if args.guidance is None:
        args.guidance = 3.0 if args.cond_drop else 1.0
    if args.repa_weight and not args.repa:
        raise UserError(f"--repa-weight {args.repa_weight:g} needs --repa LAYER")
    args.repa_weight = args.repa_weight or 0.5
    if args.init and args.llm == "random":
        raise UserError(f"--llm random with --init {args.init}, whose LLM is trained: give one of "
                        "them")
    if args.random_init and args.size == "tiny":
        raise UserError("--random-init is for the sizes from 0.5b on; tiny needs no download")
    if args.bench and args.cache_latents:
        raise UserError("--cache-latents writes, --bench writes nothing: give one of them")
    if args.decoder and args.latent == "vae":
        raise UserError(f"--decoder {args.decoder}: with --latent vae the VAE decodes; --vae")
    if args.vae and args.latent != "vae":
        raise UserError(f"--vae {args.vae} is for --latent vae, not --latent {args.latent}")
    if args.layers > 1 and args.latent == "vae":
        raise UserError(f"--layers {args.layers}: not with --latent vae, whose latent is the VAE's")
    if args.shift not in ("auto", "none"):
        try:
            positive(args.shift)
        except ValueError:
            raise UserError(f"--shift {args.shift}: expected auto, none or a positive number")
    args.out = args.out or Path(f"runs/dit-{args.size}")
    return args


# ------------------------------------------------------------------------------------------------
# A batch: tokens, pictures, and every random number of the step
# ------------------------------------------------------------------------------------------------

def generators(seed, numbers):
    """One CPU generator a sample number: neither mesh nor micro-batch changes what it draws."""
    return [torch.Generator().manual_seed(seed * 1_000_003 + n) for n in numbers]


class Collate:
    """Records -> one batch; runs in the loader's worker.

    images uint8 [B,3,S,S] (or, cached, latent [B,N,F]); ids [B,L]; where, targets [B,K], the tokens
    that the text's loss is about; start, answer [B]; and drawn per image: normal [B] (of the time),
    eps [B,N,C], drop [B], for a VAE posterior [B,N,C].
    """

    def __init__(self, tokenizer, tokens, channels, seed, cond_drop, length=None, posterior=False):
        self.tokenizer, self.tokens, self.channels = tokenizer, tokens, channels
        self.seed, self.cond_drop, self.posterior = seed, cond_drop, posterior
        self.limit, self.multiple = length or 1024, length or 64    # length: the same for all
        self.labelled = length and max(length - tokens, 1)          # an image's positions have none

    def __call__(self, records):
        rows, unfit = [], []
        for r in records:
            row = text.expand(*text.chat(self.tokenizer, r["conversations"]), self.tokens)
            why = [f"its text holds {s}, which the chat format uses" for s in text.SPECIAL
                   if any(s in turn["value"] for turn in r["conversations"])]
            if len(row[0]) > self.limit:                # never cut through an image: no loss at all
                why.append(f"{len(row[0])} tokens, more than {self.limit} (--length)")
            if why:
                unfit.append((r["key"], why[0]))
                row = (row[0][:1], [text.IGNORE], None, False)
            rows.append(row)
        pad = self.tokenizer.token_to_id("<|endoftext|>")
        ids, labels, start, answer = text.pad_batch(rows, pad, self.multiple)
        where, targets = text.labelled(labels, self.labelled)
        draws = generators(self.seed, [r["n"] for r in records])
        shape = (self.tokens, self.channels)
        if "latent" in records[0]:
            seen = {"latent": torch.stack([torch.from_numpy(r["latent"]) for r in records])}
        else:
            seen = {"images": torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1)
                                           for r in records])}
        batch = {
            **seen, "ids": ids, "where": where, "targets": targets, "start": start,
            "answer": answer,
            "normal": torch.stack([torch.randn((), generator=g) for g in draws]),
            "drop": torch.stack([torch.rand((), generator=g) < self.cond_drop for g in draws]),
            "eps": torch.stack([torch.randn(shape, generator=g) for g in draws]),
            "keys": [r["key"] for r in records], "unfit": unfit,
            "skipped": [s for r in records for s in r["skipped"]]}
        if self.posterior:                              # last, so that the other draws are the same
            batch["posterior"] = torch.stack([torch.randn(shape, generator=g) for g in draws])
        return batch


class ScaleRAE(nn.Module):
    """The two networks that are trained, and the loss of a batch.

    repa: a DiT block whose tokens a projector (three Linears, left out of exports) aligns with the
    `channels` features of the frozen encoder (REPA, arXiv 2410.06940, equation 8). It gives a VAE's
    latent the semantics that the RAE's has by itself; there it aligns with the clean latent.
    """

    def __init__(self, llm, dit, alpha, repa=0, channels=0):
        super().__init__()
        self.llm, self.dit, self.alpha = llm, dit, alpha
        if repa:
            D, hidden = dit.width, min(2048, 4 * dit.width)                 # 2048: REPA's
            self.repa = nn.Sequential(dits.Linear(D, hidden), nn.SiLU(),
                                      dits.Linear(hidden, hidden), nn.SiLU(),
                                      dits.Linear(hidden, channels))
            dit.dit_blocks[repa - 1].register_forward_hook(self.keep)

    def keep(self, block, inputs, tokens):
        self.tokens = tokens                                                # [B,N,D]

    def forward(self, z, u, batch, draws=True):
        """Latents z [B,N,C], what the LLM sees of the images u [B,N,C'] (the same, but for a VAE)
        and a batch of `Collate` -> cross-entropy summed over the labelled tokens; flow loss and (or
        None) 1 - cosine of REPA of each image [B], zero for those that are not answers; times t
        [B]; sums of the condition for `spread`.

        Images in questions pass through the DiT too and count zero: one graph for every batch.
        draws=False: the whole batch asks, so the DiT is left out and there are no sums.
        """
        h = self.llm(self.llm.embed(batch["ids"], batch["start"], batch["answer"], u))  # [B,L,H]
        ce = self.llm.text_loss(h, batch["where"], batch["targets"])
        t = flow.sample_time(batch["normal"], self.alpha)                   # [B]
        if not draws:
            return ce, torch.zeros_like(t), None, t, None
        cond = self.llm.condition(h, batch["start"])                        # [B,N,Z]
        x_t = flow.interpolate(z, batch["eps"], t)                          # [B,N,C]
        v = self.dit(x_t, t, cond, batch["drop"] if hasattr(self.dit, "y_embedder") else None)
        mask = batch["answer"].float()
        mse = flow.flow_loss(v, z, batch["eps"]) * mask                     # [B]
        apart = None
        if hasattr(self, "repa"):
            y = self.repa(self.tokens).float()                              # [B,N,C']
            apart = (1 - F.cosine_similarity(y, u, dim=-1).mean(1)) * mask
        w, c = mask[:, None, None], cond.detach().float()
        sums = torch.cat([(c * w).sum(0).flatten(), (c.square() * w).sum()[None], mask.sum()[None]])
        return ce, mse, apart, t, sums                                      # sums [N*Z+2]


def spread(sums):
    """Sums over a batch of the condition c, of |c|^2 and of 1 [N*Z+2] -> the standard deviation of
    c across the batch over its rms. Near 0 the text is not heard."""
    c, square, n = sums[:-2], sums[-2], sums[-1]
    return (1 - c.square().sum() / (n * square).clamp(min=1e-12)).clamp(min=0).sqrt()


def train_step(model, look, optimizer, named, ema, batches, tokens, answers, draws, weight, args,
               devices):
    """One update from micro-batches that are on the devices; no host waits for a device in it.

    look: batch -> z, u; tokens, answers: what the losses of the whole batch are divided by; draws:
    does it hold an image to draw (else what draws is not touched); weight: of this step in the
    average. -> the step's values {name: tensor}; losses by time [10,2]; the gradient's norm.
    """
    values, by_time, conditions = {}, 0, 0
    for batch in batches:
        z, u = look(batch)                                                  # [B,N,C], [B,N,C']
        ce, each, apart, t, sums = model(z, u, batch, draws)
        parts = dict(text=ce / tokens)
        loss = parts["text"]
        if draws:
            parts["flow"] = each.sum() / answers
            conditions = conditions + sums
            loss = loss + args.diffusion_weight * parts["flow"]
        if apart is not None:
            parts["repa"] = apart.sum() / answers
            loss = loss + args.diffusion_weight * args.repa_weight * parts["repa"]
        loss.backward()
        parts["loss"] = loss
        values = {k: values.get(k, 0) + v.detach() for k, v in parts.items()}
        by_time = by_time + buckets(t, each.detach(), batch["answer"])
    if draws:
        values["cond_spread"] = spread(parallel.average(conditions, devices))
    else:                               # zeros, with which AdamW would still follow its momentum
        named["llm.model.latent_queries"].grad = None
    norm = parallel.clip_grad(named.values(), args.clip, devices)
    parallel.guarded_step(optimizer, norm, devices)
    optimizer.zero_grad(set_to_none=True)
    runs.update_ema(ema, named, weight)
    return values, by_time, norm


def buckets(t, each, answer):
    """Losses [B] by time: [10,2], the sum and the number of answer images in each tenth of t."""
    inside = F.one_hot((t * 10).long().clamp(max=9), 10).float()            # [B,10]
    return inside.T @ torch.stack([each, answer.float()], 1)


def note_changes(name, config, now):
    """Say in what this run {flag: value} differs from the one that --init comes from."""
    theirs = {"--shift": config.get("shift_alpha"), "--layers": config.get("encoder_layers"),
              "--encoder": weights.tower_of(config), "--decoder": config.get("decoder")}
    for flag, value in theirs.items():
        before, after = (f"{v:.7g}" if isinstance(v, float) else v for v in (value, now[flag]))
        if value and before != after:
            print(f"note: --init {name} was trained with {flag} {before}, this run takes {after}; "
                  f"{flag} {before} keeps the former", file=sys.stderr)


def main():
    args = arguments()

    # --------------------------------------------------------------------------------------------
    # Devices
    # --------------------------------------------------------------------------------------------
    devices = parallel.setup(args.device, args.dtype, args.mesh, args.dry_run)
    runs.check_batch(args, devices, None if args.size == "tiny" else 8)     # 8 images a device
    if args.scan and devices.target != "xla":
        raise UserError(f"--scan is for --device xla, not {devices.target}; leave it out")
    if args.cache_latents and devices.kind == "xla" and devices.world > 1:
        raise UserError("--cache-latents: not on several XLA hosts, where one alone cannot run the "
                        "encoder; fill the folder on one host")

    # --------------------------------------------------------------------------------------------
    # Models: the frozen encoder (and decoder, to look at samples), the LLM, the DiT
    # --------------------------------------------------------------------------------------------
    size, tiny = dits.SIZES[args.size], args.size == "tiny"
    planned = not tiny and (args.dry_run or args.random_init)   # shapes only: no files are needed
    where, init, config = args.llm or size.llm, {}, {}          # where: the LLM and its tokenizer
    if args.init:
        path = weights.final_of(*weights.locate([("weights", args.init, "--init")]))
        init, config = weights.read_weights(path, "--init")
    own = not args.llm and "diffusion_model_channels" in config     # the LLM comes with --init
    if own:
        llm_config = weights.stage2_config(config, init, f"--init {args.init}")
        where = path if path.is_dir() else path.parent
    if planned:
        encoder, vae = weights.random_towers(args, devices.dtype)     # shapes, so far
        decoder, tokenizer = None, text.load_tokenizer(weights.ASSETS)
        files = "published shapes" if args.dry_run else "random weights: timing only"
    else:
        encoder, vae, decoder, tokenizer, files = weights.load_towers(args, tiny, where, devices)
    V, name = tokenizer.get_vocab_size(), size.llm if args.llm == "random" else args.llm or size.llm
    scratch = own or tiny or planned or args.llm == "random"        # no pretrained LLM to load
    if tiny and not own:
        llm_config = dict(text.TINY, vocab_size=V)
    elif not scratch:
        llm_config = dict(weights.config_of(files["llm"], "--llm"), vocab_size=V)
    elif not own:
        llm_config = text.QWEN_7B if "7b" in name.lower() else text.QWEN_1_5B
        if (Path(name) / "config.json").is_file():                  # a folder of another shape
            llm_config = dict(weights.config_of(name, "--llm"),
                              vocab_size=llm_config["vocab_size"])
    N, C = encoder.tokens, vae.channels if vae else encoder.channels
    resolution = encoder.grid * vae.stride if vae else encoder.image_size
    decode = None if planned else vae.decode if vae else decoder
    alpha = (flow.shift_alpha(N, C, args.shift_base) if args.shift == "auto" else
             1.0 if args.shift == "none" else float(args.shift))
    tower = weights.lasting(args.encoder) or (weights.TINY_TOWER if tiny else
                                              weights.HUB[args.latent][0])
    decoder_name = weights.lasting(files["decoder"] if args.encoder and decoder else args.decoder)
    if init and devices.main:
        note_changes(args.init, config,
                     {"--shift": alpha, "--layers": args.layers, "--encoder": tower,
                      "--decoder": decoder_name or "its encoder's own"})
    if size.width <= C and not args.allow_narrow:
        raise UserError(f"--size {args.size}: the DiT's width {size.width} is not above the "
                        f"latent's {C} channels. Noise fills all C dimensions of a token, so a "
                        "narrower DiT cannot even copy it (paper appendix B). Take a larger "
                        "--size, or override with --allow-narrow")

    def networks(llm):
        """The LLM and a new DiT, as the arguments want them."""
        with weights.user_errors("the DiT"):
            dit = dits.DiT(C, N, size.width, size.depth, size.heads, head_width=args.head_width,
                           head_depth=args.head_depth, qk_norm=args.qk_norm,
                           null=args.cond_drop > 0, dtype=devices.dtype)
        llm.remat = dit.remat = args.remat == "block"
        if args.freeze:
            llm.requires_grad_(False)
            for p in (llm.model.latent_queries, *llm.diff_head_projector.parameters()):
                p.requires_grad_(True)
        return ScaleRAE(llm, dit, alpha, args.repa, encoder.channels)

    # --------------------------------------------------------------------------------------------
    # Data, and what follows from all of that
    # --------------------------------------------------------------------------------------------
    try:
        mixture = data.Mixture(args.data, resolution, args.seed, encoder.crop,
                               resample=(vae or encoder).resample)
        sources = mixture.describe()
    except data.DataError as error:
        if not args.dry_run or args.epochs:
            raise
        print(f"planned without the data: {error}", file=sys.stderr)
        mixture = data.Mixture(MIXTURE, resolution, args.seed)              # texts of usual length
        sources = data.planned(args.data)
    try:
        if args.epochs:
            args.steps = math.ceil(args.epochs * len(mixture) / args.batch)
        elif args.cache_latents:
            len(mixture)
    except TypeError as error:
        raise UserError(f"--epochs {args.epochs:g}: {error}; give --steps" if args.epochs else
                        f"--cache-latents: {error}; give finite sources to --data")
    if devices.target == "xla" and args.length is None: # another length is another program there
        args.length = 128 if tiny else 512
    collate = Collate(tokenizer, N, C, args.seed, args.cond_drop, args.length, vae is not None)
    first = collate([mixture[i] for i in range(16)])
    length, labelled = first["ids"].shape[1], first["where"].shape[1]       # a typical L and K
    if (first["targets"] == text.IGNORE).all():
        raise UserError(f"--length {args.length}: none of the first 16 samples fits, such as "
                        f"{': '.join(first['unfit'][-1])}")

    with weights.user_errors("the LLM"), torch.device("meta"):  # shapes: the table takes no memory
        model = networks(text.TextModel(llm_config, N, encoder.channels, size.width, devices.dtype))
    llm, dit = model.llm, model.dit
    parts = {"dit": dit, "llm": llm, "encoder (frozen)": encoder, "vae (frozen)": vae,
             "repa": getattr(model, "repa", None)}
    count = {k: sum(p.numel() for p in part.parameters()) for k, part in parts.items() if part}
    flops = {"dit": dit.train_flops(),
             "llm": llm.train_flops(length, labelled, args.freeze == "llm")}
    if not args.cache_latents:
        flops["encoder"] = encoder.forward_flops()
    if vae and not args.cache_latents:
        flops["vae"] = vae.forward_flops(resolution, decode=False)
    if args.repa:
        flops["repa"] = 6 * N * count["repa"]
    trained, frozen = (parallel.on_one_device(((k, p) for k, p in model.named_parameters()
                                               if p.requires_grad == train), devices)
                       for train in (True, False))
    xla = devices.target == "xla"
    frozen += (parallel.on_one_device(encoder.named_parameters(), devices) if xla else
               count["encoder (frozen)"])
    frozen += count.get("vae (frozen)", 0)
    blocks = [*llm.model.layers, *dit.dit_blocks]
    fsdp2 = devices.mesh is not None or devices.axes["fsdp"] > 1            # or is planned
    gathered = parallel.gathered(model, blocks, devices.dtype) if fsdp2 and not xla else 0
    activations = (dit.activation_bytes() + llm.activation_bytes(length)) / devices.axes["fsdp"]
    compiled = devices.kind != "cpu" if args.compile is None else args.compile
    copies = 0          # else the backward pass keeps the weights that were cast to bf16
    if devices.dtype == torch.bfloat16 and not (compiled or gathered or args.remat == "block"):
        copies = 2 * sum(p.numel() for block in blocks for p in block.parameters())
    memory = lambda images: runs.memory_gb(trained, frozen, activations * images + copies, args.ema,
                                           gathered)
    runs.plan(f"train_dit --size {args.size}", args, devices, count, flops, memory,
              "take a smaller --size, --freeze llm, --ema 0", latent=[N, C], alpha=alpha,
              data=sources, frozen=files)
    if args.dry_run:
        return
    run = runs.Run(args, devices, free={"micro_batch"})     # losses are means over the whole batch

    # --------------------------------------------------------------------------------------------
    # The networks that are trained
    # --------------------------------------------------------------------------------------------
    if planned:
        encoder, vae = weights.random_towers(args, devices.dtype, devices.device)
    if scratch:
        llm = text.TextModel(llm_config, N, encoder.channels, size.width, devices.dtype)
    else:
        llm = weights.load_llm(files["llm"], tokenizer, N, encoder.channels, size.width,
                               devices.dtype)
    model = networks(llm)
    dit, blocks = model.dit, [*llm.model.layers, *model.dit.dit_blocks]
    (text.init_weights if scratch else text.init_extras)(llm, args.seed)        # or Qwen2 has some
    dits.init_weights(dit, args.seed)
    if args.repa:
        dits.init_weights(model.repa, args.seed + 2)
    if init:
        weights.load_model_state(llm, dit, init, f"--init {args.init}")
    if args.compile or (args.compile is None and devices.kind == "cuda"):
        for block in blocks:
            block.compile(fullgraph=True)
    if devices.kind == "xla" and args.scan is not False:
        parallel.use_scan(devices, llm, encoder, *[dit] * (not args.repa))  # REPA taps one block
    parallel.shard(model, devices, blocks)
    parallel.shard(encoder, devices)

    @torch.no_grad()
    def encode(images):
        """uint8 [B,3,S,S] -> what --cache-latents keeps, fp32: z [B,N,C]; for a VAE [mean, log
        variance, features] [B,N,C+C+C'], as its latent is a draw from the posterior."""
        x = images.float() / 255
        u = encoder(x)                                                      # [B,N,C']
        return torch.cat([*map(vaes.pack, vae.posterior(x)), u], -1) if vae else u

    def look(batch):
        """A batch's latents z [B,N,C], and what the LLM sees of its images u [B,N,C']: the same, or
        with a VAE, whose latent says little of what is in the picture, a second tower's. That one
        resizes the VAE's 256 pixels to its own, a little sharper than its processor would."""
        f = batch["latent"] if args.cache_latents else encode(batch["images"])      # [B,N,F]
        if not vae:
            return f, f
        mean, logvar, u = f.split([C, C, encoder.channels], -1)
        z = mean + (0.5 * logvar).exp() * batch["posterior"]
        return (z - vae.shift) * vae.scale, u

    # --------------------------------------------------------------------------------------------
    # Optimizer: one AdamW, two groups (the DiT with its projector; everything else)
    # --------------------------------------------------------------------------------------------
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    of_llm = {k for k in named if k.startswith("llm.") and "diff_head" not in k}
    optimizer = parallel.adamw(
        [dict(params=[p for k, p in named.items() if k not in of_llm], lr=args.lr,
              betas=args.betas),
         dict(params=[p for k, p in named.items() if k in of_llm], lr=args.lr_llm,
              betas=args.betas_llm)], devices, eps=1e-8, weight_decay=0.0)
    ema = runs.averages(named, devices) if args.ema else {}

    # --------------------------------------------------------------------------------------------
    # Resume
    # --------------------------------------------------------------------------------------------
    run.load({**named, **{f"ema.{k}": v for k, v in ema.items()},
              **runs.moments(optimizer, named, devices)})
    if args.cache_latents:
        what = [(args.latent, args.layers, str(devices.dtype))]
        what += [weights.checksum(m) for m in (encoder, vae) if m]
        data.cache_latents(
            mixture, args.cache_latents, what, lambda x: encode(parallel.place(
                {"images": torch.from_numpy(x).permute(0, 3, 1, 2)}, devices)["images"]
            ).cpu().numpy(), args.micro_batch, args.workers, devices.main,
            lambda: parallel.barrier(devices))
    batches = data.loader(mixture, collate, args.micro_batch,
                          0 if args.overfit else run.start * args.batch, args.workers,
                          devices.rank, devices.world)
    if args.overfit:
        batches = itertools.cycle(itertools.islice(batches, args.batch // args.micro_batch))
    warmup = math.ceil(args.warmup * args.steps)

    @torch.no_grad()
    def draw(prompts, seed):
        """Pictures [B,3,S,S] of these prompts by the EMA weights; noise i is of (seed, i) only."""
        runs.swap(named, ema)
        with parallel.whole(model):
            noise = torch.stack([torch.randn(N, C, generator=g)
                                 for g in generators(seed, range(len(prompts)))])
            cond = text.direct_condition(llm, tokenizer, prompts, devices.device)
            parallel.step_done(devices)
            z = flow.generate(dit, cond, noise.to(devices.device), alpha, args.sample_steps,
                              args.guidance, progress=parallel.stepwise(devices))
        runs.swap(named, ema)
        return parallel.full(decode(z))                 # by every process, as on xla it must be

    def check_colours(count):
        """Backgrounds and colours on `count` single shapes that training has not seen."""
        scenes = benchmark.single_shapes(args.seed + 77, count)
        back, colour = benchmark.colours_right(draw([world.caption(s) for s in scenes], 1), scenes)
        return dict(background_right=back, colour_right=colour)

    def sample(done):
        """The fixed prompts' pictures -> tiny: values for the log."""
        pictures = draw(benchmark.FIXED, 0)
        if run.main:
            runs.save_grid(pictures, run.dir / "samples" / f"step-{done:07d}.png", columns=8)
        return check_colours(32) if tiny and done < args.steps else {}

    # --------------------------------------------------------------------------------------------
    # Loop: data, step, log, sample, save
    # --------------------------------------------------------------------------------------------
    for step in run.progress(run.start if args.export else args.steps):
        factor = runs.cosine(step, args.steps, warmup)
        for group, lr in zip(optimizer.param_groups, (args.lr, args.lr_llm)):
            group["lr"] = parallel.scalar(lr * factor, devices.device)
        micros = list(run.micro_batches(batches))
        tokens = sum((b["targets"] != text.IGNORE).sum().item() for b in micros)
        answers = sum(b["answer"].sum().item() for b in micros)
        tokens, answers = parallel.total([tokens, answers], devices)
        draws = answers > 0
        divisors = (parallel.scalar(max(n, 1) / devices.replicas, devices.device)
                    for n in (tokens, answers))                 # means over the whole batch
        values, by_time, norm = train_step(
            model, look, optimizer, named, ema, (parallel.place(b, devices) for b in micros),
            *divisors, draws, parallel.scalar(runs.ema_weight(args.ema, step), devices.device),
            args, devices)
        shown = {k: v for k, v in values.items()                # one image has no spread; it stays
                 if answers > 1 or k != "cond_spread"}          # in values, for one program on xla
        run.meter.add(flow_by_t=by_time, **shown)
        work = {k: v for k, v in flops.items() if draws or k not in ("dit", "repa")}
        if run.end_step(step + 1, norm, work, PLOT, decode and sample, lr=args.lr * factor,
                        lr_llm=args.lr_llm * factor, grad_norm=norm):
            return
    run.finish()
    codec = weights.TINY_VAE if tiny else weights.FLUX_VAE
    config = weights.model_config(llm, dit, tower, alpha,
                                  (weights.lasting(args.vae) or codec) if vae else None,
                                  args.layers, decoder_name, args.cond_drop)
    for name in ("model", "ema"):
        run.export(name, weights.model_state(llm, dit), config)
        runs.swap(named, ema)
    if run.main:
        weights.save_tokenizer(tokenizer, run.dir / "final")
        print(f"{run.dir}/final written; samples: {run.dir}/samples")
    if tiny:
        score = check_colours(128)                      # by all processes
        if run.main:
            print(f"128 unseen single shapes, guidance {args.guidance}: background right "
                  f"{score['background_right']:.1%}, object colour right "
                  f"{score['colour_right']:.1%}")


if __name__ == "__main__":
    runs.main(main)
