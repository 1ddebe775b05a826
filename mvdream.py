"""The multi-view latent diffusion model around the UNet.

Holds CLIP's tokenizer, the OpenCLIP text encoder, the KL autoencoder, the noise schedule, two
samplers, and MVDream, which puts them together, loads them and saves them.
MVDream, section 3.1; Stable Diffusion 2.1 and its latent space are the base model's own.

    x0  a clean latent    x_t  the same, noised to step t    abar  alphas_cumprod, 1 -> 0 with t
    alpha = sqrt(abar), sigma = sqrt(1 - abar):    x_t = alpha x0 + sigma noise
    B objects x V views = N pictures, the views of an object adjacent      f  pixels per latent cell
    c2w  a camera as a 4x4 camera-to-world matrix in the conventions of data.py
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import models, normalizers, pre_tokenizers, trainers
from torch import nn

from unet import (UNet, UNetConfig, conv, fill, find_layout, named, read_config, read_tensors, take, upsample,
                  weight_file)


# ---------------------------------------------------------------------------------------------
# Tokenizer: CLIP's byte-pair encoding of lower-cased words.

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD = rf"{re.escape(BOS)}|{re.escape(EOS)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"


def byte_pair_encoding(vocab=None, merges=None):
    """CLIP's pipeline: NFC, one space for many, lower case; words; bytes; merges inside a word."""
    bpe = models.BPE(vocab, merges, unk_token=EOS, end_of_word_suffix="</w>")
    encoding = tokenizers.Tokenizer(bpe)
    encoding.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()])
    encoding.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(WORD), "removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return encoding


class Tokenizer:
    """Prompts -> rows of `length` ids: <start> words <end>, then zeros, as OpenCLIP pads."""

    def __init__(self, folder, length=77):
        self.vocab, self.merges = read_vocabulary(Path(folder))
        self.length = length
        self.encoding = byte_pair_encoding(self.vocab, self.merges)
        self.encoding.add_special_tokens([BOS, EOS])

    def __call__(self, prompts):
        ids = torch.zeros(len(prompts), self.length, dtype=torch.int64)
        for row, prompt in zip(ids, prompts):
            words = self.encoding.encode(prompt).ids[:self.length - 2]
            row[:len(words) + 2] = torch.tensor([self.vocab[BOS], *words, self.vocab[EOS]])
        return ids

    def unknown_words(self, prompt):
        """The words that are not one token: for the tiny model, those it never met."""
        text = self.encoding.normalizer.normalize_str(prompt)
        pieces = self.encoding.pre_tokenizer.pre_tokenize_str(text)
        words = [text[a:b].strip() for piece, (a, b) in pieces if piece + "</w>" not in self.vocab]
        return list(dict.fromkeys(word for word in words if word.isalnum()))

    def save(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "vocab.json", lambda file: file.write_text(json.dumps(self.vocab, ensure_ascii=False)))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        write(folder / "merges.txt", lambda file: file.write_text("\n".join(lines) + "\n"))


def read_vocabulary(folder):
    """vocab.json and merges.txt, or the same two inside a tokenizer.json -> {token: id}, [(a, b)]."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
    elif (folder / "tokenizer.json").is_file():
        bpe = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        vocab, merges = bpe["vocab"], bpe["merges"]
    else:
        raise FileNotFoundError(f"no tokenizer: put CLIP's vocab.json and merges.txt into {folder}")
    return vocab, [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]


def train_tokenizer(captions, folder):
    """Learn merges until every word of the captions is one token; written in CLIP's own form, the
    vocabulary being 256 bytes, the same 256 ending a word, one token a merge, <start> and <end>."""
    encoding = byte_pair_encoding()
    trainer = trainers.BpeTrainer(vocab_size=49408, min_frequency=0, end_of_word_suffix="</w>",
                                  show_progress=False)
    encoding.train_from_iterator(captions, trainer)
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair)
              for pair in json.loads(encoding.to_str())["model"]["merges"]]

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += dict.fromkeys(a + b for a, b in merges)
    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer.vocab = {token: i for i, token in enumerate([*tokens, BOS, EOS])}
    tokenizer.merges = merges
    tokenizer.save(folder)
    return Tokenizer(folder)


def write(path, writer):
    """Write to a temporary name, then rename: never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    writer(temporary)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------
