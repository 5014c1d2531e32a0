"""convnext_face.py against independent computations."""
import json
import math
import shutil

import convnext_face as face
import numpy as np
import pytest
import torch
from conftest import ROOT, flags, python, torchrun
from test_house import driver
from PIL import Image

NAME = "convnext_face"
SMALL = "--device cpu --compile off --size mini --stem_stride 2 --image_size 16 --batch_size 16 --max_steps 2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The best.pt of a very short run."""
    folder = tmp_path_factory.mktemp("run")
    face.main(f"--data demo {SMALL} --out {folder}".split())
    return folder / "best.pt"


# ------------------------------------------------------------------------------------------------- model
def network(**how):
    torch.manual_seed(0)
    return face.ConvNeXt(7, (1, 1, 2, 1), (8, 16, 24, 32), **how)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_logits_equal_torchvisions(size):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = models.get_model(f"convnext_{size}", weights=None, num_classes=11).eval()
    for name, p in theirs.named_parameters():  # gammas of 1e-6 would hide what the blocks do
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 1 or "scale" in name else 0.02)
    ours = face.ConvNeXt(11, *face.SIZES[size]).eval()
    ours.load_torchvision(theirs.state_dict())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)


def test_load_torchvision_names_what_does_not_fit():
    models = pytest.importorskip("torchvision.models")
    state = models.convnext_tiny(weights=None).state_dict()
    with pytest.raises(RuntimeError, match="head.weight"):
        face.ConvNeXt(11).load_torchvision(state)


@pytest.mark.parametrize("stride", [2, 4])
def test_shapes_and_independence_of_the_batch(stride):
    model = network(stem_stride=stride, layer_scale=0.5).eval()
    x = torch.randn(5, 3, 64, 64)
    logits, features = model(x, True)
    assert logits.shape == (5, 7) and features.shape == (5, 32)
    assert model.downsample[0](x).shape == (5, 8, 64 // stride, 64 // stride)
    torch.testing.assert_close(model(x[3:4]), logits[3:4])
    torch.testing.assert_close(model.forward_features(x), features)


def test_block_equals_the_papers_formula():
    torch.manual_seed(0)
    block, x = face.Block(6, layer_scale=0.3), torch.randn(2, 6, 9, 9)
    h = block.norm(block.depthwise(x).movedim(1, 3))
    h = block.reduce(torch.nn.functional.gelu(block.expand(h))) * block.gamma
    torch.testing.assert_close(block(x), x + h.movedim(3, 1))
    h.square().sum().backward()
    slow, block.gamma.grad = block.gamma.grad, None
    (block(x) - x).square().sum().backward()
    torch.testing.assert_close(block.gamma.grad, slow)


@pytest.mark.parametrize("batch", [1, 5])
def test_depthwise_gradients_equal_autograds(batch):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 6, 7, padding=3, groups=6)
    x = torch.randn(batch, 6, 9, 13).contiguous(memory_format=torch.channels_last).requires_grad_()
    found, dy = [], torch.randn(batch, 6, 9, 13)
    for y in (conv(x), face.depthwise(x, conv)):
        found.append((y, *torch.autograd.grad(y, (x, conv.weight, conv.bias), dy)))
    for plain, ours in zip(*found):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert face.depthwise(x, conv).dtype == torch.bfloat16


def test_stochastic_depth_keeps_the_expectation():
    torch.manual_seed(0)
    block, x = face.Block(4, drop_path=0.4, layer_scale=1.0), torch.randn(1, 4, 6, 6)
    branch = block.eval()(x) - x
    out = block.train()(x.expand(20000, -1, -1, -1)) - x
    kept = out.abs().amax((1, 2, 3)) > 1e-6
    assert abs(kept.float().mean() - 0.6) < 0.02
    torch.testing.assert_close(out[kept], (branch / 0.6).expand(int(kept.sum()), -1, -1, -1), atol=1e-5, rtol=1e-4)
    assert torch.equal(network(drop_path_rate=0.3).train()(x := torch.randn(2, 3, 32, 32)), network()(x)) is False


