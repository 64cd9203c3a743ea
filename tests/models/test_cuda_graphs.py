"""Captured rollouts equal eager ones: every family, across updates, prompts, sources, and rows that leave.

A tape stands in for CUDA graphs (`tape.py`): operators replayed on the memory of the capture, and nothing else.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rollout_cases import CASES, NAMES, rollout_case, rollouts
from tape import Tape
from tiny import CALL, random_adapter, tiny_klein

from danceopd.data.dataset import ConditionDataset
from danceopd.engine.teachers import RoutedTeacher
from danceopd.engine.trainer import STUDENT, Trainer
from danceopd.kernels import installed, using
from danceopd.kernels.capture import ConstantInputs, CudaGraphs, NotCapturable, StoragesRead
from danceopd.models import cuda_graphs
from danceopd.models.backbone import Backbone
from danceopd.models.cuda_graphs import CapturedField, padded_rows, with_cuda_graphs
from danceopd.models.fields import AdapterField, GuidedField, MergedField
from danceopd.pipelines.family import unchanged_condition
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.pipelines.registry import FAMILIES
from danceopd.recipe.recipe import Recipe

KLEIN = CASES[NAMES.index("flux2-klein generation")]
QWEN = CASES[NAMES.index("qwen-image generation")]


@pytest.fixture(scope="module")
def klein():
    one = rollout_case(*KLEIN)
    return one, one.conditions(), MergedField(one.backbone, "student")


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_captured_rollouts_are_the_eager_ones(case):
    """Bit for bit what the same forward computes eagerly, and the stock forward's but for the rounding of padding."""
    tape = Tape()
    found, field = rollouts(rollout_case(*case), tape)
    for captured, same, stock in found:
        assert torch.equal(captured, same)
        assert torch.equal(captured, stock) or case[0].family in ("qwen-image", "bria-fibo", "krea2")
        assert (captured - stock).abs().max() < 1e-5
    assert not torch.equal(found[0][0], found[2][0])
    if FAMILIES[case[0].family].sync_free is None:
        assert tape.count == field.graph_count == 0
        return
    assert 3 <= tape.count == field.graph_count < tape.count + tape.replays and tape.replays >= 3 and not field._refused


def test_prompts_that_pad_to_one_length_share_a_graph():
    """Z-Image pads captions to 32 tokens; Qwen-Image pads to 32 tokens where prompts differ in length."""
    for name in ("z-image generation", "qwen-image generation"):
        one, tape = rollout_case(*CASES[NAMES.index(name)]), Tape()
        field = CapturedField(MergedField(one.backbone, "student"), tape, min_calls=1)
        x, sigma = one.noise(1, 2), torch.tensor([0.8, 0.4])
        for words in (["a red", "a white ring"], ["a blue square", "a"], ["two", "a star"]):
            condition = one.conditions(words=words)
            assert (field(x, sigma, condition) - field.field(x, sigma, condition)).abs().max() < 1e-5
        assert (tape.count, tape.replays) == (1, 2), name


def test_plain_values_are_part_of_the_layout():
    """A long caption and a short one, then the other way round: equal shapes, other graphs."""
    one, tape = rollout_case(*CASES[NAMES.index("z-image generation")]), Tape()
    field = CapturedField(MergedField(one.backbone, "student"), tape, min_calls=1)
    x, sigma, words = one.noise(1, 2), torch.tensor([0.8, 0.4]), ["a red circle" + " and a star" * 4, "a"]
    for condition in (one.conditions(words=words), one.conditions(words=words[::-1])):
        assert torch.equal(field(x, sigma, condition), field.field(x, sigma, condition))
    assert tape.count == 2


def test_many_rows_are_padded_to_few_sizes(klein):
    assert [padded_rows(n) for n in (1, 5, 16, 17, 18, 19, 32, 33, 37, 64)] == [1, 5, 16, 18, 18, 20, 32, 36, 40, 64]
    assert all(n <= padded_rows(n) < 9 / 8 * n for n in range(1, 300))
    assert len({padded_rows(n) for n in range(1, 65)}) == 16 + 8 + 8
    one, condition, plain = klein
    field, rows = CapturedField(plain, Tape(), min_calls=1), [i % 3 for i in range(20)]
    for count in (20, 19, 19):
        x, sigma = one.noise(*range(count)), torch.linspace(1, 0.1, count)
        many = condition.rows(rows[:count])
        out = field(x, sigma, many)
        assert out.shape == x.shape and (out - plain(x, sigma, many)).abs().max() < 1e-5
    assert field.graph_count == 1 and field.graphs.replays == 2


def test_a_guided_rollout_is_captured(klein):
    one, condition, plain = klein
    null = one.conditions(words=["a", "a", "a"])
    field = CapturedField(plain, Tape(), min_calls=1)
    for seed in (1, 2):
        x, sigma = one.noise(seed, 5, 6), torch.tensor([0.9, 0.5, 0.1])
        guided = [GuidedField(f, null, 3.0)(x, sigma, condition) for f in (field, plain)]
        assert torch.equal(*guided)
    assert (field.graphs.count, field.graphs.replays) == (1, 3)


