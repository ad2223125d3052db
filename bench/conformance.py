"""The conformance kit run against loaders that quantize, side by side.

    python -m bench.conformance                              # the table
    python -m bench.conformance --details                    # and why each failure is one
    python -m bench.conformance --json OUT --markdown OUT

Ours is `LayerwiseLoader`. Where vLLM can be imported, its `reload` package is run too: its bookkeeping (what counts as
loaded, when a layer is finished, what is kept until then) around our quantization, so that both have to give the same
bits and only the loading is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import fp8_kernels as fk
from fp8_kernels.testing import Adapter, LayerwiseAdapter, NotOffered, Outcome, as_table, loader_cases, run_cases
from fp8_kernels.testing.case import SECTIONS


class VllmReloadAdapter(Adapter):
    """vLLM's layerwise loading: engines' loaders run through `param.weight_loader`, which it wraps.

    It reloads in place, which is what the kit calls streaming. It is given what its own quantization methods give it: a
    `quant_method` whose `process_weights_after_loading` replaces a layer's weight, and `weight_loader_numel` on padded
    weights.
    """

    offers = frozenset({"progress", "logical_shapes", "threads", "reload", "partial", "hooks"})

    def __init__(self):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings would stand in the table
        import vllm
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
        from vllm.model_executor.model_loader.reload import layerwise

        self.name = f"vLLM {vllm.__version__} reload"
        self._layerwise, self._method = layerwise, QuantizeMethodBase

    @contextlib.contextmanager
    def enter(self, session):
        model, mode = session.model, session.load.mode
        if mode == "transactional":
            raise NotOffered("a reload that can be taken back")
        self._session = session
        if mode == "first":
            self._create_weights(session)
            self._layerwise.record_metadata_for_reloading(model)
        else:
            self._layerwise.initialize_layerwise_reload(model)
        session.params.update(model.named_parameters())  # what its `load_weights` looks up first
        yield
        config = SimpleNamespace(dtype=torch.bfloat16)
        if mode == "first":
            self._layerwise.finalize_layerwise_processing(model, config)
        else:
            self._layerwise.finalize_layerwise_reload(model, config)
        if session.load.on_finish is not None:
            session.load.on_finish(session, model)

    def write(self, session, name, source, how):
        param = session.params[name]
        param.weight_loader(param, source, how)

    def worker(self, session):
        return contextlib.nullcontext()

    def _create_weights(self, session):
        """What a model's construction does: weights on meta with loaders, everything else real."""
        facts, scheme = session.load.facts, session.case.scheme
        logical = facts.get("logical_shapes", {})
        plan = fk.make_plan(session.model, scheme, ignore=facts.get("ignore", ()), logical_shapes=logical)
        online: dict[nn.Module, list[str]] = {}
        for entry in plan.entries:
            real = _real(entry.tensors[0]) if entry.scheme is None and entry.on_meta else None
            for place in entry.places:
                if entry.scheme is not None and entry.on_meta:
                    online.setdefault(place.module, []).append(place.leaf)
                    place.registry[place.leaf].weight_loader_numel = torch.Size(entry.logical).numel()
                elif real is not None:
                    place.registry[place.leaf] = real
        for param in session.model.parameters():
            param.weight_loader = _weight_loader
        for module, leaves in online.items():
            module.quant_method = self._quant_method(leaves, scheme)
            self._layerwise.initialize_online_processing(module)

    def _quant_method(self, leaves, scheme):
        adapter = self

        class Method(self._method):
            def create_weights(self, layer, *args, **kwargs):
                raise NotImplementedError

            def apply(self, layer, *args, **kwargs):
                raise NotImplementedError

            def process_weights_after_loading(self, layer):
                for leaf in leaves:
                    q, scale = fk.quantize(getattr(layer, leaf).data, scheme)
                    setattr(layer, leaf, nn.Parameter(q, requires_grad=False))
                    setattr(layer, f"{leaf}_scale", nn.Parameter(scale, requires_grad=False))
                names = {module: name for name, module in adapter._session.model.named_modules()}
                session = adapter._session
                session.finished.append(names[layer])
                if session.load.on_module is not None:
                    session.load.on_module(session, layer)

        return Method()


