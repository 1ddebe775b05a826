"""Training: `python train.py` makes the embedded tiny model from nothing, on the toy world.

MVDream section 3.1.3, joint training. The paper starts from Stable Diffusion 2.1; a laptop cannot,
so the default run first makes a small stand-in for it and then does to that what the paper does:

  1 autoencoder    pictures -> latents and back
  2 base           text -> picture in 2D: what Stable Diffusion is to the paper
  3 joint          each step, with probability 0.7 a batch of view sets (inflated attention,
                   cameras), else a batch of single pictures (neither: the 2D network as it is)

    L_MV(theta) = E_{x, y, c, t, eps} || eps - eps_theta(x_t; y, c, t) ||^2        (section 3.1.3)

With a model and data of your own (sources.py explains their form) it is the third alone:

    python train.py --model SD21 --data renders/ --images laion/
    torchrun --nproc_per_node=8 train.py --model SD21 --data renders/ --images laion/
    python train.py --model MVDREAM --dreambooth photos/ --subject "a photo of sks dog"

Letters
  B    view sets in a batch          V    views in a set (1 in 2D steps)       N = B*V pictures
  x0   clean latents (N,4,h,w)       x_t  the same after t steps of noise      t (N,), eps (N,4,h,w)
  y    captions: tokens (B,77), or encoded (B,77,C) where the text encoder is frozen
  c    camera-to-world matrices (N,4,4), or None in 2D steps       theta  the weights that learn
Run the same command again to go on where a run stopped. Every draw is a function of seed and step:
a resumed run is the unbroken one, on one CPU bit for bit, on other numbers of GPUs up to rounding.
"""
import argparse
import collections
import contextlib
import functools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # waiting threads sleep, see generate.py

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from layouts import read_json, write
from mvdream import MVDream, camera_condition
from sources import VIEWS, Folders, Photos, ToyPool, clean, to_bytes
from tokenizer import train_tokenizer
from unet import ResBlock, TransformerBlock

TINY = {                                      # the classes of Stable Diffusion 2.1, smaller numbers
    "unet": dict(model_channels=64, channel_mult=(1, 2, 3), num_res_blocks=1,
                 attention_levels=(1, 2), num_head_channels=32, context_dim=128),
    "vae": dict(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=4, scale_factor=1.0),
    "text": dict(width=128, layers=4, heads=4, max_length=77),
    "image_size": 128, "prediction": "epsilon"}

RUNS = {            # what is trained on, and what that needs unless flags say otherwise
    "toy": dict(steps=11_000, batch=512, lr=6e-4, floor=0.02, drop=0.1, save_every=60,
                out=Path("outputs/train")),
    "folders": dict(steps=50_000, batch=4096, lr=1e-4, floor=1, drop=0.1, save_every=1800,   # paper
                    out=Path("outputs/finetuned")),
    "photos": dict(steps=600, batch=4, lr=2e-6, floor=1, drop=0, save_every=600,
                   out=Path("outputs/dreambooth"))}

AUTOENCODER, BASE = 0.22, 0.16      # stages as shares of --steps; the joint stage takes the rest
ONLY_3D = "camera_embed", "norm4", "attn3"          # layers of the UNet that 2D steps do not use


# ---- losses --------------------------------------------------------------------------------------

def autoencoder_loss(vae, x, noise):
    """L1 + 2 L2 + L1 of the picture's gradients + 1e-4 KL(q(z|x) || N(0,1)), each a mean."""
    mean, logvar = vae.encode(x)
    y = vae.decode(mean + noise * torch.exp(0.5 * logvar))
    error = y.float() - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
    return error.abs().mean() + 2 * error.square().mean() + edges + 1e-4 * kl


