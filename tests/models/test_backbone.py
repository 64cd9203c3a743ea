"""`Backbone`: adapters compared with PEFT's own loading, gradients, merged weights, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny import CALL, random_adapter, random_image, tiny_klein

from danceopd.errors import UserError
from danceopd.models.backbone import Backbone, merging_costs_less
from danceopd.models.fields import AdapterField, BaseField, GuidedField, MergedField, acting
from danceopd.models.lora import Adapter, LoraLinear, _lora_linear
from danceopd.pipelines import EditingPipeline, family_of


@pytest.fixture(scope="module")
def scene():
    """(noise, sigma, condition) of three edits."""
    pipe = tiny_klein()
    edit = EditingPipeline(pipe, family_of(pipe), CALL)
    condition = edit.conditions(["make it red", "remove the star", "add a ring"], [random_image(i) for i in range(3)])
    return edit.noise([1, 2, 3]), torch.tensor([0.9, 0.5, 0.2]), condition


@pytest.fixture
def backbone():
    pipe = tiny_klein()
    backbone = Backbone(pipe.transformer, family_of(pipe))
    backbone.add_adapter("edit", random_adapter(pipe.transformer, seed=1))
    backbone.add_adapter("draw", random_adapter(pipe.transformer, rank=2, seed=2), scale=0.5)
    return backbone


def student_of(backbone, rank=4, **kwargs):
    """A student whose B is not zero, so that every parameter has a gradient."""
    parameters = backbone.new_student(rank=rank, **kwargs)
    with torch.no_grad():
        for number, b in enumerate(parameters[1::2]):
            b.normal_(std=0.2, generator=torch.Generator().manual_seed(number))
    return parameters


def gradients(backbone, scene, between=lambda: None):
    """The student's gradient of |v|², with `between` run between forward and backward."""
    with backbone.acting_as("student"):
        loss = backbone.velocity(*scene).square().mean()
    between()
    parameters = backbone.parameters("student")
    return torch.autograd.grad(loss, parameters)


def equal(a, b, tolerance=0.0):
    return all((x - y).abs().max() <= tolerance for x, y in zip(a, b, strict=True))


def test_adapters_equal_plain_arithmetic(scene):
    """acting_as and merged against a transformer whose weights were edited by hand."""
    pipe = tiny_klein()
    adapter = random_adapter(pipe.transformer, seed=1)
    plain = pipe.transformer
    bare = family_of(pipe).velocity(plain, *scene)
    with torch.no_grad():
        for path, (a, b) in adapter.tensors.items():
            plain.get_submodule(path).weight += 0.7 * b @ a
        expected = family_of(pipe).velocity(plain, *scene)
    assert (expected - bare).abs().max() > 0.1
    backbone = Backbone(tiny_klein().transformer, family_of(pipe))
    backbone.add_adapter("edit", adapter, scale=0.7)
    assert (AdapterField(backbone, "edit")(*scene) - expected).abs().max() < 2e-5
    assert (MergedField(backbone, "edit")(*scene) - expected).abs().max() < 2e-5
    assert torch.equal(BaseField(backbone)(*scene), bare) and torch.equal(backbone.velocity(*scene), bare)


def test_nesting_and_errors_restore(backbone, scene):
    bare, edit = (AdapterField(backbone, name)(*scene) for name in (None, "edit"))
    with backbone.acting_as("edit"):
        with backbone.acting_as("draw"), backbone.acting_as(None):
            assert torch.equal(backbone.velocity(*scene), bare)
        with backbone.merged("draw"):
            with backbone.acting_as("edit"):
                assert torch.equal(backbone.velocity(*scene), edit)
            merged = backbone.velocity(*scene)
        assert (merged - AdapterField(backbone, "draw")(*scene)).abs().max() < 2e-5
        with pytest.raises(RuntimeError, match="boom"), backbone.merged("draw"):
            raise RuntimeError("boom")
        assert torch.equal(backbone.velocity(*scene), edit)
    assert torch.equal(backbone.velocity(*scene), bare)
    with pytest.raises(KeyError, match="no adapter 'nobody'"), backbone.acting_as("nobody"):
        pass


