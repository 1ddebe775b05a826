"""The networks at their real sizes, with random weights: speed, memory, loading.

    python tests/benchmark.py model [--size full|tiny] [--device cuda|cpu] [--compile MODE]
                                    [--only count|speed|load]

The default is the full size on a GPU and the tiny one on a CPU. Each row is printed when it is
known. Times are medians after warm-up, with fixed shapes:
  step      one guided multi-view step of 4 views: UNet on 2 x 4 latents, text projected before
  sample    50 DDIM steps of 4 views and their decoding, the text encoder included
  encode    the VAE's encoding of 4 pictures; with its backward pass to the pixels
  load      a saved model to a usable one, every weight read once, in a process of its own; and the
            same with safetensors alone
"eager" is the plain network, "graphs" is accelerate(), "compiled" is accelerate(MODE), which
--compile MODE measures in its place: default, or max-autotune-no-cudagraphs (minutes).
"""
import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from mvdream import MVDream
from tokenizer import train_tokenizer

TINY = {**train.TINY, "text": {**train.TINY["text"], "vocab_size": 1024}}
VIEWS = 4


def row(name, value):
    print(f"{name:<58}{value}", flush=True)


@torch.no_grad()
def build(config, tokenizer, device):
    """Random weights of about the size that real ones have, zeros included: they cost less."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MVDream.from_config(config, tokenizer)
    model.to(device).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(std=0.5 * p[0].numel() ** -0.5)
    return model


def milliseconds(function, device, repeats=20, seconds=2.0):
    """Median; a call is timed alone, from a quiet device to a quiet device."""
    def once():
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    for _ in range(3 if device == "cuda" else 0):
        once()
    times = [once()]
    while len(times) < repeats and sum(times) < 1000 * seconds:
        times.append(once())
    return sorted(times)[len(times) // 2]


def workload(model, device):
    """-> the guided step, the sampling and the two encodings as functions of nothing."""
    latent, size = model.latent_size, model.image_size
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2 * VIEWS, 4, latent, latent, generator=g).to(device)
    images = (torch.rand(VIEWS, 3, size, size, generator=g) * 2 - 1).to(device)
    cameras = torch.eye(4).repeat(VIEWS, 1, 1)
    cameras[:, 2, 3] = 1
    c2w = cameras.repeat(2, 1, 1).to(device)
    t = torch.full((2 * VIEWS,), 500, device=device)
    with torch.no_grad():
        text = model.encode_text(["a hat", "a red robot wearing a blue hat"])
        context = model.unet.project_context(text.repeat_interleave(VIEWS, 0))

    @torch.no_grad()
    def step():
        return model.predict_noise(x, t, context, c2w, VIEWS)

    def sample():
        return model.sample(["a red robot wearing a blue hat"], cameras, negative_prompt="a hat")

    @torch.no_grad()
    def encode():
        return model.encode_images(images)

    def encode_backward():
        pixels = images.detach().requires_grad_()
        model.encode_images(pixels, sample=True).sum().backward()
        return pixels.grad

    return {"step": step, "sample": sample, "encode": encode, "encode+backward": encode_backward}


def count(config, tokenizer):
    """Multiplications and additions, counted on the meta device."""
    with torch.device("meta"):
        model = MVDream.from_config(config, tokenizer)
        model.eval().requires_grad_(False)
        n, s = model.latent_size, model.image_size
        c = config.get("unet", {}).get("context_dim", 1024)
        parts = {
            "step": lambda: model.unet(torch.zeros(2 * VIEWS, 4, n, n), torch.zeros(2 * VIEWS),
                                       torch.zeros(2 * VIEWS, 77, c),
                                       torch.zeros(2 * VIEWS, 16), VIEWS),
            "encode": lambda: model.vae.encode(torch.zeros(VIEWS, 3, s, s)),
            "encode+backward": lambda: sum(y.sum() for y in model.vae.encode(
                torch.zeros(VIEWS, 3, s, s, requires_grad=True))).backward(),
            "decode": lambda: model.vae.decode(torch.zeros(VIEWS, 4, n, n))}
        for name, function in parts.items():
            with FlopCounterMode(display=False) as counter:
                function()
            row(f"{name}, arithmetic", f"{counter.get_total_flops() / 1e12:.3f} TFLOP")


def measure(label, model, device, reference):
    """The rows of one way to run; `reference` holds what float32 gives, to compare with."""
    gc.collect()                                    # the model before
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    functions = workload(model, device)
    for name, function in functions.items():
        start = time.perf_counter()
        out = function()
        if device == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        took = milliseconds(function, device, 5 if name == "sample" else 20)
        value = f"{took:10.2f} ms   first call {first:6.1f} s"
        if name == "sample" and device == "cuda":
            value += f"   peak {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB"
        if name in ("step", "encode"):
            out = out.float()
            difference = (out - reference.setdefault(name, out)).norm() / reference[name].norm()
            value += f"   off float32 by {difference.item():.1e}"
        row(f"{name}, {label}", value)


def speed(config, tokenizer, device, compile):
    reference, cuda = {}, device == "cuda"
    ways = {"eager float32": lambda model: model}
    if compile:
        ways[f"compiled, {compile}"] = lambda model: model.accelerate(compile)
    elif cuda:
        ways["eager float16"] = lambda model: model.half()
    if not compile:
        ways["graphs" if cuda else "accelerate()"] = lambda model: model.accelerate()
    for label, way in ways.items():                 # one model at a time in memory
        measure(label, way(build(config, tokenizer, device)), device, reference)


LOAD = """
import sys, time
import torch
from mvdream import MVDream
from safetensors.torch import load_file
def memory(name):                                   # GiB; VmHWM is the peak of this process alone
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 2 ** 20
base = memory("VmRSS")
start = time.perf_counter()
if sys.argv[1] == "safetensors":
    tensors = list(load_file(sys.argv[2] + "/model.safetensors").values())
