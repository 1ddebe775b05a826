"""Weights from files: the four layouts that Stable Diffusion 2.1 and MVDream are kept in.

    1  a Hugging Face folder: unet/, vae/, text_encoder/, tokenizer/, each with its own names
    2  a single LDM file, v2-1_512-ema-pruned.safetensors: the original's names, which ours are
    3  the released MVDream's sd-v2.1-base-4view.pt, the same with a camera MLP
    4  a folder of save_pretrained: model.safetensors as in 3, config.json, tokenizer/

They are told apart by what is found. Files are mapped, not read: a tensor costs memory when it is
converted, and none when it is already what is wanted, so that no weight is ever held twice. Loading
is strict, and what is no tensor is not loaded. tokenizer/ holds CLIP's vocabulary.
"""
import contextlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode


PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
            "text_encoder": "cond_stage_model.model."}      # of the parts in an LDM file


def read_model(path):
    """Any of the four layouts, told apart by what is found -> the source in words, the config in
    our form, {part: {name: tensor}}"""
    path = Path(path)
    if any((path / part).is_dir() for part in PREFIXES):
        return read_hugging_face(path)
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
    return (f"{path}, read as {'our own layout' if saved else layout}", config,
            {part: take(tensors, prefix) for part, prefix in PREFIXES.items()})


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


@contextlib.contextmanager
def understood(path):
    """Whatever files from outside lack, or hold in place of what is wanted, is one sentence."""
    try:
        yield
    except Exception as error:                      # tokenizers has no class for its own
        named = isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError)
        if named or isinstance(error, torch.OutOfMemoryError):
            raise
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: a model whose files are broken or do not fit together "
                         f"({type(error).__name__}: {said:.200})") from error


def take(tensors, prefix):
    return {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}


def never_read(tensors, layers, alphas_cumprod):
    """What the released MVDream's strict loading wants and nothing reads: the text tower's last
    block and CLIP's projection, here zeros, and the twelve tables of the noise schedule."""
    text = PREFIXES["text_encoder"]
    block, norm = f"{text}transformer.resblocks.", tensors[f"{text}ln_final.weight"]
    zeros = {f"{block}{layers}.{key}": torch.zeros_like(tensor)
             for key, tensor in take(tensors, f"{block}0.").items()}
    zeros |= {f"{text}text_projection": norm.new_zeros(len(norm), len(norm)),
              f"{text}logit_scale": norm.new_zeros(())}
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
    return zeros | {name: table.float() for name, table in tables.items()}


class NoValues(TorchFunctionMode):
    """Skip the drawing of first values: on the meta device it costs seconds, for nothing."""

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


def write(path, content, metadata={"format": "pt"}):
    """Text, or a dict of tensors, to a temporary name, which is then renamed: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content, "utf-8")
        else:
            temporary.touch()
            mode = temporary.stat().st_mode         # as other files have: save_file's are private
            save_file(content, temporary, metadata)
            temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- Hugging Face's layout, in the original's names ---------------------------------------------

def read_hugging_face(folder):
    files = {part: sorted((folder / part).glob("*.safetensors"), key=lambda file: len(file.name))
             for part in PREFIXES}                  # the plain one before variants such as .fp16
    lacking = [f"{part}/" for part in PREFIXES if not files[part]]
    if lacking:
        raise FileNotFoundError(f"{folder}: a Hugging Face folder that lacks {', '.join(lacking)} "
                                "with a .safetensors file in it; fetch the whole model")
    unet, vae, text = (read_json(folder / part / "config.json") for part in PREFIXES)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    v = scheduler.get("prediction_type") == "v_prediction"
    widths = vae["block_out_channels"]
    last = len(widths) - 1
    config = {
        "unet": unet_config(folder, **unet), "prediction": "v" if v else "epsilon",
        "image_size": unet["sample_size"] * 2 ** last,
        "vae": {"ch": widths[0], "ch_mult": tuple(width // widths[0] for width in widths),
                "num_res_blocks": vae["layers_per_block"], "z_channels": vae["latent_channels"],
                "scale_factor": vae.get("scaling_factor", 0.18215)},
        "text": {"width": text["hidden_size"], "layers": text["num_hidden_layers"],
                 "heads": text["num_attention_heads"], "vocab_size": text["vocab_size"],
                 "max_length": text["max_position_embeddings"]}}
    names = {                                       # the original counts the decoder's levels down
        "unet": unet_names(config["unet"]), "text_encoder": TEXT_NAMES,
        "vae": VAE_NAMES | {f"up_blocks.{i}": f"up.{last - i}" for i in range(last + 1)}}
    weights = {part: {rename(key.removeprefix("text_model."), names[part]): tensor
                      for key, tensor in read_tensors(files[part][0]).items()
                      if "position_ids" not in key} for part in PREFIXES}
    tower = weights["text_encoder"]
    for key in [key for key in tower if ".q_proj." in key]:         # OpenCLIP's one matrix of three
        qkv = [tower.pop(key.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
        tower[key.replace(".q_proj.", ".in_proj_")] = torch.cat(qkv)
    return f"{folder}, read as a Hugging Face folder", config, weights


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
    n, last = config["num_res_blocks"] + 1, len(config["channel_mult"]) - 1
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
        place = 1 + (last - i in config["attention_levels"])    # after the transformer, if any
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
