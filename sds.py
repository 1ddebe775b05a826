"""Score distillation: a prompt becomes a NeRF, guided by the multi-view diffusion model.

The paper's text-to-3D generation (section 3.2). Four orthogonal views of the object are rendered,
encoded and noised; the model, knowing text and cameras, says how four clean views would look; the
NeRF is pulled that way. Here: the losses as pure functions of tensors, what changes as a run goes
on, the presets, one step, the loop. The model is passed in. Where the released code differs from
the paper, or this file from both, it is said on the spot.

    x, x_t   latents (N, 4, h, w) of the N rendered views, without and with noise
    V, B     views in a set (one object from V sides at once), sets in a step; N = B V
    t        diffusion time, 0 to 999, one for all views of a step; abar_t = alphas_cumprod[t]
    alpha, sigma     sqrt(abar), sqrt(1 - abar):   x_t = alpha x + sigma noise
    noise, noise_hat what was added, what the guided model predicts (the paper's eps, eps_hat)
    x0_hat   the target: (x_t - sigma noise_hat) / alpha, where asked thresholded, then rescaled
    sg, w(t) no gradient passes (detach); a time's weight in the gradient that the papers give
    phi      `rescale`: how far x0_hat goes back to the contrast of the unguided prediction
"""
import io
import math
import os
import pickle
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
from nerf import NeRF, NeRFConfig, within

# ---- What the model wants: guidance, and two clamps against the over-saturation it brings --------

def guide(noise_text, noise_uncond, scale):
    """Classifier-free guidance."""
    return noise_uncond + scale * (noise_text - noise_uncond)


def x0_target(schedule, x_t, t, noise_text, noise_uncond, scale, rescale, num_views, threshold=0.0):
    """The x0_hat to distil toward: guided; then, where not 0, thresholded; then CFG-rescaled."""
    x0 = schedule.predict_x0(x_t, t, guide(noise_text, noise_uncond, scale))
    x0_text = schedule.predict_x0(x_t, t, noise_text)
    if threshold:
        x0 = dynamic_threshold(x0, x0_text, threshold, num_views)
    return rescale_contrast(x0, x0_text, rescale, num_views) if rescale else x0


def rescale_contrast(x0, x0_text, phi, num_views):
    """CFG rescale: x0 <- phi r x0 + (1 - phi) x0 with r = std(x0_text) / std(x0).

    One r for a whole set, or the views would drift apart in brightness: the deviation runs over
    [V, C, h, w]. As released it is that of x0, where Lin et al. rescale the network's output.
    """
    guided, text = by_set(x0, num_views), by_set(x0_text, num_views)
    r = (text.std(1, keepdim=True) + 1e-8) / (guided.std(1, keepdim=True) + 1e-8)       # (B, 1)
    return (phi * r * guided + (1 - phi) * guided).view_as(x0)


def dynamic_threshold(x0, x0_text, q, num_views):
    """Imagen's: with s the q-quantile of |x0| in a set, clip(x0, -s, s) limit / s where s > limit.

    For pixels the limit is 1. Latents have none: it is the same quantile of the unguided x0_text.
    """
    guided = by_set(x0, num_views)
    limit = by_set(x0_text, num_views).abs().quantile(q, dim=1, keepdim=True)             # (B, 1)
    s = guided.abs().quantile(q, dim=1, keepdim=True).maximum(limit)
    return (guided.clamp(-s, s) * limit / s).view_as(x0)


