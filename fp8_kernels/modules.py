"""Run what was loaded: linear layers and experts whose weights are FP8."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .errors import LoadError
from .linear import fp8_linear
from .loading.origin import carry_over, scheme_of
from .ops import FP8_DTYPES
from .schemes import Scheme, as_scheme, scheme_name

ACTIVATIONS = (None, "dynamic")


class Fp8Module(nn.Module):
    """A module some of whose parameters are FP8 codes with scales beside them (`<name>` and `<name>_scale`).

    Codes and scales keep their dtypes whatever happens to the module: `.to(dtype)` and `.half()` would turn
    codes into numbers that mean something else, and so would loading a bf16 weight over them.
    """

    scheme: Scheme

    def _add_fp8(self, name, shape, dtype, device):
        if dtype not in FP8_DTYPES:
            raise TypeError(f"`dtype` must be one of {FP8_DTYPES}, got {dtype}")
        scale_shape, scale_dtype = self.scheme.scale_shape(shape), self.scheme.scale_dtype
        self.register_parameter(name, _frozen(torch.empty(shape, dtype=dtype, device=device)))
        self.register_parameter(f"{name}_scale", _frozen(torch.empty(scale_shape, dtype=scale_dtype, device=device)))

    def fp8_names(self) -> list[str]:
        """Names of the parameters that hold codes."""
        return [name for name in self._parameters if f"{name}_scale" in self._parameters]

    def _fp8_names(self):
        return [n for name in self.fp8_names() for n in (name, f"{name}_scale")]

    def _apply(self, fn, recurse=True):
        before = {name: self._parameters[name].detach() for name in self._fp8_names()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._parameters[name]
            if new.dtype != old.dtype:
                new.data = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        for name in self._fp8_names():
            value, own = state_dict.get(prefix + name), self._parameters[name]
            if value is not None and value.dtype != own.dtype:
                errors.append(f"`{prefix}{name}` must be {own.dtype}, got {value.dtype}: quantize it first")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class Fp8Linear(Fp8Module):
    """`y = x @ dequantize(weight, weight_scale).T + bias`.

    Args:
        in_features, out_features, bias: as for `torch.nn.Linear`.
        scheme: what one scale covers: a scheme or its name.
        dtype: of the codes: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        activation: "dynamic" quantizes each token (row of `x`) to e4m3 with its own scale before multiplying;
            None leaves activations as they are.
        device: of the parameters, which are left uninitialised.
        bias_dtype: of the bias.

    Parameters (none takes a gradient):
        weight: FP8 `[out_features, in_features]`.
        weight_scale: `scheme.scale_dtype`, `scheme.scale_shape((out_features, in_features))`.
        bias: `bias_dtype` `[out_features]`, or None.

    `forward` takes bf16, fp16 or fp32 `[..., in_features]` and returns `[..., out_features]` in that dtype. It is for
    inference: no gradient passes the rounding of activations.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str | Scheme = "per_channel",
        *,
        dtype: torch.dtype = torch.float8_e4m3fn,
        activation: str | None = "dynamic",
        device=None,
        bias_dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        self._describe(in_features, out_features, scheme, activation)
        self._add_fp8("weight", (out_features, in_features), dtype, device)
        bias = _frozen(torch.empty(out_features, dtype=bias_dtype, device=device)) if bias else None
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: str | Scheme | None = None, activation="dynamic") -> Fp8Linear:
        """An `Fp8Linear` on the very tensors of a layer whose `weight` is FP8 with a `weight_scale` beside it.

        Args:
            linear: the layer.
            scheme: what one scale covers; told from the shapes where it is not given.
            activation: as for the class.

        Raises:
            ValueError: the scheme cannot be told from the shapes.
        """
        new = cls.__new__(cls)
        nn.Module.__init__(new)  # and no parameters of its own, which take longer to make than all else
        scheme = scheme_of(linear.weight, linear.weight_scale) if scheme is None else scheme
        new._describe(linear.in_features, linear.out_features, scheme, activation)
        _share(linear, new, ("weight", "weight_scale", "bias"))
        carry_over(linear, new)
        new.training = linear.training
        return new

    def _describe(self, in_features, out_features, scheme, activation):
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.activation = as_scheme(scheme), checked_activation(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, self.weight, self.weight_scale, self.bias, self.scheme, self.activation)

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={scheme_name(self.scheme)}, activation={self.activation}"
        )


