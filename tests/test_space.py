"""The space of stitches: the paper's counts, the authors' positions, and every setting."""

import ast
from pathlib import Path

import pytest

import stitchable.model.routes
import stitchable.space
from stitchable.model.routes import AnchorShape, Cut, check_stitches
from stitchable.space import enumerate_stitches


def plain(depth: int, width: int, prefix_tokens: int = 1) -> AnchorShape:
    return AnchorShape((depth,), (Cut(width, 14, 14),) * (depth + 1), "NLC", prefix_tokens)


def staged(depths: tuple[int, ...], width: int, stem: int | None = None) -> AnchorShape:
    """Each stage begins with a downsampling by two and a change of width, inside its first block."""
    cuts = [Cut(stem or width, 56, 56)]
    for stage, depth in enumerate(depths):
        cuts += [Cut(width << stage, 56 >> stage, 56 >> stage)] * depth
    return AnchorShape(depths, tuple(cuts), "NCHW")


DEIT = [plain(12, 192), plain(12, 384), plain(12, 768)]
SWIN = [staged((2, 2, 6, 2), 96), staged((2, 2, 18, 2), 96), staged((2, 2, 18, 2), 128)]
RESNET18, RESNET50 = staged((2, 2, 2, 2), 64), staged((3, 4, 6, 3), 256, stem=64)


@pytest.mark.parametrize(
    ("anchors", "settings", "count"),
    [
        (DEIT, {}, 71),
        (DEIT, {"kernel_size": 2, "stride": 2}, 51),
        (DEIT, {"kernel_size": 3, "stride": 3}, 75),
        (DEIT, {"kernel_size": 4, "stride": 4}, 99),
        (DEIT, {"nearest": False}, 732),
        (SWIN, {}, 41),
        ([RESNET18, RESNET50], {"stages": [1, 2]}, 10),
        ([RESNET18, SWIN[0]], {"stages": [1, 2]}, 8),
        ([staged((4, 4, 4), 192), staged((4, 4, 4), 256)], {}, 8),
    ],
)
def test_counts_of_the_paper(anchors: list[AnchorShape], settings: dict, count: int) -> None:
    stitches = enumerate_stitches(anchors, **settings)
    assert len(stitches) == count
    assert [stitch.id for stitch in stitches] == list(range(count))
    check_stitches(stitches, [anchor.depth for anchor in anchors])


def test_ids_and_order_are_the_authors() -> None:
    stitches = enumerate_stitches(DEIT)
    assert [stitches[i].route for i in range(3)] == [((0, 0, 12),), ((1, 0, 12),), ((2, 0, 12),)]
    positions = [(s.route[0].stop - 1, s.route[1].start) for s in stitches[3:9]]
    assert positions == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1)]
    assert stitches[24].route == ((0, 0, 8), (1, 7, 12))
    assert stitches[56].route == ((1, 0, 7), (2, 7, 12))
    assert {s.route[0].anchor for s in stitches[3:37]} == {0}
    assert {s.route[0].anchor for s in stitches[37:]} == {1}


def test_a_layer_is_shared_by_its_window_only() -> None:
    layers: dict[str, list[tuple[int, int]]] = {}
    for stitch in enumerate_stitches(DEIT)[3:37]:
        layers.setdefault(stitch.layers[0], []).append((stitch.route[0].stop - 1, stitch.route[1].start))
    assert len(layers) == 11
    assert layers["0-1.0"] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert layers["0-1.6"] == [(6, 7), (7, 6), (7, 7)]


def test_nearest_interpolation_joins_each_shallow_block_with_its_deep_ones() -> None:
    stitches = enumerate_stitches([plain(2, 8), plain(6, 16)])
    positions = [(s.route[0].stop - 1, s.route[1].start, s.layers[0]) for s in stitches[2:]]
    assert positions == [
        *[(0, 0, "0-1.0"), (0, 1, "0-1.0"), (0, 2, "0-1.0")],
        *[(1, 3, "0-1.1"), (1, 4, "0-1.1"), (1, 5, "0-1.1")],
    ]


