"""Measure what was trained.

    python evaluate.py decoder                                          # the shipped tiny decoder
    python evaluate.py decoder --run runs/decoder-xl --data folder/ --count 50000

decoder: PSNR, SSIM, LPIPS and a Frechet distance of reconstructions of unseen pictures, a row a
source and one for all. FD-enc is taken in the features of a frozen encoder (--features), not of
Inception: it is no rFID, and compares only with another FD-enc in the same features on as many
pictures. --inception PATH adds the Frechet distance of the field, rFID, in features of InceptionV3.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import encoder as encoders
import parallel
import run as runs
import vae as vaes
import weights
from parallel import UserError

TINY_VGG = weights.ASSETS / "vgg.safetensors"
SMALL = " (small, trained on the built-in data by train_encoder.py; not the pretrained one)"


def vgg_files(args, tiny):
    """What weights.locate has to find for the perceptual net, by torchvision's and LPIPS' names."""
    lpips = args.lpips_weights or (None if tiny or args.vgg else "vgg.pth")
    return [("VGG16", args.vgg or (TINY_VGG if tiny else "vgg16-397923af.pth"), "--vgg")] + (
        [("LPIPS", lpips, "--lpips-weights")] if lpips else [])


def pictures(mixture, count, devices, batch=64):
    """The first `count` pictures of a stream, by batches [B,3,S,S] in [0,1]."""
    for start in range(0, count, batch):
        records = [mixture[i] for i in range(start, min(count, start + batch))]
        images = torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records])
        yield parallel.place({"images": images}, devices)["images"].float() / 255


# ------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------

def round8(x):
    """[0,1] as a picture file stores it: clamped, 8 bits."""
    return (x.clamp(0, 1) * 255).round() / 255


def psnr(a, b):
    """[B,3,H,W] in [0,1], both rounded to 8 bits -> [B] in dB (100 for equal pictures)."""
    return -10 * (round8(a) - round8(b)).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()


def ssim_map(a, b, window=11, sigma=1.5, k1=0.01, k2=0.03):
    """[B,3,H,W] in [0,1], sides >= 6 -> [B,3,H,W] (Wang et al. 2004): Gaussian window, pictures
    mirrored at the border."""
    x = torch.arange(window, device=a.device, dtype=torch.float64) - window // 2
    g = torch.exp(-x.square() / (2 * sigma ** 2))
    kernel = torch.outer(g, g) / g.sum() ** 2                               # [11,11]
    kernel = kernel.to(a.dtype).expand(a.shape[1], 1, -1, -1)

    def blur(y):
        return F.conv2d(F.pad(y, [window // 2] * 4, "reflect"), kernel, groups=y.shape[1])
    c1, c2, ma, mb = k1 ** 2, k2 ** 2, blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    return (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))


def ssim(a, b):
    """[B,3,H,W] in [0,1] -> [B], the map's mean over space and channels (torchmetrics 1.x)."""
    return ssim_map(a, b).mean(dim=(1, 2, 3))


def frechet(a, b):
    """Features [n,d], [m,d] -> |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2).

    float64. The matrix under the root is symmetric, unlike S_a S_b of the usual form, and has the
    same eigenvalues, so eigenvalues are all it takes and no root of it can turn complex.
    """
    a, b = a.double().cpu(), b.double().cpu()
    sa, sb = (torch.cov(x.T).reshape(x.shape[1], -1) for x in (a, b))       # [d,d]
    values, vectors = torch.linalg.eigh(sa)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sb @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + sa.trace() + sb.trace() - 2 * cross).item()


# ------------------------------------------------------------------------------------------------
# decoder
# ------------------------------------------------------------------------------------------------

