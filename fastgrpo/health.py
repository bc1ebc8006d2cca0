"""Warnings in words: what a step's metrics say about a run, what it means and what to do.

Each is said once a run: what comes and goes (a noisy step, a task that is nearly solved) would be
said over and over, and metrics.jsonl has its every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import fmean, median

from .config import TrainConfig
from .history import COMPARED, History, Metrics, deviation, finite

Finding = tuple[str, str]
"""What it is about, of which the first sentence alone is said, and the sentence."""

SILENT_GROUPS = 24
"""Groups without a signal in a row that are no chance: 1 in 17 million if half of them are."""

STALE = 0.1
"""Mean |log-prob in training - in sampling| of fresh samples that is no rounding any more."""


Rule = Callable[[History], Iterator[Finding]]


def exploding(run: History) -> Iterator[Finding]:
    """Gradients are 10 times what they were, 5 steps in a row; clipping hides it in the weights.

    Steps without a signal, whose gradient is 0, are passed over. No source: the numbers are ours.
    """
    norms = [norm for norm in finite(run.steps, "grad_norm") if norm > 0][-25:]
    if len(norms) == 25 and min(norms[20:]) > 10 * median(norms[:20]):
        yield (
            "exploding",
            f"grad_norm has been above {min(norms[20:]):.3g} for 5 steps, before it was "
            f"{median(norms[:20]):.3g}: training is about to diverge. Lower learning_rate, or "
            "raise beta to hold the policy to its start",
        )


def learning_rate(run: History) -> Iterator[Finding]:
    """The learning rate is 0 at two steps in a row: the first of a warm-up has 0 rightly.

    No source: a mistake in a configuration that nothing else would show.
    """
    if run.of_steps("learning_rate", 2) == [0.0, 0.0]:
        yield (
            "learning rate",
            "learning_rate is 0 for the second step: nothing is learned. Look at learning_rate, "
            "lr_scheduler_type and warmup_steps",
        )


def loss_near_zero(run: History) -> Iterator[Finding]:
    """The most asked question about GRPO (trl#2703, open-r1#239): why is the loss 0?"""
    loss = run.now("loss")
    if run.fresh and len(run.steps) <= 10 and abs(loss) < 1e-3 and run.now("grad_norm") > 0:
        yield (
            "loss",
            f"note: a loss near 0 ({loss:.2g}) is no error: before the policy has moved all ratios "
            "are 1 and the advantages of a group add up to 0. Learning shows in the reward, and "
            "that there is something to learn in grad_norm",
        )


def stale(run: History) -> Iterator[Finding]:
    """Sampler and trainer disagree about fresh samples (trl#4159; about 0.01 is rounding)."""
    difference = run.now("sampling/sampling_logp_difference/mean")
    if run.fresh and difference > STALE:
        yield (
            "stale",
            f"log-probs in training are {difference:.2g} from those of the sampler, in the mean: "
            "does it have the weights of this step? Ratios and KL are wrong if not",
        )


def importance(run: History) -> Iterator[Finding]:
    """The sampler's correction is far from 1 (trl#6789: a mean of 0.9 under truncated sampling)."""
    ratios = run.of_steps("sampling/importance_sampling_ratio/mean", 10)
    if ratios and not 0.9 <= fmean(ratios) <= 1.1:
        yield (
            "importance",
            f"sampling/importance_sampling_ratio/mean was {fmean(ratios):.2f} over the last 10 "
            "steps: the sampler is not the policy, or its tokens are mostly masked. Sample with "
            "the precision of training, or look at vllm_importance_sampling_mode",
        )


def clipped(run: History) -> Iterator[Finding]:
    """Most of a step is clipped away (arxiv.org/abs/1707.06347: the clip is for the few)."""
    for name in ("clip_ratio/region_mean", "cispo_clip_ratio"):
        shares = run.of_steps(name, 10)
        if shares and fmean(shares) > 0.3:
            yield (
                "clipped",
                f"{name} was {fmean(shares):.0%} over the last 10 steps: the policy moves too far "
                "between generations. Lower learning_rate, num_iterations or "
                "steps_per_generation, or widen epsilon and epsilon_high",
            )


def silent(run: History) -> Iterator[Finding]:
    """No group has a signal, three generations in a row (DAPO, arxiv.org/abs/2503.14476).

    Small batches are silent by chance: of prompts of all difficulties a third of the groups are.
    So there are `SILENT_GROUPS` at least.
    """
    config = run.config
    groups = config.prompts_per_step * config.optimizer_steps_per_generation
    count = max(3, math.ceil(SILENT_GROUPS / groups))
    if run.of_generations("frac_reward_zero_std", count) == [1.0] * count:
        yield (
            "silent",
            f"all rewards of a group were equal, in every group of the last {count} batches (mean "
            f"reward {run.now('reward'):.3g}): nothing is learned. If that is the best, the task "
            "is solved; if it is the worst, look at the reward functions and the completions, "
            f"take easier prompts, or raise num_generations{_or_resample(run)}",
        )


def few_groups(run: History) -> Iterator[Finding]:
    """Most groups have no signal (DAPO, arxiv.org/abs/2503.14476; trl#3708)."""
    shares = run.of_generations("frac_reward_zero_std", COMPARED)
    if shares and 0.8 < fmean(shares) < 1:
        yield (
            "few groups",
            f"{fmean(shares):.0%} of groups had equal rewards over the last {COMPARED} batches: "
            "most sampling is for nothing. Take prompts that are neither too easy nor too hard, "
            f"or raise num_generations{_or_resample(run)}",
        )


def advantages(run: History) -> Iterator[Finding]:
    """Unscaled advantages are very small or large.

    Divided by a standard deviation, and with multi_objective_aggregation: normalize_then_sum, they
    are near 1 by construction: the bands are for scale_rewards: none alone. No source: 0.1 and 0.6
    are for rewards from 0 to 1, whose deviations are about 0.5 at most.
    """
    config = run.config
    scaled = config.multi_objective_aggregation == "normalize_then_sum"
    stds = run.of_generations("advantages/std", 10)
    if config.scale_rewards != "none" or scaled or not stds:
        return
    std = f"advantages/std was {fmean(stds):.2g} over the last 10 batches"
    if fmean(stds) < 0.1 and fmean(run.of_generations("frac_reward_zero_std", 10)) < 0.8:
        yield (
            "advantages",
            f"{std}, and so small are gradients with scale_rewards: none. Raise reward_weights, "
            "take rewards that tell completions apart, or use scale_rewards: group",
        )
    if fmean(stds) > 0.6:
        yield (
            "advantages",
            f"{std}, more than rewards from 0 to 1 can have: with scale_rewards: none gradients "
            "are as large and as noisy. Lower reward_weights, or use scale_rewards: group",
        )


def kl_at_start(run: History) -> Iterator[Finding]:
    """Policy and reference differ before the first update (open-r1-multimodal#16)."""
    if run.now("step") == 1 and run.now("kl") > 0.05:
        yield (
            "kl at start",
            f"kl is {run.now('kl'):.2g} at the first step, where policy and reference are the same "
            "model: dropout (disable_dropout: true), other weights or other precision",
        )


def kl_drift(run: History) -> Iterator[Finding]:
    """KL above 0.05 that has bought nothing. No source: 0.05 is a rule of thumb.

    A KL above 0.05 alone is no fault: with a small beta it is how a policy learns. It is when the
    reward of the last generations is not above that of the first.
    """
    kls = run.of_steps("kl", COMPARED)
    if not kls or fmean(kls) <= 0.05 or run.num_generations < 3 * COMPARED:
        return
    first = finite(run.first_generations, "reward")
    last = run.of_generations("reward", COMPARED)
    if last and deviation(first, last) < 1:
        yield (
            "kl drift",
            f"kl was {fmean(kls):.2g} over the last {COMPARED} steps (above 0.05), yet the reward "
            f"is not above its start ({fmean(first):.3g}, now {fmean(last):.3g}): the policy moves "
            "away and gains nothing. Lower learning_rate, raise beta, or look at the rewards",
        )


def kl_spike(run: History) -> Iterator[Finding]:
    """KL is 10 times what it was and above 1 nat a token (torchforge#664, OpenRLHF#931)."""
    kls = run.of_steps("kl", 23)
    if kls and min(kls[20:]) > max(1.0, 10 * median(kls[:20])):
        yield (
            "kl spike",
            f"kl has been above {min(kls[20:]):.3g} for 3 steps, before it was "
            f"{median(kls[:20]):.2g}: the policy is breaking away from its start. Lower "
            "learning_rate or raise beta",
        )


def traded(run: History) -> Iterator[Finding]:
    """The first reward falls while another rises: reward hacking. No source: the numbers are ours.

    The first function is what the run is for, as in its evaluations; a weight cannot tell, for that
    of the format may be the heaviest. A change is 4 standard errors between the oldest and the
    newest generations that are remembered.
    """
    names = run.judges()
    if len(names) < 2 or len(run.generations) < 3 * COMPARED:
        return
    means = {n: finite(run.generations, f"rewards/{n}/mean") for n in names}
    old_new = {n: (v[:COMPARED], v[-COMPARED:]) for n, v in means.items() if len(v) > 2 * COMPARED}
    main = names[0]
    if main not in old_new or deviation(*old_new.pop(main)) > -4:
        return
    old, new = means[main][:COMPARED], means[main][-COMPARED:]
    for other, (before, after) in old_new.items():
        if deviation(before, after) > 4:
            yield (
                "traded",
                f"{main} fell from {fmean(old):.3g} to {fmean(new):.3g} while {other} rose from "
                f"{fmean(before):.3g} to {fmean(after):.3g}: the policy collects the one at the "
                f"cost of the other. Lower the weight of {other} in reward_weights",
            )


def never_right(run: History) -> Iterator[Finding]:
    """The first reward is 0 throughout, and others are all there is to learn.

    No source: see `traded`.
    """
    names = run.judges()
    if len(names) < 2 or any(run.of_generations(f"rewards/{names[0]}/mean", 40) or [1.0]):
        return
    others = [name for name in names[1:] if run.now(f"rewards/{name}/mean") > 0]
    if others:
        yield (
            "never right",
            f"{names[0]} has been 0 for every completion of the last 40 batches: only "
            f"{', '.join(others)} is learned. Look at completions.jsonl: is the function right, "
            "can the model answer at all, is max_completion_length enough?",
        )


def entropy(run: History) -> Iterator[Finding]:
    """Entropy collapse: a tenth of the start, or half of it and below 0.01 nats.

    arxiv.org/abs/2505.22617; rllm#116. A model may be as sure as that from the start.
    """
    values = run.of_steps("entropy", 20)[-10:]
    if not values or len(run.first_entropies) < 10:
        return
    start, now = fmean(run.first_entropies), fmean(values)
    if now < max(0.1 * start, min(0.5 * start, 0.01)):
        yield (
            "entropy",
            f"entropy was {now:.2g} nats a token over the last 10 steps, {start:.2g} in the first "
            "10: completions of a prompt are nearly alike and teach little. Unless the reward is "
            "where you want it, raise epsilon_high, temperature or entropy_coef, or lower "
            "learning_rate",
        )


def truncated(run: History) -> Iterator[Finding]:
    """No completion ends by itself, three generations in a row (trl#3248, ms-swift#4950)."""
    shares = run.of_generations("completions/clipped_ratio", 3)
    if shares and min(shares) >= 0.99:
        masked = ", and with mask_truncated_completions none is trained on"
        yield (
            "truncated",
            "all completions of the last 3 batches were cut off at max_completion_length = "
            f"{run.config.max_completion_length}: rewards judge beginnings"
            f"{masked if run.config.mask_truncated_completions else ''}. Raise it, reward short "
            "answers, or look whether the model's end-of-sequence token is the one it ends with",
        )


def failing(run: History) -> Iterator[Finding]:
    """A reward function fails in a tenth of generations or more (verl#5635, #5839)."""
    remedies = {
        "exceptions": "Mend it",
        "timeouts": "Make it faster, raise reward_timeout",
        "invalid": "Let it return finite numbers, or None",
    }
    for name in run.judges():
        for what, remedy in remedies.items():
            count = run.now(f"rewards/{name}/{what}")
            if count >= max(3, 0.1 * run.num_generations):
                said = "invalid results" if what == "invalid" else what
                yield (
                    f"{name} {what}",
                    f"{name} had {count:.0f} {said} in {run.num_generations} batches, whose "
                    f"completions it did not judge: what is learned is what the others say. "
                    f"{remedy}, or stop at the first with reward_errors: stop",
                )


RULES: tuple[Rule, ...] = (
    *(exploding, learning_rate, loss_near_zero, stale, importance, clipped),
    *(silent, few_groups, advantages, kl_at_start, kl_drift, kl_spike, traded, never_right),
    *(entropy, truncated, failing),
)


class Health:
    """Looks at the metrics of every step."""

    def __init__(self, config: TrainConfig) -> None:
        self._run = History(config)
        self._said: set[str] = set()

    def warnings(self, metrics: Metrics, *, fresh: bool) -> Iterator[str]:
        """Yield what should be known of a run since this step, unless it was said before.

        Args:
            metrics: of the step. Those of an evaluation alone are passed over.
            fresh: the policy has not moved since its completions were sampled.
        """
        if all(name == "step" or name.startswith("eval_") for name in metrics):
            return
        self._run.add(metrics, fresh=fresh)
        for rule in RULES:
            for subject, text in rule(self._run):
                if subject not in self._said:
                    self._said.add(subject)
                    yield text if text.startswith("note: ") else f"warning: {text}"


def _or_resample(run: History) -> str:
    return "" if run.config.dynamic_sampling else ", or set dynamic_sampling: true"
