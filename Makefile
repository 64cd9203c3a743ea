# make demo   environment, install, merge the shipped checkpoints, bench, report
# make test   environment, install with the test extra, ruff, mypy, the whole test suite
# make site   the pages of docs/ as a site in build/site, without a warning
# Everything is made in .venv and made again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= demo
JOBS   ?= 2
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test lint site clean
.DELETE_ON_ERROR:

# The small model's operators are too short for two threads: one is faster, and a busy neighbour costs less.
demo: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/danceopd merge --output $(DEMO)/student
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/danceopd bench $(DEMO)/student --suite scenes \
		--against base,generation,editing,blend --limit 96 -o $(DEMO)/bench
	@printf '\n%s\n\n%s\n\n    %s\n    %s\n    %s\n' "Report: $(DEMO)/bench/report.html" \
		"The student is an ordinary diffusers adapter ($(BIN)/python):" \
		"from diffusers import DiffusionPipeline" \
		"pipe = DiffusionPipeline.from_pretrained(\"$$($(BIN)/python -c 'from danceopd.common.shipped import shipped; print(shipped("base"))')\")" \
		"pipe.load_lora_weights(\"$(DEMO)/student\")"

test: lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MKL_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

site: | $(VENV)/bin/python
	$(PIP) 'mkdocs>=1.6'
	$(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than Python 3.10; give another with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
