# make              set up, then the whole recipe: world -> tokenizer -> pretrain -> SFT -> reward model -> PPO -> out/report.md
# make test         set up, then the tests
# make experiments  every claim with its control on three seeds, about an hour on 2 cores; goes on where it was interrupted
# make bench        speed against what users would pick instead, and how cost grows: out/bench.md; BENCH=--help lists its flags
# make test-faults  set up, then what takes longer: 20 kills a stage, and damaged files for 5 minutes (FUZZ_SECONDS=300)
# make clean        remove out/ and the default world; the virtual environment stays
# make CHECK=--check   the same as make, and fails where a figure of the report is below its floor
# Each stage reruns only when its script, the code it uses or its input changed.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
CORE := model.py common.py loop.py parallel.py data/tokenizer.py
WORLD := data/world/people.jsonl

# Threads that wait spin only briefly, then sleep. Where a core is busy with something else, ten times as long costs four times the time,
# and the default forty times; on free cores training is as fast and generation a sixth slower.
export GOMP_SPINCOUNT ?= 1000
# glibc keeps freed memory. By default it gives large blocks back and faults them in again within each step: a sixth of pretraining's time.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 2147483648

.PHONY: all test test-faults experiments bench clean
.DELETE_ON_ERROR:
all: out/report.md

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-test: requirements-test.txt $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

$(WORLD): data/world.py data/tokenizer.py common.py | $(VENV)/ready
	$(RUN) -m data.world

out/base.pt: $(WORLD) pretrain.py $(CORE) | $(VENV)/ready
	$(RUN) pretrain.py

out/sft.pt: out/base.pt sft.py data/conversation.py | $(VENV)/ready
	$(RUN) sft.py

data/world/preferences.jsonl: out/sft.pt data/label.py | $(VENV)/ready
	$(RUN) -m data.label

out/reward.pt: data/world/preferences.jsonl reward.py | $(VENV)/ready
	$(RUN) reward.py

out/ppo.pt: out/reward.pt ppo.py | $(VENV)/ready
	$(RUN) ppo.py

out/report.md: out/ppo.pt evaluate.py | $(VENV)/ready
	$(RUN) evaluate.py $(CHECK)

test: $(VENV)/ready-test
	$(VENV)/bin/ruff check
	$(RUN) -m pytest -q tests

test-faults: $(VENV)/ready-test
	$(RUN) -m pytest -q -m faults tests

experiments: | $(VENV)/ready
	$(RUN) experiments.py

# Rows that need TRL or tiny Shakespeare are left out where neither was there before nor a network brings it.
.venv-trl/ready: requirements-test.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch trl==1.12.0
	touch $@

bench: export GOMP_SPINCOUNT = 10000
bench: $(VENV)/ready-test
	-$(MAKE) .venv-trl/ready
	-test -e data/shakespeare/val.bin || $(RUN) -m data.fetch text shakespeare --out data/shakespeare
	$(RUN) -m bench.run $$(test ! -e .venv-trl/ready || echo --trl_python .venv-trl/bin/python) \
		$$(test ! -e data/shakespeare/val.bin || echo --shakespeare data/shakespeare) $(BENCH)

clean:
	rm -rf out data/world
