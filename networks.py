"""The frozen networks, loaded from published files and from ours: encoder, decoder, VAE, and the
networks of stage 1's losses. Each is built on the meta device and filled from its file. At the end,
the networks that each trainer loads at its start.
"""
import math
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

import chat
import parallel
from cli import UserError, parsing
from decoder import Decoder, DecoderConfig
from dit import SIZES
from encoder import (ENCODERS, SO400M, WEBSSL_300M, ViT, ViTConfig, build_vit, our_key, vit_config)
from encoder import initial as init_encoder
from losses import DiscConfig, Discriminator, Perceptual
from losses import initial as init_discriminator
from training import start_table, state_gb
from vae import VAE, VAEConfig
from vae import initial as init_vae
from weights import (HUB, TINY, TINY_ENCODER, Weights, check_config, in_memory, load, locate,
                     model_folder, open_weights, portable_path, read_fields, read_json, rows_for,
                     weights_of)


def load_encoder(path, devices):
    """Load a frozen encoder in the compute dtype: a file of ours, a published folder, or the name
    of an encoder that needs no weights (a str; files and folders are a Path)."""
    if path in ENCODERS:
        model = ENCODERS[path]({}, devices.dtype).to(devices.device)
        if any(True for _ in model.parameters()):       # they would be other ones at every start
            raise UserError(f"--encoder {path}: this encoder has weights; give their file, folder "
                            f"(./{path}) or hub id")
        return model
    source = open_weights(path, "--encoder")
    config = source.config.get("vision_config", source.config)
    kind = config.get("model_type", "siglip_vision_model") if isinstance(config, dict) else None
    if str(kind) not in ENCODERS:
        raise UserError(f"{source.what}: model_type is {kind!r}; known are "
                        f"{', '.join(sorted(ENCODERS))}")
    if ENCODERS[kind] is build_vit:             # another encoder's file has that encoder's own keys
        with parsing(source.what):
            read_fields(ViTConfig, vars(vit_config(source.config)), source.what)
        source = source.renamed(partial(our_key, dino=kind == "dinov2"))
    check_config(config, dict(num_hidden_layers=source.depth("blocks"),
                              hidden_size=source.size("patch_embed.weight"),
                              intermediate_size=source.size("blocks.0.mlp.fc1.weight")),
                 source.what)
    with parsing(source.what), torch.device("meta"):
        model = ENCODERS[kind](source.config, devices.dtype)
    model = load(model, source, devices)
    processor = Path(path) / "preprocessor_config.json"
    if processor.is_file():                                     # of a published folder
        with parsing(source.what, processor):
            found = read_json(processor, source.what).get("resample", model.resample)
            model.resample = int(Image.Resampling(found))
    return model