# Text encoder: OpenCLIP's ViT-H/14 text tower up to its penultimate block, then the final norm.

@dataclass
class TextConfig:
    """`layers` counts the blocks that run: 23 of ViT-H's 24, and the last is not even built."""
    width: int = 1024
    layers: int = 23
    heads: int = 16
    vocab_size: int = 49408
    max_length: int = 77


class TextAttention(nn.Module):
    """Causal self-attention; q, k and v come from one fused matrix."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = TextAttention(width, heads)
        self.mlp = named(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(),
                         c_proj=nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextEncoder(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or TextConfig()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.randn(config.max_length, config.width) * 0.01)
        self.transformer = named(resblocks=nn.Sequential(
            *(TextBlock(config.width, config.heads) for _ in range(config.layers))))
        self.ln_final = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids):
        """ids (B, 77) -> (B, 77, C)"""
        x = self.token_embedding(ids) + self.positional_embedding
        return self.ln_final(self.transformer(x))


# ---------------------------------------------------------------------------------------------
# Autoencoder: pictures (N, 3, f h, f w) in [-1, 1] <-> latents (N, 4, h, w).

@dataclass
class VAEConfig:
    ch: int = 128
    ch_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2                 # in the encoder; the decoder has one more a level
    z_channels: int = 4
    scale_factor: float = 0.18215           # brings the latents to about unit variance


def norm(dim):
    return nn.GroupNorm(32, dim, eps=1e-6)


class VAEResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out), conv(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

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
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)                     # (N, 1, h w, C)
        return x + self.proj_out(y[:, 0].transpose(1, 2).reshape(x.shape))


def res_blocks(c_in, c_out, count):
    return nn.Sequential(*(VAEResBlock(c_in if i == 0 else c_out, c_out) for i in range(count)))


def middle(dim):
    return named(block_1=VAEResBlock(dim, dim), attn_1=VAEAttention(dim), block_2=VAEResBlock(dim, dim))


def encoder(config):
    """Levels 0, 1, ...: `num_res_blocks` blocks each, then half the size, but for the last."""
    widths = [config.ch * mult for mult in config.ch_mult]
    levels = [named(block=res_blocks(c_in, c_out, config.num_res_blocks),
                    downsample=named(pad=nn.ZeroPad2d((0, 1, 0, 1)),    # right and below, as trained
                                     conv=nn.Conv2d(c_out, c_out, 3, stride=2)))
              for c_in, c_out in zip([widths[0], *widths], widths)]
    del levels[-1].downsample
    return named(conv_in=conv(3, widths[0]), down=nn.Sequential(*levels), mid=middle(widths[-1]),
                 norm_out=norm(widths[-1]), silu=nn.SiLU(), conv_out=conv(widths[-1], 2 * config.z_channels))


def decoder(config):
    """The levels keep the encoder's numbers, so that they run from the last to level 0."""
    widths = [config.ch * mult for mult in config.ch_mult]
    levels = {str(i): named(block=res_blocks(c_in, c_out, config.num_res_blocks + 1), upsample=upsample(c_out))
              for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths))}
    del levels["0"].upsample
    return named(conv_in=conv(config.z_channels, widths[-1]), mid=middle(widths[-1]),
                 up=named(**dict(reversed(levels.items()))),
                 norm_out=norm(widths[0]), silu=nn.SiLU(), conv_out=conv(widths[0], 3))


class AutoencoderKL(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or VAEConfig()
        z = config.z_channels
        self.encoder, self.decoder = encoder(config), decoder(config)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def encode(self, images):
        """-> mean and log-variance of the latent's Gaussian, unscaled"""
        h = self.encoder(images.to(self.quant_conv.weight.dtype))
        mean, logvar = self.quant_conv(h).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))


