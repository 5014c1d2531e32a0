"""vae.py against independent computations."""
import math
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import torch
import vae
from conftest import ROOT, litter
from PIL import Image

TINY = "--device cpu --compile off --width 4 --hidden 16 --iwae_n 4 --iwae_k 10 --max_steps 2"


class Linear(torch.nn.Module):
    """A VAE whose posterior and decoder are set by hand: mu = ax, logvar constant, logits = bz."""

    def encode(self, x):
        flat = x.flatten(1)
        return 0.3 * flat[:, :2] - 0.1, torch.full((len(x), 2), -0.7)

    def decode(self, z):
        return (z @ torch.tensor([[0.5, -1.0, 0.2, 0.9], [0.1, 0.4, -0.8, 0.3]])).view(-1, 1, 2, 2)


def numpy_log_weights(x, eps):
    """log p(x, z) - log q(z|x) in plain numpy, for eps (K, B, 2)."""
    flat = x.flatten(1).numpy().astype(float)
    mu, logvar = 0.3 * flat[:, :2] - 0.1, -0.7
    z = mu + math.exp(logvar / 2) * eps
    p = 1 / (1 + np.exp(-(z @ np.array([[0.5, -1.0, 0.2, 0.9], [0.1, 0.4, -0.8, 0.3]]))))
    log_x = (flat * np.log(p) + (1 - flat) * np.log(1 - p)).sum(-1)
    log_prior = (-0.5 * z**2 - 0.5 * math.log(2 * math.pi)).sum(-1)
    log_q = (-0.5 * eps**2 - 0.5 * math.log(2 * math.pi) - logvar / 2).sum(-1)
    return log_x, log_prior - log_q


def binary(n, seed=0):
    return (torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) < 0.5).float()


def test_kl_equals_torch_distributions():
    mu, logvar = torch.randn(50, 7), torch.randn(50, 7)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    oracle = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros(7), torch.ones(7))).sum(1)
    torch.testing.assert_close(vae.kl_divergence(mu, logvar), oracle)


