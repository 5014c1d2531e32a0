"""The Transformer for translation, from scratch, scored by BLEU and chrF as sacrebleu computes them.

    python transformer_mt.py --data demo                     # a generated grammar: no download, no GPU
    python transformer_mt.py --data multi30k                 # English to German; 2 MB downloaded on first use
    python transformer_mt.py --data multi30k-tok             # the literature's lower-cased, tokenised form
    python transformer_mt.py --train_src a.en --train_tgt a.de    # your own: two line-aligned files
    torchrun --nproc_per_node=8 transformer_mt.py --data multi30k
    python transformer_mt.py --data multi30k --resume        # continue a run that was stopped

    python transformer_mt.py eval                            # test the newest out/transformer_mt-*/best.pt
    python transformer_mt.py translate "A man rides a bike."
    python transformer_mt.py translate < english.txt > german.txt    # one line out per line in

Measured on one thread of a CPU with bfloat16 (AMD EPYC), other work beside it; one run each, seed 0:

    --data demo           100.0 BLEU on unseen sentences; 2.8 minutes
    --data multi30k       38.80 BLEU (sacrebleu's 13a, cased), 63.55 chrF on test_2016_flickr; 75 minutes
    --data multi30k-tok   39.97 BLEU in the literature's lower-cased, tokenised form; 81 minutes

The literature's Transformer-Tiny has 41.02 BLEU in the tokenised form (Wu et al., below).

Paper: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762. BLEU: Papineni et al., 2002, as in
Post, "A Call for Clarity in Reporting BLEU Scores", 2018; chrF: Popovic, 2015. Data: Elliott et al.,
"Multi30K", 2016, arXiv 1605.00459. Small models for it: Wu et al., "Good for Misconceived Reasons", 2021,
arXiv 2105.14462. R-drop: Liang et al., 2021, arXiv 2106.14448. Muon: Jordan et al., 2024; Liu et al., "Muon
is Scalable for LLM Training", 2025, arXiv 2502.16982, whose scale of the update it has here.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "numpy", "sentencepiece", "matplotlib"]
# ///
import argparse
import contextlib
import copy
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
import zlib
from collections import Counter, defaultdict
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
    data: str = "auto"  # demo, multi30k or multi30k-tok; auto: one in data/, or demo
    out: str = ""  # folder of the run (default: out/SCRIPT-DATA)
    save: str = ""  # folder for predictions (default: the folder of the checkpoint)
    ckpt: str = ""  # checkpoint to test or predict with (default: the newest best.pt in out/SCRIPT-*)
    init: str = ""  # checkpoint whose weights a new run starts from
    resume: bool = False  # continue the run in --out from its last.pt, if there is one
    device: str = "auto"  # auto|cpu|cuda|mps: where to run
    dtype: str = "auto"  # auto|float32|bfloat16: precision of training (autocast); metrics are always float32
    compile: str = "auto"  # auto|on|off: torch.compile; auto: on for CUDA under Linux
    seed: int = 0  # seed of the initial weights, the order of the data, and the noise
    batch_size: int = 2000  # target tokens per step, padding included, over all processes
    lr: float = 2e-3  # peak learning rate of Adam; that of Muon is twice as high
    max_steps: int = 0  # end the training after this many steps; 0: after all epochs
    max_minutes: float = 0.0  # save and stop after this many minutes; 0: no limit
    eval_every: int = 750  # steps between validations
    save_every: int = 250  # steps between saves of last.pt; each validation saves it, too
    log_every: int = 50  # steps between log lines
    # the task
    train_src: str = ""  # your own source text, one sentence a line; the last lines validate and test
    train_tgt: str = ""  # your own translation of it, line by line
    size: str = "small"  # tiny|small|base: layers x units: 4 x 128, 3 x 256, the paper's 6 x 512
    vocab_size: int = 6000  # pieces of the joint byte-pair encoding; fewer if the text is small
    max_len: int = 100  # 3 to 1024, tokens of the longest sentence; longer ones are cut, with a warning
    epochs: int = 22  # passes over the training set
    warmup: int = 300  # 0 to 1000000, steps in which the learning rate rises
    dropout: float = 0.25  # 0 to 0.99, dropout on the embeddings and on the output of each sublayer
    label_smoothing: float = 0.1  # 0 to 1, label smoothing of the loss
    rdrop: float = 0.0  # 0 to 100, alpha of R-drop; 5 translates better and doubles a step's time
    ema: float = 0.995  # 0 to 1, decay of the moving average of the weights, which is tested and saved
    beam_size: int = 5  # hypotheses kept in beam search
    length_penalty: float = 2.0  # 0 to 100, alpha of Wu et al. (2016, eq. 14); more favours long sentences


# d_model, heads, layers, d_ff
SIZES = {"tiny": (128, 4, 4, 256), "small": (256, 4, 3, 512), "base": (512, 8, 6, 2048)}
PRESETS = {"demo": {"size": "tiny", "vocab_size": 300, "epochs": 6, "batch_size": 2500, "lr": 3e-3,
                    "warmup": 200, "dropout": 0.1, "eval_every": 200, "ema": 0.99},
           "multi30k-tok": {"epochs": 24, "dropout": 0.3}}
MODES = {"train": ("", "train, then test (default)"),
         "eval": ("", "test a checkpoint; the translations are written as text"),
         "translate": ("[TEXT...]", "translate each sentence given, or each line of the standard input"),
         "bench": ("", "time the training step")}
UNIT = "tokens"  # what a batch is counted in
SHAPE = {"size", "vocab_size"}  # what a checkpoint alone decides
CPU_BF16 = True  # measured: 1.8 times as fast as float32 on a CPU that multiplies bfloat16
PAD, BOS, EOS, UNK = 0, 1, 2, 3


# MODEL ------------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head attention (section 3.2.2), without biases as there."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def split(self, x):
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, H, T, D/H)

    def keys_and_values(self, x):
        """(B, S, D) -> (2, B, H, S, D/H)."""
        return torch.stack([self.split(part) for part in self.key_value(x).chunk(2, -1)])

    def weights(self, x, keys, mask):
        """softmax(Q K^T / sqrt(d_k)) of equation 1: (B, T, D), (B, H, S, D/H) -> (B, H, T, S). `mask` is True
        where a query may look."""
        queries = self.split(self.query(x))
        scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
        return scores.masked_fill(~mask, -math.inf).softmax(-1)

    def forward(self, x, keys_and_values, mask):
        """Queries from x (B, T, D) -> (B, T, D)."""
        keys, values = keys_and_values
        heads = self.weights(x, keys, mask) @ values  # (B, H, T, D/H)
        return self.out(heads.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network (section 3.1), each as x + dropout(f(norm(x))).

    The paper has norm(x + dropout(f(x))), which needs a lower learning rate and a longer warm-up.
    """

    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.attention, self.norm1 = Attention(d_model, n_heads), nn.LayerNorm(d_model)
        self.feed_forward = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))
        self.norm2, self.dropout = nn.LayerNorm(d_model), nn.Dropout(dropout)

    def forward(self, x, mask):
        """(B, S, D), mask (B, 1, 1, S) -> (B, S, D)."""
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, self.attention.keys_and_values(y), mask))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class DecoderLayer(EncoderLayer):
    """The same with attention to the source in between."""

    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__(d_model, n_heads, d_ff, dropout)
        self.cross, self.norm3 = Attention(d_model, n_heads), nn.LayerNorm(d_model)

    def forward(self, x, memory, mask, past=None):
        """The next T tokens (B, T, D) -> (B, T, D), and the keys and values of all target tokens so far.
        `memory` holds the keys and values of the source, whose mask is (B, 1, 1, S); `past` those of the target
        tokens before x."""
        y = self.norm1(x)
        own = self.attention.keys_and_values(y)
        own = own if past is None else torch.cat([past, own], 3)
        new, seen = x.shape[1], own.shape[3]
        causal = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
        x = x + self.dropout(self.attention(y, own, causal))
        x = x + self.dropout(self.cross(self.norm3(x), memory, mask))
        return x + self.dropout(self.feed_forward(self.norm2(x))), own


