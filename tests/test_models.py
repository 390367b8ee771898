"""Flow equations, DiT, language model: behaviour that golden files do not show.

    pytest tests/test_models.py
"""
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import chat
import dit
import encoder
import flow
import stage2
import text_model
from cli import UserError
from conftest import init_weights
from dit import PAPER_NAMES, SIZES, DiT, DiTConfig

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
TOKENIZER = chat.load_tokenizer(ROOT / "tiny")


def small_dit(**options):
    model = DiT(DiTConfig(channels=24, tokens=16, width=64, depth=2, heads=4, **options))
    init_weights(model, dit.initial)
    return model


def small_llm(tokens=4):
    config = replace(text_model.TINY, vocab_size=TOKENIZER.get_vocab_size(), hidden_size=32,
                     num_attention_heads=2, num_key_value_heads=1, intermediate_size=48)
    model = text_model.TextModel(config, tokens, 8, 16)
    init_weights(model, text_model.initial)
    return model


# ---- flow ----

@pytest.mark.parametrize("tokens, channels, alpha", [(256, 1152, 8.485281), (256, 1024, 8.0),
                                                     (256, 64, 2.0)])
def test_shift_alpha(tokens, channels, alpha):
    assert flow.shift_alpha(tokens, channels) == pytest.approx(alpha, abs=1e-6)
    median = flow.time_shift(0.5, alpha)
    assert median == pytest.approx(alpha / (1 + alpha), abs=1e-9)


def test_interpolation_and_target_agree():
    """x_t moves along v: d x_t / dt is the regression target."""
    z, eps = torch.randn(2, 3, 4, 5)
    t = torch.tensor([0.2, 0.7, 0.9])
    slope = (flow.interpolate(z, eps, t + 1e-2) - flow.interpolate(z, eps, t - 1e-2)) / 2e-2
    assert torch.allclose(slope, eps - z, atol=1e-4)
    assert flow.flow_loss(eps - z, z, eps).tolist() == [0, 0, 0]


@pytest.mark.parametrize("schedule", ["euler", "authors"])
def test_euler_solves_a_straight_path(schedule):
    """With the true velocity of one pair (z, eps), the euler schedule ends exactly at z."""
    z, eps = torch.randn(2, 1, 4, 5)
    pairs = flow.sampling_times(schedule, 50, 8.0)
    x = flow.integrate(lambda x, t: eps - z, eps, pairs)
    walked = sum(float(b - a) for a, b in pairs)
    assert torch.allclose(x, eps + walked * (eps - z), atol=1e-5)
    assert len(pairs) == (50 if schedule == "euler" else 49)
    if schedule == "euler":
        assert torch.allclose(x, z, atol=1e-5)


def test_heun_is_of_second_order():
    """dx = -x dt from 1 to 0 grows x by e: halving the steps' size quarters Heun's error."""
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    errors = {}
    for solver, steps in (("euler", 20), ("euler", 40), ("heun", 20), ("heun", 40)):
        t = torch.linspace(1, 0.2, steps + 1).tolist()
        found = flow.integrate(lambda x, t: -x, x, list(zip(t[:-1], t[1:])), solver)
        errors[solver, steps] = abs(found.item() - math.exp(0.8))
    assert errors["euler", 20] / errors["euler", 40] == pytest.approx(2, rel=0.1)
    assert errors["heun", 20] / errors["heun", 40] == pytest.approx(4, rel=0.1)


def test_times_of_the_authors_schedule():
    pairs = flow.sampling_times("authors", 50, flow.shift_alpha(256, 1152))
    assert pairs[0][0] == pytest.approx(0.997601, abs=1e-6)      # starts off the grid,
    assert pairs[-2][1] == pytest.approx(0.008422, abs=1e-6)     # never reaches 0,
    assert list(pairs[-1]) == pytest.approx([0.997601, 1.0], abs=1e-6)  # stray step


def test_training_times_are_logit_normal_then_shifted():
    t = flow.sample_time(torch.tensor([-1.0, 0.0, 1.0]), 8.0)
    plain = [1 / (1 + math.exp(-n)) for n in (-1, 0, 1)]
    assert t.tolist() == pytest.approx([8 * p / (1 + 7 * p) for p in plain], abs=1e-6)


