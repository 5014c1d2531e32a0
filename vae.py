"""A convolutional variational autoencoder: it trains, scores itself in nats, and draws what it has learnt.

    python vae.py --data demo                        # generated silhouettes: no download, no GPU
    python vae.py --data fashionmnist                # 30 MB are downloaded on first use; 2-D latent space
    python vae.py --data path/to/images              # any folder of images; its sub-folders are classes
    torchrun --nproc_per_node=8 vae.py --data fashionmnist
    python vae.py --data fashionmnist --resume       # goes on where a run was stopped, bit for bit

    python vae.py eval                               # of the newest out/vae-*/best.pt; --ckpt names another
    python vae.py sample --n 64 --save pictures
    python vae.py interpolate --from_class trouser --to_class bag
    python vae.py encode path/to/images --save codes

Measured on one thread of a 2-core cloud machine, no GPU, other work beside it; one run each, seed 0:

    --data demo                                       10-NN accuracy 1.000 on the 2-D codes; 1.1 minutes
    --data fashionmnist                               ELBO -254.4 nats a test image in 2-D; 5.9 minutes
    --data fashionmnist --latent_dim 40 --epochs 50   ELBO -231.9, IWAE bound -229.4; 24 minutes of CPU time

The literature's VAE reaches -228.70 under this protocol, the Exemplar VAE -226.75.

Paper: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, arXiv 1312.6114. The bound with k samples:
Burda et al., "Importance Weighted Autoencoders", 2016, arXiv 1509.00519. The protocol in nats (28x28 pixels,
binarised at random in training and once for testing; 50,000 / 10,000 / 10,000 images): Norouzi et al.,
"Exemplar VAE", 2020, arXiv 2004.04795. Data: Xiao et al., "Fashion-MNIST", 2017, arXiv 1708.07747 (MIT).
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "numpy", "matplotlib"]
# ///
import argparse
import contextlib
import functools
import gzip
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    # the same in all five scripts
    data: str = "auto"  # demo, fashionmnist, mnist or a folder of images; auto: the first that is there
    out: str = ""  # folder of the run; default: out/SCRIPT-DATA
    save: str = ""  # folder for predictions; default: that of the checkpoint
    ckpt: str = ""  # checkpoint to eval or predict with; default: the newest best.pt in out/SCRIPT-*
    init: str = ""  # checkpoint whose weights a new run starts from
    resume: bool = False  # continue the run in --out from its last.pt, if it has one
    device: str = "auto"  # auto|cpu|cuda|mps to run on
    dtype: str = "auto"  # auto|float32|bfloat16 for training (autocast); evaluation is always float32
    compile: str = "auto"  # auto|on|off torch.compile; auto: on for CUDA on Linux
    seed: int = 0  # of initial weights, order of the data, and noise
    batch_size: int = 64  # images per step, over all processes
    lr: float = 3e-3  # peak learning rate
    max_steps: int = 0  # end after this many steps; 0: after the whole schedule
    max_minutes: float = 0.0  # save and stop after this many minutes; 0: never
    eval_every: int = 1000  # steps between validations
    save_every: int = 1000  # steps between saves of last.pt, which every validation saves, too
    log_every: int = 100  # steps between log lines
    # the task
    epochs: int = 10  # length of the schedule
    warmup: int = 500  # 0 to 1000000, steps in which the learning rate and the weight of the KL rise
    likelihood: str = "bernoulli"  # bernoulli|gaussian binarised pixels in nats, or the squared error
    latent_dim: int = 2  # dimensions of z
    width: int = 32  # channels after the first convolution, doubled by each further one
    hidden: int = 512  # units of the dense layers
    image_size: int = 28  # side in pixels; smaller images are padded, those of a folder resized
    kl_weight: float = 1.0  # weight of the KL in the objective
    iwae_k: int = 5000  # samples per image for the final importance-weighted bound
    iwae_n: int = 64  # images that this bound is measured on
    n: int = 64  # images that `sample` draws
    from_class: str = ""  # where `interpolate` starts; empty: the first class
    to_class: str = ""  # where `interpolate` ends; empty: the last class


PRESETS = {"demo": {"epochs": 12, "iwae_k": 500}}
MODES = {"train": ("", "train and test (default)"), "bench": ("", "time the training step"),
         "eval": ("", "test a checkpoint, one CSV line per image"), "sample": ("", "draw from the prior"),
         "interpolate": ("", "walk from the mean code of one class to that of another"),
         "encode": ("FOLDER", "codes of the images in it")}
UNIT = "images"  # what a batch is counted in
SHAPE = {"likelihood", "latent_dim", "width", "hidden", "image_size"}  # what a checkpoint alone decides
CPU_BF16 = True  # measured: 1.2 to 1.5 times as fast as float32 on a CPU that multiplies bfloat16


# MODEL ------------------------------------------------------------------------------------------------------
class Residual(nn.Module):
    """x + f(x), f being two dense layers: depth that a 2-D z gains by. Plain layers made a 40-D one worse."""

    def __init__(self, width):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.f(x)


class VAE(nn.Module):
    """q(z|x) = N(mu, diag(exp(logvar))) and p(x|z), each the other's mirror (Kingma and Welling, section 3).

    x is (B, 1, S, S) in [0, 1], S = image_size; z is (B, latent_dim). A side that does not halve evenly is
    padded inside: 28 becomes 32 on the way in and is cropped on the way out. No layer mixes images, so a code
    never depends on its batch.
    """

    def __init__(self, latent_dim=2, channels=(32, 64, 128), image_size=32, hidden=512):
        super().__init__()
        side = math.ceil(image_size / 2 ** len(channels))  # of the smallest map
        pad = side * 2 ** len(channels) - image_size
        self.before, self.after, self.size = pad // 2, pad - pad // 2, image_size
        flat = channels[-1] * side**2
        down, up = [], []
        for few, many in zip((1, *channels), channels):
            down += [nn.Conv2d(few, many, 3, stride=2, padding=1), nn.GELU()]
            up = [nn.GELU(), nn.ConvTranspose2d(many, few, 3, stride=2, padding=1, output_padding=1), *up]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, hidden), nn.GELU(),
                                     Residual(hidden))
        self.to_mu, self.to_logvar = nn.Linear(hidden, latent_dim), nn.Linear(hidden, latent_dim)
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden), nn.GELU(), Residual(hidden),
                                     nn.Linear(hidden, flat), nn.Unflatten(1, (-1, side, side)), *up)

    def encode(self, x):
        """(B, 1, S, S) -> mu, logvar, each (B, latent_dim), in float32 also under autocast.

        logvar stays smoothly below 4, and is as it was well below: without that, the exp(logvar) of one
        image ended the default run on Fashion-MNIST at step 921.
        """
        h = self.encoder(F.pad(x, (self.before, self.after, self.before, self.after)))  # (B, hidden)
        return self.to_mu(h).float(), 4 - F.softplus(4 - self.to_logvar(h).float())

    def decode(self, z):
        """(B, latent_dim) -> logits (B, 1, S, S), whose sigmoid is the pixels' mean."""
        inside = slice(self.before, self.before + self.size)
        return self.decoder(z)[:, :, inside, inside].float()

    def forward(self, x):
        """(B, 1, S, S) -> logits (B, 1, S, S), mu, logvar, through one sample of z."""
        mu, logvar = self.encode(x)
        return self.decode(reparameterize(mu, logvar)), mu, logvar


