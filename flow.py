"""Flow matching: every equation of the method's generative part (paper section 2.2, appendix B).

    x_t = (1-t) z + t eps       t = 1 is noise, t = 0 is data
    v   = eps - z               the velocity dx/dt, what the network predicts
    t  <- a t / (1 + (a-1) t)   dimension-dependent shift, a = sqrt(N C / 4096)  (arXiv 2403.03206)
"""
import hashlib
import math

import torch

SHIFT_BASE = 4096      # the paper's; the tiny preset takes 128 (see train_dit.py)


def shift_alpha(tokens, channels, base=SHIFT_BASE):
    """a = sqrt(N C / base): 8.485 for 256 x 1152. More dimensions need more noise (section 2.2)."""
    return math.sqrt(tokens * channels / base)


def time_shift(t, alpha):
    """t in [0,1] -> shifted t in [0,1]; alpha 1 is the identity."""
    return alpha * t / (1 + (alpha - 1) * t)


def sample_time(normal, alpha):
    """Training times from standard normal draws [B]: logit-normal, then shifted. fp32."""
    return time_shift(torch.sigmoid(normal.float()), alpha)


def interpolate(z, eps, t):
    """x_t [B,N,C] from latent z, noise eps [B,N,C] and times t [B]; fp32."""
    t = t[:, None, None]
    return (1 - t) * z + t * eps


def flow_loss(v, z, eps):
    """|v - (eps - z)|^2 averaged over N and C, one value an image: [B]; fp32."""
    return (v.float() - (eps - z)).square().mean(dim=(1, 2))


def clean_schedule(steps, alpha):
    """steps + 1 times from 1 to 0, the shifted uniform grid. float64."""
    return time_shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha)


def compat_schedule(steps, alpha):
    """The authors' walk: pairs (t_from, t_to) of `steps` - 1 Euler steps, exactly as coded.

    Their grid ascends while the code takes it to descend: the walk starts at the label 0.9976 (on
    pure noise), ends at 0.0084, and a stray last step uses the noise end's label again on the
    almost clean latent. Published figures use it; `clean_schedule` is what they meant.
    """
    g = time_shift(torch.linspace(1 / 1000, 1, 1000, dtype=torch.float64), alpha)
    index = torch.tensor([round(k * 999 / (steps - 1)) for k in range(steps)])
    tau = g[index].tolist()                                     # [steps], ascending, tau[-1] = 1
    walk = [(tau[k], tau[k - 1]) for k in range(steps - 2, 0, -1)]
    return walk + [(tau[-2], tau[-1])]


def schedule_pairs(schedule, steps, alpha):
    """The list of (t_from, t_to) Euler steps of `clean` or `compat`, numbers."""
    if schedule == "compat":
        return compat_schedule(steps, alpha)
    times = clean_schedule(steps, alpha).tolist()
    return list(zip(times[:-1], times[1:]))


@torch.no_grad()
def euler(velocity, noise, pairs, progress=None):
    """dx = v dt from noise [B,N,C] to a latent; velocity(x, t [B]) -> [B,N,C]. Update in fp32."""
    x = noise.float()
    for t_from, t_to in pairs if progress is None else progress(pairs):
        t = torch.full((len(x),), t_from, device=x.device)
        x = x + (t_to - t_from) * velocity(x, t).float()
    return x


def guide(v_cond, v_uncond, scale):
    """Classifier-free guidance (arXiv 2207.12598): v_u + s (v_c - v_u); s = 1 is the condition."""
    return v_uncond + scale * (v_cond - v_uncond)


# ------------------------------------------------------------------------------------------------
# The sampler: noise and condition -> latent
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def generate(dit, cond, noise, alpha, steps, guidance=1.0, schedule="clean", progress=None,
             interval=(0.0, 1.0), together=None):
    """noise [B,N,C], cond [B,N,Z] or, of one prompt for all, [1,N,Z] -> latents [B,N,C]:

        velocity = lambda x, t: guide(dit(x, t, cond), dit(x, t, null condition), guidance)
        euler(velocity, noise, schedule_pairs(schedule, steps, alpha))

    and the rest of it saves work, measured by tests/bench_sampler.py: images of one prompt share
    its modulation, and the null condition, one vector for all tokens, has its modulation [1,1,6D]
    for every step made in one table before the first.

    interval: the times t at which guidance acts (arXiv 2404.07724). together: images in one matrix
    product, default all. With 1, images of one prompt have the same bytes in any company; a product
    of another size may round differently.
    """
    pairs, shared = schedule_pairs(schedule, steps, alpha), len(cond) == 1
    times = torch.tensor([t for t, _ in pairs], device=noise.device)                    # [S]
    table = [None] * len(pairs)
    if guidance != 1:
        table = list(zip(*(m.split(1) for m in dit.modulations(times, dit.null_condition(1)))))
        table = [m if interval[0] <= t <= interval[1] else None for m, (t, _) in zip(table, pairs)]
    table = iter(table)

    def velocity(x, t):
        null, v, b = next(table), [], together or len(x)
        m = dit.modulations(t[:1], cond) if shared else None                # of [1,N,6D]
        alone = shared and b == 1                       # one image a pass: with both its branches
        if null and alone:
            m = (torch.cat([c, u.expand_as(c)]) for c, u in zip(m, null))   # of [2,N,6D]
        if m and len(x) > 1:
            m = list(m)                                 # else block by block, while it is in cache
        for part, y in zip(x.split(b), cond.expand(len(x), -1, -1).split(b)):
            if null and alone:
                v_c, v_u = dit(part.expand(2, -1, -1), m=m).split(1)
            else:
                v_c = dit(part, t[:1], y, m=m)
                v_u = dit(part, m=null) if null else v_c
            v.append(guide(v_c.float(), v_u.float(), guidance if null else 1.0))
        return torch.cat(v)

    return euler(velocity, noise, pairs, progress)


def candidates_together(tokens, device):
    """How many candidates of best-of-N go through a product at once: all, but on a CPU about 256
    rows: more of them cost page faults and leave the cache (LOG.md, tests/bench_sampler.py)."""
    return max(1, 256 // tokens) if device.type == "cpu" else None


def noise_for(prompt, seed, tokens, channels, schedule="clean", device="cpu"):
    """[N,C] from (prompt, seed) alone: the batch it is sampled in never changes a picture. With
    `compat` the authors', of the device's own generator, whatever the prompt."""
    if schedule == "compat":
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(channels, tokens, generator=generator, device=device).T
    key = int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:7], "big")
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(key))
