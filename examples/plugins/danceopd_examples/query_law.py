"""A law of the queries: noise levels of a triangular distribution on [0, 1]."""

from torch import Tensor, where


def triangle(share: Tensor, peak: float = 0.5) -> Tensor:
    """The noise level below which a share of the queries lies, for each of `share`; `peak` is the commonest level."""
    return where(share < peak, (share * peak).sqrt(), 1 - ((1 - share) * (1 - peak)).sqrt())
