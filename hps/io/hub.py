"""What stands on the Hugging Face hub, named with its revision: models as OWNER/NAME@REVISION, files of data sets as
hf://datasets/OWNER/NAME@REVISION/FILE. A revision is a commit, a tag or a branch; only a commit never changes."""

import functools
import logging
import re
from pathlib import Path

DATA_SET = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/@]+))?/([^@]+)")


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
        commit = _commit(hf_hub_download(name, "config.json", revision=revision), "config.json")
    except LocalEntryNotFoundError as error:  # loading it would try again, and wait as long again
        raise ValueError(
            f"{name!r} is no folder here, nor in the cache of the hub at {revision!r}, and the hub cannot be reached"
        ) from error
    except (OSError, ValueError, HfHubHTTPError):
        return revision
    if commit != revision:
        logging.getLogger(__name__).warning(
            "%s@%s may change on the hub; it is %s@%s now", name, revision, name, commit
        )
    return commit


def fetch(path: str) -> tuple[str, str]:
    """The local file behind `path`, and its name on the hub with the commit that it is of, empty for a local path.

    Raises:
        ValueError: no such name, file or revision, or no network.
    """
    if not path.startswith("hf://"):
        return path, ""
    match = DATA_SET.fullmatch(path)
    if match is None:
        raise ValueError(f"{path!r} must be hf://datasets/OWNER/NAME/FILE or hf://datasets/OWNER/NAME@REVISION/FILE")
    repo, revision, file = match.groups()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        local = hf_hub_download(repo, file, repo_type="dataset", revision=revision)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(f"{path} could not be fetched: {' '.join(str(error).split())}") from error
    return local, f"hf://datasets/{repo}@{_commit(local, file)}/{file}"


def _commit(local: str, file: str) -> str:
    return Path(local).parents[file.count("/")].name  # .../snapshots/COMMIT/FILE
