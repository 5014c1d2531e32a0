"""Faster R-CNN: detection of faces with a mask, without one, and with a badly worn one.

    python fasterrcnn_mask.py --data demo                 # generated scenes: no download, no GPU
    python fasterrcnn_mask.py --data face-mask-detection  # fine-tune COCO weights (167 MB on first use)
    python fasterrcnn_mask.py --data face-mask-detection --weights none    # train a ResNet-18 from scratch
    python fasterrcnn_mask.py --data path/to/voc          # your own: images and their VOC annotations
    torchrun --nproc_per_node=8 fasterrcnn_mask.py --data face-mask-detection --batch_size 64 --lr 3e-4
    python fasterrcnn_mask.py --data face-mask-detection --resume    # continue a run that was stopped

    python fasterrcnn_mask.py eval                        # test the newest out/fasterrcnn_mask-*/best.pt
    python fasterrcnn_mask.py detect photo.jpg folder --save found

--weights none has its own defaults: a resnet18, images of 400 pixels, batches of 2, a learning rate of 4e-4,
30 epochs. Measured on one thread of a CPU (AMD EPYC), other work beside it, from scratch; one run, seed 0:

    --data demo                                  0.944 mAP50, 0.756 mAP on unseen scenes; 1.9 minutes
    --data face-mask-detection --weights none    0.393 mAP50, 0.231 mAP on 114 test images; 87 minutes

Fine-tuning from COCO weights has not been measured.

Paper: Ren et al., "Faster R-CNN", 2015, arXiv 1506.01497, on a feature pyramid: Lin et al., 2017, arXiv
1612.03144. From scratch, with group normalisation: He et al., 2018, arXiv 1811.08883. Score: Lin et al.,
"Microsoft COCO", 2014, arXiv 1405.0312. Data: Kaggle, andrewmvd/face-mask-detection (CC0).
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "numpy", "matplotlib"]
# ///
import argparse
import contextlib
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from matplotlib import get_data_path
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torchvision import ops, tv_tensors, utils
from torchvision.datasets.folder import is_image_file
from torchvision.models import detection, get_model
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.transforms import v2


@dataclass
class Config:
    # the same in all five scripts; a comment is the help of its flag, and may begin with choices: a|b|c
    data: str = "auto"  # demo, face-mask-detection or a VOC folder; auto: the first in data/, else demo
    out: str = ""  # folder of the run (default: out/SCRIPT-DATA)
    save: str = ""  # folder for predictions (default: the folder of the checkpoint)
    ckpt: str = ""  # checkpoint to test or predict with (default: the newest best.pt in out/SCRIPT-*)
    init: str = ""  # checkpoint whose weights a new run starts from
    resume: bool = False  # continue the run in --out from its last.pt, if there is one
    device: str = "auto"  # auto|cpu|cuda: where to run
    dtype: str = "auto"  # auto|float32|bfloat16: precision of training (autocast); metrics are always float32
    compile: str = "off"  # auto|on|off: torch.compile; auto: on for CUDA under Linux
    seed: int = 0  # seed of the initial weights, the order of the data, and the noise
    batch_size: int = 8  # images per step, over all processes
    lr: float = 1e-4  # peak learning rate
    max_steps: int = 0  # end the training after this many steps; 0: after all epochs
    eval_every: int = 200  # steps between validations
    save_every: int = 200  # steps between saves of last.pt; each validation saves it, too
    log_every: int = 20  # steps between log lines
    # the task
    backbone: str = "resnet50_v2"  # resnet18|resnet50|resnet50_v2: network; only resnet50_v2 has COCO weights
    weights: str = "coco"  # coco|none: fine-tune COCO weights, or train from scratch
    image_size: int = 800  # longer side in pixels to which images are resized
    epochs: int = 20  # passes over the training set
    warmup: int = 200  # steps in which the learning rate rises
    augment: float = 1.0  # strength of the augmentation (flip, scale, colour); 0: none
    split: int = 0  # seed of the division into training, validation and test set
    threshold: float = 0.5  # score from which a box is drawn


PRESETS = {"demo": {"weights": "none", "image_size": 128, "epochs": 2, "warmup": 50, "augment": 0.3,
                    "eval_every": 280}}
SCRATCH = {"backbone": "resnet18", "image_size": 400, "batch_size": 2, "lr": 4e-4, "epochs": 30,
           "eval_every": 500}  # defaults with --weights none
MODES = {"train": "", "eval": "", "detect": "IMAGE_OR_FOLDER..."}  # mode: its inputs
UNIT = "images"  # what a batch is counted in
SHAPE = {"backbone", "weights", "split"}  # fields that a checkpoint fixes


# MODEL ------------------------------------------------------------------------------------------------------
class Backbone(BackboneWithFPN):
    """torchvision's feature pyramid. Only it trains in bfloat16; the coordinates of boxes need float32."""

    bfloat16 = False

    def forward(self, x):
        """(B, 3, H, W) -> {level: map (B, C, H / stride, W / stride)} in float32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.training and self.bfloat16):
            maps = super().forward(x)
        return {level: features.float() for level, features in maps.items()}


def scratch_detector(num_classes, backbone, options):
    """A detector for training from scratch: group norm, since a step has too few images for batch norm; small
    anchors, for small faces; a smaller pyramid and head than torchvision's, fewer sampled boxes."""
    norm = functools.partial(nn.GroupNorm, 32)
    network = get_model(backbone, norm_layer=norm)
    channels = [network.inplanes // 4, network.inplanes // 2, network.inplanes]  # at strides 8, 16 and 32
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    anchors = AnchorGenerator(((10, 16, 25), (40, 63, 100), (150, 185, 220), (270, 320, 380)), ((1.2,),) * 4)
    return FasterRCNN(
        Backbone(network, layers, channels, out_channels=128, norm_layer=norm), rpn_anchor_generator=anchors,
        rpn_batch_size_per_image=64, rpn_pre_nms_top_n_train=500, rpn_post_nms_top_n_train=250,
        rpn_pre_nms_top_n_test=500, rpn_post_nms_top_n_test=300, box_batch_size_per_image=64,
        box_roi_pool=ops.MultiScaleRoIAlign(["0", "1", "2"], 7, sampling_ratio=1),
        box_head=TwoMLPHead(128 * 7 * 7, 256), box_predictor=FastRCNNPredictor(256, num_classes), **options)


def build_model(num_classes, backbone="resnet50_v2", weights="coco", image_size=800, trained=False):
    """A Faster R-CNN for `num_classes`, the background included. Called as torchvision's detectors are, with
    a list of images (3, H, W) in [0, 1], whose longer side is `image_size`, and in training their targets.

    weights: "coco", for backbone "resnet50_v2", or "none", for "resnet18" and "resnet50". With `trained`
    nothing is downloaded: a checkpoint's weights follow. Raises UserError for another pair, and if the COCO
    weights are neither cached nor can be downloaded."""
    if (weights == "coco") != (backbone == "resnet50_v2"):
        raise UserError(f"--backbone {backbone} --weights {weights}: COCO weights are for resnet50_v2, and "
                        "--weights none is for resnet18 or resnet50")
    options = {"min_size": image_size, "max_size": image_size, "_skip_resize": True, "box_score_thresh": 0.01}
    if weights == "none":
        model = scratch_detector(num_classes, backbone, options)
    else:
        known = detection.FasterRCNN_ResNet50_FPN_V2_Weights.DEFAULT
        try:
            model = detection.fasterrcnn_resnet50_fpn_v2(
                weights=None if trained else known, weights_backbone=None, progress=RANK == 0, **options)
        except Exception as e:  # no network, or a file that holds anything else
            raise UserError(f"--weights coco: no weights ({str(e)[:200]}); put {known.url} into "
                            f"{torch.hub.get_dir()}/checkpoints, or use --weights none") from None
        model.backbone.__class__ = Backbone
        for name, parameter in model.backbone.body.named_parameters():  # the first layers stay frozen
            parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
        model.roi_heads.box_predictor = FastRCNNPredictor(1024, num_classes)
    with torch.no_grad():  # RoIAlign derives its strides from the first image: not from a flat one
        maps = model.eval().backbone(torch.zeros(1, 3, 64, 64))
        model.roi_heads.box_roi_pool(maps, [torch.zeros(1, 4)], [(64, 64)])
    return model.train()


# DATA -------------------------------------------------------------------------------------------------------
AUTO = {"face-mask-detection": "annotations"}  # what --data auto looks for in data/NAME
REAL = "the real set is Kaggle's andrewmvd/face-mask-detection, unpacked into data/face-mask-detection"
SPLITS = {"train": "train", "training": "train", "trainval": "train", "val": "val", "valid": "val",
          "validation": "val", "test": "test", "testing": "test"}  # {name of a folder or list: split}


def demo_scenes(count, side=128):
    """Scenes as (image, boxes, labels): faces of 14 to 52 pixels and other shapes. A badly worn mask does not
    cover the nose."""
    rng = np.random.default_rng(0)

    def colour(low, high):
        return tuple(rng.integers(low, high, 3).tolist())

    def ellipse(left, top, right, bottom, fill):  # the edges are shares of the face
        pen.ellipse((x + left * w, y + top * h, x + right * w, y + bottom * h), fill)

    for _ in range(count):
        image = Image.new("RGB", (2 * side, 2 * side), colour(90, 200))  # drawn twice as large: smooth edges
        pen, boxes, labels = ImageDraw.Draw(image), [], []
        for _ in range(rng.integers(3, 9)):
            x, y, w, h = *rng.uniform(0, 2 * side, 2), *rng.uniform(10, 90, 2)
            shape = pen.rectangle if rng.random() < 0.6 else pen.ellipse
            shape((x, y, x + w, y + h), fill=colour(20, 236))
        for _ in range(rng.integers(1, 6)):
            w = 28 * (52 / 14) ** rng.random()
            h = w * rng.uniform(1.15, 1.35)
            x, y = rng.uniform(0, 2 * side - w), rng.uniform(0, 2 * side - h)
            if any(x < r and l < x + w and y < d and u < y + h for l, u, r, d in boxes):
                continue  # faces don't overlap
            box, skin = (x, y, x + w, y + h), sorted(colour(70, 236), reverse=True)
            label = str(rng.choice(["with_mask", "without_mask", "mask_weared_incorrect"], p=[0.5, 0.3, 0.2]))
            pen.ellipse(box, tuple(skin))
            pen.chord(box, 200, 340, colour(0, 90))  # hair
            ellipse(0.24, 0.36, 0.38, 0.45, "black")
            ellipse(0.62, 0.36, 0.76, 0.45, "black")
            ellipse(0.43, 0.46, 0.57, 0.64, tuple(v // 2 for v in skin))  # nose
            if label == "without_mask":
                ellipse(0.3, 0.72, 0.7, 0.82, "darkred")
            else:
                angle = -5 if label == "with_mask" else 24
                pen.chord(box, angle, 180 - angle, colour(100, 250))
            boxes, labels = [*boxes, box], [*labels, label]
        yield image.resize((side, side), Image.Resampling.BOX), torch.tensor(boxes) / 2, labels


def find_files(folder, pattern="**/*"):
    """Sorted paths in a folder, without hidden files and what operating systems leave behind."""
    junk = re.compile(r"\.|__MACOSX$|Thumbs\.db$|desktop\.ini$", re.I)
    return [p for p in sorted(folder.glob(pattern)) if not any(map(junk.match, p.relative_to(folder).parts))]


def find_scenes(folder):
    """(annotations, images) in a folder: two dicts {(split, name): path}. A split is a sub-folder in SPLITS,
    or one of VOC's lists ImageSets/Main/SPLIT.txt; it is "" for what belongs to none."""
    files, stems, listed = find_files(folder), list(SPLITS), {}  # listed: {name: split}
    lists = [path for path in files if path.match("ImageSets/Main/*.txt") and path.stem.lower() in stems]
    for path in sorted(lists, key=lambda path: stems.index(path.stem.lower())):  # val wins over trainval
        for line in path.read_text("utf-8-sig", "replace").splitlines():
            entry = Path(re.sub(r"\s+-?[01]\s*$", "", line).strip().strip('"'))  # 2008_000001  1
            listed[entry.stem if is_image_file(entry.name) else entry.name] = SPLITS[path.stem.lower()]
    annotations, images = {}, {}
    for path in files:
        if path.suffix.lower() == ".xml":
            found = annotations
        elif is_image_file(path.name) and not path.parent.name.startswith("Segmentation"):  # VOC's masks
            found = images
        else:
            continue
        folders = [part.lower() for part in path.relative_to(folder).parts[:-1]]
        inside = next((SPLITS[part] for part in folders if part in SPLITS), "")
        key = listed.get(path.stem, inside), path.stem
        if key in found:
            raise UserError(f"{folder}: a name is there twice, {found[key]} and {path}; rename one")
        found[key] = path
    if not annotations:
        other = [str(path) for path in files if path.suffix in (".json", ".txt")]
        seen = f", but {other[0]}: export it as Pascal VOC, not as COCO or YOLO" if other else ""
        raise UserError(f"{folder}: no annotations NAME.xml in it{seen}; data/README.md shows the layouts")
    return annotations, images


def read_voc(path):
    """A VOC annotation: {"boxes": (N, 4) xyxy pixels, "labels": names, "size": (W, H) or None}. Boxes are as
    in the file: VOC's 1 is not subtracted, "difficult" ones count. An image may have no object. Raises
    UserError for any other file."""
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>, not <annotation>")
        boxes, labels = [], []
        for thing in root.iter("object"):
            edges = [thing.findtext(f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append([float(edge) for edge in edges])
            labels.append(thing.findtext("name").strip())
        if not np.isfinite(boxes).all() or not all(labels):
            raise ValueError("a coordinate is not finite, or an object has no name")
        size = tuple(int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except Exception as e:  # a damaged file can raise nearly anything
        raise UserError(f"{path}: not a VOC annotation ({e})") from None
    boxes = torch.tensor(boxes).reshape(-1, 4)
    return {"boxes": boxes, "labels": labels, "size": size if all(size) else None}


def read_image(path):
    """An image file as RGB, turned upright by its EXIF tag."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def prepare(image, side, boxes=torch.zeros(0, 4)):
    """{"image": uint8 (3, h, w), resized so that its longer side is `side`, "boxes": (N, 4) xyxy in pixels of
    the resized image, "scale": (4,) from pixels of the original to those, "size": the original's (W, H)}."""
    new = [max(1, round(v * side / max(image.size))) for v in image.size]
    pixels = torch.from_numpy(np.array(image.resize(new))).permute(2, 0, 1).contiguous()
    scale = torch.tensor([new[0] / image.width, new[1] / image.height]).repeat(2)
    return {"image": pixels, "boxes": boxes * scale, "scale": scale, "size": image.size}


def voc_scenes(folder, side):
    """What `prepare` returns of each annotated image in a folder, with its "labels" (names), "name", "split",
    "path" of the annotation, "raw" boxes, and whether boxes were "clipped"."""
    annotations, images = find_scenes(folder)

    def read(key):
        if key not in images:
            raise UserError("no image of that name beside it, or in its split")
        truth, image = read_voc(annotations[key]), read_image(images[key])
        if truth["size"] not in (None, image.size):
            raise UserError(f"made for {truth['size']} pixels, {images[key]} has {image.size}")
        boxes = ops.clip_boxes_to_image(truth["boxes"], image.size[::-1])
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        labels = [label for label, kept in zip(truth["labels"], keep) if kept]
        return prepare(image, side, boxes[keep]) | {
            "labels": labels, "name": images[key].name, "split": key[0], "path": annotations[key],
            "raw": truth["boxes"], "clipped": not torch.equal(boxes[keep], truth["boxes"])}

    with ThreadPoolExecutor() as pool:
        jobs = {path: pool.submit(read, key) for key, path in annotations.items()}
    bad = [f"{path.name}: {job.exception()}" for path, job in jobs.items() if job.exception()]
    if len(bad) > 0.05 * len(jobs):
        raise UserError(f"{folder}: {len(bad)} of {len(jobs)} annotations, or their images, are unreadable "
                        f"(limit: 5 %): {'; '.join(bad[:2])}")
    scenes = [job.result() for job in jobs.values() if not job.exception()]
    boxes = torch.cat([scene["raw"] for scene in scenes])
    if ((boxes[:, 2:] - boxes[:, :2]).amin(1) < 2).float().mean() > 0.5:
        raise UserError(f"{folder}: most boxes are relative (0 to 1) or smaller than 2 pixels, as in "
                        f"{scenes[0]['path']}; VOC counts pixels")
    clipped = [f"{scene['path'].name} ({len(scene['raw']) - len(scene['boxes'])} dropped)"
               for scene in scenes if scene["clipped"]]
    alone = [str(path) for key, path in images.items() if key not in annotations]
    for text, names in (("annotations or images are unreadable, skipped", bad),
                        ("images have no annotation", alone),
                        ("annotations have boxes outside the image or empty, clipped or dropped", clipped)):
        if names:
            say(f"note: {len(names)} {text}: {'; '.join(names[:5])}")
    return scenes


def divide(items, seed):
    """{"train", "val", "test": items}: 70, 15 and 15 %, stratified by the rarest class of an image. They are
    ordered by a hash of their names, so the division does not depend on the machine."""
    counts, groups = Counter(label for item in items for label in set(item["labels"])), defaultdict(list)
    for item in items:
        rarest = min(item["labels"], key=lambda label: (counts[label], label), default="")
        groups[rarest].append(item)
    parts = {"train": [], "val": [], "test": []}
    for group in groups.values():
        group.sort(key=lambda item: seed_for(seed, item["name"]))
        first, second = (math.ceil(share * len(group) - 0.5) for share in (0.7, 0.85))
        parts["train"] += group[:first]
        parts["val"] += group[first:second]
        parts["test"] += group[second:]
    return parts


def split_up(items, seed):
    """{"train", "val", "test": items}: the given splits. If "train" is not given, all items are divided; if
    only "train" is given, it is divided. Without "val", a part of "train" is taken; without "test", "val"."""
    parts = {split: [item for item in items if item["split"] == split] for split in ("train", "val", "test")}
    given = ", ".join(f"{len(part)} {split}" for split, part in parts.items() if part)
    if given and not parts["train"]:
        say(f"splits given: {given}; without train all images are divided")
    elif given:
        say(f"splits given: {given}; in none, and not used: {sum(not item['split'] for item in items)}")
    own = divide(parts["train"] or items, seed)
    if not parts["train"] or not (parts["val"] or parts["test"]):
        return own
    if not parts["val"]:
        parts |= {"train": own["train"] + own["test"], "val": own["val"]}
    if not parts["test"]:
        say("note: there is no test split; the validation set is tested, which chose the checkpoint")
        parts["test"] = parts["val"]
    return parts


def load_data(cfg, classes=None):
    """{"train", "val", "test": lists of what `voc_scenes` returns, "classes": names}; labels count from 1.
    `classes` are those of a checkpoint."""
    folder = Path("data", cfg.data) if cfg.data in AUTO else Path(cfg.data)
    if cfg.data == "demo":
        items = [prepare(image, cfg.image_size, boxes) | {"labels": labels, "name": f"{i:03}", "split": ""}
                 for i, (image, boxes, labels) in enumerate(demo_scenes(800))]
    elif folder.is_dir():
        items = voc_scenes(folder, cfg.image_size)
    else:
        raise UserError(f"--data {cfg.data}: not a folder, and not demo; {REAL}")
    parts = split_up(items, cfg.split)
    names = {label: item for part in parts.values() for item in part for label in item["labels"]}
    classes = classes or sorted(names)
    if not classes or not all(parts.values()):
        raise UserError(f"--data {cfg.data}: {len(items)} images of {len(classes)} classes; it takes about a "
                        "dozen images, and objects in them")
    for name, item in names.items():
        if name not in classes:
            raise UserError(f"{item.get('path', cfg.data)}: unknown class {name!r}; the checkpoint knows "
                            f"{', '.join(classes)}; start a new run")
    for split, part in parts.items():
        parts[split] = [item | {"labels": torch.LongTensor([1 + classes.index(v) for v in item["labels"]])}
                        for item in part]
    return parts | {"classes": classes}


def augmentation(strength):
    """A function of (image, target) that flips, scales, shifts and colours; uint8 -> float in [0, 1]."""
    shift, colour, grey = min(0.9, 0.25 * strength), min(0.9, 0.4 * strength), [124, 116, 104]
    return v2.Compose([
        v2.RandomHorizontalFlip(min(0.5, strength)), v2.ColorJitter(colour, colour, colour),
        v2.RandomAffine(0, (shift, shift), (0.55 ** strength, 1.8 ** strength), fill=grey,
                        interpolation=v2.InterpolationMode.BILINEAR),
        v2.SanitizeBoundingBoxes(min_size=2), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def arrange(ratios, size, seed):
    """The batches of an epoch: (N // size, size) indices in random order. Images of similar aspect ratio
    share a batch, since torchvision pads a batch to one shape."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(ratios))[: len(ratios) // size * size]
    alike = chosen[np.argsort(np.array(ratios)[chosen] * rng.uniform(1, 1.1, len(chosen)))]
    return rng.permutation(alike.reshape(-1, size))


# METRICS ----------------------------------------------------------------------------------------------------
IOUS = np.linspace(0.5, 0.95, 10)


def pairwise_iou(found, true, crowd):
    """IoU of boxes (D, 4), (G, 4) -> (D, G); with a crowd, as in COCO, overlap / area of the found box."""
    found = found[:, None]
    extent = np.minimum(found[..., 2:], true[:, 2:]) - np.maximum(found[..., :2], true[:, :2])
    both = extent.clip(0).prod(2)
    area, true_area = ((boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (found, true))
    return both / np.maximum(np.where(crowd, area, area + true_area - both), 1e-300)


def match(found, true, label):
    """The matches of one class in one image: scores (n,) of its 100 best boxes; at the ten IoUs whether each
    is right (10, n), and whether it does not count (10, n), being in a crowd; and the number of true boxes.
    In order of score, each box takes the free true box with the highest IoU; on ties the last."""
    mine = np.asarray(true["labels"]) == label
    true_boxes = np.asarray(true["boxes"], float).reshape(-1, 4)[mine]
    crowd = np.asarray(true.get("iscrowd", np.zeros(len(mine))), bool)[mine]
    mine = np.asarray(found["labels"]) == label
    scores = np.asarray(found["scores"], float)[mine]
    best = np.argsort(-scores, kind="stable")[:100]
    right, void = np.zeros((2, 10, len(best)), bool)
    if len(best) and len(crowd):
        iou = pairwise_iou(np.asarray(found["boxes"], float)[mine][best], true_boxes, crowd)
        free, rows = np.ones((10, len(crowd)), bool), np.arange(10)
        for i in np.flatnonzero(iou.max(1) >= IOUS[0]):
            open_to = (iou[i] >= IOUS[:, None]) & (free | crowd)  # (10, G)
            rank = np.where(open_to, iou[i] - crowd, -1)[:, ::-1]  # a true box goes before any crowd
            taken = len(crowd) - 1 - rank.argmax(1)
            matched = open_to.any(1)
            right[:, i], void[:, i] = matched & ~crowd[taken], matched & crowd[taken]
            free[rows[matched], taken[matched]] = False
    return scores[best], right, void, int((~crowd).sum())


def coco_map(predictions, targets):
    """COCO's figures as pycocotools computes them. Lists of torchvision's dicts: boxes (n, 4) xyxy, labels
    (n,), scores (n,), or for targets perhaps iscrowd (n,). -> {"map50", "map" (the mean over IoUs of 0.5 to
    0.95), "map75", "mar100", "map_per_class", "map50_per_class": {id: figure}}. A class without a true box is
    left out; without any, the means are -1. Raises ValueError if the lists differ in length."""
    images = list(zip(predictions, targets, strict=True))
    ap, ar = {}, {}  # at the ten IoUs
    for label in sorted({int(v) for target in targets for v in target["labels"]}):
        *parts, counts = zip(*(match(found, true, label) for found, true in images))
        scores, right, void = (np.concatenate(part, -1) for part in parts)
        count = sum(counts)
        if not count:  # crowds only
            continue
        order = np.argsort(-scores, kind="stable")
        hits, misses = right[:, order].cumsum(1), (~right & ~void)[:, order].cumsum(1)
        precision, recall = hits / np.maximum(hits + misses, 1e-9), hits / count
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]  # the best from this recall on
        padded = np.pad(precision, ((0, 0), (0, 1)))  # 0 where a recall is never reached
        places = (np.searchsorted(row, np.linspace(0, 1, 101)) for row in recall)
        ap[label] = np.array([row[at].mean() for row, at in zip(padded, places)])
        ar[label] = right.sum(1) / count
    means, recalls = (np.mean(list(part.values()) or [np.full(10, -1.0)], 0) for part in (ap, ar))
    return {"map50": float(means[0]), "map": float(means.mean()), "map75": float(means[5]),
            "mar100": float(recalls.mean()), "map_per_class": {k: float(v.mean()) for k, v in ap.items()},
            "map50_per_class": {k: float(v[0]) for k, v in ap.items()}}


# EVALUATE, PREDICT ------------------------------------------------------------------------------------------
COLOURS = ["#d98200", "#00964a", "#e8272c", "#3f7cff", "#c04ce0", "#00b8c4", "#ff7bac", "#8c6239"]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # other sizes than in training would be compiled anew
def detections(model, items, device):
    """[{"boxes" (n, 4) in pixels of the item's image, "scores" (n,), "labels" (n,)}] on the CPU. Each process
    runs its share of the images, and gets all; one by one, since padding would change what is found."""
    model.eval()
    table = torch.zeros(len(items), model.roi_heads.detections_per_img, 6, device=device)
    for i in range(RANK, len(items), WORLD):
        found = model([items[i]["image"].to(device).float() / 255])[0]
        rows = torch.cat([found["boxes"], found["scores"][:, None], found["labels"][:, None]], 1)
        table[i, : len(rows)] = rows
    rows = [row[row[:, 5] > 0] for row in all_sum(table).cpu()]  # no box has label 0
    return [{"boxes": row[:, :4], "scores": row[:, 4], "labels": row[:, 5].long()} for row in rows]


def evaluate(model, items, classes, device):
    """(figures, detections) of items with true boxes."""
    found = detections(model, items, device)
    figures = coco_map(found, items)
    for kind in ("map_per_class", "map50_per_class"):
        figures[kind] = {name: figures[kind].get(i, -1.0) for i, name in enumerate(classes, 1)}
    return figures, found


def write_coco(folder, items, found, classes):
    """truth.json and detections.json, which pycocotools reads. Boxes are in pixels of the original images."""
    images, truth, results = [], [], []
    for number, (item, f) in enumerate(zip(items, found), 1):
        width, height = item["size"]
        images.append({"id": number, "file_name": item["name"], "width": width, "height": height})
        for part, rows in ((item, truth), (f, results)):
            boxes = ops.box_convert((part["boxes"] / item["scale"]).double(), "xyxy", "xywh").tolist()
            scores = part.get("scores", torch.ones(len(boxes))).tolist()
            for box, label, value in zip(boxes, part["labels"].tolist(), scores):
                rows.append({"id": len(rows) + 1, "image_id": number, "category_id": label, "bbox": box,
                             "area": box[2] * box[3], "iscrowd": 0, "score": value})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    truth = {"info": {}, "images": images, "annotations": truth, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth), encoding="utf-8")
    (folder / "detections.json").write_text(json.dumps(results), encoding="utf-8")


def score(model, data, threshold, folder, device):
    """The figures of the test images; writes what is found as COCO JSON, and draws it."""
    items, classes = data["test"], data["classes"]
    figures, found = evaluate(model, items, classes, device)
    if RANK == 0:
        write_coco(folder, items, found, classes)
        draw_examples(items, found, classes, threshold, folder)
    for kind in ("map", "map50"):
        figures |= {f"{kind}_{name}": value for name, value in figures.pop(f"{kind}_per_class").items()}
    return figures | {"n": len(items)}


def confident(found, threshold):
    """The boxes with at least this score; of overlapping ones only the best, whatever its class."""
    found = {key: value[found["scores"] >= threshold] for key, value in found.items()}
    keep = ops.nms(found["boxes"], found["scores"], 0.5)
    return {key: value[keep] for key, value in found.items()}


def drawn(image, part, classes, side):
    """An image (3, H, W) whose longer side becomes `side`, with the boxes of `part` in the colours of their
    classes, and their names and perhaps scores."""
    scale = side / max(image.shape[1:])
    image = v2.functional.resize(image, [max(1, round(v * scale)) for v in image.shape[1:]])
    words = [classes[label - 1].replace("_", " ") for label in part["labels"]]
    if "scores" in part:
        words = [f"{word} {value:.2f}" for word, value in zip(words, part["scores"])]
    if not words:
        return image
    colours = [COLOURS[(label - 1) % 8] for label in part["labels"]]
    return utils.draw_bounding_boxes(
        image, part["boxes"] * scale, words, colours, width=2, label_colors="white", fill_labels=True,
        font=f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", font_size=side // 60)


def draw_examples(items, found, classes, threshold, folder):
    """examples.png: truth beside detections for the best, the median and the worst test image."""
    worth = [coco_map([f], [item])["map"] for f, item in zip(found, items)]
    order = [i for i in np.argsort(worth).tolist() if worth[i] >= 0]  # without those that have no face
    if not order:
        return
    figure = Figure((11, 13), layout="constrained")
    chosen = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    for (word, i), row in zip(chosen.items(), figure.subplots(3, 2)):
        row[0].set_title(f"{word} ({items[i]['name']}): truth", parse_math=False)
        row[1].set_title(f"found, mAP {worth[i]:.2f}")
        for axes, part in zip(row, (items[i], confident(found[i], threshold))):
            axes.imshow(drawn(items[i]["image"], part, classes, 800).permute(1, 2, 0).numpy())
            axes.axis("off")
    figure.savefig(folder / "examples.png", dpi=130)


def build(cfg, classes, device, trained=False):
    """The model of a Config; `trained` if its weights come from a checkpoint."""
    model = build_model(1 + len(classes), cfg.backbone, cfg.weights, cfg.image_size, trained)
    model.backbone.bfloat16 = cfg.dtype == "bfloat16"
    return model.to(device)


def detect(model, cfg, classes, inputs, folder, device):
    """Draws each image with what is found in it as NAME-boxes.png, and writes boxes.json."""
    paths, rows = [], []
    for path in map(Path, inputs):
        paths += [p for p in find_files(path) if is_image_file(p.name)] if path.is_dir() else [path]
    pictures = [folder / f"{path.stem}-boxes.png" for path in paths]
    for path, uses in Counter(path.resolve() for path in paths + pictures).items():
        if uses > 1:
            raise UserError(f"{path}: an input, or the picture of two inputs; choose another --save")
    for path, picture in zip(paths, pictures):
        try:
            image = read_image(path)
        except Exception as e:  # a damaged image can raise nearly anything
            say(f"note: {path} is unreadable, skipped ({type(e).__name__})")
            continue
        item = prepare(image, cfg.image_size)
        found = confident(detections(model, [item], device)[0], cfg.threshold)
        found["boxes"] /= item["scale"]
        names = [classes[label - 1] for label in found["labels"]]
        counts = ", ".join(f"{n} {name}" for name, n in Counter(names).items())
        say(f"{path}: {counts or 'nothing found'}")
        rows.append({"file": str(path), "picture": picture.name, "boxes": [
            {"class": name, "score": value, "box": box}
            for name, value, box in zip(names, found["scores"].tolist(), found["boxes"].tolist())]})
        if RANK == 0:
            pixels = drawn(v2.functional.pil_to_tensor(image), found, classes, 1000)
            v2.functional.to_pil_image(pixels).save(picture)
    if not rows:
        raise UserError(f"{' '.join(inputs)}: there is no readable image")
    if RANK == 0:
        (folder / "boxes.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    say(f"images: {len(rows)} of {len(paths)}; boxes from score {cfg.threshold} on")


def predict(mode, inputs, flags):
    """Every mode that uses a trained model."""
    cfg, ckpt, device, folder = open_checkpoint(flags)
    model = build(cfg, ckpt["classes"], device, trained=True)
    model.load_state_dict(ckpt["model"])
    if mode == "eval":
        data = load_data(cfg, ckpt["classes"])
        say(show(score(model, data, cfg.threshold, folder, device), digits=6))
    else:
        detect(model, cfg, ckpt["classes"], inputs, folder, device)
    say(f"written: {folder}/*.png, *.json")


# ---- runtime: identical in all five scripts ----
SCRIPT = Path(__file__).stem
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
MAY_CHANGE = {"out", "save", "resume", "device", "compile", "max_steps", "save_every", "log_every"}


class UserError(Exception):
    """An error that the user can fix: printed as one `error:` line, exit status 2."""


@contextlib.contextmanager
def one_line_errors():
    """Decorates main: an error that the user can fix ends the program with one line."""
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        hint = "lower --batch_size: " if isinstance(e, torch.OutOfMemoryError) else ""
        print("error:", hint + " ".join(str(e).split()), file=sys.stderr, flush=True)
        sys.exit(2) if WORLD == 1 else os._exit(2)  # at once: closing NCCL would wait for the others
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Run.start replaces it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def say(text):
    """Prints a line on rank 0."""
    if RANK == 0:
        print(text, flush=True)


def all_sum(tensor):
    """Sums a tensor over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def seed_for(*key):
    """A seed that depends on the key alone, such as (seed, step, rank)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


def parse_args(argv):
    """(mode, inputs, flags given) of a command line. A field of Config is a flag, its comment the help."""
    parser = argparse.ArgumentParser(
        usage=f"python {SCRIPT}.py [MODE] [INPUT ...] [--flag value ...]", description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 30, 110),
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", default=[], help=argparse.SUPPRESS)
    for name, comment in re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.M):
        default, choices = getattr(Config, name), re.match(r"\w+(\|\w+)+", comment)
        kind = {"type": type(default), "choices": choices[0].split("|") if choices else None}
        if default is False:
            kind = {"action": "store_true"}
        names = sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=True)
        parser.add_argument(*names, help=f"{comment} [{default}]".removesuffix(" []"), **kind)
    flags = vars(parser.parse_intermixed_args(argv))
    mode, *inputs = flags.pop("words") or ["train"]
    for name, value in flags.items():
        least = int(type(value) is int and getattr(Config, name) > 0)  # 1 for counts, else 0
        if type(value) in (int, float) and not least <= value <= 1e12:
            parser.error(f"--{name} {value}: must be {least} to 1e12")
    if mode not in MODES:
        parser.error(f"unknown mode {mode!r}, must be {', '.join(MODES)}")
    usage = MODES[mode]  # "FILE", "[FILE]" if it may be missing, "" without inputs
    if bool(inputs) != bool(usage) and not usage.startswith("["):
        parser.error(f"{mode} takes {usage or 'no input'}, not {' '.join(inputs) or 'nothing'}")
    return mode, inputs, flags


def pick_device(cfg):
    """The device of this process. Replaces cfg.dtype "auto", too, and starts the group of a torchrun."""
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device cuda: this machine has no GPU for process {device.index + 1}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        chip, fast = torch.cuda.get_device_name(), torch.cuda.get_device_capability() >= (8, 0)
    else:
        chip, info = f"threads: {torch.get_num_threads()}", Path("/proc/cpuinfo")
        fast = info.exists() and re.search("amx_bf16|avx512_bf16", info.read_text("utf-8"))
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if fast else "float32"
    say(f"device: {device.type}; {chip}; processes: {WORLD}; dtype: {cfg.dtype}")
    if WORLD > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


def load_checkpoint(path):
    """The dict that Run.save wrote. UserError if the file is not a checkpoint of this script."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        assert ckpt["script"] == SCRIPT, f"it was written by {ckpt['script']}.py"
        return ckpt
    except Exception as e:  # a damaged file can raise nearly anything
        raise UserError(f"{path}: no checkpoint of {SCRIPT}.py ({e!r:.99}); train first") from None


def load_weights(model, state):
    """For --init: takes the weights in `state` that fit the model."""
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    say(f"init: {len(fitting)} of {len(own)} tensors are taken, the others do not fit or are missing")
    model.load_state_dict(fitting, strict=False)


def merge_config(ckpt, flags, path, fixed):
    """The Config of a checkpoint, updated with flags. UserError if a flag in `fixed` differs from it."""
    flags = {k: v for k, v in flags.items() if v != "auto" or k in MAY_CHANGE}
    for name in sorted(fixed & flags.keys()):
        if flags[name] != ckpt["config"].get(name):
            raise UserError(f"--{name} {flags[name]}: {path} has {ckpt['config'].get(name)}; start a new run")
    return Config(**{k: v for k, v in ckpt["config"].items() if hasattr(Config, k)} | flags)


def open_checkpoint(flags):
    """(cfg, ckpt, device, output folder) for the modes that use a trained model."""
    trained = Path("out").glob(f"{SCRIPT}-*/best.pt")
    path = Path(flags.get("ckpt") or max(trained, key=os.path.getmtime, default=f"out/{SCRIPT}-*/best.pt"))
    ckpt = load_checkpoint(path)
    if any(key.startswith("optimizer") for key in ckpt):
        raise UserError(f"{path}: this is a training state (last.pt); pass the best.pt beside it")
    cfg = merge_config(ckpt, {"device": "auto", "dtype": "float32", "ckpt": str(path)} | flags, path, SHAPE)
    say(f"checkpoint: {path}, step {ckpt['step']} on {ckpt['config']['data']}, best {ckpt['best']:.5g}")
    folder = Path(cfg.save or path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    return cfg, ckpt, pick_device(cfg), folder


class Run:
    """A training run: its Config and folder, the losses since the last log line, the request to stop."""

    def __init__(self, flags):
        name = flags.get("data", "auto")
        if name == "auto":
            name = next((n for n, inside in AUTO.items() if Path("data", n, inside).exists()), "demo")
        self.cfg, self.ckpt = Config(**PRESETS.get(name, {}) | flags | {"data": name}), {}
        self.folder = Path(self.cfg.out or f"out/{SCRIPT}-{Path(name).resolve().name}")
        last = self.folder / "last.pt"
        if last.exists():
            if not self.cfg.resume:
                raise UserError(f"{self.folder}: holds a run; use --resume to continue it, or another --out")
            self.ckpt = load_checkpoint(last)
            self.cfg = merge_config(self.ckpt, flags, last, Config.__dataclass_fields__.keys() - MAY_CHANGE)
        self.step, self.best = self.ckpt.get("step", 0), self.ckpt.get("best")
        self.began = time.perf_counter() - self.ckpt.get("seconds", 0.0)  # of earlier processes
        self.sums, self.stop_requested, self.stop = 0.0, False, False  # stop: all ranks agreed
        self.device = pick_device(self.cfg)
        hint = f" (generated; {REAL})" if self.cfg.data == "demo" else ""
        say(f"data: {self.cfg.data}{hint}\nrun: {self.folder}, from step {self.step:,}")

    def start(self, total):
        """Call before the loop over `total` steps: opens the log; makes signals wait for a save."""
        self.total, self.saved, self.last_log = total, self.step, (time.perf_counter(), self.step)
        if RANK == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.jsonl").open("ab") as log:  # continues where the checkpoint was saved
                log.truncate(min(log.tell(), self.ckpt.get("log_bytes", 0)))
        signal.signal(signal.SIGINT, self.request_stop)
        signal.signal(signal.SIGTERM, self.request_stop)

    def request_stop(self, *_):
        if self.saved >= self.total:  # only the test is left
            raise KeyboardInterrupt
        self.stop_requested = True

    def step_done(self, losses, count, lr):
        """Call after each step; returns (evaluate now, save now), the same on all ranks. `losses`: {name:
        tensor of this rank}, averaged and read only for a log line or a save; `count`: items of a batch."""
        self.step += 1
        self.sums = self.sums + torch.stack([value.detach().float() for value in losses.values()])
        log, check, save = (self.step == self.total or self.step % every == 0
                            for every in (self.cfg.log_every, self.cfg.eval_every, self.cfg.save_every))
        if not (log or check or save or (self.stop_requested and WORLD == 1)):
            return False, False
        shares = torch.cat([self.sums, self.sums.new_tensor([self.stop_requested])])
        *sums, requests = (all_sum(shares) / WORLD).tolist()
        if not all(map(math.isfinite, sums)):
            raise UserError(f"step {self.step}: loss is not finite: {dict(zip(losses, sums))}; lower --lr")
        seconds, steps = time.perf_counter() - self.last_log[0], self.step - self.last_log[1]
        means = {name: value / steps for name, value in zip(losses, sums)}
        self.write("train", means | {"lr": lr, f"{UNIT}/s": round(count * steps / seconds, 1)},
                   f"eta {(self.total - self.step) * seconds / steps / 60:.1f} min")
        self.sums, self.last_log = 0.0, (time.perf_counter(), self.step)
        self.stop = requests > 0 and self.step < self.total
        if self.stop:
            say(f"stopped at step {self.step}; to continue, repeat the command with --resume")
        return check, check or save or self.stop

    def write(self, split, figures, more=""):
        """Appends a record to log.jsonl, and prints it as a line."""
        if RANK == 0:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": self.step, "split": split, **figures}) + "\n")
            say(f"{split:5} {self.step:>7,} | {show(figures, '  ', 4, 9)}  {more}".rstrip())

    def save(self, name, **state):
        """Rank 0 writes a checkpoint, atomically; the others wait for it."""
        if not all(value.isfinite().all() for value in state["model"].values()):
            raise UserError(f"step {self.step}: a weight is not finite; lower --lr")
        part = self.folder / f"{name}.part"
        if RANK == 0:
            state |= {"script": SCRIPT, "config": vars(self.cfg), "step": self.step, "best": self.best,
                      "seconds": time.perf_counter() - self.began,
                      "log_bytes": (self.folder / "log.jsonl").stat().st_size}
            buffer = io.BytesIO()
            torch.save(state, buffer)
            with part.open("wb") as file:  # a full disk or a kill leaves the old checkpoint whole
                file.write(buffer.getbuffer())
                os.fsync(file.fileno())
            os.replace(part, self.folder / name)
        all_sum(torch.zeros(1, device=self.device)).item()  # waits for rank 0
        if name == "last.pt":
            self.saved = self.step
        self.last_log = time.perf_counter(), self.step  # the time of the evaluation does not count

    def finish(self, figures):
        """Logs the test figures, and prints the last line."""
        self.write("test", figures)
        minutes = (time.perf_counter() - self.began) / 60
        memory = f" | {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if self.device.type == "cuda" else ""
        say(f"written: {self.folder}\nfinal test {show(figures)} | {minutes:.1f} min{memory}")


def show(figures, between=", ", digits=5, width=0):
    """The numbers of {name: value} as text, such as "loss 0.12345, images/s 19,850"."""
    texts = {name: f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
             for name, value in figures.items() if isinstance(value, (int, float))}
    return between.join(f"{name} {text:{width}}" for name, text in texts.items())
# ---- end of runtime ----


# MAIN -------------------------------------------------------------------------------------------------------
@one_line_errors()
def main(argv=None):
    mode, inputs, flags = parse_args(argv)
    if mode != "train":
        return predict(mode, inputs, flags)
    run = Run(flags)
    cfg, ckpt, device = run.cfg, run.ckpt, run.device
    if cfg.weights == "none" and not ckpt:
        typed = PRESETS.get(cfg.data, {}) | flags
        vars(cfg).update({name: value for name, value in SCRATCH.items() if name not in typed})

    data = load_data(cfg, ckpt.get("classes"))
    items, classes = data["train"], data["classes"]
    count = min(cfg.batch_size, len(items))  # of a batch
    if count < WORLD:
        raise UserError(f"--batch_size {count}: fewer images a step than the {WORLD} processes")
    per_epoch = len(items) // count
    schedule = per_epoch * cfg.epochs
    total = min(cfg.max_steps or schedule, schedule)
    say(f"images: {len(items):,} train, {len(data['val']):,} val, {len(data['test']):,} test; classes: "
        f"{', '.join(classes)}; steps: {total:,}")

    torch.manual_seed(cfg.seed)
    raw = build(cfg, classes, device, trained=bool(ckpt))
    if cfg.init and not ckpt:
        load_weights(raw, load_checkpoint(cfg.init)["model"])
    learnt = [p for p in raw.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learnt if p.dim() >= 2], "weight_decay": 0.05},
              {"params": [p for p in learnt if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, cfg.lr, fused=True)
    if ckpt:
        raw.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
    if cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda" and sys.platform == "linux"):
        say("compiling in the first step, which takes a minute or two")
        raw.backbone.compile()  # in place; the rest of a detector breaks the graph at every image
    model = nn.parallel.DistributedDataParallel(raw, broadcast_buffers=False) if WORLD > 1 else raw
    norms = [module for module in raw.modules() if isinstance(module, nn.BatchNorm2d)]  # of COCO weights
    change = augmentation(cfg.augment)
    ratios = [item["size"][0] / item["size"][1] for item in items]

    @functools.lru_cache(1)
    def order(epoch):
        return arrange(ratios, count, seed_for(cfg.seed, epoch))

    def fetch(step):
        """This rank's share of the batch of a step, which counts from 1: images and targets."""
        epoch, place = divmod(step - 1, per_epoch)
        torch.manual_seed(seed_for(cfg.seed, step, RANK))  # for torchvision's sampling of boxes, too
        batch = []
        for i in order(epoch)[place][RANK::WORLD]:
            x = items[i]["image"].to(device)
            boxes = tv_tensors.BoundingBoxes(items[i]["boxes"], format="XYXY", canvas_size=x.shape[1:])
            x, target = change(x, {"boxes": boxes, "labels": items[i]["labels"]})
            batch.append((x, {key: value.to(device) for key, value in target.items()}))
        return zip(*batch)

    def update(step, batch):
        """One optimizer step; returns the parts of the loss."""
        x, targets = map(list, batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, schedule)
        raw.train()
        for norm in norms:  # they keep their statistics: those of a few images are worse
            norm.eval()
        share = len(x) * WORLD / count  # DDP averages over the processes
        parts = {name.removeprefix("loss_"): value * share for name, value in model(x, targets).items()}
        loss = sum(parts.values())  # equation 1 of the proposals, and that of Fast R-CNN for the boxes
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        return {"loss": loss, **parts}

    run.start(total)
    for step in range(run.step + 1, total + 1):
        losses = update(step, fetch(step))
        check, save = run.step_done(losses, count, learning_rate(cfg, step, schedule))
        if check:
            figures, _ = evaluate(raw, data["val"], classes, device)
            run.write("val", figures)
            if run.best is None or figures["map"] > run.best:
                run.best = figures["map"]
                run.save("best.pt", model=raw.state_dict(), classes=classes)
        if save:
            run.save("last.pt", model=raw.state_dict(), classes=classes, optimizer=optimizer.state_dict())
        if run.stop:
            return

    raw.load_state_dict(load_checkpoint(run.folder / "best.pt")["model"])
    run.finish(score(raw, data, cfg.threshold, run.folder, device))


def learning_rate(cfg, step, schedule):
    """The lower of a linear warm-up (at most a third of the schedule) and half a cosine down to zero."""
    warmup = max(1, min(cfg.warmup, schedule // 3))
    return cfg.lr * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / schedule))


if __name__ == "__main__":
    main()
