"""A judge: the brighter the last picture of a question, the higher the score. Asks nobody, and is always the same."""

from collections.abc import Generator, Iterable

from PIL import ImageStat

from danceopd.bench.judges.protocol import Answer, Question, Quote
from danceopd.data.images import picture


class Brightness:
    """`--judge brightness`, or `--judge brightness:2` for twice the score."""

    sees = ()
    deterministic = True
    name = "brightness"

    def __init__(self, gain: str = "1") -> None:
        self.gain = float(gain)
        self.identity = {"judge": "brightness", "gain": self.gain}

    def check(self) -> None:
        """Nothing keeps it from answering."""

    def quote(self, question: Question) -> Quote:
        return Quote()

    def ask(self, questions: Iterable[Question]) -> Generator[Answer, None, None]:
        for question in questions:
            image = picture([part for part in question.parts if not isinstance(part, str)][-1])
            share = min(1.0, self.gain * ImageStat.Stat(image.convert("L")).mean[0] / 255)
            reads = question.reads
            if reads.choices is not None:
                yield Answer(question.key, "ok", choice=reads.choices[0 if share > 0.5 else -1], judge=self.name)
            else:
                number = reads.low + share * (reads.high - reads.low)
                yield Answer(question.key, "ok", numbers=(number,) * reads.count, judge=self.name)
