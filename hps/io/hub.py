"""What stands on the Hugging Face hub, named with its revision: models as OWNER/NAME@REVISION, files of data sets as
hf://datasets/OWNER/NAME@REVISION/FILE. A revision is a commit, a tag or a branch; only a commit never changes."""

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
        commit = _commit(hf_hub_download(name, "config.json", revision=revision), "config.json")
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


def fetch(path: str) -> tuple[str, str]:
    """The local file behind `path`, and its name on the hub with the commit that it is of, empty for a local path.

    Raises:
        ValueError: no such name, file or revision, or no network.
    """
    if not path.startswith("hf://"):
        return path, ""
    from huggingface_hub import hf_hub_download, parse_hf_uri
    from huggingface_hub.errors import HfHubHTTPError, HfUriError

    form = f"{path!r} must be hf://datasets/OWNER/NAME/FILE or hf://datasets/OWNER/NAME@REVISION/FILE"
    try:
        uri = parse_hf_uri(path)
        if uri.type != "dataset" or not uri.path_in_repo:
            raise ValueError(form)
        local = hf_hub_download(uri.id, uri.path_in_repo, repo_type="dataset", revision=uri.revision)
    except HfUriError as error:
        raise ValueError(form) from error
    except (OSError, HfHubHTTPError) as error:
        raise ValueError(f"{path} could not be fetched: {' '.join(str(error).split())}") from error
    return local, f"hf://datasets/{uri.id}@{_commit(local, uri.path_in_repo)}/{uri.path_in_repo}"


def _commit(local: str, file: str) -> str:
    return Path(local).parents[file.count("/")].name  # .../snapshots/COMMIT/FILE