class Transformer(nn.Module):
    """Encoder and decoder of "Attention Is All You Need", one embedding for source, target and output.

    Tokens are ids (B, S) and (B, T), filled up at the end with `pad_id`; logits are (B, T, vocab_size).
    """

    def __init__(self, vocab_size, d_model=128, n_heads=4, n_layers=4, d_ff=256, dropout=0.3, pad_id=PAD):
        super().__init__()
        self.pad_id, self.d_model = pad_id, d_model
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        shape = d_model, n_heads, d_ff, dropout
        self.encoder = nn.ModuleList(EncoderLayer(*shape) for _ in range(n_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*shape) for _ in range(n_layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", sinusoids(1024, d_model), persistent=False)

    def embed(self, tokens, start=0):
        """(B, T) ids of positions start, start + 1, ... -> (B, T, D) (sections 3.4 and 3.5)."""
        places = self.positions[start : start + tokens.shape[1]]
        return self.dropout(self.embedding(tokens) * math.sqrt(self.d_model) + places)

    def encode(self, src):
        """(B, S) ids -> the source's keys and values for each decoder layer, and the mask (B, 1, 1, S), True
        at real tokens."""
        mask = (src != self.pad_id)[:, None, None]
        x = self.embed(src)
        for layer in self.encoder:
            x = layer(x, mask)
        x = self.encoder_norm(x)
        return [layer.cross.keys_and_values(x) for layer in self.decoder], mask

    def decode(self, tgt, memory, mask, past=None):
        """The next target tokens (B, T) -> logits (B, T, V) of the tokens after each of them, and what the
        next call takes as `past`: the keys and values so far, one tensor for each layer."""
        past = past or [None] * len(self.decoder)
        x = self.embed(tgt, 0 if past[0] is None else past[0].shape[3])
        seen = []
        for layer, source, before in zip(self.decoder, memory, past):
            x, keys_and_values = layer(x, source, mask, before)
            seen.append(keys_and_values)
        return F.linear(self.decoder_norm(x), self.embedding.weight), seen

    def forward(self, src, tgt_in):
        """(B, S) ids, (B, T) ids that begin with BOS -> logits (B, T, V) of each next token."""
        memory, mask = self.encode(src)
        return self.decode(tgt_in, memory, mask)[0]


def sinusoids(length, d_model):
    """Positions (length, d_model): sines in even columns, cosines in odd ones (section 3.5)."""
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, d_model, 2) / d_model)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def greedy_decode(model, src, max_len=100):
    """The likeliest token each time: ids (B, S) -> B lists of fewer than max_len ids, without BOS and EOS."""
    return beam_search(model, src, 1, 0.0, max_len)


