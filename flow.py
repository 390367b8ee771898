"""Flow matching: every equation of the method's generative part (paper section 2.2, appendix B).

    x_t = (1-t) z + t eps       t = 1 is noise, t = 0 is data
    v   = eps - z               the velocity dx/dt, what the network predicts
    t  <- a t / (1 + (a-1) t)   dimension-dependent shift, a = sqrt(N C / 4096)  (arXiv 2403.03206)
"""
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
    tau = g[index]                                              # [steps], ascending, tau[-1] = 1
    walk = [(tau[k], tau[k - 1]) for k in range(steps - 2, 0, -1)]
    return walk + [(tau[-2], tau[-1])]


def schedule_pairs(schedule, steps, alpha):
    """The list of (t_from, t_to) Euler steps of `clean` or `compat`."""
    if schedule == "compat":
        return compat_schedule(steps, alpha)
    times = clean_schedule(steps, alpha)
    return list(zip(times[:-1], times[1:]))


@torch.no_grad()
def euler(velocity, noise, pairs, progress=None):
    """dx = v dt from noise [B,N,C] to a latent; velocity(x, t [B]) -> [B,N,C]. Update in fp32."""
    x = noise.float()
    for t_from, t_to in pairs if progress is None else progress(pairs):
        t = torch.full((len(x),), float(t_from), device=x.device)
        x = x + float(t_to - t_from) * velocity(x, t).float()
    return x


def guide(v_cond, v_uncond, scale):
    """Classifier-free guidance (arXiv 2207.12598): v_u + s (v_c - v_u); s = 1 is the condition."""
    return v_uncond + scale * (v_cond - v_uncond)
