"""Where training's batches come from: the toy world, folders of your own, photos of one subject.

MVDream trains on renders of Objaverse, sets of four evenly spaced views, and on a part of LAION.
Both are folders here; tar shards are read where they lie, and nothing is ever unpacked:

    renders/chair/transforms.json   NeRF-synthetic's form: frames, each with a file_path and the
    renders/chair/*.png             camera's transform_matrix (c2w, OpenGL axes, world z up), RGBA
    renders/chair/caption.txt       or one renders/captions.csv (uid, caption) for all
    laion/*.jpg, laion/*.txt        or a laion/metadata.jsonl (file_name, text), or laion/*.tar

Conventions and letters are those of data.py.  ViewSets and Pictures read them, both by

    load(i, generator) -> pictures (V, 3, H, W) uint8, cameras (V, 4, 4) or None, caption

What is broken is counted in `faults`, {what: [where]}, and is fatal only if nothing is left.
`python data.py FOLDER` checks a folder and draws what training would see of it.
"""
import collections
import contextlib
import csv
import io
import json
import os
import signal
import tarfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data

VIEWS = 4       # of a set; data, batches, losses and samples all follow this one number
PICTURES = ".png", ".jpg", ".jpeg", ".webp"


def read_picture(file, size, grey, name):
    """The middle square of a picture, grey where it is transparent -> (3, size, size) uint8."""
    from PIL import Image, ImageOps
    try:
        with Image.open(file) as image:
            image.draft("RGB", (size, size))                 # a JPEG is decoded at about this size
            image = ImageOps.exif_transpose(image)           # as the photographer held the camera
            if image.mode.startswith("I"):                   # 16 bits of grey, to 8
                image = image.point(lambda value: value * (1 / 257)).convert("L")
            image = ImageOps.fit(image.convert("RGBA"), (size, size))
    except Exception as error:                               # a broken file may raise anything
        raise ValueError(f"{name} is no picture that can be read") from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, (grey, grey, grey, 255)), image)
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).movedim(-1, 0)


def decode(text):
    """Bytes in UTF-8, or in UTF-16 where they begin with its mark."""
    wide = text[:2] in (b"\xff\xfe", b"\xfe\xff")
    return text.decode("utf-16" if wide else "utf-8-sig", "replace").strip()


def read_text(path):
    """Its text; none, if it is not there or cannot be read."""
    with contextlib.suppress(OSError):
        return decode(path.read_bytes())
    return ""


def clean(caption):
    """On one line, and of letters that can be encoded."""
    return " ".join(caption.encode("utf-8", "replace").decode().split())


def read_captions(folder):
    """captions.csv (uid, caption), as Cap3D publishes -> {uid: caption}"""
    path = folder / "captions.csv"
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        return {row[0]: row[1] for row in rows if len(row) > 1}
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from None


