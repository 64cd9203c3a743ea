"""`build()`: the prompts of `data: auto`, made of `words.txt` in templates and of the hand-written `written.txt`.

The same words give the same prompts, on every machine. Prompts of pictures have
GenEval's kinds (objects, counting, position, colours, attributes), and people, places, scenes, text and styles. Edits
have GEdit's eleven kinds; each belongs to a source, and its instruction is made of what the source's prompt says is
there, so that it nearly always applies. No prompt has the form of GenEval's own ("a photo of …").
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh")
COUNTS = {
    "objects": 250, "counting": 300, "position": 340, "colours": 260, "attributes": 320, "people": 300, "places": 230,
    "scenes": 260, "text": 250, "styles": 270,
}  # fmt: skip
"""English prompts of each kind that are made of templates; a third as many are Chinese."""
SOURCES = {"thing": 120, "animal": 60, "person": 90, "sign": 90, "view": 60}
"""English sources of edits by what they show; a third as many are Chinese."""
GENERAL = 0.55
"""Share of the sources that have each edit of the whole picture: its style, its light, its background."""


class Word(NamedTuple):
    """A word in both languages; of a thing also its plural and the measure word that Chinese counts it with."""

    en: str
    zh: str
    many: str = ""
    measure: str = ""


def read_words(path: Path = HERE / "words.txt") -> dict[str, list[Word]]:
    """The lists of the file by name."""
    found: dict[str, list[Word]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            found[line.strip("[]")] = here = []
        elif line and not line.startswith("#"):
            parts = [part.strip() for part in line.split("|")]
            here.append(Word(parts[0], parts[2], parts[1], parts[3]) if len(parts) == 4 else Word(*parts))
    return found


class Dice:
    """Choices that depend on nothing but a name and their order, in every version of Python."""

    def __init__(self, *name: Any) -> None:
        self.name, self.count = name, 0

    def number(self, below: int) -> int:
        """A number from 0 on."""
        self.count += 1
        digest = hashlib.sha256(repr((*self.name, self.count)).encode()).hexdigest()
        return int(digest[:12], 16) % below

    def one(self, words: list[Any], *but: Any) -> Any:
        """One of the words that is none of `but`."""
        left = [word for word in words if word not in but]
        return left[self.number(len(left))]

    def often(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.number(1000) < 1000 * share


def a(phrase: str) -> str:
    """`phrase` after its English article."""
    return f"{'an' if re.match('[aeio]|hour|ump|ukulele', phrase.lower()) else 'a'} {phrase}"


def one_of(thing: Word, colour: Word | None = None) -> str:
    """A thing and its measure word in Chinese, such as 一盏红色灯笼."""
    return f"一{thing.measure}{'' if colour is None else colour.zh}{thing.zh}"


W = read_words()
Line = dict[str, str]
"""A text in each language."""


def objects(d: Dice) -> Line:
    thing, place, surface = d.one(W["things"] + W["animals"]), d.one(W["places"]), d.one(W["surfaces"])
    if thing in W["things"] and d.often(0.5):
        return {"en": f"{a(thing.en)} on {surface.en}", "zh": f"{surface.zh}上放着{one_of(thing)}"}
    return {"en": f"{a(thing.en)} {place.en}", "zh": f"{place.zh}有{one_of(thing)}"}


def counting(d: Dice) -> Line:
    thing, number, place = d.one(W["things"] + W["animals"]), d.one(W["numbers"]), d.one(W["places"])
    en, zh = f"{number.en} {thing.many}", f"{number.zh}{thing.measure}{thing.zh}"
    if d.often(0.35):
        other = d.one(W["things"], thing)
        return {"en": f"{en} and {a(other.en)}", "zh": f"{zh}和{one_of(other)}"}
    return {"en": f"{en} {place.en}", "zh": f"{place.zh}有{zh}"}


def position(d: Dice) -> Line:
    first = d.one(W["things"] + W["animals"])
    second, relation = d.one(W["things"], first), d.one(W["relations"])
    return {
        "en": f"{a(first.en)} {relation.en} {a(second.en)}",
        "zh": f"{one_of(second)}的{relation.zh}有{one_of(first)}",
    }


def colours(d: Dice) -> Line:
    thing, colour, place = d.one(W["things"]), d.one(W["colours"]), d.one(W["places"])
    return {"en": f"{a(f'{colour.en} {thing.en}')} {place.en}", "zh": f"{place.zh}有{one_of(thing, colour)}"}


def attributes(d: Dice) -> Line:
    first = d.one(W["things"])
    second, colour = d.one(W["things"], first), d.one(W["colours"])
    if d.often(0.4):
        material = d.one(W["materials"])
        return {
            "en": f"{a(first.en)} made of {material.en} beside {a(f'{colour.en} {second.en}')}",
            "zh": f"一{first.measure}{material.zh}做的{first.zh}，旁边是{one_of(second, colour)}",
        }
    other = d.one(W["colours"], colour)
    return {
        "en": f"{a(f'{colour.en} {first.en}')} and {a(f'{other.en} {second.en}')}",
        "zh": f"{one_of(first, colour)}和{one_of(second, other)}",
    }


def people(d: Dice) -> Line:
    who, pose, place = d.one(W["people"]), d.one(W["poses"]), d.one(W["places"])
    hair, garment, colour = d.one(W["hair"]), d.one(W["garments"]), d.one(W["colours"])
    clothes = a(f"{colour.en} {garment.en}")
    return {
        "en": f"{a(who.en)} with {hair.en} in {clothes}, {pose.en}, {place.en}",
        "zh": f"{place.zh}，一位{hair.zh}、穿着{colour.zh}{garment.zh}的{who.zh}，{pose.zh}",
    }


def places(d: Dice) -> Line:
    view, time = d.one(W["views"]), d.one(W["times"])
    if d.often(0.4):
        animal = d.one(W["animals"])
        return {"en": f"{view.en} {time.en}, {a(animal.en)} in the foreground",
                "zh": f"{time.zh}，{view.zh}，前景有{one_of(animal)}"}  # fmt: skip
    return {"en": f"{view.en} {time.en}", "zh": f"{time.zh}，{view.zh}"}


def scenes(d: Dice) -> Line:
    who, doing, place = d.one(W["people"] + W["animals"]), d.one(W["doing"]), d.one(W["places"])
    subject = f"一位{who.zh}" if who in W["people"] else one_of(who)
    return {"en": f"{a(who.en)} {doing.en} {place.en}", "zh": f"{place.zh}，{subject}正在{doing.zh}"}


def text(d: Dice) -> Line:
    sign, words = d.one(W["signs"]), d.one(W["texts"])
    colour, place = d.one(W["colours"]), d.one(W["places"])
    return {
        "en": f'{a(f"{colour.en} {sign.en}")} with the text "{words.en}" {place.en}',
        "zh": f"{place.zh}，{one_of(sign, colour)}上写着“{words.zh}”",
    }


def styles(d: Dice) -> Line:
    style, subject = d.one(W["styles"]), d.one([objects, people, places, scenes])(d)
    return {"en": f"{subject['en']}, {style.en}", "zh": f"{subject['zh']}，{style.zh}风格"}


MAKERS: dict[str, Callable[[Dice], Line]] = {
    one.__name__: one
    for one in (objects, counting, position, colours, attributes, people, places, scenes, text, styles)
}
Source = tuple[Line, list[tuple[str, Line]]]
"""The prompt of an edit's source, and its edits: kind and instruction."""


