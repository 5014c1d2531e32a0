"""convnext_face.py's network, losses and metrics against torchvision, scikit-learn and formulas by hand."""
import math

import convnext_face as face
import numpy as np
import pytest
import torch


def network(**how):
    torch.manual_seed(0)
    return face.ConvNeXt(7, (1, 1, 2, 1), (8, 16, 24, 32), **how)


@pytest.mark.parametrize("size, depths", [("tiny", (3, 3, 9, 3)), ("small", (3, 3, 27, 3))])
def test_logits_equal_torchvisions(size, depths):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = models.get_model(f"convnext_{size}", weights=None, num_classes=11).eval()
    for name, p in theirs.named_parameters():  # gammas of 1e-6 would hide what the blocks do
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 1 or "scale" in name else 0.02)
    ours = face.ConvNeXt(11, depths).eval()
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
    assert model.features[0](x).shape == (5, 8, 64 // stride, 64 // stride)
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
    assert loss(x, y).item() == pytest.approx(2.5 + 4.5 + 0.5)
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
