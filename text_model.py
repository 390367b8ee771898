"""The language model: Qwen2 with 256 learned queries and two projectors, chat format and decoding.

    h    = LLM([chat(prompt), <im_start>, q_1..q_N, <im_end>])      # causal, also among the queries
    cond = diff_head_projector(h at the queries)                    # [B,N,Z], conditions the DiT
    an image in the question enters as mm_projector(z) [B,N,H] in place of the queries

Keys are those of the released checkpoints (and, without the extras, of Qwen2ForCausalLM).
Here H is the model's width as in the paper's text, heads are spelled out.
"""
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.utils.checkpoint import checkpoint

IGNORE = -100          # label of positions without a loss
IMAGE = -200           # input id of a position that an image token or a query fills

QWEN_1_5B = dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
                 num_key_value_heads=2, intermediate_size=8960, vocab_size=151667,
                 tie_word_embeddings=True)
QWEN_7B = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, intermediate_size=18944, vocab_size=151667,
               tie_word_embeddings=False)
TINY = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=384, tie_word_embeddings=True)


class Linear(nn.Linear):
    """fp32 weights, product in the dtype of x (bf16 on accelerators), no autocast needed."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype),
                        None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """Statistics in fp32, cast back, then the weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)
        return y * self.weight.to(x.dtype)


