"""How far is the FP8 model from the original? Prints a table, saves JSON.

    python -m bench.accuracy [--model DIR] [--schemes per_channel ...] [--activation none dynamic]

On a fixed text, in windows that each start afresh, against the same model in its own dtype:

    KL      mean over tokens of KL(original || FP8) between the next-token distributions, in nats
    top-1   share of tokens for which both models find the same next token most likely
    tied    the same, where any of the original's equally likely first tokens will do: bf16 logits tie often
    ppl     perplexity of the text

The exit code is 1 where a measure misses its bar.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fp8_kernels
from fp8_kernels.load import load_model
from fp8_kernels.modules import Fp8Module

HERE = Path(__file__).parent
SCHEMES = ("per_tensor", "per_channel", "per_block", "per_group", "mxfp8")
MAX_KL = {"none": 0.03, "dynamic": 0.06}
MIN_TOP1 = 0.90
MAX_PPL_CHANGE = 0.05
_ROWS = 256  # distributions compared at a time: a full window's in fp32 would take gigabytes
_BATCH = 4  # windows run at a time, so that dequantizing a weight is paid once for several


@dataclass
class Row:
    """One scheme with one way to treat activations; `ppl_original` and `ppl` are of the same tokens."""

    scheme: str
    activation: str
    kl: float
    top1: float
    top1_tied: float
    ppl_original: float
    ppl: float

    @property
    def misses(self) -> list[str]:
        """The bars it does not reach."""
        change = abs(self.ppl / self.ppl_original - 1)
        bars = {
            f"KL <= {MAX_KL[self.activation]}": self.kl <= MAX_KL[self.activation],
            f"top-1 >= {MIN_TOP1}": self.top1 >= MIN_TOP1,
            f"ppl within {MAX_PPL_CHANGE:.0%}": change <= MAX_PPL_CHANGE,
        }
        return [bar for bar, reached in bars.items() if not reached]


@dataclass
class Sums:
    """Sums over tokens, in double precision."""

    kl: float = 0.0
    same: int = 0
    tied: int = 0
    tokens: int = 0
    nll_original: float = 0.0
    nll: float = 0.0
    targets: int = 0

    def add(self, original: torch.Tensor, fp8: torch.Tensor, tokens: torch.Tensor):
        """Logits `[T, V]` of both models over the tokens `[T]` of a window."""
        for start in range(0, len(tokens), _ROWS):
            rows = slice(start, start + _ROWS)
            p, q = (logits[rows].float().log_softmax(-1) for logits in (original, fp8))
            self.kl += (p.exp() * (p - q)).sum(-1).double().sum().item()
            first = q.argmax(-1, keepdim=True)
            self.same += (p.argmax(-1, keepdim=True) == first).sum().item()
            self.tied += (p.gather(-1, first) == p.amax(-1, keepdim=True)).sum().item()
            self.tokens += len(p)
            targets = tokens[start + 1 : start + 1 + _ROWS, None]
            self.nll_original -= p[: len(targets)].gather(1, targets).double().sum().item()
            self.nll -= q[: len(targets)].gather(1, targets).double().sum().item()
            self.targets += len(targets)

    def row(self, scheme, activation):
        ppl_original, ppl = (
            float(torch.tensor(nll / self.targets, dtype=torch.float64).exp()) for nll in (self.nll_original, self.nll)
        )
        kl, top1, tied = (total / self.tokens for total in (self.kl, self.same, self.tied))
        return Row(scheme, activation, kl, top1, tied, ppl_original, ppl)


@torch.inference_mode()
def logits_of(model, windows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits `[B, T, V]` for each batch of windows `[B, T]`."""
    return [model(tokens).logits for tokens in windows]


@torch.inference_mode()
def compare(original: list[torch.Tensor], fp8, windows: list[torch.Tensor], scheme, activations) -> list[Row]:
    """Run the FP8 model over the windows; `original` has their `logits_of`. A row for each of `activations`."""
    rows = []
    for activation in activations:
        for module in fp8.modules():
            if isinstance(module, Fp8Module):
                module.activation = None if activation == "none" else activation
        sums = Sums()
        for expected, batch in zip(original, windows, strict=True):
            for *logits, tokens in zip(expected, fp8(batch).logits, batch, strict=True):
                sums.add(*logits, tokens)
        rows.append(sums.row(scheme, activation))
    return rows


def windows_of(tokenizer, text: str, num_tokens: int | None, window: int, device) -> list[torch.Tensor]:
    """The first `num_tokens` tokens of the text (None: all whole windows), batches of windows: `[B, window]`.

    Raises:
        ValueError: the text is shorter, or the windows do not come out even.
    """
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    if num_tokens is None:
        num_tokens = len(tokens) // window * window
    if len(tokens) < max(num_tokens, window):
        raise ValueError(f"the text must have {max(num_tokens, window)} tokens, got {len(tokens)}")
    if num_tokens % window:
        raise ValueError(f"`--tokens` must be a multiple of `--window` ({window}), got {num_tokens}")
    return list(tokens[:num_tokens].reshape(-1, window).to(device).split(_BATCH))


def table(rows: list[Row]) -> str:
    lines = ["scheme        activation      KL     top-1     tied      ppl  (original)  bars"]
    for row in rows:
        bars = f"missed: {', '.join(row.misses)}" if row.misses else "ok"
        lines.append(
            f"{row.scheme:<12}  {row.activation:<10}  {row.kl:.4f}  {row.top1:7.4f}  {row.top1_tied:7.4f}  "
            f"{row.ppl:7.3f}  {row.ppl_original:10.3f}  {bars}"
        )
    return "\n".join(lines)


def machine(device: torch.device) -> dict:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    versions = {"torch": torch.__version__, "fp8_kernels": fp8_kernels.__version__, "python": platform.python_version()}
    return {"device": name, "threads": torch.get_num_threads(), **versions}


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy", description="Compare FP8 models with their original."
    )
    parser.add_argument("--model", default=".cache/smollm2-135m-bf16", help="a causal language model's folder")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--activation", nargs="+", default=("none", "dynamic"), choices=tuple(MAX_KL))
    parser.add_argument("--text", type=Path, default=HERE / "data" / "text.txt")
    parser.add_argument("--tokens", type=int, help="the first so many (default: all whole windows)")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to save (default: bench/results/accuracy_<device>.json)")
    args = parser.parse_args(argv)

    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    device = torch.device(args.device)
    text = args.text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = windows_of(tokenizer, text, args.tokens, args.window, device)
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device).eval()
    dtype, expected, rows = original.dtype, logits_of(original, windows), []
    del original
    for scheme in args.schemes:
        fp8, _ = load_model(args.model, scheme, device=device, model_class=AutoModelForCausalLM)
        rows += compare(expected, fp8, windows, scheme, args.activation)
        print("\n".join(table(rows).splitlines()[-len(args.activation) :]), file=sys.stderr)
        del fp8
    print(table(rows))
    where = machine(device)
    label = "cpu" if device.type == "cpu" else "".join(c if c.isalnum() else "-" for c in where["device"].lower())
    path = args.json or HERE / "results" / f"accuracy_{label}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "model": Path(args.model).name,
        "dtype": str(dtype).removeprefix("torch."),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": sum(batch.numel() for batch in windows),
        "window": args.window,
        "machine": where,
        "rows": [asdict(row) | {"misses": row.misses} for row in rows],
    }
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"saved {path}")
    return 1 if any(row.misses for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
