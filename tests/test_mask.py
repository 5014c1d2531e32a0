"""fasterrcnn_mask.py against pycocotools, pixels and torchvision's own detectors."""
import contextlib
import io
import json
import shutil
import urllib.error

import fasterrcnn_mask as mask
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

SMALL = "--device cpu --compile off --backbone mobilenet --weights none --image_size 64 --batch_size 2 --max_steps 1"


# ----------------------------------------------------------------------------------------------- metrics
def pycoco(predictions, targets, labels):
    """COCO's figures by pycocotools, from the same lists."""
    coco_module, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    truth, rows = [], []
    for number, (found, true) in enumerate(zip(predictions, targets), 1):
        for part, into in ((true, truth), (found, rows)):
            for i, (x1, y1, x2, y2) in enumerate(part["boxes"].double().tolist()):
                row = {"image_id": number, "category_id": int(part["labels"][i]), "bbox": [x1, y1, x2 - x1, y2 - y1],
                       "area": (x2 - x1) * (y2 - y1), "id": len(into) + 1, "iscrowd": 0}
                if part is true:
                    row["iscrowd"] = int(part.get("iscrowd", torch.zeros(len(part["boxes"])))[i])
                else:
                    row["score"] = float(part["scores"][i])
                into.append(row)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO()
        coco.dataset = {"images": [{"id": i} for i in range(1, len(targets) + 1)], "annotations": truth,
                        "categories": [{"id": i} for i in labels]}
        coco.createIndex()
        run = evaluation.COCOeval(coco, coco.loadRes(rows) if rows else coco_module.COCO(), "bbox")
        run.params.imgIds, run.params.catIds = [i + 1 for i in range(len(targets))], labels
        run.evaluate()
        run.accumulate()
        run.summarize()
    precision = run.eval["precision"][:, :, :, 0, 2]  # (T, R, K) of all areas, 100 boxes
    per_class = [[p[p > -1].mean() if (p > -1).any() else -1 for p in (precision[..., k], precision[0, :, k])]
                 for k in range(len(labels))]
    return {"map": run.stats[0], "map50": run.stats[1], "map75": run.stats[2], "mar100": run.stats[8]}, per_class


def random_case(seed):
    """Images with true boxes and detections near them; by turns ties, crowds, none of the one or of the other."""
    g = np.random.default_rng(seed)
    predictions, targets = [], []
    for _ in range(g.integers(1, 6)):
        n = g.integers(0, 9) if seed % 7 else 0
        corner, side = g.uniform(0, 60, (n, 2)), g.uniform(2, 40, (n, 2))
        if seed % 3 == 0:  # whole pixels: equal IoUs, also exactly at a threshold
            corner, side = corner.round() // 8 * 8, side.round() // 8 * 8 + 8
        boxes = np.concatenate([corner, corner + side], 1).astype(np.float32)
        labels = g.integers(1, 4, n)
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        if seed % 2:
            target["iscrowd"] = torch.from_numpy(g.integers(0, 4, n) == 0).long()
        m = g.integers(0, 150 if seed % 20 == 1 else 14) if seed % 11 else 0
        source = g.integers(0, n, m) if n else None
        near = boxes[source] + (g.normal(0, 3, (m, 4)) if seed % 3 else g.integers(-1, 2, (m, 4)) * 4) if n else np.tile(
            [1, 2, 30, 40], (m, 1))
        near = np.concatenate([near[:, :2], np.maximum(near[:, 2:], near[:, :2] + 1)], 1).astype(np.float32)
        scores = g.uniform(0, 1, m).astype(np.float32)
        found = np.where(g.random(m) < 0.7, labels[source] if n else 1, g.integers(1, 4, m))
        predictions.append({"boxes": torch.from_numpy(near), "labels": torch.from_numpy(found),
                            "scores": torch.from_numpy(scores.round(1) if seed % 5 == 0 else scores)})
        targets.append(target)
    return predictions, targets


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_coco_map_equals_pycocotools(start):
    for seed in range(start, start + 50):
        predictions, targets = random_case(seed)
        whole, per_class = pycoco(predictions, targets, [1, 2, 3])
        mine = mask.coco_map(predictions, targets)
        for name, value in whole.items():
            assert mine[name] == pytest.approx(value, abs=1e-6), (seed, name)
        for label, (ap, ap50) in enumerate(per_class, 1):
            assert mine["map_per_class"].get(label, -1) == pytest.approx(ap, abs=1e-6), (seed, label)
            assert mine["map50_per_class"].get(label, -1) == pytest.approx(ap50, abs=1e-6), (seed, label)


