"""las_asr.py's files, formats and modes: real sounds, four layouts of a data set, what is refused."""
import json
import shutil
import tarfile
import urllib.error

import las_asr as las
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, litter
from forks import fork, fork_two

SMALL = "--device cpu --compile off --hidden 8 --speller 8 --max_steps 2 --speed 0"


def test_log_mel_equals_one_in_numpy(tmp_path):
    t, rng = np.arange(16000) / 16000, np.random.default_rng(0)
    wave = rng.normal(size=16000) * 0.1 + np.sin(2 * np.pi * 1000 * t) * (t > 0.5)
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400), 56)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, 256, mode="reflect"), 512)[::160]
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    hertz = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82) / 2595) - 1)
    f = np.linspace(0, 8000, 257)[:, None]
    low, mid, high = hertz[:-2], hertz[1:-1], hertz[2:]
    triangles = np.maximum(0, np.minimum((f - low) / (mid - low), (high - f) / (high - mid)))
    expected = np.log(power @ triangles + 1e-6)
    x = las.log_mel(wave, 16000)
    assert x.shape == (101, 80) and np.allclose(x, expected, atol=2e-3)
    assert las.log_mel(np.stack([wave, wave]), 16000).allclose(x, atol=1e-4)
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    expected = (expected - expected.mean(0)) / np.maximum(expected.std(0, ddof=1), 1e-3)
    assert np.allclose(las.read_features(tmp_path / "a.wav"), expected, atol=2e-3)


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
    assert las.clean("it\u02bcs `n\u00b4") == "IT'S 'N'"
    for text, word in (("route 66", "6"), ("日本", "transcript"), ("", "empty"), (" ?! ", "empty"), ("''", "empty"), ("R&B", "&"), ("all %", "%"), ("100 m\u00b2", "0"), ("\u0142", "\u0141")):
        with pytest.raises(ValueError, match=word):
            las.clean(text)


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
    las.main(f"--data {folder} --out {folder}/run --device cpu --compile off --hidden 48 --speller 48 --speed 0 --dtype "
             "float32 --batch_size 900 --dropout 0 --specaugment 0 --teacher 1 --lr 5e-3 --warmup 20 "
             "--epochs 150 --eval_every 50 --log_every 50".split())
    return folder