def by_set(x, num_views):
    """(N, C, h, w) -> (B, V C h w): a row holds all numbers of a set."""
    return x.reshape(len(x) // num_views, -1)


# ---- The losses: weight |x - sg(x0_hat)|^2 / 2, summed over a view's latents, averaged over the N
#      views. Its gradient is weight (x - x0_hat) / N; the papers' is w(t) (noise_hat - noise). As
#      x - x0_hat = (sigma / alpha) (noise_hat - noise), the weight is w(t) alpha / sigma. After a
#      threshold or rescale, noise_hat is what x0_hat then stands for.


def x0_loss(x, x0_hat, weight=1.0):
    """x0-reconstruction: |x - sg(x0_hat)|^2 / 2, which is SDS with w(t) = sigma / alpha.

    The paper has no 1/2 and speaks of pictures; the released code, as here, compares latents.
    """
    return 0.5 * (weight * (x - x0_hat.detach()).square()).sum() / len(x)


def sds_loss(schedule, x, t, x0_hat):
    """DreamFusion's, w(t) = 1 - abar_t = sigma^2."""
    alpha, sigma = schedule.alpha_sigma(t)
    return x0_loss(x, x0_hat, alpha * sigma)


def sjc_loss(schedule, x, t, x0_hat):
    """Score Jacobian chaining, w(t) = 1: the score (x0_hat - x) / s^2 at noise s = sigma / alpha,
    weighted by s; with x in place of x + s noise (less variance)."""
    alpha, sigma = schedule.alpha_sigma(t)
    return x0_loss(x, x0_hat, alpha / sigma)


LOSSES = {"x0": lambda schedule, x, t, x0_hat: x0_loss(x, x0_hat), "sds": sds_loss, "sjc": sjc_loss}


# ---- The settings of a run -----------------------------------------------------------------------

NEGATIVE = ("ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, "
            "and unclear, cropped, lowres, low quality, artifacts, duplicate, morbid, mutilated, "
            "poorly drawn face, deformed, dehydrated, bad proportions")


@dataclass(frozen=True)
class Settings:
    """Pairs: before and after the switch, or start and end of a ramp, or a range to draw from."""
    steps: int = 10000
    views: int = 4                      # V
    batch: tuple = (8, 4)               # N, a multiple of V: before, after the switch
    size: tuple = (64, 256)             # pixels of a rendered picture's side: before, after
    switch: float = 0.5                 # when batch, size and shading change: a part of the steps
    loss: str = "x0"                    # a key of LOSSES
    guidance: float = 50.0              # 1 = none, and half the work
    rescale: float = 0.5                # phi; the paper's 0.7; 0.3 against floaters; 0 = off
    threshold: float = 0.0              # quantile of dynamic thresholding, as 0.995; 0 = off
    t_min: tuple = (980, 20)            # t is drawn from t_min to t_max, both included:
    t_max: tuple = (980, 500)           # start and end of their annealing
    anneal: float = 0.8                 # when that ends: a part of the steps
    negative: str = NEGATIVE
    suffix: str = ""                    # after the prompt; released: ", 3d asset" for views alone
    multiview: bool = True              # False: views one by one, no cameras: the Janus problem
    fov: tuple = (15.0, 60.0)           # range, degrees
    distance: tuple = (0.8, 1.0)        # range, in units of 1 / tan(fov / 2)
    elevation: tuple = (0.0, 30.0)      # range, degrees
    shading: bool = False               # normals, orientation loss; from the switch on, a light
    orient: tuple = (10.0, 1000.0)      # weight of that loss: rising from the first, to the switch
    lr_grid: float = 0.01
    lr_mlp: float = 0.001
    nerf: NeRFConfig = field(default_factory=NeRFConfig)
    memory: float = 0.0                 # GiB of GPU memory to stay within, 0 = no bound


FULL = Settings()
TINY = replace(FULL, batch=(4, 4), guidance=3.0, negative="", suffix=data.SUFFIX,
               fov=(data.TOY_FOV,) * 2, distance=(1.0, 1.0))      # the toy world has one lens
PRESETS = {
    "full": FULL,                                       # the released configuration, no shading
    "full-shaded": replace(FULL, shading=True),         # ... and with
    "tiny-gpu": replace(        # up to 64 pixels: at 128, a latent's 4x4 pixels dent the surface
        TINY, steps=600, size=(48, 64), lr_grid=0.03, lr_mlp=0.003,
        nerf=NeRFConfig(levels=8, log2_table=17, base_resolution=8, finest_resolution=128,
                        max_samples=256, background=None)),
    "tiny-cpu": replace(                                # 28 dB, IoU .97 after 150 steps
        TINY, steps=300, size=(32, 48), lr_grid=0.1, lr_mlp=0.01,
        nerf=NeRFConfig(levels=6, log2_table=15, base_resolution=8, finest_resolution=96,
                        hidden=32, max_samples=96, background=None)),
}


def check(s):
    """One clear sentence for the first setting that cannot be."""
    within(s, ("steps views", 1, math.inf), ("guidance anneal memory lr_grid lr_mlp", 0, math.inf),
           ("switch rescale threshold", 0, 1), ("t_min t_max", 0, 999), ("size", 1, 2048),
           ("fov", 1, 179), ("distance", 0.01, 100), ("elevation", -90, 90))
    for fine, sentence in (
            (all(n > 0 and n % s.views == 0 for n in s.batch),
             f"batch must be a multiple of the {s.views} views of a set, not {s.batch}"),
            (all(low <= high for low, high in zip(s.t_min, s.t_max)),
             f"t_min must not exceed t_max; at the start and the end: {s.t_min}, {s.t_max}"),
            (all(low <= high for low, high in (s.fov, s.distance, s.elevation)),
             f"fov, distance, elevation must rise, unlike {s.fov}, {s.distance}, {s.elevation}"),
            (s.loss in LOSSES, f"loss must be one of {', '.join(LOSSES)}, not {s.loss}")):
        if not fine:
            raise ValueError(sentence)


# ---- What changes as a run goes on, and what is drawn anew in each step --------------------------

def ramp(pair, s, step, end):
    """From pair[0] to pair[1] linearly, arriving at the part `end` of the run."""
    part = min(1.0, step / max(1.0, end * s.steps))
    return pair[0] + part * (pair[1] - pair[0])


def timestep_range(s, step):
    return tuple(round(ramp(pair, s, step, s.anneal)) for pair in (s.t_min, s.t_max))


def phase(s, step):
    """0 before the switch, 1 from it on."""
    return int(step >= s.switch * s.steps)


def draw_shading(s, step):
    """-> shading, ambient k ~ U(0, 1), for all views; 1/4 albedo, 3/8 each of the others."""
    if not (s.shading and phase(s, step)):
        return "albedo", 0.0
    u, k = torch.rand(2).tolist()
    return ("albedo" if u < 0.25 else "textureless" if u < 0.625 else "diffuse"), k


def draw_background(s, num_sets):
    """Half of the time the learned one (None), else one colour for all views, as released; where
    the NeRF learns no background, a grey for each set, as multi-view training has it."""
    if s.nerf.background is None:
        return torch.rand(num_sets).repeat_interleave(s.views).view(-1, 1, 1, 1)
    learned, color = torch.rand(()) < 0.5, torch.rand(1, 1, 1, 3)
    return None if learned else color


def draw_lights(positions, num_views):
    """By the cameras (N, 3): l = U(0.8, 1.5) normalize(p + N(0, I)), both draws shared by a set."""
    num_sets = len(positions) // num_views
    shift = torch.randn(num_sets, 3).repeat_interleave(num_views, 0)
    reach = (0.8 + 0.7 * torch.rand(num_sets, 1)).repeat_interleave(num_views, 0)
    return reach * F.normalize(positions + shift, dim=-1)


# ---- One step ------------------------------------------------------------------------------------

def draw_scene(s, step, device, fixed=None):
    """What a step renders and how: arguments of NeRF.render, and the cameras c2w (N, 4, 4).

    The released code applies new sizes and ranges one step late; here they hold at once.
    """
    num_pictures, size = s.batch[phase(s, step)], s.size[phase(s, step)]
    num_sets = num_pictures // s.views
    c2w, fov = data.random_view_cameras(num_sets, s.views, None, s.fov, s.distance, s.elevation)
    (shading, ambient), background = draw_shading(s, step), draw_background(s, num_sets)
    if fixed:
        shading, (c2w, fov, background) = "albedo", fixed
    light = draw_lights(c2w[:, :3, 3], s.views)[:, None, None] if s.shading else None
    c2w, fov, background, light = (
        v if v is None else v.to(device, non_blocking=True) for v in (c2w, fov, background, light))
    origins, directions = data.camera_rays(c2w, fov, size, size)                  # (N, H, W, 3)
    return dict(origins=origins, directions=directions, background=background, shading=shading,
                light=light, ambient=ambient, normals=s.shading,
                chunk=chunk_of_rays(s, num_pictures)), c2w


def chunk_of_rays(s, num_pictures):
    """How many rays at once leave room for the full-size model, None for all. As measured: networks
    of 4 GiB, 0.4 GiB a picture in the encoder, 320 bytes a sample, with normals 1300; and of
    max_samples, a ray seldom has more than a quarter."""
    room = s.memory - 4.0 - 0.4 * num_pictures                                  # GiB
    bytes_per_ray = (1300 if s.shading else 320) * s.nerf.max_samples / 4
    return max(1024, int(room * 2 ** 30 / bytes_per_ray)) if s.memory else None


def text_context(model, s, prompt, N):
    """The text half of cross-attention, once a run: N rows for the text, N for the negative."""
    context = model.encode_text([prompt + s.suffix, s.negative]).repeat_interleave(N, 0)
    return model.unet.project_context(context[:N] if s.guidance == 1 else context)


def distil(model, s, step, pictures, context, c2w):
    """The loss of pictures (N, H, W, 3) in [0, 1]; only the encoder passes gradient to them."""
    images = pictures.movedim(-1, 1).contiguous() * 2 - 1                         # (N, 3, H, W)
    if images.shape[-1] != model.image_size:
        images = F.interpolate(images, (model.image_size,) * 2, mode="bilinear")
    x = model.encode_images(images, sample=True)        # a draw of its Gaussian, as released
    low, high = timestep_range(s, step)
    # One t for all views of all sets of the step, as released; in training each set has its own.
    t = torch.randint(low, high + 1, (1,)).to(x.device, non_blocking=True)

    with torch.no_grad():
        noise = torch.randn_like(x)
        x_t = model.schedule.add_noise(x, t, noise)
        halves = 1 if s.guidance == 1 else 2            # first the text's, then the negative's
        num_views, c2w = (s.views, c2w.repeat(halves, 1, 1)) if s.multiview else (1, None)
        both = model.predict_noise(x_t.repeat(halves, 1, 1, 1), t, context, c2w, num_views)
        noise_text, noise_uncond = both[:len(x)], both[-len(x):]
        x0_hat = x0_target(model.schedule, x_t, t, noise_text, noise_uncond, s.guidance, s.rescale,
                           num_views, s.threshold)
    return LOSSES[s.loss](model.schedule, x, t, x0_hat)


# ---- The loop ------------------------------------------------------------------------------------

class Progress(NamedTuple):
    """Where a run stands. Tensors stay on the device: reading one waits for it."""
    step: int                           # steps done
    loss: torch.Tensor
    opacity: torch.Tensor               # mean over the pictures
    nerf: NeRF
    optimizer: torch.optim.Optimizer

    def save(self, path):
        """All that the rest of the run depends on."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        buffer = io.BytesIO()           # a full disk is an OSError in write, but not in torch.save
        torch.save(dict(step=self.step, nerf=self.nerf.state_dict(), rng=torch.get_rng_state(),
                        optimizer=self.optimizer.state_dict(), cuda=cuda), buffer)
        with open(path, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())

    def check_alive(self):
        """A dead object does not come back; on a GPU, this waits for the step."""
        opacity = self.opacity.item()
        what = ("the loss is not a number" if not math.isfinite(self.loss) else
                "the object has vanished" if opacity < 0.002 else
                "the object fills all pictures" if opacity > 0.998 else None)
        if what:
            raise ValueError(f"{what} at step {self.step}, for good; lower guidance or lr_grid, "
                             "or try another seed")


def peak_memory():
    """In GiB: the GPU's, or else the process's; not known on Windows."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if sys.platform == "win32":
        return math.nan
    import resource
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def load_state(path, nerf, optimizer):
    """Back to where Progress.save was -> steps done."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        nerf.load_state_dict(state["nerf"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda"] is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(state["cuda"])
        return state["step"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, LookupError, TypeError):
        raise ValueError(f"{path} cannot be read: delete it to begin the object again") from None


def dream_steps(model, prompt, settings=FULL, seed=0, state=None, views=None):
    """The whole optimisation; yields a Progress after each step.

    seed     of PyTorch's own generators, which all draws come from
    state    a file of Progress.save to go on from; on a CPU bit for bit as if never stopped
    views    (pictures (V, 3, H, W) in [-1, 1], their cameras on the unit sphere): no distillation,
             but a plain fit to these, through the toy world's lens
    """
    s, device = settings, next(model.parameters()).device
    check(s)
    model.requires_grad_(False).eval()
    torch.manual_seed(seed)
    nerf = NeRF(s.nerf).to(device).train()
    if s.memory:                        # a chunk's samples are forgotten, and made again backward
        nerf.render_rays = partial(checkpoint, nerf.render_rays, use_reentrant=False)
    optimizer = torch.optim.AdamW(nerf.parameter_groups(s.lr_grid, s.lr_mlp), betas=(0.9, 0.99),
                                  eps=1e-15, fused=True)
    first = load_state(state, nerf, optimizer) if state else 0
    contexts = {n: text_context(model, s, prompt, n) for n in set(s.batch)}
    fixed = fixed_cameras(*views) if views else None

    for step in range(first, s.steps):
        nerf.update_occupancy(step)
        scene, c2w = draw_scene(s, step, device, fixed)
        out = nerf.render(**scene)
        loss = (photometric(out["rgb"], views[0]) if views else
                distil(model, s, step, out["rgb"], contexts[len(c2w)], c2w))
        if s.shading:
            loss = loss + ramp(s.orient, s, step, s.switch) * out["orientation"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        now = Progress(step + 1, loss.detach(), out["opacity"].detach().mean(), nerf, optimizer)
        if now.step % 25 == 0 or now.step == s.steps:
            now.check_alive()
        yield now


def fixed_cameras(pictures, c2w):
    """-> cameras and fov of given pictures; for a background, the colour of their upper edges."""
    c2w = c2w.clone()
    c2w[:, :3, 3] *= data.TOY_DISTANCE
    background = pictures[:, :, 0].median(-1).values[:, None, None] / 2 + 0.5     # (V, 1, 1, 3)
    return c2w, torch.full((len(c2w),), data.TOY_FOV), background


def photometric(rgb, pictures):
    """Mean squared error against pictures (V, 3, H, W), brought to the rendered size."""
    pictures = F.interpolate(pictures.to(rgb), rgb.shape[1:3], mode="area")
    return F.mse_loss(rgb, pictures.movedim(1, -1) / 2 + 0.5)


def dream(model, prompt, settings=FULL, seed=0):
    """prompt -> NeRF"""
    for now in dream_steps(model, prompt, settings, seed):
        pass
    return now.nerf.eval()
