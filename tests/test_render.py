"""render.py: cameras, placement and captions by hand-worked numbers, workers that die, libraries;
and with Blender, where it is installed, a solid that must be seen just where data.py's rays meet
it."""
import json
import math
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import render
import sources

ROOT = Path(__file__).parent.parent
CORNERS = [(0, 0, 3), (1, 0, -1), (-1, 0, -1), (0, 2, -1)]      # y-up; a tip to the front, +z
FACES = [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]
# (x, y, z) -> (z, x, y): a box [-1, 3] x [-1, 1] x [0, 2] about (1, 0, 1); the corners are sqrt(5),
# sqrt(6), sqrt(6) and sqrt(5) away from there
PLACED = (np.array([(3, 0, 0), (-1, 1, 0), (-1, -1, 0), (-1, 0, 2)]) - (1, 0, 1)) / 6 ** .5


def write_obj(path, lines=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines + "".join("v {} {} {}\n".format(*corner) for corner in CORNERS)
                    + "".join("f {} {} {}\n".format(*(i + 1 for i in face)) for face in FACES))


def write_glb(path):
    corners, faces = np.array(CORNERS, "<f4"), np.array(FACES, "<u2")
    views = [{"buffer": 0, "byteOffset": 0, "byteLength": 48},
             {"buffer": 0, "byteOffset": 48, "byteLength": 24}]
    accessors = [{"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3",
                  "min": corners.min(0).tolist(), "max": corners.max(0).tolist()},
                 {"bufferView": 1, "componentType": 5123, "count": 12, "type": "SCALAR"}]
    text = json.dumps({
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "accessors": accessors,
        "nodes": [{"mesh": 0, "translation": [7, 8, 9]}], "bufferViews": views,
        "buffers": [{"byteLength": 72}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}]}).encode()
    text += b" " * (-len(text) % 4)
    path.write_bytes(b"glTF" + struct.pack("<II", 2, 28 + len(text) + 72)
                     + struct.pack("<I", len(text)) + b"JSON" + text
                     + struct.pack("<I", 72) + b"BIN\0" + corners.tobytes() + faces.tobytes())


def write_library(path, catalogue, models=("a/chair/chair.obj",)):
    write_obj(path.with_name("model.obj"))
    with zipfile.ZipFile(path, "w") as library:
        library.writestr("PluginFurnitureCatalog.properties", catalogue)
        for model in models:
            library.write(path.with_name("model.obj"), model)
    path.with_name("model.obj").unlink()


# ---- Cameras and placement -----------------------------------------------------------------------

def test_cameras_are_in_the_papers_ranges_and_always_the_same():
    drawn = []
    for i in range(300):
        fov, c2w = render.draw_cameras(f"object {i}", 8)
        again = render.draw_cameras(f"object {i}", 8)
        assert again[0] == fov and torch.equal(again[1], c2w)
        position = c2w[:, :3, 3]
        distance = position.norm(dim=1)
        torch.testing.assert_close(distance, distance[:1].expand(8))
        torch.testing.assert_close(c2w[:, :3, 2] * distance[:, None], position)    # looks inward
        azimuth = torch.rad2deg(torch.atan2(position[:, 1], position[:, 0]))
        steps = azimuth.diff().remainder(360)
        torch.testing.assert_close(steps, torch.full((7,), 45.), atol=1e-2, rtol=0)
        drawn.append((fov, math.degrees(math.asin(position[0, 2] / distance[0])),
                      azimuth[0] % 360, distance[0] * math.tan(math.radians(fov / 2))))
    drawn, (low, high) = torch.tensor(drawn), torch.tensor([[15, 0, 0, .9], [60, 30, 360, 1.1]])
    assert ((drawn > low - 1e-4) & (drawn < high + 1e-4)).all()
    near = (high - low) * 0.05                                  # every range is used, end to end
    assert (drawn.amin(0) < low + near).all() and (drawn.amax(0) > high - near).all()


