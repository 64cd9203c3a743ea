"""How pictures travel to a judge: the file format and the size, pinned, because both change what a judge sees."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from danceopd.errors import UserError


@dataclass(frozen=True)
class Codec:
    """``form`` is png or jpeg, ``quality`` JPEG's; ``longest`` bounds the longer side in pixels, None sends all."""

    form: str = "png"
    quality: int | None = None
    longest: int | None = None

    @classmethod
    def named(cls, text: str = "png", longest: int | None = None) -> Codec:
        """Of "png", "jpeg" (quality 95) or "jpeg:75"."""
        match = re.fullmatch(r"(png|jpe?g)(?::(\d+))?", text.strip().lower())
        quality = int(match[2]) if match and match[2] else 95
        if not match or (match[1] == "png" and match[2]) or not 1 <= quality <= 100:
            raise UserError(f"the judge's picture codec is {text!r}; give png, jpeg, or jpeg:QUALITY with 1 to 100")
        if longest is not None and longest < 16:
            raise UserError(f"the judge's longest picture side is {longest}; give 16 pixels or more")
        return cls("png", None, longest) if match[1] == "png" else cls("jpeg", quality, longest)

    @property
    def identity(self) -> dict[str, Any]:
        """What of it could change an answer."""
        return {"codec": self.form, "quality": self.quality, "longest": self.longest}

    def size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) that is sent: never enlarged, sides in proportion."""
        side = max(image.size)
        if self.longest is None or side <= self.longest:
            return image.size
        return tuple(max(1, round(length * self.longest / side)) for length in image.size)  # type: ignore[return-value]

    def resized(self, image: Image.Image) -> Image.Image:
        """The picture in the size that is sent (Lanczos)."""
        size = self.size(image)
        return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)

    def data_url(self, image: Image.Image) -> str:
        """The picture as a ``data:`` address."""
        buffer = BytesIO()
        image = self.resized(image)
        if self.form == "png":
            image.save(buffer, "PNG")
        else:
            image.save(buffer, "JPEG", quality=self.quality)
        return f"data:image/{self.form};base64,{base64.b64encode(buffer.getvalue()).decode()}"
