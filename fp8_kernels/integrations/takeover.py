"""The load of a transformers model, taken over at the moment when transformers wants its first tensor.

`Collector`s stand in the places of transformers' converters and see, before anything is read, where each tensor of the
checkpoint belongs. The first that is asked to convert has `Load` fill the whole model, in the order of the files.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from ..checkpoint.reader import Checkpoint
from ..errors import LoadError
from ..load import copy_all, known_maxima, names_to_quantize, no_collection, not_runnable, span_by_span
from ..loading import LayerwiseLoader, make_plan
from ..loading.plan import listed
from ..loading.report import Report
from ..loading.rules import Rules
from ..modules import make_runnable
from ..names import Destination, Names, turned_experts
from ..stored import SCALE_SUFFIXES, expect_fp8, stored_schemes
from ..wire import SpanLoad
from .compressed import stacks_experts

if TYPE_CHECKING:
    from .transformers import Fp8KernelsConfig


class _Itself(ConversionOps):
    """A tensor that needs no conversion, whose name may."""

    def convert(self, input_dict, *args, **kwargs):
        return input_dict

    @property
    def reverse_op(self):
        return self


class Collector(WeightConverter):
    """Stands for a converter of transformers: notes which tensors belong together, and converts only what `Load` asks.

    Args:
        load: that wants to know.
        original: whom it stands for; None for tensors that are taken as they are.
    """

    def __init__(self, load: Load, original: WeightConverter | None = None):
        if original is None:
            super().__init__(r"^(.+)$", r"\1", [_Itself()], force_cpu=True)
        else:
            sources, targets = original._original_source_patterns, original._original_target_patterns
            super().__init__(list(sources), list(targets), original.operations, force_cpu=True)
            self.scope_prefix, self.base_model_prefix = original.scope_prefix, original.base_model_prefix
        self.load, self.original = load, original
        self.targets: list[str] = []

    def __deepcopy__(self, memo):  # one for each target, and transformers makes one for each tensor
        new = copy.copy(self)
        new.collected_tensors, new.layer_targets, new.targets = defaultdict(list), defaultdict(set), []
        return new

    def add_tensor(self, target_key, source_key, source_pattern, future):
        self.targets = self.targets or [target_key.replace(self.target_patterns[0], t) for t in self.target_patterns]
        self.load.sources[source_key] = (self, target_key, future)
        super().add_tensor(target_key, source_key, source_pattern, future)

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        self.load.run(loading_info)
        return {}

    def converted(self, model) -> dict[str, torch.Tensor]:
        """Name in the model -> tensor, on the host, as transformers converts them."""
        name = self.targets[0] if self.original is not None else ""
        found = super().convert(name, model=model, config=model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in found.items()}


class Load:
    """One load of a model.

    Args:
        model: on meta.
        config: what to make of it.
        device: where it will live.
        files: of the checkpoint; None where its tensors were given.

    Attributes:
        sources: name in the checkpoint -> (its `Collector`, name in the model, transformers' way to read it).
        report: of the load, once it is done.
    """

    def __init__(self, model, config: Fp8KernelsConfig, device: torch.device, files: list[str] | None):
        self._model, self._config, self._device = model, config, device
        self._checkpoint = _checkpoint(files, config.stored)
        self._stored = {} if self._checkpoint is None else stored_schemes(self._checkpoint)
        rules = config.rules
        if self._stored and config.is_default:
            expect_fp8(model, self._checkpoint, self._stored, config.activation)
            rules["ignore"] = ("*",)
        plan = make_plan(model, **rules)
        self._kept = not_runnable(model, plan)
        self._rules = rules | {"ignore": [*rules["ignore"], *self._kept]}
        codes = {} if config.is_default else self._stored
        self._by_spans = self._checkpoint is not None and span_by_span(self._checkpoint, model, codes, device, "auto")
        with turned_experts(model, names_to_quantize(plan) - self._kept.keys()):
            pass  # nothing turns them back: where this fails there is no model to return
        self.sources: dict[str, tuple[Collector, str, object]] = {}
        self.report: Report | None = None
        self._collectors: list = []

    def __deepcopy__(self, memo):
        return self

    def collectors(self, conversions: list) -> list:
        """The conversions, each converter exchanged for a `Collector`, and one last for everything else."""
        self._collectors = [c if isinstance(c, WeightRenaming) else Collector(self, c) for c in conversions]
        return [*self._collectors, Collector(self)]

    def used_conversions(self) -> list:
        """transformers' own, of those that this checkpoint needed: saving turns them round."""
        return [c.original if isinstance(c, Collector) else c for c in self._collectors if c.was_used()]

    def run(self, loading_info):
        """Fill the model, once.

        Args:
            loading_info: transformers' sets of missing and unexpected names, which are put right.

        Raises:
            LoadError: as `load_checkpoint`.
        """
        if self.report is not None:
            return
        model, names = self._model, _Names(self._model, self.sources)
        scales = self._scales(names)
        arriving = {name for collector, _, _ in self.sources.values() for name in collector.targets}
        arriving |= {names.find(name).name for name in scales if names.find(name) is not None}
        self._refuse_skipped(arriving)
        self._refuse_unscaled(names, loading_info)
        model.tie_weights(missing_keys=loading_info.missing_keys - arriving, recompute_mapping=False)
        plan = make_plan(model, **self._rules)  # ties have joined entries
        optional = [e.name for e in plan.entries if e.scheme is None and e.tracked and not arriving & set(e.names)]
        with no_collection(), ExitStack() as stack:
            spans = None
            if self._by_spans:
                spans = stack.enter_context(SpanLoad(self._checkpoint, self._device, Rules(**self._rules), model))
            amax = {} if self._checkpoint is None else known_maxima(model, self._checkpoint, self._rules)
            options = {"device": self._device, "dtype": self._config.dtype, "optional": optional, "amax": amax}
            loader = LayerwiseLoader(model, **options, **self._rules)
            stack.enter_context(loader.prepared(spans and spans.given(loader, names)))
            if spans is not None:
                spans.into(loader, names)
            else:
                copy_all(loader, self._tensors(), names, self._stored)
            for collector in names.to_convert:
                for name, tensor in collector.converted(model).items():
                    names.found[name] = names.whole(name)
                    copy_all(loader, [(name, tensor)], names)
        loader.report.passed_through.update(self._kept)
        absent = {name for entry in plan.entries if entry.name in loader.report.defaulted for name in entry.names}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor._is_hf_initialized = not tensor.is_meta and name not in absent
        loading_info.missing_keys.intersection_update(absent | model.all_tied_weights_keys.keys())
        loading_info.unexpected_keys.difference_update(self._expected(scales, loading_info))
        chosen = {name: entry.scheme for entry in loader.plan.quantized for name in entry.names}
        make_runnable(model, self._config.activation, chosen)
        self.report = loader.report

    def _tensors(self):
        if self._checkpoint is not None:
            return self._checkpoint.tensors()
        return ((name, read() if callable(read) else read.result()) for name, (_, _, read) in self.sources.items())

    def _scales(self, names):
        """Names of scales in the checkpoint whose weights have a place in the model."""
        found = set()
        for name in self._checkpoint.metadata() if self._checkpoint is not None else ():
            suffix = next((s for s in SCALE_SUFFIXES if name.endswith(s)), None)
            if suffix and name.removesuffix(suffix) in self._stored and names.find(name.removesuffix(suffix)):
                found.add(name)
        return found

    def _expected(self, scales, loading_info):
        """What transformers calls scales that it has no place for; they have been read with their weights."""
        renamings = [c for c in self._collectors if isinstance(c, WeightRenaming)]
        renamed = {apply_all(renamings, name) for name in scales}
        prefix = f"{self._model.base_model_prefix}."
        # transformers 5.17 also takes scales for weights, since its patterns match them.
        state = self._model.state_dict()
        ending = [(name, s) for name in loading_info.unexpected_keys for s in SCALE_SUFFIXES if name.endswith(s)]
        converted = {name for name, suffix in ending if name.removesuffix(suffix) in state}
        return scales | renamed | {prefix + n for n in renamed} | {n.removeprefix(prefix) for n in renamed} | converted

    def _refuse_skipped(self, arriving):
        """transformers loads by itself what has a model's name before its renamings, and not after them."""
        held = self._checkpoint.metadata() if self._checkpoint is not None else ()
        state = self._model.state_dict()
        skipped = [n for n in held if n in state and n not in self.sources and n not in arriving]
        if skipped:
            raise LoadError(
                f"transformers renames {listed(skipped)} to what this model does not have; save the checkpoint under "
                "its original names, or load it with fp8_kernels.load_checkpoint"
            )

    def _refuse_unscaled(self, names, loading_info):
        """FP8 weights whose scales are not read with them would be taken for numbers."""
        found = [name for name, (c, _, _) in self.sources.items() if c in names.to_convert and name in self._stored]
        if self._checkpoint is None:
            found += [name for name in loading_info.unexpected_keys if name.endswith(SCALE_SUFFIXES)]
        if found:
            raise LoadError(
                f"FP8 weights must come from files, and as the model holds them, got {listed(sorted(found))}; load the "
                "checkpoint in high precision"
            )


class _Names:
    """Where transformers puts each tensor of the checkpoint; what `copy_all` asks.

    Attributes:
        found: name in the checkpoint -> `Destination`.
        to_convert: collectors of tensors that are no part of a weight before transformers has converted them.
    """

    def __init__(self, model, sources):
        self._own = Names(model)
        self.found: dict[str, Destination] = {}
        self.to_convert: list[Collector] = []
        for source, (collector, target, _) in sources.items():
            if collector.original is None:
                self.found[source] = self._own.whole(target)
            elif collector not in self.to_convert:
                destination = self._own.find(source) if stacks_experts(collector) else None
                if destination is not None and destination.expert is not None and destination.name == target:
                    self.found[source] = destination
                else:
                    self.to_convert.append(collector)
        for source, (collector, _, _) in sources.items():
            if collector in self.to_convert:  # all of its tensors, or none
                self.found.pop(source, None)

    def whole(self, name: str) -> Destination:
        return self._own.whole(name)

    def find(self, name: str) -> Destination | None:
        found = self.found.get(name)
        if found is None and name.endswith(SCALE_SUFFIXES):
            found = self._own.find(name)
        return found

    def may_be_dropped(self, name: str) -> bool:
        return True  # transformers says what it did not expect


def apply_all(renamings: list[WeightRenaming], name: str) -> str:
    """A checkpoint's name after transformers has renamed it."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _checkpoint(files, stored):
    """The files as one checkpoint; None where they are none."""
    folders = {Path(file).parent for file in files or ()}
    if len(folders) != 1:
        return None
    config = {} if stored is None else {"quantization_config": stored}
    return Checkpoint(folders.pop(), [Path(file).name for file in files], config)
