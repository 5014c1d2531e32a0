"""Faster R-CNN: detection of faces with a mask, without one, and with a badly worn one.

    python fasterrcnn_mask.py --data demo                 # generated scenes: no download, no GPU
    python fasterrcnn_mask.py --data face-mask-detection  # fine-tune COCO weights (167 MB on first use)
    python fasterrcnn_mask.py --data face-mask-detection --backbone mobilenet --weights none  # from scratch
    python fasterrcnn_mask.py --data path/to/voc          # your own: images and their VOC annotations
    torchrun --nproc_per_node=8 fasterrcnn_mask.py --data face-mask-detection --batch_size 64 --lr 0.04
    python fasterrcnn_mask.py --data face-mask-detection --resume    # continue a run that was stopped

    python fasterrcnn_mask.py eval                        # test the newest out/fasterrcnn_mask-*/best.pt
    python fasterrcnn_mask.py detect photo.jpg folder --save found --json

Measured on one thread of a CPU (AMD EPYC), other work beside it, from scratch; one run each, seed 0:

    --data demo                   0.966 mAP50, 0.802 mAP on unseen scenes; 4.0 minutes
    --data face-mask-detection    0.395 mAP50, 0.219 mAP on 114 test images, 531 to train; 74 minutes

Fine-tuning from COCO weights has not been measured.

Paper: Ren et al., "Faster R-CNN", 2015, arXiv 1506.01497, on a feature pyramid: Lin et al., 2017, arXiv
1612.03144. From scratch, with group normalisation: He et al., "Rethinking ImageNet Pre-training", 2018, arXiv
1811.08883. Score: Lin et al., "Microsoft COCO", 2014, arXiv 1405.0312. Data: Kaggle,
andrewmvd/face-mask-detection (CC0), unpacked into data/face-mask-detection (images/ and annotations/).
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
import json
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import detection, mobilenet_v3_large
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, box_convert, nms


@dataclass
class Config:
    # the same in all five scripts
    data: str = "auto"  # demo, face-mask-detection or a VOC folder; auto: one in data/, or demo
    out: str = ""  # folder of the run (default: out/SCRIPT-DATA)
    save: str = ""  # folder for predictions (default: the folder of the checkpoint)
    ckpt: str = ""  # checkpoint to test or predict with (default: the newest best.pt in out/SCRIPT-*)
    init: str = ""  # checkpoint whose weights a new run starts from
    resume: bool = False  # continue the run in --out from its last.pt, if there is one
    device: str = "auto"  # auto|cpu|cuda|mps: where to run
    dtype: str = "auto"  # auto|float32|bfloat16: precision of training (autocast); metrics are always float32
    compile: str = "auto"  # auto|on|off: torch.compile; auto: on for CUDA under Linux
    seed: int = 0  # seed of the initial weights, the order of the data, and the noise
    batch_size: int = 8  # images per step, over all processes
    lr: float = 5e-3  # peak learning rate
    max_steps: int = 0  # end the training after this many steps; 0: after all epochs
    max_minutes: float = 0.0  # save and stop after this many minutes; 0: no limit
    eval_every: int = 200  # steps between validations
    save_every: int = 200  # steps between saves of last.pt; each validation saves it, too
    log_every: int = 20  # steps between log lines
    # the task
    backbone: str = "resnet50_v2"  # mobilenet|resnet50|resnet50_v2: torchvision's detector of that name
    weights: str = "coco"  # coco (downloaded by torchvision), none (from scratch), or a file of COCO weights
    image_size: int = 800  # longer side in pixels to which images are resized
    trainable_layers: int = 3  # 0 to 6, stages of a pretrained backbone to train, from the last on
    epochs: int = 20  # passes over the training set
    warmup: int = 200  # 0 to 1000000, steps in which the learning rate rises
    weight_decay: float = 1e-4  # weight decay of matrices and kernels
    augment: float = 1.0  # strength of the augmentation (flip, scale, colour); 0: none
    oversample: int = 2  # times that an image with the rarest class is seen in an epoch
    classes: str = ""  # class names, comma-separated (default: those in the annotations)
    split: int = 0  # seed of the division into training, validation and test set
    threshold: float = 0.0  # score from which a box is drawn; 0: the best one on the validation set
    json: bool = False  # detect: also write boxes.json, in pixels of each image


PRESETS = {"demo": {"backbone": "mobilenet", "weights": "none", "image_size": 128, "batch_size": 4,
                    "epochs": 7, "lr": 0.01, "warmup": 50, "augment": 0.3, "oversample": 1,
                    "eval_every": 175}}
SCRATCH = {"lr": 0.01, "image_size": 400, "epochs": 20, "batch_size": 4}  # with --weights none, unless typed
MODES = {"train": ("", "train, then test (default)"),
         "eval": ("", "test a checkpoint; the detections are written as COCO JSON"),
         "detect": ("IMAGE_OR_FOLDER...", "find the faces in each image, and draw them"),
         "bench": ("", "time the training step")}
UNIT = "images"  # what a batch is counted in
SHAPE = {"backbone", "weights", "classes", "split"}  # what a checkpoint alone decides
CPU_BF16 = False  # measured: no faster than float32


# MODEL ------------------------------------------------------------------------------------------------------
MODELS = {  # torchvision's builder, its COCO weights, and where the stages of the backbone begin
    "mobilenet": (detection.fasterrcnn_mobilenet_v3_large_fpn,
                  detection.FasterRCNN_MobileNet_V3_Large_FPN_Weights.DEFAULT, (0, 2, 4, 7, 13, 16)),
    "resnet50": (detection.fasterrcnn_resnet50_fpn,
                 detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT, (0, 4, 5, 6, 7)),
    "resnet50_v2": (detection.fasterrcnn_resnet50_fpn_v2,
                    detection.FasterRCNN_ResNet50_FPN_V2_Weights.DEFAULT, (0, 4, 5, 6, 7))}


class Backbone(BackboneWithFPN):
    """torchvision's; it alone may train in bfloat16, in which anchors and boxes would move by pixels."""

    bfloat16 = False

    def forward(self, x):
        """(B, 3, H, W) -> {level: map (B, C, H / stride, W / stride)} in float32."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.training and self.bfloat16):
            maps = super().forward(x)
        return {level: features.float() for level, features in maps.items()}


def with_group_norm(module):
    """Replaces every batch norm in place: from scratch a detector has too few images per step for it, and so
    no image's statistics enter another's."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(math.gcd(32, child.num_features), child.num_features))
        with_group_norm(child)
    return module


@torch.no_grad()
def with_strides(model):
    """Tells the RoI pooling the strides of its maps. torchvision takes them from the first image that the
    model sees, for good, and wrongly from one that is flat and padded."""
    maps = model.eval().backbone(torch.zeros(1, 3, 64, 64))
    model.roi_heads.box_roi_pool(maps, [torch.zeros(1, 4)], [(64, 64)])
    return model.train()


