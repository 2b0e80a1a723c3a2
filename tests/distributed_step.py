"""Run by test_distributed.py on two processes: data-parallel steps that use a part of the parameters."""

import torch

from families import images, make
from stitchable.training.fit import Stitches
from stitchable.training.processes import make_accelerator, start_processes


def main() -> None:
    """Print, on the main process, how gradients compare, and what a later step of another stitch leaves alone."""
    start_processes()
    accelerator = make_accelerator()
    model, x, labels = make("vit"), images("vit", 8), torch.arange(8) % 5
    reference = make("vit")
    reference(x, labels=labels, stitch_id=4).loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    wrapped, optimizer = accelerator.prepare(Stitches(model), optimizer)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    (logits,) = wrapped(x[mine], (4,))
    accelerator.backward(torch.nn.functional.cross_entropy(logits, labels[mine]))
    worst = torch.zeros(())
    used = 0
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
            continue
        used += parameter.numel()
        worst = torch.maximum(worst, (parameter.grad - expected[name]).abs().max())
        # Not only nearly those of one process: the very same on both.
        both = accelerator.gather(parameter.grad[None])
        assert torch.equal(both[0], both[1]), name
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    # Stitch 4 has optimiser state now. An anchor's step must move nothing that it does not use.
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    (logits,) = wrapped(x[mine], (0,))
    accelerator.backward(torch.nn.functional.cross_entropy(logits, labels[mine]))
    third = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            third += parameter.numel()
            both = accelerator.gather(parameter.grad[None])
            assert torch.equal(both[0], both[1]), name
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved, "the step moved nothing"
    assert all(name.startswith("anchors.0.") for name in moved), moved
    total = sum(parameter.numel() for parameter in model.parameters())
    worst = accelerator.gather(worst[None]).max()
    counts = f"used {used}, {third} of {total} worst {float(worst)} moved {len(moved)}"
    accelerator.print(f"processes {accelerator.num_processes} {counts}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
