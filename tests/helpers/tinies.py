"""Every family's tiny pipelines in one list, `TINYS`; a family that is added here is tested by `test_families.py`."""

from __future__ import annotations

import tiny_anima
import tiny_fibo
import tiny_flux1
import tiny_flux2_dev
import tiny_hidream
import tiny_klein_kv
import tiny_krea2
import tiny_longcat
import tiny_qwen
import tiny_qwen21
import tiny_sd3
import tiny_wan
import tiny_zimage
from tiny import CALL, tiny_klein
from tiny_parts import Tiny

KLEIN = Tiny("flux2-klein", tiny_klein, lambda pipe: pipe, {**CALL, "steps": 4})
TINYS: list[Tiny] = [
    KLEIN,
    tiny_klein_kv.TINY,
    tiny_flux2_dev.TINY,
    tiny_flux1.TINY,
    tiny_qwen.TINY,
    tiny_qwen.PLUS,
    tiny_zimage.TINY,
    tiny_zimage.OMNI,
    tiny_qwen21.TINY,
    tiny_krea2.TINY,
    tiny_sd3.TINY,
    tiny_longcat.TINY,
    tiny_fibo.TINY,
    tiny_hidream.TINY,
    tiny_wan.TINY,
]
MODULAR: list[Tiny] = [tiny_anima.TINY]  # recorded from Python; a merge does not load their folders
