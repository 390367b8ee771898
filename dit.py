"""The diffusion transformer: velocity of the latent from x_t, the time and a condition per token.

    s   = x_embedder(x_t) + pos_embed                                   # [B,N,D]
    c   = SiLU(t_embedder(t) + cond)                                    # [B,N,Z], one per token
    shift, scale, gate, ... = Linear(SiLU(c))                       # a second SiLU: the authors'
    s  += gate * Attn(modulate(RMSNorm(s)));  s += gate * SwiGLU(modulate(RMSNorm(s)))   # depth x
    v   = linear(modulate(RMSNorm(s)))                                  # [B,N,C]

The form is LightningDiT (arXiv 2501.01423) with AdaLN per token: condition token i modulates latent
token i, there is no cross-attention. Module names are the keys of the released checkpoints under
`diff_head.model.`. With `head_width` the last blocks form the wide head of DiT-DH
(arXiv 2510.11690): they run on a second embedding of x_t and are modulated by the trunk's output.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Size:
    width: int       # D
    depth: int
    heads: int       # H
    llm: str         # default language model


# Parameters and training FLOPs are of the DiT alone with N = 256, C = 1152 (tiny: 64 tokens of
# 96); tests/test_ladder.py recomputes both from 0.5b on.
#                     D depth  H  LLM
SIZES = {
    "tiny": Size(    160,  6,  5, "tiny"),                          # 0.003 B    0.001 TFLOP/image
    "0.5b": Size(   1280, 16, 32, "Qwen/Qwen2.5-1.5B-Instruct"),    # 0.481 B    0.750
    "2b":   Size(   2048, 32, 32, "Qwen/Qwen2.5-1.5B-Instruct"),    # 2.436 B    3.782
    "3b":   Size(   2304, 32, 32, "Qwen/Qwen2.5-1.5B-Instruct"),    # 3.082 B    4.779
    "5b":   Size(   3072, 32, 32, "Qwen/Qwen2.5-1.5B-Instruct"),    # 5.475 B    8.467
    "9b":   Size(   4096, 32, 32, "Qwen/Qwen2.5-7B-Instruct"),      # 9.729 B   15.012
}
PAPER_NAMES = {"0.5B": "0.5b", "2.4B": "2b", "3.3B": "3b", "3.1B": "3b", "5.5B": "5b", "9.8B": "9b"}


class Linear(nn.Linear):
    """fp32 weights, product in the dtype of x (bf16 on accelerators), no autocast needed."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """Statistics in fp32, cast back, then the weight (the authors' order)."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)
        return y * self.weight.to(x.dtype)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


# ------------------------------------------------------------------------------------------------
# Positions: a fixed additive table and rotary angles, both used
# ------------------------------------------------------------------------------------------------

def sincos_positions(D, side):
    """Fixed table [side*side, D]: first half of the channels codes the column, second the row."""
    omega = 10000.0 ** (-torch.arange(D // 4, dtype=torch.float64, device="cpu") / (D // 4))
    angle = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], 1)                         # [side, D/2]
    col = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([col, row], 2).flatten(0, 1).float()


class RoPE(nn.Module):
    """2-D rotary angles over one head: first half of it turns with the row, second with the column
    (the additive table does the opposite). Adjacent channels form a pair: (a, b) -> (-b, a)."""

    def __init__(self, head_dim, side):
        super().__init__()
        d = head_dim // 2
        f = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64, device="cpu") / d)   # [hd/4]
        angle = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * f
        angle = angle.repeat_interleave(2, 1)                               # [side, hd/2]
        row = angle[:, None, :].expand(side, side, -1)
        col = angle[None, :, :].expand(side, side, -1)
        angle = torch.cat([row, col], 2).flatten(0, 1)                      # [N, hd]
        self.register_buffer("freqs_cos", angle.cos().float())
        self.register_buffer("freqs_sin", angle.sin().float())

    def forward(self, x):                                                   # [B,H,N,hd]
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-b, a], -1).flatten(-2)
        return x * self.freqs_cos.to(x.dtype) + turned * self.freqs_sin.to(x.dtype)


# ------------------------------------------------------------------------------------------------
# Blocks
# ------------------------------------------------------------------------------------------------