def test_eight_utterances_are_memorised(eight):
    records = [json.loads(line) for line in (eight / "run" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["split"] == "test" and records[-1]["cer"] == records[-1]["wer"] == 0
    rows = (eight / "run" / "hypotheses.tsv").read_text().splitlines()
    assert rows == ["reference\thypothesis", *(f"{t}\t{t}" for t in SENTENCES)]
    assert (eight / "run" / "attention.png").stat().st_size > 5000


@pytest.mark.parametrize("rate", [0, 3999, 16001, 2**31 - 1])
def test_rates_that_no_microphone_has_are_refused(rate):
    """A resampling filter for 16,001 Hz would take gigabytes."""
    with pytest.raises(ValueError, match=f"rate of {rate} Hz"):
        las.log_mel(np.zeros(16000), rate)


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
    status, out, _ = call("las_asr", f"transcribe a.flac --ckpt {eight}/run/best.pt --device cpu")
    assert status == 0 and out == f"{SENTENCES[3]}\n"


def test_a_long_file_is_cut_and_joined(eight, call, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(las, "decode", lambda model, cfg, data, *_: (
        heard.extend(data.lengths), [f"PART {i}" for i in range(len(data.lengths))])[1])
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).normal(size=16000 * 4) * 0.1, 16000)
    status, out, _ = call("las_asr", f"transcribe long.wav --ckpt {eight}/run/best.pt --device cpu")
    longest = torch.load(eight / "run" / "best.pt", weights_only=True)["longest"]
    assert sum(heard) == 401 and max(heard) <= longest < 401 and max(heard) - min(heard) <= 1
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
    for name, word in (("none.wav", "frames"), ("silence.wav", "silent"), ("blip.wav", "frames"), ("nan.wav", "not finite"),
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

    refuses("las_asr", train("no tab here", out="a"), "my.tsv", "path and text", "no tab here")
    for i, (line, word) in enumerate((("gone.wav\tWORD", "gone.wav"), ("1.wav\tROUTE 66", "'6'"), ("2.wav\t", "empty"))):
        status, out, _ = call("las_asr", train(line, out=f"run{i}"))
        assert status == 0 and "1 of " in out and word in out  # skipped, counted, named
    refuses("las_asr", train(*["gone.wav\tWORD"] * 4, "0.wav\tROUTE 66", out="b"), "5 of 34", "4: no such file (first ",
            "gone.wav", "1: '6' in the transcript (first ", "0.wav")
    tsv.write_text("\ufeff" + "\r\n".join(["0.wav\tFOO\u2028BAR", *lines]), newline="")  # as a spreadsheet writes it
    assert las.read_list(tsv)[:2] == [(tmp_path / "0.wav", "FOO\u2028BAR"), (tmp_path / "0.wav", "WORD")]
    tsv.write_text("")
    refuses("las_asr", f"--data {tsv} {SMALL}", "no utterances")
    (tmp_path / "nothing").mkdir()
    refuses("las_asr", f"--data nothing {SMALL}", "nothing", "no utterances for train")


def test_lists_with_a_header_are_read_by_its_names(call, refuses, tmp_path):
    """Common Voice's columns and clips/, a header of two names in another order, and LJSpeech's metadata.csv."""
    lines = write_set(tmp_path)
    (tmp_path / "my.tsv").write_text("\n".join(lines))
    names = [line.split("\t")[0] for line in lines]
    voice = tmp_path / "cv"
    (voice / "clips").mkdir(parents=True)
    header = "client_id\tpath\tsentence_id\tsentence\tup_votes\tage\n"
    for split, chosen in (("train", names[:24]), ("dev", names[24:27]), ("test", names[27:])):
        for name in chosen:
            shutil.copy(tmp_path / name, voice / "clips" / name)
        (voice / f"{split}.tsv").write_text(header + "".join(f'f0\t{name}\t9\t"{split}," she said.\t2\t\n' for name in chosen))
    found = las.find_utterances(las.Config(data=str(voice)), voice)
    assert {split: len(items) for split, items in found.items()} == {"train": 24, "val": 3, "test": 3}
    assert found["test"][0] == (voice / "clips" / "27.wav", '"test," she said.')
    status, out, _ = call("las_asr", f"--data {voice} {SMALL} --out voice")
    assert status == 0 and "24 train, 3 val, 3 test" in out
    assert (tmp_path / "voice" / "hypotheses.tsv").read_text().splitlines()[1].startswith("TEST SHE SAID\t")
    for data, count in ((tmp_path / "my.tsv", 1), (voice, 3), (f"{tmp_path}/./cv", 3)):  # of a list its end is tested, of a folder its test set
        status, out, _ = call("las_asr", f"eval --ckpt voice/best.pt --data {data} --device cpu --save there")
        assert status == 0 and f"n {count}" in out and len((tmp_path / "there" / "hypotheses.tsv").read_text().splitlines()) == count + 1

    (tmp_path / "my.tsv").write_text("Text \tPath\r\n" + "".join(f"WORD {i}\t{name}\r\n" for i, name in enumerate(names)), newline="")
    assert las.read_list(tmp_path / "my.tsv")[3] == (tmp_path / "3.wav", "WORD 3")
    (tmp_path / "my.tsv").write_text("transcript\tfile\nWORD\t0.wav\n")
    refuses("las_asr", f"--data my.tsv {SMALL} --out other", "my.tsv", "no such file", "transcript")

    speech = tmp_path / "LJSpeech"
    (speech / "wavs").mkdir(parents=True)
    for i, name in enumerate(names):
        shutil.copy(tmp_path / name, speech / "wavs" / f"LJ-{i}.wav")
    (speech / "metadata.csv").write_text("".join(f'LJ-{i}|In 18, "he"|In eighteen, "he"\n' for i in range(29)) + "LJ-29|Plain\n")
    for data in (speech, speech / "metadata.csv"):
        found = las.find_utterances(las.Config(data=str(data)), data)
        assert found["train"][0] == (speech / "wavs" / "LJ-0.wav", 'In eighteen, "he"')
        assert found["val"] == [(speech / "wavs" / "LJ-29.wav", "Plain")]
    status, out, _ = call("las_asr", f"--data {speech} {SMALL} --out lj")
    assert status == 0 and "29 train, 1 val" in out and (speech / "cache").is_dir()
    for path in (speech / "wavs").iterdir():
        path.unlink()
    refuses("las_asr", f"--data {speech} {SMALL} --out gone", "29 of 29", "29: no such file (first ", "LJ-0.wav")


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
    shutil.rmtree(tmp_path / "cache")
    done = fork("las_asr", f"--data my.tsv {SMALL} --out d", tmp_path, limit=10000)  # a full disk
    assert done.returncode == 2 and done.stderr.startswith("error:") and "cannot be written" in done.stderr, done.stderr
    assert not [*(tmp_path / "cache").iterdir()]


def kaggle(folder, dim=13):
    rng = np.random.default_rng(0)
    for part, count in (("train-clean-100", 6), ("dev-clean", 3), ("test-clean", 4)):
        (folder / part / "mfcc").mkdir(parents=True)
        (folder / part / "transcript" / "raw").mkdir(parents=True)
        for i in range(count):
            np.save(folder / part / "mfcc" / f"u{i}.npy", rng.normal(size=(40 + i, dim)).astype("float32"))
            if part != "test-clean":
                np.save(folder / part / "transcript" / "raw" / f"u{i}.npy", np.array(["<sos>", *"IT'S A", "<eos>"]))
        litter(folder / part / "mfcc", "u0.npy")


def test_the_kaggle_layout(call, refuses, tmp_path):
    kaggle(tmp_path / "data" / "hw4p2")
    small = SMALL.replace("--speed 0", "--speed 0.2").split()
    status, out, _ = call("las_asr", ["--data", "hw4p2", *small])
    assert status == 0 and "6 train, 3 val; 13 features" in out
    refs = [row.split("\t")[0] for row in (tmp_path / "out" / "las_asr-hw4p2" / "hypotheses.tsv").read_text().splitlines()[1:]]
    assert refs == ["IT'S A"] * 3
    status, out, _ = call("las_asr", f"eval --data {tmp_path}/data/hw4p2 --device cpu --save there")  # by its path
    assert status == 0 and len((tmp_path / "there" / "hypotheses.tsv").read_text().splitlines()) == 4
    folder = tmp_path / "data" / "hw4p2" / "train-clean-100"
    np.save(folder / "mfcc" / "u1.npy", np.random.rand(40, 12))
    refuses("las_asr", ["--data", "hw4p2", *small, "--out", "new"], "hw4p2", "[12, 13] features")
    (folder / "transcript" / "raw" / "u1.npy").unlink()
    refuses("las_asr", ["--data", "hw4p2", *small, "--out", "new"], "u1.npy", "transcript")


def test_a_checkpoint_of_other_features(call, refuses, tmp_path):
    for name, dim in (("wide", 13), ("narrow", 7)):
        kaggle(tmp_path / name, dim)
        assert call("las_asr", f"--data {name} {SMALL} --out run-{name}")[0] == 0
    refuses("las_asr", "eval --ckpt run-wide/best.pt --data narrow --device cpu", "narrow", "[7, 13] features")


def libri(folder, parts):
    rng = np.random.default_rng(0)
    for speaker, part in enumerate(parts):
        inside = folder / "LibriSpeech" / part / f"{speaker}" / "7"
        inside.mkdir(parents=True)
        names = [f"{speaker}-7-000{i}" for i in range(3)]
        for name in names:
            soundfile.write(inside / f"{name}.flac", rng.normal(size=9000) * 0.1, 16000)
        (inside / f"{speaker}-7.trans.txt").write_text("".join(f"{name} ALL THE WORDS\n" for name in names))
        litter(inside, f"{speaker}-7.trans.txt")


def test_the_librispeech_layout(call, refuses, tmp_path):
    libri(tmp_path, ("train-clean-100", "dev-clean"))
    status, out, _ = call("las_asr", f"--data . {SMALL} --out run")
    assert status == 0 and "3 train, 3 val; 80 features" in out
    assert "ALL THE WORDS" in (tmp_path / "run" / "hypotheses.tsv").read_text()
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
    refuses("las_asr", f"--data librispeech {SMALL}", "no network")
    assert not (home / "LibriSpeech").exists()
    next((home / "download" / "LibriSpeech").rglob("*.flac")).unlink()  # as if killed while it unpacked
    down.clear()
    status, out, _ = call("las_asr", f"--data librispeech {SMALL}")
    assert status == 0 and "3 train, 3 val, 3 test; 80 features" in out
    assert asked == ["train-clean-100", "dev-clean", "dev-clean", "test-clean"]  # what has arrived is kept


@pytest.mark.skipif(not (ROOT / "data" / "librispeech").exists(), reason="data/librispeech is not there")
def test_real_flac_utterances(call, tmp_path):
    folder = ROOT / "data" / "librispeech"
    found = las.find_utterances(las.Config(data=str(folder)), folder)
    assert len(found["train"]) + len(found["val"]) == 44
    path, text = found["val"][0]
    x = las.read_features(path)
    assert x.shape[1] == 80 and len(x) == pytest.approx(soundfile.info(path).duration * 100, abs=2)
    assert las.clean(text) == text


def test_two_processes_write_the_same_hypotheses(tmp_path):
    kaggle(tmp_path / "data" / "hw4p2")
    small = f"--data hw4p2 {SMALL} --dtype float32 --max_steps 1"
    ranks = [fork("las_asr", f"{small} --out one", tmp_path), *fork_two("las_asr", f"{small} --out two", tmp_path)]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], "".join(rank.stderr for rank in ranks)
    assert (tmp_path / "one" / "hypotheses.tsv").read_text() == (tmp_path / "two" / "hypotheses.tsv").read_text()
