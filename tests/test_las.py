"""las_asr.py against jiwer, packed LSTMs, a beam search written a second time in lists, and real formats."""
import itertools
import json
import math
import random
import shutil
import tarfile
import urllib.error

import jiwer
import numpy as np
import pytest
import soundfile
import torch
import torch.nn as nn
import las_asr as las
from conftest import ROOT, python, torchrun

SMALL = "--device cpu --compile off --hidden 8 --speller 8 --max_steps 2 --speeds 1.0"


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


def test_the_unrolled_lstm_equals_the_fused_one():
    lstm, x, found = nn.LSTM(5, 7, batch_first=True), torch.randn(4, 11, 5, requires_grad=True), []
    for y in (lstm(x)[0], las.unrolled(lstm, x)):
        found.append((y, *torch.autograd.grad(y.pow(2).sum(), [x, *lstm.parameters()])))
    for fused, own in zip(*found):
        assert torch.allclose(fused, own, atol=1e-5)


def test_gradients_gathered_over_all_characters_equal_those_of_single_steps(model):
    x, lengths = padded(sounds(37, 20, 8), 37)
    targets = torch.randint(3, 12, (3, 5))
    memory, _ = model.listen(x, lengths)
    state, tokens, logits, found = model.start(memory), torch.full((3,), las.BOS), [], []
    for u in range(5):
        y, state = model.step(tokens, state, memory)
        logits.append(y)
        tokens = targets[:, u]
    for y in (torch.stack(logits, 1), model(x, lengths, targets)[0]):
        loss = nn.functional.cross_entropy(y.flatten(0, 1), targets.flatten())
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    for one, all_ in zip(*found):
        assert (one is None) == (all_ is None) and (one is None or torch.allclose(one, all_, atol=1e-5))


