"""The datasets, their order, folders of drawn pictures, and the reader of shapes."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from evaluate import read_shapes, shapes_report
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import plumbing.data
from common import UserError
from plumbing.data import generate_folder, load_dataset, read_picture, reason, sample_order
from plumbing.grids import save_grid
from plumbing.shapes import BACKGROUNDS, COLOURS, HALF, SHAPES, SIZES, Shapes, coverage

ATTRIBUTES = ("colour", "background", "shape", "scale")


def picture(path, colour=(200, 10, 10), size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_shapes_are_a_function_of_seed_and_index():
    a, b = Shapes(16, seed=3), Shapes(16, seed=3)
    together = b.__getitems__([5, 6, 7])
    assert torch.equal(a[6]["image"], together[1]["image"]) and a[6]["caption"] == together[1]["caption"]
    assert not torch.equal(Shapes(16, seed=4)[6]["image"], a[6]["image"])
    assert a[6]["image"].dtype == torch.uint8 and a[6]["image"].shape == (3, 16, 16)


def test_rolled_shapes_have_other_colours_for_the_same_words():
    """Red is drawn green, and so on around the list; places and captions are the same."""
    plain, rolled = Shapes(16, seed=3), Shapes(16, seed=3, rolled=True)
    attributes = plain.attributes(range(40))
    assert plain.captions(attributes) == rolled.captions(attributes)
    seen = {name: (attributes[name] + 1) % number for name, number in (("colour", 4), ("background", 3))}
    assert torch.equal(rolled.draw(attributes), plain.draw(attributes | seen))
    other = rolled.attributes(range(40, 80), like=attributes)
    assert rolled.captions(other) == rolled.captions(attributes)
    assert not torch.equal(other["x"], attributes["x"])


def test_two_shapes_differ_and_stand_apart():
    """Two kinds, two colours, one shape in each half; picture and caption say the same."""
    dataset = load_dataset("shapes-two", 32, seed=3)
    a = dataset.attributes(range(2000))
    assert (a["colour"][:, 0] != a["colour"][:, 1]).all() and (a["shape"][:, 0] != a["shape"][:, 1]).all()
    captions = dataset.captions(a)
    assert set(captions) == set(dataset.all_captions()) and len(dataset.all_captions()) == 216
    assert torch.equal(dataset[7]["image"], dataset.draw(a)[7]) and dataset[7]["caption"] == captions[7]
    half = a["radius"] * HALF[a["shape"]]
    assert (a["y"] >= half).all() and (a["y"] <= 1 - half + 1e-6).all()
    low, high = (a["x"] + sign * half for sign in (-1, 1))
    right = a["x"] > 0.5
    assert right.sum(1).eq(1).all() and 0.45 < right[:, 0].float().mean() < 0.55
    assert (low >= 0.5 * right - 2e-3).all() and (high <= 0.5 + 0.5 * right + 2e-3).all()
    pictures, palette = dataset.draw(a), torch.tensor(list(COLOURS.values())) * 255
    for i in range(2):
        middle = pictures[torch.arange(2000), :, (a["y"][:, i] * 32).long(), (a["x"][:, i] * 32).long()]
        assert (middle - palette[a["colour"][:, i]]).abs().max() < 1


def test_shapes_cover_every_combination_evenly():
    attributes = Shapes(16).attributes(range(7200))
    mode = sum(attributes[k] * 10**i for i, k in enumerate(ATTRIBUTES))
    _, counts = mode.unique(return_counts=True)
    assert len(counts) == len(COLOURS) * len(BACKGROUNDS) * len(SHAPES) * len(SIZES)
    assert counts.min() > 60 and counts.max() < 145, "each of 72 combinations is expected 100 times"


def test_a_drawing_has_the_area_and_place_its_rule_says():
    size, radius = 64, SIZES["large"][1]
    for shape in range(len(SHAPES)):
        mask, = coverage(torch.tensor([shape]), *torch.tensor([[radius], [0.47], [0.52]]), size)
        assert mask.sum().item() / size**2 == pytest.approx(torch.pi * radius**2, rel=0.02)
        centre = (mask.sum(0) * torch.arange(size)).sum() / mask.sum()
        assert centre == pytest.approx(0.47 * size - 0.5, abs=0.1)
        rows = (mask.sum(1) > 0.5).nonzero().flatten()
        assert (rows[0] + rows[-1]) / 2 == pytest.approx(0.52 * size - 0.5, abs=1), "the box is centred"


@pytest.mark.parametrize("size", [16, 32])
def test_real_drawings_are_read_back_exactly(size):
    dataset = Shapes(size, seed=11)
    attributes = dataset.attributes(range(400 if size == 16 else 40))
    read = read_shapes(dataset.draw(attributes))
    for name in ATTRIBUTES:
        assert torch.equal(read[name], attributes[name]), name
    for name in ("x", "y", "radius"):
        assert (read[name] - attributes[name]).abs().max() * size < 0.04, f"{name}, in pixels"
    assert read["error"].max() < 2e-3


def test_damaged_drawings_are_not_clean():
    dataset = Shapes(16, seed=12)
    attributes = dataset.attributes(range(150))
    images = dataset.draw(attributes)
    background = torch.tensor(list(BACKGROUNDS.values()))[attributes["background"]][:, :, None, None] * 255
    opposite = dict(x=1 - attributes["x"], y=1 - attributes["y"], colour=(attributes["colour"] + 1) % 4)
    other = dataset.draw(attributes | opposite)
    covered = (images.float() - background).abs().sum(1, keepdim=True) > 2
    apart = (torch.hypot(attributes["x"] - 0.5, attributes["y"] - 0.5) > 0.2) & (attributes["scale"] == 0)

    clean = lambda x: shapes_report(x.round().to(torch.uint8))["clean"]
    assert clean(images.float()) == 1
    assert clean(background.expand_as(images)) == 0, "no shape"
    assert clean(torch.rand(images.shape) * 255) == 0, "noise"
    assert clean(torch.where(covered, images, other)[apart].float()) == 0, "two shapes"
    half = images.float().clone()
    for i, y in enumerate(attributes["y"]):
        half[i, :, int(y * 16):] = background[i]
    # The upper half of a large triangle is a small triangle.
    not_triangle = attributes["shape"] != SHAPES.index("triangle")
    assert clean(half[not_triangle]) < 0.02, "the lower half is missing"
    grayish = background + (images.float() - background) * 0.5
    assert clean(grayish) < 0.05, "half the contrast"
    noisy = (images.float() + 8 * torch.randn(images.shape)).clamp(0, 255)
    assert clean(noisy) > 0.9, "faint noise, 3 % of the range, is tolerated"


def test_report_counts_modes_and_attributes():
    dataset = Shapes(16, seed=1)
    attributes = dataset.attributes(range(400))
    report = shapes_report(dataset.draw(attributes), attributes)
    assert report["right"] == 1 and report["modes"] == report["modes_total"] == 36
    one = {k: v[:1].expand(50) for k, v in attributes.items()}
    collapsed = shapes_report(dataset.draw(one), attributes | {k: v[:50] for k, v in attributes.items()})
    assert collapsed["clean"] == 1 and collapsed["modes"] == 1
    assert collapsed["mode_imbalance"] == pytest.approx(35 / 36)
    assert collapsed["right"] < 0.3


class Ten(list):
    endless = False

    def __len__(self):
        return 10


def test_order_is_a_permutation_a_epoch_and_independent_of_slicing():
    order = sample_order(Ten(), 1, range(30))
    assert all(sorted(order[i:i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert order[:10] != order[10:20], "another order in every epoch"
    assert order[7:13] == sample_order(Ten(), 1, range(7, 13)), "any slice, also across epochs"
    assert order != sample_order(Ten(), 2, range(30))
    assert sample_order(Shapes(16), 1, range(5, 8)) == [5, 6, 7]


def test_folder_by_class(tmp_path):
    for name in ("cat", "dog"):
        for i in range(2):
            picture(tmp_path / name / f"{i}.png")
    dataset = load_dataset(str(tmp_path), 8)
    assert [dataset[i]["caption"] for i in range(4)] == ["cat", "cat", "dog", "dog"]
    assert dataset[0]["image"].shape == (3, 8, 8)
    assert dataset[0]["image"][:, 4, 4].tolist() == [200, 10, 10]


def test_folder_with_metadata(tmp_path):
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "2.png")
    lines = [dict(file_name="2.png", text="a second"), dict(file_name="a/1.png", text="a first")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = load_dataset(str(tmp_path), 8)
    assert [dataset[i]["caption"] for i in range(len(dataset))] == ["a second", "a first"]


def test_folder_with_text_beside(tmp_path):
    picture(tmp_path / "1.png")
    picture(tmp_path / "2.jpg")
    (tmp_path / "1.txt").write_text("a red field\n")
    dataset = load_dataset(str(tmp_path), 8)
    assert [dataset[i]["caption"] for i in range(2)] == ["a red field", ""]
    states = [dataset.state()]
    (tmp_path / "1.txt").write_text("a field\n")
    states.append(dataset.state())
    picture(tmp_path / "1.png", size=(40, 40))
    assert states[0] != states[1] != dataset.state(), "a caption's file, and a picture's, change the state"


def test_captions_alone(tmp_path, monkeypatch):
    """The prompts of a folder, each once, without reading a picture after the first."""
    for name in ("cat/0.png", "cat/1.png", "dog/2.png"):
        picture(tmp_path / name)
    dataset = load_dataset(str(tmp_path), 8)
    (tmp_path / "cat" / "0.txt").write_text("a big cat\n")
    worded = load_dataset(str(tmp_path), 8)
    monkeypatch.setattr(plumbing.data.Image, "open", None)
    assert dataset.all_captions() == ["cat", "dog"] and worded.all_captions() == ["", "a big cat"]


def test_pictures_without_a_caption_among_captioned_ones(tmp_path, monkeypatch, capsys):
    """Have an empty one, not their folder's name, and are counted once; another .txt is no caption."""
    for name in ("cat/0.png", "cat/1.png", "2.png"):
        picture(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("from the attic")
    captions = lambda dataset: [dataset[i]["caption"] for i in range(3)]
    dataset = load_dataset(str(tmp_path), 8)
    assert captions(dataset) == ["", "cat", "cat"] and dataset.classes == ["cat"]
    (tmp_path / "cat" / "0.txt").write_text("a big cat\n")
    monkeypatch.setenv("RANK", "1")
    load_dataset(str(tmp_path), 8)
    assert not capsys.readouterr().err, "the first process tells it"
    plumbing.data.tell_of_uncaptioned.cache_clear()
    monkeypatch.setenv("RANK", "0")
    datasets = [load_dataset(str(tmp_path), 8) for _ in range(2)]
    assert captions(datasets[0]) == ["", "a big cat", ""] and datasets[0].classes == []
    told = f"2 of 3 pictures of {tmp_path} have no .txt caption; theirs is empty\n"
    assert capsys.readouterr().err == told
    for name in ("cat/1.txt", "2.txt"):
        (tmp_path / name).write_text("a small cat")
    load_dataset(str(tmp_path), 8)
    assert not capsys.readouterr().err


def test_broken_picture_is_replaced_and_named(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", colour=(i * 50, 0, 0))
    (tmp_path / "1.png").write_bytes(b"not a picture")
    dataset = load_dataset(str(tmp_path), 8)
    sample = dataset[1]
    assert sample["skipped"] == [f"{tmp_path / '1.png'} (not a picture)"]
    assert sample["image"][0, 0, 0] == 100, "the next one takes its place"


def test_whatever_a_reader_raises_the_picture_is_skipped(tmp_path):
    """With the reason, which is the same each time; the last one's place takes the first."""
    picture(tmp_path / "0.png")
    picture(tmp_path / "1.tif")
    whole = (tmp_path / "1.tif").read_bytes()
    (tmp_path / "1.tif").write_bytes(whole.replace(b"\x11\1\4\0", b"\x11\1\x0b\0"))  # a place as a fraction
    (tmp_path / "2.png").mkdir()
    (tmp_path / "3.png").write_bytes((tmp_path / "0.png").read_bytes()[:-30])
    (tmp_path / "4.png").symlink_to(tmp_path / "absent")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(tmp_path / "5.png")
    whole = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[:300] + bytes(4) + whole[304:])
    dataset = load_dataset(str(tmp_path), 8)
    assert len(dataset) == 6
    *skipped, last = dataset[1]["skipped"]
    assert dataset[1]["image"][0, 0, 0] == 200 and dataset[1]["skipped"] == [*skipped, last]
    assert skipped == [f"{tmp_path / name} ({why})" for name, why in (
        ("1.tif", "'float' object cannot be interpreted as an integer"), ("2.png", "Is a directory"),
        ("3.png", "image file is truncated"), ("4.png", "No such file or directory"))]
    assert last.startswith(f"{tmp_path / '5.png'} (") and "data stream" in last
    state = dataset.state()
    picture(tmp_path / "absent.png")
    (tmp_path / "absent.png").rename(tmp_path / "absent")
    assert dataset.state() != state, "the file that a link leads to has appeared"
    assert reason(MemoryError()) == "MemoryError"


def saved(image, kind="PNG", **options):
    """A picture as the file of this kind."""
    image.save(file := io.BytesIO(), kind, **options)
    return file


def test_16_bit_gray_keeps_its_levels():
    levels = np.array([[0, 257 * 7], [257 * 99 + 129, 65535]], np.uint16)
    for kind in ("PNG", "TIFF", "PPM", "JPEG2000"):
        image = read_picture(saved(Image.fromarray(levels), kind), 2)
        assert image.tolist() == [[[0, 7], [100, 255]]] * 3, kind
    assert read_picture(saved(Image.fromarray(levels.astype(">u2")), "TIFF"), 2)[0, 1].tolist() == [100, 255]


def test_a_picture_without_a_known_range_is_named(tmp_path):
    for i, kind in enumerate((np.float32, np.int32)):
        Image.fromarray(np.eye(4, dtype=kind)).save(tmp_path / f"{i}.tif")
    with pytest.raises(UserError, match=r"none of its 2 pictures .* the first: .*0\.tif \(mode F has no"):
        load_dataset(str(tmp_path), 4)
    picture(tmp_path / "2.png")
    names = load_dataset(str(tmp_path), 4)[0]["skipped"]
    assert names == [f"{tmp_path}/{i}.tif (mode {mode} has no known range)" for i, mode in enumerate("FI")]


def test_what_is_transparent_is_white():
    """Not the colour that lies under it; half of it is half white; an opaque picture stays as it is."""
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 4), np.uint8)
    colours[..., 3] = 255
    opaque = read_picture(saved(Image.fromarray(colours)), 4)
    assert torch.equal(opaque, torch.from_numpy(colours[..., :3]).permute(2, 0, 1))
    for alpha, level in ((0, 255), (127, 155)):
        colours[:] = 55, 55, 55, alpha
        for image in (Image.fromarray(colours), Image.fromarray(colours).convert("LA")):
            for kind in ("PNG", "TIFF"):
                assert read_picture(saved(image, kind), 4).unique().tolist() == [level]
    palette = Image.new("P", (4, 4))
    palette.putpalette([9, 9, 9, 8, 8, 8])
    for image, kind, clear in ((palette, "PNG", 0), (palette, "GIF", 0), (palette, "PNG", b"\0\xff"),
                               (Image.new("RGB", (4, 4), (9, 9, 9)), "PNG", (9, 9, 9)),
                               (Image.new("L", (4, 4), 9), "PNG", 9)):
        assert read_picture(saved(image, kind), 4).unique().tolist() == [image.convert("L").getpixel((0, 0))]
        assert read_picture(saved(image, kind, transparency=clear), 4).unique().tolist() == [255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_lies_as_its_camera_says(kind):
    """The mark in the corner that EXIF's orientation, 1 to 8, says is the upper left one."""
    marked = np.zeros((8, 16, 3), np.uint8)
    marked[:4, 4:8] = 255  # after the crop to 8 x 8 that is the upper left quarter
    corners = [(0, 0), (0, 7), (7, 7), (7, 0), (0, 0), (0, 7), (7, 7), (7, 0)]
    for orientation, corner in enumerate(corners, 1):
        exif = Image.Exif()
        exif[274] = orientation
        image = read_picture(saved(Image.fromarray(marked), kind, exif=exif), 8)[0]
        bright = [(y, x) for y in (0, 7) for x in (0, 7) if image[y, x] > 128]
        assert bright == [corner], orientation
        white = Image.new("RGB", (16, 8), "white")
        assert read_picture(saved(white, kind, exif=exif), 4).min() > 250, "its own edges, when it is turned"


def test_a_picture_with_damaged_exif_data_is_read():
    file = saved(Image.new("RGB", (8, 8), (200, 10, 10)), "PNG", exif=b"Exif\0\0damaged")
    with pytest.raises(SyntaxError):
        Image.open(file).getexif()
    assert read_picture(file, 8)[:, 0, 0].tolist() == [200, 10, 10]


def test_a_strip_is_never_resized_whole(monkeypatch):
    """Its middle is; and nothing changes for a picture of ordinary shape."""
    sizes, resize = [], TF.resize

    def noted(*args, **kwargs):
        sizes.append((resized := resize(*args, **kwargs)).numel())
        return resized
    monkeypatch.setattr(plumbing.data.TF, "resize", noted)
    turned = Image.Exif()
    turned[274] = 6
    for shape, exif in (((10, 20000), None), ((20000, 10), None), ((20000, 10), turned)):
        pixels = np.zeros((*shape, 3), np.uint8)
        pixels[tuple(slice(n // 2 - 5, n // 2 + 5) for n in shape)] = 255
        image = read_picture(saved(Image.fromarray(pixels), exif=exif), 64)
        assert image.shape == (3, 64, 64) and image[0, 32].float().mean() > 240
        assert image[0, :, 32].float().mean() > 240 and sizes.pop() <= 3 * 4 * 64 * 64
    for shape in ((30, 30), (29, 116), (116, 29), (50, 33)):
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        whole = TF.center_crop(resize(torch.from_numpy(pixels).permute(2, 0, 1), 16, antialias=True), 16)
        assert torch.equal(read_picture(saved(Image.fromarray(pixels)), 16), whole)


def test_a_picture_of_absurd_size_is_named_before_it_is_decoded(tmp_path, monkeypatch):
    picture(tmp_path / "0.png", size=(9, 8))
    picture(tmp_path / "1.png", size=(8, 8))
    monkeypatch.setattr(plumbing.data, "MOST_PIXELS", 64)
    file = tmp_path / "0.png"
    file.write_bytes(file.read_bytes()[:60])  # of which the header is whole
    dataset = load_dataset(str(tmp_path), 8)
    assert dataset[0]["skipped"] == [f"{file} (9 x 8 pixels, more than 64)"] and dataset[1]["skipped"] == []


def test_folders_that_cannot_work(tmp_path):
    with pytest.raises(UserError, match="no pictures"):
        load_dataset(str(tmp_path), 8)
    (tmp_path / "1.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="none of its 1 pictures"):
        load_dataset(str(tmp_path), 8)
    with pytest.raises(UserError, match="shapes, cifar10"):
        load_dataset(str(tmp_path / "absent"), 8)
    (tmp_path / "metadata.jsonl").write_text("{oops\n")
    with pytest.raises(UserError, match="metadata.jsonl"):
        load_dataset(str(tmp_path), 8)


def test_cifar10_without_network(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", no_network)
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--dataset FOLDER"):
        load_dataset("cifar10", 32)


def write_shards(folder, kind):
    """Eight drawings with captions in two files, the fourth picture broken, or missing in parquet."""
    datasets = pytest.importorskip("datasets")
    dataset, rows = Shapes(16), []
    for i, sample in enumerate(dataset.__getitems__(range(8))):
        Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "PNG")
        rows.append((f"{i:04d}", file.getvalue() if i != 3 else b"broken", sample["caption"]))
    folder.mkdir()
    for n in range(2):
        part = rows[4 * n:4 * n + 4]
        if kind == "parquet":
            part = [(name, data if name != "0003" else None, caption) for name, data, caption in part]
        if kind == "tar":
            with tarfile.open(folder / f"{n}.tar", "w") as tar:
                for name, picture, caption in part:
                    for suffix, data in (("png", picture), ("txt", caption.encode())):
                        info = tarfile.TarInfo(f"{name}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        else:
            pictures = [picture and dict(bytes=picture, path=None) for _, picture, _ in part]
            captions = [caption for *_, caption in part]
            table = datasets.Dataset.from_dict(dict(image=pictures, caption=captions))
            for feature in (datasets.Image(decode=False), datasets.Image()):
                table = table.cast_column("image", feature)
            table.to_parquet(folder / f"{n}.parquet")
    return dataset


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_are_read_like_a_folder(tmp_path, kind, monkeypatch):
    """In the files' order, the broken picture skipped by name; without the library there is a plain line."""
    drawn = write_shards(tmp_path / "data", kind)
    dataset = load_dataset(str(tmp_path / "data"), 16)
    assert len(dataset) == 8 and not dataset.endless
    assert dataset.all_captions() == sorted({drawn[i]["caption"] for i in range(8)})
    for i in range(8):
        sample, expected = dataset[i], drawn[i if i != 3 else 4]
        assert torch.equal(sample["image"], expected["image"]) and sample["caption"] == expected["caption"]
        assert len(sample["skipped"]) == (i == 3)
    assert dataset[3]["skipped"] == [f"{tmp_path / 'data'}, sample 3 (not a picture)"]
    for file in (tmp_path / "data").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read|no pictures"):
        load_dataset(str(tmp_path / "data"), 16)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_dataset(str(tmp_path / "data"), 16)


def test_parquet_without_texts_and_with_one_that_is_not_utf_8(tmp_path):
    """No text is the empty one; a damaged one is skipped, and where all are wanted a line says so."""
    pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    drawn = write_shards(tmp_path / "data", "parquet")
    table = parquet.read_table(file := tmp_path / "data" / "0.parquet")
    (tmp_path / "data" / "1.parquet").unlink()
    captions = [drawn[i]["caption"] for i in range(2)]

    def dataset_with(first):
        texts = pyarrow.array([first, *(caption.encode() for caption in captions), None])
        validity, offsets, content = texts.buffers()
        texts = pyarrow.StringArray.from_buffers(4, offsets, content, validity)
        parquet.write_table(table.set_column(1, table.schema.field(1), texts), file)
        return load_dataset(str(tmp_path / "data"), 16)

    dataset = dataset_with(None)
    assert dataset[0]["caption"] == "" and dataset[1]["caption"] == captions[0]
    assert dataset.all_captions() == sorted({"", *captions})
    dataset = dataset_with(b"caf\xe9")
    assert dataset[0]["skipped"] == [f"{tmp_path / 'data'}, sample 0 (not UTF-8)"]
    assert dataset[0]["caption"] == captions[0]
    with pytest.raises(UserError, match="data: a text in the column caption cannot be read .not UTF-8"):
        dataset.all_captions()
    parquet.write_table(table.select(["image"]), file)
    dataset = load_dataset(str(tmp_path / "data"), 16)
    assert dataset[0]["caption"] == "" and dataset.all_captions() == [""]


def test_a_folder_of_drawn_pictures_is_completed(tmp_path, capsys):
    """Only missing pictures are drawn, in the same chunks; a folder of other ones, or of more, is refused."""
    folder, drawn = tmp_path / "data", []

    def draw(prompts, first):
        drawn.append((first, len(prompts)))
        return torch.linspace(-1, 1, 7)[first:first + len(prompts)].view(-1, 1, 1, 1).expand(-1, 3, 4, 4)

    artist = lambda: (["a", "b"], draw, 3)
    generate = lambda number, **made_by: generate_folder(folder, number, made_by, artist)
    assert generate(7, seed=1) == str(folder) and drawn == [(0, 3), (3, 3), (6, 1)]
    dataset = load_dataset(str(folder), 4)
    assert [dataset[i]["caption"] for i in range(7)] == list("abababa")
    assert [dataset[i]["image"][0, 0, 0].item() for i in (0, 3, 6)] == [0, 128, 255]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "00000004.txt").unlink()  # a picture without its caption may be half written
    drawn.clear()
    generate(7, seed=1)
    assert drawn == [(3, 3)] and before == {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="made with other flags"):
        generate(7, seed=2)
    with pytest.raises(UserError, match="--generate 5: .* holds 2 pictures more"):
        generate(5, seed=1)

    def missing():
        raise UserError("--generator absent: there is no such directory")
    with pytest.raises(UserError, match="absent"):
        generate_folder(tmp_path / "new", 7, {}, missing)
    assert not (tmp_path / "new").exists()
    generate_folder(folder, 7, dict(seed=1), missing)  # not called, for all are there


def test_drawn_pictures_that_cannot_be_written(tmp_path, monkeypatch):
    """One line says which; a disk that fills up leaves no half picture under a picture's name."""
    artist = lambda: (["a"], lambda prompts, first: torch.zeros(len(prompts), 3, 4, 4), 2)
    generate = lambda: generate_folder(tmp_path / "data", 2, {}, artist)
    (tmp_path / "data" / "00000001.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^\S*/00000001\.png: cannot be written \(Is a directory\); choose"):
        generate()
    (tmp_path / "data" / "00000001.png").rmdir()
    for name in ("png", "txt"):
        (tmp_path / "data" / f"00000000.{name}").unlink()

    def full(image, path, *args):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match=r"^\S*/00000000\.png: .*No space left on device"):
            generate()
    assert not list((tmp_path / "data").glob("*.png"))
    generate()
    assert sorted(path.name for path in (tmp_path / "data").glob("*.*g")) == ["00000000.png", "00000001.png"]


def test_a_grid_has_the_first_rank_only_and_names_its_flag(tmp_path, monkeypatch):
    pictures = torch.linspace(-2, 2, 9).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    save_grid(pictures, tmp_path / "new" / "grid.png")
    grid = Image.open(tmp_path / "new" / "grid.png")
    assert grid.size == (8 * 66 + 2, 2 * 66 + 2), "small pictures are enlarged, to 64 pixels"
    assert grid.getpixel((10, 10)) == (0, 0, 0) and grid.getpixel((10, 76)) == (255, 255, 255), "clamped"
    with pytest.raises(UserError, match="^--grid .*new: cannot be written"):
        save_grid(pictures, tmp_path / "new", flag="--grid")
    monkeypatch.setenv("RANK", "1")
    save_grid(pictures, tmp_path / "second.png")
    assert not (tmp_path / "second.png").exists()
