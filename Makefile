# make demo: the main job. make test: lint, types, all tests. Each makes its own environment first, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# uv does not read pip's configuration: hand it the folders where pip is told to look for wheels (torch's CPU build).
FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
# Without such a folder, uv takes torch's CPU build from PyTorch's own index.
TORCH ?= $(if $(wildcard $(addsuffix /torch-*+cpu*,$(FIND_LINKS))),,--torch-backend cpu)
UV = UV_FIND_LINKS="$(FIND_LINKS)" $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps

export OMP_WAIT_POLICY = PASSIVE
# every vLLM process would compile torch, vLLM and transformers again, for 10 s
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types env study targets methods large speed speed-trl clean

# make demo TARGET=fp8-dynamic: for a CPU without AVX-512, which has no kernel for the demo's own target; the curve
# beside the demo's is INT4's, and left out then
demo: env
	$(BIN)/boresight run configs/demo-int4.toml $(if $(TARGET),--set quant.target=$(TARGET) --set signoff.baseline_arm=null)

# mixtures of experts in a process of their own: vLLM cannot start one where the first engine was dense
test: lint types
	$(BIN)/python -m pytest -m mixture
	$(BIN)/python -m pytest -m "not mixture" -n 2 --dist loadfile --no-loadscope-reorder

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/pyrefly check

study: env
	$(BIN)/python -m benchmarks.study

targets: env
	$(BIN)/python -m benchmarks.targets

methods: env
	$(BIN)/python -m benchmarks.methods

large: env
	$(BIN)/python -m benchmarks.large

speed: env
	$(BIN)/python -m benchmarks.speed

speed-trl: env
	$(UV) trl==1.16.0
	$(BIN)/python -m benchmarks.speed --against-trl

env: $(VENV)/.ready

$(VENV)/.ready: requirements/cpu.txt requirements/vllm-name/pyproject.toml pyproject.toml
	@echo "making the environment in $(VENV) (once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv==0.13.8
	$(UV) $(TORCH) -r requirements/cpu.txt
	$(UV) --no-build-isolation ./requirements/vllm-name --editable .
	@touch $@

clean:
	rm -rf $(VENV) runs
