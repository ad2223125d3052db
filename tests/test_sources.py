"""Libraries that read safetensors files in ways of their own: each is an iterator, and loads as a folder does."""

import contextlib

import pytest
import torch
from torch import nn

from fp8_kernels import LayerwiseLoader, load_checkpoint

from .checkpoint import tiny

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
SCHEMES = ("per_tensor", "per_channel", "per_block")


def fastsafetensors(files, device):
    library = pytest.importorskip("fastsafetensors")
    loader = library.AutoLoader(None, files, device=device)
    with contextlib.closing(loader.iterate_weights()) as weights:
        yield from weights
    loader.close()


def instanttensor(files, device):
    library = pytest.importorskip("instanttensor")
    if device == "cpu":
        pytest.skip("InstantTensor reads to a GPU only")
    with library.safe_open(files, framework="pt", device=device) as f:
        yield from f.tensors()


def model_streamer(files, device):
    """Run:ai's, with the buffers that it uses again: each tensor is gone once the next is asked for."""
    library = pytest.importorskip("runai_model_streamer")
    with library.SafetensorsStreamer() as streamer:
        streamer.stream_files(files, device=device, owned=False)
        yield from streamer.get_tensors()


def safetensors(files, device):
    library = pytest.importorskip("safetensors")
    for file in files:
        with library.safe_open(file, "pt", device) as f:
            for name in f.keys():
                yield name, f.get_tensor(name)


SOURCES = [fastsafetensors, instanttensor, model_streamer, safetensors]


def model_of(state):
    """Modules on meta with these parameters."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False))
    return root


def bits(t):
    return t.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_library_loads_what_the_folder_holds(source, device, tmp_path):
    """`load_checkpoint` of the library's iterator gives the bits that it gives for the folder, for each scheme."""
    state = tiny.tensors()
    folder = tiny.write_sharded(tmp_path / "in", state)
    files = sorted(map(str, folder.glob("*.safetensors")))
    for scheme in SCHEMES:
        model, expected = model_of(state), model_of(state)
        report = load_checkpoint(model, source(files, device), scheme, device=device, runnable=False)
        load_checkpoint(expected, folder, scheme, device=device, runnable=False)
        assert report.shards == len(state)
        found, wanted = model.state_dict(), expected.state_dict()
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(bits(tensor), bits(found[name])), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_library_feeds_an_engines_loop(source, device, tmp_path):
    """Fused into one weight by an engine's own loop inside the loader, tensors that the library takes back count."""
    state = {name: t for name, t in tiny.tensors(1).items() if any(f"{part}_proj.weight" in name for part in "qkv")}
    files = sorted(map(str, tiny.write_single(tmp_path / "in", state).glob("*.safetensors")))
    rows = {name: i * tiny.HIDDEN for i, name in enumerate(state)}
    model = model_of({"qkv.weight": torch.cat(list(state.values()))})
    with LayerwiseLoader(model, "per_channel", device=device):
        for name, tensor in source(files, device):
            model.qkv.weight.data.narrow(0, rows[name], len(tensor)).copy_(tensor)
    expected = model_of({"qkv.weight": torch.cat(list(state.values()))})
    with LayerwiseLoader(expected, "per_channel", device=device):
        expected.qkv.weight.data.copy_(torch.cat(list(state.values())))
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(bits(found), bits(wanted))
