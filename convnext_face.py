"""ConvNeXt for faces: classification of known people, verification and identification of unseen ones.

    python convnext_face.py --data demo                       # generated faces: no download, no GPU
    python convnext_face.py --data hw2p2                      # CMU 11-785 HW2P2, a recipe for a CPU
    python convnext_face.py --data hw2p2-full                 # the same folder, a recipe for GPUs
    python convnext_face.py --data path/to/people             # your own: one sub-folder of images per person
    torchrun --nproc_per_node=8 convnext_face.py --data hw2p2-full
    python convnext_face.py --data hw2p2 --resume             # continue a run that was stopped

    python convnext_face.py eval                              # test the newest out/convnext_face-*/best.pt
    python convnext_face.py eval --pairs lfw/pairsDevTest.txt --images lfw/lfw-deepfunneled
    python convnext_face.py verify a.jpg b.jpg                # the same person?
    python convnext_face.py identify people/ who.jpg          # the most similar people of a folder

Measured on one thread of a CPU with bfloat16 (AMD EPYC), other work beside it; one run each, seed 0. The
recipe `hw2p2-full` has not been measured.

    --data demo     99.8 % of 100 people right, EER 3.13 % on 40 unseen people; 1.4 minutes
    --data hw2p2    152 people: 69.4 % right; 15 unseen people: 39.3 % identified, EER 24.2 %; 65 minutes
                    that model on LFW View 1 (DevTest): accuracy 86.2 %, AUC 93.4 %, EER 14.2 %

Papers: Liu et al., "A ConvNet for the 2020s", arXiv 2201.03545; Wen et al., "A Discriminative Feature
Learning Approach for Deep Face Recognition" (center loss), 2016; Deng et al., "ArcFace", arXiv 1801.07698;
Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382; Jordan et al., Muon, 2024. Data: CMU
11-785, fall 2022, HW2P2 (Kaggle); Huang et al., "Labeled Faces in the Wild", 2007.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "numpy", "matplotlib"]
# ///
import argparse
import contextlib
import copy
import csv
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps


@dataclass
class Config:
    # the same in all five scripts; a comment is the help of its flag, and may begin with choices: a|b|c
    data: str = "auto"  # demo, hw2p2, hw2p2-full or a folder of people; auto: the first in data/, else demo
    out: str = ""  # folder of the run (default: out/SCRIPT-DATA)
    save: str = ""  # folder for predictions (default: the folder of the checkpoint)
    ckpt: str = ""  # checkpoint to test or predict with (default: the newest best.pt in out/SCRIPT-*)
    init: str = ""  # checkpoint whose weights a new run starts from
    resume: bool = False  # continue the run in --out from its last.pt, if there is one
    device: str = "auto"  # auto|cpu|cuda: where to run
    dtype: str = "auto"  # auto|float32|bfloat16: precision of training (autocast); metrics are always float32
    compile: str = "auto"  # auto|on|off: torch.compile; auto: on for CUDA under Linux
    seed: int = 0  # seed of the initial weights, the order of the data, and the noise
    batch_size: int = 32  # images per step, over all processes
    lr: float = 2e-3  # peak learning rate
    max_steps: int = 0  # end the training after this many steps; 0: after all epochs
    eval_every: int = 1200  # steps between validations
    save_every: int = 600  # steps between saves of last.pt; each validation saves it, too
    log_every: int = 50  # steps between log lines
    # the task
    epochs: int = 40  # passes over the training set
    warmup: int = 200  # steps in which the learning rate rises
    size: str = "micro"  # mini|micro|tiny: depths and widths of the network; tiny is the paper's ConvNeXt-T
    image_size: int = 80  # side in pixels to which images are resized
    stem_stride: int = 2  # stride of the first layer: 4 as in the paper, 2 for small images
    drop_path: float = 0.2  # stochastic depth: chance of skipping the last block, less before
    augment: float = 1.0  # strength of the augmentation; 0: none
    loss: str = "center"  # softmax|center|arcface: cross-entropy of cosines, with center loss, with a margin
    center_weight: float = 0.003  # weight of the center loss (lambda in the paper)
    ema: float = 0.998  # decay of the moving average of the weights, which is tested and saved
    pairs: str = ""  # eval: a file of pairs in LFW's form, such as pairsDevTest.txt or pairs.txt
    images: str = ""  # eval: the folder of the images that --pairs names


PRESETS = {"demo": {"size": "mini", "image_size": 32, "lr": 4e-3, "epochs": 20, "ema": 0.99, "drop_path": 0.1,
                    "augment": 0.5, "compile": "off"},
           "hw2p2-full": {"size": "tiny", "image_size": 224, "stem_stride": 4, "batch_size": 512,
                          "lr": 1e-3, "epochs": 60, "warmup": 2000, "ema": 0.9999, "augment": 0.6,
                          "eval_every": 2000}}
MODES = {"train": "", "eval": "", "verify": "IMAGE IMAGE", "identify": "GALLERY IMAGE..."}  # mode: its inputs
UNIT = "images"  # what a batch is counted in
SHAPE = {"size", "image_size", "stem_stride"}  # fields that a checkpoint fixes
LAYER_SCALE = 1.0  # the paper's 1e-6 is for deep networks: with it a short run learns less
SCALE = 16.0  # of the cosines in the softmax; exp(16) outweighs thousands of other people
SIZES = {"mini": ((1, 1, 2, 1), (24, 48, 96, 192)), "micro": ((1, 1, 5, 1), (32, 64, 128, 256)),
         "tiny": ((3, 3, 9, 3), (96, 192, 384, 768))}  # blocks and channels of each stage


# MODEL ------------------------------------------------------------------------------------------------------
class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W). In channels-last memory the permutations cost nothing."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + gamma * W2 gelu(W1 norm(depthwise 7x7 of x)): (B, C, H, W) -> the same (Liu et al., figure 4).

    The 1x1 convolutions are linear layers over the last dimension, which is faster; gamma is LayerScale. In
    training, stochastic depth drops the branch of a sample with probability drop_path, and otherwise divides
    it by 1 - drop_path, which keeps the mean.
    """

    def __init__(self, dim, drop_path=0.0, layer_scale=1e-6):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.expand = nn.Linear(dim, 4 * dim)
        self.reduce = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = drop_path

    def forward(self, x):
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))  # (B, H, W, C)
        h = self.reduce(F.gelu(self.expand(h)))
        h = (h * self.gamma.to(h.dtype)).permute(0, 3, 1, 2)  # in bfloat16 under autocast
        if not self.training or not self.drop_path:
            return x + h
        keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
        return torch.addcmul(x, h, keep.to(h.dtype), value=1 / (1 - self.drop_path))