def test_coco_map_by_hand():
    """One face found, one missed, one false alarm of a better score: precision 1/2 up to a recall of 1/2."""
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), "labels": torch.tensor([1, 1])}
    found = {"boxes": torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10]]), "labels": torch.tensor([1, 1]),
             "scores": torch.tensor([0.9, 0.8])}
    figures = mask.coco_map([found], [target])
    assert [figures["map"], figures["map50"]] == pytest.approx([0.5 * 51 / 101] * 2)
    assert figures["mar100"] == 0.5 and figures["map_per_class"].keys() == {1}
    with pytest.raises(ValueError):
        mask.coco_map([found], [])


def test_best_threshold_has_the_highest_f1():
    predictions, targets = random_case(4)
    chosen = mask.best_threshold(predictions, targets, ["a", "b", "c"])

    def f1(threshold):
        hits = count = shown = 0
        for label in (1, 2, 3):
            scores, right, void, true = mask.match(predictions, targets, label)
            hits, count = hits + (right[0] & (scores >= threshold)).sum(), count + true
            shown += (~void[0] & (scores >= threshold)).sum()
        return 2 * hits / (shown + count)
    scores = torch.cat([p["scores"] for p in predictions]).tolist()
    assert f1(chosen) == pytest.approx(max(map(f1, scores))) and f1(chosen) > 0


# -------------------------------------------------------------------------------------------------- data
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
    refuses("fasterrcnn_mask", f"--data {folder} {SMALL}", "22 of 25")


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


