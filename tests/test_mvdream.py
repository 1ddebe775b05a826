"""The model around the UNet: tokenizer, text, autoencoder, schedule, samplers, weight layouts."""
import copy
import json
import math
import os
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mvdream
import unet
from layouts import rename
from mvdream import MVDream, Schedule, camera_condition, ddim, dpm_solver
from tokenizer import Tokenizer, train_tokenizer, write_vocabulary

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"
CAPTIONS = ["a red robot wearing a blue hat, 3d asset", "an orange car with blue wheels",
            "Don't say 'hello' to the 2 elephants!"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(CAPTIONS, tmp_path_factory.mktemp("tokenizer"))


def random_weights(model):
    for p in model.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return random_weights(MVDream.from_config({
        "unet": {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1,
                 "attention_levels": (0, 1), "num_head_channels": 16, "context_dim": 32},
        "vae": {"ch": 32, "ch_mult": (1, 1, 2), "num_res_blocks": 1},
        "text": {"width": 32, "layers": 2, "heads": 2, "vocab_size": len(tokenizer.vocab)},
        "image_size": 32}, tokenizer))


def cameras(num):
    """Looking at the origin from a ring."""
    angle = torch.arange(num) * 2 * math.pi / num
    c2w = torch.eye(4).repeat(num, 1, 1)
    c2w[:, 0, 0], c2w[:, 0, 1] = angle.cos(), -angle.sin()
    c2w[:, 1, 0], c2w[:, 1, 1] = angle.sin(), angle.cos()
    c2w[:, :3, 3] = 3 * c2w[:, :3, 0]
    return c2w


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- Tokenizer ----------------------------------------------------------------------------------

def test_every_word_of_the_captions_is_one_token(tokenizer):
    assert all(tokenizer.unknown_words(caption) == [] for caption in CAPTIONS)
    assert tokenizer.unknown_words("A blue zebra, a ZEBRA and a hat!") == ["zebra", "and"]
    ids = tokenizer(["A  red robot", ""])
    v = tokenizer.vocab
    start, end = v["<|startoftext|>"], v["<|endoftext|>"]
    assert ids.shape == (2, 77) and ids.dtype == torch.int64
    assert ids[0, :6].tolist() == [start, v["a</w>"], v["red</w>"], v["robot</w>"], end, 0]
    assert ids[1, :3].tolist() == [start, end, 0] and ids.sum() == sum(ids[0, :5]) + start + end
    assert v["!"] == 0 and v["!</w>"] == 256 and (start, end) == (len(v) - 2, len(v) - 1)


def odd_strings():
    strings = [
        "", " ", "!", "! !! !!!", "Ünïcödé café", "cafe\u0301", "ÉCOLE", "naïve façade",
        "日本語の猫", "红色机器人", "한국어", "🙂", "👩‍👩‍👧 family", "robot🤖robot", "'s's",
        "it's we'll they've I'd I'm", "“quotes” ‘single’ «guillemets»", "<b>bold</b> &amp; &lt;",
        "<|endoftext|> red", "a\tb\nc\r\nd", "\u00a0\u2003wide\u2003spaces", "x" * 300, "a " * 300,
        "red robot " * 150, "1234 12.5% 3/4 ½ ²", "C3PO r2-d2", "under_score kebab-case",
        "ß ſ İ ı ǅ", "...---...", "Русский ТЕКСТ", "עברית عربى", "ไทย हिन्दी",
        "\u200bzero\u200bwidth", "a\u0000b", "$€£¥"]
    alphabet = "abc XYZ'!,.-09 éßİ日本🙂\u0301\n<>&;#\"“"
    rng = random.Random(0)
    while len(strings) < 220:
        strings.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 120))))
    return strings


