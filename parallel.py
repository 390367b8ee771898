"""The device layer: three back ends, and the only file (with scan.py) that calls them.

    cpu    one process, or several under torchrun (gloo), as for cuda
    cuda   one process per GPU under torchrun; FSDP2 shards every block and the root
    xla    one process per host; torch_xla SPMD marks every tensor by the same table

Collectives and sharding never stand in a model file. Scripts start a back end (`setup`), build
networks on it (`build`), move batches (`to_device`), step (`clip_grad`, `guarded_step`,
`step_done`), exchange numbers between processes (`total`, `mean`) and read tensors (`full_tensor`).
"""
import contextlib
import functools
import gc
import itertools
import logging
import math
import os
import re

import torch
import torch.distributed as dist

from cli import UserError

# The mesh axis that splits each dimension of a parameter, by name. "fsdp" spreads the storage,
# "tensor" the products: a Linear that widens is split by its rows, the one that narrows back by its
# columns, so that one all-reduce per pair is enough. A name in no row, and a tensor of fewer than
# WHOLE elements, stays whole: norms, biases. tests/test_parallel.py checks every size against this
# table. FSDP2 splits every parameter by its first dimension and needs no table.
TABLE = [
    (r"(qkv|w12|[qkv]_proj|gate_proj|up_proj|fc1|query|key|value|intermediate\.dense"
     r"|adaLN_modulation\.1|embed_tokens|lm_head)\.weight$",            ("tensor", "fsdp")),
    (r"(attn\.proj|w3|o_proj|down_proj|out_proj|fc2|output\.dense)\.weight$",
                                                                        ("fsdp", "tensor")),
    (r"(mm_projector\.[02]|diff_head_projector|t_embedder\.mlp\.[02]|s_projector|repa\.[024]"
     r"|final_layer\.linear|decoder_embed)\.weight$|in_proj_weight$",   ("fsdp", None)),
    (r"decoder_pred\.weight$",                                          (None, "fsdp")),
    (r"(x_embedder\.proj|s_embedder\.proj|patch_embed)\.weight$",
                                                                        ("fsdp", None, None, None)),
    (r"pos_embed$|latent_queries$",                                     (None, None, None)),
    # whole: the convolutions of VAE, VGG and discriminator are networks of less than 100M
    (r"(conv[12]?|features\.\d+|patch_embed\.proj|fn\.0)\.weight(_orig)?$",
                                                                        (None, None, None, None)),
]
WHOLE = 2 ** 14
# scan.py stacks equal blocks, [n,...]; the name says which ones: `dit_blocks.0-31.attn...`
STACK = re.compile(r"\.(\d+)-(\d+)\.")

# Dense bf16 peak by the device's name; the first match counts
PEAK_TFLOPS = {"H100 PCIe": 756.5, "H100 NVL": 835.5, "H100": 989.4, "H200": 989.4, "A100": 312.0,
               "L40S": 362.0, "4090": 165.2}


def spec(name, shape):
    """Return the axes of TABLE for a parameter, its moments or its average: one entry per
    dimension, None where it is not split."""
    name = re.sub(r"\.exp_avg(_sq)?$", "", name)
    if STACK.search(name) and len(shape):
        return (None, *spec(STACK.sub(".", name), shape[1:]))
    axes = next((axes for pattern, axes in TABLE if re.search(pattern, name)), ())
    if len(axes) < len(shape) or math.prod(shape) < WHOLE:
        return (None,) * len(shape)
    return axes[:len(shape)]


class Devices:
    """The back end. `kind`, `device`, the compute `dtype`, the mesh's `axes`; `rank` and `world` of
    the data this process loads; `main`: whether this process writes files; `target`: the kind that
    a plan is for, else `kind`."""

    def __init__(self, kind, device, rank, world, dtype, axes, mesh=None, target=None):
        self.kind, self.device, self.rank, self.world = kind, device, rank, world
        self.dtype, self.axes, self.mesh, self.main = dtype, axes, mesh, rank == 0
        self.target = target or kind
        # Processes whose losses and gradients are averaged. An SPMD program sees the whole batch.
        self.replicas = 1 if kind == "xla" else world

    @property
    def count(self):
        return math.prod(self.axes.values())

    def __str__(self):
        mesh = ",".join(f"{k}={v}" for k, v in self.axes.items())
        return f"{device_name(self)} x {self.count}, mesh {mesh}"