@torch.no_grad()
def beam_search(model, src, beam_size=5, length_penalty=1.0, max_len=100):
    """The best of beam_size hypotheses by log p / ((5 + length) / 6)^length_penalty (Wu et al., 2016,
    equation 14): ids (B, S) -> B lists of fewer than max_len ids, without BOS and EOS. A sentence is done
    when beam_size of its hypotheses have ended that are at least as good as the best that goes on."""
    b, k, device = len(src), beam_size, src.device
    memory, mask = model.encode(src)
    memory, mask, past = [kv.repeat_interleave(k, 1) for kv in memory], mask.repeat_interleave(k, 0), None
    ids = torch.full((b * k, 1), BOS, device=device)  # K rows for each sentence
    scores = torch.full((b, k), -math.inf, device=device)
    scores[:, 0] = 0.0  # the first step has one hypothesis
    ended, searched = [[] for _ in range(b)], set(range(b))  # (score, ids) of each sentence; those not done
    for length in range(1, max_len + 1):
        logits, past = model.decode(ids[:, -1:], memory, mask, past)
        logits = logits[:, -1].float()
        logits[:, [PAD, BOS, UNK]] = -math.inf  # which no reference has
        log_p = logits.log_softmax(-1)  # (B K, V)
        if length == max_len:
            log_p[:, torch.arange(log_p.shape[1], device=device) != EOS] = -math.inf
        # of each sentence the best 2 K, so that K go on even if K end
        best, place = (scores[:, :, None] + log_p.unflatten(0, (b, k))).flatten(1).topk(2 * k)
        row = place // log_p.shape[1] + k * torch.arange(b, device=device)[:, None]
        token = place % log_p.shape[1]
        scores, going = best.masked_fill(token == EOS, -math.inf).topk(k)
        penalty = ((5 + length) / 6) ** length_penalty
        for i, j in (token[:, :k] == EOS).nonzero().tolist():  # an end counts if it is among the best K
            if i in searched:
                ended[i].append((best[i, j].item() / penalty, ids[row[i, j], 1:]))
        for i, rest in enumerate((scores[:, 0] / penalty).tolist()):
            if sum(score >= rest for score, _ in ended[i]) >= k:
                searched.discard(i)
        if not searched or length == max_len:
            return [max(hypotheses, key=lambda pair: pair[0])[1].tolist() for hypotheses in ended]
        rows = row.gather(1, going).flatten()
        ids = torch.cat([ids[rows], token.gather(1, going).view(-1, 1)], 1)
        past = [kv[:, rows] for kv in past]


def consistency(logits, tgt):
    """R-drop's loss (Liang et al., 2021, equation 2): the mean of both KL divergences between what the model
    predicts under one dropout mask and under another, summed over the target tokens. The logits (2 B, T, V)
    and targets (2 B, T) hold a batch twice -> ()."""
    p, q = logits.float().log_softmax(-1).chunk(2)
    divergence = ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2  # (B, T)
    return (divergence * (tgt[: len(p)] != PAD)).sum()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al., 2024); for matrices only. All singular values
    of an update become about 1, times 0.2 sqrt(max(rows, columns)), Adam's size (Liu et al., 2025, eq. 4)."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype  # of the products; bfloat16 pays only where the chip has it

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                shapes[p.shape].append(p)
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for shape, params in shapes.items():  # matrices of one shape are one batched product
                grads = torch.stack([p.grad for p in params])
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(buffers, list(grads), 1 - group["momentum"])
                updates = grads.lerp(torch.stack(buffers), group["momentum"])  # Nesterov
                updates = orthogonal(updates.to(self.dtype)).float()
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates), alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


