"""`push`: a finished run goes in, a commit on the Hugging Face Hub comes out (huggingface_hub).

All that can be refused is refused before a byte is sent: the run, the card, the repository's name, the token, and a
repository that already holds another model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from danceopd.common.messages import clipped
from danceopd.errors import UserError
from danceopd.models.base import file_sha256
from danceopd.run.directory import WEIGHTS
from danceopd.run.publish.files import PIPELINE, Publication, copy_lora, publication

COMFYUI = "comfyui"
"""Folder of the file for ComfyUI."""


def push(
    run: str | Path, repo: str, *, private: bool = False, revision: str | None = None, base_model: str | None = None,
    comfyui: bool = False, replace: bool = False, dry_run: bool = False, message: str | None = None,
    confirm: Callable[[Publication], bool] = lambda found: True,
) -> str | None:  # fmt: skip
    """Publish the finished `run` as the model `repo`, "owner/name"; the address of the commit.

    `confirm` sees what would be sent and may decline; with `dry_run` nothing is asked of the network. `comfyui` adds a
    file with ComfyUI's names. `replace` allows a repository that holds another model. `revision` is a branch that
    exists there. None where nothing was sent. UserError for all that is refused, and for what the hub refuses.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        reason = clipped(" ".join(str(error).split()), 120)
        raise UserError(f"{repo!r} is no repository's name ({reason}); write owner/name, as you/my-student") from None
    with tempfile.TemporaryDirectory(prefix="danceopd-push-", ignore_cleanup_errors=True) as temporary:
        found = publication(run, Path(temporary), repo, base_model)
        if comfyui:
            found = _with_comfyui(Path(run), found, repo)
        if not confirm(found) or dry_run:
            return None
        with _one_sentence(repo):
            return _upload(found, repo, private, revision, replace, message or "danceopd push")


def _with_comfyui(run: Path, found: Publication, repo: str) -> Publication:
    """The same with a file in ComfyUI's names."""
    from danceopd.adapters.export import export_as

    if PIPELINE in found.files:
        raise UserError("a fused pipeline has no LoRA for ComfyUI; leave out --comfyui, or push an unfused run")
    with tempfile.TemporaryDirectory(prefix="danceopd-comfyui-", ignore_cleanup_errors=True) as temporary:
        written = export_as(run, temporary, "comfyui").file
        place = found.folder / COMFYUI / f"{repo.split('/')[-1]}.safetensors"
        place.parent.mkdir()
        copy_lora(written, place, found.base)
    files = {**found.files, place.relative_to(found.folder).as_posix(): place.stat().st_size}
    return Publication(found.folder, files, found.base, found.notes)


def _upload(
    found: Publication, repo: str, private: bool, revision: str | None, replace: bool, message: str
) -> str:  # fmt: skip
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.whoami()
    api.create_repo(repo, private=private, exist_ok=True)
    if not replace:
        _refuse_other_model(api, found, repo, revision)
    operations = [CommitOperationAdd(name, str(found.folder / name)) for name in found.files]
    return str(api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url)


def _refuse_other_model(api: Any, found: Publication, repo: str, revision: str | None) -> None:
    """UserError where the repository has weights that are not these."""
    name = PIPELINE if PIPELINE in found.files else WEIGHTS
    there = api.get_paths_info(repo, [WEIGHTS, PIPELINE], revision=revision)
    for file in there:
        hashed = getattr(getattr(file, "lfs", None), "sha256", None)
        mine = file_sha256(found.folder / name) if file.path == name else None
        if mine is None or (hashed is not None and hashed != mine):
            raise UserError(
                f"{repo} already holds another model ({file.path}); choose another name, or --replace it (the hub "
                "keeps the old one in its history)"
            )


@contextmanager
def _one_sentence(repo: str) -> Iterator[None]:
    """A context in which a fault of the hub, the token or the network becomes a UserError."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except (errors.LocalTokenNotFoundError, errors.HTTPError, ConnectionError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = clipped(" ".join(str(error).split()), 160)
        if status == 401 or isinstance(error, errors.LocalTokenNotFoundError):
            raise UserError("there is no token that the hub takes; run `hf auth login`, or set HF_TOKEN") from error
        if status == 403:
            raise UserError(f"your token may not write to {repo}; give it write access, or another owner") from error
        if isinstance(error, errors.RevisionNotFoundError):
            raise UserError(f"{repo} has no such revision; make the branch first, or leave out --revision") from error
        raise UserError(f"{repo} could not be pushed ({reason}); run the same command again, it sends only what is "
                        "missing") from error  # fmt: skip
