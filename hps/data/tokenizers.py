"""The tokenizer of a model: loaded and checked, the same for a policy and its reference, and named by its content.

What it makes of rows is in hps/data/tokens.py.
"""

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hps.config import meant
from hps.io import hub


def load_tokenizer(path: str, options: str = "") -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local folder or a hub name; a missing pad token becomes EOS (not scored).

    options: of its chat template. Raises ValueError when there is no tokenizer, it is not a fast one, or it has no EOS
    token; and as `templates.fix`.
    """
    try:
        name, revision = hub.resolve(path)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, revision=revision)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        if Path(path).is_dir():
            why = f"this folder holds no tokenizer.json that can be read ({why})"
        elif Path(path).exists():
            why = "this is a file; name the folder of a model"
        elif Path(path).parent.name and Path(path).parent.is_dir():  # the OWNER of a name on the hub is none here
            near = meant(Path(path).name, [other.name for other in Path(path).parent.glob("*")])
            why = f"there is no such folder in {Path(path).parent}{near}"
        else:
            why = "there is no such folder, nor a model of that name within reach; name a folder, or, where there is a "
            why += f"network, fetch it first: hf download {path}"
        raise ValueError(f"no tokenizer could be loaded from {path!r}: {why}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {path!r} has no tokenizer.json; save a fast version of it")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path!r} has no eos_token; name one in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if options or "strftime_now" in str(tokenizer.chat_template):
        from hps.data import templates

        tokenizer.chat_template = templates.fix(tokenizer.chat_template, options, path=path)
    return tokenizer


def load_common(model: str, reference: str, options: str = "") -> PreTrainedTokenizerFast:
    """The tokenizer of a policy and its reference (empty: there is none); ValueError where theirs differ."""
    own = load_tokenizer(model, options)
    if reference and fingerprint(load_tokenizer(reference, options)) != fingerprint(own):
        raise ValueError(
            f"the reference {reference} has another tokenizer or chat template than {model}: their log-probs cannot be "
            "compared; give the policy and its reference the same one"
        )
    return own


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Sha256 of what decides the ids (vocabulary, rules, BOS, EOS, chat template); not of padding, truncation and
    the pad token, which change with use or are not scored."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    named = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    content = json.dumps([backend, named, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
