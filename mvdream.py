"""The multi-view latent diffusion model around the UNet.

Holds the OpenCLIP text encoder, the KL autoencoder, the noise schedule, two samplers, and MVDream,
which puts them together (section 3.1). The autoencoder and the text encoder are Stable Diffusion
2.1's.

    x0  a clean latent    x_t  the same, noised to step t    abar  alphas_cumprod, .999 to .005
    alpha = sqrt(abar), sigma = sqrt(1 - abar):    x_t = alpha x0 + sigma noise
    B objects x V views = N pictures, the views of an object adjacent    f  pixels per latent cell
    c2w  a camera, its 4x4 camera-to-world matrix in the conventions of data.py
"""
import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from layouts import PREFIXES, fill, never_read, read_model, understood, write
from tokenizer import Tokenizer, write_vocabulary
from unet import GroupNorm, UNet, UNetConfig, conv, named, upsample


# ---- Text encoder: OpenCLIP's ViT-H/14 text tower, its last block left out -----------------------

@dataclass
class TextConfig:
    width: int = 1024
    layers: int = 23                        # that run; ViT-H's 24th is not built
    heads: int = 16
    vocab_size: int = 49408
    max_length: int = 77


class TextBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = named(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(),
                         c_proj=nn.Linear(4 * width, width))

    def forward(self, x):
        h = self.ln_1(x)
        unseen = torch.ones(2 * x.shape[1:2], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attn(h, h, h, attn_mask=unseen, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TextEncoder(nn.Module):
    def __init__(self, config=TextConfig()):
        super().__init__()
        self.config, width = config, config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.max_length, width))
        self.transformer = named(resblocks=nn.Sequential(
            *(TextBlock(width, config.heads) for _ in range(config.layers))))
        self.ln_final = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, ids):
        """ids (B, 77) -> (B, 77, C)"""
        x = self.token_embedding(ids) + self.positional_embedding
        return self.ln_final(self.transformer(x))


# ---- Autoencoder: pictures (N, 3, f h, f w) in [-1, 1] <-> latents (N, 4, h, w) -----------------

@dataclass
class VAEConfig:
    ch: int = 128
    ch_mult: tuple = (1, 2, 4, 4)           # channels of each level; f = 2^(levels - 1)
    num_res_blocks: int = 2                 # in the encoder; the decoder has one more a level
    z_channels: int = 4
    scale_factor: float = 0.18215           # brings the latents to about unit variance


def norm(dim):
    return GroupNorm(32, dim, eps=1e-6)


class VAEResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out), conv(c_out, c_out)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class VAEAttention(nn.Module):
    """One head over the pixels; q, k, v are 1x1 convolutions, as the checkpoint has them."""

    def __init__(self, dim):
        super().__init__()
        self.norm = norm(dim)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(dim, dim, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT.contiguous() for layer in (self.q, self.k, self.v))
        if q.shape[1] <= 1024:      # with one head of 512 fused kernels are slow; beyond, small
            y = (q @ k.mT / q.shape[2] ** 0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(y.mT.reshape(x.shape))                 # from (N, h w, C)


def level(c_in, c_out, num_blocks, **resize):
    blocks = [VAEResBlock(c_in if i == 0 else c_out, c_out) for i in range(num_blocks)]
    return named(block=nn.Sequential(*blocks), **resize)


def middle(dim):
    return named(block_1=VAEResBlock(dim, dim), attn_1=VAEAttention(dim),
                 block_2=VAEResBlock(dim, dim))


def encoder(config, widths):
    down = [level(c_in, c_out, config.num_res_blocks,
                  downsample=named(pad=nn.ZeroPad2d((0, 1, 0, 1)),      # right and below alone
                                   conv=nn.Conv2d(c_out, c_out, 3, stride=2)))
            for c_in, c_out in zip([widths[0], *widths], widths)]
    del down[-1].downsample
    return named(conv_in=conv(3, widths[0]), down=nn.Sequential(*down), mid=middle(widths[-1]),
                 norm_out=norm(widths[-1]), silu=nn.SiLU(),
                 conv_out=conv(widths[-1], 2 * config.z_channels))


def decoder(config, widths):
    """The levels keep the encoder's numbers, and so run from the last to level 0."""
    up = {str(i): level(c_in, c_out, config.num_res_blocks + 1, upsample=upsample(c_out))
          for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths))}
    del up["0"].upsample
    return named(conv_in=conv(config.z_channels, widths[-1]), mid=middle(widths[-1]),
                 up=named(**dict(reversed(up.items()))),
                 norm_out=norm(widths[0]), silu=nn.SiLU(), conv_out=conv(widths[0], 3))


