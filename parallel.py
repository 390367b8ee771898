"""The device layer. Only this file, xla.py and scan.py call torch.distributed or torch_xla.

    cpu    one process, or several under torchrun (gloo), as for cuda
    cuda   one process per GPU under torchrun; FSDP2 shards every block and the root
    xla    one process per host; torch_xla SPMD splits every tensor by TABLE

Scripts start a back end (`setup`), build networks on it (`build`), move batches (`to_device`),
step (`clip_grad`, `guarded_step`, `step_done`), exchange numbers between processes (`total`,
`mean`) and read tensors (`full_tensor`). The models themselves know nothing of devices.
"""
import contextlib
import functools
import gc
import itertools
import math
import os
import re

import torch
import torch.distributed as dist

from cli import UserError

# The mesh axes that split the dimensions of a parameter, by its name. "fsdp" divides the storage,
# "tensor" the products: a Linear that widens is split by rows and the one that narrows back by
# columns, so that a pair needs one all-reduce. Matrices without a row here are split by their rows
# on fsdp; norms, biases, convolutions and tensors of fewer than WHOLE elements stay whole. FSDP2
# splits every parameter by its first dimension and needs no table.
TABLE = [
    (r"(qkv|w12|[qkv]_proj|gate_proj|up_proj|fc1|query|key|value|intermediate\.dense"
     r"|adaLN_modulation\.1|embed_tokens|lm_head)\.weight$",            ("tensor", "fsdp")),
    (r"(attn\.proj|w3|o_proj|down_proj|out_proj|fc2|output\.dense)\.weight$",
                                                                        ("fsdp", "tensor")),
    # 3 p^2 rows (588 with patches of 14) do not divide
    (r"decoder_pred\.weight$",                                          (None, "fsdp")),
    (r"(x_embedder\.proj|s_embedder\.proj|patch_embed)\.weight$",
                                                                        ("fsdp", None, None, None)),
    (r"pos_embed$|latent_queries$",                                     (None, None, None)),
]
WHOLE = 2 ** 14
# A stack of equal blocks (scan.py), [n,...]; its name says which ones: `dit_blocks.0-31.attn...`
STACK = re.compile(r"\.(\d+)-(\d+)\.")


def spec(name, shape):
    """Return the mesh axis of each dimension of a parameter, its moment or its average; None for a
    dimension that is not split."""
    name = re.sub(r"\.exp_avg(_sq)?$", "", name)
    if STACK.search(name) and len(shape):
        return (None, *spec(STACK.sub(".", name), shape[1:]))
    by_rows = ("fsdp", None) if len(shape) == 2 else ()
    axes = next((axes for pattern, axes in TABLE if re.search(pattern, name)), by_rows)
    if len(axes) < len(shape) or math.prod(shape) < WHOLE:
        return (None,) * len(shape)
    return axes[:len(shape)]


class Devices:
    """A back end. kind: cpu | cuda | xla | planned. dtype: of products. axes: size of each mesh
    axis. rank, world: place among the processes that load data, and their number. main: whether
    this process writes files. target: the kind that a plan is for, otherwise `kind`."""

    def __init__(self, kind, device, rank, world, dtype, axes, mesh=None, target=None):
        self.kind, self.device, self.rank, self.world = kind, device, rank, world
        self.dtype, self.axes, self.mesh, self.main = dtype, axes, mesh, rank == 0
        self.target = target or kind
        # Processes whose losses and gradients are averaged. An SPMD program sees the whole batch.
        self.replicas = 1 if kind == "xla" else world

    @property
    def count(self):
        return math.prod(self.axes.values())

    @property
    def name(self):
        if self.kind == "planned":
            return f"planned for {self.target}"
        return torch.cuda.get_device_name() if self.kind == "cuda" else self.kind

    def __str__(self):
        mesh = ",".join(f"{k}={v}" for k, v in self.axes.items())
        return f"{self.name} x {self.count}, mesh {mesh}"


