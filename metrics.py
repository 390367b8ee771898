"""Images to measure, and measures of them: PSNR, SSIM, Frechet distance, bootstrap intervals.

Images are [B,3,H,W] in [0,1].
"""
import collections

import numpy as np
import torch
import torch.nn.functional as F

import parallel
import weights
from cli import UserError, parsing, printable
from data import SkipCounter
from prompts import check_finite


def round8(x):
    """Round values in [0,1] as an image file stores them: clamped, 8 bits."""
    return (x.clamp(0, 1) * 255).round() / 255


def psnr(a, b):
    """Images [B,3,H,W], both rounded to 8 bits -> [B] in dB (100 for equal images)."""
    return -10 * (round8(a) - round8(b)).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()


def ssim_map(a, b, window=11, sigma=1.5, k1=0.01, k2=0.03):
    """Images [B,3,H,W] with sides >= 6 -> [B,3,H,W] (Wang et al. 2004): Gaussian window, images
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
    """Images [B,3,H,W] -> [B], the map's mean over space and channels (torchmetrics 1.x)."""
    return ssim_map(a, b).mean(dim=(1, 2, 3))


def frechet(a, b):
    """Features [n,d], [m,d] -> |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2).

    Computed in float64. The matrix under the root is symmetric, unlike S_a S_b of the usual form,
    and has the same eigenvalues. So eigenvalues are enough, and no root can turn complex.
    """
    a, b = a.double().cpu(), b.double().cpu()
    sa, sb = (torch.cov(x.T).reshape(x.shape[1], -1) for x in (a, b))       # [d,d]
    values, vectors = torch.linalg.eigh(sa)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sb @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + sa.trace() + sb.trace() - 2 * cross).item()


def interval(groups):
    """[values of a category, ...] -> (mean of the categories' means, low, high). The interval holds
    95 % of 2,000 bootstrap draws, which redraw each category's values with replacement."""
    rand, means = np.random.default_rng(0), []
    for values in map(np.asarray, groups):
        again = values[rand.integers(len(values), size=(2000, len(values)))]
        means.append(again.mean(1))
    low, high = np.percentile(np.mean(means, 0), (2.5, 97.5))
    return tuple(round(float(v), 4) for v in (np.mean([np.mean(g) for g in groups]), low, high))


# ------------------------------------------------------------------------------------------------
# Images to measure
# ------------------------------------------------------------------------------------------------

def images(mixture, count, devices, batch=64):
    """Yield the first `count` images of a mixture in batches [B,3,S,S] in [0,1]."""
    for x, _ in images_and_records(mixture, count, devices, batch):
        yield x


def images_and_records(mixture, count, devices, batch):
    """Yield (images [B,3,S,S], their records). Names broken records; raises DataError for many."""
    skips = SkipCounter(mixture.records)
    for start in range(0, count, batch):
        records = [mixture[i] for i in range(start, min(count, start + batch))]
        skips.update([s for r in records for s in r["skipped"]], len(records))
        images = torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records])
        yield parallel.to_device({"images": images}, devices)["images"].float() / 255, records


def image_count(mixture, wanted, least=1):
    """Return how many images to read: `wanted`, but no more than finite sources have together. In a
    mixture a small source may still repeat images. Raises UserError for fewer than `least`."""
    count = wanted if None in mixture.sizes else min(wanted, sum(mixture.sizes))
    if count < least:
        raise UserError(f"--data {' '.join(map(printable, mixture.names))} --count {wanted}: "
                        f"{count} image; a covariance needs at least {least}")
    return count


# ------------------------------------------------------------------------------------------------
# Reconstructions and generated images
# ------------------------------------------------------------------------------------------------

def measure(reconstruct, images, encoder, vgg, inception=None):
    """Batches of images -> {metric: tensor}: psnr, ssim and lpips [n], and the features of the
    images (real) and of their reconstructions (fake)."""
    rows = collections.defaultdict(list)
    for x in images:
        x_hat = round8(check_finite("the reconstruction", reconstruct(x)))
        rows["psnr"].append(psnr(x_hat, x).cpu())
        rows["ssim"].append(ssim(x_hat, x).cpu())
        if vgg:
            lpips = vgg.lpips(vgg.maps(x_hat), vgg.maps(x))
            rows["lpips"].append(check_finite("lpips", lpips.float().cpu()))
        add_features(rows, "real", x, encoder, inception)
        add_features(rows, "fake", x_hat, encoder, inception)
    return {k: torch.cat(v) for k, v in rows.items()}


def add_features(rows, kind, x, encoder, inception):
    """Append the pooled features of images to rows["real"] or rows["fake"] [B,C], and those of
    Inception, if it is given, to rows["real_inception"] or rows["fake_inception"] [B,2048]."""
    rows[kind].append(check_finite("the features", encoder(x).mean(1)).float().cpu())
    if inception:
        rows[f"{kind}_inception"].append(inception(x).float().cpu())


def distances(rows):
    """Return the Frechet distances in the encoder's features and in Inception's, or None."""
    fd_enc = frechet(rows["real"], rows["fake"])
    if "real_inception" not in rows:
        return fd_enc, None
    return fd_enc, frechet(rows["real_inception"], rows["fake_inception"])


def load_inception(path, devices):
    """Load --inception -> a function: images [B,3,H,W] -> [B,2048]. It is torch-fidelity's
    `inception-v3-compat` (the TensorFlow network of FID with its resizing). Raises UserError."""
    path, = weights.locate([("InceptionV3", path, "--inception")])
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f"--inception needs torch-fidelity ({error}): pip install torch-fidelity")
    weights.open_weights(path, "--inception")           # refuses code, which torch-fidelity runs
    with parsing(f"--inception {path}", path):
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    net.to(devices.device).eval()
    return lambda x: net((x * 255).round().byte())[0]
