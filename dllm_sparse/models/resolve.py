"""From what a user typed to a folder with a checkpoint in it: bundled, local, or from the hub."""

from __future__ import annotations

import difflib
from pathlib import Path

from dllm_sparse.models.families import ALIASES, BUNDLED
from dllm_sparse.types import ModelNotFound, UsageError

BUNDLED_FOLDER = Path(__file__).parent / "bundled"
_PATTERNS = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]


def checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """The local folder of a model; a hub repository is downloaded (or taken from the cache) first.

    Raises ModelNotFound that says what was tried, what is close, and how to give a folder.
    """
    folder = BUNDLED_FOLDER / name if name in BUNDLED else Path(name).expanduser()
    if revision is not None and folder.is_dir():
        raise UsageError(f"revision {revision!r} was given, but {name} is a folder here; revisions belong to the hub")
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelNotFound(_empty(folder))
        return folder
    repository = ALIASES[name].repository if name in ALIASES else name
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise ModelNotFound(_unknown(name))
    return _from_hub(name, repository, revision)


def cached_folder(repository: str) -> Path | None:
    """The hub cache's folder of a repository's main revision, if its config and weights are there; no network."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def _from_hub(name: str, repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_PATTERNS))
    except GatedRepoError as error:
        reason = "the repository is gated: accept its licence on the hub and set HF_TOKEN"
        raise ModelNotFound(_failed(name, repository, revision, reason)) from error
    except LocalEntryNotFoundError as error:
        reason = "the hub cannot be reached (or HF_HUB_OFFLINE is set) and it is not in the local cache"
        raise ModelNotFound(_failed(name, repository, revision, reason)) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFound(_failed(name, repository, revision, reason)) from error


def _failed(name: str, repository: str, revision: str | None, reason: str) -> str:
    at = f" at revision {revision}" if revision else ""
    tried = f"tried bundled models, the folder ./{name} and hub repository {repository}{at}"
    return f"cannot load {name!r}: {reason}. {tried[0].upper()}{tried[1:]}. {_hint(name)}"


def _unknown(name: str) -> str:
    return f"unknown model {name!r}: not bundled, not an alias, not a folder, not a hub id. {_hint(name)}"


def _empty(folder: Path) -> str:
    found = _checkpoints_near(folder)
    nearest = f" Folders near it that have one: {', '.join(map(str, found))}." if found else ""
    return f"folder {folder} has no config.json (tried {folder / 'config.json'}).{nearest} {_hint(folder.name)}"


def _checkpoints_near(folder: Path) -> list[Path]:
    """At most three folders with a config.json: inside this one, else beside it, the most alike names first."""
    for root, patterns in (
        (folder, ("*/config.json", "*/*/config.json")),
        (folder.resolve().parent, ("*/config.json",)),
    ):
        try:
            names = [str(file.parent.relative_to(root)) for pattern in patterns for file in root.glob(pattern)]
        except OSError:  # what cannot be listed is no help
            continue
        if names:
            return [root / name for name in difflib.get_close_matches(folder.name, names, n=3, cutoff=0.0)]
    return []


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, [*BUNDLED, *ALIASES], n=3, cutoff=0.5)
    nearest = f"Nearest names: {', '.join(close)}. " if close else f"Bundled: {', '.join(BUNDLED)}. "
    return nearest + "A local checkpoint works too: --model FOLDER, with config.json and *.safetensors in it"