class AutoencoderKL(nn.Module):
    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config, z = config, config.z_channels
        widths = [config.ch * mult for mult in config.ch_mult]
        self.encoder, self.decoder = encoder(config, widths), decoder(config, widths)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def encode(self, images):
        """-> mean and log-variance of the latents' Gaussian, unscaled"""
        h = self.encoder(images.to(self.quant_conv.weight.dtype))
        mean, logvar = self.quant_conv(h).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z.to(self.quant_conv.weight.dtype)))


# ---- The noise schedule and the samplers --------------------------------------------------------

class Schedule(nn.Module):
    """x_t = alpha x0 + sigma noise, t = 0 ... 999; the network predicts the noise ("epsilon") or
    v = alpha noise - sigma x0 ("v")."""

    def __init__(self, prediction="epsilon"):
        super().__init__()
        if prediction not in ("epsilon", "v"):
            raise ValueError(f"prediction is epsilon or v, not {prediction}")
        self.prediction = prediction
        beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", (1 - beta).cumprod(0).float(), persistent=False)

    def _apply(self, fn, recurse=True):             # follows the model's device, but stays float32
        self.alphas_cumprod = self.alphas_cumprod.to(fn(self.alphas_cumprod).device)
        return self

    def alpha_sigma(self, t):
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, x0, t, noise):
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise

    def predict_x0(self, x_t, t, noise):
        alpha, sigma = self.alpha_sigma(t)
        return (x_t - sigma * noise) / alpha

    def target(self, x0, t, noise):
        """What the network is trained to predict."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * noise - sigma * x0 if self.prediction == "v" else noise

    def noise_of(self, output, x_t, t):
        """The noise that the network's output stands for."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * output + sigma * x_t if self.prediction == "v" else output


# Both samplers go from noise to x0: denoise(x, t) -> x0. At the first time t the mean of x_t is not
# 0 but sqrt(abar) E[x0], and sqrt(abar) is 0.07 or more: they start there.

