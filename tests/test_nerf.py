"""The NeRF and its kernels: numbers by hand, then properties, then the plain twins in float64."""
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hashgrid
import mesh
import nerf
from nerf import NeRF, NeRFConfig, hash_encode

SMALL = NeRFConfig(levels=4, log2_table=10, base_resolution=4, finest_resolution=32, hidden=16,
                   max_samples=48, occupancy=16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))]
each_device = pytest.mark.parametrize("device", DEVICES)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def rays(n=12, distance=2.7, device="cpu"):
    """A camera on +x that looks at the origin."""
    y, z = torch.meshgrid(*[torch.linspace(-0.35, 0.35, n)] * 2, indexing="xy")
    d = F.normalize(torch.stack([-torch.ones_like(y), y, -z], -1), dim=-1)
    return torch.tensor([distance, 0, 0]).expand_as(d).to(device), d.to(device)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- Encoding


@each_device
def test_level_of_two_vertices_by_hand(device):
    table = torch.arange(16.0, device=device).view(1, 8, 2)         # row i holds (2i, 2i + 1)
    at = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1],       # the corners
                       [.5, 0, 0], [0, .5, 0], [.5, .5, .5], [.25, 0, 1]], device=device)
    rows = torch.tensor([0, 1, 2, 4, 7, .5, 1, 3.5, 4.25], device=device)           # x fastest
    assert torch.allclose(hash_encode(at, table, [2]), torch.stack([2 * rows, 2 * rows + 1], -1))


@each_device
def test_hashed_rows_by_hand(device):
    table = torch.randn(1, 16, 2, device=device)                    # 5^3 vertices in 16 rows
    vertex = torch.tensor([3, 2, 4])
    row = (3 ^ 2 * 2654435761 ^ 4 * 805459861) % 16
    assert torch.allclose(hash_encode((vertex / 4)[None].to(device), table, [5])[0], table[0, row])


def test_default_geometry():
    r = NeRFConfig().resolutions()
    assert len(r) == 16 and r[:6] == [16, 24, 34, 49, 71, 102] and r[-1] == 4096