def rope(x, cos, sin):
    """Rotary positions, Qwen's form: channel i pairs with i + hd/2. x [B,heads,L,hd]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def attention(q, k, v, mask=None):
    """Causal softmax attention, each [B,heads,L,hd]; mask [L,T] bool when q continues a cache."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:    # the fused kernel is 3 to 5 times
        if mask is None:                                        # slower there (LOG.md)
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        scores = (q * q.shape[-1] ** -0.5) @ k.mT                           # [B,heads,L,T]
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        H = c["hidden_size"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        hd = H // self.heads
        self.q_proj = Linear(H, self.heads * hd)
        self.k_proj, self.v_proj = Linear(H, self.kv_heads * hd), Linear(H, self.kv_heads * hd)
        self.o_proj = Linear(self.heads * hd, H, bias=False)

    def forward(self, x, cos, sin, cache=None):
        """x [B,L,H]; cache: [] or [k, v] of the positions before, extended in place."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)      # [B,heads,L,hd]
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)   # [B,kv,L,hd]
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        mask = None
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
            L, T = q.shape[2], k.shape[2]                   # the last L of T positions ask
            mask = torch.ones(L, T, dtype=torch.bool, device=x.device).tril(T - L)
        group = self.heads // self.kv_heads
        if group > 1:                                       # grouped queries share keys and values
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = attention(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        H, hidden = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj = Linear(H, hidden, bias=False), Linear(H, hidden, bias=False)
        self.down_proj = Linear(hidden, H, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def pick(x, index):
    """Rows index [B,M] of x [B,K,H] -> [B,M,H], zero where there is no such row. A product with
    ones and zeros, which is exact where fp32 products are (`parallel.setup` sees to it): the
    backward pass of `gather` is a scatter, for which the TPU's compiler sums the whole batch on
    every chip (LOG.md)."""
    rows = torch.arange(x.shape[1], device=x.device)
    return (index[..., None] == rows).to(x.dtype) @ x


class TextModel(nn.Module):
    """Qwen2 and what Scale-RAE adds to it (paper section 3.1; reference ScaleRAEQwenForCausalLM).

    config: Qwen2's config.json. tokens N, image_channels C of the understanding encoder, cond_width
    Z of the DiT; tokens=0 builds plain Qwen2.
    """

    def __init__(self, config, tokens=0, image_channels=0, cond_width=0, dtype=torch.float32):
        super().__init__()
        c = self.config = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, **config}
        H, V = c["hidden_size"], c["vocab_size"]
        self.width, self.tokens, self.dtype, self.remat = H, tokens, dtype, False
        for key in ("rope_scaling", "rope_parameters"):
            scaling = c.get(key) or {}
            if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
                raise ValueError(f"{key} asks for {kind}: only plain rotary angles are built here")
        self.rope_theta = (c.get("rope_parameters") or {}).get("rope_theta",
                                                               c.get("rope_theta", 1e6))
        m = self.model = nn.Module()
        m.embed_tokens = nn.Embedding(V, H)
        m.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        m.norm = RMSNorm(H, c["rms_norm_eps"])
        if not c["tie_word_embeddings"]:
            self.lm_head = nn.Linear(H, V, bias=False)
        if tokens:
            m.latent_queries = nn.Parameter(torch.zeros(tokens, H))
            m.mm_projector = nn.Sequential(Linear(image_channels, H), nn.GELU(), Linear(H, H))
            self.diff_head_projector = Linear(H, cond_width)

    def embed(self, ids, start=None, answer=None, z=None):
        """ids [B,L] (IMAGE where an image stands) -> embeddings [B,L,H].

        start [B]: position of the first of the N image positions (L or more: no image). answer [B]
        bool: the image is the answer, so its positions take the learned queries; otherwise they
        take mm_projector(z), z [B,N,C]. Without z every image is an answer.
        """
        x = F.embedding(ids.clamp(min=0), self.model.embed_tokens.weight).to(self.dtype)
        if start is None:
            return x
        rows = self.model.latent_queries.to(self.dtype).expand(len(ids), -1, -1)    # [B,N,H]
        if z is not None:
            seen = self.model.mm_projector(z.to(self.dtype))                        # [B,N,H]
            rows = torch.where(answer[:, None, None], rows, seen)
        index = torch.arange(ids.shape[1], device=ids.device) - start[:, None]      # [B,L]
        inside = (index >= 0) & (index < self.tokens)
        return torch.where(inside[..., None], pick(rows, index), x)

    def forward(self, x, cache=None):
        """Embeddings [B,L,H] -> hidden states after the last norm [B,L,H]; causal.

        cache: a list, empty at first, of one entry a layer; it is extended, and x continues it.
        Right padding needs no mask: under a causal one no real token sees it.
        """
        layers = self.model.layers
        if cache is not None and not cache:
            cache.extend([] for _ in layers)
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        hd = self.width // self.config["num_attention_heads"]
        f = self.rope_theta ** (-torch.arange(0, hd, 2, device=x.device).float() / hd)
        angle = torch.arange(past, past + x.shape[1], device=x.device).float()[:, None] * f
        cos, sin = (a.repeat(1, 2).to(x.dtype) for a in (angle.cos(), angle.sin()))  # [L,hd]
        if cache is None:
            return self.model.norm(self.run(layers, x, cos, sin))
        for layer, kv in zip(layers, cache):
            x = layer(x, cos, sin, kv)
        return self.model.norm(x)

    def run(self, layers, x, cos, sin):
        """The stack; parallel.use_scan may put a compiled loop in its place."""
        for layer in layers:
            if self.remat and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin)
        return x

    def head_weight(self):
        tied = self.config["tie_word_embeddings"]
        return self.model.embed_tokens.weight if tied else self.lm_head.weight      # [V,H]

    def logits(self, h):
        """Hidden states [...,H] -> logits [...,V] in fp32."""
        return F.linear(h, self.head_weight().to(h.dtype)).float()

    def condition(self, h, start):
        """Hidden states [B,L,H] at the N query positions, projected: cond [B,N,Z]. Where there is
        no image (start L) it is of zeros."""
        index = start[:, None] + torch.arange(self.tokens, device=h.device)         # [B,N]
        return self.diff_head_projector(pick(h, index))

    def text_loss(self, h, where, targets):
        """Cross-entropy of the labelled next tokens, summed (the caller divides by their number in
        the whole batch); h [B,L,H]; where, targets [B,K] of `labelled`. Only these positions go
        through the head: most of L are queries and the user's words, which have no label.

        A large batch goes 64 of them at a time, recomputed in the backward pass: at V = 151,667 all
        its logits would take more memory than the model. Cut along K, because B is split over the
        devices.
        """
        h = pick(h, where)                                                          # [B,K,H]

        def group(h, targets):
            return F.cross_entropy(self.logits(h).flatten(0, 1), targets.flatten(),
                                   ignore_index=IGNORE, reduction="sum")

        if targets.numel() * self.config["vocab_size"] <= 2 ** 24:
            return group(h, targets)
        return sum(checkpoint(group, h[:, i:i + 64], targets[:, i:i + 64], use_reentrant=False)
                   for i in range(0, h.shape[1], 64))

    def train_flops(self, length, labelled, frozen=False):
        """Training FLOPs of one sequence of `length` tokens, `labelled` of which go through the
        head: 6 per weight and token, 4 where the weights are frozen, for the gradient still passes
        to the queries. Attention is counted in full: the causal half is not skipped in the count,
        as is usual. Both projectors run on every sequence's N positions."""
        c, H = self.config, self.width
        hd = H // c["num_attention_heads"]
        layer = 2 * H * H + 2 * H * hd * c["num_key_value_heads"] + 3 * H * c["intermediate_size"]
        layers, head = length * c["num_hidden_layers"] * layer, labelled * c["vocab_size"] * H
        products = length * c["num_hidden_layers"] * 2 * length * H # q k^T and its product with v
        ours = self.tokens * sum(p.numel() for name, p in self.named_parameters()
                                 if "projector" in name and p.dim() == 2)
        return (4 if frozen else 6) * (layers + head) + 6 * (products + ours)

    def activation_bytes(self, length):
        """What the backward pass keeps of one sequence, eager: 16 H + 4 MLP values a token and
        layer (counted as in dit.py); with remat a layer's input, and one layer in full."""
        size = torch.empty(0, dtype=self.dtype).element_size() * length
        H, depth = self.width, len(self.model.layers)
        layer = 16 * H + 4 * self.config["intermediate_size"]
        return size * (depth * H + layer if self.remat else depth * layer)


def init_weights(model, seed):
    """Training from scratch: N(0, 0.02) for matrices and embeddings, zero biases (Qwen2's); the
    queries N(0, 1/H). On the CPU generator."""
    init_extras(model, seed)
    generator = torch.Generator().manual_seed(seed)
    extras = ("latent_queries", "mm_projector", "diff_head_projector")
    for name, p in model.named_parameters():
        if any(e in name for e in extras):
            continue
        if p.dim() > 1:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        elif name.endswith("bias"):
            p.data.zero_()


def init_extras(model, seed):
    """What Scale-RAE adds to a pretrained Qwen2: queries N(0, 1/H), projector to the DiT N(0, 0.02)
    with zero bias, mm_projector uniform +-1/sqrt(fan in) (PyTorch's default for a Linear)."""
    generator = torch.Generator().manual_seed(seed + 1)
    if not model.tokens:
        return
    queries = model.model.latent_queries
    queries.data.copy_(torch.randn(queries.shape, generator=generator) * model.width ** -0.5)
    for module in (model.model.mm_projector[0], model.model.mm_projector[2]):
        bound = module.in_features ** -0.5
        for p in (module.weight, module.bias):
            p.data.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * bound)
    p = model.diff_head_projector
    p.weight.data.copy_(torch.randn(p.weight.shape, generator=generator) * 0.02)
    p.bias.data.zero_()