def ddim(denoise, start, mean, abar, steps, eta=0.0, randn=None):
    """DDIM: to the predicted x0, and back to the next, lower noise level: the part eta drawn anew.

    Times as released: from 1 on, 1000 // steps apart (30 are 31, 1 does nothing), last to abar[0].
    """
    times = [*reversed(range(1, 1000, 1000 // steps)), 0]
    x = start + abar[times[0]] ** 0.5 * mean
    for t, t_next in zip(times, times[1:]):
        a, a_next, x0 = abar[t], abar[t_next], denoise(x, t)
        noise = (x - a ** 0.5 * x0) / (1 - a) ** 0.5
        fresh = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5        # its deviation
        x = a_next ** 0.5 * x0 + (1 - a_next - fresh ** 2) ** 0.5 * noise
        x = x + fresh * randn() if eta else x
    return x


def dpm_solver(denoise, start, mean, abar, steps):
    """DPM-Solver++(2M): the ODE in lambda = log(alpha / sigma), in steps h even in lambda,
    x' = sigma'/sigma x - alpha' (e^-h - 1) x0, with x0 extrapolated half a step ahead."""
    lam = [0.5 * math.log(a / (1 - a)) for a in abar]
    even = [lam[-1] + (lam[0] - lam[-1]) * i / steps for i in range(steps + 1)]
    times = sorted({min(range(1000), key=lambda t: abs(lam[t] - l)) for l in even}, reverse=True)
    x, before = start + abar[times[0]] ** 0.5 * mean, None
    for t_last, t, t_next in zip([None, *times], times, times[1:]):
        x0, h = denoise(x, t), lam[t_next] - lam[t]
        ahead = x0 if before is None else x0 + (x0 - before) * h / (2 * (lam[t] - lam[t_last]))
        spread = ((1 - abar[t_next]) / (1 - abar[t])) ** 0.5
        x, before = spread * x - abar[t_next] ** 0.5 * math.expm1(-h) * ahead, x0
    return x


# ---- The model ----------------------------------------------------------------------------------

def camera_condition(c2w):
    """(N, 4, 4) -> (N, 16): the translation brought to length 1, then row by row."""
    scale = torch.ones_like(c2w)
    scale[..., :3, 3:] = 1 / c2w[..., :3, 3:].norm(dim=-2, keepdim=True).clamp(min=1e-8)
    return (c2w * scale).flatten(-2)


class MVDream(nn.Module):
    def __init__(self, unet, vae, text_encoder, tokenizer, config):
        super().__init__()
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.schedule = Schedule(config.get("prediction", "epsilon"))
        self.image_size = int(config.get("image_size", 256))
        mean = torch.tensor(config.get("latent_mean", [0.0] * 4))
        self.register_buffer("latent_mean", mean.reshape(vae.config.z_channels))

    @classmethod
    def from_config(cls, config, tokenizer):
        """Random weights; `config` as config.json holds it, what is left out being full size."""
        return cls(UNet(UNetConfig(**config.get("unet", {}))),
                   AutoencoderKL(VAEConfig(**config.get("vae", {}))),
                   TextEncoder(TextConfig(**config.get("text", {}))), tokenizer, config)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """Any of the four weight layouts, told apart by what is found; frozen, for inference."""
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        with understood(path):
            source, config, weights = read_model(path)
            unet = UNet.fill(source, config, weights, device, dtype)
            vae = fill(AutoencoderKL, VAEConfig(**config["vae"]), weights["vae"],
                       f"{source}, vae", device, dtype)
            text = fill(TextEncoder, TextConfig(**config["text"]), weights["text_encoder"],
                        f"{source}, text", device, dtype)
            tokenizer = Tokenizer(folder / "tokenizer", text.config.max_length)
            if max(tokenizer.vocab.values()) >= text.config.vocab_size:
                raise ValueError(f"{folder}/tokenizer: has more tokens than the text encoder knows")
            return cls(unet, vae, text, tokenizer, config).to(device).eval()

    def save_pretrained(self, path):
        """config.json, tokenizer/ and a model.safetensors that the released MVDream loads."""
        config = {"unet": asdict(self.unet.config), "vae": asdict(self.vae.config),
                  "text": asdict(self.text_encoder.config), "image_size": self.image_size,
                  "latent_mean": self.latent_mean.tolist(), "prediction": self.schedule.prediction}
        tensors = {PREFIXES[part] + key: tensor.contiguous() for part in PREFIXES
                   for key, tensor in getattr(self, part).state_dict().items()}
        tensors |= never_read(tensors, config["text"]["layers"], self.schedule.alphas_cumprod)
        write_vocabulary(Path(path) / "tokenizer", self.tokenizer.vocab, self.tokenizer.merges)
        write(Path(path) / "config.json", json.dumps(config, indent=1))
        write(Path(path) / "model.safetensors", tensors)

    device = property(lambda self: next(self.parameters()).device)
    latent_size = property(lambda self: self.image_size // 2 ** (len(self.vae.config.ch_mult) - 1))

    def tokenize(self, prompts):
        return self.tokenizer(prompts)

    def encode_text(self, prompts):
        return self.text_encoder(self.tokenize(prompts).to(self.device, non_blocking=True))

    def encode_images(self, images, sample=False):
        """images (N, 3, H, W) in [-1, 1] -> scaled latents, the mean or a sample; differentiable"""
        mean, logvar = (y.float() for y in self.vae.encode(images))
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean) if sample else mean
        return z * self.vae.config.scale_factor

    def decode_latents(self, latents):
        return self.vae.decode(latents / self.vae.config.scale_factor).float()

    def predict_noise(self, x_t, t, context, c2w=None, num_views=1):
        """x_t (N, 4, h, w), t one number or (N,), context (N, 77, C) or unet.project_context's,
        c2w (N, 4, 4) or None -> noise (N, 4, h, w) float32, whatever the network predicts"""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t)).contiguous()
        camera = None if c2w is None else camera_condition(c2w)
        output = self.unet(x_t, t, context, camera, num_views).float()
        return self.schedule.noise_of(output, x_t, t)

    @torch.no_grad()
    def sample(
            self, prompts,
            cameras=None,           # (V, 4, 4) or (B, V, 4, 4); None = 2D mode, V = 1
            *, negative_prompt="",  # what to keep away from, the same for all
            steps=50,
            guidance_scale=7.5,     # 1 = none, at half the cost
            rescale=0.0,            # phi of CFG rescale, 0 to 1; sds.rescale_contrast explains it
            size=None,              # of the pictures, in pixels; None = the model's own
            seed=0,                 # prompt b starts from the noise of seed + b in any batch
            latents=None,           # (B, V, 4, h, w): noise N(0, 1) to start from instead
            eta=0.0,                # DDIM's fresh noise: 0 = none, 1 = as much as DDPM
            sampler="ddim",         # or "dpm": DPM-Solver++(2M), good in 15 to 25 steps
            decode=True):
        """-> pictures (B, V, 3, H, W) in [-1, 1], or latents (B, V, 4, h, w) with decode=False"""
        B, V, device = len(prompts), 1 if cameras is None else cameras.shape[-3], self.device
        size, f = size or self.image_size, self.image_size // self.latent_size
        cell = f * 2 ** (len(self.unet.config.channel_mult) - 1)
        if not 1 <= steps <= 999 or size % cell or sampler not in ("ddim", "dpm"):
            raise ValueError(f"steps {steps}, size {size}, sampler {sampler}: wanted are 1 to 999, "
                             f"a multiple of {cell}, ddim or dpm")
        shape = (V, self.vae.config.z_channels, size // f, size // f)
        generators = [torch.Generator().manual_seed(seed + b) for b in range(B)]

        def randn():                                # on the CPU: the same on every device
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

        halves = 1 if guidance_scale == 1 else 2    # first the text's, then the negative's, as SDS
        context = self.encode_text(list(prompts) + [negative_prompt] * (B * (halves - 1)))
        context = self.unet.project_context(context.repeat_interleave(V, dim=0))
        c2w = None if cameras is None else (
            cameras.to(device).expand(halves, B, V, 4, 4).reshape(-1, 4, 4))

        def denoise(x, t):
            x_t, t = x.flatten(0, 1), torch.full((1,), t, device=device)
            both = self.predict_noise(x_t.repeat(halves, 1, 1, 1), t, context, c2w, V)
            noise_text, noise_uncond = both[:B * V], both[-B * V:]
            guided = noise_uncond + guidance_scale * (noise_text - noise_uncond)
            x0 = self.schedule.predict_x0(x_t, t, guided).view_as(x)
            if rescale == 0:
                return x0
            x0_text = self.schedule.predict_x0(x_t, t, noise_text).view_as(x)
            r = (x0_text.flatten(1).std(1) / x0.flatten(1).std(1)).view(B, 1, 1, 1, 1)
            return rescale * r * x0 + (1 - rescale) * x0                        # one r a set

        noise = randn() if latents is None else latents.to(device, torch.float32)
        mean = self.latent_mean.to(noise)[:, None, None]
        start = denoise, noise, mean, self.schedule.alphas_cumprod.tolist(), steps
        x0 = (dpm_solver(*start) if sampler == "dpm" else ddim(*start, eta, randn)).flatten(0, 1)
        return (self.decode_latents(x0).clamp(-1, 1) if decode else x0).unflatten(0, (B, V))

    def accelerate(self, compile=None):
        """In place, for inference: half precision where it is fast, channels last and, on a GPU,
        CUDA graphs; with a mode of torch.compile that too: minutes first, then faster steps."""
        self.eval().requires_grad_(False)
        fast = self.unet.forward, self.vae.encode, self.vae.decode
        if self.device.type == "cuda":              # bfloat16 where gradients flow: no underflow
            old = torch.cuda.get_device_capability(self.device) < (8, 0)
            self.unet.half(), self.text_encoder.half()
            self.vae.to(torch.float32 if old else torch.bfloat16)
        elif getattr(torch.cpu, "_is_amx_tile_supported", bool)():
            self.unet.bfloat16(), self.vae.bfloat16()
        self.to(memory_format=torch.channels_last)
        if compile is not None:
            torch.backends.cudnn.benchmark = True
            fast = [torch.compile(function, mode=compile, dynamic=False) for function in fast]
        else:                       # uncompiled, group norm is slow in channels last: back there
            part = self.vae if self.device.type == "cuda" else self.vae.encoder
            part.to(memory_format=torch.contiguous_format)
        if self.device.type == "cuda":
            fast = [Graphs(function) for function in fast]
        self.unet.forward, self.vae.encode, self.vae.decode = fast
        return self


class Graphs:
    """A function that from the second call on is replayed as a CUDA graph, forward and backward,
    one for each set of shapes of its arguments, tensors first. A result holds to the next call."""

    def __init__(self, function):
        self.function, self.recorded = function, {}

    def __call__(self, *args):
        tensors = tuple(x for x in args if torch.is_tensor(x))
        key = torch.is_grad_enabled(), *((x.shape, x.dtype, x.requires_grad)
                                         if torch.is_tensor(x) else x for x in args)
        if key not in self.recorded:                # these shapes may never come again
            self.recorded[key] = None
            return self.function(*args)
        if self.recorded[key] is None:
            others = args[len(tensors):]
            inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in tensors)
            warnings.filterwarnings("ignore", "The AccumulateGrad")     # recorded on another stream
            self.recorded[key] = torch.cuda.make_graphed_callables(
                lambda *tensors: self.function(*tensors, *others), inputs, 1)
        return self.recorded[key](*tensors)
