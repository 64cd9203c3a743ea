"""Recorded walks equal the walks they record: every family, across updates, prompts, sources, and rows that leave.

A tape stands in for CUDA graphs (`tape.py`): operators repeated on the memory of the recording, and nothing else.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_loop
import torch
from tape import Tape
from tiny import tiny_klein
from walk_cases import CASES, NAMES, afresh, walks, world

from danceopd import captured
from danceopd.attention import core, installed, using
from danceopd.captured import CapturedField, Constants, CudaGraphs, Held, Refused, padded, walking
from danceopd.fields import AdapterField, GuidedField, MergedField
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.family import as_it_is
from danceopd.recipe import Recipe

KLEIN = CASES[NAMES.index("flux2-klein generation")]
QWEN = CASES[NAMES.index("qwen-image generation")]


@pytest.fixture(scope="module")
def klein():
    one = world(*KLEIN)
    return one, one.conditions(), MergedField(one.backbone, "student")


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_recorded_walks_are_the_walks(case):
    """Bit for bit what the same forward computes unrecorded, and the stock forward's but for padding's rounding."""
    tape = Tape()
    found, field = walks(world(*case), tape)
    for recorded, same, stock in found:
        assert torch.equal(recorded, same)
        assert torch.equal(recorded, stock) or case[0].family == "qwen-image"
        assert (recorded - stock).abs().max() < 1e-5
    assert not torch.equal(found[0][0], found[2][0])
    assert 3 <= tape.count == len(field) < tape.count + tape.replays and tape.replays >= 3 and not field._refused


def test_prompts_that_pad_to_one_length_share_a_graph():
    """Z-Image's captions to 32 tokens, Qwen-Image's uneven rows to 32 words; who is full keeps the stock forward."""
    for name in ("z-image generation", "qwen-image generation"):
        one, tape = world(*CASES[NAMES.index(name)]), Tape()
        field = CapturedField(MergedField(one.backbone, "student"), tape, after=1)
        x, sigma = one.noise(1, 2), torch.tensor([0.8, 0.4])
        for words in (["a red", "a white ring"], ["a blue square", "a"], ["two", "a star"]):
            condition = one.conditions(words=words)
            assert (field(x, sigma, condition) - field.field(x, sigma, condition)).abs().max() < 1e-5
        assert (tape.count, tape.replays) == (1, 2), name


def test_what_is_no_tensor_is_part_of_the_layout():
    """A long caption and a short one, then the other way round: equal shapes, other graphs."""
    one, tape = world(*CASES[NAMES.index("z-image generation")]), Tape()
    field = CapturedField(MergedField(one.backbone, "student"), tape, after=1)
    x, sigma, words = one.noise(1, 2), torch.tensor([0.8, 0.4]), ["a red circle" + " and a star" * 4, "a"]
    for condition in (one.conditions(words=words), one.conditions(words=words[::-1])):
        assert torch.equal(field(x, sigma, condition), field.field(x, sigma, condition))
    assert tape.count == 2


def test_many_rows_are_padded_to_few_sizes(klein):
    assert [padded(n) for n in (1, 5, 16, 17, 18, 19, 32, 33, 37, 64)] == [1, 5, 16, 18, 18, 20, 32, 36, 40, 64]
    assert all(n <= padded(n) < 9 / 8 * n for n in range(1, 300))
    assert len({padded(n) for n in range(1, 65)}) == 16 + 8 + 8
    one, condition, plain = klein
    field, rows = CapturedField(plain, Tape(), after=1), [i % 3 for i in range(20)]
    for count in (20, 19, 19):
        x, sigma = one.noise(*range(count)), torch.linspace(1, 0.1, count)
        many = condition.rows(rows[:count])
        out = field(x, sigma, many)
        assert out.shape == x.shape and (out - plain(x, sigma, many)).abs().max() < 1e-5
    assert len(field) == 1 and field.recorder.replays == 2


def test_a_guided_walk_is_recorded(klein):
    one, condition, plain = klein
    null = one.conditions(words=["a", "a", "a"])
    field = CapturedField(plain, Tape(), after=1)
    for seed in (1, 2):
        x, sigma = one.noise(seed, 5, 6), torch.tensor([0.9, 0.5, 0.1])
        guided = [GuidedField(f, null, 3.0)(x, sigma, condition) for f in (field, plain)]
        assert torch.equal(*guided)
    assert (field.recorder.count, field.recorder.replays) == (1, 3)


def test_an_answer_is_nobody_elses(klein):
    """Kept answers do not change when the graph runs again, and neither do the inputs."""
    one, condition, plain = klein
    field, sigma = CapturedField(plain, Tape(), after=1), torch.full((3,), 0.5)
    answers = []
    for seed in (1, 2, 3):
        x = one.noise(seed, 8, 9)
        answers.append((x.clone(), x, field(x, sigma, condition)))
    for before, x, answer in answers:
        assert torch.equal(before, x) and torch.equal(answer, plain(x, sigma, condition))


def test_positions_are_inputs():
    """FLUX.1's belong to no row: another place of every token, same graph."""
    one = world(*CASES[NAMES.index("flux1 editing")])
    plain, condition = MergedField(one.backbone, "student"), one.conditions()
    moved = replace(condition, shared={key: ids.flip(0) for key, ids in condition.shared.items()})
    field, x, sigma = CapturedField(plain, Tape(), after=1), one.noise(1, 2, 3), torch.full((3,), 0.5)
    for asked in (condition, moved, condition):
        assert torch.equal(field(x, sigma, asked), plain(x, sigma, asked))
    assert field.recorder.count == 1 and not torch.equal(plain(x, sigma, moved), plain(x, sigma, condition))


