"""What a step of the loop runs: several stitches in one forward pass, and batch norms."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from families import images, make
from stitchable.training.fit import Stitches, train_mode
from stitchable.training.recipe import Schedule


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_stitches_that_share_a_batch_have_the_mean_of_their_gradients(family: str) -> None:
    """Stitch j of k sees the positions i with i mod k = j, also where batch norms see what a batch holds."""
    x, labels, ids = images(family, 12), torch.arange(12) % 5, (0, 3, 4)
    together, alone = make(family).train(), make(family).train()
    (logits,) = Stitches(together, share=True)(x, ids)
    cross_entropy(logits, labels).backward()
    for j, stitch_id in enumerate(ids):
        expected = alone(x[j::3], stitch_id=stitch_id).logits
        torch.testing.assert_close(logits[j::3], expected, rtol=1e-5, atol=1e-5)
        (cross_entropy(expected, labels[j::3]) / 3).backward()
    for (name, theirs), ours in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert (theirs.grad is None) == (ours.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_batch_that_stitches_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="8 images cannot be shared equally by 3 stitches of a step"):
        Stitches(make("vit"), share=True)(images("vit", 8), (0, 3, 4))


@pytest.mark.parametrize("batch_norms", ["keep", "update"])
def test_statistics_stay_unless_they_shall_not(batch_norms: str) -> None:
    model = make("resnet")
    before = {name: value.clone() for name, value in model.named_buffers()}
    schedule = Schedule(epochs=1, batch_size=4, learning_rate=1.0, batch_norms=batch_norms)
    train_mode(model, model, schedule)
    model(images("resnet", 4), stitch_id=0).logits.sum().backward()
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert bool(moved) == (batch_norms == "update")
    assert all(name.startswith("anchors.0.") for name in moved)
    assert model.anchors[0].bn1.weight.grad is not None