def load_codec(args, devices):
    """-> reconstruct: [B,3,S,S] -> [B,3,S,S]; S; the encoder of the features; is it the tiny size?

    A decoder's config names its encoder; a published one has none: its width tells.
    """
    file = weights.final_of(args.run)
    config = weights.read_weights(file, "--run")[1]
    if "block_out_channels" in config:
        tiny = len(config["block_out_channels"]) < len(vaes.FLUX["block_out_channels"])
        name = args.features or (weights.TINY_CODEC[0] if tiny else weights.HUB["siglip2"][0])
        path, = weights.locate([("encoder for the features", name, "--features")])
        vae = weights.load_vae(file, devices, "--run")
        encoder = weights.load_encoder(path, devices)
        return lambda x: vae.decode(vae.encode(x)), 64 if tiny else 256, encoder, tiny
    by_width = {encoders.SO400M["hidden_size"]: weights.HUB["siglip2"][0],
                encoders.WEBSSL_300M["hidden_size"]: weights.HUB["webssl"][0]}
    name = config.get("encoder", by_width.get(config.get("hidden_size"), weights.TINY_TOWER))
    tiny = name == weights.TINY_TOWER or config.get("image_size", 224) <= 64
    name = args.encoder or (weights.TINY_CODEC[0] if name == weights.TINY_TOWER else name)
    wanted = [("encoder", name, "--encoder")]
    wanted += [("encoder for the features", args.features, "--features")] * bool(args.features)
    paths = weights.locate(wanted)
    encoder = weights.load_encoder(paths[0], devices, config.get("layers", 1))
    decoder = weights.load_decoder(file, devices, encoder.channels, encoder.mean, encoder.std)
    features = weights.load_encoder(paths[1], devices) if args.features else encoder
    resolution = decoder.patch * decoder.grid
    return lambda x: decoder(decoder.normalise(encoder(x))), resolution, features, tiny


def load_inception(path, devices):
    """--inception -> f: [B,3,H,W] in [0,1] -> [B,2048], torch-fidelity's `inception-v3-compat` (the
    TensorFlow network of FID, its resizing included). Raises UserError."""
    path, = weights.locate([("InceptionV3", path, "--inception")])
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f"--inception {path} needs torch-fidelity ({error}): pip install "
                        "torch-fidelity, or leave the flag out")
    weights.read_weights(path, "--inception")           # tensors alone: theirs would run code
    with weights.user_errors(f"--inception {path}"):
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    net.to(devices.device).eval()
    return lambda x: net((x * 255).round().byte())[0]


@torch.no_grad()
def measure(reconstruct, images, features, vgg, inception=None):
    """Batches of pictures -> {metric: tensor}: psnr, ssim, lpips [n] and the features of both."""
    rows = {}
    for x in images:
        x_hat = round8(reconstruct(x))
        row = dict(psnr=psnr(x_hat, x), ssim=ssim(x_hat, x), real=features(x).mean(1),  # [B,C]
                   fake=features(x_hat).mean(1))
        if inception:
            row.update(real_inception=inception(x), fake_inception=inception(x_hat))    # [B,2048]
        if vgg:
            row["lpips"] = vgg.lpips(vgg.maps(x_hat), vgg.maps(x))
        for k, v in row.items():
            rows.setdefault(k, []).append(v.float().cpu())
    return {k: torch.cat(v) for k, v in rows.items()}


def summary(rows):
    """{metric: tensor} -> the numbers of a table's row."""
    return dict(images=len(rows["psnr"]), psnr=rows["psnr"].mean().item(),
                ssim=rows["ssim"].mean().item(),
                lpips=rows["lpips"].mean().item() if "lpips" in rows else None,
                fd_enc=frechet(rows["real"], rows["fake"]),
                rfid=frechet(rows["real_inception"], rows["fake_inception"])
                if "real_inception" in rows else None)