def test_teacher_between_forward_and_backward_leaves_gradients(backbone, scene):
    """Hazard 1: set_adapter would have silenced the student here."""
    student_of(backbone)
    alone = gradients(backbone, scene)
    assert all(g.abs().max() > 0 for g in alone)

    def teachers():
        for field in (AdapterField(backbone, "edit"), BaseField(backbone), MergedField(backbone, "student")):
            field(*scene)

    assert equal(alone, gradients(backbone, scene, teachers))
    trainable = [p for p in backbone.transformer.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in backbone.parameters("student")}


@pytest.mark.parametrize("recompute", [False, True])
def test_merging_with_gradient_trains_as_lora_layers_do(backbone, scene, recompute, monkeypatch):
    """The same velocity and gradient without a LoRA layer, whatever runs between forward and backward."""
    parameters = student_of(backbone)
    plain = gradients(backbone, scene)
    storage = [p.data_ptr() for p in backbone.transformer.parameters()]
    backbone.checkpoint_gradients(recompute)
    ran = []
    monkeypatch.setattr("danceopd.models.lora._lora_linear", lambda *a: ran.append(1) or _lora_linear(*a))
    with backbone.merged_with_grad("student"):
        velocity = backbone.velocity(*scene)
    MergedField(backbone, "edit")(*scene)
    merged = torch.autograd.grad(velocity.square().mean(), parameters)
    assert bool(ran) == recompute and equal(plain, merged, 1e-6)
    assert (velocity - AdapterField(backbone, "student")(*scene)).abs().max() < 2e-5
    assert [p.data_ptr() for p in backbone.transformer.parameters()] == storage
    with backbone.merged_with_grad("student"), backbone.acting_as(None):
        assert torch.equal(backbone.velocity(*scene), BaseField(backbone)(*scene))


def test_merging_costs_less_for_large_ranks_on_fp32_weights():
    """A sixth of the width is where the gradient of W + BA costs as much as the LoRA layers."""
    layer = torch.nn.Linear(96, 96).requires_grad_(False)
    assert merging_costs_less([(layer.weight, 17)]) and not merging_costs_less([(layer.weight, 16)])
    assert not merging_costs_less([(layer.weight, 17), (layer.weight, 8)])
    assert not merging_costs_less([(layer.to(torch.bfloat16).weight, 17)])


@pytest.mark.parametrize("when", ["before the backbone", "by method", "behind its back"])
def test_checkpointed_recompute_runs_under_the_adapter_of_its_forward(scene, when):
    """Hazard 2: equal ranks, so a wrong recompute would raise nothing and be wrong."""
    pipe = tiny_klein()
    if when == "before the backbone":
        pipe.transformer.enable_gradient_checkpointing()
    backbone = Backbone(pipe.transformer, family_of(pipe))
    backbone.add_adapter("edit", random_adapter(pipe.transformer, seed=1))
    student_of(backbone)
    backbone.checkpoint_gradients(False)
    plain = gradients(backbone, scene)
    if when == "behind its back":
        pipe.transformer.enable_gradient_checkpointing()
    else:
        backbone.checkpoint_gradients()
    calls = []
    hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *a: calls.append(1))

    def backward_elsewhere():
        with backbone.acting_as("student"):
            loss = backbone.velocity(*scene).square().mean()
        with backbone.acting_as("edit"):
            wrong_place = torch.autograd.grad(loss, backbone.parameters("student"), retain_graph=True)
            still_edit = backbone.velocity(*scene)
        assert equal([still_edit], [AdapterField(backbone, "edit")(*scene)], 1e-6)
        with backbone.merged("student"):
            in_merged = torch.autograd.grad(loss, backbone.parameters("student"))
        return wrong_place, in_merged

    at_rest = gradients(backbone, scene, lambda: AdapterField(backbone, "edit")(*scene))
    assert len(calls) >= 3  # forward, teacher, and a recompute: checkpointing was on
    for recomputed in (at_rest, *backward_elsewhere()):
        assert equal(plain, recomputed, 1e-6)
    hook.remove()


