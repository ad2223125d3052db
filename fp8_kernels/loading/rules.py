"""Which weights become FP8, and with which scheme.

The same rules serve models (names of parameters, with their modules) and checkpoints (names of tensors,
without). A pattern is an exact name, a glob, or `re:` and a regular expression; it matches a tensor if it
matches the tensor's name or the name of a module that contains it, so `lm_head` covers `lm_head.weight`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..errors import UnmatchedPatternError
from ..schemes import Scheme, as_scheme, dtype_name

# What stays in high precision unless `include` names it. Each is about the role of a layer, told by the
# words that model families use for it; small layers that decide (routers, norms) lose more than they save.
KEPT_BY_DEFAULT = {
    "embedding": r"(^|[._])(embed|embeds|embeddings?|wte|wpe|relative_attention_bias)([._]|$)",
    "output head": r"(^|\.)(lm_head|output_projection|embed_out|score|classifier)(\.|$)",
    "norm": r"norm|(^|\.)ln_\w+(\.|$)",
    "router": r"(^|[._])(router|gate|shared_expert_gate)(\.|$)",
    "convolution": r"(^|[._])(conv\d?d?|patch_embed)([._]|$)",
}
_KEPT = {role: re.compile(pattern, re.IGNORECASE) for role, pattern in KEPT_BY_DEFAULT.items()}
_ANY_KEPT = re.compile("|".join(f"({pattern})" for pattern in KEPT_BY_DEFAULT.values()), re.IGNORECASE)
_EXPERTS = re.compile(r"(^|[._])(experts|moe|w13|w2|w1|w3)([._]|$)|(gate_up_proj|down_proj|up_proj|gate_proj)$")
_LEAVES = re.compile(r"(^|[._])(weight|w13|w2|w1|w3|gate_up_proj|down_proj|up_proj|gate_proj)$")
HIGH_PRECISION = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Rules:
    """Args:
    scheme: for every weight that becomes FP8, unless `schemes` says otherwise.
    ignore: patterns that stay in high precision.
    include: patterns that become FP8 although a default rule keeps them; `ignore` wins over it.
    schemes: pattern -> scheme, the first match wins over `scheme`.
    """

    scheme: str | Scheme = "per_channel"
    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    schemes: dict[str, str | Scheme] = field(default_factory=dict)

    def __post_init__(self):
        self.scheme = as_scheme(self.scheme)
        self.ignore, self.include = as_patterns("ignore", self.ignore), as_patterns("include", self.include)
        self.schemes = {pattern: as_scheme(scheme) for pattern, scheme in (self.schemes or {}).items()}
        as_patterns("schemes", self.schemes)
        self._unused = {*self.ignore, *self.include, *self.schemes}

    def decide(self, name: str, shape, dtype, module: torch.nn.Module | None = None) -> tuple[Scheme | None, str]:
        """(scheme, or None for pass-through; why).

        Args:
            name: of the parameter or checkpoint tensor.
            shape, dtype: of the tensor.
            module: that owns it, where there is a model.
        """
        ignored = self._matches(self.ignore, name)
        included = self._matches(self.include, name)
        own = [self.schemes[p] for p in self._matches(tuple(self.schemes), name)]
        if ignored:
            return None, f"ignore={ignored[0]!r}"
        if dtype not in HIGH_PRECISION:
            return None, f"is {dtype_name(dtype)}"
        if len(shape) not in (2, 3):
            return None, f"{len(shape)}-D"
        if not included:
            kept = _kept_by_default(name, shape, module)
            if kept:
                return None, kept
        return (own[0] if own else self.scheme), "weight"

    def check_all_used(self):
        """Raise for patterns that matched nothing; call it after every tensor was decided."""
        if self._unused:
            listed = ", ".join(repr(p) for p in sorted(self._unused))
            raise UnmatchedPatternError(f"no tensor is matched by {listed}; patterns are names, globs or 're:...'")

    def _matches(self, patterns, name):
        found = [p for p in patterns if matches(p, name)]
        self._unused.difference_update(found)
        return found


def matches(pattern: str, name: str) -> bool:
    """Does the pattern match this name, or a module that contains it?

    Raises:
        ValueError: it is no regular expression behind `re:`.
    """
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise ValueError(f"{pattern!r} must be a regular expression behind 're:': {error}") from error
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def as_patterns(argument: str, patterns: Iterable[str] | None) -> tuple[str, ...]:
    """What a caller gave for `argument`.

    Raises:
        TypeError: that is no list of patterns; a string would be one of single letters.
        ValueError: a regular expression is none.
    """
    if isinstance(patterns, str):
        raise TypeError(f"`{argument}` must be a list of patterns, got the string {patterns!r}")
    if not isinstance(patterns, Iterable | None):
        raise TypeError(f"`{argument}` must be a list of patterns, got {patterns!r}")
    patterns = tuple(patterns or ())
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"`{argument}` must be a list of patterns, which are strings, got {pattern!r} in it")
        matches(pattern, "")
    return patterns


def _kept_by_default(name, shape, module):
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if isinstance(module, torch.nn.Linear) and name.endswith("weight"):
        pass  # its type already says that it is a weight; its role may still keep it
    elif not _LEAVES.search(name):
        return "not a weight"
    elif len(shape) == 3 and not _EXPERTS.search(name):
        return "3-D, but not experts"
    if not _ANY_KEPT.search(name):
        return None
    return next(role for role, pattern in _KEPT.items() if pattern.search(name))
