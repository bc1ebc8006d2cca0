"""A run directory with everything one can hold, hostile texts included."""

import json

import yaml

HOSTILE = (
    "</script><script>document.title = 'pwned'</script>"
    "<img src=x onerror=\"document.title = 'pwned'\"><b>bold</b> &amp; {{ 7 * 7 }}"
)
STRANGE = "a\x00b\x1b[31m \u202eevil\u202c \ud800 שלום"


def write_lines(path, objects):
    path.write_text("".join(json.dumps(x) + "\n" for x in objects))


def made_up(path, n=40):
    """Write a run of n steps with everything a run directory can hold."""
    path.mkdir()
    config = {
        "model_name_or_path": "some/model",
        "dataset_name": "some/data",
        "reward_funcs": ["accuracy", "format"],
        "max_steps": 50,
        "learning_rate": 0.5,
        "temperature": 1.0,
        "of_tomorrow": HOSTILE,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    write_lines(path / "metrics.jsonl", [step_line(s) for s in range(1, n + 1)])
    rewards = [
        {"step": s, "rewards": {"accuracy": [float(s > 5), 0.0], "format": [None, s / 8]}}
        for s in range(1, n + 1)
    ]
    write_lines(path / "rewards.jsonl", rewards)
    completions = [completion(s, i) for s in range(10, n + 1, 10) for i in range(3)]
    write_lines(path / "completions.jsonl", completions)
    write_lines(path / "warnings.jsonl", [{"step": 3, "text": f"no signal {HOSTILE}"}])
    (path / "eval").mkdir()
    for step in (0, 20):
        metrics = {"pass@1": {"value": 0.25 + step / 100, "low": 0.2, "high": 0.5}}
        found = {
            "checkpoint": f"step-{step}" if step else "base",
            "split": "test",
            "num_prompts": 100,
            "num_samples": 4,
            "temperature": 1.0,
            "judge": "accuracy",
            "threshold": None,
            "metrics": metrics,
        }
        (path / "eval" / f"{step}.json").write_text(json.dumps(found))
    return path


def step_line(s):
    line = {
        "step": s,
        "reward": 0.1 * s,
        "rewards/accuracy/mean": s / 50,
        "rewards/format/mean": 0.5,
        "entropy": None if s == 7 else 1 / s,
        "loss": 1e-5 * (-1) ** s,
        "completions/mean_length": 100.0 + s,
        "completions/min_length": 3,
        "completions/max_length": 200 + s,
        "completions/clipped_ratio": 0.25,
        "num_tokens": 1000 * s,
        "step_time": 2.0,
        "time/generate": 1.5,
        "time/train": 0.5,
        "tokens_per_second": 500.0,
        "memory/peak_gib": 1.5,
        "rewards/format/timeouts": s // 4,
        "advantages/std": 1 / s,
        "my_rewards/share of <i>hints</i>": s % 3,
    }
    return line | ({"eval_reward": s / 100} if s % 10 == 0 else {})


def completion(s, i):
    return {
        "step": s,
        "prompt": [{"role": "user", "content": f"question {s}"}],
        "completion": [HOSTILE, STRANGE, "x" * 100_000][i],
        "rewards": {"accuracy": float(i), "format": None},
        "advantage": [0.5, -0.25, 0.5] if i == 2 else i - 0.5,
        "num_tokens": 10 + i,
        "finished": i != 1,
        "extra": {"difficulty": "hard"},
    } | ({"num_tool_tokens": 5} if i == 2 else {})


def chart_of(charts, title):
    (found,) = [chart for chart in charts if chart.title == title]
    return found
