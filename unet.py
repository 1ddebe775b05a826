"""The UNet of Stable Diffusion 2.1, inflated from one picture to the V views of one object.

Holds the network and its two additions for multi-view diffusion; layouts.py reads its weights.
MVDream, section 3.1.1: the self-attention of the 2D network is *inflated*: the tokens of all V
views of an object stand in one sequence, so that every view sees every other, with no new
parameter. Section 3.1.2: each view's camera goes through a two-layer MLP that is added to the time
embedding. With num_views=1 and camera=None this is exactly the 2D network, as joint training needs.

Modules carry the names of the original (LDM) checkpoint, so that loading one is one strict call.

    N  pictures = B objects x V views, an object's adjacent     h, w  latent height, width
    C  channels, d those of a head      L = h*w tokens of a picture      M  text tokens (77)
    emb  time (and camera) embedding    kv  the text's keys and values
"""
import math
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from layouts import fill, read_model


@dataclass
class UNetConfig:
    """The defaults are Stable Diffusion 2.1 base, and MVDream's camera of 16 numbers."""
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple = (1, 2, 4, 4)      # channels of each level; from the second on, h, w halve
    num_res_blocks: int = 2
    attention_levels: tuple = (0, 1, 2)     # the levels that hold transformers
    num_head_channels: int = 64
    context_dim: int = 1024
    camera_dim: int = 16
    attention: str = "inflated"             # "none": views never meet; "temporal", "new3d": the
    camera: str = "time"                    # "text": a token; "none"             paper's ablations


