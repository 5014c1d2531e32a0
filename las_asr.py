"""Listen, Attend and Spell (LAS): speech recognition, from sound files to text.

    python las_asr.py --data demo                            # a generated voice: no download, no GPU
    python las_asr.py --data librispeech                     # 100 hours; 7 GB downloaded on first use
    python las_asr.py --data path/to/train.tsv               # your own; or a folder: data/README.md
    torchrun --nproc_per_node=8 las_asr.py --data librispeech
    python las_asr.py --data librispeech --resume            # continue a run that was stopped

    python las_asr.py eval                                   # test the newest out/las_asr-*/best.pt
    python las_asr.py transcribe a.wav b.flac c.mp3          # any length, usual sample rates, any channels

Measured on one thread of a CPU with bfloat16 (AMD EPYC), other work beside it; one run each, seed 0:

    --data demo           1.61 % character errors (CER) in unseen sentences by unseen speakers; 1.5 minutes
    --data hw4p2          CMU AN4, 38 minutes of training speech: 4.50 % CER, 8.29 % word errors; 50 minutes
    --data librispeech    not yet trained to the end

Paper: Chan et al., "Listen, Attend and Spell", 2016, arXiv 1508.01211. Location-aware attention: Chorowski et
al., 2015, arXiv 1506.07503, Battenberg et al., 2020, arXiv 1910.10288; the CTC loss beside it: Kim et al.,
"Joint CTC-attention", 2017, arXiv 1609.06773; SpecAugment: Park et al., 2019, arXiv 1904.08779; speed
perturbation: Ko et al., 2015. Data: Panayotov et al., "LibriSpeech", 2015 (CC BY 4.0).
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchaudio>=2.9", "numpy", "soundfile", "matplotlib"]
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
import shutil
import signal
import sys
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
from matplotlib.figure import Figure
from torchaudio.functional import mask_along_axis_iid, resample


@dataclass
class Config:
    # the same in all five scripts; a comment is the help of its flag, and may begin with choices: a|b|c
    data: str = "auto"  # demo, librispeech, speech, hw4p2, folder or TSV; auto: the first in data/, else demo
    out: str = ""  # folder of the run (default: out/SCRIPT-DATA)
    save: str = ""  # folder for predictions (default: the folder of the checkpoint)
    ckpt: str = ""  # checkpoint to test or predict with (default: the newest best.pt in out/SCRIPT-*)
    init: str = ""  # checkpoint whose weights a new run starts from
    resume: bool = False  # continue the run in --out from its last.pt, if there is one
    device: str = "auto"  # auto|cpu|cuda: where to run
    dtype: str = "auto"  # auto|float32|bfloat16: precision of training (autocast); metrics are always float32
    compile: str = "auto"  # auto|on|off: torch.compile; auto: on for CUDA under Linux
    seed: int = 0  # seed of the initial weights, the order of the data, and the noise
    batch_size: int = 6000  # frames per step, padding included, over all processes
    lr: float = 2e-3  # peak learning rate
    max_steps: int = 0  # end the training after this many steps; 0: after all epochs
    eval_every: int = 500  # steps between validations
    save_every: int = 500  # steps between saves of last.pt; each validation saves it, too
    log_every: int = 50  # steps between log lines
    # the task
    hidden: int = 256  # units of the listener, per direction
    stack: int = 2  # neighbouring frames joined before the first layer
    layers: int = 1  # pyramidal layers; each halves the number of frames
    speller: int = 256  # units of the speller
    dropout: float = 0.3  # dropout between the listener's layers and on the speller's input
    ctc_weight: float = 0.3  # weight of the CTC loss on the listener; 0: none in the search, either
    teacher: float = 0.9  # scheduled sampling: final share of true characters fed to the speller
    specaugment: float = 1.0  # strength of SpecAugment; 0: none
    speed: float = 0.1  # speed perturbation: recordings are up to this share slower or faster
    epochs: int = 40  # passes over the training set
    warmup: int = 500  # steps in which the learning rate rises
    beam_size: int = 4  # hypotheses kept in beam search


PRESETS = {
    "demo": {"epochs": 8, "hidden": 128, "speller": 128, "speed": 0.0, "dropout": 0.1, "batch_size": 4000,
             "warmup": 100, "lr": 3e-3, "eval_every": 100, "log_every": 20, "compile": "off"},
    "speech": {"dropout": 0.2, "ctc_weight": 0.5, "eval_every": 1000},  # 6 hours
    "librispeech": {"epochs": 60, "lr": 1e-3, "hidden": 512, "stack": 1, "layers": 2, "speller": 512,
                    "batch_size": 96000, "warmup": 2000},
    "hw4p2": {"epochs": 72, "lr": 3e-3, "batch_size": 4000, "dropout": 0.4, "eval_every": 300}}
MODES = {"train": "", "eval": "", "transcribe": "FILE..."}  # mode: its inputs
UNIT = "frames"  # what a batch is counted in
SHAPE = {"hidden", "stack", "layers", "speller"}  # fields that a checkpoint fixes
PAD, BOS, EOS = 0, 1, 2  # PAD is CTC's blank, too
REACH = 16  # half the width of the location filter, in frames of the listener
ALPHABET = " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"
VOCABULARY = ["<pad>", "<bos>", "<eos>", *ALPHABET]
CTC_IN_SEARCH = 0.5  # weight of the CTC head in the search, if there is one


# MODEL ------------------------------------------------------------------------------------------------------
class BLSTM(nn.Module):
    """A bidirectional LSTM over padded sequences. (A packed one is several times slower on a CPU.)"""

    def __init__(self, n_in, hidden):
        super().__init__()
        self.forth, self.back = (nn.LSTM(n_in, hidden, batch_first=True) for _ in range(2))

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> (B, T, 2 hidden), zero in the padding."""
        t = torch.arange(x.shape[1], device=x.device)
        mask = t < lengths[:, None]
        mirror = torch.where(mask, lengths[:, None] - 1 - t, t)[:, :, None]  # reverses all but the padding
        with torch.autocast("cuda", enabled=False):  # CUDA's LSTM would run in float16: gradients underflow
            x = x.float()
            forth, back = self.forth(x)[0], self.back(x.take_along_dim(mirror, 1))[0]
        return torch.cat([forth, back.take_along_dim(mirror, 1)], -1) * mask[:, :, None]


