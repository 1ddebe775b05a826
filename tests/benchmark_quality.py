"""Four generated views against the exact truth of the toy world: the quality table of the README.

    python tests/benchmark.py quality [--prompts 64] [--model FOLDER] [--sheet FOLDER]

Each number, in one line:
  PSNR       of all four views of a prompt together, truth on the generated background; median
  IoU        of silhouettes: what differs from the background and is not reached from the border;
             median
  category   the four views are closer (squared error) to the truth than to any other category's
  colour     for each colour word: closer to the truth than with any of the nine other words
  Janus      the view from behind is closer to the true front than to the true back
  agreement  no colour said: the colour of each view, fitted to its pixels by least squares, is
             closer to the four's mean than half of what the two most alike of the ten are apart
"""
import argparse
import time

import torch

import data
from metrics import error, foreground, iou, janus, psnr, toy_prompts
from mvdream import MVDream

ROWS = {"seen": "seen in 3D", "combination": "combinations never seen anywhere",
        "colour": "a colour seen only in 2D", "category": "a category seen only in 2D"}


def truths(captions, c2w, background, device, size=128, supersample=2):
    """c2w (B,V,4,4), background (B,) -> rgb (B,V,H,W,3), opacity (B,V,H,W,1)"""
    grey = background.to(device).view(-1, 1, 1, 1).repeat_interleave(c2w.shape[1], 0)
    out = data.toy_render(captions, c2w, size=size, supersample=supersample, device=device,
                          background=grey)
    return out["rgb"], out["opacity"]


def border(images):
    """The background of each view set (B,V,H,W,3): the median of the outermost pixels -> (B,)."""
    edges = torch.cat([images[:, :, 0].flatten(1), images[:, :, :, 0].flatten(1),
                       images[:, :, :, -1].flatten(1)], 1)
    return edges.median(1).values


def variants(caption, slot, words):
    """The caption with entry `slot` of its spec (0 category, 1.. colours) set to each of the words."""
    spec = list(data.parse_caption(caption))
    return [data.format_caption([*spec[:slot], w, *spec[slot + 1:]]) for w in words]


def wins(caption, others, images, c2w, background, device):
    """True if the prompt's own truth is nearest; compared at half size."""
    rgb, _ = truths([caption, *others], c2w[None].expand(len(others) + 1, -1, -1, -1),
                    background.expand(len(others) + 1), device, 64, 1)
    small = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    return error(small[None], rgb).argmin().item() == 0


def plain(category, color):
    """Category and main colour alone: what every category can be asked in."""
    return data.format_caption((category, color, -1, -1))


@torch.no_grad()
def evaluate(model, row, num, steps, guidance, device, seed=0):
    captions = toy_prompts(row, num, seed)
    g = torch.Generator().manual_seed(seed)
    elevation = 5 + 20 * torch.rand(len(captions), 1, generator=g)
    azimuth = 60 * torch.rand(len(captions), 1, generator=g) - 30 + 90 * torch.arange(4)
    c2w = data.look_at_origin(elevation, azimuth)
    images = generate(model, [c + data.SUFFIX for c in captions], c2w, steps, guidance)
    background = border(images)
    rgb, opacity = truths(captions, c2w, background, device)

    category, color = [], []
    for i, caption in enumerate(captions):
        spec = data.parse_caption(caption)
        here = images[i], c2w[i], background[i].cpu(), device
        others = [plain(k, spec[1]) for k in range(len(data.NAMES)) if k != spec[0]]
        category.append(wins(caption, others, *here))
        for slot in [j for j in (1, 2, 3) if spec[j] >= 0]:
            hues = [h for h in range(len(data.HUES)) if h != spec[slot]]
            color.append(wins(caption, variants(caption, slot, hues), *here))
    return {"PSNR": psnr(images, rgb).median().item(),
            "IoU": iou(foreground(images, background), opacity[..., 0] > 0.5).median().item(),
            "category": sum(category) / len(category), "colour": sum(color) / len(color),
            "Janus": janus(images[:, 2], rgb[:, 2], rgb[:, 0]).float().mean().item(),
            }, images, rgb


