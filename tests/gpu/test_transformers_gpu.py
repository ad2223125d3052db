"""`from_pretrained` with `Fp8KernelsConfig` on a GPU: the bits of the CPU, in little more memory than FP8 takes."""

import gc

import pytest
import torch

import fp8_kernels as fk
from fp8_kernels import modules

from .. import models
from ..integrations.families import FAMILIES
from ..test_linear import quantized_linear, relative_error

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("accelerate", reason="transformers wants it for any device but the CPU")
MIB = 1 << 20


def load(folder, device, *args, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=device, quantization_config=fk.Fp8KernelsConfig(*args), **kwargs
    )


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert not [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n].float().cpu(), b[n].float().cpu())]


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "per_block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_load_on_the_cpu(tmp_path, family, scheme):
    """Every tensor of every family to the bit; all of them on the device, buffers included; it generates."""
    models.save(FAMILIES[family](), tmp_path)
    model = load(tmp_path, "cuda", scheme)
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    assert_same(model, load(tmp_path, "cpu", scheme))
    tokens = model.generate(torch.arange(1, 10, device="cuda")[None], max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 9


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_saved_from_the_gpu_and_loaded_again(tmp_path, family):
    """The same codes and scales, and the same tokens."""
    models.save(FAMILIES[family](), tmp_path / "bf16")
    model = load(tmp_path / "bf16", "cuda")
    model.save_pretrained(tmp_path / "fp8")
    again = load(tmp_path / "fp8", "cuda")
    assert_same(again, model)
    prompt = torch.arange(1, 10, device="cuda")[None]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(prompt, **options), model.generate(prompt, **options))


@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "mxfp8"])
def test_fp8_blocks_to_another_scheme(tmp_path, scheme):
    """Dequantized and quantized again on the GPU: the bits of the CPU, dense and experts."""
    sizes = {"hidden_size": 384, "head_dim": 64, "num_key_value_heads": 4, "moe_intermediate_size": 128}
    models.save(models.tiny_qwen3_moe(**sizes), tmp_path / "bf16")
    fk.quantize_checkpoint(tmp_path / "bf16", tmp_path / "fp8", "per_block", "fp8")
    model = load(tmp_path / "fp8", "cuda", scheme)
    assert_same(model, load(tmp_path / "fp8", "cpu", scheme))
    assert_same(model, fk.load_model(tmp_path / "fp8", scheme, device="cuda")[0])


def test_smollm2_generates():
    """The real model still knows the capital of France."""
    folder = models.smollm2()
    model = load(folder, "cuda")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt").to("cuda")
    assert "Paris" in tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])


@pytest.mark.parametrize("scheme", ["per_channel", "per_tensor"])
def test_merged_experts_are_never_whole_in_high_precision(tmp_path, scheme):
    """Merged gate and up take 352 MiB in bf16. At most 128 MiB are allocated above the FP8 model, and 256 MiB taken
    from the driver, from the first byte that transformers claims to the end."""
    experts = {"num_experts": 32, "moe_intermediate_size": 1408, "hidden_size": 2048, "num_hidden_layers": 2}
    models.save(models.tiny_qwen3_moe(**experts), tmp_path, max_shard_size="10GB")
    load(tmp_path, "cuda", scheme)  # kernels load, the allocator wakes
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, peaks = torch.cuda.memory_allocated(), []
    idle = torch.cuda.memory_reserved() - before  # held from before, in segments that something else is in as well
    torch.cuda.reset_peak_memory_stats()
    reset = torch.cuda.reset_peak_memory_stats

    def note(device=None):
        peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
        reset(device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "reset_peak_memory_stats", note)
        model = load(tmp_path, "cuda", scheme)
    note()
    resident = torch.cuda.memory_allocated()
    allocated, reserved = map(max, zip(*peaks, strict=True))
    assert sum(t.nbytes for t in model.parameters()) <= resident - before
    assert allocated - resident <= 128 * MIB
    assert reserved - resident - idle <= 256 * MIB


@torch.no_grad()
def test_a_graph_holds_its_own_quantizations():
    """Layers that share their input and have just quantized it are captured nevertheless: replays see new input."""
    layers = [modules.Fp8Linear.from_linear(quantized_linear(576, n)).cuda() for n in (192, 64, 64)]
    x = torch.randn(16, 576, dtype=torch.bfloat16, device="cuda")
    for layer in layers:
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [layer(x) for layer in layers]
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(y, layer(x)) for y, layer in zip(results, layers, strict=True))


@pytest.mark.parametrize("tokens", [1, 64, 65, 1025])
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
@torch.no_grad()
def test_compiled_layers_agree_with_eager_ones(tokens, scheme):
    """Few tokens and many: within bf16's rounding and that of a last bit in a scale."""
    torch._dynamo.reset()
    layer = modules.Fp8Linear.from_linear(quantized_linear(576, 192, scheme)).cuda()
    x = torch.randn(tokens, 576, dtype=torch.bfloat16, device="cuda")
    assert relative_error(torch.compile(layer, fullgraph=True)(x), layer(x)) < 5e-3