# ---------------------------------------------------------------------------------------------
# The noise schedule and the samplers.

class Schedule(nn.Module):
    """x_t = alpha x0 + sigma noise over 1000 steps; the network predicts the noise ("epsilon") or
    v = alpha noise - sigma x0 ("v")."""

    def __init__(self, prediction="epsilon"):
        super().__init__()
        self.prediction = prediction
        betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
        abar = (1 - betas).cumprod(0).float()
        self.register_buffer("alphas_cumprod", abar, persistent=False)

    def _apply(self, fn, recurse=True):             # follows the model's device, but stays float32
        self.alphas_cumprod = self.alphas_cumprod.to(fn(self.alphas_cumprod).device)
        return self

    def alpha_sigma(self, t):
        abar = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
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


def ddim(denoise, x, abar, steps, eta=0.0, randn=None):
    """DDIM: jump to the predicted x0, then back to the noise level before; yields x after each step.
    denoise(x, t) -> x0. The released code's steps: 1, 1 + 1000/S, ...; the last goes to abar[0]."""
    times = list(range(1, 1000, 1000 // steps))
    for t, t_next in zip(times[::-1], [*times[-2::-1], 0]):
        a, a_next = abar[t], abar[t_next]
        x0 = denoise(x, t)
        noise = (x - a ** 0.5 * x0) / (1 - a) ** 0.5
        s = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        x = a_next ** 0.5 * x0 + (1 - a_next - s ** 2) ** 0.5 * noise
        if eta > 0:
            x = x + s * randn()
        yield x


def dpm_solver(denoise, x, abar, steps):
    """DPM-Solver++(2M): the ODE in lambda = log(alpha / sigma), x0 extrapolated from two steps."""
    times = [round(999 * (1 - i / steps)) for i in range(steps + 1)]
    lam = [0.5 * math.log(abar[t] / (1 - abar[t])) for t in times]
    before = None
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        x0 = denoise(x, t)
        h = lam[i + 1] - lam[i]
        first_order = i == 0 or (i == steps - 1 and steps < 15)
        ahead = x0 if first_order else x0 + (x0 - before) * h / (2 * (lam[i] - lam[i - 1]))
        a, a_next = abar[t], abar[t_next]
        x = ((1 - a_next) / (1 - a)) ** 0.5 * x - a_next ** 0.5 * math.expm1(-h) * ahead
        before = x0
        yield x


def camera_condition(c2w):
    """(N, 4, 4) -> (N, 16): the translation brought to length 1, then row by row."""
    translation = F.normalize(c2w[..., :3, 3:], dim=-2)
    top = torch.cat([c2w[..., :3, :3], translation], dim=-1)
    return torch.cat([top, c2w[..., 3:, :]], dim=-2).flatten(-2)


# ---------------------------------------------------------------------------------------------

class MVDream(nn.Module):
    def __init__(self, unet, vae, text_encoder, tokenizer, schedule, image_size):
        super().__init__()
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.schedule, self.image_size = tokenizer, schedule, image_size

    @classmethod
    def from_config(cls, config, tokenizer):
        """Random weights; `config` as config.json holds it, what is left out being full size."""
        unet = UNet(UNetConfig(**config.get("unet", {})))
        vae = AutoencoderKL(VAEConfig(**config.get("vae", {})))
        text_encoder = TextEncoder(TextConfig(**config.get("text", {})))
        schedule = Schedule(config.get("prediction", "epsilon"))
        return cls(unet, vae, text_encoder, tokenizer, schedule, config.get("image_size", 256))

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """Any of the four weight layouts (unet.LAYOUTS), told apart by what is found; frozen."""
        layout, place = find_layout(path)
        if place.is_dir():
            return cls.from_hugging_face(place, device, dtype)
        config, tensors = read_config(place), read_tensors(place)
        stray = [key for key in tensors if not key.startswith((*PREFIXES.values(), "model_ema."))
                 and key not in schedule_buffers()]
        if stray:
            raise ValueError(f"{path}, read as {layout}: {len(stray)} unexpected keys, first {stray[0]}")
        parts = {"vae": take(tensors, PREFIXES["vae"]), "text": take(tensors, PREFIXES["text_encoder"])}
        text_config = TextConfig(**config.get("text", {}))
        unused = (f"transformer.resblocks.{text_config.layers}.", "text_projection", "logit_scale")
        parts["text"] = {k: v for k, v in parts["text"].items() if not k.startswith(unused)}

        tokenizer = Tokenizer(place.parent / "tokenizer", text_config.max_length)
        unet = UNet.load(path, device, dtype)
        with torch.device("meta"):
            vae, text_encoder = AutoencoderKL(VAEConfig(**config.get("vae", {}))), TextEncoder(text_config)
        fill(vae, parts["vae"], f"{path}, read as {layout}, VAE", device, dtype)
        fill(text_encoder, parts["text"], f"{path}, read as {layout}, text encoder", device, dtype)
        v = "768" in place.name                     # what tells v2-1_768-ema-pruned from v2-1_512
        schedule = Schedule(config.get("prediction", "v" if v else "epsilon")).to(device)
        multi_view = any("camera_embed" in key for key in tensors)
        size = config.get("image_size", 256 if multi_view else 768 if v else 512)
        return cls(unet, vae, text_encoder, tokenizer, schedule, size).eval()

    @classmethod
    def from_hugging_face(cls, folder, device, dtype):
        lacking = [f"{part}/" for part in ("unet", "vae", "text_encoder", "tokenizer")
                   if not (folder / part).is_dir()]
        if lacking:
            raise FileNotFoundError(f"{folder}, read as a Hugging Face folder, lacks {', '.join(lacking)}")
        files = {part: weight_file(folder / part) for part in ("unet", "vae", "text_encoder")}
        configs = {part: read_config(file) for part, file in files.items()}
        vae_config, text_config = hugging_face_configs(configs["vae"], configs["text_encoder"])
        with torch.device("meta"):
            vae, text_encoder = AutoencoderKL(vae_config), TextEncoder(text_config)
        source = f"{folder}, read as a Hugging Face folder"
        tensors = {ldm_vae_key(k, vae_config): v for k, v in read_tensors(files["vae"]).items()}
        fill(vae, tensors, f"{source}, VAE", device, dtype)
        tensors = ldm_text_tensors(read_tensors(files["text_encoder"]))
        fill(text_encoder, tensors, f"{source}, text encoder", device, dtype)
        scheduler = folder / "scheduler" / "scheduler_config.json"
        v = scheduler.is_file() and json.loads(scheduler.read_text()).get("prediction_type") == "v_prediction"
        size = configs["unet"].get("sample_size", 64) * 2 ** (len(vae_config.ch_mult) - 1)
        return cls(UNet.load(folder, device, dtype), vae, text_encoder,
                   Tokenizer(folder / "tokenizer", text_config.max_length),
                   Schedule("v" if v else "epsilon").to(device), size).eval()

    def save_pretrained(self, path):
        """model.safetensors with the keys and shapes of the released MVDream, config.json, tokenizer/.
        What MVDream's strict loading wants and nothing reads (the text tower's last block, CLIP's
        projection) is written as zeros; the schedule's twelve buffers as they are."""
        folder = Path(path)
        self.tokenizer.save(folder / "tokenizer")
        tensors = {PREFIXES[part] + key: tensor.detach().contiguous() for part in PREFIXES
                   for key, tensor in getattr(self, part).state_dict().items()}
        text, width = PREFIXES["text_encoder"], self.text_encoder.config.width
        first, last = (f"{text}transformer.resblocks.{i}." for i in (0, self.text_encoder.config.layers))
        tensors |= {last + key.removeprefix(first): torch.zeros_like(tensor)
                    for key, tensor in tensors.items() if key.startswith(first)}
        zeros = tensors[f"{text}ln_final.weight"].new_zeros(width, width)
        tensors |= {f"{text}text_projection": zeros, f"{text}logit_scale": zeros[0, 0].clone()}
        tensors |= schedule_buffers()
        config = {"unet": asdict(self.unet.config), "vae": asdict(self.vae.config),
                  "text": asdict(self.text_encoder.config), "image_size": self.image_size,
                  "prediction": self.schedule.prediction}
        write(folder / "config.json", lambda file: file.write_text(json.dumps(config, indent=1) + "\n"))
        write(folder / "model.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))

    @property
    def device(self):
        return self.vae.quant_conv.weight.device

    @property
    def latent_size(self):
        return self.image_size // 2 ** (len(self.vae.config.ch_mult) - 1)

    def tokenize(self, prompts):
        return self.tokenizer(prompts)

    def encode_text(self, prompts):
        return self.text_encoder(self.tokenize(prompts).to(self.device))

    def encode_images(self, images, sample=False):
        """images (N, 3, H, W) in [-1, 1] -> scaled latents, the mean or a sample; differentiable"""
        mean, logvar = (x.float() for x in self.vae.encode(images))
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean) if sample else mean
        return z * self.vae.config.scale_factor

    def decode_latents(self, latents):
        return self.vae.decode(latents / self.vae.config.scale_factor).float()

    def predict_noise(self, x_t, t, context, c2w=None, num_views=1):
        """x_t (N, 4, h, w), t a number or (N,), context (N, 77, C) or unet.project_context's list,
        c2w (N, 4, 4) or None -> noise (N, 4, h, w) float32, whatever the network predicts."""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        camera = None if c2w is None else camera_condition(c2w)
        output = self.unet(x_t, t, context, camera, num_views).float()
        return self.schedule.noise_of(output, x_t, t)

    def sample(self, prompts, cameras=None, *, negative_prompt="", steps=50, guidance_scale=7.5,
               rescale=0.0, size=None, seed=0, latents=None, decode=True, eta=0.0, sampler="ddim"):
        """-> pictures (B, V, 3, H, W) in [-1, 1], or latents (B, V, 4, h, w) with decode=False."""
        for x in self.sample_steps(prompts, cameras, negative_prompt=negative_prompt, steps=steps,
                                   guidance_scale=guidance_scale, rescale=rescale, size=size, seed=seed,
                                   latents=latents, eta=eta, sampler=sampler):
            pass
        with torch.no_grad():
            return self.decode_latents(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if decode else x

    @torch.no_grad()
    def sample_steps(self, prompts, cameras=None, *, negative_prompt="", steps=50, guidance_scale=7.5,
                     rescale=0.0, size=None, seed=0, latents=None, eta=0.0, sampler="ddim"):
        """Yields the latents (B, V, 4, h, w) after each step.
        cameras          (V, 4, 4), or (B, V, 4, 4), or None for 2D mode, V = 1
        negative_prompt  what to keep away from, one for all
        rescale          0 to 1: how far the guided x0 is brought to the spread of the unguided one
        size             of the pictures, in pixels; None is the model's own
        seed             the b-th prompt starts from the noise of seed + b, whatever the batch
        latents          (B, V, 4, h, w): noise to start from instead
        eta              DDIM's fresh noise: 0 none, 1 as much as DDPM
        sampler          "ddim", or "dpm": DPM-Solver++(2M), good in 15 to 25 steps
        """
        if not 1 <= steps <= 999:
            raise ValueError(f"steps must be from 1 to 999, got {steps}")
        B, V = len(prompts), 1 if cameras is None else cameras.shape[-3]
        size, f = size or self.image_size, self.image_size // self.latent_size
        shape = (V, self.vae.config.z_channels, size // f, size // f)
        generators = [torch.Generator().manual_seed(seed + b) for b in range(B)]

        def randn():                                # on the CPU: the same on every device
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

        # Guidance doubles the batch: the first half is unconditional, the second has the prompt.
        guided = guidance_scale != 1
        context = self.encode_text([negative_prompt] * B * guided + list(prompts))
        context = self.unet.project_context(context.repeat_interleave(V, dim=0))
        c2w = None
        if cameras is not None:
            c2w = cameras.to(self.device, torch.float32).expand(B, V, 4, 4).flatten(0, 1).repeat(1 + guided, 1, 1)

        def denoise(x, t):
            x_t = x.flatten(0, 1)
            t = torch.full((len(x_t) * (1 + guided),), t, device=self.device)
            noise = self.predict_noise(x_t.repeat(1 + guided, 1, 1, 1), t, context, c2w, V)
            noise_text = noise[-len(x_t):]
            if guided:
                noise = noise[:len(x_t)] + guidance_scale * (noise_text - noise[:len(x_t)])
            x0 = self.schedule.predict_x0(x_t, t[:len(x_t)], noise).unflatten(0, (B, V))
            if rescale > 0:                         # spreads are those of a whole set of views
                x0_text = self.schedule.predict_x0(x_t, t[:len(x_t)], noise_text).unflatten(0, (B, V))
                ratio = x0_text.flatten(1).std(1) / x0.flatten(1).std(1)
                x0 = x0 * (rescale * ratio + 1 - rescale).view(-1, 1, 1, 1, 1)
            return x0

        x = randn() if latents is None else latents.to(self.device, torch.float32)
        abar = self.schedule.alphas_cumprod.tolist()
        if sampler == "dpm":
            yield from dpm_solver(denoise, x, abar, steps)
        else:
            yield from ddim(denoise, x, abar, steps, eta, randn)


# ---------------------------------------------------------------------------------------------
# Names in the weight files.

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.model."}


def schedule_buffers():
    """The twelve tables that the original code keeps in its checkpoints; all follow from abar."""
    abar = Schedule().alphas_cumprod.double()
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    betas = 1 - abar / before
    variance = betas * (1 - before) / (1 - abar)
    tables = {
        "betas": betas, "alphas_cumprod": abar, "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": abar.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(), "sqrt_recip_alphas_cumprod": abar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(), "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - abar)}
    return {name: table.float() for name, table in tables.items()}


def hugging_face_configs(vae, text):
    widths = vae["block_out_channels"]
    return (VAEConfig(widths[0], tuple(width // widths[0] for width in widths), vae["layers_per_block"],
                      vae["latent_channels"], vae.get("scaling_factor", 0.18215)),
            TextConfig(text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"],
                       text["vocab_size"], text["max_position_embeddings"]))


VAE_NAMES = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
             "mid_block.attentions.0": "mid.attn_1", "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut",
             "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
             "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}     # as older files say


def ldm_vae_key(key, config):
    last = len(config.ch_mult) - 1
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
    for theirs, ours in VAE_NAMES.items():
        key = re.sub(rf"\.{re.escape(theirs)}\.", f".{ours}.", key)
    return key


TEXT_NAMES = {"text_model.embeddings.token_embedding.weight": "token_embedding.weight",
              "text_model.embeddings.position_embedding.weight": "positional_embedding",
              "text_model.final_layer_norm": "ln_final", "text_model.encoder.layers": "transformer.resblocks",
              "layer_norm": "ln_", "self_attn": "attn", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def ldm_text_tensors(tensors):
    """Hugging Face's text encoder under OpenCLIP's names, its q, k and v fused into one matrix."""
    renamed = {}
    for key, tensor in tensors.items():
        for theirs, ours in TEXT_NAMES.items():
            key = key.replace(theirs, ours)
        renamed[key] = tensor
    renamed.pop("text_model.embeddings.position_ids", None)
    for key in [key for key in renamed if ".q_proj." in key]:
        q, k, v = (renamed.pop(key.replace(".q_proj.", f".{x}_proj.")) for x in "qkv")
        renamed[key.replace(".q_proj.", ".in_proj_")] = torch.cat([q, k, v])
    return renamed
