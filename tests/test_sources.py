"""sources.py: sets chosen by hand-worked angles, the pictures and captions that arrive, draws that
depend on nothing but seed and step, and what broken data gets."""
import io
import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import sources

ROOT = Path(__file__).parent.parent


def write_object(folder, azimuths=range(0, 360, 45), elevation=20, caption="a chair", distance=3.0,
                 size=20):
    """Each picture is opaque in the middle, and as red as its azimuth says."""
    folder.mkdir(parents=True)
    frames = []
    for i, azimuth in enumerate(azimuths):
        c2w = data.look_at_origin(torch.tensor(float(elevation)), torch.tensor(float(azimuth)))
        c2w[:3, 3] *= distance
        image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
        image.paste((azimuth % 360 * 255 // 360, 10, 20, 255), (5, 5, size - 5, size - 5))
        image.save(folder / f"r_{i}.png")
        frames.append({"file_path": f"./r_{i}", "transform_matrix": c2w.tolist()})
    (folder / "transforms.json").write_text(json.dumps({"camera_angle_x": .7, "frames": frames}))
    if caption:
        (folder / "caption.txt").write_text(caption + "\n")
    return folder


def write_picture(path, color=(200, 100, 50), caption=None, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    if caption:
        path.with_suffix(".txt").write_text(caption)


def write_shard(path, names):
    with tarfile.open(path, "w") as shard:
        for name, content in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def jpeg(color, size=16):
    file = io.BytesIO()
    Image.new("RGB", (size, size), color).save(file, "jpeg")
    return file.getvalue()


def azimuths(c2w):
    angles = torch.rad2deg(torch.atan2(c2w[:, 1, 3], c2w[:, 0, 3]))
    return angles.round().int().remainder(360).tolist()


# ---- View sets -----------------------------------------------------------------------------------

def test_a_set_goes_around_from_a_random_start(tmp_path):
    write_object(tmp_path / "chair")
    sets, starts = sources.ViewSets(tmp_path, size=16), set()
    for seed in range(40):
        images, c2w, caption = sets.load(0, torch.Generator().manual_seed(seed))
        assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8
        assert caption == "a chair, 3d asset"
        around = azimuths(c2w)
        starts.add(around[0])
        assert [(a - around[0]) % 360 for a in around] == [0, 90, 180, 270]
        assert (images[:, 0, 8, 8].int() - torch.tensor(around) * 255 // 360).abs().max() <= 1
        corner = images[:, :, 0, 0]
        assert (corner == corner[0, 0]).all()                             # one grey for the set
    assert starts == set(range(0, 360, 45))


@pytest.mark.parametrize("around, wanted", [
    ((0, 60, 120, 180, 240, 300), {0, 60, 120, 180, 240, 300}),           # 30 degrees off at most
    ((0, 72, 144, 216, 288), {0, 72, 144, 216, 288}),                     # 36
    ((0, 85, 170, 280), {0, 85, 170, 280}),
    ((0, 10, 90, 180, 270), {0, 10, 90, 180, 270})])
def test_any_number_of_views_gives_sets_of_distinct_ones(tmp_path, around, wanted):
    write_object(tmp_path / "chair", around)
    sets = sources.ViewSets(tmp_path)
    _, c2w, rows = sets.cameras(tmp_path / "chair" / "transforms.json", None)
    assert {azimuths(c2w)[row[0]] for row in rows} == wanted
    assert all(len(set(row.tolist())) == 4 for row in rows)


def test_cameras_off_the_orbit_are_counted_and_not_used(tmp_path):
    folder = write_object(tmp_path / "chair", range(0, 360, 30), distance=7.0)
    info = json.loads((folder / "transforms.json").read_text())
    matrices = [torch.tensor(frame["transform_matrix"]) for frame in info["frames"]]
    matrices[1][:3, 2] *= -1                                                # looks away
    matrices[2] = data.look_at_origin(torch.tensor(80.), torch.tensor(60.))    # from far above
    matrices[3][:3, :3] *= 2                                                # is no rotation
    matrices[4][:3, :2] = matrices[4][:3, [1, 0]] * torch.tensor([1., -1.])   # lies on its side
    matrices[6][:3, :2] *= -1                                                 # upside down
    matrices[8][:3, 0] *= -1                                                  # a mirror's
    for frame, matrix in zip(info["frames"], matrices):
        frame["transform_matrix"] = matrix.tolist()
    (folder / "transforms.json").write_text(json.dumps(info))
    sets = sources.ViewSets(tmp_path)
    off = [path.name for path in sets.faults["cameras off the orbit"]]
    assert off == ["r_1.png", "r_2.png", "r_3.png", "r_4.png", "r_6.png", "r_8.png"]
    assert "6 cameras off the orbit (first" in str(sets)
    _, c2w, _ = sets.cameras(folder / "transforms.json", sets.faults)
    assert set(azimuths(c2w)) == set(range(0, 360, 30)) - {30, 60, 90, 120, 180, 240}


def test_captions_come_from_one_table_too(tmp_path):
    for name in ("a1", "a2", "a3"):
        write_object(tmp_path / "000" / name, range(0, 360, 90), caption=None)
    (tmp_path / "captions.csv").write_text('a1,"a chair, red"\na2,a table\n')
    sets = sources.ViewSets(tmp_path)
    assert [caption for _, caption in sets.items] == ["a chair, red", "a table"]
    assert len(sets.faults["objects without a caption"]) == 1


def test_nothing_left_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    write_object(tmp_path / "three" / "chair", (0, 90, 180))
    write_object(tmp_path / "front" / "chair", (0, 10, 20, 30))
    write_object(tmp_path / "blind" / "chair", ())
    write_object(tmp_path / "outside" / "chair", (0, 90, 180, 270))
    path = tmp_path / "outside" / "chair" / "transforms.json"
    path.write_text(path.read_text().replace("./r_0", "../../three/chair/r_0"))
    write_object(tmp_path / "keyless" / "chair")
    (tmp_path / "keyless" / "chair" / "transforms.json").write_text('{"camera_angle_x": 1}')
    for name, words in {"empty": "nothing found", "three": "less than the 4 pictures",
                        "front": "do not go around", "blind": "without cameras",
                        "outside": "without cameras", "keyless": "without cameras"}.items():
        with pytest.raises(ValueError, match=words) as error:
            sources.ViewSets(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        sources.ViewSets(tmp_path / "nowhere")


# ---- Pictures with captions ----------------------------------------------------------------------

def test_pictures_of_all_three_forms(tmp_path):
    write_picture(tmp_path / "a" / "one.png", (250, 0, 0), "a red thing")
    write_picture(tmp_path / "two.jpg", (0, 250, 0))
    write_picture(tmp_path / "lonely.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "two.jpg", "text": "a green thing"}\n'
                                             '{"file_name": "../../etc/x.png", "text": "out"}\n'
                                             '{"file_name": "gone.png", "text": "gone"}\nrubbish\n')
    write_shard(tmp_path / "00000.tar", [("000.jpg", jpeg((0, 0, 250))), ("000.json", b"{}"),
                                         ("000.txt", b"a blue thing")])
    pictures = sources.Pictures(tmp_path, size=16)
    found = {}
    for i in range(len(pictures)):
        images, c2w, caption = pictures.load(i)
        assert images.shape == (1, 3, 16, 16) and c2w is None
        found[caption] = images[0, :, 8, 8].int().argmax().item()
    assert found == {"a red thing": 0, "a green thing": 1, "a blue thing": 2}
    assert {what: len(names) for what, names in pictures.faults.items()} == {
        "pictures without a caption": 1, "pictures missing": 1, "useless lines in metadata.jsonl": 2}


def test_a_shard_cut_in_half_gives_what_is_whole(tmp_path):
    names = [(f"{i}{suffix}", content) for i in range(8)
             for suffix, content in ((".jpg", jpeg((i, 0, 0))), (".txt", b"x"))]
    write_shard(tmp_path / "a.tar", names)
    content = (tmp_path / "a.tar").read_bytes()
    assert len(sources.Pictures(tmp_path)) == 8
    for cut in (len(names) * 1024 // 2, 5000, 5632):
        (tmp_path / "a.tar").write_bytes(content[:cut])
        pictures = sources.Pictures(tmp_path)
        assert 0 < len(pictures) < 8 and len(pictures.faults["tar shards cut short or broken"]) == 1
        assert all(pictures.load(i)[0].shape == (1, 3, 256, 256) for i in range(len(pictures)))
    (tmp_path / "a.tar").write_bytes(b"no tar at all")
    with pytest.raises(ValueError, match="1 tar shards cut short or broken"):
        sources.Pictures(tmp_path)


def test_a_photo_stands_as_the_camera_was_held(tmp_path):
    photo = Image.new("RGB", (16, 16), (255, 0, 0))
    photo.paste((0, 0, 255), (0, 0, 16, 8))                                 # blue above, as stored
    exif = photo.getexif()
    exif[0x0112] = 3                                                        # held upside down
    photo.save(tmp_path / "a.png", exif=exif)
    pixels = sources.read_picture(tmp_path / "a.png", 16, 0, "a")
    assert pixels[:, 0, 0].tolist() == [255, 0, 0] and pixels[:, 15, 0].tolist() == [0, 0, 255]


def test_any_seed_draws(tmp_path):
    write_picture(tmp_path / "a.png", caption="x")
    assert sources.Draws(sources.Pictures(tmp_path, 16), 20261122)[(7, 3)][2] == "x"


def test_tar_members_that_point_outside_are_skipped(tmp_path):
    write_shard(tmp_path / "a.tar", [("../../x.jpg", jpeg((9, 9, 9))), ("../../x.txt", b"evil"),
                                     ("/abs.jpg", jpeg((9, 9, 9))), ("y.jpg", jpeg((9, 9, 9))),
                                     ("y.txt", b"good")])
    with tarfile.open(tmp_path / "a.tar", "a") as shard:
        link, folder = tarfile.TarInfo("z.jpg"), tarfile.TarInfo("folder.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        folder.type = tarfile.DIRTYPE
        shard.addfile(link)
        shard.addfile(folder)
    pictures = sources.Pictures(tmp_path)
    assert [caption for *_, caption in pictures.items] == ["good"]
    assert len(pictures.faults["tar members that are links or point outside"]) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]                # nothing was unpacked
    assert not (tmp_path.parent.parent / "x.jpg").exists()


def test_a_picture_keeps_its_middle_and_its_transparency(tmp_path):
    image = Image.new("RGBA", (60, 20), (255, 0, 0, 0))
    image.paste((0, 0, 200, 255), (20, 0, 40, 20))
    image.save(tmp_path / "a.png")
    assert (sources.read_picture(tmp_path / "a.png", 8, 99, "a")[2, :, 2:6] == 200).all()
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.save(tmp_path / "a.png")
    assert (sources.read_picture(tmp_path / "a.png", 8, 99, "a") == 99).all()


# ---- Draws ---------------------------------------------------------------------------------------

def test_draws_are_functions_of_seed_and_step(tmp_path):
    for name in "abcdef":
        write_object(tmp_path / name, caption=f"object {name}")
    sets = sources.ViewSets(tmp_path, size=8)
    one, again, other = (sources.Draws(sets, seed) for seed in (0, 0, 1))
    keys = [(step, place) for step in range(5) for place in range(4)]
    captions = [one[key][2] for key in keys]
    assert captions == [again[key][2] for key in reversed(keys)][::-1] and len(set(captions)) == 6
    assert captions != [other[key][2] for key in keys]
    assert all(torch.equal(a, b) for a, b in zip(one[3, 1][:2], again[3, 1][:2]))


def test_a_picture_that_is_none_is_named_and_replaced(tmp_path):
    write_picture(tmp_path / "good.png", caption="good")
    (tmp_path / "bad.png").write_text("this is no picture")
    (tmp_path / "bad.txt").write_text("bad")
    draws = [sources.Draws(sources.Pictures(tmp_path, size=8), 0)[step, 0] for step in range(20)]
    assert {caption for _, _, caption, _ in draws} == {"good"}
    broken = {name for *_, names in draws for name in names}
    assert len(broken) == 1 and "bad.png" in broken.pop()
    (tmp_path / "good.png").write_text("neither")
    with pytest.raises(ValueError, match="100 broken samples in a row"):
        sources.Draws(sources.Pictures(tmp_path, size=8), 0)[0, 0]


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    for value in 0, 5000, 65535:
        Image.new("I;16", (8, 8), value).save(tmp_path / "grey.png")
        read = sources.read_picture(tmp_path / "grey.png", 4, 0, "grey.png")
        assert read.shape == (3, 4, 4) and (read == value // 257).all()


def test_texts_of_every_kind(tmp_path):
    """Byte-order marks, UTF-16, line ends inside of captions: as spreadsheets save them."""
    for name, text in (("a", b"\xef\xbb\xbfone"), ("b", "two".encode("utf-16")), ("c", b" th\n ree\n")):
        write_picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(text)
    write_picture(tmp_path / "d.png")
    row = json.dumps({"file_name": "d.png", "text": "fo\u2028ur"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row + "\n\n", "utf-8")
    pictures = sources.Pictures(tmp_path)
    assert [caption for *_, caption in pictures.items] == ["one", "two", "th ree", "fo ur"]
    assert not pictures.faults
    (tmp_path / "captions.csv").write_text('\ufeffuid,"a\nchair\x85red"\nother,b\n', "utf-8", newline="")
    assert sources.read_captions(tmp_path) == {"uid": "a\nchair\x85red", "other": "b"}
    for broken in '"' + 200_000 * "x" + '"', 'uid,"no end\nother,b\n':
        (tmp_path / "captions.csv").write_text(broken)
        with pytest.raises(ValueError, match="captions.csv, line"):
            sources.read_captions(tmp_path)


def test_one_odd_caption_does_not_stop_the_others(tmp_path, monkeypatch):
    for name in "abc":
        write_picture(tmp_path / f"{name}.png", caption=f"a thing {name}")
    lines = [json.dumps({"file_name": "c.png", "text": "a \ud800 duck"}),
             json.dumps({"file_name": 300 * "x" + ".png", "text": "long"}), 100_000 * "["]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    read = sources.Path.read_bytes

    def refused(path):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied", path)
        return read(path)
    monkeypatch.setattr(sources.Path, "read_bytes", refused)
    pictures = sources.Pictures(tmp_path)
    assert [caption for *_, caption in pictures.items] == ["a thing a", "a ? duck"]
    assert {what: len(names) for what, names in pictures.faults.items()} == {
        "pictures without a caption": 1, "pictures missing": 1, "useless lines in metadata.jsonl": 1}


def test_one_odd_object_does_not_stop_the_others(tmp_path):
    write_object(tmp_path / "good" / "chair")
    for name, change in (("huge", ("[1.0", "[1" + 400 * "0")), ("long", ("./r_0", 5000 * "x"))):
        path = write_object(tmp_path / name / "chair") / "transforms.json"
        matrix = json.loads(path.read_text())
        matrix["frames"][0]["transform_matrix"] = [[1.0] * 4] * 4
        path.write_text(json.dumps(matrix).replace(*change))
    (tmp_path / "folder" / "chair" / "transforms.json").mkdir(parents=True)
    sets = sources.ViewSets(tmp_path)
    assert len(sets) == 1 and "3 transforms.json without cameras" in str(sets)


# ---- python data.py FOLDER -----------------------------------------------------------------------

def test_checking_a_folder(tmp_path):
    write_object(tmp_path / "sets" / "chair")
    write_object(tmp_path / "sets" / "table", range(0, 360, 30), caption="a table")
    (tmp_path / "sets" / "table" / "r_3.png").write_text("no picture")
    text = sources.check(tmp_path / "sets", tmp_path / "sheet.png", size=64)
    assert "2 objects" in text and Image.open(tmp_path / "sheet.png").size == (5 * 64 + 300, 2 * 68)
    write_picture(tmp_path / "flat" / "a.png", caption="a picture")
    assert "1 pictures; nothing amiss" in sources.check(tmp_path / "flat", tmp_path / "sheet.png")
    (tmp_path / "empty").mkdir()
    result = subprocess.run([sys.executable, str(ROOT / "data.py"), "empty"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("data.py: empty: nothing to train on")
    assert len(result.stderr.splitlines()) == 1


def test_sheet_of_the_toy_world(tmp_path, monkeypatch):
    from PIL import Image
    sources.data.templates()                        # kept from here on, with all categories
    monkeypatch.setattr(sources.data, "CATEGORIES", {k: sources.data.CATEGORIES[k] for k in ("duck", "car")})
    sources.toy_sheet(str(tmp_path / "new" / "sheet.png"))
    assert Image.open(tmp_path / "new" / "sheet.png").size[0] == 1056


def test_captions_are_encoded_once_and_the_last_4000_kept():
    from types import SimpleNamespace
    asked = []

    def encode_text(captions):
        asked.append(captions)
        return torch.stack([torch.full((2, 3), float(caption)) for caption in captions])

    model, known = SimpleNamespace(encode_text=encode_text), {}
    args = SimpleNamespace(train_text=False, device="cpu")
    y = sources.encode_captions(["7", "5", "7"], model, args, known)
    assert asked == [["7"], ["5"]] and y.dtype == torch.float32
    assert y[:, 0, 0].tolist() == [7, 5, 7]
    assert sources.encode_captions(["5", "9"], model, args, known)[:, 0, 0].tolist() == [5, 9]
    assert asked == [["7"], ["5"], ["9"]]
    known.update({f"of before {i}": y[0].half() for i in range(3998)})
    sources.encode_captions(["8"], model, args, known)
    assert len(known) == 4000 and "7" not in known and {"9", "8"} < set(known)


def test_workers_leave_signals_to_the_run():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        sources.ignore_signals(0)
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