def test_rare_layouts_are_not_recorded(klein):
    """Eight times, and over an update of the weights."""
    one, condition, plain = klein
    field, x, sigma = CapturedField(plain, Tape()), one.noise(1, 2, 3), torch.full((3,), 0.5)
    for _ in range(20):
        field(x, sigma, condition)
    assert len(field) == 0
    one.update(1)
    assert torch.equal(field(x, sigma, condition), plain(x, sigma, condition)) and len(field) == 1
    for _ in range(6):
        field(x[:2], sigma[:2], condition.rows([0, 1]))
    one.update(2)
    assert len(field) == 1 and field(x[:2], sigma[:2], condition.rows([0, 1])) is not None and len(field) == 1
    field(x[:2], sigma[:2], condition.rows([0, 1]))
    assert len(field) == 2


def test_few_graphs_are_kept(klein, caplog):
    one, condition, plain = klein
    field, x, sigma = CapturedField(plain, Tape(), after=1, most=2), one.noise(1, 2, 3), torch.full((3,), 0.5)
    for count in (3, 2, 3, 1, 3, 2):  # 2 was not asked for longest when 1 came
        out = field(x[:count], sigma[:count], condition.rows(list(range(count))))
        assert torch.equal(out, plain(x[:count], sigma[:count], condition.rows(list(range(count)))))
        assert len(field) <= 2
    assert field.recorder.count == 4 and caplog.text.count("more than 2 layouts are walked") == 1


def test_weights_that_moved_are_recorded_anew(klein):
    one, condition, plain = klein
    field, x, sigma = CapturedField(plain, Tape(), after=1), one.noise(1, 2, 3), torch.full((3,), 0.5)
    places = lambda: [w.data_ptr() for w in one.backbone._merged["student"].weights.values()]  # noqa: E731
    field(x, sigma, condition)
    before = places()
    one.update(5)
    field(x, sigma, condition)
    assert places() == before and field.recorder.count == 1
    merged = one.backbone._merged["student"].weights
    merged.update({path: weight.clone() for path, weight in merged.items()})
    one.update(6)
    assert torch.equal(field(x, sigma, condition), plain(x, sigma, condition)) and field.recorder.count == 2


class Broken(Tape):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def record(self, run):
        self.count += 1
        raise self.error


def test_what_cannot_be_recorded_runs_as_before(klein, caplog):
    """A refusal is of one layout; any other error ends recording. Each is said once."""
    one, condition, plain = klein
    x, sigma = one.noise(1, 2, 3), torch.full((3,), 0.5)
    for error, records in ((Refused("it is large"), 2), (RuntimeError("CUDA error: graphs\nmore"), 1)):
        field = CapturedField(plain, Broken(error), after=1)
        for count in (3, 3, 2, 2):
            rows = condition.rows(list(range(count)))
            assert torch.equal(field(x[:count], sigma[:count], rows), plain(x[:count], sigma[:count], rows))
        assert field.recorder.count == records and len(field) == 0
    assert caplog.text.count("a walk of flux2-klein runs without a CUDA graph because it is large") == 1
    assert caplog.text.count("recording one failed: CUDA error: graphs") == 1 and "more" not in caplog.text


def test_a_forward_that_waits_is_refused(monkeypatch, caplog):
    """Without its lengths in the layout Qwen-Image reads them back: no graph, and the answer is right."""
    monkeypatch.setitem(FAMILIES, "qwen-image", replace(FAMILIES["qwen-image"], still=as_it_is))
    one = world(*QWEN)
    plain, condition = MergedField(one.backbone, "student"), one.conditions()
    field, x, sigma = CapturedField(plain, Tape(), after=1), one.noise(1, 2, 3), torch.full((3,), 0.5)
    for _ in range(2):
        assert torch.equal(field(x, sigma, condition), plain(x, sigma, condition))
    assert field.recorder.count == len(field) == 0
    assert caplog.text.count("a walk of qwen-image runs without a CUDA graph because its forward waits") == 1


