"""Judge-free metrics of the user's (`--metrics`), plug-ins: functions of one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from danceopd.bench.metrics.names import METRICS
from danceopd.bench.suites.protocol import Item
from danceopd.common.system import resolve_device
from danceopd.errors import UserError
from danceopd.plugins import check_options, load, name_of, origin

if TYPE_CHECKING:
    from danceopd.bench.metrics.features import Network


@dataclass
class OwnMetric:
    """One metric, which is measured as a network's are (`features.Network`), of generated images, too."""

    name: str
    function: Callable[..., float | None]
    identity: dict[str, Any]

    def measure(
        self, item: Item, image: Image.Image, source: Image.Image | None, target: Image.Image | None
    ) -> dict[str, float]:
        """The number by the metric's name; nothing where the function returns None or NaN. UserError for another."""
        found = self.function(image, source, target, item.prompt)
        if found is None:
            return {}
        try:
            number = float(found)
        except (TypeError, ValueError):
            number = math.inf
        if math.isinf(number):
            raise UserError(f"metric {self.name} returned {found!r}; let it return a finite number, or None")
        return {} if math.isnan(number) else {self.name: number}


def load_metrics(names: Sequence[str | Callable[..., float | None]]) -> tuple[OwnMetric, ...]:
    """The metrics of these names, or functions; each is called what stands after the colon of module:name.

    UserError for what is no metric, for two of one name, and for the name of one that is built in.
    """
    found: dict[str, OwnMetric] = {}
    for given in names:
        name = name_of("metric", given)
        function = load("metric", name)
        check_options("metric", name, function, {})
        short = name.rpartition(":")[2]
        if short in METRICS or short in found:
            raise UserError(f"metric {name} would be reported as {short!r}, which is another metric; rename it")
        found[short] = OwnMetric(short, function, {"metric": name, "origin": str(origin("metric", name))})
    return tuple(found.values())


def load_measures(
    features: Sequence[str], metrics: Sequence[str | Callable[..., float | None]], device: str
) -> tuple[Network, ...]:
    """The networks of `features` on a device, and the functions of `metrics`; torch is loaded for networks alone."""
    own = load_metrics(metrics)
    if not features:
        return own
    from danceopd.bench.metrics.features import load_networks

    return (*load_networks(features, resolve_device(device).type), *own)
