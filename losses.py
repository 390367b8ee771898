"""The decoder's discriminator: a frozen DINO ViT-S/16 with small trained heads, and the GAN losses.

From StyleGAN-T (arXiv 2301.09515) by way of the RAE code (arXiv 2510.11690), which Scale-RAE
(arXiv 2601.16208, section 2 and Table 7) trains its decoders with. Keys are those of the RAE code:
`dino.*` the trunk (a DINO file without the prefix), `heads.{i}.*`. fp32 throughout.

B batch, N patches (196), d trunk width (384), L number of heads of the discriminator (5).
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

DINO_S16 = dict(dim=384, depth=12, num_heads=6, key_depths=(2, 5, 8, 11), patch=16, kernel_size=9,
                image_size=224)
TINY = dict(dim=64, depth=4, num_heads=4, key_depths=(1, 3), patch=8, kernel_size=9, image_size=64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet


# ------------------------------------------------------------------------------------------------
# the frozen trunk
# ------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Pre-norm transformer block of DINO: [B, 1+N, d] -> [B, 1+N, d]."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})

    def forward(self, x):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # [B, heads, 1+N, d/heads]
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](y)
        y = F.gelu(self.mlp["fc1"](self.norm2(x)), approximate="tanh")  # the RAE code's; DINO: erf
        return x + self.mlp["fc2"](y)


class Dino(nn.Module):
    """DINO ViT trunk (arXiv 2104.14294). `norm` is in its file but no activation passes it."""

    def __init__(self, dim, depth, num_heads, key_depths, patch, image_size):
        super().__init__()
        self.key_depths, self.image_size = tuple(key_depths), image_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        # [-1,1] -> ImageNet-normalised: x * scale + shift
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        self.register_buffer("x_scale", 0.5 / std)
        self.register_buffer("x_shift", (0.5 - mean) / std)

    def forward(self, images):
        """images [B,3,H,W] in [0,1] -> L activations [B, d, N]: the last block's, then key_depths'.
        """
        x, size = 2 * images.float() - 1, (self.image_size, self.image_size)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        x = self.patch_embed["proj"](x * self.x_scale + self.x_shift)           # [B, d, n, n]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1)
        x, out = x + self.pos_embed, []                                         # [B, 1+N, d]
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.key_depths:
                out.append(x[:, 1:].mT)                                         # [B, d, N]
        return [x[:, 1:].mT] + out


# ------------------------------------------------------------------------------------------------
# the trained heads
# ------------------------------------------------------------------------------------------------

class SpectralConv1d(nn.Module):
    """Circular conv1d with weight / sigma_max(weight) (arXiv 1802.05957), length kept.

    sigma = u^T W v with one power iteration a call in train mode, none in eval mode. The triplet
    weight_orig, weight_u, weight_v is torch.nn.utils.spectral_norm's.
    """

    def __init__(self, c_in, c_out, kernel):
        super().__init__()
        conv = nn.Conv1d(c_in, c_out, kernel)                   # for PyTorch's default init
        self.weight_orig, self.bias = conv.weight, conv.bias
        self.register_buffer("weight_u", F.normalize(torch.randn(c_out), dim=0, eps=1e-12))
        self.register_buffer("weight_v", F.normalize(torch.randn(c_in * kernel), dim=0, eps=1e-12))

    def forward(self, x):
        W = self.weight_orig.flatten(1)                         # [c_out, c_in * kernel]
        if self.training:
            with torch.no_grad():
                self.weight_v.copy_(F.normalize(W.mT @ self.weight_u, dim=0, eps=1e-12))
                self.weight_u.copy_(F.normalize(W @ self.weight_v, dim=0, eps=1e-12))
        # clones: the next call changes the buffers in place, and backward needs these values
        sigma = self.weight_u.clone() @ (W @ self.weight_v.clone())
        pad = self.weight_orig.shape[2] // 2
        x = F.pad(x, (pad, pad), mode="circular") if pad else x
        return F.conv1d(x, self.weight_orig / sigma, self.bias)


class LocalNorm(nn.Module):
    """Batch norm over a virtual batch of one: statistics of each sample's channel over N."""

    def __init__(self, c):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x):                                       # [B, c, N]
        var, mean = torch.var_mean(x, dim=2, keepdim=True, correction=0)
        return (x - mean) * torch.rsqrt(var + 1e-6) * self.weight[:, None] + self.bias[:, None]


