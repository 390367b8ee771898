"""The language model: Qwen2 with N learned queries and two projectors.

    h    = LLM([chat(prompt), <im_start>, q_1..q_N, <im_end>])      # causal, also among the queries
    cond = diff_head_projector(h at the queries)                    # [B,N,Z], conditions the DiT

In a question, mm_projector(z) [B,N,H] of the image takes the place of the queries. Paper section
3.1; the reference is ScaleRAEQwenForCausalLM. Parameter names are the keys of the released
checkpoints and, without the additions, of Qwen2ForCausalLM. chat.py makes the ids and the labels.

B batch, L text length, N image tokens, V vocabulary, H width of the model (heads are spelled out).
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LLMConfig:
    """Fields of Qwen2's config.json, under its names."""
    hidden_size: int                     # H
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int                      # V
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6


#                      H  layers heads kv    MLP       V   tied
QWEN_1_5B = LLMConfig(1536, 28, 12, 2,  8960, 151667, True)
QWEN_7B   = LLMConfig(3584, 28, 28, 4, 18944, 151667, False)
TINY      = LLMConfig( 128,  3,  4, 2,   384,   1024, True)


class Linear(nn.Linear):
    """Keep fp32 weights and multiply in the dtype of x (bf16 on accelerators), without autocast."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype),
                        None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """Compute statistics in fp32, cast back, then multiply by the weight."""

    def forward(self, x):
        y = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(x.dtype)
        return y * self.weight.to(x.dtype)


def rope(x, cos, sin):
    """Rotate x [B,heads,L,hd] by its positions in Qwen's form: channel i pairs with i + hd/2."""
    a, b = x.chunk(2, -1)                                                   # [B,heads,L,hd/2]
    return x * cos + torch.cat([-b, a], -1) * sin