def architecture(num_classes, backbone, scratch, image_size):
    """A detector without trained weights: torchvision's own, but for `mobilenet` from scratch.

    There torchvision's two maps have a stride of 32, in which a small face is half a cell. Here they have
    strides of 8 and 16, the pyramid 128 channels, the box head 256 units, and 64 boxes of an image are learnt
    from. One sample per bin of the RoI's 7x7 grid takes a quarter of the time of four on a CPU.
    """
    how = {"min_size": image_size, "max_size": image_size, "_skip_resize": True, "box_score_thresh": 0.01,
           "rpn_score_thresh": 0.0}  # torchvision's mobilenet has 0.05, which may leave nothing to learn from
    if not scratch or backbone != "mobilenet":
        model = MODELS[backbone][0](weights=None, weights_backbone=None, num_classes=num_classes, **how)
        model.backbone.__class__ = Backbone
        if scratch:  # half of the usual sizes, for small faces
            sizes = tuple((size,) for size in (16, 32, 64, 128, 256))
            model.rpn.anchor_generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        elif backbone == "resnet50":  # those weights were made without an epsilon
            for norm in filter(lambda module: isinstance(module, nn.BatchNorm2d), model.modules()):
                norm.eps = 1e-12
        return with_strides(with_group_norm(model) if scratch else model)
    body = Backbone(mobilenet_v3_large().features[:13], {"6": "0", "12": "1"}, [40, 112], 128)
    return with_strides(with_group_norm(FasterRCNN(
        body, box_roi_pool=MultiScaleRoIAlign(["0", "1"], 7, 1), box_head=TwoMLPHead(128 * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, num_classes), box_batch_size_per_image=64,
        rpn_anchor_generator=AnchorGenerator(((10, 16, 25), (40, 63, 100), (150, 220, 320)), ((1.2,),) * 3),
        rpn_batch_size_per_image=64, rpn_pre_nms_top_n_train=500, rpn_post_nms_top_n_train=250,
        rpn_pre_nms_top_n_test=500, rpn_post_nms_top_n_test=300, **how)))