def conv_block(c, kernel):
    return nn.Sequential(SpectralConv1d(c, c, kernel), LocalNorm(c), nn.LeakyReLU(0.2))


class Residual(nn.Module):
    """(f(x) + x) / sqrt(2): keeps the variance."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return (self.fn(x) + x) / math.sqrt(2)


class Discriminator(nn.Module):
    """Frozen trunk and L = 1 + len(key_depths) heads; config: the fields of `DINO_S16`.

    `train()` for its own step (power iteration), `eval()` for the generator's. Raises ValueError
    when the sizes do not divide or a key depth does not exist.
    """

    def __init__(self, config=None):
        super().__init__()
        c = self.config = {**DINO_S16, **(config or {})}
        d, kernel = c["dim"], c["kernel_size"]
        if d % c["num_heads"] or c["image_size"] % c["patch"] or kernel % 2 == 0:
            raise ValueError(f"discriminator: num_heads must divide dim, patch image_size, and "
                             f"kernel_size be odd: {c}")
        if max(c["key_depths"]) >= c["depth"]:
            raise ValueError(f"key_depths {c['key_depths']} of a trunk of {c['depth']} blocks")
        self.dino = Dino(d, c["depth"], c["num_heads"], c["key_depths"], c["patch"],
                         c["image_size"])
        self.dino.requires_grad_(False)
        self.heads = nn.ModuleList(
            nn.Sequential(conv_block(d, 1), Residual(conv_block(d, kernel)),
                          SpectralConv1d(d, 1, 1)) for _ in range(1 + len(c["key_depths"])))

    def forward(self, images):
        """images [B,3,H,W] in [0,1] -> logits [B, L*N], high for real."""
        features = self.dino(images)
        logits = [head(f).flatten(1) for head, f in zip(self.heads, features)]  # L of [B, N]
        return torch.cat(logits, 1)

    def forward_flops(self):
        """FLOPs of one image, 2 per multiply-add -> (frozen trunk, trained heads)."""
        c, d = self.config, self.config["dim"]
        N = (c["image_size"] // c["patch"]) ** 2
        trunk = c["depth"] * (N + 1) * (12 * d * d + 2 * (N + 1) * d) + 3 * N * c["patch"] ** 2 * d
        heads = len(self.heads) * N * (d * d + c["kernel_size"] * d * d + d)
        return 2 * trunk, 2 * heads

    def activation_bytes(self):
        """Kept for the backward pass through one image, fp32: a block the inputs of its two norms,
        q, k, v, attention's output and its copy, GELU's input (4d) = 11 d a token (the frozen
        Linears keep none); a head about 12 maps. Checked against autograd in the tests."""
        c, d = self.config, self.config["dim"]
        N = (c["image_size"] // c["patch"]) ** 2
        return 4 * d * (c["depth"] * (N + 1) * 11 + len(self.heads) * N * 12)


# ------------------------------------------------------------------------------------------------
# augmentation and losses
# ------------------------------------------------------------------------------------------------

def augment(images, draws):
    """Differentiable augmentation (arXiv 2006.10738) of images [B,3,H,W] in [0,1], by draws [B,5],
    uniform in [0,1) -> [B,3,H,W].

    Translation by up to 1/8 of the side with grey fill, brightness, saturation, contrast; no
    cutout, as in the RAE code. Its numbers are for [-1,1], so this goes there and back: the fill
    is 0 and brightness +-0.5 on that scale.
    """
    x, (_, _, H, W) = 2 * images - 1, images.shape
    r = draws.mT[..., None, None, None]                                 # [5, B, 1, 1, 1]
    dy, dx = round(H / 8), round(W / 8)
    x = F.pad(x, (dx, dx, dy, dy))                                      # [B, 3, H+2dy, W+2dx]
    top = (r[0, :, 0, 0, 0] * (2 * dy + 1)).long()                      # [B], 0..2dy
    left = (r[1, :, 0, 0, 0] * (2 * dx + 1)).long()
    rows = top[:, None] + torch.arange(H, device=x.device)              # [B, H]
    cols = left[:, None] + torch.arange(W, device=x.device)             # [B, W]
    x = x.gather(2, rows[:, None, :, None].expand(-1, 3, -1, x.shape[3]))       # [B, 3, H, W+2dx]
    x = x.gather(3, cols[:, None, None, :].expand(-1, 3, H, -1))                # [B, 3, H, W]
    x = x + (r[2] - 0.5)                                                # brightness
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (2 * r[3])                                  # saturation
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (r[4] + 0.5)                                # contrast
    return (x + 1) / 2


def d_loss_hinge(real, fake):
    """Logits of real and fake images -> the discriminator's loss (a scalar)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def d_loss_vanilla(real, fake):
    """The non-saturating alternative to the hinge."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def g_loss(fake):
    """The generator's loss: raise the logits of its images."""
    return -fake.mean()