def orthogonal(x):
    """U V^T of each matrix's singular value decomposition U S V^T, nearly, by five Newton-Schulz iterations:
    (N, rows, columns) -> the same. Singular values come out at 0.7 to 1.2."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):  # x <- 3.4445 x + (-4.7750 A + 2.0315 A A) x with A = x x^T
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if tall else x


# DATA -------------------------------------------------------------------------------------------------------
AUTO = {"multi30k": "raw/train.en.gz"}  # what --data auto looks for in data/NAME
REAL = "--data multi30k downloads the real set"
URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
DIGESTS = {  # SHA-256 of the published files
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
}
# the demo's words: English, German (verbs: finite form and infinitive), gender; articles by case and gender
BEINGS = ["man Mann m", "woman Frau f", "child Kind n", "dog Hund m", "cat Katze f", "horse Pferd n",
          "girl Mädchen n", "teacher Lehrer m", "queen Königin f"]
THINGS = ["ball Ball m", "book Buch n", "lamp Lampe f", "picture Bild n", "flower Blume f", "chair Stuhl m"]
PLACES = ["garden Garten m", "kitchen Küche f", "house Haus n", "park Park m", "school Schule f"]
VERBS = ["sees see sieht sehen", "buys buy kauft kaufen", "holds hold hält halten",
         "draws draw zeichnet zeichnen", "finds find findet finden", "carries carry trägt tragen",
         "hides hide versteckt verstecken"]
MODALS, PREPOSITIONS = ["can kann", "must muss", "should soll"], ["in in", "behind hinter", "near neben"]
TIMES = ["today heute", "now jetzt", "tomorrow morgen"]
ARTICLES = {"nom": {"m": "der ein", "f": "die eine", "n": "das ein"},
            "acc": {"m": "den einen", "f": "die eine", "n": "das ein"},
            "dat": {"m": "dem einem", "f": "der einer", "n": "dem einem"}}


def demo_pair(rng):
    """An English sentence and its German translation: gender, case, and the verb second or last."""
    def pick(lines):
        return lines[rng.integers(len(lines))].split()

    def noun(nouns, case):
        english, german, gender = pick(nouns)
        kind = rng.integers(2)
        return f"{['the', 'a'][kind]} {english}", f"{ARTICLES[case][gender].split()[kind]} {german}"

    (who, wer), (whom, wen) = noun(BEINGS, "nom"), noun(BEINGS + THINGS, "acc")
    (does, do, tut, tun), (near, bei), (place, ort) = pick(VERBS), pick(PREPOSITIONS), noun(PLACES, "dat")
    (can, kann), (time, zeit), (other, andere) = pick(MODALS), pick(TIMES), noun(BEINGS, "nom")
    english, german = [
        (f"{time} {who} {does} {whom} {near} {place}", f"{zeit} {tut} {wer} {wen} {bei} {ort}"),
        (f"{who} {can} {do} {whom} {near} {place}", f"{wer} {kann} {wen} {bei} {ort} {tun}"),
        (f"{other} laughs because {who} {does} {whom}", f"{andere} lacht, weil {wer} {wen} {tut}"),
    ][rng.integers(3)]
    return f"{english[0].upper()}{english[1:]}.", f"{german[0].upper()}{german[1:]}."


def demo_pairs(count):
    """`count` different pairs, so that what is held out is never trained on."""
    rng, pairs = np.random.default_rng(0), {}
    while len(pairs) < count:
        pairs.setdefault(*demo_pair(rng))
    return [list(side) for side in zip(*pairs.items())]


def download(url, path, digest):
    """Fetches a file whole or not at all; UserError unless its SHA-256 is the one known."""
    say(f"downloading {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, path, digest, progress=False)
    except (OSError, RuntimeError) as e:
        raise UserError(f"{url}: no download ({e}); data/README.md says what goes where") from None


def decode_lines(raw, name):
    """The lines of bytes, without the space around them."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise UserError(f"{name}, line {line}: not UTF-8 ({e.reason}); convert it") from None
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if raw else []


def read_pair(*paths):
    """The lines of two text files (.gz or not), as two lists of the same length."""
    sides = []
    for path in map(Path, paths):
        try:
            raw = path.read_bytes()
            raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"{path}: missing or truncated ({e}); see data/README.md") from None
        sides.append(decode_lines(raw, path))
        if not any(sides[-1]):
            raise UserError(f"{path}: is empty; it takes one sentence a line")
    source, target = map(len, sides)
    if source != target:
        raise UserError(f"{paths[0]} has {source} lines and {paths[1]} {target}: line n of one must be the "
                        "translation of line n of the other")
    return sides


