"""transformer_mt.py against sacrebleu, nn.MultiheadAttention, and decoding written a second time without a cache."""
import gzip
import io
import math
import random
import re

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn as nn
import transformer_mt as mt
from baselines import captured
from conftest import litter

SMALL = "--device cpu --compile off --vocab_size 120 --batch_size 400 --beam_size 2 --max_len 20 --max_steps 2"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = mt.Transformer(30, 16, 2, 2, 32, 0.1).eval()
    with torch.no_grad():  # far from uniform, so that beams differ
        for p in net.parameters():
            p.mul_(2.5) if p.dim() > 1 else None
    return net


def sentences(count):
    """Pairs of noisy texts that share most of their words."""
    dice, (_, german) = random.Random(0), mt.demo_pairs(300)
    odd = ["3,000.5", "1-2", "«ja»", "&quot;", "&amp;", "U.S.A.", "er's", "–", "50%", "(a/b)", "x_y", "Straße,", "a\\b",
           "$5", "2.", ".5", "ÄÖÜ", "\u00a0", "e-mail", "10-jährig", "{}", "~", "`", "<skipped>", "&lt;b&gt;"]
    pairs = []
    for _ in range(count):
        words = dice.choice(german).split() + dice.choices(odd, k=dice.randrange(4))
        dice.shuffle(words) if dice.random() < 0.2 else None
        other = [w for w in words if dice.random() < 0.9]
        other.insert(dice.randrange(len(other) + 1), dice.choice(odd))
        pairs.append((" ".join(other), " ".join(words)))
    return [list(side) for side in zip(*pairs)]


@pytest.mark.parametrize("how", [{}, {"lowercase": True}, {"tokenize": "none"}, {"tokenize": "none", "lowercase": True}])
def test_bleu_equals_sacrebleu(how):
    hyps, refs = sentences(1000)
    assert mt.bleu(hyps, refs, **how) == pytest.approx(sacrebleu.corpus_bleu(hyps, [refs], force=True, **how).score, abs=1e-9)
    for h, r in zip(hyps[:200], refs):  # single sentences meet every kind of smoothing
        expected = sacrebleu.corpus_bleu([h], [[r]], force=True, **how).score
        assert mt.bleu([h], [r], **how) == pytest.approx(expected, abs=1e-9), (h, r)


def test_chrf_equals_sacrebleu():
    hyps, refs = sentences(1000)
    assert mt.chrf(hyps, refs) == pytest.approx(sacrebleu.corpus_chrf(hyps, [refs]).score, abs=1e-9)
    for h, r in zip(hyps[:200], refs):
        assert mt.chrf([h], [r]) == pytest.approx(sacrebleu.corpus_chrf([h], [[r]]).score, abs=1e-9), (h, r)


@pytest.mark.parametrize("hyp, ref", [("", "a b c d"), ("ein alter Mann", "ein alter Mann"), ("Mann", "Mann"), ("x y z w v", "a b"),
                                      ("a b c d e", "a b c d e"), ("a", "a b c d e f g"), ("a x b y c", "a b c d e")])
def test_scores_of_edge_cases(hyp, ref):
    for pair in (([hyp], [ref]), ([hyp, ""], [ref, "b"]), (["a b c d", hyp], ["a b c d", ref])):
        assert mt.bleu(*pair) == pytest.approx(sacrebleu.corpus_bleu(pair[0], [pair[1]], force=True).score, abs=1e-9)
        assert mt.chrf(*pair) == pytest.approx(sacrebleu.corpus_chrf(pair[0], [pair[1]]).score, abs=1e-9)


def test_scores_refuse_lists_that_do_not_fit():
    for score in (mt.bleu, mt.chrf):
        for pair in (([], []), (["a"], ["a", "b"])):
            with pytest.raises(ValueError):
                score(*pair)


def test_no_token_sees_the_future(model):
    src, tgt = torch.randint(4, 30, (3, 7)), torch.randint(4, 30, (3, 9))
    before = model(src, tgt)
    tgt[:, 5] = (tgt[:, 5] - 3) % 26 + 4
    after = model(src, tgt)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(before[:, 5:], after[:, 5:])


def test_padding_changes_nothing(model):
    src, tgt = torch.randint(4, 30, (3, 7)), torch.randint(4, 30, (3, 9))
    wide = model(nn.functional.pad(src, (0, 6)), nn.functional.pad(tgt, (0, 4)))
    assert torch.allclose(model(src, tgt), wide[:, :9], atol=1e-5)


