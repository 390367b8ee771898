"""The device layer: the only file that knows which of three back ends runs.

    cpu    one process
    cuda   one process a GPU under torchrun; FSDP2 shards every block and the root
    xla    one process a host; torch_xla SPMD marks every tensor by the same table

The training scripts call `setup`, `shard`, `place`, `clip_grad`, `step_done`, `full` and nothing
else of a back end. Collectives are never written in a model file.
"""
import os
import re

import torch
import torch.distributed as dist

# Which mesh axis splits each dimension of a parameter, by name. "fsdp" spreads the storage, "tensor"
# the products: a Linear that widens is split by its rows, the one that narrows back by its columns,
# so that one all-reduce a pair is enough. A name in no row stays whole: norms, biases and other
# things below 1 MB. tests/test_parallel.py holds every size against this table.
TABLE = [
    (r"(qkv|w12|[qkv]_proj|gate_proj|up_proj|fc1|query|key|value|intermediate\.dense"
     r"|adaLN_modulation\.1|embed_tokens|lm_head)\.weight$",            ("tensor", "fsdp")),
    (r"(attn\.proj|w3|o_proj|down_proj|out_proj|fc2|output\.dense)\.weight$",
                                                                        ("fsdp", "tensor")),
    (r"(mm_projector\.[02]|diff_head_projector|t_embedder\.mlp\.[02]|s_projector"
     r"|final_layer\.linear|decoder_embed)\.weight$|in_proj_weight$",   ("fsdp", None)),
    (r"decoder_pred\.weight$",                                          (None, "fsdp")),
    (r"(x_embedder\.proj|s_embedder\.proj|patch_embedding|projection)\.weight$",
                                                                        ("fsdp", None, None, None)),
    (r"pos_embed$|position_embedding|latent_queries$",                  (None, None, None)),
]

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.0, "4090": 165.2}   # bf16


class UserError(Exception):
    """Bad input, found before long work: what is wrong, the value, what was expected, the flag."""


def spec(name, shape):
    """The axes of TABLE for a parameter: one entry a dimension, None = not split."""
    axes = next((axes for pattern, axes in TABLE if re.search(pattern, name)), (None,) * len(shape))
    return axes[:len(shape)]


class Devices:
    """What a script needs to know: `kind`, `device`, `rank` and `world` of the data it loads, the
    compute `dtype`, the `mesh`, whether this process writes files (`main`)."""

    def __init__(self, kind, device, rank, world, dtype, axes, mesh=None):
        self.kind, self.device, self.rank, self.world = kind, device, rank, world
        self.dtype, self.axes, self.mesh, self.main = dtype, axes, mesh, rank == 0

    @property
    def count(self):
        total = 1
        for n in self.axes.values():
            total *= n
        return total

    def __str__(self):
        mesh = ",".join(f"{k}={v}" for k, v in self.axes.items())
        return f"{device_name(self)} x {self.count}, mesh {mesh}"


def device_name(devices):
    return torch.cuda.get_device_name() if devices.kind == "cuda" else devices.kind


def parse_mesh(text, count):
    """`fsdp=8` or `fsdp=16,tensor=4` -> dict; None: all devices on fsdp. Raises UserError."""
    if not text:
        return {"fsdp": count, "tensor": 1}
    axes = {"fsdp": 1, "tensor": 1}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in axes or not size.isdigit() or int(size) < 1:
            raise UserError(f"--mesh {text}: expected fsdp=N or fsdp=N,tensor=M")
        axes[name] = int(size)
    if axes["fsdp"] * axes["tensor"] != count:
        raise UserError(f"--mesh {text} wants {axes['fsdp'] * axes['tensor']} devices, "
                         f"there are {count}")
    return axes