# ---- DiT ----

def test_initialisation():
    """AdaLN-zero: every block is the identity and v is 0; the rest as dit.initial says."""
    model = small_dit()
    assert model(torch.randn(2, 16, 24), torch.rand(2), torch.randn(2, 16, 64)).abs().max() == 0
    for name, p in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            assert p.abs().max() == 0, name
        elif name.endswith("bias") or "dropout_embedding" in name:
            assert p.abs().max() == 0, name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif name.startswith("t_embedder"):
            assert p.detach().std().item() == pytest.approx(0.02, rel=0.1), name
        elif p.dim() >= 2 and name != "pos_embed":
            bound = math.sqrt(6 / (p.shape[0] + p.shape[1]))
            assert 0.9 * bound < p.detach().abs().max() <= bound, name


def test_a_parameter_is_made_alone():
    """The initial value depends on seed and name, not on the other parameters."""
    model, name = small_dit(), "dit_blocks.1.attn.qkv.weight"
    alone = dit.initial(name, (192, 64), 0)
    assert torch.equal(alone, model.state_dict()[name])
    assert not torch.equal(alone, dit.initial(name, (192, 64), 1))
    second = dit.initial("r_embedder.mlp.0.weight", (64, 512), 0)       # a fork's second time
    assert second.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(alone, dit.initial(name.replace("1", "0", 1), (192, 64), 0))


@pytest.mark.parametrize("initial, name", [
    (dit.initial, "dit_blocks.0.gamma"), (text_model.initial, "model.layers.0.mlp.lora_b")])
def test_a_new_kind_of_parameter_needs_an_initial_value(initial, name):
    """Its value in the constructor is lost, so a guess from the shape would be a silent mistake."""
    with pytest.raises(ValueError, match=f"{name} has no initial value"):
        initial(name, (8, 4), 0)


def test_the_null_condition_and_one_time_broadcast():
    """cond [1,1,Z] equals the same vector at every token of every image, t [1] the same time."""
    model = small_dit()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t, null = torch.randn(2, 16, 24), torch.tensor([0.3]), model.null_condition()
    assert null.shape == (1, 1, 64)
    short = model(x, t, null)
    assert torch.allclose(short, model(x, t.expand(2), null.expand(2, 16, -1)), atol=1e-6)
    assert (short - model(x, t, torch.randn(2, 16, 64))).abs().max() > 1e-3


def test_x_prediction_gives_a_velocity():
    """With predict = "x" the last layer's output is the clean latent: v = (x_t - z) / t."""
    v_model, x_model = small_dit(), small_dit(predict="x")
    for p in v_model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x_model.load_state_dict(v_model.state_dict())
    x, t, cond = torch.randn(2, 16, 24), torch.tensor([0.5, 0.01]), torch.randn(2, 16, 64)
    z = v_model(x, t, cond)
    by_hand = (x - z) / torch.tensor([0.5, 0.05])[:, None, None]            # not below 0.05
    assert torch.allclose(x_model(x, t, cond), by_hand, atol=1e-5)
    with pytest.raises(ValueError, match="predict is 'eps'"):
        small_dit(predict="eps")


def test_time_frequencies_are_torch_s():
    """The file holds the draws that the authors' code makes with torch after the seed 114514."""
    drawn = torch.randn(256, generator=torch.Generator().manual_seed(114514))
    assert np.array_equal(np.load(ROOT / "time_frequencies.npy"), drawn.numpy())


@pytest.mark.parametrize("options", [{}, dict(head_width=96, head_depth=1), dict(qk_norm=True)])
def test_remat_gives_the_same_gradients(options):
    model = small_dit(**options)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t, cond = torch.randn(2, 16, 24), torch.rand(2), torch.randn(2, 16, 64)
    grads = []
    for model.remat in (False, True):
        model.zero_grad()
        model(x, t, cond).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("options", [{}, dict(head_width=96, head_depth=1)])
