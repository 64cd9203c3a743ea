"""Where adapters fight: several adapters go in; energy, cosine and opposite signs by block come out, and a sentence.

Two LoRAs trained apart are nearly orthogonal (cosine about 0, and half of their entries have opposite signs by chance):
a blend keeps both. Where the cosine is negative they undo each other; where it is high a sum counts the same change
twice.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from torch import Tensor

from danceopd.adapters.blending.entries import trim
from danceopd.adapters.blending.methods import inner
from danceopd.adapters.svd import Factors
from danceopd.models.lora import Adapter

Pair = tuple[int, int]
FIGHT, AGREE = -0.1, 0.3
"""Adapters fight where their cosine is this or lower, and say the same where it is this or higher."""
LARGE = 0.2
"""Signs are compared where both adapters have one of their largest entries: this share, as TIES trims."""
ROWS = 512
"""Signs of a layer are read off at most so many of its rows, evenly spaced."""
_PLACE = re.compile(r"^(?:(?P<stack>.+?)\.)?(?P<number>\d+)\.(?P<rest>.+)$")
_KINDS = {
    "attention": re.compile(r"attn|attention"),
    "feed-forward": re.compile(r"(^|[._])(ff|mlp|feed_forward|ffn)"),
}


@dataclass
class Block:
    """Layers of one kind in one block. `products[i, j]` is ⟨τ_i, τ_j⟩, i ≤ j, summed over its layers."""

    stack: str
    number: int | None
    kind: str
    products: dict[Pair, float] = field(default_factory=lambda: defaultdict(float))
    opposite: dict[Pair, int] = field(default_factory=lambda: defaultdict(int))
    compared: dict[Pair, int] = field(default_factory=lambda: defaultdict(int))

    def energy(self, adapter: int) -> float:
        """‖τ‖² of an adapter here."""
        return self.products[adapter, adapter]

    def cosine(self, pair: Pair) -> float | None:
        """Of the two deltas here; None where one has none."""
        size = (self.energy(pair[0]) * self.energy(pair[1])) ** 0.5
        return self.products[pair] / size if size else None

    def conflict(self, pair: Pair) -> float | None:
        """The share of entries that are large in both and have opposite signs."""
        return self.opposite[pair] / self.compared[pair] if self.compared[pair] else None


def measure(adapters: Sequence[Adapter]) -> list[Block]:
    """The blocks of several adapters, each as strong as it enters the blend; those outside any block come last."""
    blocks: dict[tuple, Block] = {}
    for name in sorted({name for adapter in adapters for name in adapter.tensors}):
        place = place_of(name)
        block = blocks.setdefault(place, Block(*place))
        held = {i: one.tensors[name] for i, one in enumerate(adapters) if name in one.tensors}
        large = {i: _large(pair) for i, pair in held.items()}
        for i, pair in held.items():
            block.products[i, i] += inner(pair, pair)
        for i, j in combinations(held, 2):
            block.products[i, j] += inner(held[i], held[j])
            signs = large[i].sign() * large[j].sign()
            block.opposite[i, j] += int((signs < 0).sum())
            block.compared[i, j] += int((signs != 0).sum())
    return sorted(blocks.values(), key=lambda b: (b.number is None, b.stack, b.number or 0, b.kind))


def place_of(name: str) -> tuple[str, int | None, str]:
    """(stack, number, kind) of a layer's name: ("transformer_blocks", 3, "attention")."""
    found = _PLACE.match(name)
    rest = found["rest"] if found else name
    kind = next((kind for kind, pattern in _KINDS.items() if pattern.search(rest)), "other layers")
    return (found["stack"] or "", int(found["number"]), kind) if found else ("", None, kind)


def _large(pair: Factors) -> Tensor:
    """The largest entries of a delta, on some of its rows; the others are 0."""
    a, b = pair
    return trim(b[:: -(-b.shape[0] // ROWS)] @ a, LARGE)


def sentences(blocks: Sequence[Block], names: Sequence[str]) -> list[str]:
    """What the numbers say, one sentence a pair of adapters."""
    found = []
    for pair in combinations(range(len(names)), 2):
        first, second = names[pair[0]], names[pair[1]]
        cosines = {i: c for i, b in enumerate(blocks) if (c := b.cosine(pair)) is not None}
        if not cosines:
            found.append(f"{first} and {second} share no layer: a blend keeps both whole.")
            continue
        fights = [blocks[i] for i, c in cosines.items() if c <= FIGHT]
        agrees = [blocks[i] for i, c in cosines.items() if c >= AGREE]
        if fights:
            lowest = min(c for c in cosines.values())
            found.append(
                f"{first} and {second} fight in {_places(fights, blocks)}: there they undo each other (cosine down to "
                f"{lowest:.2f}), so a blend loses of both; give one of them less weight there."
            )
        if agrees:
            found.append(
                f"{first} and {second} make the same change in {_places(agrees, blocks)} (cosine up to "
                f"{max(cosines.values()):.2f}): a sum counts it twice; --scale auto takes that back."
            )
        if not fights and not agrees:
            low, high = min(cosines.values()), max(cosines.values())
            found.append(
                f"{first} and {second} fight nowhere: their cosine is between {low:.2f} and {high:.2f} in every block."
            )
    return found


def _places(found: Sequence[Block], blocks: Sequence[Block]) -> str:
    """Blocks in words: "blocks 3 to 7 of attention and block 2 of feed-forward", with stacks if there are several."""
    several = len({block.stack for block in blocks if block.number is not None}) > 1
    numbers: dict[tuple[str, str], list[int]] = defaultdict(list)
    rest = sorted({block.kind for block in found if block.number is None})
    for block in found:
        if block.number is not None:
            numbers[block.stack, block.kind].append(block.number)
    words = []
    for (stack, kind), held in numbers.items():
        where = f" in {stack}" if several and stack else ""
        words.append(f"block{'s' * (len(held) > 1)} {_ranges(held)} of {kind}{where}")
    words += [f"{kind} outside the blocks" for kind in rest]
    return _listed(words)


def _ranges(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 8] as "3 to 5 and 8"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return _listed([f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs])


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