def test_a_velocity_is_a_new_tensor(klein):
    """It does not change when the graph runs again, and neither do the inputs."""
    one, condition, plain = klein
    field, sigma = CapturedField(plain, Tape(), min_calls=1), torch.full((3,), 0.5)
    velocities = []
    for seed in (1, 2, 3):
        x = one.noise(seed, 8, 9)
        velocities.append((x.clone(), x, field(x, sigma, condition)))
    for before, x, velocity in velocities:
        assert torch.equal(before, x) and torch.equal(velocity, plain(x, sigma, condition))


def test_positions_are_inputs():
    """FLUX.1's position ids belong to no row: other positions, same graph."""
    one = rollout_case(*CASES[NAMES.index("flux1 editing")])
    plain, condition = MergedField(one.backbone, "student"), one.conditions()
    moved = replace(condition, shared={key: ids.flip(0) for key, ids in condition.shared.items()})
    field, x, sigma = CapturedField(plain, Tape(), min_calls=1), one.noise(1, 2, 3), torch.full((3,), 0.5)
    for given in (condition, moved, condition):
        assert torch.equal(field(x, sigma, given), plain(x, sigma, given))
    assert field.graphs.count == 1 and not torch.equal(plain(x, sigma, moved), plain(x, sigma, condition))


def test_rare_layouts_are_not_captured(klein):
    """Only after eight calls, and after an update of the weights."""
    one, condition, plain = klein
    field, x, sigma = CapturedField(plain, Tape()), one.noise(1, 2, 3), torch.full((3,), 0.5)
    for _ in range(20):
        field(x, sigma, condition)
    assert field.graph_count == 0
    one.update(1)
    assert torch.equal(field(x, sigma, condition), plain(x, sigma, condition)) and field.graph_count == 1
    for _ in range(6):
        field(x[:2], sigma[:2], condition.rows([0, 1]))
    one.update(2)
    assert field.graph_count == 1
    assert field(x[:2], sigma[:2], condition.rows([0, 1])) is not None and field.graph_count == 1
    field(x[:2], sigma[:2], condition.rows([0, 1]))
    assert field.graph_count == 2


def test_few_graphs_are_kept(klein, caplog):
    one, condition, plain = klein
    field, x, sigma = CapturedField(plain, Tape(), min_calls=1, max_graphs=2), one.noise(1, 2, 3), torch.full((3,), 0.5)
    for count in (3, 2, 3, 1, 3, 2):  # 2 is the least recently used when 1 comes
        out = field(x[:count], sigma[:count], condition.rows(list(range(count))))
        assert torch.equal(out, plain(x[:count], sigma[:count], condition.rows(list(range(count)))))
        assert field.graph_count <= 2
    said = "rollouts have more than 2 layouts, so some are captured again and again"
    assert field.graphs.count == 4 and caplog.text.count(said) == 1


def test_weights_that_moved_are_captured_again(klein):
    one, condition, plain = klein
    field, x, sigma = CapturedField(plain, Tape(), min_calls=1), one.noise(1, 2, 3), torch.full((3,), 0.5)
    places = lambda: [w.data_ptr() for w in one.backbone._merged.values()]  # noqa: E731
    field(x, sigma, condition)
    before = places()
    one.update(5)
    field(x, sigma, condition)
    assert places() == before and field.graphs.count == 1
    merged = one.backbone._merged
    merged.update({path: weight.clone() for path, weight in merged.items()})
    one.update(6)
    assert torch.equal(field(x, sigma, condition), plain(x, sigma, condition)) and field.graphs.count == 2


class Broken(Tape):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def capture(self, run):
        self.count += 1
        raise self.error


def test_what_cannot_be_captured_runs_eagerly(klein, caplog):
    """NotCapturable is about one layout; any other error ends capturing. Each is logged once."""
    one, condition, plain = klein
    x, sigma = one.noise(1, 2, 3), torch.full((3,), 0.5)
    for error, records in ((NotCapturable("it is large"), 2), (RuntimeError("CUDA error: graphs\nmore"), 1)):
        field = CapturedField(plain, Broken(error), min_calls=1)
        for count in (3, 3, 2, 2):
            rows = condition.rows(list(range(count)))
            assert torch.equal(field(x[:count], sigma[:count], rows), plain(x[:count], sigma[:count], rows))
        assert field.graphs.count == records and field.graph_count == 0
    assert caplog.text.count("a rollout of flux2-klein runs without a CUDA graph because it is large") == 1
    assert caplog.text.count("a capture failed: CUDA error: graphs") == 1 and "more" not in caplog.text


def test_a_forward_that_waits_is_refused(monkeypatch, caplog):
    """Without its lengths in the layout Qwen-Image reads them back: no graph, and the velocity is right."""
    monkeypatch.setitem(FAMILIES, "qwen-image", replace(FAMILIES["qwen-image"], sync_free=unchanged_condition))
    one = rollout_case(*QWEN)
    plain, condition = MergedField(one.backbone, "student"), one.conditions()
    field, x, sigma = CapturedField(plain, Tape(), min_calls=1), one.noise(1, 2, 3), torch.full((3,), 0.5)
    for _ in range(2):
        assert torch.equal(field(x, sigma, condition), plain(x, sigma, condition))
    assert field.graphs.count == field.graph_count == 0
    assert caplog.text.count("a rollout of qwen-image runs without a CUDA graph because its forward waits") == 1