def reparameterize(mu, logvar):
    """z = mu + sigma * epsilon with epsilon ~ N(0, I): (..., latent_dim) like its arguments (section 2.4)."""
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, I)), in closed form: (B, latent_dim) twice -> (B,) nats (appendix B)."""
    return 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum(1)


def log_likelihood(logits, x):
    """log p(x|z) of Bernoulli pixels, summed over all of them: (..., 1, S, S) twice -> (...) nats."""
    return (x * logits - F.softplus(logits)).flatten(-3).sum(-1)


def reconstruction_error(likelihood, logits, x):
    """What the KL is weighed against, -log p(x|z) or the squared error: (B, 1, S, S) twice -> (B,)."""
    if likelihood == "bernoulli":
        return -log_likelihood(logits, x)
    return ((logits.sigmoid() - x) ** 2).flatten(1).sum(1)


# DATA -------------------------------------------------------------------------------------------------------
AUTO = {"fashionmnist": "FashionMNIST/raw", "mnist": "MNIST/raw"}  # what --data auto looks for in data/NAME
REAL = "--data fashionmnist downloads the real set"
FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
OUTLINES = {  # the demo's classes: corners on a 28x28 board
    "shirt": "4,6 10,4 18,4 24,6 26,13 21,14 20,25 8,25 7,14 2,13",
    "trouser": "8,3 20,3 22,26 16,26 14,10 12,26 6,26",
    "dress": "11,2 17,2 16,9 23,26 5,26 12,9",
    "boot": "10,3 17,3 17,16 25,20 25,25 10,25",
    "bag": "8,12 8,5 20,5 20,12 25,12 25,24 3,24 3,12 17,12 17,8 11,8 11,12",
    "hat": "9,6 19,6 20,17 27,18 27,21 1,21 1,18 8,17",
    "house": "14,2 25,13 22,13 22,25 16,25 16,18 12,18 12,25 6,25 6,13 3,13",
    "tree": "14,2 24,14 19,14 25,21 16,21 16,26 12,26 12,21 3,21 9,14 4,14",
    "fish": "2,14 10,7 18,10 26,5 24,14 26,23 18,18 10,21",
    "star": "14,2 17,11 26,11 19,16 22,25 14,20 6,25 9,16 2,11 11,11",
}


def demo_images(count):
    """Silhouettes of ten classes; shade, size, tilt and corners vary: (N, 28, 28) uint8, labels (N,)."""
    from PIL import Image, ImageDraw
    rng = np.random.default_rng(0)
    outlines = [np.array([p.split(",") for p in text.split()], float) - 14 for text in OUTLINES.values()]
    labels, images = rng.integers(10, size=count), np.empty((count, 28, 28), np.uint8)
    for i, label in enumerate(labels):
        angle, scale, shift = rng.normal(0, 0.06), rng.uniform(0.75, 1, 2), rng.uniform(13, 15, 2)
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        corners = (outlines[label] + rng.normal(0, 0.4, outlines[label].shape)) * scale @ turn + shift
        board = Image.new("L", (112, 112))  # four times as large, so that the edges come out smooth
        ImageDraw.Draw(board).polygon([tuple(p) for p in corners * 4], fill=255)
        shade = rng.uniform(0.5, 0.8) + rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, 28)[:, None]
        images[i] = np.asarray(board.resize((28, 28), Image.Resampling.BOX)) * shade
    return torch.from_numpy(images), torch.from_numpy(labels)


def find_files(folder, pattern="**/*"):
    """Sorted paths in a folder, without hidden files and what operating systems leave behind."""
    junk = re.compile(r"\.|__MACOSX$|Thumbs\.db$|desktop\.ini$", re.I)
    return [p for p in sorted(folder.glob(pattern)) if not any(map(junk.match, p.relative_to(folder).parts))]


def read_idx(folder, name):
    """The array in the file NAME-ubyte or NAME-ubyte.gz somewhere under `folder`, as a uint8 tensor."""
    path = [*find_files(folder, f"**/{name}-ubyte*"), folder / f"{name}-ubyte.gz"][0]
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\0\0\x08":  # two zeros, "bytes", then how many dimensions, then these
            raise ValueError("its first bytes are not those of IDX")
        shape = np.frombuffer(raw, ">u4", raw[3], 4).tolist()
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as e:
        raise UserError(f"{path}: missing, truncated or not an IDX file ({e}); get it again") from None


def read_images(folder, size):
    """(images (N, size, size) uint8, paths) of the readable images under `folder`, sorted by path."""
    from PIL import Image, ImageOps
    kinds = Image.registered_extensions()
    paths = [p for p in find_files(Path(folder)) if p.suffix.lower() in kinds]
    images, kept, bad, forms = [], [], [], set()
    for path in paths:
        try:
            with Image.open(path) as image:
                forms.add((image.mode, *image.size))
                image = ImageOps.exif_transpose(image)
                if "A" in image.mode or "transparency" in image.info:  # what shines through is white
                    paper, image = Image.new("RGBA", image.size, "white"), image.convert("RGBA")
                    image = Image.alpha_composite(paper, image)
                if image.mode[0] in "IF":  # more than 8 bits, which convert("L") would clip
                    values = np.asarray(image, float).clip(0)
                    image = Image.fromarray((values * 255 / max(1, values.max())).astype(np.uint8))
                grey = ImageOps.pad(image.convert("L"), (size, size))
            images.append(np.asarray(grey))
            kept.append(path)
        except Exception as e:  # a damaged image can raise nearly anything
            bad.append(f"{path} ({type(e).__name__})")
    if bad:
        say(f"note: {len(bad)} of {len(paths)} images are unreadable, skipped: {', '.join(bad[:5])}")
    if len(kept) < max(1, 19 * len(bad)):  # none, or more than 5 % of them bad
        raise UserError(f"{folder}: {len(kept)} of {len(paths)} images are readable; 95 % must be, and one")
    if forms != {("L", size, size)}:
        say(f"note: images are turned into {size}x{size} grey ones, among them {sorted(forms)[:3]}")
    return torch.from_numpy(np.stack(images)), kept


def load_data(cfg):
    """{"train", "val", "test": (images (N, H, W) uint8, labels (N,)), "classes": their names, if any}."""
    folder, test = Path("data", cfg.data) if cfg.data in AUTO else Path(cfg.data), None
    if cfg.data in AUTO and not folder.exists() and RANK == 0:
        from torchvision.datasets import MNIST, FashionMNIST
        say(f"downloading {cfg.data} into {folder}")
        part = folder.with_suffix(".part")  # so that a folder that is there is whole
        shutil.rmtree(part, ignore_errors=True)
        try:
            (MNIST if cfg.data == "mnist" else FashionMNIST)(part, download=True)
            os.replace(part, folder)
        except Exception as e:
            raise UserError(f"{folder}: no download ({e}); data/README.md says what goes where") from None
    if WORLD > 1:
        dist.barrier()  # the other processes wait for rank 0
    if cfg.data == "demo":
        (images, labels), classes = demo_images(12000), list(OUTLINES)
    elif not folder.is_dir():
        raise UserError(f"--data {cfg.data}: no such folder, and none of demo, {', '.join(AUTO)}")
    elif found := find_files(folder, "**/*-ubyte*"):
        place = found[0].resolve().parts
        fashion = cfg.data == "fashionmnist" or (cfg.data != "mnist" and "FashionMNIST" in place)
        classes = FASHION if fashion else [str(digit) for digit in range(10)]
        kinds = "images-idx3", "labels-idx1"
        (images, labels), test = ([read_idx(folder, f"{part}-{kind}") for kind in kinds]
                                  for part in ("train", "t10k"))
        for x, y in ((images, labels), test):
            if x.shape[1:] != images.shape[1:] or not x.numel() or y.shape != x.shape[:1] or y.max() > 9:
                raise UserError(f"{folder}: {tuple(y.shape)} labels for {tuple(x.shape)} images")
    else:
        images, paths = read_images(folder, cfg.image_size)
        names = [path.relative_to(folder).parts[0] for path in paths if path.parent != folder]
        classes = sorted(set(names)) if len(names) == len(paths) else []
        labels = torch.tensor([classes.index(name) for name in names] if classes else [0] * len(paths))
        rank = [seed_for(path.relative_to(folder).as_posix()) for path in paths]  # another file moves few
    if len(images) < 10 or max(images.shape[1:]) > cfg.image_size:
        raise UserError(f"--data {cfg.data}: {len(images)} images of {tuple(images.shape[1:])}: it takes 10, "
                        f"and an --image_size that holds them, not {cfg.image_size}")
    order, share = torch.arange(len(images)), len(images) // 6  # the literature validates on the last sixth
    if test is None:  # no test set of its own: shuffled, a tenth each to test and to validate
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        order = order if cfg.data == "demo" else torch.tensor(rank).argsort()
        share = len(images) // 10
        order, chosen = order[share:], order[:share]
        test = images[chosen], labels[chosen]
    train, val = order[:-share], order[-share:]
    return {"train": (images[train], labels[train].long()), "val": (images[val], labels[val].long()),
            "test": (test[0], test[1].long()), "classes": classes}


# METRICS ----------------------------------------------------------------------------------------------------
def elbo(model, x):
    """log p(x|z) - KL(q(z|x) || p(z)) with one z ~ q: binary pixels (B, 1, S, S) -> (B,) nats (eq. 10)."""
    mu, logvar = model.encode(x)
    return log_likelihood(model.decode(reparameterize(mu, logvar)), x) - kl_divergence(mu, logvar)


def iwae_bound(model, x, k, chunk=1000):
    """log 1/k sum_i p(x, z_i) / q(z_i|x), z_i ~ q: a bound on log p(x), rising with k (Burda et al., eq. 8):
    binary pixels (B, 1, S, S) -> (B,) nats. About `chunk` images are decoded at a time."""
    mu, logvar = model.encode(x)
    terms, step = [], max(1, chunk // len(x))
    for size in [min(step, k - i) for i in range(0, k, step)]:
        z = reparameterize(mu.expand(size, *mu.shape), logvar.expand(size, *mu.shape))  # (size, B, D)
        logits = model.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        log_ratio = 0.5 * ((z - mu) ** 2 / logvar.exp() + logvar - z**2).sum(-1)  # log p(z) / q(z|x)
        terms.append(log_likelihood(logits, x) + log_ratio)
    return torch.cat(terms).logsumexp(0) - math.log(k)


def knn_accuracy(train_z, train_y, test_z, test_y, k=10):
    """Share (0-1) of test points whose class is the commonest (of equals: the lowest) among their k nearest
    training points: codes (N, D) with labels (N,), codes (M, D) with labels (M,)."""
    votes, hits = F.one_hot(train_y), 0
    for z, y in zip(test_z.split(1000), test_y.split(1000)):
        nearest = torch.cdist(z, train_z).topk(min(k, len(train_z)), largest=False).indices  # (1000, k)
        hits += (votes[nearest].sum(1).argmax(1) == y).sum().item()
    return hits / len(test_y)


def tsne(x, perplexity=30.0, steps=500):
    """t-SNE (van der Maaten and Hinton, 2008), exact, without randomness: (N, D) -> (N, 2)."""
    n, x = len(x), (x - x.mean(0)).double()
    d2 = (torch.cdist(x, x) ** 2).fill_diagonal_(math.inf)
    low, high = torch.zeros(n, 1), torch.full((n, 1), math.inf)
    beta = torch.ones(n, 1).double() / x.var(0).sum().clamp_min(1e-12)
    for _ in range(60):  # bisect each row's precision until its perplexity is the one asked for
        p = torch.softmax(-beta * d2, 1)
        wide = torch.special.entr(p).sum(1, keepdim=True) > math.log(min(perplexity, max(1.1, (n - 1) / 3)))
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    p = ((p + p.T) / (2 * n)).clamp_min(1e-12).float()
    y = (x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T).float()  # start: the principal components
    y = F.pad(y, (0, 2 - y.shape[1])) * (1e-2 / y.std().clamp_min(1e-12))
    speed, gain = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        early = step < steps // 4  # exaggeration first pulls the clusters together
        near = (1 / (1 + torch.cdist(y, y) ** 2)).fill_diagonal_(0)
        force = (p * (12 if early else 1) - near / near.sum()) * near
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        gain = torch.where(gradient * speed < 0, gain + 0.2, gain * 0.8).clamp_min(0.01)
        speed = (0.5 if early else 0.8) * speed - max(50, n / 48) * gain * gradient
        y = y + speed
    return y


# EVALUATE, PREDICT ------------------------------------------------------------------------------------------
def pixels(images, size):
    """uint8 (B, H, W) -> float (B, 1, size, size) in [0, 1], padded with zeros."""
    top, left = (size - images.shape[1]) // 2, (size - images.shape[2]) // 2
    pad = (left, size - images.shape[2] - left, top, size - images.shape[1] - top)
    return F.pad(images.unsqueeze(1).float() / 255, pad)


def test_pixels(images, cfg):
    """What a model is tested on: the pixels, for `bernoulli` binarised once and for all."""
    x = pixels(images, cfg.image_size)
    if cfg.likelihood == "gaussian":
        return x
    return (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < x).float()


@torch.no_grad()
def evaluate(model, cfg, x, device):
    """Figures of x (N, 1, S, S), and (error, KL) per image (N, 2). Each batch has its own seed, so nothing
    depends on how many processes share the work.

    `gaussian` adds a known formula: 0.7 sum(sigma^2 + mu^2 - log sigma - 0.5) + 0.3 squared error. The sum
    is KL(q || N(0, I/2)) + D/2 log 2: `formula` takes a model trained on KL(q || N(0, I)) with its latents
    divided by sqrt(2), the same model in other units; `formula_raw` takes them as they are."""
    table = torch.zeros(len(x), 2 + 2 * cfg.latent_dim, device=device)
    for start in range(500 * RANK, len(x), 500 * WORLD):
        torch.manual_seed(seed_for("evaluate", start))
        logits, mu, logvar = model(batch := x[start : start + 500].to(device))
        error = reconstruction_error(cfg.likelihood, logits, batch)
        raw = (logvar.exp() + mu**2 - 0.5 * logvar - 0.5).sum(1)
        kl = 0.5 * (logvar.exp() + mu**2 - 1 - logvar)  # of each dimension
        table[start : start + 500] = torch.cat([error[:, None], raw[:, None], kl, mu], 1)
    error, raw, kl, mu = all_sum(table).cpu().double().split([1, 1, cfg.latent_dim, cfg.latent_dim], 1)
    active = (mu.var(0) > 0.01).sum().item()  # Burda et al., section 5
    if active == 0 and len(x) > 1:
        say("warning: posterior collapse, z carries nothing: lower --kl_weight or --lr, or raise --warmup")
    rows = torch.cat([error, kl.sum(1, keepdim=True)], 1)
    (error, kl_sum), raw = rows.mean(0).tolist(), raw.mean().item()
    if cfg.likelihood == "bernoulli":
        figures = {"elbo": -error - kl_sum, "reconstruction": error}
    else:
        formula = 0.7 * (kl_sum + 0.5 * cfg.latent_dim * math.log(2)) + 0.3 * error
        figures = {"loss": error + cfg.kl_weight * kl_sum, "squared_error": error,
                   "formula_raw": 0.7 * raw + 0.3 * error, "formula": formula}
    kl_dims = [round(v, 4) for v in kl.mean(0).tolist()]
    return figures | {"kl": kl_sum, "active": active, "kl_dims": kl_dims}, rows


@torch.no_grad()
def tighten(model, cfg, x, device):
    """How far the IWAE bound is above the ELBO: the mean over iwae_n images of x and its standard error. The
    gap varies little between images, the bound by 90 nats: the first 1,000 are 2.6 nats easier than all."""
    few = x[:: math.ceil(len(x) / cfg.iwae_n)]
    gaps = torch.zeros(len(few), device=device)
    for i in range(RANK, len(few), WORLD):
        torch.manual_seed(seed_for("tighten", i))
        one = few[i : i + 1].to(device)
        gaps[i] = iwae_bound(model, one, cfg.iwae_k) - elbo(model, one.expand(500, -1, -1, -1)).mean()
    gaps = all_sum(gaps).cpu().double()
    error = gaps.std(correction=0) / max(1, len(gaps) - 1) ** 0.5
    return {"gap": gaps.mean().item(), "gap_se": error.item(), "iwae_n": len(gaps)}


@torch.no_grad()
def codes(model, images, cfg, device):
    """Posterior means: uint8 (N, H, W) -> (N, latent_dim) on the CPU."""
    parts = (pixels(part, cfg.image_size).to(device) for part in images.split(1000))
    return torch.cat([model.encode(x)[0].cpu() for x in parts])


def class_means(model, cfg, data, device):
    """(classes, latent_dim): each class's mean code over the validation images, or if it has none there over
    those it is trained on."""
    (x, labels), (more, theirs) = data["val"], data["train"]
    other = ~torch.isin(theirs, labels)
    z, labels = codes(model, torch.cat([x, more[other]]), cfg, device), torch.cat([labels, theirs[other]])
    return torch.stack([z[labels == c].mean(0) for c in range(max(1, len(data["classes"])))]).nan_to_num()


@torch.no_grad()
def save_grid(model, z, path, columns, above=None):
    """A PNG of the images decoded from z (N, latent_dim); `above`, images that belong to them."""
    from torchvision.utils import make_grid, save_image
    x = torch.cat([model.decode(part).sigmoid() for part in z.split(500)])
    if above is not None:
        x = torch.stack([above, x], 1).flatten(0, 1)
    save_image(F.interpolate(make_grid(x, columns, padding=1, pad_value=0.5)[None], scale_factor=2), path)


def path_between(ckpt, first, last):
    """(10, latent_dim): codes from one class's mean to another's; unnamed, those are the first and last."""
    names = ckpt["classes"]
    for name in {first, last} - {"", *names}:
        raise UserError(f"unknown class {name!r}; this checkpoint knows {', '.join(names) or 'none'}")
    if not names:
        raise UserError("this checkpoint was trained without classes: interpolate needs them")
    a, b = (ckpt["class_means"][names.index(name)] for name in (first or names[0], last or names[-1]))
    return torch.lerp(a, b, torch.linspace(0, 1, 10)[:, None])


def draw(model, cfg, ckpt, data, folder, device):
    """The pictures of a trained model, into `folder`."""
    images, labels = data["test"]
    save_grid(model, codes(model, images[:32], cfg, device).to(device), folder / "reconstructions.png", 8,
              pixels(images[:32], cfg.image_size).to(device))
    torch.manual_seed(seed_for("sample", cfg.seed))
    save_grid(model, torch.randn(64, cfg.latent_dim).to(device), folder / "samples.png", 8)
    if cfg.latent_dim == 2:  # the inverse CDF makes each step equally probable; z_1 to the right, z_2 upwards
        axis = torch.distributions.Normal(0, 1).icdf(torch.linspace(0.02, 0.98, 20))
        save_grid(model, torch.cartesian_prod(-axis, axis).flip(1).to(device), folder / "manifold.png", 20)
    if not ckpt["classes"]:
        return
    save_grid(model, path_between(ckpt, "", "").to(device), folder / "interpolation.png", 10)
    if not (figure := new_figure(8, 6.5)):
        return
    flat = cfg.latent_dim <= 2
    z = codes(model, images if flat else images[:2000], cfg, device)
    xy = F.pad(z, (0, 2 - cfg.latent_dim)) if flat else tsne(z)
    axes = figure.add_subplot(xlabel="$z_1$" if flat else "t-SNE 1", ylabel="$z_2$" if flat else "t-SNE 2",
                              title=f"Posterior means of {len(z):,} test images")
    for c, name in enumerate(ckpt["classes"]):
        axes.scatter(*xy[labels[: len(z)] == c].T.numpy(), s=4, label=name)
    axes.legend(markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "latents.png", dpi=100)


def score(model, cfg, data, device):
    """The test set's figures, 10-nearest-neighbour accuracy first, and (error, KL) of each of its images."""
    x, knn = test_pixels(data["test"][0], cfg), {}
    if data["classes"]:
        z, test_z = (codes(model, data[part][0], cfg, device) for part in ("train", "test"))
        knn = {"knn": knn_accuracy(z, data["train"][1], test_z, data["test"][1])}
    figures, rows = evaluate(model, cfg, x, device)
    if cfg.likelihood == "bernoulli":
        bound = tighten(model, cfg, x, device)
        figures = {"iwae": figures["elbo"] + bound["gap"], **figures, **bound, "iwae_k": cfg.iwae_k}
    return knn | figures | {"n": len(x)}, rows