class Fp8Experts(Fp8Module):
    """All routed experts of a layer, their weights merged: what transformers 5 calls an experts module.

    Args:
        num_experts, hidden_dim, intermediate_dim: sizes `E`, `H`, `I`.
        act_fn: applied to the gate half (or to everything, without a gate).
        scheme, dtype, activation, device: as for `Fp8Linear`.
        has_gate: whether the first weight holds a gate half above the up half.
        has_bias: whether each expert adds biases (`gate_up_proj_bias` `[E, 2*I]`, `down_proj_bias` `[E, H]`).
        is_transposed: weights are `[E, in, out]`.
        apply_gate: `[S, 2*I] -> [S, I]`; by default `act_fn(first half) * second half`.

    Parameters (none takes a gradient):
        gate_up_proj: FP8 `[E, 2*I, H]`; `up_proj` `[E, I, H]` without a gate.
        down_proj: FP8 `[E, H, I]`.
        gate_up_proj_scale, up_proj_scale, down_proj_scale: `scheme.scale_shape` of their weights.

    `forward(hidden_states [S, H], top_k_index [S, k], top_k_weights [S, k])` returns `[S, H]`: each token's
    experts, weighted. An index outside `0..E-1` is an expert that another rank holds, and adds nothing.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        intermediate_dim: int,
        act_fn: Callable,
        scheme: str | Scheme = "per_channel",
        *,
        dtype: torch.dtype = torch.float8_e4m3fn,
        activation: str | None = "dynamic",
        device=None,
        has_gate: bool = True,
        has_bias: bool = False,
        is_transposed: bool = False,
        apply_gate: Callable | None = None,
        bias_dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_dim, intermediate_dim
        self.act_fn, self.apply_gate = act_fn, apply_gate
        self.has_gate, self.is_transposed = has_gate, is_transposed
        self.scheme, self.activation = as_scheme(scheme), checked_activation(activation)
        if self.scheme.segments:
            raise ValueError(f"experts must have one scheme for all their weights, got {scheme_name(self.scheme)}")
        self.first = "gate_up_proj" if has_gate else "up_proj"
        width = 2 * intermediate_dim if has_gate else intermediate_dim
        for name, out_dim, in_dim in ((self.first, width, hidden_dim), ("down_proj", hidden_dim, intermediate_dim)):
            shape = (in_dim, out_dim) if is_transposed else (out_dim, in_dim)
            self._add_fp8(name, (num_experts, *shape), dtype, device)
            bias = _frozen(torch.empty(num_experts, out_dim, dtype=bias_dtype, device=device)) if has_bias else None
            self.register_parameter(f"{name}_bias", bias)

    @classmethod
    def like(cls, experts: nn.Module, scheme: str | Scheme, **options) -> Fp8Experts:
        """Uninitialised codes and scales in the layout of a transformers experts module, with its biases and gate.

        Args:
            experts: the module; its weights may be on the meta device.
            scheme, **options: as for the class.
        """
        transposed, shape = bool(getattr(experts, "is_transposed", False)), experts.down_proj.shape
        new = cls(
            shape[0],
            shape[2 if transposed else 1],
            shape[1 if transposed else 2],
            getattr(experts, "act_fn", None),
            scheme,
            has_gate="gate_up_proj" in experts._parameters,
            has_bias="down_proj_bias" in experts._parameters,
            is_transposed=transposed,
            apply_gate=_own_gate(experts),
            **options,
        )
        _share(experts, new, (f"{new.first}_bias", "down_proj_bias"))
        return new.train(experts.training)

    @classmethod
    def from_experts(cls, experts: nn.Module, scheme: str | Scheme | None = None, activation="dynamic") -> Fp8Experts:
        """An `Fp8Experts` on the very tensors of a transformers experts module whose weights are FP8.

        Args:
            experts: the module, with `<weight>_scale` beside each weight.
            scheme: what one scale covers; told from the shapes where it is not given.
            activation: as for the class.

        Raises:
            ValueError: the scheme cannot be told from the shapes.
        """
        scheme = scheme_of(experts.down_proj, experts.down_proj_scale) if scheme is None else scheme
        new = cls.like(experts, scheme, activation=activation, device="meta")
        _share(experts, new, new._fp8_names())
        carry_over(experts, new)
        return new

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < self.num_experts:
                continue
            token, position = torch.where(top_k_index == expert)
            x = self._project(self.first, hidden_states[token], expert)
            x = self._project("down_proj", self._activate(x), expert)
            out.index_add_(0, token, (x * top_k_weights[token, position, None]).to(out.dtype))
        return out

    def _project(self, name, x, expert):
        weight, scale, bias = (self._parameters[n] for n in (name, f"{name}_scale", f"{name}_bias"))
        bias = None if bias is None else bias[expert]
        return fp8_linear(x, weight[expert], scale[expert], bias, self.scheme, self.activation, self.is_transposed)

    def _activate(self, x):
        if not self.has_gate:
            return self.act_fn(x)
        if self.apply_gate is not None:
            return self.apply_gate(x)
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def extra_repr(self):
        return (
            f"num_experts={self.num_experts}, hidden_dim={self.hidden_dim}, intermediate_dim={self.intermediate_dim}, "
            f"scheme={scheme_name(self.scheme)}, activation={self.activation}"
        )


def make_runnable(
    model: nn.Module,
    activation: str | None = "dynamic",
    schemes: str | Scheme | Mapping[str, str | Scheme] | None = None,
) -> nn.Module:
    """Put an `Fp8Linear` or `Fp8Experts` in the place of every module whose weights are FP8, on the same tensors.

    Args:
        model: changed in place. A parameter counts as FP8 where `<name>_scale` stands beside it.
        activation: "dynamic" or None, as for `Fp8Linear`.
        schemes: one for all weights, or by full parameter name; told from the shapes where not given.

    Returns:
        `model`; or the new module, where the model is itself a linear layer or an experts module.

    Raises:
        LoadError: some modules hold FP8 weights that nothing here can run; the message lists them.
        ValueError: a scheme can be told neither from `schemes` nor from the shapes.
    """
    checked_activation(activation)
    everything = dict(model.named_modules(remove_duplicate=False))
    modules = {
        name: module
        for name, module in everything.items()
        if not isinstance(module, Fp8Module) and _fp8_weights(module)
    }
    stuck = [f"{name} ({type(module).__name__})" for name, module in modules.items() if not can_run(module)]
    if stuck:
        raise LoadError(f"nothing runs the FP8 weights of {', '.join(stuck)}: list them under `ignore`")
    made = {}  # a module under two names stays one module
    for name, module in modules.items():
        if id(module) not in made:
            weight = next(iter(_fp8_weights(module)))
            full_name = f"{name}.{weight}" if name else weight
            scheme = schemes.get(full_name) if isinstance(schemes, Mapping) else schemes
            convert = Fp8Linear.from_linear if isinstance(module, nn.Linear) else Fp8Experts.from_experts
            try:
                made[id(module)] = convert(module, scheme, activation)
            except ValueError as error:
                raise ValueError(f"{full_name}: {error}") from None
        if not name:
            return made[id(module)]
        parent, _, child = name.rpartition(".")
        everything[parent]._modules[child] = everything[name] = made[id(module)]
    return model


def can_run(module: nn.Module) -> bool:
    """Whether `make_runnable` knows a replacement for this module, once its weights are FP8."""
    if isinstance(module, nn.Linear):
        # A subclass with its own forward, or one whose weight its parent uses directly (torch's own attention),
        # does not compute what Fp8Linear computes.
        plain = type(module).forward is nn.Linear.forward
        return plain and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    weights = [n for n, p in module._parameters.items() if p is not None and p.ndim == 3 and not n.endswith("_scale")]
    known = sorted(weights) in (["down_proj", "gate_up_proj"], ["down_proj", "up_proj"])
    gated = hasattr(module, "act_fn") or _own_gate(module) is not None
    return known and gated and not getattr(module, "has_post_expert_norm", False)


def _fp8_weights(module):
    return {
        name: p
        for name, p in module._parameters.items()
        if p is not None and p.dtype in FP8_DTYPES and getattr(module, f"{name}_scale", None) is not None
    }


def _own_gate(experts):
    """How this class combines gate and up, where it is not `act_fn(gate) * up`."""
    gate = getattr(type(experts), "_apply_gate", None)
    if gate is None or gate.__name__ == "_default_apply_gate":
        return None
    # Bound to a copy without parameters: it may need the module's numbers (limits), never its weights.
    bare = copy.copy(experts)
    bare._parameters = {}
    return bare._apply_gate


def _share(old, new, names):
    for name in names:
        value = getattr(old, name, None)
        new._parameters[name] = value if value is None or isinstance(value, nn.Parameter) else _frozen(value)


def _frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


def checked_activation(activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {ACTIVATIONS}, got {activation!r}")
    return activation
