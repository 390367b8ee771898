"""Released checkpoints: key tables at full size, loading every layout, wrong and damaged files.

    OMP_NUM_THREADS=1 python -m pytest -q tests/test_released.py          # under a minute

The real files are not needed: key names and shapes are written down here once, from the layout of
the released repositories; small folders with exactly these keys are made from them and loaded.
"""
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import chat  # noqa: E402
import checkpoint  # noqa: E402
import decoder as decoders  # noqa: E402
import dit  # noqa: E402
import encoder as encoders  # noqa: E402
import flow  # noqa: E402
import losses  # noqa: E402
import networks  # noqa: E402
import parallel  # noqa: E402
import sample  # noqa: E402
import stage2  # noqa: E402
import text_model  # noqa: E402
import vae  # noqa: E402
import weights  # noqa: E402
from cli import UserError  # noqa: E402
from conftest import init_weights   # noqa: E402
from dit import DiT, DiTConfig  # noqa: E402
from text_model import TextModel  # noqa: E402

torch.set_num_threads(1)
CPU = parallel.setup("cpu", "float32")
TOKENIZER = HERE.parent / "tiny/tokenizer.json"
GOLDEN = HERE / "golden"
HALF = (0.5, 0.5, 0.5)

# ------------------------------------------------------------------------------------------------
# The key tables: {key: shape}
# ------------------------------------------------------------------------------------------------


def linear(name, out, width, bias=True):
    return {f"{name}.weight": [out, width], **({f"{name}.bias": [out]} if bias else {})}


