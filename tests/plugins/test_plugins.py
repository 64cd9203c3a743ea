"""Plug-ins by name: found in packages and modules, refused in one sentence, named again after they were given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from danceopd.adapters.blend import blend
from danceopd.adapters.blending.methods import METHODS, Method
from danceopd.bench.judges.registry import load_judge
from danceopd.bench.metrics.own import load_metrics
from danceopd.bench.suites.registry import load_suite
from danceopd.engine.callbacks import Callback, own_callbacks
from danceopd.engine.objectives import OBJECTIVES
from danceopd.engine.query import BUILTIN, draw_queries
from danceopd.engine.teachers import own_field
from danceopd.errors import UserError
from danceopd.models.lora import Adapter
from danceopd.pipelines.registry import FAMILIES, family_of
from danceopd.planning.plugins import CHECKS, check_plugins
from danceopd.plugins import KINDS, check_name, load, name_of, origin
from danceopd.recipe.recipe import Recipe
from danceopd.recipe.values import BlendMethod, LawWord, ObjectiveWord

OWN = """
from dataclasses import replace
from danceopd.adapters.blending.methods import Method
from danceopd.bench.suites.protocol import ExactSuite
from danceopd.engine.callbacks import Callback
from danceopd.pipelines import FAMILIES

def loss(batch, velocities, delta=1.0):
    yield
def falls(share):
    return 1 - share
def scalar(share):
    return share.mean()
def nothing(field):
    pass
class Watch(Callback):
    def __init__(self, every=1):
        self.every = every
class Bare(ExactSuite):
    name = version = "x"
class Judge:
    name = "x"
def infinite(image, source, target, prompt):
    return float("inf")
def sharpness(image, source, target, prompt):
    return 1.0
def no_callback():
    return 3
