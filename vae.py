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

RESULTS_GO_HERE

Paper: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, https://arxiv.org/abs/1312.6114. The bound with k
samples: Burda et al., 2016, https://arxiv.org/abs/1509.00519. The protocol in nats (28x28 pixels, binarised at random
in training and once for testing; 50,000 / 10,000 / 10,000 images): Norouzi et al., "Exemplar VAE", 2020,
https://arxiv.org/abs/2004.04795. Data: Xiao et al., "Fashion-MNIST", 2017, https://arxiv.org/abs/1708.07747 (MIT).
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.11.0", "torchvision==0.26.0", "numpy", "matplotlib"]
# ///
import argparse
import dataclasses
import functools
import gzip
import hashlib
import inspect
import json
import math
import os
import re
import resource
import signal
import statistics
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Config:
    # the same in all five scripts
    data: str = "auto"  # a data set's name (demo, fashionmnist, mnist) or a folder of images; auto: the first found
    out: str = ""  # the run's folder; empty: out/SCRIPT-DATA
    save: str = ""  # where predictions go; empty: beside the checkpoint
    ckpt: str = ""  # checkpoint for every mode but train; empty: the newest best.pt of this script
    init: str = ""  # checkpoint whose weights a new run starts from
    resume: bool = False  # continue the run's folder from its last.pt, if there is one
    device: str = "auto"  # auto|cpu|cuda|mps where to run
    dtype: str = "auto"  # auto|float32|bfloat16 autocast in training; metrics are always float32
    compile: str = "auto"  # auto|on|off torch.compile; auto: on for CUDA on Linux
    seed: int = 0  # of weights, order and noise
    batch_size: int = 64  # images per step, over all processes
    lr: float = 2e-3  # peak learning rate
    max_steps: int = 0  # end the run after this many steps; 0: after the whole schedule
    max_minutes: float = 0.0  # save and stop after this time; 0: never
    eval_every: int = 1000  # steps between validations
    save_every: int = 1000  # steps between saves, besides those at validations
    log_every: int = 100  # steps between log lines
    # the task
    epochs: int = 10  # length of the schedule
    warmup: int = 200  # steps in which the learning rate rises
    likelihood: str = "bernoulli"  # bernoulli|gaussian binarised pixels in nats, or the squared error
    latent_dim: int = 2  # dimensions of z
    width: int = 32  # channels after the first convolution, doubled by each further one
    hidden: int = 512  # units of the dense layers
    image_size: int = 28  # side in pixels; smaller images are padded, those of a folder resized
    kl_weight: float = 1.0  # weight of the KL in the objective
    kl_warmup: int = 500  # steps in which that weight rises
    iwae_k: int = 5000  # samples per image in the final importance-weighted bound
    n: int = 64  # images: drawn by `sample`, and used for the final importance-weighted bound
    from_class: str = ""  # where `interpolate` starts; empty: the first class
    to_class: str = ""  # where `interpolate` ends; empty: the last class


PRESETS = {"demo": {"epochs": 12, "iwae_k": 500}}
MODES = {"train": "(default) train and test", "eval": "test a checkpoint, one CSV line per image",
         "sample": "draw from the prior", "interpolate": "walk from one class's mean code to another's",
         "encode": "FOLDER: codes of the images in it", "bench": "time the training step"}
SHAPE = {"likelihood", "latent_dim", "width", "hidden", "image_size"}  # what a checkpoint alone decides
CPU_BF16 = True  # measured: 1.2 to 1.5 times as fast as float32 on a CPU that multiplies bfloat16


# ---------------------------------------------------------- MODEL ----------------------------------------------------
class VAE(nn.Module):
    """q(z|x) = N(mu, diag(exp(logvar))) and p(x|z), each the other's mirror (Kingma and Welling, section 3).

    x is (B, 1, S, S) in [0, 1], S = image_size; z is (B, latent_dim). Where S does not halve evenly the image is padded
    inside: 28 becomes 32 on the way in and is cropped on the way out. No layer mixes images, so a code never depends
    on its batch (batch norm measured no better).
    """

    def __init__(self, latent_dim=2, channels=(32, 64, 128), image_size=32, hidden=512):
        super().__init__()
        stride = 2 ** len(channels)
        side = math.ceil(image_size / stride)  # of the smallest map
        pad = side * stride - image_size
        self.before, self.after, self.size = pad // 2, pad - pad // 2, image_size
        flat = channels[-1] * side**2
        down, up = [], []
        for few, many in zip((1, *channels), channels):
            down += [nn.Conv2d(few, many, 3, stride=2, padding=1), nn.GELU()]
            up = [nn.GELU(), nn.ConvTranspose2d(many, few, 3, stride=2, padding=1, output_padding=1), *up]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, hidden), nn.GELU())
        self.to_mu, self.to_logvar = nn.Linear(hidden, latent_dim), nn.Linear(hidden, latent_dim)
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden), nn.GELU(), nn.Linear(hidden, flat),
                                     nn.Unflatten(1, (channels[-1], side, side)), *up)

    def encode(self, x):
        """(B, 1, S, S) -> mu, logvar, each (B, latent_dim), in float32 also under autocast."""
        h = self.encoder(F.pad(x, (self.before, self.after, self.before, self.after)))  # (B, hidden)
        return self.to_mu(h).float(), self.to_logvar(h).float()

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
    """What training weighs against the KL: -log p(x|z) in nats, or the squared error: (B, 1, S, S) twice -> (B,)."""
    return -log_likelihood(logits, x) if likelihood == "bernoulli" else ((logits.sigmoid() - x) ** 2).flatten(1).sum(1)


