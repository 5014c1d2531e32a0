"""fasterrcnn_mask.py's annotations, layouts, augmentation and modes: boxes against pixels, what is mended, what refused."""
import contextlib
import io
import json
import re
import shutil

import fasterrcnn_mask as mask
import numpy as np
import pytest
import torch
from baselines import captured
from conftest import ROOT, litter
from PIL import Image
from torchvision.tv_tensors import BoundingBoxes

SMALL = "--device cpu --compile off --backbone resnet18 --weights none --image_size 64 --batch_size 2 --max_steps 1"


def voc(path, objects, size=(60, 40), before=""):
    """Writes an annotation of (name, xmin, ymin, xmax, ymax) tuples."""
    things = "".join(f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
                     "</bndbox><difficult>1</difficult></object>" for name, a, b, c, d in objects)
    shape = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}<annotation>{shape}{things}</annotation>")
    return path


@pytest.fixture
def folder(tmp_path):
    """24 annotated images of two classes, in Kaggle's layout."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / f"set/images/{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(40, 60, 3), dtype=np.uint8)).save(path)
        voc(tmp_path / f"set/annotations/{i:02}.xml", [("mask", 5, 5, 25, 30), ("none", 30, 10, 50, 35)][: 1 + i % 2])
    litter(tmp_path / "set", "00.png")
    litter(tmp_path / "set/annotations", "00.xml")
    return tmp_path / "set"


def original(item):
    """Its boxes in pixels of the original image."""
    return (item["boxes"] / item["scale"]).round(decimals=3).tolist()


def test_read_voc(tmp_path):
    truth = mask.read_voc(voc(tmp_path / "a.xml", [("mask", 1, 2, 3.5, 4), ("none", 9, 8, 7, 6)]))
    assert truth["boxes"].tolist() == [[1, 2, 3.5, 4], [9, 8, 7, 6]] and truth["labels"] == ["mask", "none"]
    negative = mask.read_voc(voc(tmp_path / "b.xml", [], None))
    assert negative["boxes"].shape == (0, 4) and negative["labels"] == [] and negative["size"] is None


BOMB = "<!DOCTYPE x [<!ENTITY a0 'ha'>" + "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 10)) + "]>"


@pytest.mark.parametrize("text", [
    "", "not xml", "<annotation><object>", "<html></html>", BOMB + "<annotation>&a9;</annotation>",
    '<?xml version="1.0" encoding="none-such"?><annotation/>', "<annotation><object><bndbox/></object></annotation>",
    "<annotation><object><name> </name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object>"
    "</annotation>", "<annotation><object><name>x</name></object></annotation>",
    "<annotation><object><name>x</name><bndbox><xmin>a</xmin></bndbox></object></annotation>"])
def test_malformed_annotations(text, tmp_path):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(mask.UserError, match="a.xml"):
        mask.read_voc(tmp_path / "a.xml")


def test_an_entity_bomb_in_utf16_is_refused(tmp_path):
    (tmp_path / "a.xml").write_bytes((BOMB + "<annotation>&a9;</annotation>").encode("utf-16"))
    with pytest.raises(mask.UserError, match="a.xml"):
        mask.read_voc(tmp_path / "a.xml")
    with pytest.raises(mask.UserError, match="not finite"):
        mask.read_voc(voc(tmp_path / "b.xml", [("x", 1, 2, "nan", 4)]))


def test_odd_items_of_a_folder(folder, call, refuses):
    """Boxes are clipped or dropped, what does not fit together is named, any kind of image is read."""
    voc(folder / "annotations/00.xml", [("mask", -5, 5, 70, 30), ("mask", 20, 20, 20, 30), ("mask", 30, 9, 20, 4)])
    voc(folder / "annotations/01.xml", [])
    Image.new("P", (60, 40)).save(folder / "images/02.png")
    Image.new("RGBA", (60, 40)).save(folder / "images/03.png")
    Image.new("L", (60, 40)).save(folder / "images/04.png")
    (folder / "images/06.png").rename(folder / "images/06.bmp")  # Pillow looks at the content
    Image.new("RGB", (60, 40)).save(folder / "images/extra.png")
    voc(folder / "annotations/lost.xml", [])
    data = mask.load_data(mask.Config(data=str(folder), image_size=64))
    items = {item["name"]: item for part in ("train", "val", "test") for item in data[part]}
    assert len(items) == 24 and data["classes"] == ["mask", "none"]
    assert original(items["00.png"]) == [[0, 5, 60, 30]] and items["01.png"]["boxes"].shape == (0, 4)
    assert all(item["image"].dtype == torch.uint8 and len(item["image"]) == 3 for item in items.values())
    status, out, err = call("fasterrcnn_mask", f"--data {folder} {SMALL}")
    assert status == 0, err
    for words in ("1 annotations or images are unreadable", "lost.xml", "extra.png", "1 annotations have boxes outside", "00.xml (2 dropped)"):
        assert words in out
    for i in (10, 11):
        path = folder / f"images/{i}.png"
        path.write_bytes(path.read_bytes()[:300])  # truncated
    refuses("fasterrcnn_mask", f"--data {folder} --out new {SMALL}", "3 of 25", "limit: 5 %")


def test_boxes_follow_the_frame_of_the_annotation(folder, capsys):
    """An image that EXIF data turn is upright; an annotation of the stored pixels contradicts it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: 60x40 as stored, 40x60 upright
    for name in ("00", "01"):
        (folder / f"images/{name}.png").unlink()
        Image.new("RGB", (60, 40)).save(folder / f"images/{name}.jpg", exif=exif)
    voc(folder / "annotations/00.xml", [("mask", 5, 5, 35, 55)], (40, 60))
    voc(folder / "annotations/01.xml", [("mask", 5, 5, 55, 35)], (60, 40))
    data = mask.load_data(mask.Config(data=str(folder), image_size=60))
    items = {item["name"]: item for part in ("train", "val", "test") for item in data[part]}
    assert items["00.jpg"]["size"] == (40, 60) and original(items["00.jpg"]) == [[5, 5, 35, 55]]
    assert len(items) == 23 and "01.jpg" not in items
    out = capsys.readouterr().out
    assert "1 annotations or images are unreadable" in out and "01.xml: made for (60, 40) pixels" in out


