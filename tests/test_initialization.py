"""Least squares: the minimum, in constant memory, of all positions together."""

import pytest
import torch

from families import images, make
from stitchable import initialization, initialize_stitches
from stitchable.initialization import Accumulator, RowPair, anchor_features, rows_of_layers


def rows(model, x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a layer in float64, written out: all its joints one below the other."""
    joints = rows_of_layers(model)
    features = anchor_features(model, x, joints)
    a = torch.cat([features[joint.source] for joint in joints[name]]).double()
    b = torch.cat([features[joint.target] for joint in joints[name]]).double()
    return a, b


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "swin", "resnet-swin", "levit-conv"])
def test_it_is_the_least_squares_solution_of_all_positions_together(name: str) -> None:
    model, x = make(name), images(name, 60)
    residuals = initialize_stitches(model, x.split(7), num_samples=60)
    for layer_name, residual in residuals.items():
        a, b = rows(model, x, layer_name)
        ones = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1)
        solution = torch.linalg.lstsq(ones, b, driver="gelsd").solution
        layer = model.get_stitching_layer(layer_name)
        expected = (ones @ solution - b).norm() / (b - b.mean(0)).norm()
        ours = (a @ layer.linear.weight.double().T + layer.linear.bias.double() - b).norm() / (b - b.mean(0)).norm()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        assert abs(residual - float(expected)) < 1e-4


def test_the_split_into_batches_does_not_matter() -> None:
    x = images("vit", 50)
    fits = []
    for batches in ([x], x.split(3), [{"pixel_values": x, "labels": torch.zeros(50)}], [(x, None)]):
        model = make("vit")
        initialize_stitches(model, batches, num_samples=50)
        fits.append(model.get_stitching_layer("0-1.0").linear.weight)
    for fit in fits[1:]:
        torch.testing.assert_close(fit, fits[0], rtol=1e-4, atol=1e-5)


def test_only_the_first_samples_count_and_the_mode_is_kept() -> None:
    x = images("vit", 60)
    one, two = make("vit"), make("vit")
    two.train()
    initialize_stitches(one, [x[:40]], num_samples=40)
    initialize_stitches(two, [x[:30], x[30:]], num_samples=40)
    torch.testing.assert_close(
        one.get_stitching_layer("0-1.0").linear.weight,
        two.get_stitching_layer("0-1.0").linear.weight,
        rtol=1e-4,
        atol=1e-5,
    )
    assert two.training


def test_each_anchor_runs_once_per_batch_whatever_the_number_of_stitches() -> None:
    model = make("vit")
    calls = []
    for anchor in model.anchors:
        anchor.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    initialize_stitches(model, images("vit", 45).split(15), num_samples=45)
    assert len(calls) == 2 * 3


@pytest.mark.parametrize("spoil", ["dead", "collinear", "constant target"])
def test_dead_and_collinear_channels_do_no_harm(spoil: str) -> None:
    a, b = torch.randn(200, 6), torch.randn(200, 3)
    if spoil == "dead":
        a[:, 2] = 0.7
    elif spoil == "collinear":
        a[:, 2] = 3 * a[:, 0] - a[:, 1]
    else:
        b[:] = 2.0
    accumulator = Accumulator({"0-1.0": [RowPair((0, 1), (1, 1))]})
    for start in range(0, 200, 64):
        accumulator.add({(0, 1): a[start : start + 64], (1, 1): b[start : start + 64]})
    weight, bias, residual = accumulator.statistics("0-1.0").solve()
    ones = torch.cat([a, torch.ones(200, 1)], dim=1).double()
    # With a tolerance, or the reference would fit the rounding of the collinear channel.
    best = torch.linalg.lstsq(ones, b.double(), rcond=1e-5, driver="gelsd").solution
    ours = (a.double() @ weight.T + bias - b).norm()
    torch.testing.assert_close(ours, (ones @ best - b).norm(), rtol=1e-6, atol=1e-5)
    assert weight.abs().max() < 1
    assert residual == pytest.approx(
        float(ours / (b - b.mean(0)).norm()) if spoil != "constant target" else 0, abs=1e-4
    )
    if spoil == "dead":
        assert weight[:, 2].abs().max() < 1e-8
    assert 0 <= residual <= 1


def test_an_exact_map_is_found() -> None:
    a, true = torch.randn(300, 5), torch.randn(4, 5)
    accumulator = Accumulator({"0-1.0": [RowPair((0, 1), (1, 1))]})
    accumulator.add({(0, 1): a, (1, 1): a @ true.T - 1.5})
    weight, bias, residual = accumulator.statistics("0-1.0").solve()
    torch.testing.assert_close(weight, true.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, torch.full((4,), -1.5, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert residual < 1e-2


@pytest.mark.parametrize("case", ["large means", "ill-conditioned", "massive channel"])
def test_it_stays_exact_where_sums_of_products_lose_digits(case: str) -> None:
    """As activations of large ViTs are: far from zero, nearly dependent, or a few channels a million times the rest."""
    a = torch.randn(6000, 24)
    if case == "ill-conditioned":
        u, _, v = torch.linalg.svd(a, full_matrices=False)
        a = 77 * u * torch.logspace(0, -4, 24) @ v + 10
    elif case == "massive channel":
        a = a * 0.01
        a[:, 5] *= 1e6
    else:
        a = a + 1000
    b = ((a - a.mean(0)) / a.std(0)) @ torch.randn(24, 7) + 0.05 * torch.randn(6000, 7) + 1000
    accumulator = Accumulator({"0-1.0": [RowPair((0, 1), (1, 1))]})
    for x, y in zip(a.split(500), b.split(500), strict=True):
        accumulator.add({(0, 1): x, (1, 1): y})
    weight, bias, residual = accumulator.statistics("0-1.0").solve()
    ones = torch.cat([a - a.mean(0), torch.ones(6000, 1)], dim=1).double()
    best = torch.linalg.lstsq(ones, b.double(), driver="gelsd").solution
    total = (b - b.double().mean(0)).norm()
    ours, least = (a.double() @ weight.T + bias - b).norm() / total, (ones @ best - b).norm() / total
    torch.testing.assert_close(ours, least, rtol=1e-2, atol=1e-5)
    assert residual == pytest.approx(float(ours), rel=1e-2)


def test_positions_with_different_means_share_one_layer() -> None:
    """Each cut is summed about a point of its own; the layer must not notice."""
    joints = [RowPair((0, 1), (1, 1)), RowPair((0, 2), (1, 1)), RowPair((0, 2), (1, 2))]
    features = {(0, 1): torch.randn(400, 5) + 30, (0, 2): torch.randn(400, 5) - 20}
    features |= {(1, 1): torch.randn(400, 3) + 7, (1, 2): torch.randn(400, 3) * 4 - 9}
    accumulator = Accumulator({"0-1.0": joints})
    for start in (0, 150):
        accumulator.add({key: x[start : start + (150 if start == 0 else 250)] for key, x in features.items()})
    weight, bias, residual = accumulator.statistics("0-1.0").solve()
    assert accumulator.distinct_rows("0-1.0") == 800  # of two sources, though three joints are fitted
    a = torch.cat([features[joint.source] for joint in joints]).double()
    b = torch.cat([features[joint.target] for joint in joints]).double()
    ones = torch.cat([a, torch.ones(len(a), 1)], dim=1).double()
    best = torch.linalg.lstsq(ones, b, driver="gelsd").solution
    torch.testing.assert_close(weight, best[:-1].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, best[-1], rtol=1e-4, atol=1e-4)
    assert residual == pytest.approx(float((ones @ best - b).norm() / (b - b.mean(0)).norm()), rel=1e-4)


def test_kaiming_is_what_pytorch_gives_a_1x1_convolution() -> None:
    model = make("vit")
    torch.manual_seed(5)
    assert initialize_stitches(model, method="kaiming") == {}
    torch.manual_seed(5)
    expected = [torch.nn.Conv2d(8, 12, 1) for _ in model.stitching_layers["0-1"]]
    for layer, convolution in zip(model.stitching_layers["0-1"].values(), expected, strict=True):
        assert torch.equal(layer.linear.weight, convolution.weight[:, :, 0, 0])
        assert torch.equal(layer.linear.bias, convolution.bias)


@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        ([torch.randn(3, 3, 32, 32)], {}, "asked to fit 100 images, but the batches hold only 3"),
        ([], {}, "hold only 0"),
        ([torch.randn(3, 3, 32, 32)], {"num_samples": 0}, "num_samples must be a positive"),
        ([torch.randn(3, 3, 32, 32)], {"num_samples": 2.5}, "num_samples must be an integer"),
        ([], {"method": "magic"}, "method must be 'least_squares' or 'kaiming'"),
        ([{"images": 1}], {}, r"must hold 'pixel_values', it has \['images'\]"),
        ([torch.randn(3, 32, 32)], {}, r"batches of images \(N, C, H, W\), got a tensor of shape \(3, 32, 32\)"),
        ([torch.full((3, 3, 32, 32), torch.nan)], {"num_samples": 3}, "anchor 0 at cut 1 are not finite"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(batches: list, settings: dict, message: str) -> None:
    model = make("vit")
    before = model.get_stitching_layer("0-1.0").linear.weight.clone()
    with pytest.raises(ValueError, match=message):
        initialize_stitches(model, batches, **settings)
    assert torch.equal(model.get_stitching_layer("0-1.0").linear.weight, before)
    assert not model.training


def test_images_of_one_class_are_warned_of(caplog, monkeypatch) -> None:
    monkeypatch.setattr(initialization.logger, "propagate", True)
    x, labels = images("vit", 60), torch.arange(60) // 20  # sorted by class
    for batches in ([(x, labels)], [{"pixel_values": x[:15], "label": [0] * 15}, (x[15:], labels[15:])]):
        initialize_stitches(make("vit"), batches, num_samples=20)
        assert "all 20 images that the stitching layers are fitted on have the label 0" in caplog.text
        assert "shuffle the images" in caplog.text
        caplog.clear()
    initialize_stitches(make("vit"), [(x, labels)], num_samples=21)
    initialize_stitches(make("vit"), [(x, labels.roll(1))], num_samples=20)
    initialize_stitches(make("vit"), [(x, torch.full((60,), -100))], num_samples=20)  # of no class
    initialize_stitches(make("vit"), [x], num_samples=20)
    assert caplog.text == ""


def test_too_few_rows_are_named() -> None:
    model = make("mobilenetv3")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"needs at least \d+ rows, but 2 images give \d+"):
        initialize_stitches(model, [images("mobilenetv3", 2)], num_samples=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_extracted_stitch_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="fit the whole model before extracting"):
        initialize_stitches(make("vit").extract(4), [images("vit", 40)], num_samples=40)