def _weight_loader(param, loaded_weight, how):
    return how(param, loaded_weight)


def _real(held):
    real = torch.empty(held.shape, dtype=held.dtype)
    return nn.Parameter(real, requires_grad=False) if isinstance(held, nn.Parameter) else real


def adapters() -> tuple[list[Adapter], dict[str, str]]:
    """Ours and the peers that are here; and why the others are not."""
    found, absent = [LayerwiseAdapter()], {}
    try:
        found.append(VllmReloadAdapter())
    except ImportError as error:
        absent["vLLM's reload package"] = str(error)
    return found, absent


def as_json(scheme: str, results: dict[str, list[Outcome]], absent: dict[str, str]) -> dict:
    """What is saved: outcomes as plain data, with the versions that they were found on."""
    versions = {"torch": torch.__version__, "python": platform.python_version(), "fp8_kernels": fk.__version__}
    plain = {
        name: [
            {"section": o.case.section, "row": o.case.row, "case": o.case.name, "status": o.status, "detail": o.detail}
            for o in outcomes
        ]
        for name, outcomes in results.items()
    }
    return {"scheme": scheme, "machine": versions, "absent": absent, "results": plain}


def summary(saved: dict) -> str:
    """Markdown: how many rows of each section pass, of those offered. A row passes if all of its cases do."""
    names = list(saved["results"])
    lines = [f"| rows that pass, of those offered | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    total = {name: Counter() for name in names}
    for section, title in SECTIONS.items():
        cells = []
        for name in names:
            counts = _rows(o for o in saved["results"][name] if o["section"] == section)
            total[name] += counts
            cells.append(_of(counts))
        lines.append(f"| {section}. {title} | {' | '.join(cells)} |")
    lines.append(f"| all | {' | '.join(_of(total[name]) for name in names)} |")
    return "\n".join(lines)


def _rows(outcomes):
    """How many rows have which status."""
    rows: dict[str, set[str]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome["row"], set()).add(outcome["status"])
    return Counter("fail" if "fail" in s else "pass" if "pass" in s else "not offered" for s in rows.values())


def _of(counts):
    offered = counts["pass"] + counts["fail"]
    left_out = f" ({counts['not offered']} not offered)" if counts["not offered"] else ""
    return f"{counts['pass']} of {offered}{left_out}"


def report(saved: dict, results: dict[str, list[Outcome]], details: bool = False) -> str:
    """Markdown: the counts, the table, and with `details` each failure."""
    about = ", ".join(f"{name} {version}" for name, version in saved["machine"].items())
    parts = [f"Scheme `{saved['scheme']}`; {about}.", summary(saved)]
    parts += [f"{name} was not run: {reason}" for name, reason in saved["absent"].items()]
    parts.append(as_table(results))
    if details:
        for name, outcomes in saved["results"].items():
            lines = [f"- {o['case']}: {o['detail']}" for o in outcomes if o["status"] == "fail"]
            if lines:
                parts.append("\n".join([f"Failures of {name}:", "", *lines]))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a case of ours fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.conformance", description=__doc__.split("\n")[0])
    parser.add_argument("--scheme", default="per_channel", help="what one scale covers")
    parser.add_argument("--details", action="store_true", help="say why each failure is one")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--markdown", type=Path, help="write the report here too")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=UserWarning)
    loaders, absent = adapters()
    results = {adapter.name: run_cases(adapter, loader_cases(args.scheme)) for adapter in loaders}
    saved = as_json(args.scheme, results, absent)
    text = report(saved, results, args.details)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(saved, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(text + "\n")
    return int(any(o.status == "fail" for o in results[LayerwiseAdapter.name]))


if __name__ == "__main__":
    raise SystemExit(main())