def test_split_is_stratified_and_stable():
    items = [{"name": f"image{i}", "labels": ["common"] + ["rare"] * (i % 10 == 0)} for i in range(200)]

    def numbers(items, seed):
        return {split: sorted(int(item["name"][5:]) for item in part) for split, part in mask.divide(items, seed).items()}
    parts = numbers(items, 0)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [140, 30, 30]
    assert [sum(i % 10 == 0 for i in parts[name]) for name in ("train", "val", "test")] == [14, 3, 3]
    assert parts["test"][:6] == PINNED  # the same on every machine
    assert numbers(items[::-1], 0) == parts != numbers(items, 1)


PINNED = [3, 10, 20, 22, 43, 44]


def augmented(image, boxes, strength):
    boxes = BoundingBoxes(torch.tensor(boxes), format="XYXY", canvas_size=image.shape[1:])
    x, target = mask.augmentation(strength)(image, {"boxes": boxes, "labels": torch.arange(len(boxes))})
    return x, target["boxes"], target["labels"]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_boxes_follow_every_augmentation(strength, monkeypatch):
    """A white rectangle on black: its pixels are found where its box comes to lie."""
    monkeypatch.setattr(mask.v2, "ColorJitter", lambda *ranges: mask.v2.Identity())
    seen = 0
    for seed in range(120):
        torch.manual_seed(seed)
        height, width = [(64, 96), (90, 60), (50, 50)][seed % 3]
        x, y = int(torch.randint(8, width - 30, ())), int(torch.randint(8, height - 28, ()))
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, y : y + 20, x : x + 14] = 255
        out, boxes, labels = augmented(image, [[x, y, x + 14.0, y + 20.0]], strength)
        assert out.dtype == torch.float and out.shape == image.shape and 0 <= out.min() and out.max() <= 1
        assert len(boxes) == len(labels)
        if not len(boxes):
            assert strength == 1  # it has left the image
            continue
        rows, columns = torch.where(out.mean(0) > 0.75)
        true = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (boxes[0] - true).abs().max() < 1.6, (seed, boxes, true)
        seen += 1
        if strength == 0:
            assert boxes.tolist() == [[x, y, x + 14, y + 20]] and torch.equal(out, image / 255)
    assert seen > 90


