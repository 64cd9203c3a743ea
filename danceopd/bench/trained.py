"""What a student's run folder tells about its training, for the report: the watch's alarms, the field gap's course.

Both are None where the run was not watched or measured, or where the student is no run's folder.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

FAULTS = (OSError, ValueError, KeyError, TypeError)
"""Of a file that is not there, or not what a run writes."""


def watched(student: str | Path | None) -> dict[str, Any] | None:
    """What the watch saw: its judge, its alarms, what it rolled back, and how many checks there were."""
    with suppress(*FAULTS):
        found = _read(student, "watch.json")
        return {key: found[key] for key in ("judge", "alarms", "rolled_back")} | {"checks": len(found["checks"])}
    return None


def field_gap(student: str | Path | None) -> dict[str, Any] | None:
    """How near the student came to its teachers on held-out work: all checks, and the step that was exported."""
    with suppress(*FAULTS):
        course, done = _read(student, "gap.json"), _read(student, "finished.json")
        checks = [
            {"step": c["step"], "gap": c["gap"], "teachers": {name: t["gap"] for name, t in c["teachers"].items()}}
            for c in course["checks"]
        ]
        exported = done.get("exported", done["step"])
        if any(check["step"] == exported for check in checks):
            return {"checks": checks, "exported": exported, "rows": course["rows"]}
    return None


def _read(student: str | Path | None, name: str) -> Any:
    return json.loads((Path(student or "") / name).read_text(encoding="utf-8"))
