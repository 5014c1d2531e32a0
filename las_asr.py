"""Listen, Attend and Spell (LAS): speech recognition, from sound files to text.

    python las_asr.py --data demo                            # a generated voice: no download, no GPU
    python las_asr.py --data librispeech                     # 100 hours; 7 GB downloaded on first use
    python las_asr.py --data path/to/train.tsv               # your own: lines of path, tab, transcript
    torchrun --nproc_per_node=8 las_asr.py --data librispeech
    python las_asr.py --data librispeech --resume            # continue a run that was stopped

    python las_asr.py eval                                   # test the newest out/las_asr-*/best.pt
    python las_asr.py transcribe a.wav b.flac c.mp3          # any length, sample rate and number of channels

Measured on one thread of a CPU (AMD EPYC; the demo in bfloat16), other work beside it; one run each, seed 0:

    --data demo     0.68 % character errors (CER) in unseen sentences by unseen speakers; 1.8 minutes
    --data hw4p2    CMU AN4, 50 minutes of training speech: 5.87 % CER, 10.32 % word errors; 62 minutes
    --data speech   6 hours, natives and learners: 39.26 % CER, 71.72 % word errors; 142 minutes

The preset for LibriSpeech's 100 hours has not been run to its end.

Paper: Chan et al., "Listen, Attend and Spell", 2016, arXiv 1508.01211. Attention that knows where it was:
Chorowski et al., 2015, arXiv 1506.07503, and Battenberg et al., 2020, arXiv 1910.10288; the auxiliary CTC
loss: Kim et al., "Joint CTC-attention", 2017, arXiv 1609.06773; SpecAugment: Park et al., 2019, arXiv
1904.08779; speed perturbation: Ko et al., 2015. Data: Panayotov et al., "LibriSpeech", 2015 (CC BY 4.0).
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
import unicodedata
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
    data: str = "auto"  # demo, librispeech, speech, hw4p2, folder or TSV; auto: one in data/, or demo
    out: str = ""  # folder of the run (default: out/SCRIPT-DATA)
    save: str = ""  # folder for predictions (default: the folder of the checkpoint)
    ckpt: str = ""  # checkpoint to test or predict with (default: the newest best.pt in out/SCRIPT-*)
    init: str = ""  # checkpoint whose weights a new run starts from
    resume: bool = False  # continue the run in --out from its last.pt, if there is one
    device: str = "auto"  # auto|cpu|cuda|mps: where to run
    dtype: str = "auto"  # auto|float32|bfloat16: precision of training (autocast); metrics are always float32
    compile: str = "auto"  # auto|on|off: torch.compile; auto: on for CUDA under Linux
    seed: int = 0  # seed of the initial weights, the order of the data, and the noise
    batch_size: int = 6000  # frames per step, padding included, over all processes
    lr: float = 1e-3  # peak learning rate
    max_steps: int = 0  # end the training after this many steps; 0: after all epochs
    max_minutes: float = 0.0  # save and stop after this many minutes; 0: no limit
    eval_every: int = 500  # steps between validations
    save_every: int = 500  # steps between saves of last.pt; each validation saves it, too
    log_every: int = 50  # steps between log lines
    # the task
    hidden: int = 256  # units of the listener, per direction
    stack: int = 2  # neighbouring frames joined before the first layer
    layers: int = 1  # 0 to 6, pyramidal layers; each halves the number of frames
    speller: int = 256  # units of the speller
    dropout: float = 0.3  # 0 to 0.99, dropout between the listener's layers and on the speller's input
    ctc_weight: float = 0.3  # 0 to 1, weight of the CTC loss on the listener; 0: none in the search, either
    teacher: float = 0.9  # 0 to 1, scheduled sampling: final share of true characters fed to the speller
    specaugment: float = 1.0  # 0 to 3, strength of SpecAugment; 0: none
    speeds: str = "0.9 1.0 1.1"  # speed perturbation: the speeds at which recordings are heard
    epochs: int = 20  # passes over the training set
    warmup: int = 500  # 0 to 1000000, steps in which the learning rate rises
    beam_size: int = 4  # hypotheses kept in beam search
    json: bool = False  # transcribe: print one JSON object per file, with its score


PRESETS = {
    "demo": {"epochs": 10, "hidden": 128, "speller": 128, "speeds": "1.0", "dropout": 0.1, "batch_size": 4000,
             "warmup": 100, "lr": 3e-3, "eval_every": 100, "log_every": 20},
    "speech": {"epochs": 4, "batch_size": 4000, "lr": 2e-3, "warmup": 200, "dropout": 0.1, "specaugment": 0.5,
               "ctc_weight": 0.5, "eval_every": 1000},
    "librispeech": {"hidden": 512, "stack": 1, "layers": 2, "speller": 512, "batch_size": 96000, "epochs": 40,
                    "warmup": 2000},
    "hw4p2": {"epochs": 24, "batch_size": 4000}}
MODES = {"train": ("", "train, then test (default)"),
         "eval": ("", "test a checkpoint; the transcripts are written as TSV"),
         "transcribe": ("FILE...", "print the text of each sound file"),
         "bench": ("", "time the training step")}
UNIT = "frames"  # what a batch is counted in
SHAPE = {"hidden", "stack", "layers", "speller"}  # what a checkpoint alone decides
CPU_BF16 = True  # measured: 1.3 times as fast as float32 on a CPU that multiplies bfloat16
PAD, BOS, EOS = 0, 1, 2
REACH = 16  # frames of the listener, to each side, within which the speller knows where it has listened
ALPHABET = " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# MODEL ------------------------------------------------------------------------------------------------------
def reverse(x, lengths):
    """Each sequence of (B, T, F) turned round within its own length (B,); what comes after it stays."""
    at = torch.arange(x.shape[1], device=x.device)
    back = lengths[:, None] - 1 - at
    return x.gather(1, torch.where(back < 0, at, back)[:, :, None].expand_as(x))


class WithWeight(torch.autograd.Function):
    """Takes the gradient of a weight out of a loop over time. Each y_t = added_t + x_t w^T costs a product
    and an addition of the size of w in the backward pass; here the loop uses w detached and appends x_t to
    the list `xs`, and one product over all t makes the gradient. That holds if added_t goes into y_t and
    nowhere else: what arrives here as its gradient is then that of y_t.

    added (T, B, N), w (N, K) or one for each sound (B, N, K), x_t (B, K) -> added.
    """

    @staticmethod
    def forward(ctx, added, w, xs):
        ctx.xs, ctx.shared = xs, w.dim() == 2
        return added.view_as(added)

    @staticmethod
    def backward(ctx, grad):
        x, ctx.xs = torch.stack(ctx.xs), None  # (T, B, K), and none of them is kept
        y = grad.to(x.dtype)
        if ctx.shared:
            return grad, y.flatten(0, 1).mT @ x.flatten(0, 1), None
        return grad, y.permute(1, 2, 0) @ x.transpose(0, 1), None


def lstm_cell(gates, c):
    """The pointwise part of an LSTM: (B, 4 H), (B, H) -> h in the precision of the gates, c in float32."""
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh().to(gates.dtype), c


def unrolled(lstm, x):
    """What `lstm` makes of (B, T, F), step by step: (B, T, H)."""
    gates = F.linear(x.transpose(0, 1), lstm.weight_ih_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0)
    w, xs, hs = lstm.weight_hh_l0.to(gates.dtype), [], []
    h = gates.new_zeros(len(x), lstm.hidden_size)
    c = h.float()
    for row in WithWeight.apply(gates, w, xs).unbind():
        xs.append(h.detach())
        h, c = lstm_cell(torch.addmm(row, h, w.detach().T), c)
        hs.append(h)
    return torch.stack(hs, 1)


class BLSTM(nn.Module):
    """A bidirectional LSTM as two of one direction; the second hears each sequence reversed in its length.

    That equals packing the sequences, at a sixth of its time or less on a CPU, without lengths on the host.
    """

    def __init__(self, n_in, hidden):
        super().__init__()
        self.forth, self.back = (nn.LSTM(n_in, hidden, batch_first=True) for _ in range(2))

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> (B, T, 2 hidden), zero behind each sequence's end."""
        turned, hidden = reverse(x, lengths), self.forth.hidden_size
        wide = hidden >= 512 and x.shape[2] > 2 * hidden
        if x.is_cuda:  # where autocast turns an LSTM into float16, whatever it is told, and gradients vanish
            with torch.autocast("cuda", enabled=False):
                forth, back = self.forth(x.float())[0], self.back(turned.float())[0]
        elif wide and len(x) >= 8 and self.training and torch.is_autocast_enabled("cpu"):
            # oneDNN's backward pass in bfloat16 would add to a wide input's large gradient at every frame
            forth, back = unrolled(self.forth, x), unrolled(self.back, turned)
        else:
            forth, back = self.forth(x)[0], self.back(turned)[0]
        y = torch.cat([forth, reverse(back, lengths)], -1)
        return y * (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, :, None]


