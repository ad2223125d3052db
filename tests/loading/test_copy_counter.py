"""The dispatch mode: which ops it carries out on real memory, and that it leaves every other op alone."""

import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fp8_kernels.errors import LoadError
from fp8_kernels.loading import LayerwiseLoader
from fp8_kernels.loading.copy_counter import BelowModes, CopyCounter
from fp8_kernels.loading.op_info import op_info

from .helpers import Model, assert_quantized, load, values

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("op", "written"),
    [
        (aten.copy_.default, ((0,), ())),
        (aten.add_.Tensor, ((0,), ())),
        (aten.index_put_.default, ((0,), ())),
        (aten.stack.out, ((), ("out",))),
        (aten.max.dim_max, ((), ("max", "max_values"))),
        (aten._foreach_add_.List, ((0,), ())),
        (aten.add.Tensor, ((), ())),
        (aten.view.default, ((), ())),
    ],
)
def test_schema_says_what_is_written(op, written):
    """Written arguments are found from the schema: in place, out=, several outputs, lists, none."""
    info = op_info(op)
    assert (info.written_args, info.written_kwargs) == written
    assert info.writes == any(written)


@pytest.mark.parametrize(
    "op", [aten.view.default, aten.t.default, aten.split.Tensor, aten.detach.default, aten.t_.default, aten.view.dtype]
)
def test_views_read_nothing(op):
    """Views, and shape changes in place, touch no element."""
    assert op_info(op).is_view


def test_every_in_place_op_that_writes_a_part_is_known():
    """All in-place ops of torch that take an index or a mask are listed as writing a part: a new one that is not
    would count as a write of everything."""
    from fp8_kernels.loading.op_info import PARTIAL

    words = {"index", "indices", "mask"}
    found = set()
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if namespace != "aten" or not packet.endswith("_") or packet.startswith("__"):
            continue
        op = getattr(getattr(aten, packet), overload or "default")
        arguments = {a.name for a in op._schema.arguments}
        if op_info(op).writes and not op_info(op).is_view and arguments & words:
            found.add(packet)
    sparse_or_inner = {"_index_put_impl_"}
    assert found - sparse_or_inner <= set(PARTIAL), found - set(PARTIAL)


READS = {
    "sum": lambda p: p.sum().item(),
    "item": lambda p: p[2, 3].item(),
    "tolist": lambda p: p[1].tolist(),
    "equal": lambda p: torch.equal(p, p.clone()),
    "to_float": lambda p: p.float().sum().item(),
    "cpu": lambda p: p.cpu().sum().item(),
    "numpy_of_copy": lambda p: p.float().cpu().numpy().sum(),
    "bool": lambda p: bool((p != 0).any()),
    "transposed": lambda p: (p.t() @ p).sum().item(),
    "masked_select": lambda p: p[p > 0].sum().item(),
    "list_index": lambda p: p[[0, 2]].sum().item(),
    "array_index": lambda p: p[np.array([0, 2]), 1:].sum().item(),
    "max": lambda p: p.max(dim=0).indices.tolist(),
    "cat": lambda p: torch.cat([p, p[:1]]).sum().item(),
    "str": lambda p: str(p.clone()),
    "deepcopy": lambda p: p.clone().view(torch.int16).sum().item(),
    "dtype_view": lambda p: p.view(torch.int16).sum().item(),
}


@pytest.mark.parametrize("read", READS)
def test_reads_see_what_was_written(read):
    """Every kind of read gives what it gives on a real parameter that received the same writes."""
    w, seen = values(6, 36), []

    def loading(params):
        p = params["fc.weight"].data
        p.zero_()
        p[:, :30].copy_(w[:, :30])
        seen.append(READS[read](p))

    load(Model(fc=(6, 36)), loading)
    loading({"fc.weight": torch.empty(6, 36).bfloat16()})
    assert seen[0] == seen[1]