def test_center_loss_and_its_update_by_hand():
    loss = face.CenterLoss(3, 2, alpha=0.5)
    loss.centers[:] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    x, y = torch.tensor([[1.0, 2.0], [3.0, 0.0], [2.0, 1.0]]), torch.tensor([0, 0, 1])
    # half the squared distances: (1 + 4) / 2, (9 + 0) / 2, (1 + 0) / 2
    assert loss(x, y).item() == pytest.approx((2.5 + 4.5 + 0.5) / 3)
    assert loss(x, y, "sum").item() == pytest.approx(7.5)
    loss.update(x, y)
    # center 0: sum of c - x is (-4, -2), over 1 + 2; center 1: (-1, 0), over 1 + 1
    expected = torch.tensor([[0.5 * 4 / 3, 0.5 * 2 / 3], [1.25, 1.0], [5.0, 5.0]])
    torch.testing.assert_close(loss.centers, expected)


def test_arcface_margin_equals_the_angle_formula():
    torch.manual_seed(0)
    cos, y = torch.rand(50, 6) * 0.6 - 0.995, torch.randint(6, (50,))
    out = face.add_margin(32 * cos, y, 32.0, 0.4) / 32
    theta = cos[torch.arange(50), y].double().acos()
    inside = theta + 0.4 < math.pi
    mine = out[torch.arange(50), y].double()
    torch.testing.assert_close(mine[inside], (theta + 0.4).cos()[inside], atol=1e-5, rtol=1e-5)
    assert (mine < theta.cos()).all() and 5 < inside.sum() < 50
    others = torch.ones(50, 6).scatter(1, y[:, None], 0).bool()
    torch.testing.assert_close(out[others], cos[others])


# ------------------------------------------------------------------------------------------------- metrics
@pytest.mark.parametrize("ties", [False, True])
def test_verification_metrics_equal_scikit_learn(ties):
    metrics = pytest.importorskip("sklearn.metrics")
    optimize, interpolate = pytest.importorskip("scipy.optimize"), pytest.importorskip("scipy.interpolate")
    rng = np.random.default_rng(0)
    for n in (10, 57, 3000):
        same = rng.random(n) < 0.3
        same[:2] = True, False
        scores = rng.normal(same * 1.5, 1)
        scores = np.round(scores, 1) if ties else scores
        ours = face.verification_metrics(scores, same)
        far, tar, _ = metrics.roc_curve(same, scores, drop_intermediate=False)
        assert ours["auc"] == pytest.approx(metrics.roc_auc_score(same, scores), abs=1e-9)
        curve = interpolate.interp1d(far, tar)
        assert ours["eer"] == pytest.approx(optimize.brentq(lambda v: 1 - v - curve(v), 0, 1), abs=2e-3 if n < 100 else 1e-6)
        for limit, value in ours["tar_at_far"].items():
            assert value == pytest.approx(tar[far <= limit].max(), abs=1e-12)


def test_verification_metrics_of_special_cases():
    perfect = face.verification_metrics([0.9, 0.8, 0.1], [1, 1, 0])
    assert [score > perfect["threshold"] for score in (0.9, 0.8, 0.1)] == [True, True, False]
    assert perfect["auc"] == 1 and perfect["eer"] == 0 and perfect["tar_at_far"] == {0.01: 1.0, 0.001: 1.0}
    assert face.verification_metrics(torch.zeros(4), torch.tensor([True, False, True, False]))["eer"] == 0.5
    for scores, same in (([1, 2], [1, 1]), ([1, 2, 3], [1, 0]), ([1, math.nan], [1, 0]), ([], [])):
        with pytest.raises(ValueError):
            face.verification_metrics(scores, same)


def test_best_threshold_equals_a_search():
    rng = np.random.default_rng(1)
    for _ in range(30):
        scores, same = rng.integers(0, 12, 20) / 10, rng.random(20) < 0.5
        same[:2] = True, False
        best = max(((scores > t) == same).mean() for t in np.arange(-0.05, 1.3, 0.1))
        assert ((scores > face.best_threshold(scores, same)) == same).mean() == pytest.approx(best)


