"""Stage 2's recipe: the paper's values, those of the tiny preset and of finetuning, all flags.

`arguments` reads the flags of train_dit.py, `fill_defaults` adds what follows from --size or from
--init, and `count_steps` what follows from the data.
"""
import argparse
import math
import sys
from pathlib import Path

import cli
import dit as dit_file
import weights
from cli import UserError
from dit import SIZES

# The paper's pretraining mixture, in millions: web, FLUX-generated, questions (Cambrian-7M). tiny
# sees more shapes (builtin:synthetic) than emoji (builtin:web), because it learns shapes first.
MIXTURES = {"tiny": ["builtin:synthetic=6", "builtin:web=2", "builtin:qa=1"],
            "paper": ["builtin:web=39.3", "builtin:synthetic=24.7", "builtin:qa=7"]}

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
# With --init: the paper's rates and batch (Table 8); tiny's are ours. Without --steps and --epochs,
# finite data are passed FINETUNE_EPOCHS times, but in no fewer than FINETUNE_STEPS steps.
FINETUNE = {
    "tiny": dict(lr=3e-4, lr_llm=2e-4, warmup=0.1, sample_every=100, save_every=100),
    "paper": dict(lr=5.66e-4, lr_llm=5.66e-5, warmup=0.03, batch=1024),
}
FINETUNE_EPOCHS, FINETUNE_STEPS = 4, 300

# Flags -> the fields of a config that they set. With --init they must agree with the checkpoint. A
# flag that sets a field and is not here would be ignored.
DIT_FLAGS = {k: k for k in ("width", "depth", "heads", "head_width", "head_depth", "qk_norm",
                            "predict")}
