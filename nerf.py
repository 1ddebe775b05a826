"""A hash-grid NeRF: encoding, field, occupancy grid, marching, compositing, shading, mesh.

The 3D half of text-to-3D (MVDream section 3.3; the encoding is Instant-NGP's, Mueller et al. 2022). Rays come in
as tensors, pictures go out. Every kernel has a plain PyTorch twin of the same signature here; hashgrid.cu
holds the fast ones, compiled on first use where a compiler exists.

    N  points or samples       R  rays                       t      distance along a ray
    L  levels of the grid      T  rows of a level's table    sigma  density
    F  features per row        delta  step along a ray       w      weight of a sample in its pixel

World: z up, objects face +x, the box is [-1, 1]^3. Colours are in [0, 1].
"""

import json
import math
import os
import struct
import sys
from dataclasses import asdict, dataclass
from itertools import permutations, product

import torch
import torch.nn.functional as Fn
from torch import nn

PRIMES = (1, 2654435761, 805459861)     # Instant-NGP's spatial hash
EARLY_STOP = 1e-4                       # a ray ends where less than this of its light is left


# ---------------------------------------------------------------------------------------------
# Encoding


def hash_encode(points, table, resolutions):
    """points (N,3) in [0,1]^3, table (L,T,F) -> (N, L*F), level-major; points outside are clamped."""
    check_encode(points, table, resolutions)
    return hash_encode_plain(points, table, resolutions)


def check_encode(points, table, resolutions):
    L, T, _ = table.shape
    if T & (T - 1):
        raise ValueError(f"hash_encode: a table of {T} rows; its size must be a power of two")
    if len(resolutions) != L:
        raise ValueError(f"hash_encode: {len(resolutions)} resolutions for a table of {L} levels")
    if points.device != table.device:
        raise ValueError(f"hash_encode: points on {points.device}, table on {table.device}; move one")
    if table.is_cuda and table.dtype == torch.float64:
        raise ValueError("hash_encode: float64 has no CUDA kernel; use float32, or the CPU")
    if not torch.compiler.is_compiling() and not torch.isfinite(points.sum()):
        raise ValueError("hash_encode: a point is NaN or infinite; check what produced the points")


def hash_encode_plain(points, table, resolutions):
    T = table.shape[1]
    levels = []
    for rows, r in zip(table, resolutions):                     # r vertices per axis
        x = points.clamp(0, 1) * (r - 1)
        cell = x.detach().floor().clamp(max=r - 2)              # lower corner of the cell
        u = x - cell                                            # (N,3) in [0,1]: place in the cell
        cell, level = cell.long(), 0
        for corner in product((0, 1), repeat=3):
            i, j, k = (cell + torch.tensor(corner, device=cell.device)).unbind(-1)
            if r**3 <= T:
                row = i + r * (j + r * k)                       # dense, x fastest
            else:
                row = (i * PRIMES[0] ^ j * PRIMES[1] ^ k * PRIMES[2]) % T
            wx, wy, wz = (u[:, a] if corner[a] else 1 - u[:, a] for a in range(3))
            level = level + (wx * wy * wz)[:, None] * rows[row]
        levels.append(level)
    return torch.cat(levels, -1)                                # (N, L*F)


# ---------------------------------------------------------------------------------------------
# Marching and compositing. Samples of all rays lie packed in one list; ray i owns
# the samples offsets[i] up to offsets[i+1].


def march(origins, directions, occupied, shift, delta):
    """Samples at (k + shift) delta behind the box's face, where the grid is occupied.

    origins, directions (R,3), occupied (G,G,G) bool, shift (R,) in [0,1)
    -> offsets (R+1,), t (N,), points (N,3)
    """
    inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    faces = torch.stack([(-1 - origins) * inverse, (1 - origins) * inverse])
    near, far = faces.amin(0).amax(-1).clamp(min=0), faces.amax(0).amin(-1)         # (R,)

    most = math.ceil(2 * math.sqrt(3) / delta) + 1
    k = torch.arange(most, device=origins.device) + shift[:, None]                  # (R,K)
    t = near[:, None] + k * delta
    points = origins[:, None] + t[..., None] * directions[:, None]                  # (R,K,3)
    G = occupied.shape[0]
    i, j, k = ((points + 1) * (G / 2)).long().clamp(0, G - 1).unbind(-1)
    keep = (t < far[:, None]) & occupied[i, j, k]

    offsets = Fn.pad(keep.sum(-1).cumsum(0), (1, 0))
    return offsets, t[keep], points[keep]


