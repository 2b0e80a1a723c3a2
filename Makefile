# Two commands do everything on a machine with Python >= 3.10 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := runs/digits

.PHONY: demo test test-all test-slow test-browser docs families check format benchmark clean

# The main job on embedded data: anchors in, one checkpoint with every stitch trained and measured out.
demo: $(INSTALLED)
	@test ! -e $(RUN) -a ! -e $(RUN)-run || { echo "$(RUN) or $(RUN)-run exists: remove them, or choose another folder with make demo RUN=FOLDER"; exit 1; }
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		training/train.py --recipe training/recipes/digits.yaml output=$(RUN)

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Also what is longer than a few seconds: every module of timm, and a training run.
test-all: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not gpu and not network and not browser"

test-slow: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

test-browser: $(INSTALLED)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ echo "this needs chromium and chromedriver; on Debian: apt-get install chromium chromium-driver"; exit 1; }
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, in the folder site/; anything that does not fit is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The table of docs/families.md, which is the end of that page.
families: $(INSTALLED)
	{ sed '/^| module /,$$d' docs/families.md; $(BIN)/stitchable families --markdown; } > docs/families.new
	mv docs/families.new docs/families.md

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/least_squares.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/partial_loading.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/any_two.py
	$(BIN)/python benchmarks/command_line.py
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/cascade_search.py

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade --quiet pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