def build_model(num_classes, backbone="resnet50_v2", weights="coco", image_size=800, trainable_layers=3):
    """A Faster R-CNN for `num_classes`, the background included, whose longer image side is `image_size`.

    weights: "coco", "none" (from scratch), or a file of torchvision's weights with its 91 classes: all but
    the box predictor is kept, and of the backbone only the last `trainable_layers` stages stay trainable.
    Raises UserError if there are none. Called as torchvision's detectors are, with images in [0, 1].
    """
    if weights == "none":
        return architecture(num_classes, backbone, True, image_size)
    known, starts = MODELS[backbone][1:]
    try:
        if weights == "coco":
            state = known.get_state_dict(progress=RANK == 0, check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        model = architecture(91, backbone, False, image_size)
        missing, unknown = model.load_state_dict(state, strict=False)
        if unknown or any(not key.endswith("num_batches_tracked") for key in missing):
            raise ValueError(f"{len(missing)} weights are missing, {len(unknown)} unknown")
    except Exception as e:  # no network, no such file, or one that holds anything else
        target = Path(torch.hub.get_dir(), "checkpoints", known.url.split("/")[-1])
        raise UserError(f"--weights {weights}: no weights of {backbone} ({str(e)[:200]}); put {known.url} at "
                        f"{target}, or train from scratch with --weights none") from None
    width = model.roi_heads.box_predictor.cls_score.in_features
    model.roi_heads.box_predictor = FastRCNNPredictor(width, num_classes)
    return freeze(model, starts, trainable_layers)


def freeze(model, starts, trainable_layers):
    """Leaves the last `trainable_layers` stages of the backbone trainable, pyramid and heads anyway."""
    stages = list(model.backbone.body.children())
    fixed = len(stages) if trainable_layers == 0 else starts[max(0, len(starts) - trainable_layers)]
    for stage in stages[:fixed]:
        stage.requires_grad_(False)
    return model


def training_mode(model):
    """Training mode, but pretrained batch norms keep their statistics: those of a few images are worse."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


# DATA -------------------------------------------------------------------------------------------------------
AUTO = {"face-mask-detection": "annotations"}  # what --data auto looks for in data/NAME
REAL = "the real set is Kaggle's andrewmvd/face-mask-detection, unpacked into data/face-mask-detection"


def find_files(folder, pattern="**/*"):
    """Sorted paths in a folder, without hidden files and what operating systems leave behind."""
    junk = re.compile(r"\.|__MACOSX$|Thumbs\.db$|desktop\.ini$", re.I)
    return [p for p in sorted(folder.glob(pattern)) if not any(map(junk.match, p.relative_to(folder).parts))]


def demo_scenes(count, side=128):
    """Generated scenes as (image, boxes, labels): faces of 14 to 52 pixels, among shapes that are none."""
    from PIL import Image, ImageDraw
    rng, names = np.random.default_rng(0), ["with_mask", "without_mask", "mask_weared_incorrect"]
    for _ in range(count):
        a, b = rng.uniform(30, 225, (2, 3))
        ground = a + (b - a) * np.linspace(0, 1, side)[:, None, None] + rng.normal(0, 4, (side, side, 1))
        image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
        image = image.resize((2 * side, 2 * side), Image.Resampling.NEAREST)  # for smooth edges
        pen, boxes, labels = ImageDraw.Draw(image), [], []
        for _ in range(rng.integers(3, 9)):
            x, y, w, h = *rng.uniform(0, 2 * side, 2), *rng.uniform(10, 90, 2)
            shape = pen.rectangle if rng.random() < 0.6 else pen.ellipse
            shape((x, y, x + w, y + h), fill=tuple(rng.integers(20, 236, 3).tolist()))
        for _ in range(rng.integers(1, 6)):
            w = math.exp(rng.uniform(math.log(14), math.log(52)))
            h = w * rng.uniform(1.15, 1.35)
            x, y = rng.uniform(0, side - w), rng.uniform(0, side - h)
            if any(x < r and l < x + w and y < d and u < y + h for l, u, r, d in boxes):
                continue  # faces don't overlap
            draw_face(pen, rng, 2 * x, 2 * y, 2 * w, 2 * h, kind := int(rng.choice(3, p=[0.5, 0.3, 0.2])))
            boxes, labels = [*boxes, (x, y, x + w, y + h)], [*labels, names[kind]]
        yield image.resize((side, side), Image.Resampling.BOX), torch.tensor(boxes), labels


def draw_face(pen, rng, x, y, w, h, kind):
    """A face that fills its box; kind 0 wears a mask over the nose, 1 none, 2 one that leaves it free."""
    def part(shape, left, top, right, bottom, fill):
        shape((x + left * w, y + top * h, x + right * w, y + bottom * h), fill=fill)

    def rgb(values):
        return tuple(np.clip(values, 0, 255).astype(int).tolist())
    skin = rng.uniform(0.35, 1) * np.array([240, 195, 160]) + rng.normal(0, 8, 3)
    part(pen.ellipse, 0, 0, 1, 1, rgb(skin))
    pen.chord((x, y, x + w, y + h), 200, 340, fill=rgb(rng.uniform(0, 1) * np.array([110, 80, 50])))
    for left in (0.24, 0.62):
        part(pen.ellipse, left, 0.36, left + 0.14, 0.45, (20, 20, 30))
    part(pen.ellipse, 0.43, 0.46, 0.57, 0.64, rgb(0.55 * skin))  # the nose
    if kind == 1:
        return part(pen.ellipse, 0.3, 0.72, 0.7, 0.82, (170, 50, 60))
    top, cloth = (0.48, 0.67)[kind == 2], [(235, 240, 245), (120, 180, 225), (40, 40, 45), (110, 190, 140)]
    corners = [(0.06, top), (0.94, top), (0.86, 0.82), (0.62, 0.99), (0.38, 0.99), (0.14, 0.82)]
    pen.polygon([(x + u * w, y + v * h) for u, v in corners], fill=cloth[rng.integers(4)])


def read_voc(path):
    """A VOC annotation: {"boxes": (N, 4) xyxy pixels, "labels": names, "size": (W, H) or None}. Boxes come as
    they stand, counted from 0; an image without objects is one without faces. Raises UserError if it is no
    such file."""
    try:
        text = Path(path).read_bytes()
        if re.search(rb"<!DOCTYPE|<!ENTITY|\0", text):  # an entity could expand to gigabytes
            raise ValueError("it has a DTD, or is not UTF-8")
        root = ElementTree.fromstring(text)
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>, not <annotation>")
        found = [(thing.findtext("name").strip(), [float(thing.findtext(f"bndbox/{edge}"))
                                                   for edge in ("xmin", "ymin", "xmax", "ymax")])
                 for thing in root.iter("object")]
        if not all(map(math.isfinite, sum((box for _, box in found), []))):
            raise ValueError("a coordinate is not finite")
        if not all(name for name, _ in found):
            raise ValueError("an object has no name")
        size = tuple(int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError,
            ElementTree.ParseError) as e:
        raise UserError(f"{path}: not a VOC annotation ({e})") from None
    boxes = torch.tensor([box for _, box in found]).reshape(-1, 4)
    return {"boxes": boxes, "labels": [name for name, _ in found], "size": size if all(size) else None}


def read_image(path, size=None):
    """An image file as RGB, turned upright as its EXIF data say, unless only as stored it has the `size` that
    its boxes were drawn on."""
    from PIL import Image, ImageOps
    with Image.open(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if size and image.size == size != upright.size:
            upright = image
        if upright.mode[0] in "IF":  # more than 8 bits, which convert("RGB") would clip
            values = np.asarray(upright, float).clip(0)
            upright = Image.fromarray((values * 255 / max(1, values.max())).astype(np.uint8))
        return upright.convert("RGB")


def prepare(image, side, name="", boxes=torch.zeros(0, 4), labels=()):
    """What the model sees of an image, uint8 (3, h, w) whose longer side is `side`, and what is known of it:
    boxes in the image's own pixels, and `scale` (4,) from those to the model's."""
    size = [max(1, round(v * side / max(image.size))) for v in image.size]
    pixels = np.array(image.resize(size) if tuple(size) != image.size else image)
    scale = torch.tensor([size[0] / image.width, size[1] / image.height]).repeat(2)
    return {"image": torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), "boxes": boxes, "labels": labels,
            "scale": scale, "size": image.size, "name": name}


def voc_scenes(folder, side):
    """Items of all annotated images under `folder`: annotations NAME.xml, images NAME.* of any format."""
    from PIL import Image
    kinds = Image.registered_extensions()
    files = [p for p in find_files(folder) if p.suffix.lower() in kinds]
    images, annotations = {p.stem: p for p in files}, find_files(folder, "**/*.xml")
    if not annotations:
        raise UserError(f"{folder}: no annotations NAME.xml in it; data/README.md shows the layout")
    stems = {p.stem for p in annotations}
    for paths in annotations, [p for p in files if p.stem in stems]:
        if twice := [stem for stem, n in Counter(p.stem for p in paths).items() if n > 1]:
            first = ", ".join(str(p) for p in paths if p.stem == twice[0])
            raise UserError(f"{folder}: {len(twice)} names are there twice, as {first}; rename or move them")
    items, bad, mended = [], [], []
    for path in annotations:
        stem = path.stem
        try:
            if stem not in images:
                raise UserError(f"{path}: no image of that name")
            truth = read_voc(path)
            item = prepare(read_image(images[stem], truth["size"]), side, images[stem].name)
            if truth["size"] not in (None, item["size"]):
                raise UserError(f"{path}: made for {truth['size']} pixels, {images[stem]} has {item['size']}")
        except Exception as e:  # a damaged image can raise nearly anything
            bad.append(str(e) if isinstance(e, UserError) else f"{images[stem]}: {type(e).__name__}")
            continue
        boxes = truth["boxes"].clamp(min=0)
        boxes = boxes.minimum(torch.tensor(item["size"]).repeat(2))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        if not torch.equal(boxes, truth["boxes"]) or not keep.all():
            mended.append(f"{path.name} ({int((~keep).sum())} dropped)")
        labels = [name for name, kept in zip(truth["labels"], keep) if kept]
        items.append(item | {"boxes": boxes[keep], "labels": labels, "path": path})
    for what, names in (("annotations or images are unreadable, skipped", bad), ("images have no annotation",
                        sorted(images[s].name for s in set(images) - {p.stem for p in annotations})),
                        ("annotations have boxes outside the image or empty, clipped or dropped", mended)):
        if names:
            say(f"note: {len(names)} {what}: {'; '.join(names[:5])}")
    if len(items) < max(1, 19 * len(bad)):  # none, or more than 5 % of them bad
        raise UserError(f"{folder}: {len(bad)} of {len(annotations)} annotations, or their images, are "
                        f"unreadable (limit: 5 %): {'; '.join(bad[:2])}")
    return items


def divide(kinds, seed):
    """{"train", "val", "test": indices}: 70, 15 and 15 %, stratified by the rarest class of an image. `kinds`
    is {name: labels}; a hash orders the names, so that files of the same names are divided the same on every
    machine."""
    counts, groups = Counter(label for labels in kinds.values() for label in set(labels)), defaultdict(list)
    for place, (name, labels) in enumerate(kinds.items()):
        rarest = min(labels, key=lambda label: (counts[label], label), default="")
        groups[rarest].append((seed_for(seed, name), place))
    parts = {"train": [], "val": [], "test": []}
    for group in groups.values():
        for i, (_, place) in enumerate(sorted(group)):
            share = (i + 0.5) / len(group)
            parts["train" if share < 0.7 else "val" if share < 0.85 else "test"].append(place)
    return {name: sorted(places) for name, places in parts.items()}


def load_data(cfg, classes=None):
    """{"train", "val", "test": lists of what `prepare` returns, "classes": names}; labels count from 1."""
    folder = Path("data", cfg.data) if cfg.data in AUTO else Path(cfg.data)
    if cfg.data == "demo":
        items = [prepare(image, cfg.image_size, f"scene{i:04}", boxes, labels)
                 for i, (image, boxes, labels) in enumerate(demo_scenes(800))]
    elif folder.is_dir():
        items = voc_scenes(folder, cfg.image_size)
    else:
        raise UserError(f"--data {cfg.data}: no such folder, and not demo; {REAL}")
    found = sorted({label for item in items for label in item["labels"]})
    classes = classes or [name.strip() for name in cfg.classes.split(",") if name.strip()] or found
    for item in items:
        for label in {*item["labels"]} - {*classes}:
            raise UserError(f"{item.get('path', cfg.data)}: unknown class {label!r}; known are "
                            f"{', '.join(classes)}, of the checkpoint or --classes")
    parts = divide({item["name"]: item["labels"] for item in items}, cfg.split)
    for item in items:
        labels = [1 + classes.index(label) for label in item["labels"]]
        item["labels"] = torch.tensor(labels, dtype=torch.long)
    if not classes or not all(parts.values()):
        raise UserError(f"--data {cfg.data}: {len(items)} images, {len(found)} classes; it takes 10, and one")
    return {**{name: [items[i] for i in places] for name, places in parts.items()}, "classes": classes}


class Batches:
    """Training images in batches of about the same aspect ratio, in an order that changes with each epoch."""

    def __init__(self, items, size, oversample, strength, device):
        fits = sum(item["image"].nbytes for item in items) < 4e9
        self.items = [item | {"image": item["image"].to(device if fits else "cpu")} for item in items]
        labels = torch.cat([item["labels"] for item in items]).bincount()
        rarest = min(((n, label) for label, n in enumerate(labels.tolist()) if n), default=(0, 0))[1]
        alone = (labels > 0).sum() < 2  # a single class is not rare
        rare = [i for i, item in enumerate(items) if not alone and (item["labels"] == rarest).any()]
        self.places = np.array([*range(len(items)), *rare * max(0, oversample - 1)])
        self.size, self.strength, self.device = min(size, len(self.places)), strength, device
        self.per_epoch = len(self.places) // self.size

    @functools.lru_cache(1)
    def order(self, seed, epoch):
        rng = np.random.default_rng(seed_for(seed, epoch))
        chosen = rng.permutation(self.places)[: self.per_epoch * self.size]
        ratios = np.array([self.items[i]["image"].shape[1] / self.items[i]["image"].shape[2] for i in chosen])
        alike = chosen[np.argsort(ratios * rng.uniform(1, 1.1, len(chosen)), kind="stable")]
        return rng.permutation(alike.reshape(self.per_epoch, self.size))

    def get(self, seed, step):
        """This rank's share of the batch of a step, which counts from 1: images, targets, and its weight."""
        epoch, place = divmod(step - 1, self.per_epoch)
        whole = self.order(seed, epoch)[place]
        mine = whole[RANK::WORLD]
        weight = len(mine) * WORLD / len(whole)  # 0 for a process without an image of its own
        items = [self.items[i] for i in (mine if len(mine) else whole[:1])]
        images, boxes, labels = augment([item["image"] for item in items],
                                        [item["boxes"] * item["scale"] for item in items],
                                        [item["labels"] for item in items], self.strength, self.device)
        targets = [{"boxes": b.to(self.device), "labels": n.to(self.device)} for b, n in zip(boxes, labels)]
        return list(images), targets, weight


def augment(images, boxes, labels, strength, device):
    """Flips, scales, shifts and colours each image by itself: lists of uint8 (3, h, w), (N, 4), (N,) -> float
    (B, 3, H, W) in [0, 1] on the device, boxes, labels. A box of which 60 % come to lie outside is dropped.

    An image pixel x comes to s x' + t, x' being x or, flipped, w - x; the grid goes the other way.
    """
    n, (height, width) = len(images), np.max([image.shape[1:] for image in images], 0)
    height, width = (math.ceil(v / 32) * 32 for v in (height, width))
    sizes = torch.tensor([image.shape[:0:-1] for image in images], dtype=torch.float)  # (B, 2): w, h
    canvas = torch.tensor([width, height], dtype=torch.float)
    draws = torch.rand(n, 7)  # on the CPU, where the boxes are
    scale = torch.exp(0.6 * strength * (2 * draws[:, :1] - 1))  # (B, 1): 0.55 to 1.8 at full strength
    shift = draws[:, 1:3] * (canvas - scale * sizes) * min(1, strength)  # crops, or leaves a margin
    flip = (draws[:, 3] < 0.5 * min(1, strength)).float()
    sign = torch.stack([1 - 2 * flip, torch.ones(n)], 1)  # (B, 2)
    start = torch.stack([flip * sizes[:, 0], torch.zeros(n)], 1)
    offset = 2 * start / canvas - 1 + sign * (1 - 2 * shift / canvas) / scale
    theta = torch.cat([torch.diag_embed(sign / scale), offset[:, :, None]], 2).to(device)  # (B, 2, 3)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]  # what lies outside an image
    x = torch.zeros(n, 3, height, width, device=device)
    for row, image in zip(x, images):
        row[:, : image.shape[1], : image.shape[2]] = image.to(device).float() / 255 - mean
    if strength:
        x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    x = x + mean
    light, contrast, colour = (1 + 0.4 * strength * (2 * draws[:, 4:, None, None] - 1)).to(device).split(1, 1)
    x = x * light
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast)
    x = torch.lerp(x.mean(1, keepdim=True), x, colour).clamp(0, 1)
    kept_boxes, kept_labels = [], []
    for i, (old, label) in enumerate(zip(boxes, labels)):
        corners = start[i] + sign[i] * old.reshape(-1, 2, 2)
        new = scale[i] * corners.sort(1).values + shift[i]  # (N, 2, 2)
        inside = new.clamp(min=0).minimum(canvas)
        extent, seen = (new[:, 1] - new[:, 0]), (inside[:, 1] - inside[:, 0])
        keep = (seen.prod(1) > 0.4 * extent.prod(1)) & (seen > 1).all(1)
        kept_boxes, kept_labels = [*kept_boxes, inside[keep].flatten(1)], [*kept_labels, label[keep]]
    return x, kept_boxes, kept_labels


