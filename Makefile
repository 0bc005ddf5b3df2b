# Every target sets up what it needs: a virtual environment in .venv with the pinned versions.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# torch's profiler, which measures memory, is to be silent
export KINETO_LOG_LEVEL := 99
# without what was tuned on this machine, so that launches take the plans of the table
export IMAGE_LOCAL_ATTENTION_CACHE := $(CURDIR)/build/cache

.PHONY: demo test lint hunt bench denoise-bench gpu-test gpu-hunt gpu-memcheck gpu-racecheck gpu-bench gpu-original gpu-peers gpu-options gpu-limits gpu-host gpu-first-call gpu-growth gpu-unfused clean

demo: $(READY)  ## denoise a photograph, compare with plain PyTorch
	$(RUN) -m benchmarks.demo

test: $(READY) lint  ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m "not gpu"

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

hunt: $(READY)  ## thousands of random problems
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --hypothesis-profile=hunt -m "hunt and not gpu"

bench: $(READY)  ## the CPU goals, against plain PyTorch and FlexAttention
	$(RUN) -m image_local_attention.cli bench --group cpu

denoise-bench: $(READY)  ## the photograph, against scikit-image
	$(RUN) -m benchmarks.denoise

# On a machine with a GPU, with the Python that has its torch: make gpu-test PYTHON=python3
gpu-test:
	PYTHONPATH=src $(PYTHON) -m pytest -m "gpu and not families"

# Ten thousand random problems; with pytest-xdist, -n 14 or so. ILA_FAMILIES_SEED draws others, ILA_FAMILIES more.
gpu-hunt:
	PYTHONPATH=src OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m families $(PYTEST_OPTIONS)

# Reads and writes past an allocation, of every kernel with every option and of every plan of the native ones; without
# torch's cache of allocations.
gpu-memcheck:
	PYTHONPATH=src PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PYTHON) -m tests.launch_options
	PYTHONPATH=src:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PYTHON) -m tests.launch_native

# What warps share in a block, of one plan of the native kernels of each kind.
gpu-racecheck:
	PYTHONPATH=src:tests compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m tests.launch_native kinds

# GPU names the file that the rows are for.
GPU ?= h200
gpu-bench:
	PYTHONPATH=src $(PYTHON) -m image_local_attention.cli bench --group design --impl ours --warm-up 16 --out benchmarks/results/$(GPU).json

# The original's grid, beside the unfold code.
gpu-original:
	PYTHONPATH=src $(PYTHON) -m image_local_attention.cli bench --group original --impl ours --impl unfold --warm-up 16 --out benchmarks/results/$(GPU).json

# Beside all that can be imported: minutes for a case, for FlexAttention compiles.
gpu-peers:
	PYTHONPATH=src $(PYTHON) -m image_local_attention.cli bench --group models --out benchmarks/results/$(GPU).json

gpu-options:  ## what each window option costs
	PYTHONPATH=src $(PYTHON) -m benchmarks.options --warm-up 16 --out benchmarks/results/options-$(GPU).json

# Figures with a limit, all of them or one.
gpu-limits: gpu-host gpu-first-call gpu-growth gpu-unfused

gpu-host:  ## what a small call costs the host
	PYTHONPATH=src $(PYTHON) -m benchmarks.host --warm-up 16 --out benchmarks/results/limits-$(GPU).json

gpu-first-call:  ## with nothing compiled, and with all of it
	PYTHONPATH=src $(PYTHON) -m benchmarks.first_call --out benchmarks/results/limits-$(GPU).json

gpu-growth:  ## time a pixel of large maps
	PYTHONPATH=src $(PYTHON) -m benchmarks.growth --warm-up 16 --out benchmarks/results/limits-$(GPU).json

gpu-unfused:  ## bytes a second of the unfused operators
	PYTHONPATH=src $(PYTHON) -m benchmarks.unfused --warm-up 16 --out benchmarks/results/limits-$(GPU).json

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo build
