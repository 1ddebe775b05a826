"""What the toy world's benchmarks ask for, and measures of pictures against its truth.

Pictures are (B, V, H, W, 3) in [0, 1], V views of each of B objects; every measure is (B,).
"""
import torch
import torch.nn.functional as F

import data


def toy_prompts(row, num, seed=0):
    """num different captions, every colour said, of one row of the quality table: "seen" in 3D;
    "combination", never seen, of things seen; a main "colour" or a "category" seen only in 2D."""
    specs, weight = data.all_specs()
    split, flat = data.splits(specs), data.is_flat(specs)
    name, main, part = flat[:, 0], flat[:, 1], flat[:, 2:].any(1)
    rows = {"seen": split == 0, "combination": (split == 2) & ~flat.any(1),
            "colour": (split == 1) & ~name & main & ~part,
            "category": (split == 1) & name & ~main & ~part}
    if row not in rows:
        raise ValueError(f"there are no prompts of the row {row!r}: choose from {', '.join(rows)}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(weight * rows[row], num, generator=generator)
    return [data.format_caption(spec) for spec in specs[chosen].tolist()]


def error(pictures, truth):
    """The mean squared error over all views of an object."""
    return (pictures - truth).square().flatten(1).mean(1)


def psnr(pictures, truth):
    """-10 log10 of the mean squared error over all views of an object, in dB."""
    return -10 * error(pictures, truth).clamp(min=1e-10).log10()


def iou(a, b):
    """Of two masks (B, V, H, W): pixels in both over pixels in either, all views together."""
    return (a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1).clamp(min=1)


def foreground(pictures, background, contrast=0.08):
    """For pictures without opacity before greys (B,): what differs from the grey by more than
    `contrast` in a channel, or cannot be reached from the border without crossing that."""
    grey = background.to(pictures).view(-1, 1, 1, 1, 1)
    open_ = ((pictures - grey).abs().amax(-1) <= contrast).flatten(0, 1)[:, None].float()
    outside = open_ * F.pad(torch.zeros_like(open_[..., 1:-1, 1:-1]), [1] * 4, value=1.0)
    while True:                                         # the outside grows along rows, columns
        grown = F.max_pool2d(outside, 3, stride=1, padding=1) * open_
        if torch.equal(grown, outside):
            return ~outside.bool()[:, 0].unflatten(0, pictures.shape[:2])
        outside = grown


def janus(pictures, truth, front):
    """The view from behind (B, 1, H, W, 3) is closer to the true front than to the true back."""
    return error(pictures, front) < error(pictures, truth)