def load_decoder(path, devices, encoder, flag="--decoder"):
    """Load a frozen decoder in the compute dtype for the latents of `encoder`, which gives their
    shape and the normalisation (a published config does not hold them)."""
    source = open_weights(path, flag)
    if any(k.startswith("decoder.decoder_") for k in source.shapes):
        source = diffusers_decoder(source)
    ends = ("decoder_embed.weight", "decoder_layers.0.intermediate.dense.weight",
            "decoder_pred.weight")
    if lacks := [k for k in ends if k not in source.shapes]:
        raise UserError(f"{source.what} is not a decoder: it lacks {', '.join(lacks)}")
    (W, C), (hidden, _), (pixels, _) = (source.shapes[k] for k in ends)     # [W,C], [h,W], [3pp,W]
    if C != encoder.channels:
        raise UserError(f"{source.what} takes latents of {C} channels, the encoder gives "
                        f"{encoder.channels}; give the decoder of this encoder")
    config = source.config
    found = dict(decoder_hidden_size=W, decoder_intermediate_size=hidden,
                 decoder_num_hidden_layers=source.depth("decoder_layers"))
    check_config(config, found, source.what)
    patch = math.isqrt(pixels // 3)
    given = {k: v for k, v in config.items() if k in DecoderConfig.__dataclass_fields__}
    values = {"decoder_num_attention_heads": 16, "image_mean": encoder.mean,
              "image_std": encoder.std, **given, **found, "hidden_size": C,
              "num_patches": encoder.tokens, "patch_size": patch,
              "image_size": patch * math.isqrt(encoder.tokens)}
    values = read_fields(DecoderConfig, values, source.what)
    with torch.device("meta"):
        model = Decoder(values, devices.dtype)
    return load(model, source, devices)


def diffusers_decoder(source):
    """Give a file of diffusers' AutoencoderRAE the released keys, without its encoder. The
    normalisation of its images is in the file. Raises UserError if it also normalises the latent.
    """
    config = dict(source.config)
    for key, neutral in (("_latents_mean", 0), ("_latents_std", 1)):
        if key in source.shapes and (source.rows(key) != neutral).any():
            raise UserError(f"{source.what}: it normalises the latent ({key}), which this code "
                            "does not; give a decoder of the plain latent")
    for ours, theirs in (("image_mean", "encoder_mean"), ("image_std", "encoder_std")):
        if theirs in source.shapes:
            config[ours] = source.rows(theirs).flatten().tolist()
    return Weights(source.what, config, source.renamed(diffusers_decoder_key).pieces)


def diffusers_decoder_key(key):
    """Return the released key of a parameter of diffusers' decoder, None for all others."""
    if not key.startswith(("decoder.decoder_", "decoder.trainable_cls_token")):
        return None
    key = key.removeprefix("decoder.").replace(".attention.to_out.0.", ".attention.output.dense.")
    for theirs, ours in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        key = key.replace(f".attention.{theirs}.", f".attention.attention.{ours}.")
    return key


def note_pair(decoder, encoder, flag="--decoder"):
    """Say so if a decoder was trained for another encoder than the one in use (names; a hub id may
    lie in a folder of its name)."""
    theirs, used = portable_path(decoder.config.encoder or ""), portable_path(str(encoder))
    hub_id = theirs != TINY_ENCODER and not Path(theirs).is_absolute()
    if theirs and theirs != used and not (hub_id and Path(theirs).name == Path(used).name):
        print(f"note: {flag} was trained for the encoder {theirs}, this one is {used}",
              file=sys.stderr)


def vae_inside(path):
    """Return the place of the VAE in a run folder or a published one, else the path itself."""
    path = weights_of(path)
    return next((p for p in (path / "vae", path / "ae.safetensors") if p.exists()), path)


def load_vae(path, devices, flag="--vae"):
    """Load FLUX's VAE: ae.safetensors, diffusers' file, a folder with either or with vae/, or a
    run. A file without a config is FLUX.1's."""
    source = open_weights(vae_inside(path), flag)
    if any(k.startswith("decoder.up.") for k in source.shapes):
        source = from_ldm(source)
    values = {k: v for k, v in source.config.items() if k in VAEConfig.__dataclass_fields__}
    blocks = source.depth("encoder.down_blocks.0.resnets")
    check_config(values, dict(layers_per_block=blocks), source.what)
    config = read_fields(VAEConfig, values, source.what)
    with parsing(source.what), torch.device("meta"):
        model = VAE(config)
    return load(model, source, devices)


# Names in ae.safetensors (latent diffusion's) -> diffusers' names
FROM_LDM = [
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"\.norm_out\.", r".conv_norm_out."),
]


def from_ldm(source):
    """Give a file in ae.safetensors' layout diffusers' keys and shapes."""
    levels, state = source.depth("decoder.up"), {}
    for key in source.shapes:
        value = source.rows(key)
        for pattern, words in FROM_LDM:
            key = re.sub(pattern, words, key)
        # the original numbers the decoder's levels by resolution, diffusers in running order
        key = re.sub(r"(up_blocks\.)(\d+)", lambda m: m[1] + str(levels - 1 - int(m[2])), key)
        if ".attentions." in key and value.dim() == 4:          # 1x1 convolution -> Linear
            value = value[:, :, 0, 0]
        state[key] = value
    return Weights(source.what, source.config, in_memory(state))


def vgg_files(args, tiny, lpips=True):
    """Return what `locate` needs for the perceptual net. lpips False: Gram terms alone."""
    lpips = lpips and (args.lpips_weights or (None if tiny or args.vgg else "vgg.pth"))
    vgg = args.vgg or (TINY / "vgg.safetensors" if tiny else "vgg16-397923af.pth")
    return [("VGG16", vgg, "--vgg")] + [("LPIPS", lpips, "--lpips-weights")] * bool(lpips)