def load_data(cfg):
    """{"train", "val" and the name of each test split: (source sentences, target sentences)}."""
    if cfg.data == "own":
        return divide(read_pair(cfg.train_src, cfg.train_tgt))
    if cfg.data == "demo":
        return divide(demo_pairs(9000))
    name, form = cfg.data.removesuffix("-tok"), "tok" if cfg.data.endswith("-tok") else "raw"
    folder, end = Path("data", name, form), ".lc.norm.tok" if form == "tok" else ""
    if cfg.data == "multi30k" and RANK == 0:
        for file, digest in DIGESTS.items():
            if not (folder / file).exists():
                download(f"{URL}/{file}", folder / file, digest)
    if WORLD > 1:
        dist.barrier()
    if not folder.exists():
        raise UserError(f"--data {cfg.data}: neither demo nor multi30k, and nothing in {folder}, of which "
                        "data/README.md tells; your own two files go to --train_src and --train_tgt")
    tests = sorted(p.name.removesuffix(f"{end}.en.gz") for p in folder.glob(f"test*{end}.en.gz"))
    if not tests:
        raise UserError(f"{folder}: holds no test split; data/README.md says what goes where")
    return {split: read_pair(*(folder / f"{split}{end}.{side}.gz" for side in ("en", "de")))
            for split in ("train", "val", *tests)}


def divide(pairs):
    """Training, validation and test set of two lists of sentences, the last 1,000 different pairs being the
    test set and the 1,000 before them the validation set; of few pairs an eighteenth each."""
    whole = list(dict.fromkeys(pair for pair in zip(*pairs) if all(pair)))  # no pair is in two of them
    held = min(1000, len(whole) // 18)
    if not held:
        raise UserError(f"{len(whole)} different pairs are too few: it takes 18")
    parts = {"train": whole[: -2 * held], "val": whole[-2 * held : -held], "test": whole[-held:]}
    return {split: [list(side) for side in zip(*part)] for split, part in parts.items()}


def train_vocabulary(texts, cfg):
    """A joint byte-pair encoding of the training sentences only: SentencePiece's model as uint8 (n,)."""
    import sentencepiece
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=cfg.vocab_size,
            hard_vocab_limit=False, character_coverage=1.0, pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK,
            num_threads=1, minloglevel=2)
    except (RuntimeError, OSError, ValueError) as e:
        raise UserError(f"--vocab_size {cfg.vocab_size}: no vocabulary could be made ({e})") from None
    return torch.from_numpy(np.frombuffer(model.getvalue(), np.uint8).copy())


def tokenizer(vocabulary):
    import sentencepiece
    return sentencepiece.SentencePieceProcessor(model_proto=vocabulary.numpy().tobytes())


def encode_text(sp, sentences, max_len):
    """Lists of ids that end in EOS; what is longer than max_len is cut, and that is said."""
    ids = sp.encode(list(sentences))
    if long := sum(len(row) >= max_len for row in ids):
        say(f"warning: {long} of {len(ids)} sentences are cut after {max_len - 1} tokens (--max_len)")
    return [[*row[: max_len - 1], EOS] for row in ids]


def padded(rows, device):
    """Lists of ids -> (B, T), filled up with PAD."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, PAD).to(device)


class Batches:
    """The pairs of a training set on the device, in batches of at most `budget` target tokens with padding.

    Pairs of similar length share a batch, which hardly holds any padding then. Each epoch has the batches in
    another order.
    """

    def __init__(self, src, tgt, budget, device):
        batches = [[]]
        for i in sorted(range(len(src)), key=lambda i: (len(tgt[i]), len(src[i]))):
            if batches[-1] and (len(batches[-1]) + 1) * len(tgt[i]) > budget:
                batches.append([])
            batches[-1].append(i)
        self.pairs = [[padded([side[i] for i in batch], device) for side in (src, tgt)] for batch in batches]
        self.tokens = [sum(len(tgt[i]) for i in batch) for batch in batches]  # target tokens of each batch

    def get(self, seed, step):
        """This rank's share of the batch of a step, which counts from 1: ids (B, S), (B, T), and the number
        of target tokens in the whole batch."""
        epoch, place = divmod(step - 1, len(self.pairs))
        number = np.random.default_rng(seed_for(seed, epoch)).permutation(len(self.pairs))[place]
        return *(side[RANK::WORLD] for side in self.pairs[number]), self.tokens[number]


# METRICS ----------------------------------------------------------------------------------------------------
def tokenize_13a(line):
    """mteval-v13a's tokens, which WMT scores are counted in: a string -> a list of strings."""
    line = line.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"):
        line = line.replace(entity, sign)
    line = re.sub(r"([!-&(-+:-@\[-`{-~/ ])", r" \1 ", f" {line} ")  # ASCII signs but ' , - . stand alone;
    line = re.sub(r"([^0-9])([.,])", r"\1 \2 ", line)  # so do dots and commas, unless between digits,
    line = re.sub(r"([.,])([^0-9])", r" \1 \2", line)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", line).split()  # and a dash after a digit


