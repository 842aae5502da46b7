# setup | restore [IMAGE=path] [OUT=path] [ARGS="..."] | mini TRAIN_DATA=folder | test | lint
# Each target does all the set-up it needs: a .venv pinned by constraints.txt, built once (about 3 GB with CUDA's libraries).

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

IMAGE ?=
OUT ?= results
ARGS ?=
DEMO := results/demo/astronaut.png
# Through the environment, so that file names may hold spaces and quotes.
export IMAGE OUT
MINI_CONFIGS ?= configs/mini

.PHONY: setup restore mini test lint

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

ifeq ($(strip $(IMAGE)),)
restore: $(DEMO)
	@echo "No IMAGE was given. The demo is scikit-image's portrait of Eileen Collins (NASA, public domain),"
	@echo "made small for it: 512x512 -> 128x128 by area averaging, then restored to 512x512."
	@$(BIN)/stablesr restore "$(DEMO)" -o "$$OUT" --compare $(ARGS)
else
restore: $(STAMP)
	@$(BIN)/stablesr restore "$$IMAGE" -o "$$OUT" $(ARGS)
endif

$(DEMO): $(STAMP)
	@mkdir -p $(@D)
	@$(BIN)/python -c "from PIL import Image; from skimage import data; \
		Image.fromarray(data.astronaut()).resize((128, 128), Image.Resampling.BOX).save('$@')"

# Train the embedded model from the photographs in TRAIN_DATA; the same command goes on where it was interrupted.
mini: $(STAMP)
	@$(BIN)/python training/run_stages.py --config $(MINI_CONFIGS)/stages.yaml $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
