"""Where a suite's data is: the folder that a user names, or a dataset on the hub, fetched when it can be reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from danceopd.errors import UserError


def located(data: str | Path | None, needs: str) -> Path | None:
    """The user's copy; None when none is named. UserError where the path leads nowhere."""
    if data is None:
        return None
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"data folder {path} does not exist; {needs}")
    return path


def on_disk(repo: str, patterns: Sequence[str]) -> Path | None:
    """The snapshot of a hub dataset that was fetched before, or None; asks nobody."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
    except Exception:  # the client raises a dozen kinds
        return None
    return folder if any(True for pattern in patterns for _ in folder.rglob(pattern)) else None


def fetched(repo: str, patterns: Sequence[str], needs: str) -> Path:
    """The snapshot of a hub dataset, fetched where it is not here; UserError says how to get it otherwise."""
    from huggingface_hub import snapshot_download

    reason = ""
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=list(patterns)))
    except Exception as error:  # the client raises a dozen kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
    else:
        if any(True for pattern in patterns for _ in folder.rglob(pattern)):
            return folder
        reason = "it has no files of the kind expected"
    raise UserError(f"dataset {repo} is not here and could not be fetched from the hub ({reason}); {needs}")


def revision(folder: Path) -> str | None:
    """The commit of a hub snapshot's folder; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None