def test_many_refreshes_leave_pristine_weights_untouched(backbone, scene):
    parameters = student_of(backbone)
    layers = {p: m for p, m in backbone.transformer.named_modules() if isinstance(m, LoraLinear)}
    pristine = {p: m.base_layer.weight.detach().clone() for p, m in layers.items()}
    storage = {p: m.base_layer.weight.data_ptr() for p, m in layers.items()}
    buffers = None
    for round_ in range(20):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        backbone.refresh("student")
        with backbone.merged("student"):
            now = [m.base_layer.weight.data_ptr() for m in layers.values()]
            assert buffers in (None, now) and not set(now) & set(storage.values()), "buffers must not move"
            buffers = now
            merged = backbone.velocity(*scene)
        assert (merged - AdapterField(backbone, "student")(*scene)).abs().max() < 2e-5, round_
    assert all(torch.equal(m.base_layer.weight, pristine[p]) for p, m in layers.items())
    assert all(m.base_layer.weight.data_ptr() == storage[p] for p, m in layers.items())


def test_merging_survives_weights_that_move(backbone, scene):
    """`pipe.to(device)` replaces every weight's storage; old pointers must not come back."""
    before = MergedField(backbone, "edit")(*scene)
    for parameter in backbone.transformer.parameters():
        parameter.data = parameter.data.clone()
    moved = [p.data_ptr() for p in backbone.transformer.parameters()]
    assert torch.equal(MergedField(backbone, "edit")(*scene), before)
    assert [p.data_ptr() for p in backbone.transformer.parameters()] == moved
    with backbone.merged("edit"):  # a refresh inside starts from the pristine weights too
        backbone.refresh("edit")
        assert torch.equal(backbone.velocity(*scene), before)
        with pytest.raises(RuntimeError, match="while none is active"):
            backbone.add_adapter("late", backbone.adapter("draw"))
    assert [p.data_ptr() for p in backbone.transformer.parameters()] == moved


def test_merged_weights_follow_an_optimizer(backbone, scene):
    """A forgotten refresh cannot go stale: changed parameters are noticed on entry."""
    parameters = student_of(backbone)
    before = MergedField(backbone, "student")(*scene)
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for parameter, gradient in zip(parameters, gradients(backbone, scene), strict=True):
        parameter.grad = gradient
    optimizer.step()
    after = MergedField(backbone, "student")(*scene)
    assert (after - before).abs().max() > 1e-2
    assert (after - AdapterField(backbone, "student")(*scene)).abs().max() < 2e-5


def test_whoever_is_merged_has_the_one_buffer(backbone, scene):
    """Another adapter's weights take its place, also inside each other's context, and none is stale."""
    student_of(backbone)
    names = ["edit", "draw", "student"]
    wanted = {name: AdapterField(backbone, name)(*scene) for name in names}
    places = set()
    for name in [*names, *names[::-1]]:
        with backbone.merged(name):
            places.add(tuple(layer.weight.data_ptr() for layer in backbone._layers.values()))
            assert (backbone.velocity(*scene) - wanted[name]).abs().max() < 2e-5
    assert len(places) == 1
    with backbone.merged("edit"):
        assert (MergedField(backbone, "draw")(*scene) - wanted["draw"]).abs().max() < 2e-5
        assert (backbone.velocity(*scene) - wanted["edit"]).abs().max() < 2e-5
        with pytest.raises(RuntimeError, match="'draw' would be merged into the weights that 'edit' runs on"):
            backbone.refresh("draw")


