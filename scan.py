"""A stack of identical blocks as one loop, for torch_xla: its body is compiled once at any depth.

    x = block(x, *shared)   for every block

The loop keeps the input of each block, and the backward loop recomputes the rest, as --remat block
does. torch_xla's own scan_layers would also keep one copy of `shared` per block and, with its
default partition, everything that autograd saves. Weights, gradients, moments and averages stay
stacked, so that the work on each parameter is compiled once too; files hold them block by block
(parallel.unstack). Only parallel.use_scan calls this.
"""
import copy
import itertools

import torch
import torch.nn as nn
import torch_xla.distributed.spmd as xs
from torch_xla.experimental.scan import _scan_impl_flat as loop

from parallel import spec


class Stacks(nn.Module):
    """Replaces an nn.ModuleList of blocks. Neighbours of the same shape share stacked parameters
    [n,...], which belong to a child with their numbers as its name, such as `0-31`."""

    def __init__(self, blocks=()):
        super().__init__()
        first = 0
        for _, group in itertools.groupby(blocks, kind):
            group = list(group)
            for key in [key for key, _ in group[0].named_parameters()]:
                path, _, name = key.rpartition(".")
                owners = [b.get_submodule(path) for b in group]
                each = [getattr(owner, name) for owner in owners]
                for owner in owners:
                    setattr(owner, name, None)                              # no second copy stays
                setattr(owners[0], name, nn.Parameter(torch.stack([p.data for p in each]),
                                                      each[0].requires_grad))
            self.add_module(f"{first}-{first + len(group) - 1}", group[0])
            first += len(group)

    def ranges(self):
        """Yield (first, last + 1, stack) of each stack."""
        for name, stack in self.named_children():
            first, last = map(int, name.split("-"))
            yield first, last + 1, stack

    def __len__(self):
        return sum(end - first for first, end, _ in self.ranges())

    def __getitem__(self, at):
        """Return Stacks of the blocks of a slice."""
        part, (start, stop, _) = Stacks(), at.indices(len(self))
        for first, end, stack in self.ranges():
            a, b = max(first, start), min(end, stop)
            if a < b:
                if (a, b) != (first, end):      # the same module with a part of each parameter
                    views = {id(p): p[a - first:b - first] for p in stack.parameters()}
                    stack = copy.deepcopy(stack, views)
                part.add_module(f"{a}-{b - 1}", stack)
        return part


def kind(block):
    """Return what is equal within a stack: shapes, what is frozen, and plain numbers."""
    return [(p.shape, p.requires_grad) for p in block.parameters()], [
        v for m in block.modules() for v in vars(m).values() if isinstance(v, (int, float))]


def scan(devices, blocks, x, *shared):
    """Run Stacks on x [B,N,D]. shared: the other arguments of every block, tensors or not."""
    for block in blocks.children():
        x = scan_stack(devices, block, x, *shared)
    return x


def scan_stack(devices, block, x, *shared):
    """Run one loop over a block whose parameters are [n,...]."""
    names, stacks = zip(*block.named_parameters())
    axes = [spec(name, p.shape[1:]) for name, p in zip(names, stacks)]      # of one block
    tensors = [s for s in shared if torch.is_tensor(s)]

    def split(tensor, axes):
        if any(axes):
            xs.mark_sharding(tensor, devices.mesh, axes)
        return tensor

    def call(x, tensors, weights):
        rest = iter(tensors)
        args = [next(rest) if torch.is_tensor(s) else s for s in shared]
        y = torch.func.functional_call(block, dict(zip(names, weights)), (x, *args))
        return split(y, ("fsdp",) + (None,) * (y.dim() - 1))

    return _Scan.apply(call, split, axes, len(tensors), x, *tensors, *stacks)


class _Scan(torch.autograd.Function):
    """The loop over the stacked weights, and the loop backward. Shared tensors are in the carry,
    because the body of a loop sees nothing else."""

    @staticmethod
    def forward(ctx, call, split, axes, n, x, *rest):
        tensors, stacks = rest[:n], rest[n:]
        keep = any(ctx.needs_input_grad)

        def step(carry, weights):
            x, tensors = carry[0], carry[1:]
            return [call(x, tensors, weights), *tensors], [x] if keep else []

        carry, inputs = loop(step, [x, *tensors], stacks)           # [B,N,D], ...; [depth,B,N,D]
        ctx.call, ctx.split, ctx.axes, ctx.n = call, split, axes, n
        ctx.save_for_backward(*tensors, *stacks, *inputs)
        return carry[0]

    @staticmethod
    def backward(ctx, grad):
        tensors, stacks = ctx.saved_tensors[:ctx.n], ctx.saved_tensors[ctx.n:-1]
        wanted = ctx.needs_input_grad[5:]                           # of tensors, then of stacks
        graded = [i for i in range(ctx.n) if wanted[i]]             # shared tensors with a gradient

        def step(carry, weights):
            grad, sums, tensors = carry[0], carry[1:1 + len(graded)], carry[1 + len(graded):]
            x, *weights = weights
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_(w) for t, w in
                          zip([x, *tensors, *weights], [True, *wanted])]
                y = ctx.call(inputs[0], inputs[1:1 + ctx.n], inputs[1 + ctx.n:])
                asked = [t for t, w in zip(inputs, [True, *wanted]) if w]
                grads = torch.autograd.grad(y, asked, grad)
            sums = [s + g for s, g in zip(sums, grads[1:])]
            found = [ctx.split(g, a) for g, a in zip(
                grads[1 + len(graded):], [a for a, w in zip(ctx.axes, wanted[ctx.n:]) if w])]
            return [grads[0], *sums, *tensors], found

        zeros = [torch.zeros_like(tensors[i]) for i in graded]
        carry, grads = loop(step, [grad, *zeros, *tensors], [ctx.saved_tensors[-1], *stacks],
                            reverse=True)
        sums, grads = iter(carry[1:]), iter(grads)
        return (None, None, None, None, carry[0] if ctx.needs_input_grad[4] else None,
                *(next(sums) if w else None for w in wanted[:ctx.n]),
                *(next(grads) if w else None for w in wanted[ctx.n:]))
