"""The device layer: three back ends, and the only file (with scan.py) that calls them.

    cpu    one process, or several under torchrun (gloo), as for cuda
    cuda   one process a GPU under torchrun; FSDP2 shards every block and the root
    xla    one process a host; torch_xla SPMD marks every tensor by the same table

Collectives and sharding are never written in a model file. What the scripts ask of a back end:
start (`setup`), place (`shard`, `mark`, `place`), step (`adamw`, `clip_grad`, `guarded_step`,
`step_done`), exchange numbers between processes (`total`, `mean`), read and fill (`full`, `pieces`,
`fill`).
"""
import contextlib
import datetime
import functools
import gc
import logging
import math
import os
import re

import torch
import torch.distributed as dist

# Which mesh axis splits each dimension of a parameter, by name. "fsdp" spreads the storage,
# "tensor" the products: a Linear that widens is split by its rows, the one that narrows back by its
# columns, so that one all-reduce a pair is enough. A name in no row, and what has fewer than WHOLE
# elements, stays whole: norms, biases. tests/test_parallel.py holds every size against this table.
# FSDP2 splits every parameter by its first dimension and needs no table.
TABLE = [
    (r"(qkv|w12|[qkv]_proj|gate_proj|up_proj|fc1|query|key|value|intermediate\.dense"
     r"|adaLN_modulation\.1|embed_tokens|lm_head)\.weight$",            ("tensor", "fsdp")),
    (r"(attn\.proj|w3|o_proj|down_proj|out_proj|fc2|output\.dense)\.weight$",
                                                                        ("fsdp", "tensor")),
    (r"(mm_projector\.[02]|diff_head_projector|t_embedder\.mlp\.[02]|s_projector|repa\.[024]"
     r"|final_layer\.linear|decoder_embed)\.weight$|in_proj_weight$",   ("fsdp", None)),
    (r"decoder_pred\.weight$",                                          (None, "fsdp")),
    (r"(x_embedder\.proj|s_embedder\.proj|patch_embedding|projection)\.weight$",
                                                                        ("fsdp", None, None, None)),
    (r"pos_embed$|position_embedding|latent_queries$",                  (None, None, None)),
    # whole: the convolutions of VAE, VGG and discriminator are networks of less than 100M
    (r"(conv[12]?|features\.\d+|patch_embed\.proj|fn\.0)\.weight(_orig)?$",
                                                                        (None, None, None, None)),
]
WHOLE = 2 ** 14
# What scan.py keeps stacked, [n,...], has a name that says which blocks: `dit_blocks.0-31.attn...`
STACK = re.compile(r"\.(\d+)-(\d+)\.")

# bf16, by what is in the device's name; the first counts
PEAK_TFLOPS = {"H100 PCIe": 756.5, "H100 NVL": 835.5, "H100": 989.4, "H200": 989.4, "A100": 312.0,
               "L40S": 362.0, "4090": 165.2}


class UserError(Exception):
    """Bad input, found before long work: what is wrong, the value, what was expected, the flag."""


def spec(name, shape):
    """The axes of TABLE for a parameter, or for its moments and average: one entry a dimension,
    None = not split."""
    name = re.sub(r"\.exp_avg(_sq)?$", "", name)
    if STACK.search(name) and len(shape):
        return (None, *spec(STACK.sub(".", name), shape[1:]))
    axes = next((axes for pattern, axes in TABLE if re.search(pattern, name)), ())
    if len(axes) < len(shape) or math.prod(shape) < WHOLE:
        return (None,) * len(shape)
    return axes[:len(shape)]


class Devices:
    """What a script needs to know: `kind`, `device`, `rank` and `world` of the data it loads, the
    compute `dtype`, the `mesh`, whether this process writes files (`main`); `target`: the kind that
    a plan is for, else `kind`."""

    def __init__(self, kind, device, rank, world, dtype, axes, mesh=None, target=None):
        self.kind, self.device, self.rank, self.world = kind, device, rank, world
        self.dtype, self.axes, self.mesh, self.main = dtype, axes, mesh, rank == 0
        self.target = target or kind
        # Processes whose losses and gradients are averaged; an SPMD program sees the whole batch.
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
    """`fsdp=8` or `fsdp=16,tensor=4` -> dict; empty: all devices on fsdp. count: how many there
    are, None to plan for machines that are not here. Raises UserError."""
    if not text:
        return {"fsdp": count or 1, "tensor": 1}
    axes = {"fsdp": 1, "tensor": 1}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in axes or not size.isdigit() or int(size) < 1:
            raise UserError(f"--mesh {text}: expected fsdp=N or fsdp=N,tensor=M")
        axes[name] = int(size)
    if count and math.prod(axes.values()) != count:
        raise UserError(f"--mesh {text} wants {math.prod(axes.values())} devices, "
                        f"there are {count}")
    return axes