def attention(q, k, v):
    """Softmax attention of all tokens to all, each [B,H,N,hd]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:    # the fused kernel is 3 to 5 times
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v   # slower there (LOG.md)
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, D, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(D, 3 * D), Linear(D, D)
        self.q_norm = RMSNorm(D // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D // heads) if qk_norm else nn.Identity()

    def forward(self, x, rope):                                             # [B,N,D]
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                # [B,N,3,H,hd]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # [B,H,N,hd]
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    MULTIPLE = {"cuda": 128}        # of the hidden width, by device; XLA's compiler pads by itself

    def __init__(self, D):
        super().__init__()
        self.hidden = int(2 / 3 * int(4 * D))           # h, the authors': not rounded to a multiple
        self.w12, self.w3 = Linear(D, 2 * self.hidden), Linear(self.hidden, D)

    def forward(self, x):                                                   # [B,N,D]
        if more := -self.hidden % self.MULTIPLE.get(x.device.type, 1):
            return self.padded(x, more)
        a, b = self.w12(x).chunk(2, -1)                                     # [B,N,h]
        return self.w3(F.silu(a) * b)

    def padded(self, x, more):
        """The same with `more` hidden channels of zeros. At D = 2048 h is 5461: odd, so that no row
        of a bf16 matrix is aligned as tensor cores want it. The zeros are put to the weights as
        these are cast; they add silu(0) * 0 = 0, and parameters, gradients and files keep h."""
        w12, b12 = self.w12.weight.to(x.dtype), self.w12.bias.to(x.dtype)
        w12 = F.pad(w12.unflatten(0, (2, -1)), (0, 0, 0, more)).flatten(0, 1)       # [2(h+more),D]
        b12 = F.pad(b12.unflatten(0, (2, -1)), (0, more)).flatten()
        a, b = F.linear(x, w12, b12).chunk(2, -1)                           # [B,N,h+more]
        w3 = F.pad(self.w3.weight.to(x.dtype), (0, more))                   # [D,h+more]
        return F.linear(F.silu(a) * b, w3, self.w3.bias.to(x.dtype))


def adaLN(Z, out):
    """SiLU, then Linear. The SiLU is the same in every block, so `DiT.modulation_input` applies it
    once and the blocks call only `[1]`; the Sequential keeps the released key
    `adaLN_modulation.1`."""
    return nn.Sequential(nn.SiLU(), Linear(Z, out))


class Block(nn.Module):
    def __init__(self, D, heads, Z, qk_norm=False):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(D), RMSNorm(D)
        self.attn, self.mlp = Attention(D, heads, qk_norm), SwiGLU(D)
        self.adaLN_modulation = adaLN(Z, 6 * D)

    def forward(self, x, c, rope, m=None):          # x [B,N,D], SiLU(c) [B,N or 1,Z]
        if m is None:                               # else given: see DiT.modulations
            m = self.adaLN_modulation[1](c)                                 # [B,N,6D]
        shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def modulation(self, c):
        """That alone; a method, so that FSDP2 can gather the weights for it (parallel.shard)."""
        return self.adaLN_modulation[1](c)                                  # [B,N or 1,6D]


class FinalLayer(nn.Module):
    def __init__(self, D, C, Z):
        super().__init__()
        self.norm_final = RMSNorm(D)
        self.linear = Linear(D, C)
        self.adaLN_modulation = adaLN(Z, 2 * D)

    def forward(self, x, c, m=None):                                        # as Block's
        shift, scale = (self.adaLN_modulation[1](c) if m is None else m).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))      # [B,N,C]


class TokenEmbedder(nn.Module):
    """A 1x1 convolution on the latent grid, that is a Linear a token; the key and shape [D,C,1,1]
    are the released ones."""

    def __init__(self, C, D):
        super().__init__()
        self.proj = nn.Conv2d(C, D, 1)

    def forward(self, x):                                                   # [B,N,C] -> [B,N,D]
        return F.linear(x, self.proj.weight.flatten(1).to(x.dtype), self.proj.bias.to(x.dtype))


class TimeEmbedder(nn.Module):
    """Random Fourier features of t in [0,1], then an MLP; fp32. The 256 frequencies are in no
    checkpoint: they are the CPU generator's normal draws after seed 114514."""

    def __init__(self, Z):
        super().__init__()
        self.mlp = nn.Sequential(Linear(512, Z), nn.SiLU(), Linear(Z, Z))
        generator = torch.Generator().manual_seed(114514)
        frequencies = torch.randn(256, generator=generator, device="cpu")
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t):                                                   # [B] -> [B,Z]
        angle = t.float()[:, None] * self.frequencies * (2 * torch.pi)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))