def test_flips_happen():
    image, left = torch.zeros(3, 64, 64, dtype=torch.uint8), {0.01: 0, 1.0: 0}
    torch.manual_seed(0)
    for strength in left:
        for _ in range(64):
            _, boxes, _ = augmented(image, [[4.0, 8, 14, 18]], strength)
            left[strength] += len(boxes) == 0 or float(boxes[0, 0]) < 32
    assert left[0.01] == 64 and 10 < left[1.0] < 54  # a strength of 1 % flips hardly ever
    _, boxes, labels = augmented(image, np.zeros((0, 4)), 1.0)  # an image without faces
    assert boxes.shape == (0, 4) and len(labels) == 0


def test_names_are_no_formulas_in_the_pictures(tmp_path):
    boxes = torch.tensor([[2.0, 2.0, 20.0, 20.0]])
    item = {"image": torch.zeros(3, 32, 32, dtype=torch.uint8), "name": "sale_$10_$20.jpg", "boxes": boxes,
            "labels": torch.tensor([1])}
    found = {"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    mask.draw_examples([item], [found], ["a $b$ _$"], 0.5, tmp_path)
    assert (tmp_path / "examples.png").exists()


def test_batches_hold_every_image_beside_others_of_its_shape():
    ratios = [[0.5, 1, 2][i % 3] for i in range(33)]
    batches = mask.arrange(ratios, 4, 0)
    assert batches.shape == (8, 4) and len(set(batches.flatten().tolist())) == 32
    assert np.array_equal(batches, mask.arrange(ratios, 4, 0)) and not np.array_equal(batches, mask.arrange(ratios, 4, 1))
    assert sum(len({ratios[i] for i in batch}) == 1 for batch in batches) >= 5


def test_training_sees_each_box_where_it_is(folder, tmp_path):
    """On images of another size, without augmentation."""
    flags = f"--data {folder} {SMALL} --out {tmp_path / 'run'} --image_size 120 --augment 0"
    box = captured("fasterrcnn_mask", flags.split())[1]
    seen = set()
    for step in range(1, 9):
        images, targets = box["fetch"](step)
        seen |= {tuple(row) for target in targets for row in target["boxes"].tolist()}
        assert all(image.shape == (3, 80, 120) for image in images)
    assert seen == {(10, 10, 50, 60), (60, 20, 100, 70)}


@pytest.fixture
def trained(folder, call):
    assert call("fasterrcnn_mask", f"--data {folder} {SMALL} --out run")[0] == 0
    return folder


def test_modes_on_a_voc_folder(trained, call, refuses, tmp_path):
    data = mask.load_data(mask.Config(data=str(trained), image_size=64))
    lists = {split: {item["name"] for item in data[split]} for split in ("train", "val", "test")}
    assert [len(names) for names in lists.values()] == [16, 4, 4] and len(set.union(*lists.values())) == 24
    status, out, err = call("fasterrcnn_mask", "eval --ckpt run/best.pt --save scores --threshold 0.001")
    assert status == 0 and "map50" in out and "warning" not in out, err
    truth, found = (json.load(open(f"scores/{name}.json")) for name in ("truth", "detections"))
    assert {i["file_name"] for i in truth["images"]} == lists["test"]
    boxes = {row["image_id"]: row["bbox"] for row in truth["annotations"]}
    assert all(np.round(box, 3).tolist() in ([5, 5, 20, 25], [30, 10, 20, 25]) for box in boxes.values())  # the original's
    coco = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(coco.COCO("scores/truth.json").loadRes(found).anns) == len(found) > 0

    (trained / "images/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(trained / "images/turned.jpg", exif=exif)
    shutil.copy(trained / "images/00.png", "one.png")
    status, out, err = call("fasterrcnn_mask", f"detect {trained}/images one.png --ckpt run/best.pt --save found --threshold 0.001")
    assert status == 0 and "broken.png is unreadable" in out and "images: 26 of 27" in out, err
    assert Image.open("found/00-boxes.png").size == Image.open("found/one-boxes.png").size == (1000, 667)
    assert Image.open("found/turned-boxes.png").size == (667, 1000)
    pictures = json.load(open("found/boxes.json"))
    rows = [row for picture in pictures for row in picture["boxes"]]
    assert len(pictures) == 26 and all((tmp_path / "found" / picture["picture"]).exists() for picture in pictures)
    assert rows and {row["class"] for row in rows} <= {"mask", "none"} and all(len(row["box"]) == 4 for row in rows)
    assert all(0 <= x1 < x2 <= 60.001 and 0 <= y1 < y2 <= 60.001 for x1, y1, x2, y2 in (row["box"] for row in rows))
    before = (trained / "images/00.png").read_bytes()  # no picture goes over an input, nor over another picture
    (trained / "images/00-boxes.png").write_bytes(before)
    refuses("fasterrcnn_mask", f"detect {trained}/images/00.png {trained}/images/00-boxes.png --ckpt run/best.pt "
                               f"--save {trained}/images", "00-boxes.png", "--save")
    assert (trained / "images/00.png").read_bytes() == (trained / "images/00-boxes.png").read_bytes() == before
    (tmp_path / "other").mkdir()
    shutil.copy("one.png", "other/one.png")
    refuses("fasterrcnn_mask", "detect one.png other --ckpt run/best.pt --save new", "one-boxes.png", "two inputs")
    assert not list((tmp_path / "new").iterdir())
    refuses("fasterrcnn_mask", f"detect {trained}/images/broken.png --ckpt run/best.pt", "no readable image")
    refuses("fasterrcnn_mask", "detect nowhere.png --ckpt run/best.pt", "nowhere.png")
    refuses("fasterrcnn_mask", "detect --ckpt run/best.pt", "IMAGE")


def test_classes(trained, call, refuses):
    voc(trained / "annotations/00.xml", [], size=(30, 20))  # drawn on a smaller copy
    assert "00.xml: made for (30, 20)" in call("fasterrcnn_mask", f"--data {trained} {SMALL} --out other")[1]
    path = voc(trained / "annotations/00.xml", [("helmet", 5, 5, 25, 30)])
    refuses("fasterrcnn_mask", "eval --ckpt run/best.pt", str(path), "helmet", "mask, none")
    refuses("fasterrcnn_mask", f"--data {trained} {SMALL} --out run --resume", "helmet", "start a new run")
    status, out, err = call("fasterrcnn_mask", f"--data {trained} {SMALL} --init run/best.pt --out more")
    assert status == 0 and "others do not fit" in out, err  # a head of another size
    taken, of = map(int, re.search(r"init: (\d+) of (\d+) tensors", out).groups())
    assert taken == of - 4  # weights and biases of the classes and of their boxes


def test_bad_input(tmp_path, refuses, folder):
    (tmp_path / "empty").mkdir()
    refuses("fasterrcnn_mask", f"--data empty {SMALL}", "empty", "no annotations")
    refuses("fasterrcnn_mask", "--data demo --backbone vgg", "vgg", "resnet18")
    refuses("fasterrcnn_mask", "--data demo --backbone resnet50_v2", "resnet50_v2", "--weights none", "resnet18")
    refuses("fasterrcnn_mask", "--data demo --backbone resnet18 --weights coco", "resnet18", "COCO weights are for resnet50_v2")
    path = voc(folder / "more/07.xml", [])
    refuses("fasterrcnn_mask", f"--data {folder} {SMALL}", "twice", "07.xml")
    path.unlink()
    shutil.copy(folder / "images/08.png", folder / "08.bmp")  # such as VOC's masks, or the pictures that `detect` drew
    refuses("fasterrcnn_mask", f"--data {folder} {SMALL}", "twice", "08.bmp", "08.png")
    (folder / "08.bmp").unlink()
    for i in range(24):
        voc(folder / f"annotations/{i:02}.xml", [])
    refuses("fasterrcnn_mask", f"--data {folder} {SMALL}", "24 images of 0 classes", "objects in them")


# ------------------------------------------------------------------------------- what labelling tools export
def scene(image, annotation, label="helmet", boxes=((5, 5, 25, 30),), size=(60, 40)):
    """An image of one colour and its annotation."""
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), (len(image.name), 90, 10)).save(image)
    voc(annotation, [(label, *box) for box in boxes], size)


