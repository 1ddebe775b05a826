"""The UNet of Stable Diffusion 2.1, inflated from one picture to the V views of one object.

Holds the network, its two additions for multi-view diffusion, and the loading of its weights.
MVDream, section 3.1: the self-attention of the 2D network is *inflated*: the tokens of all V views
of an object stand in one sequence, so that every view sees every other, with no new parameter; and
each view's camera goes through a two-layer MLP that is added to the time embedding. With
num_views=1 and camera=None this is exactly the 2D network, which is what joint training uses.

Modules carry the names of the original (LDM) checkpoint, so that loading one is one strict call;
Hugging Face's names, the other models' as well, are translated by a table at the end.

    N  pictures = B objects x V views, view-fastest      h, w  latent height, width
    C  channels       L = h*w tokens of one picture      M     text tokens (77)
"""

import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode


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


def mlp(dim_in, dim, dim_out, end=lambda layer: layer):
    return nn.Sequential(nn.Linear(dim_in, dim), nn.SiLU(), end(nn.Linear(dim, dim_out)))


def upsample(dim):
    return named(twice=nn.Upsample(scale_factor=2, mode="nearest"), conv=conv(dim, dim))


def camera_mlp(config):
    """16 numbers -> as wide as the time embedding, or a text token; a 2D checkpoint's adds zero."""
    width = 4 * config.model_channels
    dim_out = config.context_dim if config.camera == "text" else width
    return mlp(config.camera_dim, width, dim_out, end=zero)


class GroupNorm(nn.GroupNorm):
    """PyTorch's; written out for torch.compile, which else takes over that it leaves channels last,
    and then the convolutions copy whatever comes in and goes out."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return super().forward(x)
        y = x.float().unflatten(1, (self.num_groups, -1))               # (N, 32, C / 32, h, w)
        variance, mean = torch.var_mean(y, (2, 3, 4), correction=0, keepdim=True)
        y = ((y - mean) * (variance + self.eps).rsqrt()).flatten(1, 2)
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


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

    def forward(self, x, kv=None):
        q, (k, v) = self.to_q(x), kv or (self.to_k(x), self.to_v(x))
        y = F.scaled_dot_product_attention(self.split(q), self.split(k), self.split(v))
        return self.to_out(y.transpose(1, 2).flatten(2))                # (N, L, C)


class GEGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)

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
    """At the default size (R: ResBlock, T: SpatialTransformer, D: Downsample, U: Upsample):

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

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32):
        """From any of the four weight layouts; frozen, for inference."""
        return cls.fill(*read_model(path, ["unet"]), device, dtype)

    @classmethod
    def fill(cls, source, config, tensors, device, dtype):
        config, tensors = UNetConfig(**config["unet"]), take(tensors, PREFIXES["unet"])
        if config.camera == "time" and "camera_embed.0.weight" not in tensors:  # a 2D checkpoint
            new = camera_mlp(config).state_dict()
            tensors.update({f"camera_embed.{key}": tensor for key, tensor in new.items()})
        return fill(cls, config, tensors, f"{source}, unet", device, dtype)

    def project_context(self, context):
        """The text's keys and values in every layer, side by side: they do not change from step to
        step, so a sampler asks for them once a prompt and passes them on as `context`."""
        if self.config.camera == "text":            # here they change with the camera
            return context
        context = context.to(self.text_layers[0].weight.dtype)
        return torch.cat([layer(context) for layer in self.text_layers], dim=-1)

    def forward(self, x, t, context, camera=None, num_views=1):
        """x (N, 4, h, w), t (N,), context (N, M, C) or project_context's, camera (N, 16)
        -> noise (N, 4, h, w). Of the N pictures, each `num_views` in a row are one set."""
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(dtype))
        if camera is not None and self.config.camera == "time":
            emb = emb + self.camera_embed(camera.to(dtype))
        if camera is not None and self.config.camera == "text":
            context = torch.cat([context, self.camera_embed(camera.to(dtype))[:, None]], dim=1)
        if context.shape[-1] == self.config.context_dim:
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


# ---- Loading ------------------------------------------------------------------------------------
# Files are mapped, not read: a tensor costs memory when it is converted, and none when it
# is already what is wanted, so that no weight is ever held twice.

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
            "text_encoder": "cond_stage_model.model."}      # of the parts in an LDM file