# METRICS ----------------------------------------------------------------------------------------------------
IOUS = np.linspace(0.5, 0.95, 10)


def pairwise_iou(found, true, crowd):
    """IoU of boxes (D, 4), (G, 4) -> (D, G) as COCO has it: with a crowd, the share of the found box."""
    found, true = ((b[:, :2], b[:, 2:] - b[:, :2]) for b in (np.asarray(b, float) for b in (found, true)))
    ends = [start + extent for start, extent in (found, true)]
    both = np.minimum(ends[0][:, None], ends[1]) - np.maximum(found[0][:, None], true[0])
    both = both.clip(0).prod(2)
    area = found[1].prod(1)[:, None]
    union = np.where(crowd, area, area + true[1].prod(1) - both)
    return both / np.maximum(union, 1e-300)


def match(predictions, targets, label):
    """All boxes found of one class, best first: scores (N,); at the ten IoUs whether each is right (10, N),
    and whether it does not count (10, N), being in a crowd; and the number of true boxes.

    In each image the 100 best take, in their order, the free true box of the highest IoU, of equals the last.
    """
    scores, right, void, count = [], [], [], 0
    for found, true in zip(predictions, targets):
        mine = np.asarray(true["labels"]) == label
        crowd = np.asarray(true.get("iscrowd", np.zeros(len(mine))), bool)[mine]
        order = np.argsort(crowd, kind="stable")  # crowds come last
        crowd, true_boxes = crowd[order], np.asarray(true["boxes"]).reshape(-1, 4)[mine][order]
        count += int((~crowd).sum())
        mine = np.flatnonzero(np.asarray(found["labels"]) == label)
        score = np.asarray(found["scores"], float)[mine]
        best = np.argsort(-score, kind="stable")[:100]
        hit, skip = np.zeros((2, 10, len(best)), bool)
        if len(best) and len(crowd):
            iou = pairwise_iou(np.asarray(found["boxes"])[mine[best]], true_boxes, crowd)
            free, rows = np.ones((10, len(crowd)), bool), np.arange(10)
            for i in np.flatnonzero(iou.max(1) >= IOUS[0]):
                open_to = (iou[i] >= IOUS[:, None]) & (free | crowd)  # (10, G)
                rank = np.where(open_to, iou[i] + 2 * ~crowd, -1)[:, ::-1]  # a true box goes before any crowd
                taken = len(crowd) - 1 - rank.argmax(1)
                matched = open_to.any(1)
                hit[:, i], skip[:, i] = matched & ~crowd[taken], matched & crowd[taken]
                free[rows[matched], taken[matched]] = False
        scores, right, void = [*scores, score[best]], [*right, hit], [*void, skip]
    scores = np.concatenate(scores or [np.zeros(0)])
    order = np.argsort(-scores, kind="stable")
    right, void = (np.concatenate(part or [np.zeros((10, 0), bool)], 1)[:, order] for part in (right, void))
    return scores[order], right, void, count


def precision_recall(right, void, count):
    """(10, N) twice -> precision and recall (10, N) of the N best boxes, for each N."""
    hits, misses = right.cumsum(1), (~right & ~void).cumsum(1)
    return hits / np.maximum(hits + misses, 1e-9), hits / max(1, count)