def load_perceptual(vgg, lpips, devices, needed=True):
    """Load torchvision's VGG16 and the `lin*` of LPIPS v0.1 (lpips None: they are in `vgg`, or in
    their usual place). The first convolution tells the width. A net of full width must have
    `lin*`, unless they are not `needed`; a narrower one keeps 1/C."""
    source = open_weights(vgg, "--vgg")
    whole = source.size("features.0.weight") >= 64
    if needed and whole and not lpips and not any(k.startswith("lin") for k in source.shapes):
        lpips, = locate([("LPIPS", "vgg.pth", "--lpips-weights")])
    pieces = {k: v for k, v in source.pieces.items() if not k.startswith("classifier.")}
    what = source.what
    if lpips:
        more = open_weights(lpips, "--lpips-weights")
        pieces, what = {**pieces, **more.pieces}, f"{what}, {more.what}"
    source = Weights(what, source.config, pieces)
    if "features.0.weight" not in source.shapes:
        raise UserError(f"{what}: no key features.0.weight; expected torchvision's VGG16 layout")
    with torch.device("meta"):
        model = Perceptual(source.size("features.0.weight") / 64, devices.dtype)
    fallback = {} if needed and whole else {
        k: torch.full(v.shape, 1 / v.shape[1]) for k, v in model.state_dict().items()
        if k.startswith("lin")}
    return load(model, source, devices, fallback)


def load_discriminator(path, devices, seed=0):
    """Load a DINO trunk, with new heads. A file without a config is DINO ViT-S/16."""
    source = open_weights(path, "--dino")
    config = read_fields(DiscConfig, source.config, source.what)
    check_config(asdict(config), dict(depth=source.depth("blocks"),
                                      dim=source.size("cls_token", 2)), source.what)
    with parsing(source.what), torch.device("meta"):
        model = Discriminator(config)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    drawn = parallel.initial_rows(
        model, lambda key, *_: init_discriminator(key, shapes, seed), seed)
    rows = rows_for(model, source.renamed("dino.{}".format), drawn,
                    lambda key: key.startswith("heads."))
    return parallel.build(model, rows, devices)


# ------------------------------------------------------------------------------------------------
# train_decoder.py
# ------------------------------------------------------------------------------------------------

def stage1_networks(args, devices):
    """Load the frozen encoder, the perceptual network and the discriminator of train_decoder.py ->
    the three, and {what: the file it came from}.

    The VAE has no encoder, and a loss of weight 0 no network: None. A dry run at a paper's size
    builds the published shapes on the meta device, without files.
    """
    tiny, vae, wants_vgg = args.size == "tiny", args.latent == "vae", args.lpips or args.gram
    if not (args.encoder or vae):
        args.encoder = TINY_ENCODER if tiny and args.latent == "siglip2" else HUB[args.latent][0]
    encoder = vgg = disc = None
    if args.dry_run and not tiny:
        with torch.device("meta"):
            if not vae:
                encoder = ViT(WEBSSL_300M if args.latent == "webssl" else SO400M, devices.dtype)
            if wants_vgg:
                vgg = Perceptual(dtype=devices.dtype)
            if args.gan:
                disc = Discriminator()
        return encoder, vgg, disc, "published shapes"
    wanted = [] if vae else [("encoder", args.encoder, "--encoder")]
    wanted += vgg_files(args, tiny, args.lpips) if wants_vgg else []
    if args.gan:
        dino = args.dino or (TINY / "dino.safetensors" if tiny else "dino_vitsmall16_pretrain.pth")
        wanted.append(("DINO", dino, "--dino"))
    files = {what: path for (what, _, _), path in zip(wanted, locate(wanted))}
    if not vae:
        encoder = load_encoder(files["encoder"], devices)
    if wants_vgg:
        vgg = load_perceptual(files["VGG16"], files.get("LPIPS"), devices, args.lpips > 0)
    if args.gan:
        disc = load_discriminator(files["DINO"], devices, args.seed).eval()
    return encoder, vgg, disc, files