def test_padded_ffn_is_exact(options, monkeypatch):
    """Padding the FFN's odd width, as on CUDA, keeps outputs and gradients."""
    model = small_dit(**options)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t, cond = torch.randn(2, 16, 24), torch.rand(2), torch.randn(2, 16, 64)
    outputs, work = [], []
    for multiple in (1, 128):
        monkeypatch.setattr(dit.SwiGLU, "MULTIPLE", {"cpu": multiple})
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            v = model(x, t, cond)
        v.square().mean().backward()
        outputs.append([v, *(p.grad for p in model.parameters() if p.grad is not None)])
        work.append(counter.get_total_flops())
    assert work[1] > 1.05 * work[0]
    for a, b in zip(*outputs):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, dict(head_width=96, head_depth=2)])
def test_flops_against_torch(options):
    """The formula in dit.py within 1 % of torch's counter on a real forward and backward."""
    model = DiT(DiTConfig(24, 64, 64, 3, 4, **options))
    counter = FlopCounterMode(display=False)
    x = torch.randn(2, 64, 24, requires_grad=True)
    with counter:
        model(x, torch.rand(2), torch.randn(2, 64, 64, requires_grad=True)).sum().backward()
    counted = counter.get_total_flops() / 2
    if not any("attention" in str(op) for op in counter.get_flop_counts()["Global"]):
        widths = [64] * 3 + [96] * (2 if options else 0)    # the CPU's fused kernel is not counted
        counted += sum(6 * 2 * 64 * 64 * w for w in widths)
    assert counted == pytest.approx(model.train_flops(), rel=0.01)


def test_paper_flops():
    """TFLOP per image at N = 256, C = 1152 against the project's table, which counts the projector
    of the condition with the DiT; here the LLM counts it."""
    paper = {"0.5b": 0.753, "2b": 3.787, "3b": 4.784, "5b": 8.474, "9b": 15.035}
    for key, tflop in paper.items():
        s = SIZES[key]
        with torch.device("meta"):
            model = DiT(DiTConfig(1152, 256, s.width, s.depth, s.heads))
        H = (text_model.QWEN_7B if "7B" in s.llm else text_model.QWEN_1_5B).hidden_size
        flops = model.train_flops() + 6 * 256 * H * s.width
        assert flops / 1e12 == pytest.approx(tflop, abs=6e-4), key


def test_sizes_are_the_paper_s():
    """Width, depth and heads of Table 10. (The heads change neither counts nor FLOPs.)"""
    assert {k: (s.width, s.depth, s.heads) for k, s in SIZES.items() if k != "tiny"} == {
        "0.5b": (1280, 16, 32), "2b": (2048, 32, 32), "3b": (2304, 32, 32), "5b": (3072, 32, 32),
        "9b": (4096, 32, 32)}
    assert PAPER_NAMES == {"0.5B": "0.5b", "2.4B": "2b", "3.3B": "3b", "3.1B": "3b",
                           "5.5B": "5b", "9.8B": "9b"}


@pytest.mark.parametrize("options, says", [
    (dict(tokens=15), "not a square grid"), (dict(heads=3), "multiple of 4 x heads"),
    (dict(head_depth=1, head_width=66), "multiple of 4 x heads"), (dict(predict="eps"), "'eps'")],
    ids=str)
def test_sizes_that_do_not_divide(options, says):
    with pytest.raises(ValueError, match=says):
        DiT(replace(DiTConfig(channels=24, tokens=16, width=64, depth=1, heads=4), **options))


def test_the_modulation_input_is_fp32_up_to_its_cast():
    model = small_dit()
    model.dtype, seen = torch.bfloat16, []
    model.dit_blocks[0].register_forward_hook(lambda block, inputs, out: seen.append(inputs[1]))
    t, cond = torch.tensor([0.3, 0.8]), torch.randn(2, 16, 64)
    model(torch.randn(2, 16, 24), t, cond)
    assert torch.equal(seen[0], F.silu(F.silu(model.t_embedder(t)[:, None] + cond)).bfloat16())


@pytest.mark.parametrize("norm", [dit.RMSNorm(64, 1e-6), text_model.RMSNorm(64, 1e-6)],
                         ids=["dit", "llm"])