# ---------------------------------------------------------- DATA -----------------------------------------------------
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
    """Silhouettes of ten classes, each with its own shade, size, tilt and corners: (N, 28, 28) uint8, labels (N,)."""
    from PIL import Image, ImageDraw
    rng = np.random.default_rng(0)
    outlines = [np.array([p.split(",") for p in text.split()], dtype=float) - 14 for text in OUTLINES.values()]
    labels, images, ramp = rng.integers(10, size=count), np.empty((count, 28, 28), np.uint8), np.linspace(-1, 1, 28)
    for i, label in enumerate(labels):
        angle, scale, shift = rng.normal(0, 0.06), rng.uniform(0.75, 1, 2), rng.uniform(13, 15, 2)
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        corners = (outlines[label] + rng.normal(0, 0.4, outlines[label].shape)) * scale @ turn + shift
        board = Image.new("L", (112, 112))  # four times as large, so that the edges come out smooth
        ImageDraw.Draw(board).polygon([tuple(p) for p in corners * 4], fill=255)
        shade = rng.uniform(0.5, 0.8) + 0.2 * rng.uniform(-1, 1) * ramp[:, None]
        images[i] = np.asarray(board.resize((28, 28), Image.Resampling.BOX)) * shade
    return torch.from_numpy(images), torch.from_numpy(labels)


def read_idx(folder, name):
    """The array in the file NAME-ubyte or NAME-ubyte.gz somewhere under `folder`, as a uint8 tensor."""
    path = next(iter(sorted(folder.rglob(f"{name}-ubyte*"))), folder / f"{name}-ubyte.gz")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\0\0\x08":  # two zeros, "bytes", number of dimensions; then the dimensions; then the data
            raise ValueError("its first bytes are not those of IDX")
        shape = np.frombuffer(raw, ">u4", raw[3], 4).tolist()
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as e:
        raise UserError(f"{path}: missing, truncated or not an IDX file ({e}); get it again") from None


def read_images(folder, size):
    """(images (N, size, size) uint8, paths) of the readable images anywhere under `folder`, sorted by path."""
    from PIL import Image, ImageOps
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in Image.registered_extensions())
    images, kept, bad, kinds = [], [], [], set()
    for path in paths:
        try:
            with Image.open(path) as image:
                kinds.add((image.mode, *image.size))
                if image.mode[0] in "IF":  # more than 8 bits, which convert("L") would clip
                    image = Image.fromarray((np.asarray(image) * (255 / max(1, np.max(image)))).astype(np.uint8))
                grey = ImageOps.pad(ImageOps.exif_transpose(image).convert("L"), (size, size))
            images, kept = [*images, np.asarray(grey)], [*kept, path]
        except Exception as e:  # a damaged image can raise nearly anything
            bad.append(f"{path} ({type(e).__name__})")
    if bad:
        say(f"note: {len(bad)} of {len(paths)} images are unreadable, skipped: {', '.join(bad[:5])}")
    if len(kept) <= 19 * len(bad):  # none, or more than 5 % of them bad
        raise UserError(f"{folder}: {len(kept)} readable images of {len(paths)}; it takes some, and 95 % of them")
    if kinds != {("L", size, size)}:
        say(f"note: images are turned into {size}x{size} grey ones, among them {sorted(kinds)[:3]}")
    return torch.from_numpy(np.stack(images)), kept