def test_token_ids_are_transformers(tokenizer, tmp_path):
    CLIPTokenizer = pytest.importorskip("transformers").CLIPTokenizer
    write_vocabulary(tmp_path, tokenizer.vocab, tokenizer.merges)
    theirs = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for string, row in zip(odd_strings(), tokenizer(odd_strings()).tolist()):
        expected = theirs(string, truncation=True, max_length=77).input_ids
        assert row == expected + [0] * (77 - len(expected)), repr(string)
    theirs.save_pretrained(tmp_path / "saved")          # as a tokenizer.json
    assert torch.equal(Tokenizer(tmp_path / "saved")(CAPTIONS), tokenizer(CAPTIONS))


# ---- Schedule, samplers, camera -----------------------------------------------------------------

def test_schedule_table():
    abar = Schedule().alphas_cumprod
    for t, value in {0: .99915, 20: .981314, 200: .753692, 500: .276333, 740: .060835,
                     800: .036870, 980: .0058438, 999: .0046601}.items():
        assert abs(abar[t].item() / value - 1) < 2e-5
    half = Schedule().to(torch.float16)
    assert half.alphas_cumprod.dtype == torch.float32


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="epsilon or v, not foo"):
        Schedule("foo")


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_schedule_algebra(prediction):
    schedule, g = Schedule(prediction), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2, generator=g)
    t = torch.tensor([1, 500, 999])
    x_t = schedule.add_noise(x0, t, noise)
    torch.testing.assert_close(schedule.predict_x0(x_t, t, noise), x0, rtol=1e-3, atol=1e-4)
    output = schedule.target(x0, t, noise)              # a perfect network
    torch.testing.assert_close(schedule.noise_of(output, x_t, t), noise, rtol=1e-4, atol=1e-5)


def test_camera_condition_by_hand():
    c2w = torch.arange(16.).reshape(1, 4, 4)
    c2w[0, :3, 3] = torch.tensor([3., 0, 4])
    c2w[0, 3] = torch.tensor([0., 0, 0, 1])
    expected = [0, 1, 2, .6, 4, 5, 6, 0, 8, 9, 10, .8, 0, 0, 0, 1]
    torch.testing.assert_close(camera_condition(c2w), torch.tensor([expected]))


ABAR = Schedule().alphas_cumprod.tolist()


def test_samplers_with_a_perfect_network():
    x0, x, seen = torch.tensor([2.]), torch.tensor([5.]), []
    x = ddim(lambda x, t: seen.append(t) or x0, x, 0.0, ABAR, steps=50)
    assert seen == list(range(981, 0, -20))             # 981, 961, ..., 1
    last_noise = (x - ABAR[0] ** 0.5 * x0) / (1 - ABAR[0]) ** 0.5
    first_noise = (5 - ABAR[981] ** 0.5 * x0) / (1 - ABAR[981]) ** 0.5
    torch.testing.assert_close(last_noise, first_noise, rtol=1e-3, atol=1e-3)   # a straight way


@pytest.mark.parametrize("solver", [ddim, dpm_solver])
def test_samplers_start_where_the_data_is(solver):
    """Data N(3, 0.5^2), the best network, the noise's middle: the way must end in the data's."""
    def denoise(x, t):
        gain = ABAR[t] ** 0.5 * 0.25 / (ABAR[t] * 0.25 + 1 - ABAR[t])
        return 3 + gain * (x - ABAR[t] ** 0.5 * 3)

    end = solver(denoise, torch.zeros(1), torch.tensor(3.0), ABAR, 50)
    assert end.item() == pytest.approx(3, abs=0.01)
    end = solver(denoise, torch.zeros(1), torch.tensor(0.0), ABAR, 50)
    assert end.item() < 2.95                            # what starting at 0 does to it


