"""The Transformer for translation, from scratch, scored by BLEU and chrF as sacrebleu computes them.

    python transformer_mt.py --data demo                     # a generated grammar: no download, no GPU
    python transformer_mt.py --data multi30k                 # English to German; 2 MB downloaded on first use
    python transformer_mt.py --data multi30k-tok             # lower-cased and tokenised: data/README.md
    python transformer_mt.py --train_src a.en --train_tgt a.de    # your own: two line-aligned files
    torchrun --nproc_per_node=8 transformer_mt.py --data multi30k
    python transformer_mt.py --data multi30k --resume        # continue a run that was stopped

    python transformer_mt.py eval                            # test the newest out/transformer_mt-*/best.pt
    python transformer_mt.py translate "A man rides a bike."
    python transformer_mt.py translate < english.txt > german.txt    # one line out per line in

Measured on one thread of a CPU with bfloat16 (AMD EPYC), other work beside it; one run each, seed 0:

    --data demo           100.0 BLEU on unseen sentences; 1 minute
    --data multi30k-tok   39.48 BLEU, 64.01 chrF on test_2016_flickr, lower-cased and tokenised; 69 minutes
    --data multi30k       38.76 BLEU, 63.35 chrF there, cased; 67 minutes
                          (both with the two variables of docs/speed.md)

The literature's Transformer-Tiny reaches 41.02 BLEU on multi30k-tok (Wu et al., below).

Paper: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762. BLEU: Papineni et al., 2002, as in
Post, "A Call for Clarity in Reporting BLEU Scores", 2018; chrF: Popovic, 2015. Data: Elliott et al.,
"Multi30K", 2016, arXiv 1605.00459; small models for it: Wu et al., "Good for Misconceived Reasons", 2021,
arXiv 2105.14462. R-drop: Liang et al., 2021, arXiv 2106.14448.
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
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure


@dataclass
class Config:
    # the same in all five scripts; a comment is the help of its flag, and may begin with choices: a|b|c
    data: str = "auto"  # demo, multi30k or multi30k-tok; auto: the first in data/, else demo
    out: str = ""  # folder of the run (default: out/SCRIPT-DATA)
    save: str = ""  # folder for predictions (default: the folder of the checkpoint)
    ckpt: str = ""  # checkpoint to test or predict with (default: the newest best.pt in out/SCRIPT-*)
    init: str = ""  # checkpoint whose weights a new run starts from
    resume: bool = False  # continue the run in --out from its last.pt, if there is one
    device: str = "auto"  # auto|cpu|cuda: where to run
    dtype: str = "auto"  # auto|float32|bfloat16: precision of training (autocast); metrics are always float32
    compile: str = "auto"  # auto|on|off: torch.compile; auto: on for CUDA under Linux
    seed: int = 0  # seed of the initial weights, the order of the data, and the noise
    batch_size: int = 2000  # tokens per step, source or target, whichever are more; over all processes
    lr: float = 2e-3  # peak learning rate
    max_steps: int = 0  # end the training after this many steps; 0: after all epochs
    eval_every: int = 750  # steps between validations
    save_every: int = 250  # steps between saves of last.pt; each validation saves it, too
    log_every: int = 50  # steps between log lines
    # the task
    train_src: str = ""  # your own source text, one sentence a line; the last lines validate and test
    train_tgt: str = ""  # your own translation of it, line by line
    size: str = "small"  # tiny|small|base: layers x units: 4 x 128, 3 x 256, the paper's 6 x 512
    vocab_size: int = 6000  # pieces of the joint byte-pair encoding; fewer if the text is small
    max_len: int = 100  # tokens of the longest sentence; longer ones are cut, with a warning
    epochs: int = 22  # passes over the training set
    warmup: int = 300  # steps in which the learning rate rises
    dropout: float = 0.25  # dropout on the embeddings and on the output of each sublayer
    label_smoothing: float = 0.1  # label smoothing of the loss
    rdrop: float = 0.0  # alpha of R-drop (5 in its paper), which doubles a step's time; 0: none
    ema: float = 0.995  # decay of the moving average of the weights, which is tested and saved
    beam_size: int = 5  # hypotheses kept in beam search
    length_penalty: float = 2.0  # alpha of Wu et al. (2016, eq. 14); more favours long sentences


# d_model, heads, layers, d_ff
SIZES = {"tiny": (128, 4, 4, 256), "small": (256, 4, 3, 512), "base": (512, 8, 6, 2048)}
PRESETS = {"demo": {"size": "tiny", "vocab_size": 300, "epochs": 4, "batch_size": 1400,
                    "warmup": 100, "dropout": 0.1, "eval_every": 100, "ema": 0.99, "compile": "off"},
           "multi30k-tok": {"epochs": 24, "dropout": 0.3}}
MODES = {"train": "", "eval": "", "translate": "[TEXT...]"}  # mode: its inputs
UNIT = "tokens"  # what a batch is counted in
SHAPE = {"size", "vocab_size"}  # fields that a checkpoint fixes
PAD, BOS, EOS, UNK = 0, 1, 2, 3


# MODEL ------------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head attention (section 3.2.2), without biases, as in the paper."""

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
        """The attention weights of equation 1, softmax(Q K^T / sqrt(d_k)): x (B, T, D), keys (B, H, S, D/H)
        -> (B, H, T, S). `mask` is True where a query may look."""
        queries = self.split(self.query(x))
        scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
        return scores.masked_fill(~mask, -math.inf).softmax(-1)

    def forward(self, x, keys_and_values, mask):
        """Queries from x (B, T, D) -> (B, T, D)."""
        keys, values = keys_and_values
        heads = self.weights(x, keys, mask) @ values  # equation 1: (B, H, T, D/H)
        return self.out(heads.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network (sections 3.1 and 3.3), each as x + dropout(f(norm(x))).

    The paper has norm(x + dropout(f(x))), which needs a lower learning rate and a longer warm-up.
    """

    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__()
        self.attention, self.attention_norm = Attention(d_model, n_heads), nn.LayerNorm(d_model)
        self.feed_forward = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))
        self.feed_forward_norm, self.dropout = nn.LayerNorm(d_model), nn.Dropout(dropout)

    def forward(self, x, mask):
        """x (B, S, D), mask (B, 1, 1, S) -> (B, S, D)."""
        y = self.attention_norm(x)
        x = x + self.dropout(self.attention(y, self.attention.keys_and_values(y), mask))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(EncoderLayer):
    """The same, with attention to the source in between."""

    def __init__(self, d_model, n_heads, d_ff, dropout):
        super().__init__(d_model, n_heads, d_ff, dropout)
        self.cross, self.cross_norm = Attention(d_model, n_heads), nn.LayerNorm(d_model)

    def forward(self, x, memory, mask, past=None):
        """T target tokens x (B, T, D) -> (B, T, D), and the keys and values of all target tokens so far.

        `memory` (2, B, H, S, D/H) holds the keys and values of the source, whose mask is (B, 1, 1, S); `past`
        (2, B, H, L, D/H) those of the L target tokens before x. Padding follows the real tokens, from
        which `causal` hides it.
        """
        y = self.attention_norm(x)
        cache = self.attention.keys_and_values(y)
        if past is not None:
            cache = torch.cat([past, cache], 3)
        new, length = x.shape[1], cache.shape[3]
        causal = torch.ones(new, length, dtype=torch.bool, device=x.device).tril(length - new)
        x = x + self.dropout(self.attention(y, cache, causal))
        x = x + self.dropout(self.cross(self.cross_norm(x), memory, mask))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), cache


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

    def decode(self, tgt, memory, mask, caches=None):
        """T target tokens (B, T) -> logits (B, T, V) of the token after each, and each layer's keys and
        values so far, which the next call takes as `caches`. `memory` and `mask` are encode's."""
        x, new_caches = self.embed(tgt, caches[0].shape[3] if caches else 0), []
        for layer, source, past in zip(self.decoder, memory, caches or [None] * len(self.decoder)):
            x, cache = layer(x, source, mask, past)
            new_caches.append(cache)
        return F.linear(self.decoder_norm(x), self.embedding.weight), new_caches

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
    when beam_size finished hypotheses score at least as well as its best unfinished one."""
    b, k, device = len(src), beam_size, src.device
    memory, mask = model.encode(src)
    memory, mask = [kv.repeat_interleave(k, 1) for kv in memory], mask.repeat_interleave(k, 0)  # B K rows
    ids, caches = torch.full((b * k, 1), BOS, device=device), None
    scores = torch.full((b, k), -math.inf, device=device)
    scores[:, 0] = 0.0  # each sentence begins with one hypothesis
    finished = [[] for _ in range(b)]  # of each sentence: (score, ids)
    searching = set(range(b))  # sentences that are not done
    for length in range(1, max_len + 1):
        logits, caches = model.decode(ids[:, -1:], memory, mask, caches)
        logits = logits[:, -1].float()
        logits[:, [PAD, BOS, UNK]] = -math.inf  # never part of a translation
        log_p = logits.log_softmax(-1)
        if length == max_len:
            log_p[:, :EOS] = log_p[:, EOS + 1 :] = -math.inf  # every hypothesis ends here
        total = scores[:, :, None] + log_p.unflatten(0, (b, k))  # (B, K, V)
        best, index = total.flatten(1).topk(2 * k)  # 2 K, since each hypothesis has one way to end: K go on
        token = index % total.shape[2]
        parent = index // total.shape[2] + k * torch.arange(b, device=device)[:, None]  # their rows of ids
        penalty = ((5 + length) / 6) ** length_penalty
        candidates, parents = (best / penalty).tolist(), parent.tolist()
        for i, j in (token[:, :k] == EOS).nonzero().tolist():  # only an end among the best K counts
            if i in searching:
                finished[i].append((candidates[i][j], ids[parents[i][j], 1:]))
        scores, chosen = best.masked_fill(token == EOS, -math.inf).topk(k)
        for i, unfinished in enumerate((scores[:, 0] / penalty).tolist()):
            if sum(score >= unfinished for score, _ in finished[i]) >= k:
                searching.discard(i)
        if not searching or length == max_len:
            return [max(hypotheses, key=lambda pair: pair[0])[1].tolist() for hypotheses in finished]
        rows = parent.gather(1, chosen).flatten()
        ids = torch.cat([ids[rows], token.gather(1, chosen).view(-1, 1)], 1)
        caches = [cache[:, rows] for cache in caches]


def loss_sums(logits, tgt, smoothing, rdrop=0.0):
    """{name: sum over the target tokens} for logits (B, T, V) and targets (B, T): the cross-entropy with
    label smoothing (section 5.4). With `rdrop` the batch holds all pairs twice, under two dropout masks, and
    the loss is half of R-drop's (Liang et al., 2021, equation 4), rdrop being its alpha."""
    log_p, real = logits.float().log_softmax(-1), tgt != PAD
    nll = -log_p.gather(2, tgt[:, :, None])[:, :, 0]
    loss = (((1 - smoothing) * nll - smoothing * log_p.mean(-1)) * real).sum()
    if not rdrop:
        return {"loss": loss}
    p, q = log_p.chunk(2)  # the mean of both KL divergences:
    divergence = (((p.exp() - q.exp()) * (p - q)).sum(-1) / 2 * real[: len(p)]).sum()
    return {"loss": (loss + rdrop * divergence) / 2, "rdrop": divergence}


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
    """An English sentence and its German translation, with gender, case, and the verb second or last. Names
    below go in pairs, English and German."""
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


def read_pair(*paths):
    """The lines of two text files (.gz or not), as two lists of the same length."""
    sides = []
    for path in map(Path, paths):
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
                sides.append([line.strip() for line in file])
        except (OSError, EOFError, ValueError, zlib.error) as e:
            raise UserError(f"{path}: missing, truncated, or not UTF-8 ({e}); see data/README.md") from None
        if not any(sides[-1]):
            raise UserError(f"{path}: is empty; it takes one sentence a line")
    source, target = map(len, sides)
    if source != target:
        raise UserError(f"{paths[0]} has {source} lines and {paths[1]} {target}: line n of one must be the "
                        "translation of line n of the other")
    return sides


def load_data(cfg):
    """{"train", "val", then the name of each test split: (source sentences, target sentences)}, from
    data/multi30k/raw/SPLIT.en.gz and .de.gz, or data/multi30k/tok/SPLIT.lc.norm.tok.en.gz and .de.gz."""
    if cfg.data == "own":
        return divide(read_pair(cfg.train_src, cfg.train_tgt))
    if cfg.data == "demo":
        return divide(demo_pairs(9000))
    tok = cfg.data.endswith("-tok")
    folder = Path("data", cfg.data.removesuffix("-tok"), "tok" if tok else "raw")
    if cfg.data == "multi30k" and RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name, digest in DIGESTS.items():
            if not (folder / name).exists():
                say(f"downloading {URL}/{name}")
                try:
                    torch.hub.download_url_to_file(f"{URL}/{name}", folder / name, digest, progress=False)
                except (OSError, RuntimeError) as e:
                    raise UserError(f"{URL}/{name}: {e}; data/README.md says where it goes") from None
    if WORLD > 1:
        dist.barrier()
    end = ".lc.norm.tok" if tok else ""
    tests = sorted(path.name.removesuffix(f"{end}.en.gz") for path in folder.glob(f"test*{end}.en.gz"))
    if not tests:
        raise UserError(f"--data {cfg.data}: {folder} holds no test split; data/README.md says what goes "
                        "where; two files of your own go to --train_src and --train_tgt")
    return {split: read_pair(*(folder / f"{split}{end}.{side}.gz" for side in ("en", "de")))
            for split in ("train", "val", *tests)}


def divide(pairs):
    """Two lists of sentences as training, validation and test set: the last 1,000 different pairs (1/18, if
    that is fewer) are the test set, as many before them the validation set."""
    whole = list(dict.fromkeys(pair for pair in zip(*pairs) if all(pair)))  # without duplicates
    held = min(1000, len(whole) // 18)
    if not held:
        raise UserError(f"{len(whole)} different pairs are too few: it takes 18")
    parts = {"train": whole[: -2 * held], "val": whole[-2 * held : -held], "test": whole[-held:]}
    return {split: [list(side) for side in zip(*part)] for split, part in parts.items()}


def train_vocabulary(texts, cfg):
    """A joint byte-pair encoding of the training sentences only: SentencePiece's model file as uint8 (n,)."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=cfg.vocab_size,
            hard_vocab_limit=False, character_coverage=1.0, pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK,
            num_threads=1, minloglevel=2, max_sentence_length=10**6)
    except (RuntimeError, OSError, ValueError) as e:
        problem = f"no vocabulary could be made ({e}); it must exceed the number of different characters"
        raise UserError(f"--vocab_size {cfg.vocab_size}: {problem}") from None
    return torch.from_numpy(np.frombuffer(model.getvalue(), np.uint8).copy())


def tokenizer(vocabulary):
    return sentencepiece.SentencePieceProcessor(model_proto=vocabulary.numpy().tobytes())


def encode_text(sp, sentences, max_len):
    """Lists of ids that end in EOS; those longer than max_len are cut, with a warning."""
    ids = sp.encode(list(sentences))
    if long := sum(len(row) >= max_len for row in ids):
        say(f"warning: {long} of {len(ids)} sentences are cut after {max_len - 1} tokens (--max_len)")
    return [[*row[: max_len - 1], EOS] for row in ids]


def padded(rows, device):
    """Lists of ids -> (B, T), filled up with PAD, which is 0."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def make_batches(src, tgt, budget, device):
    """Pairs of similar lengths together, so that there is little padding, with at most `budget` tokens on
    either side: [(source ids (B, S), target ids (B, T), number of target tokens without padding)]."""
    groups, width = [], 0
    for i in sorted(range(len(src)), key=lambda i: (len(tgt[i]), len(src[i]))):
        size = max(len(tgt[i]), len(src[i]))
        width = max(width, size)
        if not groups or (len(groups[-1]) + 1) * width > budget:
            groups.append([])
            width = size
        groups[-1].append(i)
    pairs = ([padded([side[i] for i in group], device) for side in (src, tgt)] for group in groups)
    return [(x, y, sum(len(tgt[i]) for i in group)) for (x, y), group in zip(pairs, groups)]


# METRICS ----------------------------------------------------------------------------------------------------
def tokenize_13a(line):
    """A line's tokens as mteval-v13a, the standard of WMT, splits it: a string -> a list of strings."""
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
            total[n] += found.total()
            match[n] += (found & ngrams(ref, n + 1)).total()
    if not match[0] or not total[3]:
        return 0.0
    precisions = [(m or 0.5 ** match[: n + 1].count(0)) / t for n, (m, t) in enumerate(zip(match, total))]
    brevity = math.exp(min(0.0, 1 - sizes[1] / sizes[0]))
    return 100 * brevity * statistics.geometric_mean(precisions)


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
    """Lists of ids -> strings. Each process fills its rows; the others stay PAD, so the sum joins all."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # sentences of similar length go together
    output = torch.zeros(len(ids), cfg.max_len, dtype=torch.long)
    size = max(1, 10_000 // cfg.max_len)  # sentences at a time
    for start in range(size * RANK, len(ids), size * WORLD):
        chosen = order[start : start + size]
        src = padded([ids[i] for i in chosen], device)
        limit = min(cfg.max_len, 2 * src.shape[1] + 10)
        for i, row in zip(chosen, beam_search(model, src, beam_size, cfg.length_penalty, limit)):
            output[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    rows = all_sum(output.to(device)).tolist()
    return sp.decode([[i for i in row if i != PAD] for row in rows])


def evaluate(model, sp, cfg, pair, device, beam_size):
    """(figures, hypotheses) of a split. BLEU counts 13a's tokens; in a -tok set spaces divide them."""
    ids = encode_text(sp, pair[0], cfg.max_len)
    hypotheses = translate(model.eval(), sp, ids, cfg, device, beam_size)
    tok = cfg.data.endswith("-tok")
    figures = {"bleu": bleu(hypotheses, pair[1], "none" if tok else "13a", lowercase=tok)}
    return figures | {"chrf": chrf(hypotheses, pair[1])}, hypotheses


def score(model, sp, cfg, data, folder, device):
    """The figures of every test split, those of the first without a prefix; writes the hypotheses."""
    figures = {}
    for split in list(data)[2:]:
        prefix = f"{split}_" if figures else ""
        part, hypotheses = evaluate(model, sp, cfg, data[split], device, cfg.beam_size)
        figures |= {prefix + name: value for name, value in part.items()}
        if RANK == 0:
            (folder / f"{split}.hyp.txt").write_text("".join(f"{h}\n" for h in hypotheses), encoding="utf-8")
    return figures


@torch.no_grad()
def draw(model, sp, cfg, sentence, folder, device):
    """attention.png: where each target token looks in the source, averaged over the heads and layers."""
    [ids] = encode_text(sp, [sentence], cfg.max_len)
    src, maps = padded([ids], device), []
    [out] = beam_search(model, src, cfg.beam_size, cfg.length_penalty, min(cfg.max_len, 2 * len(ids) + 10))
    for layer in model.decoder:
        layer.cross.register_forward_hook(lambda cross, args, _: maps.append(
            cross.weights(args[0], args[1][0], args[2])))  # x, (keys, values), mask
    model(src, torch.tensor([[BOS, *out]], device=device))
    figure = Figure((7, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="source", ylabel="translation")
    axes.imshow(torch.stack(maps).mean((0, 1, 2)).cpu().numpy(), cmap="Blues", vmin=0)  # (T, S)
    axes.set_xticks(range(len(ids)), sp.id_to_piece(ids), rotation=90, parse_math=False)
    axes.set_yticks(range(len(out) + 1), sp.id_to_piece([*out, EOS]), parse_math=False)
    figure.savefig(folder / "attention.png", dpi=80)


def build(cfg, sp, device):
    if not 3 <= cfg.max_len <= 1024:
        raise UserError(f"--max_len {cfg.max_len}: must be 3 to 1024")
    return Transformer(sp.vocab_size(), *SIZES[cfg.size], cfg.dropout).to(device)


def predict(mode, inputs, flags):
    """The modes eval and translate."""
    with contextlib.redirect_stdout(sys.stderr if mode == "translate" else sys.stdout):
        cfg, ckpt, device, folder = open_checkpoint(flags)
        sp = tokenizer(ckpt["vocabulary"])
        model = build(cfg, sp, device).eval()
        model.load_state_dict(ckpt["model"])
        if mode == "eval":
            figures = score(model, sp, cfg, load_data(cfg), folder, device)
            form = "case:lc|tok:none" if cfg.data.endswith("-tok") else "case:mixed|tok:13a"
            say(f"{show(figures, digits=6)}\nwritten: {folder}/*.hyp.txt")
            say(f"BLEU as sacrebleu's: nrefs:1|{form}|eff:no|smooth:exp")
            return
        lines = [" ".join(text.split()) for text in inputs]
        if not inputs:
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
            lines = [line.strip() for line in sys.stdin]
        if ckpt["config"]["data"].endswith("-tok"):
            say("note: this model was trained on lower-cased, tokenised text; the input is only lower-cased")
            lines = [line.lower() for line in lines]
        ids = encode_text(sp, filter(None, lines), cfg.max_len)
        translations = iter(translate(model, sp, ids, cfg, device, cfg.beam_size) if ids else ())
    for line in lines:  # on the standard output: nothing but translations
        say(next(translations) if line else "")


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
    if bool(flags.get("train_src")) != bool(flags.get("train_tgt")):
        raise UserError("--train_src and --train_tgt go together: a text and its translation")
    if flags.get("train_src"):
        flags["data"] = "own"
    if mode != "train":
        return predict(mode, inputs, flags)
    run = Run(flags)
    cfg, ckpt, device = run.cfg, run.ckpt, run.device

    data = load_data(cfg)
    old = ckpt or (load_checkpoint(cfg.init) if cfg.init else {})  # weights and vocabulary belong together
    vocabulary = old["vocabulary"] if old else train_vocabulary(sum(data["train"], []), cfg)
    sp = tokenizer(vocabulary)
    ids = [encode_text(sp, side, cfg.max_len) for side in data["train"]]
    batches = make_batches(*ids, cfg.batch_size, device)
    count = round(statistics.fmean(tokens for *_, tokens in batches))  # of a batch
    schedule = len(batches) * cfg.epochs
    total = min(cfg.max_steps or schedule, schedule)
    say(f"pairs: {', '.join(f'{len(pair[0]):,} {name}' for name, pair in data.items())}; "
        f"vocabulary: {len(sp):,}; steps: {total:,} of {count:,} tokens")

    torch.manual_seed(cfg.seed)
    raw = build(cfg, sp, device)
    average = copy.deepcopy(raw)  # moving average of the weights
    decay = min(cfg.ema, 1 - 4 / max(5, schedule))  # a short schedule needs a shorter memory
    optimizer = torch.optim.Adam(raw.parameters(), cfg.lr, betas=(0.9, 0.98), eps=1e-9, fused=True)
    if ckpt:
        raw.load_state_dict(ckpt["model"])
        average.load_state_dict(ckpt["average"])
        optimizer.load_state_dict(ckpt["optimizer"])
    elif cfg.init:
        load_weights(raw, old["model"])
    if cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda" and sys.platform == "linux"):
        say("compiling in the first step, which takes a minute or two")
        torch._dynamo.config.optimize_ddp = False  # DDP would split the graph, compiled anew for each length
        raw.compile(dynamic=True)  # one graph for all lengths; in place, so that its weights keep their names
    model = nn.parallel.DistributedDataParallel(raw, broadcast_buffers=False) if WORLD > 1 else raw

    def fetch(step):
        """This rank's share of the batch of a step, which counts from 1: ids (B, S), (B, T); and the number
        of target tokens in the whole batch."""
        epoch, place = divmod(step - 1, len(batches))
        order = np.random.default_rng(seed_for(cfg.seed, epoch)).permutation(len(batches))
        source, target, tokens = batches[order[place]]
        torch.manual_seed(seed_for(cfg.seed, step, RANK))  # of the dropout
        return source[RANK::WORLD], target[RANK::WORLD], tokens

    def update(step, batch):
        """One optimizer step; returns the parts of the loss."""
        src, tgt, tokens = batch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, schedule)
        if cfg.rdrop:  # each pair twice, with two dropout masks
            src, tgt = src.repeat(2, 1), tgt.repeat(2, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            logits = model(src, F.pad(tgt, (1, -1), value=BOS))  # shifted right
        losses = loss_sums(logits, tgt, cfg.label_smoothing, cfg.rdrop)
        losses = {name: value * WORLD / tokens for name, value in losses.items()}  # DDP takes the mean
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        with torch.no_grad():
            weight = 1 - decay if step > 1 else 1.0  # it begins with the weights after the first step
            torch._foreach_lerp_(list(average.parameters()), list(raw.parameters()), weight)
        return losses

    run.start(total)
    for step in range(run.step + 1, total + 1):
        losses = update(step, fetch(step))
        check, save = run.step_done(losses, count, learning_rate(cfg, step, schedule))
        if check:
            figures, _ = evaluate(average, sp, cfg, data["val"], device, 1)
            run.write("val", figures)
            if run.best is None or figures["bleu"] >= run.best:
                run.best = figures["bleu"]
                run.save("best.pt", model=average.state_dict(), vocabulary=vocabulary)
        if save:
            run.save("last.pt", model=raw.state_dict(), average=average.state_dict(),
                     optimizer=optimizer.state_dict(), vocabulary=vocabulary)
        if run.stop:
            return

    average.load_state_dict(load_checkpoint(run.folder / "best.pt")["model"])
    figures = score(average, sp, cfg, data, run.folder, device)
    if RANK == 0:
        draw(average, sp, cfg, data[list(data)[2]][0][0], run.folder, device)  # the first test sentence
    run.finish(figures)


def learning_rate(cfg, step, schedule):
    """The lower of a linear warm-up (at most a third of the schedule) and half a cosine down to zero. (In the
    paper, equation 3, it falls with the root of the step.)"""
    warmup = max(1, min(cfg.warmup, schedule // 3))
    return cfg.lr * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / schedule))


if __name__ == "__main__":
    main()