def test_padding_masks_are_inputs_of_the_kernels():
    """A list of visible tokens is not baked into a graph: other lengths, same graph, right velocity."""
    one = rollout_case(*QWEN)
    field = CapturedField(MergedField(one.backbone, "student"), Tape(), min_calls=1)
    x, sigma = one.noise(1, 2), torch.tensor([0.8, 0.4])
    with installed(one.backbone.transformer), using("op"):
        for words in (["a red", "a white ring"], ["a blue square", "a"]):
            condition = one.conditions(words=words)
            out, expected = (f(x, sigma, condition) for f in (field, field.field))
            assert (out - expected).abs().max() < 1e-5
    assert (field.graphs.count, field.graphs.replays) == (1, 1)


def test_what_a_graph_reads_is_kept_and_nothing_else():
    table, x = torch.ones(4), torch.zeros(4)
    with StoragesRead() as read:
        y = (x + table).mul_(2)[1:] + 1
    assert set(read.found) == {t.untyped_storage().data_ptr() for t in (x, table)} and y.shape == (3,)


def test_plain_numbers_are_copied_once():
    made = ConstantInputs()
    with made:
        first = torch.tensor([1, 2], dtype=torch.long)
        made.closed = True
        again = torch.tensor([1, 2], dtype=torch.long)
        assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()
        for other in (lambda: torch.tensor([1, 3], dtype=torch.long), lambda: torch.tensor([1, 2])):
            with pytest.raises(NotCapturable):
                other()


def test_training_gives_the_same_student(files):
    """Three updates whose rollouts are captured, against three whose rollouts compute everything at every step."""
    family = FAMILIES["flux2-klein"]
    draw = GenerationPipeline(tiny_klein(), family, CALL)
    prompts = ["a red circle", "a blue square", "two green stars", "a white ring"]
    condition, sigmas = draw.conditions(prompts), draw.sigmas()
    recipe = Recipe(**files, steps=3, batch=4, student={"rank": 8}, query={"law": "uniform"})
    students, graphs, began = [], Tape(), []
    for wrap in (lambda field: field, lambda field: CapturedField(field, graphs, min_calls=1)):
        backbone, teachers = Backbone(tiny_klein().transformer, family), []
        for seed, name in enumerate(("generation", "editing")):
            backbone.add_adapter(name, random_adapter(backbone.transformer, seed=seed, size=0.1))
            dataset = ConditionDataset([(condition, sigmas)])
            teachers.append(RoutedTeacher(name, AdapterField(backbone, name), dataset))
        students.append(backbone.new_student(STUDENT, recipe.student.rank, recipe.seed))
        began = [parameter.detach().clone() for parameter in students[-1]]
        field = wrap(MergedField(backbone, STUDENT))
        Trainer(recipe, backbone, teachers, torch.device("cpu"), field=field).train()
    assert graphs.replays > 0, (graphs.count, graphs.replays)
    for a, b in zip(*students, strict=True):
        assert torch.equal(a, b)
    assert not any(torch.equal(a, b) for a, b in zip(began, students[0], strict=True))  # and it has moved


def test_when_rollouts_are_captured(klein, monkeypatch, caplog):
    case, _, merged = klein
    monkeypatch.setattr(cuda_graphs, "CudaGraphs", lambda device: Tape())
    caplog.set_level(logging.INFO)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")

    def found(field=merged, device=cuda, enabled=True, **flags):
        caplog.clear()
        return with_cuda_graphs(field, device, enabled=enabled, **flags)

    assert isinstance(found(), CapturedField)
    assert found(enabled=False) is merged and not caplog.records
    assert found(device=cpu) is merged and caplog.records[0].levelname == "WARNING"
    lora = AdapterField(case.backbone, "student")
    for field, flags, words in (
        (lora, {}, "LoRA layers"),
        (merged, {"compiled": True}, "compile: true"),
        (merged, {"source_cached": True}, "rollout.cache_source"),
    ):
        assert found(field, **flags) is field
        assert words in caplog.text and caplog.records[0].levelname == "WARNING"
    monkeypatch.setattr(case.backbone.transformer.transformer_blocks[0], "_hf_hook", object(), raising=False)
    assert found() is merged and "offloaded" in caplog.text


def test_the_key(files):
    recipe = Recipe(**files, rollout={"cuda_graphs": True})
    assert recipe.rollout.cuda_graphs is True and Recipe(**files).rollout.cuda_graphs == "auto"
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
    monkeypatch.setattr(CudaGraphs, "_dry_run", lambda self, run: None)
    with pytest.raises(RuntimeError, match="a previous error"):
        CudaGraphs(torch.device("cuda", 0)).capture(lambda: torch.zeros(1))
    assert current[-1] is here
