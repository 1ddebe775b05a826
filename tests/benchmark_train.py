"""Training: speed, memory, several GPUs, the paper's comparisons, DreamBooth.

    python tests/benchmark.py train [--sets 4 8 16] [--only WORD]        full size, on one GPU
    torchrun --nproc_per_node=2 tests/benchmark.py train --ddp           N ranks against one alone
    python tests/benchmark.py train --ablate [--base FOLDER] [--jobs 7]  seven ways, trained alike
    python tests/benchmark.py train --dreambooth                         one subject, four photos

Every row is train.py's own loop, optimizer and moving average included, printed when it is known.
  set     four views of one object, 256x256; where latents are at hand, so is the encoded text
  MFU     the network's arithmetic, three times its forward pass, as a share of the rate at which
          the same run multiplies two 8192x8192 matrices in bfloat16
  busy    a step whose pictures are on the device already, over one that reads them from disk; both
          encode pictures and captions
An ablation goes on from a base that knows single pictures only; a FOLDER without one is filled
first: weights/tiny's autoencoder, a new network trained in 2D, the toy world's latents for all rows.
Its columns, and DreamBooth's, are those of benchmark_quality.py.
"""
import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

import data
import sources
import train
from benchmark_model import TINY, build
from benchmark_quality import agreement, border, evaluate, generate, save_sheet
from metrics import psnr, toy_prompts
from mvdream import MVDream
from tokenizer import train_tokenizer
from unet import UNet

ROOT, VIEWS = Path(__file__).parent.parent, sources.VIEWS


@contextlib.contextmanager
def training(compiled):
    """train.py without its progress, and eager unless compiled."""
    compile, nowhere = torch.compile if compiled else lambda function, **_: function, io.StringIO()
    with mock.patch("torch.compile", compile), contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        yield


def flags(options, model, out, steps, batch, lr, *more):
    """A command line of train.py that neither saves nor draws on the way."""
    return [str(word) for word in (
        "--model", model, "--out", out, "--device", options.device, "--steps", steps, "--batch", batch,
        "--lr", lr, "--save-every", 10 ** 9, "--sample-every", 10 ** 9, *more)]


# ---- Speed and memory ----------------------------------------------------------------------------

class New(dict):
    """Nothing is known in it: every caption is encoded, as with sets as large as the paper's."""

    def __contains__(self, key):
        return False