def next_log_p(model, src, prefix):
    """log p of the token after `prefix`, by the whole model, without a cache."""
    logits = model(src[None], torch.tensor([[mt.BOS, *prefix]]))[0, -1]
    logits[[mt.PAD, mt.BOS, mt.UNK]] = -math.inf
    return logits.log_softmax(-1)


def slow_beam(model, src, k, alpha, max_len):
    """Beam search on one sentence, in lists: the score of Wu et al., until K ends are as good as the best that goes on."""
    beams, done = [(0.0, [])], []
    for t in range(max_len):
        options = []
        for score, prefix in beams:
            log_p = next_log_p(model, src, prefix)
            for token in range(len(log_p)) if t < max_len - 1 else [mt.EOS]:
                options.append((score + log_p[token].item(), prefix, token))
        options = sorted(options, key=lambda o: -o[0])[: 2 * k]
        for score, prefix, token in options[:k]:
            if token == mt.EOS:
                done.append((score / ((5 + t + 1) / 6) ** alpha, prefix))
        beams = [(score, [*prefix, token]) for score, prefix, token in options if token != mt.EOS][:k]
        if beams and sum(score >= beams[0][0] / ((5 + t + 1) / 6) ** alpha for score, _ in done) >= k:
            break
    return max(done, key=lambda d: d[0])[1]


@torch.no_grad()
def test_cached_decoding_equals_uncached(model):
    torch.manual_seed(1)
    src = torch.randint(4, 30, (12, 8))
    src[::2, 5:] = mt.PAD
    greedy = mt.greedy_decode(model, src, 12)
    for row, out in zip(src, greedy):
        prefix = []
        while len(prefix) < 11 and (token := next_log_p(model, row, prefix).argmax().item()) != mt.EOS:
            prefix.append(token)
        assert out == prefix
    for k, alpha in ((2, 1.0), (4, 0.6), (5, 0.0)):
        assert mt.beam_search(model, src, k, alpha, 12) == [slow_beam(model, row, k, alpha, 12) for row in src]
    assert mt.beam_search(model, src, 5, 1.0, 12) != greedy
    assert mt.beam_search(model, src, 1, 1.0, 12) == greedy


def test_attention_equals_multihead_attention():
    torch.manual_seed(0)
    mine, theirs = mt.Attention(16, 4), nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": torch.cat([mine.query.weight, mine.key_value.weight]),
                            "out_proj.weight": mine.out.weight})
    x, memory, real = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.ones(2, 7).bool()
    real[1, 4:] = False
    mask = real[:, None, None]
    y, weights = theirs(x, memory, memory, key_padding_mask=~real, average_attn_weights=False)
    assert torch.allclose(mine(x, mine.keys_and_values(memory), mask), y, atol=1e-6)
    assert torch.allclose(mine.weights(x, mine.keys_and_values(memory)[0], mask), weights, atol=1e-6)
    y, _ = theirs(memory, memory, memory, key_padding_mask=~real)
    assert torch.allclose(mine(memory, mine.keys_and_values(memory), mask), y, atol=1e-6)
    y, _ = theirs(x, x, x, attn_mask=torch.ones(5, 5).triu(1).bool())
    assert torch.allclose(mine(x, mine.keys_and_values(x), torch.ones(5, 5).tril().bool()), y, atol=1e-6)


