"""Compile the training step for a TPU that is not here, and read what the compiler made of it.

    python tests/tpu_compile.py --size 9b --topology v5p:4x4x4 --batch 512
    python tests/tpu_compile.py --size tiny --topology v5e:2x2 --batch 8 --llm none

Flags of train_dit.py hold here too; --topology names the machine, --llm the language model (none:
the DiT alone, latents and conditions given). In an environment with requirements-tpu.txt.

`train_dit.train_step` is recorded by torch_xla on as many virtual CPU devices as the topology has
chips. Parameters, moments, averages and the batch are placeholders: they have a shape, a sharding
from parallel.TABLE and no memory, so the 9.8B model is traced in a few hundred MB. The program then
goes to libtpu, Google's compiler, in a second process by jax. Nothing is executed on a TPU.
"""
import argparse
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CHIP_GB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
GIB = 2 ** 30


# ------------------------------------------------------------------------------------------------
# Trace (torch_xla)
# ------------------------------------------------------------------------------------------------

class Placeholders:
    """Tensors of a shape and a sharding without memory, and which argument of the program each is."""

    def __init__(self, devices):
        self.devices, self.made = devices, []

    def __call__(self, shape, dtype, axes=()):
        import torch_xla.core.xla_builder as xb
        import torch_xla.distributed.spmd as xs
        t = xb.create_placeholder_tensor(tuple(shape), dtype)
        self.made.append((t, t.clone()))        # the clone still names the argument when t is updated
        # mark_sharding, which real tensors get, would move data; the meaning is the same
        xs.annotate_custom_sharding(t, self.devices.mesh, axes or (None,) * len(shape))
        return t

    def fill(self, model):
        """Put one in place of every parameter and buffer of a model."""
        import torch.nn as nn

        import parallel
        for path, module in model.named_modules():
            for name, p in module._parameters.items():
                if p is not None:
                    axes = parallel.spec(f"{path}.{name}", p.shape)
                    new = nn.Parameter(self(p.shape, p.dtype, axes), p.requires_grad)
                    self.made[-1] = new, self.made[-1][1]
                    module._parameters[name] = new
            for name, b in module._buffers.items():
                module._buffers[name] = self(b.shape, b.dtype)


def given_conditions():
    """Stands in for the LLM when the DiT is trained alone: `ids` are the conditions [B,N,Z]."""
    import torch.nn as nn

    class Given(nn.Module):
        def embed(self, ids, *_):
            return ids

        def forward(self, h):
            return h

        def text_loss(self, h, labels):
            return (h[:, 0, 0] * 0).float().sum()

        def condition(self, h, start):
            return h
    return Given()


def build(args, dtype, llm):
    """The networks of train_dit.py -> ScaleRAE on the meta device, frozen encoder (None for the DiT
    alone)."""
    import torch

    import dit as dits
    import encoder as encoders
    import flow
    import text_model as text
    import train_dit
    import weights
    size, tiny = dits.SIZES[args.size], args.size == "tiny"
    if tiny:
        encoder = weights.load_encoder(weights.TINY_CODEC[0], _Host(dtype))
    with torch.device("meta"):
        if not tiny:
            encoder = encoders.build_encoder(encoders.SO400M, args.layers, dtype)
        N, C = encoder.tokens, encoder.channels
        if llm == "none":
            language = given_conditions()
        else:
            config = {"1.5b": text.QWEN_1_5B, "7b": text.QWEN_7B}.get(llm) or dict(
                text.TINY, vocab_size=text.load_tokenizer(weights.ASSETS).get_vocab_size())
            language = text.TextModel(config, N, C, size.width, dtype)
        dit = dits.DiT(C, N, size.width, size.depth, size.heads, head_width=args.head_width,
                       head_depth=args.head_depth, qk_norm=args.qk_norm, dtype=dtype)
        model = train_dit.ScaleRAE(language, dit, flow.shift_alpha(N, C, args.shift_base))
    return model, encoder


class _Host:
    """What weights.load_encoder asks of devices, for the host."""

    def __init__(self, dtype):
        import torch
        self.kind, self.device, self.dtype, self.world = "cpu", torch.device("cpu"), dtype, 1


