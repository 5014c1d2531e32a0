"""A convolutional variational autoencoder (VAE) for small grey images, tested with the literature's bounds.

    python vae.py --data demo                        # generated flowers: no download, no GPU
    python vae.py --data fashionmnist                # downloads 30 MB on first use; 2-D latent space
    python vae.py --data path/to/images              # your own images; sub-folders, if any, are the classes
    torchrun --nproc_per_node=8 vae.py --data fashionmnist
    python vae.py --data fashionmnist --resume       # continue a run that was stopped

    python vae.py eval                               # test the newest out/vae-*/best.pt, or --ckpt FILE
    python vae.py sample --n 64 --save pictures
    python vae.py interpolate --from_class trouser --to_class bag
    python vae.py encode path/to/images --save codes

Measured on one thread of a CPU with bfloat16 (AMD EPYC), other work beside it; one run each, seed 0:

    --data demo                                        10-NN accuracy 0.994 on the 2-D codes; 1.2 minutes
    --data fashionmnist                                ELBO -253.8 nats a test image in 2-D; 7.4 minutes
    --data fashionmnist --latent_dim 40 --epochs 120   ELBO -230.7, IWAE bound -227.6; 100.8 minutes

The literature's VAE has an IWAE bound of -228.7 under this protocol.

Paper: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, arXiv 1312.6114 (all sections, equations
and appendices below). Bound with k samples: Burda et al., "Importance Weighted Autoencoders", 2016, arXiv
1509.00519. Protocol: Norouzi et al., "Exemplar VAE", 2020, arXiv 2004.04795: 28x28 pixels, binarised at
random in each training step and once for testing; 50,000 to train, 10,000 to validate, 10,000 to test.
Data: Xiao et al., "Fashion-MNIST", 2017, arXiv 1708.07747 (MIT licence).
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
    data: str = "auto"  # demo, fashionmnist, mnist or a folder of images; auto: the first in data/, else demo
    out: str = ""  # folder of the run (default: out/SCRIPT-DATA)
    save: str = ""  # folder for predictions (default: the folder of the checkpoint)
    ckpt: str = ""  # checkpoint to test or predict with (default: the newest best.pt in out/SCRIPT-*)
    init: str = ""  # checkpoint whose weights a new run starts from
    resume: bool = False  # continue the run in --out from its last.pt, if there is one
    device: str = "auto"  # auto|cpu|cuda: where to run
    dtype: str = "auto"  # auto|float32|bfloat16: precision of training (autocast); metrics are always float32
    compile: str = "auto"  # auto|on|off: torch.compile; auto: on for CUDA under Linux
    seed: int = 0  # seed of the initial weights, the order of the data, and the noise
    batch_size: int = 64  # images per step, over all processes
    lr: float = 2e-3  # peak learning rate
    max_steps: int = 0  # end the training after this many steps; 0: after all epochs
    eval_every: int = 1000  # steps between validations
    save_every: int = 1000  # steps between saves of last.pt; each validation saves it, too
    log_every: int = 100  # steps between log lines
    # the task
    epochs: int = 10  # passes over the training set
    warmup: int = 500  # steps in which the learning rate rises
    likelihood: str = "bernoulli"  # bernoulli|gaussian: binarised pixels, or grey with squared error
    latent_dim: int = 2  # dimensions of z
    width: int = 32  # channels of the first convolution; the next two have twice and four times as many
    hidden: int = 512  # units of the dense layers
    image_size: int = 28  # side in pixels; smaller images are padded, those of a folder resized
    kl_weight: float = 1.0  # weight of the KL divergence (beta of a beta-VAE)
    kl_warmup: float = 0.5  # share of the training in which kl_weight rises from 0
    iwae_k: int = 5000  # samples per image for the IWAE bound of the test
    iwae_n: int = 64  # test images for that bound, at most
    n: int = 64  # sample: number of images
    from_class: str = ""  # interpolate: the class to start from (default: the first by name)
    to_class: str = ""  # interpolate: the class to end at (default: the last by name)


PRESETS = {"demo": {"epochs": 8, "iwae_k": 500, "compile": "off"}}
MODES = {"train": "", "eval": "", "sample": "", "interpolate": "", "encode": "FOLDER"}  # mode: its inputs
UNIT = "images"  # what a batch is counted in
SHAPE = {"likelihood", "latent_dim", "width", "hidden", "image_size"}  # fields that a checkpoint fixes


# MODEL ------------------------------------------------------------------------------------------------------
class Residual(nn.Module):
    """x + f(x), where f is two dense layers: (B, width) -> (B, width)."""

    def __init__(self, width):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.f(x)


class VAE(nn.Module):
    """The encoder q(z|x) = N(mu, diag(exp(logvar))) and the decoder p(x|z), its mirror (section 3).

    x is (B, 1, S, S) in [0, 1], S = image_size; z is (B, latent_dim). Convolutions halve the side, rounded
    up, and double it again: 28, 14, 7, 4, then 8, 16, 32, cut to 28, with 1, 32, 64, 128 channels and back.
    """

    def __init__(self, latent_dim=2, channels=(32, 64, 128), image_size=32, hidden=512):
        super().__init__()
        self.image_size, down, up = image_size, [], []
        for c_in, c_out in zip((1, *channels), channels):  # `up` is built from its end
            down += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GELU()]
            up = [nn.GELU(), nn.ConvTranspose2d(c_out, c_in, 3, stride=2, padding=1, output_padding=1), *up]
        side = math.ceil(image_size / 2 ** len(channels))  # of the smallest map
        flat = channels[-1] * side**2
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, hidden), nn.GELU(),
                                     Residual(hidden))
        self.to_mu, self.to_logvar = nn.Linear(hidden, latent_dim), nn.Linear(hidden, latent_dim)
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden), nn.GELU(), Residual(hidden),
                                     nn.Linear(hidden, flat), nn.Unflatten(1, (-1, side, side)), *up)

    def encode(self, x):
        """(B, 1, S, S) -> mu, logvar: (B, latent_dim) each, float32 also under autocast."""
        h = self.encoder(x)  # (B, hidden)
        logvar = 4 - F.softplus(4 - self.to_logvar(h).float())  # smoothly at most 4: exp(logvar) is finite
        return self.to_mu(h).float(), logvar

    def decode(self, z):
        """(B, latent_dim) -> logits (B, 1, S, S); their sigmoid is the mean of the pixels."""
        return self.decoder(z)[:, :, : self.image_size, : self.image_size].float()

    def forward(self, x):
        """(B, 1, S, S) -> logits (B, 1, S, S), mu, logvar, with one sample of z."""
        mu, logvar = self.encode(x)
        return self.decode(reparameterize(mu, logvar)), mu, logvar


def reparameterize(mu, logvar):
    """A sample z = mu + sigma * epsilon, epsilon ~ N(0, I), of the shape of mu and logvar (section 2.4)."""
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, I)) in closed form: (B, latent_dim) twice -> (B,) nats (appendix B)."""
    return 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum(1)


