"""The UNet of Stable Diffusion 2.1, inflated from one picture to the V views of one object.

Holds the network, its two additions for multi-view diffusion, and the loading of its weights.
MVDream, section 3.1: the self-attention of the 2D network is *inflated*: the tokens of all V views
of an object stand in one sequence, so that every view sees every other, with no new parameter; and
each view's camera goes through a two-layer MLP that is added to the time embedding. With
num_views=1 and camera=None this is exactly the 2D network, which is what joint training uses.

Modules carry the names of the original (LDM) checkpoint, so that loading one is one strict call;
Hugging Face's names are translated by `ldm_key`.

    N  pictures = B objects x V views, view-fastest      h, w  latent height, width
    C  channels       L = h*w tokens of one picture      M     text tokens (77)
"""

import json
import math
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn


@dataclass
class UNetConfig:
    """The defaults are Stable Diffusion 2.1 base, and MVDream's camera of 16 numbers."""
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple = (1, 2, 4, 4)      # channels of each level; each level halves h and w
    num_res_blocks: int = 2
    attention_levels: tuple = (0, 1, 2)     # the levels that hold transformers
    num_head_channels: int = 64
    context_dim: int = 1024
    camera_dim: int = 16
    attention: str = "inflated"             # the paper's ablation: "none", "temporal", "new3d"
    camera: str = "time"                    # the paper's ablation: "text" (a token), "none"


