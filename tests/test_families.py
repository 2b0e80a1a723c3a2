"""What must hold for every supported family, checked on tiny random anchors."""

import copy
import warnings
from collections.abc import Sequence

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from families import FAMILIES, NUM_LABELS, images, make
from stitchable import Stitch, StitchableForImageClassification, StitchableModel, initialize_stitches
from stitchable.costs import count_flops
from stitchable.initialization import anchor_features, rows_of_layers

ALL = pytest.mark.parametrize("name", FAMILIES)


def some(stitches: Sequence[Stitch], number: int = 5) -> list[Stitch]:
    """The first, the last, and some evenly between."""
    places = {round(index * (len(stitches) - 1) / (number - 1)) for index in range(number)}
    return [stitches[place] for place in sorted(places)]


def timm_twin(model: StitchableForImageClassification, index: int) -> nn.Module:
    """Timm's own model with the anchor's weights, found by timm's own parameter names."""
    entry = model.config.anchors[index]
    twin = timm.create_model(entry["architecture"], num_classes=NUM_LABELS, **entry["kwargs"])
    weights = {
        key.removeprefix(f"anchors.{index}."): value
        for key, value in model.state_dict().items()
        if key.startswith(f"anchors.{index}.")
    }
    twin.load_state_dict(weights, strict=True)
    return twin.train(model.training)


@ALL
def test_an_anchor_is_timm_bit_for_bit(name: str) -> None:
    model, x = make(name), images(name)
    for index in range(2):
        assert torch.equal(model(x, stitch_id=index).logits, timm_twin(model, index)(x))


@ALL
def test_an_anchor_trains_as_timm_does(name: str) -> None:
    model, x = make(name), images(name, 4)
    model.train()
    for index in range(2):
        twin = timm_twin(model, index)
        torch.manual_seed(3)  # Swin has drop path by default
        model(x, stitch_id=index).logits.square().sum().backward()
        torch.manual_seed(3)
        twin(x).square().sum().backward()
        ours = dict(model.anchors[index].named_parameters())
        for key, parameter in twin.named_parameters():
            assert torch.equal(ours[key].grad, parameter.grad), key
        for key, buffer in twin.named_buffers():  # running statistics
            assert torch.equal(model.anchors[index].get_buffer(key), buffer), key


