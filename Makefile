# make demo      the whole story on embedded digits, in eight minutes of one core
# make test      lint, import rules, unit tests, browser tests and every notebook, in about 12 minutes
# make test-all  the same, then slow tests, notebooks as they are, and make soak; an hour and a half
# make bench     ours beside the peers, on the same work in the same run
# make detection how well wrong labels are found, beside cleanlab; needs CIFAR-10N, see tests/bench/test_detection.py
# make starts    wrong labels found, by what describes the images; a quarter of an hour, see tests/bench/test_f1_by_start.py
# make recipes   recipes of self-supervision at equal minutes of a CPU's thread; needs CIFAR-10; two hours
# make scale     cost and memory at up to a million images, from shards to suspects; a quarter of an hour, 5 GB of disk
# make gpu       tests of CUDA, then pre-training at full size, how fast and how good; needs a GPU and CIFAR-10
# make table     the sweep of the digits, and its table and figures into figures/, in three quarters of an hour
# make soak      every kind of bad input through the whole audit, and twenty kills, in three quarters of an hour
# make lab       JupyterLab with the notebooks, for this machine and its token only
# make figures   the demo, and the pictures drawn from it into figures/
# make audit-dependencies  installed packages against the known vulnerabilities; needs a network
# Each makes .venv by itself and installs again only when pyproject.toml has changed.

PYTHON ?= python3
# JupyterLab is reached from this machine alone, with the token that it draws at each start.
LAB := --ip=127.0.0.1 --ServerApp.allow_remote_access=False --ServerApp.allow_origin='' --ServerApp.disable_check_xsrf=False
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo lint test test-all nbval-first nbval-second bench detection starts recipes scale gpu table soak lab figures audit-dependencies

help:
	@sed -n 's/^# //p' Makefile | head -15

.venv/installed: pyproject.toml
	@echo "==> making .venv and installing ptglab with its notebook and test packages (a few minutes, about 5.5 GB)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch .venv/installed

demo: .venv/installed
	@echo "==> running notebooks/00_quickstart.ipynb into runs/demo"
	$(BIN)/ptglab demo

lint: .venv/installed
	@echo "==> lint, and the direction of imports"
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

test: lint
	@echo "==> tests"
	$(BIN)/python -m pytest -n 2 --dist worksteal
	@echo "==> notebooks, the longest ones on smaller networks, in runs/nbval"
	$(call copied)
	$(call smaller,second,00_quickstart) -p noise_seeds 2 -p epochs 15 -p epochs_finetune 15
	$(call smaller,first,02_pretrain)
	$(call smaller,first,03_finetune) -r rates 0.6
	$(call smaller,first,04_label_errors)
	$(call smaller,first,11_downstream)
	$(MAKE) --no-print-directory -j2 nbval-first nbval-second

test-all: test
	@echo "==> slow tests: faults, kills, random inputs, clusters, peers"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not bench and not soak'
	@echo "==> notebooks exactly as they are, in runs/nbval"
	$(call copied)
	$(MAKE) --no-print-directory -j2 nbval-first nbval-second
	$(MAKE) --no-print-directory soak

# Two halves that take about as long. Notebooks 1 to 4 build on one another; the others stand alone.
copied = rm -rf runs/nbval && mkdir -p runs/nbval/first runs/nbval/second && \
    cp notebooks/0[1-4]_*.ipynb notebooks/1[12]_*.ipynb runs/nbval/first && \
    cp notebooks/0[05-9]_*.ipynb notebooks/10_*.ipynb runs/nbval/second

# A notebook with other parameters, not yet executed.
smaller = $(BIN)/papermill --prepare-only --log-level ERROR notebooks/$(2).ipynb runs/nbval/$(1)/$(2).ipynb -p width 8

nbval-first nbval-second: nbval-%: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval-lax runs/nbval/$*

bench: .venv/installed
	@echo "==> ours beside the peers, into runs/bench"
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest -m bench tests/bench/test_bench.py

detection: .venv/installed
	@echo "==> detectors beside cleanlab, into runs/detection"
	$(BIN)/python -m pytest -m bench tests/bench/test_detection.py

starts: .venv/installed
	@echo "==> wrong labels found, by what describes the images, into runs/starts"
	$(BIN)/python -m pytest -m bench tests/bench/test_f1_by_start.py tests/bench/test_first_suspects.py
	cp runs/starts/starts.csv figures/

recipes: .venv/installed
	@echo "==> recipes of self-supervision at equal minutes, into runs/recipes"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m bench tests/bench/test_recipes.py
	cp runs/recipes/ssl_recipes_cpu.csv runs/recipes/ssl_recipes_cpu.png figures/

scale: .venv/installed
	@echo "==> a million generated images, into runs/scale"
	$(BIN)/python -m pytest -m bench tests/bench/test_million.py

gpu: .venv/installed
	@echo "==> tests of CUDA, then pre-training at full size, into runs/gpu"
	$(BIN)/python -m pytest -m gpu tests/train/test_cuda.py
	$(BIN)/python -m pytest -m 'bench and gpu' tests/bench/test_gpu.py

table: .venv/installed
	$(BIN)/ptglab sweep digits --jobs 2
	$(BIN)/ptglab run 05_paper_table runs/digits/table.ipynb -p sweep= -p sweep_run=runs/digits -p run_dir=runs/digits/table
	for name in table_last accuracy_rate gain detection beyond memorisation; do \
	    cp runs/digits/table/figures/$$name.png figures/digits_$$name.png; \
	    cp runs/digits/table/figures/$$name.csv figures/digits_$$name.csv; done
	cp runs/digits/results.csv figures/digits_results.csv && cp runs/digits/table/cost.csv figures/digits_cost.csv
	cp runs/digits/table/parts.csv figures/digits_parts.csv

soak: .venv/installed
	@echo "==> every kind of bad input through the whole audit, and twenty kills"
	$(BIN)/python -m pytest -m soak

lab: .venv/installed
	@echo "==> opening JupyterLab; stop it with Ctrl-C"
	PTGLAB_DATA=$${PTGLAB_DATA:-$$(mkdir -p data && cd data && pwd)} $(BIN)/jupyter lab $(LAB) notebooks

# The list of vulnerabilities changes daily and lies on the network: there is no way to ask it offline.
audit-dependencies: .venv/installed
	@echo "==> installed packages against the known vulnerabilities"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --skip-editable --progress-spinner off

figures: demo
	@echo "==> copying the README's pictures, and what they were drawn from, to figures/"
	cp $(foreach name,accuracy detection umap suspects,runs/demo/figures/$(name).png runs/demo/figures/$(name).csv) figures/