def read_model(path, parts=PREFIXES):
    """Any of the four layouts, told apart by what is found -> the source in words, the config in
    our form, {name in an LDM file: tensor}; of Hugging Face's folder only `parts` are read."""
    path = Path(path)
    if any((path / part).is_dir() for part in PREFIXES):
        return read_hugging_face(path, parts)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: no model there; wanted is a folder with unet/, vae/, text_encoder/ and "
            "tokenizer/, a folder of save_pretrained, a .safetensors of SD 2.1, or MVDream's .pt")
    tensors, saved = read_tensors(file), read_json(file.with_name("config.json"))
    saved = saved if "unet" in saved else {}        # somebody else's
    multi_view = any("camera_embed" in key for key in tensors)
    v = "768" in file.name                          # all that tells v2-1_768 from v2-1_512
    config = {"unet": {}, "vae": {}, "text": {}, "prediction": "v" if v else "epsilon",
              "image_size": 256 if multi_view else 768 if v else 512} | saved

    text, layers = PREFIXES["text_encoder"], config["text"].get("layers", 23)
    unread = ("model_ema.", f"{text}text_projection", f"{text}logit_scale",
              f"{text}transformer.resblocks.{layers}.")     # and the tables, which have no dot
    tensors = {k: x for k, x in tensors.items() if "." in k and not k.startswith(unread)}
    stray = [key for key in tensors if not key.startswith(tuple(PREFIXES.values()))]
    if stray:
        raise ValueError(f"{path}: no model of ours; unexpected weights, first {stray[:3]}")
    layout = "MVDream's .pt" if file.suffix == ".pt" else "a single LDM file"
    return f"{path}, read as {'our own layout' if saved else layout}", config, tensors


def read_json(file):
    try:
        return json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: cut short, or not JSON at all ({error})") from error