def coco_map(predictions, targets):
    """COCO's figures as pycocotools computes them. Lists of torchvision's dicts: boxes (n, 4) xyxy, labels
    (n,), scores (n,), or for targets perhaps iscrowd (n,). -> {"map" (the mean over IoUs of 0.5 to 0.95),
    "map50", "map75", "mar100", "map_per_class", "map50_per_class": {id: figure}}. A class without a true box
    has -1 and is left out of the means. Raises ValueError if the lists differ in length."""
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    ap, ar, without = {}, {}, np.full(10, -1.0)  # at the ten IoUs
    for label in sorted({int(v) for part in (*predictions, *targets) for v in part["labels"]}):
        _, right, void, count = match(predictions, targets, label)
        precision, recall = precision_recall(right, void, count)
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]  # the best from this recall on
        padded = np.pad(precision, ((0, 0), (0, 1)))  # 0 where a recall is never reached
        places = (np.searchsorted(row, np.linspace(0, 1, 101)) for row in recall)
        ap[label] = np.array([row[at].mean() for row, at in zip(padded, places)]) if count else without
        ar[label] = recall[:, -1:].sum(1) if count else without  # a sum, since there may be no box at all
    means, recalls = (np.mean([v for v in part.values() if v[0] >= 0] or [without], 0) for part in (ap, ar))
    return {"map": float(means.mean()), "map50": float(means[0]), "map75": float(means[5]),
            "mar100": float(recalls.mean()), "map_per_class": {k: float(v.mean()) for k, v in ap.items()},
            "map50_per_class": {k: float(v[0]) for k, v in ap.items()}}


def best_threshold(predictions, targets, classes):
    """The score at which detections of all classes together have the highest F1, at an IoU of 0.5."""
    parts = [match(predictions, targets, label) for label in range(1, 1 + len(classes))]
    scores = np.concatenate([scores for scores, *_ in parts])
    order = np.argsort(-scores, kind="stable")
    right, void = (np.concatenate([part[i] for part in parts], 1)[:1, order] for i in (1, 2))
    precision, recall = precision_recall(right, void, sum(count for *_, count in parts))
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return float(scores[order][f1[0].argmax()]) if len(scores) else 0.5


# EVALUATE, PREDICT ------------------------------------------------------------------------------------------
COLOURS = ["#d98200", "#00964a", "#e8272c", "#3f7cff", "#c04ce0", "#00b8c4", "#ff7bac", "#8c6239"]


@torch.no_grad()
def detections(model, items, device):
    """[{"boxes" (n, 4) in the image's own pixels, "scores" (n,), "labels" (n,)}] of each item, on the CPU;
    each process does its share. Only images of equal shape share a batch: padding changes what is found."""
    model.eval()
    shapes = defaultdict(list)
    for i, item in enumerate(items):
        shapes[item["image"].shape].append(i)
    batches = [group[k : k + 8] for group in shapes.values() for k in range(0, len(group), 8)]
    table = torch.zeros(len(items), model.roi_heads.detections_per_img, 6, device=device)
    for batch in batches[RANK::WORLD]:
        found = model([items[i]["image"].to(device).float() / 255 for i in batch])
        for i, f in zip(batch, found):
            boxes = f["boxes"] / items[i]["scale"].to(device)
            table[i, : len(boxes)] = torch.cat([boxes, f["scores"][:, None], f["labels"][:, None]], 1)
    rows = [row[row[:, 5] > 0] for row in all_sum(table).cpu()]  # no box has label 0
    return [{"boxes": row[:, :4], "scores": row[:, 4], "labels": row[:, 5].long()} for row in rows]


def evaluate(model, items, classes, device):
    """(figures, detections) of items with true boxes."""
    found = detections(model, items, device)
    figures = coco_map(found, items)
    for kind in ("map_per_class", "map50_per_class"):
        figures[kind] = {name: figures[kind].get(i, -1.0) for i, name in enumerate(classes, 1)}
    return {"map50": figures["map50"], **figures}, found


