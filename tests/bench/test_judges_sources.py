"""Judges that are programs, recorded answers in every official form, and a real vision-language model."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from tiny_parts import qwen_tokenizer, seeded
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from danceopd.bench.judges.local import LocalJudge
from danceopd.bench.judges.protocol import Question, Reads
from danceopd.bench.judges.registry import load_judge
from danceopd.bench.judges.session import JudgeSession
from danceopd.errors import UserError


def question(n: int, aspect: str = "SC", reads: Reads | None = None, model: str = "m", **facts: Any) -> Question:
    image = Image.new("RGB", (40, 32), (25 * n, 50, 0))
    return Question(f"{model}/{n}/{aspect}", aspect, (f"Rate item-{n}.", image), reads or Reads(2), facts=facts)


def asked(judge: Any, *questions: Question) -> list[Any]:
    return list(judge.ask(iter(questions)))


# a program ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, os, subprocess, sys, time
from PIL import Image
print("loading a detector ...")            # what libraries print is no answer
print("warning on stderr", file=sys.stderr)
for line in sys.stdin:
    q = json.loads(line)
    n = int(q["key"].split("/")[1])
    picture = Image.open(q["parts"][1]["picture"])
    open(os.path.join(os.path.dirname(__file__), "started"), "a").write(f"{os.getpid()} {q['parts'][1]['picture']}\\n")
    step = q["facts"].get("step")
    if step == "crash":
        sys.exit("no such file: detector.pth")
    if step == "silent":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])   # keeps the pipe open
        time.sleep(60)
    if step == "other":
        print(json.dumps({"key": "another", "numbers": [1, 1]}))
    print("{not json")
    answer = {"numbers": [picture.getpixel((0, 0))[0] // 25, n], "reasoning": "seen"}
    answer = {"text": {"text": 'I say {"score": [3, 4]}'}, "refuse": {"status": "refused"},
              "range": {"numbers": [11, 0]}, "choice": {"choice": "yes"}}.get(step, answer)
    print(json.dumps({"key": q["key"], **answer}), flush=True)
"""


def program(folder: Path, text: str = PROGRAM, **options: Any) -> Any:
    (folder / "score.py").write_text(text)
    return load_judge(f"cmd:{sys.executable} '{folder / 'score.py'}'", **{"timeout": 20.0, **options})


def test_a_program_is_started_once_and_asked_in_lines(tmp_path: Path) -> None:
    judge = program(tmp_path)
    steps = [None, "other", "text", "refuse", "range"]
    answers = asked(
        judge,
        *(question(n, step=step) for n, step in enumerate(steps)),
        question(5, "ok", Reads(choices=("yes", "no")), step="choice"),
    )
    assert [a.status for a in answers] == ["ok", "ok", "ok", "refused", "unparsable", "ok"]
    assert [a.numbers for a in answers[:3]] == [(0, 0), (1, 1), (3, 4)] and answers[5].choice == "yes"
    assert answers[1].reasoning == "seen" and answers[1].cost == 0.0 and "11" in answers[4].text
    lines = (tmp_path / "started").read_text().splitlines()
    assert len({line.split()[0] for line in lines}) == 1
    assert not any(Path(line.split()[1]).exists() for line in lines)  # the pictures are gone


