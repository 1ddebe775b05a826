#!/usr/bin/env python
"""python generate.py "a red robot wearing a blue hat" makes four views, then a 3D object of it.

The views come within seconds: multi-view diffusion. Then a NeRF is optimised until the diffusion
model likes it from everywhere: score distillation. A turntable and a mesh are made of that.

outputs/<prompt>/ then holds views.png, preview.png (refreshed as it goes), turntable.gif,
nerf.safetensors, mesh.glb and settings.json. The same command again goes on from what was saved
last, be it stopped by Ctrl-C, kill -9 or a full disk; once all is made it says so and does nothing.
The same prompt with other settings gets a folder of its own, <prompt>-2: nothing is overwritten.
"""
import argparse
import contextlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError

# Threads that wait for each other sleep instead of spinning: where other programs run on the same
# cores, spinning made this one three times slower. To be said before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
SUFFIX = ", 3d asset"       # data.SUFFIX, said once more because data.py imports PyTorch
PERIOD = 10                 # seconds from one preview and saved state to the next

# ---- The command line: what can be wrong in it is found before PyTorch is imported ---------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(fail(message))


def fail(message):
    print(f"generate.py: {message}", file=sys.stderr)
    return 2


def parse(argv):
    p = Parser(prog="generate.py", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prompt", nargs="?", help='such as "an orange car with blue wheels"')
    p.add_argument("--prompts", metavar="FILE", help="one prompt a line; torchrun shares them out")
    p.add_argument("--views-only", action="store_true", help="stop after the views")
    p.add_argument("--seed", type=int, default=0, help="same seed and device: same result (0)")
    p.add_argument("--out", metavar="FOLDER", default="outputs", help="for the folders (outputs)")
    p.add_argument("--model", metavar="PATH", default=str(Path(__file__).parent / "weights/tiny"),
                   help="folder or file with weights (weights/tiny, which comes along)")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (a GPU if there is one)")
    p.add_argument("--views", type=int, help="views of a set (4)")
    p.add_argument("--elevation", type=float, default=15.0,
                   help="of views.png, in degrees upward (15)")
    p.add_argument("--azimuth", type=float, default=0.0, help="of its first view; 0 is the front")

    g = p.add_argument_group("the object", "Defaults come with the preset. With --views-only, "
                             "--steps, --guidance and --rescale are those of the views.")
    g.add_argument("--lift", choices=("sds", "reconstruct"), default="sds",
                   help="score distillation, or a plain fit to the views: quick and rough")
    g.add_argument("--preset", choices=("full", "full-shaded", "tiny-gpu", "tiny-cpu"),
                   help="of settings (by model and device)")
    g.add_argument("--steps", type=int, help="optimisation steps")
    g.add_argument("--guidance", type=float, help="obedience to the text; 1 is none")
    g.add_argument("--rescale", type=float, help="against over-saturation, 0 to 1")
    g.add_argument("--negative", metavar="TEXT", help="what not to make")
    g.add_argument("--memory", type=float, help="GiB of GPU memory to stay within")
    g.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="last of all: "
                   "others of sds.py's Settings or nerf.py's NeRFConfig, as size=64,128 levels=8")
    args = p.parse_args(argv)
    for flag, low, high in (("steps", 1, 999 if args.views_only else math.inf), ("views", 1, 100),
                            ("seed", -2 ** 62, 2 ** 62), ("memory", 0, math.inf), ("rescale", 0, 1),
                            ("guidance", 0, math.inf), ("elevation", -90, 90),
                            ("azimuth", -360, 360)):
        value = getattr(args, flag)
        if value is not None and not (low <= value <= high and value < math.inf):
            p.error(f"--{flag} {value:g}: it goes from {low} to {high}".replace("to inf", "upward"))
    args.prompts = read_prompts(p, args)
    if not os.path.exists(args.model):
        p.error(f"--model {args.model}: no such file or folder; python train.py makes weights")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", args.device):
        p.error(f"--device {args.device}: not a device; give cpu, cuda or cuda:0")
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as e:
        p.error(f"--out {args.out}: cannot write there ({e.strerror}); give another folder")
    return args


