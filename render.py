"""View sets of your own 3D models, by Blender as a Python module (`pip install bpy`, optional).

    python data.py render MODELS OUT --views 32 --size 256

turns every .obj, .glb and .gltf under MODELS into what `train.py --data OUT` reads (sources.py has
its form), as MVDream rendered Objaverse (section 4.1 of the paper's first version): for each object
one fov of 15 to 60 degrees, one elevation of 0 to 30, one distance, azimuths evenly spaced from a
random start, RGBA on nothing; all drawn from the object's name, so always the same.  A name is the
file's whole path, so that no two meet: MODELS/a/chair.obj is rendered into OUT/a/chair.obj/.

Conventions: data.py's.  A file is taken as y-up with its front to +z, which glTF demands and Sweet
Home 3D keeps to; world (x, y, z) = file (z, x, y) is z-up with its front to +x.  It is brought into
the unit sphere about the middle of its box.  distance = U(0.9, 1.1) / tan(fov / 2).

The paper's light is a photographed sky.  Ours is a dome of radiance .7 + .45 cos to data.LIGHT: it
lights a matt surface by .7 + .3 cos, as the toy world is lit, and softly less where it is hidden.
With no lamp to sample, 8 samples and a denoiser are enough.

A .sh3f is Sweet Home 3D's library of furniture, a zip of .obj with a catalogue of their names.
Captions: MODELS/captions.csv (uid, caption), or NAME.txt beside NAME.obj, or else NAME in words.
The same command goes on where it stopped; what is broken is skipped, and named at the end.
"""
import argparse
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import zipfile
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import sources

MODELS = ".obj", ".glb", ".gltf"
TURN = np.array([[0., 0, 1], [1, 0, 0], [0, 1, 0]])             # a file's axes to the world's
BLENDER = np.array([[1., 0, 0], [0, 0, -1], [0, 1, 0]])         # to those Blender's importers use

# ---- Geometry ------------------------------------------------------------------------------------

def draw_cameras(name, views):
    """The cameras of one object: fov, c2w (V, 4, 4) at their true distance."""
    g = random.Random(name)                                     # hashes the letters themselves
    fov, elevation, azimuth = g.uniform(15, 60), g.uniform(0, 30), g.uniform(0, 360)
    c2w = data.orbit_cameras(views, elevation, azimuth)
    c2w[:, :3, 3] *= g.uniform(0.9, 1.1) / math.tan(math.radians(fov / 2))
    return fov, c2w


def placement(points, turn):
    """(4, 4): turns points (n, 3), moves their box's middle to 0, the farthest to distance 1."""
    turned = points @ turn.T
    centre = (turned.min(0) + turned.max(0)) / 2 if len(turned) else 0
    radius = np.linalg.norm(turned - centre, axis=1).max(initial=0)
    if not 0 < radius < math.inf:
        raise ValueError("it has no faces of any size")
    return np.block([[turn / radius, -centre[:, None] / radius], [np.zeros(3), 1]])


# ---- Blender -------------------------------------------------------------------------------------

def render_object(folder, model, turn, caption, size, fov, c2w):
    """One view set.  It is none until its last file, transforms.json, is there."""
    import bpy
    shutil.rmtree(folder, ignore_errors=True)                   # what an end too early has left
    folder.mkdir(parents=True)
    bpy.ops.wm.read_factory_settings(use_empty=True)
    load = bpy.ops.wm.obj_import if model.suffix.lower() == ".obj" else bpy.ops.import_scene.gltf
    load(filepath=str(model))
    place_model(bpy, turn @ BLENDER.T)
    camera, frames = set_stage(bpy, size, fov), []
    for i, matrix in enumerate(c2w):
        camera.matrix_world = [*zip(*matrix)]                   # Blender takes columns
        bpy.context.scene.render.filepath = str(folder / f"{i:03d}.png")
        bpy.ops.render.render(write_still=True)
        mend_silhouette(folder / f"{i:03d}.png")
        frames.append({"file_path": f"./{i:03d}", "transform_matrix": matrix})
    (folder / "caption.txt").write_text(caption + "\n", "utf-8")
    cameras = {"camera_angle_x": math.radians(fov), "w": size, "h": size, "frames": frames}
    part = folder / "transforms.part"
    part.write_text(json.dumps(cameras, indent=1), "utf-8")
    part.replace(folder / "transforms.json")


