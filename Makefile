# make              set up, then the whole recipe: world, pretraining, SFT, reward model, PPO, report
# make test         set up, then style and tests
# make docs         figures and pictures of out/report.json into docs/
# make docs-check   the documents' links, commands and figures, in under a minute
# make experiments  every claim with its control on three seeds; goes on where it was interrupted
# make score        the default run over SEEDS="0 1 2", and its score: out/score/score.md
# make frontier     the same comparisons used in other ways, from the same runs: out/frontier
# make kl           PPO with every weight of the KL penalty, from the same runs: out/kl
# make bench        speed against what users would pick instead: out/bench.md; BENCH=--help
# make gpu          what a GPU makes of it, in at most 8 minutes: docs/gpu.md
# make test-faults  set up, then what takes longer: kills and damaged files (FUZZ_SECONDS=300)
# make mutants      plants small bugs for 40 minutes; those that no test notices: out/mutants.txt
# make clean        remove out/; the virtual environment stays
# make CHECK=--check   the same as make, and fails where a figure of the report misses its limit
# A stage reruns only when its input, its script or a file that it imports has changed.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

# What the scripts import (tests/test_layout.py holds these lists against the imports).
UTILS := utils/cli.py utils/files.py
WORLD := world/generate.py world/facts.py data/tokenizer.py $(UTILS)
LOAD := model.py train/checkpoint.py train/device.py train/parallel.py $(UTILS) \
	data/tokenizer.py data/conversation.py data/examples.py
TRAIN := train/batches.py train/loop.py train/optim.py train/show.py $(LOAD)
GRADE := world/grade.py world/facts.py

# Threads that wait spin briefly, then sleep. Where a core is busy with something else, ten times
# as long costs four times the time, and the default forty times; on free cores generation is a
# sixth slower, training as fast.
export GOMP_SPINCOUNT ?= 1000
# glibc gives large freed blocks back and faults them in again within each step: a sixth of
# pretraining's time. So let it keep them.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 2147483648

.PHONY: all test docs docs-check test-faults experiments score frontier kl bench gpu mutants clean
.DELETE_ON_ERROR:
all: out/report.md

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-test: requirements-test.txt $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

# A file of the world keeps its time where its content stays the same: an edit of SFT's wordings
# does not retrain the base model.
out/world/made: $(WORLD) | $(VENV)/ready
	$(RUN) -m world.generate
	touch $@

out/world/train.bin out/world/sft.jsonl out/world/prompts.jsonl out/world/people.jsonl: \
		out/world/made
	@test -e $@ || $(RUN) -m world.generate

out/base.pt: out/world/train.bin pretrain.py $(TRAIN) | $(VENV)/ready
	$(RUN) pretrain.py

out/sft.pt: out/base.pt out/world/sft.jsonl sft.py $(TRAIN) | $(VENV)/ready
	$(RUN) sft.py

out/world/preferences.jsonl: out/sft.pt out/world/prompts.jsonl out/world/people.jsonl \
		world/label.py $(GRADE) $(LOAD) | $(VENV)/ready
	$(RUN) -m world.label

out/reward.pt: out/world/preferences.jsonl out/sft.pt reward.py $(TRAIN) | $(VENV)/ready
	$(RUN) reward.py

out/ppo.pt: out/reward.pt out/sft.pt out/world/prompts.jsonl ppo.py reward.py \
		train/reward_function.py $(TRAIN) | $(VENV)/ready
	$(RUN) ppo.py

out/report.md: out/ppo.pt out/reward.pt out/sft.pt out/base.pt out/world/people.jsonl \
		lab/report.py lab/measure.py lab/plots.py world/generate.py $(GRADE) train/batches.py $(LOAD) \
		| $(VENV)/ready
	$(RUN) -m lab.report $(CHECK)

test: $(VENV)/ready-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(RUN) -m pytest -q tests

docs: out/report.md
	$(RUN) -m lab.docs

docs-check: $(VENV)/ready-test
	$(RUN) -m pytest -q tests/test_docs.py tests/test_lessons.py

test-faults: $(VENV)/ready-test
	$(RUN) -m pytest -q -m faults tests

$(VENV)/ready-mutants: $(VENV)/ready-test
	$(RUN) -m pip install --quiet --disable-pip-version-check cosmic-ray==8.7.0 coverage==7.17.4
	touch $@

mutants: $(VENV)/ready-mutants
	$(RUN) tests/mutants.py

experiments: | $(VENV)/ready
	$(RUN) -m lab.experiments

SEEDS ?= 0 1 2
score: | $(VENV)/ready
	$(RUN) -m lab.score --seeds "$(SEEDS)"

frontier kl: | $(VENV)/ready
	$(RUN) -m lab.$@ --seeds "$(SEEDS)"

# Rows that need TRL or tiny Shakespeare are left out where neither was there before nor a network
# brings it.
.venv-trl/ready: requirements-test.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch trl==1.12.0
	touch $@

SHAKESPEARE := out/shakespeare
bench: export GOMP_SPINCOUNT = 10000
bench: $(VENV)/ready-test
	-$(MAKE) .venv-trl/ready
	-test -e $(SHAKESPEARE)/val.bin || $(RUN) -m data.fetch text shakespeare --out $(SHAKESPEARE)
	$(RUN) -m bench.run $(BENCH) \
		$$(test ! -e .venv-trl/ready || echo --trl_python .venv-trl/bin/python) \
		$$(test ! -e $(SHAKESPEARE)/val.bin || echo --shakespeare $(SHAKESPEARE))

gpu: $(VENV)/ready-test
	-test -e $(SHAKESPEARE)/val.bin || $(RUN) -m data.fetch text shakespeare --out $(SHAKESPEARE)
	$(RUN) -m bench.gpu

clean:
	rm -rf out
