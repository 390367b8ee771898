"""A stage-2 model as files: config.json, the LLM, the DiT and the codec.

`released_config` translates the authors' config.json. Ours has their fields and one block more,
`scale_rae`, with the constructors' arguments. At the end: what train_dit.py needs besides its loop
(config, initial weights, export, samples).
"""
import math
import re
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

import chat
import flow
import parallel
import training
from cli import UserError, parsing
from dit import SIZES, DiT, DiTConfig
from networks import load_decoder, load_encoder, load_vae, note_pair
from recipe import DIT_FLAGS, LLM_FLAGS
from text_model import QWEN_1_5B, QWEN_7B, LLMConfig, TextModel, direct_condition
from text_model import TINY as TINY_LLM
from weights import (DIT, HUB, TINY_PAIR, Weights, check_config, load, locate, model_folder,
                     open_weights, read_fields, read_json, rows_for, stage2_key)

RECOMPUTED = ("rope.freqs_", "rotary_emb.inv_freq")     # in files, but recomputed in fp32


@dataclass(frozen=True)
class ModelConfig:
    """A stage-2 model: everything that a file of weights does not say itself."""
    dit: DiTConfig
    llm: LLMConfig
    image_channels: int         # of the features that the LLM sees
    alpha: float                # time shift
    encoder: str                # name of the encoder
    decoder: str | None = None  # name of the decoder; None: the encoder's own
    vae: str | None = None      # name of the VAE whose latent the DiT draws
    context: int = 1024         # tokens
    released: bool = False      # the authors' model, which they sample without guidance

    def __post_init__(self):
        if self.alpha <= 0:
            raise ValueError(f"alpha is {self.alpha}, expected a positive number")


def our_stage2_key(key):
    """Return ScaleRAE's name of a released key."""
    return "dit." + key.removeprefix(DIT) if key.startswith(DIT) else "llm." + key


def save_config(config):
    """Return config.json's dict. Our block `scale_rae` holds the constructors' arguments as they
    are; the other fields are those that the authors' code needs."""
    k, c = config.dit, asdict(config)
    wide = k.head_depth > 0
    pair = lambda a, b: [a, b or a] if wide else a
    base = k.tokens * k.channels / config.alpha ** 2    # None is the paper's 4096
    authors = dict(
        asdict(config.llm), architectures=["ScaleRAEQwenForCausalLM"], model_type="cambrian_qwen",
        torch_dtype="float32", hidden_act="silu", max_position_embeddings=32768, rope_scaling=None,
        vision_loss="diffusion-loss", vision_loss_mode="query", dit_cls="DDT" if wide else "DiT",
        diffusion_model_hidden_size=pair(k.width, k.head_width),
        diffusion_model_depth=pair(k.depth, k.head_depth),
        diffusion_model_heads=pair(k.heads, k.head_heads), diffusion_model_channels=k.channels,
        diffusion_model_z_channels=k.cond_width or k.width,
        diffusion_class_dropout_prob=0.1 if k.null else 0.0,
        diffusion_base_dim=None if abs(base - 4096) < 1 else base, diffusion_norm_stats_path=None,
        diffusion_split_per_token=k.tokens, ddt_encoder_depth=2,
        vision_tower_aux_token_len_list=[k.tokens], mm_vision_tower_aux_token_len_list=[k.tokens],
        mm_vision_tower_aux_list=[config.encoder], mm_vision_select_layer=-1,
        mm_hidden_size=config.image_channels, mm_projector_type="mlp2x_gelu",
        mm_use_im_start_end=True, mm_use_im_patch_token=False, image_aspect_ratio="square",
        tokenizer_model_max_length=config.context, tokenizer_padding_side="right",
        generation_alignment_tower=config.vae, patch_size=2,
        vision_hidden_size=config.image_channels, connector_only=True, si_token_len=729,
        miv_token_len=0, image_position=35)
    return {**authors, "scale_rae": c}


