"""Flow matching: every equation of the generative part, once (arXiv 2601.16208, section 3).

    x_t = (1-t) z + t eps       t = 1 is noise, t = 0 is data                       section 3.1
    v   = eps - z               the velocity dx/dt, which the network gives
    t  <- a t / (1 + (a-1) t)   dimension-dependent shift, a = sqrt(N C / 4096)     section 3.2

B batch, N latent tokens, C latent channels, Z channels of the condition.
"""
import math

import numpy as np
import torch

SHIFT_BASE = 4096      # the paper's; the tiny preset takes 128 (recipe.py says why)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

def shift_alpha(tokens, channels, base=SHIFT_BASE):
    """Return a = sqrt(N C / base), 8.485 for 256 x 1152: more dimensions need more noise."""
    return math.sqrt(tokens * channels / base)


def time_shift(t, alpha):
    """Shift times in [0,1]. alpha = 1 changes nothing. The form is that of arXiv 2403.03206."""
    return alpha * t / (1 + (alpha - 1) * t)


def sample_time(normal, alpha):
    """Training times from standard normal draws [B]: logit-normal, then shifted. fp32."""
    return time_shift(torch.sigmoid(normal.float()), alpha)


def interpolate(z, eps, t):
    """Mix the latent z and noise eps, [B,N,C], at times t [B] -> x_t [B,N,C]. fp32."""
    t = t[:, None, None]                                                    # [B,1,1]
    return (1 - t) * z + t * eps


def flow_loss(v, z, eps):
    """Average |v - (eps - z)|^2 over N and C: one value per image [B]. fp32."""
    return (v.float() - (eps - z)).square().mean(dim=(1, 2))                # [B]


# ------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------

def sampling_times(schedule, steps, alpha):
    """Return the steps of a schedule, [(t_from, t_to), ...], as numbers.

    euler: `steps` steps over the shifted uniform grid from 1 to 0. authors: the `steps` - 1 steps
    of the authors' code, which made the published figures. Their loop expects descending times,
    but their grid ascends. So pure noise gets the label 0.9976, the walk ends at 0.0084, and a
    stray last step gives the almost clean latent the label of the noise end.
    """
    if schedule == "euler":
        t = time_shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha).tolist()
        return list(zip(t[:-1], t[1:]))
    grid = time_shift(torch.linspace(1 / 1000, 1, 1000, dtype=torch.float64), alpha).tolist()
    t = [grid[round(k * 999 / (steps - 1))] for k in range(steps)]          # ascending, t[-1] = 1
    return [(t[k], t[k - 1]) for k in range(steps - 2, 0, -1)] + [(t[-2], t[-1])]


def guide(v_cond, v_null, scale):
    """Apply classifier-free guidance (arXiv 2207.12598). scale = 1 is the condition alone."""
    return v_null + scale * (v_cond - v_null)


@torch.no_grad()
def integrate(velocity, noise, times, solver="euler", on_step=None):
    """Solve dx = v dt from noise [B,N,C] to a latent, in fp32.

    velocity(x, t) returns [B,N,C] for a number t. times: the steps of `sampling_times`. heun takes
    the mean of the velocities at both ends, except at t = 0, where no noise is left to remove.
    on_step() is called after each step.
    """
    x = noise.float()
    for t_from, t_to in times:
        dt = torch.tensor([t_to - t_from]).to(x.device)     # a tensor: on XLA one program for all
        v = velocity(x, t_from).float()
        if solver == "heun" and t_to > 0:
            v = (v + velocity(x + dt * v, t_to).float()) / 2
        x = x + dt * v
        if on_step:
            on_step()
    return x


def sample(dit, cond, noise, alpha, steps=50, guidance=1.0, schedule="euler", solver="euler",
           on_step=None):
    """Draw latents [B,N,C] from noise [B,N,C]. cond: [B,N,Z], or [1,N,Z] for one prompt, whose
    modulation is then computed once for all images."""
    def velocity(x, t):
        time = torch.tensor([t], dtype=torch.float32).to(x.device)          # [1]
        v = dit(x, time, cond).float()                                      # [B,N,C]
        if guidance == 1:
            return v
        return guide(v, dit(x, time, dit.null_condition()).float(), guidance)

    times = sampling_times(schedule, steps, alpha)
    return integrate(velocity, noise, times, solver, on_step)


def noise_for(prompt, seed, tokens, channels, schedule="euler", device="cpu"):
    """Draw noise [N,C] that depends on prompt and seed alone, so that the batch never changes an
    image. The authors' sampler draws on its device, from the seed alone."""
    if schedule == "authors":
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(channels, tokens, generator=generator, device=device).T      # [N,C]
    from data import rng
    noise = rng(seed, f"noise {prompt}").standard_normal((tokens, channels), np.float32)
    return torch.from_numpy(noise)
