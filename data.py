"""Cameras, rays and the toy world: MVDream's rendered training data, in small.

Conventions, for the whole project
    world     right-handed, z up; an object stands at the origin, faces +x and fits the unit sphere
    angles    degrees; azimuth 0 sees the front (camera on +x) and grows toward +y; elevation is up
    camera    c2w, a 4x4 camera-to-world matrix, OpenGL axes: x right, y up, looking along -z
    fov       vertical
    views     flattened view-fastest, (B*V, ...): the V views of one object are neighbours
    pictures  (N, 3, H, W) in [-1, 1] for the diffusion model, (..., H, W, 3) in [0, 1] for the NeRF

Letters: B objects, V views of each, N = B*V pictures, R rays a picture, P primitives an object.

The toy world: an object is at most P = 24 coloured primitives, traced exactly, and its caption says
all of it: "a red robot wearing a blue hat", "an orange car with blue wheels".  `python data.py`
draws them; `python data.py FOLDER` checks data of your own, whose form sources.py explains, and
`python data.py render MODELS FOLDER` makes such data of 3D models (render.py).
"""
import functools
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

TOY_FOV = 40.0                                          # the toy 3D set's only lens, because a
TOY_DISTANCE = 1 / math.tan(math.radians(TOY_FOV / 2))  # model never sees its fov and distance

# ---- Cameras and rays ----------------------------------------------------------------------------

def look_at_origin(elevation, azimuth):
    """Cameras on the unit sphere that look at its centre: angles (...) -> c2w (..., 4, 4)."""
    e, a = torch.broadcast_tensors(torch.deg2rad(elevation), torch.deg2rad(azimuth))
    back = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], -1)
    right = torch.stack([-a.sin(), a.cos(), torch.zeros_like(a)], -1)
    c2w = torch.stack([right, torch.linalg.cross(back, right), back, back], -1)     # (..., 3, 4)
    return torch.cat([c2w, torch.tensor([0., 0., 0., 1.]).expand_as(c2w[..., :1, :])], -2)


def orbit_cameras(num_views, elevation=15.0, azimuth=0.0, span=360.0):
    """(V, 4, 4): views spread evenly over `span` degrees, from `azimuth` on, on the unit sphere."""
    turn = torch.arange(num_views) * (span / num_views)
    return look_at_origin(torch.tensor(float(elevation)), azimuth + turn)


def random_view_cameras(num_sets, num_views, generator=None, fov=(15.0, 60.0), distance=(0.8, 1.0),
                        elevation=(0.0, 30.0)):
    """MVDream's cameras for score distillation: c2w (B*V, 4, 4) and fov (B*V,).

    The views of a set are evenly spaced and share elevation, fov and distance, which is in units of
    1/tan(fov/2): at 1, the plane through the origin shows [-1, 1] from bottom to top.
    """
    def uniform(low, high):
        return low + (high - low) * torch.rand(num_sets, 1, generator=generator)
    azimuth = 360 * (uniform(0, 1) + torch.arange(num_views)) / num_views - 180
    # Half are uniform in the angle, half "on the sphere" as the released code has it: its limits
    # are fractions of the angle, not of the sine, so that (0, 30) gives 0 to 19.5 degrees.
    sine = 2 * uniform(*((e + 90) / 180 for e in elevation)) - 1
    e = torch.where(uniform(0, 1) < 0.5, uniform(*elevation), torch.rad2deg(torch.asin(sine)))
    c2w, fov = look_at_origin(e, azimuth), uniform(*fov)
    c2w[..., :3, 3] *= (uniform(*distance) / torch.tan(torch.deg2rad(fov / 2)))[..., None]
    return c2w.flatten(0, 1), fov.expand(-1, num_views).flatten()


def camera_rays(c2w, fov, height, width):
    """Origins and unit directions, each (V, H, W, 3), of the rays through the pixels' centres."""
    fov = torch.as_tensor(fov).to(c2w).expand(len(c2w))
    focal = 0.5 * height / torch.tan(torch.deg2rad(fov / 2))[:, None, None, None]   # in pixels
    x = (torch.arange(width, device=c2w.device) + 0.5 - width / 2)[None, :, None] / focal
    y = -(torch.arange(height, device=c2w.device) + 0.5 - height / 2)[:, None, None] / focal
    right, up, back, origin = c2w[:, None, None, :3].unbind(-1)                     # (V,1,1,3)
    directions = F.normalize(x * right + y * up - back, dim=-1)
    return origin.expand_as(directions), directions


