"""las_asr.py's model, losses, search and metrics against jiwer, packed LSTMs, and searches written a second time in lists."""
import itertools
import math
import random
import shutil

import jiwer
import las_asr as las
import numpy as np
import pytest
import torch
import torch.nn as nn


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = las.LAS(6, 12, hidden=8, layers=2, speller=16, stack=2).eval()
    with torch.no_grad():  # far from uniform, so that beams differ
        for p in net.parameters():
            p.mul_(3) if p.dim() > 1 else None
    return net


def sounds(*lengths):
    torch.manual_seed(1)
    return [torch.randn(n, 6) for n in lengths]


def padded(parts, width):
    return torch.stack([nn.functional.pad(p, (0, 0, 0, width - len(p))) for p in parts]), torch.tensor([*map(len, parts)])


def noisy_pairs(count):
    dice, words = random.Random(0), "A AN THE CAT DOG'S SAT ON MAT THEIR".split()
    for _ in range(count):
        ref = dice.choices(words, k=dice.randrange(1, 9))
        hyp = [w if dice.random() < 0.8 else dice.choice(words) for w in ref if dice.random() < 0.9]
        yield " ".join(ref), " ".join(hyp) if dice.random() < 0.9 else dice.choice(["", " ", "  A  CAT "])


def test_error_rates_equal_jiwer():
    pairs = list(noisy_pairs(500))
    for chosen in [pairs, *([p] for p in pairs)]:
        refs, hyps = map(list, zip(*chosen))
        assert las.wer(refs, hyps) == pytest.approx(jiwer.wer(refs, hyps), abs=1e-12), chosen
        assert las.cer(refs, hyps) == pytest.approx(jiwer.cer(refs, hyps), abs=1e-12), chosen


@pytest.mark.parametrize("ref, hyp", [("A", ""), ("A", "A B C"), ("A  B", "A B"), ("A B", "A  B"), (" A ", "A"), ("AB", "BA")])
def test_error_rates_of_edge_cases(ref, hyp):
    assert las.wer([ref], [hyp]) == pytest.approx(jiwer.wer([ref], [hyp]))
    assert las.cer([ref], [hyp]) == pytest.approx(jiwer.cer([ref], [hyp]))


def test_distance_of_any_sequences():
    assert las.edit_distance("kitten", "sitting") == 3 and las.edit_distance([], [1, 2]) == 2
    assert las.edit_distance((1, 2, 3), [1, 3]) == 1 and las.edit_distance("", "") == 0
    for refs, hyps in (([], []), (["A"], ["A", "B"]), ([""], ["A"])):
        with pytest.raises(ValueError):
            las.wer(refs, hyps)


def test_blstm_equals_a_packed_one():
    mine, theirs = las.BLSTM(5, 7), nn.LSTM(5, 7, batch_first=True, bidirectional=True)
    for name, p in mine.forth.named_parameters():
        getattr(theirs, name).data.copy_(p)
    for name, p in mine.back.named_parameters():
        getattr(theirs, name + "_reverse").data.copy_(p)
    x, lengths = torch.randn(4, 11, 5), torch.tensor([11, 3, 1, 8])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y, _ = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    assert torch.allclose(mine(x, lengths), y, atol=1e-6)


def test_the_spellers_cell_is_an_lstm():
    theirs, state = nn.LSTMCell(5, 7), torch.randn(2, 3, 7)
    x = torch.randn(3, 5)
    gates = nn.functional.linear(torch.cat([x, state[0]], 1), torch.cat([theirs.weight_ih, theirs.weight_hh], 1),
                                 theirs.bias_ih + theirs.bias_hh)
    for mine, expected in zip(las.lstm_cell(gates, state[1]), theirs(x, tuple(state))):
        assert torch.allclose(mine, expected, atol=1e-6)