def place_model(bpy, turn):
    """Brings all that was loaded, under one empty object, into the unit sphere."""
    points, scene = [np.zeros((0, 3))], bpy.context.scene
    for item in bpy.context.evaluated_depsgraph_get().object_instances:
        if item.object.type == "MESH":
            mesh, matrix = item.object.data, np.array(item.matrix_world)
            xyz, used = np.zeros(3 * len(mesh.vertices), "f"), np.zeros(len(mesh.loops), "i")
            mesh.vertices.foreach_get("co", xyz)
            mesh.loops.foreach_get("vertex_index", used)        # the corners of faces
            points.append(xyz.reshape(-1, 3)[np.unique(used)] @ matrix[:3, :3].T + matrix[:3, 3])
    top = bpy.data.objects.new("top", None)
    top.matrix_world = [*zip(*placement(np.concatenate(points), turn).tolist())]
    for item in scene.objects:
        item.hide_render |= item.type == "LIGHT"
        item.parent = item.parent or top
    scene.collection.objects.link(top)
    for material in bpy.data.materials:                         # a lost texture would be magenta;
        for node in [*material.node_tree.nodes] if material.node_tree else ():
            if node.type == "TEX_IMAGE" and not (node.image and node.image.size[0]):
                material.node_tree.nodes.remove(node)           # now the plain colour shows


def set_stage(bpy, size, fov):
    """The settings, and the dome -> the camera."""
    scene, world = bpy.context.scene, bpy.data.worlds.new("dome")
    scene.camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.collection.objects.link(scene.camera)
    settings = {
        scene.camera.data: dict(angle=math.radians(fov), clip_start=0.01),
        scene.view_settings: dict(view_transform="Standard"),   # colours as textures have them
        scene.render.image_settings: dict(file_format="PNG", color_mode="RGBA"),
        scene.render: dict(
            engine="CYCLES", resolution_x=size, resolution_y=size, film_transparent=True,
            threads_mode="FIXED", threads=1, use_persistent_data=True, dither_intensity=0),
        scene.cycles: dict(
            device="CPU", samples=8, use_adaptive_sampling=False, max_bounces=2, use_denoising=True,
            denoising_quality="FAST", denoising_input_passes="RGB",
            caustics_reflective=False, caustics_refractive=False, film_transparent_glass=True)}
    for owner, values in settings.items():
        for key, value in values.items():
            setattr(owner, key, value)

    if not world.node_tree:
        world.use_nodes = True                                  # before Blender 5
    nodes, link = world.node_tree.nodes, world.node_tree.links.new
    ray, cos, radiance = (nodes.new(f"ShaderNode{n}") for n in ("TexCoord", "VectorMath", "Math"))
    cos.operation, radiance.operation = "DOT_PRODUCT", "MULTIPLY_ADD"
    cos.inputs[1].default_value = data.LIGHT
    radiance.inputs[1].default_value, radiance.inputs[2].default_value = 0.45, 0.7
    nodes["Background"].inputs["Color"].default_value = 1, 1, 1, 1
    link(ray.outputs["Generated"], cos.inputs[0])
    link(cos.outputs["Value"], radiance.inputs[0])
    link(radiance.outputs[0], nodes["Background"].inputs["Strength"])
    world.cycles.sampling_method, scene.world = "NONE", world   # rays that leave a surface find it
    return scene.camera


def mend_silhouette(path):
    """The denoiser smooths colour times alpha, but not alpha: their quotient is speckled along the
    silhouette, where each pixel now takes the colour of its neighbours that are more covered."""
    from PIL import Image
    rgba = np.asarray(Image.open(path), np.float32) / 255
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if not alpha.any():
        raise ValueError("nothing of it can be seen")
    weighted = np.concatenate([rgb, np.ones_like(alpha)], -1) * alpha ** 4
    near = sum(np.roll(weighted, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1))
    rgb = np.where(alpha < 0.99, near[..., :3] / near[..., 3:].clip(1e-6), rgb)
    Image.fromarray((255 * np.concatenate([rgb, alpha], -1)).round().astype(np.uint8)).save(path)


# ---- Models and their captions -------------------------------------------------------------------

def article(name):
    """"armChair_02" -> "an arm chair"; "Sofa 2 seats" -> "a sofa 2 seats"; "Keys" -> "keys"."""
    words = re.sub(r"[^\w']+|_|(?<=[a-z]{2})(?=[A-Z])", " ", re.sub(r"[\W_\d]+$", "", name) or name)
    words = " ".join(words.lower().split())
    if re.search(r"(?<![siu])s$", re.split(r" with | \d", words)[0]):
        return words
    return f"an {words}" if words[:1] in tuple("aeiou") else f"a {words}"


def find_models(source, unpacked):
    """{name: (file, turn, caption)} of a folder or of a single file; a name is a path under it."""
    found = {}
    if not source.exists():
        raise FileNotFoundError(f"{source}: there is no such folder or file")
    root = source if source.is_dir() else source.parent
    captions = sources.read_captions(root)
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        name, suffix = path.relative_to(root), path.suffix.lower()
        if suffix == ".sh3f":
            found.update(read_library(path, name, Path(unpacked) / str(len(found))))
        elif suffix in MODELS and path.is_file():
            caption = captions.get(name.with_suffix("").as_posix()) or captions.get(path.stem)
            caption = caption or sources.read_text(path.with_suffix(".txt")) or article(path.stem)
            found[name.as_posix()] = path, TURN, caption
    if not found:
        raise ValueError(f"{source}: no model found; wanted are {', '.join(MODELS)} or .sh3f")
    return found


