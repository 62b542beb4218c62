"""Losses: against NumPy, SciPy and scikit-image, and in what training does to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.special import expit, log_expit, log_softmax
from skimage.metrics import structural_similarity
from torch import nn

from segpipe.errors import SettingsError
from segpipe.models.network import TrainingOutput
from segpipe.training import loss_terms as terms
from segpipe.training.batch_targets import Targets
from segpipe.training.losses import InstanceLoss
from segpipe.training.named_losses import LOSSES, build_loss

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


@pytest.fixture(autouse=True)
def _one_thread():
    """Maps of 48 px are too small to share, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(shape=(3, 2, 24, 20), seed=0, soft=False):
    """Logits, and targets of 0 and 1; or some of them in between."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=random, dtype=torch.float64)
    targets = (torch.rand(shape, generator=random) > 0.7).double()
    if soft:
        targets *= torch.rand(shape, generator=random).double()
    return logits.float(), targets.float()


def smooth(shape, seed):
    """Fields in (0, 1) that vary over a few pixels, as maps of objects do: float64."""
    random = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(random.normal(size=shape[2:]), 3) for _ in range(shape[0])]
    return expit(30 * np.stack(fields))[:, np.newaxis]


def logits_of(probabilities):
    return torch.from_numpy(np.log(probabilities / (1 - probabilities)))


def instance_targets(size=48, weights=True):
    """Two discs and their depth, (1, 2, size, size)."""
    y, x = np.mgrid[:size, :size]
    maps = np.zeros((2, size, size), np.float32)
    for centre, radius in ((size * 0.3, size * 0.2), (size * 0.7, size * 0.25)):
        depth = 1 - np.hypot(y - centre, x - centre) / radius
        maps[1] = np.maximum(maps[1], depth)
    maps[0] = maps[1] > 0
    weight = torch.full((1, size, size), 2.0) if weights else None
    return Targets(torch.from_numpy(maps)[np.newaxis], weight)


def test_binary_cross_entropy_equals_numpy():
    logits, targets = batch(soft=True)
    weights = torch.rand(3, 24, 20)
    x, t, w = logits.double().numpy(), targets.numpy(), weights.numpy()
    expected = -(t * log_expit(x) + (1 - t) * log_expit(-x))
    assert terms.cross_entropy(logits, targets).item() == pytest.approx(expected.mean())
    weighted = (expected * w[:, np.newaxis]).sum() / expected.size
    assert terms.cross_entropy(logits, targets, weights).item() == pytest.approx(weighted)


def test_cross_entropy_of_classes_equals_numpy():
    logits, _ = batch((2, 4, 9, 7))
    classes = torch.randint(4, (2, 9, 7))
    weights = torch.rand(2, 9, 7)
    chosen = np.take_along_axis(
        log_softmax(logits.double().numpy(), axis=1), classes.numpy()[:, np.newaxis], axis=1
    )[:, 0]
    assert terms.class_cross_entropy(logits, classes).item() == pytest.approx(-chosen.mean())
    expected = -(chosen * weights.numpy()).sum() / chosen.size
    assert terms.class_cross_entropy(logits, classes, weights).item() == pytest.approx(expected)
    loss = LOSSES["cross_entropy"]()
    targets = Targets(F.one_hot(classes, 4).permute(0, 3, 1, 2).float(), weights, classes)
    assert loss(TrainingOutput((logits,)), targets).item() == pytest.approx(expected)


@pytest.mark.parametrize("over_batch", [False, True])
def test_overlaps_equal_numpy_on_hard_targets(over_batch):
    """The published forms: products of probabilities and targets."""
    logits, targets = batch()
    p, t = expit(logits.double().numpy()), targets.numpy()
    axes = (0, 2, 3) if over_batch else (2, 3)
    shared, total = (p * t).sum(axes), (p + t).sum(axes)
    dice = 1 - ((2 * shared + 1) / (total + 1)).mean()
    jaccard = 1 - ((shared + 1) / ((p + t - p * t).sum(axes) + 1)).mean()
    assert terms.soft_dice(logits, targets, 1.0, over_batch).item() == pytest.approx(dice)
    assert terms.iou(logits, targets, 1.0, over_batch).item() == pytest.approx(jaccard)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 0.0), (0.5, 0.5), (0.9, 5.0)])
def test_focal_equals_numpy_on_hard_targets(alpha, gamma):
    logits, targets = batch()
    p, t = expit(logits.double().numpy()), targets.numpy()
    right, balance = np.where(t == 1, p, 1 - p), np.where(t == 1, alpha, 1 - alpha)
    expected = (-balance * (1 - right) ** gamma * np.log(right)).mean()
    assert terms.focal(logits, targets, alpha, gamma).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [terms.soft_dice, terms.iou, terms.focal, terms.ms_ssim])
def test_soft_targets_are_the_optimum(loss):
    """The published products are not: of a target of .5 they would make 1, or 0."""
    field = torch.from_numpy(smooth((1, 1, 24, 24), 5))
    targets = 0.2 + 0.6 * field
    logits = logits_of(targets.numpy())
    best = loss(logits, targets)
    for change in (-0.3, 0.3):
        assert loss(logits + change, targets) > best + 1e-5


def test_one_level_of_ms_ssim_equals_scikit_image():
    probabilities, truth = smooth((2, 1, 20, 17), 0), smooth((2, 1, 20, 17), 1)
    expected = [
        structural_similarity(
            one[0], other[0], data_range=1, gaussian_weights=True, use_sample_covariance=False
        )
        for one, other in zip(probabilities, truth + 0.3 * probabilities, strict=True)
    ]
    result = terms.ms_ssim(
        logits_of(probabilities), torch.from_numpy(truth + 0.3 * probabilities)
    ).item()
    assert 1 - result == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize(("size", "levels"), [(176, 5), (181, 5), (175, 4), (87, 3), (43, 2)])
def test_ms_ssim_equals_scipy(size, levels):
    first = smooth((1, 1, size, size + 3), 0)
    second = 0.6 * first + 0.4 * smooth((1, 1, size, size + 3), 1)

    def filtered(image):
        return ndimage.gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

    one, other, expected = first[0, 0], second[0, 0], 1.0
    for level in range(levels):
        if level:
            y, x = one.shape[0] // 2, one.shape[1] // 2
            one, other = (
                image[: 2 * y, : 2 * x].reshape(y, 2, x, 2).mean((1, 3)) for image in (one, other)
            )
        mean, other_mean = filtered(one), filtered(other)
        covariance = filtered(one * other) - mean * other_mean
        variances = filtered(one**2) - mean**2 + filtered(other**2) - other_mean**2
        similarity = (2 * covariance + 0.03**2) / (variances + 0.03**2)
        if level == levels - 1:
            similarity *= (2 * mean * other_mean + 0.01**2) / (mean**2 + other_mean**2 + 0.01**2)
        expected *= similarity.mean() ** (WEIGHTS[level] / sum(WEIGHTS[:levels]))
    result = terms.ms_ssim(logits_of(first), torch.from_numpy(second)).item()
    assert 1 - result == pytest.approx(expected, rel=1e-4)


def test_ms_ssim_finds_back_from_the_opposite_structure():
    """Similarities are negative there; cut off at 0 they would have no slope."""
    truth = torch.from_numpy((smooth((1, 1, 48, 48), 0) > 0.5).astype(np.float32))
    logits = (2 * (1 - 2 * truth)).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.2, eps=1e-12)
    assert terms.ms_ssim(logits, truth) > 0.99
    for _ in range(30):
        optimiser.zero_grad()
        terms.ms_ssim(logits, truth).backward()
        optimiser.step()
    assert terms.ms_ssim(logits, truth) < 0.2


def test_similarities_go_on_below_a_hundredth_without_a_step_or_a_kink():
    similarity = torch.linspace(-1, 1, 20001, dtype=torch.float64, requires_grad=True)
    result = terms._positive(similarity)
    (slope,) = torch.autograd.grad(result.sum(), similarity)
    above = similarity > 0.01
    assert torch.equal(result[above], similarity[above])
    assert result.min() > 0
    assert slope.min() > 0
    assert result.diff().abs().max() < 1.1e-4
    assert slope.diff().abs().max() < 0.03


def test_ms_ssim_refuses_what_is_smaller_than_its_window():
    with pytest.raises(ValueError, match="MS-SSIM of 10 px; expected sides of 11 px or more"):
        terms.ms_ssim(*batch((1, 1, 10, 30)))


def test_classification_asks_whether_an_output_occurs():
    targets = torch.zeros(2, 3, 5, 5)
    targets[0, 1, 2, 2] = 0.1
    targets[1, 2] = 1
    logits = torch.randn(2, 3)
    occurs = np.array([[0, 1, 0], [0, 0, 1]])
    expected = -log_expit(np.where(occurs, logits, -logits)).mean()
    assert terms.classification_loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def test_sides_are_averaged_or_summed_as_their_source_does():
    first, targets = batch((2, 1, 30, 30))
    second, _ = batch((2, 1, 30, 30), seed=1)
    classification = torch.randn(2, 1)
    weights = torch.rand(2, 30, 30)
    both = TrainingOutput((first, second), classification)
    head = terms.classification_loss(classification, targets)
    given = Targets(targets, weights)

    def plus_plus(logits):
        return 0.5 * terms.cross_entropy(logits, targets, weights) + terms.soft_dice(
            logits, targets
        )

    def three_plus(logits):
        return (
            terms.focal(logits, targets)
            + terms.ms_ssim(logits, targets)
            + terms.iou(logits, targets)
        )

    expected = (plus_plus(first) + plus_plus(second)) / 2 + head
    assert LOSSES["unetplusplus"]()(both, given).item() == pytest.approx(expected.item())
    expected = three_plus(first) + three_plus(second) + head
    assert LOSSES["unet3plus"]()(both, given).item() == pytest.approx(expected.item())
    one = LOSSES["unet3plus"]()(TrainingOutput((first,)), given)
    assert one.item() == pytest.approx(three_plus(first).item())


def test_instance_loss_equals_numpy():
    targets = instance_targets(20)
    logits, _ = batch((1, 2, 20, 20))
    foreground, depth = targets.maps[0].numpy()
    x, p = logits[0].double().numpy(), expit(logits[0].double().numpy())
    inside = foreground == 1
    entropy = -np.where(inside, log_expit(x[0]), log_expit(-x[0])) * 2
    dice = 1 - (2 * p[0][inside].sum() + 1) / (p[0].sum() + inside.sum() + 1)
    error = np.abs(p[1] - depth)[inside]
    regression = np.where(error < 0.2, error**2 / 0.4, error - 0.1).mean()
    outside = p[1][~inside].mean()
    loss = InstanceLoss(cross_entropy=2, dice=3, interior=5, background=7, beta=0.2)
    expected = 2 * entropy.mean() + 3 * dice + 5 * regression + 7 * outside
    assert loss(TrainingOutput((logits,)), targets).item() == pytest.approx(expected, rel=1e-5)


def outputs_of(size, value=None):
    """Two sides and a classification of two outputs; drawn, or all of one value."""
    random = torch.Generator().manual_seed(3)
    shapes = [(1, 2, size, size), (1, 2, size, size), (1, 2)]
    drawn = [
        torch.randn(shape, generator=random) if value is None else torch.full(shape, float(value))
        for shape in shapes
    ]
    return [tensor.requires_grad_() for tensor in drawn]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [-80, 80, 0, None])
@pytest.mark.parametrize("kind", ["objects", "empty", "full"])
def test_no_logit_and_no_target_makes_a_loss_or_slope_infinite(name, value, kind):
    targets = instance_targets()
    if kind != "objects":
        targets = Targets(torch.full_like(targets.maps, kind == "full"), targets.weights)
    *sides, classification = outputs_of(48, value)
    loss = LOSSES[name]()(TrainingOutput(tuple(sides), classification), targets)
    loss.backward()
    assert loss.isfinite()
    assert loss >= 0
    assert all(tensor.grad.isfinite().all() for tensor in (*sides, classification))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_a_slope_where_prediction_and_target_agree(gamma):
    logits = torch.tensor([0.0, 200.0, -200.0]).view(1, 1, 1, 3).requires_grad_()
    terms.focal(logits, torch.tensor([0.5, 1.0, 0.0]).view(1, 1, 1, 3), gamma=gamma).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_computed_in_float32(name):
    """Under autocast, and of logits in bfloat16, the loss is that of the same logits in float32."""
    *sides, classification = (tensor.detach().bfloat16() for tensor in outputs_of(48))
    loss, targets = LOSSES[name](), instance_targets()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(TrainingOutput(tuple(sides), classification), targets)
    full = loss(
        TrainingOutput(tuple(side.float() for side in sides), classification.float()), targets
    )
    assert half.dtype == torch.float32
    assert half.item() == full.item()


class Tiny(nn.Module):
    """Three convolutions; two sides and a classification."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.LeakyReLU(0.1),  # with so few units, some that die can end the training
            nn.Conv2d(16, 8, 5, padding=2),
            nn.LeakyReLU(0.1),
        )
        self.heads = nn.ModuleList(nn.Conv2d(8, 2, 1) for _ in range(2))
        self.classify = nn.Linear(8, 2)

    def forward(self, image):
        features = self.body(image)
        sides = tuple(head(features) for head in self.heads)
        return TrainingOutput(sides, self.classify(features.mean((2, 3))))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_falls_when_a_network_learns_one_image(name):
    torch.manual_seed(0)
    targets = instance_targets(32)
    image = targets.maps.mean(dim=1, keepdim=True) + 0.1 * torch.randn(1, 1, 32, 32)
    network, loss = Tiny(), LOSSES[name]()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    before = [(side.sigmoid() - targets.maps).abs().mean() for side in network(image).sides]
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        losses.append(loss(network(image), targets))
        losses[-1].backward()
        optimiser.step()
    after = [(side.sigmoid() - targets.maps).abs().mean() for side in network(image).sides]
    assert losses[-1] < 0.5 * losses[0]
    assert all(late < 0.5 * early for early, late in zip(before, after, strict=True))