# ------------------------------------------------------------------------------------------------
# Tokens and the chat format
# ------------------------------------------------------------------------------------------------

SYSTEM = "You are a helpful assistant."
ANSWER = "Here you go:\n<image>"                # what the model says before it opens an image
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>")
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _byte_level(tokenizer):
    """Qwen2's normalisation, splitting and byte alphabet around a BPE model."""
    from tokenizers import Regex
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts, vocab_size=1024):
    """A byte-level BPE in Qwen2's form, trained on `texts`; the tiny preset's. The special tokens
    come last, as in the released vocabulary."""
    from tokenizers import trainers
    tokenizer = _byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIAL])
    return tokenizer


def load_tokenizer(folder):
    """A folder with tokenizer.json, or with vocab.json + merges.txt + added_tokens.json.

    `<im_start>`, `<im_end>` are added (ids 151665, 151666 for Qwen2.5) when the files lack them.
    Raises FileNotFoundError naming what was looked for.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif all((folder / f).is_file() for f in ("vocab.json", "merges.txt", "added_tokens.json")):
        tokenizer = _byte_level(Tokenizer(models.BPE.from_file(
            str(folder / "vocab.json"), str(folder / "merges.txt"))))
        added = json.loads((folder / "added_tokens.json").read_text())
        for text, i in sorted(added.items(), key=lambda item: item[1]):
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
            if tokenizer.token_to_id(text) != i:
                raise ValueError(f"{folder}/added_tokens.json: {text!r} should be id {i}, "
                                 f"became {tokenizer.token_to_id(text)}")
    else:
        raise FileNotFoundError(f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json "
                                "with merges.txt and added_tokens.json")
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIAL
                                  if tokenizer.token_to_id(s) is None])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode_text(tokenizer, text):
    """Text -> list of ids; `<image>` -> IMAGE, special tokens as themselves."""
    pieces = text.split("<image>")
    ids = []
    for i, piece in enumerate(pieces):
        ids += ([IMAGE] if i else []) + tokenizer.encode(piece, add_special_tokens=False).ids
    return ids


def chat(tokenizer, conversation, has_image=True):
    """A conversation [{"from": "human"|"gpt", "value": text}, ...] -> (ids, labels), lists.

    ChatML as Qwen2.5; `<image>` becomes `<im_start><image><im_end>`. Labels follow the authors: the
    assistant's turns, headers included, and besides them every `\\n`, <|im_start|> and <|im_end|>
    anywhere. The placeholder is not yet expanded; in an assistant's turn its label is V, the id of
    the `<image>` that no vocabulary has.
    """
    ids, labels = [], []
    always = {encode_text(tokenizer, s)[0] for s in ("\n", "<|im_start|>", "<|im_end|>")}
    turns = [("system", SYSTEM)]
    for turn in conversation:
        role = {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"])
        turns.append((role, turn["value"]))
    if has_image and not any("<image>" in text for _, text in turns):
        turns[1] = (turns[1][0], "<image>\n" + turns[1][1])     # an image nobody mentions
    for role, text in turns:
        text = text.replace("<image>", "<im_start><image><im_end>")
        part = encode_text(tokenizer, f"<|im_start|>{role}\n{text}<|im_end|>\n")
        ids += part
        for i in part:
            if role == "assistant":
                labels.append(tokenizer.get_vocab_size() if i == IMAGE else i)
            else:
                labels.append(i if i in always else IGNORE)
    return ids, labels


def expand(ids, labels, tokens):
    """The one placeholder becomes `tokens` of them -> (ids, labels, start, answer).

    start: the first image position, or None. answer: the image is to be generated. Raises
    ValueError on more than one image (the recipe has at most one a sample).
    """
    places = [i for i, token in enumerate(ids) if token == IMAGE]
    if len(places) > 1:
        raise ValueError(f"{len(places)} images in one sample; at most 1")
    if not places:
        return ids, labels, None, False
    p = places[0]
    answer = labels[p] != IGNORE
    ids = ids[:p] + [IMAGE] * tokens + ids[p + 1:]
    labels = labels[:p] + [IGNORE] * tokens + labels[p + 1:]
    return ids, labels, p, answer


def prompt_ids(tokenizer, text, image=False):
    """Ids that ask for an answer: the chat up to the assistant's header. image: with a picture."""
    turn = {"from": "human", "value": "<image>\n" * image + text}
    return (chat(tokenizer, [turn], has_image=image)[0]
            + encode_text(tokenizer, "<|im_start|>assistant\n"))