@torch.no_grad()
def standardise(model, images):
    """Bring the latents to variance 1, by folding 1/s into the 1x1 convolution before them and s
    into the one behind, and note their mean E[x0], where sampling has to start."""
    z = torch.cat([model.vae.encode(x)[0] for x in images])
    s, q, p = z.std(), model.vae.quant_conv, model.vae.post_quant_conv
    mean, logvar = slice(None, z.shape[1]), slice(z.shape[1], None)
    q.weight[mean] /= s
    q.bias[mean] /= s
    q.bias[logvar] -= 2 * s.log()
    p.weight *= s
    model.vae.config.scale_factor = 1.0
    model.latent_mean.copy_(z.mean((0, 2, 3)) / s)


def diffusion_loss(model, x0, y, t, eps, c2w, num_views):
    """L_MV, section 3.1.3. t (B,): one timestep for all views of a set; eps: a view's own."""
    t = t.repeat_interleave(num_views)                                    # (B,) -> (N,)
    x_t = model.schedule.add_noise(x0, t, eps)
    context = y if y.is_floating_point() else model.text_encoder(y)
    context = context.repeat_interleave(num_views, 0)                     # (B,77,C) -> (N,77,C)
    camera = None if c2w is None else camera_condition(c2w)
    target = model.schedule.target(x0, t, eps)                            # eps itself, or v
    return F.mse_loss(model.unet(x_t, t, context, camera, num_views).float(), target)


def preservation(theta, weight):
    """DreamBooth's lambda |theta - theta_0|_1 / N, against forgetting; theta_0 is theta now."""
    theta_0, N = [p.detach().clone() for p in theta], sum(p.numel() for p in theta)
    return lambda: weight / N * sum((p - p_0).abs().sum() for p, p_0 in zip(theta, theta_0))


