"""Score distillation: a prompt becomes a NeRF, guided by the multi-view diffusion model.

The paper's section on text-to-3D generation: four orthogonal views of the object are rendered, encoded, noised;
the model says, knowing the text and the cameras, how four clean views would look; the NeRF is pulled toward that.
Here are the losses as pure functions of tensors, the schedules, the presets, and the loop. The model is passed in.

Letters:  x, x_t     latents (N, 4, h, w) of the N rendered views, without and with noise; N = sets * V
          V, S       views of one set (one object seen from V sides), number of sets
          t          diffusion time, 0..999, one for the whole step;  abar_t  cumulative product of the schedule
          alpha, sigma   sqrt(abar), sqrt(1 - abar):  x_t = alpha x + sigma eps
          eps, eps_hat   the noise that was added, the noise that the guided model sees (`noise_...` in the code)
          x0_hat     the clean latents the model sees, (x_t - sigma eps_hat) / alpha
          phi        `rescale`, how far the contrast of x0_hat goes back to that of the unguided prediction
"""
import io
import math
import os
import resource
import sys
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
from nerf import NeRF, NeRFConfig

NEGATIVE = ("ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, "
            "cropped, lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, "
            "dehydrated, bad proportions")


# ------------------------------------------------------------------------------------------------
# What the model wants: guidance, and the two clamps against its over-saturation


def guide(noise_text, noise_uncond, scale):
    """Classifier-free guidance: eps_hat = eps_uncond + scale (eps_text - eps_uncond)."""
    return noise_uncond + scale * (noise_text - noise_uncond)


def rescale_contrast(x0, x0_text, phi, num_views):
    """CFG rescale: x0 <- phi r x0 + (1 - phi) x0,  r = std(x0_text) / std(x0), one r for all views of a set.

    The standard deviation runs over [V, C, H, W] together, unbiased: one factor a view would let the views drift
    apart in brightness. As released the ratio is one of clean latents x0, where Lin et al. take it of the noise.
    """
    std = lambda x: x.unflatten(0, (-1, num_views)).std(dim=(1, 2, 3, 4)) + 1e-8                # (S,)
    r = (std(x0_text) / std(x0)).repeat_interleave(num_views).view(-1, 1, 1, 1)                # (N, 1, 1, 1)
    return phi * r * x0 + (1 - phi) * x0