class CosineHead(nn.Module):
    """`scale` times the cosine between features (B, D) and each person's direction: (B, num_classes)."""

    def __init__(self, dim, num_classes, scale=SCALE):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(num_classes, dim))
        self.scale = scale

    def forward(self, x):
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight))


class ConvNeXt(nn.Module):
    """ConvNeXt: normalised images (B, 3, S, S), S at least 8 * stem_stride -> logits (B, num_classes).

    The stem keeps the paper's 4x4 kernel at any stride: at stride 2 its patches overlap. Weights start with
    variance 1 / fan-in: the paper's standard deviation of 0.02 is too small for narrow layers.
    """

    def __init__(self, num_classes, depths=(3, 3, 9, 3), dims=(96, 192, 384, 768), drop_path_rate=0.0,
                 layer_scale=1e-6, stem_stride=4, cosine=False):
        super().__init__()
        rates, layers = torch.linspace(0, drop_path_rate, sum(depths)).tolist(), []
        for i, (depth, dim) in enumerate(zip(depths, dims)):
            if i == 0:
                stem = nn.Conv2d(3, dim, 4, stem_stride, (4 - stem_stride) // 2)
                layers.append(nn.Sequential(stem, LayerNorm2d(dim, eps=1e-6)))
            else:
                layers.append(nn.Sequential(LayerNorm2d(dims[i - 1], eps=1e-6),
                                            nn.Conv2d(dims[i - 1], dim, 2, stride=2)))
            layers.append(nn.Sequential(*(Block(dim, rates.pop(0), layer_scale) for _ in range(depth))))
        self.features = nn.Sequential(*layers)  # stem, stage, then three times: downsampling, stage
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = CosineHead(dims[-1], num_classes) if cosine else nn.Linear(dims[-1], num_classes)
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(part.weight, std=part.weight[0].numel() ** -0.5)
                nn.init.zeros_(part.bias)

    def forward_features(self, x):
        """(B, 3, S, S) -> (B, D): the embedding, D = dims[-1]."""
        x = self.features(x)  # (B, D, S / (8 stride), S / (8 stride))
        return self.norm(x.mean((2, 3)))

    def forward(self, x, with_features=False):
        """(B, 3, S, S) -> logits (B, num_classes), with features (B, D) if asked, in float32 always."""
        features = self.forward_features(x).float()
        with torch.autocast(x.device.type, enabled=False):
            logits = self.head(features)
        return (logits, features) if with_features else logits

    def load_torchvision(self, state_dict):
        """Takes the weights of torchvision's ConvNeXt; RuntimeError names those that do not fit."""
        names = {"block.0": "depthwise", "block.2": "norm", "block.3": "expand", "block.5": "reduce",
                 "layer_scale": "gamma", "classifier.0": "norm", "classifier.2": "head"}
        state = {}
        for key, value in state_dict.items():
            for theirs, ours in names.items():
                key = key.replace(theirs, ours)
            state[key] = value.flatten() if key.endswith("gamma") else value
        self.load_state_dict(state)


class CenterLoss(nn.Module):
    """L_C = 1/2 sum_i |x_i - c_{y_i}|^2, the centers c following the features (Wen et al., equations 2 to 4).

    forward(features (B, D), labels (B,)) -> the sum over the batch. The centers have no gradients: `update`
    subtracts alpha sum(c - x) / (1 + n) from the center c of n samples x, summed over all processes.
    """

    def __init__(self, num_classes, dim, alpha=0.5):
        super().__init__()
        self.register_buffer("centers", torch.zeros(num_classes, dim))
        self.alpha = alpha

    def forward(self, features, labels):
        return 0.5 * ((features - self.centers[labels]) ** 2).sum()

    @torch.no_grad()
    def update(self, features, labels):  # equation 4
        differences = torch.zeros_like(self.centers).index_add_(0, labels, self.centers[labels] - features)
        counts = torch.zeros_like(self.centers[:, :1]).index_add_(0, labels, torch.ones_like(features[:, :1]))
        self.centers -= self.alpha * all_sum(differences) / (1 + all_sum(counts))


def add_margin(logits, labels, scale=SCALE, margin=0.2):
    """ArcFace, equation 3: s cos(theta) of each sample's own class becomes s cos(theta + margin), or, where
    theta + margin > pi, s (cos(theta) - margin sin(margin)), which still falls as theta rises: (B, classes),
    labels (B,) -> (B, classes)."""
    cos = (logits.gather(1, labels[:, None]) / scale).clamp(-1 + 1e-6, 1 - 1e-6)
    own = cos * math.cos(margin) - (1 - cos**2).sqrt() * math.sin(margin)
    own = torch.where(cos > -math.cos(margin), own, cos - margin * math.sin(margin))
    return logits.scatter(1, labels[:, None], scale * own)


# DATA -------------------------------------------------------------------------------------------------------
AUTO = {"hw2p2": "11-785-f22-hw2p2-classification"}  # what --data auto looks for in data/NAME
REAL = "data/README.md says how to get hw2p2"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights expect


def demo_faces(first, people, each, size):
    """Generated faces of the people first, first + 1, ...: (people * each, 3, size, size) uint8, labels. A
    person is a draw of proportions and colours; pose, smile, light and background vary per image."""
    images, axis = [], torch.linspace(-1, 1, size)
    colours = [[0.98, 0.8, 0.68], [0.9, 0.7, 0.45], [0.4, 0.5, 0.6], [0.95, 0.95, 0.95], [0.75, 0.25, 0.3]]
    for person in range(first, first + people):
        g = torch.Generator().manual_seed(seed_for("face", person))
        traits = iter(torch.rand(24, generator=g).tolist())
        now = iter(2 * torch.rand(12, each, 1, 1, 1, generator=g) - 1)  # 12 draws of -1 to 1 for every image

        def trait(low, high):
            return low + (high - low) * next(traits)

        def ellipse(colour, cx, cy, rx, ry):  # with soft edges
            inside = 1 - torch.hypot((x - cx) / rx, (y - cy) / ry)
            canvas.lerp_(colour, torch.sigmoid(160 * min(rx, ry) * inside))

        turn, zoom, yaw, smile = 0.2 * next(now), 1.15 + 0.12 * next(now), 0.16 * next(now), next(now)
        x, y = axis - 0.12 * next(now), axis[:, None] - 0.12 * next(now)
        x, y = zoom * (x * turn.cos() + y * turn.sin()), zoom * (y * turn.cos() - x * turn.sin())
        canvas = 0.5 + 0.4 * torch.cat([next(now) + 0.3 * x for _ in range(3)], 1)  # (each, 3, size, size)
        skin, hair, iris, white, lips = torch.tensor(colours)[..., None, None]
        skin, hair, iris = skin * trait(0.4, 1), hair * trait(0.05, 0.95), iris * trait(0.1, 1.4)
        wide, high = trait(0.48, 0.7), trait(0.68, 0.88)
        ellipse(hair, 0, trait(-0.3, 0.3), wide + trait(0, 0.25), high)
        ellipse(skin, 0, 0.05, wide, high)
        ellipse(hair, yaw + trait(-0.3, 0.3), -high, trait(0.8, 1.2) * wide, trait(0.2, 0.5))  # a fringe
        if (beard := trait(-0.4, 0.45)) > 0.1:
            ellipse(hair, yaw, high, 0.8 * wide, beard)
        apart, level, big = trait(0.19, 0.32), trait(-0.2, 0.02), trait(0.07, 0.13)
        brow, slant, thick = trait(0.14, 0.26), trait(-0.35, 0.35), trait(0.02, 0.06)
        for side in (-1, 1):
            cx = yaw + side * apart
            ellipse(white, cx, level, 1.5 * big, big)
            ellipse(iris, cx + 0.3 * yaw, level, 0.75 * big, 0.75 * big)
            ellipse(0.7 * hair, cx, level - brow + slant * side * (x - cx), 0.16, thick)
        ellipse(0.8 * skin, 1.5 * yaw, trait(0.1, 0.25), trait(0.05, 0.14), trait(0.06, 0.16))  # the nose
        bend = 0.5 * smile * (x - yaw) ** 2
        ellipse(lips, yaw, trait(0.4, 0.55) - bend, trait(0.12, 0.3), trait(0.04, 0.09))
        canvas *= 1 + 0.15 * next(now) + 0.3 * (next(now) * x + next(now) * y)  # light
        canvas += 0.04 * torch.randn(canvas.shape, generator=g)
        images.append((255 * canvas.clamp(0, 1)).byte())
    return torch.cat(images), torch.arange(people).repeat_interleave(each)


def demo_data(size):
    """100 people to learn, 24 / 5 / 5 images each, and 40 others, of whom the first image each is known."""
    (images, labels), (others, owners) = demo_faces(0, 100, 34, size), demo_faces(100, 40, 15, size)
    place, order = torch.arange(34).repeat(100), torch.arange(600).view(40, 15).T.flatten()
    splits = {"train": place < 24, "val": (place >= 24) & (place < 29), "test": place >= 29}
    return {split: (images[mask], labels[mask]) for split, mask in splits.items()} | {
        "classes": [f"person {i}" for i in range(100)], "unseen": (others[order], owners[order]), "known": 40,
        "names": [f"person {100 + i % 40}/{i // 40}" for i in range(600)], "submit": {}}


def find_files(folder, pattern="**/*"):
    """Sorted paths in a folder, without hidden files and what operating systems leave behind."""
    junk = re.compile(r"\.|__MACOSX$|Thumbs\.db$|desktop\.ini$", re.I)
    return [p for p in sorted(folder.glob(pattern)) if not any(map(junk.match, p.relative_to(folder).parts))]


def find_images(folder):
    kinds = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
    return [p for p in find_files(folder) if p.suffix.lower() in kinds]


def find_folder(folder, name):
    """The first folder of that name, at most two levels down; None without one."""
    found = [p for depth in ("", "*/", "*/*/") for p in find_files(folder, depth + name) if p.is_dir()]
    return found[0] if found else None


def find_people(folder):
    """{image: person} of a folder with one sub-folder per person."""
    people = [p for p in find_files(folder, "*") if p.is_dir()]
    return {path: p.name for p in people for path in find_images(p)}


def read_faces(paths, size, lfw=False):
    """The images that can be read, (N, 3, size, size) uint8, and their N paths. Each is turned upright and
    cut to its middle square; with `lfw`, one of 250x250 pixels to the middle 112x112, where the face is."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def read(i):
        try:
            image = ImageOps.exif_transpose(Image.open(paths[i])).convert("RGB")
            if lfw and image.size == (250, 250):
                image = image.crop((69, 69, 181, 181))
            pixels = np.array(ImageOps.fit(image, (size, size)))
            images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
        except Exception as e:  # a damaged image can raise nearly anything
            return f"{paths[i]} ({type(e).__name__})"

    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(read, range(len(paths))))
    bad = [error for error in errors if error]
    text = f"{len(bad)} of {len(paths)} images are missing or unreadable"
    if len(bad) > 0.05 * len(paths):
        raise UserError(f"{text} (limit: 5 %): {', '.join(bad[:5])}")
    if bad:
        say(f"note: {text}, skipped: {', '.join(bad[:5])}")
        good = [i for i, error in enumerate(errors) if not error]
        images, paths = images[good], [paths[i] for i in good]
    return images, paths


def divide(people):
    """The splits of {image: person}. Of 20 people or more every tenth is "unseen"; of each other person's
    images a tenth goes to "val" and a tenth to "test", at least one each if there are three."""
    images_of, splits = {}, {split: {} for split in ("train", "val", "test", "unseen")}
    for path, name in people.items():
        images_of.setdefault(name, []).append(path)
    for number, (name, paths) in enumerate(images_of.items(), 1):
        n = max(len(paths) // 10, int(len(paths) > 2))
        parts = {"val": paths[:n], "test": paths[n : 2 * n], "train": paths[2 * n :]}
        if len(images_of) >= 20 and number % 10 == 0:
            parts = {"unseen": paths}
        for split, some in parts.items():
            splits[split] |= dict.fromkeys(some, name)
    return splits


def given_splits(folder):
    """The splits in the sub-folders train, val or dev, and perhaps test, of a folder."""
    train, val, dev, test = (find_people(folder / name) for name in ("train", "val", "dev", "test"))
    for people, name in ((val or dev, "val or dev"), (test or val or dev, "test")):
        different = sorted(set(train.values()) ^ set(people.values()))
        if different:
            raise UserError(f"{folder}: train and {name} must have the same people; {len(different)} are in "
                            f"one only: {', '.join(different[:5])}")
    return {"train": train, "val": val or dev, "test": test, "unseen": {}}


def read_identities(path, files):
    """{image: person} of a CSV with the columns id, the number that is the image's name, and label."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            labels = {int(row["id"]): row["label"] for row in csv.DictReader(lines) if row["label"]}
        return {file: labels[int(file.stem)] for file in files}
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise UserError(f"{path}: must have id,label for each of {len(files)} images ({e!r})") from None


def load_data(cfg):
    """{"train", "val", "test": (images (N, 3, S, S) uint8, labels (N,)), "classes": the labels' names;
    "unseen": images and labels of the faces to verify, the first "known" of them the gallery, and their
    "names"; "submit": {task: files without labels}}. Without a test split with labels, "test" is "val"."""
    if cfg.data == "demo":
        return demo_data(cfg.image_size)
    folder = Path("data", "hw2p2") if cfg.data in ("hw2p2", "hw2p2-full") else Path(cfg.data)
    train, known, submit = find_folder(folder, "train"), find_folder(folder, "known"), {}
    if train:  # train/PERSON/IMAGE
        splits = given_splits(train.parent)
        if not splits["test"]:  # images without labels
            submit["classification"] = find_images(train.parent / "test")
    else:  # PERSON/IMAGE
        splits = divide(find_people(folder))
    if train and known:  # HW2P2's verification
        gallery, files = find_people(known), find_images(known.parent / "unknown_dev")
        others = read_identities(known.parent / "dev_identities.csv", files)
        submit["verification"] = find_images(known.parent / "unknown_test")
    else:  # the first image of each person is the gallery; some people go if there are over 2,000 images
        others = splits["unseen"] or splits["val"] | splits["test"]
        first = {name: path for path, name in reversed(others.items())}  # earlier images overwrite later ones
        gallery = {first[name]: name for name in sorted(first)[:: len(others) // 2000 + 1]}
    classes, people = sorted(set(splits["train"].values())), sorted(set(gallery.values()))
    faces = gallery | {path: name for path, name in others.items() if name in people}
    if min(len(classes), len(people)) < 2 or len(faces) == len(gallery) or not splits["val"]:
        raise UserError(f"{folder}: {len(classes)} people to learn and {len(people)} to verify; it takes two "
                        "of each, one sub-folder and three images per person; see data/README.md")
    shared = sorted(set(people) & set(classes))
    if shared:
        say(f"warning: {len(shared)} people are verified that are trained on: {', '.join(shared[:5])}")

    def read(owner, names):
        images, paths = read_faces(list(owner), cfg.image_size)
        number = {name: i for i, name in enumerate(names)}
        return images, torch.tensor([number[owner[path]] for path in paths]), paths

    data = {split: read(splits[split], classes)[:2] for split in ("train", "val", "test") if splits[split]}
    data.setdefault("test", data["val"])
    *unseen, paths = read(faces, people)
    return data | {"classes": classes, "unseen": unseen, "known": sum(path in gallery for path in paths),
                   "names": [f"{faces[path]}/{path.name}" for path in paths], "submit": submit}


def read_pairs(path, folder):
    """[(file, file, same, fold)] of a file of pairs in LFW's form. Its first line has the number of pairs of
    each kind (View 1), or the number of folds and of pairs of each kind in each (pairs.txt, View 2)."""
    pairs, number = [], 1
    try:
        head, *lines = path.read_text(encoding="utf-8").rstrip().split("\n")
        sizes = [int(field) for field in head.split()]
        folds, each = sizes if len(sizes) == 2 else (1, *sizes)
        for number, line in enumerate(lines, 2):
            fold, place = divmod(len(pairs), 2 * each)
            fields = line.split()
            if place < each:  # NAME I J: images I and J of one person; else NAME I NAME J
                fields.insert(2, fields[0])
            a, i, b, j = fields
            files = [folder / name / f"{name}_{int(n):04}.jpg" for name, n in ((a, i), (b, j))]
            pairs.append((*files, place < each, fold))
    except (ValueError, IndexError, ZeroDivisionError) as e:
        raise UserError(f"{path}, line {number}: must be NAME I J in the first half of a fold, NAME I NAME J "
                        f"in the second, and in the first line their number ({e})") from None
    if not pairs or len(pairs) != 2 * folds * each:
        raise UserError(f"{path}: has {len(pairs)} pairs; its first line says {folds} times {each} of one "
                        f"person and {each} of two")
    return pairs


def augment(x, strength):
    """(B, 3, S, S) in [0, 1] -> likewise, every sample by draws of its own: flip, affine, colour, erasing."""
    def draw(spread, *shape):  # uniform in -strength * spread to strength * spread
        return strength * spread * (2 * torch.rand(len(x), *shape, device=x.device) - 1)
    if not strength:
        return x
    flip = torch.where(torch.rand(len(x), device=x.device) < 0.5, -1.0, 1.0)
    angle, squeeze = draw(0.26), draw(0.08).exp()
    zoom = (strength * (0.15 - 1.15 * torch.rand(len(x), device=x.device))).exp()  # it mostly enlarges
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.stack([flip * cos * squeeze, -sin, draw(0.12), flip * sin * squeeze, cos, draw(0.12)], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    grey = x.mean(1, keepdim=True)
    pale = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.1 * strength  # some lose their colour altogether
    x = torch.where(pale, grey, grey + (x - grey) * (1 + draw(0.4, 1, 1, 1)))
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (middle + (x - middle) * (1 + draw(0.4, 1, 1, 1))) * (1 + draw(0.4, 1, 1, 1))  # contrast, brightness
    x = x * (1 + draw(0.08, 3, 1, 1))
    axis = torch.linspace(-1, 1, x.shape[2], device=x.device)
    half = 0.35 * torch.rand(len(x), 2, 1, device=x.device)  # half of the samples lose a rectangle
    half = half * (torch.rand(len(x), 1, 1, device=x.device) < strength / 2)
    near = (axis - (2 * torch.rand(len(x), 2, 1, device=x.device) - 1)).abs() < half  # (B, 2, S)
    return x.clamp(0, 1).masked_fill((near[:, 0, :, None] & near[:, 1, None, :])[:, None], 0.5)


def normalised(images, device, strength=0.0):
    """uint8 (B, 3, S, S) -> what the network takes, augmented with that strength."""
    mean, std = torch.tensor([MEAN, STD]).view(2, 3, 1, 1).to(device, non_blocking=True)
    x = (augment(images.to(device).float() / 255, strength) - mean) / std
    return x.contiguous(memory_format=torch.channels_last)


# METRICS ----------------------------------------------------------------------------------------------------
def roc(scores, same):
    """False accept rates, true accept rates, and thresholds, from the highest down: what lies above one is
    accepted. ValueError unless there are pairs of both kinds, as many as finite scores."""
    scores, same = (np.asarray(v, float).ravel() for v in (scores, same))
    if scores.shape != same.shape or not 0 < same.sum() < len(same) or not np.isfinite(scores).all():
        raise ValueError(f"{len(scores)} scores, {same.sum():.0f} of {len(same)} pairs the same: takes both")
    order = np.argsort(-scores, kind="stable")
    scores, same = scores[order], same[order]
    last = np.flatnonzero(np.diff(scores, append=-np.inf))  # of equal scores
    accepted = np.r_[0, np.cumsum(same)[last]]
    far, tar = (np.r_[0, last + 1] - accepted) / (len(same) - same.sum()), accepted / same.sum()
    scores = np.r_[scores[0] + 1, scores[last], scores[-1] - 1]
    return far, tar, (scores[:-1] + scores[1:]) / 2  # half-way between two scores


def verification_metrics(scores, same):
    """Figures of scores (N,), the higher the more alike, for pairs that are the same person's or not (N,):
    {"auc", "eer", "tar_at_far": {0.01, 0.001}, "threshold"}, all but the last 0-1. The EER is where straight
    lines between the ROC's points cross FAR = 1 - TAR; the threshold is that of the first point after it."""
    far, tar, threshold = roc(scores, same)
    excess = far - (1 - tar)  # rises from -1 to 1
    i = int(np.argmax(excess >= 0))
    share = -excess[i - 1] / (excess[i] - excess[i - 1])
    return {"auc": float((np.diff(far) * (tar[1:] + tar[:-1]) / 2).sum()),
            "eer": float(far[i - 1] + share * (far[i] - far[i - 1])),
            "tar_at_far": {limit: float(tar[far <= limit].max()) for limit in (0.01, 0.001)},
            "threshold": float(threshold[i])}


def best_threshold(scores, same):
    """The threshold with which most pairs are judged rightly."""
    far, tar, threshold = roc(scores, same)
    positive = float(np.asarray(same, float).sum())
    return float(threshold[np.argmax(tar * positive - far * (len(scores) - positive))])


def lfw_accuracy(scores, same, folds):
    """LFW's protocol: each fold is judged with the threshold best on all others: scores (N,), same (N,),
    folds (N,) -> mean accuracy over the folds (0-1) and its standard error (Huang et al., 2007)."""
    scores, same, folds = np.asarray(scores, float), np.asarray(same, bool), np.asarray(folds)
    right = []
    for fold in np.unique(folds):
        test = folds == fold
        threshold = best_threshold(scores[~test], same[~test])
        right.append(((scores[test] > threshold) == same[test]).mean())
    return float(np.mean(right)), float(np.std(right, ddof=1) / len(right) ** 0.5)


# EVALUATE, PREDICT ------------------------------------------------------------------------------------------
@torch.no_grad()
def embed(model, images, device):
    """uint8 (N, 3, S, S) -> unit embeddings (N, D) and the likeliest classes (N,), on the CPU, both of four
    views: an image, its middle 60 % (training zooms in, too), and both flipped."""
    model.eval()
    table = torch.zeros(len(images), model.norm.weight.numel() + 1, device=device)
    margin = images.shape[2] // 5
    for start in range(200 * RANK, len(images), 200 * WORLD):  # each process does its share
        x = normalised(images[start : start + 200], device)
        middle = F.interpolate(x[:, :, margin:-margin, margin:-margin], x.shape[2:], mode="bilinear")
        views = [model(view, True) for view in (x, x.flip(3), middle, middle.flip(3))]
        z = F.normalize(sum(F.normalize(features) for _, features in views))
        classes = sum(logits for logits, _ in views).argmax(1, keepdim=True)
        table[start : start + 200] = torch.cat([z, classes], 1)
    table = all_sum(table).cpu()
    return table[:, :-1], table[:, -1].long()


def verification(scores, same):
    """`verification_metrics` as figures in percent, and the threshold."""
    metrics = verification_metrics(scores, same)
    rates = {f"tar@{limit:g}": 100 * rate for limit, rate in metrics["tar_at_far"].items()}
    return {"eer": 100 * metrics["eer"], "auc": 100 * metrics["auc"]} | rates, metrics["threshold"]


def evaluate(model, data, split, device):
    """(figures in percent, the threshold at the EER, predicted classes (N,), embeddings (M, D) of the unseen
    faces, their P pairs: places (P,), (P,), cosines (P,), same person or not (P,)). `ident` is the share of
    unseen faces whose nearest face in the gallery is the same person's; they are the same for all splits."""
    _, classes = embed(model, data[split][0], device)
    z, _ = embed(model, data["unseen"][0], device)
    labels, known = data["unseen"][1], data["known"]  # the gallery comes first
    i, j = torch.triu_indices(len(z), len(z), 1)
    scores, same = (z @ z.T)[i, j], labels[i] == labels[j]
    more, threshold = verification(scores, same)
    nearest = labels[:known][(z[known:] @ z[:known].T).argmax(1)]
    figures = {"acc": 100 * (classes == data[split][1]).double().mean().item(), **more,
               "ident": 100 * (nearest == labels[known:]).double().mean().item()}
    return figures, threshold, classes, z, (i, j, scores, same)


def score(model, cfg, data, folder, device):
    """The figures of the test set. Writes predictions, pairs, Kaggle's submissions (CSV), and the ROC."""
    figures, _, classes, z, pairs = evaluate(model, data, "test", device)
    names, people, known = data["names"], data["classes"], data["known"]
    write_csv(folder / "classes.csv", "label,top1", (
        (people[a], people[b]) for a, b in zip(data["test"][1].tolist(), classes.tolist())))
    write_pairs(folder, names, *pairs)
    for task, files in data["submit"].items():
        if files:
            faces, paths = read_faces(files, cfg.image_size)
            faces, classes = embed(model, faces, device)
            if task == "verification":  # the file's number, and the person
                nearest = [names[k].split("/")[0] for k in (faces @ z[:known].T).argmax(1).tolist()]
                rows = [(path.stem.lstrip("0") or "0", name) for path, name in zip(paths, nearest)]
            else:  # the file's name, and the person's place among all, from 0
                rows = [(path.name, k) for path, k in zip(paths, classes.tolist())]
            write_csv(folder / f"{task}_submission.csv", "id,label", rows)
    return figures | {"n": len(data["test"][1]), "pairs": len(pairs[0])}


def write_csv(path, head, rows):
    if RANK == 0:
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file, lineterminator="\n").writerows([head.split(","), *rows])


def write_pairs(folder, names, i, j, scores, same):
    """pairs.csv and roc.png. Pair k (of P) is of the images i[k] and j[k], and is one person's if same[k]."""
    pairs = zip(i.tolist(), j.tolist(), same.tolist(), scores.tolist())
    write_csv(folder / "pairs.csv", "a,b,same,score", (
        (names[a], names[b], int(s), f"{score:.6f}") for a, b, s, score in pairs))
    far, tar, _ = roc(scores, same)
    figure = Figure((6, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(far, tar)
    axes.set(xlabel="false accept rate", ylabel="true accept rate", xscale="log", xlim=(1e-4, 1),
             ylim=(0, 1.01), title=f"ROC of {len(scores):,} pairs")
    if RANK == 0:
        figure.savefig(folder / "roc.png", dpi=90)


def embed_pairs(model, cfg, path, device):
    """The pairs of a file, without those of unreadable images: what write_pairs takes, and folds (P,)."""
    pairs = read_pairs(path, Path(cfg.images))
    files = sorted({file for pair in pairs for file in pair[:2]})
    images, files = read_faces(files, cfg.image_size, lfw=True)
    place = {file: k for k, file in enumerate(files)}
    rows = [(place[a], place[b], same, fold) for a, b, same, fold in pairs if {a, b} <= place.keys()]
    i, j, same, folds = map(torch.tensor, zip(*rows))
    z, _ = embed(model, images, device)
    return [file.name for file in files], i, j, (z[i] * z[j]).sum(1), same, folds


def benchmark(model, cfg, folder, device):
    """Figures on --pairs, in percent, by LFW's protocol. Each of several folds is judged with the threshold
    best on the others (View 2), a single one with the best on the pairsDevTrain.txt beside it (View 1)."""
    path = Path(cfg.pairs)
    *pairs, scores, same, folds = embed_pairs(model, cfg, path, device)
    if len(folds.unique()) > 1:
        mean, error = lfw_accuracy(scores, same, folds)
        figures = {"acc": 100 * mean, "se": 100 * error}
    else:
        train = path.with_name("pairsDevTrain.txt")
        *_, train_scores, train_same, _ = embed_pairs(model, cfg, train, device)
        threshold = best_threshold(train_scores, train_same)
        say(f"threshold: {threshold:.4f}, chosen on {train}")
        figures = {"acc": 100 * ((scores > threshold) == same).double().mean().item()}
    write_pairs(folder, *pairs, scores, same)
    return figures | verification(scores, same)[0] | {"n": len(scores)}


def build(cfg, classes, device):
    model = ConvNeXt(len(classes), *SIZES[cfg.size], cfg.drop_path, LAYER_SCALE, cfg.stem_stride, True)
    return model.to(device, memory_format=torch.channels_last)


def predict(mode, inputs, flags):
    """Every mode that uses a trained model. The answers of verify and identify are JSON lines."""
    with contextlib.redirect_stdout(sys.stdout if mode == "eval" else sys.stderr):  # else answers only
        cfg, ckpt, device, folder = open_checkpoint(flags)
        model, threshold = build(cfg, ckpt["classes"], device), ckpt["threshold"]
        model.load_state_dict(ckpt["model"])
        if mode == "eval":
            if cfg.pairs:
                figures = benchmark(model, cfg, folder, device)
            else:
                data = load_data(cfg)
                if data["classes"] != ckpt["classes"]:
                    raise UserError(f"--data {cfg.data}: holds other people than {cfg.ckpt} was trained on; "
                                    "for those there are --pairs with --images, and identify")
                figures = score(model, cfg, data, folder, device)
            return say(f"{show(figures, digits=6)}\nwritten: {folder}/*.csv, roc.png")
        if len(inputs) < 2 or (mode == "verify" and len(inputs) > 2):
            raise UserError(f"{mode} takes {MODES[mode]}, not {' '.join(inputs)}")
        files = [Path(name) for name in inputs]
        if mode == "identify":
            people = find_people(files.pop(0))
            if not people:
                raise UserError(f"{inputs[0]}: no sub-folders with images; it takes one per person")
            gallery, paths = read_faces(list(people), cfg.image_size)
            gallery, _ = embed(model, gallery, device)
        images, files = read_faces(files, cfg.image_size)
        z, _ = embed(model, images, device)
    if mode == "verify":
        cosine = float(z[0] @ z[1])
        answer = {"cosine": round(cosine, 4), "threshold": round(threshold, 4), "same": cosine > threshold}
        return say(json.dumps(answer))
    for file, row in zip(files, z @ gallery.T):
        ranked = {}  # a person is as near as the nearest image
        for k in row.argsort(descending=True).tolist():
            ranked.setdefault(people[paths[k]], round(float(row[k]), 4))
        known = float(row.max()) > threshold
        say(json.dumps({"file": str(file), "ranked": list(ranked.items())[:5], "known": known}))


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

    data = load_data(cfg)
    if ckpt and ckpt["classes"] != data["classes"]:
        raise UserError(f"--data {cfg.data}: holds other people than {run.folder}/last.pt; start anew")
    images, labels = (part.to(device) for part in data.pop("train"))  # pop: frees main memory
    count = min(cfg.batch_size, len(labels))  # of a batch
    if count < WORLD:
        raise UserError(f"--batch_size {count}: fewer images a step than the {WORLD} processes")
    per_epoch = len(labels) // count
    schedule = per_epoch * cfg.epochs
    total = min(cfg.max_steps or schedule, schedule)
    say(f"images: {len(labels):,} train of {len(data['classes']):,} people, {len(data['val'][1]):,} val, "
        f"{len(data['test'][1]):,} test, {len(data['unseen'][1]):,} to verify; steps: {total:,}")

    torch.manual_seed(cfg.seed)
    raw = build(cfg, data["classes"], device)
    if cfg.init and not ckpt:
        load_weights(raw, load_checkpoint(cfg.init)["model"])
    centers = CenterLoss(len(data["classes"]), raw.norm.weight.numel()).to(device)
    average = copy.deepcopy(raw)  # moving average of the weights
    decay = min(cfg.ema, 1 - 4 / max(5, schedule))  # a short schedule needs a shorter memory
    muon = cfg.size == "micro" and cfg.dtype == "bfloat16"  # learns faster; slow without bfloat16
    names = ("expand.weight", "reduce.weight") if muon else ()
    matrices = [p for name, p in raw.named_parameters() if name.endswith(names)]
    rest = [p for name, p in raw.named_parameters() if not name.endswith(names)]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.05},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, cfg.lr, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(matrices, cfg.lr, 0.05, adjust_lr_fn="match_rms_adamw"))
    state = {"model": raw, "average": average, "centers": centers}
    state |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}
    if ckpt:
        for name, part in state.items():
            part.load_state_dict(ckpt[name])
    if cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda" and sys.platform == "linux"):
        say("compiling in the first step, which takes a minute or two")
        raw.compile()  # in place, so that its weights keep their names
    model = nn.parallel.DistributedDataParallel(raw) if WORLD > 1 else raw

    @functools.lru_cache(1)
    def order(epoch):
        generator = torch.Generator().manual_seed(seed_for(cfg.seed, epoch))
        return torch.randperm(len(labels), generator=generator).to(device)

    def fetch(step):
        """This rank's share of the batch of a step, which counts from 1: images (B, 3, S, S), labels (B,)."""
        epoch, place = divmod(step - 1, per_epoch)
        torch.manual_seed(seed_for(cfg.seed, step, RANK))
        chosen = order(epoch)[place * count : (place + 1) * count][RANK::WORLD]
        return normalised(images[chosen], device, cfg.augment), labels[chosen]

    def update(step, batch):
        """One optimizer step; returns the parts of the loss."""
        x, y = batch  # (B / WORLD, 3, S, S), (B / WORLD,)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(cfg, step, schedule)
        raw.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            logits, features = model(x, True)  # float32 (B / WORLD, classes), (B / WORLD, D)
        if cfg.loss == "arcface":
            logits = add_margin(logits, y)
        share = WORLD / count  # DDP averages over the processes: the sum becomes the whole batch's mean
        loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=0.1) * share
        losses = {"loss": loss}
        if cfg.loss == "center":  # equation 5
            center = centers(features, y) * share
            losses = {"loss": loss + cfg.center_weight * center, "cross_entropy": loss, "center": center}
        raw.zero_grad()
        losses["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
        if cfg.loss == "center":
            centers.update(features.detach(), y)
        with torch.no_grad():
            weight = 1 - decay if step > 1 else 1.0  # it begins with the weights after the first step
            torch._foreach_lerp_(list(average.parameters()), list(raw.parameters()), weight)
        return losses

    run.start(total)
    for step in range(run.step + 1, total + 1):
        losses = update(step, fetch(step))
        check, save = run.step_done(losses, count, learning_rate(cfg, step, schedule))
        if check:
            figures, threshold, *_ = evaluate(average, data, "val", device)
            run.write("val", figures)
            if run.best is None or figures["acc"] >= run.best:
                run.best = figures["acc"]
                run.save("best.pt", model=average.state_dict(), classes=data["classes"],
                         threshold=threshold)
        if save:
            run.save("last.pt", classes=data["classes"],
                     **{name: part.state_dict() for name, part in state.items()})
        if run.stop:
            return

    average.load_state_dict(load_checkpoint(run.folder / "best.pt")["model"])
    run.finish(score(average, cfg, data, run.folder, device))


def learning_rate(cfg, step, schedule):
    """The lower of a linear warm-up (at most a third of the schedule) and half a cosine down to zero."""
    warmup = max(1, min(cfg.warmup, schedule // 3))
    return cfg.lr * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / schedule))


if __name__ == "__main__":
    main()