class Loss(torch.nn.Module):
    """L_MV as a module that holds the model, for DDP."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.forward = model, functools.partial(loss, model)


def shares(mode, args):
    """This rank's parts of a step's sets, one for each time that it accumulates gradients."""
    if mode is None:                            # the autoencoder's pictures are few
        return [slice(None)]
    n = args.batch // (VIEWS if mode == "3d" else 1) // (args.ranks * args.accumulate)
    first = args.rank * args.accumulate
    return [slice(k * n, (k + 1) * n) for k in range(first, first + args.accumulate)]


def plan(args, mode, first):
    """What this rank draws in the steps of a mode from step `first` on: lists of (step, place)."""
    for step in range(first, args.steps):
        if stage_of(step, args)[1] == mode:
            for part in shares(mode, args):
                yield [(step, place) for place in range(part.start, part.stop)]


def draw(model, source, mode, step, part, args):
    """Part of a step's batch with its noise: all that a loss needs, drawn on the device.
    The whole batch's noise is drawn, so that it is the same however many ranks share it."""
    device, h = args.device, model.latent_size
    g = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
    if mode is None:                                                      # for the autoencoder
        x = source.images(max(4, args.batch // 8), g).contiguous(memory_format=torch.channels_last)
        return model.vae, x, torch.randn(len(x), 4, h, h, generator=g, device=device)
    x0, y, c2w = source.batch(mode, step, part, g)
    views = VIEWS if mode == "3d" else 1
    B = args.batch // views
    t = torch.randint(1000, (B,), generator=g, device=device)[part]
    eps = torch.randn(B, views, *x0.shape[1:], generator=g, device=device)[part].flatten(0, 1)
    drop = torch.rand(B, generator=g, device=device)[part] < args.drop    # for guidance: no caption
    y = torch.where(drop.view(-1, *[1] * (y.dim() - 1)), source.empty, y)
    return x0, y, t, eps, c2w, views


# ---- the loop ------------------------------------------------------------------------------------

def learning_rate(step, steps, peak, floor=0.02):
    """Linear warm-up over 2 % of the steps, then half a cosine down to `floor` times the peak."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return peak * (floor + (1 - floor) * cosine)


def stage_of(step, args):
    """A step's stage, and whether its batch is 3D: a function of step and seed only."""
    if step < args.autoencoder_steps:
        return "autoencoder", None
    if step < args.autoencoder_steps + args.base_steps:
        return "base", "2d"
    coin = torch.rand((), generator=torch.Generator().manual_seed(args.seed * 7919 + step)).item()
    return "joint", "3d" if coin < args.mix else "2d"


def train(model, source, args):
    """All stages; the result is in the model and in args.out."""
    device, gpu = args.device, args.gpu
    frozen = args.model and model.unet.config.attention == "new3d"    # its 2D attention stays as is
    theta = [p for network in (model.unet, model.text_encoder)[:1 + args.train_text]
             for name, p in network.named_parameters() if not (frozen and ".attn1." in name)]
    keep = preservation(theta, args.preserve) if args.dreambooth else lambda: 0
    only_3d = [p for name, p in model.unet.named_parameters() if any(k in name for k in ONLY_3D)]
    if gpu:
        torch.backends.cudnn.benchmark = True                           # shapes never change
        torch.set_float32_matmul_precision("high")                      # TF32 where no bf16
        model.to(memory_format=torch.channels_last)
    for block in model.unet.modules() if args.recompute else ():    # keep only what enters a block
        if isinstance(block, (ResBlock, TransformerBlock)):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    autocast = functools.partial(torch.autocast, device.split(":")[0], torch.bfloat16)
    compiled = (functools.partial(torch.compile, dynamic=False) if args.compile else
                lambda function: function)
    losses, began = collections.defaultdict(list), time.time()
    saved, (start, state) = began, load_checkpoint(model, args)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="training",
               unit="step", disable=args.rank > 0)
    stop = []                                 # the first Ctrl-C lets the step end, to save it whole
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(signal.signal(number, signal.SIG_DFL)))
    for step in bar:
        stage, mode = stage_of(step, args)

        # A phase begins: its own weights, optimizer and moving average.
        if step in (start, args.autoencoder_steps):
            if step > start:                                          # the autoencoder is done, its
                swap(parameters, ema)                                 # average is what we keep
                g = torch.Generator(device).manual_seed(args.seed)
                standardise(model, [source.images(args.batch, g) for _ in range(4)])
            if mode is None:
                first, end, parameters = 0, args.autoencoder_steps, [*model.vae.parameters()]
                objective = compiled(autoencoder_loss)
            else:
                first, end, parameters = args.autoencoder_steps, args.steps, theta
                objective = Loss(model, compiled(diffusion_loss))
            model.requires_grad_(False)
            parameters = [p.requires_grad_() for p in parameters]
            if args.ranks > 1 and mode:     # all go on from rank 0's weights, the autoencoder's too
                objective = DistributedDataParallel(objective, broadcast_buffers=False,
                                                    bucket_cap_mb=200, gradient_as_bucket_view=True)
            if mode:
                with autocast(enabled=gpu and source.half):
                    source.begin(compiled(model.vae.encode))
            optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), fused=gpu)  # decay 0.01
            ema = [p.detach().clone() for p in parameters]
            if state:
                optimizer.load_state_dict(state["optimizer"])
                ema, state = [e.to(device) for e in state["ema"]], None

        # One step. Its batch is a function of the seed and the step, so resuming repeats nothing.
        parts = shares(mode, args)                                    # gradients add up over them
        for part in parts:
            meet = args.ranks == 1 or part is parts[-1]               # ranks do so once a step
            with autocast(enabled=gpu), contextlib.nullcontext() if meet else objective.no_sync():
                loss = objective(*draw(model, source, mode, step, part, args)) + keep()
            # Ranks wait for a gradient of every weight: to these, a 2D step gives one of 0.
            zero = sum(0 * p.sum() for p in only_3d if mode == "2d")
            (loss / len(parts) + zero).backward()
            losses[mode or "vae"].append(loss.detach())
        for p in only_3d if mode == "2d" else ():
            p.grad = None                                             # or momentum would move them
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - first, end - first, args.lr, args.floor)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():                                         # moving average, warmed up
            decay = min(0.999, (1 + step - first) / (10 + step - first))
            torch._foreach_lerp_(ema, parameters, 1 - decay)

        # Report rank 0's losses. Reading them waits for the device: not every step does.
        if step % args.report == args.report - 1 or step == args.steps - 1:
            means = {k: torch.stack(v).mean().item() for k, v in sorted(losses.items())}
            losses.clear()
            if not all(map(math.isfinite, means.values())):
                raise FloatingPointError(f"the loss became {means} at step {step}: lower --lr, and "
                                         "take another --out")
            bar.set_postfix(stage=stage, **{k: f"{v:.4f}" for k, v in means.items()})
            line = dict(step=step + 1, seconds=round(time.time() - began, 1), stage=stage, **means)
            with open(args.out / "log.jsonl" if args.rank == 0 else os.devnull, "a") as file:
                file.write(json.dumps(line) + "\n")
        if args.rank > 0:                                             # the rest is one rank's work
            continue
        # Never where the autoencoder ends: its average is yet to become its weights.
        if ((stop or time.time() - saved > args.save_every) and math.isfinite(norm)
                and step + 1 not in (args.autoencoder_steps, args.steps)):
            save_checkpoint(model, optimizer, ema, step + 1, args)
            saved = time.time()
            if stop:
                bar.close()
                sys.exit(f"Stopped after step {step + 1}; the same command goes on from there.")
        if mode and (step + 1) % args.sample_every == 0:
            swap(parameters, ema)
            sample_sheet(model, args.out / f"samples_{step + 1:06d}.png", source.prompts)
            swap(parameters, ema)
    swap(parameters, ema)