def load_data(cfg):
    """{"train", "val", "test": (images (N, H, W) uint8, labels (N,) or None), "classes": their names}."""
    folder, labels = Path("data", cfg.data) if cfg.data in AUTO else Path(cfg.data), None
    if cfg.data in AUTO and not folder.exists():
        import torchvision
        say(f"downloading {cfg.data} into {folder}")
        try:
            {"mnist": torchvision.datasets.MNIST}.get(cfg.data, torchvision.datasets.FashionMNIST)(folder, download=True)
        except Exception as e:
            raise UserError(f"{folder}: no download ({e}); data/README.md says which files go where") from None
    test = None
    if cfg.data == "demo":
        (images, labels), classes = demo_images(12000), list(OUTLINES)
    elif not folder.is_dir():
        raise UserError(f"--data {cfg.data}: no such folder, and none of demo, {', '.join(AUTO)}")
    elif any(folder.rglob("train-*-ubyte*")):
        (images, labels), test = [(read_idx(folder, f"{part}-images-idx3"), read_idx(folder, f"{part}-labels-idx1").long())
                                  for part in ("train", "t10k")]
        classes = FASHION if any(folder.rglob("FashionMNIST")) else [str(i) for i in range(10)]
        for x, y in ((images, labels), test):
            if x.dim() != 3 or y.shape != x.shape[:1] or y.max() > 9:
                raise UserError(f"{folder}: labels {tuple(y.shape)} to {y.max()}, for images {tuple(x.shape)}; get it again")
    else:
        images, paths = read_images(folder, cfg.image_size)
        names = [p.relative_to(folder).parts[0] for p in paths if p.parent != folder]
        classes = sorted(set(names)) if len(names) == len(paths) else []
        labels = torch.tensor([classes.index(n) for n in names]) if classes else None
    if max(images.shape[1:]) > cfg.image_size or len(images) < 10:
        raise UserError(f"{cfg.data}: {len(images)} images of {tuple(images.shape[1:])}; it takes 10 or more, and an "
                        f"--image_size that holds them, not {cfg.image_size}")
    order, sixth = torch.arange(len(images)), len(images) // 6  # of the real sets, the literature takes the last sixth
    if test is None:  # to validate; what has no test set of its own is shuffled, and gives a tenth to each
        order, sixth = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)), len(images) // 10
        order, chosen = order[sixth:], order[:sixth]
        test = images[chosen], labels[chosen] if labels is not None else None
    parts = {"train": order[:-sixth], "val": order[-sixth:]}
    sets = {part: (images[i], labels[i] if labels is not None else None) for part, i in parts.items()}
    return sets | {"test": test, "classes": classes}


# ---------------------------------------------------------- METRICS --------------------------------------------------
def elbo(model, x):
    """log p(x|z) - KL(q(z|x) || p(z)) with one z ~ q: binary pixels (B, 1, S, S) -> (B,) nats (section 2.2)."""
    mu, logvar = model.encode(x)
    return log_likelihood(model.decode(reparameterize(mu, logvar)), x) - kl_divergence(mu, logvar)


