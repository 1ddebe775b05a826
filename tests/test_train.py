"""Training: schedules by hand, the joint loss on a stub that shows what it was given, whole miniature
runs that are interrupted and must end as if they had not been, and what bad input gets."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sources
import train
from mvdream import MVDream, Schedule
from tokenizer import train_tokenizer
from test_sources import write_object, write_picture

ROOT = Path(__file__).parent.parent
MICRO = {"unet": dict(model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_levels=(1,),
                      num_head_channels=32, context_dim=32),
         "vae": dict(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, scale_factor=1.0),
         "text": dict(width=32, layers=1, heads=1, max_length=77),
         "image_size": 16, "prediction": "epsilon"}


# ---- by hand -------------------------------------------------------------------------------------

def test_learning_rate_warms_up_and_decays():
    assert train.learning_rate(0, 100, 1.0) == 0.5                 # two steps of warm-up: 1/2, 2/2
    assert train.learning_rate(1, 100, 1.0) == 1.0
    assert train.learning_rate(51, 100, 1.0) == pytest.approx(0.02 + 0.98 / 2, abs=1e-9)   # half way down
    assert train.learning_rate(100, 100, 1.0) == pytest.approx(0.02)


def test_stages_and_the_mix_are_functions_of_the_step():
    args = SimpleNamespace(autoencoder_steps=10, base_steps=20, mix=0.7, seed=3)
    stages = [train.stage_of(step, args) for step in range(2030)]
    assert stages[:10] == [("autoencoder", None)] * 10
    assert stages[10:30] == [("base", "2d")] * 20
    joint = [mode for stage, mode in stages[30:]]
    assert joint.count("3d") / len(joint) == pytest.approx(0.7, abs=0.03)     # 3 sigma of 2000 coins
    assert stages == [train.stage_of(step, args) for step in range(2030)]


def test_swap_exchanges_and_twice_is_nothing():
    a, b = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])]
    train.swap(a, b)
    assert a[0].tolist() == [3, 4] and b[0].tolist() == [1, 2]
    train.swap(a, b)
    assert a[0].tolist() == [1, 2] and b[0].tolist() == [3, 4]


# ---- the joint loss ------------------------------------------------------------------------------

class Stub:
    """A model whose UNet keeps what it is given and answers with zeros."""

    def __init__(self):
        self.schedule, self.calls = Schedule(), []
        self.text_encoder = lambda tokens: tokens[..., None].float()

    def unet(self, *inputs):
        self.calls.append(inputs)
        return torch.zeros_like(inputs[0])


def test_a_set_shares_its_timestep_and_text_but_not_its_noise():
    model, V = Stub(), 4
    x0, eps = torch.randn(8, 4, 2, 2), torch.randn(8, 4, 2, 2)
    c2w = torch.eye(4).repeat(8, 1, 1)
    loss = train.diffusion_loss(model, x0, torch.tensor([[5], [9]]), torch.tensor([100, 900]), eps, c2w, V)
    x_t, t, context, camera, num_views = model.calls[0]
    assert t.tolist() == [100] * 4 + [900] * 4 and num_views == 4
    assert context[:, 0, 0].tolist() == [5] * 4 + [9] * 4
    assert camera.shape == (8, 16)
    abar = model.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    assert torch.allclose(x_t, abar.sqrt() * x0 + (1 - abar).sqrt() * eps, atol=1e-6)
    assert loss.item() == pytest.approx(eps.square().mean().item(), rel=1e-6)   # |eps - 0|^2


def test_2d_steps_have_neither_cameras_nor_views():
    model = Stub()
    x0 = torch.randn(3, 4, 2, 2)
    train.diffusion_loss(model, x0, torch.zeros(3, 1), torch.tensor([1, 2, 3]), x0, None, 1)
    assert model.calls[0][3] is None and model.calls[0][4] == 1


def test_standardised_latents_have_variance_1_and_decode_alike(tmp_path):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a robot"], tmp_path)
    model = MVDream.from_config({**MICRO, "vae": dict(ch=32, ch_mult=(1, 1), num_res_blocks=1)},
                                tokenizer)
    vae, x = model.vae, torch.rand(4, 3, 16, 16)
    mean, logvar = vae.encode(x)
    before = vae.decode(mean)
    train.standardise(model, [x])
    z, logvar_z = vae.encode(x)
    assert torch.allclose(model.latent_mean, z.mean((0, 2, 3)), atol=1e-5)
    assert z.std().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(vae.decode(z), before, atol=1e-4)
    ratio = (0.5 * (logvar - logvar_z)).exp()                          # sigma shrank as the mean did
    assert torch.allclose(ratio, mean.std().expand_as(ratio), rtol=1e-3)


# ---- whole runs in miniature ---------------------------------------------------------------------

def run(monkeypatch, out, *more):
    monkeypatch.setattr(train, "TINY", MICRO)
    train.main(["--steps", "15", "--batch", "8", "--sets", "3", "--device", "cpu", "--out", str(out),
                "--save-every", "0", *more])


@pytest.mark.parametrize("which, at", [
    ("diffusion_loss", 5), ("autoencoder_loss", 3)])               # the autoencoder's last step
def test_an_interrupted_run_ends_as_the_unbroken_one(monkeypatch, tmp_path, which, at):
    run(monkeypatch, tmp_path / "whole")
    calls, loss = [], getattr(train, which)

    def interrupted(*inputs):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)     # Ctrl-C in the middle of a step
        return loss(*inputs)
    monkeypatch.setattr(train, which, interrupted)
    with pytest.raises(SystemExit, match="goes on from there"):
        run(monkeypatch, tmp_path / "broken")
    monkeypatch.setattr(train, which, loss)
    run(monkeypatch, tmp_path / "broken")

    whole, broken = (MVDream.from_pretrained(tmp_path / name) for name in ("whole", "broken"))
    for (name, a), b in zip(whole.state_dict().items(), broken.state_dict().values()):
        assert torch.equal(a, b), name
    lines = [json.loads(line) for line in open(tmp_path / "whole" / "log.jsonl")]
    assert lines[-1]["step"] == 15
    assert (tmp_path / "whole" / "samples.png").exists()


def test_the_losses_fall(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--steps", "150", "--lr", "2e-3", "--save-every", "60")
    lines = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    vae = [line["vae"] for line in lines if "vae" in line]
    noise = [line["3d"] for line in lines if "3d" in line]
    assert vae[-1] < 0.8 * vae[0]
    assert noise[-1] < 0.95 * noise[0]


def test_killed_at_any_moment_it_goes_on(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.path[:0] = ['.', 'tests']; import train, test_train; "
               "train.TINY = test_train.MICRO; train.main(sys.argv[1:])", "--steps", "40", "--batch", "8",
               "--sets", "3", "--device", "cpu", "--save-every", "0", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < done < 40
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert json.loads(open(tmp_path / "log.jsonl").readlines()[-1])["step"] == 40
    MVDream.from_pretrained(tmp_path)


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, word", [
    (["--steps", "0"], "--steps"), (["--batch", "10"], "--batch"), (["--mix", "1.5"], "--mix"),
    (["--device", "abacus"], "--device"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--device", "meta"], "--device"), (["--preserve", "-1"], "--preserve"),
    (["--seed", "9" * 20], "--seed"), (["--workers", "-2"], "--workers")])
def test_one_sentence_and_status_2(flags, word, tmp_path):
    result = subprocess.run([sys.executable, "train.py", *flags, "--out", str(tmp_path / "new")], cwd=ROOT,
                            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 2
    assert word in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_another_setting_in_the_same_folder_is_refused(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path)
    for name in ("trained.json", "checkpoint.pt"):                   # the finished, and the half-done
        assert (tmp_path / name).exists()
        with pytest.raises(ValueError, match=f"{name} was made with another --lr"):
            run(monkeypatch, tmp_path, "--lr", "1e-5")
        (tmp_path / name).unlink()
    for content in "[]", "{}", "":                                   # of something else
        (tmp_path / "trained.json").write_text(content)
        with pytest.raises(ValueError, match="trained.json"):
            run(monkeypatch, tmp_path)


def test_a_checkpoint_of_something_else_is_not_read(monkeypatch, tmp_path, capsys):
    for content in {"a": 1}, [1]:
        torch.save(content, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match="no checkpoint can be read; delete"):
            run(monkeypatch, tmp_path)                               # and nothing is written over it
        assert "checkpoint.pt cannot be read" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_at_the_very_end(monkeypatch, tmp_path):
    (tmp_path / "trained.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="make room"):
        run(monkeypatch, tmp_path)
    assert not list(tmp_path.glob("trained.json*"))
    run(monkeypatch, tmp_path)
    assert json.loads((tmp_path / "trained.json").read_text())["steps"]


# ---- data from outside, several ranks, DreamBooth ------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A micro model, three rendered objects, five captioned pictures (one of them broken)."""
    folder, patch = tmp_path_factory.mktemp("world"), pytest.MonkeyPatch()
    run(patch, folder / "model")
    patch.undo()
    for i in range(3):
        write_object(folder / "renders" / f"o{i}", caption=f"a robot {i}", size=16)
    for i in range(5):
        write_picture(folder / "flat" / f"{i}.png", (50 * i, 9, 9), f"a car {i}")
    (folder / "flat" / "4.png").write_text("no picture")
    return folder


