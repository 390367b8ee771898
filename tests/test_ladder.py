"""The ladder of sizes: parameters, FLOPs and memory as planned; errors without weights.

    pytest tests/test_ladder.py

FLOPs of the DiT against torch's counter: test_models.py; of the decoder: test_stage1.py.
"""
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import parallel
import train_dit
import training
import weights
from cli import UserError
from dit import SIZES, DiT, DiTConfig
from encoder import ViT, ViTConfig
from text_model import LLMConfig, TextModel

B, L = 2, 128


@pytest.fixture
def typed(monkeypatch, capsys):
    """Calls train_dit.py as typed -> what it prints, or UserError."""
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["train_dit.py", *map(str, words)])
        train_dit.main()
        return capsys.readouterr().out
    return call


# bf16 on the CPU takes plain products, which torch's counter sees; it misses the fused kernel.

@pytest.mark.parametrize("frozen", [False, True])
def test_flops_of_the_language_model(frozen):
    """Forward, text loss of 16 tokens and backward of L within 1 %. A frozen model passes the
    gradient to the embeddings alone."""
    llm = TextModel(LLMConfig(64, 3, 4, 2, 192, 512, True), dtype=torch.bfloat16)
    llm.requires_grad_(not frozen)
    ids = torch.randint(0, 512, (B, L))
    where = torch.arange(16).expand(B, -1)
    with FlopCounterMode(display=False) as counter:
        h = llm(llm.embed(ids).requires_grad_())
        llm.text_loss(h, where, ids[:, 1:17]).backward()
    assert counter.get_total_flops() / B == pytest.approx(llm.train_flops(L, 16, frozen), rel=0.01)


@pytest.mark.parametrize("kind, hidden", [("siglip_vision_model", 192), ("dinov2", 256)])
def test_flops_of_the_encoders(kind, hidden):
    """One forward within 1 %."""
    model = ViT(ViTConfig(kind, 64, hidden, 3, 4))
    model.dtype = torch.bfloat16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(B, 3, model.image_size, model.image_size))
    assert counter.get_total_flops() / B == pytest.approx(model.forward_flops(), rel=0.01)


# parameters of the DiT and its training TFLOP an image (N = 256, C = 1152), of either LLM
DIT = {"0.5b": (0.481, 0.750), "2b": (2.436, 3.782), "3b": (3.082, 4.779), "5b": (5.475, 8.467),
       "9b": (9.729, 15.012)}
LLM = {"Qwen/Qwen2.5-1.5B-Instruct": 1.55, "Qwen/Qwen2.5-7B-Instruct": 7.64}


@pytest.mark.parametrize("size", DIT)
@pytest.mark.parametrize("llm", LLM)
def test_dry_run_of_every_size(size, llm, typed):
    """Without weights: the parts sum, the mesh divides what is stored."""
    plans = {n: json.loads(typed("--size", size, "--llm", llm, "--dry-run", "--json", "--batch", 64,
                                 "--micro-batch", 64, "--mesh", f"fsdp={n}")) for n in (1, 64)}
    encoder = plans[1]["parameters"]["encoder (frozen)"] * 4e-9     # GB; FSDP2 leaves it whole
    for plan in plans.values():
        parts = plan["parameters"]
        assert sum(v for k, v in parts.items() if k != "total") == parts["total"]
        assert parts["dit"] / 1e9 == pytest.approx(DIT[size][0], abs=1e-3)
        assert parts["llm"] / 1e9 == pytest.approx(LLM[llm], rel=0.01)
        assert plan["train_tflop_per_image"]["dit"] == pytest.approx(DIT[size][1], abs=1e-3)
        memory = plan["memory_gb_per_device"]
        assert sum(v for k, v in memory.items() if k != "total") == pytest.approx(memory["total"])
    one, many = (plans[n]["memory_gb_per_device"] for n in (1, 64))
    assert one["ema"] == one["gradients"] == one["moments"] / 2
    for kind in ("weights", "moments"):
        whole = encoder * 63 / 64 if kind == "weights" else 0
        assert 0 <= many[kind] - one[kind] / 64 - whole < 0.05


# ---- what is typed without weights, network or memory ----

def test_defaults_of_the_paper_s_sizes_fit(typed):
    """Eight images per device and recomputed blocks; a plan needs no data."""
    kinds = {d: json.loads(typed("--size", "2b", "--dry-run", "--json", "--dtype", "bfloat16",
                                 "--device", d))["attention"] for d in ("cpu", "cuda", "xla")}
    assert kinds == {"cpu": "plain products", **dict.fromkeys(
        ("cuda", "xla"), "torch scaled_dot_product_attention")}             # of what is planned for
    plan = lambda *flags: json.loads(typed("--size", "2b", "--dry-run", "--json", *flags))[
        "memory_gb_per_device"]
    eight = plan("--mesh", "fsdp=8", "--data", "nowhere/{000..099}.tar")
    assert eight == plan("--mesh", "fsdp=8", "--micro-batch", 64, "--remat", "block")


def test_without_weights_the_files_and_flags_are_listed(typed, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        typed("--size", "2b")
    for word in ("encoder", "llm", "decoder", *weights.HUB["siglip2"], "Qwen2.5-1.5B-Instruct",
                 "--encoder", "--llm", "--decoder", "weights/"):
        assert word in str(error.value)


def test_planned_arguments_are_the_compiler_s():
    """Weights, moments, average and batch of one chip within 1 % of the arguments that libtpu
    0.0.21 counts: python tests/tpu_compile.py --size 2b --topology v5e:4x4 --batch 128 --llm none.
    """
    compiled = 2.313559 * 2 ** 30
    size, N, C, images = SIZES["2b"], 256, 1152, 128 // 16
    with torch.device("meta"):
        dit = DiT(DiTConfig(C, N, size.width, size.depth, size.heads))
    devices = parallel.setup("xla", "bfloat16", "fsdp=16", plan=True)
    trained, fixed = (sum(parallel.local_numel(k, p.shape, devices)
                          for k, p in dit.named_parameters() if p.requires_grad == train)
                      for train in (True, False))
    memory = training.state_gb(trained, fixed, ema=True)
    state = (memory["total"] - memory["gradients"]) * 1e9       # gradients live inside the step
    batch = images * (2 * N * C * 4 + N * size.width * 2)       # latents, noise; conditions in bf16
    assert state + batch == pytest.approx(compiled, rel=0.01)
    assert batch > 0.01 * compiled                              # so that both must be right


def test_the_dry_run_s_arguments_are_the_compiler_s(typed):
    """The same of the whole step, LLM and encoder in it:
    python tests/tpu_compile.py --size 9b --topology v5p:4x4x4 --batch 512."""
    compiled = 4.155131 * 2 ** 30
    plan = json.loads(typed("--size", "9b", "--dry-run", "--json", "--mesh", "fsdp=64",
                            "--device", "xla", "--batch", 512))
    state = sum(plan["memory_gb_per_device"][k] for k in ("weights", "moments", "ema")) * 1e9
    batch = 512 // 64 * (3 * 224 ** 2 + 256 * 1152 * 4 + 512 * 16)      # images, noise, ids
    assert state + batch == pytest.approx(compiled, rel=0.01)
