"""Pieces of a training loop that the trainers share: batch sizes, the start-up table, learning
rates, averages of the weights, the meter of losses and speed, grids of images.
"""
import collections
import contextlib
import json
import math
import shlex
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import parallel
from cli import DataError, UserError, table

# ------------------------------------------------------------------------------------------------
# Before the loop
# ------------------------------------------------------------------------------------------------

def check_batch(args, devices, each=None):
    """Fill --micro-batch: the whole batch, or at most `each` images per device. Raises UserError
    for sizes that do not divide."""
    if args.compile and devices.target == "xla":
        raise UserError("--compile: not on xla, whose compiler takes the whole step; leave it out")
    n = devices.axes["fsdp"]
    most = min(args.batch, each * n if each else args.batch)
    args.micro_batch = args.micro_batch or next(
        (b for b in range(most - most % n, 0, -n) if args.batch % b == 0), args.batch)
    if args.batch % args.micro_batch or args.micro_batch % n:
        raise UserError(f"--batch {args.batch} must be a multiple of --micro-batch "
                        f"{args.micro_batch}, and that of the {n} devices of --mesh's fsdp axis")


def state_gb(trained, frozen, ema):
    """Return the memory of one device's state by part in GB, from the numbers of parameters that it
    stores: fp32 weights, gradients, two moments, average."""
    parts = {"weights": 4 * (trained + frozen), "gradients": 4 * trained, "moments": 8 * trained,
             "ema": 4 * trained if ema else 0}
    return {k: v / 1e9 for k, v in {**parts, "total": sum(parts.values())}.items()}


def costs(model, encoder, vae, batch, args, devices):
    """Return what a training takes -> parameters by network, training FLOPs per image by network
    for a typical batch, GB of one device's state. model: train_dit.ScaleRAE."""
    parts = {"dit": model.dit, "llm": model.llm, "encoder (frozen)": encoder, "vae (frozen)": vae,
             "repa": getattr(model, "repa", None)}
    count = {k: sum(p.numel() for p in part.parameters()) for k, part in parts.items() if part}
    length, labelled = batch["ids"].shape[1], batch["where"].shape[1]
    flops = {"dit": model.dit.train_flops(), "encoder": encoder.forward_flops(),
             "llm": model.llm.train_flops(length, labelled, args.freeze)}
    if vae:
        flops["vae"] = vae.forward_flops(batch["images"].shape[-1], decode=False)
    if args.repa:
        flops["repa"] = 6 * model.dit.config.tokens * count["repa"]
    stored = {train: sum(parallel.local_numel(k, p.shape, devices)
                         for k, p in model.named_parameters() if p.requires_grad == train)
              for train in (True, False)}
    frozen = stored[False] + count.get("vae (frozen)", 0) + (
        sum(parallel.local_numel(k, p.shape, devices) for k, p in encoder.named_parameters())
        if devices.target == "xla" else count["encoder (frozen)"])      # FSDP2 leaves it whole
    return count, flops, state_gb(stored[True], frozen, args.ema)


def trained_and_frozen(model, count):
    """Return the numbers of trained and of frozen parameters by network. count: all, by network.
    The DiT's table of positions counts as frozen."""
    trained = {part: sum(p.numel() for p in net.parameters() if p.requires_grad)
               for part, net in model.named_children()}
    frozen = {part.removesuffix(" (frozen)"): n - trained.get(part, 0) for part, n in count.items()}
    return trained, {part: n for part, n in frozen.items() if n}


# How the start-up table shows values whose names hold their unit.
UNITS = {"train_tflop_per_image": ("training per image", "TFLOP"),
         "memory_gb_per_device": ("state per device", "GB")}


