"""The `fp8-kernels` command: plan, quantize, amax, load, verify, env.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done; 1 `verify` found problems; 2 bad
arguments or input; 130 interrupted; 141 nobody reads what it prints.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import torch

from . import __version__
from .errors import CheckpointError, LoadError, UnmatchedPatternError, UnsupportedLayoutError
from .progress import CLEAR_LINE, ByteProgress
from .schemes import SCHEMES, as_scheme, dtype_name

INPUT_ERRORS = (
    CheckpointError,
    LoadError,
    UnmatchedPatternError,
    UnsupportedLayoutError,
    ValueError,
    TypeError,
    OSError,
    torch.OutOfMemoryError,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return _fail(130, "interrupted" + ("; the same command goes on from there" if args.run is quantize else ""))
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        return _fail(2, f"`{args.run.__name__}` needs {error.name}: pip install {error.name}")
    except INPUT_ERRORS as error:
        return _fail(2, f"{type(error).__name__}: {error}")


def plan(args) -> int:
    """What would become FP8, in which units, and the peak memory; nothing is loaded."""
    from .checkpoint import open_checkpoint, plan_checkpoint

    planned = plan_checkpoint(open_checkpoint(args.model), **_selection(args))
    _print(args, planned.as_dict(), str(planned))
    return 0


def quantize(args) -> int:
    """Write an FP8 checkpoint that engines load."""
    from .checkpoint import quantize_checkpoint

    report = quantize_checkpoint(
        args.model,
        args.out,
        format=args.format,
        device=args.device,
        overwrite=args.overwrite,
        progress=ByteProgress("quantize"),
        **_selection(args),
    )
    _print(args, report.as_dict(), f"wrote {args.out} ({args.format})\n{report}")
    return 0


def amax(args) -> int:
    """Keep every weight's maximum beside the weights, so that per_tensor scales need no second look at them."""
    from .checkpoint import write_amax

    path = write_amax(args.model, device=args.device, progress=ByteProgress("amax"))
    _print(args, {"path": str(path)}, f"wrote {path}")
    return 0


def load(args) -> int:
    """Load to the device, FP8 as the weights arrive; report, and generate if asked to."""
    from .load import load_model

    if args.compare and not args.generate:
        raise ValueError("`--compare` must come with `--generate PROMPT`")
    tokenizer = _tokenizer(args.model) if args.generate else None  # one that is missing is found before loading
    activation = None if args.activation == "none" else args.activation
    model, report = load_model(
        args.model, device=args.device, activation=activation, progress=ByteProgress("load"), **_selection(args, None)
    )
    results, lines = {"report": report.as_dict()}, [str(report)]
    if args.generate:
        results["fp8"] = _generate(model, tokenizer, args)
        lines.append(f"\nFP8:  {results['fp8']}")
    if args.compare:
        from transformers import AutoModelForCausalLM, logging

        del model
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        original = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device)
        results["original"] = _generate(original, tokenizer, args)
        lines.append(f"{dtype_name(original.dtype)}: {results['original']}")
    _print(args, results, "\n".join(lines))
    return 0


def verify(args) -> int:
    """Check a written folder: tensors, shapes, dtypes, scales; with --against, every bit."""
    from .checkpoint import verify_checkpoint

    result = verify_checkpoint(args.model, against=args.against)
    _print(args, result.as_dict(), str(result))
    return 0 if result.ok else 1


def env(args) -> int:
    """Versions, devices and backends, for bug reports."""
    from importlib import metadata

    from . import _ext
    from .backends import available_backends

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = ("torch", "triton", "transformers", "safetensors", "compressed-tensors", "vllm", "sglang")
    devices = [
        {
            "name": torch.cuda.get_device_name(i),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(i)),
            "memory": torch.cuda.get_device_properties(i).total_memory,
        }
        for i in range(torch.cuda.device_count())
    ]
    found = {
        "fp8_kernels": __version__,
        "python": sys.version.split()[0],
        **{package: version(package) for package in packages},
        "cuda": torch.version.cuda,
        "devices": devices,
        "extensions": [kind for kind in _ext.LIBRARIES if _ext.path(kind)],
        "backends": {kind: available_backends(kind) for kind in ("cpu", *(("cuda",) if devices else ()))},
    }
    _print(args, found, "\n".join(f"{key:<20} {'-' if value is None else value}" for key, value in found.items()))
    return 0


