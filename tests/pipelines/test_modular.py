"""Modular pipelines: recorded up to their first transformer call, and left as they were."""

from __future__ import annotations

import pytest
from tiny_anima import CALL, tiny_anima

from danceopd.errors import UserError
from danceopd.models.base import base_folder
from danceopd.pipelines import GenerationPipeline, family_of
from danceopd.pipelines.modular import call_defaults


def test_recording_changes_nothing_and_logs_no_error(caplog):
    pipe = tiny_anima()
    before = {name: id(part) for name, part in pipe.components.items()}
    blocks = list(pipe.blocks.sub_blocks)
    ours = GenerationPipeline(pipe, family_of(pipe), CALL)
    ours.noise([1, 2])
    assert len(ours.conditions(["a red circle", "a ring"])) == 2
    assert {name: id(part) for name, part in pipe.components.items()} == before
    assert list(pipe.blocks.sub_blocks) == blocks and pipe.guider.num_conditions == 2
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


def test_defaults_are_those_of_the_blocks():
    pipe = tiny_anima()
    defaults = call_defaults(type(pipe))
    assert defaults["num_inference_steps"] == 50 and defaults["max_sequence_length"] == 512
    assert family_of(pipe).stock_call()["num_inference_steps"] == 50


def test_a_merge_says_that_it_does_not_load_one(tmp_path):
    tiny_anima(tmp_path / "base")
    with pytest.raises(UserError, match="is a modular pipeline, which a merge does not load"):
        base_folder(tmp_path / "base")
