# make sample: images without guidance, with self-attention guidance, with a classifier, and with both
# make test:   all tests
# make lint:   style and types
# make docs:   the documentation as a site, in build/site
# Each sets up its own environment in .venv first.

PYTHON ?= python3
EXTRAS ?= dev
NUM_SAMPLES ?= 40
OUT ?= samples
SETTINGS = unguided sag cg sag_cg

.PHONY: sample test lint docs

sample: .venv/ready
	for setting in $(SETTINGS); do \
		.venv/bin/python scripts/classifier_sample.py --config configs/fmnist32_$$setting.yaml \
			--num_samples $(NUM_SAMPLES) --labels balanced --overwrite True --out $(OUT)/$$setting || exit $$?; \
	done
	.venv/bin/python scripts/compare.py $(SETTINGS:%=$(OUT)/%) --out $(OUT)/comparison.png

test: .venv/ready
	.venv/bin/python -m pytest

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