def log_likelihood(logits, x, likelihood="bernoulli"):
    """log p(x|z), summed over the pixels: (..., 1, S, S) twice -> (...) nats (appendix C). For "gaussian"
    with variance 1/2, without the constant, it is minus the squared error."""
    if likelihood == "gaussian":
        return -((logits.sigmoid() - x) ** 2).flatten(-3).sum(-1)
    return (x * logits - F.softplus(logits)).flatten(-3).sum(-1)


# DATA -------------------------------------------------------------------------------------------------------
AUTO = {  # what --data auto looks for in data/NAME: the file that is downloaded last
    "fashionmnist": "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz",
    "mnist": "MNIST/raw/t10k-labels-idx1-ubyte.gz",
}
REAL = "--data fashionmnist downloads the real set"
PETALS = 8  # the demo's classes are flowers of 1 to 8 petals


def demo_images(count):
    """Flowers, each with a random affine map and shade: (N, 28, 28) uint8, labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(PETALS, (count,), generator=generator)
    maps = torch.eye(2, 3) + 0.06 * torch.randn(count, 2, 3, generator=generator)
    shades = 0.5 + 0.4 * torch.rand(count, 1, 1, generator=generator)
    x, y = F.affine_grid(maps, (count, 1, 28, 28), align_corners=False).unbind(-1)  # (N, 28, 28), -1 to 1
    radius = 0.6 + 0.3 * torch.cos((labels[:, None, None] + 1) * torch.atan2(y, x))  # of the outline
    inside = torch.sigmoid(30 * (radius - torch.hypot(x, y)))  # 1 inside, 0 outside, smooth between
    return (255 * shades * inside).byte(), labels


def find_files(folder, pattern="**/*"):
    """Sorted paths in a folder, without hidden files and what operating systems leave behind."""
    junk = re.compile(r"\.|__MACOSX$|Thumbs\.db$|desktop\.ini$", re.I)
    return [p for p in sorted(folder.glob(pattern)) if not any(map(junk.match, p.relative_to(folder).parts))]


def torchvision_set(name):
    """(Fashion-)MNIST, downloaded if it is missing: images (70000, 28, 28) uint8, labels, class names."""
    from torchvision.datasets import MNIST, FashionMNIST
    kind, folder = {"mnist": MNIST, "fashionmnist": FashionMNIST}[name], Path("data", name)
    try:
        if RANK == 0:
            kind(folder, download=True)
        if WORLD > 1:
            dist.barrier()  # the other processes wait for rank 0
        parts = [kind(folder, train=True), kind(folder, train=False)]
        images, labels = torch.cat([p.data for p in parts]), torch.cat([p.targets for p in parts])
        if images.shape != (len(labels), 28, 28):
            raise ValueError(f"{len(labels)} labels for images of shape {tuple(images.shape)}")
    except Exception as e:
        raise UserError(f"{folder}: cannot be downloaded or read ({e}); see data/README.md") from None
    return images, labels, [text.split(" - ")[0].lower() for text in kind.classes]


def read_images(folder, size):
    """All images under a folder as (N, size, size) uint8, and their paths. Each is turned upright by its EXIF
    tag, put on white if it is transparent, made grey, and resized into a square with black margins."""
    images, bad, endings = {}, [], "jpg jpeg png gif bmp pgm ppm tif tiff webp".split()
    for path in find_files(Path(folder)):
        if path.suffix.lower()[1:] not in endings:
            continue
        try:
            image = ImageOps.exif_transpose(Image.open(path))
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            grey = Image.alpha_composite(white, image).convert("L")
            images[path] = np.asarray(ImageOps.pad(grey, (size, size)))
        except Exception as e:  # a damaged image can raise nearly anything
            bad.append(f"{path} ({type(e).__name__})")
    count = len(images) + len(bad)
    if bad:
        say(f"note: {len(bad)} of {count} images are unreadable, skipped: {', '.join(bad[:5])}")
    if not images or len(bad) > 0.05 * count:
        raise UserError(f"{folder}: {len(images)} readable images, {len(bad)} unreadable (limit: 5 %)")
    return torch.from_numpy(np.stack(list(images.values()))), list(images)


def load_data(cfg):
    """{"train", "val", "test": (images (N, S, S) uint8, labels (N,)), "classes": their names, if any}."""
    if cfg.data == "demo":
        images, labels = demo_images(12000)
        classes = [f"{k + 1}-petal" for k in range(PETALS)]
    elif cfg.data in AUTO:
        images, labels, classes = torchvision_set(cfg.data)
    else:
        folder = Path(cfg.data)
        if not folder.is_dir():
            raise UserError(f"--data {folder}: no such folder, and none of demo, {', '.join(AUTO)}")
        images, paths = read_images(folder, cfg.image_size)
        paths = [path.relative_to(folder) for path in paths]
        names = [path.parts[0] if len(path.parts) > 1 else "" for path in paths]  # of the sub-folders
        classes = sorted(set(names)) if all(names) else []
        labels = torch.tensor([classes.index(name) if classes else 0 for name in names])
        order = torch.tensor([seed_for(path.as_posix()) for path in paths]).argsort()  # shuffled
        images, labels = images[order], labels[order]
    margin = cfg.image_size - images.shape[1]
    if margin < 0:
        raise UserError(f"--image_size {cfg.image_size}: the images of {cfg.data} are larger")
    if len(images) < 20:
        raise UserError(f"--data {cfg.data}: {len(images)} images; at least 20 are needed")
    images = F.pad(images, (margin // 2, margin - margin // 2) * 2)
    held_out = len(images) // (7 if cfg.data in AUTO else 10)  # 10,000 of 70,000, else a tenth
    sizes = len(images) - 2 * held_out, held_out, held_out
    train, val, test = zip(images.split(sizes), labels.split(sizes))
    return {"train": train, "val": val, "test": test, "classes": classes}


def target_pixels(images, likelihood, fixed=False):
    """The x of p(x|z): uint8 (B, S, S) -> pixels (B, 1, S, S), grey, or for "bernoulli" drawn as 0 or 1;
    `fixed` draws them alike at every call, on the CPU, as validation and test must."""
    x, generator = images[:, None] / 255, torch.Generator().manual_seed(1) if fixed else None
    return torch.bernoulli(x, generator=generator) if likelihood == "bernoulli" else x


# METRICS ----------------------------------------------------------------------------------------------------
def elbo(model, x):
    """log p(x|z) - KL(q(z|x) || p(z)) with one z ~ q(z|x): binary x (B, 1, S, S) -> (B,) nats (eq. 10)."""
    mu, logvar = model.encode(x)
    return log_likelihood(model.decode(reparameterize(mu, logvar)), x) - kl_divergence(mu, logvar)


def iwae_bound(model, x, k, chunk=1000):
    """log 1/k sum_i p(x, z_i) / q(z_i|x), z_i ~ q(z|x): in expectation a lower bound on log p(x), which rises
    with k (Burda et al., eq. 8). Binary x (B, 1, S, S) -> (B,) nats. It decodes about `chunk` z at a time."""
    mu, logvar = model.encode(x)  # (B, D)
    log_weights, per_chunk = [], max(1, chunk // len(x))
    for start in range(0, k, per_chunk):
        epsilon = torch.randn_like(mu.expand(min(per_chunk, k - start), *mu.shape))  # (samples, B, D)
        z = mu + torch.exp(0.5 * logvar) * epsilon
        logits = model.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])  # (samples, B, 1, S, S)
        log_p = -0.5 * (z**2).sum(-1)  # log p(z) and log q(z|x), both without -D/2 log(2 pi)
        log_q = -0.5 * (epsilon**2 + logvar).sum(-1)
        log_weights.append(log_likelihood(logits, x) + log_p - log_q)  # (samples, B)
    return torch.cat(log_weights).logsumexp(0) - math.log(k)


def knn_accuracy(train_z, train_y, test_z, test_y, k=10):
    """Share (0-1) of test points whose class is the most frequent (on a tie, the lowest) among the k nearest
    training points: codes (N, D) and labels (N,), codes (M, D) and labels (M,)."""
    votes, hits = F.one_hot(train_y), 0  # (N, classes)
    for z, y in zip(test_z.split(1000), test_y.split(1000)):
        nearest = torch.cdist(z, train_z).topk(min(k, len(train_z)), largest=False).indices  # (1000, k)
        hits += (votes[nearest].sum(1).argmax(1) == y).sum().item()
    return hits / len(test_y)


def tsne(x, perplexity=30.0, steps=500):
    """t-SNE (van der Maaten and Hinton, 2008), exact and deterministic: (N, D) -> (N, 2), D at least 2."""
    n, x = len(x), (x - x.mean(0)).double()
    d2 = (torch.cdist(x, x) ** 2).fill_diagonal_(math.inf)
    low, high = torch.zeros(n, 1), torch.full((n, 1), math.inf)
    beta = torch.ones(n, 1).double() / x.var(0).sum().clamp_min(1e-12)
    for _ in range(60):  # bisect each row's precision beta until its entropy is that of the perplexity
        p = torch.softmax(-beta * d2, 1)
        flat = torch.special.entr(p).sum(1, keepdim=True) > math.log(min(perplexity, max(1.1, (n - 1) / 3)))
        low, high = torch.where(flat, beta, low), torch.where(flat, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    p = ((p + p.T) / (2 * n)).float()  # (N, N), joint probabilities
    y = 1e-2 * n**0.5 * torch.linalg.svd(x, full_matrices=False).U[:, :2].float()  # start: scaled PCA
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        early = step < steps // 4  # exaggeration first pulls the clusters together
        q = (1 / (1 + torch.cdist(y, y) ** 2)).fill_diagonal_(0)  # Student's t, not normalised
        force = (p * (12 if early else 1) - q / q.sum()) * q
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp_min(0.01)
        velocity = (0.5 if early else 0.8) * velocity - max(50, n / 48) * gain * gradient
        y = y + velocity
    return y


# EVALUATE, PREDICT ------------------------------------------------------------------------------------------
def build(cfg, device):
    if cfg.latent_dim < 2:
        raise UserError(f"--latent_dim {cfg.latent_dim}: must be at least 2, for the picture of the codes")
    channels = cfg.width, 2 * cfg.width, 4 * cfg.width
    return VAE(cfg.latent_dim, channels, cfg.image_size, cfg.hidden).to(device)


@torch.no_grad()
def evaluate(model, cfg, x, device):
    """Mean figures of x (N, 1, S, S), and -log p(x|z) and KL of each image (N, 2). Processes share the
    batches; each batch has its own seed, so that the number of processes does not change the figures."""
    rows = torch.zeros(len(x), 2, device=device)
    for start in range(500 * RANK, len(x), 500 * WORLD):
        torch.manual_seed(seed_for("evaluate", start))
        batch = x[start : start + 500].to(device)
        logits, mu, logvar = model.forward(batch)  # not model(batch), which would be compiled anew
        reconstruction = -log_likelihood(logits, batch, cfg.likelihood)
        rows[start : start + 500] = torch.stack([reconstruction, kl_divergence(mu, logvar)], 1)
    rows = all_sum(rows).cpu().double()
    reconstruction, kl = rows.mean(0).tolist()
    return {"elbo": -reconstruction - kl, "reconstruction": reconstruction, "kl": kl}, rows


@torch.no_grad()
def iwae_gap(model, cfg, x, device):
    """IWAE bound minus ELBO: the mean over iwae_n images of x, and its standard error. The gap varies less
    between images than the bound, so that few images suffice."""
    x = x[:: math.ceil(len(x) / cfg.iwae_n)]
    gaps = torch.zeros(len(x), device=device)
    for i in range(RANK, len(x), WORLD):
        torch.manual_seed(seed_for("iwae", i))
        image = x[i : i + 1].to(device)
        gaps[i] = iwae_bound(model, image, cfg.iwae_k) - elbo(model, image.expand(100, -1, -1, -1)).mean()
    gaps = all_sum(gaps).cpu()
    standard_error = gaps.std(correction=0).item() / max(1, len(x) - 1) ** 0.5  # 0 for one image
    return {"gap": gaps.mean().item(), "gap_se": standard_error, "iwae_n": len(x), "iwae_k": cfg.iwae_k}


@torch.no_grad()
def codes(model, images, device):
    """Posterior means mu, of the grey pixels: uint8 (N, S, S) -> (N, latent_dim) on the CPU."""
    return torch.cat([model.encode(part.to(device)[:, None] / 255)[0].cpu() for part in images.split(1000)])


@torch.no_grad()
def generate(model, z, device):
    """The mean of p(x|z): codes (N, latent_dim) -> images (N, 1, S, S) in [0, 1], on the CPU."""
    return model.decode(z.to(device)).sigmoid().cpu()


def save_grid(images, path, columns):
    """Writes images (N, 1, S, S) as one PNG, twice as large."""
    from torchvision.utils import save_image
    save_image(F.interpolate(images, scale_factor=2), path, nrow=columns, padding=1, pad_value=0.5)


def score(model, cfg, data, device):
    """The figures of the test set, and -log p(x|z) and KL of each of its images."""
    images, labels = data["test"]
    x = target_pixels(images, cfg.likelihood, fixed=True)
    figures, rows = evaluate(model, cfg, x, device)
    if cfg.likelihood == "bernoulli":
        gap = iwae_gap(model, cfg, x, device)  # of a few images, added to the ELBO of all
        figures = {"iwae": figures["elbo"] + gap["gap"]} | figures | gap
    if data["classes"]:
        train_z, test_z = codes(model, data["train"][0], device), codes(model, images, device)
        figures = {"knn": knn_accuracy(train_z, data["train"][1], test_z, labels)} | figures
    return figures | {"n": len(x)}, rows


def class_means(model, data, device):
    """{class: mean code (latent_dim,)}, over the validation images and the first 2,000 training images."""
    images, labels = (torch.cat([val, train[:2000]]) for val, train in zip(data["val"], data["train"]))
    z = codes(model, images, device)
    return {name: z[labels == c].mean(0).nan_to_num() for c, name in enumerate(data["classes"])}


def draw(model, cfg, data, folder, device):
    """Writes the pictures of a trained model into `folder`."""
    images, labels = data["test"]
    x, z = images[:32, None] / 255, codes(model, images[:32], device)
    pairs = torch.stack([x, generate(model, z, device)], 1)
    save_grid(pairs.flatten(0, 1), folder / "reconstructions.png", 8)
    torch.manual_seed(seed_for("sample", cfg.seed))
    save_grid(generate(model, torch.randn(64, cfg.latent_dim), device), folder / "samples.png", 8)
    if cfg.latent_dim == 2:  # equal steps in probability (appendix A): z_1 to the right, z_2 upwards
        axis = torch.special.ndtri(torch.linspace(0.02, 0.98, 20))
        z = torch.cartesian_prod(-axis, axis).flip(1)  # (400, 2)
        save_grid(generate(model, z, device), folder / "manifold.png", 20)
    figure = Figure((8, 6.5), layout="constrained")
    z = codes(model, images[:2000], device)
    xy, name = (z, "z") if cfg.latent_dim == 2 else (tsne(z), "t-SNE")
    axes = figure.add_subplot(xlabel=f"{name}$_1$", ylabel=f"{name}$_2$", title="Codes of test images")
    for c, label in enumerate(data["classes"] or ["all"]):
        axes.scatter(*xy[labels[:2000] == c].T.numpy(), s=4, label=label)
    axes.legend(markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "latents.png", dpi=100)


def predict(mode, inputs, flags):
    """Runs eval, sample, interpolate or encode."""
    cfg, ckpt, device, folder = open_checkpoint(flags)
    model = build(cfg, device).eval()
    model.load_state_dict(ckpt["model"])
    path = folder / {"eval": "test.csv", "sample": "samples.png", "interpolate": "interpolation.png",
                     "encode": "codes.npy"}[mode]
    if mode == "eval":
        figures, rows = score(model, cfg, load_data(cfg), device)
        np.savetxt(path, rows, "%.6f", ",", header="reconstruction,kl", comments="")
        say(show(figures, digits=6))
    elif mode == "sample":
        torch.manual_seed(seed_for("sample", cfg.seed))
        z = torch.randn(cfg.n, cfg.latent_dim)
        save_grid(generate(model, z, device), path, math.ceil(cfg.n**0.5))
    elif mode == "interpolate":
        means = ckpt["class_means"]
        start, end = cfg.from_class or min(means, default=""), cfg.to_class or max(means, default="")
        for name in (start, end):
            if name not in means:
                known = ", ".join(means) or "none, being trained without classes"
                raise UserError(f"unknown class {name!r}; this model knows {known}")
        z = torch.lerp(means[start], means[end], torch.linspace(0, 1, 10)[:, None])
        save_grid(generate(model, z, device), path, 10)
    else:
        if len(inputs) > 1:
            raise UserError(f"encode takes one folder, not {' '.join(inputs)}")
        images, paths = read_images(inputs[0], cfg.image_size)
        np.save(path, codes(model, images, device).numpy())
        text = "".join(f"{p}\n" for p in paths)
        (folder / "files.txt").write_text(text, encoding="utf-8", errors="surrogateescape")
    say(f"written: {path}")


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
    images, val = data["train"][0].to(device), target_pixels(data["val"][0], cfg.likelihood, fixed=True)
    count = min(cfg.batch_size, len(images))  # of a batch
    per_epoch = len(images) // count
    schedule = per_epoch * cfg.epochs
    total = min(cfg.max_steps or schedule, schedule)
    say(f"images: {len(images):,} train, {len(val):,} val, {len(data['test'][0]):,} test; steps: {total:,}")

    torch.manual_seed(cfg.seed)
    raw = build(cfg, device)
    if cfg.init and not ckpt:
        load_weights(raw, load_checkpoint(cfg.init)["model"])
    optimizer = torch.optim.Adam(raw.parameters(), cfg.lr, fused=True)
    if ckpt:
        raw.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
    if cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda" and sys.platform == "linux"):
        say("compiling in the first step, which takes a minute or two")
        raw.compile()  # in place, so that its weights keep their names
    model = nn.parallel.DistributedDataParallel(raw) if WORLD > 1 else raw

    @functools.lru_cache(1)
    def order(epoch):
        generator = torch.Generator().manual_seed(seed_for(cfg.seed, epoch))
        return torch.randperm(len(images), generator=generator).to(device)

    def fetch(step):
        """This rank's share of the batch of a step, which counts from 1: pixels (B, 1, S, S)."""
        epoch, place = divmod(step - 1, per_epoch)
        torch.manual_seed(seed_for(cfg.seed, step, RANK))
        chosen = order(epoch)[place * count : (place + 1) * count][RANK::WORLD]
        return target_pixels(images[chosen], cfg.likelihood)

    def update(step, x):
        """One optimizer step; returns the parts of the loss."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, schedule)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            logits, mu, logvar = model(x)
        share = WORLD / count  # DDP takes the mean over processes: this makes it that over images
        reconstruction = -log_likelihood(logits, x, cfg.likelihood).sum() * share
        kl = kl_divergence(mu, logvar).sum() * share
        warmed_up = min(1, step / max(1, cfg.kl_warmup * schedule))
        loss = reconstruction + cfg.kl_weight * warmed_up * kl  # eq. 10
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(raw.parameters(), 100)  # a rare batch has a huge gradient
        optimizer.step()
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl}

    run.start(total)
    for step in range(run.step + 1, total + 1):
        losses = update(step, fetch(step))
        check, save = run.step_done(losses, count, learning_rate(cfg, step, schedule))
        if check:
            figures, _ = evaluate(raw, cfg, val, device)
            run.write("val", figures)
            objective = -figures["reconstruction"] - cfg.kl_weight * figures["kl"]
            if run.best is None or objective > run.best:
                run.best = objective
                run.save("best.pt", model=raw.state_dict(), class_means=class_means(raw, data, device))
        if save:
            run.save("last.pt", model=raw.state_dict(), optimizer=optimizer.state_dict())
        if run.stop:
            return

    raw.load_state_dict(load_checkpoint(run.folder / "best.pt")["model"])
    figures, _ = score(raw, cfg, data, device)
    if RANK == 0:
        draw(raw, cfg, data, run.folder, device)
    run.finish(figures)


def learning_rate(cfg, step, schedule):
    """The lower of a linear warm-up (at most a third of the schedule) and half a cosine down to zero."""
    warmup = max(1, min(cfg.warmup, schedule // 3))
    return cfg.lr * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / schedule))


if __name__ == "__main__":
    main()