def test_weights_are_switched_once_for_many_forwards(backbone, scene, monkeypatch):
    refreshed = []
    refresh = Backbone.refresh
    monkeypatch.setattr(Backbone, "refresh", lambda self, name: refreshed.append(name) or refresh(self, name))
    field, weight = MergedField(backbone, "edit"), next(iter(backbone._layers.values())).base_layer.weight
    with acting(GuidedField(field, scene[2], 2.0)):
        place = weight.data_ptr()
        for _ in range(3):
            field(*scene)
            assert weight.data_ptr() == place
    assert refreshed == ["edit"] and weight.data_ptr() != place
    with acting(backbone.velocity):  # a field of no adapter
        assert weight.data_ptr() != place


def test_without_its_adapters_the_transformer_is_the_stock_one(backbone, scene):
    """Modules, names and weights; stock diffusers loads a LoRA into it."""
    stock = tiny_klein()
    MergedField(backbone, "edit")(*scene)
    with backbone.acting_as("edit"), pytest.raises(RuntimeError, match="outside of acting_as"):
        backbone.remove_adapters()
    backbone.remove_adapters()
    found, wanted = backbone.transformer.state_dict(), stock.transformer.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    kinds = [{path: type(m) for path, m in t.named_modules()} for t in (backbone.transformer, stock.transformer)]
    assert kinds[0] == kinds[1] and not backbone._merged and not backbone.adapters
    again = random_adapter(backbone.transformer, seed=1)
    backbone.add_adapter("edit", again)
    assert (MergedField(backbone, "edit")(*scene) - AdapterField(backbone, "edit")(*scene)).abs().max() < 2e-5


def test_new_student_is_the_base_or_its_init(backbone, scene):
    parameters = backbone.new_student(rank=6, seed=5)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters)
    targets = random_adapter(backbone.transformer).tensors
    assert set(backbone.adapter("student").tensors) == set(targets) and len(parameters) == 2 * len(targets)
    assert torch.equal(AdapterField(backbone, "student")(*scene), BaseField(backbone)(*scene))
    backbone.new_student("again", rank=6, seed=5)
    backbone.new_student("other", rank=6, seed=6)
    first, again, other = (backbone.adapter(n).tensors for n in ("student", "again", "other"))
    for path, (a, b) in first.items():
        assert torch.equal(a, again[path][0]) and not torch.equal(a, other[path][0]) and b.abs().max() == 0
        assert 0.5 * a.shape[1] ** -0.5 < a.abs().max() <= a.shape[1] ** -0.5

    init = backbone.adapter("edit")
    backbone.new_student("kept", rank=6, seed=5, init=init)
    same = AdapterField(backbone, "kept")(*scene) - AdapterField(backbone, "edit")(*scene)
    assert same.abs().max() < 1e-5
    for path, (a, b) in backbone.adapter("kept").tensors.items():
        assert torch.equal(a[:4], init.tensors[path][0]) and torch.equal(b[:, :4], init.tensors[path][1])
        assert torch.equal(a[4:], first[path][0][4:]) and b[:, 4:].abs().max() == 0
    with pytest.raises(UserError, match="rank 3 cannot hold its init of rank 4; raise rank to 4"):
        backbone.new_student("small", rank=3, init=init)
    with pytest.raises(UserError, match="rank is 0"):
        backbone.new_student("none", rank=0)


def test_init_outside_the_targets_is_kept(scene):
    pipe = tiny_klein()
    backbone = Backbone(pipe.transformer, family_of(pipe))
    init = random_adapter(pipe.transformer, rank=2, targets=r"proj_out|x_embedder|.*\.to_q")
    backbone.add_adapter("init", init)
    backbone.new_student(rank=4, init=init)
    assert {"proj_out", "x_embedder"} <= set(backbone.adapter("student").tensors)
    close = AdapterField(backbone, "student")(*scene) - AdapterField(backbone, "init")(*scene)
    assert close.abs().max() < 1e-5