def test_lfw_accuracy_of_known_pairs():
    """Fold 0 holds one wrong pair of four, the others none: 10 folds give 0.975 and a standard error of 0.025."""
    scores = np.tile([0.9, 0.8, 0.2, 0.1], 10)
    scores[1] = 0.3  # a pair of the same person's, below the 0.5 that the other folds choose
    mean, error = face.lfw_accuracy(scores, np.tile([1, 1, 0, 0], 10), np.repeat(np.arange(10), 4))
    assert mean == pytest.approx(0.975) and error == pytest.approx(0.025)


def test_embeddings_do_not_depend_on_the_batch():
    model = network(layer_scale=0.5, stem_stride=2)
    images = torch.randint(256, (430, 3, 16, 16), dtype=torch.uint8)
    z, classes = face.embed(model, images, torch.device("cpu"))
    one, best = face.embed(model, images[301:302], torch.device("cpu"))
    torch.testing.assert_close(z[301:302], one)
    assert torch.equal(classes[301:302], best) and z.shape == (430, 32)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(430))
    flipped, _ = face.embed(model, images.flip(3), torch.device("cpu"))
    torch.testing.assert_close(flipped, z)


# ------------------------------------------------------------------------------------------------- data
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
    *_, scores, same = face.all_pairs(z, owners)
    assert face.verification_metrics(scores, same)["eer"] > 0.3  # pixels alone do not solve it
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
    return tmp_path / "people"


def test_images_of_all_kinds(tmp_path):
    kinds = {"L": "png", "RGBA": "png", "CMYK": "jpg", "P": "png", "1": "png", "LA": "png"}
    for mode, end in kinds.items():
        Image.new("RGB", (30, 20), (200, 200, 200)).convert(mode).save(tmp_path / f"{mode}.{end}")
        out = face.read_image(tmp_path / f"{mode}.{end}", 16, False)
        assert out.shape == (16, 16, 3) and out.dtype == np.uint8 and abs(int(out.mean()) - 200) < 60
    Image.fromarray(np.linspace(0, 40000, 400).astype(np.uint16).reshape(20, 20)).save(tmp_path / "deep.png")
    out = face.read_image(tmp_path / "deep.png", 20, False)
    assert out[0].max() < 20 and out[-1].min() > 235
    big = np.zeros((250, 250, 3), np.uint8)
    big[69:181, 69:181] = 255
    Image.fromarray(big).save(tmp_path / "big.png")
    assert face.read_image(tmp_path / "big.png", 112, True).min() == 255 > face.read_image(tmp_path / "big.png", 112, False).mean()
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="too many"):
        face.read_image(tmp_path / "bomb.png", 16, False)


def test_folder_of_people(people, call, refuses, tmp_path):
    (people / "nobody").mkdir()
    photo(people / "p3/only.png", 100)
    status, out, err = call(NAME, f"--data people {SMALL}")
    assert status == 0 and "13 train of 4 people" in out, err
    assert "1 sub-folders of people are empty" in out and "nobody" in out
    assert "1 people have one image to train on: p3" in out and "verified that are trained on" in out
    assert "eer" in out and torch.load(tmp_path / "out/convnext_face-people/best.pt", weights_only=True)["threshold"] != 0.5
    (people / "p3").rename(people / "p4")
    refuses(NAME, f"--data people {SMALL} --resume", "other people", "start anew")
    (people / "p4").rename(people / "p3")
    assert list((tmp_path / "data/people/cache").glob("*.pt"))
    photo(people / "p0/0.png", 250)  # the cache notices
    before = face.load_data(face.Config(data="people", image_size=16))["val"][0][0].clone()
    photo(people / "p0/0.png", 10)
    assert not torch.equal(before, face.load_data(face.Config(data="people", image_size=16))["val"][0][0])
    for path in (tmp_path / "data/people/cache").glob("*.pt"):  # a damaged cache is made again
        path.write_bytes(b"damaged")
    assert len(face.load_data(face.Config(data="people", image_size=16))["val"][0])