def inside(folder, name):
    """The path `name` in a folder; a path that leads out of it is refused."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"{name!r} leads out of {folder}")
    return folder / name


def told(faults):
    """"3 pictures missing (first a/0.png); 1 ..." """
    return "; ".join(f"{len(names)} {what} (first {names[0]})" for what, names in faults.items())


class Samples:
    """What the two kinds share: items = [(path, ..., caption)], and what was wrong, `faults`."""

    def __init__(self, folder, size=256, caption=""):
        self.folder, self.size, self.caption, self.items = Path(folder), size, caption, []
        self.faults = collections.defaultdict(list)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder; wanted is {self.wanted}")
        self.fill()
        if not self.items:
            why = told(self.faults) or "nothing found"
            raise ValueError(f"{folder}: nothing to train on: {why}; wanted is {self.wanted}")

    def add(self, caption, path, *place):
        """An item with its own caption, unless there is one for all."""
        caption = self.caption or clean(caption or "")
        if caption:
            self.items.append((path, *place, caption))
        else:
            self.faults[f"{self.kind} without a caption"].append(path)

    def readable(self, generator):
        """-> the path of every sample, and what load gives; what cannot be read is a fault, and
        fatal if nothing else is there."""
        nothing = True
        for i, (path, *_) in enumerate(self.items):
            try:
                sample = self.load(i, generator)
            except (ValueError, OSError) as error:
                self.faults[f"{self.kind} that cannot be read"].append(error)
                continue
            yield path, *sample
            nothing = False
        if nothing:
            raise ValueError(f"{self.folder}: nothing to train on: {told(self.faults)}")

    def __len__(self):
        return len(self.items)

    def __str__(self):
        return f"{self.folder}: {len(self)} {self.kind}; {told(self.faults) or 'nothing amiss'}"


class ViewSets(Samples):
    """A folder for each object: transforms.json, its pictures, a caption.txt; or one captions.csv
    (uid, caption) for all.  The cameras are this project's, at any distance and fov."""
    kind, wanted = "objects", "a folder an object: transforms.json, pictures, caption.txt"

    def fill(self):
        captions = read_captions(self.folder)
        for path in sorted(self.folder.rglob("transforms.json")):
            try:
                self.cameras(path, self.faults)
            except ValueError as error:
                self.faults[str(error)].append(path)
                continue
            own = read_text(path.with_name("caption.txt"))
            self.add(own or captions.get(path.parent.name), path)

    def cameras(self, path, faults):
        """-> pictures [n], c2w (n, 4, 4) of the cameras on the orbit, and sets (s, V) of these: V
        cameras each nearest to its place, evenly spaced from a first one, and less than half a
        step away from it."""
        files, c2w, V = [], [], VIEWS
        try:
            for frame in json.loads(path.read_text("utf-8"))["frames"]:
                file = inside(path.parent, frame["file_path"])
                file = file if file.suffix.lower() in PICTURES else Path(f"{file}.png")
                if file.is_file():
                    files.append(file)
                    c2w.append(torch.tensor(frame["transform_matrix"]).float().reshape(4, 4))
                else:
                    faults["pictures missing"].append(file)
            c2w = torch.stack(c2w)
        except (ValueError, LookupError, TypeError, OverflowError, RuntimeError, OSError) as error:
            raise ValueError("transforms.json without cameras that can be read") from error
        # On the orbit: looking at the centre within 11 degrees, upright within 6, rigid, no mirror,
        # and within 10 degrees of the elevation of most.
        back, position = c2w[:, :3, 2], F.normalize(c2w[:, :3, 3], dim=-1)
        elevation = torch.rad2deg(torch.asin(back[:, 2].clamp(-1, 1)))
        good = ((back * position).sum(-1) > 0.98) & (c2w[:, 2, 0].abs() < 0.1)
        good &= (c2w[:, :3, :3].mT @ c2w[:, :3, :3] - torch.eye(3)).abs().amax((1, 2)) < 0.01
        good &= (c2w[:, 2, 1] > 0) & (torch.linalg.det(c2w[:, :3, :3]) > 0)
        good &= (elevation - elevation[good].nanmedian()).abs() < 10
        if not good.all():
            faults["cameras off the orbit"].extend(f for f, g in zip(files, good) if not g)
        files, c2w = [f for f, g in zip(files, good) if g], c2w[good]
        if len(files) < V:
            raise ValueError(f"objects with less than the {V} pictures of a set")
        azimuth = torch.rad2deg(torch.atan2(c2w[:, 1, 2], c2w[:, 0, 2]))
        places = azimuth[:, None] + torch.arange(V) * 360 / V                            # (n, V)
        away, sets = ((azimuth - places[..., None] + 180) % 360 - 180).abs().min(-1)     # (n, V)
        sets = sets[away.amax(1) < 180 / V - 0.01]
        if not len(sets):
            raise ValueError(f"objects whose cameras do not go around: no {V} evenly spaced")
        return files, c2w, sets

    def load(self, i, generator=None):
        path, caption = self.items[i]
        files, c2w, sets = self.cameras(path, collections.defaultdict(list))
        pick = sets[torch.randint(len(sets), (), generator=generator)]
        grey = torch.randint(256, (), generator=generator).item()                # one a set
        images = [read_picture(files[k], self.size, grey, files[k]) for k in pick]
        return torch.stack(images), c2w[pick], caption + data.SUFFIX