def device_name(devices):
    if devices.kind == "planned":
        return f"planned for {devices.target}"
    return torch.cuda.get_device_name() if devices.kind == "cuda" else devices.kind


def parse_mesh(text, count=None):
    """Read `fsdp=8` or `fsdp=16,tensor=4` -> dict; empty: all devices on fsdp. count: the number of
    devices, None to plan for another machine. Raises UserError."""
    if not text:
        return {"fsdp": count or 1, "tensor": 1}
    axes = {"fsdp": 1, "tensor": 1}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in axes or not size.isdigit() or int(size) < 1:
            raise UserError(f"--mesh {text}: expected fsdp=N or fsdp=N,tensor=M")
        axes[name] = int(size)
    if count and math.prod(axes.values()) != count:
        raise UserError(f"--mesh {text} needs {math.prod(axes.values())} devices; there are "
                        f"{count}")
    return axes


def setup(kind="auto", dtype=None, mesh=None, plan=False):
    """Start the back end. kind: auto | cpu | cuda | xla. dtype: None takes bf16 where the device
    multiplies it natively, else fp32. plan: start nothing and accept any mesh (--dry-run). Raises
    UserError."""
    if kind == "auto":
        kind = ("xla" if "PJRT_DEVICE" in os.environ else
                "cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available() and not plan:
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    if dtype is None:
        native = kind != "cpu" or torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if native else "float32"
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    if kind != "xla" and parse_mesh(mesh)["tensor"] > 1:
        raise UserError(f"--mesh {mesh}: the tensor axis is for xla; leave it out")
    if plan:
        return Devices("planned", torch.device("cpu"), 0, 1, dtype, parse_mesh(mesh), target=kind)
    if kind == "xla":
        return setup_xla(dtype, mesh)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    axes = parse_mesh(mesh, world)
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")   # fp32 means fp32; bf16 is the fast path
        torch.backends.cudnn.allow_tf32 = False         # of convolutions too
    grid = None
    if world > 1 or dist.is_torchelastic_launched():    # gloo too: host numbers pass no device
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        grid = dist.init_device_mesh(kind, (world,), mesh_dim_names=("fsdp",))
    return Devices(kind, device, rank, world, dtype, axes, grid)


def setup_xla(dtype, mesh):
    try:
        import torch_xla.runtime as xr
    except ImportError:
        raise UserError("--device xla: torch_xla is not installed; "
                        "pip install -r requirements-tpu.txt in an environment of its own")
    import numpy as np
    import torch_xla
    import torch_xla.distributed.spmd as xs
    import torch_xla.backends
    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)     # warns of setting it twice
    torch_xla.backends.set_mat_mul_precision("highest")     # fp32 means fp32 here too
    if os.environ.get("PJRT_DEVICE") == "CPU":      # virtual devices wait for each other in threads
        os.environ.setdefault("NPROC", "64")        # of one pool, by default of the machine's size:
    xr.use_spmd()                                   # with few cores the last of them finds none
    if not hasattr(torch, "xla"):
        torch._register_device_module("xla", torch_xla)     # torch.utils.checkpoint looks for it
    count = xr.global_runtime_device_count()
    axes = parse_mesh(mesh, count)
    grid = xs.Mesh(np.arange(count), tuple(axes.values()), tuple(axes))
    if xr.process_count() > 1:                          # for the numbers that hosts exchange
        if axes["tensor"] > 1:
            raise UserError(f"--mesh {mesh}: the tensor axis is for one host; use fsdp={count}")
        import torch_xla.distributed.xla_backend        # noqa: F401: registers xla://
        dist.init_process_group("gloo", init_method="xla://")
    return Devices("xla", torch_xla.device(), xr.process_index(), xr.process_count(), dtype, axes,
                   grid)