def parse_mesh(text, count=None):
    """Return the axes of `fsdp=8` or `fsdp=16,tensor=4`; without text, all devices are on fsdp.
    count: the number of devices, None to plan for another machine. Raises UserError."""
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
    """Start a back end -> Devices. kind: auto | cpu | cuda | xla. dtype: by default bf16 on
    accelerators and on CPUs with AVX512-BF16, otherwise fp32. plan: start nothing and accept any
    mesh (--dry-run). Raises UserError."""
    if kind == "auto":
        kind = ("xla" if "PJRT_DEVICE" in os.environ else
                "cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available() and not plan:
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    if dtype is None:
        native = kind != "cpu" or torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if native else "float32"
    dtype = getattr(torch, dtype)
    if kind != "xla" and parse_mesh(mesh)["tensor"] > 1:
        raise UserError(f"--mesh {mesh}: the tensor axis is for xla; leave it out")
    if plan:
        return Devices("planned", torch.device("cpu"), 0, 1, dtype, parse_mesh(mesh), target=kind)
    if kind == "xla":
        try:
            import xla
        except ImportError:
            raise UserError("--device xla: torch_xla is not installed; "
                            "pip install -r requirements-tpu.txt in an environment of its own")
        return xla.setup(dtype, mesh)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    axes = parse_mesh(mesh, world)
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")   # fp32 means fp32; bf16 is the fast path
        torch.backends.cudnn.allow_tf32 = False         # of convolutions too
    grid = None
    # Also for one process under torchrun, as a check of FSDP2 on one GPU. On cuda gloo is added,
    # because `total` exchanges the hosts' numbers without a device.
    if world > 1 or dist.is_torchelastic_launched():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        grid = dist.init_device_mesh(kind, (world,), mesh_dim_names=("fsdp",))
    return Devices(kind, device, rank, world, dtype, axes, grid)


# ------------------------------------------------------------------------------------------------
# Networks: built on the meta device, sharded, then filled tensor by tensor
# ------------------------------------------------------------------------------------------------

def build(model, rows, devices, blocks=()):
    """Fill a network that is on the meta device -> the network, on its device.

    rows(name, first, last) returns rows of a tensor: initial values, or those of a file. Each
    process allocates and reads only its own rows. cpu, cuda: FSDP2 shards `blocks` and the rest;
    without blocks the network stays whole in every process, and `clip_grad` averages its gradients.
    xla: TABLE says how to split. Buffers that are not on meta (tables of angles) keep their values.
    """
    if devices.kind == "xla":
        import xla
        return xla.build(model, rows, devices)
    if devices.mesh is not None and blocks:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        # A block's weights travel in the dtype that its Linears cast them to: half the bytes, the
        # same numbers. Gradients are summed in fp32. The root, which has fp32 parts, has no policy.
        policy = MixedPrecisionPolicy(devices.dtype, torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=devices.mesh, mp_policy=policy)
        fully_shard(model, mesh=devices.mesh)
    on_meta = {name for name, buffer in model.named_buffers() if buffer.is_meta}
    model._apply(lambda t: torch.empty_like(t, device=devices.device) if t.is_meta else
                 t.to(devices.device))
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in on_meta)
    for name, tensor in itertools.chain(model.named_parameters(), buffers):
        load_rows(name, tensor, rows, devices)
    return model


def initial_rows(model, initial, seed):
    """Return `rows` for `build` from a component's initial(name, shape, seed), which makes one
    tensor at a time. Tensors of the model that are not on meta (positions) keep their values."""
    own = model.state_dict()

    def rows(name, first, last):
        table = own[name]
        return cut(initial(name, table.shape, seed) if table.is_meta else table, first, last)
    return rows


def cut(tensor, first, last):
    """Return rows of a tensor; a scalar has none."""
    return tensor[first:last] if tensor.dim() else tensor


@torch.no_grad()
def load_rows(name, tensor, rows, devices):
    """Fill a possibly sharded tensor from rows(name, first, last)."""
    if hasattr(tensor, "to_local"):
        local, first = local_rows(tensor)
        if len(local):
            local.copy_(rows(name, first, first + len(local)))
        return
    tensor.copy_(read_whole(name, tensor, rows, devices))


def read_whole(name, like, rows, devices):
    """Return a new tensor on the device with the dtype and the kind of `like`. A stack of blocks
    is put together from the blocks' tensors."""
    parts = [rows(key, 0, shape[0] if shape else 1)
             for key, shape in file_shapes(name, like.shape).items()]
    value = torch.stack(parts) if STACK.search(name) and like.dim() else parts[0]
    value = value.to(like.dtype).to(devices.device)
    if isinstance(like, torch.nn.Parameter):
        value = torch.nn.Parameter(value, like.requires_grad)
    mark(name, value, devices)
    return value


def mark(name, tensor, devices):
    """On xla, split a tensor as TABLE says for `name`, or keep it whole. A tensor without a mark is
    split as the compiler likes: a parameter's average and moments do not inherit its mark."""
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


def file_shapes(name, shape):
    """Return {key: shape} of a tensor in files, where a stack is one tensor per block."""
    stack = STACK.search(name)
    if not stack:
        return {name: tuple(shape)}
    return {f"{name[:stack.start()]}.{i}.{name[stack.end():]}": tuple(shape[1:])
            for i in range(int(stack[1]), int(stack[2]) + 1)}


def unstack(name, tensor):
    """Return {key: tensor} as files have it."""
    if not STACK.search(name):
        return {name: tensor}
    keys = file_shapes(name, tensor.shape)
    return dict(zip(keys, tensor if tensor.dim() else [tensor.clone() for _ in keys]))


