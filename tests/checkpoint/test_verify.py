"""A sound folder has no problems; each kind of damage has one that names the tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8_kernels.checkpoint import quantize_checkpoint, verify_checkpoint
from fp8_kernels.schemes import PerBlock, PerChannel, PerTensor

from . import tiny

WEIGHT = "model.layers.0.mlp.down_proj.weight"
FORMATS = [("per_channel", "compressed-tensors"), ("per_tensor", "compressed-tensors"), ("per_block", "fp8")]


@pytest.fixture
def folders(tmp_path):
    """(source, FP8 folder) in one file each."""
    state = tiny.tensors(num_layers=1)
    src = tiny.write_single(tmp_path / "in", state)
    quantize_checkpoint(src, tmp_path / "out")
    return src, tmp_path / "out"


def edit(folder, change):
    """Change the tensors of a one-file checkpoint."""
    path = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("scheme,format", FORMATS)
@pytest.mark.parametrize("write", [tiny.write_single, tiny.write_sharded])
def test_what_was_written_is_sound(scheme, format, write, tmp_path):
    """Alone and against its source, which it counts right."""
    state = tiny.tensors()
    quantize_checkpoint(write(tmp_path / "in", state), tmp_path / "out", scheme, format)
    for against in (None, tmp_path / "in"):
        report = verify_checkpoint(tmp_path / "out", against)
        assert report.ok and report.problems == ()
        assert report.num_quantized == len(tiny.weights(state))
        assert report.num_tensors == len(state) + report.num_quantized
        assert json.loads(json.dumps(report.as_dict()))["ok"]


@pytest.mark.parametrize("rounding", [{"pow2": True}, {"scale_dtype": torch.bfloat16},
                                      {"pow2": True, "scale_dtype": torch.float8_e8m0fnu}])  # fmt: skip
@pytest.mark.parametrize("scheme", [PerTensor, PerChannel, PerBlock])
def test_rounded_scales_are_recognised(scheme, rounding, tmp_path):
    """A fresh quantization rounds its scales as the folder's were; all-zero weights do not confuse it."""
    state = tiny.tensors(num_layers=1)
    state["model.layers.0.self_attn.o_proj.weight"].zero_()
    src = tiny.write_single(tmp_path / "in", state)
    quantize_checkpoint(src, tmp_path / "out", scheme(**rounding))
    assert verify_checkpoint(tmp_path / "out", src).problems == ()


def test_a_changed_code_is_found(folders):
    """One bit in one code; only a comparison with the source can see it."""
    src, out = folders

    def flip(state):
        state[WEIGHT].view(torch.uint8)[1, 2] ^= 1

    edit(out, flip)
    assert verify_checkpoint(out).ok
    assert verify_checkpoint(out, src).problems == (
        f"`{WEIGHT}`: 1 of {128 * 256} codes differ from a fresh quantization",
    )


def test_changed_scales_and_copies_are_found(folders):
    """One scale and one norm value."""
    src, out = folders

    def change(state):
        state[f"{WEIGHT}_scale"][3] *= 2
        state["model.norm.weight"][0] += 1

    edit(out, change)
    assert set(verify_checkpoint(out, src).problems) == {
        f"`{WEIGHT}_scale` differs from a fresh quantization",
        "`model.norm.weight` differs from its source",
    }


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scales_are_found(value, folders):
    """Zero, negative, NaN and Inf."""

    def change(state):
        state[f"{WEIGHT}_scale"][5] = value

    edit(folders[1], change)
    expected = (f"`{WEIGHT}_scale` holds 1 scales that are not finite and positive",)
    assert verify_checkpoint(folders[1]).problems == expected


def test_nan_codes_are_found(folders):
    """0x7f and 0xff."""

    def change(state):
        state[WEIGHT].view(torch.uint8)[0, :2] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)

    edit(folders[1], change)
    assert verify_checkpoint(folders[1]).problems == (f"`{WEIGHT}` holds 2 NaN",)