def tune_flags(world, out):
    return ["--model", str(world / "model"), "--data", str(world / "renders"), "--images",
            str(world / "flat"), "--steps", "12", "--batch", "8", "--lr", "1e-3", "--device", "cpu",
            "--save-every", "0", "--out", str(out)]


def tune(world, out, *more):
    train.main([*tune_flags(world, out), *more])


def weights(folder):
    return torch.cat([p.flatten() for p in MVDream.from_pretrained(folder).unet.parameters()])


def last_checkpoint(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return torch.cat([p.flatten() for k, p in state["model"].items() if k.startswith("unet.")])


def test_folders_train_and_what_is_broken_is_told_once(world, tmp_path, capsys):
    tune(world, tmp_path / "a")
    text = capsys.readouterr().out
    assert "renders: 3 objects; nothing amiss" in text and "1 left out while training" in text
    before, after = weights(world / "model"), weights(tmp_path / "a")
    assert 1e-4 < (before - after).abs().max() < 0.1
    theirs, ours = (MVDream.from_pretrained(f).text_encoder.state_dict()
                    for f in (world / "model", tmp_path / "a"))
    assert all(torch.equal(v, ours[k]) for k, v in theirs.items())      # the text encoder is frozen
    modes = {k for line in open(tmp_path / "a" / "log.jsonl") for k in json.loads(line)}
    assert {"2d", "3d"} <= modes
    assert sorted(p.name for p in (tmp_path / "a").glob("check*")) == ["checkpoint.pt",
                                                                     "checkpoint_before.pt"]


@pytest.mark.parametrize("flags", [[], ["--workers", "2", "--micro", "4", "--train-text"]])
def test_a_stopped_run_on_folders_ends_as_the_unbroken_one(world, tmp_path, monkeypatch, flags):
    tune(world, tmp_path / "whole", *flags)
    saves, save = [], train.save_checkpoint

    def stopped(*state):
        save(*state)
        saves.append(1)
        if len(saves) == 5:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_checkpoint", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune(world, tmp_path / "broken", *flags)
    monkeypatch.setattr(train, "save_checkpoint", save)
    (tmp_path / "broken" / "checkpoint.pt").write_bytes(b"broken")   # the one before serves as well
    tune(world, tmp_path / "broken", *flags)
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert torch.equal(last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "broken"))