def read_prompts(p, args):
    """The prompt, or the lines of the file; under torchrun, this process's share of them."""
    if (args.prompt is None) == (args.prompts is None):
        p.error('give a prompt, such as "a red robot wearing a blue hat", or --prompts FILE')
    try:
        lines = [args.prompt] if args.prompts is None else Path(args.prompts).read_text(
            encoding="utf-8-sig").splitlines()
        "".join([*lines, args.negative or ""]).encode()
    except (OSError, ValueError) as e:
        p.error(f"{args.prompts or 'prompt'}: not text in UTF-8 that can be read ({e})")
    lines = [" ".join(line.split()).removesuffix(SUFFIX) for line in lines]
    lines = list(dict.fromkeys(filter(None, lines)))
    if not lines:
        p.error('the prompt is empty; say what to make, such as "a yellow duck"')
    return lines[int(os.environ.get("RANK", 0))::int(os.environ.get("WORLD_SIZE", 1))]


def settings_of(args, preset):
    """The preset with what the command line says, checked."""
    import sds
    s = sds.PRESETS[preset]
    names = ["negative", "memory", "views"]
    names += [] if args.views_only else ["steps", "guidance", "rescale"]
    s = replace(s, **{n: getattr(args, n) for n in names if getattr(args, n) is not None})
    if args.views:                                          # as many sets a step as the preset has
        s = replace(s, batch=tuple(n * args.views // sds.PRESETS[preset].views for n in s.batch))
    s = with_values(s, args.set)
    sds.check(s)
    return s


def with_values(s, texts):
    """Settings s with each NAME=VALUE in its place, be that in s or in s.nerf."""
    for text in texts:
        name, _, value = text.partition("=")
        inner = name in vars(s.nerf)
        if not inner and (name not in vars(s) or name == "nerf"):
            raise ValueError(f"--set {text}: no such setting; sds.py and nerf.py list them")
        default = getattr(s.nerf if inner else s, name)
        try:
            if name == "background":
                value = {"learned": "learned", "none": None}[value.lower()]
            elif isinstance(default, tuple):                # one number also stands for two
                parts = value.strip("()").split(",")
                parts *= 2 // len(parts)
                value = tuple(type(d)(v) for d, v in zip(default, parts, strict=True))
            elif isinstance(default, bool):
                value = {"true": True, "false": False}[value.lower()]
            else:
                value = type(default)(value)
            if not all(abs(v) < math.inf for v in (value if isinstance(value, tuple) else [value])
                       if isinstance(v, float)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            wanted = "learned or none" if name == "background" else f"a value such as {default}"
            raise ValueError(f"--set {text}: {wanted} is wanted") from None
        s = replace(s, **({"nerf": replace(s.nerf, **{name: value})} if inner else {name: value}))
    return s


# ---- Files: written whole or not at all ----------------------------------------------------------

@contextlib.contextmanager
def writing(path):
    """A temporary name to write to; it becomes `path` once all of it is there."""
    part = path.with_name(f"part-{path.name}")
    try:
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError) as e:
        raise OSError(f"could not write {path} ({getattr(e, 'strerror', None) or e}); what was "
                      "made before is still there; make room, repeat the command") from None
    finally:
        for file in path.parent.glob(f"{part.name}*"):
            file.unlink()


def to_image(pictures, size):
    """(V, H, W, 3) in [0, 1] -> one PIL image, side by side, each brought to size x size."""
    from PIL import Image
    strip = pictures.cpu().clamp(0, 1).mul(255).round().byte().transpose(0, 1).flatten(1, 2)
    return Image.fromarray(strip.numpy()).resize((size * len(pictures), size), Image.BICUBIC)


def folder_for(out, prompt, record):
    """The folder of this prompt with these settings: the one it has, or the next that is free."""
    record = json.dumps(record, indent=2) + "\n"
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "object"
    for n in range(1, 1000):
        folder = Path(out, slug if n == 1 else f"{slug}-{n}")
        settings = folder / "settings.json"
        folder.mkdir(exist_ok=True)
        if all(file.name.startswith("part-") for file in folder.iterdir()):      # or none is there
            with writing(settings) as part:
                part.write_text(record)
        if settings.exists() and settings.read_bytes() == record.encode():
            return folder
    raise ValueError(f"--out {out}: 999 folders for this prompt; delete some")


# ---- The work ------------------------------------------------------------------------------------

def open_model(args):
    """-> the model on its device. On a CPU: as many threads as cores are granted, no more."""
    import torch
    from mvdream import MVDream
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda:"):
        if int(device[5:]) >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: PyTorch has none here; leave it out, or give cpu")
    with contextlib.suppress(OSError, ValueError):          # a container may grant less
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        torch.set_num_threads(max(1, min(torch.get_num_threads(), int(quota) // int(period))))
    model = MVDream.from_pretrained(args.model, device=device)
    long = model.image_size > 128 and args.lift == "sds" and not args.views_only
    if not (long and device.startswith("cuda") and shutil.which("cc")):
        return model.accelerate()
    print("compiling the networks: two minutes, that thousands of steps earn back", flush=True)
    return model.accelerate("default")


def make_views(args, model, prompt, num, how, path):
    """-> pictures (V, 3, H, W) in [-1, 1], and their cameras"""
    import data
    c2w = data.orbit_cameras(num, args.elevation, args.azimuth)
    pictures = model.sample([prompt + SUFFIX], c2w, negative_prompt=args.negative or "",
                            seed=args.seed, **how)[0]
    if not pictures.isfinite().all():
        raise ValueError("the views are no numbers: the weights are broken, or --guidance too high")
    with writing(path) as part:
        to_image(pictures.movedim(1, -1) / 2 + 0.5, pictures.shape[-1]).save(part)
    print(path, flush=True)
    return pictures, c2w


def lift(args, model, prompt, s, views, folder):
    """The optimisation, with its bar, previews and saved states; in the end, the NeRF."""
    import sds
    from tqdm import tqdm
    state, saved = folder / "state.pt", time.time()
    steps = sds.dream_steps(model, prompt, s, args.seed, state if state.exists() else None, views)
    with tqdm(total=s.steps, unit="step", mininterval=0.5) as bar:
        for now in steps:
            if not bar.n:                                   # steps of an earlier run take no time
                bar.initial = now.step - 1
            bar.update(now.step - bar.n)
            if now.step % 25 == 0:
                occupied = now.nerf.occupied().float().mean()
                bar.set_postfix_str(f"loss {now.loss:.1f}, opacity {now.opacity:.2f}, occupied "
                                    f"{occupied:.2f}, {sds.peak_memory():.1f} GiB", refresh=False)
            last = now.step == s.steps                      # from there nothing is left to go on
            if last or time.time() - saved > PERIOD:
                if not last:
                    with writing(state) as part:
                        now.save(part)
                with writing(folder / "preview.png") as part:
                    pictures = look_around(now.nerf.eval(), 4, s.size[1])
                    to_image(pictures, 2 * s.size[1]).save(part)
                now.nerf.train()
                saved = time.time()
    with writing(folder / "nerf.safetensors") as part:
        now.nerf.save(part)


def look_around(nerf, num_views, size):
    """The object from all sides, before white -> (num_views, size, size, 3)"""
    import data
    c2w = data.orbit_cameras(num_views)
    c2w[:, :3, 3] *= data.TOY_DISTANCE
    c2w = c2w.to(next(nerf.parameters()).device)
    return nerf.render(*data.camera_rays(c2w, data.TOY_FOV, size, size), background=1.0)["rgb"]


def save_turntable(nerf, path, size):
    pictures = look_around(nerf, 60 if size > 128 else 30, size)
    first, *rest = (to_image(picture[None], size) for picture in pictures)
    first.save(path, save_all=True, append_images=rest, loop=0, duration=4000 // len(pictures))


def plan(args, model, prompt):
    """-> Settings of the object, sampler's arguments for the views, and all of it as a record."""
    tiny, device = model.image_size <= 128, model.device.type
    preset = args.preset or ("full" if not tiny else "tiny-gpu" if device == "cuda" else "tiny-cpu")
    s = settings_of(args, preset)
    how = dict(steps=15, guidance_scale=3.0, sampler="dpm") if tiny else dict(steps=50)
    given = dict(steps=args.steps, guidance_scale=args.guidance, rescale=args.rescale)
    how |= {name: v for name, v in given.items() if args.views_only and v is not None}
    path = Path(args.model).resolve()
    files = [file for file in (path, *path.rglob("*.safetensors")) if file.is_file()]
    return s, how, dict(prompt=prompt, seed=args.seed, device=device, model=str(path),
                        weights_of=max(int(file.stat().st_mtime) for file in files),
                        preset=preset, lift=args.lift, elevation=args.elevation,
                        azimuth=args.azimuth, views=how, object=asdict(replace(s, memory=0.0)))


def make(args, model, prompt):
    """All files of one prompt, less those that are there."""
    from mesh import write_glb
    from nerf import NeRF
    s, how, record = plan(args, model, prompt)
    folder, took = folder_for(args.out, prompt, record), []
    views, nerf, turntable, mesh = (
        folder / name for name in ("views.png", "nerf.safetensors", "turntable.gif", "mesh.glb"))

    @contextlib.contextmanager
    def timed(what):
        start = time.time()
        yield
        took.append(f"{what} {time.time() - start:.1f} s")

    for file in folder.glob("part-*"):                      # a killed run's
        file.unlink()
    fit = args.lift == "reconstruct" and not args.views_only and not nerf.exists()
    if fit or not views.exists():
        with timed(f"{s.views} views"):
            seen = make_views(args, model, prompt, s.views, how, views)
    if not args.views_only and not all(file.exists() for file in (nerf, turntable, mesh)):
        if not nerf.exists():
            with timed("object"):
                lift(args, model, prompt, s, seen if fit else None, folder)
        (folder / "state.pt").unlink(missing_ok=True)
        thing = NeRF.load(nerf, model.device).eval()
        if not turntable.exists():
            with timed("turntable"), writing(turntable) as part:
                save_turntable(thing, part, model.image_size)
        if not mesh.exists():
            with timed("mesh"), writing(mesh) as part:
                write_glb(part, *thing.mesh(128))
    print(f"{folder}/: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    print(", ".join(took) or "nothing to do: this command made it all before")


def main(argv=None):
    start = time.time()
    args, status = parse(argv), 0
    try:
        import data
        import sds
        settings_of(args, args.preset or "full")            # to err before the model is loaded
        model = open_model(args)
        print(f"ready after {time.time() - start:.1f} s", flush=True)
        for prompt in args.prompts:
            unknown = model.image_size <= 128 and model.tokenizer.unknown_words(prompt)
            if unknown:
                print(f"the tiny model never met {', '.join(unknown)}; it knows "
                      f"{', '.join([*data.COLORS, *data.CATEGORIES])}")
            try:
                make(args, model, prompt)
            except ValueError as e:             # the object died; other prompts may fare better
                status = fail(f"{prompt}: {e}")
    except KeyboardInterrupt:
        fail("stopped; the same command goes on from what was saved last")
        return 130
    except (ValueError, OSError) as e:
        return fail(e)
    except RuntimeError as e:
        if type(e).__name__ != "OutOfMemoryError" and "allocate" not in str(e):
            raise
        return fail("the memory is too small; on a GPU the same command with --memory 16 goes on")
    print(f"{time.time() - start:.1f} s in all, {sds.peak_memory():.1f} GiB of memory at most")
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                # a prompt may have letters it lacks
    sys.exit(main())
