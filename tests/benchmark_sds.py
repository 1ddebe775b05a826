"""Score distillation, measured: objects of the tiny model against the toy world's exact truth.

    python tests/benchmark.py sds [--prompts 16] [--row seen] [--sheet FILE.png] [--steps 300 ...]
    python tests/benchmark.py sds --ablate      one technique changed at a time, at two guidances
    python tests/benchmark.py sds --speed       full size, random weights: ms and GiB a step

Any setting of sds.Settings or nerf.NeRFConfig may follow by its name: --size 48 --guidance 3.
Each number is a median over the prompts, from 12 cameras that the optimisation never had:
  PSNR     of all 12 pictures of an object together, before grey
  IoU      of the silhouettes, opacity above a half
  Janus    share of objects that from behind look more like the true front than the true back
"""
import argparse
import functools
import itertools
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import torch

import data
import generate
import sds
from metrics import iou, janus, psnr, toy_prompts
from mvdream import MVDream
from tokenizer import train_tokenizer

CAMERAS = data.look_at_origin(torch.tensor([5.0, 15.0, 25.0]).repeat(4),
                              15.0 + 30 * torch.arange(12))
FRONT_BACK = data.look_at_origin(torch.tensor(15.0), torch.tensor([0.0, 180.0]))

ABLATIONS = {"full recipe": {}, "no annealing": dict(t_min=(20, 20), t_max=(980, 980)),
             "no rescale": dict(rescale=0.0),
             "the negative prompt of full size": dict(negative=sds.NEGATIVE),
             "dynamic thresholding instead": dict(rescale=0.0, threshold=0.995),
             "SDS instead of x0": dict(loss="sds"), "SJC instead of x0": dict(loss="sjc"),
             "2D guidance, views one by one": dict(multiview=False)}


@torch.no_grad()
def look(nerf, c2w, size=128):
    """-> rgb (1, V, H, W, 3) before grey, opacity (1, V, H, W, 1)"""
    device = next(nerf.parameters()).device
    c2w = c2w.clone()
    c2w[:, :3, 3] *= data.TOY_DISTANCE
    rays = data.camera_rays(c2w.to(device), data.TOY_FOV, size, size)
    out = nerf.eval().render(*rays, background=0.5)
    return out["rgb"][None], out["opacity"][None]


def judge(nerf, caption):
    """-> PSNR, IoU, Janus (0 or 1), and the pictures (2, V, H, W, 3): ours, the truth's"""
    device = next(nerf.parameters()).device
    rgb, opacity = look(nerf, CAMERAS)
    truth = data.toy_render([caption], CAMERAS, device=device)
    sides = data.toy_render([caption], FRONT_BACK, device=device)["rgb"]
    behind = janus(look(nerf, FRONT_BACK)[0][:, 1:], sides[:, 1:], sides[:, :1])
    same = iou(opacity[..., 0] > 0.5, truth["opacity"][..., 0] > 0.5)
    return (psnr(rgb, truth["rgb"]).item(), same.item(), float(behind),
            torch.cat([rgb, truth["rgb"]]).cpu())


@functools.cache
def tiny(path, device, jobs):
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    return MVDream.from_pretrained(path, device=device).accelerate()


def one(task):
    """One object -> PSNR, IoU, Janus, seconds; its pictures. None if it died."""
    model, caption, s, seed, verbose = tiny(*task[0]), *task[1:]
    start = time.time()
    try:
        nerf = sds.dream(model, caption, s, seed)
    except ValueError as e:
        return print(f"{caption}: {e}", flush=True)
    seconds = time.time() - start
    *row, pictures = judge(nerf, caption)
    if verbose:
        print("  %5.1f dB  %.3f  %d" % tuple(row), f"{seconds:6.1f} s  {caption}", flush=True)
    return [*row, seconds], pictures.numpy()