def test_people_are_shared_out_in_their_order():
    people = {f"person {i}": [f"{i}/{k}" for k in range(5)] for i in range(30)}
    for name, part in face.share_out(people).items():
        assert list(part) == [name for name in people if name in part], name


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
        for k in range(60 if i % 10 == 9 else 3):
            path = tmp_path / f"crowd/n{i:03}/{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    monkeypatch.setattr(face, "read_faces", lambda paths, *_: (torch.zeros(len(paths), 3, 1, 1), list(range(len(paths)))))
    data = face.load_data(face.Config(data="crowd", image_size=16))
    owners = [name.split("/")[0] for name in data["names"]]
    assert data["known"] == 20 and len(owners) == 1020 and set(owners[:20]) == set(owners[20:])
    assert face.spread(range(5)) == range(5) and face.spread(range(10), 4) == [0, 2, 5, 7]


def test_unreadable_images(people, call, refuses):
    for i in range(25):
        photo(people / f"p1/more{i}.png", 120)
    (people / "p2/broken.jpg").write_bytes(b"\xff\xd8 but no more")
    status, out, _ = call(NAME, f"--data people {SMALL}")
    assert status == 0 and "unreadable, skipped" in out and "broken.jpg" in out
    for i in range(5):
        (people / f"p2/bad{i}.png").write_bytes(b"")
    refuses(NAME, f"--data people {SMALL}", "bad0.png", "95 %")


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
    return two


def test_hw2p2(hw2p2, call, refuses):
    status, out, err = call(NAME, f"--data task {SMALL} --out run")
    assert status == 0 and "16 train of 4 people, 8 val, 8 test, 12 unseen" in out and "ident" in out, err
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
    refuses(NAME, f"--data task {SMALL}", "dev_identities.csv, line 6")
    identities.write_text(good.replace("8,k2\n", ""))
    refuses(NAME, f"--data task {SMALL}", "000008.jpg")
    shutil.rmtree(hw2p2 / "known/k0")
    (hw2p2 / "known/k1").rename(hw2p2 / "known/n1")
    identities.write_text(good)
    status, out, _ = call(NAME, f"--data task {SMALL}")
    assert status == 0 and "1 people are verified that are trained on: n1" in out
    for folder in ("k2", "n1"):
        shutil.rmtree(hw2p2 / "known" / folder)
    refuses(NAME, f"--data task {SMALL}", "known", "one per person")


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
    status, out, err = call(NAME, f"{benchmark} pairsDevTest.txt")
    assert status == 0 and "the checkpoint's" in out and "n 20" in out, err
    rows = [line.split(",") for line in open("csv/pairs.csv").read().splitlines()[1:]]
    scores, same = [float(row[3]) for row in rows], [int(row[2]) for row in rows]
    assert sum(same) == 10 and rows[0][:2] == ["P_0_0001.jpg", "P_0_0002.jpg"]
    (lfw / "pairsDevTrain.txt").write_text((lfw / "pairsDevTest.txt").read_text())
    status, out, _ = call(NAME, f"{benchmark} pairsDevTest.txt")
    best = max(np.mean([(v >= t) == s for v, s in zip(scores, same)]) for t in [*scores, 2])
    assert "chosen on pairsDevTrain.txt" in out and f"acc {100 * best:.6g}," in out
    status, out, _ = call(NAME, f"{benchmark} pairs.txt")
    assert status == 0 and "se " in out and "best on all 5 folds" in out
    read, folds = face.read_pairs(lfw / "pairs.txt", lfw / "lfw")
    assert folds == 5 and [pair[3] for pair in read] == [k for k in range(5) for _ in range(4)]
    assert (lfw / "csv/hardest.png").stat().st_size > 1000


@pytest.mark.parametrize("line", ["P_0\t1", "P_0\tone\t2", "P_0\t1\tP_1", "P_0\t1\tP_1\tx", "../P_0\t1\t2", "a b c d e"])
def test_malformed_pairs(line, lfw, trained, refuses):
    lines = (lfw / "pairsDevTest.txt").read_text().splitlines()
    lines[4] = line
    (lfw / "bad.txt").write_text("\n".join(lines))
    refuses(NAME, f"eval --ckpt {trained} --save csv --images lfw --pairs bad.txt", "bad.txt, line 5")