# ---- Tracing: a primitive is the cube [-1, 1]^3, stretched, turned, moved, cut by one quadric ----

SHAPES = {  # p x^2 + q y^2 + a z^2 + b z + c <= 0 in the cube's own coordinates: p, q, a, b, c
    "none": (0, 0, 0, 0, 1),                   # nowhere: what is not worn
    "box": (0, 0, 0, 0, -1),                   # everywhere in the cube
    "ball": (1, 1, 1, 0, -1),
    "tube": (1, 1, 0, 0, -1),                  # its axis is z
    "cone": (1, 1, -.25, .5, -.25),            # its tip is up
    "cup": (1, 1, -.0625, .375, -.5625),       # a cone cut off, half as wide above as below
    "dome": (1, 1, .25, .5, -.75),             # the upper half of a ball
    "arch": (0, 1, .25, .5, -.75),             # the upper half of a tube whose axis is x
    "roof": (0, 1, -.25, .5, -.25)}            # a wedge whose ridge is x
LIGHT = (.553, .352, .755)                     # fixed in the world: the front is the bright side


def trace(geometry, colors, origin, directions):
    """What each ray hits first, shaded: a pure function of tensors, for torch.compile to fuse.

    geometry (N, P, 17) = matrix into the cube (9), centre (3), quadric (5); colors (N, P, 3);
    origin (N, 3), directions (N, R, 3) -> rgb (N, R, 3) and distance (N, R), inf for a miss.
    """
    matrix, centre, quadric = geometry.split([9, 3, 5], -1)
    matrix = matrix.unflatten(-1, (3, 3))
    p, q, a, b, c = quadric[..., None].unbind(-2)                                        # (N, P, 1)
    x, y, z = (matrix * (origin[:, None] - centre)[..., None, :]).sum(-1, keepdim=True).unbind(-2)
    rx, ry, rz = directions[:, None].unbind(-1)                                          # (N, 1, R)
    u, v, w = (m[..., 0, :] * rx + m[..., 1, :] * ry + m[..., 2, :] * rz
               for m in matrix[..., None].unbind(-3))                                    # (N, P, R)

    # Cube: inside all three slabs.  A ray along a slab is tilted by a hair: no division by zero.
    near, far = -torch.inf, torch.inf
    for o, d in ((x, u), (y, v), (z, w)):
        d = torch.where(d.abs() < 1e-9, 1e-9, d)
        t0, t1 = (-1 - o) / d, (1 - o) / d
        near, far = torch.minimum(t0, t1).clamp(min=near), torch.maximum(t0, t1).clamp(max=far)

    # Quadric: A t^2 + 2 B t + C <= 0 between its roots; or outside them where A < 0, in the two
    # halves of a double cone, of which the cube keeps one.
    A = p * u * u + q * v * v + a * w * w
    A = torch.where(A.abs() < 1e-6, 1e-6, A)
    B = p * x * u + q * y * v + (a * z + b / 2) * w
    C = p * x * x + q * y * y + (a * z + b) * z + c
    D = B * B - A * C
    s = B + torch.copysign(D.clamp(min=1e-12).sqrt(), B)             # a sum that never cancels
    low, high = torch.minimum(-s / A, -C / s), torch.maximum(-s / A, -C / s)
    outer, first = A < 0, near <= low
    enter = torch.where(outer & first, near, torch.maximum(near, torch.where(outer, high, low)))
    leave = torch.where(outer & ~first, far, torch.minimum(far, torch.where(outer, low, high)))
    hit = (enter < leave) & (enter > 0) & ((D > 0) | outer)
    distance, winner = torch.where(hit, enter, torch.inf).min(1)                         # (N, R)

    # Normal of the winner, M^T n: the quadric's gradient, or the direction of the cube's face.
    won = torch.cat([geometry, colors], -1).gather(1, winner[..., None].expand(-1, -1, 20))
    matrix, centre, p, q, a, b, c, color = won.split([9, 3, 1, 1, 1, 1, 1, 3], -1)
    matrix = matrix.unflatten(-1, (3, 3))
    point = origin[:, None] + directions * torch.where(distance.isinf(), 0, distance)[..., None]
    point = (matrix * (point - centre)[..., None, :]).sum(-1)                    # in the cube
    x, y, z = point.split(1, -1)
    gradient = torch.cat([p * x, q * y, a * z + b / 2], -1)
    level = p * x * x + q * y * y + (a * z + b) * z + c
    face = point * (point.abs() == point.abs().amax(-1, keepdim=True))
    normal = (matrix * torch.where(level.abs() < 1e-3, gradient, face)[..., None]).sum(-2)
    light = sum(n * l for n, l in zip(F.normalize(normal, dim=-1).split(1, -1), LIGHT))  # -1 to 1
    return color * (0.7 + 0.3 * light), distance