VIEWS = {
    "flat": lambda p: p.view(-1)[77:803],
    "transposed": lambda p: p.transpose(1, 2),
    "stacked_rows": lambda p: p.view(30, 36)[4:27],
    "columns_of_stacked_rows": lambda p: p.view(30, 36)[4:27, 3:30],
    "sliced": lambda p: p[1:4, 2:5, 7:],
    "every_other_expert": lambda p: p[::2],
    "one_element_each": lambda p: p[:, 3, 35],
}
WRITES = {
    "copy_": lambda v, source: v.copy_(source),
    "broadcast": lambda v, source: v.copy_(source.flatten()[0]),
    "fp32": lambda v, source: v.copy_(source.float()),
    "fill_tensor": lambda v, source: v.fill_(torch.tensor(2.0)),
    "add_": lambda v, source: v.add_(source),
    "out": lambda v, source: torch.add(source, source, out=v),
    "masked_fill_": lambda v, source: v.masked_fill_(source > 0, 3.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", VIEWS)
def test_writes_over_several_experts(view, write):
    """A write to a view that spans experts writes what it writes on a real tensor: the experts that it completes
    are verified, and those that it leaves open are rewritten with no change."""
    model, real = Model(experts=(5, 6, 36)), torch.zeros(5, 6, 36).bfloat16()
    source = torch.randn(VIEWS[view](real).shape).bfloat16()
    WRITES[write](VIEWS[view](real), source)

    def loading(params):
        p = params["experts.weight"].data
        WRITES[write](VIEWS[view](p), source)
        for expert, wanted in zip(p, real, strict=True):
            expert.copy_(wanted)

    loader = load(model, loading)
    assert_quantized(model, "experts.weight", real)
    assert loader.report.rewrites == []
    assert len(loader.report.duplicates) >= 2


def test_a_write_of_several_weights_at_once():
    """One op that writes several weights, some by half: each is recorded for itself."""
    model, w = Model(a=(6, 36), b=(6, 36)), values(6, 36)

    def loading(params):
        a, b = params["a.weight"].data, params["b.weight"].data
        torch._foreach_add_([a, b[:3]], [w, w[:3]])
        torch._foreach_add_([b[3:]], [w[3:]])

    load(model, loading)
    assert_quantized(model, "a.weight", w)
    assert_quantized(model, "b.weight", w)

    def two_outputs(params):
        torch.frexp(w.float(), out=(params["values_.weight"].data, torch.empty(6, 36, dtype=torch.int32)))
        params["other.weight"].data.copy_(params["values_.weight"].data)

    model = Model(values_=(6, 36), other=(6, 36), dtype=torch.float32)
    load(model, two_outputs)
    assert_quantized(model, "values_.weight", torch.frexp(w.float()).mantissa)
    assert_quantized(model, "other.weight", torch.frexp(w.float()).mantissa)


def test_a_weight_written_from_itself():
    """A weight may be its own source, whole or in part: the read and the write meet in the same real memory."""
    model, w = Model(fc=(36, 36), fc2=(3, 5)), values(36, 36)

    def loading(params):
        p = params["fc.weight"].data
        p.copy_(w)
        p.copy_(p.t().contiguous())
        p.copy_(p)
        p[:5].copy_(p[7:12])
        params["fc2.weight"].data.copy_(w[:3, :5])

    loader = load(model, loading)
    loading({"fc.weight": (real := torch.empty(36, 36).bfloat16()), "fc2.weight": torch.empty(3, 5)})
    assert_quantized(model, "fc.weight", real)
    assert len(loader.report.rewrites) == 3


def test_an_output_that_is_an_input_too():
    """`out=` of the tensor that is read: it sees what was written, or 0, and changes nothing that is quantized."""
    model, w = Model(a=(6, 36), b=(6, 36), c=(6, 36)), values(6, 36)

    def loading(params):
        a, b, c = (p.data for p in params.values())
        a.copy_(w)
        b[:3].copy_(w[:3])  # where `a` was
        torch.mul(b, 2.0, out=b)
        torch.cos(c, out=c)  # where `b` was

    load(model, loading, stream=False)
    assert_quantized(model, "b.weight", torch.cat([w[:3] * 2, torch.zeros_like(w[3:])]))
    assert_quantized(model, "c.weight", torch.ones_like(w))

    def too_late(params):
        a, b, _ = (p.data for p in params.values())
        a.copy_(w)
        b.copy_(w)
        torch.mul(a, 1.0, out=a)

    with pytest.raises(LoadError, match="a.weight is quantized already; mul cannot change it"):
        load(Model(a=(6, 36), b=(6, 36), c=(6, 36)), too_late)


def test_a_write_of_nothing_changes_nothing():
    """A thread that writes a view without elements has not moved on from what it wrote before."""
    w = values(6, 36)

    def loading(params):
        for name in ("fc.weight", "fc2.weight"):
            p = params[name].data
            p.copy_(w)
            params["fc2.weight"].data[:0].copy_(w[:0])
            torch._foreach_zero_([p[6:], p[:, 36:]])
            p.copy_(p * 2)

    for stream in (True, False):
        model = Model(fc=(6, 36), fc2=(6, 36))
        load(model, loading, stream=stream)
        assert_quantized(model, "fc.weight", w * 2)
        assert_quantized(model, "fc2.weight", w * 2)


def test_two_outputs_that_meet_in_an_expert():
    """Where one of them is of several experts the op is refused; none of both writes is lost silently."""

    def loading(params):
        p = params["experts.weight"].data.view(6, 8)
        torch._foreach_add_([p[:1], p[1:]], 1.0)

    model = Model(experts=(3, 2, 8))
    with pytest.raises(LoadError, match="experts.weight.*must not write one expert by two outputs"):
        load(model, loading)


def test_copy_of_a_weight_that_waits_in_fp32():
    """Copying one tracked weight to another does not round what the first holds in fp32."""
    model, w = Model(a=(6, 36), b=(6, 36)), values(6, 36, dtype=torch.float32)

    def loading(params):
        params["a.weight"].data[:5].copy_(w[:5])
        params["b.weight"].data[:5].copy_(params["a.weight"].data[:5])
        params["a.weight"].data[5].copy_(w[5])
        params["b.weight"].data[5].copy_(w[5])

    load(model, loading)
    assert_quantized(model, "a.weight", w)
    assert_quantized(model, "b.weight", w)


def test_other_tensors_are_left_alone():
    """Inside the context, tensors that are no parameters behave as outside: real ones, new ones, meta ones."""
    with LayerwiseLoader(Model(fc=(6, 36)), device="cpu") as loader:
        loader.model.fc.weight.data.zero_()
        x = torch.arange(6.0)
        x[[0, 2]] = 5
        x.add_(1).mul_(2)
        meta = torch.empty(3, 4, device="meta")
        meta.fill_(1)
        meta[0] = 2.0
        meta[[0, 1]] = 3.0
        assert meta.is_meta and (meta + 1).is_meta and meta.to(torch.float16).is_meta
        assert torch.empty_like(meta).is_meta and torch.zeros(3, device="meta").is_meta
        layer = torch.nn.Linear(3, 4, device="meta")
        assert layer.weight.is_meta
        sparse = torch.zeros(3, 3).to_sparse()
        sparse.copy_(torch.eye(3).to_sparse())
        torch.func.vmap(lambda row: row.copy_(row + 1))(x)
    assert x.tolist() == [13, 5, 13, 9, 11, 13] and sparse.to_dense().equal(torch.eye(3))
    assert loader.report.shards == 1


def test_new_tensors_like_a_weight_are_real():
    """Scratch that an engine makes after its parameter can hold data."""

    def loading(params):
        p = params["fc.weight"]
        made = [torch.zeros_like(p), torch.ones_like(p.data), p.new_zeros(3), p.data.new_full((2,), 7.0)]
        made += [p.new_tensor([1.0, 2.0]), torch.tensor([1.0], device=p.device), p.data.to(torch.float32)]
        assert all(t.device.type == "cpu" for t in made)
        assert made[3].tolist() == [7, 7] and made[4].tolist() == [1, 2] and made[4].dtype == p.dtype
        assert torch.empty_like(p, device="meta").device.type == "cpu"
        p.data.copy_(made[1])

    model = Model(fc=(6, 36))
    load(model, loading)
    assert_quantized(model, "fc.weight", torch.ones(6, 36).bfloat16())


def test_results_are_the_engine_s_own_tensors():
    """An in-place op returns the tensor it was called on, and an op with out= its output, so chains keep working."""

    def loading(params):
        p = params["fc.weight"].data
        assert p.copy_(values(6, 36)) is p and p.mul_(2) is p
        assert torch.neg(p, out=p) is p
        p[0].zero_().add_(1).mul_(3)

    load(Model(fc=(6, 36)), loading)


def test_torch_s_own_errors_name_the_parameter():
    """A shard of the wrong shape is torch's error, with the parameter's name; the loader stays usable."""
    model, w = Model(fc=(6, 36)), values(6, 36)

    def loading(params):
        with pytest.raises(RuntimeError, match=r"copy_.* on `fc.weight`: .*size"):
            params["fc.weight"].data.copy_(w[:, :35])
        params["fc.weight"].data.copy_(w)

    load(model, loading)
    assert_quantized(model, "fc.weight", w)


def test_a_swallowed_error_is_not_forgotten():
    """An engine that catches every exception does not turn a refused shard into a loaded one."""
    model = Model(fc=(6, 36))

    def loading(params):
        try:
            params["fc.weight"].data.copy_(torch.ones(6, 36, dtype=torch.int8))
        except Exception:
            params["fc.weight"].data.zero_()

    with pytest.raises(LoadError, match="int8"):
        load(model, loading)
    assert model.fc.weight.is_meta


def test_a_resized_weight_is_refused():
    """Growing a parameter's storage in place is a change of shape, which belongs into a hook."""
    model = Model(fc=(6, 36))

    def loading(params):
        params["fc.weight"].data.zero_()
        model.fc.weight.data = params["fc.weight"].data[:3]

    with pytest.raises(LoadError, match=r"`fc.weight` must keep the shape \(6, 36\)"):
        load(model, loading)
    assert model.fc.weight.shape == (6, 36)


def test_below_the_modes_none_sees_what_torch_does():
    """Neither of ops nor of functions; and each sees it again afterwards."""
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    t = torch.zeros(3, 4)
    with Functions(), Ops():
        with BelowModes():
            t.narrow(0, 1, 2).copy_(torch.ones(2, 4))
        assert not seen
        t.narrow(0, 1, 2)
    assert seen == ["narrow", "slice.Tensor"] and t.sum() == 8


def test_a_tensor_of_a_file_costs_no_dispatch(tmp_path, monkeypatch):
    """What `safe_open` makes of its mapping is seen by no handler; reshaping a weight that was written to still is."""
    w, seen, original = values(6, 8), [], CopyCounter.__torch_dispatch__
    save_file({"w": w}, tmp_path / "a.safetensors")
    monkeypatch.setattr(
        CopyCounter, "__torch_dispatch__", lambda self, func, *args: seen.append(func) or original(self, func, *args)
    )
    model = Model(fc=(6, 8))
    with LayerwiseLoader(model, device="cpu"), safe_open(tmp_path / "a.safetensors", "pt") as f:
        shard = f.get_tensor("w")
        array = torch.asarray(np.arange(3))
        assert not seen and torch.equal(shard, w) and array.tolist() == [0, 1, 2]
        model.fc.weight.data.copy_(shard)
        assert torch.equal(model.fc.weight.data.t().reshape(-1), w.t().reshape(-1))  # reads what was written
        assert torch.asarray([1.5, 2.5], device=model.fc.weight.device).tolist() == [1.5, 2.5]  # and stays real
    assert seen
    assert_quantized(model, "fc.weight", w)


def test_a_tensor_of_a_file_touches_none_of_its_pages(tmp_path):
    """torch looks at the first byte of a storage that it makes a tensor of; here none is read."""
    size = os.sysconf("SC_PAGESIZE")
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * (size // 64))
    pages = os.open("/proc/self/pagemap", os.O_RDONLY)

    def is_present(t):
        return bool(int.from_bytes(os.pread(pages, 8, t.data_ptr() // size * 8), "little") >> 63)

    with LayerwiseLoader(Model(fc=(6, 8)), device="cpu") as session:
        storage = torch.UntypedStorage.from_file(str(tmp_path / "bytes"), False, 4 * size)
        of_all = torch.asarray(storage, dtype=torch.uint8, device="cpu")
        part = torch.asarray(storage[size : size + 300], dtype=torch.uint8)
        assert not is_present(of_all) and not is_present(part)
        assert of_all.tolist() == list(range(256)) * (size // 64)
        assert part.tolist() == of_all[size : size + 300].tolist()
        part[0] = 99
        assert of_all[size] == 99 and is_present(part)  # the same memory
        assert torch.asarray(storage[:0], dtype=torch.uint8).shape == (0,)
        session.fill_dummy()
    os.close(pages)


def test_a_device_that_was_chosen_for_all_tensors_is_that_of_a_files_too():
    """Where a context that was entered before says where tensors are made, it is asked."""
    storage = torch.arange(5, dtype=torch.uint8).untyped_storage()
    with torch.device("meta"), LayerwiseLoader(Model(fc=(6, 8)), device="cpu") as session:
        assert torch.asarray(storage, dtype=torch.uint8).is_meta
        assert torch.asarray(storage, dtype=torch.uint8, device="cpu").tolist() == [0, 1, 2, 3, 4]
        session.fill_dummy()
