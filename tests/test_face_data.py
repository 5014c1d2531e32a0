"""convnext_face.py's files and modes: folders of people, the course's task, LFW's pairs, what is refused."""
import json
import shutil

import convnext_face as face
import numpy as np
import pytest
import torch
from conftest import ROOT, flags, litter
from forks import fork, fork_two
from PIL import Image

NAME = "convnext_face"
SMALL = "--device cpu --compile off --size mini --stem_stride 2 --image_size 16 --batch_size 16 --max_steps 2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The best.pt of a very short run."""
    folder = tmp_path_factory.mktemp("run")
    face.main(f"--data demo {SMALL} --out {folder}".split())
    return folder / "best.pt"


def test_augmentation_is_drawn_per_sample():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 32, 32).expand(40, -1, -1, -1)
    out = face.augment(x, 1.0)
    assert out.shape == x.shape and 0 <= out.min() and out.max() <= 1
    assert len({row.numpy().tobytes() for row in out}) == 40
    assert torch.equal(face.augment(x, 0.0), x)
    plain = face.augment(x, 1e-9)  # only flips are left
    straight = (plain - x).abs().amax((1, 2, 3)) < 1e-3
    assert 8 < straight.sum() < 32
    torch.testing.assert_close(plain[~straight].flip(3), x[~straight], atol=1e-3, rtol=0)


def test_demo_is_learnable_but_not_trivial():
    data = face.load_data(face.Config(data="demo", image_size=16))
    assert [len(data[part][1]) for part in ("train", "val", "test", "unseen")] == [2400, 500, 500, 600]
    every = torch.cat([data[part][0] for part in ("train", "val", "test", "unseen")])
    assert len({x.numpy().tobytes() for x in every}) == 4000
    pixels, owners = data["unseen"][0].flatten(1).float(), data["unseen"][1]
    z = torch.nn.functional.normalize(pixels - pixels.mean(0))
    i, j = torch.triu_indices(len(z), len(z), 1)
    assert face.verification_metrics((z @ z.T)[i, j], owners[i] == owners[j])["eer"] > 0.3  # pixels alone do not solve it
    assert (owners[: data["known"]].bincount() == 1).all()


