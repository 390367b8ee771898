"""Figures of results/, drawn from the shipped model: python reproduce.py figure-NAME."""
import textwrap
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import best_of
import flow
import parallel
import stage2
import weights
from text_model import direct_condition
from tiny import benchmark, judge, world

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

RESULTS = Path(__file__).parent.parent / "results"
FROZEN, TRAINED, INK = "#dbe4ee", "#ffd9a8", "#333333"
PROMPT = "a red star left of a blue circle on a light green background"


class Shipped:
    """The shipped model with its encoder and decoder, in float32 on the CPU."""

    def __init__(self):
        devices = parallel.setup("cpu", "float32")
        self.model = stage2.load_run(weights.TINY, devices)
        args = Namespace(run=weights.TINY, encoder=None, decoder=None)
        self.encoder, self.decode = stage2.load_codec(self.model.config, args, devices)
        scenes = [world.scene("builtin:web", 2000, k) for k in range(128)]
        z = self.encoder(judge.scene_images(scenes, 64)).flatten(0, 1)      # [128*N,C]
        self.mean = z.mean(0)
        self.axes = torch.linalg.svd(z - self.mean, full_matrices=False)[2][:3].T       # [C,3]
        self.scale = 2 * ((z - self.mean) @ self.axes).std(0)               # [3]

    def colours(self, z):
        """Show a latent [N,C] by its first three principal components as RGB: [8,8,3]."""
        side = round(len(z) ** 0.5)
        rgb = 0.5 + 0.5 * (z - self.mean) @ self.axes / self.scale
        return rgb.clamp(0, 1).unflatten(0, (side, side)).numpy()

    def walk(self, prompt, seeds, guidance=5.0, steps=50):
        """Draw latents of a prompt, one per seed -> [n,N,C], and the walk: [(t, x_t, estimate of
        the clean latent), ...] from noise to image."""
        dit, alpha = self.model.dit, self.model.config.alpha
        N, C = dit.config.tokens, dit.config.channels
        cond = direct_condition(self.model.llm, self.model.tokenizer, [prompt], "cpu")
        noise = torch.stack([flow.noise_for(prompt, seed, N, C) for seed in seeds])
        seen = []

        def velocity(x, t):
            time = torch.tensor([t], dtype=torch.float32)
            v = flow.guide(dit(x, time, cond), dit(x, time, dit.null_condition()), guidance)
            seen.append((t, x, x - t * v))                  # x_t - t v is the estimate of z
            return v
        z = flow.integrate(velocity, noise, flow.sampling_times("euler", steps, alpha))
        return z, [*seen, (0.0, z, z)]


def picture(image):
    """[3,H,W] in [0,1] -> what matplotlib shows."""
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def show(axis, image, title="", frame=None, below=""):
    axis.imshow(image, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(below, fontsize=8)
    for side in axis.spines.values():
        side.set(color=frame or "#bbbbbb", linewidth=2.5 if frame else 0.8)


def save(figure, name):
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)
    print(RESULTS / f"{name}.png")


# ------------------------------------------------------------------------------------------------
# Method
# ------------------------------------------------------------------------------------------------

class Canvas:
    """A figure of boxes, words, images and arrows; one unit is 0.75 inch."""

    def __init__(self, width, height):
        self.figure, self.axis = plt.subplots(figsize=(0.75 * width, 0.75 * height))
        self.axis.set(xlim=(0, width), ylim=(0, height))
        self.axis.axis("off")
        self.figure.subplots_adjust(0, 0, 1, 1)

    def box(self, x, y, words, colour, width=2.4, height=0.9):
        """Draw a network, centred at x, y."""
        self.axis.add_patch(FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor=INK,
            boxstyle="round,pad=0,rounding_size=0.12"))
        self.words(x, y, words)

    def words(self, x, y, words, size=11, ha="center", **style):
        self.axis.text(x, y, words, ha=ha, va="center", fontsize=size, color=INK, **style)

    def image(self, x, y, image, label, side=1.3):
        """Show an image, centred at x, y, with a label under it."""
        self.axis.imshow(image, extent=(x - side / 2, x + side / 2, y - side / 2, y + side / 2),
                         interpolation="nearest", zorder=2)
        self.words(x, y - side / 2 - 0.22, label, 10)

    def arrow(self, *points):
        """Draw an arrow through points [(x, y), ...]."""
        for a, b in zip(points[:-2], points[1:-1]):
            self.axis.plot(*zip(a, b), color=INK, lw=1.3, solid_capstyle="round")
        self.axis.add_patch(FancyArrowPatch(*points[-2:], arrowstyle="-|>", mutation_scale=12,
                                            color=INK, lw=1.3, shrinkA=0, shrinkB=0))