# ------------------------------------------------------------------------------------------------- model
@pytest.mark.parametrize("backbone", ["mobilenet", "resnet50", "resnet50_v2"])
def test_a_file_of_coco_weights_loads(backbone, tmp_path, monkeypatch):
    """A file in torchvision's layout of 91 classes: the head is replaced, all else is equal, stages are frozen."""
    torch.manual_seed(0)
    source = mask.MODELS[backbone][0](weights=None, weights_backbone=None)
    for buffer in source.buffers():
        if buffer.dtype == torch.float:
            buffer.uniform_(0.5, 1.5)
    state = source.state_dict()
    if backbone != "resnet50_v2":  # those files come from frozen norms, which count no batches
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "coco.pth")
    model = mask.build_model(4, backbone, str(tmp_path / "coco.pth"), 96, trainable_layers=2)
    mine = model.state_dict()
    head = {key for key in state if "box_predictor" in key}
    assert len(head) == 4 and all(len(mine[key]) in (4, 16) for key in head)
    assert all(torch.equal(mine[key], state[key]) for key in set(state) - head)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = {"mobilenet": ("body.0.", "body.12."), "resnet50": ("body.conv1", "body.layer2.")}[backbone.split("_")[0]]
    assert all(any(name.startswith(f"backbone.{part}") for name in frozen) for part in expected)
    assert not any("rpn" in n or "roi" in n or "fpn" in n or "layer4" in n or "body.16" in n for n in frozen)
    mask.training_mode(model)
    losses = model([torch.rand(3, 96, 96)], [{"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}])
    sum(losses.values()).backward()
    assert all(torch.equal(a, b) for (k, a), b in zip(model.state_dict().items(), mine.values()) if "running" in k)


def test_weights_that_are_not_there(tmp_path, monkeypatch, refuses):
    def no_network(*args, **how):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    refuses("fasterrcnn_mask", "--data demo --weights coco --max_steps 1 --device cpu", "--weights none", "no network",
            "checkpoints", "https://download.pytorch.org")
    (tmp_path / "no.pth").write_text("nothing")
    refuses("fasterrcnn_mask", "--data demo --weights no.pth --max_steps 1 --device cpu", "no.pth", "--weights none")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    refuses("fasterrcnn_mask", "--data demo --weights other.pth --max_steps 1 --device cpu", "other.pth", "1 unknown")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = mask.build_model(4, "mobilenet", "none", 64).eval()
    model.roi_heads.score_thresh = 0.0  # untrained: show all it has
    return model


def scenes(count):
    sizes = [(40, 60), (60, 40), (40, 60), (33, 57)]
    g = np.random.default_rng(1)
    return [mask.prepare(Image.fromarray(g.integers(256, size=(*sizes[i % 4], 3), dtype=np.uint8)), 64, str(i))
            for i in range(count)]


def test_detections_do_not_depend_on_the_batch(model):
    """Alone, in batches, in any order: the same boxes, and those that the model gives for the image itself."""
    items = scenes(13)
    together = mask.detections(model, items, torch.device("cpu"))
    turned = mask.detections(model, items[::-1], torch.device("cpu"))[::-1]
    for item, a, b in zip(items, together, turned):
        alone = mask.detections(model, [item], torch.device("cpu"))[0]
        with torch.no_grad():
            plain = model([item["image"].float() / 255])[0]
        plain = {**plain, "boxes": plain["boxes"] / item["scale"]}
        assert len(a["boxes"]) > 20
        for other in (b, alone, plain):
            torch.testing.assert_close(a["boxes"], other["boxes"], atol=1e-3, rtol=0)
            torch.testing.assert_close(a["scores"], other["scores"], atol=1e-5, rtol=0)
            assert torch.equal(a["labels"], other["labels"])
        assert a["boxes"][:, 2].max() <= item["size"][0] + 1e-3 and a["boxes"][:, 3].max() <= item["size"][1] + 1e-3


def test_training_losses_do_not_depend_on_batch_mates(model):
    """Group norm: the features of an image are those it has alone."""
    x = torch.rand(3, 3, 64, 64)
    model.train()
    together, alone = model.backbone(x), model.backbone(x[1:2])
    model.eval()
    for key, value in alone.items():
        torch.testing.assert_close(together[key][1:2], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone, weights, strides", [
    ("mobilenet", "none", [8, 16]), ("mobilenet", "coco", [32, 32]), ("resnet50", "none", [4, 8, 16, 32])])
def test_strides_do_not_come_from_the_first_image(backbone, weights, strides):
    net = mask.build(mask.Config(backbone=backbone, weights=weights, image_size=64), ["a"], torch.device("cpu"), trained=True)
    flat = mask.prepare(Image.new("RGB", (64, 43)), 64)
    mask.detections(net, [flat], torch.device("cpu"))
    assert net.roi_heads.box_roi_pool.scales == [1 / s for s in strides]


def test_nothing_but_the_backbone_is_compiled():
    built = mask.build(mask.Config(backbone="mobilenet", weights="none", image_size=64), ["a"], torch.device("cpu"))
    built.compile(backend="eager")
    assert built._compiled_call_impl is None and built.backbone._compiled_call_impl is not None
    assert not any("_orig_mod" in key for key in built.state_dict())


def test_drawn_boxes_lie_where_they_should():
    image = Image.new("RGB", (100, 80))
    picture = np.asarray(mask.drawn(image, torch.tensor([[20.0, 30, 50, 60]]), torch.tensor([2]), ["a", "b"]))
    assert picture.shape[:2] == (640, 800)
    colour = np.array([int(mask.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.where((picture == colour).all(2))
    assert (columns.min(), columns.max(), rows.max()) == (160, 400, 480)
    assert (picture[rows.min() : 240, 160:400] == 255).all(2).any()  # the name, in white, above the box


def test_the_worse_of_two_boxes_over_each_other_is_not_shown():
    found = {"boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [30, 0, 40, 10]]), "labels": torch.tensor([1, 2, 1]),
             "scores": torch.tensor([0.6, 0.9, 0.2])}
    assert mask.sure(found, 0.5)["labels"].tolist() == [2] and len(mask.sure(found, 0.1)["boxes"]) == 2


# ------------------------------------------------------------------------------------------------- modes
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
    refuses("fasterrcnn_mask", f"--data empty {SMALL}", "empty", "0 of 0")
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