def test_placement_by_hand():
    points = np.array(CORNERS, float)
    placed = render.placement(points, render.TURN)
    np.testing.assert_allclose(points @ placed[:3, :3].T + placed[:3, 3], PLACED, atol=1e-12)
    for flat in np.ones((3, 3)), np.array([[0, 0, 0], [1, np.nan, 0]]), np.zeros((0, 3)):
        with pytest.raises(ValueError, match="no faces of any size"):
            render.placement(flat, render.TURN)


def test_the_silhouette_takes_the_colour_of_what_is_covered(tmp_path):
    rgba = np.zeros((5, 6, 4), np.uint8)
    rgba[:, :2] = 200, 100, 50, 255                             # covered; then a speckled edge
    rgba[:, 2] = [(250, 250, 250, 51), (0, 0, 0, 51), (9, 9, 9, 51), (0, 0, 0, 51), (99, 0, 0, 51)]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    render.mend_silhouette(tmp_path / "a.png")
    mended = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert (mended[:, :2] == rgba[:, :2]).all() and (mended[..., 3] == rgba[..., 3]).all()
    assert abs(mended[1:4, 2, :3] - (200, 100, 50)).max() <= 1   # a weight of .2^4 for the speckles
    Image.new("RGBA", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="nothing of it can be seen"):
        render.mend_silhouette(tmp_path / "a.png")


# ---- Models and captions -------------------------------------------------------------------------

@pytest.mark.parametrize("name, caption", [
    ("armChair_02", "an arm chair"), ("red_tip", "a red tip"), ("Sofa 2 seats", "a sofa 2 seats"),
    ("Keys", "keys"), ("Glasses", "glasses"), ("Bus", "a bus"), ("Glass", "a glass"),
    ("Apple iMac 1998", "an apple imac"), ("Rubik's cube", "a rubik's cube"), ("001", "a 001"),
    ("Double door with panes", "a double door with panes")])
def test_names_in_words(name, caption):
    assert render.article(name) == caption