def test_dpm_solver_is_of_second_order():
    """Data N(0, s^2): the best x0 is linear in x, and the ODE keeps x / std(x_t) constant."""
    def error(solver, steps, s):
        times = []

        def denoise(x, t):
            times.append(t)
            return ABAR[t] ** 0.5 * s ** 2 / (ABAR[t] * s ** 2 + 1 - ABAR[t]) * x

        end = solver(denoise, torch.tensor([1.], dtype=torch.float64), 0.0, ABAR, steps)
        std = [(ABAR[t] * s ** 2 + 1 - ABAR[t]) ** 0.5 for t in (0, times[0])]
        return abs(end / (std[0] / std[1]) - 1).item()

    for s in 0.05, 0.2, 0.5, 1.0:
        assert error(dpm_solver, 20, s) < 0.01
        assert error(dpm_solver, 20, s) < 0.5 * error(dpm_solver, 10, s)
    assert error(ddim, 50, 0.5) > 5 * error(dpm_solver, 20, 0.5)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_samplers_against_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    common = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def predict(x, t):                                  # any smooth network
        return torch.tanh(x + 0.001 * t)

    def denoise(x, t):
        return (x - (1 - ABAR[t]) ** 0.5 * predict(x, t)) / ABAR[t] ** 0.5

    def theirs(scheduler, **timesteps):
        scheduler.set_timesteps(**timesteps)
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample
        return x

    scheduler = diffusers.DDIMScheduler(steps_offset=1, set_alpha_to_one=False, clip_sample=False,
                                        **common)
    end = ddim(denoise, start, 0.0, ABAR, steps)
    assert difference(end, theirs(scheduler, num_inference_steps=steps)) < 1e-4

    times = []
    end = dpm_solver(lambda x, t: times.append(t) or denoise(x, t), start, 0.0, ABAR,
                         steps)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        final_sigmas_type="sigma_min", lower_order_final=False, **common)
    assert difference(end, theirs(scheduler, timesteps=times)) < 1e-4


def test_ddim_with_eta_keeps_the_spread():
    """Fresh noise for old: with data N(0, 1) every x_t is N(0, 1), whatever eta."""
    g = torch.Generator().manual_seed(0)
    x = ddim(lambda x, t: ABAR[t] ** 0.5 * x, torch.randn(20000, generator=g), 0.0, ABAR, 50, 1.0,
             lambda: torch.randn(20000, generator=g))
    assert abs(x.std() - 1) < 0.06


# ---- Sampling -----------------------------------------------------------------------------------