def composite(sigma, values, t, offsets, delta):
    """Front to back: w_i = alpha_i prod_{j<i} (1 - alpha_j), alpha = 1 - exp(-sigma delta).

    sigma (N,), values (N,C) -> sums over each ray of w [values, 1, t] (R, C+2), and w (N,), without gradient
    """
    counts = offsets.diff()
    ray = torch.repeat_interleave(counts, output_size=len(sigma))
    depth = (sigma * delta).double().cumsum(0)                  # optical depth, over all rays
    depth = torch.cat([depth.new_zeros(1), depth])
    light = torch.exp(depth[offsets[:-1]][ray] - depth[:-1]).to(sigma)              # transmittance
    w = light * -torch.expm1(-sigma * delta) * (light > EARLY_STOP)
    sums = torch.cat([values, torch.ones_like(t)[:, None], t[:, None]], -1) * w[:, None]
    return sums.new_zeros(len(counts), sums.shape[1]).index_add(0, ray, sums), w.detach()


# ---------------------------------------------------------------------------------------------
# The field


@dataclass
class NeRFConfig:
    levels: int = 16
    features: int = 2
    log2_table: int = 19                    # T = 2^19 rows a level
    base_resolution: int = 16
    finest_resolution: int = 4096
    hidden: int = 64
    occupancy: int = 32                     # cells per axis of the occupancy grid
    max_samples: int = 512                  # per ray: the step is the box's diagonal / max_samples
    background: str = "learned"             # or None: black unless render() is given a colour
    blob: tuple = (10.0, 0.5)               # start: density bias b(x) = 10 (1 - |x| / 0.5)

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
    return torch.stack([0.28209479 * torch.ones_like(x),
                        -0.48860251 * y, 0.48860251 * z, -0.48860251 * x,
                        1.09254843 * x * y, -1.09254843 * y * z, 0.31539157 * (3 * z * z - 1),
                        -1.09254843 * x * z, 0.54627421 * (x * x - y * y)], -1)