def norm(name, width):
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def llm_keys(H, layers, heads, kv, mlp, V, tied, N=0, C=0, Z=0):
    keys = {"model.embed_tokens.weight": [V, H], "model.norm.weight": [H]}
    for i in range(layers):
        p = f"model.layers.{i}."
        keys |= {p + "input_layernorm.weight": [H], p + "post_attention_layernorm.weight": [H],
                 **linear(p + "self_attn.q_proj", H, H),
                 **linear(p + "self_attn.k_proj", H // heads * kv, H),
                 **linear(p + "self_attn.v_proj", H // heads * kv, H),
                 **linear(p + "self_attn.o_proj", H, H, bias=False),
                 **linear(p + "mlp.gate_proj", mlp, H, bias=False),
                 **linear(p + "mlp.up_proj", mlp, H, bias=False),
                 **linear(p + "mlp.down_proj", H, mlp, bias=False)}
    if not tied:
        keys["lm_head.weight"] = [V, H]
    if N:
        keys |= {"model.latent_queries": [N, H], **linear("model.mm_projector.0", H, C),
                 **linear("model.mm_projector.2", H, H), **linear("diff_head_projector", Z, H)}
    return keys


def dit_keys(C, N, D, depth, heads, Z, D2=0, depth2=0, heads2=0):
    """Under `diff_head.model.`; D2, depth2, heads2: the wide head."""
    keys = {"pos_embed": [1, N, D], "x_embedder.proj.weight": [D, C, 1, 1],
            "x_embedder.proj.bias": [D], **linear("t_embedder.mlp.0", Z, 512),
            **linear("t_embedder.mlp.2", Z, Z), "y_embedder.dropout_embedding": [Z]}
    for i in range(depth + depth2):
        p, W, cond = f"dit_blocks.{i}.", D if i < depth else D2, Z if i < depth else D2
        h = int(2 / 3 * int(4 * W))
        keys |= {p + "norm1.weight": [W], p + "norm2.weight": [W],
                 **linear(p + "attn.qkv", 3 * W, W), **linear(p + "attn.proj", W, W),
                 **linear(p + "mlp.w12", 2 * h, W), **linear(p + "mlp.w3", W, h),
                 **linear(p + "adaLN_modulation.1", 6 * W, cond)}
    W, cond = (D2, D2) if depth2 else (D, Z)
    keys |= {"final_layer.norm_final.weight": [W], **linear("final_layer.linear", C, W),
             **linear("final_layer.adaLN_modulation.1", 2 * W, cond)}
    if depth2:
        keys |= {"s_embedder.proj.weight": [D2, C, 1, 1], "s_embedder.proj.bias": [D2]}
        keys |= linear("s_projector", D2, D) if D2 != D else {}
    ropes = {"enc_rope": D // heads, "dec_rope": D2 // heads2} if depth2 else {
        "feat_rope": D // heads}
    keys |= {f"{r}.freqs_{f}": [N, hd] for r, hd in ropes.items() for f in ("cos", "sin")}
    return {"diff_head.model." + k: v for k, v in keys.items()}


def decoder_keys(C, W, layers, mlp, tokens, patch):
    keys = {**linear("decoder_embed", W, C), "decoder_pos_embed": [1, 1 + tokens, W],
            "trainable_cls_token": [1, 1, W], **norm("decoder_norm", W),
            **linear("decoder_pred", 3 * patch ** 2, W)}
    for i in range(layers):
        p = f"decoder_layers.{i}."
        keys |= {**norm(p + "layernorm_before", W), **norm(p + "layernorm_after", W),
                 **linear(p + "attention.output.dense", W, W),
                 **linear(p + "intermediate.dense", mlp, W), **linear(p + "output.dense", W, mlp)}
        for name in ("query", "key", "value"):
            keys |= linear(p + f"attention.attention.{name}", W, W)
    return keys


def siglip_keys(C, layers, mlp, tokens, patch):
    keys = {"embeddings.patch_embedding.weight": [C, 3, patch, patch],
            "embeddings.patch_embedding.bias": [C],
            "embeddings.position_embedding.weight": [tokens, C], **norm("post_layernorm", C),
            "head.probe": [1, 1, C], "head.attention.in_proj_weight": [3 * C, C],
            "head.attention.in_proj_bias": [3 * C], **linear("head.attention.out_proj", C, C),
            **norm("head.layernorm", C), **linear("head.mlp.fc1", mlp, C),
            **linear("head.mlp.fc2", C, mlp)}
    for i in range(layers):
        p = f"encoder.layers.{i}."
        keys |= {**norm(p + "layer_norm1", C), **norm(p + "layer_norm2", C),
                 **linear(p + "mlp.fc1", mlp, C), **linear(p + "mlp.fc2", C, mlp)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            keys |= linear(p + f"self_attn.{name}", C, C)
    return {"vision_model." + k: v for k, v in keys.items()}


def dino_keys(C, layers, tokens, patch):
    keys = {"embeddings.cls_token": [1, 1, C], "embeddings.mask_token": [1, C],
            "embeddings.position_embeddings": [1, 1 + tokens, C], **norm("layernorm", C),
            "embeddings.patch_embeddings.projection.weight": [C, 3, patch, patch],
            "embeddings.patch_embeddings.projection.bias": [C]}
    for i in range(layers):
        p = f"encoder.layer.{i}."
        keys |= {**norm(p + "norm1", C), **norm(p + "norm2", C), p + "layer_scale1.lambda1": [C],
                 p + "layer_scale2.lambda1": [C], **linear(p + "attention.output.dense", C, C),
                 **linear(p + "mlp.fc1", 4 * C, C), **linear(p + "mlp.fc2", C, 4 * C)}
        for name in ("query", "key", "value"):
            keys |= linear(p + f"attention.attention.{name}", C, C)
    return keys


def shapes(state):
    return {k: list(v.shape) for k, v in state.items()}


def count(keys):
    """Parameters in a key table: all but the rotary tables."""
    return sum(torch.Size(v).numel() for k, v in keys.items() if "freqs_" not in k)


# ------------------------------------------------------------------------------------------------
# Full size, on the meta device
# ------------------------------------------------------------------------------------------------

QWEN = {"1.5b": (1536, 28, 12, 2, 8960), "7b": (3584, 28, 28, 4, 18944)}
LLM = {"1.5b": text_model.QWEN_1_5B, "7b": text_model.QWEN_7B}


def full_size(llm, D, depth, heads, C=1152, C_enc=1152, **head):
    config = stage2.ModelConfig(DiTConfig(C, 256, D, depth, heads, D, **head), LLM[llm], C_enc, 1.0,
                                "encoder")
    with torch.device("meta"):
        return stage2.build_stage2(config, torch.float32)


def model_state(llm, dit):
    """The tensors of both networks under the released keys."""
    return {**llm.state_dict(), **{weights.DIT + k: v for k, v in dit.state_dict().items()}}


@pytest.mark.parametrize("llm", QWEN)
@pytest.mark.parametrize("size, billions, printed", [
    ("0.5b", 0.4811, 0.481), ("2b", 2.4359, 2.436), ("3b", 3.0820, 3.082), ("5b", 5.4754, 5.475),
    ("9b", 9.7288, 9.729)])
def test_keys_and_counts_of_every_size(size, billions, printed, llm):
    s, (H, layers, heads, kv, mlp) = dit.SIZES[size], QWEN[llm]
    want = dit_keys(1152, 256, s.width, s.depth, s.heads, s.width)
    assert round(count(want) / 1e9, 4) == billions and round(count(want) / 1e9, 3) == printed
    want |= llm_keys(H, layers, heads, kv, mlp, 151667, llm == "1.5b", 256, 1152, s.width)
    models = full_size(llm, s.width, s.depth, s.heads)
    assert shapes(model_state(*models)) == want
    assert sum(p.numel() for m in models for p in m.parameters()) == count(want)


def test_keys_and_counts_of_the_variants():
    """The documentation's 3072 x 48, WebSSL's and the VAE's channels, the wide head."""
    assert round(count(dit_keys(1152, 256, 3072, 48, 48, 3072)) / 1e9, 4) == 8.1942
    plain = count(dit_keys(1152, 256, 2048, 32, 32, 2048))
    wide = dit_keys(1152, 256, 2048, 32, 32, 2048, 2688, 2, 32)
    assert round((count(wide) - plain) / 1e9, 4) == 0.2756
    tables = {(1024, 1024): dit_keys(1024, 256, 2048, 32, 32, 2048),        # WebSSL
              (64, 1152): dit_keys(64, 256, 2048, 32, 32, 2048)}            # FLUX VAE
    for (C, C_enc), want in tables.items():
        models = full_size("1.5b", 2048, 32, 32, C, C_enc)
        want |= llm_keys(*QWEN["1.5b"], 151667, True, 256, C_enc, 2048)
        assert shapes(model_state(*models)) == want
    _, head = full_size("1.5b", 2048, 32, 32, head_width=2688, head_depth=2)
    assert {"diff_head.model." + k: v for k, v in shapes(head.state_dict()).items()} == wide


def test_counts_of_the_public_language_models():
    """Qwen2.5-Instruct with its own vocabulary: the published totals."""
    for name, V, total in (("1.5b", 151936, 1_543_714_304), ("7b", 152064, 7_615_616_512)):
        with torch.device("meta"):
            model = TextModel(replace(LLM[name], vocab_size=V))
        assert sum(p.numel() for p in model.parameters()) == total
        assert shapes(model.state_dict()) == llm_keys(*QWEN[name], V, name == "1.5b")


def test_keys_and_counts_of_decoders_and_encoders():
    with torch.device("meta"):
        decoder = decoders.Decoder(decoders.size_config("xl", 1152, 256, 14, HALF, HALF))
        siglip, dino = encoders.build_vit({}), encoders.ViT(encoders.WEBSSL_300M)
    want = decoder_keys(1152, 1152, 28, 4096, 256, 14)
    assert shapes(decoder.state_dict()) == want
    assert round((count(want) - 257 * 1152) / 1e6, 1) == 415.3          # without the fixed table
    assert not decoder.image_mean.is_meta and not decoder.decoder_pos_embed.is_meta
    want = siglip_keys(1152, 27, 4304, 256, 14)
    ours = lambda keys, dino: {encoders.our_key(k, dino): v for k, v in keys.items()
                               if encoders.our_key(k, dino)}
    assert shapes(siglip.state_dict()) == ours(want, False)
    assert count(want) == 428_225_600 - (27 ** 2 - 16 ** 2) * 1152      # of the 384 px file
    want = dino_keys(1024, 24, 256, 14)
    assert shapes(dino.state_dict()) == ours(want, True)
    assert count(want) == 304_368_640 - (37 ** 2 - 16 ** 2) * 1024      # of DINOv2-L at 518 px


# ------------------------------------------------------------------------------------------------
# Small folders in the released layout. The DiT is the golden file's: N = 16, C = 24, Z = 32
# ------------------------------------------------------------------------------------------------

SMALL = (32, 2, 2, 1, 48)                               # H, layers, heads, kv heads, MLP
VOCABULARY = chat.load_tokenizer(TOKENIZER.parent).get_vocab_size()


def golden_tensors(name, part):
    return {k.removeprefix(part): v for k, v in load_file(GOLDEN / f"{name}.safetensors").items()
            if k.startswith(part)}


def random_state(keys, seed=0):
    """Matrices N(0, 1/fan in), vectors N(0, 0.1^2), norms about 1."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for k, shape in keys.items():
        noise = torch.randn(shape, generator=g)
        state[k] = noise / noise[0].numel() ** 0.5 if len(shape) > 1 else 0.1 * noise + (
            "norm" in k and k.endswith("weight"))
    return state


def released(tied=True, wide=False, V=VOCABULARY):
    """-> (config, state) as in a released repository."""
    config = dict(
        architectures=["ScaleRAEQwenForCausalLM"], model_type="cambrian_qwen", vocab_size=V,
        **dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "intermediate_size"), SMALL)),
        hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None,
        tie_word_embeddings=tied, vision_loss="diffusion-loss", vision_loss_mode="query",
        dit_cls="DDT" if wide else "DiT", diffusion_model_hidden_size=[48, 96] if wide else 64,
        diffusion_model_depth=[2, 2] if wide else 3, diffusion_model_heads=[4, 4] if wide else 4,
        diffusion_model_channels=24, diffusion_model_z_channels=32,
        diffusion_class_dropout_prob=0.1, ddt_encoder_depth=2, diffusion_base_dim=None,
        vision_tower_aux_token_len_list=[16], mm_hidden_size=24,
        mm_vision_tower_aux_list=["google/siglip2-so400m-patch14-224-interp256"])
    head = golden_tensors("dit_dh" if wide else "dit", "weights.model.")
    state = random_state(llm_keys(*SMALL, V, tied, 16, 24, 32))
    return config, {**state, **{"diff_head.model." + k: v for k, v in head.items()}}


def write(folder, config, state, form="safetensors", tokenizer=True):
    """form: safetensors, shards, bin, bin shards, model.pt, model.pth."""
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        (folder / "tokenizer.json").write_text(TOKENIZER.read_text())
    if "shards" in form:
        suffix, names, index = ("bin", "pytorch_model", {}) if "bin" in form else (
            "safetensors", "model", {})
        for i in range(3):
            part = dict(sorted(state.items())[i::3])
            name = f"{names}-{i + 1:05d}-of-00003.{suffix}"
            index.update(dict.fromkeys(part, name))
            torch.save(part, folder / name) if suffix == "bin" else save_file(
                part, folder / name, {"format": "pt"})
        (folder / f"{names}.{suffix}.index.json").write_text(
            json.dumps({"metadata": {"total_size": 0}, "weight_map": index}))
    elif form == "safetensors":
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        new = form != "model.pth"       # .pth: as before torch 1.6
        torch.save(state if new else {"model": state}, folder / form,
                   _use_new_zipfile_serialization=new)
    return folder


FORMS = ["safetensors", "shards", "bin", "bin shards", "model.pt", "model.pth"]
OPTIONS = [dict(dtype=torch.bfloat16), dict(dtype=torch.float16, wide=True), dict(tied=False),
           dict(tied=False, wide=True, dtype=torch.bfloat16), dict(prefix="_orig_module."),
           dict(inner=("layers.", "layers._fsdp_wrapped_module.")),
           dict(prefix="module._fpw_module."), dict(stored_head=True), dict(tables=False)]


@pytest.mark.parametrize("form, options",
                         [(f, {}) for f in FORMS] + [("shards", o) for o in OPTIONS],
                         ids=lambda v: v if isinstance(v, str) else ",".join(v) or "plain")
def test_loads_every_layout(tmp_path, form, options):
    o = dict(dtype=torch.float32, tied=True, wide=False, prefix="", inner=("", ""),
             stored_head=False, tables=True) | options
    config, state = released(o["tied"], o["wide"])
    if o["stored_head"]:                                # some tied files hold the head all the same
        state["lm_head.weight"] = torch.ones(VOCABULARY, SMALL[0])
    pos = "diff_head.model.pos_embed"
    if o["tables"]:
        state[pos] = state[pos] + 1                     # a finetune may have moved it: kept
        for k in state:
            if "freqs_" in k:
                state[k] = torch.full_like(state[k], 7.0)       # never trusted
    else:
        state = {k: v for k, v in state.items() if "freqs_" not in k and k != pos}
    state = {k: v.to(o["dtype"]).contiguous() for k, v in state.items()}
    wrapped = {o["prefix"] + k.replace(*o["inner"]): v for k, v in state.items()}
    write(tmp_path / "m", config, wrapped, form)
    run = stage2.load_run(tmp_path / "m", CPU)
    loaded = model_state(run.llm, run.dit)
    assert run.tokenizer.token_to_id("<im_start>") == VOCABULARY - 2
    assert (run.dit.config.head_depth > 0) == o["wide"]
    assert ("lm_head.weight" in loaded) != o["tied"] and run.config.released
    fresh = DiT(run.dit.config)
    for k, v in loaded.items():
        assert v.dtype == torch.float32 and not v.is_meta, k
        own = fresh.state_dict().get(k.removeprefix("diff_head.model."))
        from_file = k in state and "freqs_" not in k
        assert torch.equal(v, state[k].float() if from_file else own), k
    assert set(state) - set(loaded) == ({"lm_head.weight"} if o["stored_head"] else set())
    assert torch.equal(run.dit.t_embedder.frequencies, fresh.t_embedder.frequencies)
    assert not any(p.requires_grad for m in (run.llm, run.dit) for p in m.parameters())


def test_vocabulary_and_what_the_config_leaves_out_are_the_files(tmp_path):
    config, state = released(V=VOCABULARY + 3)
    config["vocab_size"] = 9999
    for k in ("mm_hidden_size", "diffusion_model_z_channels", "diffusion_class_dropout_prob",
              "vision_tower_aux_token_len_list", "diffusion_model_channels"):
        config.pop(k)
    run = stage2.load_run(write(tmp_path / "m", config, state), CPU)
    assert len(run.llm.model.embed_tokens.weight) == run.config.llm.vocab_size == VOCABULARY + 3
    assert hasattr(run.dit, "y_embedder") and run.config.dit.cond_width == 32


def test_classic_ddt_is_one_width_and_split(tmp_path):
    """vision_loss ddt-loss with an int width: s_embedder, one rotary table, no s_projector."""
    keys = dit_keys(24, 16, 64, 1, 4, 32, 64, 2, 4)
    keys = {k.replace("enc_rope", "feat_rope"): v for k, v in keys.items() if "dec_rope" not in k}
    config, state = released()
    config |= dict(vision_loss="ddt-loss", ddt_encoder_depth=1)
    state = {k: v for k, v in state.items() if "diff_head.model" not in k} | random_state(keys)
    k = stage2.load_run(write(tmp_path / "m", config, state), CPU).config.dit
    assert (k.depth, k.head_depth, k.head_width) == (1, 2, 64)


def test_tokenizer_from_either_kind_of_files(tmp_path):
    """tokenizer.json, and vocab.json + merges.txt + added_tokens.json, with the same ids."""
    line = "<|im_start|>a <im_start>cat<im_end>\n\n  d\u00e9j\u00e0 vu 12 \u732b<|im_end|>"
    slow = chat.load_tokenizer(GOLDEN / "qwen_tokenizer")
    slow.save(str(tmp_path / "tokenizer.json"))
    fast = chat.load_tokenizer(tmp_path)
    assert slow.encode(line).ids == fast.encode(line).ids
    assert [fast.token_to_id(t) for t in ("<im_start>", "<im_end>")] == [151665, 151666]
    # and what we export
    tiny = chat.load_tokenizer(TOKENIZER.parent)
    chat.save_tokenizer(tiny, tmp_path)
    fast = chat.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()              # now from the files of a slow tokenizer
    slow = chat.load_tokenizer(tmp_path)
    assert tiny.encode(line).ids == fast.encode(line).ids == slow.encode(line).ids


# ------------------------------------------------------------------------------------------------
# Our exports
# ------------------------------------------------------------------------------------------------

# what the authors' code reads in config.json, besides Qwen2's fields
FIELDS = dict(
    model_type="cambrian_qwen", vision_loss="diffusion-loss", vision_loss_mode="query",
    dit_cls="DiT", diffusion_model_hidden_size=64, diffusion_model_depth=2, diffusion_model_heads=4,
    diffusion_model_z_channels=64, diffusion_model_channels=24, diffusion_class_dropout_prob=0.1,
    ddt_encoder_depth=2, diffusion_split_per_token=16, diffusion_base_dim=None,
    diffusion_norm_stats_path=None, vision_tower_aux_token_len_list=[16],
    mm_vision_tower_aux_list=["google/siglip2-so400m-patch14-224"],
    mm_vision_tower_aux_token_len_list=[16], mm_projector_type="mlp2x_gelu", mm_hidden_size=24,
    mm_use_im_start_end=True, mm_vision_select_layer=-1, image_aspect_ratio="square",
    tokenizer_padding_side="right", tokenizer_model_max_length=1024,
    generation_alignment_tower=None, patch_size=2, si_token_len=729, miv_token_len=0,
    image_position=35, vision_hidden_size=24, connector_only=True, vocab_size=VOCABULARY,
    rope_theta=1e6, rope_scaling=None, rms_norm_eps=1e-6, hidden_act="silu",
    tie_word_embeddings=True)


@pytest.mark.parametrize("options", [dict(), dict(head_width=96, head_depth=1), dict(qk_norm=True),
                                     dict(head_depth=1), dict(null=False)], ids=str)
def test_export_then_load_is_the_same(tmp_path, options):
    k = DiTConfig(24, 16, 64, 2, 4, **options)
    network, qwen = DiT(k), replace(text_model.TINY, vocab_size=VOCABULARY)
    init_weights(network, dit.initial)
    llm = TextModel(qwen, 16, 24, 64)
    init_weights(llm, text_model.initial)
    config = stage2.ModelConfig(k, qwen, 24, flow.shift_alpha(16, 24), weights.HUB["siglip2"][0])
    saved = stage2.save_config(config)
    if not options:
        assert {name: saved.get(name, "lacking") for name in FIELDS} == FIELDS
        shifted = stage2.save_config(replace(config, alpha=flow.shift_alpha(16, 24, 128)))
        assert shifted["diffusion_base_dim"] == pytest.approx(128)
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    state = {key: v.clone() for key, v in model_state(llm, network).items()}
    average = {key: v + 1 if key == "model.norm.weight" else v for key, v in state.items()}
    for name, tensors in (("model", state), ("ema", average)):
        save_file(tensors, final / f"{name}.safetensors", {"config": json.dumps(saved)})
    (final / "config.json").write_text(json.dumps(saved))
    chat.save_tokenizer(chat.load_tokenizer(TOKENIZER.parent), final)
    for path, want in ((tmp_path / "run", average), (final, average),
                       (final / "model.safetensors", state)):
        run = stage2.load_run(path, CPU)
        loaded = model_state(run.llm, run.dit)
        assert loaded.keys() == want.keys() and run.config == config
        assert all(torch.equal(loaded[key], v) for key, v in want.items())
    del saved["scale_rae"], saved["vocab_size"]         # as the authors' fields alone say it
    (final / "config.json").write_text(json.dumps(saved))
    save_file(state, final / "model.safetensors")
    again = stage2.load_run(final / "model.safetensors", CPU).config
    assert again.dit == (replace(k, cond_width=64, head_width=k.head_width or 64, head_heads=4)
                         if k.head_depth else replace(k, cond_width=64))


@pytest.mark.parametrize("change, says", [
    (lambda c: c["dit"].update(depht=3), "unknown field depht"),
    (lambda c: c["dit"].update(predict="eps"), "predict is 'eps'"),
    (lambda c: c.update(cross_attention=True), "unknown field cross_attention"),
    (lambda c: c["llm"].update(hidden_size="128"), "hidden_size is '128', expected int"),
    (lambda c: c["dit"].update(depth=10 ** 9),
     "depth is 1000000000 in the config, 6 in the weights"),
    (lambda c: c.update(alpha=-3), "alpha is -3.0"), (lambda c: c.update(alpha=1e999), "alpha is"),
    (lambda c: c.update(llm="qwen"), "its config: "), (lambda c: c.update(vae=5), "vae is 5"),
    (lambda c: c["dit"].pop("width"), "lacks width")])
def test_a_config_that_the_code_does_not_know_is_an_error(tmp_path, change, says):
    """Never ignored: a run of a fork is not drawn by other code than it was trained with."""
    run = stage2.load_run(weights.TINY, CPU)
    saved = stage2.save_config(run.config)
    change(saved["scale_rae"])
    shutil.copy(TOKENIZER, tmp_path)
    save_file(load_file(weights.TINY / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError) as error:
        stage2.load_run(tmp_path, CPU)
    assert says in str(error.value)


# ------------------------------------------------------------------------------------------------
# The frozen networks
# ------------------------------------------------------------------------------------------------

MAE = dict(model_type="vit_mae", hidden_size=768, num_hidden_layers=12, decoder_hidden_size=32,
           decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
           decoder_intermediate_size=48, image_size=56, patch_size=14, layer_norm_eps=1e-12)


def an_encoder(channels, mean=HALF, std=HALF):
    """What load_decoder asks of an encoder."""
    return SimpleNamespace(tokens=16, channels=channels, mean=mean, std=std)


def decoder_folder(folder, config=MAE, pos=True, patch=14, name="model.pt"):
    state = random_state(decoder_keys(24, 32, 2, 48, 16, patch), seed=1)
    if not pos:
        state.pop("decoder_pos_embed")
    write(folder, config, state, name, tokenizer=False)
    return state


@pytest.mark.parametrize("options, side", [
    (dict(), 56), (dict(pos=False), 56), (dict(patch=16), 64), (dict(name="model.pth"), 56),
    (dict(config={"decoder_num_attention_heads": 4}), 56)], ids=str)
def test_decoder_folder(tmp_path, options, side):
    """hidden_size and patch_size of the config may be wrong; the table of positions may lack."""
    state = decoder_folder(tmp_path / "d", **options)
    model = networks.load_decoder(tmp_path / "d", CPU, an_encoder(24, (.1, .2, .3), (.4, .5, .6)))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())
    table = loaded["decoder_pos_embed"]
    fixed = decoders.sincos_positions(32, 4)
    assert "decoder_pos_embed" in state or torch.equal(table[0, 1:], fixed)
    assert model(torch.rand(1, 16, 24)).shape == (1, 3, side, side)
    assert model.image_mean.flatten().tolist() == pytest.approx([.1, .2, .3])
    assert model.decoder_layers[0].heads == 4 and model.decoder_norm.eps == 1e-12


def encoder_folder(folder):
    """As google/siglip2-*: both towers, and a nested config without what is the class's default."""
    keys = siglip_keys(24, 2, 48, 16, 56)               # image_size 224 and 12 heads are defaults
    extra = {"text_model.embeddings.token_embedding.weight": [9, 24], "text_model.head.bias": [24],
             "logit_scale": [1], "logit_bias": [1]}
    config = dict(model_type="siglip", text_config={"hidden_size": 24}, vision_config=dict(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, patch_size=56))
    state = random_state({**keys, **extra}, seed=2)
    write(folder, config, {k: v.bfloat16() for k, v in state.items()}, tokenizer=False)
    return {k: v.bfloat16().float() for k, v in state.items() if k in keys}


def same_encoder(model, state, dino=False):
    """Whether the network has the file's tensors, under its own names."""
    ours = {encoders.our_key(k, dino): v for k, v in state.items()}
    return all(torch.equal(v, ours[k]) for k, v in model.state_dict().items())


def test_encoder_folders(tmp_path):
    state = encoder_folder(tmp_path / "siglip")
    model = networks.load_encoder(tmp_path / "siglip", CPU)
    assert same_encoder(model, state)
    assert (model.tokens, model.channels, model.image_size) == (16, 24, 224)
    assert model.blocks[0].attn.heads == 12 and model.resample == 3
    (tmp_path / "siglip/preprocessor_config.json").write_text('{"resample": 2}')
    assert networks.load_encoder(tmp_path / "siglip", CPU).resample == 2
    config = json.loads((tmp_path / "siglip/config.json").read_text())      # as transformers 5
    alone = {k.removeprefix("vision_model."): v for k, v in state.items()}  # writes the tower alone
    model = networks.load_encoder(write(tmp_path / "5", config, alone, tokenizer=False), CPU)
    assert same_encoder(model, state)

    keys = dino_keys(24, 2, 16, 14)
    state = random_state(keys, seed=3)
    state.pop("embeddings.mask_token")
    config = dict(model_type="dinov2", hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                  image_size=56, patch_size=14, mlp_ratio=4)
    model = networks.load_encoder(write(tmp_path / "dino", config, state, tokenizer=False), CPU)
    assert same_encoder(model, state, dino=True)
    assert model(torch.rand(1, 3, 56, 56)).shape == (1, 16, 24)
    with pytest.raises(UserError, match="24 must be a multiple of num_attention_heads 7"):
        networks.load_encoder(write(tmp_path / "7", {**config, "num_attention_heads": 7}, state,
                                   tokenizer=False), CPU)
    for kind in ("int8", "float8_e4m3fn"):
        norm = torch.ones(24).to(getattr(torch, kind))
        with pytest.raises(UserError, match=f"norm.weight is torch.{kind}; quantised"):
            networks.load_encoder(write(tmp_path / kind, config, {
                **state, "layernorm.weight": norm}, tokenizer=False), CPU)
    for wrong in ({"num_attention_heads": -4}, {"layer_norm_eps": "x"}, {"model_type": ["a"]}):
        with pytest.raises(UserError, match=f"{tmp_path}/w: {next(iter(wrong))} is "):
            networks.load_encoder(write(tmp_path / "w", {**config, **wrong}, state,
                                       tokenizer=False), CPU)
    with pytest.raises(UserError, match="model_type is 'clip_vision_model'"):
        networks.load_encoder(write(tmp_path / "clip", {"model_type": "clip_vision_model"}, state,
                                   tokenizer=False), CPU)


def test_vae_perceptual_and_discriminator(tmp_path):
    torch.manual_seed(0)
    small = vae.VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    state = vae.VAE(small).state_dict()
    (tmp_path / "flux" / "vae").mkdir(parents=True)
    save_file(state, tmp_path / "flux" / "vae" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "flux" / "vae" / "config.json").write_text(json.dumps(asdict(small)))
    loaded = networks.load_vae(tmp_path / "flux", CPU).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())

    save_file(losses.Perceptual(losses.TINY_WIDTH).state_dict(), tmp_path / "vgg.safetensors")
    networks.load_perceptual(tmp_path / "vgg.safetensors", None, CPU)
    state = losses.Discriminator(losses.TINY_DISC).state_dict()
    trunk = {k[5:]: v for k, v in state.items() if k.startswith("dino.") and "x_s" not in k}
    save_file(trunk, tmp_path / "dino.safetensors",
              {"config": json.dumps(asdict(losses.TINY_DISC))})
    networks.load_discriminator(tmp_path / "dino.safetensors", CPU)

    for load, flag in ((lambda p: networks.load_vae(p, CPU), "--vae"),
                       (lambda p: networks.load_perceptual(p, None, CPU), "--vgg"),
                       (lambda p: networks.load_perceptual(tmp_path / "vgg.safetensors", p, CPU),
                        "--lpips-weights"),
                       (lambda p: networks.load_discriminator(p, CPU), "--dino")):
        (tmp_path / "damaged.safetensors").write_bytes(b"12345678" * 9)
        save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
        for name in ("absent.safetensors", "damaged.safetensors", "other.safetensors"):
            with pytest.raises(UserError, match=flag) as error:
                load(tmp_path / name)
            assert len(str(error.value)) < 700 and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# The authors' sampler, as a whole program
# ------------------------------------------------------------------------------------------------

def test_authors_sampler_from_a_released_folder(tmp_path):
    folder = write(tmp_path / "model", *released(), form="shards")
    decoder_folder(tmp_path / "decoder")
    encoder_folder(tmp_path / "encoder")
    run = stage2.load_run(folder, CPU)
    alpha = run.config.alpha
    assert alpha == pytest.approx(flow.shift_alpha(16, 24))

    # the same weights through the same function give the golden file's sample
    cond, noise = (golden_tensors("dit", "in.")[k] for k in ("cond", "noise"))
    want = golden_tensors("dit", "out.")["sample_cfg1"]
    got = flow.sample(run.dit, cond, noise, alpha, 50, schedule="authors")
    assert (got - want).abs().max() <= 2e-5 * max(1.0, want.abs().max().item())

    prompt = "a red circle on a white background"
    command = [sys.executable, str(HERE.parent / "sample.py"), prompt, "--run", str(folder),
               "--encoder", str(tmp_path / "encoder"), "--decoder", str(tmp_path / "decoder"),
               "--schedule", "authors", "--steps", "50", "--guidance", "1", "--direct",
               "--seed", "3", "--save-latent", "z.safetensors", "--out", "out.png",
               "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").is_file()
    cond = text_model.direct_condition(run.llm, run.tokenizer, [prompt], CPU.device)
    torch.manual_seed(3)
    noise = torch.randn(1, 24, 4, 4).flatten(2).mT      # as theirs
    z = flow.sample(run.dit, cond, noise, alpha, 50, schedule="authors")
    saved = sample.read_latent(tmp_path / "z.safetensors", 16, 24)
    assert torch.allclose(saved, z, atol=1e-5)
    args = SimpleNamespace(encoder=str(tmp_path / "encoder"), decoder=str(tmp_path / "decoder"))
    _, decoder = stage2.load_codec(run.config, args, CPU)
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert (picture == (decoder(saved)[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).all()
    torch.save(z[0].detach(), tmp_path / "theirs.pt")   # the authors' --save-latent: [N,C], bare
    assert torch.equal(sample.read_latent(tmp_path / "theirs.pt", 16, 24), z)


# ------------------------------------------------------------------------------------------------
# Wrong and damaged files: one UserError each
# ------------------------------------------------------------------------------------------------

HEAD = "diff_head.model."
WRONG = {           # changes to the config, keys dropped, keys added or replaced, what is said
    "three kinds": ({}, ["model.norm.weight"],
                    {"model.spare": [2], "model.norm2": [3], "model.latent_queries": [16, 9]},
                    ["1 missing (first: llm.model.norm.weight)",
                     "2 unexpected (first: llm.model.norm2)",
                     "model.latent_queries is [16, 9], expected [16, 32]"]),
    "in the DiT": ({}, [HEAD + "final_layer.linear.bias"], {},
                   ["1 missing (first: dit.final_layer.linear.bias)"]),
    "depth": ({"diffusion_model_depth": 4}, [], {},
              ["depth is 4 in the config, 3 in the weights"]),
    "width": ({"diffusion_model_hidden_size": 96}, [], {},
              ["width is 96 in the config, 64 in the weights"]),
    "heads": ({"diffusion_model_heads": 2}, [], {},
              ["heads is 2 in the config, 4 in the weights"]),
    "LLM depth and width": ({"num_hidden_layers": 3, "hidden_size": 64}, [], {},
                            ["num_hidden_layers is 3 in the config, 2 in the weights",
                             "hidden_size is 64 in the config, 32 in the weights"]),
    "no wide head": ({"diffusion_model_hidden_size": [64, 96], "diffusion_model_depth": [2, 1],
                      "diffusion_model_heads": [4, 4]}, [], {},
                     ["s_embedder"]),
    "half a pair": ({"diffusion_model_hidden_size": [64, 96]}, [], {},
                    ["diffusion_model_hidden_size, _depth and _heads"]),
    "tokens, channels, Z": ({"vision_tower_aux_token_len_list": [256], "mm_hidden_size": 1152,
                             "diffusion_model_channels": 64, "diffusion_model_z_channels": 2048},
                            [], {}, ["tokens is 256 in the config, 16", "image_channels is 1152",
                                     "channels is 64 in the config, 24",
                                     "cond_width is 2048 in the config, 32"]),
    "untied without a head": ({"tie_word_embeddings": False}, [], {}, ["lm_head.weight"]),
    "null condition lacks": ({}, [HEAD + "y_embedder.dropout_embedding"], {},
                             ["1 missing (first: dit.y_embedder.dropout_embedding)"]),
    "null condition too many": ({"diffusion_class_dropout_prob": 0.0}, [], {},
                                ["1 unexpected (first: dit.y_embedder.dropout_embedding)"]),
    "stretched angles": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, [], {},
                         ["rope_scaling asks for yarn"]),
    "angles of no kind": ({"rope_scaling": "yarn"}, [], {}, ["rope_scaling: "]),
    "no heads": ({"num_attention_heads": 0}, [], {}, ["its config does not work: "]),
    "negative heads": ({"num_key_value_heads": -2}, [], {}, ["num_key_value_heads is -2"]),
    "an encoder of no name": ({"mm_vision_tower_aux_list": [5]}, [], {}, ["its config: "]),
    "a negative base": ({"diffusion_base_dim": -1}, [], {}, ["its config: "]),
    "context in words": ({"tokenizer_model_max_length": "1024"}, [], {}, ["context is '1024'"]),
    "another mode": ({"vision_loss_mode": "block"}, [], {}, ["vision_loss_mode 'block'"]),
    "not a stage-2 config": ({"diffusion_model_depth": None}, [], {},
                             ["config lacks diffusion_model_depth"]),
    "latent statistics": ({}, [], {"diff_head.data_mean": [24]}, ["diff_head.data_mean"]),
    "rows below the tokenizer": ({}, [], {"model.embed_tokens.weight": [100, 32]},
                                 [f"tokenizer has {VOCABULARY} tokens, the embedding 100 rows"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_models(tmp_path, name):
    fields, dropped, added, says = WRONG[name]
    config, state = released()
    state = {k: v for k, v in state.items() if k not in dropped}
    state.update((k, torch.zeros(shape)) for k, shape in added.items())
    write(tmp_path / "m", {**config, **fields}, state)
    with pytest.raises(UserError) as error:
        stage2.load_run(tmp_path / "m", CPU)
    assert str(error.value).startswith(f"--run {tmp_path}")
    assert all(part in str(error.value) for part in says), str(error.value)


class Code:
    """Unpickling one would make a file: what weights_only must refuse."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


DAMAGED = {         # form, what happens to the folder, what the error says
    "absent": (None, lambda f: None, ["no such file or folder"]),
    "empty folder": ("safetensors", lambda f: (f / "model.safetensors").unlink(),
                     ["no weights; expected one of model.safetensors"]),
    "compressed": ("safetensors", lambda f: (f / "model.safetensors").rename(f / "model.pth.zstd"),
                   ["is compressed", "zstd -d"]),
    "cut safetensors": ("safetensors", lambda f: cut(f / "model.safetensors", 5000),
                        ["model.safetensors: "]),
    "empty safetensors": ("safetensors", lambda f: cut(f / "model.safetensors", 0),
                          ["model.safetensors: "]),
    "shard absent": ("shards", lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
                     ["names 3 shards, 1 are not there (first: model-00002-of-00003.safetensors)"]),
    "shard cut": ("shards", lambda f: cut(f / "model-00003-of-00003.safetensors", 3000),
                  ["model-00003-of-00003.safetensors: "]),
    "index cut": ("shards", lambda f: cut(f / "model.safetensors.index.json", 40),
                  ["model.safetensors.index.json: "]),
    "config cut": ("safetensors", lambda f: cut(f / "config.json", 40), ["config.json"]),
    "tokenizer cut": ("safetensors", lambda f: cut(f / "tokenizer.json", 40), ["tokenizer.json: "]),
    "tokenizer absent": ("safetensors", lambda f: (f / "tokenizer.json").unlink(),
                         ["no tokenizer in", "vocab.json"]),
    "cut pt": ("model.pt", lambda f: cut(f / "model.pt", 5000), ["model.pt: "]),
    "empty pt": ("model.pt", lambda f: cut(f / "model.pt", 0), ["model.pt: "]),
    "text": ("model.pt", lambda f: (f / "model.pt").write_text("hello" * 99),
             ["model.pt: "]),
    "code": ("model.pt", lambda f: torch.save({"model": Code(f / "ran")}, f / "model.pt"),
             ["refused: the file holds code to run (posix.mkdir)", "safetensors"]),
    "code in a plain pickle": ("bin", lambda f: (f / "pytorch_model.bin").write_bytes(
        pickle.dumps({"a": Code(f / "ran")}, 2)), ["pytorch_model.bin: "]),
    "a module": ("model.pt", lambda f: torch.save(torch.nn.Linear(1, 1), f / "model.pt"),
                 ["refused: the file holds code"]),
    "numbers": ("model.pt", lambda f: torch.save({"epoch": 3}, f / "model.pt"),
                ["expected a state dict of tensors"]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(tmp_path, name):
    form, damage, says = DAMAGED[name]
    if form:
        write(tmp_path / "m", *released(), form)
        damage(tmp_path / "m")
    with pytest.raises(UserError) as error:
        stage2.load_run(tmp_path / "m", CPU)
    message = str(error.value)
    assert all(part in message for part in says) and "\n" not in message, message
    assert len(message) < 600 and not (tmp_path / "m" / "ran").exists()


@pytest.mark.parametrize("theirs, used, noted", [
    (None, "any", 0), (weights.TINY_ENCODER, "a/b", 1),
    (weights.TINY_ENCODER, weights.TINY / "encoder.safetensors", 0),
    ("google/siglip2", "google/siglip2", 0), ("google/siglip2", "weights/siglip2", 0),
    ("google/siglip2", "facebook/webssl", 1), ("/there/enc", "/there/enc", 0),
    ("/there/enc", "/here/enc", 1), (weights.TINY_ENCODER, "/here/encoder.safetensors", 1)])
def test_a_decoder_of_another_encoder_is_noted(theirs, used, noted, capsys):
    networks.note_pair(SimpleNamespace(config=SimpleNamespace(encoder=theirs)), used)
    assert capsys.readouterr().err.count("note: --decoder was trained for") == noted


def test_decoders_that_do_not_fit(tmp_path):
    for k, (config, channels, says) in enumerate((
            (MAE, 32, "takes latents of 24 channels, the encoder gives 32"),
            (dict(MAE, decoder_num_hidden_layers=3), 24,
             "decoder_num_hidden_layers is 3 in the config, 2 in the weights"),
            (dict(MAE, decoder_hidden_size=512), 24,
             "decoder_hidden_size is 512 in the config, 32 in the weights"),
            (dict(MAE, decoder_num_attention_heads=16), 24, "must be a multiple of 4 x"))):
        decoder_folder(tmp_path / str(k), config)
        with pytest.raises(UserError, match="--decoder") as error:
            networks.load_decoder(tmp_path / str(k), CPU, an_encoder(channels))
        assert says in str(error.value)


# ------------------------------------------------------------------------------------------------
# Files from the field
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("content, says", [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    ("<!DOCTYPE html><html>not found</html>", "a web page")])
def test_pointers_and_web_pages_are_named(tmp_path, name, content, says):
    form = "model.pt" if name == "model.pt" else "safetensors"
    write(tmp_path / "m", *released(), form)
    (tmp_path / "m" / name).write_text(content)
    with pytest.raises(UserError) as error:
        stage2.load_run(tmp_path / "m", CPU)
    assert says in str(error.value) and name in str(error.value)


def test_of_several_state_dicts_the_average_is_taken(tmp_path, capsys):
    a, b = {"x": torch.zeros(2)}, {"x": torch.ones(2)}
    torch.save({"model": a, "ema": b, "step": 3}, tmp_path / "both.pt")
    assert weights.open_weights(tmp_path / "both.pt").rows("x").tolist() == [1, 1]
    assert "holds model, ema; ema is taken" in capsys.readouterr().err


def test_values_that_are_not_finite_are_refused(tmp_path):
    save_file({"x": torch.tensor([[1.0], [float("nan")]])}, tmp_path / "x.safetensors")
    opened = weights.open_weights(tmp_path / "x.safetensors", "--init")
    assert opened.rows("x", 0, 1).tolist() == [[1.0]]
    with pytest.raises(UserError, match="--init .*: x holds NaN or infinity"):
        opened.rows("x")


def test_a_flipped_bit_is_found(tmp_path):
    """A checkpoint has a checksum for each tensor, also one that is read in part."""
    args = SimpleNamespace(out=tmp_path / "run", fresh=False, bench=None, wandb=None, init=None,
                           steps=3, keep=1)
    run = checkpoint.Run(args, CPU)
    run.load({"x": torch.arange(6.0).view(3, 2), "y": torch.ones(4)})
    run.done = 1
    run.save()
    run.lock.close()
    folder, = weights.checkpoints(args.out)
    assert weights.open_checkpoint(folder).rows("x", 1, 2).tolist() == [[2, 3]]
    file = folder / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-4] ^= 1                                       # in y, which lies behind x
    file.write_bytes(data)
    opened = weights.open_checkpoint(folder)
    assert opened.rows("x").shape == (3, 2)
    with pytest.raises(UserError, match="is damaged: y does not match its checksum"):
        opened.rows("y", 0, 1)


@pytest.mark.parametrize("name, field, load", [
    ("encoder", "num_hidden_layers", networks.load_encoder),
    ("vae", "layers_per_block", networks.load_vae), ("dino", "depth", networks.load_discriminator)])
def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path, name, field, load):
    with weights.safe_open(weights.TINY / f"{name}.safetensors", "pt") as f:
        config = json.loads(f.metadata()["config"])
    path = tmp_path / f"{name}.safetensors"
    save_file(load_file(weights.TINY / path.name), path,
              {"config": json.dumps({**config, field: 10 ** 9})})
    with pytest.raises(UserError, match=f"{field} is 1000000000 in the config"):
        load(path, CPU)


def test_a_decoder_in_diffusers_layout(tmp_path):
    """AutoencoderRAE: encoder and decoder in one file, of which the decoder alone is read, and the
    normalisation of images."""
    state, names = decoder_folder(tmp_path / "d", pos=False), {
        "attention.attention.query": "attention.to_q", "attention.attention.key": "attention.to_k",
        "attention.attention.value": "attention.to_v",
        "attention.output.dense": "attention.to_out.0"}
    both = {"encoder.x": torch.ones(2), "encoder_mean": torch.full((1, 3, 1, 1), 0.25),
            "encoder_std": torch.full((1, 3, 1, 1), 0.5), "_latents_mean": torch.zeros(1),
            "_latents_std": torch.ones(1)}
    for key, value in state.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        both[f"decoder.{key}"] = value
    assert "decoder.decoder_layers.1.attention.to_out.0.bias" in both
    config = dict(_class_name="AutoencoderRAE", decoder_num_attention_heads=4, image_size=None,
                  patch_size=14, encoder_input_size=64, encoder_patch_size=16, latents_mean=None)
    write(tmp_path / "rae", config, both, tokenizer=False)
    model = networks.load_decoder(tmp_path / "rae", CPU, an_encoder(24))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert model.image_mean.flatten().tolist() == [0.25] * 3
    write(tmp_path / "rae", config, {**both, "_latents_mean": torch.ones(24)}, tokenizer=False)
    with pytest.raises(UserError, match="it normalises the latent"):
        networks.load_decoder(tmp_path / "rae", CPU, an_encoder(24))


# ------------------------------------------------------------------------------------------------
# What neither a published config nor a shape says
# ------------------------------------------------------------------------------------------------

def test_heads_of_a_published_decoder(tmp_path):
    state = random_state(decoder_keys(24, 64, 2, 48, 16, 14), seed=1)
    write(tmp_path / "d", {}, state, "model.pt", tokenizer=False)
    model = networks.load_decoder(tmp_path / "d", CPU, an_encoder(24))
    assert model.decoder_layers[0].heads == 16


def released_config(tmp_path, **fields):
    config, state = released()
    return stage2.model_config(weights.open_weights(write(tmp_path / "m", config | fields, state)))


@pytest.mark.parametrize("end", ["", "-interp256", "-res384"])
def test_names_of_encoders_without_the_authors_suffix(tmp_path, end):
    assert released_config(tmp_path, mm_vision_tower_aux_list=[f"my/encoder{end}"]).encoder == \
        "my/encoder"
    config = released_config(tmp_path, mm_vision_tower_aux_list=[weights.HUB["webssl"][0]])
    assert config.encoder == weights.HUB["webssl"][0]


@pytest.mark.parametrize("base", [128, None])
def test_the_time_shift_of_a_released_config(tmp_path, base):
    alpha = released_config(tmp_path, diffusion_base_dim=base).alpha
    assert alpha == pytest.approx((16 * 24 / (base or 4096)) ** 0.5)


def test_a_decoder_s_normalisation_without_its_encoder(tmp_path):
    """Drawing loads no encoder; the decoder's normalisation follows from the encoder's name."""
    decoder_folder(tmp_path / "d")
    args = SimpleNamespace(encoder=None, decoder=str(tmp_path / "d"), run="run")
    for name, config in ((weights.HUB["webssl"][0], encoders.WEBSSL_300M),
                         (weights.HUB["siglip2"][0], encoders.SO400M)):
        run = released_config(tmp_path, mm_vision_tower_aux_list=[name])
        none, decoder = stage2.load_codec(run, args, CPU, encoder=False)
        with torch.device("meta"):
            kind = encoders.ViT(config)
        assert none is None
        assert decoder.image_mean.flatten().tolist() == pytest.approx(kind.mean)
        assert decoder.image_std.flatten().tolist() == pytest.approx(kind.std)


def test_a_config_in_the_file_comes_before_the_one_beside_it(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"config": '{"of": "file"}'})
    (tmp_path / "config.json").write_text('{"of": "folder"}')
    assert weights.open_weights(tmp_path).config == {"of": "file"}


def test_new_heads_depend_on_the_seed(nets):
    a, b = (networks.load_discriminator(nets[3], CPU, seed).heads[0][0][0].weight_orig
            for seed in (0, 1))
    assert not torch.equal(a, b)


def test_recomputed_tables_must_fit(tmp_path):
    config, state = released()
    state["diff_head.model.feat_rope.freqs_sin"] = torch.zeros(16, 8)
    with pytest.raises(UserError, match=r"freqs_sin is \[16, 8\], expected \[16, 16\]"):
        stage2.load_run(write(tmp_path / "m", config, state), CPU)


@pytest.mark.parametrize("folder", ["run", "run/checkpoints/step-0000002"])
def test_a_checkpoint_stands_for_its_run_and_the_average_comes_first(tmp_path, folder):
    """A run without final/ gives its newest checkpoint, with the released keys."""
    llm = {"llm.model.norm.weight": torch.zeros(2), "llm.model.latent_queries": torch.ones(1, 2)}
    for step, value in ((1, 7.0), (2, 3.0)):
        place = tmp_path / f"run/checkpoints/step-000000{step}"
        place.mkdir(parents=True)
        save_file({**llm, "ema.llm.model.norm.weight": torch.full((2,), value),
                   "dit.pos_embed": torch.ones(1), "repa.0.weight": torch.ones(1),
                   "optimizer.llm.model.norm.weight.exp_avg": torch.ones(2)},
                  place / "state.safetensors")
        (place / "meta.json").write_text("{}")
    (tmp_path / "run/config.json").write_text('{"of": "run"}')
    source = weights.open_weights(tmp_path / folder)
    assert source.config == {"of": "run"} and source.shapes.keys() == {
        "model.norm.weight", "model.latent_queries", "diff_head.model.pos_embed"}
    assert source.rows("model.norm.weight").tolist() == [3, 3]
