"""The judge's prompts of the ``imgedit`` suite: nine rubrics, in our own words, of three numbers from 1 to 5 each.

Each rubric asks for what the published one asks: first whether the edit does what was asked (compliance, which differs
by edit type), then two aspects of its quality, neither of which may be scored higher than the first. Edit types that
change a part of an image share the aspects blending and physics.
"""

from __future__ import annotations

from typing import NamedTuple

VERSION = "1"


class Scale(NamedTuple):
    """One number of a rubric: its name, what it is about, and what 1, 2, 3, 4 and 5 mean."""

    name: str
    about: str
    one: str
    two: str
    three: str
    four: str
    five: str


class Rubric(NamedTuple):
    """An edit type in words, and its three numbers."""

    kind: str
    scales: tuple[Scale, Scale, Scale]


BLENDING = Scale(
    "blending",
    "whether the edit can be seen as an edit",
    "the picture is broken: holes, smears, shapes that make no sense",
    "the edit is obvious at once: hard outlines, other sharpness, other colours or style",
    "it fits on the whole, but light, colour or sharpness differ where one looks",
    "it fits; only enlarged does an edge or a texture give it away",
    "nothing shows where the picture was edited",
)
PHYSICS = Scale(
    "physics",
    "whether the result could be one real scene, and whether what was not to change still has its detail",
    "impossible: things float or pass through each other, light or perspective contradicts itself, the rest is ruined",
    "shadows, contact or depth are wrong or lacking, or the rest has clearly moved or changed",
    "light, depth and contact are right on the whole; small faults, and the rest changed only near the edit",
    "shadows, reflections and materials are right; the rest has kept its detail but for traces",
    "no fault in light, depth, contact or material, and the rest is untouched",
)


def _compliance(one: str, two: str, three: str, four: str, five: str) -> Scale:
    return Scale("compliance", "whether the edit does what was asked, and only that", one, two, three, four, five)