class NeRF(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = c = config or NeRFConfig()
        self.resolutions = c.resolutions()
        self.delta = 2 * math.sqrt(3) / c.max_samples
        self.table = nn.Parameter(torch.empty(c.levels, 2**c.log2_table, c.features).uniform_(-1e-4, 1e-4))
        self.density_mlp = mlp(c.levels * c.features, c.hidden, 1)
        self.color_mlp = mlp(c.levels * c.features, c.hidden, 3)
        self.background_mlp = mlp(9, 16, 16, 3) if c.background == "learned" else None
        # sigma * delta per cell; before the first update what the blob alone gives
        self.register_buffer("occupancy", self.cell_points(torch.arange(c.occupancy**3), 0.5))
        self.occupancy = Fn.softplus(self.blob(self.occupancy)) * self.delta

    def blob(self, x):
        height, radius = self.config.blob
        return height * (1 - (x.square().sum(-1) + 1e-12).sqrt() / radius)

    def density(self, x):
        """x (N,3) in [-1,1]^3 -> sigma (N,)."""
        return self.field(x)[0]

    def field(self, x):
        """x (N,3) -> sigma (N,), albedo (N,3)."""
        features = hash_encode((x + 1) / 2, self.table, self.resolutions)
        sigma = Fn.softplus(self.density_mlp(features)[:, 0] + self.blob(x))
        return sigma, torch.sigmoid(self.color_mlp(features))

    def field_and_normals(self, x, normals):
        """The same, and n = -grad sigma / |grad sigma| (N,3)."""
        if normals == "analytic":                   # d sigma / d x, itself differentiable
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                sigma, albedo = self.field(x)
                slope, = torch.autograd.grad(sigma.sum(), x, create_graph=self.training)
        else:                                       # three more looks at the field, no second order
            eps = 0.01
            sigma, albedo = self.field(x)
            steps = eps * torch.eye(3, device=x.device)
            beside = self.density((x[:, None] + steps).flatten(0, 1)).view(-1, 3)
            slope = (beside - sigma[:, None]) / eps
        return sigma, albedo, -Fn.normalize(slope, dim=-1)

    def background(self, directions):
        if self.background_mlp is None:
            return torch.zeros_like(directions)
        return torch.sigmoid(self.background_mlp(spherical_harmonics((directions + 1) / 2)))

    # -----------------------------------------------------------------------------------------
    # Occupancy

    def cell_points(self, cells, jitter):
        """Flat cell numbers -> points inside those cells (N,3)."""
        G = self.config.occupancy
        corner = torch.stack([cells // (G * G), cells // G % G, cells % G], -1)
        return (corner + jitter) * (2 / G) - 1

    def occupied(self):
        G = self.config.occupancy
        return (self.occupancy > self.occupancy.mean().clamp(max=0.01)).view(G, G, G)

    @torch.no_grad()
    def update_occupancy(self, step):
        """Call every step; acts on every 16th: occ = max(0.95 occ, sigma delta) in the visited cells."""
        if step % 16:
            return
        device, total = self.occupancy.device, len(self.occupancy)
        if step < 256:
            cells = torch.arange(total, device=device)
        else:                                       # a quarter anywhere, a quarter where it is occupied
            anywhere = torch.randint(total, (total // 4,), device=device)
            rank = self.occupied().flatten().cumsum(0)
            pick = (torch.rand(total // 4, device=device) * rank[-1]).long()
            there = torch.searchsorted(rank, pick, right=True).clamp(max=total - 1)
            cells = torch.cat([anywhere, there])
        x = self.cell_points(cells, torch.rand(len(cells), 3, device=device))
        fresh = self.density(x).float() * self.delta
        self.occupancy[cells] = 0.95 * self.occupancy[cells]
        self.occupancy.scatter_reduce_(0, cells, fresh, "amax")

    # -----------------------------------------------------------------------------------------
    # Rendering

    def render(self, origins, directions, *,        # (...,3) each; directions of length 1
               background=None,                     # None: the learned one; or a colour, broadcast to (...,3)
               shading="albedo",                    # or "textureless", "diffuse"
               light=None,                          # position(s) of the point light, None: at the camera
               ambient=0.0,                         # shade = ambient + (1 - ambient) max(0, n.l)
               normals=None,                        # or "analytic", "finite"
               chunk=None):                         # rays at a time, None: all in training, a few in eval
        """-> rgb (...,3), opacity, depth (...,1), num_samples; with normals: normal (...,3), orientation.

        Training: samples shifted at random, once a ray. Eval: deterministic, no gradient, memory bounded.
        """
        if shading not in ("albedo", "textureless", "diffuse"):
            raise ValueError(f'render: shading {shading!r} is none of "albedo", "textureless", "diffuse"')
        if normals not in (None, "analytic", "finite"):
            raise ValueError(f'render: normals {normals!r} is none of None, "analytic", "finite"')
        shape = origins.shape[:-1]
        if shading != "albedo":
            normals = normals or "analytic"
            light = origins if light is None else light

        def flat(x):
            return x if x is None else torch.as_tensor(
                x, dtype=torch.float32, device=origins.device).expand(*shape, 3).reshape(-1, 3)

        rays = [flat(x) for x in (origins, directions, background, light)]
        if chunk is None:
            chunk = len(rays[0]) if self.training else max(1, 2**22 // self.config.max_samples)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            parts = [self.render_rays(*[x if x is None else x[i:i + chunk] for x in rays],
                                      shading, ambient, normals)
                     for i in range(0, max(len(rays[0]), 1), chunk)]
        out = {k: torch.cat([p[k] for p in parts]).view(*shape, -1)
               for k in parts[0] if parts[0][k].dim()}
        out["num_samples"] = sum(p["num_samples"] for p in parts)
        if normals:
            hit = sum(p["hit"] for p in parts).clamp(min=1)
            out["orientation"] = sum(p["orientation"] for p in parts) / hit
        return out

    def render_rays(self, origins, directions, background, light, shading, ambient, normals):
        R, device = len(origins), origins.device
        shift = torch.rand(R, device=device) if self.training else torch.full((R,), 0.5, device=device)
        offsets, t, x = march(origins, directions, self.occupied(), shift, self.delta)
        ray = torch.repeat_interleave(offsets.diff(), output_size=len(t)) if normals else None

        if normals:
            sigma, color, n = self.field_and_normals(x, normals)
            if shading != "albedo":
                towards = Fn.normalize(light[ray] - x, dim=-1)
                shade = ambient + (1 - ambient) * (n * towards).sum(-1, keepdim=True).clamp(min=0)
                color = shade.expand(-1, 3) if shading == "textureless" else color * shade
            values = torch.cat([color, n], -1)
        else:
            sigma, values = self.field(x)
        sums, w = composite(sigma, values, t, offsets, self.delta)      # (R, C+2), (N,)

        opacity = sums[:, -2:-1]
        if background is None:
            background = self.background(directions)
        out = {"rgb": sums[:, :3] + (1 - opacity) * background, "opacity": opacity,
               "depth": sums[:, -1:], "num_samples": torch.tensor(len(t))}
        if normals:
            facing_away = (n * directions[ray]).sum(-1).clamp(min=0)
            out["normal"] = Fn.normalize(sums[:, 3:6], dim=-1)
            out["orientation"] = (w * facing_away.square()).sum()
            out["hit"] = (opacity > 0).sum()
        return out

    # -----------------------------------------------------------------------------------------
    # Training and keeping

    def parameter_groups(self, lr_grid=0.01, lr_mlp=0.001):
        """For torch.optim.AdamW(..., betas=(0.9, 0.99), eps=1e-15)."""
        small = [p for name, p in self.named_parameters() if name != "table"]
        return [{"params": [self.table], "lr": lr_grid}, {"params": small, "lr": lr_mlp}]

    def save(self, path):
        from safetensors.torch import save_file
        tensors = {k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}
        save_file(tensors, f"{path}.part", metadata={"config": json.dumps(asdict(self.config))})
        os.replace(f"{path}.part", path)

    @classmethod
    def load(cls, path, device="cpu"):
        from safetensors import safe_open
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such NeRF; NeRF.save() writes one")
        with safe_open(str(path), "pt") as file:
            config = (file.metadata() or {}).get("config")
            if config is None:
                raise ValueError(f"{path}: not a saved NeRF (no config in its metadata)")
            nerf = cls(NeRFConfig(**json.loads(config)))
            nerf.load_state_dict({k: file.get_tensor(k) for k in file.keys()})
        return nerf.to(device)

    @torch.no_grad()
    def mesh(self, resolution=128, threshold=None):
        """The surface sigma = threshold (None: half the mean density inside, at most 25).

        -> vertices (N,3) in the box, faces (M,3) counter-clockwise from outside, colors (N,3)
        """
        device = self.table.device
        axis = torch.linspace(-1, 1, resolution, device=device)
        x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
        sigma = torch.cat([self.density(part).float() for part in x.split(2**18)])
        if threshold is None:
            inside = sigma[sigma > 1]
            threshold = min(25.0, inside.mean().item() / 2) if len(inside) else 25.0
        sigma = sigma.view(resolution, resolution, resolution)
        vertices, faces = marching_tetrahedra(Fn.pad(sigma, [1] * 6), threshold)
        vertices, faces = remove_specks(vertices, faces)
        if not len(faces):
            raise ValueError(f"mesh: the density nowhere reaches {threshold:g}; lower the threshold")
        vertices = ((vertices - 1) * (2 / (resolution - 1)) - 1).clamp(-1, 1)
        colors = torch.cat([self.field(part)[1].float() for part in vertices.split(2**18)])
        return vertices, faces, colors


# ---------------------------------------------------------------------------------------------
# Mesh


def tetrahedron_table():
    """Case (4 inside bits) -> up to 2 triangles, each corner an edge (a, b) of the tetrahedron.

    For a tetrahedron of positive orientation, triangles come out counter-clockwise from outside.
    """
    table = torch.zeros(16, 2, 3, 2, dtype=torch.long)
    even = [p for p in permutations(range(4))
            if sum(p[i] > p[j] for i in range(4) for j in range(i + 1, 4)) % 2 == 0]
    for case in range(1, 15):
        inside = [v for v in range(4) if case >> v & 1]
        n = len(inside)
        i, j, k, l = next(p for p in even if sorted(p[:n]) == inside)
        triangles = {1: [[(i, j), (i, k), (i, l)]],
                     2: [[(i, k), (i, l), (j, l)], [(i, k), (j, l), (j, k)]],
                     3: [[(l, i), (l, j), (l, k)]]}[n]
        table[case, :len(triangles)] = torch.tensor(triangles)
    return table


def marching_tetrahedra(sigma, threshold):
    """sigma (X,Y,Z) -> vertices (N,3) in grid units, faces (M,3); closed where sigma's rim is outside.

    Each cube is cut into six tetrahedra along its diagonal, one per order of the axes: corners
    0, e_a, e_a + e_b, (1,1,1). Neighbours agree on every face, so nothing is left open.
    """
    device = sigma.device
    inside = (sigma > threshold)
    stride = torch.tensor([sigma.shape[1] * sigma.shape[2], sigma.shape[2], 1])
    mixed = Fn.max_pool3d(inside[None].float(), 2, 1) != -Fn.max_pool3d(-inside[None].float(), 2, 1)
    cube = (mixed[0].nonzero() * stride.to(device)).sum(-1)                 # (M,) lower corners
    steps = torch.stack([torch.eye(3, dtype=torch.long)[list(p)].cumsum(0) for p in permutations(range(3))])
    tets = Fn.pad((steps * stride).sum(-1), (1, 0)).to(device)              # (6,4) flat offsets
    odd = torch.tensor([sum(p[i] > p[j] for i in range(3) for j in range(i + 1, 3)) % 2
                        for p in permutations(range(3))], device=device).bool()
    corners = (cube[:, None, None] + tets).view(-1, 4)                      # (6M,4)
    flip = odd.repeat(len(cube))

    case = (inside.flatten()[corners] * torch.tensor([1, 2, 4, 8], device=device)).sum(-1)
    edges = tetrahedron_table().to(device)[case]                            # (6M,2,3,2) local corners
    edges[flip] = edges[flip].flip(2)                                       # mirrored: turn the triangle
    real = edges[..., 0] != edges[..., 1]                                   # unused rows hold zeros
    edges = corners[:, None, None].expand(-1, 2, 3, -1).gather(-1, edges)[real.all(-1)]
    edges = edges.sort(-1).values.view(-1, 2)                               # (3K,2) flat grid vertices

    edges, faces = edges.unique(dim=0, return_inverse=True)
    a, b = sigma.flatten()[edges].unbind(-1)
    s = ((threshold - a) / (b - a)).clamp(0.01, 0.99)[:, None]              # no triangle without area
    place = torch.stack([edges // stride[0].item(), edges // stride[1].item() % sigma.shape[1],
                         edges % sigma.shape[2]], -1).float()               # (N,2,3)
    return place[:, 0] + s * (place[:, 1] - place[:, 0]), faces.view(-1, 3)


def remove_specks(vertices, faces, share=0.01):
    """Drop connected parts with less than this share of the faces."""
    label = torch.arange(len(vertices), device=vertices.device)
    while len(faces):                               # every face takes its lowest label, then jump
        lowest = label[faces].amin(-1, keepdim=True).expand(-1, 3)
        fresh = label.scatter_reduce(0, faces.flatten(), lowest.flatten(), "amin")
        fresh = fresh[fresh]
        if torch.equal(fresh, label):
            break
        label = fresh
    part = label[faces[:, 0]]
    faces = faces[part.bincount(minlength=1)[part] >= share * len(faces)]
    used, faces = faces.unique(return_inverse=True)
    return vertices[used], faces


def y_up(x):
    """Our z-up world that faces +x -> glTF's y-up world that faces +z."""
    return x[:, [1, 2, 0]]


def write_obj(path, vertices, faces, colors):
    rows = torch.cat([y_up(vertices), colors], -1).tolist()
    with open(f"{path}.part", "w") as file:
        file.writelines("v %.5f %.5f %.5f %.4f %.4f %.4f\n" % tuple(row) for row in rows)
        file.writelines("f %d %d %d\n" % (a + 1, b + 1, c + 1) for a, b, c in faces.tolist())
    os.replace(f"{path}.part", path)


def write_glb(path, vertices, faces, colors):
    """Binary glTF 2.0: a 12-byte header, one JSON chunk, one chunk of positions, normals, colours, indices."""
    vertices, faces, colors = vertices.cpu().float(), faces.cpu(), colors.cpu().float()
    a, b, c = vertices[faces].unbind(1)
    normals = torch.zeros_like(vertices)
    for corner in faces.unbind(1):
        normals.index_add_(0, corner, torch.linalg.cross(b - a, c - a))
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    arrays = [y_up(vertices), Fn.normalize(y_up(normals), dim=-1), linear, faces.reshape(-1).int()]
    blobs = [x.contiguous().numpy().tobytes() for x in arrays]

    views, accessors, start = [], [], 0
    for x, blob in zip(arrays, blobs):
        last = x.dtype == torch.int32
        views.append({"buffer": 0, "byteOffset": start, "byteLength": len(blob),
                      "target": 34963 if last else 34962})
        accessors.append({"bufferView": len(accessors), "componentType": 5125 if last else 5126,
                          "count": len(x), "type": "SCALAR" if last else "VEC3"})
        start += len(blob)
    accessors[0].update(min=arrays[0].amin(0).tolist(), max=arrays[0].amax(0).tolist())
    attributes = {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}
    scene = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
             "meshes": [{"primitives": [{"attributes": attributes, "indices": 3, "material": 0}]}],
             "materials": [{"pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1}}],
             "buffers": [{"byteLength": start}], "bufferViews": views, "accessors": accessors}
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    data = b"".join(blobs)
    with open(f"{path}.part", "wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, 28 + len(text) + len(data)))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", len(data), b"BIN\0") + data)
    os.replace(f"{path}.part", path)
