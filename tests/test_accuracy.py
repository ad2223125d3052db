"""bench.accuracy: its measures equal those worked out another way, and its bars are bars."""

import json

import pytest
import torch
import torch.nn.functional as F

from bench import accuracy
from fp8_kernels.modules import Fp8Linear

from . import models


def test_a_model_compared_with_itself_is_at_no_distance():
    """KL 0, every token the same, one perplexity: that of the cross entropy."""
    logits, tokens = torch.randn(600, 50), torch.randint(50, (600,))
    sums = accuracy.Sums()
    sums.add(logits, logits, tokens)
    row = sums.row("per_channel", "none")
    assert (row.kl, row.top1, row.top1_tied) == (0, 1, 1)
    assert row.ppl == row.ppl_original == pytest.approx(F.cross_entropy(logits[:-1], tokens[1:]).exp().item(), rel=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 256, 257, 513])  # around the number of rows compared at a time
def test_measures_equal_those_of_torch(num_tokens):
    """KL, top-1 and perplexity of two random models, against torch's own losses; targets cross the pieces."""
    original, fp8 = torch.randn(2, num_tokens, 50).bfloat16()
    tokens = torch.randint(50, (num_tokens,))
    sums = accuracy.Sums()
    sums.add(original, fp8, tokens)
    p, q = (x.double().log_softmax(-1) for x in (original, fp8))
    assert sums.tokens == num_tokens and sums.targets == num_tokens - 1
    assert sums.kl == pytest.approx(F.kl_div(q, p, log_target=True, reduction="sum").item(), rel=1e-5)
    assert sums.same == (original.argmax(-1) == fp8.argmax(-1)).sum()
    best = [set((row == row.max()).nonzero().flatten().tolist()) for row in original]
    assert sums.tied == sum(fp8[i].argmax().item() in best[i] for i in range(num_tokens)) >= sums.same
    for nll, logits in ((sums.nll_original, p), (sums.nll, q)):
        assert nll == pytest.approx(F.nll_loss(logits[:-1], tokens[1:], reduction="sum").item(), rel=1e-5)


def test_bars_are_missed_one_by_one():
    """A measure beyond its bar is named; activations have a bar of their own."""

    def misses(activation="none", kl=0.01, top1=0.95, ppl=10.0):
        return accuracy.Row("per_channel", activation, kl, top1, 1.0, 10.0, ppl).misses

    assert misses() == []
    assert misses(kl=0.031) == ["KL <= 0.03"] and misses("dynamic", kl=0.031) == []
    assert misses("dynamic", kl=0.061) == ["KL <= 0.06"]
    assert misses(top1=0.89) == ["top-1 >= 0.9"]
    assert misses(ppl=10.6) == misses(ppl=9.4) == ["ppl within 5%"]
    assert len(misses(kl=float("nan"), top1=float("nan"), ppl=float("nan"))) == 3


def test_the_text_is_cut_into_windows():
    """Tokens keep their order over windows and batches; too short a text or a broken window is an error."""

    def tokenizer(text, **_):
        return {"input_ids": torch.tensor([[ord(c) for c in text]])}

    batches = accuracy.windows_of(tokenizer, "abcdefghijklmno", 10, 2, "cpu")
    assert [["".join(map(chr, w)) for w in batch.tolist()] for batch in batches] == [["ab", "cd", "ef", "gh"], ["ij"]]
    with pytest.raises(ValueError, match="must have 9 tokens, got 8"):
        accuracy.windows_of(tokenizer, "abcdefgh", 9, 3, "cpu")
    with pytest.raises(ValueError, match="multiple of `--window`"):
        accuracy.windows_of(tokenizer, "abcdefgh", 8, 3, "cpu")


def test_activations_are_switched_on_and_off():
    """Each row is of the activations that it names."""
    seen = []

    class Watched(Fp8Linear):
        def forward(self, x):
            seen.append(self.activation)
            return x

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Watched(8, 8)

        def forward(self, tokens):
            self.inner(tokens)
            return type("Output", (), {"logits": F.one_hot(tokens, 16).float()})

    batches = list(torch.arange(10).reshape(2, 1, 5))
    original = accuracy.logits_of(Model(), batches)
    seen.clear()
    rows = accuracy.compare(original, Model(), batches, "x", ("none", "dynamic"))
    assert seen == [None, None, "dynamic", "dynamic"]
    assert [(row.activation, row.kl) for row in rows] == [("none", 0), ("dynamic", 0)]


def test_a_folder_is_measured_and_saved(tmp_path, capsys):
    """The command measures a folder (the real model, cut short), prints the row and saves what was measured where."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    folder = models.smollm2()
    short = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, num_hidden_layers=1)
    models.save(short, tmp_path / "short", max_shard_size="1GB")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "short")
    out = tmp_path / "a.json"
    args = ["--model", str(tmp_path / "short"), "--schemes", "per_channel", "--device", "cpu", "--json", str(out)]
    code = accuracy.main([*args, "--tokens", "192", "--window", "96"])
    saved = json.loads(out.read_text())
    weights_only, dynamic = saved["rows"]
    assert code == any(row["misses"] for row in saved["rows"])
    assert 0 < weights_only["kl"] < dynamic["kl"] < 0.5
    assert saved["tokens"] == 192 and saved["machine"]["torch"] == torch.__version__
    assert f"{weights_only['kl']:.4f}" in capsys.readouterr().out