def dynamic_threshold(x0, quantile, num_views, limit=1.0):
    """Imagen's clamp: s = the quantile of |x0| over a set, at least `limit`; then clip(x0, -s, s) limit / s.

    For pixels the limit is 1. Latents have no such bound: there the quantile of the unguided prediction stands in.
    """
    limit = torch.as_tensor(limit, dtype=x0.dtype, device=x0.device).expand(len(x0) // num_views)
    s = torch.maximum(set_quantile(x0, quantile, num_views), limit)                              # (S,)
    s, limit = (v.repeat_interleave(num_views).view(-1, 1, 1, 1) for v in (s, limit))
    return x0.clamp(-s, s) * limit / s


def set_quantile(x0, quantile, num_views):
    """The quantile of |x0| over all views of each set -> (S,)."""
    return x0.abs().reshape(len(x0) // num_views, -1).float().quantile(quantile, dim=1).to(x0.dtype)


def x0_target(schedule, x_t, t, noise_text, noise_uncond, scale, rescale, num_views, threshold=0.0):
    """The clean latents to distil toward: guided, then CFG-rescaled (`rescale` > 0) or thresholded (`threshold` > 0)."""
    x0 = schedule.predict_x0(x_t, t, guide(noise_text, noise_uncond, scale))
    if not rescale and not threshold:
        return x0
    x0_text = schedule.predict_x0(x_t, t, noise_text)
    if threshold:
        x0 = dynamic_threshold(x0, threshold, num_views, set_quantile(x0_text, threshold, num_views))
    return rescale_contrast(x0, x0_text, rescale, num_views) if rescale else x0


# ------------------------------------------------------------------------------------------------
# The losses. Each is half a squared distance to a fixed target, so that its gradient is the one in the papers; all
# are summed over a picture and averaged over the N pictures. x - x0_hat = (sigma / alpha)(eps_hat - eps) joins them.


def x0_loss(x, x0_hat):
    """The x0-reconstruction loss: |x - sg(x0_hat)|^2 / 2, which is SDS with w(t) = sigma / alpha.

    The paper writes it without the 1/2 and for pixels; the released code, and this one, for latents.
    """
    return 0.5 * (x - x0_hat.detach()).square().sum() / len(x)


def sds_loss(schedule, x, t, noise_hat, noise):
    """DreamFusion's: gradient w(t) (eps_hat - eps) with w(t) = sigma^2 = 1 - abar_t."""
    w = 1 - abar(schedule, t, x)
    return x0_loss(x, x.detach() - w * (noise_hat - noise))


def sjc_loss(schedule, x, t, x0_hat):
    """Score Jacobian chaining: gradient minus the score, (x - x0_hat) / s^2 at noise level s = sigma / alpha, times s.

    That weight makes it SDS with w(t) = 1. The noise at which x0_hat was seen is taken as centred (less variance).
    """
    s = (1 / abar(schedule, t, x) - 1).sqrt()
    return x0_loss(x, x.detach() - (x.detach() - x0_hat) / s)


def abar(schedule, t, like):
    """abar_t as (N, 1, 1, 1), in the device and type of `like`."""
    return schedule.alphas_cumprod.to(like)[t].view(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------
# Settings and presets


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Every number of a run. A pair of numbers is (before, after) the switch, or (start, end) of a linear ramp."""
    steps: int = option(10000, "optimisation steps")
    views: int = option(4, "views of a set, spaced evenly around the object")
    batch: tuple = option((8, 4), "pictures a step, a multiple of views: before, after the switch")
    size: tuple = option((64, 256), "height and width of a rendered picture: before, after the switch")
    switch: float = option(0.5, "when size, batch and shading change, as a fraction of the steps")
    loss: str = option("x0", "x0 | sds | sjc")
    guidance: float = option(50.0, "classifier-free guidance; 1 = none, and half the work")
    rescale: float = option(0.5, "phi of CFG rescale, 0 = off; less if noise floats about")  # the paper's 0.7
    threshold: float = option(0.0, "quantile of dynamic thresholding, such as 0.995; 0 = off")
    t_min: tuple = option((980, 20), "lowest diffusion time: start, end of the annealing")
    t_max: tuple = option((980, 500), "highest diffusion time: start, end of the annealing")
    anneal: float = option(0.8, "when the annealing ends, as a fraction of the steps")
    negative: str = option(NEGATIVE, "negative prompt")
    suffix: str = option("", "put behind the prompt")     # as released: ", 3d asset" for views, not for objects
    multiview: bool = option(True, "views see each other and the cameras; false = 2D guidance (Janus faces)")
    fov: tuple = option((15.0, 60.0), "vertical field of view in degrees: from, to")
    distance: tuple = option((0.8, 1.0), "camera distance in units of 1 / tan(fov / 2): from, to")
    elevation: tuple = option((0.0, 30.0), "camera elevation in degrees: from, to")
    background: str = option("learned", "learned (half of the steps a random colour) | grey (random)")
    shading: bool = option(False, "point light, soft shading, orientation loss")
    orient: tuple = option((10.0, 1000.0), "weight of the orientation loss: at the start, from the switch on")
    lr_grid: float = option(0.01, "learning rate of the hash grid")
    lr_mlp: float = option(0.001, "learning rate of the two networks and the background")
    levels: int = option(16, "hash grid: levels")
    log2_table: int = option(19, "hash grid: log2 of the entries of a level")
    base_resolution: int = option(16, "hash grid: coarsest resolution")
    finest_resolution: int = option(4096, "hash grid: finest resolution")
    hidden: int = option(64, "width of the two networks")
    occupancy: int = option(32, "occupancy grid: cells a side")
    max_samples: int = option(512, "samples of a ray across the box's diagonal")
    memory: float = option(0.0, "GiB of GPU memory to stay within: rays go in chunks, rendered twice; 0 = no bound")


FULL = Settings()
TINY = replace(FULL, guidance=3.0, negative="", suffix=", 3d asset", background="grey", fov=(data.TOY_FOV,) * 2,
               distance=(1.0, 1.0))     # the toy world has one lens, one distance, and plain grey backgrounds
PRESETS = {
    "full": FULL,                                   # the released configuration without shading
    "full-shaded": replace(FULL, shading=True),     # ... and with
    "tiny-gpu": replace(TINY, steps=1200, batch=(4, 4), size=(64, 128), levels=8, log2_table=17, base_resolution=8,
                        finest_resolution=256, max_samples=256),
    "tiny-cpu": replace(TINY, steps=350, batch=(4, 4), size=(32, 48), levels=6, log2_table=15, base_resolution=8,
                        finest_resolution=96, hidden=32, max_samples=96, lr_grid=0.03, lr_mlp=0.003),
}


def check(s):
    """One clear sentence for the first setting that cannot be."""
    for ok, message in (
        (s.steps >= 1, f"steps must be at least 1, not {s.steps}"),
        (s.guidance >= 0, f"guidance must not be negative, and is {s.guidance}: 1 is none, 50 the paper's"),
        (0 <= s.rescale <= 1, f"rescale must lie between 0 (off) and 1, and is {s.rescale}"),
        (0 <= s.threshold <= 1, f"threshold must lie between 0 (off) and 1, and is {s.threshold}"),
        (s.views >= 1 and all(b >= s.views and b % s.views == 0 for b in s.batch),
         f"batch must be a multiple of the {s.views} views of a set, and is {s.batch[0]}, then {s.batch[1]}"),
        (all(0 <= low <= high <= 999 for low, high in zip(s.t_min, s.t_max)),
         f"t_min must not exceed t_max, both in 0..999: at the start they are {s.t_min[0]} and {s.t_max[0]}, "
         f"at the end {s.t_min[1]} and {s.t_max[1]}"),
        (min(s.size) >= 1, f"size must be at least 1, and is {s.size[0]}, then {s.size[1]}"),
        (s.loss in ("x0", "sds", "sjc"), f"loss must be x0, sds or sjc, not {s.loss}"),
        (s.background in ("learned", "grey"), f"background must be learned or grey, not {s.background}"),
    ):
        if not ok:
            raise ValueError(message)


# ------------------------------------------------------------------------------------------------
# What changes as a run goes on


def progress(s, step, end):
    """How far a linear ramp that ends at the fraction `end` of the run has come, 0..1."""
    return min(1.0, step / max(1.0, end * s.steps))


def ramp(pair, part):
    return pair[0] + part * (pair[1] - pair[0])


def timestep_range(s, step):
    """t_min, t_max of this step: both fall linearly, and stay once the annealing ends."""
    part = progress(s, step, s.anneal)
    return round(ramp(s.t_min, part)), round(ramp(s.t_max, part))


def phase(s, step):
    """0 before the switch, 1 from it on."""
    return int(step >= s.switch * s.steps)


def draw_shading(s, step):
    """-> shading, ambient k. From the switch on: a quarter albedo, and the rest shared by textureless and diffuse."""
    if not (s.shading and phase(s, step)):
        return "albedo", 0.0
    u, k = torch.rand(2).tolist()
    return ("albedo" if u < 0.25 else "textureless" if u < 0.625 else "diffuse"), k


def draw_background(s, num_sets):
    """Half of the time the learned background (None), else one colour for all; or one grey for each set."""
    if s.background == "grey":
        return torch.rand(num_sets, 1, 1, 1).expand(-1, -1, -1, 3).repeat_interleave(s.views, 0)
    use_learned, colour = torch.rand(()) < 0.5, torch.rand(1, 1, 1, 3)
    return None if use_learned else colour


def draw_lights(positions, num_views):
    """A light near each camera: l = U(0.8, 1.5) normalize(p + N(0, I)), noise and distance shared by a set."""
    num_sets = len(positions) // num_views
    noise = torch.randn(num_sets, 3).repeat_interleave(num_views, 0)
    reach = (0.8 + 0.7 * torch.rand(num_sets, 1)).repeat_interleave(num_views, 0)
    return reach * F.normalize(positions + noise, dim=-1)


# ------------------------------------------------------------------------------------------------
# One step


def text_context(model, s, prompt, num):
    """The text half of cross-attention, computed once: rows 0..num-1 see the prompt, the next num the negative one."""
    context = model.encode_text([prompt + s.suffix, s.negative]).repeat_interleave(num, 0)
    return model.unet.project_context(context[:num] if s.guidance == 1 else context)


@torch.no_grad()
def clean_views(model, s, x, t, noise, text, c2w):
    """What the model makes of the noised latents -> x_t, x0_hat."""
    num_views = s.views if s.multiview else 1           # 2D guidance: views one by one, cameras unseen
    x_t = model.schedule.add_noise(x, t, noise)
    double = (lambda v: v) if s.guidance == 1 else (lambda v: torch.cat((v, v)))        # text, then uncond
    both = model.predict_noise(double(x_t), double(t), text, double(c2w) if s.multiview else None, num_views)
    text_half, uncond_half = both[:len(x)], both[-len(x):]                              # the same if guidance is 1
    return x_t, x0_target(model.schedule, x_t, t, text_half, uncond_half, s.guidance, s.rescale, num_views,
                          s.threshold)


def distil(model, s, step, pictures, text, c2w):
    """The distillation loss of rendered pictures (N, H, W, 3) in [0, 1]."""
    images = pictures.movedim(-1, 1) * 2 - 1                                            # (N, 3, H, W) in [-1, 1]
    if images.shape[-1] != model.image_size:
        images = F.interpolate(images, (model.image_size,) * 2, mode="bilinear")
    x = model.encode_images(images, sample=True)        # the gradient runs back through the encoder, toward the pictures
    low, high = timestep_range(s, step)
    t = torch.randint(low, high + 1, (1,)).to(x.device).expand(len(x))                  # one for the whole step
    noise = torch.randn_like(x)
    x_t, x0_hat = clean_views(model, s, x, t, noise, text, c2w)
    if s.loss == "x0":
        return x0_loss(x, x0_hat)
    if s.loss == "sjc":
        return sjc_loss(model.schedule, x, t, x0_hat)
    a = abar(model.schedule, t, x)
    return sds_loss(model.schedule, x, t, (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt(), noise)


def chunk_of_rays(s, pictures):
    """How many rays to render at once to stay within `memory` GiB; None = all of a step's."""
    room = s.memory - MODEL_GIB - PICTURE_GIB * pictures
    rays = room * 2 ** 30 / (SAMPLE_BYTES[s.shading] * s.max_samples / 4)       # a ray rarely crosses more of the box
    return max(1024, int(rays)) if s.memory else None


def render_views(nerf, chunk, look):
    """Render rays (N, H, W, 3) -> rgb (N, H, W, 3), mean opacity, orientation loss; in chunks if they are many.

    A chunk is rendered without a graph, and once more in the backward pass with the same random numbers: only one
    chunk's samples are ever held. `look` holds what NeRF.render takes; its tensors are cut, ray by ray.
    """
    shape = look["directions"].shape
    rays = shape.numel() // 3
    if not chunk or rays <= chunk:
        out = nerf.render(**look)
        return out["rgb"], out["opacity"].mean(), out.get("orientation", 0.0)
    cut = {name: v.expand(shape).reshape(-1, 3).split(chunk) for name, v in look.items() if torch.is_tensor(v)}

    def render_chunk(_, i):
        out = nerf.render(**look | {name: parts[i] for name, parts in cut.items()})
        seen = (out["opacity"] > 0).sum()
        return out["rgb"], out["opacity"].sum(), out.get("orientation", 0.0) * seen, seen

    hook = torch.ones((), requires_grad=True)           # asks for the backward pass: the weights are no arguments
    rgb, opacity, orientation, seen = zip(*(checkpoint(render_chunk, hook, i, use_reentrant=True)
                                            for i in range(math.ceil(rays / chunk))))
    return torch.cat(rgb).view(shape), sum(opacity) / rays, sum(orientation) / sum(seen).clamp(min=1)


def look_of_step(s, step, device, views=None):
    """What is rendered in this step, and how -> NeRF.render's arguments, c2w. `views` are fixed cameras, if any."""
    part, num_sets = phase(s, step), s.batch[phase(s, step)] // s.views
    if views is None:
        c2w, fov = data.random_view_cameras(num_sets, s.views, None, s.fov, s.distance, s.elevation)
        background = draw_background(s, num_sets)
    else:
        c2w, fov, background = views
    shading, ambient = draw_shading(s, step)
    look = dict(shading=shading, ambient=ambient, background=background)
    if s.shading:
        look |= dict(normals="analytic", light=draw_lights(c2w[:, :3, 3], s.views)[:, None, None])
    look = {name: v.to(device) if torch.is_tensor(v) else v for name, v in look.items()}
    c2w = c2w.to(device)
    look["origins"], look["directions"] = data.camera_rays(c2w, fov.to(device), s.size[part], s.size[part])
    return look, c2w


# ------------------------------------------------------------------------------------------------
# The loop


class Progress(NamedTuple):
    """Where a run stands. The tensors are read when asked for, so that a GPU need not wait for every step."""
    step: int                           # steps done
    loss: torch.Tensor
    opacity: torch.Tensor               # mean over the step's pictures
    nerf: NeRF
    optimizer: torch.optim.Optimizer


def memory_used():
    """Peak memory in GiB: the GPU's if there is one, else the process's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)


def save_state(path, now):
    """Everything that the rest of the run depends on, written whole or not at all."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    buffer = io.BytesIO()               # torch.save straight to a full disk is no OSError
    torch.save(dict(step=now.step, nerf=now.nerf.state_dict(), optimizer=now.optimizer.state_dict(),
                    rng=torch.get_rng_state(), cuda=cuda), buffer)
    with open(f"{path}.part", "wb") as file:
        file.write(buffer.getbuffer())
    os.replace(f"{path}.part", path)


def load_state(path, nerf, optimizer):
    """-> the number of steps done. Random numbers go on where they stopped."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    nerf.load_state_dict(state["nerf"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    return state["step"]


def stop_if_dead(now):
    """An object that is gone does not come back: say so, and which knob to turn."""
    loss, opacity = float(now.loss), float(now.opacity)
    if not math.isfinite(loss):
        raise ValueError(f"the loss is no longer a number at step {now.step}: lower lr_grid and lr_mlp")
    if opacity < 0.002:
        raise ValueError(f"the object has vanished at step {now.step}: lower guidance or lr_grid, or try another seed")
    if opacity > 0.998:
        raise ValueError(f"the object fills every picture at step {now.step}: lower guidance, or try another seed")


def new_nerf(s, device):
    """-> NeRF, its optimizer."""
    nerf = NeRF(NeRFConfig(levels=s.levels, log2_table=s.log2_table, base_resolution=s.base_resolution,
                           finest_resolution=s.finest_resolution, hidden=s.hidden, occupancy=s.occupancy,
                           max_samples=s.max_samples, background="learned" if s.background == "learned" else None))
    nerf = nerf.to(device).train()
    groups = nerf.parameter_groups(lr_grid=s.lr_grid, lr_mlp=s.lr_mlp)
    return nerf, torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-15, fused=True)


def dream_steps(model, prompt, settings=FULL, seed=0, state=None, views=None):
    """The whole optimisation, one Progress a step. All random numbers are torch's own, from `seed` on.

    state     a file that save_state wrote: goes on from there, exactly as if never interrupted (on a CPU, bit for bit)
    views     (pictures (V, 3, H, W) in [-1, 1], c2w, fov (V,)): no distillation, a plain fit to these pictures
    """
    s = settings
    check(s)
    device = next(model.parameters()).device
    model.requires_grad_(False).eval()
    torch.manual_seed(seed)
    nerf, optimizer = new_nerf(s, device)
    first = load_state(state, nerf, optimizer) if state else 0
    texts = {num: text_context(model, s, prompt, num) for num in set(s.batch)} if views is None else {}
    if views is not None:
        pictures, c2w, fov = views
        border = torch.cat((pictures[..., 0, :], pictures[..., -1, :]), -1).median(-1).values      # (V, 3)
        cameras = c2w, fov, (border[:, None, None] + 1) / 2

    for step in range(first, s.steps):
        nerf.update_occupancy(step)
        look, c2w = look_of_step(s, step, device, cameras if views is not None else None)
        rgb, opacity, orientation = render_views(nerf, chunk_of_rays(s, len(c2w)), look)
        if views is None:
            loss = distil(model, s, step, rgb, texts[len(rgb)], c2w)
        else:
            wanted = F.interpolate(pictures.to(device), rgb.shape[1:3], mode="area").movedim(1, -1)
            loss = F.mse_loss(rgb, (wanted + 1) / 2)
        if s.shading:
            loss = loss + ramp(s.orient, progress(s, step, s.switch)) * orientation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        now = Progress(step + 1, loss.detach(), opacity.detach(), nerf, optimizer)
        if now.step % 25 == 0 or now.step == s.steps:
            stop_if_dead(now)
        yield now


def dream(model, prompt, settings=FULL, seed=0):
    """prompt -> NeRF."""
    for now in dream_steps(model, prompt, settings, seed):
        pass
    return now.nerf.eval()