def test_pairs_that_do_not_fit(lfw, trained, refuses):
    start = f"eval --ckpt {trained} --save csv --images lfw --pairs"
    for text, words in {"": ["line 1"], "many\n": ["line 1"], "3\nP_0\t1\t2\n": ["1 pairs", "6"]}.items():
        (lfw / "bad.txt").write_text(text)
        refuses(NAME, f"{start} bad.txt", "bad.txt", *words)
    refuses(NAME, f"{start} none.txt", "none.txt")
    lines = (lfw / "pairs.txt").read_text().splitlines()
    (lfw / "bad.txt").write_text("\n".join([lines[0], *sorted(lines[1:], key=len)]))  # those of one person first
    refuses(NAME, f"{start} bad.txt", "bad.txt", "part 1 of 5", "each kind")
    refuses(NAME, f"eval --ckpt {trained} --pairs pairs.txt", "--images")
    (lfw / "lfw/P_2/P_2_0003.jpg").unlink()
    refuses(NAME, f"{start} pairsDevTest.txt", "P_2_0003.jpg", "missing")
    refuses(NAME, f"eval --ckpt {trained} --data lfw", "other people")


# ------------------------------------------------------------------------------------------------- the rest
def test_verify_and_identify(people, trained, call, refuses):
    ask = f"--ckpt {trained} --json"
    status, out, err = call(NAME, f"verify people/p0/0.png people/p0/0.png {ask}")
    answer = json.loads(out)
    assert status == 0 and answer["cosine"] == pytest.approx(1) and answer["same"] is True, err
    status, out, err = call(NAME, f"identify people people/p2/3.png people/p0/1.png {ask}")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [a["ranked"][0] for a in answers] == [["p2", 1.0], ["p0", 1.0]], err
    status, out, _ = call(NAME, f"verify people/p0/0.png people/p1/0.png --ckpt {trained}")
    assert status == 0 and len(out.splitlines()) == 1
    refuses(NAME, f"verify people/p0/0.png {ask}", "IMAGE IMAGE")
    refuses(NAME, f"verify people/p0/0.png people/none.png {ask}", "none.png")
    refuses(NAME, f"identify people {ask}", "GALLERY IMAGE")
    refuses(NAME, f"identify people/p0 people/p0/0.png {ask}", "sub-folders")
    (people / "text.png").write_text("no image")
    refuses(NAME, f"identify people people/text.png {ask}", "text.png")


def test_init_from_torchvision(people, call, refuses):
    models = pytest.importorskip("torchvision.models")
    torch.save(models.convnext_tiny(weights=None, num_classes=3).state_dict(), "same.pt")
    torch.save(models.convnext_tiny(weights=None, num_classes=9).state_dict(), "other.pt")
    tiny = SMALL.replace("mini", "tiny").replace("--batch_size 16 --max_steps 2", "--batch_size 2 --max_steps 1")
    status, out, err = call(NAME, f"--data people {tiny} --init other.pt --lr 0 --out run")
    assert status == 0 and "not taken from other.pt" in out and "head.weight" in out, err
    ours, theirs = torch.load("run/last.pt", weights_only=True)["model"], torch.load("other.pt", weights_only=True)
    assert torch.equal(ours["stages.2.5.expand.weight"], theirs["features.5.5.block.3.weight"])
    refuses(NAME, f"--data people {SMALL} --init imagenet", "imagenet", "tiny and small")
    status, out, _ = call(NAME, f"--data people {SMALL} --init same.pt")
    assert "not taken from same.pt" in out or status == 2  # hardly anything of it fits the small network


def test_centers_on_two_processes_equal_those_on_one(tmp_path):
    program = driver(NAME, tmp_path)
    quiet = flags(NAME, "--drop_path 0 --augment 0 --dtype float32 --max_steps 3 --lr 0.01 --warmup 1 --center_weight 0.1")
    for how, out in (((program,), "one"), (torchrun(program), "two")):
        done = python(*how, *quiet, "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / out / "last.pt", weights_only=True)["centers"]["centers"] for out in ("one", "two"))
    assert one.abs().max() > 0.1
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_bad_flags(refuses):
    refuses(NAME, "--size huge --data demo", "huge", "atto")
    refuses(NAME, "--stem_stride 3 --data demo", "3", "2 or 4")
    refuses(NAME, "--image_size 8 --data demo", "--image_size 8")
    refuses(NAME, "--drop_path 1 --data demo", "--drop_path")
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