def test_a_seed_gives_the_same_picture_in_any_batch(model):
    prompts = ["a red robot", "a blue car", "a hat"]
    options = dict(cameras=cameras(4), steps=3, eta=0.5)
    together = model.sample(prompts, seed=5, **options)
    assert together.shape == (3, 4, 3, 32, 32)
    for b, prompt in enumerate(prompts):
        torch.testing.assert_close(model.sample([prompt], seed=5 + b, **options)[0], together[b],
                                   rtol=1e-3, atol=1e-4)
    assert torch.equal(model.sample(prompts, seed=5, **options), together)
    assert not torch.allclose(model.sample(prompts, seed=6, **options), together, atol=1e-2)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_sampling_is_the_sampler_around_guided_noise(model, sampler):
    prompt, negative, c2w = "a red robot", "a hat", cameras(3)
    x = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = model.sample([prompt], c2w, negative_prompt=negative, steps=4, guidance_scale=3.0,
                       latents=x, decode=False, sampler=sampler)
    text, other = (model.encode_text([p]).repeat(3, 1, 1) for p in (prompt, negative))

    def denoise(x, t):
        e_text, e_other = (model.predict_noise(x[0], t, c, c2w, 3) for c in (text, other))
        guided = e_other + 3 * (e_text - e_other)
        return model.schedule.predict_x0(x[0], torch.tensor([t]), guided)[None]

    expected = {"ddim": ddim, "dpm": dpm_solver}[sampler](denoise, x, 0.0, ABAR, 4)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    decoded = model.sample([prompt], c2w, negative_prompt=negative, steps=4, guidance_scale=3.0,
                           latents=x, sampler=sampler)
    torch.testing.assert_close(decoded[0], model.decode_latents(out[0]).clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_modes_and_options_of_sampling(model):
    options = dict(steps=2, decode=False)
    assert model.sample(["a hat"], **options).shape == (1, 1, 4, 8, 8)               # 2D mode
    assert model.sample(["a hat"], size=64, **options).shape == (1, 1, 4, 16, 16)
    assert model.sample(["a hat"], cameras(6), **options).shape == (1, 6, 4, 8, 8)
    own = torch.stack([cameras(2), cameras(2).flip(0)])         # each its own
    both = model.sample(["a hat", "a hat"], own, **options)
    one = model.sample(["a hat"], own[1], seed=1, **options)
    torch.testing.assert_close(both[1:], one, rtol=1e-3, atol=1e-4)
    plain = model.sample(["a hat"], cameras(2), guidance_scale=1, **options)
    same = model.sample(["a hat"], cameras(2), guidance_scale=5, negative_prompt="a hat", **options)
    torch.testing.assert_close(plain, same, rtol=1e-3, atol=1e-4)
    far = torch.full((1, 1, 4, 8, 8), 90.)                      # decoded, it is clamped
    assert model.sample(["a hat"], steps=2, latents=far).abs().max() <= 1
    for wrong in (dict(steps=0), dict(size=31), dict(sampler="euler")):
        with pytest.raises(ValueError, match="steps|size|sampler"):
            model.sample(["a hat"], **wrong)


def test_rescale_brings_the_spread_back(model):
    def spread(**options):
        latents = model.sample(["a red robot"], cameras(4), steps=2, decode=False, **options)
        return latents.std().item()

    unguided = spread(guidance_scale=1)
    assert abs(spread(guidance_scale=300.0, rescale=1.0) / unguided - 1) < 0.2
    assert spread(guidance_scale=300.0) > 1.5 * unguided


def test_images_and_latents(model):
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    mean, logvar = model.vae.encode(images)
    latents = model.encode_images(images)
    torch.testing.assert_close(latents, mean * 0.18215)
    latents.sum().backward()
    assert images.grad.abs().sum() > 0
    assert not torch.equal(model.encode_images(images, sample=True), latents)
    assert model.decode_latents(latents).shape == images.shape and model.latent_size == 8
    assert model.encode_text(["a", "b"]).shape == (2, 77, 32)


def test_v_prediction_is_one_line(model):
    v_model = copy.deepcopy(model)
    v_model.schedule = Schedule("v")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 100])
    context = model.encode_text(["a", "b"])
    v = model.predict_noise(x, t, context)
    alpha, sigma = ABAR[100] ** 0.5, (1 - ABAR[100]) ** 0.5
    torch.testing.assert_close(v_model.predict_noise(x, t, context), alpha * v + sigma * x)


def test_accelerate_stays_close(model):
    fast = copy.deepcopy(model).accelerate()
    x, c2w = torch.randn(4, 4, 8, 8), cameras(4)
    context = model.encode_text(["a red robot"] * 4)
    noise = model.predict_noise(x, 300, context, c2w, 4)
    rough = fast.predict_noise(x, 300, context, c2w, 4)
    assert rough.dtype == torch.float32 and difference(rough, noise) < 0.03
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    fast.encode_images(images).sum().backward()
    assert difference(fast.decode_latents(x), model.decode_latents(x)) < 0.03
    assert difference(fast.encode_images(images), model.encode_images(images)) < 0.03


def test_recorded_functions_get_their_arguments(model, monkeypatch):
    """The recording itself needs a GPU; here a stand-in that runs the function it was given."""
    recorded = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables",
                        lambda function, inputs, _: recorded.append(inputs) or function)
    x, c2w, graphed = torch.randn(4, 4, 8, 8), cameras(4), copy.deepcopy(model)
    context = model.encode_text(["a red robot"] * 4)
    graphed.unet.forward = mvdream.Graphs(graphed.unet.forward)
    graphed.vae.encode = mvdream.Graphs(graphed.vae.encode)
    for arguments, count in [((c2w, 4), 0), ((c2w, 2), 0), ((None, 1), 0), ((c2w, 4), 1),
                             ((c2w, 4), 1), ((None, 1), 2), ((c2w, 2), 3)]:
        expected = model.predict_noise(x, 300, context, *arguments)
        assert torch.equal(graphed.predict_noise(x, 300, context, *arguments), expected)
        assert len(recorded) == count               # what is called once is not recorded
    for _ in range(2):
        images = torch.rand(2, 3, 32, 32, requires_grad=True)
        graphed.encode_images(images).sum().backward()
        assert images.grad is not None
    assert recorded[-1][0].requires_grad