def test_shapes_that_do_not_fit_are_refused_rather_than_broadcast():
    logits, _ = batch((2, 2, 16, 16))
    one = torch.zeros(2, 1, 16, 16)
    for name, build in LOSSES.items():
        with pytest.raises(ValueError, match="expected"):
            build()(TrainingOutput((logits,)), Targets(one))
        if name == "instance":
            three = torch.zeros(2, 3, 16, 16)
            with pytest.raises(ValueError, match="of 3 outputs or classes; expected"):
                build()(TrainingOutput((three,)), Targets(three))
    with pytest.raises(ValueError, match=r"weights are \(2, 1, 16, 16\); expected \(2, 16, 16\)"):
        Targets(one, weights=one)
    with pytest.raises(ValueError, match=r"maps are \(2, 16, 16\); expected \(N, K, H, W\)"):
        Targets(one[:, 0])


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("focal", {"alpha": 1.1}),
        ("focal", {"gamma": -1}),
        ("unet3plus", {"gamma": -1}),
        ("soft_dice", {"smooth": 0}),
        ("iou", {"smooth": -1}),
        ("unetplusplus", {"smooth": 0}),
        ("unet3plus", {"smooth": 0}),
        ("instance", {"dice": -1}),
        ("instance", {"beta": 0}),
    ],
)
def test_numbers_out_of_bounds_are_refused(name, numbers):
    with pytest.raises(ValueError, match="expected"):
        LOSSES[name](**numbers)
    with pytest.raises(SettingsError, match=f"loss.parameters of {name}: .* expected"):
        build_loss(name, numbers)


