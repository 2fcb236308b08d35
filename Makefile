# Each target sets up .venv by itself. The two that matter: `make book` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
STUDY ?= params/embedded.yaml
SET ?=
# Every end-to-end study of real data; another list: make studies STUDIES="params/a.yaml params/b.yaml"
STUDIES ?= params/caltech101_resnet18.yaml params/dtd_resnet18.yaml params/dogsvscats_resnet18.yaml \
  params/caltech101_mobilenetv2.yaml params/dtd_mobilenetv2.yaml params/dogsvscats_mobilenetv2.yaml \
  params/caltech101_resnet18_augmented.yaml params/dtd_resnet18_augmented.yaml \
  params/dogsvscats_resnet18_augmented.yaml
TABLES ?= _build/tables
BIN := .venv/bin
SNAKEMAKE := $(BIN)/snakemake --snakefile Snakefile --cores 1 --rerun-incomplete --quiet rules host --nolock
export PYTHONHASHSEED := 0

.PHONY: book study studies tables test lint clean
.NOTPARALLEL:  # studies are timed

book: .venv/.installed  ## execute all notebooks with the embedded study and build the book
	@$(SNAKEMAKE) --config study=params/embedded.yaml overrides="" -- book
	@echo "The book: $(CURDIR)/_build/html/index.html"

study: .venv/.installed  ## run any study: make study STUDY=params/<name>.yaml SET="training.epochs=3 seed=1"
	@$(BIN)/python -m piebridge check "$(STUDY)" --set '$(SET)'
	@$(SNAKEMAKE) --config study="$(STUDY)" overrides='$(SET)' -- study
	@$(BIN)/python -m piebridge summary "$(STUDY)" --set '$(SET)'

studies: .venv/.installed  ## run STUDIES one after the other; called again, it goes on where it was stopped
	@trap 'exit 130' INT; failed=""; \
	for study in $(STUDIES); do $(MAKE) --no-print-directory study STUDY="$$study" || failed="$$failed $$study"; done; \
	if [ -n "$$failed" ]; then echo "error: not finished, see above:$$failed" >&2; exit 1; fi

# Of the list above those that have been run; of a list of your own, all.
tables: .venv/.installed  ## write the records of STUDIES as CSV files into the folder TABLES
	@$(BIN)/python -m piebridge collect $(STUDIES) --set '$(SET)' --output "$(TABLES)" \
	  $(if $(filter file,$(origin STUDIES)),--if-run)

test: .venv/.installed  ## the test suite
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest

clean:  ## remove everything that was made, but not .venv
	rm -rf _build .snakemake

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; call make with PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Setting up .venv (a few minutes, once) ..."
	$(PYTHON) -m venv .venv
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt \
	  | awk '/^(Collecting|Installing|Successfully)/ { print; fflush() }'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@