# ---- Weights: the four layouts ------------------------------------------------------------------

@pytest.fixture(scope="module")
def hugging_face(tokenizer, tmp_path_factory):
    """A small Stable Diffusion as diffusers and transformers themselves write it."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(1)
    nets = {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64, 64, 64), attention_head_dim=[2, 4, 4, 4],
            cross_attention_dim=48, use_linear_projection=True),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=len(tokenizer.vocab), hidden_size=48, intermediate_size=192,
            hidden_act="gelu", num_hidden_layers=3, num_attention_heads=4, bos_token_id=0,
            eos_token_id=1))}
    for part, net in nets.items():
        net.eval().requires_grad_(False).save_pretrained(folder / part)
    diffusers.DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    write_vocabulary(folder / "tokenizer", tokenizer.vocab, tokenizer.merges)
    return folder, nets


def test_networks_are_diffusers_and_transformers(hugging_face):
    folder, nets = hugging_face
    ours = MVDream.from_pretrained(folder)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 77, 48)
    assert difference(ours.unet(x, t, context), nets["unet"](x, t, context).sample) < 1e-5
    assert torch.equal(unet.UNet.load(folder)(x, t, context), ours.unet(x, t, context))
    same = ours.unet(x, t, context, torch.randn(2, 16))         # the new camera MLP is of no effect
    assert torch.equal(same, ours.unet(x, t, context))
    images, z = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 4, 8, 8)
    theirs = nets["vae"].encode(images).latent_dist
    assert difference(ours.vae.encode(images)[0], theirs.mean) < 1e-5
    assert difference(ours.vae.encode(images)[1], theirs.logvar) < 1e-5
    assert difference(ours.vae.decode(z), nets["vae"].decode(z).sample) < 1e-5
    ids = ours.tokenize(CAPTIONS)
    assert difference(ours.text_encoder(ids), nets["text_encoder"](ids).last_hidden_state) < 1e-5
    assert ours.schedule.prediction == "epsilon" and ours.image_size == 128


def test_older_names_and_v_prediction(hugging_face, tmp_path):
    """VAE attention under its first names, the text tower's prefix, a 768 model's scheduler."""
    folder, _ = hugging_face
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    file = old / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    save_file({rename(k, names): v for k, v in load_file(file).items()}, file)
    file = old / "text_encoder" / "model.safetensors"
    weights = {"text_model." + k.removeprefix("text_model."): v for k, v in load_file(file).items()}
    save_file(weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    file = old / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    ours, first = MVDream.from_pretrained(old), MVDream.from_pretrained(folder)
    assert ours.schedule.prediction == "v"
    for (name, a), b in zip(ours.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b) or "camera_embed.0" in name            # which is new, and random


@pytest.fixture(scope="module")
def layouts(hugging_face, tmp_path_factory):
    """The same model in all four layouts; being small, the single files need a config.json."""
    folder = tmp_path_factory.mktemp("layouts")
    ours = MVDream.from_pretrained(hugging_face[0])
    ours.save_pretrained(folder / "ours")
    tensors = load_file(folder / "ours" / "model.safetensors")
    for name in "ldm", "mvdream":
        (folder / name).mkdir()
        (folder / name / "config.json").write_text((folder / "ours" / "config.json").read_text())
        (folder / name / "tokenizer").symlink_to(folder / "ours" / "tokenizer")
    save_file({k: v for k, v in tensors.items() if "camera_embed" not in k} |
              {"model_ema.decay": torch.zeros(1)}, folder / "ldm" / "v2-1.safetensors")
    torch.save(tensors, folder / "mvdream" / "4view.pt")
    torch.save({"state_dict": tensors, "global_step": 1}, folder / "mvdream" / "wrapped.ckpt")
    return [hugging_face[0], folder / "ldm" / "v2-1.safetensors", folder / "mvdream" / "4view.pt",
            folder / "ours", folder / "ours" / "model.safetensors",
            folder / "mvdream" / "wrapped.ckpt"]


def test_four_layouts_are_one_model(layouts):
    first, *others = [MVDream.from_pretrained(path) for path in layouts]
    for path, other in zip(layouts[1:], others):
        for (name, a), b in zip(first.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b) or "camera_embed.0" in name, (path, name)      # new, random
        assert not any(p.requires_grad for p in other.parameters()) and not other.training
        assert set(unet.UNet.load(path).state_dict()) == set(first.unet.state_dict())
    half = MVDream.from_pretrained(layouts[3], dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_saved_names_are_the_original_ones(layouts, hugging_face):
    """diffusers' own conversion of original checkpoints gives back its networks, whole."""
    convert = pytest.importorskip("diffusers.loaders.single_file_utils")
    nets, saved = hugging_face[1], load_file(layouts[3] / "model.safetensors")
    weights = convert.convert_ldm_unet_checkpoint(dict(saved), nets["unet"].config)
    theirs = nets["unet"].state_dict()
    assert all(torch.equal(weights[k], theirs[k]) for k in theirs)
    weights = convert.convert_ldm_vae_checkpoint(dict(saved), nets["vae"].config)
    theirs = nets["vae"].state_dict()
    assert set(weights) == set(theirs) and all(torch.equal(weights[k], theirs[k]) for k in theirs)


