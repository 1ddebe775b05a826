"""data.py: cameras by hand-worked numbers, primitives against hand-worked hits and a slow twin, the
toy world's captions, split and determinism, and the truth's agreement with itself between views."""
import itertools
import math
import os
import sys

import pytest
import torch
from torch.nn.functional import normalize

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
from metrics import toy_prompts

ALL, _ = data.all_specs()
FLAT_WORDS = data.FLAT_CATEGORIES + data.FLAT_COLORS


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- Cameras -------------------------------------------------------------------------------------


@pytest.mark.parametrize("azimuth, rows", [
    (0, [[0, -.2588, .9659, .9659], [1, 0, 0, 0], [0, .9659, .2588, .2588]]),
    (90, [[-1, 0, 0, 0], [0, -.2588, .9659, .9659], [0, .9659, .2588, .2588]]),
    (180, [[0, .2588, -.9659, -.9659], [-1, 0, 0, 0], [0, .9659, .2588, .2588]]),
    (270, [[1, 0, 0, 0], [0, .2588, -.9659, -.9659], [0, .9659, .2588, .2588]])])
def test_orbit_cameras_by_hand(azimuth, rows):
    wanted = torch.tensor(rows + [[0., 0, 0, 1]])
    views = data.orbit_cameras(4)                                     # 0, 90, 180, 270
    assert views.shape == (4, 4, 4)
    torch.testing.assert_close(views[azimuth // 90], wanted, atol=1e-4, rtol=0)
    one = data.orbit_cameras(1, elevation=15, azimuth=azimuth)[0]
    torch.testing.assert_close(one, wanted, atol=1e-4, rtol=0)


def test_orbit_cameras_span():
    half = data.orbit_cameras(3, elevation=0, azimuth=10, span=90)    # 10, 40, 70
    torch.testing.assert_close(half[1], data.orbit_cameras(1, 0, 40)[0])


def test_rays_go_through_pixel_centres():
    c2w = data.orbit_cameras(1, elevation=0)                     # at (1, 0, 0), right +y, up +z
    origins, directions = data.camera_rays(c2w, 90.0, 2, 4)      # focal length: one pixel
    assert origins.shape == directions.shape == (1, 2, 4, 3)
    torch.testing.assert_close(origins[0, 1, 2], torch.tensor([1., 0, 0]))
    wanted = torch.tensor([-1., .5, -.5]) / math.sqrt(1.5)       # lower row, right of the middle
    torch.testing.assert_close(directions[0, 1, 2], wanted)
    torch.testing.assert_close(directions[0, 0, 0], torch.tensor([-1., -1.5, .5]) / math.sqrt(3.5))


def test_rays_take_one_fov_a_view():
    c2w = data.orbit_cameras(2)
    both = data.camera_rays(c2w, torch.tensor([20., 50.]), 4, 4)[1]
    torch.testing.assert_close(both[1:], data.camera_rays(c2w[1:], 50.0, 4, 4)[1])
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2, 4, 4))


