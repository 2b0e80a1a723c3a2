"""ImageNet's classes in words: "goldfish, Carassius auratus" is n01443537, its number in WordNet."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo

# Together they have every class; where words are told apart, those of ImageNet-1K come first.
_SUBSETS = ("imagenet-1k", "imagenet-22k", "imagenet-21k-goog")


@cache
def imagenet_words() -> dict[str, str]:
    """The words of each class by its number in WordNet, as timm has them; of 21,844 classes.

    Where classes have the same words, the second is called "crane2" and so on, as on the Hub in ILSVRC/imagenet-1k.
    """
    words: dict[str, str] = {}
    count: Counter[str] = Counter()
    for subset in _SUBSETS:
        info = ImageNetInfo(subset)
        for number, description in zip(info.label_names(), info.label_descriptions(), strict=True):
            if number not in words:
                count[description] += 1
                words[number] = description if count[description] == 1 else f"{description}{count[description]}"
    return words


def in_words(names: Sequence[str]) -> list[str]:
    """Names of classes, in words if all of them are ImageNet's numbers in WordNet; else as they are."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return list(names)
    words = imagenet_words()
    return [words[name] for name in names] if set(names) <= set(words) else list(names)