def test_adapter_round_trip_and_assign(backbone, scene):
    draw = backbone.adapter("draw")  # added with scale 0.5, folded now
    backbone.add_adapter("copy", draw)
    assert (AdapterField(backbone, "copy")(*scene) - AdapterField(backbone, "draw")(*scene)).abs().max() < 1e-5
    changed = Adapter({path: (a, b + 1e-2) for path, (a, b) in draw.tensors.items()})
    backbone.assign("draw", changed)
    again = backbone.adapter("draw").tensors
    assert all((again[p][1] - b).abs().max() < 1e-6 for p, (_, b) in changed.tensors.items())
    with pytest.raises(ValueError, match="do not fit"):
        backbone.assign("edit", changed)
    draw.tensors[next(iter(draw.tensors))][0].zero_()  # a copy, not a view
    assert all(a.abs().max() > 0 for a, _ in backbone.adapter("copy").tensors.values())


def test_strict_adapters(backbone):
    good = random_adapter(backbone.transformer, seed=3).tensors
    names = sorted(name for name, _ in backbone.transformer.named_parameters())
    path = "transformer_blocks.0.attn.to_q"
    a, b = good[path]
    with pytest.raises(UserError, match=r"1 of 29 modules are not in this transformer \(blocks.9.q\)"):
        backbone.add_adapter("bad", Adapter({**good, "blocks.9.q": (a, b)}))
    with pytest.raises(UserError, match=r"1 of 28 modules have another shape .*to_q: A \(4, 31\).* on 32x32"):
        backbone.add_adapter("bad", Adapter({**good, path: (a[:, 1:], b)}))
    with pytest.raises(UserError, match="another shape"):
        backbone.new_student(init=Adapter({path: (a[:, 1:], b)}))
    with pytest.raises(UserError, match="not in this transformer"):
        backbone.new_student(init=Adapter({"norm_out.norm": (a, b)}))
    for name, adapter in (("edit", Adapter(good)), ("", Adapter(good)), ("a.b", Adapter(good)), ("x", Adapter({}))):
        with pytest.raises(ValueError, match="name|nothing"):
            backbone.add_adapter(name, adapter)
    assert names == sorted(name for name, _ in backbone.transformer.named_parameters())
    with pytest.raises(UserError, match="already carries a LoRA"):
        Backbone(backbone.transformer, backbone.family)
    inject_adapter_in_model(LoraConfig(target_modules=[path]), pipe := tiny_klein().transformer)
    with pytest.raises(UserError, match="already carries a LoRA"):
        Backbone(pipe, backbone.family)


def test_half_precision_backbone_keeps_fp32_adapters(scene):
    pipe = tiny_klein()
    exact = Backbone(pipe.transformer, family_of(pipe))
    half = Backbone(tiny_klein().transformer.to(torch.bfloat16), family_of(pipe))
    adapter = random_adapter(pipe.transformer, seed=1, size=0.1)
    for backbone in (exact, half):
        backbone.add_adapter("edit", adapter)
        backbone.new_student(rank=2)
    assert all(p.dtype == torch.float32 for n in ("edit", "student") for p in half.parameters(n))
    x, sigma, condition = scene
    condition = condition._map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    answer = AdapterField(exact, "edit")(*scene)
    for field in (AdapterField(half, "edit"), MergedField(half, "edit")):
        velocity = field(x, sigma, condition)
        assert velocity.dtype == torch.float32 and (velocity - answer).norm() < 0.05 * answer.norm()


def test_the_stock_pipeline_generates_with_the_active_adapter(scene):
    """Samples during training come from the stock pipeline on the backbone's own transformer."""
    pipe = tiny_klein()
    backbone = Backbone(pipe.transformer, family_of(pipe))
    backbone.add_adapter("edit", random_adapter(pipe.transformer, seed=1))
    call = {"prompt": "a star", "height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 24}

    def latents():
        return pipe(**call, guidance_scale=1.0, output_type="latent", generator=torch.Generator().manual_seed(0)).images

    bare = latents()
    with backbone.acting_as("edit"):
        acting = latents()
    with backbone.merged("edit"):
        merged = latents()
    assert torch.equal(latents(), bare) and (acting - bare).abs().max() > 0.1
    assert (acting - merged).abs().max() < 1e-4