def source(d: Dice, shows: str) -> Source:
    """A source that shows a thing, an animal, a person, a sign or a view, with the edits that apply to it."""
    prompt, edits = SHOWN[shows](d)
    if shows != "view" and d.often(GENERAL):
        scene = d.one(W["backgrounds"])
        edits.append(("background_change", {"en": f"Change the background to {scene.en}.",
                                            "zh": f"把背景换成{scene.zh}。"}))  # fmt: skip
    if d.often(GENERAL):
        style = d.one(W["styles"])
        edits.append(("style_change", {"en": f"Turn the picture into {style.en}.",
                                       "zh": f"把画面变成{style.zh}风格。"}))  # fmt: skip
    if d.often(GENERAL):
        edits.append(("tone_transfer", d.one(W["tones"])._asdict()))
    return prompt, [(kind, {language: line[language] for language in LANGUAGES}) for kind, line in edits]


def _thing(d: Dice) -> Source:
    first, colour, surface = d.one(W["things"]), d.one(W["colours"]), d.one(W["surfaces"])
    second, place = d.one(W["things"], first), d.one(W["places"])
    third, other, material = d.one(W["things"], first, second), d.one(W["colours"], colour), d.one(W["materials"])
    edits = [
        ("color_alter", {"en": f"Change the color of the {first.en} from {colour.en} to {other.en}.",
                         "zh": f"把{first.zh}的颜色从{colour.zh}改成{other.zh}。"}),
        ("material_alter", {"en": f"Make the {first.en} out of {material.en}.",
                            "zh": f"把{first.zh}的材质换成{material.zh}。"}),
        d.one([
            ("subject-remove", {"en": f"Remove the {second.en}.", "zh": f"移除{second.zh}。"}),
            ("subject-replace", {"en": f"Replace the {second.en} with {a(third.en)}.",
                                 "zh": f"把{second.zh}换成{one_of(third)}。"}),
        ]),
        ("subject-add", {"en": f"Add {a(third.en)} next to the {first.en}.",
                         "zh": f"在{first.zh}旁边加上{one_of(third)}。"}),
    ]  # fmt: skip
    return {
        "en": f"{a(f'{colour.en} {first.en}')} and {a(second.en)} on {surface.en} {place.en}",
        "zh": f"{place.zh}，{surface.zh}上放着{one_of(first, colour)}和{one_of(second)}",
    }, edits