DAMAGE = {
    "missing scales": (
        lambda state: state.pop(f"{WEIGHT}_scale"),
        f"`{WEIGHT}` is FP8, but `{WEIGHT}_scale` is missing",
    ),
    "orphan scales": (
        lambda state: state.update({"model.norm.weight_scale": torch.ones(1)}),
        "`model.norm.weight_scale` are scales without an FP8 weight",
    ),
    "scales of another shape": (
        lambda state: state.update({f"{WEIGHT}_scale": torch.ones(128)}),
        f"`{WEIGHT}_scale` must be float32 [128, 1], got float32 [128]",
    ),
    "scales of another dtype": (
        lambda state: state.update({f"{WEIGHT}_scale": torch.ones(128, 1).bfloat16()}),
        f"`{WEIGHT}_scale` must be float32 [128, 1], got bfloat16 [128, 1]",
    ),
    "a weight left in bf16": (
        lambda state: state.update({WEIGHT: state[WEIGHT].bfloat16()}),
        f"`{WEIGHT}` is not FP8, but the config does not keep `{WEIGHT[:-7]}` in high precision",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_inconsistent_tensors_are_found(damage, folders):
    """What headers and config say of each other."""
    change, problem = DAMAGE[damage]
    edit(folders[1], change)
    assert problem in verify_checkpoint(folders[1]).problems


def test_inconsistent_configs_are_found(folders):
    """A kept module that is FP8, a head that is not kept, another strategy, another format, none."""
    _, out = folders
    sound = (out / "config.json").read_text()

    def problems(change):
        (out / "config.json").write_text(sound)
        edit_config(out, change)
        return verify_checkpoint(out).problems

    module = WEIGHT.removesuffix(".weight")
    kept = problems(lambda config: config["ignore"].append(module))
    assert kept == (f"`{WEIGHT}` is FP8, but the config keeps `{module}` in high precision",)
    for change in ({"strategy": "tensor"}, {"strategy": "block"}, {"num_bits": 4}):
        found = problems(lambda config, change=change: config["config_groups"]["group_0"]["weights"].update(change))
        assert len([problem for problem in found if WEIGHT in problem]) == 1
    assert (
        "must be one of ['compressed-tensors', 'fp8'], got 'gptq'"
        in problems(lambda config: config.update({"quant_method": "gptq"}))[0]
    )
    for change in (
        {"quant_method": ["fp8"]},
        {"config_groups": None},
        {"config_groups": {"group_0": 1}},
        {"config_groups": {"group_0": {"targets": ["re:("]}}},
        {"ignore": [1]},
    ):
        (problem,) = problems(lambda config, change=change: config.update(change))
        assert "must be one of" in problem or "`quantization_config` of config.json is malformed" in problem
    (out / "config.json").write_text("{}")
    assert verify_checkpoint(out).problems == (f"{out}: config.json holds no `quantization_config`",)


def test_broken_files_are_problems(folders):
    """The reader's errors are the report's, so that a script sees one kind of answer."""
    src, out = folders
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:-1])
    report = verify_checkpoint(out, src)
    assert not report.ok and "model.safetensors is not a whole safetensors file" in report.problems[0]
    assert report.problems[0] in str(report)


def test_another_source_is_noticed(folders, tmp_path):
    """A missing tensor, an extra one, another shape."""
    _, out = folders
    state = tiny.tensors(num_layers=1)
    del state["model.norm.weight"]
    state["extra.weight"] = torch.ones(3)
    state["lm_head.weight"] = torch.ones(65, 128).bfloat16()
    other = tiny.write_single(tmp_path / "other", state)
    problems = verify_checkpoint(out, other).problems
    assert f"`model.norm.weight` is not in {other}" in problems
    assert f"`extra.weight` is in {other}, but not here" in problems
    assert "`lm_head.weight` must have the shape of its source, [65, 128], got [64, 128]" in problems
    assert any(problem.startswith(f"`{WEIGHT}`: ") for problem in problems)


def test_an_fp8_folder_is_no_source(folders):
    """There is nothing to quantize afresh; said of each weight."""
    _, out = folders
    problems = verify_checkpoint(out, out).problems
    assert f"`{WEIGHT}` is FP8, but float8_e4m3fn in {out}, so there is nothing to compare it with" in problems
