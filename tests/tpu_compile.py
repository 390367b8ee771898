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
import itertools
import json
import math
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CHIP_GB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
GIB = 2 ** 30


# ------------------------------------------------------------------------------------------------
# Trace (torch_xla)
# ------------------------------------------------------------------------------------------------

class Placeholders:
    """Tensors of a shape and a sharding without memory: arguments of the program."""

    def __init__(self, devices):
        self.devices, self.made = devices, []

    def __call__(self, shape, dtype, axes=()):
        import torch_xla.core.xla_builder as xb
        import torch_xla.distributed.spmd as xs
        t = xb.create_placeholder_tensor(tuple(shape), dtype)
        self.made.append((t, t.clone()))        # the clone names the argument after t is updated
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

        def text_loss(self, h, where, targets):
            return (h[:, 0, 0] * 0).float().sum()

        def condition(self, h, start):
            return h
    return Given()


def build(args, dtype, llm):
    """The networks of train_dit.py -> ScaleRAE on the meta device, frozen encoder (None for the DiT
    alone)."""
    import torch

    import chat
    import flow
    import networks
    import parallel
    import text_model
    import train_dit
    import weights
    from dit import SIZES, DiT, DiTConfig
    from encoder import SO400M, ViT
    size, tiny = SIZES[args.size], args.size == "tiny"
    if tiny:
        host = parallel.Devices("cpu", torch.device("cpu"), 0, 1, dtype, {"fsdp": 1})
        encoder = networks.load_encoder(weights.TINY / "encoder.safetensors", host)
    with torch.device("meta"):
        if not tiny:
            encoder = ViT(SO400M, dtype)
        N, C = encoder.tokens, encoder.channels
        if llm == "none":
            language = given_conditions()
        else:
            small = replace(text_model.TINY,
                            vocab_size=chat.load_tokenizer(weights.TINY).get_vocab_size())
            config = {"1.5b": text_model.QWEN_1_5B, "7b": text_model.QWEN_7B}.get(llm, small)
            language = text_model.TextModel(config, N, C, size.width, dtype)
        dit = DiT(DiTConfig(C, N, size.width, size.depth, size.heads,
                            head_width=args.head_width or 0, head_depth=args.head_depth or 0,
                            qk_norm=bool(args.qk_norm)), dtype)
        model = train_dit.ScaleRAE(language, dit, flow.shift_alpha(N, C, args.shift_base))
    return model, encoder