def test_elbo_equals_numpy(monkeypatch):
    x, eps = binary(6), torch.randn(6, 2)
    monkeypatch.setattr(torch, "randn_like", lambda t: eps.view(t.shape))
    log_x, _ = numpy_log_weights(x, eps.numpy().astype(float))
    mu, logvar = Linear().encode(x)
    kl = (0.5 * (logvar.exp() + mu**2 - 1 - logvar)).sum(1).numpy()
    np.testing.assert_allclose(vae.elbo(Linear(), x).numpy(), log_x - kl, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_iwae_bound_equals_numpy(chunk, monkeypatch):
    x, k, drawn = binary(6), 25, []

    def randn_like(t):
        drawn.append(torch.randn(t.shape))
        return drawn[-1]
    monkeypatch.setattr(torch, "randn_like", randn_like)
    bound = vae.iwae_bound(Linear(), x, k, chunk).numpy()
    log_x, log_ratio = numpy_log_weights(x, torch.cat(drawn).numpy().astype(float))
    assert log_x.shape == (k, 6)
    np.testing.assert_allclose(bound, np.log(np.exp(log_x + log_ratio).mean(0)), atol=1e-5)


def test_iwae_bound_rises_to_the_exact_likelihood():
    """With k the bound rises from the ELBO to log p(x), which a grid integrates here."""
    x = binary(1, seed=3)
    grid = torch.cartesian_prod(*[torch.linspace(-7, 7, 400)] * 2)
    log_p = vae.log_likelihood(Linear().decode(grid), x) - 0.5 * (grid**2).sum(1) - math.log(2 * math.pi)
    exact = log_p.logsumexp(0).item() + 2 * math.log(14 / 399)
    torch.manual_seed(0)
    many = x.expand(2000, -1, -1, -1)
    means = [vae.elbo(Linear(), many).mean().item()] + [vae.iwae_bound(Linear(), many, k).mean().item() for k in (2, 10, 100)]
    assert means == sorted(means) and abs(means[-1] - exact) < 0.01 and means[0] < exact - 0.05


def test_knn_equals_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    torch.manual_seed(0)
    z, y, test_z, test_y = torch.randn(500, 3), torch.randint(5, (500,)), torch.randn(1200, 3), torch.randint(5, (1200,))
    for k in (1, 10):
        oracle = neighbors.KNeighborsClassifier(k, algorithm="brute").fit(z, y).score(test_z, test_y)
        assert vae.knn_accuracy(z, y, test_z, test_y, k) == pytest.approx(oracle, abs=1e-9)


def test_tsne_keeps_clusters_together():
    torch.manual_seed(0)
    centers, labels = 12 * torch.randn(6, 10), torch.arange(6).repeat_interleave(40)
    y = vae.tsne(centers[labels] + torch.randn(240, 10), steps=300)
    assert y.shape == (240, 2) and y.isfinite().all()
    nearest = torch.cdist(y, y).fill_diagonal_(math.inf).topk(10, largest=False).indices
    assert (labels[nearest] == labels[:, None]).float().mean() > 0.98
    assert torch.equal(y, vae.tsne(centers[labels] + 0 * y[:, :1] + (torch.manual_seed(0), torch.randn(6, 10), torch.randn(240, 10))[2], steps=300))


def test_tsne_of_equal_points_is_finite():
    assert vae.tsne(torch.zeros(20, 5), steps=20).isfinite().all()


@pytest.mark.parametrize("size", [28, 32, 45])
def test_shapes_and_independence_of_the_batch(size):
    torch.manual_seed(0)
    model = vae.VAE(latent_dim=5, channels=(4, 8, 16), image_size=size, hidden=12).eval()
    x = torch.rand(9, 1, size, size)
    logits, mu, logvar = model(x)
    assert logits.shape == x.shape and mu.shape == logvar.shape == (9, 5)
    z = torch.randn(9, 5)
    torch.testing.assert_close(model.decode(z)[3:4], model.decode(z[3:4]))
    torch.testing.assert_close(model.encode(x)[0][3:4], model.encode(x[3:4])[0])


def test_gaussian_figures_equal_numpy():
    torch.manual_seed(0)
    model = vae.VAE(3, (4, 8, 16), 28, 12).eval()
    x = torch.rand(20, 1, 28, 28)
    torch.manual_seed(vae.seed_for("evaluate", 0))
    logits, mu, logvar = (t.detach().double().numpy() for t in model(x))
    figures, rows = vae.evaluate(model, vae.Config(likelihood="gaussian", latent_dim=3), x, torch.device("cpu"))
    error = ((1 / (1 + np.exp(-logits)) - x.numpy()) ** 2).reshape(20, -1).sum(1)
    kl = 0.5 * (np.exp(logvar) + mu**2 - 1 - logvar).sum(1)
    np.testing.assert_allclose(rows.numpy(), np.stack([error, kl], 1), rtol=1e-4)
    assert figures["elbo"] == pytest.approx(-(error + kl).mean(), rel=1e-5)
    constant = 0.5 * math.log(math.pi) * 784  # of a normal distribution with variance 1/2
    normal = torch.distributions.Normal(torch.from_numpy(logits).sigmoid(), 0.5**0.5).log_prob(x.double())
    likelihood = vae.log_likelihood(torch.from_numpy(logits), x.double(), "gaussian")
    torch.testing.assert_close(likelihood - constant, normal.flatten(1).sum(1))


def test_demo_is_learnable_but_not_trivial():
    data = vae.load_data(vae.Config(data="demo"))
    assert [len(data[part][0]) for part in ("train", "val", "test")] == [9600, 1200, 1200]
    assert len({x.numpy().tobytes() for part in ("train", "val", "test") for x in data[part][0]}) == 12000
    assert (data["test"][1].bincount() > 80).all()


# ------------------------------------------------------------------------------------------------- files
def write_idx(path, array):
    array = np.asarray(array, np.uint8)
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + array.tobytes())


