"""A stack of identical blocks as one loop, for torch_xla: its body is compiled once at any depth.

    x = block(x, *shared)   for every block

The loop keeps the input of each block and computes the rest again in the loop back, that is
--remat block. torch_xla's own scan_layers would also keep one copy of `shared` a block and, with
its default partition, everything that autograd saves. Only parallel.use_scan calls this.
"""
import torch
import torch_xla.distributed.spmd as xs
from torch_xla.experimental.scan import _scan_impl_flat as loop

from parallel import spec


def scan(devices, blocks, x, *shared):
    """Blocks of one shape and x [B,N,D] -> [B,N,D]; shared: what all blocks take besides x, tensors
    or anything else. A parameter of the blocks is stacked to [depth,...]."""
    each = [hasattr(s, "__next__") for s in shared]     # an iterator: one for each block, as the
    if any(each):                                       # modulations in sampling; no loop then
        for block in blocks:
            x = block(x, *[next(s) if e else s for s, e in zip(shared, each)])
        return x
    names = [name for name, _ in blocks[0].named_parameters()]
    tensors = [s for s in shared if torch.is_tensor(s)]
    stacks = [torch.stack([b.get_parameter(name) for b in blocks]) for name in names]  # [depth,...]
    axes = [spec(name, p.shape) for name, p in blocks[0].named_parameters()]

    def split(tensor, axes):
        if any(axes):
            xs.mark_sharding(tensor, devices.mesh, axes)
        return tensor

    def call(x, tensors, weights):
        rest = iter(tensors)
        args = [next(rest) if torch.is_tensor(s) else s for s in shared]
        y = torch.func.functional_call(blocks[0], dict(zip(names, weights)), (x, *args))
        return split(y, ("fsdp",) + (None,) * (y.dim() - 1))

    for stack, a in zip(stacks, axes):
        split(stack, (None, *a) if any(a) else ())
    return _Scan.apply(call, split, axes, len(tensors), x, *tensors, *stacks)


class _Scan(torch.autograd.Function):
    """The loop over the stacked weights, and the loop back. The shared tensors travel in the carry,
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
        leads = [i for i in range(ctx.n) if wanted[i]]              # shared tensors with a gradient

        def step(carry, weights):
            grad, sums, tensors = carry[0], carry[1:1 + len(leads)], carry[1 + len(leads):]
            x, *weights = weights
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_(w) for t, w in
                          zip([x, *tensors, *weights], [True, *wanted])]
                y = ctx.call(inputs[0], inputs[1:1 + ctx.n], inputs[1 + ctx.n:])
                asked = [t for t, w in zip(inputs, [True, *wanted]) if w]
                grads = torch.autograd.grad(y, asked, grad)
            sums = [s + g for s, g in zip(sums, grads[1:])]
            found = [ctx.split(g, a) for g, a in zip(
                grads[1 + len(leads):], [a for a, w in zip(ctx.axes, wanted[ctx.n:]) if w])]
            return [grads[0], *sums, *tensors], found

        zeros = [torch.zeros_like(tensors[i]) for i in leads]
        carry, grads = loop(step, [grad, *zeros, *tensors], [ctx.saved_tensors[-1], *stacks],
                            reverse=True)
        sums, grads = iter(carry[1:]), iter(grads)
        return (None, None, None, None, carry[0] if ctx.needs_input_grad[4] else None,
                *(next(sums) if w else None for w in wanted[:ctx.n]),
                *(next(grads) if w else None for w in wanted[ctx.n:]))
