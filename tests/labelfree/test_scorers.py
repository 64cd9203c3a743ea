"""Judges that no training uses: what they score, and held-out rows that no update draws."""

import json
import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch
from flows import Gaussian
from PIL import Image
from tiny import CALL, random_image, tiny_klein
from torch.nn.functional import cosine_similarity
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from danceopd.data.dataset import TeacherData
from danceopd.data.encode import Encoder, open_pipelines
from danceopd.data.sources import edits_from, prompts_from
from danceopd.errors import UserError
from danceopd.labelfree.probes import FrozenFields, probe_sets
from danceopd.labelfree.scorers import Denoiser, Exact, Similarity, SimilarityScorer, total_variation
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, BaseField
from danceopd.pipelines.registry import FAMILIES
from danceopd.recipe.parts import Teacher
from danceopd.recipe.recipe import Recipe
from danceopd.run.heldout import Row, held_out_rows
from danceopd.worlds.scenes.edits import edits
from danceopd.worlds.scenes.prompts import prompts
from danceopd.worlds.scenes.render import render

DEVICE = torch.device("cpu")
COLOURS = ("red", "green", "blue", "white")


def pictures(clean):
    """A "decoder": rows of numbers in [0, 1] as plain pictures of that colour."""
    return [Image.new("RGB", (48, 40), tuple(int(255 * c) for c in row)) for row in clean.tolist()]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        words |= {letter: len(words), f"{letter}</w>": len(words) + 1}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    look = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=look, tokenizer=CLIPTokenizer(vocab=words, merges=[])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(folder)
    look = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    look.save_pretrained(folder)
    return folder


