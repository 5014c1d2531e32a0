"""fasterrcnn_mask.py's metrics, detector and drawing against pycocotools and torchvision's own detectors."""
import contextlib
import io
import urllib.error

import fasterrcnn_mask as mask
import numpy as np
import pytest
import torch
from baselines import captured
from PIL import Image
from torchvision.models import detection


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


def test_a_file_of_coco_weights_loads(tmp_path, monkeypatch):
    """A file in torchvision's layout of 91 classes: the head is replaced, all else is equal, layers are frozen, and a step
    of the training changes neither these nor the statistics of the norms."""
    torch.manual_seed(0)
    source = detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    for buffer in source.buffers():
        if buffer.dtype == torch.float:
            buffer.uniform_(0.5, 1.5)
    state, url = source.state_dict(), detection.FasterRCNN_ResNet50_FPN_V2_Weights.DEFAULT.url
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / url.split("/")[-1])  # where a download would go
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(mask, "demo_scenes", lambda count, plain=mask.demo_scenes: plain(30))
    flags = f"--data demo --weights coco --device cpu --image_size 64 --batch_size 2 --out {tmp_path / 'run'}"
    box = captured("fasterrcnn_mask", flags.split())[1]
    model = box["raw"]
    mine = {key: value.clone() for key, value in model.state_dict().items()}
    head = {key for key in state if "box_predictor" in key}
    assert len(head) == 4 and all(len(mine[key]) in (4, 16) for key in head)
    assert all(torch.equal(mine[key], state[key]) for key in set(state) - head)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(any(name.startswith(f"backbone.{part}") for name in frozen) for part in ("body.conv1", "body.layer1."))
    assert not any("rpn" in n or "roi" in n or "fpn" in n or "layer2" in n for n in frozen)
    again = mask.build_model(4, "resnet50_v2", "coco", 64, trained=True)  # for a checkpoint
    assert frozen == {name for name, p in again.named_parameters() if not p.requires_grad}
    box["update"](1, box["fetch"](1))
    same = {key for key, value in model.state_dict().items() if torch.equal(value, mine[key])}
    assert same >= frozen | {key for key in mine if "running" in key or "num_batches" in key} and len(same) < len(mine)


def test_weights_that_are_not_there(monkeypatch, refuses):
    def no_network(*args, **how):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    refuses("fasterrcnn_mask", "--data demo --weights coco --max_steps 1 --device cpu", "--weights none", "no network",
            "checkpoints", "https://download.pytorch.org")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **how: {"a": torch.zeros(1)})
    refuses("fasterrcnn_mask", "--data demo --weights coco --max_steps 1 --device cpu", "Missing key", "--weights none")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = mask.build_model(4, "resnet18", "none", 64).eval()
    model.roi_heads.score_thresh = 0.0  # untrained: show all it has
    return model


def scenes(count):
    sizes = [(40, 60), (60, 40), (40, 60), (33, 57)]
    g = np.random.default_rng(1)
    return [mask.prepare(Image.fromarray(g.integers(256, size=(*sizes[i % 4], 3), dtype=np.uint8)), 64) for i in range(count)]


def test_detections_do_not_depend_on_the_batch(model):
    """Alone, in batches, in any order: the same boxes, and those that the model gives for the image itself."""
    items = scenes(13)
    together = mask.detections(model, items, torch.device("cpu"))
    turned = mask.detections(model, items[::-1], torch.device("cpu"))[::-1]
    for item, a, b in zip(items, together, turned):
        alone = mask.detections(model, [item], torch.device("cpu"))[0]
        with torch.no_grad():
            plain = model([item["image"].float() / 255])[0]
        assert len(a["boxes"]) > 20
        for other in (b, alone, plain):
            torch.testing.assert_close(a["boxes"], other["boxes"], atol=1e-3, rtol=0)
            torch.testing.assert_close(a["scores"], other["scores"], atol=1e-5, rtol=0)
            assert torch.equal(a["labels"], other["labels"])
        assert (a["boxes"][:, 2:].amax(0) <= torch.tensor(item["image"].shape[:0:-1]) + 1e-3).all()


def test_training_losses_do_not_depend_on_batch_mates(model):
    """Group norm: the features of an image are those it has alone."""
    x = torch.rand(3, 3, 64, 64)
    model.train()
    together, alone = model.backbone(x), model.backbone(x[1:2])
    model.eval()
    for key, value in alone.items():
        torch.testing.assert_close(together[key][1:2], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone, weights, strides", [
    ("resnet18", "none", [8, 16, 32]), ("resnet50", "none", [8, 16, 32]), ("resnet50_v2", "coco", [4, 8, 16, 32])])
def test_strides_do_not_come_from_the_first_image(backbone, weights, strides):
    net = mask.build(mask.Config(backbone=backbone, weights=weights, image_size=64), ["a"], torch.device("cpu"), trained=True)
    flat = mask.prepare(Image.new("RGB", (64, 43)), 64)
    mask.detections(net, [flat], torch.device("cpu"))
    assert net.roi_heads.box_roi_pool.scales == [1 / s for s in strides]


def test_nothing_but_the_backbone_is_compiled(tmp_path, monkeypatch):
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend="eager"))
    flags = f"--data demo --device cpu --compile on --image_size 32 --out {tmp_path / 'run'}"
    built = captured("fasterrcnn_mask", flags.split())[1]["raw"]
    assert built._compiled_call_impl is None and built.backbone._compiled_call_impl is not None
    assert not any("_orig_mod" in key for key in built.state_dict())


def test_drawn_boxes_lie_where_they_should():
    part = {"boxes": torch.tensor([[20.0, 30, 50, 60]]), "labels": torch.tensor([2])}
    picture = mask.drawn(torch.zeros(3, 80, 100, dtype=torch.uint8), part, ["a", "b"], 2000).permute(1, 2, 0).numpy()
    assert picture.shape == (1600, 2000, 3)
    colour = np.array([int(mask.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.where((picture == colour).all(2))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (400, 1000, 600, 1200)
    assert (picture[600:700, 400:1000] == 255).all(2).any()  # the name, in white, inside the box


def test_the_worse_of_two_boxes_over_each_other_is_not_shown():
    found = {"boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [30, 0, 40, 10]]), "labels": torch.tensor([1, 2, 1]),
             "scores": torch.tensor([0.6, 0.9, 0.2])}
    assert mask.confident(found, 0.5)["labels"].tolist() == [2] and len(mask.confident(found, 0.1)["boxes"]) == 2