def test_a_norm_casts_back_before_its_weight(norm):
    g = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(64, generator=g)
    x = torch.randn(9, 64, generator=g).bfloat16()
    y = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), y.bfloat16() * norm.weight.bfloat16())


def test_qk_norm_comes_before_the_rotation():
    """With weights that are not all one the order shows."""
    torch.manual_seed(0)
    attention, rope = dit.Attention(32, 4, True, 1e-6), dit.RoPE(8, 3)
    x = torch.randn(2, 9, 32)
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.data = torch.rand(8) + 0.5
    q, k, v = attention.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    q, k = (rope(y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * n.weight)
            for y, n in ((q, attention.q_norm), (k, attention.k_norm)))
    y = (q @ k.mT / 8 ** 0.5).softmax(-1) @ v
    want = attention.proj(y.transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x, rope), want, atol=1e-6)


@pytest.mark.parametrize("module", [dit, text_model, encoder], ids=lambda m: m.__name__)
def test_attention_in_bf16_equals_fp32(module):
    """The form that a CPU takes in bf16 against torch's; the language model's is causal."""
    q, k, v = torch.randn(3, 2, 4, 24, 16, generator=torch.Generator().manual_seed(0))
    want = F.scaled_dot_product_attention(2 * q, k, v, is_causal=module is text_model)
    q, k, v = (x.bfloat16() for x in (2 * q, k, v))
    if module is encoder:                               # takes [B,L,C]
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        got = module.attention(q, k, v, 4).unflatten(-1, (4, -1)).transpose(1, 2)
    else:
        got = module.attention(q, k, v)
    assert (got.float() - want).abs().max() < 0.03 and want.std() > 0.3


# ---- encoder ----

@pytest.mark.parametrize("config", [
    encoder.TINY, encoder.ViTConfig("dinov2", 32, 64, 2, 2, image_size=28, patch_size=14)],
    ids=["siglip", "dinov2"])
def test_the_latent_by_hand(config):
    """The last block's output, read by a hook, then the norm; other sizes are resized bicubically;
    no class token is in the latent."""
    net, seen = encoder.ViT(config), []
    init_weights(net, encoder.initial)
    net.blocks[-1].register_forward_hook(lambda block, inputs, out: seen.append(out))
    S = net.image_size
    with torch.no_grad():
        z = net(torch.rand(2, 3, S, S))
        if config.model_type == "dinov2":
            net.norm.weight.copy_(torch.rand(32) + 0.5)
            z = net(torch.rand(2, 3, S, S))
            want = F.layer_norm(seen[-1], (32,), net.norm.weight, net.norm.bias, 1e-6)[:, 1:]
        else:
            want = F.layer_norm(seen[-1], (96,), eps=1e-6)
        assert z.shape == (2, net.tokens, net.channels) and torch.allclose(z, want, atol=1e-5)
        large = torch.rand(2, 3, 96, 96)
        small = F.interpolate(large, [S, S], mode="bicubic", align_corners=False)
        assert torch.allclose(net(large), net(small), atol=1e-4)


def test_what_published_encoders_do_not_say_in_shapes():
    """Heads; the class's defaults that transformers leaves out of a config; the processors."""
    assert encoder.SO400M.num_attention_heads == encoder.WEBSSL_300M.num_attention_heads == 16
    for kind, mean, crop in (("siglip_vision_model", 0.5, "squash"), ("dinov2", 0.485, "center")):
        with torch.device("meta"):
            net = encoder.ENCODERS[kind]({"model_type": kind})
        c = net.config
        assert (c.num_attention_heads, c.hidden_size, c.num_hidden_layers) == (12, 768, 12)
        assert (net.mean[0], net.crop, net.resample) == (mean, crop, 3)
    with pytest.raises(ValueError, match="use_swiglu_ffn"):
        encoder.vit_config({"model_type": "dinov2", "use_swiglu_ffn": True})
    with pytest.raises(ValueError, match="multiple of num_attention_heads 5"):
        encoder.ViT(replace(encoder.TINY, num_attention_heads=5))