def llm_config(config, what, vocab_size=None):
    """Read Qwen2's config.json -> LLMConfig. Raises UserError for one that asks for more than plain
    Qwen2."""
    for key in ("rope_scaling", "rope_parameters"):
        with parsing(f"{what}: {key}"):
            scaling = dict(config.get(key) or {})
        if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
            raise UserError(f"{what}: {key} asks for {kind}; only plain rotary angles are built")
    values = {k: v for k, v in config.items()
              if k in LLMConfig.__dataclass_fields__ and v is not None}
    if theta := (config.get("rope_parameters") or {}).get("rope_theta"):
        values["rope_theta"] = theta
    if vocab_size:
        values["vocab_size"] = vocab_size
    return read_fields(LLMConfig, values, what)


def model_config(source):
    """Read the config of an opened stage-2 model -> ModelConfig, checked against the shapes.
    Raises UserError."""
    config, what, size = source.config, source.what, source.size
    with parsing(f"{what}: its config"):
        if "scale_rae" in config:
            block = dict(config["scale_rae"])
            for name, cls in (("dit", DiTConfig), ("llm", LLMConfig)):
                block[name] = read_fields(cls, dict(block.get(name) or {}), f"{what} ({name})")
            out = read_fields(ModelConfig, block, what)
        else:
            out = released_config(source)
    k, lm = out.dit, out.llm
    stated = {**asdict(lm), **asdict(k), "image_channels": out.image_channels,
              "depth": k.depth + k.head_depth, "cond_width": k.cond_width or k.width,
              "head_width": k.head_depth and (k.head_width or k.width),
              "head_heads": k.head_heads or k.heads}
    hd, hd1, hd2 = (size(f"{DIT}{r}_rope.freqs_cos", 1) for r in ("feat", "enc", "dec"))
    found = dict(hidden_size=size("model.embed_tokens.weight", 1),
                 vocab_size=size("model.embed_tokens.weight"),
                 num_hidden_layers=source.depth("model.layers"),
                 intermediate_size=size("model.layers.0.mlp.gate_proj.weight"),
                 image_channels=size("model.mm_projector.0.weight", 1),
                 tokens=size("model.latent_queries"),
                 channels=size(DIT + "x_embedder.proj.weight", 1),
                 cond_width=size("diff_head_projector.weight"),
                 width=size(DIT + "x_embedder.proj.weight"),
                 head_width=size(DIT + "s_embedder.proj.weight"),
                 depth=source.depth(DIT + "dit_blocks"),
                 heads=k.width // (hd or hd1) if hd or hd1 else 0,
                 head_heads=(k.head_width or k.width) // hd2 if hd2 else 0)
    check_config(stated, found, what)
    return out


def released_config(source):
    """Translate the authors' config.json -> ModelConfig."""
    c, what = source.config, source.what
    needed = [f"diffusion_model_{k}" for k in ("hidden_size", "depth", "heads")]
    if lacks := [k for k in needed if c.get(k) is None]:
        raise UserError(f"{what}: its config lacks {', '.join(lacks)}; expected a Scale-RAE model "
                        "folder with its config.json")
    if (mode := c.get("vision_loss_mode", "query")) != "query":
        raise UserError(f"{what}: vision_loss_mode {mode!r}; known is 'query'")
    with parsing(f"{what}: diffusion_model_hidden_size, _depth and _heads"):
        D, depth, heads = (c[k] for k in needed)
        head = {}
        if isinstance(D, list):
            (D, D2), (depth, depth2), (heads, heads2) = D, depth, heads
            head = dict(head_width=D2, head_depth=depth2, head_heads=heads2)
        elif c.get("vision_loss") == "ddt-loss":        # one width, split: the classic DDT
            depth, depth2 = c["ddt_encoder_depth"], depth - c["ddt_encoder_depth"]
            head = dict(head_width=D, head_depth=depth2, head_heads=heads)
    tokens = (c.get("vision_tower_aux_token_len_list") or [0])[0]
    encoder = (c.get("mm_vision_tower_aux_list") or ["encoder"])[0]
    plain = lambda name: re.sub(r"-(interp|res)\d+$", "", name)
    N = tokens or source.size("model.latent_queries")
    C = c.get("diffusion_model_channels") or source.size(DIT + "x_embedder.proj.weight", 1)
    Z = c.get("diffusion_model_z_channels") or source.size("diff_head_projector.weight")
    prob = c.get("diffusion_class_dropout_prob")
    values = dict(channels=C, tokens=N, width=D, depth=depth, heads=heads, cond_width=Z, **head,
                  null=(DIT + "y_embedder.dropout_embedding" in source.shapes if prob is None
                        else prob > 0),
                  qk_norm=DIT + "dit_blocks.0.attn.q_norm.weight" in source.shapes)
    base = c.get("diffusion_base_dim") or 4096
    return read_fields(ModelConfig, dict(
        dit=read_fields(DiTConfig, values, what),
        llm=llm_config(c, what, source.size("model.embed_tokens.weight")),
        image_channels=c.get("mm_hidden_size") or source.size("model.mm_projector.0.weight", 1),
        alpha=math.sqrt(N * C / base), encoder=plain(encoder),
        vae=plain(c.get("generation_alignment_tower") or "") or None,
        context=c.get("tokenizer_model_max_length") or 1024, released=True), what)


def build_stage2(config, dtype, what="the model"):
    """Build the LLM and the DiT of a ModelConfig (under torch.device("meta"): their shapes).
    Raises UserError, which begins with `what`, for sizes that do not divide."""
    try:
        llm = TextModel(config.llm, config.dit.tokens, config.image_channels,
                        config.dit.cond_width or config.dit.width, dtype)
        return llm, DiT(config.dit, dtype)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{what} does not work: {error}") from None


def llm_source(path, tokenizer):
    """Open a pretrained Qwen2.5 folder -> Weights with one embedding row per token.

    Rows of the LLM's own tokens are kept; rows beyond them (Qwen pads its matrices) are dropped;
    tokens that `tokenizer` adds begin as the mean of all others, each matrix its own.
    """
    source = open_weights(path, "--llm")
    V, own = tokenizer.get_vocab_size(), chat.read_tokenizer(path).get_vocab_size()
    pieces = dict(source.pieces)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key not in pieces:
            continue
        rows, width = source.shapes[key]
        if rows < own:
            raise UserError(f"{source.what}: {key} has {rows} rows, the tokenizer {own} tokens")
        known = partial(source.rows, key)
        pieces[key] = [(0, (own, width), known, None)]
        if V > own:
            added = mean_rows(known, own, width)
            pieces[key].append((own, (V - own, width), added, None))
    return Weights(source.what, source.config, pieces)


def mean_rows(read, count, width):
    """Return a reader of rows that are all the mean of a matrix's first `count` rows. These are
    read once, in parts, when the first row is asked for."""
    @cache
    def mean():
        total = torch.zeros(width, dtype=torch.float64)
        for first in range(0, count, 8192):
            total += read(first, min(first + 8192, count)).double().sum(0)
        return (total / count).float()

    return lambda first, last: mean().expand(last - first, -1)


@dataclass
class Stage2:
    llm: TextModel
    dit: DiT
    tokenizer: object
    config: ModelConfig


def load_run(path, devices):
    """Load a run, a checkpoint or a released folder -> Stage2, in eval mode.

    Matrices are kept in the compute dtype, to which each product would cast them anyway: in bf16
    half the memory, the same numbers. Raises UserError.
    """
    source = open_weights(path, "--run")
    config = model_config(source)
    with torch.device("meta"):
        llm, dit = build_stage2(config, devices.dtype, f"{source.what}: its config")
    model = nn.ModuleDict({"llm": llm, "dit": dit})
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and "embedder.mlp" not in name:
            module.to(devices.dtype)                    # a TimeEmbedder computes in fp32
    tied = ("lm_head.weight",) if config.llm.tie_word_embeddings else ()
    load(model, source.renamed(our_stage2_key), devices, ignore=RECOMPUTED + tied)
    tokenizer = chat.load_tokenizer(model_folder(path))
    if tokenizer.get_vocab_size() > config.llm.vocab_size:
        raise UserError(f"{source.what}: the tokenizer has {tokenizer.get_vocab_size()} tokens, "
                        f"the embedding {config.llm.vocab_size} rows")
    return Stage2(llm, dit, tokenizer, config)


def load_codec(config, args, devices, encoder=True, decoder=True):
    """Load the encoder and the decode function of a ModelConfig; None for one not asked for.

    --encoder and --decoder come first, then the config's, then the released pair. A run on a VAE's
    latent has two encoders. With `decoder` the one returned is the VAE; without, it is the one
    whose features the LLM reads.
    """
    if config.vae and decoder:
        if encoder and args.encoder:
            raise UserError(f"--encoder {args.encoder}: the latent of {args.run} is a VAE's, which "
                            "is its own encoder; --decoder replaces it")
        model = load_vae(*locate([("vae", args.decoder or config.vae, "--decoder")]), devices,
                         "--decoder")
        model.image_size = math.isqrt(config.dit.tokens) * model.stride
        return (model if encoder else None), model.decode
    name = args.encoder or config.encoder
    pairs = dict([*HUB.values(), TINY_PAIR])
    found = args.decoder or config.decoder or pairs.get(config.encoder)
    if decoder and not found:
        raise UserError(f"{args.run} has the encoder {config.encoder} and names no decoder; give "
                        "--decoder")
    wanted = [("encoder", name, "--encoder"), ("decoder", found, "--decoder")]
    paths = locate([w for w, needed in zip(wanted, (encoder, decoder)) if needed])
    e = load_encoder(paths[0], devices) if encoder else None
    if not decoder:
        return e, None
    d = load_decoder(paths[-1], devices, e or Normalisation(config.dit, name))
    note_pair(d, name)
    return e, d


class Normalisation:
    """What `load_decoder` asks of an encoder, where the encoder itself is not loaded."""

    def __init__(self, dit, name):
        dino = "dino" in str(name).lower()
        self.tokens, self.channels = dit.tokens, dit.channels
        self.mean = (0.485, 0.456, 0.406) if dino else (0.5,) * 3
        self.std = (0.229, 0.224, 0.225) if dino else (0.5,) * 3


# ------------------------------------------------------------------------------------------------
# The config and the initial values of a training, its export and its samples
# ------------------------------------------------------------------------------------------------

def open_init(args):
    """Open --init -> its weights and its ModelConfig; None, None without. It chooses --size and
    --latent. Raises UserError for flags that contradict the network."""
    if not args.init:
        return None, None
    args.init, = locate([("weights", args.init, "--init")])
    init = open_weights(args.init, "--init")
    config = model_config(init)
    k = config.dit
    shape = lambda row: (row.width, row.depth, row.heads)
    found = {"size": shape(k), **{flag: getattr(part, field) for flags, part in (
        (DIT_FLAGS, k), (LLM_FLAGS, config.llm)) for flag, field in flags.items()}}
    given = {**vars(args), "size": args.size and shape(SIZES[args.size])}
    for flag, value in found.items():
        if given[flag] is not None and given[flag] != value:
            raise UserError(f"--{flag.replace('_', '-')} asks for {given[flag]}, the network of "
                            f"--init {args.init} has {value}; leave the flag out")
    args.size = next((name for name, row in SIZES.items() if shape(row) == shape(k)),
                     "tiny" if k.width < 1024 else "2b")
    args.latent = "vae" if config.vae else args.latent
    return init, config


def alpha_of(args, dit):
    """Return the time shift that --shift asks for."""
    return flow.shift_alpha(dit.tokens, dit.channels, args.shift_base) if args.shift == "auto" \
        else args.shift


def asked(args, flags):
    """Return {field: value} of the given ones of `flags` {flag: field of a config}."""
    return {field: getattr(args, flag) for flag, field in flags.items()
            if getattr(args, flag) is not None}


def finetuned_config(args, config):
    """Return the config of --init's model with what the flags replace; say what they replace."""
    args.shift = config.alpha if args.shift is None else alpha_of(args, config.dit)
    new = dict(alpha=args.shift, encoder=args.encoder, decoder=args.decoder, vae=args.vae)
    for key, value in new.items():
        found, flag = getattr(config, key), "shift" if key == "alpha" else key
        if found and found != value:
            print(f"note: --init {args.init} was trained with --{flag} {found}, this run takes "
                  f"{value}", file=sys.stderr)
    return replace(config, **new)


def new_config(args, encoder, vae, tokenizer, files):
    """Return the ModelConfig that the flags ask for, without --init. files: of frozen_networks."""
    size = SIZES[args.size]
    name = size.llm if args.llm in (None, "random") else args.llm
    located = isinstance(files, dict) and args.llm != "random"
    folder = Path(files["llm"] if located else name)
    dit = replace(DiTConfig(
        channels=(vae or encoder).channels, tokens=encoder.tokens, width=size.width,
        depth=size.depth, heads=size.heads, null=args.cond_drop > 0), **asked(args, DIT_FLAGS))
    if args.size == "tiny":
        llm = replace(TINY_LLM, vocab_size=tokenizer.get_vocab_size())
    elif (folder / "config.json").is_file():
        published = read_json(folder / "config.json", "--llm")
        llm = llm_config(published, f"--llm {name}",
                         None if args.random_init else tokenizer.get_vocab_size())
    else:
        llm = QWEN_7B if "7b" in name.lower() else QWEN_1_5B
    llm = replace(llm, **asked(args, LLM_FLAGS))
    return ModelConfig(dit, llm, encoder.channels, alpha_of(args, dit), args.encoder, args.decoder,
                       args.vae)


def initial_rows(model, initial, args, init, files, tokenizer, new=()):
    """Return rows(name, first, last) of the initial weights: those of --init (`init`, opened), else
    a pretrained LLM's, and for the rest initial(name, shape, seed). new: parts of the names of
    parameters that a fork adds, which these files may lack."""
    drawn = parallel.initial_rows(model, initial, args.seed)
    if init:
        source, own, added = init.renamed(our_stage2_key), ("llm.", "dit."), ()
    elif args.size == "tiny" or args.random_init or args.llm == "random":
        return drawn
    else:
        source = llm_source(files["llm"], tokenizer).renamed(lambda k: "llm." + k)
        own, added = ("llm.",), ("latent_queries", "projector")     # what the file has and lacks
    optional = lambda key: not key.startswith(own) or any(a in key for a in (*added, *new))
    tied = ("lm_head.weight",) if model.llm.config.tie_word_embeddings else ()
    return rows_for(model, source, drawn, optional, RECOMPUTED + tied)


def export(run, model, named, ema, tokenizer):
    """Write final/: the weights and their averages in the released layout, and the tokenizer."""
    for name in ("model", "ema") if ema else ("model",):
        with training.with_ema(named, ema if name == "ema" else {}):
            state = {stage2_key(k): v for k, v in model.state_dict().items()}
            state.pop(None, None)                               # REPA's projector
            run.export(name, state, run.config)
    if run.main:
        chat.save_tokenizer(tokenizer, run.dir / ".writing-final")
        print(f"{run.publish()} written; samples: {run.dir}/samples")


@torch.no_grad()
def draw(model, tokenizer, decode, prompts, seed, args, devices, bar=None):
    """Draw prompts with the model in training (train_dit.ScaleRAE) -> images [P,3,S,S]. The seed
    fixes the noise. bar: the title of a progress bar."""
    k, main = model.dit.config, devices.main
    steps = tqdm(total=args.sample_steps, desc=bar, disable=not (bar and main), ncols=80)

    def on_step():
        parallel.step_done(devices)
        steps.update()
    with parallel.unsharded(model), steps:
        model.eval()                                    # a fork may have dropout
        noise = torch.stack([flow.noise_for(p, seed, k.tokens, k.channels) for p in prompts])
        cond = direct_condition(model.llm, tokenizer, prompts, devices.device)
        parallel.step_done(devices)
        z = flow.sample(model.dit, cond, noise.to(devices.device), model.alpha, args.sample_steps,
                        args.guidance, on_step=on_step)
        model.train()
    return parallel.full_tensor(decode(z))                      # by every process