def generate(model, prompts, c2w, steps, guidance):
    """-> (B,V,H,W,3) in [0,1], on the model's device"""
    views = torch.cat([model.sample(prompts[i:i + 16], c2w[i:i + 16], steps=steps, seed=i,
                                    guidance_scale=guidance) for i in range(0, len(prompts), 16)])
    return (views.permute(0, 1, 3, 4, 2) + 1) / 2


@torch.no_grad()
def agreement(model, num, steps, guidance, device, inflated):
    """The share of prompts without a colour word whose four views are of one colour."""
    names = [n for n in data.NAMES if n not in data.FLAT_CATEGORIES]
    names = (names * (num // len(names) + 1))[:num]
    cameras = data.orbit_cameras(4, 15.0, 20.0)
    prompts = [("an " if n[0] in "aeiou" else "a ") + n + data.SUFFIX for n in names]
    if inflated:
        images = generate(model, prompts, cameras.expand(num, 4, 4, 4), steps, guidance)
    else:                                       # the same network, each view a set of its own
        alone = [p for p in prompts for _ in range(4)]
        images = generate(model, alone, cameras.repeat(num, 1, 1)[:, None], steps, guidance)
        images = images.reshape(num, 4, *images.shape[2:])
    palette = torch.tensor(list(data.COLORS.values()), device=device)
    near = torch.pdist(palette).min() / 2
    same = 0
    for name, views in zip(names, images):
        colours = [plain(data.NAMES.index(name), h) for h in range(len(palette))]
        grey = border(views[None]).expand(len(colours))
        rgb, _ = truths(colours, cameras.expand(len(colours), 4, 4, 4), grey, device)
        painted = rgb.std(0).mean(-1, keepdim=True) > 0.05                     # (4,H,W,1)
        light = painted * rgb[data.HUES.index("white")] / palette[data.HUES.index("white")]
        colour = (light * views).sum((1, 2)) / light.square().sum((1, 2))      # (4,3)
        same += bool((colour - colour.mean(0)).norm(dim=1).max() < near)
    return same / num


def save_sheet(path, images, rgb, rows=12):
    from PIL import Image
    both = torch.cat([images[:rows], rgb[:rows]], 1)               # (rows, 2V, H, W, 3)
    both = both.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    Image.fromarray((both.clamp(0, 1) * 255).round().byte().cpu().numpy()).save(path)


def main(argv):
    parser = argparse.ArgumentParser(prog="benchmark.py quality", description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--model", default="weights/tiny")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sheet", help="folder for pictures: generated on the left, truth on the right")
    args = parser.parse_args(argv)
    model = MVDream.from_pretrained(args.model, device=args.device)
    print(f"{args.prompts} prompts a row, {args.steps} DDIM steps, guidance {args.guidance}, {args.device}")
    print(f"{'prompts':36s} {'PSNR':>6s} {'IoU':>5s} {'category':>9s} {'colour':>7s} {'Janus':>6s}")
    for row, name in ROWS.items():
        began = time.time()
        m, images, rgb = evaluate(model, row, args.prompts, args.steps, args.guidance, args.device)
        print(f"{name:36s} {m['PSNR']:6.1f} {m['IoU']:5.2f} {m['category']:9.2f} {m['colour']:7.2f} "
              f"{m['Janus']:6.2f}   ({time.time() - began:.0f} s)", flush=True)
        if args.sheet:
            save_sheet(f"{args.sheet}/quality_{row}.png", images, rgb)
    for inflated, name in ((True, "inflated attention"), (False, "each view alone")):
        share = agreement(model, args.prompts, args.steps, args.guidance, args.device, inflated)
        print(f"one colour in all four views, no colour said, {name}: {share:.2f}")
