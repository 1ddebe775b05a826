"""Cameras, rays and the toy world: MVDream's data (paper section 3.3, "multi-view rendering") in miniature.

Conventions, for the whole project
    world    right-handed, z up; an object stands at the origin, faces +x and fits the unit sphere
    angles   degrees; azimuth 0 sees the front (camera on +x) and grows from +x to +y; elevation up
    camera   c2w, a 4x4 camera-to-world matrix, OpenGL axes: x right, y up, looking along -z
    views    flattened view-fastest, (B*V, ...): the V views of one object are neighbours
    fov      vertical field of view in degrees
    pictures (N, 3, H, W) in [-1, 1] for the diffusion model, (..., H, W, 3) in [0, 1] for the NeRF

Letters: B objects, V views of each, N = B*V pictures, R rays of a picture, P primitives of an object.

The toy world.  An object is at most P = 24 coloured primitives, ray-traced exactly.  Its caption
determines it fully: "a red robot wearing a blue hat", "an orange car with blue wheels".  What a caption
leaves out has the default that WORLD writes down.  `python data.py` draws every category.
"""
import functools
import math
import os
import re
import sys

import torch
import torch.nn.functional as F

TOY_FOV = 40.0                                                # the toy world's one camera: the diffusion
TOY_DISTANCE = 1 / math.tan(math.radians(TOY_FOV / 2))        # model is never told fov and distance

# ---- Cameras and rays ----------------------------------------------------------------------------


def look_at_origin(elevation, azimuth):
    """Cameras on the unit sphere, looking at the origin: angles (...,) in degrees -> c2w (..., 4, 4)."""
    e, a = torch.broadcast_tensors(torch.deg2rad(elevation), torch.deg2rad(azimuth))
    zero, one = torch.zeros_like(e), torch.ones_like(e)
    right = torch.stack([-a.sin(), a.cos(), zero, zero], -1)
    up = torch.stack([-e.sin() * a.cos(), -e.sin() * a.sin(), e.cos(), zero], -1)
    back = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin(), zero], -1)
    return torch.stack([right, up, back, back + torch.stack([zero, zero, zero, one], -1)], -1)


def orbit_cameras(num_views, elevation=15.0, azimuth=0.0, span=360.0):
    """(V, 4, 4): views spread evenly over `span` degrees from `azimuth` on, on the unit sphere."""
    steps = torch.arange(num_views) * (span / num_views)
    return look_at_origin(torch.tensor(float(elevation)), azimuth + steps)


def random_view_cameras(num_sets, num_views, generator=None, fov=(15.0, 60.0), distance=(0.8, 1.0),
                        elevation=(0.0, 30.0)):
    """MVDream's cameras for score distillation -> c2w (B*V, 4, 4) and fov (B*V,).

    The V views of a set are evenly spaced in azimuth and share elevation, fov and distance.  The distance
    is a multiple of 1/tan(fov/2), at which the unit sphere's equator just fills the picture.
    """
    def uniform(low, high):
        return low + (high - low) * torch.rand(num_sets, 1, generator=generator)
    azimuth = (uniform(0, 1) + torch.arange(num_views)) / num_views * 360 - 180
    # Half the sets uniform in angle, half "uniform on the sphere" in the released code's own way: it turns
    # the limits into fractions of the angle, not of the sine, so that (0, 30) gives 0 to 19.5 degrees.
    flat = uniform(*elevation)
    round_ = torch.rad2deg(torch.asin(2 * uniform(*((e + 90) / 180 for e in elevation)) - 1))
    c2w = look_at_origin(torch.where(uniform(0, 1) < 0.5, flat, round_), azimuth)
    angle = uniform(*fov)
    c2w[..., :3, 3] *= (uniform(*distance) / torch.tan(torch.deg2rad(angle / 2)))[..., None]
    return c2w.flatten(0, 1), angle.expand(-1, num_views).flatten()


def camera_rays(c2w, fov, height, width):
    """Rays through the pixel centres: origins and unit directions, each (V, H, W, 3)."""
    fov = torch.as_tensor(fov, dtype=c2w.dtype, device=c2w.device).expand(len(c2w))
    focal = 0.5 * height / torch.tan(torch.deg2rad(fov / 2))                       # in pixels
    x = (torch.arange(width, device=c2w.device) + 0.5 - width / 2)[None, None, :] / focal[:, None, None]
    y = -(torch.arange(height, device=c2w.device) + 0.5 - height / 2)[None, :, None] / focal[:, None, None]
    right, up, back, origin = c2w[:, None, None, :3].unbind(-1)
    directions = F.normalize(x[..., None] * right + y[..., None] * up - back, dim=-1)
    return origin.expand_as(directions), directions


# ---- Tracing: every primitive is the cube [-1, 1]^3, moved and stretched, cut by one quadric -------
#      p x^2 + q y^2 + a z^2 + b z + c <= 0        (in the cube's own coordinates)