@torch.no_grad()
def test_forward_is_a_loop_of_steps(model):
    x, lengths = padded(sounds(37, 20, 8), 37)
    targets = torch.randint(3, 12, (3, 5))
    memory, _ = model.listen(x, lengths)
    state, token = model.start(memory), torch.full((3,), las.BOS)
    logits, attention, _ = model(x, lengths, targets)
    for u in range(5):
        expected, weights, state = model.step(token, state, memory)
        assert torch.allclose(logits[:, u], expected, atol=1e-6) and torch.allclose(attention[:, u], weights, atol=1e-6)
        token = targets[:, u]


def test_lengths_after_the_pyramid():
    for stack, layers in ((1, 1), (1, 3), (2, 1), (3, 2)):
        net = las.LAS(6, 12, 8, layers, 8, stack=stack)
        x, lengths = padded(sounds(41, 29, 24), 41)
        y, left = net.listener(x, lengths)
        expected = [n // stack for n in lengths.tolist()]
        for _ in range(layers):
            expected = [n // 2 for n in expected]
        assert left.tolist() == expected == (lengths // net.listener.reduction).tolist() and y.shape == (3, expected[0], 16)
        assert all(not y[i, n:].any() for i, n in enumerate(expected))


@torch.no_grad()
def test_padding_and_batch_mates_change_nothing(model):
    parts, targets = sounds(37, 20, 8), torch.randint(3, 12, (3, 5))
    x, lengths = padded(parts, 37)
    logits, attention, ctc = model(x, lengths, targets)
    wide, wide_attention, _ = model(*padded(parts, 64), targets)
    assert torch.allclose(logits, wide, atol=1e-5)
    for i, part in enumerate(parts):
        alone, weights, alone_ctc = model(part[None], lengths[i : i + 1], targets[i : i + 1])
        n = weights.shape[2]
        assert torch.allclose(alone[0], logits[i], atol=1e-5)
        assert torch.allclose(weights[0], attention[i, :, :n], atol=1e-6)
        assert torch.allclose(alone_ctc[0], ctc[i, :n], atol=1e-5)
        assert las.beam_search(model, part[None], lengths[i : i + 1], 3)[0] == las.beam_search(model, x, lengths, 3)[i]


@torch.no_grad()
def test_attention_sums_to_one_over_what_is_there(model):
    x, lengths = padded(sounds(37, 20, 8), 37)
    _, attention, _ = model(x, lengths, torch.randint(3, 12, (3, 5)))
    assert torch.allclose(attention.sum(-1), torch.ones(3, 5))
    for i, n in enumerate((lengths // 8).tolist()):
        assert not attention[i, :, n:].any() and (attention[i, :, :n] > 0).all()


@torch.no_grad()
def test_attention_is_by_content_and_by_moves(model):
    """Against sums written out in numpy, from the speller's state; sounds longer than the reach."""
    x, lengths = padded(sounds(400, 200), 400)
    heard, frames = model.listener(x, lengths)
    memory, _ = model.listen(x, lengths)
    state, tokens = model.start(memory), torch.tensor([las.BOS, 5])
    before = np.zeros(state[-1].shape)
    for _ in range(3):
        assert np.allclose(state[-1], before)
        _, attention, state = model.step(tokens, state, memory)
        query, moves = model.phi(state[2]).numpy(), model.filter(state[2]).numpy()
        key, value = model.psi(heard).numpy(), model.value(heard).numpy()
        for i, n in enumerate(frames.tolist()):
            covered = {s: before[i, s] if s >= 0 else 1.0 for s in range(-las.REACH, n)}
            energies = [key[i, t] @ query[i] / 4 + sum(
                covered[s] * moves[i, las.REACH + s - t] for s in covered if abs(s - t) <= las.REACH) for t in range(n)]
            expected = np.exp(energies) / np.exp(energies).sum()
            assert np.allclose(attention[i, :n], expected, atol=1e-6)
            assert np.allclose(state[4][i], expected @ value[i, :n], atol=1e-5)
            assert np.allclose(state[-1][i, :n], (before[i, :n] + expected).clip(max=1), atol=1e-6)
            assert not state[-1][i, n:].any()
        state = *state[:-1], (2 * torch.rand(2, 50)).clamp(max=1) * (torch.arange(50) < frames[:, None])
        before = state[-1].numpy().copy()


@torch.no_grad()
def test_moves_alone_make_a_diagonal():
    net = las.LAS(6, 12, hidden=8, layers=1, speller=16).eval()
    for layer in (net.phi, net.filter):
        layer.weight.zero_()
        layer.bias.zero_()
    net.filter.bias[las.REACH - 1], net.filter.bias[las.REACH] = 50.0, -50.0  # to what follows the covered part
    _, attention, _ = net(torch.randn(1, 40, 6), torch.tensor([40]), torch.full((1, 8), 5))
    assert attention[0].argmax(-1).tolist() == [*range(8)] and attention.max(-1)[0].min() > 0.99


def slow_beam(model, x, k):
    """Beam search on one sound, in lists, until an end is as good as what goes on, by log p a character."""
    memory, _ = model.listen(x[None], torch.tensor([len(x)]))
    beams, done, limit = [(0.0, [], model.start(memory))], [], len(x) // 8
    for t in range(limit + 1):
        options = []
        for score, prefix, state in beams:
            token = torch.tensor([prefix[-1] if prefix else las.BOS])
            logits, _, after = model.step(token, state, memory)
            logits[:, [las.PAD, las.BOS]] = -math.inf
            log_p = logits[0].log_softmax(-1)
            for i in range(len(log_p)) if t < limit else [las.EOS]:
                options.append((score + log_p[i].item(), [*prefix, i], after))
        options = sorted(options, key=lambda o: -o[0])[: 2 * k]
        done += [(score / (t + 1), prefix[:-1]) for score, prefix, _ in options[:k] if prefix[-1] == las.EOS]
        beams = [o for o in options if o[1][-1] != las.EOS][:k]
        if done and (not beams or max(done)[0] >= beams[0][0] / (t + 1)):
            break
    return max(done, key=lambda d: d[0])


@torch.no_grad()
def test_beam_search_equals_one_in_lists(model):
    parts = sounds(*range(8, 88, 8))
    x, lengths = padded(parts, 80)
    for k in (1, 2, 5):
        rows = las.beam_search(model, x, lengths, k, 0)
        assert rows == [slow_beam(model, part, k)[1] for part in parts]
    assert las.greedy_decode(model, x, lengths) == las.beam_search(model, x, lengths, 1) != rows
    assert not {las.PAD, las.BOS, las.EOS} & set(sum(las.beam_search(model, x, lengths, 3, 1), []))  # by CTC alone


@torch.no_grad()
def test_a_sound_shorter_than_a_frame_of_the_listener(model):
    x = torch.randn(2, 5, 6)  # the listener joins eight
    lengths = torch.tensor([5, 3])
    logits, attention, _ = model(x, lengths, torch.tensor([[4, las.EOS], [5, las.EOS]]))
    assert logits.isfinite().all() and torch.equal(attention, torch.ones(2, 2, 1))
    assert all(len(row) <= 1 for row in las.beam_search(model, x, lengths))


@torch.no_grad()
def test_greedy_takes_the_likeliest_character_each_time(model):
    x, lengths = padded(sounds(64), 64)
    prefix = []
    while len(prefix) < 8:
        logits, *_ = model(x, lengths, torch.tensor([[*prefix, las.EOS]]))
        logits[:, :, [las.PAD, las.BOS]] = -math.inf
        if (token := logits[0, -1].argmax().item()) == las.EOS:
            break
        prefix.append(token)
    assert las.greedy_decode(model, x, lengths, 0) == [prefix]


def test_teacher_forcing_feeds_the_target(model):
    x, lengths = padded(sounds(40, 32), 40)
    targets = torch.randint(3, 12, (2, 6))
    net = las.LAS(6, 12, 8, 2, 16, dropout=0.0)
    with torch.no_grad():
        net.eval()
        plain = net(x, lengths, targets)[0]
        net.train()
        assert torch.allclose(net(x, lengths, targets, 1.0)[0], plain)
        own = net(x, lengths, targets, 0.0)[0]
        guesses = own.argmax(-1)  # with no teacher, the model's own guesses are fed
        net.eval()
        assert torch.allclose(net(x, lengths, guesses)[0], own, atol=1e-6)
    net.train()
    found = []
    for fed, teacher in ((targets, 0.0), (guesses, 1.0)):  # and so are the gradients
        loss = nn.functional.cross_entropy(net(x, lengths, fed, teacher)[0].flatten(0, 1), targets.flatten())
        found.append(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
    for mine, plain in zip(*found):
        assert (mine is None) == (plain is None) and (mine is None or torch.allclose(mine, plain, atol=1e-6))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_the_compiled_step_equals_the_plain_loop():
    torch.manual_seed(0)
    plain = las.LAS(6, 12, 8, 1, 8, dropout=0.0)
    fast = las.LAS(6, 12, 8, 1, 8, dropout=0.0)
    fast.load_state_dict(plain.state_dict())
    fast.step = torch.compile(fast.step, dynamic=True)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    for width in (40, 32):
        x, lengths = padded(sounds(width, 16), width)
        targets = torch.randint(3, 12, (2, 4))
        losses = []
        for net in (plain, fast):
            net.zero_grad()
            loss = nn.functional.cross_entropy(net(x, lengths, targets)[0].flatten(0, 1), targets.flatten())
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        for a, b in zip(plain.parameters(), fast.parameters()):
            assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-5))


def ctc_by_paths(log_p, text):
    """(p of the whole text, p of all texts that begin so), summed over all V^T' paths, one by one."""
    whole = prefix = 0.0
    for path in itertools.product(range(log_p.shape[1]), repeat=log_p.shape[0]):
        said = [c for c, before in zip(path, (None, *path)) if c != before and c != las.PAD]
        p = math.exp(sum(log_p[t, c].item() for t, c in enumerate(path)))
        whole += p * (said == text)
        prefix += p * (said[: len(text)] == text)
    return whole, prefix


@torch.no_grad()
def test_ctc_prefix_scores_equal_all_paths_and_ctc_loss():
    torch.manual_seed(0)
    logits, real = torch.randn(2, 6, 5) * 2, torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    log_p, frames = logits.log_softmax(-1), [6, 4]
    ctc = las.CTCPrefixes(logits, real, 2)
    texts = [[], []]
    for tokens in ([3, 4], [3, 3], [4, 3]):  # with a letter twice
        scores = ctc.scores()
        for k in range(2):
            for b in range(2):
                for c in (3, 4):
                    _, expected = ctc_by_paths(log_p[b, : frames[b]], [*texts[k], c])
                    assert scores[b, k, c].exp().item() == pytest.approx(expected, rel=1e-3, abs=1e-9)
                expected, _ = ctc_by_paths(log_p[b, : frames[b]], texts[k])
                assert scores[b, k, las.EOS].exp().item() == pytest.approx(expected, rel=1e-3, abs=1e-9)
        ctc.extend(torch.tensor([[0, 1], [0, 1]]), torch.tensor([tokens, tokens]))
        texts = [[*text, token] for text, token in zip(texts, tokens)]
    end = ctc.scores()[0, :, las.EOS]
    for k, text in enumerate(texts):
        loss = nn.functional.ctc_loss(log_p[0][:, None], torch.tensor([text]), (6,), (len(text),), reduction="sum")
        assert end[k].item() == pytest.approx(-loss.item(), abs=1e-3)