def start_table(title, args, devices, parameters, flops, memory, **rows):
    """Print what was derived: a table, or one object with --dry-run --json. parameters: by group;
    flops: of a training image by part; memory: of `state_gb`; rows: the script's own."""
    plain = devices.target == "cpu" and devices.dtype == torch.bfloat16
    summary = dict(
        parameters={**parameters, "total": sum(parameters.values())}, images_per_step=args.batch,
        images_at_a_time=args.micro_batch,
        train_tflop_per_image={k: v / 1e12 for k, v in flops.items()},
        memory_gb_per_device=memory, device=str(devices),
        dtype=str(devices.dtype).removeprefix("torch."),
        attention="plain products" if plain else "torch scaled_dot_product_attention", **rows)
    if args.dry_run and args.json:
        print(json.dumps(summary, default=str))
    elif devices.main:
        shown = {k: v for k, v in summary.items() if v is not None}
        for key, (name, unit) in UNITS.items():
            shown[key] = {k: f"{v:.3g} {unit}" for k, v in shown[key].items()}
        table(title, [(UNITS.get(k, (k, ""))[0], v) for k, v in shown.items()])
    gpus = torch.cuda.device_count() if devices.kind == "cuda" else 1
    if gpus > devices.count and devices.main:
        print(f"note: {gpus - devices.count} of {gpus} GPUs are idle; all of them: torchrun "
              f"--standalone --nproc-per-node {gpus} {shlex.join(sys.argv)}", file=sys.stderr)


def open_data(args, resolution, codec, crop, stand_in):
    """Open --data -> the mixture, its description, and the number of its records, None if it is
    endless. A dry run does without the data: the sources `stand_in` have texts of usual length."""
    try:
        mixture = data.Mixture(args.data, resolution, args.seed, crop, resample=codec.resample)
        sources = mixture.describe()
    except DataError as error:
        if not args.dry_run or args.epochs:
            raise
        print(f"planned without the data: {error}", file=sys.stderr)
        mixture = data.Mixture(stand_in, resolution, args.seed)
        sources = [dict(source=name, weight=weight, size=None)
                   for name, weight in zip(*data.parse_specs(args.data))]
    if endless := [s["source"] for s in sources if not isinstance(s["size"], int)]:
        if args.epochs:
            raise UserError(f"--epochs {args.epochs:g}: {endless[0]} is endless; give --steps")
        return mixture, sources, None
    return mixture, sources, len(mixture)


class FirstBatch:
    """--overfit: every batch holds the images of the first, with the same or fresh noise."""

    def __init__(self, mixture, batch, noise):
        self.mixture, self.batch, self.noise = mixture, batch, noise

    def __getitem__(self, n):
        record = self.mixture[n % self.batch]
        return {**record, "n": n} if self.noise == "fresh" else record


# ------------------------------------------------------------------------------------------------
# In the loop
# ------------------------------------------------------------------------------------------------

def cosine(step, steps, warmup, final=0.0):
    """Factor of the learning rate: linear warm-up over `warmup` steps, then cosine to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    x = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * x))


def set_lr(optimizers, factor, devices):
    """Set every group's learning rate to `factor` times its first one, whatever the optimizer."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            first = group.setdefault("initial_lr", group["lr"])
            group["lr"] = parallel.scalar(first * factor, devices.device)


# Dense bf16 peak by the device's name; the first match counts.
PEAK_TFLOPS = {"H100 PCIe": 756.5, "H100 NVL": 835.5, "H100": 989.4, "H200": 989.4, "A100": 312.0,
               "L40S": 362.0, "4090": 165.2}


def memory_gb(devices):
    """Return the peak memory of this process on its device in GB (cpu: resident), None on xla."""
    if devices.kind == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if devices.kind == "xla":
        return None
    import resource                                     # POSIX alone has it
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def peak_tflops(devices):
    """Return the dense bf16 peak of one device, or None if unknown (MFU is null then)."""
    if devices.kind != "cuda" or devices.dtype != torch.bfloat16:
        return None
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in devices.name), None)


class Meter:
    """Averages of the values since the last log line, and the speed. Values stay on the device
    until they are read: a sum there would be part of the next step's program."""

    def __init__(self):
        self.values, self.count, self.images, self.flops, self.wait = [], 0, 0, 0.0, 0.0
        self.start()

    def start(self):
        """Start the clock, also after samples and checkpoints, which do not count."""
        self.since = time.perf_counter()

    def add(self, weight=1.0, **values):
        """Take the values of a step or of a micro-batch. weight: its share of the step."""
        self.values.append((weight, {k: v.detach() for k, v in values.items()}))

    def step(self, images, flops):
        """Count a step: its images, and the training FLOPs of each."""
        self.count, self.images, self.flops = (
            self.count + 1, self.images + images, self.flops + images * flops)

    def loss(self):
        """Return the mean loss of this process, without starting again."""
        known = [(w, v["loss"].item()) for w, v in self.values if "loss" in v]
        return sum(w * v for w, v in known) / sum(w for w, _ in known)

    def read(self, devices):
        """Return the averages, each over the steps that have it, and start again."""
        sums, shares = {}, collections.Counter()
        for weight, values in self.values:
            for k, v in values.items():
                sums[k] = sums.get(k, 0) + weight * v.cpu()
                shares[k] += weight
        means = parallel.mean([(v / shares[k]).item() for k, v in sums.items()], devices)
        values = dict(zip(sums, means))
        seconds = time.perf_counter() - self.since
        tflops = self.flops / seconds / 1e12
        peak = peak_tflops(devices)
        values.update(images_per_s=self.images / seconds, tflops=tflops,
                      mfu=tflops / (peak * devices.count) if peak else None,
                      memory_gb=memory_gb(devices), data_wait_s=self.wait / self.count,
                      step_s=seconds / self.count)
        self.__init__()
        return values


