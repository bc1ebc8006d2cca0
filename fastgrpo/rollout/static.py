"""The default rollout engine: one prefill a prompt, then one-token steps on a static KV cache.

Not here: recurrent models, caches that grow, prompts that share a prefix.

P prompts, G completions a prompt, B = P * G completions, T completion positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from fastgrpo.attention import evaluating
from fastgrpo.rollout import Completions, SamplingParams, longest_request, new_seeds
from fastgrpo.rollout.cache import budget_bytes, fitting_rows, row_bytes
from fastgrpo.rollout.cuda_graph import GraphedSteps
from fastgrpo.rollout.decoder import Decoder, StaticModel, StepMaker, as_it_is
from fastgrpo.shortage import free_memory, shortage

# By type of device. On a GPU a check waits and fewer rows need another graph; on a CPU a check is
# free and dropping rows costs less than a step with them.
_STEPS_BETWEEN_CHECKS = {"cuda": 16, "cpu": 1}
_SHARE_TO_GO_ON = {"cuda": 1 / 2, "cpu": 7 / 8}


class StaticCacheRollout:
    """Sample from the Hugging Face causal LM that is being trained: no second copy, no server."""

    is_policy = True
    """What samples are the very weights that are trained."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_batch: int | None = None,
        cuda_graph: bool = True,
        on_message: Callable[[str], None] = warnings.warn,
    ):
        """Bind the engine to a model.

        Args:
            model: a decoder-only causal LM whose layers attend fully or in a sliding window; a
                `PeftModel` samples with its active adapters.
            eos_token_ids: any of these ends a completion.
            pad_token_id: fills a completion after its end; may be one of `eos_token_ids`.
            max_batch: completions decoded at once, which bounds the KV cache; None for as many as
                fit in half of the GPU's free memory, or in a quarter of the host's.
            cuda_graph: on a GPU, replay a decoding step as one CUDA graph.
            on_message: is told once, in a sentence, if that turns out to be impossible.

        Raises:
            ValueError: `max_batch` is below 1, or the model cannot decode on a static cache.
        """
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, or None for no bound, got {max_batch}")
        self._model = StaticModel(model, list(eos_token_ids), pad_token_id)
        self.max_batch = max_batch
        """Completions decoded at once, fewer than were asked for once memory has run out."""
        self._problems: list[str] = []
        self._cuda_graph = cuda_graph
        self._on_message = on_message
        self._graphed: GraphedSteps | None = None

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
        """Sample `num_generations` completions of each prompt.

        The random numbers of a prompt's completions are its seed's alone, whatever else is sampled
        and however much of it at once.

        Args:
            prompt_ids: the token ids of each prompt, without padding.
            num_generations: completions a prompt (G).
            sampling: how tokens are drawn.
            seeds: of the random numbers of each prompt; None: drawn from torch's CPU generator.
                Where decoding is greedy there are none.
            max_lengths: tokens that the completions of each prompt may have, where that is less
                than `sampling` says; None: it is not.

        Returns:
            P * G completions on the model's device.

        Where memory runs out the same is sampled again with half as many completions at once, and
        so it is from then on.

        Raises:
            ValueError: what is asked for makes no sense (`longest_request`), or a prompt and its
                completion do not fit in the model's positions.
            torch.OutOfMemoryError: one completion alone does not fit.
        """
        self._check(*longest_request(prompt_ids, num_generations, sampling, seeds, max_lengths))
        device: torch.device = self._model.model.device
        shape = len(prompt_ids), num_generations, sampling.max_completion_length
        uniforms_PGT = torch.zeros(shape, dtype=torch.float64, device=device)
        if sampling.temperature > 0:
            generator = torch.Generator(device)
            for uniforms_GT, seed in zip(
                uniforms_PGT, seeds or new_seeds(len(prompt_ids)), strict=True
            ):
                uniforms_GT.uniform_(generator=generator.manual_seed(seed))
        while True:
            longest = max(map(len, prompt_ids)) + sampling.max_completion_length
            rows = self.max_batch or self._fitting_rows(longest, num_generations, sampling)
            rows = min(rows, len(prompt_ids) * num_generations)
            try:
                return self._sample(prompt_ids, sampling, uniforms_PGT, rows, max_lengths)
            except Exception as error:
                said = shortage(error)
                if said is None:
                    raise
            # The error is gone here, and with it the frames that held the caches.
            self._halve(rows, said)
            free_memory()

    def _sample(
        self,
        prompt_ids: list[list[int]],
        sampling: SamplingParams,
        uniforms_PGT: torch.Tensor,
        rows: int,
        max_lengths: Sequence[int] | None,
    ) -> Completions:
        """Sample so many completions at once, and all after each other."""
        device, num_generations = uniforms_PGT.device, uniforms_PGT.shape[1]
        prompts_at_once = max(1, rows // num_generations)
        copies_at_once = min(rows, num_generations)
        run = partial(
            Decoder.run,
            make_step=self._make_step(device),
            steps_between_checks=_STEPS_BETWEEN_CHECKS[device.type],
            share_to_go_on=_SHARE_TO_GO_ON[device.type],
        )
        parts: list[Completions] = []
        with evaluating(self._model.model, self._model.attentions):
            for i in range(0, len(prompt_ids), prompts_at_once):
                prompts = self._model.prefill(prompt_ids[i : i + prompts_at_once])
                for j in range(0, num_generations, copies_at_once):
                    uniforms = uniforms_PGT[i : i + prompts_at_once, j : j + copies_at_once]
                    copies = uniforms.shape[1]
                    decoder = Decoder(
                        self._model,
                        prompts,
                        copies,
                        sampling,
                        uniforms.flatten(0, 1),
                        grows=device.type == "cpu",
                        max_lengths=max_lengths and max_lengths[i : i + prompts_at_once],
                    )
                    parts.append(run(decoder))
                    del decoder  # its cache, before the next is allocated
        mask_BT = torch.cat([part.mask for part in parts])
        length = int(mask_BT.any(0).sum())
        return Completions(
            ids=torch.cat([part.ids for part in parts])[:, :length],
            mask=mask_BT[:, :length],
            logps=torch.cat([part.logps for part in parts])[:, :length],
            finished=torch.cat([part.finished for part in parts]),
        )

    def _halve(self, rows: int, said: str) -> None:
        """Decode half as many completions at once from now on.

        Raises:
            torch.OutOfMemoryError: it was one already.
        """
        failed = f"out of memory while {rows} completion{'s were' if rows > 1 else ' was'} sampled"
        if rows == 1:
            raise torch.OutOfMemoryError(
                f"{failed} ({said}): lower max_completion_length, or take shorter prompts"
            )
        self.max_batch = rows // 2
        self._problems.append(
            f"{failed} at once ({said}): from now on {self.max_batch} at most; "
            f"max_generation_batch_size={self.max_batch} says so from the start"
        )

    def take_problems(self) -> list[str]:
        """Return what went wrong since the last time, a sentence each."""
        problems, self._problems = self._problems, []
        return problems

    def update_weights(self, model: object) -> None:
        """Do nothing: an optimisation step has changed the weights that are sampled from."""

    def sleep(self) -> None:
        """Return the memory of graphs; caches and graphs themselves end with `generate`."""
        if self._model.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _make_step(self, device: torch.device) -> StepMaker:
        """Return what turns a step into the function that is called in its place."""
        if device.type != "cuda" or not self._cuda_graph:
            return as_it_is
        if self._graphed is None:
            self._graphed = GraphedSteps(device, self._on_message)
        return self._graphed

    def _fitting_rows(self, length: int, num_generations: int, sampling: SamplingParams) -> int:
        """Return how many completions are decoded at once."""
        model = self._model.model
        device: torch.device = model.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
        truncated = sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)
        each = row_bytes(model.config, length, dtype, truncated=truncated)
        return fitting_rows(budget_bytes(device), each, num_generations)

    def _check(self, prompt: int, completion: int) -> None:
        """Raise a ValueError for tokens that the model has no positions for."""
        limit: int | None = getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and prompt + completion > limit:
            raise ValueError(
                f"the longest prompt has {prompt} tokens, which with max_completion_length "
                f"{completion} exceeds the model's max_position_embeddings {limit}: shorten the "
                "prompt or max_completion_length"
            )
