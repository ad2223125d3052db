"""New weights into a serving FP8 model, as reinforcement learning sends them, at the same addresses.

What to copy: `update`, a `LayerwiseLoader` with `reload=` around the call that loads your weights. It takes them in the
checkpoint's layout and precision, in buckets that the sender reuses. CUDA graphs and pointers stay good, since no
tensor moves; if the update fails in the middle, the old weights go on serving.
"""

import torch
from torch import nn

import fp8_kernels as fk

HIDDEN, INTERMEDIATE = 256, 512
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build():
    return nn.Sequential(
        nn.Linear(HIDDEN, INTERMEDIATE), nn.SiLU(), nn.Linear(INTERMEDIATE, HIDDEN), nn.LayerNorm(HIDDEN)
    ).bfloat16()


def load_weights(model, weights):
    params = dict(model.named_parameters())
    for name, loaded_weight in weights:
        params[name].data.copy_(loaded_weight)


def update(model, weights, scope=None):
    with fk.LayerwiseLoader(model, reload="transactional", scope=scope) as loader:
        load_weights(model, weights)
    return loader.report


def through_a_bucket(state):
    """A trainer's sender: every tensor comes in the same buffer."""
    bucket = torch.empty(max(t.numel() for t in state.values()), dtype=torch.bfloat16, device=DEVICE)
    for name, tensor in state.items():
        yield name, bucket[: tensor.numel()].view(tensor.shape).copy_(tensor)
        bucket.fill_(float("nan"))


if __name__ == "__main__":
    torch.manual_seed(0)
    trainer = build()
    with torch.device("meta"):
        model = build()
    fk.load_checkpoint(model, trainer.state_dict().items(), "per_channel", device=DEVICE)
    x = torch.randn(4, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    pointers = [p.data_ptr() for p in model.parameters()]
    for step in range(3):
        with torch.no_grad():
            for p in trainer.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
        report = update(model, through_a_bucket(trainer.state_dict()))
        q, scale = fk.quantize(trainer[0].weight.data.to(DEVICE), "per_channel")
        assert torch.equal(model[0].weight.view(torch.uint8), q.view(torch.uint8))
        assert torch.equal(model[0].weight_scale, scale)
        assert pointers == [p.data_ptr() for p in model.parameters()]
        print(f"step {step}: {report.quantized_tensors} weights in {report.seconds * 1e3:.1f} ms, no address changed")
    with torch.no_grad():
        before = model(x)
        try:
            update(model, [("0.weight", torch.zeros(INTERMEDIATE, HIDDEN))])
        except fk.LoadError as error:
            print(f"refused: {error}")
        assert torch.equal(model(x), before)
    update(model, [("3.weight", torch.ones(HIDDEN))], scope=["3.weight"])
    print("a failed update changed nothing; a part was updated by name")