else:
    model = MVDream.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[1]))
    tensors = list(model.parameters())
opened = time.perf_counter() - start
for tensor in tensors:                              # every byte is read
    tensor.detach().clone()
seconds = time.perf_counter() - start
print(opened, seconds, memory("VmHWM") - base)
"""


def load(model):
    """Each way twice, the second time counts: the file is then in the page cache for all."""
    with tempfile.TemporaryDirectory() as folder:
        model.half().save_pretrained(folder)
        size = os.path.getsize(f"{folder}/model.safetensors") / 2 ** 30
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        for name in "safetensors", "float16", "float32":
            for _ in range(2):
                out = subprocess.run([sys.executable, "-c", LOAD, name, folder], check=True,
                                     text=True, env=environment, stdout=subprocess.PIPE).stdout
            opened, seconds, peak = map(float, out.split())
            row(f"load {size:.2f} GiB, {'model in ' * (name != 'safetensors')}{name}",
                f"{seconds:10.2f} s    of which opening {opened:.2f} s   peak {peak:.2f} GiB")


def main(argv):
    parser = argparse.ArgumentParser(prog="benchmark.py model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    parser.add_argument("--size", choices=["full", "tiny"], default=None)
    parser.add_argument("--compile", metavar="MODE", default=None)
    parser.add_argument("--only", choices=["count", "speed", "load"], default=None)
    args = parser.parse_args(argv)
    device = args.device
    size = args.size or ("full" if device == "cuda" else "tiny")
    config = TINY if size == "tiny" else {}

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(["a red robot wearing a blue hat"], folder)
    cpu = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    row("machine", f"{name}, torch {torch.__version__}")
    row("size", size)
    if args.only in (None, "count"):
        count(config, tokenizer)
    if args.only in (None, "speed"):
        speed(config, tokenizer, device, args.compile)
    if args.only in (None, "load"):
        load(build(config, tokenizer, device))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(sys.argv[1:])
