"""A Llama with random weights on a GPU, in bf16 and in FP8: prefill and decode. Run by `bench.engines`."""

from __future__ import annotations

import gc
import statistics
import time

import torch

PREFILL_BAR = 1.4
DENSE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
PROMPT, PREFILL, NEW_TOKENS = 128, 4096, 32


def random_llama(config: dict, device: torch.device):
    """A Llama on the device whose weights are random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**config)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device=device)
    for p in model.parameters():
        p.requires_grad_(False)
        p.normal_(std=0.02) if p.ndim > 1 else p.fill_(1)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def quantize_in_place(model, scheme: str):
    """Make FP8 of a model that is there in high precision, layer by layer."""
    import fp8_kernels as fk

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            q, scale = fk.quantize(module.weight.data, scheme)
            module.weight = torch.nn.Parameter(q, requires_grad=False)
            module.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    return fk.make_runnable(model)


@torch.no_grad()
def run(model, prefill: int) -> dict:
    """Milliseconds of a prefill, as it is and with layers compiled, and of a token, as it is and as a CUDA graph."""
    device = model.device
    tokens = torch.randint(0, model.config.vocab_size, (1, prefill), device=device)

    def whole():
        model(tokens, use_cache=False, logits_to_keep=1)

    def decode():
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        model.generate(tokens[:, :PROMPT], **options)

    result = {"prefill": _timed(whole, device), "token": _timed(decode, device, 3) / NEW_TOKENS}
    if device.type == "cuda":
        result["token, CUDA graph"] = _timed(_captured_step(model, tokens[:, :PROMPT]), device, 20)
    # Layer by layer: a whole model that is compiled builds an attention mask, where it need not else.
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    result["prefill, compiled"] = _timed(whole, device)
    for layer in model.model.layers:
        layer._compiled_call_impl = None
    return {name: round(ms, 3) for name, ms in result.items()}


def _captured_step(model, prompt):
    """A call that decodes one token after the prompt, always the same one, as a graph."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=2 * prompt.shape[1])
    model(prompt, past_key_values=cache, use_cache=True)
    token, position = prompt[:, :1].clone(), torch.full((1, 1), prompt.shape[1], device=prompt.device)

    def step():
        model(token, past_key_values=cache, position_ids=position, use_cache=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _timed(call, device, rounds=8):
    times = []
    for i in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def run_both(config: dict, device: torch.device, scheme: str, prefill: int) -> dict:
    """The same model in bf16 and in FP8."""
    model = random_llama(config, device)
    found = {"bf16": run(model, prefill)}
    quantize_in_place(model, scheme)
    gc.collect()
    found["fp8"] = run(model, prefill)
    return found


def run_table(found: dict) -> list[str]:
    lines = ["| milliseconds | bf16 | FP8 | bf16 / FP8 |", "| --- | ---: | ---: | ---: |"]
    for name, ms in found["bf16"].items():
        lines.append(f"| {name} | {ms:.2f} | {found['fp8'][name]:.2f} | {ms / found['fp8'][name]:.2f} |")
    return lines


def run_bars(found: dict) -> list[str]:
    """What was asked, for each way to run a prefill."""
    lines = []
    for name in found["bf16"]:
        if name.startswith("prefill"):
            ratio = found["bf16"][name] / found["fp8"][name]
            verdict = "met" if ratio >= PREFILL_BAR else "MISSED"
            lines.append(f"{name}: {ratio:.2f} of bf16's speed, bar {PREFILL_BAR}: {verdict}")
    return lines
