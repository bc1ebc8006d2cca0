"""vLLM in this process: faster than the static cache, for a second copy of the weights.

The copy starts empty, whatever the policy came from, and gets the policy's weights in memory: no
checkpoint is read or written. Not here: a server, several GPUs, reading what vLLM can quantise.

P prompts, G completions a prompt, B = P * G completions, T positions.
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from fastgrpo.rollout import Completions, SamplingParams, longest_request, new_seeds
from fastgrpo.rollout.weights import check_weights, checkpoint_weights

# What vLLM is told in its environment, where the user has not said otherwise.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where the weights are
    "VLLM_LOGGING_LEVEL": "ERROR",  # at every push it warns of layers that have no weights
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on a CPU, training needs the threads too
}


class VLLMRollout:
    """Sample with vLLM from its own copy of the policy's weights."""

    is_policy = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        dtype: torch.dtype,
        gpu_memory_utilization: float = 0.3,
        max_model_length: int | None = None,
        max_batch: int | None = None,
        enable_sleep_mode: bool = False,
        cuda_graph: bool = True,
        seed: int = 0,
    ):
        """Start the engine; vLLM picks the device itself.

        Args:
            model: the policy, also a `PeftModel`; its weights are pushed before the first token.
            eos_token_ids: any of these ends a completion.
            pad_token_id: fills a completion after its end; may be one of `eos_token_ids`.
            dtype: of vLLM's copy of the weights; best what the policy computes in.
            gpu_memory_utilization: share of the GPU's memory for weights and KV cache (without a
                GPU, of the main memory).
            max_model_length: tokens of prompt and completion; None: what the model can.
            max_batch: completions decoded at once; None: vLLM's choice.
            enable_sleep_mode: let `sleep` give the memory back.
            cuda_graph: on a GPU, let vLLM compile and capture its steps.
            seed: of vLLM itself. On a GPU all randomness is its own: the seeds given to `generate`
                would make it draw row by row.

        Raises:
            ValueError: vLLM is not installed, or cannot run this model in this memory.
        """
        if find_spec("vllm") is None:
            raise ValueError(
                "use_vllm: needs vLLM, which is not installed; pip install 'fastgrpo[vllm]'"
            )
        check_weights(model)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        vllm: Any = import_module("vllm")  # not `import`: this module has its name
        self._model = model
        self._device = model.device
        self._eos_token_ids = list(eos_token_ids)
        self._pad_token_id = pad_token_id
        self._sleeps = enable_sleep_mode
        self._asleep = False
        self._stale = True  # vLLM's weights are not the policy's
        self._temperature = 1.0
        try:
            with _random_states_kept(self._device):
                self._llm: Any = vllm.LLM(
                    model=_save_config(model),
                    load_format="dummy",
                    dtype=dtype,
                    skip_tokenizer_init=True,  # token ids in, token ids out
                    generation_config="vllm",  # no defaults of the model's: all is said here
                    logprobs_mode="raw_logprobs",  # before top_p and top_k
                    gpu_memory_utilization=gpu_memory_utilization,
                    max_model_len=max_model_length,
                    enable_sleep_mode=enable_sleep_mode,
                    enforce_eager=self._device.type == "cpu" or not cuda_graph,
                    seed=seed,
                    **({} if max_batch is None else {"max_num_seqs": max_batch}),
                )
        except ValueError as error:
            raise ValueError(
                f"use_vllm: vLLM cannot start: {_reason(error)}; if it is for memory, change "
                "vllm_gpu_memory_utilization or vllm_max_model_length, else leave use_vllm out"
            ) from error
        self._max_model_length: int = self._llm.llm_engine.model_config.max_model_len
        self._llm.apply_model(self._scale_logits)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: list[list[int]],  # P prompts of any length
        num_generations: int,
        sampling: SamplingParams,
        seeds: Sequence[int] | None = None,  # P
        *,
        max_lengths: Sequence[int] | None = None,  # P
    ) -> Completions:
        """Sample `num_generations` completions of each prompt from the policy as it is now.

        Args:
            prompt_ids: the token ids of each prompt, without padding.
            num_generations: completions a prompt (G).
            sampling: how tokens are drawn. vLLM looks at `min_p` before top_k and top_p.
            seeds: of the random numbers of each prompt; None: drawn from torch's CPU generator. On
                a GPU, and where decoding is greedy, they are not used.
            max_lengths: tokens that the completions of each prompt may have, where that is less
                than `sampling` says; None: it is not.

        Returns:
            P * G completions on the model's device.

        Raises:
            ValueError: what is asked for makes no sense (`longest_request`), or a prompt and its
                completion do not fit.
        """
        self._check(*longest_request(prompt_ids, num_generations, sampling, seeds, max_lengths))
        limits = max_lengths or [sampling.max_completion_length] * len(prompt_ids)
        if self._device.type == "cuda" or sampling.temperature == 0:
            each_seed = [None] * len(prompt_ids)
        else:
            each_seed = seeds or new_seeds(len(prompt_ids))
        with torch.autocast(self._device.type, enabled=False):  # its kernels choose their types
            self._wake()
            self._temperature = sampling.temperature or 1.0
            requests: list[Any] = self._llm.generate(
                [{"prompt_token_ids": ids} for ids in prompt_ids],
                [
                    self._params(
                        replace(sampling, max_completion_length=limit),
                        num_generations,
                        seed,
                    )
                    for limit, seed in zip(limits, each_seed, strict=True)
                ],
                use_tqdm=False,
            )
        # Greedy completions of a prompt are the same, and vLLM wants to be asked for one.
        copies = num_generations if sampling.temperature == 0 else 1
        return self._completions([o for r in requests for _ in range(copies) for o in r.outputs])

    def update_weights(self, model: PreTrainedModel) -> None:
        """Sample from these weights from now on.

        They are read at the next `generate`, once, however many steps were taken until then: vLLM
        need not be awake in between.

        Raises:
            ValueError: the weights cannot be given to vLLM.
        """
        check_weights(model)
        self._model = model
        self._stale = True

    def take_problems(self) -> list[str]:
        """Return nothing: vLLM makes do with the memory it has taken at its start."""
        return []

    def sleep(self) -> None:
        """Give the memory back until the next `generate`; without `enable_sleep_mode`, nothing."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=2)  # drops the weights too: they are pushed anew anyway
            self._asleep = self._stale = True

    def _wake(self) -> None:
        """Make vLLM able to sample, with the policy's weights."""
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        if self._stale:
            weights = checkpoint_weights(self._model)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self._device.type == "cpu":
                self._llm.apply_model(_pack_head)
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
        if self._stale and not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of earlier weights: a request is running")
        self._stale = self._asleep = False

    def _scale_logits(self, model: Any) -> None:
        """Divide the logits by the temperature where vLLM computes them, in fp32.

        vLLM reports log-probs either before the temperature or after top_p and top_k. So it is
        told temperature 1, and what it has for raw log-probs are those at the temperature.
        """
        layers: Any = import_module("vllm.model_executor.layers.logits_processor")

        def scale(_module: Any, _args: Any, logits: Tensor) -> Tensor:
            return logits if self._temperature == 1 else logits.float() / self._temperature

        heads = [module for module in model.modules() if isinstance(module, layers.LogitsProcessor)]
        if len(heads) != 1:
            raise ValueError(
                f"use_vllm: vLLM's {type(model).__name__} computes its logits in {len(heads)} "
                "places, which is not known here; leave use_vllm out"
            )
        heads[0].register_forward_hook(scale)

    def _params(self, sampling: SamplingParams, num_generations: int, seed: int | None) -> Any:
        vllm: Any = import_module("vllm")
        greedy = sampling.temperature == 0
        return vllm.SamplingParams(
            n=1 if greedy else num_generations,
            seed=seed,
            temperature=0.0 if greedy else 1.0,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p or 0.0,
            max_tokens=sampling.max_completion_length,
            ignore_eos=True,  # what ends a completion is said here
            stop_token_ids=[*self._eos_token_ids, *sampling.stop_token_ids],
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
        )

    def _completions(self, outputs: list[Any]) -> Completions:
        def pad(rows: list[Tensor], value: float) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value).to(self._device)

        ids = [torch.tensor(output.token_ids) for output in outputs]
        logps = [torch.tensor(output.logprobs.logprobs, dtype=torch.float32) for output in outputs]
        finished = [output.finish_reason == "stop" for output in outputs]
        return Completions(
            ids=pad(ids, self._pad_token_id),
            mask=pad([torch.ones_like(row, dtype=torch.bool) for row in ids], False),
            logps=pad(logps, 0.0),
            finished=torch.tensor(finished, device=self._device),
        )

    def _check(self, prompt: int, completion: int) -> None:
        if prompt + completion > self._max_model_length:
            raise ValueError(
                f"the longest prompt has {prompt} tokens, which with max_completion_length "
                f"{completion} exceeds the {self._max_model_length} that vLLM makes room for: "
                "raise vllm_max_model_length, or shorten the prompt or max_completion_length"
            )


def _pack_head(model: Any) -> None:
    """Pack the LM head again: on a CPU a tied one has a copy, which `reload_weights` forgets."""
    embedding: Any = import_module("vllm.model_executor.layers.vocab_parallel_embedding")
    for module in model.modules():
        if isinstance(module, embedding.ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _reason(error: Any) -> str:
    """Return the message of an error, also of the many-lined ones of pydantic."""
    return error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)


def _save_config(model: Any) -> str:
    """Write the configuration of a model where vLLM can read it; return the directory.

    Its name depends on the content alone: vLLM finds what it compiled for this model by this path.
    """
    envs: Any = import_module("vllm.envs")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    digest = hashlib.sha256(config.to_json_string().encode()).hexdigest()[:16]
    directory = Path(envs.VLLM_CACHE_ROOT) / "fastgrpo" / digest
    config.save_pretrained(directory)
    return str(directory)


@contextmanager
def _random_states_kept(device: torch.device) -> Generator[None]:
    """Undo what vLLM does at its start: it seeds every generator of the process."""
    states = random.getstate(), np.random.get_state()
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