def render(objects, c2w, fov, size, background, supersample=2):
    """B objects (geometry, colors) by N = B*V cameras on the unit sphere, which TOY_DISTANCE moves
    away -> rgb (N, H, W, 3), opacity (N, H, W, 1); the background broadcasts to rgb."""
    geometry, colors = (t.repeat_interleave(len(c2w) // len(t), 0) for t in objects)
    c2w, fine, pictures = c2w.to(geometry, copy=True), size * supersample, []
    c2w[:, :3, 3] *= TOY_DISTANCE
    fov = torch.as_tensor(fov).to(c2w).expand(len(c2w))
    on_cpu = c2w.device.type == "cpu"
    chunk = max(1, (2 ** 16 if on_cpu else 2 ** 20) // fine ** 2)               # so many rays
    for geometry, colors, c2w, fov in zip(*(t.split(chunk) for t in (geometry, colors, c2w, fov))):
        if on_cpu:                                       # skip "none"; a GPU prefers a fixed shape
            used = (geometry[..., -1] < SHAPES["none"][-1]).any(0)
            geometry, colors = geometry[:, used], colors[:, used]
        origins, directions = camera_rays(c2w, fov, fine, fine)
        rgb, distance = trace(geometry, colors, origins[:, 0, 0], directions.flatten(1, 2))
        hit = distance.isfinite()[..., None]
        layers = torch.where(hit, torch.cat([rgb, hit], -1), 0)                          # (n, R, 4)
        layers = layers.unflatten(1, (size, supersample, size, supersample))
        pictures.append(layers.mean((2, 4)))
    rgb, opacity = torch.cat(pictures).split([3, 1], -1)
    return rgb + (1 - opacity) * background, opacity


# ---- The world, a table: toy_world.txt ----------------------------------------------------------

COLORS = {"red": (.86, .10, .10), "orange": (.98, .50, .05), "yellow": (.98, .85, .12),
          "green": (.13, .62, .18), "cyan": (.10, .80, .82), "blue": (.10, .25, .88),
          "purple": (.52, .16, .74), "pink": (.98, .50, .70), "brown": (.42, .23, .10),
          "white": (.96, .96, .96)}
NEUTRALS = {"black": (.08, .08, .10), "grey": (.50, .51, .54), "cream": (.97, .87, .70),
            "tan": (.74, .58, .40), "peach": (.98, .66, .60), "glass": (.66, .86, .98),
            "gold": (1.0, .84, .36), "amber": (.96, .58, .12), "ruby": (.66, .05, .12)}
WORN = {"hat": "red", "scarf": "blue", "flag": "red"}             # named without its colour
FLAT_CATEGORIES, FLAT_COLORS = ("cat", "penguin", "truck"), ("cyan", "purple")    # seen only in 2D


def read_world(path):
    """{category: (default colour, {part: default colour, "" if worn}, [primitive])}"""
    world = {}
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("  "):
            world[name][2].extend(line.split("|"))
        elif line and not line.startswith("#"):
            name, color, *parts = line.split()
            world[name] = color, dict(part.partition("=")[::2] for part in parts), []
    return world


CATEGORIES = read_world(Path(__file__).with_name("toy_world.txt"))
PAINTS = COLORS | NEUTRALS
NAMES, HUES, PAINT = list(CATEGORIES), list(COLORS), list(PAINTS)
SUFFIX = ", 3d asset"                       # ends the captions of 3D training data


def read_primitive(text):
    """-> [(colour's name, geometry (17,))], one or a mirrored pair."""
    shape, color, *numbers = text.split()
    x, y, z, *half = (int(n.lstrip("±")) / 100 for n in numbers[:6])
    rows, axes = [], torch.eye(3)
    for side in (1, -1) if "±" in text else (1,):
        turn = torch.eye(3)
        for word in numbers[6:]:                    # a mirror turns x and z the other way
            angle = math.radians(int(word[1:])) * (1 if word[0] == "y" else side)
            spin = torch.linalg.cross(angle * axes["xyz".index(word[0])].expand(3, 3), axes).T
            turn = torch.linalg.matrix_exp(spin) @ turn
        cube = (turn.T / torch.tensor(half)[:, None]).flatten()                # world to cube
        rows.append((color, torch.cat([cube, torch.tensor([x, side * y, z, *SHAPES[shape]])])))
    return rows


@functools.cache
def templates():
    """Every category with all it can wear: geometry (C, P, 17); paint (C, P), an index of PAINTS or
    -1 main, -2 first part, -3 second part; unnamed (C, 3), these three's default paint, -1 none."""
    geometry, paint, unnamed = [], [], []
    for color, parts, primitives in CATEGORIES.values():
        own = ["main", *parts]
        rows = [row for text in primitives for row in read_primitive(text)]
        rows += read_primitive("none black 0 0 0 100 100 100") * (24 - len(rows))
        geometry.append(torch.stack([row for _, row in rows]))
        paint.append([-1 - own.index(c) if c in own else PAINT.index(c) for c, _ in rows])
        unnamed.append([PAINT.index(c) if c else -1 for c in (color, *parts.values(), "", "")][:3])
    return torch.stack(geometry), torch.tensor(paint), torch.tensor(unnamed)


def build(specs, device="cpu"):
    """B objects of specs (B, 4), all by table look-up: geometry (B, P, 17), colors (B, P, 3)."""
    geometry, paint, unnamed = (table[specs[:, 0]] for table in templates())
    chosen = torch.where(specs[:, 1:] < 0, unnamed, specs[:, 1:])
    paint = torch.where(paint < 0, chosen.gather(1, (-1 - paint).clamp(min=0)), paint)
    geometry[..., 12:][paint < 0] = torch.tensor(SHAPES["none"], dtype=torch.float)      # not worn
    return geometry.to(device), torch.tensor(list(PAINTS.values()))[paint].to(device)


# ---- Captions ------------------------------------------------------------------------------------
# A spec is four numbers: category, main colour, colour of the first and the second named part, as
# indices of NAMES and HUES, or -1 for a part that the caption does not name.


def sentence(name, color, parts):
    """"a red robot wearing a blue hat"; parts {part: colour}; an unsaid colour is ""."""
    def phrase(color, noun):
        text = f"{color} {noun}".strip()
        several = noun.endswith("s") and noun not in NAMES
        return text if several else f"an {text}" if text[0] in "aeiou" else f"a {text}"
    verb = " wearing " if "hat" in CATEGORIES[name][1] else " with "
    things = " and ".join(phrase(color, part) for part, color in parts.items())
    return phrase(color, name) + (things and verb + things)


def format_caption(spec, said=(True, True, True)):
    """A spec's caption; said: which of its colours to say."""
    name, words = NAMES[spec[0]], [HUES[c] if s else "" for c, s in zip(spec[1:], said)]
    parts = zip(CATEGORIES[name][1], words[1:], spec[2:])
    return sentence(name, words[0], {part: word for part, word, c in parts if c >= 0})


def parse_caption(caption):
    """The spec of a caption that reads just as format_caption writes, or so with ", 3d asset"."""
    hues, text = f"(?:({'|'.join(HUES)}) )?", caption.removesuffix(SUFFIX)
    match = re.fullmatch(rf"an? {hues}({'|'.join(NAMES)})(?: (?:wearing|with) (.+))?", text)
    if match:
        color, name, things = match.groups(default="")
        default, parts, _ = CATEGORIES[name]
        found = {part: c for c, part in re.findall(rf"{hues}(\w+)(?: and |$)", things)}
        if text == sentence(name, color, {part: found[part] for part in parts if part in found}):
            worn = [found[p] or WORN.get(p) if p in found else None for p in parts]
            colors = [color or default, *worn, None, None][:3]
            return NAMES.index(name), *(HUES.index(c) if c else -1 for c in colors)
    things = "; ".join(" ".join([n, *(f"+{p}" for p in CATEGORIES[n][1])]) for n in NAMES)
    raise ValueError(f"the toy world cannot read the caption {caption!r}: write it like 'a red "
                     "robot wearing a blue hat and a green scarf' or 'an orange car with blue "
                     f"wheels', with the colours {', '.join(HUES)} and the things {things}")


# ---- The split: what is seen in 3D, only in 2D, nowhere ------------------------------------------

def splits(specs):
    """THE rule, for training and evaluation: specs (..., 4) -> 0, 1 or 2 (...).

    2  in no set: a hashed fifth of all specs
    1  in the 2D set alone: of the others, those of FLAT_CATEGORIES, those with any of FLAT_COLORS
    0  in both sets: the rest
    """
    h = (specs + 1) @ torch.tensor([1, 31, 961, 29791])
    for factor in (2246822519, 3266489917):
        h = ((h ^ (h >> 15)) * factor) & 0xFFFFFFFF
    return torch.where((h >> 8) % 5 == 0, 2, is_flat(specs).any(-1).long())


def is_flat(specs):
    """Which of the four numbers are a category or a colour of 2D only: bool (..., 4)."""
    names, hues = map(NAMES.index, FLAT_CATEGORIES), map(HUES.index, FLAT_COLORS)
    return torch.cat([torch.isin(specs[..., :1], torch.tensor([*names])),
                      torch.isin(specs[..., 1:], torch.tensor([*hues]))], -1)


@functools.cache
def all_specs():
    """Every spec (S, 4), and how often to draw it (S,): categories alike, each part named in .6."""
    options = [-1, *range(len(HUES))]
    specs = torch.tensor([(i, main, a, b) for i, (_, parts, _) in enumerate(CATEGORIES.values())
                          for main in options[1:] for a in options
                          for b in (options if len(parts) > 1 else [-1])])
    weight = torch.where(specs[:, 2:] < 0, 0.4, 0.06).prod(1)
    return specs, weight / torch.bincount(specs[:, 0], weight)[specs[:, 0]]


# ---- The truth, and the two training sets --------------------------------------------------------

def toy_render(captions, c2w, size=128, background=0.5, supersample=2, device="cpu"):
    """The truth of B captions at cameras (V, 4, 4) or (B, V, 4, 4) on the unit sphere:
    {rgb (B, V, H, W, 3) in [0, 1], opacity (B, V, H, W, 1)}."""
    objects = build(torch.tensor([parse_caption(caption) for caption in captions]), device)
    c2w = c2w.expand(len(captions), *c2w.shape[-3:])
    pictures = render(objects, c2w.flatten(0, 1), TOY_FOV, size, background, supersample)
    return {k: v.unflatten(0, c2w.shape[:2]) for k, v in zip(("rgb", "opacity"), pictures)}


def draw(num, weight, generator=None):
    """num specs (num, 4), drawn with weights (S,) on top of all_specs()'s, and their captions, in
    which each colour word is left out once in ten times."""
    specs, usual = all_specs()
    specs = specs[torch.multinomial(usual * weight, num, True, generator=generator)]
    said = torch.rand(num, 3, generator=generator) >= 0.1
    return specs, [format_caption(*row) for row in zip(specs.tolist(), said.tolist())]


def toy_views(num_sets, num_views=4, size=128, generator=None, device="cpu"):
    """The 3D set: images (B*V, 3, H, W), c2w (B*V, 4, 4) on the unit sphere, captions [B].

    A set: one elevation of 0 to 30, evenly spaced views from any azimuth, one plain grey behind.
    """
    specs, captions = draw(num_sets, splits(all_specs()[0]) == 0, generator)
    azimuth, elevation, grey = torch.rand(3, num_sets, 1, generator=generator)
    c2w = look_at_origin(30 * elevation, 360 * (azimuth + torch.arange(num_views) / num_views))
    c2w, grey = c2w.flatten(0, 1), grey.repeat_interleave(num_views)[:, None, None, None].to(device)
    rgb, _ = render(build(specs, device), c2w, TOY_FOV, size, grey)
    return 2 * rgb.movedim(-1, 1) - 1, c2w.to(device), [c + SUFFIX for c in captions]


def toy_pictures(num, size=128, generator=None, device="cpu"):
    """The 2D set: single images (N, 3, H, W) of the wider world, no cameras, captions [N].

    Any azimuth, elevation -10 to 60, loose framing, two busy backgrounds for each plain one.  The
    categories that only this set shows come three times as often as the others.
    """
    specs, _ = all_specs()
    weight = (splits(specs) < 2) * (1 + 2 * is_flat(specs)[:, 0])
    specs, captions = draw(num, weight, generator)
    elevation, azimuth, distance, fov = torch.rand(4, num, generator=generator)
    c2w = look_at_origin(70 * elevation - 10, 360 * azimuth)
    aside = c2w[:, :3, :2] @ (0.06 * torch.rand(num, 2, 1, generator=generator) - 0.03)
    c2w[:, :3, 3] = (1 + 0.25 * distance[:, None]) * c2w[:, :3, 3] + aside[..., 0]
    behind = draw_backgrounds(num, size, generator, device)
    rgb, _ = render(build(specs, device), c2w, 37 + 6 * fov, size, behind)
    return 2 * rgb.movedim(-1, 1) - 1, None, captions


def draw_backgrounds(num, size, generator=None, device="cpu"):
    """(N, H, W, 3): a sixth each of grey, plain, a gradient, stripes, a tiled floor, discs."""
    def rand(*shape):
        return torch.rand(num, *shape, 1, 1, generator=generator).to(device)
    style, angle, scale, color = 6 * rand(1), 6.28 * rand(1), 4 + 8 * rand(1), rand(3, 3)
    x = torch.linspace(-1, 1, size, device=device).expand(1, 1, size, size)
    y = -x.transpose(2, 3)
    across, below = x * torch.cos(angle) + y * torch.sin(angle), (rand(1) - 0.5 - y).clamp(min=0.04)
    tiles = torch.sin(scale * (x + rand(1) - 0.5) / below) * torch.sin(scale / below)
    centre, radius = 2 * rand(2, 4) - 1, 0.2 + 0.5 * rand(4)
    discs = 1 - torch.hypot(x - centre[:, 0], y - centre[:, 1]) / radius         # (N, 4, H, W)
    masks = [torch.ones_like(across), across / 2.8 + 0.5, 20 * torch.sin(scale * across),
             20 * tiles * (below > 0.04), 20 * discs.amax(1, keepdim=True)]
    which = (style - 1).clamp(min=0).long().expand(-1, 1, size, size)
    front = torch.where(style < 1, color[:, 0, :1], color[:, 0])
    behind = torch.lerp(color[:, 1], color[:, 2], 0.5 + 0.5 * y)
    mask = torch.cat(masks, 1).clamp(0, 1).gather(1, which)
    return torch.lerp(behind, front, mask).movedim(1, -1)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["render"]:
            from render import main
            main(sys.argv[2:])
        elif sys.argv[1:2] in (["-h"], ["--help"]):
            print(__doc__)
        elif sys.argv[1:]:
            from sources import check
            print(check(sys.argv[1], "outputs/data.png"))
            print("outputs/data.png: what training would see of it")
        else:
            from sources import toy_sheet
            toy_sheet("outputs/toy_world.png")
            print("outputs/toy_world.png: every category of the toy world")
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("data.py: stopped")
