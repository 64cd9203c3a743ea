"""A whole checkpoint through the backbone's own modules: exact, nothing resident, the base untouched."""

from __future__ import annotations

import pytest
import torch
from tiny import CALL, random_adapter, random_image, tiny_klein

from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.checkpoint import open_checkpoint
from danceopd.models.fields import AdapterField, BaseField
from danceopd.models.lora import LoraLinear
from danceopd.models.streamed import OUTSIDE, StreamedField
from danceopd.pipelines import EditingPipeline, GenerationPipeline, family_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder of the base, folder of a model that differs in every tensor, that model's pipeline)."""
    folder = tmp_path_factory.mktemp("models")
    tuned = tiny_klein(folder / "base")
    tuned.transformer = tiny_klein(seed=1).transformer
    with torch.no_grad():  # also what a LoRA cannot hold
        for name, parameter in tuned.transformer.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    tuned.save_pretrained(folder / "tuned")
    return folder, tuned


@pytest.fixture(scope="module")
def scene():
    pipe = tiny_klein()
    edit = EditingPipeline(pipe, family_of(pipe), CALL)
    condition = edit.conditions(["make it red", "remove the star"], [random_image(i) for i in range(2)])
    return edit.noise([1, 2]), torch.tensor([0.9, 0.3]), condition


@pytest.fixture
def backbone():
    pipe = tiny_klein()
    backbone = Backbone(pipe.transformer, family_of(pipe))
    backbone.add_adapter("edit", random_adapter(pipe.transformer, seed=1))
    backbone.add_adapter("wide", random_adapter(pipe.transformer, seed=2, targets="x_embedder|proj_out"))
    return backbone


def weights(backbone):
    """Every base tensor: where its data lies, and a copy of it."""
    state = backbone.transformer.state_dict(keep_vars=True)
    return {k: (v.data_ptr(), v.detach().clone()) for k, v in state.items()}


def unchanged(before, after):
    return all(before[k][0] == after[k][0] and torch.equal(before[k][1], after[k][1]) for k in before)


@pytest.mark.parametrize("prefetch", [False, True])
def test_velocity_is_the_checkpoints_own_bit_for_bit(models, backbone, scene, prefetch):
    folder, tuned = models
    field = StreamedField(backbone, open_checkpoint(folder / "tuned"), prefetch=prefetch)
    before, bare = weights(backbone), BaseField(backbone)(*scene)
    with torch.no_grad():
        expected = family_of(tuned).velocity(tuned.transformer, *scene)
    assert (expected - bare).abs().max() > 0.1
    for _ in range(2):  # learning the order, then knowing it
        assert torch.equal(field(*scene), expected)
    with backbone.merged("wide"), backbone.acting_as("edit"):  # whoever acts outside is not inside
        assert torch.equal(field(*scene), expected)
    assert unchanged(before, weights(backbone)) and torch.equal(BaseField(backbone)(*scene), bare)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in backbone.transformer.modules())


def test_a_rollout_ends_where_the_stock_pipeline_of_the_checkpoint_ends(models, backbone):
    folder, tuned = models
    pipe = tiny_klein()
    draw = GenerationPipeline(pipe, family_of(pipe), CALL)
    field = StreamedField(backbone, open_checkpoint(folder / "tuned"))
    *_, last = draw.denoise(draw.conditions(["a red star"]), draw.noise([7]), field)
    stock = tuned(
        prompt="a red star", height=64, width=64, num_inference_steps=CALL["steps"], max_sequence_length=24,
        guidance_scale=1.0, output_type="latent", generator=torch.Generator().manual_seed(7),
    ).images  # fmt: skip
    mean, var = (s.view(1, -1, 1, 1) for s in (tuned.vae.bn.running_mean, tuned.vae.bn.running_var))
    grid = last.x.transpose(1, 2).unflatten(2, (4, 4)) * torch.sqrt(var + tuned.vae.config.batch_norm_eps) + mean
    ours = tuned._unpatchify_latents(grid)
    assert (ours - stock).abs().max() <= 1e-5 * stock.abs().max()