def test_models_and_where_their_captions_come_from(tmp_path):
    for name in ("b/table.obj", "chair.glb", "chair.obj", "chair/leg.obj", "lamp.GLTF", "notes.md",
                 "sofa.obj"):
        write_obj(tmp_path / name)
    (tmp_path / "captions.csv").write_text('b/table,"a table, round"\nsofa,a soft sofa\n')
    (tmp_path / "lamp.txt").write_text("a lamp that is lit\n")
    found = render.find_models(tmp_path, tmp_path / "unpacked")
    assert {name: caption for name, (*_, caption) in found.items()} == {
        "b/table.obj": "a table, round", "chair.glb": "a chair", "chair.obj": "a chair",
        "chair/leg.obj": "a leg", "lamp.GLTF": "a lamp that is lit", "sofa.obj": "a soft sofa"}
    assert list(render.find_models(tmp_path / "sofa.obj", tmp_path / "unpacked")) == ["sofa.obj"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no model found"):
        render.find_models(tmp_path / "empty", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        render.find_models(tmp_path / "nowhere", tmp_path)


def test_no_two_models_meet_and_a_new_one_renames_none(tmp_path):
    held = []
    for name in "a.obj", "a.glb", "a.obj.glb", "a/b.obj", "b.obj", "x/a.obj", "y/a.obj", "x.obj":
        write_obj(tmp_path / name)
        before, held = held, list(render.find_models(tmp_path, tmp_path / "unpacked"))
        assert len(held) == len(before) + 1 and {*held} == {*before, name}
    folders = [Path(name) for name in held]                # no view set lies within another
    assert not any(a in b.parents for a in folders for b in folders)
    (tmp_path / "out" / "a.obj").mkdir(parents=True)       # OUT lies in MODELS, and is no model
    assert {*render.find_models(tmp_path, tmp_path / "unpacked")} == {*held}


def test_a_library_gives_models_names_and_turns(tmp_path):
    write_library(tmp_path / "Shop.sh3f", b"# a comment\nname=Shop\nid#1=x\n"
                  b"name#1=Arm\\u0063hair\nmodel#1=/a/chair/chair.obj\nmodel#2=/b/lamp.obj\n"
                  b"modelRotation#2=1 0 0 0 0 1 0 -1 0\nname#3=Text\nmodel#3=/c.txt\n",
                  ["a/chair/chair.obj", "b/lamp.obj", "../outside.obj"])
    found = render.find_models(tmp_path / "Shop.sh3f", tmp_path / "unpacked")
    assert {name: caption for name, (*_, caption) in found.items()} == {
        "Shop.sh3f/chair_1": "an armchair", "Shop.sh3f/lamp_2": "a lamp"}
    assert all(path.is_file() for path, *_ in found.values())
    assert not any((folder / "outside.obj").exists() for folder in (tmp_path, tmp_path.parent))
    # A file of z up is turned to y up first, (x, y, z) -> (x, z, -y), then to our (-y, x, z).
    assert (found["Shop.sh3f/lamp_2"][1] @ (1, 2, 3)).tolist() == [-2, 1, 3]
    write_library(tmp_path / "Evil.sh3f", "name#1=Evil\nmodel#1=/../../evil.obj\n")
    (tmp_path / "Bad.sh3f").write_text("no zip")
    for name, words in ("Evil", "leads out of"), ("Bad", "no furniture library"):
        with pytest.raises(ValueError, match=words):
            render.find_models(tmp_path / f"{name}.sh3f", tmp_path / "unpacked")


# ---- Workers -------------------------------------------------------------------------------------

def work_or_die(folder, what):
    if what == "die":
        os.abort()
    if what == "fail":
        raise RuntimeError("two\nlines")
    if what == "bpy":
        raise RuntimeError("Error: Python: Traceback:\n  File x\nValueError: too small\nLocation: y")
    (folder / str(what)).write_text("done")


def test_a_worker_that_dies_takes_one_job_with_it(tmp_path):
    jobs = [(tmp_path, what) for what in (1, "die", 2, "fail", 3, "bpy")]
    faults = sorted((str(what), fault) for (_, what), fault
                    in render.in_workers(work_or_die, jobs, 2))
    assert faults == [("1", None), ("2", None), ("3", None), ("bpy", "ValueError: too small"),
                      ("die", "Blender itself died of it"), ("fail", "lines")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]


# ---- The command ---------------------------------------------------------------------------------

def run(*args, **more):
    return subprocess.run([sys.executable, ROOT / "data.py", "render", *map(str, args)],
                          capture_output=True, text=True, **more)


def test_what_is_wrong_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--views must be at least 4"):
        render.main([str(tmp_path), str(tmp_path / "out"), "--views", "3"])
    with pytest.raises(ValueError, match="holds the models themselves"):
        render.main([str(tmp_path), str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        render.main([str(tmp_path), str(tmp_path / "file")])
    monkeypatch.setattr(render.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`pip install bpy`.*for Python 3.11"):
        render.main([str(tmp_path), str(tmp_path / "out")])


@pytest.mark.parametrize("flags", [["--views", "16"], ["--size", "32"]])
def test_other_views_than_those_that_are_there_are_refused(tmp_path, monkeypatch, flags):
    write_obj(tmp_path / "in" / "a.obj")
    write_obj(tmp_path / "in" / "b.obj")
    (tmp_path / "out" / "b.obj").mkdir(parents=True)
    (tmp_path / "out" / "b.obj" / "transforms.json").write_text(json.dumps(
        {"w": 64, "h": 64, "frames": [{}] * 8}))
    monkeypatch.setattr(render.importlib.util, "find_spec", lambda name: True)
    work = lambda work, jobs, count: ((job, None) for job in jobs)
    monkeypatch.setattr(render, "in_workers", work)
    same = [str(tmp_path / "in"), str(tmp_path / "out"), "--views", "8", "--size", "64"]
    render.main(same)                                            # the same again is no fault
    with pytest.raises(ValueError, match="b.obj has 8 views of 64 pixels.*another OUT") as error:
        render.main([*same, *flags])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ['{"frames": [{}]}', "[1]", "{"])
def test_a_folder_that_something_else_wrote_is_refused(tmp_path, monkeypatch, text):
    write_obj(tmp_path / "in" / "a.obj")
    other = tmp_path / "out" / "a.obj" / "transforms.json"
    other.parent.mkdir(parents=True)
    other.write_text(text)
    monkeypatch.setattr(render.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="transforms.json is not of this command.*another OUT"):
        render.main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert other.read_text() == text


def seen(path, size):
    """Which of data.py's rays (V, H, W) meet the solid: in all of its half spaces at once."""
    info = json.loads(path.read_text())
    c2w = torch.tensor([frame["transform_matrix"] for frame in info["frames"]])
    origins, directions = data.camera_rays(c2w, math.degrees(info["camera_angle_x"]), size, size)
    near, far = torch.zeros(directions.shape[:3]), torch.full(directions.shape[:3], torch.inf)
    corners = torch.tensor(PLACED).float()
    for face in FACES:
        a, b, c = corners[list(face)]
        normal = torch.linalg.cross(b - a, c - a)
        normal *= (normal @ (a - corners.mean(0))).sign()                               # outward
        along = directions @ normal
        t = (a - origins) @ normal / along
        near = torch.where(along < 0, t, near).maximum(near)
        far = torch.where(along > 0, t, far).minimum(far)
    return near < far


def test_pictures_are_what_our_rays_see(tmp_path):
    pytest.importorskip("bpy")
    lost = "mtllib red_tip.mtl\nusemtl red\n"
    write_obj(tmp_path / "in" / "red_tip.obj", lost)
    (tmp_path / "in" / "red_tip.mtl").write_text("newmtl red\nKd .8 0 0\nmap_Kd C:/lost.png\n")
    write_glb(tmp_path / "in" / "other.glb")
    (tmp_path / "in" / "broken.glb").write_text("no model")
    (tmp_path / "in" / "empty.obj").write_text("v 1 2 3\n")
    result = run(tmp_path / "in", tmp_path / "out", "--views", 8, "--size", 64, "--jobs", 1)
    assert result.returncode == 0, result.stderr
    assert "out: 2 objects, 2 broken" in result.stdout and "skipped broken.glb: " in result.stdout
    assert "skipped empty.obj: it has no faces of any size" in result.stdout
    sets = sources.ViewSets(tmp_path / "out", size=64)
    assert [caption for _, caption in sets.items] == ["an other", "a red tip"] and not sets.faults
    for path, caption in sets.items:
        for i, hit in enumerate(seen(path, 64)):
            with Image.open(path.parent / f"{i:03d}.png") as image:
                assert image.mode == "RGBA"
                rgba = torch.tensor(np.array(image))
            alpha = rgba[..., 3]
            assert hit[alpha > 240].all() and not hit[alpha < 15].any() and 100 < hit.sum()
            color = rgba[alpha == 255][:, :3].float().mean(0)
            assert caption == "an other" or color[0] > 100 > 20 > color[1:].max()    # no magenta

    # The same command does what is left, and nothing twice.
    before = (tmp_path / "out" / "red_tip.obj" / "000.png").stat().st_mtime_ns
    (tmp_path / "out" / "other.glb").rename(tmp_path / "first")
    run(tmp_path / "in", tmp_path / "out", "--views", 8, "--size", 64, "--jobs", 1)
    assert (tmp_path / "out" / "red_tip.obj" / "000.png").stat().st_mtime_ns == before
    first, again = ((folder / "transforms.json").read_text()
                    for folder in (tmp_path / "first", tmp_path / "out" / "other.glb"))
    assert first == again
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["other.glb",
                                                                           "red_tip.obj"]