def stitched_by_hooks(model: StitchableForImageClassification, stitch, x: torch.Tensor) -> torch.Tensor:
    """The stitch written out another way: both anchors run whole, hooks read the front and replace the back."""
    (front, _, stop), (back, start, _) = stitch.route
    twins, chains = {i: timm_twin(model, i) for i in (front, back)}, model.chains
    layer, captured = model.get_stitching_layer(stitch.layers[0]), {}
    last_block = twins[front].get_submodule(chains[front].blocks[stop - 1][-1])
    last_block.register_forward_hook(lambda module, args, output: captured.update(features=output))
    twins[front](x)
    tokens, grid = split(captured["features"], model.config.anchors[front], stop)
    _, *size = model.config.anchors[back]["cuts"][start]
    grid = torch.einsum("...i,oi->...o", grid, layer.linear.weight) + layer.linear.bias
    grid = F.interpolate(grid.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
    if model.config.anchors[back]["layout"] == "NCHW":
        stitched = grid
    elif model.config.anchors[back]["layout"] == "NHWC":
        stitched = grid.permute(0, 2, 3, 1)
    else:
        mapped = {name: token @ layer.linear.weight.T + layer.linear.bias for name, token in tokens.items()}
        prefix = [mapped.get(name, own.expand(len(x), -1, -1)) for name, own in own_tokens(twins[back]).items()]
        stitched = torch.cat([*prefix, grid.flatten(2).transpose(1, 2)], dim=1)
    first_block = twins[back].get_submodule(chains[back].blocks[start][0])
    first_block.register_forward_pre_hook(lambda module, args: stitched)
    return twins[back](x)


def split(features: torch.Tensor, anchor: dict, cut: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Prefix tokens (N, n, C) by name, and the grid (N, H, W, C)."""
    if anchor["layout"] == "NCHW":
        return {}, features.permute(0, 2, 3, 1)
    if anchor["layout"] == "NHWC":
        return {}, features
    names, size = anchor.get("prefix_names", []), anchor["cuts"][cut][1:]
    tokens = {name: features[:, [i for i, other in enumerate(names) if other == name]] for name in names}
    return tokens, features[:, len(names) :].unflatten(1, size)


def own_tokens(model: nn.Module) -> dict[str, torch.Tensor]:
    """The prefix tokens of a ViT (1, n, C) by name, with their position embeddings."""
    names = [name for name in ("cls_token", "dist_token", "reg_token") if getattr(model, name, None) is not None]
    tokens, place = {}, 0
    for name in names:
        token = getattr(model, name)
        positions = getattr(model, "pos_embed", None)
        tokens[name] = token if positions is None else token + positions[:, place : place + token.shape[1]]
        place += token.shape[1]
    return tokens


@ALL
@torch.no_grad()
def test_a_stitch_is_the_composition_of_its_parts(name: str) -> None:
    model, x = make(name), images(name)
    for stitch in some(model.stitches[2:]):
        expected = stitched_by_hooks(model, stitch, x)
        torch.testing.assert_close(model(x, stitch_id=stitch.id).logits, expected, rtol=1e-4, atol=1e-4)


@ALL
@torch.no_grad()
def test_extract_computes_the_same_with_only_its_own_weights(name: str) -> None:
    model, x = make(name), images(name)
    for stitch in some(model.stitches):
        extracted = model.extract(stitch.id)
        assert torch.equal(extracted(x).logits, model(x, stitch_id=stitch.id).logits)
        assert sum(parameter.numel() for parameter in extracted.parameters()) == stitch.params
        assert set(extracted.state_dict()) < set(model.state_dict())
        assert [kept.id for kept in extracted.stitches] == [stitch.id]


@ALL
def test_costs_are_a_direct_count_of_the_extracted_stitch(name: str) -> None:
    model, x = make(name), images(name, 1)
    for stitch in some(model.stitches):
        assert count_flops(model.extract(stitch.id), x) == stitch.flops, stitch


@ALL
@torch.no_grad()
def test_reloading_restores_every_parameter_and_buffer(name: str, tmp_path) -> None:
    model, x = make(name), images(name)
    model.save_pretrained(tmp_path)
    reloaded = StitchableForImageClassification.from_pretrained(tmp_path)
    for kind in ("named_parameters", "named_buffers"):
        for (key, saved), (_, loaded) in zip(getattr(model, kind)(), getattr(reloaded, kind)(), strict=True):
            assert torch.equal(saved, loaded), key
    assert reloaded.stitches == model.stitches
    for stitch in some(model.stitches):
        # Not to the bit: loaded tensors lie elsewhere in memory, and some convolutions round by alignment.
        torch.testing.assert_close(
            reloaded(x, stitch_id=stitch.id).logits, model(x, stitch_id=stitch.id).logits, rtol=1e-4, atol=1e-5
        )


@ALL
@torch.no_grad()
def test_an_extracted_stitch_saves_and_loads_like_any_model(name: str, tmp_path) -> None:
    model, x = make(name), images(name)
    stitch = model.stitches[-1]
    model.extract(stitch.id).save_pretrained(tmp_path)
    reloaded = StitchableForImageClassification.from_pretrained(tmp_path)
    whole = model.state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in reloaded.state_dict().items())
    torch.testing.assert_close(reloaded(x).logits, model(x, stitch_id=stitch.id).logits, rtol=1e-4, atol=1e-5)


@ALL
@torch.no_grad()
def test_the_base_model_gives_timms_features(name: str) -> None:
    classifier, x = make(name), images(name)
    model = StitchableModel(copy.deepcopy(classifier.config)).eval()
    model.load_state_dict(classifier.state_dict())
    for index in range(2):
        twin = timm_twin(classifier, index)
        features = twin.forward_features(x)
        output = model(x, stitch_id=index)
        assert torch.equal(output.last_hidden_state, features)
        assert torch.equal(output.pooler_output, twin.forward_head(features, pre_logits=True))


@torch.no_grad()
def squared_errors(model: StitchableForImageClassification, x: torch.Tensor) -> dict[str, float]:
    """||A W^T + 1 b^T - B||^2 of each stitching layer as it is, over all its joints."""
    joints = rows_of_layers(model)
    features = anchor_features(model, x, joints)
    errors = dict.fromkeys(joints, 0.0)
    for name, shared in joints.items():
        layer = model.get_stitching_layer(name)
        for source, target in shared:
            errors[name] += float(
                (features[source] @ layer.linear.weight.T + layer.linear.bias - features[target]).square().sum()
            )
    return errors


@ALL
def test_least_squares_beats_a_random_layer(name: str) -> None:
    model, x = make(name), images(name, 40)
    initialize_stitches(model, method="kaiming")
    random = squared_errors(model, x)
    residuals = initialize_stitches(model, [x], num_samples=40)
    fitted = squared_errors(model, x)
    assert set(residuals) == set(fitted) == {layer for stitch in model.stitches for layer in stitch.layers}
    assert all(fitted[layer] < random[layer] for layer in fitted)


@pytest.mark.parametrize(
    ("name", "reentrant"), [*((name, False) for name in FAMILIES), ("eva-mixed", True), ("relpos-shared", True)]
)
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    model, x = make(name), images(name, 4)
    stitch_id = model.stitches[-1].id
    model.train()
    # Batch norm would see the batch twice; checkpointing is exact for everything else.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.eval()
    torch.manual_seed(3)  # Swin has drop path by default
    model(x, stitch_id=stitch_id).logits.square().sum().backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        # transformers 5.2x renames it; the old name is what users of all versions know.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.gradient_checkpointing
    torch.manual_seed(3)
    model(x, stitch_id=stitch_id).logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[key] is None), key
        if parameter.grad is not None:
            if reentrant:  # it sums the gradients of what blocks share in another order
                torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(parameter.grad, expected[key]), key