def locked_dropout(x, p, training):
    """Dropout with one mask for all steps of a sequence (Gal and Ghahramani, 2016): (B, T, F) -> the same."""
    return x * F.dropout(torch.ones_like(x[:, :1]), p, training)


def join_frames(x, lengths, n):
    """(B, T, F), (B,) -> (B, T // n, n F), (B,): each n neighbouring frames become one, odd last ones go."""
    return x[:, : x.shape[1] // n * n].unflatten(1, (-1, n)).flatten(2), lengths // n


class Listener(nn.Module):
    """A BLSTM, then pyramidal ones, each on pairs of neighbouring frames (section 3.1). With stack = 2 the
    first one hears pairs too: 20 ms of sound a step, at half the cost."""

    def __init__(self, n_features, hidden, layers, dropout, stack=1):
        super().__init__()
        self.base = BLSTM(stack * n_features, hidden)
        self.pyramid = nn.ModuleList(BLSTM(4 * hidden, hidden) for _ in range(layers))
        self.dropout, self.stack = dropout, stack

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> (B, T', 2 hidden), (B,) with T' = T // stack // 2^layers, but at least 1."""
        x = F.pad(x, (0, 0, 0, max(0, (self.stack << len(self.pyramid)) - x.shape[1])))
        x, lengths = join_frames(x, lengths, self.stack)
        x = self.base(x, lengths)
        for layer in self.pyramid:
            x, lengths = join_frames(locked_dropout(x, self.dropout, self.training), lengths, 2)
            x = layer(x, lengths)
        return locked_dropout(x, self.dropout, self.training), lengths


def location(coverage, moves):
    """The energies' location term: the coverage, what was listened to so far, (N, T'), correlated with a
    filter for each hypothesis, moves (N, 2 REACH + 1) -> (N, T'). moves[:, REACH - d] is what a frame gains
    if the one d frames before it is covered. All before the sound counts as covered, nothing behind it."""
    near = F.pad(F.pad(coverage, (REACH, 0), value=1.0), (0, REACH)).unfold(1, 2 * REACH + 1, 1)
    return (near @ moves[:, :, None])[:, :, 0]


def cover(coverage, attention):
    """Attentions summed up, to 1 at most. No gradient goes back through them: it came in bursts of ten times
    the usual norm, which clipping answers by learning less, of all weights."""
    return (coverage + attention.detach()).clamp(max=1)


class LAS(nn.Module):
    """Listener, attender and speller: the logits of each character, given the sound and those before.

    The speller looks for what it wants to hear, by content, and knows where it has listened: the location
    term of Chorowski et al., 2015, but of all attentions so far, added to the energies as it is, with a
    filter that the speller's state makes at each character (Battenberg et al., 2020). By content alone (the
    paper's equation 9) it finds a letter wherever it sounds. Nor are these the paper's: phi and psi are one
    linear layer each, the context sums a third one's values, energies are divided by the root of their width,
    and the character fed back is the likeliest one, not a sample.
    Targets (B, U) end in EOS, filled up with PAD, and carry no BOS: the shift is inside. Of a sound of fewer
    than stack * 2^layers frames one frame of silence is heard.
    """

    def __init__(self, n_features, vocab_size, hidden=256, layers=1, speller=256, dropout=0.3, stack=1):
        super().__init__()
        self.listener, self.dropout = Listener(n_features, hidden, layers, dropout, stack), dropout
        self.key, self.value = nn.Linear(2 * hidden, speller), nn.Linear(2 * hidden, speller)
        self.query = nn.Linear(speller, speller)
        self.moves = nn.Linear(speller, 2 * REACH + 1)
        self.embedding = nn.Embedding(vocab_size, speller)
        self.cells = nn.ModuleList([nn.LSTMCell(2 * speller, speller), nn.LSTMCell(speller, speller)])
        self.out = nn.Sequential(nn.Linear(2 * speller, speller), nn.Tanh(), nn.Linear(speller, vocab_size))
        self.ctc = nn.Linear(2 * hidden, vocab_size)

    def listen(self, features, lengths):
        """(B, T, F), (B,) -> memory, what the speller attends to; and the CTC logits. A query is W h + b, so
        that its product with a key k is h (W^T k) + b k, and W^T k and b k are made here once: keys and
        values (B, T', D), and what is added to the energies, -inf behind the end (B, T')."""
        x, lengths = self.listener(features, lengths)
        mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None].clamp(min=1)
        key = self.key(x) / math.sqrt(self.query.in_features)
        bias = (key @ self.query.bias).masked_fill(~mask, -math.inf)
        return (key @ self.query.weight, self.value(x), bias), self.ctc(x)

    def start(self, memory, k=1):
        """The speller's state before the first character, for k hypotheses a sound: h and c of two cells, the
        context, and the coverage, all zero."""
        _, values, bias = memory
        h1, c1, h2, c2, context = values.new_zeros(5, k * len(values), values.shape[2]).unbind()
        return [h1, c1.float(), h2, c2.float(), context, values.new_zeros(k * len(values), bias.shape[1])]

    def step(self, tokens, state, memory):
        """One character (N,) -> logits (N, V) and the next state, whose last part is the coverage (N, T')
        (equations 6 to 11). N may be a multiple of B: hypotheses of one sound follow each other."""
        h1, c1, h2, c2, context, coverage = state
        keys, values, bias = memory
        h1, c1 = self.cells[0](torch.cat([self.embedding(tokens), context], -1), (h1, c1))
        h2, c2 = self.cells[1](h1, (h2, c2))
        energies = h2.unflatten(0, (len(keys), -1)) @ keys.mT + bias[:, None]  # (B, N/B, T')
        attention = (energies.flatten(0, 1) + location(coverage, self.moves(h2))).softmax(-1)
        context = (attention.unflatten(0, (len(keys), -1)) @ values).flatten(0, 1)
        return self.out(torch.cat([h2, context], -1)), [h1, c1, h2, c2, context, cover(coverage, attention)]

    def taught_step(self, added, state, weights):
        """The same in training, where the out layer and the gradients of the weights wait for all characters,
        as five products y = added + x w^T: first cell, second cell, moves, energies (w: the keys), context
        (w: the values transposed). The `weights` are detached; -> the next state, and the five x, from which
        `WithWeight` makes the weights' gradients after the loop; the last of them is the attention."""
        w1, w2, w3, keys, values = weights
        h1, c1, h2, c2, context, coverage = state
        x1 = torch.cat([F.dropout(context, self.dropout, self.training), h1], -1)
        h1, c1 = lstm_cell(torch.addmm(added[0], x1, w1.T), c1)
        x2 = torch.cat([h1, h2], -1)
        h2, c2 = lstm_cell(torch.addmm(added[1], x2, w2.T), c2)
        bias = added[3] + location(coverage, torch.addmm(added[2], h2, w3.T))
        attention = torch.baddbmm(bias[:, None], h2[:, None], keys.mT)[:, 0].softmax(-1).to(h2.dtype)
        context = torch.baddbmm(added[4][:, None], attention[:, None], values.mT)[:, 0]
        return [h1, c1, h2, c2, context, cover(coverage, attention)], [x1, x2, h2, h2, attention]

    def forward(self, features, lengths, targets, teacher=1.0):
        """(B, T, F), (B,), (B, U) -> logits (B, U, V), attention (B, U, T'), CTC logits (B, T', V). In
        training, a share 1 - teacher of the characters fed are those that the model finds likeliest."""
        memory, ctc_logits = self.listen(features, lengths)
        keys, values, bias = memory
        one, two = self.cells
        w_character, w_context = one.weight_ih.chunk(2, 1)

        def speak(tokens):
            x = F.dropout(self.embedding(tokens), self.dropout, self.training)
            return F.linear(x, w_character).to(keys.dtype)

        fed = F.pad(targets, (1, -1), value=BOS).T  # (U, B)
        cells = torch.cat([w_context, one.weight_hh], 1), torch.cat([two.weight_ih, two.weight_hh], 1)
        weights = [w.to(keys.dtype) for w in (*cells, self.moves.weight, keys, values.mT)]
        xs = [[] for _ in weights]
        added = [one.bias_ih + one.bias_hh, two.bias_ih + two.bias_hh, self.moves.bias, bias]
        added.append(values.new_zeros(()))  # nothing, but its product gives the gradient of the values
        added = [a.to(keys.dtype).expand(*fed.shape, w.shape[-2]) for a, w in zip(added, weights)]
        added = zip(*(WithWeight.apply(*parts).unbind() for parts in zip(added, weights, xs)))
        weights = [w.detach() for w in weights]

        own = torch.rand(fed.shape, device=fed.device) >= (teacher if self.training else 1)
        own[0] = False
        state, heard = self.start(memory), []
        for guesses, any_own, said, (first, *others) in zip(own, own.any(1).tolist(), speak(fed), added):
            if any_own:
                guess = self.out(heard[-1].detach()).argmax(-1)
                said = torch.where(guesses[:, None], speak(guess), said)
            state, multiplied = self.taught_step((first + said, *others), state, weights)
            heard.append(torch.cat([state[2], state[4]], -1))
            for saved, x in zip(xs, multiplied):
                saved.append(x.detach())
        return self.out(torch.stack(heard, 1)), torch.stack(xs[-1], 1), ctc_logits

    def compile(self, **how):
        """Compiles the speller's step alone: unrolled, it would be compiled anew for each length, and the
        listener's fused LSTMs gain nothing by it."""
        self.taught_step = torch.compile(self.taught_step, dynamic=True, **how)
        self.step = torch.compile(self.step, dynamic=True, **how)


@torch.no_grad()
def greedy_decode(model, features, lengths, ctc_weight=0.5):
    """The likeliest character each time: (B, T, F), (B,) -> B lists of ids without EOS; see `beam_search`."""
    return beam_search(model, features, lengths, 1, ctc_weight)[0]


class CTCPrefixes:
    """What the CTC head thinks of K hypotheses a sound: log p of all texts that begin so (Watanabe et al.,
    "Hybrid CTC/Attention Architecture", 2017, section III-B). It turned 14.1 % CER on AN4 into 5.9 %.

    `letter` and `blank` (B, K, T' + 1) hold, after each number of frames, log p of having said the hypothesis
    and ended in a character or a blank (PAD). With c behind it (not in logarithms):
        letter_t = p_t(c) (letter_{t-1} + before_{t-1}),  blank_t = p_t(PAD) (letter_{t-1} + blank_{t-1}),
    before being letter + blank of what was there, its blank alone if it ended in c. Divided by the product of
    all p so far, each of them is a cumulative sum.
    """

    def __init__(self, logits, mask, k):
        real = logits.float().log_softmax(-1).clamp(min=-30)
        silence = torch.full_like(real[0, 0], -30.0)
        silence[PAD] = 0.0
        self.log_p = torch.where(mask[:, :, None], real, silence)[:, None]  # (B, 1, T', V)
        self.blanks = self.log_p[..., PAD].cumsum(-1)  # (B, 1, T')
        self.blank = F.pad(self.blanks, (1, 0)).expand(-1, k, -1)  # (B, K, T' + 1)
        self.letter = torch.full_like(self.blank, -1e5)
        self.last = torch.full_like(self.blank[..., 0], BOS, dtype=torch.long)  # (B, K)

    def scores(self):
        """log p of each hypothesis with each character, or EOS, behind it: (B, K, V)."""
        said = torch.logaddexp(self.letter, self.blank)
        scores = torch.logsumexp(said[..., :-1, None] + self.log_p, 2)
        again = torch.logsumexp(self.blank[..., :-1] + self.of(self.last), 2)  # needs a blank between
        scores = scores.scatter(2, self.last[..., None], again[..., None])
        scores[..., EOS] = said[..., -1]
        return scores

    def of(self, tokens):
        """log p of a token in each frame: (B, K) -> (B, K, T')."""
        at = tokens[:, :, None, None].expand(-1, -1, self.log_p.shape[2], 1)
        return self.log_p.expand(-1, tokens.shape[1], -1, -1).gather(3, at)[..., 0]

    def extend(self, origin, tokens):
        """Goes on with `tokens` behind the hypotheses `origin`: (B, K) each."""
        at = origin[:, :, None].expand_as(self.letter)
        letter, blank, last = self.letter.gather(1, at), self.blank.gather(1, at), self.last.gather(1, origin)
        before = torch.where((tokens == last)[..., None], blank, torch.logaddexp(letter, blank))[..., :-1]
        log_p = self.of(tokens)
        sums = log_p.cumsum(-1)
        self.letter = F.pad(sums + torch.logcumsumexp(before - sums + log_p, -1), (1, 0), value=-1e5)
        before = self.letter[..., :-1] - self.blanks + self.log_p[..., PAD]
        self.blank = F.pad(self.blanks + torch.logcumsumexp(before, -1), (1, 0), value=-1e5)
        self.last = tokens


@torch.no_grad()
def beam_search(model, features, lengths, beam_size=4, ctc_weight=0.5):
    """The best of beam_size hypotheses by log p per character, that of the CTC head weighed with ctc_weight:
    (B, T, F), (B,) -> B lists of ids without EOS, and their scores. A sound is done when an ended hypothesis
    is as good as the best that goes on. None has more characters than the listener has frames, which also
    ends endless repetition."""
    memory, ctc_logits = model.listen(features, lengths)
    b, k, device, steps = len(features), beam_size, features.device, memory[2].shape[1] + 1
    state, tokens = model.start(memory, k), torch.full((b * k,), BOS, device=device)
    said = torch.full((b, k), -math.inf, device=device)
    said[:, 0] = 0.0
    mask = memory[2].isfinite()  # (B, T'): what is heard, not padding
    ctc = CTCPrefixes(ctc_logits, mask, k) if ctc_weight else None
    alive = torch.full((b, k, steps), PAD, device=device)
    done, done_scores = alive.clone(), torch.full((b, k), -math.inf, device=device)
    first = torch.arange(b, device=device)[:, None] * k
    over = first[:, 0] < 0  # (B,): done, so that batch mates that are not change nothing
    limit = mask.sum(1)[:, None, None]  # (B, 1, 1)
    for t in range(steps):
        logits, state = model.step(tokens, state, memory)
        logits[:, [PAD, BOS]] = -math.inf
        only = (t >= limit) & (torch.arange(logits.shape[1], device=device) != EOS)  # (B, 1, V)
        log_p = logits.float().log_softmax(-1).unflatten(0, (b, k)).masked_fill(only, -math.inf)
        said = said[:, :, None] + log_p  # (B, K, V), by the speller
        scores = (1 - ctc_weight) * said + ctc_weight * ctc.scores() if ctc else said
        scores = scores.masked_fill(said == -math.inf, -math.inf)  # a weight of 1 makes them nan
        best, place = scores.flatten(1).topk(2 * k)  # 2 K, so that K go on even if K end
        origin, token = place // logits.shape[1], place % logits.shape[1]
        rows = alive.gather(1, origin[:, :, None].expand(-1, -1, steps))
        rows[:, :, t] = token
        ended = token == EOS
        counts = ended[:, :k] & ~over[:, None]  # only an end among the best K counts
        final = (best[:, :k] / (t + 1)).masked_fill(~counts, -math.inf)
        done_scores, which = torch.cat([done_scores, final], 1).topk(k)
        done = torch.cat([done, rows[:, :k]], 1).gather(1, which[:, :, None].expand(-1, -1, steps))
        going, which = best.masked_fill(ended, -math.inf).topk(k)
        if (over := over | (done_scores[:, 0] >= going[:, 0] / (t + 1))).all():
            break
        alive = rows.gather(1, which[:, :, None].expand(-1, -1, steps))
        origin, token = origin.gather(1, which), token.gather(1, which)
        said = said.flatten(1).gather(1, place.gather(1, which)).masked_fill(going == -math.inf, -math.inf)
        state = [part[(first + origin).flatten()] for part in state]
        tokens = token.flatten()
        if ctc:
            ctc.extend(origin, token)
    ids = [[i for i in row if i not in (PAD, EOS)] for row in done[:, 0].tolist()]
    return ids, done_scores[:, 0].tolist()


# DATA -------------------------------------------------------------------------------------------------------
# what --data auto looks for in data/NAME
AUTO = {"librispeech": "LibriSpeech", "speech": "train.tsv", "hw4p2": "train-clean-100"}
REAL = "--data librispeech downloads 100 hours of read English, 7 GB"
PARTS = {"train": "train-clean-100", "val": "dev-clean", "test": "test-clean"}  # of LibriSpeech
SOUNDS = "BCDFGHJKLMNPQRSTVWXYZ", "AEIOU", "LNRST"  # of a syllable of the demo, mostly without the last


def demo_voice(text, pitch, tract, speed, seed):
    """A source-filter voice at 16 kHz: pulses at the speaker's pitch, or noise for some letters, and for each
    letter two formants. Loudness and noise vary: (n,) float32."""
    rng = np.random.default_rng(seed)
    lengths = 80 * (200 * rng.uniform(0.07, 0.1, len(text) + 2) / speed).astype(int)  # round, for the FFT
    begins, n = np.cumsum(lengths), lengths.sum()
    f0 = pitch * (1 + 0.08 * np.sin(2 * math.pi * rng.uniform(0.5, 2) * np.arange(n) / 16000))
    pulses = np.diff(np.floor(np.cumsum(f0) / 16000), prepend=0)
    noise, wave = rng.normal(size=n), np.zeros(n)
    for letter, begin, length in zip(text, begins, lengths[1:]):
        if letter != " ":
            i, span = ord(letter) - 65, slice(begin - 160, begin + length + 160)  # 10 ms into its neighbours
            f1, f2 = (260 + 140 * (i % 5)) * tract, (900 + 480 * (i // 5)) * tract
            source = (pulses if i % 4 != 3 else 0.1 * noise)[span] * np.hanning(length + 320) ** 0.3
            f = np.fft.rfftfreq(length + 320, 1 / 16000)
            formants = np.exp(-(((f - f1) / 90) ** 2)) + 0.7 * np.exp(-(((f - f2) / 160) ** 2))
            wave[span] += np.fft.irfft(np.fft.rfft(source) * formants, length + 320)
    wave = wave / wave.std() * rng.uniform(0.02, 0.1) + noise * rng.uniform(0.001, 0.01)
    return wave.astype(np.float32)


def demo_set(count, speakers, seed, without=()):
    """[(what demo_voice takes, text)]: `count` sentences, each another, none in `without`, by some voices.
    Words are invented, so that the speller has to hear each letter: a word that it knew it could guess from
    one of its sounds, and attend to nothing else."""
    rng, texts = np.random.default_rng(seed), {}
    voices = [(rng.uniform(90, 240), rng.uniform(0.88, 1.12), rng.uniform(0.9, 1.1)) for _ in range(speakers)]

    def syllable():
        letters = [part[rng.integers(len(part))] for part in SOUNDS]
        return "".join(letters if rng.random() < 0.3 else letters[:2])

    while len(texts) < count:
        words = ["".join(syllable() for _ in range(rng.integers(1, 4))) for _ in range(rng.integers(3, 6))]
        text = " ".join(words)
        texts |= {} if text in without else {text: None}
    return [((text, *voices[rng.integers(speakers)], int(rng.integers(1 << 30))), text) for text in texts]


@functools.lru_cache(1)
def mel_transform():
    import torchaudio
    return torchaudio.transforms.MelSpectrogram(16000, 512, 400, 160, n_mels=80, power=2.0)


def log_mel(waveform, sample_rate):
    """80 log-mel energies, 25 ms windows every 10 ms, each with mean 0 and variance 1 over the sound: (n,) or
    (channels, n) at any rate -> (T, 80) float32."""
    import torchaudio
    wave = torch.as_tensor(waveform, dtype=torch.float32)
    wave = wave.mean(0) if wave.dim() == 2 else wave
    if sample_rate != 16000:
        wave = torchaudio.functional.resample(wave, sample_rate, 16000)
    return normalised((mel_transform()(F.pad(wave, (0, max(0, 400 - len(wave))))) + 1e-6).log().T)


def normalised(x):
    """Each column of (T, F) with mean 0 and variance 1."""
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-3)


def read_features(item, speed=1.0):
    """(T, F) of a sound file, of a .npy of features (T, F), or of the demo's voice, heard at `speed`.
    ValueError if there is nothing to hear: fewer than 8 frames, silence, values that are not finite."""
    if isinstance(item, Path) and not item.is_file():
        raise ValueError("no such file")
    if isinstance(item, Path) and item.suffix == ".npy":
        x = torch.from_numpy(np.load(item)).float()
        if x.dim() != 2:
            raise ValueError(f"features are (T, F), not {tuple(x.shape)}")
        x = normalised(F.interpolate(x.T[None], max(1, round(len(x) / speed)), mode="linear")[0].T)
    else:
        if isinstance(item, Path):
            import soundfile
            wave, rate = soundfile.read(item, dtype="float32", always_2d=True)
        else:
            wave, rate = demo_voice(*item), 16000
        wave = torch.as_tensor(wave.T)
        if speed != 1:
            import torchaudio
            wave = torchaudio.functional.resample(wave, round(10 * speed), 10)
        if not wave.any():
            raise ValueError("silent" if wave.numel() else "empty")
        x = log_mel(wave, rate)
    if len(x) < 8 or not x.isfinite().all():
        raise ValueError(f"{len(x)} frames, of 10 ms: it takes 8" if len(x) < 8 else "values are not finite")
    return x


def clean(text):
    """Upper case in the alphabet: accents, punctuation go. ValueError for what has no obvious spelling."""
    text = unicodedata.normalize("NFKD", text.replace("\u2019", "'").replace("\u2026", " ").upper())
    text = "".join(" " if c in "-\u2013\u2014/,;:!?_" or c.isspace() else c for c in text)
    text = "".join(c for c in text if unicodedata.category(c)[0] not in "MP" or c in "'&%@#")
    if odd := set(text) - set(ALPHABET):
        raise ValueError(f"{min(odd)!r} in its transcript: spell it in letters")
    if not text.split():
        raise ValueError("its transcript is empty")
    return " ".join(text.split())


def find_files(folder, pattern="**/*"):
    """Sorted paths in a folder, without hidden files and what operating systems leave behind."""
    junk = re.compile(r"\.|__MACOSX$|Thumbs\.db$|desktop\.ini$", re.I)
    return [p for p in sorted(folder.glob(pattern)) if not any(map(junk.match, p.relative_to(folder).parts))]


def find_utterances(cfg, training=True):
    """{"train", "val", "test"} or what there is of them: lists of (Path or what demo_voice takes, text)."""
    folder = Path("data", cfg.data) if cfg.data in AUTO else Path(cfg.data)
    if cfg.data == "demo":
        train = demo_set(1000, 40, 0)
        held = demo_set(200, 10, 1, {text for _, text in train})
        return {"train": train, "val": held[:50], "test": held[50:]}
    libri = folder / "LibriSpeech"
    if cfg.data == "librispeech" and not libri.is_dir() and RANK == 0:
        download(folder)
    while cfg.data == "librispeech" and not libri.is_dir():  # the other processes wait for rank 0
        time.sleep(1)
    if libri.is_dir():
        found = {name: [(Path(list_.parent, f"{line.split()[0]}.flac"), line.partition(" ")[2])
                        for list_ in find_files(libri / part, "**/*.trans.txt")
                        for line in list_.read_text(encoding="utf-8").splitlines() if line.strip()]
                 for name, part in PARTS.items() if (libri / part).is_dir()}
    elif (folder / "train-clean-100" / "mfcc").is_dir():
        found = {name: [(p, read_transcript(p)) for p in find_files(folder / part / "mfcc", "*.npy")]
                 for name, part in (("train", "train-clean-100"), ("val", "dev-clean"))}
    else:
        files = [folder / "train.tsv", folder / "dev.tsv"] if folder.is_dir() else [folder]
        found = {name: read_tsv(path) for name, path in zip(("train", "val"), files)
                 if path == files[0] or path.exists()}
    if "val" not in found and found.get("train"):
        held = max(1, len(found["train"]) // 20)
        say(f"note: there is no set to validate on, so the last {held} utterances are")
        found["train"], found["val"] = found["train"][:-held], found["train"][-held:]
    for name in dict.fromkeys([*["train"] * training, "val", *found]):
        if not found.get(name):
            raise UserError(f"{folder}: no utterances for {name}; data/README.md says what goes where")
    return found


def read_tsv(path):
    """[(sound file, text)] of lines `path<TAB>transcript`, paths relative to the file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a readable TSV ({e}); data/README.md says what goes where") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and "\t" not in line:
            raise UserError(f"{path}, line {number}: has no tab; each line is `path<TAB>transcript`")
    pairs = (line.split("\t", 1) for line in lines if line.strip())
    return [(path.parent / name, text) for name, text in pairs]


def read_transcript(path):
    """The text beside the features of an HW4P2 utterance: characters between <sos> and <eos>."""
    try:
        letters = np.load(path.parent.parent / "transcript" / "raw" / path.name).tolist()
        return "".join(c for c in letters if c not in ("<sos>", "<eos>"))
    except Exception as e:  # a damaged array can raise nearly anything
        raise UserError(f"{path}: its transcript is missing or damaged ({e})") from None


def download(folder):
    """LibriSpeech, by torchaudio, which checks its digests, into `folder`, where it shows only when whole."""
    from torchaudio.datasets import LIBRISPEECH
    home = folder / "download"  # where the archives stay
    shutil.rmtree(home / "LibriSpeech", ignore_errors=True)  # what a run that was stopped unpacked
    try:
        home.mkdir(parents=True, exist_ok=True)
        for part in PARTS.values():
            say(f"downloading LibriSpeech's {part} into {home}")
            LIBRISPEECH(home, part, download=True)
        os.replace(home / "LibriSpeech", folder / "LibriSpeech")
    except Exception as e:
        raise UserError(f"{home}: no download ({e}); data/README.md says what goes where") from None


def prepare(cfg, name, items, speeds):
    """(features of all utterances one after the other, (N, F) float16; lengths; texts), each utterance once
    per speed. A text of None is unknown. Computed once, by rank 0, and kept in data/NAME/cache under a key
    made of all that goes in."""
    names = [f"{item} {item.stat().st_mtime_ns if item.exists() else 0}" if isinstance(item, Path) else ""
             for item, _ in items]
    key = f"{seed_for('log-mel 3', names, [text for _, text in items], speeds):x}"
    home = Path("data", cfg.data) if cfg.data in AUTO else Path(cfg.data).parent
    path = home / "cache" / f"{name}-{key}.pt"
    while cfg.data != "demo" and (path.exists() or RANK):
        with contextlib.suppress(Exception):  # a damaged one is made again
            return torch.load(path, weights_only=True, mmap=True)
        if RANK == 0:
            break
        time.sleep(1)
    parts, texts, bad = [], [], []
    for number, (item, text) in enumerate(items):
        try:
            text = "" if text is None else clean(text)
            parts += [read_features(item, speed).half() for speed in speeds]
            texts += [text] * len(speeds)
        except ImportError:  # of soundfile
            raise
        except Exception as e:  # a damaged file can raise nearly anything
            bad.append(f"{item} ({e})")
        if cfg.data != "demo" and number % 500 == 499:
            say(f"features of {name}: {number + 1:,} of {len(items):,} files")
    if bad:
        say(f"note: {len(bad)} of {len(items)} files are unreadable, skipped: {', '.join(bad[:5])}")
    if len(items) < 20 * len(bad):
        raise UserError(f"{cfg.data}: {len(bad)} of {len(items)} files are unreadable, first {bad[0]}")
    if len({part.shape[1] for part in parts}) > 1:
        raise UserError(f"{cfg.data}: the files have different numbers of features per frame")
    result = torch.cat(parts), [len(part) for part in parts], texts
    if cfg.data != "demo" and RANK == 0:
        part = path.with_suffix(f".{os.getpid()}.part")  # another run may make the same
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(result, part)
            os.replace(part, path)
        except (OSError, RuntimeError) as e:
            with contextlib.suppress(OSError):
                part.unlink()
            if WORLD > 1:
                raise UserError(f"{path}: cannot be written ({e}), and other processes wait for it") from None
            say(f"note: the features are not kept ({e})")
    return result


def load_data(cfg, training=True):
    """{split: (features (N, F), lengths, texts)} of "train" (only for training), "val" and perhaps "test"."""
    if not all(re.fullmatch(r"0\.[5-9]|1\.\d|2\.0", speed) for speed in cfg.speeds.split(" ")):
        raise UserError(f"--speeds {cfg.speeds!r}: takes 0.5 to 2.0, with one decimal, such as '0.9 1.0 1.1'")
    speeds = [float(speed) for speed in cfg.speeds.split()]
    data = {name: prepare(cfg, name, items, speeds if name == "train" else [1.0])
            for name, items in find_utterances(cfg, training).items() if training or name != "train"}
    if len({features.shape[1] for features, *_ in data.values()}) > 1:
        raise UserError(f"--data {cfg.data}: its parts have different numbers of features a frame")
    return data


class Batches:
    """Utterances in batches of about `budget` frames, sorted by length, so that there is hardly any padding.
    Those of about the same length are shuffled anew in each epoch, and so is the order of the batches, but in
    the first epoch, which goes from short to long: CTC finds its way much sooner in short ones."""

    def __init__(self, data, budget, device):
        features, lengths, texts = data
        self.features = features.to(device) if features.nbytes < 4e9 else features
        self.begin, self.lengths, self.texts = np.cumsum([0, *lengths[:-1]]), np.array(lengths), texts
        in_order = np.sort(self.lengths)
        starts = [0]
        for i, length in enumerate(in_order):
            if (i + 1 - starts[-1]) * length > budget and i > starts[-1]:
                starts.append(i)
        self.cuts, self.device = list(zip(starts, [*starts[1:], len(texts)])), device

    @functools.lru_cache(1)
    def order(self, seed, epoch):
        rng = np.random.default_rng(seed_for(seed, epoch))
        jitter = self.lengths * rng.uniform(1, 1.05, len(self.lengths))
        batches = rng.permutation(len(self.cuts))
        return np.argsort(jitter), batches if epoch else np.sort(batches)

    def get(self, seed, step):
        """This rank's share of the batch of a step, which counts from 1: features (B, T, F), lengths (B,),
        targets (B, U), and the numbers of characters, EOS included, and of utterances in the whole batch."""
        epoch, place = divmod(step - 1, len(self.cuts))
        order, batches = self.order(seed, epoch)
        a, b = self.cuts[batches[place]]
        chosen, whole = order[a + RANK : b : WORLD], order[a:b]
        characters = sum(len(self.texts[i]) + 1 for i in whole)
        if not len(chosen):  # fewer utterances than processes: the first one, weighed with nothing
            chosen = whole[:1]
        return *self.gather(chosen), characters, len(whole)

    def gather(self, chosen):
        lengths = torch.from_numpy(self.lengths[chosen])
        at = torch.from_numpy(self.begin[chosen])[:, None] + torch.arange(int(lengths.max()))
        at = at.clamp(max=len(self.features) - 1).to(self.features.device)
        x = self.features[at].to(self.device).float()
        lengths = lengths.to(self.device)
        x = x * (torch.arange(x.shape[1], device=self.device) < lengths[:, None])[:, :, None]
        return x, lengths, spell([self.texts[i] for i in chosen]).to(self.device)


def spell(texts):
    """Texts -> ids (B, U), each ending in EOS."""
    rows = [torch.tensor([*(3 + ALPHABET.index(c) for c in text), EOS]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def spec_augment(x, strength):
    """Two stripes each of frequencies and of frames of every sound become the mean, 0 (Park et al., 2019)."""
    import torchaudio
    y = x.mT[:, None]  # (B, 1, F, T)
    for _ in range(2):
        y = torchaudio.functional.mask_along_axis_iid(y, int(strength * x.shape[2] * 0.3), 0.0, 2)
        y = torchaudio.functional.mask_along_axis_iid(y, int(strength * 40), 0.0, 3, p=0.2)
    return y[:, 0].mT


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
    """Word errors of the corpus over its words, a fraction, from lists of strings; ValueError if they differ
    in length or hold nothing."""
    return error_rate([r.split() for r in references], [h.split() for h in hypotheses])


def cer(references, hypotheses):
    """Character errors of the corpus over its characters, a fraction, spaces at the ends apart."""
    return error_rate([r.strip() for r in references], [h.strip() for h in hypotheses])


def error_rate(references, hypotheses):
    if len(references) != len(hypotheses) or not sum(map(len, references)):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references that hold something")
    return sum(map(edit_distance, references, hypotheses)) / sum(map(len, references))


# EVALUATE, PREDICT ------------------------------------------------------------------------------------------
def transcripts(model, data, cfg, device, beam_size):
    """(texts, scores) of all utterances; each process does its share, and all get the result."""
    model.eval()
    batches, n = Batches(data, 30000, device), len(data[1])
    order = np.argsort(batches.lengths, kind="stable")
    width = max(1, max(batches.lengths) // cfg.stack >> cfg.layers)  # a hypothesis has no more characters
    ids, scores = torch.zeros(n, width, dtype=torch.long, device=device), torch.zeros(n, device=device)
    for number, (a, b) in enumerate(batches.cuts):
        if number % WORLD == RANK:
            x, lengths, _ = batches.gather(order[a:b])
            rows, values = beam_search(model, x, lengths, beam_size, 0.5 if cfg.ctc_weight else 0)
            for i, row, value in zip(order[a:b].tolist(), rows, values):
                ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
                scores[i] = value
    rows, scores = all_sum(ids).tolist(), all_sum(scores).tolist()
    return ["".join(ALPHABET[i - 3] for i in row if i > 2).strip() for row in rows], scores


def evaluate(model, cfg, data, device, beam_size):
    """(figures, texts): errors of free-running transcripts, never teacher-forced, in percent."""
    texts, _ = transcripts(model, data, cfg, device, beam_size)
    share = cer(data[2], texts)
    distance = share * sum(map(len, data[2])) / len(texts)
    return {"cer": 100 * share, "wer": 100 * wer(data[2], texts), "distance": distance}, texts


def score(model, cfg, data, folder, device):
    """The figures of the test set, or where there is none of the validation set; writes the transcripts."""
    name = "test" if "test" in data else "val"
    figures, texts = evaluate(model, cfg, data[name], device, cfg.beam_size)
    files = {f"{name}.tsv": ["reference\thypothesis", *map("\t".join, zip(data[name][2], texts))]}
    extra = find_files(Path("data", cfg.data, "test-clean", "mfcc"), "*.npy")
    if cfg.data == "hw4p2" and extra:  # the task's own test set comes without transcripts
        unknown = prepare(cfg, "submission", [(path, None) for path in extra], [1.0])
        texts, _ = transcripts(model, unknown, cfg, device, cfg.beam_size)  # on all processes
        if len(texts) == len(extra):
            files["submission.csv"] = ["index,label", *(f"{i},{text}" for i, text in enumerate(texts))]
        else:
            say(f"note: no submission.csv, which takes all of the {len(extra)} files of test-clean")
    for file, lines in files.items() if RANK == 0 else ():
        (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return figures | {"n": len(data[name][2])}


@torch.no_grad()
def draw(model, data, path, device):
    """A picture of where the speller listens: one utterance, frames against characters, over its log-mels."""
    if RANK or not (figure := new_figure(9, 6)):
        return
    model.eval()
    place = int(np.argsort(data[1])[len(data[1]) // 2])
    begin, n, text = sum(data[1][:place]), data[1][place], data[2][place]
    x, lengths, targets = Batches((data[0][begin : begin + n], [n], [text]), n, device).gather(np.array([0]))
    _, attention, _ = model(x, lengths, targets)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    seconds = x.shape[1] / 100
    top.imshow(x[0].T.cpu().numpy(), aspect="auto", origin="lower", extent=(0, seconds, 0, x.shape[2]))
    top.set_ylabel("feature")
    u = targets.shape[1]
    below.imshow(attention[0].cpu().numpy(), aspect="auto", cmap="Blues", extent=(0, seconds, u, 0))
    below.set_yticks(np.arange(u) + 0.5, [*text.replace(" ", "_"), "end"], fontsize=7)
    below.set(xlabel="time (s)", ylabel="character")
    figure.savefig(path, dpi=90)


def build(cfg, n_features, device):
    shape = cfg.hidden, cfg.layers, cfg.speller, cfg.dropout, cfg.stack
    return LAS(n_features, 3 + len(ALPHABET), *shape).to(device)


def cut_at_pauses(x, longest):
    """(T, F) -> parts of at most `longest` frames, cut where it is quietest in the second half of each, the
    last of them no shorter than a quarter."""
    parts = []
    while len(x) > longest:
        loud = F.avg_pool1d(x[:longest].mean(1)[None, None], 15, 1, 7)[0, 0]
        at = longest // 2 + int(loud[longest // 2 : len(x) - longest // 4].argmin())
        parts, x = [*parts, x[:at]], x[at:]
    return [*parts, x]


def predict(mode, inputs, flags):
    """Every mode that uses a trained model."""
    with contextlib.redirect_stdout(sys.stderr if mode == "transcribe" else sys.stdout):  # there, text only
        cfg, ckpt, device, folder = open_checkpoint(flags)
    model = build(cfg, ckpt["n_features"], device).eval()
    model.load_state_dict(ckpt["model"])
    if mode == "eval":
        data = load_data(cfg, training=False)
        if (n := data["val"][0].shape[1]) != ckpt["n_features"]:
            raise UserError(f"--data {cfg.data}: {n} features a frame; {cfg.ckpt} takes {ckpt['n_features']}")
        figures = score(model, cfg, data, folder, device)
        return say(f"{show(figures, digits=6)}\nwritten: {folder}/*.tsv")
    bad, lines = [], []
    for name in inputs:
        try:
            x = read_features(Path(name))
            if x.shape[1] != ckpt["n_features"]:
                raise ValueError(f"{x.shape[1]} features a frame, where the model takes {ckpt['n_features']}")
        except Exception as e:  # a damaged file can raise nearly anything; the others are done all the same
            bad.append(f"{name} ({e})")
            continue
        parts = cut_at_pauses(x, ckpt["longest"])
        data = torch.cat(parts).half(), [len(part) for part in parts], [""] * len(parts)
        texts, scores = transcripts(model, data, cfg, device, cfg.beam_size)
        mean = np.average(scores, weights=[len(text) + 1 for text in texts])  # log-probability per character
        line = {"file": name, "text": " ".join(filter(None, texts)), "seconds": len(x) / 100,
                "score": round(float(mean), 4)}
        say(json.dumps(line) if cfg.json else f"{name}: {line['text']}" if len(inputs) > 1 else line["text"])
        lines.append(f"{name}\t{line['text']}\n")
    if cfg.save and RANK == 0:
        (folder / "transcripts.tsv").write_text("".join(lines), encoding="utf-8")
    if bad:
        raise UserError(f"{', '.join(bad[:5])}: cannot be heard; give sound files, or features as .npy")


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

    data = load_data(cfg)
    batches, n_features = Batches(data["train"], cfg.batch_size, device), data["train"][0].shape[1]
    _, frames, texts = data["train"]
    if dense := sum(len(text) > n // cfg.stack >> cfg.layers for n, text in zip(frames, texts)):
        say(f"note: {dense:,} texts have more characters than the listener makes frames; lower --layers")
    schedule = len(batches.cuts) * cfg.epochs
    total, count = min(cfg.max_steps or schedule, schedule), round(sum(batches.lengths) / len(batches.cuts))
    say(f"utterances: {', '.join(f'{len(part[1]):,} {name}' for name, part in data.items())}; {n_features} "
        f"features; {sum(batches.lengths) / 360000:.2f} h to train on; steps: {total:,} of {count:,} frames")

    torch.manual_seed(cfg.seed)
    raw = build(cfg, n_features, device)
    if cfg.init and not ckpt:
        load_weights(raw, load_checkpoint(cfg.init)["model"], cfg.init)
    optimizer = torch.optim.AdamW(raw.parameters(), cfg.lr, weight_decay=1e-4, fused=True)
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
        x, lengths, targets, characters, utterances = batch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, schedule)
        raw.train()
        warmup = min(cfg.warmup, schedule // 3)
        share = max(0, step - warmup) / max(1, schedule - warmup)
        if cfg.specaugment:
            x = spec_augment(x, cfg.specaugment)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            logits, _, ctc_logits = model(x, lengths, targets, 1 - share * (1 - cfg.teacher))
        weight = float(utterances > RANK)  # 0 for a process without an utterance of its own
        spelling = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=PAD,
                                   reduction="sum", label_smoothing=0.1)
        log_p = ctc_logits.float().log_softmax(-1).transpose(0, 1)  # (T', B, V)
        letters = targets.masked_fill(targets == EOS, PAD)
        if device.type == "mps":  # which has no CTC of its own
            log_p, letters = log_p.cpu(), letters.cpu()
        ctc = F.ctc_loss(log_p, letters, lengths // cfg.stack >> cfg.layers, (letters != PAD).sum(1), PAD,
                         "sum", zero_infinity=True).to(device)  # a text longer than its sound has no path
        spelling, ctc = (part * WORLD * weight / characters for part in (spelling, ctc))
        loss = (1 - cfg.ctc_weight) * spelling + cfg.ctc_weight * ctc
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss, "spelling": spelling, "ctc": ctc}

    if mode == "bench":
        later = len(batches.cuts)  # than the first epoch, which begins with the shortest utterances
        return bench(run, lambda step: fetch(later + step), update, count)

    run.start(total)
    for step in range(run.step + 1, total + 1):
        losses = update(step, fetch(step))
        check, save = run.step_done(losses, count, learning_rate(cfg, step, schedule))
        if check:
            figures, _ = evaluate(raw, cfg, data["val"], device, 1)
            run.write("val", figures)
            if run.best is None or figures["cer"] < run.best:
                run.best = figures["cer"]
                run.save("best.pt", model=raw.state_dict(), n_features=n_features, alphabet=ALPHABET,
                         longest=int(max(batches.lengths)))
        if save:
            run.save("last.pt", model=raw.state_dict(), optimizer=optimizer.state_dict())
        if check:
            draw(raw, data["val"], run.folder / "attention.png", device)
        if run.stop:
            return

    raw.load_state_dict(load_checkpoint(run.folder / "best.pt")["model"])
    figures = score(raw, cfg, data, run.folder, device)
    draw(raw, data["val"], run.folder / "attention.png", device)
    run.finish(figures)


def learning_rate(cfg, step, schedule):
    """Linear warm-up, in a third of a short schedule at most, then half a cosine down to zero."""
    warmup = max(1, min(cfg.warmup, schedule // 3))
    return cfg.lr * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * step / schedule))


if __name__ == "__main__":
    main()
