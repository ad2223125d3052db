"""Errors that callers may want to catch by name. Each message names the tensors it is about."""


class CheckpointError(ValueError):
    """A folder or file is not a checkpoint that can be read, written or verified."""


class UnmatchedPatternError(ValueError):
    """An `ignore`, `include` or per-pattern scheme matched nothing: a silent one would quantize the wrong set."""


class UnsupportedLayoutError(ValueError):
    """The chosen format cannot hold these weights so that its engines load them; names one that can."""


class LoadError(RuntimeError):
    """A model could not be loaded; it is as it was before."""


class IncompleteLoadError(LoadError):
    """Some elements were never written; lists every missing region."""


class ConflictingShardError(LoadError):
    """A second, different value arrived for a weight that is already quantized."""


class NonFiniteWeightError(LoadError):
    """Weights hold NaN or Inf; lists every one."""


class PoisonedModelError(LoadError):
    """A streaming reload broke off and left weights half loaded; names them. Reload them."""