class NullCondition(nn.Module):
    """The learned condition of no prompt, one vector [Z] for all tokens (dropout, p = 0.1)."""

    def __init__(self, Z):
        super().__init__()
        self.dropout_embedding = nn.Parameter(torch.zeros(Z))

    def forward(self, cond, drop):                          # [B,N,Z], [B] bool: which lose theirs
        return torch.where(drop[:, None, None], self.dropout_embedding, cond)       # fp32


class DiT(nn.Module):
    """Paper section 2.2, Table 1; reference class LightningDiT (and LightningDDT with a wide head).

    channels C, tokens N (a square grid), width D, cond_width Z (default D). head_width/head_depth
    add the DiT-DH head; equal to width it is the single-width DDT. null: whether the checkpoint has
    a null condition. remat: recompute each block's activations in the backward pass. dtype: of the
    whole stream: tokens, positions, modulation, rotation, residuals; fp32 are the weights, which
    are cast as they are used, the norms' statistics and the time and its SiLUs up to their cast in
    `modulation_input`.
    """

    def __init__(self, channels, tokens, width, depth, heads, cond_width=None, head_width=0,
                 head_depth=0, head_heads=None, qk_norm=False, null=True, dtype=torch.float32):
        super().__init__()
        C, D, Z = channels, width, cond_width or width
        wide = head_depth > 0
        D2, head_heads = (head_width or D, head_heads or heads) if wide else (D, heads)
        side = int(tokens ** 0.5)
        if side * side != tokens:
            raise ValueError(f"{tokens} latent tokens are not a square grid")
        for w, h, flag in ((D, heads, "--size"), (D2, head_heads, "--head-width")):
            if w % (4 * h):
                raise ValueError(f"DiT width {w} ({flag}) must be a multiple of 4 x heads "
                                 f"= {4 * h}")
        self.channels, self.tokens, self.width, self.depth, self.heads = C, tokens, D, depth, heads
        self.cond_width, self.head_width, self.head_depth = Z, D2, head_depth
        self.head_heads, self.dtype, self.remat = head_heads, dtype, False

        self.pos_embed = nn.Parameter(sincos_positions(D, side)[None], requires_grad=False)
        self.x_embedder = TokenEmbedder(C, D)
        self.t_embedder = TimeEmbedder(Z)
        if null:
            self.y_embedder = NullCondition(Z)
        self.dit_blocks = nn.ModuleList(
            [Block(D, heads, Z, qk_norm) for _ in range(depth)]
            + [Block(D2, head_heads, D2, qk_norm) for _ in range(head_depth)])
        if wide:
            self.s_embedder = TokenEmbedder(C, D2)
            self.s_projector = Linear(D, D2) if D2 != D else nn.Identity()
            self.enc_rope, self.dec_rope = RoPE(D // heads, side), RoPE(D2 // head_heads, side)
        else:
            self.feat_rope = RoPE(D // heads, side)
        self.final_layer = FinalLayer(D2, C, D2 if wide else Z)

    def run(self, blocks, x, c, rope, m=None):
        for block in blocks:
            if m is not None:
                x = block(x, None, rope, next(m))
            elif self.remat and torch.is_grad_enabled():
                x = checkpoint(block, x, c, rope, use_reentrant=False)
            else:
                x = block(x, c, rope)
        return x

    def modulation_input(self, t, cond):
        """t [B], cond [B,N or 1,Z], either B may be 1 -> what every adaLN's Linear takes,
        [B,N or 1,Z]."""
        c = F.silu(self.t_embedder(t)[:, None] + cond.float())              # fp32
        return F.silu(c).to(self.dtype)             # the SiLU in front of every adaLN, hoisted

    def modulations(self, t, cond):
        """t [B], cond [B,N or 1,Z], either B may be 1 -> what they do to each block of the trunk
        and, without a wide head, to the last layer: yields [B,N or 1,6D], at the end 2D. x_t has no
        part in it, so the samples of one prompt share it, and for the null condition a table over
        all times t is small."""
        c = self.modulation_input(t, cond)
        for block in self.dit_blocks[:self.depth]:
            yield block.modulation(c)
        if not self.head_depth:
            yield self.final_layer.adaLN_modulation[1](c)

    def forward(self, x_t, t=None, cond=None, drop=None, m=None):
        """x_t [B,N,C], t [B] or [1], cond [B,N,Z] (or [B,1,Z], as for the null condition) ->
        v [B,N,C].

        drop [B] bool replaces the condition of those images by the learned null condition.
        m: `modulations` of t and cond, in their place (sampling, where many x_t share them).
        """
        if drop is not None:
            cond = self.y_embedder(cond, drop)
        c = self.modulation_input(t, cond) if m is None else None           # [B,N,Z]
        m = m and iter(m)
        x_t = x_t.to(self.dtype)
        s = self.x_embedder(x_t) + self.pos_embed.to(self.dtype)            # [B,N,D]
        if not self.head_depth:
            s = self.run(self.dit_blocks, s, c, self.feat_rope, m)
            return self.final_layer(s, c, m and next(m))
        s = self.run(self.dit_blocks[:self.depth], s, c, self.enc_rope, m)  # trunk
        s = F.silu(self.s_projector(F.silu(s)))     # [B,N,D2]; the outer is that of each adaLN
        h = self.s_embedder(x_t)                                # no positions: only RoPE here
        h = self.run(self.dit_blocks[self.depth:], h, s, self.dec_rope)     # wide head
        return self.final_layer(h, s)

    def null_condition(self, batch):
        """[B,1,Z]: the condition of the unconditional branch of guidance."""
        return self.y_embedder.dropout_embedding.expand(batch, 1, -1)

    def train_flops(self):
        """Training FLOPs an image: forward 2 per multiply-add, backward twice the forward.

        Per token and block: attention 4 D^2 + 2 N D, SwiGLU 3 h D, per-token AdaLN 6 Z D, a third
        of it all. Embedders and final layer at the ends. Checked against torch's counter in tests.
        """
        def block(D, Z):
            hidden = int(2 / 3 * int(4 * D))
            return 4 * D * D + 2 * self.tokens * D + 3 * hidden * D + 6 * Z * D

        C, D, Z, D2 = self.channels, self.width, self.cond_width, self.head_width
        macs = self.depth * block(D, Z) + C * D
        if self.head_depth:
            macs += self.head_depth * block(D2, D2) + C * D2 + (D * D2 if D2 != D else 0)
        macs += C * D2 + 2 * D2 * (D2 if self.head_depth else Z)            # final layer
        time = 512 * Z + Z * Z
        return 6 * (macs * self.tokens + time)

    def activation_bytes(self):
        """What the backward pass keeps of one image, eager: 40 D values a token and block (counted
        with saved_tensors_hooks, bf16); with remat a block's input, and one block in full."""
        size = torch.empty(0, dtype=self.dtype).element_size() * self.tokens
        widths = [self.width] * self.depth + [self.head_width] * self.head_depth
        if self.remat:
            return size * (sum(widths) + 40 * max(widths))
        return size * 40 * sum(widths)


def init_weights(model, seed):
    """All initialisation of the DiT, on the CPU generator: every device starts the same.

    Linear: Xavier-uniform, zero bias (the embedders count as Linear). Time MLP: N(0, 0.02). AdaLN
    and the last layer: zero, so that every block starts as the identity and v as 0 (DiT's
    adaLN-zero).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        weight = torch.empty(module.weight.flatten(1).shape)
        if "adaLN_modulation" in name or name == "final_layer.linear":
            nn.init.zeros_(weight)
        elif name.startswith("t_embedder"):
            nn.init.normal_(weight, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(weight, generator=generator)
        module.weight.data.copy_(weight.view_as(module.weight))
        nn.init.zeros_(module.bias.data)