def read_tensors(file):
    """A .safetensors, or a .pt that holds tensors and nothing else -> {name: tensor}, mapped"""
    try:
        with open(file, "rb") as opened:
            is_zip = opened.read(2) == b"PK" or file.suffix in (".pt", ".pth", ".ckpt", ".bin")
        if is_zip:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            loaded = loaded.get("state_dict", loaded)
            tensors = {key: value for key, value in loaded.items() if torch.is_tensor(value)}
        else:
            with safe_open(file, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: cut short, or not safetensors at all ({error})") from error
    except Exception as error:                      # torch.load has no class for its own
        raise ValueError(f"{file}: cut short, or it holds Python objects, which were not loaded "
                         "because loading can run code; wanted is a file of tensors") from error
    if any("lora" in key.lower() for key in tensors):
        raise ValueError(f"{file}: a LoRA, only changes to a model; merge it, give the whole model")
    if any(key.startswith(("conditioner.", "add_embedding.")) for key in tensors):
        raise ValueError(f"{file}: an SDXL checkpoint; wanted is Stable Diffusion 2.1 or MVDream")
    return tensors


def take(tensors, prefix):
    return {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}


def schedule_tables(alphas_cumprod):
    """The twelve tables that the original code keeps in its checkpoints; nothing reads them."""
    abar = alphas_cumprod.double().cpu()
    prev = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1 - abar / prev
    variance = beta * (1 - prev) / (1 - abar)
    tables = {
        "betas": beta, "alphas_cumprod": abar, "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": abar.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(), "posterior_variance": variance,
        "sqrt_recip_alphas_cumprod": abar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": beta * prev.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - prev) * (1 - beta).sqrt() / (1 - abar)}
    return {name: table.float() for name, table in tables.items()}


class NoValues(TorchFunctionMode):
    """Parameters keep what they happen to hold: on the meta device, nothing, at no cost."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not function.__name__.endswith(("uniform_", "normal_", "ones_", "zeros_", "constant_")):
            return function(*args, **(kwargs or {}))


def fill(kind, config, tensors, source, device, dtype):
    """-> a module of this kind with these tensors for its weights: all of them, and no others."""
    with torch.device("meta"), NoValues():
        module = kind(config)
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for key in wanted.keys() & tensors.keys():      # a 1x1 convolution may be stored as a matrix
        if [n for n in tensors[key].shape if n > 1] == [n for n in wanted[key] if n > 1]:
            tensors[key] = tensors[key].reshape(wanted[key])
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    faults = {"missing": [key for key in wanted if key not in found],
              "unexpected": [key for key in found if key not in wanted],
              "misshapen": [f"{key} {found[key]} in place of {wanted[key]}" for key in wanted
                            if key in found and found[key] != wanted[key]]}
    if any(faults.values()):
        raise ValueError(f"{source}: the weights do not fit: " + "; ".join(
            f"{len(keys)} {fault}, first {', '.join(keys[:3])}"
            for fault, keys in faults.items() if keys))
    module.load_state_dict({key: tensors[key].to(device, dtype) for key in wanted}, assign=True)
    return module.eval().requires_grad_(False)


# ---- Hugging Face's layout, in the original's names ---------------------------------------------

def read_hugging_face(folder, parts):
    files = {part: sorted((folder / part).glob("*.safetensors"), key=lambda file: len(file.name))
             for part in parts}                     # the plain one before variants such as .fp16
    lacking = [f"{part}/" for part in parts if not files[part]]
    if lacking:
        raise FileNotFoundError(f"{folder}: a Hugging Face folder that lacks {', '.join(lacking)} "
                                "with a .safetensors file in it; fetch the whole model")
    configs = {part: read_json(folder / part / "config.json") for part in parts}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    v = scheduler.get("prediction_type") == "v_prediction"
    config = {"unet": unet_config(folder, **configs["unet"]), "prediction": "v" if v else "epsilon"}
    names = {"unet": unet_names(UNetConfig(**config["unet"]))}
    if "vae" in parts:
        widths = configs["vae"]["block_out_channels"]
        config["vae"] = {
            "ch": widths[0], "ch_mult": tuple(width // widths[0] for width in widths),
            "num_res_blocks": configs["vae"]["layers_per_block"],
            "z_channels": configs["vae"]["latent_channels"],
            "scale_factor": configs["vae"].get("scaling_factor", 0.18215)}
        config["image_size"] = configs["unet"]["sample_size"] * 2 ** (len(widths) - 1)
        last = len(widths) - 1                      # the original counts the decoder's levels down
        names["vae"] = VAE_NAMES | {f"up_blocks.{i}": f"up.{last - i}" for i in range(last + 1)}
    if "text_encoder" in parts:
        text = configs["text_encoder"]
        config["text"] = {
            "width": text["hidden_size"], "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"], "vocab_size": text["vocab_size"],
            "max_length": text["max_position_embeddings"]}
        names["text_encoder"] = TEXT_NAMES
    tensors = {PREFIXES[part] + rename(key.removeprefix("text_model."), names[part]): tensor
               for part in parts
               for key, tensor in read_tensors(files[part][0]).items() if "position_ids" not in key}
    for key in [key for key in tensors if ".q_proj." in key]:       # OpenCLIP's one matrix of three
        qkv = [tensors.pop(key.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
        tensors[key.replace(".q_proj.", ".in_proj_")] = torch.cat(qkv)
    return f"{folder}, read as a Hugging Face folder", config, tensors


def unet_config(folder, block_out_channels, attention_head_dim, down_block_types, **config):
    heads = attention_head_dim                      # misnamed: the number of heads in each level
    heads = heads if isinstance(heads, list) else [heads] * len(block_out_channels)
    head_dims = {width // n for width, n in zip(block_out_channels, heads)}
    if len(head_dims) > 1:
        raise ValueError(f"{folder}: has the heads of SD 1; wanted is Stable Diffusion 2.1")
    return {"in_channels": config["in_channels"], "out_channels": config["out_channels"],
            "model_channels": block_out_channels[0], "num_res_blocks": config["layers_per_block"],
            "channel_mult": tuple(width // block_out_channels[0] for width in block_out_channels),
            "attention_levels": tuple(i for i, kind in enumerate(down_block_types)
                                      if kind.startswith("CrossAttn")),
            "num_head_channels": head_dims.pop(), "context_dim": config["cross_attention_dim"]}


def rename(key, names):
    """Translate whole words of a dotted name."""
    key = f".{key}."
    for theirs, ours in names.items():
        key = key.replace(f".{theirs}.", f".{ours}.")
    return key[1:-1]


def unet_names(config):
    """The original numbers its blocks in one row, through all levels."""
    n, last = config.num_res_blocks + 1, len(config.channel_mult) - 1
    names = dict(UNET_NAMES)
    for i in range(last + 1):
        for j in range(n):
            down, up = f"input_blocks.{n * i + j + 1}", f"output_blocks.{n * i + j}"
            for theirs, ours in RESBLOCK_NAMES.items():
                names[f"down_blocks.{i}.resnets.{j}.{theirs}"] = f"{down}.0.{ours}"
                names[f"up_blocks.{i}.resnets.{j}.{theirs}"] = f"{up}.0.{ours}"
            names[f"down_blocks.{i}.attentions.{j}"] = f"{down}.1"
            names[f"up_blocks.{i}.attentions.{j}"] = f"{up}.1"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n * (i + 1)}.0.op"
        place = 1 + (last - i in config.attention_levels)   # after the transformer, if there is one
        names[f"up_blocks.{i}.upsamplers.0"] = f"{up}.{place}"
    return names


UNET_NAMES = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
              "mid_block.attentions.0": "middle_block.1"}
RESBLOCK_NAMES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
                  "norm2": "out_layers.0", "conv2": "out_layers.3",
                  "conv_shortcut": "skip_connection"}
UNET_NAMES |= {f"mid_block.resnets.{i}.{theirs}": f"middle_block.{2 * i}.{ours}"
               for i in (0, 1) for theirs, ours in RESBLOCK_NAMES.items()}
VAE_NAMES = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
             "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm",
             "down_blocks": "down", "resnets": "block",
             "downsamplers.0": "downsample", "upsamplers.0": "upsample",
             "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut",
             "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
             "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}   # in older files
TEXT_NAMES = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
              "embeddings.position_embedding.weight": "positional_embedding",
              "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1",
              "layer_norm2": "ln_2", "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj"}