def trace(args, llm):
    """-> dict(hlo: the program as bytes, donate: argument -> output that may take its memory, and
    what the table needs)."""
    import torch
    import torch_xla

    import parallel
    import run as runs
    import train_dit
    started = time.perf_counter()
    devices = parallel.setup("xla", args.dtype or "bfloat16", args.mesh)
    runs.check_batch(args, devices)
    model, encoder = build(args, devices.dtype, llm)
    model.llm.remat = model.dit.remat = args.remat == "block"
    held = Placeholders(devices)
    for network in (model, *[encoder] * (llm != "none")):
        held.fill(network)
    if args.scan is not False:
        parallel.use_scan(devices, *[model.llm] * (llm != "none"), encoder, model.dit)
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    count = lambda m: sum(p.numel() for p in m.parameters())
    trained = sum(p.numel() for p in named.values())

    # The state as train_dit.py makes it: one AdamW of two groups, moments and the average ready.
    of_llm = {k for k in named if k.startswith("llm.") and "diff_head" not in k}
    groups = [dict(params=[p for k, p in named.items() if (k in of_llm) == llms], lr=lr, betas=betas)
              for llms, lr, betas in ((False, args.lr, args.betas), (True, args.lr_llm, args.betas_llm))]
    groups = [g for g in groups if g["params"]]
    optimizer = parallel.adamw(groups, devices, eps=1e-8, weight_decay=0.0)
    like = lambda k, p: held(p.shape, p.dtype, parallel.spec(k, p.shape))
    for k, p in named.items():
        optimizer.state[p] = dict(step=held((), torch.float32),
                                  exp_avg=like(k, p), exp_avg_sq=like(k, p))
    ema = {k: like(k, p) for k, p in named.items()} if args.ema else {}
    number = lambda: held((1,), torch.float32)[0]                   # as parallel.scalar
    for group in optimizer.param_groups:
        group["lr"] = number()

    # The batch of train_dit.Collate.
    B, N, C, L = args.micro_batch, encoder.tokens, encoder.channels, args.length
    rows = lambda dtype, *shape: held((B, *shape), dtype, ("fsdp",) + (None,) * len(shape))
    batches = []
    for _ in range(args.batch // B):
        batch = dict(ids=rows(torch.int64, L), labels=rows(torch.int64, L),
                     start=rows(torch.int64), answer=rows(torch.bool), normal=rows(torch.float32),
                     drop=rows(torch.bool), eps=rows(torch.float32, N, C))
        if llm == "none":
            batch.update(z=rows(torch.float32, N, C),
                         ids=rows(devices.dtype, N, model.dit.cond_width))
        else:
            batch["images"] = rows(torch.uint8, 3, encoder.image_size, encoder.image_size)
        batches.append(batch)

    @torch.no_grad()
    def look(batch):
        z = batch["z"] if llm == "none" else encoder(batch["images"].float() / 255)
        return z, z

    values, by_time, norm = train_dit.train_step(
        model, look, optimizer, named, ema, batches, number(), number(), number(), args, devices)

    state = [*named.values(), *ema.values(),
             *(t for p in named.values() for t in optimizer.state[p].values())]
    lowering = torch_xla._XLAC.lowering.LoweringContext("step")
    lowering.set_name_string("step")
    lowering.build([*state, *values.values(), by_time, norm])
    argument = {id(t): lowering.tensor_parameter_id(key) for t, key in held.made}
    donate = {argument[id(t)]: i for i, t in enumerate(state)}
    assert -1 not in donate, "a state tensor is no argument of the program"

    flops = {"dit": model.dit.train_flops()}
    parameters = {"dit": count(model.dit)}
    if llm != "none":
        flops.update(llm=model.llm.train_flops(L), encoder=encoder.forward_flops())
        parameters.update(llm=count(model.llm), encoder=count(encoder))
    return dict(
        hlo=lowering.hlo(), donate=donate, batch=args.batch, chips=devices.count, trained=trained,
        mesh=str(devices.axes), parameters=parameters,
        flops_per_chip={k: v * args.batch / devices.count for k, v in flops.items()},
        depths=[len(m) for m in (model.dit.dit_blocks, getattr(model.llm, "model", None) and
                                 model.llm.model.layers, encoder.vision_model.encoder.layers
                                 if hasattr(encoder, "vision_model") else None) if m],
        shapes=[list(p.shape) for m in (model, encoder) for p in m.parameters()],
        trace_s=time.perf_counter() - started)


# ------------------------------------------------------------------------------------------------
# Compile (jax, libtpu)
# ------------------------------------------------------------------------------------------------

def module_of(program):
    """The traced program as StableHLO; shardings and donation written on the arguments of main."""
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir
    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    with context:
        module = ir.Module.parse(xla_client._xla.mlir.hlo_to_stablehlo(program["hlo"]))
        main = next(f for f in module.body.operations if f.name.value == "main")
        integer = ir.IntegerType.get_signless(32)
        attributes = []
        for i, value in enumerate(main.arguments):
            found = {}
            for use in value.uses:              # what annotate_custom_sharding left behind
                a = use.owner.attributes
                if "call_target_name" in a and a["call_target_name"].value == "Sharding":
                    found["mhlo.sharding"] = a["mhlo.sharding"]
            if i in program["donate"]:
                found["tf.aliasing_output"] = ir.IntegerAttr.get(integer, program["donate"][i])
            attributes.append(ir.DictAttr.get(found))
        main.arg_attrs = ir.ArrayAttr.get(attributes)
    return context, module


def compile_for(program, topology):
    """-> the compiled program of one chip, seconds."""
    import numpy as np
    from jax._src import compiler
    from jax._src.lib import xla_client
    from jax.experimental import topologies
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    n = len(chips)
    assert n == program["chips"], f"{topology} has {n} chips, the program is for {program['chips']}"
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=n, device_assignment=np.arange(n).reshape(1, n),
        use_spmd_partitioning=True, backend=chips[0].client)
    options.executable_build_options.allow_spmd_sharding_propagation_to_output = [True]
    context, module = module_of(program)
    started = time.perf_counter()
    with context:
        done = compiler.backend_compile(chips[0].client, module, xla_client.DeviceList(tuple(chips)),
                                        options)
    return done, time.perf_counter() - started