def test_random_view_cameras():
    c2w, fov = data.random_view_cameras(500, 4, seeded(0))
    assert c2w.shape == (2000, 4, 4) and fov.shape == (2000,)
    position = c2w[:, :3, 3].unflatten(0, (500, 4))
    radius = position.norm(dim=-1)
    assert torch.allclose(radius, radius[:, :1].expand(-1, 4))
    assert (fov.view(500, 4).diff() == 0).all()
    reach = radius.flatten() * torch.tan(torch.deg2rad(fov / 2))
    assert fov.min() >= 15 and fov.max() <= 60 and reach.min() > 0.799 and reach.max() < 1.001
    elevation = torch.rad2deg(torch.asin(position[:, 0, 2] / radius[:, 0]))
    assert elevation.min() >= -1e-3 and elevation.max() <= 30
    assert 0.72 < (elevation < 19.47).float().mean() < 0.92           # 1/2 + 1/2 * 19.47/30 = .82
    torch.testing.assert_close(position[:, 0, :2], -position[:, 2, :2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(c2w[:, :3, 2] * radius.flatten()[:, None], c2w[:, :3, 3])


# ---- Primitives ----------------------------------------------------------------------------------


def shoot(cell, origin, direction):
    """Distance and colour of one ray at the primitives of one cell of the table, made of white."""
    geometry = torch.stack([row for _, row in data.read_primitive(cell)])[None]
    direction = normalize(torch.tensor([[direction]], dtype=torch.float), dim=-1)
    origin, colors = torch.tensor([origin], dtype=torch.float), torch.ones(1, len(geometry[0]), 3)
    rgb, distance = data.trace(geometry, colors, origin, direction)
    return distance.item(), rgb[0, 0]


@pytest.mark.parametrize("cell, origin, direction, distance, normal", [
    ("ball main 0 0 0 50 50 50", (3, 0, 0), (-1, 0, 0), 2.5, (1, 0, 0)),
    ("ball main 10 0 0 50 20 20", (3, 0, 0), (-1, 0, 0), 2.4, (1, 0, 0)),
    ("ball main 0 0 0 50 50 50", (3, 0, .6), (-1, 0, 0), math.inf, None),
    ("ball main 0 0 0 50 50 50", (3, 0, .3), (-1, 0, 0), 2.6, (.8, 0, .6)),         # 3-4-5
    ("box main 0 0 0 50 20 20", (3, .1, .1), (-1, 0, 0), 2.5, (1, 0, 0)),
    ("box main 0 0 0 50 20 20", (.3, 0, 3), (0, 0, -1), 2.8, (0, 0, 1)),
    ("box main 0 0 0 50 20 20 z90", (3, .3, .1), (-1, 0, 0), 2.8, (1, 0, 0)),
    ("box main 0 0 0 30 30 30 z45", (3, .1, 0), (-1, 0, 0), 3.1 - .3 * 2 ** .5,
     (.5 ** .5, .5 ** .5, 0)),
    ("tube main 0 0 0 50 50 20", (3, 0, .1), (-1, 0, 0), 2.5, (1, 0, 0)),
    ("tube main 0 0 0 50 50 20", (.2, .2, 3), (0, 0, -1), 2.8, (0, 0, 1)),
    ("tube main 0 0 0 50 50 20", (.4, .4, 3), (0, 0, -1), math.inf, None),    # the cube's corner
    ("tube main 0 0 0 20 20 50 y90", (3, .1, .1), (-1, 0, 0), 2.5, (1, 0, 0)),
    ("cone main 0 0 0 50 50 50", (3, 0, 0), (-1, 0, 0), 2.75, (.8 ** .5, 0, .2 ** .5)),
    ("cone main 0 0 0 50 50 50", (.3, 0, -3), (0, 0, 1), 2.5, (0, 0, -1)),
    ("cone main 0 0 0 50 50 50", (.2, 0, 3), (0, 0, -1), 2.9, (.8 ** .5, 0, .2 ** .5)),
    ("cone main 0 0 0 50 50 50", (3, 0, .6), (-1, 0, 0), math.inf, None),    # its other half
    ("cone main 0 0 0 50 50 50 y90", (3, .05, 0), (-1, 0, 0), 2.6, None),
    ("cup main 0 0 0 50 50 50", (3, 0, .4999), (-1, 0, 0), 2.75, None),
    ("cup main 0 0 0 50 50 50", (3, 0, -.4999), (-1, 0, 0), 2.5, None),
    ("dome main 0 0 0 50 50 25", (0, 0, 3), (0, 0, -1), 2.75, (0, 0, 1)),
    ("dome main 0 0 0 50 50 25", (.3, 0, -3), (0, 0, 1), 2.75, (0, 0, -1)),
    ("arch main 0 0 0 50 50 25", (3, .3, .1), (-1, 0, 0), 2.5, (1, 0, 0)),
    ("arch main 0 0 0 50 50 25", (.4, .3, 3), (0, 0, -1), 2.85, (0, .6, .8)),
    ("roof main 0 0 0 50 50 50", (0, .25, 3), (0, 0, -1), 3.0, (0, .8 ** .5, .2 ** .5)),
    ("none main 0 0 0 50 50 50", (3, 0, 0), (-1, 0, 0), math.inf, None)])
def test_hits_by_hand(cell, origin, direction, distance, normal):
    got, rgb = shoot(cell, origin, direction)
    assert got == pytest.approx(distance, abs=1e-4)
    if normal is not None:
        light = sum(n * l for n, l in zip(normal, data.LIGHT))
        torch.testing.assert_close(rgb, torch.full((3,), 0.7 + 0.3 * light), atol=2e-3, rtol=0)


def test_pairs_are_mirrored():
    (_, left), (_, right) = data.read_primitive("ball main 10 ±30 0 10 20 30 x20 y10 z30")
    points = torch.randn(50, 3)
    local = (points - left[9:12]) @ left[:9].view(3, 3).T
    mirrored = (points * torch.tensor([1, -1, 1]) - right[9:12]) @ right[:9].view(3, 3).T
    torch.testing.assert_close(local * torch.tensor([1, -1, 1]), mirrored, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", data.SHAPES)
def test_trace_against_walking_the_ray(shape):
    """The slow twin: step along each ray until a point satisfies the definition."""
    (_, row), = data.read_primitive(f"{shape} main 10 -20 5 60 40 50 x35 y-20 z50")
    rays = normalize(torch.randn(300, 3, generator=seeded(1)) * 0.25 - torch.tensor([1., 0, 0]))
    origin = torch.tensor([[3., 0, 0]])
    _, distance = data.trace(row[None, None], torch.ones(1, 1, 3), origin, rays[None])
    steps = torch.linspace(1.5, 4.5, 6001)
    points = (origin + rays[:, None] * steps[:, None] - row[9:12]) @ row[:9].view(3, 3).T
    (x, y, z), (p, q, a, b, c) = points.unbind(-1), data.SHAPES[shape]
    inside = (points.abs() <= 1).all(-1) & (p * x ** 2 + q * y ** 2 + a * z ** 2 + b * z + c <= 0)
    walked = torch.where(inside.any(1), steps[inside.float().argmax(1)], torch.inf)
    both = walked.isfinite() & distance[0].isfinite()
    assert shape == "none" or both.sum() > 50
    torch.testing.assert_close(distance[0, both], walked[both], atol=6e-4, rtol=0)
    grazing = walked.isfinite() != distance[0].isfinite()             # chords shorter than one step
    assert grazing.sum() <= 3 and inside[grazing].sum(1).le(2).all()


def test_nearest_primitive_wins():
    rows = [data.read_primitive(cell)[0][1]
            for cell in ("ball main 0 0 0 20 20 20", "box main 50 0 0 10 10 10")]
    colors = torch.tensor([[[1., 0, 0], [0, 1., 0]]])
    rgb, distance = data.trace(torch.stack(rows)[None], colors, torch.tensor([[3., 0, 0]]),
                               torch.tensor([[[-1., 0, 0]]]))
    assert distance.item() == pytest.approx(2.4) and rgb[0, 0, 0] == 0 and rgb[0, 0, 1] > 0


def test_trace_is_one_graph():
    """torch.compile must take it whole: no break, no look at a value."""
    torch._dynamo.reset()
    geometry, colors = data.build(ALL[:2])
    origins, directions = data.camera_rays(data.orbit_cameras(2) * 3, 40.0, 4, 4)
    inputs = geometry, colors, origins[:, 0, 0], directions.flatten(1, 2)
    compiled = torch.compile(data.trace, backend="eager", fullgraph=True)
    for ours, theirs in zip(data.trace(*inputs), compiled(*inputs)):
        torch.testing.assert_close(ours, theirs)


# ---- The world -----------------------------------------------------------------------------------


def test_everything_fits_the_frame():
    """No primitive leaves a ball of .93; that of sin(20) * TOY_DISTANCE = .94 is in sight."""
    surface = torch.randn(600, 3, generator=seeded(2))
    cube = surface / surface.abs().amax(1, keepdim=True)
    x, y, z = cube = torch.cat([cube, cube * torch.rand(600, 1, generator=seeded(3))]).T
    for name, (_, parts, cells) in data.CATEGORIES.items():
        rows = [row for cell in cells for row in data.read_primitive(cell)]
        assert len(rows) <= 24 and len(parts) in (1, 2)
        for _, row in rows:
            p, q, a, b, c = row[12:].tolist()
            inside = cube[:, p * x * x + q * y * y + a * z * z + b * z + c <= 0].T
            points = inside @ torch.linalg.inv(row[:9].view(3, 3)).T + row[9:12]
            assert points.norm(dim=1).max() < 0.93, name


def test_fronts_differ_from_backs():
    """Mirrored left to right, the back view is no picture of the front."""
    captions = [data.sentence(name, row[0], {}) for name, row in data.CATEGORIES.items()]
    out = data.toy_render(captions, data.orbit_cameras(2), size=32)
    filled = out["opacity"][:, 0].mean((1, 2, 3))
    change = (out["rgb"][:, 0] - out["rgb"][:, 1].flip(2)).abs().mean((1, 2, 3))
    assert (filled > 0.1).all() and (change > 0.09 * filled).all(), change / filled


def test_accessories_leave_the_body_in_place():
    bare, dressed = (data.toy_render([caption], data.orbit_cameras(1), size=48) for caption in
                     ("a red robot", "a red robot wearing a blue hat and a green scarf"))
    assert (dressed["opacity"] >= bare["opacity"] - 1e-6).all()
    feet = (bare["rgb"] == dressed["rgb"]).all(-1)[0, 0]
    assert feet[30:].float().mean() > 0.95 and not feet[:16].all()


# ---- Captions ------------------------------------------------------------------------------------


def test_captions_round_trip():
    for spec in ALL.tolist():
        assert data.parse_caption(data.format_caption(spec)) == tuple(spec)


def test_captions_without_colour_words_take_defaults():
    parse = data.parse_caption
    assert parse("a robot wearing a hat") == parse("a red robot wearing a red hat")
    assert parse("a car with wheels") == parse("a red car")
    assert parse("a duck, 3d asset") == parse("a yellow duck")
    for spec, said in itertools.product(ALL[::7].tolist(), itertools.product((1, 0), repeat=3)):
        parsed = parse(data.format_caption(spec, said))
        assert parsed[0] == spec[0]
        assert all(p == s for p, s, k in zip(parsed[1:], spec[1:], said) if k)


def test_captions_read_as_english():
    spec = data.parse_caption("a red robot wearing a blue hat and a green scarf")
    assert data.format_caption(spec, (0, 1, 0)) == "a robot wearing a blue hat and a scarf"
    for caption in ("an orange car with blue wheels", "an orange elephant wearing an orange hat",
                    "a red bus", "a blue boat with a red flag", "a white house with a pink door"):
        assert data.format_caption(data.parse_caption(caption)) == caption


@pytest.mark.parametrize("caption", [
    "", "a", "red robot", "a red unicorn", "an red robot", "a red robot with a hat", "a red  robot",
    "a red robot wearing blue hat", "a red robot wearing a green scarf and a blue hat", "A red bus",
    "a red robot wearing a blue hat and a blue hat", "a car wearing a hat", "a crimson robot",
    "a red car with a blue wheels", "a red robot wearing", "a red robot wearing a blue hat and",
    "a red robot, nice"])
def test_captions_are_refused_in_one_sentence(caption):
    with pytest.raises(ValueError, match="cannot read the caption") as error:
        data.parse_caption(caption)
    assert "\n" not in str(error.value) and repr(caption) in str(error.value)


# ---- The split -----------------------------------------------------------------------------------


def test_split_is_the_documented_rule():
    split = data.splits(ALL)
    assert 0.17 < (split == 2).float().mean() < 0.23
    for spec, s in zip(ALL[::13].tolist(), split[::13].tolist()):
        words = data.format_caption(spec).split()
        assert s == 2 or (s == 1) == any(word in FLAT_WORDS for word in words)
    never = [(split[ALL[:, 0] == i] == 2).float().mean() for i in range(len(data.NAMES))]
    assert min(never) > 0 and max(never) < 0.45                   # the hash spares no category


def test_training_never_sees_what_it_must_not():
    split = data.splits(ALL)
    for allowed, weight in ({0}, split == 0), ({0, 1}, split < 2):
        specs, captions = data.draw(4000, weight, seeded(4))
        assert {*data.splits(specs).tolist()} == allowed
        if allowed == {0}:
            assert not any(word in FLAT_WORDS for caption in captions for word in caption.split())
    assert len({data.NAMES[i] for i in specs[:, 0]}) == len(data.NAMES)


def test_toy_views_hold_only_3d(monkeypatch):
    """The whole way through toy_views, without the rendering."""
    blank = lambda objects, c2w, *_: (torch.zeros(len(c2w), 2, 2, 3), None)
    monkeypatch.setattr(data, "render", blank)
    _, _, captions = data.toy_views(3000, generator=seeded(5))
    said = 0
    for caption in captions:
        words = caption.replace(",", "").split()
        assert caption.endswith(", 3d asset") and not any(word in FLAT_WORDS for word in words)
        said += any(hue in words for hue in data.HUES)
    assert 0.9 < said / 3000 < 0.99                               # now and then one is left out
    _, _, captions = data.toy_pictures(3000, size=2, generator=seeded(6))
    words = {word for caption in captions for word in caption.split()}
    assert words >= {*data.NAMES, *data.HUES} and "3d" not in words


def test_toy_prompts():
    wanted = {"seen": 0, "combination": 2, "colour": 1, "category": 1}
    for row, split in wanted.items():
        prompts = toy_prompts(row, 64)
        assert len(set(prompts)) == 64 and prompts == toy_prompts(row, 64)
        assert prompts != toy_prompts(row, 64, seed=1)
        specs = torch.tensor([data.parse_caption(prompt) for prompt in prompts])
        assert {*data.splits(specs).tolist()} == {split}
        flat = data.is_flat(specs)
        assert (flat[:, 0] == (row == "category")).all()
        assert (flat[:, 1] == (row == "colour")).all()
        assert not flat[:, 2:].any()
    with pytest.raises(ValueError, match="no prompts of the row 'color'"):
        toy_prompts("color", 4)


# ---- The sets ------------------------------------------------------------------------------------


def test_toy_views():
    images, c2w, captions = data.toy_views(3, size=32, generator=seeded(7))
    assert images.shape == (12, 3, 32, 32) and c2w.shape == (12, 4, 4) and len(captions) == 3
    assert images.min() >= -1 and images.max() <= 1 and images.dtype == torch.float32
    position = c2w[:, :3, 3].view(3, 4, 3)
    torch.testing.assert_close(position.norm(dim=-1), torch.ones(3, 4))
    torch.testing.assert_close(position[:, 0, :2], -position[:, 2, :2], atol=1e-5, rtol=0)
    assert (position[..., 2] >= 0).all() and (position[..., 2] <= 0.5).all()
    corner = images.view(3, 4, 3, 32, 32)[..., 0, 0]                   # one plain grey a set
    assert (corner == corner[:, :1, :1]).all() and len(corner[:, 0, 0].unique()) == 3


def test_toy_views_are_the_truth_of_their_captions():
    images, c2w, captions = data.toy_views(6, num_views=2, size=24, generator=seeded(8))
    grey = (images[:, 0, 0, 0] + 1) / 2
    specs, _ = data.draw(6, data.splits(ALL) == 0, seeded(8))
    full = [data.format_caption(spec) for spec in specs.tolist()]
    truth = data.toy_render(full, c2w.view(6, 2, 4, 4), size=24,
                            background=grey[:, None, None, None])["rgb"].flatten(0, 1)
    torch.testing.assert_close(truth.movedim(-1, 1) * 2 - 1, images, atol=1e-5, rtol=0)


def test_toy_pictures():
    images, c2w, captions = data.toy_pictures(8, size=32, generator=seeded(9))
    assert images.shape == (8, 3, 32, 32) and c2w is None and len(captions) == 8
    assert images.min() >= -1 and images.max() <= 1
    assert images.flatten(2).std(2).mean() > 0.1
    backgrounds = data.draw_backgrounds(600, 16, seeded(10))
    plain = (backgrounds.flatten(1, 2).std(1).amax(1) < 1e-6).float().mean()
    assert backgrounds.shape == (600, 16, 16, 3) and 0.25 < plain < 0.45


def test_same_seed_same_data():
    for make in data.toy_views, data.toy_pictures:
        a, b, c = (make(2, size=16, generator=seeded(s)) for s in (11, 11, 12))
        assert torch.equal(a[0], b[0]) and a[-1] == b[-1] and not torch.equal(a[0], c[0])


def test_supersampling_is_an_average():
    c2w, caption = data.orbit_cameras(1), ["a yellow duck"]
    fine = data.toy_render(caption, c2w, size=32, supersample=1)
    coarse = data.toy_render(caption, c2w, size=16, supersample=2)
    mean = fine["rgb"].unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))
    torch.testing.assert_close(coarse["rgb"], mean, atol=1e-5, rtol=0)
    assert ((coarse["opacity"] * 4).round() / 4 == coarse["opacity"]).all()


def test_truth_agrees_between_views():
    """Points seen in one view land, in another, on the same surface or behind a nearer one."""
    c2w = data.orbit_cameras(2, azimuth=30, span=60)
    out = data.toy_render(["a red car with blue wheels"], c2w, size=64, supersample=1)
    scaled = c2w.clone()
    scaled[:, :3, 3] *= data.TOY_DISTANCE
    origins, directions = data.camera_rays(scaled, data.TOY_FOV, 64, 64)
    objects = data.build(torch.tensor([data.parse_caption("a red car with blue wheels")]))
    _, depth = data.trace(*objects, scaled[:1, :3, 3], directions[:1].flatten(1, 2))
    depth = depth.view(64, 64, 1)
    solid = out["opacity"][0, 0, ..., 0] == 1
    assert torch.equal(solid, depth[..., 0].isfinite()) and solid.sum() > 100
    points = (origins[0] + depth * directions[0])[solid]
    assert (points.norm(dim=1) < 0.93).all()
    rays = points - scaled[1, :3, 3]
    far = rays.norm(dim=1)
    rgb, seen = data.trace(*objects, scaled[1:, :3, 3], (rays / far[:, None])[None])
    assert (seen[0] <= far + 1e-4).all()                               # nothing is seen through
    same = (seen[0] - far).abs() < 1e-3
    assert same.float().mean() > 0.5
    torch.testing.assert_close(rgb[0, same], out["rgb"][0, 0][solid][same], atol=2e-2, rtol=0)
