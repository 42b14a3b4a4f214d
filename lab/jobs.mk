# Runs the jobs that plan.mk lists, in the folder where it lies; lab/experiments.py calls it.
# Each runs in its seed's folder, on one thread. What it prints goes to logs/.

.DEFAULT_GOAL := all
targets :=
include plan.mk

seed = $(firstword $(subst /, ,$@))
target = $(patsubst $(seed)/%,%,$@)
log = logs/$(subst /,_,$(target)).log

.PHONY: all
all: $(targets)

# A file is written whole or not at all: none is removed when a run is interrupted.
.PRECIOUS: $(targets)

# The trap lets the shell wait for a job that saves its state after Ctrl-C.
$(targets):
	@trap : INT; cd $(seed); start=$$(date +%s); \
	resume=$$(test ! -e $(target).resume || echo --resume); \
	"$$PYTHON" -m $(command) --seed $(seed) $$resume >$(log) 2>&1 && test -e $(target); \
	if test $$? != 0; then \
		last=$$(tail -n 1 $(log)); \
		why="failed: $${last:-it wrote nothing}; see $$PWD/$(log)"; \
		printf '%s\n' "$(command) (seed $(seed)) $$why" >&2; \
		exit 1; \
	fi; \
	seconds=$$(($$(date +%s) - start)); cd ..; \
	echo '{"seed": $(seed), "target": "$(target)", "seconds": '$$seconds'}' >>times.jsonl; \
	n=$$(ls $(targets) 2>/dev/null | wc -l); \
	echo "$$n of $(words $(targets)): seed $(seed) $(target), $$seconds s"
