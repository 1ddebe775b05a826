"""A hash-grid NeRF: field, occupancy grid, rendering, shading, and mesh.py's surface of it.

The 3D half of text-to-3D (MVDream section 3.2). Rays come in as tensors, pictures go out; the
operators underneath are hashgrid.py's. `python nerf.py` fits a NeRF to rendered views of a toy
object: the whole lesson without diffusion.

    N  samples of all rays    R  rays                      t      distance along a ray
    L  levels of the grid     T  rows of a level's table   sigma  density
    F  features of a row      delta  step along a ray      w      weight of a sample in its pixel
    H  hidden units           G  occupancy cells an axis   h, n   encoding; normal

World: z up, objects face +x, the box is [-1, 1]^3. Colours are in [0, 1].
"""
import json
import math
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as Fn
from torch import nn

from hashgrid import (composite, encode, encode_slope, hash_encode, kernels,    # noqa: F401
                      march, rays_of)
from layouts import write
from mesh import marching_tetrahedra, remove_specks

# ---- The field -----------------------------------------------------------------------------------

def within(settings, *limits):
    """One clear sentence for the first number, or pair of them, outside of (names, low, high)."""
    for names, low, high in limits:
        for name in names.split():
            value = getattr(settings, name)
            if not all(low <= v <= high for v in (value if isinstance(value, tuple) else [value])):
                raise ValueError(f"{name} must lie from {low} to {high}, not at {value}")


@dataclass
class NeRFConfig:
    levels: int = 16
    features: int = 2                       # compiled kernels are for 2
    log2_table: int = 19                    # T = 2^19 rows a level
    base_resolution: int = 16
    finest_resolution: int = 4096
    hidden: int = 64
    occupancy: int = 32                     # cells per axis of the occupancy grid
    max_samples: int = 512                  # per ray: delta is the box's diagonal / max_samples
    background: str = "learned"             # or None: black unless render() is given a colour
    blob: tuple = (10.0, 0.5)               # the start: density bias b(x) = 10 (1 - |x| / 0.5)

    def __post_init__(self):
        self.blob = tuple(self.blob)        # a file gives a list
        within(self, ("levels", 1, 32), ("features", 1, 16), ("log2_table", 1, 24),
               ("hidden", 1, 1024), ("base_resolution finest_resolution", 2, 2**16),
               ("occupancy", 1, 512), ("max_samples", 1, 2**14))

    def resolutions(self):
        growth = (self.finest_resolution / self.base_resolution) ** (1 / max(self.levels - 1, 1))
        return [math.ceil(self.base_resolution * growth**l - 1e-6) for l in range(self.levels)]


def mlp(*widths):
    """Linear, ReLU, Linear, ..., without bias."""
    layers = [nn.Linear(i, o, bias=False) for i, o in zip(widths, widths[1:])]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])


def spherical_harmonics(d):
    """The nine real harmonics of degree below three; d (...,3) -> (...,9)."""
    x, y, z = d.unbind(-1)
    return torch.stack([
        torch.full_like(x, 0.28209479), -0.48860251 * y, 0.48860251 * z, -0.48860251 * x,
        1.09254843 * x * y, -1.09254843 * y * z, 0.31539157 * (3 * z * z - 1),
        -1.09254843 * x * z, 0.54627421 * (x * x - y * y)], -1)