def trace(flags, llm, chips):
    """flags: of train_dit.py; llm: None takes --size's -> dict(hlo: the program as bytes, donate:
    argument -> output that may take its memory, and what the table needs)."""
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(chips))
    import torch
    import torch_xla

    import parallel
    import train_dit
    import training
    started = time.perf_counter()
    typed, sys.argv = sys.argv, ["train_dit.py", "--dry-run", *flags]
    args = train_dit.arguments()
    train_dit.fill_defaults(args, None)
    sys.argv = typed
    args.length = args.length or (128 if args.size == "tiny" else 512)
    llm = llm or {"tiny": "tiny", "9b": "7b"}.get(args.size, "1.5b")
    devices = parallel.setup("xla", args.dtype or "bfloat16", args.mesh)
    training.check_batch(args, devices)
    model, encoder = build(args, devices.dtype, llm)
    model.llm.remat = model.dit.remat = args.remat == "block"
    shapes = [list(p.shape) for m in (model, encoder) for p in m.parameters()]
    if args.scan is not False:
        parallel.use_scan(devices, *[model.llm] * (llm != "none"), encoder, model.dit)
    held = Placeholders(devices)
    for network in (model, *[encoder] * (llm != "none")):
        held.fill(network)
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    count = lambda m: sum(p.numel() for p in m.parameters())
    trained = sum(p.numel() for p in named.values())

    # The state as train_dit.py makes it: one AdamW of two groups, moments and the average ready.
    groups = ([], args.betas), ([], args.betas_llm)
    for k, p in named.items():
        groups[k.startswith("llm.") and "diff_head" not in k][0].append(p)
    optimizer = parallel.adamw([dict(params=ps, lr=0, betas=betas) for ps, betas in groups if ps],
                               devices, eps=1e-8, weight_decay=0.0)
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
        batch = dict(ids=rows(torch.int64, L), where=rows(torch.int64, L - N),
                     targets=rows(torch.int64, L - N), start=rows(torch.int64),
                     answer=rows(torch.bool), normal=rows(torch.float32), drop=rows(torch.bool),
                     eps=rows(torch.float32, N, C))
        if llm == "none":
            batch.update(z=rows(torch.float32, N, C),
                         ids=rows(devices.dtype, N, model.dit.config.width))
        else:
            batch["images"] = rows(torch.uint8, 3, encoder.image_size, encoder.image_size)
        batches.append({**batch, "totals": {"images_to_draw": args.batch}, "tokens": number(),
                        "images_to_draw": number()})

    @torch.no_grad()
    def encode(batch):
        z = batch["z"] if llm == "none" else encoder(batch["images"].float() / 255)
        return z, z

    values, norm = train_dit.train_step(model, encode, batches, (named, [optimizer], ema), number(),
                                        args, devices)

    state = [*named.values(), *ema.values(),
             *(t for p in named.values() for t in optimizer.state[p].values())]
    lowering = torch_xla._XLAC.lowering.LoweringContext("step")
    lowering.set_name_string("step")
    lowering.build([*state, *values.values(), norm,
                    *(group["lr"] for group in optimizer.param_groups)])
    argument = {id(t): lowering.tensor_parameter_id(key) for t, key in held.made}
    donate = {argument[id(t)]: i for i, t in enumerate(state)}
    assert -1 not in donate, "a state tensor is no argument of the program"

    flops, stacks = {"dit": model.dit.train_flops()}, [model.dit.dit_blocks]
    k = model.dit.config
    heads = {(k.heads, k.width // k.heads)}
    parameters = {"dit": count(model.dit)}
    if llm != "none":
        flops.update(llm=model.llm.train_flops(L, L - N), encoder=encoder.forward_flops())
        parameters.update(llm=count(model.llm), encoder=count(encoder))
        stacks += model.llm.model.layers, encoder.blocks
        for width, c in ((model.llm.width, model.llm.config), (C, encoder.config)):
            h = c.num_attention_heads
            heads |= {(n, width // h) for n in (h, getattr(c, "num_key_value_heads", h))}
    return dict(
        hlo=lowering.hlo(), donate=donate, size=args.size, llm=llm,
        batch=args.batch, chips=devices.count, mesh=str(devices), parameters=parameters,
        trained=trained,
        flops_per_chip={k: v * args.batch / devices.count for k, v in flops.items()},
        depths=[len(stack) for stack in stacks], heads=heads, shapes=shapes,
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
        done = compiler.backend_compile(chips[0].client, module,
                                        xla_client.DeviceList(tuple(chips)), options)
    return done, time.perf_counter() - started


# ------------------------------------------------------------------------------------------------
# Read
# ------------------------------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"^ *(?:ROOT )?%\S+ = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    r"|collective-broadcast)(?:-start)?\((.*?)\), .*?channel_id=(\d+)")
ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]")


def collectives(hlo):
    """Optimised HLO text -> [(operation, dtype, shape, how often it runs, whether it gathers)], one
    entry an array.

    One transfer may appear in several computations, where the compiler runs it beside others: they
    share a channel and count once. It may gather by all-gather, by all-reduce of what was written
    in place, or piece by piece in a ring beside the product that needs it (`windowed_dot_general`,
    _ag; _rs scatters a sum so).
    """
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.M | re.S))
    runs = {}                                                   # computation -> how often it runs

    def trips(condition, body):
        """The loop's constant over the step of its counter."""
        limit = max(int(n) for n in re.findall(r"constant\((\d+)\)", condition))
        index = re.search(r"\), index=(\d+)", condition)
        root = re.search(r"ROOT .* tuple\((.*?)\)", body)
        counter = root and index and re.findall(r"%([\w.\-]+)", root[1])[int(index[1])]
        step = re.search(rf"%{counter} = .* add\(%\S+, %([\w.\-]+)\)", body)
        step = step and re.search(rf"%{re.escape(step[1])} = .* constant\((\d+)\)", body)
        return -(-limit // (int(step[1]) if step else 1))

    def visit(name, times):
        if times <= runs.get(name, 0):
            return
        runs[name] = times
        for line in bodies[name].splitlines():
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                visit(loop[2], times * trips(bodies[loop[1]], bodies[loop[2]]))
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                visit(called, times)
    visit(re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.M)[1], 1)
    found, seen = [], set()
    for name, body in bodies.items():
        for line in body.splitlines():
            m = COLLECTIVE.match(line)
            if not m or m[4] in seen:
                continue
            seen.add(m[4])
            arrays = ARRAY.findall(m[1])
            if "-start(" in line:                               # (operands, results, flags)
                arrays = [a for a in arrays if a[1]]
                arrays = arrays[len(arrays) // 2:]
            operands = [re.search(rf"%{re.escape(operand)} = [^\n]*", body)
                        for operand in re.findall(r"%([\w.\-]+)", m[3])]
            for i, (dtype, dims) in enumerate(arrays):
                made = operands[i][0] if i < len(operands) and operands[i] else ""
                if fused := re.search(r"calls=%([\w.\-]+)", made):
                    made = re.search(r"ROOT [^\n]*", bodies[fused[1]])[0]
                gathers = m[2] == "all-gather" or "windowed_dot_general_body_ag" in name or (
                    m[2] == "all-reduce" and "dynamic-update-slice" in made)
                shape = [int(n) for n in dims.split(",") if n]
                found.append((m[2], dtype, shape, runs.get(name, 1), gathers))
    return found


def kind_of(shape, gathers, program):
    """weight: gathered, whole or stacked; gradient: reduced in a weight's shape; small: scalars,
    norms, biases; the rest has the shape of an activation.

    Dimensions are compared without ones and in any order; a split one may be a chip's part, or
    rounded up to whole tiles of 16 rows a chip; a width may be written as heads x width of a head.
    """
    for pair in program["heads"]:
        for i in range(len(shape) - 1):
            if shape[i:i + 2] == list(pair):
                shape = [*shape[:i], math.prod(pair), *shape[i + 2:]]
    dims, chips = [n for n in shape if n > 1], program["chips"]
    if math.prod(dims) < 2 ** 14:
        return "small"

    def same(n, want):
        return n in (want, want // chips, -(-want // (16 * chips)) * 16 * chips)
    for wanted in program["shapes"]:
        wanted = [n for n in wanted if n > 1]
        for depth in ([], *([d] for d in program["depths"])):
            if len(wanted + depth) == len(dims) and any(
                    all(map(same, dims, p)) for p in itertools.permutations(wanted + depth)):
                return "weight" if gathers else "gradient"
    return "activation"


def read(compiled, hlo, seconds, program):
    """-> the numbers of one chip, as a dict."""
    memory, cost = compiled.get_compiled_memory_stats(), compiled.cost_analysis()
    gib = {k: getattr(memory, f"{k}_size_in_bytes") / GIB
           for k in ("argument", "output", "alias", "temp", "generated_code")}
    gib["total"] = sum(gib.values()) - 2 * gib["alias"]
    traffic, activations = {}, {}
    for operation, dtype, shape, times, gathers in collectives(hlo):
        kind = kind_of(shape, gathers, program)
        size = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8
        n = times * size * math.prod(shape) / GIB
        traffic[kind] = traffic.get(kind, 0) + n
        if kind == "activation":
            key = f"{operation} {dtype}{shape}{' in a loop' if times > 1 else ''}"
            activations[key] = activations.get(key, 0) + n
    cost = cost if isinstance(cost, dict) else cost[0]
    return dict(gib_per_chip=gib, collective_gib_per_chip=traffic,
                activation_collectives=activations, compiler_tflop_per_chip=cost["flops"] / 1e12,
                compile_s=seconds, compile_cpu_s=resource.getrusage(resource.RUSAGE_SELF).ru_utime)


# ------------------------------------------------------------------------------------------------

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                epilog="All other flags are train_dit.py's.")
    p.add_argument("--topology", default="v5e:2x2", help="v4:2x2x1, v5e:4x4, v5p:4x4x4, ...")
    p.add_argument("--llm", choices=["none", "tiny", "1.5b", "7b"], help="default: by --size")
    p.add_argument("--keep", metavar="FOLDER", help="leave the program and the compiler's HLO here")
    p.add_argument("--program", help=argparse.SUPPRESS)
    mine, rest = p.parse_known_args()
    if mine.program:                                            # the second process
        program = pickle.loads(Path(mine.program).read_bytes())
        compiled, seconds = compile_for(program, mine.topology)
        text = compiled.hlo_modules()[0].to_string()
        Path(mine.program).with_suffix(".txt").write_text(text)
        return print(json.dumps(read(compiled, text, seconds, program)))

    from cli import UserError
    chip, _, grid = mine.topology.partition(":")
    if chip not in CHIP_GB or not re.fullmatch(r"\d+(x\d+)+", grid):
        raise UserError(f"--topology {mine.topology}: expected CHIP:GRID, as v5p:4x4x4; chips are "
                        f"{', '.join(CHIP_GB)}")
    program = trace(rest, mine.llm, math.prod(map(int, grid.split("x"))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(mine.keep or folder) / "step.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(program))
        environment = {k: v for k, v in os.environ.items() if k != "PJRT_DEVICE"}
        done = subprocess.run(
            [sys.executable, __file__, "--program", path, "--topology", mine.topology],
            env={**environment, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu",
                 "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},        # no device is held, only the compiler
            capture_output=True, text=True)
    if done.returncode:
        if no_room := re.search(r"RESOURCE_EXHAUSTED.*?Used (\S+) of (\S+) hbm", done.stderr, re.S):
            raise UserError(f"--batch {program['batch']} does not fit {mine.topology}: the program "
                            f"needs {no_room[1]} of {no_room[2]} a chip; take a smaller --batch or "
                            "more chips")
        raise UserError(f"the compiler refused: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    for key in ("hlo", "donate", "shapes", "heads"):
        del program[key]
    import cli
    gib, moved = found["gib_per_chip"], found["collective_gib_per_chip"]
    ours = sum(program["flops_per_chip"].values()) / 1e12
    cli.table(f"one training step on {mine.topology}", [
        *((k, program[k]) for k in ("size", "llm", "batch", "mesh", "parameters", "trained")),
        ("GiB a chip", gib),
        ("fits", f"yes: the compiler refuses what does not; {gib['total']:.2f} GiB of the "
                 f"{CHIP_GB[chip]} GB of a {chip} chip"),
        ("TFLOP a chip", f"{ours:.4g} a step by our count; {found['compiler_tflop_per_chip']:.4g} "
                         "by the compiler's, which counts the body of a loop once"),
        ("moved, GiB a chip", moved),
        ("of it activations", found["activation_collectives"] or "none"),
        ("trace, seconds", program["trace_s"]), ("compile, seconds", found["compile_s"]),
        ("of the processor", found["compile_cpu_s"])])
    print(json.dumps({"topology": mine.topology, **program, **found}))


if __name__ == "__main__":
    if "--program" in sys.argv:             # jax alone: this process never loads torch_xla
        main()
    else:
        import cli
        cli.main(main)
