"""Training: `python train.py` makes the embedded tiny model from nothing, on the toy world.

MVDream section 3.2, joint training. The paper starts from Stable Diffusion 2.1; a laptop cannot, so
the default run first makes a small stand-in for it and then does to that what the paper does:

  1 autoencoder    pictures -> latents and back
  2 base           text -> picture in 2D: what Stable Diffusion is to the paper
  3 joint          each step, with probability 0.7 a batch of view sets (inflated attention, cameras),
                   else a batch of single pictures (attention and camera embedding off)

    L_MV(theta) = E_{x, y, c, t, eps} || eps - eps_theta(x_t; y, c, t) ||^2          (section 3.2)

Letters
  B    view sets in a batch          V    views in a set (1 in 2D steps)       N = B*V pictures
  x0   clean latents (N,4,h,w)       x_t  the same after t steps of noise      t (N,), eps (N,4,h,w)
  y    caption tokens (B,77)         c    camera-to-world matrices (N,4,4), or None in 2D steps
Run the same command again to go on where a run stopped: every random draw is a function of the seed
and the step, so a resumed run is the unbroken run.
"""
import argparse
import functools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
from mvdream import MVDream, camera_condition, train_tokenizer

TINY = {                                        # the classes of Stable Diffusion 2.1, smaller numbers
    "unet": dict(model_channels=64, channel_mult=(1, 2, 3), num_res_blocks=1, attention_levels=(1, 2),
                 num_head_channels=32, context_dim=128),
    "vae": dict(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=4, scale_factor=1.0),
    "text": dict(width=128, layers=4, heads=4, max_length=77),
    "image_size": 128, "prediction": "epsilon"}

# Steps of each stage as shares of --steps.
AUTOENCODER, BASE = 0.22, 0.16                  # the joint stage takes the rest
VIEWS = 4


# ---- data: a pool of toy-world pictures, rendered once ---------------------------------------------

