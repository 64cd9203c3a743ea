"""A judge on this machine: a vision-language model of transformers, decoded greedily, several questions a batch.

The model gets a question as `AutoModelForImageTextToText` and its own processor and chat template format it. A
processor's video part is left out where it cannot be loaded (Qwen's needs torchvision); no question has a video. The
hash of the weights is part of the judge's identity.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Generator, Iterable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from danceopd.bench.judges.cost import Codec, text_tokens
from danceopd.bench.judges.parse import read
from danceopd.bench.judges.protocol import Answer, Question, Quote
from danceopd.data.images import picture
from danceopd.errors import UserError

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


class LocalJudge:
    """A model in a folder, or `owner/name` on the hub. ``longest``: the longest side of an image in pixels.

    ``thinking``: tokens that may be spent before an answer, besides those of the answer.
    """

    sees = ()
    deterministic = True

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch: int = 4,
        longest: int | None = None,
        thinking: int = 0,
    ) -> None:
        if batch < 1:
            raise UserError(f"--judge-batch is {batch}; give 1 or more")
        if thinking < 0:
            raise UserError(f"--judge-thinking is {thinking}; give 0 or more tokens")
        self.model, self.batch, self.thinking = model, batch, thinking
        self.codec = Codec.parse("png", longest)  # used for the size only; nothing is encoded
        self._device, self._dtype = device, dtype

    @property
    def name(self) -> str:
        return Path(self.model).name

    @cached_property
    def identity(self) -> dict[str, Any]:
        import transformers

        return {
            "kind": "hf",
            "model": self.name,
            "weights": _fingerprint(self.folder),
            "device": self.device.split(":")[0],
            "dtype": self.dtype,
            "batch": self.batch,  # padding changes the last bits of a batch
            "longest": self.codec.longest,
            "transformers": transformers.__version__,
            **({"thinking": self.thinking} if self.thinking else {}),
        }

    @cached_property
    def folder(self) -> Path:
        """The folder of the weights, downloaded from the hub if the name is no folder here."""
        place = Path(self.model).expanduser()
        if not place.is_dir():
            if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.model):
                raise UserError(f"judge hf:{self.model} is no folder; give a folder, or owner/name on the hub")
            from huggingface_hub import snapshot_download

            try:
                place = Path(snapshot_download(self.model, allow_patterns=list(FILES)))
            except Exception as error:  # the hub's client raises a dozen kinds
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"judge {self.model} is no folder here and could not be downloaded from the hub ({reason}); check "
                    "the name and the connection, or download it first and give its folder"
                ) from None
        if not (place / "config.json").is_file():
            raise UserError(f"judge {place} has no config.json; give the folder of a transformers model")
        return place

    @cached_property
    def device(self) -> str:
        import torch

        return self._device or ("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def dtype(self) -> str:
        return self._dtype or ("float32" if self.device == "cpu" else "bfloat16")

    def check(self) -> None:
        """UserError where there is no such model, or its processor cannot be loaded."""
        self._processor  # noqa: B018 - loading is the check

    def quote(self, question: Question) -> Quote:
        patches = 0
        for part in question.parts:
            if not isinstance(part, str):
                width, height = self.codec.size(picture(part))
                patches += (width // 28 + 1) * (height // 28 + 1)
        return Quote(text_tokens(question.text) + patches, min(250, question.max_tokens) + self.thinking)

    def ask(self, questions: Iterable[Question]) -> Generator[Answer, None, None]:
        source = iter(questions)
        model = None
        try:
            while some := list(islice(source, self.batch)):
                if model is None:
                    model = self._load()
                yield from self._answer(model, some)
        finally:
            del model
            gc.collect()

    def _answer(self, model: Any, questions: list[Question]) -> list[Answer]:
        import torch

        began = time.monotonic()
        inputs = self._processor.apply_chat_template(
            [self._conversation(question) for question in questions],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device)
        for key, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[key] = value.to(model.dtype)
        with torch.inference_mode():
            longest = max(q.max_tokens for q in questions) + self.thinking
            made = model.generate(**inputs, **GREEDY, max_new_tokens=longest)
        start = inputs["input_ids"].shape[1]
        pad, ends = self._processor.tokenizer.pad_token_id, _end_tokens(model)
        seconds = (time.monotonic() - began) / len(questions)
        answers = []
        for question, ids, mask in zip(questions, made[:, start:], inputs["attention_mask"]):
            ids = ids[: question.max_tokens + self.thinking]
            cut = len(ids) == question.max_tokens + self.thinking and int(ids[-1]) not in (pad, *ends)
            text = self._processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            used = {"attempts": 1, "tokens_in": int(mask.sum()), "tokens_out": int((ids != pad).sum())}
            fields = {**used, "seconds": round(seconds, 3), "judge": self.name, "cut": cut}
            answers.append(read(text, question.reads, cut).answer(question, text, **fields))
        return answers

    def _conversation(self, question: Question) -> list[dict[str, Any]]:
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": self.codec.resized(picture(part))}
            for part in question.parts
        ]
        system = [{"role": "system", "content": [{"type": "text", "text": question.system}]}] if question.system else []
        return [*system, {"role": "user", "content": content}]

    @cached_property
    def _processor(self) -> Any:
        from danceopd.models.base import quietly

        try:
            with quietly():
                processor = _load_processor(self.folder)
        except (ImportError, OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the processor of judge {self.folder} cannot be loaded ({reason}); install what it names, or use "
                "another vision-language model of transformers"
            ) from None
        if getattr(processor, "chat_template", None) is None:
            raise UserError(f"judge {self.folder} has no chat template; use an instruction-tuned model")
        processor.tokenizer.padding_side = "left"  # so that all answers of a batch begin after its last token
        if processor.tokenizer.pad_token_id is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return processor

    def _load(self) -> Any:
        import torch
        from transformers import AutoModelForImageTextToText

        from danceopd.models.base import quietly

        try:
            with quietly():
                model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=getattr(torch, self.dtype))
        except (ImportError, OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"judge {self.folder} cannot be loaded as a vision-language model ({reason}); use one that "
                "AutoModelForImageTextToText supports"
            ) from None
        return model.eval().to(self.device)


def _end_tokens(model: Any) -> tuple[int, ...]:
    """The tokens with which a model ends its answer."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return tuple(found) if isinstance(found, list | tuple) else () if found is None else (found,)


def _load_processor(folder: Path) -> Any:
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError:
        known = PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(folder).model_type)
        whole: Any = processor_class_from_name(known) if known else None
        parts = whole.get_attributes() if whole is not None else []
        if not any("video" in part for part in parts):
            raise
    shown = [part for part in parts if "video" not in part]
    still: Any = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda cls: shown)})
    return still.from_pretrained(folder)


def _fingerprint(folder: Path) -> str:
    """sha256 over the names and contents of a model's files."""
    import hashlib

    from danceopd.models.base import file_sha256

    files = sorted({file for pattern in FILES for file in folder.glob(pattern)})
    listed = "\n".join(f"{file.name} {file_sha256(file)}" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()
