# make sample: icons without guidance, with self-attention guidance, with a classifier, with both, and with autoguidance
# make test:   all tests
# make test-elsewhere: the tests of numbers once more, computed as other processors do
# make lint:   style and types
# make docs:   the documentation as a site, in build/site
# Each sets up its own environment in .venv first.

PYTHON ?= python3
EXTRAS ?= dev
NUM_SAMPLES ?= 20
OUT ?= samples
# Tests at a time: each computes on one thread.
WORKERS ?= 2
SETTINGS = unguided sag cg sag_cg autoguidance

# What computes with networks or on features: its rounding depends on the processor and on the number of threads.
NUMERICAL = tests/guided_diffusion/guidance tests/guided_diffusion/depth tests/guided_diffusion/runs/test_sample.py \
	$(addprefix tests/guided_diffusion/test_,$(addsuffix .py,attention gaussian_diffusion golden_chains losses nn sampling \
	unet winograd)) tests/evaluations/attention tests/evaluations/extractors tests/evaluations/metrics

.PHONY: sample test test-elsewhere lint docs

# The same images under each setting, of 32x32 pixels in $(OUT)/32, upsampled to 64x64.
sample: .venv/ready
	for setting in $(SETTINGS); do \
		.venv/bin/python scripts/image_sample.py --config configs/icons32_$$setting.yaml --num_samples $(NUM_SAMPLES) \
			--overwrite True --out $(OUT)/32/$$setting || exit $$?; \
		.venv/bin/python scripts/super_res_sample.py --model icons64_upsampler --base_samples $(OUT)/32/$$setting \
			--sampling_steps 10 --batch_size 10 --overwrite True --out $(OUT)/$$setting || exit $$?; \
	done
	.venv/bin/python scripts/compare.py $(SETTINGS:%=$(OUT)/%) --out $(OUT)/comparison.png

# Bytecode is kept, whatever the environment says: hundreds of processes would compile each file anew.
test: .venv/ready
	PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile

# The instructions of 2008, for PyTorch and for the linear algebra of it and of NumPy; one thread; nothing slow.
test-elsewhere: .venv/ready
	PYTHONDONTWRITEBYTECODE= ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE \
		OPENBLAS_CORETYPE=Nehalem OMP_NUM_THREADS=1 GOLDEN_CASES=tests/golden \
		.venv/bin/python -m pytest -n $(WORKERS) -m "not slow" $(NUMERICAL)

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/mypy

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "documentation: build/site/index.html"

.venv/docs: .venv/ready
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv/ready: setup.py pyproject.toml constraints.txt
	@echo "Setting up .venv, once. The extra dev downloads about 340 MB with a CPU build of torch (1.4 GB on disk);"
	@echo "a CUDA build of torch brings several GB instead, and the extra tf-cpu 300 MB more. Extras: $(EXTRAS)."
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