# ------------------------------------------------------------------------------------------------
# Networks: built on the meta device, sharded, then filled tensor by tensor
# ------------------------------------------------------------------------------------------------

def build(model, rows, devices, blocks=()):
    """Give a network that was built on the meta device its tensors -> the network, on its device.

    rows(name, first, last) returns rows of a tensor by name: initial values, or a file's. Each
    process allocates and asks for its own rows only. cpu, cuda: FSDP2 shards `blocks` and the rest;
    without blocks the network stays whole in every process, and `clip_grad` averages its gradients.
    xla: marked by TABLE. Buffers that are not on meta (tables of angles) keep their values.
    """
    if devices.kind != "xla" and devices.mesh is not None and blocks:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        # A block's weights travel in the dtype that its Linears cast them to: half the bytes, the
        # same numbers. Gradients are summed in fp32. The root holds fp32 islands: no policy there.
        policy = MixedPrecisionPolicy(devices.dtype, torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=devices.mesh, mp_policy=policy)
        fully_shard(model, mesh=devices.mesh)
    tensors = lambda: itertools.chain(model.named_parameters(), model.named_buffers())
    wanted = [name for name, tensor in tensors() if tensor.is_meta or isinstance(
        tensor, torch.nn.Parameter)]
    if devices.kind == "xla":
        return build_xla(model, rows, devices, wanted)
    model._apply(lambda t: torch.empty_like(t, device=devices.device) if t.is_meta else
                 t.to(devices.device))
    found = dict(tensors())
    for name in wanted:
        fill(name, found[name], rows, devices)
    return model


def build_xla(model, rows, devices, wanted):
    """Put new parameters in the place of those on meta. (To copy into an empty tensor would leave
    its first value alive, and every step would carry a second copy of the parameters.)"""
    for path, module in model.named_modules():
        for places in (module._parameters, module._buffers):
            for key, tensor in places.items():
                name = f"{path}.{key}" if path else key
                if tensor is not None and name in wanted:
                    value = whole_value(name, tensor.shape, rows).to(tensor.dtype)
                    value = value.to(devices.device)
                    if isinstance(tensor, torch.nn.Parameter):
                        value = torch.nn.Parameter(value, tensor.requires_grad)
                    places[key] = value
                    mark(name, value, devices)
                elif tensor is not None:
                    places[key] = tensor.to(devices.device)
    return model


def rows_of(state):
    """Return `rows` for `build` from a dict of whole tensors."""
    return lambda name, first, last: cut(state[name], first, last)


def initial_rows(model, initial, seed):
    """Return `rows` for `build` from a component's initial(name, shape, seed): one tensor at a time
    is made. The model is on the meta device; its tables of positions are not, and stay."""
    own = model.state_dict()

    def rows(name, first, last):
        table = own[name]
        return cut(initial(name, table.shape, seed) if table.is_meta else table, first, last)
    return rows


def cut(tensor, first, last):
    return tensor[first:last] if tensor.dim() else tensor


@torch.no_grad()
def fill(name, tensor, rows, devices):
    """Fill a possibly sharded tensor from rows(name, first, last)."""
    if hasattr(tensor, "to_local"):
        local, first = local_rows(tensor)
        if len(local):
            local.copy_(rows(name, first, first + len(local)))
        return
    value = whole_value(name, tensor.shape, rows)
    if devices.kind == "xla":
        value = value.to(tensor.dtype).to(devices.device)
        mark(name, value, devices)
    tensor.copy_(value)


def whole_value(name, shape, rows):
    """Read a whole tensor; a stack of blocks is put together from the blocks' tensors."""
    parts = [rows(key, 0, len(part) if part.dim() else 1)
             for key, part in unstack(name, torch.empty(shape, device="meta")).items()]
    return torch.stack(parts) if STACK.search(name) and shape else parts[0]