def attention(q, k, v, mask=None):
    """Causal softmax attention, q [B,heads,L,hd], k and v [B,heads,T,hd]. mask [L,T]: True where q
    sees k, if q follows cached positions; without it T = L."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused kernel is two to six times slower here (LOG.md, 2026-11-23)
        if mask is None:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()      # [L,L]
        scores = (q * q.shape[-1] ** -0.5) @ k.mT                           # [B,heads,L,T]
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        H, self.heads, self.kv_heads = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
        hd = H // self.heads
        self.q_proj = Linear(H, self.heads * hd)
        self.k_proj, self.v_proj = Linear(H, self.kv_heads * hd), Linear(H, self.kv_heads * hd)
        self.o_proj = Linear(self.heads * hd, H, bias=False)

    def forward(self, x, cos, sin, cache=None):
        """x [B,L,H]. cache: [], or [k, v] of the positions before. It is extended in place."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)      # [B,heads,L,hd]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)   # [B,kv,L,hd]
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        mask = None
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)     # [B,kv,T,hd]
            cache[:] = [k, v]
            L, T = q.shape[2], k.shape[2]                   # queries are the last L of T positions
            mask = torch.ones(L, T, dtype=torch.bool, device=x.device).tril(T - L)
        group = self.heads // self.kv_heads
        if group > 1:                                       # grouped queries share keys and values
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)     # [B,heads,T,hd]
        y = attention(q, k, v, mask)                                            # [B,heads,L,hd]
        return self.o_proj(y.transpose(1, 2).flatten(2))                        # [B,L,H]


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        H, hidden = c.hidden_size, c.intermediate_size
        self.gate_proj, self.up_proj = Linear(H, hidden, bias=False), Linear(H, hidden, bias=False)
        self.down_proj = Linear(hidden, H, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def gather_rows(x, index):
    """Gather the rows `index` [B,M] of x [B,K,H] -> [B,M,H]. A row that x does not have is zero.

    The product with ones and zeros is exact where fp32 products are (`parallel.setup` sees to it).
    The backward pass of torch.gather is a scatter, for which the TPU's compiler sums the whole
    batch on every chip (LOG.md, 2026-11-24).
    """
    rows = torch.arange(x.shape[1], device=x.device)                        # [K]
    return (index[..., None] == rows).to(x.dtype) @ x


class TextModel(nn.Module):
    """Qwen2, the learned queries and the two projectors.

    tokens: N; 0 builds plain Qwen2. image_channels: C of the encoder's features. cond_width: Z of
    the DiT. Set `remat` to recompute each layer's activations in the backward pass. Raises
    ValueError for sizes that do not divide.
    """

    def __init__(self, config, tokens=0, image_channels=0, cond_width=0, dtype=torch.float32):
        super().__init__()
        c, H, V = config, config.hidden_size, config.vocab_size
        self.config, self.width, self.tokens = config, H, tokens
        self.dtype, self.remat = dtype, False
        if H % c.num_attention_heads or c.num_attention_heads % c.num_key_value_heads:
            raise ValueError(f"hidden_size {H}, num_attention_heads {c.num_attention_heads}, "
                             f"num_key_value_heads {c.num_key_value_heads}: each must be a "
                             "multiple of the next")
        m = self.model = nn.Module()
        m.embed_tokens = nn.Embedding(V, H)
        m.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        m.norm = RMSNorm(H, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(H, V, bias=False)
        if tokens:
            m.latent_queries = nn.Parameter(torch.zeros(tokens, H))
            m.mm_projector = nn.Sequential(                                 # the exact (erf) GELU
                Linear(image_channels, H), nn.GELU(approximate="none"), Linear(H, H))
            self.diff_head_projector = Linear(H, cond_width)

    def embed(self, ids, start=None, answer=None, z=None):
        """ids [B,L] (IMAGE where an image stands) -> embeddings [B,L,H].

        start [B]: the first of the N image positions (L or more: no image). answer [B]: whether the
        image is to be generated. Its positions then take the learned queries, otherwise
        mm_projector(z), z [B,N,C]. Without z every image is to be generated.
        """
        x = F.embedding(ids.clamp(min=0), self.model.embed_tokens.weight)           # [B,L,H]
        x = x.to(self.dtype)
        if start is None:
            return x
        rows = self.model.latent_queries.to(self.dtype).expand(len(ids), -1, -1)    # [B,N,H]
        if z is not None:
            seen = self.model.mm_projector(z.to(self.dtype))                        # [B,N,H]
            rows = torch.where(answer[:, None, None], rows, seen)
        index = torch.arange(ids.shape[1], device=ids.device) - start[:, None]      # [B,L]
        inside = (index >= 0) & (index < self.tokens)
        return torch.where(inside[..., None], gather_rows(rows, index), x)

    def forward(self, x, cache=None):
        """Embeddings [B,L,H] -> hidden states after the last norm [B,L,H]; causal.

        cache: a list, empty at first, then with one entry per layer. x follows the cached positions
        and joins them. Right padding needs no mask of its own: no real token comes after it.
        """
        layers = self.model.layers
        if cache is not None and not cache:
            cache.extend([] for _ in layers)
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        hd = self.width // self.config.num_attention_heads
        f = self.config.rope_theta ** (-torch.arange(0, hd, 2, device=x.device).float() / hd)
        angle = torch.arange(past, past + x.shape[1], device=x.device).float()[:, None] * f
        cos, sin = (a.repeat(1, 2).to(x.dtype) for a in (angle.cos(), angle.sin()))  # [L,hd]
        if cache is None:
            return self.model.norm(self.run(layers, x, cos, sin))
        for layer, kv in zip(layers, cache):
            x = layer(x, cos, sin, kv)
        return self.model.norm(x)

    def run(self, layers, x, cos, sin):
        """Run the stack. (On XLA a compiled loop takes the place of this method.)"""
        for layer in layers:
            if self.remat and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin)
        return x

    def head_weight(self):
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight      # [V,H]

    def logits(self, h):
        """Hidden states [...,H] -> logits [...,V] in fp32."""
        return F.linear(h, self.head_weight().to(h.dtype)).float()

    def condition(self, h, start):
        """Project the hidden states h [B,L,H] at the N query positions -> cond [B,N,Z]. A sample
        without an image (start L) projects zeros."""
        index = start[:, None] + torch.arange(self.tokens, device=h.device)         # [B,N]
        return self.diff_head_projector(gather_rows(h, index))

    def text_loss(self, h, where, targets):
        """Sum the cross-entropy of the labelled next tokens. h [B,L,H]; where, targets [B,K] of
        chat.labelled: most of L are queries and the user's words, which have no label.

        A large batch goes through the head 64 positions at a time and is recomputed in the backward
        pass, because with V = 151,667 all its logits would take more memory than the model. The cut
        is along K, because B is split over devices.
        """
        h = gather_rows(h, where)                                                   # [B,K,H]

        def group(h, targets):
            return F.cross_entropy(self.logits(h).flatten(0, 1), targets.flatten(),
                                   ignore_index=-100, reduction="sum")

        if targets.numel() * self.config.vocab_size <= 2 ** 24:
            return group(h, targets)
        return sum(checkpoint(group, h[:, i:i + 64], targets[:, i:i + 64], use_reentrant=False)
                   for i in range(0, h.shape[1], 64))

    def train_flops(self, length, labelled, frozen=False):
        """Return the training FLOPs of a sequence of `length` tokens, of which `labelled` go
        through the head: 6 per weight and token, or 4 with frozen weights, because the gradient
        still passes to the queries. Attention counts in full, as is usual, though its causal half
        is skipped. Both projectors run on the N image positions of every sequence."""
        c, H = self.config, self.width
        hd = H // c.num_attention_heads
        layer = 2 * H * H + 2 * H * hd * c.num_key_value_heads + 3 * H * c.intermediate_size
        layers, head = length * c.num_hidden_layers * layer, labelled * c.vocab_size * H
        products = length * c.num_hidden_layers * 2 * length * H    # q k^T and its product with v
        projectors = self.tokens * sum(p.numel() for name, p in self.named_parameters()
                                       if "projector" in name and p.dim() == 2)
        return (4 if frozen else 6) * (layers + head) + 6 * (products + projectors)


def initial(name, shape, seed):
    """Return the initial value of one parameter, which any rank or framework can make alone.

    Qwen2 from scratch, and the projector to the DiT: N(0, 0.02^2). Queries: N(0, 1/H).
    mm_projector: uniform +-1/sqrt(fan in), PyTorch's default for a Linear. Biases: zero. Norms:
    one. Raises ValueError for a parameter of another kind, whose value in the constructor is lost,
    because networks are built on the meta device.
    """
    from data import rng
    if not name.endswith(("weight", "bias", "latent_queries")):
        raise ValueError(f"{name} has no initial value; give it one in text_model.initial")
    generator = rng(seed, f"init llm {name}")
    if len(shape) == 1:
        value = np.full(shape, float(name.endswith("weight")))
    elif "mm_projector" in name:
        value = (2 * generator.random(shape, np.float32) - 1) * shape[1] ** -0.5
    else:
        std = shape[1] ** -0.5 if "latent_queries" in name else 0.02
        value = generator.standard_normal(shape, np.float32) * std
    return torch.from_numpy(value).float()


# ------------------------------------------------------------------------------------------------
# Prompts and questions
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def direct_condition(llm, tokenizer, prompts, device):
    """Prompts -> cond [P,N,Z]: the chat with the fixed answer, in one prefill (no decoding)."""
    import chat
    rows = []
    for prompt in prompts:
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": chat.ANSWER}]
        rows.append(chat.insert_image_tokens(*chat.chat(tokenizer, turns), llm.tokens))
    ids, _, start, _ = chat.pad_batch(rows, tokenizer.token_to_id("<|endoftext|>"))
    ids, start = (torch.from_numpy(a).to(device) for a in (ids, start))     # [P,L], [P]
    return llm.condition(llm(llm.embed(ids, start)), start)


def question(llm, tokenizer, z, words, more=()):
    """Embed a chat up to the assistant's header, then the ids `more` -> [B,L,H].

    z [B,N,C]: the image that the chat is about, or None. words: the user's question or prompt, one
    text for all B, or a list of B texts of equal length in tokens.
    """
    import chat
    rows = [chat.prompt_ids(tokenizer, w, image=z is not None) + list(more)
            for w in ([words] if isinstance(words, str) else words)]
    rows = [chat.insert_image_tokens(ids, [chat.IGNORE] * len(ids), llm.tokens) for ids in rows]
    ids = torch.tensor([ids for ids, *_ in rows])                                   # [B or 1,L]
    if z is None:
        return llm.embed(ids.to(llm.head_weight().device))
    start = torch.full((len(z),), rows[0][2], device=z.device)                      # [B]
    answer = torch.zeros_like(start, dtype=torch.bool)      # [B]: no image is to be generated
    return llm.embed(ids.to(z.device).expand(len(z), -1), start, answer, z)


def greedy(llm, tokenizer, x, limit, cache):
    """Decode greedily after the embeddings x [B,L,H], at most `limit` tokens.

    Yields at each step the logits [B,V], the tokens [B], and which answers go on [B]. Ends when
    none does. cache: an empty list.
    """
    ends = torch.tensor([tokenizer.token_to_id(s) for s in ("<|im_end|>", "<im_start>")],
                        device=x.device)
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(limit):
        logits = llm.logits(llm(x, cache)[:, -1])                                   # [B,V]
        token = logits.argmax(-1)                                                   # [B]
        alive = alive & ~torch.isin(token, ends)
        yield logits, token, alive
        if not alive.any():
            return
        x = llm.embed(token[:, None])                                               # [B,1,H]