def photo(path, shade, size=20, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(abs(hash(str(path))) % 2**32)
    array = np.clip(rng.normal(shade, 20, (size, size, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(array).convert(mode).save(path)


@pytest.fixture
def people(tmp_path):
    """A folder of three people, six images each."""
    for i in range(3):
        for k in range(6):
            photo(tmp_path / f"people/p{i}/{k}.png", 60 + 60 * i)
        litter(tmp_path / f"people/p{i}", "0.png")
    litter(tmp_path / "people", "0.png")
    return tmp_path / "people"


def test_images_of_all_kinds(tmp_path):
    kinds = {"L": "png", "RGBA": "png", "CMYK": "jpg", "P": "png", "1": "png", "LA": "png"}
    for mode, end in kinds.items():
        Image.new("RGB", (30, 20), (200, 200, 200)).convert(mode).save(tmp_path / f"{mode}.{end}")
        [out], _ = face.read_faces([tmp_path / f"{mode}.{end}"], 16)
        assert out.shape == (3, 16, 16) and out.dtype == torch.uint8 and abs(out.float().mean() - 200) < 60
    big = np.zeros((250, 250, 3), np.uint8)
    big[69:181, 69:181] = 255
    Image.fromarray(big).save(tmp_path / "big.png")
    small, large = (face.read_faces([tmp_path / "big.png"], 112, lfw)[0].float() for lfw in (True, False))
    assert small.min() == 255 > large.mean()
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    with pytest.raises(face.UserError, match="DecompressionBombError"):
        face.read_faces([tmp_path / "bomb.png"], 16)


def test_folder_of_people(people, call, refuses, tmp_path):
    (people / "nobody").mkdir()
    photo(people / "p3/only.png", 100)
    status, out, err = call(NAME, f"--data people {SMALL}")
    assert status == 0 and "13 train of 4 people" in out, err
    assert "verified that are trained on" in out
    assert "eer" in out and torch.load(tmp_path / "out/convnext_face-people/best.pt", weights_only=True)["threshold"] != 0.5
    (people / "p3").rename(people / "p4")
    refuses(NAME, f"--data people {SMALL} --resume", "other people", "start anew")
    (people / "p4").rename(people / "p3")


def test_people_are_divided_in_their_order():
    people = {f"{i}/{k}": f"person {i}" for i in range(30) for k in range(5)}
    splits = face.divide(people)
    assert {name: len(part) for name, part in splits.items()} == {"train": 81, "val": 27, "test": 27, "unseen": 15}
    assert {path: name for part in splits.values() for path, name in part.items()} == people
    for name, part in splits.items():
        assert list(part) == [path for path in people if path in part], name


def test_twenty_people_leave_some_unseen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(21):
        for k in range(4):
            photo(tmp_path / f"crowd/n{i:02}/{k}.png", 10 * i)
    data = face.load_data(face.Config(data="crowd", image_size=16))
    assert len(data["classes"]) == 19 and data["known"] == 2 and len(data["unseen"][1]) == 8
    assert {name.split("/")[0] for name in data["names"]} == {"n09", "n19"}
    assert [len(data[split][1]) for split in ("train", "val", "test")] == [38, 19, 19]


def test_what_verifies_comes_from_all_people(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(200):
        for k in range(150 if i % 10 == 9 else 3):
            path = tmp_path / f"crowd/n{i:03}/{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    monkeypatch.setattr(face, "read_faces", lambda paths, *_, **how: (torch.zeros(len(paths), 3, 1, 1), paths))
    data = face.load_data(face.Config(data="crowd", image_size=16))
    owners = [name.split("/")[0] for name in data["names"]]
    assert data["known"] == 10 and len(owners) == 1500 and set(owners[:10]) == set(owners[10:])  # half of 3,000
    assert sorted(set(owners))[::9] == ["n009", "n189"]


def test_unreadable_images(people, call, refuses):
    for i in range(25):
        photo(people / f"p1/more{i}.png", 120)
    (people / "p2/broken.jpg").write_bytes(b"\xff\xd8 but no more")
    status, out, _ = call(NAME, f"--data people {SMALL}")
    assert status == 0 and "unreadable, skipped" in out and "broken.jpg" in out
    for i in range(5):
        (people / f"p2/bad{i}.png").write_bytes(b"")
    refuses(NAME, f"--data people --out new {SMALL}", "bad0.png", "limit: 5 %")


def test_bad_folders(tmp_path, refuses):
    refuses(NAME, "--data nowhere", "nowhere")
    (tmp_path / "empty").mkdir()
    refuses(NAME, f"--data empty {SMALL}", "empty", "0 people")
    for k in range(5):
        photo(tmp_path / f"single/me/{k}.png", 90)
    refuses(NAME, f"--data single {SMALL}", "single", "1 people")
    for name in "ab":
        photo(tmp_path / f"lone/{name}/0.png", 90)
    refuses(NAME, f"--data lone {SMALL}", "three images")


@pytest.fixture
def hw2p2(tmp_path):
    """The layout of HW2P2: 4 people to learn, 3 known, 9 images of those to name, 2 without a name."""
    one = tmp_path / "task/11-785-f22-hw2p2-classification/classification"
    two = tmp_path / "task/11-785-f22-hw2p2-verification/verification"
    for i in range(4):
        for k in range(6):
            photo(one / f"{'train' if k < 4 else 'dev'}/n{i}/{k}.jpg", 50 * i)
    photo(one / "test/00000.jpg", 70)
    rows = ["id,label"]
    for i in range(3):
        photo(two / f"known/k{i}/0.jpg", 20 + 90 * i)
        for k in range(3):
            photo(two / f"unknown_dev/{3 * i + k:06}.jpg", 20 + 90 * i)
            rows.append(f"{3 * i + k},k{i}")
    for k in range(2):
        photo(two / f"unknown_test/{k:06}.jpg", 20)
    (two / "dev_identities.csv").write_text("\n".join(rows) + "\n")
    for place in (one / "train", one / "dev/n0", two / "known", two / "unknown_dev", two / "unknown_test"):
        litter(place, "000000.jpg")
    return two


def test_hw2p2(hw2p2, call, refuses):
    status, out, err = call(NAME, f"--data task {SMALL} --out run")
    assert status == 0 and "16 train of 4 people, 8 val, 8 test, 12 to verify" in out and "ident" in out, err
    status, out, err = call(NAME, "eval --ckpt run/best.pt --save csv")
    assert status == 0, err
    lines = open("csv/verification_submission.csv").read().splitlines()
    assert lines[0] == "id,label" and [line.split(",")[0] for line in lines[1:]] == ["0", "1"]
    assert {line.split(",")[1] for line in lines[1:]} <= {"k0", "k1", "k2"}
    [file, label] = open("csv/classification_submission.csv").read().splitlines()[1].split(",")
    assert file == "00000.jpg" and label in "0123"  # the place of the class in the order of their names
    pairs = open("csv/pairs.csv").read().splitlines()
    assert len(pairs) == 1 + 12 * 11 // 2 and pairs[0] == "a,b,same,score"
    scores, same = zip(*((float(line.split(",")[3]), int(line.split(",")[2])) for line in pairs[1:]))
    assert sum(same) == 3 * 6 and f"auc {100 * face.verification_metrics(scores, same)['auc']:.2f}"[:7] in out
    identities = hw2p2 / "dev_identities.csv"
    good = identities.read_text()
    identities.write_text(good.replace("4,k1", "4;k1"))
    refuses(NAME, f"--data task {SMALL}", "dev_identities.csv", "KeyError(4)")
    identities.write_text(good.replace("8,k2\n", ""))
    refuses(NAME, f"--data task {SMALL}", "dev_identities.csv", "each of 9 images", "KeyError(8)")
    shutil.rmtree(hw2p2 / "known/k0")
    identities.write_text(good)
    status, out, _ = call(NAME, f"--data task {SMALL} --out less")
    assert status == 0 and "8 to verify" in out
    (hw2p2 / "known/k1").rename(hw2p2 / "known/n1")
    status, out, _ = call(NAME, f"--data task {SMALL}")
    assert status == 0 and "1 people are verified that are trained on: n1" in out
    for folder in ("k2", "n1"):
        shutil.rmtree(hw2p2 / "known" / folder)
    refuses(NAME, f"--data task --out new {SMALL}", "0 to verify", "one sub-folder", "per person")


def test_recipe_for_the_full_hw2p2(hw2p2, call, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "task").rename(tmp_path / "data/hw2p2")
    status, out, err = call(NAME, f"--data hw2p2-full {SMALL}")
    assert status == 0 and "16 train of 4 people" in out and "out/convnext_face-hw2p2-full" in out, err
    config = torch.load("out/convnext_face-hw2p2-full/last.pt", weights_only=True)["config"]
    assert config["ema"] == 0.9999 and config["epochs"] == 60 and config["size"] == "mini"


# ------------------------------------------------------------------------------------------------- pairs
@pytest.fixture
def lfw(tmp_path):
    """Images of five people."""
    for i in range(5):
        for k in range(1, 5):
            photo(tmp_path / f"lfw/P_{i}/P_{i}_{k:04}.jpg", 20 + 50 * i)
    same = [f"P_{i}\t1\t{k}" for i in range(5) for k in (2, 3)]
    other = [f"P_{i}\t1\tP_{(i + 1) % 5}\t{k}" for i in range(5) for k in (2, 3)]
    (tmp_path / "pairsDevTest.txt").write_text("\n".join(["10", *same, *other]) + "\n")
    folds = [line for k in range(5) for line in same[2 * k : 2 * k + 2] + other[2 * k : 2 * k + 2]]
    (tmp_path / "pairs.txt").write_text("\n".join(["5\t2", *folds]) + "\n")
    return tmp_path


def test_pairs(lfw, trained, call):
    benchmark = f"eval --ckpt {trained} --images lfw --save csv --pairs"
    shutil.copy(lfw / "pairsDevTest.txt", lfw / "pairsDevTrain.txt")
    status, out, err = call(NAME, f"{benchmark} pairsDevTest.txt")
    assert status == 0 and "chosen on pairsDevTrain.txt" in out and "n 20" in out, err
    rows = [line.split(",") for line in open("csv/pairs.csv").read().splitlines()[1:]]
    scores, same = [float(row[3]) for row in rows], [int(row[2]) for row in rows]
    assert sum(same) == 10 and rows[0][:2] == ["P_0_0001.jpg", "P_0_0002.jpg"]
    best = max(np.mean([(v >= t) == s for v, s in zip(scores, same)]) for t in [*scores, 2])
    assert f"acc {100 * best:.6g}," in out
    status, out, _ = call(NAME, f"{benchmark} pairs.txt")
    assert status == 0 and "se " in out and "threshold" not in out
    read = face.read_pairs(lfw / "pairs.txt", lfw / "lfw")
    assert [pair[3] for pair in read] == [k for k in range(5) for _ in range(4)]
    assert (lfw / "csv/roc.png").stat().st_size > 1000


@pytest.mark.parametrize("line", ["P_0\t1", "P_0\tone\t2", "P_0\t1\tP_1", "P_0\t1\tP_1\tx", "P_0 1 P_1 2 3", "a b c d e"])
def test_malformed_pairs(line, lfw, trained, refuses):
    lines = (lfw / "pairsDevTest.txt").read_text().splitlines()
    lines[4] = line
    (lfw / "bad.txt").write_text("\n".join(lines))
    refuses(NAME, f"eval --ckpt {trained} --save csv --images lfw --pairs bad.txt", "bad.txt, line 5")


def test_pairs_that_do_not_fit(lfw, trained, refuses):
    start = f"eval --ckpt {trained} --save csv --images lfw --pairs"
    for text, words in {"": ["line 1"], "many\n": ["line 1"], "3\nP_0\t1\t2\n": ["1 pairs", "3 of one person"],
                        "1 2 3\n": ["line 1"], "0\nP_0\t1\t2\n": ["line 2"]}.items():
        (lfw / "bad.txt").write_text(text)
        refuses(NAME, f"{start} bad.txt", "bad.txt", *words)
    refuses(NAME, f"{start} none.txt", "none.txt")
    lines = (lfw / "pairs.txt").read_text().splitlines()
    (lfw / "bad.txt").write_text("\n".join([lines[0], *sorted(lines[1:], key=len)]))  # those of one person first
    refuses(NAME, f"{start} bad.txt", "bad.txt, line 4")
    refuses(NAME, f"eval --ckpt {trained} --pairs pairs.txt", "P_0/P_0_0001.jpg", "missing")
    (lfw / "lfw/P_2/P_2_0003.jpg").unlink()
    refuses(NAME, f"{start} pairsDevTest.txt", "P_2_0003.jpg", "missing")
    (lfw / "lfw/P_2/P_2_0003.jpg").write_bytes((lfw / "lfw/P_2/P_2_0002.jpg").read_bytes())
    refuses(NAME, f"{start} pairsDevTest.txt", "pairsDevTrain.txt")
    refuses(NAME, f"eval --ckpt {trained} --data lfw", "other people")


# ------------------------------------------------------------------------------------------------- the rest
def test_verify_and_identify(people, trained, call, refuses):
    ask = f"--ckpt {trained}"
    status, out, err = call(NAME, f"verify people/p0/0.png people/p0/0.png {ask}")
    answer = json.loads(out)
    assert status == 0 and answer["cosine"] == pytest.approx(1) and answer["same"] is True, err
    status, out, err = call(NAME, f"identify people people/p2/3.png people/p0/1.png {ask}")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [a["ranked"][0] for a in answers] == [["p2", 1.0], ["p0", 1.0]], err
    refuses(NAME, f"verify people/p0/0.png {ask}", "IMAGE IMAGE")
    refuses(NAME, f"verify people/p0/0.png people/none.png {ask}", "none.png")
    refuses(NAME, f"identify people {ask}", "GALLERY IMAGE")
    refuses(NAME, f"identify people/p0 people/p0/0.png {ask}", "sub-folders")
    (people / "text.png").write_text("no image")
    refuses(NAME, f"identify people people/text.png {ask}", "text.png")


def test_given_splits(tmp_path, call, refuses):
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for i in range(3):
            for k in range(count):
                photo(tmp_path / f"set/{split}/p{i}/{k}.png", 60 + 60 * i)
    status, out, err = call(NAME, f"--data set {SMALL}")
    assert status == 0 and "12 train of 3 people, 6 val, 9 test, 15 to verify" in out and "n 9," in out, err
    rows = (tmp_path / "out/convnext_face-set/classes.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["p0"] * 3 + ["p1"] * 3 + ["p2"] * 3
    assert not list((tmp_path / "out/convnext_face-set").glob("*submission.csv"))
    data = face.load_data(face.Config(data="set", image_size=16))
    [mine], _ = face.read_faces([tmp_path / "set/test/p1/2.png"], 16)
    assert torch.equal(data["test"][0][5], mine) and data["test"][1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    (tmp_path / "set/test/p1").rename(tmp_path / "set/test/stranger")
    refuses(NAME, f"--data set --out new {SMALL}", "test", "2 are in one only: p1, stranger")
    shutil.rmtree(tmp_path / "set/test")
    for k in range(2):
        photo(tmp_path / f"set/test/{k}.png", 90)  # a test split without labels
    status, out, err = call(NAME, f"--data set --out new {SMALL}")
    assert status == 0 and "6 val, 6 test" in out and len(open("new/classification_submission.csv").readlines()) == 3, err
    shutil.rmtree(tmp_path / "set/val")
    refuses(NAME, f"--data set --out other {SMALL}", "train and val or dev must have the same people", "3 are in one only")


def test_identities_go_by_number(tmp_path):
    files = sorted(tmp_path / f"{i:06}.jpg" for i in (*range(10, 12), *range(10)))
    expected = {file: f"p{int(file.stem)}" for file in files}
    (tmp_path / "ids.csv").write_text("id,label\n" + "".join(f"{i},p{i}\n" for i in range(12)), encoding="utf-8-sig")
    assert face.read_identities(tmp_path / "ids.csv", files) == expected
    (tmp_path / "ids.csv").write_text("label,id\n" + "".join(f"p{i},{i}\n" for i in range(12)))
    assert face.read_identities(tmp_path / "ids.csv", files) == expected


def test_centers_on_two_processes_equal_those_on_one(tmp_path):
    quiet = flags(NAME, "--drop_path 0 --augment 0 --dtype float32 --max_steps 3 --lr 0.01 --warmup 1 --center_weight 0.1")
    ranks = [fork(NAME, [*quiet, "--out", "one"], tmp_path), *fork_two(NAME, [*quiet, "--out", "two"], tmp_path)]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], "".join(rank.stderr for rank in ranks)
    one, two = (torch.load(tmp_path / out / "last.pt", weights_only=True)["centers"]["centers"] for out in ("one", "two"))
    assert one.abs().max() > 0.1
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_two_optimizers_resume_bitwise(call):
    """Muon has the blocks' matrices of micro in bfloat16, AdamW the rest, and all of them without."""
    how = f"--data demo {SMALL.replace('mini', 'micro').replace('--max_steps 2', '')} --dtype bfloat16 --max_steps"
    assert call(NAME, f"{how} 4 --out whole")[0] == 0 and call(NAME, f"{how} 2 --out parts")[0] == 0
    status, out, err = call(NAME, f"{how} 4 --out parts --resume")
    assert status == 0 and "from step 2" in out, err
    whole, parts = (torch.load(f"{out}/last.pt", weights_only=True) for out in ("whole", "parts"))
    assert [len(whole[f"optimizer {i}"]["state"]) for i in range(2)] == [len(whole["model"]) - 16, 16]  # of 8 blocks
    for one, two in zip(whole["model"].values(), parts["model"].values()):
        assert torch.equal(one, two)
    assert call(NAME, f"{how.replace('bfloat16', 'float32')} 2 --out plain")[0] == 0
    assert "optimizer 1" not in torch.load("plain/last.pt", weights_only=True)


def test_bad_flags(refuses):
    refuses(NAME, "--size huge --data demo", "huge", "micro")
    refuses(NAME, "--loss triplet", "triplet", "arcface")


def test_real_hw2p2_and_lfw(call, tmp_path):
    real, pairs = ROOT / "data/hw2p2", ROOT / "data/lfw"
    if not real.exists() or not pairs.exists():
        pytest.skip("data/hw2p2 and data/lfw are not there")
    (tmp_path / "data/hw2p2").mkdir(parents=True)
    for part in real.glob("11-785*"):
        (tmp_path / "data/hw2p2" / part.name).symlink_to(part.resolve())
    status, out, err = call(NAME, f"{SMALL} --out run")  # --data auto
    assert status == 0 and "data: hw2p2" in out and "of 152 people" in out, err
    status, out, err = call(NAME, ["eval", "--ckpt", "run/best.pt", "--pairs", str(pairs / "pairsDevTest.txt"),
                                   "--images", str(pairs / "lfw-deepfunneled"), "--save", "lfw"])
    assert status == 0 and "chosen on" in out and "n 1000" in out, err
