"""The NeRF's operators, encoding, marching, compositing: in plain PyTorch, and compiled.

The plain twins say what is computed and serve where no compiler is; hashgrid.cu says how to do it
fast, on the CPU and on CUDA. It is compiled on first use, by PyTorch's own extension builder.
(Hash-grid encoding: Mueller et al. 2022. Compositing: NeRF, Mildenhall et al. 2020.)

    N  points or samples      L  levels of the grid        R      rays
    T  rows of a level        F  features of a row         t      distance along a ray
    r  vertices per axis      u  place in a cell           sigma  density
    delta  step along a ray   w  weight of a sample in its pixel
"""
import contextlib
import functools
import hashlib
import math
import os
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as Fn

PRIMES = (1, 2654435761, 805459861)         # Instant-NGP's spatial hash
EARLY_STOP = 1e-4                           # a ray ends where less than this of its light is left

# ---- Kernels: hashgrid.cu, compiled on first use -------------------------------------------------


@torch.compiler.assume_constant_result
def kernels(device):
    """Whether compiled kernels serve this type of device."""
    return device in served()


@functools.cache
def served():
    """The types of device that compiled kernels serve; where none, one line says why."""
    try:
        return load_kernels()
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error: " in line), lines[0])
        print(f"nerf.py: plain PyTorch serves, slowly, not the kernels ({reason})", file=sys.stderr)
        return ()


def load_kernels():
    """Load hashgrid.cu, compiled for this machine, if need be now. -> the types of device it serves

    It is built aside and renamed, under a lock that the system frees with its holder: neither a
    second process nor an interrupted build leaves it locked or half-done.
    """
    import fcntl
    from torch.utils import cpp_extension
    cuda = torch.cuda.is_available()
    if cuda and not cpp_extension.CUDA_HOME:
        raise RuntimeError("no nvcc; install the CUDA toolkit that torch.version.cuda names")
    arch = "%d%d" % torch.cuda.get_device_capability() if cuda else "cpu"
    tensor_cores = cuda and int(arch) >= 80         # network.cu's bfloat16 is for these
    sources = {name: Path(__file__).with_name(name).read_bytes()
               for name in ("hashgrid.cu", "network.cu")[:1 + tensor_cores]}
    info = Path("/proc/cpuinfo")
    cpu = info.read_text().partition("flags")[2].partition("\n")[0] if info.exists() else ""
    key = hashlib.sha256(repr((sources, torch.__version__, arch, cpu)).encode()).hexdigest()[:16]
    library = cache_folder() / f"hashgrid_{key}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            torch.ops.load_library(str(library))
        else:
            print(f"compiling the NeRF's kernels ({arch}), once, up to a minute", file=sys.stderr)
            compile_kernels(sources, arch, library)
    register_derivatives(tensor_cores)
    return ("cpu", "cuda") if cuda else ("cpu",)


def cache_folder():
    """At home or as asked for; where that is closed, a temporary folder that no one else writes."""
    ours = Path(tempfile.gettempdir()) / f"mvdream-{os.getuid()}"
    asked = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "mvdream")
    for folder in (asked, ours):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()                          # may we write?
            found = folder.lstat()
            if folder == asked or found.st_uid == os.getuid() and not found.st_mode & 0o022:
                return folder
    return Path(tempfile.mkdtemp(prefix="mvdream-"))


def compile_kernels(sources, arch, library):
    from torch.utils.cpp_extension import load
    os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable)      # ninja may be there
    for flags in (["-march=native", "-fopenmp"], []):
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            files = [Path(folder) / (name[:-2] + "cpp" if arch == "cpu" else name)
                     for name in sources]
            for file, text in zip(files, sources.values()):
                file.write_bytes(text)
            name = library.stem + "_native" * bool(flags)
            host = ["-O3", "-std=c++20", *flags]
            device = ["-O3", "-std=c++20", *(f"-Xcompiler={flag}" for flag in flags),
                      f"-gencode=arch=compute_{arch},code=sm_{arch}"]
            try:
                load(name, [str(file) for file in files], extra_cflags=host,
                     extra_cuda_cflags=device, build_directory=folder, is_python_module=False)
                return os.replace(Path(folder) / f"{name}.so", library)
            except RuntimeError:
                if not flags:
                    raise