SHAPES = {          # p  q    a      b      c
    "none":          (0, 0, 0.00, 0.00, 1.00),                # nowhere: an accessory that is not worn
    "box":           (0, 0, 0.00, 0.00, -1.00),
    "ball":          (1, 1, 1.00, 0.00, -1.00),
    "tube":          (1, 1, 0.00, 0.00, -1.00),               # its axis is z
    "cone":          (1, 1, -.25, 0.50, -.25),                # tip up
    "cup":           (1, 1, -.0625, .375, -.5625),            # a cone cut off: half as wide on top
    "dome":          (1, 1, 0.25, 0.50, -.75),                # the upper half of a ball
    "arch":          (0, 1, 0.25, 0.50, -.75),                # the upper half of a tube along x
    "roof":          (0, 1, -.25, 0.50, -.25),                # a ridge along x
}
LIGHT = F.normalize(torch.tensor([0.55, 0.35, 0.75]), dim=0)  # fixed in the world: the front is bright
AMBIENT, DIFFUSE = 0.40, 0.60


def trace(geometry, colors, origin, directions):
    """The nearest hit of each ray, shaded: one pure function of tensors, for torch.compile to fuse.

    geometry (N, P, 17) holds the matrix into the primitive's cube (9), its centre (3) and p, q, a, b, c;
    colors (N, P, 3); origin (N, 3); directions (N, R, 3) -> rgb (N, R, 3), depth (N, R), inf for a miss.
    """
    matrix, centre, quadric = geometry.split([9, 3, 5], dim=-1)
    matrix = matrix.unflatten(-1, (3, 3))
    p, q, a, b, c = quadric[..., None].unbind(-2)                                  # each (N, P, 1)
    o = (matrix * (origin[:, None] - centre)[..., None, :]).sum(-1)                # the ray in the cube
    x, y, z = o[..., None].unbind(-2)
    rx, ry, rz = directions[:, None].unbind(-1)                                    # (N, 1, R)
    m = matrix[..., None].unbind(-3)
    u, v, w = (r[..., 0, :] * rx + r[..., 1, :] * ry + r[..., 2, :] * rz for r in m)   # (N, P, R)

    # The cube: three slabs.  A ray parallel to one is tilted by a hair instead of divided by zero.
    near, far = None, None
    for o_i, d_i in ((x, u), (y, v), (z, w)):
        d_i = torch.where(d_i.abs() < 1e-9, 1e-9, d_i)
        t0, t1 = (-1 - o_i) / d_i, (1 - o_i) / d_i
        low, high = torch.minimum(t0, t1), torch.maximum(t0, t1)
        near = low if near is None else torch.maximum(near, low)
        far = high if far is None else torch.minimum(far, high)

    # The quadric: A t^2 + 2 B t + C <= 0.  Inside lies between the roots, or outside them for A < 0
    # (both halves of a double cone, of which the cube keeps one).
    A = p * u * u + q * v * v + a * w * w
    A = torch.where(A.abs() < 1e-6, 1e-6, A)
    B = p * x * u + q * y * v + (a * z + b / 2) * w
    C = p * x * x + q * y * y + a * z * z + b * z + c
    square = B * B - A * C
    s = B + torch.copysign(square.clamp(min=1e-12).sqrt(), B)                      # no cancellation
    low, high = torch.minimum(-s / A, -C / s), torch.maximum(-s / A, -C / s)
    enter = torch.where(A > 0, torch.maximum(near, low),
                        torch.where(near <= low, near, torch.maximum(near, high)))
    leave = torch.where(A > 0, torch.minimum(far, high),
                        torch.where(near <= low, torch.minimum(far, low), far))
    hit = (enter < leave) & (enter > 0) & ((square > 0) | (A < 0))
    depth, index = torch.where(hit, enter, torch.inf).min(1)                       # (N, R)

    # The normal of the winner: the quadric's gradient, or the face of the cube.
    def winner(values):
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
    matrix, centre, quadric = winner(geometry).split([9, 3, 5], dim=-1)
    matrix = matrix.unflatten(-1, (3, 3))
    point = origin[:, None] + depth.nan_to_num(posinf=0.0)[..., None] * directions
    x = (matrix * (point - centre)[..., None, :]).sum(-1)
    p, q, a, b, c = quadric.unbind(-1)
    gradient = torch.stack([p * x[..., 0], q * x[..., 1], a * x[..., 2] + b / 2], -1)
    level = (gradient * x).sum(-1) + b / 2 * x[..., 2] + c
    face = torch.where(x.abs() == x.abs().amax(-1, keepdim=True), x.sign(), 0.0)
    normal = torch.where(level.abs()[..., None] < 1e-3, gradient, face)
    normal = F.normalize((matrix * normal[..., None]).sum(-2), dim=-1)             # M^T n
    light = (normal * LIGHT.to(normal)).sum(-1, keepdim=True)
    return winner(colors) * (AMBIENT + DIFFUSE * (0.5 + 0.5 * light)), depth


