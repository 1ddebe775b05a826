"""From density to triangles, and to the files that other programs open.

marching_tetrahedra cuts a grid of densities along a level, remove_specks cleans the result,
write_glb and write_obj keep it. NeRF.mesh in nerf.py calls the first two.

    sigma  density on a grid (X,Y,Z)      vertices (N,3)      faces (M,3), counter-clockwise from
    X, Y, Z  grid points of each axis     colors (N,3)        outside, indices of vertices
"""
import json
import os
import struct
from itertools import permutations

import torch
import torch.nn.functional as Fn

# ---- The surface ---------------------------------------------------------------------------------


def odd(order):
    return sum(order[i] > order[j] for j in range(len(order)) for i in range(j)) % 2 == 1


def tetrahedron_table():
    """Case (4 inside bits) -> up to two triangles, whose corners lie on edges (a, b): (16,2,3,2).

    They are counter-clockwise from outside if the tetrahedron's orientation is positive.
    """
    table = torch.zeros(16, 2, 3, 2, dtype=torch.long)
    for case in range(1, 15):
        inside = [v for v in range(4) if case >> v & 1]
        i, j, k, l = next(p for p in permutations(range(4))
                          if not odd(p) and sorted(p[:len(inside)]) == inside)
        triangles = ([[(i, j), (i, k), (i, l)]],
                     [[(i, k), (i, l), (j, l)], [(i, k), (j, l), (j, k)]],
                     [[(l, i), (l, j), (l, k)]])[len(inside) - 1]
        table[case, :len(triangles)] = torch.tensor(triangles)
    return table


def marching_tetrahedra(sigma, threshold):
    """sigma (X,Y,Z) -> vertices (N,3) in grid units, faces (M,3); closed if the rim is outside.

    Each cube is cut into six tetrahedra along its diagonal, one per order of the axes a, b, c:
    corners 0, e_a, e_a + e_b, (1,1,1). Neighbours agree on every face, so no gap is left.
    """
    sigma, device, orders = sigma.contiguous(), sigma.device, list(permutations(range(3)))
    stride = torch.tensor([sigma.stride(a) for a in range(3)], device=device)
    inside = sigma > threshold
    counts = Fn.avg_pool3d(inside[None].float(), 2, 1, divisor_override=1)[0]   # corners
    cubes = (((counts > 0) & (counts < 8)).nonzero() * stride).sum(-1)          # (M,) lowest
    steps = Fn.pad(stride[torch.tensor(orders, device=device)].cumsum(-1), (1, 0))      # (6,4)
    corners = (cubes[:, None, None] + steps).view(-1, 4)                        # (6M,4)
    mirrored = torch.tensor([odd(p) for p in orders], device=device).repeat(len(cubes))

    case = (inside.flatten()[corners] << torch.arange(4, device=device)).sum(-1)
    edges = tetrahedron_table().to(device)[case]                                # (6M,2,3,2)
    edges[mirrored] = edges[mirrored].flip(2)                                   # turn the triangles
    real = (edges[..., 0] != edges[..., 1]).all(-1)
    edges = corners[:, None, None].expand(-1, 2, 3, -1).gather(-1, edges)[real]
    edges = edges.view(-1, 2).sort(-1).values                                   # (3K,2) grid points
    edges, faces = edges.unique(dim=0, return_inverse=True)
    a, b = sigma.flatten()[edges].unbind(-1)
    s = ((threshold - a) / (b - a)).clamp(0.01, 0.99)[:, None]                  # no empty triangles
    ends = edges[..., None] // stride % torch.tensor(sigma.shape, device=device)        # (N,2,3)
    return torch.lerp(*ends.float().unbind(1), s), faces.view(-1, 3)


def remove_specks(vertices, faces, share=0.01):
    """Drop connected parts with less than this share of the faces; the largest always stays."""
    label, before = torch.arange(len(vertices), device=vertices.device), None
    while before is None or not torch.equal(label, before):   # faces spread the lowest
        before = label
        lowest = label[faces].amin(-1, keepdim=True).expand(-1, 3)
        label = label.scatter_reduce(0, faces.flatten(), lowest.flatten(), "amin")
        label = label[label]
    part = label[faces[:, 0]]
    size = part.bincount(minlength=1)
    faces = faces[size[part] >= (share * size.sum()).clamp(max=size.max())]
    used, faces = faces.unique(return_inverse=True)
    return vertices[used], faces


# ---- Files ---------------------------------------------------------------------------------------


def y_up(x):
    """Our world, z up, facing +x -> glTF's, y up, facing +z."""
    return x[:, [1, 2, 0]]


def write_obj(path, vertices, faces, colors):
    with open(f"{path}.part", "w") as file:
        for row in torch.cat([y_up(vertices), colors], -1).tolist():
            file.write("v %.5f %.5f %.5f %.4f %.4f %.4f\n" % tuple(row))
        for row in (faces + 1).tolist():
            file.write("f %d %d %d\n" % tuple(row))
    os.replace(f"{path}.part", path)


def write_glb(path, vertices, faces, colors):
    """Binary glTF 2.0: header, a JSON chunk, a chunk of positions, normals, colours, indices."""
    vertices, faces, colors = vertices.cpu().float(), faces.cpu(), colors.cpu().float()
    a, b, c = vertices[faces].unbind(1)
    normals = torch.zeros_like(vertices)                        # each face adds twice its area
    for corner in faces.unbind(1):
        normals.index_add_(0, corner, torch.linalg.cross(b - a, c - a))
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    arrays = y_up(vertices), Fn.normalize(y_up(normals), dim=-1), linear, faces.reshape(-1).int()
    parts, views, accessors = [x.contiguous().numpy().tobytes() for x in arrays], [], []
    for i, (x, part) in enumerate(zip(arrays, parts)):
        views.append({"buffer": 0, "byteOffset": sum(map(len, parts[:i])), "byteLength": len(part),
                      "target": 34963 if i == 3 else 34962})
        accessors.append({"bufferView": i, "componentType": 5125 if i == 3 else 5126,
                          "count": len(x), "type": "SCALAR" if i == 3 else "VEC3"})
    accessors[0].update(min=arrays[0].amin(0).tolist(), max=arrays[0].amax(0).tolist())
    surface = {"attributes": {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2},
               "indices": 3, "material": 0}
    text = json.dumps({
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [surface]}], "bufferViews": views, "accessors": accessors,
        "materials": [{"pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1}}],
        "buffers": [{"byteLength": sum(map(len, parts))}]}).encode()
    text, data = text + b" " * (-len(text) % 4), b"".join(parts)
    with open(f"{path}.part", "wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, 28 + len(text) + len(data)))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", len(data), b"BIN\0") + data)
    os.replace(f"{path}.part", path)