def register_derivatives(tensor_cores):
    """Shapes and derivatives of the operators, for autograd and torch.compile.

    gather encodes; scatter is its transpose towards the table, pull towards the points; `v` makes
    each differentiate along a direction first. So they are closed under differentiation: each
    derivative, one per input, is an operator and its arguments. Two times; the others once.
    """
    op, f32 = torch.ops.hashgrid, torch.float32

    def register(name, fake, formula):
        def save(ctx, inputs, output):
            every = [*inputs, *(output if isinstance(output, tuple) else [output])]
            ctx.count, ctx.fixed = len(inputs), [None if torch.is_tensor(x) else x for x in every]
            ctx.save_for_backward(*[x if torch.is_tensor(x) else None for x in every])

        def backward(ctx, grad, *_):
            every = [f if x is None else x for x, f in zip(ctx.saved_tensors, ctx.fixed)]
            calls = [*formula(grad, *every), *[None] * ctx.count]
            return tuple(call[0](*call[1:]) if call and need else None
                         for call, need in zip(calls, ctx.needs_input_grad))

        torch.library.register_fake(f"hashgrid::{name}", fake)
        torch.library.register_autograd(f"hashgrid::{name}", backward, setup_context=save)

    def once(name, before):
        if before is not None:
            raise NotImplementedError(f"{name} can be differentiated once, not twice")

    def pull(d, x, T, g, r, v, y):
        if v is not None:
            raise NotImplementedError("hash_encode can be differentiated twice, not three times")
        return ((op.pull, x, T, g, r, d), (op.scatter, x, g, r, T.shape[1], d),
                (op.gather, x, T, r, d))

    def composite(g, s, c, t, offsets, delta, before, _, sums, w):
        once("composite", before)
        both = functools.cache(lambda: op.composite(s, c, t, offsets, delta, g, sums))
        return (lambda: both()[0],), (lambda: both()[1],)

    def network(g, x, W1, W2, before, *_):
        once("network", before)
        three = functools.cache(lambda: op.network(x, W1, W2, g))
        return [(lambda i: three()[i], i) for i in range(3)]

    register("gather", lambda x, T, r, v: x.new_empty(len(x), 2 * len(r), dtype=f32),
             lambda g, x, T, r, v, y: (
                 (op.pull, x, T, g, r, v), (op.scatter, x, g, r, T.shape[1], v), None,
                 (op.pull, x, T, g, r, None)))
    register("scatter", lambda x, g, r, rows, v: x.new_empty(len(r), rows, 2, dtype=f32),
             lambda U, x, g, r, rows, v, y: (
                 (op.pull, x, U, g, r, v), (op.gather, x, U, r, v), None, None,
                 (op.pull, x, U, g, r, None)))
    register("pull", lambda x, T, g, r, v: torch.empty_like(x, dtype=f32), pull)
    register("composite", lambda s, c, t, offsets, delta, g, sums: (
        (s.new_empty(len(offsets) - 1, c.shape[1] + 2), torch.empty_like(s)) if g is None
        else (torch.empty_like(s), torch.empty_like(c))), composite)
    if tensor_cores:
        register("network", lambda x, W1, W2, g: (
            (x.new_empty(len(x), 4), x.new_empty(0), x.new_empty(0)) if g is None
            else (torch.empty_like(x), torch.empty_like(W1), torch.empty_like(W2))), network)


# ---- Encoding ------------------------------------------------------------------------------------


def hash_encode(points, table, resolutions):
    """points (N,3) in [0,1]^3 (others are clamped), table (L,T,F) -> (N, L*F), level-major.

    Level l has resolutions[l] vertices per axis: trilinear between eight rows of table[l], dense
    where they fit, else hashed. Differentiable twice, in points and table.
    """
    L, T, _ = table.shape
    if T & (T - 1):
        raise ValueError(f"hash_encode: a table of {T} rows; their number must be a power of two")
    if len(resolutions) != L:
        raise ValueError(f"hash_encode: {len(resolutions)} resolutions for a table of {L} levels")
    if points.device != table.device:
        raise ValueError(f"hash_encode: points on {points.device} but table on {table.device}")
    if table.is_cuda and torch.float64 in (table.dtype, points.dtype):
        raise ValueError("hash_encode: no float64 on CUDA; use float32, or the CPU")
    if not torch.compiler.is_compiling() and not torch.isfinite(points.detach().sum()):
        raise ValueError("hash_encode: a point is NaN or infinite")
    return encode(points, table, resolutions)


def encode(points, table, resolutions):
    if fast(table):
        return torch.ops.hashgrid.gather(points, table, resolutions, None)
    return encode_plain(points, table, resolutions)


def encode_slope(points, table, resolutions, c, h):
    """-> h = encode(points) (N, L*F), and for each point the gradient of its c . h by it (N,3).

    Differentiable in table and c (N, L*F), not in points; `h` is what encode gave without gradient
    (the plain twin makes it again). The kernels add both outputs to the table in one pass; the twin
    takes a graph of a graph.
    """
    if fast(table):
        return EncodeSlope.apply(points, table, resolutions, c, h)
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        x = points.detach().requires_grad_()
        h = encode_plain(x, table, resolutions)
        slope, = torch.autograd.grad(h, x, c, create_graph=further)
    return (h if further else h.detach()), slope


class EncodeSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, table, resolutions, c, h):
        ctx.save_for_backward(points, table, c)
        ctx.resolutions = resolutions
        return h, torch.ops.hashgrid.pull(points, table, c, resolutions, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, v):
        (x, T, c), r, op = ctx.saved_tensors, ctx.resolutions, torch.ops.hashgrid
        _, table, _, by_c, _ = ctx.needs_input_grad
        return (None, op.scatter_both(x, g, c, r, T.shape[1], v) if table else None, None,
                op.gather(x, T, r, v) if by_c else None, None)


def fast(table):
    of_kernels = table.shape[2] == 2 and table.shape[1] > 1 and table.dtype != torch.float64
    return of_kernels and kernels(table.device.type)


def encode_plain(points, table, resolutions):
    T, levels = table.shape[1], []
    for rows, r in zip(table, resolutions):                     # r vertices per axis
        x = points.clamp(0, 1) * (r - 1)
        cell = x.detach().floor().clamp(max=r - 2)              # its lower corner
        u, cell, level = x - cell, cell.long(), 0               # u: place in the cell
        for corner in product((0, 1), repeat=3):
            i, j, k = (cell + torch.tensor(corner, device=cell.device)).unbind(-1)
            dense, hashed = i + r * (j + r * k), i * PRIMES[0] ^ j * PRIMES[1] ^ k * PRIMES[2]
            row = dense if r**3 <= T else hashed % T            # dense: x fastest
            wx, wy, wz = (u[:, a] if corner[a] else 1 - u[:, a] for a in range(3))
            level = level + (wx * wy * wz)[:, None] * rows[row]
        levels.append(level)
    return torch.cat(levels, -1)                                # (N, L*F)


# ---- Marching and compositing. The samples of all rays lie packed in one list: ray i owns
# ---- offsets[i] up to offsets[i+1] ---------------------------------------------------------------


def march(origins, directions, occupied, shift, delta, capacity=-1):
    """Samples (k + shift) delta behind where a ray enters the box, in the occupied cells.

    origins, directions (R,3), occupied (G,G,G) bool, shift (R,) in [0,1); capacity: room for this
    many samples, so that nothing waits for the device to count; -1 for exactly as many as there are
    -> offsets (R+1,), t (N,), points (N,3), their number
    """
    if kernels(origins.device.type):
        return torch.ops.hashgrid.march(origins, directions, occupied, shift, delta, capacity)
    return march_plain(origins, directions, occupied, shift, delta)


def march_plain(origins, directions, occupied, shift, delta):
    inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    faces = torch.stack([(-1 - origins) * inverse, (1 - origins) * inverse])
    near, far = faces.amin(0).amax(-1).clamp(min=0), faces.amax(0).amin(-1)     # (R,)
    most = math.ceil(2 * math.sqrt(3) / delta) + 1
    t = near[:, None] + (torch.arange(most, device=origins.device) + shift[:, None]) * delta
    points = origins[:, None] + t[..., None] * directions[:, None]              # (R,K,3)
    G = len(occupied)
    i, j, k = ((points + 1) * (G / 2)).long().clamp(0, G - 1).unbind(-1)
    keep = (t < far[:, None]) & occupied[i, j, k]
    offsets = Fn.pad(keep.sum(-1).cumsum(0), (1, 0))
    return offsets, t[keep], points[keep], offsets[-1]


def rays_of(offsets, N):
    """The ray that owns each of N samples (N,)."""
    sample = torch.arange(N, device=offsets.device)
    return (torch.searchsorted(offsets, sample, right=True) - 1).clamp(max=len(offsets) - 2)


def composite(sigma, values, t, offsets, delta):
    """Front to back: w_i = alpha_i prod_{j<i} (1 - alpha_j), alpha_i = 1 - exp(-sigma_i delta).

    sigma (N,), values (N,C) -> sums over each ray of w [values, 1, t] (R, C+2); w (N,), no gradient
    """
    if values.shape[1] in (3, 6) and kernels(sigma.device.type):
        sums, w = torch.ops.hashgrid.composite(sigma, values, t, offsets, delta, None, None)
        return sums, w.detach()
    return composite_plain(sigma, values, t, offsets, delta)


def composite_plain(sigma, values, t, offsets, delta):
    ray = rays_of(offsets, len(sigma))
    depth = Fn.pad((sigma * delta).double().cumsum(0), (1, 0))                  # optical, all rays
    light = torch.exp(depth[offsets[:-1]][ray] - depth[:-1]).to(sigma)          # transmittance
    w = light * -torch.expm1(-sigma * delta) * (light > EARLY_STOP)
    sums = torch.cat([values, torch.ones_like(t)[:, None], t[:, None]], -1) * w[:, None]
    return sums.new_zeros(len(offsets) - 1, sums.shape[1]).index_add(0, ray, sums), w.detach()