def iwae_bound(model, x, k, chunk=1000):
    """log 1/k sum_i p(x, z_i) / q(z_i|x) with z_i ~ q, a bound on log p(x) that rises with k (Burda et al., eq. 8).

    Binary pixels (B, 1, S, S) -> (B,) nats; about `chunk` images are decoded at a time."""
    mu, logvar = model.encode(x)
    terms, step = [], max(1, chunk // len(x))
    for size in [min(step, k - i) for i in range(0, k, step)]:
        z = reparameterize(mu.expand(size, *mu.shape), logvar.expand(size, *mu.shape))  # (size, B, D)
        logits = model.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        log_ratio = 0.5 * ((z - mu) ** 2 / logvar.exp() + logvar - z**2).sum(-1)  # log p(z) / q(z|x), (size, B)
        terms.append(log_likelihood(logits, x) + log_ratio)
    return torch.cat(terms).logsumexp(0) - math.log(k)


def knn_accuracy(train_z, train_y, test_z, test_y, k=10):
    """Share (0-1) of test points whose class is the commonest among their k nearest training points, the lower class
    winning a tie: codes (N, D), (M, D), labels (N,), (M,)."""
    votes, hits = F.one_hot(train_y), 0
    for z, y in zip(test_z.split(1000), test_y.split(1000)):
        nearest = torch.cdist(z, train_z).topk(min(k, len(train_z)), largest=False).indices  # (1000, k)
        hits += (votes[nearest].sum(1).argmax(1) == y).sum().item()
    return hits / len(test_y)


def tsne(x, perplexity=30.0, steps=500):
    """t-SNE (van der Maaten and Hinton, 2008), exact: (N, D) -> (N, 2). It starts from the first two principal
    components, so nothing is random."""
    n, x = len(x), (x - x.mean(0)).double()
    d2 = (torch.cdist(x, x) ** 2).fill_diagonal_(math.inf)
    low, high = torch.zeros(n, 1), torch.full((n, 1), math.inf)
    beta = 1 / (x.var(0).sum().clamp_min(1e-12) * torch.ones(n, 1, dtype=x.dtype))
    for _ in range(60):  # bisect each row's precision until its perplexity is the one asked for
        p = torch.softmax(-beta * d2, 1)
        wide = torch.special.entr(p).sum(1, keepdim=True) > math.log(min(perplexity, max(1.1, (n - 1) / 3)))
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    p = ((p + p.T) / (2 * n)).clamp_min(1e-12).float()
    y = (x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T).float()
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


# ---------------------------------------------------------- EVALUATE, PREDICT ----------------------------------------
def pixels(images, size):
    """uint8 (B, H, W) -> float (B, 1, size, size) in [0, 1], padded with zeros."""
    top, left = (size - images.shape[1]) // 2, (size - images.shape[2]) // 2
    pad = (left, size - images.shape[2] - left, top, size - images.shape[1] - top)
    return F.pad(images.unsqueeze(1).float() / 255, pad)


def test_pixels(images, cfg):
    """What a model is tested on: the pixels; binarised, for `bernoulli`, once and for all by a seed of their own."""
    x = pixels(images, cfg.image_size)
    return x if cfg.likelihood == "gaussian" else (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < x).float()


@torch.no_grad()
def evaluate(model, cfg, x, device, rows=None):
    """Means over x (N, 1, S, S): `bernoulli`: ELBO, reconstruction error, KL in nats; `gaussian`: squared error, KL and
    the objective. Each batch has its own seed, so that nothing depends on how many processes share the work.

    `formula` is 0.7 sum(sigma^2 + mu^2 - log sigma - 0.5) + 0.3 squared error, an objective often seen. Its sum is
    KL(q || N(0, I/2)) + D/2 log 2: a model trained on the true KL reaches it with its latents divided by sqrt(2), which
    is how it is counted; `formula_raw` takes them as they are. `rows` collects (error, KL) per image."""
    D, total = cfg.latent_dim, torch.zeros(3 + 3 * cfg.latent_dim, dtype=torch.float64, device=device)
    for number, batch in list(enumerate(x.split(500)))[RANK::WORLD]:
        torch.manual_seed(seed_for("evaluate", number))
        logits, mu, logvar = model(batch := batch.to(device))
        error, sigma = reconstruction_error(cfg.likelihood, logits, batch)[:, None], (0.5 * logvar).exp()
        each_kl = 0.5 * (sigma**2 + mu**2 - 1 - logvar)
        raw = (sigma**2 + mu**2 - sigma.log() - 0.5).sum(1, keepdim=True)
        total += torch.cat([torch.ones_like(error), error, raw, mu, mu**2, each_kl], 1).double().sum(0)
        if rows is not None:
            rows.append(torch.cat([error, each_kl.sum(1, keepdim=True)], 1).cpu())
    (n, *_), (_, error, raw, *_) = (total := all_sum(total)).tolist(), (total / total[0]).tolist()
    mean, square, each_kl = (total[3:] / n).view(3, D)
    kl, active = each_kl.sum().item(), (square - mean**2 > 0.01).sum().item()  # active units: Burda et al., section 5
    figures = {"elbo": -error - kl, "reconstruction": error} if cfg.likelihood == "bernoulli" else {
        "loss": error + cfg.kl_weight * kl, "squared_error": error, "formula_raw": 0.7 * raw + 0.3 * error,
        "formula": 0.7 * (kl + 0.5 * D * math.log(2)) + 0.3 * error}
    if active == 0:
        say("warning: posterior collapse, no latent dimension carries information: lower --kl_weight, raise --kl_warmup")
    return figures | {"kl": kl, "active": active, "kl_dims": [round(v, 4) for v in each_kl.sort(descending=True).values.tolist()]}


@torch.no_grad()
def tighten(model, cfg, x, device):
    """The IWAE bound of the whole set, from n of its images: the mean gap to the ELBO varies little between images,
    while the bound itself varies by 90 nats (the first 1,000 images of Fashion-MNIST are 2.6 nats easier)."""
    few = x[:: math.ceil(len(x) / cfg.n)]
    gaps = torch.zeros(len(few), dtype=torch.float64, device=device)
    for i in range(RANK, len(few), WORLD):
        torch.manual_seed(seed_for("tighten", i))
        one = few[i : i + 1].to(device)
        gaps[i] = (iwae_bound(model, one, cfg.iwae_k) - elbo(model, one.expand(200, -1, -1, -1)).mean()).item()
    gaps = all_sum(gaps)
    return {"gap": gaps.mean().item(), "gap_se": (gaps.std() / len(gaps) ** 0.5).item(), "iwae_n": len(gaps)}


@torch.no_grad()
def codes(model, images, cfg, device):
    """Posterior means: uint8 (N, H, W) -> (N, latent_dim) on the CPU."""
    return torch.cat([model.encode(pixels(b, cfg.image_size).to(device))[0].cpu() for b in images.split(1000)])


def class_means(model, cfg, data, device):
    """(classes, latent_dim): each class's mean code over the validation images."""
    images, labels = data["val"]
    z = codes(model, images, cfg, device)
    return torch.stack([z[labels == c].mean(0) for c in range(len(data["classes"]))]).nan_to_num() if data["classes"] else None


@torch.no_grad()
def save_grid(model, z, path, columns, above=None):
    """A PNG of the images decoded from z (N, latent_dim), row by row; with `above`, images to show over each row."""
    from torchvision.utils import make_grid, save_image
    x = torch.cat([model.decode(part).sigmoid() for part in z.split(500)])
    if above is not None:
        x = torch.stack([above.unflatten(0, (-1, columns)), x.unflatten(0, (-1, columns))], 1).flatten(0, 2)
    save_image(F.interpolate(make_grid(x, columns, padding=1, pad_value=0.5)[None], scale_factor=2), path)


def path_between(ckpt, first, last):
    """(10, latent_dim): the straight line between two classes' mean codes; classes are named, empty: first and last."""
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
    save_grid(model, path_between(ckpt, cfg.from_class, cfg.to_class).to(device), folder / "interpolation.png", 10)
    from matplotlib.figure import Figure
    flat = cfg.latent_dim <= 2
    z = codes(model, images if flat else images[:2000], cfg, device)
    xy = F.pad(z, (0, 2 - cfg.latent_dim)) if flat else tsne(z)
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    axes = figure.add_subplot(xlabel="$z_1$" if flat else "t-SNE 1", ylabel="$z_2$" if flat else "t-SNE 2",
                              title=f"Posterior means of {len(z):,} test images")
    for c, name in enumerate(ckpt["classes"]):
        axes.scatter(*xy[labels[: len(z)] == c].T.numpy(), s=4, label=name)
    axes.legend(markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "latents.png", dpi=100)


def score(model, cfg, data, device, rows=None):
    """The figures of the test set, 10-nearest-neighbour accuracy first."""
    x, knn = test_pixels(data["test"][0], cfg), {}
    if data["classes"]:
        z, test_z = (codes(model, data[part][0], cfg, device) for part in ("train", "test"))
        knn = {"knn": knn_accuracy(z, data["train"][1], test_z, data["test"][1])}
    figures = evaluate(model, cfg, x, device, rows)
    if cfg.likelihood == "bernoulli":
        bound = tighten(model, cfg, x, device)
        figures = {"iwae": figures["elbo"] + bound["gap"], **figures, **bound, "iwae_k": cfg.iwae_k}
    return knn | figures | {"n": len(x)}


def build(cfg):
    return VAE(cfg.latent_dim, (cfg.width, 2 * cfg.width, 4 * cfg.width), cfg.image_size, cfg.hidden)


def predict(mode, inputs, flags):
    """Every mode that uses a trained model."""
    cfg, ckpt, device, folder = open_checkpoint(flags)
    model = build(cfg).to(device).eval()
    load_weights(model, ckpt["model"], cfg.ckpt)
    if mode == "eval":
        figures = score(model, cfg, load_data(cfg), device, rows := [])
        np.savetxt(path := folder / "test.csv", torch.cat(rows), "%.4f", ",", header="error,kl", comments="")
        say(show(figures, ", ", ".6g"))
    elif mode == "sample":
        torch.manual_seed(seed_for("sample", cfg.seed))
        z = torch.randn(cfg.n, cfg.latent_dim).to(device)
        save_grid(model, z, path := folder / "samples.png", math.ceil(cfg.n**0.5))
    elif mode == "interpolate":
        save_grid(model, path_between(ckpt, cfg.from_class, cfg.to_class).to(device), path := folder / "interpolation.png", 10)
    else:
        images, paths = read_images(inputs[0], cfg.image_size)
        np.save(path := folder / "codes.npy", codes(model, images, cfg, device).numpy())
        (folder / "files.txt").write_text("".join(f"{p}\n" for p in paths), encoding="utf-8")
    say(f"written: {path}")


# ---- runtime: identical in all five scripts ----
SCRIPT, RANK, WORLD = Path(__file__).stem, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
FREE = {"out", "save", "resume", "device", "compile", "max_steps", "max_minutes", "save_every", "log_every"}


class UserError(Exception):
    """What a user can mend: shown as one `error:` line, exit status 2."""


def guarded(main):
    @functools.wraps(main)
    def wrapper(argv=None):
        try:
            return main(argv)
        except (UserError, OSError, torch.OutOfMemoryError) as e:
            hint = "lower --batch_size: " if isinstance(e, torch.OutOfMemoryError) else ""
            print("error:", *f"{hint}{e}".split(), file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return wrapper


def say(text, **how):
    if RANK == 0:
        print(text, flush=True, **how)


def seed_for(*key):
    """A seed from any key, the same on every machine: (seed, step, rank) of a step, (seed, epoch) of an order."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


def parse_args(argv):
    """(mode, inputs, flags). `flags` holds what was typed and no more: presets and checkpoints fill in the rest."""
    def refuse(message):
        raise UserError(f"{message}; see python {SCRIPT}.py --help")
    modes = "; ".join(f"{mode}: {what}" for mode, what in MODES.items())
    parser = argparse.ArgumentParser(usage="%(prog)s [MODE] [INPUT ...] [--flag value ...]", allow_abbrev=False,
                                     description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("words", nargs="*", metavar="MODE", help=modes)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.M))
    for f in dataclasses.fields(Config):
        kind, text = type(f.default), comments[f.name]
        how = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": kind.__name__.upper()}
        if choices := re.match(r"\w+(\|\w+)+", text):  # a comment that begins with a|b|c lists the choices
            how["choices"] = choices[0].split("|")
        parser.add_argument(*dict.fromkeys([f"--{f.name}", "--" + f.name.replace("_", "-")]), **how,
                            default=argparse.SUPPRESS, help=f"{text} [{f.default}]".replace("%", "%%"))
    flags = vars(parser.parse_intermixed_args(argv))
    mode, *inputs = flags.pop("words") or ["train"]
    for name, value in flags.items():  # sizes, intervals and epochs are at least 1, other numbers 0
        least = int(name.endswith(("_size", "_dim", "_every", "epochs")))
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            refuse(f"--{name} {value}: must be finite, and at least {least}")
    if mode not in MODES or bool(inputs) > MODES[mode].split(":")[0].isupper():  # "FOLDER: ..." takes inputs
        refuse(f"{' '.join([mode, *inputs])!r} is none of the modes {', '.join(MODES)}")
    return mode, inputs, flags


def pick_device(name):
    """The device that --device means. Under torchrun it is this process's own, and the processes find each other."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name not in ("auto", "cpu", best):
        raise UserError(f"--device {name}: there is none here; use --device {best}")
    device = torch.device(best if name == "auto" else name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def pick_dtype(name, device):
    """`auto` is bfloat16 where the chip multiplies it natively, and on a CPU only if this script gains by it."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability() >= (8, 0)
    else:
        info = Path("/proc/cpuinfo")
        native = CPU_BF16 and info.exists() and re.search("amx_bf16|avx512_bf16", info.read_text())
    dtype = ("bfloat16" if native else "float32") if name == "auto" else name
    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    say(f"device: {device} ({chip}) x {WORLD}, {dtype} ({'bfloat16 is native' if native else 'no gain by bfloat16'})")
    return dtype


def all_sum(tensor):
    """The sum over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def load_checkpoint(path):
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if ckpt["script"] == SCRIPT:
            return ckpt
        problem = f"a checkpoint of {ckpt['script']}.py"
    except FileNotFoundError:
        problem = "there is no such file"
    except Exception as e:  # a damaged file can raise nearly anything
        problem = f"not a readable checkpoint ({type(e).__name__})"
    raise UserError(f"{path}: {problem}; train first, or name a checkpoint of {SCRIPT}.py")


def load_weights(model, state, path, strict=True):
    """Copies weights into the model; unless strict (--init), those of another size are left out and named."""
    mine = model.state_dict()
    fit = {k: v for k, v in state.items() if k in mine and v.shape == mine[k].shape}
    left = sorted((set(mine) | set(state)) - set(fit))
    if left and (strict or not fit):
        raise UserError(f"{path}: its weights do not fit this model: {', '.join(left[:5])}")
    if left:
        say(f"note: not taken from {path}, missing or of another size: {', '.join(left[:5])}")
    model.load_state_dict(fit, strict=False)


def merge(ckpt, flags, path, fixed):
    """A checkpoint's Config under the flags typed now, of which the `fixed` ones may not differ from it."""
    for name in sorted(fixed & set(flags)):
        if flags[name] != (saved := ckpt["config"].get(name)):
            raise UserError(f"--{name} {flags[name]}: {path} was made with {saved}; leave it out, or start anew")
    return Config(**ckpt["config"] | flags)


def open_checkpoint(flags):
    """(cfg, ckpt, device, folder to write into) for the modes that use a trained model."""
    newest = sorted(Path("out").glob(f"{SCRIPT}-*/best.pt"), key=lambda p: p.stat().st_mtime)
    path = Path(flags.get("ckpt") or (newest[-1] if newest else f"out/{SCRIPT}-demo/best.pt"))
    ckpt = load_checkpoint(path)
    cfg = merge(ckpt, {"device": "auto", "save": str(path.parent)} | flags, path, SHAPE)
    say(f"checkpoint: {path}, step {ckpt['step']} on {ckpt['config']['data']}, best {ckpt['best']:.5g}")
    Path(cfg.save).mkdir(parents=True, exist_ok=True)
    return cfg, ckpt, pick_device(cfg.device), Path(cfg.save)


class Run:
    """A training run: its configuration and folder, the losses on the way, the wish to stop."""

    def __init__(self, flags, training):
        self.began, self.pending, self.wish, self.stop = time.perf_counter(), [], False, False
        name = flags.get("data", "auto")
        if name == "auto":
            name = next((n for n, inside in AUTO.items() if Path("data", n, inside).exists()), "demo")
        say(f"data: {name}" + (f" (generated; {REAL})" if name == "demo" else ""))
        self.device, self.ckpt, box = pick_device(flags.get("device", "auto")), {}, [None]
        if training and RANK == 0:  # rank 0 picks the folder, and tells the others
            box = [self.pick_folder(Path(flags.get("out") or f"out/{SCRIPT}-{Path(name).name}"), flags)]
        if WORLD > 1:
            dist.broadcast_object_list(box)
        self.folder, self.cfg = box[0], Config(**PRESETS.get(name, {}) | flags | {"data": name})
        if training and (last := self.folder / "last.pt").exists():
            self.ckpt = load_checkpoint(last)
            self.cfg = merge(self.ckpt, flags, last, {f.name for f in dataclasses.fields(Config)} - FREE)
        self.cfg.dtype = pick_dtype(self.cfg.dtype, self.device)
        start = {"step": 0, "best": None, "window": [], "seconds": 0.0}
        self.step, self.best, self.window, self.seconds = (self.ckpt.get(k, v) for k, v in start.items())
        self.mark = self.began, self.step
        if training and RANK == 0:  # the log goes on from the checkpoint's step
            path = self.folder / "log.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines() if self.ckpt and path.exists() else []
            kept = [s for s in lines if (r := json.loads(s))["step"] <= self.step and r["split"] != "test"]
            path.write_text("".join(f"{s}\n" for s in kept), encoding="utf-8")
            self.log = path.open("a", encoding="utf-8", buffering=1)
        for number in (signal.SIGINT, signal.SIGTERM) if training else ():
            signal.signal(number, self.ask_to_stop)

    def pick_folder(self, base, flags):
        """The folder to write into: one that holds a run is continued or left alone."""
        family = [base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 1000))]
        runs = {p: (p / "last.pt").stat().st_mtime for p in family if (p / "last.pt").exists()}
        if flags.get("resume"):
            folder = max(runs, key=runs.get) if runs and not flags.get("out") else base
        else:
            folder = next(p for p in family if not (p / "log.jsonl").exists())
        say(f"run: {folder}, " + ("continued" if folder in runs else "new" if folder == base else f"as {base} is taken"))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def ask_to_stop(self, number, _):
        self.wish = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def record(self, losses):
        """After each step: {name: scalar on the device}, this rank's share (its sum * world / the global count)."""
        self.step, self.names = self.step + 1, list(losses)
        self.pending.append(torch.stack([v.detach().float() for v in losses.values()]))

    def due(self, total):
        """(log, evaluate, save) after this step, the same on all ranks. Only here do losses leave the device, is a
        non-finite one seen, and do the ranks agree to stop."""
        cfg, end = self.cfg, self.step == total
        log, check, save = (end or self.step % n == 0 for n in (cfg.log_every, cfg.eval_every, cfg.save_every))
        self.wish |= 0 < cfg.max_minutes <= (time.perf_counter() - self.began) / 60
        if log or check or save or (self.wish and WORLD == 1):
            rows = torch.stack([*self.pending, torch.full_like(self.pending[0], float(self.wish))])
            *rows, wish = (all_sum(rows) / WORLD).tolist()  # the shares' mean is the loss of the global batch
            for step, row in enumerate(rows, self.step - len(rows) + 1):
                if not all(map(math.isfinite, row)):
                    raise UserError(f"step {step}: the loss is not finite, {dict(zip(self.names, row))}; last.pt is from "
                                    "before it: start anew with a lower --lr, or with --dtype float32")
            self.window, self.pending, self.stop = self.window + rows, [], wish[0] > 0
        return log, check, check or save or self.stop

    def write(self, split, figures, more="", end="\n"):
        """A record in log.jsonl, and a line on the terminal."""
        if RANK == 0:
            self.log.write(json.dumps({"step": self.step, "split": split, **figures}) + "\n")
            live = sys.stdout.isatty()  # there the next line overwrites one that ends in \r
            say("\x1b[K" * live + f"{split:5} {self.step:>6} | {show(figures, ' ', '<8.4g')}{more}", end=end if live else "\n")

    def log_losses(self, total, unit, count, lr):
        """The mean losses and the speed since the last log line, with `count` units in a step."""
        rate = (self.step - self.mark[1]) / max(1e-9, time.perf_counter() - self.mark[0])
        figures = {k: statistics.fmean(column) for k, column in zip(self.names, zip(*self.window))}
        self.write("train", figures | {"lr": lr, f"{unit}/s": round(rate * count, 1)},
                   f"| eta {(total - self.step) / max(rate, 1e-9) / 60:.1f} min", end="\r")
        self.window, self.mark = [], (time.perf_counter(), self.step)

    def save(self, name, **state):
        """Rank 0 writes the checkpoint: whole or not at all, whatever happens meanwhile."""
        state |= {"script": SCRIPT, "config": dataclasses.asdict(self.cfg), "step": self.step, "best": self.best,
                  "window": self.window, "seconds": self.seconds + time.perf_counter() - self.began}
        path, part = self.folder / name, self.folder / f"{name}.part"
        try:
            if RANK == 0:
                with part.open("wb") as f:
                    torch.save(state, f)
                    os.fsync(f.fileno())
                os.replace(part, path)
        except (OSError, RuntimeError) as e:
            part.unlink(missing_ok=True)
            raise UserError(f"{path}: cannot save ({e}); what it held is unharmed: make room, then --resume") from None
        self.mark = time.perf_counter(), self.step  # evaluating and saving do not count as training time

    def goodbye(self):
        say(f"\nstopped after step {self.step}, saved; to continue: "
            f"python {SCRIPT}.py --data {self.cfg.data} --out {self.folder} --resume")

    def finish(self, figures):
        """The learning curves, and the last line of a run."""
        self.write("test", figures)
        minutes = (self.seconds + time.perf_counter() - self.began) / 60
        say(f"log and pictures: {self.folder}")
        if RANK == 0:
            self.log.close()
            draw_curves(self.folder)
        say(f"final test {show(figures, ', ', '.5g')} | {minutes:.1f} min | {peak_gb(self.device):.1f} GB")


def peak_gb(device):
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else rss) / 1e9