def mark(name, tensor, devices):
    """On xla, split a tensor as TABLE says for `name`, or keep it whole; otherwise the compiler
    would choose. A parameter's average and moments do not inherit the choice."""
    if devices.kind == "xla":
        import torch_xla.distributed.spmd as xs
        xs.mark_sharding(tensor, devices.mesh, spec(name, tensor.shape))


def local_numel(name, shape, devices):
    """Count the elements of a parameter that one device stores."""
    axes = spec(name, shape) if devices.target == "xla" else ("fsdp",) + (None,) * len(shape)
    return math.prod(-(-n // devices.axes[axis]) if axis else n for n, axis in zip(shape, axes))


def local_rows(tensor):
    """Return this process' rows of a tensor that FSDP2 split, and the index of the first."""
    rows = -(-len(tensor) // tensor.device_mesh.size())
    return tensor.to_local(), min(len(tensor), rows * tensor.device_mesh.get_local_rank())


def full_tensor(tensor):
    """Return the whole of a possibly sharded tensor on the CPU. Every process must call it."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()


def unstack(name, tensor):
    """Return {name: tensor} as files have it: a stack becomes one tensor per block."""
    stack = STACK.search(name)
    if not stack:
        return {name: tensor}
    keys = [f"{name[:stack.start()]}.{i}.{name[stack.end():]}"
            for i in range(int(stack[1]), int(stack[2]) + 1)]
    return dict(zip(keys, tensor if tensor.dim() else (tensor.clone() for _ in keys)))


def pieces(name, tensor):
    """Return the pieces of a tensor that this process saves: [(name, rows on the CPU, index of the
    first)]; none where another process holds the same."""
    if hasattr(tensor, "to_local"):
        local, first = local_rows(tensor)
        return [(name, local.detach().cpu(), first)] if local.numel() else []
    value = tensor.detach().cpu()       # by every process: on xla it is a program of all hosts
    if dist.is_initialized() and dist.get_rank():
        return []
    return [(key, part, 0) for key, part in unstack(name, value).items()]


@contextlib.contextmanager
def unsharded(model):
    """Gather the parameters outside of the blocks, for calls that do not enter through the root's
    forward, as sampling does. FSDP2 only."""
    if hasattr(model, "unshard"):
        model.unshard()
    yield
    if hasattr(model, "reshard"):
        model.reshard()


def use_scan(devices, *models):
    """On xla, before `build`: turn the blocks of these models into stacks that one compiled loop
    runs (scan.py)."""
    import scan
    for model in models:
        model.run = functools.partial(scan.scan, devices)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ModuleList):
                    setattr(module, name, scan.Stacks(child))


def compile_blocks(blocks, wanted, devices):
    """torch.compile each block; wanted None: on CUDA only."""
    if wanted or (wanted is None and devices.kind == "cuda"):
        for block in blocks:
            block.compile(fullgraph=True)


# ------------------------------------------------------------------------------------------------
# Batches and the step
# ------------------------------------------------------------------------------------------------

def to_device(batch, devices):
    """Move a dict of host tensors to the devices. xla: each process holds its part of the batch;
    the result is the whole, split along the batch axis."""
    if devices.kind != "xla":
        cuda = devices.kind == "cuda"               # from pageable memory the host would wait
        return {k: (v.pin_memory() if cuda else v).to(devices.device, non_blocking=True)
                if torch.is_tensor(v) else v for k, v in batch.items()}
    import torch_xla.core.xla_model as xm
    import torch_xla.distributed.spmd as xs
    out = {}
    for key, value in batch.items():
        if torch.is_tensor(value) and devices.world > 1:
            axes = (("fsdp", "tensor"),) + (None,) * (value.dim() - 1)      # tensor is 1 here
            split = xs.ShardingSpec(devices.mesh, axes, minibatch=True)
            value = xm.send_cpu_data_to_device(value, devices.device, split)[0]
        elif torch.is_tensor(value):
            value = value.to(devices.device)
            xs.mark_sharding(value, devices.mesh, ("fsdp",) + (None,) * (value.dim() - 1))
        out[key] = value
    return out


def scalar(value, device):
    """Wrap a number that changes every step: on xla a tensor, because a constant would be part of
    the program and every step would compile anew. (A vector of one: equal scalars would be one
    input of the program, which would then be another program.)"""
    return torch.tensor([value]).to(device)[0] if device.type == "xla" else value


def adamw(groups, devices, **options):
    """Return an AdamW, fused where there is such a kernel; on xla with its scalars on the device.
    """
    xla = devices.kind == "xla"
    return torch.optim.AdamW(groups, fused=not xla, capturable=xla, foreach=False if xla else None,
                             **options)


def clip_grad(parameters, limit, devices):
    """Scale gradients to a global L2 norm of at most `limit` -> the norm before, a tensor. Average
    the gradients of networks that stay whole in every process first."""
    parameters = list(parameters)
    for p in parameters:
        if devices.replicas > 1 and p.grad is not None and not hasattr(p, "to_local"):
            average(p.grad, devices)
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def average(tensor, devices):
    """Average in place over the processes whose gradients are averaged."""
    if devices.replicas > 1:
        dist.all_reduce(tensor)
        tensor /= devices.replicas
    return tensor


@torch.no_grad()
def guarded_step(optimizer, norm, devices):
    """optimizer.step(), except that nothing changes if the gradient's norm is not finite.

    Fused optimizers and xla decide on the device. Other optimizers read the norm, so on CUDA the
    host waits for the device.
    """
    fused = optimizer.defaults.get("fused")
    if devices.kind != "xla" and not fused:
        if torch.isfinite(norm):
            optimizer.step()
        return
    skipped = (~torch.isfinite(norm)).float()
    if fused:
        optimizer.found_inf = skipped           # read by the fused kernels, as for GradScaler
        optimizer.step()
        return
    tensors = [t for group in optimizer.param_groups for p in group["params"]
               for t in (p, *optimizer.state[p].values())]
    before = [t.clone() for t in tensors]       # recorded only: no memory is taken
    optimizer.step()
    for t, old in zip(tensors, before):
        t.copy_(torch.where(skipped > 0, old, t))


def init_moments(optimizer, named, devices):
    """Make AdamW's state now instead of at the first step, and mark it: for xla, where every step
    must be the same program."""
    for name, p in named.items():
        state = optimizer.state[p]
        state["step"] = torch.zeros((), device=p.device)
        mark("step", state["step"], devices)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(p, memory_format=torch.preserve_format)
            mark(name, state[moment], devices)


def step_done(devices):
    """End a step: on xla, where operations are only recorded, run them."""
    if devices.kind == "xla":
        import torch_xla
        torch_xla.sync()


# ------------------------------------------------------------------------------------------------
# Numbers between processes, and about the device
# ------------------------------------------------------------------------------------------------

def total(values, devices):
    """Sum each of a list of host numbers over the processes that load data. No device waits."""
    if devices.world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(values)
    return values.tolist()


def mean(values, devices):
    """Average each of a list of numbers over the processes whose gradients are averaged."""
    if devices.replicas == 1:
        return values
    return [v / devices.replicas for v in total(values, devices)]


def barrier(devices):
    """Wait for every process."""
    total([0.0], devices)


def memory_gb(devices):
    """Return the peak memory of this process on the device (cpu: resident set) in GB, None on xla.
    """
    if devices.kind == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if devices.kind == "xla":
        return None
    import resource
    import sys
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def peak_tflops(devices):
    """Return the dense bf16 peak of one device, or None if unknown (MFU is null then)."""
    if devices.kind != "cuda" or devices.dtype != torch.bfloat16:
        return None
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in device_name(devices)), None)


def finish():
    """Leave the process groups. A group's threads end with the last reference to it; a thread that
    still drops the tensor of its last collective when Python ends would abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