def method(shipped):
    """Draw stage 1, a training step of stage 2, and sampling, with real latents and images."""
    x = judge.scene_images([world.scene("builtin:web", 2000, 12)], 64)
    z = shipped.encoder(x)
    eps = flow.noise_for("method", 0, *z.shape[1:])
    drawn, walk = shipped.walk(PROMPT, [1])
    latent = shipped.colours(z[0])
    c = Canvas(20, 9.2)
    for y, title in ((7.9, "Stage 1\nautoencoder"), (4.9, "Stage 2\ntraining"),
                     (1.5, "Sampling")):
        c.words(0.25, y, title, 12, weight="bold", ha="left")

    c.image(3.4, 7.9, picture(x[0]), "image x")
    c.box(6.5, 7.9, "encoder\n(SigLIP-2)", FROZEN)
    c.image(9.4, 7.9, latent, "latent z  [N, C]")
    c.box(12.4, 7.9, "decoder\n(ViT)", TRAINED)
    c.image(15.4, 7.9, picture(shipped.decode(z)[0]), "reconstruction")
    c.words(18.3, 7.9, "L1 + LPIPS\n+ Gram + GAN")
    for a, b in ((4.1, 5.3), (7.7, 8.7), (10.1, 11.2), (13.6, 14.7), (16.1, 17.0)):
        c.arrow((a, 7.9), (b, 7.9))

    c.words(3.5, 5.6, "caption, or z\nand a question", 10.5)
    c.words(3.7, 4.6, "N learned\nqueries", 10.5)
    c.box(6.5, 5.05, "language model\n(Qwen2.5)", TRAINED)
    c.arrow((4.5, 5.5), (5.3, 5.2))
    c.arrow((4.6, 4.6), (5.3, 4.85))
    c.words(9.3, 5.35, "condition  [N, D]", 10.5)
    c.arrow((7.7, 5.05), (11.2, 5.05))
    c.box(12.4, 5.05, "DiT", TRAINED)
    c.image(9.4, 3.75, shipped.colours(0.5 * z[0] + 0.5 * eps), "", side=1.0)
    c.words(8.75, 3.75, r"$x_t = (1-t)\,z + t\,\epsilon$", 11, ha="right")
    c.arrow((9.95, 3.75), (12.4, 3.75), (12.4, 4.6))
    c.arrow((13.6, 5.05), (14.7, 5.05))
    c.words(14.9, 5.05, r"velocity $v$", 11, ha="left")
    c.words(15.0, 4.15, r"loss = CE(text) + 2 $|v - (\epsilon - z)|^2$", 11, ha="left")
    c.arrow((6.5, 5.5), (6.5, 6.1))
    c.words(6.5, 6.3, "answers about images", 10.5)

    c.words(3.3, 1.5, textwrap.fill(f"“{PROMPT}”", 18), 10.5)
    c.box(6.5, 1.5, "language model", "white")
    c.arrow((4.7, 1.5), (5.3, 1.5))
    c.arrow((7.7, 1.5), (8.5, 1.5))
    times = (0, 30, 42, 50)
    for k, step in enumerate(times):
        t, x_t, _ = walk[step]
        c.image(9.2 + 1.35 * k, 1.5, shipped.colours(x_t[0]), f"t = {t:.2f}", side=1.15)
    c.words(11.2, 2.45, r"DiT: Euler steps  $x \leftarrow x + v\,\Delta t$", 10.5)
    c.arrow((13.9, 1.5), (14.5, 1.5))
    c.box(15.6, 1.5, "decoder", "white", 2.0)
    c.arrow((16.6, 1.5), (17.5, 1.5))
    c.image(18.4, 1.5, picture(shipped.decode(drawn)[0]), "image", side=1.6)
    c.arrow((13.25, 0.55), (13.25, 0.3), (6.5, 0.3), (6.5, 1.05))
    c.words(9.9, 0.12, "the model reads its own latents and ranks the candidates: best of N", 10)
    for x0, colour, words in ((16.9, FROZEN, "frozen"), (18.6, TRAINED, "trained")):
        c.box(x0, 6.35, words, colour, 1.4, 0.5)
    save(c.figure, "method")