def read_library(path, name, folder):
    """Unpacks a .sh3f.  Of object 7 it has the lines name#7=Armchair, model#7=/a/b.obj and, where
    the file does not stand upright, modelRotation#7=nine numbers."""
    entries, found = {}, {}
    try:
        with zipfile.ZipFile(path) as library:
            text = library.read("PluginFurnitureCatalog.properties").decode("unicode_escape")
            library.extractall(folder)                          # which never leaves the folder
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no furniture library that can be read") from error
    for key, i, value in re.findall(r"(?m)^(name|model|modelRotation)#(\d+)\s*=\s*(.*?)\s*$", text):
        entries.setdefault(i, {})[key] = value
    for i, entry in entries.items():
        model = sources.inside(folder, entry.get("model", "").lstrip("/"))
        turn = np.array(entry.get("modelRotation", "1 0 0 0 1 0 0 0 1").split(), float)
        if model.suffix.lower() in MODELS:
            found[f"{name.as_posix()}/{model.stem}_{i}"] = (
                model, TURN @ turn.reshape(3, 3), article(entry.get("name") or model.stem))
    return found


# ---- Work in several processes -------------------------------------------------------------------

def serve(work, pipe):
    """A worker: does what comes, answers what went wrong or None.  Blender's chatter is lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # the parent ends it
    for stream in 1, 2:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    while True:
        job = pipe.recv()
        try:
            work(*job)
            pipe.send(None)
        except Exception as error:                              # a broken model may raise anything
            lines = str(error).strip().splitlines() or [type(error).__name__]
            named = [line for line in lines if re.match(r"\w+(Error|Exception): ", line)]
            pipe.send((named or lines)[-1].strip())         # of a traceback in it, what it says


def in_workers(work, jobs, count):
    """Runs work(*job) in `count` processes -> job, what went wrong or None, as each ends.
    A thread feeds each process, and takes another when its own dies of a job."""
    context, mine = get_context("spawn"), threading.local()

    def run(job):
        if not hasattr(mine, "pipe"):
            mine.pipe, theirs = context.Pipe()
            context.Process(target=serve, args=(work, theirs), daemon=True).start()
            theirs.close()                                      # so that its death ends the pipe
        try:
            mine.pipe.send(job)
            return job, mine.pipe.recv()
        except (EOFError, OSError):
            del mine.pipe
            return job, "Blender itself died of it"

    with ThreadPool(count) as threads:
        yield from threads.imap_unordered(run, jobs)


def main(argv):
    parser = argparse.ArgumentParser(prog="data.py render", description=__doc__.split("\n")[0])
    parser.add_argument("models", help="a folder of .obj, .glb, .gltf or .sh3f, or one such file")
    parser.add_argument("out", help="the folder of view sets, for train.py --data")
    parser.add_argument("--views", type=int, default=32, help="of each object")
    parser.add_argument("--size", type=int, default=256, help="of a picture, in pixels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    if args.views < sources.VIEWS or args.size < 1 or args.jobs < 1:
        raise ValueError(f"--views must be at least {sources.VIEWS}, --size and --jobs at least 1")
    models, out, jobs, broken = Path(args.models), Path(args.out), [], {}
    if out.resolve() == (models if models.is_dir() else models.parent).resolve():
        raise ValueError(f"{out} holds the models themselves: take another OUT")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: take another OUT")
    if not importlib.util.find_spec("bpy"):
        raise ValueError("rendering needs Blender as a Python module: `pip install bpy` (bpy 5.0 "
                         "is for Python 3.11; this is {}.{})".format(*sys.version_info))
    with tempfile.TemporaryDirectory() as unpacked:
        found = find_models(models, unpacked)
        for name, model in found.items():
            done = out / name / "transforms.json"
            if done.exists():
                try:
                    old = json.loads(done.read_text("utf-8"))
                    views, size = len(old["frames"]), old["w"]
                except (ValueError, LookupError, TypeError):
                    raise ValueError(f"{done} is not of this command: take another OUT") from None
                if (views, size) != (args.views, args.size):
                    raise ValueError(f"{out / name} has {views} views of {size} pixels: repeat "
                                     f"--views {views} --size {size}, or take another OUT")
            else:
                fov, c2w = draw_cameras(name, args.views)
                jobs.append((out / name, *model, args.size, fov, c2w.tolist()))
        bar = tqdm(in_workers(render_object, jobs, args.jobs), total=len(found),
                   initial=len(found) - len(jobs), unit="object")
        for (folder, *_), fault in bar:
            if fault:
                broken[folder] = fault
                bar.set_postfix(broken=len(broken))
                shutil.rmtree(folder, ignore_errors=True)
    for folder, fault in broken.items():
        print(f"skipped {folder.relative_to(out)}: {fault}")
    if len(broken) == len(found):
        raise ValueError(f"{models}: none of its {len(found)} models could be rendered")
    print(f"{out}: {len(found) - len(broken)} objects, {len(broken)} broken")