def ngrams(items, n):
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu(hypotheses, references, tokenize="13a", lowercase=False):
    """BLEU-4 of a corpus, 0-100, one reference each; like sacrebleu with its defaults: an order without a
    match counts half of one match, the next such a quarter, and so on. `tokenize` is "13a" or "none", which
    splits at spaces. ValueError if the lists differ in length or are empty."""
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    split = {"13a": tokenize_13a, "none": str.split}[tokenize]
    match, total, sizes = [0] * 4, [0] * 4, [0, 0]
    for pair in zip(hypotheses, references):
        hyp, ref = (split(text.lower() if lowercase else text) for text in pair)
        sizes = [sizes[0] + len(hyp), sizes[1] + len(ref)]
        for n in range(4):
            found = ngrams(hyp, n + 1)
            total[n] += sum(found.values())
            match[n] += (found & ngrams(ref, n + 1)).total()
    if not match[0] or not total[3]:
        return 0.0
    logs, half = [], 1
    for m, t in zip(match, total):
        half *= 1 if m else 2
        logs.append(math.log(100 * m / t if m else 100 / (half * t)))
    brevity = min(0.0, 1 - sizes[1] / sizes[0])
    return math.exp(brevity + sum(logs) / 4)


def chrf(hypotheses, references):
    """chrF2 of a corpus, 0-100: the F-score, recall counting twice, of precision and recall averaged over
    character 1- to 6-grams without spaces; like sacrebleu with its defaults. ValueError as for `bleu`."""
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    counts = [[0, 0, 0] for _ in range(6)]
    for pair in zip(hypotheses, references):
        hyp, ref = ("".join(text.split()) for text in pair)
        for n, sums in enumerate(counts, 1):
            mine, theirs = ngrams(hyp, n), ngrams(ref, n)
            sums[0] += mine.total() if theirs else 0
            sums[1] += theirs.total()
            sums[2] += (mine & theirs).total()
    shares = [(m / h, m / r) for h, r, m in counts if h and r]
    precision, recall = (statistics.fmean(side) for side in zip(*shares)) if shares else (0, 0)
    return 100 * 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


# EVALUATE, PREDICT ------------------------------------------------------------------------------------------
def translate(model, sp, ids, cfg, device, beam_size):
    """Lists of ids -> list of strings; each process does its share, and all get the result."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # sentences of similar length go together
    table = torch.zeros(len(ids), cfg.max_len, dtype=torch.long)
    for start in range(100 * RANK, len(ids), 100 * WORLD):
        chosen = order[start : start + 100]
        src = padded([ids[i] for i in chosen], device)
        limit = min(cfg.max_len, 2 * src.shape[1] + 10)
        for i, row in zip(chosen, beam_search(model, src, beam_size, cfg.length_penalty, limit)):
            table[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    rows = all_sum(table.to(device)).tolist()
    return sp.decode([[i for i in row if i != PAD] for row in rows])


@torch.no_grad()
def perplexity(model, src, tgt, device):
    """exp of the mean negative log-likelihood of the target tokens, EOS included, without label smoothing."""
    sums = torch.zeros(2, device=device)
    for start in range(100 * RANK, len(src), 100 * WORLD):
        x, y = padded(src[start : start + 100], device), padded(tgt[start : start + 100], device)
        logits = model(x, F.pad(y, (1, -1), value=BOS))
        sums[0] += F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=PAD, reduction="sum")
        sums[1] += (y != PAD).sum()
    total, count = all_sum(sums).tolist()
    return math.exp(min(total / count, 700))


def evaluate(model, sp, cfg, pair, device, beam_size):
    """(figures, hypotheses) of a split; `bleu` is 13a's, or of a tokenised set that of the given tokens."""
    model.eval()
    src, tgt = (encode_text(sp, side, cfg.max_len) for side in pair)
    hypotheses = translate(model, sp, src, cfg, device, beam_size)
    tokenize = "none" if cfg.data.endswith("-tok") else "13a"
    return {"bleu": bleu(hypotheses, pair[1], tokenize), "chrf": chrf(hypotheses, pair[1]),
            "ppl": perplexity(model, src, tgt, device)}, hypotheses


