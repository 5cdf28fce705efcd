"""Models of the Hugging Face hub, named with their revision as OWNER/NAME@REVISION: a commit, a tag or a branch, of
which only a commit never changes. Its data sets are in hps/prepare/importers.py."""

import functools
import logging
from pathlib import Path


def resolve(model: str) -> tuple[str, str | None]:
    """A model's name and the commit behind its revision; of a folder of this machine the path and None.

    A name without a commit gets one here, and the log says which. What cannot be found keeps its revision: loading it
    will say what is wrong.

    Raises:
        ValueError: nothing stands before or behind the @; no such folder, and no hub within reach.
    """
    if Path(model).exists() or model.startswith((".", "/", "~")):
        return model, None
    name, _, revision = model.rpartition("@") if "@" in model else (model, "", "main")
    if not name or not revision:
        raise ValueError(f"{model!r} must be a folder, OWNER/NAME or OWNER/NAME@REVISION")
    return name, _commit_of(name, revision)


@functools.cache  # a branch may move between two calls of one run, and model and tokenizer belong together
def _commit_of(name: str, revision: str) -> str:
    from huggingface_hub import hf_hub_download  # transformers brings it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        commit = commit_of_copy(hf_hub_download(name, "config.json", revision=revision), "config.json")
    except LocalEntryNotFoundError as error:  # loading it would try again, and wait as long again
        raise ValueError(
            f"{name!r} is no folder here, nor in the cache of the hub at {revision!r}, and the hub cannot be reached"
        ) from error
    except (OSError, ValueError, HfHubHTTPError):
        return revision
    if commit != revision:
        told = f"{name}@{revision} may change on the hub; it is {name}@{commit} now"
        logging.getLogger(__name__).warning(told)
    return commit


def commit_of_copy(local: str, file: str) -> str:
    return Path(local).parents[file.count("/")].name  # .../snapshots/COMMIT/FILE