def test_forward_never_enters_the_back_at_or_before_the_fronts_last_block() -> None:
    stitches = enumerate_stitches(DEIT, pairs="forward")
    assert len(stitches) == 3 + 2 * 11
    assert all(s.route[1].start == s.route[0].stop for s in stitches[3:])
    deep_front = enumerate_stitches([plain(2, 8), plain(6, 16)], direction="slow_to_fast", pairs="forward")
    # The mirror image of fast_to_slow, which leaves out (0, 0): here the last block of both.
    assert [(s.route[0].stop - 1, s.route[1].start) for s in deep_front[2:]] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]


def test_directions() -> None:
    slow = enumerate_stitches(DEIT, direction="slow_to_fast")
    both = enumerate_stitches(DEIT, direction="both")
    assert [tuple(segment.anchor for segment in s.route) for s in (slow[3], slow[37])] == [(1, 0), (2, 1)]
    assert len(slow) == 71
    assert len(both) == 3 + 4 * 34
    assert len(enumerate_stitches(DEIT, direction="both", nearest=False)) == 3 + 2 * (732 - 3)


def test_chains_pass_through_at_least_one_block_of_the_middle_anchor() -> None:
    chains = [s for s in enumerate_stitches(DEIT, nearest=False) if len(s.route) == 3]
    assert len(chains) == 732 - 3 - 3 * 34
    assert all(s.route[1].start < s.route[1].stop for s in chains)
    assert {tuple(segment.anchor for segment in s.route) for s in chains} == {(0, 1, 2)}


def test_four_anchors_chain_through_three_and_four() -> None:
    anchors = [plain(3, 8 * (1 + index)) for index in range(4)]
    families = {tuple(x.anchor for x in s.route) for s in enumerate_stitches(anchors, kernel_size=1, nearest=False)}
    assert {(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3)} < families


def test_the_last_stage_is_left_out_by_default() -> None:
    assert max(s.route[0].stop for s in enumerate_stitches(SWIN)[3:]) <= 2 + 2 + 18
    assert len(enumerate_stitches(SWIN, stages=[0, 1, 2, 3])) == 41 + 2


def test_positions_of_different_grids_are_left_out() -> None:
    # "all" would enter stage 1 of the back before its downsampling.
    stitches = enumerate_stitches([staged((2, 2), 8), staged((2, 2), 16)], stages=[1], pairs="all")
    assert all(s.route[1].start > 2 for s in stitches[2:])


def test_a_window_over_two_widths_gets_two_layers() -> None:
    stitches = enumerate_stitches([RESNET18, RESNET50], stages=[0], pairs="all")
    widths = {s.layers[0]: RESNET50.cuts[s.route[1].start].channels for s in stitches[2:]}
    for s in stitches[2:]:
        assert RESNET50.cuts[s.route[1].start].channels == widths[s.layers[0]]
    assert set(widths.values()) == {64, 256}


@pytest.mark.parametrize(
    ("anchors", "settings", "message"),
    [
        (DEIT[:1], {}, "at least two anchors, got 1"),
        (DEIT, {"kernel_size": 0}, "kernel_size must be a positive integer"),
        (DEIT, {"stride": 1.5}, "stride must be a positive integer"),
        (DEIT, {"stages": [1]}, r"distinct numbers out of 0\.\.0"),
        (SWIN, {"stages": [1, 1]}, r"distinct numbers out of 0\.\.3"),
        (DEIT, {"direction": "up"}, "direction must be"),
        (DEIT, {"pairs": "some"}, "pairs must be"),
        (DEIT, {"resize": "nearest"}, "resize must be 'bilinear'"),
        ([plain(3, 8), AnchorShape((2,), (Cut(8, 7, 7),) * 3, "NHWC")], {}, "meet nowhere.*14x14 and 7x7.*resize="),
        ([plain(3, 8, 0), AnchorShape((2,), (Cut(8, 14, 14),) * 3, "UNITS")], {}, "order of mask units"),
        (DEIT, {"kernel_size": 1, "pairs": "forward"}, "no stitch"),
        (SWIN, {"stages": []}, "no stitch"),
    ],
)
def test_bad_settings_are_named(anchors: list[AnchorShape], settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        enumerate_stitches(anchors, **settings)


def test_space_and_routes_import_no_torch() -> None:
    for module in (stitchable.space, stitchable.model.routes):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imports += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
        assert not any(name.split(".")[0] in ("torch", "timm", "transformers", "numpy") for name in imports), imports