def names_of(folder):
    data = mask.load_data(mask.Config(data=str(folder), image_size=64))
    return data, {split: sorted(item["name"] for item in data[split]) for split in ("train", "val", "test")}


@pytest.mark.parametrize("images, annotations, val", [
    ("{}", "{}", "valid"), ("{}/images", "{}/annotations", "val"), ("images/{}", "annotations/{}", "validation")])
def test_given_splits(images, annotations, val, tmp_path, capsys):
    """Roboflow's layout, and images and annotations in folders of their own; a name is in every split."""
    for split, count in (("Train", 6), (val, 2), ("test", 3)):
        for i in range(count):
            scene(tmp_path / images.format(split) / f"{i}.rf.0a.jpg", tmp_path / annotations.format(split) / f"{i}.rf.0a.xml",
                  boxes=[(5, 5, 25 + count, 30)])
    scene(tmp_path / "other/9.jpg", tmp_path / "other/9.xml")
    data, names = names_of(tmp_path)
    assert {split: len(found) for split, found in names.items()} == {"train": 6, "val": 2, "test": 3}
    for split, count in (("train", 6), ("val", 2), ("test", 3)):  # each with the annotation of its own split
        assert {original(item)[0][2] for item in data[split]} == {25 + count}
    assert "in none, and not used: 1" in capsys.readouterr().out