def setup(kind="auto", dtype=None, mesh=None, plan=False):
    """Start the back end. kind: auto | cpu | cuda | xla; dtype: None takes bf16 where the device
    multiplies it natively, else fp32. plan: start nothing, any mesh will do (--dry-run). Raises
    UserError with the flag that mends it."""
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
# Where tensors live
# ------------------------------------------------------------------------------------------------

def shard(model, devices, blocks=()):
    """Move a built model to its devices. xla: marked by TABLE. Under torchrun: FSDP2 of each of
    `blocks` and of the rest; without blocks the model stays whole in every process and its
    gradients are averaged by `clip_grad`."""
    if devices.kind == "xla":
        model.to(devices.device)
        for name, p in model.named_parameters():
            mark(name, p, devices)
    elif devices.mesh is not None and blocks:
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
        # A block's weights travel in the dtype that its Linears cast them to: half the bytes, the
        # same numbers. Its gradients are summed in fp32. The root holds fp32 islands: none there.
        policy = MixedPrecisionPolicy(devices.dtype, torch.float32, cast_forward_inputs=False)
        for block in blocks:            # straight from the host: a device never holds the whole
            fully_shard(block, mesh=devices.mesh, mp_policy=policy)
            if hasattr(block, "modulation"):            # called outside of the forward, in sampling
                register_fsdp_forward_method(block, "modulation")
        fully_shard(model, mesh=devices.mesh)
    return model.to(devices.device)


def mark(name, tensor, devices):
    """On xla, split a new tensor as TABLE says for `name`, or say that it stays whole: otherwise
    the compiler chooses. The average and the moments of a parameter do not inherit this from it."""
    if devices.kind == "xla":
        import torch_xla.distributed.spmd as xs
        xs.mark_sharding(tensor, devices.mesh, spec(name, tensor.shape))