@each_device
@pytest.mark.parametrize("N", [0, 1, 33, 1000])
@pytest.mark.parametrize("levels", [3, 8])
def test_encode_against_float64(N, levels, device):
    r = [2, 7, 16, 33, 100, 777, 1500, 4096][-levels:]
    x = torch.rand(N, 3) * 1.4 - 0.2
    x[: N // 3] = (x[: N // 3] * 3).round() / 3                     # on faces, edges and beyond
    x[: N // 4] = x[: N // 4].round()
    # Where a cell begins the slope jumps: a point there may take either side's.
    inner = torch.cat([x[N // 3:], x[:0]]).clamp(0, 1)
    table, g, v = torch.randn(levels, 512, 2), torch.randn(N, 2 * levels), torch.randn(N, 3)

    def derivatives(encode, x, table, g, v):
        x, table, g, v = (a.detach().requires_grad_() for a in (x, table, g, v))
        y = encode(x, table, r)
        first = torch.autograd.grad(y, (x, table), g, create_graph=True)
        U = torch.ones_like(table).cumsum(1) / 512
        second = torch.autograd.grad((first[0] * v).sum() + (first[1] * U).sum(), (x, table, g))
        return y, *first, *second

    for points in (inner, x):
        n = len(points)
        args = points, table, g[:n], v[:n]
        ours = derivatives(hash_encode, *[a.to(device) for a in args])
        truth = derivatives(hashgrid.encode_plain, *[a.double() for a in args])
        for i, (a, b) in enumerate(zip(ours, truth)):
            if points is inner or i in (0, 2):              # values and the table's gradient
                assert error(a.cpu(), b) < 1e-5, i


@each_device
def test_third_order_is_refused(device):
    x = torch.rand(5, 3, device=device, requires_grad=True)
    table = torch.randn(2, 64, 2, device=device)
    if not hashgrid.kernels(device):
        pytest.skip("no compiled kernels")
    a, = torch.autograd.grad(hash_encode(x, table, [4, 9]).square().sum(), x, create_graph=True)
    b, = torch.autograd.grad(a.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice"):
        torch.autograd.grad(b.square().sum(), x)


@each_device
def test_half_table(device):
    x, table = torch.rand(500, 3, device=device), torch.randn(4, 256, 2, device=device).half()
    table.requires_grad_()
    y = hash_encode(x, table, [4, 9, 16, 50])
    truth = hashgrid.encode_plain(x.double(), table.double(), [4, 9, 16, 50])
    assert y.dtype == torch.float32 and error(y, truth) < 1e-6
    y.sum().backward()
    assert table.grad.dtype == torch.float16


@gpu
def test_ten_million_points():
    x, table = torch.rand(10**7, 3, device="cuda"), torch.randn(16, 2**19, 2, device="cuda")
    table.requires_grad_()
    r = NeRFConfig().resolutions()
    y = hash_encode(x, table, r)
    some = torch.randint(len(x), (20000,), device="cuda")
    truth = hashgrid.encode_plain(x[some].double(), table.detach().double(), r)
    assert error(y[some], truth) < 1e-5
    y.backward(torch.ones_like(y))                                  # eight weights sum to one
    assert (table.grad.double().sum(1) / 1e7 - 1).abs().max() < 1e-5


@each_device
def test_known_to_pytorch(device):
    if not hashgrid.kernels(device):
        pytest.skip("no compiled kernels")
    op, check = torch.ops.hashgrid, torch.library.opcheck
    x = torch.rand(9, 3, device=device, requires_grad=True)
    table = torch.randn(2, 64, 2, device=device, requires_grad=True)
    g = torch.randn(9, 4, device=device, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    check(op.gather.default, (x, table, [4, 9], None), test_utils=tests)
    check(op.pull.default, (x, table, g, [4, 9], None), test_utils=tests)
    check(op.scatter.default, (x, g, [4, 9], 64, None), test_utils=tests)
    offsets = torch.tensor([0, 4, 4, 9], device=device)
    sigma, values, t = torch.rand(9, 5, device=device).split([1, 3, 1], -1)
    check(op.composite.default, (sigma[:, 0], values, t[:, 0], offsets, 0.1, None, None),
          test_utils=tests)
    compiled = torch.compile(lambda x, table: hash_encode(x, table, [4, 9]).sin(),
                             backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, table), hash_encode(x, table, [4, 9]).sin())
    grads = torch.autograd.grad(compiled(x, table).sum(), (x, table))
    truth = torch.autograd.grad(hash_encode(x, table, [4, 9]).sin().sum(), (x, table))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(grads, truth))
    with torch.autocast(device, torch.bfloat16):
        assert hash_encode(x, table, [4, 9]).dtype == torch.float32


def test_errors_are_one_sentence():
    x, table = torch.rand(4, 3), torch.randn(2, 64, 2)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            hash_encode(torch.full((2, 3), bad), table, [4, 9])
    with pytest.raises(ValueError, match="48 rows.*power of two"):
        hash_encode(x, table[:, :48], [4, 9])
    with pytest.raises(ValueError, match="3 resolutions.*2 levels"):
        hash_encode(x, table, [4, 9, 16])
    with pytest.raises(ValueError, match="points on cpu but table on meta"):
        hash_encode(x, table.to("meta"), [4, 9])


@gpu
def test_float64_on_cuda_is_refused():
    with pytest.raises(ValueError, match="float64"):
        hash_encode(torch.rand(4, 3).cuda().double(), torch.randn(2, 64, 2).cuda().double(), [4, 9])
    with pytest.raises(ValueError, match="points on cpu but table on cuda"):
        hash_encode(torch.rand(4, 3), torch.randn(2, 64, 2).cuda(), [4, 9])


# ---- Marching and compositing


@each_device
def test_march_by_hand(device):
    o = torch.tensor([[2, 0.1, 0.1], [2, 5, 0]], device=device)     # the second passes by
    d = torch.tensor([[-1.0, 0, 0], [-1, 0, 0]], device=device)
    grid = torch.zeros(2, 2, 2, dtype=torch.bool, device=device)
    grid[0, 1, 1] = True                                            # x < 0, y > 0, z > 0
    offsets, t, x, total = hashgrid.march(o, d, grid, torch.full((2,), 0.5, device=device), 0.5)
    assert offsets.tolist() == [0, 2, 2] and total == 2
    assert t.tolist() == [2.25, 2.75]                               # enters at 1: 1.25, 1.75, ...
    assert torch.allclose(x.cpu(), torch.tensor([[-.25, .1, .1], [-.75, .1, .1]]))


@each_device
def test_march_against_plain(device):
    o, d = F.normalize(torch.randn(500, 3), dim=-1) * 2.5, torch.randn(500, 3) * 0.4
    d = F.normalize(d - o, dim=-1)
    grid, shift = torch.rand(16, 16, 16) < 0.3, torch.rand(500)
    ours = hashgrid.march(*[x.to(device) for x in (o, d, grid, shift)], 0.013)
    truth = hashgrid.march_plain(o, d, grid, shift, 0.013)
    counts = ours[0].cpu().diff() - truth[0].diff()         # rounding: a sample at a cell's face
    assert (counts != 0).float().mean() < 0.05 and counts.abs().max() <= 2
    same = counts == 0
    for a, b in zip(ours[1:3], truth[1:3]):
        a = a.cpu()[same[hashgrid.rays_of(ours[0].cpu(), len(a))]]
        assert torch.allclose(a, b[same[hashgrid.rays_of(truth[0], len(b))]], atol=1e-5)


@each_device
def test_march_ends_on_rays_that_are_none(device):
    """NaN, and a direction of length 0: at most the samples of the box's diagonal."""
    o = torch.tensor([[math.nan] * 3, [0, 0, 0]], device=device)
    grid = torch.ones(2, 2, 2, dtype=torch.bool, device=device)
    offsets, *_ = hashgrid.march(o, torch.zeros_like(o), grid, torch.zeros(2, device=device), 0.5)
    assert offsets[-1] <= 2 * 8


@each_device
def test_compositing_is_differentiated_once(device):
    if not hashgrid.kernels(device):
        pytest.skip("no compiled kernels")
    sigma = torch.rand(4, device=device, requires_grad=True)
    offsets = torch.tensor([0, 4], device=device)
    sums, _ = hashgrid.composite(sigma, torch.rand(4, 3, device=device), sigma.detach(), offsets, 0.1)
    g, = torch.autograd.grad(sums.sum(), sigma, create_graph=True)
    with pytest.raises(NotImplementedError, match="composite can be differentiated once"):
        torch.autograd.grad(g.sum(), sigma)


@each_device
def test_march_into_reserved_room(device):
    if not hashgrid.kernels(device):
        pytest.skip("no compiled kernels")
    o, d = (x.view(-1, 3) for x in rays(device=device))
    grid = torch.ones(8, 8, 8, dtype=torch.bool, device=device)
    args = o, d, grid, torch.zeros(len(o), device=device), 0.1
    offsets, t, x, total = hashgrid.march(*args)
    for room in (int(total) + 100, int(total) // 2):
        offsets2, t2, x2, total2 = hashgrid.march(*args, room)
        assert len(t2) == len(x2) == room and total2 == total and offsets2[-1] == min(room, total)
        n = min(room, int(total))
        assert torch.equal(t2[:n], t[:n]) and torch.equal(x2[:n], x[:n]) and not t2[n:].any()
        sigma, rgb = torch.ones_like(t2).requires_grad_(), torch.ones_like(x2).requires_grad_()
        sums, w = hashgrid.composite(sigma, rgb, t2, offsets2, 0.1)
        for a in (w, *torch.autograd.grad(sums.sum(), (sigma, rgb))):       # room that no ray fills
            assert a[:n].all() and not a[n:].any()


@each_device
def test_composite_by_hand(device):
    """A ray of one sample, an empty one, and one of two, each sample halving the light."""
    half = math.log(2) / 0.1
    sigma = torch.tensor([half, half, half], device=device)
    values = torch.tensor([[.2, .4, .6], [1, 0, 0], [0, 1, 0]], device=device)
    t, offsets = torch.tensor([3.0, 1, 2], device=device), torch.tensor([0, 1, 1, 3], device=device)
    sums, w = hashgrid.composite(sigma, values, t, offsets, 0.1)
    assert torch.allclose(w.cpu(), torch.tensor([.5, .5, .25]))
    assert torch.allclose(sums.cpu(), torch.tensor([[.1, .2, .3, .5, 1.5], [0, 0, 0, 0, 0],
                                                    [.5, .25, 0, .75, 1]]))


@each_device
@pytest.mark.parametrize("C", [3, 6])
def test_composite_against_float64(C, device):
    counts = torch.tensor([0, 1, 5, 300, 0, 33])
    N, offsets = int(counts.sum()), F.pad(counts.cumsum(0), (1, 0))
    sigma, values, t = torch.rand(N) * 5, torch.rand(N, C), torch.rand(N)
    sigma[20:26] = 1e4                                              # a wall: what is behind is dark
    g = torch.randn(len(counts), C + 2)

    def derivatives(f, sigma, values, t, offsets, g):
        sigma, values = sigma.requires_grad_(), values.requires_grad_()
        sums, w = f(sigma, values, t, offsets, 0.1)
        return sums, w, *torch.autograd.grad(sums, (sigma, values), g)

    ours = [x.clone().to(device) for x in (sigma, values, t, offsets, g)]
    ours = derivatives(hashgrid.composite, *ours)
    truth = derivatives(hashgrid.composite_plain, sigma.double(), values.double(), t.double(),
                        offsets, g.double())
    assert all(error(a.cpu(), b) < 1e-5 for a, b in zip(ours, truth))
    assert not ours[1][26:300].any() and not ours[2][26:300].any()


@gpu
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("N", [1, 15, 16, 1000, 100001])
def test_network_on_tensor_cores(N, width):
    x, W1, W2 = (torch.randn(*s, device="cuda") for s in ((N, width), (128, width), (4, 128)))
    g = torch.randn(N, 4, device="cuda")
    g[N // 3: N // 2] = 0                                           # whole tiles without gradient
    inputs = [a.requires_grad_() for a in (x, W1, W2)]
    rounded = [a.detach().bfloat16().double().requires_grad_() for a in inputs]
    y = torch.ops.hashgrid.network(*inputs, None)[0]
    truth = F.relu(rounded[0] @ rounded[1].T) @ rounded[2].T
    ours = torch.autograd.grad(y, inputs, g)
    theirs = torch.autograd.grad(truth, rounded, g.bfloat16().double())
    assert error(y, truth) < 1e-2 and all(error(a, b) < 1e-2 for a, b in zip(ours, theirs))


# ---- The field and rendering


@each_device
@pytest.mark.parametrize("shading, normals", [
    ("albedo", False), ("albedo", True), ("diffuse", False), ("textureless", True)])
def test_render(shading, normals, device):
    model = NeRF(SMALL).to(device)
    o, d = rays(device=device)
    out = model.render(o, d, shading=shading, normals=normals)
    assert out["rgb"].shape == (12, 12, 3)
    assert out["opacity"].shape == out["depth"].shape == (12, 12, 1)
    assert (0 <= out["rgb"]).all() and (out["rgb"] <= 1).all() and int(out["num_samples"]) > 0
    (out["rgb"].square().mean() + out.get("orientation", 0)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
    if "normal" in out:
        n = out["normal"][5, 5].detach().cpu()                      # the blob, seen from +x
        assert n[0] > 0.75 and abs(n.norm() - 1) < 1e-4 and out["orientation"] >= 0


@each_device
def test_eval_is_deterministic_and_chunked(device):
    model = NeRF(SMALL).to(device).eval()
    o, d = rays(device=device)
    a, b = model.render(o, d, normals=True), model.render(o, d, chunk=17, normals=True)
    for k in ("rgb", "opacity", "depth", "normal"):
        assert torch.allclose(a[k], b[k], atol=1e-5) and not a[k].requires_grad
    assert torch.allclose(a["orientation"], b["orientation"], rtol=1e-4)
    assert a["num_samples"] == b["num_samples"]
    model.train()
    assert not torch.equal(model.render(o, d)["rgb"], model.render(o, d)["rgb"])


def test_backgrounds_and_light():
    model = NeRF(SMALL).eval()
    o, d = rays()
    black, grey = model.render(o, d, background=0.0), model.render(o, d, background=[0.5, 0.5, 0.5])
    assert torch.allclose(grey["rgb"] - black["rgb"], 0.5 - 0.5 * black["opacity"], atol=1e-6)
    assert (black["opacity"][0, 0] < 0.5) and (black["opacity"][6, 6] > 0.9)
    assert 1.2 < black["depth"][6, 6] < 2.7                         # between the box and its centre
    white = model.render(o, d, background=0.0, shading="textureless", ambient=1.0)
    assert torch.allclose(white["rgb"], white["opacity"].expand(-1, -1, 3), atol=1e-5)
    lit = model.render(o, d, background=0.0, shading="textureless")             # from the camera
    dark = model.render(o, d, background=0.0, shading="textureless", light=[-3.0, 0, 0])
    assert lit["rgb"][6, 6, 0] > 0.65 and dark["rgb"][6, 6, 0] < 0.1
    plain = NeRF(NeRFConfig(levels=2, log2_table=4, background=None)).eval()
    assert plain.render(o, d)["rgb"][0, 0].max() < 0.5              # black


def test_normals_are_those_of_finite_differences():
    model = NeRF(SMALL)
    torch.nn.init.normal_(model.table, std=0.1)
    x = F.normalize(torch.randn(2000, 3), dim=-1) * 0.45
    n = model.field(x, normals=True)[2]
    step, sigma = 1e-3, []
    for a in range(3):
        e = step * torch.eye(3)[a]
        sigma.append(model.density(x + e) - model.density(x - e))
    cosine = (n * F.normalize(-torch.stack(sigma, -1), dim=-1)).sum(-1)
    assert cosine.median() > 0.999


@each_device
def test_slope_and_its_derivatives_are_those_of_autograd(device):
    """By hand against a graph of a graph, through the plain encoding in double precision."""
    model = NeRF(SMALL).to(device)
    for p in model.density_mlp.parameters():        # bfloat16 holds these exactly
        p.data = p.data.bfloat16().float()
    torch.nn.init.normal_(model.table, std=0.5)
    x, g = (torch.randn(500, 3, device=device) * 0.3 for _ in range(2))
    parameters = [model.table, model.density_mlp[0].weight, model.density_mlp[2].weight]
    h, slope = model.slope(x)
    e = torch.randn_like(h)                         # both outputs add to the table's gradient
    ours = [h, slope, *torch.autograd.grad([h, slope], parameters, [e, g])]
    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
        on = F.linear(h, parameters[1]) > 0         # a unit on the edge may switch in bfloat16

    table, W1, W2 = (p.detach().double().requires_grad_() for p in parameters)
    x = x.double().requires_grad_()
    h = hashgrid.encode_plain((x + 1) / 2, table, model.resolutions)
    z = ((h @ W1.T * on) @ W2.T)[:, 0] + model.blob(x)
    slope, = torch.autograd.grad(z.sum(), x, create_graph=True)
    theirs = torch.autograd.grad([h, slope], (table, W1, W2), [e.double(), g.double()])
    theirs = [h, slope, *theirs]
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < (1e-5 if device == "cpu" else 1e-2) * b.norm()


def test_compiled_and_plain_pictures_agree(monkeypatch):
    model = NeRF(SMALL).eval()
    torch.nn.init.normal_(model.table, std=0.1)
    fast = model.render(*rays(), normals=True)
    for module in (hashgrid, nerf):
        monkeypatch.setattr(module, "kernels", lambda device: False)
    slow = model.render(*rays(), normals=True)
    for k in ("rgb", "opacity", "depth"):
        assert (fast[k] - slow[k]).abs().max() < 2e-3, k


def test_occupancy():
    model = NeRF(SMALL)
    G, before = SMALL.occupancy, model.occupied().float().mean()
    assert 0.05 < before < 0.2
    assert model.occupied()[G // 2, G // 2, G // 2] and not model.occupied()[0, 0, 0]
    for step in (0, 16, 256):
        model.update_occupancy(step)
    assert abs(model.occupied().float().mean() - before) < 0.05
    same = model.occupancy.clone()
    model.update_occupancy(17)
    assert torch.equal(same, model.occupancy)
    model.blob = lambda x: torch.full_like(x[:, 0], -20.0)          # all is gone: it fades
    for step in range(0, 4000, 16):
        model.update_occupancy(step)
    assert model.occupancy.max() < 1e-2


@gpu
def test_training_on_the_gpu_reserves_room():
    model, (o, d) = NeRF(SMALL).cuda(), rays(64, device="cuda")
    exact = model.render(o, d)
    model.update_occupancy(0)
    assert model.room * 64 * 64 > int(exact["num_samples"])
    reserved = model.render(o, d)
    assert abs(int(reserved["num_samples"]) / int(exact["num_samples"]) - 1) < 0.2
    assert (reserved["opacity"] - exact["opacity"]).abs().mean() < 0.02
    (reserved["rgb"].mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_save_and_load(tmp_path):
    model = NeRF(SMALL).eval()
    torch.nn.init.normal_(model.table, std=0.1)
    model.update_occupancy(0)
    model.save(tmp_path / "a.safetensors")
    again = NeRF.load(tmp_path / "a.safetensors").eval()
    assert again.config == SMALL and os.listdir(tmp_path) == ["a.safetensors"]
    assert torch.equal(model.render(*rays())["rgb"], again.render(*rays())["rgb"])
    with pytest.raises(FileNotFoundError, match="none"):
        NeRF.load(tmp_path / "none")
    (tmp_path / "b").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a NeRF.*delete it"):
        NeRF.load(tmp_path / "b")


def test_bad_options():
    for bad in (dict(base_resolution=1), dict(finest_resolution=1), dict(levels=33), dict(max_samples=0),
                dict(log2_table=40), dict(hidden=10**9)):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must lie from"):
            NeRFConfig(**bad)
    model = NeRF(SMALL)
    with pytest.raises(ValueError, match="shading 'phong'"):
        model.render(*rays(), shading="phong")


def test_fit_learns():
    model = NeRF(SMALL)
    o, d = rays(24)
    image = torch.where(d[..., 1:2] > 0, torch.tensor([1.0, 0.2, 0.1]), torch.tensor([0.1, 0.3, 1]))
    psnr = list(nerf.fit(model, image, o, d, 150, rays=256))
    assert psnr[-1] > psnr[0] + 5 and not model.training


# ---- Mesh


def ball(resolution=48, radius=0.7, centre=(0.0, 0.0, 0.0)):
    axis = torch.linspace(-1, 1, resolution)
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    return radius - (x - torch.tensor(centre)).norm(dim=-1)


def volume(vertices, faces):
    a, b, c = vertices[faces].unbind(1)
    return ((torch.linalg.cross(a, b) * c).sum(-1).sum() / 6).item()


def test_every_case_of_a_tetrahedron():
    """Each of the 256 corner patterns of a cube in the middle of nothing gives a closed surface."""
    for case in range(1, 256):
        sigma = torch.zeros(4, 4, 4)
        sigma[1:3, 1:3, 1:3] = torch.tensor([float(case >> i & 1) for i in range(8)]).view(2, 2, 2)
        vertices, faces = mesh.marching_tetrahedra(sigma, 0.5)
        edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
        there, back = edges @ torch.tensor([1000, 1]), edges @ torch.tensor([1, 1000])
        assert torch.equal(there.sort().values, back.sort().values) and volume(vertices, faces) > 0


def test_sphere_is_closed_outward_and_right():
    vertices, faces = mesh.marching_tetrahedra(ball(), 0.0)
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    there, back = edges @ torch.tensor([len(vertices), 1]), edges @ torch.tensor([1, len(vertices)])
    assert len(there.unique()) == len(there)                        # each edge once each way
    assert torch.equal(there.sort().values, back.sort().values)
    assert len(vertices) - len(edges) // 2 + len(faces) == 2        # Euler
    vertices = vertices * (2 / 47) - 1
    assert abs(volume(vertices, faces) / (4 / 3 * math.pi * 0.7**3) - 1) < 0.01
    assert (vertices.norm(dim=-1) - 0.7).abs().max() < 0.02


def test_specks_go():
    sigma = torch.maximum(ball(), ball(radius=0.06, centre=(0.9, 0.9, 0.9)))
    vertices, faces = mesh.marching_tetrahedra(sigma, 0.0)
    kept, faces = mesh.remove_specks(vertices, faces)
    assert len(kept) < len(vertices) and (kept * (2 / 47) - 1).norm(dim=-1).max() < 0.75
    assert faces.max() == len(kept) - 1
    flock = torch.arange(300).view(100, 3)                          # a hundred lone triangles
    assert len(mesh.remove_specks(torch.rand(300, 3), flock, share=0.5)[1]) == 100
    empty = mesh.remove_specks(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long))
    assert len(empty[0]) == len(empty[1]) == 0


def test_mesh_of_the_blob():
    model = NeRF(SMALL)
    vertices, faces, colors = model.mesh(40, threshold=0.7)     # softplus(0) = 0.69, radius 0.5
    assert (vertices.norm(dim=-1) - 0.5).abs().max() < 0.03 and volume(vertices, faces) > 0.45
    assert colors.shape == vertices.shape and (0 <= colors).all() and (colors <= 1).all()
    assert len(model.mesh(32)[1])
    with pytest.raises(ValueError, match="lower the threshold"):
        model.mesh(16, threshold=1e6)


def test_glb_and_obj_stand_upright_and_face_front(tmp_path):
    """A tall box whose nose points to +x must rise along y and point to +z."""
    vertices = torch.tensor([[0, -.1, 0], [0, .1, 0], [0, 0, .9], [.5, 0, .4]])
    faces = torch.tensor([[0, 2, 1], [0, 3, 2], [1, 2, 3], [0, 1, 3]])
    assert volume(vertices, faces) > 0
    colors = torch.tensor([[1.0, 0.5, 0.0]]).expand(4, 3)
    mesh.write_glb(tmp_path / "a.glb", vertices, faces, colors)
    raw = (tmp_path / "a.glb").read_bytes()
    assert struct.unpack("<4sII", raw[:12]) == (b"glTF", 2, len(raw))
    size, kind = struct.unpack("<I4s", raw[12:20])
    scene, blob = json.loads(raw[20:20 + size]), raw[28 + size:]
    assert kind == b"JSON" and size % 4 == 0 and len(blob) == scene["buffers"][0]["byteLength"]
    surface = scene["meshes"][0]["primitives"][0]

    def array(i, dtype, width):
        view = scene["bufferViews"][scene["accessors"][i]["bufferView"]]
        part = bytearray(blob[view["byteOffset"]:view["byteOffset"] + view["byteLength"]])
        return torch.frombuffer(part, dtype=dtype).view(-1, width)

    position = array(surface["attributes"]["POSITION"], torch.float32, 3)
    index = array(surface["indices"], torch.int32, 3).long()
    assert position[2].tolist() == pytest.approx([0, .9, 0])
    assert position[3].tolist() == pytest.approx([0, .4, .5])
    assert torch.equal(index, faces) and volume(position, index) > 0            # not mirrored
    linear = array(surface["attributes"]["COLOR_0"], torch.float32, 3)[0]   # glTF's are linear
    assert linear.tolist() == pytest.approx([1, 0.2140, 0], abs=1e-3)
    top = scene["accessors"][surface["attributes"]["POSITION"]]
    assert top["max"] == pytest.approx([.1, .9, .5]) and top["min"] == pytest.approx([-.1, 0, 0])

    mesh.write_obj(tmp_path / "a.obj", vertices, faces, colors)
    lines = (tmp_path / "a.obj").read_text().splitlines()
    assert lines[3] == "v 0.00000 0.40000 0.50000 1.0000 0.5000 0.0000" and lines[4] == "f 1 3 2"
    assert sorted(os.listdir(tmp_path)) == ["a.glb", "a.obj"]


# ---- Building

SCRIPT = """import torch, hashgrid
print(hashgrid.hash_encode(torch.rand(5, 3), torch.ones(1, 8, 2), [2]).sum())"""


def start(**environment):
    environment = os.environ | environment | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-c", SCRIPT], text=True, env=environment,
                            cwd=Path(__file__).parent.parent,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_without_a_compiler_the_plain_version_serves(tmp_path):
    out, err = start(PATH="", CXX="none", TORCH_EXTENSIONS_DIR=str(tmp_path)).communicate()
    assert "tensor(10." in out
    assert [line[:22] for line in err.splitlines() if "plain" in line] == ["nerf.py: plain PyTorch"]


def test_two_builds_at_once_in_a_closed_home(tmp_path):
    """The folder asked for cannot be made; two meet at the next; a broken build lies there."""
    if not hashgrid.kernels("cpu"):
        pytest.skip("no compiler")
    cache = tmp_path / f"mvdream-{os.getuid()}"
    cache.mkdir(mode=0o700)
    (cache / "tmpbroken").mkdir()
    (cache / "tmpbroken" / "lock").touch()
    place = dict(TORCH_EXTENSIONS_DIR="/dev/null/cache", TMPDIR=str(tmp_path))
    both = [start(**place), start(**place)]
    results = [p.communicate() for p in both]
    assert all("tensor(10." in out for out, _ in results)
    assert sum("compiling" in err for _, err in results) == 1       # the other waited and found it
    assert len(list(cache.glob("hashgrid_*.so"))) == 1
    out, err = start(**place).communicate()
    assert "tensor(10." in out and "compiling" not in err


def test_no_folder_that_others_may_write(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/dev/null/cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours = hashgrid.cache_folder()
    assert ours.parent == tmp_path and ours.stat().st_mode & 0o777 == 0o700
    assert hashgrid.cache_folder() == ours
    ours.chmod(0o777)
    assert hashgrid.cache_folder() != ours
    ours.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    ours.symlink_to(tmp_path / "elsewhere")
    assert hashgrid.cache_folder() != ours
