"""How fast does a checkpoint become an FP8 model, beside the wire it crosses and beside other loaders?

    python -m bench.load [--models qwen llama] [--layers N] [--parts warm peers ...] [--budget SECONDS] [--save]

Writes checkpoints of real shapes with random weights, then, each part by itself:

    warm        loads from the page cache, scheme by scheme
    peers       the same files through other loaders, each where it can be imported
    cold        loads of files that are not in the page cache, beside a plain parallel read of them
    engine      an engine's own loop over `safe_open`, inside `LayerwiseLoader` and into plain bf16 parameters
    small       30,000 tensors of 64 KiB, likewise: of experts, and a weight each
    quantize    `quantize_checkpoint` on the device, from the page cache to the disk
    timeline    when one load copies, computes and keeps the host busy

A load's seconds are those until the last byte is in its place, on the device; building the model (on meta) is outside,
and stands beside. GB are 10^9 bytes of bf16. On a GPU, memory is what the load takes above what was there before it.
`--device cpu --layers 1 --scale-down 16` is a small one for any machine.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

import fp8_kernels as fk
from bench import checkpoints, engine, load_peers, timeline
from bench.checkpoints import GIB
from bench.files import HostMemory, drop_from_page_cache, make_durable, read_all, weight_files
from bench.load_tables import bars, table
from bench.measure import Budget, machine

RESULTS = Path(__file__).parent / "results"
SCHEMES = ("per_channel", "per_block", "per_tensor")
PARTS = ("warm", "peers", "cold", "engine", "small", "quantize", "timeline")
CHECKED = 6  # weights of a load that are compared with what their checkpoint holds
WIRE_BYTES = 512 << 20
DISK_LAYERS = 6  # of the model that is loaded cold, and converted: a disk's own speed needs no more


class Bench:
    """One run.

    Args:
        device: to load to.
        folder: for the checkpoints.
        threads: of plain reads and of writing checkpoints.
        repeats: of each of our own loads; the median counts.
        max_small: of the many small tensors.
    """

    def __init__(self, device: torch.device, folder: Path, threads: int, repeats: int, max_small: int):
        self.device, self.folder, self.threads = device, folder, threads
        self.repeats, self.max_small = repeats, max_small
        self.result: dict = {"loads": [], "reads": [], "loops": [], "quantize": [], "notes": []}

    def measured(self, run, before: int | None = None, **row) -> dict:
        """The row with seconds and memory of one load added.

        Args:
            run: returns the model, which is let go of.
            before: bytes of the device that were in use before anything of the model was there.
        """
        gc.collect()
        now = self._reset()
        before = now if before is None else before
        with HostMemory() as host:
            began = time.perf_counter()
            loaded = run()
            self._synchronize()
            row["seconds"] = time.perf_counter() - began
        row |= {"host_process": host.process, "host_machine": host.machine}
        if self.device.type == "cuda":
            row["resident"] = torch.cuda.memory_allocated() - before
            row["peak_allocated"] = torch.cuda.max_memory_allocated() - before
            row["peak_reserved"] = torch.cuda.max_memory_reserved() - before
        del loaded
        row["gb_per_s"] = row["bytes"] / row["seconds"] / 1e9
        print(_line(row), flush=True)
        return row

    def _reset(self):
        """Forget peaks; returns the bytes of the device that are in use."""
        if self.device.type != "cuda":
            return 0
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def wire(self):
        """GB/s of a copy from pinned memory, the best of several: what a load is measured against."""
        if self.device.type != "cuda":
            return
        source = torch.empty(WIRE_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(WIRE_BYTES, dtype=torch.uint8, device=self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        rates = []
        for _ in range(6):
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            rates.append(WIRE_BYTES / start.elapsed_time(end) / 1e6)
        self.result["wire_gb_per_s"] = max(rates)
        print(f"pinned memory to the device: {max(rates):.1f} GB/s", flush=True)

    def warm_up(self):
        """Kernels are loaded, and whatever else only a first load does."""
        model = checkpoints.llama_8b(1, 16)
        folder = checkpoints.write(model, self.folder / "warm_up", 2)
        for scheme in SCHEMES:
            fk.load_checkpoint(_on_meta(model), folder, scheme, device=self.device)
        shutil.rmtree(folder)

    def write(self, model: checkpoints.Model) -> Path:
        """The model's checkpoint."""
        began = time.perf_counter()
        folder = checkpoints.write(model, self.folder / model.name.replace(" ", "_"), self.threads)
        print(
            f"{model.name}: {model.num_bytes / GIB:.2f} GiB written in {time.perf_counter() - began:.1f} s", flush=True
        )
        return folder

    def ours(self, model, folder, scheme: str, cache: str, checked: bool = False) -> dict:
        """One load through `load_checkpoint`."""
        began = time.perf_counter()
        loaded = _on_meta(model)
        build_seconds = time.perf_counter() - began
        reports = []

        def run():
            reports.append(fk.load_checkpoint(loaded, folder, scheme, device=self.device))
            return loaded

        row = {"model": model.name, "system": "fp8_kernels", "scheme": scheme, "cache": cache}
        row = self.measured(run, **row, bytes=model.num_bytes, build_seconds=build_seconds)
        row["phases"] = reports[0].seconds_by_phase
        if checked:
            check(loaded, folder, scheme)
        return row

    def warm(self, model, folder):
        """Every scheme, and what plain reads get from the page cache."""
        seconds = min(read_all(weight_files(folder), self.threads) for _ in range(2))
        self.result["reads"].append({"model": model.name, "cache": "warm", "gb_per_s": model.num_bytes / seconds / 1e9})
        for scheme in SCHEMES:
            rows = [self.ours(model, folder, scheme, "warm", checked=i == 0) for i in range(self.repeats)]
            self.result["loads"].append(_median(rows))

    def peers(self, model, folder):
        for name, load in load_peers.PEERS.items():
            row = {"model": model.name, "system": name, "cache": "warm", "bytes": model.num_bytes}
            try:
                row = self.measured(lambda load=load: load(folder, self.device), **row)
            except load_peers.Absent as error:
                row["absent"] = str(error)
                print(f"{name}: not run, {error}", flush=True)
            self.result["loads"].append(row)

    def cold(self, model, folder):
        """Twice each, in turn: a disk's rate may change meanwhile."""
        files = weight_files(folder)
        gc.collect()  # what is mapped stays in the page cache
        make_durable(files)
        rows: list[dict] = []
        for _ in range(2):
            if drop_from_page_cache(files) < 0.9 * model.num_bytes:
                self._note(f"{folder.parent}: its files cannot be dropped from the page cache, so none is cold")
                return
            seconds = read_all(files, self.threads)
            self.result["reads"].append(
                {"model": model.name, "cache": "cold", "gb_per_s": model.num_bytes / seconds / 1e9}
            )
            print(f"{model.name}: plain cold read {model.num_bytes / seconds / 1e9:.2f} GB/s", flush=True)
            gc.collect()
            drop_from_page_cache(files)
            rows.append(self.ours(model, folder, "per_channel", "cold"))
        self.result["loads"].append(_median(rows))

    def engine(self, model, folder, schemes=("per_channel", "per_tensor")):
        """An engine's loop, unchanged, inside the loader and into plain parameters."""
        rows: dict = {}
        for _ in range(min(self.repeats, 2)):
            for scheme in (None, *schemes):
                row = {"model": model.name, "system": "engine's loop", "scheme": scheme or "bf16", "cache": "warm"}
                row |= {"bytes": model.num_bytes, "tensors": len(model.shapes)}
                before = self._reset()
                built = engine.build(model, self.device if scheme is None else "meta")
                load = functools.partial(self._run_engine, built, folder, scheme)
                rows.setdefault(scheme, []).append(self.measured(load, before, **row))
                del built, load
        self.result["loops"] += [_median(each) for each in rows.values()]

    def _run_engine(self, built, folder, scheme):
        if scheme is None:
            engine.load_model(built, folder)
        else:
            with fk.LayerwiseLoader(built, scheme, device=self.device):
                engine.load_model(built, folder)
        return built

    def small(self, make):
        model = make(self.max_small)
        folder = self.write(model)
        self.engine(model, folder, ("per_channel",))
        shutil.rmtree(folder)

    def quantize(self, model, folder):
        """Disk to disk, beside writing as many bytes as plainly as can be."""
        out = self.folder / "quantized"
        reports = []
        row = {"model": model.name, "system": "quantize_checkpoint", "scheme": "per_channel", "cache": "warm"}
        row = self.measured(
            lambda: reports.append(fk.quantize_checkpoint(folder, out, "per_channel", device=self.device)),
            **row,
            bytes=model.num_bytes,
        )
        row["bytes_out"], row["phases"] = reports[0].bytes_out, reports[0].seconds_by_phase
        shutil.rmtree(out)
        row["plain_write_seconds"] = _plain_write(self.folder / "plain", row["bytes_out"])
        print(f"plain write of {row['bytes_out'] / GIB:.2f} GiB: {row['plain_write_seconds']:.2f} s", flush=True)
        self.result["quantize"].append(row)

    def timeline(self, model, folder):
        loaded = _on_meta(model)
        found = timeline.record(lambda: fk.load_checkpoint(loaded, folder, "per_channel", device=self.device))
        self.result["timeline"] = {"model": model.name, "scheme": "per_channel", **found}

    def _note(self, text):
        print(text, flush=True)
        self.result["notes"].append(text)