def condition_sums(cond, answer):
    """Sum over the images to generate: cond, |cond|^2 and 1 -> [N*Z+2]."""
    w, c = answer.float()[:, None, None], cond.detach().float()
    return torch.cat([(c * w).sum(0).flatten(), (c.square() * w).sum()[None], w.sum()[None]])


def condition_spread(sums):
    """Standard deviation of the condition across the batch over its rms, from `condition_sums`.
    Near 0 the model ignores the text, which the loss hides."""
    c, square, n = sums[:-2], sums[-2], sums[-1]
    return (1 - c.square().sum() / (n * square).clamp(min=1e-12)).clamp(min=0).sqrt()


def start_ema(named, devices):
    """Start the EMA: copies {name: tensor}, split as the parameters are."""
    ema = {k: p.detach().clone() for k, p in named.items()}
    for k, average in ema.items():
        parallel.mark(k, average, devices)
    return ema


def ema_weight(decay, step):
    """Return 1 - decay. In the first steps the decay is lower, so that the initial weights do not
    dominate a short run."""
    return 1 - min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema, named, weight):
    """ema += weight (p - ema)"""
    for k, average in ema.items():
        average.lerp_(named[k], weight)


@contextlib.contextmanager
def with_ema(named, ema):
    """Swap the averages into the network, and back at the end."""
    swap(named, ema)
    yield
    swap(named, ema)


@torch.no_grad()
def swap(named, ema):
    for k, average in ema.items():
        keep = named[k].detach().clone()
        named[k].copy_(average)
        average.copy_(keep)


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------

def image_sheet(images, columns, space=2):
    """Images [n,3,H,W] -> one [3,H',W'], row by row, with white between them."""
    lack = -len(images) % columns
    x = torch.cat([images, torch.ones_like(images[:1]).expand(lack, -1, -1, -1)])
    x = F.pad(x, (0, space, 0, space), value=1).unflatten(0, (-1, columns))
    x = x.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)                # [3,rows*H,columns*W]
    return x[:, :x.shape[1] - space, :x.shape[2] - space]


def save_captioned(images, texts, path):
    """Write images [n,3,H,W] in [0,1] as one PNG, each above its text. Training goes on if a value
    is not finite, after a warning."""
    x = images.detach().float().cpu()
    if not x.isfinite().all():
        tqdm.write(f"WARNING: {path}: an image holds NaN or infinity", file=sys.stderr)
    x = (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)            # [n,H,W,3]
    sheet = data.contact_sheet(list(x.numpy()), texts, min(8, len(x)), max(128, x.shape[2]))
    sheet.save(path)


def check_colours(draw, seed, count, bar=None):
    """Draw `count` single shapes of the toy world that training has not seen -> shares of right
    backgrounds and object colours. bar: the title of a progress bar."""
    from tiny import judge, world
    scenes = judge.single_shapes(seed + 77, count)
    images = draw([world.caption(scene) for scene in scenes], 1, bar)
    background, colour = judge.colours_right(images, scenes)
    return dict(background_right=background, colour_right=colour)


def report_colours(draw, args, devices):
    """Check 128 shapes at the end of a run on toy data, and print the shares. By all processes."""
    score = check_colours(draw, args.seed, 128, "checking 128 toy shapes")
    if devices.main:
        print(f"128 unseen single shapes, guidance {args.guidance}: background right "
              f"{score['background_right']:.1%}, object colour right {score['colour_right']:.1%}")