number = 3
copied = replace(FAMILIES["sd3"])
elsewhere = replace(FAMILIES["sd3"], name="mine", generation="MyOwnPipeline")
both = Method("both")
flat = Method("flat", merge=lambda deltas, weights, density, draws: deltas[0].sum())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the module `own_parts`; what is imported in a test is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    (tmp_path / "own_parts.py").write_text(OWN)
    (tmp_path / "broken_parts.py").write_text("import nowhere_at_all\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    yield tmp_path
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == tmp_path:
            del sys.modules[name]


def package(folder: Path, name: str, version: str, points: str) -> None:
    """An installed package that has entry points and nothing else."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(points)


def test_the_names_that_are_built_in_are_those_of_the_registries() -> None:
    assert list(get_args(ObjectiveWord)) == list(OBJECTIVES) and list(get_args(BlendMethod)) == list(METHODS)
    assert set(get_args(LawWord)) == set(BUILTIN)
    assert set(CHECKS) == set(KINDS) - {"suite", "judge", "metric"}  # of a bench
    assert len({how.group for how in KINDS.values()}) == len(KINDS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective": "dansopd"}, "objective is 'dansopd' in the recipe; did you mean 'danceopd'"),
        ({"objective": "zzzz"}, "objective is 'zzzz' in the recipe; known: danceopd, .*, module:name"),
        ({"objective": 3}, "objective is 3 in the recipe"),
        ({"objective": "own parts:loss"}, "objective 'own parts:loss' is no module:name; .* as my_module:my_name"),
        ({"objective": "./own_parts.py:loss"}, "as own_parts:loss, from the folder it lies in"),
        ({"objective_options": {"delta": 2}}, "objective_options are for a plug-in, and objective danceopd"),
        ({"query": {"law": "own_parts:falls", "beta": [1, 2]}}, "query.beta is of the built-in laws"),
        ({"query": {"law_options": {"x": 2}}}, "law_options are for a plug-in, and law paper is built in"),
        ({"family": "flux9"}, "there is no family 'flux9'; did you mean 'flux"),
        ({"callbacks": ["own_parts:Watch", "own_parts:Watch"]}, "callbacks: own_parts:Watch is named twice"),
        ({"callbacks": {"own_parts:Watch": 3}}, "callbacks: own_parts:Watch has 3; give a mapping of its options"),
        ({"callbacks": "notes"}, "callbacks: there is no callback 'notes' .one of your own is module:name"),
        ({"callbacks": [3]}, "callbacks: 3 is no callback; name one"),
        ({"family": 3}, "family is 3 in the recipe"),
        ({"student": {"init_method": "tie"}}, "student.init_method is 'tie' in the recipe; did you mean 'ties'"),
        ({"teachers": [{"name": "a", "capability": "generation", "field_options": {"x": 1}},
                       {"name": "b", "capability": "generation", "guidance": 2}], "generation": None, "editing": None},
         "teacher 'a' has field_options and no field"),
    ],
)  # fmt: skip
def test_a_name_is_refused_when_the_recipe_is_made(files: dict, fields: dict, words: str) -> None:
    given = {key: value for key, value in {**files, **fields}.items() if value is not None}
    with pytest.raises(UserError, match=words) as caught:
        Recipe(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective": "nowhere_at_all:loss"}, r"module 'nowhere_at_all' does not import \(ModuleNotFoundError.*lie"),
        ({"objective": "broken_parts:loss"}, "module 'broken_parts' does not import .*named 'nowhere_at_all'"),
        ({"objective": "exits:loss"}, r"module 'exits' does not import \(SystemExit: 3\)"),
        ({"objective": "own_parts:los"}, "module 'own_parts' has no 'los'; did you mean 'loss'"),
        ({"objective": "own_parts:number"}, "objective own_parts:number is of type int; it must be a function .batch"),
        ({"objective": "own_parts:loss", "objective_options": {"dleta": 2}}, "unexpected keyword argument 'dleta'"),
        ({"query": {"law": "own_parts:falls"}}, "query law own_parts:falls falls where its shares rise"),
        ({"query": {"law": "own_parts:scalar"}}, r"query law own_parts:scalar gave shape \(\) for shares of shape"),
        ({"student": {"init_method": "own_parts:number"}}, "is of type int; it must be a Method"),
        ({"student": {"init_method": "own_parts:both"}}, "blend method both needs one of coefficients, merge"),
        ({"family": "own_parts:copied"}, "calls itself 'sd3', which is built in"),
        ({"family": "own_parts:elsewhere"}, "is for MyOwnPipeline, which diffusers .* does not have"),
        ({"callbacks": {"own_parts:Watch": {"evry": 1}}}, "callback own_parts:Watch takes .*'evry'"),
        ({"callbacks": ["own_parts:Bare"]}, "callback own_parts:Bare is the class Bare; it must be a subclass"),
    ],
)
def test_what_does_not_load_is_refused_before_a_model_is_loaded(
    here: Path, files: dict, fields: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_plugins(Recipe(**files, **fields))
    assert "\n" not in str(caught.value)


def test_what_a_bench_takes_is_refused_too(here: Path) -> None:
    for make, words in (
        (lambda: load_suite("own_parts:Bare"), "suite own_parts:Bare has no _scores, editing_items, generation_"),
        (lambda: load_suite("own_parts:loss"), "is of type function; it must be a subclass of ExactSuite"),
        (lambda: load_judge("own_parts:Judge"), "judge own_parts:Judge has no identity, sees, deterministic, check"),
        (lambda: load_judge("own_parts:Judge:text"), "judge own_parts:Judge is made of the text after its name"),
        (lambda: load_judge("own_parts:Judge", batch=3), "is made of --judge-batch: "),
        (lambda: load_metrics(["own_parts:sharpness"]), "would be reported as 'sharpness', which is another metric"),
        (lambda: load_metrics(["own_parts:number"]), "metric own_parts:number is of type int"),
        (lambda: load_metrics(["own_parts:falls"]), "metric own_parts:falls takes .share. and is called with .image"),
        (lambda: own_field("own_parts:nothing", plain, {}), "made something of type NoneType; it must be a function"),
        (lambda: own_callbacks({"own_parts:no_callback": {}}), "no_callback made something of type int"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_names_of_packages(tmp_path: Path, files: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = "[danceopd.objectives]\nhuber = own_losses:huber\n"
    package(tmp_path / "one", "first", "1.0", loss + "danceopd = own_losses:huber\n")
    package(tmp_path / "two", "second", "2.0", loss)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "one")])
    with pytest.raises(UserError, match="objective 'danceopd' is built in, and first 1.0 has a plug-in of that name"):
        Recipe(**files)
    recipe = Recipe(**files, objective="huber")
    with pytest.raises(UserError, match="objective huber of first 1.0: module 'own_losses' does not .*reinstall that"):
        check_plugins(recipe)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "two")])
    with pytest.raises(UserError, match="objective: objective 'huber' is in first 1.0 and in second 2.0; unin"):
        Recipe(**files, objective="huber")


def test_a_module_of_the_same_name_elsewhere_is_not_taken_for_the_one_here(here: Path) -> None:
    (here / "tiny.py").write_text("def loss(batch, velocities):\n    yield\n")
    import tiny  # of these tests' helpers

    with pytest.raises(UserError, match=r"module 'tiny' is .*helpers/tiny.py here, and not .*; rename the one"):
        load("objective", "tiny:loss")
    assert tiny.tiny_klein


def plain(x: torch.Tensor, sigma: torch.Tensor, condition: object) -> torch.Tensor:
    return x


def median(deltas: list[torch.Tensor], weights: list[float], density: float, draws: object) -> torch.Tensor:
    return torch.stack(deltas).median(0).values


def test_objects_in_place_of_names(files: dict) -> None:
    class Stops(Callback):
        """Of this test alone: nobody else can import it."""

    def scaled(field: object, by: float = 1.0) -> object:
        return lambda x, sigma, condition: by * x

    watch = Stops()
    recipe = Recipe(**files, objective=median, callbacks=[watch, {Stops: {}}], query={"law": torch.sqrt})
    assert recipe.objective == f"{__name__}:median" and load("objective", recipe.objective) is median
    again = Recipe(**recipe.resolved())
    assert again == recipe and [one.callback for one in own_callbacks(again.callbacks)][0] is watch
    first, second = (name_of("teacher field", scaled) for _ in range(2))
    assert first == second != name_of("teacher field", lambda field: field)
    assert own_field(first, plain, {"by": 2.0})(torch.ones(1, 2), torch.ones(1), None).sum() == 4
    drawn, squared = draw_queries(0, 1, 4, law=name_of("query law", even)), draw_queries(0, 1, 4, law=recipe.query.law)
    torch.testing.assert_close(squared**2, drawn)
    assert origin("objective", recipe.objective).place == "test_plugins.py"
    own = Method("own median", merge=median)
    name = name_of("blend method", own)
    parts = [Adapter({"a": (torch.full((1, 2), i), torch.ones(3, 1))}) for i in (1.0, 2.0, 6.0)]
    for method in (own, name):
        found = blend(parts, method=method, rank=1)
        torch.testing.assert_close(found.tensors["a"][1] @ found.tensors["a"][0], torch.full((3, 2), 2.0))
    assert str(origin("blend method", name)) == "given in Python"


def even(share: torch.Tensor) -> torch.Tensor:
    return share


def test_a_blend_method_that_gives_another_shape_is_refused(here: Path) -> None:
    parts = [Adapter({"a": (torch.ones(1, 2), torch.ones(3, 1))})] * 2
    with pytest.raises(UserError, match=r"blend method flat gave numbers of shape \(\), .* let it .* \(3, 2\)"):
        blend(parts, method="own_parts:flat")
    with pytest.raises(UserError, match="blend method 'x y:z' is no module:name"):
        blend(parts, method="x y:z")


def test_a_family_joins_those_that_are_known(here: Path) -> None:
    (here / "own_family.py").write_text(OWN.replace('replace(FAMILIES["sd3"])', 'replace(FAMILIES["sd3"], name="sd9")'))
    try:
        found = family_of("", "own_family:copied")
        assert found.name == "sd9" and FAMILIES["sd9"] is found and family_of("", found) is found
    finally:
        FAMILIES.pop("sd9", None)
    check_name("family", "sd3", FAMILIES)
