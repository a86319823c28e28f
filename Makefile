# make demo | test | lab | lint | bench    each sets up .venv first when it is not there or the lock changed.
# TORCH=existing keeps the torch and torchvision of $(PYTHON); the choice is remembered in .venv. PYTHON=... picks another Python.

BIN := .venv/bin
STUDY ?= .
TORCH ?= $(shell cat .venv/torch 2>/dev/null || echo lock)
READY := .venv/ready-$(TORCH)
SUITABLE = import sys, importlib.util as u; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) \
  $(if $(filter existing,$(TORCH)),or u.find_spec("torch") is None))
PYTHON ?= $(shell for p in $$(cat .venv/python 2>/dev/null) python python3 python3.11 python3.12; do \
  case "$$(command -v $$p)" in ('$(CURDIR)'/.venv/*) continue;; esac; \
  $$p -c '$(SUITABLE)' 2>/dev/null && { command -v $$p; break; }; done)

# as in histokit.core.machine.KERNEL: threads wait passively, and memory is kept (a test of img2img: 16 s for 29)
export GOMP_SPINCOUNT ?= 1000
export KMP_BLOCKTIME ?= 0
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824
export MALLOC_TOP_PAD_ ?= 67108864

.PHONY: demo test lab lint bench lock setup
.DEFAULT_GOAL := demo

demo: setup  ## the whole story on invented tiles, about ten minutes
	$(BIN)/histokit run params/demo.yaml --yes

test: setup  ## everything that is checked, offline and on the CPU
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lab: setup  ## JupyterLab on the notebooks; STUDY=FOLDER for those of a study that `histokit new` made
	cd '$(STUDY)' && HISTOKIT_ROOT="$$PWD" '$(CURDIR)/$(BIN)/jupyter' lab $(if $(filter 0,$(shell id -u)),--allow-root) \
	  --LabApp.default_url=/lab/tree/notebooks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-id $(wildcard notebooks/*.ipynb)

bench: setup  ## measured speed: ratios of two things timed in one run
	$(BIN)/python -m pytest tests/benchmarks -s -o python_files='bench_*.py' --timeout=0

lock:  ## writes requirements.lock from what is installed in .venv
	{ head -n 1 requirements.lock; $(BIN)/pip freeze --exclude-editable --exclude histokit --exclude setuptools \
	  | sed -E '/^(nvidia-|cuda-|triton=)/s/$$/ ; sys_platform == "linux" and platform_machine == "x86_64"/'; } > .venv/lock
	mv .venv/lock requirements.lock

setup: $(READY)

.venv/ready-%: requirements.lock pyproject.toml
	@case '$*' in lock|existing) ;; *) echo "TORCH is 'lock' (default) or 'existing', got '$*'" >&2; exit 2;; esac
	@test -n '$(PYTHON)' || { echo "histokit needs Python 3.11 or 3.12$(if $(filter existing,$*), with torch installed); found none." \
	  "Name one with PYTHON=/path/to/python, or let conda bring it: conda env create -f environment.yml" >&2; exit 2; }
	@if test -e .venv/torch && test "$$(cat .venv/torch)" != '$*'; then echo "making .venv anew for TORCH=$*"; rm -rf .venv; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(if $(filter existing,$*),--system-site-packages) .venv \
	  || { rm -rf .venv; echo "could not make .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo '$*' > .venv/torch; echo '$(PYTHON)' > .venv/python
	@echo "installing into .venv, a few minutes the first time ..."
ifeq ($(TORCH),existing)
	@$(PYTHON) -c 'import torch, torchvision, os; print(os.path.dirname(os.path.dirname(torch.__file__)))' > .venv/found \
	  || { echo "TORCH=existing needs torch and torchvision in $(PYTHON)" >&2; exit 2; }
	@mv .venv/found "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/existing-torch.pth"
	@$(PYTHON) -c 'from importlib.metadata import version as v; [print(f"{n}=={v(n)}") for n in ("torch", "torchvision")]' > .venv/kept
	@grep -viE '^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' requirements.lock > .venv/lock
	$(BIN)/python -m pip install -q --disable-pip-version-check -r .venv/lock -c .venv/kept
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c .venv/kept
else
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
endif
	@$(BIN)/python -c 'from histokit.fidelity import likeness; likeness.compile_umap()' \
	  >/dev/null 2>.venv/umap.log || echo "UMAP could not be compiled now (.venv/umap.log says why); 07_evaluate will try again"
	@git rev-parse --git-dir >/dev/null 2>&1 && git config filter.nbstripout.clean '$(BIN)/nbstripout --keep-id' \
	  && git config filter.nbstripout.smudge cat || true
	@touch $@