def test_splits_that_are_missing(tmp_path):
    for i in range(20):
        scene(tmp_path / f"train/{i}.jpg", tmp_path / f"train/{i}.xml")
    for i in range(3):
        scene(tmp_path / f"test/{i}.jpg", tmp_path / f"test/{i}.xml")
    data, names = names_of(tmp_path)
    assert [len(names[split]) for split in ("train", "val", "test")] == [17, 3, 3]
    assert not set(names["train"]) & set(names["val"])
    shutil.move(tmp_path / "test", tmp_path / "val")
    data, names = names_of(tmp_path)
    assert [len(names[split]) for split in ("train", "val", "test")] == [20, 3, 3] and names["test"] == names["val"]
    shutil.move(tmp_path / "val", tmp_path / "photos")  # train alone is divided, what is beside it left out
    data, names = names_of(tmp_path)
    assert [len(names[split]) for split in ("train", "val", "test")] == [14, 3, 3]
    shutil.move(tmp_path / "photos", tmp_path / "val")
    shutil.move(tmp_path / "train", tmp_path / "photos")  # no training set: all are divided
    for path in (tmp_path / "val").iterdir():
        path.rename(path.with_stem(f"v{path.stem}"))
    assert sum(map(len, names_of(tmp_path)[1].values())) == 23