class ToyPool:
    """The two training sets, rendered once and kept on the device; later, latents replace the pictures.

    "3d"   pictures (S,V,3,H,W) uint8, cameras (S,V,4,4), tokens (S,77)       view sets
    "2d"   pictures (M,1,3,H,W) uint8, no cameras,        tokens (M,77)       single pictures
    """

    def __init__(self, model, num_sets, num_singles, seed, device):
        g, size = torch.Generator().manual_seed(seed), model.image_size
        self.pictures, self.latents, self.cameras, self.tokens = {}, {}, {}, {}
        self.empty = model.tokenize([""]).to(device)                      # the caption of guidance
        with tqdm(total=num_sets * VIEWS + num_singles, desc="toy world", unit="picture") as bar:
            for mode, count, views in (("3d", num_sets, VIEWS), ("2d", num_singles, 1)):
                parts = []
                for n in [256] * (count // 256) + [count % 256] * (count % 256 > 0):
                    if mode == "3d":
                        images, c2w, captions = data.toy_views(n, VIEWS, size, g, device)
                    else:
                        (images, captions), c2w = data.toy_pictures(n, size, g, device), None
                    parts.append((to_bytes(images).unflatten(0, (n, views)), model.tokenize(captions),
                                  c2w if c2w is None else c2w.unflatten(0, (n, views))))
                    bar.update(n * views)
                pictures, tokens, cameras = zip(*parts)
                self.pictures[mode] = torch.cat(pictures)
                self.tokens[mode] = torch.cat(tokens).to(device)
                self.cameras[mode] = None if mode == "2d" else torch.cat(cameras).to(device)

    def images(self, n, generator):
        """n random pictures, 3D and 2D alike: (n,3,H,W) in [-1,1]."""
        parts = []
        for pictures, share in ((self.pictures["3d"], n // 2), (self.pictures["2d"], n - n // 2)):
            flat = pictures.flatten(0, 1)
            pick = torch.randint(len(flat), (share,), generator=generator, device=flat.device)
            parts.append(from_bytes(flat[pick]))
        return torch.cat(parts)

    @torch.no_grad()
    def encode(self, vae, encode):
        """Latents take the pictures' place. `encode` is vae.encode, or that compiled."""
        for mode, pictures in self.pictures.items():
            flat, scale = pictures.flatten(0, 1), vae.config.scale_factor
            latents = [(encode(from_bytes(chunk))[0] * scale).half()
                       for chunk in tqdm(flat.split(256), desc=f"{mode} latents")]
            self.latents[mode] = torch.cat(latents).unflatten(0, pictures.shape[:2])
        self.pictures.clear()                   # conserve memory

    def batch(self, mode, n, generator):
        """n pictures as whole view sets -> x0 (n,4,h,w), tokens (n/V,77), c2w (n,4,4) or None, V."""
        views = self.latents[mode].shape[1]
        pick = torch.randint(len(self.latents[mode]), (n // views,), generator=generator,
                             device=self.latents[mode].device)
        c2w = self.cameras[mode][pick].flatten(0, 1) if mode == "3d" else None
        return self.latents[mode][pick].flatten(0, 1).float(), self.tokens[mode][pick], c2w, views


def to_bytes(images):
    return ((images + 1) * 127.5).round().to(torch.uint8)


def from_bytes(images):
    return images.float() / 127.5 - 1


# ---- losses ----------------------------------------------------------------------------------------

def autoencoder_loss(vae, x, noise):
    """L1 + 2 L2 + L1 of the picture's gradients + 1e-4 KL(q(z|x) || N(0,1)), per picture element."""
    mean, logvar = vae.encode(x)
    y = vae.decode(mean + noise * torch.exp(0.5 * logvar))
    error = y.float() - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
    return error.abs().mean() + 2 * error.square().mean() + edges + 1e-4 * kl


@torch.no_grad()
def standardise(vae, images):
    """Give every latent channel mean 0 and variance 1, by folding z' = (z - m) / s into the two 1x1
    convolutions between encoder, latent and decoder. Sampling starts from pure noise, as if nothing
    of x0 were left at t = 999; yet sqrt(abar) is 0.07 there, and a mean would be missed."""
    z = torch.cat([vae.encode(x)[0] for x in images])
    m, s = z.mean((0, 2, 3)), z.std((0, 2, 3))
    q, p, C = vae.quant_conv, vae.post_quant_conv, len(m)
    q.weight[:C] /= s[:, None, None, None]
    q.bias[:C] = (q.bias[:C] - m) / s
    q.bias[C:] -= 2 * s.log()                                             # the log-variance
    p.bias += p.weight[:, :, 0, 0] @ m
    p.weight *= s[:, None, None]
    vae.config.scale_factor = 1.0


def diffusion_loss(model, x0, tokens, t, eps, c2w, num_views):
    """L_MV, section 3.2. t (B,): one timestep for all views of a set; eps: independent per view."""
    t = t.repeat_interleave(num_views)                                    # (B,) -> (N,)
    x_t = model.schedule.add_noise(x0, t, eps)
    context = model.text_encoder(tokens).repeat_interleave(num_views, 0)  # (B,77,C) -> (N,77,C)
    camera = None if c2w is None else camera_condition(c2w)
    target = model.schedule.target(x0, t, eps)                            # eps itself, or v
    return F.mse_loss(model.unet(x_t, t, context, camera, num_views).float(), target)


def draw(model, pool, mode, args, generator):
    """One batch with its noise: all that diffusion_loss needs, drawn on the device."""
    x0, tokens, c2w, views = pool.batch(mode, args.batch, generator)
    device, B = x0.device, len(tokens)
    t = torch.randint(1000, (B,), generator=generator, device=device)
    eps = torch.randn(x0.shape, generator=generator, device=device)
    drop = torch.rand(B, 1, generator=generator, device=device) < 0.1     # for guidance: no caption
    return x0, torch.where(drop, pool.empty, tokens), t, eps, c2w, views


# ---- the loop --------------------------------------------------------------------------------------

def learning_rate(step, steps, peak):
    """Linear warm-up over 2 % of the steps, then half a cosine down to 2 % of the peak."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def stage_of(step, args):
    """Which stage a step belongs to, and whether its batch is 3D: a function of step and seed only."""
    if step < args.autoencoder_steps:
        return "autoencoder", None
    if step < args.autoencoder_steps + args.base_steps:
        return "base", "2d"
    coin = torch.rand((), generator=torch.Generator().manual_seed(args.seed * 7919 + step)).item()
    return "joint", "3d" if coin < args.mix else "2d"


def train(model, pool, args):
    """All three stages. Yields nothing, returns nothing: the result is in args.out."""
    device = next(model.parameters()).device
    gpu = device.type == "cuda"
    groups = {"autoencoder": list(model.vae.parameters()),
              "diffusion": [*model.unet.parameters(), *model.text_encoder.parameters()]}
    if gpu:
        torch.set_float32_matmul_precision("high")                        # TF32 where bf16 is not used
        model.vae.to(memory_format=torch.channels_last)
        model.unet.to(memory_format=torch.channels_last)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=gpu)

    compiled = functools.partial(torch.compile, dynamic=False) if gpu else lambda function: function
    vae_loss, noise_loss = compiled(autoencoder_loss), compiled(diffusion_loss)

    phase, optimizer, ema, losses, began = None, None, None, [], time.time()
    saved = began
    start, state = load_checkpoint(model, args, device)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="training", unit="step")
    stop = []                                   # Ctrl-C lets the step end, so that all weights agree
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    for step in bar:
        stage, mode = stage_of(step, args)

        # A phase begins: its own weights, optimizer and moving average.
        if phase != (phase := "autoencoder" if stage == "autoencoder" else "diffusion"):
            if phase == "diffusion" and ema is not None:
                swap(groups["autoencoder"], ema)                      # the average is what we keep
                g = torch.Generator(device).manual_seed(args.seed)
                standardise(model.vae, [pool.images(128, g) for _ in range(8)])
            if phase == "diffusion":
                pool.encode(model.vae, compiled(model.vae.encode))
            parameters = groups[phase]
            optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01,
                                          fused=gpu)
            ema = [p.detach().clone() for p in parameters]
            if state:
                optimizer.load_state_dict(state["optimizer"])
                ema, state = [e.to(device) for e in state["ema"]], None

        # One step. The generator is seeded by the step, so resuming repeats nothing.
        g = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
        with autocast():
            if phase == "autoencoder":
                x = pool.images(max(4, args.batch // 8), g).contiguous(
                    memory_format=torch.channels_last)
                h = model.latent_size
                loss = vae_loss(model.vae, x, torch.randn(len(x), 4, h, h, generator=g, device=device))
            else:
                loss = noise_loss(model, *draw(model, pool, mode, args, g))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        first, count = ((0, args.autoencoder_steps) if phase == "autoencoder" else
                        (args.autoencoder_steps, args.steps - args.autoencoder_steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - first, count, args.lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():                                         # moving average, warmed up
            torch._foreach_lerp_(ema, parameters, 1 - min(0.999, (1 + step - first) / (10 + step - first)))

        # Report. Reading the losses waits for the device, so it is done every 50 steps.
        losses.append((mode or "vae", loss.detach()))
        if step % args.report == args.report - 1 or step == args.steps - 1:
            means = {k: torch.stack([v for m, v in losses if m == k]).mean().item()
                     for k in sorted({m for m, _ in losses})}
            losses.clear()
            bar.set_postfix(stage=stage, **{k: f"{v:.4f}" for k, v in means.items()})
            log(args.out, step=step + 1, seconds=round(time.time() - began, 1), stage=stage, **means)
            if not all(map(math.isfinite, means.values())):
                raise FloatingPointError(f"the loss became {means} at step {step}: lower --lr")
        if (stop or time.time() - saved > args.save_every) and step + 1 < args.steps:
            save_checkpoint(model, optimizer, ema, step + 1, args)
            saved = time.time()
            if stop:
                bar.close()
                sys.exit(f"Stopped after step {step + 1}; the same command goes on from there.")
        if phase == "diffusion" and (step + 1) % args.sample_every == 0:
            swap(parameters, ema)
            sample_sheet(model, args.out / f"samples_{step + 1:06d}.png")
            swap(parameters, ema)
    swap(parameters, ema)


@torch.no_grad()
def swap(parameters, ema):
    """Exchange the weights with their moving average, in place; twice is nothing."""
    for p, e in zip(parameters, ema):
        p_old = p.clone()
        p.copy_(e)
        e.copy_(p_old)


# ---- files -----------------------------------------------------------------------------------------

def log(out, **values):
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def save_checkpoint(model, optimizer, ema, step, args):
    """Everything a run needs to go on. Written beside its place, then renamed: never half a file."""
    path = args.out / "checkpoint.pt"
    torch.save({"step": step, "settings": args.settings, "model": model.state_dict(),
                "ema": ema, "optimizer": optimizer.state_dict()}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(model, args, device):
    path = args.out / "checkpoint.pt"
    if not path.exists():
        return 0, None
    state = torch.load(path, map_location="cpu", weights_only=True)
    changed = [k for k, v in args.settings.items() if state["settings"].get(k) != v]
    if changed:
        raise ValueError(f"{path} was made with another --{changed[0]}: "
                         f"repeat the old value ({state['settings'].get(changed[0])}) or take another --out")
    model.load_state_dict(state["model"])
    return state["step"], state


@torch.no_grad()
def sample_sheet(model, path, prompts=("a red robot wearing a blue hat", "a green car with white wheels",
                                       "a purple bear", "a house", "a yellow duck wearing a pink scarf",
                                       "a blue rocket")):
    """Four views of a few prompts, one row each."""
    views = model.sample([p + ", 3d asset" for p in prompts], data.orbit_cameras(VIEWS, 15.0),
                         steps=20, guidance_scale=3.0)
    sheet = views.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)        # (B,V,3,H,W) -> (B*H,V*W,3)
    Image.fromarray(((sheet.clamp(-1, 1) + 1) * 127.5).byte().cpu().numpy()).save(path)


# ---- command line ----------------------------------------------------------------------------------

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, help="fine-tune this model: the joint stage alone")
    add("--steps", type=int, default=12_000, help="of all stages together (default %(default)s)")
    add("--batch", type=int, help="pictures a step (default 512 on a GPU, 16 without)")
    add("--lr", type=float, default=6e-4, help="peak learning rate (default %(default)s)")
    add("--mix", type=float, default=0.7, help="share of multi-view steps (paper: 0.7)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("outputs/train"), help="folder (default %(default)s)")
    add("--device", help="cuda, cpu, mps (default: what is there)")
    add("--attention", default="inflated", choices=("inflated", "none", "temporal", "new3d"),
        help="how views see each other (default: the paper's choice)")
    add("--camera", default="time", choices=("time", "text", "none"),
        help="where the camera enters (default: the paper's choice)")
    add("--sets", type=int, help="view sets to render (default: what the steps can use, 40000 at most)")
    add("--save-every", type=float, default=60, help="seconds between checkpoints")
    add("--sample-every", type=int, default=2000, help="steps between pictures of samples")
    args = parser.parse_args(argv)
    if args.steps < 10:
        raise ValueError(f"--steps {args.steps}: the three stages need at least 10 steps")
    if args.lr <= 0:
        raise ValueError(f"--lr {args.lr}: a learning rate is above 0")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device} is not here: leave it out, or take cpu") from None
    gpu = args.device.startswith("cuda")
    args.batch = args.batch or (512 if gpu else 16)
    if args.batch % VIEWS:
        raise ValueError(f"--batch {args.batch} cannot be divided into sets of {VIEWS} views")
    if not 0 <= args.mix <= 1:
        raise ValueError(f"--mix {args.mix} is a probability: between 0 and 1")
    fresh = not args.model                      # a given model has its autoencoder and its 2D base
    args.autoencoder_steps = int(AUTOENCODER * args.steps * fresh)
    args.base_steps = int(BASE * args.steps * fresh)
    seen = (args.steps - args.autoencoder_steps) * args.batch // VIEWS
    args.sets = args.sets or max(16, min(seen, 40_000 if gpu else 2_000))
    args.report = 50 if gpu else 5
    args.settings = {k: getattr(args, k) for k in
                     ("steps", "batch", "lr", "mix", "seed", "attention", "camera", "sets")}
    return args


def main(argv=None):
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if args.model:
        model = MVDream.from_pretrained(args.model)
    else:
        captions = [data.format_caption(spec) + ", 3d asset" for spec in data.all_specs()[0].tolist()]
        tokenizer = train_tokenizer(captions, args.out / "tokenizer")
        unet = {**TINY["unet"], "attention": args.attention, "camera": args.camera}
        text = {**TINY["text"], "vocab_size": len(tokenizer.vocab)}
        model = MVDream.from_config({**TINY, "unet": unet, "text": text}, tokenizer)
    model.to(args.device)
    began = time.time()
    if args.device.startswith("cuda"):
        data.trace = torch.compile(data.trace, dynamic=False)             # ten times faster rendering
    pool = ToyPool(model, args.sets, 2 * args.sets, args.seed, args.device)
    train(model, pool, args)
    sample_sheet(model, args.out / "samples.png")
    model.half().save_pretrained(args.out)
    print(f"Trained in {time.time() - began:.0f} s. The model is in {args.out}/: "
          f'python generate.py "a red robot" --model {args.out}')


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