def _on_meta(model):
    import transformers

    config = transformers.AutoConfig.for_model(**model.config)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return built.eval()


def check(loaded: torch.nn.Module, folder: Path, scheme: str):
    """Some weights of a load against their definition.

    Raises:
        AssertionError: one differs.
    """
    modules = {name: module for name, module in loaded.named_modules() if isinstance(module, fk.Fp8Linear)}
    wanted = list(modules)[:: max(len(modules) // CHECKED, 1)]
    for file in weight_files(folder):
        with safe_open(file, "pt") as f:
            for name in sorted(set(f.keys()) & {f"{each}.weight" for each in wanted}):
                module = modules[name.removesuffix(".weight")]
                w = f.get_tensor(name).to(module.weight.device)
                q, scale = fk.quantize(w, scheme, backend="reference")
                same = torch.equal(q.view(torch.uint8), module.weight.view(torch.uint8))
                assert same and torch.equal(scale, module.weight_scale), f"{name}: wrong codes or scales"


def _plain_write(path, num_bytes):
    block = memoryview(os.urandom(16 << 20))
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, num_bytes, len(block)):
            file.write(block[: min(len(block), num_bytes - start)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def _median(rows):
    """The row of the median time, with all times; of memory the most."""
    ordered = sorted(rows, key=lambda row: row["seconds"])
    row = dict(ordered[(len(rows) - 1) // 2])
    row["all_seconds"] = [round(each["seconds"], 4) for each in rows]
    row["seconds"] = statistics.median(each["seconds"] for each in rows)
    row["gb_per_s"] = row["bytes"] / row["seconds"] / 1e9
    for key in ("peak_allocated", "peak_reserved", "host_process", "host_machine"):
        if key in row:
            row[key] = max(each[key] for each in rows)
    return row


def _line(row):
    memory = ""
    if "resident" in row:
        memory = f", resident {row['resident'] / GIB:.2f} GiB"
        memory += f", above it {(row['peak_allocated'] - row['resident']) >> 20} MiB"
        memory += f" ({(row['peak_reserved'] - row['resident']) >> 20} reserved)"
    memory += f", host {row['host_process'] >> 20} / {row['host_machine'] >> 20} MiB"
    name = " ".join(str(row[key]) for key in ("model", "system", "scheme", "cache") if key in row)
    return f"{name}: {row['seconds']:.3f} s, {row['gb_per_s']:.2f} GB/s{memory}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(checkpoints.MODELS), default=list(checkpoints.MODELS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="of each model; by default all")
    parser.add_argument("--scale-down", type=int, default=1, help="divide every extent by this")
    parser.add_argument("--max-small", type=int, default=30_000, help="of the small tensors")
    parser.add_argument("--repeats", type=int, default=3, help="of each load of ours; of loops two at most")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 14), help="of plain reads")
    parser.add_argument(
        "--budget", type=float, help="seconds after which nothing more is begun; what matters least is last"
    )
    parser.add_argument("--folder", help="for the checkpoints; by default one for temporary files")
    parser.add_argument("--save", metavar="FOLDER", nargs="?", const=str(RESULTS), help="write the JSON there")
    return parser


def steps(bench: Bench, models: list[checkpoints.Model], disk: checkpoints.Model, parts: list[str], budget: Budget):
    """(what, function) of everything to be done, what matters most first; a model's files are there meanwhile."""
    for model in models:
        written = [part for part in ("warm", "peers") if part in parts]
        if model is models[0]:
            written += [part for part in ("engine", "timeline") if part in parts]
        if bench.device.type != "cuda" and "timeline" in written:
            written.remove("timeline")
        yield from _of_model(bench, model, written, budget)
        if model is models[0]:
            if "small" in parts:
                yield "small tensors of experts", functools.partial(bench.small, checkpoints.small_experts)
            yield from _of_model(bench, disk, [part for part in ("cold", "quantize") if part in parts], budget)
    if "small" in parts:
        yield "small weights", functools.partial(bench.small, checkpoints.small_weights)


def _of_model(bench, model, parts, budget):
    parts = [part for part in parts if budget.allows(f"{model.name}: {part}")]  # before its files are written
    folder = None
    for part in parts:
        if folder is None:
            folder = bench.write(model)
        yield f"{model.name}: {part}", functools.partial(getattr(bench, part), model, folder)
    if folder is not None:
        shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device, budget = torch.device(args.device), Budget(args.budget)
    options = {"scale_down": args.scale_down}
    disk = checkpoints.MODELS[args.models[-1]](min(args.layers or DISK_LAYERS, DISK_LAYERS), **options)
    disk.name += f", {disk.config['num_hidden_layers']} layers"
    options |= {"layers": args.layers} if args.layers else {}
    models = [checkpoints.MODELS[name](**options) for name in args.models]
    parent, note = checkpoints.place_for(int(1.5 * max(model.num_bytes for model in models)), args.folder)
    bench = Bench(device, parent, args.threads, args.repeats, args.max_small)
    if note:
        bench._note(note)
    bench.result |= {"machine": _machine(device), "layers": args.layers, "scale_down": args.scale_down}
    path = args.save and Path(args.save) / f"load_{bench.result['machine']['name'].lower().replace(' ', '-')}.json"
    try:
        bench.wire()
        bench.warm_up()
        for what, step in steps(bench, models, disk, args.parts, budget):
            if budget.allows(what):
                step()
                if path:  # also where the run is ended from outside
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(bench.result, indent=1) + "\n")
    finally:
        shutil.rmtree(parent, ignore_errors=True)
    print("", table(bench.result), "", *bars(bench.result), sep="\n")
    if budget.left_out:
        print(f"left out, {args.budget:g} s were over: {', '.join(budget.left_out)}")
    if path:
        print(f"written to {path}")
    return 0


def _machine(device):
    if device.type == "cuda":
        found = machine()
        return {"name": torch.cuda.get_device_name(), "cores": os.cpu_count(), **found}
    return {"name": "CPU", "cores": os.cpu_count(), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())