def render(objects, c2w, fov, distance, size, background, supersample=2):
    """Pictures of B objects by N = B*V cameras: rgb (N, H, W, 3), opacity and depth (N, H, W, 1).

    objects = (geometry, colors); distance multiplies the cameras' translations; the background broadcasts
    to rgb.  Depth is the distance along the ray, averaged over a pixel's rays that hit, 0 where none does.
    """
    views = len(c2w) // len(objects[0])
    geometry, colors = (t.repeat_interleave(views, 0) for t in objects)
    c2w = torch.cat([c2w[..., :3], c2w[..., 3:] * c2w.new_tensor([distance] * 3 + [1])[:, None]], -1)
    c2w, N, P, fine, parts = c2w.to(geometry), len(c2w), geometry.shape[1], size * supersample, []
    fov = torch.as_tensor(fov).to(geometry).expand(N)
    budget = 2 ** 18 if c2w.device.type == "cpu" else 2 ** 25          # rays * primitives at a time
    pictures, rays = max(1, budget // (fine * fine * P)), min(fine * fine, max(1, budget // P))
    for i in range(0, N, pictures):
        n = slice(i, i + pictures)
        origins, directions = camera_rays(c2w[n], fov[n], fine, fine)
        hits = [trace(geometry[n], colors[n], origins[:, 0, 0], d) for d in directions.flatten(1, 2).split(rays, 1)]
        rgb, depth = (torch.cat(values, 1) for values in zip(*hits))
        hit = depth.isfinite()[..., None]
        layers = torch.cat([rgb * hit, hit, torch.where(hit, depth[..., None], 0)], -1)      # (n, R, 5)
        parts.append(layers.unflatten(1, (size, supersample, size, supersample)).mean((2, 4)))
    rgb, opacity, depth = torch.cat(parts).split([3, 1, 1], -1)
    return rgb + (1 - opacity) * background, opacity, depth / opacity.clamp(min=1e-6)


# ---- The world, as a table -----------------------------------------------------------------------
# A category: its name, its default colour, and its named parts.  A part is worn or flown (hat, scarf,
# flag), absent unless the caption names it; or built in, with =DEFAULT, the colour of an unnamed one.
# A primitive: shape, colour, centre x y z, half-sizes x y z, turns (y90: 90 degrees about y, in order).
# ± on y makes a pair, mirrored.  A colour is the body's ("main"), a part's, or one of the neutrals.

COLORS = {
    "red": (.86, .10, .10), "orange": (.98, .50, .05), "yellow": (.98, .85, .12), "green": (.13, .62, .18),
    "cyan": (.10, .80, .82), "blue": (.10, .25, .88), "purple": (.52, .16, .74), "pink": (.98, .50, .70),
    "brown": (.42, .23, .10), "white": (.96, .96, .96)}
NEUTRALS = {
    "black": (.08, .08, .10), "grey": (.50, .51, .54), "cream": (.97, .87, .70), "tan": (.74, .58, .40),
    "peach": (.98, .66, .60), "glass": (.66, .86, .98), "gold": (1.0, .84, .36), "amber": (.96, .58, .12),
    "ruby": (.66, .05, .12)}
WORN = {"hat": "red", "scarf": "blue", "flag": "red"}          # the colour of one that the caption leaves open

WORLD = """
bear brown: hat scarf
ball main 0 0 -.36 .30 .33 .33 | ball cream .13 0 -.36 .21 .24 .25 | ball main 0 0 .20 .30 .34 .30
ball main 0 ±.29 .43 .08 .13 .13 | ball cream .27 0 .11 .13 .15 .11 | ball black .39 0 .17 .05 .07 .05
ball black .25 ±.14 .29 .06 .06 .06 | ball main .14 ±.36 -.26 .13 .11 .22 x25 y-30
ball main .26 ±.21 -.68 .24 .14 .14 | ball cream .47 ±.21 -.66 .05 .10 .10 | ball cream -.31 0 -.54 .11 .11 .11
tube hat 0 0 .49 .31 .31 .04 | cup hat 0 0 .68 .23 .23 .17 | ball scarf 0 0 -.08 .31 .33 .10 | box scarf .28 .12 -.24 .06 .07 .16

dog brown: hat scarf
ball main -.16 0 -.32 .36 .22 .22 | tube main .12 ±.13 -.60 .09 .09 .20 | tube main -.38 ±.13 -.60 .09 .09 .20
ball main .24 0 .14 .28 .28 .27 | ball cream .48 0 .04 .18 .15 .12 | ball black .64 0 .10 .06 .08 .06
ball black .43 ±.14 .25 .06 .06 .06 | ball black .18 ±.29 .08 .11 .06 .23 x12 | ball main -.54 0 -.10 .08 .08 .22 y-35
tube hat .20 0 .40 .28 .28 .04 | cup hat .20 0 .58 .21 .21 .16 | ball scarf .15 0 -.14 .25 .25 .09 | box scarf .37 .10 -.30 .06 .07 .16

cat orange: hat scarf
ball main -.16 0 -.32 .36 .22 .22 | tube main .12 ±.13 -.60 .09 .09 .20 | tube main -.38 ±.13 -.60 .09 .09 .20
ball main .24 0 .14 .26 .30 .26 | ball cream .45 ±.07 .04 .09 .10 .08 | ball peach .53 0 .09 .05 .05 .04
ball black .42 ±.14 .22 .06 .07 .08 | cone main .22 ±.20 .41 .09 .12 .16 x-18 | ball main -.52 0 .02 .08 .08 .32 y-30
tube hat .18 0 .40 .24 .24 .04 | cup hat .18 0 .58 .18 .18 .16 | ball scarf .15 0 -.14 .25 .25 .09 | box scarf .37 .10 -.30 .06 .07 .16

rabbit white: hat scarf
ball main -.04 0 -.44 .32 .30 .34 | ball cream .11 0 -.44 .20 .21 .26 | ball main .02 0 .08 .27 .28 .26
ball main -.04 ±.20 .54 .07 .11 .30 x-14 | ball peach .02 ±.20 .54 .04 .06 .22 x-14
ball cream .25 ±.07 0 .08 .09 .07 | ball peach .32 0 .06 .05 .06 .05 | ball black .23 ±.13 .15 .06 .06 .07
ball main .24 ±.17 -.76 .22 .11 .08 | ball cream -.38 0 -.58 .13 .13 .13
tube hat .04 0 .31 .24 .24 .04 | cup hat .04 0 .49 .17 .17 .16 | ball scarf .02 0 -.16 .28 .28 .09 | box scarf .28 .10 -.30 .06 .07 .15

elephant blue: hat scarf
ball main -.14 0 -.28 .40 .30 .30 | tube main .12 ±.16 -.62 .11 .11 .20 | tube main -.38 ±.16 -.62 .11 .11 .20
ball main .26 0 .16 .28 .28 .27 | ball main .16 ±.40 .18 .07 .24 .26 z20 | ball peach .20 ±.42 .18 .05 .17 .19 z20
ball main .54 0 .06 .12 .10 .12 | tube main .58 0 -.14 .08 .08 .22 | ball black .47 ±.15 .24 .06 .06 .06
cone white .54 ±.14 -.08 .05 .05 .13 x180 | tube hat .22 0 .42 .28 .28 .04 | cup hat .22 0 .60 .21 .21 .16
ball scarf .12 0 -.10 .27 .27 .09 | box scarf .36 .18 -.26 .06 .07 .16

duck yellow: hat scarf
ball main -.10 0 -.38 .46 .34 .30 | cone main -.56 0 -.22 .14 .16 .22 y-50 | ball main .20 0 .14 .28 .28 .27
ball amber .52 0 .06 .20 .17 .07 | ball black .40 ±.15 .24 .06 .06 .07 | ball main -.14 ±.32 -.32 .30 .08 .19 y12
ball amber .10 ±.16 -.76 .20 .14 .06 | tube amber 0 ±.16 -.68 .05 .05 .10
tube hat .17 0 .40 .28 .28 .04 | cup hat .17 0 .58 .21 .21 .16 | ball scarf .14 0 -.12 .26 .26 .09 | box scarf .36 .10 -.28 .06 .07 .16

penguin blue: hat scarf
ball main 0 0 -.36 .32 .36 .44 | ball cream .11 0 -.36 .25 .27 .38 | ball main 0 0 .18 .30 .32 .29
ball cream .16 ±.11 .17 .15 .14 .18 | cone amber .38 0 .12 .11 .09 .14 y90 | ball black .28 ±.12 .24 .05 .06 .07
ball main 0 ±.38 -.30 .14 .07 .30 x18 | ball amber .18 ±.17 -.78 .20 .14 .07
tube hat 0 0 .45 .30 .30 .04 | cup hat 0 0 .64 .22 .22 .17 | ball scarf 0 0 -.06 .30 .31 .09 | box scarf .30 .12 -.22 .06 .07 .16

snowman white: hat scarf
ball main 0 0 -.47 .40 .40 .38 | ball main 0 0 .00 .29 .29 .27 | ball main 0 0 .36 .24 .24 .23
cone amber .36 0 .34 .08 .08 .19 y90 | ball black .20 ±.10 .44 .06 .06 .06 | ball black .28 0 .06 .05 .06 .06
ball black .37 0 -.38 .05 .06 .06 | tube tan 0 ±.44 .10 .05 .05 .24 x-60
tube hat 0 0 .55 .26 .26 .04 | cup hat 0 0 .71 .19 .19 .14 | ball scarf 0 0 .19 .27 .27 .08 | box scarf .27 .12 .04 .05 .07 .14

robot red: hat scarf
box main 0 0 -.20 .21 .30 .28 | box main 0 0 .32 .22 .28 .19 | box grey .02 ±.16 -.64 .14 .11 .18
tube glass .22 ±.13 .38 .09 .09 .06 y90 | box black .22 0 .22 .04 .16 .04 | box gold .21 0 -.16 .04 .16 .13
tube grey 0 ±.38 -.24 .09 .09 .24 x8 | ball grey .03 ±.42 -.48 .11 .11 .11 | box black -.26 0 -.16 .08 .20 .19
tube gold 0 ±.32 .33 .09 .09 .06 x90 | tube hat 0 0 .54 .27 .27 .04 | cup hat 0 0 .70 .20 .20 .15
ball scarf 0 0 .10 .30 .34 .08 | box scarf .25 .14 -.06 .05 .08 .15

car red: wheels=black
box main 0 0 -.18 .72 .34 .17 | arch glass -.10 0 .16 .30 .35 .19 z90 | box main -.10 0 .30 .24 .27 .05
tube wheels .42 ±.33 -.36 .19 .19 .10 x90 | tube wheels -.44 ±.33 -.36 .19 .19 .10 x90
tube cream .42 ±.42 -.36 .08 .08 .03 x90 | tube cream -.44 ±.42 -.36 .08 .08 .03 x90
tube gold .72 ±.22 -.14 .09 .09 .05 y90 | box grey .72 0 -.28 .05 .30 .06 | box ruby -.72 ±.24 -.14 .04 .08 .07

bus yellow: wheels=black
box main 0 0 .04 .74 .30 .34 | arch main 0 0 .44 .74 .30 .08 | box glass .02 0 .16 .60 .32 .12 | box glass .74 0 .14 .03 .25 .16
tube wheels .42 ±.28 -.36 .17 .17 .09 x90 | tube wheels -.42 ±.28 -.36 .17 .17 .09 x90
tube cream .42 ±.36 -.36 .07 .07 .03 x90 | tube cream -.42 ±.36 -.36 .07 .07 .03 x90
tube gold .74 ±.20 -.16 .07 .07 .05 y90 | box ruby -.74 ±.22 -.16 .03 .07 .07

truck red: box=white wheels=black
box main .46 0 -.06 .24 .32 .34 | box glass .54 0 .10 .18 .34 .13 | box box -.24 0 .08 .46 .35 .40
box grey 0 0 -.38 .70 .28 .06 | tube wheels .46 ±.29 -.44 .17 .17 .09 x90 | tube wheels -.42 ±.29 -.44 .17 .17 .09 x90
tube cream .46 ±.37 -.44 .07 .07 .03 x90 | tube cream -.42 ±.37 -.44 .07 .07 .03 x90
tube gold .70 ±.20 -.20 .08 .08 .05 y90 | box black .70 0 -.32 .04 .28 .05 | box black -.70 0 .08 .02 .05 .34

boat blue: sail=cream flag
arch main -.12 0 -.54 .54 .28 .25 x180 | cone main .52 0 -.54 .26 .28 .25 x180
box tan -.12 0 -.36 .50 .24 .04 | tube tan .06 0 .14 .05 .05 .66 | roof sail -.24 0 .16 .10 .10 .40

plane white: wings=grey
ball main .02 0 -.06 .80 .20 .20 | ball glass .22 0 .12 .24 .14 .12 | box wings .12 0 -.10 .20 .86 .05
box wings -.62 0 .02 .12 .34 .05 | box wings -.66 0 .20 .12 .05 .20 y-20 | tube black .80 0 -.06 .10 .10 .05 y90
box tan .84 0 -.06 .04 .06 .34 | cone ruby .86 0 -.06 .08 .08 .08 y90 | tube black .26 ±.18 -.38 .11 .11 .06 x90
box grey .26 ±.18 -.26 .05 .04 .12

rocket white: fins=ruby
ball main 0 0 .08 .34 .34 .82 | tube grey 0 0 -.66 .20 .20 .10 | cone fins 0 0 .70 .20 .20 .20
tube gold .32 0 .22 .15 .15 .07 y90 | tube glass .36 0 .22 .10 .10 .06 y90 | box black .30 0 -.22 .06 .14 .20
box fins 0 ±.34 -.56 .06 .18 .20 | box fins -.36 0 -.56 .18 .06 .20

chair brown: seat=cream
box seat 0 0 -.14 .44 .42 .09 | box main -.38 0 .34 .07 .42 .46 | box main .36 ±.34 -.53 .07 .07 .30
box main -.36 ±.34 -.53 .07 .07 .30 | box seat -.29 0 .38 .05 .30 .26

lamp white: shade=cream
cup shade 0 0 .42 .54 .54 .40 | tube main 0 0 -.30 .08 .08 .46 | dome main 0 0 -.72 .40 .40 .12 
ball gold .34 0 -.58 .10 .10 .07 | ball main 0 0 -.16 .16 .16 .16

house white: roof=tan flag
box main 0 0 -.34 .46 .42 .34 | roof roof 0 0 .24 .58 .58 .30 | box tan .46 0 -.44 .03 .13 .24 | box glass .46 ±.28 -.24 .03 .09 .12
box glass -.46 0 -.24 .03 .20 .14 | box glass 0 ±.42 -.24 .20 .03 .12

castle pink: roof=grey flag
box main -.08 0 -.42 .36 .44 .34 | tube main .34 ±.40 -.30 .18 .18 .46 | cone roof .34 ±.40 .34 .24 .24 .20
tube main -.16 0 .06 .24 .24 .40 | cone roof -.16 0 .62 .30 .30 .24 | box tan .30 0 -.56 .02 .14 .20

mug blue: handle=cream
tube main 0 0 -.05 .50 .50 .58 | tube tan 0 0 .50 .43 .43 .045 | ball black .47 ±.18 .10 .07 .07 .09
ball peach .44 ±.30 -.08 .07 .08 .06 | tube handle 0 .66 .18 .07 .07 .2 x90 | tube handle 0 .66 -.28 .07 .07 .2 x90 
tube handle 0 .80 -.05 .08 .08 .30 | box black .50 0 -.10 .04 .09 .04

teapot white: lid=cream
ball main 0 0 -.12 .52 .52 .44 | dome lid 0 0 .32 .32 .32 .12 | ball lid 0 0 .48 .11 .11 .11
cone main .62 0 .02 .16 .14 .34 y50 | tube main -.66 0 -.10 .07 .07 .26

mushroom red: spots=cream
dome main 0 0 .32 .78 .78 .30 | tube cream 0 0 -.32 .30 .30 .42 | ball black .28 ±.13 -.18 .06 .06 .09
ball spots .40 0 .42 .14 .2 .12

cactus green: pot=tan hat
ball main 0 0 .06 .28 .28 .56 | cup pot 0 0 -.62 .42 .42 .24 x180 | ball main 0 ±.40 .0 .22 .12 .12
ball main 0 ±.5 .2 .12 .12 .24
"""
PARTICULAR = 2                                                 # named parts of a category, at most


def read_world(text=WORLD):
    """{category: (default colour, {part: default or None}, its lines)}"""
    categories = {}
    for block in text.strip().split("\n\n"):
        header, *lines = block.split("\n")
        (name, color), parts = header.split(":")[0].split(), header.split(":")[1].split()
        parts = dict((part.split("=") + [None])[:2] for part in parts)
        categories[name] = (color, parts, lines)
    return categories


CATEGORIES = read_world()                                      # 24 of them
NAMES, HUES = list(CATEGORIES), list(COLORS)
PALETTE = list((COLORS | NEUTRALS).values())
FLAT_CATEGORIES, FLAT_COLORS = ("cat", "penguin", "truck"), ("cyan", "purple")     # seen in 2D only


def primitive(cell):
    """One cell of the table -> its colour's name and its geometry, one (17,) tensor or a mirrored pair."""
    shape, color, *numbers = cell.split()
    x, y, z, *half = (float(n.lstrip("±")) for n in numbers[:6])
    rows = []
    for sign in (1, -1) if numbers[1].startswith("±") else (1,):
        turn = torch.eye(3)
        for word in numbers[6:]:                              # y stays y in the mirror; x and z turn back
            axis, angle = "xyz".index(word[0]), math.radians(float(word[1:]))
            i, j, angle = (axis + 1) % 3, (axis + 2) % 3, angle if axis == 1 else sign * angle
            step = torch.eye(3)
            step[i, i] = step[j, j] = math.cos(angle)
            step[j, i], step[i, j] = math.sin(angle), -math.sin(angle)
            turn = step @ turn
        matrix = turn.T / torch.tensor(half)[:, None]         # from the world into the cube
        rows.append(torch.cat([matrix.flatten(), torch.tensor([x, sign * y, z, *SHAPES[shape]])]))
    return color, rows


@functools.cache
def templates(device):
    """Geometry (C, P, 17) of every category with all it can wear, the colour of each primitive (C, P) as an
    index into PALETTE, or -1 main, -2 first part, -3 second; default (C, 3): the colours if unnamed, -1 none."""
    nothing = torch.tensor([1., 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, *SHAPES["none"]])
    geometry, slots, defaults = [], [], []
    index = {name: i for i, name in enumerate(COLORS | NEUTRALS)}
    for color, parts, lines in CATEGORIES.values():
        own = {"main": -1} | {part: -2 - i for i, part in enumerate(parts)}
        cells = [primitive(cell) for line in lines for cell in line.split("|")]
        rows = [(row, own.get(name, index.get(name))) for name, rows in cells for row in rows]
        rows += [(nothing, 0)] * (24 - len(rows))
        geometry.append(torch.stack([row for row, _ in rows]))
        slots.append([slot for _, slot in rows])
        defaults.append([index[color], *(index.get(d, -1) for d in parts.values()), -1, -1][:3])
    return tuple(torch.as_tensor(t).to(device) for t in (torch.stack(geometry), slots, defaults))


def build(specs, device="cpu"):
    """specs (B, 4) -> the primitives of B objects, geometry (B, P, 17) and colours (B, P, 3)."""
    geometry, slots, defaults = templates(str(device))
    specs = specs.to(device)
    category, colors = specs[:, 0], specs[:, 1:]
    colors = torch.where(colors < 0, defaults[category], colors)
    slot = slots[category]
    index = torch.where(slot < 0, colors.gather(1, (-1 - slot).clamp(min=0)), slot)
    nowhere = torch.tensor(SHAPES["none"], device=device, dtype=torch.float)
    geometry = geometry[category]
    shape = torch.where(index[..., None] < 0, nowhere, geometry[..., 12:])
    return torch.cat([geometry[..., :12], shape], -1), torch.tensor(PALETTE, device=device)[index.clamp(min=0)]


# ---- Captions ------------------------------------------------------------------------------------
# A spec is four numbers: category, main colour, colours of the first and second named part; -1 where the
# caption names no colour (the part is absent, or has its default).


def sentence(name, color, parts):
    """'a red robot wearing a blue hat': parts is {noun: colour word}; a colour word may be ''."""
    def phrase(color, noun):
        text = f"{color} {noun}".strip()
        plural = noun.endswith("s") and noun not in CATEGORIES
        return text if plural else ("an " if text[0] in "aeiou" else "a ") + text
    verb = " wearing " if next(iter(CATEGORIES[name][1])) == "hat" else " with "
    extra = " and ".join(phrase(color, noun) for noun, color in parts.items())
    return phrase(color, name) + (verb + extra if extra else "")


def format_caption(spec, said=(True, True, True)):
    """The caption of a spec; a colour word with said[i] False is left out."""
    category, *colors = (int(i) for i in spec)
    words = ["" if c < 0 or not s else HUES[c] for c, s in zip(colors, said)]
    parts = CATEGORIES[NAMES[category]][1]
    return sentence(NAMES[category], words[0],
                    {part: word for part, word, c in zip(parts, words[1:], colors[1:]) if c >= 0})


def parse_caption(caption):
    """The spec of a caption: exactly what format_caption writes, suffix or not, else a ValueError."""
    text = caption.removesuffix(", 3d asset")
    hues = "|".join(HUES)
    whole = re.fullmatch(rf"an? (?:({hues}) )?({'|'.join(NAMES)})(?: (?:wearing|with) (.+))?", text)
    if whole:
        color, name, rest = whole.groups(default="")
        default, known, _ = CATEGORIES[name]
        found = re.findall(rf"(?:^| and )(?:an? )?(?:({hues}) )?(\w+)", rest)
        words = {noun: word for word, noun in found if noun in known}
        if text == sentence(name, color, {part: words[part] for part in known if part in words}):
            parts = [words[p] or WORN.get(p) if p in words else None for p in known] + [None, None]
            return (NAMES.index(name), *(HUES.index(c) if c else -1 for c in (color or default, *parts[:2])))
    raise ValueError(
        f"the toy world cannot read the caption {caption!r}: write it like 'a red robot wearing a blue hat and a "
        f"green scarf' or 'an orange car with blue wheels', with the colours {', '.join(HUES)} and the things "
        + "; ".join(" ".join([name, *(f"({p})" for p in CATEGORIES[name][1])]) for name in NAMES))


# ---- The split: what training sees, and where ------------------------------------------------------

SPLITS = ("3d", "2d", "never")


def splits(specs):
    """The rule, for specs (..., 4), as indices of SPLITS.

    never   a hashed fifth of all combinations of category and colours: seen nowhere
    2d      of the rest, whatever holds a colour of FLAT_COLORS or is one of FLAT_CATEGORIES: no view sets
    3d      all else: seen as view sets, and in 2D too
    """
    h = (specs + 1) @ torch.tensor([1, 31, 961, 29791])
    for factor in (2246822519, 3266489917):
        h = ((h ^ (h >> 15)) * factor) & 0xFFFFFFFF
    flat = torch.isin(specs[..., 1:], torch.tensor([HUES.index(c) for c in FLAT_COLORS])).any(-1)
    flat |= torch.isin(specs[..., 0], torch.tensor([NAMES.index(c) for c in FLAT_CATEGORIES]))
    return torch.where((h >> 8) % 5 == 0, 2, flat.long())


def split_of(spec):
    """'3d', '2d' or 'never'."""
    return SPLITS[splits(torch.tensor(spec))]


@functools.cache
def all_specs():
    """Every spec (S, 4), its split (S,), and how often to draw it (S,): all categories alike, a part named or
    worn in 6 pictures of 10."""
    rows = []
    for i, (_, parts, _) in enumerate(CATEGORIES.values()):
        choices = [range(-1, len(HUES)) if j < len(parts) else [-1] for j in range(2)]
        rows += [(i, c, a, b) for c in range(len(HUES)) for a in choices[0] for b in choices[1]]
    specs = torch.tensor(rows)
    has = torch.tensor([[len(parts) > j for j in range(2)] for _, parts, _ in CATEGORIES.values()])[specs[:, 0]]
    weight = torch.where(has, torch.where(specs[:, 2:] < 0, 0.4, 0.06), 1.0).prod(1)
    return specs, splits(specs), weight


def draw_specs(num, allowed, generator=None, replacement=True):
    """num specs (num, 4) out of those that allowed(specs, split) marks True or with a weight."""
    specs, split, weight = all_specs()
    return specs[torch.multinomial(weight * allowed(specs, split), num, replacement, generator=generator)]


def draw_captions(specs, generator=None):
    """Captions in which each colour word is left out once in ten times."""
    said = torch.rand(len(specs), 3, generator=generator) >= 0.1
    return [format_caption(*row) for row in zip(specs.tolist(), said.tolist())]


def toy_prompts(row, num, seed=0):
    """num different captions for evaluation, all colours said, one row of the quality table:
    "seen" in 3D; "combination", of known things, never seen anywhere; "colour" or "category" seen only in 2D."""
    hue, kind = (torch.tensor([words.index(w) for w in flat]) for words, flat in
                 ((HUES, FLAT_COLORS), (NAMES, FLAT_CATEGORIES)))

    def allowed(specs, split):
        flat_kind, flat_hue = torch.isin(specs[:, 0], kind), torch.isin(specs[:, 1:], hue)
        known = ~flat_kind & ~flat_hue.any(1)
        return {"seen": split == 0, "combination": (split == 2) & known,
                "colour": (split == 1) & ~flat_kind & flat_hue[:, 0] & ~flat_hue[:, 1:].any(1),
                "category": (split == 1) & flat_kind & ~flat_hue.any(1)}[row]
    generator = torch.Generator().manual_seed(seed)
    return [format_caption(spec) for spec in draw_specs(num, allowed, generator, replacement=False)]


# ---- The two training sets, and the truth ----------------------------------------------------------


def toy_render(captions, c2w, fov=TOY_FOV, distance=TOY_DISTANCE, size=128, background=0.5, supersample=2,
               device="cpu"):
    """The truth of B captions at cameras (V, 4, 4) or (B, V, 4, 4), whose translations `distance` multiplies:
    rgb (B, V, H, W, 3) in [0, 1], opacity and depth (B, V, H, W, 1)."""
    specs = torch.tensor([parse_caption(caption) for caption in captions])
    c2w = c2w.expand(len(specs), *c2w.shape[-3:])
    pictures = render(build(specs, device), c2w.flatten(0, 1), fov, distance, size, background, supersample)
    return {k: v.unflatten(0, c2w.shape[:2]) for k, v in zip(("rgb", "opacity", "depth"), pictures)}


def toy_views(num_sets, num_views=4, size=128, generator=None, device="cpu"):
    """The 3D set: images (B*V, 3, H, W) in [-1, 1], c2w (B*V, 4, 4) on the unit sphere, captions [B].

    Each set has one elevation, one plain grey behind it, and evenly spaced views from any azimuth on.
    """
    specs = draw_specs(num_sets, lambda _, split: split == 0, generator)
    captions = [caption + ", 3d asset" for caption in draw_captions(specs, generator)]
    azimuth, elevation, grey = torch.rand(3, num_sets, 1, generator=generator)
    c2w = look_at_origin(30 * elevation, 360 * (azimuth + torch.arange(num_views) / num_views)).flatten(0, 1)
    grey = grey.repeat_interleave(num_views, 0)[..., None, None].to(device)
    rgb, _, _ = render(build(specs, device), c2w, TOY_FOV, TOY_DISTANCE, size, grey)
    return rgb.permute(0, 3, 1, 2) * 2 - 1, c2w.to(device), captions


def toy_pictures(num, size=128, generator=None, device="cpu"):
    """The 2D set: single images (N, 3, H, W) in [-1, 1] of the wider world, with captions [N].

    Any azimuth, elevations from -10 to 60, loose framing, and two busy backgrounds for one plain.  What is
    seen in 2D only comes three times as often, since nothing else teaches it.
    """
    flat = torch.tensor([NAMES.index(name) for name in FLAT_CATEGORIES])
    specs = draw_specs(num, lambda specs, split: (split < 2) * (1 + 2 * torch.isin(specs[:, 0], flat)), generator)
    captions = draw_captions(specs, generator)
    azimuth, elevation, distance, fov, right, up = torch.rand(6, num, generator=generator)
    c2w = look_at_origin(70 * elevation - 10, 360 * azimuth)
    c2w[:, :3, 3] *= 1 + 0.25 * distance[:, None]
    c2w[:, :3, 3] += 0.06 * ((right - 0.5)[:, None] * c2w[:, :3, 0] + (up - 0.5)[:, None] * c2w[:, :3, 1])
    backgrounds = draw_backgrounds(num, size, generator, device)
    rgb, _, _ = render(build(specs, device), c2w, 37 + 6 * fov, TOY_DISTANCE, size, backgrounds)
    return rgb.permute(0, 3, 1, 2) * 2 - 1, captions


def draw_backgrounds(num, size, generator=None, device="cpu"):
    """(N, H, W, 3): a third plain; else a gradient, stripes, a checkered floor, or four blobs."""
    def rand(*shape):
        return torch.rand(num, *shape, 1, 1, generator=generator).to(device)
    style, angle, scale, color = rand(), 6.28 * rand(), 4 + 8 * rand(), rand(3, 3)         # (N, 1, 1)
    x = torch.linspace(-1, 1, size, device=device)[None, None, :]
    y = -x.transpose(1, 2)                                                                 # up
    across = x * torch.cos(angle) + y * torch.sin(angle)
    below = (rand() - 0.5 - y).clamp(min=0.04)                                             # the horizon
    floor = torch.sin(scale * (x + rand() - 0.5) / below) * torch.sin(scale / below)
    centre, radius = 2 * rand(2, 4) - 1, 0.2 + 0.5 * rand(4)
    blobs = 1 - torch.hypot(x[:, None] - centre[:, 0], y[:, None] - centre[:, 1]) / radius   # (N, 4, H, W)
    ones = torch.ones(num, size, size, device=device)
    masks = torch.stack([ones, across / 2.8 + 0.5, 20 * torch.sin(scale * across) + 0.5,
                         torch.where(below > 0.04, 20 * floor + 0.5, 0.0), 20 * blobs.amax(1) + 0.5], 1)
    kind = (6 * style - 1).clamp(0).long()[:, None].expand(-1, 1, size, size)
    mask = masks.clamp(0, 1).gather(1, kind)
    sky = color[:, 1] + (color[:, 2] - color[:, 1]) * (0.5 + 0.5 * y)[:, None]
    front = torch.where(style[:, None] < 1 / 6, color[:, 0, :1], color[:, 0])                # or grey
    return (mask * front + (1 - mask) * sky).permute(0, 2, 3, 1)


def contact_sheet(path):
    from PIL import Image, ImageDraw
    torch.manual_seed(0)
    captions = [c for name in NAMES for c in [sheet_caption(name)]]
    rgb = toy_render(captions, orbit_cameras(4, azimuth=30))["rgb"]
    rows = (rgb.permute(0, 2, 1, 3, 4).flatten(2, 3) * 255 + .5).byte().numpy()
    columns = 2
    n = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * 528, n * 146), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, caption) in enumerate(zip(rows, captions)):
        x, y = i // n * 528, i % n * 146
        sheet.paste(Image.fromarray(row), (x, y))
        draw.text((x + 4, y + 130), caption, fill="black")
    sheet.save(path)


def sheet_caption(name):
    i = NAMES.index(name)
    parts = CATEGORIES[name][1]
    hues = [(3 * i) % 10, (3 * i + 5) % 10, (3 * i + 7) % 10]
    return format_caption((i, hues[0], *(hues[1 + j] if j < len(parts) else -1 for j in range(2))))


if __name__ == "__main__":
    os.makedirs("outputs", exist_ok=True)
    contact_sheet("outputs/toy_world.png")
    print("outputs/toy_world.png")