def build(cfg, device):
    model = VAE(cfg.latent_dim, (cfg.width, 2 * cfg.width, 4 * cfg.width), cfg.image_size, cfg.hidden)
    return model.to(device, memory_format=torch.channels_last)


def predict(mode, inputs, flags):
    """Every mode that uses a trained model."""
    cfg, ckpt, device, folder = open_checkpoint(flags)
    model = build(cfg, device).eval()
    model.load_state_dict(ckpt["model"])
    if mode == "eval":
        figures, rows = score(model, cfg, load_data(cfg), device)
        np.savetxt(path := folder / "test.csv", rows, "%.6f", ",", header="error,kl", comments="")
        say(show(figures, digits=6))
    elif mode == "sample":
        torch.manual_seed(seed_for("sample", cfg.seed))
        z = torch.randn(cfg.n, cfg.latent_dim).to(device)
        save_grid(model, z, path := folder / "samples.png", math.ceil(cfg.n**0.5))
    elif mode == "interpolate":
        z = path_between(ckpt, cfg.from_class, cfg.to_class)
        save_grid(model, z.to(device), path := folder / "interpolation.png", 10)
    else:
        if len(inputs) > 1:
            raise UserError(f"encode takes one folder, not {' '.join(inputs)}")
        images, paths = read_images(inputs[0], cfg.image_size)
        np.save(path := folder / "codes.npy", codes(model, images, cfg, device).numpy())
        (folder / "files.txt").write_text("".join(f"{p}\n" for p in paths), encoding="utf-8",
                                          errors="surrogateescape")
    say(f"written: {path}")


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

    parser = argparse.ArgumentParser(
        usage=f"{SCRIPT}.py [MODE] [INPUT ...] [--flag value ...]", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser.error = refuse
    modes = "; ".join(f"{mode} {usage}".strip() + f": {text}" for mode, (usage, text) in MODES.items())
    parser.add_argument("words", nargs="*", default=[], metavar="MODE", help=modes)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.M))
    for name, comment in comments.items():
        default, choices = getattr(Config, name), re.match(r"\w+(\|\w+)+", comment)
        options = {"type": type(default), "choices": choices[0].split("|") if choices else None}
        if default is False:
            options = {"action": "store_true"}
        names = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])  # --max_steps and --max-steps
        parser.add_argument(*names, help=f"{comment} [{default}]".replace("%", "%%"), **options)
    flags = vars(parser.parse_intermixed_args(argv))
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
    found = sorted(Path("out").glob(f"{SCRIPT}-*/best.pt"), key=os.path.getmtime)
    newest = found[-1] if found else f"out/{SCRIPT}-demo/best.pt"
    path = Path(flags.get("ckpt", newest))
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
        if training and RANK == 0:
            say(f"run: {self.folder}, from step {self.step:,}")
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.jsonl").open("ab") as log:  # goes on where the checkpoint was saved
                log.truncate(min(log.tell(), self.ckpt.get("log_bytes", 0)))

    def start(self, total):
        """Call before the loop over `total` steps: starts the clock, and makes signals wait for a save."""
        self.total, self.saved, self.last_log = total, self.step, (time.perf_counter(), self.step)
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

    data = load_data(cfg)
    images, size = data["train"][0].to(device), min(cfg.batch_size, len(data["train"][0]))
    if size < WORLD:
        raise UserError(f"--batch_size {size}: fewer images a step than the {WORLD} processes")
    val = test_pixels(data["val"][0], cfg)
    per_epoch = len(images) // size
    schedule = per_epoch * cfg.epochs
    total = min(cfg.max_steps or schedule, schedule)
    say(f"images: {len(images):,} train, {len(val):,} val, {len(data['test'][0]):,} test; steps: {total:,}")

    torch.manual_seed(cfg.seed)
    raw = build(cfg, device)
    if cfg.init and not ckpt:
        load_weights(raw, load_checkpoint(cfg.init)["model"], cfg.init)
    optimizer = torch.optim.Adam(raw.parameters(), cfg.lr, fused=True)
    if ckpt:
        raw.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
    on_cuda = device.type == "cuda" and sys.platform == "linux"
    if cfg.compile == "on" or (cfg.compile == "auto" and on_cuda):
        raw.compile()  # in place, so that its weights keep their names
    model = nn.parallel.DistributedDataParallel(raw) if WORLD > 1 else raw

    @functools.lru_cache(1)
    def order(epoch):
        generator = torch.Generator().manual_seed(seed_for(cfg.seed, epoch))
        return torch.randperm(len(images), generator=generator).to(device)

    def fetch(step):
        """This rank's share (B, 1, S, S) of the batch of a step, which counts from 1."""
        epoch, place = divmod(step - 1, per_epoch)
        torch.manual_seed(seed_for(cfg.seed, step, RANK))
        x = pixels(images[order(epoch)[place * size : (place + 1) * size][RANK::WORLD]], cfg.image_size)
        return (torch.rand_like(x) < x).float() if cfg.likelihood == "bernoulli" else x

    def update(step, x):
        """One optimizer step; -> the parts of the loss."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, schedule)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            logits, mu, logvar = model(x)
        error = reconstruction_error(cfg.likelihood, logits, x).sum() * WORLD / size
        kl = kl_divergence(mu, logvar).sum() * WORLD / size
        loss = error + cfg.kl_weight * warmed_up(cfg, step, schedule) * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(raw.parameters(), 100)  # the usual norm is 100 to 200, one bad batch's 1e9
        optimizer.step()
        return {"loss": loss, "error": error, "kl": kl}

    if mode == "bench":
        return bench(run, fetch, update, size)

    run.start(total)
    for step in range(run.step + 1, total + 1):
        losses = update(step, fetch(step))
        check, save = run.step_done(losses, size, learning_rate(cfg, step, schedule))
        if check:
            figures, _ = evaluate(raw, cfg, val, device)
            run.write("val", figures)
            worth = figures["elbo"] if cfg.likelihood == "bernoulli" else -figures["loss"]
            if run.best is None or worth > run.best:
                run.best = worth
                run.save("best.pt", model=raw.state_dict(), classes=data["classes"],
                         class_means=class_means(raw, cfg, data, device))
        if save:
            run.save("last.pt", model=raw.state_dict(), optimizer=optimizer.state_dict())
        if run.stop:
            return

    best = load_checkpoint(run.folder / "best.pt")
    raw.load_state_dict(best["model"])
    figures, _ = score(raw, cfg, data, device)
    if RANK == 0:
        draw(raw, cfg, best, data, run.folder, device)
    run.finish(figures)


def warmed_up(cfg, step, schedule):
    """Rises linearly to 1, in a third of a short schedule at most."""
    return min(1, step / max(1, min(cfg.warmup, schedule // 3)))


def learning_rate(cfg, step, schedule):
    """Linear warm-up, then half a cosine down to zero."""
    return cfg.lr * min(warmed_up(cfg, step, schedule), 0.5 + 0.5 * math.cos(math.pi * step / schedule))


if __name__ == "__main__":
    main()
