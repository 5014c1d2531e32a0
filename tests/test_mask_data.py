"""fasterrcnn_mask.py's annotations, augmentation and modes: boxes against pixels, what is mended and what refused."""
import contextlib
import io
import json
import shutil

import fasterrcnn_mask as mask
import numpy as np
import pytest
import torch
from conftest import ROOT, litter
from PIL import Image

SMALL = "--device cpu --compile off --backbone mobilenet --weights none --image_size 64 --batch_size 2 --max_steps 1"


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


def test_read_voc(tmp_path):
    truth = mask.read_voc(voc(tmp_path / "a.xml", [("mask", 1, 2, 3.5, 4), ("none", 9, 8, 7, 6)]))
    assert truth["boxes"].tolist() == [[1, 2, 3.5, 4], [9, 8, 7, 6]] and truth["labels"] == ["mask", "none"]
    negative = mask.read_voc(voc(tmp_path / "b.xml", [], None))
    assert negative["boxes"].shape == (0, 4) and negative["labels"] == [] and negative["size"] is None


BOMB = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'


@pytest.mark.parametrize("text", [
    "", "not xml", "<annotation><object>", "<html></html>", BOMB + "<annotation>&b;</annotation>",
    '<?xml version="1.0" encoding="none-such"?><annotation/>', "<annotation><object><bndbox/></object></annotation>",
    "<annotation><object><name> </name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object>"
    "</annotation>", "<annotation><object><name>x</name></object></annotation>",
    "<annotation><object><name>x</name><bndbox><xmin>a</xmin></bndbox></object></annotation>"])
def test_malformed_annotations(text, tmp_path):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(mask.UserError, match="a.xml"):
        mask.read_voc(tmp_path / "a.xml")


def test_an_entity_bomb_in_utf16_is_refused(tmp_path):
    (tmp_path / "a.xml").write_bytes((BOMB + "<annotation>&b;</annotation>").encode("utf-16"))
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
    Image.fromarray(np.full((40, 60), 30000, np.uint16)).save(folder / "images/05.png")
    (folder / "images/06.png").rename(folder / "images/06.bmp")  # Pillow looks at the content
    Image.new("RGB", (60, 40)).save(folder / "images/extra.png")
    voc(folder / "annotations/lost.xml", [])
    data = mask.load_data(mask.Config(data=str(folder), image_size=64))
    items = {item["name"]: item for part in ("train", "val", "test") for item in data[part]}
    assert len(items) == 24 and data["classes"] == ["mask", "none"]
    assert items["00.png"]["boxes"].tolist() == [[0, 5, 60, 30]] and items["01.png"]["boxes"].shape == (0, 4)
    assert all(item["image"].dtype == torch.uint8 and len(item["image"]) == 3 for item in items.values())
    status, out, err = call("fasterrcnn_mask", f"--data {folder} {SMALL}")
    assert status == 0, err
    for words in ("1 annotations or images are unreadable", "lost.xml", "extra.png", "00.xml (2 dropped)"):
        assert words in out
    for i in (10, 11):
        path = folder / f"images/{i}.png"
        path.write_bytes(path.read_bytes()[:300])  # truncated
    refuses("fasterrcnn_mask", f"--data {folder} --out new {SMALL}", "3 of 25", "limit: 5 %")


