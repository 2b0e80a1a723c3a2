"""Run by test_distributed.py on two processes: one data-parallel step of one stitch, its gradients compared."""

import torch

from families import images, make
from train import make_accelerator


def main() -> None:
    """Print, on the main process, how the averaged gradients compare with those of the whole batch on one process."""
    accelerator = make_accelerator()
    model, x, labels = make("vit"), images("vit", 8), torch.arange(8) % 5
    reference = make("vit")
    reference(x, labels=labels, stitch_id=4).loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}

    wrapped = accelerator.prepare(model)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    accelerator.backward(wrapped(x[mine], labels=labels[mine], stitch_id=4).loss)
    worst = 0.0
    used = 0
    for name, parameter in accelerator.unwrap_model(wrapped).named_parameters():
        if expected[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        used += parameter.numel()
        worst = max(worst, float((parameter.grad - expected[name]).abs().max()))
    everyone = accelerator.gather(torch.tensor([worst]))
    accelerator.print(f"processes {accelerator.num_processes} used {used} worst {float(everyone.max())}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