# ---- language model ----

def test_cached_decoding_equals_uncached():
    """In pieces of any length, also the block of queries after a prefix."""
    llm = small_llm()
    x = torch.randn(1, 9, 32)
    whole = llm(x)
    cache, parts = [], []
    for piece in x.split([4, 1, 3, 1], 1):
        parts.append(llm(piece, cache))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_padding_and_future_are_not_seen():
    llm = small_llm()
    a, b = torch.randn(2, 1, 8, 32)
    b[:, :5] = a[:, :5]
    assert torch.allclose(llm(a)[:, :5], llm(b)[:, :5], atol=1e-6)


def test_where_images_and_queries_go():
    """Answer images take the queries, images in questions the projected latent, others nothing."""
    llm = small_llm()
    ids = torch.full((3, 10), 7)
    ids[0, 2:6] = ids[1, 5:9] = chat.IMAGE
    z = torch.randn(3, 4, 8)
    x = llm.embed(ids, torch.tensor([2, 5, 10]), torch.tensor([True, False, False]), z)
    word = llm.model.embed_tokens.weight[7]
    assert torch.equal(x[0, 2:6], llm.model.latent_queries)
    assert torch.allclose(x[1, 5:9], llm.model.mm_projector(z[1]), atol=1e-6)
    assert (x[2] == word).all() and (x[0, 6:] == word).all() and (x[1, :5] == word).all()
    h = torch.randn(3, 10, 32)
    cond = llm.condition(h, torch.tensor([2, 5, 10]))
    assert torch.allclose(cond[1], llm.diff_head_projector(h[1, 5:9]), atol=1e-6)


def test_text_loss_is_cross_entropy_of_the_next_token():
    llm = small_llm()
    h, labels = torch.randn(2, 70, 32), torch.randint(0, 50, (2, 70))
    labels[0, 3] = labels[1, 1:40] = chat.IGNORE
    p = llm.logits(h).log_softmax(-1)
    by_hand = -sum(p[b, i, labels[b, i + 1]] for b in range(2) for i in range(69)
                   if labels[b, i + 1] != chat.IGNORE)
    find = lambda *args: tuple(map(torch.from_numpy, chat.labelled(*args)))
    short, fixed = find(labels.numpy()), find(labels.numpy(), 69)
    assert short[0].shape == (2, 70) and fixed[0].shape == (2, 69)  # most in a row: 68, and 80 > 70
    assert (short[1] != chat.IGNORE).sum(1).tolist() == [68, 30]
    for where, targets in (short, fixed):
        assert torch.allclose(llm.text_loss(h, where, targets), by_hand, atol=1e-4)
    llm.config = replace(llm.config, vocab_size=2 ** 22)    # 64 positions at a time
    llm.head_weight = lambda: llm.model.embed_tokens.weight
    assert torch.allclose(llm.text_loss(h, *short), by_hand, rtol=1e-5)
    where, targets = find(labels[1:].numpy())
    assert where.shape == (1, 32) and where[0, :30].tolist() == list(range(39, 69))
    assert targets[0, :30].equal(labels[1, 40:]) and (targets[0, 30:] == chat.IGNORE).all()
    with pytest.raises(ValueError, match="68 labelled tokens in a sample, more than 67"):
        chat.labelled(labels.numpy(), 67)


def test_image_tokens_and_labels():
    turns = [{"from": "human", "value": "a cat"}, {"from": "gpt", "value": chat.ANSWER}]
    ids, labels, start, answer = chat.insert_image_tokens(*chat.chat(TOKENIZER, turns), tokens=4)
    assert answer and ids[start:start + 4] == [chat.IMAGE] * 4
    assert labels[start:start + 4] == [chat.IGNORE] * 4
    assert labels[start - 1] == ids[start - 1] == TOKENIZER.token_to_id("<im_start>")
    assert labels[start + 4] == TOKENIZER.token_to_id("<im_end>")   # the last query predicts it
    question = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "A cat."}]
    ids, labels, start, answer = chat.insert_image_tokens(*chat.chat(TOKENIZER, question), tokens=4)
    assert not answer and labels[start - 1] == chat.IGNORE
    with pytest.raises(ValueError, match="2 images"):
        chat.insert_image_tokens([chat.IMAGE, 1, chat.IMAGE], [0, 0, 0], 4)


