"""The command line, from prompt to files, with a micro model of random weights."""
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import sds
from mvdream import MVDream
from tokenizer import train_tokenizer

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
SMALL = ["--set", "size=8,12", "levels=2", "log2_table=8", "finest_resolution=16", "hidden=16",
         "occupancy=8", "max_samples=24"]
MADE = ["mesh.glb", "nerf.safetensors", "preview.png", "settings.json", "turntable.gif",
        "views.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["a red duck wearing a blue hat, 3d asset"], folder / "words")
    torch.manual_seed(0)
    MVDream.from_config({
        "unet": dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, context_dim=32,
                     attention_levels=(1,), num_head_channels=32),
        "vae": dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, scale_factor=1.0),
        "text": dict(width=32, layers=1, heads=1, vocab_size=len(tokenizer.vocab)),
        "image_size": 16}, tokenizer).save_pretrained(folder / "micro")
    return folder / "micro"


@pytest.fixture(autouse=True)
def coarse_mesh(monkeypatch):
    mesh = sds.NeRF.mesh
    monkeypatch.setattr(sds.NeRF, "mesh", lambda nerf, resolution: mesh(nerf, 20))


@pytest.fixture
def command(model, tmp_path, capsys):
    """Runs generate.py -> exit status, stdout, stderr without the progress bar."""
    def run(*words, out=tmp_path / "out", small=True):
        argv = ["--model", str(model), "--out", str(out), *map(str, words)]
        try:
            status = generate.main(argv + (SMALL if small and "--set" not in words else []))
        except SystemExit as e:
            status = e.code
        text = capsys.readouterr()
        return status, text.out, [line for line in text.err.split("\n") if line.startswith("gener")]
    return run


def files(folder):
    return sorted(file.name for file in folder.iterdir())


def test_from_prompt_to_files(command, tmp_path):
    status, text, errors = command("a red duck", "--steps", 4)
    folder = tmp_path / "out" / "a-red-duck"
    assert status == 0 and not errors and files(folder) == MADE
    assert text.index("views.png") < text.index("object") and "in all" in text.splitlines()[-1]
    assert Image.open(folder / "views.png").size == (64, 16)
    assert Image.open(folder / "turntable.gif").n_frames == 30
    assert struct.unpack("<4sI", (folder / "mesh.glb").read_bytes()[:8]) == (b"glTF", 2)
    record = json.loads((folder / "settings.json").read_text())
    assert record["prompt"] == "a red duck" and record["object"]["steps"] == 4

    # The same command again makes nothing; other settings leave this folder alone.
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert "nothing to do" in command("a red duck", "--steps", 4)[1]
    assert command("a red duck", "--steps", 5)[0] == 0
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert files(tmp_path / "out" / "a-red-duck-2") == MADE