def test_never_more_than_a_block_and_one_prefetched(models, backbone, scene):
    """Counted at every layer's own forward: which tensors are not the base's at that moment."""
    folder, _ = models
    pristine = {id(p): p.data_ptr() for p in backbone.transformer.parameters()}
    total = sum(p.numel() * p.element_size() for p in tiny_klein().transformer.parameters())
    swapped, bases = [], [p for n, p in backbone.transformer.named_parameters() if ".lora_" not in n]

    def count(module, inputs, output):
        swapped.append(sum(p.numel() * p.element_size() for p in bases if p.data_ptr() != pristine[id(p)]))

    for prefetch, buffers in ((False, 1), (True, 2)):
        field = StreamedField(backbone, open_checkpoint(folder / "tuned"), prefetch=prefetch)
        field(*scene)
        sizes = [
            sum(-(-backbone_tensor(backbone, n) // 256) * 256 for n in names)
            for block, names in field.blocks.items()
            if block != OUTSIDE
        ]
        assert OUTSIDE not in field.blocks and field.extra_bytes == buffers * max(sizes) < total / 2
        leaves = [m for m in backbone.transformer.modules() if next(m.parameters(recurse=False), None) is not None]
        handles = [m.register_forward_hook(count) for m in leaves if m.weight.data_ptr() in pristine.values()]
        swapped.clear()
        field(*scene)
        for handle in handles:
            handle.remove()
        assert len(swapped) > 40 and 0 < max(swapped) <= max(sizes) and min(swapped) > 0


def backbone_tensor(backbone, name):
    tensor = {k.replace(".base_layer.", "."): v for k, v in backbone.transformer.state_dict().items()}[name]
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("prefetch", [False, True])
def test_an_exception_inside_leaves_the_base_as_it_was(models, backbone, scene, prefetch):
    folder, tuned = models
    field = StreamedField(backbone, open_checkpoint(folder / "tuned"), prefetch=prefetch)
    expected, before = field(*scene), weights(backbone)
    block = backbone.transformer.single_transformer_blocks[0]
    forward = block.attn.forward

    def fail(*args, **kwargs):
        raise RuntimeError("boom")

    block.attn.forward = fail
    with pytest.raises(RuntimeError, match="boom"):
        field(*scene)
    block.attn.forward = forward
    assert unchanged(before, weights(backbone))
    assert not any(m._forward_pre_hooks for m in backbone.transformer.modules())
    assert torch.equal(field(*scene), expected)


def test_between_the_students_forward_and_backward(models, backbone, scene):
    folder, _ = models
    parameters = backbone.new_student(rank=2)
    with torch.no_grad():
        for b in parameters[1::2]:
            b.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    field = StreamedField(backbone, open_checkpoint(folder / "tuned"))

    def gradient(between, checkpointed):
        backbone.checkpoint_gradients(checkpointed)
        with backbone.acting_as("student"):
            loss = backbone.velocity(*scene).square().mean()
        between()
        return torch.autograd.grad(loss, parameters)

    for checkpointed in (False, True):
        alone, with_teacher = (gradient(f, checkpointed) for f in (lambda: None, lambda: field(*scene)))
        assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(alone, with_teacher, strict=True))


def test_scale_walks_from_the_base_to_the_checkpoint(models, backbone, scene):
    folder, tuned = models
    opened = open_checkpoint(folder / "tuned")
    bare = BaseField(backbone)(*scene)
    assert (StreamedField(backbone, opened, scale=0.0)(*scene) - bare).abs().max() < 1e-5
    half, pipe = StreamedField(backbone, opened, scale=0.5), tiny_klein()
    with torch.no_grad():
        for mine, theirs in zip(pipe.transformer.parameters(), tuned.transformer.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
        expected = family_of(pipe).velocity(pipe.transformer, *scene)
    assert (half(*scene) - expected).abs().max() < 1e-5
    assert torch.equal(half(*scene), half(*scene))  # the file in memory was not written into


def test_a_half_precision_backbone_rounds_the_checkpoint_as_loading_does(models, scene):
    folder, _ = models
    x, sigma, condition = scene
    condition = condition._map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    stock = type(tiny_klein()).from_pretrained(folder / "tuned", dtype=torch.bfloat16)
    pipe = tiny_klein()
    backbone = Backbone(pipe.transformer.to(torch.bfloat16), family_of(pipe))
    with torch.no_grad():
        expected = family_of(stock).velocity(stock.transformer, x, sigma, condition)
    assert torch.equal(StreamedField(backbone, open_checkpoint(folder / "tuned"))(x, sigma, condition), expected)


def test_modules_called_outside_their_block_are_held_throughout(models, backbone, scene, monkeypatch):
    """A transformer that reaches into a block, and one that leaves a block out."""
    folder, tuned = models
    kind = type(backbone.transformer)
    forward = kind.forward

    def reaching(self, hidden_states, **kwargs):
        first = self.transformer_blocks[0].attn.to_q(hidden_states).mean()
        last = self.single_transformer_blocks[1]
        with monkeypatch.context() as patch:  # the same width in and out: it can be skipped
            patch.setattr(last, "forward", lambda hidden_states, **_: hidden_states)
            patch.setattr(self.single_transformer_blocks, "_modules", {"0": self.single_transformer_blocks[0]})
            return forward(self, hidden_states=hidden_states + first, **kwargs)

    monkeypatch.setattr(kind, "forward", reaching)
    with torch.no_grad():
        expected = family_of(tuned).velocity(tuned.transformer, *scene)
    field = StreamedField(backbone, open_checkpoint(folder / "tuned"))
    assert torch.equal(field(*scene), expected)
    held = {name.rsplit(".", name.count(".") - 1)[0] for name in field.blocks[OUTSIDE]}
    assert held == {"transformer_blocks.0", "single_transformer_blocks.1"}
    monkeypatch.setattr(kind, "forward", forward)  # another layout uses the block after all
    with torch.no_grad():
        expected = family_of(tuned).velocity(tuned.transformer, *scene)
    assert torch.equal(field(*scene), expected)


def test_another_architecture_is_refused(models, tmp_path):
    folder, _ = models
    pipe = tiny_klein()
    opened = open_checkpoint(folder / "tuned")
    del opened.shapes["x_embedder.weight"]
    with pytest.raises(UserError, match=r"1 tensors differ \(x_embedder.weight\)"):
        StreamedField(Backbone(pipe.transformer, family_of(pipe)), opened)


def test_adapters_may_join_later(models, backbone, scene):
    folder, tuned = models
    field = StreamedField(backbone, open_checkpoint(folder / "tuned"))
    expected = field(*scene)
    backbone.add_adapter("late", random_adapter(backbone.transformer, seed=5, targets=".*context_embedder|.*linear"))
    assert any(isinstance(m, LoraLinear) for m in backbone.transformer.modules())
    assert torch.equal(field(*scene), expected)
    assert not torch.equal(AdapterField(backbone, "late")(*scene), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetching_on_cuda_is_exact_and_stays_within_two_blocks(models, scene):
    folder, tuned = models
    x, sigma, condition = (part.to("cuda") for part in scene)
    pipe = tiny_klein()
    backbone = Backbone(pipe.transformer.to("cuda"), family_of(pipe))
    field = StreamedField(backbone, open_checkpoint(folder / "tuned"))
    with torch.no_grad():
        expected = family_of(tuned).velocity(tuned.transformer.to("cuda"), x, sigma, condition)
    tuned.transformer.to("cpu")
    plain = BaseField(backbone)
    plain(x, sigma, condition)
    torch.cuda.reset_peak_memory_stats()
    plain(x, sigma, condition)
    base = torch.cuda.max_memory_allocated()
    for _ in range(20):
        assert torch.equal(field(x, sigma, condition), expected)
    torch.cuda.reset_peak_memory_stats()
    field(x, sigma, condition)
    assert torch.cuda.max_memory_allocated() - base <= field.extra_bytes + 4096