def swap(parameters, ema):
    """Exchange the weights with their moving average; twice is nothing."""
    for p, e in zip(parameters, ema):
        p.data, e.data = e.data, p.data


# ---- files ---------------------------------------------------------------------------------------

def save_checkpoint(model, optimizer, ema, step, args):
    """All that a run needs to go on: written beside its place, then renamed; one before is kept."""
    new, path, old = (args.out / f"checkpoint{end}" for end in (".tmp", ".pt", "_before.pt"))
    try:
        with open(new, "wb") as file:
            torch.save({"step": step, "settings": args.settings, "model": model.state_dict(),
                        "ema": ema, "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:                          # torch's own writer has this
        new.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written after step {step} ({error}): make room on the "
                      "disk; the same command goes on from the checkpoint before") from error
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)


def refuse_other_settings(path, old, args):
    old = old if isinstance(old, dict) else {}                      # a file of something else
    for key, value in args.settings.items():
        if (was := old.get(key, "unknown")) != value:
            raise ValueError(f"{path} was made with another --{key.replace('_', '-')}: {was} (None "
                             "is without); repeat that, or take another --out")


def load_checkpoint(model, args):
    """The last one that can be read -> steps done, and all of it."""
    for path in (paths := sorted(args.out.glob("checkpoint*.pt"))):             # the last first
        with contextlib.suppress(Exception):                # torch.load has no class for its own
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            settings, *_ = (state[k] for k in ("settings", "step", "model", "ema", "optimizer"))
            break
        print(f"train.py: {path} cannot be read", file=sys.stderr)
    else:
        if paths:
            raise ValueError(f"{args.out}: no checkpoint can be read; delete them to begin again")
        return 0, None
    refuse_other_settings(path, settings, args)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"{path} holds a model of other sizes: take another --out, or that model "
                         f"({str(error).splitlines()[1].strip():.200})") from error
    return state["step"], state


@torch.no_grad()
def sample_sheet(model, path, prompts):
    """Four views of a few prompts, one row each."""
    views = model.sample(prompts, data.orbit_cameras(VIEWS, 15.0), steps=20, guidance_scale=3.0)
    sheet = views.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)   # (B,V,3,H,W) -> (B*H,V*W,3)
    Image.fromarray(to_bytes(sheet).cpu().numpy()).save(path)


