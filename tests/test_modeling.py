"""Choosing, running and taking out stitches."""

import copy
import json
import logging
import shutil
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

import stitchable
from families import NUM_LABELS, images, make
from stitchable import StitchableForImageClassification, StitchableModel, update_costs
from stitchable.processing import image_processor


@pytest.fixture
def model() -> StitchableForImageClassification:
    return make("vit")


@pytest.fixture
def warnings_of_transformers(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Log records of the model's file; transformers' loggers do not propagate by default."""
    from stitchable.model import modeling_stitchable

    monkeypatch.setattr(modeling_stitchable.logger, "propagate", True)
    type(modeling_stitchable.logger).warning_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


def test_set_stitch_is_the_default_of_later_calls_and_of_the_saved_config(model, tmp_path) -> None:
    x = images("vit")
    stitch = model.set_stitch(5)
    assert (stitch, model.stitch) == (model.stitches[5], model.stitches[5])
    assert torch.equal(model(x).logits, model(x, stitch_id=5).logits)
    assert not torch.equal(model(x).logits, model(x, stitch_id=6).logits)
    model.save_pretrained(tmp_path)
    assert StitchableForImageClassification.from_pretrained(tmp_path).stitch.id == 5


@pytest.mark.parametrize("wrong", [9, -1, 1.0, "1", True, [1]])
def test_an_unknown_stitch_is_refused_everywhere(model, wrong) -> None:
    for choose in (model.set_stitch, model.extract, lambda i: model(images("vit"), stitch_id=i)):
        with pytest.raises(ValueError, match="stitch_id"):
            choose(wrong)
    assert model.stitch.id == 1  # the default of a new model: the largest anchor


def test_for_budget_takes_the_best_measured_and_says_once_when_there_is_none(model, warnings_of_transformers) -> None:
    largest = max(model.stitches, key=lambda stitch: stitch.flops)
    assert model.for_budget(1e12) == largest == model.stitch
    assert model.for_budget(flops=1e12) == largest
    assert warnings_of_transformers.text.count("measured accuracy") == 1
    model.record(4, metrics={"accuracy": 0.9})
    model.record(8, metrics={"accuracy": 0.8})
    warnings_of_transformers.clear()
    assert model.for_budget(1e12).id == 4
    assert model.for_budget(params=10**9).id == 4
    assert "7 of the 9 stitches within this budget have no measured accuracy; the choice is the best of the" in (
        warnings_of_transformers.text
    )
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": 0.5 + stitch.id / 100})
    warnings_of_transformers.clear()
    assert model.for_budget(1e12).id == 8
    assert warnings_of_transformers.text == ""
    with pytest.raises(ValueError, match=r"the cheapest is, by flops stitch 0"):
        model.for_budget(1)
    with pytest.raises(ValueError, match="positive number"):
        model.for_budget(float("nan"))


def test_a_choice_that_changes_nothing_and_one_that_ends(model) -> None:
    x = images("vit")
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": stitch.id / 10})
    model.set_stitch(2)
    assert (model.find(flops=1e12).id, model.find(params=10**9).id, model.stitch.id) == (8, 8, 2)
    with model.using(5) as stitch:
        assert stitch == model.stitch == model.stitches[5]
        assert torch.equal(model(x).logits, model(x, stitch_id=5).logits)
    assert model.stitch.id == 2
    with pytest.raises(RuntimeError, match="an error within"), model.using(stitch_id=3):
        raise RuntimeError("an error within")
    with pytest.raises(ValueError, match="stitch_id 99"), model.using(99):
        pass
    assert model.stitch.id == 2
    with pytest.raises(TypeError, match="flopps"):
        model.for_budget(flopps=3)


def test_figures_are_recorded_in_the_table(model) -> None:
    assert model.record(2, metrics={"accuracy": 0.5}, latency_ms=1.5).latency_ms == 1.5
    assert model.stitches[2].metrics == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="no figure"):
        model.record(2, accuracy=0.5)
    recorded = model.record(2, flops=np.int64(3), metrics={"accuracy": np.float32(0.5), "loss": torch.tensor(0.25)})
    assert recorded.metrics == {"accuracy": 0.5, "loss": 0.25}
    json.dumps(model.config.stitches[2])
    assert model.extract(2).stitch == recorded
    for wrong in ("x", True, None, [1], 10**400, torch.ones(2)):
        with pytest.raises(ValueError, match=r"accuracy must be a number|one number"):
            model.record(2, metrics={"accuracy": wrong})
    with pytest.raises(ValueError, match="metrics must be a mapping by name"):
        model.record(2, metrics=None)


def test_threads_get_the_stitch_they_ask_for(model) -> None:
    x = images("vit")
    with torch.no_grad():
        expected = [model(x, stitch_id=stitch.id).logits for stitch in model.stitches]
    wrong: list[int] = []

    @torch.no_grad()
    def ask(stitch_id: int) -> None:
        for _ in range(40):
            if not torch.equal(model(x, stitch_id=stitch_id).logits, expected[stitch_id]):
                wrong.append(stitch_id)

    threads = [threading.Thread(target=ask, args=(stitch.id,)) for stitch in model.stitches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_route_of_three_segments_goes_back_to_a_smaller_anchor(model) -> None:
    """Nothing in the model knows how many segments there are, or in which order."""
    config = copy.deepcopy(model.config)
    route, layers = [[1, 0, 1], [0, 1, 2], [1, 2, 3]], ["1-0.0", "0-1.0"]
    config.stitches.append({"id": 40, "route": route, "layers": layers})
    longer = StitchableForImageClassification(config).eval()
    x = images("vit")
    small, large = longer.anchors
    features = large.norm_pre(large.patch_drop(large._pos_embed(large.patch_embed(x))))
    features = small.blocks[1](longer.get_stitching_layer("1-0.0")(large.blocks[0](features)))
    features = large.blocks[2](longer.get_stitching_layer("0-1.0")(features))
    expected = large.forward_head(large.norm(features))
    assert torch.equal(longer(x, stitch_id=40).logits, expected)


def test_the_back_anchors_final_norm_belongs_to_the_stitch(model) -> None:
    x = images("vit")
    before = model(x, stitch_id=4).logits
    with torch.no_grad():
        model.anchors[1].norm.weight.mul_(2)
    assert not torch.allclose(model(x, stitch_id=4).logits, before)


def test_the_loss_is_transformers_own(model) -> None:
    x, labels = images("vit", 3), torch.tensor([0, 4, 2])
    output = model(x, labels=labels, stitch_id=4)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    loss, logits = model(x, labels=labels, stitch_id=4, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    (only,) = model(x, stitch_id=4, return_dict=False)
    assert torch.equal(only, logits)
    targets = torch.rand(3, NUM_LABELS)
    model.config.problem_type = "multi_label_classification"
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, targets)
    torch.testing.assert_close(model(x, labels=targets, stitch_id=4).loss, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "resnet-vit"])
def test_hidden_states_are_what_timms_blocks_return(name: str) -> None:
    model, x = make(name), images(name)
    for stitch in model.stitches:
        seen = []

        def keep(module: torch.nn.Module, args: tuple, output: torch.Tensor, seen: list = seen) -> None:
            seen.append(output)

        hooks = []
        for segment in stitch.route:
            chain, anchor = model.chains[segment.anchor], model.anchors[segment.anchor]
            for block in chain.blocks[segment.start : segment.stop]:
                hooks.append(anchor.get_submodule(block[-1]).register_forward_hook(keep))
        output = model(x, stitch_id=stitch.id, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        stem, *hidden_states = output.hidden_states
        assert stem.shape[0] == 2
        assert len(hidden_states) == len(seen) == sum(stop - start for _, start, stop in stitch.route)
        for given, expected in zip(hidden_states, seen, strict=True):
            assert torch.equal(given, expected)
        assert model(x, stitch_id=stitch.id).hidden_states is None
    features = StitchableModel(model.config).eval()(x, output_hidden_states=True, return_dict=False)
    assert len(features) == 3
    model.config.output_hidden_states = True
    assert len(model(x).hidden_states) == len(model.steps()) - 1


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"stich_id": 5}, r"unexpected keyword argument 'stich_id'; did you mean 'stitch_id'\?"),
        ({"label": 1}, "did you mean 'labels'"),
        ({"output_hidden_state": True}, "did you mean 'output_hidden_states'"),
        ({"foo": 1}, "'foo'; there are pixel_values, labels, stitch_id, cascade, output_hidden_states"),
    ],
)
def test_arguments_that_there_are_not_are_refused_with_the_nearest(model, wrong: dict, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        model(images("vit"), **wrong)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(wrong))}'"):
        StitchableModel(model.config)(images("vit"), **wrong)


def test_attention_weights_cannot_be_had(model) -> None:
    assert model(images("vit"), output_attentions=False).attentions is None
    with pytest.raises(ValueError, match="output_attentions: timm's attention"):
        model(images("vit"), output_attentions=True)


def test_a_saved_model_is_complete_for_a_pipeline(tmp_path, warnings_of_transformers) -> None:
    model = make("vit", id2label={number: f"class {number}" for number in range(NUM_LABELS)})
    model.save_pretrained(tmp_path / "first")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "first")
    assert processor.to_dict() == image_processor(model.config).to_dict()
    classify = pipeline("image-classification", model=str(tmp_path / "first"))
    answers = classify(Image.new("RGB", (40, 50), "red"), top_k=NUM_LABELS)
    assert {answer["label"] for answer in answers} == set(model.config.id2label.values())

    # What is there stays, and goes on with the model.
    image_processor(model.config, crop_pct=0.5).save_pretrained(tmp_path / "second")
    model.save_pretrained(tmp_path / "second")
    StitchableForImageClassification.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "third")
    assert AutoImageProcessor.from_pretrained(tmp_path / "third").size["shortest_edge"] == 64
    loaded = StitchableForImageClassification.from_pretrained(tmp_path / "third")
    shutil.rmtree(tmp_path / "third")
    assert warnings_of_transformers.text == ""
    loaded.save_pretrained(tmp_path / "fourth")
    assert "third is no longer there" in warnings_of_transformers.text


def test_a_model_shows_its_stitches_one_per_line(model) -> None:
    model.record(8, metrics={"accuracy": 0.5})
    lines = repr(model.stitches).splitlines()
    assert lines[0] == "(9 stitches"
    assert lines[1].startswith("    Stitch(id=0, route=[[0, 0, 3]], flops=")
    assert lines[5] == "    ... 1 more ..."
    assert lines[-2].endswith("metrics={'accuracy': 0.5}),")
    assert lines[-1] == ")"
    assert max(map(len, lines)) < 140
    assert model.stitches == tuple(model.stitches)
    with pytest.raises(ValueError, match=r"out of range: this model has stitches 0\.\.8; the nearest is 8"):
        model.set_stitch(11)


def test_a_training_step_reaches_only_the_stitchs_parameters(model) -> None:
    model.train()
    stitch = model.stitches[4]
    model(images("vit"), labels=torch.tensor([0, 1]), stitch_id=4).loss.backward()
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert used == {name for name, _ in model.extract(4).named_parameters()}
    assert sum(model.get_parameter(name).numel() for name in used) == stitch.params


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "swin", "resnet-swin"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, x = make(name), images(name)
    stitch_id = model.stitches[-1].id
    expected = model(x, stitch_id=stitch_id).logits
    half = model.to(dtype)(x, stitch_id=stitch_id).logits  # pixel values come in float32 from the image processor
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.2)


def test_loading_in_half_precision(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    half = StitchableForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(images("vit"), stitch_id=4).logits.dtype == torch.bfloat16


def test_moving_to_another_device_moves_everything(model) -> None:
    moved = make("swin").to("meta")
    assert {tensor.device.type for tensor in [*moved.parameters(), *moved.buffers()]} == {"meta"}
    assert moved(images("swin"), stitch_id=3).logits.device.type == "meta"


@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
def test_an_extracted_stitch_compiles_into_one_graph(name: str) -> None:
    extracted, x = make(name).extract(), images(name)
    compiled = torch.compile(extracted, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).logits, extracted(x).logits)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch.compile, while it looks at a block
def test_every_block_is_compiled_and_drops_paths_at_its_own_rate() -> None:
    """Each rate is a version of the code that blocks share, of which torch makes 8 unless it is told otherwise."""
    kwargs = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "depth": 6, "drop_path_rate": 0.9}
    anchors = [{"architecture": "vit_tiny_patch16_224", "kwargs": {**kwargs, "depth": depth}} for depth in (6, 7)]
    model = stitchable.from_anchors(anchors, num_labels=3, pretrained=False).train()
    x = torch.randn(16, 3, 8, 8)

    def draw() -> list[torch.Tensor]:
        torch.manual_seed(1)
        return [model(x, stitch_id=anchor).logits for anchor in (0, 1)]

    expected, calls = draw(), []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        return lambda *arguments: calls.append(graph) or graph(*arguments)

    # Torch's own, which one of timm's optimisers raises for the whole process where it is imported after dynamo.
    with torch._dynamo.config.patch(recompile_limit=8):
        model.compile_blocks(backend=count)
        compiled = draw()
    torch.compiler.reset()
    assert len(calls) == 13  # each block, once
    assert len(set(calls)) == 11  # of a rate each; the first and the last of both anchors have the same
    for ours, theirs in zip(compiled, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_extraction_copies_and_keeps_what_it_copies(model) -> None:
    model.anchors[1].head.weight.requires_grad_(False)
    extracted = model.extract(4)
    assert not extracted.anchors[1].head.weight.requires_grad
    with torch.no_grad():
        extracted.anchors[1].head.weight.zero_()
    assert model.anchors[1].head.weight.abs().sum() > 0
    assert model.extract(0).extract(0).stitch == model.stitches[0]
    with pytest.raises(ValueError, match="stitch 0 was left out of this model, which has stitch 4 only"):
        extracted.set_stitch(0)


def test_other_classes_get_new_heads(model, tmp_path, warnings_of_transformers) -> None:
    model.save_pretrained(tmp_path)
    wider = StitchableForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert "update_costs" in warnings_of_transformers.text
    assert wider(images("vit"), stitch_id=4).logits.shape == (2, 7)
    for anchor, old in zip(wider.anchors, model.anchors, strict=True):
        assert anchor.head.weight.std() > 0
        assert torch.equal(anchor.blocks[0].attn.qkv.weight, old.blocks[0].attn.qkv.weight)
    update_costs(wider)
    assert wider.config.num_labels_of_costs == 7
    assert wider.stitches[4].params == sum(parameter.numel() for parameter in wider.extract(4).parameters())


def test_a_new_model_keeps_timms_initialisation() -> None:

    anchors = [{"architecture": "resnet18", "kwargs": {"layers": [n, 1, 1, 1]}} for n in (1, 2)]
    config = stitchable.make_config(anchors, image_size=32, num_labels=2, stages=[0, 1, 2], pairs="all")
    weight = StitchableForImageClassification(config).anchors[0].conv1.weight
    # Kaiming normal by fan out; transformers would have given 0.02.
    assert abs(weight.std() - (2 / (64 * 49)) ** 0.5) < 0.002


def test_stitching_layers_that_a_checkpoint_lacks_start_as_pytorch_starts_them(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if "stitching" not in file}
    index.write_text(json.dumps(content), encoding="utf-8")
    layer = StitchableForImageClassification.from_pretrained(tmp_path).get_stitching_layer("0-1.0")
    bound = layer.linear.in_features**-0.5  # Kaiming uniform of a 1x1 convolution
    for parameter in (layer.linear.weight, layer.linear.bias):
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.7 * bound


def test_the_auto_classes_know_the_type(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).stitches == model.config.stitches
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is StitchableForImageClassification
    features = AutoModel.from_pretrained(tmp_path)
    assert type(features) is StitchableModel
    assert features(images("vit"), stitch_id=4).pooler_output.shape == (2, 12)


def test_a_copy_is_independent(model) -> None:
    twin, x = copy.deepcopy(model), images("vit")
    twin.set_stitch(4)
    assert model.stitch.id == 1
    assert torch.equal(twin(x).logits, model(x, stitch_id=4).logits)