@pytest.fixture
def idx(tmp_path, monkeypatch):
    """data/mnist/MNIST/raw with 60 images to train and 10 to test, and no network."""
    def no_network(*args, **how):
        raise URLError("no network")
    rng, raw = np.random.default_rng(0), tmp_path / "data/mnist/MNIST/raw"
    for part, n in (("train", 60), ("t10k", 10)):
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(256, size=(n, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", rng.integers(10, size=n))
        litter(raw, f"{part}-images-idx3-ubyte")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    return raw


def test_mnist_files_train(idx, call):
    status, out, err = call("vae", f"--data mnist {TINY}")
    assert status == 0 and "images: 50 train, 10 val, 10 test" in out, err
    data = vae.load_data(vae.Config(data="mnist"))
    raw = np.frombuffer((idx / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(10, 28, 28)
    assert (data["test"][0].numpy() == raw).all() and data["classes"] == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("harm", ["truncated", "not idx", "labels", "sides", "missing", "empty", "all missing"])
def test_broken_mnist_files(harm, idx, refuses):
    images, labels = idx / "t10k-images-idx3-ubyte", idx / "t10k-labels-idx1-ubyte"
    if harm == "truncated":
        images.write_bytes(images.read_bytes()[:-5])
    elif harm == "not idx":
        images.write_bytes(b"GIF89a" + images.read_bytes())
    elif harm == "labels":
        write_idx(labels, np.zeros(9))
    elif harm == "sides":
        write_idx(images, np.zeros((10, 14, 56)))
    elif harm == "missing":
        images.unlink()
    elif harm == "empty":
        images.write_bytes(b"")
    else:
        shutil.rmtree(idx.parent.parent)
    message = {"labels": "69 labels for images of shape (70, 28, 28)", "missing": "no network", "all missing": "no network"}
    refuses("vae", f"--data mnist {TINY}", "data/mnist", "data/README.md", message.get(harm, ""))


def test_mutated_mnist_files_never_trace_back(idx, monkeypatch):
    path = idx / "t10k-labels-idx1-ubyte"
    good, rng = path.read_bytes(), np.random.default_rng(0)
    monkeypatch.chdir(idx.parents[3])
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(len(bad))] = rng.integers(256)
        path.write_bytes(bytes(bad[: rng.integers(1, len(bad) + 1)]))
        try:
            vae.load_data(vae.Config(data="mnist"))
        except vae.UserError:
            pass


@pytest.fixture
def pictures(tmp_path):
    """30 grey squares of two classes, among them other sizes, modes and depths."""
    rng = np.random.default_rng(0)
    for i in range(30):
        path = tmp_path / f"pictures/{'ab'[i % 2]}/{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(28, 28), dtype=np.uint8)).save(path)
    Image.new("RGB", (40, 60), "red").save(tmp_path / "pictures/a/00.png")
    Image.new("CMYK", (28, 28), "red").save(tmp_path / "pictures/a/02.jpg")
    Image.fromarray(np.full((28, 28), 30000, np.uint16)).save(tmp_path / "pictures/a/04.png")
    Image.new("RGBA", (10, 10)).save(tmp_path / "pictures/b/01.png")
    litter(tmp_path / "pictures", "photo.png")
    litter(tmp_path / "pictures/a", "photo.png")
    return tmp_path / "pictures"


def test_image_folder(pictures, call):
    status, out, err = call("vae", f"--data pictures {TINY}")
    assert status == 0 and "knn" in out, err
    status, out, err = call("vae", "encode pictures --save codes")
    codes, files = np.load("codes/codes.npy"), open("codes/files.txt").read().splitlines()
    assert status == 0 and codes.shape == (31, 2) and len(files) == 31 and files == sorted(files)
    status, out, err = call("vae", "interpolate --from_class b --to_class a --save walk")
    assert status == 0 and Image.open("walk/interpolation.png").size[0] > 500, err


def test_image_folder_without_classes(pictures, call, refuses):
    for path in vae.find_files(pictures, "*/*"):
        path.rename(pictures / f"{path.parent.name}{path.name}")
    status, out, err = call("vae", f"--data pictures {TINY}")
    assert status == 0 and "knn" not in out.splitlines()[-1] and "iwae" in out.splitlines()[-1], err
    refuses("vae", "interpolate", "without classes")
    refuses("vae", "interpolate --from_class a", "unknown class 'a'", "without classes")


def test_unreadable_images(pictures, call, refuses):
    (pictures / "a/zz.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    status, out, _ = call("vae", f"--data pictures {TINY}")
    assert status == 0 and "1 of 32 images are unreadable, skipped" in out and "zz.png" in out
    for i in range(5):
        (pictures / f"b/bad{i}.png").write_bytes(b"")
    refuses("vae", f"--data pictures --out new {TINY}", "31 readable images, 6 unreadable", "limit: 5 %")


def test_bad_input(tmp_path, refuses, call):
    (tmp_path / "empty").mkdir()
    refuses("vae", "--data empty", "empty", "0 readable images")
    refuses("vae", "--data demo --latent_dim 1", "--latent_dim 1")
    refuses("vae", "--likelihood poisson", "poisson", "bernoulli")
    refuses("vae", "--data demo --image_size 16", "--image_size", "16")
    assert call("vae", f"--data demo {TINY}")[0] == 0
    refuses("vae", "interpolate --from_class unicorn", "unicorn", "8-petal")
    refuses("vae", "encode nowhere", "nowhere")
    refuses("vae", "encode", "FOLDER")


# ------------------------------------------------------------------------------------------------- real data
def test_real_fashionmnist(call, tmp_path):
    real = ROOT / "data" / "fashionmnist"
    if not (real / "FashionMNIST" / "raw").exists():
        pytest.skip("data/fashionmnist is not there")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fashionmnist").symlink_to(real)
    status, out, err = call("vae", TINY)  # --data auto
    assert status == 0 and "data: fashionmnist" in out and "50,000 train, 10,000 val, 10,000 test" in out, err
    status, out, err = call("vae", "interpolate --from_class trouser --to_class bag")
    assert status == 0, err


def test_a_class_without_validation_images_has_a_mean_all_the_same():
    torch.manual_seed(0)
    model = vae.VAE(2, (4, 8, 16), 32)
    x = torch.randint(0, 255, (6, 32, 32), dtype=torch.uint8)
    data = {"train": (x[:4], torch.tensor([0, 0, 1, 1])), "val": (x[4:], torch.tensor([0, 0])), "classes": ["a", "b"]}
    means = vae.class_means(model, data, "cpu")
    assert list(means) == ["a", "b"]
    for name, part in (("a", x[[0, 1, 4, 5]]), ("b", x[2:4])):
        torch.testing.assert_close(means[name], vae.codes(model, part, "cpu").mean(0), atol=1e-6, rtol=0)


def test_pixels_of_every_kind_of_image(tmp_path):
    """Grey as Pillow's own luma; transparent is white; 16 bits are scaled; CMYK and palettes are colours."""
    Image.new("RGB", (8, 8), (200, 30, 90)).save(tmp_path / "a.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "b.png")
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "c.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "d.jpg", quality=100)
    Image.new("P", (8, 8), 0).save(tmp_path / "e.gif", transparency=0)
    Image.new("L", (8, 4), 77).save(tmp_path / "f.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "g.png")
    x, paths = vae.read_images(tmp_path, 8)
    assert [path.name for path in paths] == sorted(path.name for path in paths) and len(paths) == 7
    luma = round(0.299 * 200 + 0.587 * 30 + 0.114 * 90)
    assert [int(image[4, 4]) for image in x[[0, 1, 2, 4, 5, 6]]] == [luma, 255, 30000 // 256, 255, 77, 255]
    assert abs(int(x[3, 4, 4]) - 76) <= 2 and (x[5, 0] == 0).all()  # red; padded to a square


def test_images_with_alpha_are_turned_upright(tmp_path):
    image = Image.new("RGBA", (40, 20), "white")
    exif = image.getexif()
    exif[274] = 6  # a quarter turn
    image.save(tmp_path / "a.png", exif=exif)
    x, _ = vae.read_images(tmp_path, 32)
    assert (x[0, :, 16] > 128).all() and (x[0, 16] > 128).sum() == 16  # it stands, with black beside it