def on_one_device(named, devices):
    """How many elements of these parameters one device stores."""
    return sum(math.prod(-(-n // devices.axes[axis]) if axis else n
                         for n, axis in zip(p.shape, spec(name, p.shape)))
               for name, p in named)


def gathered(model, blocks, dtype=torch.float32):
    """How many fp32 elements FSDP2 holds whole beside a device's share: what is in no block, with
    its gradients, all step; of the blocks one with its gradients and the next, in `dtype`."""
    held = lambda m, size=1: sum(p.numel() * (size + p.requires_grad) for p in m.parameters())
    return held(model) - sum(map(held, blocks)) + held(max(blocks, key=held), dtype.itemsize / 2)


def place(batch, devices):
    """A dict of host tensors -> on the devices. xla: each process holds its part of the batch, and
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
    """A number that changes every step: on xla a tensor, because a constant would be compiled in
    and every step would compile anew. (A vector of one: equal scalars would be one input of the
    program, which is then another one.)"""
    return torch.tensor([value]).to(device)[0] if device.type == "xla" else value


def full(tensor):
    """A possibly sharded tensor -> the whole of it on the CPU (every process must call it)."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()


def apart(name, tensor):
    """{name: tensor} as files have it: of what is stacked, one a block."""
    stack = STACK.search(name)
    if not stack:
        return {name: tensor}
    keys = [f"{name[:stack.start()]}.{i}.{name[stack.end():]}"
            for i in range(int(stack[1]), int(stack[2]) + 1)]
    return dict(zip(keys, tensor if tensor.dim() else (tensor.clone() for _ in keys)))


def local_rows(tensor):
    """What this process holds of a tensor that FSDP2 split by rows, and the index of the first."""
    rows = -(-len(tensor) // tensor.device_mesh.size())
    return tensor.to_local(), min(len(tensor), rows * tensor.device_mesh.get_local_rank())


def pieces(name, tensor):
    """What this process saves of a tensor: [(name, rows on the CPU, index of the first)]; nothing
    where another process holds the same."""
    if hasattr(tensor, "to_local"):
        local, first = local_rows(tensor)
        return [(name, local.detach().cpu(), first)] if local.numel() else []
    value = tensor.detach().cpu()       # by every process: on xla it is a program of all hosts
    if dist.is_initialized() and dist.get_rank():
        return []
    return [(key, part, 0) for key, part in apart(name, value).items()]


@torch.no_grad()
def fill(name, tensor, read, devices):
    """Fill a possibly sharded tensor from `read(name, first, last)`, which gives rows of what files
    have under a name."""
    if hasattr(tensor, "to_local"):
        local, first = local_rows(tensor)
        local.copy_(read(name, first, first + len(local)))
        return
    parts = [read(key, 0, len(part) if part.dim() else 1)
             for key, part in apart(name, torch.empty(tensor.shape, device="meta")).items()]
    value = torch.stack(parts) if STACK.search(name) and tensor.dim() else parts[0]
    if devices.kind == "xla":
        value = value.to(devices.device)
        mark(name, value, devices)
    tensor.copy_(value)


@contextlib.contextmanager
def whole(model):
    """The parameters outside of the blocks, whole: for calls that do not enter by the root's
    forward, as in sampling. FSDP2 only."""
    if hasattr(model, "unshard"):
        model.unshard()
    yield
    if hasattr(model, "reshard"):
        model.reshard()


# ------------------------------------------------------------------------------------------------
# The step
# ------------------------------------------------------------------------------------------------

def adamw(groups, devices, **options):
    """AdamW, fused where there is such a kernel; on xla with its scalars on the device."""
    xla = devices.kind == "xla"
    return torch.optim.AdamW(groups, fused=not xla, capturable=xla, foreach=False if xla else None,
                             **options)


def clip_grad(parameters, limit, devices):
    """Scale gradients to a global L2 norm of at most `limit`; returns the norm before, a tensor.
    Averages the gradients of models that stay whole in every process."""
    parameters = list(parameters)
    for p in parameters:
        if devices.replicas > 1 and p.grad is not None and not hasattr(p, "to_local"):
            average(p.grad, devices)
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def average(tensor, devices):
    """In place: the mean over the processes whose gradients are averaged."""
    if devices.replicas > 1:
        dist.all_reduce(tensor)
        tensor /= devices.replicas
    return tensor


@torch.no_grad()
def guarded_step(optimizer, norm, devices):
    """optimizer.step() that changes nothing if the gradient's norm is not finite, decided on the
    device: the host does not wait. Returns 1.0 for a skipped step, else 0.0, a tensor."""
    skipped = (~torch.isfinite(norm)).float()
    if devices.kind != "xla":
        optimizer.found_inf = skipped           # read by the fused kernels, as for GradScaler
        optimizer.step()
        return skipped
    tensors = [t for group in optimizer.param_groups for p in group["params"]
               for t in (p, *optimizer.state[p].values())]
    before = [t.clone() for t in tensors]       # recorded only: no memory is taken
    optimizer.step()
    for t, old in zip(tensors, before):
        t.copy_(torch.where(skipped > 0, old, t))
    return skipped


def step_done(devices):
    """The end of a training step: on xla, where operations are only recorded, run them."""
    if devices.kind == "xla":
        import torch_xla
        torch_xla.sync()


def use_scan(devices, *models):
    """xla, before `shard`: the blocks of these models become stacks, which one compiled loop runs
    (scan.py)."""
    import scan
    for model in models:
        model.run = functools.partial(scan.scan, devices)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ModuleList):
                    setattr(module, name, scan.Stacks(child))


def stepwise(devices):
    """Wraps the steps of a sampler: on xla each is run by itself, one program for all of them."""
    def steps(pairs):
        for pair in pairs:
            yield pair
            step_done(devices)
    return steps


# ------------------------------------------------------------------------------------------------
# Numbers between processes, and about the device
# ------------------------------------------------------------------------------------------------

def total(values, devices):
    """A list of host numbers, each summed over the processes that load data. No device waits."""
    if devices.world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(values)
    return values.tolist()


def mean(values, devices):
    """A list of numbers, each averaged over the processes whose gradients are."""
    if devices.replicas == 1:
        return values
    return [v / devices.replicas for v in total(values, devices)]


def barrier(devices):
    """Wait for every process, as long as it takes (xla: half an hour): one may be encoding a data
    set alone."""
    if devices.replicas == 1:
        total([0.0], devices)
    else:
        dist.all_reduce(torch.zeros(1), group=patient())


@functools.cache
def patient():
    """All processes, in a group that does not give up after gloo's half hour. For waiting alone, so
    that a collective of the training that hangs still ends."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def memory_gb(devices):
    """Peak memory of this process on the device (cpu: resident set), in GB; xla does not say."""
    if devices.kind == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if devices.kind == "xla":
        return None
    import resource
    import sys
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def free_gb(devices):
    """Memory of one device that is free, in GB; None where it is not known."""
    if devices.kind == "cuda":
        return torch.cuda.mem_get_info()[0] / 1e9
    if devices.kind == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as f:
            kib = int(re.search(r"MemAvailable: +(\d+)", f.read())[1])
        return kib * 1024 / 1e9 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return None


def peak_tflops(devices):
    """Dense bf16 peak of one device, or None when it is not known (then MFU is null)."""
    if devices.kind != "cuda" or devices.dtype != torch.bfloat16:
        return None
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in device_name(devices)), None)


def finish():
    """Leave the process groups. A group's threads end with the last reference to it, and one that
    still drops the tensor of its last collective when Python ends would abort the process. (DTensor
    keeps the mesh of a sharded model; its last collective is long past.)"""
    if dist.is_initialized():
        patient.cache_clear()
        dist.destroy_process_group()
        gc.collect()                    # what lies in cycles of the script's objects