def test_a_crash_or_a_silence_is_a_failure_and_never_a_hang(tmp_path: Path) -> None:
    judge = program(tmp_path, timeout=4.0)
    began = time.monotonic()
    answers = asked(judge, *(question(n, step=step) for n, step in enumerate([None, "crash", None, "silent", None])))
    assert [a.status for a in answers] == ["ok", "failed", "ok", "failed", "ok"]
    assert "status 1" in answers[1].text and "detector.pth" in answers[1].text and "4 s" in answers[3].text
    assert time.monotonic() - began < 40
    pids = {int(line.split()[0]) for line in (tmp_path / "started").read_text().splitlines()}
    assert len(pids) == 3
    deadline = time.monotonic() + 20
    while left := [p for p in psutil.process_iter() if _group(p) in pids]:  # with what the program had started
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _group(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def test_a_program_that_never_works_is_left_alone(tmp_path: Path) -> None:
    judge = program(tmp_path, "raise SystemExit('no GPU here')")
    session = JudgeSession(judge, tmp_path / "j.jsonl")
    answers = session.answers(question(n) for n in range(8))
    assert session.usage["statuses"] == {"failed": 8}
    texts = [held[0].text for held in answers.values()]
    assert all("no GPU here" in text for text in texts)
    assert [text.startswith("not asked, for ") for text in texts] == [False] * 3 + [True] * 5


HANGS = {
    "sleeps": "import time\ntime.sleep(60)",
    "closes its input": "import os, time\nos.close(0)\ntime.sleep(60)",
    "one endless line": "import sys\nwhile True: sys.stdout.write('y' * 65536)",
    "another key": "import sys\nfor line in sys.stdin: print('{\"key\": \"x\", \"numbers\": [1, 1]}', flush=True)",
}


@pytest.mark.parametrize("how", HANGS)
def test_a_timeout_bounds_the_start_too(tmp_path: Path, how: str) -> None:
    judge = program(tmp_path, HANGS[how], timeout=1.0)
    began = time.monotonic()
    answers = asked(judge, *(question(n) for n in range(6)))
    assert [a.status for a in answers] == ["failed"] * 6 and time.monotonic() - began < 8
    assert "closed its input" in answers[0].text or "--judge-start give it longer" in answers[0].text


def test_a_program_may_take_its_time_to_start(tmp_path: Path) -> None:
    slow = "import time\ntime.sleep(1.5)" + PROGRAM
    assert asked(program(tmp_path, slow, timeout=1.0, start=20.0), question(1))[0].status == "ok"
    assert load_judge("cmd:true").start == 600 and load_judge("cmd:true", timeout=5.0).start == 0
    for flag in ("timeout", "start"):
        with pytest.raises(UserError, match=f"--judge-{flag} is nan"):
            load_judge("cmd:true", **{flag: float("nan")})


def test_odd_lines_of_a_program_are_no_answers(tmp_path: Path) -> None:
    odd = "print('[' * 100000 + ']' * 100000); print('9' * 10000); print('x' * 40_000_000)"
    judge = program(tmp_path, PROGRAM.replace('    print("{not json")', f"    {odd}"))
    assert [a.numbers for a in asked(judge, question(1), question(2))] == [(1, 1), (2, 2)]
    cut = PROGRAM.replace('"key": q["key"], ', '"key": q["key"], "finish_reason": "length", ')
    assert asked(program(tmp_path, cut), question(1, step="text"))[0].status == "unparsable"


def test_a_key_in_a_programs_command_is_not_recorded(tmp_path: Path) -> None:
    judge = load_judge(f"cmd:{sys.executable} -c pass --api-key sk-1234 --token=sk-5678")
    assert judge.identity["command"][-3:] == ["--api-key", "***", "--token=***"]


def test_a_programs_code_and_a_questions_facts_are_part_of_the_question(tmp_path: Path) -> None:
    first = program(tmp_path).identity
    assert program(tmp_path).identity == first and program(tmp_path, PROGRAM + "\n").identity != first
    judge = program(tmp_path)
    session = JudgeSession(judge, tmp_path / "j.jsonl")
    session.answers([question(1, place="a.png")])
    assert session.estimate([question(1, place="a.png"), question(1, place="b.png")]).to_ask == 1


# recorded answers -----------------------------------------------------------------------------------------------------


def test_a_runs_own_answers_are_found_by_content(tmp_path: Path) -> None:
    file = tmp_path / "judge.jsonl"
    JudgeSession(program(tmp_path), file).answers(question(n) for n in range(3))
    (tmp_path / "samples.jsonl").write_text('{"key": "1", "numbers": "no answer"}')
    assert load_judge(f"replay:{tmp_path}").identity["files"].keys() == {"judge.jsonl"}
    replay = load_judge(f"replay:{file}")
    renamed = question(2, model="theirs")
    painted = Question("m/1/SC", "SC", ("Rate item-1.", Image.new("RGB", (40, 32), "red")), Reads(2))
    reworded = Question("m/0/SC", "SC", ("Judge item-0.", *question(0).parts[1:]), Reads(2))
    answers = asked(replay, question(0), renamed, painted, reworded, question(7))
    assert [a.status for a in answers] == ["ok", "ok", "missing", "missing", "missing"]
    assert answers[1].key == "theirs/2/SC" and answers[1].numbers == (2, 2) and answers[1].reasoning == "seen"
    assert "another image" in answers[2].text and "another" in answers[3].text and answers[4].text == "not recorded"
    assert replay.name == "score.py"
    again = JudgeSession(replay, tmp_path / "again.jsonl")
    assert again.answers(question(n) for n in range(3))["m/1/SC"][0].numbers == (1, 1)
    replayed = load_judge(f"replay:{tmp_path / 'again.jsonl'}")  # a replay of a replay
    assert asked(replayed, question(1))[0].numbers == (1, 1)


def test_lines_that_somebody_wrote_are_found_by_key(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"key": "m/1/SC", "text": 'So: {"score": [8, 7], "reasoning": "fine"}'},
        {"key": "m/1/SC", "text": "hm", "repeat": 1},
        {"key": "m/2/SC", "numbers": [4, 5]},
        {"key": "m/3/SC", "numbers": [4, 50]},
        {"key": "m/4/pair", "choice": "A"},
        {"key": "m/5/SC", "status": "refused", "text": "no"},
        {"key": "m/6/SC", "numbers": [4]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    replay = load_judge(f"replay:{tmp_path / 'a.jsonl'}")
    votes = Reads(choices=("A", "B"))
    got = asked(replay, *(question(n) for n in (1, 2, 3, 5, 6)), question(4, "pair", votes))
    assert [a.status for a in got] == ["ok", "ok", "unparsable", "refused", "unparsable", "ok"]
    assert got[0].numbers == (8, 7) and got[0].reasoning == "fine" and got[1].numbers == (4, 5) and got[5].choice == "A"
    session = JudgeSession(replay, tmp_path / "j.jsonl", repeats=2)
    assert [a.status for a in session.answers([question(1)])["m/1/SC"]] == ["ok", "unparsable"]
    for odd in ({"numbers": 7}, {"text": "", "cost": "free"}, {"text": "", "hash": [1]}, {"numbers": [10**400]}):
        (tmp_path / "b.jsonl").write_text(json.dumps({"key": "m/1/SC"} | odd))
        with pytest.raises(UserError, match="line 1"):
            load_judge(f"replay:{tmp_path / 'b.jsonl'}")
    lines = ['{"identity": 5, "sees": 5}', "[" * 100_000, '{"key": "m/1/SC", "numbers": [' + "9" * 5000 + "]}"]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines, '{"key": "m/1/SC", "numbers": [4, 5]}']))
    assert asked(load_judge(f"replay:{tmp_path / 'b.jsonl'}"), question(1))[0].numbers == (4, 5)