def setup(kind="auto", dtype=None, mesh=None):
    """Start the back end. kind: auto | cpu | cuda | xla; dtype: None takes bf16 where the device
    multiplies it natively, else fp32. Raises UserError with the flag that mends it."""
    if kind == "auto":
        kind = "xla" if "PJRT_DEVICE" in os.environ else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    if dtype is None:
        native = kind != "cpu" or torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if native else "float32"
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    if kind == "xla":
        try:
            import torch_xla.runtime as xr
        except ImportError:
            raise UserError("--device xla: torch_xla is not installed; "
                             "pip install -r requirements-tpu.txt in an environment of its own")
        import numpy as np
        import torch_xla
        import torch_xla.distributed.spmd as xs
        xr.use_spmd()
        count = xr.global_runtime_device_count()
        axes = parse_mesh(mesh, count)
        grid = xs.Mesh(np.arange(count), tuple(axes.values()), tuple(axes))
        return Devices("xla", torch_xla.device(), xr.process_index(), xr.process_count(), dtype,
                       axes, grid)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    axes = parse_mesh(mesh, world)
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")   # fp32 means fp32; bf16 is the fast path
    grid = None
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        if axes["tensor"] > 1:
            raise UserError(f"--mesh {mesh}: the tensor axis is for xla; use fsdp={world}")
        grid = dist.init_device_mesh(kind, (world,), mesh_dim_names=("fsdp",))
    return Devices(kind, device, rank, world, dtype, axes, grid)


def shard(model, devices, blocks=()):
    """Move a built model to its devices: FSDP2 a block and the root, SPMD marks by TABLE."""
    if devices.kind == "xla":
        import torch_xla.distributed.spmd as xs
        model.to(devices.device)
        for name, p in model.named_parameters():
            axes = spec(name, p.shape)
            if any(axes) and p.numel() * 4 > 2 ** 20:
                xs.mark_sharding(p, devices.mesh, axes)
    elif devices.world > 1:
        from torch.distributed.fsdp import fully_shard
        model.to(devices.device)
        for block in blocks:
            fully_shard(block, mesh=devices.mesh)
        fully_shard(model, mesh=devices.mesh)
    else:
        model.to(devices.device)
    return model


def place(batch, devices):
    """A dict of host tensors -> on the devices; on xla split along the batch axis."""
    if devices.kind == "xla":
        import torch_xla
        import torch_xla.distributed.spmd as xs
        out = {}
        for key, value in batch.items():
            if torch.is_tensor(value):
                value = value.to(torch_xla.device())
                xs.mark_sharding(value, devices.mesh, ("fsdp",) + (None,) * (value.dim() - 1))
            out[key] = value
        return out
    return {k: v.to(devices.device, non_blocking=True) if torch.is_tensor(v) else v
            for k, v in batch.items()}


def adamw(groups, devices, **options):
    """AdamW, fused where there is such a kernel; on xla with its scalars on the device."""
    xla = devices.kind == "xla"
    return torch.optim.AdamW(groups, fused=not xla, capturable=xla, foreach=False if xla else None,
                             **options)


def scalar(value, device):
    """A number that changes every step: on xla a tensor, because a constant would be compiled in
    and every step would compile anew."""
    return torch.tensor(value).to(device) if device.type == "xla" else value


def clip_grad(parameters, limit):
    """Scale gradients to a global L2 norm of at most `limit`; returns the norm before, a tensor."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def step_done(devices):
    """The end of a training step: on xla, where operations are only recorded, run them."""
    if devices.kind == "xla":
        import torch_xla
        torch_xla.sync()


def mean(value, devices):
    """A Python float averaged over the data-loading processes."""
    if devices.world == 1 or devices.kind == "xla":
        return value
    value = torch.tensor(value, device=devices.device)
    dist.all_reduce(value)
    return value.item() / devices.world


def total(values, devices):
    """A list of numbers, each summed over the data-loading processes."""
    if devices.world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=devices.device)
    dist.all_reduce(values)
    return values.tolist()


def full(tensor):
    """A possibly sharded tensor -> the whole of it on the CPU (every process must call it)."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()


def fill(tensor, value):
    """Copy a whole CPU tensor into a possibly sharded one."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    with torch.no_grad():
        tensor.copy_(value)


def memory_gb(devices):
    """Peak memory of this process on the device (cpu: resident set), in GB."""
    if devices.kind == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if devices.kind == "xla":
        return None
    import resource
    import sys
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def peak_tflops(devices):
    """Dense bf16 peak of one device, or None when it is not known (then MFU is null)."""
    if devices.kind != "cuda" or devices.dtype != torch.bfloat16:
        return None
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in device_name(devices)), None)


def finish(devices):
    if devices.kind != "xla" and devices.world > 1:
        dist.destroy_process_group()