def _animal(d: Dice) -> Source:
    animal, stance, place = d.one(W["animals"]), d.one(W["stances"]), d.one(W["places"])
    motion, other, thing = d.one(W["animal_motions"]), d.one(W["animals"], animal), d.one(W["things"])
    edits = [
        ("motion_change", {"en": f"Make the {animal.en} {motion.en}.", "zh": f"让{animal.zh}{motion.zh}。"}),
        ("subject-replace", {"en": f"Replace the {animal.en} with {a(other.en)}.",
                             "zh": f"把{animal.zh}换成{one_of(other)}。"}),
        ("subject-add", {"en": f"Add {a(thing.en)} beside the {animal.en}.",
                         "zh": f"在{animal.zh}旁边加上{one_of(thing)}。"}),
        ("subject-remove", {"en": f"Remove the {animal.en}.", "zh": f"移除{animal.zh}。"}),
    ]  # fmt: skip
    return {"en": f"{a(animal.en)} {stance.en} {place.en}", "zh": f"{place.zh}，{one_of(animal)}{stance.zh}"}, edits


def _person(d: Dice) -> Source:
    who, hair, pose, place = d.one(W["people"]), d.one(W["hair"]), d.one(W["poses"]), d.one(W["places"])
    garment, colour = d.one(W["garments"]), d.one(W["colours"])
    other, motion, change = d.one(W["colours"], colour), d.one(W["motions"]), d.one(W["human"])
    second = d.one(W["human"], change)
    edits: list[tuple[str, Line]] = [
        ("ps_human", {"en": f"Make the {who.en} {one.en}.", "zh": f"让{who.zh}{one.zh}。"}) for one in (change, second)
    ]
    edits.append(("motion_change", {"en": f"Make the {who.en} {motion.en}.", "zh": f"让{who.zh}{motion.zh}。"}))
    edits.append(("color_alter", {"en": f"Change the color of the {garment.en} from {colour.en} to {other.en}.",
                                  "zh": f"把{garment.zh}从{colour.zh}改成{other.zh}。"}))  # fmt: skip
    clothes = a(f"{colour.en} {garment.en}")
    return {
        "en": f"{a(who.en)} with {hair.en} in {clothes}, {pose.en}, {place.en}",
        "zh": f"{place.zh}，一位{hair.zh}、穿着{colour.zh}{garment.zh}的{who.zh}，{pose.zh}",
    }, edits


def _sign(d: Dice) -> Source:
    sign, words, place = d.one(W["signs"]), d.one(W["texts"]), d.one(W["places"])
    colour, other, material = d.one(W["colours"]), d.one(W["texts"], words), d.one(W["materials"])
    third = d.one(W["texts"], words, other)
    edits: list[tuple[str, Line]] = [
        ("text_change", {"en": f'Change the text "{words.en}" to "{one.en}".', "zh": f"把“{words.zh}”改成“{one.zh}”。"})
        for one in (other, third)
    ]
    if d.often(0.5):
        edits.append(("material_alter", {"en": f"Make the {sign.en} out of {material.en}, with the same text.",
                                         "zh": f"把{sign.zh}的材质换成{material.zh}，文字不变。"}))  # fmt: skip
    else:
        edits.append(("text_change", {"en": f'Remove the text from the {sign.en}.', "zh": f"去掉{sign.zh}上的文字。"}))
    return {
        "en": f'{a(f"{colour.en} {sign.en}")} with the text "{words.en}" {place.en}',
        "zh": f"{place.zh}，{one_of(sign, colour)}上写着“{words.zh}”",
    }, edits