@pytest.mark.parametrize("ours", [False, True])
def test_padding_masks_are_read_anew_through_the_kernels(ours):
    """A list of visible tokens is not baked into a graph: other lengths, same graph, right answer."""
    one = world(*QWEN)
    field = CapturedField(MergedField(one.backbone, "student"), Tape(), after=1)
    x, sigma = one.noise(1, 2), torch.tensor([0.8, 0.4])
    with installed(one.backbone.transformer), using("op"):
        for words in (["a red", "a white ring"], ["a blue square", "a"]):
            condition = one.conditions(words=words)
            if ours:
                with core.forced("ours"):
                    out, expected = (f(x, sigma, condition) for f in (field, field.field))
            else:
                out, expected = (f(x, sigma, condition) for f in (field, field.field))
            assert (out - expected).abs().max() < 1e-5
    assert (field.recorder.count, field.recorder.replays) == (1, 1)


def test_what_a_graph_reads_is_held_and_nothing_else():
    table, x = torch.ones(4), torch.zeros(4)
    with Held() as held:
        y = (x + table).mul_(2)[1:] + 1
    assert set(held.found) == {t.untyped_storage().data_ptr() for t in (x, table)} and y.shape == (3,)


def test_plain_numbers_are_copied_once():
    made = Constants()
    with made:
        first = torch.tensor([1, 2], dtype=torch.long)
        made.closed = True
        again = torch.tensor([1, 2], dtype=torch.long)
        assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()
        for other in (lambda: torch.tensor([1, 3], dtype=torch.long), lambda: torch.tensor([1, 2])):
            with pytest.raises(Refused):
                other()


def test_a_loop_learns_the_same(files):
    """Three updates whose walks are recorded, against three whose walks compute everything at every step."""
    pipe = tiny_klein()
    draw = test_loop.GenerationPipeline(pipe, test_loop.KLEIN, test_loop.CALL)
    condition = draw.conditions(test_loop.PROMPTS)
    made = ({"generation": condition, "editing": condition}, draw.sigmas())
    loops = [test_loop.make(made, files, steps=3, batch=4, query={"law": "uniform"}) for _ in range(2)]
    loops[0].walk = afresh(loops[0].walk)
    loops[1].walk = CapturedField(loops[1].walk, Tape(), after=1)
    for loop in loops:
        loop.run(lambda done: None)
    assert loops[1].walk.recorder.replays > 0
    for a, b in zip(*(loop.parameters for loop in loops)):
        assert torch.equal(a, b)


def test_where_walks_are_recorded(files, klein, monkeypatch, caplog):
    one, _, merged = klein
    monkeypatch.setattr(captured, "CudaGraphs", lambda device: Tape())
    caplog.set_level(logging.INFO)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")

    def found(walk, field=merged, device=cuda, **fields):
        caplog.clear()
        return walking(Recipe(**files, rollout=walk, **fields), field, device)

    assert isinstance(found({"captured": True}), CapturedField)
    assert found({}) is merged and not caplog.records
    assert found({"captured": True}, device=cpu) is merged and caplog.records[0].levelname == "WARNING"
    lora = AdapterField(one.backbone, "student")
    for walk, field, more, words in (
        ({"captured": True, "merged": False}, lora, {}, "LoRA layers"),
        ({"captured": True}, merged, {"compile": True}, "compile"),
        ({"captured": True, "keep_source": True}, merged, {}, "keep_source"),
    ):
        assert found(walk, field, **more) is field
        assert words in caplog.text and caplog.records[0].levelname == "WARNING"
    monkeypatch.setattr(one.backbone.transformer.transformer_blocks[0], "_hf_hook", object(), raising=False)
    assert found({"captured": True}) is merged and "offloaded" in caplog.text


def test_the_key(files):
    recipe = Recipe(**files, rollout={"captured": True})
    assert recipe.rollout.captured is True and Recipe(**files).rollout.captured is False
    assert recipe.identity() == Recipe(**files).identity() and recipe.resolved() != Recipe(**files).resolved()


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    """torch restores the stream only where a capture ends well; on another stream, nothing later waits for anything."""
    here, current = SimpleNamespace(wait_stream=lambda other: None), []

    @contextmanager
    def graph(*args, **kwargs):
        current.append("of the capture")
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    fakes = {
        "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "CUDAGraph": SimpleNamespace,
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: here,
        "set_stream": current.append,
        "graph": graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(CudaGraphs, "_rehearse", lambda self, run: None)
    with pytest.raises(RuntimeError, match="a previous error"):
        CudaGraphs(torch.device("cuda", 0)).record(lambda: torch.zeros(1))
    assert current[-1] is here