def load_init(path, config, encoder, devices):
    """Load the decoder (or, without an encoder, the VAE) of --init to train it.

    The file's config says more than the flags (normalisation, eps), so the network keeps it. Raises
    UserError if the flags, which made `config`, ask for another network.
    """
    place, = locate([("weights", path, "--init")])
    model = (load_decoder(place, devices, encoder, "--init") if encoder else
             load_vae(place, devices, "--init"))
    own = ("encoder", "image_mean", "image_std", "layer_norm_eps", "scaling_factor", "shift_factor")
    differ = [f"{k} {v!r}, not {getattr(config, k)!r}" for k, v in vars(model.config).items()
              if k not in own and v != getattr(config, k)]
    if differ:
        raise UserError(f"--init {path} has {', '.join(differ)}; choose --size and --patch to "
                        "match")
    if encoder:
        model.config = replace(model.config, encoder=config.encoder)
    for name, p in model.named_parameters():
        p.requires_grad_(name != "decoder_pos_embed")
    return model.train()


def describe_stage1(args, devices, model, encoder, vgg, disc, resolution, **rows):
    """Print the start-up table of train_decoder.py -> FLOPs per image of a step, by network."""
    forward = model.forward_flops() if encoder else model.forward_flops(resolution)
    flops = {"encoder": encoder.forward_flops()} if encoder else {}
    flops["decoder"] = 3 * forward                      # forward and backward
    if vgg:                                             # both images, and back to one
        flops["vgg"] = 3 * vgg.forward_flops(resolution)
    if disc:                # forward and back to the image; a fresh reconstruction and the real one
        trunk, heads = disc.forward_flops()
        flops["discriminator"] = forward + 4 * trunk + 8 * heads
        rows["starts"] = dict(discriminator=args.disc_start, gan=args.gan_start)
    parts = {"decoder": model, "discriminator": disc and disc.heads, "encoder (frozen)": encoder,
             "vgg (frozen)": vgg, "dino (frozen)": disc and disc.dino}
    count = {k: sum(p.numel() for p in net.parameters()) for k, net in parts.items() if net}
    frozen = sum(n for k, n in count.items() if "frozen" in k)
    start_table(f"train_decoder --size {args.size}", args, devices, count, flops,
                state_gb(sum(count.values()) - frozen, frozen, args.ema), resolution=resolution,
                loss={k: getattr(args, k) for k in ("l1", "lpips", "gram", "gan", "kl")}, **rows)
    return flops


# ------------------------------------------------------------------------------------------------
# train_dit.py
# ------------------------------------------------------------------------------------------------

def frozen_networks(args, init, devices):
    """Load the frozen networks -> encoder, VAE or None, decoder or None, tokenizer, {name: file}.

    Flags come first, then the model of --init, then the size's own. --dry-run and --random-init of
    a published size take its shapes: no file is needed.
    """
    tiny, vae = args.size == "tiny", args.latent == "vae"
    if not tiny and (args.dry_run or args.random_init):
        with torch.device("meta"):
            encoder = ViT(WEBSSL_300M if args.latent == "webssl" else SO400M, devices.dtype)
            vae = VAE() if vae else None
        if args.random_init and not args.dry_run:
            for part, initial in ((encoder, init_encoder), (vae, init_vae)):
                if part:
                    rows = parallel.initial_rows(part, initial, args.seed)
                    parallel.build(part, rows, devices).requires_grad_(False)
        files = "published shapes" if args.dry_run else "random weights: for timing only"
        return encoder, vae, None, chat.load_tokenizer(TINY), files
    llm = args.llm or (model_folder(args.init) if init else SIZES[args.size].llm)
    codec = ("vae", args.vae, "--vae") if vae else ("decoder", args.decoder, "--decoder")
    wanted = [("encoder", args.encoder, "--encoder"), codec,
              ("llm", TINY if llm in ("tiny", "random") else llm, "--llm")]
    files = dict(zip((w[0] for w in wanted), locate(wanted)))
    encoder = load_encoder(files["encoder"], devices)
    tokenizer = chat.load_tokenizer(files["llm"])
    if vae:
        vae, decoder = load_vae(files["vae"], devices), None
    else:
        vae, decoder = None, load_decoder(files["decoder"], devices, encoder)
        if devices.main:
            note_pair(decoder, args.encoder)
    return encoder, vae, decoder, tokenizer, files