def test_batches_pad_to_a_multiple():
    rows = [([1] * 70, [1] * 70, 3, True), ([1] * 5, [1] * 5, None, False)]
    ids, labels, start, answer = chat.pad_batch(rows, 0)
    assert ids.shape == labels.shape == (2, 128) and start.tolist() == [3, 128]
    assert (labels[1, 5:] == chat.IGNORE).all() and answer.tolist() == [True, False]


def test_a_first_turn_that_is_not_the_human_s_is_lost():
    """As in the authors' preprocessing; an image that nobody mentions goes to the human."""
    ask = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "A cat."}]
    early = [{"from": "gpt", "value": "Hello."}, *ask]
    assert chat.chat(TOKENIZER, early) == chat.chat(TOKENIZER, ask)
    shown = [{"from": "human", "value": "<image>\nwhat?"}, ask[1]]
    assert chat.chat(TOKENIZER, early) == chat.chat(TOKENIZER, shown)


def test_chat_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import chat; chat.load_tokenizer('tiny')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("own, padding", [
    (["<im_start>", "<im_end>", "<|a|>"], 40), (["<im_start>", "<im_end>"], 40),
    (["<im_start>", "<im_end>", "<|a|>"], 0), (["<|a|>"], 40), (["<|a|>"], 0)])
@pytest.mark.parametrize("tied", [True, False])
def test_an_llm_keeps_the_rows_of_its_own_tokens(own, padding, tied, tmp_path):
    """Padding rows go, the rows of tokens that we add are the mean of the others, each matrix its
    own; all of the tokenizer's own tokens keep their trained rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    chat.add_special(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *own])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    known, rows = tokenizer.get_vocab_size(), tokenizer.get_vocab_size() + padding
    config = replace(text_model.TINY, vocab_size=rows, tie_word_embeddings=tied)
    plain = text_model.TextModel(config)
    init_weights(plain, text_model.initial, 3)
    state = {k: v.bfloat16() for k, v in plain.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(vars(config)))
    full = chat.load_tokenizer(tmp_path)
    source, V = stage2.llm_source(tmp_path, full), full.get_vocab_size()
    assert V == known + sum(t not in own for t in ("<im_start>", "<im_end>"))
    for key in ["model.embed_tokens.weight", "lm_head.weight"][:1 if tied else 2]:
        found, stored = source.rows(key).float(), state[key].float()
        assert found.shape == (V, 128) and torch.equal(found[:known], stored[:known])
        mean = stored[:known].mean(0)
        assert torch.allclose(found[known:], mean.expand(V - known, -1), atol=1e-6)


def test_positions_above_256_in_bf16():
    """bf16 has no 257, so positions and angles are fp32."""
    llm, seen = text_model.TextModel(replace(text_model.TINY, vocab_size=9)), []
    llm.run = lambda layers, x, cos, sin: (seen.append((cos, sin)), x)[1]
    llm(torch.zeros(1, 600, 128, dtype=torch.bfloat16))
    angle = torch.arange(600)[:, None] * 1e6 ** (-torch.arange(0, 32, 2) / 32)
    for got, want in zip(seen[0], (angle.cos(), angle.sin())):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want.repeat(1, 2)).abs().max() < 0.01


def test_a_tokenizer_that_truncates_and_pads(tmp_path):
    """A tokenizer.json may ask for both; we do neither."""
    tokenizer = chat.load_tokenizer(ROOT / "tiny")
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = "a red circle left of a blue star"
    assert (chat.encode_text(chat.load_tokenizer(tmp_path), words)
            == chat.encode_text(TOKENIZER, words))


def test_ids_of_added_tokens_must_fit(tmp_path):
    chat.save_tokenizer(TOKENIZER, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    added["<|im_end|>"] += 7
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(UserError, match="'<|im_end|>' should have the id"):
        chat.load_tokenizer(tmp_path)