def pad_batch(samples, pad_id, multiple=64):
    """[(ids, labels, start, answer), ...] -> ids, labels [B,L], start, answer [B] as tensors.

    L is the longest of the batch, rounded up to `multiple`: not the recipe's fixed 512, because
    right padding is invisible under a causal mask and only costs time; the rounding keeps the
    number of different shapes, and so of compiled programs, small.
    """
    L = max(len(s[0]) for s in samples)
    L = -(-L // multiple) * multiple
    ids = torch.full((len(samples), L), pad_id)
    labels = torch.full((len(samples), L), IGNORE)
    for row, (i, l, _, _) in enumerate(samples):
        ids[row, :len(i)], labels[row, :len(l)] = torch.tensor(i), torch.tensor(l)
    start = torch.tensor([L if s[2] is None else s[2] for s in samples])
    return ids, labels, start, torch.tensor([s[3] for s in samples])


def labelled(labels, K=None):
    """labels [B,L] -> where, targets [B,K]: the positions whose next token is labelled, and that
    token; the rest of K is other positions, with IGNORE. K: a fixed number, for equal shapes; else
    the most in a row, rounded up to 16. Raises ValueError when a row has more than K."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)                            # [B,L]
    known = targets != IGNORE
    most = int(known.sum(1).max())
    if K and most > K:
        raise ValueError(f"{most} labelled tokens in a sample, more than {K}")
    K = K or -(-max(most, 1) // 16) * 16
    where = known.int().argsort(dim=1, descending=True, stable=True)[:, :K].contiguous()
    return where, targets.gather(1, where)                                      # they come first


@torch.no_grad()
def direct_condition(llm, tokenizer, prompts, device):
    """Prompts -> cond [B,N,Z]: the chat with the fixed answer, in one prefill (no decoding)."""
    rows = []
    for prompt in prompts:
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": ANSWER}]
        rows.append(expand(*chat(tokenizer, turns), llm.tokens))
    ids, _, start, _ = pad_batch(rows, tokenizer.token_to_id("<|endoftext|>"))
    start = start.to(device)
    return llm.condition(llm(llm.embed(ids.to(device), start)), start)