class Listener(nn.Module):
    """A BLSTM and, above it, pyramidal BLSTMs, which read pairs of frames (section 3.1, equation 5). With
    stack = 2 the first one reads pairs, too, which halves its cost."""

    def __init__(self, n_features, hidden, layers, dropout, stack):
        super().__init__()
        inputs = [stack * n_features] + [4 * hidden] * layers
        self.blstms = nn.ModuleList(BLSTM(n_in, hidden) for n_in in inputs)
        self.joined, self.reduction, self.dropout = [stack] + [2] * layers, stack * 2**layers, dropout

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> (B, T', 2 hidden), (B,) with T' = T // reduction, but at least 1."""
        x = F.pad(x, (0, 0, 0, max(0, self.reduction - x.shape[1])))
        for blstm, n in zip(self.blstms, self.joined):
            x, lengths = x.unfold(1, n, n).mT.flatten(2), lengths // n  # joins n neighbouring frames
            x = F.dropout(blstm(x, lengths), self.dropout, self.training)
        return x, lengths


def lstm_cell(gates, c):
    """An LSTM's gates (B, 4 H) and cell (B, H) -> its next h and c, which stays float32 under autocast."""
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh().to(gates.dtype), c


class LAS(nn.Module):
    """Listener, attention and speller: the logits of each character, given the sound and those before it.

    Unlike in the paper, the attention is location-aware (Chorowski et al., 2015): the coverage, which is the
    sum of all attention so far, is filtered and added to the energies. The filter is computed from the
    speller's state (Battenberg et al., 2020). Further differences: phi and psi are linear, the energies are
    scaled, the context sums a linear layer's values. Targets (B, U) end in EOS, then PAD, without BOS.
    """

    def __init__(self, n_features, vocab_size, hidden=256, layers=1, speller=256, dropout=0.3, stack=1):
        super().__init__()
        d, self.dropout = speller, dropout
        self.listener = Listener(n_features, hidden, layers, dropout, stack)
        self.phi, self.psi, self.value = nn.Linear(d, d), nn.Linear(2 * hidden, d), nn.Linear(2 * hidden, d)
        self.filter = nn.Linear(d, 2 * REACH + 1)
        self.embedding = nn.Embedding(vocab_size, d)
        self.cells = nn.ModuleList([nn.Linear(3 * d, 4 * d), nn.Linear(2 * d, 4 * d)])  # gates of two LSTMs
        self.character = nn.Sequential(nn.Linear(2 * d, d), nn.Tanh(), nn.Linear(d, vocab_size))
        self.ctc = nn.Linear(2 * hidden, vocab_size)

    def listen(self, features, lengths):
        """(B, T, F), (B,) -> memory, which `step` attends to, and CTC logits (B, T', V). The memory is psi(h)
        and the values (B, T', D), and the mask (B, T'), False in the padding. At least one frame is True."""
        h, lengths = self.listener(features, lengths.to(features.device, non_blocking=True))
        mask = torch.arange(h.shape[1], device=h.device) < lengths[:, None].clamp(min=1)
        return [self.psi(h), self.value(h), mask], self.ctc(h)

    def start(self, memory):
        """The state before the first character, zeros: h1, c1, h2, c2, context (N, D), coverage (N, T')."""
        _, values, mask = memory
        zeros = functools.partial(values.new_zeros, values[:, 0].shape, requires_grad=values.requires_grad)
        h1, c1, h2, c2, context = (zeros() for _ in range(5))  # with gradients, as later ones: compiled once
        return [h1, c1.float(), h2, c2.float(), context, torch.zeros_like(mask, dtype=torch.float32)]

    def step(self, tokens, state, memory):
        """Spells a character: the one before it (N,) -> logits (N, V), attention (N, T'), the next state.
        N is B in training, and B times the number of hypotheses in the search."""
        h1, c1, h2, c2, context, coverage = state  # (N, D), but the coverage (N, T')
        keys, values, mask = memory
        y = F.dropout(torch.cat([self.embedding(tokens), context], -1), self.dropout, self.training)
        h1, c1 = lstm_cell(self.cells[0](torch.cat([y, h1], -1)), c1)  # s = RNN(s, y, c), equation 7
        h2, c2 = lstm_cell(self.cells[1](torch.cat([h1, h2], -1)), c2)
        energies = (keys @ self.phi(h2)[:, :, None])[:, :, 0] / math.sqrt(h2.shape[1])  # equation 9
        padded = F.pad(F.pad(coverage, (REACH, 0), value=1.0), (0, REACH))  # all before the sound is covered
        windows = padded.unfold(1, 2 * REACH + 1, 1)  # (N, T', 2 REACH + 1): the coverage around each frame
        energies = energies + (windows @ self.filter(h2)[:, :, None])[:, :, 0]  # (N, T')
        attention = energies.float().masked_fill(~mask, -math.inf).softmax(-1)  # equation 10
        context = (attention[:, None].to(values.dtype) @ values)[:, 0]  # equation 11
        coverage = (coverage + attention.detach()).clamp(max=1)  # gradients through it may explode
        logits = self.character(torch.cat([h2, context], -1))  # equation 8
        return logits, attention, [h1, c1, h2, c2, context, coverage]

    def forward(self, features, lengths, targets, teacher=1.0):
        """(B, T, F), (B,), (B, U) -> logits (B, U, V), attention (B, U, T'), CTC logits (B, T', V). A step is
        fed the true character before its own (teacher forcing) or, in training, with probability 1 - teacher
        the one that the model finds likeliest (scheduled sampling; the paper draws one, section 3.3)."""
        memory, ctc_logits = self.listen(features, lengths)
        state, token, outputs = self.start(memory), targets.new_full((len(targets),), BOS), []
        for target in targets.unbind(1):
            logits, attention, state = self.step(token, state, memory)
            outputs.append((logits, attention))
            forced = torch.rand(len(target), device=target.device) < (teacher if self.training else 1.0)
            token = torch.where(forced, target, logits.argmax(-1))
        logits, attention = (torch.stack(part, 1) for part in zip(*outputs))
        return logits, attention, ctc_logits


class CTCPrefixes:
    """The CTC head's log p of all texts that begin with a hypothesis, for K hypotheses of each of B sounds
    (Watanabe et al., "Hybrid CTC/Attention Architecture", 2017, section III-B).

    nonblank and blank (B, K, T' + 1) are log p that the first t frames spell the hypothesis and end in a
    character, or in a blank (PAD). With a character c appended, they are (here without logarithms)
        nonblank[t] = p_t(c) (nonblank[t - 1] + before[t - 1])
        blank[t] = p_t(PAD) (blank[t - 1] + nonblank[t - 1])
    where before is the old nonblank + blank, or blank alone if the hypothesis already ends in c.
    """

    def __init__(self, logits, mask, k):
        """logits (B, T', V); mask (B, T'), False in the padding, which counts as blanks."""
        log_p = logits.float().log_softmax(-1).clamp(min=-30).masked_fill(~mask[:, :, None], -30.0)
        log_p[..., PAD] = log_p[..., PAD].masked_fill(~mask, 0.0)
        self.log_p, self.row = log_p.mT, torch.arange(len(mask), device=mask.device)[:, None]
        self.last = torch.full((len(mask), k), BOS, device=mask.device)
        self.blank = F.pad(self.log_p[:, PAD].cumsum(-1), (1, 0))[:, None].repeat(1, k, 1)
        self.nonblank = torch.full_like(self.blank, -1e5)

    def scores(self):
        """log p of all texts that begin with a hypothesis and one more character: (B, K, V); in column EOS
        that of the hypothesis alone."""
        both = torch.logaddexp(self.nonblank, self.blank)
        repeated = F.one_hot(self.last, self.log_p.shape[1])[..., None] == 1  # must follow a blank
        self.before = torch.where(repeated, self.blank[:, :, None], both[:, :, None])[..., :-1]
        scores = (self.before + self.log_p[:, None]).logsumexp(-1)
        scores[..., EOS] = both[..., -1]
        return scores

    def extend(self, parent, token):
        """The next hypotheses: `token` appended to the one numbered `parent`, (B, K) each."""
        self.nonblank = recursion(self.log_p[self.row, token], self.before[self.row, parent, token])
        self.blank = recursion(self.log_p[:, None, PAD], self.nonblank[..., :-1])
        self.last = token


def recursion(log_p, added):
    """x[0] = 0, x[t] = p[t] (x[t - 1] + added[t - 1]), in logarithms: (..., T), (..., T) -> (..., T + 1).
    Divided by the product of all p so far, x is a cumulative sum."""
    product = log_p.cumsum(-1)
    return F.pad(product + (added - product + log_p).logcumsumexp(-1), (1, 0), value=-1e5)


def greedy_decode(model, features, lengths, ctc_weight=CTC_IN_SEARCH):
    """The likeliest character each time: (B, T, F), (B,) -> B lists of ids without EOS."""
    return beam_search(model, features, lengths, 1, ctc_weight)


@torch.no_grad()
def beam_search(model, features, lengths, beam_size=4, ctc_weight=CTC_IN_SEARCH):
    """The best of beam_size hypotheses by ((1 - ctc_weight) log p + ctc_weight log p_CTC) / length:
    (B, T, F), (B,) -> B lists of ids without EOS, none longer than T'. The search for a sound ends when a
    finished hypothesis scores at least as well as the best unfinished one."""
    memory, ctc_logits = model.listen(features, lengths)
    b, k, device, frames = len(features), beam_size, features.device, memory[2].sum(1)
    ctc = CTCPrefixes(ctc_logits, memory[2], k)
    row = torch.arange(b, device=device)[:, None]
    memory = [part.repeat_interleave(k, 0) for part in memory]  # B K rows
    state, ids = model.start(memory), torch.full((b * k, 1), BOS, device=device)
    spelled = torch.full((b, k), -math.inf, device=device)  # log p by the speller
    spelled[:, 0] = 0.0  # each sound begins with one hypothesis
    finished = [(-math.inf, [])] * b  # the best of each sound: (score, ids)
    searching = set(range(b))  # sounds that are not done
    for length in range(1, memory[2].shape[1] + 2):
        logits, _, state = model.step(ids[:, -1].contiguous(), state, memory)
        logits[:, :EOS] = -math.inf  # PAD and BOS are never part of a text
        log_p = logits.float().log_softmax(-1).unflatten(0, (b, k))
        ended = (frames < length)[:, None, None]
        log_p[..., EOS + 1 :].masked_fill_(ended, -math.inf)  # no more characters than frames
        spelled = spelled[:, :, None] + log_p  # (B, K, V)
        scores = (1 - ctc_weight) * spelled + ctc_weight * ctc.scores()
        scores = scores.masked_fill(spelled == -math.inf, -math.inf)  # nan if ctc_weight is 1
        best, index = scores.flatten(1).topk(2 * k)  # (B, 2 K), of which at most K end
        token, parent = index % scores.shape[2], index // scores.shape[2]
        candidates, parents = (best / length).tolist(), parent.tolist()
        for i, j in (token[:, :k] == EOS).nonzero().tolist():  # only an end among the best K counts
            if i in searching and candidates[i][j] > finished[i][0]:
                finished[i] = candidates[i][j], ids[i * k + parents[i][j], 1:].tolist()
        best, chosen = best.masked_fill(token == EOS, -math.inf).topk(k)
        unfinished = (best[:, 0] / length).tolist()
        searching = {i for i in searching if finished[i][0] < unfinished[i]}
        if not searching:
            break
        token, parent = token[row, chosen], parent[row, chosen]
        spelled = spelled[row, parent, token].masked_fill(best == -math.inf, -math.inf)
        origin = (k * row + parent).flatten()
        ids, state = torch.cat([ids[origin], token.view(-1, 1)], 1), [part[origin] for part in state]
        ctc.extend(parent, token)
    return [text for _, text in finished]


# DATA -------------------------------------------------------------------------------------------------------
AUTO = {"librispeech": "LibriSpeech", "speech": "train.tsv", "hw4p2": "train-clean-100"}  # in data/NAME
REAL = "--data librispeech downloads 100 hours of read English, 7 GB"
PARTS = {"train": "train-clean-100", "val": "dev-clean", "test": "test-clean"}  # of LibriSpeech and HW4P2


def demo_voice(text, pitch, tract, tempo, seed):
    """A source-filter voice at 16 kHz: (n,) float32. The source is pulses at the speaker's pitch (Hz), for
    some letters noise; a letter has two formants (Hz), scaled by `tract`. Loudness and noise vary."""
    rng = np.random.default_rng(seed)
    lengths = 80 * (200 * rng.uniform(0.07, 0.1, len(text) + 2) / tempo).astype(int)  # samples per letter
    begins, n = np.cumsum(lengths), lengths.sum()
    f0 = pitch * (1 + 0.08 * np.sin(2 * math.pi * rng.uniform(0.5, 2) * np.arange(n) / 16000))
    pulses = np.diff(np.floor(np.cumsum(f0) / 16000), prepend=0)
    noise, wave = rng.normal(size=n), np.zeros(n)
    for letter, begin, length in zip(text, begins, lengths[1:]):
        if letter != " ":
            i, span = ord(letter) - 65, slice(begin - 160, begin + length + 160)  # overlaps its neighbours
            f1, f2 = (260 + 140 * (i % 5)) * tract, (900 + 480 * (i // 5)) * tract
            source = (pulses if i % 4 != 3 else 0.1 * noise)[span] * np.hanning(length + 320) ** 0.3
            f = np.fft.rfftfreq(length + 320, 1 / 16000)
            formants = np.exp(-(((f - f1) / 90) ** 2)) + 0.7 * np.exp(-(((f - f2) / 160) ** 2))
            wave[span] += np.fft.irfft(np.fft.rfft(source) * formants, length + 320)
    wave = wave / wave.std() * rng.uniform(0.02, 0.1) + noise * rng.uniform(0.001, 0.01)
    return wave.astype(np.float32)


def demo_set(count, seed):
    """[(arguments of demo_voice, text)]: sentences of invented words, since a known word can be guessed from
    one of its sounds; each by another speaker."""
    rng = np.random.default_rng(seed)
    syllable = [*"BCDFGHJKLMNPQRSTVWXYZ"], [*"AEIOU"], [*"LNRST"] + [""] * 12

    def word():
        return "".join(rng.choice(letters) for _ in range(rng.integers(1, 4)) for letters in syllable)

    texts = [" ".join(word() for _ in range(rng.integers(3, 6))) for _ in range(count)]
    voices = rng.uniform((90, 0.88, 0.9), (240, 1.12, 1.1), (count, 3)).tolist()
    return [((text, *voice, rng.integers(1 << 30)), text) for text, voice in zip(texts, voices)]


def log_mel(waveform, sample_rate):
    """80 log-mel energies, of 25 ms windows every 10 ms: (n,) or (channels, n) -> (T, 80). ValueError if the
    rate is no multiple of 25 from 4,000 to 200,000 Hz: resampling it could take gigabytes."""
    if sample_rate % 25 or not 4000 <= sample_rate <= 200_000:
        raise ValueError(f"a sample rate of {sample_rate} Hz")
    wave = torch.as_tensor(waveform, dtype=torch.float32)
    wave = resample(wave.mean(0) if wave.dim() == 2 else wave, sample_rate, 16000)
    wave = F.pad(wave, (0, max(0, 400 - len(wave))))
    transform = torchaudio.transforms.MelSpectrogram(16000, 512, win_length=400, hop_length=160, n_mels=80)
    return (transform(wave) + 1e-6).log().T


def read_features(item):
    """(T, F) float32 of a sound file, of a .npy file of features (T, F), or of demo_voice's arguments, each
    column with mean 0 and variance 1. ValueError if it is silent or too short."""
    if isinstance(item, tuple):
        x = log_mel(demo_voice(*item), 16000)
    elif not item.is_file():
        raise ValueError("no such file")
    elif item.suffix == ".npy":
        x = torch.from_numpy(np.load(item)).float()
    else:
        wave, rate = soundfile.read(item, dtype="float32", always_2d=True)
        x = log_mel(wave.T, rate)
    if x.dim() != 2 or len(x) < 8:
        raise ValueError("fewer than 8 frames of 10 ms, or not (T, F)")
    if not x.isfinite().all() or x.min() == x.max():
        raise ValueError("silent, or not finite")
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-3)


def clean(text):
    """Upper case, A to Z, apostrophe and space: "It’s a café-bar." becomes "IT'S A CAFE BAR". ValueError for
    digits and symbols, whose spelling is not known, and if nothing is left."""
    text = re.sub("[\u2019\u02bc\u00b4`]", "'", text).replace("\u2026", " ")
    text = unicodedata.normalize("NFKD", text.upper())
    text = re.sub(r"[-\u2013\u2014/,;:!?_\s]", " ", text)
    text = "".join(c for c in text if unicodedata.category(c)[0] not in "MP" or c in "'&%@#")
    if unknown := set(text) - set(ALPHABET):
        raise ValueError(f"{min(unknown)!r} in the transcript")
    if not text.strip(" '"):
        raise ValueError("the transcript is empty")
    return " ".join(text.split())


def find_files(folder, pattern="**/*"):
    """Sorted paths in a folder, without hidden files and what operating systems leave behind."""
    junk = re.compile(r"\.|__MACOSX$|Thumbs\.db$|desktop\.ini$", re.I)
    return [p for p in sorted(folder.glob(pattern)) if not any(map(junk.match, p.relative_to(folder).parts))]


def find_utterances(cfg, folder):
    """{"train": [(file or demo_voice's arguments, text)], "val": [...], "test": [...]}, or some of them. If
    there is no validation set, the end of the training set takes its place."""
    if cfg.data == "librispeech":
        download(folder)
    if cfg.data == "demo":
        found = {"train": demo_set(1000, 0), "val": demo_set(50, 1), "test": demo_set(150, 2)}
    elif (folder / "LibriSpeech").is_dir():
        found = {split: read_librispeech(folder / "LibriSpeech" / part) for split, part in PARTS.items()}
    elif (folder / PARTS["train"] / "mfcc").is_dir():
        found = {split: read_hw4p2(folder / PARTS[split]) for split in ("train", "val")}
    elif folder.is_dir() and not (folder / "metadata.csv").exists():
        lists = {"train": folder / "train.tsv", "val": folder / "dev.tsv", "test": folder / "test.tsv"}
        found = {split: read_list(path) for split, path in lists.items() if path.exists()}
    else:
        found = {"train": read_list(folder / "metadata.csv" if folder.is_dir() else folder)}
    found = {split: items for split, items in found.items() if items}
    if "val" not in found and "train" in found:
        held = max(1, len(found["train"]) // 20)
        say(f"note: there is no validation set; the last {held} utterances of the training set are taken")
        found["train"], found["val"] = found["train"][:-held], found["train"][-held:]
    return found


def read_librispeech(folder):
    """[(FLAC file, text)] of a part such as dev-clean: SPEAKER/CHAPTER/*.trans.txt, lines of `ID TEXT`."""
    return [(path.parent / f"{line.split()[0]}.flac", line.partition(" ")[2])
            for path in find_files(folder, "**/*.trans.txt")
            for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_hw4p2(folder):
    """[(features file, text)] of mfcc/*.npy and transcript/raw/*.npy: letters between <sos> and <eos>."""
    items = []
    for path in find_files(folder / "mfcc", "*.npy"):
        try:
            letters = np.load(folder / "transcript" / "raw" / path.name).tolist()
            items.append((path, "".join(letters).replace("<sos>", "").replace("<eos>", "")))
        except Exception as e:  # a damaged array can raise nearly anything
            raise UserError(f"{path}: its transcript is missing or damaged ({e})") from None
    return items


def read_list(path):
    """[(sound file, text)] of a TSV: its columns `path` and `sentence`, `text` or `transcript`, without a
    header the first two; or of LJSpeech's metadata.csv: `ID|text|normalised text`. The files lie beside the
    list, in clips/ (Common Voice) or in wavs/ (LJSpeech)."""
    ljspeech = path.name == "metadata.csv"
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    rows = [line.split("|" if ljspeech else "\t") for line in lines if line.strip()]
    if ljspeech:
        return [(path.parent / "wavs" / f"{row[0]}.wav", row[-1]) for row in rows]
    header = [name.strip().lower() for name in rows[0]] if rows else []
    names = [name for name in ("sentence", "text", "transcript") if name in header]
    file, text = 0, 1  # columns
    if "path" in header and names:
        rows, file, text = rows[1:], header.index("path"), header.index(names[0])
    items = []
    for row in rows:
        if len(row) <= max(file, text):
            raise UserError(f"{path}: a line without path and text: {' '.join(row)!r}")
        sound, clip = path.parent / row[file].strip(), path.parent / "clips" / row[file].strip()
        items.append((clip if clip.is_file() else sound, row[text]))
    return items


def download(folder):
    """LibriSpeech, by torchaudio, which checks its digests; moved to its place when all parts are there."""
    target, partial = folder / "LibriSpeech", folder / "download"
    while RANK and not target.is_dir():  # the other processes wait for rank 0
        time.sleep(1)
    if not target.is_dir():
        shutil.rmtree(partial / "LibriSpeech", ignore_errors=True)  # unpacked by a run that was stopped
        partial.mkdir(parents=True, exist_ok=True)
        for part in PARTS.values():
            say(f"downloading LibriSpeech's {part} into {partial}")
            torchaudio.datasets.LIBRISPEECH(partial, part, download=True)
        os.replace(partial / "LibriSpeech", target)


def extract(items, name):
    """(features, texts) of utterances: lists of (T, F) float16 and of strings. What cannot be used is skipped
    and counted by reason. UserError if that is more than 5 %."""
    features, texts, unusable = [], [], {}
    for item, text in items:
        try:
            text = clean(text)
            features.append(read_features(item).half())
            texts.append(text)
        except Exception as e:  # a damaged file can raise nearly anything
            reason = str(getattr(e, "error_string", e))  # soundfile's, which does not name the file
            unusable.setdefault(reason, []).append(item)
    if unusable:
        count = len(items) - len(texts)
        reasons = [f"{len(files)}: {reason} (first {files[0]})" for reason, files in unusable.items()]
        line = f"{name}: {count} of {len(items)} utterances are unusable, {', '.join(reasons[:5])}"
        if count > 0.05 * len(items):
            raise UserError(f"{line}; the limit is 5 %")
        say(f"note: {line}; skipped")
    return features, texts


def prepare(cfg, split, items, folder):
    """Utterances of (file, text) pairs. Features are made once, by rank 0, and kept in the folder `cache` of
    the data, in a file whose name depends on all that goes in."""
    if cfg.data == "demo":
        return Utterances(*extract(items, split))
    inputs = [(str(path), path.exists() and path.stat().st_mtime_ns, text) for path, text in items]
    home = folder if folder.is_dir() else folder.parent
    cached = home / "cache" / f"{split}-{seed_for('log-mel 5', inputs):x}.pt"  # raise 5 when features change
    while RANK and not cached.exists():
        time.sleep(1)
    if not cached.exists():
        say(f"{cfg.data}: {split}: calculating the features of {len(items):,} utterances, kept in {cached}")
        result, part = extract(items, f"{cfg.data}: {split}"), cached.with_suffix(f".{os.getpid()}.part")
        cached.parent.mkdir(exist_ok=True)
        try:
            torch.save(result, part)
        except RuntimeError as e:  # a full disk
            part.unlink(missing_ok=True)
            raise UserError(f"{cached}: cannot be written ({e})") from None
        os.replace(part, cached)
    return Utterances(*torch.load(cached, weights_only=True, mmap=True))


class Utterances:
    """Features of utterances (list of (T, F)), their lengths in frames, and their texts."""

    def __init__(self, features, texts):
        self.features, self.texts, self.lengths = features, texts, np.array([len(x) for x in features])

    def cuts(self, budget):
        """Slices of the utterances sorted by length, each with at most `budget` frames, padding included."""
        starts = [0]
        for i, length in enumerate(np.sort(self.lengths)):
            if (i + 1 - starts[-1]) * length > budget and i > starts[-1]:
                starts.append(i)
        return list(map(slice, starts, [*starts[1:], None]))

    def batch(self, chosen, device, speeds=None):
        """Utterances given by number, at these speeds, by linear interpolation between their frames: features
        (B, T, F), lengths (B,) on the CPU, targets (B, U), all padded with 0."""
        x = [self.features[i].float() for i in chosen]
        if speeds is not None:
            sizes = [round(len(part) / speed) for part, speed in zip(x, speeds)]
            x = [F.interpolate(part.T[None], n, mode="linear")[0].T for part, n in zip(x, sizes)]
        lengths = torch.tensor([len(part) for part in x])
        targets = [torch.tensor([*map(VOCABULARY.index, self.texts[i]), EOS]) for i in chosen]
        x, targets = (nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (x, targets))
        return x.to(device, non_blocking=True), lengths, targets.to(device, non_blocking=True)


def load_data(cfg, n_features=0):
    """{split: Utterances}; for a trained model, which takes n_features per frame, only what is tested."""
    folder = Path("data", cfg.data) if cfg.data in AUTO else Path(cfg.data)
    found = find_utterances(cfg, folder)
    tested = "test" if "test" in found else "val"
    needed = [tested] if n_features else ["train", "val", tested]
    for split in needed:
        if not found.get(split):
            raise UserError(f"{folder}: no utterances for {split}; data/README.md says what goes where")
    data = {split: prepare(cfg, split, items, folder) for split, items in found.items() if split in needed}
    widths = {x.shape[1] for part in data.values() for x in part.features}
    if n_features:
        widths.add(n_features)
    if len(widths) > 1:
        raise UserError(f"{folder}: {sorted(widths)} features per frame; all files and the model must agree")
    return data


def spec_augment(x, strength):
    """SpecAugment: two stripes of features and two of frames of each sound become 0, the mean: (B, T, F)."""
    for _ in range(2):
        x = mask_along_axis_iid(x, int(strength * 0.3 * x.shape[2]), 0.0, axis=2)
        x = mask_along_axis_iid(x, int(strength * 40), 0.0, axis=1, p=0.2)
    return x


# METRICS ----------------------------------------------------------------------------------------------------
def edit_distance(a, b):
    """Levenshtein distance of two sequences: the least number of insertions, deletions and substitutions."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def wer(references, hypotheses):
    """Word error rate: errors over words of the corpus, a fraction, from lists of strings, as jiwer counts.
    ValueError if the lists differ in length or the references are empty."""
    return error_rate([r.split() for r in references], [h.split() for h in hypotheses])


def cer(references, hypotheses):
    """Character error rate, likewise; spaces at the ends do not count."""
    return error_rate([r.strip() for r in references], [h.strip() for h in hypotheses])


def error_rate(references, hypotheses):
    if len(references) != len(hypotheses) or not any(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    return sum(map(edit_distance, references, hypotheses)) / sum(map(len, references))


# EVALUATE, PREDICT ------------------------------------------------------------------------------------------
@torch.compiler.set_stance("force_eager")  # other sizes than in training would be compiled anew
def decode(model, cfg, data, device, beam_size):
    """The texts of all utterances; each process does its share, and all get the result."""
    model.eval()
    order = np.argsort(data.lengths, kind="stable")
    ids = torch.zeros(len(order), 1 + max(data.lengths) // model.listener.reduction, dtype=torch.long)
    for cut in data.cuts(30000)[RANK::WORLD]:
        x, lengths, _ = data.batch(order[cut], device)
        rows = beam_search(model, x, lengths, beam_size, CTC_IN_SEARCH if cfg.ctc_weight else 0.0)
        for i, row in zip(order[cut], rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    rows = all_sum(ids.to(device)).tolist()
    return ["".join(VOCABULARY[i] for i in row if i != PAD).strip() for row in rows]


def evaluate(model, cfg, data, device, beam_size):
    """(error rates in percent, texts). No true character is fed to the speller."""
    texts = decode(model, cfg, data, device, beam_size)
    return {"cer": 100 * cer(data.texts, texts), "wer": 100 * wer(data.texts, texts)}, texts


def score(model, cfg, data, folder, device):
    """The figures of the test set, or where there is none of the validation set; writes the transcripts."""
    part = data.get("test", data.get("val"))
    figures, texts = evaluate(model, cfg, part, device, cfg.beam_size)
    if RANK == 0:
        lines = ["reference\thypothesis", *map("\t".join, zip(part.texts, texts))]
        (folder / "hypotheses.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return figures | {"n": len(texts)}


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def draw(model, data, path, device):
    """A picture of the attention to one utterance: time against characters."""
    median = np.argsort(data.lengths)[len(data.lengths) // 2]
    x, lengths, targets = data.batch([median], device)
    _, attention, _ = model.eval()(x, lengths, targets)
    characters = [*data.texts[median].replace(" ", "_"), "end"]
    figure = Figure((9, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="time (s)", ylabel="character")
    axes.imshow(attention[0].cpu().numpy(), aspect="auto", cmap="Blues",
                extent=(0, x.shape[1] / 100, len(characters) - 0.5, -0.5))
    axes.set_yticks(range(len(characters)), characters, fontsize=7)
    figure.savefig(path, dpi=90)


def build(cfg, n_features, device):
    shape = cfg.hidden, cfg.layers, cfg.speller, cfg.dropout, cfg.stack
    return LAS(n_features, len(VOCABULARY), *shape).to(device)


def predict(mode, inputs, flags):
    """The modes eval and transcribe."""
    with contextlib.redirect_stdout(sys.stderr if mode == "transcribe" else sys.stdout):
        cfg, ckpt, device, folder = open_checkpoint(flags)
    n_features = ckpt["n_features"]
    model = build(cfg, n_features, device)
    model.load_state_dict(ckpt["model"])
    if mode == "eval":
        figures = score(model, cfg, load_data(cfg, n_features), folder, device)
        return say(f"{show(figures, digits=6)}\nwritten: {folder}/hypotheses.tsv")
    bad, lines = [], []
    for name in inputs:
        try:
            x = read_features(Path(name))
            if x.shape[1] != n_features:
                raise ValueError(f"{x.shape[1]} features per frame; the model takes {n_features}")
        except Exception as e:  # a damaged file can raise nearly anything; the others are done all the same
            bad.append(f"{name} ({e})")
            continue
        parts = x.tensor_split(math.ceil(len(x) / ckpt["longest"]))  # of equal length
        data = Utterances(parts, [""] * len(parts))
        text = " ".join(filter(None, decode(model, cfg, data, device, cfg.beam_size)))
        say(f"{name}: {text}" if len(inputs) > 1 else text)
        lines.append(f"{name}\t{text}\n")
    if cfg.save and RANK == 0:
        (folder / "transcripts.tsv").write_text("".join(lines), encoding="utf-8")
    if bad:
        raise UserError(f"{', '.join(bad[:5])}: cannot be read; give sound files, or features as .npy")


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
    train, n_features = data["train"], data["train"].features[0].shape[1]
    cuts = train.cuts(cfg.batch_size)
    if train.lengths.sum() * n_features < 4e9:  # up to 8 GB fit on a GPU
        train.features = [x.to(device) for x in train.features]
    schedule, count = len(cuts) * cfg.epochs, round(train.lengths.sum() / len(cuts))
    total = min(cfg.max_steps or schedule, schedule)
    counts = ", ".join(f"{len(part.texts):,} {split}" for split, part in data.items())
    say(f"utterances: {counts}; {n_features} features; steps: {total:,} of {count:,} frames")

    torch.manual_seed(cfg.seed)
    raw = build(cfg, n_features, device)
    if cfg.init and not ckpt:
        load_weights(raw, load_checkpoint(cfg.init)["model"])
    optimizer = torch.optim.AdamW(raw.parameters(), cfg.lr, weight_decay=1e-4, fused=True)
    if ckpt:
        raw.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
    if cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda" and sys.platform == "linux"):
        say("compiling in the first step, which takes a minute or two")
        torch._dynamo.config.optimize_ddp = False  # DDP would split the graph, compiled anew for each length
        raw.step = torch.compile(raw.step, dynamic=True)  # the loop over it has another length in each batch
    model = nn.parallel.DistributedDataParallel(raw) if WORLD > 1 else raw

    @functools.lru_cache(1)
    def order(epoch):
        """(order of the utterances, order of the batches). Utterances are sorted by their lengths times some
        noise, so that epochs differ; the first one goes from short to long, from which CTC learns sooner."""
        rng = np.random.default_rng(seed_for(cfg.seed, epoch))
        utterances = np.argsort(train.lengths * rng.uniform(1, 1.05, len(train.lengths)))
        return utterances, rng.permutation(len(cuts)) if epoch else range(len(cuts))

    def fetch(step):
        """This rank's share of the batch of a step, which counts from 1: features (B, T, F), lengths (B,),
        targets (B, U), numbers of characters (B,), and WORLD / characters of the whole batch: as DDP takes
        the mean over ranks, summed losses times this weight are the mean over all characters."""
        epoch, place = divmod(step - 1, len(cuts))
        utterances, batches = order(epoch)
        group = utterances[cuts[batches[place]]]
        chosen, weight = group[RANK::WORLD], WORLD / sum(len(train.texts[i]) + 1 for i in group)
        if not len(chosen):  # fewer utterances than processes: this one takes part with a weight of 0
            chosen, weight = group[:1], 0.0
        torch.manual_seed(seed_for(cfg.seed, step, RANK))  # of dropout, SpecAugment and speeds
        speeds = torch.empty(len(chosen)).uniform_(1 - cfg.speed, 1 + cfg.speed).tolist()
        sizes = torch.tensor([len(train.texts[i]) for i in chosen])
        return *train.batch(chosen, device, speeds), sizes, weight

    def update(step, batch):
        """One optimizer step; returns the parts of the loss."""
        x, lengths, targets, sizes, weight = batch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, schedule)
        raw.train()
        x = spec_augment(x, cfg.specaugment)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            logits, _, ctc_logits = model(x, lengths, targets, 1 - (1 - cfg.teacher) * step / schedule)
        spelling = weight * F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=PAD,
                                            reduction="sum", label_smoothing=0.1)
        log_p = ctc_logits.float().log_softmax(-1).transpose(0, 1)  # (T', B, V)
        frames = lengths // raw.listener.reduction
        ctc = weight * F.ctc_loss(log_p, targets, frames, sizes, PAD, "sum", zero_infinity=True)
        loss = (1 - cfg.ctc_weight) * spelling + cfg.ctc_weight * ctc  # spelling: equation 12, smoothed
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss, "spelling": spelling, "ctc": ctc}

    run.start(total)
    for step in range(run.step + 1, total + 1):
        losses = update(step, fetch(step))
        check, save = run.step_done(losses, count, learning_rate(cfg, step, schedule))
        if check:
            figures, _ = evaluate(raw, cfg, data["val"], device, 1)
            run.write("val", figures)
            if run.best is None or figures["cer"] < run.best:
                run.best = figures["cer"]
                longest = int(train.lengths.max())  # frames of the longest utterance that it was trained on
                run.save("best.pt", model=raw.state_dict(), n_features=n_features, longest=longest)
        if save:
            run.save("last.pt", model=raw.state_dict(), optimizer=optimizer.state_dict())
        if run.stop:
            return

    raw.load_state_dict(load_checkpoint(run.folder / "best.pt")["model"])
    figures = score(raw, cfg, data, run.folder, device)
    if RANK == 0:
        draw(raw, data["val"], run.folder / "attention.png", device)
    run.finish(figures)


def learning_rate(cfg, step, schedule):
    """The lower of a linear warm-up (at most a third of the schedule) and half a cosine down to zero."""
    warmup = max(1, min(cfg.warmup, schedule // 3))
    return cfg.lr * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / schedule))


if __name__ == "__main__":
    main()