def score(model, sp, cfg, data, folder, device):
    """The figures of every test split, the first one's under their plain names; writes the hypotheses."""
    figures = {}
    for split in [name for name in data if name not in ("train", "val")]:
        part, hypotheses = evaluate(model, sp, cfg, data[split], device, cfg.beam_size)
        if RANK == 0:
            (folder / f"{split}.hyp.txt").write_text("".join(f"{h}\n" for h in hypotheses), encoding="utf-8")
        figures |= {f"{split}_{k}" if figures else k: v for k, v in part.items()}
    return figures


@torch.no_grad()
def draw(model, sp, cfg, sentences, folder, device):
    """attention.png: where each target token looks in the source, averaged over the heads and layers."""
    if RANK or not (figure := new_figure(6.5 * len(sentences), 6)):
        return
    for place, sentence in enumerate(sentences, 1):
        [ids] = encode_text(sp, [sentence], cfg.max_len)
        src, maps = padded([ids], device), []
        limit = min(cfg.max_len, 2 * len(ids) + 10)
        [out] = beam_search(model, src, cfg.beam_size, cfg.length_penalty, limit)
        hooks = [layer.cross.register_forward_hook(
            lambda cross, args, _: maps.append(cross.weights(args[0], args[1][0], args[2])))
            for layer in model.decoder]
        model(src, torch.tensor([[BOS, *out]], device=device))
        for hook in hooks:
            hook.remove()
        axes = figure.add_subplot(1, len(sentences), place, xlabel="source", ylabel="translation")
        axes.imshow(torch.stack(maps).mean((0, 1, 2)).cpu().numpy(), cmap="Blues", vmin=0)  # (T, S)
        axes.set_xticks(range(len(ids)), sp.id_to_piece(ids), rotation=90, parse_math=False)
        axes.set_yticks(range(len(out) + 1), sp.id_to_piece([*out, EOS]), parse_math=False)
    figure.savefig(folder / "attention.png", dpi=80)


def build(cfg, sp, device):
    d_model, n_heads, n_layers, d_ff = SIZES[cfg.size]
    return Transformer(sp.vocab_size(), d_model, n_heads, n_layers, d_ff, cfg.dropout).to(device)


