"""The sample grid: who draws it, and when."""

from __future__ import annotations

from tiny_trainer import make_trainer, tiny_data, train

from danceopd.engine.trainer import EMA
from danceopd.run.samples import Samples


class Drawn:
    """A grid that only counts."""

    count = 0

    def draw(self, student: object) -> None:
        self.count += 1


def test_only_a_process_that_draws_puts_the_average_on_its_backbone(files: dict[str, str]) -> None:
    data, grid = tiny_data(), Drawn()
    for one in (grid, None):
        trainer = make_trainer(data, files, steps=2, callbacks=[Samples(one, None, 1)])
        train(trainer)
        assert (EMA in trainer.backbone.adapters) == (one is not None)
    assert grid.count == 3