def test_layers_equal_pytorchs():
    """Encoder and decoder layers with nn.TransformerEncoderLayer's and nn.TransformerDecoderLayer's weights."""
    torch.manual_seed(0)
    how = {"dropout": 0.0, "batch_first": True, "norm_first": True, "bias": True}
    pairs = [(mt.EncoderLayer(16, 4, 32, 0.0), nn.TransformerEncoderLayer(16, 4, 32, **how)),
             (mt.DecoderLayer(16, 4, 32, 0.0), nn.TransformerDecoderLayer(16, 4, 32, **how))]
    x, y, real = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.ones(2, 5).bool()
    real[1, 3:] = False
    for mine, theirs in pairs:
        for p in theirs.parameters():
            nn.init.normal_(p, 0, 0.3) if p.dim() > 1 else nn.init.zeros_(p)
        norms = [mine.attention_norm, *([mine.cross_norm] if hasattr(mine, "cross") else []), mine.feed_forward_norm]
        for number, norm in enumerate(norms, 1):
            nn.init.normal_(norm.weight)
            getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())
        blocks = [(mine.attention, theirs.self_attn)] + ([(mine.cross, theirs.multihead_attn)] if len(norms) == 3 else [])
        with torch.no_grad():
            for block, other in blocks:
                block.query.weight.copy_(other.in_proj_weight[:16])
                block.key_value.weight.copy_(other.in_proj_weight[16:])
                block.out.weight.copy_(other.out_proj.weight)
        mine.feed_forward[0].load_state_dict(theirs.linear1.state_dict())
        mine.feed_forward[2].load_state_dict(theirs.linear2.state_dict())
    (encoder, other_encoder), (decoder, other_decoder) = pairs
    mask = real[:, None, None]
    expected = other_encoder(x, src_key_padding_mask=~real)
    assert torch.allclose(encoder(x, mask)[real], expected[real], atol=1e-5)
    expected = other_decoder(y, x, tgt_mask=torch.ones(7, 7).triu(1).bool(), memory_key_padding_mask=~real)
    memory = decoder.cross.keys_and_values(x)
    whole, past = decoder(y, memory, mask)
    assert torch.allclose(whole, expected, atol=1e-5)
    parts, past = [], None  # three tokens, then one by one
    for part in y.split([3, 1, 1, 1, 1], 1):
        out, past = decoder(part, memory, mask, past)
        parts.append(out)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-5)


def test_losses_equal_pytorchs():
    torch.manual_seed(0)
    logits, tgt = torch.randn(4, 3, 7), torch.tensor([[4, 5, 2], [4, 2, 0]]).repeat(2, 1)
    entropy = nn.functional.cross_entropy(logits.flatten(0, 1), tgt.flatten(), ignore_index=0, reduction="sum", label_smoothing=0.3)
    assert mt.loss_sums(logits, tgt, 0.3)["loss"].item() == pytest.approx(entropy.item(), rel=1e-5)
    p, q = logits.double().softmax(-1).chunk(2)
    kl = nn.functional.kl_div
    divergence = sum((kl(q[i, j].log(), p[i, j], reduction="sum") + kl(p[i, j].log(), q[i, j], reduction="sum")) / 2
                     for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)))
    sums = mt.loss_sums(logits, tgt, 0.3, 5.0)
    assert sums["rdrop"].item() == pytest.approx(divergence.item(), rel=1e-5)
    assert sums["loss"].item() == pytest.approx((entropy + 5 * divergence).item() / 2, rel=1e-5)


def test_positions_and_learning_rate():
    table = mt.sinusoids(50, 8)
    for pos in range(50):
        for i in range(4):
            angle = pos / 10000 ** (2 * i / 8)
            assert table[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)
    cfg = mt.Config(lr=2.0, warmup=100)
    assert [mt.learning_rate(cfg, s, 1000) for s in (1, 50, 500, 1000)] == pytest.approx([0.02, 1.0, 1.0, 0.0])


def test_it_memorises_twenty_sentences():
    torch.manual_seed(0)
    src, tgt = torch.randint(4, 40, (20, 6)), torch.randint(4, 40, (20, 8))
    tgt[:, -1] = mt.EOS
    net = mt.Transformer(40, 64, 4, 2, 128, 0.0)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(250):
        logits = net(src, nn.functional.pad(tgt, (1, -1), value=mt.BOS))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tgt.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mt.greedy_decode(net.eval(), src, 12) == tgt[:, :-1].tolist()
    assert mt.beam_search(net, src, 4, 1.0, 12) == tgt[:, :-1].tolist()


def test_batches_hold_every_pair_once():
    dice = np.random.default_rng(0)
    src, tgt = ([[*dice.integers(4, 90, dice.integers(1, 15)).tolist(), mt.EOS] for _ in range(333)] for _ in range(2))
    src[5] = [*range(4, 104), mt.EOS]  # long beside its translation
    seen = []
    for x, y, tokens in mt.make_batches(src, tgt, 120, torch.device("cpu")):
        assert tokens == (y != mt.PAD).sum() and max(x.numel(), y.numel()) <= 120
        assert not (y[:, -1] == mt.PAD).all() and not (x[:, -1] == mt.PAD).all()
        rows = [[[i for i in row if i != mt.PAD] for row in side.tolist()] for side in (x, y)]
        seen += list(zip(*rows))
    assert sorted(seen) == sorted(zip(src, tgt))
    [(x, y, tokens)] = mt.make_batches(src[:1], tgt[:1], 1, torch.device("cpu"))  # a pair larger than the budget
    assert (x.tolist(), y.tolist(), tokens) == (src[:1], tgt[:1], len(tgt[0]))