def decoder(args):
    """Reconstruct unseen pictures (ADM's centre crop) and print the errors."""
    devices = parallel.setup(args.device, args.dtype)
    mixtures = {}
    for spec in args.data:                              # bad data is said before weights are read
        name = data.parse_spec(spec)[0]
        mixtures[name] = data.Mixture([spec], 64, args.seed, crop="center", text=False)
    inception = load_inception(args.inception, devices) if args.inception else None
    reconstruct, resolution, features, tiny = load_codec(args, devices)
    vgg, note = None, "left out (--no-lpips)"
    if args.lpips and tiny and not args.vgg and not TINY_VGG.is_file():
        note = f"left out: {TINY_VGG} is not there (train_encoder.py --arch vgg makes it)"
    elif args.lpips:
        paths = weights.locate(vgg_files(args, tiny))
        vgg = weights.load_perceptual(paths[0], paths[1] if len(paths) > 1 else None, devices)
        note = str(paths[0]) + SMALL * (vgg.width < 1)
    print(f"reconstructions by {args.run}, {resolution} px, on {devices}\nLPIPS net: {note}\n")
    header = f"{'source':<28}{'images':>8}{'PSNR dB':>9}{'SSIM':>8}{'LPIPS':>8}{'FD-enc':>10}"
    header += f"{'rFID':>10}" if inception else ""
    print(header)
    results, everything = {}, {}

    def show(name, rows):
        r = results[name] = summary(rows)
        lpips = "-" if r["lpips"] is None else f"{r['lpips']:.4f}"
        print(f"{name[-27:]:<28}{r['images']:>8}{r['psnr']:>9.2f}{r['ssim']:>8.4f}{lpips:>8}"
              f"{r['fd_enc']:>10.4f}" + (f"{r['rfid']:>10.4f}" if inception else ""), flush=True)
    for name, mixture in mixtures.items():
        mixture.resolution = resolution
        count = min(args.count, mixture.size(0) or args.count)
        rows = measure(reconstruct, pictures(mixture, count, devices, args.batch), features, vgg,
                       inception)
        for k, v in rows.items():
            everything.setdefault(k, []).append(v)
        show(name, rows)
    if len(mixtures) > 1:
        show("all", {k: torch.cat(v) for k, v in everything.items()})
    last = results.pop("all", None) or next(iter(results.values()))
    print(json.dumps({"task": "decoder", "run": str(args.run), "lpips_net": note, "seed": args.seed,
                      **last, "sources": results}))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    tasks = p.add_subparsers(dest="task", required=True)
    q = tasks.add_parser("decoder", help=decoder.__doc__)
    q.set_defaults(function=decoder)
    q.add_argument("--run", type=Path, default=weights.TINY_CODEC[1],
                   help="run folder, file or released folder of a decoder or a VAE")
    q.add_argument("--encoder", help="of the decoder (default: the one its config names)")
    q.add_argument("--features", help="encoder whose features FD-enc uses (default: the decoder's)")
    q.add_argument("--vgg", help="torchvision's VGG16 (tiny: assets/tiny/vgg.safetensors)")
    q.add_argument("--lpips-weights", help="LPIPS v0.1 lin0..4, where --vgg's file lacks them")
    q.add_argument("--inception", help="InceptionV3 of torch-fidelity "
                   "(pt_inception-2015-12-05-6726825d.pth): adds rFID")
    q.add_argument("--lpips", action=argparse.BooleanOptionalAction, default=True)
    q.add_argument("--data", nargs="+", metavar="SOURCE",
                   default=["builtin:web", "builtin:synthetic", "builtin:text"])
    q.add_argument("--count", type=runs.positive(), default=500, help="pictures of each source")
    q.add_argument("--batch", type=runs.positive(), default=50)
    q.add_argument("--seed", type=runs.positive(zero=True), default=2000,
                   help="of the pictures (trainings use small ones)")
    q.add_argument("--device", choices=["auto", "cpu", "cuda", "xla"], default="auto")
    q.add_argument("--dtype", choices=["bfloat16", "float32"])
    args = p.parse_args()
    if args.count < 2:
        raise UserError(f"--count {args.count}: a covariance needs 2 pictures or more")
    args.function(args)


if __name__ == "__main__":
    runs.main(main)