def show(figures, between, form):
    return between.join(f"{k} {v:{form}}" for k, v in figures.items() if isinstance(v, (int, float)))


def draw_curves(folder):
    """curves.png: each figure of log.jsonl against the step."""
    from matplotlib.figure import Figure
    curves, rows = {}, lambda: math.ceil(len(curves) / 3)
    for r in map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()):
        for k, v in r.items():
            if r["split"] != "test" and k != "step" and not k.endswith("/s") and isinstance(v, (int, float)):
                curves.setdefault(k, {}).setdefault(r["split"], []).append((r["step"], v))
    figure = Figure(figsize=(12, 3 * rows()), layout="constrained")
    for i, (name, lines) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(rows(), 3, i, xlabel="step", ylabel=name)
        for split, points in lines.items():
            axes.plot(*zip(*points), label=split, marker="." if len(points) < 30 else "")
        axes.legend()
    figure.savefig(folder / "curves.png", dpi=100)


def bench(run, raw, fetch, update, unit, count):
    """Times the training step, eager then compiled, and prints one JSON line: fetch(step) -> batch is the wait for
    data, update(step, batch) the computation; `count` units are in a step."""
    wait = torch.cuda.synchronize if run.device.type == "cuda" else lambda: None
    with FlopCounterMode(display=False) as flops:
        update(1, fetch(1))
    result = {"script": SCRIPT, "device": str(run.device), "dtype": run.cfg.dtype, "world": WORLD}
    for kind in ("eager", "compiled"):
        times = []
        for step in range(1, 37):  # the first compiles, five more warm up
            start = time.perf_counter()
            if kind == "compiled" and step == 1:
                raw.compile()
            batch = fetch(step)
            wait()
            fetched = time.perf_counter()
            update(step, batch)
            wait()
            times.append((time.perf_counter() - start, fetched - start))
        seconds, data = (statistics.median(column) for column in zip(*times[6:]))
        result[kind] = {f"{unit}/s": round(count / seconds, 1), "ms_per_step": round(1e3 * seconds, 3),
                        "data_share": round(data / seconds, 4), "first_step_seconds": round(times[0][0], 1),
                        "tflops": round(flops.get_total_flops() * WORLD / seconds / 1e12, 3)}
    say(json.dumps(result | {"peak_gb": round(peak_gb(run.device), 2)}))