def rows_to_save(name, tensor):
    """Return what this process saves of a tensor: [(key, rows on the CPU, index of the first row)],
    empty if another process saves the same rows."""
    if hasattr(tensor, "to_local"):
        local, first = local_rows(tensor)
        return [(name, local.detach().cpu(), first)] if local.numel() else []
    value = tensor.detach().cpu()       # by every process: on xla it is a program of all hosts
    if dist.is_initialized() and dist.get_rank():
        return []
    return [(key, part, 0) for key, part in unstack(name, value).items()]


@contextlib.contextmanager
def unsharded(model):
    """Gather the parameters outside of the blocks (FSDP2), for calls such as sampling's that do not
    enter through the forward of the root."""
    if hasattr(model, "unshard"):
        model.unshard()
    yield
    if hasattr(model, "reshard"):
        model.reshard()


def use_scan(devices, *models):
    """Turn the blocks of these models into stacks, which one compiled loop runs (scan.py). On xla.
    `build` splits the stacks over the devices; those of a network that has its weights already are
    split here."""
    import scan
    for model in models:
        model.run = functools.partial(scan.scan, devices)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ModuleList):
                    setattr(module, name, scan.Stacks(child))
        for name, p in model.named_parameters():
            if STACK.search(name) and p.device.type == "xla":
                mark(name, p, devices)


def compile_blocks(blocks, wanted, devices):
    """Compile each block with torch.compile. wanted: True, False, or None for "on CUDA only"."""
    if wanted or (wanted is None and devices.kind == "cuda"):
        for block in blocks:
            block.compile(fullgraph=True)


# ------------------------------------------------------------------------------------------------
# Batches and the step
# ------------------------------------------------------------------------------------------------

def to_device(batch, devices):
    """Move the tensors of a batch, a dict, to the devices. On xla the result is the batch of all
    processes, split along its first axis."""
    if devices.kind == "xla":
        import xla
        return xla.to_device(batch, devices)
    cuda = devices.kind == "cuda"                       # from pageable memory the host would wait
    return {k: (v.pin_memory() if cuda else v).to(devices.device, non_blocking=True)
            if torch.is_tensor(v) else v for k, v in batch.items()}


def scalar(value, device):
    """Wrap a number that changes with every step. On xla it becomes a tensor, because a constant is
    part of the program, and each step would compile anew. (It begins as a vector: two equal scalars
    would become one input, which is another program.)"""
    return torch.tensor([value]).to(device)[0] if device.type == "xla" else value


def adamw(groups, devices, **options):
    """Return AdamW: fused, except on xla, where its step count is on the device."""
    xla = devices.kind == "xla"
    return torch.optim.AdamW(groups, fused=not xla, capturable=xla, foreach=False if xla else None,
                             **options)


def parameters_of(optimizer):
    """Return the parameters of all groups, in the order of the state dict's numbers."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def clip_grad(parameters, limit, devices):
    """Average the gradients of networks that every process holds whole, then scale all gradients to
    a global L2 norm of at most `limit` -> the norm before, a tensor."""
    parameters = list(parameters)
    for p in parameters:
        if p.grad is not None and not hasattr(p, "to_local"):
            average(p.grad, devices)
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def average(tensor, devices):
    """Average a tensor in place over the replicas."""
    if devices.replicas > 1:
        dist.all_reduce(tensor)
        tensor /= devices.replicas
    return tensor


@torch.no_grad()
def guarded_step(optimizer, norm, devices):
    """Call optimizer.step() unless the gradient's norm is not finite; then change nothing.

    With a fused optimizer and on xla the device decides. For other optimizers the host reads the
    norm, and waits for the device.
    """
    skipped = ~torch.isfinite(norm)
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skipped.float()   # read by the fused kernels, as for GradScaler
        optimizer.step()
    elif devices.kind == "xla":
        import xla
        xla.step_unless(skipped, optimizer)
    elif not skipped:
        optimizer.step()


def init_moments(optimizers, names, devices):
    """On xla, make AdamW's state before the first step: all steps must be the same program. names:
    {parameter: name}."""
    if devices.kind == "xla":
        import xla
        xla.init_moments(optimizers, names, devices)


def step_done(devices):
    """End a step: on xla, where operations are only recorded, run them."""
    if devices.kind == "xla":
        import torch_xla
        torch_xla.sync()


# ------------------------------------------------------------------------------------------------
# Numbers between processes
# ------------------------------------------------------------------------------------------------

def total(values, devices):
    """Sum each number of a list over the processes that load data. No device is involved."""
    if devices.world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(values)
    return values.tolist()


def mean(values, devices):
    """Average each number of a list over the replicas."""
    if devices.replicas == 1:
        return values
    return [v / devices.replicas for v in total(values, devices)]


def barrier(devices):
    """Wait for every process."""
    total([0.0], devices)


def finish():
    """Leave the process groups, whose threads end with the last reference to a group. A thread that
    still frees a tensor of its last collective while Python ends would abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