def test_voc_lists(tmp_path):
    """VOC's own layout; its segmentations have the names of the images, its lists of classes are no splits."""
    for i in range(9):
        scene(tmp_path / f"VOC2012/JPEGImages/2008_{i}.jpg", tmp_path / f"VOC2012/Annotations/2008_{i}.xml")
        scene(tmp_path / f"VOC2012/SegmentationClass/2008_{i}.png", tmp_path / f"VOC2012/Annotations/2008_{i}.xml")
    lists = tmp_path / "VOC2012/ImageSets/Main"
    lists.mkdir(parents=True)
    for name, numbers in (("train", range(5)), ("Val", (5, 6)), ("test", (7,)), ("trainval", range(7)), ("helmet_train", [8])):
        (lists / f"{name}.txt").write_text("".join(f"2008_{i}  1\n" for i in numbers))
    names = names_of(tmp_path)[1]
    assert names == {"train": [f"2008_{i}.jpg" for i in range(5)], "val": ["2008_5.jpg", "2008_6.jpg"], "test": ["2008_7.jpg"]}
    for name, numbers in (("trainval", range(9)), ("test", (7, 8))):  # Windows' and others' forms; one name in two lists
        (lists / f"{name}.txt").write_text("\ufeff" + "".join(f'"JPEGImages/2008_{i}.JPG"  1\r\n' for i in numbers), "utf-8")
    for name in ("train", "Val"):
        (lists / f"{name}.txt").unlink()
    names = names_of(tmp_path)[1]
    assert names["test"] == ["2008_7.jpg", "2008_8.jpg"] and len(names["train"]) + len(names["val"]) == 7
    for path in lists.iterdir():
        path.unlink()
    (lists / "default.txt").write_text("2008_0\n")  # CVAT without subsets
    assert sum(map(len, names_of(tmp_path)[1].values())) == 9


def test_other_coordinates_and_forms(tmp_path, refuses):
    for i in range(12):
        scene(tmp_path / f"set/{i}.jpg", tmp_path / f"set/{i}.xml", boxes=[(0.1, 0.2, 0.5, 0.9), (0, 0.5, 1, 1)])
    refuses("fasterrcnn_mask", f"--data set {SMALL}", "set", "relative (0 to 1)", "0.xml", "pixels")
    for i in range(12):
        scene(tmp_path / f"set/{i}.jpg", tmp_path / f"set/{i}.xml", boxes=[(10, 10, 11, 20), (10, 10, 11.5, 11.9), (1, 1, 9, 9)])
    refuses("fasterrcnn_mask", f"--data set {SMALL}", "smaller than 2 pixels")
    for i in range(12):
        (tmp_path / f"set/{i}.xml").unlink()
        (tmp_path / f"set/{i}.txt").write_text("0 0.5 0.5 0.1 0.2\n")
    refuses("fasterrcnn_mask", f"--data set {SMALL}", "no annotations NAME.xml", "0.txt", "YOLO", "Pascal VOC")
    (tmp_path / "coco/train").mkdir(parents=True)
    (tmp_path / "coco/train/_annotations.coco.json").write_text("{}")
    refuses("fasterrcnn_mask", f"--data coco {SMALL}", "_annotations.coco.json", "COCO", "Pascal VOC")


def test_demo_is_the_same_each_time_and_has_all_kinds():
    data = [list(mask.demo_scenes(40)) for _ in range(2)]
    for (image, boxes, labels), (other, same, names) in zip(*data):
        assert image.tobytes() == other.tobytes() and torch.equal(boxes, same) and labels == names
        assert image.size == (128, 128) and boxes.min() >= 0 and boxes.max() <= 128 and len(boxes) == len(labels) > 0
    assert {name for _, _, labels in data[0] for name in labels} == {"with_mask", "without_mask", "mask_weared_incorrect"}


# --------------------------------------------------------------------------------------------- real data
def test_real_face_mask_detection():
    real = ROOT / "data" / "face-mask-detection"
    if not (real / "annotations").exists():
        pytest.skip("data/face-mask-detection is not there")
    truth = [mask.read_voc(path) for path in sorted((real / "annotations").glob("*.xml"))]
    names = {label for part in truth for label in part["labels"]}
    assert len(truth) > 700 and names == {"with_mask", "without_mask", "mask_weared_incorrect"}