class NeRF(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = c = config or NeRFConfig()
        self.resolutions = c.resolutions()
        self.delta = 2 * math.sqrt(3) / c.max_samples
        table = torch.empty(c.levels, 2**c.log2_table, c.features)
        self.table = nn.Parameter(table.uniform_(-1e-4, 1e-4))
        self.density_mlp = mlp(c.levels * c.features, c.hidden, 1)
        self.color_mlp = mlp(c.levels * c.features, c.hidden, 3)
        self.background_mlp = mlp(9, 16, 16, 3) if c.background == "learned" else None
        # sigma delta of each cell; before the first update, what the blob alone gives.
        centres = self.cell_points(torch.arange(c.occupancy**3), 0.5)
        self.register_buffer("occupancy", Fn.softplus(self.blob(centres)) * self.delta)
        self.room = self.most = None                # samples per ray: to reserve, and seen of late

    def blob(self, x):
        height, radius = self.config.blob
        return height * (1 - (x.square().sum(-1) + 1e-12).sqrt() / radius)

    def density(self, x):
        return self.field(x)[0]

    def field(self, x, normals=False):
        """x (N,3) in the box -> sigma (N,), albedo (N,3); also n = -grad sigma / |grad sigma|."""
        if normals:
            x = x.detach()                          # slope has no derivative by x
            h, slope = self.slope(x)
        else:
            h = encode((x + 1) / 2, self.table, self.resolutions)               # (N, L*F)
        # Both heads as one network of two layers, the second block-diagonal.
        W1 = torch.cat([self.density_mlp[0].weight, self.color_mlp[0].weight])
        W2 = torch.block_diag(self.density_mlp[2].weight, self.color_mlp[2].weight)     # (4, 2H)
        fused = x.is_cuda and h.shape[1] in (16, 32) and len(W1) == 128
        if fused and kernels("cuda") and hasattr(torch.ops.hashgrid, "network"):
            raw = torch.ops.hashgrid.network(h, W1, W2, None)[0]                # (N,4)
        else:
            with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
                raw = Fn.linear(Fn.relu(Fn.linear(h, W1)), W2).to(h.dtype)
        sigma, albedo = Fn.softplus(raw[:, 0] + self.blob(x)), torch.sigmoid(raw[:, 1:])
        return (sigma, albedo, -Fn.normalize(slope, dim=-1)) if normals else (sigma, albedo)

    def slope(self, x):
        """-> h(x) (N, L*F), and the gradient by x of z = W2 relu(W1 h(x)) + blob(x) (N,3), whose
        direction is that of sigma = softplus(z); W1, W2 of the density head.

        By hand: `on`, where W1 h > 0, is constant, as relu has no second derivative. So z's
        gradient by h is c = on (W2 W1), a sum of W1's rows; encode_slope takes c . h on to the
        points, which lie in [0,1]^3, hence / 2.
        """
        W1, W2, points = self.density_mlp[0].weight, self.density_mlp[2].weight, (x + 1) / 2
        with torch.no_grad():
            h = encode(points, self.table, self.resolutions)                    # (N, L*F)
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            on = Fn.linear(h, W1.detach()).gt_(0)                               # (N, H): 0 or 1
            c = (on @ (W2.T * W1)).to(h)                                        # (N, L*F)
        h, slope = encode_slope(points, self.table, self.resolutions, c, h)
        height, radius = self.config.blob
        blob_slope = -height / radius * x / (x.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        return h, slope / 2 + blob_slope

    def background(self, directions):
        if self.background_mlp is None:
            return torch.zeros_like(directions)
        return torch.sigmoid(self.background_mlp(spherical_harmonics(directions)))

    # ---- Occupancy

    def cell_points(self, cells, place):
        """Flat numbers of cells -> points at this place in [0,1]^3 of each (N,3)."""
        G = self.config.occupancy
        corner = torch.stack([cells // (G * G), cells // G % G, cells % G], -1)
        return (corner + place) * (2 / G) - 1

    def occupied(self):
        full = self.occupancy > self.occupancy.mean().clamp(max=0.01)
        return full.view([self.config.occupancy] * 3)

    @torch.no_grad()
    def update_occupancy(self, step):
        """To be called every step, acts on each 16th: occ = max(0.95 occ, sigma delta).

        Before step 256 everywhere; then in a quarter of the cells at random, and as many times
        among those occupied.
        """
        if step % 16:
            return
        device, total = self.occupancy.device, len(self.occupancy)
        cells = torch.arange(total, device=device)
        if step >= 256:
            rank = self.occupied().flatten().cumsum(0)
            pick = (torch.rand(total // 4, device=device) * rank[-1]).long()
            there = torch.searchsorted(rank, pick, right=True).clamp(max=total - 1)
            cells = torch.cat([torch.randint(total, (total // 4,), device=device), there])
        x = self.cell_points(cells, torch.rand(len(cells), 3, device=device))
        self.occupancy[cells] = 0.95 * self.occupancy[cells]
        self.occupancy.scatter_reduce_(0, cells, self.density(x) * self.delta, "amax")
        if self.most is not None:                   # the one wait for the device in 16 steps
            self.room, self.most = 1.25 * self.most.item() + 1, None

    # ---- Rendering

    def render(self, origins, directions, *,        # (...,3) each; directions of length 1
               background=None,                     # a colour, for (...,3); None: the learned one
               shading="albedo",                    # or "textureless", "diffuse"
               light=None,                          # position(s) of a point light; None: the camera
               ambient=0.0,                         # shade = ambient + (1 - ambient) max(0, n.l)
               normals=False,                       # also normals and the orientation loss
               chunk=None):                         # rays at a time; None: all, or in eval a few
        """-> rgb (...,3), opacity, depth (...,1), num_samples; with normals: normal, orientation.

        Training: one random shift a ray. Eval: deterministic, no gradient, bounded memory. depth is
        sum of w t; orientation the mean over rays that hit of the sum of w max(0, n.d)^2.
        """
        if shading not in ("albedo", "textureless", "diffuse"):
            raise ValueError(f"render: no shading {shading!r}; albedo, textureless, diffuse")
        shape = origins.shape[:-1]
        if shading != "albedo":
            normals, light = True, origins if light is None else light
        rays = [x if x is None else torch.as_tensor(x, dtype=torch.float32, device=origins.device)
                .expand(*shape, 3).reshape(-1, 3) for x in (origins, directions, background, light)]
        count = len(rays[0])
        chunk = chunk or (max(count, 1) if self.training else 2**22 // self.config.max_samples)
        if self.training and chunk < count:
            self.room = None                        # parts of a picture differ too much
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            parts = [self.render_rays(*[x if x is None else x[i:i + chunk] for x in rays],
                                      shading, ambient, normals)
                     for i in range(0, max(count, 1), chunk)]
        joined = {k: [part[k] for part in parts] for k in parts[0]}
        out = {k: torch.cat(v).view(*shape, v[0].shape[-1]) if v[0].dim() else sum(v)
               for k, v in joined.items()}
        if normals:
            out["orientation"] = out["orientation"] / out.pop("hit").clamp(min=1)
        return out

    def render_rays(self, origins, directions, background, light, shading, ambient, normals):
        R, start = len(origins), torch.empty_like(origins[:, 0])
        shift = start.uniform_() if self.training else start.fill_(0.5)
        reserve = self.training and self.room and origins.is_cuda
        offsets, t, x, total = march(origins, directions, self.occupied(), shift, self.delta,
                                     int(R * self.room) + 2**14 if reserve else -1)
        if self.training:
            mean = total / max(R, 1)
            self.most = mean if self.most is None else torch.maximum(self.most, mean)

        if normals:
            ray = rays_of(offsets, len(t))
            sigma, color, n = self.field(x, normals)
            if shading != "albedo":
                towards = Fn.normalize(light[ray] - x, dim=-1)
                shade = ambient + (1 - ambient) * (n * towards).sum(-1, keepdim=True).clamp(min=0)
                color = shade.expand(-1, 3) if shading == "textureless" else color * shade
            color = torch.cat([color, n], -1)
        else:
            sigma, color = self.field(x)
        sums, w = composite(sigma, color, t, offsets, self.delta)               # (R, C+2), (N,)

        opacity = sums[:, -2:-1]
        background = self.background(directions) if background is None else background
        out = {"rgb": sums[:, :3] + (1 - opacity) * background, "opacity": opacity,
               "depth": sums[:, -1:], "num_samples": total}
        if normals:
            away = (n * directions[ray]).sum(-1).clamp(min=0)
            out["normal"] = Fn.normalize(sums[:, 3:6], dim=-1)
            out["orientation"], out["hit"] = (w * away.square()).sum(), (opacity > 0).sum()
        return out

    # ---- Training and keeping

    def parameter_groups(self, lr_grid=0.01, lr_mlp=0.001):
        """For torch.optim.AdamW(..., betas=(0.9, 0.99), eps=1e-15)."""
        small = [p for name, p in self.named_parameters() if name != "table"]
        return [{"params": [self.table], "lr": lr_grid}, {"params": small, "lr": lr_mlp}]

    def save(self, path):
        tensors = {k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}
        write(path, tensors, {"config": json.dumps(asdict(self.config))})

    @classmethod
    def load(cls, path, device="cpu"):
        from safetensors import SafetensorError, safe_open
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file; NeRF.save writes one")
        try:
            with safe_open(str(path), "pt") as file:
                nerf = cls(NeRFConfig(**json.loads(file.metadata()["config"])))
                nerf.load_state_dict({k: file.get_tensor(k) for k in file.keys()})
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: not a NeRF of ours ({error}); delete it") from None
        return nerf.to(device)

    @torch.no_grad()
    def mesh(self, resolution=128, threshold=None):
        """The surface sigma = threshold (None: half the mean density inside, at most 25).

        -> vertices (N,3) in the box, faces (M,3) counter-clockwise from outside, colors (N,3)
        """
        axis = torch.linspace(-1, 1, resolution, device=self.table.device)
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)         # (X,Y,Z,3)
        sigma = torch.cat([self.density(x) for x in grid.view(-1, 3).split(2**18)])
        if threshold is None:
            inside = sigma[sigma > min(1.0, sigma.max().item() / 2)]
            threshold = min(25.0, inside.mean().nan_to_num(50).item() / 2)
        sigma = Fn.pad(sigma.view(grid.shape[:3]), [1] * 6)                     # closed at the rim
        vertices, faces = remove_specks(*marching_tetrahedra(sigma, threshold))
        if not len(faces):
            raise ValueError(f"mesh: no density exceeds {threshold:g}; lower the threshold")
        vertices = ((vertices - 1) * (2 / (resolution - 1)) - 1).clamp(-1, 1)
        return vertices, faces, torch.cat([self.field(x)[1] for x in vertices.split(2**18)])


# ---- From views to 3D: the smallest complete lesson ----------------------------------------------

def fit(nerf, images, origins, directions, steps, rays=4096):
    """Fit to images (...,3) seen along these rays, by squared error; yields each step's PSNR.

    Images (...,4), on black and with their opacity, stand before a new colour each step: so nothing
    can hide in the colour of the background.
    """
    images, origins, directions = (x.flatten(0, -2) for x in (images, origins, directions))
    groups = nerf.parameter_groups(lr_grid=0.05, lr_mlp=0.01)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-15)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.05 ** (step / steps))
    nerf.train()
    for step in range(steps):
        nerf.update_occupancy(step)
        pick = torch.randint(len(images), (rays,), device=images.device)
        truth, background = images[pick], None
        if images.shape[1] == 4:
            background = torch.rand(3, device=images.device)
            truth = truth[:, :3] + (1 - truth[:, 3:]) * background
        rgb = nerf.render(origins[pick], directions[pick], background=background)["rgb"]
        error = (rgb - truth).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        falling.step()
        yield -10 * error.detach().log10()
    nerf.eval()


def toy_object(orbits, size, device):
    """A toy on black, from cameras on orbits (num_views, elevation, azimuth) -> rgb and opacity
    (V,H,W,4), origins, directions (V,H,W,3)"""
    import data
    c2w = torch.cat([data.orbit_cameras(*orbit) for orbit in orbits]).to(device)
    truth = data.toy_render(["a red robot wearing a blue hat"], c2w, size=size, background=0.0,
                            device=device)
    c2w[:, :3, 3] *= data.TOY_DISTANCE
    images = torch.cat([truth["rgb"][0], truth["opacity"][0]], -1)
    return images, *data.camera_rays(c2w, data.TOY_FOV, size, size)


def main():
    gpu = torch.cuda.is_available()
    device, views, size, steps = ("cuda", 16, 256, 1500) if gpu else ("cpu", 6, 64, 400)
    config = NeRFConfig() if gpu else NeRFConfig(levels=8, log2_table=15, base_resolution=8,
                                                 finest_resolution=128, hidden=32, max_samples=128)

    nerf = NeRF(config).to(device)
    seen = toy_object([(views, e, 7 * e) for e in (0, 20, 40, 60)], size, device)
    for step, psnr in enumerate(fit(nerf, *seen, steps), 1):
        if step % (steps // 10) == 0:
            print(f"step {step:5d}   {psnr:.1f} dB on the rays seen")
    truth, *rays = toy_object([(4, 30, 15)], size, device)
    error = (nerf.render(*rays, background=0.0)["rgb"] - truth[..., :3]).square().mean()
    print(f"{-10 * error.log10():.1f} dB on views never seen")


if __name__ == "__main__":
    main()
