# make demo      the whole story on embedded digits, in a few minutes
# make test      every test
# make bench     ours beside the peers, on the same work in the same run
# make detection how well wrong labels are found, beside cleanlab; needs CIFAR-10N, see tests/bench/test_detection.py
# make soak      every kind of bad input through the whole audit, in half an hour
# make lab       JupyterLab with the notebooks
# make figures   the demo, and the README's pictures and figures from it
# Each makes .venv by itself and installs again only when pyproject.toml has changed.

PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test bench detection soak lab figures

help:
	@sed -n 's/^# //p' Makefile | head -8

.venv/installed: pyproject.toml
	@echo "==> making .venv and installing ptglab with its notebook and test packages (a few minutes, about 5.5 GB)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch .venv/installed

demo: .venv/installed
	@echo "==> running notebooks/00_quickstart.ipynb into runs/demo"
	$(BIN)/ptglab demo

test: .venv/installed
	@echo "==> lint"
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo "==> tests"
	$(BIN)/python -m pytest
	@echo "==> notebooks 1 to 4 and 6, run as they are, in runs/nbval"
	rm -rf runs/nbval && mkdir -p runs/nbval && cp notebooks/0[1-46]_*.ipynb runs/nbval
	$(BIN)/python -m pytest --nbval-lax runs/nbval

bench: .venv/installed
	@echo "==> ours beside the peers, into runs/bench"
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest -m bench --benchmark-columns=min,median,max tests/bench/test_bench.py

detection: .venv/installed
	@echo "==> detectors beside cleanlab, into runs/detection"
	$(BIN)/python -m pytest -m bench tests/bench/test_detection.py

soak: .venv/installed
	@echo "==> every kind of bad input through the whole audit"
	$(BIN)/python -m pytest -m soak

lab: .venv/installed
	@echo "==> opening JupyterLab; stop it with Ctrl-C"
	PTGLAB_DATA=$${PTGLAB_DATA:-$$(mkdir -p data && cd data && pwd)} $(BIN)/jupyter lab notebooks

figures: demo
	@echo "==> copying the README's pictures, and what they were drawn from, to figures/"
	cp $(foreach name,accuracy detection umap suspects,runs/demo/figures/$(name).png runs/demo/figures/$(name).csv) figures/
