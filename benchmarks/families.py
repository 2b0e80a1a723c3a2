"""Claims: an anchor computes what timm computes, bit for bit; spaces and costs are the published ones.

    python benchmarks/families.py

For each family at its native image size, with random weights: the number of stitches, the largest difference between
the logits of every anchor and those of a timm model of its own with the same weights, and the anchors' FLOPs beside
the figures of fvcore (https://github.com/ziplab/SN-Net, stitching_*/results), where the authors report them.
"""

import timm
import torch
from report import write_report
from tqdm import tqdm

import stitchable

SAME_PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FAMILIES = {
    "DeiT-Ti/S/B": (["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"], {}),
    "DeiT-Ti/S distilled": (["deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224"], {}),
    "Swin-Ti/S/B": ([f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")], {}),
    "ResNet-18/50": (["resnet18", "resnet50"], {"stages": [1, 2]}),
    "ResNet-18/Swin-Ti": (["resnet18", "swin_tiny_patch4_window7_224"], {"stages": [1, 2], "num_labels": 1000}),
    "LeViT-192/256": (["levit_192", "levit_256"], {}),
    "ConvNeXt-T/S": (["convnext_tiny", "convnext_small"], {"num_labels": 1000}),
    "RegNetY-1.6/3.2GF": (["regnety_016", "regnety_032"], {}),
    # timm's weights of these two were trained on pixels normalised differently; these are random ones.
    "EfficientNet-B0/B1": (["efficientnet_b0", "efficientnet_b1"], {"image_size": 224, **SAME_PIXELS}),
    "MobileNetV3-L 0.75/1.0": (["mobilenetv3_large_075", "mobilenetv3_large_100"], {}),
}
FVCORE = {
    "deit_tiny_patch16_224": 1258411200,
    "deit_small_patch16_224": 4608338304,
    "deit_base_patch16_224": 17582740224,
    "resnet18": 1819065856,
    "resnet50": 4111512576,
    "swin_tiny_patch4_window7_224": 4509194496,
    "swin_small_patch4_window7_224": 8768534784,
    "swin_base_patch4_window7_224": 15467826176,
    "levit_192": 661663808,
    "levit_256": 1133412864,
}


@torch.no_grad()
def main() -> None:
    """Print a Markdown table and store the figures."""
    figures = {}
    print("| family | stitches | max difference to timm | FLOPs of the anchors | fvcore |\n|:---|---:|---:|:---|:---|")
    for name, (architectures, settings) in tqdm(FAMILIES.items(), desc="families", leave=False):
        torch.manual_seed(0)
        model = stitchable.from_anchors(architectures, pretrained=False, **settings).eval()
        x = torch.randn(2, 3, *model.config.image_size)
        difference, flops = 0.0, []
        for index, entry in enumerate(model.config.anchors):
            twin = timm.create_model(entry["architecture"], num_classes=model.config.num_labels, **entry["kwargs"])
            twin.load_state_dict(model.anchors[index].state_dict())
            apart = (twin.eval()(x) - model(x, stitch_id=index).logits).abs().max()
            difference = max(difference, float(apart))
            flops.append(model.stitches[index].flops)
        published = [FVCORE.get(entry["architecture"]) for entry in model.config.anchors]
        verdict = "" if None in published else "equal" if published == flops else str(published)
        listed = ", ".join(f"{number:,}" for number in flops)
        tqdm.write(f"| {name} | {len(model.stitches)} | {difference} | {listed} | {verdict} |")
        figures[name] = {
            "stitches": len(model.stitches),
            "max_difference": difference,
            "flops": flops,
            "fvcore": published,
        }
    print(f"wrote {write_report('families', figures)}")


if __name__ == "__main__":
    main()
