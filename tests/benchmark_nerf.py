"""The NeRF's speed: encoding, marching, compositing, a whole training render, fits.

    python tests/benchmark.py nerf [--only encode|march|render|fit|cpu]

Without a GPU the CPU's rows alone. Each time is a median; `goal` is what is asked of one
H100, or of two cores in the CPU's rows.
"""
import argparse
import time

import torch

import data
import hashgrid
import nerf
from nerf import NeRF, NeRFConfig, toy_object


def milliseconds(f, repeat=12):
    """Median over single runs, after two to warm up."""
    cuda, times = torch.cuda.is_available(), []
    for i in range(repeat + 2):
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            f()
            end.record()
            end.synchronize()
            took = start.elapsed_time(end)
        else:
            start = time.perf_counter()
            f()
            took = 1000 * (time.perf_counter() - start)
        times.append(took)
    return sorted(times[2:])[repeat // 2]


def row(name, value, unit, goal=None):
    print(f"{name:<58} {value:9.2f} {unit:<6} {'' if goal is None else f'goal {goal}'}", flush=True)


def cameras(views, size, device, elevation=15.0):
    c2w = data.orbit_cameras(views, elevation).to(device)
    c2w[:, :3, 3] *= data.TOY_DISTANCE * 0.9
    return data.camera_rays(c2w, data.TOY_FOV, size, size)


def encode():
    N, device = 2**22, "cuda"
    table = torch.empty(16, 2**19, 2, device=device).uniform_(-1e-4, 1e-4).requires_grad_()
    r = NeRFConfig().resolutions()
    o, d = (x.reshape(-1, 3) for x in cameras(4, 128, device))
    along = hashgrid.march(o, d, torch.ones(32, 32, 32, dtype=torch.bool, device=device),
                           torch.rand(len(o), device=device), 2 * 3**0.5 / 512)[2]
    first = torch.randint(len(along) - N, ()).item() if len(along) > N else 0
    along = (along.repeat(1 + N // len(along), 1)[first:first + N] + 1) / 2
    for kind, x in (("uniform", torch.rand(N, 3, device=device)), ("rays", along.contiguous())):
        g = torch.randn(N, 32, device=device)
        op = torch.ops.hashgrid
        ns = 1e6 / N
        row(f"encode, forward, {kind}", ns * milliseconds(lambda: op.gather(x, table, r, None)),
            "ns/pt", 0.45 if kind == "uniform" else 0.35)
        row(f"encode, hash_encode() with its checks, {kind}", ns * milliseconds(
            lambda: nerf.hash_encode(x, table.detach(), r)), "ns/pt")
        row(f"encode, gradient by table, {kind}", ns * milliseconds(
            lambda: op.scatter(x, g, r, 2**19, None)), "ns/pt", 1.8 if kind == "uniform" else 2.4)
        row(f"encode, gradient by points, {kind}", ns * milliseconds(
            lambda: op.pull(x, table, g, r, None)), "ns/pt")
        xg = x.clone().requires_grad_()
        row(f"encode, forward and both gradients, {kind}", ns * milliseconds(
            lambda: torch.autograd.grad(nerf.encode(xg, table, r), (xg, table), g)), "ns/pt", 4.5)
        v = torch.randn(N, 3, device=device)
        row(f"encode, gradients of value and slope by table, {kind}", ns * milliseconds(
            lambda: op.scatter_both(x, g, g, r, 2**19, v)), "ns/pt")


def march():
    device, model = "cuda", NeRF().cuda()
    o, d = (x.reshape(-1, 3) for x in cameras(4, 256, device))
    grid, shift = model.occupied(), torch.rand(len(o), device=device)
    offsets, t, x, total = hashgrid.march(o, d, grid, shift, model.delta)
    N = len(t)
    row("occupied cells", 100 * grid.float().mean().item(), "%", 10.6)
    row("samples", N / 1e6, "M", 10.7)
    row("march, counting", milliseconds(
        lambda: hashgrid.march(o, d, grid, shift, model.delta)), "ms", 2.0)
    row("march, room reserved", milliseconds(
        lambda: hashgrid.march(o, d, grid, shift, model.delta, N + 2**14)), "ms")
    sigma = (torch.rand(N, device=device) * 3).requires_grad_()
    rgb = torch.rand(N, 3, device=device, requires_grad=True)
    g = torch.rand(len(o), 5, device=device)
    row("composite, forward", milliseconds(
        lambda: hashgrid.composite(sigma.detach(), rgb.detach(), t, offsets, model.delta)), "ms")
    row("composite, forward and backward", milliseconds(lambda: torch.autograd.grad(
        hashgrid.composite(sigma, rgb, t, offsets, model.delta)[0], (sigma, rgb), g)), "ms", 2.0)
    h, W1, W2, g = (torch.randn(*s, device=device) for s in ((N, 32), (128, 32), (4, 128), (N, 4)))
    op = torch.ops.hashgrid.network
    row("network, forward", milliseconds(lambda: op(h, W1, W2, None)), "ms")
    row("network, backward", milliseconds(lambda: op(h, W1, W2, g)), "ms")


def render():
    device, model = "cuda", NeRF().cuda()
    o, d = cameras(4, 256, device)
    for name, kw in (("", {}), (", diffuse", dict(shading="diffuse"))):
        if kw:
            o, d = cameras(4, 128, device)                          # a quarter of the rays

        def step():
            out = model.render(o, d, **kw)
            (out["rgb"].square().mean() + out.get("orientation", 0)).backward()

        model.update_occupancy(0)
        torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(step, 6)
        samples = int(model.render(o, d)["num_samples"]) / 1e6
        row(f"training render, {samples:.1f} M samples{name}", ms, "ms", None if kw else 35)
        row("    memory", torch.cuda.max_memory_allocated() / 2**30, "GiB", None if kw else 6)
    model.eval()
    o, d = cameras(1, 512, device)
    row("eval render 512 x 512", milliseconds(lambda: model.render(o, d), 4), "ms")
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.mesh(128)
    row("mesh, 128^3", 1000 * (time.perf_counter() - start), "ms")


def fit(device, views, size, steps, config, rays, goal):
    torch.manual_seed(0)
    seen = toy_object([(views // 4, e, 7 * e) for e in (0, 20, 40, 60)], size, device)
    truth, *new = toy_object([(4, 30, 15)], size, device)
    model = NeRF(config).to(device)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in nerf.fit(model, *seen, steps, rays=rays):
        pass
    rgb = model.render(*new, background=0.0)["rgb"]
    psnr = -10 * (rgb - truth[..., :3]).square().mean().log10().item()
    row(f"fit, {views} views of {size}^2, {steps} steps on {device}, unseen views", psnr, "dB",
        goal[0])
    row("    time", time.perf_counter() - start, "s", goal[1])


def cpu():
    small = dict(levels=8, log2_table=15, base_resolution=8, finest_resolution=128, hidden=32,
                 max_samples=128)
    model = NeRF(NeRFConfig(**small, background=None))
    o, d = cameras(4, 48, "cpu")
    for name, full in (("blob start", 0), ("full grid", 1)):
        if full:
            model.occupancy.fill_(1)
        row(f"CPU training render, 4x48x48 rays, {name}", milliseconds(
            lambda: model.render(o, d)["rgb"].square().mean().backward(), 5), "ms")
        row("    samples", int(model.render(o, d)["num_samples"]) / 1e3, "k")
    fit("cpu", 24, 64, 400, NeRFConfig(**small), 4096, (27, 90))


def main(argv):
    parser = argparse.ArgumentParser(prog="benchmark.py nerf")
    parser.add_argument("--only", choices=("encode", "march", "render", "fit", "cpu"))
    only = parser.parse_args(argv).only
    start = time.perf_counter()
    hashgrid.kernels("cpu")
    row("building or loading the kernels", time.perf_counter() - start, "s", 60)
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
        for part in (encode, march, render):
            if only in (None, part.__name__):
                part()
        if only in (None, "fit"):
            fit("cuda", 64, 256, 1000, NeRFConfig(), 8192, (35, 20))
    if only == "cpu" or only is None and not torch.cuda.is_available():
        cpu()


if __name__ == "__main__":
    import sys
    main(sys.argv[1:])
