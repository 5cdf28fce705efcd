"""Models from folders and the hub, whole or not at all; imported when the first one is loaded.

transformers and peft warn of weights that are missing, left over or of another size, and go on with random ones. Here
that is an error with the names, for policies, references, reward models and adapters alike.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

SHOWN_NAMES = 3  # of weights, in a message


def load_whole(auto: Any, name: str, *, dtype: torch.dtype | None, begin: bool = False, **how: Any) -> nn.Module:
    """A model in evaluation mode, every weight of which is one of its files', and the other way round.

    Args:
        auto: transformers' class. name, how: what its `from_pretrained` takes.
        dtype: of its weights; None leaves each as it is stored, for an fp32 model whose caller casts them.
        begin: a causal LM becomes a classifier: its output head is not used, and the linear layer `score` is new.

    Raises:
        ValueError: names of weights that are missing, left over or of another size; a quantised model, an adapter.
    """
    from transformers import PreTrainedConfig

    about, _ = PreTrainedConfig.get_config_dict(name, revision=how.get("revision"))
    quantised = about.get("quantization_config") or (about.get("text_config") or {}).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "in a way that it does not name")
        raise ValueError(
            f"its weights are quantised ({method}): name the model in full precision that it was made from"
        )
    how |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
    with _own_words(), _as_stored() if dtype is None else nullcontext():
        lm, found = auto.from_pretrained(name, dtype=dtype or torch.float32, use_safetensors=True, **how)
    if getattr(lm, "_hf_peft_config_loaded", False):
        raise ValueError(f"it is an adapter on the hub: hf download {name} --local-dir DIR, and name that folder")
    missing, unused = set(found["missing_keys"]), set(found["unexpected_keys"])
    if begin:
        missing -= {f"score.{one}" for one in ("weight", "bias")}
        unused = {weight for weight in unused if weight.startswith(f"{lm.base_model_prefix}.")}
    check_weights(missing, unused, {weight: sizes for weight, *sizes in found["mismatched_keys"]}, of=type(lm).__name__)
    lm.stored_dtype = lm.dtype  # where none was asked for
    return lm.eval()  # dropout off, in scoring and in training alike


@contextmanager
def _as_stored() -> Iterator[None]:
    """Without transformers' cast of what it reads: uncast weights are pages of their files, which the ranks of a host
    share, and no memory of a process. Its own dtype="auto" would give constants and configs that dtype as well."""
    from transformers import core_model_loading

    read = core_model_loading._materialize_copy
    core_model_loading._materialize_copy = lambda tensor, device=None, dtype=None: read(tensor, device)
    try:
        yield
    finally:
        core_model_loading._materialize_copy = read


def check_weights(
    missing: Collection[str], unused: Collection[str], sizes: dict[str, Any] | None = None, *, of: str
) -> None:
    """ValueError that names the weights which files and a model do not share, and those of another size."""
    wrong = [f"its files lack {_names(missing)}"] if missing else []
    wrong += [f"they hold {_names(unused)}, for which there is no place"] if unused else []
    for weight, (theirs, ours) in sorted((sizes or {}).items())[:SHOWN_NAMES]:
        wrong.append(f"{weight} is {list(theirs)} in its files and {list(ours)} in the model")
    if wrong:
        raise ValueError(f"these are not the weights of {of}: " + "; ".join(wrong))


def _names(names: Collection[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(sorted(names)[:SHOWN_NAMES]) + more


@contextmanager
def _own_words() -> Iterator[None]:
    """Without transformers' table of the weights that do not fit: `check_weights` says it, as an error."""

    def report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(report)
    try:
        yield
    finally:
        logger.removeFilter(report)


def check_vocabulary(lm: nn.Module, tokenizer: Any) -> None:
    """ValueError where a tokenizer gives an id for which a model has no embedding."""
    rows = lm.get_input_embeddings().weight.shape[0]
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if beyond:
        named = ", ".join(repr(token) for token in sorted(beyond, key=beyond.__getitem__)[:SHOWN_NAMES])
        more = f" and {len(beyond) - SHOWN_NAMES} more tokens" if len(beyond) > SHOWN_NAMES else ""
        raise ValueError(
            f"the tokenizer gives {named}{more} ids up to {max(beyond.values())}, and the model has embeddings for "
            f"{rows} tokens, ids 0 to {rows - 1}: resize them (resize_token_embeddings({max(beyond.values()) + 1}), "
            "save_pretrained), or take the tokens out of the tokenizer"
        )


@contextmanager
def explain_load_errors(what: str, path: str) -> Iterator[None]:
    """Say on one line why a model could not be loaded, whatever transformers, peft or safetensors raise."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot load the {what} {path!r}: {why_not(path, error)}") from error


def why_not(path: str, error: Exception) -> str:
    """What an error of loading says, on one line, and that a pickle beside it was not read."""
    pickles = sorted(Path(path).glob("*.bin"))[:1]
    return said(error) + "".join(
        f"; {file.name} is a pickle, which can run code, and is not read: save it as safetensors" for file in pickles
    )


def said(error: Exception) -> str:
    """An error of a library on one line, with its kind where the words may not tell what it is."""
    line = " ".join(str(error).split()) or type(error).__name__
    line = line.split(" Model type should be one of ")[0]  # a hundred names
    return line if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: {line}"