def test_same_seed_same_result(command, tmp_path):
    for out in ("one", "two"):
        command("a duck", "--steps", 3, "--seed", 5, out=tmp_path / out)
    for name in MADE:
        one, two = (tmp_path / out / "a-duck" / name for out in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name


def test_views_come_alone_and_the_object_later(command, tmp_path):
    values = ["--views", 2, "--set", "steps=3", *SMALL[1:]]
    assert command("a duck", "--views-only", *values)[0] == 0
    folder = tmp_path / "out" / "a-duck"
    assert files(folder) == ["settings.json", "views.png"]
    assert Image.open(folder / "views.png").size == (32, 16)
    made = (folder / "views.png").stat().st_mtime_ns
    assert command("a duck", *values)[0] == 0
    assert files(folder) == MADE and (folder / "views.png").stat().st_mtime_ns == made


def test_what_was_deleted_is_made_again(command, tmp_path):
    command("a duck", "--steps", 2)
    folder = tmp_path / "out" / "a-duck"
    kept = {name: (folder / name).read_bytes() for name in MADE}
    modes = {file.stat().st_mode for file in folder.iterdir()}
    assert len(modes) == 1                                          # no file is more private than others
    for gone in ["turntable.gif"], ["mesh.glb"], ["nerf.safetensors", "views.png"]:
        for name in gone:
            (folder / name).unlink()
        assert "nothing to do" not in command("a duck", "--steps", 2)[1]
        assert {name: (folder / name).read_bytes() for name in MADE} == kept


def test_steps_and_guidance_of_views_alone(command, tmp_path):
    command("a duck", "--views-only", "--steps", 2, "--guidance", 9)
    record = json.loads((tmp_path / "out" / "a-duck" / "settings.json").read_text())
    assert record["views"]["steps"] == 2 and record["views"]["guidance_scale"] == 9
    assert record["object"]["guidance"] == sds.PRESETS["tiny-cpu"].guidance


def test_a_plain_fit_to_the_views(command, tmp_path):
    assert command("a duck", "--lift", "reconstruct", "--steps", 3)[0] == 0
    assert files(tmp_path / "out" / "a-duck") == MADE


class Killed(Exception):
    pass


def broken_off(steps, how):
    """sds.dream_steps, but with `how()` called after that many steps."""
    whole = sds.dream_steps

    def dream_steps(*args):
        for now in whole(*args):
            yield now
            if now.step == steps:
                how()
    return dream_steps


def kill():
    raise Killed


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("at", [3, 6])
@pytest.mark.parametrize("how", [kill, ctrl_c])
def test_the_same_command_goes_on(command, tmp_path, monkeypatch, how, at):
    monkeypatch.setattr(generate, "PERIOD", 0)
    command("a duck", "--steps", 6, out=tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(sds, "dream_steps", broken_off(at, how))
        if how is kill:
            with pytest.raises(Killed):
                command("a duck", "--steps", 6)
        else:
            status, _, errors = command("a duck", "--steps", 6)
            assert status == 130 and "goes on" in errors[0]
    folder = tmp_path / "out" / "a-duck"
    assert "state.pt" in files(folder) and "mesh.glb" not in files(folder)
    assert "nerf.safetensors" not in files(folder)
    assert command("a duck", "--steps", 6)[0] == 0
    assert files(folder) == MADE
    for name in MADE:
        unbroken = tmp_path / "unbroken" / "a-duck" / name
        assert (folder / name).read_bytes() == unbroken.read_bytes(), name


def test_a_full_disk_in_mid_run(command, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "PERIOD", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))      # no file longer than that
    try:
        status, _, errors = command("a duck", "--steps", 3, "--seed", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and len(errors) == 1 and "state.pt" in errors[0] and "room" in errors[0]
    assert files(tmp_path / "out" / "a-duck") == ["settings.json", "views.png"]
    assert command("a duck", "--steps", 3, "--seed", 1)[0] == 0


def test_writing_is_whole_or_not_at_all(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "nerf.safetensors").write_text("before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="nerf.safetensors .*too large.* room"):
            with generate.writing(tmp_path / "nerf.safetensors") as part:
                sds.NeRF(sds.PRESETS["tiny-cpu"].nerf).save(part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == ["nerf.safetensors"]
    assert (tmp_path / "nerf.safetensors").read_text() == "before"


def test_ctrl_c_in_mid_write_leaves_no_half_file(command, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "PERIOD", 0)
    with monkeypatch.context() as patch:
        patch.setattr(sds.Progress, "save", lambda now, path: (path.write_bytes(b"half"), ctrl_c()))
        assert command("a duck", "--steps", 3)[0] == 130
    assert files(tmp_path / "out" / "a-duck") == ["settings.json", "views.png"]
    assert command("a duck", "--steps", 3)[0] == 0


def test_many_prompts_and_one_that_dies(command, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a duck\n\n  a red   duck\n")
    alive = sds.Progress.check_alive
    with monkeypatch.context() as patch:
        patch.setattr(sds.Progress, "check_alive",
                      lambda now: alive(now._replace(opacity=torch.tensor(0.0))))
        status, _, errors = command("--prompts", tmp_path / "prompts.txt", "--steps", 2)
    assert status == 2 and len(errors) == 2 and "a duck: the object has vanished" in errors[0]
    status, _, errors = command("--prompts", tmp_path / "prompts.txt", "--steps", 2, "--seed", 4)
    assert status == 0 and not errors
    assert files(tmp_path / "out" / "a-red-duck-2") == MADE


def test_processes_share_the_prompts(tmp_path, model, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    share = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        share.append(generate.parse(["--prompts", str(tmp_path / "prompts.txt"), "--model",
                                     str(model), "--out", str(tmp_path)]).prompts)
    assert share == [["a", "c"], ["b"]]


def test_unknown_words_are_named(command):
    _, text, _ = command("a red dragon", "--views-only")
    assert "never met dragon; it knows red," in text


@pytest.mark.parametrize("words, named", [
    ([" "], "prompt is empty"), ([", 3d asset"], "prompt is empty"), (["a", "--model", 300 * "m"], "mmm"),
    (["a", "--set", "log2_table=40"], "log2_table"), (["a", "--set", "hidden=1000000000"], "hidden"),
    (["a", "--set", "fov=60,15"], "fov"), (["a", "--set", "elevation=100,200"], "elevation"),
    ([], "give a prompt"), (["a", "--prompts", "x"], "give a prompt"),
    (["--prompts", "nowhere.txt"], "nowhere.txt"), (["a", "--steps", 0], "--steps 0"),
    (["a", "--guidance", -1], "--guidance -1"), (["a", "--rescale", 2], "--rescale 2"),
    (["a", "--views", 0], "--views 0"), (["a", "--steps", "many"], "--steps"),
    (["a", "--model", "nowhere"], "nowhere"), (["a", "--device", "tpu"], "tpu"),
    (["a", "--device", "cuda:9"], "cuda:9"), (["a", "--out", __file__], __file__),
    (["a", "--preset", "huge"], "huge"), (["a", "--set", "batch=6"], "batch"),
    (["a", "--set", "t_min=980,600"], "t_min"), (["a", "--set", "speed=3"], "speed"),
    (["a", "--set", "levels=few"], "levels=few"), (["a", "--set", "size=0"], "size"),
    (["a", "--guidance", "inf"], "--guidance inf"), (["a", "--memory", "inf"], "--memory inf"),
    (["a", "--views", 10 ** 20], "--views"), (["a", "--seed", 2 ** 64], "--seed"),
    (["a", "--views-only", "--steps", 1000], "--steps 1000"), (["--prompts", ""], "prompt"),
    (["a", "--negative", "\udcff"], "not text"), (["a", "--set", "memory=nan"], "memory=nan"),
    (["a", "--set", "lr_grid=-1"], "lr_grid"), (["a", "--set", "fov=nan"], "fov=nan"),
    (["a", "--set", "__class__=1"], "__class__"), (["a", "--set", "resolutions=1"], "resolutions")])
def test_what_is_wrong_is_said_in_one_line(command, tmp_path, words, named):
    status, text, errors = command(*words)
    assert status == 2 and len(errors) == 1 and named in errors[0] and not text
    assert not (tmp_path / "out").exists() or not files(tmp_path / "out")


def test_views_that_are_no_numbers_are_refused(command, model, tmp_path):
    shutil.copytree(model, tmp_path / "nan")
    weights = load_file(model / "model.safetensors")
    name = "model.diffusion_model.out.2.bias"
    save_file(weights | {name: weights[name] * math.nan}, tmp_path / "nan" / "model.safetensors")
    status, text, errors = command("a duck", "--views-only", "--model", tmp_path / "nan")
    assert status == 2 and len(errors) == 1 and "no numbers" in errors[0]
    assert files(tmp_path / "out" / "a-duck") == ["settings.json"]


@pytest.mark.parametrize("damage", [b"", b"text", b"PK short", "half", {"step": 3}, [1]])
def test_a_state_that_cannot_be_read_is_one_sentence(command, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(generate, "PERIOD", 0)
    monkeypatch.setattr(sds, "dream_steps", broken_off(3, kill))
    with pytest.raises(Killed):
        command("a duck", "--steps", 6)
    monkeypatch.undo()
    state = tmp_path / "out" / "a-duck" / "state.pt"
    whole = state.read_bytes()
    if isinstance(damage, (dict, list)):
        torch.save(damage, state)
    else:
        state.write_bytes(whole[:len(whole) // 2] if damage == "half" else damage)
    status, _, errors = command("a duck", "--steps", 6)
    assert status == 2 and len(errors) == 1 and "state.pt cannot be read: delete it" in errors[0]


def test_a_marked_prompt_file_and_a_folder_of_a_killed_run(command, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red duck\r\n")
    folder = tmp_path / "out" / "a-red-duck"
    folder.mkdir(parents=True)
    (folder / "part-settings.json").write_text("{")
    assert command("--prompts", tmp_path / "prompts.txt", "--views-only")[0] == 0
    assert files(folder) == ["settings.json", "views.png"]
    assert json.loads((folder / "settings.json").read_text())["prompt"] == "a red duck"


def test_a_truncated_weight_file(command, model, tmp_path):
    shutil.copytree(model, tmp_path / "short")
    file = tmp_path / "short" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    status, text, errors = command("a duck", "--model", tmp_path / "short")
    assert status == 2 and len(errors) == 1 and "model.safetensors" in errors[0]


def test_mistakes_are_found_before_pytorch_is_imported():
    code = ("import sys, generate\ntry: generate.main(['a', '--steps', '0'])\n"
            "except SystemExit as e: print(e.code, 'torch' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.split() == ["2", "False"] and out.stderr.count("\n") == 1


def test_every_preset_has_its_flag(tmp_path):
    for name in sds.PRESETS:
        assert generate.parse(["a", "--preset", name, "--out", str(tmp_path)]).preset == name


def test_values_by_name():
    s = generate.with_values(sds.FULL, ["size=48", "batch=8,4", "guidance=3", "shading=true",
                                        "negative=a b", "levels=5", "steps=7"])
    assert (s.size, s.batch, s.guidance, s.shading) == ((48, 48), (8, 4), 3.0, True)
    assert (s.negative, s.nerf.levels, s.steps) == ("a b", 5, 7) and sds.FULL.nerf.levels == 16
    assert generate.with_values(sds.FULL, ["batch=(12, 8)"]).batch == (12, 8)     # as it is printed
    for wrong in "batch=8,4,4", "batch=", "batch=a,b":
        with pytest.raises(ValueError, match=r"a value such as \(8, 4\) is wanted"):
            generate.with_values(sds.FULL, [wrong])