class Pictures(Samples):
    """Pictures and captions: files with a .txt beside each, or named in a metadata.jsonl
    (file_name, text), or tar shards that hold such pairs.  Or one caption for all."""
    kind, wanted = "pictures", "pictures with a .txt beside each, a metadata.jsonl, or tar shards"

    def fill(self):
        listed = {}
        for line in filter(str.strip, read_text(self.folder / "metadata.jsonl").split("\n")):
            try:
                row = json.loads(line)
                listed[inside(self.folder, row["file_name"])] = row["text"].strip()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                self.faults["useless lines in metadata.jsonl"].append(f"{line[:80]!r}: {error}")
        for path in listed:
            if not os.path.isfile(path):
                self.faults["pictures missing"].append(path)
        for path in sorted(self.folder.rglob("*")):
            if path.suffix == ".tar":
                self.read_shard(path)
            elif path.suffix.lower() in PICTURES:
                own = listed.get(path) or read_text(path.with_suffix(".txt"))
                self.add(own, path, 0, -1)                     # all of the file, from its start

    def read_shard(self, path):
        """Only headers and captions are read here, and nothing is ever unpacked."""
        pictures, texts = {}, {}
        try:
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    stem, suffix = os.path.splitext(member.name)
                    outside = os.path.isabs(stem) or ".." in stem.split("/")
                    if outside or member.issym() or member.islnk():
                        self.faults["tar members that are links or point outside"].append(
                            f"{path}: {stem}")
                    elif not member.isfile():
                        continue
                    elif suffix.lower() in PICTURES:
                        pictures[stem] = member.offset_data, member.size
                    elif suffix == ".txt":
                        texts[stem] = decode(shard.extractfile(member).read())
                whole = shard.offset <= path.stat().st_size and path.stat().st_size % 512 == 0
        except (tarfile.TarError, OSError):
            whole = False
        if not whole:
            self.faults["tar shards cut short or broken"].append(path)
        for stem, (offset, size) in pictures.items():
            if offset + size <= path.stat().st_size:
                self.add(texts.get(stem), path, offset, size)

    def load(self, i, generator=None):
        path, offset, size, caption = self.items[i]
        with open(path, "rb") as file:
            file.seek(offset)
            content = io.BytesIO(file.read(size))
        grey = torch.randint(256, (), generator=generator).item()
        name = f"{path} at {offset}" if offset else path
        return read_picture(content, self.size, grey, name)[None], None, caption


class Draws(torch.utils.data.Dataset):
    """Random samples: number `place` of step `step` is a function of these and the seed alone, not
    of workers or ranks.  Broken ones are named and another is drawn."""

    def __init__(self, samples, seed):
        self.samples, self.seed = samples, seed

    def __getitem__(self, key):
        step, place = key
        seed = (self.seed * 1_000_003 + step << 20) + place
        g, broken = torch.Generator().manual_seed(seed % 2 ** 63), []
        for _ in range(100):
            i = torch.randint(len(self.samples), (), generator=g).item()
            try:
                return *self.samples.load(i, g), broken
            except (ValueError, OSError) as error:
                broken.append(str(error))
        raise ValueError(f"{self.samples.folder}: 100 broken samples in a row, last: {broken[-1]}")


# ---- Sources of batches --------------------------------------------------------------------------
# begin(encode)   called once the autoencoder is final; `encode` is vae.encode, or that compiled
# batch(mode, step, part, generator) -> x0 (N,4,h,w), y (B,...), c2w (N,4,4) or None
#                 a part (slice) of the step's view sets (mode "3d") or single pictures ("2d")
# empty, prompts  y of the empty caption, for guidance; captions to draw samples of
# half            whether begin and batch run the autoencoder in half precision
# kinds, broken   the folders behind it; what could not be read on the way