def timestep_embedding(t, dim):
    """t (N,) -> (N, dim) = [cos(t f), sin(t f)], f_i = 10000^(-i / (dim/2)); the cosine first."""
    f = torch.exp(-math.log(10000) / (dim // 2) * torch.arange(dim // 2, device=t.device))
    angle = t.float()[:, None] * f
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def zero(module):
    """Start at zero, so that the residual branch that `module` ends adds nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def conv(c_in, c_out, stride=1):
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1)


def named(**layers):
    """A Sequential whose layers have names: a checkpoint's names become plain data."""
    return nn.Sequential(OrderedDict(layers))


def mlp(dim_in, dim_hidden, dim_out):
    return nn.Sequential(nn.Linear(dim_in, dim_hidden), nn.SiLU(), nn.Linear(dim_hidden, dim_out))


def downsample(dim):
    return named(op=conv(dim, dim, stride=2))


def upsample(dim):
    return named(twice=nn.Upsample(scale_factor=2, mode="nearest"), conv=conv(dim, dim))


def camera_mlp(config):
    """16 numbers -> the width of the time embedding (or of a text token); of zero effect at first,
    so that a 2D checkpoint keeps giving what it gave."""
    width = 4 * config.model_channels
    camera_embed = mlp(config.camera_dim, width, config.context_dim if config.camera == "text" else width)
    zero(camera_embed[2])
    return camera_embed


class ResBlock(nn.Module):
    """h = conv(silu(norm(x))) + linear(silu(emb));  out = skip(x) + conv(silu(norm(h)))."""

    def __init__(self, c_in, c_out, emb_dim):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), conv(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, c_out), nn.SiLU(), nn.Identity(),
                                        zero(conv(c_out, c_out)))
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """softmax(q k' / sqrt(d)) v; queries from x, keys and values from x itself or from the text."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)        # (N, heads, L, d)

    def project(self, context):
        return self.split(self.to_k(context)), self.split(self.to_v(context))

    def forward(self, x, kv=None):
        k, v = self.project(x) if kv is None else kv
        y = F.scaled_dot_product_attention(self.split(self.to_q(x)), k, v)
        return self.to_out(y.transpose(1, 2).flatten(2))                # (N, L, C)


class GEGLU(nn.Module):
    def __init__(self, dim, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention (over all views of an object), attention to the text, feed-forward."""

    def __init__(self, dim, heads, context_dim, attention):
        super().__init__()
        self.attention = attention
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = named(net=nn.Sequential(
            GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        if attention in ("temporal", "new3d"):      # ablations: a new layer, of zero effect at first
            self.norm4, self.attn3 = nn.LayerNorm(dim), Attention(dim, dim, heads)
            zero(self.attn3.to_out)

    def forward(self, x, kv, V):
        N, L, C = x.shape
        h = self.norm1(x)
        if self.attention == "inflated":
            h = h.reshape(N // V, V * L, C)                             # the whole of section 3.1
        x = x + self.attn1(h).reshape(N, L, C)
        if V > 1 and self.attention == "new3d":
            x = x + self.attn3(self.norm4(x).reshape(N // V, V * L, C)).reshape(N, L, C)
        if V > 1 and self.attention == "temporal":  # along the views, each pixel for itself
            h = self.norm4(x).reshape(N // V, V, L, C).transpose(1, 2).reshape(-1, V, C)
            x = x + self.attn3(h).reshape(N // V, L, V, C).transpose(1, 2).reshape(N, L, C)
        x = x + self.attn2(self.norm2(x), kv)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A picture (N, C, h, w) as tokens (N, L, C), through a transformer block, and back."""

    def __init__(self, dim, config):
        super().__init__()
        heads = dim // config.num_head_channels
        self.norm = nn.GroupNorm(32, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(dim, heads, config.context_dim, config.attention)])
        self.proj_out = zero(nn.Linear(dim, dim))

    def forward(self, x, kv, V):
        h, w = x.shape[2:]
        y = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        y = self.proj_out(self.transformer_blocks[0](y, kv, V))
        return x + y.unflatten(1, (h, w)).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """At the default size (R: ResBlock, T: SpatialTransformer, D: Downsample, U: Upsample):

        level  channels  h, w   input_blocks        middle_block   output_blocks
        0          320     32   conv, RT, RT                       RT, RT, RT
        1          640     16   D, RT, RT                          RT, RT, RTU
        2         1280      8   D, RT, RT                          RT, RT, RTU
        3         1280      4   D, R, R             R, T, R        R, R, RU
    """

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or UNetConfig()
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
                self.input_blocks.append(nn.ModuleList([downsample(width)]))
                skips.append(width)
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(layers(width, c_out, level))
                width = c_out
                skips.append(width)

        self.middle_block = nn.ModuleList([ResBlock(width, width, emb_dim), SpatialTransformer(width, config),
                                           ResBlock(width, width, emb_dim)])

        self.output_blocks = nn.ModuleList()
        for level, c_out in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.output_blocks.append(layers(width + skips.pop(), c_out, level))
                width = c_out
            if level > 0:
                self.output_blocks[-1].append(upsample(width))

        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(),
                                 zero(conv(width, config.out_channels)))
        self.text_layers = tuple(m.attn2 for m in self.modules() if isinstance(m, TransformerBlock))

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """From any of the four weight layouts; frozen, for inference."""
        layout, place = find_layout(path)
        if place.is_dir():
            file = weight_file(place / "unet")
            tensors, config = read_tensors(file), hugging_face_config(read_config(file))
            tensors = {ldm_key(key, config): tensor for key, tensor in tensors.items()}
        else:
            tensors, config = read_tensors(place), UNetConfig(**read_config(place).get("unet", {}))
            tensors = take(tensors, "model.diffusion_model.")
        with torch.device("meta"):
            unet = cls(config)
        if config.camera == "time" and not any(key.startswith("camera_embed.") for key in tensors):
            tensors |= {f"camera_embed.{k}": v for k, v in camera_mlp(config).state_dict().items()}
        return fill(unet, tensors, f"{path}, read as {layout}, UNet", device, dtype)

    def project_context(self, context):
        """The text's keys and values in every layer: they do not change from step to step, so a
        sampler asks for them once a prompt and passes the list as `context`."""
        if self.config.camera == "text":            # here they change with the camera
            return context
        return [attn2.project(context.to(attn2.to_k.weight.dtype)) for attn2 in self.text_layers]

    def forward(self, x, t, context, camera=None, num_views=1):
        """x (N, 4, h, w), t (N,), context (N, M, C) or project_context's list, camera (N, 16)
        -> noise (N, 4, h, w). The N pictures are sets of `num_views`, the views of a set adjacent."""
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(dtype))
        if camera is not None and self.config.camera == "time":
            emb = emb + self.camera_embed(camera.to(dtype))
        if camera is not None and self.config.camera == "text":
            context = torch.cat([context, self.camera_embed(camera.to(dtype))[:, None]], dim=1)
        if torch.is_tensor(context):
            context = [attn2.project(context.to(dtype)) for attn2 in self.text_layers]
        kv = iter(context)                          # one pair for each transformer, in their order

        def run(block, x):
            for layer in block:
                if isinstance(layer, ResBlock):
                    x = layer(x, emb)
                elif isinstance(layer, SpatialTransformer):
                    x = layer(x, next(kv), num_views)
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


# ---------------------------------------------------------------------------------------------
# Loading. Files are mapped, not read: a tensor costs memory when it is converted, and nothing when
# it is already what is wanted, so that no weight is ever held twice.

LAYOUTS = """a folder with unet/, vae/, text_encoder/ and tokenizer/, a folder written by
save_pretrained, a single .safetensors of Stable Diffusion 2.1, or MVDream's .pt""".replace("\n", " ")


def find_layout(path):
    """-> the layout in words, and the folder (Hugging Face's layout alone) or file of the weights"""
    path = Path(path)
    if path.is_file():
        if "unet" in read_config(path):
            return "a file of save_pretrained", path
        return ("MVDream's .pt" if is_torch_zip(path) else "a single LDM file"), path
    if any((path / part).is_dir() for part in ("unet", "vae", "text_encoder")):
        return "a Hugging Face folder", path
    if (path / "model.safetensors").is_file():
        return "a folder of save_pretrained", path / "model.safetensors"
    raise FileNotFoundError(f"{path}: no model there; wanted is {LAYOUTS}")


def read_config(file):
    """The config.json beside a weight file, or {}: full size."""
    config = file.with_name("config.json")
    return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}


def weight_file(folder):
    """The safetensors of a Hugging Face sub-folder; of variants (.fp16) the plain one."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: len(file.name))
    if not files:
        raise FileNotFoundError(f"{folder}: no .safetensors file there; the Hugging Face layout wants one")
    return files[0]


def is_torch_zip(file):
    with open(file, "rb") as opened:
        return opened.read(2) == b"PK" or file.suffix in (".pt", ".pth", ".ckpt", ".bin")


def read_tensors(file):
    """A .safetensors, or a .pt that holds tensors and nothing else -> {name: tensor}, mapped"""
    try:
        if is_torch_zip(file):
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            tensors = tensors.get("state_dict", tensors)
            tensors = {key: tensor for key, tensor in tensors.items() if torch.is_tensor(tensor)}
        else:
            with safe_open(file, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: cut short, or no safetensors file ({error}); download it again") from error
    except Exception as error:      # torch.load fails in many ways, with no class of their own
        raise ValueError(f"{file}: cut short, or holds objects other than tensors, which were not "
                         "loaded because loading could run code; wanted is a file of tensors") from error
    if any("lora" in key.lower() for key in tensors):
        raise ValueError(f"{file}: a LoRA, only changes to a model; merge it and give the whole model")
    if any(key.startswith(("conditioner.", "add_embedding.")) or ".label_emb." in key for key in tensors):
        raise ValueError(f"{file}: an SDXL checkpoint; wanted is Stable Diffusion 2.1 or MVDream")
    return tensors


def take(tensors, prefix):
    return {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}


def fill(module, tensors, source, device, dtype):
    """Make `tensors` the weights of `module`, built on the meta device; strict."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for key in wanted.keys() & tensors.keys():
        if [n for n in tensors[key].shape if n > 1] == [n for n in wanted[key] if n > 1]:
            tensors[key] = tensors[key].reshape(wanted[key])    # a 1x1 convolution or a matrix
    faults = {"missing": [key for key in wanted if key not in tensors],
              "unexpected": [key for key in tensors if key not in wanted],
              "misshapen": [f"{key} {tuple(tensors[key].shape)} in place of {wanted[key]}" for key in wanted
                            if key in tensors and tuple(tensors[key].shape) != wanted[key]]}
    if any(faults.values()):
        raise ValueError(f"{source}: the weights do not fit: " + "; ".join(
            f"{len(keys)} {fault}, first {', '.join(keys[:3])}" for fault, keys in faults.items() if keys))
    module.load_state_dict({key: tensors[key].to(device, dtype) for key in wanted}, assign=True)
    return module.eval().requires_grad_(False)


def hugging_face_config(config):
    widths, heads = config["block_out_channels"], config["attention_head_dim"]    # heads: misnamed
    head_dims = {width // n for width, n in zip(widths, heads)} if isinstance(heads, list) else {None}
    return UNetConfig(
        config["in_channels"], config["out_channels"], widths[0], tuple(w // widths[0] for w in widths),
        config["layers_per_block"],
        tuple(i for i, kind in enumerate(config["down_block_types"]) if kind.startswith("CrossAttn")),
        head_dims.pop() or 64, config["cross_attention_dim"])


NETWORK_NAMES = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
                 "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
                 "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
                 "mid_block.resnets.1": "middle_block.2"}
RESBLOCK_NAMES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
                  "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def ldm_key(key, config):
    """Hugging Face's name of a weight -> the original's, whose blocks are numbered in one row."""
    n, last = config.num_res_blocks + 1, len(config.channel_mult) - 1

    def place(match):
        side, i, kind, j = match[1], int(match[2]), match[3], int(match[4])
        if kind == "downsamplers":
            return f"input_blocks.{n * (i + 1)}.0.op"
        if kind == "upsamplers":                    # after the transformer, if the level has one
            return f"output_blocks.{n * i + n - 1}.{1 + (last - i in config.attention_levels)}.conv"
        block = f"input_blocks.{n * i + j + 1}" if side == "down" else f"output_blocks.{n * i + j}"
        return f"{block}.{int(kind == 'attentions')}"

    renamed = re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.conv(?=\.))?", place, key)
    for names in (NETWORK_NAMES, RESBLOCK_NAMES if "resnets" in key else {}):
        for theirs, ours in names.items():
            renamed = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\g<1>{ours}.", renamed, count=1)
    return renamed