def test_an_epoch_has_every_pair_once_in_another_order(files, monkeypatch):
    _, box = captured("transformer_mt", f"{SMALL} --batch_size 60 --train_src a --train_tgt b".split())
    fetch, orders = box["fetch"], []
    pairs = len(mt.load_data(mt.Config(data="own", train_src="a", train_tgt="b"))["train"][0])
    length = next(n for n in range(1, 99) if sum(len(fetch(step)[0]) for step in range(1, n + 1)) == pairs)
    for epoch in range(2):
        seen = []
        for step in range(epoch * length + 1, (epoch + 1) * length + 1):
            x, y, tokens = fetch(step)
            seen += list(zip(x.tolist(), y.tolist()))
            shares = []
            for rank in range(2):
                monkeypatch.setattr(mt, "RANK", rank)
                monkeypatch.setattr(mt, "WORLD", 2)
                part = fetch(step)
                assert part[2] == tokens
                shares += part[1].tolist()
            monkeypatch.setattr(mt, "RANK", 0)
            monkeypatch.setattr(mt, "WORLD", 1)
            assert sorted(shares) == sorted(y.tolist())
        orders.append(seen)
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1] and len(orders[0]) == pairs


def test_the_demo_is_german():
    english, german = mt.demo_pairs(2000)
    assert len(set(english)) == 2000 and (english, german) == tuple(mt.demo_pairs(2000))
    text = "\n".join(german)
    for _, noun, gender in map(str.split, mt.BEINGS + mt.THINGS + mt.PLACES):
        for article in re.findall(rf"\b(\w+) {noun}\b", text.lower(), re.I):
            allowed = {"m": "der den dem ein einen einem", "f": "die der eine einer", "n": "das dem ein einem"}[gender]
            assert article in allowed.split(), (article, noun)
    assert " den Hund" in text and " einem Garten" in text and " eine Katze" in text
    finite, infinitives = ({verb.split()[n] for verb in mt.VERBS} for n in (2, 3))
    for e, g in zip(english, german):
        if " because " in e:
            assert g.split()[-1].rstrip(".") in finite and ", weil " in g
        elif g.split()[1] in finite:  # second, behind the time
            assert g.split()[0].lower() in {t.split()[1] for t in mt.TIMES}
        else:
            assert g.split()[-1].rstrip(".") in infinitives


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side, lines in zip("ab", mt.demo_pairs(60)):
        (tmp_path / side).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return tmp_path


def test_bad_files(files, refuses, monkeypatch):
    own = f"{SMALL} --train_src a --train_tgt "
    refuses("transformer_mt", own + "missing", "missing")
    (files / "short").write_text("eins\nzwei\n")
    refuses("transformer_mt", own + "short", "60 lines", "short 2")
    for nothing in ("", "\n\n"):
        (files / "empty").write_text(nothing)
        refuses("transformer_mt", own + "empty", "is empty")
    (files / "latin").write_bytes((files / "b").read_bytes().replace("ü".encode(), b"\xfc", 1))
    refuses("transformer_mt", own + "latin", "latin", "not UTF-8")
    (files / "cut.gz").write_bytes(gzip.compress((files / "b").read_bytes())[:-40])
    refuses("transformer_mt", own + "cut.gz", "cut.gz", "truncated")
    for name in "cd":
        (files / name).write_text("Ja .\n" * 5)
    refuses("transformer_mt", f"{SMALL} --train_src c --train_tgt d", "too few")
    refuses("transformer_mt", f"{SMALL} --train_src a", "--train_tgt")
    refuses("transformer_mt", f"{SMALL} --data nowhere", "nowhere", "--train_src")
    refuses("transformer_mt", own + "b --beam_size 0", "--beam_size")
    for length in (2, 1025):
        refuses("transformer_mt", own + f"b --max_len {length}", "--max_len", "3 to 1024")
    for name, side in zip("ef", "ab"):  # 60 lines, but 6 different ones
        (files / name).write_text("\n".join((files / side).read_text().splitlines()[:6] * 10))
    refuses("transformer_mt", f"{SMALL} --train_src e --train_tgt f", "6 different", "too few")
    raw = files / "data" / "multi30k" / "raw"
    raw.mkdir(parents=True)
    litter(raw, "train.en.gz")  # which is no test split, either
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, digest, progress: asked.append((path.name, digest)))
    asked = []
    for name in ("train.en", "train.de", "val.en", "val.de"):
        (raw / f"{name}.gz").write_bytes(gzip.compress(b"Ja .\n"))
    refuses("transformer_mt", f"{SMALL} --data multi30k", "no test split")
    assert asked == [(name, mt.DIGESTS[name]) for name in ("test_2016_flickr.en.gz", "test_2016_flickr.de.gz")]
    refuses("transformer_mt", f"{SMALL} --data multi30k-tok", "multi30k/tok", "data/README.md")
    for size in (10, 2**31):
        refuses("transformer_mt", own + f"b --vocab_size {size}", "--vocab_size")