class Pool:
    """All samples of a mode, kept on the device: view sets ("3d"), or pictures with V = 1 ("2d").

    pictures  (S,V,3,H,W) uint8, which become latents (S,V,4,h,w)
    y         (S,77) tokens, or encoded (S,77,C)
    cameras   (S,V,4,4), of view sets
    """
    broken = ()

    def __init__(self, model, args):
        self.model, self.args = model, args
        self.pictures, self.latents, self.cameras, self.y = {}, {}, {}, {}

    @torch.no_grad()
    def begin(self, encode):
        scale, hidden = self.model.vae.config.scale_factor, self.args.rank > 0
        for mode, pictures in self.pictures.items():
            chunks = pictures.flatten(0, 1).split(self.at_once)
            latents = [(scale * encode(from_bytes(chunk))[0].float()).to(self.kept_as)
                       for chunk in tqdm(chunks, desc=f"{mode} latents", disable=hidden)]
            self.latents[mode] = torch.cat(latents).unflatten(0, pictures.shape[:2])
        self.pictures.clear()                   # conserve memory

    def batch(self, mode, step, part, generator):
        latents = self.latents[mode]
        pick = torch.randint(len(latents), (self.args.batch // latents.shape[1],),
                             generator=generator, device=latents.device)[part]
        c2w = self.cameras[mode][pick].flatten(0, 1) if mode in self.cameras else None
        return latents[pick].flatten(0, 1).float(), self.y[mode][pick], c2w


class ToyPool(Pool):
    """The toy world's two sets, rendered once."""
    kinds, half, at_once, kept_as = {}, False, 256, torch.half
    prompts = [p + data.SUFFIX for p in (
        "a red robot wearing a blue hat", "a green car with white wheels", "a purple bear",
        "a house", "a yellow duck wearing a pink scarf", "a blue rocket")]

    def __init__(self, model, args):
        super().__init__(model, args)
        g, size, device = torch.Generator().manual_seed(args.seed), model.image_size, args.device
        self.empty = model.tokenize([""]).to(device)
        for mode, count, views in (("3d", args.sets, VIEWS), ("2d", 2 * args.sets, 1)):
            parts = []
            firsts = range(0, count, 256 if args.gpu else 16)
            for first in tqdm(firsts, desc=f"{mode} pictures", disable=args.rank > 0):
                n = min(firsts.step, count - first)
                images, c2w, captions = (
                    data.toy_views(n, VIEWS, size, g, device) if mode == "3d" else
                    data.toy_pictures(n, size, g, device))
                parts.append((to_bytes(images).unflatten(0, (n, views)), c2w,
                              model.tokenize(captions).to(device)))
            pictures, c2w, y = zip(*parts)
            self.pictures[mode], self.y[mode] = torch.cat(pictures), torch.cat(y)
            if mode == "3d":
                self.cameras[mode] = torch.cat(c2w).unflatten(0, (count, views))

    def images(self, n, generator):
        """n random pictures, 3D and 2D alike: (n,3,H,W) in [-1,1]."""
        parts = []
        for mode, share in (("3d", n // 2), ("2d", n - n // 2)):
            flat = self.pictures[mode].flatten(0, 1)
            pick = torch.randint(len(flat), (share,), generator=generator, device=flat.device)
            parts.append(from_bytes(flat[pick]))
        return torch.cat(parts)


class Photos(Pool):
    """--dreambooth: a few photos of one subject, always in 2D mode."""
    half, at_once, kept_as = True, 1, torch.float

    def __init__(self, model, args):
        super().__init__(model, args)
        photos = Pictures(args.dreambooth, model.image_size, args.subject)
        g = torch.Generator().manual_seed(args.seed)
        images = [image for _, image, _, _ in photos.readable(g)]
        self.empty, y = encode_captions(["", args.subject], model, args, {}).split(1)
        self.pictures["2d"] = torch.stack(images).to(args.device)
        self.y["2d"] = y.expand(len(images), *y.shape[1:])                 # the same for all
        self.kinds, self.prompts = {"2d": photos}, [args.subject, args.subject + data.SUFFIX]


class Folders:
    """--data and --images: view sets and captioned pictures, read by workers ahead of the steps.
    plan(mode, step) yields what to draw in this mode from that step on: lists of Draws' keys."""
    half = True                                 # pictures are encoded in half precision

    def __init__(self, model, args, plan):
        self.model, self.args, self.plan, self.known, self.readers = model, args, plan, {}, {}
        self.kinds = {mode: kind(folder, model.image_size) for mode, kind, folder in
                      (("3d", ViewSets, args.data), ("2d", Pictures, args.images)) if folder}
        shown = next(iter(self.kinds.values())).items[:6]
        self.prompts = [caption + data.SUFFIX for *_, caption in shown]
        self.empty, self.broken = encode_captions([""], model, args, self.known), set()

    def begin(self, encode):
        self.encode = encode

    @torch.no_grad()
    def batch(self, mode, step, part, generator):
        if mode not in self.readers:
            self.readers[mode] = reader(self.kinds[mode], self.args, self.plan(mode, step))
        images, c2w, captions, broken = next(self.readers[mode])
        self.broken.update(broken)
        mean, _ = self.encode(from_bytes(images.to(self.args.device, non_blocking=True)))
        c2w = None if c2w is None else c2w.to(self.args.device, non_blocking=True)
        y = encode_captions(captions, self.model, self.args, self.known)
        return mean.float() * self.model.vae.config.scale_factor, y, c2w


@torch.no_grad()
def encode_captions(captions, model, args, known):
    """Tokens (B,77) where the text encoder learns; else encoded (B,77,C), each once: `known`
    {caption: (77,C)} keeps the last 4,000 on the device, which is 160 kB each at full size.
    Nothing waits for the device: where captions are always new, it would in every step."""
    if args.train_text:
        return model.tokenize(captions).to(args.device, non_blocking=True)
    new = [caption for caption in dict.fromkeys(captions) if caption not in known]
    size = 1 if args.device == "cpu" else 64    # alone, a caption gives the same bits in any batch
    for i in range(0, len(new), size):
        known.update(zip(new[i:i + size], model.encode_text(new[i:i + size]).half()))
    y = torch.stack([known[caption] for caption in captions]).float()
    for caption in list(known)[:-4000]:
        del known[caption]
    return y


def reader(samples, args, keys):
    """-> for each list of keys: pictures (N,3,H,W) uint8, c2w (N,4,4) or None, captions, broken"""
    draws = Draws(samples, args.seed)
    return iter(torch.utils.data.DataLoader(
        draws, batch_sampler=keys, num_workers=args.workers, collate_fn=collate,
        pin_memory=args.gpu, worker_init_fn=ignore_signals))


def collate(samples):
    images, cameras, captions, broken = zip(*samples)
    c2w = None if cameras[0] is None else torch.cat(cameras)
    return torch.cat(images), c2w, captions, sum(broken, [])


def ignore_signals(worker):
    for number in (signal.SIGINT, signal.SIGTERM):          # the run itself ends its step and stops
        signal.signal(number, signal.SIG_IGN)


def to_bytes(images):
    return ((images + 1) * 127.5).round().to(torch.uint8)


def from_bytes(images):
    return images.float() / 127.5 - 1


# ---- A look at the data --------------------------------------------------------------------------

def draw_orbit(c2w, chosen, size):
    """The cameras of an object seen from above, +x to the right; the chosen ones red, in order."""
    from PIL import Image, ImageDraw
    image = Image.new("RGB", (size, size), "white")
    pen, position = ImageDraw.Draw(image), c2w[:, :2, 3] / c2w[:, :3, 3].norm(dim=1).max()
    for i, (place, back) in enumerate(zip(position.tolist(), c2w[:, :2, 2].tolist())):
        x, y = (size / 2 + 0.42 * size * n for n in (place[0], -place[1]))
        ahead = x - 0.12 * size * back[0], y + 0.12 * size * back[1]               # where it looks
        color = "red" if i in chosen else "grey"
        pen.line((x, y, *ahead), color, 2)
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), color)
        if i in chosen:
            pen.text(ahead, str(chosen.index(i) + 1), "black", anchor="mm")
    pen.text((size / 2, size / 2), "+x >", "black", anchor="mm")
    return image


def check(folder, sheet, rows=8, size=128):
    """Load a sample of everything in a folder; say what is wrong; draw the first few."""
    from PIL import Image, ImageDraw
    views = next(Path(folder).rglob("transforms.json"), None)
    samples = ViewSets(folder, size=size) if views else Pictures(folder, size)
    page = Image.new("RGB", (size * (1 + VIEWS if views else 1) + 300, rows * (size + 4)), "white")
    pen, y, generator = ImageDraw.Draw(page), 0, torch.Generator().manual_seed(0)
    for path, images, c2w, caption in samples.readable(generator):
        if y == page.height:
            continue
        cells = [Image.fromarray(image.movedim(0, -1).numpy()) for image in images]
        if views:
            every = samples.cameras(path, collections.defaultdict(list))[1]
            chosen = (c2w[:, None] == every).all(3).all(2).int().argmax(1).tolist()
            cells.insert(0, draw_orbit(every, chosen, size))
        for x, cell in enumerate(cells):
            page.paste(cell, (x * size, y))
        pen.text((len(cells) * size + 8, y + size // 2), caption[:45], "black")
        y += size + 4
    Path(sheet).parent.mkdir(parents=True, exist_ok=True)
    page.crop((0, 0, page.width, y)).save(sheet)
    return str(samples)


def toy_sheet(path):
    """Every category of the toy world from four sides, over a caption of what it can have."""
    from PIL import Image, ImageDraw
    c2w = data.orbit_cameras(4, azimuth=30)
    sheet = Image.new("RGB", (2 * 528, 148 * -(-len(data.NAMES) // 2)), "white")
    for i, (name, (color, parts, _)) in enumerate(data.CATEGORIES.items()):
        colors = data.HUES[3 * i % 10 - 8], data.HUES[7 * i % 10]
        caption = data.sentence(name, color, dict(zip(parts, colors)))
        rgb = data.toy_render([caption], c2w, background=0.7)["rgb"][0]
        row = Image.fromarray((torch.cat(list(rgb), 1) * 255).round().byte().numpy())
        sheet.paste(row, (i % 2 * 528, i // 2 * 148))
        ImageDraw.Draw(sheet).text((i % 2 * 528 + 4, i // 2 * 148 + 130), caption, fill="black")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
