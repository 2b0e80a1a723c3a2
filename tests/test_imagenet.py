"""ImageNet's classes in words."""

from timm.data import ImageNetInfo

from stitchable.imagenet import imagenet_words, in_words


def test_every_class_of_timm_has_words_of_its_own() -> None:
    words = imagenet_words()
    assert len(set(words.values())) == len(words) == 21844
    for subset in ("imagenet-1k", "imagenet-12k", "imagenet-22k", "imagenet-21k-goog", "imagenet-21k-miil"):
        info = ImageNetInfo(subset)
        ours = in_words(info.label_names())
        same = [mine == theirs for mine, theirs in zip(ours, info.label_descriptions(), strict=True)]
        assert sum(same) > 0.97 * len(same)


def test_the_two_cranes_are_called_as_on_the_hub() -> None:
    """As in ILSVRC/imagenet-1k, whose other 999 names are those of timm."""
    info = ImageNetInfo("imagenet-1k")
    differing = {number: word for number, word in imagenet_words().items() if number in info.label_names()}
    for number in info.label_names():
        if differing[number] == info.label_name_to_description(number):
            del differing[number]
    assert differing == {"n03126707": "crane2"}
    assert imagenet_words()["n02012849"] == "crane"


def test_only_names_that_are_all_imagenet_s_become_words() -> None:
    assert in_words(["n01443537", "n01440764"]) == ["goldfish, Carassius auratus", "tench, Tinca tinca"]
    for names in (["n01443537", "tench"], ["n01443537", "n00000000"], ["goldfish"], []):
        assert in_words(names) == names