LLM_FLAGS = {"llm_width": "hidden_size", "llm_depth": "num_hidden_layers"}


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
    p = cli.Parser(description="Stage 2: train the DiT and the language model that conditions it.",
                   epilog="Defaults that are not shown follow from --size or --init; --dry-run "
                   "prints the main ones.")
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
    a("--size", type=dit_size, metavar="|".join(SIZES), help="size of the DiT (default: "
      "tiny); the paper's names (2.4B, 9.8B, ...) work too")
    for flag in ("width", "depth", "heads", "llm-width", "llm-depth"):
        a(f"--{flag}", type=whole, help="replace the value that follows from --size")
    a("--latent", choices=["siglip2", "webssl", "vae"], help="default: siglip2; vae: the baseline, "
      "FLUX's latent; the LLM still reads images through siglip2")
    a("--encoder", help="file, folder or hub id of the frozen encoder")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--decoder", help="file, folder or hub id of the decoder (for sample grids)")
    g.add_argument("--vae", help="file, folder, run or hub id of the VAE of --latent vae")
    a("--llm", help="Qwen2.5 folder or hub id; tiny: a folder with a tokenizer; random: random "
      "weights, for timing")
    a("--length", type=whole, help="pad every sample to this many tokens and skip longer ones "
      "(default on xla: 512, tiny 128; elsewhere the longest of the batch)")
    a("--random-init", action="store_true",
      help="random LLM and encoder of the published shapes: for timing only")
    a("--freeze", choices=["llm"], help="train only the DiT, its projector and the queries (the "
      "paper's DiT-only finetuning)")
    a("--head-width", type=whole, help="DiT-DH: width of the wide head (the paper's: "
      "2688; default: no head)")
    a("--head-depth", type=whole, help="DiT-DH: blocks of the wide head (the paper's: 2)")
    a("--qk-norm", action="store_true", default=None, help="RMSNorm on queries and keys")
    a("--predict", choices=["v", "x"], help="what the DiT's last layer gives: the velocity "
      "(default), or the clean latent (JiT), with the same loss on the velocity")
    a("--allow-narrow", action="store_true", help="allow a width that is not above the latent's C")
    a("--scan", action=argparse.BooleanOptionalAction,
      help="xla: stacks of blocks as compiled loops, with --remat block (default: on)")
    a = p.add_argument_group("flow and loss").add_argument
    a("--shift", type=shift, help="auto: sqrt(N C / base) (default without --init); none: 1; or a "
      "number")
    a("--shift-base", type=positive, help="base of --shift auto (default: 4096; tiny: 128)")
    a("--diffusion-weight", type=cli.positive(float, zero=True), default=2.0,
      help="weight of the flow loss")
    a("--cond-drop", type=cli.share, help="share of the images that train the null condition "
      "(default: 0.1; 0 with --init of a model that has none)")
    a("--repa", type=whole, default=0, metavar="LAYER",
      help="align the tokens after this DiT block with the encoder's features (REPA)")
    a("--repa-weight", type=positive, default=0.5, help="weight of REPA, relative to the flow loss")
    a = p.add_argument_group("optimizer").add_argument
    a("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: for the matrices of "
      "the DiT's blocks, where torch has it and not on xla; AdamW for everything else")
    a("--lr", type=positive, help="learning rate of the DiT and its projector")
    a("--lr-llm", type=positive, help="learning rate of the LLM, queries and mm_projector")
    a("--warmup", type=cli.share, help="share of the steps in which the learning rate rises")
    a("--betas", type=cli.share, nargs=2, default=[0.9, 0.95], help="AdamW's betas "
      "for the DiT and its projector")
    a("--betas-llm", type=cli.share, nargs=2, default=[0.9, 0.999], help="AdamW's betas "
      "for the LLM, queries and mm_projector")
    a("--clip", type=positive, default=1.0, help="clip the norm of all gradients "
      "together to this value")
    a("--ema", type=cli.share, help="decay of the average of the weights; 0: off")
    a = p.add_argument_group("samples").add_argument
    a("--guidance", type=cli.positive(float, zero=True),
      help="guidance scale; 1: off (default: 3; 1 with --cond-drop 0)")
    a("--sample-steps", type=whole, default=25, help="Euler steps")
    a("--sample-prompts", type=Path, metavar="FILE", help="prompts to draw: a text file with "
      "one per line, a .jsonl or a folder of .txt (default: captions of the data)")
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
    if config:
        defaults.update(FINETUNE[recipe])
    if config or args.epochs:
        del defaults["steps"]                           # `count_steps` fills --steps
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    choose_networks(args, config)
    null = not config or config.dit.null
    if args.cond_drop and not null:
        raise UserError(f"--cond-drop {args.cond_drop:g}: the network of --init {args.init} has no "
                        "null condition; leave the flag out")
    if args.cond_drop is None:
        args.cond_drop = 0.1 if null else 0.0
    if not config:
        args.shift = args.shift or "auto"
    depth = config.dit.depth if config else args.depth or SIZES[args.size].depth
    if args.repa > depth:
        raise UserError(f"--repa {args.repa}: the DiT has {depth} blocks")
    if args.guidance is None:
        args.guidance = 3.0 if args.cond_drop else 1.0
    if args.guidance != 1 and not args.cond_drop:
        raise UserError(f"--guidance {args.guidance:g} with --cond-drop 0: no null condition is "
                        "trained to guide away from; use --guidance 1")


def choose_networks(args, config):
    """Fill --encoder, --decoder and --vae: the flag, else the one of --init's model, else the
    size's own. Raises UserError for flags that do not go with --latent."""
    tiny, vae = args.size == "tiny", args.latent == "vae"
    if tiny and args.latent == "webssl" and not (args.encoder and args.decoder):
        raise UserError("--latent webssl: there is no tiny one; give --encoder and --decoder, or a "
                        "larger --size")
    for flag, given, wrong in (("--vae", args.vae, not vae), ("--decoder", args.decoder, vae)):
        if given and wrong:
            raise UserError(f"{flag} {given} does not go with --latent {args.latent}: "
                            "the VAE is both encoder and decoder, and only of --latent vae")
    encoder, decoder = weights.TINY_PAIR if tiny else weights.HUB[args.latent]
    its_vae = weights.TINY_VAE if tiny else weights.FLUX_VAE
    if config:
        encoder, decoder, its_vae = config.encoder, config.decoder or decoder, config.vae
    args.encoder = weights.portable_path(args.encoder or encoder)
    args.decoder = None if vae else weights.portable_path(args.decoder or decoder)
    args.vae = weights.portable_path(args.vae or its_vae) if vae else None


def count_steps(args, records):
    """Return the number of steps on `records` records (None: endless)."""
    if args.steps is not None:
        return args.steps
    if args.epochs:
        return math.ceil(args.epochs * records / args.batch)
    if records:
        return max(FINETUNE_STEPS, math.ceil(FINETUNE_EPOCHS * records / args.batch))
    return DEFAULTS["tiny" if args.size == "tiny" else "paper"]["steps"]