def test_lengths_after_the_pyramid():
    for stack, layers in ((1, 1), (1, 3), (2, 1), (3, 2)):
        net = las.LAS(6, 12, 8, layers, 8, stack=stack)
        x, lengths = padded(sounds(41, 29, 24), 41)
        y, left = net.listener(x, lengths)
        expected = [n // stack for n in lengths.tolist()]
        for _ in range(layers):
            expected = [n // 2 for n in expected]
        assert left.tolist() == expected and y.shape == (3, expected[0], 16)
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
        assert las.beam_search(model, part[None], lengths[i : i + 1], 3)[0][0] == las.beam_search(model, x, lengths, 3)[0][i]


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
        _, state = model.step(tokens, state, memory)
        query, moves = model.query(state[2]).numpy(), model.moves(state[2]).numpy()
        key, value = model.key(heard).numpy(), model.value(heard).numpy()
        for i, n in enumerate(frames.tolist()):
            covered = {s: before[i, s] if s >= 0 else 1.0 for s in range(-las.REACH, n)}
            energies = [key[i, t] @ query[i] / 4 + sum(
                covered[s] * moves[i, las.REACH + s - t] for s in covered if abs(s - t) <= las.REACH) for t in range(n)]
            expected = np.exp(energies) / np.exp(energies).sum()
            assert np.allclose(state[4][i], expected @ value[i, :n], atol=1e-5)
            assert np.allclose(state[-1][i, :n], (before[i, :n] + expected).clip(max=1), atol=1e-6)
            assert not state[-1][i, n:].any()
        state[-1] = (2 * torch.rand(2, 50)).clamp(max=1) * (torch.arange(50) < frames[:, None])
        before = state[-1].numpy().copy()


@torch.no_grad()
def test_moves_alone_make_a_diagonal():
    net = las.LAS(6, 12, hidden=8, layers=1, speller=16).eval()
    for layer in (net.query, net.moves):
        layer.weight.zero_()
        layer.bias.zero_()
    net.moves.bias[las.REACH - 1], net.moves.bias[las.REACH] = 50.0, -50.0  # to what follows the covered part
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
            logits, after = model.step(token, state, memory)
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
        rows, scores = las.beam_search(model, x, lengths, k, 0)
        for part, row, score in zip(parts, rows, scores):
            expected = slow_beam(model, part, k)
            assert row == expected[1] and score == pytest.approx(expected[0], abs=1e-4)
    assert las.greedy_decode(model, x, lengths) == las.beam_search(model, x, lengths, 1)[0] != rows
    for row, score in zip(*las.beam_search(model, x, lengths, 3, 1)):  # by CTC alone
        assert math.isfinite(score) and not {las.PAD, las.BOS} & set(row)


@torch.no_grad()
def test_a_sound_shorter_than_a_frame_of_the_listener(model):
    x = torch.randn(2, 5, 6)  # the listener joins eight
    lengths = torch.tensor([5, 3])
    logits, attention, _ = model(x, lengths, torch.tensor([[4, las.EOS], [5, las.EOS]]))
    assert logits.isfinite().all() and torch.equal(attention, torch.ones(2, 2, 1))
    assert all(len(row) <= 1 for row in las.beam_search(model, x, lengths)[0])


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
    fast.compile()
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


def test_log_mel_finds_a_tone():
    t = np.arange(16000) / 16000
    x = las.log_mel(np.sin(2 * np.pi * 1000 * t) + np.random.default_rng(0).normal(size=16000) * 1e-3, 16000)
    assert x.shape == (101, 80)
    mel = lambda f: 2595 * math.log10(1 + f / 700)  # noqa: E731
    raw = las.mel_transform()(torch.sin(torch.from_numpy(2 * np.pi * 1000 * t)).float())
    assert abs(raw.mean(1).argmax().item() + 1 - mel(1000) / mel(8000) * 81) < 1
    assert torch.allclose(x.mean(0), torch.zeros(80), atol=1e-4) and torch.allclose(x.std(0), torch.ones(80), atol=1e-2)


def test_spec_augment_masks_each_sound_by_itself():
    torch.manual_seed(0)
    x = torch.ones(16, 100, 80)
    y = las.spec_augment(x, 1.0)
    stripes = [((row == 0).all(1), (row == 0).all(0)) for row in y]  # frames, features
    assert len({tuple(frames.tolist()) for frames, _ in stripes}) > 8
    assert all(frames.sum() <= 40 and features.sum() <= 48 for frames, features in stripes)
    assert 0.05 < (y == 0).float().mean() < 0.6 and set(y.unique().tolist()) == {0.0, 1.0}


def test_text_is_mapped_where_obvious():
    assert las.clean("Hello,  world! It’s café-time") == "HELLO WORLD IT'S CAFE TIME"
    assert las.clean("yes,no:maybe… the U.S.") == "YES NO MAYBE THE US"
    for text, word in (("route 66", "6"), ("日本", "transcript"), ("", "empty"), (" ?! ", "empty"), ("R&B", "&"), ("all %", "%")):
        with pytest.raises(ValueError, match=word):
            las.clean(text)


def test_long_sounds_are_cut_where_it_is_quiet():
    x = torch.ones(1000, 4) + 0.1 * torch.rand(1000, 4)
    for quiet in (170, 330, 600, 760):
        x[quiet - 10 : quiet + 10] = -3
    parts = las.cut_at_pauses(x, 250)
    assert torch.equal(torch.cat(parts), x) and max(map(len, parts)) <= 250
    for n in (250, 251, 312, 400):
        assert all(62 <= len(part) <= 250 for part in las.cut_at_pauses(x[-n:], 250))
    ends = np.cumsum([len(p) for p in parts])[:-1]
    assert sum(min(abs(end - q) for q in (170, 330, 600, 760)) < 18 for end in ends) >= 3  # 10 and half a window


SENTENCES = ["OLD DOG", "A RED CUP", "MY KING", "BLUE BOAT", "THE BIRD", "NEW LAMP", "EVERY MAN", "GIRL SEES"]


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A folder with eight sounds, their TSV, and a model that has learnt them by heart."""
    folder = tmp_path_factory.mktemp("eight")
    for i, text in enumerate(SENTENCES):
        soundfile.write(folder / f"{i}.wav", las.demo_voice(text, 120 + 10 * i, 1, 1, i), 16000)
    lines = "".join(f"{i}.wav\t{text}\n" for i, text in enumerate(SENTENCES))
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(lines)
    las.main(f"--data {folder} --out {folder}/run --device cpu --compile off --hidden 48 --speller 48 --speeds 1.0 --dtype "
             "float32 --batch_size 900 --dropout 0 --specaugment 0 --teacher 1 --lr 5e-3 --warmup 20 "
             "--epochs 150 --eval_every 50 --log_every 50".split())
    return folder


def test_eight_utterances_are_memorised(eight):
    records = [json.loads(line) for line in (eight / "run" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["split"] == "test" and records[-1]["cer"] == records[-1]["wer"] == records[-1]["distance"] == 0
    rows = (eight / "run" / "val.tsv").read_text().splitlines()
    assert rows == ["reference\thypothesis", *(f"{t}\t{t}" for t in SENTENCES)]
    assert (eight / "run" / "attention.png").stat().st_size > 5000


def test_a_transcript_survives_formats_rates_and_channels(eight, call, tmp_path):
    import torchaudio
    for i, text in enumerate(SENTENCES[:4]):
        wave, _ = soundfile.read(eight / f"{i}.wav", dtype="float32")
        fast = torchaudio.functional.resample(torch.from_numpy(wave), 16000, 44100).numpy()
        for name, data, rate in (("a.flac", wave, 16000), ("b.ogg", wave, 16000), ("c.wav", np.stack([fast, fast], 1), 44100),
                                 ("d.mp3", fast, 44100), ("e.wav", wave * 0.2, 16000)):
            soundfile.write(tmp_path / name, data, rate)
        np.save(tmp_path / "f.npy", las.log_mel(wave, 16000).numpy())
        files = "a.flac b.ogg c.wav d.mp3 e.wav f.npy"
        status, out, _ = call("las_asr", f"transcribe {files} --ckpt {eight}/run/best.pt --device cpu")
        assert status == 0 and out.splitlines() == [f"{name}: {text}" for name in files.split()]
    status, out, _ = call("las_asr", f"transcribe a.flac --json --ckpt {eight}/run/best.pt --device cpu")
    line = json.loads(out)
    assert line["text"] == SENTENCES[3] and line["score"] <= 0 and line["seconds"] == pytest.approx(len(wave) / 16000, abs=0.02)


def test_a_long_file_is_cut_and_joined(eight, call, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(las, "transcripts", lambda model, data, *_: (
        heard.extend(data[1]), ([f"PART {i}" for i in range(len(data[1]))], [-0.5] * len(data[1])))[1])
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).normal(size=16000 * 4) * 0.1, 16000)
    status, out, _ = call("las_asr", f"transcribe long.wav --ckpt {eight}/run/best.pt --device cpu")
    longest = torch.load(eight / "run" / "best.pt", weights_only=True)["longest"]
    assert sum(heard) == 401 and max(heard) <= longest < 401
    assert status == 0 and out.strip() == " ".join(f"PART {i}" for i in range(len(heard)))


def test_bad_sounds_to_transcribe(eight, call, refuses, tmp_path):
    ckpt = f"--ckpt {eight}/run/best.pt --device cpu"
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "blip.wav", np.ones(300) * 0.1, 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no sound")
    np.save(tmp_path / "narrow.npy", np.random.rand(50, 13).astype("float32"))
    np.save(tmp_path / "flat.npy", np.zeros(50))
    for name, word in (("none.wav", "empty"), ("silence.wav", "silent"), ("blip.wav", "frames"), ("nan.wav", "not finite"),
                       ("text.wav", "text.wav"), ("narrow.npy", "13 features"), ("flat.npy", "(T, F)"), ("gone.wav", "gone.wav")):
        refuses("las_asr", f"transcribe {name} {ckpt}", name, word)
    refuses("las_asr", f"transcribe {ckpt}", "FILE")
    status, out, err = call("las_asr", f"transcribe gone.wav {eight}/0.wav {ckpt}")
    assert status == 2 and out.splitlines() == [f"{eight}/0.wav: {SENTENCES[0]}"] and err.count("error:") == 1


def write_set(folder, count=30):
    rng = np.random.default_rng(0)
    for i in range(count):
        soundfile.write(folder / f"{i}.wav", rng.normal(size=8000) * 0.1, 16000)
    return [f"{i}.wav\tWORD" for i in range(count)]


def test_bad_lines_of_a_set(call, refuses, tmp_path):
    lines = write_set(tmp_path)
    tsv = tmp_path / "my.tsv"

    def train(*more, out):
        tsv.write_text("\n".join([*more, *lines]))
        return f"--data {tsv} --out {out} {SMALL}"

    refuses("las_asr", train("no tab here", out="a"), "my.tsv, line 1", "tab")
    for i, (line, word) in enumerate((("gone.wav\tWORD", "gone.wav"), ("1.wav\tROUTE 66", "'6'"), ("2.wav\t", "empty"))):
        status, out, _ = call("las_asr", train(line, out=f"run{i}"))
        assert status == 0 and "1 of " in out and word in out  # skipped, counted, named
    refuses("las_asr", train(*["gone.wav\tWORD"] * 5, out="b"), "unreadable", "gone.wav")
    tsv.write_text("\ufeff" + "\r\n".join(["0.wav\tFOO\u2028BAR", *lines]), newline="")  # as a spreadsheet writes it
    assert las.read_tsv(tsv)[:2] == [(tmp_path / "0.wav", "FOO\u2028BAR"), (tmp_path / "0.wav", "WORD")]
    tsv.write_text("")
    refuses("las_asr", f"--data {tsv} {SMALL}", "no utterances")
    (tmp_path / "nothing").mkdir()
    refuses("las_asr", f"--data nothing {SMALL}", "train.tsv")
    refuses("las_asr", f"--data demo --speeds fast {SMALL.replace('--speeds 1.0', '')}", "--speeds")
    refuses("las_asr", f"--data demo --dropout 1 {SMALL}", "--dropout", "0.99")


def test_a_set_without_validation_holds_some_back(call, tmp_path):
    (tmp_path / "my.tsv").write_text("\n".join(write_set(tmp_path)))
    status, out, _ = call("las_asr", f"--data my.tsv {SMALL}")
    assert status == 0 and "29 train, 1 val" in out


def test_the_cache_is_used_and_never_stale(call, tmp_path, monkeypatch):
    (tmp_path / "my.tsv").write_text("\n".join(write_set(tmp_path)))
    assert call("las_asr", f"--data my.tsv {SMALL} --out a")[0] == 0
    plain, reads = las.read_features, []
    monkeypatch.setattr(las, "read_features", lambda *args: reads.append(args) or plain(*args))
    assert call("las_asr", f"--data my.tsv {SMALL} --out b")[0] == 0 and not reads
    soundfile.write(tmp_path / "3.wav", np.ones(16000) * 0.1, 16000)
    assert call("las_asr", f"--data my.tsv {SMALL} --out c")[0] == 0 and len(reads) == 29
    for path in (tmp_path / "cache").glob("*.pt"):
        path.write_bytes(b"damaged")
    reads.clear()
    assert call("las_asr", f"--data my.tsv {SMALL} --out d")[0] == 0 and len(reads) == 30


def kaggle(folder, dim=13):
    rng = np.random.default_rng(0)
    for part, count in (("train-clean-100", 6), ("dev-clean", 3), ("test-clean", 4)):
        (folder / part / "mfcc").mkdir(parents=True)
        (folder / part / "transcript" / "raw").mkdir(parents=True)
        for i in range(count):
            np.save(folder / part / "mfcc" / f"u{i}.npy", rng.normal(size=(40 + i, dim)).astype("float32"))
            if part != "test-clean":
                np.save(folder / part / "transcript" / "raw" / f"u{i}.npy", np.array(["<sos>", *"IT'S A", "<eos>"]))


def test_the_kaggle_layout(call, refuses, tmp_path):
    kaggle(tmp_path / "data" / "hw4p2")
    small = SMALL.replace("1.0", "0.9 1.0 1.1").replace("--speeds 0.9 1.0 1.1", "").split() + ["--speeds", "0.9 1.0 1.1"]
    status, out, _ = call("las_asr", ["--data", "hw4p2", *small])
    assert status == 0 and "18 train, 3 val; 13 features" in out
    rows = (tmp_path / "out" / "las_asr-hw4p2" / "submission.csv").read_text().splitlines()
    assert rows[0] == "index,label" and [row.split(",")[0] for row in rows[1:]] == ["0", "1", "2", "3"]
    refs = [row.split("\t")[0] for row in (tmp_path / "out" / "las_asr-hw4p2" / "val.tsv").read_text().splitlines()[1:]]
    assert refs == ["IT'S A"] * 3
    for i in range(25):
        np.save(tmp_path / "data" / "hw4p2" / "test-clean" / "mfcc" / f"v{i}.npy", np.random.rand(9 - 2 * (i == 3), 13))
    (tmp_path / "out" / "las_asr-hw4p2" / "submission.csv").unlink()
    status, out, _ = call("las_asr", "eval --data hw4p2 --device cpu")  # one of its rows would be missing
    assert status == 0 and "all of the 29 files" in out and "v3.npy (7 frames" in out
    assert not (tmp_path / "out" / "las_asr-hw4p2" / "submission.csv").exists()
    folder = tmp_path / "data" / "hw4p2" / "train-clean-100"
    np.save(folder / "mfcc" / "u1.npy", np.zeros((40, 12), "float32"))
    refuses("las_asr", ["--data", "hw4p2", *small], "hw4p2", "features")
    (folder / "transcript" / "raw" / "u1.npy").unlink()
    refuses("las_asr", ["--data", "hw4p2", *small], "u1.npy", "transcript")


def test_a_checkpoint_of_other_features(call, refuses, tmp_path):
    for name, dim in (("wide", 13), ("narrow", 7)):
        kaggle(tmp_path / name, dim)
        assert call("las_asr", f"--data {name} {SMALL} --out run-{name}")[0] == 0
    refuses("las_asr", "eval --ckpt run-wide/best.pt --data narrow --device cpu", "7 features", "13")


def libri(folder, parts):
    rng = np.random.default_rng(0)
    for speaker, part in enumerate(parts):
        inside = folder / "LibriSpeech" / part / f"{speaker}" / "7"
        inside.mkdir(parents=True)
        names = [f"{speaker}-7-000{i}" for i in range(3)]
        for name in names:
            soundfile.write(inside / f"{name}.flac", rng.normal(size=9000) * 0.1, 16000)
        (inside / f"{speaker}-7.trans.txt").write_text("".join(f"{name} ALL THE WORDS\n" for name in names))


def test_the_librispeech_layout(call, refuses, tmp_path):
    libri(tmp_path, ("train-clean-100", "dev-clean"))
    status, out, _ = call("las_asr", f"--data . {SMALL} --out run")
    assert status == 0 and "3 train, 3 val; 80 features" in out
    assert "ALL THE WORDS" in (tmp_path / "run" / "val.tsv").read_text()
    shutil.rmtree(tmp_path / "LibriSpeech" / "train-clean-100")
    refuses("las_asr", f"--data . {SMALL} --out new", "no utterances for train")
    assert call("las_asr", "eval --data . --device cpu --ckpt run/best.pt")[0] == 0


def test_librispeech_is_downloaded_whole_or_not_at_all(call, refuses, tmp_path, monkeypatch):
    libri(tmp_path / "made", las.PARTS.values())
    asked, down = [], {"dev-clean"}

    def fetch(url, path, **_):
        asked.append(part := url.split("/")[-1].removesuffix(".tar.gz"))
        if part in down:
            raise urllib.error.URLError("no network")
        with tarfile.open(path, "w:gz") as tar:
            tar.add(tmp_path / "made" / "LibriSpeech" / part, f"LibriSpeech/{part}")

    monkeypatch.setattr("torchaudio.datasets.librispeech.download_url_to_file", fetch)
    home = tmp_path / "data" / "librispeech"
    refuses("las_asr", f"--data librispeech {SMALL}", "no network", "data/README.md")
    assert not (home / "LibriSpeech").exists()
    next((home / "download" / "LibriSpeech").rglob("*.flac")).unlink()  # as if killed while it unpacked
    down.clear()
    status, out, _ = call("las_asr", f"--data librispeech {SMALL}")
    assert status == 0 and "3 train, 3 val, 3 test; 80 features" in out
    assert asked == ["train-clean-100", "dev-clean", "dev-clean", "test-clean"]  # what has arrived is kept


@pytest.mark.skipif(not (ROOT / "data" / "librispeech").exists(), reason="data/librispeech is not there")
def test_real_flac_utterances(call, tmp_path):
    found = las.find_utterances(las.Config(data=str(ROOT / "data" / "librispeech")))
    assert len(found["train"]) + len(found["val"]) == 44
    path, text = found["val"][0]
    x = las.read_features(path)
    assert x.shape[1] == 80 and len(x) == pytest.approx(soundfile.info(path).duration * 100, abs=2)
    assert las.clean(text) == text


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


def test_two_processes_write_the_same_submission(tmp_path):
    kaggle(tmp_path / "data" / "hw4p2")
    small = ["--data", "hw4p2", *SMALL.split(), "--dtype", "float32"]
    for out, how in (("one", ()), ("two", torchrun())):
        done = python(*how, ROOT / "las_asr.py", *small, "--out", out, "--max_steps", 1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for file in ("submission.csv", "val.tsv"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text()
