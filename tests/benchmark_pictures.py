"""The pictures that teach, each made by one command, into pictures/:

    python tests/benchmark.py pictures attention   views that see each other, and views that do not
    python tests/benchmark.py pictures janus       an object distilled from many views, and from one
    python tests/benchmark.py pictures annealing   an object over the steps, while t falls
    python tests/benchmark.py pictures guidance    guidance against colour, with and without rescale
"""
import argparse
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import data
import generate
import sds
from mvdream import MVDream

PROMPT = "a red robot wearing a blue hat"


def page(path, rows, size=128, height=16):
    """rows [(caption of the row, [(caption, picture (3, H, W) in [-1, 1])])] -> a labelled JPEG"""
    width = max(len(cells) for _, cells in rows)
    sheet = Image.new("RGB", (size * width, len(rows) * (size + 2 * height)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, cells) in enumerate(rows):
        top = i * (size + 2 * height)
        pen.text((3, top + 2), title, "black")
        for k, (caption, picture) in enumerate(cells):
            sheet.paste(generate.to_image(picture.movedim(0, -1)[None] / 2 + 0.5, size),
                        (k * size, top + height))
            pen.text((k * size + 3, top + height + size + 2), caption, "black")
    path.parent.mkdir(exist_ok=True)
    sheet.save(path, quality=88)
    print(path)


def attention(model, path):
    """One network, one prompt that leaves the colour open; below, each view is a set of its own."""
    c2w, rows = data.orbit_cameras(4, azimuth=20), []
    for prompt in ("a robot", "a car"):
        together = model.sample([prompt + data.SUFFIX], c2w, steps=30, guidance_scale=3.0)[0]
        alone = model.sample([prompt + data.SUFFIX] * 4, c2w[:, None], steps=30,
                             guidance_scale=3.0)[:, 0]
        cells = [("", picture) for picture in (*together, *alone)]
        rows.append((f"{prompt}: four views with inflated attention; four views, each alone", cells))
    page(path, rows)


def object_views(nerf, size=64, num_views=4):
    return generate.look_around(nerf, num_views, size).movedim(-1, 1) * 2 - 1


def janus(model, path):
    """The front (red) comes back behind where a 2D model guides: a front is what it knows best."""
    rows = []
    for prompt in (PROMPT, "a yellow duck wearing a pink scarf"):
        cells = []
        for multiview in (True, False):
            nerf = sds.dream(model, prompt, replace(sds.PRESETS["tiny-cpu"], multiview=multiview))
            cells += zip(("front", "left", "back", "right"), object_views(nerf))
        rows.append((f"{prompt}: guided by four views at once; by single views, no cameras", cells))
    page(path, rows)


def annealing(model, path, when=(10, 25, 50, 75, 120, 180, 240, 300)):
    s, cells = sds.PRESETS["tiny-cpu"], []
    for now in sds.dream_steps(model, PROMPT, s):
        if now.step in when:
            low, high = sds.timestep_range(s, now.step)
            caption = f"{now.step}: t {low} to {high}"
            cells.append((caption, object_views(now.nerf.eval(), num_views=8)[1]))
            now.nerf.train()
    page(path, [(f"{PROMPT}: the object after so many steps, and where t is drawn", cells)])


def guidance(model, path):
    c2w, rows = data.orbit_cameras(4, azimuth=20), []
    for rescale in (0.0, 0.5, 1.0):
        cells = []
        for scale in (1.0, 3.0, 7.5, 15.0, 30.0, 50.0):
            views = model.sample([PROMPT + data.SUFFIX], c2w, steps=30, guidance_scale=scale,
                                 rescale=rescale)[0]
            spread = (views.amax(1) - views.amin(1)).mean().item() / 2
            cells.append((f"{scale:g}: colour {spread:.2f}", views[0]))
        rows.append((f"rescale {rescale:g}; guidance, and the mean of max(r,g,b) - min(r,g,b)", cells))
    page(path, rows)


def main(argv):
    parts = {part.__name__: part for part in (attention, janus, annealing, guidance)}
    parser = argparse.ArgumentParser(prog="benchmark.py pictures",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("which", nargs="+", choices=parts)
    parser.add_argument("--model", default="weights/tiny")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    args = parser.parse_args(argv)
    model = MVDream.from_pretrained(args.model).accelerate()
    for name in args.which:
        parts[name](model, args.out / f"{name}.jpg")