def adaptive_weight(rec_loss, gan_loss, last_weight, average=lambda grad: grad):
    """|d rec / d W| / (|d gan / d W| + 1e-6), clamped to [0, 1e4], detached (arXiv 2012.09841).

    Balances the two losses at W = `last_weight`, the decoder's `decoder_pred.weight`. Keeps both
    graphs for the real backward pass. average: of a gradient over the processes that share a batch.
    With a loss' gradient g at the picture x in hand, (x * g).sum() stands for the loss: above x it
    has the same gradient.
    """
    rec, gan = (average(torch.autograd.grad(loss, last_weight, retain_graph=True)[0])
                for loss in (rec_loss, gan_loss))
    return (rec.norm() / (gan.norm() + 1e-6)).clamp(0, 1e4).detach()


# ------------------------------------------------------------------------------------------------
# weights
# ------------------------------------------------------------------------------------------------

def init_weights(model, seed):
    """Heads and, where no file replaces it, the trunk; drawn on the CPU generator.

    Heads: PyTorch's default for convolutions, U(+-1/sqrt(fan in)), as in the RAE code; u and v
    random unit vectors, then 15 power iterations, so that the first steps see a true norm. Trunk:
    trunc-normal 0.02 matrices, zero biases, as DINO begins (a random trunk is a weak stand-in).
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.heads.modules():
        if isinstance(module, SpectralConv1d):
            shape = module.weight_orig.shape
            bound = 1 / math.sqrt(shape[1] * shape[2])
            W = (torch.rand(shape, generator=generator) * 2 - 1) * bound
            module.weight_orig.data = W
            module.bias.data = (torch.rand(shape[0], generator=generator) * 2 - 1) * bound
            u = F.normalize(torch.randn(shape[0], generator=generator), dim=0)
            for _ in range(15):
                v = F.normalize(W.flatten(1).mT @ u, dim=0)
                u = F.normalize(W.flatten(1) @ v, dim=0)
            module.weight_u, module.weight_v = u, v
    for name, p in model.dino.named_parameters():
        if p.dim() > 1:
            p.data = nn.init.trunc_normal_(torch.empty(p.shape), std=0.02, generator=generator)
        elif name.endswith("bias"):
            p.data.zero_()


def zero_k_bias(model):
    """Zero the middle third of every qkv bias of the trunk."""
    for block in model.dino.blocks:
        block.attn["qkv"].bias.data.view(3, -1)[1] = 0
    return model