def write_coco(folder, items, found, classes):
    """detections.json and truth.json, which pycocotools reads: COCO(truth).loadRes(detections), if any."""
    def rows(number, part):
        boxes = box_convert(part["boxes"].double(), "xyxy", "xywh").tolist()
        for box, label in zip(boxes, part["labels"].tolist()):
            area = box[2] * box[3]
            yield {"image_id": number, "category_id": label, "bbox": box, "area": area, "iscrowd": 0}
    truth, results = [], []
    for number, (item, f) in enumerate(zip(items, found), 1):
        truth += [row | {"id": len(truth) + i} for i, row in enumerate(rows(number, item), 1)]
        results += [row | {"score": value} for row, value in zip(rows(number, f), f["scores"].tolist())]
    images = [{"id": number, "file_name": item["name"], "width": item["size"][0], "height": item["size"][1]}
              for number, item in enumerate(items, 1)]
    names = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    whole = {"images": images, "annotations": truth, "categories": names}
    (folder / "truth.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "detections.json").write_text(json.dumps(results), encoding="utf-8")


def score(model, data, threshold, folder, device):
    """The figures of the test images; writes what is found as COCO JSON, and draws it."""
    figures, found = evaluate(model, data["test"], data["classes"], device)
    if RANK == 0:
        write_coco(folder, data["test"], found, data["classes"])
        draw(data["test"], found, data["classes"], threshold, folder)
    for kind in ("map", "map50"):
        figures |= {f"{kind}_{name}": value for name, value in figures.pop(f"{kind}_per_class").items()}
    return figures | {"n": len(data["test"])}


def drawn(image, boxes, labels, classes, scores=None):
    """A copy of a PIL image with named boxes in the colour of their class; a small image is enlarged."""
    from PIL import ImageDraw, ImageFont
    times = max(1, round(800 / max(image.size)))
    image = image.resize([times * v for v in image.size])
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(max(12, max(image.size) // 36))
    for i, (box, label) in enumerate(zip((times * boxes).tolist(), labels.tolist())):
        colour, words = COLOURS[(label - 1) % 8], classes[label - 1].replace("_", " ")
        words += "" if scores is None else f" {scores[i]:.2f}"
        pen.rectangle(box, outline=colour, width=max(2, max(image.size) // 250))
        left = max(0, min(box[0], image.width - font.getlength(words)))  # the words stay inside
        place = left, max(0, box[1] - 1.2 * font.size)
        pen.rectangle(pen.textbbox(place, words, font), fill=colour)
        pen.text(place, words, "white", font)
    return image


def sure(found, threshold):
    """The boxes from a score on; of some over each other only the best, since a face is of one class."""
    found = {key: value[found["scores"] >= threshold] for key, value in found.items()}
    keep = nms(found["boxes"], found["scores"], 0.5)
    return {key: value[keep] for key, value in found.items()}


def draw(items, found, classes, threshold, folder):
    """examples.png: truth beside detections for the best, the median and the worst test image; pr.png:
    precision against recall of each class, with the point of the threshold."""
    from PIL import Image
    worth = [coco_map([f], [item])["map"] for f, item in zip(found, items)]
    order = [i for i in np.argsort(worth).tolist() if worth[i] >= 0]  # without those that have no face
    if order and (figure := new_figure(11, 13)):
        for row, (word, at) in enumerate((("best", -1), ("median", len(order) // 2), ("worst", 0))):
            item, f = items[order[at]], sure(found[order[at]], threshold)
            image = Image.fromarray(item["image"].permute(1, 2, 0).cpu().numpy())
            titles = f"{word} ({item['name']}): truth", f"found, mAP {worth[order[at]]:.2f}"
            for column, (title, part) in enumerate(zip(titles, (item, f)), 1):
                axes = figure.add_subplot(3, 2, 2 * row + column)
                axes.set_title(title, parse_math=False)
                boxes = part["boxes"] * item["scale"]
                picture = drawn(image, boxes, part["labels"], classes, part.get("scores"))
                axes.imshow(np.asarray(picture))
                axes.axis("off")
        figure.savefig(folder / "examples.png", dpi=130)
    if figure := new_figure(7, 6):
        axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02),
                                  title=f"{len(items)} test images, IoU 0.5; dots: score {threshold:.2f}")
        for label, name in enumerate(classes, 1):
            scores, right, void, count = match(found, items, label)
            precision, recall = (part[0] for part in precision_recall(right, void, count))
            text = f"{name} ({count} faces)".replace("$", r"\$")
            axes.plot(recall, precision, color=COLOURS[(label - 1) % 8], label=text)
            if at := int((scores >= threshold).sum()):
                axes.plot(recall[at - 1], precision[at - 1], "o", color=COLOURS[(label - 1) % 8])
        figure.legend(loc="outside lower center", ncols=2)
        figure.savefig(folder / "pr.png", dpi=100)


def build(cfg, classes, device, trained=False):
    """The model of a Config; `trained` if its weights come from a checkpoint."""
    count = 1 + len(classes)
    if trained:
        model = architecture(count, cfg.backbone, cfg.weights == "none", cfg.image_size)
        if cfg.weights != "none":
            freeze(model, MODELS[cfg.backbone][2], cfg.trainable_layers)
    else:
        if cfg.weights != "none":
            say(f"weights: {MODELS[cfg.backbone][1].url if cfg.weights == 'coco' else cfg.weights}")
        model = build_model(count, cfg.backbone, cfg.weights, cfg.image_size, cfg.trainable_layers)
    model.compile = model.backbone.compile  # the rest of a detector breaks the graph at every image
    model.backbone.bfloat16 = cfg.dtype == "bfloat16"
    return model.to(device)  # not channels-last: 1.6 times slower on a CPU


def detect(model, cfg, ckpt, inputs, folder, device):
    """Draws what is found in each image as a PNG in `folder`; 64 images are held at a time."""
    from PIL import Image
    kinds, paths = Image.registered_extensions(), []
    for path in map(Path, inputs):
        inside = [p for p in find_files(path) if p.suffix.lower() in kinds]
        paths += inside if path.is_dir() else [path]
    bad, rows, seconds, taken = [], [], 0.0, {path.resolve() for path in paths}
    threshold = cfg.threshold or ckpt["threshold"]
    for start in range(0, len(paths), 64):
        items, images = [], []
        for path in paths[start : start + 64]:
            try:
                image = read_image(path)
                items, images = [*items, prepare(image, cfg.image_size, str(path))], [*images, image]
            except Exception as e:  # a damaged image can raise nearly anything
                bad.append(f"{path} ({type(e).__name__})")
        began = time.perf_counter()
        found = detections(model, items, device)
        seconds += time.perf_counter() - began
        for item, image, f in zip(items, images, found):
            f, target, number = sure(f, threshold), folder / f"{Path(item['name']).stem}.png", 1
            names = [ckpt["classes"][label - 1] for label in f["labels"].tolist()]
            counts = ", ".join(f"{n} {name}" for name, n in Counter(names).items())
            say(f"{item['name']}: {counts or 'nothing found'}")
            for name, value, box in zip(names, f["scores"].tolist(), f["boxes"].tolist()):
                rows.append({"file": item["name"], "class": name, "score": value, "box": box})
            while target.resolve() in taken:  # never over an input, nor over another's picture
                number += 1
                target = folder / f"{Path(item['name']).stem}-{number}.png"
            taken.add(target.resolve())
            if RANK == 0:
                drawn(image, f["boxes"], f["labels"], ckpt["classes"], f["scores"]).save(target)
    if bad:
        say(f"note: {len(bad)} of {len(paths)} images are unreadable, skipped: {', '.join(bad[:5])}")
    if len(bad) == len(paths):
        raise UserError(f"{' '.join(inputs)}: there is no readable image")
    if cfg.json and RANK == 0:
        (folder / "boxes.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    count = len(paths) - len(bad)
    say(f"images: {count}, at {count / seconds:.1f}/s; boxes from score {threshold:.2f} on")


def predict(mode, inputs, flags):
    """Every mode that uses a trained model."""
    cfg, ckpt, device, folder = open_checkpoint(flags)
    model = build(cfg, ckpt["classes"], device, trained=True)
    model.load_state_dict(ckpt["model"])
    if mode == "eval":
        data = load_data(cfg, ckpt["classes"])
        say(show(score(model, data, cfg.threshold or ckpt["threshold"], folder, device), digits=6))
    else:
        detect(model, cfg, ckpt, inputs, folder, device)
    say(f"written: {folder}/*.png{' and *.json' if mode == 'eval' or cfg.json else ''}")


# ---- runtime: identical in all five scripts ----
SCRIPT = Path(__file__).stem
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
MAY_CHANGE = {"out", "save", "resume", "device", "compile", "max_steps", "max_minutes", "save_every",
              "log_every"}  # when a run is resumed


class UserError(Exception):
    """An error that the user can fix: printed as one `error:` line, exit status 2."""


@contextlib.contextmanager
def one_line_errors():
    """Decorates main: prints errors that the user can fix as one line, and restores the signal handlers."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)} if in_main_thread else {}
    try:
        yield
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        hint = "lower --batch_size: " if isinstance(e, torch.OutOfMemoryError) else ""
        print("error:", hint + " ".join(str(e).split()), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # outside the training loop, where a signal waits for a save
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def say(text):
    """Prints a line, on rank 0."""
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
    """The command line as (mode, inputs, flags); flags holds only the options that were given. Each field of
    Config is an option; its comment is the help, and may begin with choices (a|b|c) or a range (0 to 1)."""
    def refuse(message):
        raise UserError(f"{message}; see python {SCRIPT}.py --help")

    examples = (__doc__ or "").split("\n\nMeasured")[0]
    modes = "\n".join(f"  {mode + ' ' + usage:28}{text}" for mode, (usage, text) in MODES.items())
    presets = "\n".join(" ".join([f"  --data {data}:", *(f"--{k} {v}" for k, v in preset.items())])
                        for data, preset in PRESETS.items())
    parser = argparse.ArgumentParser(
        usage=f"python {SCRIPT}.py [MODE] [INPUT ...] [--flag value ...]", allow_abbrev=False,
        description=f"{examples}\n\nmodes:\n{modes}", epilog=f"defaults that depend on --data:\n{presets}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 30, 110),
        argument_default=argparse.SUPPRESS)
    parser.error = refuse
    parser.add_argument("words", nargs="*", default=[], help=argparse.SUPPRESS)
    group = parser.add_argument_group("flags of all five scripts [default]")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.M))
    for name, comment in comments.items():
        default, choices = getattr(Config, name), re.match(r"\w+(\|\w+)+", comment)
        options = {"type": type(default), "choices": choices[0].split("|") if choices else None,
                   "metavar": type(default).__name__.upper()}
        if default is False:
            options = {"action": "store_true"}
        text = f"{comment} [{default}]" if str(default) not in ("", "False") else comment
        group.add_argument(f"--{name}", help=text.replace("%", "%%"), **options)
        if name == "log_every":  # the last flag that all scripts have
            group = parser.add_argument_group(f"flags of {SCRIPT}.py [default]")
    words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)
             for word in (sys.argv[1:] if argv is None else argv)]  # --max-steps is --max_steps
    flags = vars(parser.parse_intermixed_args(words))
    mode, *inputs = flags.pop("words") or ["train"]
    for name, value in flags.items():
        low, high = int(type(value) is int and getattr(Config, name) > 0), 1e12  # of a count at least 1
        if limits := re.match(r"([\d.]+) to ([\d.]+), ", comments[name]):
            low, high = map(float, limits.groups())
        if type(value) in (int, float) and not low <= value <= high:
            refuse(f"--{name} {value}: must be {low:g} to {high:g}")
    if mode not in MODES:
        refuse(f"unknown mode {mode!r}, must be {', '.join(MODES)}")
    usage = MODES[mode][0]  # "FILE", "[FILE]" if it may be missing, "" without inputs
    if bool(inputs) != bool(usage) and not usage.startswith("["):
        refuse(f"{mode} takes {usage or 'no input'}, not {' '.join(inputs) or 'nothing'}")
    return mode, inputs, flags


def pick_device(cfg):
    """The device of this process. Replaces cfg.dtype "auto", too, and starts the group of a torchrun."""
    mps = torch.backends.mps.is_available() and WORLD == 1
    best = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if cfg.device not in ("auto", "cpu", best):
        raise UserError(f"--device {cfg.device}: not available on this machine; use --device {best}")
    device = torch.device(best if cfg.device == "auto" else cfg.device)
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"more processes than the {count} GPUs here; use --nproc_per_node={count}")
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")  # TF32
        chip, fast = torch.cuda.get_device_name(), torch.cuda.get_device_capability() >= (8, 0)
    else:
        chip, info = f"threads: {torch.get_num_threads()}", Path("/proc/cpuinfo")
        fast = CPU_BF16 and info.exists() and re.search("amx_bf16|avx512_bf16", info.read_text("utf-8"))
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if fast else "float32"
    reason = "bfloat16 is fast here" if fast else "bfloat16 is not fast here"
    say(f"device: {device}; {chip}; processes: {WORLD}; dtype: {cfg.dtype} ({reason})")
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def load_checkpoint(path):
    """The dict that Run.save wrote. UserError if the file is not a checkpoint of this script."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if ckpt["script"] != SCRIPT:
            raise ValueError(f"it was written by {ckpt['script']}.py")
        return ckpt
    except Exception as e:  # a damaged file can raise nearly anything
        problem = f"not a readable checkpoint of {SCRIPT}.py ({type(e).__name__}: {str(e)[:60]})"
        raise UserError(f"{path}: {problem}; train first, or name another file") from None


def load_weights(model, state, path):
    """For --init: copies the weights that fit the model, and names the others."""
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if not fitting:
        raise UserError(f"{path}: none of its weights fits this model")
    if others := sorted((own.keys() | state.keys()) - fitting.keys()):
        say(f"note: not taken from {path}, missing or of another shape: {', '.join(others[:5])}")
    model.load_state_dict(fitting, strict=False)


def merge_config(ckpt, flags, path, fixed):
    """The Config of a checkpoint, updated with flags. UserError if a flag in `fixed` differs from it."""
    flags = {k: v for k, v in flags.items() if v != "auto" or k in MAY_CHANGE}
    for name in sorted(fixed & flags.keys()):
        if flags[name] != ckpt["config"].get(name):
            raise UserError(f"--{name} {flags[name]}: {path} has {ckpt['config'].get(name)}; start a new run")
    known = Config.__dataclass_fields__  # another version of the script may have had other fields
    return Config(**{k: v for k, v in ckpt["config"].items() if k in known} | flags)


def open_checkpoint(flags):
    """(cfg, ckpt, device, output folder) for the modes that use a trained model."""
    newest = max(Path("out").glob(f"{SCRIPT}-*/best.pt"), key=os.path.getmtime, default="")
    if not (flags.get("ckpt") or newest):
        raise UserError(f"no best.pt in out/{SCRIPT}-*; train first, or pass --ckpt FILE")
    path = Path(flags.get("ckpt") or newest)
    ckpt = load_checkpoint(path)
    if any(key.startswith("optimizer") for key in ckpt):
        raise UserError(f"{path}: this is a training state (last.pt); pass the best.pt beside it")
    defaults = {"device": "auto", "dtype": "float32", "ckpt": str(path)}
    cfg = merge_config(ckpt, defaults | flags, path, SHAPE)
    say(f"checkpoint: {path}, step {ckpt['step']} on {ckpt['config']['data']}, best {ckpt['best']:.5g}")
    folder = Path(cfg.save or path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    return cfg, ckpt, pick_device(cfg), folder


class Run:
    """A training run: its Config and folder, the losses since the last log line, the request to stop."""

    def __init__(self, flags, training):
        name = flags.get("data", "auto")
        if name == "auto":
            name = next((n for n, inside in AUTO.items() if Path("data", n, inside).exists()), "demo")
        self.cfg, self.ckpt = Config(**PRESETS.get(name, {}) | flags | {"data": name}), {}
        self.folder = Path(self.cfg.out or f"out/{SCRIPT}-{Path(name).resolve().name}")
        last = self.folder / "last.pt"
        if training and last.exists():
            if not self.cfg.resume:
                raise UserError(f"{self.folder}: holds a run; use --resume to continue it, or another --out")
            self.ckpt = load_checkpoint(last)
            self.cfg = merge_config(self.ckpt, flags, last, Config.__dataclass_fields__.keys() - MAY_CHANGE)
        say(f"data: {self.cfg.data}" + (f" (generated; {REAL})" if self.cfg.data == "demo" else ""))
        self.device, self.began, self.sums = pick_device(self.cfg), time.perf_counter(), 0.0
        self.step, self.best = self.ckpt.get("step", 0), self.ckpt.get("best")
        self.seconds = self.ckpt.get("seconds", 0.0)  # that earlier processes took
        self.stop_requested = self.stop = False  # of this process; agreed on by all
        if training:
            say(f"run: {self.folder}, from step {self.step:,}")

    def start(self, total):
        """Call before the loop over `total` steps: opens the log, starts the clock, makes signals wait for a
        save."""
        self.total, self.saved, self.last_log = total, self.step, (time.perf_counter(), self.step)
        if RANK == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.jsonl").open("ab") as log:  # continues where the checkpoint was saved
                log.truncate(min(log.tell(), self.ckpt.get("log_bytes", 0)))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.request_stop)
            signal.signal(signal.SIGTERM, self.request_stop)

    def request_stop(self, *_):
        if self.saved == self.total:  # only the test is left
            raise KeyboardInterrupt
        self.stop_requested = True

    def step_done(self, losses, count, lr):
        """Call after each step. Returns (evaluate now, save now), the same on all ranks. `losses` is {name:
        scalar on the device}, whose mean over ranks is the loss of the whole batch, and `count` its items.
        Losses are read, and ranks agree whether to stop, only where a log line or a save is due."""
        self.step += 1
        self.sums = self.sums + torch.stack([value.detach().float() for value in losses.values()])
        log, check, save = (self.step == self.total or self.step % every == 0
                            for every in (self.cfg.log_every, self.cfg.eval_every, self.cfg.save_every))
        if 0 < self.cfg.max_minutes <= (time.perf_counter() - self.began) / 60:
            self.stop_requested = True
        agree = self.stop_requested if WORLD == 1 else self.device.type == "cpu" and self.step % 10 == 0
        if log or check or save or agree:
            shares = torch.cat([self.sums, self.sums.new_tensor([self.stop_requested])])
            *sums, requests = (all_sum(shares) / WORLD).tolist()
            check_finite(self.step, dict(zip(losses, sums)))
            self.stop = requests > 0 and self.step < self.total
        if log or check or save or self.stop:
            seconds, steps = time.perf_counter() - self.last_log[0], self.step - self.last_log[1]
            means = {name: value / steps for name, value in zip(losses, sums)}
            self.write("train", means | {"lr": lr, f"{UNIT}/s": round(count * steps / seconds)},
                       f"eta {(self.total - self.step) * seconds / steps / 60:.1f} min")
            self.sums, self.last_log = 0.0, (time.perf_counter(), self.step)
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
        check_finite(self.step, state["model"])  # a finite loss can have an infinite gradient
        path, part = self.folder / name, self.folder / f"{name}.part"
        if RANK == 0:
            state |= {"script": SCRIPT, "config": vars(self.cfg), "step": self.step, "best": self.best,
                      "seconds": self.seconds + time.perf_counter() - self.began,
                      "log_bytes": (self.folder / "log.jsonl").stat().st_size}
            try:
                with part.open("wb") as file:
                    torch.save(state, file)
                    os.fsync(file.fileno())
                os.replace(part, path)
            except (OSError, RuntimeError) as e:
                part.unlink(missing_ok=True)
                raise UserError(f"{path}: cannot save ({e}); make room, then use --resume") from None
        all_sum(torch.zeros(1, device=self.device)).item()
        if name == "last.pt":
            self.saved = self.step
        self.last_log = time.perf_counter(), self.step  # the time of the evaluation does not count

    def finish(self, figures):
        """Logs the test figures, draws the log as curves.png, and prints the last line."""
        self.write("test", figures)
        if RANK == 0 and (figure := new_figure(12, 9)):
            lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines[:-1]]  # without the test
            names = dict.fromkeys(k for r in records for k, v in r.items() if isinstance(v, (int, float)))
            names.pop("step", None)
            for i, name in enumerate(names, 1):
                axes = figure.add_subplot(math.ceil(len(names) / 3), 3, i, xlabel="step", ylabel=name)
                for split in ("train", "val"):
                    if rows := [r for r in records if r["split"] == split and name in r]:
                        axes.plot([r["step"] for r in rows], [r[name] for r in rows], ".-", label=split)
                axes.legend()
            figure.savefig(self.folder / "curves.png", dpi=100)
        minutes = (self.seconds + time.perf_counter() - self.began) / 60
        memory = f" | {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if self.device.type == "cuda" else ""
        say(f"log and pictures: {self.folder}\nfinal test {show(figures)} | {minutes:.1f} min{memory}")


def check_finite(step, values):
    """UserError if one of {name: tensor or number} is not finite."""
    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            raise UserError(f"step {step}: {name} is not finite, and not saved; start anew with a lower --lr")


def show(figures, between=", ", digits=5, width=0):
    """The numbers of {name: value} as text, such as "loss 0.12345, images/s 19,850"."""
    texts = {name: f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
             for name, value in figures.items() if isinstance(value, (int, float))}
    return between.join(f"{name} {text:{width}}" for name, text in texts.items())


def new_figure(*size):
    """A matplotlib Figure; without matplotlib None, and a line that says so."""
    try:
        from matplotlib.figure import Figure
        return Figure(size, layout="constrained")
    except ImportError:
        say("note: a picture is left out, since matplotlib is not installed")


def bench(run, fetch, update, count):
    """Prints one JSON line: the median time of a training step, and the share of it spent in fetch(step). The
    rest is update(step, batch); `count` is the number of items in a batch."""
    wait, times = getattr(torch, run.device.type).synchronize, []
    for step in range(1, 31):  # the first may compile, nine more warm up
        start = time.perf_counter()
        batch = fetch(step)
        wait()
        fetched = time.perf_counter()
        update(step, batch)
        wait()
        times.append((time.perf_counter() - start, fetched - start))
    seconds, data = (statistics.median(column) for column in zip(*times[10:]))
    say(json.dumps({"script": SCRIPT, "data": run.cfg.data, "device": str(run.device), "processes": WORLD,
                    "dtype": run.cfg.dtype, "compile": run.cfg.compile,
                    "ms_per_step": round(1e3 * seconds, 3), f"{UNIT}/s": round(count / seconds, 1),
                    "data_share": round(data / seconds, 4), "first_step_seconds": round(times[0][0], 1)}))
# ---- end of runtime ----


# MAIN -------------------------------------------------------------------------------------------------------
@one_line_errors()
def main(argv=None):
    mode, inputs, flags = parse_args(argv)
    if mode not in ("train", "bench"):
        return predict(mode, inputs, flags)
    run = Run(flags, training=mode == "train")
    cfg, ckpt, device = run.cfg, run.ckpt, run.device
    old = ckpt or (load_checkpoint(cfg.init) if cfg.init else {})
    if cfg.init:  # the layout goes with the weights
        merge_config(old, flags, cfg.init, {"backbone", "weights"})
        cfg.backbone, cfg.weights = (old["config"][name] for name in ("backbone", "weights"))
    if cfg.weights == "none" and not ckpt:
        preset = {**SCRATCH, **PRESETS.get(cfg.data, {}), **flags}
        vars(cfg).update({name: preset[name] for name in SCRATCH})

    data = load_data(cfg)
    classes = data["classes"]
    if ckpt and ckpt["classes"] != classes:
        raise UserError(f"{run.folder}: its classes are {ckpt['classes']}, the data's {classes}; start anew")
    batches = Batches(data["train"], cfg.batch_size, cfg.oversample, cfg.augment, device)
    schedule = batches.per_epoch * cfg.epochs
    total = min(cfg.max_steps or schedule, schedule)
    parts = {name: data[name] for name in ("train", "val", "test")}
    counts = torch.cat([item["labels"] for part in parts.values() for item in part])
    counts = counts.bincount(minlength=len(classes) + 1)
    say(f"images: {', '.join(f'{len(part):,} {name}' for name, part in parts.items())}; boxes: "
        f"{', '.join(f'{n:,} {name}' for n, name in zip(counts[1:].tolist(), classes))}; steps: {total:,}")
    if mode == "train" and RANK == 0:
        names = {name: [item["name"] for item in part] for name, part in parts.items()}
        text, path = json.dumps(names, indent=1), run.folder / "split.json"
        if ckpt and path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path}: the images of --data {cfg.data} are others now; start anew")
        run.folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(text, encoding="utf-8")
        os.replace(path.with_suffix(".part"), path)

    torch.manual_seed(cfg.seed)
    raw = build(cfg, classes, device, trained=bool(old))
    if cfg.init and not ckpt:
        load_weights(raw, old["model"], cfg.init)
    learnt = [p for p in raw.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learnt if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in learnt if p.dim() < 2]}]
    optimizer = torch.optim.SGD(groups, cfg.lr, momentum=0.9, fused=True)
    if ckpt:
        raw.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
    on_cuda = device.type == "cuda" and sys.platform == "linux"
    if cfg.compile == "on" or (cfg.compile == "auto" and on_cuda):
        raw.compile()  # in place, so that its weights keep their names
    model = nn.parallel.DistributedDataParallel(raw) if WORLD > 1 else raw

    def fetch(step):
        torch.manual_seed(seed_for(cfg.seed, step, RANK))
        return batches.get(cfg.seed, step)

    def update(step, batch):
        """One optimizer step; -> the parts of the loss."""
        images, targets, weight = batch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, schedule)
        training_mode(raw)
        parts = {name.removeprefix("loss_"): value * weight for name, value in model(images, targets).items()}
        loss = sum(parts.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, 10)
        optimizer.step()
        return {"loss": loss, **parts}

    if mode == "bench":
        return bench(run, fetch, update, batches.size)

    run.start(total)
    for step in range(run.step + 1, total + 1):
        losses = update(step, fetch(step))
        check, save = run.step_done(losses, batches.size, learning_rate(cfg, step, schedule))
        if check:
            figures, found = evaluate(raw, data["val"], classes, device)
            run.write("val", figures)
            if run.best is None or figures["map"] > run.best:
                run.best = figures["map"]
                run.save("best.pt", model=raw.state_dict(), classes=classes,
                         threshold=best_threshold(found, data["val"], classes))
        if save:
            run.save("last.pt", model=raw.state_dict(), optimizer=optimizer.state_dict(), classes=classes)
        if run.stop:
            return

    best = load_checkpoint(run.folder / "best.pt")
    raw.load_state_dict(best["model"])
    run.finish(score(raw, data, cfg.threshold or best["threshold"], run.folder, device))


def learning_rate(cfg, step, schedule):
    """Linear warm-up, in a third of a short schedule at most, then half a cosine down to zero."""
    warmup = max(1, min(cfg.warmup, schedule // 3))
    return cfg.lr * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / schedule))


if __name__ == "__main__":
    main()