def test_saved_file_has_all_that_the_released_code_loads(layouts, model):
    saved = load_file(layouts[3] / "model.safetensors")
    tables = {k: v for k, v in saved.items() if "." not in k}
    assert set(tables) == {
        "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1", "posterior_mean_coef2"}
    assert all(v.shape == (1000,) and v.isfinite().all() for v in tables.values())
    beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(tables["betas"].double(), beta, rtol=2e-3, atol=1e-7)
    assert abs(tables["posterior_mean_coef1"][0] - 1) < 1e-4
    text = {k.removeprefix("cond_stage_model.model."): tuple(v.shape) for k, v in saved.items()
            if k.startswith("cond_stage_model.")}
    assert text["text_projection"] == (48, 48) and text["logit_scale"] == ()
    assert text["transformer.resblocks.3.attn.in_proj_weight"] == (144, 48)     # the unused last
    assert text["transformer.resblocks.0.mlp.c_fc.weight"] == (192, 48)
    assert len(text) == 2 + 4 + 4 * 12
    camera = {k.split("camera_embed.")[1] for k in saved if "camera_embed" in k}
    assert camera == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_full_size_on_the_meta_device(tokenizer):
    with torch.device("meta"):
        full = MVDream.from_config({}, tokenizer)
    parts = full.unet, full.vae, full.text_encoder
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert sizes == [867_572_164, 83_653_863, 340_387_840] and full.latent_size == 32


def test_saving_is_exact_and_leaves_nothing_else(model, tmp_path):
    model = copy.deepcopy(model)
    model.latent_mean.copy_(torch.tensor([0.1, -2.0, 3.0, 0.0]))
    model.save_pretrained(tmp_path / "m")
    again = MVDream.from_pretrained(tmp_path / "m")
    assert torch.equal(again.latent_mean, model.latent_mean)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert again.image_size == 32 and again.schedule.prediction == "epsilon"
    assert sorted(str(f.relative_to(tmp_path / "m")) for f in (tmp_path / "m").rglob("*.*")) == [
        "config.json", "model.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json"]
    out = again.sample(["a hat"], cameras(2), steps=2)
    torch.testing.assert_close(out, model.sample(["a hat"], cameras(2), steps=2))


