# restore [IMAGE=path] [OUT=path] [ARGS="..."] | gallery | test | lint | docs | mini TRAIN_DATA=folder | setup
# Each target does the set-up it needs, once: a .venv pinned by constraints.txt. `restore` installs what restoring takes,
# the others what developing takes.

PYTHON ?= python3
BIN := .venv/bin
RESTORING := .venv/.restoring
DEVELOPING := .venv/.developing
INSTALL = $(PYTHON) -m venv .venv && $(BIN)/pip install --disable-pip-version-check -c constraints.txt

IMAGE ?=
OUT ?= results
ARGS ?=
DEMO := results/demo/astronaut.png
# Through the environment, so that file names may hold spaces and quotes.
export IMAGE OUT
MINI_CONFIGS ?= configs/mini

.PHONY: setup restore gallery mini test lint docs

setup: $(DEVELOPING)

$(RESTORING): pyproject.toml constraints.txt
	$(INSTALL) -e ".[demo]"
	@touch $@

$(DEVELOPING): pyproject.toml constraints.txt
	$(INSTALL) -e ".[dev]"
	@touch $(RESTORING) $@

ifeq ($(strip $(IMAGE)),)
restore: $(DEMO)
	@echo "No IMAGE was given. The demo is scikit-image's portrait of Eileen Collins (NASA, public domain),"
	@echo "made small for it: 512x512 -> 128x128 by area averaging, then restored to 512x512."
	@$(BIN)/stablesr restore "$(DEMO)" -o "$$OUT" --compare $(ARGS)
else
restore: $(RESTORING)
	@$(BIN)/stablesr restore "$$IMAGE" -o "$$OUT" $(ARGS)
endif

$(DEMO): $(RESTORING)
	@mkdir -p $(@D)
	@$(BIN)/python -c "from PIL import Image; from skimage import data; \
		Image.fromarray(data.astronaut()).resize((128, 128), Image.Resampling.BOX).save('$@')"

# The README's picture: parts of scikit-image's pictures, a quarter of their size by area averaging, restored by mini.
GALLERY := astronaut chelsea coffee rocket
gallery: $(DEVELOPING)
	@mkdir -p results/gallery/truth
	@$(BIN)/python -c "from PIL import Image; from skimage import data; \
		[(picture.save(f'results/gallery/truth/{name}.png'), picture.reduce(4).save(f'results/gallery/{name}.png')) \
		for name in '$(GALLERY)'.split() for picture in [Image.fromarray(getattr(data, name)())]]"
	@$(BIN)/python -m benchmarks.sheet $(GALLERY:%=results/gallery/%.png) --truth results/gallery/truth --no-flat \
		-o docs/gallery.jpg

# Train the embedded model from the photographs in TRAIN_DATA; the same command goes on where it was interrupted.
mini: $(DEVELOPING)
	@$(BIN)/python training/run_stages.py --config $(MINI_CONFIGS)/stages.yaml $(ARGS)

# Two workers take whole files, so that what the tests of a file share is made once.
test: $(DEVELOPING)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(DEVELOPING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site of the documentation, in docs/_build/html; a warning is an error.
docs: $(DEVELOPING)
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"