# ---- command line --------------------------------------------------------------------------------

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, help="fine-tune this model, on the toy world or data of your own")
    add("--data", type=Path, help="folder of rendered view sets")
    add("--images", type=Path, help="folder of captioned pictures, for the 2D steps")
    add("--dreambooth", type=Path, help="folder of a few photos of the --subject")
    add("--subject", type=clean, help='what the photos show: "a photo of sks dog"')
    add("--preserve", type=float, default=1.0, help="DreamBooth's lambda (default %(default)s)")
    add("--train-text", action="store_true", help="the text encoder too (toy world: always)")
    add("--steps", type=int, help="of all stages (default 11000; folders 50000; photos 600)")
    add("--batch", type=int, help="pictures a step (default 512, CPU 16; folders 4096; photos 4)")
    add("--micro", type=int, help="pictures at a time on a device (default: its share; folders 32)")
    add("--recompute", action="store_true", help="less memory, a third more time")
    add("--workers", type=int, help="processes that read pictures (default: 8 at most; 0 on a CPU)")
    add("--lr", type=float, help="peak learning rate (default 6e-4; folders 1e-4; photos 2e-6)")
    add("--mix", type=float, default=0.7, help="share of multi-view steps (paper: 0.7)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="folder (default outputs/train, or finetuned, or dreambooth)")
    add("--device", help="cuda, cpu, mps (default: cuda, else cpu)")
    add("--attention", choices=("inflated", "none", "temporal", "new3d"),
        help="how views see each other (default: the model's; the paper's choice is inflated)")
    add("--camera", choices=("time", "text", "none"),
        help="where the camera enters (default: the model's; the paper's choice is time)")
    add("--sets", type=int, help="toy sets to render (default 40000, CPU 2000, or what is used)")
    add("--save-every", type=float, help="seconds from save to save (60; folders 1800; photos 600)")
    add("--sample-every", type=int, default=2000, help="steps between pictures of samples")
    args = parser.parse_args(argv)
    args.kind = "photos" if args.dreambooth else "folders" if args.data or args.images else "toy"
    args.rank, args.ranks, here, near = (int(os.environ.get(key, value)) for key, value in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))  # by torchrun
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.device = f"cuda:{here}" if args.device == "cuda" else args.device
    try:
        torch.empty(0, device=args.device).cpu()
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device} is not here: leave it out, or take cpu") from None
    args.gpu = args.device.startswith("cuda")
    args.compile = args.gpu and shutil.which("cc") is not None
    slow = {"batch": 16} if args.kind == "toy" and not args.gpu else {}
    for key, value in (RUNS[args.kind] | slow).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    fresh, share = not args.model, args.batch // args.ranks     # fresh: no autoencoder, no 2D base
    args.micro = args.micro or (min(32, share) if args.kind == "folders" else share)
    args.accumulate = share // max(1, args.micro)
    if args.kind != "toy" and not (args.data and args.images):      # one kind of step alone
        args.mix = float(bool(args.data))
    args.autoencoder_steps = int(AUTOENCODER * args.steps * fresh)
    args.base_steps = int(BASE * args.steps * fresh)
    args.train_text = args.train_text or args.kind == "toy"
    if args.workers is None:
        args.workers = min(8, os.cpu_count() // near) if args.gpu else 0
    seen = (args.steps - args.autoencoder_steps) * args.batch // VIEWS
    args.sets = args.sets or max(16, min(seen, 40_000 if args.gpu else 2_000))
    args.report = 50 if args.gpu else 5
    args.settings = {k: str(getattr(args, k)) for k in (
        "steps", "batch", "lr", "mix", "seed", "attention", "camera", "sets", "preserve",
        "train_text", "model", "data", "images", "dreambooth", "subject")}
    refuse(args)
    return args


def refuse(args):
    """What cannot be, in one sentence each."""
    unit = VIEWS if args.mix > 0 else 1
    for wrong, sentence in (
            (args.steps < 10, f"--steps {args.steps}: at least 10 are needed"),
            (min(args.sample_every, args.sets, args.workers + 1) < 1 or abs(args.seed) > 2 ** 40,
             "--sample-every and --sets are at least 1, --workers 0, --seed within 2^40 of 0"),
            (not (0 < args.lr < math.inf and 0 <= args.preserve < math.inf),
             f"--lr {args.lr}, --preserve {args.preserve}: above 0, and not below 0"),
            (not 0 <= args.mix <= 1, f"--mix {args.mix} is a probability: between 0 and 1"),
            (args.micro < 1 or args.micro % unit or args.ranks * args.accumulate * args.micro
             != args.batch, f"--batch {args.batch} on {args.ranks} devices cannot be divided into "
             f"--micro {args.micro} pictures at a time, in sets of {unit}"),
            (args.kind != "toy" and not args.model, "--data, --images, --dreambooth go on from a "
             "model: say which with --model (weights/tiny, or Stable Diffusion 2.1's)"),
            (args.dreambooth and (args.data or args.images), "--dreambooth takes photos alone"),
            (bool(args.dreambooth) != bool(args.subject), "--dreambooth photos/ and --subject "
             '"a photo of sks dog" belong together: give both')):
        if wrong:
            raise ValueError(sentence)


def new_model():
    """The tiny model, its vocabulary all words of the toy world's captions."""
    captions = [data.format_caption(spec) + data.SUFFIX for spec in data.all_specs()[0].tolist()]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(captions, Path(folder))
    text = {**TINY["text"], "vocab_size": len(tokenizer.vocab)}
    return MVDream.from_config({**TINY, "text": text}, tokenizer)


def main(argv=None):
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()    # to err before the work, where none can be made
    trained = args.out / "trained.json"             # what the finished model in there was made with
    if trained.exists():
        refuse_other_settings(trained, read_json(trained), args)
        return print(f"nothing to do: this command made the model in {args.out}/ before")
    torch.manual_seed(args.seed)
    if args.compile:
        data.trace = torch.compile(data.trace, dynamic=False)           # ten times faster rendering
    if args.ranks > 1:
        torch._dynamo.config.optimize_ddp = False      # graphs cut where ranks meet are slower
        if args.gpu:
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.gpu else "gloo")
    model = MVDream.from_pretrained(args.model) if args.model else new_model()
    model.unet = model.unet.changed(attention=args.attention, camera=args.camera)
    model.image_size = min(256, model.image_size)                         # the paper's fine-tuning
    model.to(args.device)
    began = time.time()
    source = (ToyPool(model, args) if args.kind == "toy" else
              Photos(model, args) if args.kind == "photos" else
              Folders(model, args, functools.partial(plan, args)))
    if args.rank == 0 and source.kinds:
        print(*source.kinds.values(), sep="\n")
    train(model, source, args)
    if source.broken:
        print(f"{len(source.broken)} left out while training, such as: {min(source.broken)}")
    if args.rank == 0:
        try:
            sample_sheet(model, args.out / "samples.png", source.prompts)
            model.half().save_pretrained(args.out)
            write(trained, json.dumps(args.settings))
        except (SafetensorError, OSError) as error:
            raise OSError(f"{args.out}: the model could not be written ({error}): make room on the "
                          "disk; the same command goes on from the last checkpoint") from error
        prompt = source.prompts[0].removesuffix(data.SUFFIX)
        print(f"Trained in {time.time() - began:.0f} s. The model is in {args.out}/: "
              f'python generate.py "{prompt}" --model {args.out}')
    if args.ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:      # a worker's ends its traceback
        print(f"train.py: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("train.py: stopped")