def test_parameters_of_settings_are_those_of_the_loss():
    assert build_loss("focal", {"gamma": 3, "alpha": 0.5}) == LOSSES["focal"](0.5, 3)
    assert build_loss("soft_dice", {"over_batch": True}) == LOSSES["soft_dice"](over_batch=True)
    for name, parameters, told in (
        ("focl", {}, r"did you mean 'focal'\?"),
        ("focal", {"gama": 1}, r"no parameter 'gama' \(did you mean 'gamma'\?\)"),
        ("cross_entropy", {"gamma": 1}, "has no parameter 'gamma'; it has none"),
        ("iou", {"over_batch": 1}, "over_batch is 1; expected true or false"),
        ("iou", {"smooth": True}, "smooth is True; expected a number"),
    ):
        with pytest.raises(SettingsError, match=told):
            build_loss(name, parameters)


def class_targets(count, size=24, seed=4):
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, count, (2, size, size), generator=random)
    return Targets(F.one_hot(classes, count).movedim(-1, 1).float(), classes=classes)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_one_against_rest_is_the_softmax(count):
    logits = 6 * torch.randn(2, count, 5, 7, generator=torch.Generator().manual_seed(0))
    shares = terms.one_against_rest(logits).sigmoid()
    assert torch.allclose(shares, logits.softmax(dim=1), atol=1e-6)
    extreme = torch.tensor([200.0, -200.0, 0.0]).view(1, 3, 1, 1).requires_grad_()
    terms.one_against_rest(extreme).sigmoid().sum().backward()
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "instance"])
def test_losses_of_classes_compare_the_softmax(name):
    """What all logits of a pixel have in common changes nothing; for sigmoids it would."""
    targets = class_targets(3)
    logits = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    common = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(2))
    loss = LOSSES[name]()
    one, other = (loss(TrainingOutput((x,)), targets) for x in (logits, logits + common))
    assert one.item() == pytest.approx(other.item(), rel=1e-5)
    best = loss(TrainingOutput((40 * targets.maps,)), targets)
    assert best < 0.05 < one


def test_the_loss_of_instances_refuses_classes():
    targets = class_targets(2)
    with pytest.raises(ValueError, match="2 outputs or classes"):
        InstanceLoss()(TrainingOutput((targets.maps,)), targets)


def test_targets_lose_the_border_that_a_valid_network_does_not_see():
    targets = Targets(torch.rand(2, 2, 9, 11), torch.rand(2, 9, 11), torch.ones(2, 9, 11).long())
    inner = targets.without_border(2)
    assert torch.equal(inner.maps, targets.maps[:, :, 2:7, 2:9])
    assert torch.equal(inner.weights, targets.weights[:, 2:7, 2:9])
    assert inner.classes.shape == (2, 5, 7)
    assert targets.without_border(0) is targets
    assert targets.to("cpu").maps.dtype == torch.float32