RUBRICS = {
    "add": Rubric(
        "something was to be added",
        (
            _compliance(
                "nothing was added, or nothing that can be recognised",
                "something was added, but not what was asked for",
                "the right kind of thing, with a wrong place, number, size or colour",
                "right in everything that matters; one or two small details are off",
                "every detail asked for is there, in a place where it makes sense",
            ),
            BLENDING,
            PHYSICS,
        ),
    ),
    "adjust": Rubric(
        "a property of something (colour, material, shape, size, state) was to be changed",
        (
            _compliance(
                "the property is as it was, or something else was changed",
                "changed in part, or to something other than what was asked for",
                "changed as asked on the whole, with clear slips in degree, extent or place, or with other changes",
                "changed as asked; only a small slip in degree or extent",
                "changed exactly as asked, over the whole thing, and nothing else with it",
            ),
            BLENDING,
            PHYSICS,
        ),
    ),
    "replace": Rubric(
        "something was to be replaced by something else",
        (
            _compliance(
                "the old thing is still there, or another one was changed",
                "replaced in part, or by the wrong kind of thing",
                "replaced, but remains of the old show, others changed too, or number or place is wrong",
                "replaced whole by the right thing; a small property is off",
                "exactly the named things replaced, and the new ones right in kind, number, place, size and detail",
            ),
            BLENDING,
            PHYSICS,
        ),
    ),
    "remove": Rubric(
        "something was to be removed",
        (
            _compliance(
                "nothing was removed, or something else was",
                "removed in part, another one removed, or something new stands in its place",
                "mostly removed, but remains show, or other things went with it",
                "removed; a trifle in the background went too, or the number is not quite right",
                "all that was named is gone, and only that",
            ),
            BLENDING,
            PHYSICS,
        ),
    ),
    "background": Rubric(
        "the background was to be changed",
        (
            _compliance(
                "the background is as it was or has nothing to do with the instruction, or the subject was replaced",
                "changed in part or to the wrong scene, or the subject has clearly changed",
                "mainly the scene asked for, with things lacking or too many, or some of it runs over the subject",
                "the scene asked for is all there and the subject is kept; a small mismatch, in tone say",
                "exactly the scene asked for, and the subject is untouched",
            ),
            BLENDING,
            PHYSICS,
        ),
    ),
    "compose": Rubric(
        "several things were to be changed, each in its own way",
        (
            _compliance(
                "none of the changes was made, or the wrong things were changed",
                "one change was made, or all of them wrongly or by half, or other things changed along",
                "every thing named was changed in the way asked for, with details lacking",
                "every change is right; small slips in amount or place",
                "every change is exactly right, and nothing else changed",
            ),
            BLENDING,
            PHYSICS,
        ),
    ),
    "style": Rubric(
        "the whole picture was to be redrawn in another style",
        (
            Scale(
                "style",
                "whether the style asked for is there",
                "it is not there, or it is another one",
                "it shows in places, or is mixed with others",
                "its marks (colours, strokes, textures) are there, but unevenly",
                "nearly the whole picture has it",
                "the whole picture has it: colours, strokes, textures and light",
            ),
            Scale(
                "content",
                "whether the same things are still there in the same places",
                "the scene cannot be recognised",
                "the main subject can be recognised, but sizes, perspective or important parts are wrong",
                "the layout is kept; some things are bent or lacking",
                "nearly everything is kept; nothing that disturbs",
                "everything is kept, but for what the style itself asks",
            ),
            Scale(
                "rendering",
                "whether the picture is well made",
                "useless: noise, bands, broken pixels, blur",
                "seams, jagged edges, drifting colour, or strokes in disorder",
                "acceptable, with blur or broken texture in places",
                "clear and coherent; faults only when enlarged",
                "no fault: strokes, textures and colours run as they should",
            ),
        ),
    ),
    "action": Rubric(
        "the pose, action or expression of a person or animal was to be changed",
        (
            Scale(
                "action",
                "whether the pose, action or expression asked for is there",
                "nothing changed, or it is another one",
                "clearly wrong, or only some parts of the body changed",
                "the idea is there; angle, side, strength or a gesture is off",
                "it is there, with a small inaccuracy",
                "it is exactly there, in body, limbs and face",
            ),
            Scale(
                "identity",
                "whether it is still the same one",
                "another one, or the face or body was replaced",
                "features, hair or clothes have changed strongly",
                "on the whole the same; some features have changed",
                "clearly the same; light or finish differs a little",
                "the same in face, hair, skin or fur, clothes and all it wears",
            ),
            Scale(
                "anatomy",
                "whether body and picture are sound",
                "broken or surplus limbs, strong distortion, heavy noise",
                "wrong proportions, outlines around the figure, light or perspective off",
                "believable; a joint or a shadow is off, some blur",
                "sound; faults only when one looks closely",
                "no fault in body, light, shadow or texture",
            ),
        ),
    ),
    "extract": Rubric(
        "one thing was to be cut out and shown alone on white",
        (
            Scale(
                "object",
                "whether the right thing was cut out, whole",
                "another thing, or several",
                "the right kind of thing, but in part, or with parts of others",
                "the thing, with small pieces lacking or too many",
                "the whole thing; a tip or a thread is lacking",
                "exactly the thing asked for, whole, the same one as in the source",
            ),
            Scale(
                "mask",
                "whether the outline is clean and the ground white",
                "much of the old background, holes, or the ground is not white",
                "ragged edges, coloured fringes, or patches in the white",
                "acceptable; soft edges or a faint halo",
                "clean edges, even white; faults only when enlarged",
                "sharp outline, no halo, pure white everywhere",
            ),
            Scale(
                "quality",
                "whether the thing itself is unharmed",
                "blurred, deformed or broken beyond use",
                "noise, shifted colours or warping that harms detail",
                "whole, a little soft or noisy, colours mostly right",
                "sharp, with right colours; traces only",
                "every detail and colour as in the source",
            ),
        ),
    ),
}
"""Edit type of the data -> its rubric."""


def prompt(edit_type: str) -> str:
    """The judge's prompt for one edit type; `<edit_prompt>` stands for the instruction."""
    kind, scales = RUBRICS[edit_type]
    parts = [
        f"You grade one edit that an image editing model made: {kind}. "
        "The first picture is the source, the second is what the model returned. This was the instruction:",
        "<edit_prompt>",
        "Give three numbers, each 1, 2, 3, 4 or 5.",
    ]
    for scale in scales:
        levels = "\n".join(f"{level}: {text}" for level, text in enumerate(scale[2:], 1))
        parts.append(f"{scale.name[0].upper()}{scale.name[1:]}: {scale.about}.\n{levels}")
    first, second, third = (scale.name for scale in scales)
    parts.append(
        f"An edit that was not made has no quality: neither {second} nor {third} may be higher than {first}. "
        "Answer with one JSON object and nothing else, the reasoning in at most two sentences:\n"
        f'{{"reasoning": "...", "score": [{first}, {second}, {third}]}}'
    )
    return "\n\n".join(parts)