# ---- Weights that are none ----------------------------------------------------------------------

def refused(path, *words, error=(ValueError, OSError)):
    with pytest.raises(error) as caught:
        MVDream.from_pretrained(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, message
    assert all(word in message for word in words), message


def test_files_of_another_kind(tmp_path):
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(2, 2)},
              tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", "lora.safetensors", "LoRA")
    save_file({"conditioner.embedders.0.weight": torch.zeros(2),
               "model.diffusion_model.label_emb.0.0.weight": torch.zeros(2)},
              tmp_path / "xl.safetensors")
    refused(tmp_path / "xl.safetensors", "xl.safetensors", "SDXL")
    save_file({"bert.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "other.safetensors", "bert.weight")
    refused(tmp_path / "absent", "absent", "no model", error=FileNotFoundError)
    refused(tmp_path, str(tmp_path), "no model", error=FileNotFoundError)


def test_damaged_files(layouts, tmp_path):
    for path in layouts[1:3]:
        data = path.read_bytes()
        for size in 0, 5, 1000, len(data) // 2, len(data) - 1:
            (tmp_path / path.name).write_bytes(data[:size])
            refused(tmp_path / path.name, path.name, "cut short")


@pytest.mark.parametrize("file, content", [
    ("config.json", lambda c: c["unet"].update(depth=1)), ("config.json", lambda c: c.update(vae=None)),
    ("config.json", lambda c: c["unet"].update(num_head_channels=0)),
    ("config.json", lambda c: c.update(latent_mean=[0.0])),
    ("config.json", lambda c: c["text"].update(width="wide")),
    ("tokenizer/vocab.json", lambda v: v.update(hat=10 ** 6)),
    ("tokenizer/vocab.json", lambda v: v.pop("<|startoftext|>")),
    ("tokenizer/merges.txt", b"a b\nqq"), ("tokenizer/merges.txt", b"\x80\xb0")])
def test_files_that_do_not_fit_together(layouts, tmp_path, file, content):
    shutil.copytree(layouts[3], tmp_path / "ours")
    file = tmp_path / "ours" / file
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        value = json.loads(file.read_text())
        content(value)
        file.write_text(json.dumps(value))
    refused(tmp_path / "ours", str(tmp_path / "ours"), error=ValueError)


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


@pytest.mark.parametrize("dump", [torch.save, lambda x, file: file.write_bytes(pickle.dumps(x))])
def test_pickled_objects_do_not_run(tmp_path, monkeypatch, dump):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    weights = {"model.diffusion_model.x": torch.zeros(1)}
    dump({"state_dict": weights, "trap": Trap()}, tmp_path / "bad.pt")
    refused(tmp_path / "bad.pt", "bad.pt", "objects")
    assert not (tmp_path / "sprung").exists()


def test_incomplete_models(layouts, tmp_path):
    shutil.copytree(layouts[0], tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf" / "vae")
    refused(tmp_path / "hf", "hf", "vae/", error=FileNotFoundError)
    shutil.copytree(layouts[3], tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / "tokenizer")
    refused(tmp_path / "ours", "vocab.json", "merges.txt", str(tmp_path / "ours" / "tokenizer"))

    tensors = load_file(layouts[3] / "model.safetensors")
    file = tmp_path / "ours" / "model.safetensors"
    key = "model.diffusion_model.out.2.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    refused(tmp_path / "ours", "1 missing", "out.2.weight", "our own layout")
    save_file(tensors | {"first_stage_model.extra.weight": torch.zeros(1)}, file)
    refused(tmp_path / "ours", "1 unexpected", "extra.weight", "vae")
    save_file(tensors | {key: torch.zeros(4, 5, 3, 3)}, file)
    refused(tmp_path / "ours", "1 misshapen", "out.2.weight (4, 5, 3, 3) in place of (4, 32, 3, 3)")
    save_file(tensors | {"strange.weight": torch.zeros(1)}, file)
    refused(tmp_path / "ours", "unexpected", "strange.weight")