def test_the_exact_scorer_knows_right_from_wrong():
    drawn, changed = prompts("val", 3), edits("val", 2)
    right = [p.scene for p in drawn] + [e.target for e in changed]
    wrong = [prompts("val", 9)[5].scene] * 3 + [e.source for e in changed]
    shown = torch.arange(10).reshape(10, 1)

    def draw(clean):
        return [Image.fromarray(render((right if i % 2 == 0 else wrong)[i // 2])) for i in clean.flatten().tolist()]

    scores = Exact(draw, [*drawn, *changed])(shown).reshape(5, 2)
    assert scores[:3, 0].tolist() == [1, 1, 1] and (scores[3:, 0] > 0.99).all()
    assert (scores[:, 1] < scores[:, 0]).all()


def test_what_prompts_leave_open_is_compared_with_the_teachers_pictures():
    tasks = [p for p in prompts("val", 60) if p.tag in ("single_object", "position")][:6]
    assert {p.tag for p in tasks} == {"single_object", "position"}
    other = [replace(p.scene, background="sand" if p.scene.background != "sand" else "sky") for p in tasks]
    scenes = [*(p.scene for p in tasks), *other]

    def draw(clean):
        return [Image.fromarray(render(scenes[i])) for i in clean.flatten().tolist()]

    scorer = Exact(draw, tasks)
    scorer.calibrate(torch.arange(6))
    scorer(torch.arange(6))
    assert scorer.open_shift == 0
    scorer(torch.arange(6, 12))
    named = ["sand" if p.scene.background != "sand" else "sky" for p in tasks]
    shift = total_variation(Counter(p.scene.background for p in tasks), Counter(named))
    assert scorer.open_shift == pytest.approx(shift / 3) and shift > 0  # colours and places are the same
    assert total_variation(Counter("aab"), Counter("abbc")) == pytest.approx(5 / 12)
    edit = Exact(lambda clean: [Image.fromarray(render(edits("val", 6)[0].target))], edits("val", 6)[:1])
    edit(torch.zeros(1))
    assert edit.open_shift is None


def test_similarity_of_picture_and_prompt_is_the_model_s_own(clip):
    model = Similarity(str(clip), DEVICE)
    assert model.sentence.startswith("CLIPModel")
    words, clean = ["a red one", "b" * 40], torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    scores = SimilarityScorer(model, pictures, words)(clean)
    theirs = CLIPModel.from_pretrained(clip).eval()
    how = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 24}
    call = CLIPProcessor.from_pretrained(clip)(text=words, images=pictures(clean), **how)
    with torch.no_grad():
        logits = theirs(**call).logits_per_image / theirs.logit_scale.exp()
    torch.testing.assert_close(scores, torch.stack([logits[0, 0], logits[1, 0], logits[2, 1], logits[3, 1]]))
    before = [Image.new("RGB", (48, 40), "red"), Image.new("RGB", (48, 40), "blue")]
    gains = SimilarityScorer(model, pictures, words, before)(clean)
    start = cosine_similarity(model.texts(words), model.pictures(before))
    torch.testing.assert_close(gains, scores - start.repeat_interleave(2))
    left_alone = SimilarityScorer(model, lambda clean: before, words, before)
    assert left_alone(clean[:2]).abs().max() < 1e-6


def test_a_model_without_words_compares_with_the_teacher_s_pictures(dino):
    model = Similarity(str(dino), DEVICE)
    judge = SimilarityScorer(model, pictures, ["one", "two"])
    theirs = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    judge.calibrate(theirs)
    assert judge(theirs).min() > 0.9999 and judge(theirs.flip(0)).max() < 0.9999


def test_what_is_no_judge_is_refused(tmp_path):
    with pytest.raises(UserError, match="monitor.judge .* does not load"):
        Similarity(str(tmp_path), DEVICE)


def test_the_right_prompt_denoises_the_right_picture():
    """Pictures of N(-2, 1/4) and N(2, 1/4): each is denoised better under its own prompt."""

    class Side:
        def __init__(self, sign):
            self.sign = sign

        def __len__(self):
            return len(self.sign)

        def rows(self, index):
            return Side(self.sign[index])

        def to(self, device):
            return self

    def field(x, sigma, condition):
        left, right = Gaussian(-2.0, 0.5)(x, sigma), Gaussian(2.0, 0.5)(x, sigma)
        return torch.where(condition.sign[:, None] > 0, right, left)

    numbers = torch.Generator().manual_seed(0)
    sides, noise = Side(torch.tensor([1, -1])), torch.randn(8, 5, generator=numbers)
    clean = 2 * sides.sign.repeat_interleave(4)[:, None] + 0.5 * torch.randn(8, 5, generator=numbers)
    judge = Denoiser(field, sides, Side(-sides.sign), noise, 0.5, 3)
    assert (judge(clean) > 0).all() and (judge(-clean) < 0).all()


@pytest.fixture
def world(tmp_path, files):
    """A tiny pipeline's encoder and fields, and data of eight prompts and eight edits, six of each drawn."""
    names = [f"a {colour} {shape}" for colour in COLOURS for shape in ("circle", "square")]
    (tmp_path / "words.txt").write_text("\n".join(names))
    rows = []
    for i, name in enumerate(names):
        random_image(i).save(tmp_path / f"{i}.png")
        rows.append({"instruction": f"make it {name}", "source": f"{i}.png"})
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pipe, family = tiny_klein(tmp_path / "models" / "base"), FAMILIES["flux2-klein"]
    pipelines = open_pipelines(pipe, family, CALL, ("generation", "editing"))
    encoder = Encoder(tmp_path / "models" / "base", family, pipelines)
    backbone = Backbone(pipe.transformer, family)
    datasets = {
        "generation": TeacherData(prompts_from(tmp_path / "words.txt"), [0, 1, 2, 3, 4, 6]),
        "editing": TeacherData(edits_from(tmp_path / "edits.jsonl"), list(range(8))),
    }
    base = BaseField(backbone)
    fields = FrozenFields({"generation": base, "editing": base}, AdapterField(backbone, None))
    recipe = Recipe(**files, output="out", data={"generation": "words.txt", "editing": "edits.jsonl"}, batch=4)
    return recipe, encoder, datasets, fields


def held_out(recipe: Recipe, teacher: Teacher, data: TeacherData, count: int) -> list[Row]:
    return held_out_rows(teacher, recipe.data_source(teacher), data, count, recipe.seed)


def test_held_out_rows_are_not_drawn(world, caplog):
    recipe, _, datasets, _ = world
    draws, edit = recipe.teachers
    with caplog.at_level(logging.WARNING):
        held = held_out(recipe, draws, datasets["generation"], 2)
        assert sorted(row.prompt for row in held) == ["a blue square", "a white square"] and not caplog.text
        assert len(held_out(recipe, draws, datasets["generation"], 5)) == 2
    assert "teacher generation: " in caplog.text
    assert "has only 2 rows that training does not sample, and 5 were" in caplog.text
    assert len(held_out(recipe, edit, datasets["editing"], 4)) == 2  # all are drawn: better these than none
    assert "teacher editing: training samples every row" in caplog.text
    made = recipe.model_copy(update={"data": recipe.data.model_copy(update={"editing": "scenes:style_change"})})
    assert {row.task.task_type for row in held_out(made, edit, datasets["editing"], 4)} == {"style_change"}


def test_probes_of_other_data_are_judged_by_a_field_or_a_model(world, clip):
    recipe, encoder, datasets, fields = world
    found, said = probe_sets(recipe, encoder, datasets, fields, DEVICE)
    assert said == "how the base denoises the pictures (a weak judge; give monitor.judge a similarity model)"
    assert [probes.name for probes in found] == ["generation", "editing"] and found[0].prompts == 2
    for probes in found:
        probes.calibrate()
        measured = probes.measure(fields.base)
        assert measured.score.shape == (2, 4) and measured.strength == pytest.approx(1)
        assert measured.spread == pytest.approx(probes.usual_spread)
    monitor = recipe.monitor.model_copy(update={"judge": str(clip)})
    found, said = probe_sets(recipe.model_copy(update={"monitor": monitor}), encoder, datasets, fields, DEVICE)
    assert said.startswith("CLIPModel") and found[1].batches[0].scorer.before.shape == (2,)