def predict(mode, inputs, flags):
    """Every mode that uses a trained model."""
    with contextlib.redirect_stdout(sys.stderr if mode == "translate" else sys.stdout):  # there, text only
        cfg, ckpt, device, folder = open_checkpoint(flags)
    sp = tokenizer(ckpt["vocabulary"])
    model = build(cfg, sp, device).eval()
    model.load_state_dict(ckpt["model"])
    if mode == "eval":
        figures = score(model, sp, cfg, load_data(cfg), folder, device)
        form = "case:lc|tok:none" if cfg.data.endswith("-tok") else "case:mixed|tok:13a"
        say(f"{show(figures, digits=6)}\nwritten: {folder}/*.hyp.txt\n"
            f"as sacrebleu: nrefs:1|{form}|eff:no|smooth:exp")
        return
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout lacks it
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the system's encoding is
    given = [sys.stdin.buffer.read() if RANK == 0 and not inputs else b""]
    if WORLD > 1:  # all processes have the same standard input
        dist.broadcast_object_list(given)
    lines = [" ".join(decode_lines(os.fsencode(text), "the text given")) for text in inputs]
    lines = lines or decode_lines(given[0], "the standard input")
    with contextlib.redirect_stdout(sys.stderr):
        if ckpt["config"]["data"].endswith("-tok"):
            say("note: this model knows lower-cased, tokenised text; it gets the former, give it the latter")
            lines = [line.lower() for line in lines]
        ids = encode_text(sp, filter(None, lines), cfg.max_len)
    done = iter(translate(model, sp, ids, cfg, device, cfg.beam_size) if ids else ())
    for line in lines:
        say(next(done) if line else "")
    if any(inputs):
        with contextlib.redirect_stdout(sys.stderr):
            draw(model, sp, cfg, list(filter(None, lines))[:1], folder, device)


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
    if bool(flags.get("train_src")) != bool(flags.get("train_tgt")):
        raise UserError("--train_src and --train_tgt go together: a text and its translation")
    if flags.get("train_src"):  # the user's two files are a data set of their own
        if flags.setdefault("data", "own") != "own":
            raise UserError(f"--data {flags['data']}: --train_src and --train_tgt are another data set")
    if mode not in ("train", "bench"):
        return predict(mode, inputs, flags)
    run = Run(flags, training=mode == "train")
    cfg, ckpt, device = run.cfg, run.ckpt, run.device

    data = load_data(cfg)
    old = ckpt or (load_checkpoint(cfg.init) if cfg.init else {})  # weights and vocabulary belong together
    vocabulary = old["vocabulary"] if old else train_vocabulary(sum(data["train"], []), cfg)
    sp = tokenizer(vocabulary)
    batches = Batches(*(encode_text(sp, side, cfg.max_len) for side in data["train"]), cfg.batch_size, device)
    schedule, count = len(batches.pairs) * cfg.epochs, round(statistics.fmean(batches.tokens))
    total = min(cfg.max_steps or schedule, schedule)
    say(f"pairs: {', '.join(f'{len(pair[0]):,} {name}' for name, pair in data.items())}; "
        f"vocabulary: {len(sp):,}; steps: {total:,} of {count:,} tokens")

    torch.manual_seed(cfg.seed)
    raw = build(cfg, sp, device)
    if ckpt:
        raw.load_state_dict(ckpt["model"])
    elif cfg.init:
        load_weights(raw, old["model"], cfg.init)
    average = copy.deepcopy(raw)  # moving average of the weights
    average.load_state_dict(ckpt.get("average", raw.state_dict()))
    decay = min(cfg.ema, 1 - 4 / max(5, schedule))  # so that a whole schedule leaves 2 % of the first weights
    # Muon makes a matrix's update orthogonal: 500 steps do what 750 of Adam's do, and take 1.3 times as long.
    table, *rest = raw.parameters()  # the embedding comes first
    matrices, vectors = ([p for p in rest if p.dim() == n] for n in (2, 1))
    optimizers = [Muon(matrices, cfg.lr, dtype=getattr(torch, cfg.dtype)),
                  torch.optim.Adam([table, *vectors], cfg.lr, (0.9, 0.98), 1e-9, fused=True)]
    for optimizer, state in zip(optimizers, ckpt["optimizers"] if ckpt else ()):
        optimizer.load_state_dict(state)
    on_cuda = device.type == "cuda" and sys.platform == "linux"
    if cfg.compile == "on" or (cfg.compile == "auto" and on_cuda):
        raw.compile()  # in place, so that its weights keep their names
    model = nn.parallel.DistributedDataParallel(raw) if WORLD > 1 else raw

    def fetch(step):
        torch.manual_seed(seed_for(cfg.seed, step, RANK))
        return batches.get(cfg.seed, step)

    def update(step, batch):
        """One optimizer step; -> the parts of the loss."""
        src, tgt, tokens = batch
        for optimizer, factor in zip(optimizers, (2, 1)):
            optimizer.param_groups[0]["lr"] = factor * learning_rate(cfg, step, schedule)
        raw.train()
        if cfg.rdrop:  # each pair twice, with two dropout masks
            src, tgt = src.repeat(2, 1), tgt.repeat(2, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            logits = model(src, F.pad(tgt, (1, -1), value=BOS))  # shifted right
            loss = F.cross_entropy(logits.flatten(0, 1), tgt.flatten(), ignore_index=PAD, reduction="sum",
                                   label_smoothing=cfg.label_smoothing) * WORLD / tokens
        losses = {"loss": loss}
        if cfg.rdrop:
            apart = consistency(logits, tgt) * WORLD / tokens
            losses = {"loss": (loss + cfg.rdrop * apart) / 2, "rdrop": apart}
        raw.zero_grad(set_to_none=True)
        losses["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(raw.parameters()), 1 - decay)
        return losses

    if mode == "bench":
        return bench(run, fetch, update, count)

    run.start(total)
    for step in range(run.step + 1, total + 1):
        losses = update(step, fetch(step))
        check, save = run.step_done(losses, count, learning_rate(cfg, step, schedule))
        if check:
            figures, _ = evaluate(average, sp, cfg, data["val"], device, 1)
            run.write("val", figures)
            if run.best is None or figures["bleu"] > run.best:
                run.best = figures["bleu"]
                run.save("best.pt", model=average.state_dict(), vocabulary=vocabulary)
        if save:
            run.save("last.pt", model=raw.state_dict(), average=average.state_dict(),
                     optimizers=[o.state_dict() for o in optimizers], vocabulary=vocabulary)
        if run.stop:
            return

    average.load_state_dict(load_checkpoint(run.folder / "best.pt")["model"])
    figures = score(average, sp, cfg, data, run.folder, device)
    tests = next(pair for name, pair in data.items() if name not in ("train", "val"))
    draw(average, sp, cfg, tests[0][:2], run.folder, device)
    run.finish(figures)


def learning_rate(cfg, step, schedule):
    """Linear warm-up, in a third of a short schedule at most, then half a cosine down to zero."""
    warmup = max(1, min(cfg.warmup, schedule // 3))
    return cfg.lr * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / schedule))


if __name__ == "__main__":
    main()