def test_own_files_from_training_to_translation(files, call, refuses, monkeypatch):
    long = (files / "a").read_text().splitlines()
    long[0] = " ".join(long[0].split() * 20)
    (files / "a").write_text("".join(f"{line}\n" for line in long))
    wide = SMALL.replace("--vocab_size 120", "--vocab_size 100000")  # larger than the text supports
    status, out, err = call("transformer_mt", f"{wide} --train_src a --train_tgt b")
    assert status == 0 and "final test bleu" in out and "are cut" in out, err
    pipe = lambda raw: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))  # noqa: E731
    pipe(("The old man.\n\n漢字 Ω ☃\n   \n" + "very " * 200 + "\n").encode())
    status, out, err = call("transformer_mt", "translate")
    lines = out.split("\n")
    assert status == 0 and len(lines) == 6 and lines[1] == lines[3] == lines[5] == "" and "checkpoint:" in err
    assert "cut" in err
    pipe(b"")
    assert call("transformer_mt", "translate")[:2] == (0, "")
    pipe(b"A man.\n\xff\n")
    status, out, _ = call("transformer_mt", "translate")
    assert status == 0 and len(out.splitlines()) == 2
    assert call("transformer_mt", ["translate", ""])[:2] == (0, "\n")
    status, out, err = call("transformer_mt", ["translate", "very " * 200])
    assert status == 0 and len(out.splitlines()) == 1 and "cut" in err
    status, out, _ = call("transformer_mt", ["translate", "--beam_size", "3", "a man", "a dog"])
    assert status == 0 and len(out.splitlines()) == 2
    refuses("transformer_mt", "translate --max_len 1 --beam_size 1 hello", "--max_len", "3 to 1024")


def test_pieces_are_no_formulas_in_the_picture(files, call):
    for side in "ab":
        text = (files / side).read_text().replace(" ", " $$ ")
        (files / side).write_text(text)
    assert call("transformer_mt", f"{SMALL} --train_src a --train_tgt b")[0] == 0


def test_eval_writes_what_sacrebleu_scores(files, call):
    assert call("transformer_mt", f"{SMALL} --train_src a --train_tgt b")[0] == 0
    status, out, _ = call("transformer_mt", "eval")
    hyps = (files / "out/transformer_mt-own/test.hyp.txt").read_text(encoding="utf-8").splitlines()
    data = mt.load_data(mt.Config(data="own", train_src="a", train_tgt="b"))
    expected = sacrebleu.corpus_chrf(hyps, [data["test"][1]]).score
    assert status == 0 and float(re.search(r"chrf ([\d.]+)", out)[1]) == pytest.approx(expected, rel=1e-5)
    for name, side in zip("cd", "ab"):  # other files than those of the training
        (files / name).write_text("\n".join((files / side).read_text().splitlines()[:36]))
    assert call("transformer_mt", "eval --train_src c --train_tgt d")[0] == 0
    assert len((files / "out/transformer_mt-own/test.hyp.txt").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.skipif(not mt.Path(mt.__file__).with_name("data").joinpath("multi30k").exists(), reason="data/multi30k is not there")
def test_real_multi30k_is_read(monkeypatch):
    monkeypatch.chdir(mt.Path(mt.__file__).parent)
    for name in ("multi30k", "multi30k-tok"):
        data = mt.load_data(mt.Config(data=name))
        sizes = {split: len(side) for split, pair in data.items() for side in pair}
        assert sizes["train"] == 29000 and sizes["val"] == 1014 and sizes["test_2016_flickr"] == 1000