def _view(d: Dice) -> Source:
    view, time, animal = d.one(W["views"]), d.one(W["times"]), d.one(W["animals"])
    other, tone, scene = d.one(W["animals"], animal), d.one(W["tones"]), d.one(W["backgrounds"])
    edits = [
        ("subject-remove", {"en": f"Remove the {animal.en}.", "zh": f"移除{animal.zh}。"}),
        ("subject-replace", {"en": f"Replace the {animal.en} with {a(other.en)}.",
                             "zh": f"把{animal.zh}换成{one_of(other)}。"}),
        ("tone_transfer", tone._asdict()),
        ("background_change", {"en": f"Change everything behind the {animal.en} to {scene.en}.",
                               "zh": f"把{animal.zh}身后的一切换成{scene.zh}。"}),
    ]  # fmt: skip
    return {
        "en": f"{view.en} {time.en}, {a(animal.en)} in the foreground",
        "zh": f"{time.zh}，{view.zh}，前景有{one_of(animal)}",
    }, edits


SHOWN: dict[str, Callable[[Dice], Source]] = {
    "thing": _thing, "animal": _animal, "person": _person, "sign": _sign, "view": _view
}  # fmt: skip


def normal(prompt: str) -> str:
    """A prompt without case, spaces and punctuation: two that are equal so are one."""
    return re.sub(r"[\W_]+", "", prompt.lower())


def _until(count: int, make: Callable[[int], tuple[str, Any]], seen: set[str]) -> Iterator[Any]:
    """What `make(number)` gives under the first `count` texts that are not in `seen`."""
    number = 0
    while count:
        prompt, made = make(number)
        number += 1
        if normal(prompt) not in seen:
            seen.add(normal(prompt))
            count -= 1
            yield made
        if number > 10**5:
            raise ValueError("the words do not make so many prompts; add words, or lower the count")


def read_written(path: Path = HERE / "written.txt") -> tuple[dict[str, dict[str, list[str]]], dict[str, list[Any]]]:
    """The hand-written prompts by language and kind, and sources with their edits by language."""
    prompts: dict[str, dict[str, list[str]]] = {}
    sources: dict[str, list[Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            language, _, edits = line.strip("[]").partition(" ")
        elif line.startswith("  "):
            sources[language][-1][1].append(line.strip().split(": ", 1))
        elif line and not line.startswith("#"):
            if edits:
                sources.setdefault(language, []).append([line, []])
                continue
            kind, _, prompt = line.partition(": ")
            prompts.setdefault(language, {}).setdefault(kind, []).append(prompt)
    return prompts, sources


def build() -> dict[str, Any]:
    """The bank: `generation[language][kind]` are prompts, `editing[language]` sources, [prompt, [[kind, instruction]]].
    """
    written, edited = read_written()
    seen: set[str] = set()
    generation: dict[str, dict[str, list[str]]] = {language: {} for language in LANGUAGES}
    editing: dict[str, list[Any]] = {language: [] for language in LANGUAGES}
    for language in LANGUAGES:
        share = 1 if language == "en" else 3
        for kind, count in COUNTS.items():
            own = written.get(language, {}).get(kind, [])
            seen.update(map(normal, own))

            def prompt(number: int, kind: str = kind, language: str = language) -> tuple[str, str]:
                made = MAKERS[kind](Dice(kind, language, number))[language]
                return made, made

            generation[language][kind] = own + list(_until(count // share, prompt, seen))
        editing[language] = list(edited[language])
        seen.update(normal(one[0]) for one in edited[language])
        for shows, count in SOURCES.items():

            def edits(number: int, shows: str = shows, language: str = language) -> tuple[str, list[Any]]:
                line, found = source(Dice("source", shows, language, number), shows)
                each = {normal(text[language]): [kind, text[language]] for kind, text in found}
                return line[language], [line[language], list(each.values())]

            editing[language] += _until(count // share, edits, seen)
    return {"generation": generation, "editing": editing}