class Ready:
    """Batches that are on the device already: latents and encoded captions."""
    half, broken, prompts = True, (), [""]

    def __init__(self, model, args):
        n, h, C = args.micro, model.latent_size, model.unet.config.context_dim
        shapes = (n, 4, h, h), (n, 77, C), (1, 77, C)
        self.x0, self.y, self.empty = (torch.randn(shape, device=args.device) for shape in shapes)
        self.c2w = data.orbit_cameras(VIEWS).repeat(n // VIEWS, 1, 1).to(args.device)

    def begin(self, encode):
        pass

    def batch(self, mode, step, part, generator):
        return (self.x0, self.y[::VIEWS], self.c2w) if mode == "3d" else (self.x0, self.y, None)


class Stopwatch:
    """A source that notes when each step begins; it waits for the device at two of them alone."""

    def __init__(self, source, args):
        self.source, self.ends, self.times = source, (args.steps // 3, args.steps - 1), {}

    def __getattr__(self, name):
        return getattr(self.source, name)

    def batch(self, mode, step, part, generator):
        if step not in self.times:
            if step in self.ends and torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times[step] = time.perf_counter()
        return self.source.batch(mode, step, part, generator)


def measure(model, source, args, compiled):
    """The training loop itself -> seconds a step, peak GiB."""
    watch = Stopwatch(source, args)
    if args.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with training(compiled):
        train.train(model, watch, args)
    for block in model.unet.modules():                  # --recompute has put its own there
        block.__dict__.pop("forward", None)
    (first, last), peak = watch.ends, torch.cuda.max_memory_allocated() if args.gpu else 0
    return (watch.times[last] - watch.times[first]) / (last - first), peak / 2 ** 30


def new_model(options):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(["a red robot wearing a blue hat"], folder)
        return build({} if options.size == "full" else TINY, tokenizer, options.device)


def settings(options, folder, sets, steps, *more):
    """Training on folders, all steps 3D unless `more` says so; what is there is the caller's."""
    batch = sets * VIEWS * int(os.environ.get("WORLD_SIZE", 1))
    return train.parse(flags(options, "-", folder, steps, batch, 1e-6, "--micro", sets * VIEWS,
                             "--data", f"{folder}/renders", *more))


def arithmetic(model):
    """TFLOP of a training step for one set: forward, and twice that backward."""
    n, C = model.latent_size, model.unet.config.context_dim
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(model.unet.config)(torch.zeros(VIEWS, 4, n, n), torch.zeros(VIEWS),
                                torch.zeros(VIEWS, 77, C), torch.zeros(VIEWS, 16), VIEWS)
    return 3e-12 * counter.get_total_flops()


def matrix_rate(device, n, repeats=200):
    """TFLOP/s of the product of two n x n matrices of random bfloat16."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for count in (repeats // 10, repeats):
        start = time.perf_counter()
        for _ in range(count):
            c = a @ b
        c[0, 0].item()
    return 2e-12 * n ** 3 * repeats / (time.perf_counter() - start)


def write_sets(folder, count, size, device):
    """Toy objects as view sets on disk: eight views each, in the form that sources.py explains."""
    def save(place, pictures, caption):
        place.mkdir(parents=True)
        frames = [{"file_path": f"{i}.png", "transform_matrix": m} for i, m in enumerate(c2w.tolist())]
        for frame, picture in zip(frames, pictures):
            Image.fromarray(picture).save(place / frame["file_path"])
        (place / "transforms.json").write_text(json.dumps({"frames": frames}))
        (place / "caption.txt").write_text(caption)
    captions, c2w = toy_prompts("seen", count), data.orbit_cameras(8)
    with ThreadPoolExecutor(16) as pool:
        for i in range(0, count, 8):
            out = data.toy_render(captions[i:i + 8], c2w, size=size, supersample=1, device=device)
            rgba = torch.cat([out["rgb"], out["opacity"]], -1).mul(255).byte().cpu().numpy()
            list(pool.map(save, [folder / f"{i + k}" for k in range(len(rgba))], rgba, captions[i:]))


def from_disk(source, args):
    """Sets a second that the workers deliver when nothing is done with them."""
    batches = sources.reader(source.kinds["3d"], args, train.plan(args, "3d", 0))
    ahead = count = 2 * max(1, args.workers)            # what they have ready at first
    for i in range(ahead + count):
        if i == ahead:
            start = time.perf_counter()
        next(batches)
    return count * args.micro / VIEWS / (time.perf_counter() - start)


def speed(options):
    gpu, model, most = options.device != "cpu", new_model(options), options.sets[-1]
    flop, rate = arithmetic(model), matrix_rate(options.device, 8192 if gpu else 512)
    print(f"{torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}: matrix product "
          f"{rate:.3g} TFLOP/s; a training step is {flop:.3g} TFLOP a set", flush=True)
    rows = [("latents", "eager", n) for n in options.sets] + [("latents", "--recompute", 8)]
    rows += [("pictures", "eager", most), ("disk", "eager", most)]
    rows += [(what, "compiled", most) for what in ("latents", "pictures", "disk")]
    with tempfile.TemporaryDirectory() as folder:
        write_sets(Path(folder) / "renders", 200 if gpu else 8, model.image_size, options.device)
        for what, how, n in [row for row in rows if options.only in " ".join(row[:2])]:
            args = settings(options, folder, n, 24, *["--recompute"] * (how == "--recompute"))
            source = (Ready(model, args) if what == "latents" else
                      train.Folders(model, args, functools.partial(train.plan, args)))
            source.known = New()
            if what == "pictures":                      # the same ones again, on the device already
                images, c2w, *rest = next(sources.reader(source.kinds["3d"], args, source.plan("3d", 0)))
                there = images.to(args.device), c2w.to(args.device)
                source.readers["3d"] = itertools.repeat((*there, *rest))
            try:
                t, peak = measure(model, source, args, how == "compiled")
            except torch.OutOfMemoryError:
                print(f"{what}, {how}, {n} sets: out of memory", flush=True)
                continue
            print(f"{what + ', ' + how:<22}{n:4d} sets {1000 * t:8.1f} ms {n / t:7.1f} sets/s "
                  f"{flop * n / t:6.1f} TFLOP/s  MFU {flop * n / t / rate:4.0%} {peak:6.1f} GiB",
                  flush=True)
            if what == "pictures":
                ready = t
            if what == "disk":
                alone = from_disk(source, settings(options, folder, n, 1000))
                print(f"    busy {ready / t:.0%}; {args.workers} workers alone {alone:.0f} sets/s, "
                      f"{alone * t / n:.1f} times what training takes", flush=True)


def ddp(options):
    """All ranks, against rank 0 while the others wait; the same work per rank."""
    gpu, model = options.device != "cpu", new_model(options)
    if gpu:
        torch.cuda.set_device(options.device)
    dist.init_process_group("nccl" if gpu else "gloo")
    with tempfile.TemporaryDirectory() as folder:
        for parts in (1, 4):                            # gradients meet once for so many
            args = settings(options, folder, options.sets[0], 14, "--images", "-", "--mix", "0.7")
            args.batch, args.accumulate = args.batch * parts, parts
            alone, source = copy.copy(args), Ready(model, args)
            alone.batch, alone.ranks = args.batch // args.ranks, 1
            if args.rank == 0:
                one, _ = measure(model, source, alone, options.compile)
            dist.barrier()
            many, peak = measure(model, source, args, options.compile)
            if args.rank == 0:
                n = alone.batch / VIEWS
                print(f"{args.ranks} ranks, {parts} x {options.sets[0]} sets each: {n / one:.2f} sets/s "
                      f"alone, {args.ranks * n / many:.2f} together, {one / many:.3f} of linear; "
                      f"{peak:.1f} GiB", flush=True)
    dist.destroy_process_group()


# ---- The paper's comparisons ---------------------------------------------------------------------

ROWS = {"inflated, camera in time": ("inflated", "time", 0.7),                # the paper's choices
        "attention: none": ("none", "time", 0.7),
        "attention: temporal": ("temporal", "time", 0.7),
        "attention: new 3D": ("new3d", "time", 0.7),
        "camera: text token": ("inflated", "text", 0.7),
        "camera: none": ("inflated", "none", 0.7),
        "without 2D data": ("inflated", "time", 1)}
PROMPTS = {"seen": "seen in 3D", "category": "in 2D only", "combination": "never"}


class Pool(train.ToyPool):
    """The toy world's latents, as the base left them."""

    def __init__(self, model, args):
        kept = torch.load(args.model / "pool.pt", map_location=args.device)
        vars(self).update(kept, model=model, args=args, empty=model.tokenize([""]).to(args.device))

    def begin(self, encode):
        pass


def make_base(options):
    """Into --base, unless there: a model that knows single pictures only, and the toy world's latents
    (327 MB for 10,000 sets; the model's 29 MB alone may be carried elsewhere)."""
    start, tiny = time.time(), MVDream.from_pretrained(ROOT / "weights/tiny")
    there = (options.base / "model.safetensors").exists()
    model = MVDream.from_pretrained(options.base) if there else train.new_model()
    model.vae, model.latent_mean = tiny.vae, tiny.latent_mean
    args = train.parse(flags(options, "-", options.base, options.base_steps, 4 * options.batch, 6e-4,
                             "--mix", 0, "--sets", options.pool))
    args.out.mkdir(parents=True, exist_ok=True)
    trace = torch.compile(data.trace, dynamic=False) if args.gpu else data.trace
    with mock.patch.object(data, "trace", trace), training(compiled=True):
        pool = train.ToyPool(model.to(args.device), args)
        if there:
            pool.begin(model.vae.encode)
        else:
            train.train(model, pool, args)
            model.half().save_pretrained(args.out)
    torch.save({k: getattr(pool, k) for k in ("latents", "cameras", "y")}, args.out / "pool.pt")
    print(f"base: {time.time() - start:.0f} s", flush=True)


def file_name(row):
    return "".join(c if c.isalnum() else "_" for c in row)


def join_sheets(folder):
    """The rows' sheets in one picture: of each column's prompts the first; the truth below."""
    sheet = Image.new("RGB", (920, 66 * len(ROWS) + 66), "white")
    pen, lines = ImageDraw.Draw(sheet), [(name, name, 0) for name in ROWS]
    for i, (label, name, left) in enumerate([*lines, ("truth", next(iter(ROWS)), 256)]):
        page = Image.open(folder / f"{file_name(name)}.png")
        pen.text((4, 66 * i + 26), label, "black")
        for k in range(len(PROMPTS)):
            cell = page.crop((left, 128 * k, left + 256, 128 * k + 64))
            sheet.paste(cell, (144 + 260 * k, 66 * i))
    sheet.save(folder / "ablation.png")


def ablation_row(options):
    """Train one row from the base, and print its line of the table."""
    (attention, camera, mix), start = ROWS[options.row], time.time()
    out = options.base / file_name(options.row)
    with mock.patch.object(train, "ToyPool", Pool), training(options.compile):
        train.main(flags(options, options.base, out, options.steps, options.batch, options.lr,
                         "--attention", attention, "--camera", camera, "--mix", mix))
    trained, model = time.time(), MVDream.from_pretrained(out, device=options.device)
    cells, janus, shown = [], 0, []
    for prompts in PROMPTS:
        m, *pictures = evaluate(model, prompts, options.prompts, 20, 3.0, options.device)
        cells.append(f"{m['PSNR']:6.1f} {m['IoU']:4.2f}")
        janus += m["Janus"] / len(PROMPTS)
        shown.append([p[:2, :, ::2, ::2] for p in pictures])
    same = agreement(model, options.prompts, 20, 3.0, options.device, True)
    print(f"{options.row:25s}{'  '.join(cells)} {same:7.2f} {janus:6.2f}   "
          f"({trained - start:.0f} + {time.time() - trained:.0f} s)", flush=True)
    if options.sheet:
        save_sheet(options.sheet / f"{out.name}.png", *map(torch.cat, zip(*shown)))


def ablate(options):
    if not (options.base / "pool.pt").exists():
        make_base(options)
    print(f"{options.steps} steps of {options.batch} pictures; {options.prompts} prompts a column\n"
          f"{'PSNR in dB, IoU':25s}{'  '.join(f'{name:>11s}' for name in PROMPTS.values())}   agree  Janus",
          flush=True)

    gpus, threads = torch.cuda.device_count(), max(1, os.cpu_count() // options.jobs)

    def run(i, name):
        place = {"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus > 1 else {}
        done = subprocess.run([sys.executable, *sys.argv, "--row", name], text=True, capture_output=True,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads), **place})
        print(done.stdout.rstrip() or f"{name}: {done.stderr[-2000:]}", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, range(len(ROWS)), ROWS))
    if options.sheet:
        join_sheets(options.sheet)


# ---- DreamBooth ----------------------------------------------------------------------------------

def subject(caption, c2w, background):
    """The toy object of a caption, its main colour replaced by two that no caption can say: c2w
    (V,4,4), background a number -> (V,H,W,3) in [0,1]"""
    spec = torch.tensor([data.parse_caption(caption)])
    geometry, colors = data.build(spec)
    main = (colors[0] == torch.tensor(data.COLORS[data.HUES[spec[0, 1]]])).all(-1)
    low = geometry[0, :, 11] < -0.1
    colors[0, main & low], colors[0, main & ~low] = torch.tensor([[[.05, .45, .45]], [[.75, .95, .35]]])
    return data.render((geometry, colors), c2w, data.TOY_FOV, 128, background)[0]


def resemblance(model, prompt, caption, options, seeds=4):
    """PSNR to the subject's truth from four views between the photos', and the first pictures."""
    c2w = data.orbit_cameras(VIEWS, 15.0, 65.0)
    images = generate(model, [prompt + data.SUFFIX] * seeds, c2w.expand(seeds, VIEWS, 4, 4), 20, 3.0)
    truth = torch.stack([subject(caption, c2w, grey) for grey in border(images).tolist()]).to(images)
    return psnr(images, truth).mean().item(), [images[:1], truth[:1]]


def dreambooth(options):
    with tempfile.TemporaryDirectory() as folder:
        photos, pages, models = Path(folder) / "photos", [], {"before": options.model}
        photos.mkdir()
        c2w = data.look_at_origin(torch.tensor([4., 10., 18., 26.]), 20 + 90 * torch.arange(4))
        for i, photo in enumerate(subject("a red robot", c2w, 0.5)):
            Image.fromarray((photo * 255).byte().numpy()).save(photos / f"{i}.png")
        print(f"{'PSNR in dB':25s}{'subject':>8s}{'with a hat':>12s}{'other prompts':>15s}", flush=True)
        for weight in options.preserve:
            start, out = time.time(), Path(folder) / weight
            with training(compiled=False):
                train.main(flags(options, options.model, out, options.steps, 16, options.lr,
                                 "--dreambooth", photos, "--subject", "a sks robot",
                                 "--preserve", weight, *options.text))
            models[f"lambda {weight} ({time.time() - start:.0f} s)"] = out
        for name, path in models.items():
            model = MVDream.from_pretrained(path, device=options.device)
            own, page = resemblance(model, "a sks robot", "a red robot", options)
            hat, worn = resemblance(model, "a sks robot wearing a blue hat",
                                    "a red robot wearing a blue hat", options)
            m, images, truth = evaluate(model, "seen", options.prompts, 20, 3.0, options.device)
            print(f"{name:25s}{own:8.1f}{hat:12.1f}{m['PSNR']:15.1f}", flush=True)
            pages += [page, worn, [images[:1], truth[:1]]]
        if options.sheet:
            save_sheet(options.sheet / "dreambooth.png", *map(torch.cat, zip(*pages)))


def main(argv):
    parser, gpu = argparse.ArgumentParser(prog="benchmark.py train"), torch.cuda.is_available()
    add = parser.add_argument
    for flag, part in (("--ddp", ddp), ("--ablate", ablate), ("--dreambooth", dreambooth)):
        add(flag, dest="part", action="store_const", const=part, default=speed)
    add("--device", default="cuda:" + os.environ.get("LOCAL_RANK", "0") if gpu else "cpu")
    add("--size", choices=["full", "tiny"], default="full" if gpu else "tiny")
    add("--sets", type=int, nargs="+", default=[4, 8, 16], help="view sets at a time")
    add("--only", default="", help="rows with this word: eager, compiled, recompute")
    add("--compile", action="store_true", help="torch.compile in --ddp and --ablate too")
    add("--steps", type=int, default=1000)
    add("--lr", type=float, default=4e-4)
    add("--prompts", type=int, default=32)
    add("--sheet", type=Path, help="folder for pictures: generated on the left, truth on the right")
    add("--base", type=Path, default=Path("outputs/base"), help="--ablate: where the base is, or goes")
    add("--base-steps", type=int, default=1500)
    add("--pool", type=int, default=16_000, help="--ablate: view sets of the toy world")
    add("--batch", type=int, default=128, help="--ablate: pictures a step; the base's are four times")
    add("--row", choices=ROWS, help="--ablate: this row alone")
    add("--jobs", type=int, default=7, help="--ablate: rows at a time")
    add("--model", type=Path, default=ROOT / "weights/tiny", help="--dreambooth: goes on from it")
    add("--preserve", nargs="+", default=["0", "30", "100", "300"], help="--dreambooth")
    add("--text", action="append_const", const="--train-text", default=[], help="--dreambooth")
    options = parser.parse_args(argv)
    if options.sheet:
        options.sheet.mkdir(parents=True, exist_ok=True)
    (ablation_row if options.row else options.part)(options)