def test_viescore_files_are_read_as_their_scorer_writes_them(tmp_path: Path) -> None:
    head = ["source_image", "edited_image", "instruction", "sementics_score", "quality_score", "intersection_exist",
            "instruction_language"]  # fmt: skip
    for name, languages in (("color_alter", ("en", "cn")), ("combined", ("en", "cn"))):
        with open(tmp_path / f"mine_{name}_gpt_score.csv", "w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(head)
            for n, language in enumerate(languages):
                place = f"/results/mine/fullset/color_alter/{language}/ab12"
                row = [f"{place}_SRCIMG.png", f"{place}.png", "make it, red", 7 + n, "6.0" if n else "", True, language]
                writer.writerow(row)
    replay = load_judge(f"replay:{tmp_path}")
    place = "fullset/color_alter/{}/ab12.png"
    got = asked(
        replay,
        question(1, "SC", place=place.format("en")),
        question(2, "SC", place=place.format("cn")),
        question(2, "PQ", place=place.format("cn")),
        question(1, "PQ", place=place.format("en")),
        question(1, "SC", place=place.format("de")),
        question(1, "other", place=place.format("en")),
    )
    assert [a.numbers for a in got] == [(7,), (8,), (6,), None, None, None]
    assert [a.status for a in got[3:]] == ["unparsable", "missing", "missing"]
    (tmp_path / "b.csv").write_text("source_image,score\n1,2\n")
    with pytest.raises(UserError, match="edited_image"):
        load_judge(f"replay:{tmp_path / 'b.csv'}")


def test_two_models_with_one_place_are_told_apart_or_not_at_all(tmp_path: Path) -> None:
    rows = ["edited_image,sementics_score,quality_score"]
    rows += [f"/r/{model}/fullset/x/en/a.png,{n},{n}" for n, model in enumerate(("mine", "theirs"))]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    replay = load_judge(f"replay:{tmp_path / 'c.csv'}")
    got = asked(replay, *(question(1, model=m, place="fullset/x/en/a.png") for m in ("mine", "theirs", "blend")))
    assert [a.numbers for a in got] == [(0,), (1,), None]
    assert "2 recorded rows" in got[2].text


def test_geneval_and_imgedit_results_are_read(tmp_path: Path) -> None:
    rows = [
        {"filename": f"out/0000{n}/samples/0000.png", "tag": "colors", "prompt": "p", "correct": n == 0,
         "reason": "" if n == 0 else "expected red", "metadata": "{}", "details": "{}"}
        for n in range(2)
    ]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    yes, number = Reads(choices=("yes", "no")), Reads(1, 0, 1)
    replay = load_judge(f"replay:{tmp_path / 'results.jsonl'}")
    got = asked(replay, *(question(n, "correct", yes, place=f"0000{n}/samples/0000.png") for n in range(3)))
    assert [(a.status, a.choice) for a in got] == [("ok", "yes"), ("ok", "no"), ("missing", None)]
    assert got[1].reasoning == "expected red"
    assert asked(replay, question(1, "score", number, place="00001/samples/0000.png"))[0].numbers == (0.0,)
    said = "Brief reasoning: neat.\nPrompt Compliance: 4\nSeamlessness: 3\nDetail: 3"
    (tmp_path / "result.json").write_text(json.dumps({"17": said, "18": {"error": "x"}}))
    replay = load_judge(f"replay:{tmp_path / 'result.json'}")
    got = asked(replay, *(question(n, "score", Reads(3, 1, 5), place=f"{n}.png") for n in (17, 18, 19)))
    assert [a.status for a in got] == ["ok", "failed", "missing"] and got[0].numbers == (4, 3, 3)
    assert got[1].text == "x"


# a vision-language model ----------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SHOWN = {("white", "black"): "[9, 1]", ("black", "white"): "[1, 9]", ("black",): "[0, 2]"}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL, taught to tell white then black from black then white."""
    folder = tmp_path_factory.mktemp("vlm")
    tokenizer = qwen_tokenizer(VISION, TEMPLATE)
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), VISION))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": 0,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
        },
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()},
    )
    with seeded(0):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56).save_pretrained(folder)
    judge = LocalJudge(str(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = []
    for colours, said in SHOWN.items():
        inputs = judge._processor.apply_chat_template(
            [judge._conversation(shown(colours))],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        tail = tokenizer(said + "<|im_end|>", return_tensors="pt").input_ids
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(tail)], 1)
        labels = inputs["input_ids"].clone()
        labels[:, : -tail.shape[1]] = -100
        batch.append({**inputs, "labels": labels})
    for _ in range(200):
        loss = sum(model(**row).loss for row in batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    model.save_pretrained(folder)
    return folder


def shown(colours: tuple[str, ...]) -> Question:
    pictures = tuple(Image.new("RGB", (56, 56), colour) for colour in colours)
    key = f"m/{'-'.join(colours)}/SC"
    return Question(key, "SC", ("Rate.", *pictures), Reads(2), system="Judge.", max_tokens=12)


def test_a_real_vision_language_model_judges_what_it_sees(vlm: Path, tmp_path: Path) -> None:
    judge = load_judge(f"hf:{vlm}", batch=3, device="cpu")
    session = JudgeSession(judge, tmp_path / "j.jsonl")
    answers = session.answers(shown(colours) for colours in SHOWN)
    for colours, said in SHOWN.items():
        (answer,) = answers[f"m/{'-'.join(colours)}/SC"]
        assert (answer.status, answer.text) == ("ok", said)
        assert answer.numbers == tuple(map(float, json.loads(said))) and answer.cost == 0.0
        assert answer.tokens_in > 20 and answer.tokens_out == len(said) + 1
    singly = load_judge(f"hf:{vlm}", batch=1, device="cpu")
    assert [a.text for a in asked(singly, *map(shown, SHOWN))] == list(SHOWN.values())


def test_a_models_weights_are_who_it_is(vlm: Path, tmp_path: Path) -> None:
    judge = load_judge(f"hf:{vlm}", device="cpu")
    assert judge.deterministic and judge.identity == load_judge(f"hf:{vlm}", device="cpu").identity
    with pytest.raises(UserError, match="--repeats 2"):
        JudgeSession(judge, tmp_path / "j.jsonl", repeats=2)
    for file in vlm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load_judge(f"hf:{tmp_path}", device="cpu").identity["weights"] == judge.identity["weights"]
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert load_judge(f"hf:{tmp_path}", device="cpu").identity["weights"] != judge.identity["weights"]


def test_a_folder_that_is_no_such_model_is_refused_in_a_sentence(vlm: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        load_judge("hf:./nowhere").check()
    with pytest.raises(UserError, match=r"config\.json"):
        load_judge(f"hf:{tmp_path}").check()
    for file in vlm.iterdir():
        if "template" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="chat template"):
        load_judge(f"hf:{tmp_path}").check()
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="processor"):
        load_judge(f"hf:{tmp_path}").check()