# ------------------------------------------------------------------------------------------------
# Latents, trajectory, ranking
# ------------------------------------------------------------------------------------------------

def latents(shipped):
    """Show images above the first three principal components of their latents."""
    scenes = [world.scene(f"builtin:{source}", 2000, k) for source, k in (
        ("synthetic", 1), ("synthetic", 4), ("web", 12), ("web", 3), ("web", 6), ("text", 0))]
    x = judge.scene_images(scenes, 64)
    pairs = list(zip(x, shipped.encoder(x)))
    words = [world.caption(scene) for scene in scenes]
    prompts = [judge.FIXED[k] for k in (0, 2, 4, 8, 10, 13)]
    for prompt in prompts:
        z, _ = shipped.walk(prompt, [0])
        pairs.append((shipped.decode(z)[0], z[0]))
    figure, axes = plt.subplots(4, 6, figsize=(10, 7.6), layout="constrained")
    for k, ((image, z), text) in enumerate(zip(pairs, words + prompts)):
        row, column = divmod(k, 6)
        show(axes[2 * row, column], picture(image), textwrap.fill(text, 22))
        show(axes[2 * row + 1, column], shipped.colours(z))
    for k, text in enumerate(("image", "its latent", "decoded", "generated latent")):
        axes[k, 0].set_ylabel(text, fontsize=10)
    save(figure, "latents")


def trajectory(shipped):
    """Show one prompt's latent at ten times, decoded, and the times that training draws."""
    _, walk = shipped.walk(PROMPT, [1])
    figure = plt.figure(figsize=(11, 5.9), layout="constrained")
    images, curves = figure.subfigures(2, 1, height_ratios=(1, 1.2))
    for k, (top, low) in enumerate(images.subplots(2, 10).T):
        t, x_t, clean = walk[round(k * (len(walk) - 1) / 9)]
        show(top, picture(shipped.decode(x_t)[0]), f"t = {t:.2f}")
        show(low, picture(shipped.decode(clean)[0]))
        if k == 0:
            top.set_ylabel(r"decoded $x_t$", fontsize=9)
            low.set_ylabel(r"decoded $x_t - t\,v$", fontsize=9)
    left, right = curves.subplots(1, 2)
    t = torch.linspace(0, 1, 400)
    normal = torch.from_numpy(np.random.default_rng(0).standard_normal(200_000))
    for k, (a, name) in enumerate(((1, "1 (no shift)"), (3, "3 (shipped model)"),
                                   (6.93, "6.93 (tiny's default)"), (8.49, "8.49 (the paper's)"))):
        left.plot(t, flow.time_shift(t, a), color=f"C{k}", label=f"a = {name}")
        right.hist(flow.sample_time(normal, a).numpy(), bins=80, range=(0, 1), density=True,
                   histtype="step", color=f"C{k}", lw=1.4)
    left.set(xlabel="t before the shift", ylabel="t after the shift")
    left.legend(fontsize=9)
    right.set(xlabel="t (1 is noise)", ylabel="density", title="times that training draws")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save(figure, "trajectory")


def ranking(shipped):
    """Show eight candidates in the order of each verifier; green frames: the judge passes them."""
    prompt = benchmark.prompts()[46]                        # the judge passes three of the eight
    z, _ = shipped.walk(prompt.text, range(8), guidance=3.0, steps=25)
    images = shipped.decode(z)
    passed = [judge.judge(image, prompt) for image in images]
    rows = best_of.scores(shipped.model.llm, shipped.model.tokenizer, z, prompt.text)
    value = {"prompt": "prompt_conf", "yes": "yes_logit", "yes-prob": "yes_prob",
             "loss": "prompt_loss"}
    figure, axes = plt.subplots(4, 8, figsize=(11, 6.6), layout="constrained")
    for axis_row, (verifier, key) in zip(axes, value.items()):
        for axis, i in zip(axis_row, best_of.rank(rows, verifier)):
            show(axis, picture(images[i]), frame="#2a9d3a" if passed[i] else "#d1352b",
                 below=f"{rows[i][key]:.3f}")
        axis_row[0].set_ylabel(verifier, fontsize=11)
    figure.suptitle(f"{prompt.text}: eight candidates, best first by each verifier "
                    "(green: right)", fontsize=11)
    save(figure, "ranking")


@torch.no_grad()
def draw(name):
    figures = {"method": method, "latents": latents, "trajectory": trajectory, "ranking": ranking}
    figures[name](Shipped())