def timestep_embedding(t, dim):
    """t (N,) -> (N, dim) = [cos(t f), sin(t f)], f_i = 10000^(-i / (dim/2)); the cosine first."""
    f = torch.exp(-math.log(10000) / (dim // 2) * torch.arange(dim // 2, device=t.device))
    angle = t.float()[:, None] * f
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def zero(module):
    """Start at zero: what `module` ends adds nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def conv(c_in, c_out, stride=1):
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1)


def named(**layers):
    """A Sequential whose layers have names: a checkpoint's names become plain data."""
    return nn.Sequential(OrderedDict(layers))


def mlp(dim_in, dim, dim_out, end=lambda layer: layer):
    return nn.Sequential(nn.Linear(dim_in, dim), nn.SiLU(), end(nn.Linear(dim, dim_out)))


def upsample(dim):
    return named(twice=nn.Upsample(scale_factor=2, mode="nearest"), conv=conv(dim, dim))


def camera_mlp(config):
    """16 numbers -> as wide as the time embedding, to be added to it, zero at first; or as one more
    token of the text."""
    width = 4 * config.model_channels
    dim_out = config.context_dim if config.camera == "text" else width
    return mlp(config.camera_dim, width, dim_out, end=zero)


class GroupNorm(nn.GroupNorm):
    """PyTorch's; under torch.compile written out: its own leaves the channels-last layout, and then
    every convolution copies what comes in and goes out."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return super().forward(x)
        # Channels last: a channel's statistics first, then its group's from those.
        variance, mean = (y.unflatten(1, (self.num_groups, -1))                 # (N, 32, C / 32)
                          for y in torch.var_mean(x.float(), (2, 3), correction=0))
        centre = mean.mean(2, keepdim=True)
        variance = (variance + (mean - centre).square()).mean(2, keepdim=True)
        scale = (variance + self.eps).rsqrt() * self.weight.view_as(mean[0])
        shift = self.bias.view_as(mean[0]) - centre * scale
        scale, shift = (y.flatten(1)[:, :, None, None] for y in (scale, shift))
        return (x.float() * scale + shift).to(x.dtype)


class ResBlock(nn.Module):
    """h = conv(silu(norm(x))) + linear(silu(emb));  out = skip(x) + conv(silu(norm(h)))."""

    def __init__(self, c_in, c_out, emb_dim):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(32, c_in), nn.SiLU(), conv(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(GroupNorm(32, c_out), nn.SiLU(), nn.Identity(),
                                        zero(conv(c_out, c_out)))
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """softmax(q k' / sqrt(d)) v in each of n sequences x (n, l, C).

    Of self-attention these are B sequences of V L tokens where inflated, else N of L. `kv`: the
    text's keys and values; the UNet makes them with this layer's to_k, to_v, once for all steps.
    """

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)        # (n, heads, l, d)

    def forward(self, x, kv=None):
        q, (k, v) = self.to_q(x), kv or (self.to_k(x), self.to_v(x))
        y = F.scaled_dot_product_attention(self.split(q), self.split(k), self.split(v))
        return self.to_out(y.transpose(1, 2).flatten(2))                # (n, l, C)


class GEGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)             # four times as wide, value and gate

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention (over all views of an object), attention to the text, feed-forward."""

    def __init__(self, dim, config):
        super().__init__()
        self.attention, heads = config.attention, dim // config.num_head_channels
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, config.context_dim, heads)
        self.ff = named(net=nn.Sequential(GEGLU(dim), nn.Identity(), nn.Linear(4 * dim, dim)))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        if config.attention in ("temporal", "new3d"):   # ablations: one layer more, zero at first
            self.norm4, self.attn3 = nn.LayerNorm(dim), Attention(dim, dim, heads)
            zero(self.attn3.to_out)

    def forward(self, x, kv, V):
        """x (N, L, C), kv the text's (N, M, C) each, V views in a set -> (N, L, C)"""
        N, L, C = x.shape
        h = self.norm1(x)
        if self.attention == "inflated":
            h = h.reshape(N // V, V * L, C)     # each token sees all of its set; V = 1 is 2D
        x = x + self.attn1(h).reshape(N, L, C)
        if V > 1 and self.attention == "new3d":
            x = x + self.attn3(self.norm4(x).reshape(N // V, V * L, C)).reshape(N, L, C)
        if V > 1 and self.attention == "temporal":  # along the views, a pixel a sequence
            h = self.norm4(x).reshape(N // V, V, L, C).transpose(1, 2).reshape(-1, V, C)
            x = x + self.attn3(h).reshape(N // V, L, V, C).transpose(1, 2).reshape(N, L, C)
        x = x + self.attn2(self.norm2(x), kv)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A picture (N, C, h, w) as tokens (N, L, C), through a transformer block, and back."""

    def __init__(self, dim, config):
        super().__init__()
        self.norm = GroupNorm(32, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, config)])
        self.proj_out = zero(nn.Linear(dim, dim))

    def forward(self, x, kv, V):
        h, w = x.shape[2:]
        y = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        y = self.proj_out(self.transformer_blocks[0](y, kv, V))
        return x + y.unflatten(1, (h, w)).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """For 256x256 pictures; R ResBlock, T SpatialTransformer, D Downsample, U Upsample:

        level  channels  h, w   input_blocks        middle_block   output_blocks
        0          320     32   conv, RT, RT                       RT, RT, RT
        1          640     16   D, RT, RT                          RT, RT, RTU
        2         1280      8   D, RT, RT                          RT, RT, RTU
        3         1280      4   D, R, R             R, T, R        R, R, RU
    """

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        widths = [config.model_channels * mult for mult in config.channel_mult]
        width, emb_dim = widths[0], 4 * config.model_channels
        self.time_embed = mlp(config.model_channels, emb_dim, emb_dim)
        if config.camera != "none":
            self.camera_embed = camera_mlp(config)

        def layers(c_in, c_out, level):
            block = nn.ModuleList([ResBlock(c_in, c_out, emb_dim)])
            if level in config.attention_levels:
                block.append(SpatialTransformer(c_out, config))
            return block

        self.input_blocks = nn.ModuleList([nn.ModuleList([conv(config.in_channels, width)])])
        skips = [width]                             # channels that each input block hands across
        for level, c_out in enumerate(widths):
            if level > 0:
                self.input_blocks.append(nn.ModuleList([named(op=conv(width, width, stride=2))]))
                skips.append(width)
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(layers(width, c_out, level))
                width = c_out
                skips.append(width)

        self.middle_block = nn.ModuleList([ResBlock(width, width, emb_dim),
                                           SpatialTransformer(width, config),
                                           ResBlock(width, width, emb_dim)])

        self.output_blocks = nn.ModuleList()
        for level, c_out in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.output_blocks.append(layers(width + skips.pop(), c_out, level))
                width = c_out
            if level > 0:
                self.output_blocks[-1].append(upsample(width))

        self.out = nn.Sequential(GroupNorm(32, width), nn.SiLU(),
                                 zero(conv(width, config.out_channels)))
        attn2 = [block.attn2 for block in self.modules() if isinstance(block, TransformerBlock)]
        self.text_layers = tuple(layer for a in attn2 for layer in (a.to_k, a.to_v))
        if sum(layer.out_features for layer in self.text_layers) == config.context_dim:
            raise ValueError(f"context_dim {config.context_dim}: as wide as all keys and values")

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """From any of the four weight layouts; frozen, for inference."""
        return cls.fill(*read_model(path), device, dtype)

    @classmethod
    def fill(cls, source, config, weights, device, dtype):
        config, weights = UNetConfig(**config["unet"]), weights["unet"]
        if config.camera == "time" and "camera_embed.0.weight" not in weights:  # a 2D checkpoint
            weights |= camera_mlp(config).state_dict(prefix="camera_embed.")
        return fill(cls, config, weights, f"{source}, unet", device, dtype)

    def changed(self, **config):
        """The same weights with another attention or camera; layers that it adds start at zero."""
        config = replace(self.config, **{name: value for name, value in config.items() if value})
        if config == self.config:
            return self
        other, same = UNet(config), config.camera == self.config.camera
        other.load_state_dict({name: weight for name, weight in self.state_dict().items()
                               if same or "camera_embed" not in name}, strict=False)
        return other

    def project_context(self, context):
        """(N, M, C) -> the text's keys and values of every layer, side by side: they do not change
        from step to step, so a sampler asks for them once and passes them on as `context`."""
        if self.config.camera == "text":            # here they change with the camera
            return context
        context = context.to(self.text_layers[0].weight.dtype)
        return torch.cat([layer(context) for layer in self.text_layers], dim=-1)

    def forward(self, x, t, context, camera=None, num_views=1):
        """x (N, 4, h, w), t (N,), context (N, M, C) or project_context's, camera (N, 16)
        -> prediction (N, 4, h, w), noise or v. Each `num_views` pictures in a row are one set."""
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(dtype))
        if camera is not None and self.config.camera == "time":
            emb = emb + self.camera_embed(camera.to(dtype))
        if camera is not None and self.config.camera == "text":
            context = torch.cat([context, self.camera_embed(camera.to(dtype))[:, None]], dim=1)
        if context.shape[-1] == self.config.context_dim:    # not projected yet
            kv = iter([layer(context.to(dtype)) for layer in self.text_layers])
        else:                                       # two for each transformer, in their order
            kv = iter(context.split([layer.out_features for layer in self.text_layers], dim=-1))

        def run(block, x):
            for layer in block:
                if isinstance(layer, ResBlock):
                    x = layer(x, emb)
                elif isinstance(layer, SpatialTransformer):
                    x = layer(x, (next(kv), next(kv)), num_views)
                else:
                    x = layer(x)
            return x

        x, skips = x.to(dtype), []
        for block in self.input_blocks:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = run(block, torch.cat([x, skips.pop()], dim=1))
        return self.out(x)