# ---- end of runtime ----


# ---------------------------------------------------------- MAIN -----------------------------------------------------
@guarded
def main(argv=None):
    mode, inputs, flags = parse_args(argv)
    if mode not in ("train", "bench"):
        return predict(mode, inputs, flags)
    run = Run(flags, training=mode == "train")
    cfg, ckpt, device = run.cfg, run.ckpt, run.device

    data = load_data(cfg)
    images, size = data["train"][0].to(device), min(cfg.batch_size, len(data["train"][0]))
    val = test_pixels(data["val"][0], cfg)
    per_epoch = len(images) // size
    schedule = per_epoch * cfg.epochs
    total = min(cfg.max_steps or schedule, schedule)
    say(f"{len(images):,} images to train, {len(val):,} to validate, {len(data['test'][0]):,} to test; {total:,} steps")

    torch.manual_seed(cfg.seed)
    raw = build(cfg)
    if ckpt or cfg.init:
        load_weights(raw, (ckpt or load_checkpoint(cfg.init))["model"], cfg.init, strict=bool(ckpt))
    raw = raw.to(device, memory_format=torch.channels_last)
    groups = [[p for p in raw.parameters() if (p.dim() >= 2) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}],
                                  cfg.lr, fused=True)
    if ckpt:
        optimizer.load_state_dict(ckpt["optimizer"])
    if mode == "train" and (cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda"):
        raw.compile()
    model = nn.parallel.DistributedDataParallel(raw) if WORLD > 1 else raw

    @functools.lru_cache(1)
    def order(epoch):
        return torch.randperm(len(images), generator=torch.Generator().manual_seed(seed_for(cfg.seed, epoch))).to(device)

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
        loss = error + cfg.kl_weight * min(1, step / max(1, cfg.kl_warmup)) * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss, "error": error, "kl": kl}

    if mode == "bench":
        return bench(run, raw, fetch, update, "images", size)

    for step in range(run.step + 1, total + 1):
        run.record(update(step, fetch(step)))
        log, check, save = run.due(total)
        if log:
            run.log_losses(total, "images", size, learning_rate(cfg, step, schedule))
        if check:
            figures = evaluate(raw, cfg, val, device)
            run.write("val", figures)
            worth = figures["elbo"] if cfg.likelihood == "bernoulli" else -figures["loss"]
            state = {"classes": data["classes"], "class_means": class_means(raw, cfg, data, device)}
            if run.best is None or worth > run.best:
                run.best = worth
                run.save("best.pt", model=raw.state_dict(), **state)
        if save:
            run.save("last.pt", model=raw.state_dict(), optimizer=optimizer.state_dict())
        if run.stop and step < total:
            return run.goodbye()

    best = load_checkpoint(run.folder / "best.pt")
    load_weights(raw, best["model"], run.folder)
    figures = score(raw, cfg, data, device)
    if RANK == 0:
        draw(raw, cfg, best, data, run.folder, device)
    run.finish(figures)


def learning_rate(cfg, step, schedule):
    """Linear warm-up, then half a cosine down to zero."""
    return cfg.lr * min(step / max(1, cfg.warmup), 0.5 + 0.5 * math.cos(math.pi * step / schedule), 1)


if __name__ == "__main__":
    main()