def _fail(code, message):
    clear = CLEAR_LINE if sys.stderr.isatty() else ""  # a line of progress may stand there
    print(f"{clear}fp8-kernels: {message}", file=sys.stderr)
    return code


def _tokenizer(path):
    from transformers import AutoTokenizer

    from .checkpoint import open_checkpoint

    open_checkpoint(path)  # or transformers would take a path that is not there for a name on the Hub
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must hold a tokenizer for `--generate`: {str(error).splitlines()[0]}") from error


def _generate(model, tokenizer, args):
    """Greedy continuation of the prompt, so that two models can be compared word by word."""
    inputs = tokenizer(args.generate, return_tensors="pt").to(args.device)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _selection(args, default="per_channel"):
    """The arguments that say which weights become FP8 and how."""
    scheme = args.scheme or default
    return {
        "scheme": None if scheme is None else as_scheme(scheme),
        "ignore": args.ignore,
        "include": args.include,
        "schemes": {pattern: as_scheme(name) for pattern, name in (_pair(s) for s in args.scheme_for)},
    }


def _device(text):
    """A device that is there, and holds values; argparse reports what is raised."""
    try:
        torch.empty(1, device=text).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a device of this machine: {str(error).splitlines()[0]}"
        ) from error
    return text


def _pair(text):
    pattern, separator, name = text.rpartition("=")
    if not separator:
        raise ValueError(f"`--scheme-for` must be PATTERN=SCHEME, got {text!r}")
    return pattern, name


def _print(args, results, text):
    print(json.dumps(results, indent=2) if args.json else text, flush=True)


def _parser():
    parser = argparse.ArgumentParser(prog="fp8-kernels", description="Quantize a model to FP8 while its weights load.")
    parser.add_argument("--version", action="version", version=f"fp8_kernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, model_help="a Hugging Face checkpoint folder"):
        sub = commands.add_parser(run.__name__, help=run.__doc__.rstrip("."), description=run.__doc__)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print the results as JSON")
        if model_help:
            sub.add_argument("model", metavar="MODEL_DIR", help=model_help)
        return sub

    def selection(sub, default="per_channel"):
        sub.add_argument("--scheme", choices=sorted(SCHEMES), metavar="SCHEME",
                         help=f"what one scale covers: {', '.join(SCHEMES)} (default: {default})")  # fmt: skip
        sub.add_argument("--ignore", action="append", default=[], metavar="PATTERN",
                         help="keep in high precision: a name, a glob or re:REGEX; may be repeated")  # fmt: skip
        sub.add_argument("--include", action="append", default=[], metavar="PATTERN",
                         help="quantize although it is kept by default, such as lm_head")  # fmt: skip
        sub.add_argument("--scheme-for", action="append", default=[], metavar="PATTERN=SCHEME",
                         help="another scheme for some weights")  # fmt: skip
        return sub

    def device(sub, what):
        default = "cuda" if torch.cuda.is_available() else "cpu"
        sub.add_argument("--device", default=default, type=_device, help=f"where to {what} (default: %(default)s)")

    selection(command(plan))
    sub = selection(command(quantize))
    sub.add_argument("out", metavar="OUT_DIR", help="the folder to write; appears only when complete")
    sub.add_argument("--format", default="compressed-tensors", choices=("compressed-tensors", "fp8"),
                     help="fp8: DeepSeek's, for per_block (default: %(default)s)")  # fmt: skip
    sub.add_argument("--overwrite", action="store_true", help="replace OUT_DIR, where that is an FP8 checkpoint")
    device(sub, "quantize")
    device(command(amax), "look at the weights")
    sub = selection(command(load), "per_channel; a folder that holds FP8 weights is taken as it is")
    sub.add_argument("--activation", default="dynamic", choices=("dynamic", "none"),
                     help="quantize activations per token, or keep them (default: %(default)s)")  # fmt: skip
    sub.add_argument("--generate", metavar="PROMPT", help="continue this text, greedily")
    sub.add_argument("--max-new-tokens", type=int, default=24, metavar="N",
                     help="how many tokens to generate (default: %(default)s)")  # fmt: skip
    sub.add_argument("--compare", action="store_true", help="also generate with the original model")
    device(sub, "load")
    sub = command(verify, "a folder that `fp8-kernels quantize` wrote")
    sub.add_argument("--against", metavar="MODEL_DIR", help="the checkpoint it was made from: compare every bit")
    command(env, model_help=None)
    return parser