def evaluate(rows, captions, model, seed, jobs):
    """rows {name: Settings}; a line of the table for each, and the pictures of the last."""
    tasks = [((*model, jobs), caption, s, seed, len(rows) == 1)
             for s in rows.values() for caption in captions]
    context = multiprocessing.get_context("spawn")          # several share a GPU, or the cores
    with ProcessPoolExecutor(jobs, context) if jobs > 1 else nullcontext() as pool:
        results = pool.map(one, tasks) if jobs > 1 else map(one, tasks)
        for i, name in enumerate(rows):
            alive = [r for r in itertools.islice(results, len(captions)) if r is not None]
            numbers = torch.tensor([r for r, _ in alive] or [[math.nan] * 4])
            psnr_, iou_, _, seconds = numbers.median(0).values.tolist()
            if i == 0:
                print(HEAD)
            print(f"{name:44s} {psnr_:6.1f} {iou_:6.3f} {numbers[:, 2].mean():6.2f} "
                  f"{1 - len(alive) / len(captions):5.2f} {seconds:7.1f}", flush=True)
    return [torch.from_numpy(pictures) for _, pictures in alive]


HEAD = f"{'':44s} {'PSNR':>6s} {'IoU':>6s} {'Janus':>6s} {'dead':>5s} {'s each':>7s}"


def save_sheet(path, pictures):
    """Of each object every third view; ours above the truth."""
    rows = [p[:, ::3].permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)           # (2H, 4W, 3)
            for p in pictures]
    rows += [torch.ones_like(rows[0])] * (-len(rows) % 2)
    half = len(rows) // 2
    from PIL import Image
    sheet = torch.cat([torch.cat(rows[:half]), torch.cat(rows[half:])], 1)
    Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().numpy()).save(path)
    print(path)


# ---- Speed at full size --------------------------------------------------------------------------


def speed(device, steps, sync, compile):
    """Random weights; the object stays the initial blob: the learning rates are 0."""
    from benchmark_model import build
    tokenizer = train_tokenizer(["an object, 3d asset"], tempfile.mkdtemp())
    model = build({}, tokenizer, device).accelerate(compile)
    for name in ("full", "full-shaded"):
        total = 0
        for phase in (0, 1):
            s = sds.PRESETS[name]
            s = replace(s, lr_grid=0.0, lr_mlp=0.0, switch=0.0 if phase else 1.0, steps=steps + 10)
            times = []
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            for now in sds.dream_steps(model, "an object", s):
                if now.step >= 10:                  # what comes before is compiling and warming up
                    sync()
                    times.append(time.time())
            ms = 1000 * (times[-1] - times[0]) / max(1, len(times) - 1)
            total += ms * 5
            print(f"{name:12s} {s.batch[phase]} pictures at {s.size[phase]:3d}: {ms:7.1f} ms a "
                  f"step, {sds.peak_memory():.1f} GiB", flush=True)
        print(f"{name:12s} 10,000 steps: {total / 60:.1f} minutes")


def main(argv):
    p = argparse.ArgumentParser(prog="benchmark.py sds", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--row", default="seen", help="seen, combination, colour or category")
    p.add_argument("--model", default="weights/tiny")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--preset", help="tiny-gpu or tiny-cpu (by device)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--sheet", help="a picture: ours above the truth")
    p.add_argument("--jobs", type=int, default=1, help="objects at a time; all then take longer")
    p.add_argument("--ablate", nargs="*", type=float, metavar="GUIDANCE", help="at these (3 and 50)")
    p.add_argument("--speed", nargs="?", type=int, const=40, metavar="STEPS")
    p.add_argument("--compile", metavar="MODE", help="with --speed: of torch.compile, as default")
    args, rest = p.parse_known_args(argv)
    sync = torch.cuda.synchronize if args.device.startswith("cuda") else (lambda: None)
    if args.speed:
        return speed(args.device, args.speed, sync, args.compile)

    given = [f"{name.lstrip('-').replace('-', '_')}={value}"
             for name, value in zip(rest[::2], rest[1::2])]
    preset = args.preset or ("tiny-gpu" if args.device.startswith("cuda") else "tiny-cpu")
    s = generate.with_values(sds.PRESETS[preset], given)
    captions = toy_prompts(args.row, args.prompts, args.seed)
    print(f"{preset} {' '.join(given)}: {len(captions)} prompts, {args.row}, on {args.device}")
    rows = {"median": s} if args.ablate is None else {
        f"{name}, guidance {guidance:g}": replace(s, guidance=guidance, **change)
        for guidance in args.ablate or (3.0, 50.0) for name, change in ABLATIONS.items()}
    pictures = evaluate(rows, captions, (args.model, args.device), args.seed, args.jobs)
    if args.sheet:
        save_sheet(args.sheet, pictures)