def test_boxes_follow_the_frame_of_the_annotation(folder):
    """An image that EXIF data turn is upright, unless the annotation's size is that of the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: 60x40 as stored, 40x60 upright
    for name in ("00", "01"):
        (folder / f"images/{name}.png").unlink()
        Image.new("RGB", (60, 40)).save(folder / f"images/{name}.jpg", exif=exif)
    voc(folder / "annotations/00.xml", [("mask", 5, 5, 35, 55)], (40, 60))
    voc(folder / "annotations/01.xml", [("mask", 5, 5, 55, 35)], (60, 40))
    data = mask.load_data(mask.Config(data=str(folder), image_size=60))
    items = {item["name"]: item for part in ("train", "val", "test") for item in data[part]}
    assert items["00.jpg"]["size"] == (40, 60) and items["00.jpg"]["boxes"].tolist() == [[5, 5, 35, 55]]
    assert items["01.jpg"]["size"] == (60, 40) and items["01.jpg"]["boxes"].tolist() == [[5, 5, 55, 35]]


def test_split_is_stratified_and_stable():
    kinds = {f"image{i}": ["common"] + ["rare"] * (i % 10 == 0) for i in range(200)}
    parts = mask.divide(kinds, 0)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [140, 30, 30]
    assert [sum(i % 10 == 0 for i in parts[name]) for name in ("train", "val", "test")] == [14, 3, 3]
    assert parts["test"][:6] == PINNED  # the same on every machine
    names = list(kinds)
    turned = mask.divide({name: kinds[name] for name in names[::-1]}, 0)
    assert {names[::-1][i] for i in turned["test"]} == {names[i] for i in parts["test"]}
    assert mask.divide(kinds, 1) != parts


PINNED = [3, 10, 20, 22, 43, 44]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_boxes_follow_every_augmentation(strength, monkeypatch):
    """A white rectangle on black: its pixels are found where its box comes to lie."""
    plain, flipped, seen = torch.rand, 0, 0

    def rand(*shape):
        draws = plain(*shape)
        draws[:, 4:] = 0.5  # no change of colour
        return draws
    monkeypatch.setattr(torch, "rand", rand)
    for seed in range(40):
        torch.manual_seed(seed)
        sizes, images, boxes = [(64, 96), (90, 60), (50, 50)], [], []
        for height, width in sizes:
            x, y = int(torch.randint(8, width - 30, ())), int(torch.randint(8, height - 28, ()))
            image = torch.zeros(3, height, width, dtype=torch.uint8)
            image[:, y : y + 20, x : x + 14] = 255
            images, boxes = [*images, image], [*boxes, torch.tensor([[x, y, x + 14.0, y + 20.0]])]
        labels = [torch.tensor([1])] * 3
        out, new_boxes, new_labels = mask.augment(images, boxes, labels, strength, torch.device("cpu"))
        assert out.shape[2] % 32 == out.shape[3] % 32 == 0
        for x, box, label, old in zip(out, new_boxes, new_labels, boxes):
            assert len(box) == len(label)
            if not len(box):
                assert strength == 1  # it has left the image
                continue
            rows, columns = torch.where(x.mean(0) > 0.75)
            true = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box[0] - true).abs().max() < 1.6, (seed, box, true)
            seen += 1
            if strength == 0:
                assert torch.equal(box, old)
    assert seen > 90


def test_flips_happen():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    torch.manual_seed(0)
    _, boxes, _ = mask.augment([image] * 64, [torch.tensor([[4.0, 8, 14, 18]])] * 64, [torch.tensor([1])] * 64, 0.01,
                               torch.device("cpu"))
    left = sum(float(box[0, 0]) < 32 for box in boxes)
    assert left == 64  # a strength of 1 % flips hardly ever, and moves hardly anything
    _, boxes, _ = mask.augment([image] * 64, [torch.tensor([[4.0, 8, 14, 18]])] * 64, [torch.tensor([1])] * 64, 1.0,
                               torch.device("cpu"))
    assert 10 < sum(len(box) and float(box[0, 0]) > 32 for box in boxes) < 54


def test_a_single_class_is_not_rare():
    items = [{"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "labels": torch.tensor([1])} for _ in range(5)]
    assert len(mask.Batches(items, 2, 2, 1.0, "cpu").places) == 5


def test_names_are_no_formulas_in_the_pictures(tmp_path):
    boxes = torch.tensor([[2.0, 2.0, 20.0, 20.0]])
    item = {"image": torch.zeros(3, 32, 32, dtype=torch.uint8), "name": "sale_$10_$20.jpg", "boxes": boxes, "scale": 1.0,
            "labels": torch.tensor([1])}
    mask.draw([item], [{"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}], ["a $b$ _$"], 0.5, tmp_path)
    assert (tmp_path / "examples.png").exists() and (tmp_path / "pr.png").exists()


def test_batches_hold_every_image_and_oversample_the_rare():
    items = [{"image": torch.zeros(3, 20 + i % 3 * 20, 40, dtype=torch.uint8), "boxes": torch.zeros(1, 4),
              "labels": torch.tensor([2 if i < 4 else 1]), "scale": torch.ones(4)} for i in range(32)]
    batches = mask.Batches(items, 4, 3, 1.0, "cpu")
    order = batches.order(0, 0)
    assert order.shape == (10, 4) and np.bincount(order.flatten(), minlength=32).tolist() == [3] * 4 + [1] * 28
    assert not np.array_equal(order, batches.order(0, 1)) and np.array_equal(order, mask.Batches(
        items, 4, 3, 1.0, "cpu").order(0, 0))
    ratios = [{items[i]["image"].shape[1] for i in batch} for batch in order]
    assert sum(len(r) == 1 for r in ratios) >= 6


@pytest.fixture
def trained(folder, call):
    assert call("fasterrcnn_mask", f"--data {folder} {SMALL} --out run")[0] == 0
    return folder


def test_modes_on_a_voc_folder(trained, call, refuses):
    lists = json.load(open("run/split.json"))
    assert [len(lists[name]) for name in ("train", "val", "test")] == [16, 4, 4] and sum(map(len, lists.values())) == 24
    status, out, err = call("fasterrcnn_mask", "eval --ckpt run/best.pt --save scores --threshold 0.001")
    assert status == 0 and "map50" in out, err
    truth, found = (json.load(open(f"scores/{name}.json")) for name in ("truth", "detections"))
    assert {i["file_name"] for i in truth["images"]} == set(lists["test"])
    coco = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(coco.COCO("scores/truth.json").loadRes(found).anns) == len(found) > 0

    (trained / "images/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(trained / "images/turned.jpg", exif=exif)
    status, out, err = call("fasterrcnn_mask", f"detect {trained}/images {trained}/images/00.png --ckpt run/best.pt "
                                               "--save found --json --threshold 0.001")
    assert status == 0 and "1 of 27 images are unreadable" in out and "broken.png" in out and "images: 26" in out, err
    assert Image.open("found/00.png").size == (780, 520) and Image.open("found/00-2.png").size == (780, 520)
    assert Image.open("found/turned.png").size == (520, 780)
    rows = json.load(open("found/boxes.json"))
    assert rows and {row["class"] for row in rows} <= {"mask", "none"} and all(len(row["box"]) == 4 for row in rows)
    before = (trained / "images/00.png").read_bytes()  # the pictures never go over the images themselves
    status, out, err = call("fasterrcnn_mask", f"detect {trained}/images/00.png --ckpt run/best.pt --save {trained}/images")
    assert status == 0 and (trained / "images/00.png").read_bytes() == before and (trained / "images/00-2.png").exists(), err
    refuses("fasterrcnn_mask", f"detect {trained}/images/broken.png --ckpt run/best.pt", "no readable image")
    refuses("fasterrcnn_mask", "detect nowhere.png --ckpt run/best.pt", "nowhere.png")
    refuses("fasterrcnn_mask", "detect --ckpt run/best.pt", "IMAGE")


def test_classes(trained, call, refuses):
    (trained / "images/23.png").rename(trained / "images/23.bmp")
    refuses("fasterrcnn_mask", f"--data {trained} {SMALL} --out run --resume", "split.json", "start anew")
    (trained / "images/23.bmp").rename(trained / "images/23.png")
    voc(trained / "annotations/00.xml", [], size=(30, 20))  # drawn on a smaller copy
    assert "made for (30, 20)" in call("fasterrcnn_mask", f"--data {trained} {SMALL} --out other")[1]
    path = voc(trained / "annotations/00.xml", [("helmet", 5, 5, 25, 30)])
    refuses("fasterrcnn_mask", f"--data {trained} {SMALL} --classes mask,none", str(path), "helmet", "--classes")
    refuses("fasterrcnn_mask", "eval --ckpt run/best.pt", str(path), "helmet")
    refuses("fasterrcnn_mask", f"--data {trained} {SMALL} --out run --resume", "helmet", "start anew")
    refuses("fasterrcnn_mask", f"--data {trained} {SMALL} --init run/best.pt --out no --backbone resnet50", "--backbone resnet50")
    status, out, err = call("fasterrcnn_mask", f"--data {trained} {SMALL} --init run/best.pt --out more")
    assert status == 0 and "not taken from run/best.pt" in out and "cls_score" in out, err  # heads of another size


def test_bad_input(tmp_path, refuses, folder):
    (tmp_path / "empty").mkdir()
    refuses("fasterrcnn_mask", f"--data empty {SMALL}", "empty", "no annotations")
    refuses("fasterrcnn_mask", "--data demo --backbone vgg", "vgg", "mobilenet")
    path = voc(folder / "more/07.xml", [])
    refuses("fasterrcnn_mask", f"--data {folder} {SMALL}", "twice", "07.xml")
    path.unlink()
    shutil.copy(folder / "images/08.png", folder / "08.bmp")  # such as VOC's masks, or the pictures that `detect` drew
    refuses("fasterrcnn_mask", f"--data {folder} {SMALL}", "twice", "08.bmp", "08.png")
    (folder / "08.bmp").unlink()
    for i in range(24):
        voc(folder / f"annotations/{i:02}.xml", [])
    refuses("fasterrcnn_mask", f"--data {folder} {SMALL}", "24 images, 0 classes")


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
