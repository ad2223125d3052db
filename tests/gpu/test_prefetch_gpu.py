"""What an engine's loop takes from files and host memory, on a CUDA device: right bits, and nothing kept."""

import gc
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fp8_kernels as fk
from fp8_kernels.loading import prefetch
from fp8_kernels.loading.prefetch import Prefetch

pytestmark = pytest.mark.gpu

needs_extension = pytest.mark.skipif(prefetch.library() is None, reason="needs the CPU extension")


def model_of(tensors):
    root = nn.Module()
    for name, tensor in tensors.items():
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
        root.add_module(name, module)
    return root


def bits(t):
    return t.reshape(-1).view(torch.uint8).cpu()


@pytest.mark.parametrize("order", ["in order", "backwards"])
@pytest.mark.parametrize("scheme", ["per_channel", "per_tensor", "per_block"])
def test_a_loop_over_files_gives_the_bits_of_quantize(scheme, order, tmp_path):
    """Large and small weights of two files, through the loader: codes and scales as of `quantize`."""
    tensors = {f"w{i:02}": torch.randn(300 + 97 * i, 1025).bfloat16() for i in range(24)}
    tensors |= {f"x{i:02}": torch.randn(33, 129).bfloat16() for i in range(50)}
    names = sorted(tensors)
    for i in range(2):
        save_file({name: tensors[name] for name in names[i::2]}, tmp_path / f"{i}.safetensors")
    model = model_of(tensors)
    with fk.LayerwiseLoader(model, scheme, device="cuda") as loader:
        params = dict(model.named_parameters())
        for i in range(2):
            with safe_open(tmp_path / f"{i}.safetensors", "pt") as f:
                for name in sorted(f.keys(), reverse=order == "backwards"):
                    params[f"{name}.weight"].data.copy_(f.get_tensor(name))
    assert loader.report.quantized_tensors == len(tensors)
    for name, tensor in tensors.items():
        q, scale = fk.quantize(tensor.cuda(), scheme, backend="reference")
        module = model.get_submodule(name)
        assert torch.equal(bits(module.weight), bits(q)) and torch.equal(bits(module.weight_scale), bits(scale)), name


@needs_extension
@pytest.mark.parametrize("kind", ["pageable", "pinned", "pinned, not waiting"])
def test_a_large_buffer_may_be_written_again(kind):
    """Twenty weights out of one buffer of the host, which is overwritten as soon as each copy returns; after an event
    where the copy was asked not to wait for page-locked memory, which then goes on its way as it is."""
    buffer = torch.empty(1024, 4096, dtype=torch.bfloat16)
    buffer = buffer.pin_memory() if kind != "pageable" else buffer
    sources, direct = Prefetch(torch.device("cuda", torch.cuda.current_device())), kind == "pinned, not waiting"
    arrived = []
    for i in range(20):
        destination = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
        sources.bring(destination, buffer.fill_(i), non_blocking=kind != "pinned")
        if direct:
            torch.cuda.current_stream().record_event().synchronize()
        buffer.fill_(-1)
        arrived.append(destination)
    assert [bool(t.eq(i).all()) for i, t in enumerate(arrived)] == [True] * 20
    counters = sources.counters()
    assert sum(each.asked_bytes for each in counters.values()) == (0 if direct else 20 * buffer.nbytes)
    sources.close()


@needs_extension
def test_copies_come_in_the_order_of_the_current_stream(tmp_path):
    """What was enqueued before still sees the destination as it was, on each of several streams."""
    save_file({f"w{i}": torch.full((512, 1024), float(i)) for i in range(12)}, tmp_path / "a.safetensors")
    sources = Prefetch(torch.device("cuda", torch.cuda.current_device()))
    destination, seen = torch.zeros(512, 1024, device="cuda"), []
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        for i in range(12):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)
                seen.append(destination.clone())
                sources.bring(destination, f.get_tensor(f"w{i}"))
            torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert [bool(t.eq(max(i - 1, 0)).all()) for i, t in enumerate(seen)] == [True] * 12
    assert destination.eq(11).all()
    sources.close()


@needs_extension
def test_a_thousand_loads_leave_nothing(tmp_path):
    """A third of them given up in the middle: files, threads, mappings and host memory stay as they were."""
    tensors = {f"w{i}": torch.randn(512, 1024).bfloat16() for i in range(4)}
    save_file(tensors, tmp_path / "a.safetensors")

    def load(fails):
        model = model_of(tensors)
        try:
            with fk.LayerwiseLoader(model, device="cuda"):
                with safe_open(tmp_path / "a.safetensors", "pt") as f:
                    for i, name in enumerate(sorted(tensors)):
                        if fails and i == 3:
                            raise KeyboardInterrupt
                        model.get_submodule(name).weight.data.copy_(f.get_tensor(name))
        except KeyboardInterrupt:
            assert fails

    def held():
        gc.collect()
        torch.cuda.synchronize()
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        with open("/proc/self/maps") as file:
            maps = len(file.readlines())
        return len(os.listdir("/proc/self/fd")), int(fields["Threads"]), maps, int(fields["RssAnon"].split()[0]) >> 10

    for i in range(20):
        load(i % 3 == 0)
    before = held()
    for i in range(1000):
        load(i % 3 == 0)
    after = held()
    assert after[:2] == before[:2]
    assert after[2] <= before[2] + 4 and after[3] <= before[3] + 16, (before, after)