def test_parts_and_recomputing_change_nothing(world, tmp_path):
    start = weights(world / "model")
    tune(world, tmp_path / "whole")
    tune(world, tmp_path / "parts", "--micro", "4", "--recompute")
    whole, parts = (last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert (whole - parts).norm() < 0.02 * (whole - start).norm()    # Adam's first steps are signs


def test_the_number_of_views_is_one_constant(world, tmp_path, monkeypatch):
    for module in sources, train:
        monkeypatch.setattr(module, "VIEWS", 2)
    asked, loss = set(), train.diffusion_loss
    monkeypatch.setattr(train, "diffusion_loss", lambda *inputs: asked.add(inputs[-1]) or loss(*inputs))
    tune(world, tmp_path / "folders", "--batch", "6")                # no multiple of four
    train.main(["--model", str(world / "model"), "--steps", "12", "--batch", "6", "--sets", "3",
                "--device", "cpu", "--out", str(tmp_path / "toy")])
    assert asked == {1, 2}
    with Image.open(tmp_path / "toy" / "samples.png") as sheet:
        assert sheet.size == (2 * 16, 6 * 16)                        # the views of six prompts


def torchrun(ranks, command, program="train.py"):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
                           "--standalone", str(program), *command], cwd=ROOT, text=True,
                          capture_output=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"})


