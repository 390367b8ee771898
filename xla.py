"""torch_xla SPMD: what parallel.py does on xla alone. One process per host drives its devices, and
every program sees whole tensors, which the compiler splits as they are marked.
"""
import logging
import os

import numpy as np
import torch
import torch.distributed as dist
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr

from cli import UserError
from parallel import Devices, mark, parameters_of, parse_mesh, read_whole


def setup(dtype, mesh):
    """Start the back end; see parallel.setup."""
    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)     # warns of setting it twice
    torch_xla.backends.set_mat_mul_precision("highest")     # fp32 means fp32 here too
    if os.environ.get("PJRT_DEVICE") == "CPU":
        # Virtual devices wait for each other in threads of one pool, by default one thread per
        # core. With few cores the last device would find none.
        os.environ.setdefault("NPROC", "64")
    xr.use_spmd()
    if not hasattr(torch, "xla"):
        torch._register_device_module("xla", torch_xla)     # torch.utils.checkpoint looks for it
    count = xr.global_runtime_device_count()
    axes = parse_mesh(mesh, count)
    grid = xs.Mesh(np.arange(count), tuple(axes.values()), tuple(axes))
    if xr.process_count() > 1:                          # for the numbers that hosts exchange
        if axes["tensor"] > 1:
            raise UserError(f"--mesh {mesh}: the tensor axis is for one host; use fsdp={count}")
        from torch_xla.distributed import xla_backend   # noqa: F401: registers xla://
        dist.init_process_group("gloo", init_method="xla://")
    return Devices("xla", torch_xla.device(), xr.process_index(), xr.process_count(), dtype, axes,
                   grid)


def build(model, rows, devices):
    """Replace the parameters, and the buffers that are on meta, by new tensors. (A copy into an
    empty tensor would keep the empty one alive, and every step would carry all parameters twice.)
    """
    for path, module in model.named_modules():
        for places in (module._parameters, module._buffers):
            for key, tensor in places.items():
                if tensor is None:
                    continue
                if tensor.is_meta or isinstance(tensor, torch.nn.Parameter):
                    name = f"{path}.{key}" if path else key
                    places[key] = read_whole(name, tensor, rows, devices)
                else:
                    places[key] = tensor.to(devices.device)
    return model


def to_device(batch, devices):
    """Split each tensor along the batch axis. Each process holds its part of the batch; the result
    is the whole."""
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


def init_moments(optimizers, names, devices):
    """See parallel.init_moments."""
    for optimizer in optimizers:
        for p in parameters_of(optimizer):
            state = optimizer.state[p]
            state["step"] = torch.zeros((), device=p.device)
            mark("step", state["step"], devices)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(p, memory_format=torch.preserve_format)
                mark(names[p], state[moment], devices)


def step_unless(skipped, optimizer):
    """Call optimizer.step(), then restore everything that it changed if `skipped`, a tensor."""
    tensors = [t for p in parameters_of(optimizer) for t in (p, *optimizer.state[p].values())]
    before = [t.clone() for t in tensors]               # recorded only: no memory is taken
    optimizer.step()
    for t, old in zip(tensors, before):
        t.copy_(torch.where(skipped, old, t))