def test_two_ranks_train_as_one_and_one_goes_on_from_two(world, tmp_path, monkeypatch):
    start = weights(world / "model")
    tune(world, tmp_path / "one")
    result = torchrun(2, tune_flags(world, tmp_path / "two"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Trained in") == 1                    # one rank speaks and writes
    one, two = last_checkpoint(tmp_path / "one"), last_checkpoint(tmp_path / "two")
    assert (one - two).norm() < 0.02 * (one - start).norm()
    lines = [json.loads(line) for line in open(tmp_path / "two" / "log.jsonl")]
    assert [line["step"] for line in lines] == [5, 10, 12]
    (tmp_path / "two" / "trained.json").unlink()
    tune(world, tmp_path / "two")                                    # its last step again, alone
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert (one - two).norm() < 0.02 * (one - start).norm()


RANKS_APART = """
import sys, torch, torch.distributed as dist, train
from test_train import MICRO
loss, begin = train.autoencoder_loss, train.ToyPool.begin
train.TINY = MICRO
train.autoencoder_loss = lambda vae, x, noise: loss(vae, x, noise * (1 + dist.get_rank()))
def kept(pool, encode):
    begin(pool, encode)
    torch.save(pool.latents["2d"], f"{sys.argv[1]}_{dist.get_rank()}")
train.ToyPool.begin = kept
train.main(["--steps", "20", "--batch", "8", "--sets", "4", "--device", "cpu", "--out", sys.argv[1]])
"""


def test_ranks_share_one_autoencoder(tmp_path):
    (tmp_path / "apart.py").write_text(RANKS_APART)     # their autoencoders learn from other noise
    result = torchrun(2, [str(tmp_path / "out")], tmp_path / "apart.py")
    assert result.returncode == 0, result.stderr[-3000:]
    assert torch.equal(*(torch.load(tmp_path / f"out_{rank}") for rank in (0, 1)))


def test_dreambooth(world, tmp_path, capsys):
    def dreambooth(out, *more):
        train.main(["--model", str(world / "model"), "--dreambooth", str(world / "photos"),
                    "--subject", "a photo of sks dog", "--steps", "20", "--lr", "1e-3", "--device",
                    "cpu", "--out", str(tmp_path / out), *more])
        return (weights(tmp_path / out) - before).abs().mean().item()
    for i in range(3):
        write_picture(world / "photos" / f"{i}.png", (200, 80 * i, 9))
    (world / "photos" / "cut.png").write_bytes((world / "photos" / "0.png").read_bytes()[:40])
    before = weights(world / "model")
    free, held = dreambooth("free", "--preserve", "0"), dreambooth("held", "--preserve", "1e4")
    assert 0 < held < 0.5 * free                                     # held near theta_0
    theirs, ours = (MVDream.from_pretrained(f).unet.camera_embed.state_dict()
                    for f in (world / "model", tmp_path / "free"))
    assert all(torch.equal(v, ours[k]) for k, v in theirs.items())   # 2D steps do not touch cameras
    assert "4 pictures; 1 pictures that cannot be read (first" in capsys.readouterr().out
    dreambooth("free", "--preserve", "0")                            # made before: it says so
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another --seed.*another --out"):
        dreambooth("free", "--preserve", "0", "--seed", "1")


def test_preservation_by_hand():
    theta = [torch.zeros(2), torch.ones(1, 2)]
    keep = train.preservation(theta, weight=10)
    assert keep().item() == 0
    theta[0] += torch.tensor([1., -2.])
    theta[1] += 2
    assert keep().item() == 10 * (1 + 2 + 2 + 2) / 4


def test_another_attention_or_camera_starts_as_the_model_that_it_changes(world):
    unet = MVDream.from_pretrained(world / "model").unet
    x, t, context, camera = torch.randn(4, 4, 8, 8), torch.ones(4), torch.randn(4, 77, 32), torch.randn(4, 16)
    blind = unet.changed(attention="none", camera=None)
    for attention in ("temporal", "new3d"):                          # what they add is zero at first
        changed = unet.changed(attention=attention, camera=None)
        assert len(changed.state_dict()) > len(unet.state_dict())
        assert torch.equal(changed(x, t, context, camera, 4), blind(x, t, context, camera, 4))
    for camera_place in ("none", "text"):                            # 2D mode never hears of cameras
        changed = unet.changed(attention=None, camera=camera_place)
        assert torch.equal(changed(x, t, context), unet(x, t, context))
    assert unet.changed(attention=None, camera="time") is unet


@pytest.mark.parametrize("attention", ["inflated", "none", "temporal", "new3d"])
@pytest.mark.parametrize("camera", ["time", "text", "none"])
def test_what_2d_steps_leave_alone_is_known(world, attention, camera):
    unet = MVDream.from_pretrained(world / "model").unet.changed(attention=attention, camera=camera)
    unet.requires_grad_()(torch.randn(2, 4, 8, 8), torch.ones(2), torch.randn(2, 77, 32)).sum().backward()
    left = {name for name, p in unet.named_parameters() if p.grad is None}
    assert left == {name for name, _ in unet.named_parameters() if any(k in name for k in train.ONLY_3D)}


def test_2d_steps_leave_the_camera_as_it_is(world, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "stage_of", lambda step, _: ("joint", "3d" if step < 4 else "2d"))
    monkeypatch.setattr(train, "save_checkpoint", lambda model, *_: seen.append(torch.cat(
        [p.flatten() for p in model.unet.camera_embed.parameters()])))
    tune(world, tmp_path)
    assert len(seen) == 11 and not torch.equal(seen[2], seen[3])
    assert torch.equal(seen[3], seen[-1])                            # no decay, and momentum rests


def test_workers_share_the_cpus_of_their_machine_alone(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 24)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(()))     # as if a GPU were here
    for key, value in {"WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 4, "RANK": 9, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(key, str(value))
    args = train.parse(["--model", "m", "--data", "d", "--device", "cuda"])
    assert (args.device, args.rank, args.workers) == ("cuda:1", 9, 6)


def test_a_model_goes_on_in_the_toy_world_with_another_attention(world, tmp_path):
    def go_on(model, out, *more):
        train.main(["--model", str(model), "--steps", "12", "--batch", "8", "--sets", "3", "--lr",
                    "1e-2", "--device", "cpu", "--out", str(tmp_path / out), *more])
        return MVDream.from_pretrained(tmp_path / out).unet
    before = MVDream.from_pretrained(world / "model").unet.state_dict()
    new = go_on(world / "model", "new", "--attention", "new3d")
    assert {json.loads(line)["stage"] for line in open(tmp_path / "new" / "log.jsonl")} == {"joint"}
    moved = {k for k, v in new.state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert moved and not any("attn1" in k for k in moved)            # the 2D attention is frozen
    assert all(block.attn3.to_out[0].weight.abs().max() > 0 for block in new.modules()
               if isinstance(block, train.TransformerBlock))
    more, new = go_on(tmp_path / "new", "more"), new.state_dict()            # the model's own
    moved = {k for k, v in more.state_dict().items() if not torch.equal(v, new[k])}
    assert more.config.attention == "new3d" and any("attn3" in k for k in moved)
    assert not any("attn1" in k for k in moved)


def test_shares_of_a_step():
    args = SimpleNamespace(batch=32, ranks=2, rank=1, accumulate=2)
    assert train.shares("3d", args) == [slice(4, 6), slice(6, 8)]    # of 8 sets
    assert train.shares("2d", args) == [slice(16, 24), slice(24, 32)]


def test_a_full_disk_leaves_the_checkpoint_before(world, tmp_path):
    tune(world, tmp_path, "--save-every", "0")
    kept, args = (tmp_path / "checkpoint.pt").read_bytes(), SimpleNamespace(out=tmp_path, settings={})
    model, optimizer = torch.nn.Linear(500, 500), torch.optim.SGD([torch.zeros(1)])
    (tmp_path / "checkpoint.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="make room"):
        train.save_checkpoint(model, optimizer, [], 3, args)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    assert not (tmp_path / "checkpoint.tmp").exists()


def test_resuming_with_another_model_is_refused(world, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    tune(world, tmp_path / "out", "--model", str(model))
    (tmp_path / "out" / "trained.json").unlink()
    with pytest.raises(ValueError, match="another --model"):
        tune(world, tmp_path / "out")
    monkeypatch.setattr(train, "TINY", {**MICRO, "unet": {**MICRO["unet"], "model_channels": 64}})
    train.main(["--steps", "15", "--batch", "8", "--sets", "3", "--device", "cpu",
                "--out", str(tmp_path / "wide")])
    shutil.copytree(tmp_path / "wide", model, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="model of other sizes.*unet") as error:
        tune(world, tmp_path / "out", "--model", str(model))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, word", [
    (["--data", "x"], "--model"), (["--dreambooth", "x", "--model", "y"], "--subject"),
    (["--dreambooth", "x", "--model", "y", "--subject", "  "], "--subject"),
    (["--dreambooth", "x", "--subject", "s", "--data", "d", "--model", "y"], "photos alone"),
    (["--micro", "6", "--batch", "8"], "--micro"), (["--micro", "3", "--batch", "12"], "--micro")])
def test_flags_that_do_not_go_together(flags, word):
    with pytest.raises(ValueError, match=word):
        train.parse([*flags, "--device", "cpu"])


def test_a_checkpoint_that_lacks_a_part_counts_as_broken(world, tmp_path):
    tune(world, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again" / "trained.json").unlink()
    torch.save({"settings": {}, "step": 9}, tmp_path / "again" / "checkpoint.pt")
    tune(world, tmp_path / "again")                                  # from the one before
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "again"))


def test_a_folder_that_cannot_be_written_is_told_before_the_work(world, monkeypatch, tmp_path):
    def nowhere(dir):
        raise PermissionError(13, "Permission denied", str(dir))
    monkeypatch.setattr(train.tempfile, "TemporaryFile", nowhere)
    monkeypatch.setattr(MVDream, "from_pretrained", None)
    with pytest.raises(OSError, match="Permission denied.*out"):
        tune(world, tmp_path / "out")
